"""Everything at once in random order, on every poller and with every shortcut of the data path switched off in turn."""
from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable

import pytest
from test_reset import PHASES

from doubles import HANGUP, MIB, ROUTES, Client, DcPeer, FakeDc, Rig

WAYS = {
    "epoll": ({}, {}),
    "selectors": ({"event_loop": "selectors"}, {}),
    "no-fast-mode": ({"fast_mode": False}, {}),
    "no-splice": ({}, {"TELEMT_PATHS": "no-splice"}),
    "no-scatter": ({}, {"TELEMT_PATHS": "no-scatter"}),
    "libcrypto": ({}, {"TELEMT_CRYPTO": "libcrypto"}),
}
WAY = pytest.mark.parametrize("way", WAYS)


def start(rig: Rig, way: str) -> None:
    general, env = WAYS[way]
    rig.proxy({"general": general, "dc_overrides": {"5": [rig.dcs[-1].address]}}, env=env)


class Chaos:
    """A crowd that is changed step by step; whoever is not damaged yet must always get his echo."""

    def __init__(self, rig: Rig, dc: FakeDc, rng: random.Random) -> None:
        self.rig, self.dc, self.rng = rig, dc, rng
        self.sound: list[Client] = []
        self.damaged: list[Client] = []
        self.far: list[DcPeer] = []

    def step(self) -> None:
        deeds = [self.talk] * 5 + [self.come] * 3 + [self.go] * 3 + [self.come_halfway, self.flood, self.far_away, self.far_end, self.half]
        with contextlib.suppress(*HANGUP):
            self.rng.choice(deeds)()
        if len(self.sound) + len(self.damaged) > 60:
            self.go()

    def talk(self) -> None:
        if self.sound:
            self.rng.choice(self.sound).echo(self.rng.randbytes(4 * self.rng.choice((1, 20, 3000))))

    def come(self) -> None:
        client = self.rig.client(self.rng.choice(("alice", "bob")), *self.rng.choice(ROUTES), dc=self.rng.choice((1, 2, -3, 4)))
        self.sound.append(client)
        client.echo()

    def come_halfway(self) -> None:
        mode, phase = self.rng.choice(PHASES)
        client = self.rig.dial("bob", mode)
        self.damaged.append(client)
        phase(client)

    def flood(self) -> None:
        client = self.rig.client("bob", *self.rng.choice(ROUTES), rcvbuf=self.rng.choice((8192, 200_000)))
        self.damaged.append(client)
        client.order("send", 8 * MIB)
        client.recv(self.rng.randrange(2 * MIB))

    def far_away(self) -> None:
        client = self.rig.client("alice", self.rng.choice(("secure", "tls")), dc=5)
        peer = self.dc.take()
        self.damaged.append(client)
        self.far.append(peer)
        for end in self.rng.sample((client, peer), 2):
            end.send(os.urandom(self.rng.choice((1, 5000, 100_000))))

    def far_end(self) -> None:
        if self.far:
            peer = self.far.pop(self.rng.randrange(len(self.far)))
            self.rng.choice((peer.reset, peer.close))()

    def half(self) -> None:
        if self.sound:
            client = self.sound.pop(self.rng.randrange(len(self.sound)))
            self.damaged.append(client)
            client.shutdown()
            client.expect_eof()

    def go(self) -> None:
        if crowd := self.rng.choice((self.sound, self.damaged)):
            client = crowd.pop(self.rng.randrange(len(crowd)))
            self.rng.choice((client.reset, client.close))()


@WAY
def test_random_comings_and_goings(rig: Rig, rng: random.Random, way: str) -> None:
    dc = rig.add_dc(manual=True)
    start(rig, way)
    chaos = Chaos(rig, dc, rng)
    for _ in range(150):                        # for minutes and hours: make soak
        chaos.step()
    for client in chaos.sound:
        client.echo()


@WAY
def test_bulk_on_every_way(rig: Rig, way: str) -> None:
    rig.add_dc(manual=True)
    start(rig, way)
    for mode in ("secure", "tls"):
        client = rig.client("bob", mode)
        client.download(12 * MIB + 1)
        client.upload(12 * MIB + 1)
        client.both_ways(4 * MIB)


def client_first(client: Client, peer: DcPeer) -> None:
    client.shutdown()
    peer.expect_eof()
    peer.send(b"after" * 99)
    peer.close()
    assert client.recv(495) == b"after" * 99
    client.expect_eof()


def dc_first(client: Client, peer: DcPeer) -> None:
    peer.shutdown()
    client.expect_eof()
    client.send(b"after" * 99)
    client.shutdown()
    assert peer.recv(495) == b"after" * 99
    peer.expect_eof()
    peer.close()


def dc_reset(client: Client, peer: DcPeer) -> None:
    peer.reset()
    client.expect_closed()


@WAY
@pytest.mark.parametrize("end", [client_first, dc_first, dc_reset], ids=lambda end: end.__name__)
def test_ends_on_every_way(rig: Rig, way: str, end: Callable[[Client, DcPeer], None]) -> None:
    dc = rig.add_dc(manual=True)
    start(rig, way)
    for mode in ("secure", "tls"):
        client = rig.client("bob", mode, dc=5)
        peer = dc.take()
        client.send(b"before")
        assert peer.recv(6) == b"before"
        end(client, peer)
        client.close()
    rig.proxies[0].settle()
