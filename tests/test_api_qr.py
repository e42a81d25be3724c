"""Room qr of telemt_api.py: the matrices of an independent encoder, read back by an independent decoder."""
from __future__ import annotations

import random
import re

import numpy
import pytest
import qrcodegen
import zxingcpp
from telemt_api import QrCode, draw_qr, make_qr

DRAWN = {"█": "11", "▀": "10", "▄": "01", " ": "00"}


def random_link(dice: random.Random) -> str:
    domain = "".join(dice.choice("abcdefghijklmnopqrstuvwxyz0123456789-.") for _ in range(dice.randint(4, 60)))
    secret = dice.choice(("", "dd", "ee")) + dice.randbytes(16).hex()
    tail = domain.encode().hex() if secret.startswith("ee") else ""
    return f"tg://proxy?server={domain}&port={dice.randint(1, 65535)}&secret={secret}{tail}"


def independent(text: str) -> list[str]:
    code = qrcodegen.QrCode.encode_segments([qrcodegen.QrSegment.make_bytes(text.encode())], qrcodegen.QrCode.Ecc.MEDIUM, boostecl=False)
    return ["".join(str(int(code.get_module(x, y))) for x in range(code.get_size())) for y in range(code.get_size())]


def read(rows: list[str]) -> str:
    """What a decoder sees in a picture of the symbol, four pixels a module."""
    modules = numpy.array([[255 * (cell == "0") for cell in row] for row in rows], dtype=numpy.uint8)
    picture = numpy.kron(numpy.pad(modules, 4, constant_values=255), numpy.ones((4, 4), dtype=numpy.uint8))
    return zxingcpp.read_barcodes(picture)[0].text


def test_matrices_of_200_links_equal_those_of_an_independent_encoder() -> None:
    dice = random.Random(200)
    for _ in range(200):
        link = random_link(dice)
        assert make_qr(link).rows == independent(link), link


@pytest.mark.parametrize("size", [1, 14, 15, 62, 108, 152, 180, 213, 233, 620, 1170, 2331])
def test_every_size_is_read_back(size: int) -> None:
    text = ("tg://proxy?server=" * 200)[:size]
    code = make_qr(text)
    assert len(code.rows) == 17 + 4 * code.version == len(code.rows[0])
    assert read(code.rows) == text


def test_a_usual_link_is_version_7_and_the_longest_text_40() -> None:
    assert make_qr("x" * 108).version == 7
    assert make_qr("x" * 2331).version == 40
    with pytest.raises(ValueError, match="2332 bytes"):
        make_qr("x" * 2332)


def test_text_that_is_not_ascii_counts_in_bytes() -> None:
    assert read(make_qr("tg://proxy?server=пример").rows) == "tg://proxy?server=пример"


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("size", [10, 108])
def test_a_drawn_code_is_the_code_with_its_quiet_zone(plain: bool, size: int) -> None:
    code = make_qr("y" * size)
    lines = draw_qr(code, plain)
    assert all(("\x1b" in line) != plain for line in lines)
    shown = [[DRAWN[char] for char in re.sub(r"\x1b\[[0-9;]*m", "", line)] for line in lines]
    rows = ["".join(cell[half] for cell in line) for line in shown for half in (0, 1)]
    if plain:                                  # light is drawn
        rows = [row.translate({48: "1", 49: "0"}) for row in rows]
    inner = [row[4:-4] for row in rows[4:4 + len(code.rows)]]
    assert inner == code.rows
    border = rows[:4] + rows[4 + len(code.rows):] + [row[:4] + row[-4:] for row in rows]
    assert set("".join(border)) == {"0"} and len(rows) - len(code.rows) in (8, 9)


def test_codes_are_values() -> None:
    assert make_qr("a") == QrCode(1, make_qr("a").rows)
