"""Who is not let in, and what he sees: nothing, or after a ServerHello what looks like an encrypted alert."""
from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from doubles import APP, CCS, HANGUP, MIB, MLKEM, ROUTES, TAGS, USERS, Client, Rig, build_header, build_hello, poll

VECTORS = Path(__file__).parent.parent / "vectors"
STRANGER = bytes.fromhex("ffeeddccbbaa99887766554433221100")
ALICE = bytes.fromhex(USERS["alice"])
PAST, FUTURE = "2001-01-01T00:00:00Z", "2099-01-01T00:00:00Z"


def refused(client: Client) -> None:
    """Not a byte for the stranger; that he may send no more lets the proxy close without waiting for its deadline."""
    try:
        client.shutdown()
    except (*HANGUP, OSError):
        pass
    client.expect_closed()
    client.close()


def refused_after_handshake(client: Client) -> None:
    """A limit (client-protocol 9): the handshake completes, then the connection closes without an alert."""
    client.start()
    client.expect_closed()
    client.close()


def fake_alert(client: Client) -> None:
    """One record of 19 bytes, then the end (client-protocol D10)."""
    assert client.pull(5) == APP + b"\x00\x13"
    client.pull(19)
    client.expect_closed()
    client.close()


# -- strangers ---------------------------------------------------------------------------------------------------------------------

def test_wrong_secret_plain(rig: Rig) -> None:
    proxy = rig.proxy()
    for mode in ("classic", "secure"):
        client = rig.dial("alice", mode, secret=STRANGER)
        client.push(client.header + os.urandom(40))
        refused(client)
    proxy.settle()
    assert not rig.dc.peers


def test_wrong_secret_in_the_hello(rig: Rig) -> None:
    proxy = rig.proxy()
    client = rig.dial(secret=STRANGER)
    client.push(client.hello)
    refused(client)
    proxy.settle()
    assert not rig.dc.peers


FRAGMENTS = {"nothing": b"", "one-byte": b"G", "three-bytes": b"\x16\x03\x01", "short-hello": b"\x16\x03\x01\x02\x00" + bytes(100),
             "short-header": bytes(range(1, 64)), "garbage": bytes(range(1, 65))}


@pytest.mark.parametrize("raw", FRAGMENTS.values(), ids=FRAGMENTS)
def test_silence_until_the_deadline(rig: Rig, raw: bytes) -> None:
    """client-protocol 4.1 and 11.1: whoever is no client gets nothing, and is cut off when the handshake time is over."""
    proxy = rig.proxy({"timeouts": {"client_handshake": 1}})
    client = rig.dial()
    begin = time.monotonic()
    client.push(raw)
    client.expect_closed(timeout=4)
    assert time.monotonic() - begin < 9    # not the 10 s that the journeys have otherwise
    client.close()
    proxy.settle()
    client = rig.dial()                         # a good client that is too slow fares the same
    client.push(client.hello)
    client.read_flight()
    client.expect_closed(timeout=4)


@pytest.mark.parametrize("probe", [b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n", b"POST /x HTTP/1.1\r\n\r\n", b"HEAD / HTTP/1.0\r\n\r\n",
                                   b"OPTIONS * HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"CONNECT a:443 HTTP/1.1\r\n\r\n",
                                   b"SSH-2.0-OpenSSH_9.9\r\n"], ids=lambda probe: probe[:7].decode().split()[0])
@pytest.mark.parametrize("plain", [True, False], ids=["all-modes", "tls-only"])
def test_probes_of_other_protocols(rig: Rig, probe: bytes, plain: bool) -> None:
    proxy = rig.proxy({"general": {"modes": {"classic": plain, "secure": plain}}})
    client = rig.dial()
    client.push(probe)
    refused(client)
    proxy.settle()


@pytest.mark.parametrize("start", ["ef", "eeeeeeee", "dddddddd", "48454144", "504f5354", "47455420", "4f505449", "50415443", "434f4e4e",
                                   "54524143", "50524920", "5353482d", "44454c45", "0102030400000000"])
def test_reserved_prefix(rig: Rig, start: str) -> None:
    """D11: refused in a plain header that is right otherwise, and looked at nowhere else."""
    proxy = rig.proxy()
    for mode, tag in (("classic", "intermediate"), ("secure", "padded")):
        client = rig.dial("alice", mode, header=build_header(ALICE, TAGS[tag], 2, bytes.fromhex(start)))
        client.push(client.header)
        refused(client)
    proxy.settle()
    assert not rig.dc.peers
    rig.client(header=build_header(ALICE, TAGS["padded"], 2, bytes.fromhex(start))).req_pq()


# -- hellos ------------------------------------------------------------------------------------------------------------------------

