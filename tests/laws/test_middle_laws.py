"""Laws of client framing and the link codec: any split is one chunk, round trips, never another error than ours."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fuzz_targets import read_link
from telemt import (Abridged, FrameWriter, Intermediate, LinkEnds, LinkHandshake, Origin, ProxySecret, RequestHead, RpcError,
                    Secure, parse_proxy_config)
from tests.cases import BACKEND

FRAMINGS = (Abridged, Intermediate, Secure)
words = st.binary(max_size=400).map(lambda data: data[:len(data) & -4])
LIMIT = 2048


def client_frame(cls, payload, quick, pad):
    """What a client of this transport sends; written here on its own."""
    if cls is Abridged:
        count, flag = len(payload) // 4, quick << 7
        return bytes((count | flag,)) + payload if count < 127 else bytes((127 | flag,)) + count.to_bytes(3, "little") + payload
    body = payload + pad if cls is Secure and payload else payload
    return (len(body) | quick << 31).to_bytes(4, "little") + body


def cut(wire, points):
    points = [0, *sorted({point for point in points if point <= len(wire)}), len(wire)]
    return [wire[start:stop] for start, stop in zip(points, points[1:], strict=False)]


def feed(cls, parts):
    codec = cls(LIMIT)
    found = []
    for part in parts:
        found += [(bytes(payload), quick) for payload, quick in codec.feed(part)]
        if codec.failed:
            return found, codec.failed.kind, str(codec.failed)
    return found, codec.waiting, codec.inside_frame


@given(st.sampled_from(FRAMINGS), st.binary(max_size=600), st.lists(st.integers(0, 600), max_size=8))
def test_framing_of_noise_any_split_is_one_chunk(cls, wire, points):
    assert feed(cls, cut(wire, points)) == feed(cls, [wire])


@given(st.sampled_from(FRAMINGS), st.lists(st.tuples(words, st.booleans(), st.binary(max_size=3)), max_size=6),
       st.lists(st.integers(0, 3000), max_size=8))
def test_client_frames_come_out_as_they_went_in(cls, frames, points):
    wire = b"".join(client_frame(cls, *frame) for frame in frames)
    found, waiting, inside = feed(cls, cut(wire, points))
    assert (found, waiting, inside) == ([(payload, quick) for payload, quick, _ in frames if payload], 0, False)


@given(st.sampled_from(FRAMINGS), words.filter(bool), st.binary(min_size=4, max_size=4))
def test_answer_reads_back_as_a_client_frame(cls, data, noise):
    found, waiting, inside = feed(cls, [cls(LIMIT).wrap(data, noise)])
    assert (found, waiting, inside) == ([(data, False)], 0, False)


@given(st.lists(st.tuples(words, st.integers(0, 3)), max_size=8), st.integers(-2, 5), st.lists(st.integers(0, 4000), max_size=8))
def test_link_frames_round_trip_with_any_padding_and_split(frames, seq, points):
    writer = FrameWriter(seq)
    wire = b"".join(writer.frame(payload) + b"\4\0\0\0" * pads for payload, pads in frames)
    assert read_link(cut(wire, points), seq) == ([payload for payload, _ in frames], "rest 0")


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=6))
def test_link_stream_of_noise_any_split_is_one_chunk(wire, points):
    assert read_link(cut(wire, points)) == read_link([wire])


@given(st.lists(words, min_size=1, max_size=4), st.data())
def test_damaged_link_frame_never_passes(frames, data):
    writer = FrameWriter(0)
    wire = bytearray(b"".join(writer.frame(payload) for payload in frames))
    at = data.draw(st.integers(0, len(wire) - 1))
    wire[at] ^= data.draw(st.integers(1, 255))
    found, end = read_link([bytes(wire)])
    assert found == frames[:len(found)] and len(found) < len(frames)
    assert end != "rest 0", "it fails, or it waits for more"


@given(st.lists(st.binary(max_size=120), max_size=6))
def test_handshake_with_noise_ends_in_our_error_or_waits(parts):
    machine = LinkHandshake(Origin(BACKEND, bytes, 1, 1), ProxySecret(bytes(32)), LinkEnds("1.2.3.4", 5, "6.7.8.9", 10), 0)
    try:
        for part in parts:
            machine.feed(part)
    except RpcError as error:
        assert str(error).startswith("Invalid handshake: ")
    assert not machine.done


@given(st.binary(max_size=60), st.booleans(), st.integers(0, (1 << 64) - 1))
def test_request_head_tells_plain_messages_apart(data, quick, conn_id):
    built = RequestHead("secure", conn_id, ("1.2.3.4", 5), ("2001:db8::1", 443), None).build(data, quick)
    flags = int.from_bytes(built[4:8], "little")
    assert bool(flags & 2) == (len(data) >= 8 and not any(data[:8])) and bool(flags >> 31) == quick
    assert int.from_bytes(built[8:16], "little") == conn_id


@pytest.mark.parametrize("family", [4, 6])
@given(text=st.text(alphabet="proxy_fdeault -0123456789.:[]#;\n%", max_size=200))
def test_any_text_is_a_list(family, text):
    found = parse_proxy_config(text, family)
    assert found.lines >= sum(map(len, found.endpoints.values()))
