"""Room 2 of telemt_api: the resources, against the examples of the published contract (tests/vectors/openapi.json)."""
from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

import telemt
import telemt_api as api
from telemt import Counters, DcRow, Link, PoolSnapshot, Reason, RouteSnapshot, User, WriterRow
from tests.cases import load_vector, settings_of

CONTRACT = load_vector("openapi")
NOW_S = 1772611200
POOL = PoolSnapshot(
    3, 0, 0, None, (2,),
    (WriterRow(7, 1, "149.154.175.50:8888", 3, "active", False, False, 12, None, 118.4),
     WriterRow(8, 203, "91.105.192.100:443", 3, "active", False, False, 0, 77, None),
     WriterRow(5, None, "[2001:db8::5]:8888", 2, "draining", True, False, 0, 41, None)),
    (DcRow(1, ("149.154.175.50:8888",), 1, 3, 1, 118.4, 12),
     DcRow(203, ("91.105.192.100:443", "91.105.192.101:443"), 1, 3, 1, None, 0)),
    (("91.105.192.101:443", 18250),), ((1, "V4", 2), (1, "V6", 1), (203, "V4", 1)))


def example(path: str, name: str = "", method: str = "get") -> Any:
    """`data` of a documented answer."""
    answers = CONTRACT["paths"][path][method]["responses"]
    content = answers.get("200", answers.get("201"))["content"]["application/json; charset=utf-8"]
    return (content["examples"][name]["value"] if name else content["example"])["data"]


def same(found: object, wanted: object) -> None:
    """Equal, the order of the members included."""
    assert json.dumps(found) == json.dumps(wanted)


def without(data: dict[str, Any], *names: str) -> dict[str, Any]:
    """Additive members left out."""
    return {name: value for name, value in data.items() if name not in names}


@pytest.fixture
def counters() -> Counters:
    """Counters as in the documented zero/all."""
    wanted = example("/v1/stats/zero/all")
    made = Counters()
    made.connections_total, made.connections_bad_total, made.handshake_timeouts_total = 1523, 48, 6
    made.bad_by_class = {Reason.TLS_REPLAY: 40, Reason.BAD_DIGEST: 8, Reason.BAD_HEADER: 0}
    made.failures_by_class = {Reason.TIMEOUT: 6, Reason.EOF: 2}
    made.failures_by_stage = {"tls_core": 1, "direct_mtproto": 7}
    for name in ("connect_attempt_total", "connect_success_total", "connect_fail_total", "connect_failfast_hard_error_total"):
        setattr(made, name, wanted["upstream"][name])
    made.connect_attempts, made.connect_success_ms, made.connect_fail_ms = [1862, 21, 0, 0], [1650, 214, 6, 1], [3, 0, 0, 9]
    for section in ("middle_proxy", "pool", "desync"):
        made.me.totals.update({name: value for name, value in wanted[section].items() if name in made.me.totals})
    made.me.error_codes = {2: 1, -1: 1}
    return made


REFUSALS = ("connections_bad_by_class", "handshake_failures_by_class", "handshake_failures_by_stage")


def test_zero_all(counters: Counters) -> None:
    text = api.render_zero_all(counters, api.make_middle_form(counters.me), settings_of("").general.telemetry, 86411.532109, 2, NOW_S)
    found = json.loads(text)
    assert api.dump_json(found) == text
    found["core"] = without(found["core"], *REFUSALS)
    same(found, example("/v1/stats/zero/all"))


def test_zero_all_as_it_changes(counters: Counters) -> None:
    """Its text is a format, and the middle end's part is kept from poll to poll: it is always what the views say."""
    form, telemetry = api.make_middle_form(counters.me), settings_of("").general.telemetry

    def check() -> None:
        found = json.loads(api.render_zero_all(counters, form, telemetry, 1.0, 2, NOW_S))
        core = api.view_head(counters, 1.0, 2) | {
            "telemetry_core_enabled": telemetry.core_enabled, "telemetry_user_enabled": telemetry.user_enabled,
            "telemetry_me_level": telemetry.me_level}
        same(found["core"], core | api.view_refusals(counters))
        same(found["upstream"], api.view_upstream_totals(counters))
        middle = json.loads(f"{{{api.render_middle_totals(counters.me, api.make_middle_form(counters.me))}}}")
        same({name: found[name] for name in middle}, middle)

    check()
    counters.me.totals["handshake_reject_total"] += 1
    check()
    counters.me.error_codes[-7] = 1
    check()
    counters.me.error_codes[-7] = 2
    check()
    counters.me.draining = 4
    check()
    counters.gate(True, "debug")
    check()
    for mapping in (counters.bad_by_class, counters.failures_by_class, counters.failures_by_stage):
        mapping.clear()                        # type: ignore[attr-defined]
        check()


