"""Room 9 of telemt_api: gates in their order, handlers on a port that answers or does not, listeners (api.md 4, 14.3, 14.4, 15)."""
from __future__ import annotations

import ipaddress
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import telemt
import telemt_api as api
from doubles import patient, poll
from telemt import Counters, Link, Log, Settings, Sources, UserTable
from telemt_api import ApiError, Cached, ControlApi, Events, Guard, MetricsSite, Whitelist
from tests.cases import settings_of
from tests.test_api_views import POOL, example

USERS = '[access.users]\nbob = "ffeeddccbbaa99887766554433221100"\nalice = "00112233445566778899aabbccddeeff"\n'


class FakePort:
    """A ControlPort without a data plane: `answers` off = the loop is stuck."""

    def __init__(self, text: str, path: Path) -> None:
        self.config_path, self.started_at, self.started_wall = str(path), time.monotonic() - 5.0, time.time() - 5.0
        self.path = path
        path.write_text(text, encoding="utf-8")
        path.chmod(0o600)
        self.settings: Settings = settings_of(text)
        self.sources, self.counters, self.log, self.version = Sources(), Counters(), Log("api"), "1.2.3"
        self.config_error = telemt.ConfigError
        self.table = UserTable()
        self.table.apply(self.settings.access)
        self.answers = True
        self.asked = 0
        self.busy_s = 0.0                        # until it comes to what it is asked

    @property
    def users(self) -> dict[str, telemt.User]:
        return self.table.users

    def ask(self, build: Callable[[], Any], timeout_s: float) -> Any:
        self.asked += 1
        if not self.answers or self.busy_s > timeout_s:
            raise TimeoutError
        return build()

    def expand(self, text: str, given: object = None) -> tuple[str, tuple[str, ...]]:
        return text, ()

    def follow(self, including: str, line: str) -> str | None:
        return None

    def parse(self, text: str) -> dict[str, Any]:
        return telemt.parse_document(text)

    def accept(self, document: dict[str, Any]) -> telemt.Loaded:
        return telemt.parse_settings(document, telemt.Draws(lambda: 2000))

    def publish(self, loaded: telemt.Loaded, files: object, timeout_s: float = 10.0) -> None:
        self.settings = loaded.settings
        self.table.apply(self.settings.access)

    def reset_quota(self, name: str, timeout_s: float = 10.0) -> int:
        self.users[name].used = 0
        return 1772611200

    def links(self, name: str) -> list[Link]:
        return telemt.user_links(self.settings, self.settings.access.users[name], "203.0.113.9", 443)


class FakeRequest:
    """What the HTTP room hands over."""

    def __init__(self, line: str, fields: dict[str, str] | list[tuple[str, str]], body: bytes, peer: str) -> None:
        section = "".join(f"{name}: {value}\r\n" for name, value in (fields.items() if isinstance(fields, dict) else fields))
        self.head = api.parse_head(api.parse_line(f"{line} HTTP/1.1".encode()), section.encode("latin-1"))
        self.peer, self._body, self.read = peer, body, False

    def body(self, limit: int) -> bytes:
        self.read = True
        if len(self._body) > limit:
            raise ApiError(413, "payload_too_large", f"Body exceeds {limit} bytes")
        return self._body


class Desk:
    """The API on a fake port."""

    def __init__(self, path: Path, text: str = "") -> None:
        self.port = FakePort(text if "[access.users]" in text else text + USERS, path)
        self.site = ControlApi(self.port, api.Store(self.port))
        self.last: FakeRequest | None = None

    def ask(self, line: str, fields: Any = (), body: bytes = b"", peer: str = "127.0.0.1") -> tuple[int, Any]:
        """(status, parsed body)."""
        self.last = FakeRequest(line, fields, body, peer)
        answer = self.site.answer(self.last)                               # type: ignore[arg-type]
        assert answer.kind == "application/json; charset=utf-8"
        assert ("Cache-Control", "no-store") in answer.fields and ("X-Content-Type-Options", "nosniff") in answer.fields
        text = b"".join(answer.pieces).decode()
        parsed = json.loads(text)
        assert "\n" not in text and json.dumps(parsed, separators=(",", ":"), ensure_ascii=False) == text
        return answer.status, parsed

    def data(self, path: str) -> Any:
        status, found = self.ask(f"GET {path}")
        assert status == 200 and found["ok"] is True and list(found) == ["ok", "data", "revision"]
        return found["data"]

    def code(self, line: str, fields: Any = (), body: bytes = b"", peer: str = "127.0.0.1") -> tuple[int, str, str]:
        status, found = self.ask(line, fields, body, peer)
        assert list(found) == ["ok", "error", "request_id"] and found["ok"] is False
        return status, found["error"]["code"], found["error"]["message"]


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "config.toml")


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Desk]:
    return lambda text: Desk(tmp_path / "config.toml", text)


