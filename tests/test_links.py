"""Room 17: links against the fake middle end, the pool's driver with a planner of the test's own, the directory."""
import errno
import struct
import time
import types

import fake_middle_end as fake
import pytest

import telemt
from telemt import (Beat, Bind, CloseLink, Connected, CutSessions, Directory, Download, DrainLink, GoDirect, Hold, Lost, Meta, OpenLink,
                    Pool, RouteError, Say, ServeWaiters, StableRule, Stream, WakeAt)
from tests.cases import BACKEND, TestLoop, load_vector, settings_of

META = Meta("intermediate", ("10.0.0.9", 4711), ("127.0.0.1", 443), None)
BASE = """
[general]
use_middle_proxy = true
middle_proxy_nat_ip = "127.0.0.1"
"""


class Script:
    """A planner that does what the test put into `todo` and remembers what it was told."""

    def __init__(self):
        self.todo, self.said, self.way = [], [], None
        self.pings = True
        self.dead = False
        self.generation = 1

    def __getattr__(self, name):
        if not name.startswith("on_") and name != "apply":
            raise AttributeError(name)
        return lambda now, *args: self.said.append((name, *args))

    def beat(self, now, link_id, heard):
        self.said.append(("beat", link_id, heard))
        return Beat(self.pings, self.dead, 5.0)

    signal_s = None

    def signal_pause(self, first=False):
        self.said.append(("signal_pause", first))
        return self.signal_s

    def route(self, now, dc, has_direct, waited=False):
        self.said.append(("route", dc, has_direct, waited))
        return self.way(waited) if callable(self.way) else self.way

    def plan(self, now):
        todo, self.todo = self.todo, []
        return todo

    def told(self, name):
        return [args for word, *args in self.said if word == name]


class Session:
    """A session as a link sees it, without a client."""

    def __init__(self, conn_id=7, dc=2):
        self.conn_id, self.dc, self.last_at = conn_id, dc, 0.0
        self.answers, self.acks, self.runs, self.closed, self.held = [], [], 0, None, []

    def on_answer(self, region, at, size):
        self.answers.append(bytes(region.view[at:at + size]))

    def on_ack(self, region, at):
        self.acks.append(bytes(region.view[at:at + 4]))

    def on_run_end(self, region):
        self.runs += 1

    def on_middle_closed(self, region):
        self.closed = "by the middle end" if region is not None else "with the link"

    def pace(self):
        self.held.append(self.link.holding)


class Dials:
    """The upstreams: dials without a cycle."""

    routes = (types.SimpleNamespace(name=lambda: "direct"),)

    def __init__(self, loop):
        self.loop, self.aborted, self.asked = loop, 0, []
        self.deadlines = loop.lane(10, telemt.Dial.on_timeout)
        self.kind, self.bound = "direct", None

    def connect(self, targets, done, *, dc=0, scope="", blame=True):
        self.asked.append((targets, dc, blame))
        self.done = done
        return telemt.Dial(self.loop, *targets[0], self.deadlines,
                           lambda result: done(Connected(result, self.kind, self.bound) if isinstance(result, Stream) else result))


class Rig:
    """A pool on a loop that the test turns."""

    def __init__(self, text=BASE):
        self.loop = TestLoop()
        self.counters = telemt.Counters()
        self.counters.me.level = 2
        self.planner = Script()
        self.dials = Dials(self.loop)
        self.pool = Pool(self.loop, settings_of(text), self.counters, telemt.Arena(BACKEND), self.dials,
                         types.SimpleNamespace(reflected=lambda version: None, me_families=lambda: (4,)),
                         telemt.Origin(BACKEND, telemt.os.urandom, 4321, 1_700_000_000), self.planner)
        self.pool.on_secret(telemt.ProxySecret(fake.SECRET), 1)

    def do(self, *actions):
        self.planner.todo += actions
        self.pool.replan()
        self.loop.turn()

    def until(self, probe, seconds=60.0):
        """Turn with what the other threads send until `probe` holds."""
        end = time.monotonic() + seconds
        while not probe():
            assert time.monotonic() < end, self.planner.said
            if not self.loop.turn():
                time.sleep(0.001)

    def open(self, me, link_id=1):
        self.do(OpenLink(link_id, 2, (me.host, me.port), 1))
        self.until(lambda: [link_id] in self.planner.told("on_link_ready"))
        return self.pool.links[link_id], me.take()

    def bind(self, link, conn_id=7):
        session = Session(conn_id)
        session.link = link
        link.bind(session, META)
        return session

    def request(self, link, data=b"\x11" * 16, conn_id=7, quick=False):
        head = telemt.RequestHead(META.framing, conn_id, META.client, META.ours, META.ad_tag)
        link.push(head.build(data, quick), data)

    def total(self, name):
        return self.counters.me.totals[name]

    def close(self):
        self.pool.close()
        self.loop.turn()
        assert set(self.loop.handlers) == {self.loop.mailbox.fd}
        self.loop.dispose()


@pytest.fixture
def rig():
    found = Rig()
    yield found
    found.close()


@pytest.fixture
def me():
    with fake.FakeMiddleEnd(on_req=fake.echo) as found:
        yield found
        assert found.faults == []


def test_link_comes_up_asks_and_is_answered(rig, me):
    link, far = rig.open(me)
    assert rig.dials.asked == [([(me.host, me.port)], 2, True)]
    session = rig.bind(link)
    rig.request(link, b"\x11" * 40)
    rig.request(link, bytes(8) + b"\x22" * 32)
    rig.until(lambda: len(session.answers) == 2)
    assert session.answers == [b"\x11" * 40, bytes(8) + b"\x22" * 32] and session.runs >= 1
    assert far.hello_flags == 0 and struct.unpack_from("<HHI", far.sender_pid, 4) == (far.peer[1], 4321, 1_700_000_000)
    assert [request.client for request in far.requests] == [META.client] * 2
    assert rig.planner.told("on_bound") == [[1, 2]]


@pytest.mark.parametrize("knobs", [{"coalesce": True}, {"split": 1}, {"split": 7}, {"split": 15}, {"split": 17}, {"split": (44, 16)}],
                         ids=str)
