"""Room 19: from the first byte to the relay, driven over loopback sockets with a loop whose clock is ours."""
import contextlib
import random
import socket

import pytest

import telemt
from telemt import Reason
from tests.cases import SECRET, FakeCore, client_preamble, load_vector, read_all, signed_hello, tcp_pair

ALL_MODES = "[general.modes]\nclassic = true\nsecure = true\ntls = true\n"


@pytest.fixture
def make_core():
    made = []

    def make(text=ALL_MODES, **more):
        made.append(FakeCore(text, **more))
        return made[-1]

    yield make
    for core in made:
        core.dispose()


def records(data):
    """Payload of application-data records."""
    out, at = b"", 0
    while at < len(data):
        size = int.from_bytes(data[at + 3:at + 5], "big")
        out += data[at + 5:at + 5 + size] if data[at] == 0x17 else b""
        at += 5 + size
    return out


def record(data):
    return b"\x17\x03\x03" + len(data).to_bytes(2, "big") + data


def outcome(core, client):
    """(bytes the client got, closed?, class counted bad or None)."""
    core.loop.settle()
    data, closed = read_all(client)
    bad = [reason for reason, count in core.counters.bad_by_class.items() for _ in range(count)]
    assert len(bad) <= 1 and core.counters.connections_bad_total == len(bad)
    return data, closed, bad[0] if bad else None


@pytest.mark.parametrize("proto", ["abridged", "intermediate", "secure"])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("tls", [True, False])
def test_bytes_reach_the_data_centre_and_come_back(make_core, proto, fast, tls):
    core = make_core(f"[general]\nfast_mode = {str(fast).lower()}\n{ALL_MODES}")
    client = core.connect()
    head, sending, receiving = client_preamble(proto=proto, dc=-3)
    if tls:
        client.sendall(signed_hello())
        core.loop.settle()
        flight, _ = read_all(client)
        assert flight[:3] == b"\x16\x03\x03"
        client.sendall(b"\x14\x03\x03\x00\x01\x01" + record(head + sending.update(b"early")))
    else:
        client.sendall(head + sending.update(b"early"))
    core.loop.settle()
    assert core.upstreams.asked == [(-3, "")]
    dc = core.upstreams.connect()
    core.loop.settle()
    opening, _ = read_all(dc)
    back = opening[55:7:-1]
    at_dc = core.backend.ctr(opening[8:40], opening[40:56])
    plain = at_dc.update(opening)
    assert plain[56:62] == telemt.Transport[proto.upper().replace("SECURE", "PADDED")].value + (-3).to_bytes(2, "little", signed=True)
    assert plain[64:] == b"early"
    dc.sendall(core.backend.ctr(back[:32], back[32:]).update(b"answer" * 2000))
    core.loop.settle()
    data, _ = read_all(client)
    assert receiving.update(records(data) if tls else data) == b"answer" * 2000
    more = sending.update(b"more")
    client.sendall(record(more) if tls else more)
    core.loop.settle()
    assert at_dc.update(read_all(dc)[0]) == b"more"
    user = core.doorman.users.users["alice"]
    assert (user.used, user.stats.connects, user.stats.current) == (12_009, 1, 1)
    client.close()
    dc.close()
    core.loop.settle()
    assert core.finished == 1


VECTOR_CASES = [case for case in load_vector("obfuscated2")["cases"]
                if case["direction"] == "client_to_proxy" and case["transport"] == "plain"]


@pytest.mark.parametrize("case", VECTOR_CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "bytewise"])
def test_plain_vectors(make_core, case, bytewise):
    users = "\n".join(f'{name} = "{secret}"' for name, secret in load_vector("obfuscated2")["header"]["users"].items())
    modes = "\n".join(f"{mode} = {str(on).lower()}" for mode, on in case["modes"].items())
    core = make_core(f"[general.modes]\n{modes}\n[access.users]\n{users}")
    client, header = core.connect(), bytes.fromhex(case["header"])
    for piece in [header[at:at + 1] for at in range(len(header))] if bytewise else [header]:
        if core.owners:
            client.sendall(piece)
            core.loop.settle()
    _, closed, bad = outcome(core, client)
    if case["expect"] == "accept":
        assert not closed and core.upstreams.asked == [(case["dc"], "")]
    elif case["expect"] == "reject":
        assert closed and bad is not None
    else:
        assert not closed and bad is None and core.owners
    client.close()


