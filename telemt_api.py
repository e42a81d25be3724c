"""telemt_api.py - what operators see and steer: the Control API `/v1` and the metrics of telemt.py.

telemt.py imports this file when the configuration enables the API or the metrics; without it the proxy runs on.  It works
in its own threads.  They read plain integers of the data plane and ask its loop for everything else (`ControlPort`), so
that no HTTP client, slow or hostile, holds up a session.  telemt.py runs as `__main__`: to import it here would load it a
second time, so its names appear in annotations only.

   1  envelope    pure  <- -               answers: ApiError, JSON out and in, revision and If-Match; ControlPort
   2  views       pure  <- 1               what the data plane knows -> `data` of an answer
   3  metrics     pure  <- 2               the Prometheus page
   4  commands    pure  <- 1               what a mutating request wants
   5  tomledit    pure  <- 4               single entries of [access.*] changed in the text, everything else kept
   6  routes      pure  <- 1-3             which requests exist; the OpenAPI document
   7  store       io    <- 1 4 5           the configuration on disk: revision, changes
   8  http        io    <- 1               HTTP/1.1 for few clients, none of whom is trusted
   9  qr          pure  <- -               a link as a QR code
  10  page        pure  <- -               the status page: style, script, headers
  11  service     io    <- 1-4 6-10        gates and handlers; start and stop
  12  top         io    <- 2 8             the same figures in a terminal
"""
from __future__ import annotations

import _thread
import binascii
import collections
import contextlib
import datetime
import errno
import fcntl
import functools
import hashlib
import heapq
import hmac
import ipaddress
import itertools
import json
import math
import os
import re
import select
import signal
import socket
import socketserver
import stat
import struct
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

# http.server brings http.client along, and that OpenSSL, 3 MB, for connections that nothing here makes.
_ssl = sys.modules.get("ssl")
sys.modules["ssl"] = None  # type: ignore[assignment]
try:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    _NO_HTTP = ""
except ImportError as error:                   # a small Python: QR codes and `top` work, start() says what is missing
    _NO_HTTP = error.name or "http.server"
    BaseHTTPRequestHandler = ThreadingHTTPServer = object  # type: ignore[assignment, misc]

if _ssl is None:
    del sys.modules["ssl"]
else:
    sys.modules["ssl"] = _ssl

if TYPE_CHECKING:
    from telemt import (
        Access,
        Api,
        Counters,
        General,
        IpNetwork,
        Link,
        Loaded,
        Log,
        MeCounters,
        PoolSnapshot,
        RouteSnapshot,
        ServerSettings,
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
    return _ENCODER.encode(value)


_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def success_body(data: str, revision: str) -> list[bytes]:
    """Envelope around `data`, which is JSON already; in pieces, because `data` may be a list of thousands of users."""
    return [b'{"ok":true,"data":', data.encode("utf-8", "replace"), f',"revision":"{revision}"}}'.encode()]


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
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_parse_int, parse_float=_parse_float)
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


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("beyond all numbers")
    return value


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
    version: str                         # of the program
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

    def inherited(self, host: str, port: int) -> int:
        """Descriptor of the listening socket of this address that the program before us handed over, ours from now on; -1: none."""

    def listens(self, fd: int) -> None:
        """This socket listens for us: an exchange of programs hands it on."""


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
    stages = sorted(counters.failures_by_stage.copy().items())
    return {"connections_bad_by_class": [{"class": word, "total": total} for word, total in bad if total],
            "handshake_failures_by_class": [{"class": word, "total": total} for word, total in failed if total],
            "handshake_failures_by_stage": [{"stage": word, "total": total} for word, total in stages if total]}


def view_upstream_totals(counters: Counters) -> JsonObject:
    """The sixteen totals of connect requests."""
    return dict(zip(_CONNECT_TOTALS, connect_totals(counters), strict=True))


def connect_totals(counters: Counters) -> tuple[int, ...]:
    """Numbers for _CONNECT_TOTALS."""
    return (counters.connect_attempt_total, counters.connect_success_total, counters.connect_fail_total,
            counters.connect_failfast_hard_error_total, *counters.connect_attempts, *counters.connect_success_ms, *counters.connect_fail_ms)


_CONNECT_TOTALS: Final = (
    "connect_attempt_total", "connect_success_total", "connect_fail_total", "connect_failfast_hard_error_total",
    *(f"connect_attempts_bucket_{word}" for word in _BUCKETS_ATTEMPTS),
    *(f"connect_duration_{end}_bucket_{word}" for end in ("success", "fail") for word in _BUCKETS_MS))


class MiddleForm:
    """The sections middle_proxy, pool and desync of zero/all as a format; made once, because a panel asks 50 times a second.

    Between two of its questions next to nothing happens there: the last text is kept with the numbers that stand in it.
    """

    __slots__ = ("last", "runs", "text")

    def __init__(self, text: str, runs: Sequence[Sequence[str]]) -> None:
        """runs: totals in the text: up to the error codes, up to the draining writers, the rest."""
        self.text, self.runs = text, runs
        self.last: tuple[tuple[object, ...], str] = ((), "")


def make_middle_form(me: MeCounters) -> MiddleForm:
    """The form for these counters."""
    sections: list[str] = []
    runs: list[list[str]] = [[]]
    for name, words in me.sections.items():
        members = []
        for word in words if name else ():
            members.append(f'"{word}":%d')
            runs[-1].append(word)
            if word in _BEHIND:
                members.append(f'"{_BEHIND[word]}":%s')
                runs.append([])
        if members:
            sections.append(f'"{name}":{{{",".join(members)}}}')
    return MiddleForm(",".join(sections), runs)


_BEHIND: Final = {"handshake_reject_total": "handshake_error_codes", "pool_swap_total": "pool_drain_active"}


def render_middle_totals(me: MeCounters, form: MiddleForm) -> str:
    """Members middle_proxy, pool and desync of zero/all as JSON."""
    draining, codes = drain_active(me), me.error_codes.copy()
    mark = draining, codes, *me.totals.values()
    known, text = form.last
    if known != mark:
        rows = dump_json([{"code": code, "total": total} for code, total in sorted(codes.items())])
        total, (first, second, third) = me.totals.__getitem__, form.runs
        text = form.text % (*map(total, first), rows, *map(total, second), draining, *map(total, third))
        form.last = mark, text                 # one assignment: other threads read it
    return text


def drain_active(me: MeCounters) -> int:
    """The gauge of draining writers: class D, so it reads 0 below level debug."""
    return me.draining if me.level >= 2 else 0


def render_zero_all(counters: Counters, form: MiddleForm, telemetry: Telemetry, uptime_s: float, users: int, now_s: int) -> str:
    """Every counter (9.3) as JSON; like a dump_json() of the views, without making them."""
    refused = _NO_REFUSALS
    if counters.bad_by_class or counters.failures_by_class or counters.failures_by_stage:
        refused = dump_json(view_refusals(counters))
    return _ZERO_ALL % (
        now_s, float(uptime_s), counters.connections_total, counters.connections_bad_total, counters.handshake_timeouts_total, users,
        _WORD[telemetry.core_enabled], _WORD[telemetry.user_enabled], telemetry.me_level, refused[1:-1],
        *connect_totals(counters), render_middle_totals(counters.me, form))


_WORD: Final = {False: "false", True: "true"}
_NO_REFUSALS: Final = '{"connections_bad_by_class":[],"handshake_failures_by_class":[],"handshake_failures_by_stage":[]}'
_ZERO_ALL: Final = (
    '{"generated_at_epoch_secs":%d,"core":{"uptime_seconds":%r,"connections_total":%d,"connections_bad_total":%d,'
    '"handshake_timeouts_total":%d,"configured_users":%d,"telemetry_core_enabled":%s,"telemetry_user_enabled":%s,'
    '"telemetry_me_level":"%s",%s},"upstream":{' + ",".join(f'"{name}":%d' for name in _CONNECT_TOTALS) + "},%s}")


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


class UserFrame:
    """JSON of a user as far as it follows from the configuration; what the user does goes between.

    Most of a thousand users do nothing between two polls: the last text is kept with the numbers that stand in it.
    """

    __slots__ = ("before", "between", "last")

    def __init__(self, before: str, between: str) -> None:
        self.before, self.between = before, between
        self.last: tuple[tuple[int, ...], str] = ((), "")


def frame_user(name: str, access: Access, links: JsonObject) -> UserFrame:
    """The lasting part of UserInfo (9.8): made once per configuration, because a panel asks for a thousand of them every second."""
    until = access.user_expirations.get(name)
    limits = {"username": name, "user_ad_tag": access.user_ad_tags.get(name), "max_tcp_conns": access.user_max_tcp_conns.get(name),
              "expiration_rfc3339": None if until is None else format_time(until), "data_quota_bytes": access.user_data_quota.get(name),
              "max_unique_ips": access.user_max_unique_ips.get(name)}
    switches = {"links": links, "enabled": access.user_enabled.get(name, True), "in_runtime": True}
    return UserFrame(dump_json(limits)[:-1], dump_json(switches)[1:-1])


