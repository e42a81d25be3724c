"""Room 8: PROXY headers in and out, SOCKS dialogues, STUN messages, all against the vectors and in any pieces."""
import random

import pytest

import telemt
from telemt import (PROXY_HEAD_MAX, Reason, RouteError, WireError, build_proxy_header, build_stun_request, is_bogon, parse_proxy_header,
                    parse_stun_response, parse_target, stun_size)
from tests.cases import load_vector

VECTORS = load_vector("proxy-protocol")
# The text (D4: close as soon as the bytes fit neither signature) is stricter than this vector, which waits for 16 bytes.
EARLIER = {"not-proxy-short"}


def verdict(data, step=0):
    """("ok", header) | ("bad", bytes it took) | ("need_more", None); fed at once, or `step` bytes more each time."""
    for size in range(step, len(data), step) if step else ():
        try:
            header = parse_proxy_header(data[:size])
        except WireError as error:
            assert error.reason is Reason.PROXY_INVALID
            return "bad", size
        if header is not None and header.size <= size:
            return "ok", header
    try:
        header = parse_proxy_header(data)
    except WireError as error:
        assert error.reason is Reason.PROXY_INVALID
        return "bad", len(data)
    return ("need_more", None) if header is None or header.size > len(data) else ("ok", header)


@pytest.mark.parametrize("case", VECTORS["parse"], ids=lambda case: case["name"])
@pytest.mark.parametrize("step", [0, 1, 7], ids=["whole", "bytewise", "sevens"])
def test_parse_vectors(case, step):
    word, header = verdict(bytes.fromhex(case["data"]), step)
    assert word == ("bad" if case["name"] in EARLIER else case["expect"])
    if word == "ok":
        source, destination = header.source or tuple(case["peer"]), header.destination
        assert (header.version, header.size) == (case["version"], case["consumed"])
        assert (list(source), destination and list(destination)) == (case["src"], case["dst"])


@pytest.mark.parametrize("case", VECTORS["build"], ids=lambda case: case["name"])
def test_build_vectors(case):
    ends = [end and tuple(end) for end in (case["src"], case["dst"])]
    assert build_proxy_header(case["version"], *ends).hex() == case["wire"]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("source", "destination"), [
    (("192.0.2.1", 1), ("198.51.100.1", 65_535)), (("2001:db8::1", 0), ("::1", 443)), (None, None), (("1.2.3.4", 5), ("::1", 6)),
])
def test_what_we_build_we_understand(version, source, destination):
    wire = build_proxy_header(version, source, destination)
    header = parse_proxy_header(wire + b"what follows")
    mixed = source is None or (":" in source[0]) != (":" in destination[0])
    assert header == (version, len(wire), *((None, None) if mixed else (source, destination)))


@pytest.mark.parametrize("head", [b"G", b"PROXX", b"\r\n\r\n\0\r\nQUIT\r", b"\x16\x03\x01"])
def test_a_stranger_is_refused_on_the_first_byte_that_does_not_fit(head):
    assert verdict(head, 1) == ("bad", len(head) if head[0] != 0x16 else 1)


def test_tlvs_need_not_arrive_to_be_understood():
    """65,535 bytes behind the addresses cost no memory."""
    head = bytearray(build_proxy_header(2, ("192.0.2.1", 7), ("192.0.2.2", 8)))
    head[14:16] = b"\xff\xff"
    header = parse_proxy_header(bytes(head))
    assert header.size == 16 + 65_535 and header.source == ("192.0.2.1", 7) and len(head) <= PROXY_HEAD_MAX


@pytest.mark.parametrize("line", [
    b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \r\n", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 +2\r\n", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 0x2\r\n",
    b"PROXY TCP6 fe80::1%lo ::1 1 2\r\n", b"PROXY TCP6 [::1] ::1 1 2\r\n", b"PROXY UNKNOWNX\r\n", b"PROXY  UNKNOWN\r\n",
    "PROXY TCP4 192.0.2.1 192.0.2.2 1 \u0662\r\n".encode(), b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n\r\n", b"PROXY \r\n",
])
def test_sloppy_lines_are_refused(line):
    assert verdict(line)[0] == "bad"


# -- SOCKS and STUN

SOCKS = load_vector("socks")["cases"]
STUN = load_vector("stun")["cases"]


def dialogue_of(case):
    """The dialogue of one vector; a scope takes the place of every credential (upstream-and-relay 7.2)."""
    target, scope = parse_target(case["target"]), case["scope"]
    if case["protocol"] == "socks4":
        return telemt.socks4_dialogue(target, telemt.socks4_user(scope or case["user_id"]))
    login = (scope, scope) if scope else (case["username"], case["password"])
    return telemt.socks5_dialogue(target, telemt.socks5_login(*login))