@pytest.mark.parametrize(("text", "sent", "reason"), [
    (ALL_MODES, b"GET / HTTP/1.1\r\n\r\n", Reason.RESERVED_PREFIX),
    (ALL_MODES, b"SSH-", Reason.RESERVED_PREFIX),
    (ALL_MODES, b"\xef", Reason.RESERVED_PREFIX),
    (ALL_MODES, b"A" * 64, Reason.BAD_HEADER),
    ("", b"A", Reason.PLAIN_DISABLED),
    ("", b"\x16\x04", Reason.PLAIN_DISABLED),
    ("[general.modes]\ntls = false\nsecure = true", b"\x16\x03\x01", Reason.TLS_DISABLED),
    (ALL_MODES, b"\x16\x03\x01\x01\xff", Reason.HELLO_LENGTH),
    (ALL_MODES, b"\x16\x03\x01\x40\x01", Reason.HELLO_LENGTH),
    (ALL_MODES, signed_hello(secret="ab" * 16), Reason.BAD_DIGEST),
    (ALL_MODES, signed_hello(timestamp=1_000_000_000), Reason.CLOCK_SKEW),
    (ALL_MODES, b"\x16\x03\x01\x02\x00" + b"\x01\x00\x01\xfc\x03\x03" + b"r" * 32 + b"\x21" + b"s" * 473, Reason.HELLO_MALFORMED),
])
def test_strangers_get_nothing_and_are_counted_once(make_core, text, sent, reason):
    core = make_core(text)
    client = core.connect()
    client.sendall(sent)
    assert outcome(core, client) == (b"", True, reason)
    client.close()


@pytest.mark.parametrize(("sent", "reason"), [
    (b"\x16", Reason.HELLO_TRUNCATED), (b"\x16\x03\x01\x02\x00abc", Reason.HELLO_TRUNCATED),
    (b"A", Reason.PLAIN_TRUNCATED), (b"A" * 63, Reason.PLAIN_TRUNCATED), (b"", None), (b"\x16\x00ab", Reason.PLAIN_TRUNCATED),
])
def test_end_of_stream_before_a_decision(make_core, sent, reason):
    core = make_core()
    client = core.connect()
    client.sendall(sent)
    client.shutdown(socket.SHUT_WR)
    assert outcome(core, client) == (b"", True, reason)
    failures = core.counters.failures_by_class
    assert failures == ({} if reason else {Reason.EOF: 1})
    client.close()


@pytest.mark.parametrize(("sent", "stage"), [
    (b"", "first_packet_prelude"), (b"A" * 10, "direct_mtproto"), (b"\x16\x03\x01\x02\x00ab", "tls_clienthello_body"),
    (signed_hello(), "tls_post_serverhello_mtproto"),
])
def test_deadline(make_core, sent, stage):
    core = make_core()
    client = core.connect()
    client.sendall(sent)
    core.loop.settle()
    core.loop.turn(29.9)
    assert core.owners
    core.loop.turn(0.2)
    core.loop.settle()
    assert not core.owners and core.counters.failures_by_stage == {stage: 1}
    assert core.counters.handshake_timeouts_total == 1 and core.counters.connections_bad_total == 0
    client.close()


def test_deadline_ends_with_the_header(make_core):
    core = make_core()
    client = core.connect()
    client.sendall(client_preamble()[0])
    core.loop.settle()
    core.loop.turn(100)
    assert core.owners and not core.counters.failures_by_class
    client.close()


def test_reset_is_a_failure_not_a_stranger(make_core):
    core = make_core()
    client = core.connect()
    client.sendall(b"\x16\x03")
    core.loop.settle()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    core.loop.settle()
    assert core.counters.failures_by_class == {Reason.RESET: 1} and not core.counters.bad_by_class