HELLOS: dict[str, tuple[dict[str, Any], bool]] = {          # shape of the hello -> welcome?
    "512": ({"length": 512}, True),
    "16384": ({"length": 16384}, True),
    "16385": ({"length": 16385}, False),
    "session-id-0": ({"session": 0}, True),
    "session-id-33": ({"session": 33}, False),
    "no-sni": ({"sni": ""}, True),
    "other-sni": ({"sni": "www.example.org"}, True),
    "x25519-and-mlkem": ({"shares": (MLKEM, 29)}, True),
    "mlkem-only": ({"shares": (MLKEM,)}, False),
    "no-share": ({"shares": ()}, False),
    "clock-585-behind": ({"clock": -585}, True),
    "clock-615-behind": ({"clock": -615}, False),
    "clock-1185-ahead": ({"clock": 1185}, True),
    "clock-1215-ahead": ({"clock": 1215}, False),
    "boot-clock": ({"at": 4711}, True),
    "boot-clock-1000-days": ({"at": 86_400_000}, False),
    "year-2000": ({"at": 946_684_800}, False),
}


BY_CLOCK = [case for case, (shape, _) in HELLOS.items() if {"clock", "at"} & set(shape)]


@pytest.mark.parametrize(("case", "ignore"), [*((case, False) for case in HELLOS), *((case, True) for case in BY_CLOCK)])
def test_hello(rig: Rig, case: str, ignore: bool) -> None:
    """`ignore`: with access.ignore_time_skew, for the cases that are about the clock."""
    shape, welcome = HELLOS[case]
    proxy = rig.proxy({"access": {"ignore_time_skew": ignore}})
    client = rig.dial("bob", **shape)
    if welcome or ignore:
        client.start().req_pq()
        return
    client.push(client.hello)
    refused(client)
    proxy.settle()
    assert not rig.dc.peers and not proxy.log("TLS handshake successful")


def test_hello_of_511_bytes(rig: Rig) -> None:
    """Refused by its length alone, before the rest is there."""
    rig.proxy()
    client = rig.dial(hello=b"\x16\x03\x01\x01\xff" + build_hello(ALICE)[5:-1])
    client.push(client.hello[:5])
    refused(client)


@pytest.mark.parametrize("where", [0, 5, 11, 38, 43, 44, 200, 516])
def test_hello_with_one_bit_wrong(rig: Rig, where: int) -> None:
    rig.proxy()
    client = rig.dial()
    damaged = bytearray(client.hello)
    damaged[where] ^= 0x40
    client.push(bytes(damaged))
    refused(client)


# -- replays -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", [{}, {"at": 4711}, {"clock": -9000}], ids=["clock", "boot-clock", "ignored-clock"])
def test_replayed_hello(rig: Rig, how: dict[str, Any]) -> None:
    proxy = rig.proxy({"access": {"ignore_time_skew": "clock" in how}})
    first = rig.client(**how)
    first.req_pq()
    for _ in range(2):
        again = rig.dial(hello=first.hello)
        again.push(again.hello)
        refused(again)
    proxy.wait_log(r"WARN .*TLS replay attack detected \(duplicate digest\)", count=2)
    first.req_pq()                              # the first one is not disturbed


@pytest.mark.parametrize("mode", ["classic", "secure"])
def test_replayed_header(rig: Rig, mode: str) -> None:
    proxy = rig.proxy()
    first = rig.client("bob", mode)
    first.req_pq()
    again = rig.dial("bob", mode, header=first.header)
    again.push(again.header)
    refused(again)
    proxy.wait_log("WARN .*MTProto replay attack detected")
    assert len(rig.dc.peers) == 1


def test_replayed_header_inside_a_new_hello(rig: Rig) -> None:
    proxy = rig.proxy()
    first = rig.client()
    first.req_pq()
    fake_alert(rig.client(header=first.header))
    proxy.wait_log("WARN .*MTProto replay attack detected")


def test_replay_check_can_be_switched_off(rig: Rig) -> None:
    rig.proxy({"access": {"replay_check_len": 0}})
    first = rig.client()
    first.req_pq()
    rig.client(hello=first.hello, header=first.header).req_pq()


# -- inside a good hello -----------------------------------------------------------------------------------------------------------

INSIDE = {
    "garbage": CCS + APP + b"\x00\x40" + b"\x55" * 64,
    "garbage-in-two-records": CCS + (APP + b"\x00\x20" + b"\x55" * 32) * 2,
    "handshake-record": b"\x16\x03\x03\x00\x04\x01\x00\x00\x00",
    "unknown-type": b"\x99\x03\x03\x00\x01\x00",
    "bad-version": b"\x17\x03\x04\x00\x01\x00",
    "too-long": b"\x17\x03\x03\x41\x01",
    "ccs-of-two-bytes": b"\x14\x03\x03\x00\x02\x01\x01",
}


