"""Room 19, sessions through the middle end: messages, answers, closes from either side, clients that do not read."""
import pytest

import telemt
from tests.cases import BACKEND, FakeCore, read_all, tcp_pair

class FakeLink:
    """What a seat needs of a link; remembers what was pushed."""

    def __init__(self):
        self.sent, self.bound, self.left, self.holding = [], [], [], False

    def push(self, head, body=b""):
        self.sent.append((bytes(head), bytes(body)))

    def push_close(self, conn_id):
        self.push(telemt.build_close(conn_id))

    def bind(self, session, meta):
        self.bound.append((session, meta))

    def unbind(self, session):
        self.left.append(session.conn_id)

    @property
    def messages(self):
        return [body for head, body in self.sent if head[:4] == b"\xee\xf1\xce\x36"]

    @property
    def closes(self):
        return [head for head, _ in self.sent if head[:4] == b"\x5d\x42\xcf\x1f"]


class MiddleBench:
    """A client and its relay; the link is fake, answers come from the test."""

    def __init__(self, core, framing=telemt.Intermediate, tls=False, limit=1 << 20, buffer=None, early=b""):
        self.core, self.link = core, FakeLink()
        self.client, accepted = tcp_pair(buffer)
        stream = telemt.Stream(core.loop, accepted)
        self.ciphers = [BACKEND.ctr(bytes(range(32)), bytes(16)) for _ in range(4)]
        user = core.doorman.users.users["alice"]
        inlet = telemt.Inlet(core.arena, stream, telemt.RecordReader() if tls else None, self.ciphers[0])
        outlet = telemt.Outlet(core.arena, stream, self.ciphers[1], tls)
        meta = telemt.Meta(framing.name, ("10.0.0.1", 1234), ("127.0.0.1", 443), None)
        self.relay = telemt.MiddleRelay(core, telemt.Ticket(user, "10.0.0.1"), "10.0.0.1:1234", inlet, framing(limit), outlet,
                                        telemt.Seat(self.link, 2, 0x1122, meta))
        core.owners.add(self.relay)
        self.user, self.tls, self.got = user, tls, b""
        self.relay.start(early, meta)

    def say(self, data):
        wire = self.ciphers[2].update(data)
        self.client.sendall(b"\x17\x03\x03" + len(wire).to_bytes(2, "big") + wire if self.tls else wire)
        self.core.loop.settle()

    def answer(self, *data, acks=()):
        """One read of the link that brings these answers (and acks before them)."""
        spare = bytes(8)
        region = BACKEND.region(bytearray(b"".join(spare + part + spare for part in (*acks, *data)) + bytes(64)))
        at = 0
        for part in acks:
            self.relay.on_ack(region, at + 8)
            at += 16 + len(part)
        for part in data:
            self.relay.on_answer(region, at + 8, len(part))
            at += 16 + len(part)
        self.relay.on_run_end(region)
        return region

    def read(self):
        """What the client got since the last time, in clear; and whether the end was among it."""
        self.core.loop.settle()
        data, ended = read_all(self.client)
        self.got += data
        return self.ciphers[3].update(data), ended


@pytest.fixture
def middle():
    core = FakeCore(telemt_text)
    benches = []

    def make(**options):
        bench = MiddleBench(core, **options)
        benches.append(bench)
        return bench
    yield make
    for bench in benches:
        bench.client.close()
    core.loop.settle()
    core.dispose()
    assert all(user.sessions == user.stats.current == 0 for user in core.doorman.users) and not core.answers.holders


telemt_text = "[general]\nme_route_backpressure_high_timeout_ms = 120\n"


def frame(data):
    return len(data).to_bytes(4, "little") + data


def test_messages_go_to_the_link_with_their_flags_and_are_counted(middle):
    bench = middle(early=frame(b"early..."))
    bench.say(frame(b"\x11" * 16) + (16 | 1 << 31).to_bytes(4, "little") + bytes(16) + frame(b"half")[:6])
    assert bench.link.messages == [b"early...", b"\x11" * 16, bytes(16)]
    flags = [int.from_bytes(head[4:8], "little") for head, _ in bench.link.sent]
    assert flags == [0x20021000, 0x20021000, 0xA0021002]
    stats = bench.user.stats
    assert (stats.octets_from_client, stats.msgs_from_client, stats.current, stats.connects) == (40, 3, 1, 1)
    bench.say(b"lf")
    assert bench.link.messages[3:] == [b"half"]


