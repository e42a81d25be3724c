"""/metrics and /beobachten of the running program (metrics.md 1, 2, 5, 6)."""
from __future__ import annotations

import contextlib
import http.client
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from doubles import MIB, Rig, free_port, poll
from tests.test_api_metrics import GRAFANA, LINT, ZABBIX, samples

TEXT = "text/plain; charset=utf-8"


@pytest.fixture
def serve(rig: Rig) -> Callable[..., int]:
    """serve(config, **server) -> port of the metrics of a new proxy."""
    def begin(config: dict[str, Any] | None = None, **server: Any) -> int:
        port = free_port()
        config = dict(config or {})
        rig.proxy({**config, "server": dict(config.pop("server", {})) | {"metrics_port": port} | server}).wait_log("Metrics endpoint")
        return port
    return begin


def fetch(port: int, path: str = "/metrics", method: str = "GET", host: str = "127.0.0.1") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.request(method, path)
    answer = connection.getresponse()
    found = answer.status, answer.headers["Content-Type"], answer.read().decode()
    connection.close()
    return found


def test_values_follow_a_session(serve: Callable[..., int], rig: Rig) -> None:
    port = serve({"access": {"user_max_unique_ips": {"alice": 4}}})
    before = samples(fetch(port)[2])
    assert not [key for key in before if key.startswith("telemt_user_connections_total")]
    session = rig.client("alice")
    session.download(MIB)
    session.upload(MIB)
    now = samples(fetch(port)[2])
    assert int(now["telemt_connections_total"]) == int(before["telemt_connections_total"]) + 1
    assert now['telemt_user_connections_total{user="alice"}'] == now['telemt_user_connections_current{user="alice"}'] == "1"
    assert int(now['telemt_user_octets_to_client{user="alice"}']) >= MIB <= int(now['telemt_user_octets_from_client{user="alice"}'])
    assert int(now['telemt_user_msgs_to_client{user="alice"}']) >= MIB // 8192
    assert now['telemt_user_unique_ips_current{user="alice"}'] == "1"
    assert now['telemt_user_unique_ips_utilization{user="alice"}'] == "0.250000"
    session.close()
    poll(lambda: samples(fetch(port)[2])['telemt_user_connections_current{user="alice"}'] == "0", "the session has ended")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed")
def test_promtool_and_the_consumers_read_the_page(serve: Callable[..., int], rig: Rig) -> None:
    port = serve({"access": {"users": {'we"ird\\ name\n': "ab" * 16}, "user_max_unique_ips": {'we"ird\\ name\n': 1}}})
    session = rig.client("alice")
    session.req_pq()
    status, kind, page = fetch(port)
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    run = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode in (0, 3) and [line for line in run.stderr.splitlines() if line and not LINT.fullmatch(line)] == []
    found = samples(page)
    assert {name for name in GRAFANA if f"telemt_{name}" not in found and f'telemt_{name}{{user="alice"}}' not in found} == set()
    assert {name for name in ZABBIX if f"telemt_{name}" not in found} == set()


def test_paths_and_methods(serve: Callable[..., int]) -> None:
    port = serve()
    assert fetch(port, "/metrics?x=1")[0] == 200
    assert fetch(port, "/beobachten") == (200, TEXT, "beobachten disabled\n")            # the rig's configuration says so
    assert fetch(port, "/nothing") == (404, TEXT, "Not Found\n")
    assert fetch(port, "/metrics", "HEAD")[0::2] == (200, "")
    assert fetch(port, "/metrics", "POST")[0] == 405


def test_beobachten_shows_a_stranger(serve: Callable[..., int], rig: Rig) -> None:
    port = serve({"general": {"beobachten": True}, "timeouts": {"client_handshake": 5}})
    assert fetch(port, "/beobachten") == (200, TEXT, "empty\n")
    with socket.create_connection(("127.0.0.1", rig.proxies[-1].port), timeout=20) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    poll(lambda: fetch(port, "/beobachten")[2] == "[HTTP]\n127.0.0.1-1\n", "the stranger is listed", 20)


def test_others_are_closed_without_a_byte(serve: Callable[..., int]) -> None:
    port = serve(metrics_whitelist=["10.0.0.0/8"])
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        assert sock.recv(10) == b""


def test_loopback_only_where_only_loopback_may_read(serve: Callable[..., int], rig: Rig) -> None:
    port = serve()
    assert rig.proxies[-1].log(rf"Metrics endpoint: http://127\.0\.0\.1:{port}/metrics and /beobachten$")
    rows = Path(f"/proc/{rig.proxies[-1].pid}/net/tcp").read_text(encoding="ascii")
    assert re.search(rf"0100007F:{port:04X} 00000000:0000 0A", rows) and not re.search(rf" 00000000:{port:04X} ", rows)


def test_metrics_listen_suffices_alone(rig: Rig) -> None:
    port = free_port()
    rig.proxy({"server": {"metrics_listen": f"127.0.0.1:{port}"}}).wait_log("Metrics endpoint")
    assert fetch(port)[0] == 200


def test_a_taken_port_costs_the_metrics_only(rig: Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        rig.proxy({"server": {"metrics_listen": f"127.0.0.1:{port}"}}).wait_log(rf"Failed to bind metrics on 127\.0\.0\.1:{port}")
        rig.client("alice").req_pq()


def test_at_most_32_connections(serve: Callable[..., int]) -> None:
    port = serve()
    socks = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(32)]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        assert sock.recv(10) == b""
    for sock in socks:
        sock.close()

    def served() -> bool:
        with contextlib.suppress(ConnectionError):
            return fetch(port)[0] == 200
        return False
    poll(served, "their places are free again")


def test_a_closed_gate_stands_still_and_user_series_go(serve: Callable[..., int], rig: Rig) -> None:
    port = serve({"general": {"telemetry": {"core_enabled": False, "user_enabled": False, "me_level": "silent"}}})
    rig.client("alice").download(MIB // 4)
    found = samples(fetch(port)[2])
    assert found["telemt_connections_total"] == "0" and found["telemt_telemetry_user_series_suppressed"] == "1"
    assert not [key for key in found if 'user="' in key]
    assert found['telemt_telemetry_me_level{level="silent"}'] == "1"
