"""Room 7: hello, flight and records against vectors/faketls.json and framing.json, and our own edge cases."""
import hashlib
import hmac

import pytest

import telemt
from telemt import (ClientHello, FrontShape, KeyedHmac, Reason, RecordReader, WireError, build_fake_alert, build_server_hello,
                    choose_group, is_boot_clock, is_clock_near, match_client_hello, parse_client_hello, without_random)
from tests.cases import load_vector

FAKETLS = load_vector("faketls")
FRAMING = load_vector("framing")
USERS = {name: bytes.fromhex(secret) for name, secret in FAKETLS["header"]["users"].items()}


def segments(parts):
    """Bytes of a framing.json byte string."""
    return b"".join(bytes.fromhex(part["hex"]) if "hex" in part else bytes.fromhex(part["fill"]) * part["len"] for part in parts)


def judge(record, now_wall, ignore_skew):
    """(verdict, user, timestamp) as the session and Doorman judge a first packet, without replay."""
    if not b"\x16\x03\x01".startswith(record[:3]):
        return "not_tls", None, None
    if len(record) < 5:
        return "need_more", None, None
    length = int.from_bytes(record[3:5], "big")
    if not telemt.HELLO_MIN <= length <= telemt.HELLO_MAX:
        return "mask", None, None
    if len(record) < 5 + length:
        return "need_more", None, None
    record = record[:5 + length]
    try:
        hello = parse_client_hello(record)
    except WireError:
        return "mask", None, None
    for name, secret in USERS.items():
        timestamp = match_client_hello(hello.digest, KeyedHmac(secret).digest(without_random(record)))
        if timestamp is not None and (ignore_skew or is_boot_clock(timestamp) or is_clock_near(timestamp, now_wall)):
            return "ok", name, timestamp
    return "mask", None, None


@pytest.mark.parametrize("case", FAKETLS["cases"], ids=lambda case: case["name"])
def test_client_hello(case):
    record = bytes.fromhex(case["record"])
    verdict, user, timestamp = judge(record, case["now"], case["ignore_time_skew"])
    groups = case.get("answer_group")
    if verdict == "ok" and groups and groups["29"] is None:     # the default profile has group 29
        verdict = "mask"
    assert verdict == case["expect"], case
    if verdict != "ok":
        return
    hello = parse_client_hello(record[:5 + int.from_bytes(record[3:5], "big")])
    assert (user, timestamp) == (case["user"], case["timestamp"])
    assert (hello.session_id.hex(), hello.digest.hex()) == (case["session_id"], case["digest"])
    assert hello.digest[:16].hex() == case["replay_key"]
    if "sni" in case:
        assert (hello.server_name, list(hello.alpn)) == (case["sni"], case["alpn"])
    for preferred, group in (groups or {}).items():
        if group is None:
            with pytest.raises(WireError) as caught:
                choose_group(hello, int(preferred))
            assert caught.value.reason is Reason.HELLO_MALFORMED
        else:
            assert choose_group(hello, int(preferred)) == group


def split_flight(flight):
    """[(type, body)] of a server flight."""
    records, at = [], 0
    while at < len(flight):
        assert flight[at + 1:at + 3] == b"\x03\x03"
        size = int.from_bytes(flight[at + 3:at + 5], "big")
        records.append((flight[at], flight[at + 5:at + 5 + size]))
        at += 5 + size
    assert at == len(flight)
    return records


def our_flights():
    """Flights of the one shape that we send: accepted by clients, one application-data record."""
    return [flight for flight in FAKETLS["flights"] if flight["client_accepts"] and len(flight["app_data_sizes"]) == 1]


@pytest.mark.parametrize("flight", our_flights(), ids=lambda flight: flight["name"])
def test_our_flight_equals_the_vector_byte_for_byte(flight):
    data = bytes.fromhex(flight["flight"])
    (kind, hello), (_, _), (_, body) = split_flight(data)
    session_id = bytes.fromhex(flight["session_id"])
    suite_at = 4 + 2 + 32 + 1 + len(session_id)
    suite = int.from_bytes(hello[suite_at:suite_at + 2], "big")
    at, order, share, group = suite_at + 5, [], b"", 0
    while at < len(hello):
        kind, size = int.from_bytes(hello[at:at + 2], "big"), int.from_bytes(hello[at + 2:at + 4], "big")
        order.append(kind)
        if kind == 51:
            group, share = int.from_bytes(hello[at + 4:at + 6], "big"), hello[at + 8:at + 4 + size]
        at += 4 + size
    client = ClientHello(bytes.fromhex(flight["client_digest"]), session_id, (suite,), None, (), frozenset((group,)))
    shape = FrontShape(len(body), suite, group, tuple(order))
    ours = build_server_hello(client, shape, group, share, KeyedHmac(bytes.fromhex(flight["secret"])), lambda size: body)
    assert ours == data


