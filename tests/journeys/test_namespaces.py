"""Two network namespaces and a slow, lossy wire between them: the proxy in one, Telegram at its real addresses in the other.

The wire is ours, a thread between two TUN devices: it delays and loses packets per family as `tc netem` would, which many kernels
(and all gVisor and Firecracker guests) come without.
"""
from __future__ import annotations

import contextlib
import ctypes
import datetime
import fcntl
import functools
import heapq
import http.server
import itertools
import os
import random
import select
import shutil
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from doubles import PROGRAM, ApiScript, Client, FakeDc, Proxy, Rig, poll

_T = TypeVar("_T")

V4 = {1: "149.154.175.50", 2: "149.154.167.51", 3: "149.154.175.100", 4: "149.154.167.91", 5: "149.154.171.5"}
V6 = {1: "2001:b28:f23d:f001::a", 2: "2001:67c:4e8:f002::a", 3: "2001:b28:f23d:f003::a", 4: "2001:67c:4e8:f004::a",
      5: "2001:b28:f23f:f005::a"}
CDN = "91.105.192.100"                          # of DC 203: there, and nobody listens
TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 1, 0x1000, 0x40000000
NAMES = itertools.count()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def inside(namespace: str, work: Callable[[], _T]) -> _T:
    """`work` in a thread that lives in the namespace; sockets it makes belong there for ever."""
    found: list[Any] = []

    def run() -> None:
        try:
            with open(f"/var/run/netns/{namespace}", "rb") as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            found.append(work())
        except BaseException as fault:
            found.append(fault)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    if isinstance(found[0], BaseException):
        raise found[0]
    result: _T = found[0]
    return result


def open_tun() -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"wire", IFF_TUN | IFF_NO_PI))
    return fd


class Wire:
    """Carries packets between two TUN devices, `delay_s` late each way; `lost` is the part that is lost, `cut` families lose all."""

    def __init__(self, ends: tuple[int, int]) -> None:
        self.ends = ends
        self.delay_s, self.lost, self.cut = 0.0, 0.0, set[int]()
        self._random = random.Random(7)
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        queue: list[tuple[float, int, int, bytes]] = []
        order = itertools.count()
        while True:
            pause = max(0.0, queue[0][0] - time.monotonic()) if queue else None
            ready = select.select([*self.ends, self._wake[0]], [], [], pause)[0]
            if self._wake[0] in ready:
                return
            for end in ready:
                with contextlib.suppress(BlockingIOError):
                    packet = os.read(end, 2048)
                    if packet[0] >> 4 not in self.cut and self._random.random() >= self.lost:
                        other = self.ends[self.ends[0] == end]
                        heapq.heappush(queue, (time.monotonic() + self.delay_s, next(order), other, packet))
            while queue and queue[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(queue)
                with contextlib.suppress(OSError):
                    os.write(end, packet)

    def close(self) -> None:
        os.write(self._wake[1], b"x")
        self._thread.join(5)
        for fd in (*self.ends, *self._wake):
            os.close(fd)


class World:
    """The namespaces `here` (the proxy) and `there` (Telegram), and the wire."""

    def __init__(self) -> None:
        number = f"{os.getpid()}-{next(NAMES)}"
        self.here, self.there = f"telemt-here-{number}", f"telemt-there-{number}"
        self.wire: Wire | None = None
        for name in (self.here, self.there):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ends = inside(self.here, open_tun), inside(self.there, open_tun)
        for name, v4, v6 in ((self.here, "10.77.0.2", "fd77::2"), (self.there, "10.77.0.1", "fd77::1")):
            ip("-n", name, "addr", "add", f"{v4}/32", "dev", "wire")
            ip("-n", name, "addr", "add", f"{v6}/128", "dev", "wire", "nodad")
            ip("-n", name, "link", "set", "wire", "up", "mtu", "1400")
            ip("-n", name, "route", "add", "default", "dev", "wire")
            ip("-n", name, "-6", "route", "add", "default", "dev", "wire")
        for address in (*V4.values(), *V6.values(), CDN):
            ip("-n", self.there, "addr", "add", address, "dev", "lo", *(["nodad"] if ":" in address else []))
        self.wire = Wire(ends)

    def close(self) -> None:
        if self.wire is not None:
            self.wire.close()
        for name in (self.here, self.there):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.fixture
def world() -> Iterator[World]:
    if shutil.which("ip") is None:
        pytest.skip("no ip command (make deps-test)")
    if not hasattr(ctypes.CDLL(None), "setns") or not os.path.exists("/dev/net/tun"):
        pytest.skip("this machine has no namespaces or no TUN device")
    probe = subprocess.run(["ip", "netns", "add", f"telemt-probe-{os.getpid()}"], check=False, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"network namespaces are forbidden here: {probe.stderr.strip()}")
    subprocess.run(["ip", "netns", "del", f"telemt-probe-{os.getpid()}"], check=False, capture_output=True)
    try:
        found = World()
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"this machine does not let a test wire namespaces: {error}")
    yield found
    found.close()


