"""The Control API of the running program against its contract: every route in every state, every error code (api.md 5, 6, 15)."""
from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import telemt_api as api
from doubles import ROOT, Proxy, Rig, free_port, poll
from fake_middle_end import MeWorld
from tests.api_client import ENVELOPE, ApiClient, Reply

Start = Callable[..., ApiClient]
READS = [route for route in api.ROUTES if route.method == "GET" and route.data]
ON = {"minimal_runtime_enabled": True, "runtime_edge_enabled": True}


@pytest.fixture
def start(rig: Rig) -> Iterator[Start]:
    """start(config, **server_api) -> a client of a new proxy with the API on."""
    clients: list[ApiClient] = []

    def begin(config: dict[str, Any] | None = None, client: dict[str, str] | None = None, **keys: Any) -> ApiClient:
        port = free_port()
        config = dict(config or {})
        server = dict(config.pop("server", {}))
        server["api"] = {"enabled": True, "listen": f"127.0.0.1:{port}", **keys}
        proxy = rig.proxy({**config, "server": server})
        proxy.wait_log(r"API endpoint: http://127\.0\.0\.1:\d+/v1/\*")
        clients.append(ApiClient(port, **(client or {})))
        return clients[-1]

    yield begin
    for client in clients:
        client.close()


def config_of(rig: Rig) -> Path:
    proxy: Proxy = rig.proxies[-1]
    return proxy.config


# -- every answer ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("keys", [{}, ON, {**ON, "minimal_runtime_cache_ttl_ms": 0}], ids=["keys off", "keys on", "no cache"])
def test_every_read_fits_both_documents(start: Start, rig: Rig, keys: dict[str, Any]) -> None:
    client = start({"access": {"user_expirations": {"alice": "2099-01-01T00:00:00Z"}, "user_data_quota": {"bob": 1 << 40},
                               "user_max_unique_ips": {"alice": 3}}}, **keys)
    talking = rig.client("alice")
    talking.req_pq()
    for route in READS:
        reply = client.call("GET", route.path.replace("{username}", "alice"))
        assert reply.status == 200, (route.path, reply.body)
        assert list(reply.body) == ["ok", "data", "revision"]
    alice = next(user for user in client.get("/v1/users") if user["username"] == "alice")
    assert (alice["current_connections"], alice["active_unique_ips_list"], alice["recent_unique_ips"]) == (1, ["127.0.0.1"], 1)
    assert alice["total_octets"] == alice["octets_from_client"] + alice["octets_to_client"] > 0
    assert client.get("/v1/stats/users/active-ips") == [{"username": "alice", "active_ips": ["127.0.0.1"]}]


def test_every_read_fits_with_the_middle_end_wanted_and_not_there(start: Start) -> None:
    client = start({"general": {"use_middle_proxy": True, "proxy_secret_url": "http://127.0.0.1:9/", "proxy_config_v4_url":
                                "http://127.0.0.1:9/", "proxy_config_v6_url": "http://127.0.0.1:9/"}}, **ON)
    for route in READS:
        client.call("GET", route.path.replace("{username}", "alice"))
    gates = client.get("/v1/runtime/gates")
    assert gates["use_middle_proxy"] and gates["me2dc_fallback_enabled"]


def test_every_read_fits_with_a_pool(start: Start, rig: Rig) -> None:
    """The middle end carries a session: writers, coverage, generations and gates in every view."""
    with MeWorld({2: 2, 4: 1}) as world:
        client = start(world.config(), **ON, minimal_runtime_cache_ttl_ms=0)
        poll(lambda: client.get("/v1/runtime/gates")["me_runtime_ready"], "the pool is ready", 30)
        session = rig.client("alice")
        session.req_pq()
        for route in READS:
            client.call("GET", route.path.replace("{username}", "alice"))
        whole = client.get("/v1/stats/minimal/all")
        assert "reason" not in whole and whole["data"]["me_runtime"]["active_generation"] >= 1
        summary = client.get("/v1/stats/me-writers")["summary"]
        assert (summary["configured_dc_groups"], summary["configured_endpoints"]) == (2, 3)
        assert [row["dc"] for row in client.get("/v1/stats/dcs")["dcs"]] == [2, 4]
        assert sum(writer["bound_clients"] for writer in client.get("/v1/stats/me-writers")["writers"]) == 1
        totals = client.get("/v1/runtime/connections/summary")["data"]["totals"]
        assert (totals["current_connections_me"], totals["current_connections_direct"]) == (1, 0)
        gates = client.get("/v1/runtime/gates")
        assert (gates["route_mode"], gates["reroute_active"], gates["startup_status"]) == ("middle", False, "ready")
        assert client.get("/v1/runtime/me_pool_state")["data"]["writers"]["total"] >= 2
        session.close()


