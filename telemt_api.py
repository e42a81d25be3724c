"""telemt_api.py - what operators see and steer: the Control API `/v1` and the metrics of telemt.py.

telemt.py imports this file when the configuration enables the API or the metrics; without it the proxy runs on.  It works
in its own threads.  They read plain integers of the data plane and ask its loop for everything else (`ControlPort`), so
that no HTTP client, slow or hostile, holds up a session.  telemt.py runs as `__main__`: to import it here would load it a
second time, so its names appear in annotations only.

   1  envelope    pure  <- -               answers: ApiError, JSON out and in, revision and If-Match; ControlPort
   9  service     io    <- 1               start and stop
  10  qr          pure  <- -               a link as a QR code
"""
from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from telemt import Counters, Link, Loaded, Log, Settings, Sources, User

_T = TypeVar("_T")

# == 1. envelope =============================================================
# Every answer of /v1 is one line of JSON: {"ok":true,"data":...,"revision":...}
# or {"ok":false,"error":{"code":...,"message":...},"request_id":...}.  The codes
# and the messages are interface (api.md 6).
# Bodies are read more strictly than `json` does: no duplicate names, no NaN, no
# lone surrogates, bounded nesting (api.md 8).  Trap: `-0` is no integer >= 0, and
# Python reads it as 0, so it becomes a float here, which no integer member takes.

JSON_TYPE: Final = "application/json; charset=utf-8"
_NESTING_MAX: Final = 128
_STRUCTURE: Final = re.compile(r'"(?:[^"\\]|\\.)*"|([\[{])|([\]}])', re.DOTALL)
_NO_HEADER_TEXT: Final = re.compile(r"[^\t\x20-\x7e]")
NEVER: Final = "*"                        # a precondition that no revision meets


class ApiError(Exception):
    """A refusal as the client sees it: HTTP status, machine-readable code, message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def bad_request(message: str) -> ApiError:
    """400: the request cannot be carried out as it stands."""
    return ApiError(400, "bad_request", message)


def forbidden(message: str) -> ApiError:
    """403: not for this client."""
    return ApiError(403, "forbidden", message)


def not_found(message: str = "Route not found") -> ApiError:
    """404."""
    return ApiError(404, "not_found", message)


def internal_error(message: str = "internal error") -> ApiError:
    """500: our side; the message names what the operator can repair, never an exception of ours."""
    return ApiError(500, "internal_error", message)


def dump_json(value: object) -> str:
    """Compact JSON in one line, non-ASCII as it is, floats in shortest form with a fraction (api.md 8)."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def success_body(data: str, revision: str) -> bytes:
    """Envelope around `data`, which is JSON already."""
    return f'{{"ok":true,"data":{data},"revision":"{revision}"}}'.encode("utf-8", "replace")


def error_body(error: ApiError, request_id: int) -> bytes:
    """Envelope of a refusal; request_id: number of the request in this process."""
    text = dump_json({"ok": False, "error": {"code": error.code, "message": error.message}, "request_id": request_id})
    return text.encode("utf-8", "replace")


def parse_body(body: bytes) -> dict[str, Any]:
    """Return the object that a request body holds.  Raises ApiError(400) for everything that is not strict JSON (api.md 8)."""
    invalid = bad_request("Invalid JSON body")
    try:
        text = body.decode()
        if text.count("[") + text.count("{") > _NESTING_MAX:
            _check_nesting(text)
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_parse_int)
        if "\\u" in text or "\\U" in text:
            json.dumps(value, ensure_ascii=False).encode()         # a lone surrogate has no UTF-8
    except (ValueError, RecursionError):       # UnicodeError and JSONDecodeError are ValueErrors
        raise invalid from None
    if not isinstance(value, dict):
        raise invalid
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate member")
    return found


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _parse_int(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)


def _check_nesting(text: str) -> None:
    depth = 0
    for token in _STRUCTURE.finditer(text):
        depth += (token[1] is not None) - (token[2] is not None)
        if depth > _NESTING_MAX:
            raise ValueError("too deep")


def wanted_revision(values: Sequence[str]) -> str | None:
    """What the If-Match lines of a request demand; None = nothing, NEVER = what cannot be met (api.md 7)."""
    if not values:
        return None
    if len(values) > 1 or _NO_HEADER_TEXT.search(values[0]):
        return NEVER
    value = values[0].strip(" \t")
    return value.strip('"') if value else None


def check_revision(wanted: str | None, revision: str) -> None:
    """Raise ApiError(409) if a precondition does not hold for the current revision."""
    if wanted is not None and wanted != revision:
        raise ApiError(409, "revision_conflict", "Config revision mismatch")


# -- the seam to the data plane

