"""Laws of the pure parsers: any split is one chunk, and whatever a stranger sends is a WireError or an answer."""
import ipaddress
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import telemt
from telemt import (PROXY_HEAD_MAX, ClientHello, FlightReader, FrontProfile, FrontShape, KeyedHmac, Reason, RecordReader, ReplayWindow,
                    ServerHello, Transport, WireError, build_front_file, build_probe_hello, build_proxy_header, build_server_hello,
                    has_reserved_prefix, make_dc_preamble, match_client_hello, parse_client_hello, parse_client_preamble, parse_front_file,
                    parse_proxy_header, without_random)
from tests.cases import BACKEND, client_preamble, signed_hello

HELLO = signed_hello(timestamp=1_760_000_000)
records = st.lists(st.tuples(st.sampled_from((0x17, 0x14, 0x15, 0x16, 0x18)), st.sampled_from((0x0303, 0x0301, 0x0300)),
                             st.binary(max_size=60)), max_size=8)


def feed(wire, cuts):
    """(payload, error text or None, closed, mid_record) of a record stream fed in pieces."""
    reader, payload = RecordReader(), b""
    points = [0, *sorted(set(cuts)), len(wire)]
    for start, stop in zip(points, points[1:], strict=False):
        piece = wire[start:stop]
        payload += reader.payload(piece)
    assert reader.failed is None or reader.failed.reason is Reason.BAD_RECORD
    ended = reader.closed or reader.failed is not None
    return payload, str(reader.failed or "") or None, reader.closed, reader.mid_record or ended


@given(records, st.data())
def test_records_any_split_is_one_chunk(parts, data):
    wire = b"".join(bytes((kind,)) + version.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body for kind, version, body in parts)
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=6))
    assert feed(wire, cuts) == feed(wire, ())


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_records_of_noise(wire, cuts):
    feed(wire, [cut for cut in cuts if cut <= len(wire)])


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=6), st.data())
def test_records_carry_exactly_the_payload(pieces, data):
    wire = b"".join(b"\x17\x03\x03" + len(piece).to_bytes(2, "big") + piece for piece in pieces)
    payload, error, closed, mid = feed(wire, data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    assert (payload, error, closed, mid) == (b"".join(pieces), None, False, False)


@given(st.binary(max_size=700))
def test_hello_of_noise(body):
    try:
        hello = parse_client_hello(b"\x16\x03\x01" + len(body).to_bytes(2, "big") + body)
    except WireError as error:
        assert error.reason is Reason.HELLO_MALFORMED
    else:
        assert len(hello.digest) == 32 and len(hello.session_id) <= 32 and hello.groups <= {29, 4588}


@given(st.lists(st.tuples(st.integers(5, len(HELLO) - 1), st.integers(0, 255)), max_size=10))
def test_mutated_hello_parses_and_fails_its_digest(changes):
    record = bytearray(HELLO)
    for at, value in changes:
        record[at] = value
    try:
        hello = parse_client_hello(bytes(record))
    except WireError as error:
        assert error.reason is Reason.HELLO_MALFORMED
        return
    mac = KeyedHmac(bytes(range(16))).digest(without_random(bytes(record)))
    fits = match_client_hello(hello.digest, mac) is not None
    signed = bytes(record[:11] + record[39:]), record[11:39]
    unchanged = (signed[0][:11] + signed[0][15:], signed[1]) == (HELLO[:11] + HELLO[43:], HELLO[11:39])
    assert fits == unchanged, "only the four clock bytes may change without breaking the signature"


@given(st.binary(min_size=64, max_size=64), st.binary(min_size=16, max_size=16))
def test_preamble_of_noise(block, secret):
    try:
        preamble = parse_client_preamble(block, secret, BACKEND)
    except WireError as error:
        assert error.reason is Reason.BAD_HEADER
    else:
        assert preamble.transport in Transport


@given(st.sampled_from(["abridged", "intermediate", "secure"]), st.integers(-0x8000, 0x7FFF), st.integers(0, 1 << 30),
       st.binary(max_size=100), st.data())
def test_preamble_round_trip_and_split(proto, dc, seed, tail, data):
    head, sending, receiving = client_preamble(proto=proto, dc=dc, seed=seed)
    preamble = parse_client_preamble(head, bytes(range(16)), BACKEND)
    assert (preamble.transport.word, preamble.dc) == (proto, dc)
    cut = data.draw(st.integers(0, len(tail)))
    wire = sending.update(tail)
    assert preamble.from_client.update(wire[:cut]) + preamble.from_client.update(wire[cut:]) == tail
    assert receiving.update(BACKEND.ctr(preamble.to_client_key, preamble.to_client_iv).update(tail)) == tail


@given(st.sampled_from(list(Transport)), st.integers(-0x8000, 0x7FFF), st.one_of(st.just(b""), st.binary(min_size=48, max_size=48)),
       st.integers(0, 1 << 30))
def test_dc_preamble_is_what_a_data_centre_reads(transport, dc, answer_key, seed):
    opening = make_dc_preamble(transport, dc, BACKEND, random.Random(seed).randbytes, answer_key)
    plain = BACKEND.ctr(opening.block[8:40], opening.block[40:56]).update(opening.block)
    assert plain[56:62] == transport.value + dc.to_bytes(2, "little", signed=True)
    assert opening.block[0] != 0xEF and opening.block[4:8] != bytes(4) and not has_reserved_prefix(opening.block[:4])
    if answer_key:
        assert opening.from_dc_key + opening.from_dc_iv == answer_key, "fast_mode: the answer is already encrypted for the client"


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=32), st.lists(st.integers(0, 0xFFFF), max_size=20), st.integers(64, 10_240),
       st.sampled_from([None, 0x1301, 0x1302, 0x1303]), st.permutations((43, 51)), st.sampled_from([(29, 32), (4588, 1120)]))
