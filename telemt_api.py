"""telemt_api.py - what operators see and steer: the Control API `/v1` and the metrics of telemt.py.

telemt.py imports this file when the configuration enables the API or the metrics; without it the proxy runs on.  It works
in its own threads.  They read plain integers of the data plane and ask its loop for everything else (`ControlPort`), so
that no HTTP client, slow or hostile, holds up a session.  telemt.py runs as `__main__`: to import it here would load it a
second time, so its names appear in annotations only.

   1  envelope    pure  <- -               answers: ApiError, JSON out and in, revision and If-Match; ControlPort
   2  views       pure  <- -               what the data plane knows -> `data` of an answer
   3  metrics     pure  <- 2               the Prometheus page
   4  commands    pure  <- 1               what a mutating request wants
   5  tomledit    pure  <- 4               single entries of [access.*] changed in the text, everything else kept
   7  store       io    <- 1 4 5           the configuration on disk: revision, changes
   9  service     io    <- 1               start and stop
  10  qr          pure  <- -               a link as a QR code
"""
from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import heapq
import ipaddress
import itertools
import json
import os
import re
import stat
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeAlias, TypeVar

if TYPE_CHECKING:
    from telemt import (
        Access,
        Api,
        Counters,
        General,
        Link,
        Loaded,
        Log,
        MeCounters,
        PoolSnapshot,
        RouteSnapshot,
        Settings,
        Sources,
        Telemetry,
        User,
    )

_T = TypeVar("_T")

# == 1. envelope =============================================================
# Every answer of /v1 is one line of JSON: {"ok":true,"data":...,"revision":...}
# or {"ok":false,"error":{"code":...,"message":...},"request_id":...}.  The codes
# and the messages are interface (api.md 6).
# Bodies are read more strictly than `json` does: no duplicate names, no NaN, no
# lone surrogates, bounded nesting (api.md 8).  Trap: `-0` is no integer >= 0, and
# Python reads it as 0, so it becomes a float here, which no integer member takes.

JSON_TYPE: Final = "application/json; charset=utf-8"
_NESTING_MAX: Final = 128
_STRUCTURE: Final = re.compile(r'"(?:[^"\\]|\\.)*"|([\[{])|([\]}])', re.DOTALL)
_NO_HEADER_TEXT: Final = re.compile(r"[^\t\x20-\x7e]")
NEVER: Final = "*"                        # a precondition that no revision meets


class ApiError(Exception):
    """A refusal as the client sees it: HTTP status, machine-readable code, message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def bad_request(message: str) -> ApiError:
    """400: the request cannot be carried out as it stands."""
    return ApiError(400, "bad_request", message)


def forbidden(message: str) -> ApiError:
    """403: not for this client."""
    return ApiError(403, "forbidden", message)


def not_found(message: str = "Route not found") -> ApiError:
    """404."""
    return ApiError(404, "not_found", message)


def internal_error(message: str = "internal error") -> ApiError:
    """500: our side; the message names what the operator can repair, never an exception of ours."""
    return ApiError(500, "internal_error", message)


def dump_json(value: object) -> str:
    """Compact JSON in one line, non-ASCII as it is, floats in shortest form with a fraction (api.md 8)."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def success_body(data: str, revision: str) -> bytes:
    """Envelope around `data`, which is JSON already."""
    return f'{{"ok":true,"data":{data},"revision":"{revision}"}}'.encode("utf-8", "replace")


def error_body(error: ApiError, request_id: int) -> bytes:
    """Envelope of a refusal; request_id: number of the request in this process."""
    text = dump_json({"ok": False, "error": {"code": error.code, "message": error.message}, "request_id": request_id})
    return text.encode("utf-8", "replace")


def parse_body(body: bytes) -> dict[str, Any]:
    """Return the object that a request body holds.  Raises ApiError(400) for everything that is not strict JSON (api.md 8)."""
    invalid = bad_request("Invalid JSON body")
    try:
        text = body.decode()
        if text.count("[") + text.count("{") > _NESTING_MAX:
            _check_nesting(text)
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_parse_int)
        if "\\u" in text or "\\U" in text:
            json.dumps(value, ensure_ascii=False).encode()         # a lone surrogate has no UTF-8
    except (ValueError, RecursionError):       # UnicodeError and JSONDecodeError are ValueErrors
        raise invalid from None
    if not isinstance(value, dict):
        raise invalid
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate member")
    return found


def _refuse(text: str) -> Any:
    raise ValueError(text)


def _parse_int(text: str) -> int | float:
    return -0.0 if text == "-0" else int(text)


def _check_nesting(text: str) -> None:
    depth = 0
    for token in _STRUCTURE.finditer(text):
        depth += (token[1] is not None) - (token[2] is not None)
        if depth > _NESTING_MAX:
            raise ValueError("too deep")


def wanted_revision(values: Sequence[str]) -> str | None:
    """What the If-Match lines of a request demand; None = nothing, NEVER = what cannot be met (api.md 7)."""
    if not values:
        return None
    if len(values) > 1 or _NO_HEADER_TEXT.search(values[0]):
        return NEVER
    value = values[0].strip(" \t")
    return value.strip('"') if value else None


def check_revision(wanted: str | None, revision: str) -> None:
    """Raise ApiError(409) if a precondition does not hold for the current revision."""
    if wanted is not None and wanted != revision:
        raise ApiError(409, "revision_conflict", "Config revision mismatch")


# -- the seam to the data plane

class ControlPort(Protocol):
    """All that the control plane sees of the running proxy; every method may be called from any thread but the loop's."""

    config_path: str                     # absolute
    started_at: float                    # monotonic seconds
    started_wall: float                  # unix seconds
    sources: Sources                     # what other rooms can tell, called through ask()
    log: Log
    config_error: type[Exception]        # what expand, parse and accept raise; `.invalid` tells validation from the rest

    @property
    def settings(self) -> Settings:
        """What is in force now; replaced whole by a reload, never changed."""

    @property
    def counters(self) -> Counters:
        """Process-wide totals, plain integers."""

    @property
    def users(self) -> Mapping[str, User]:
        """Configured users with what they use, plain integers, in file order; replaced whole by a reload."""

    def ask(self, build: Callable[[], _T], timeout_s: float) -> _T:
        """Run `build` on the loop thread and return its value; what it raises is raised here.  TimeoutError: it did not run."""

    def expand(self, text: str, given: Mapping[str, bytes] | None = None) -> tuple[str, tuple[str, ...]]:
        """Return a main file's text with its includes in place, and their paths.  Raises ConfigError.

        given: path -> bytes that counts instead of what is on disk.
        """

    def parse(self, text: str) -> dict[str, Any]:
        """Return the tables of an expanded text.  Raises ConfigError."""

    def accept(self, document: dict[str, Any]) -> Loaded:
        """Return what the tables mean, validated as at a start.  Raises ConfigError."""

    def load(self, text: str) -> Loaded:
        """Return what a main file's text means, as a start would read it.  Raises ConfigError."""

    def follow(self, including: str, line: str) -> str | None:
        """Return the path of the file that a line of the file `including` includes; None for any other line."""

    def publish(self, loaded: Loaded, files: Mapping[str, bytes], timeout_s: float = 10.0) -> None:
        """Make a configuration live; returns when it is, sessions that have to go closed.  Raises TimeoutError.

        files: path -> content that it was read from, main file first: the watcher need not read them again.
        """

    def reset_quota(self, name: str, timeout_s: float = 10.0) -> int:
        """Set the used octets of a user to 0 and write that down; returns the time, unix seconds.

        Raises KeyError for an unknown user, OSError when the state file cannot be written (the reset is in force), TimeoutError.
        """

    def links(self, name: str) -> list[Link]:
        """Links of a user in the order of api.md 10; empty for an unknown user or without any host."""


# == 2. views ================================================================
# One function per resource: plain values in, the `data` of an answer out.  The
# order of the members is the order of the answers (api.md 8).  Two kinds of
# optional: what is `omitted` is never null, what is nullable is never omitted.
# A data plane that has no pool, or does not answer in time, gives None here.
# Source: api.md 9, 10, 15.

JsonObject: TypeAlias = "dict[str, Any]"
FEATURE_DISABLED: Final = "feature_disabled"
SOURCE_UNAVAILABLE: Final = "source_unavailable"
RECENT_S: Final = 30                     # window of the recent addresses
_BUCKETS_MS: Final = ("le_100ms", "101_500ms", "501_1000ms", "gt_1000ms")
_BUCKETS_ATTEMPTS: Final = ("1", "2", "3_4", "gt_4")
_NO_SUMMARY: Final = {"configured_dc_groups": 0, "configured_endpoints": 0, "available_endpoints": 0, "available_pct": 0.0,
                      "required_writers": 0, "alive_writers": 0, "coverage_pct": 0.0}


def percent(part: int, total: int) -> float:
    """Share of `part` in 0.0 to 100.0; of nothing it is 0.0."""
    return 0.0 if total == 0 else min(100.0, part / total * 100)


def view_head(counters: Counters, uptime_s: float, users: int) -> JsonObject:
    """What summary and core begin with."""
    return {"uptime_seconds": float(uptime_s), "connections_total": counters.connections_total,
            "connections_bad_total": counters.connections_bad_total,
            "handshake_timeouts_total": counters.handshake_timeouts_total, "configured_users": users}


def view_refusals(counters: Counters) -> JsonObject:
    """Why connections ended before they were accepted, by word (metrics.md 4.1)."""
    bad = sorted((reason.value, total) for reason, total in counters.bad_by_class.copy().items())
    failed = sorted((reason.value, total) for reason, total in counters.failures_by_class.copy().items())
    stages = sorted(counters.failures_by_stage.items())
    return {"connections_bad_by_class": [{"class": word, "total": total} for word, total in bad if total],
            "handshake_failures_by_class": [{"class": word, "total": total} for word, total in failed if total],
            "handshake_failures_by_stage": [{"stage": word, "total": total} for word, total in stages if total]}


def view_upstream_totals(counters: Counters) -> JsonObject:
    """The sixteen totals of connect requests."""
    found: JsonObject = {"connect_attempt_total": counters.connect_attempt_total, "connect_success_total": counters.connect_success_total,
                         "connect_fail_total": counters.connect_fail_total,
                         "connect_failfast_hard_error_total": counters.connect_failfast_hard_error_total}
    found.update(zip((f"connect_attempts_bucket_{word}" for word in _BUCKETS_ATTEMPTS), counters.connect_attempts, strict=True))
    found.update(zip((f"connect_duration_success_bucket_{word}" for word in _BUCKETS_MS), counters.connect_success_ms, strict=True))
    found.update(zip((f"connect_duration_fail_bucket_{word}" for word in _BUCKETS_MS), counters.connect_fail_ms, strict=True))
    return found


def view_middle_totals(me: MeCounters) -> dict[str, JsonObject]:
    """The sections middle_proxy, pool and desync of zero/all."""
    found: dict[str, JsonObject] = {name: {word: me.totals[word] for word in words} for name, words in me.sections.items() if name}
    codes = [{"code": code, "total": total} for code, total in sorted(me.error_codes.items())]
    found["middle_proxy"] = insert_after(found["middle_proxy"], "handshake_reject_total", "handshake_error_codes", codes)
    found["pool"] = insert_after(found["pool"], "pool_swap_total", "pool_drain_active", drain_active(me))
    return found


def drain_active(me: MeCounters) -> int:
    """The gauge of draining writers: class D, so it reads 0 below level debug."""
    return me.draining if me.level >= 2 else 0