def telegram(rig: Rig, world: World) -> dict[str, FakeDc]:
    """Data centres at the addresses of the built-in table."""
    found = {}
    for address in (*V4.values(), *V6.values()):
        found[address] = inside(world.there, functools.partial(rig.add_dc, host=address, port=443))
    return found


def start(rig: Rig, world: World, **network: Any) -> None:
    """The proxy in its namespace, with nothing but the table."""
    rig.env["TELEMT_PATHS"] = "quick-checks"
    nothing = {str(index): None for n in (1, 2, 3, 4, 5, 203, 10002) for index in (n, -n)}
    rig.proxy({"upstreams": [{"type": "direct"}], "network": {"ipv6": True, "stun_use": False, **network}, "dc_overrides": nothing,
               "general": {"upstream_unhealthy_fail_threshold": 2},
               "server": {"api": {"enabled": True, "listen": "127.0.0.1:9091", "minimal_runtime_enabled": True}}},
              command=["ip", "netns", "exec", world.here, sys.executable, "-B", str(PROGRAM)])


def row(world: World) -> dict[str, Any]:
    found: dict[str, Any] = inside(world.here, lambda: ApiScript(9091).data("/v1/stats/upstreams"))["upstreams"][0]
    return found


def path(world: World, dc: int) -> dict[str, Any]:
    found: dict[str, Any] = row(world)["dc"][dc - 1]
    return found


def client(rig: Rig, world: World, dc: int) -> Client:
    return inside(world.here, functools.partial(rig.client, "alice", "secure", dc=dc))


def test_latency_follows_the_wire(world: World, rig: Rig) -> None:
    """The table after the start, the moving average of sessions and checks, and the delay that a session feels."""
    assert world.wire is not None
    dcs = telegram(rig, world)
    world.wire.delay_s = 0.04
    start(rig, world)
    proxy = rig.proxies[-1]
    took = [int(proxy.wait_log(rf"    DC{dc} \[IPv4\] {V4[dc]}:443\t\t\t\t(\d+) ms$")[1]) for dc in V4]
    assert all(80 <= ms < 400 for ms in took), took
    proxy.wait_log("  IPv4 in use / IPv6 is fallback")
    assert proxy.log(rf"    DC3 \[IPv6\] {V6[3]}:443 - \d+ ms$")
    assert all(80 <= cell["latency_ema_ms"] < 400 and cell["ip_preference"] == "both_work" for cell in row(world)["dc"])
    client(rig, world, 2).req_pq()
    assert len(dcs[V4[2]].peers) == 1
    before = row(world)["effective_latency_ms"]
    world.wire.delay_s = 0.2                                # the route gets worse: the average follows, it does not jump
    poll(lambda: before + 40 < row(world)["effective_latency_ms"], "the average rises", 20)
    poll(lambda: row(world)["effective_latency_ms"] > 300, "and comes near", 30)
    world.wire.delay_s = 0.01
    poll(lambda: row(world)["effective_latency_ms"] < 150, "and falls again", 30)
    assert row(world)["healthy"]


