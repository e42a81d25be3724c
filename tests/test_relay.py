"""Room 19: counting, quota, half-close, idle, errors and the orderly stop of a running session."""
import socket
import types

import pytest

import telemt
from telemt import Level, LogBook
from tests.cases import FakeCore, TestLoop, client_preamble, read_all, settings_of

MODES = "[general.modes]\nsecure = true\n"


class Rig:
    """One running plain session: client -> relay -> dc."""

    def __init__(self, text=MODES, slow=False):
        self.core = FakeCore(text)
        self.loop = self.core.loop
        self.client = self.core.connect()
        head, self.sending, self.receiving = client_preamble()
        self.client.sendall(head)
        self.loop.settle()
        self.dc = self.core.upstreams.connect()
        self.loop.settle()
        self.opening, _ = read_all(self.dc)
        self.user = self.core.doorman.users.users["alice"]
        self.relay = next(iter(self.core.relays), None)      # None: it has ended already

    def up(self, size):
        self.client.sendall(bytes(size))
        self.loop.settle()
        return read_all(self.dc)

    def down(self, size):
        self.dc.sendall(bytes(size))
        self.loop.settle()
        return read_all(self.client)


@pytest.fixture
def make_rig():
    made = []

    def make(text=MODES):
        made.append(Rig(text))
        return made[-1]

    yield make
    for rig in made:
        rig.client.close()
        rig.dc.close()
        rig.core.dispose()


@pytest.fixture
def logged(monkeypatch):
    found = []
    monkeypatch.setattr(LogBook, "sink", lambda level, target, text: found.append((level, text)))
    monkeypatch.setattr(LogBook, "threshold", Level.TRACE)
    return found


@pytest.mark.parametrize(("chunks", "msgs"), [((1,), 1), ((8192,), 1), ((8193,), 2), ((16_384,), 2), ((1, 1, 1), 3)])
def test_octets_and_messages(make_rig, chunks, msgs):
    rig = make_rig()
    for size in chunks:
        rig.up(size)
        rig.down(size)
    stats = rig.user.stats
    assert (stats.octets_from_client, stats.octets_to_client) == (sum(chunks), sum(chunks))
    assert (stats.msgs_from_client, stats.msgs_to_client, rig.user.used) == (msgs, msgs, 2 * sum(chunks))


def test_enforcement_goes_on_without_user_telemetry(make_rig):
    rig = make_rig("[access.user_data_quota]\nalice = 100\n" + MODES)
    rig.core.count_users = False
    rig.up(60)
    assert rig.user.stats.octets_from_client == 0 and rig.user.used == 60 and not rig.relay.ended
    rig.down(40)
    assert rig.relay.ended


def test_quota_ends_the_session_after_the_chunk_that_reached_it(make_rig, logged):
    rig = make_rig("[access.user_data_quota]\nalice = 100\n" + MODES)
    rig.down(99)
    assert not rig.relay.ended
    rig.up(1)
    assert rig.relay.ended and (Level.WARN, "User data quota reached, closing relay user=alice") in logged
    assert rig.user.sessions == 0


def test_quota_follows_the_current_value(make_rig):
    rig = make_rig(MODES)
    rig.up(500)
    rig.core.doorman.apply(settings_of("[access.user_data_quota]\nalice = 400\n" + MODES).access)
    rig.up(1)
    assert rig.relay.ended


@pytest.mark.parametrize("side", ["client", "dc"])
def test_half_close_lets_the_other_direction_go_on(make_rig, side):
    rig = make_rig()
    one, other = (rig.client, rig.dc) if side == "client" else (rig.dc, rig.client)
    one.sendall(b"last words")
    one.shutdown(socket.SHUT_WR)
    rig.loop.settle()
    data, ended = read_all(other)
    assert len(data) == 10 and ended and not rig.relay.ended
    other.sendall(b"answer")
    rig.loop.settle()
    assert len(read_all(one)[0]) == 6
    other.shutdown(socket.SHUT_WR)
    rig.loop.settle()
    assert read_all(one) == (b"", True) and rig.relay.ended


def test_half_closed_session_ends_after_a_silent_minute(make_rig):
    rig = make_rig()
    rig.client.shutdown(socket.SHUT_WR)
    rig.loop.settle()
    rig.loop.turn(59)
    rig.down(5)
    rig.loop.turn(2)
    assert not rig.relay.ended, "bytes in the other direction keep it"
    rig.loop.turn(60)
    assert rig.relay.ended