def insert_after(members: JsonObject, name: str, new: str, value: object) -> JsonObject:
    """`members` with one more behind `name`."""
    found: JsonObject = {}
    for key, old in members.items():
        found[key] = old
        if key == name:
            found[new] = value
    return found


def view_zero_all(counters: Counters, telemetry: Telemetry, uptime_s: float, users: int, now_s: int) -> JsonObject:
    """Every counter (9.3)."""
    core = view_head(counters, uptime_s, users)
    core |= {"telemetry_core_enabled": telemetry.core_enabled, "telemetry_user_enabled": telemetry.user_enabled,
             "telemetry_me_level": telemetry.me_level}
    return {"generated_at_epoch_secs": now_s, "core": core | view_refusals(counters), "upstream": view_upstream_totals(counters),
            **view_middle_totals(counters.me)}


# -- upstreams and pool (9.4-9.7)

def view_upstream_summary(rows: Sequence[JsonObject]) -> JsonObject:
    """How many upstreams of which kind are well."""
    healthy = sum(row["healthy"] for row in rows)
    kinds = [row["route_kind"] for row in rows]
    return {"configured_total": len(rows), "healthy_total": healthy, "unhealthy_total": len(rows) - healthy,
            **{f"{kind}_total": kinds.count(kind) for kind in ("direct", "socks4", "socks5")}}


def view_upstreams(counters: Counters, rows: Sequence[JsonObject] | None, reason: str, now_s: int) -> JsonObject:
    """stats/upstreams; reason: why there are no rows, empty if there are."""
    found: JsonObject = {"enabled": reason != FEATURE_DISABLED}
    if reason:
        found["reason"] = reason
    found |= {"generated_at_epoch_secs": now_s, "zero": view_upstream_totals(counters)}
    if rows is not None and not reason:
        found |= {"summary": view_upstream_summary(rows), "upstreams": list(rows)}
    return found


def view_me_writers(pool: PoolSnapshot | None, reason: str, now_s: int) -> JsonObject:
    """stats/me-writers (9.6)."""
    if pool is None:
        return {"middle_proxy_enabled": False, "reason": reason, "generated_at_epoch_secs": now_s, "summary": _NO_SUMMARY, "writers": []}
    endpoints, available = sum(len(row.endpoints) for row in pool.dcs), sum(row.available_endpoints for row in pool.dcs)
    required, alive = sum(row.required_writers for row in pool.dcs), sum(row.alive_writers for row in pool.dcs)
    summary = {"configured_dc_groups": len(pool.dcs), "configured_endpoints": endpoints, "available_endpoints": available,
               "available_pct": percent(available, endpoints), "required_writers": required, "alive_writers": alive,
               "coverage_pct": percent(alive, required)}
    return {"middle_proxy_enabled": True, "generated_at_epoch_secs": now_s, "summary": summary,
            "writers": [row._asdict() for row in pool.writers]}


def view_dcs(pool: PoolSnapshot | None, reason: str, now_s: int) -> JsonObject:
    """stats/dcs (9.7)."""
    if pool is None:
        return {"middle_proxy_enabled": False, "reason": reason, "generated_at_epoch_secs": now_s, "dcs": []}
    rows = [{"dc": row.dc, "endpoints": list(row.endpoints), "available_endpoints": row.available_endpoints,
             "available_pct": percent(row.available_endpoints, len(row.endpoints)), "required_writers": row.required_writers,
             "alive_writers": row.alive_writers, "coverage_pct": percent(row.alive_writers, row.required_writers),
             "rtt_ms": row.rtt_ms, "load": row.load} for row in pool.dcs]
    return {"middle_proxy_enabled": True, "generated_at_epoch_secs": now_s, "dcs": rows}


def view_me_runtime(pool: PoolSnapshot, general: General) -> JsonObject:
    """me_runtime of minimal/all (9.5): generations, and the policy in force."""
    found: JsonObject = {
        "active_generation": pool.active_generation, "warm_generation": pool.warm_generation,
        "pending_hardswap_generation": pool.pending_hardswap_generation,
        "pending_hardswap_age_secs": pool.pending_hardswap_age_secs, "hardswap_enabled": general.hardswap,
        "floor_mode": general.me_floor_mode, "adaptive_floor_idle_secs": general.me_adaptive_floor_idle_secs,
        "adaptive_floor_min_writers_single_endpoint": general.me_adaptive_floor_min_writers_single_endpoint,
        "adaptive_floor_recover_grace_secs": general.me_adaptive_floor_recover_grace_secs}
    found |= same_named(general, """me_keepalive_enabled me_keepalive_interval_secs me_keepalive_jitter_secs
        me_keepalive_payload_random""")
    found["rpc_proxy_req_every_secs"] = general.rpc_proxy_req_every
    found["me_reconnect_max_concurrent_per_dc"] = max(1, general.me_reconnect_max_concurrent_per_dc)
    found |= same_named(general, "me_reconnect_backoff_base_ms me_reconnect_backoff_cap_ms")
    found["me_reconnect_fast_retry_count"] = max(1, general.me_reconnect_fast_retry_count)
    found |= {"me_pool_drain_ttl_secs": general.me_pool_drain_ttl_secs, "me_pool_force_close_secs": general.me_reinit_drain_timeout_secs,
              "me_pool_min_fresh_ratio": round(float(general.me_pool_min_fresh_ratio), 3)}
    found |= same_named(general, """me_bind_stale_mode me_bind_stale_ttl_secs me_single_endpoint_shadow_writers
        me_single_endpoint_outage_mode_enabled me_single_endpoint_outage_disable_quarantine me_single_endpoint_outage_backoff_min_ms
        me_single_endpoint_outage_backoff_max_ms me_single_endpoint_shadow_rotate_every_secs me_deterministic_writer_sort
        me_socks_kdf_policy""")
    found |= {"quarantined_endpoints_total": len(pool.quarantined),
              "quarantined_endpoints": [{"endpoint": endpoint, "remaining_ms": ms} for endpoint, ms in pool.quarantined]}
    return found


def same_named(table: object, names: str) -> JsonObject:
    """Members of a settings table that the API shows under their own names."""
    return {name: getattr(table, name) for name in names.split()}


def view_minimal_all(pool: PoolSnapshot | None, path: Sequence[JsonObject], general: General, now_s: int) -> JsonObject:
    """stats/minimal/all while the feature is on (9.5)."""
    data: JsonObject = {"me_writers": view_me_writers(pool, SOURCE_UNAVAILABLE, now_s), "dcs": view_dcs(pool, SOURCE_UNAVAILABLE, now_s)}
    if pool is None:
        data["network_path"] = list(path)
        return {"enabled": True, "reason": SOURCE_UNAVAILABLE, "generated_at_epoch_secs": now_s, "data": data}
    data |= {"me_runtime": view_me_runtime(pool, general), "network_path": list(path)}
    return {"enabled": True, "generated_at_epoch_secs": now_s, "data": data}


def view_gated(data: JsonObject | None, reason: str, now_s: int, *, enabled: bool = False) -> JsonObject:
    """A read of 15.2: `data`, or the reason why there is none; enabled: what a refused read says of itself."""
    if data is None:
        return {"enabled": enabled, "reason": reason, "generated_at_epoch_secs": now_s}
    return {"enabled": True, "generated_at_epoch_secs": now_s, "data": data}


# -- users (9.8, 9.10, 10)

def ip_order(text: str) -> tuple[int, int, str]:
    """Sort key: IPv4 by number, then IPv6, then what is no address."""
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return 99, 0, text
    return ip.version, int(ip), text


def sorted_ips(ips: Iterable[str]) -> list[str]:
    """Ascending."""
    found = list(ips)
    return sorted(found, key=ip_order) if len(found) > 1 else found


def format_time(at: datetime.datetime) -> str:
    """UTC as RFC 3339 with +00:00; a fraction of 3 or 6 digits only where there is one."""
    at = at.astimezone(datetime.UTC)
    spec = "seconds" if not at.microsecond else "milliseconds" if at.microsecond % 1000 == 0 else "microseconds"
    return at.isoformat(timespec=spec)


def view_links(links: Iterable[Link], primary: str) -> JsonObject:
    """`links` of a user: one array per kind, in host order; primary: censorship.tls_domain."""
    found: JsonObject = {"classic": [], "secure": [], "tls": [], "tls_domains": []}
    for link in links:
        found[link.kind].append(link.link)
        if link.kind == "tls" and link.domain != primary:
            found["tls_domains"].append({"domain": link.domain, "link": link.link})
    return found


def view_user(name: str, access: Access, user: User | None, links: JsonObject, counted: bool, now: float) -> JsonObject:
    """UserInfo; user: what it uses now, None before it is live; counted: general.telemetry.user_enabled; now: monotonic seconds."""
    until = access.user_expirations.get(name)
    ips = sorted_ips(list(user.ips)) if user else []
    recent = sorted_ips(user.recent_ips(now)) if user else []
    up, down = (user.stats.octets_from_client, user.stats.octets_to_client) if user else (0, 0)
    return {"username": name, "user_ad_tag": access.user_ad_tags.get(name), "max_tcp_conns": access.user_max_tcp_conns.get(name),
            "expiration_rfc3339": None if until is None else format_time(until), "data_quota_bytes": access.user_data_quota.get(name),
            "max_unique_ips": access.user_max_unique_ips.get(name),
            "current_connections": user.stats.current if user and counted else 0, "active_unique_ips": len(ips),
            "total_octets": up + down, "links": links, "enabled": access.user_enabled.get(name, True), "in_runtime": True,
            "active_unique_ips_list": ips, "recent_unique_ips": len(recent), "recent_unique_ips_list": recent,
            "octets_from_client": up, "octets_to_client": down, "quota_used_bytes": user.used if user else 0}


def view_active_ips(users: Iterable[User]) -> list[JsonObject]:
    """stats/users/active-ips: who is connected from where."""
    found = [(user.name, sorted_ips(list(user.ips))) for user in users]
    return [{"username": name, "active_ips": ips} for name, ips in sorted(found) if ips]


def view_quotas(access: Access, users: Mapping[str, User]) -> JsonObject:
    """stats/users/quota (9.10): users that have a quota."""
    rows = [{"username": name, "data_quota_bytes": access.user_data_quota[name], "used_bytes": users[name].used,
             "last_reset_epoch_secs": users[name].reset_wall} for name in sorted(access.user_data_quota) if name in users]
    return {"users": rows}


# -- the reads that later versions added (15.1)

def view_gates(general: General, route: RouteSnapshot | None, stage: str, accepting: bool, fallback_total: int) -> JsonObject:
    """runtime/gates; route: None without `use_middle_proxy`."""
    middle, degrade = general.use_middle_proxy, general.auto_degradation_enabled
    ready = accepting and (route is None or route.me_ready or degrade)
    if stage == "ready":                 # all steps are done, and yet it is not fit for clients
        stage = "me_pool_init_stage1" if accepting else "listeners_bind"
    word = "ready" if ready else stage
    goes_middle = middle and (route is None or route.middle)
    found: JsonObject = {
        "accepting_new_connections": accepting, "conditional_cast_enabled": middle, "me_runtime_ready": route is None or route.me_ready,
        "me2dc_fallback_enabled": middle and degrade, "me2dc_fast_enabled": False, "use_middle_proxy": middle,
        "route_mode": "middle" if goes_middle else "direct", "reroute_active": middle and not goes_middle}
    if route is not None and middle and not route.middle:
        found["reroute_to_direct_at_epoch_secs"] = route.direct_since_wall
        found["reroute_reason"] = "strict_grace_fallback" if route.was_ready else "startup_direct_fallback"
    found |= {"startup_status": "ready" if ready else "initializing", "startup_stage": word, "startup_progress_pct": STAGES[word]}
    if middle:
        found |= {"me_down_dc_groups": list(route.down_dcs) if route else [],
                  "fallback_sessions_current": route.fallback_sessions if route else 0, "fallback_sessions_total": fallback_total}
    return found