def test_loss_slows_down_and_breaks_nothing(world: World, rig: Rig) -> None:
    assert world.wire is not None
    telegram(rig, world)
    start(rig, world)
    world.wire.delay_s, world.wire.lost = 0.01, 0.08
    for dc in (1, 2, 3, -4, 5):
        client(rig, world, dc).download(200_000)
    world.wire.lost = 0.0


def test_a_family_that_is_dead_is_left_and_found_again(world: World, rig: Rig) -> None:
    """prefer = 6: while IPv6 is a black hole new sessions go by IPv4 at once, and back when the checks say so (D3)."""
    assert world.wire is not None
    dcs = telegram(rig, world)
    world.wire.cut = {6}
    start(rig, world, prefer=6)
    rig.proxies[-1].wait_log("  IPv4 only / IPv6 unavailable", timeout=15)
    assert all(cell["ip_preference"] == "prefer_v4" for cell in row(world)["dc"])
    began = time.monotonic()
    client(rig, world, 4).req_pq()
    assert len(dcs[V4[4]].peers) == 1 and time.monotonic() - began < 9        # not the 10 s of tg_connect
    world.wire.cut = set()
    poll(lambda: all(cell["ip_preference"] == "both_work" for cell in row(world)["dc"]), "IPv6 is back", 20)
    client(rig, world, 4).req_pq()
    assert len(dcs[V6[4]].peers) == 1
    world.wire.cut = {4}
    poll(lambda: path(world, 4)["ip_preference"] in ("prefer_v6", "both_work"), "IPv6 alone is enough")
    client(rig, world, 5).req_pq()
    assert row(world)["healthy"]
    world.wire.cut = set()


def test_nothing_gets_through(world: World, rig: Rig) -> None:
    """Both families dead: the entry becomes unhealthy, and healthy again when the wire is mended."""
    assert world.wire is not None
    telegram(rig, world)
    start(rig, world)
    rig.proxies[-1].wait_log("  IPv4 in use / IPv6 is fallback")
    world.wire.cut = {4, 6}
    poll(lambda: not row(world)["healthy"], "unhealthy", 40)
    assert all(cell["ip_preference"] == "unavailable" for cell in row(world)["dc"]) and row(world)["fails"] >= 2
    world.wire.cut = set()
    poll(lambda: row(world)["healthy"] and row(world)["fails"] == 0, "healthy again", 20)
    client(rig, world, 1).req_pq()


# -- what the world sees of us

PUBLIC, LIE = "8.8.4.4", "8.8.4.66"


class Stun:
    """Answers binding requests at an address of `there` with an address of its choice."""

    def __init__(self, world: World, host: str, says: str) -> None:
        self.says, self.asked = says, 0
        self.sock = inside(world.there, functools.partial(socket.socket, socket.AF_INET, socket.SOCK_DGRAM))
        self.sock.bind((host, 3478))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                request, peer = self.sock.recvfrom(2048)
                if peer is None:
                    return
                self.asked += 1
                value = bytes(a ^ b for a, b in zip(socket.inet_aton(self.says), b"\x21\x12\xa4\x42", strict=True))
                self.sock.sendto(b"\1\1\0\x0c" + request[4:20] + b"\0\x20\0\x08\0\1" + struct.pack(">H", 4711 ^ 0x2112) + value, peer)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class Site:
    """A web site that tells addresses, on port 80 of an address of `there`."""

    def __init__(self, world: World, host: str, says: str) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(says)))
                self.end_headers()
                self.wfile.write(says.encode())

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        class Server(http.server.ThreadingHTTPServer):
            def server_bind(self) -> None:
                """Without asking a name server, which nobody has here, for our name."""
                socketserver.TCPServer.server_bind(self)
        self.server = inside(world.there, lambda: Server((host, 80), Handler))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def behind_nat(rig: Rig, world: World, answer: str = "", **network: Any) -> str:
    """Start a proxy that listens everywhere and has to find its address; the host in its links, as soon as `answer` is logged.

    The link block waits for the answer, but for 5 s only: on a busy machine it may show the private address, then and only then.
    """
    nothing = {str(index): None for n in (1, 2, 3, 4, 5, 203, 10002) for index in (n, -n)}
    proxy = rig.proxy({"upstreams": [{"type": "direct"}], "network": network, "dc_overrides": nothing,
                       "general": {"middle_proxy_nat_probe": True, "links": {"show": ["alice"]}},
                       "server": {"listeners": [{"ip": "0.0.0.0"}],
                                  "api": {"enabled": True, "listen": "127.0.0.1:9091", "minimal_runtime_enabled": True}}},
                      command=["ip", "netns", "exec", world.here, sys.executable, "-B", str(PROGRAM)])
    host = shown = proxy.wait_log(r"Proxy Links \((.*)\) ---", timeout=15)[1]
    if answer:
        host = proxy.wait_log(answer, timeout=15)[1]
        assert shown == host or (shown == "10.77.0.2" and seconds_between(proxy, "API endpoint", "Proxy Links") > 4.9)
    links = inside(world.here, lambda: ApiScript(9091).data("/v1/users/alice"))["links"]
    assert f"server={host}&" in str(links)
    return host


