"""Sessions through a fake middle end: every transport, messages of every size, addresses, tags, closes from either side."""
from __future__ import annotations

import hashlib
import os

import pytest

from doubles import MIB, MODES, ROUTES, Client, Rig, pattern, pattern_sha
from fake_middle_end import MeWorld

BULK = int(os.environ.get("TELEMT_JOURNEY_MIB", "64")) * MIB
WINDOW = 4 * MIB                # clients ask for what they can take: the middle end does not wait for anybody


@pytest.fixture
def world():
    with MeWorld({2: 1, 4: 1}) as found:
        yield found
        assert found.faults == []


def read_pattern(client: Client, size: int, seed: int) -> None:
    """`size` bytes of the pattern, in as many frames as the middle end likes."""
    digest, got = hashlib.sha256(), 0
    while got < size:
        frame = client.recv_frame()
        digest.update(frame)
        got += len(frame)
    assert got == size and digest.digest() == pattern_sha(seed, size), "download damaged"


def download(client: Client, size: int, seed: int = 1) -> None:
    for at in range(0, size, WINDOW):
        client.order("send", min(WINDOW, size - at), seed)
        read_pattern(client, min(WINDOW, size - at), seed)


def upload(client: Client, size: int, seed: int = 2, frame: int = 65_536) -> None:
    client.order("recv", size)
    for block in pattern(seed, size):
        for at in range(0, len(block), frame):
            client.send_frame(block[at:at + frame])
    assert client.recv_frame() == pattern_sha(seed, size), "upload damaged"


def start(rig: Rig, world: MeWorld, config=None):
    proxy = rig.proxy({**world.config(), **(config or {})})
    for me in world:
        me.take()
    return proxy


@pytest.mark.parametrize(("mode", "transport"), ROUTES)
def test_key_exchange_and_bulk(rig: Rig, world: MeWorld, mode: str, transport: str) -> None:
    start(rig, world)
    size = BULK if MODES[mode] == transport else BULK // 16
    client = rig.client("bob", mode, transport, dc=-4)
    client.req_pq()
    download(client, size)
    upload(client, size)
    client.echo(b"still in step..." * 3)
