"""Too few descriptors, too many clients: the process lives, rests, and recovers."""
from __future__ import annotations

import contextlib
import socket
import time

import pytest

from doubles import HANGUP, Client, Proxy, Rig, poll


def calm(proxy: Proxy, seconds: float = 2.0) -> None:
    """Less than half a core over a window of time, and ten lines of log a second plus a few for each client that is turned away."""
    spent, lines = proxy.cpu(), len(proxy.lines)
    time.sleep(seconds)                                     # a window to measure in, not a wait
    assert proxy.cpu() - spent < seconds / 2, f"busy\n{proxy.tail()}"
    assert len(proxy.lines) - lines < 500, "floods its log"


def pressing(rig: Rig, count: int) -> list[Client]:
    """Clients that connect and say nothing: each wants a descriptor."""
    return [rig.dial("alice", "classic") for _ in range(count)]


def serves_again(rig: Rig) -> None:
    def attempt() -> bool:
        client = rig.dial("bob", timeout=2)
        try:
            client.start().req_pq()
        except (EOFError, TimeoutError, *HANGUP):
            return False
        finally:
            client.close()
        return True
    poll(attempt, "service after the rush", timeout=10)


@pytest.mark.parametrize("limit", [64, 40])
def test_more_connections_than_descriptors(rig: Rig, limit: int) -> None:
    proxy = rig.proxy(nofile=limit)
    pressing(rig, 200)
    poll(lambda: sum(proxy.fds().values()) >= limit - 1, "the last descriptor in use")
    calm(proxy)
    assert sum(proxy.fds().values()) <= limit
    rig.close_clients()
    serves_again(rig)
    proxy.wait_log(r"ERROR .*Accept error: .*Too many open files")


def test_sessions_without_descriptors_for_their_data_centre(rig: Rig) -> None:
    """Each session needs two: some dials fail for want of one, their clients are closed, the others go on."""
    proxy = rig.proxy(nofile=64)
    clients = [rig.dial("alice", "secure", timeout=5) for _ in range(100)]
    for client in clients:
        with contextlib.suppress(*HANGUP):
            client.push(client.header)
    calm(proxy)
    served = 0
    for client in clients:
        with contextlib.suppress(EOFError, TimeoutError, *HANGUP):
            client.sock.settimeout(0.1)
            client.echo()
            served += 1
    assert served >= 10
    assert proxy.process.poll() is None
    rig.close_clients()
    serves_again(rig)


def test_connection_limit_of_the_process(rig: Rig) -> None:
    """client-protocol D2: (384 - 256) / 2 = 64 clients at once; the rest waits in the kernel, one WARN a minute."""
    proxy = rig.proxy({"timeouts": {"client_handshake": 60}}, nofile=384)
    session = rig.client("bob")
    session.req_pq()
    pressing(rig, 150)
    poll(lambda: proxy.fds()["tcp"] >= 65, "64 clients and a data centre")
    calm(proxy, 1)
    assert proxy.fds()["tcp"] == 65
    proxy.wait_log("WARN .*Connection limit reached")
    session.echo()                                          # those who are in are served
    late = rig.dial("bob", timeout=5)
    for client in rig.clients[1:-1]:
        client.close()
    late.start().req_pq()                                   # and who waited comes in
    assert len(proxy.log("WARN .*Connection limit reached")) == 1


def test_clients_that_wait_cost_nothing(rig: Rig) -> None:
    """Idle means idle (platform.md 4)."""
    proxy = rig.proxy()
    for n in range(60):
        client = rig.dial("alice", ("classic", "secure", "tls")[n % 3])
        if n % 2:
            client.start().req_pq()
        elif n % 4:
            client.push(b"\x16\x03\x01\x02")
    spent = proxy.cpu()
    time.sleep(2)                                           # a window to measure in, not a wait
    assert proxy.cpu() - spent < 0.1


def test_connections_that_are_gone_before_they_are_accepted(rig: Rig) -> None:
    proxy = rig.proxy()
    for _ in range(300):
        with socket.create_connection(("127.0.0.1", proxy.port)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    serves_again(rig)