def render_user(frame: UserFrame, user: User | None, counted: bool, now: float) -> str:
    """UserInfo as JSON; user: what it uses now, None before it is live.

    counted: general.telemetry.user_enabled; now: monotonic seconds.
    """
    mark = current, up, down, used = 0, 0, 0, 0
    ips: list[str] = []
    recent: list[str] = []
    if user is not None:
        stats = user.stats
        mark = current, up, down, used = stats.current if counted else 0, stats.octets_from_client, stats.octets_to_client, user.used
        if user.ips or user.recent:
            ips, recent = sorted_ips(list(user.ips)), sorted_ips(user.recent_ips(now))
    known, text = frame.last
    if known == mark and not (ips or recent):
        return text
    text = (f'{frame.before},"current_connections":{current},"active_unique_ips":{len(ips)},"total_octets":{up + down},{frame.between}'
            f',"active_unique_ips_list":{dump_json(ips) if ips else "[]"},"recent_unique_ips":{len(recent)}'
            f',"recent_unique_ips_list":{dump_json(recent) if recent else "[]"},"octets_from_client":{up},"octets_to_client":{down}'
            f',"quota_used_bytes":{used}}}')
    if not (ips or recent):
        frame.last = mark, text                # one assignment: other threads read it
    return text


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
    """runtime/gates; route: None without `use_middle_proxy`, and as long as the data plane has never told."""
    middle, degrade = general.use_middle_proxy, general.auto_degradation_enabled
    pool_ready = not middle or (route is not None and route.me_ready)
    ready = accepting and (pool_ready or degrade)
    if stage == "ready":                 # all steps are done, and yet it is not fit for clients
        stage = "me_pool_init_stage1" if accepting else "listeners_bind"
    word = "ready" if ready else stage
    goes_middle = middle and (route is None or route.middle)
    found: JsonObject = {
        "accepting_new_connections": accepting, "conditional_cast_enabled": middle, "me_runtime_ready": pool_ready,
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
    for name, help, listed, shown in USER_IP_TABLE:
        yield _head(name, "gauge", help)
        users = [user for user in facts.users if user.ips or listed(user, facts)][:SERIES_USERS_MAX]
        yield from _pieces(f'{name}{{user="{label(user.name)}"}} {shown(user, facts)}\n' for user in users)


def _has_limit(user: User, facts: Facts) -> bool:
    return user.name in facts.ip_limits


def _utilization(user: User, facts: Facts) -> str:
    limit = facts.ip_limits.get(user.name, 0)
    return f"{len(user.ips) / limit if limit else 0:.6f}"


# name, help, who is listed beside those who are connected, value
USER_IP_TABLE: Final[Sequence[tuple[str, str, Callable[[User, Facts], bool], Callable[[User, Facts], int | str]]]] = (
    ("telemt_user_unique_ips_current", "Source addresses of the user now.", _has_limit, lambda user, facts: len(user.ips)),
    ("telemt_user_unique_ips_limit", "access.user_max_unique_ips; 0 = unset.", _has_limit,
     lambda user, facts: facts.ip_limits.get(user.name, 0)),
    ("telemt_user_unique_ips_utilization", "Part of the limit that is used.", _has_limit, _utilization),
    ("telemt_user_unique_ips_recent_window", "Source addresses admitted within the last 30 s.",
     lambda user, facts: bool(user.recent), lambda user, facts: len(user.recent_ips(facts.now))),
)


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


# == 6. routes ===============================================================
# One table says which requests exist.  The dispatcher, the OpenAPI document that
# /v1/openapi.json serves, docs/api.md and the contract tests are made from it.
# Shapes are written in one line: `name:type` members, `name?:type` where a member
# is omitted when absent.  Types: int (>= 0), num, pct, bool, str, link, =constant,
# words with | between them, [array], Name of another shape; ~ behind it: nullable.
# Traps: an unknown method on a known fixed path is 404, on one user 405, POST there
# 404 again (api.md 5); the name of a user is decoded, the rest of a path never.

class Route(NamedTuple):
    """One request that is answered."""

    method: str
    path: str                    # {username} stands for one segment
    name: str                    # handler; operationId where that is not in _OPERATIONS
    data: str                    # shape of `data`; empty: no envelope
    summary: str
    action: str = ""             # of a mutation: what parse_command() is told
    body: str = ""               # shape of the body; `ignored`: read and thrown away
    status: int = 200


ROUTES: Final = (
    Route("GET", "/v1/health", "get_health", "HealthData", "Liveness and read-only flag"),
    Route("GET", "/v1/health/ready", "get_ready", "ReadyData", "Fit for new clients? Not ready is 503 with this envelope"),
    Route("GET", "/v1/system/info", "get_system_info", "SystemInfoData", "Version, platform, configuration file"),
    Route("GET", "/v1/stats/summary", "get_summary", "SummaryData", "Core counters"),
    Route("GET", "/v1/stats/zero/all", "get_zero_all", "ZeroAllData", "All counters (zero cost)"),
    Route("GET", "/v1/stats/upstreams", "get_upstreams", "UpstreamsData", "Upstream counters and, when enabled, health rows"),
    Route("GET", "/v1/stats/minimal/all", "get_minimal_all", "MinimalAllData", "Middle-End runtime snapshot (gated, cached)"),
    Route("GET", "/v1/stats/me-writers", "get_me_writers", "MeWritersData", "Alias of data.me_writers of minimal/all"),
    Route("GET", "/v1/stats/dcs", "get_dcs", "DcStatusData", "Alias of data.dcs of minimal/all"),
    Route("GET", "/v1/stats/users", "get_users", "[UserInfo]", "Same as GET /v1/users"),
    Route("GET", "/v1/stats/users/active-ips", "get_active_ips", "[ActiveIps]", "Users that are connected, with their addresses"),
    Route("GET", "/v1/stats/users/quota", "get_quotas", "UserQuotaListData", "Quota use of the users that have a quota"),
    Route("GET", "/v1/users", "get_users", "[UserInfo]", "All users"),
    Route("POST", "/v1/users", "create_user", "CreateUserResponse", "Create a user", "create", "CreateUserRequest", 201),
    Route("GET", "/v1/users/{username}", "get_user", "UserInfo", "One user"),
    Route("PATCH", "/v1/users/{username}", "patch_user", "UserInfo", "Change a user", "patch", "PatchUserRequest"),
    Route("DELETE", "/v1/users/{username}", "delete_user", "str", "Delete a user", "delete"),
    Route("POST", "/v1/users/{username}/rotate-secret", "rotate_secret", "CreateUserResponse", "Replace the secret of a user",
          "rotate_secret", "RotateSecretRequest"),
    Route("POST", "/v1/users/{username}/enable", "enable_user", "UserInfo", "Enable a user", "enable", "ignored"),
    Route("POST", "/v1/users/{username}/disable", "disable_user", "UserInfo", "Disable a user and close its sessions", "disable",
          "ignored"),
    Route("POST", "/v1/users/{username}/reset-quota", "reset_quota", "ResetUserQuotaResponse", "Set the used octets of a user to 0",
          "reset_quota", "ignored"),
    Route("GET", "/v1/users/{username}/qr", "get_qr", "QrData", "QR matrix of one link of a user; query: kind, index"),
    Route("GET", "/v1/limits/effective", "get_limits", "LimitsData", "Timeouts and policies in force"),
    Route("GET", "/v1/security/posture", "get_posture", "PostureData", "Switches of API and telemetry"),
    Route("GET", "/v1/security/whitelist", "get_whitelist", "WhitelistData", "Networks that may use the API"),
    Route("GET", "/v1/runtime/gates", "get_gates", "GatesData", "Admission and start-up state"),
    Route("GET", "/v1/runtime/me_pool_state", "get_pool_state", "PoolStateBlock", "Generations, writers and refills of the pool"),
    Route("GET", "/v1/runtime/me-pool-state", "get_pool_state", "PoolStateBlock", "The same"),
    Route("GET", "/v1/runtime/me_quality", "get_me_quality", "MeQualityBlock", "Counters and round-trip times of the pool"),
    Route("GET", "/v1/runtime/me-quality", "get_me_quality", "MeQualityBlock", "The same"),
    Route("GET", "/v1/runtime/upstream_quality", "get_upstream_quality", "UpstreamQualityData", "Retry policy, counters, upstream rows"),
    Route("GET", "/v1/runtime/upstream-quality", "get_upstream_quality", "UpstreamQualityData", "The same"),
    Route("GET", "/v1/runtime/nat_stun", "get_nat_stun", "NatStunBlock", "What STUN found out"),
    Route("GET", "/v1/runtime/nat-stun", "get_nat_stun", "NatStunBlock", "The same"),
    Route("GET", "/v1/runtime/me-selftest", "get_selftest", "UnavailableBlock", "Always unavailable in this version"),
    Route("GET", "/v1/runtime/connections/summary", "get_connections", "ConnectionsBlock", "Totals and the busiest users"),
    Route("GET", "/v1/runtime/events/recent", "get_events", "EventsBlock", "What the control plane did lately; query: limit"),
    Route("GET", "/v1/openapi.json", "get_openapi", "", "The OpenAPI document of this version"),
)
_USER: Final = re.compile(r"/v1/users/([^/]+)(/[^/]+)?")
_PERCENT: Final = re.compile(rb"%([0-9A-Fa-f]{2})")
NOBODY: Final = "\ud800"                 # stands for a name that cannot be decoded: no user can be called so
EVENTS_SHOWN: Final = 50


@functools.lru_cache(maxsize=16)
def path_of(target: str) -> str:
    """Path of a request target: without query, fragment and trailing slashes; of an absolute form, what follows the host."""
    path = re.split("[?#]", target, maxsplit=1)[0]
    if not path.startswith("/"):
        path = re.sub("^[A-Za-z][A-Za-z0-9+.-]*://[^/]*", "", path)
    return path.rstrip("/") or "/"


def find_route(method: str, path: str) -> tuple[Route, str]:
    """Return the route of a request, and the user it names.  Raises ApiError 404 or 405."""
    fixed = _FIXED.get((method, path))
    if fixed is not None:
        return fixed, ""
    match = None if path in _FIXED_PATHS else _USER.fullmatch(path)
    if match is None:
        raise not_found()
    route = _FIXED.get((method, "/v1/users/{username}" + (match[2] or "")))
    if route is not None:
        return route, decode_segment(match[1])
    if match[2] or method == "POST":
        raise not_found()
    raise ApiError(405, "method_not_allowed", "Unsupported HTTP method for this route")


_FIXED: Final = {(route.method, route.path): route for route in ROUTES}
_FIXED_PATHS: Final = frozenset(route.path for route in ROUTES)


def percent_decode(text: str) -> str:
    """Decode UTF-8 in percent notation.  Raises ValueError where it is none."""
    raw = text.encode("latin-1")
    if raw.count(b"%") != len(_PERCENT.findall(raw)):
        raise ValueError("bad escape")
    return _PERCENT.sub(lambda found: bytes([int(found[1], 16)]), raw).decode()


def decode_segment(segment: str) -> str:
    """Name of a user in a path; NOBODY for what is no name: not UTF-8, a slash, a control character."""
    try:
        name = percent_decode(segment)
    except ValueError:
        return NOBODY
    return NOBODY if "/" in name or any(ord(char) < 32 or 127 <= ord(char) < 160 for char in name) else name


def query_of(target: str) -> dict[str, str]:
    """Members of the query; the first of a name counts, what cannot be decoded is left out."""
    found: dict[str, str] = {}
    for part in target.partition("#")[0].partition("?")[2].split("&")[:100]:
        name, _, value = part.partition("=")
        try:
            found.setdefault(percent_decode(name), percent_decode(value))
        except ValueError:
            continue
    return found


def events_limit(target: str) -> int:
    """How many events a request wants: 1 to 1000, 50 without a number."""
    text = query_of(target).get("limit", "")
    return max(1, min(1000, int(text[:9]))) if text.isascii() and text.isdigit() else EVENTS_SHOWN


def wanted_link(target: str) -> tuple[str, int]:
    """(kind, index) of the link that a request for a QR code means.  Raises ApiError(400)."""
    query = query_of(target)
    kind, index = query.get("kind", "tls"), query.get("index", "0")
    if kind not in LINK_KINDS:
        raise bad_request(f"kind must be one of {', '.join(LINK_KINDS)}")
    if not re.fullmatch("[0-9]{1,4}", index):
        raise bad_request("index must be within [0, 9999]")
    return kind, int(index)


LINK_KINDS: Final = ("tls", "tls_domains", "secure", "classic")


# -- shapes

_COUNTS: Final = " ".join(f"{name}:int" for name in """
    connect_attempt_total connect_success_total connect_fail_total connect_failfast_hard_error_total connect_attempts_bucket_1
    connect_attempts_bucket_2 connect_attempts_bucket_3_4 connect_attempts_bucket_gt_4 connect_duration_success_bucket_le_100ms
    connect_duration_success_bucket_101_500ms connect_duration_success_bucket_501_1000ms connect_duration_success_bucket_gt_1000ms
    connect_duration_fail_bucket_le_100ms connect_duration_fail_bucket_101_500ms connect_duration_fail_bucket_501_1000ms
    connect_duration_fail_bucket_gt_1000ms""".split())
_CORE: Final = """uptime_seconds:num connections_total:int connections_bad_total:int handshake_timeouts_total:int configured_users:int"""
_REFUSALS: Final = """ connections_bad_by_class:[ClassCount] handshake_failures_by_class:[ClassCount]
    handshake_failures_by_stage:[StageCount]"""
_GATED: Final = "enabled:bool reason?:feature_disabled|source_unavailable generated_at_epoch_secs:int"
_CHANGES: Final = """secret?:Secret~ user_ad_tag?:AdTag~ max_tcp_conns?:limit~ expiration_rfc3339?:moment~ data_quota_bytes?:limit~
    max_unique_ips?:limit~ enabled?:bool~"""

SHAPES: Final = {
    "HealthData": "status:=ok read_only:bool",
    "ReadyData": """ready:bool status:ready|not_ready reason?:admission_closed|no_healthy_upstreams admission_open:bool
        healthy_upstreams:int total_upstreams:int""",
    "SystemInfoData": """version:str target_arch:str target_os:str build_profile:=release process_started_at_epoch_secs:int
        uptime_seconds:num config_path:str config_hash:Revision config_reload_count:int last_config_reload_epoch_secs?:int""",
    "SummaryData": _CORE + _REFUSALS,
    "ClassCount": "class:str total:int",
    "StageCount": "stage:" + "|".join(FAILURE_STAGES) + " total:int",
    "ZeroCoreData": _CORE + """ telemetry_core_enabled:bool telemetry_user_enabled:bool
        telemetry_me_level:silent|normal|debug""" + _REFUSALS,
    "ZeroUpstreamData": _COUNTS,
    "ZeroCodeCount": "code:signed total:int",
    "ZeroMiddleProxyData": """keepalive_sent_total:int keepalive_failed_total:int keepalive_pong_total:int keepalive_timeout_total:int
        rpc_proxy_req_signal_sent_total:int rpc_proxy_req_signal_failed_total:int rpc_proxy_req_signal_skipped_no_meta_total:int
        rpc_proxy_req_signal_response_total:int rpc_proxy_req_signal_close_sent_total:int reconnect_attempt_total:int
        reconnect_success_total:int handshake_reject_total:int handshake_error_codes:[ZeroCodeCount] reader_eof_total:int
        idle_close_by_peer_total:int route_drop_no_conn_total:int route_drop_channel_closed_total:int route_drop_queue_full_total:int
        route_drop_queue_full_base_total:int route_drop_queue_full_high_total:int socks_kdf_strict_reject_total:int
        socks_kdf_compat_fallback_total:int endpoint_quarantine_total:int kdf_drift_total:int kdf_port_only_drift_total:int
        hardswap_pending_reuse_total:int hardswap_pending_ttl_expired_total:int single_endpoint_outage_enter_total:int
        single_endpoint_outage_exit_total:int single_endpoint_outage_reconnect_attempt_total:int
        single_endpoint_outage_reconnect_success_total:int single_endpoint_quarantine_bypass_total:int
        single_endpoint_shadow_rotate_total:int single_endpoint_shadow_rotate_skipped_quarantine_total:int floor_mode_switch_total:int
        floor_mode_switch_static_to_adaptive_total:int floor_mode_switch_adaptive_to_static_total:int""",
    "ZeroPoolData": """pool_swap_total:int pool_drain_active:int pool_force_close_total:int pool_stale_pick_total:int
        writer_removed_total:int writer_removed_unexpected_total:int refill_triggered_total:int refill_skipped_inflight_total:int
        refill_failed_total:int writer_restored_same_endpoint_total:int writer_restored_fallback_total:int""",
    "ZeroDesyncData": """secure_padding_invalid_total:int desync_total:int desync_full_logged_total:int desync_suppressed_total:int
        desync_frames_bucket_0:int desync_frames_bucket_1_2:int desync_frames_bucket_3_10:int desync_frames_bucket_gt_10:int""",
    "ZeroAllData": """generated_at_epoch_secs:int core:ZeroCoreData upstream:ZeroUpstreamData middle_proxy:ZeroMiddleProxyData
        pool:ZeroPoolData desync:ZeroDesyncData""",
    "UpstreamSummaryData": """configured_total:int healthy_total:int unhealthy_total:int direct_total:int socks4_total:int
        socks5_total:int""",
    "UpstreamDcStatus": "dc:int latency_ema_ms:num~ ip_preference:unknown|prefer_v6|prefer_v4|both_work|unavailable",
    "UpstreamStatus": """upstream_id:int route_kind:direct|socks4|socks5 address:str weight:int scopes:str healthy:bool fails:int
        last_check_age_secs:int effective_latency_ms:num~ dc:[UpstreamDcStatus]""",
    "UpstreamsData": _GATED + " zero:ZeroUpstreamData summary?:UpstreamSummaryData upstreams?:[UpstreamStatus]",
    "MeWritersSummary": """configured_dc_groups:int configured_endpoints:int available_endpoints:int available_pct:pct
        required_writers:int alive_writers:int coverage_pct:pct""",
    "MeWriterStatus": """writer_id:int dc:int~ endpoint:str generation:int state:warm|active|draining draining:bool degraded:bool
        bound_clients:int idle_for_secs:int~ rtt_ema_ms:num~""",
    "MeWritersData": """middle_proxy_enabled:bool reason?:feature_disabled|source_unavailable generated_at_epoch_secs:int
        summary:MeWritersSummary writers:[MeWriterStatus]""",
    "DcStatus": """dc:int endpoints:[str] available_endpoints:int available_pct:pct required_writers:int alive_writers:int
        coverage_pct:pct rtt_ms:num~ load:int""",
    "DcStatusData": """middle_proxy_enabled:bool reason?:feature_disabled|source_unavailable generated_at_epoch_secs:int
        dcs:[DcStatus]""",
    "MinimalQuarantineData": "endpoint:str remaining_ms:int",
    "MinimalDcPathData": """dc:int ip_preference:unknown|prefer_v6|prefer_v4|both|unavailable~ selected_addr_v4:str~
        selected_addr_v6:str~""",
    "MinimalMeRuntimeData": """active_generation:int warm_generation:int pending_hardswap_generation:int
        pending_hardswap_age_secs:int~ hardswap_enabled:bool floor_mode:static|adaptive adaptive_floor_idle_secs:int
        adaptive_floor_min_writers_single_endpoint:int adaptive_floor_recover_grace_secs:int me_keepalive_enabled:bool
        me_keepalive_interval_secs:int me_keepalive_jitter_secs:int me_keepalive_payload_random:bool rpc_proxy_req_every_secs:int
        me_reconnect_max_concurrent_per_dc:int me_reconnect_backoff_base_ms:int me_reconnect_backoff_cap_ms:int
        me_reconnect_fast_retry_count:int me_pool_drain_ttl_secs:int me_pool_force_close_secs:int me_pool_min_fresh_ratio:num
        me_bind_stale_mode:never|ttl|always me_bind_stale_ttl_secs:int me_single_endpoint_shadow_writers:int
        me_single_endpoint_outage_mode_enabled:bool me_single_endpoint_outage_disable_quarantine:bool
        me_single_endpoint_outage_backoff_min_ms:int me_single_endpoint_outage_backoff_max_ms:int
        me_single_endpoint_shadow_rotate_every_secs:int me_deterministic_writer_sort:bool me_socks_kdf_policy:strict|compat
        quarantined_endpoints_total:int quarantined_endpoints:[MinimalQuarantineData]""",
    "MinimalAllPayload": "me_writers:MeWritersData dcs:DcStatusData me_runtime?:MinimalMeRuntimeData network_path:[MinimalDcPathData]",
    "MinimalAllData": _GATED + " data?:MinimalAllPayload",
    "TlsDomainLink": "domain:str link:link",
    "UserLinks": "classic:[link] secure:[link] tls:[link] tls_domains:[TlsDomainLink]",
    "UserInfo": """username:str user_ad_tag:str~ max_tcp_conns:int~ expiration_rfc3339:time~ data_quota_bytes:int~ max_unique_ips:int~
        current_connections:int active_unique_ips:int total_octets:int links:UserLinks enabled:bool in_runtime:true
        active_unique_ips_list:[str] recent_unique_ips:int recent_unique_ips_list:[str] octets_from_client:int octets_to_client:int
        quota_used_bytes:int""",
    "ActiveIps": "username:str active_ips:[str]",
    "CreateUserResponse": "user:UserInfo secret:Secret",
    "CreateUserRequest": "username:Username " + _CHANGES,
    "PatchUserRequest": _CHANGES,
    "RotateSecretRequest": "secret?:Secret~",
    "QrData": "kind:tls|tls_domains|secure|classic index:int link:str version:int rows:[bits]",
    "UserQuotaEntry": "username:str data_quota_bytes:int used_bytes:int last_reset_epoch_secs:int",
    "UserQuotaListData": "users:[UserQuotaEntry]",
    "ResetUserQuotaResponse": "username:str used_bytes:zero last_reset_epoch_secs:int",
    "LimitsTimeouts": """client_handshake_secs:int tg_connect_secs:int client_keepalive_secs:int client_ack_secs:int me_one_retry:int
        me_one_timeout_ms:int""",
    "ConnectPolicy": """connect_retry_attempts:int connect_retry_backoff_ms:int unhealthy_fail_threshold:int
        connect_failfast_hard_errors:bool""",
    "LimitsMiddleProxy": """floor_mode:static|adaptive adaptive_floor_idle_secs:int adaptive_floor_min_writers_single_endpoint:int
        adaptive_floor_recover_grace_secs:int reconnect_max_concurrent_per_dc:int reconnect_backoff_base_ms:int
        reconnect_backoff_cap_ms:int reconnect_fast_retry_count:int""",
    "UserIpPolicy": "global_each:int mode:=active_window window_secs:int",
    "UserTcpPolicy": "global_each:int",
    "LimitsData": """update_every_secs:int me_reinit_every_secs:int me_pool_force_close_secs:int timeouts:LimitsTimeouts
        upstream:ConnectPolicy middle_proxy:LimitsMiddleProxy user_ip_policy:UserIpPolicy user_tcp_policy:UserTcpPolicy""",
    "PostureData": """api_read_only:bool api_whitelist_enabled:bool api_whitelist_entries:int api_auth_header_enabled:bool
        proxy_protocol_enabled:bool log_level:debug|verbose|normal|silent telemetry_core_enabled:bool telemetry_user_enabled:bool
        telemetry_me_level:silent|normal|debug""",
    "WhitelistData": "generated_at_epoch_secs:int enabled:bool entries_total:int entries:[str]",
    "GatesData": """accepting_new_connections:bool conditional_cast_enabled:bool me_runtime_ready:bool me2dc_fallback_enabled:bool
        me2dc_fast_enabled:false use_middle_proxy:bool route_mode:direct|middle reroute_active:bool
        reroute_to_direct_at_epoch_secs?:int reroute_reason?:startup_direct_fallback|strict_grace_fallback
        startup_status:initializing|ready startup_stage:""" + "|".join(STAGES) + """ startup_progress_pct:pct me_down_dc_groups?:[int]
        fallback_sessions_current?:int fallback_sessions_total?:int""",
    "PoolGenerations": """active_generation:int warm_generation:int pending_hardswap_generation:int pending_hardswap_age_secs:int~
        draining_generations:[int]""",
    "PoolHardswap": "enabled:bool pending:bool",
    "PoolContour": "warm:int active:int draining:int",
    "PoolHealth": "healthy:int degraded:int draining:int",
    "PoolWriters": "total:int alive_non_draining:int draining:int degraded:int contour:PoolContour health:PoolHealth",
    "PoolRefillDc": "dc:int family:V4|V6 inflight:int",
    "PoolRefill": "inflight_endpoints_total:int inflight_dc_total:int by_dc:[PoolRefillDc]",
    "PoolStateData": "generations:PoolGenerations hardswap:PoolHardswap writers:PoolWriters refill:PoolRefill",
    "PoolStateBlock": _GATED + " data?:PoolStateData",
    "MeQualityCounters": """idle_close_by_peer_total:int reader_eof_total:int kdf_drift_total:int kdf_port_only_drift_total:int
        reconnect_attempt_total:int reconnect_success_total:int""",
    "MeRouteDrops": """no_conn_total:int channel_closed_total:int queue_full_total:int queue_full_base_total:int
        queue_full_high_total:int""",
    "MeDcRtt": "dc:int rtt_ema_ms:num~ alive_writers:int required_writers:int coverage_pct:pct",
    "MeQualityData": "counters:MeQualityCounters route_drops:MeRouteDrops dc_rtt:[MeDcRtt]",
    "MeQualityBlock": _GATED + " data?:MeQualityData",
    "ConnectCounters": """connect_attempt_total:int connect_success_total:int connect_fail_total:int
        connect_failfast_hard_error_total:int""",
    "UpstreamQualityData": _GATED + """ policy:ConnectPolicy counters:ConnectCounters summary?:UpstreamSummaryData
        upstreams?:[UpstreamStatus]""",
    "NatFlags": "nat_probe_enabled:bool nat_probe_disabled_runtime:bool nat_probe_attempts:int",
    "NatServers": "configured:[str] live:[str] live_total:int",
    "NatAddress": "addr:str age_secs:int",
    "NatReflection": "v4?:NatAddress v6?:NatAddress",
    "NatStunData": "flags:NatFlags servers:NatServers reflection:NatReflection stun_backoff_remaining_ms?:int",
    "NatStunBlock": _GATED + " data?:NatStunData",
    "UnavailableBlock": "enabled:false reason:=source_unavailable generated_at_epoch_secs:int",
    "CacheInfo": "ttl_ms:int served_from_cache:bool stale_cache_used:bool",
    "ConnectionTotals": "current_connections:int current_connections_me:int current_connections_direct:int active_users:int",
    "TopUser": "username:str current_connections:int total_octets:int",
    "TopUsers": "limit:int by_connections:[TopUser] by_throughput:[TopUser]",
    "TopTelemetry": "user_enabled:bool throughput_is_cumulative:true",
    "ConnectionsData": "cache:CacheInfo totals:ConnectionTotals top:TopUsers telemetry:TopTelemetry",
    "ConnectionsBlock": _GATED + " data?:ConnectionsData",
    "EventRow": "seq:int ts_epoch_secs:int event_type:str context:str",
    "EventsData": "capacity:int dropped_total:int events:[EventRow]",
    "EventsBlock": _GATED + " data?:EventsData",
    "ErrorBody": "code:" + "|".join("""bad_request unauthorized forbidden read_only not_found method_not_allowed request_timeout
        revision_conflict user_exists last_user_forbidden payload_too_large uri_too_long headers_too_large internal_error not_implemented
        api_disabled http_version_not_supported""".split()) + " message:str",
    "ErrorEnvelope": "ok:false error:ErrorBody request_id:int",
}
_MOMENT: Final = (r"^[12]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
                  r"[Tt ]([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d+)?([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)$")      # and 29 February
_KINDS: Final[dict[str, JsonObject]] = {
    "int": {"type": "integer", "minimum": 0}, "signed": {"type": "integer", "format": "int32"},
    "limit": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1}, "num": {"type": "number", "format": "double", "minimum": 0},
    "pct": {"type": "number", "format": "double", "minimum": 0, "maximum": 100}, "bool": {"type": "boolean"}, "str": {"type": "string"},
    "time": {"type": "string", "format": "date-time"}, "moment": {"type": "string", "pattern": _MOMENT},
    "true": {"type": "boolean", "const": True},
    "false": {"type": "boolean", "const": False}, "zero": {"type": "integer", "const": 0},
    "link": {"type": "string", "pattern": r"^tg://proxy\?server=[^&]+&port=[0-9]+&secret="},
    "bits": {"type": "string", "pattern": "^[01]+$"},
    "Revision": {"type": "string", "pattern": "^[0-9a-f]{64}$"}, "Secret": {"type": "string", "pattern": "^[0-9A-Fa-f]{32}$"},
    "AdTag": {"type": "string", "pattern": "^[0-9A-Fa-f]{32}$"},
    "Username": {"type": "string", "pattern": r"^(?!\.{1,2}$)[A-Za-z0-9_.-]{1,64}$", "minLength": 1, "maxLength": 64},
}


