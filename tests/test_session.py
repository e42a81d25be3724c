"""Room 20: from the first byte to the relay, driven over loopback sockets with a loop whose clock is ours."""
import contextlib
import random
import socket
import types

import pytest

import telemt
from telemt import Reason
from tests.cases import OTHER, SECRET, FakeCore, client_preamble, load_vector, read_all, settings_of, signed_hello, tcp_pair

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
    if any(getattr(owner, "state", None) is telemt.S.LEAVING for owner in core.owners):
        client.shutdown(socket.SHUT_WR)        # a stranger is read until he ends
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


def test_a_hello_that_we_cannot_answer_is_not_remembered(make_core):
    """tls-front.md 9.3: it is the mask host's, as for a wrong digest, before the replay table."""
    core = make_core()
    for _ in range(2):
        client = core.connect()
        client.sendall(signed_hello(group=23))
        core.loop.settle()
        client.close()
    core.loop.settle()
    assert core.counters.bad_by_class == {Reason.HELLO_MALFORMED: 2} and len(core.doorman.hellos) == 0


def test_who_was_here_is_tried_first(make_core):
    """client-protocol.md D12."""
    core = make_core(f'{ALL_MODES}[access.users]\nalice = "{OTHER}"\nbob = "{SECRET}"\n')
    assert [user.name for user in core.doorman.candidates("10.0.0.1", 0.0)] == ["alice", "bob"]
    client = core.connect()
    client.sendall(client_preamble()[0])
    core.loop.settle()
    assert [user.name for user in core.doorman.candidates("10.0.0.1", 0.0)] == ["bob", "alice"]
    client.close()