@pytest.mark.parametrize("tls", [True, False])
@pytest.mark.parametrize("framing", [telemt.Abridged, telemt.Intermediate, telemt.Secure])
def test_answers_of_one_read_are_written_together(middle, framing, tls):
    bench = middle(framing=framing, tls=tls)
    bench.answer(b"a" * 8, b"b" * 600, acks=[b"\x0d\xf0\xad\x8b"])
    bench.core.loop.settle()
    wire, _ = read_all(bench.client)
    if tls:
        assert wire[:3] == b"\x17\x03\x03" and int.from_bytes(wire[3:5], "big") == len(wire) - 5
        wire = wire[5:]
    plain = bench.ciphers[3].update(wire)
    ack, plain = plain[:4], plain[4:]
    assert ack == (b"\x8b\xad\xf0\x0d" if framing is telemt.Abridged else b"\x0d\xf0\xad\x8b")
    codec = framing(1 << 20)
    assert [bytes(payload) for payload, _ in codec.feed(plain)] == [b"a" * 8, b"b" * 600] and not codec.waiting
    assert (bench.user.stats.octets_to_client, bench.user.stats.msgs_to_client) == (608, 2)


@pytest.mark.parametrize("half", [b"", b"\x08", frame(b"cut off!")[:7]], ids=["clean", "in the length", "in the body"])
def test_client_end_says_goodbye_behind_its_last_message(middle, half):
    bench = middle()
    bench.say(frame(b"last") + half)
    bench.client.shutdown(1)
    bench.core.loop.settle()
    assert bench.link.messages == [b"last"] and bench.link.sent[-1][0] == telemt.build_close(0x1122)
    assert len(bench.link.closes) == 1 and bench.link.left == [0x1122] and bench.core.finished == 1


@pytest.mark.parametrize(("framing", "wire", "counter"), [
    (telemt.Intermediate, b"\x06\0\0\0abcdef", None), (telemt.Secure, b"\x02\0\0\0ab", "secure_padding_invalid_total"),
    (telemt.Intermediate, b"\x02\0\0\0ab", None), (telemt.Abridged, b"\x7f\x01\0\0abcd", None), (telemt.Intermediate, bytes(4) * 64, None),
    (telemt.Intermediate, b"\0\0\0\x7f", "desync_total")], ids=str)
def test_bad_frame_closes_this_client_only(middle, framing, wire, counter):
    bench, other = middle(framing=framing), middle()
    bench.say((b"\x01good" if framing is telemt.Abridged else frame(b"good")) + wire)
    assert bench.link.messages == [b"good"] and len(bench.link.closes) == 1
    assert bench.core.finished == 1 and not other.link.closes
    totals = bench.core.counters.me.totals
    assert {name: count for name, count in totals.items() if count and name in ("secure_padding_invalid_total", "desync_total")} == (
        {counter: 1} if counter else {})


def test_desync_is_reported_in_full_once_a_minute_per_client(middle, monkeypatch):
    lines = []
    monkeypatch.setattr(telemt.LogBook, "threshold", telemt.Level.DEBUG)
    monkeypatch.setattr(telemt.LogBook, "sink", lambda level, target, text: lines.append((level, text)))
    totals = None
    for number in range(4):
        bench = middle(limit=4096)
        bench.say(frame(b"good") * number + b"\x16\x03\x01\x02")
        totals = bench.core.counters.me.totals
        if number == 2:
            bench.core.loop.turn(61)
    full = [text for level, text in lines if "forensics" in text and level is telemt.Level.WARN]
    assert len(full) == 2 and (totals["desync_total"], totals["desync_full_logged_total"], totals["desync_suppressed_total"]) == (4, 2, 2)
    assert "raw_len=33620758 raw_len_hex=0x02010316 raw_bytes=16030102 max_frame=4096 tls_like=true http_like=false frames_ok=0" in full[0]
    assert "user=alice" in full[0] and "10.0.0.1" not in full[0] and "is_tls=false" in full[0]
    assert [totals[f"desync_frames_bucket_{name}"] for name in ("0", "1_2", "3_10", "gt_10")] == [1, 2, 1, 0]
    assert any("frames_ok=3, conn_id=4386, trace_id=0x0000000000001122" in text for _, text in lines)