# -- gates -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("networks", "peer", "admitted"), [
    ([], "203.0.113.1", True), ([], "nonsense", True), (["127.0.0.1/32"], "127.0.0.1", True), (["127.0.0.1/32"], "127.0.0.2", False),
    (["::1/128"], "::1", True), (["::1/128"], "127.0.0.1", False), (["10.0.0.0/8"], "10.255.0.1", True), (["10.0.0.0/8"], "unix", False),
    (["::ffff:127.0.0.1/128"], "127.0.0.1", True), (["::ffff:10.0.0.0/104"], "10.9.9.9", True), (["::ffff:0:0/96"], "8.8.8.8", True),
    (["::ffff:0:0/96"], "2001:db8::1", False), (["2001:db8::/32"], "2001:db8::1", True), (["0.0.0.0/0"], "8.8.8.8", True)])
def test_whitelist(networks: list[str], peer: str, admitted: bool) -> None:
    assert Whitelist(map(ipaddress.ip_network, networks)).admits(peer) is admitted


AUTH = '[server.api]\nauth_header = "Bearer abc"\n'
UNAUTHORIZED = (401, "unauthorized", "Missing or invalid Authorization header")


@pytest.mark.parametrize("fields", [
    [], [("Authorization", "")], [("Authorization", "bearer abc")], [("Authorization", "abc")], [("Authorization", "Bearer abcd")],
    [("Authorization", "Bearer  abc")], [("Authorization", "Bearer abc\xe9")], [("Authorization", "Bearer abc")] * 2])
def test_authorization_that_does_not_match(make: Callable[[str], Desk], fields: list[tuple[str, str]]) -> None:
    assert make(AUTH).code("GET /v1/health", fields) == UNAUTHORIZED


def test_authorization_that_matches(make: Callable[[str], Desk]) -> None:
    desk = make('[server.api]\nauth_header = " Bearer abc\\t"\n')
    assert desk.ask("GET /v1/health", {"authorization": "  Bearer abc "})[0] == 200


@pytest.mark.parametrize("value", [" ", "\\t", "Bearer ä"])
def test_a_value_that_cannot_be_sent_locks_the_api(make: Callable[[str], Desk], value: str) -> None:
    desk = make(f'[server.api]\nauth_header = "{value}"\n')
    for fields in ({}, {"Authorization": ""}, {"Authorization": value}):
        assert desk.code("GET /v1/health", {name: text.encode().decode("latin-1") for name, text in fields.items()}) == UNAUTHORIZED


