"""The double of the middle end: an independent little client proves that it keeps its side, and that each misbehaviour happens."""
from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import doubles
import fake_middle_end as fake
from fake_middle_end import FakeMiddleEnd, MeSite, MeWorld

VECTORS = json.loads((Path(__file__).parent / "vectors" / "middle-proxy.json").read_text())
BASE = 0x20021000           # intermediate, no tag


def reversed_crc32c(data: bytes) -> int:
    """Castagnoli bit by bit over the reversed message, unlike the table of the double."""
    value = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            value = value >> 1 ^ (0x82F63B78 if (value ^ byte >> bit) & 1 else 0)
    return value ^ 0xFFFFFFFF


class LittleClient:
    """The least that can talk to a middle end; raises EOFError at the end of the stream."""

    def __init__(self, me: FakeMiddleEnd, *, flags: int = 0, secret: bytes = fake.SECRET, clock: float = 0.0, ip: str = "",
                 pad_nonce: bool = False, hello: bytes = b"") -> None:
        self.sock = socket.create_connection((me.host, me.port), 60)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.inbox, self.raw = bytearray(), bytearray()
        self.open = self.shut = None
        self.sum = zlib.crc32
        self.sent, self.got = -2, -2
        nonce, ts = os.urandom(16), int(time.time() + clock)
        self.put(struct.pack("<I4sII16s", 0x7ACB87AA, secret[:4], 1, ts, nonce), tail=b"\x04\0\0\0" if pad_nonce else b"")
        kind, selector, schema, self.server_ts, self.server_nonce = struct.unpack("<I4sII16s", self.get())
        assert (kind, selector, schema) == (0x7ACB87AA, secret[:4], 1)
        mine, theirs = self.sock.getsockname()[:2], self.sock.getpeername()[:2]
        mine = (ip or mine[0], mine[1])
        keys = []
        for purpose in (b"CLIENT", b"SERVER"):
            if ":" in me.host:
                inner = [socket.inet_pton(socket.AF_INET6, host) for host in (mine[0], theirs[0])]
                text = (self.server_nonce + nonce + ts.to_bytes(4, "little") + bytes(4) + mine[1].to_bytes(2, "little") + purpose + bytes(4)
                        + theirs[1].to_bytes(2, "little") + secret + self.server_nonce + inner[0] + inner[1] + nonce)
            else:
                quad = [bytes(int(part) for part in reversed(host.split("."))) for host in (mine[0], theirs[0])]
                text = (self.server_nonce + nonce + ts.to_bytes(4, "little") + quad[1] + mine[1].to_bytes(2, "little") + purpose + quad[0]
                        + theirs[1].to_bytes(2, "little") + secret + self.server_nonce + nonce)
            key = hashlib.md5(text[1:]).digest()[:12] + hashlib.sha1(text).digest()
            keys.append(Cipher(algorithms.AES(key), modes.CBC(hashlib.md5(text[2:]).digest())))
        self.open, self.shut = keys[1].decryptor(), keys[0].encryptor()
        early, self.inbox = bytes(self.inbox), bytearray()
        self.take(early)
        self.pid = struct.pack("<4sHHI", bytes(4), mine[1], 77, 1_700_000_000)
        self.put(hello or struct.pack("<II", 0x7682EEF5, flags) + self.pid + bytes(12))
        reply = self.get()
        self.reply = struct.unpack_from("<Ii", reply)
        if self.reply[0] == 0x7682EEF5:
            assert reply[20:] == self.pid, "our pid comes back"
            if self.reply[1] & 0x800 and flags & 0x800:
                self.sum = reversed_crc32c

    def __enter__(self) -> LittleClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def put(self, *payloads: bytes, tail: bytes = b"", spoil: str = "") -> None:
        out = b""
        for payload in payloads:
            head = struct.pack("<Ii", len(payload) + 12, self.sent + (5 if spoil == "seq" else 0)) + payload
            out += head + struct.pack("<I", self.sum(head) ^ (1 if spoil == "crc" else 0))
            self.sent += 1
        out += tail
        if self.shut is not None:
            out += b"\x04\0\0\0" * (-len(out) % 16 // 4)
            out = self.shut.update(out)
        self.sock.sendall(out)

    def take(self, raw: bytes) -> None:
        if self.open is None:
            self.inbox += raw
            return
        self.raw += raw
        whole = len(self.raw) // 16 * 16
        self.inbox += self.open.update(bytes(self.raw[:whole]))
        del self.raw[:whole]

    def get(self) -> bytes:
        """The next payload, all rules checked."""
        while True:
            while self.inbox[:4] == b"\x04\0\0\0":
                del self.inbox[:4]
            if len(self.inbox) >= 4:
                size = int.from_bytes(self.inbox[:4], "little")
                assert 16 <= size <= 1 << 24 and size % 4 == 0, f"length {size}"
                if len(self.inbox) >= size:
                    break
            raw = self.sock.recv(65_536)
            if not raw:
                raise EOFError
            self.take(raw)
        frame = bytes(self.inbox[:size])
        del self.inbox[:size]
        seqno, = struct.unpack_from("<i", frame, 4)
        assert seqno == self.got, f"seqno {seqno}, not {self.got}"
        self.got += 1
        assert frame[-4:] == struct.pack("<I", self.sum(frame[:-4])), f"checksum of {seqno}"
        return frame[8:-4]

    def request(self, conn_id: int, data: bytes, flags: int = BASE, tag: bytes = b"", **options: str) -> None:
        address = bytes(10) + b"\xff\xff" + bytes([127, 0, 0, 1]) + struct.pack("<I", 4000)
        extra = struct.pack("<I", 24) + bytes.fromhex("ae261edb10") + tag + bytes(3) if tag else b""
        self.put(struct.pack("<IIQ", 0x36CEF1EE, flags, conn_id) + address + address + extra + data, **options)

    def close_conn(self, conn_id: int) -> None:
        self.put(struct.pack("<IQ", 0x1FCF425D, conn_id))

    def answer(self) -> tuple[int, bytes]:
        kind, flags, conn_id = struct.unpack_from("<IIQ", payload := self.get())
        assert (kind, flags) == (0x4403DA0D, 0)
        return conn_id, payload[16:]

    def sync(self, number: int = 1) -> None:
        """Everything sent before has been handled when this returns."""
        self.put(struct.pack("<Iq", 0x5730A2DF, number))
        assert self.get() == struct.pack("<Iq", 0x8430EAA7, number)


@pytest.fixture
def me() -> Iterator[FakeMiddleEnd]:
    with FakeMiddleEnd() as me:
        yield me


# -- its own arithmetic against the vectors

@pytest.mark.parametrize("case", VECTORS["kdf"], ids=lambda case: case["name"])
def test_keys_are_those_of_the_vectors(case):
    for purpose in ("client", "server"):
        got = fake.derive(purpose.upper().encode(), bytes.fromhex(case["nonce_srv"]), bytes.fromhex(case["nonce_clt"]), case["client_ts"],
                          (fake.plain_ip(case["server_ip"]), case["server_port"]), (fake.plain_ip(case["client_ip"]), case["client_port"]),
                          bytes.fromhex(case["secret"]))
        assert [part.hex() for part in got] == [case[purpose]["key"], case[purpose]["iv"]]


@pytest.mark.parametrize("case", VECTORS["codec_encode"], ids=lambda case: case["name"])
def test_frames_are_those_of_the_vectors(case):
    wire = fake.Wire()
    wire.next_out = case["seq"]
    wire.checksum = fake.crc32c if case["crc"] == "crc32c" else zlib.crc32
    assert wire.wrap(bytes.fromhex(case["payload"])).hex() == case["frame"]


@pytest.mark.parametrize("case", VECTORS["exchanges"], ids=lambda case: case["name"])
def test_the_wire_reads_and_writes_whole_exchanges(case):
    wire = fake.Wire()
    kdf = {key: bytes.fromhex(value) for key, value in case["kdf"].items() if key.endswith(("key", "iv"))}
    for direction in ("c2s", "s2c"):
        wire.next_in = wire.next_out = -2
        wire._decrypt = wire._encrypt = None
        wire._plain.clear()
        wire.checksum = zlib.crc32
        out = b""
        for step in case["steps"]:
            if step["dir"] != direction or "payload" not in step:
                continue
            if step["seq"] == -1:
                wire.arm((kdf["write_key"], kdf["write_iv"]), (kdf["read_key"], kdf["read_iv"]))
            if step["crc"] == "crc32c":
                wire.checksum = fake.crc32c
            if direction == "c2s":
                wire.feed(bytes.fromhex(step["wire"]))
                assert [payload.hex() for _, payload in wire.frames()] == [step["payload"]]
            else:
                out += wire.seal(wire.wrap(bytes.fromhex(step["payload"])))
        if direction == "s2c" and not case["name"].endswith("coalesced"):
            assert out.hex() == case["s2c_wire"]


def test_both_castagnolis_agree():
    data = os.urandom(300)
    assert fake.crc32c(data) == reversed_crc32c(data) and fake.crc32c(b"123456789") == 0xE3069283


# -- a good link

@pytest.mark.parametrize(("host", "flags", "offer", "agreed"), [
    ("127.0.0.1", 0, True, 0), ("127.0.0.1", 0x800, True, 0x800), ("127.0.0.1", 0x800, False, 0),
    ("::1", 0, True, 0), ("::1", 0x800, True, 0x800)])
def test_handshake_and_echo(host, flags, offer, agreed):
    with FakeMiddleEnd(host, offer_crc32c=offer) as me, LittleClient(me, flags=flags) as client:
        assert client.reply == (0x7682EEF5, agreed)
        client.request(11, b"DATAdata")
        assert client.answer() == (11, b"DATAdata")
        client.request(11, b"more", BASE | 0x80000000)
        kind, conn_id, confirm = struct.unpack("<IQI", client.get())
        assert (kind, conn_id) == (0x3BAC409B, 11) and confirm & 0x80000000
        assert client.answer() == (11, b"more")
        client.close_conn(11)
        client.sync()
        link = me.take()
        assert link.closes == [(11, "conn")] and not link.open and not me.faults
        assert [request.data for request in link.requests] == [b"DATAdata", b"more"] and link.hello_flags == flags
        assert link.sender_pid == client.pid and [seqno for seqno, _ in link.messages] == [0, 1, 2, 3]


@pytest.mark.parametrize("split", [1, 7, 15, 17, (1, 40, 3)])
@pytest.mark.parametrize("coalesce", [False, True])
def test_coalesced_and_split_streams_lose_nothing(split, coalesce):
    with FakeMiddleEnd(split=split, coalesce=coalesce) as me, LittleClient(me) as client:
        if coalesce:
            assert client.get() == struct.pack("<Iq", 0x5730A2DF, 0x7E57)      # came with the handshake reply
            client.put(struct.pack("<Iq", 0x8430EAA7, 0x7E57))
        data = os.urandom(3000)
        client.request(5, data, BASE | 0x80000000)
        client.get()
        assert client.answer() == (5, data)
        client.sync()
        assert me.take().pongs == ([0x7E57] if coalesce else []) and not me.faults


def test_a_foreign_address_in_the_keys():
    with FakeMiddleEnd(client_ip_for_kdf="203.0.113.7") as me:
        with LittleClient(me, ip="203.0.113.7") as client:
            client.sync()
        with pytest.raises((EOFError, ConnectionError)), LittleClient(me) as client:
            client.sync()
        doubles.poll(lambda: len(me.reasons()) == 2, "both links to end", 60)


def test_orders_of_the_journeys(me):
    with LittleClient(me) as client:
        client.request(1, doubles.ORDER + struct.pack("<8sQQ", b"send", 200_000, 9))
        got = b""
        while len(got) < 200_000:
            got += client.answer()[1]
        assert hashlib.sha256(got).digest() == doubles.pattern_sha(9, 200_000)
        client.request(2, doubles.ORDER + struct.pack("<8sQQ", b"recv", 100_000, 0))
        client.request(3, b"beside..")
        assert client.answer() == (3, b"beside..")
        for piece in doubles.pattern(4, 100_000):
            for at in range(0, len(piece), 50_000):
                client.request(2, piece[at:at + 50_000])
        assert client.answer() == (2, doubles.pattern_sha(4, 100_000))
        client.request(1, doubles.ORDER + struct.pack("<8sQQ", b"flood", 1 << 18, 0))
        assert sum(len(client.answer()[1]) for _ in range(4)) == 1 << 18
        nonce = os.urandom(16)
        client.request(4, doubles.unencrypted(struct.pack("<I16s", doubles.REQ_PQ, nonce)), BASE | 2)
        assert struct.unpack_from("<I16s", client.answer()[1], 20) == (doubles.RES_PQ, nonce)
        assert not me.faults


def test_messages_from_the_test_reach_the_client(me):
    with LittleClient(me) as client:
        client.request(8, b"open")
        client.answer()
        link = me.take()
        link.send(fake.ping(42))
        assert client.get() == struct.pack("<Iq", 0x5730A2DF, 42)
        client.put(struct.pack("<Iq", 0x8430EAA7, 42))
        link.send(fake.answer(8, b"push"), fake.close_ext(8), fake.answer(99, b"strays.."))
        assert client.answer() == (8, b"push") and client.get() == struct.pack("<IQ", 0x5EB634A2, 8)
        assert client.answer() == (99, b"strays..")
        client.close_conn(99)
        client.sync()
        assert link.strays == [99] and link.pongs == [42] and not link.open and not me.faults


# -- what it complains about

@pytest.mark.parametrize(("flags", "data", "tag", "text"), [
    (0x20001000, b"data", b"", "magic bits"), (BASE | 0x40000000, b"data", b"", "not one transport"),
    (0x00021000, b"data", b"", "not one transport"),
    (0x48021000, b"data", b"", "padded without"), (BASE | 4, b"data", b"", "unknown bits"), (BASE, bytes(8), b"", "unencrypted"),
    (BASE | 2, b"data", b"", "unencrypted"), (BASE | 8, b"data", bytes(16), "tag")])
def test_a_request_that_breaks_an_invariant_is_a_fault(flags, data, tag, text):
    with FakeMiddleEnd(want_tag=b"") as me, LittleClient(me) as client:
        client.request(1, data, flags, tag)
        client.answer()
        assert len(me.faults) == 1 and text in me.faults[0]


def test_unaligned_data_closes_the_link(me):
    with LittleClient(me) as client, pytest.raises((EOFError, ConnectionError)):
        client.request(1, b"five!")
        client.sync()
    assert "frame length" in me.take().why


def test_addresses_and_tag_as_the_test_expects():
    with FakeMiddleEnd(want_tag=b"t" * 16, want_client="127.0.0.1", want_our=("127.0.0.1", 4000)) as me, LittleClient(me) as client:
        client.request(1, b"data", BASE | 8, b"t" * 16)
        client.answer()
        assert not me.faults
        me.want_client, me.want_our = "10.0.0.1", ("127.0.0.1", 1)
        client.request(1, b"data", BASE | 8, b"t" * 16)
        client.answer()
        assert [text.rpartition(": ")[2][:11] for text in me.faults] == ["client addr", "our address"]


def test_a_connection_id_lives_on_one_link_once():
    ledger = fake.Ledger()
    with FakeMiddleEnd(ledger=ledger) as one, FakeMiddleEnd(ledger=ledger) as two:
        with LittleClient(one) as first, LittleClient(two) as second:
            first.request(1, b"data")
            first.answer()
            second.request(1, b"data")
            second.answer()
            assert ledger.faults == ["connection 0x1 on two links"]
            first.request(2, b"data")
            first.answer()
            first.close_conn(2)
            first.close_conn(2)
            first.sync()
            assert "second close of 0x2" in ledger.faults[1]
            first.request(2, b"data")
            first.answer()
            assert "0x2 speaks after its end" in ledger.faults[2]


def test_close_ext_an_unknown_message_and_a_padded_nonce_are_faults(me):
    with LittleClient(me, pad_nonce=True) as client:
        client.request(1, b"data")
        client.answer()
        client.put(struct.pack("<IQ", 0x5EB634A2, 1))
        client.put(struct.pack("<II", 0x12345678, 0))
        client.put(struct.pack("<Iq", 0x8430EAA7, 3))
        client.sync()
    for text in ("padding behind", "CLOSE_EXT", "message 0x12345678", "pong without ping"):
        assert any(text in fault for fault in me.faults), text


# -- what it refuses

@pytest.mark.parametrize("options", [{"secret": b"x" * 128}, {"clock": 40.0}, {"clock": -40.0}])
def test_a_wrong_nonce_gets_no_answer(me, options):
    with pytest.raises((EOFError, ConnectionError)):
        LittleClient(me, **options)
    doubles.poll(me.reasons, "reason", 60)


@pytest.mark.parametrize(("hello", "code"), [
    (struct.pack("<II", 0x7682EEF5, 1) + bytes(24), -7), (struct.pack("<II", 0x7682EEF5, 0) + bytes(28), -3)])
def test_handshake_errors(me, hello, code):
    with LittleClient(me, hello=hello) as client:
        assert client.reply == (0x6A27BEDA, code)
        with pytest.raises((EOFError, ConnectionError)):
            client.get()


@pytest.mark.parametrize("spoil", ["crc", "seq"])
def test_a_broken_frame_closes_the_link(me, spoil):
    with LittleClient(me) as client, pytest.raises((EOFError, ConnectionError)):
        client.request(1, b"data", spoil=spoil)
        client.get()
    assert ("checksum" if spoil == "crc" else "seqno") in doubles.poll(me.reasons, "reason", 60)[0]


# -- how it misbehaves

def test_its_clock_and_its_answers_may_be_wrong():
    with FakeMiddleEnd(ts_offset=31) as me:
        before = int(time.time())
        with LittleClient(me) as client:
            assert client.server_ts >= before + 31
        me.ts_offset, me.reply_flags = 0, 0x41
        with LittleClient(me) as client:
            assert client.reply[1] == 0x41
        me.reply_flags, me.reply_error = None, -4
        with LittleClient(me) as client:
            assert client.reply == (0x6A27BEDA, -4)


@pytest.mark.parametrize(("knob", "text"), [("corrupt_crc", "checksum of {}"), ("wrong_seq", "seqno {1}"), ("bad_len", "length 10"),
                                            ("replay", "seqno {}"), ("truncate", "")])
@pytest.mark.parametrize("frame", [-2, -1, 0, 2])
def test_each_frame_can_be_spoiled(knob, text, frame):
    if knob == "replay" and frame == -2:
        text = ""                               # bytes behind the plaintext nonce are read as ciphertext: nonsense of some kind
    with FakeMiddleEnd(**{knob: frame}) as me:
        with pytest.raises((AssertionError, EOFError, ConnectionError)) as caught, LittleClient(me) as client:
            for number in range(1, 5):
                client.sync(number)
        if text:
            assert text.format(frame, frame + 1).replace("{1}", str(frame + 1)) in str(caught.value)


@pytest.mark.parametrize("stage", ["accept", "nonce", "handshake", "all", "pong"])
def test_it_can_fall_silent_at_every_stage(stage):
    with FakeMiddleEnd(mute=stage) as me, pytest.raises(TimeoutError):
        original = socket.create_connection

        def impatient(where: tuple[str, int], _: float) -> socket.socket:
            sock = original(where)
            sock.settimeout(0.2)
            return sock
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "create_connection", impatient)
            client = LittleClient(me)
        client.request(1, b"data")
        if stage == "pong":
            assert client.answer() == (1, b"data")
        client.sync()