@pytest.mark.parametrize("case", INSIDE)
def test_bad_bytes_after_the_server_hello(rig: Rig, case: str) -> None:
    proxy = rig.proxy()
    client = rig.dial()
    client.push(client.hello)
    client.read_flight()
    client.push(INSIDE[case])
    fake_alert(client)
    proxy.settle()
    assert not rig.dc.peers


def test_header_of_another_user_inside(rig: Rig) -> None:
    """D12: only the user who signed the hello is asked."""
    rig.proxy()
    client = rig.dial("alice")
    client.header = build_header(bytes.fromhex(USERS["bob"]), TAGS["padded"], 2)
    client.start()
    fake_alert(client)


@pytest.mark.parametrize("last", [b"", b"\x15\x03\x03\x00\x02\x02\x28", CCS], ids=["nothing", "alert", "ccs"])
def test_client_gives_up_after_the_server_hello(rig: Rig, last: bytes) -> None:
    """EOF is no bad header: just the end, without an alert."""
    proxy = rig.proxy()
    client = rig.dial()
    client.push(client.hello)
    client.read_flight()
    client.push(last)
    refused(client)
    proxy.settle()


# -- modes -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("modes", ["classic", "secure", "tls", "classic+secure", "classic+tls", "secure+tls", "classic+secure+tls"])
def test_modes_are_strict(rig: Rig, modes: str) -> None:
    """D8: classic admits plain ef and ee, secure plain dd, tls every tag inside FakeTLS; no mode stands in for another."""
    proxy = rig.proxy({"general": {"modes": {mode: mode in modes.split("+") for mode in ("classic", "secure", "tls")}}})
    for mode, transport in ROUTES:
        client = rig.dial("alice", mode, transport)
        if mode in modes.split("+"):
            client.start().req_pq()
        else:
            client.push(client.hello or client.header)
            refused(client)
    admitted = [route for route in ROUTES if route[0] in modes.split("+")]
    assert sorted(peer.transport for peer in rig.dc.peers) == sorted(transport for _, transport in admitted)
    proxy.wait_log("MTProto handshake successful", count=len(admitted))
    rig.close_clients()
    proxy.settle()
    assert len(proxy.log("MTProto handshake successful")) == len(admitted)


@pytest.mark.parametrize("modes", ["all", "tls", "secure+tls", "classic+tls"])
def test_header_vectors(rig: Rig, modes: str) -> None:
    """Every client header of vectors/obfuscated2.json under its modes."""
    cases = json.loads((VECTORS / "obfuscated2.json").read_text(encoding="utf-8"))["cases"]
    wanted = set(modes.split("+")) if modes != "all" else {"classic", "secure", "tls"}
    rig.proxy({"general": {"modes": {mode: mode in wanted for mode in ("classic", "secure", "tls")}},
               "dc_overrides": {str(index): [rig.dc.address] for index in (0, 10003, -10003, 10001, -10001)}})
    chosen = [case for case in cases if case["direction"] == "client_to_proxy" and {m for m, on in case["modes"].items() if on} == wanted]
    assert chosen
    for case in chosen:
        mode = "tls" if case["transport"] == "tls" else "classic"
        client = rig.dial(case.get("user") or "alice", mode, header=bytes.fromhex(case["header"]))
        if client.mode == "tls":
            client.push(client.hello)
            client.read_flight()
        client.push(client.wrap(client.header))
        if case["expect"] == "accept":
            peer = rig.dc.take()
            assert (peer.dc, TAGS[peer.transport].hex()) == (case["dc"], case["tag"]), case["name"]
        elif client.mode == "tls":
            fake_alert(client)
        else:
            refused(client)


# -- users and limits --------------------------------------------------------------------------------------------------------------

LIMITS: dict[str, tuple[dict[str, Any], str]] = {
    "expired": ({"user_expirations": {"alice": PAST, "bob": FUTURE}}, "User alice expired"),
    "disabled": ({"user_enabled": {"alice": False, "bob": True}}, "User alice disabled"),
    "no-connections": ({"user_max_tcp_conns": {"alice": 0}}, "User alice exceeded connection limit"),
    "no-addresses": ({"user_max_unique_ips": {"alice": 0}}, "User alice exceeded connection limit"),
    "no-quota": ({"user_data_quota": {"alice": 0}}, "User alice exceeded data quota"),
}


@pytest.mark.parametrize("case", LIMITS)
def test_limit_that_refuses_always(rig: Rig, case: str) -> None:
    access, text = LIMITS[case]
    proxy = rig.proxy({"access": access})
    for mode in ("classic", "secure", "tls"):
        refused_after_handshake(rig.dial("alice", mode))
    proxy.wait_log(f"WARN .*User limit exceeded.*{text}", count=3)
    assert not rig.dc.peers
    rig.client("bob").req_pq()