def schema_of(text: str) -> JsonObject:
    """JSON Schema of one type of the short notation."""
    if text.endswith("~"):
        found = dict(schema_of(text[:-1]))
        if "enum" in found:
            return {"type": ["string", "null"], "enum": [*found["enum"], None]}
        return found | {"type": [found["type"], "null"]}
    if text.startswith("["):
        return {"type": "array", "items": schema_of(text[1:-1])}
    if text.startswith("="):
        return {"type": "string", "const": text[1:]}
    if text in _KINDS:
        return _KINDS[text]
    if text in SHAPES:
        return {"$ref": f"#/components/schemas/{text}"}
    return {"type": "string", "enum": text.split("|")}


def shape_schema(text: str) -> JsonObject:
    """JSON Schema of an object in the short notation."""
    members = [member.partition(":") for member in text.split()]
    required = [name for name, _, _ in members if not name.endswith("?")]
    properties = {name.rstrip("?"): schema_of(kind) for name, _, kind in members}
    return {"type": "object", **({"required": required} if required else {}), "properties": properties}


_ANSWERS: Final = {
    "400": "Malformed request or body, or the resulting configuration is invalid.", "401": "Authorization does not match.",
    "403": "Not from here: whitelist, host or browser guard, read-only mode.", "404": "No such user.",
    "405": "Unsupported method.", "409": "If-Match does not hold, the user exists, or it is the last one.",
    "413": "The body is larger than request_body_limit_bytes.", "500": "The configuration cannot be read or written.",
    "503": "The API is switched off.", "default": "Refused before routing (408, 414, 431, 501, 505); the connection is closed."}


def describe(route: Route) -> JsonObject:
    """The OpenAPI operation of a route."""
    envelope = {"type": "object", "required": ["ok", "data", "revision"],
                "properties": {"ok": {"const": True}, "data": schema_of(route.data), "revision": _KINDS["Revision"]}} if route.data else {
                    "type": "object", "required": ["openapi", "info", "paths"]}
    answer = {"description": "Success.", "content": {JSON_TYPE: {"schema": envelope}}}
    refusal = {"content": {JSON_TYPE: {"schema": schema_of("ErrorEnvelope")}}}
    user = "{username}" in route.path
    codes = ["400", "401", "403"] + ["404"] * user + ["405"] * (route.name == "get_user") + ["409"] * bool(route.action)
    codes += ["413"] * bool(route.body) + ["500", "503"]
    answers = {str(route.status): answer} | {code: {"description": _ANSWERS[code], **refusal} for code in [*codes, "default"]}
    if route.name == "get_ready":
        answers["503"] = answer | {"description": "Not ready."}
    found: JsonObject = {"operationId": operation_id(route), "summary": route.summary}
    parameters: list[JsonObject] = []
    if user:
        parameters.append({"name": "username", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}})
    if route.action:
        parameters.append({"name": "If-Match", "in": "header", "required": False, "schema": {"type": "string"}})
    if route.name == "get_qr":
        parameters += [{"name": "kind", "in": "query", "required": False, "schema": {"type": "string", "enum": list(LINK_KINDS)}},
                       {"name": "index", "in": "query", "required": False, "schema": {"type": "string", "pattern": "^[0-9]{1,4}$"}}]
    if route.name == "get_events":
        parameters.append({"name": "limit", "in": "query", "required": False, "schema": {"type": "string"},
                           "description": "How many events: 1 to 1000, what is beyond is moved there; 50 where it is no number."})
    if parameters:
        found["parameters"] = parameters
    if route.body and route.body != "ignored":
        found["requestBody"] = {"required": route.action != "rotate_secret",
                                "content": {"application/json": {"schema": schema_of(route.body)}}}
    return found | {"responses": answers}


def describe_page(method: str, path: str) -> JsonObject:
    """The OpenAPI operation of the status page: no envelope, and no key is asked for."""
    answer: JsonObject = {"description": "The page."}
    if method == "get":
        answer["content"] = {_PAGE_TYPE: {"schema": {"type": "string"}}}
    refusal = {"content": {JSON_TYPE: {"schema": schema_of("ErrorEnvelope")}}} if method == "get" else {}
    return {"operationId": method + ("Ui" if path == "/ui" else "Root"), "summary": "Status page", "security": [], "responses": {
        "200": answer, **{code: {"description": _ANSWERS[code], **refusal} for code in ("401", "403", "default")},
        "404": {"description": "server.api.ui is off.", **refusal}}}


_PAGE_TYPE: Final = "text/html; charset=utf-8"
_OPERATIONS: Final = {"/v1/openapi.json": "getOpenApi", "/v1/users": "listUsers", "/v1/stats/users": "getStatsUsers",
                      "/v1/stats/users/quota": "getUserQuotas", "/v1/users/{username}/qr": "getUserQr",
                      "/v1/users/{username}/reset-quota": "resetUserQuota"}


def operation_id(route: Route) -> str:
    """Unique name of a route, that of the contract where it has one: generated clients call their methods so."""
    if route.path in _OPERATIONS and route.name != "create_user":
        return _OPERATIONS[route.path]
    first, *words = route.name.split("_")
    same = [other.path for other in ROUTES if other.name == route.name]
    return first + "".join(map(str.capitalize, words)) + ("" if same[0] == route.path else "Alias")


def make_openapi(version: str) -> JsonObject:
    """The OpenAPI document of this program."""
    paths: dict[str, JsonObject] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = describe(route)
    paths |= {path: {method: describe_page(method, path) for method in ("get", "head")} for path in ("/", "/ui")}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Telemt Control API", "version": version,
                 "summary": "Control API v1 of telemt 3.2.1 as telemt.py serves it.",
                 "description": "Answers may get more members in later versions; clients ignore what they do not know.  Trailing slashes "
                                "are ignored.  Methods that are not listed answer 404, on /v1/users/{username} 405 (POST: 404)."},
        "security": [{}, {"AuthorizationValue": []}], "paths": paths,
        "components": {
            "securitySchemes": {"AuthorizationValue": {"type": "apiKey", "in": "header", "name": "Authorization",
                                                       "description": "The exact value of server.api.auth_header."}},
            "schemas": {name: shape_schema(text) for name, text in SHAPES.items()}}}


# == 7. store ================================================================
# The configuration on disk.  A change reads main file and includes once, edits
# their text, validates the result as a start would, writes it whole and makes
# it live; nobody ever sees half of it.  One change at a time; writers outside
# (editors, other tools) are noticed just before the rename.
# Trap: a bind-mounted single file cannot be replaced, only overwritten.
# Source: api.md 7, 11, 12.

_LOCK_WAIT_S: Final = 10.0
_SETTLE_S: Final = 0.05                  # as for a reload (config.md 8 item 3)
_SETTLE_READS: Final = 40
_IMPLICIT: Final = {"default": "0" * 32}    # the users of a configuration that names none
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
        self._settled = b""                    # SHA-256 of a main file that nobody was writing
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
        self._wait_for_writers()
        draft = self._read_draft()
        revision = self._revision_of(draft.files[self._path])
        check_revision(wanted, revision)
        users = draft.document.get("access", {}).get("users")
        present = _IMPLICIT if users is None else users
        if users is None and self._port.settings.access.users != _IMPLICIT:      # cut off: it must not swap all users for `default`
            raise internal_error("failed to load config: Config error: [access.users] is missing")
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
        self._settled = hashlib.sha256(files[self._path]).digest()
        self._publish(loaded, files)
        if command.action == "delete":
            secret = ""
        else:
            secret = secret or present[command.username]
        return Outcome(self._revision_of(files[self._path]), self._port.settings, command.username, secret, files is not draft.files, 0)

    def _wait_for_writers(self) -> None:
        """A file that somebody else changed may still be half written: read until two readings are alike, at most 2 s."""
        with contextlib.suppress(OSError):     # what cannot be read is reported by who needs it
            before = self._read(self._path)
            for _ in range(_SETTLE_READS if hashlib.sha256(before).digest() != self._settled else 0):
                time.sleep(_SETTLE_S)
                now = self._read(self._path)
                if now == before:
                    return
                before = now

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
        except OSError as error:               # a TimeoutError too, which has no number
            path = self._port.settings.general.quota_state_path or ""
            raise internal_error(f"failed to write quota state: {describe_error(error, path) if error.errno else error}") from None
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
            main = self._read(self._path)
            self._settled = hashlib.sha256(main).digest()
            paths += self._port.expand(self._decode(self._path, main))[1]
        for path in paths:
            remove_leftovers(os.path.realpath(path), time.time())

    def _read(self, path: str) -> bytes:
        # Somebody may put a pipe there: whoever waited for its other end would hold the lock for ever.  And open(fd) would
        # leave a descriptor behind for every request while a directory stands there.
        with open(path, "rb", opener=lambda name, mode: os.open(name, mode | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            return file.read()

    def _decode(self, path: str, data: bytes, failed: str = "failed to load config: Config error") -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise internal_error(f"{failed}: {path}: not valid UTF-8 at byte {error.start}") from None

    def _revision_of(self, data: bytes) -> str:
        self._decode(self._path, data, "failed to read config")
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
            if len(data) > len(old) and hasattr(os, "posix_fallocate"):
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


# == 8. http =================================================================
# HTTP/1.1 for few clients, none of whom is trusted.  It stands on http.server, and
# replaces what that does too leniently: header syntax, 64 KiB lines, no chunks, no
# deadlines, a name look-up at bind, a `Server` field, tracebacks on stderr.
# A thread per connection, few connections, and a deadline on everything that waits
# for the peer: who is slow or stuck costs one thread and nobody's time.
# Traps: `100 Continue` only when the body is about to be read; an answer while body
# bytes are unread closes the connection, after a short drain, or the client would
# see a reset instead of the answer.
# Source: api.md 14.1, 14.2; RFC 9112.

LINE_MAX: Final = 8192                   # bytes of a request line
HEAD_MAX: Final = 32_768                 # bytes of the header section
FIELDS_MAX: Final = 100
REQUESTS_MAX: Final = 1000               # per connection
HEAD_S: Final = 10.0                     # from the first byte of a head to its last
BODY_S: Final = 10.0
IDLE_S: Final = 30.0                     # keep-alive, and before the first byte
WRITE_S: Final = 10.0
_CROWDED_IDLE_S: Final = 5.0             # where all places are taken, who was idle for so long makes room
_DRAIN_MAX, _DRAIN_S = 65_536, 1.0
_RETRY_S: Final = 10.0                   # after a bind that failed
_ACCEPT_PAUSE_S: Final = 0.1             # after an accept that failed
_SAID_AGAIN_S: Final = 10.0              # a repeated line of the log
_BACKLOG: Final = 128
_CHUNK_LINE_MAX: Final = 8 + 256 + 2     # size, extension, line end
_TRAILERS_MAX: Final = 8
_READ: Final = 65_536
_SAME_MAX: Final = 2048                  # bytes of a request that is known again on its connection
_TOKEN: Final = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE: Final = re.compile(rf"({_TOKEN}) ([\x21-\x7e]+) HTTP/(\d)\.(\d)")
_FIELD: Final = re.compile(rf"({_TOKEN}):([^\x00-\x08\x0a-\x1f\x7f]*)")
_CHUNK_SIZE: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;.{0,256})?", re.DOTALL)
_WORDS: Final = {
    200: "OK", 201: "Created", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 409: "Conflict", 413: "Content Too Large", 414: "URI Too Long", 431: "Request Header Fields Too Large",
    500: "Internal Server Error", 501: "Not Implemented", 503: "Service Unavailable", 505: "HTTP Version Not Supported"}


class Head(NamedTuple):
    """A request without its body, parsed; names of fields in lower case."""

    method: str
    target: str
    old: bool                            # HTTP/1.0
    fields: Sequence[tuple[str, str]]
    length: int                          # of the body, -1 = chunked

    def values(self, name: str) -> list[str]:
        """Values of a field in order; `name` in lower case."""
        return [value for field, value in self.fields if field == name]

    @property
    def keep(self) -> bool:
        """True if the connection goes on after the answer."""
        return not self.old and not any("close" in value.lower().replace(" ", "").split(",") for value in self.values("connection"))


NO_HEAD: Final = Head("", "", False, (), 0)


def malformed() -> ApiError:
    """400: not HTTP."""
    return bad_request("Malformed HTTP request")


def parse_line(line: bytes) -> Head:
    """Return what a request line says, without fields yet.  Raises ApiError of gate 0."""
    match = _REQUEST_LINE.fullmatch(line.decode("latin-1"))
    if match is None:
        raise malformed()
    if match[3] != "1" or match[4] not in "01":
        raise ApiError(505, "http_version_not_supported", "HTTP version not supported")
    return Head(match[1], match[2], match[4] == "0", (), 0)


def parse_head(start: Head, section: bytes) -> Head:
    """Return a request line with the fields of a header section (lines with their ends).  Raises ApiError of gate 0."""
    lines = section.decode("latin-1").split("\n")[:-1]
    if len(lines) > FIELDS_MAX:
        raise ApiError(431, "headers_too_large", "Request header fields too large")
    fields = []
    for text in lines:
        field = _FIELD.fullmatch(text.removesuffix("\r"))
        if field is None:
            raise malformed()
        fields.append((field[1].lower(), field[2].strip(" \t")))
    head = start._replace(fields=fields)
    if len(head.values("host")) > 1:
        raise malformed()
    return head._replace(length=_body_length(head))


def _body_length(head: Head) -> int:
    codings, lengths = head.values("transfer-encoding"), head.values("content-length")
    if codings:
        if lengths:
            raise malformed()
        if head.old or len(codings) > 1 or codings[0].lower() != "chunked":
            raise ApiError(501, "not_implemented", "Unsupported transfer encoding")
        return -1
    if not lengths:
        return 0
    if len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdigit()):
        raise malformed()
    digits = lengths[0].lstrip("0")
    return int(digits or "0") if len(digits) < 16 else 10**15     # more than any limit


class Answer(NamedTuple):
    """What goes back; body in pieces, so that a long one is never copied."""

    status: int
    kind: str                            # Content-Type
    pieces: Sequence[bytes]
    fields: Sequence[tuple[str, str]] = ()
    close: bool = False


class Request:
    """A head, who sent it, and its body for whoever wants it."""

    def __init__(self, head: Head, peer: str, wire: Wire) -> None:
        self.head, self.peer = head, peer
        self._wire = wire
        self._read = head.length == 0

    @property
    def body_unread(self) -> bool:
        """True while the client may still be sending the body."""
        return not self._read

    def body(self, limit: int) -> bytes:
        """Read the body.  Raises ApiError: 413 beyond `limit` bytes, 400 for a transfer error, 408 when it takes too long."""
        if self._read:
            return b""
        too_large = ApiError(413, "payload_too_large", f"Body exceeds {limit} bytes")
        if self.head.length > limit:
            raise too_large
        if not self.head.old and any(value.lower() == "100-continue" for value in self.head.values("expect")):
            self._wire.write([b"HTTP/1.1 100 Continue\r\n\r\n"])
        deadline = time.monotonic() + BODY_S
        try:
            found = self._wire.take(self.head.length, deadline) if self.head.length > 0 else self._chunks(limit, too_large, deadline)
        except TimeoutError:
            raise timed_out() from None
        except (EOFError, OSError, ValueError):
            raise bad_request("Invalid request body") from None
        self._read = True
        return found

    def _chunks(self, limit: int, too_large: ApiError, deadline: float) -> bytes:
        found = bytearray()
        while True:
            match = _CHUNK_SIZE.fullmatch(self._wire.line(_CHUNK_LINE_MAX, deadline))
            if match is None:
                raise ValueError("chunk size")
            size = int(match[1], 16)
            if size == 0:
                break
            if len(found) + size > limit:
                raise too_large
            found += self._wire.take(size, deadline)
            if self._wire.line(2, deadline):
                raise ValueError("chunk end")
        for _ in range(_TRAILERS_MAX + 1):
            if not self._wire.line(LINE_MAX, deadline):
                return bytes(found)
        raise ValueError("trailers")


def timed_out() -> ApiError:
    """408."""
    return ApiError(408, "request_timeout", "Request timed out")


class Wire:
    """A socket of one client, read through a buffer; every wait has a deadline (monotonic seconds).

    The kernel keeps the time: a socket with a timeout of Python's costs three system calls where one will do, and around each of
    them the interpreter changes hands between this thread and the loop.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()
        self._waits: dict[int, int] = {}       # SO_RCVTIMEO, SO_SNDTIMEO -> what is set, tenths of a second
        self._last: tuple[bytes, Head] = (b"", NO_HEAD)      # a request without a body that came in one piece, and what it says
        self.idle_since: float | None = time.monotonic()     # None while a request is under way
        self.served = False                    # it has had an answer

    def _more(self, deadline: float) -> None:
        """Read once.  Raises TimeoutError, EOFError, OSError."""
        self._wait(socket.SO_RCVTIMEO, deadline)
        try:
            data = self._sock.recv(_READ)
        except BlockingIOError:
            raise TimeoutError from None
        if not data:
            raise EOFError
        self._buffer += data

    def _wait(self, option: int, deadline: float) -> None:
        """Set how long a call may wait, in tenths of a second: so it stays the same from request to request.  Raises TimeoutError."""
        tenths = math.ceil((deadline - time.monotonic()) * 10)
        if tenths <= 0:
            raise TimeoutError
        if self._waits.get(option) != tenths:
            size = len(self._sock.getsockopt(socket.SOL_SOCKET, option, 16))      # of a timeval here: 8 where a long has 4 bytes
            form = "@qq" if size == 16 else "@ii"
            self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack(form, tenths // 10, tenths % 10 * 100_000))
            self._waits[option] = tenths

    def take(self, size: int, deadline: float) -> bytes:
        """The next `size` bytes."""
        while len(self._buffer) < size:
            self._more(deadline)
        found = bytes(self._buffer[:size])
        del self._buffer[:size]
        return found

    def line(self, most: int, deadline: float) -> bytes:
        """The next line without its end.  Raises ValueError if it is longer than `most` bytes."""
        seen = 0
        while (end := self._buffer.find(b"\n", seen)) < 0:
            seen = len(self._buffer)
            if seen > most:
                raise ValueError("line too long")
            self._more(deadline)
        if end > most:
            raise ValueError("line too long")
        found = bytes(self._buffer[:end]).removesuffix(b"\r")
        del self._buffer[:end + 1]
        return found

    def head(self) -> Head | None:
        """The next request head; None when the client is silent, or gone before a byte.  Raises ApiError of gate 0, OSError."""
        self.idle_since = time.monotonic()
        try:
            while not self._buffer.lstrip(b"\r\n"):
                del self._buffer[:]
                self._more(self.idle_since + IDLE_S)
        except (TimeoutError, EOFError):
            return None
        finally:
            self.idle_since = None
        known, head = self._last
        if self._buffer == known:              # a panel asks the same again and again
            del self._buffer[:]
            return head
        del self._buffer[:len(self._buffer) - len(self._buffer.lstrip(b"\r\n"))]
        came, deadline = bytes(self._buffer), time.monotonic() + HEAD_S
        try:
            start = parse_line(self._request_line(deadline))       # judged before the rest is waited for
            head = parse_head(start, self._section(deadline))
        except TimeoutError:
            raise timed_out() from None
        except EOFError:
            return None
        if not self._buffer and came.endswith(b"\r\n\r\n") and head.length == 0 and len(came) <= _SAME_MAX:
            self._last = came, head
        return head

    def _request_line(self, deadline: float) -> bytes:
        try:
            return self.line(LINE_MAX + 1, deadline)         # + 1: the CR
        except ValueError:
            raise ApiError(414, "uri_too_long", "Request line too long") from None

    def _section(self, deadline: float) -> bytes:
        """Header lines with their ends, the empty one removed."""
        seen = 0
        while True:
            found = _HEAD_END.search(self._buffer, seen)
            if (found.start() if found else len(self._buffer)) > HEAD_MAX:
                raise ApiError(431, "headers_too_large", "Request header fields too large")
            if found:
                section = bytes(self._buffer[:found.start()])
                del self._buffer[:found.end()]
                return section
            seen = max(0, len(self._buffer) - 2)
            self._more(deadline)

    def write(self, pieces: Iterable[bytes]) -> None:
        """Send everything.  Raises TimeoutError, OSError."""
        deadline = time.monotonic() + WRITE_S
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                self._wait(socket.SO_SNDTIMEO, deadline)
                try:
                    rest = rest[self._sock.send(rest):]      # less than all of it: the time is over
                except BlockingIOError:
                    raise TimeoutError from None

    def drain(self) -> None:
        """Let the client see our last answer: no more from us, and what it still sends is thrown away for a moment."""
        with contextlib.suppress(OSError, EOFError):
            self._sock.shutdown(socket.SHUT_WR)
            deadline, dropped = time.monotonic() + _DRAIN_S, 0
            while dropped < _DRAIN_MAX:
                del self._buffer[:]
                self._more(deadline)
                dropped += len(self._buffer)

    def shutdown(self, how: int) -> None:
        """Wake whoever waits here; for another thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(how)

    def close(self) -> None:
        """Give up the socket."""
        self._sock.close()


