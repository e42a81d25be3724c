"""Write docs/api.md from the table of routes and the shapes in telemt_api.py.

usage: api_docs.py [--print]

The prose around the tables stands in this file; a test compares docs/api.md with what this program makes.
"""
from __future__ import annotations

import sys
from pathlib import Path

import telemt_api as api

TARGET = Path(__file__).resolve().parent.parent / "docs" / "api.md"

HEAD = """\
# Control API and metrics

<!-- written by tools/api_docs.py from telemt_api.py: `make docs` -->

The contract is that of telemt 3.2.1; what later versions added is here as far as panels read it.  The same document for machines:
`GET /v1/openapi.json`.

## Switch it on

```toml
[server.api]
enabled = true
listen = "127.0.0.1:9091"          # IP:PORT; port 0 = no listener
whitelist = ["127.0.0.1/32", "::1/128"]
auth_header = ""                   # exact value of the Authorization header; "" = not asked for
read_only = false                  # true: look, don't touch
request_body_limit_bytes = 65536
minimal_runtime_enabled = false    # the views of upstreams and of the middle-end pool
minimal_runtime_cache_ttl_ms = 1000
runtime_edge_enabled = false       # runtime/connections/summary and runtime/events/recent
allowed_hosts = []                 # names that a Host header may have; [] = any

[server]
metrics_port = 9090                # or metrics_listen = "IP:PORT"
metrics_whitelist = ["127.0.0.1/32", "::1/128"]
```

All of these keys are read at start only.  There is no TLS here: stay on loopback, or put a reverse proxy in front.  Whoever may write
through this API reads every secret; `auth_header` keeps other programs of the machine, and web pages in its browsers, out.

## Use it

```console
$ curl -s http://127.0.0.1:9091/v1/health
{"ok":true,"data":{"status":"ok","read_only":false},"revision":"c327e5db0d54057026c0c58585abf66c84e3cc4d3de5e073112ff7b7d7332da1"}
$ curl -s -X POST -d '{"username": "alice", "max_tcp_conns": 40}' http://127.0.0.1:9091/v1/users
$ curl -s -X PATCH -d '{"max_tcp_conns": null}' http://127.0.0.1:9091/v1/users/alice
$ curl -s -X POST http://127.0.0.1:9091/v1/users/alice/rotate-secret
$ curl -s -X DELETE http://127.0.0.1:9091/v1/users/alice
```

A success is `{"ok":true,"data":...,"revision":...}`, an error `{"ok":false,"error":{"code":...,"message":...},"request_id":...}`.
`revision` is the SHA-256 of the configuration file.  Send it back as `If-Match` and a change is refused with 409 if somebody was faster.
A change is checked as a start would check it, written whole, and in force when the answer comes; comments and everything else in the
file stay.  The sessions of a user who was deleted or disabled, or whose secret changed, are closed.

A limit of 0 blocks the user; `null` in PATCH removes the limit.

## Requests

`{username}` is one segment, percent-encoded UTF-8.  Slashes at the end do not matter.  Another method on a fixed path is 404, on
`/v1/users/{username}` 405.
"""

ERRORS = """\
## Errors

| HTTP | code | when |
|---|---|---|
| 400 | `bad_request` | not HTTP, no JSON object, a value that is not allowed, or the configuration would be invalid |
| 401 | `unauthorized` | `auth_header` is set and does not match |
| 403 | `forbidden` | address not in `whitelist`, host not in `allowed_hosts`, or a web page of another site wants to change something |
| 403 | `read_only` | `read_only = true` |
| 404 | `not_found` | no such route, user or link |
| 405 | `method_not_allowed` | only on one user |
| 408, 414, 431 | `request_timeout`, `uri_too_long`, `headers_too_large` | before routing; the connection is closed |
| 501, 505 | `not_implemented`, `http_version_not_supported` | the same |
| 409 | `revision_conflict`, `user_exists`, `last_user_forbidden` | the message says which |
| 413 | `payload_too_large` | more than `request_body_limit_bytes` |
| 500 | `internal_error` | the file cannot be read, understood or written; the message names it |

Limits: 64 connections, 10 s for a head, a body and an answer each, 30 s between requests, 8 KiB request line, 32 KiB and 100 header
fields, 1,000 requests per connection.

## Gated reads

With their key off they answer 200 with `"reason":"feature_disabled"`; without a middle-end pool, or when the data plane does not answer
within half a second, with `"reason":"source_unavailable"`. `/v1/health/ready` gives it three seconds before it says 503.
"""

