"""Room 7: hello, flight and records against vectors/faketls.json and framing.json, and our own edge cases."""
import hashlib
import hmac
import json
import random

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


@pytest.mark.parametrize("size", [0, 2])
def test_a_change_of_cipher_has_one_byte(size):
    """client-protocol.md D14."""
    reader = telemt.RecordReader()
    assert reader.payload(b"\x14\x03\x03\0" + bytes([size]) + bytes(size)) == b""
    assert str(reader.failed) == f"Invalid ChangeCipherSpec length: {size}"


def test_fake_alert_looks_like_an_encrypted_alert():
    alert = build_fake_alert(bytes)
    assert alert[:5] == b"\x17\x03\x03\x00\x13" and len(alert) == 24


@pytest.mark.parametrize("record", [b"\x17\x03\x03\0\0", b"\x14\x03\x03\0\1\1", b"\x17\x03\x03\0\1x", b"\x17\x03\x01\0\2xy"], ids=bytes.hex)
def test_no_more_than_a_thousand_records_at_once(record):
    """Found from outside: a megabyte of empty records was walked in one go."""
    reader, wire = RecordReader(), record * 3000
    content = b"x" if b"x" in record else b""
    spans = reader.spans(wire, len(wire))
    assert reader.seen == 1024 * len(record) and len(spans) == 1024 * (content != b"")
    assert RecordReader().payload(wire + b"\x15") == record[5:] * 3000 * (content != b"")


def payload(wire, cuts=()):
    """(data, end, cut short?) of a record stream fed in pieces cut at `cuts`."""
    reader, data = RecordReader(), b""
    points = [0, *sorted(cuts), len(wire)]
    for start, stop in zip(points, points[1:], strict=False):
        piece = wire[start:stop]
        data += reader.payload(piece)
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


@pytest.mark.parametrize(("behind", "groups"), [(b"", {29}), (b"x", set())])
def test_key_shares_that_do_not_fill_their_extension_are_absent(behind, groups):
    """tls-front.md 9.3: the extension has to parse to its end."""
    shares = b"\0\x1d\0\x20" + b"k" * 32
    body = len(shares).to_bytes(2, "big") + shares + behind
    extensions = b"\0\x33" + len(body).to_bytes(2, "big") + body
    record = bytes((0x16, 3, 1, 0, 0, 1)) + bytes(37) + b"\0" + b"\0\2\x13\1" + b"\1\0" + len(extensions).to_bytes(2, "big") + extensions
    assert parse_client_hello(record).groups == groups


def test_digest_differs_in_any_signed_bit():
    record = bytearray(bytes.fromhex(FAKETLS["cases"][0]["record"]))
    record[300] ^= 1
    hello = parse_client_hello(bytes(record))
    mac = hmac.new(USERS["alice"], without_random(bytes(record)), hashlib.sha256).digest()
    assert match_client_hello(hello.digest, mac) is None


# -- the probe


def make_key():
    return telemt.make_x25519_public(random.Random(5).randbytes)


def probe(name="front.example", seed=1, hybrid=True):
    return telemt.build_probe_hello(name, make_key, random.Random(seed).randbytes, hybrid)


def dissect(record):
    """(suites, [(type, body)], session id) of a ClientHello record, by a reader of its own."""
    assert record[:3] == b"\x16\x03\x01" and int.from_bytes(record[3:5], "big") == len(record) - 5
    assert record[5] == 1 and int.from_bytes(record[6:9], "big") == len(record) - 9 and record[9:11] == b"\x03\x03"
    at = 43
    session, at = record[at + 1:at + 1 + record[at]], at + 1 + record[at]
    size = int.from_bytes(record[at:at + 2], "big")
    suites, at = record[at + 2:at + 2 + size], at + 2 + size
    assert record[at:at + 2] == b"\x01\x00" and int.from_bytes(record[at + 2:at + 4], "big") == len(record) - at - 4
    at, extensions = at + 4, []
    while at < len(record):
        kind, size = int.from_bytes(record[at:at + 2], "big"), int.from_bytes(record[at + 2:at + 4], "big")
        extensions.append((kind, record[at + 4:at + 4 + size]))
        at += 4 + size
    assert at == len(record)
    return suites, extensions, session


def is_grease(number):
    return number & 0x0F0F == 0x0A0A and number >> 8 == number & 0xFF