def test_half_close_costs_no_cpu(make_rig):
    rig = make_rig()
    rig.client.shutdown(socket.SHUT_WR)
    rig.loop.settle()
    assert rig.relay.client.fd not in rig.loop.poller.masks


@pytest.mark.parametrize("side", ["client", "dc"])
def test_reset_ends_both(make_rig, side):
    rig = make_rig()
    one, other = (rig.client, rig.dc) if side == "client" else (rig.dc, rig.client)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    one.close()
    rig.loop.settle()
    assert rig.relay.ended and read_all(other)[1]


def test_write_to_a_client_that_is_gone_ends_the_session(make_rig):
    rig = make_rig()
    rig.client.close()
    rig.loop.settle()
    rig.dc.sendall(b"x")
    rig.loop.settle()
    rig.dc.sendall(b"y")
    rig.loop.settle()
    assert rig.relay.ended


def test_idle_report(make_rig, logged):
    rig = make_rig()
    rig.up(3)
    rig.loop.turn(1801)
    rig.relay.expire_idle(rig.loop.now)
    assert rig.relay.ended
    assert any(text.startswith("Activity timeout user=alice c2s_bytes=3 s2c_bytes=0 idle_secs=1801") for _, text in logged)


def test_drain_lets_queued_bytes_out_and_reads_no_more(make_rig):
    rig = make_rig()
    flood = bytes(1 << 20)
    sent = 0
    for _ in range(200):
        try:
            sent += rig.dc.send(flood)
        except BlockingIOError:
            pass
        rig.loop.turn()
        if rig.relay.down.pending:
            break
    assert rig.relay.down.pending
    rig.relay.drain()
    got = 0
    for _ in range(1000):
        got += len(read_all(rig.client)[0])
        rig.loop.turn()
        if rig.relay.ended:
            break
    got += len(read_all(rig.client)[0])
    assert rig.relay.ended and got == rig.user.stats.octets_to_client


def test_drain_of_a_quiet_session_ends_it_at_once(make_rig):
    rig = make_rig()
    rig.relay.drain()
    rig.loop.settle()
    assert rig.relay.ended and read_all(rig.client)[1]


def test_close_twice_releases_once(make_rig):
    rig = make_rig()
    rig.relay.close(None)
    rig.relay.close(OSError(5, "x"))
    assert rig.core.finished == 1 and rig.user.stats.current == 0


@pytest.mark.parametrize(("error", "level", "text"), [
    (ConnectionResetError(104, "Connection reset by peer"), Level.DEBUG, "Connection closed by client user=a"),
    (BrokenPipeError(32, "Broken pipe"), Level.DEBUG, "Connection closed by client user=a"),
    (OSError(113, "No route to host"), Level.WARN, "Connection closed with error user=a error=IO error: No route to host (os error 113)"),
    (telemt.RouteError("Connection timeout to 1.2.3.4:443"), Level.WARN,
     "Connection closed with error user=a error=Connection timeout to 1.2.3.4:443"),
])
def test_end_of_connection_words(logged, error, level, text):
    telemt.report_end(error, types.SimpleNamespace(is_unix=False), user="a")
    assert logged == [(level, text)]


def test_a_preamble_that_is_not_sent_is_no_connect_of_the_user(make_rig, monkeypatch):
    """upstream-and-relay.md 9.1: a failure before the header is out changes neither counter."""
    def fail(self, data):
        raise BrokenPipeError(32, "Broken pipe")
    monkeypatch.setattr(telemt.CopyFlow, "push", fail)
    rig = make_rig()
    assert rig.relay is None and rig.core.finished == 1
    assert (rig.user.stats.connects, rig.user.stats.current, rig.user.sessions) == (0, 0, 0)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), telemt.RouteError("no way")])
def test_an_end_on_the_unix_listener_is_worth_a_debug_line_only(logged, error):
    """client-protocol.md 2.2; the socket may be closed by then."""
    loop = TestLoop()
    ends = socket.socketpair()
    streams = [telemt.Stream(loop, end) for end in ends]
    for stream in streams:
        stream.close()
    loop.settle()
    telemt.report_end(error, streams[0], peer="127.0.0.1:1")
    text = telemt.describe(error)
    assert logged == [(Level.DEBUG, f"Unix socket connection error peer=127.0.0.1:1 error={text}")]
    loop.dispose()


def test_a_crash_in_a_flow_costs_its_session(make_rig, monkeypatch):
    rig = make_rig()
    monkeypatch.setattr(type(rig.relay.up), "run", lambda self: 1 // 0)
    rig.client.sendall(b"x")
    rig.loop.settle()
    assert rig.relay.ended