def test_summary(counters: Counters) -> None:
    same(api.view_head(counters, 86411.532109, 2), example("/v1/stats/summary"))


def test_refusals_by_word(counters: Counters) -> None:
    same(api.view_refusals(counters), {
        "connections_bad_by_class": [{"class": "tls_bad_digest", "total": 8}, {"class": "tls_replay", "total": 40}],
        "handshake_failures_by_class": [{"class": "eof", "total": 2}, {"class": "timeout", "total": 6}],
        "handshake_failures_by_stage": [{"stage": "direct_mtproto", "total": 7}, {"stage": "tls_core", "total": 1}]})


@pytest.mark.parametrize(("level", "shown"), [("silent", 0), ("normal", 0), ("debug", 3)])
def test_the_gauge_of_draining_writers_is_class_d(level: str, shown: int) -> None:
    counters = Counters()
    counters.me.draining = 3
    counters.gate(True, level)
    text = api.render_middle_totals(counters.me, api.make_middle_form(counters.me))
    assert json.loads(f"{{{text}}}")["pool"]["pool_drain_active"] == shown


def test_upstreams(counters: Counters) -> None:
    wanted = example("/v1/stats/upstreams", "available")
    same(api.view_upstreams(counters, wanted["upstreams"], "", NOW_S), wanted)


@pytest.mark.parametrize("reason", [api.FEATURE_DISABLED, api.SOURCE_UNAVAILABLE])
def test_upstreams_without_rows(counters: Counters, reason: str) -> None:
    same(api.view_upstreams(counters, None, reason, NOW_S), example("/v1/stats/upstreams", reason))