def test_flight_has_three_records_and_offered_suite(digest, session_id, suites, size, suite, order, share):
    hello = ClientHello(digest, session_id, tuple(suites), None, (), frozenset((share[0],)))
    flight = build_server_hello(hello, FrontShape(size, suite, share[0], tuple(order)), share[0], bytes(share[1]), KeyedHmac(digest), bytes)
    first = int.from_bytes(flight[3:5], "big")
    assert first == 90 + len(session_id) + share[1] - 32 and flight[5 + first:11 + first] == b"\x14\x03\x03\x00\x01\x01"
    assert flight[11 + first:16 + first] == b"\x17\x03\x03" + size.to_bytes(2, "big") and len(flight) == 16 + first + size
    at = 44 + len(session_id)
    chosen = int.from_bytes(flight[at:at + 2], "big")
    offered = [one for one in suites if one in (0x1301, 0x1302, 0x1303)]
    assert chosen == (suite if suite in suites else offered[0] if offered else 0x1301)
    assert KeyedHmac(digest).digest(digest, flight[:11], bytes(32), flight[43:]) == flight[11:43]


class DictWindow:
    """What ReplayWindow has to answer, with a dict: key -> time of insertion, in order of the last look-up."""

    def __init__(self, size, age_s):
        self.seen = {}
        self.resize(size, age_s)

    def resize(self, size, age_s):
        self.size, self.age_s = size, age_s
        while len(self.seen) > size:
            del self.seen[next(iter(self.seen))]

    def is_old(self, key, now):
        return self.age_s and now - self.seen[key] > self.age_s

    def is_replay(self, key, now):
        known = key in self.seen and not self.is_old(key, now)
        born = self.seen.pop(key, None)
        self.seen[key] = born if known else now
        self.resize(self.size, self.age_s)
        while self.seen and self.is_old(next(iter(self.seen)), now):
            del self.seen[next(iter(self.seen))]
        return known


