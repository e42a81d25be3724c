"""Room 3 of telemt_api: the Prometheus page (metrics.md 2-5)."""
from __future__ import annotations

import re
import shutil
import subprocess

import pytest

import telemt
import telemt_api as api
from telemt import Counters, Reason, User
from tests.cases import settings_of

# metrics.md 4, 4.1 and 5: name -> type, in the order of output.
WANTED = """
    uptime_seconds:gauge telemetry_core_enabled:gauge telemetry_user_enabled:gauge telemetry_me_level:gauge connections_total
    connections_bad_total handshake_timeouts_total upstream_connect_attempt_total upstream_connect_success_total
    upstream_connect_fail_total upstream_connect_failfast_hard_error_total upstream_connect_attempts_per_request
    upstream_connect_duration_success_total upstream_connect_duration_fail_total me_keepalive_sent_total me_keepalive_failed_total
    me_keepalive_pong_total me_keepalive_timeout_total me_rpc_proxy_req_signal_sent_total me_rpc_proxy_req_signal_failed_total
    me_rpc_proxy_req_signal_skipped_no_meta_total me_rpc_proxy_req_signal_response_total me_rpc_proxy_req_signal_close_sent_total
    me_reconnect_attempts_total me_reconnect_success_total me_handshake_reject_total me_handshake_error_code_total me_reader_eof_total
    me_idle_close_by_peer_total me_crc_mismatch_total me_seq_mismatch_total me_route_drop_no_conn_total
    me_route_drop_channel_closed_total me_route_drop_queue_full_total me_route_drop_queue_full_profile_total me_socks_kdf_policy_total
    me_endpoint_quarantine_total me_kdf_drift_total me_kdf_port_only_drift_total me_hardswap_pending_reuse_total
    me_hardswap_pending_ttl_expired_total me_single_endpoint_outage_enter_total me_single_endpoint_outage_exit_total
    me_single_endpoint_outage_reconnect_attempt_total me_single_endpoint_outage_reconnect_success_total
    me_single_endpoint_quarantine_bypass_total me_single_endpoint_shadow_rotate_total
    me_single_endpoint_shadow_rotate_skipped_quarantine_total me_floor_mode:gauge me_floor_mode_switch_all_total
    me_floor_mode_switch_total secure_padding_invalid_total desync_total desync_full_logged_total desync_suppressed_total
    desync_frames_bucket_total pool_swap_total pool_drain_active:gauge pool_force_close_total pool_stale_pick_total
    me_writer_removed_total me_writer_removed_unexpected_total me_refill_triggered_total me_refill_skipped_inflight_total
    me_refill_failed_total me_writer_restored_same_endpoint_total me_writer_restored_fallback_total
    me_writer_removed_unexpected_minus_restored_total:gauge telemetry_user_series_suppressed:gauge connections_bad_by_class_total
    handshake_failures_by_class_total handshake_failures_by_stage_total me_fallback_sessions_total build_info:gauge
    user_connections_total user_connections_current:gauge user_octets_from_client user_octets_to_client user_msgs_from_client
    user_msgs_to_client user_unique_ips_current:gauge user_unique_ips_limit:gauge user_unique_ips_utilization:gauge
    user_unique_ips_recent_window:gauge""".split()
SAMPLE = re.compile(r'(telemt_[a-z0-9_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)+)\})? (-?[0-9.]+)')


def facts(text: str = "", users: list[User] | None = None, counters: Counters | None = None, now: float = 100.0) -> api.Facts:
    settings = settings_of(text)
    return api.Facts(counters or Counters(), settings.general.telemetry, settings.general.me_floor_mode, users or [],
                     settings.access.user_max_unique_ips, 86411.532109, now, telemt.VERSION)


def page(given: api.Facts) -> str:
    return "".join(api.render_metrics(given))


