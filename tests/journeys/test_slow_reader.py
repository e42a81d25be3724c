"""A side that stops reading costs little memory, disturbs nobody, and gets everything when it comes back."""
from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from doubles import MIB, Proxy, Rig, helper, pattern_sha

SIZE = 96 * MIB
HELD = 16 * MIB                 # what the proxy may hold for one stalled session, its shared buffers included


def wait_stalled(count: Callable[[], int], proxy: Proxy) -> None:
    """Until the sender has not got rid of a byte for half a second."""
    last, since = -1, time.monotonic()
    end = since + 20
    while time.monotonic() - since < 0.5:
        assert time.monotonic() < end, f"the sender is never held back\n{proxy.tail()}"
        if (now := count()) != last:
            last, since = now, time.monotonic()
        time.sleep(0.02)
    assert last < SIZE * 0.7, f"{last} bytes vanished into buffers"


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("mode", ["secure", "tls"])
def test_client_stops_reading(rig: Rig, mode: str, fast: bool) -> None:
    proxy = rig.proxy({"general": {"fast_mode": fast}})
    friend = rig.client("bob", "tls")
    friend.download(4 * MIB)
    before = proxy.rss()
    slow = rig.client("alice", mode, rcvbuf=65536)
    slow.req_pq()
    slow.order("send", SIZE, 7)
    peer = rig.dc.peers[1]
    wait_stalled(lambda: peer.sent_bytes, proxy)
    spent = proxy.cpu()
    for _ in range(50):
        friend.echo()
    friend.download(MIB)
    time.sleep(1)                                       # a window to measure in, not a wait
    assert proxy.cpu() - spent < 0.5, "busy while a client sleeps"
    assert proxy.rss() - before < HELD
    assert slow.recv_digest(SIZE) == pattern_sha(7, SIZE)
    slow.echo()
    assert proxy.rss() - before < HELD


@pytest.mark.parametrize("mode", ["classic", "tls"])
def test_data_centre_stops_reading(rig: Rig, mode: str) -> None:
    dc = rig.main_dc(manual=True, rcvbuf=65536)
    proxy = rig.proxy()
    friend = rig.client("bob", "secure")
    calm = dc.take()
    slow = rig.client("alice", mode)
    peer = dc.take()
    before = proxy.rss()
    with helper(slow.send_pattern, 9, SIZE):
        wait_stalled(lambda: slow.sent_bytes, proxy)
        assert proxy.rss() - before < HELD
        peer.send(b"down" * 4)                          # the other direction still works
        assert slow.recv(16) == b"down" * 4
        friend.send(b"hello dc")
        assert calm.recv(8) == b"hello dc"
        assert peer.recv_digest(SIZE) == pattern_sha(9, SIZE)
    assert proxy.rss() - before < HELD


def test_stalled_sessions_end_with_their_clients(rig: Rig) -> None:
    """Bytes that are queued for somebody do not keep a session alive after both sides have gone."""
    proxy = rig.proxy()
    for mode in ("classic", "secure", "tls") * 4:
        client = rig.client("alice", mode, rcvbuf=16384)
        client.order("send", SIZE)
    for peer in [rig.dc.take() for _ in rig.clients]:
        wait_stalled(lambda peer=peer: peer.sent_bytes, proxy)
    for n, client in enumerate(rig.clients):
        client.reset() if n & 1 else client.close()     # unread bytes: the kernel says RST either way