def check_columns(window):
    """Every row is in the ring once and in its bucket once."""
    rows = list(range(1, len(window) + 1))
    ring, row = [], window._newer[0] if rows else 0
    while row:
        assert window._older[window._newer[row]] == row
        ring.append(row)
        row = window._newer[row]
    found = []
    for bucket in range(len(rows) + 1 if rows else 0):
        row = window._heads[bucket]
        while row:
            assert window._bucket(window._hashes[row]) == bucket
            found.append(row)
            row = window._next[row]
    assert sorted(ring) == sorted(found) == rows


@given(st.randoms(use_true_random=False), st.integers(0, 400), st.sampled_from((0, 1, 5, 50, 1000)), st.sampled_from((3, 10, 100, 2000)))
def test_replay_window_against_a_model(random, size, age, keys):
    """Few keys and many, pauses that make them old, and now and then a reload or a crowd that leaves."""
    window, model, now = ReplayWindow(size, age), DictWindow(size, age), 0.0
    for _ in range(random.choice((20, 600))):
        now += random.choice((0, 0, 0.1, 1, 20 * random.random()))
        key = random.randrange(keys).to_bytes(4, "big")
        assert window.is_replay(key, now) is bool(model.is_replay(key, now) and size)
        assert len(window) <= size
        if random.random() < 0.01:
            # Never a longer age: of what was too old before, the window may still know some, and either answer is right.
            size, age = random.choice((0, 1, 2, 17, 300)), random.choice((age, min(age or 7, 7)))
            window.resize(size, age)
            model.resize(size, age)
            check_columns(window)
        if random.random() < 0.01:
            window.compact()
            check_columns(window)
    check_columns(window)


@given(st.text(max_size=30))
def test_parse_target_of_noise(text):
    try:
        ip, port = telemt.parse_target(text)
    except ValueError:
        return
    assert 0 <= port <= 65_535 and ipaddress.ip_address(ip)


@pytest.mark.parametrize("size", [0, 1, 16, 44, 76])
def test_short_hellos_are_malformed_or_empty(size):
    try:
        hello = parse_client_hello(HELLO[:size])
    except WireError as error:
        assert error.reason is Reason.HELLO_MALFORMED
    else:
        assert hello.groups == frozenset()


# -- the probe of the mask host

server_extensions = st.lists(st.tuples(st.sampled_from((43, 51, 23)), st.sampled_from((
    b"\3\4", b"\3\3", b"\0\x1d\0\x20" + b"k" * 32, b"\x11\xec\4\x60" + b"k" * 1120, b"\0\x17", b""))), max_size=4)
flight_records = st.lists(st.tuples(st.sampled_from((0x14, 0x15, 0x16, 0x17, 0x17)), st.binary(max_size=40)), max_size=6)


def build_flight(suite, extensions, more):
    block = b"".join(kind.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body for kind, body in extensions)
    body = b"\3\3" + b"r" * 32 + b"\0" + suite.to_bytes(2, "big") + b"\0" + len(block).to_bytes(2, "big") + block
    parts = [(0x16, b"\2" + len(body).to_bytes(3, "big") + body), *more]
    return b"".join(bytes((kind, 3, 3)) + len(part).to_bytes(2, "big") + part for kind, part in parts)


def measured(wire, cuts):
    """(error text or None, ServerHello, bytes) of a flight fed in pieces."""
    reader, error = FlightReader(), None
    points = [0, *sorted(set(cuts)), len(wire)]
    try:
        for start, stop in zip(points, points[1:], strict=False):
            reader.feed(wire[start:stop])
    except WireError as failed:
        error = str(failed)
    return error, reader.hello, reader.flight


@given(st.sampled_from((0x1301, 0x1303, 0xC02F)),
       st.one_of(st.just([(43, b"\3\4"), (51, b"\0\x1d\0\x20" + b"k" * 32)]), server_extensions), flight_records, st.data())
