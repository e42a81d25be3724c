"""A Telegram middle end and the site that lists it, on loopback.

Written from the specification alone: checksums, key derivation and framing are its own and nothing here imports telemt.py, so that
an error of the program cannot cancel itself out.  Threads and blocking sockets; all knobs are plain attributes that may be changed
while it runs (new links take the new value).  What a real middle end would not accept is collected in `faults`.

  Wire            one link's frames: numbering, checksums, AES-CBC chains, padding
  MeLink          one accepted connection: nonce, handshake, messages, everything it saw
  FakeMiddleEnd   a listener with knobs and misbehaviours
  Ledger          what several middle ends know together: a connection id lives on one link, once
  MeSite          /getProxySecret, /getProxyConfig, /getProxyConfigV6
  MeWorld         middle ends for several data centres, their site, and the configuration that leads a proxy to them

`python tests/fake_middle_end.py` runs a world as a program of its own: one JSON line tells where, it ends with its stdin.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import email.utils
import hashlib
import http.server
import ipaddress
import itertools
import json
import os
import queue
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import doubles

NONCE, HANDSHAKE, HANDSHAKE_ERROR = 0x7ACB87AA, 0x7682EEF5, 0x6A27BEDA
PROXY_REQ, PROXY_ANS, SIMPLE_ACK = 0x36CEF1EE, 0x4403DA0D, 0x3BAC409B
CLOSE_EXT, CLOSE_CONN, PING, PONG = 0x5EB634A2, 0x1FCF425D, 0x5730A2DF, 0x8430EAA7
PROXY_TAG = bytes.fromhex("ae261edb")
USE_CRC32C = 0x800
F_PLAIN, F_TAG, F_MAGIC, F_EXT2 = 0x2, 0x8, 0x1000, 0x20000
F_PADDED, F_INTERMEDIATE, F_ABRIDGED, F_QUICK_ACK = 0x08000000, 0x20000000, 0x40000000, 0x80000000
F_KNOWN = F_PLAIN | F_TAG | F_MAGIC | F_EXT2 | F_PADDED | F_INTERMEDIATE | F_ABRIDGED | F_QUICK_ACK
FRAME_MAX = 1 << 24
PAD = struct.pack("<I", 4)
SECRET = bytes((7 * i + 3) % 256 for i in range(128))
ANSWER_SIZE = 65_536

_CRC32C_TABLE: list[int] = []
for _byte in range(256):
    for _ in range(8):
        _byte = _byte >> 1 ^ (0x82F63B78 if _byte & 1 else 0)
    _CRC32C_TABLE.append(_byte)


def crc32c(data: bytes) -> int:
    """Castagnoli, reflected."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _CRC32C_TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def derive(purpose: bytes, nonce_server: bytes, nonce_client: bytes, client_ts: int, server: tuple[str, int], client: tuple[str, int],
           secret: bytes) -> tuple[bytes, bytes]:
    """(key, iv) of one direction, middle-proxy-wire 5.3; purpose b"CLIENT" is what the client writes with."""
    ours, theirs = ipaddress.ip_address(server[0]), ipaddress.ip_address(client[0])
    assert ours.version == theirs.version, "mixed families"
    v4 = ours.version == 4
    parts = [nonce_server, nonce_client, struct.pack("<I", client_ts),
             ours.packed[::-1] if v4 else bytes(4), struct.pack("<H", client[1]), purpose,
             theirs.packed[::-1] if v4 else bytes(4), struct.pack("<H", server[1]), secret, nonce_server,
             b"" if v4 else theirs.packed + ours.packed, nonce_client]
    whole = b"".join(parts)
    return hashlib.md5(whole[1:]).digest()[:12] + hashlib.sha1(whole).digest(), hashlib.md5(whole[2:]).digest()