def converse(case, cut=None):
    """Play a vector; returns (bound address, bytes left for the relay).  `cut` regroups the server's bytes."""
    talk = dialogue_of(case)
    out, need = next(talk)
    sent, arrived = out, bytearray()
    for step in case["steps"]:
        (kind, value), = step.items()
        if kind == "send":
            assert sent.hex() == value, "our bytes"
            sent = b""
        elif kind == "eof":
            assert len(arrived) < need, "the server ended before it had said enough"
            raise RouteError("IO error: early eof")
        else:
            data = bytes.fromhex(value)
            for piece in (data,) if cut is None else cut(data):
                arrived += piece
                while len(arrived) >= need:
                    answer = bytes(arrived[:need])
                    del arrived[:need]
                    try:
                        out, need = talk.send(answer)
                    except StopIteration as end:
                        assert not sent
                        return end.value, bytes(arrived)
                    sent += out
    raise AssertionError("the dialogue is not over")


@pytest.mark.parametrize("case", SOCKS, ids=lambda case: case["name"])
@pytest.mark.parametrize("cut", [None, lambda data: [data[i:i + 1] for i in range(len(data))]], ids=["whole", "bytes"])
def test_socks_vector(case, cut):
    expected = case["result"]
    if expected["ok"]:
        bound, left = converse(case, cut)
        assert telemt.format_address(*bound) == expected["bound"]
        if cut is None:
            assert left.hex() == case.get("leftover", "")
        return
    with pytest.raises(RouteError) as caught:
        converse(case, cut)
    assert (str(caught.value), caught.value.hard) == (expected["display"], expected["hard"])


@pytest.mark.parametrize("protocol", ["socks4", "socks5"])
@pytest.mark.parametrize("code", range(256))
def test_every_reply_code(protocol, code):
    case = {"protocol": protocol, "target": "1.2.3.4:5", "scope": None, "user_id": None, "username": None, "password": None}
    talk = dialogue_of(case)
    next(talk)
    reply = bytes([0, code, 0, 0, 0, 0, 0, 0])
    if protocol == "socks5":
        talk.send(b"\5\0")
        reply = bytes([5, code, 0, 1])
    good = code == (90 if protocol == "socks4" else 0)
    if good and protocol == "socks5":
        assert talk.send(reply) == (b"", 6)
        return
    with pytest.raises(StopIteration if good else RouteError) as caught:
        talk.send(reply)
    if not good:
        assert str(caught.value).endswith(f"code {code}") and not caught.value.hard


@pytest.mark.parametrize("method", range(256))
def test_every_auth_method(method):
    talk = telemt.socks5_dialogue(("1.2.3.4", 5), (b"u", b"p"))
    next(talk)
    if method in (0, 2):
        assert talk.send(bytes([5, method]))[1] == (4 if method == 0 else 2)
        return
    with pytest.raises(RouteError, match="Unsupported SOCKS5 auth method"):
        talk.send(bytes([5, method]))


def test_no_dialogue_asks_for_more_than_a_longest_name():
    talk = telemt.socks5_dialogue(("1.2.3.4", 5), None)
    next(talk)
    talk.send(b"\5\0")
    assert talk.send(b"\5\0\0\3") == (b"", 1)
    assert talk.send(b"\xff") == (b"", 257)


@pytest.mark.parametrize("case", STUN, ids=lambda case: case["name"])
def test_stun_vector(case):
    transaction_id, version = bytes.fromhex(case["transaction_id"]), int(case["family"][1])
    assert build_stun_request(transaction_id).hex() == case["request"]
    messages = [bytes.fromhex(text) for text in case["responses"]]
    if case["transport"] == "tcp":
        messages = [b"".join(messages)]
        if len(messages[0]) >= 20 and case["expect"]:
            assert stun_size(messages[0][:20]) == len(messages[0])
    found = next(filter(None, (parse_stun_response(data, transaction_id, version) for data in messages)), None)
    assert found == ((case["expect"]["ip"], case["expect"]["port"]) if case["expect"] else None)


def test_damaged_stun_answers_are_never_an_error(rng: random.Random):
    good = [bytes.fromhex(text) for case in STUN for text in case["responses"]]
    for _ in range(3000):
        data = bytearray(rng.choice(good))
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        data = bytes(data[:rng.randrange(len(data) + 1)]) + rng.randbytes(rng.choice((0, 0, 7)))
        for version in (4, 6):
            parse_stun_response(data, data[8:20], version)


@pytest.mark.parametrize(("ip", "bogon"), [
    ("8.8.8.8", False), ("10.1.2.3", True), ("100.64.0.1", True), ("172.32.0.1", False), ("192.0.1.1", False), ("255.255.255.255", True),
    ("2001:4860::1", False), ("2001:db8::1", True), ("fe80::1", True), ("::ffff:8.8.8.8", True), ("2002::1", True), ("2000::1", False),
])
def test_bogons(ip, bogon):
    assert is_bogon(ip) is bogon
