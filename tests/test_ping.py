"""Room 25: links in every form, and what an answer means; the program itself is in journeys/test_ping_command.py."""
from __future__ import annotations

import base64
import contextlib
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from telemt import (ConfigError, Pong, ProxyLink, Transport, draw_pong, explain_stranger, flight_size, make_client_preamble,
                    parse_client_preamble, parse_link_secret, parse_proxy_link, percent_decode, pick_backend, req_pq)

SECRET = bytes(range(16))
BACKEND = pick_backend()


@pytest.mark.parametrize("start", ["tg://proxy?", "tg:proxy?", "https://t.me/proxy?", "http://telegram.me/proxy?", "https://www.t.me/proxy/?"])
def test_every_start_of_a_link(start: str) -> None:
    link = parse_proxy_link(f" {start}server=example.org.&amp;port=443&secret=ee{SECRET.hex()}612e6263#x\n")
    assert link == ProxyLink("example.org", 443, SECRET, "ee", "a.bc")


def test_ipv6_and_its_brackets() -> None:
    link = parse_proxy_link(f"tg://proxy?server=%5B2001:db8::1%5D&port=1&secret={SECRET.hex()}")
    assert (link.host, link.where, link.mode) == ("2001:db8::1", "[2001:db8::1]:1", "classic")


@pytest.mark.parametrize(("text", "wrong"), [
    ("", "not a proxy link"), ("tg://socks?server=a", "not a proxy link"), ("tg://proxy?port=1&secret=a", "no server="),
    ("tg://proxy?server=a&secret=a", "no port="), ("tg://proxy?server=a&port=0&secret=a", "port=0"),
    (f"tg://proxy?server=a&port={'9' * 5000}&secret=a", "port=99999999999999999999 in"),       # found by the fuzzer: int() has a limit
    ("tg://proxy?server=a&port=٣&secret=a", "port=٣"), (f"tg://proxy?server=a&port=1&secret={'a' * 31}", "secret="),
    (f"tg://proxy?server=a&port=1&secret=ff{'a' * 32}", "secret="), (f"tg://proxy?server=a&port=1&secret=ee{'a' * 32}00ff", "host name"),
    (f"tg://proxy?server=a&port=1&secret={'!' * 24}", "secret="),
])
def test_what_is_wrong_with_a_link_is_said_without_the_secret(text: str, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong) as caught:
        parse_proxy_link(text)
    assert "a" * 16 not in str(caught.value)


@given(st.binary(min_size=16, max_size=16), st.sampled_from(["classic", "dd", "ee"]), st.sampled_from(["hex", "HEX", "b64", "b64url"]))
def test_secrets_in_every_form_mean_the_same(secret: bytes, mode: str, form: str) -> None:
    raw = {"classic": secret, "dd": b"\xdd" + secret, "ee": b"\xee" + secret + b"a.example"}[mode]
    text = {"hex": raw.hex(), "HEX": raw.hex().upper(), "b64": base64.b64encode(raw).decode(),
            "b64url": base64.urlsafe_b64encode(raw).decode().rstrip("=")}[form]
    assert parse_link_secret(text) == (secret, mode, "a.example" if mode == "ee" else "")


@given(st.text(max_size=200))
def test_no_text_raises_anything_but_config_errors(text: str) -> None:
    for parse in (parse_proxy_link, lambda tail: parse_proxy_link(f"tg://proxy?server=a&port=1&secret={tail}")):
        with contextlib.suppress(ConfigError):
            parse(text)


def test_percent_decode_keeps_plus() -> None:
    assert percent_decode("a+b%2Bc%zz%C3%A4") == "a+b+c%zzä"


@given(st.sampled_from(Transport), st.integers(-32_768, 32_767))
def test_the_proxy_understands_our_preamble(transport: Transport, dc: int) -> None:
    ours = make_client_preamble(transport, dc, SECRET, BACKEND, os.urandom)
    theirs = parse_client_preamble(ours.block, SECRET, BACKEND)
    assert (theirs.transport, theirs.dc) == (transport, dc)
    assert theirs.from_client.update(ours.to_dc.update(b"question")) == b"question"
    answer = BACKEND.ctr(theirs.to_client_key, theirs.to_client_iv).update(b"answer")
    assert ours.from_dc.update(answer) == b"answer"


def test_flight_sizes() -> None:
    flight = b"\x16\3\3\0\2ab\x14\3\3\0\1\1\x17\3\3\0\3xyz"
    assert flight_size(flight) == len(flight)
    assert all(flight_size(flight[:cut]) in (0, len(flight)) for cut in range(len(flight)))
    assert flight_size(b"HTTP/1.1 400") == -1
    assert flight_size(b"\x16\3\3\0\2ab\x15") == -1


def test_who_answered() -> None:
    assert "SSH" in explain_stranger(b"SSH-2.0-x")
    assert "web server" in explain_stranger(b"HTTP/1.1 400 Bad")
    assert "web server" in explain_stranger(b"\x15\3\1\0\2\2\x28")


def test_the_question_is_a_plain_req_pq_multi() -> None:
    message = req_pq(b"n" * 16, time.time())
    assert len(message) == 40 and message[:8] == bytes(8) and message[20:24] == bytes.fromhex("f18e7ebe") and message[24:] == b"n" * 16
    assert message[8] % 4 == 0


def test_rows() -> None:
    assert draw_pong(Pong(2, "", "", 0.0123, None, 0.1)) == "   2     12 ms         -    100 ms    112 ms"
    assert draw_pong(Pong(-4, "connect", "port closed")) == "  -4         -         -         -    failed\n      at connect: port closed"
