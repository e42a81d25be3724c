"""The release note of telemt 3.2.0 (api.md 18): one test per statement, named after it, against the running program."""
from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import telemt_api as api
from doubles import MIB, Rig, free_port, poll
from tests.api_client import ApiClient
from tests.test_api_views import example

Start = Callable[..., ApiClient]
NOWHERE = {"proxy_secret_url": "http://127.0.0.1:9/", "proxy_config_v4_url": "http://127.0.0.1:9/", "proxy_config_v6_url": "http://127.0.0.1:9/"}


@pytest.fixture
def start(rig: Rig) -> Iterator[Start]:
    """start(config, **server_api) -> a client of a new proxy with the API on."""
    clients: list[ApiClient] = []

    def begin(config: dict[str, Any] | None = None, client: dict[str, str] | None = None, table: str = "api", **keys: Any) -> ApiClient:
        port = free_port()
        config = dict(config or {})
        server = dict(config.pop("server", {})) | {table: {"enabled": True, "listen": f"127.0.0.1:{port}", **keys}}
        rig.proxy({**config, "server": server}).wait_log("API endpoint")
        clients.append(ApiClient(port, **(client or {})))
        return clients[-1]

    yield begin
    for client in clients:
        client.close()


def config_of(rig: Rig) -> Path:
    return rig.proxies[-1].config


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- "production-grade HTTP API ... data plane fully isolated from the control plane" ------------------------------------------------

def test_the_data_plane_is_isolated_a_session_does_not_notice_a_busy_api(start: Start, rig: Rig) -> None:
    client = start(minimal_runtime_enabled=True)
    session = rig.client("alice")
    session.req_pq()
    stop = threading.Event()

    def panel() -> None:
        while not stop.is_set():
            for path in ("/v1/stats/zero/all", "/v1/users", "/v1/stats/minimal/all"):
                client.get(path)
    thread = threading.Thread(target=panel)
    thread.start()
    session.both_ways(8 * MIB)
    stop.set()
    thread.join()


def test_runtime_visibility_counters_move_with_a_session(start: Start, rig: Rig) -> None:
    client = start()
    before = client.get("/v1/stats/zero/all")
    session = rig.client("alice")
    session.req_pq()
    after = client.get("/v1/stats/zero/all")
    assert after["core"]["connections_total"] == before["core"]["connections_total"] + 1
    assert after["upstream"]["connect_success_total"] == before["upstream"]["connect_success_total"] + 1
    assert after["upstream"]["connect_attempts_bucket_1"] == before["upstream"]["connect_attempts_bucket_1"] + 1
    assert client.get("/v1/users/alice")["current_connections"] == 1


# -- "HTTP/1.1 JSON API /v1; strict request/response envelopes; If-Match with config SHA-256; atomic mutations; read_only" -------------

def test_http_1_1_json_with_strict_envelopes(start: Start) -> None:
    client = start()
    good, bad = client.call("GET", "/v1/health"), client.call("GET", "/v1/nothing")
    assert list(good.body) == ["ok", "data", "revision"] and list(bad.body) == ["ok", "error", "request_id"]


def test_optimistic_concurrency_by_if_match_and_the_sha_256_of_the_config(start: Start, rig: Rig) -> None:
    client = start()
    revision = client.call("GET", "/v1/health").body["revision"]
    assert revision == sha(config_of(rig))
    first = client.call("PATCH", "/v1/users/alice", {"max_tcp_conns": 5}, If_Match=revision)
    assert first.status == 200 and first.body["revision"] == sha(config_of(rig)) != revision
    second = client.call("PATCH", "/v1/users/alice", {"max_tcp_conns": 6}, If_Match=revision)
    assert second.error == (409, "revision_conflict", "Config revision mismatch")
    assert client.get("/v1/users/alice")["max_tcp_conns"] == 5


def test_mutations_are_atomic_a_reader_of_the_file_never_sees_half_of_one(start: Start, rig: Rig) -> None:
    import tomllib
    client = start()
    path, stop = config_of(rig), threading.Event()
    seen: set[int] = set()

    def read() -> None:
        while not stop.is_set():
            found = tomllib.loads(path.read_text(encoding="utf-8"))
            seen.add(found.get("access", {}).get("user_max_tcp_conns", {}).get("alice", 0))
    thread = threading.Thread(target=read)
    thread.start()
    for number in range(1, 31):
        assert client.call("PATCH", "/v1/users/alice", {"max_tcp_conns": number}).status == 200
    stop.set()
    thread.join()
    assert len(seen) > 1 and not list(path.parent.glob(".config.toml.tmp-*"))