class ControlPort(Protocol):
    """All that the control plane sees of the running proxy; every method may be called from any thread but the loop's."""

    config_path: str                     # absolute
    started_at: float                    # monotonic seconds
    started_wall: float                  # unix seconds
    sources: Sources                     # what other rooms can tell, called through ask()
    log: Log

    @property
    def settings(self) -> Settings:
        """What is in force now; replaced whole by a reload, never changed."""

    @property
    def counters(self) -> Counters:
        """Process-wide totals, plain integers."""

    @property
    def users(self) -> Mapping[str, User]:
        """Configured users with what they use, plain integers, in file order; replaced whole by a reload."""

    def ask(self, build: Callable[[], _T], timeout_s: float) -> _T:
        """Run `build` on the loop thread and return its value; what it raises is raised here.  TimeoutError: it did not run."""

    def expand(self, text: str, given: Mapping[str, bytes] | None = None) -> tuple[str, tuple[str, ...]]:
        """Return a main file's text with its includes in place, and their paths.  Raises ConfigError.

        given: path -> bytes that counts instead of what is on disk.
        """

    def parse(self, text: str) -> dict[str, Any]:
        """Return the tables of an expanded text.  Raises ConfigError."""

    def accept(self, document: dict[str, Any]) -> Loaded:
        """Return what the tables mean, validated as at a start.  Raises ConfigError."""

    def load(self, text: str) -> Loaded:
        """Return what a main file's text means, as a start would read it.  Raises ConfigError."""

    def publish(self, loaded: Loaded, timeout_s: float = 10.0) -> None:
        """Make a configuration live; returns when it is, sessions that have to go closed.  Raises TimeoutError."""

    def links(self, name: str) -> list[Link]:
        """Links of a user in the order of api.md 10; empty for an unknown user or without any host."""


# == 9. service ==============================================================
# Start and stop of everything above, called by cli of telemt.py.


def start(port: ControlPort) -> Callable[[], None]:
    """Open what the configuration asks for; returns what closes it again, within a second."""
    port.log.warn("control plane not started: the HTTP listener is not part of this version")
    return lambda: None


# == 10. qr ==================================================================
# A link as a QR code that a phone reads from a screen: byte mode, level M
# (15 % may be dirt or glare), the smallest version that holds the text.
# Steps: bits -> codewords -> Reed-Solomon over GF(256) per block -> interleave
# -> zigzag through the free modules -> the mask with the lowest penalty.
# Trap: format bits stand twice and are masked themselves; versions from 7 on
# carry version bits as well.
# Source: ISO/IEC 18004:2015; figures 13-22, tables 7, 9 and E.1.

_QR_VERSIONS: Final = 40
# Table 9, level M, versions 1..40: error correction codewords per block, and blocks.
_QR_CHECKS: Final = (10, 16, 26, 18, 24, 16, 18, 22, 22, 26, 30, 22, 22, 24, 24, 28, 28, 26, 26, 26, 26, *[28] * 19)
_QR_BLOCKS: Final = (1, 1, 1, 2, 2, 4, 4, 4, 5, 5, 5, 8, 9, 9, 10, 10, 11, 13, 14, 16, 17, 17, 18, 20, 21, 23, 25, 26, 28, 29, 31, 33, 35,
                     37, 38, 40, 43, 45, 47, 49)
