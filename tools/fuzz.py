#!/usr/bin/env python3
"""fuzz - throw mutated input at every pure parser of telemt.py and telemt_api.py.

usage: fuzz.py [--runs N] [--seed S] [--target NAME]... [--out DIR]
       fuzz.py --replay FILE --target NAME
       fuzz.py --list | --planted

A parser may raise its one kind of error (WireError for bytes of a peer, ConfigError for text of the operator) and
nothing else, must come back within five seconds, and must keep the promises that its target asserts.  A finding is cut
down to a small input, written to DIR/NAME-HASH.bin (default build/fuzz), and ends the program with exit 1.

The mutator is blind but not dumb: it starts from valid inputs, and an input that made the parser say something it had
not said before joins the corpus.  --planted fuzzes a parser with a known fault and must therefore exit 1.
Standard library only.  Every run can be repeated with the seed that is printed first.
"""
from __future__ import annotations

import argparse
import copy
import datetime
import functools
import hashlib
import hmac
import random
import re
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import telemt  # noqa: E402 - it stands beside this folder and is not installed
import telemt_api  # noqa: E402

HANG_S = 5.0
CORPUS_MAX = 400
INPUT_MAX = 70_000
MINIMISE_TRIES = 3_000
EDGE_BYTES = (0, 1, 2, 3, 0x0A, 0x14, 0x15, 0x16, 0x17, 0x20, 0x22, 0x7F, 0x80, 0xEF, 0xFE, 0xFF)
EDGE_WORDS = (0, 1, 4, 32, 255, 256, 512, 0x303, 0x4000, 0x4100, 0x4101, 0x7FFF, 0x8000, 0xFFFF)
EDGE_NUMBERS = (b"0", b"-1", b"1", b"255", b"256", b"65535", b"65536", b"9223372036854775807", b"9223372036854775808", b"1e400", b"nan")


class Hang(Exception):
    """The parser did not come back in time."""


class Target(NamedTuple):
    """A parser under test: `call` raises nothing but `allowed`."""

    name: str
    call: Callable[[bytes], object]
    seeds: Sequence[bytes]
    allowed: tuple[type[Exception], ...]
    words: Sequence[bytes] = ()                 # what the format is made of, for inserting


class Finding(NamedTuple):
    """An input that a target could not take, as small as we got it."""

    target: str
    data: bytes
    error: str

    @property
    def file_name(self) -> str:
        """Name of the reproducer."""
        return f"{self.target}-{hashlib.sha256(self.data).hexdigest()[:12]}.bin"


# -- mutations: each takes and returns a bytearray ---------------------------------------------------------------------------------