def test_read_only_mode_refuses_every_mutation(start: Start, rig: Rig) -> None:
    client = start(read_only=True)
    before = sha(config_of(rig))
    for route in api.ROUTES:
        if route.action:
            reply = client.call(route.method, route.path.replace("{username}", "alice"), {})
            assert reply.error == (403, "read_only", "API runs in read-only mode")
    assert sha(config_of(rig)) == before and client.get("/v1/health") == {"status": "ok", "read_only": True}


# -- "zero/all: atomic counter export, no hot-path impact, no locks; ... safe in production" -----------------------------------------

def test_zero_all_has_core_upstream_middle_proxy_pool_and_desync(start: Start) -> None:
    found = start().get("/v1/stats/zero/all")
    wanted = example("/v1/stats/zero/all")
    assert list(found) == list(wanted)
    for section in ("core", "upstream", "middle_proxy", "pool", "desync"):
        assert [name for name in found[section] if name in wanted[section]] == list(wanted[section])


def test_zero_all_is_safe_to_poll(start: Start, rig: Rig) -> None:
    """It reads plain integers in the thread of the connection; that the loop is not asked: test_zero_all_does_not_touch_the_loop."""
    client = start(minimal_runtime_enabled=True)
    session = rig.client("alice")
    session.req_pq()
    totals = []
    for number in range(300):
        totals.append(client.get("/v1/stats/zero/all")["core"]["connections_total"])
        if number % 30 == 0:
            rig.client("bob").req_pq()
    assert totals == sorted(totals) and totals[-1] == 11


# -- "minimal/all: disabled by default; writers, coverage, generations, floor policy, reconnect, quarantine, path; TTL cache" ---------

def test_minimal_all_is_off_by_default(start: Start) -> None:
    found = start().get("/v1/stats/minimal/all")
    assert (found["enabled"], found["reason"], list(found)) == (False, "feature_disabled", ["enabled", "reason", "generated_at_epoch_secs"])


def test_minimal_all_names_the_network_path_and_what_there_is_of_the_pool(start: Start) -> None:
    found = start(minimal_runtime_enabled=True).get("/v1/stats/minimal/all")
    assert found["enabled"] is True and found["reason"] == "source_unavailable"          # direct mode: there is no pool
    assert list(found["data"]) == ["me_writers", "dcs", "network_path"]
    assert [row["dc"] for row in found["data"]["network_path"]] == [1, 2, 3, 4, 5]
    assert found["data"]["network_path"][1]["selected_addr_v4"] == "149.154.167.51:443"


def test_upstreams_of_3_2_1_with_their_health(start: Start) -> None:
    found = start(minimal_runtime_enabled=True).get("/v1/stats/upstreams")
    assert found["enabled"] is True and found["summary"]["configured_total"] == len(found["upstreams"]) == 1
    assert found["upstreams"][0]["route_kind"] == "direct" and len(found["upstreams"][0]["dc"]) == 5


# -- "if disabled: 200, enabled=false, stable JSON" ----------------------------------------------------------------------------------

@pytest.mark.parametrize("path", ["/v1/stats/minimal/all", "/v1/stats/me-writers", "/v1/stats/dcs", "/v1/stats/upstreams"])
def test_a_disabled_view_is_200_with_a_stable_body(start: Start, path: str) -> None:
    client = start()
    first, second = client.get(path), client.get(path)
    stamp = {"generated_at_epoch_secs": 0}
    assert first | stamp == second | stamp and first["reason"] == "feature_disabled"
    if path != "/v1/stats/upstreams":
        assert first | stamp == example(path, "feature_disabled") | stamp


# -- "me-writers and dcs: coverage_pct, available_pct; aliases respect the toggle" ----------------------------------------------------

def test_the_aliases_are_parts_of_minimal_all(start: Start) -> None:
    client = start(minimal_runtime_enabled=True, minimal_runtime_cache_ttl_ms=60_000)
    whole = client.get("/v1/stats/minimal/all")["data"]
    stamp = {"generated_at_epoch_secs": 0}
    assert client.get("/v1/stats/me-writers") | stamp == whole["me_writers"] | stamp
    assert client.get("/v1/stats/dcs") | stamp == whole["dcs"] | stamp
    assert {"coverage_pct", "available_pct"} <= set(whole["me_writers"]["summary"])


# -- "user management: create, patch, rotate, delete (last user protected); runtime stats; tg://proxy links" ---------------------------