def test_authorization_is_compared_in_constant_time(make: Callable[[str], Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    monkeypatch.setattr(api.hmac, "compare_digest", lambda a, b: bool(compared.append((a, b)) or a == b))
    assert make(AUTH).ask("GET /v1/health", {"Authorization": "Bearer abc"})[0] == 200
    assert compared == [(b"Bearer abc", b"Bearer abc")]


CROSS = (403, "forbidden", "Cross-site request refused")
JSON = ("Content-Type", "application/json")
FORM = ("Content-Type", "application/x-www-form-urlencoded")
ORIGIN = ("Origin", "http://evil.example")


@pytest.mark.parametrize(("line", "fields", "refused"), [
    ("POST /v1/users", [("Sec-Fetch-Site", "cross-site"), JSON], True), ("POST /v1/users", [("Sec-Fetch-Site", "Same-Site"), JSON], True),
    ("DELETE /v1/users/bob", [("Sec-Fetch-Site", "cross-site")], True), ("PATCH /v1/users/bob", [ORIGIN, FORM], True),
    ("POST /v1/users", [ORIGIN], True), ("POST /v1/users/bob/rotate-secret", [ORIGIN, ("Content-Type", "text/plain")], True),
    ("POST /v1/users", [ORIGIN, JSON, FORM], True), ("POST /v1/nothing", [ORIGIN], True),
    ("POST /v1/users", [ORIGIN, ("Content-Type", "Application/JSON; charset=utf-8")], False),
    ("POST /v1/users", [("Sec-Fetch-Site", "same-origin"), FORM], False), ("POST /v1/users", [("Sec-Fetch-Site", "none")], False),
    ("DELETE /v1/users/nobody", [ORIGIN], False), ("POST /v1/users", [FORM], False), ("GET /v1/health", [ORIGIN], False),
    ("GET /v1/health", [("Sec-Fetch-Site", "cross-site")], False)])
def test_browser_guard(desk: Desk, line: str, fields: list[tuple[str, str]], refused: bool) -> None:
    status, found = desk.ask(line, fields)
    assert (status == 403 and found["error"]["message"] == CROSS[2]) is refused


@pytest.mark.parametrize(("host", "admitted"), [
    ("panel.example", True), ("PANEL.example:9091", True), ("localhost:9091", True), ("127.0.0.1:9091", True), ("[::1]:9091", True),
    ("[::1]", True), ("203.0.113.1", True), ("evil.example", False), ("panel.example.evil.example:9091", False), ("", False),
    ("localhost.evil.example", False), (None, True)])
def test_host_guard(make: Callable[[str], Desk], host: str | None, admitted: bool) -> None:
    desk = make('[server.api]\nallowed_hosts = ["Panel.example"]\n')
    status, found = desk.ask("GET /v1/health", {} if host is None else {"Host": host})
    assert (status == 200) is admitted
    if not admitted:
        assert found["error"] == {"code": "forbidden", "message": "Host is not allowed"}


def test_any_host_without_the_guard(desk: Desk) -> None:
    assert desk.ask("GET /v1/health", {"Host": "evil.example"})[0] == 200


def test_gates_stand_in_their_order(make: Callable[[str], Desk]) -> None:
    """Each request breaks one gate less than the one before; the first broken gate answers."""
    desk = make('[server.api]\nauth_header = "x"\nread_only = true\nallowed_hosts = ["a.example"]\nrequest_body_limit_bytes = 10\n')
    auth, host, site = ("Authorization", "x"), ("Host", "b.example"), ("Sec-Fetch-Site", "cross-site")
    big = b"x" * 11
    assert desk.code("POST /v1/nothing", [host, site], big, "203.0.113.1") == (403, "forbidden", "Source IP is not allowed")
    assert desk.code("POST /v1/nothing", [host, site], big) == UNAUTHORIZED
    assert desk.code("POST /v1/nothing", [auth, host, site], big) == (403, "forbidden", "Host is not allowed")
    assert desk.code("POST /v1/nothing", [auth, site], big) == CROSS
    assert desk.code("POST /v1/nothing", [auth], big) == (404, "not_found", "Route not found")
    assert desk.code("PUT /v1/users/bob", [auth], big)[0] == 405
    assert desk.code("POST /v1/users", [auth], big) == (403, "read_only", "API runs in read-only mode")
    assert desk.last is not None and not desk.last.read
    desk = make('[server.api]\nrequest_body_limit_bytes = 40\n')
    stale = {"If-Match": "0" * 64}
    assert desk.code("POST /v1/users", stale, b"x" * 41) == (413, "payload_too_large", "Body exceeds 40 bytes")
    assert desk.code("POST /v1/users", stale, b"x") == (400, "bad_request", "Invalid JSON body")
    assert desk.code("POST /v1/users", stale, b'{"username":"a b"}')[1] == "bad_request"
    assert desk.code("POST /v1/users", stale, b'{"username":"bob"}') == (409, "revision_conflict", "Config revision mismatch")
    assert desk.code("POST /v1/users", {}, b'{"username":"bob"}') == (409, "user_exists", "User already exists")
    desk.port.path.unlink()
    assert desk.code("POST /v1/users", stale, b'{"username":"bob"}')[:2] == (500, "internal_error")


def test_405_names_what_is_allowed(desk: Desk) -> None:
    answer = desk.site.answer(FakeRequest("PUT /v1/users/bob", {}, b"", "127.0.0.1"))       # type: ignore[arg-type]
    assert ("Allow", "GET, PATCH, DELETE") in answer.fields


def test_a_stranger_keeps_no_connection(desk: Desk) -> None:
    assert desk.site.answer(FakeRequest("GET /", {}, b"", "203.0.113.1")).close             # type: ignore[arg-type]


def test_request_ids_count_every_request(desk: Desk) -> None:
    assert desk.ask("GET /nothing")[1]["request_id"] == 1
    desk.data("/v1/health")
    desk.site.refuse(ApiError(400, "bad_request", "Malformed HTTP request"), "")
    assert desk.ask("GET /nothing")[1]["request_id"] == 4


def test_our_own_fault_is_500_without_its_text(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(type(desk.port.log), "error", lambda self, text, *args, **fields: logged.append(text % args))
    monkeypatch.setattr(desk.site.desk, "get_health", lambda: 1 // 0)
    assert desk.code("GET /v1/health") == (500, "internal_error", "internal error")
    assert "ZeroDivisionError" in logged[0]


def test_reads_need_the_file_and_mutations_a_right_one(desk: Desk) -> None:
    desk.port.path.write_text("[broken", encoding="utf-8")
    assert desk.data("/v1/health") == {"status": "ok", "read_only": False}
    status, code, message = desk.code("PATCH /v1/users/bob", {}, b"{}")
    assert (status, code) == (500, "internal_error") and message.startswith("failed to load config: ")
    desk.port.path.unlink()
    assert desk.code("GET /v1/health")[2].startswith("failed to read config: ")
    assert desk.ask("GET /v1/openapi.json")[0] == 200


# -- reads -------------------------------------------------------------------------------------------------------------------------

def test_every_read_answers(desk: Desk) -> None:
    for route in api.ROUTES:
        if route.method == "GET" and route.data:
            assert desk.ask(f"GET {route.path.replace('{username}', 'bob')}")[0] == (503 if route.name == "get_ready" else 200)


def test_users_are_sorted_and_both_lists_are_the_same(desk: Desk) -> None:
    found = desk.data("/v1/users")
    assert [user["username"] for user in found] == ["alice", "bob"]
    assert desk.data("/v1/stats/users") == found and desk.data("/v1/users/bob") == found[1]
    assert found[0]["links"]["tls"] == [
        "tg://proxy?server=203.0.113.9&port=443&secret=ee00112233445566778899aabbccddeeff" + b"petrovich.ru".hex()]


def test_rows_that_are_kept_follow_numbers_addresses_and_detected_hosts(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of idle users costs little; nothing of that may be seen in the answers."""
    before = desk.data("/v1/users")
    assert desk.data("/v1/users") == before
    alice = desk.port.users["alice"]
    alice.stats.octets_to_client = alice.used = 7
    changed = desk.data("/v1/users")
    assert (changed[0]["total_octets"], changed[0]["quota_used_bytes"], changed[1]) == (7, 7, before[1])
    alice.ips = {"10.0.0.1": 1}
    assert desk.data("/v1/users")[0]["active_unique_ips_list"] == ["10.0.0.1"]
    alice.ips = {}
    assert desk.data("/v1/users") == changed
    monkeypatch.setattr(desk.port, "links", lambda name: telemt.user_links(desk.port.settings, "0" * 32, "198.51.100.1", 443))
    assert "server=198.51.100.1&" in desk.data("/v1/users/alice")["links"]["tls"][0]       # detected after the first answer
    assert all("server=198.51.100.1&" in user["links"]["tls"][0] for user in desk.data("/v1/users"))


def test_qr_codes(make: Callable[[str], Desk]) -> None:
    desk = make('[general.modes]\nclassic = true\n[censorship]\ntls_domain = "a.example"\ntls_domains = ["b.example", "c.example"]\n')
    links = desk.data("/v1/users/bob")["links"]
    for query, link in (("", links["tls"][0]), ("?index=2", links["tls"][2]),
                        ("?kind=tls_domains&index=1", links["tls_domains"][1]["link"]),
                        ("?kind=classic", links["classic"][0])):
        status, found = desk.ask(f"GET /v1/users/bob/qr{query}")
        data = found["data"]
        assert status == 200 and list(data) == ["kind", "index", "link", "version", "rows"]
        assert data["link"] == link and data["rows"] == api.make_qr(link).rows and len(data["rows"]) == 17 + 4 * data["version"]
    assert "c.example" not in links["tls"][2] and b"c.example".hex() in links["tls"][2]
    for query in ("?index=3", "?kind=secure", "?kind=tls_domains&index=2"):
        assert desk.code(f"GET /v1/users/bob/qr{query}") == (404, "not_found", "Link not found")
    assert desk.code("GET /v1/users/nobody/qr") == (404, "not_found", "User not found")
    assert desk.code("GET /v1/users/nobody/qr?kind=x")[0] == 400
    assert desk.code("POST /v1/users/bob/qr") == (404, "not_found", "Route not found")


def test_a_link_too_long_for_a_symbol(make: Callable[[str], Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    desk = make("")
    monkeypatch.setattr(desk.port, "links", lambda name: [Link("EE-TLS", "x" * 2332, "tls", "h", "petrovich.ru")])
    assert desk.code("GET /v1/users/bob/qr") == (404, "not_found", "Link not found")


def test_a_page_is_shown_without_the_key(make: Callable[[str], Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    """The page exception of api.md 4: gates 2 and the host half of 4 hold, gate 3 does not; any other method meets all of them."""
    keys = '[server.api]\nauth_header = "x"\nallowed_hosts = ["a"]\n'
    monkeypatch.setattr(api, "page_answer", lambda head: api.Answer(
        200, "application/json; charset=utf-8", [b"{}"], api._FIELDS) if head.target in ("/", "/ui") else None)
    desk = make(keys)
    assert desk.ask("GET /")[0] == desk.ask("HEAD /ui")[0] == 200
    assert desk.code("GET /", {}, b"", "203.0.113.1")[0] == 403
    assert desk.code("GET /", {"Host": "b"}) == (403, "forbidden", "Host is not allowed")
    assert desk.code("POST /") == desk.code("GET /v1/health") == UNAUTHORIZED
    assert make(keys + "ui = false\n").code("GET /") == UNAUTHORIZED


def test_system_info(desk: Desk) -> None:
    found = desk.data("/v1/system/info")
    assert found["version"] == "1.2.3" and found["config_path"] == str(desk.port.path) and found["target_os"] == "linux"
    assert found["config_hash"] == desk.ask("GET /v1/health")[1]["revision"]
    assert found["config_reload_count"] == 0 and "last_config_reload_epoch_secs" not in found
    desk.port.sources.reloaded(1772611200.5)
    found = desk.data("/v1/system/info")
    assert (found["config_reload_count"], found["last_config_reload_epoch_secs"]) == (1, 1772611200)


def test_zero_all_does_not_touch_the_loop(make: Callable[[str], Desk]) -> None:
    desk = make("[server.api]\nminimal_runtime_enabled = true\nruntime_edge_enabled = true\n")
    desk.port.answers = False
    for path in ("/v1/stats/zero/all", "/v1/stats/summary", "/v1/health", "/v1/users", "/v1/users/bob", "/v1/stats/users/quota"):
        desk.data(path)
    assert desk.port.asked == 0


GATED = ("stats/upstreams", "stats/minimal/all", "stats/me-writers", "stats/dcs", "runtime/me_pool_state", "runtime/me_quality",
         "runtime/upstream_quality", "runtime/nat_stun", "runtime/me-selftest", "runtime/connections/summary", "runtime/events/recent")
KEYS_OFF = "[general]\nuse_middle_proxy = true\n"
KEYS_ON = KEYS_OFF + "[server.api]\nminimal_runtime_enabled = true\nruntime_edge_enabled = true\nminimal_runtime_cache_ttl_ms = 0\n"


def states(desk: Desk) -> dict[str, tuple[Any, Any, bool]]:
    """route -> (enabled, reason, has data)."""
    found = {}
    for path in GATED:
        data = desk.data(f"/v1/{path}")
        enabled = data["enabled"] if "enabled" in data else data["middle_proxy_enabled"]
        found[path] = (enabled, data.get("reason"), "data" in data or ("summary" in data and path != "stats/me-writers"))
    return found


def test_states_with_the_keys_off(make: Callable[[str], Desk]) -> None:
    """api.md 15.2, third column."""
    desk = make(KEYS_OFF)
    desk.port.sources.pool = lambda: POOL
    off = (False, "feature_disabled", False)
    assert states(desk) == dict.fromkeys(GATED, off) | {"runtime/me-selftest": (False, "source_unavailable", False)}
    assert desk.port.asked == 0


def test_states_without_a_snapshot(make: Callable[[str], Desk]) -> None:
    """api.md 15.2, last column, *no snapshot*."""
    desk = make(KEYS_ON)
    desk.port.sources.pool, desk.port.answers = (lambda: POOL), False
    desk.port.sources.upstreams = list
    gone = (False, "source_unavailable", False)
    assert states(desk) == dict.fromkeys(GATED, gone) | {
        "stats/upstreams": (True, "source_unavailable", False), "stats/minimal/all": (True, "source_unavailable", True),
        "runtime/connections/summary": (True, "source_unavailable", False), "runtime/events/recent": (True, None, True)}
    assert desk.data("/v1/stats/minimal/all")["data"]["network_path"] == []


def test_states_in_direct_mode(make: Callable[[str], Desk]) -> None:
    """api.md 15.2, last column, *no pool*."""
    desk = make(KEYS_ON.replace("use_middle_proxy = true", "use_middle_proxy = false"))
    rows = example("/v1/stats/upstreams", "available")["upstreams"]
    path = example("/v1/stats/minimal/all", "available")["data"]["network_path"]
    desk.port.sources.upstreams, desk.port.sources.path = (lambda: rows), (lambda: path)
    gone = (False, "source_unavailable", False)
    assert states(desk) == dict.fromkeys(GATED, gone) | {
        "stats/upstreams": (True, None, True), "runtime/upstream_quality": (True, None, True),
        "stats/minimal/all": (True, "source_unavailable", True),
        "runtime/connections/summary": (True, None, True), "runtime/events/recent": (True, None, True)}
    assert desk.data("/v1/stats/minimal/all")["data"]["network_path"] == path


def test_states_with_everything(make: Callable[[str], Desk]) -> None:
    desk = make(KEYS_ON)
    rows = example("/v1/stats/upstreams", "available")["upstreams"]
    sources = desk.port.sources
    sources.pool, sources.upstreams, sources.path = (lambda: POOL), (lambda: rows), list
    sources.nat = lambda: {"flags": {}, "servers": {}, "reflection": {}}
    found = states(desk)
    assert found.pop("runtime/me-selftest") == (False, "source_unavailable", False)
    assert {state[:2] for state in found.values()} == {(True, None)}
    assert desk.data("/v1/stats/dcs")["dcs"][1]["dc"] == 203
    assert desk.data("/v1/runtime/connections/summary")["data"]["totals"]["current_connections_me"] == 12


def test_a_stale_summary_of_connections_is_better_than_none(make: Callable[[str], Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    """api.md 15.2: unavailable only when nothing was cached; the age of a cached one is told by its time stamp."""
    desk = make(KEYS_ON.replace("[server.api]", "[server.api]\nruntime_edge_cache_ttl_ms = 0"))
    desk.port.sources.pool, desk.port.answers = (lambda: POOL), False
    assert desk.data("/v1/runtime/connections/summary")["reason"] == "source_unavailable"
    desk.port.answers = True
    first = desk.data("/v1/runtime/connections/summary")
    assert first["data"]["cache"] == {"ttl_ms": 0, "served_from_cache": False, "stale_cache_used": False}
    desk.port.answers = False
    monkeypatch.setattr(time, "time", lambda: first["generated_at_epoch_secs"] + 60.0)
    stale = desk.data("/v1/runtime/connections/summary")
    assert stale["data"]["cache"] == {"ttl_ms": 0, "served_from_cache": True, "stale_cache_used": True}
    assert stale["generated_at_epoch_secs"] == first["generated_at_epoch_secs"] and stale["data"]["totals"] == first["data"]["totals"]


def test_gates_remember_the_last_route(make: Callable[[str], Desk]) -> None:
    desk = make("[general]\nuse_middle_proxy = true\nauto_degradation_enabled = false\n")
    desk.port.sources.admit(True, "")
    desk.port.sources.stage = "ready"
    desk.port.sources.route, desk.port.answers = (lambda: telemt.RouteSnapshot(True, True, 0, True, (), 0)), False
    before = desk.data("/v1/runtime/gates")
    assert (before["me_runtime_ready"], before["startup_status"]) == (False, "initializing")
    desk.port.answers = True
    assert desk.data("/v1/runtime/gates")["startup_status"] == "ready"
    desk.port.answers = False
    assert desk.data("/v1/runtime/gates")["startup_status"] == "ready"


@pytest.mark.parametrize(("accepting", "healthy", "status"), [(True, True, 200), (True, False, 503), (False, True, 503)])
def test_ready_is_503_with_a_success_envelope(desk: Desk, accepting: bool, healthy: bool, status: int) -> None:
    rows = [{"healthy": healthy, "route_kind": "direct"}]
    desk.port.sources.accepting, desk.port.sources.upstreams = accepting, lambda: rows        # type: ignore[assignment, return-value]
    found, body = desk.ask("GET /v1/health/ready")
    assert (found, body["ok"], body["data"]["ready"]) == (status, True, status == 200)


def test_a_busy_moment_is_not_unready_and_a_long_one_is(make: Callable[[str], Desk]) -> None:
    """Half a second without an answer was `no_healthy_upstreams` once: a balancer would have sent the clients elsewhere."""
    desk, rows = make("[server.api]\nminimal_runtime_enabled = true\n"), [{"healthy": True, "route_kind": "direct"}]
    desk.port.sources.accepting, desk.port.sources.upstreams = True, lambda: rows        # type: ignore[assignment, return-value]
    desk.port.busy_s = 2.0
    assert desk.ask("GET /v1/health/ready")[0] == 200
    assert desk.data("/v1/runtime/upstream_quality")["reason"] == "source_unavailable"           # a table is not waited for
    desk.port.busy_s = 4.0
    assert desk.ask("GET /v1/health/ready")[0] == 503


# -- mutations and events ----------------------------------------------------------------------------------------------------------

def test_a_life_of_a_user(make: Callable[[str], Desk]) -> None:
    desk = make("[server.api]\nruntime_edge_enabled = true\n")
    status, found = desk.ask("POST /v1/users", {}, b'{"username":"carol","max_tcp_conns":4}')
    assert status == 201 and list(found["data"]) == ["user", "secret"] and found["data"]["user"]["max_tcp_conns"] == 4
    revision = found["revision"]
    assert found["data"]["secret"] in found["data"]["user"]["links"]["tls"][0]
    status, found = desk.ask("PATCH /v1/users/carol", {"If-Match": f'"{revision}"'}, b'{"max_tcp_conns":null}')
    assert status == 200 and found["data"]["max_tcp_conns"] is None and found["revision"] != revision
    assert desk.code("DELETE /v1/users/carol", {"If-Match": revision})[1] == "revision_conflict"
    assert desk.ask("POST /v1/users/carol/disable", {}, b"junk")[1]["data"]["enabled"] is False
    assert desk.ask("POST /v1/users/carol/enable")[1]["data"]["enabled"] is True
    rotated = desk.ask("POST /v1/users/carol/rotate-secret")[1]["data"]
    assert rotated["secret"] != "" and rotated["user"]["username"] == "carol"
    assert desk.ask("POST /v1/users/carol/reset-quota")[1]["data"] == {
        "username": "carol", "used_bytes": 0, "last_reset_epoch_secs": 1772611200}
    assert desk.ask("DELETE /v1/users/carol")[1]["data"] == "carol"
    assert desk.code("GET /v1/users/carol") == (404, "not_found", "User not found")
    assert desk.code("DELETE /v1/users/alice%2Fbob") == (404, "not_found", "User not found")
    assert desk.ask("DELETE /v1/users/alice")[0] == 200
    assert desk.code("POST /v1/users", {}, b'{"username":"bob"}')[1] == "user_exists"
    assert desk.code("POST /v1/users", {}, b'{"username":"bob\\u0000"}')[0] == 400
    assert desk.code("DELETE /v1/users/bob") == (409, "last_user_forbidden", "Cannot delete the last configured user")
    events = desk.data("/v1/runtime/events/recent")["data"]
    assert [event["event_type"] for event in events["events"]] == [
        "api.user.create.ok", "api.user.patch.ok", "api.user.delete.failed", "api.user.disable.ok", "api.user.enable.ok",
        "api.user.rotate_secret.ok", "api.user.reset_quota.ok", "api.user.delete.ok", "api.user.delete.failed", "api.user.delete.ok",
        "api.user.create.failed", "api.user.create.failed", "api.user.delete.failed"]
    assert [event["context"] for event in events["events"][10:12]] == ["username=bob code=user_exists", "code=bad_request"]
    assert events["events"][2]["context"] == "username=carol code=revision_conflict"
    assert rotated["secret"] not in json.dumps(events)


def test_the_ring_of_events() -> None:
    ring = Events(16)
    for number in range(20):
        ring.record("kind", f"n={number}")
    ring.record("kind", "ä" * 200)
    found = ring.view(3)
    assert (found["capacity"], found["dropped_total"]) == (16, 5)
    assert [event["seq"] for event in found["events"]] == [19, 20, 21]
    assert len(found["events"][2]["context"].encode()) == 256


# -- cache -------------------------------------------------------------------------------------------------------------------------

def test_one_build_serves_everybody_who_waits() -> None:
    gate, builds = threading.Event(), []

    def build() -> int:
        builds.append(1)
        gate.wait(patient(20))
        return len(builds)

    class Door:
        """A lock that knows how many have come to it."""

        def __init__(self) -> None:
            self.came, self._lock = 0, threading.Lock()

        def __enter__(self) -> None:
            self.came += 1                     # threads come one at a time: they are started so
            self._lock.acquire()

        def __exit__(self, *_: object) -> None:
            self._lock.release()

    cache = Cached(build, 0.0)
    door = cache._lock = Door()                # type: ignore[assignment]
    found: list[tuple[int, bool]] = []
    threads = [threading.Thread(target=lambda: found.append(cache.get())) for _ in range(8)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        poll(lambda number=number: door.came == number, "it has come to the lock")       # type: ignore[misc]
    gate.set()
    for thread in threads:
        thread.join()
    assert {value for value, _ in found} == {1} and len(builds) == 1
    assert cache.get() == (2, False)


def test_a_value_lives_for_its_time_and_a_bad_one_not_at_all() -> None:
    values = iter([None, 1, 2])
    cache = Cached(lambda: next(values), 1000.0, lambda value: value is not None)
    assert [cache.get() for _ in range(4)] == [(None, False), (1, False), (1, True), (1, True)]


def test_the_cache_keeps_the_time_of_its_snapshot(make: Callable[[str], Desk], monkeypatch: pytest.MonkeyPatch) -> None:
    desk = make(KEYS_ON.replace("cache_ttl_ms = 0", "cache_ttl_ms = 60000"))
    desk.port.sources.pool = lambda: POOL
    first = desk.data("/v1/stats/dcs")["generated_at_epoch_secs"]
    monkeypatch.setattr(time, "time", lambda: first + 10.0)
    assert desk.data("/v1/stats/me-writers")["generated_at_epoch_secs"] == desk.data("/v1/stats/dcs")["generated_at_epoch_secs"] == first
    assert desk.data("/v1/stats/minimal/all")["generated_at_epoch_secs"] == first
    assert desk.port.asked == 1


# -- metrics and start -------------------------------------------------------------------------------------------------------------

def metrics(site: MetricsSite, line: str) -> tuple[int, str, bytes]:
    answer = site.answer(FakeRequest(line, {}, b"", "127.0.0.1"))                           # type: ignore[arg-type]
    return answer.status, answer.kind, b"".join(answer.pieces)


def test_the_site_of_the_metrics(desk: Desk) -> None:
    site = MetricsSite(desk.port)
    text = "text/plain; charset=utf-8"
    status, kind, body = metrics(site, "GET /metrics?x")
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8") and b"\ntelemt_connections_total 0\n" in body
    assert metrics(site, "GET /beobachten") == (200, text, b"empty\n")
    desk.port.sources.beobachten = lambda: "[other]\n203.0.113.1-2\n"
    assert metrics(site, "GET /beobachten") == (200, text, b"[other]\n203.0.113.1-2\n")
    assert metrics(site, "GET /metrics/") == (404, text, b"Not Found\n") == metrics(site, "GET /")
    assert metrics(site, "POST /metrics")[0] == 405
    desk.port.answers = False
    assert metrics(site, "GET /beobachten")[0] == 503 and metrics(site, "GET /metrics")[0] == 200


def test_beobachten_says_when_it_is_off(make: Callable[[str], Desk]) -> None:
    assert metrics(MetricsSite(make("[general]\nbeobachten = false\n").port), "GET /beobachten")[2] == b"beobachten disabled\n"


def test_the_metrics_whitelist_is_its_own(make: Callable[[str], Desk]) -> None:
    site = MetricsSite(make('[server]\nmetrics_whitelist = ["10.0.0.0/8"]\n').port)
    assert site.admits("10.0.0.1") and not site.admits("127.0.0.1")


@pytest.mark.parametrize(("text", "addresses"), [
    ("", []), ("metrics_port = 9090", [("127.0.0.1", 9090), ("::1", 9090)]),
    ('metrics_port = 9090\nmetrics_whitelist = ["127.0.0.0/8"]', [("127.0.0.1", 9090), ("::1", 9090)]),
    ('metrics_port = 9090\nmetrics_whitelist = ["::ffff:127.0.0.1"]', [("127.0.0.1", 9090), ("::1", 9090)]),
    ("metrics_port = 9090\nmetrics_whitelist = []", [("0.0.0.0", 9090)]),
    ('metrics_port = 9090\nmetrics_whitelist = ["127.0.0.1", "10.0.0.0/8"]', [("0.0.0.0", 9090)]),
    ('metrics_port = 9090\nmetrics_whitelist = ["::1/127"]', [("0.0.0.0", 9090)]),
    ('metrics_listen = "[::]:9100"', [("::", 9100)]), ('metrics_port = 1\nmetrics_listen = "10.0.0.1:9100"', [("10.0.0.1", 9100)])])
def test_where_metrics_are_served(text: str, addresses: list[tuple[str, int]]) -> None:
    assert api.metrics_addresses(settings_of(f"[server]\n{text}\n").server) == addresses


@pytest.mark.parametrize(("text", "mode", "words"), [
    ('whitelist = []\nlisten = "0.0.0.0:9091"', 0o600, ["auth_header is not set", "status page"]),
    ('whitelist = []\nlisten = "0.0.0.0:9091"\nauth_header = "x"', 0o600, ["status page"]),
    ('whitelist = []\nlisten = "0.0.0.0:9091"\nauth_header = "x"\nui = false', 0o600, []),
    ('whitelist = []\nlisten = "127.0.0.1:9091"', 0o600, []), ('listen = "0.0.0.0:9091"', 0o600, []),
    ("", 0o620, ["can be changed"]), ("", 0o606, ["can be changed"]), ("", 0o644, [])])
def test_warnings_at_start(make: Callable[[str], Desk], monkeypatch: pytest.MonkeyPatch, text: str, mode: int, words: list[str]) -> None:
    logged: list[str] = []
    monkeypatch.setattr(Log, "warn", lambda self, line, *args, **fields: logged.append(line % args))
    port = make(f"[server.api]\n{text}\n").port
    port.path.chmod(mode)
    api.warn_about(port)
    assert len(logged) == len(words) and all(word in line for word, line in zip(words, logged, strict=True))


def test_guards_frozen_at_start(desk: Desk) -> None:
    assert isinstance(desk.site._guard, Guard)
    desk.port.settings = settings_of('[server.api]\nauth_header = "x"\nread_only = true\n' + USERS)
    assert desk.data("/v1/health") == {"status": "ok", "read_only": False}
