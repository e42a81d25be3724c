"""Clients and data centres that vanish at any moment: nothing leaks, nothing breaks, the next client is served."""
from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from doubles import HANGUP, MIB, Client, Rig, helper, poll

END = pytest.mark.parametrize("end", [Client.reset, Client.close], ids=["RST", "FIN"])
AGAIN = 8


def nothing(client: Client) -> None:
    """Connected, silent."""


def few_bytes(client: Client) -> None:
    client.push((client.hello or client.header)[:3])


def half_hello(client: Client) -> None:
    client.push(client.hello[:100])


def whole_hello(client: Client) -> None:
    client.push(client.hello)


def after_flight(client: Client) -> None:
    client.push(client.hello)
    client.read_flight()


def half_header(client: Client) -> None:
    if client.mode == "tls":
        after_flight(client)
        client.push(client.wrap(client.header)[:40])        # CCS, record head, 29 bytes
    else:
        client.push(client.header[:30])


def whole_header(client: Client) -> None:
    client.start()


def part_of_frame(client: Client) -> None:
    client.start().send(b"\x40\0\0\0half")


def talking(client: Client) -> None:
    client.start().req_pq()


PHASES = [(mode, phase) for mode, phases in {
    "classic": (nothing, few_bytes, half_header, whole_header, part_of_frame, talking),
    "tls": (few_bytes, half_hello, whole_hello, after_flight, half_header, whole_header, part_of_frame, talking),
}.items() for phase in phases]


@END
@pytest.mark.parametrize(("mode", "phase"), [pytest.param(*pair, id=f"{pair[0]}-{pair[1].__name__}") for pair in PHASES])
def test_client_vanishes(rig: Rig, mode: str, phase: Callable[[Client], None], end: Callable[[Client], None]) -> None:
    proxy = rig.proxy()
    for _ in range(AGAIN):
        client = rig.dial("alice", mode)
        phase(client)
        end(client)
    proxy.settle()
    rig.client("bob", mode).req_pq()


@END
@pytest.mark.parametrize("mode", ["classic", "tls"])
def test_client_vanishes_while_the_data_centre_is_dialled(rig: Rig, mode: str, end: Callable[[Client], None]) -> None:
    """upstream-and-relay D10: the attempt is given up at once, not after tg_connect."""
    hole = rig.black_hole()
    proxy = rig.proxy({"dc_overrides": {"3": [hole.address]}, "timeouts": {"tg_connect": 60}})
    for n in range(AGAIN):
        client = rig.client("alice", mode, dc=3)
        client.send(b"impatient...")
        proxy.wait_log(r"Connecting to Telegram DC .*\bdc=3\b", count=n + 1)
        end(client)
    poll(lambda: not proxy.fds()["tcp"], "the attempts are given up", timeout=10)        # the proxy's own check of DC 3 takes 5 s
    rig.client("bob", mode).req_pq()


@pytest.mark.parametrize("mode", ["classic", "tls"])
def test_client_with_much_to_say_vanishes_while_the_data_centre_is_dialled(rig: Rig, mode: str) -> None:
    """D10: when 64 KiB wait the client is not read any more, but its reset still counts."""
    hole = rig.black_hole()
    proxy = rig.proxy({"dc_overrides": {"3": [hole.address]}, "timeouts": {"tg_connect": 60}})
    client = rig.client("alice", mode, dc=3)
    client.send(bytes(200_000))
    proxy.wait_log(r"Connecting to Telegram DC .*\bdc=3\b")
    rig.client("bob", mode).req_pq()                # a round trip: the proxy has read what it wants by now
    client.reset()
    rig.close_clients()
    poll(lambda: not proxy.fds()["tcp"], "the attempt is given up", timeout=10)


@pytest.mark.parametrize("mode", ["secure", "tls"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_client_vanishes_in_the_middle_of_a_download(rig: Rig, mode: str, fast: bool) -> None:
    proxy = rig.proxy({"general": {"fast_mode": fast}})
    for n in range(AGAIN):
        client = rig.client("alice", mode)
        client.order("send", 256 * MIB)
        client.recv((n + 1) * 300_000)
        client.reset()
    proxy.settle()
    rig.client("bob", mode).download(MIB)


@pytest.mark.parametrize("mode", ["secure", "tls"])
def test_data_centre_vanishes_in_the_middle_of_an_upload(rig: Rig, mode: str) -> None:
    dc = rig.add_dc(manual=True)
    proxy = rig.proxy({"dc_overrides": {"5": [dc.address]}})

    def send_until_cut(client: Client) -> None:
        with pytest.raises(HANGUP):
            client.send_pattern(1, 1 << 40)
    for n in range(AGAIN):
        client = rig.client("alice", mode, dc=5)
        peer = dc.take()
        with helper(send_until_cut, client):
            peer.recv_digest((n + 1) * 300_000)
            peer.reset()
    rig.close_clients()
    proxy.settle()
    rig.client("bob", mode).upload(MIB)


@pytest.mark.parametrize("mode", ["classic", "tls"])
@pytest.mark.parametrize("waiting", [b"", b"unread.."], ids=["quiet", "unread"])
def test_data_centre_vanishes_from_a_quiet_session(rig: Rig, mode: str, waiting: bytes) -> None:
    dc = rig.add_dc(manual=True)
    proxy = rig.proxy({"dc_overrides": {"5": [dc.address]}})
    client = rig.client("alice", mode, dc=5)
    peer = dc.take()
    if waiting:
        peer.send(waiting)
        assert client.recv(8) == waiting
        client.send(waiting)
        poll(lambda: peer.sock.recv(8, 2), "the bytes at the data centre")      # 2 = MSG_PEEK: they stay unread
    peer.reset()
    client.expect_closed()
    client.close()
    proxy.settle()


def test_both_vanish_together(rig: Rig) -> None:
    dc = rig.add_dc(manual=True)
    proxy = rig.proxy({"dc_overrides": {"5": [dc.address]}})
    for n in range(20):
        client = rig.client("alice", ("classic", "tls")[n & 1], dc=5)
        peer = dc.take()
        client.send(os.urandom(5000))
        peer.send(os.urandom(5000))
        client.reset()
        peer.reset()
    proxy.settle()
    rig.client("bob").req_pq()
