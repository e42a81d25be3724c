"""Room page: size, policy, what the script may do, contrast, and that it asks only for what the API has."""
from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
from pathlib import Path

import pytest
from telemt_api import PAGE, PAGE_CSS, PAGE_FIELDS, PAGE_HTML, PAGE_JS, PAGE_TYPE, ROUTES, SHAPES

CONTRACT = Path(__file__).parent / "vectors" / "openapi.json"


def test_the_page_is_one_document_below_30000_bytes() -> None:
    assert len(PAGE) < 30_000
    assert PAGE.startswith(b"<!doctype html>") and PAGE_TYPE == "text/html; charset=utf-8"
    assert PAGE.count(b"<script>") == PAGE.count(b"<style>") == 1


def test_the_policy_names_the_hashes_of_the_bytes_that_are_served() -> None:
    policy = dict(PAGE_FIELDS)["Content-Security-Policy"]
    for element, directive in (("script", "script-src"), ("style", "style-src")):
        served = re.search(rf"<{element}>(.*)</{element}>".encode(), PAGE, re.DOTALL)
        assert served
        digest = base64.b64encode(hashlib.sha256(served[1]).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    for rule in ("default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'",
                 "frame-ancestors 'none'", "require-trusted-types-for 'script'", "trusted-types 'none'"):
        assert rule in policy
    assert "unsafe" not in policy and "nonce" not in policy
    assert dict(PAGE_FIELDS) | {"Referrer-Policy": "no-referrer", "Cross-Origin-Opener-Policy": "same-origin", "Cache-Control": "no-store",
                                "Cross-Origin-Resource-Policy": "same-origin", "X-Content-Type-Options": "nosniff"} == dict(PAGE_FIELDS)


def test_the_page_costs_a_start_next_to_nothing() -> None:
    """page.md 10: within 5 ms of a start without it (measured: 0.3 ms).  The import of its room makes constants and two hashes of 30 KB,
    and a request for it makes nothing at all."""
    text = (Path(__file__).parent.parent / "telemt_api.py").read_text(encoding="utf-8")
    room = ast.parse("from __future__ import annotations\n" + text[text.index("# == 10. page"):text.index("# == 11. service")])
    run = [node for node in room.body if not isinstance(node, (ast.FunctionDef, ast.ImportFrom))]
    assert all(isinstance(node, (ast.Assign, ast.AnnAssign)) for node in run)
    assert not [node for part in run for node in ast.walk(part) if isinstance(node, (ast.comprehension, ast.Lambda))]
    calls = [ast.unparse(node.func) for part in run for node in ast.walk(part) if isinstance(node, ast.Call)]
    assert sorted(call.rpartition(".")[2] for call in calls) == ["_page_hash", "_page_hash", "encode", "replace", "replace"]


@pytest.mark.parametrize("word", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "style=",
                                  " onclick=\"", "localStorage", "document.cookie", "javascript:", "setTimeout(\""])
def test_what_must_not_stand_in_the_source(word: str) -> None:
    assert word.encode() not in PAGE


def test_no_inline_handler_and_no_foreign_address() -> None:
    assert not re.search(r"<[^>]+\son\w+=", PAGE_HTML)
    addresses = set(re.findall(rb"(?:https?|wss?):[^\s\"'`)]*", PAGE)) | set(re.findall(rb"(?:src|href|url)[=(][\"']?[^\"'\s>]*", PAGE))
    assert addresses == {b"http://www.w3.org/2000/svg", b'href="data:,'}


def test_every_route_it_asks_exists() -> None:
    known = {route.path for route in ROUTES}
    asked = {path.partition("?")[0] for path in re.findall(r'route\("(/[^"]+)"', PAGE_JS)}
    assert len(asked) == 11
    assert {f"/v1{path}" for path in asked} <= known
    for tail in re.findall(r'(?:post|place)\((?:u,)?"?[`"](/[a-z-]+)', PAGE_JS):
        assert f"/v1/users/{{username}}{tail}" in known, tail


def test_every_field_it_reads_is_in_the_contract() -> None:
    """Words with an underscore are names of members; those of the API stand in a shape or in the OpenAPI document."""
    contract = json.dumps(json.loads(CONTRACT.read_text()))
    shapes = set(re.findall(r"(\w+)\??:", " ".join(SHAPES.values()))) | set(re.findall(r'"(\w+)"', contract))
    words = set(re.findall(r"(?<![\w-])[a-z]+(?:_[a-z0-9]+)+", PAGE_JS))
    own = {"feature_disabled", "revision_conflict", "user_exists", "no_healthy_upstreams", "minimal_runtime", "runtime_edge", "public_host",
           "auth_header", "tls_domains", "telemetry_"}
    words |= {f"telemetry_{kind}_enabled" for kind in ("user", "core")}
    assert words - shapes - own == set()


def _palettes() -> list[dict[str, str]]:
    return [dict(re.findall(r"--(\w+):(#[0-9a-f]{3,6})", block)) for block in re.findall(r":root\{([^}]*)\}", PAGE_CSS)]


def _luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at:at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("paper", ["page", "card"])
@pytest.mark.parametrize("ink", ["ink", "dim", "link", "good", "warn", "bad"])
def test_contrast_of_every_pair_of_colours(theme: int, paper: str, ink: str) -> None:
    palette = _palettes()[theme]
    bright, dark = sorted((_luminance(palette[ink]), _luminance(palette[paper])), reverse=True)
    assert (bright + 0.05) / (dark + 0.05) >= 5.9, (ink, paper)