def test_no_byte_is_lost_however_it_arrives(rig, knobs):
    with fake.FakeMiddleEnd(on_req=fake.echo, **knobs) as me:
        link, far = rig.open(me)
        session = rig.bind(link)
        for number in range(20):
            rig.request(link, number.to_bytes(4, "big") * 9, quick=True)
        rig.until(lambda: len(session.answers) == 20)
        assert session.answers == [number.to_bytes(4, "big") * 9 for number in range(20)] and len(session.acks) == 20
        if "coalesce" in knobs:
            rig.until(lambda: 0x7E57 in far.pongs)
        assert me.faults == []


def test_requests_of_one_turn_are_one_write_padded_once(rig, me):
    link, far = rig.open(me)
    rig.bind(link)
    sent = []
    write = link.out.stream.write
    link.out.stream = types.SimpleNamespace(write=lambda data: sent.append(len(data)) or write(data), want=link.stream.want,
                                            loop=rig.loop, mask=0)
    for _ in range(5):
        rig.request(link)
    rig.until(lambda: len(far.requests) == 5)
    assert sent == [(5 * (56 + 16 + 12) + 15) & -16]


@pytest.mark.parametrize(("knobs", "text"), [
    ({"secret": b"\x01" * 64}, "early eof|closed during handshake|reset|Invalid handshake"),
    ({"ts_offset": 31}, "crypto_ts skew too large"),
    ({"corrupt_crc": -2}, "CRC mismatch"), ({"corrupt_crc": -1}, "HS CRC mismatch"), ({"wrong_seq": -2}, "Expected seq=-2, got -1"),
    ({"wrong_seq": -1}, "Expected seq=-1, got 0"), ({"bad_len": -2, "bad_len_value": 11}, "Bad RPC frame length: 11"),
    ({"reply_flags": 0x800}, "Peer negotiated unsupported CRC flags: 0x00000800"), ({"reply_flags": 1}, "Unsupported handshake flags"),
    ({"reply_error": -4}, r"ME rejected handshake \(error=-4\)"), ({"truncate": -2}, "closed during handshake"),
    ({"truncate": -1}, "closed during handshake")], ids=str)
def test_handshake_fault_fails_the_dial_and_says_why(rig, knobs, text, monkeypatch):
    lines = []
    monkeypatch.setattr(telemt.LogBook, "threshold", telemt.Level.DEBUG)
    monkeypatch.setattr(telemt.LogBook, "sink", lambda level, target, line: lines.append(line))
    with fake.FakeMiddleEnd(**knobs) as me:
        rig.do(OpenLink(1, 2, (me.host, me.port), 1))
        rig.until(lambda: rig.planner.told("on_dial_failed") == [[1]])
    assert any(telemt.re.search(text, line) for line in lines), lines
    assert not rig.pool.links and rig.planner.told("on_link_ready") == []
    assert rig.counters.me.error_codes == ({-4: 1} if knobs.get("reply_error") else {})


def test_the_first_dials_are_told_in_one_block(rig, me, monkeypatch):
    """middle-proxy-wire.md 13: once, when all have ended; later dials are not in it."""
    lines = []
    monkeypatch.setattr(telemt.LogBook, "threshold", telemt.Level.INFO)
    monkeypatch.setattr(telemt.LogBook, "sink", lambda level, target, line: lines.append(line))
    shut = fake.doubles.free_port()
    with fake.FakeMiddleEnd(corrupt_crc=-1) as broken:
        rig.do(OpenLink(1, 2, (me.host, me.port), 1), OpenLink(2, -2, (broken.host, broken.port), 1),
               OpenLink(3, 4, ("127.0.0.1", shut), 1))
        rig.until(lambda: rig.planner.told("on_link_ready") and len(rig.planner.told("on_dial_failed")) == 2)
        rig.do(OpenLink(4, 5, (me.host, me.port), 1))
        rig.until(lambda: [4] in rig.planner.told("on_link_ready"))
    text = "\n".join(line for line in lines if "link" not in line)
    assert telemt.re.sub(": 0x.*\\)", ")", telemt.re.sub(r"\d+ ms", "N ms", text)).splitlines() == [
        "================= Telegram ME Connectivity =================", "  IPv4 only / IPv6 unavailable", "  via direct", "=" * 60,
        "    DC2 [IPv4]",
        f"     - 127.0.0.1:{broken.port}\tPing: N ms / RPC: FAIL (bad handshake: HS CRC mismatch)",
        f"     + 127.0.0.1:{me.port}\tPing: N ms / RPC: N ms / OK",
        "    DC4 [IPv4]", f"     + 127.0.0.1:{shut}\tPing: FAIL (io: Connection refused (os error 111))", "=" * 60]


@pytest.mark.parametrize(("error", "connected", "text"), [
    (telemt.RouteError("Connection timeout to 1.2.3.4:8888"), False, "connect timeout"),
    (telemt.RpcError("handshake", "Telegram handshake timeout"), True, "handshake timeout"),
    (telemt.RouteError("Proxy error: SOCKS5 reply 5"), False, "proxy: SOCKS5 reply 5"),
    (telemt.RouteError("no address to make keys of"), True, "crypto: no address to make keys of"),
    (telemt.RouteError("Config error: No upstreams available"), False, "proxy: Config error: No upstreams available"),
    (OSError(104, "Connection reset by peer"), True, "io: Connection reset by peer"), (None, True, "")], ids=str)
def test_reasons_of_the_block(error, connected, text):
    assert telemt._why_not(error, connected) == text


@pytest.mark.parametrize("stage", ["accept", "nonce", "handshake"])
def test_silent_middle_end_is_given_ten_seconds_a_phase(rig, stage):
    with fake.FakeMiddleEnd(mute=stage) as me:
        rig.do(OpenLink(1, 2, (me.host, me.port), 1))
        rig.until(lambda: 1 in rig.pool.links and rig.pool.links[1].shake is not None)
        if stage == "handshake":
            rig.until(lambda: rig.pool.links[1].shake.keyed)
        rig.loop.turn(9.0)
        assert rig.planner.told("on_dial_failed") == []
        rig.loop.turn(1.5)
        assert rig.planner.told("on_dial_failed") == [[1]]


