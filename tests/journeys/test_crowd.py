"""Many sessions at once."""
from __future__ import annotations

import os
import resource

import pytest

from doubles import ROUTES, Rig

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
