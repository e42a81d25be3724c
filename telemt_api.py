"""telemt_api.py - what operators see and steer: the Control API `/v1` and the metrics of telemt.py.

telemt.py imports this file when the configuration enables the API or the metrics; without it the proxy runs on.  It works
in its own threads.  They read plain integers of the data plane and ask its loop for everything else (`ControlPort`), so
that no HTTP client, slow or hostile, holds up a session.  telemt.py runs as `__main__`: to import it here would load it a
second time, so its names appear in annotations only.

   1  envelope    pure  <- -               answers: ApiError, JSON out and in, revision and If-Match
"""
from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Final

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
