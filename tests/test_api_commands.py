"""Room 4 of telemt_api: what a mutating request wants; every check has its text (api.md 6, 8, 11)."""
from __future__ import annotations

import datetime
import json

import pytest

import telemt
from telemt_api import ApiError, Command, Value, format_moment, parse_command

SECRET = "00112233445566778899aabbccddeeff"
INVALID = "Invalid JSON body"
NAME = "username must match [A-Za-z0-9_.-] and be 1..64 chars"
MOMENT = "expiration_rfc3339 must be valid RFC3339"
RANGE = "must be within [0, 9223372036854775807]"


def refusal(action: str, body: bytes) -> tuple[int, str, str]:
    with pytest.raises(ApiError) as caught:
        parse_command(action, "alice" if action != "create" else "", body)
    return caught.value.status, caught.value.code, caught.value.message


def body_of(**members: object) -> bytes:
    return json.dumps(members).encode()


def test_create_takes_every_optional() -> None:
    body = body_of(username="alice", secret=SECRET, user_ad_tag="A" * 32, max_tcp_conns=40, expiration_rfc3339="2027-01-01T02:59:59+03:00",
                   data_quota_bytes=0, max_unique_ips=3, enabled=False, unknown=[1])
    assert parse_command("create", "", body) == Command("create", "alice", SECRET, {
        "user_ad_tags": "A" * 32, "user_expirations": "2026-12-31T23:59:59Z", "user_max_tcp_conns": 40, "user_data_quota": 0,
        "user_max_unique_ips": 3, "user_enabled": False})


def test_create_reads_null_as_absent() -> None:
    body = body_of(username="alice", secret=None, max_tcp_conns=None, user_ad_tag=None, enabled=None, expiration_rfc3339=None)
    assert parse_command("create", "", body) == Command("create", "alice", None, {})
    assert parse_command("create", "", body_of(username="alice", enabled=True)) == Command("create", "alice", None, {})


def test_patch_removes_with_null_and_ignores_a_name() -> None:
    body = body_of(username=7, secret=None, max_tcp_conns=None, data_quota_bytes=5, user_ad_tag=None, enabled=True, expiration_rfc3339=None)
    assert parse_command("patch", "alice", body) == Command("patch", "alice", None, {
        "user_max_tcp_conns": None, "user_data_quota": 5, "user_ad_tags": None, "user_enabled": None, "user_expirations": None})
    assert parse_command("patch", "alice", b"{}") == Command("patch", "alice")
    assert parse_command("patch", "alice", body_of(secret=SECRET.upper())) == Command("patch", "alice", SECRET.upper())


@pytest.mark.parametrize("body", [b"", b"{}", b'{"secret":null}', b'{"max_tcp_conns":"ignored"}'])
def test_rotate_draws_a_secret_unless_one_is_given(body: bytes) -> None:
    assert parse_command("rotate_secret", "alice", body) == Command("rotate_secret", "alice")


def test_rotate_takes_a_secret() -> None:
    assert parse_command("rotate_secret", "alice", body_of(secret=SECRET)) == Command("rotate_secret", "alice", SECRET)


@pytest.mark.parametrize(("action", "entries"), [("enable", {"user_enabled": None}), ("disable", {"user_enabled": False}), ("delete", {}),
                                                 ("reset_quota", {})])
def test_bodies_of_other_actions_are_thrown_away(action: str, entries: dict[str, Value | None]) -> None:
    assert parse_command(action, "alice", b"\xff no json") == Command(action, "alice", None, entries)


@pytest.mark.parametrize(("action", "body", "message"), [
    ("create", b"", INVALID), ("create", b"[]", INVALID), ("create", b"{}", INVALID), ("create", body_of(username=None), INVALID),
    ("create", body_of(username=5), INVALID), ("create", body_of(username="a", secret=5), INVALID), ("rotate_secret", b" ", INVALID),
    ("rotate_secret", b"[]", INVALID), ("patch", b"", INVALID),
    *[("patch", f'{{"max_tcp_conns":{value}}}'.encode(), INVALID) for value in ("5.0", "1e3", "-1", "-0", '"5"', "true", "[]")],
    *[("patch", f'{{"enabled":{value}}}'.encode(), INVALID) for value in ("0", "1", '"true"', "[]")],
    ("patch", body_of(expiration_rfc3339=5), INVALID),
    *[("create", body_of(username=name), NAME) for name in ("", ".", "..", "a b", "ä", "a/b", "a\n", "x" * 65)],
    ("create", body_of(username="a", secret="0" * 31), "secret must be exactly 32 hex characters"),
    ("create", body_of(username="a", secret="dd" + "0" * 32), "secret must be exactly 32 hex characters"),
    ("patch", body_of(secret="٠" * 32), "secret must be exactly 32 hex characters"),
    ("rotate_secret", body_of(secret=""), "secret must be exactly 32 hex characters"),
    ("patch", body_of(user_ad_tag="g" * 32), "user_ad_tag must be exactly 32 hex characters"),
    ("patch", body_of(expiration_rfc3339="tomorrow"), MOMENT),
    *[("patch", f'{{"{name}":{1 << 63}}}'.encode(), f"{name} {RANGE}") for name in ("max_tcp_conns", "data_quota_bytes", "max_unique_ips")],
])
def test_every_refusal(action: str, body: bytes, message: str) -> None:
    assert refusal(action, body) == (400, "bad_request", message)