def plain_ip(text: str) -> str:
    """IPv4-mapped IPv6 counts as IPv4."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def make_pid(ip: str, port: int, pid: int, utime: int) -> bytes:
    """12 bytes of a process."""
    address = ipaddress.ip_address(ip)
    return struct.pack("<4sHHI", address.packed[::-1] if address.version == 4 else bytes(4), port, pid & 0xFFFF, utime)


def answer(conn_id: int, data: bytes, flags: int = 0) -> bytes:
    return struct.pack("<IIQ", PROXY_ANS, flags, conn_id) + data


def simple_ack(conn_id: int, confirm: int) -> bytes:
    return struct.pack("<IQI", SIMPLE_ACK, conn_id, confirm)


def close_ext(conn_id: int) -> bytes:
    return struct.pack("<IQ", CLOSE_EXT, conn_id)


def close_conn(conn_id: int) -> bytes:
    return struct.pack("<IQ", CLOSE_CONN, conn_id)


def ping(number: int) -> bytes:
    return struct.pack("<Iq", PING, number)


class Broken(Exception):
    """The peer is no middle-end client, or a broken one: the link closes."""


class Wire:
    """Both directions of a link after the nonces: cut what arrived into payloads, make frames of payloads."""

    def __init__(self) -> None:
        self.checksum: Callable[[bytes], int] = zlib.crc32
        self.next_in = self.next_out = -2
        self._decrypt: Callable[[bytes], bytes] | None = None
        self._encrypt: Callable[[bytes], bytes] | None = None
        self._cipher_text = bytearray()
        self._plain = bytearray()

    def arm(self, read: tuple[bytes, bytes], write: tuple[bytes, bytes]) -> None:
        """Encrypted from here on; what is already there was encrypted too."""
        self._decrypt = Cipher(algorithms.AES(read[0]), modes.CBC(read[1])).decryptor().update
        self._encrypt = Cipher(algorithms.AES(write[0]), modes.CBC(write[1])).encryptor().update
        early, self._plain = bytes(self._plain), bytearray()
        self.feed(early)

    def feed(self, raw: bytes) -> None:
        if self._decrypt is None:
            self._plain += raw
            return
        self._cipher_text += raw
        whole = len(self._cipher_text) & ~15
        self._plain += self._decrypt(bytes(self._cipher_text[:whole]))
        del self._cipher_text[:whole]

    def plain_word(self) -> bytes:
        """The next four plaintext bytes, as far as they came."""
        return bytes(self._plain[:4])

    def drop_word(self) -> None:
        del self._plain[:4]

    def frames(self, low: int = 16, high: int = FRAME_MAX) -> Iterator[tuple[int, bytes]]:
        """(seqno, payload) of every complete frame; Broken when one breaks a rule."""
        box, at = self._plain, 0
        try:
            while len(box) - at >= 4:
                size = int.from_bytes(box[at:at + 4], "little")
                if size == 4 and self._decrypt is not None:
                    at += 4
                    continue
                if not low <= size <= high or size % 4:
                    raise Broken(f"frame length {size}")
                if len(box) - at < size:
                    return
                frame = bytes(box[at:at + size])
                at += size
                seqno, = struct.unpack_from("<i", frame, 4)
                if struct.unpack("<I", frame[-4:])[0] != self.checksum(frame[:-4]):
                    raise Broken(f"checksum of frame {seqno}")
                if seqno != self.next_in:
                    raise Broken(f"seqno {seqno} instead of {self.next_in}")
                self.next_in += 1
                yield seqno, frame[8:-4]
        finally:
            del box[:at]

    def wrap(self, payload: bytes) -> bytes:
        """The next frame, in clear and without padding."""
        head = struct.pack("<Ii", len(payload) + 12, self.next_out) + payload
        self.next_out += 1
        return head + struct.pack("<I", self.checksum(head))

    def seal(self, frames: bytes) -> bytes:
        """Padded and encrypted, if it is time for that."""
        if self._encrypt is None:
            return frames
        return self._encrypt(frames + PAD * (-len(frames) % 16 // 4))


@dataclasses.dataclass(frozen=True)
class Request:
    """One RPC_PROXY_REQ as it came; `data` may be cut, `size` is not."""

    seqno: int
    flags: int
    conn_id: int
    client: tuple[str, int]
    our: tuple[str, int]
    tag: bytes
    data: bytes
    size: int


def parse_address(raw: bytes) -> tuple[str, int]:
    """20 bytes: IPv4 behind ten zeros and ff ff, or IPv6; then the port."""
    port = struct.unpack_from("<I", raw, 16)[0]
    if raw[:12] == bytes(10) + b"\xff\xff":
        return str(ipaddress.IPv4Address(raw[12:16])), port
    return str(ipaddress.IPv6Address(raw[:16])), port


class Ledger:
    """Connection ids of all middle ends together: each belongs to one link and never comes back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.owner: dict[int, MeLink] = {}
        self.finished: set[int] = set()
        self.faults: list[str] = []
        self.links = 0                          # handshakes that succeeded, all middle ends

    def complain(self, text: str) -> None:
        if len(self.faults) < 50:
            self.faults.append(text)

    def request(self, link: MeLink, conn_id: int) -> bool:
        """True if the id is new."""
        with self._lock:
            if conn_id in self.finished:
                self.complain(f"connection {conn_id:#x} speaks after its end")
            owner = self.owner.setdefault(conn_id, link)
            if owner is not link:
                self.complain(f"connection {conn_id:#x} on two links")
            return conn_id not in link.open

    def finish(self, conn_id: int) -> None:
        with self._lock:
            self.owner.pop(conn_id, None)
            self.finished.add(conn_id)