def test_replayed_hello_and_header(make_core):
    core = make_core()
    hello, (head, _, _) = signed_hello(), client_preamble()
    for sent, reason in ((hello, Reason.TLS_REPLAY), (head, Reason.PLAIN_REPLAY)):
        core.counters.bad_by_class.clear()
        core.counters.connections_bad_total = 0
        first, second = core.connect(), core.connect()
        first.sendall(sent)
        core.loop.settle()
        assert not core.counters.bad_by_class
        second.sendall(sent)
        assert outcome(core, second) == (b"", True, reason)
        first.close()
        second.close()


@pytest.mark.parametrize(("inner", "reason"), [
    (record(b"A" * 64), Reason.BAD_INNER), (record(client_preamble(secret="ab" * 16)[0]), Reason.BAD_INNER),
    (b"\x16\x03\x03\x00\x01a", Reason.BAD_INNER), (b"GET / HT", Reason.BAD_INNER),
])
def test_bad_inner_header_gets_an_alert_lookalike(make_core, inner, reason):
    core = make_core()
    client = core.connect()
    client.sendall(signed_hello())
    core.loop.settle()
    read_all(client)
    client.sendall(inner)
    data, closed, bad = outcome(core, client)
    assert (data[:5], len(data), closed, bad) == (b"\x17\x03\x03\x00\x13", 24, True, reason)
    client.close()


def test_inner_header_must_be_of_the_user_who_signed_the_hello(make_core):
    other = "f0e1d2c3b4a5968778695a4b3c2d1e0f"
    core = make_core(f'{ALL_MODES}[access.users]\nalice = "{SECRET}"\nbob = "{other}"')
    client = core.connect()
    client.sendall(signed_hello(secret=SECRET))
    core.loop.settle()
    read_all(client)
    client.sendall(record(client_preamble(secret=other)[0]))
    assert outcome(core, client)[2] is Reason.BAD_INNER
    client.close()


@pytest.mark.parametrize("ending", ["alert", "eof"])
def test_leaving_after_our_hello_is_not_bad(make_core, ending):
    core = make_core()
    client = core.connect()
    client.sendall(signed_hello())
    core.loop.settle()
    read_all(client)
    if ending == "alert":
        client.sendall(b"\x15\x03\x03\x00\x02\x01\x00")
    else:
        client.shutdown(socket.SHUT_WR)
    data, closed, bad = outcome(core, client)
    assert (data, closed, bad) == (b"", True, None)
    assert core.counters.failures_by_stage == {"tls_post_serverhello_mtproto": 1}
    client.close()


@pytest.mark.parametrize("seed", range(25))
def test_any_split_of_a_handshake_is_the_same(make_core, seed):
    core = make_core()
    rng = random.Random(seed)
    head, sending, _ = client_preamble(seed=seed)
    wire = signed_hello(seed=seed) + b"\x14\x03\x03\x00\x01\x01" + record((head + sending.update(b"early bytes"))[:40])
    wire += record((head + client_preamble(seed=seed)[1].update(b"early bytes"))[40:])
    client = core.connect()
    cuts = sorted(rng.sample(range(1, len(wire)), rng.randint(0, 12)))
    for start, stop in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        client.sendall(wire[start:stop])
        core.loop.settle()
    dc = core.upstreams.connect()
    core.loop.settle()
    opening, _ = read_all(dc)
    assert core.backend.ctr(opening[8:40], opening[40:56]).update(opening)[64:] == b"early bytes"
    client.close()
    dc.close()
    core.loop.settle()


def test_hello_delay_holds_the_flight_back(make_core):
    core = make_core("[censorship]\nserver_hello_delay_min_ms = 300\nserver_hello_delay_max_ms = 300")
    client = core.connect()
    client.sendall(signed_hello())
    core.loop.settle()
    core.loop.turn(0.29)
    assert read_all(client)[0] == b""
    core.loop.turn(0.02)
    assert read_all(client)[0][:3] == b"\x16\x03\x03"
    client.close()


