"""The cuts of the network mean nothing: byte by byte, in any pieces, or all at once."""
from __future__ import annotations

import random

import pytest

from doubles import MLKEM, ROUTES, X25519, Rig


@pytest.mark.parametrize(("mode", "transport"), ROUTES)
def test_one_byte_at_a_time(rig: Rig, mode: str, transport: str) -> None:
    rig.proxy()
    client = rig.client("bob", mode, transport, dribble=True)
    client.req_pq()
    client.echo(b"drop by drop" * 20)


@pytest.mark.parametrize("shape", [{}, {"shares": (MLKEM, X25519)}, {"length": 16384}, {"session": 0}],
                         ids=["517", "mlkem", "16384", "no-session-id"])
def test_hello_in_random_pieces(rig: Rig, rng: random.Random, shape: dict[str, object]) -> None:
    proxy = rig.proxy()
    for n in range(12):
        client = rig.dial("bob", **shape)
        cuts = sorted(rng.sample(range(1, len(client.hello)), 1 + n % 5))
        for start, end in zip([0, *cuts], [*cuts, len(client.hello)], strict=True):
            client.push(client.hello[start:end])
            rig.clients[0].req_pq() if n else None          # a round trip through the proxy, so that the piece is read alone
        client.read_flight()
        client.push(client.wrap(client.header))
        client.req_pq()
    proxy.wait_log("TLS handshake successful", count=12)


def test_header_in_random_pieces_and_records(rig: Rig, rng: random.Random) -> None:
    rig.proxy()
    first = rig.client("alice", "secure")
    for n in range(24):
        mode = ("secure", "tls")[n & 1]
        client = rig.dial("bob", mode, record=rng.randint(1, 70))
        if mode == "tls":
            client.push(client.hello)
            client.read_flight()
        wire = client.wrap(client.header)
        for at in range(0, len(wire), step := rng.randint(5, 60)):
            client.push(wire[at:at + step])
            first.req_pq()
        client.req_pq()


@pytest.mark.parametrize("cut", [0, 1, 5, 516, 517, 518, 523, 528, 592, 600])
def test_hello_header_and_frame_in_one_segment(rig: Rig, cut: int) -> None:
    """A client that does not wait for the flight; also cut in two at the borders of hello, CCS, record head and header."""
    rig.proxy()
    client = rig.dial()
    wire = client.hello + client.wrap(client.header + client.encrypt(b"\x08\0\0\0pipeline"))
    if cut:
        other = rig.client("bob", "secure")
        client.push(wire[:cut])
        other.echo()
    client.push(wire[cut:])
    first = client.pull(5)
    rest = client.pull(int.from_bytes(first[3:], "big") + 11)
    last = client.pull(int.from_bytes(rest[-2:], "big"))
    assert first[0] == 0x16 and rest[-5] == 0x17 and last
    assert client.recv_frame() == b"pipeline"
    client.echo()


def test_plain_header_and_frames_in_one_segment(rig: Rig) -> None:
    rig.proxy()
    client = rig.dial("bob", "classic", "abridged")
    client.push(client.header + client.encrypt(b"\x02together" * 300))
    for _ in range(300):
        assert client.recv_frame() == b"together"