class Mutator:
    """Changes inputs by the rules of one seeded generator."""

    def __init__(self, rng: random.Random, words: Sequence[bytes]) -> None:
        self.rng, self.words = rng, words
        self.ways = (self.flip_bit, self.set_byte, self.step_byte, self.set_word, self.insert, self.delete, self.repeat, self.cut,
                     self.cross, self.change_number, *((self.insert_word,) * 3 if words else ()))

    def make(self, corpus: Sequence[bytes]) -> bytes:
        """Return a new input made from one or two of `corpus`, rarely from nothing."""
        if self.rng.random() < 0.03:
            return self.rng.randbytes(self.rng.randrange(200))
        data = bytearray(self.rng.choice(corpus))
        for _ in range(self.rng.choice((1, 1, 1, 2, 2, 3, 5, 8))):
            self.rng.choice(self.ways)(data, corpus)
        return bytes(data[:INPUT_MAX])

    def place(self, data: bytearray) -> int:
        """Some index into `data`, more often near the front, where the headers are."""
        return self.rng.randrange(min(len(data), 64) if self.rng.random() < 0.4 else len(data)) if data else 0

    def size(self) -> int:
        """A length: mostly short."""
        return self.rng.choice((1, 1, 2, 3, 4, 8, 16, 64, 300))

    def flip_bit(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Flip one bit."""
        if data:
            data[self.place(data)] ^= 1 << self.rng.randrange(8)

    def set_byte(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Set one byte to a value that often matters."""
        if data:
            data[self.place(data)] = self.rng.choice(EDGE_BYTES)

    def step_byte(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Make one byte larger or smaller by one: limits are missed by one."""
        if data:
            at = self.place(data)
            data[at] = (data[at] + self.rng.choice((-1, 1))) % 256

    def set_word(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Set two bytes as a big-endian length would be."""
        at = self.place(data)
        value = self.rng.choice(EDGE_WORDS) if self.rng.random() < 0.5 else max(0, min(len(data) - at + self.rng.randrange(-6, 7), 0xFFFF))
        data[at:at + 2] = value.to_bytes(2, "big")

    def insert(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Insert random bytes."""
        at = self.place(data)
        data[at:at] = self.rng.randbytes(self.size())

    def insert_word(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Insert something the format is made of, or put it in place of as many bytes."""
        at, word = self.place(data), self.rng.choice(self.words)
        data[at:at + (len(word) if self.rng.random() < 0.5 else 0)] = word

    def delete(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Take a piece out."""
        at = self.place(data)
        del data[at:at + self.size()]

    def repeat(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Copy a piece to another place."""
        start, size = self.place(data), self.size()
        at = self.place(data)
        data[at:at] = data[start:start + size]

    def cut(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """End early."""
        del data[self.place(data):]

    def cross(self, data: bytearray, corpus: Sequence[bytes]) -> None:
        """Go on with the rest of another input."""
        other = self.rng.choice(corpus)
        data[self.place(data):] = other[self.rng.randrange(len(other) + 1):]

    def change_number(self, data: bytearray, _corpus: Sequence[bytes]) -> None:
        """Replace a run of digits."""
        at = self.place(data)
        start = next((i for i in range(at, min(len(data), at + 200)) if 48 <= data[i] <= 57), None)
        if start is not None:
            end = next((i for i in range(start, len(data)) if not 48 <= data[i] <= 57), len(data))
            data[start:end] = self.rng.choice(EDGE_NUMBERS)


# -- one target --------------------------------------------------------------------------------------------------------------------

def on_alarm(_signum: int, _frame: object) -> None:
    """The clock of try_input ran out."""
    raise Hang(f"no answer within {HANG_S:g} s")


def try_input(target: Target, data: bytes) -> tuple[str, Exception | None]:
    """Return what the target answered, in a word that tells answers apart, and the exception if it was not an allowed one."""
    watch = threading.current_thread() is threading.main_thread()
    if watch:
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        answer = target.call(data)
    except target.allowed as error:
        return f"{type(error).__name__}: {getattr(error, 'reason', str(error)[:24])}", None
    except Exception as error:
        return where(error), error
    finally:
        if watch:
            signal.setitimer(signal.ITIMER_REAL, 0)
    return f"ok: {answer if isinstance(answer, int | str) else type(answer).__name__}", None


def where(error: Exception) -> str:
    """Type of an exception and the line that raised it: two findings with the same word are one fault."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} at line {frames[-1].lineno} of {Path(frames[-1].filename).name}" if frames else type(error).__name__


def minimise(target: Target, data: bytes, fault: str) -> bytes:
    """Return a smaller input with the same fault: drop pieces, halves first."""
    tries, size = 0, max(1, len(data) // 2)
    while size and tries < MINIMISE_TRIES:
        at = 0
        while at < len(data) and tries < MINIMISE_TRIES:
            shorter = data[:at] + data[at + size:]
            tries += 1
            word, error = try_input(target, shorter)
            if error is not None and word == fault:
                data = shorter
            else:
                at += size
        size //= 2
    return data


def fuzz(target: Target, runs: int, seed: int) -> Finding | None:
    """Give `target` its seeds and then `runs` mutated inputs; return the first fault, cut down, or None."""
    rng = random.Random(f"{seed}/{target.name}")
    mutator, corpus, heard = Mutator(rng, target.words), list(target.seeds), set[str]()
    before = signal.signal(signal.SIGALRM, on_alarm) if threading.current_thread() is threading.main_thread() else None
    try:
        for run in range(-len(target.seeds), runs):
            data = target.seeds[run] if run < 0 else mutator.make(corpus)
            word, error = try_input(target, data)
            if error is not None:
                small = data if isinstance(error, Hang) else minimise(target, data, word)
                return Finding(target.name, small, "".join(traceback.format_exception(error)))
            if word not in heard and len(corpus) < CORPUS_MAX:
                heard.add(word)
                corpus.append(data)
    finally:
        if before is not None:
            signal.signal(signal.SIGALRM, before)
    return None


# -- targets: clients --------------------------------------------------------------------------------------------------------------

SECRET = bytes(range(16))
NOW_WALL = 1_767_225_600
BACKEND = telemt.pick_backend()
WIRE = (telemt.WireError,)


def noise(size: int) -> bytes:
    """Entropy that repeats and never is what a preamble must not be."""
    return (b"\x5a\xa5\x3c" * (size // 3 + 1))[:size]


def field(width: int, body: bytes) -> bytes:
    """`body` behind its length."""
    return len(body).to_bytes(width, "big") + body


def extension(kind: int, body: bytes) -> bytes:
    """One TLS extension."""
    return kind.to_bytes(2, "big") + field(2, body)


def client_hello(name: bytes, shares: dict[int, int], session: int = 32, size: int = 512) -> bytes:
    """A ClientHello record of our test user at NOW_WALL; shares: group -> bytes of its key."""
    groups = b"".join(group.to_bytes(2, "big") + field(2, noise(length)) for group, length in shares.items())
    extensions = (extension(0, field(2, b"\0" + field(2, name))) + extension(16, field(2, field(1, b"h2") + field(1, b"http/1.1")))
                  + extension(43, b"\x02\x03\x04") + extension(51, field(2, groups)))
    head = b"\x03\x03" + bytes(32) + field(1, noise(session)) + field(2, b"\x13\x01\x13\x02\x13\x03") + b"\x01\0"
    padding = max(0, size - 4 - len(head) - 2 - len(extensions) - 4)
    return signed(b"\x16\x03\x01" + field(2, b"\x01" + field(3, head + field(2, extensions + extension(21, bytes(padding))))))


def signed(record: bytes) -> bytes:
    """The record with the digest that our test user would put into it."""
    mac = hmac.digest(SECRET, record[:11] + bytes(32) + record[43:], "sha256")
    clock = int.from_bytes(mac[28:], "little") ^ NOW_WALL
    return record[:11] + mac[:28] + clock.to_bytes(4, "little") + record[43:]


@functools.cache
def make_doorman() -> telemt.Doorman:
    """Knows one user."""
    doorman = telemt.Doorman(BACKEND)
    doorman.apply(load_config(f'[access.users]\nalice = "{SECRET.hex()}"\n').settings.access)
    return doorman


def answer_hello(record: bytes) -> str:
    """All that a ClientHello record goes through; returns what kind of client it was."""
    doorman = make_doorman()
    hello = telemt.parse_client_hello(record)
    user, timed = doorman.find_hello(record, hello, "192.0.2.1", NOW_WALL)
    group = telemt.choose_group(hello, telemt.GROUP_HYBRID)
    share = noise(1120 if group == telemt.GROUP_HYBRID else 32)
    flight = telemt.build_server_hello(hello, telemt.FrontShape(1000), group, share, user.sign, noise)
    assert len(hello.session_id) <= 32 and flight[44:44 + flight[43]] == hello.session_id
    assert flight[-1005:-1000] == b"\x17\x03\x03\x03\xe8"
    return f"{group} {timed} {hello.server_name is None} {min(len(hello.suites), 4)} {min(len(hello.alpn), 4)}"


def check_hello(data: bytes) -> str:
    """The record as it came, which any change makes a stranger's, and signed again, so that all of it is reached."""
    try:
        answer_hello(data)
    except telemt.WireError:
        pass
    return answer_hello(signed(data) if len(data) >= 43 else data)


def check_records(data: bytes) -> int:
    """One chunk and any cut of it must find the same payload, and fail alike behind it."""
    whole, pieces = telemt.RecordReader(), telemt.RecordReader()
    step = data[-1] % 23 + 1 if data else 1
    found, found_cut = read_records(whole, [data]), read_records(pieces, [data[at:at + step] for at in range(0, len(data), step)])
    assert (found, whole.closed, str(whole.failed)) == (found_cut, pieces.closed, str(pieces.failed))
    if whole.failed is not None:
        raise whole.failed
    assert whole.closed or whole.mid_record == pieces.mid_record, "after an alert nothing more is read"
    return min(len(found), 3)


def read_records(reader: telemt.RecordReader, chunks: Sequence[bytes]) -> bytes:
    """Payload of all chunks."""
    return b"".join(map(reader.payload, chunks))


def server_flight(group: int, suite: bytes, order: Sequence[int], sizes: Sequence[int]) -> bytes:
    """What a TLS 1.3 server answers to the probe."""
    bodies = {43: b"\3\4", 51: group.to_bytes(2, "big") + field(2, noise(32 if group == 29 else 1120)), 23: b""}
    body = b"\3\3" + noise(32) + field(1, noise(32)) + suite + b"\0" + field(2, b"".join(extension(kind, bodies[kind]) for kind in order))
    return (b"\x16\3\3" + field(2, b"\2" + field(3, body)) + b"\x14\3\3\0\1\1"
            + b"".join(b"\x17\3\3" + field(2, noise(size)) for size in sizes))


def check_flight(data: bytes) -> str:
    """One chunk and any cut of it must measure the same; what was measured makes a file that says it again."""
    step = data[-1] % 29 + 1 if data else 1
    whole, error = measure([data])
    pieces, error_cut = measure([data[at:at + step] for at in range(0, len(data), step)])
    assert (whole.hello, whole.flight, str(error)) == (pieces.hello, pieces.flight, str(error_cut))
    if error is not None:
        raise error
    assert len(whole._data) < 5 + telemt.RECORD_IN_MAX and whole.heard == bool(data)
    if whole.hello is None or not whole.flight:
        return "unfinished"
    profile = telemt.profile_of(whole.hello)._replace(flights=(whole.flight,), fetched_wall=1.0, source="file")
    assert telemt.parse_front_file(telemt.build_front_file("a.example", profile, whole.hello), 2.0) == ("a.example", profile)
    assert telemt.FLIGHT_MIN <= profile.shape(noise).size <= telemt.FLIGHT_MAX
    return f"{profile.group} {profile.suite} {profile.order}"


def measure(chunks: Sequence[bytes]) -> tuple[telemt.FlightReader, telemt.WireError | None]:
    """A reader that was fed all chunks, or those up to its error."""
    reader = telemt.FlightReader()
    try:
        for chunk in chunks:
            reader.feed(chunk)
    except telemt.WireError as error:
        return reader, error
    return reader, None


def check_front_file(data: bytes) -> str:
    """A cache file of ours or of the reference."""
    domain, profile = telemt.parse_front_file(data, 1.0)
    shape = profile.shape(noise, hybrid=len(data) % 2 == 0)
    assert telemt.FLIGHT_MIN <= shape.size <= telemt.FLIGHT_MAX and shape.group in (29, 4588) and sorted(shape.order) == [43, 51]
    return f"{telemt.is_front_name(domain)} {len(profile.flights)} {shape.suite} {shape.group}"


def front_files() -> list[bytes]:
    """One of ours for each group, and one as telemt 3.2.1 writes it."""
    found = []
    for group in (29, 4588):
        reader, _ = measure([server_flight(group, b"\x13\2", (51, 43), (3000,))])
        assert reader.hello is not None
        profile = telemt.profile_of(reader.hello)._replace(flights=(3000, 3001, 3000), fetched_wall=1_760_000_000.0)
        found.append(telemt.build_front_file("example.com", profile, reader.hello))
    reference = found[0].replace(b'"cert_payload": null', b'"cert_payload": {"cert_chain_der": [[48]], "certificate_message": [11, 0]}')
    return [*found, reference.partition(b',\n  "profile"')[0] + b"}"]


def client_preamble(transport: telemt.Transport, dc: int) -> bytes:
    """A client's 64 bytes."""
    plain = noise(56) + transport.value + dc.to_bytes(2, "little", signed=True) + b"\x11\x22"
    cipher = BACKEND.ctr(hashlib.sha256(plain[8:40] + SECRET).digest(), plain[40:56])
    return plain[:56] + cipher.update(plain)[56:]


def check_preamble(data: bytes) -> str:
    """What a plain client opens with, and what we then open at the data centre with."""
    strange = telemt.has_reserved_prefix(data[:8])
    assert strange or not any(telemt.has_reserved_prefix(data[:size]) for size in range(8)), "a reserved prefix stays reserved"
    preamble = telemt.parse_client_preamble(data[:64].ljust(64, b"\0"), SECRET, BACKEND)
    for key in (b"", preamble.to_client_key + preamble.to_client_iv):
        opening = telemt.make_dc_preamble(preamble.transport, preamble.dc, BACKEND, noise, key)
        assert len(opening.block) == telemt.PREAMBLE_SIZE
        assert not key or key == opening.from_dc_key + opening.from_dc_iv
    return preamble.transport.name + (" reserved" if strange else "")


def check_proxy(data: bytes) -> str:
    """A PROXY header: no byte more changes what was said, and what we build of it says the same."""
    earlier = None
    for size in range(min(len(data), telemt.PROXY_HEAD_MAX + 20) + 1):
        header = telemt.parse_proxy_header(data[:size])
        assert earlier is None or header == earlier, "a header changed its mind"
        earlier = header
    if earlier is None or earlier.source is None or earlier.destination is None:
        return str(earlier and earlier.version)
    for version in (1, 2):
        again = telemt.parse_proxy_header(telemt.build_proxy_header(version, earlier.source, earlier.destination))
        same_family = (":" in earlier.source[0]) == (":" in earlier.destination[0])     # IPv4-mapped ends may differ
        assert again is not None
        assert (again.source, again.destination) == ((earlier.source, earlier.destination) if same_family else (None, None))
    return f"v{earlier.version}"


FRONT_WORDS = [b"null", b"[", b"]", b"{", b"}", b"-1", b"256", b"1e9", b'"profile"', b'"x": ', b"true", b'"v": 1', b"[43, 51]",
               b"4588", b"NaN"]


# -- targets: text of the operator -------------------------------------------------------------------------------------------------

CONFIG = (telemt.ConfigError,)
SAMPLE = (ROOT / "config.toml").read_bytes()
MOMENTS = (b"2027-01-31T23:59:59Z", b"2027-1-31 23:59:59.5 +03:00", b"2024-02-29t00:00:60utc", b"0001-01-01T00:00:00+23:59",
           b"9999-12-31T23:59:60-2359", "2027-01-31T23:59:59 \u22120300".encode())
NETWORKS = (b"10.0.0.5/8", b"192.0.2.1", b"10.0.0.0/255.0.0.0", b"2001:db8::1/64", b"::ffff:1.2.3.4/128", b"fe80::1%eth0/64")
ENDPOINTS = (b"149.154.167.51:443", b"[2001:b28:f23d:f001::a]:443", b"proxy.example.org:443:[::1]", b"a:1:192.0.2.1")


def load_config(text: str) -> telemt.Loaded:
    """Settings of a configuration text."""
    return telemt.parse_settings(telemt.parse_document(text), telemt.Draws(lambda: 2000))


def check_config(data: bytes) -> str:
    """A configuration file."""
    return str(len(load_config(data.decode("utf-8", "replace")).warnings))


VALUES: tuple[object, ...] = (
    True, False, 0, 1, -1, 2, 4, 6, 10, 32, 101, 256, 4096, 65_536, 2**31, 2**63 - 1, 0.0, 0.5, -1.5, 1e308, float("nan"), float("inf"),
    "", " ", "*", "x", "ttl", "adaptive", "a b", "a/b", "\n", "\u0130", "x" * 120, "0" * 32, "f" * 32, "127.0.0.1", "::1", "0.0.0.0/0",
    "127.0.0.1:9091", "[::1]:0", "host:443:192.0.2.1", "https://example.org/x", "http://localhost", "0666", "2027-01-31T23:59:59Z",
    datetime.datetime(2027, 1, 31, tzinfo=datetime.UTC), datetime.datetime(2027, 1, 31), datetime.date(2027, 1, 31), datetime.time(1, 2),
    [], [""], ["a", "a"], [1], [[]], [True], ["::1", "10.0.0.5/8"], {}, {"alice": "f" * 32}, {"alice": 0, "bob": 1}, {"alice": True},
    {"a\nb": "0" * 32, "": "f" * 32}, {"alice": "2027-01-31T23:59:59Z"}, {"203": [], "-2": "192.0.2.1:443", "x": ["", " "]},
    [{"ip": "0.0.0.0"}], [{"ip": "::1", "announce_ip": "192.0.2.1"}], [{"type": "socks5", "address": "a:1"}], [{"type": "direct"}],
    [{"type": "shadowsocks", "x": 1}], [{"type": "socks4"}], [{}])


def check_settings(data: bytes) -> str:
    """Any value at any key, known and unknown: pairs of bytes choose them."""
    document: dict[str, Any] = {}
    for which, value in zip(data[:40:2], data[1:40:2], strict=False):
        path = KEY_PATHS[which % len(KEY_PATHS)]
        *tables, name = path.removesuffix("[]").split(".")
        node = document
        for table in tables:
            node = node[table] if isinstance(node.get(table), dict) else node.setdefault(table + "_" * (table in node), {})
        node[name] = copy.deepcopy(VALUES[value % len(VALUES)])
    return str(len(telemt.parse_settings(document, telemt.Draws(lambda: 2000)).warnings))


KEY_PATHS = [*telemt.KEYS, "general.unknown", "unknown", "server.api.whitelst"]


def check_include(data: bytes) -> int:
    """Three files that include each other by chance; the second and third begin after a NUL."""
    parts = (data.decode("utf-8", "replace").split("\0") + ["", ""])[:3]

    def read(_including: str, wanted: str) -> tuple[str, str]:
        if wanted not in ("1", "2") or int(wanted) >= len(parts):
            raise FileNotFoundError(2, "No such file or directory", wanted)
        return wanted, parts[int(wanted)]

    return len(telemt.expand_includes(parts[0], "0", read)[1])


def check_moment(data: bytes) -> str:
    """Text of an expiration: a moment in UTC or nothing."""
    moment = telemt.parse_expiration(data.decode("utf-8", "replace"))
    assert moment is None or moment.utcoffset() is not None
    return "none" if moment is None else "moment"


def check_network(data: bytes) -> str:
    """Text of a network; what was read reads the same when it is printed."""
    network = telemt.parse_network(data.decode("utf-8", "replace"))
    assert network is None or telemt.parse_network(str(network)) == network
    return "none" if network is None else f"v{network.version}"


def check_endpoint(data: bytes) -> str:
    """Text of `ip:port`, and of a DNS override."""
    text = data.decode("utf-8", "replace")
    found = telemt.parse_ip_port(text)
    if found is None:
        return f"override {len(telemt.parse_dns_overrides([text]))}"
    return f"v{found[0].version}"


def config_words() -> list[bytes]:
    """What configuration files are made of: tables, keys, values."""
    tables = sorted({f"[{path.rpartition('.')[0]}]\n".encode() for path in telemt.KEYS if "." in path})
    keys = [f"{path.rpartition('.')[2]} = ".encode() for path in telemt.KEYS]
    values = [b"true\n", b"0\n", b"-1\n", b"1.5\n", b"nan\n", b'""\n', b'"*"\n', b"[]\n", b'["a"]\n', b"{}\n", b'{ a = "b" }\n',
              MOMENTS[0], b"'''", b'"""', b"\\u0000", b"\r\n", b"0" * 32]
    return [*tables, *keys, *values]


PROXIES = [telemt.build_proxy_header(version, (ip, 1234), (other, 443)) + b"\x16\x03\x01" for version in (1, 2)
           for ip, other in (("192.0.2.1", "203.0.113.9"), ("2001:db8::1", "::1"), ("192.0.2.1", "::1"))]


# -- targets: what operators and panels change -------------------------------------------------------------------------------------

EDITS: tuple[tuple[tuple[str, ...], telemt_api.Value | None], ...] = (
    (("access", "users", "alice"), "c" * 32), (("access", "users", "z z"), "d" * 32), (("access", "users", "bob"), None),
    (("access", "user_max_tcp_conns", "alice"), None), (("access", "user_enabled", "alice"), False))
ACCESS = (
    b'[access.users] # x\nalice = "1"\r\n"bob" = \'2\'\n[access.user_max_tcp_conns]\nalice = 1\n',
    b'[access]\nusers = { alice = "1", bob = "2" } # }\nuser_max_tcp_conns.alice = 1\n[x]\ny = """\n[access.users]\n"""\n',
    b"access.users.alice = '1'\naccess.'users'.bob = '2'\n[[upstreams]]\na = [\n1, # ]\n]\n[[upstreams]]",
    b"access = { users.alice = '1', users = {} }\n", b"access = { users = { alice = '''1''' }, user_max_tcp_conns = { alice = 1 } }")
ACCESS_WORDS = [b'"""', b"\'\'\'", b'"', b"'", b"[", b"]", b"{", b"}", b"=", b"#", b"\n", b"\r\n", b",", b".", b"access", b"users",
                b"alice", b"[access.users]\n", b"[[a]]\n", b"\\", b"x = 1\n", b" "]


def check_edit(data: bytes) -> str:
    """A text that the program takes is edited into what was meant, or not at all (which is rare)."""
    text = data.decode("utf-8", "replace").replace("include", "")
    document = telemt.parse_document(text)
    access = document.get("access", {})
    tables = [access.get(name, {}) for name in ("users", "user_max_tcp_conns", "user_enabled")] if isinstance(access, dict) else [None]
    if not all(isinstance(table, dict) and not any(isinstance(value, dict) for value in table.values()) for table in tables):
        raise telemt.ConfigError("would not load")
    for edit in EDITS:
        edited = telemt_api.edit_texts({"c": text}, "c", lambda including, line: None, [edit])["c"]
        assert telemt_api.same_documents(telemt.parse_document(edited), telemt_api.change_document(document, [edit])), edit
    return f"{len(tables[0] or ())} {len(document)}"


BODIES = (b'{"username":"a.b-c_1","secret":"%s","max_tcp_conns":1,"data_quota_bytes":0}' % (b"aB" * 16), b"{}",
          b'{"expiration_rfc3339":"2027-01-01T02:59:59.5+03:00","enabled":false,"user_ad_tag":null}',
          b'{"max_unique_ips":9223372036854775807}')
BODY_WORDS = [b"null", b"true", b"-0", b"-1", b"1e3", b"5.0", b'"', b"\\ud800", b"[", b"{", b"}", b"2026-02-29T00:00:60Z", b"+23:59",
              b"\xff"]


def check_body(data: bytes) -> str:
    """A request body for every action; what passes can be written as TOML and means the same."""
    said = []
    for action in telemt_api.ACTIONS:
        try:
            command = telemt_api.parse_command(action, "alice", data)
        except telemt_api.ApiError as error:
            said.append(error.message[:12])
            continue
        changes = [(("access", table, command.username), value) for table, value in command.entries.items() if value is not None]
        edited = telemt_api.edit_texts({"c": ""}, "c", lambda including, line: None, changes)["c"]
        assert telemt_api.same_documents(telemt.parse_document(edited), telemt_api.change_document({}, changes))
        said.append(f"{len(changes)}")
    return " ".join(said)


def check_quota(data: bytes) -> str:
    """A state file of ours, or of anybody; what is read is written back the same."""
    found = telemt.parse_quota_state(data)
    again = telemt.parse_quota_state(telemt.render_quota_state((name, *pair) for name, pair in found.items()))
    assert len(again) <= len(found) and all(pair in found.values() for pair in again.values())
    return str(min(len(found), 3))
# -- the control plane -------------------------------------------------------------------------------------------------------------

class FakeSocket:
    """Gives out bytes in pieces, takes what is sent; the peer has closed its side."""

    family = socket.AF_UNIX

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self.sent = bytearray()

    def settimeout(self, seconds: float) -> None:
        assert seconds > 0

    def recv(self, size: int) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def shutdown(self, how: int) -> None:
        pass


class EchoSite:
    """Says what it understood."""

    def admits(self, peer: str) -> bool:
        return True

    def refuse(self, error: telemt_api.ApiError, peer: str) -> telemt_api.Answer:
        return telemt_api.Answer(error.status, "text/plain", [error.code.encode()], close=True)

    def answer(self, request: telemt_api.Request) -> telemt_api.Answer:
        try:
            body = request.body(1000) if request.head.method != "GET" else b""
        except telemt_api.ApiError as error:
            return self.refuse(error, "")
        assert len(body) <= 1000
        return telemt_api.Answer(200, "text/plain", [request.head.method.encode(), request.head.target.encode(), body])


class EchoServer:
    """As much of a server as a handler needs."""

    site, stopped = EchoSite(), False


def converse(pieces: Sequence[bytes]) -> bytes:
    """What a client gets back that sends these pieces and closes; dates removed."""
    sock: Any = FakeSocket(pieces)
    server: Any = EchoServer()
    wire: Any = telemt_api.Wire(sock)
    telemt_api.Handler(wire, ("127.0.0.1", 1), server)
    return re.sub(rb"Date: [^\r]*", b"Date:", bytes(sock.sent))


def check_http(data: bytes) -> str:
    """A conversation: every split of the bytes is answered alike; only our own status codes leave."""
    whole = converse([data])
    cut = len(data) // 3
    assert whole == converse([data[:cut], data[cut:2 * cut], data[2 * cut:]])
    assert whole == converse([data[at:at + 7] for at in range(0, len(data), 7)])
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", whole)
    assert set(statuses) <= {b"100", b"200", b"400", b"408", b"413", b"414", b"431", b"501", b"505"}
    return b" ".join(statuses[:4]).decode()


def check_target(data: bytes) -> str:
    """A request target: a route and a user, or ApiError; the readers of queries never fail otherwise."""
    method, _, rest = data.decode("latin-1").partition(" ")
    target = re.sub("[^!-~]", "", rest)
    assert 1 <= telemt_api.events_limit(target) <= 1000
    route, name = telemt_api.find_route(method, telemt_api.path_of(target))
    assert "/" not in name and "\0" not in name
    if route.name == "get_qr":
        telemt_api.wanted_link(target)
    return route.name


API = (telemt_api.ApiError,)
CONVERSATIONS = [
    b"GET /1?a HTTP/1.1\r\nHost: a\r\n\r\nPOST /2 HTTP/1.1\nContent-Length: 2\n\nabGET /3 HTTP/1.0\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n2;x\r\nab\r\n0\r\nT: 1\r\n\r\nHEAD / HTTP/1.1\r\n\r\n",
    b"PATCH /v1/users/bob HTTP/1.1\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"]
HTTP_WORDS = [b"\r\n", b"\n\n", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", b" HTTP/1.1\r\n", b"Host: b\r\n",
              b";" * 40, b"a" * 400]


def all_targets() -> list[Target]:
    """Every pure parser."""
    hellos = [client_hello(b"petrovich.ru", {29: 32}), client_hello(b"", {4588: 1216, 29: 32}, size=1700),
              client_hello(b"x" * 250, {29: 32}, session=0), client_hello(b"petrovich.ru", {0x0A0A: 1, 29: 32, 23: 65})]
    records = b"\x17\x03\x03\0\x04abcd\x14\x03\x03\0\x01\x01\x17\x03\x01\0\0\x17\x03\x03\0\x02ef"
    flights = [server_flight(29, b"\x13\1", (43, 51), (2000,)), server_flight(4588, b"\x13\2", (51, 43), (27, 900, 280, 53)),
               server_flight(29, b"\x13\3", (23, 43, 51), (64, 64))]
    preambles = [client_preamble(transport, dc) for transport, dc in zip(telemt.Transport, (2, -4, 203), strict=True)]
    includes = [b"include = \"1\"\nx\n\0a\r\ninclude='2' # b\n\0y = \"\"\"\ninclude = \"1\"\n\"\"\"", b'include = "1"\0include = "1"']
    return [
        Target("client_hello", check_hello, hellos, WIRE, [b"\x16\x03\x01", b"\0\x1d\0\x20", b"\x13\x01", b"\0\x33", b"\0\x10"]),
        Target("records", check_records, [records, records + b"\x15\x03\x03\0\x02\x02\x28more", b"\x17\x03\x03\x40\0" + noise(16_384)],
               WIRE, [b"\x17\x03\x03", b"\x14\x03\x03\0\x01\x01", b"\x15\x03\x03\0\x02", b"\x41\0"]),
        Target("flight", check_flight, flights, WIRE,
               [b"\x17\3\3", b"\x15\3\3\0\2\2\x28", b"\0\x2b\0\2\3\4", b"\x11\xec\4\x60", b"\x13\1"]),
        Target("front_file", check_front_file, front_files(), (ValueError,), FRONT_WORDS),
        Target("preamble", check_preamble, preambles, WIRE, [b"\xef", b"GET ", b"\xdd\xdd\xdd\xdd", b"\0\0\0\0"]),
        Target("proxy", check_proxy, PROXIES, WIRE, [b"TCP6", b"UNKNOWN", b"\r\n", b"::ffff:", b" ", b"0", b"\x21\x21\0\x24"]),
        Target("config", check_config, [SAMPLE, SAMPLE.replace(b"\n#", b"\n"), b"", b"a = " + b"[" * 3_000], CONFIG, config_words()),
        Target("settings", check_settings, [b"", bytes(range(80)), bytes(range(80, 160)), bytes(range(160, 240))], CONFIG),
        Target("include", check_include, includes, CONFIG, [b"include = ", b'"1"', b"'2'", b"\0", b'"""', b"'''", b"\n", b"#", b"\\"]),
        Target("moment", check_moment, MOMENTS, (), [b" " * 50, b"+", b"Z", b".", b"T", "\u2212".encode()]),
        Target("network", check_network, NETWORKS, (), [b"/", b".", b"::", b"%", b"255.255.0.0"]),
        Target("edit", check_edit, ACCESS, (*CONFIG, telemt_api.EditError), ACCESS_WORDS),
        Target("body", check_body, BODIES, (), BODY_WORDS),
        Target("quota", check_quota, [telemt.render_quota_state([("alice", 5, 0), ("b", 0, 7)]), b'{"users":{}}'], (ValueError,),
               [b"null", b"-1", b"1e5", b"[", b"{", b'"', b"18446744073709551616", b"\\ud800"]),
        Target("http", check_http, CONVERSATIONS, (), HTTP_WORDS),
        Target("target", check_target, [b"GET /v1/users/bob/qr?kind=tls&index=1", b"PATCH /v1/users/%C3%A4?limit=5", b"GET http://h/v1/health/"],
               API, [b"/", b"%2F", b"%00", b"?", b"&", b"limit=", b"kind=", b"index=", b"users/", b"%ff"]),
        Target("endpoint", check_endpoint, ENDPOINTS, CONFIG, [b":", b"[", b"]", b"::", b"%", "\u0663".encode()]),
    ]


# -- command line ------------------------------------------------------------------------------------------------------------------

def planted_target() -> Target:
    """A parser with a fault that only a long length field reaches."""
    def parse(data: bytes) -> int:
        if data[:2] != b"\x16\x03" or len(data) < 6:
            raise ValueError("not a record")
        return data[data[5] + 6] if data[5] > 0xF0 else len(data)          # the fault: trusts the length

    return Target("planted", parse, [b"\x16\x03\x01\x00\x20\x01" + bytes(30)], (ValueError,))


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="fuzz.py", description="Throw mutated input at every pure parser of telemt.py.")
    parser.add_argument("--runs", type=int, default=100_000, help="inputs per target (default 100000)")
    parser.add_argument("--seed", type=int, help="repeat an earlier run")
    parser.add_argument("--target", action="append", default=[], metavar="NAME", help="only this one; may be given several times")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz", metavar="DIR", help="where reproducers go")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="give one file to the target")
    parser.add_argument("--list", action="store_true", help="print the targets")
    parser.add_argument("--planted", action="store_true", help="fuzz a parser with a known fault")
    return parser.parse_args(words)


def report(finding: Finding, out: Path) -> None:
    """Write the reproducer and say how to use it."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / finding.file_name
    path.write_bytes(finding.data)
    print(finding.error.rstrip())
    print(f"FOUND {finding.target}: {len(finding.data)} bytes in {path}")
    print(f"repeat: python3 tools/fuzz.py --replay {path} --target {finding.target}", flush=True)


def main(words: Sequence[str]) -> int:
    """0 nothing found, 1 a fault, 2 wrong use."""
    options = arguments(words)
    known = {target.name: target for target in ([planted_target()] if options.planted else all_targets())}
    if options.list:
        print("\n".join(known))
        return 0
    if unknown := [name for name in options.target if name not in known]:
        print(f"no such target: {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [known[name] for name in options.target or known]
    if options.replay:
        for target in chosen:
            word, error = try_input(target, options.replay.read_bytes())
            print(f"{target.name}: {word}")
            if error is not None:
                traceback.print_exception(error)
                return 1
        return 0
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}, {options.runs} inputs for each of {len(chosen)} targets", flush=True)
    found = False
    for target in chosen:
        finding = fuzz(target, options.runs, seed)
        print(f"{target.name:<16} {'FAULT' if finding else 'ok'}", flush=True)
        if finding:
            report(finding, options.out)
            found = True
    return int(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