@pytest.mark.parametrize("seed", range(20))
def test_probe_hello_is_what_clients_send(seed):
    """tls-front.md 9.2, field by field."""
    record = probe(seed=seed)
    suites, extensions, session = dissect(record)
    kinds, found = [kind for kind, _ in extensions], dict(extensions)
    assert len(session) == 32 and len(found) == len(kinds) == 18
    assert is_grease(int.from_bytes(suites[:2], "big"))
    assert suites[2:].hex() == "130113021303c02bc02fc02cc030cca9cca8c013c014009c009d002f0035"
    assert is_grease(kinds[0]) and is_grease(kinds[-1]) and (found[kinds[0]], found[kinds[-1]]) == (b"", b"\0")
    assert sorted(kinds[1:-1]) == sorted((0, 0x17, 0xFF01, 10, 11, 0x23, 16, 5, 13, 0x12, 51, 0x2D, 43, 0x1B, 0x44CD, 0xFE0D))
    assert found[0] == b"\x00\x10\x00\x00\x0dfront.example"
    groups, shares = found[10], found[51]
    assert groups[:2] == b"\0\x0a" and is_grease(int.from_bytes(groups[2:4], "big")) and groups[4:].hex() == "11ec001d00170018"
    assert shares[2:7] == groups[2:4] + b"\0\1\0" and shares[7:11] == b"\x11\xec\x04\xc0"
    assert shares[1227:1231] == b"\0\x1d\0\x20" and len(shares) == 1263 == 2 + int.from_bytes(shares[:2], "big")
    assert found[43][0] == 6 and is_grease(int.from_bytes(found[43][1:3], "big")) and found[43][3:] == b"\3\4\3\3"
    assert (found[16], found[11], found[0x2D], found[0x1B]) == (b"\0\x0c\x02h2\x08http/1.1", b"\1\0", b"\1\1", b"\2\0\2")
    assert found[13].hex() == "001004030804040105030805050108060601" and found[0x44CD] == b"\0\3\2h2" and found[5] == b"\1\0\0\0\0"
    ech = found[0xFE0D]
    padding = int.from_bytes(ech[40:42], "big")
    assert ech[:5] == b"\0\0\1\0\1" and ech[6:8] == b"\0\x20" and padding in (144, 176, 208, 240) and len(ech) == 42 + padding
    assert len(record) - 5 == 1705 + len("front.example") + padding - 144
    assert parse_client_hello(record).groups == {29, 4588}


def ja4(record):
    """The JA4 fingerprint of a hello with SNI and h2 over TCP, by its published rule."""
    suites, extensions, _ = dissect(record)
    numbers = [int.from_bytes(suites[at:at + 2], "big") for at in range(0, len(suites), 2)]
    plain = sorted(f"{number:04x}" for number in numbers if not is_grease(number))
    kinds = [kind for kind, _ in extensions if not is_grease(kind)]
    listed = dict(extensions)[13][2:].hex()
    rest = ",".join(sorted(f"{kind:04x}" for kind in kinds if kind not in (0, 16))) + "_" + ",".join(
        listed[at:at + 4] for at in range(0, len(listed), 4))
    return f"t13d{len(plain):02}{len(kinds):02}h2_" + "_".join(hashlib.sha256(text.encode()).hexdigest()[:12]
                                                               for text in (",".join(plain), rest))


CHROME_JA4 = "t13d1516h2_8daaf6152771_d8a2da3f94cd"      # as published for Chrome 131..143


def test_probe_hello_has_the_fingerprint_of_a_browser():
    hellos = load_vector("hellos")["hellos"]
    assert {ja4(probe(seed=seed)) for seed in range(5)} == {CHROME_JA4} == {ja4(bytes.fromhex(hellos["chrome"]["record"]))}
    assert ja4(bytes.fromhex(hellos["tdlib"]["record"])).rpartition("_")[0] == CHROME_JA4.rpartition("_")[0]


@pytest.mark.parametrize("name", ["chrome", "chrome-x25519", "tdlib"])
def test_hellos_of_real_clients_are_understood(name):
    entry = load_vector("hellos")["hellos"][name]
    hello = parse_client_hello(bytes.fromhex(entry["record"]))
    assert sorted(hello.groups) == sorted(entry["groups"]) and hello.server_name == "www.example.com"
    assert hello.alpn == ("h2", "http/1.1") and len(hello.session_id) == 32 and hello.suites[1:4] == (0x1301, 0x1302, 0x1303)


