"""Room 2: every key, every check, every step of config.md 1-3, 7 and 8."""
from __future__ import annotations

import datetime
import ipaddress
import json
from pathlib import Path

import pytest

import telemt
from telemt import ConfigError, Loaded, Reload, Settings
from tests.cases import settings_of

VECTOR = json.loads((Path(__file__).parent / "vectors" / "config-defaults.json").read_text(encoding="utf-8"))
SECRET = "00112233445566778899aabbccddeeff"
USERS = f'access.users.alice = "{SECRET}"\n'
TAG = "f" * 32
NETWORK = ipaddress.ip_network


def load(text: str) -> Loaded:
    """Load a document that has one good user unless it names its own."""
    if "access.users" not in text and "[access]" not in text:
        text = USERS + text
    return telemt.parse_settings(telemt.parse_document(text), telemt.Draws(lambda: 1500))


def refuse(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(text)
    return caught.value


def value(loaded: Loaded, path: str) -> object:
    found: object = loaded.settings
    for name in path.split("."):
        found = getattr(found, name)
    return found


# -- the table

def test_defaults_are_those_of_the_vector() -> None:
    assert telemt.raw_defaults() == VECTOR["defaults"] | VECTOR["extensions"]


def test_table_absent_and_table_empty_are_the_same() -> None:
    sections = ("general", "general.modes", "general.telemetry", "general.links", "network", "server", "server.api", "timeouts",
                "censorship", "access")
    empty = "".join(f"[{name}]\n" for name in sections)
    assert telemt.diff_settings(load("[access]").settings, load(empty).settings) == ()


def test_attribute_path_is_toml_path_and_default() -> None:
    for path, key in telemt.KEYS.items():
        if "[]" not in path and key.table is None:
            assert value(Loaded(Settings(), (), (), (), {}, False), path) == key.default, path


def test_every_rule_is_checked_once_and_every_key_explained() -> None:
    single = [row for row in telemt._CHECKS if " " not in row]
    ruled = {path for path, key in telemt.KEYS.items() if key.rule}
    assert sorted(single) == sorted(ruled - {"general.update_every"})
    assert [path for path, key in telemt.KEYS.items() if key.table is None and not key.help.endswith((".", "?"))] == []


WITHOUT_EFFECT = {f"general.{name}" for name in """
    middle_proxy_pool_size middle_proxy_warm_standby me_keepalive_payload_random stun_iface_mismatch_ignore fast_mode_min_tls_record
    ntp_check ntp_servers me_snapshot_reject_empty_map me_secret_atomic_snapshot me_reinit_singleflight
    me_route_backpressure_base_timeout_ms me_route_backpressure_high_watermark_pct""".split()} | {
    "timeouts.me_one_retry", "censorship.tls_new_session_tickets", "censorship.tls_full_cert_ttl_secs", "censorship.alpn_enforce"}
RELOAD = {
    Reload.NO_EFFECT: WITHOUT_EFFECT,
    Reload.RESTART_OURS: {"general.use_middle_proxy", "network.ipv6", "network.prefer", "server.port", "censorship.tls_domain",
                          "censorship.tls_domains", "censorship.tls_emulation"},
    Reload.HOT: {f"general.{name}" for name in """
        ad_tag me_keepalive_enabled me_keepalive_interval_secs me_keepalive_jitter_secs desync_all_full hardswap me_floor_mode
        me_adaptive_floor_idle_secs me_adaptive_floor_min_writers_single_endpoint me_adaptive_floor_recover_grace_secs log_level
        me_socks_kdf_policy me_route_backpressure_high_timeout_ms update_every me_pool_drain_ttl_secs me_pool_min_fresh_ratio
        me_reinit_drain_timeout_secs proxy_secret_auto_reload_secs proxy_config_auto_reload_secs auto_degradation_enabled
        degradation_min_unavailable_dc_groups telemetry.core_enabled telemetry.user_enabled telemetry.me_level""".split()}
    | {"network.dns_overrides"} | {path for path in telemt.KEYS if path.startswith("access.")},
}


@pytest.mark.parametrize("reload", RELOAD)
def test_reload_classes(reload: Reload) -> None:
    assert {path for path, key in telemt.KEYS.items() if key.reload is reload and key.table is None and "[]" not in path} == RELOAD[reload]


def test_empty_file() -> None:
    loaded = telemt.parse_settings({}, telemt.Draws(lambda: 1500))
    settings = loaded.settings
    assert settings.access.users == {"default": "0" * 32} and not loaded.users_explicit
    assert settings.general.use_middle_proxy and settings.server.port == 443
    assert [str(entry.ip) for entry in settings.server.listeners] == ["0.0.0.0", "::"]
    assert settings.censorship.mask_host == "petrovich.ru" and settings.censorship.fake_cert_len == 2048
    assert settings.upstreams == (telemt.Upstream(type="direct", weight=1, enabled=True, scopes=""),)
    assert settings.dc_overrides == {"203": ("91.105.192.100:443",)}
    assert loaded.warnings == ('[access.users] is missing: user "default" has the public all-zero secret, anybody can use this proxy',)
    assert (loaded.errors, loaded.without_effect, loaded.unknown) == ((), (), {})


def test_only_what_is_derived_differs_from_the_defaults() -> None:
    changed = {change.path for change in telemt.diff_settings(Settings(), load(USERS).settings)}
    assert changed == {"access.users", "server.listeners", "censorship.mask_host", "upstreams", "dc_overrides"}


# -- types (1.2)

ACCEPTED = [
    ("general.fast_mode = false", "general.fast_mode", False),
    ("network.prefer = 4", "network.prefer", 4),
    ("server.port = 0", "server.port", 0),
    ("server.port = 65535", "server.port", 65535),
    ("general.me_reinit_every_secs = 0x7fffffffffffffff", "general.me_reinit_every_secs", 2**63 - 1),
    ("general.me_pool_min_fresh_ratio = 1", "general.me_pool_min_fresh_ratio", 1.0),
    ("general.me_pool_min_fresh_ratio = 0.25", "general.me_pool_min_fresh_ratio", 0.25),
    ("censorship.tls_domain = 1979-05-27", "censorship.tls_domain", "1979-05-27"),
    ("censorship.tls_front_dir = 1979-05-27 07:32:00Z", "censorship.tls_front_dir", "1979-05-27T07:32:00Z"),
    ("censorship.tls_front_dir = 1979-05-27T07:32:00.500+01:30", "censorship.tls_front_dir", "1979-05-27T07:32:00.5+01:30"),
    ("censorship.tls_front_dir = 07:32:00", "censorship.tls_front_dir", "07:32:00"),
    ('general.middle_proxy_nat_ip = "2001:db8::1"', "general.middle_proxy_nat_ip", ipaddress.ip_address("2001:db8::1")),
    ('server.metrics_whitelist = ["10.0.0.5/8", "10.1.0.0/255.255.0.0", "1.2.3.4", "::1", "2001:db8::5/32", "0.0.0.0/0"]',
     "server.metrics_whitelist", tuple(map(NETWORK, ["10.0.0.0/8", "10.1.0.0/16", "1.2.3.4/32", "::1/128", "2001:db8::/32", "0.0.0.0/0"]))),
    ('general.log_level = "verbose"', "general.log_level", "verbose"),
    ("general.links.show = []", "general.links.show", ()),
    ('general.links.show = ["alice", "bob"]', "general.links.show", ("alice", "bob")),
    ('dc_overrides = {2 = "1.2.3.4:443", -2 = ["", " ", " a"], 5 = [], 203 = " "}', "dc_overrides",
     {"2": ("1.2.3.4:443",), "-2": (" a",), "203": ("91.105.192.100:443",)}),
    ("server.proxy_protocol_trusted_cidrs = []", "server.proxy_protocol_trusted_cidrs", ()),
    ("access.user_enabled.alice = false\n", "access.user_enabled", {"alice": False}),
    ('access.user_max_tcp_conns."a.b" = 3', "access.user_max_tcp_conns", {"a.b": 3}),
]


@pytest.mark.parametrize(("text", "path", "expected"), ACCEPTED)
def test_accepted(text: str, path: str, expected: object) -> None:
    found = value(load(text), path)
    assert found == expected and type(found) is type(expected)


U16, U64 = "expected an integer within [0, 65535], found", "expected an integer within [0, 9223372036854775807], found"
REJECTED = [
    ('general.fast_mode = "yes"', 'general.fast_mode: expected true or false, found string "yes"'),
    ("general.fast_mode = 1", "general.fast_mode: expected true or false, found 1"),
    ("server.port = 65536", f"server.port: {U16} 65536"),
    ("server.port = -1", f"server.port: {U16} -1"),
    ("server.port = 10.0", f"server.port: {U16} 10.0"),
    ('server.port = "443"', f'server.port: {U16} string "443"'),
    ("server.port = true", f"server.port: {U16} true"),
    ("network.prefer = 256", "network.prefer: expected an integer within [0, 255], found 256"),
    ("general.me_reconnect_fast_retry_count = 4294967296",
     "general.me_reconnect_fast_retry_count: expected an integer within [0, 4294967295], found 4294967296"),
    ("general.update_every = -1", f"general.update_every: {U64} -1"),
    ("general.middle_proxy_pool_size = -1", f"general.middle_proxy_pool_size: {U64} -1"),
    ("general.update_every = 9223372036854775808", "general.update_every: integer does not fit into 64 bits"),
    ("x = [1, {y = -9223372036854775809}]", "x[1].y: integer does not fit into 64 bits"),
    ('general.me_pool_min_fresh_ratio = "0.8"', 'general.me_pool_min_fresh_ratio: expected a number, found string "0.8"'),
    ("general.me_pool_min_fresh_ratio = true", "general.me_pool_min_fresh_ratio: expected a number, found true"),
    ("censorship.tls_domain = 5", "censorship.tls_domain: expected a string, found 5"),
    ('censorship.tls_domains = "a"', 'censorship.tls_domains: expected an array, found string "a"'),
    ('censorship.tls_domains = ["a", 1]', "censorship.tls_domains[1]: expected a string, found 1"),
    *((f'general.middle_proxy_nat_ip = "{ip}"', f'general.middle_proxy_nat_ip: expected an IPv4 or IPv6 address, found string "{ip}"')
      for ip in ("", "[::1]", "fe80::1%eth0", "1.2.3.4:443", "1.2.3", "01.2.3.4", " 1.2.3.4", "host")),
    *((f'server.metrics_whitelist = ["{net}"]',
       f'server.metrics_whitelist[0]: expected a network like "10.0.0.0/8" or "fd00::/8", found string "{net}"')
      for net in ("", "10.0.0.0/33", "10.0.0.0/0.0.0.255", "10.0.0.0/255.0.255.0", "::/129", "fe80::1%1/64", "10.0.0.0/", "a/8")),
    ('general.log_level = "Normal"',
     'general.log_level: expected one of "debug", "verbose", "normal", "silent", found string "Normal"'),
    ('general.links.show = "alice"', 'general.links.show: expected "*" or an array of user names, found string "alice"'),
    ("show_link = true", 'show_link: expected "*" or an array of user names, found true'),
    ("dc_overrides.2 = 5", "dc_overrides.2: expected a string, found 5"),
    ("dc_overrides.2 = [5]", "dc_overrides.2[0]: expected a string, found 5"),
    ("general = 5", "general: expected a table, found an integer"),
    ("general.modes = []", "general.modes: expected a table, found an array"),
    ("server.listeners = {}", "server.listeners: expected an array, found a table"),
    ("upstreams = [1]", "upstreams[0]: expected a table, found an integer"),
    ("[[server.listeners]]", "server.listeners[0].ip: required key is missing"),
    ("[[upstreams]]", "upstreams[0].type: required key is missing"),
    ('[[upstreams]]\ntype = "socks5"', "upstreams[0].address: required key is missing"),
    ('[[upstreams]]\ntype = "SOCKS5"', 'upstreams[0].type: expected one of "direct", "socks4", "socks5", found string "SOCKS5"'),
    ('access.user_data_quota."a b" = -1', f'access.user_data_quota."a b": {U64} -1'),
    ("access.user_enabled.bob = 1", "access.user_enabled.bob: expected true or false, found 1"),
    ("[access.users.a]\nb = 1", "access.users.a: expected a string, found a table"),
    ("server.admin_api.enabled = true\nserver.api.enabled = true",
     "server: duplicate field `api`: [server.admin_api] is another name of [server.api]"),
    ("a = " + "[" * 5000, "arrays or tables are nested too deeply"),
]


@pytest.mark.parametrize(("text", "message"), REJECTED)
def test_rejected(text: str, message: str) -> None:
    error = refuse(text)
    assert (str(error), error.invalid) == (f"Config error: {message}", False)


def test_syntax_error_tells_the_line() -> None:
    assert str(refuse("a = 1\nb = \n")).startswith("Config error: ") and "line 3" in str(refuse("a = 1\nb = \n"))
    assert "Config error: " in str(refuse("a = 1\na = 2"))
    assert "Config error: " in str(refuse("a = " + "1" * 5000))


def test_deep_dotted_keys_are_just_unknown() -> None:
    assert load("a" + ".a" * 5000 + " = 1").unknown == {"": ("a",)}


@pytest.mark.parametrize("text", ["[access.users]\na = 31415", "access.users = \"31415\"", "server.api.auth_header = 31415",
                                  '[[upstreams]]\ntype = "socks5"\naddress = "a:1"\npassword = 31415'])
def test_messages_never_show_a_secret(text: str) -> None:
    assert "31415" not in str(refuse(text))


@pytest.mark.parametrize("table", ["access.user_expirations", "access.user_max_tcp_conns", "access.user_data_quota", "access.user_enabled"])
@pytest.mark.parametrize("lead", ["", "dd", "ee"])
def test_a_user_below_the_wrong_header_is_named_without_the_secret(table: str, lead: str) -> None:
    """Found from outside: a line appended to the file landed in its last table, and its secret in the log."""
    text = str(refuse(f'[access.users]\nalice = "{SECRET}"\n[{table}]\nbob = "{lead}{SECRET}{"6578" * bool(lead)}"'))
    assert SECRET not in text and text.startswith(f"Config error: {table}.bob: expected ")
    assert text.endswith("found a secret: users stand under [access.users]")


def test_long_and_odd_values_stay_one_printable_line() -> None:
    text = str(refuse(f'general.log_level = "a\\n\\u001b{"x" * 500}"'))
    assert text.isprintable() and len(text) < 200


def test_admin_api_is_api() -> None:
    loaded = load("[server.admin_api]\nread_only = true\nreadonly = true")
    assert loaded.settings.server.api.read_only and loaded.unknown == {"server.api": ("readonly",)}


# -- failures (3)

G = "general."
LEGACY = "legacy proxy_*_auto_reload_secs values must be > 0 when general.update_every is not set"
FAILURES = [   # row of config.md 3, text that fails, message, texts that load
    ("F1", G + "update_every = 0", "general.update_every must be > 0", [G + "update_every = 1"]),
    ("F1", G + "proxy_secret_auto_reload_secs = 0", LEGACY,
     [G + "proxy_secret_auto_reload_secs = 0\ngeneral.update_every = 5", G + "proxy_config_auto_reload_secs = 1"]),
    ("F1", G + "proxy_config_auto_reload_secs = 0", LEGACY, []),
    *((number, f"{G}{name} = 0", f"general.{name} must be > 0", [f"{G}{name} = 1"]) for number, name in (
        ("F2", "stun_nat_probe_concurrency"), ("F3", "upstream_connect_retry_attempts"), ("F4", "upstream_unhealthy_fail_threshold"),
        ("F6", "me_reinit_every_secs"), ("F9", "me_single_endpoint_outage_backoff_min_ms"), ("F12", "beobachten_minutes"),
        ("F13", "beobachten_flush_secs"), ("F18", "me_hardswap_warmup_pass_backoff_base_ms"), ("F19", "me_config_stable_snapshots"),
        ("F20", "me_snapshot_min_proxy_for_lines"), ("F21", "proxy_secret_stable_snapshots"), ("F22", "me_reinit_trigger_channel"),
        ("F25", "me_route_backpressure_base_timeout_ms"))),
    *(("F5", f"{G}rpc_proxy_req_every = {bad}", "general.rpc_proxy_req_every must be 0 or within [10, 300]",
       [f"{G}rpc_proxy_req_every = {good}" for good in (0, 10, 300)]) for bad in (1, 9, 301)),
    ("F7", G + "me_single_endpoint_shadow_writers = 33", "general.me_single_endpoint_shadow_writers must be within [0, 32]",
     [G + "me_single_endpoint_shadow_writers = 0", G + "me_single_endpoint_shadow_writers = 32"]),
    *(("F8", f"{G}me_adaptive_floor_min_writers_single_endpoint = {bad}",
       "general.me_adaptive_floor_min_writers_single_endpoint must be within [1, 32]",
       [f"{G}me_adaptive_floor_min_writers_single_endpoint = {good}" for good in (1, 32)]) for bad in (0, 33)),
    ("F10", G + "me_single_endpoint_outage_backoff_max_ms = 0", "general.me_single_endpoint_outage_backoff_max_ms must be > 0", []),
    ("F11", G + "me_single_endpoint_outage_backoff_max_ms = 249",
     "general.me_single_endpoint_outage_backoff_min_ms must be <= general.me_single_endpoint_outage_backoff_max_ms",
     [G + "me_single_endpoint_outage_backoff_max_ms = 250"]),
    ("F12", "general.beobachten = false\ngeneral.beobachten_minutes = 0", "general.beobachten_minutes must be > 0", []),
    *(("F14", f'{G}beobachten_file = "{blank}"', "general.beobachten_file cannot be empty", []) for blank in ("", " \\t")),
    ("F15", G + "me_hardswap_warmup_delay_max_ms = 0", "general.me_hardswap_warmup_delay_max_ms must be > 0", []),
    ("F16", G + "me_hardswap_warmup_delay_max_ms = 999",
     "general.me_hardswap_warmup_delay_min_ms must be <= general.me_hardswap_warmup_delay_max_ms",
     [G + "me_hardswap_warmup_delay_max_ms = 1000", G + "me_hardswap_warmup_delay_min_ms = 0"]),
    ("F17", G + "me_hardswap_warmup_extra_passes = 11", "general.me_hardswap_warmup_extra_passes must be within [0, 10]",
     [G + "me_hardswap_warmup_extra_passes = 10"]),
    *(("F23", f"{G}proxy_secret_len_max = {bad}", "general.proxy_secret_len_max must be within [32, 4096]",
       [f"{G}proxy_secret_len_max = {good}" for good in (32, 4096)]) for bad in (31, 4097)),
    *(("F24", f"{G}me_pool_min_fresh_ratio = {bad}", "general.me_pool_min_fresh_ratio must be within [0.0, 1.0]",
       [f"{G}me_pool_min_fresh_ratio = {good}" for good in ("0.0", "1.0")]) for bad in ("-0.1", "1.1", "nan", "inf", "2")),
    ("F26", G + "me_route_backpressure_high_timeout_ms = 24",
     "general.me_route_backpressure_high_timeout_ms must be >= general.me_route_backpressure_base_timeout_ms",
     [G + "me_route_backpressure_high_timeout_ms = 25"]),
    *(("F27", f"{G}me_route_backpressure_high_watermark_pct = {bad}",
       "general.me_route_backpressure_high_watermark_pct must be within [1, 100]",
       [f"{G}me_route_backpressure_high_watermark_pct = {good}" for good in (1, 100)]) for bad in (0, 101)),
    ("F28", "server.api.request_body_limit_bytes = 0", "server.api.request_body_limit_bytes must be > 0",
     ["server.api.request_body_limit_bytes = 1"]),
    ("F29", "server.api.minimal_runtime_cache_ttl_ms = 60001", "server.api.minimal_runtime_cache_ttl_ms must be within [0, 60000]",
     ["server.api.minimal_runtime_cache_ttl_ms = 0", "server.api.minimal_runtime_cache_ttl_ms = 60000"]),
    *(("F30", f'server.api.listen = "{bad}"', "server.api.listen must be in IP:PORT format",
       [f'server.api.listen = "{good}"' for good in ("0.0.0.0:0", "[::]:9091", "127.0.0.1:65535")])
      for bad in ("", "9091", "localhost:9091", "127.0.0.1", "::1:80", "[127.0.0.1]:80", "[::1]", "1.2.3.4:",
                  "1.2.3.4:65536", "1.2.3.4:+1", "[::1:80", "::1]:80")),
    ("F32", 'censorship.tls_domain = ""', "tls_domain cannot be empty", []),
    ("F33", 'censorship.mask_unix_sock = ""\ncensorship.mask = false', "mask_unix_sock cannot be empty", []),
    ("F34", f'censorship.mask_unix_sock = "/{"é" * 53}x"', "mask_unix_sock path too long: 108 bytes (max 107)",
     [f'censorship.mask_unix_sock = "/{"é" * 53}"']),
    ("F35", 'censorship.mask_unix_sock = "/x"\ncensorship.mask_host = "h"', "mask_unix_sock and mask_host are mutually exclusive",
     ['censorship.mask_unix_sock = "/x"\ncensorship.mask_host = ""']),
    ("F36", "network.ipv4 = false", "Both ipv4 and ipv6 are disabled in [network]", ["network.ipv4 = false\nnetwork.ipv6 = true"]),
    *(("F37", f"network.prefer = {bad}", "network.prefer must be 4 or 6", ["network.prefer = 6"]) for bad in (0, 5)),
    *(("F38", f'network.dns_overrides = ["ok:1:1.1.1.1", "{entry}"]', f"network.dns_overrides {message}", []) for entry, message in (
        (" ", "entry cannot be empty"), ("a:1", "entry must use host:port:ip format: 'a:1'"),
        ("a", "entry must use host:port:ip format: 'a'"),
        (" :1:1.2.3.4", "host cannot be empty: ':1:1.2.3.4'"), ("a::1.2.3.4", "port is invalid: 'a::1.2.3.4'"),
        ("a:65536:1.2.3.4", "port is invalid: 'a:65536:1.2.3.4'"), ("a:-1:1.2.3.4", "port is invalid: 'a:-1:1.2.3.4'"),
        ("a:1:1.2.3", "IP is invalid: '1.2.3'"), ("a:1:", "IP is invalid: ''"),
        ("a:1:[::1", "IP is invalid: '[::1'"), ("a:1:[::g]", "IPv6 override is invalid: '[::g]'"),
        ("a:1:[1.2.3.4]", "IPv6 override is invalid: '[1.2.3.4]'"), ("a:1:2001:db8::1", "IPv6 must be bracketed: '2001:db8::1'"))),
]
INVALID = [
    ("F39", "[access.users]", "No users configured"),
    ("F40", "general.modes.tls = false", "No modes enabled"),
    ("F41", 'censorship.tls_domain = "a b"', "Invalid tls_domain: 'a b'. Must be a valid domain name"),
    ("F41", 'censorship.tls_domain = "a/b"', "Invalid tls_domain: 'a/b'. Must be a valid domain name"),
    ("F42", f'access.user_ad_tags = {{good = "{TAG}", alice = "{TAG}f", bob = ""}}',
     "access.user_ad_tags['alice'] must be exactly 32 hex characters"),
]


@pytest.mark.parametrize(("row", "text", "message", "fine"), FAILURES)
def test_failure(row: str, text: str, message: str, fine: list[str]) -> None:
    error = refuse(text)
    assert (str(error), error.invalid) == (f"Config error: {message}", False), row
    for good in fine:
        load(good)


@pytest.mark.parametrize(("row", "text", "message"), INVALID)
def test_invalid(row: str, text: str, message: str) -> None:
    error = refuse(text)
    assert (str(error), error.invalid) == (f"Config error: {message}", True), row


@pytest.mark.parametrize("secret", ["", "0" * 31, "0" * 33, "dd" + "0" * 32, "0" * 31 + "g", "0" * 31 + "٣"])
def test_f31_has_no_prefix_and_names_the_first_in_file_order(secret: str) -> None:
    error = refuse(f'[access.users]\ngood = "{SECRET.upper()}"\nzoe = "{secret}"\nadam = "x"')
    assert str(error) == "Invalid secret for user zoe: Must be 32 hex characters" and not error.invalid


def test_f43_is_f38_at_validation() -> None:
    with pytest.raises(ConfigError, match="entry must use host:port:ip format: 'a'") as caught:
        telemt.validate_settings(telemt._with_value(Settings(), "network.dns_overrides", ("a",)))
    assert caught.value.invalid


def test_every_row_of_the_table_of_failures_is_tested() -> None:
    assert {row[0] for row in FAILURES} | {row[0] for row in INVALID} | {"F31", "F43"} == {f"F{number}" for number in range(1, 44)}


STEPS = [      # one fault per step, in the order in which they must be found
    ("general", "fast_mode = 1", "general.fast_mode:"),
    ("general", "update_every = 0", "general.update_every must"),
    ("general", "stun_nat_probe_concurrency = 0", "general.stun_nat"),
    ("general", "me_reinit_every_secs = 0", "general.me_reinit"),
    ("general", "me_single_endpoint_outage_backoff_min_ms = 9999", "general.me_single_endpoint_outage_backoff_min_ms must be <="),
    ("general", "proxy_secret_len_max = 1", "general.proxy_secret_len_max"),
    ("server.api", 'listen = ""', "server.api.listen"),
    ("server.api", "runtime_edge_top_n = 0", "server.api.runtime_edge_top_n"),
    ("access.users", 'alice = "x"', "Invalid secret"),
    ("censorship", 'mask_unix_sock = ""', "mask_unix_sock cannot be empty"),
    ("network", "prefer = 5", "network.prefer"),
    ("network", 'dns_overrides = [""]', "network.dns_overrides"),
    ("general.modes", "tls = false", "No modes"),
    ("access.user_ad_tags", 'a = ""', "access.user_ad_tags"),
]


@pytest.mark.parametrize("first", range(len(STEPS)))
def test_first_failure_wins(first: int) -> None:
    tables: dict[str, list[str]] = {}
    for name, line, _ in STEPS[first:]:
        tables.setdefault(name, []).append(line)
    tables.setdefault("access.users", [f'alice = "{SECRET}"'])
    text = "".join(f"[{name}]\n" + "\n".join(lines) + "\n" for name, lines in reversed(tables.items()))
    assert STEPS[first][2] in str(refuse(text))


# -- normalisation (1.3)

NORMALISED = [      # step, text, path, value in force, pieces of the one warning ("" = none)
    (1, "", "general.update_every", 300, ""),
    (1, "general.proxy_secret_auto_reload_secs = 60", "general.update_every", None, ""),
    (1, "general.proxy_config_auto_reload_secs = 60\ngeneral.update_every = 5", "general.update_every", 5, ""),
    (2, 'network.stun_servers = [" a:1 ", "", "b:2", "a:1"]', "network.stun_servers", ("a:1", "b:2"), ""),
    (2, "network.stun_servers = []", "network.stun_servers", (), ""),
    (2, 'network.stun_servers = ["a:1"]\ngeneral.middle_proxy_nat_stun = "b:2"', "network.stun_servers", ("a:1",), "ignored"),
    (2, 'general.middle_proxy_nat_stun = " x:1"\ngeneral.middle_proxy_nat_stun_servers = ["x:1", "stun.gmx.net:3478", "", "y:2"]',
     "network.stun_servers", (*VECTOR["defaults"]["network.stun_servers"], "x:1", "y:2"), "deprecated"),
    (2, 'general.middle_proxy_nat_stun = "x:1"', "general.middle_proxy_nat_stun", None, "deprecated"),
    (2, 'general.middle_proxy_nat_stun_servers = ["x:1"]', "general.middle_proxy_nat_stun_servers", (), "deprecated"),
    (3, f'general.ad_tag = "{TAG}"', "general.ad_tag", TAG, ""),
    (3, f'general.ad_tag = "{TAG}0"', "general.ad_tag", None, "general.ad_tag"),
    (3, 'general.ad_tag = ""', "general.ad_tag", None, "general.ad_tag"),
    (5, "general.me_reinit_drain_timeout_secs = 89", "general.me_reinit_drain_timeout_secs", 90, "me_reinit_drain_timeout_secs: 89"),
    (5, "general.me_reinit_drain_timeout_secs = 0", "general.me_reinit_drain_timeout_secs", 0, ""),
    (5, "general.me_pool_drain_ttl_secs = 120", "general.me_reinit_drain_timeout_secs", 120, ""),
    (7, 'censorship.tls_domain = "a.example"', "censorship.mask_host", "a.example", ""),
    (7, 'censorship.mask_host = "b.example"', "censorship.mask_host", "b.example", ""),
    (7, 'censorship.mask_unix_sock = "/x"', "censorship.mask_host", None, ""),
    (8, 'censorship.tls_domains = ["b", "", "petrovich.ru", "B", "a", "b"]', "censorship.tls_domains", ("b", "B", "a"), ""),
    (9, "general.prefer_ipv6 = true\nnetwork.ipv6 = true\ngeneral.use_middle_proxy = false", "network.prefer", 6, "prefer_ipv6"),
    (10, "general.middle_proxy_nat_probe = false", "general.middle_proxy_nat_probe", True, "middle_proxy_nat_probe"),
    (10, "general.middle_proxy_nat_probe = false\ngeneral.use_middle_proxy = false", "general.middle_proxy_nat_probe", False, ""),
    (11, "network.ipv4 = false\nnetwork.ipv6 = true\ngeneral.use_middle_proxy = false", "network.prefer", 6, "network.prefer: 4"),
    (11, "network.prefer = 6", "network.prefer", 4, "network.prefer: 6"),
    (13, "network.ipv6 = true", "network.ipv6", True, "experimental"),
    (13, "network.ipv6 = true\ngeneral.use_middle_proxy = false", "network.ipv6", True, ""),
    (14, "censorship.tls_emulation = false", "censorship.fake_cert_len", 1500, ""),
    (14, "censorship.tls_emulation = false\ncensorship.fake_cert_len = 2049", "censorship.fake_cert_len", 2049, ""),
    (17, 'show_link = "*"\ngeneral.links.show = []', "general.links.show", "*", ""),
    (17, 'show_link = ["alice"]\ngeneral.links.show = ["bob"]', "general.links.show", ("bob",), ""),
    (10.8, 'show_link = ["alice"]', "general.links.show", ("alice",), ""),
    (10.8, "show_link = []", "general.links.show", (), ""),
    (18, '[[upstreams]]\ntype = "direct"\nweight = 7', "upstreams", (telemt.Upstream(type="direct", weight=7),), ""),
    (19, "dc_overrides = {203 = 'x'}", "dc_overrides", {"203": ("x",)}, ""),
]


@pytest.mark.parametrize(("step", "text", "path", "expected", "warning"), NORMALISED)
def test_normalisation(step: float, text: str, path: str, expected: object, warning: str) -> None:
    loaded = load(text)
    assert value(loaded, path) == expected, step
    assert len(loaded.warnings) == bool(warning) and all(warning in line for line in loaded.warnings), loaded.warnings


def test_prefer_ipv6_alone_ends_up_as_4_with_two_warnings() -> None:
    loaded = load("general.prefer_ipv6 = true")
    assert loaded.settings.network.prefer == 4 and len(loaded.warnings) == 2


LISTENERS = [
    ("", ["0.0.0.0", "::"]),
    ('server.listen_addr_ipv4 = ""\nserver.listen_addr_ipv6 = "10.0.0.1"', ["10.0.0.1"]),
    ('server.listen_addr_ipv4 = "host"\nserver.listen_addr_ipv6 = "[::]"', []),
    ("server.listen_tcp = false", []),
    ('server.listen_unix_sock = "/x"', ["0.0.0.0", "::"]),
    ('server.listen_tcp = false\nserver.listeners = [{ip = "1.2.3.4"}]', ["1.2.3.4"]),
]


@pytest.mark.parametrize(("text", "ips"), LISTENERS)
def test_listeners(text: str, ips: list[str]) -> None:
    assert [str(entry.ip) for entry in load(text).settings.server.listeners] == ips


def test_announce_ip_becomes_announce() -> None:
    first, second = load('server.listeners = [{ip = "::", announce_ip = "2001:db8::1"},'
                         ' {ip = "::1", announce = "host", announce_ip = "1.2.3.4"}]').settings.server.listeners
    assert (first.announce, first.announce_ip) == ("2001:db8::1", None)
    assert second.announce == "host"


def test_fake_cert_len_is_drawn_once_per_process() -> None:
    numbers = iter([1024, 4095])
    draws, document = telemt.Draws(lambda: next(numbers)), telemt.parse_document("censorship.tls_emulation = false")
    assert [telemt.parse_settings(document, draws).settings.censorship.fake_cert_len for _ in range(3)] == [1024] * 3


def test_upstream_keys_of_other_types_are_not_looked_at() -> None:
    direct, socks = load('[[upstreams]]\ntype = "direct"\naddress = 5\npassword = 1\nbind_addresses = ["1.2.3.4"]\n'
                         '[[upstreams]]\ntype = "socks4"\naddress = "h:1"\nuser_id = "u"\nusername = 3').settings.upstreams
    assert (direct.address, direct.password, direct.bind_addresses) == ("", None, ("1.2.3.4",))
    assert (socks.address, socks.user_id, socks.username) == ("h:1", "u", None)


def test_what_was_written() -> None:
    loaded = load(f'[access.users]\na = "{SECRET}"\n[general.links]\nshow = "*"')
    assert loaded.users_explicit


# -- clamps (8 item 8)

CLAMPS = [
    ("general.me_keepalive_interval_secs", 0, 1, (1,)),
    ("general.max_client_frame", 4095, 4096, (4096, 2**40)),
    ("timeouts.client_handshake", 0, 30, (1,)),
    ("timeouts.tg_connect", 0, 1, (1,)),
    ("timeouts.client_keepalive", 0, 1, (1, 32767)),
    ("timeouts.client_keepalive", 32768, 32767, ()),
    ("timeouts.client_ack", 2147484, 2147483, (0, 2147483)),
    ("server.api.request_body_limit_bytes", 1048577, 1048576, (1, 1048576)),
    ("censorship.mask_proxy_protocol", 3, 1, (0, 1, 2)),
    ("censorship.server_hello_delay_max_ms", 30000, 15000, (29999,)),
]


@pytest.mark.parametrize(("path", "found", "used", "fine"), CLAMPS)
def test_clamp(path: str, found: int, used: int, fine: tuple[int, ...]) -> None:
    loaded = load(f"{path} = {found}")
    assert value(loaded, path) == used
    assert loaded.warnings == (f"{path}: {found} is out of range, using {used}",)
    for good in fine:
        assert (value(load(f"{path} = {good}"), path), load(f"{path} = {good}").warnings) == (good, ())


def test_hello_delay_is_judged_by_the_handshake_time_in_force() -> None:
    loaded = load("timeouts.client_handshake = 0\ncensorship.server_hello_delay_max_ms = 29999")
    assert loaded.settings.censorship.server_hello_delay_max_ms == 29999
    assert load("timeouts.client_handshake = 1\ncensorship.server_hello_delay_max_ms = 1000").settings.censorship \
        .server_hello_delay_max_ms == 500


def test_odd_names_are_dropped_with_a_warning() -> None:
    loaded = load('censorship.tls_domains = ["a b", "a/b", "\\u00a0", "ok"]\ncensorship.mask_host = ""')
    assert loaded.settings.censorship.tls_domains == ("ok",) and loaded.settings.censorship.mask_host == "petrovich.ru"
    assert len(loaded.warnings) == 4 and "mask_host" in loaded.warnings[0]


# -- advice (8 items 7, 15, 24, 25)

UNKNOWN = [
    ("a = 1\nb = 2\n[c]\nd = 1", ["unknown keys in [top level] ignored: a, b, c"]),
    ("general.fast_mod = true", ['unknown keys in [general] ignored: fast_mod (did you mean "general.fast_mode"?)']),
    ("[server]\nprot = 1\nzzz = 1", ['unknown keys in [server] ignored: prot (did you mean "server.port"?), zzz']),
    ("general.tg_connect = 5", ['unknown keys in [general] ignored: tg_connect (did you mean "timeouts.tg_connect"?)']),
    ("genral.x = 1\nfast_mode = true", ['unknown keys in [top level] ignored: genral (did you mean "general"?), '
                                        'fast_mode (did you mean "general.fast_mode"?)']),
    ("general.config_strict = true\ngeneral.me_writer_pick_mode = 'p2c'",
     ["unknown keys in [general] ignored: config_strict, me_writer_pick_mode"]),
    ('[server.api]\nendpoint = ""\n[general.modes]\nold = true\n[server]\n"q.x" = 1',
     ["unknown keys in [server] ignored: \"q.x\"", "unknown keys in [server.api] ignored: endpoint",
      "unknown keys in [general.modes] ignored: old"]),
    ('[[upstreams]]\ntype = "direct"\nq1 = 1\nq2 = 1\n[[upstreams]]\ntype = "direct"\nq2 = 1\nweigth = 2',
     ['unknown keys in [[upstreams]] ignored: q1, q2, weigth (did you mean "upstreams[].weight"?)']),
    ('server.listeners = [{ip = "::", qq = 1}, {ip = "::1", qq = 2}]', ["unknown keys in [[server.listeners]] ignored: qq"]),
    ("general." + "\ngeneral.".join(f"q{n:02d} = 1" for n in range(23)),
     ["unknown keys in [general] ignored: " + ", ".join(f"q{n:02d}" for n in range(20)) + ", and 3 more"]),
    ("access.user_max_tcp_conns.anything = 5\ndc_overrides.77 = 'x'\naccess.user_enabled.nobody = false", []),
    ("server.conntrack.mode = 1", ["unknown keys in [server] ignored: conntrack"]),
]


@pytest.mark.parametrize(("text", "lines"), UNKNOWN)
def test_unknown_keys(text: str, lines: list[str]) -> None:
    assert list(load(text).warnings) == lines


def test_unknown_keys_are_all_kept_for_check() -> None:
    loaded = load("general." + "\ngeneral.".join(f"q{n:02d} = 1" for n in range(23)))
    assert loaded.unknown == {"general": tuple(f"q{n:02d}" for n in range(23))}


def test_public_secrets_warn() -> None:
    loaded = load(f'[access.users]\na = "{"0" * 32}"\nb = "{SECRET}"\nc = "{"0" * 32}"\n[access.user_ad_tags]\nb = "{"0" * 32}"')
    assert [line.split(":")[0:2] for line in loaded.warnings] == [
        ["access.users", " user a has the public all-zero secret, anybody can use this proxy"],
        ["access.users", " user c has the public all-zero secret, anybody can use this proxy"],
        ["access.user_ad_tags", " the tag of user b is all zeros"]]


def test_public_secrets_of_a_crowd_are_not_all_listed():
    """Found from outside: 100,000 users with the zero secret were 100,000 lines of log at every start."""
    users = "\n".join(f'u{n} = "{"0" * 32}"' for n in range(200))
    warnings = load(f"[access.users]\n{users}\n[access.user_ad_tags]\n{users}").warnings
    assert len(warnings) == 2 * 51 and warnings.count("and 150 more") == 2



def test_zero_limits() -> None:
    loaded = load("access.user_max_unique_ips = {alice = 0, ghost = 0}\naccess.user_max_tcp_conns = {alice = 0}\n"
                  "access.user_data_quota.alice = 1")
    texts = [f"access.{key}: 0 blocks user alice (no limit = remove the entry)" for key in ("user_max_tcp_conns", "user_max_unique_ips")]
    assert list(loaded.warnings) == texts
    access = loaded.settings.access
    before = load("access.user_max_unique_ips.alice = 0\naccess.user_max_tcp_conns.alice = 1").settings.access
    assert telemt.zero_limit_warnings(access, access) == []
    assert telemt.zero_limit_warnings(access, before) == texts[:1]


def test_zero_limits_end_after_50_lines() -> None:
    names = [f"u{n}" for n in range(52)]
    text = "[access.users]\n" + "".join(f'{name} = "{SECRET}"\n' for name in names) + "[access.user_data_quota]\n"
    assert len(load(text + "".join(f"{name} = 0\n" for name in names[:50])).warnings) == 50
    warnings = load(text + "".join(f"{name} = 0\n" for name in names)).warnings
    assert len(warnings) == 51 and warnings[-1] == "and 2 more"


NO_WAY = ("no enabled upstream: every connection to Telegram will fail",)
UPSTREAMS = [
    ('[[upstreams]]\ntype = "direct"\n[[upstreams]]\ntype = "shadowsocks"\nurl = "ss://x"\nweight = "heavy"', [True, False],
     ('upstreams[1]: type "shadowsocks" is not supported, entry disabled',), ()),
    ('[[upstreams]]\ntype = "shadowsocks"\nenabled = true', [False],
     ('upstreams[0]: type "shadowsocks" is not supported, entry disabled',), NO_WAY),
    ('[[upstreams]]\ntype = "direct"\nenabled = false', [False], (), NO_WAY),
]


@pytest.mark.parametrize(("text", "enabled", "warnings", "errors"), UPSTREAMS)
def test_upstreams_that_cannot_be_used(text: str, enabled: list[bool], warnings: tuple[str, ...], errors: tuple[str, ...]) -> None:
    loaded = load(text)
    assert [entry.enabled for entry in loaded.settings.upstreams] == enabled
    assert (loaded.warnings, loaded.errors) == (warnings, errors)


def test_settings_without_effect() -> None:
    assert load("timeouts.me_one_retry = 3\ngeneral.ntp_check = false\ngeneral.ntp_servers = ['pool.ntp.org']").without_effect == (
        "general.ntp_check", "timeouts.me_one_retry")


# -- our own keys (2.9)

URL = "must be an https URL (plain http only to a loopback host)"
EXTENSIONS = [
    *((f'general.{key} = "{url}"', f"general.{key} {URL}") for key in ("proxy_secret_url", "proxy_config_v4_url", "proxy_config_v6_url")
      for url in ("", "http://example.org/", "ftp://a/", "https://", "http://localhost@example.org/", "http://127.0.0.1.example.org/",
                  "https://a b/", "http://[::2]/", "http://10.0.0.1/", "https://a:65536/", "http://[127.0.0.1]/", "//a")),
    *((f'general.{key} = " "', f"general.{key} cannot be empty when provided")
      for key in ("proxy_config_v4_cache_path", "proxy_config_v6_cache_path", "quota_state_path")),
    *((f'server.metrics_listen = "{text}"', "server.metrics_listen must be in IP:PORT format") for text in ("", "9090", "host:9090")),
    *((f"server.api.runtime_edge_cache_ttl_ms = {n}", "server.api.runtime_edge_cache_ttl_ms must be within [0, 60000]")
      for n in (-1, 60001)),
    *((f"server.api.runtime_edge_top_n = {n}", "server.api.runtime_edge_top_n must be within [1, 1000]") for n in (-1, 0, 1001)),
    *((f"server.api.runtime_edge_events_capacity = {n}", "server.api.runtime_edge_events_capacity must be within [16, 4096]")
      for n in (15, 4097)),
    ('general.event_loop = "asyncio"',
     'general.event_loop: expected one of "auto", "epoll", "selectors", "uvloop", found string "asyncio"'),
    ("server.api.ui = 1", "server.api.ui: expected true or false, found 1"),
]


@pytest.mark.parametrize(("text", "message"), EXTENSIONS)
def test_extension_refused(text: str, message: str) -> None:
    assert str(refuse(text)) == f"Config error: {message}"


@pytest.mark.parametrize("text", [
    *(f'general.proxy_secret_url = "{url}"' for url in (
        "https://example.org/x?y=1#z", "HTTPS://a", "http://localhost:8080/", "http://[::1]/x", "http://127.9.9.9",
        "https://[2001:db8::1]:443/", "https://a:65535")),
    *(f"server.api.runtime_edge_cache_ttl_ms = {n}" for n in (0, 60000)), *(f"server.api.runtime_edge_top_n = {n}" for n in (1, 1000)),
    *(f"server.api.runtime_edge_events_capacity = {n}" for n in (16, 4096)), 'server.metrics_listen = "[::1]:9090"',
    'general.quota_state_path = "q.json"', 'general.event_loop = "uvloop"', 'server.api.allowed_hosts = ["h"]'])
def test_extension_accepted(text: str) -> None:
    assert load(text).warnings == ()


def test_dns_overrides() -> None:
    table = telemt.parse_dns_overrides([" Mask.Example : 443 : 1.2.3.4 ", "mask.example:443:[2001:db8::1]", "ÄB:+80:0.0.0.0",
                                        "x:0:1.1.1.1"])
    assert {key: str(ip) for key, ip in table.items()} == {
        ("mask.example", 443): "2001:db8::1", ("Äb", 80): "0.0.0.0", ("x", 0): "1.1.1.1"}


# -- expirations (7)

def utc(*parts: int) -> datetime.datetime:
    return datetime.datetime(*parts, tzinfo=datetime.UTC)  # type: ignore[arg-type]


NEW_YEAR = utc(2027, 1, 1)
MOMENTS = [
    *((text, NEW_YEAR) for text in (
        "2027-01-01T00:00:00Z", "2027-01-01t00:00:00z", "2027-01-01 00:00:00UTC", "2027-01-01 00:00:00 utc", "2027-1-1 0:0:0Z",
        "2027-01-01T03:00:00+03:00", "2026-12-31T21:00:00-0300", "2026-12-31T21:00:00 - 03 00", "2026-12-31T21:00:00−03:00",
        " 2027 - 01 - 01   00 : 00 : 00 +00:00 ", "2027-01-01T00:00:00.000Z", "2026-12-31T23:59:60Z", "2027-01-01T05:45:00+5:45")),
    ("2027-01-01T00:00:00.5Z", utc(2027, 1, 1, 0, 0, 0, 500_000)),
    ("2027-01-01T00:00:00.1234567890123Z", utc(2027, 1, 1, 0, 0, 0, 123_456)),
    ("2028-02-29T12:34:56+23:59", utc(2028, 2, 28, 12, 35, 56)),
]
NO_MOMENTS = [
    "", "2027-01-01", "2027-01-01T00:00:00", "2027-01-01T00:00Z", "00:00:00Z", "2027-02-29T00:00:00Z", "2027-13-01T00:00:00Z",
    "2027-01-01T24:00:00Z", "2027-01-01T00:60:00Z", "2027-01-01T00:00:61Z", "2027-01-01T00:00:00+24:00", "2027-01-01T00:00:00+01:60",
    "2027-01-01T00:00:00+0", "2027-01-01T00:00:00+", "2027-01-01T00:00:00.Z", "2027/01/01T00:00:00Z", "2027-01-01T00:00:00Zx",
    "2027-01-0100:00:00Z", "20270-01-01T00:00:00Z", "2027-01-01T00:00:00 CET", "0001-01-01T00:00:00+00:01",
    "9999-12-31T23:59:59-00:01", "0000-01-01T00:00:00Z", "tomorrow", "٢٠٢٧-01-01T00:00:00Z"]


@pytest.mark.parametrize(("text", "moment"), MOMENTS)
def test_expiration(text: str, moment: datetime.datetime) -> None:
    found = telemt.parse_expiration(text)
    assert found == moment and found is not None and found.tzinfo is datetime.UTC
    assert load(f'access.user_expirations.bob = "{text}"').settings.access.user_expirations == {"bob": moment}


@pytest.mark.parametrize("text", NO_MOMENTS)
def test_no_expiration(text: str) -> None:
    assert telemt.parse_expiration(text) is None
    assert f'access.user_expirations.bob: expected date, time and offset like "2027-01-31T23:59:59Z", found string "{text}"' in str(
        refuse(f'access.user_expirations = {{alice = "2027-01-01T00:00:00Z", bob = "{text}"}}'))


@pytest.mark.parametrize("text", ["2027-01-01T00:00:00Z", "2027-01-01 03:00:00+03:00", "2026-12-31t21:00:00.000-03:00"])
def test_native_date_time_with_offset(text: str) -> None:
    assert load(f"access.user_expirations.bob = {text}").settings.access.user_expirations == {"bob": NEW_YEAR}


@pytest.mark.parametrize("text", ["2027-01-01T00:00:00", "2027-01-01", "00:00:00", "1798761600", "true", "[]"])
def test_native_date_time_without_offset(text: str) -> None:
    assert "access.user_expirations.bob: expected date, time and offset" in str(refuse(f"access.user_expirations.bob = {text}"))


def test_expiration_parser_is_linear() -> None:
    for text in ("2027-01-01" + " " * 60_000, "2027-01-01T00:00:00+1" + " " * 60_000 + "x", "2027-01-01T00:00:00" + " " * 60_000):
        assert telemt.parse_expiration(text) is None


# -- includes (1.1, 8 item 21)

class Files(dict[str, str]):
    """A directory in memory, with the path rule of the operating system reduced to `dir/name`."""

    def read(self, including: str, wanted: str) -> tuple[str, str]:
        path = wanted if wanted.startswith("/") else including.rpartition("/")[0] + "/" + wanted
        if path not in self:
            raise FileNotFoundError(2, "No such file or directory", path)
        return path, self[path]


def expand(text: str, **files: str) -> str:
    return telemt.expand_includes(text, "/c/main", Files({f"/c/{name}": content for name, content in files.items()}).read)[0]


@pytest.mark.parametrize("line", ['include = "a"', "include=a", "  include  =  'a'  ", '\tinclude = "a" # why', "include = 'a'# why",
                                  "include = a # why # not", 'include = ""a""', "include = a\r"])
def test_include_lines(line: str) -> None:
    assert expand(f"x = 1\n{line}\ny = 2", a="z = 3\n") == "x = 1\nz = 3\n\ny = 2"


@pytest.mark.parametrize("line", ['includes = "a"', 'include_x = "a"', '# include = "a"', 'x.include = "a"', "include",
                                  '"include" = "a"', "[include]", 'x = """include = "a""""'])
def test_other_lines(line: str) -> None:
    assert expand(line, a="z = 3") == line


@pytest.mark.parametrize(("before", "after"), [
    ('x = """', '"""'), ("x = '''", "'''"), ('x = """a"b""c\\', 'd"""'), ('x = """\\"""', '"""'), ("x = ['''", "''', 1]"),
    ('x = "#" # "\ny = """', '"""'), ("x = '\"\"\"'\ny = '''", "'''"), ('x = """""" + """', '"""'), ("x = '''''' '''", "'''")])
def test_lines_of_multi_line_strings_are_no_directives(before: str, after: str) -> None:
    text = f'{before}\ninclude = "a"\n{after}'
    assert expand(text, a="") == text
    assert expand(text + '\ninclude = "a"', a="z = 3") == text + "\nz = 3"


@pytest.mark.parametrize("line", ['x = "\\""', "x = '\\'", 'x = "\'\'\'"', "x = 1 # '''", 'x = """a"""', "x = '''a''''",
                                  'x = """a"""""', 'x = "unfinished', 'x = ""'])
def test_closed_strings_do_not_hide_an_include(line: str) -> None:
    assert expand(f"{line}\ninclude = a", a="z = 3") == f"{line}\nz = 3"


def test_included_file_leaves_its_table_and_its_string_open() -> None:
    assert load(expand('include = "a"\nport = 77', a=USERS + "[server]")).settings.server.port == 77
    assert expand('include = "a"\ninclude = "b"\n"""', a='x = """', b="no") == 'x = """\ninclude = "b"\n"""'


def test_include_is_relative_to_its_own_file() -> None:
    files = Files({"/c/sub/a": 'include = "b"', "/c/sub/b": 'include = "/abs"', "/abs": "\ufeffx = 1"})
    text, paths = telemt.expand_includes('include = "sub/a"\ninclude = "sub/b"', "/c/main", files.read)
    assert (text, paths) == ("x = 1\nx = 1", ("/c/sub/a", "/c/sub/b", "/abs"))


def test_include_depth() -> None:
    chain = {f"f{n}": f"include = f{n + 1}" for n in range(1, 10)} | {"f10": "x = 1"}
    assert expand("include = f1", **chain) == "x = 1"
    with pytest.raises(ConfigError) as caught:
        expand("include = f1", **chain | {"f10": "include = f11", "f11": ""})
    assert str(caught.value) == "Config error: Include depth > 10: /c/main" + "".join(f" -> /c/f{n}" for n in range(1, 12))
    with pytest.raises(ConfigError, match=r"Include depth > 10: /c/main -> /c/a -> /c/b -> /c/a"):
        expand("include = a", a="include = b", b="include = a")


def test_include_that_cannot_be_read() -> None:
    with pytest.raises(ConfigError) as caught:
        expand('include = "nowhere"')
    assert str(caught.value) == 'Config error: /c/main: cannot include "nowhere": No such file or directory (os error 2)'

    def refuse_nul(including: str, wanted: str) -> tuple[str, str]:
        raise ValueError("embedded null byte")
    with pytest.raises(ConfigError, match="embedded null byte"):
        telemt.expand_includes("include = a\0", "/c/main", refuse_nul)


def test_byte_order_mark() -> None:
    assert expand("\ufeffinclude = a", a="\ufeffx = 1") == "x = 1"
    assert telemt.parse_document("\ufeffx = 1") == {"x": 1}


# -- differences

def test_diff() -> None:
    old = load("").settings
    new = load('server.port = 80\ngeneral.hardswap = false\ngeneral.modes.secure = true\naccess.user_data_quota.a = 5\n'
               'server.listeners = [{ip = "::"}]\ngeneral.ntp_check = false').settings
    changes = telemt.diff_settings(old, new)
    assert [(change.path, change.reload) for change in changes] == [
        ("general.modes.secure", Reload.HOT_OURS), ("general.hardswap", Reload.HOT), ("general.ntp_check", Reload.NO_EFFECT),
        ("server.port", Reload.RESTART_OURS), ("server.listeners", Reload.RESTART), ("access.user_data_quota", Reload.HOT)]
    assert (changes[3].old, changes[3].new) == (443, 80)
    assert telemt.diff_settings(old, load("").settings) == ()


# -- what a reload does and says


def reloaded(old, new, users=f'[access.users]\nalice = "{SECRET}"\n'):
    """(restart lines, hot lines) of a change from one text to the other."""
    pair = [settings_of(text if "[access.users]" in text else text + "\n" + users) for text in (old, new)]
    return telemt.describe_restart(*pair), telemt.describe_hot(*pair)


@pytest.mark.parametrize(("old", "new", "line"), [
    ("[server]\nport = 443", "[server]\nport = 8443", "server.port changed (443 → 8443)"),
    ("", "[server.api]\nenabled = true\nread_only = true", "server.api changed"),
    ("", '[censorship]\ntls_domain = "a.b"', "censorship.tls_domain changed ('petrovich.ru' → 'a.b')"),
    ("[network]\nprefer = 4", "[network]\nipv6 = true\n", "network.ipv4/ipv6 changed"),
    ("[general]\nuse_middle_proxy = true", "[general]\nuse_middle_proxy = false", "use_middle_proxy changed"),
    ("", "[general]\nstun_nat_probe_concurrency = 3", "general.stun_nat_probe_concurrency changed"),
    ("", "[general]\nupstream_connect_retry_attempts = 3\nrpc_proxy_req_every = 20", "general.upstream_* changed"),
    ("", '[[upstreams]]\ntype = "direct"\nweight = 3', "upstreams changed"),
    ("", '[[server.listeners]]\nip = "127.0.0.1"', "server.listeners changed"),
    ("", '[server]\nlisten_addr_ipv4 = "127.0.0.1"', "server.listen_addr_ipv4 changed"),
    ("", "[timeouts]\ntg_connect = 3", "timeouts.tg_connect changed"),
])
def test_what_waits_for_a_restart_is_named(old, new, line):
    assert reloaded(old, new) == ([f"{line}; restart required"], [])


@pytest.mark.parametrize(("old", "new", "line"), [
    ("", '[general]\nlog_level = "debug"', "log_level: 'normal' → 'debug'"),
    ("", f'[access.user_ad_tags]\nalice = "{SECRET}"', "user_ad_tags updated (1 entries)"),
    ("", '[network]\ndns_overrides = ["a.b:1:1.2.3.4"]', "network.dns_overrides updated (1 entries)"),
    ("", "[access.user_max_tcp_conns]\nalice = 1\nbob = 2", "user_max_tcp_conns updated (2 entries)"),
    ('[access.user_expirations]\nalice = "2030-01-01T00:00:00Z"', "", "user_expirations updated (0 entries)"),
    ("", "[access.user_data_quota]\nalice = 1", "user_data_quota updated (1 entries)"),
    ("", "[access.user_max_unique_ips]\nalice = 1", "user_max_unique_ips updated (1 entries)"),
    ("", "[access.user_enabled]\nalice = false\nbob = true", "user_enabled updated (1 disabled overrides)"),
    ("", f'[general]\nad_tag = "{SECRET}"', "general.ad_tag updated (applied on next connection)"),
    ("", "[general]\ndesync_all_full = true", "desync_all_full: false → true"),
    ("", "[general]\nhardswap = false", "hardswap: true → false"),
    ("", "[general]\nupdate_every = 60", "update_every(effective): 300s → 60s"),
    ("", "[general]\nproxy_secret_auto_reload_secs = 100", "update_every(effective): 300s → 100s"),
    ("", "[general]\nme_pool_drain_ttl_secs = 60", "me_pool_drain_ttl_secs: 90s → 60s"),
    ("", "[general]\nme_reinit_drain_timeout_secs = 0", "me_reinit_drain_timeout_secs: 120s → 0s"),
    ("", "[general]\nme_pool_min_fresh_ratio = 0.5", "me_pool_min_fresh_ratio: 0.800 → 0.500"),
    ("", "[general]\nme_keepalive_interval_secs = 25\nme_keepalive_jitter_secs = 5",
     "me_keepalive: enabled=true interval=25s jitter=5s random_payload=true"),
    ("", '[general.telemetry]\ncore_enabled = false\nme_level = "silent"',
     "telemetry: core_enabled=false user_enabled=true me_level=silent"),
    ("", '[general]\nme_socks_kdf_policy = "compat"', "me_socks_kdf_policy: Strict → Compat"),
    ("", '[general]\nme_floor_mode = "static"', "me_floor: mode=Static idle=90s min_single=1 recover_grace=180s"),
    ("", "[general]\nme_route_backpressure_high_timeout_ms = 200", "me_route_backpressure: base=25ms high=200ms watermark=80%"),
    ("", "[general]\nfast_mode = false", "general.fast_mode: true → false"),
    ("", '[general.links]\npublic_host = "h"', "general.links.public_host: none → 'h'"),
    ("", '[general.links]\nshow = ["alice", "bob"]', "general.links.show: '*' → ['alice', 'bob']"),
    ("", '[dc_overrides]\n2 = "1.2.3.4:443"', "dc_overrides: {203: ['91.105.192.100:443']} → "
                                              "{2: ['1.2.3.4:443'], 203: ['91.105.192.100:443']}"),
    ("", '[server]\nproxy_protocol_trusted_cidrs = ["10.0.0.0/8"]', "server.proxy_protocol_trusted_cidrs: none → [10.0.0.0/8]"),
    ("", "[general]\nauto_degradation_enabled = false", "general.auto_degradation_enabled: true → false"),
    ("", '[censorship]\nmask_host = "m.example"', "censorship.mask_host: 'petrovich.ru' → 'm.example'"),
])
def test_what_is_in_force_at_once_is_named(old, new, line):
    assert reloaded(old, new) == ([], [line])


def test_users_are_named_last_and_sorted():
    def users(**secrets):
        return "[access.users]\n" + "".join(f'{name} = "{secret * 32}"\n' for name, secret in secrets.items())
    assert reloaded(users(a="1", b="1", c="1", d="1"), "[general]\nhardswap = false\n" + users(z="1", y="1", a="2", b="2", d="1"))[1] == [
        "hardswap: true → false", "users added: [y, z]", "users removed: [c]", "users secret changed: [a, b]"]


@pytest.mark.parametrize("text", ["[access]\nreplay_check_len = 5\nreplay_window_secs = 9\nignore_time_skew = true",
                                  "[general]\nntp_check = false\nmiddle_proxy_pool_size = 3", "[x]\ny = 1", ""])
def test_some_changes_are_not_told(text):
    assert reloaded("", text) == ([], [])


def test_a_reload_publishes_only_what_it_applies():
    old = settings_of("[server]\nport = 1\n")
    new = settings_of('[server]\nport = 2\n[general]\nfast_mode = false\n[timeouts]\nclient_ack = 7\ntg_connect = 7\n'
                      '[censorship]\nmask_port = 9\n')
    merged = telemt.merge_hot(old, new)
    assert (merged.server.port, merged.timeouts.tg_connect) == (1, 10)
    assert (merged.general.fast_mode, merged.timeouts.client_ack, merged.censorship.mask_port) == (False, 7, 9)
    assert telemt.merge_hot(merged, old) == old


def test_a_mask_host_that_follows_the_domain_waits_with_it():
    """Masking towards the new site while the old one's certificate is shown would give us away."""
    old, new = settings_of('[censorship]\ntls_domain = "a.b"'), settings_of('[censorship]\ntls_domain = "c.d"')
    assert telemt.merge_hot(old, new).censorship.mask_host == "a.b"
    assert reloaded('[censorship]\ntls_domain = "a.b"', '[censorship]\ntls_domain = "c.d"')[1] == []
    explicit = settings_of('[censorship]\ntls_domain = "c.d"\nmask_host = "e.f"')
    assert telemt.merge_hot(old, explicit).censorship.mask_host == "e.f"