_QR_PADS: Final = b"\xec\x11"
_QR_FORMAT_MASK: Final = 0x5412
_QR_MASKS: Final[tuple[Callable[[int, int], bool], ...]] = (
    lambda y, x: (y + x) % 2 == 0, lambda y, x: y % 2 == 0, lambda y, x: x % 3 == 0, lambda y, x: (y + x) % 3 == 0,
    lambda y, x: (y // 2 + x // 3) % 2 == 0, lambda y, x: y * x % 2 + y * x % 3 == 0,
    lambda y, x: (y * x % 2 + y * x % 3) % 2 == 0, lambda y, x: ((y + x) % 2 + y * x % 3) % 2 == 0)
_QR_RUN: Final = re.compile(rb"\x00+|\x01+")


class QrCode(NamedTuple):
    """A finished symbol without its quiet zone."""

    version: int
    rows: list[str]          # `0` = light, `1` = dark; 17 + 4 * version of each


def make_qr(text: str) -> QrCode:
    """Return the symbol for a text of at most 2,331 bytes.  Raises ValueError if it is longer."""
    data = text.encode()
    version = next((number for number in range(1, _QR_VERSIONS + 1) if _qr_room(number) >= len(data)), 0)
    if not version:
        raise ValueError(f"{len(data)} bytes do not fit into a QR code of level M")
    bits = _qr_codewords(data, version)
    plan = _QrPlan(version)
    plan.fill(bits)
    best = min((plan.masked(number) for number in range(8)), key=_qr_penalty)
    return QrCode(version, ["".join(map(str, row)) for row in best])


def _qr_raw_bytes(version: int) -> int:
    """Codewords that a version's free modules carry."""
    free = (16 * version + 128) * version + 64
    if version > 1:
        count = version // 7 + 2
        free -= (25 * count - 10) * count - 55
        if version > 6:
            free -= 36
    return free // 8


def _qr_data_bytes(version: int) -> int:
    return _qr_raw_bytes(version) - _QR_CHECKS[version - 1] * _QR_BLOCKS[version - 1]


def _qr_room(version: int) -> int:
    """Bytes of text that fit: mode and length take 12 or 20 bits."""
    return _qr_data_bytes(version) - (2 if version < 10 else 3)


def _qr_codewords(data: bytes, version: int) -> bytes:
    """Data and check bytes in the order in which they are drawn."""
    size = _qr_data_bytes(version)
    width = 8 if version < 10 else 16
    bits = (0b0100 << width | len(data)) << len(data) * 8 | int.from_bytes(data, "big")
    used = 4 + width + len(data) * 8
    closing = min(4, size * 8 - used)
    closing += -(used + closing) % 8
    message = (bits << closing).to_bytes((used + closing) // 8, "big")
    message += (_QR_PADS * size)[:size - len(message)]
    count, checks = _QR_BLOCKS[version - 1], _QR_CHECKS[version - 1]
    short, longer = divmod(size, count)          # the last `longer` blocks have one byte more
    blocks, at = [], 0
    for index in range(count):
        end = at + short + (index >= count - longer)
        blocks.append(message[at:end])
        at = end
    tails = [_qr_checks(block, checks) for block in blocks]
    columns = [block[place] for place in range(short + 1) for block in blocks if place < len(block)]
    return bytes(columns + [tail[place] for place in range(checks) for tail in tails])


def _gf_tables() -> tuple[bytes, bytes]:
    """Powers of 2 in GF(256) with polynomial 0x11d, twice in a row, and their logarithms."""
    powers, value = bytearray(), 1
    for _ in range(255):
        powers.append(value)
        value = value << 1 ^ (0x11D if value & 0x80 else 0)
    logs = bytearray(256)
    for exponent, power in enumerate(powers):
        logs[power] = exponent
    return bytes(powers * 2), bytes(logs)


_GF_POWER, _GF_LOG = _gf_tables()


def _qr_checks(block: bytes, count: int) -> bytes:
    """Reed-Solomon remainder of `block`, `count` bytes."""
    divisor = [1]                                # product of (x - 2^i), highest power first
    for exponent in range(count):
        product = [*divisor, 0]
        for place, factor in enumerate(divisor):
            if factor:
                product[place + 1] ^= _GF_POWER[_GF_LOG[factor] + exponent]
        divisor = product
    logs = [_GF_LOG[factor] for factor in divisor[1:]]
    rest = bytearray(count)
    for byte in block:
        lead = byte ^ rest[0]
        rest = rest[1:] + b"\0"
        if lead:
            shift = _GF_LOG[lead]
            for place, log in enumerate(logs):
                rest[place] ^= _GF_POWER[log + shift]
    return bytes(rest)


class _QrPlan:
    """Modules of one version: what every symbol has, then the data."""

    def __init__(self, version: int) -> None:
        self.version, self.size = version, 17 + 4 * version
        self.cells = [bytearray(self.size) for _ in range(self.size)]
        self.fixed = [bytearray(self.size) for _ in range(self.size)]      # 1 = no data, never masked
        for at in range(8, self.size - 8):       # timing
            self._set(6, at, at % 2 == 0)
            self._set(at, 6, at % 2 == 0)
        for y, x in ((3, 3), (3, self.size - 4), (self.size - 4, 3)):
            self._square(y, x, 4)
        places = self._alignments()
        for y, x in itertools.product(places, places):
            if (y, x) not in ((6, 6), (6, places[-1]), (places[-1], 6)):         # finders are there
                self._square(y, x, 2)
        self._format(0)
        if version > 6:
            self._version()

    def _set(self, y: int, x: int, dark: bool) -> None:
        self.cells[y][x], self.fixed[y][x] = dark, 1

    def _square(self, y: int, x: int, reach: int) -> None:
        """A finder with its light border (reach 4) or an alignment pattern (reach 2)."""
        for down in range(-reach, reach + 1):
            for right in range(-reach, reach + 1):
                if 0 <= y + down < self.size and 0 <= x + right < self.size:
                    ring = max(abs(down), abs(right))
                    self._set(y + down, x + right, ring not in ((2, 4) if reach == 4 else (1,)))

    def _alignments(self) -> list[int]:
        """Table E.1: rows and columns of alignment patterns."""
        if self.version == 1:
            return []
        count = self.version // 7 + 2
        step = 26 if self.version == 32 else (self.version * 4 + count * 2 + 1) // (count * 2 - 2) * 2
        return [6, *reversed([self.size - 7 - index * step for index in range(count - 1)])]

    def _format(self, mask: int) -> None:
        """Level M (00) and mask, with 10 check bits, in both places."""
        rest = mask << 10
        for shift in range(4, -1, -1):
            if rest >> shift + 10 & 1:
                rest ^= 0x537 << shift
        bits = (mask << 10 | rest) ^ _QR_FORMAT_MASK
        first = [(y, 8) for y in (0, 1, 2, 3, 4, 5, 7, 8)] + [(8, x) for x in (7, 5, 4, 3, 2, 1, 0)]
        second = [(8, self.size - 1 - x) for x in range(8)] + [(self.size - 7 + y, 8) for y in range(7)]
        for place in (first, second):
            for shift, (y, x) in enumerate(place):
                self._set(y, x, bool(bits >> shift & 1))
        self._set(self.size - 8, 8, True)        # the dark module

    def _version(self) -> None:
        rest = self.version << 12
        for shift in range(5, -1, -1):
            if rest >> shift + 12 & 1:
                rest ^= 0x1F25 << shift
        bits = self.version << 12 | rest
        for shift in range(18):
            dark, far, near = bool(bits >> shift & 1), self.size - 11 + shift % 3, shift // 3
            self._set(far, near, dark)
            self._set(near, far, dark)

    def fill(self, codewords: bytes) -> None:
        """Draw the bits in columns of two, from the right, up and down by turns (7.7.3)."""
        bits = (byte >> shift & 1 for byte in codewords for shift in range(7, -1, -1))
        up = True
        for right in range(self.size - 1, 0, -2):
            right -= right <= 6                  # the timing column is none
            for y in range(self.size - 1, -1, -1) if up else range(self.size):
                for x in (right, right - 1):
                    if not self.fixed[y][x]:
                        self.cells[y][x] = next(bits, 0)
            up = not up

    def masked(self, number: int) -> list[bytearray]:
        """The symbol under one of the eight masks."""
        self._format(number)
        rule = _QR_MASKS[number]
        return [bytearray(cell ^ (not fixed and rule(y, x)) for x, (cell, fixed) in enumerate(zip(row, self.fixed[y], strict=True)))
                for y, row in enumerate(self.cells)]


def _qr_penalty(rows: list[bytearray]) -> int:
    """Points against a mask (7.8.3): runs, blocks, what looks like a finder, and too much of one colour."""
    size, points = len(rows), 0
    for line in (*rows, *map(bytearray, zip(*rows, strict=True))):
        runs = [len(run) for run in _QR_RUN.findall(line if not line[0] else b"\0" + line)]
        runs[0] -= line[0]                       # lengths of light and dark runs by turns, the first one light
        points += sum(length - 2 for length in runs if length >= 5)
        runs[0] += size                          # the quiet zone is light
        runs[-1:] = [runs[-1] + size] if len(runs) % 2 else [runs[-1], size]
        points += 40 * sum(map(_qr_finders, range(1, len(runs) - 5, 2), itertools.repeat(runs)))
    for upper, lower in itertools.pairwise(rows):
        points += sum(3 for x in range(size - 1) if upper[x] == upper[x + 1] == lower[x] == lower[x + 1])
    excess = abs(sum(map(sum, rows)) * 20 - size * size * 10)
    return points + 10 * max(0, -(-excess // (size * size)) - 1)


def _qr_finders(at: int, runs: list[int]) -> int:
    """How often the runs from `at` on look like a finder: 1:1:3:1:1, and 4 light ones on one side or on both."""
    unit, before, after = runs[at], runs[at - 1], runs[at + 5]
    if runs[at:at + 5] != [unit, unit, 3 * unit, unit, unit]:
        return 0
    return (before >= 4 * unit and after >= unit) + (after >= 4 * unit and before >= unit)


def draw_qr(code: QrCode, plain: bool = False) -> list[str]:
    """Lines of half blocks with the quiet zone of 4 that readers want: black on white whatever the terminal's colours are.

    plain: without escape sequences; what is light is drawn then, which suits light text on a dark terminal.
    """
    width = len(code.rows) + 8
    rows = ["0" * width] * 4 + [f"0000{row}0000" for row in code.rows] + ["0" * width] * (4 + len(code.rows) % 2)
    light = "█▀▄ " if plain else " ▄▀█"            # light over light, light over dark, dark over light, dark over dark
    before, after = ("", "") if plain else ("\x1b[30;107m", "\x1b[0m")
    return [before + "".join(light[int(over + under, 2)] for over, under in zip(upper, lower, strict=True)) + after
            for upper, lower in zip(rows[::2], rows[1::2], strict=True)]