STAGES: Final = {"config_load": 0.0, "listeners_bind": 20.0, "network_probe": 40.0, "me_secret_fetch": 60.0, "me_pool_init_stage1": 80.0,
                 "ready": 100.0}


def view_ready(accepting: bool, healthy: int, total: int) -> JsonObject:
    """health/ready: fit for new clients?"""
    reason = "" if accepting and healthy else "no_healthy_upstreams" if accepting else "admission_closed"
    found: JsonObject = {"ready": not reason, "status": "not_ready" if reason else "ready"}
    if reason:
        found["reason"] = reason
    return found | {"admission_open": accepting, "healthy_upstreams": healthy, "total_upstreams": total}


def view_limits(settings: Settings) -> JsonObject:
    """limits/effective: what is in force after every clamp."""
    general, timeouts = settings.general, settings.timeouts
    every = general.update_every or min(general.proxy_secret_auto_reload_secs, general.proxy_config_auto_reload_secs)
    return {
        "update_every_secs": every, "me_reinit_every_secs": general.me_reinit_every_secs,
        "me_pool_force_close_secs": general.me_reinit_drain_timeout_secs,
        "timeouts": {"client_handshake_secs": timeouts.client_handshake, "tg_connect_secs": timeouts.tg_connect,
                     "client_keepalive_secs": timeouts.client_keepalive, "client_ack_secs": timeouts.client_ack,
                     "me_one_retry": timeouts.me_one_retry, "me_one_timeout_ms": timeouts.me_one_timeout_ms},
        "upstream": view_connect_policy(general),
        "middle_proxy": {
            "floor_mode": general.me_floor_mode, "adaptive_floor_idle_secs": general.me_adaptive_floor_idle_secs,
            "adaptive_floor_min_writers_single_endpoint": general.me_adaptive_floor_min_writers_single_endpoint,
            "adaptive_floor_recover_grace_secs": general.me_adaptive_floor_recover_grace_secs,
            "reconnect_max_concurrent_per_dc": max(1, general.me_reconnect_max_concurrent_per_dc),
            "reconnect_backoff_base_ms": general.me_reconnect_backoff_base_ms,
            "reconnect_backoff_cap_ms": general.me_reconnect_backoff_cap_ms,
            "reconnect_fast_retry_count": max(1, general.me_reconnect_fast_retry_count)},
        "user_ip_policy": {"global_each": 0, "mode": "active_window", "window_secs": RECENT_S},
        "user_tcp_policy": {"global_each": 0}}


def view_connect_policy(general: General) -> JsonObject:
    """How often a connect request is tried."""
    return {"connect_retry_attempts": general.upstream_connect_retry_attempts,
            "connect_retry_backoff_ms": general.upstream_connect_retry_backoff_ms,
            "unhealthy_fail_threshold": general.upstream_unhealthy_fail_threshold,
            "connect_failfast_hard_errors": general.upstream_connect_failfast_hard_errors}


def view_posture(settings: Settings, api: Api) -> JsonObject:
    """security/posture; api: as frozen at start."""
    telemetry = settings.general.telemetry
    return {"api_read_only": api.read_only, "api_whitelist_enabled": bool(api.whitelist), "api_whitelist_entries": len(api.whitelist),
            "api_auth_header_enabled": bool(api.auth_header), "proxy_protocol_enabled": settings.server.proxy_protocol,
            "log_level": settings.general.log_level, "telemetry_core_enabled": telemetry.core_enabled,
            "telemetry_user_enabled": telemetry.user_enabled, "telemetry_me_level": telemetry.me_level}


def view_whitelist(api: Api, now_s: int) -> JsonObject:
    """security/whitelist."""
    entries = [str(network) for network in api.whitelist]
    return {"generated_at_epoch_secs": now_s, "enabled": bool(entries), "entries_total": len(entries), "entries": entries}


def view_pool_state(pool: PoolSnapshot, general: General) -> JsonObject:
    """`data` of runtime/me_pool_state."""
    writers = pool.writers
    draining = sum(row.draining for row in writers)
    degraded = sum(row.degraded and not row.draining for row in writers)
    contour = {word: sum(row.state == word for row in writers) for word in ("warm", "active", "draining")}
    return {
        "generations": {"active_generation": pool.active_generation, "warm_generation": pool.warm_generation,
                        "pending_hardswap_generation": pool.pending_hardswap_generation,
                        "pending_hardswap_age_secs": pool.pending_hardswap_age_secs,
                        "draining_generations": list(pool.draining_generations)},
        "hardswap": {"enabled": general.hardswap, "pending": pool.pending_hardswap_generation != 0},
        "writers": {"total": len(writers), "alive_non_draining": len(writers) - draining, "draining": draining, "degraded": degraded,
                    "contour": contour,
                    "health": {"healthy": len(writers) - draining - degraded, "degraded": degraded, "draining": draining}},
        "refill": {"inflight_endpoints_total": sum(count for _, _, count in pool.refills),
                   "inflight_dc_total": len({dc for dc, _, _ in pool.refills}),
                   "by_dc": [{"dc": dc, "family": family, "inflight": count} for dc, family, count in pool.refills]}}


def view_me_quality(pool: PoolSnapshot, me: MeCounters) -> JsonObject:
    """`data` of runtime/me_quality."""
    names = ("idle_close_by_peer_total", "reader_eof_total", "kdf_drift_total", "kdf_port_only_drift_total", "reconnect_attempt_total",
             "reconnect_success_total")
    drops = ("no_conn_total", "channel_closed_total", "queue_full_total", "queue_full_base_total", "queue_full_high_total")
    return {"counters": {name: me.totals[name] for name in names},
            "route_drops": {name: me.totals[f"route_drop_{name}"] for name in drops},
            "dc_rtt": [{"dc": row.dc, "rtt_ema_ms": row.rtt_ms, "alive_writers": row.alive_writers,
                        "required_writers": row.required_writers, "coverage_pct": percent(row.alive_writers, row.required_writers)}
                       for row in pool.dcs]}


def view_upstream_quality(counters: Counters, general: General, rows: Sequence[JsonObject] | None, reason: str, now_s: int) -> JsonObject:
    """runtime/upstream_quality; reason: why there are no rows, empty if there are."""
    found: JsonObject = {"enabled": not reason}
    if reason:
        found["reason"] = reason
    found |= {"generated_at_epoch_secs": now_s, "policy": view_connect_policy(general),
              "counters": {name: getattr(counters, name) for name in (
                  "connect_attempt_total", "connect_success_total", "connect_fail_total", "connect_failfast_hard_error_total")}}
    if rows is not None and not reason:
        found |= {"summary": view_upstream_summary(rows), "upstreams": list(rows)}
    return found


class UserLoad(NamedTuple):
    """What a user does, for the list of the busiest."""

    username: str
    current_connections: int
    total_octets: int


def view_connections(users: Sequence[UserLoad], middle: int, limit: int, counted: bool, ttl_ms: int) -> JsonObject:
    """`data` of runtime/connections/summary; users: those with anything to show; middle: sessions through the middle end."""
    total = sum(user.current_connections for user in users)
    by_connections = heapq.nsmallest(limit, users, key=lambda user: (-user.current_connections, user.username))
    by_octets = heapq.nsmallest(limit, users, key=lambda user: (-user.total_octets, user.username))
    return {"cache": {"ttl_ms": ttl_ms, "served_from_cache": False, "stale_cache_used": False},
            "totals": {"current_connections": total, "current_connections_me": middle, "current_connections_direct": max(0, total - middle),
                       "active_users": sum(user.current_connections > 0 for user in users)},
            "top": {"limit": limit, "by_connections": [user._asdict() for user in by_connections],
                    "by_throughput": [user._asdict() for user in by_octets]},
            "telemetry": {"user_enabled": counted, "throughput_is_cumulative": True}}


# == 3. metrics ==============================================================
# The Prometheus page, format 0.0.4: per metric one HELP line, one TYPE line and
# its samples.  One table names them all, in the order of metrics.md 4; names,
# types and labels are interface, the help texts are ours.  The page is made in
# pieces, so that a thousand users do not keep the interpreter from the loop.
# Trap: unlabelled totals stay single samples; Zabbix takes the line that matches.

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
SERIES_USERS_MAX: Final = 4096           # users per scrape, by name
_ESCAPES: Final = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
BAD_CLASSES: Final = tuple("""
    proxy_protocol_untrusted proxy_protocol_invalid_header proxy_protocol_header_timeout tls_clienthello_len_out_of_bounds
    tls_clienthello_truncated tls_clienthello_malformed tls_mode_disabled tls_bad_digest tls_clock_skew tls_replay tls_bad_inner
    tls_inner_replay direct_modes_disabled direct_reserved_prefix direct_bad_header direct_replay direct_truncated""".split())
FAILURE_CLASSES: Final = ("timeout", "eof", "reset", "io_error", "crowded_out")
FAILURE_STAGES: Final = ("first_packet_prelude", "tls_clienthello_body", "tls_core", "tls_post_serverhello_mtproto", "direct_mtproto")

Samples: TypeAlias = "Iterable[tuple[str, int | float | str]]"        # (labels in braces or empty, value)


class Facts(NamedTuple):
    """What a scrape is made from."""

    counters: Counters
    telemetry: Telemetry
    floor_mode: str
    users: Sequence[User]                # by name
    ip_limits: Mapping[str, int]         # access.user_max_unique_ips
    uptime_s: float
    now: float                           # monotonic seconds
    version: str


class Metric(NamedTuple):
    """One line of the table."""

    name: str
    kind: str
    help: str
    samples: Callable[[Facts], Samples]


def label(value: str) -> str:
    """A label value, escaped."""
    return value.translate(_ESCAPES)


def _core(name: str, field: str, help: str) -> Metric:
    return Metric(f"telemt_{name}", "counter", help, lambda facts: [("", getattr(facts.counters, field))])


def _me(name: str, field: str, help: str) -> Metric:
    return Metric(f"telemt_{name}", "counter", help, lambda facts: [("", facts.counters.me.totals[field])])


def _labelled(name: str, help: str, *fields: tuple[str, str]) -> Metric:
    """A counter with one sample per (labels, field) of the middle end's totals."""
    return Metric(f"telemt_{name}", "counter", help,
                  lambda facts: [(f"{{{labels}}}", facts.counters.me.totals[field]) for labels, field in fields])


def _buckets(name: str, field: str, words: Sequence[str], help: str) -> Metric:
    return Metric(f"telemt_{name}", "counter", help, lambda facts: [
        (f'{{bucket="{word}"}}', count) for word, count in zip(words, getattr(facts.counters, field), strict=True)])


def _words(name: str, field: str, key: str, words: Sequence[str], help: str) -> Metric:
    def samples(facts: Facts) -> Samples:
        found = {str(getattr(word, "value", word)): count for word, count in list(getattr(facts.counters, field).items())}
        return [(f'{{{key}="{word}"}}', found.get(word, 0)) for word in words]
    return Metric(f"telemt_{name}", "counter", help, samples)