def admitted_again(rig: Rig, **options: Any) -> Client:
    """A place becomes free some moment after its holder has left."""
    def attempt() -> Client | None:
        client = rig.client(**options)
        try:
            client.req_pq()
        except (EOFError, *HANGUP):
            client.close()
            return None
        return client
    found = poll(attempt, "a free place")
    assert found
    return found


@pytest.mark.parametrize("mode", ["classic", "tls"])
def test_connection_limit(rig: Rig, mode: str) -> None:
    rig.proxy({"access": {"user_max_tcp_conns": {"alice": 2}}})
    first, second = (rig.client("alice", mode) for _ in range(2))
    first.req_pq(), second.req_pq()
    for _ in range(3):
        refused_after_handshake(rig.dial("alice", mode))
    rig.client("bob", mode).req_pq()
    first.close()
    third = admitted_again(rig, user="alice", mode=mode)
    refused_after_handshake(rig.dial("alice", mode))
    second.reset()
    admitted_again(rig, user="alice", mode=mode)
    third.req_pq()


def test_connection_limit_counts_from_admission(rig: Rig) -> None:
    """D9, D17: a session that still dials its data centre holds its place, and gives it back when it fails."""
    hole = rig.black_hole()
    proxy = rig.proxy({"access": {"user_max_tcp_conns": {"alice": 1}}, "dc_overrides": {"3": [hole.address]}, "timeouts": {"tg_connect": 1},
                       "general": {"upstream_connect_retry_attempts": 1}})
    dialling = rig.client(dc=3)
    proxy.wait_log(r"Connecting to Telegram DC .*\bdc=3\b")
    refused_after_handshake(rig.dial())
    dialling.expect_closed()
    admitted_again(rig)


def test_unique_address_limit(rig: Rig) -> None:
    proxy = rig.proxy({"access": {"user_max_unique_ips": {"alice": 1}}})
    one, two = (rig.client(source="127.0.0.2") for _ in range(2))
    one.req_pq(), two.req_pq()                              # two sessions of one address count once
    refused_after_handshake(rig.dial(source="127.0.0.3"))
    proxy.wait_log(r"WARN .*IP limit exceeded .*IP limit reached for user 'alice': 1/1 unique IPs already connected")
    rig.client("bob", source="127.0.0.3").req_pq()          # another user is another account
    one.close()
    poll(lambda: proxy.fds()["tcp"] == 4, "the end of the first session")
    refused_after_handshake(rig.dial(source="127.0.0.3"))   # its address is still in use
    two.close()
    admitted_again(rig, source="127.0.0.3")
    refused_after_handshake(rig.dial(source="127.0.0.2"))


def test_refused_session_leaves_its_address_alone(rig: Rig) -> None:
    """D18: neither added nor taken away by a session that another limit refuses."""
    proxy = rig.proxy({"access": {"user_max_unique_ips": {"alice": 1}, "user_max_tcp_conns": {"alice": 1}}})
    one = rig.client(source="127.0.0.2")
    one.req_pq()
    refused_after_handshake(rig.dial(source="127.0.0.2"))
    refused_after_handshake(rig.dial(source="127.0.0.3"))
    one.close()
    poll(lambda: proxy.fds()["tcp"] == 0, "the end of the first session")
    admitted_again(rig, source="127.0.0.3")


@pytest.mark.parametrize("mode", ["classic", "tls"])
@pytest.mark.parametrize("way", ["down", "up"])
def test_quota_ends_the_session(rig: Rig, mode: str, way: str) -> None:
    quota = 2 * MIB
    proxy = rig.proxy({"access": {"user_data_quota": {"alice": quota}}})
    client, other = rig.client("alice", mode), rig.client("alice", mode)
    other.req_pq()
    client.order("send" if way == "down" else "recv", 64 * MIB)
    with pytest.raises((EOFError, *HANGUP)):
        if way == "down":
            client.recv_digest(64 * MIB)
        else:
            client.send_pattern(1, 64 * MIB)
            client.recv(1)
    moved = client.got_bytes if way == "down" else rig.dc.peers[0].got_bytes
    assert moved < quota + MIB, "more than one chunk above the quota"           # D8; unsent bytes may be lost
    proxy.wait_log("WARN .*User data quota reached, closing relay")
    with pytest.raises((EOFError, *HANGUP)):                                    # the other session follows with its next bytes
        for _ in range(3):
            other.echo()
    refused_after_handshake(rig.dial("alice", mode))
    proxy.wait_log("User alice exceeded data quota")
    rig.client("bob", mode).download(4 * MIB)