OnRequest = Callable[["MeLink", int, int, tuple[str, int], tuple[str, int], bytes, bytes], "Iterable[bytes]"]


def echo(link: MeLink, flags: int, conn_id: int, client: tuple[str, int], our: tuple[str, int], tag: bytes, data: bytes) -> list[bytes]:
    """The same data back; behind its quick ack where one was asked for."""
    out = [simple_ack(conn_id, zlib.crc32(data) | 0x80000000)] if flags & F_QUICK_ACK else []
    return [*out, answer(conn_id, data)]


def serve(link: MeLink, flags: int, conn_id: int, client: tuple[str, int], our: tuple[str, int], tag: bytes,
          data: bytes) -> Iterable[bytes]:
    """As a data centre of the journeys: req_pq, orders (send, recv, flood), and echo for the rest."""
    upload = link.uploads.get(conn_id)
    if upload is not None:
        upload[0] -= len(data)
        upload[1].update(data)
        if upload[0] <= 0:
            del link.uploads[conn_id]
            return [answer(conn_id, upload[1].digest())]
        return []
    if data.startswith(bytes(8)) and len(data) >= 40:
        return [answer(conn_id, doubles.res_pq(data))]
    if data.startswith(doubles.ORDER):
        word, size, seed = struct.unpack_from("<8sQQ", data, 4)
        word = word.rstrip(b"\0").decode()
        if word == "send":
            return _pieces(conn_id, size, doubles.pattern(seed, size), link.me.answer_size)
        if word == "flood":                    # throughput: the same bytes again and again
            return itertools.repeat(answer(conn_id, bytes(link.me.answer_size)), max(1, size // link.me.answer_size))
        if word == "recv":
            link.uploads[conn_id] = [size, hashlib.sha256()]
            return []
        raise AssertionError(f"unknown order {word}")
    return echo(link, flags, conn_id, client, our, tag, data)


def _pieces(conn_id: int, size: int, blocks: Iterable[bytes], piece: int) -> Iterator[bytes]:
    for block in blocks:
        for at in range(0, len(block), piece):
            yield answer(conn_id, block[at:at + piece])


class MeLink:
    """One connection to a fake middle end."""

    def __init__(self, me: FakeMiddleEnd, sock: socket.socket) -> None:
        self.me, self.sock = me, sock
        self.local, self.peer = sock.getsockname()[:2], sock.getpeername()[:2]
        self.wire = Wire()
        self.at = time.monotonic()
        self.ready = False
        self.closed = threading.Event()
        self.why = ""                           # what ended it
        self.nonce_ts = 0
        self.hello_flags = 0                    # of the client's handshake
        self.sender_pid = self.wanted_pid = b""
        self.open: set[int] = set()             # connection ids in use
        self.requests: list[Request] = []
        self.messages: list[tuple[int, int]] = []       # (seqno, type) of everything after the handshake
        self.closes: list[tuple[int, str]] = []         # (connection id, "conn" or "ext")
        self.strays: list[int] = []             # closes for ids that never asked for anything here
        self.pongs: list[int] = []
        self.pings = 0                          # the client's
        self.uploads: dict[int, list[Any]] = {}
        self._told: set[int] = set()            # ids that we closed first
        self._my_pings: set[int] = set()
        self._abort = False                     # close with RST
        self._write = threading.Lock()
        self._secret = me.secret
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)

    # -- sending

    def send(self, *payloads: bytes) -> None:
        """Messages in this order; one write for all of them with `coalesce`, else one each.  OSError when the link is gone."""
        with self._write:
            if self.me.coalesce:
                frames = b"".join([self._frame(payload) for payload in payloads])
                self._push(self.wire.seal(frames))
            else:
                for payload in payloads:
                    self._push(self.wire.seal(self._frame(payload)))
            for payload in payloads:
                kind = int.from_bytes(payload[:4], "little")
                if kind in (CLOSE_EXT, CLOSE_CONN):
                    conn_id, = struct.unpack_from("<Q", payload, 4)
                    self._told.add(conn_id)
                    if conn_id in self.open:
                        self.open.discard(conn_id)
                        self.me.ledger.finish(conn_id)
                elif kind == PING:
                    self._my_pings.add(struct.unpack_from("<q", payload, 4)[0])

    def _frame(self, payload: bytes) -> bytes:
        """The next frame, spoiled if a knob says so."""
        me, number = self.me, self.wire.next_out
        frame = self.wire.wrap(payload)
        if me.corrupt_crc == number:
            frame = frame[:-1] + bytes([frame[-1] ^ 0x55])
        if me.wrong_seq == number:
            self.wire.next_out += 1
            frame = self._renumbered(frame, number + 1)
        if me.bad_len == number:
            frame = struct.pack("<I", me.bad_len_value) + frame[4:]
        if me.replay == number:
            frame += frame
        if me.truncate == number:
            half = frame[:len(frame) // 2 & ~15] or frame[:16]
            self._push(self.wire.seal(half) if self.ready or number == -1 else half)
            raise Broken("cut off on purpose")
        return frame

    def _renumbered(self, frame: bytes, number: int) -> bytes:
        head = frame[:4] + struct.pack("<i", number) + frame[8:-4]
        return head + struct.pack("<I", self.wire.checksum(head))

    def _push(self, raw: bytes) -> None:
        if not self.me.split:
            self.sock.sendall(raw)
            return
        sizes, at = itertools.cycle([self.me.split] if isinstance(self.me.split, int) else self.me.split), 0
        while at < len(raw):
            step = next(sizes)
            self.sock.sendall(raw[at:at + step])
            at += step
            if at < 4096:
                time.sleep(0.0002)              # lets the other side read each piece alone

    def kill(self, how: str = "fin") -> None:
        """End it from our side: "fin" or "rst"."""
        self.why = self.why or f"killed by {how}"
        with contextlib.suppress(OSError):
            if how == "rst":                    # the reader wakes up and closes; a shutdown both ways would say FIN first
                self._abort = True
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.sock.shutdown(socket.SHUT_RD if how == "rst" else socket.SHUT_RDWR)
        if self.me.mute == "accept":            # nobody reads
            self.sock.close()

    # -- receiving

    def run(self) -> None:
        """The life of the link."""
        try:
            self._shake_hands()
            self._listen()
        except Broken as fault:
            self.why = self.why or str(fault)
        except (OSError, ValueError) as fault:
            self.why = self.why or type(fault).__name__
        finally:
            for conn_id in self.open:
                self.me.ledger.finish(conn_id)
            if not self._abort:
                with contextlib.suppress(OSError):      # wakes a thread that is still sending
                    self.sock.shutdown(socket.SHUT_RDWR)
            self.sock.close()
            self.closed.set()
            self.me.forget(self)

    def _fill(self) -> None:
        while self.me.deaf.is_set() and not self.me.closing:     # reads nothing: the client's window fills
            time.sleep(0.01)
        raw = self.sock.recv(1 << 18)
        if not raw:
            raise Broken("end of stream")
        self.wire.feed(raw)

    def _one_frame(self, low: int, high: int) -> bytes:
        while True:
            for _, payload in self.wire.frames(low, high):
                return payload
            self._fill()

    def _mute(self, stage: str) -> None:
        """Wait for the end of the link if it is to be silent from here."""
        if self.me.mute == stage:
            while True:
                self._fill()

    def _shake_hands(self) -> None:
        me = self.me
        payload = self._one_frame(44, 44)
        kind, selector, schema, self.nonce_ts = struct.unpack_from("<IIII", payload)
        if kind != NONCE or struct.pack("<I", selector) != self._secret[:4] or schema != 1:
            raise Broken(f"nonce {payload[:16].hex()}")
        if abs(self.nonce_ts - time.time()) > 30:
            raise Broken("clock of the client")
        nonce_client, nonce_server = payload[16:32], os.urandom(16)
        self._mute("nonce")
        if self.wire.plain_word() == PAD:
            self.wire.drop_word()
            me.complain("padding behind the plaintext nonce")
        self._push(self._frame(struct.pack("<I4sII", NONCE, self._secret[:4], 1, int(time.time()) + me.ts_offset) + nonce_server))
        client = (me.client_ip_for_kdf or plain_ip(self.peer[0]), me.client_port_for_kdf or self.peer[1])
        server = (me.server_ip_for_kdf or plain_ip(self.local[0]), me.server_port_for_kdf or self.local[1])
        read, write = (derive(purpose, nonce_server, nonce_client, self.nonce_ts, server, client, self._secret)
                       for purpose in (b"CLIENT", b"SERVER"))
        self.wire.arm(read, write)
        payload = self._one_frame(16, FRAME_MAX)
        kind = int.from_bytes(payload[:4], "little")
        if kind != HANDSHAKE:
            raise Broken(f"expected a handshake, got {kind:#x}")
        mine = make_pid(server[0], server[1], os.getpid(), int(me.started_wall))
        self._mute("handshake")
        code = -3 if len(payload) != 32 else -7 if struct.unpack_from("<I", payload, 4)[0] & 0xFF else 0
        if code or me.reply_error is not None:
            code = me.reply_error if me.reply_error is not None else code
            self._push(self.wire.seal(self._frame(struct.pack("<Ii", HANDSHAKE_ERROR, code) + mine)))
            raise Broken(f"handshake error {code}")
        self.hello_flags, self.sender_pid, self.wanted_pid = struct.unpack_from("<I12s12s", payload, 4)
        flags = USE_CRC32C if self.hello_flags & USE_CRC32C and me.offer_crc32c else 0
        reply = self._frame(struct.pack("<II", HANDSHAKE, flags if me.reply_flags is None else me.reply_flags) + mine + self.sender_pid)
        if flags:
            self.wire.checksum = crc32c
        with self._write:
            self.ready = True
            if me.coalesce:
                self._my_pings.add(0x7E57)
                reply += self._frame(ping(0x7E57))
            self._push(self.wire.seal(reply))
        me.greet(self)

    def _listen(self) -> None:
        while True:
            for seqno, payload in self.wire.frames():
                if self.me.mute != "all":
                    self._handle(seqno, payload)
            self._fill()

    def _handle(self, seqno: int, payload: bytes) -> None:
        kind = int.from_bytes(payload[:4], "little")
        if len(self.messages) < self.me.keep_messages:
            self.messages.append((seqno, kind))
        if kind == PROXY_REQ:
            self._on_request(seqno, payload)
        elif kind == PING and len(payload) == 12:
            self.pings += 1
            if self.me.mute != "pong":
                self.send(struct.pack("<I", PONG) + payload[4:])
        elif kind == PONG and len(payload) == 12:
            number, = struct.unpack_from("<q", payload, 4)
            if number not in self._my_pings:
                self.me.complain(f"pong without ping {number:#x}")
            self._my_pings.discard(number)
            self.pongs.append(number)
        elif kind in (CLOSE_CONN, CLOSE_EXT) and len(payload) == 12:
            self._on_close(struct.unpack_from("<Q", payload, 4)[0], "conn" if kind == CLOSE_CONN else "ext")
        else:
            self.me.complain(f"message {kind:#x} of {len(payload)} bytes")

    def _on_close(self, conn_id: int, kind: str) -> None:
        self.closes.append((conn_id, kind))
        if kind == "ext":
            self.me.complain(f"CLOSE_EXT from the client side for {conn_id:#x}")
        if conn_id in self.open:
            self.open.discard(conn_id)
            self.uploads.pop(conn_id, None)
            self.me.ledger.finish(conn_id)
        elif conn_id in self._told:             # ours and theirs crossed, or we sent for an id that nobody has
            self._told.discard(conn_id)
        elif conn_id in self.me.ledger.finished:
            self.me.complain(f"second close of {conn_id:#x}")
        else:
            self.strays.append(conn_id)

    def _on_request(self, seqno: int, payload: bytes) -> None:
        me = self.me
        flags, conn_id = struct.unpack_from("<IQ", payload, 4)
        client, our = parse_address(payload[16:36]), parse_address(payload[36:56])
        at, tag = 56, b""
        if flags & F_TAG:
            size, = struct.unpack_from("<I", payload, at)
            extra = payload[at + 4:at + 4 + size]
            at += 4 + size
            if extra and (len(extra) != 24 or extra[:5] != PROXY_TAG + b"\x10" or extra[21:] != bytes(3)):
                me.complain(f"extra block {extra.hex()}")
            tag = extra[5:21]
        data = payload[at:]
        for wrong, text in (
                (flags & (F_MAGIC | F_EXT2) != F_MAGIC | F_EXT2, "magic bits"), (flags & ~F_KNOWN, "unknown bits"),
                (bool(flags & F_ABRIDGED) == bool(flags & F_INTERMEDIATE), "not one transport"),
                (flags & F_PADDED and not flags & F_INTERMEDIATE, "padded without intermediate"),
                (bool(flags & F_PLAIN) != (len(data) >= 8 and data[:8] == bytes(8)), "bit of unencrypted data"),
                (me.want_tag is not None and tag != me.want_tag, f"tag {tag.hex()}"), (len(data) % 4, "data not in whole words"),
                (me.want_client is not None and client[0] != me.want_client, f"client address {client}"),
                (me.want_our is not None and our != me.want_our, f"our address {our}")):
            if wrong:
                me.complain(f"request of {conn_id:#x}, flags {flags:#x}, {len(data)} bytes: {text}")
        if conn_id in self._told and conn_id not in self.open:
            return                              # crossed with our close
        if me.ledger.request(self, conn_id):
            self.open.add(conn_id)
        if len(self.requests) < me.keep_messages:
            self.requests.append(Request(seqno, flags, conn_id, client, our, tag, data[:me.keep_bytes], len(data)))
        out = me.on_req(self, flags, conn_id, client, our, tag, data)
        if isinstance(out, (list, tuple)):
            if out:
                self.send(*out)
        else:
            threading.Thread(target=self._pump, args=(conn_id, out), daemon=True).start()

    def _pump(self, conn_id: int, messages: Iterable[bytes]) -> None:
        """A long answer beside everything else, as long as somebody wants it."""
        try:
            for message in messages:
                if conn_id not in self.open:
                    return
                self.send(message)
        except (OSError, Broken) as fault:
            self.why = self.why or str(fault)
            self.kill()


@dataclasses.dataclass
class FakeMiddleEnd:
    """A middle end on loopback.  Its constructor listens; knobs are described in fake-middle-end.md 1 and below."""

    host: str = "127.0.0.1"
    port: int = 0
    secret: bytes = SECRET
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    client_ip_for_kdf: str = ""
    client_port_for_kdf: int = 0
    server_ip_for_kdf: str = ""
    server_port_for_kdf: int = 0
    offer_crc32c: bool = True
    coalesce: bool = False
    split: int | Sequence[int] = ()             # size of the pieces that are sent; several are used in turn
    ts_offset: int = 0
    reply_flags: int | None = None              # of the handshake reply, whatever was negotiated
    reply_error: int | None = None              # answer every handshake with this code
    corrupt_crc: int | None = None              # these five name one of our frames by its seqno
    wrong_seq: int | None = None
    bad_len: int | None = None
    replay: int | None = None                   # sent twice
    truncate: int | None = None                 # half of it, then the end
    bad_len_value: int = 10
    mute: str = ""                              # silent from here on: "accept", "nonce", "handshake", "pong" (only those), "all"
    rude: bool = False                          # resets whoever connects
    on_req: OnRequest = serve
    answer_size: int = ANSWER_SIZE
    want_tag: bytes | None = None               # what every request has to say
    want_client: str | None = None
    want_our: tuple[str, int] | None = None
    keep_messages: int = 100_000                # how much a link remembers
    keep_bytes: int = 4096

    def __post_init__(self) -> None:
        self.started_wall = time.time()
        self.closing = False
        self.deaf = threading.Event()           # set: reads nothing on any link
        self.all_links: list[MeLink] = []       # everybody who connected
        self.refused = 0                        # connections reset by `rude`
        self._live: set[MeLink] = set()
        self._lock = threading.Lock()
        self._fresh: queue.SimpleQueue[MeLink] = queue.SimpleQueue()
        self._listener: socket.socket | None = None
        self.port = self.port or doubles.free_port(self.host)
        self.up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def faults(self) -> list[str]:
        return self.ledger.faults

    def complain(self, text: str) -> None:
        self.ledger.complain(f"{self.address}: {text}")

    def links(self) -> list[MeLink]:
        """Links alive now, past their handshake, oldest first."""
        with self._lock:
            return sorted((link for link in self._live if link.ready), key=lambda link: link.at)

    def up(self) -> None:
        """Listen (again)."""
        listener = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, self.port))
        listener.listen(1024)
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def down(self, how: str = "rst") -> None:
        """As if the machine went away: connections end, new ones are refused."""
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)       # wakes the thread in accept
            self._listener.close()
            self._listener = None
        self.kill_links(how)

    def kill_links(self, how: str = "rst") -> None:
        with self._lock:
            live = list(self._live)
        for link in live:
            link.kill(how)

    def close(self) -> None:
        self.closing = True
        self.down("fin")

    def take(self, timeout: float = 60.0) -> MeLink:
        """The next link that got through its handshake."""
        try:
            return self._fresh.get(timeout=doubles.patient(timeout))
        except queue.Empty:
            raise AssertionError(f"no link to {self.address} within {doubles.patient(timeout)} s") from None

    def greet(self, link: MeLink) -> None:
        with self._lock:
            self.ledger.links += 1
        self._fresh.put(link)

    def forget(self, link: MeLink) -> None:
        with self._lock:
            self._live.discard(link)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                if self.rude:
                    self.refused += 1
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    sock.close()
                    continue
                try:
                    link = MeLink(self, sock)
                except OSError:                 # gone already
                    sock.close()
                    continue
                with self._lock:
                    self.all_links.append(link)
                    self._live.add(link)
                if self.mute != "accept":
                    threading.Thread(target=link.run, daemon=True).start()
                if self._listener is not listener:      # accepted while we went down: down() has not seen it
                    link.kill("rst")

    # what a test asks

    def bound(self) -> dict[int, MeLink]:
        """Connection ids that are open here."""
        return {conn_id: link for link in self.links() for conn_id in link.open}

    def requests(self) -> list[Request]:
        return [request for link in list(self.all_links) for request in list(link.requests)]

    def closes(self) -> list[tuple[int, str]]:
        return [close for link in list(self.all_links) for close in list(link.closes)]

    def reasons(self) -> list[str]:
        """Why the links that are gone are gone."""
        return [link.why for link in list(self.all_links) if link.closed.is_set()]