def test_flight_of_a_server_any_split_is_one_chunk(suite, extensions, more, data):
    wire = build_flight(suite, extensions, more)
    cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=8))
    assert measured(wire, cuts) == measured(wire, ())


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_flight_of_noise(wire, cuts):
    error, hello, flight = measured(wire, [cut for cut in cuts if cut <= len(wire)])
    assert (error is None or error == "no TLS 1.3" or error == "hello retry" or error.startswith("alert ")) and bool(hello) >= bool(flight)


@given(st.text(min_size=1, max_size=80), st.booleans(), st.integers(0, 1 << 30))
def test_probe_hello_reads_back(name, hybrid, seed):
    draw = random.Random(seed).randbytes
    record = build_probe_hello(name, lambda: draw(32), draw, hybrid)
    hello = parse_client_hello(record)
    assert hello.server_name == name and hello.groups == ({29, 4588} if hybrid else {29}) and hello.alpn == ("h2", "http/1.1")
    assert int.from_bytes(record[3:5], "big") == len(record) - 5 >= 512 and len(hello.session_id) == 32


@given(st.lists(st.integers(0, 65_536), min_size=1, max_size=3), st.sampled_from((0x1301, 0x1302, 0x1303)), st.sampled_from((29, 4588)),
       st.permutations((43, 51)), st.integers(0, 1 << 40), st.lists(st.integers(0, 65_536), max_size=3))
def test_front_file_round_trip(flights, suite, group, order, fetched_at, plain):
    profile = FrontProfile(tuple(flights), suite, group, tuple(order), float(fetched_at), "file", tuple(plain), "a.example:443")
    hello = ServerHello(b"\3\3", bytes(32), b"", suite, 0, ((43, b"\3\4"),))
    assert parse_front_file(build_front_file("a.example", profile, hello), 1.0) == ("a.example", profile)


# -- PROXY headers

ends = st.one_of(st.tuples(st.ip_addresses(v=4).map(str), st.integers(0, 65_535)),
                 st.tuples(st.ip_addresses(v=6).filter(lambda ip: ip.ipv4_mapped is None).map(str), st.integers(0, 65_535)))


def told(data):
    """What a PROXY reader says of `data`: "bad", None = more is needed, or the header."""
    try:
        return parse_proxy_header(data)
    except WireError as error:
        assert error.reason is Reason.PROXY_INVALID
        return "bad"


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=120).map(lambda rest: b"PROXY " + rest),
                 st.binary(max_size=90).map(lambda rest: b"\r\n\r\n\0\r\nQUIT\n" + rest)))
def test_proxy_header_verdicts_are_final(data):
    """More bytes turn `more is needed` into a verdict, and change none; what is over the limit is never looked at."""
    verdicts = [told(data[:size]) for size in range(len(data) + 1)]
    known = [verdict for verdict in verdicts if verdict is not None]
    assert known == known[:1] * len(known)
    assert len(verdicts) <= PROXY_HEAD_MAX or verdicts[PROXY_HEAD_MAX] is not None


@given(st.sampled_from((1, 2)), ends, ends, st.binary(max_size=40))
def test_proxy_header_round_trip(version, source, destination, rest):
    wire = build_proxy_header(version, source, destination)
    mixed = (":" in source[0]) != (":" in destination[0])
    assert told(wire + rest) == (version, len(wire), *((None, None) if mixed else (source, destination)))
    assert all(told(wire[:size]) is None for size in range(min(16, len(wire) - 2)))


@given(ends, ends, st.text(alphabet="0123456789abcdefTCP46. :", max_size=60))
def test_proxy_line_has_exactly_its_five_words(source, destination, noise):
    """What is put behind a good line is bad, unless it is more of the port, or follows UNKNOWN and a space."""
    header = told(build_proxy_header(1, source, destination)[:-2] + noise.encode() + b"\r\n")
    if (":" in source[0]) != (":" in destination[0]):
        assert (header != "bad") is (not noise or noise.startswith(" "))
    else:
        port = int(f"{destination[1]}{noise}") if not noise or noise.isdigit() else 65_536
        assert header == ("bad" if port > 65_535 else (1, header.size, source, (destination[0], port)))
