"""Sessions through a fake middle end: every transport, messages of every size, addresses, tags, closes from either side."""
from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest

from doubles import MIB, MODES, ROUTES, Client, Rig, free_port, merged, pattern, pattern_sha, poll, wrap_frame
from fake_middle_end import MeWorld, answer, close_ext
from tests.journeys.test_metrics import fetch
from tests.test_api_metrics import samples

BULK = int(os.environ.get("TELEMT_JOURNEY_MIB", "64")) * MIB
PATIENCE = 60.0                 # of every wait: nothing here measures time
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
    proxy = rig.proxy(merged(world.config(), config or {}))
    for me in world:
        me.take(PATIENCE)
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


# -- what the middle end is told

@pytest.mark.parametrize("tagged", ["", "00112233445566778899aabbccddeeff"], ids=["plain", "tag"])
def test_requests_say_who_asks(rig: Rig, world: MeWorld, tagged: str) -> None:
    tags = {"bob": tagged} if tagged else {}
    for me in world:
        me.want_client, me.want_tag = "127.0.0.1", bytes.fromhex(tagged) if tagged else b""
    start(rig, world, {"access": {"user_ad_tags": tags}})
    client = rig.client("bob", dc=-2)
    client.req_pq()
    rig.proxies[0].wait_log("Transport: Middle-End Proxy - all DC-over-RPC", timeout=PATIENCE)
    assert rig.proxies[0].wait_log("Routing via Middle-End user=bob peer=.* dc=-2 proto=secure mode=middle_proxy pool_generation=1 link=",
                                   timeout=PATIENCE)
    request = world.mes[2][0].requests()[0]
    assert request.our == ("127.0.0.1", rig.proxies[0].port) and request.flags & 0x2 and bool(request.flags & 0x8) == bool(tagged)


def test_global_tag_serves_who_has_none(rig: Rig, world: MeWorld) -> None:
    for me in world:
        me.want_tag = bytes(range(16))
    start(rig, world, {"general": {"ad_tag": bytes(range(16)).hex()}})
    rig.client().echo()


@pytest.mark.parametrize("mode", ["tls", "secure", "classic"])
def test_quick_acks_come_before_their_answers(rig: Rig, world: MeWorld, mode: str) -> None:
    start(rig, world)
    client = rig.client(mode=mode, transport="abridged" if mode == "classic" else "")
    data = b"ECHO" * 5
    wire = wrap_frame(client.transport, data)
    client.send(bytes((wire[0] | 0x80,)) + wire[1:] if client.transport == "abridged" else wire[:3] + bytes((wire[3] | 0x80,)) + wire[4:])
    token = client.recv(4)
    if client.transport == "abridged":
        token = token[::-1]
    assert int.from_bytes(token, "little") == zlib.crc32(data) | 0x80000000
    assert client.recv_frame() == data


# -- the end from either side

def test_client_that_sends_and_leaves_is_heard_first(rig: Rig, world: MeWorld) -> None:
    start(rig, world)
    for _ in range(20):
        client = rig.client()
        client.send_frame(b"LAST" * 4)
        client.close()
    me = world.mes[2][0]
    poll(lambda: len(me.closes()) == 20 or None, "closes", PATIENCE)
    heard = {request.conn_id for request in me.requests()}
    assert {conn_id for conn_id, kind in me.closes()} == heard and {kind for _, kind in me.closes()} == {"conn"} and len(heard) == 20


def test_middle_end_closes_a_session(rig: Rig, world: MeWorld) -> None:
    start(rig, world)
    client, other = rig.client(), rig.client()
    client.echo()
    other.echo()
    me = world.mes[2][0]
    conn_id = me.requests()[0].conn_id
    me.bound()[conn_id].send(answer(conn_id, b"bye." * 1000), close_ext(conn_id))
    assert client.recv_frame() == b"bye." * 1000
    client.send_frame(b"nobody hears this...")
    client.expect_eof()
    other.echo()
    assert len(me.requests()) == 3 and me.closes() == []


@pytest.mark.parametrize("bad", [b"\x05\0\0\0abcde", b"\0\0\0\x7f", bytes(4) * 64, b"\x02\0\0\0ab"],
                         ids=["misaligned", "huge", "empty", "tiny"])
def test_bad_frame_costs_only_its_client(rig: Rig, world: MeWorld, bad: bytes) -> None:
    proxy = start(rig, world)
    client, other = rig.client(mode="classic", transport="intermediate"), rig.client()
    client.echo()
    other.echo()
    client.send(bad)
    client.expect_closed(PATIENCE)
    other.echo()
    me = world.mes[2][0]
    poll(lambda: len(me.closes()) == 1 or None, "close", PATIENCE)
    assert not proxy.log("link lost")