def test_checks_come_in_the_order_of_the_contract() -> None:
    wrong: dict[str, object] = {"username": "a b", "secret": "x", "user_ad_tag": "x", "expiration_rfc3339": "x",
                                "data_quota_bytes": 1 << 63}
    for name, message in [("username", NAME), ("secret", "secret must"), ("user_ad_tag", "user_ad_tag must"),
                          ("expiration_rfc3339", MOMENT), ("data_quota_bytes", "data_quota_bytes must")]:
        assert refusal("create", body_of(**wrong))[2].startswith(message)
        wrong[name] = "alice" if name == "username" else None
    wrong = {"username": "a b", "enabled": 5}
    assert refusal("create", body_of(**wrong))[2] == INVALID      # a wrong type is bad JSON, whatever else is wrong


def test_the_largest_limit_is_what_toml_can_hold() -> None:
    assert parse_command("patch", "a", body_of(data_quota_bytes=(1 << 63) - 1)).entries == {"user_data_quota": (1 << 63) - 1}


@pytest.mark.parametrize(("text", "stored"), [
    ("2026-12-31T23:59:59Z", "2026-12-31T23:59:59Z"), ("2026-12-31t23:59:59z", "2026-12-31T23:59:59Z"),
    ("2026-12-31 23:59:59+00:00", "2026-12-31T23:59:59Z"), ("2027-01-01T02:59:59+03:00", "2026-12-31T23:59:59Z"),
    ("2026-12-31T20:29:59-03:30", "2026-12-31T23:59:59Z"), ("2026-12-31T23:59:59.5Z", "2026-12-31T23:59:59.5Z"),
    ("2026-12-31T23:59:59.123456789Z", "2026-12-31T23:59:59.123456Z"), ("2026-12-31T23:59:59.000Z", "2026-12-31T23:59:59Z"),
    ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00Z"), ("1999-02-28T00:00:00Z", "1999-02-28T00:00:00Z"),
    ("2024-02-29T00:00:00Z", "2024-02-29T00:00:00Z"), ("0001-01-01T00:00:00Z", "0001-01-01T00:00:00Z")])
def test_moments_are_stored_in_utc(text: str, stored: str) -> None:
    assert format_moment(text) == stored
    moment = telemt.parse_expiration(stored)
    assert moment is not None and moment == telemt.parse_expiration(text)


@pytest.mark.parametrize("text", [
    "", "2026-12-31", "2026-12-31T23:59:59", "2026-12-31T23:59Z", "2026-13-01T00:00:00Z", "2026-02-29T00:00:00Z", "2026-12-31T24:00:00Z",
    "2026-12-31T23:60:00Z", "2026-12-31T23:59:61Z", "2026-12-31T23:59:59+24:00", "2026-12-31T23:59:59+00:60", "2026-12-31T23:59:59+0000",
    "2026-12-31T23:59:59 Z", " 2026-12-31T23:59:59Z", "2026-12-31T23:59:59Z\n", "26-12-31T23:59:59Z", "2026-12-31T23:59:59.Z",
    "2026-12-31T23:59:59UTC", "9999-12-31T23:59:59-01:00", "0001-01-01T00:00:00+01:00", "0000-01-01T00:00:00Z", "２026-12-31T23:59:59Z",
    "2026-12-31T23:59:59\u22120100"])
def test_other_moments_are_refused(text: str) -> None:
    with pytest.raises(ApiError, match="RFC3339"):
        format_moment(text)


def test_a_stored_moment_has_the_microseconds_of_the_request() -> None:
    moment = telemt.parse_expiration(format_moment("2030-01-02T03:04:05.000007+01:00"))
    assert moment == datetime.datetime(2030, 1, 2, 2, 4, 5, 7, tzinfo=datetime.UTC)