METRICS = """\
## Metrics

`/metrics` in the text format of Prometheus, `/beobachten` with the addresses that scan or fail handshakes, on a listener of their own:
not in `metrics_whitelist` = closed without a byte.  Counters that `[general.telemetry]` switches off stand still.
"""


def route_table() -> str:
    """All requests."""
    lines = ["| request | body | answer | |", "|---|---|---|---|"]
    for route in api.ROUTES:
        body = "ignored" if route.body == "ignored" else shape_link(route.body) if route.body else ""
        answer = shape_link(route.data) if route.data else "the OpenAPI document"
        status = f"{route.status} " if route.status != 200 else ""
        lines.append(f"| `{route.method} {route.path}` | {body} | {status}{answer} | {route.summary} |")
    return "\n".join(lines) + "\n"


def shape_link(name: str) -> str:
    """A shape's name as a link to its members."""
    inner = name.strip("[]")
    if inner not in api.SHAPES:
        return "the name" if inner == "str" else f"`{inner}`"
    return f"[{inner}](#{inner.lower()}){' list' if name.startswith('[') else ''}"


def shape_sections() -> str:
    """Members of every shape."""
    parts = ["## Shapes\n", "`?` behind a name: left out when there is no value.  `or null`: there, and null.  Numbers without a fraction "
             "are integers >= 0.\n"]
    for name, text in api.SHAPES.items():
        parts.append(f"### {name}\n")
        rows = []
        for member in text.split():
            key, _, kind = member.partition(":")
            rows.append(f"| `{key}` | {kind_text(kind)} |")
        parts.append("| member | type |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


WORDS = {"int": "integer", "signed": "integer, may be negative", "limit": "integer up to 2^63-1", "num": "number",
         "pct": "number, 0.0 to 100.0", "bool": "true or false", "str": "text",
         "time": "RFC 3339, UTC", "moment": "RFC 3339", "link": "tg:// link", "true": "true",
         "false": "false", "zero": "0", "bits": "text of 0 and 1", "Revision": "64 hex digits", "Secret": "32 hex digits",
         "AdTag": "32 hex digits", "Username": "1 to 64 of A-Z a-z 0-9 _ . -"}


def kind_text(kind: str) -> str:
    """A type of the short notation in words."""
    if kind.endswith("~"):
        return kind_text(kind[:-1]) + " or null"
    if kind.startswith("["):
        return "list of " + kind_text(kind[1:-1])
    if kind.startswith("="):
        return f"`{kind[1:]}`"
    if kind in WORDS:
        return WORDS[kind]
    if kind in api.SHAPES:
        return shape_link(kind)
    return ", ".join(f"`{word}`" for word in kind.split("|"))


def metric_table() -> str:
    """All metrics."""
    lines = ["| metric | type | |", "|---|---|---|"]
    lines += [f"| `{metric.name}` | {metric.kind} | {metric.help} |" for metric in api.TABLE]
    lines += [f"| `{name}{{user}}` | {kind} | {text} |" for name, kind, text, _ in api.USER_TABLE]
    lines += [f"| `{name}{{user}}` | gauge | {text} |" for name, text, _, _ in api.USER_IP_TABLE]
    return "\n".join(lines) + "\n"


def render() -> str:
    """The whole document."""
    return "\n".join([HEAD, route_table(), ERRORS, shape_sections(), METRICS, metric_table()])


def main() -> int:
    """Write the document, or print it."""
    if sys.argv[1:] == ["--print"]:
        sys.stdout.write(render())
    else:
        TARGET.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