def test_every_mutation_fits_both_documents(start: Start) -> None:
    client = start()
    created = client.call("POST", "/v1/users", {"username": "carol", "max_tcp_conns": 3, "data_quota_bytes": 5, "max_unique_ips": 2,
                                                "expiration_rfc3339": "2027-01-01T02:59:59+03:00", "user_ad_tag": "ab" * 16,
                                                "enabled": False, "unknown": [1]})
    assert created.status == 201 and created.data["user"]["expiration_rfc3339"] == "2026-12-31T23:59:59+00:00"
    assert created.data["user"]["enabled"] is False
    changed = client.call("PATCH", "/v1/users/carol", {"max_tcp_conns": None, "expiration_rfc3339": None, "enabled": None})
    assert (changed.data["max_tcp_conns"], changed.data["expiration_rfc3339"], changed.data["enabled"]) == (None, None, True)
    assert changed.data["max_unique_ips"] == 2 and changed.body["revision"] == client.call("GET", "/v1/health").body["revision"]
    for path, status in (("rotate-secret", 200), ("disable", 200), ("enable", 200), ("reset-quota", 200)):
        assert client.call("POST", f"/v1/users/carol/{path}").status == status
    assert client.call("DELETE", "/v1/users/carol").data == "carol"
    assert client.call("GET", "/v1/users/carol").status == 404


def test_changes_leave_a_trace(start: Start) -> None:
    """system/info counts what went live; the ring of events names it."""
    client = start(**ON)
    assert client.get("/v1/system/info")["config_reload_count"] == 0
    client.call("PATCH", "/v1/users/alice", {"max_tcp_conns": 9})
    client.call("PATCH", "/v1/users/nobody", {})
    info = client.get("/v1/system/info")
    assert info["config_reload_count"] == 1 and info["last_config_reload_epoch_secs"] >= info["process_started_at_epoch_secs"]
    events = [(event["event_type"], event["context"]) for event in client.get("/v1/runtime/events/recent")["data"]["events"]]
    assert ("admission.state", "accepting=true reason=start") in events
    assert ("config.reload.applied", "count=1") in events and ("api.user.patch.ok", "username=alice") in events
    assert ("api.user.patch.failed", "username=nobody code=not_found") in events


def test_the_document_is_served(start: Start) -> None:
    client = start()
    import http.client
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=20)
    connection.request("GET", "/v1/openapi.json")
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == ENVELOPE and answer.headers["Cache-Control"] == "no-store"
    from tests.api_client import OWN
    assert json.loads(answer.read()) == json.loads(json.dumps(OWN))
    connection.close()


# -- every code --------------------------------------------------------------------------------------------------------------------