@pytest.mark.parametrize("step", [1, 100, 3000])
def test_a_flight_that_the_kernel_takes_in_pieces_arrives_whole(make_core, monkeypatch, step):
    """Found by the journeys while the machine was short of TCP memory: a short write ended the handshake."""
    core = make_core()
    client = core.connect()
    real = telemt.Stream.write
    monkeypatch.setattr(telemt.Stream, "write", lambda self, data: real(self, data[:step]))
    client.sendall(signed_hello())
    core.loop.settle()
    flight, _ = read_all(client)
    first = 5 + int.from_bytes(flight[3:5], "big")
    assert len(flight) == first + 6 + 5 + int.from_bytes(flight[first + 9:first + 11], "big")
    client.sendall(record(client_preamble()[0]))
    core.loop.settle()
    assert core.upstreams.asked == [(2, "")]
    client.close()


@pytest.mark.parametrize("tls", [True, False])
def test_client_that_leaves_while_routing_aborts_the_connect(make_core, tls):
    core = make_core()
    client = core.connect()
    head = client_preamble()[0]
    if tls:
        client.sendall(signed_hello())
        core.loop.settle()
    client.sendall(record(head) if tls else head)
    core.loop.settle()
    assert core.doorman.users.users["alice"].sessions == 1
    client.close()
    core.loop.settle()
    assert core.upstreams.aborted == 1 and core.finished == 1 and core.doorman.users.users["alice"].sessions == 0


def test_early_bytes_are_bounded(make_core):
    core = make_core()
    client = core.connect()
    head, sending, _ = client_preamble()
    flood = sending.update(bytes(1 << 20))
    client.sendall(head)
    core.loop.settle()
    sent = 0
    for _ in range(100):
        try:
            sent += client.send(flood[sent:])
        except BlockingIOError:
            break
        core.loop.settle()
    (session,) = core.owners
    assert len(session.early) == 65_536 and session.stream.mask == telemt.HANGUP
    dc = core.upstreams.connect()
    received = b""
    while sent < len(flood) or len(received) < len(flood) + 64:
        if sent < len(flood):
            try:
                sent += client.send(flood[sent:])
            except BlockingIOError:
                pass
        core.loop.turn()
        received += read_all(dc)[0]
    assert core.backend.ctr(received[8:40], received[40:56]).update(received)[64:] == bytes(1 << 20)
    client.close()
    dc.close()
    core.loop.settle()


def test_early_records_that_overlap_the_bound(make_core):
    """Found by a journey: bytes that came with the header counted apart from those after it."""
    core = make_core()
    client = core.connect()
    head, sending, _ = client_preamble()
    client.sendall(signed_hello())
    core.loop.settle()
    read_all(client)
    client.sendall(record(head) + b"".join(record(sending.update(bytes(2878))) for _ in range(20)))
    core.loop.settle()
    with contextlib.suppress(BlockingIOError):
        for _ in range(40):
            client.sendall(record(sending.update(bytes(2878))))
            core.loop.settle()
    (routing,) = core.owners
    assert len(routing.early) <= 65_536 and not routing.closed
    client.close()


@pytest.mark.parametrize(("text", "message"), [
    ("[access.user_max_tcp_conns]\nalice = 0\n", "exceeded connection limit"), ("[access.user_enabled]\nalice = false\n", "disabled"),
])
def test_a_refused_user_is_closed_and_counted_nowhere(make_core, text, message):
    core = make_core(text + ALL_MODES)
    client = core.connect()
    client.sendall(client_preamble()[0])
    assert outcome(core, client) == (b"", True, None)
    assert not core.upstreams.asked and not core.counters.failures_by_class
    client.close()


def test_failed_route_closes_and_releases(make_core):
    core = make_core()
    client = core.connect()
    client.sendall(client_preamble()[0])
    core.loop.settle()
    core.upstreams.waiting.pop()(telemt.RouteError("IO error: Connection refused (os error 111)"))
    assert outcome(core, client) == (b"", True, None)
    assert core.doorman.users.users["alice"].sessions == 0
    client.close()


def test_scope_comes_from_the_user_name(make_core):
    core = make_core(f'{ALL_MODES}[access.users]\nscope_fast = "{SECRET}"')
    client = core.connect()
    client.sendall(client_preamble()[0])
    core.loop.settle()
    assert core.upstreams.asked == [(2, "fast")]
    client.close()


