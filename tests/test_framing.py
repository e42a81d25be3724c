"""Room 5: client frames and answers against vectors/framing.json and middle-proxy.json, in one piece and byte by byte."""
import hashlib

import pytest

import telemt
from telemt import Abridged, FrameError, Intermediate, Secure
from tests.cases import load_vector

FRAMING = load_vector("framing")
MIDDLE = load_vector("middle-proxy")
CLASSES = {cls.name: cls for cls in (Abridged, Intermediate, Secure)}
BIG = 1 << 20


def build(segments):
    return b"".join(bytes.fromhex(part["hex"]) if "hex" in part else bytes.fromhex(part["fill"]) * part["len"] for part in segments)


def size_of(segments):
    return sum(len(part["hex"]) // 2 if "hex" in part else part["len"] for part in segments)


def pieces(wire, size):
    return [wire[at:at + size] for at in range(0, len(wire), size)]


def feed(codec, parts):
    return [(bytes(payload), quick) for part in parts for payload, quick in codec.feed(part)]


@pytest.mark.parametrize("step", [1, 3, BIG])
@pytest.mark.parametrize("case", FRAMING["decode"], ids=lambda case: case["name"])
def test_decode(case, step):
    codec = CLASSES[case["proto"]](case["max_client_frame"])
    found = feed(codec, pieces(build(case["wire"]), step))
    assert found == [(build(frame["payload"]), frame["quickack"]) for frame in case["frames"]]
    assert (codec.failed.kind if codec.failed else None) == case.get("error")
    assert codec.waiting == case["rest_len"] and codec.frames == len(found)


@pytest.mark.parametrize("case", [case for case in FRAMING["encode"] if "simple_ack" not in case and size_of(case["payload"]) <= 2 * BIG],
                         ids=lambda case: case["name"])
def test_encode(case):
    codec = CLASSES[case["proto"]](BIG)
    pad = build(case.get("padding", []))
    noise = pad + bytes(3 - len(pad)) + bytes((len(pad) + 2,))           # its first noise[3] % 3 + 1 bytes follow
    if "error" in case:
        with pytest.raises(FrameError) as caught:
            codec.wrap(build(case["payload"]), noise)
        assert caught.value.kind == case["error"]
        return
    wire = codec.wrap(build(case["payload"]), noise)
    assert (len(wire), hashlib.sha256(wire).hexdigest()) == (case["wire_len"], case["wire_sha256"])


def test_answer_beyond_24_bits_of_words_is_refused():
    with pytest.raises(FrameError, match="Abridged frame too large: 67108864"):
        Abridged(BIG).enclose(memoryview(bytearray(16)), 4, 4 << 24, b"abcd")


@pytest.mark.parametrize("case", [case for case in FRAMING["encode"] if "simple_ack" in case], ids=lambda case: case["name"])
def test_ack(case):
    token = bytearray.fromhex(case["simple_ack"])
    CLASSES[case["proto"]](BIG).ack(memoryview(token), 0)
    assert bytes(token) == build(case["wire"])


@pytest.mark.parametrize("case", MIDDLE["me_to_client_quickack"], ids=lambda case: case["confirm"])
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_ack_of_middle_end(case, name):
    token = bytearray(int(case["confirm"], 16).to_bytes(4, "little"))
    CLASSES[name](BIG).ack(memoryview(token), 0)
    assert token.hex() == case[name]


@pytest.mark.parametrize("step", [1, BIG])
@pytest.mark.parametrize("case", MIDDLE["client_to_me_framing"], ids=lambda case: case["name"])
def test_client_to_middle_end(case, step):
    codec = CLASSES[case["transport"]](telemt.CLIENT_FRAME_MAX)
    found = feed(codec, pieces(bytes.fromhex(case["client_wire"]), step))
    wanted = [(bytes.fromhex(frame["payload"]), frame["quickack"]) for frame in case["expect"] if "payload" in frame]
    close = next((frame for frame in case["expect"] if "close" in frame), {})
    assert found == wanted
    if close.get("close", "eof") in ("eof", "eof_in_frame"):
        assert codec.failed is None and codec.inside_frame == (close.get("close") == "eof_in_frame" or "waits" in case["name"])
        return
    failed = codec.failed
    assert failed.kind == close["close"]
    assert failed.length == (1 if failed.kind == "overlong" else close["len"])
    assert not close.get("tls_like") or failed.prefix[:2] == b"\x16\x03"


@pytest.mark.parametrize("case", MIDDLE["me_to_client_framing"], ids=lambda case: case["name"])
def test_middle_end_to_client(case):
    codec, data = CLASSES[case["transport"]](BIG), bytes.fromhex(case["data"])
    if "error" in case:
        with pytest.raises(FrameError, match=case["error"]):
            codec.wrap(data, b"abcd")
    elif case["client_wire"] is not None:
        assert codec.wrap(data, b"abcd").hex() == case["client_wire"]
    else:
        sizes = {len(codec.wrap(data, bytes((1, 2, 3, draw)))) for draw in range(256)}
        assert sizes == set(range(case["min_len"], case["max_len"] + 1))


def test_frames_in_one_piece_are_not_copied():
    wire = bytearray(b"\x02abcdefgh" + b"\x01ijkl")
    payloads = [payload for payload, _ in Abridged(BIG).feed(memoryview(wire))]
    wire[1:5] = b"XXXX"
    assert bytes(payloads[0]) == b"XXXXefgh" and bytes(payloads[1]) == b"ijkl"


def test_flood_of_empty_frames_ends_the_session_and_good_frames_pay():
    codec = Intermediate(BIG)
    codec.feed(bytes(4) * 63)
    assert codec.failed is None
    codec.feed(b"\4\0\0\0abcd" * 8)
    codec.feed(bytes(4))
    assert codec.failed is None
    codec.feed(bytes(4))
    assert codec.failed.kind == "flood" and str(codec.failed) == "Tiny frame overhead limit exceeded"


def test_announced_length_reserves_nothing():
    codec = Intermediate(1 << 24)
    codec.feed((1 << 24).to_bytes(4, "little") + b"abcd")
    assert codec.waiting == 8 and codec.inside_frame


def test_end_inside_a_long_abridged_length_is_inside_a_frame():
    codec = Abridged(BIG)
    codec.feed(b"\x7f\x01")
    assert codec.inside_frame


def test_error_texts():
    for cls, wire, text in ((Intermediate, b"\3\0\0\0", "Frame too small: 3"), (Intermediate, b"\6\0\0\0", "Frame misaligned: 6"),
                            (Abridged, b"\x7f\x05\0\0", "Overlong frame length: 5"), (Secure, b"\2\0\0\0", "Frame too small: 2")):
        codec = cls(BIG)
        codec.feed(wire)
        assert str(codec.failed) == text and codec.failed.reason is telemt.Reason.BAD_FRAME


def test_no_more_than_so_many_frames_at_once():
    codec = Abridged(BIG)
    wire = b"".join(b"\x01" + number.to_bytes(4, "big") for number in range(1000)) + b"\x02ab"
    found, data = [], wire
    while data:
        part = codec.feed(data)
        assert len(part) <= telemt.FRAMES_AT_ONCE
        found += [bytes(payload) for payload, _ in part]
        data = codec.rest
    assert found == [number.to_bytes(4, "big") for number in range(1000)] and codec.waiting == 3