def _flag(name: str, help: str, on: Callable[[Facts], bool]) -> Metric:
    return Metric(f"telemt_{name}", "gauge", help, lambda facts: [("", int(on(facts)))])


def _one_of(name: str, key: str, words: Sequence[str], help: str, chosen: Callable[[Facts], str]) -> Metric:
    return Metric(f"telemt_{name}", "gauge", help, lambda facts: [(f'{{{key}="{word}"}}', int(word == chosen(facts))) for word in words])


def _lost_writers(facts: Facts) -> Samples:
    totals = facts.counters.me.totals
    restored = totals["writer_restored_same_endpoint_total"] + totals["writer_restored_fallback_total"]
    return [("", max(0, totals["writer_removed_unexpected_total"] - restored))]


def _error_codes(facts: Facts) -> Samples:
    return [(f'{{error_code="{code}"}}', total) for code, total in sorted(facts.counters.me.error_codes.items())]


def _same(names: Mapping[str, str], prefix: str = "me_") -> list[Metric]:
    """Metrics that are called as their field is, behind a prefix."""
    return [_me(prefix + field, field, help) for field, help in names.items()]


TABLE: Final[Sequence[Metric]] = (
    Metric("telemt_uptime_seconds", "gauge", "Seconds since start.", lambda facts: [("", f"{facts.uptime_s:.1f}")]),
    _flag("telemetry_core_enabled", "general.telemetry.core_enabled.", lambda facts: facts.telemetry.core_enabled),
    _flag("telemetry_user_enabled", "general.telemetry.user_enabled.", lambda facts: facts.telemetry.user_enabled),
    _one_of("telemetry_me_level", "level", ("silent", "normal", "debug"), "general.telemetry.me_level.",
            lambda facts: facts.telemetry.me_level),
    _core("connections_total", "connections_total", "Client connections accepted."),
    _core("connections_bad_total", "connections_bad_total", "Connections that turned out not to be a client's."),
    _core("handshake_timeouts_total", "handshake_timeouts_total", "Handshakes that exceeded timeouts.client_handshake."),
    _core("upstream_connect_attempt_total", "connect_attempt_total", "Connect attempts through upstreams."),
    _core("upstream_connect_success_total", "connect_success_total", "Connect requests that succeeded."),
    _core("upstream_connect_fail_total", "connect_fail_total", "Connect requests that failed after their last attempt."),
    _core("upstream_connect_failfast_hard_error_total", "connect_failfast_hard_error_total",
          "Attempts given up at once after a hard error."),
    _buckets("upstream_connect_attempts_per_request", "connect_attempts", _BUCKETS_ATTEMPTS, "Connect requests by attempts used."),
    _buckets("upstream_connect_duration_success_total", "connect_success_ms", _BUCKETS_MS, "Successful connect requests by duration."),
    _buckets("upstream_connect_duration_fail_total", "connect_fail_ms", _BUCKETS_MS, "Failed connect requests by duration."),
    *_same({"keepalive_sent_total": "RPC pings sent.", "keepalive_failed_total": "RPC pings that could not be queued.",
            "keepalive_pong_total": "RPC pongs received.", "keepalive_timeout_total": "RPC pings without an answer for 120 s.",
            "rpc_proxy_req_signal_sent_total": "Activity signals sent.",
            "rpc_proxy_req_signal_failed_total": "Activity signals that could not be queued.",
            "rpc_proxy_req_signal_skipped_no_meta_total": "Activity signals left out: the writer never carried a client.",
            "rpc_proxy_req_signal_response_total": "Activity signals answered in time.",
            "rpc_proxy_req_signal_close_sent_total": "Closing messages behind activity signals."}),
    _me("me_reconnect_attempts_total", "reconnect_attempt_total", "Attempts to restore a writer."),
    *_same({"reconnect_success_total": "Writers restored.", "handshake_reject_total": "RPC handshakes that a middle end refused."}),
    Metric("telemt_me_handshake_error_code_total", "counter", "Refused RPC handshakes by error code.", _error_codes),
    *_same({"reader_eof_total": "Middle-end sockets that reached their end.",
            "idle_close_by_peer_total": "Writers without clients that the middle end closed.",
            "crc_mismatch_total": "Frames with a wrong CRC.", "seq_mismatch_total": "Frames with a wrong sequence number.",
            "route_drop_no_conn_total": "Answers for an unknown connection.",
            "route_drop_channel_closed_total": "Answers for a client already gone.",
            "route_drop_queue_full_total": "Answers dropped behind a client that does not read."}),
    _labelled("me_route_drop_queue_full_profile_total", "The same by profile in force.",
              ('profile="base"', "route_drop_queue_full_base_total"), ('profile="high"', "route_drop_queue_full_high_total")),
    _labelled("me_socks_kdf_policy_total", "SOCKS routes without a usable bound address.",
              ('policy="strict",outcome="reject"', "socks_kdf_strict_reject_total"),
              ('policy="compat",outcome="fallback"', "socks_kdf_compat_fallback_total")),
    *_same({"endpoint_quarantine_total": "Endpoints put into quarantine.",
            "kdf_drift_total": "Key inputs of an endpoint that differ from its last handshake.",
            "kdf_port_only_drift_total": "The same where only the client port differs.",
            "hardswap_pending_reuse_total": "Renewals that went on with a pending generation.",
            "hardswap_pending_ttl_expired_total": "Pending generations discarded as too old.",
            "single_endpoint_outage_enter_total": "One-endpoint data centres that lost their last writer.",
            "single_endpoint_outage_exit_total": "And got one back.",
            "single_endpoint_outage_reconnect_attempt_total": "Attempts of that recovery.",
            "single_endpoint_outage_reconnect_success_total": "Attempts of that recovery that succeeded.",
            "single_endpoint_quarantine_bypass_total": "Attempts of that recovery that ignored the quarantine.",
            "single_endpoint_shadow_rotate_total": "Periodic renewals of a reserve writer.",
            "single_endpoint_shadow_rotate_skipped_quarantine_total": "Renewals skipped: endpoint in quarantine."}),
    _one_of("me_floor_mode", "mode", ("static", "adaptive"), "general.me_floor_mode.", lambda facts: facts.floor_mode),
    _me("me_floor_mode_switch_all_total", "floor_mode_switch_total", "Changes of the floor mode by reload."),
    _labelled("me_floor_mode_switch_total", "The same by direction.",
              ('from="static",to="adaptive"', "floor_mode_switch_static_to_adaptive_total"),
              ('from="adaptive",to="static"', "floor_mode_switch_adaptive_to_static_total")),
    *_same({"secure_padding_invalid_total": "Client frames of 1 to 3 bytes in secure mode.",
            "desync_total": "Client streams out of step.", "desync_full_logged_total": "Of them, logged in full.",
            "desync_suppressed_total": "Of them, logged short."}, prefix=""),
    _labelled("desync_frames_bucket_total", "Of them, by good frames before.",
              *((f'bucket="{word}"', f"desync_frames_bucket_{word}") for word in ("0", "1_2", "3_10", "gt_10"))),
    _me("pool_swap_total", "pool_swap_total", "Renewals that put a stale writer to drain."),
    Metric("telemt_pool_drain_active", "gauge", "Writers that drain now; 0 below level debug.",
           lambda facts: [("", drain_active(facts.counters.me))]),
    *_same({"pool_force_close_total": "Draining writers closed at their deadline with sessions left.",
            "pool_stale_pick_total": "Clients bound to a writer of an older generation."}, prefix=""),
    *_same({"writer_removed_total": "Writers removed.", "writer_removed_unexpected_total": "Writers removed while not draining.",
            "refill_triggered_total": "Refills started.", "refill_skipped_inflight_total": "Refills not started: one was under way.",
            "refill_failed_total": "Refills given up.", "writer_restored_same_endpoint_total": "Refills on the endpoint that was lost.",
            "writer_restored_fallback_total": "Refills on another endpoint."}),
    Metric("telemt_me_writer_removed_unexpected_minus_restored_total", "gauge", "Writers lost and not restored.", _lost_writers),
    _flag("telemetry_user_series_suppressed", "1 while general.telemetry.user_enabled is off.",
          lambda facts: not facts.telemetry.user_enabled),
    _words("connections_bad_by_class_total", "bad_by_class", "class", BAD_CLASSES, "Bad connections by reason."),
    _words("handshake_failures_by_class_total", "failures_by_class", "class", FAILURE_CLASSES,
           "Handshakes not finished, by how they ended."),
    _words("handshake_failures_by_stage_total", "failures_by_stage", "stage", FAILURE_STAGES,
           "Handshakes not finished, by what they waited for."),
    _me("me_fallback_sessions_total", "fallback_sessions_total", "Sessions that went direct although general.use_middle_proxy is on."),
    Metric("telemt_build_info", "gauge", "Version of this program.", lambda facts: [(f'{{version="{label(facts.version)}"}}', 1)]),
)

USER_TABLE: Final[Sequence[tuple[str, str, str, Callable[[User], int]]]] = (
    ("telemt_user_connections_total", "counter", "Sessions of the user.", lambda user: user.stats.connects),
    ("telemt_user_connections_current", "gauge", "Sessions of the user now.", lambda user: user.stats.current),
    ("telemt_user_octets_from_client", "counter", "Bytes from the user's clients.", lambda user: user.stats.octets_from_client),
    ("telemt_user_octets_to_client", "counter", "Bytes to the user's clients.", lambda user: user.stats.octets_to_client),
    ("telemt_user_msgs_from_client", "counter", "The same in messages of 8 KiB at most.", lambda user: user.stats.msgs_from_client),
    ("telemt_user_msgs_to_client", "counter", "The same in messages of 8 KiB at most.", lambda user: user.stats.msgs_to_client),
)


def render_metrics(facts: Facts) -> Iterator[str]:
    """The page in pieces, each a few hundred lines at most."""
    yield "".join(_render(metric, facts) for metric in TABLE)
    yield from _render_users(facts)


def _head(name: str, kind: str, help: str) -> str:
    return f"# HELP {name} {help}\n# TYPE {name} {kind}\n"


def _render(metric: Metric, facts: Facts) -> str:
    lines = "".join(f"{metric.name}{labels} {value}\n" for labels, value in metric.samples(facts))
    return _head(metric.name, metric.kind, metric.help) + lines


def _render_users(facts: Facts) -> Iterator[str]:
    on = facts.telemetry.user_enabled
    seen = [(label(user.name), user) for user in facts.users if user.stats.connects or user.stats.current] if on else []
    del seen[SERIES_USERS_MAX:]
    for name, kind, help, value in USER_TABLE:
        yield _head(name, kind, help)
        yield from _pieces(f'{name}{{user="{user}"}} {value(source)}\n' for user, source in seen)
    if not on:
        return
    bound = [(label(user.name), len(user.ips), facts.ip_limits.get(user.name, 0)) for user in facts.users
             if user.ips or user.name in facts.ip_limits][:SERIES_USERS_MAX]
    yield _head("telemt_user_unique_ips_current", "gauge", "Source addresses of the user now.")
    yield from _pieces(f'telemt_user_unique_ips_current{{user="{user}"}} {now}\n' for user, now, _ in bound)
    yield _head("telemt_user_unique_ips_limit", "gauge", "access.user_max_unique_ips; 0 = unset.")
    yield from _pieces(f'telemt_user_unique_ips_limit{{user="{user}"}} {limit}\n' for user, _, limit in bound)
    yield _head("telemt_user_unique_ips_utilization", "gauge", "Part of the limit that is used.")
    yield from _pieces(f'telemt_user_unique_ips_utilization{{user="{user}"}} {now / limit if limit else 0:.6f}\n'
                       for user, now, limit in bound)
    recent = [(label(user.name), len(user.recent_ips(facts.now))) for user in facts.users if user.recent or user.ips][:SERIES_USERS_MAX]
    yield _head("telemt_user_unique_ips_recent_window", "gauge", "Source addresses connected now or within the last 30 s.")
    yield from _pieces(f'telemt_user_unique_ips_recent_window{{user="{user}"}} {count}\n' for user, count in recent)


