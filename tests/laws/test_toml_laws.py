"""Our reader of TOML beside the one of the standard library: the same tables, or both refuse."""
from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import telemt

ROOT = Path(telemt.__file__).resolve().parent
# Pieces that make documents which are nearly right; a soup of characters would hardly ever get past the first line.
KEYS = st.sampled_from(["a", "b", "a.b", "a . b", '"a"', "'b'.c", "a.b.c", "1", "-", '"\\u0061"', '""', "é", '"""a"""', "a.", ".a", "a b"])
STRINGS = ['""', "''", '"a"', '"\\n\\t\\"\\\\"', '"\\u00e9\\U0001F600"', '"\\ud800"', '"\\U00110000"', '"\\x41"', '"\\u12"', "'\\n'",
           '"a\tb"',
           '"a\x01"', '"\x7f"', "'\x00'", '"""a"b""c"""', '""""""', '"""""""', '""""a"""""', '""""""""', "'''a'b''c'''", "''''''''",
           "'''''''''",
           '"""\na\\\n   b"""', '"""a\\  \n\n  b"""', '"""a\\ b"""', '"""\r\n\r\na"""', '"""\\', '"a', "'a", "'''a", '"\\', '"a\nb"',
           "'a\nb'",
           '"é\xa0\u2028"', '"""\\"""', '"\\e"', '"""a\\\t\n b"""', '"\\\nb"']
NUMBERS = ["0", "-0", "+1", "01", "1_0", "1__0", "_1", "1_", "0x1F", "0X1f", "0xg",
           "0x", "0x_1", "0x1_f", "0o17", "0o8", "0b101", "0b2", "+0x1", "1.5",
           "1.", ".5", "1e5", "1E+5",
           "1e-0_1", "1.0_1e1", "1._0", "1.0e", "1e1.5", "-inf", "+nan", "inf", "Inf", "1 2", "9" * 25, "0e0", "00.5",
           "1e", "--1", "0b", "1e+", "9223372036854775807", "١"]
MOMENTS = ["1979-05-27", "1979-05-27T07:32:00", "1979-05-27 07:32:00Z", "1979-05-27t07:32:00.123456789-08:00", "1979-05-27T07:32:00+24:00",
           "1979-02-30", "1979-13-01", "1979-05-27T24:00:00", "1979-05-27T07:32", "07:32:00", "07:32:00.5", "07:32", "07:32:60", "24:00:00",
           "1979-05-27Z", "1979-05-27 ", "1979-05-27 a:", "0000-01-01", "1979-5-27", "1979-05-27T07:32:00.", "1979-05-27T07:32:00+08:60",
           "1979-05-27 07:32:00 Z", "1979-05-27  07:32:00", "1979-05-27T07:32:00z", "1979-05-27+08:00", "07:32:00Z", "1979-05-27 0a:00:00",
           "1979-05-27T07:32:00.1.2", "1979-05-27T"]
PLAIN = st.sampled_from([*STRINGS, *NUMBERS, *MOMENTS, "true", "false", "True", "truefalse", "", "a", "[", "]", "{", "}", "=", "#"])
GAPS = st.sampled_from(["", " ", "\t", "  "])
BREAKS = st.sampled_from(["", " ", "\n", " # no\n", "\r\n", "\r", " \n\n"])
VALUES = st.recursive(
    PLAIN | st.just("1"),
    lambda inner: st.builds(lambda items, gap, comma, end: "[" + gap + f"{comma}{gap}".join(items) + end + gap + "]",
                            st.lists(inner, max_size=3), BREAKS, st.sampled_from([",", ",", ",", ",,", ""]), st.sampled_from(["", ","]))
    | st.builds(lambda pairs, gap, end: "{" + gap + f",{gap}".join(f"{key}{gap}={gap}{value}" for key, value in pairs) + end + "}",
                st.lists(st.tuples(KEYS, inner), max_size=3), GAPS | st.just("\n"), st.sampled_from(["", "", "", ","])), max_leaves=5)
LINES = st.one_of(
    st.builds("{}{}{}={}{}{}".format, GAPS, KEYS, GAPS, GAPS, VALUES, st.sampled_from(["", "", " # a", " b", "# \x01", "\x0b"])),
    st.builds(lambda key, gap: f"{gap}[{gap}{key}{gap}]{gap}", KEYS, GAPS), st.builds(lambda key, gap: f"[[{gap}{key}{gap}]]", KEYS, GAPS),
    st.sampled_from(["", "# é", "[a]]", "[[a]", "[ [a]]", "[]", "a", "= 1", "#\x00", "a = 1 b = 2"]))


def both(text: str) -> tuple[object, object]:
    """What each makes of it: its tables, as a text that tells 1 from 1.0 and NaN from nothing, or None."""
    found: list[object] = []
    for read in (tomllib.loads, telemt.parse_toml):
        try:
            found.append(repr(read(text)))
        except (ValueError, telemt.ConfigError):
            found.append(None)
    return found[0], found[1]


@given(st.lists(LINES, max_size=6).map("\n".join))
@example("[a.b]\n[a]\nb.c = 1").via("tables that a longer header made")
@example("[a]\nb.c = 1\n[a.b]").via("one that dotted keys made has no header")
@example("[[a]]\n[a.b]\n[[a]]\n[a.b]").via("each element has its own")
@example("a = {b = {}}\n[a.b]").via("inline tables are closed")
@example("a = []\n[[a]]").via("so are arrays")
@example("[[a]]\n[a]").via("a list is no table")
def test_documents_mean_the_same(text: str) -> None:
    theirs, ours = both(text)
    assert ours == theirs


@given(PLAIN | VALUES | st.text(max_size=12) | st.text("0123456789_-+.:eExobTZ \"'\\nuU[]{},=#\n", max_size=14))
def test_values_mean_the_same(text: str) -> None:
    theirs, ours = both(f"x = {text}")
    assert ours == theirs


@pytest.mark.parametrize("value", [*STRINGS, *NUMBERS, *MOMENTS])
def test_every_listed_value(value: str) -> None:
    for text in (f"x = {value}", f"x = [{value}, {value}]", f"x = {{y = {value}}}", f"{value} = 1"):
        theirs, ours = both(text)
        assert ours == theirs, text


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.toml"), *ROOT.glob("deploy/**/*.toml")]), ids=lambda path: path.name)
def test_real_files(path: Path) -> None:
    theirs, ours = both(path.read_text(encoding="utf-8"))
    assert ours == theirs is not None
