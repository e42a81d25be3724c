"""Several ways out, some of them broken: sessions go on, health and API tell the truth, recovery is noticed."""
from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from doubles import ApiScript, Client, Rig, free_port, poll
from programs import Microsocks, needs

TIMEOUT_S = 8                                   # tg_connect: generous, a loaded machine must not be mistaken for a slow way


class MuteServer:
    """Accepts everybody and never says a word."""

    def __init__(self) -> None:
        self.port = free_port()
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.guests: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.guests.append(self._listener.accept()[0])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for guest in self.guests:
            guest.close()


@pytest.fixture
def mute() -> Iterator[MuteServer]:
    server = MuteServer()
    yield server
    server.close()


def socks(port: int) -> dict[str, Any]:
    return {"type": "socks5", "address": f"127.0.0.1:{port}"}


GOOD = {"type": "direct", "bind_addresses": ["127.0.0.1", "::1"]}


def start(rig: Rig, upstreams: list[dict[str, Any]], quick: bool = True, **general: Any) -> ApiScript:
    """A proxy with these ways out; returns its API.  quick: health checks every second, so that there is hardly a moment without one."""
    api_port = free_port()
    rig.env["TELEMT_PATHS"] = "quick-checks" if quick else ""
    rig.proxy({"upstreams": upstreams, "timeouts": {"tg_connect": TIMEOUT_S},
               "general": {"upstream_unhealthy_fail_threshold": 2, "upstream_connect_retry_attempts": 3, **general},
               "server": {"api": {"enabled": True, "listen": f"127.0.0.1:{api_port}", "minimal_runtime_enabled": True}}})
    api = ApiScript(api_port)
    poll(lambda: api.ask("GET", "/v1/health")[0] == 200, "the API")
    return api


def rows(api: ApiScript) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.data("/v1/stats/upstreams")["upstreams"]
    return found


def session(rig: Rig) -> tuple[Client, float]:
    """A session that works, and the seconds until the data centre answered."""
    began = time.monotonic()
    client = rig.client("alice", "secure")
    client.req_pq()
    return client, time.monotonic() - began


def test_one_refuses_one_is_silent_one_is_good(rig: Rig, mute: MuteServer, tmp_path: Path) -> None:
    needs("microsocks")
    closed = free_port()
    api = start(rig, [socks(closed), socks(mute.port), GOOD])
    for _ in range(12):                                     # from the first moment on, before anything is known
        client, took = session(rig)
        assert took < TIMEOUT_S, "longer than one connect timeout"
        client.close()
    poll(lambda: [row["healthy"] for row in rows(api)] == [False, False, True], "health that tells the truth", 40)
    found = api.data("/v1/stats/upstreams")
    assert found["summary"] == {"configured_total": 3, "healthy_total": 1, "unhealthy_total": 2, "direct_total": 1, "socks4_total": 0,
                                "socks5_total": 2}
    refusing, silent, good = found["upstreams"]
    assert refusing["fails"] >= 2 and silent["fails"] >= 2 and good["fails"] == 0
    assert refusing["effective_latency_ms"] is None and silent["effective_latency_ms"] is None and good["effective_latency_ms"] < 5000
    zero = found["zero"]
    assert (zero["connect_success_total"], zero["connect_fail_total"]) == (12, 0) and zero["connect_attempt_total"] >= 12
    assert sum(zero[f"connect_attempts_bucket_{name}"] for name in ("1", "2", "3_4", "gt_4")) == 12
    assert sum(value for name, value in zero.items() if name.startswith("connect_duration_success")) == 12
    before = zero["connect_attempt_total"]
    for _ in range(10):                                     # now nobody even tries the broken ones
        session(rig)[0].close()
    assert api.data("/v1/stats/zero/all")["upstream"]["connect_attempt_total"] == before + 10

    mute.close()                                            # both come back
    revived = [Microsocks(tmp_path / str(port), port=port) for port in (closed, mute.port)]
    try:
        poll(lambda: [row["healthy"] for row in rows(api)] == [True, True, True], "recovery", 40)
        proxy = rig.proxies[-1]
        assert len(proxy.log("INFO .*Upstream recovered by DC-group health threshold")) == 2
        assert all(row["fails"] == 0 and row["effective_latency_ms"] is not None for row in rows(api))
        assert [row["fails"] for row in rows(api)] == [0, 0, 0]
        poll(lambda: session(rig)[0] and len(rig.dc.peers) > 22, "sessions go on")
    finally:
        for server in revived:
            server.close()


def test_all_ways_are_broken_and_come_back(rig: Rig, tmp_path: Path) -> None:
    """Nothing healthy is left: a random way is tried all the same, and a session that works makes it healthy at once."""
    needs("microsocks")
    ports = [free_port(), free_port()]
    api = start(rig, [socks(port) for port in ports], upstream_connect_retry_backoff_ms=0)
    poll(lambda: not any(row["healthy"] for row in rows(api)), "both are down", 20)
    rig.client().expect_closed()
    rig.proxies[-1].wait_log("WARN .*No healthy upstreams available! Using random.")
    revived = Microsocks(tmp_path / "again", port=ports[0])
    try:
        poll(lambda: [row["healthy"] for row in rows(api)] == [True, False], "one is back", 20)
        session(rig)
    finally:
        rig.close_clients()
        revived.close()


def test_an_impatient_client_before_a_silent_way(rig: Rig, mute: MuteServer) -> None:
    """Nowhere else to go: it waits, and leaves nothing behind when it goes."""
    start(rig, [socks(mute.port)], quick=False)
    impatient = rig.client()
    poll(lambda: len(mute.guests) > 0, "the attempt")
    impatient.close()
    rig.proxies[-1].settle()


def test_failover_keeps_what_the_client_said_meanwhile(rig: Rig, mute: MuteServer) -> None:
    """The client talks at once; the way that takes it is the second one, 2 s later."""
    start(rig, [socks(mute.port), GOOD | {"weight": 0}])     # the weight sends the first attempt to the silent one, mostly
    for _ in range(2):
        client = rig.client("bob", "tls")
        client.echo(b"ECHO" + bytes(range(256)) * 40)
        client.close()
