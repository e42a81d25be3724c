"""Key exchange and checksummed bulk both ways, in every mode and transport, with and without fast_mode."""
from __future__ import annotations

import os

import pytest

from doubles import CCS, MIB, MODES, RECORD_MAX, ROUTES, Rig

BULK = int(os.environ.get("TELEMT_JOURNEY_MIB", "64")) * MIB        # once per mode; the other transports of a mode move a sixteenth


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize(("mode", "transport"), ROUTES)
def test_key_exchange_and_bulk(rig: Rig, mode: str, transport: str, fast: bool) -> None:
    proxy = rig.proxy({"general": {"fast_mode": fast}})
    size = BULK if MODES[mode] == transport else BULK // 16
    client = rig.client("bob", mode, transport, dc=-4)
    client.req_pq()
    client.download(size)
    client.upload(size)
    client.both_ways(size // 8)
    client.echo(b"still in step..." * 3)
    peer = rig.dc.take()
    assert (peer.dc, peer.transport) == (-4, transport)
    # upstream-and-relay 8: with fast_mode the data centre encrypts with the client's own key
    key, iv = client.to_client_key
    assert (peer.header[8:56] == (key + iv)[::-1]) is fast
    if mode == "tls":
        assert client.flight and client.largest_record == RECORD_MAX
    proxy.wait_log(r"Connecting to Telegram DC .*\buser=bob\b.*\bdc=-4\b.*\bmode=direct\b")


@pytest.mark.parametrize("record", [1, 17, 2878, 16640])
def test_any_record_size_of_the_client(rig: Rig, record: int) -> None:
    rig.proxy()
    client = rig.client(record=record)
    client.upload(min(2 * MIB, 4096 * record))
    client.upload(record)
    client.echo()


def test_records_of_the_client_in_any_order_of_kinds(rig: Rig) -> None:
    """client-protocol 6.7: CCS anywhere, empty records, both versions."""
    rig.proxy()
    client = rig.client()
    for noise in (CCS, b"\x17\x03\x03\0\0", CCS + CCS, b"\x17\x03\x01\0\0"):
        client.push(noise)
        client.echo()
    client.push(b"\x17\x03\x01\0\x01" + client.encrypt(b"\x08") + b"\x17\x03\x01\0\x0b" + client.encrypt(b"\0\0\0abcdefgh"))
    assert client.recv_frame() == b"abcdefgh"


def test_many_small_frames_in_a_row(rig: Rig) -> None:
    rig.proxy()
    client = rig.client(transport="abridged")
    frames = [os.urandom(4 * (1 + n % 40)) for n in range(2000)]
    for frame in frames:
        client.send_frame(frame)
    for frame in frames:
        assert client.recv_frame() == frame