_HEAD_END: Final = re.compile(rb"^\r?\n", re.MULTILINE)


class Site(Protocol):
    """What answers the requests of a server."""

    def answer(self, request: Request) -> Answer:
        """Answer one request; never raises."""

    def refuse(self, error: ApiError, peer: str) -> Answer:
        """Answer bytes that are no request."""

    def admits(self, peer: str) -> bool:
        """False: the connection is closed without a byte."""


class Handler(BaseHTTPRequestHandler):
    """One connection.  From the library come the loop over requests and the date; reading and writing is Wire's."""

    server: HttpServer
    dated: ClassVar[tuple[int, str]] = (0, "")               # the second of the last answer, as a header has it

    def setup(self) -> None:
        """Nothing is wrapped: rfile would read ahead without a deadline."""
        self.wire: Wire = self.request
        self.peer = peer_ip(self.client_address[0])
        self._asked = 0

    def finish(self) -> None:
        """The server closes."""

    def handle_one_request(self) -> None:
        """Read, answer, decide whether the connection goes on.  Raises OSError."""
        site = self.server.site
        self.close_connection = True
        self._asked += 1
        try:
            head = self.wire.head()
        except ApiError as error:
            self._send(site.refuse(error, self.peer))
            return
        if head is None:
            return
        request = Request(head, self.peer, self.wire)
        answer = site.answer(request)
        self.close_connection = (answer.close or request.body_unread or not head.keep or self._asked == REQUESTS_MAX
                                 or self.server.stopped)
        self._send(answer, body=head.method != "HEAD")
        self.wire.served = True

    def _send(self, answer: Answer, *, body: bool = True) -> None:
        size = sum(map(len, answer.pieces))
        more = "".join([f"{name}: {value}\r\n" for name, value in answer.fields])
        head = (f"HTTP/1.1 {answer.status} {_WORDS[answer.status]}\r\nDate: {self._date()}\r\nContent-Type: {answer.kind}\r\n"
                f"Content-Length: {size}\r\n{more}{_CLOSE if self.close_connection else ''}\r\n").encode("latin-1")
        pieces = [head, *(answer.pieces if body else ())]
        self.wire.write([b"".join(pieces)] if size <= _READ else pieces)         # a short answer is one segment
        if self.close_connection:
            self.wire.drain()

    def _date(self) -> str:
        now = int(time.time())
        known, text = Handler.dated
        if known != now:
            text = self.date_time_string(now)
            Handler.dated = now, text          # one assignment: other threads read it
        return text


_CLOSE: Final = "Connection: close\r\n"
_LAST_ANSWERS_S: Final = 1.0             # what they get when another program goes on


class HttpServer(ThreadingHTTPServer):
    """One listening address: a thread that accepts, and one for each of at most `places` connections."""

    request_queue_size = _BACKLOG

    def __init__(self, address: tuple[str, int], places: int, site: Site, log: Log, inherited: int = -1) -> None:
        """inherited: descriptor that listens there already.  Raises OSError."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.site, self._places, self._log = site, places, log
        self._wires: set[Wire] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._crowd_at = self._failed_at = -math.inf             # last log line about too many connections, about an accept
        super().__init__(address, Handler, bind_and_activate=False)
        if inherited >= 0:
            self.socket.close()
            self.socket = socket.socket(fileno=inherited)
            self.server_address = self.socket.getsockname()
        else:
            try:
                self.server_bind()
                self.server_activate()
            except OSError:
                self.server_close()
                raise
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def stopped(self) -> bool:
        """No request is taken any more."""
        return self._stopped.is_set()

    def server_bind(self) -> None:
        """Without the library's getfqdn, which asks the DNS."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(self.server_address[0] != "::"))
        socketserver.TCPServer.server_bind(self)

    def serve(self) -> None:
        """Accept until stop().  Not serve_forever, which wakes twice a second, and not handle_request, which sets up a poll each time."""
        visitors = select.poll()
        visitors.register(self.socket, select.POLLIN)
        while not self._stopped.is_set():
            visitors.poll()
            with contextlib.suppress(OSError):               # get_request() has said so
                self._serve_one(*self.get_request())

    def _serve_one(self, wire: Wire, address: Any) -> None:
        try:
            if self.verify_request(wire, address):
                self.process_request(wire, address)
                return
        except Exception:                      # no more threads, or a fault of ours
            self.handle_error(wire, address)
        self.shutdown_request(wire)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for a connection.  A bare one: the library's waits here until the other one runs."""
        _thread.start_new_thread(self.process_request_thread, (request, client_address))

    def get_request(self) -> tuple[Any, Any]:
        """Accept one connection; a failure is logged and not tried again at once."""
        try:
            if self.stopped:                   # another program accepts here now
                raise OSError
            sock, address = self.socket.accept()
        except OSError as error:
            if not self._stopped.is_set():
                if time.monotonic() > self._failed_at + _SAID_AGAIN_S:
                    self._failed_at = time.monotonic()
                    self._log.warn("API accept failed", error=error.strerror)
                self._stopped.wait(_ACCEPT_PAUSE_S)
            raise
        return Wire(sock), address

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """False closes the connection at once: not admitted, or no place."""
        peer = peer_ip(client_address[0])
        if not self.site.admits(peer):
            self._log.debug("Connection refused by whitelist", peer=peer)
            return False
        if self._find_place(request):
            return True
        if time.monotonic() > self._crowd_at + _SAID_AGAIN_S:
            self._crowd_at = time.monotonic()
            self._log.debug("Too many API connections", limit=self._places)
        return False

    def _find_place(self, wire: Wire) -> bool:
        with self._lock:
            if len(self._wires) >= self._places:
                resting = [(since, id(other), other) for other in self._wires if (since := other.idle_since) is not None]
                since, _, oldest = min(resting, default=(math.inf, 0, None))
                if oldest is None or since > time.monotonic() - _CROWDED_IDLE_S:
                    return False
                self._wires.discard(oldest)
                oldest.shutdown(socket.SHUT_RDWR)
            self._wires.add(wire)
            return True

    def shutdown_request(self, request: Any) -> None:
        """The end of a connection, whatever ended it."""
        with self._lock:
            self._wires.discard(request)
        request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log instead of the library's traceback on stderr; a client that left or does not read is no error."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._log.debug("API connection ended", peer=client_address[0], error=error)
        else:
            self._log.error("internal error in an API connection\n%s", traceback.format_exc())

    def stop(self, handed_on: bool = False) -> None:
        """Close everything; the threads end by themselves.

        handed_on: another program listens at this very socket, so it is not shut down, and the thread that waits for it leaves
        with the next visitor, whom it does not touch.  Connections at rest are closed, the others after their answer, and so are
        those whose first request is still on its way.
        """
        self._stopped.set()
        if not handed_on:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)       # wakes the thread that accepts
        self.server_close()
        with self._lock:
            for wire in self._wires:
                if not handed_on:
                    wire.shutdown(socket.SHUT_RDWR)
                elif wire.idle_since is not None and wire.served:
                    wire.shutdown(socket.SHUT_RD)            # a request that has arrived is still read
        until = time.monotonic() + _LAST_ANSWERS_S
        while handed_on and self._wires and time.monotonic() < until:        # our process may end with the last session
            time.sleep(0.01)


class Listener:
    """An address that is served as soon as it can be bound."""

    def __init__(self, address: tuple[str, int], places: int, site: Site, log: Log, failed: str,
                 port: ControlPort | None = None) -> None:
        """port: knows sockets that are handed from program to program."""
        self.address, self._places, self._site, self._log, self._port = address, places, site, log, port
        self._failed = failed                  # log text when the address cannot be bound; empty: then it is done without
        self._stopped = threading.Event()
        self._server: HttpServer | None = None

    def start(self, opened: Callable[[tuple[str, int]], None]) -> None:
        """Bind and serve; opened(address) tells when it works.  A bind that fails is tried again every 10 s."""
        bound = self._bind(opened, self._log.warn if self._failed else self._log.debug)
        if not (bound or self._failed):
            return
        try:
            threading.Thread(target=self._run, args=(bound, opened), name=f"telemt-{self.address[1]}", daemon=True).start()
        except RuntimeError as error:          # no more threads: that costs the control plane, not the proxy
            self._log.warn("control plane not started: %s", error, addr=_at(*self.address))
            self.stop()

    def _bind(self, opened: Callable[[tuple[str, int]], None], report: Callable[..., None]) -> bool:
        try:
            self._server = HttpServer(self.address, self._places, self._site, self._log,
                                      self._port.inherited(*self.address) if self._port is not None else -1)
        except OSError as error:
            report("%s", self._failed, addr=_at(*self.address), error=error.strerror)
            return False
        self.address = (self.address[0], self._server.server_port)
        if self._port is not None:
            self._port.listens(self._server.fileno())
        opened(self.address)
        return True

    def _run(self, bound: bool, opened: Callable[[tuple[str, int]], None]) -> None:
        while not bound:
            if self._stopped.wait(_RETRY_S):
                return
            bound = self._bind(opened, self._log.debug)
        if self._server is not None and not self._stopped.is_set():
            self._server.serve()

    def stop(self, handed_on: bool = False) -> None:
        """Close everything; the threads end by themselves.  handed_on: another program goes on at this socket."""
        self._stopped.set()
        if self._server is not None:
            self._server.stop(handed_on)