@pytest.mark.parametrize(("sent", "reason"), [
    (b"\x16", Reason.HELLO_TRUNCATED), (b"\x16\x03\x01\x02\x00abc", Reason.HELLO_TRUNCATED),
    (b"\x16\x03\x01\x40\x00", Reason.HELLO_TRUNCATED),
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


@pytest.mark.parametrize("longest_ms", [300, pytest.param(100, id="maximum below the minimum")])
def test_hello_delay_holds_the_flight_back(make_core, monkeypatch, longest_ms):
    """client-protocol.md 6.6: uniform min..max(min, max)."""
    monkeypatch.setattr(telemt, "draw_fraction", lambda: 0.99)
    core = make_core(f"[censorship]\nserver_hello_delay_min_ms = 300\nserver_hello_delay_max_ms = {longest_ms}")
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


def test_a_session_without_any_way_ends_at_once(make_core, logged):
    """middle-proxy-wire.md 11, D13: nobody waits for the client's next frame."""
    core = make_core()
    core.pool = types.SimpleNamespace(route=lambda dc, has_direct: telemt.Refuse())
    client = core.connect()
    client.sendall(client_preamble()[0])
    assert outcome(core, client) == (b"", True, None) and core.finished == 1
    assert logged[-1] == (telemt.Level.WARN,
                          "Connection closed with error peer=10.0.0.1:1234 error=No ME writers available for target DC")


def test_scope_comes_from_the_user_name(make_core):
    core = make_core(f'{ALL_MODES}[access.users]\nscope_fast = "{SECRET}"')
    client = core.connect()
    client.sendall(client_preamble()[0])
    core.loop.settle()
    assert core.upstreams.asked == [(2, "fast")]
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


# -- strangers meet the mask host


MASKED = """[censorship]
mask_host = "127.0.0.1"
mask_port = {port}
mask_proxy_protocol = {header}
"""


@pytest.fixture
def site():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.setblocking(False)
        yield sock


def masked_core(make_core, site, header=0, more=ALL_MODES):
    return make_core(more + MASKED.format(port=site.getsockname()[1], header=header))


STRANGERS = [(b"GET / HTTP/1.1\r\n\r\n", "HTTP"), (b"SSH-2.0-x\r\n", "SSH"), (b"\xef", "port-scanner"), (b"A" * 64, "unknown"),
             (b"\x16\x03\x01\x01\xff" + b"h" * 511, "TLS-scanner"), (signed_hello(secret="ab" * 16), "TLS-scanner"),
             (signed_hello(timestamp=1_000_000_000) + b"pipelined", "TLS-scanner")]


@pytest.mark.parametrize(("sent", "kind"), STRANGERS, ids=[kind for _, kind in STRANGERS])
@pytest.mark.parametrize("step", [0, 1], ids=["whole", "bytewise"])
def test_a_stranger_talks_to_the_mask_host(make_core, site, sent, kind, step):
    core = masked_core(make_core, site)
    client = core.connect()
    for at in range(0, len(sent), step or len(sent)):
        client.sendall(sent[at:at + (step or len(sent))])
        core.loop.settle()
    host, _ = site.accept()
    host.setblocking(False)
    core.loop.settle()
    assert read_all(host) == (sent, False)
    host.sendall(b"the real site")
    core.loop.settle()
    assert read_all(client) == (b"the real site", False)
    assert core.counters.connections_bad_total == 1
    assert core.noted == [("port-scanner" if step and kind == "HTTP" else kind, "10.0.0.1")]      # four bytes are too few for HTTP
    core.loop.turn(100)                        # the handshake's deadline does not hold for him any more
    assert len(core.owners) == 1 and not core.counters.failures_by_class
    host.close()
    core.loop.settle()
    assert read_all(client) == (b"", True)
    client.close()
    core.loop.settle()
    assert core.finished == 1


@pytest.mark.parametrize("sent", [b"\x16", b"\x16\x03\x01\x02\x00abc", b"A", b"A" * 63])
def test_an_end_before_a_decision_is_passed_on(make_core, site, sent):
    core = masked_core(make_core, site)
    client = core.connect()
    client.sendall(sent)
    client.shutdown(socket.SHUT_WR)
    core.loop.settle()
    host, _ = site.accept()
    host.setblocking(False)
    core.loop.settle()
    assert read_all(host) == (sent, True)
    host.sendall(b"400")
    host.close()
    core.loop.settle()
    assert read_all(client) == (b"400", True)
    client.close()


@pytest.mark.parametrize("header", [1, 2, 7])
def test_the_mask_host_learns_who_the_stranger_is(make_core, site, header):
    core = masked_core(make_core, site, header)
    client = core.connect()
    here = client.getpeername()
    client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    core.loop.settle()
    host, _ = site.accept()
    core.loop.settle()
    wire = host.recv(1000)
    told = telemt.parse_proxy_header(wire)
    assert told == (min(header, 2) if header == 2 else 1, told.size, ("10.0.0.1", 1234), here)
    assert wire[told.size:] == b"GET / HTTP/1.1\r\n\r\n"
    host.close()
    client.close()
    core.loop.settle()


@pytest.mark.parametrize("why", ["mask off", "refused", "no place", "ourselves"])
def test_without_a_mask_host_a_stranger_is_read_in_silence_until_the_deadline(make_core, site, why):
    core = masked_core(make_core, site)
    if why == "mask off":
        core = make_core(ALL_MODES)
    elif why == "refused":
        site.close()
    elif why == "no place":
        core.masks.share = 0
    else:
        core.masks.listeners = [("0.0.0.0", site.getsockname()[1])]
    client = core.connect()
    client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    core.loop.settle()
    client.sendall(b"x" * 10_000)
    core.loop.settle()
    core.loop.turn(29)
    assert read_all(client) == (b"", False) and core.owners
    core.loop.turn(2)
    core.loop.settle()
    assert read_all(client) == (b"", True) and not core.owners
    assert core.counters.connections_bad_total == 1 and not core.counters.failures_by_class
    assert core.noted == [("HTTP", "10.0.0.1")]
    client.close()


@pytest.mark.parametrize("ending", ["deadline", "stop"])
def test_a_stranger_whose_mask_host_is_being_looked_for_can_be_dropped(make_core, monkeypatch, ending):
    monkeypatch.setattr(telemt, "resolve", lambda loop, host, port, done: None)
    core = make_core(ALL_MODES + '[censorship]\nmask_host = "slow.example"\n[timeouts]\nclient_handshake = 3\n')
    client = core.connect()
    client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    core.loop.settle()
    (session,) = core.owners
    assert session.state is telemt.S.MASKING and core.masks.busy == 1
    if ending == "deadline":
        core.loop.turn(4)
    else:
        session.close(None)
    core.loop.settle()
    assert not core.owners and core.masks.busy == 0 and not core.counters.failures_by_class
    client.close()


def test_nobody_is_read_further_than_a_hello_reaches(make_core):
    """Memory of a crowd of strangers: what does not matter yet waits in the kernel."""
    core = make_core()
    client = core.connect()
    client.sendall(b"\x16\x03\x01\x40\x00")
    core.loop.settle()
    with contextlib.suppress(BlockingIOError):
        for _ in range(100):
            client.send(bytes(16_000))
            core.loop.turn()
            assert all(len(owner.inbox) <= 16_389 for owner in core.owners)
    client.close()


# -- observation of those who end before they are known


@pytest.mark.parametrize(("sent", "end", "kind"), [
    (b"", "eof", None), (b"", "reset", None), (b"", "deadline", "other"), (b"A" * 9, "reset", "other"), (b"A" * 9, "deadline", "other"),
    (b"\x16\x03\x01\x02\x00ab", "deadline", "other"), (signed_hello(), "eof", "expected_64_got_0"),
    (signed_hello(), "reset", "expected_64_got_0"),
    (signed_hello(), "alert", "expected_64_got_0"), (signed_hello(), "deadline", "other"),
    (signed_hello() + record(b"B" * 63), "eof", "other"), (signed_hello() + record(b"B" * 64), "eof", None),
])
def test_classes_of_those_who_fail(make_core, sent, end, kind):
    core = make_core()
    client = core.connect()
    client.sendall(sent)
    core.loop.settle()
    read_all(client)                           # or closing with our flight unread would be a reset
    if end == "alert":
        client.sendall(b"\x15\x03\x03\x00\x02\x01\x00")
    elif end == "deadline":
        core.loop.turn(31)
    else:
        if end == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    core.loop.settle()
    assert core.noted == ([(kind, "10.0.0.1")] if kind else [])
    client.close()


def test_limits_are_not_observed(make_core):
    core = make_core("[access.user_max_tcp_conns]\nalice = 0\n" + ALL_MODES)
    client = core.connect()
    client.sendall(client_preamble()[0])
    core.loop.settle()
    assert core.noted == []
    client.close()


# -- too many of one address


def test_the_oldest_half_open_connection_makes_room(make_core):
    core = make_core()
    core.handshakes.per_address = 3
    clients = [core.connect() for _ in range(3)]
    other = core.connect(ip="10.0.0.2")
    core.loop.settle()
    assert len(core.owners) == 4
    clients.append(core.connect())
    core.loop.settle()
    assert read_all(clients[0]) == (b"", True) and not read_all(clients[1])[1] and not read_all(other)[1]
    assert core.counters.failures_by_class == {Reason.CROWDED_OUT: 1} and core.noted == [("other", "10.0.0.1")]
    for sock in (*clients, other):
        sock.close()
    core.loop.settle()


def test_who_is_known_does_not_count_as_half_open(make_core):
    core = make_core()
    core.handshakes.per_address = 2
    clients = [core.connect() for _ in range(2)]
    for seed, sock in enumerate(clients):
        sock.sendall(client_preamble(seed=seed)[0])
    core.loop.settle()
    clients += [core.connect() for _ in range(2)]
    core.loop.settle()
    assert len(core.owners) == 4 and not core.counters.failures_by_class
    for sock in clients:
        sock.close()
    core.loop.settle()


def test_a_network_of_ipv6_counts_as_one_address(make_core):
    core = make_core()
    core.handshakes.per_address = 2
    clients = [core.connect(ip=f"2001:db8::{n}") for n in range(3)] + [core.connect(ip="2001:db8:0:1::1")]
    core.loop.settle()
    assert len(core.owners) == 3 and read_all(clients[0])[1]
    for sock in clients:
        sock.close()
    core.loop.settle()


def test_a_new_handshake_time_holds_for_new_connections(make_core):
    core = make_core()
    old = core.connect()
    core.handshakes.apply(settings_of("[timeouts]\nclient_handshake = 5\n"))
    new = core.connect()
    core.loop.turn(6)
    core.loop.settle()
    assert read_all(new)[1] and not read_all(old)[1]
    core.handshakes.apply(core.settings)
    core.loop.turn(25)
    core.loop.settle()
    assert read_all(old)[1] and len(core.handshakes._lanes) == 2
    for sock in (old, new):
        sock.close()


# -- behind a load balancer


HEADERS = [telemt.build_proxy_header(version, ("203.0.113.7", 4711), ("198.51.100.1", 443)) for version in (1, 2)]
WITH_TLVS = HEADERS[1][:14] + (12 + 30_000).to_bytes(2, "big") + HEADERS[1][16:] + bytes(30_000)


@pytest.mark.parametrize(("header", "step"), [(HEADERS[0], 0), (HEADERS[0], 1), (HEADERS[1], 0), (HEADERS[1], 1), (WITH_TLVS, 0),
                                              (WITH_TLVS, 1000)], ids=lambda value: str(value)[:12])
def test_a_proxy_header_tells_who_the_client_is(make_core, header, step):
    core = make_core()
    client = core.connect(trusted=True)
    wire = header + client_preamble()[0]
    for at in range(0, len(wire), step or len(wire)):
        client.sendall(wire[at:at + (step or len(wire))])
        core.loop.settle()
    (routing,) = core.owners
    assert (routing.ip, routing.peer) == ("203.0.113.7", "203.0.113.7:4711")
    assert core.doorman.users.users["alice"].ips == {"203.0.113.7": 1}
    client.close()
    core.loop.settle()


@pytest.mark.parametrize("header", [b"PROXY UNKNOWN\r\n", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"])
def test_a_header_without_addresses_leaves_those_of_the_connection(make_core, header):
    core = make_core()
    client = core.connect(trusted=True)
    client.sendall(header)
    core.loop.settle()
    (session,) = core.owners
    assert session.peer == "10.0.0.1:1234" and session.local_end() == client.getpeername()
    client.close()
    core.loop.settle()


@pytest.mark.parametrize(("trusted", "sent", "reason"), [
    (False, b"", Reason.PROXY_UNTRUSTED), (True, b"GET / HTTP/1.1\r\n", Reason.PROXY_INVALID), (True, signed_hello(), Reason.PROXY_INVALID),
    (True, b"PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n", Reason.PROXY_INVALID),
])
def test_a_bad_proxy_header_is_refused_and_never_masked(make_core, site, trusted, sent, reason):
    core = masked_core(make_core, site)
    client = core.connect(trusted=trusted)
    with contextlib.suppress(OSError):
        client.sendall(sent)
    core.loop.settle()
    assert not core.owners and core.counters.bad_by_class == {reason: 1} and core.noted == [("other", "10.0.0.1")]
    with pytest.raises(BlockingIOError):
        site.accept()
    client.close()


@pytest.mark.parametrize(("sent", "bad"), [(b"", None), (b"PROXY ", Reason.PROXY_INVALID)])
@pytest.mark.parametrize("end", ["eof", "reset"])
def test_an_end_inside_a_proxy_header(make_core, sent, bad, end):
    """Without a byte it is the health check of the balancer: no warning, nothing bad, nothing observed."""
    core = make_core()
    client = core.connect(trusted=True)
    client.sendall(sent)
    core.loop.settle()
    if end == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    core.loop.settle()
    assert core.counters.bad_by_class == ({bad: 1} if bad else {}) and len(core.noted) == bool(bad)
    assert core.counters.failures_by_class == ({} if bad else {Reason.EOF if end == "eof" else Reason.RESET: 1})


def test_a_proxy_header_has_five_seconds_and_the_handshake_counts_from_accept(make_core):
    core = make_core()
    slow, late = core.connect(trusted=True), core.connect(trusted=True)
    core.loop.turn(4)
    late.sendall(HEADERS[0])
    core.loop.settle()
    core.loop.turn(2)
    core.loop.settle()
    assert read_all(slow)[1] and core.counters.bad_by_class == {Reason.PROXY_TIMEOUT: 1}
    core.loop.turn(23)
    assert not read_all(late)[1]
    core.loop.turn(2)
    core.loop.settle()
    assert read_all(late)[1] and core.counters.failures_by_class == {Reason.TIMEOUT: 1}
    assert core.noted == [("other", "10.0.0.1"), ("other", "203.0.113.7")]
    slow.close()
    late.close()


def test_a_missing_proxy_header_is_the_reason_although_the_handshake_is_over_too(make_core):
    """client-protocol.md D4: min(5 s, handshake deadline)."""
    core = make_core(f"[timeouts]\nclient_handshake = 3\n{ALL_MODES}")
    client = core.connect(trusted=True)
    core.loop.turn(3.1)
    core.loop.settle()
    assert read_all(client)[1] and core.counters.bad_by_class == {Reason.PROXY_TIMEOUT: 1}
    assert core.counters.handshake_timeouts_total == 0 and core.noted == [("other", "10.0.0.1")]
    client.close()


def test_the_mask_header_carries_what_the_proxy_header_said(make_core, site):
    core = masked_core(make_core, site, header=2)
    client = core.connect(trusted=True)
    client.sendall(HEADERS[0] + b"GET / HTTP/1.1\r\n\r\n")
    core.loop.settle()
    host, _ = site.accept()
    core.loop.settle()
    assert host.recv(1000) == HEADERS[1] + b"GET / HTTP/1.1\r\n\r\n"
    assert core.noted == [("HTTP", "203.0.113.7")]
    host.close()
    client.close()
    core.loop.settle()


@pytest.mark.parametrize("behind", [None, True], ids=["directly", "balancer"])
def test_our_own_mask_connection_that_comes_back_is_dropped_uncounted(make_core, site, behind):
    core = masked_core(make_core, site, more="")
    stranger = core.connect()
    hello = signed_hello(secret="ab" * 16)
    stranger.sendall(hello)
    core.loop.settle()
    (end, said), = core.masks.ends.items()
    assert said == hello[:64]
    back = core.connect(ip="203.0.113.7" if behind else end[0], trusted=behind)
    if behind:
        back.sendall(telemt.build_proxy_header(1, end, ("127.0.0.1", 443)))
    else:
        next(owner for owner in core.owners if isinstance(owner, telemt.ClientSession)).port = end[1]
    back.sendall(hello)
    core.loop.settle()
    assert read_all(back) == (b"", True) and core.counters.connections_bad_total == 1 and len(core.noted) == 1
    for sock in (back, stranger):
        sock.close()
    site.accept()[0].close()
    core.loop.settle()


@pytest.mark.parametrize("sent", [b"POST / HTTP/1.1\r\n\r\n", signed_hello(secret="cd" * 16)], ids=["http", "hello"])
def test_a_local_client_with_the_port_of_a_mask_connection_is_served_and_masked(make_core, site, sent):
    """Found by 5,000 slow connections: the kernel gives one port to connections with different targets, and 3 % were dropped."""
    core = masked_core(make_core, site)
    core.masks.ends[("10.0.0.1", 1234)] = signed_hello(secret="ab" * 16)[:64]
    client = core.connect()
    client.sendall(client_preamble()[0])
    core.loop.settle()
    assert core.upstreams.asked
    other = core.connect()
    other.sendall(sent)
    core.loop.settle()
    assert core.counters.connections_bad_total == 1
    site.accept()[0].close()
    core.masks.ends.pop(("10.0.0.1", 1234))
    client.close()
    other.close()
    core.loop.settle()


def test_a_flood_behind_a_balancer_is_counted_by_client(make_core):
    core = make_core()
    core.handshakes.per_address = 2
    clients = [core.connect(ip="192.0.2.1", trusted=True) for _ in range(2)]
    for n, sock in enumerate(clients):
        sock.sendall(telemt.build_proxy_header(1, (f"203.0.113.{n}", 1), ("198.51.100.1", 443)))
        core.loop.settle()
    clients += [core.connect(ip="192.0.2.1", trusted=True) for _ in range(2)]
    core.loop.settle()
    assert len(core.owners) == 4
    for sock in clients:
        sock.close()
    core.loop.settle()


# -- vectors/faketls.json from the first byte to the answer, or to the mask host

FAKETLS = load_vector("faketls")
TWO_USERS = "[access.users]\n" + "".join(f'{name} = "{secret}"\n' for name, secret in FAKETLS["header"]["users"].items())


def checked_flight(case, flight, secret):
    """Group of the answer, which has to be the three records of client-protocol.md 6.4, signed for this hello."""
    record = bytes.fromhex(case["record"])
    first = int.from_bytes(flight[3:5], "big")
    assert flight[:3] == b"\x16\x03\x03" and flight[5 + first:14 + first] == b"\x14\x03\x03\x00\x01\x01\x17\x03\x03"
    assert len(flight) == 16 + first + int.from_bytes(flight[14 + first:16 + first], "big")
    session = record[44:44 + record[43]]
    assert flight[43:44 + len(session)] == bytes([len(session)]) + session
    assert telemt.KeyedHmac(bytes.fromhex(secret)).digest(record[11:43], flight[:11], bytes(32), flight[43:]) == flight[11:43]
    return {90: 29, 1178: 4588}[first - len(session)]


@pytest.mark.parametrize("case", FAKETLS["cases"], ids=lambda case: case["name"])
@pytest.mark.parametrize("preferred", [29, 4588])
def test_first_packet_of_the_vector(make_core, site, monkeypatch, case, preferred):
    core = masked_core(make_core, site, more=(
        f"[general.modes]\ntls = true\n[access]\nignore_time_skew = {str(case['ignore_time_skew']).lower()}\n{TWO_USERS}"))
    monkeypatch.setattr(telemt.time, "time", lambda: float(case["now"]))
    front = core.fronts._primary
    front.profile = front.profile._replace(group=preferred)
    record = bytes.fromhex(case["record"])
    answered = case.get("answer_group", {"29": 29, "4588": 29})[str(preferred)]
    expect = ["ok" if case["expect"] == "mask" and "answer_group" in case and answered else case["expect"]]
    expect += [case["repeat_expect"]] if "repeat_expect" in case else []
    for verdict in expect:
        client = core.connect()
        client.sendall(record)
        core.loop.settle()
        data, closed = read_all(client)
        if verdict == "ok":
            assert checked_flight(case, data, FAKETLS["header"]["users"][case.get("user", "alice")]) == answered and not closed
        elif verdict == "need_more":
            assert (data, closed) == (b"", False) and [owner.state for owner in core.owners] == [
                telemt.S.HELLO if len(record) >= 5 else telemt.S.SNIFF]
        else:                                  # mask; `not_tls` too, since no plain mode is on
            host, _ = site.accept()
            host.setblocking(False)
            core.loop.settle()
            assert read_all(host) == (record, False) and (data, closed) == (b"", False)
            host.close()
        client.close()
        core.loop.settle()