def test_deaf_it_reads_nothing_until_it_hears_again(me):
    with LittleClient(me) as client:
        link = me.take()
        me.deaf.set()
        client.sync()                           # the read that was under way
        client.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.sync(2)
        me.deaf.clear()
        client.sock.settimeout(60)
        assert client.get() == struct.pack("<Iq", 0x8430EAA7, 2) and link in me.links()


@pytest.mark.parametrize(("how", "error"), [("fin", EOFError), ("rst", ConnectionResetError)])
def test_a_link_can_be_killed(me, how, error):
    with LittleClient(me) as client:
        client.request(1, b"data")
        client.answer()
        link = me.take()
        link.kill(how)
        with pytest.raises(error):
            client.get()
        assert link.closed.wait(60) and not me.links() and not me.bound()


def test_down_refuses_and_up_accepts_on_the_same_port(me):
    client = LittleClient(me)
    me.down()
    with pytest.raises(ConnectionResetError):
        client.get()
    with pytest.raises(ConnectionRefusedError):
        LittleClient(me)
    me.up()
    with LittleClient(me) as client:
        client.sync()
    me.rude = True
    with pytest.raises((ConnectionResetError, BrokenPipeError, EOFError)):
        LittleClient(me)
    assert me.refused == 1


# -- the site and the world

