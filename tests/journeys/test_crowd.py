"""Many sessions at once."""
from __future__ import annotations

import os
import resource

import pytest

from doubles import ROUTES, Rig, poll

CROWD = 500


def test_five_hundred_sessions_in_mixed_modes(rig: Rig) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 4 * CROWD + 300:
        pytest.skip("the descriptor limit of this machine is too low for 500 sessions")
    proxy = rig.proxy({"general": {"log_level": "normal"}})
    for n in range(CROWD):
        mode, transport = ROUTES[n % len(ROUTES)]
        rig.client(("alice", "bob")[n & 1], mode, transport, dc=1 + n % 5)
    for turn in range(4):
        sent = []
        for client in rig.clients:
            sent.append(os.urandom(4 * (1 + len(sent) % 60) << 2 * turn))
            client.send_frame(sent[-1])
        for client, frame in zip(reversed(rig.clients), reversed(sent), strict=True):
            assert client.recv_frame() == frame
    assert proxy.fds()["tcp"] == 2 * CROWD
    assert sorted(peer.dc for peer in rig.dc.peers) == sorted(1 + n % 5 for n in range(CROWD))
    for client in rig.clients[::2]:                     # half of them leave, the rest does not notice
        client.close()
    for client in rig.clients[1::2]:
        client.echo()


def test_a_thousand_short_sessions(rig: Rig) -> None:
    """One after the other, so that every descriptor number is used many times."""
    proxy = rig.proxy({"general": {"log_level": "normal"}})
    warm = rig.client("bob", "secure")
    before = proxy.rss()
    for n in range(1000):
        client = rig.client("alice", *ROUTES[n % len(ROUTES)])
        client.echo(b"%08d" % n)
        client.close() if n % 3 else client.reset()
        rig.clients.remove(client)
    warm.echo()
    assert proxy.rss() - before < 8 << 20


def test_a_crowd_that_let_its_queues_fill_gives_the_memory_back(rig: Rig) -> None:
    """150 clients that order and do not read, 256 KB queued for each: once they have left, next to nothing of it stays."""
    proxy = rig.proxy({"general": {"log_level": "normal"}})
    friend = rig.client("bob", "tls")
    friend.download(4 << 20)
    before = proxy.rss()
    for n in range(150):
        rig.client("alice", ("tls", "secure")[n & 1], rcvbuf=4096).order("send", 8 << 20, 7)
    poll(lambda: proxy.rss() - before > 12 << 20, "queues fill", timeout=30)
    for client in rig.clients[1:]:
        client.reset()
    poll(lambda: proxy.rss() - before < 5 << 20, "the memory back", timeout=20)
    friend.echo()
