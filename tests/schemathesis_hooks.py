"""Hooks of schemathesis: what JSON Schema cannot say.  To it 5.0 is an integer; to the API only 5 is (api.md 8)."""
from __future__ import annotations

from typing import Any

import schemathesis


def plain(value: Any) -> Any:
    """Integral floats as integers."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Every generated body."""
    return plain(body)