def test_wanted_middle_end_without_degradation_waits_for_nobody(make_core):
    core = make_core("[general]\nuse_middle_proxy = true\nauto_degradation_enabled = false\n" + ALL_MODES)
    client = core.connect()
    client.sendall(client_preamble()[0])
    assert outcome(core, client) == (b"", True, None) and not core.upstreams.asked
    client.close()


def test_a_crash_costs_one_session(make_core, monkeypatch):
    core = make_core()
    monkeypatch.setattr(core.doorman, "find_header", lambda *_: 1 // 0)
    client, other = core.connect(), core.connect()
    client.sendall(client_preamble()[0])
    assert outcome(core, client) == (b"", True, None)
    assert len(core.owners) == 1
    client.close()
    other.close()


@pytest.mark.parametrize("where", ["connect_dc", "make_dc_preamble", "relay"])
def test_a_crash_while_routing_costs_the_connection_at_once(make_core, monkeypatch, where):
    """Found by review: the error was blamed on an owner that had already let go, and the place was lost."""
    core = make_core()

    def fail(*_, **__):
        raise ZeroDivisionError("planted")

    if where == "connect_dc":
        monkeypatch.setattr(core.upstreams, "connect_dc", fail)
    elif where == "make_dc_preamble":
        monkeypatch.setattr(telemt, "make_dc_preamble", fail)
    else:
        monkeypatch.setattr(telemt.CopyFlow, "push", fail)
    client = core.connect()
    client.sendall(client_preamble()[0])
    core.loop.settle()
    if where != "connect_dc":
        near, far = tcp_pair()
        core.loop.call(core.upstreams.waiting.pop(0), telemt.Stream(core.loop, near))
        far.close()
        if where == "make_dc_preamble":
            near.close()
    core.loop.settle()
    assert read_all(client)[1] and core.finished == 1 and not core.owners
    client.close()


def test_alert_is_read_although_input_waits(make_core):
    """Found by review: closing with unread bytes turns the alert into a reset (D10)."""
    core = make_core()
    client = core.connect()
    client.sendall(signed_hello())
    core.loop.settle()
    read_all(client)
    flood = record(b"A" * 64) + bytes(300_000)
    data, ended = b"", False
    while flood:
        with contextlib.suppress(BlockingIOError):
            flood = flood[client.send(flood):]
        core.loop.turn()
    core.loop.settle()
    data, ended = read_all(client)
    assert (data[:5], len(data), ended) == (b"\x17\x03\x03\x00\x13", 24, True)
    assert core.owners, "it waits for the peer to end"
    client.shutdown(socket.SHUT_WR)
    core.loop.settle()
    assert not core.owners and core.counters.connections_bad_total == 1 and not core.counters.failures_by_class


def test_goodbye_ends_with_the_deadline(make_core):
    core = make_core()
    client = core.connect()
    client.sendall(signed_hello())
    core.loop.settle()
    client.sendall(record(b"A" * 64))
    core.loop.settle()
    assert core.owners
    core.loop.turn(31)
    core.loop.settle()
    assert not core.owners and not core.counters.failures_by_class
    client.close()


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("behind", [b"\x16\x03\x03\x00\x01a", b"\x15\x03\x03\x00\x02\x01\x00"], ids=["bad-record", "alert"])
def test_what_follows_the_header_is_judged_after_it(make_core, behind, together):
    """Found by review: the result depended on where the stream was cut."""
    core = make_core()
    client = core.connect()
    client.sendall(signed_hello())
    core.loop.settle()
    read_all(client)
    head = record(client_preamble()[0])
    if together:
        client.sendall(head + behind)
    else:
        client.sendall(head)
        core.loop.settle()
        client.sendall(behind)
    assert outcome(core, client) == (b"", True, None)
    assert not core.counters.failures_by_class and core.doorman.users.users["alice"].sessions == 0
    client.close()


@pytest.mark.parametrize("state", list(telemt.S))
def test_illegal_moves_are_our_own_error(make_core, state):
    core = make_core()
    client = core.connect()
    (session,) = core.owners
    session.state = state
    for new in telemt.S:
        if new is not telemt.S.CLOSED and new not in telemt._MOVES[state]:
            with pytest.raises(telemt.InternalError):
                session._enter(new)
    session.state = telemt.S.SNIFF
    client.close()