def test_refused_dial_is_reported(rig):
    rig.do(OpenLink(1, 2, ("127.0.0.1", fake.doubles.free_port()), 1))
    rig.until(lambda: rig.planner.told("on_dial_failed") == [[1]])


@pytest.mark.parametrize(("knobs", "counter"), [
    ({"corrupt_crc": 2}, "crc_mismatch_total"), ({"wrong_seq": 2}, "seq_mismatch_total"), ({"replay": 2}, "seq_mismatch_total"),
    ({"bad_len": 2}, None), ({"bad_len": 2, "bad_len_value": 0x7FFFFFFF}, None), ({"truncate": 2}, "reader_eof_total")], ids=str)
def test_fault_on_a_link_ends_it_and_its_sessions_after_the_good_frames(rig, knobs, counter):
    with fake.FakeMiddleEnd(on_req=fake.echo, **knobs) as me:
        rig.planner.pings = False
        link, _far = rig.open(me)
        session, idle = rig.bind(link), rig.bind(link, 8)
        for number in range(3):
            rig.request(link, bytes((number + 1,)) * 16)
        rig.until(lambda: rig.planner.told("on_link_lost"))
        assert rig.planner.told("on_link_lost") == [[1, Lost.EOF if "truncate" in knobs else Lost.ERROR]]
        assert session.closed == idle.closed == "with the link"
        assert session.answers == [b"\1" * 16, b"\2" * 16, b"\3" * 16][:3 if "replay" in knobs else 2]
        assert not rig.pool.links and (counter is None or rig.total(counter) == 1)


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_killed_link_closes_everybody_on_it(rig, me, how):
    link, far = rig.open(me)
    session = rig.bind(link)
    rig.request(link)
    rig.until(lambda: session.answers)
    me.kill_links(how)
    rig.until(lambda: session.closed)
    assert rig.planner.told("on_link_lost") == [[1, Lost.EOF if how == "fin" else Lost.ERROR]]
    assert (rig.total("reader_eof_total"), rig.total("idle_close_by_peer_total")) == ((1, 0) if how == "fin" else (0, 0))


def test_idle_link_closed_by_its_peer_is_counted_so(rig, me):
    rig.open(me)
    me.kill_links("fin")
    rig.until(lambda: not rig.pool.links)
    assert (rig.total("reader_eof_total"), rig.total("idle_close_by_peer_total")) == (1, 1)


def test_a_program_that_leaves_keeps_its_links_for_those_who_shake_hands(rig, me):
    """It closed idle ones at once and did not tell the planner, which then sent late sessions to a link that was gone: KeyError."""
    busy, idle = rig.open(me, 1)[0], rig.open(me, 2)[0]
    rig.bind(busy)
    rig.pool.retire()
    rig.loop.turn(29.0)                        # a client that was accepted last has 30
    assert set(rig.pool.links) == {1, 2} and idle.stream is not None
    rig.loop.turn(1.5)
    assert set(rig.pool.links) == {1} and idle.stream is None and rig.planner.told("on_link_lost") == [[2, Lost.EOF]]


def test_closes_from_the_middle_end_and_strays(rig, me):
    link, far = rig.open(me)
    session = rig.bind(link)
    rig.request(link)
    rig.until(lambda: session.answers)
    far.send(fake.close_ext(7), fake.answer(99, b"for nobody......"))
    rig.until(lambda: far.closes or far.strays)
    assert session.closed == "by the middle end" and rig.planner.told("on_unbound") == [[1, 2]]
    assert rig.total("route_drop_no_conn_total") == 1 and far.strays == [99] and far.closes == [(99, "conn")]
    far.send(fake.answer(99, b"again for nobody"))             # said once is enough
    far.send(fake.close_conn(12345), struct.pack("<I", 0x01020304) + bytes(20), b"")      # nobody's close, unknown, empty
    far.send(fake.ping(5))
    rig.until(lambda: 5 in far.pongs)
    assert link.stream is not None and len(far.closes) == 1 and rig.total("route_drop_no_conn_total") == 2


def test_a_flood_of_answers_for_nobody_costs_no_search(rig, me):
    """Each unknown id is told once; the list of those told is short and asked in one step."""
    link, far = rig.open(me)
    rig.bind(link)
    far.send(*(fake.answer(1000 + number, b"XXXX") for number in range(5000)))
    rig.until(lambda: rig.total("route_drop_no_conn_total") == 5000)
    far.send(*(fake.answer(5999, b"XXXX") for _ in range(500)))
    rig.until(lambda: rig.total("route_drop_no_conn_total") == 5500)
    rig.until(lambda: len(me.closes()) == 5000)
    assert 1024 <= len(link.told) <= 2048 and 5999 in link.told and link.bound


def test_a_link_forgets_the_sessions_that_it_has_closed(rig, me):
    """It remembered 1,024 ids for its whole life: 77 KB a link, which looked like a leak of 120 bytes per connection."""
    link, far = rig.open(me)
    for number in range(500):
        session = rig.bind(link, 100 + number)
        link.push_close(session.conn_id)
        link.unbind(session)
    rig.until(lambda: len(far.closes) == 500)
    assert len(link.told) == 500 and 100 in link.told
    link.beat()
    assert len(link.told) == 500 and 100 in link.told          # its answers may be under way
    link.push_close(9)
    link.beat()
    assert 100 not in link.told and 9 in link.told and len(link.told) == 1
    link.beat()
    assert not link.told and not link.bound


def test_a_read_is_decrypted_in_one_call_whatever_frames_it_holds(rig):
    with fake.FakeMiddleEnd(on_req=fake.echo, coalesce=True) as me:
        link, far = rig.open(me)
        session = rig.bind(link)
        calls, reads, real, read = [], [], link.inlet.decryptor, link.inlet.stream.read_into
        link.inlet.decryptor = types.SimpleNamespace(crypt=lambda *args: (calls.append(args[-1]), real.crypt(*args)))
        link.inlet.stream = types.SimpleNamespace(read_into=lambda *args: (reads.append(read(*args)), reads[-1])[1])
        far.send(*[fake.answer(7, bytes(1000))] * 500)
        rig.until(lambda: len(session.answers) == 500)
        assert len(calls) <= len([size for size in reads if size > 0]) < 100 and sum(calls) >= 500 * 1028