def fetch(url: str) -> tuple[bytes, str]:
    with urllib.request.urlopen(url, timeout=60) as response:
        return response.read(), response.headers["Date"]


def test_the_site_and_its_knobs():
    site = MeSite(b"s" * 40)
    try:
        body, date = fetch(site.url("/getProxySecret"))
        assert body == b"s" * 40 and abs(parsedate_to_datetime(date).timestamp() - time.time()) < 60
        page = site.secret_page
        page.failures, page.date_offset, page.delay_s = 2, 3600.0, 0.05
        for _ in range(2):
            with pytest.raises(urllib.error.HTTPError, match="503"):
                fetch(site.url("/getProxySecret"))
        started = time.monotonic()
        body, date = fetch(site.url("/getProxySecret"))
        assert time.monotonic() - started >= 0.05 and parsedate_to_datetime(date).timestamp() - time.time() > 3500
        page.status = 404
        with pytest.raises(urllib.error.HTTPError, match="404"):
            fetch(site.url("/getProxySecret"))
        assert page.hits == 5
        site.publish({2: ["127.0.0.1:1", "127.0.0.1:2"], -2: ["127.0.0.1:3"]})
        text = "default 2;\nproxy_for 2 127.0.0.1:1;\nproxy_for 2 127.0.0.1:2;\nproxy_for -2 127.0.0.1:3;\n"
        assert fetch(site.url("/getProxyConfig"))[0].decode() == text
        site.publish({1: ["[::1]:9"]}, 0, v6=True)
        assert fetch(site.url("/getProxyConfigV6"))[0] == b"proxy_for 1 [::1]:9;\n"
    finally:
        site.close()