def seconds_between(proxy: Proxy, first: str, then: str) -> float:
    """By the clock of the log."""
    began, ended = (datetime.datetime.fromisoformat(proxy.log(f"^(.*)Z .*{words}")[0][1]) for words in (first, then))
    return (ended - began).total_seconds()


def test_links_show_what_honest_servers_see(world: World, rig: Rig) -> None:
    """One of three lies; the links wait for the answer, clients do not."""
    servers = [Stun(world, V4[dc], LIE if dc == 1 else PUBLIC) for dc in (1, 2, 3)]
    try:
        host = behind_nat(rig, world, "STUN-Quorum reached, IP: (.*)$", stun_use=True, stun_servers=[f"{V4[dc]}:3478" for dc in (1, 2, 3)])
        assert host == PUBLIC
        proxy = rig.proxies[-1]
        proxy.wait_log(rf"Network capabilities resolved ipv4=10.77.0.2 .*reflected_v4={PUBLIC}:4711 ")
        poll(lambda: (proxy.folder / "cache/public_ip.txt").exists(), "the cache file")
        assert (proxy.folder / "cache/public_ip.txt").read_text() == f"{PUBLIC}\n"
    finally:
        for server in servers:
            server.close()


def test_links_show_what_a_site_tells_or_the_cache_remembers(world: World, rig: Rig) -> None:
    """No STUN server answers; then no site either, and the file of the first run is believed."""
    site = Site(world, V4[5], PUBLIC)
    urls = {"stun_use": True, "stun_servers": [f"{V4[4]}:3478"], "http_ip_detect_urls": [f"http://{V4[5]}/ip"]}
    try:
        assert behind_nat(rig, world, "INFO .*STUN unavailable, using HTTP public IPv4 fallback ip=(.*)$", **urls) == PUBLIC
    finally:
        site.close()
    first = rig.proxies[-1]
    cache = first.folder / "cache/public_ip.txt"
    poll(cache.exists, "the cache file")
    first.settle()
    first.stop()
    answer = "STUN and HTTP unavailable, using the public IPv4 of the cache file ip=(.*)$"
    assert behind_nat(rig, world, answer, cache_public_ip_path=str(cache), **urls) == PUBLIC


def test_links_show_the_private_address_when_nobody_tells(world: World, rig: Rig) -> None:
    assert world.wire is not None
    world.wire.cut = {4, 6}                                 # nobody answers, nobody refuses
    host = behind_nat(rig, world, stun_use=True, stun_servers=[f"{V4[1]}:3478"], http_ip_detect_urls=[f"http://{V4[5]}/ip"])
    assert host == "10.77.0.2" and seconds_between(rig.proxies[-1], "API endpoint", "Proxy Links") > 4.9, \
        "links wait 5 s, and a slow start is not taken off them"
    world.wire.cut = set()
