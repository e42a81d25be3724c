"""Strangers in masses: slow ones in every phase, too many of one address; and what is written down about them.

`make bench` has the long form: 5,000 slow connections for a minute, with times and memory.
"""
from __future__ import annotations

import contextlib
import socket
import struct
import urllib.request
from collections.abc import Iterator

import pytest

from doubles import HANGUP, USERS, Proxy, Rig, build_hello, free_port, poll

ALICE = bytes.fromhex(USERS["alice"])
STRANGER = bytes.fromhex("ffeeddccbbaa99887766554433221100")
SLOW = {"nothing": b"", "three bytes": b"\x16\x03\x01", "half a hello": build_hello(STRANGER)[:300], "plain bytes": b"A" * 30,
        "a hello, then nothing": b"", "masked, then nothing": build_hello(STRANGER)}


@pytest.fixture
def silent_site() -> Iterator[socket.socket]:
    """A mask host that accepts in the kernel and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as server:
        yield server


def arrive(proxy: Proxy, kind: str, source: str) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", proxy.port), timeout=10, source_address=(source, 0))
    sock.sendall(build_hello(ALICE) if kind == "a hello, then nothing" else SLOW[kind])
    return sock


def test_slow_connections_in_every_phase(rig: Rig, silent_site: socket.socket) -> None:
    proxy = rig.proxy({"timeouts": {"client_handshake": 5}, "general": {"log_level": "normal"},
                       "censorship": {"mask": True, "mask_host": "127.0.0.1", "mask_port": silent_site.getsockname()[1]}})
    rig.client().req_pq()
    before = proxy.rss()
    slow = [arrive(proxy, kind, f"127.0.2.{1 + n % 50}") for n in range(100) for kind in SLOW]
    for turn in range(20):                                   # a byte now and then from those who have begun, and clients come and go
        for n in range(turn, len(slow), 20):
            if n % len(SLOW) in (1, 2):
                with contextlib.suppress(OSError):
                    slow[n].send(b"\x03")
        client = rig.client("bob", ("tls", "secure", "classic")[turn % 3])
        client.req_pq()
        client.close()
    masked = [sock for n, sock in enumerate(slow) if n % len(SLOW) == len(SLOW) - 1]
    for sock in set(slow) - set(masked):                     # the deadline ends them all
        sock.settimeout(15)
        try:
            while sock.recv(65536):
                pass
        except HANGUP:
            pass
        sock.close()
    poll(lambda: proxy.fds()["tcp"] <= 2 * len(masked) + 2, "only who is masked left")     # and a look at the data centres now and then
    for sock in masked:                                      # with a reset: this site would never answer an end
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    poll(lambda: proxy.fds()["tcp"] <= 2, "everybody gone", timeout=20)
    assert proxy.rss() - before < 4 << 20, "memory stays"


def test_too_many_of_one_address(rig: Rig) -> None:
    """The oldest half-open connection makes room; another address, and who is known, do not notice."""
    proxy = rig.proxy(nofile=600)                            # 172 places, 64 half-open ones for an address
    known = rig.client(source="127.0.0.5")
    known.req_pq()
    flood = [socket.create_connection(("127.0.0.1", proxy.port), timeout=20, source_address=("127.0.0.5", 0)) for _ in range(80)]
    other = rig.dial("bob", source="127.0.0.6")
    for sock in flood[:16]:
        assert sock.recv(1) == b""
    for sock in flood[20:]:
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)
    known.echo()
    other.start().req_pq()
    rig.client(source="127.0.0.5").req_pq()                  # the newest one of the flooding address is served
    for sock in flood:
        sock.close()


def test_who_knocks_is_written_down_and_shown(rig: Rig) -> None:
    port = free_port()
    proxy = rig.proxy({"general": {"beobachten": True, "beobachten_flush_secs": 1, "modes": {"classic": False, "secure": False}},
                       "server": {"metrics_listen": f"127.0.0.1:{port}"}}, ready=r"Metrics endpoint")
    report = proxy.folder / "cache" / "beobachten.txt"
    poll(lambda: report.exists() and report.read_text() == "empty\n", "the file of a start")
    for source, said in [("127.0.0.9", b"GET / HTTP/1.1\r\n\r\n"), ("127.0.0.9", b"POST / HTTP/1.1\r\n\r\n"),
                         ("127.0.0.8", b"SSH-2.0-x\r\n"), ("127.0.0.7", build_hello(STRANGER)), ("127.0.0.6", b"")]:
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=20, source_address=(source, 0)) as sock:
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
    gone = rig.dial(source="127.0.0.5")
    gone.push(gone.hello)
    gone.read_flight()
    gone.close()
    rude = rig.dial(source="127.0.0.4")
    rude.push(b"\x16\x03")
    poll(lambda: proxy.fds()["tcp"] == 1, "the others gone")
    rude.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    rude.close()
    wanted = "[HTTP]\n127.0.0.9-2\n[SSH]\n127.0.0.8-1\n[TLS-scanner]\n127.0.0.7-1\n[expected_64_got_0]\n127.0.0.5-1\n[other]\n127.0.0.4-1\n"
    poll(lambda: report.read_text() == wanted, f"{wanted} in the file, there is {report.read_text()}", timeout=8)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/beobachten", timeout=20) as answer:
        assert answer.read().decode() == wanted
    rig.client().req_pq()
    proxy.stop()
    assert report.read_text() == wanted