def test_the_minute_of_a_desync_counts_from_the_first_one(middle):
    """middle-proxy-wire.md 9: the window is not extended."""
    for pause_s in (0, 40, 21):
        bench = middle(limit=4096)
        bench.core.loop.turn(pause_s)
        bench.say(b"\x16\x03\x01\x02")
    totals = bench.core.counters.me.totals
    assert (totals["desync_full_logged_total"], totals["desync_suppressed_total"]) == (2, 1)


def test_a_desync_of_an_abridged_client_shows_its_length(middle, monkeypatch):
    """middle-proxy-wire.md 9: raw_bytes are the length in bytes, little-endian, not the words that came."""
    lines = []
    monkeypatch.setattr(telemt.LogBook, "threshold", telemt.Level.WARN)
    monkeypatch.setattr(telemt.LogBook, "sink", lambda level, target, text: lines.append(text))
    bench = middle(framing=telemt.Abridged, limit=4096)
    bench.say(b"\xff\x16\x03\x01")
    assert "raw_len=265304 raw_len_hex=0x00040c58 raw_bytes=580c0400 max_frame=4096 tls_like=false http_like=false" in lines[0]


def test_quota_ends_the_session_after_the_answer_that_crosses_it(middle):
    bench = middle()
    bench.user.quota = bench.user.mark = 100
    bench.say(frame(b"x" * 60))
    assert bench.core.finished == 0
    bench.answer(b"y" * 60)
    plain, ended = bench.read()
    assert plain == frame(b"y" * 60) and ended and len(bench.link.closes) == 1


def test_quota_is_judged_message_by_message(middle):
    """middle-proxy-wire.md D22: a read may hold many messages of a session, and only the one that crosses the quota passes."""
    bench = middle()
    bench.user.quota = bench.user.mark = 100
    bench.say(b"".join(frame(b"x" * 40) for _ in range(50)))
    assert len(bench.link.messages) == 3 and bench.user.used == 120 and len(bench.link.closes) == 1 and bench.core.finished == 1
    bench = middle()
    bench.user.quota = bench.user.mark = 300
    bench.answer(*[b"y" * 80] * 50)
    plain, ended = bench.read()
    assert plain == frame(b"y" * 80) * 3 and ended and bench.user.used == 360


def test_answer_that_cannot_be_framed_ends_the_session(middle):
    bench = middle(framing=telemt.Abridged)
    bench.answer(b"fine", b"odd")
    assert bench.read() == (b"\x01fine", True) and len(bench.link.closes) == 1 and bench.core.finished == 0
    bench.client.close()
    bench.core.loop.settle()
    assert bench.core.finished == 1


def test_middle_end_closes_the_client_gets_everything_first(middle):
    bench = middle()
    spare = bytes(8)
    region = BACKEND.region(bytearray(spare + b"last words.." + spare + bytes(64)))
    bench.relay.on_answer(region, 8, 12)
    bench.relay.on_middle_closed(region)
    assert bench.read() == (frame(b"last words.."), True)
    bench.say(frame(b"nobody hears this"[:16]) * 100)
    assert bench.link.messages == [] and bench.link.closes == [] and bench.core.finished == 0
    bench.client.shutdown(1)
    bench.core.loop.settle()
    assert bench.core.finished == 1


@pytest.mark.parametrize("seconds", [2.5, 5.5])
def test_client_that_does_not_leave_is_closed_anyway(middle, seconds):
    bench = middle(buffer=2048)
    if seconds > 3:                            # it does not read either
        while not bench.relay.outlet.pending:
            bench.answer(bytes(10_000))
    bench.relay.on_middle_closed(None)
    bench.core.loop.turn(seconds - 1)
    bench.core.loop.turn()
    assert bench.core.finished == 0
    bench.core.loop.turn(1)
    assert bench.core.finished == 1


def fill(bench, messages, size):
    for _ in range(messages):
        bench.answer(bytes(size))


@pytest.mark.parametrize(("messages", "size"), [(4200, 16), (18, 1 << 20)], ids=["messages", "bytes"])
def test_client_that_does_not_read_is_dropped_in_time(middle, messages, size):
    bench = middle(buffer=2048)
    fill(bench, messages, size)
    assert bench.core.finished == 0
    bench.core.loop.turn(0.2)
    assert bench.core.finished == 1 and len(bench.link.closes) == 1
    totals = bench.core.counters.me.totals
    assert (totals["route_drop_queue_full_total"], totals["route_drop_queue_full_high_total"]) == (1, 1)
    assert bench.core.arena.queued == 0