JSON_TYPE = {"Content_Type": "application/json"}
ERRORS: list[tuple[str, dict[str, Any], str, str, object, dict[str, str], int, str, str]] = [
    # what, keys of [server.api], method, path, body, fields, status, code, message
    ("a peer", {"whitelist": ["10.0.0.0/8"]}, "GET", "/v1/health", None, {}, 403, "forbidden", "Source IP is not allowed"),
    ("a key", {"auth_header": "x"}, "GET", "/v1/health", None, {}, 401, "unauthorized", "Missing or invalid Authorization header"),
    ("a host", {"allowed_hosts": ["a"]}, "GET", "/v1/health", None, {"Host": "b"}, 403, "forbidden", "Host is not allowed"),
    ("a site", {}, "DELETE", "/v1/users/bob", None, {"Sec_Fetch_Site": "cross-site"}, 403, "forbidden", "Cross-site request refused"),
    ("a route", {}, "GET", "/v1/nothing", None, {}, 404, "not_found", "Route not found"),
    ("a fixed method", {}, "POST", "/v1/health", None, {}, 404, "not_found", "Route not found"),
    ("a user's method", {}, "PUT", "/v1/users/bob", None, {}, 405, "method_not_allowed", "Unsupported HTTP method for this route"),
    ("a user", {}, "GET", "/v1/users/nobody", None, {}, 404, "not_found", "User not found"),
    ("read only", {"read_only": True}, "DELETE", "/v1/users/bob", None, {}, 403, "read_only", "API runs in read-only mode"),
    ("size", {"request_body_limit_bytes": 10}, "POST", "/v1/users", b"x" * 11, {}, 413, "payload_too_large", "Body exceeds 10 bytes"),
    ("json", {}, "POST", "/v1/users", b"{", {}, 400, "bad_request", "Invalid JSON body"),
    ("no body", {}, "POST", "/v1/users", None, {}, 400, "bad_request", "Invalid JSON body"),
    ("white body", {}, "POST", "/v1/users/bob/rotate-secret", b" ", {}, 400, "bad_request", "Invalid JSON body"),
    ("name", {}, "POST", "/v1/users", {"username": ".."}, {}, 400, "bad_request", "username must match [A-Za-z0-9_.-] and be 1..64 chars"),
    ("secret", {}, "POST", "/v1/users", {"username": "x", "secret": "0"}, {}, 400, "bad_request",
     "secret must be exactly 32 hex characters"),
    ("tag", {}, "PATCH", "/v1/users/bob", {"user_ad_tag": "0"}, {}, 400, "bad_request", "user_ad_tag must be exactly 32 hex characters"),
    ("time", {}, "PATCH", "/v1/users/bob", {"expiration_rfc3339": "x"}, {}, 400, "bad_request", "expiration_rfc3339 must be valid RFC3339"),
    ("number", {}, "PATCH", "/v1/users/bob", {"max_tcp_conns": 1 << 63}, {}, 400, "bad_request",
     "max_tcp_conns must be within [0, 9223372036854775807]"),
    ("exists", {}, "POST", "/v1/users", {"username": "bob"}, {}, 409, "user_exists", "User already exists"),
    ("revision", {}, "PATCH", "/v1/users/bob", {}, {"If_Match": "*"}, 409, "revision_conflict", "Config revision mismatch"),
    ("unknown", {}, "DELETE", "/v1/users/nobody", None, {}, 404, "not_found", "User not found"),
]


@pytest.mark.parametrize("keys", [dict(found) for found in dict.fromkeys(tuple((name, str(value)) for name, value in row[1].items())
                                                                         for row in ERRORS)], ids=str)
def test_errors(start: Start, keys: dict[str, str]) -> None:
    """Every row of the table, those with the same configuration in one process; request ids count on."""
    rows = [row for row in ERRORS if {name: str(value) for name, value in row[1].items()} == keys]
    client = start(**rows[0][1])
    for number, (what, _, method, path, body, fields, status, code, message) in enumerate(rows, 1):
        reply = client.call(method, path, body, **fields)
        assert reply.error == (status, code, message), what
        assert reply.body["request_id"] == number
        assert reply.fields.get("allow") == ("GET, PATCH, DELETE" if status == 405 else None)