def _at(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def peer_ip(host: str) -> str:
    """Address of a peer without zone; an IPv4 one behind ::ffff: as IPv4."""
    host = host.partition("%")[0]
    return host[7:] if host.startswith("::ffff:") and "." in host else host


# == 9. qr ===================================================================
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


# == 10. page ================================================================
# The status page: one document that asks /v1 from the browser and knows nothing
# that curl cannot get.  What stands here is what is served; limit: 30,000 bytes.
# Text from outside becomes text nodes and nothing else; the policy names the hashes
# of style and script, so that nothing else runs even if something slipped in.
# Source: design/page.md 1-8.

PAGE_CSS: Final = """\
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#57606a;--link:#0b5cad;--good:#1a6b35;--warn:#8a5300;--bad:#b3261e;--page:#fff;--card:#f6f8fa;--line:#d0d7de}
@media (prefers-color-scheme:dark){:root{--ink:#e6edf3;--dim:#9aa7b4;--link:#6cb6ff;--good:#57c97a;--warn:#e3b341;--bad:#ff8a80;--page:#0f1419;--card:#1a2129;--line:#38424d}}
*{box-sizing:border-box}
body{margin:0;font:16px/1.45 system-ui, sans-serif;font-variant-numeric:tabular-nums;color:var(--ink);background:var(--page)}
header{position:sticky;top:0;z-index:1;padding:10px 16px;background:var(--card);border-bottom:1px solid var(--line)}
header, .row, .link, .tools{display:flex;flex-wrap:wrap;gap:6px 12px;align-items:center;margin:4px 0}
#verdict{font-weight:600;flex:1 1 16em}
main{max-width:1200px;margin:auto;padding:0 16px 40px}
h1, h2, summary{font-size:1.1rem;margin:24px 0 8px}
button, input, select{font:inherit;color:inherit;background:var(--page);border:1px solid var(--line);padding:4px 10px}
button, summary, a{cursor:pointer;color:var(--link)}
:disabled{color:var(--dim);cursor:default}
:focus-visible{outline:3px solid}
.good{color:var(--good)} .warn{color:var(--warn)} .bad, .error{color:var(--bad)} .dim, small, dt{color:var(--dim)}
.grid{display:grid;grid-template-columns:repeat(auto-fit, minmax(150px, 1fr));gap:8px;margin:0}
.grid > div{background:var(--card);border:1px solid var(--line);padding:8px 12px;min-height:100px}
dd, h1, header p{margin:0}
.grid dd{font-size:1.4rem}
.grid dd + dd{font-size:.8rem;color:var(--dim)}
#charts{grid-template-columns:repeat(auto-fit, minmax(280px, 1fr))}
.grid svg{width:100%;height:90px;display:block}
.grid path{fill:none;stroke:var(--link);stroke-width:2;vector-effect:non-scaling-stroke}
path.mark{stroke:var(--warn);stroke-dasharray:3}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}
th, td{text-align:left;padding:4px 8px;border-bottom:1px solid var(--line);vertical-align:top;overflow-wrap:break-word}
th button, td > button{border:0;padding:0;background:none;font-weight:600;text-align:left}
.num{text-align:right}
.more dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 12px;margin:0}
.link input, .row input:not([type=checkbox]){flex:1 1 8em;min-width:0}
dialog{color:inherit;background:var(--page);border:1px solid var(--line);width:min(560px, 94vw)}
.qr{background:#fff;display:block;width:min(320px, 80vw);margin:8px auto;forced-color-adjust:none}
.stale{opacity:.6}
.error:empty, .note:empty{display:none}
@media (max-width:700px){.wide{display:none} main{padding:0 10px}}
@media (pointer:coarse){button, input, select, summary{min-height:44px;min-width:44px}}
"""  # noqa: E501 - served as it stands
PAGE_JS: Final = r"""
const $ = id=>document.getElementById(id), base = location.pathname.replace(/\/+$/,"").replace(/\/ui$/,"")
const KINDS = {tls:"FakeTLS", tls_domains:"FakeTLS", secure:"dd", classic:"Classic"}, OFF = "not counted"
const route = (path,every,gate = "minimal_runtime")=>({path, every, gate, at:0, gone:"", data:null})
const R = {zero:route("/stats/zero/all",5), users:route("/users",5), gates:route("/runtime/gates",5),
 health:route("/health",15), ready:route("/health/ready",15), minimal:route("/stats/minimal/all",15),
 upstreams:route("/stats/upstreams",15), summary:route("/runtime/connections/summary",15,"runtime_edge"),
 info:route("/system/info",1e9), posture:route("/security/posture",1e9), events:route("/runtime/events/recent?limit=50",5,"runtime_edge")}
const events = $("events"), details = $("details"), series = {traffic:[], conns:[]}, people = new Map()
let auth = sessionStorage.getItem("authorization") || "", revision = "", paused, asking, timer, fault = "", fails = 0, freshAt = 0
let skew = 0, bornAt = 0, usersAt = 0, zeros = [], marks = [], order = [], frozen, sortKey, sortDown

// nodes: text from outside stays text
const fill = (node,kids)=>{ node.replaceChildren(...kids.filter(kid=>kid)); return node; }
function el(tag,props,...kids) {
 const node = document.createElement(tag), all = typeof props === "string" ? {className:props} : props
 if (tag === "input") node.autocomplete = "off"
 for (const key in all) key in node ? node[key] = all[key] : node.setAttribute(key,all[key])
 return fill(node,kids)
}
const svg = (tag,attributes,...kids)=>{
 const node = document.createElementNS("http://www.w3.org/2000/svg",tag)
 for (const key in attributes) node.setAttribute(key,attributes[key])
 return fill(node,kids)
}
const dim = text=>el("p","dim",text), alarm = ()=>el("p",{className:"error", role:"alert"})
const button = (text,onclick,props)=>el("button",{type:"button", onclick, ...props},text), box = (cls,...kids)=>el("div",cls,...kids)
const put = (node,text)=>{ if (node.textContent !== text) node.textContent = text; }
const plain = text=>text.replace(/[\0-\x1f\x7f-\x9f\u2028\u2029]/g,c=>"\\x" + c.charCodeAt(0).toString(16).padStart(2,"0"))
const sum = (list,pick)=>list.reduce((total,item)=>total + pick(item),0), last = list=>list[list.length - 1], mono = ()=>performance.now(), ago = t=>(mono() - t) / 1000
const count = n=>n.toLocaleString("en"), ms = v=>v == null ? "–" : Math.round(v) + " ms", percent = v=>Math.round(v) + " %"
const clock = s=>new Date(s * 1000).toLocaleTimeString([],{timeStyle:"short"})
function bytes(n) {
 let unit = 0
 while (n >= 999.5 && unit < 4) { n /= 1000; unit++; }
 return (unit && n < 99.95 ? n.toFixed(1) : Math.round(n)) + " " + ["B","kB","MB","GB","TB"][unit]
}
function span(s) {
 const d = s / 86400 | 0, h = s / 3600 % 24 | 0, m = s / 60 % 60 | 0
 return d ? `${d} d ${h} h` : h ? `${h} h ${m} min` : m ? `${m} min` : `${s | 0} s`
}

// asking
async function call(path,method = "GET",match = "",body = {}) {
 const headers = {}, abort = new AbortController(), late = setTimeout(()=>abort.abort(),8000), sends = /^P/.test(method)
 if (auth) headers.Authorization = auth
 if (sends) headers["Content-Type"] = "application/json"
 if (match) headers["If-Match"] = match
 try {
  const answer = await fetch(base + "/v1" + path,{method, headers, signal:abort.signal, body:sends ? JSON.stringify(body) : null})
  const {ok, data, revision, error} = await answer.json().catch(()=>({}))
  return {status:answer.status, data, revision, when:mono(), error:ok ? null : error || {message:"HTTP status " + answer.status}}
 } catch { return {status:0, error:{message:"No answer: outcome unknown, read again"}}; } finally { clearTimeout(late); }
}
async function tick() {
 clearTimeout(timer)
 const now = mono(), due = Object.values(R).filter(r=>r.at <= now && !r.gone && (r !== R.events || events.open))
 const answers = await Promise.all(due.map(r=>call(r.path)))
 if (answers.some(a=>a.status === 401)) return askHeader()
 fault = ""
 due.forEach((r,i)=>{
  const a = answers[i]
  if (a.status === 404) r.gone = "not offered by this server"
  else if (a.error) fault = a.status ? a.error.message : fault
  else {
   Object.assign(r,{data:a.data, at:a.when + r.every * 1000 - 200})
   if (a.data.reason === "feature_disabled") r.gone = `server.api.${r.gate}_enabled = true would show this, restart needed`
   revision = a.revision
   freshAt = a.when
   if (r === R.zero) takeZero(a.data)
   if (r === R.users) takeUsers(a.data,a.when)
  }
 })
 fails = due[0] && !answers.some(a=>a.status) ? fails + 1 : 0
 R.users.every = people.size > 300 ? 15 : 5
 draw()
 if (!paused && !document.hidden && !asking) timer = setTimeout(tick,1000 * (/not allowed/.test(fault) ? 30 : [5,5,10,20,30][Math.min(fails,4)]))
}
function refresh(...keys) { for (const key of keys) Object.assign(R[key],{at:0, gone:""}); return tick(); }

// rates; an uptime that went back is a restart
const up = zero=>zero.core.uptime_seconds
function takeZero(zero) {
 skew = zero.generated_at_epoch_secs - Date.now() / 1000
 if (zeros[0] && up(zero) < up(last(zeros))) {
  bornAt = Date.now() / 1000
  zeros = []
  marks.push(mono())
  people.forEach(p=>Object.assign(p,{octets:null, rates:[], peak:0}))
  for (const r of Object.values(R)) { r.gone = ""; if (r.every > 100) r.at = 0; }
 }
 zeros = [...zeros,zero].slice(-61)
}
function delta(pick,seconds) {
 const end = last(zeros), first = zeros.find(z=>up(end) - up(z) <= seconds)
 return first === end ? null : {n:pick(end) - pick(first), s:up(end) - up(first)}
}
function takeUsers(list,when) {
 let total = 0, gap = 0
 const names = new Set(list.map(u=>u.username)), note = (key,v)=>series[key] = [...series[key],{t:when, v}].slice(-180)
 for (const [name,p] of people) if (!names.has(name)) { people.delete(name); p.row?.remove(); p.more?.remove(); }
 for (const u of list) {
  const p = people.get(u.username) || {rates:[], peak:0, octets:usersAt ? 0 : null}
  people.set(u.username,p)
  if (p.octets !== null) {
   const grown = Math.max(0,u.total_octets - p.octets)
   gap = (when - usersAt) / 1000
   total += grown
   p.rates = [...p.rates,grown / gap].slice(-3)
  }
  Object.assign(p,{user:Object.assign(u,{label:plain(u.username)}), octets:u.total_octets, peak:Math.max(p.peak,u.current_connections)})
 }
 usersAt = when
 if (gap) note("traffic",total / gap)
 note("conns",sum(list,u=>u.current_connections))
}
const rate = p=>p.rates[0] == null ? null : sum(p.rates,Number) / p.rates.length

// verdict, figures, charts
function verdict() {
 const g = R.gates.data || {}, r = R.ready.data || {}
 return [[fails,"bad",freshAt ? `No answer for ${span(ago(freshAt))}` : "Unreachable"],
  [asking,"warn","Authorization is asked for"],
  [/^Source IP/.test(fault),"bad","This address is not in server.api.whitelist"],[fault,"bad",fault],[!freshAt,"dim","Loading …"],
  [g.startup_status === "initializing","warn",`Starting: ${g.startup_stage}, ${percent(g.startup_progress_pct)}`],
  [g.accepting_new_connections === false,"bad","Not accepting connections"],
  [r.reason === "no_healthy_upstreams","bad",`No way to Telegram: 0 of ${r.total_upstreams} upstreams healthy`],
  [g.reroute_active,"warn",`Running direct since ${clock(g.reroute_to_direct_at_epoch_secs)}, Middle-End not usable: no ad tag`],
  [true,"good",`Running (${g.route_mode || "direct"})`]].find(row=>row[0]).slice(1)
}
const core = ()=>R.zero.data?.core, unseen = kind=>core()?.[`telemetry_${kind}_enabled`] === false && `general.telemetry.${kind}_enabled = false`
function drawNow() {
 const users = R.users.data, c = core(), totals = R.summary.data?.data?.totals, noUser = unseen("user"), noCore = unseen("core")
 const figure = (title,off,value,small)=>{
  if (!$(title)) $("now").append(el("div",{id:title},el("dt","",title),el("dd",""),el("dd","")))
  const [,big,print] = $(title).children
  put(big,off ? OFF : value || "–")
  put(print,off || small || "…")
 }
 const opened = delta(z=>z.core.connections_total,20), all = delta(z=>z.core.connections_total,300), speed = last(series.traffic)
 const share = key=>all?.n && percent(100 * delta(z=>z.core[key],300).n / all.n), since = (text,list)=>list && text + " since start"
 figure("Connections",noUser,users && count(sum(users,u=>u.current_connections)),
  totals ? `${totals.current_connections_me} middle end, ${totals.current_connections_direct} direct` : "now")
 figure("Users online",noUser,users && `${users.filter(FILTERS.Online).length} of ${c?.configured_users ?? users.length}`,"now")
 figure("Addresses","",users && count(new Set(users.flatMap(u=>u.active_unique_ips_list || [])).size),"different ones, now")
 figure("Traffic",noUser,speed && bytes(speed.v) + "/s",since(bytes(sum(users || [],u=>u.total_octets)),users))
 figure("New connections",noCore,opened && (opened.n / opened.s).toFixed(1) + "/s",since(count(c?.connections_total || 0),c))
 figure("Strangers",noCore,share("connections_bad_total"),`last 5 min; ${share("handshake_timeouts_total") || "–"} timed out`)
}
function chart(key,title,show) {
 const from = mono() - 9e5, list = series[key].filter(p=>p.t > from), values = list.map(p=>p.v), peak = Math.max(...values,0)
 const x = t=>((t - from) / 900).toFixed(1), text = list[0] ? `now ${show(last(values))}, mean ${show(sum(values,Number) / list.length)}, peak ${show(peak)}` : "–"
 if (!$(key)) $("charts").append(el("div",{id:key},el("strong","",title),svg("svg",
  {viewBox:"0 0 1000 90", preserveAspectRatio:"none", role:"img"},svg("path",{}),svg("path",{class:"mark"})),dim("")))
 const [,picture,words] = $(key).children, [curve,mark] = picture.children
 curve.setAttribute("d",list.map((p,i)=>`${i && p.t - list[i - 1].t < 2e4 ? "L" : "M"}${x(p.t)} ${(88 - 84 * p.v / (peak || 1)).toFixed(1)}`).join(""))
 mark.setAttribute("d",marks.filter(t=>t > from).map(t=>`M${x(t)} 0V90`).join(""))
 picture.setAttribute("aria-label",`${title}: ${text}`)
 put(words,text)
}

// users
const now = ()=>Date.now() / 1000 + skew, ends = u=>u.expiration_rfc3339 ? Date.parse(u.expiration_rfc3339) / 1000 : Infinity
function state(u) {
 const at = (used,limit)=>limit != null && used >= limit
 return [[u.enabled === false,"bad","⊘ disabled"],[ends(u) < now(),"bad","✕ expired"],
  [[u.max_tcp_conns,u.max_unique_ips,u.data_quota_bytes].includes(0),"bad","✕ blocked"],
  [at(u.quota_used_bytes,u.data_quota_bytes),"bad","✕ quota used up"],
  [at(u.current_connections,u.max_tcp_conns),"warn","▲ at connection limit"],
  [at(u.active_unique_ips,u.max_unique_ips),"warn","▲ at address limit"],
  [u.current_connections,"good","● online"],[true,"dim","○ idle"]].find(row=>row[0]).slice(1)
}
const FILTERS = {All:()=>true, Online:u=>u.current_connections > 0,
 Attention:u=>/bad|warn/.test(state(u)[0]) || u.quota_used_bytes > .8 * u.data_quota_bytes || ends(u) < now() + 604800}
const COLUMNS = {name:["Name","",u=>u.username], conns:["Connections","num",u=>u.current_connections],
 ips:["Addresses","num wide",u=>u.active_unique_ips], rate:["Rate","num",u=>rate(people.get(u.username))],
 total:["Total","wide",u=>u.total_octets], expires:["Expires","wide",ends]}
const place = (u,tail = "")=>`/users/${encodeURIComponent(u.username)}${tail}`, free = ()=>R.health.data?.read_only === false
const named = u=>!/[/\0-\x1f\x7f]|^\.\.?$/.test(u.username), limited = (used,limit)=>used + (limit == null ? "" : " / " + limit)
function drawRow(p) {
 const u = p.user, [cls,word] = state(u), speed = rate(p), quota = u.data_quota_bytes, off = unseen("user")
 if (!p.row) {
  p.open = button(el("bdi",{translate:false},u.label),()=>{ p.more.hidden = !p.more.hidden; drawRow(p); })
  p.cells = Object.values(COLUMNS).map(([,className])=>el("td",className,el("span","")))
  p.cells[0].prepend(p.open,el("br",""))
  p.cells[4].append(p.bar = el("meter",{high:.8, ariaLabel:"quota used"}))
  p.row = el("tr","",...p.cells)
  p.more = el("tr",{className:"more", hidden:true},el("td",{colSpan:6}))
 }
 [word,off ? OFF : limited(u.current_connections,u.max_tcp_conns),limited(u.active_unique_ips,u.max_unique_ips),
  off ? OFF : speed === null ? "–" : bytes(speed) + "/s",
  (off ? OFF : bytes(u.total_octets)) + (quota == null ? "" : `, ${bytes(u.quota_used_bytes || 0)} of ${bytes(quota)} `),
  ends(u) < Infinity ? new Date(ends(u) * 1000).toLocaleString([],{dateStyle:"medium", timeStyle:"short"}) : "never",
 ].forEach((text,i)=>put(p.cells[i].querySelector("span"),text))
 p.cells[0].lastChild.className = cls
 p.bar.hidden = !quota
 p.bar.value = (u.quota_used_bytes || 0) / (quota || 1)
 p.open.setAttribute("aria-expanded",!p.more.hidden)
 if (!p.more.hidden) drawMore(p)
}
const linksOf = u=>Object.keys(KINDS).flatMap(kind=>(u.links[kind] || []).map((item,index)=>({kind, index, link:item.domain ? item.link : item, domain:item.domain || ""})))
function drawMore(p) {
 const u = p.user, links = linksOf(u), shape = JSON.stringify([links,free(),u.enabled,u.data_quota_bytes,people.size > 1])
 if (p.shape !== shape) {
  p.shape = shape
  p.facts = el("dl","")
  fill(p.more.firstChild,[p.facts,...links.map(item=>linkRow(u,item,named(u))),
   !links[0] && dim("No public address known: set general.links.public_host"),box("tools",...actions(p))])
 }
 Object.entries({"Addresses now": (u.active_unique_ips_list || []).join(", "), "In the last 30 s": (u.recent_unique_ips_list || []).join(", "),
  "Peak connections": p.peak + "", "Ad tag": u.user_ad_tag,
  "From, to client": [u.octets_from_client,u.octets_to_client].map(bytes).join(", "),
 }).forEach(([title,text],i)=>{
  if (!p.facts.children[2 * i]) p.facts.append(el("dt","",title),el("dd",""))
  put(p.facts.children[2 * i + 1],text || "–")
 })
}
function actions(p) {
 const u = p.user, post = tail=>()=>call(place(u,tail),"POST",revision), closes = more=>`Closes ${p.user.current_connections} connections now. ${more}`
 const ask = (title,text,work,done)=>button(title,()=>sure(u,title,text(),work,done)), old = ()=>closes("Old links stop working.")
 if (!named(u)) return [dim("Edit this name in the file")]
 return free() ? [button("Edit",()=>edit(p.user)),
  u.enabled && ask("Disable",()=>closes("Links work again when enabled."),post("/disable")),
  u.enabled === false && button("Enable",()=>change(post("/enable"))),
  ask("New secret",old,post("/rotate-secret"),showLink),
  u.data_quota_bytes != null && ask("Reset quota",()=>"Counting begins again at 0.",post("/reset-quota")),
  people.size > 1 && ask("Delete",old,()=>call(place(u),"DELETE",revision))] : []
}
function linkRow(u,item,withQr) {
 const field = el("input",{readOnly:true, type:"password", value:item.link, ariaLabel:"Link of " + u.label})
 const said = el("span",{role:"status"}), show = ()=>{ field.type = "text"; }
 const copy = async ()=>{
  try { await navigator.clipboard.writeText(item.link); } catch {
   show()
   field.select()
   if (!document.execCommand("copy")) return put(said,"Selected: copy it by hand")
  }
  put(said,"Copied")
 }
 return box("link",`${KINDS[item.kind]} ${item.domain}`,field,button("Show",show),button("Copy",copy),withQr && button("QR",()=>qr(u,item)),
  item.link.startsWith("tg://proxy?") && el("a",{href:item.link},"Open"),said)
}
function drawUsers() {
 const table = $("users"), all = [...people.values()], word = $("search").value.toLowerCase(), old = new Map(order.map((p,i)=>[p,i]))
 const stays = frozen && (table.matches(":hover") || table.contains(document.activeElement)), key = p=>stays ? old.get(p) ?? 1e9 : COLUMNS[sortKey][2](p.user)
 const found = all.filter(p=>p.user.username.toLowerCase().includes(word) && FILTERS[$("filter").value](p.user)).sort((a,b)=>{
  const x = key(a), y = key(b)
  return x === y ? (a.user.username < b.user.username ? -1 : 1) : (x < y ? -1 : 1) * (sortDown && !stays ? -1 : 1)
 })
 const shown = found.slice(0,300)
 frozen = true
 for (const p of order) if (!shown.includes(p)) { p.row.remove(); p.more.remove(); }
 shown.forEach(drawRow)
 shown.reduceRight((next,p)=>{
  if (p.more.nextSibling !== next || !p.more.parentNode) table.insertBefore(p.more,next)
  if (p.row.nextSibling !== p.more) table.insertBefore(p.row,p.more)
  return p.row
 },null)
 order = shown
 put($("count"),`${shown.length} of ${all.length} users`)
 $("nobody").hidden = !all[0] || all.some(p=>p.user.current_connections)
 $("create").hidden = !free()
}
function sort(key) {
 sortDown = sortKey === key ? !sortDown : /conns|ips|rate|total/.test(key)
 sortKey = key
 frozen = false
 for (const name in COLUMNS) $("by-" + name).ariaSort = name !== key ? "none" : sortDown ? "descending" : "ascending"
 drawUsers()
}

// changes
function dialog(title,...kids) {
 const node = el("dialog",{ariaLabel:title},el("h2","",title),...kids)
 node.onclose = ()=>node.remove()
 document.body.append(node)
 node.showModal()
 return node
}
async function change(work,said = $("banner"),lock = {}) {
 lock.disabled = true
 const a = await work()
 lock.disabled = false
 put(said,a.error?.message || "")
 await refresh("users",...a.error ? ["health"] : ["info","posture"])
 return a
}
function sure(u,title,text,work,done) {
 const said = alarm(), no = button("Cancel",()=>node.close()), yes = button(title,async ()=>{
  const {error, data} = await change(work,said,yes)
  if (!error) { node.close(); done?.(data); }
 },{className:"bad"}), node = dialog(`${title}: ${u.label}`,el("p","",text),said,box("tools",no,yes))
 no.focus()
}
function showLink({user}) {
 const u = people.get(user.username).user, [item] = linksOf(u)
 if (item) qr(u,item)
}
async function qr(u,item) {
 const said = alarm(), node = dialog("Link of " + u.label,said,linkRow(u,item),button("Close",()=>node.close()))
 const {error, data} = await call(place(u,`/qr?kind=${item.kind}&index=${item.index}`))
 if (error) return put(said,error.message)
 const size = data.rows.length + 8, d = data.rows.map((row,y)=>row.replace(/1|0/g,(cell,x)=>+cell ? `M${x + 4} ${y + 4}h1v1h-1z` : "")).join("")
 said.after(svg("svg",{viewBox:`0 0 ${size} ${size}`, class:"qr", role:"img", "aria-label": "QR code of the link", "shape-rendering": "crispEdges"},svg("path",{d})))
}
function edit(u) {
 const old = u || {}, said = alarm(), f = {}, form = el("form",{noValidate:true}), save = el("button","",u ? "Save" : "Create")
 const local = s=>s < Infinity ? new Date(s * 1000 - new Date(s * 1000).getTimezoneOffset() * 6e4).toISOString().slice(0,16) : ""
 let match = revision
 const add = (key,title,type,none,hint = "",was = String(old[key] ?? ""))=>{
  const input = el("input",{id:"f-" + key, type, value:was}), off = el("input",{type:"checkbox", checked:none && !was}), note = el("p","warn note")
  const sync = ()=>{ input.disabled = off.checked; put(note,off.checked ? "" : type === "number" && input.value === "0" ? "0 blocks this user" : hint); }
  off.onchange = input.oninput = sync
  sync()
  f[key] = {input, off, was, type, sync}
  form.append(el("label",{htmlFor:input.id},title),box("row",input,none && el("label","",off,none)),note)
 }
 const more = days=>button(`+${days} days`,()=>{
  const {input, off, sync} = f.expiration_rfc3339
  off.checked = false
  input.value = local(Math.max(now(),Date.parse(input.value) / 1000 || 0) + days * 86400)
  sync()
 })
 if (!u) add("username","Name","text")
 add("max_tcp_conns","Connections","number"," no limit","One Telegram app opens up to about 8 connections")
 add("max_unique_ips","Addresses","number"," no limit")
 add("data_quota_bytes","Quota in bytes","number"," no limit")
 add("expiration_rfc3339","Expires","datetime-local"," no limit","",local(ends(old)))
 form.append(box("tools",more(7),more(30)))
 add("user_ad_tag","Ad tag, 32 hex characters","text"," none")
 form.append(said,box("tools",button("Cancel",()=>node.close()),save))
 form.onsubmit = async event=>{
  event.preventDefault()
  const body = {}
  for (const [key,{input, off, was, type}] of Object.entries(f)) {
   const text = off.checked ? "" : input.value
   if (text !== was) body[key] = text === "" ? null : type === "number" ? Number(text) : type === "text" ? text : new Date(text).toISOString().replace(/\.\d+/,"")
  }
  const {error, data} = await change(()=>u ? call(place(u),"PATCH",match,body) : call("/users","POST",match,body),said,save)
  if (!error) { node.close(); if (!u) showLink(data); }
  if (error?.code === "user_exists") { put(said,"This name exists"); f.username.input.focus(); }
  if (error?.code !== "revision_conflict") return
  const b = await call(u ? place(u) : "/health"), theirs = Object.keys(f).filter(key=>u && b.data && (b.data[key] ?? null) !== (u[key] ?? null))
  put(said,b.error?.message || `The file was changed meanwhile${theirs.map(key=>`; ${key} is now ${b.data[key] ?? "not set"}`).join("") || ", this user was not"}.`)
  put(save,"Save over it")
  match = b.revision || match
 }
 const node = dialog(u ? "Edit " + u.label : "New user",form)
 form.querySelector("input").focus()
}
function askHeader() {
 const field = el("input",{type:"password", id:"f-auth"}), said = alarm()
 const form = el("form","",el("label",{htmlFor:"f-auth"},"Exact value of server.api.auth_header, scheme included (Bearer …)"),field,
  !isSecureContext && el("p","warn","This connection is not encrypted"),said,
  box("tools",button("Forget",()=>{ auth = field.value = ""; sessionStorage.clear(); }),el("button","","Use it")))
 if (asking) return
 asking = true
 put(said,auth && "This value is wrong")
 form.onsubmit = event=>{
  event.preventDefault()
  if (!/^[\x20-\x7e]+$/.test(field.value)) return put(said,"Only visible ASCII can be sent")
  sessionStorage.setItem("authorization",auth = field.value)
  asking = false
  node.close()
  refresh(...Object.keys(R))
 }
 const node = dialog("Authorization",form)
 node.oncancel = event=>event.preventDefault()
 draw()
}

// the rest
const line = (tag,cells)=>el("tr","",...cells.map(cell=>el(tag,"",cell)))
const rows = (heads,list)=>el("div",{className:"scroll", tabIndex:0},el("table","",el("thead","",line("th",heads)),el("tbody","",...list.map(cells=>line("td",cells)))))
function drawTelegram() {
 const ways = R.upstreams, min = R.minimal.data || {}, s = min.data?.me_writers.summary, run = min.data?.me_runtime, failed = delta(z=>z.upstream.connect_fail_total,300)
 fill($("telegram"),[ways.gone && dim("Upstreams: " + ways.gone),
  ways.data?.upstreams && rows(["Way out","State","Checked","Latency","DC 1–5"],ways.data.upstreams.map(r=>[`${r.route_kind} ${r.address}`.replace("direct ",""),
   el("span",r.healthy ? "good" : "bad",r.healthy ? "● healthy" : `✕ unhealthy, ${r.fails} failures`),
   span(r.last_check_age_secs) + " ago",ms(r.effective_latency_ms),r.dc.map(d=>ms(d.latency_ema_ms)).join(" · ")])),
  failed?.n > 0 && dim(`${failed.n} connections to Telegram failed in the last 5 min`),
  R.minimal.gone ? dim("Middle-End: " + R.minimal.gone) : min.reason && dim(R.gates.data?.use_middle_proxy ? "Middle-End: not ready yet" : "No Middle-End in direct mode"),
  run && el("p","",`Middle-End: ${s.alive_writers} of ${s.required_writers} links, coverage ${percent(s.coverage_pct)}, endpoints ${percent(s.available_pct)}, generation ${run.active_generation}, `
   + (run.pending_hardswap_generation ? "next one warming, " : "") + run.quarantined_endpoints_total + " in quarantine"),
  run && rows(["DC","Links","Coverage","Round trip","Sessions"],min.data.dcs.dcs.map(d=>{
   const [cls,shape] = !d.alive_writers ? ["bad","✕"] : d.coverage_pct < 80 ? ["warn","▲"] : ["good","●"]
   return [d.dc,el("span",cls,`${shape} ${d.alive_writers} of ${d.required_writers}`),el("meter",{max:100, value:d.coverage_pct, ariaLabel:"coverage"}),ms(d.rtt_ms),d.load + ""]
  }))])
}
const flat = (value,path = "")=>value === null || typeof value !== "object" ? [[path,value]] : Object.keys(value).flatMap(key=>flat(value[key],path && path + "." + key || key))
function drawClosed() {
 const e = R.events.data?.data, before = new Map(flat(zeros[zeros.length - 2] || {}))
 if (events.open) fill(events.lastChild,[e ? rows(["Time","Event","About"],
  [...e.events].reverse().map(r=>[new Date(r.ts_epoch_secs * 1000).toLocaleString(),r.event_type,plain(r.context)])) : dim(R.events.gone),e?.dropped_total > 0 && e.dropped_total + " older ones dropped"])
 if (details.open) details.lastChild.replaceChildren(...Object.entries({Counters:last(zeros), Security:R.posture.data, System:R.info.data}).flatMap(([title,data])=>[
  el("h3","",title),rows(["Name","Value","Change"],flat(data || {}).filter(([,v])=>v || title !== "Counters").map(([key,v])=>[key,plain(String(v)),
   key === "api_auth_header_enabled" && !v ? "every program and rebound page on this machine can read the links" : v > before.get(key) ? "+" + count(v - before.get(key)) : ""]))]))
}
function draw() {
 const [cls,text] = verdict(), version = R.info.data?.version
 put($("verdict"),{good:"● ", warn:"▲ ", bad:"✕ ", dim:""}[cls] + text)
 $("verdict").className = cls
 put($("meta"),[version && "telemt.py " + version,zeros[0] && "up " + span(up(last(zeros))),freshAt && `data ${span(ago(freshAt))} old`].filter(part=>part).join(" · "))
 document.querySelector("main").className = fails || fault ? "stale" : ""
 put($("banner"),(Date.now() / 1000 - bornAt < 600 ? `Proxy restarted at ${clock(bornAt)}. Counters began again at 0. ` : "")
  + (Math.abs(skew) > 60 ? `Server clock differs by ${span(Math.abs(skew))}; FakeTLS clients are refused when clocks disagree.` : ""))
 drawNow()
 chart("traffic","Traffic",v=>bytes(v) + "/s")
 chart("conns","Connections",v=>String(+v.toFixed(1)))
 drawUsers()
 drawTelegram()
 drawClosed()
}
for (const [key,[title,cls]] of Object.entries(COLUMNS)) $("heads").append(el("th",{scope:"col", className:cls, id:"by-" + key},button(title,()=>sort(key))))
$("create").onclick = ()=>edit(null)
$("first").onclick = ()=>showLink(order[0])
$("pause").onclick = ()=>{ paused = !paused; $("pause").ariaPressed = paused; tick(); }
$("search").oninput = $("filter").onchange = ()=>{ frozen = false; drawUsers(); }
events.ontoggle = ()=>events.open && refresh("events")
details.ontoggle = drawClosed
document.onvisibilitychange = ()=>document.hidden ? clearTimeout(timer) : tick()
sort("name")
tick()
"""  # noqa: E501 - served as it stands
PAGE_HTML: Final = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>telemt</title>
<link rel="icon" href="data:,">
<style>{css}</style>
<header><h1>telemt</h1><p id="verdict" role="status">Loading … needs JavaScript</p><p id="meta" class="dim"></p><button id="pause" aria-pressed="false">Pause</button></header>
<main>
<p id="banner" class="warn note"></p>
<h2>Now</h2>
<dl id="now" class="grid"></dl>
<h2>Last 15 minutes <small>since this page was opened</small></h2>
<div id="charts" class="grid"></div>
<h2>Users</h2>
<div class="tools"><label>Search <input id="search" type="search"></label>
<label>Show <select id="filter"><option>All<option>Online<option>Attention</select></label>
<button id="create" hidden>New user</button><span id="count" class="dim"></span></div>
<div class="scroll"><table><thead><tr id="heads"></tr></thead><tbody id="users"></tbody></table></div>
<p id="nobody" hidden>Nobody is connected. Open a link on a phone to test: <button id="first">QR</button></p>
<h2>Telegram side</h2>
<div id="telegram"></div>
<details id="events"><summary>Events</summary><div></div></details>
<details id="details"><summary>Details</summary><div></div></details>
</main>
<script>{js}</script>
</html>
"""  # noqa: E501 - served as it stands
PAGE_PATHS: Final = ("/", "/ui")


def _page_hash(text: str) -> str:
    """Source of the Content-Security-Policy for one inline element."""
    return f"'sha256-{binascii.b2a_base64(hashlib.sha256(text.encode()).digest(), newline=False).decode()}'"


PAGE: Final = PAGE_HTML.replace("{css}", PAGE_CSS).replace("{js}", PAGE_JS).encode()
PAGE_TYPE: Final = "text/html; charset=utf-8"
PAGE_FIELDS: Final = (
    ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"),
    ("Content-Security-Policy",
     f"default-src 'none'; script-src {_page_hash(PAGE_JS)}; style-src {_page_hash(PAGE_CSS)}; connect-src 'self'; img-src data:; "
     "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"),
    ("Referrer-Policy", "no-referrer"), ("Cross-Origin-Opener-Policy", "same-origin"), ("Cross-Origin-Resource-Policy", "same-origin"))


# == 11. service =============================================================
# The gates of api.md 4 in their order, the handlers, and what telemt.py starts.
# A handler runs in the thread of its connection.  It copies plain integers, or asks
# the loop for a snapshot and shares the answer with everybody who waits (Cached).
# Long lists are made in slices with a pause between them: the interpreter has one
# lock, and a session must not wait for it while an operator reads a table.
# Source: api.md 4, 9, 14.3, 14.4, 15; metrics.md 1, 2, 6.

API_PLACES: Final = 64
METRICS_PLACES: Final = 32
_ASK_S: Final = 0.5                      # what the data plane gets for a snapshot
_READY_S: Final = 3.0                    # and before it counts as unfit for clients: who asks has a limit of its own
_STOP_S: Final = 1.0                     # what a change that is being written gets when we stop
_SLICE: Final = 200                      # users between two pauses; these take less than _SWITCH_S
_SWITCH_S: Final = 0.0005                # how long a thread here may keep the interpreter from the loop
_TEXT: Final = "text/plain; charset=utf-8"
_FIELDS: Final = (("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"))
_ALLOW: Final = ("Allow", "GET, PATCH, DELETE")
_MAPPED: Final = ipaddress.IPv6Network("::ffff:0:0/96")
_CONTEXT_MAX: Final = 256                # bytes of an event's context


class Whitelist:
    """Networks of which a peer must be; none = everybody may.  IPv4 behind ::ffff: is IPv4."""

    def __init__(self, networks: Iterable[IpNetwork]) -> None:
        self._networks = [_plain_network(network) for network in networks]
        self._last: tuple[str | None, bool] = (None, False)    # the same peer asks again and again

    def admits(self, peer: str) -> bool:
        """True if an address (of peer_ip) may come in."""
        last, verdict = self._last
        if last != peer:
            verdict = not self._networks or self._is_inside(peer)
            self._last = peer, verdict         # one assignment: other threads read it
        return verdict

    def _is_inside(self, peer: str) -> bool:
        try:
            ip = ipaddress.ip_address(peer)
        except ValueError:
            return False
        return any(ip.version == network.version and ip in network for network in self._networks)


def _plain_network(network: IpNetwork) -> IpNetwork:
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96 and network.subnet_of(_MAPPED):
        return ipaddress.IPv4Network((int(network.network_address) & 0xFFFF_FFFF, network.prefixlen - 96))
    return network


class Guard:
    """Gates 2 to 4: who may ask, from what."""

    def __init__(self, api: Api) -> None:
        self._whitelist = Whitelist(api.whitelist)
        self._auth = api.auth_header.strip(" \t") if api.auth_header else None       # blank or not ASCII: locked
        self._hosts = {host.lower() for host in api.allowed_hosts}

    def check_peer(self, peer: str) -> None:
        """Gate 2.  Raises ApiError(403)."""
        if not self._whitelist.admits(peer):
            raise forbidden("Source IP is not allowed")

    def check_key(self, head: Head) -> None:
        """Gate 3.  Raises ApiError(401)."""
        if self._auth is not None and not self._is_authorized(head.values("authorization")):
            raise ApiError(401, "unauthorized", "Missing or invalid Authorization header")

    def check_host(self, head: Head) -> None:
        """The host half of gate 4.  Raises ApiError(403)."""
        if self._hosts and not all(map(self._is_host_allowed, head.values("host"))):
            raise forbidden("Host is not allowed")

    def check_site(self, head: Head) -> None:
        """The browser half of gate 4.  Raises ApiError(403)."""
        if head.method in ("POST", "PATCH", "PUT", "DELETE") and _is_cross_site(head):
            raise forbidden("Cross-site request refused")

    def _is_authorized(self, values: list[str]) -> bool:
        assert self._auth is not None
        if len(values) != 1 or not self._auth or not self._auth.isascii() or _NO_HEADER_TEXT.search(values[0]):
            return False
        return hmac.compare_digest(values[0].encode(), self._auth.encode())

    def _is_host_allowed(self, value: str) -> bool:
        host = re.sub(r":\d*$", "", value.strip()).lower()
        if host in self._hosts or host == "localhost":
            return True
        try:
            ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
        except ValueError:
            return False
        return True


def _is_cross_site(head: Head) -> bool:
    """The browser guard (14.4): a page of another site wants to change something."""
    if any(value.lower() in ("cross-site", "same-site") for value in head.values("sec-fetch-site")):
        return True
    if not head.values("origin") or head.method not in ("POST", "PATCH"):
        return False
    kinds = head.values("content-type")
    return not kinds or any(kind.partition(";")[0].strip().lower() != "application/json" for kind in kinds)


class Cached(Generic[_T]):
    """The last value of `build`, shared for `ttl_s` seconds; one build at a time, everybody who waits gets its value.

    What `keep` refuses is handed to those who wait, and not kept.
    """

    def __init__(self, build: Callable[[], _T], ttl_s: float, keep: Callable[[_T], bool] = lambda value: True) -> None:
        self._build, self._ttl_s, self._keep = build, ttl_s, keep
        self._lock = threading.Lock()
        self._builds = 0
        self._value: list[_T] = []
        self._until = -math.inf                # monotonic seconds

    def get(self) -> tuple[_T, bool]:
        """The value, and whether it was there already."""
        seen = self._builds
        with self._lock:
            if self._value and (self._builds != seen or time.monotonic() < self._until):
                return self._value[0], True
            value = self._build()
            self._builds += 1
            self._value = [value]
            self._until = time.monotonic() + self._ttl_s if self._keep(value) else -math.inf
            return value, False


class Events:
    """Ring of what the control plane did; record() may be called from any thread."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._ring: collections.deque[tuple[int, int, str, str]] = collections.deque(maxlen=capacity)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def record(self, kind: str, context: str) -> None:
        """One event; a long context is cut."""
        context = context.encode("utf-8", "replace")[:_CONTEXT_MAX].decode("utf-8", "ignore")
        with self._lock:
            self._ring.append((next(self._numbers), int(time.time()), kind, context))

    def view(self, limit: int) -> JsonObject:
        """`data` of runtime/events/recent: the last `limit`, oldest first."""
        with self._lock:
            rows = list(self._ring)
        dropped = rows[0][0] - 1 if rows else 0
        return {"capacity": self.capacity, "dropped_total": dropped, "events": [
            {"seq": seq, "ts_epoch_secs": at, "event_type": kind, "context": context} for seq, at, kind, context in rows[-limit:]]}


class Minimal(NamedTuple):
    """What the loop tells for 9.5 to 9.7; pool None: there is none, path None: no answer in time."""

    pool: PoolSnapshot | None
    path: list[JsonObject] | None
    now_s: int


def breathe(number: int) -> None:
    """Between two items of a long list: let the data plane have the interpreter now and then."""
    if number % _SLICE == _SLICE - 1:
        time.sleep(0)


class Roster:
    """The lasting parts of all users of one configuration; each is made when it is first asked for.

    sample: links of the first user; as long as they stay, so do all others.
    """

    def __init__(self, port: ControlPort, settings: Settings, sample: list[Link]) -> None:
        self._port, self.settings, self.sample = port, settings, sample
        self.names = sorted(settings.access.users)
        self._frames: dict[str, UserFrame] = {}
        self._rows: tuple[object, list[tuple[UserFrame, User | None]]] = (None, [])

    def rows(self, users: Mapping[str, User]) -> list[tuple[UserFrame, User | None]]:
        """All configured users by name, with what they do; for any thread."""
        known, rows = self._rows
        if known is not users:
            rows = [(self.frame(name), users.get(name)) for name in self.names]
            self._rows = users, rows           # one assignment
        return rows

    def frame(self, name: str) -> UserFrame:
        """The lasting part of a configured user; for any thread."""
        frame = self._frames.get(name)
        if frame is None:
            links = view_links(self._port.links(name), self.settings.censorship.tls_domain)
            frame = self._frames[name] = frame_user(name, self.settings.access, links)
        return frame


class Desk:
    """The handlers of all reads: one method per name in ROUTES; returns `data` as JSON."""

    def __init__(self, port: ControlPort, revision: Callable[[], str]) -> None:
        self.port, self._revision = port, revision
        self.api = api = port.settings.server.api          # frozen at start (api.md 1)
        self.events = Events(api.runtime_edge_events_capacity)
        self._minimal = Cached(self._build_minimal, api.minimal_runtime_cache_ttl_ms / 1000, lambda found: found.pool is not None)
        self._load = Cached(self._build_load, api.runtime_edge_cache_ttl_ms / 1000, lambda found: found is not None)
        self._last_load: tuple[JsonObject, int] | None = None            # the last one that came, and when
        self._route: RouteSnapshot | None = None
        self._roster = Roster(port, port.settings, [])
        self._form = functools.cache(lambda: make_middle_form(port.counters.me))
        self._openapi = functools.cache(lambda: dump_json(make_openapi(port.version)))

    # -- the data plane

    def _ask(self, build: Callable[[], _T], limit_s: float = _ASK_S) -> _T | None:
        """What the loop makes of `build`; None when it does not answer in time."""
        try:
            return self.port.ask(build, limit_s)
        except TimeoutError:
            return None

    def _build_minimal(self) -> Minimal:
        sources = self.port.sources
        pool = sources.pool if self.port.settings.general.use_middle_proxy else None
        found = self._ask(lambda: (pool() if pool else None, sources.path() if sources.path else []))
        return Minimal(found[0] if found else None, found[1] if found else None, int(time.time()))

    def _minimal_now(self) -> Minimal:
        return self._minimal.get()[0]

    def _upstream_rows(self, limit_s: float = _ASK_S) -> list[JsonObject] | None:
        rows = self.port.sources.upstreams
        return self._ask(rows, limit_s) if rows else None

    def _uptime_s(self) -> float:
        return time.monotonic() - self.port.started_at

    @property
    def _minimal_off(self) -> bool:
        return not self.api.minimal_runtime_enabled

    # -- plain integers

    def get_health(self) -> str:
        return dump_json({"status": "ok", "read_only": self.api.read_only})

    def get_summary(self) -> str:
        counters = self.port.counters
        return dump_json(view_head(counters, self._uptime_s(), len(self.port.settings.access.users)) | view_refusals(counters))

    def get_zero_all(self) -> str:
        settings = self.port.settings
        return render_zero_all(self.port.counters, self._form(), settings.general.telemetry, self._uptime_s(), len(settings.access.users),
                               int(time.time()))

    def get_system_info(self) -> str:
        sources, uptime = self.port.sources, os.uname()
        found = {"version": self.port.version, "target_arch": uptime.machine, "target_os": "linux", "build_profile": "release",
                 "process_started_at_epoch_secs": int(self.port.started_wall), "uptime_seconds": self._uptime_s(),
                 "config_path": self.port.config_path, "config_hash": self._revision(), "config_reload_count": sources.reloads}
        if sources.reloaded_wall:
            found["last_config_reload_epoch_secs"] = int(sources.reloaded_wall)
        return dump_json(found)

    def get_limits(self) -> str:
        return dump_json(view_limits(self.port.settings))

    def get_posture(self) -> str:
        return dump_json(view_posture(self.port.settings, self.api))

    def get_whitelist(self) -> str:
        return dump_json(view_whitelist(self.api, int(time.time())))

    def get_openapi(self) -> str:
        return self._openapi()

    # -- users

    def get_users(self) -> str:
        settings, users = self.port.settings, self.port.users
        counted, now = settings.general.telemetry.user_enabled, time.monotonic()
        rows = []
        for number, (frame, user) in enumerate(self._roster_of(settings).rows(users)):
            rows.append(render_user(frame, user, counted, now))
            breathe(number)
        if not rows:
            return "[]"
        rows[0] = "[" + rows[0]                # not around the whole: that is a copy of half a megabyte
        rows[-1] += "]"
        return ",".join(rows)

    def get_user(self, name: str) -> str:
        settings = self.port.settings
        if name not in settings.access.users:
            raise not_found("User not found")
        frame = self._roster_of(settings).frame(name)
        return render_user(frame, self.port.users.get(name), settings.general.telemetry.user_enabled, time.monotonic())

    def _roster_of(self, settings: Settings) -> Roster:
        """The roster that is true now: an address that is detected later changes the links of everybody."""
        roster, sample = self._roster, self.port.links(next(iter(settings.access.users), ""))
        if roster.settings is not settings or roster.sample != sample:
            roster = self._roster = Roster(self.port, settings, sample)
        return roster

    def get_qr(self, name: str, kind: str, index: int) -> str:
        """QR matrix of a link (9.9)."""
        settings = self.port.settings
        if name not in settings.access.users:
            raise not_found("User not found")
        found = view_links(self.port.links(name), settings.censorship.tls_domain)[kind]
        if index >= len(found):
            raise not_found("Link not found")
        link = found[index]["link"] if kind == "tls_domains" else found[index]
        try:
            code = make_qr(link)
        except ValueError:                     # too long for any symbol
            raise not_found("Link not found") from None
        return dump_json({"kind": kind, "index": index, "link": link, "version": code.version, "rows": code.rows})

    def get_active_ips(self) -> str:
        return dump_json(view_active_ips(self.port.users.values()))

    def get_quotas(self) -> str:
        return dump_json(view_quotas(self.port.settings.access, self.port.users))

    # -- snapshots

    def get_upstreams(self) -> str:
        rows = None if self._minimal_off else self._upstream_rows()
        reason = FEATURE_DISABLED if self._minimal_off else SOURCE_UNAVAILABLE if rows is None else ""
        return dump_json(view_upstreams(self.port.counters, rows, reason, int(time.time())))

    def get_minimal_all(self) -> str:
        if self._minimal_off:
            return dump_json(view_gated(None, FEATURE_DISABLED, int(time.time())))
        found = self._minimal_now()
        return dump_json(view_minimal_all(found.pool, found.path or [], self.port.settings.general, found.now_s))

    def get_me_writers(self) -> str:
        return self._pool_view(view_me_writers)

    def get_dcs(self) -> str:
        return self._pool_view(view_dcs)

    def _pool_view(self, view: Callable[[PoolSnapshot | None, str, int], JsonObject]) -> str:
        if self._minimal_off:
            return dump_json(view(None, FEATURE_DISABLED, int(time.time())))
        found = self._minimal_now()
        return dump_json(view(found.pool, SOURCE_UNAVAILABLE, found.now_s))

    def get_pool_state(self) -> str:
        return self._pool_block(lambda pool: view_pool_state(pool, self.port.settings.general))

    def get_me_quality(self) -> str:
        return self._pool_block(lambda pool: view_me_quality(pool, self.port.counters.me))

    def _pool_block(self, view: Callable[[PoolSnapshot], JsonObject]) -> str:
        if self._minimal_off:
            return dump_json(view_gated(None, FEATURE_DISABLED, int(time.time())))
        found = self._minimal_now()
        return dump_json(view_gated(view(found.pool) if found.pool else None, SOURCE_UNAVAILABLE, found.now_s))

    def get_upstream_quality(self) -> str:
        rows = None if self._minimal_off else self._upstream_rows()
        reason = FEATURE_DISABLED if self._minimal_off else SOURCE_UNAVAILABLE if rows is None else ""
        return dump_json(view_upstream_quality(self.port.counters, self.port.settings.general, rows, reason, int(time.time())))

    def get_nat_stun(self) -> str:
        nat = self.port.sources.nat if self.port.settings.general.use_middle_proxy else None
        data = self._ask(nat) if nat and not self._minimal_off else None
        return dump_json(view_gated(data, FEATURE_DISABLED if self._minimal_off else SOURCE_UNAVAILABLE, int(time.time())))

    def get_selftest(self) -> str:
        return dump_json(view_gated(None, SOURCE_UNAVAILABLE, int(time.time())))

    def get_gates(self) -> str:
        sources, general = self.port.sources, self.port.settings.general
        if general.use_middle_proxy and sources.route:
            self._route = self._ask(sources.route) or self._route        # no answer in time: what it said last
        return dump_json(view_gates(general, self._route, sources.stage, sources.accepting,
                                    self.port.counters.me.totals["fallback_sessions_total"]))

    def is_ready(self) -> tuple[bool, str]:
        """Fit for clients, and health/ready.  A moment of much work must not take us out of a balancer's rotation."""
        rows = self._upstream_rows(_READY_S) or []
        found = view_ready(self.port.sources.accepting, sum(row["healthy"] for row in rows), len(rows))
        return found["ready"], dump_json(found)

    # -- the edge of the runtime

    def _build_load(self) -> tuple[JsonObject, int] | None:
        settings = self.port.settings
        middle = 0
        if settings.general.use_middle_proxy and self.port.sources.pool:
            pool = self._ask(self.port.sources.pool)
            if pool is None:
                return None
            middle = sum(writer.bound_clients for writer in pool.writers)
        counted, users = settings.general.telemetry.user_enabled, []
        for number, user in enumerate(list(self.port.users.values())):
            octets = user.stats.octets_from_client + user.stats.octets_to_client
            if octets or user.stats.current:
                users.append(UserLoad(user.name, user.stats.current if counted else 0, octets))
            breathe(number)
        data = view_connections(users, middle, self.api.runtime_edge_top_n, counted, self.api.runtime_edge_cache_ttl_ms)
        return data, int(time.time())

    def get_connections(self) -> str:
        if not self.api.runtime_edge_enabled:
            return dump_json(view_gated(None, FEATURE_DISABLED, int(time.time())))
        found, cached = self._load.get()
        if found is not None:
            self._last_load = found
        if self._last_load is None:
            return dump_json(view_gated(None, SOURCE_UNAVAILABLE, int(time.time()), enabled=True))
        data, now_s = self._last_load
        notes = {"served_from_cache": cached or found is None, "stale_cache_used": found is None}
        return dump_json(view_gated(data | {"cache": data["cache"] | notes}, "", now_s))

    def get_events(self, limit: int) -> str:
        data = self.events.view(limit) if self.api.runtime_edge_enabled else None
        return dump_json(view_gated(data, FEATURE_DISABLED, int(time.time())))


def page_answer(head: Head) -> Answer | None:
    """The status page, where a request asks for it; None for any other path."""
    return Answer(200, PAGE_TYPE, [PAGE], PAGE_FIELDS) if path_of(head.target) in PAGE_PATHS else None


class ControlApi:
    """The site of [server.api]: gates, routing, mutations."""

    def __init__(self, port: ControlPort, store: Store) -> None:
        self._port, self._store = port, store
        self._api = port.settings.server.api
        self._guard = Guard(self._api)
        self.desk = Desk(port, store.revision)
        self._numbers = itertools.count(1)

    def admits(self, peer: str) -> bool:
        """Everybody gets an answer; gate 2 says which."""
        return True

    def answer(self, request: Request) -> Answer:
        """Answer one request; never raises."""
        number = next(self._numbers)
        try:
            return self._answer(request)
        except ApiError as error:
            return self._refusal(error, number)
        except Exception:
            self._port.log.error("internal error in %s %s\n%s", request.head.method, ascii(request.head.target)[1:200],
                                 traceback.format_exc())
            return self._refusal(internal_error(), number)

    def refuse(self, error: ApiError, peer: str) -> Answer:
        """Answer bytes that are no request (gate 0)."""
        return self._refusal(error, next(self._numbers))

    def _refusal(self, error: ApiError, number: int) -> Answer:
        fields = (*_FIELDS, _ALLOW) if error.status == 405 else _FIELDS
        source = error.message == "Source IP is not allowed"             # a stranger does not keep a place
        return Answer(error.status, JSON_TYPE, [error_body(error, number)], fields, close=source or error.status == 408)

    def _answer(self, request: Request) -> Answer:
        head = request.head
        self._guard.check_peer(request.peer)
        page = page_answer(head) if self._api.ui and head.method in ("GET", "HEAD") else None
        if page is not None:                   # it has to be able to ask for the key, so it is shown without (api.md 4)
            self._guard.check_host(head)
            return page
        self._guard.check_key(head)
        self._guard.check_host(head)
        self._guard.check_site(head)
        route, name = find_route(head.method, path_of(head.target))
        if route.action:
            return self._change(route, name, request)
        if not route.data:
            return Answer(200, JSON_TYPE, [self.desk.get_openapi().encode()], _FIELDS)
        revision = self._store.revision()
        status = 200
        if route.name == "get_ready":
            ready, data = self.desk.is_ready()
            status = 200 if ready else 503
        elif route.name == "get_user":
            data = self.desk.get_user(name)
        elif route.name == "get_qr":
            data = self.desk.get_qr(name, *wanted_link(head.target))
        elif route.name == "get_events":
            data = self.desk.get_events(events_limit(head.target))
        else:
            data = getattr(self.desk, route.name)()
        return Answer(status, JSON_TYPE, success_body(data, revision), _FIELDS)

    def _change(self, route: Route, name: str, request: Request) -> Answer:
        """Gates 6 to 14, then the view of what is live now."""
        if self._api.read_only:
            raise ApiError(403, "read_only", "API runs in read-only mode")
        wanted = wanted_revision(request.head.values("if-match"))
        body = request.body(self._api.request_body_limit_bytes) if route.body else b""
        kind = f"api.user.{route.action}"
        try:
            command = parse_command(route.action, name, body)
            name = command.username
            outcome = self._store.apply(command, wanted)
        except ApiError as error:
            self._note(f"{kind}.failed", f"username={name} code={error.code}" if name else f"code={error.code}")
            raise
        self._note(f"{kind}.ok", f"username={outcome.username}")
        return Answer(route.status, JSON_TYPE, success_body(self._changed(route, outcome), outcome.revision), _FIELDS)

    def _changed(self, route: Route, outcome: Outcome) -> str:
        """`data` after a mutation."""
        name = outcome.username
        if route.action == "delete":
            return dump_json(name)
        if route.action == "reset_quota":
            return dump_json({"username": name, "used_bytes": 0, "last_reset_epoch_secs": outcome.reset_wall})
        try:
            found = self.desk.get_user(name)
        except ApiError:
            raise internal_error("failed to build updated user view") from None
        return f'{{"user":{found},"secret":{dump_json(outcome.secret)}}}' if route.data == "CreateUserResponse" else found

    def _note(self, kind: str, context: str) -> None:
        if self._api.runtime_edge_enabled:
            self.desk.events.record(kind, context)


class MetricsSite:
    """The site of /metrics and /beobachten."""

    def __init__(self, port: ControlPort) -> None:
        self._port = port
        self._whitelist = Whitelist(port.settings.server.metrics_whitelist)
        self._warned = False

    def admits(self, peer: str) -> bool:
        """Others are closed without a byte."""
        return self._whitelist.admits(peer)

    def refuse(self, error: ApiError, peer: str) -> Answer:
        """Answer bytes that are no request."""
        return Answer(error.status, _TEXT, [f"{error.message}\n".encode()], close=True)

    def answer(self, request: Request) -> Answer:
        """Answer one request; never raises."""
        path = re.split("[?#]", request.head.target, maxsplit=1)[0]
        if request.head.method not in ("GET", "HEAD"):
            return Answer(405, _TEXT, [b"Method Not Allowed\n"], (("Allow", "GET, HEAD"),))
        try:
            if path == "/metrics":
                return Answer(200, METRICS_TYPE, self._metrics())
            if path == "/beobachten":
                return self._beobachten()
        except Exception:
            self._port.log.error("internal error in %s\n%s", path, traceback.format_exc())
            return Answer(500, _TEXT, [b"internal error\n"])
        return Answer(404, _TEXT, [b"Not Found\n"])

    def _metrics(self) -> list[bytes]:
        settings, users = self._port.settings, self._port.users
        facts = Facts(self._port.counters, settings.general.telemetry, settings.general.me_floor_mode,
                      sorted(users.values(), key=lambda user: user.name), settings.access.user_max_unique_ips,
                      time.monotonic() - self._port.started_at, time.monotonic(), self._port.version)
        if len(users) > SERIES_USERS_MAX and not self._warned:
            self._warned = True
            self._port.log.warn("Metrics show the first %d users by name only", SERIES_USERS_MAX)
        found = []
        for piece in render_metrics(facts):
            found.append(piece.encode("utf-8", "replace"))
            time.sleep(0)
        return found

    def _beobachten(self) -> Answer:
        page = self._port.sources.beobachten
        if not self._port.settings.general.beobachten:
            return Answer(200, _TEXT, [b"beobachten disabled\n"])
        try:
            return Answer(200, _TEXT, [(self._port.ask(page, _ASK_S) if page else "empty\n").encode("utf-8", "replace")])
        except TimeoutError:
            return Answer(503, _TEXT, [b"the data plane is busy\n"])


def metrics_addresses(server: ServerSettings) -> list[tuple[str, int]]:
    """Where the metrics are served: as configured, on loopback if only loopback may read them, else everywhere (metrics.md 1)."""
    if server.metrics_listen:
        return [parse_address(server.metrics_listen)]
    if server.metrics_port is None:
        return []
    inside = [network.subnet_of(_LOOPBACK_V4) if isinstance(network, ipaddress.IPv4Network) else network == _LOOPBACK_V6
              for network in map(_plain_network, server.metrics_whitelist)]
    if inside and all(inside):
        return [("127.0.0.1", server.metrics_port), ("::1", server.metrics_port)]
    return [("0.0.0.0", server.metrics_port)]


_LOOPBACK_V4: Final = ipaddress.IPv4Network("127.0.0.0/8")
_LOOPBACK_V6: Final = ipaddress.IPv6Network("::1/128")


def parse_address(text: str) -> tuple[str, int]:
    """(host, port) of IP:PORT, which the settings have checked."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def warn_about(port: ControlPort) -> None:
    """Start-up warnings of api.md 14.3."""
    api = port.settings.server.api
    host, _ = parse_address(api.listen)
    if not api.whitelist and not ipaddress.ip_address(host).is_loopback:
        if not api.auth_header:
            port.log.warn("server.api: whitelist is empty and auth_header is not set: anybody who reaches %s can read and change "
                          "everything", api.listen)
        if api.ui:
            port.log.warn("server.api: whitelist is empty: anybody who reaches %s sees the status page, without data", api.listen)
    with contextlib.suppress(OSError):
        if os.stat(port.config_path).st_mode & 0o022:
            port.log.warn("%s can be changed by group or others: it holds every secret", port.config_path)


def start(port: ControlPort) -> Callable[[bool], None]:
    """Open what the configuration asks for; returns what closes it again, within a second.  Raises ImportError without http.server.

    It is told whether another program goes on at the listening sockets.
    """
    if _NO_HTTP:
        raise ImportError(f"{_NO_HTTP} is missing", name=_NO_HTTP)
    server = port.settings.server
    sys.setswitchinterval(_SWITCH_S)
    listeners: list[Listener] = []
    store: Store | None = None
    where = parse_address(server.api.listen)
    if server.api.enabled and where[1]:
        warn_about(port)
        store = Store(port)
        site = ControlApi(port, store)
        if server.api.runtime_edge_enabled:
            port.sources.on_event = site.desk.events.record
        listeners.append(Listener(where, API_PLACES, site, port.log, "Failed to bind API listener", port))
        listeners[0].start(lambda at: port.log.info("API endpoint: http://%s/v1/*", _at(*at)))
    metrics = MetricsSite(port)
    for address in metrics_addresses(server):
        spare = address[0] == "::1" and not server.metrics_listen        # beside 127.0.0.1, if possible
        listener = Listener(address, METRICS_PLACES, metrics, port.log, "" if spare else f"Failed to bind metrics on {_at(*address)}",
                            port)
        listener.start(lambda at: port.log.info("Metrics endpoint: http://%s/metrics and /beobachten", _at(*at)))
        listeners.append(listener)

    def stop(handed_on: bool) -> None:
        port.sources.on_event = None
        for listener in listeners:
            listener.stop(handed_on)
        if store is not None:
            store.close(_STOP_S)
    return stop


# == 12. top =================================================================
# The status page's figures in a terminal: a client of /v1 over loopback that
# knows nothing that curl cannot get.  Rates are two samples apart, measured
# against the server's own clock where it tells one; an uptime that went back is a
# restart and drops every baseline.  One write per frame, and only if it changed.
# Traps: names may hold anything, so what is not printable never reaches the
# terminal; whatever ends us, the screen, the cursor and the echo come back.
# Source: design/page.md 3, 4, 6, 9.

TOP_WAIT_S: Final = 8.0                  # for an answer
_TOP_BODY_MAX: Final = 64 * 1_048_576    # 100,000 users
_TOP_SLOW_S: Final = 5.0                 # between two looks at what changes slowly, and at users where there are many
_TOP_MANY: Final = 300
_TOP_SPARKS: Final = 60
_TOP_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")
_TOP_COLUMNS: Final = (                  # heading, width, from the right the first to go where it is narrow
    ("CONNS", 7), ("RATE", 9), ("TOTAL", 7), ("ADDRS", 5), ("QUOTA", 5), ("EXPIRES", 10))
_TOP_DROPS: Final = ("EXPIRES", "QUOTA", "ADDRS", "TOTAL")
_TOP_NAME_MIN: Final = 12
_ONCE_HEAD: Final = "conns max_conns ips max_ips octets octets_per_s state expires name"


class TopError(Exception):
    """The API cannot be used; the text says why and what to do."""


class ApiClient:
    """HTTP/1.1 client for our own API: one connection, kept; every answer has a Content-Length (api.md 3)."""

    def __init__(self, host: str, port: int, auth_header: str) -> None:
        self.where = _at(host, port)
        self._address = (host, port)
        self._auth = f"Authorization: {auth_header}\r\n" if auth_header else ""
        self._sock: socket.socket | None = None

    def get(self, path: str) -> tuple[int, JsonObject]:
        """Return (status, envelope).  Raises TopError when there is no answer."""
        for fresh in (False, True):
            try:
                return self._ask(path)
            except (OSError, EOFError, ValueError) as error:
                kept, self._sock = self._sock, None
                if kept is not None:
                    kept.close()
                if fresh or kept is None:      # a kept connection may have been closed meanwhile: once more on a new one
                    why = getattr(error, "strerror", None) or str(error) or "closed"
                    raise TopError(f"no answer from the API at {self.where}: {why}; is the proxy running, and was server.api.enabled "
                                   "true when it was started?") from None
        raise AssertionError

    def _ask(self, path: str) -> tuple[int, JsonObject]:
        if self._sock is None:
            self._sock = socket.socket(socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET)
            self._sock.settimeout(TOP_WAIT_S)
            self._sock.connect(self._address)
        wire = Wire(self._sock)
        wire.write([f"GET /v1{path} HTTP/1.1\r\nHost: {self.where}\r\n{self._auth}\r\n".encode()])
        deadline = time.monotonic() + TOP_WAIT_S
        status = int(wire.line(LINE_MAX, deadline)[9:12])
        size, close = 0, False
        while line := wire.line(LINE_MAX, deadline):
            name, _, value = line.decode("latin-1").partition(":")
            if name.lower() == "content-length":
                size = int(value)
            close |= name.lower() == "connection" and "close" in value
        if size > _TOP_BODY_MAX:
            raise ValueError("answer too large")
        body = json.loads(wire.take(size, deadline))
        if close:
            self._sock.close()
            self._sock = None
        if not isinstance(body, dict):
            raise ValueError("no envelope")
        return status, body


class UserSample(NamedTuple):
    """What is kept of a user between two looks."""

    octets: int
    rates: tuple[float, ...]             # bytes per second, the last three


class Traffic:
    """Octets of all users turned into rates (page.md 3): never a difference of sums, and nothing below zero."""

    def __init__(self) -> None:
        self.users: dict[str, UserSample] = {}
        self.total: float | None = None  # bytes per second over all users; None before the second sample
        self._at = -math.inf             # of the last sample

    def feed(self, octets: Mapping[str, int], at: float) -> None:
        """Take a sample: octets of every user, and the time it was taken."""
        gap = at - self._at
        first = self._at == -math.inf
        if not first and gap <= 0:
            return
        before, self.users, grown = self.users, {}, 0
        for name, count in octets.items():
            old = before.get(name)
            more = 0 if first else max(0, count - (old.octets if old else 0))
            grown += more
            self.users[name] = UserSample(count, () if first else (*(old.rates if old else ()), more / gap)[-3:])
        self.total = None if first else grown / gap
        self._at = at

    def restart(self) -> None:
        """The counters began again: forget the baselines."""
        self.users, self.total, self._at = {}, None, -math.inf

    def rate(self, name: str) -> float | None:
        """Mean of a user's last three rates."""
        sample = self.users.get(name)
        return sum(sample.rates) / len(sample.rates) if sample and sample.rates else None


def user_state(user: JsonObject, now_wall: float) -> str:
    """The word of page.md 5 for a UserInfo; the first that applies."""
    def reached(used: str, limit: str) -> bool:
        return user.get(limit) is not None and user.get(used, 0) >= user[limit]

    until = user.get("expiration_rfc3339")
    if user.get("enabled") is False:
        return "disabled"
    if until and datetime.datetime.fromisoformat(until).timestamp() < now_wall:
        return "expired"
    if 0 in (user.get("max_tcp_conns"), user.get("max_unique_ips"), user.get("data_quota_bytes")):
        return "blocked"
    if reached("quota_used_bytes", "data_quota_bytes"):
        return "quota used up"
    if reached("current_connections", "max_tcp_conns"):
        return "at connection limit"
    if reached("active_unique_ips", "max_unique_ips"):
        return "at address limit"
    return "online" if user.get("current_connections") else "idle"


class Watch:
    """What the API said lately, and what follows from it."""

    def __init__(self, client: ApiClient) -> None:
        self.client = client
        self.traffic = Traffic()
        self.sparks: collections.deque[float] = collections.deque(maxlen=_TOP_SPARKS)
        self.data: dict[str, Any] = {}         # path -> data of the last answer
        self.gone: dict[str, str] = {}         # path -> why it is not asked again
        self.trouble = ""
        self.restarted_wall = 0.0
        self._due: dict[str, float] = {}
        self._uptime = 0.0

    def look(self, now: float) -> None:
        """Ask what is due at monotonic time `now`; what fails leaves the old values and sets `trouble`."""
        self.trouble = ""
        slow = _TOP_SLOW_S if len(self.users) > _TOP_MANY else 0.0
        for path, pause in (("/stats/zero/all", 0.0), ("/runtime/gates", 0.0), ("/users", slow), ("/stats/minimal/all", _TOP_SLOW_S),
                            ("/stats/upstreams", _TOP_SLOW_S)):
            if path in self.gone or now < self._due.get(path, -math.inf):
                continue
            try:
                status, body = self.client.get(path)
            except TopError as error:
                self.trouble = str(error)
                return
            if status == 404:
                self.gone[path] = "not offered by this server"
            elif not body.get("ok"):
                self.trouble = explain_refusal(status, body)
                return
            else:
                self._due[path] = now + pause
                self._take(path, body["data"])

    def _take(self, path: str, data: Any) -> None:
        self.data[path] = data
        if path == "/stats/zero/all":
            uptime = data["core"]["uptime_seconds"]
            if uptime < self._uptime:
                self.traffic.restart()
                self.sparks.clear()
                self.gone.clear()
                self.restarted_wall = time.time()
            self._uptime = uptime
        elif path == "/users":
            self.traffic.feed({user["username"]: user["total_octets"] for user in data}, time.monotonic())
            if self.traffic.total is not None:
                self.sparks.append(self.traffic.total)
        elif isinstance(data, dict) and data.get("reason") == "feature_disabled":
            self.gone[path] = "server.api.minimal_runtime_enabled = true would show this, restart needed"

    @property
    def users(self) -> list[JsonObject]:
        """UserInfo of everybody."""
        return self.data.get("/users") or []

    @property
    def core(self) -> JsonObject:
        """`core` of zero/all."""
        return (self.data.get("/stats/zero/all") or {}).get("core") or {}

    @property
    def now_wall(self) -> float:
        """The server's clock."""
        zero = self.data.get("/stats/zero/all")
        return float(zero["generated_at_epoch_secs"]) if zero else time.time()


def explain_refusal(status: int, body: JsonObject) -> str:
    """An error envelope for a person, with the remedy where there is one."""
    message = str((body.get("error") or {}).get("message") or f"HTTP status {status}")
    if status == 401:
        return f"{message}: server.api.auth_header in this file is not the one in force (it takes effect only after a restart)"
    if status == 403:
        return f"{message}: add 127.0.0.1/32 and ::1/128 to server.api.whitelist"
    return message


# -- the screen, without a terminal

def top_verdict(watch: Watch) -> str:
    """One sentence: does it work?"""
    gates = watch.data.get("/runtime/gates") or {}
    if watch.trouble:
        return watch.trouble
    if not watch.core:
        return "Loading"
    if gates.get("startup_status") == "initializing":
        return f"Starting: {gates['startup_stage']}, {gates['startup_progress_pct']:.0f} %"
    if gates.get("accepting_new_connections") is False:
        return "Not accepting connections"
    if gates.get("reroute_active"):
        since = time.strftime("%H:%M", time.localtime(gates.get("reroute_to_direct_at_epoch_secs", 0)))
        return f"Running direct since {since}, Middle-End not usable: no ad tag"
    return f"Running ({gates.get('route_mode', 'direct')})"


def human_bytes(count: float) -> str:
    """`1.5 MB`, at most 7 characters."""
    unit = 0
    while count >= 999.5 and unit < len(_TOP_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.1f} {_TOP_UNITS[unit]}" if unit and count < 99.95 else f"{count:.0f} {_TOP_UNITS[unit]}"


def human_span(seconds: float) -> str:
    """`3 d 4 h`, `4 h 5 min`, `5 min`, `6 s`."""
    days, hours, minutes = int(seconds // 86400), int(seconds // 3600 % 24), int(seconds // 60 % 60)
    return (f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes
            else f"{int(seconds)} s")


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as block characters, the highest as a full one."""
    shown = list(values)[-width:]
    peak = max(shown, default=0.0)
    return "".join("▁▂▃▄▅▆▇█"[min(7, int(value / peak * 7.999))] if peak else "▁" for value in shown)


def plain_text(text: str) -> str:
    """`text` without anything that could steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def cut(text: str, width: int) -> str:
    """`text` in exactly `width` columns."""
    return text[:max(0, width - 1)] + "~" if len(text) > width else text.ljust(width)


def top_figures(watch: Watch) -> str:
    """The line of totals."""
    if watch.core.get("telemetry_user_enabled") is False:
        return "connections and traffic are not counted (general.telemetry.user_enabled = false)"
    total, users = watch.traffic.total, watch.users
    addresses = {ip for user in users for ip in user.get("active_unique_ips_list", ())}
    return (f"{sum(user['current_connections'] for user in users)} conns  "
            f"{sum(user['current_connections'] > 0 for user in users)}/{len(users)} users  {len(addresses)} addrs  "
            f"{'-' if total is None else human_bytes(total) + '/s'}  {human_bytes(sum(user['total_octets'] for user in users))}")


def top_telegram(watch: Watch) -> str:
    """The line about the ways to Telegram."""
    upstreams, minimal = watch.data.get("/stats/upstreams") or {}, watch.data.get("/stats/minimal/all") or {}
    parts = []
    if "summary" in upstreams:
        summary = upstreams["summary"]
        parts.append(f"upstreams {summary['healthy_total']}/{summary['configured_total']} healthy")
    writers = (minimal.get("data") or {}).get("me_writers") or {}
    if writers.get("middle_proxy_enabled"):
        summary = writers["summary"]
        parts.append(f"ME links {summary['alive_writers']}/{summary['required_writers']}, coverage {summary['coverage_pct']:.0f} %")
    why = watch.gone.get("/stats/upstreams")
    return "  ".join(parts) or (why or "")


TOP_ORDERS: Final[dict[str, tuple[str, Callable[[Watch, JsonObject], float]]]] = {
    "t": ("traffic", lambda watch, user: -(watch.traffic.rate(user["username"]) or 0.0)),
    "c": ("connections", lambda watch, user: -user["current_connections"]),
    "n": ("name", lambda watch, user: 0.0)}


def draw_top(watch: Watch, width: int, height: int, order: str, *, paused: bool, blocks: bool) -> list[str]:
    """Exactly `height` lines of at most `width` columns.  blocks: the terminal shows block characters."""
    columns = list(_TOP_COLUMNS)
    for heading in _TOP_DROPS:
        if sum(size + 1 for _, size in columns) + _TOP_NAME_MIN + 10 <= width:
            break
        columns = [column for column in columns if column[0] != heading]
    room = width - sum(size + 1 for _, size in columns)
    state_width = min(20, max(0, room - _TOP_NAME_MIN - 1) * 2 // 3)
    uptime = human_span(watch.core["uptime_seconds"]) if watch.core else "-"
    lines = [f"{top_verdict(watch)}  up {uptime}{'  PAUSED' if paused else ''}", top_figures(watch)]
    if blocks and watch.sparks:
        spare = width - len(lines[1]) - 2
        lines[1] += "  " + sparkline(watch.sparks, min(spare, _TOP_SPARKS)) if spare > 4 else ""
    restarted = time.time() - watch.restarted_wall < 60
    lines.append("Proxy restarted: counters began again at 0" if restarted else top_telegram(watch))
    name_width = room - state_width - 1
    lines.append(" ".join([cut("NAME", name_width), cut("STATE", state_width), *(heading.rjust(size) for heading, size in columns)]))
    rank = TOP_ORDERS[order][1]
    users = sorted(watch.users, key=lambda user: (rank(watch, user), user["username"]))
    shown = users[:max(0, height - len(lines) - 1)]
    for user in shown:
        cells = top_cells(watch, user)
        lines.append(" ".join([cut(plain_text(user["username"]), name_width), cut(user_state(user, watch.now_wall), state_width),
                               *(cells[heading].rjust(size) for heading, size in columns)]))
    lines += [""] * (height - len(lines) - 1)
    left = len(users) - len(shown)
    lines.append(f"q quit  p {'go on' if paused else 'pause'}  t traffic  c conns  n name{f'  {left} more' if left else ''}")
    return [line[:width].rstrip() for line in lines[:height]]


def top_cells(watch: Watch, user: JsonObject) -> dict[str, str]:
    """Texts of one user by heading."""
    def of(used: str, limit: str) -> str:
        most = user.get(limit)
        return str(user.get(used, 0)) + ("" if most is None else f"/{most}")

    rate, quota, until = watch.traffic.rate(user["username"]), user.get("data_quota_bytes"), user.get("expiration_rfc3339")
    return {"CONNS": of("current_connections", "max_tcp_conns"), "ADDRS": of("active_unique_ips", "max_unique_ips"),
            "RATE": "-" if rate is None else human_bytes(rate) + "/s", "TOTAL": human_bytes(user["total_octets"]),
            "QUOTA": f"{100 * user.get('quota_used_bytes', 0) / quota:.0f} %" if quota else "-" if quota is None else "0",
            "EXPIRES": until[:10] if until else "never"}


def draw_once(watch: Watch) -> list[str]:
    """What a script reads: `#` lines of totals, a head, one line per user with raw integers, `-` for null, the name last."""
    users, total = watch.users, watch.traffic.total
    lines = [f"# {top_verdict(watch)}",
             f"# uptime_s {int(watch.core.get('uptime_seconds', 0))}",
             f"# users {len(users)} online {sum(user['current_connections'] > 0 for user in users)}",
             f"# conns {sum(user['current_connections'] for user in users)}",
             f"# octets {sum(user['total_octets'] for user in users)} octets_per_s {'-' if total is None else round(total)}"]
    telegram = top_telegram(watch)
    if telegram:
        lines.append(f"# {telegram}")
    lines.append(_ONCE_HEAD)
    for user in sorted(users, key=lambda user: str(user["username"])):
        until, rate = user.get("expiration_rfc3339"), watch.traffic.rate(user["username"])
        cells = [user["current_connections"], user.get("max_tcp_conns"), user["active_unique_ips"], user.get("max_unique_ips"),
                 user["total_octets"], None if rate is None else round(rate), user_state(user, watch.now_wall).replace(" ", "-"),
                 until and int(datetime.datetime.fromisoformat(until).timestamp()), plain_text(user["username"])]
        lines.append(" ".join("-" if cell is None else str(cell) for cell in cells))
    return lines


# -- the terminal

class Screen:
    """The terminal while `top` runs; leave() gives back what was there, whatever happened."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._kept: list[Any] | None = None    # terminal attributes; None: no keys here
        self._changed = True

    def enter(self) -> None:
        """Alternate screen, no cursor, keys without echo."""
        with contextlib.suppress(ImportError, OSError):
            import termios
            import tty
            self._kept = termios.tcgetattr(0)
            tty.setcbreak(0)
        os.write(1, b"\x1b[?1049h\x1b[?25l")

    def leave(self) -> None:
        """Everything as it was."""
        with contextlib.suppress(OSError):
            os.write(1, b"\x1b[?25h\x1b[?1049l")
        if self._kept is not None:
            import termios
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)      # in the background it would stop us here
            termios.tcsetattr(0, termios.TCSADRAIN, self._kept)

    def resized(self) -> None:
        """Draw everything next time."""
        self._changed = True

    def show(self, lines: list[str]) -> None:
        """One write, and none if nothing changed."""
        if lines == self._shown and not self._changed:
            return
        self._shown, self._changed = lines, False
        frame = "\x1b[H" + "\r\n".join(line + "\x1b[K" for line in lines) + "\x1b[J"
        data = frame.encode(errors="replace")
        while data:
            data = data[os.write(1, data):]

    def key(self, wait_s: float) -> str:
        """A key that is pressed within `wait_s`, else empty."""
        if self._kept is None:
            time.sleep(wait_s)
            return ""
        ready, _, _ = select.select([0], [], [], wait_s)
        return os.read(0, 1).decode("latin-1") if ready else ""


class TopEnded(Exception):
    """A signal asks us to leave."""


def _end_top(signum: int, _frame: object) -> None:
    raise TopEnded(signum)


def run_top(host: str, port: int, auth_header: str, interval_s: float, once: bool, say: Callable[[str], None]) -> int:
    """Show the API at host:port until `q`, or once as text through `say`; return the exit code.  Raises TopError."""
    watch = Watch(ApiClient(host, port, auth_header))
    watch.look(time.monotonic())
    if watch.trouble:
        raise TopError(watch.trouble)
    if once:
        time.sleep(interval_s)
        watch.look(time.monotonic())
        say("\n".join(draw_once(watch)))
        return 0
    return _run_screen(watch, interval_s)


def _run_screen(watch: Watch, interval_s: float) -> int:
    screen, order, paused = Screen(), "t", False
    blocks = "utf" in (os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG") or "").lower()
    try:
        for signum in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, _end_top)
        signal.signal(signal.SIGWINCH, lambda *_: screen.resized())
        screen.enter()                                         # it may be stopped in there, and told to end
        due = time.monotonic() + interval_s
        while True:
            width, height = os.get_terminal_size(1)
            screen.show(draw_top(watch, width, height, order, paused=paused, blocks=blocks))
            key = screen.key(min(0.2, max(0.0, due - time.monotonic())))
            if key == "q":
                return 0
            paused ^= key == "p"
            order = key if key in TOP_ORDERS else order
            if time.monotonic() >= due:
                due = time.monotonic() + interval_s
                if not paused:
                    watch.look(time.monotonic())
    except KeyboardInterrupt:
        return 130
    except TopEnded as end:
        return 128 + int(end.args[0])
    finally:
        screen.leave()
