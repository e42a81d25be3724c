"""Room 1 of telemt_api: envelopes, strict JSON, If-Match (api.md 6, 7, 8)."""
from __future__ import annotations

import inspect
import json

import pytest

import telemt
from telemt_api import NEVER, ApiError, ControlPort, check_revision, dump_json, error_body, parse_body, success_body, wanted_revision

REVISION = "c327e5db0d54057026c0c58585abf66c84e3cc4d3de5e073112ff7b7d7332da1"


def test_success_is_one_compact_line() -> None:
    assert b"".join(success_body('{"status":"ok"}', REVISION)) == b'{"ok":true,"data":{"status":"ok"},"revision":"%s"}' % REVISION.encode()


def test_error_has_a_request_id_and_no_revision() -> None:
    assert error_body(ApiError(409, "revision_conflict", "Config revision mismatch"), 17) == (
        b'{"ok":false,"error":{"code":"revision_conflict","message":"Config revision mismatch"},"request_id":17}')


@pytest.mark.parametrize(("value", "text"), [
    (0.0, "0.0"), (100.0, "100.0"), (200 / 3, "66.66666666666667"), (118.4, "118.4"),
    ("ä\u2028", '"ä\u2028"'), ({"a": [1, None]}, '{"a":[1,null]}')])
def test_json_out(value: object, text: str) -> None:
    assert dump_json(value) == text


@pytest.mark.parametrize("text", [
    b"", b" ", b"null", b"[]", b'"x"', b"1", b"{", b"{}x", b"{} {}", b'{"a":1,"a":2}', b'{"b":{"a":1,"a":2}}', b'{"a":NaN}',
    b'{"a":Infinity}', b'{"a":1e400}', b'{"a":-Infinity}', b'{"a":"\\ud800"}', b'{"\\udfff":1}', b'\xef\xbb\xbf{}', b'{"a":"\xff"}',
    b"{'a':1}",
    b'{"a":01}', b'{"a":1,}', b'{"a":"\n"}', b'{"a":' + b"[" * 128 + b"]" * 128 + b"}", b"[" * 100_000,
    b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"a":' + b"9" * 5000 + b"}"])
def test_json_that_is_refused(text: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(text)
    assert (caught.value.status, caught.value.code, caught.value.message) == (400, "bad_request", "Invalid JSON body")


@pytest.mark.parametrize(("text", "value"), [
    (b"{}", {}), (b' \r\n\t{"a": 1}\n', {"a": 1}), (b'{"a":"\\ud83d\\ude00"}', {"a": "\U0001f600"}),
    (b'{"a":null,"b":true}', {"a": None, "b": True}),
    (b'{"a":' + b"[" * 127 + b"]" * 127 + b"}", None),
    (b'{"a":"' + b"[" * 200 + b'"}', {"a": "[" * 200}),
    (b'{"a":"\\"' + b"[" * 200 + b'"}', {"a": '"' + "[" * 200}), (b'{"a":18446744073709551615}', {"a": 2**64 - 1})])
def test_json_that_is_read(text: bytes, value: object) -> None:
    found = parse_body(text)
    assert found == (json.loads(text) if value is None else value)


@pytest.mark.parametrize(("text", "kind"), [(b"5", int), (b"5.0", float), (b"1e3", float), (b"-0", float), (b"0", int), (b"true", bool)])
def test_numbers_keep_their_kind(text: bytes, kind: type) -> None:
    """Only a plain integer may become an integer member: -0, 5.0 and 1e3 are told apart."""
    assert type(parse_body(b'{"a":%s}' % text)["a"]) is kind


@pytest.mark.parametrize(("values", "wanted"), [
    ([], None), ([""], None), ([" \t"], None), (["abc"], "abc"), (['"abc"'], "abc"), (['""abc""'], "abc"), ([' "abc" '], "abc"),
    (['""'], ""), (["*"], "*"), (['W/"abc"'], 'W/"abc'), (["a", "a"], NEVER), (["\xe9"], NEVER), (["\x7f"], NEVER)])
def test_if_match(values: list[str], wanted: str | None) -> None:
    assert wanted_revision(values) == wanted


@pytest.mark.parametrize("value", ['""', "*", f'W/"{REVISION}"', f"{REVISION}, {REVISION}", REVISION.upper(), REVISION[:-1]])
def test_a_precondition_that_does_not_hold(value: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_revision(wanted_revision([value]), REVISION)
    assert (caught.value.status, caught.value.code, caught.value.message) == (409, "revision_conflict", "Config revision mismatch")


@pytest.mark.parametrize("values", [[], [""], [REVISION], [f'"{REVISION}"']])
def test_a_precondition_that_holds(values: list[str]) -> None:
    check_revision(wanted_revision(values), REVISION)


def test_control_has_all_that_the_seam_promises() -> None:
    """Names and parameters; mypy cannot compare them, because neither file imports the other at run time."""
    for name, member in vars(ControlPort).items():
        if name.startswith("_"):
            continue
        mine = inspect.getattr_static(telemt.Control, name)
        assert type(mine) is type(member), name
        if inspect.isfunction(member):
            assert list(inspect.signature(mine).parameters) == list(inspect.signature(member).parameters), name
    made = inspect.getsource(telemt.Control.__init__)
    assert not [name for name in ControlPort.__annotations__ if f"self.{name}" not in made]