def _pieces(lines: Iterable[str], size: int = 100) -> Iterator[str]:
    """Join lines into pieces of `size` lines."""
    source = iter(lines)
    while piece := "".join(itertools.islice(source, size)):
        yield piece


# == 4. commands =============================================================
# What a mutating request wants.  Wrong types are bad JSON (gate 8); what a
# value means is checked afterwards, in the order of api.md 11 (gate 9).
# Trap: `null` means "absent" everywhere but in PATCH, where it removes.
# Source: api.md 8, 11.

Value: TypeAlias = "str | int | bool"

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HEX32: Final = re.compile(r"[0-9a-fA-F]{32}")
_RFC3339: Final = re.compile(r"(\d{4})-(\d\d)-(\d\d)[Tt ](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:[Zz]|([+-])(\d\d):(\d\d))", re.ASCII)
_INT64_MAX: Final = (1 << 63) - 1
# member of a body -> table of [access], in the order of the checks
TABLE_OF: Final = {"user_ad_tag": "user_ad_tags", "expiration_rfc3339": "user_expirations", "max_tcp_conns": "user_max_tcp_conns",
                   "data_quota_bytes": "user_data_quota", "max_unique_ips": "user_max_unique_ips", "enabled": "user_enabled"}
_NUMBERS: Final = ("max_tcp_conns", "data_quota_bytes", "max_unique_ips")
_TYPES: Final[Mapping[str, type]] = {"username": str, "secret": str, "user_ad_tag": str, "expiration_rfc3339": str, "enabled": bool,
                                     **dict.fromkeys(_NUMBERS, int)}
ACTIONS: Final = ("create", "patch", "delete", "rotate_secret", "enable", "disable", "reset_quota")


class Command(NamedTuple):
    """One change of one user, checked as far as it can be without the configuration."""

    action: str                                # one of ACTIONS
    username: str
    secret: str | None = None                  # None: a random one (create, rotate_secret) or unchanged (patch)
    entries: Mapping[str, Value | None] = {}   # table of [access] -> value of the user in it; None = no entry


def parse_command(action: str, username: str, body: bytes) -> Command:
    """Return what a request asks for; username: of the path, empty for create.  Raises ApiError(400)."""
    if action in ("enable", "disable"):
        return Command(action, username, entries={"user_enabled": None if action == "enable" else False})
    if action in ("delete", "reset_quota") or (action == "rotate_secret" and not body):
        return Command(action, username)
    members = ("secret",) if action == "rotate_secret" else ("secret", *TABLE_OF)
    if action == "create":
        members = ("username", *members)
    found = _read_members(parse_body(body), members)
    if action == "create":
        if found.get("username") is None:
            raise bad_request("Invalid JSON body")
        username = found.pop("username")
        check_name(username)
    secret = found.pop("secret", None)
    if secret is not None and not _HEX32.fullmatch(secret):
        raise bad_request("secret must be exactly 32 hex characters")
    entries = _read_entries(found)
    if action == "create":
        entries = {table: value for table, value in entries.items() if value is not None}
    return Command(action, username, secret, entries)


def check_name(name: str) -> None:
    """Raise ApiError(400) for a name that no user may be given; `.` and `..` would vanish from a URL."""
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise bad_request("username must match [A-Za-z0-9_.-] and be 1..64 chars")


def _read_members(body: Mapping[str, Any], members: Sequence[str]) -> dict[str, Any]:
    """Known members of the right type, or null.  Raises ApiError(400)."""
    found = {name: body[name] for name in members if name in body}
    for name, value in found.items():
        wanted = _TYPES[name]
        if value is not None and (type(value) is not wanted or (isinstance(value, int) and value < 0)):
            raise bad_request("Invalid JSON body")
    return found


def _read_entries(found: Mapping[str, Any]) -> dict[str, Value | None]:
    tag, until = found.get("user_ad_tag"), found.get("expiration_rfc3339")
    if tag is not None and not _HEX32.fullmatch(tag):
        raise bad_request("user_ad_tag must be exactly 32 hex characters")
    moment = None if until is None else format_moment(until)
    for name in _NUMBERS:
        if (found.get(name) or 0) > _INT64_MAX:
            raise bad_request(f"{name} must be within [0, {_INT64_MAX}]")
    entries: dict[str, Value | None] = {TABLE_OF[name]: value for name, value in found.items()}
    if moment is not None:
        entries["user_expirations"] = moment
    if entries.get("user_enabled"):
        entries["user_enabled"] = None         # enabled is what an absent entry says
    return entries


def format_moment(text: str) -> str:
    """Return a strict RFC 3339 moment as the file gets it, `YYYY-MM-DDTHH:MM:SS[.fraction]Z`.  Raises ApiError(400)."""
    invalid = bad_request("expiration_rfc3339 must be valid RFC3339")
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise invalid
    year, month, day, hour, minute, second = map(int, match.groups()[:6])
    fraction, sign, hours, minutes = match.groups()[6:]
    if second > 60 or int(hours or 0) > 23 or int(minutes or 0) > 59:
        raise invalid
    east = datetime.timedelta(hours=int(hours or 0), minutes=int(minutes or 0)) * (-1 if sign == "-" else 1)
    rest = datetime.timedelta(seconds=second, microseconds=int((fraction or "")[:6].ljust(6, "0")))     # 60 is a leap second
    try:
        moment = datetime.datetime(year, month, day, hour, minute) - east + rest
    except (ValueError, OverflowError):
        raise invalid from None
    digits = f".{moment.microsecond:06d}".rstrip("0") if moment.microsecond else ""
    return f"{moment.replace(microsecond=0).isoformat()}{digits}Z"


# == 5. tomledit =============================================================
# Changes single entries of [access.*] in the text of a configuration and
# leaves every other byte alone.  A scanner cuts each file into headers and
# key/value statements with their spans; it knows comments, every kind of
# string, arrays, inline tables and dotted keys.  An entry is then the statement
# with its path, or an item of the inline table that stands for one of its
# tables.  The store parses the result again: what is not exactly the intended
# document is never written.
# Trap: an included file goes on in the table that is open at its line, and
# leaves its own one open behind it, so files are scanned in their order.
# Source: api.md 12, toml.io/en/v1.0.0.

Path: TypeAlias = "tuple[str, ...]"
Follow: TypeAlias = "Callable[[str, str], str | None]"    # (file, one of its lines) -> path of the file that the line includes

_BOM: Final = "\ufeff"
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+")
_KEY_PART: Final = re.compile(r"""[ \t]*(?:([A-Za-z0-9_-]+)|("(?:[^"\\\n]|\\.)*")|'([^'\n]*)')[ \t]*""")
_SIMPLE: Final = re.compile(r"""[ \t]*([A-Za-z0-9_-]+)[ \t]*=[ \t]*("[^"\\\n]*"(?!")|[^\s"'\[{#][^\s"'#]*)[ \t]*(?:#.*)?\r?""")
_BLANKS: Final = re.compile(r"[ \t]*")
_GAP: Final = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_VALUES: Final = tuple(re.compile(pattern, re.DOTALL) for pattern in (
    r'"""(?:\\.|[^\\])*?"{3,5}', r"'''.*?'{3,5}", r'"(?:[^"\\\n]|\\.)*"', r"'[^'\n]*'", r"[^\s,\]}#\"'\[{][^,\]}#\n\r]*"))
_TOML_ESCAPES: Final = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


class EditError(Exception):
    """The text is laid out in a way that the editor does not understand."""


class Statement(NamedTuple):
    """One header, or one key with its value, in one file; offsets count characters of its text."""

    file: str
    path: Path               # of the table or the value, from the root
    header: int              # number of the header it stands under, of itself for a header; 0 = before the first
    depth: int               # length of that header's path
    start: int               # begin of its first line
    end: int                 # behind its last line's end
    value: int               # begin of its value; 0 for a header
    value_end: int


class Item(NamedTuple):
    """One key with its value inside an inline table."""

    path: Path
    start: int
    value: int
    value_end: int


class Edit(NamedTuple):
    """Put `text` in place of [start, end) of a file."""

    file: str
    start: int
    end: int
    text: str


def render_value(value: Value) -> str:
    """TOML text of a value."""
    if isinstance(value, str):
        return _render_string(value)
    return str(value).lower()


def render_key(name: str) -> str:
    """TOML text of one part of a key."""
    return name if _BARE.fullmatch(name) else _render_string(name)


def _render_string(text: str) -> str:
    return f'"{"".join(map(_render_char, text))}"'


def _render_char(char: str) -> str:
    plain = char >= " " and char != "\x7f"
    return _TOML_ESCAPES.get(char) or (char if plain else f"\\u{ord(char):04x}")