def test_probe_hello_is_shuffled_anew():
    orders = {tuple(kind for kind, _ in dissect(probe(seed=seed))[1][1:-1]) for seed in range(30)}
    assert len(orders) == 30


@pytest.mark.parametrize("name", ["a.de", "a" * 200, "пример.example"])
def test_probe_hello_without_the_large_share_fits_one_segment(name):
    record = probe(name, hybrid=False)
    _, extensions, _ = dissect(record)
    found = dict(extensions)
    assert found[10][4:].hex() == "001d00170018" and parse_client_hello(record).groups == {29}
    assert 517 <= len(record) < 1000 and parse_client_hello(record).server_name == name


def server_hello(suite=0x1301, group=29, share=None, version=b"\3\4", order=(43, 51), tail=b"", draw=b"r" * 32):
    share = share if share is not None else group.to_bytes(2, "big") + (b"\0\x20" + b"k" * 32 if group == 29 else b"\4\x60" + b"k" * 1120)
    bodies = {43: version, 51: share, 0x17: b""}
    extensions = b"".join(kind.to_bytes(2, "big") + len(bodies[kind]).to_bytes(2, "big") + bodies[kind] for kind in order)
    body = b"\3\3" + draw + b"\x20" + b"s" * 32 + suite.to_bytes(2, "big") + b"\0" + len(extensions).to_bytes(2, "big") + extensions
    return b"\2" + len(body).to_bytes(3, "big") + body + tail


def tls_record(kind, body):
    return bytes((kind,)) + b"\3\3" + len(body).to_bytes(2, "big") + body


CCS = b"\x14\3\3\0\1\1"


def answer(*flight, **hello):
    return tls_record(0x16, server_hello(**hello)) + CCS + b"".join(tls_record(0x17, bytes(size)) for size in flight)


def measure(data, step=0):
    """(profile without flights, bytes) or the reason why the answer cannot be used."""
    reader = telemt.FlightReader()
    try:
        for at in range(0, len(data), step or len(data) or 1):
            reader.feed(data[at:at + (step or len(data))])
    except WireError as error:
        return str(error)
    if reader.hello is None or not reader.flight:
        return None
    return telemt.profile_of(reader.hello)[1:4], reader.flight


RETRY = hashlib.sha256(b"HelloRetryRequest").digest()