def test_a_world_lists_its_middle_ends_and_changes():
    with MeWorld({1: 1, 2: 2}) as world:
        lines = fetch(world.config()["general"]["proxy_config_v4_url"])[0].decode().splitlines()
        assert len(lines) == 7 and lines[0] == "default 2;" and f"proxy_for -1 {world.mes[1][0].address};" in lines
        with LittleClient(world.mes[1][0]) as client:
            client.sync()
            assert len(world.links(1)) == len(world.links()) == 1 and not world.links(2)
            world.rotate_secret(b"n" * 128)
            client.sync(2)                      # a link keeps the secret it began with
        with LittleClient(world.mes[2][1], secret=b"n" * 128) as client:
            client.sync()
        assert fetch(world.site.url("/getProxySecret"))[0] == b"n" * 128
        world.add(3)
        world.publish()
        assert b"proxy_for 3 " in world.site.pages["/getProxyConfig"].body
        world.hang_up()
        doubles.poll(lambda: not world.links(), "links to end", 60)
        assert world.ledger.links == 2 and not world.faults


def test_a_world_as_a_program():
    program = subprocess.Popen([sys.executable, fake.__file__, "--dcs", "2", "--answer-size", "8192"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert program.stdin is not None and program.stdout is not None
    where = json.loads(program.stdout.readline())
    host, _, port = where["endpoints"]["2"][0].rpartition(":")

    class Far:
        pass
    far = Far()
    far.host, far.port = host, int(port)        # type: ignore[attr-defined]
    with LittleClient(far) as client:           # type: ignore[arg-type]
        client.request(1, doubles.ORDER + struct.pack("<8sQQ", b"flood", 16_384, 0))
        assert [len(client.answer()[1]) for _ in range(2)] == [8192, 8192]
    program.stdin.close()
    assert json.loads(program.stdout.readline()) == {"links": 1, "faults": []} and program.wait(5) == 0
    program.stdout.close()