@pytest.mark.parametrize("fault", ["corrupt_crc", "replay", "truncate", "bad_len"])
def test_broken_link_closes_its_clients_and_is_replaced(rig: Rig, world: MeWorld, fault: str) -> None:
    proxy = start(rig, world)
    me = world.mes[2][0]
    client, other = rig.client(), rig.client(dc=4)
    client.echo()
    other.echo()
    link = me.bound()[me.requests()[0].conn_id]
    setattr(me, fault, link.wire.next_out)     # whatever comes next
    client.send_frame(b"ECHO" * 4)
    if fault == "replay":
        assert client.recv_frame() == b"ECHO" * 4              # the first of the two is good
    client.expect_closed(PATIENCE)
    setattr(me, fault, None)
    other.echo()
    proxy.wait_log("Middle-End link lost", timeout=PATIENCE)
    poll(lambda: can_echo(rig), "a new link", PATIENCE)


def can_echo(rig: Rig) -> bool:
    try:
        rig.client().echo()
    except (OSError, EOFError, AssertionError):
        return False
    return True


def test_middle_end_that_is_away_at_start_comes_later(rig: Rig) -> None:
    with MeWorld({2: 1}) as world:
        me = world.mes[2][0]
        me.down()
        port = free_port()
        proxy = rig.proxy(merged(world.config(), {"server": {"metrics_port": port}}))
        client = rig.client()                  # waits, then goes direct
        client.req_pq()
        proxy.wait_log("mode=direct", timeout=PATIENCE)
        assert int(samples(fetch(port)[2])["telemt_me_fallback_sessions_total"]) >= 1
        me.up()
        me.take(PATIENCE)
        poll(lambda: proxy.log("mode=middle_proxy") if can_echo(rig) else None, "a session through the middle end", PATIENCE)
        client.echo()
        assert world.faults == []


def test_without_degradation_nobody_goes_direct(rig: Rig) -> None:
    with MeWorld({2: 1}) as world:
        world.mes[2][0].down()
        proxy = rig.proxy({"general": {**world.config()["general"], "auto_degradation_enabled": False}})
        client = rig.client()
        client.send_frame(b"ECHO")
        client.expect_closed(PATIENCE)
        assert not proxy.log("mode=direct")


def test_wrong_secret_is_logged_and_tried_again(rig: Rig) -> None:
    with MeWorld({2: 1}, secret=b"\x42" * 64) as world:
        world.site.secret_page.body = b"\x43" * 64
        proxy = rig.proxy(world.config())
        proxy.wait_log("Middle-End link failed", 2, timeout=PATIENCE)
        client = rig.client()
        client.req_pq()
        proxy.wait_log("mode=direct", timeout=PATIENCE)


def test_a_silent_peer_is_given_up_and_tried_again(rig: Rig) -> None:
    """It takes the connection and the nonce and says no more: ten seconds, meanwhile sessions go direct; later it talks."""
    with MeWorld({2: 1}) as world:
        me = world.mes[2][0]
        me.mute = "handshake"
        proxy = rig.proxy(world.config())
        rig.client().req_pq()
        proxy.wait_log("mode=direct", timeout=PATIENCE)
        proxy.wait_log("Telegram handshake timeout", timeout=PATIENCE)
        me.mute = ""
        poll(lambda: proxy.log("mode=middle_proxy") if can_echo(rig) else None, "a session through the middle end", PATIENCE)
        assert world.faults == []


# -- many

class Crowd:
    """Clients of one worker thread; every payload carries its session's name, so cross-talk would show."""

    def __init__(self, port: int, seed: int, count: int) -> None:
        self.port, self.seed, self.count = port, seed, count
        self.rng = random.Random(seed)
        self.live: list[tuple[Client, bytes]] = []
        self.ended = 0                         # sessions that the middle end closed
        self.faults: list[str] = []

    def run(self) -> None:
        try:
            for number in range(self.count):
                client = Client(self.port, "bob", mode=self.rng.choice(("tls", "secure")), dc=self.rng.choice((2, -2))).start()
                self.live.append((client, struct.pack("<II", self.seed, number)))
                for pair in self.rng.sample(self.live, min(3, len(self.live))):
                    self.talk(*pair)
                while len(self.live) > 40:
                    self.leave(self.live.pop(self.rng.randrange(len(self.live)))[0])
        except (OSError, EOFError) as error:
            self.faults.append(f"{self.seed}: {error!r}")
        finally:
            for client, _ in self.live:
                client.close()

    def talk(self, client: Client, name: bytes) -> None:
        payload = b"NAME" + name * self.rng.randint(1, 30)
        try:
            client.send_frame(payload)
            got = client.recv_frame()
        except (EOFError, ConnectionError):
            self.ended += 1
            self.live.remove((client, name))
            client.close()
            return
        if got != payload:
            self.faults.append(f"{name.hex()} got {got[:24].hex()}")

    def leave(self, client: Client) -> None:
        client.close() if self.rng.random() < 0.7 else client.reset()