@pytest.mark.parametrize(("data", "expect"), [
    (answer(3000), ((0x1301, 29, (43, 51)), 3000)),
    (answer(27, 2000, 281, 53, suite=0x1302, order=(51, 43)), ((0x1302, 29, (51, 43)), 2361)),
    (answer(4000, group=4588, suite=0x1303), ((0x1303, 4588, (43, 51)), 4000)),
    (answer(100, order=(0x17, 51, 43)), ((0x1301, 29, (51, 43)), 100)),
    (answer(), None), (answer()[:100], None), (b"", None), (b"\x16\3", None),
    (answer(100) + b"\x17\3\3\x40\0half", ((0x1301, 29, (43, 51)), 100)),
    (answer(draw=RETRY, share=b"\0\x17"), "hello retry"), (answer(100, share=b"\0\x17\0\x41" + b"p" * 65), "no TLS 1.3"),
    (answer(100, share=b"\0\x1d\0\x20short"), "no TLS 1.3"), (answer(100, order=(51,)), "no TLS 1.3"),
    (answer(100, order=(43,)), "no TLS 1.3"), (answer(100, order=(43, 51, 51)), "no TLS 1.3"), (answer(100, version=b"\3\3"), "no TLS 1.3"),
    (answer(100, suite=0xC02F), "no TLS 1.3"), (answer(100, tail=b"\x0b\0\0\0"), "no TLS 1.3"),
    (tls_record(0x15, b"\2\x28"), "alert 40"), (tls_record(0x15, b"\2\x70"), "alert 112"),
    (answer(100) + tls_record(0x15, b"\1\0"), "alert 0"),
    (tls_record(0x15, b"\2"), "no TLS 1.3"), (tls_record(0x17, b"x" * 100), "no TLS 1.3"), (CCS, "no TLS 1.3"),
    (answer(100) + tls_record(0x16, b"more"), "no TLS 1.3"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no TLS 1.3"),
    (b"SSH-2.0-OpenSSH_9.2p1\r\n", "no TLS 1.3"), (answer(16_640, 16_640, 16_640), ((0x1301, 29, (43, 51)), 49_920)),
    (answer(16_640, 16_640, 16_640, 16_640), "no TLS 1.3"), (b"\x17\3\3\x41\1", "no TLS 1.3"),
    (tls_record(0x16, server_hello()[:-1]), "no TLS 1.3"), (tls_record(0x16, b"\2"), "no TLS 1.3"), (tls_record(0x16, b""), "no TLS 1.3"),
])
@pytest.mark.parametrize("step", [0, 1, 7])
def test_what_a_server_may_answer_to_the_probe(data, expect, step):
    assert measure(data, step) == expect


def test_reader_keeps_at_most_one_record():
    reader = telemt.FlightReader()
    reader.feed(answer(16_640, 16_640))
    assert reader.heard and not reader._data


# -- the profile, and its file


def test_shape_of_an_answer_is_one_of_the_samples_within_what_clients_accept():
    profile = telemt.FrontProfile((2600, 2601, 2603), 0x1302, 4588, (51, 43))
    draw = random.Random(1).randbytes
    shapes = {profile.shape(draw) for _ in range(100)}
    assert {shape.size for shape in shapes} == {2600, 2601, 2603} and {shape[1:] for shape in shapes} == {(0x1302, 4588, (51, 43))}
    assert [telemt.FrontProfile((size,)).shape(draw).size for size in (10, 10_240, 15_000)] == [64, 10_240, 10_240]


PROFILE = telemt.FrontProfile((2604, 2605), 0x1302, 4588, (51, 43), 1_760_000_000.0, "probe", host="127.0.0.1:8443")


HYBRID_HELLO = telemt.parse_server_hello(server_hello(0x1302, 4588, order=(51, 43)))


def our_file(**change):
    document = json.loads(telemt.build_front_file("example.com", PROFILE, HYBRID_HELLO))
    for path, value in change.items():
        table, _, name = path.rpartition("__")
        target = document[table] if table else document
        if value is None:
            del target[name]
        else:
            target[name] = value
    return json.dumps(document).encode()


def test_a_file_may_have_a_mebibyte():
    """tls-front.md 9.5."""
    assert telemt.parse_front_file(our_file().ljust(1 << 20), 0.0)[0] == "example.com"
    with pytest.raises(ValueError, match="too large"):
        telemt.parse_front_file(our_file().ljust((1 << 20) + 1), 0.0)


def test_file_has_the_layout_of_the_reference():
    """Keys in the order of 3.2.1, two spaces, one array element a line; every key it requires, with its type."""
    text = telemt.build_front_file("example.com", PROFILE, HYBRID_HELLO).decode()
    document = json.loads(text)
    assert list(document) == ["server_hello_template", "cert_info", "cert_payload", "app_data_records_sizes", "total_app_data_len",
                              "domain", "profile"]
    template = document["server_hello_template"]
    assert list(template) == ["version", "random", "session_id", "cipher_suite", "compression", "extensions"]
    assert (template["version"], template["random"], template["cipher_suite"]) == ([3, 3], [0] * 32, [0x13, 2])
    assert template["session_id"] == [ord("s")] * 32 and template["compression"] == 0
    assert [entry["ext_type"] for entry in template["extensions"]] == [51, 43] and template["extensions"][1]["data"] == [3, 4]
    assert (document["app_data_records_sizes"], document["total_app_data_len"], document["domain"]) == ([2605], 2605, "example.com")
    assert document["cert_info"] is None and document["cert_payload"] is None
    assert document["profile"] == {"v": 1, "suite": 0x1302, "group": 4588, "order": [51, 43], "flights": [2604, 2605],
                                   "fetched_at": 1_760_000_000, "host": "127.0.0.1:8443"}
    assert text.startswith('{\n  "server_hello_template": {\n    "version": [\n      3,\n      3\n    ],\n')
    small = telemt.build_front_file("a", PROFILE._replace(flights=(300,)), telemt.parse_server_hello(server_hello()))
    assert json.loads(small)["total_app_data_len"] == 1024


def test_our_file_comes_back_as_it_was():
    assert telemt.parse_front_file(our_file(), 5.0) == ("example.com", PROFILE._replace(source="file"))
    without = telemt.parse_front_file(our_file(profile__group=None, profile__host=None), 5.0)[1]
    assert (without.group, without.flights, without.host) == (29, (2604, 2605), "")


@pytest.mark.parametrize("change", [
    {"profile": None}, {"profile__v": 2}, {"profile__group": 23}, {"profile__suite": 0xC02F}, {"profile__order": [43]},
    {"profile__flights": []}, {"profile__flights": [1, 2, 3, 4]}, {"profile__flights": [True]}, {"profile__flights": [-1]},
    {"profile__plain": [1] * 4}, {"profile__plain": 7}, {"profile__host": 7},
    {"profile__fetched_at": -1},
    {"profile__fetched_at": 1 << 70}, {"profile__fetched_at": 1.5}, {"profile": "x"}, {"profile__order": [43, 43]},
])
def test_file_without_a_valid_profile_counts_as_one_of_the_reference(change):
    domain, profile = telemt.parse_front_file(our_file(**change), 77.0)
    assert (domain, profile) == ("example.com", telemt.FrontProfile((2605,), 0x1302, 4588, (51, 43), 77.0, "file"))


REFERENCE_FILE = {                                # as tls-front.md 2.1 prints it
    "server_hello_template": {"version": [3, 3], "random": [7] * 32, "session_id": [], "cipher_suite": [19, 1], "compression": 0,
                              "extensions": [{"ext_type": 51, "data": [0, 29, 0, 32, *range(32)]}, {"ext_type": 43, "data": [3, 4]}]},
    "cert_info": {"not_after_unix": 1767225599, "not_before_unix": 1759276800, "issuer_cn": "R11", "subject_cn": "example.com",
                  "san_names": ["example.com", "www.example.com"]},
    "cert_payload": {"cert_chain_der": [[48, 130]], "certificate_message": [11] * 2700},
    "app_data_records_sizes": [1302, 1303], "total_app_data_len": 2605, "domain": "example.com"}


@pytest.mark.parametrize(("change", "expect"), [
    ({}, ((3100,), 0x1301, 29, (51, 43))),                                     # the certificate is larger than the record measured
    ({"cert_payload": None, "cert_info": None}, ((2605,), 0x1301, 29, (51, 43))),
    ({"server_hello_template": {**REFERENCE_FILE["server_hello_template"], "cipher_suite": [0xC0, 0x2F]}}, ((3100,), None, 29, (43, 51))),
    ({"server_hello_template": {**REFERENCE_FILE["server_hello_template"], "extensions": []}}, ((3100,), None, 29, (43, 51))),
    ({"app_data_records_sizes": []}, ((3100,), 0x1301, 29, (51, 43))),
    ({"later": {"key": 1}}, ((3100,), 0x1301, 29, (51, 43))),
])
def test_file_of_the_reference_is_read(change, expect):
    domain, profile = telemt.parse_front_file(json.dumps({**REFERENCE_FILE, **change}).encode(), 99.5)
    assert (domain, tuple(profile)) == ("example.com", (*expect, 99.5, "file", (), ""))


@pytest.mark.parametrize("data", [
    b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b'{"domain": "a"}', b"[" * 100_000, b"9" * 5000, b" " * (telemt.FRONT_FILE_MAX + 1),
    our_file(domain=None), our_file(domain=[1]), our_file(app_data_records_sizes=None), our_file(app_data_records_sizes=[1e9]),
    our_file(app_data_records_sizes=[1 << 80]), our_file(total_app_data_len="x"), our_file(server_hello_template=None),
    our_file(server_hello_template__version=[3, 256]), our_file(server_hello_template__extensions=[{}]),
    our_file(server_hello_template__extensions=[7]), our_file(cert_payload=[]), our_file(cert_payload={}),
])
def test_file_that_is_none_of_both_is_refused(data):
    with pytest.raises(ValueError):
        telemt.parse_front_file(data, 1.0)


@pytest.mark.parametrize(("name", "ok"), [
    ("example.com", True), ("A-1.b", True), ("..", True), ("", False), ("a/b", False), ("a\\b", False), ("a b", False), ("a\0", False),
    ("a\n", False), ("пример.рф", False), ("a_b.example", False), ("x" * 255, True), ("x" * 256, False),
])
def test_names_that_may_be_part_of_a_path(name, ok):
    assert telemt.is_front_name(name) is ok