class Layout:
    """The statements of a main file and its includes, in order."""

    def __init__(self, texts: Mapping[str, str], main: str, follow: Follow) -> None:
        """texts: path -> text of every file.  Raises EditError."""
        self.texts, self.main, self._follow = texts, main, follow
        self.statements: list[Statement] = []
        self._headers = 0
        self._open: Path = ()                  # path of the table that the next line is in
        self._scan(main, 0)

    # -- cutting

    def _scan(self, file: str, depth: int) -> None:
        text = self.texts[file]
        if depth > 10:
            raise EditError("too many includes in each other")
        at = len(_BOM) if text.startswith(_BOM) else 0
        while at < len(text):
            end = text.find("\n", at)
            end = len(text) if end < 0 else end
            simple = _SIMPLE.fullmatch(text, at, end)
            if simple is not None and simple[1] != "include":
                self._add(file, (simple[1],), at, end, simple.start(2), simple.end(2))
            elif (line := text[at:end].strip()) and line[0] != "#":
                included = self._follow(file, line)
                if included is None:
                    end = self._statement(file, at, line[0] == "[")
                elif included in self.texts:
                    self._scan(included, depth + 1)
                else:
                    raise EditError(f"{included} was not read")
            at = end + 1

    def _add(self, file: str, key: Path, start: int, end: int, value: int, value_end: int) -> None:
        self.statements.append(Statement(
            file, self._open + key, self._headers, len(self._open), start, min(end + 1, len(self.texts[file])), value, value_end))

    def _statement(self, file: str, start: int, is_header: bool) -> int:
        """Take the statement that begins at a line start; return the end of its last line."""
        text = self.texts[file]
        if is_header:
            at = text.index("[", start) + 1
            many = text.startswith("[", at)
            path, at = _scan_key(text, at + many)
            if not text.startswith("]]" if many else "]", at):
                raise EditError(f"{file}: header at {start}")
            at += 1 + many
            self._headers += 1
            # What lies in an array of tables is never looked for: a part that no key can have keeps it apart.
            self._open = (*path, f"\0{self._headers}") if many else path
            line_end = self._line_end(file, at)
            self._add(file, (), start, line_end, 0, 0)
            return line_end
        key, at = _scan_key(text, start)
        if not text.startswith("=", at):
            raise EditError(f"{file}: no value at {start}")
        value = _blanks(text, at + 1)
        value_end = _scan_value(text, value)
        line_end = self._line_end(file, value_end)
        self._add(file, key, start, line_end, value, value_end)
        return line_end

    def _line_end(self, file: str, at: int) -> int:
        """End of the line that the statement ends on: only a comment may follow."""
        text = self.texts[file]
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        if text[at:end].strip()[:1] not in ("", "#"):
            raise EditError(f"{file}: something follows the value at {at}")
        return end

    # -- changing

    def set(self, path: Path, value: Value) -> Edit:
        """The edit that gives the entry `path` = (access, table, name) a value."""
        text = render_value(value)
        for found in self._pairs():
            if found.path == path[:len(found.path)]:
                if found.path == path:
                    return Edit(found.file, found.value, found.value_end, text)
                return _set_inline(found.file, self.texts[found.file], found.value, path[len(found.path):], text)
        table = path[:-1]
        header = next((s for s in self.statements if not s.value and s.path == table), None)
        if header is not None:
            return self._insert(next(s for s in reversed(self.statements) if s.header == header.header), path, text)
        dotted = [s for s in self._pairs() if s.path[:len(table)] == table]
        if dotted:
            return self._insert(dotted[-1], path, text)
        return self._append(path, text)

    def remove(self, path: Path) -> Edit | None:
        """The edit that takes the entry `path` away; None if there is none."""
        for found in self._pairs():
            if found.path == path[:len(found.path)]:
                if found.path == path:
                    return Edit(found.file, found.start, found.end, "")
                return _remove_inline(found.file, self.texts[found.file], found.value, path[len(found.path):])
        return None

    def _pairs(self) -> Iterator[Statement]:
        return (statement for statement in self.statements if statement.value)

    def _insert(self, after: Statement, path: Path, text: str) -> Edit:
        """A new line behind a statement, indented like it, in the words of its table."""
        before = self.texts[after.file]
        indent = before[after.start:_blanks(before, after.start)] if after.value else ""
        key = ".".join(map(render_key, path[after.depth:]))
        newline = self._newline(after.file)
        lead = "" if before[:after.end].endswith("\n") else newline
        return Edit(after.file, after.end, after.end, f"{lead}{indent}{key} = {text}{newline}")

    def _append(self, path: Path, text: str) -> Edit:
        """A new table at the end of the main file."""
        before, newline = self.texts[self.main], self._newline(self.main)
        lead = ("" if before.endswith("\n") else newline) + newline if before.strip(_BOM) else ""
        header = ".".join(map(render_key, path[:-1]))
        return Edit(self.main, len(before), len(before), f"{lead}[{header}]{newline}{render_key(path[-1])} = {text}{newline}")

    def _newline(self, file: str) -> str:
        text = self.texts[file]
        return "\r\n" if text[:text.find("\n")].endswith("\r") else "\n"