def test_two_thousand_sessions_on_eight_links(rig: Rig) -> None:
    count, workers = int(os.environ.get("TELEMT_JOURNEY_SESSIONS", "2000")), 8
    with MeWorld({2: 8}) as world:
        proxy = start(rig, world)
        poll(lambda: len(world.links(2)) >= 8 or None, "eight links", PATIENCE)
        crowds = [Crowd(proxy.port, seed, count // workers) for seed in range(workers)]
        threads = [threading.Thread(target=crowd.run) for crowd in crowds]
        for thread in threads:
            thread.start()
        closed, rng = 0, random.Random(1)
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.02)
            bound = [pair for me in world for pair in me.bound().items()]
            if bound:
                conn_id, link = rng.choice(bound)
                link.send(close_ext(conn_id))
                closed += 1
        faults = [fault for crowd in crowds for fault in crowd.faults]
        assert not faults, faults[:5]
        assert closed and sum(crowd.ended for crowd in crowds) <= closed
        poll(lambda: not any(me.bound() for me in world) or None, "every session said goodbye", PATIENCE)
        assert world.faults == [] and not proxy.log("link lost")


@pytest.fixture
def other_world():
    """A middle end as a process of its own: its work must not slow down the clients that are measured here."""
    program = [sys.executable, str(Path(__file__).parent.parent / "fake_middle_end.py"), "--dcs", "2"]
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    yield json.loads(process.stdout.readline())
    process.stdin.close()
    rest = process.stdout.read()
    process.wait(PATIENCE)
    assert json.loads(rest)["faults"] == []


def test_a_client_that_stops_reading_disturbs_nobody(rig: Rig, other_world) -> None:
    """It holds what it asked for; everybody else talks on through the same link.  What that costs them in time is a row of `make bench`."""
    one_link = {"me_warmup_step_delay_ms": 3_600_000}      # the second one comes in an hour
    proxy = rig.proxy(merged(other_world["config"], {"general": one_link}))
    proxy.wait_log("Middle-End link up", timeout=PATIENCE)
    clients = [rig.client(mode="secure", timeout=PATIENCE) for _ in range(500)]
    for client in clients:
        client.echo()
    base = proxy.rss()
    for returns in (True, False, True):
        stalled = rig.client("bob", mode="secure", timeout=PATIENCE, rcvbuf=64 << 10)
        stalled.order("send", 12 * MIB)        # below the limit of a queue: it stays as long as it likes
        poll(lambda: proxy.rss() - base > 6 * MIB or None, "a queue in the proxy", PATIENCE)
        for _ in range(3):
            for number, client in enumerate(clients):
                client.echo(struct.pack("<I", number) * 8)
            assert proxy.rss() - base > 6 * MIB            # it really stood there all the time
        if returns:
            read_pattern(stalled, 12 * MIB, 1)             # nothing of it was lost
            stalled.echo()
        else:
            stalled.reset()
        poll(lambda: proxy.rss() - base < 4 * MIB or None, "the queue given back", PATIENCE)
    links = {found[1] for found in proxy.log(r"Routing via Middle-End .* link=(\S+)")}
    assert len(links) == 1 and len(proxy.log("Routing via Middle-End")) == 503, links
    assert not proxy.log("Answer queue full") and not proxy.log("link lost")


def test_a_client_that_is_flooded_and_does_not_read_is_dropped(rig: Rig, other_world) -> None:
    """Without a bound on what is on its way: 16 MiB for 120 ms, or 32 MiB.  The others stay, memory comes back."""
    proxy = rig.proxy(other_world["config"])
    proxy.wait_log("Middle-End link up", timeout=PATIENCE)
    clients = [rig.client(mode="secure", timeout=PATIENCE) for _ in range(50)]
    for client in clients:
        client.echo()
    base = most = proxy.rss()
    for number in range(1, 6):
        flooded = rig.client("bob", mode="secure")
        flooded.order("flood", 1 << 30)
        while len(proxy.log("Answer queue full")) < number:
            clients[number].echo()
            most = max(most, proxy.rss())
        flooded.reset()
    for client in clients:
        client.echo()
    assert most - base < 64 * MIB              # twice 16 MiB, and the read that passes it
    poll(lambda: proxy.rss() - base < 8 * MIB or None, "the memory given back", PATIENCE)
    assert not proxy.log("link lost")