def path_of(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = example("/v1/stats/minimal/all", name)["data"]["network_path"]
    return rows


def test_minimal_all() -> None:
    general = settings_of("").general
    same(api.view_minimal_all(POOL, path_of("available"), general, NOW_S), example("/v1/stats/minimal/all", "available"))


def test_minimal_all_without_a_pool() -> None:
    name = api.SOURCE_UNAVAILABLE
    same(api.view_minimal_all(None, path_of(name), settings_of("").general, NOW_S), example("/v1/stats/minimal/all", name))


def test_minimal_all_disabled() -> None:
    same(api.view_gated(None, api.FEATURE_DISABLED, NOW_S), example("/v1/stats/minimal/all", api.FEATURE_DISABLED))


@pytest.mark.parametrize("name", ["available", api.FEATURE_DISABLED, api.SOURCE_UNAVAILABLE])
def test_me_writers_and_dcs(name: str) -> None:
    pool = POOL if name == "available" else None
    same(api.view_me_writers(pool, name, NOW_S), example("/v1/stats/me-writers", name))
    same(api.view_dcs(pool, name, NOW_S), example("/v1/stats/dcs", name))


@pytest.mark.parametrize(("part", "total", "share"), [(0, 0, 0.0), (3, 0, 0.0), (2, 3, 66.66666666666666), (5, 3, 100.0), (0, 3, 0.0)])
def test_percent(part: int, total: int, share: float) -> None:
    assert api.percent(part, total) == share
    assert isinstance(api.percent(part, total), float)


def test_effective_values_are_those_in_force() -> None:
    general = settings_of("[general]\nme_reconnect_max_concurrent_per_dc = 0\nme_reconnect_fast_retry_count = 0\n"
                          "me_pool_min_fresh_ratio = 0.33333\nme_reinit_drain_timeout_secs = 5").general
    found = api.view_me_runtime(POOL, general)
    assert (found["me_reconnect_max_concurrent_per_dc"], found["me_reconnect_fast_retry_count"]) == (1, 1)
    assert (found["me_pool_min_fresh_ratio"], found["me_pool_force_close_secs"]) == (0.333, 90)


# -- users -------------------------------------------------------------------------------------------------------------------------

ACCESS = """
[access.users]
alice = "00112233445566778899aabbccddeeff"
bob = "ffeeddccbbaa99887766554433221100"
[access.user_max_tcp_conns]
alice = 40
[access.user_expirations]
alice = "2026-12-31T23:59:59Z"
[access.user_max_unique_ips]
alice = 3
"""


def busy_user() -> User:
    user = User("alice")
    user.stats.current, user.stats.connects = 5, 9
    user.stats.octets_from_client, user.stats.octets_to_client = 34003200, 700000000
    user.used = 34003200 + 700000001
    user.ips = {"203.0.113.20": 2, "2001:db8::2": 1, "203.0.113.3": 1}
    user.recent = {"198.51.100.7": 60.0, "203.0.113.30": 95.0, "203.0.113.3": 99.0}
    return user


ADDITIVE = ("enabled", "in_runtime", "active_unique_ips_list", "recent_unique_ips", "recent_unique_ips_list", "octets_from_client",
            "octets_to_client", "quota_used_bytes")


def user_info(name: str, user: User | None, links: dict[str, Any], counted: bool) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(api.render_user(api.frame_user(name, settings_of(ACCESS).access, links), user, counted, 100.0))
    return found


def test_a_user() -> None:
    user = busy_user()
    del user.ips["2001:db8::2"]
    links = example("/v1/users")[0]["links"]
    found = user_info("alice", user, links, True)
    same(without(found, *ADDITIVE), example("/v1/users")[0])
    assert list(found)[-len(ADDITIVE):] == list(ADDITIVE)
    same({name: found[name] for name in ADDITIVE}, {
        "enabled": True, "in_runtime": True, "active_unique_ips_list": ["203.0.113.3", "203.0.113.20"], "recent_unique_ips": 2,
        "recent_unique_ips_list": ["203.0.113.3", "203.0.113.30"],
        "octets_from_client": 34003200, "octets_to_client": 700000000,
        "quota_used_bytes": 734003201})


def test_a_user_that_is_not_counted() -> None:
    found = user_info("alice", busy_user(), {}, False)
    assert (found["current_connections"], found["total_octets"], found["active_unique_ips"]) == (0, 734003200, 3)


def test_a_user_that_is_not_live_yet() -> None:
    found = user_info("bob", None, {}, True)
    assert (found["current_connections"], found["total_octets"], found["quota_used_bytes"]) == (0, 0, 0)


def test_ips_ascend_by_number_and_what_is_no_address_comes_last() -> None:
    assert api.sorted_ips(["unix", "2001:db8::1", "10.0.0.10", "10.0.0.9"]) == ["10.0.0.9", "10.0.0.10", "2001:db8::1", "unix"]


@pytest.mark.parametrize(("text", "shown"), [
    ("2026-12-31T23:59:59Z", "2026-12-31T23:59:59+00:00"), ("2027-01-01T02:59:59+03:00", "2026-12-31T23:59:59+00:00"),
    ("2026-12-31T23:59:59.5Z", "2026-12-31T23:59:59.500+00:00"), ("2026-12-31T23:59:59.000001Z", "2026-12-31T23:59:59.000001+00:00")])
def test_times(text: str, shown: str) -> None:
    assert api.format_time(datetime.datetime.fromisoformat(text)) == shown


def test_links_by_kind() -> None:
    links = [Link("Classic", "c", "classic", "h", ""), Link("DD", "d", "secure", "h", ""), Link("EE-TLS", "t", "tls", "h", "a.example"),
             Link("EE-TLS", "u", "tls", "h", "b.example")]
    same(api.view_links(links, "a.example"), {
        "classic": ["c"], "secure": ["d"], "tls": ["t", "u"], "tls_domains": [{"domain": "b.example", "link": "u"}]})


def test_quotas_list_users_with_a_quota() -> None:
    access = settings_of(ACCESS + '[access.user_data_quota]\nbob = 0\nalice = 1073741824\nghost = 5').access
    alice, bob = User("alice"), User("bob")
    alice.used, alice.reset_wall = 734003200, 1772000000
    same(api.view_quotas(access, {"bob": bob, "alice": alice}), {"users": [
        {"username": "alice", "data_quota_bytes": 1073741824, "used_bytes": 734003200, "last_reset_epoch_secs": 1772000000},
        {"username": "bob", "data_quota_bytes": 0, "used_bytes": 0, "last_reset_epoch_secs": 0}]})


def test_active_ips_name_only_users_with_one() -> None:
    assert api.view_active_ips([busy_user(), User("bob")]) == [
        {"username": "alice", "active_ips": ["203.0.113.3", "203.0.113.20", "2001:db8::2"]}]


# -- what later versions added -----------------------------------------------------------------------------------------------------

def gates(text: str = "", route: RouteSnapshot | None = None, stage: str = "ready", accepting: bool = True) -> dict[str, Any]:
    return api.view_gates(settings_of(text).general, route, stage, accepting, 7)


MIDDLE = "[general]\nuse_middle_proxy = true\n"


def test_gates_in_direct_mode() -> None:
    same(gates("[general]\nuse_middle_proxy = false"), {
        "accepting_new_connections": True, "conditional_cast_enabled": False, "me_runtime_ready": True, "me2dc_fallback_enabled": False,
        "me2dc_fast_enabled": False, "use_middle_proxy": False, "route_mode": "direct", "reroute_active": False,
        "startup_status": "ready", "startup_stage": "ready", "startup_progress_pct": 100.0})


def test_gates_while_the_middle_end_carries() -> None:
    found = gates(MIDDLE, RouteSnapshot(True, True, 0, True, (), 3))
    assert (found["route_mode"], found["reroute_active"], found["startup_status"]) == ("middle", False, "ready")
    assert "reroute_reason" not in found and "reroute_to_direct_at_epoch_secs" not in found
    assert (found["me_down_dc_groups"], found["fallback_sessions_current"], found["fallback_sessions_total"]) == ([], 3, 7)


@pytest.mark.parametrize(("was_ready", "reason"), [(False, "startup_direct_fallback"), (True, "strict_grace_fallback")])
def test_gates_while_sessions_go_direct(was_ready: bool, reason: str) -> None:
    found = gates(MIDDLE, RouteSnapshot(False, False, NOW_S, was_ready, (2, 4), 3))
    assert (found["route_mode"], found["reroute_active"], found["me_runtime_ready"]) == ("direct", True, False)
    assert (found["reroute_to_direct_at_epoch_secs"], found["reroute_reason"]) == (NOW_S, reason)
    assert found["me_down_dc_groups"] == [2, 4]


@pytest.mark.parametrize(("text", "stage", "accepting", "status", "shown", "share"), [
    ("", "listeners_bind", False, "initializing", "listeners_bind", 20.0),
    (MIDDLE, "me_secret_fetch", True, "ready", "ready", 100.0),
    (MIDDLE + "auto_degradation_enabled = false", "me_secret_fetch", True, "initializing", "me_secret_fetch", 60.0),
    (MIDDLE + "auto_degradation_enabled = false", "ready", True, "initializing", "me_pool_init_stage1", 80.0)])
def test_gates_while_starting(text: str, stage: str, accepting: bool, status: str, shown: str, share: float) -> None:
    route = RouteSnapshot(False, False, NOW_S, False, (), 0) if text else None
    found = gates(text or "[general]\nuse_middle_proxy = false", route, stage, accepting)
    assert (found["startup_status"], found["startup_stage"], found["startup_progress_pct"]) == (status, shown, share)


@pytest.mark.parametrize(("accepting", "healthy", "reason"), [
    (True, 1, None), (True, 0, "no_healthy_upstreams"), (False, 1, "admission_closed"), (False, 0, "admission_closed")])
def test_ready(accepting: bool, healthy: int, reason: str | None) -> None:
    found = api.view_ready(accepting, healthy, 2)
    assert (found["ready"], found.get("reason")) == (reason is None, reason)
    assert (found["admission_open"], found["healthy_upstreams"], found["total_upstreams"]) == (accepting, healthy, 2)
    assert ("reason" in found) == (reason is not None)


def test_limits() -> None:
    same(api.view_limits(settings_of("")), {
        "update_every_secs": 300, "me_reinit_every_secs": 900, "me_pool_force_close_secs": 120,
        "timeouts": {"client_handshake_secs": 30, "tg_connect_secs": 10, "client_keepalive_secs": 60, "client_ack_secs": 300,
                     "me_one_retry": 12, "me_one_timeout_ms": 1200},
        "upstream": {"connect_retry_attempts": 2, "connect_retry_backoff_ms": 100, "unhealthy_fail_threshold": 5,
                     "connect_failfast_hard_errors": False},
        "middle_proxy": {"floor_mode": "adaptive", "adaptive_floor_idle_secs": 90, "adaptive_floor_min_writers_single_endpoint": 1,
                         "adaptive_floor_recover_grace_secs": 180, "reconnect_max_concurrent_per_dc": 8, "reconnect_backoff_base_ms": 500,
                         "reconnect_backoff_cap_ms": 30000, "reconnect_fast_retry_count": 16},
        "user_ip_policy": {"global_each": 0, "mode": "active_window", "window_secs": 30}, "user_tcp_policy": {"global_each": 0}})


def test_the_legacy_refresh_period_counts() -> None:
    settings = settings_of("[general]\nproxy_secret_auto_reload_secs = 700\nproxy_config_auto_reload_secs = 500")
    assert api.view_limits(settings)["update_every_secs"] == 500


def test_posture_and_whitelist() -> None:
    settings = settings_of('[server.api]\nauth_header = "x"\nwhitelist = ["10.0.0.1/8", "::1"]\nread_only = true\n'
                           "[server]\nproxy_protocol = true")
    same(api.view_posture(settings, settings.server.api), {
        "api_read_only": True, "api_whitelist_enabled": True, "api_whitelist_entries": 2, "api_auth_header_enabled": True,
        "proxy_protocol_enabled": True, "log_level": "normal", "telemetry_core_enabled": True, "telemetry_user_enabled": True,
        "telemetry_me_level": "normal"})
    same(api.view_whitelist(settings.server.api, NOW_S), {
        "generated_at_epoch_secs": NOW_S, "enabled": True, "entries_total": 2, "entries": ["10.0.0.0/8", "::1/128"]})


def test_pool_state() -> None:
    same(api.view_pool_state(POOL, settings_of("").general), {
        "generations": {"active_generation": 3, "warm_generation": 0, "pending_hardswap_generation": 0, "pending_hardswap_age_secs": None,
                        "draining_generations": [2]},
        "hardswap": {"enabled": True, "pending": False},
        "writers": {"total": 3, "alive_non_draining": 2, "draining": 1, "degraded": 0,
                    "contour": {"warm": 0, "active": 2, "draining": 1}, "health": {"healthy": 2, "degraded": 0, "draining": 1}},
        "refill": {"inflight_endpoints_total": 4, "inflight_dc_total": 2, "by_dc": [
            {"dc": 1, "family": "V4", "inflight": 2}, {"dc": 1, "family": "V6", "inflight": 1},
            {"dc": 203, "family": "V4", "inflight": 1}]}})


def test_me_quality(counters: Counters) -> None:
    found = api.view_me_quality(POOL, counters.me)
    assert found["counters"]["reader_eof_total"] == 11 and found["route_drops"]["no_conn_total"] == 4
    same(found["dc_rtt"][1], {"dc": 203, "rtt_ema_ms": None, "alive_writers": 1, "required_writers": 3, "coverage_pct": 33.33333333333333})


def test_upstream_quality(counters: Counters) -> None:
    rows = example("/v1/stats/upstreams", "available")["upstreams"]
    general = settings_of("").general
    full = api.view_upstream_quality(counters, general, rows, "", NOW_S)
    assert list(full) == ["enabled", "generated_at_epoch_secs", "policy", "counters", "summary", "upstreams"] and full["enabled"]
    for reason in (api.FEATURE_DISABLED, api.SOURCE_UNAVAILABLE):
        found = api.view_upstream_quality(counters, general, None, reason, NOW_S)
        assert list(found) == ["enabled", "reason", "generated_at_epoch_secs", "policy", "counters"] and not found["enabled"]


def test_connections() -> None:
    users = [api.UserLoad("b", 2, 10), api.UserLoad("a", 2, 5), api.UserLoad("c", 0, 99)]
    found = api.view_connections(users, 1, 2, True, 1000)
    assert found["totals"] == {"current_connections": 4, "current_connections_me": 1, "current_connections_direct": 3, "active_users": 2}
    assert [row["username"] for row in found["top"]["by_connections"]] == ["a", "b"]
    assert [row["username"] for row in found["top"]["by_throughput"]] == ["c", "b"]
    assert found["top"]["limit"] == 2 and found["telemetry"] == {"user_enabled": True, "throughput_is_cumulative": True}


def test_the_window_is_that_of_the_data_plane() -> None:
    assert api.RECENT_S == telemt.RECENT_S