# -- the site ----------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Page:
    """How one path is answered."""

    body: bytes = b""
    status: int = 200
    date_offset: float = 0.0                    # seconds that the Date header is wrong
    delay_s: float = 0.0
    failures: int = 0                           # answers with 503 before the real one
    hits: int = 0


class MeSite:
    """The three files a middle-end proxy downloads, over http on loopback."""

    PATHS = ("/getProxySecret", "/getProxyConfig", "/getProxyConfigV6")

    def __init__(self, secret: bytes = SECRET) -> None:
        self.pages = {path: Page() for path in self.PATHS}
        self.secret_page.body = secret
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            page = Page()

            def do_GET(self) -> None:
                page = self.page = site.pages.get(self.path.partition("?")[0], Page(status=404))
                page.hits += 1
                time.sleep(page.delay_s)
                failed = page.failures > 0
                page.failures -= failed
                body = b"try again" if failed else page.body
                self.send_response(503 if failed else page.status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Connection", "close")
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)
                self.close_connection = True

            def date_time_string(self, timestamp: float | None = None) -> str:
                return email.utils.formatdate((timestamp or time.time()) + self.page.date_offset, usegmt=True)

            def log_message(self, format: str, *args: Any) -> None:
                return

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def secret_page(self) -> Page:
        return self.pages["/getProxySecret"]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def publish(self, endpoints: dict[int, Sequence[str]], default_dc: int = 2, v6: bool = False) -> None:
        """List `endpoints` (signed dc -> "ip:port" texts)."""
        lines = [f"default {default_dc};"] if default_dc else []
        lines += [f"proxy_for {dc} {address};" for dc, addresses in endpoints.items() for address in addresses]
        self.pages["/getProxyConfigV6" if v6 else "/getProxyConfig"].body = ("\n".join(lines) + "\n").encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class MeWorld:
    """Middle ends for several data centres and their site.  `counts`: dc -> how many endpoints; negative twins share them."""

    def __init__(self, counts: dict[int, int] | None = None, twins: bool = True, host: str = "127.0.0.1", **knobs: Any) -> None:
        self.ledger = Ledger()
        self.twins = twins
        self.site = MeSite(knobs.get("secret", SECRET))
        counts = dict.fromkeys(range(1, 6), 1) if counts is None else counts
        self.mes = {dc: [FakeMiddleEnd(host, ledger=self.ledger, **knobs) for _ in range(n)] for dc, n in counts.items()}
        self.publish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[FakeMiddleEnd]:
        for mes in self.mes.values():
            yield from mes

    def publish(self) -> None:
        """Write the list as it is now."""
        listed = {sign * dc: [me.address for me in mes] for dc, mes in self.mes.items() for sign in ((1, -1) if self.twins else (1,))}
        v6 = any(":" in me.host for me in self)
        self.site.publish(listed, min(self.mes, key=lambda dc: dc != 2) if self.mes else 0, v6)

    def add(self, dc: int, **knobs: Any) -> FakeMiddleEnd:
        """One more endpoint; not listed before publish()."""
        me = FakeMiddleEnd(ledger=self.ledger, **knobs)
        self.mes.setdefault(dc, []).append(me)
        return me

    def rotate_secret(self, secret: bytes, old_links: bool = True) -> None:
        """A new secret on the site and in every middle end, for new links."""
        self.site.secret_page.body = secret
        for me in self:
            me.secret = secret
            if not old_links:
                me.kill_links()

    def config(self) -> dict[str, Any]:
        """What to lay over doubles.base_config."""
        return {"general": {
            "use_middle_proxy": True, "middle_proxy_nat_ip": "127.0.0.1", "proxy_secret_url": self.site.url("/getProxySecret"),
            "proxy_config_v4_url": self.site.url("/getProxyConfig"), "proxy_config_v6_url": self.site.url("/getProxyConfigV6")}}

    def links(self, dc: int | None = None) -> list[MeLink]:
        """Links alive now, to one data centre or to all."""
        return [link for key, mes in self.mes.items() if dc in (None, key) for me in mes for link in me.links()]

    @property
    def faults(self) -> list[str]:
        return self.ledger.faults

    def hang_up(self) -> None:
        for me in self:
            me.kill_links("fin")

    def close(self) -> None:
        for me in self:
            me.close()
        self.site.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a world until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dcs", default="1-5", help="data centres: 2, or 1-5")
    parser.add_argument("--endpoints", type=int, default=1, help="middle ends per data centre")
    parser.add_argument("--answer-size", type=int, default=ANSWER_SIZE, help="bytes per answer of a download")
    parser.add_argument("--coalesce", action="store_true")
    options = parser.parse_args(argv)
    first, _, last = options.dcs.partition("-")
    counts = dict.fromkeys(range(int(first), int(last or first) + 1), options.endpoints)
    with MeWorld(counts, answer_size=options.answer_size, coalesce=options.coalesce, keep_messages=0) as world:
        where = {"config": world.config(), "endpoints": {dc: [me.address for me in mes] for dc, mes in world.mes.items()}}
        print(json.dumps(where), flush=True)
        sys.stdin.read()
        print(json.dumps({"links": world.ledger.links, "faults": world.faults}), flush=True)
    return 1 if world.faults else 0


if __name__ == "__main__":
    sys.exit(main())