def test_the_last_user_and_a_file_that_cannot_be_used(start: Start, rig: Rig) -> None:
    client = start()
    users = [user["username"] for user in client.get("/v1/users")]
    for name in users[1:]:
        client.call("DELETE", f"/v1/users/{name}")
    assert client.call("DELETE", f"/v1/users/{users[0]}").error == (409, "last_user_forbidden", "Cannot delete the last configured user")
    text = config_of(rig).read_text(encoding="utf-8")
    config_of(rig).write_text(text.replace("tls = true", "tls = false").replace("secure = true", "secure = false")
                              .replace("classic = true", "classic = false"), encoding="utf-8")
    refused = client.call("PATCH", f"/v1/users/{users[0]}", {"max_tcp_conns": 9})
    assert refused.error == (400, "bad_request", "config validation failed: Config error: No modes enabled")
    config_of(rig).write_text("[broken", encoding="utf-8")
    assert client.call("GET", "/v1/health").status == 200
    failed = client.call("PATCH", f"/v1/users/{users[0]}", {"max_tcp_conns": 9})
    assert failed.error[:2] == (500, "internal_error") and failed.error[2].startswith("failed to load config: ")
    config_of(rig).unlink()
    assert client.call("GET", "/v1/health").error[2].startswith("failed to read config: ")