def test_a_created_user_connects_before_anybody_waits(start: Start, rig: Rig) -> None:
    client = start()
    secret = bytes(range(16, 32))
    reply = client.call("POST", "/v1/users", {"username": "carol", "secret": secret.hex()})
    assert reply.status == 201
    session = rig.client("alice", secret=secret)
    session.req_pq()
    assert client.get("/v1/users/carol")["current_connections"] == 1
    links = reply.data["user"]["links"]
    assert re.fullmatch(r"tg://proxy\?server=127\.0\.0\.1&port=\d+&secret=ee" + secret.hex() + b"example.com".hex(), links["tls"][0])
    assert links["secure"] and links["classic"]


@pytest.mark.parametrize("way", ["rotate-secret", "disable", "delete"])
def test_rotate_disable_and_delete_end_the_sessions_of_the_user(start: Start, rig: Rig, way: str) -> None:
    client = start()
    session = rig.client("alice")
    session.req_pq()
    reply = client.call("DELETE", "/v1/users/alice") if way == "delete" else client.call("POST", f"/v1/users/alice/{way}")
    assert reply.status == 200
    session.expect_closed()


def test_a_patched_limit_holds_for_the_next_connection(start: Start, rig: Rig) -> None:
    client = start()
    assert client.call("PATCH", "/v1/users/bob", {"max_tcp_conns": 0}).status == 200
    refused = rig.dial("bob")
    with contextlib.suppress(AssertionError, OSError):
        refused.start()
    refused.expect_closed()
    assert client.call("PATCH", "/v1/users/bob", {"max_tcp_conns": None}).data["max_tcp_conns"] is None
    rig.client("bob").req_pq()


def test_the_last_user_is_protected(start: Start) -> None:
    client = start()
    names = [user["username"] for user in client.get("/v1/users")]
    replies = [client.call("DELETE", f"/v1/users/{name}") for name in names]
    assert [reply.status for reply in replies] == [200] * (len(names) - 1) + [409]
    assert replies[-1].error == (409, "last_user_forbidden", "Cannot delete the last configured user")


# -- "mutations validate before writing, persist atomically, return the revision" -------------------------------------------------------

def test_a_mutation_that_would_break_the_config_changes_nothing(start: Start, rig: Rig) -> None:
    client = start()
    before = config_of(rig).read_bytes()
    for body in ({"secret": "x"}, {"user_ad_tag": "x"}, {"expiration_rfc3339": "2026-02-30T00:00:00Z"}, {"max_tcp_conns": -1}):
        assert client.call("PATCH", "/v1/users/alice", body).status == 400
    assert config_of(rig).read_bytes() == before


def test_a_mutation_keeps_comments_order_mode_and_every_other_byte(start: Start, rig: Rig) -> None:
    client = start()
    path = config_of(rig)
    text = "# first line\n" + path.read_text(encoding="utf-8").replace("[access.users]", "# who may\n[access.users]   # table")
    path.write_text(text, encoding="utf-8")
    path.chmod(0o640)
    reply = client.call("POST", "/v1/users", {"username": "carol", "secret": "ab" * 16})
    now = path.read_text(encoding="utf-8")
    assert set(text.splitlines()) - set(now.splitlines()) == set()
    assert len(now.splitlines()) == len(text.splitlines()) + 1 and "# first line" in now and "# who may" in now
    assert path.stat().st_mode & 0o777 == 0o640 and reply.body["revision"] == sha(path)


# -- "enable switch, whitelist, exact Authorization, request size limit, read_only, no TLS" ---------------------------------------------

def test_security_switches(start: Start, rig: Rig) -> None:
    client = start({}, {"Authorization": "Bearer abc"}, auth_header="Bearer abc", request_body_limit_bytes=64)
    assert client.get("/v1/security/posture")["api_auth_header_enabled"] is True
    for value in ("bearer abc", "Bearer abc2", "Basic abc"):
        refused = client.call("GET", "/v1/health", Authorization=value)
        assert refused.error == (401, "unauthorized", "Missing or invalid Authorization header")
    assert client.call("POST", "/v1/users", b" " * 65).error == (413, "payload_too_large", "Body exceeds 64 bytes")
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as sock:      # no TLS: a ClientHello is no request
        sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500) + b"\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 400 ")


def test_ipv4_clients_of_a_dual_stack_listener_pass_an_ipv4_whitelist(rig: Rig) -> None:
    port = free_port()
    try:
        socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    rig.proxy({"server": {"api": {"enabled": True, "listen": f"[::]:{port}", "whitelist": ["127.0.0.1/32"]}}}).wait_log("API endpoint")
    client = ApiClient(port)
    assert client.get("/v1/health")["status"] == "ok"
    client.close()
    connection = http.client.HTTPConnection("::1", port, timeout=20)
    connection.request("GET", "/v1/health")
    assert connection.getresponse().status == 403
    connection.close()