class WatchedReader(telemt.FrameReader):
    """Notes what each read cost."""

    def __init__(self, like):
        super().__init__(like.seq, like.checksum)
        self.costs = []

    def spans(self, view, at, end):
        found = super().spans(view, at, end)
        self.costs.append(self.steps)
        return found


class Plenty:
    """A stream that always has as much as is asked for, up to the end of `data`."""

    def __init__(self, data):
        self.data, self.at, self.asked = memoryview(data), 0, []

    def read_into(self, view, quantum):
        self.asked.append(quantum)
        size = min(quantum, len(self.data) - self.at)
        view[:size] = self.data[self.at:self.at + size]
        self.at += size
        return size


@pytest.mark.parametrize("size", [20_000, 65_536, 131_072, 200_000, 500_000, 600_000])
def test_bulk_is_read_up_to_just_behind_a_frame(size, rng):
    """What is left of a frame at the end of a read is copied twice: with frames of 64 KiB it was a quarter of everything."""
    payloads = [rng.randbytes(size) for _ in range(5_000_000 // size)]
    writer, key = telemt.FrameWriter(0), (bytes(32), bytes(16))
    plain = b"".join([(frame := writer.frame(payload)) + telemt.padding(len(frame)) for payload in payloads])
    stream = Plenty(BACKEND.cbc_encryptor(*key).update(plain))
    shake = types.SimpleNamespace(decryptor=BACKEND.cbc_decryptor(*key), checksum=telemt.binascii.crc32, take_rest=lambda: (b"", b""))
    inlet, found, kept = telemt.LinkIn(telemt.Arena(BACKEND), BACKEND, stream, shake), [], []
    while (result := inlet.run()) is not None:
        region, spans = result
        found += [bytes(region.view[at:at + length]) for at, length in spans]
        kept.append(len(inlet._plain))
    assert found == payloads and inlet.reader.failed is None
    if size < 512 << 10:                       # larger ones are put together elsewhere
        bulk = [keeps for keeps, asked in zip(kept, stream.asked, strict=False) if asked > 100_000][2:]
        assert len(bulk) > 3 and max(bulk) <= 256 and max(stream.asked) <= 600_000


@pytest.mark.parametrize("flood", ["answers", "pings", "padding"])
def test_tiny_frames_make_reads_small(rig, flood):
    """What a turn costs depends on the number of frames: bulk is read in bulk, a flood of tiny frames 16 KiB at a time."""
    with fake.FakeMiddleEnd(on_req=fake.echo, coalesce=True) as me:
        link, far = rig.open(me)
        session = rig.bind(link)
        link.inlet.reader = reader = WatchedReader(link.inlet.reader)
        many = {"answers": [fake.answer(7, b"XXXX")] * 10_000, "pings": [struct.pack("<Iq", fake.PING, 5)] * 10_000}
        far.send(*[fake.answer(7, bytes(65_536))] * 40)
        rig.until(lambda: len(session.answers) == 40)
        assert link.inlet.level >= 1
        del reader.costs[:]
        for _ in range(5):
            if flood == "padding":
                with far._write:
                    far._push(far.wire.seal(b"\4\0\0\0" * 40_000))
            else:
                far.send(*many[flood])
            rig.loop.settle()
        far.send(fake.answer(7, b"last"))
        rig.until(lambda: session.answers[-1] == b"last", 60)
        most = {"answers": 28, "pings": 24, "padding": 4}[flood]
        small = [cost for cost in reader.costs if cost <= 16_384 // most + 2]
        assert len(reader.costs) - len(small) <= 2, sorted(reader.costs)[-5:]       # those before it was known what comes
        far.send(*[fake.answer(7, bytes(65_536))] * 40)
        rig.until(lambda: len(session.answers[-1]) == 65_536 and link.inlet.level >= 1)


def test_ping_and_pong(rig, me):
    link, far = rig.open(me)
    rig.until(lambda: rig.planner.told("on_pong"))
    assert rig.planner.told("on_pong")[0][0] == 1 and far.pings == 1
    assert (rig.total("keepalive_sent_total"), rig.total("keepalive_pong_total")) == (1, 1)
    rig.loop.turn(5.0)
    assert rig.planner.told("beat") == [[1, True], [1, True]]
    rig.until(lambda: far.pings == 2)


def test_pings_that_nobody_answers_are_forgotten_after_two_minutes(rig, me):
    me.mute = "pong"
    rig.open(me)
    for _ in range(30):
        rig.loop.turn(5.0)
    assert rig.total("keepalive_timeout_total") == 6 and rig.total("keepalive_pong_total") == 0
    assert rig.planner.told("beat")[-1] == [1, False]


def test_planner_says_dead(rig, me):
    rig.open(me)
    rig.planner.dead = True
    rig.loop.turn(5.0)
    rig.loop.turn()
    assert rig.planner.told("on_link_lost") == [[1, Lost.SILENT]] and not rig.pool.links


def test_frame_larger_than_the_arena(rig, me):
    link, _far = rig.open(me)
    session = rig.bind(link)
    data = telemt.os.urandom(3 << 20)
    me.on_req = lambda link, flags, conn_id, *rest: [fake.answer(conn_id, part) for part in (data, data[:64], data)]
    rig.request(link)
    rig.until(lambda: len(session.answers) == 3, 30)
    assert session.answers == [data, data[:64], data]


def test_middle_end_that_does_not_read_pauses_clients_until_it_does(rig, me):
    link, far = rig.open(me)
    session = rig.bind(link)
    me.deaf.set()
    me.on_req = lambda *_: []
    data = b"\x33" * 65_536
    sent = 0
    while not session.held and sent < 1000:
        rig.request(link, data)
        rig.loop.turn()
        sent += 1
    assert (telemt.LINK_HIGH, telemt.LINK_LOW) == (4 << 20, 1 << 20), "middle-proxy-wire.md D15"
    assert session.held == [True] and telemt.LINK_HIGH < link.out.queued < telemt.LINK_HIGH + (1 << 20)
    late = rig.bind(link, 9)
    assert late.held == [True]
    far.send(fake.ping(77))                    # its answer overtakes what is queued
    me.deaf.clear()
    rig.until(lambda: session.held == [True, False] and len(far.requests) == sent, 30)
    rig.until(lambda: 77 in far.pongs)
    pong = [kind for _, kind in far.messages].index(fake.PONG)
    assert pong < sent - 20 and late.held == [True, False]


def test_activity_signals(rig, me):
    rig.planner.signal_s = 20.0
    link, far = rig.open(me)
    assert rig.planner.told("signal_pause") == [[True]]
    rig.loop.turn(20.0)                        # nobody was ever here
    assert rig.total("rpc_proxy_req_signal_skipped_no_meta_total") == 1 and rig.planner.told("signal_pause")[-1] == [False]
    session = rig.bind(link)
    rig.request(link)
    rig.until(lambda: session.answers)
    rig.loop.turn(20.0)
    rig.until(lambda: far.closes)
    signal = far.requests[-1]
    assert (signal.data, signal.client, signal.flags) == (b"", META.client, 0x20021000) and far.closes == [(signal.conn_id, "conn")]
    assert [rig.total(f"rpc_proxy_req_signal_{word}_total") for word in ("sent", "response", "close_sent", "failed")] == [1, 1, 1, 0]
    me.on_req = lambda *_: []                  # this one is not answered
    rig.loop.turn(20.0)
    rig.until(lambda: len(far.requests) == 3)
    rig.loop.turn(0.8)
    rig.until(lambda: len(far.closes) == 2)
    assert [rig.total(f"rpc_proxy_req_signal_{word}_total") for word in ("sent", "response", "close_sent", "failed")] == [2, 1, 2, 0]
    assert rig.planner.told("on_bound") == [[1, 2]] and rig.planner.told("on_unbound") == [] and session.closed is None
    assert rig.total("route_drop_no_conn_total") == 0


# -- the driver

def test_actions(rig, me):
    link, far = rig.open(me)
    sessions = [rig.bind(link, conn_id) for conn_id in (1, 2, 3)]
    for session, at in zip(sessions, (30.0, 10.0, 20.0), strict=True):
        session.last_at = at
        rig.request(link, conn_id=session.conn_id)
    rig.until(lambda: all(session.answers for session in sessions))
    rig.do(DrainLink(1, 99.0), telemt.PromoteLink(1), Say(telemt.Level.INFO, "text"), CutSessions(1, 2))
    assert [session.closed for session in sessions] == [None, "with the link", "with the link"]
    rig.until(lambda: len(far.closes) == 2)
    assert far.closes == [(2, "conn"), (3, "conn")]
    rig.do(CloseLink(1), CloseLink(1), CutSessions(1, 2))
    assert sessions[0].closed == "with the link" and not rig.pool.links and rig.planner.told("on_link_lost") == []


def test_wake_asks_again_once(rig):
    asked = []
    rig.planner.plan = lambda now: asked.append(now) or [WakeAt(now + 5)]
    rig.pool.replan()
    rig.loop.turn()
    before = len(asked)
    rig.loop.turn(4.0)
    assert len(asked) == before
    rig.loop.turn(1.5)
    rig.loop.turn()
    assert len(asked) == before + 1


def test_closing_a_link_that_is_being_dialled(rig, me):
    me.mute = "nonce"
    rig.do(OpenLink(1, 2, (me.host, me.port), 1), OpenLink(2, 2, (me.host, me.port), 1))
    rig.until(lambda: rig.pool.links[1].shake is not None)
    rig.do(CloseLink(1), CloseLink(2))
    rig.loop.turn(30.0)
    assert rig.planner.told("on_dial_failed") == []


def test_waiting_sessions_are_served_in_order_or_told_in_time(rig):
    ways = []
    rig.planner.way = lambda waited: GoDirect() if waited else Hold(2, rig.loop.now + 3)
    for name in "abc":
        rig.pool.wait(rig.pool.route(-2, True), -2, True, lambda way, name=name: ways.append((name, way)))
    gone = rig.pool.wait(rig.pool.route(-2, True), -2, True, lambda way: ways.append(("gone", way)))
    rig.pool.bindings.leave(gone)
    rig.planner.way = Bind(1)
    rig.do(ServeWaiters(4))
    assert ways == []
    answers = iter([Bind(1), Hold(2, rig.loop.now + 3)])
    rig.planner.way = lambda waited: GoDirect() if waited else next(answers)
    rig.do(ServeWaiters(2))
    assert ways == [("a", Bind(1))]
    rig.loop.turn(3.5)
    assert ways[1:] == [("b", GoDirect()), ("c", GoDirect())] and rig.pool.bindings.queues == {}
    assert rig.planner.told("route")[-1] == [-2, True, True]


def test_connection_ids_are_odd_at_first_and_never_repeat():
    bindings = telemt.Bindings((1 << 64) - 2)
    found = [bindings.new_id() for _ in range(4)]
    assert len(set(found)) == 4 and all(0 <= conn_id < 1 << 64 for conn_id in found)


def test_crash_of_a_session_costs_neither_its_link_nor_the_others(rig, me):
    link, _far = rig.open(me)
    bad, good = rig.bind(link, 7), rig.bind(link, 8)

    def boom(region):
        raise ZeroDivisionError
    bad.on_run_end = boom
    rig.request(link, conn_id=7)
    rig.request(link, conn_id=8)
    rig.until(lambda: good.answers)
    assert 1 in rig.pool.links


# -- keys behind SOCKS

@pytest.mark.parametrize("policy", ["strict", "compat"])
def test_socks_without_a_usable_address(me, policy):
    rig = Rig(BASE + f'me_socks_kdf_policy = "{policy}"\n')
    rig.dials.kind = "socks5"
    if policy == "compat":
        rig.open(me)
        assert rig.total("socks_kdf_compat_fallback_total") == 1
    else:
        rig.do(OpenLink(1, 2, (me.host, me.port), 1))
        rig.until(lambda: rig.planner.told("on_dial_failed"))
        assert rig.total("socks_kdf_strict_reject_total") == 1
    rig.close()


@pytest.mark.parametrize(("kind", "bound", "local", "reflected", "ip", "port"), [
    ("direct", None, "10.0.0.5", "203.0.113.9", "203.0.113.9", 4711),
    ("direct", None, "198.18.5.5", None, "198.18.5.5", 4711),
    ("direct", None, "8.8.4.4", "203.0.113.9", "8.8.4.4", 4711),
    ("direct", None, "::ffff:10.0.0.5", "5.9.9.9", "5.9.9.9", 4711),
    ("socks5", ("5.9.8.7", 999), "10.0.0.5", "203.0.113.9", "5.9.8.7", 999),
    ("socks4", ("10.1.1.1", 999), "10.0.0.5", "203.0.113.9", "", 0)])
def test_what_is_known_of_our_address_enters_the_keys(kind, bound, local, reflected, ip, port):
    """middle-proxy-wire.md D4: the address that STUN saw, our own if it is public, what a SOCKS server says it sends from."""
    rig = Rig("[general]\nuse_middle_proxy = true\n")
    rig.pool.network.reflected = lambda version: reflected if version == 4 else None
    connected = Connected(types.SimpleNamespace(local_address=lambda: (local, 4711)), kind, bound)
    if not ip:
        with pytest.raises(RouteError, match="strict policy"):
            rig.pool.choose_ends(("149.154.175.50", 8888), connected)
        assert rig.total("socks_kdf_strict_reject_total") == 1
    else:
        ends = rig.pool.choose_ends(("149.154.175.50", 8888), connected)
        assert ends[:4] == (ip, port, "149.154.175.50", 8888)
    rig.close()


def test_nat_address_enters_the_keys():
    with fake.FakeMiddleEnd(client_ip_for_kdf="51.15.1.1", on_req=fake.echo) as me:
        rig = Rig(BASE.replace("127.0.0.1", "51.15.1.1"))
        rig.open(me)
        assert rig.pool.our_ip("10.0.0.1") == "51.15.1.1"
        rig.close()


def test_castagnoli_is_offered_where_it_is_native_and_used_both_ways(me, rig):
    """middle-proxy-wire.md D5."""
    rig.pool.origin = rig.pool.origin._replace(native_crc32c=telemt.crc32c)
    link, far = rig.open(me)
    assert far.hello_flags == telemt.FLAG_CRC32C
    session = rig.bind(link)
    for size in (16, 100_000):
        rig.request(link, b"\x11" * size)
    rig.until(lambda: len(session.answers) == 2)
    assert [len(answer) for answer in session.answers] == [16, 100_000]


def test_link_over_ipv6():
    with fake.FakeMiddleEnd(host="::1", on_req=fake.echo) as me:
        rig = Rig(BASE)
        link, _far = rig.open(me)
        session = rig.bind(link)
        rig.request(link)
        rig.until(lambda: session.answers)
        rig.close()


# -- the directory

@pytest.mark.parametrize("case", load_vector("middle-proxy")["stable_snapshots"], ids=lambda case: case["name"])
def test_stable_snapshots(case):
    rule, applied_at, now, found = StableRule(), float("-inf"), 0, []
    for content in case["snapshots"]:
        verdict = "fetch_failed" if content is None else rule.see(content, case["stable_snapshots"])
        if verdict == "ready":
            verdict = "deferred_by_cooldown" if now - applied_at < case["cooldown_secs"] else "apply"
            if verdict == "apply":
                rule.applied, applied_at = content, now
        found.append(verdict)
        now += case["interval_secs"]
    assert found == case["expect"]


class World:
    """A directory whose downloads the test answers."""

    def __init__(self, folder, text="", families=(4,)):
        self.loop = TestLoop()
        self.asked = []
        self.pool = types.SimpleNamespace(secret=telemt.ProxySecret(b""), secrets=[], maps=[], network=self)
        self.forgiven = 0
        self.pool.on_secret = self.on_secret
        self.pool.on_map = lambda v4, v6, default: self.pool.maps.append((dict(v4), dict(v6), default))
        settings = settings_of(f'[general]\nproxy_secret_path = "{folder}/secret"\nproxy_config_v4_cache_path = "{folder}/c/v4"\n'
                               f'proxy_config_v6_cache_path = "{folder}/c/v6"\n' + text)
        self.directory = Directory(self.loop, settings, self.fetch, families, self.pool)

    def on_secret(self, secret, epoch):
        self.pool.secret = secret
        self.pool.secrets.append((secret.data, epoch))

    def fetch(self, url, limit, done):
        self.asked.append((url, done))

    def forgive(self):
        self.forgiven += 1

    def answer(self, what, result):
        """Answer the oldest download whose URL ends so."""
        url, done = next(pair for pair in self.asked if pair[0].endswith(what))
        self.asked.remove((url, done))
        done(result if isinstance(result, Exception) else Download(*result) if isinstance(result, tuple) else Download(200, result))

    def settle(self, probe, seconds=60.0):
        end = time.monotonic() + seconds
        while not probe():
            assert time.monotonic() < end
            self.loop.turn()
            time.sleep(0.001)


SECRET_A, SECRET_B = bytes(range(128)), bytes(range(64, 192))
LIST_A, LIST_B = b"default 2;\nproxy_for 2 1.1.1.1:80;\n", b"default 2;\nproxy_for 2 2.2.2.2:80;\n"


def test_start_downloads_uses_and_caches(tmp_path):
    world = World(tmp_path, families=(4, 6))
    world.directory.start()
    assert [url for url, _ in world.asked] == [telemt.SECRET_URL, telemt.LIST_URLS[4], telemt.LIST_URLS[6]]
    world.answer("getProxySecret", SECRET_A)
    world.answer("getProxyConfig", LIST_A)
    assert world.pool.secrets == [(SECRET_A, 1)] and world.pool.maps == []
    world.answer("getProxyConfigV6", (404, b"", None))
    world.settle(lambda: world.pool.maps)
    assert world.pool.maps == [({2: (("1.1.1.1", 80),)}, dict(telemt.builtin_list(6).endpoints), 2)]
    world.settle(lambda: (tmp_path / "secret").exists() and (tmp_path / "c" / "v4").exists())
    assert (tmp_path / "secret").read_bytes() == SECRET_A and (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "c" / "v4").read_bytes() == LIST_A and not (tmp_path / "c" / "v6").exists()


def test_without_network_the_cache_files_serve(tmp_path):
    (tmp_path / "secret").write_bytes(SECRET_B)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "v4").write_bytes(LIST_B)
    world = World(tmp_path)
    world.directory.start()
    world.answer("getProxySecret", OSError(errno.ENETUNREACH, "no"))
    world.answer("getProxyConfig", RouteError("no"))
    world.settle(lambda: world.pool.secrets and world.pool.maps)
    assert world.pool.secrets == [(SECRET_B, 1)] and world.pool.maps == [({2: (("2.2.2.2", 80),)}, {}, 2)]


def test_without_the_ssl_module_one_line_says_what_cannot_be_downloaded(tmp_path, logged):
    """platform.md 2."""
    world = World(tmp_path, families=(4, 6))
    world.directory.start()
    for name in ("getProxySecret", "getProxyConfig", "getProxyConfigV6"):
        world.answer(name, ModuleNotFoundError("No module named '_ssl'", name="_ssl"))
    world.settle(lambda: world.pool.maps)
    said = [line for level, line in logged if level is telemt.Level.WARN and "built-in" not in line]
    assert said == ["no ssl module: proxy-secret and getProxyConfig cannot be downloaded (OpenWrt: python3-openssl ca-certificates)"]


@pytest.mark.parametrize("cached", [None, b"short", bytes(300)])
def test_without_any_secret_it_is_tried_again_and_again(tmp_path, cached):
    if cached is not None:
        (tmp_path / "secret").write_bytes(cached)
    world = World(tmp_path)
    world.directory.start()
    for wait_s in (5, 10, 20, 40, 80, 160, 300, 300):
        world.answer("getProxySecret", (500, b"x" * 64, None))
        world.settle(lambda: len(world.loop._timers) >= 2)          # the cache file was judged: the next attempt is armed
        world.loop.turn(wait_s - 0.5)
        assert not [url for url, _ in world.asked if url.endswith("Secret")]
        world.loop.turn(1.0)
    world.answer("getProxySecret", SECRET_A)
    assert world.pool.secrets == [(SECRET_A, 1)]


def started(tmp_path, text=""):
    world = World(tmp_path, text)
    world.directory.start()
    world.answer("getProxySecret", SECRET_A)
    world.answer("getProxyConfig", LIST_A)
    world.settle(lambda: (tmp_path / "secret").exists() and (tmp_path / "c" / "v4").exists())
    world.pool.maps.clear()
    world.pool.secrets.clear()
    return world


def cycle(world, listed, secret=SECRET_A, seconds=300):
    world.loop.turn(seconds)
    world.answer("getProxyConfig", listed)
    if any(url.endswith("getProxySecret") for url, _ in world.asked):
        world.answer("getProxySecret", secret)


def test_a_new_list_counts_the_second_time_and_the_startup_one_never_again(tmp_path):
    world = started(tmp_path)
    cycle(world, LIST_A)
    cycle(world, LIST_A)
    assert world.pool.maps == []
    cycle(world, LIST_B)
    assert world.pool.maps == []
    cycle(world, LIST_B)
    assert world.pool.maps == [({2: (("2.2.2.2", 80),)}, {}, 2)] and world.forgiven == 4
    world.settle(lambda: (tmp_path / "c" / "v4").read_bytes() == LIST_B)
    cycle(world, b"default 2;\nproxy_for 2 3.3.3.3:80;")
    cycle(world, b"proxy_for 2 3.3.3.3:80;default 2")
    assert world.pool.maps[1:] == [({2: (("3.3.3.3", 80),)}, {}, 2)]


@pytest.mark.parametrize("rotates", [True, False])
def test_the_secret_is_asked_for_again_only_where_that_is_wanted(tmp_path, rotates):
    """middle-proxy-wire.md 2.4 step 7."""
    world = started(tmp_path, f"proxy_secret_rotate_runtime = {str(rotates).lower()}\n")
    world.loop.turn(300)
    world.answer("getProxyConfig", LIST_A)
    assert [url for url, _ in world.asked] == [telemt.SECRET_URL] * rotates


def test_a_list_that_cannot_be_had_is_asked_for_three_times(tmp_path, logged):
    """middle-proxy-wire.md 2.4: pauses of 1 s and 5 s, and one warning."""
    world = started(tmp_path)
    world.loop.turn(300)
    for pause_s in (1.0, 5.0):
        world.answer("getProxyConfig", OSError(errno.ENETUNREACH, "no"))
        world.loop.turn(pause_s - 0.1)
        assert world.asked == []
        world.loop.turn(0.2)
    assert not [line for level, line in logged if level is telemt.Level.WARN]
    world.answer("getProxyConfig", OSError(errno.ENETUNREACH, "no"))
    assert [line for level, line in logged if level is telemt.Level.WARN] == [
        f"fetch_proxy_config failed family=4 error=IO error: no (os error {errno.ENETUNREACH})"]
    assert [url for url, _ in world.asked] == [telemt.SECRET_URL] and world.pool.maps == []


@pytest.mark.parametrize(("skew_s", "said"), [(30, ""), (31, ">30s"), (-31, ">30s"), (60, ">30s"), (61, ">60s"), (-86_400, ">60s")])
def test_a_clock_that_is_off_is_said(tmp_path, monkeypatch, logged, skew_s, said):
    """middle-proxy-wire.md 2.1: never fatal."""
    monkeypatch.setattr(telemt.time, "time", lambda: 1_760_000_000.0)
    world = World(tmp_path)
    world.directory.start()
    world.answer("getProxySecret", (200, SECRET_A, 1_760_000_000.0 - skew_s))
    lines = [line for level, line in logged if level is telemt.Level.WARN]
    assert len(lines) == bool(said) and all(line.startswith(f"Time skew {said}") for line in lines)
    assert world.pool.secrets == [(SECRET_A, 1)]


def test_a_list_without_end_is_cut_and_said_so(tmp_path, monkeypatch):
    """Each endpoint gets a link or three: a list of 30,000 must not take every descriptor."""
    lines = []
    monkeypatch.setattr(telemt.LogBook, "threshold", telemt.Level.INFO)
    monkeypatch.setattr(telemt.LogBook, "sink", lambda level, target, line: lines.append(line))
    world = World(tmp_path)
    world.directory.start()
    text = "".join(f"proxy_for {dc} 10.{dc >> 8}.{dc & 255}.{n}:80;\n" for dc in range(1, 1001) for n in range(1, 31))
    world.answer("getProxyConfig", text.encode())
    (v4, _, _), = world.pool.maps
    assert sum(map(len, v4.values())) == telemt.LIST_ENDPOINTS_MAX and len(v4) == 5
    assert any("proxy list cut: only its first 128 endpoints count" in line for line in lines)


def test_cooldown_keeps_the_candidate(tmp_path):
    world = started(tmp_path, "me_config_apply_cooldown_secs = 1000\nme_config_stable_snapshots = 1\n")
    cycle(world, LIST_B)
    assert len(world.pool.maps) == 1
    for count in (1, 1, 1, 2):
        cycle(world, LIST_A)
        assert len(world.pool.maps) == count


@pytest.mark.parametrize("bad", [(503, LIST_B, None), (200, b"<html>", None), (200, b"", None), RouteError("no")], ids=str)
def test_rejected_lists_leave_everything_as_it_is(tmp_path, bad):
    world = started(tmp_path, "me_config_stable_snapshots = 1\n")
    world.loop.turn(300)
    for pause in (1, 5, 0) if isinstance(bad, Exception) else (0,):
        world.answer("getProxyConfig", bad)
        world.loop.turn(pause)
    world.answer("getProxySecret", SECRET_A)
    assert world.pool.maps == [] and world.directory.lists[4].endpoints == {2: (("1.1.1.1", 80),)}
    cycle(world, LIST_B)
    assert len(world.pool.maps) == 1


def test_a_status_may_be_ignored_but_not_at_start(tmp_path):
    world = started(tmp_path, "me_config_stable_snapshots = 1\nme_snapshot_require_http_2xx = false\n")
    cycle(world, (503, LIST_B, None))
    assert len(world.pool.maps) == 1


def test_a_new_secret_counts_the_second_time(tmp_path):
    world = started(tmp_path)
    cycle(world, LIST_A, SECRET_B)
    assert world.pool.secrets == []
    cycle(world, LIST_A, (500, SECRET_B, None))
    assert world.pool.secrets == []
    cycle(world, LIST_A, SECRET_B)
    assert world.pool.secrets == [(SECRET_B, 2)]
    world.settle(lambda: (tmp_path / "secret").read_bytes() == SECRET_B)


def test_secret_stays_when_rotation_is_off(tmp_path):
    world = started(tmp_path, "proxy_secret_rotate_runtime = false\n")
    cycle(world, LIST_A)
    assert world.asked == []


def test_a_shorter_period_runs_at_once_a_longer_one_waits(tmp_path):
    world = started(tmp_path)
    general = world.directory.general
    world.directory.apply(types.SimpleNamespace(general=general.but(update_every=100)))
    assert len(world.asked) == 1
    world.answer("getProxyConfig", LIST_A)
    world.answer("getProxySecret", SECRET_A)
    world.directory.apply(types.SimpleNamespace(general=general.but(update_every=1000)))
    world.loop.turn(990)
    assert world.asked == []
    world.loop.turn(20)
    assert len(world.asked) == 1


def test_http_date():
    assert telemt.parse_http_date("Tue, 15 Nov 1994 08:12:31 GMT") == 784887151.0
    for text in ("", "Tue, 15 Nov 1994 08:12:31 CET", "Tue, 15 Foo 1994 08:12:31 GMT", "Tue, 99 Nov 1994 08:12:31 GMT", "now",
                 "Tue, 15 Nov 99999999999999999999 08:12:31 GMT", f"Tue, {'1' * 5000} Nov 1994 08:12:31 GMT"):
        assert telemt.parse_http_date(text) is None


def test_downloads_end_to_end():
    loop = TestLoop()
    with fake.MeWorld({2: 1}) as world:
        found = []
        downloads = telemt.Downloads(loop, Dials(loop))
        downloads.fetch(world.site.url("/getProxySecret"), 1000, found.append)
        downloads.fetch(world.site.url("/nothing"), 1000, found.append)
        downloads.fetch(world.site.url("/getProxySecret"), 100, found.append)
        downloads.fetch(f"http://127.0.0.1:{fake.doubles.free_port()}/", 100, found.append)
        end = time.monotonic() + 60
        while len(found) < 4 and time.monotonic() < end:
            loop.turn()
            time.sleep(0.001)
    good = [answer for answer in found if isinstance(answer, Download)]
    assert sorted((answer.status, len(answer.body)) for answer in good if answer.status == 200) == [(200, 128)]
    assert abs(next(answer for answer in good if answer.status == 200).date_wall - time.time()) < 60
    assert [answer.status for answer in good if answer.status != 200] == [404] and len([e for e in found if isinstance(e, Exception)]) == 2
    loop.dispose()


def test_cache_file_that_is_no_file(tmp_path):
    with pytest.raises(OSError):
        telemt.read_small_file(str(tmp_path), 100)
    telemt.os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError):
        telemt.read_small_file(str(tmp_path / "fifo"), 100)
    (tmp_path / "big").write_bytes(bytes(101))
    with pytest.raises(OSError):
        telemt.read_small_file(str(tmp_path / "big"), 100)