GATE_0: list[tuple[bytes, int, str, str]] = [
    (b"GET /\r\n\r\n", 400, "bad_request", "Malformed HTTP request"),
    (b"GET / HTTP/2.0\r\n\r\n", 505, "http_version_not_supported", "HTTP version not supported"),
    (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 414, "uri_too_long", "Request line too long"),
    (b"GET / HTTP/1.1\r\nA: " + b"a" * 40_000 + b"\r\n\r\n", 431, "headers_too_large", "Request header fields too large"),
    (b"POST /v1/users HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501, "not_implemented", "Unsupported transfer encoding"),
    (b"POST /v1/users HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400, "bad_request", "Malformed HTTP request"),
    (b"POST /v1/users HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "bad_request", "Invalid request body"),
]


def test_refusals_before_routing(start: Start) -> None:
    """Gate 0: an envelope, a request id, and the connection is closed."""
    client = start()
    for number, (raw, status, code, message) in enumerate(GATE_0, 1):
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as sock:
            sock.sendall(raw)
            found = b""
            while data := sock.recv(65536):
                found += data
        head, _, body = found.partition(b"\r\n\r\n")
        assert int(head.split()[1]) == status and b"\r\nConnection: close" in head
        assert json.loads(body) == {"ok": False, "error": {"code": code, "message": message}, "request_id": number}


HEADS = [("/v1/users/alice", 405), ("/v1/health", 404), ("/v1/users", 404), ("/nothing", 404)]


def test_head_and_options(start: Start) -> None:
    client = start()
    for path, status in HEADS:
        assert client.call("HEAD", path).status == status
        assert client.call("OPTIONS", path).status == status
    assert client.call("GET", "/v1/health").status == 200          # the connection has survived all of them


# -- what a document cannot say ----------------------------------------------------------------------------------------------------

def test_members_stand_in_the_documented_order(start: Start) -> None:
    client = start(**ON)
    for route in READS:
        reply = client.call("GET", route.path.replace("{username}", "alice"))
        schema = api.shape_schema(api.SHAPES[route.data.strip("[]")])
        data = reply.body["data"][0] if route.data.startswith("[") and reply.body["data"] else reply.body["data"]
        if isinstance(data, dict):
            assert list(data) == [name for name in schema["properties"] if name in data], route.path


def test_keys_of_the_api_are_frozen(start: Start, rig: Rig) -> None:
    client = start()
    text = config_of(rig).read_text(encoding="utf-8")
    config_of(rig).write_text(text.replace("enabled = true", 'enabled = true\nread_only = true\nauth_header = "x"', 1), encoding="utf-8")
    assert client.call("PATCH", "/v1/users/alice", {"max_tcp_conns": 7}).status == 200
    assert client.get("/v1/health") == {"status": "ok", "read_only": False}


def test_no_api_without_its_key(rig: Rig) -> None:
    port = free_port()
    proxy = rig.proxy({"server": {"api": {"enabled": False, "listen": f"127.0.0.1:{port}"}}})
    rig.client("alice").req_pq()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert not proxy.log("API endpoint")


def test_port_0_is_no_listener_and_no_error(rig: Rig) -> None:
    proxy = rig.proxy({"server": {"api": {"enabled": True, "listen": "127.0.0.1:0"}}})
    rig.client("alice").req_pq()
    assert not proxy.log("API endpoint|Failed to bind API")


def test_a_taken_port_costs_the_api_only(rig: Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        proxy = rig.proxy({"server": {"api": {"enabled": True, "listen": f"127.0.0.1:{port}"}}})
        proxy.wait_log(rf"WARN telemt::api: Failed to bind API listener addr=127\.0\.0\.1:{port} error=")
        rig.client("alice").req_pq()


def test_the_alias_of_the_table(rig: Rig) -> None:
    port = free_port()
    rig.proxy({"server": {"admin_api": {"enabled": True, "listen": f"127.0.0.1:{port}"}}}).wait_log("API endpoint")
    client = ApiClient(port)
    assert client.get("/v1/health")["status"] == "ok"
    client.close()


def test_secrets_are_not_logged_by_the_control_plane(start: Start, rig: Rig) -> None:
    client = start({"general": {"log_level": "debug"}}, {"Authorization": "Bearer 5ec5ec5ec5ec"}, auth_header="Bearer 5ec5ec5ec5ec")
    secret = client.call("POST", "/v1/users", {"username": "carol"}).data["secret"]
    client.call("GET", f"/v1/users/{secret}")
    client.call("POST", "/v1/users", b'{"secret":"' + secret.encode() + b'"')
    assert not rig.proxies[-1].log(f"5ec5ec|{secret}")


# -- schemathesis ------------------------------------------------------------------------------------------------------------------

TOOL = Path(sys.executable).with_name("schemathesis")


@pytest.mark.skipif(not TOOL.exists(), reason="schemathesis is not installed")
@pytest.mark.parametrize("keys", [ON, *[{}] * ("SCHEMATHESIS_EXAMPLES" in os.environ)], ids=str)
def test_schemathesis_finds_nothing(start: Start, rig: Rig, keys: dict[str, Any]) -> None:
    """All its checks but one: methods that are not listed answer 404 here, by contract.  SCHEMATHESIS_EXAMPLES: how many (make fuzz)."""
    client = start({}, {"Authorization": "x"}, auth_header="x", **keys)
    examples = os.environ.get("SCHEMATHESIS_EXAMPLES", "3")
    run = subprocess.run(
        [str(TOOL), "run", f"http://127.0.0.1:{client.port}/v1/openapi.json", "-H", "Authorization: x", "--checks", "all",
         "--exclude-checks", "unsupported_method", "-n", examples, "--continue-on-failure", "--warnings", "off", "--max-failures", "5"],
        cwd=rig.proxies[-1].folder, capture_output=True, text=True, check=False, timeout=1800,
        env={**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.schemathesis_hooks"})
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    found = re.search(r"Operations:\s+(\d+) selected", run.stdout)
    assert found and int(found[1]) == len(api.ROUTES) + 4 - 1, run.stdout           # and the page (4); without the document itself
    assert not rig.proxies[-1].log("internal error|Traceback")


def test_the_reply_helper_refuses_what_is_not_documented() -> None:
    """The check can fail: a member too many, a member missing, a wrong type."""
    client = ApiClient(1)
    fields = {"content-type": ENVELOPE, "cache-control": "no-store", "x-content-type-options": "nosniff", "date": "x"}
    good = {"ok": True, "data": {"status": "ok", "read_only": False}, "revision": "0" * 64}
    for change in ({}, {"data": {"status": "ok", "read_only": False, "more": 1}}, {"data": {"status": "ok"}},
                   {"data": {"status": "ok", "read_only": 0}}, {"revision": "x"}):
        body = good | change
        text = json.dumps(body, separators=(",", ":")).encode()
        reply = Reply(200, fields | {"content-length": str(len(text))}, body)
        if change:
            with pytest.raises(Exception, match=r"."):
                client.check("GET", "/v1/health", reply, text)
        else:
            client.check("GET", "/v1/health", reply, text)