def samples(text: str) -> dict[str, str]:
    """`name{labels}` -> value; every line has to be valid."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match, line
            key = line.rpartition(" ")[0]
            assert key not in found, line
            found[key] = match[3]
    return found


def user_of(name: str, connects: int = 1, ips: int = 0) -> User:
    user = User(name)
    user.stats.connects = connects
    user.stats.current = user.stats.octets_from_client = user.stats.msgs_to_client = 3
    user.ips = {f"10.0.0.{number}": 1 for number in range(ips)}
    user.recent = {"10.9.9.9": 99.0} if ips else {}
    return user


def test_names_types_and_order() -> None:
    found = re.findall(r"^# TYPE telemt_(\S+) (\S+)$", page(facts()), re.M)
    assert found == [(name, kind or "counter") for name, _, kind in (word.partition(":") for word in WANTED)]


def test_every_metric_is_one_group_of_help_type_and_samples() -> None:
    text = page(facts(users=[user_of("a", ips=2), user_of("b")]))
    assert text.endswith("\n") and "\r" not in text
    name = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert len(line.split()) > 3
        elif line.startswith("# TYPE "):
            assert line.split()[2] == name
        else:
            assert re.match(r"[a-z0-9_]+", line)[0] == name, line    # type: ignore[index]


def test_all_totals_of_the_data_plane_are_shown() -> None:
    """A counter that nobody exports would be forgotten: every slot moves a sample."""
    counters = Counters()
    before = samples(page(facts(counters=counters)))
    for number, name in enumerate(counters.me.totals):
        counters.me.totals[name] = 1000 + number
    after = samples(page(facts(counters=counters)))
    changed = {after[key] for key in after if after[key] != before[key]}
    assert {str(1000 + number) for number in range(len(counters.me.totals))} <= changed


@pytest.mark.parametrize(("field", "line"), [
    ("reconnect_attempt_total", "telemt_me_reconnect_attempts_total"),
    ("route_drop_queue_full_base_total", 'telemt_me_route_drop_queue_full_profile_total{profile="base"}'),
    ("route_drop_queue_full_high_total", 'telemt_me_route_drop_queue_full_profile_total{profile="high"}'),
    ("socks_kdf_strict_reject_total", 'telemt_me_socks_kdf_policy_total{policy="strict",outcome="reject"}'),
    ("socks_kdf_compat_fallback_total", 'telemt_me_socks_kdf_policy_total{policy="compat",outcome="fallback"}'),
    ("floor_mode_switch_total", "telemt_me_floor_mode_switch_all_total"),
    ("floor_mode_switch_static_to_adaptive_total", 'telemt_me_floor_mode_switch_total{from="static",to="adaptive"}'),
    ("floor_mode_switch_adaptive_to_static_total", 'telemt_me_floor_mode_switch_total{from="adaptive",to="static"}'),
    ("desync_frames_bucket_gt_10", 'telemt_desync_frames_bucket_total{bucket="gt_10"}'),
    ("desync_total", "telemt_desync_total"), ("pool_swap_total", "telemt_pool_swap_total"),
    ("secure_padding_invalid_total", "telemt_secure_padding_invalid_total"), ("crc_mismatch_total", "telemt_me_crc_mismatch_total"),
    ("refill_failed_total", "telemt_me_refill_failed_total"), ("fallback_sessions_total", "telemt_me_fallback_sessions_total")])
def test_a_field_and_its_line(field: str, line: str) -> None:
    counters = Counters()
    counters.me.totals[field] = 41
    assert samples(page(facts(counters=counters)))[line] == "41"


def test_core_lines() -> None:
    counters = Counters()
    counters.connections_total, counters.connections_bad_total, counters.handshake_timeouts_total = 9, 2, 1
    counters.connect_attempts, counters.connect_success_ms, counters.connect_fail_ms = [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]
    counters.bad_by_class = {Reason.TLS_REPLAY: 2}
    found = samples(page(facts(counters=counters)))
    assert found["telemt_uptime_seconds"] == "86411.5"
    names = ("connections_total", "connections_bad_total", "handshake_timeouts_total")
    assert [found[f"telemt_{name}"] for name in names] == ["9", "2", "1"]
    assert [found[f'telemt_upstream_connect_attempts_per_request{{bucket="{word}"}}'] for word in ("1", "2", "3_4", "gt_4")] == list("1234")
    words = ("le_100ms", "101_500ms", "501_1000ms", "gt_1000ms")
    assert [found[f'telemt_upstream_connect_duration_fail_total{{bucket="{word}"}}'] for word in words] == ["9", "10", "11", "12"]
    assert found['telemt_connections_bad_by_class_total{class="tls_replay"}'] == "2"
    assert [found[f'telemt_telemetry_me_level{{level="{word}"}}'] for word in ("silent", "normal", "debug")] == ["0", "1", "0"]
    assert [found[f'telemt_me_floor_mode{{mode="{word}"}}'] for word in ("static", "adaptive")] == ["0", "1"]
    assert found[f'telemt_build_info{{version="{telemt.VERSION}"}}'] == "1"


def test_every_word_is_printed_in_the_order_of_the_table() -> None:
    text = page(facts())
    values = [reason.value for reason in Reason]
    bad = re.findall(r'^telemt_connections_bad_by_class_total\{class="(\w+)"\} 0$', text, re.M)
    assert bad == values[:values.index("timeout")]
    failed = re.findall(r'^telemt_handshake_failures_by_class_total\{class="(\w+)"\} 0$', text, re.M)
    assert failed == values[values.index("timeout"):values.index("bad_record")]
    stages = re.findall(r'^telemt_handshake_failures_by_stage_total\{stage="(\w+)"\} 0$', text, re.M)
    assert stages == ["first_packet_prelude", "tls_clienthello_body", "tls_core", "tls_post_serverhello_mtproto", "direct_mtproto"]


def test_error_codes_ascend_and_are_absent_without_one() -> None:
    counters = Counters()
    assert "me_handshake_error_code_total{" not in page(facts(counters=counters))
    counters.me.error_codes = {2: 1, -1: 3}
    assert re.findall(r'error_code="(-?\d+)"\} (\d+)', page(facts(counters=counters))) == [("-1", "3"), ("2", "1")]


@pytest.mark.parametrize(("lost", "same", "other", "shown"), [(5, 2, 1, "2"), (1, 2, 1, "0")])
def test_lost_writers_never_fall_below_zero(lost: int, same: int, other: int, shown: str) -> None:
    counters = Counters()
    counters.me.totals |= {"writer_removed_unexpected_total": lost, "writer_restored_same_endpoint_total": same,
                           "writer_restored_fallback_total": other}
    assert samples(page(facts(counters=counters)))["telemt_me_writer_removed_unexpected_minus_restored_total"] == shown


# -- users -------------------------------------------------------------------------------------------------------------------------

LIMITS = "[access.user_max_unique_ips]\na = 4\nz = 2"


def test_user_series() -> None:
    users = [user_of("a", ips=3), user_of("b", ips=1), user_of("c", connects=0), user_of("z", connects=0)]
    users[2].stats.current = users[3].stats.current = 0
    found = samples(page(facts(LIMITS, users)))
    series = {key: value for key, value in found.items() if key.startswith("telemt_user_")}
    assert {key for key in series if '"c"' in key} == set()
    assert series['telemt_user_connections_total{user="a"}'] == "1" and series['telemt_user_octets_from_client{user="b"}'] == "3"
    assert {key.partition("{")[0] for key in series if '"z"' in key} == {
        "telemt_user_unique_ips_current", "telemt_user_unique_ips_limit", "telemt_user_unique_ips_utilization"}
    assert (series['telemt_user_unique_ips_limit{user="a"}'], series['telemt_user_unique_ips_utilization{user="a"}']) == ("4", "0.750000")
    assert (series['telemt_user_unique_ips_limit{user="b"}'], series['telemt_user_unique_ips_utilization{user="b"}']) == ("0", "0.000000")
    assert series['telemt_user_unique_ips_recent_window{user="a"}'] == "1"


def test_user_series_disappear_while_class_u_is_off() -> None:
    text = page(facts("[general.telemetry]\nuser_enabled = false", [user_of("a", ips=1)]))
    assert 'user="' not in text
    assert samples(text)["telemt_telemetry_user_series_suppressed"] == "1"
    assert "# TYPE telemt_user_msgs_to_client counter\n" in text and "unique_ips" not in text


@pytest.mark.parametrize("name", ['quote"d', "back\\slash", "line\nfeed", "ünïcödé", "a b{c}=d,"])
def test_a_name_cannot_break_the_format(name: str) -> None:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    assert samples(page(facts(users=[user_of(name)])))[f'telemt_user_connections_total{{user="{escaped}"}}'] == "1"


def test_at_most_4096_users_per_scrape() -> None:
    text = page(facts(users=[user_of(f"u{number:05}") for number in range(5000)]))
    assert text.count("telemt_user_connections_total{") == api.SERIES_USERS_MAX == 4096
    assert 'user="u04095"' in text and 'user="u04096"' not in text


def test_no_piece_is_long() -> None:
    pieces = list(api.render_metrics(facts(users=[user_of(f"u{number:05}", ips=1) for number in range(1000)])))
    assert max(piece.count("\n") for piece in pieces) < 300


# -- consumers (metrics.md 7) ------------------------------------------------------------------------------------------------------

GRAFANA = """uptime_seconds connections_total connections_bad_total handshake_timeouts_total user_connections_total user_connections_current
    user_octets_from_client user_octets_to_client user_msgs_from_client user_msgs_to_client""".split()
ZABBIX = """uptime_seconds connections_total connections_bad_total handshake_timeouts_total me_keepalive_sent_total
    me_keepalive_failed_total me_reconnect_attempts_total me_reconnect_success_total""".split()


def test_the_grafana_dashboard_finds_its_series() -> None:
    found = samples(page(facts(users=[user_of("bob")])))
    for name in GRAFANA:
        assert f"telemt_{name}" in found or f'telemt_{name}{{user="bob"}}' in found, name


def test_the_zabbix_template_finds_single_values() -> None:
    """Its patterns take the first line that begins with the name: unlabelled totals have exactly one sample."""
    found = samples(page(facts(users=[user_of("bob")])))
    for name in ZABBIX:
        assert [key for key in found if key == f"telemt_{name}" or key.startswith(f"telemt_{name}{{")] == [f"telemt_{name}"]
    others = {key.partition("{")[0] for key in found if 'user="' in key and not key.startswith("telemt_user_")}
    assert others == set()


# Names that the contract fixes and the linter would call otherwise.
LINT = re.compile(r"telemt_\S+ (?:non-counter metrics should not have \"_total\" suffix|counter metrics should have \"_total\" suffix"
                  r"|no help text|use base unit.*|.*abbreviated.*|metric names should not contain.*)")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian package prometheus) is not installed")
def test_promtool_reads_the_page() -> None:
    text = page(facts(LIMITS, [user_of('a"b\\c\nd', ips=2), user_of("z")]))
    run = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False, timeout=60)
    complaints = [line for line in run.stderr.splitlines() if line.strip()]
    assert run.returncode in (0, 3), run.stderr          # 1: not the format; 3: format is right, style is not
    assert [line for line in complaints if not LINT.fullmatch(line)] == []