def test_client_that_reads_again_in_time_stays(middle):
    bench = middle(buffer=2048)
    fill(bench, 4200, 16)
    bench.core.loop.turn(0.1)
    while bench.relay.outlet.pending:
        bench.read()
    bench.core.loop.turn(1.0)
    bench.core.loop.turn(1.0)
    assert bench.core.finished == 0 and bench.relay.alarm is None


def test_twice_the_limit_is_not_waited_for(middle):
    bench = middle(buffer=2048)
    fill(bench, 8300, 16)
    assert bench.core.finished == 1


def test_one_large_message_is_always_admitted(middle):
    bench = middle(buffer=2048)
    bench.answer(bytes(17 << 20))
    bench.core.loop.turn(10)
    assert bench.core.finished == 0 and bench.relay.outlet.pending > 16 << 20


def test_of_all_together_the_largest_pays(middle):
    small, large = middle(buffer=2048), middle(buffer=2048)
    small.core.answers.limit = 1 << 20
    fill(small, 2, 100_000)
    fill(large, 12, 100_000)
    assert small.relay.alarm is None and large.relay.alarm is not None
    fill(small, 1, 100_000)
    small.core.loop.turn(0.2)
    assert small.core.finished == 1 and large.relay.stage is telemt.RelayStage.ENDED


def test_a_holding_link_pauses_the_client_and_notices_that_it_left(middle):
    bench = middle()
    bench.link.holding = True
    bench.relay.pace()
    bench.say(frame(b"wait"))
    assert bench.link.messages == []
    bench.link.holding = False
    bench.relay.pace()
    bench.core.loop.settle()
    assert bench.link.messages == [b"wait"]
    bench.link.holding = True
    bench.relay.pace()
    bench.client.close()
    bench.core.loop.settle()
    assert bench.core.finished == 1 and len(bench.link.closes) == 1


def test_alert_record_is_the_end(middle):
    bench = middle(tls=True)
    bench.client.sendall(b"\x15\x03\x03\0\x02\1\0")
    bench.core.loop.settle()
    assert bench.core.finished == 1 and len(bench.link.closes) == 1


def test_bad_record_ends_the_session(middle):
    bench = middle(tls=True)
    bench.client.sendall(b"\x16\x03\x03\0\x02\1\0")
    bench.core.loop.settle()
    assert bench.core.finished == 1


def test_drain_says_goodbye_and_flushes(middle):
    idle, slow = middle(), middle(buffer=2048)
    while not slow.relay.outlet.pending:
        slow.answer(bytes(10_000))
    for bench in (idle, slow):
        bench.relay.drain()
    assert idle.core.finished == 1 and len(idle.link.closes) == len(slow.link.closes) == 1
    while not slow.read()[1]:
        pass
    slow.client.shutdown(1)
    slow.core.loop.settle()
    assert slow.core.finished == 2


def test_idle_session_is_closed_with_a_goodbye(middle):
    bench = middle()
    bench.relay.expire_idle(bench.core.loop.now + 1800)
    assert bench.core.finished == 1 and len(bench.link.closes) == 1


def test_noise_never_repeats_itself():
    noise = telemt.Noise()
    found = [noise.take() for _ in range(3000)]
    assert all(len(part) == 4 for part in found) and len(set(found)) > 2990


@pytest.mark.parametrize("left", [False, True], ids=["stays", "leaves"])
def test_thousands_of_tiny_messages_in_one_read_are_spread_over_turns(middle, left):
    bench = middle(framing=telemt.Abridged)
    bench.relay.inlet.level = 2
    data = b"".join(b"\x01" + number.to_bytes(4, "big") for number in range(10_000))
    bench.client.sendall(bench.ciphers[2].update(data))
    if left:
        bench.client.shutdown(1)
    most, turns = 0, 0
    while len(bench.link.messages) < 10_000 and turns < 100:
        before = len(bench.link.messages)
        bench.core.loop.turn()
        turns += 1
        most = max(most, len(bench.link.messages) - before)
    assert bench.link.messages == [number.to_bytes(4, "big") for number in range(10_000)]
    assert most <= 2 * telemt.FRAMES_AT_ONCE and turns >= 10_000 // (2 * telemt.FRAMES_AT_ONCE)
    bench.core.loop.settle()
    assert bench.core.finished == left and len(bench.link.closes) == left