def hello_with(suites=(0x1301,), session_id=b"s" * 32):
    return ClientHello(b"d" * 32, session_id, suites, None, (), frozenset((29,)))


@pytest.mark.parametrize(("suites", "preferred", "chosen"), [
    ((0x1303, 0x1301), None, 0x1303), ((0xC02F, 0x1302, 0x1301), None, 0x1302), ((0x1302,), 0x1301, 0x1302),
    ((0x1302, 0x1301), 0x1301, 0x1301), ((0xC02F,), 0x1303, 0x1301), ((), None, 0x1301),
])
def test_suite_is_one_the_client_offers(suites, preferred, chosen):
    flight = build_server_hello(hello_with(suites), FrontShape(64, preferred), 29, b"k" * 32, KeyedHmac(b"s" * 16), bytes)
    assert int.from_bytes(flight[76:78], "big") == chosen


@pytest.mark.parametrize("size", [0, 1, 32])
def test_server_hello_lengths(size):
    flight = build_server_hello(hello_with(session_id=b"s" * size), FrontShape(100), 29, b"k" * 32, KeyedHmac(b"s" * 16), bytes)
    kinds = [(kind, len(body)) for kind, body in split_flight(flight)]
    assert kinds == [(0x16, 90 + size), (0x14, 1), (0x17, 100)]


def test_fake_alert_looks_like_an_encrypted_alert():
    alert = build_fake_alert(bytes)
    assert alert[:5] == b"\x17\x03\x03\x00\x13" and len(alert) == 24


def payload(wire, cuts=()):
    """(data, end, cut short?) of a record stream fed in pieces cut at `cuts`."""
    reader, data = RecordReader(), b""
    points = [0, *sorted(cuts), len(wire)]
    for start, stop in zip(points, points[1:], strict=False):
        piece = wire[start:stop]
        data += b"".join(piece[at:at + size] for at, size in reader.spans(piece, len(piece)))
    if reader.failed:
        assert reader.failed.reason is Reason.BAD_RECORD
        return data, "error", False
    return data, "eof" if reader.closed else None, reader.mid_record


@pytest.mark.parametrize("case", FRAMING["tls_decode"], ids=lambda case: case["name"])
@pytest.mark.parametrize("bytewise", [False, True])
def test_records_from_the_client(case, bytewise):
    wire = segments(case["wire"])
    if bytewise and len(wire) > 40_000:
        wire_cuts = list(range(0, len(wire), 97))
    else:
        wire_cuts = list(range(1, len(wire))) if bytewise else ()
    data, end, mid_record = payload(wire, wire_cuts)
    assert (data, end) == (segments(case["data"]), case["end"])
    if case.get("rest_len"):
        assert mid_record


@pytest.mark.parametrize(("length", "ok"), [(16_640, True), (16_641, False), (65_535, False)])
def test_the_record_limit_holds_for_a_whole_record_too(length, ok):
    """Found by review: the short cut for one whole record skipped the limit."""
    data, end, _ = payload(b"\x17\x03\x03" + length.to_bytes(2, "big") + bytes(length))
    assert (len(data), end) == ((length, None) if ok else (0, "error"))


@pytest.mark.parametrize("case", FRAMING["tls_encode"], ids=lambda case: case["name"])
def test_record_sizes_to_the_client(case):
    full, tail = divmod(case["payload_len"], telemt.RECORD_OUT_MAX)
    assert [telemt.RECORD_OUT_MAX] * full + [tail] * (tail > 0) == case["record_lens"]


@pytest.mark.parametrize(("timestamp", "near"), [
    (1_000_000_000, True), (1_000_001_200, True), (1_000_001_201, False), (999_999_400, True), (999_999_399, False),
])
def test_clock_window(timestamp, near):
    assert is_clock_near(timestamp, 1_000_000_000.9) is near


def test_boot_clock_border():
    assert is_boot_clock(86_399_999) and not is_boot_clock(86_400_000)


def test_digest_differs_in_any_signed_bit():
    record = bytearray(bytes.fromhex(FAKETLS["cases"][0]["record"]))
    record[300] ^= 1
    hello = parse_client_hello(bytes(record))
    mac = hmac.new(USERS["alice"], without_random(bytes(record)), hashlib.sha256).digest()
    assert match_client_hello(hello.digest, mac) is None