# -- "config authoritative, fail-fast validation, stable contracts, no automatic policy decisions, deterministic single node" -----------

def test_the_file_is_authoritative_an_edit_waiting_for_the_watcher_is_seen_by_a_mutation(start: Start, rig: Rig) -> None:
    client = start()
    path = config_of(rig)
    path.write_text(path.read_text(encoding="utf-8").replace("[access.users]", '[access.users]\ndora = "' + "cd" * 16 + '"'),
                    encoding="utf-8")
    assert client.call("PATCH", "/v1/users/alice", {"max_tcp_conns": 9}).status == 200
    assert {"dora", "alice"} <= {user["username"] for user in client.get("/v1/users")}


def test_fail_fast_a_wrong_table_of_the_api_ends_the_start(tmp_path: Path) -> None:
    from doubles import run_program
    for line, text in (('listen = "localhost:9091"', "server.api.listen must be in IP:PORT format"),
                       ("request_body_limit_bytes = 0", "server.api.request_body_limit_bytes must be > 0"),
                       ("minimal_runtime_cache_ttl_ms = 60001", "server.api.minimal_runtime_cache_ttl_ms must be within [0, 60000]")):
        (tmp_path / "c.toml").write_text(f"[server.api]\nenabled = true\n{line}\n", encoding="utf-8")
        run = run_program("c.toml", cwd=tmp_path)
        assert run.returncode == 1 and text in run.stderr


def test_no_automatic_decisions_reads_change_nothing(start: Start, rig: Rig) -> None:
    client = start(minimal_runtime_enabled=True, runtime_edge_enabled=True)
    before = config_of(rig).stat()
    for route in api.ROUTES:
        if route.method == "GET" and route.data:
            client.call("GET", route.path.replace("{username}", "alice"))
    after = config_of(rig).stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def test_deterministic_the_same_question_has_the_same_answer(start: Start) -> None:
    client = start()
    for path in ("/v1/users", "/v1/limits/effective", "/v1/security/posture", "/v1/health"):
        assert client.call("GET", path).body == client.call("GET", path).body


# -- "the eight keys; changes require a restart; prefix /v1; backward compatibility; server.admin_api" ----------------------------------

def test_a_change_of_the_api_table_waits_for_a_restart(start: Start, rig: Rig) -> None:
    client = start()
    path = config_of(rig)
    found = path.read_text(encoding="utf-8")
    path.write_text(found.replace("[server.api]\n", "[server.api]\nread_only = true\n"), encoding="utf-8")
    proxy = rig.proxies[-1]
    os.kill(proxy.pid, 1)
    proxy.wait_log(r"config reload: server\.api changed; restart required")
    assert client.get("/v1/health")["read_only"] is False


def test_the_eight_keys_with_their_defaults_and_the_alias(start: Start) -> None:
    client = start(table="admin_api", whitelist=["127.0.0.1"], auth_header="", request_body_limit_bytes=65536,
                   minimal_runtime_enabled=False, minimal_runtime_cache_ttl_ms=1000, read_only=False)
    assert client.get("/v1/health") == {"status": "ok", "read_only": False}


def test_both_names_of_the_table_in_one_file_are_refused(tmp_path: Path) -> None:
    from doubles import run_program
    both = {"server": {"api": {"enabled": True}, "admin_api": {"enabled": True}}}
    (tmp_path / "c.toml").write_text(tomli_w.dumps(both), encoding="utf-8")
    run = run_program("c.toml", cwd=tmp_path)
    assert run.returncode == 1 and "duplicate field `api`" in run.stderr


def test_a_panel_of_later_versions_finds_every_route_it_polls(start: Start) -> None:
    """What telemt_panel reads (api.md 16): an error on any of them is a red banner."""
    client = start()
    paths = """health stats/summary system/info runtime/gates users stats/upstreams stats/dcs stats/me-writers stats/zero/all
        stats/minimal/all security/posture security/whitelist limits/effective runtime/me_pool_state runtime/me_quality
        runtime/upstream_quality runtime/nat_stun runtime/me-selftest runtime/connections/summary runtime/events/recent"""
    for path in paths.split():
        client.get(f"/v1/{path}")
    info, gates = client.get("/v1/system/info"), client.get("/v1/runtime/gates")
    assert info["version"] and os.path.isabs(info["config_path"]) and ".." not in info["config_path"]
    assert (gates["startup_status"], gates["startup_progress_pct"]) == ("ready", 100.0)
    assert isinstance(client.get("/v1/security/whitelist")["entries"], list)
    assert json.dumps(client.get("/v1/limits/effective")).count("{") == 6
    poll(lambda: client.get("/v1/health/ready")["ready"], "ready", 10)