def _blanks(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    return match.end() if match else at


def _gap(text: str, at: int) -> int:
    match = _GAP.match(text, at)
    return match.end() if match else at


def _scan_key(text: str, at: int) -> tuple[Path, int]:
    """Return a dotted key and where it ends, blanks behind it included."""
    parts: list[str] = []
    while True:
        match = _KEY_PART.match(text, at)
        if match is None:
            raise EditError(f"no key at {at}")
        bare, basic, literal = match.groups()
        parts.append(bare or (literal if basic is None else tomllib.loads(f"x = {basic}")["x"]))
        at = match.end()
        if not text.startswith(".", at):
            return tuple(parts), at
        at += 1


def _scan_value(text: str, at: int) -> int:
    """Return where the value ends that begins at `at`."""
    if text.startswith("{", at):
        return _scan_inline(text, at)[1]
    if text.startswith("[", at):
        at = _gap(text, at + 1)
        while not text.startswith("]", at):
            at = _gap(text, _scan_value(text, at))
            if text.startswith(",", at):
                at = _gap(text, at + 1)
            elif not text.startswith("]", at):
                raise EditError(f"no end of the array at {at}")
        return at + 1
    for pattern in _VALUES:
        match = pattern.match(text, at)
        if match is not None:
            return at + len(match[0].rstrip())
    raise EditError(f"no value at {at}")


def _scan_inline(text: str, at: int) -> tuple[list[Item], int]:
    """Return the items of the inline table that begins at `at`, and where it ends."""
    items: list[Item] = []
    at = _blanks(text, at + 1)
    while not text.startswith("}", at):
        start = at
        path, at = _scan_key(text, at)
        if not text.startswith("=", at):
            raise EditError(f"no value at {at}")
        value = _blanks(text, at + 1)
        value_end = _scan_value(text, value)
        items.append(Item(path, start, value, value_end))
        at = _blanks(text, value_end)
        if text.startswith(",", at):
            at = _blanks(text, at + 1)
        elif not text.startswith("}", at):
            raise EditError(f"no end of the inline table at {at}")
    return items, at + 1


def _set_inline(file: str, text: str, at: int, path: Path, value: str) -> Edit:
    """The edit that gives `path` a value inside the inline table that begins at `at`."""
    if not text.startswith("{", at):
        raise EditError(f"{file}: no table at {at}")
    items, end = _scan_inline(text, at)
    for item in items:
        if item.path == path:
            return Edit(file, item.value, item.value_end, value)
        if item.path == path[:len(item.path)]:
            return _set_inline(file, text, item.value, path[len(item.path):], value)
    entry = f"{'.'.join(map(render_key, path))} = {value}"
    if items:
        return Edit(file, items[-1].value_end, items[-1].value_end, f", {entry}")
    return Edit(file, at, end, f"{{ {entry} }}")


def _remove_inline(file: str, text: str, at: int, path: Path) -> Edit | None:
    """The edit that takes `path` out of the inline table that begins at `at`."""
    if not text.startswith("{", at):
        raise EditError(f"{file}: no table at {at}")
    items, end = _scan_inline(text, at)
    for index, item in enumerate(items):
        if item.path != path[:len(item.path)]:
            continue
        if item.path != path:
            return _remove_inline(file, text, item.value, path[len(item.path):])
        if index + 1 < len(items):
            return Edit(file, item.start, items[index + 1].start, "")
        if index:
            return Edit(file, items[index - 1].value_end, item.value_end, "")
        return Edit(file, at, end, "{}")
    return None


def edit_texts(texts: Mapping[str, str], main: str, follow: Follow, changes: Sequence[tuple[Path, Value | None]]) -> dict[str, str]:
    """Return the files with some entries set, or removed where the value is None.  Raises EditError."""
    edited = dict(texts)
    try:
        for path, value in changes:
            layout = Layout(edited, main, follow)
            edit = layout.remove(path) if value is None else layout.set(path, value)
            if edit is not None:
                text = edited[edit.file]
                edited[edit.file] = text[:edit.start] + edit.text + text[edit.end:]
    except (RecursionError, ValueError) as error:          # ValueError: a key that tomllib does not take
        raise EditError(str(error)) from None
    return edited


def change_document(document: Mapping[str, Any], changes: Sequence[tuple[Path, Value | None]]) -> dict[str, Any]:
    """Return the document with the same changes: what the edited files have to mean.  An emptied table stays."""
    changed = dict(document)
    for path, value in changes:
        node = changed
        for name in path[:-1]:
            node[name] = dict(node.get(name, {}))
            node = node[name]
        if value is None:
            node.pop(path[-1], None)
        else:
            node[path[-1]] = value
    return changed


def same_documents(left: Any, right: Any) -> bool:
    """True if two documents mean the same: as equal as TOML values can be, an empty table of [access] like none."""
    return _equal(_without_empty(left), _without_empty(right))


def _without_empty(document: Mapping[str, Any]) -> dict[str, Any]:
    access = document.get("access", {})
    kept = {name: value for name, value in access.items() if value != {}} if isinstance(access, dict) else access
    return {**{name: value for name, value in document.items() if name != "access"}, **({"access": kept} if kept else {})}


def _equal(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_equal(value, right[name]) for name, value in left.items())
    if isinstance(left, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    return bool(left == right) or (left != left and right != right)        # NaN


# == 7. store ================================================================
# The configuration on disk.  A change reads main file and includes once, edits
# their text, validates the result as a start would, writes it whole and makes
# it live; nobody ever sees half of it.  One change at a time; writers outside
# (editors, other tools) are noticed just before the rename.
# Trap: a bind-mounted single file cannot be replaced, only overwritten.
# Source: api.md 7, 11, 12.

_LOCK_WAIT_S: Final = 10.0
_TRIES: Final = 3                        # how often a change starts again because somebody else wrote
_STALE_S: Final = 60.0                   # a temp file of this age has no writer any more, whatever its lock says
_FRESH_NS: Final = 2_000_000_000         # a file changed so lately may change again without another time stamp
_NAMED_ERRORS: Final = frozenset((errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT))


_USERS: Final = re.compile(rb"""(?m)^[ \t]*(?:\[?[ \t]*["']?access["']?[ \t]*\.[ \t]*)?["']?users["']?[ \t]*[].=]""")


class Outcome(NamedTuple):
    """What a change led to."""

    revision: str            # of the main file now
    settings: Settings       # in force now
    username: str
    secret: str              # of the user; empty after delete
    changed: bool            # something was written
    reset_wall: int          # reset_quota: unix seconds of the reset, else 0


class LostUpdate(Exception):
    """Somebody else wrote a file that was being changed."""


class Draft(NamedTuple):
    """The configuration as it was read for a change."""

    files: dict[str, bytes]  # path -> content, main file first
    texts: dict[str, str]
    document: dict[str, Any]


class Store:
    """Reads and changes the configuration; usable from any thread of the API."""

    def __init__(self, port: ControlPort) -> None:
        self._port = port
        self._path = port.config_path
        self._lock = threading.Lock()
        self._known: tuple[tuple[int, ...], str] = ((), "")    # stat of the main file, its revision
        self._warned_in_place = False
        self._sweep_leftovers()

    def revision(self) -> str:
        """SHA-256 of the main file, lower-case hex.  Raises ApiError(500)."""
        try:
            found = os.stat(self._path)
            mark = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            known, revision = self._known
            if mark != known:
                revision = self._revision_of(self._read(self._path))
                if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > _FRESH_NS:
                    self._known = (mark, revision)
        except OSError as error:
            raise internal_error(f"failed to read config: {describe_error(error, self._path)}") from None
        return revision

    def apply(self, command: Command, wanted: str | None) -> Outcome:
        """Carry out a change and make it live.  wanted: the revision it is meant for.  Raises ApiError."""
        if not self._lock.acquire(timeout=_LOCK_WAIT_S):
            raise internal_error("another change is still being written")
        try:
            for _ in range(_TRIES):
                try:
                    return self._apply(command, wanted)
                except LostUpdate:
                    continue
            raise ApiError(409, "revision_conflict", "Config revision mismatch")
        finally:
            self._lock.release()

    def close(self, timeout_s: float) -> None:
        """Wait for a change that is being written; refuse all further ones."""
        self._lock.acquire(timeout=timeout_s)

    # -- one change: gates 10-14 of api.md 4

    def _apply(self, command: Command, wanted: str | None) -> Outcome:
        draft = self._read_draft()
        revision = self._revision_of(draft.files[self._path])
        check_revision(wanted, revision)
        users = draft.document.get("access", {}).get("users")
        present = {"default": "0" * 32} if users is None else users
        _check_user(command, present)
        if command.action == "reset_quota":
            return self._reset_quota(command.username, revision)
        secret = command.secret or ""
        if command.action in ("create", "rotate_secret"):
            secret = secret or os.urandom(16).hex()
        changes = _plan_changes(command, secret, present if users is None else {})
        expected = change_document(draft.document, changes)
        try:
            loaded = self._port.accept(expected)
        except self._port.config_error as error:
            raise bad_request(f"config validation failed: {error}") from None
        if same_documents(expected, draft.document):
            files = draft.files
        else:
            files = self._edit(draft, changes, expected)
            self._write(draft.files, files, users_first=command.action == "delete")
        self._publish(loaded, files)
        if command.action == "delete":
            secret = ""
        else:
            secret = secret or present[command.username]
        return Outcome(self._revision_of(files[self._path]), self._port.settings, command.username, secret, files is not draft.files, 0)

    def _read_draft(self) -> Draft:
        """Main file and includes, read once.  Raises ApiError(500)."""
        try:
            main = self._read(self._path)
        except OSError as error:
            raise internal_error(f"failed to read config: {describe_error(error, self._path)}") from None
        files = {self._path: main}
        try:
            text = self._decode(self._path, main)
            while True:
                expanded, included = self._port.expand(text, files)
                unread = [path for path in included if path not in files]
                if not unread:
                    break
                files.update((path, self._read(path)) for path in unread)
            document = self._port.parse(expanded)
            try:
                self._port.accept(document)
            except self._port.config_error as error:
                if not getattr(error, "invalid", False):       # what only validation refuses, the change may repair (gate 13)
                    raise
            return Draft(files, {path: self._decode(path, data) for path, data in files.items()}, document)
        except (self._port.config_error, OSError) as error:
            raise internal_error(f"failed to load config: {error}") from None

    def _edit(self, draft: Draft, changes: Sequence[tuple[Path, Value | None]], expected: dict[str, Any]) -> dict[str, bytes]:
        """Content of every file after the change, verified.  Raises ApiError(500)."""
        try:
            texts = edit_texts(draft.texts, self._path, self._port.follow, changes)
            edited = {path: text.encode() for path, text in texts.items()}
            expanded, _ = self._port.expand(texts[self._path], edited)
            if same_documents(self._port.parse(expanded), expected):
                return edited
            reason = "the edited text does not mean what was intended"
        except (EditError, self._port.config_error, UnicodeError) as error:
            reason = str(error)
        if len(draft.files) > 1:
            raise internal_error(f"failed to serialize config: {reason}; a file with include lines is not written anew")
        try:
            import tomli_w
        except ImportError:
            raise internal_error(f"failed to serialize config: {reason}; tomli_w is not installed") from None
        try:
            text = tomli_w.dumps(expected)
            if not same_documents(self._port.parse(text), expected):
                raise ValueError("it does not read back")
            self._back_up(draft.files[self._path])
        except (ValueError, TypeError, self._port.config_error) as error:
            raise internal_error(f"failed to serialize config: {reason}; tomli_w: {error}") from None
        self._port.log.warn("the configuration could not be edited (%s): written anew, comments are lost; the old text is in %s.bak",
                            reason, self._path)
        return {self._path: text.encode()}

    def _publish(self, loaded: Loaded, files: dict[str, bytes]) -> None:
        """Make it live.  The file is written already: whatever fails here, the file is what counts, and the watcher tries again."""
        try:
            self._port.publish(loaded, files)
        except Exception as error:
            self._port.log.error("a written configuration could not be applied: %r", error)

    def _reset_quota(self, name: str, revision: str) -> Outcome:
        try:
            reset_wall = self._port.reset_quota(name)
        except KeyError:                       # in the file, but not in force yet: a pending edit outside
            raise not_found("User not found") from None
        except (OSError, TimeoutError) as error:
            raise internal_error(f"failed to write quota state: {error}") from None
        return Outcome(revision, self._port.settings, name, "", False, reset_wall)

    # -- files

    def _write(self, before: dict[str, bytes], after: dict[str, bytes], *, users_first: bool) -> None:
        """Write what differs.  Raises ApiError(500) and LostUpdate.

        Of several files the one with the users comes last, on delete first: a crash in between leaves entries of nobody,
        which do nothing.
        """
        changed = [path for path in after if after[path] != before[path]]
        changed.sort(key=lambda path: _holds_users(before[path]) is not users_first)
        current, written = dict(before), False
        for path in changed:
            try:
                replace_file(path, after[path], functools.partial(self._check_unchanged, current), self._warn_in_place)
            except OSError as error:
                raise internal_error(f"failed to write config: {describe_error(error, path)}") from None
            except LostUpdate:
                if not (written and users_first):
                    raise
                self._port.log.warn("%s was changed meanwhile: entries of a deleted user stay in it", path)
            current[path], written = after[path], True

    def _check_unchanged(self, files: dict[str, bytes]) -> None:
        for path, data in files.items():
            if self._read(path) != data:
                raise LostUpdate(path)

    def _warn_in_place(self, path: str) -> None:
        if not self._warned_in_place:
            self._port.log.warn("%s cannot be replaced (a mounted single file?): it is written in place, which a crash can tear; "
                                "mount its directory instead", path)
        self._warned_in_place = True

    def _back_up(self, data: bytes) -> None:
        """Keep the old text beside the file, with its mode and owner.  Raises ApiError(500)."""
        path = os.path.realpath(self._path)
        try:
            replace_file(f"{path}.bak", data, lambda: None, self._warn_in_place, like=path)
        except OSError as error:
            raise internal_error(f"failed to write config: {describe_error(error, f'{path}.bak')}") from None

    def _sweep_leftovers(self) -> None:
        """Remove temp files whose writer died."""
        paths = [self._path]
        with contextlib.suppress(OSError, ApiError, self._port.config_error):
            paths += self._port.expand(self._decode(self._path, self._read(self._path)))[1]
        for path in paths:
            remove_leftovers(os.path.realpath(path), time.time())

    def _read(self, path: str) -> bytes:
        with open(path, "rb") as file:
            return file.read()

    def _decode(self, path: str, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise internal_error(f"failed to load config: {path}: not valid UTF-8 at byte {error.start}") from None

    def _revision_of(self, data: bytes) -> str:
        self._decode(self._path, data)
        return hashlib.sha256(data).hexdigest()


def _check_user(command: Command, users: Mapping[str, Any]) -> None:
    """Gate 12.  Raises ApiError."""
    if command.action == "create":
        if command.username in users:
            raise ApiError(409, "user_exists", "User already exists")
    elif command.username not in users:
        raise not_found("User not found")
    elif command.action == "delete" and len(users) == 1:
        raise ApiError(409, "last_user_forbidden", "Cannot delete the last configured user")


def _plan_changes(command: Command, secret: str, implicit: Mapping[str, str]) -> list[tuple[Path, Value | None]]:
    """Entries to set or remove.  implicit: users that are in force although the file has no [access.users]."""
    name = command.username
    changes: list[tuple[Path, Value | None]] = [(("access", "users", user), known) for user, known in implicit.items()]
    if command.action == "delete":
        return [*changes, *((("access", table, name), None) for table in ("users", *TABLE_OF.values()))]
    if secret:
        changes.append((("access", "users", name), secret))
    return changes + [(("access", table, name), value) for table, value in command.entries.items()]


def _holds_users(data: bytes) -> bool:
    """A file that is likely to hold the users; a wrong guess costs an orphaned entry after a crash, no more."""
    return _USERS.search(data) is not None


def describe_error(error: OSError, path: str) -> str:
    """What went wrong with a file; where the directory decides it is named, because that is what the operator has to change."""
    text = f"{error.strerror} (os error {error.errno})"
    return f"{text}: directory {os.path.dirname(os.path.realpath(path))}" if error.errno in _NAMED_ERRORS else text


def replace_file(path: str, data: bytes, check: Callable[[], None], in_place: Callable[[str], None], like: str = "") -> None:
    """Put `data` in the place of a file in one step, with the mode and the owner of the old one (or of `like`).

    check() is the last moment to refuse; in_place(path) is told when the file can only be overwritten.  Raises OSError.
    """
    target = os.path.realpath(path)
    directory, name = os.path.split(target)
    draft = os.path.join(directory, f".{name}.tmp-{int.from_bytes(os.urandom(8), 'big')}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    left = True
    try:
        with contextlib.suppress(OSError):     # a lock says that the writer lives; without locks its age has to do
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _copy_metadata(like or target, fd)
        _write_all(fd, data)
        os.fsync(fd)
        check()
        try:
            os.replace(draft, target)
            left = False
        except FileNotFoundError:
            left = False
            raise LostUpdate(path) from None   # somebody took our temp file for a leftover
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV):
                raise
            in_place(target)
            _overwrite(target, data)
    finally:
        if left:
            with contextlib.suppress(OSError):
                os.unlink(draft)
        os.close(fd)
    with contextlib.suppress(OSError):         # some file systems cannot
        directory_fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory_fd)
        finally:
            os.close(directory_fd)


def _copy_metadata(source: str, fd: int) -> None:
    """Owner (as far as we may), mode and extended attributes of a file; a file that is not there gives none."""
    try:
        found = os.stat(source)
    except FileNotFoundError:
        return
    with contextlib.suppress(OSError):
        os.fchown(fd, found.st_uid, found.st_gid)
    os.fchmod(fd, stat.S_IMODE(found.st_mode))
    with contextlib.suppress(OSError, AttributeError):
        for name in os.listxattr(source):
            with contextlib.suppress(OSError):
                os.setxattr(fd, name, os.getxattr(source, name))


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def _overwrite(path: str, data: bytes) -> None:
    """Write over a file that cannot be replaced; room is made before anything of the old content goes."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        old = os.pread(fd, os.fstat(fd).st_size, 0)
        try:
            if len(data) > len(old):
                os.posix_fallocate(fd, 0, len(data))
            os.lseek(fd, 0, os.SEEK_SET)
            _write_all(fd, data)
            os.ftruncate(fd, len(data))
        except OSError:
            with contextlib.suppress(OSError):
                os.lseek(fd, 0, os.SEEK_SET)
                _write_all(fd, old)
                os.ftruncate(fd, len(old))
            raise
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_leftovers(target: str, now_wall: float) -> None:
    """Remove temp files of replace_file() whose writer is gone: nobody holds their lock, or they are older than a minute."""
    directory, name = os.path.split(target)
    pattern = re.compile(rf"\.{re.escape(name)}\.tmp-[0-9]+")
    with contextlib.suppress(OSError):
        for entry in os.listdir(directory):
            if pattern.fullmatch(entry):
                with contextlib.suppress(OSError):
                    _remove_leftover(os.path.join(directory, entry), now_wall)


def _remove_leftover(path: str, now_wall: float) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    except OSError:
        if now_wall - os.fstat(fd).st_mtime <= _STALE_S:
            return
    finally:
        os.close(fd)
    os.unlink(path)


# == 9. service ==============================================================
# Start and stop of everything above, called by cli of telemt.py.


def start(port: ControlPort) -> Callable[[], None]:
    """Open what the configuration asks for; returns what closes it again, within a second."""
    port.log.warn("control plane not started: the HTTP listener is not part of this version")
    return lambda: None


# == 10. qr ==================================================================
# A link as a QR code that a phone reads from a screen: byte mode, level M
# (15 % may be dirt or glare), the smallest version that holds the text.
# Steps: bits -> codewords -> Reed-Solomon over GF(256) per block -> interleave
# -> zigzag through the free modules -> the mask with the lowest penalty.
# Trap: format bits stand twice and are masked themselves; versions from 7 on
# carry version bits as well.
# Source: ISO/IEC 18004:2015; figures 13-22, tables 7, 9 and E.1.

_QR_VERSIONS: Final = 40
# Table 9, level M, versions 1..40: error correction codewords per block, and blocks.
_QR_CHECKS: Final = (10, 16, 26, 18, 24, 16, 18, 22, 22, 26, 30, 22, 22, 24, 24, 28, 28, 26, 26, 26, 26, *[28] * 19)
_QR_BLOCKS: Final = (1, 1, 1, 2, 2, 4, 4, 4, 5, 5, 5, 8, 9, 9, 10, 10, 11, 13, 14, 16, 17, 17, 18, 20, 21, 23, 25, 26, 28, 29, 31, 33, 35,
                     37, 38, 40, 43, 45, 47, 49)
_QR_PADS: Final = b"\xec\x11"
_QR_FORMAT_MASK: Final = 0x5412
_QR_MASKS: Final[tuple[Callable[[int, int], bool], ...]] = (
    lambda y, x: (y + x) % 2 == 0, lambda y, x: y % 2 == 0, lambda y, x: x % 3 == 0, lambda y, x: (y + x) % 3 == 0,
    lambda y, x: (y // 2 + x // 3) % 2 == 0, lambda y, x: y * x % 2 + y * x % 3 == 0,
    lambda y, x: (y * x % 2 + y * x % 3) % 2 == 0, lambda y, x: ((y + x) % 2 + y * x % 3) % 2 == 0)
_QR_RUN: Final = re.compile(rb"\x00+|\x01+")


class QrCode(NamedTuple):
    """A finished symbol without its quiet zone."""

    version: int
    rows: list[str]          # `0` = light, `1` = dark; 17 + 4 * version of each


def make_qr(text: str) -> QrCode:
    """Return the symbol for a text of at most 2,331 bytes.  Raises ValueError if it is longer."""
    data = text.encode()
    version = next((number for number in range(1, _QR_VERSIONS + 1) if _qr_room(number) >= len(data)), 0)
    if not version:
        raise ValueError(f"{len(data)} bytes do not fit into a QR code of level M")
    bits = _qr_codewords(data, version)
    plan = _QrPlan(version)
    plan.fill(bits)
    best = min((plan.masked(number) for number in range(8)), key=_qr_penalty)
    return QrCode(version, ["".join(map(str, row)) for row in best])


def _qr_raw_bytes(version: int) -> int:
    """Codewords that a version's free modules carry."""
    free = (16 * version + 128) * version + 64
    if version > 1:
        count = version // 7 + 2
        free -= (25 * count - 10) * count - 55
        if version > 6:
            free -= 36
    return free // 8


def _qr_data_bytes(version: int) -> int:
    return _qr_raw_bytes(version) - _QR_CHECKS[version - 1] * _QR_BLOCKS[version - 1]


def _qr_room(version: int) -> int:
    """Bytes of text that fit: mode and length take 12 or 20 bits."""
    return _qr_data_bytes(version) - (2 if version < 10 else 3)


def _qr_codewords(data: bytes, version: int) -> bytes:
    """Data and check bytes in the order in which they are drawn."""
    size = _qr_data_bytes(version)
    width = 8 if version < 10 else 16
    bits = (0b0100 << width | len(data)) << len(data) * 8 | int.from_bytes(data, "big")
    used = 4 + width + len(data) * 8
    closing = min(4, size * 8 - used)
    closing += -(used + closing) % 8
    message = (bits << closing).to_bytes((used + closing) // 8, "big")
    message += (_QR_PADS * size)[:size - len(message)]
    count, checks = _QR_BLOCKS[version - 1], _QR_CHECKS[version - 1]
    short, longer = divmod(size, count)          # the last `longer` blocks have one byte more
    blocks, at = [], 0
    for index in range(count):
        end = at + short + (index >= count - longer)
        blocks.append(message[at:end])
        at = end
    tails = [_qr_checks(block, checks) for block in blocks]
    columns = [block[place] for place in range(short + 1) for block in blocks if place < len(block)]
    return bytes(columns + [tail[place] for place in range(checks) for tail in tails])


def _gf_tables() -> tuple[bytes, bytes]:
    """Powers of 2 in GF(256) with polynomial 0x11d, twice in a row, and their logarithms."""
    powers, value = bytearray(), 1
    for _ in range(255):
        powers.append(value)
        value = value << 1 ^ (0x11D if value & 0x80 else 0)
    logs = bytearray(256)
    for exponent, power in enumerate(powers):
        logs[power] = exponent
    return bytes(powers * 2), bytes(logs)


_GF_POWER, _GF_LOG = _gf_tables()


def _qr_checks(block: bytes, count: int) -> bytes:
    """Reed-Solomon remainder of `block`, `count` bytes."""
    divisor = [1]                                # product of (x - 2^i), highest power first
    for exponent in range(count):
        product = [*divisor, 0]
        for place, factor in enumerate(divisor):
            if factor:
                product[place + 1] ^= _GF_POWER[_GF_LOG[factor] + exponent]
        divisor = product
    logs = [_GF_LOG[factor] for factor in divisor[1:]]
    rest = bytearray(count)
    for byte in block:
        lead = byte ^ rest[0]
        rest = rest[1:] + b"\0"
        if lead:
            shift = _GF_LOG[lead]
            for place, log in enumerate(logs):
                rest[place] ^= _GF_POWER[log + shift]
    return bytes(rest)


class _QrPlan:
    """Modules of one version: what every symbol has, then the data."""

    def __init__(self, version: int) -> None:
        self.version, self.size = version, 17 + 4 * version
        self.cells = [bytearray(self.size) for _ in range(self.size)]
        self.fixed = [bytearray(self.size) for _ in range(self.size)]      # 1 = no data, never masked
        for at in range(8, self.size - 8):       # timing
            self._set(6, at, at % 2 == 0)
            self._set(at, 6, at % 2 == 0)
        for y, x in ((3, 3), (3, self.size - 4), (self.size - 4, 3)):
            self._square(y, x, 4)
        places = self._alignments()
        for y, x in itertools.product(places, places):
            if (y, x) not in ((6, 6), (6, places[-1]), (places[-1], 6)):         # finders are there
                self._square(y, x, 2)
        self._format(0)
        if version > 6:
            self._version()

    def _set(self, y: int, x: int, dark: bool) -> None:
        self.cells[y][x], self.fixed[y][x] = dark, 1

    def _square(self, y: int, x: int, reach: int) -> None:
        """A finder with its light border (reach 4) or an alignment pattern (reach 2)."""
        for down in range(-reach, reach + 1):
            for right in range(-reach, reach + 1):
                if 0 <= y + down < self.size and 0 <= x + right < self.size:
                    ring = max(abs(down), abs(right))
                    self._set(y + down, x + right, ring not in ((2, 4) if reach == 4 else (1,)))

    def _alignments(self) -> list[int]:
        """Table E.1: rows and columns of alignment patterns."""
        if self.version == 1:
            return []
        count = self.version // 7 + 2
        step = 26 if self.version == 32 else (self.version * 4 + count * 2 + 1) // (count * 2 - 2) * 2
        return [6, *reversed([self.size - 7 - index * step for index in range(count - 1)])]

    def _format(self, mask: int) -> None:
        """Level M (00) and mask, with 10 check bits, in both places."""
        rest = mask << 10
        for shift in range(4, -1, -1):
            if rest >> shift + 10 & 1:
                rest ^= 0x537 << shift
        bits = (mask << 10 | rest) ^ _QR_FORMAT_MASK
        first = [(y, 8) for y in (0, 1, 2, 3, 4, 5, 7, 8)] + [(8, x) for x in (7, 5, 4, 3, 2, 1, 0)]
        second = [(8, self.size - 1 - x) for x in range(8)] + [(self.size - 7 + y, 8) for y in range(7)]
        for place in (first, second):
            for shift, (y, x) in enumerate(place):
                self._set(y, x, bool(bits >> shift & 1))
        self._set(self.size - 8, 8, True)        # the dark module

    def _version(self) -> None:
        rest = self.version << 12
        for shift in range(5, -1, -1):
            if rest >> shift + 12 & 1:
                rest ^= 0x1F25 << shift
        bits = self.version << 12 | rest
        for shift in range(18):
            dark, far, near = bool(bits >> shift & 1), self.size - 11 + shift % 3, shift // 3
            self._set(far, near, dark)
            self._set(near, far, dark)

    def fill(self, codewords: bytes) -> None:
        """Draw the bits in columns of two, from the right, up and down by turns (7.7.3)."""
        bits = (byte >> shift & 1 for byte in codewords for shift in range(7, -1, -1))
        up = True
        for right in range(self.size - 1, 0, -2):
            right -= right <= 6                  # the timing column is none
            for y in range(self.size - 1, -1, -1) if up else range(self.size):
                for x in (right, right - 1):
                    if not self.fixed[y][x]:
                        self.cells[y][x] = next(bits, 0)
            up = not up

    def masked(self, number: int) -> list[bytearray]:
        """The symbol under one of the eight masks."""
        self._format(number)
        rule = _QR_MASKS[number]
        return [bytearray(cell ^ (not fixed and rule(y, x)) for x, (cell, fixed) in enumerate(zip(row, self.fixed[y], strict=True)))
                for y, row in enumerate(self.cells)]


def _qr_penalty(rows: list[bytearray]) -> int:
    """Points against a mask (7.8.3): runs, blocks, what looks like a finder, and too much of one colour."""
    size, points = len(rows), 0
    for line in (*rows, *map(bytearray, zip(*rows, strict=True))):
        runs = [len(run) for run in _QR_RUN.findall(line if not line[0] else b"\0" + line)]
        runs[0] -= line[0]                       # lengths of light and dark runs by turns, the first one light
        points += sum(length - 2 for length in runs if length >= 5)
        runs[0] += size                          # the quiet zone is light
        runs[-1:] = [runs[-1] + size] if len(runs) % 2 else [runs[-1], size]
        points += 40 * sum(map(_qr_finders, range(1, len(runs) - 5, 2), itertools.repeat(runs)))
    for upper, lower in itertools.pairwise(rows):
        points += sum(3 for x in range(size - 1) if upper[x] == upper[x + 1] == lower[x] == lower[x + 1])
    excess = abs(sum(map(sum, rows)) * 20 - size * size * 10)
    return points + 10 * max(0, -(-excess // (size * size)) - 1)


def _qr_finders(at: int, runs: list[int]) -> int:
    """How often the runs from `at` on look like a finder: 1:1:3:1:1, and 4 light ones on one side or on both."""
    unit, before, after = runs[at], runs[at - 1], runs[at + 5]
    if runs[at:at + 5] != [unit, unit, 3 * unit, unit, unit]:
        return 0
    return (before >= 4 * unit and after >= unit) + (after >= 4 * unit and before >= unit)


def draw_qr(code: QrCode, plain: bool = False) -> list[str]:
    """Lines of half blocks with the quiet zone of 4 that readers want: black on white whatever the terminal's colours are.

    plain: without escape sequences; what is light is drawn then, which suits light text on a dark terminal.
    """
    width = len(code.rows) + 8
    rows = ["0" * width] * 4 + [f"0000{row}0000" for row in code.rows] + ["0" * width] * (4 + len(code.rows) % 2)
    light = "█▀▄ " if plain else " ▄▀█"            # light over light, light over dark, dark over light, dark over dark
    before, after = ("", "") if plain else ("\x1b[30;107m", "\x1b[0m")
    return [before + "".join(light[int(over + under, 2)] for over, under in zip(upper, lower, strict=True)) + after
            for upper, lower in zip(rows[::2], rows[1::2], strict=True)]
