"""Doubles for the journeys: a Telegram data centre, a client, an address that never answers, and the proxy as a process.

Nothing here imports telemt.py.  Protocol and expectations come from the specification, so that a mistake of the program cannot
hide in its test.  All sockets are blocking and have time limits; everything stays on loopback.

  bytes      ciphers, the 64-byte header, frames, TL, ClientHello and server flight
  Peer       one end of an obfuscated2 stream;  Client and DcPeer are its two kinds
  FakeDc     accepts, reads headers, answers req_pq, obeys orders (frames that begin with ORDER) or leaves the peer to the test
  Proxy      a config file, a subprocess, its log, its descriptors
  Rig        all of them for one test, with the checks that end every journey
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import hmac
import http.client
import json
import os
import queue
import random
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import tomli_w
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_T = TypeVar("_T")

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = Path(os.environ.get("TELEMT_PROGRAM") or ROOT / "telemt.py")      # another build or an older copy may be tried

MIB = 1 << 20
USERS = {"alice": "000102030405060708090a0b0c0d0e0f", "bob": "f0e1d2c3b4a5968778695a4b3c2d1e0f"}
TAGS = {"abridged": b"\xef" * 4, "intermediate": b"\xee" * 4, "padded": b"\xdd" * 4}
ROUTES = [("classic", "abridged"), ("classic", "intermediate"), ("secure", "padded"),
          ("tls", "abridged"), ("tls", "intermediate"), ("tls", "padded")]      # what each mode admits, client-protocol D8
MODES = {"classic": "intermediate", "secure": "padded", "tls": "padded"}        # one transport for each
RECORD_MAX = 8209                                                               # proxy -> client, client-protocol D14
CLIENT_RECORD = 2878                                                            # client -> proxy, client-protocol 6.9
RESERVED = (b"HEAD", b"POST", b"GET ", b"OPTI", b"\xee" * 4, b"\xdd" * 4, b"\x16\x03\x01\x02")
CCS = b"\x14\x03\x03\x00\x01\x01"
APP = b"\x17\x03\x03"
HANGUP = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)


PATIENCE = float(os.environ.get("TELEMT_PATIENCE", "8"))                         # how much slower than a quiet machine this one may be


def patient(limit_s: float) -> float:
    """The limit of what takes `limit_s` at most on a quiet machine (TELEMT_PATIENCE=1), for this one: up to a minute.

    For whatever has to come, and comes: a good test never waits so long.  A wait that has to end by itself, because the test is
    that nothing comes, takes a number instead.
    """
    return max(limit_s, min(limit_s * PATIENCE, 60.0))


def poll(probe: Callable[[], _T], what: str, timeout: float = 5.0) -> _T:
    """First true value of `probe`; fails with `what` when there is none in time."""
    timeout = patient(timeout)
    end = time.monotonic() + timeout
    while not (value := probe()):
        assert time.monotonic() < end, f"not within {timeout} s: {what}"
        time.sleep(0.01)
    return value


_HELD: deque[socket.socket] = deque()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody else gets: below the range of outgoing connections, and held by a socket that only binds.

    Linux lets a second socket bind and listen beside it, as both have SO_REUSEADDR; the next `free_port` of any process has not.
    """
    while True:
        holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            holder.bind((host, random.SystemRandom().randrange(10_000, 32_000)))
        except OSError:
            holder.close()
            continue
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _HELD.append(holder)
        if len(_HELD) > 40:
            _HELD.popleft().close()
        return int(holder.getsockname()[1])


# -- bytes -------------------------------------------------------------------------------------------------------------------------

def ctr(key: bytes, iv: bytes) -> Callable[[bytes], bytes]:
    """AES-256-CTR as a function that remembers its position."""
    return Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor().update


def header_keys(header: bytes, secret: bytes | None) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
    """(key, iv) from the sender of `header` to its receiver, and back (client-protocol 5.2; without secret upstream-and-relay 8)."""
    there, back = header[8:56], header[8:56][::-1]

    def pair(part: bytes) -> tuple[bytes, bytes]:
        return (part[:32] if secret is None else hashlib.sha256(part[:32] + secret).digest()), part[32:48]
    return pair(there), pair(back)


def build_header(secret: bytes | None, tag: bytes, dc: int, start: bytes = b"") -> bytes:
    """A 64-byte header; `start` replaces its first bytes, else they obey client-protocol 5.5."""
    while True:
        plain = start + os.urandom(64 - len(start))
        if start or not (plain[0] == 0xEF or plain.startswith(RESERVED) or plain[4:8] == bytes(4)):
            break
    plain = plain[:56] + tag + struct.pack("<h", dc) + plain[62:]
    return plain[:56] + ctr(*header_keys(plain, secret)[0])(plain)[56:]


def wrap_frame(transport: str, payload: bytes) -> bytes:
    """One MTProto frame (client-protocol 8); padded ones get 0..3 random bytes behind them."""
    if transport == "abridged":
        words, odd = divmod(len(payload), 4)
        assert not odd, "abridged frames hold whole words"
        return (bytes([words]) if words < 0x7F else b"\x7f" + words.to_bytes(3, "little")) + payload
    tail = os.urandom(secrets.randbelow(4)) if transport == "padded" else b""
    return struct.pack("<I", len(payload) + len(tail)) + payload + tail


def pattern(seed: int, size: int) -> Iterator[bytes]:
    """`size` reproducible bytes that do not repeat, in pieces of at most 1 MiB."""
    stream = ctr(hashlib.sha256(b"pattern %d" % seed).digest(), bytes(16))
    for at in range(0, size, MIB):
        yield stream(bytes(min(MIB, size - at)))


@functools.cache
def pattern_sha(seed: int, size: int) -> bytes:
    """SHA-256 of `pattern(seed, size)`."""
    digest = hashlib.sha256()
    for piece in pattern(seed, size):
        digest.update(piece)
    return digest.digest()


REQ_PQ, REQ_PQ_MULTI, RES_PQ, REQ_DH, VECTOR = 0x60469778, 0xBE7E8EF1, 0x05162463, 0xD712E4BE, 0x1CB5C415
PQ = bytes.fromhex("17ed48941a08f981")
FINGERPRINT = 0xD09D1D85DE64FD85


def unencrypted(body: bytes) -> bytes:
    """An MTProto message without key: auth_key_id 0, message id, length, body."""
    return struct.pack("<qqi", 0, int(time.time()) << 32 | secrets.randbits(30) << 2 | 1, len(body)) + body


def res_pq(message: bytes) -> bytes:
    """The answer of a data centre to an unencrypted req_pq or req_pq_multi."""
    zero, _, size = struct.unpack_from("<qqi", message)
    call, nonce = struct.unpack_from("<I16s", message, 20)
    assert zero == 0 and size >= 20 and call in (REQ_PQ, REQ_PQ_MULTI), message.hex()      # TDLib pads it within its length
    pq = bytes([len(PQ)]) + PQ + bytes(3)                                       # TL bytes: length, content, up to a whole word
    return unencrypted(struct.pack("<I16s16s12sIIQ", RES_PQ, nonce, os.urandom(16), pq, VECTOR, 1, FINGERPRINT))


SUITES = bytes.fromhex("1302130313011301c02bc02fc02cc030cca9cca8c013c014009c009d002f0035")
X25519, MLKEM = 29, 0x11EC


def extension(kind: int, body: bytes) -> bytes:
    return struct.pack(">HH", kind, len(body)) + body


def build_hello(secret: bytes, *, at: float | None = None, clock: float = 0.0, sni: str = "example.com", session: int = 32,
                shares: Sequence[int] = (X25519,), length: int = 0) -> bytes:
    """A signed ClientHello record (client-protocol 6.1, 6.2).

    at: the client's unix time, default now; clock: seconds that it is wrong.  length: of the record body, default 512 or what is needed.
    """
    keys = b""
    for group in shares:
        point = X25519PrivateKey.generate().public_key().public_bytes_raw()
        key = os.urandom(1184) + point if group == MLKEM else point
        keys += struct.pack(">HH", group, len(key)) + key
    name = sni.encode()
    extensions = b"".join((
        extension(0x0000, struct.pack(">HBH", len(name) + 3, 0, len(name)) + name) if sni else b"",
        extension(0x0017, b""), extension(0xFF01, b"\0"),
        extension(0x000A, struct.pack(">HHHHH", 8, MLKEM, X25519, 23, 24)), extension(0x000B, b"\x01\0"), extension(0x0023, b""),
        extension(0x0010, b"\x00\x0c\x02h2\x08http/1.1"), extension(0x0005, b"\x01\0\0\0\0"),
        extension(0x000D, bytes.fromhex("001004030804040105030805050108060601")), extension(0x0012, b""),
        extension(0x0033, struct.pack(">H", len(keys)) + keys), extension(0x002D, b"\x01\x01"),
        extension(0x002B, bytes.fromhex("0403040303")), extension(0x001B, b"\x02\0\x02"),
    ))
    fixed = 4 + 2 + 32 + 1 + session + 2 + len(SUITES) + 2 + 2
    length = length or max(512, fixed + len(extensions) + 4)
    padding = length - fixed - len(extensions) - 4
    assert padding >= 0, "the hello does not fit"
    extensions += extension(0x0015, bytes(padding))
    body = b"\x03\x03" + bytes(32) + bytes([session]) + os.urandom(session) + struct.pack(">H", len(SUITES)) + SUITES + b"\x01\0"
    body += struct.pack(">H", len(extensions)) + extensions
    record = b"\x16\x03\x01" + struct.pack(">H", length) + b"\x01" + len(body).to_bytes(3, "big") + body
    assert len(record) == length + 5
    return sign_hello(record, secret, int((time.time() if at is None else at) + clock))


def sign_hello(record: bytes, secret: bytes, timestamp: int) -> bytes:
    """The record with its random bytes replaced by digest and clock."""
    mac = hmac.digest(secret, record[:11] + bytes(32) + record[43:], "sha256")
    clock = struct.unpack("<I", mac[28:])[0] ^ timestamp
    return record[:11] + mac[:28] + struct.pack("<I", clock) + record[43:]


@dataclasses.dataclass(frozen=True)
class Flight:
    """What a client may learn from the server's answer."""

    suite: bytes
    group: int
    share: bytes
    records: tuple[int, int, int]       # body lengths: ServerHello, CCS, ApplicationData
    order: tuple[int, ...]              # types of the extensions


def parse_flight(flight: bytes, hello: bytes, secret: bytes) -> Flight:
    """The checked answer; AssertionError unless it is exactly the three records of client-protocol 6.4, signed for `hello`."""
    first = struct.unpack_from(">H", flight, 3)[0]
    at = 5 + first
    assert flight[:3] == b"\x16\x03\x03", flight[:5].hex()
    assert flight[at:at + 9] == CCS + APP, flight[at:at + 9].hex()
    last = struct.unpack_from(">H", flight, at + 9)[0]
    assert len(flight) == at + 11 + last, "more or less than three records"
    digest = hmac.digest(secret, hello[11:43] + flight[:11] + bytes(32) + flight[43:], "sha256")
    assert digest == flight[11:43], "the server does not know the secret"
    assert first <= 10_240 and 64 <= last <= 10_240, (first, last)
    session = hello[44:44 + hello[43]]
    body = flight[5:at]
    assert body[0] == 2 and int.from_bytes(body[1:4], "big") == len(body) - 4 and body[4:6] == b"\x03\x03"
    assert body[38:39 + len(session)] == bytes([len(session)]) + session, "session id not echoed"
    rest = body[39 + len(session):]
    assert rest[:2] in (b"\x13\x01", b"\x13\x02", b"\x13\x03") and rest[2] == 0
    assert struct.unpack_from(">H", rest, 3)[0] == len(rest) - 5
    extensions, at = {}, 5
    while at < len(rest):
        kind, size = struct.unpack_from(">HH", rest, at)
        assert kind not in extensions
        extensions[kind], at = rest[at + 4:at + 4 + size], at + 4 + size
    assert set(extensions) == {0x33, 0x2B} and extensions[0x2B] == b"\x03\x04", extensions
    group, size = struct.unpack_from(">HH", extensions[0x33])
    share = extensions[0x33][4:]
    assert len(share) == size == {X25519: 32, MLKEM: 1120}[group], (group, size)
    assert on_curve(share[-32:]), "the key share is no point of Curve25519"
    return Flight(rest[:2], group, share, (first, 1, last), tuple(extensions))


def on_curve(key: bytes) -> bool:
    """Whether `key` is the x of a point on Curve25519 itself, not on its twist (client-protocol D13)."""
    p = 2 ** 255 - 19
    x = int.from_bytes(key, "little")
    return x < p and pow((x * x * x + 486662 * x * x + x) % p, (p - 1) // 2, p) == 1


# -- one end of a stream -----------------------------------------------------------------------------------------------------------

class Peer:
    """One end of an obfuscated2 stream on a blocking socket; `encrypt` and `decrypt` appear with the header."""

    encrypt: Callable[[bytes], bytes]
    decrypt: Callable[[bytes], bytes]

    def __init__(self, sock: socket.socket, transport: str = "padded", timeout: float = 20.0) -> None:
        self.sock, self.transport = sock, transport
        self.inbox = bytearray()                # decrypted and not asked for yet
        self.sent_bytes = self.got_bytes = 0    # of the stream inside
        self.sent_payload = self.got_payload = 0            # of its frames, without lengths and padding
        sock.settimeout(timeout)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def push(self, raw: bytes) -> None:
        """Send bytes as they are."""
        self.sock.sendall(raw)

    def pull(self, size: int) -> bytes:
        """Exactly `size` raw bytes; EOFError when they do not come."""
        raw = b""
        while len(raw) < size:
            if not (piece := self.sock.recv(size - len(raw))):
                raise EOFError(f"{len(raw)} of {size} bytes")
            raw += piece
        return raw

    def wrap(self, data: bytes) -> bytes:
        return data

    def unwrap(self, raw: bytes) -> bytes:
        return raw

    def send(self, data: bytes) -> None:
        self.push(self.wrap(self.encrypt(data)))
        self.sent_bytes += len(data)

    def fill(self) -> bool:
        """Wait for more bytes; False at the end of the stream."""
        if not (raw := self.sock.recv(256 * 1024)):
            return False
        if plain := self.unwrap(raw):
            self.inbox += self.decrypt(plain)
            self.got_bytes += len(plain)
        return True

    def take(self, limit: int) -> bytes:
        """1..limit bytes, or b"" at the end."""
        while not self.inbox:
            if not self.fill():
                return b""
        piece = bytes(self.inbox[:limit])
        del self.inbox[:limit]
        return piece

    def recv(self, size: int) -> bytes:
        """Exactly `size` bytes; EOFError when they do not come."""
        while len(self.inbox) < size:
            if not self.fill():
                raise EOFError(f"{len(self.inbox)} of {size} bytes")
        piece = bytes(self.inbox[:size])
        del self.inbox[:size]
        return piece

    def recv_digest(self, size: int) -> bytes:
        """SHA-256 of the next `size` bytes."""
        digest = hashlib.sha256()
        while size:
            if not (piece := self.take(size)):
                raise EOFError(f"{size} bytes short")
            digest.update(piece)
            size -= len(piece)
        return digest.digest()

    def send_pattern(self, seed: int, size: int) -> None:
        for piece in pattern(seed, size):
            self.send(piece)

    def send_frame(self, payload: bytes) -> None:
        self.send(wrap_frame(self.transport, payload))
        self.sent_payload += len(payload)

    def recv_frame(self) -> bytes:
        """Payload of the next frame, without its padding."""
        if self.transport == "abridged":
            words = self.recv(1)[0]
            payload = self.recv(4 * (words if words < 0x7F else int.from_bytes(self.recv(3), "little")))
        else:
            size = struct.unpack("<I", self.recv(4))[0]
            payload = self.recv(size)
            if self.transport == "padded":
                payload = payload[:size - size % 4]
        self.got_payload += len(payload)
        return payload

    def shutdown(self) -> None:
        """Say that no more bytes will follow."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        self.sock.close()

    def expect_eof(self) -> None:
        """The stream ends here, in order."""
        left = self.take(64)
        assert not left, f"expected the end, got {left.hex()}"

    def expect_closed(self, timeout: float = 5.0) -> None:
        """The other side closes, with FIN or RST, and has not sent a byte."""
        self.sock.settimeout(patient(timeout))
        try:
            raw = self.sock.recv(4096)
        except HANGUP:
            raw = b""
        assert not raw, f"expected silence, got {raw.hex()}"


# -- client ------------------------------------------------------------------------------------------------------------------------

class Client(Peer):
    """A Telegram app.  The constructor connects; `start` speaks up to the 64-byte header.  `hello` and `header` may be given."""

    def __init__(self, port: int, user: str = "alice", mode: str = "tls", transport: str = "", dc: int = 2, *, host: str = "127.0.0.1",
                 secret: bytes = b"", source: str = "", record: int = CLIENT_RECORD, dribble: bool = False, rcvbuf: int = 0,
                 hello: bytes = b"", header: bytes = b"", timeout: float = 20.0, path: str = "", **shape: Any) -> None:
        sock = socket.socket(socket.AF_UNIX if path else socket.AF_INET6 if ":" in host else socket.AF_INET)
        sock.settimeout(timeout)
        if rcvbuf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        if source:
            sock.bind((source, 0))
        try:
            sock.connect(path or (host, port))
        except OSError:
            sock.close()
            raise
        super().__init__(sock, transport or MODES[mode], timeout)
        self.mode, self.record, self.dribble = mode, record, dribble
        self.secret = secret or bytes.fromhex(USERS[user])
        self.hello = hello or (build_hello(self.secret, **shape) if mode == "tls" else b"")
        self.header = header or build_header(self.secret, TAGS[self.transport], dc)
        (key, iv), back = header_keys(self.header, self.secret)
        self.encrypt, self.decrypt = ctr(key, iv), ctr(*back)
        self.encrypt(bytes(64))                     # the header used up the start of this key stream
        self.to_client_key = back                   # what fast_mode shows to the data centre
        self.flight: Flight | None = None
        self.raw_flight = b""
        self.largest_record = 0
        self._ccs_due = True
        self._cipher_text = bytearray()

    def push(self, raw: bytes) -> None:
        if not self.dribble:
            return super().push(raw)
        for at in range(len(raw)):                  # one segment per byte; the pause lets the proxy read each alone
            self.sock.sendall(raw[at:at + 1])
            time.sleep(0.0002)
        return None

    def wrap(self, data: bytes) -> bytes:
        if self.mode != "tls":
            return data
        out = [CCS] if self._ccs_due else []
        self._ccs_due = False
        for at in range(0, len(data), self.record):
            piece = data[at:at + self.record]
            out += [APP, struct.pack(">H", len(piece)), piece]
        return b"".join(out)

    def unwrap(self, raw: bytes) -> bytes:
        if self.mode != "tls":
            return raw
        box, at, out = self._cipher_text, 0, []
        box += raw
        while len(box) - at >= 5:
            size = box[at + 3] << 8 | box[at + 4]
            assert box[at:at + 3] == APP, f"unexpected record {box[at:at + 5].hex()}"
            if len(box) - at < 5 + size:
                break
            assert 0 < size <= RECORD_MAX, f"record of {size} bytes"
            self.largest_record = max(self.largest_record, size)
            out.append(bytes(box[at + 5:at + 5 + size]))
            at += 5 + size
        del box[:at]
        return b"".join(out)

    def start(self) -> Self:
        """Through the handshake, header included."""
        if self.mode == "tls":
            self.push(self.hello)
            self.read_flight()
        self.push(self.wrap(self.header))
        return self

    def read_flight(self) -> None:
        """Take the server's answer to the hello and check it; nothing may follow it before we spoke."""
        first = self.pull(5)
        rest = self.pull(struct.unpack(">H", first[3:])[0] + 11)
        last = self.pull(struct.unpack(">H", rest[-2:])[0])
        self.raw_flight = first + rest + last
        self.flight = parse_flight(self.raw_flight, self.hello, self.secret)
        patience = self.sock.gettimeout()
        self.sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            early = self.sock.recv(64, socket.MSG_PEEK)
            assert not early, f"bytes behind the flight: {early.hex()}"
        self.sock.settimeout(patience)

    def req_pq(self, call: int = REQ_PQ_MULTI) -> None:
        """Ask the data centre for a key exchange, as every client does first."""
        nonce = os.urandom(16)
        self.send_frame(unencrypted(struct.pack("<I16s", call, nonce)))
        answer = self.recv_frame()
        kind, echoed = struct.unpack_from("<I16s", answer, 20)
        assert (kind, echoed) == (RES_PQ, nonce), answer.hex()

    def order(self, what: str, size: int = 0, seed: int = 1) -> None:
        self.send_frame(ORDER + struct.pack("<8sQQ", what.encode(), size, seed))

    def download(self, size: int, seed: int = 1) -> None:
        self.order("send", size, seed)
        assert self.recv_digest(size) == pattern_sha(seed, size), "download damaged"

    def upload(self, size: int, seed: int = 2) -> None:
        self.order("recv", size)
        self.send_pattern(seed, size)
        assert self.recv(32) == pattern_sha(seed, size), "upload damaged"

    def both_ways(self, size: int) -> None:
        self.order("both", size, 3)
        with helper(self.send_pattern, 4, size):
            assert self.recv_digest(size) == pattern_sha(3, size), "download damaged"
        assert self.recv(32) == pattern_sha(4, size), "upload damaged"

    def echo(self, payload: bytes = b"") -> None:
        payload = payload or b"ECHO" + os.urandom(4 * secrets.randbelow(64))
        self.send_frame(payload)
        assert self.recv_frame() == payload


@contextlib.contextmanager
def helper(work: Callable[..., None], *args: Any) -> Iterator[None]:
    """`work` in a thread while the body runs; its error becomes ours."""
    faults: list[BaseException] = []

    def run() -> None:
        try:
            work(*args)
        except BaseException as fault:
            faults.append(fault)
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(60)
    assert not thread.is_alive(), "helper thread hangs"
    if faults:
        raise faults[0]


# -- data centre -------------------------------------------------------------------------------------------------------------------

ORDER = b"ORDR"             # a frame that begins so is an order: 8 bytes of word, u64 size, u64 seed


class DcPeer(Peer):
    """A connection that a data centre has accepted, from the 64-byte header on."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.header = b""
        self.dc = 0

    def read_header(self) -> None:
        """EOFError if the peer sends none (a connectivity check)."""
        self.header = self.pull(64)
        assert self.header[0] != 0xEF and not self.header.startswith(RESERVED) and self.header[4:8] != bytes(4), self.header.hex()
        there, back = header_keys(self.header, None)
        self.decrypt, self.encrypt = ctr(*there), ctr(*back)
        tag, self.dc = struct.unpack_from("<4sh", self.decrypt(self.header), 56)
        self.transport = {v: k for k, v in TAGS.items()}[tag]

    def serve(self) -> None:
        """Answer frames until the peer goes."""
        while True:
            frame = self.recv_frame()
            if frame.startswith(bytes(8)) and frame[20:24] == struct.pack("<I", REQ_DH):
                self.send_frame(struct.pack("<i", -404))     # only Telegram can read what follows: the end of every key exchange here
            elif frame.startswith(bytes(8)):
                self.send_frame(res_pq(frame))
            elif frame.startswith(ORDER):
                word, size, seed = struct.unpack_from("<8sQQ", frame, 4)
                self.obey(word.rstrip(b"\0").decode(), size, seed)
            else:
                self.send_frame(frame)

    def obey(self, word: str, size: int, seed: int) -> None:
        if word == "send":
            self.send_pattern(seed, size)
        elif word == "recv":
            self.send(self.recv_digest(size))
        elif word == "both":
            with helper(self.send_pattern, seed, size):
                digest = self.recv_digest(size)
            self.send(digest)
        else:
            raise AssertionError(f"unknown order {word}")


class FramedPeer(DcPeer):
    """Moves bulk data in frames, as the middle end does: a client need not know which of the two it talks to."""

    def obey(self, word: str, size: int, seed: int) -> None:
        if word == "send":
            for block in pattern(seed, size):
                for at in range(0, len(block), 65_536):
                    self.send_frame(block[at:at + 65_536])
        elif word == "recv":
            digest = hashlib.sha256()
            while size > 0:
                frame = self.recv_frame()
                digest.update(frame)
                size -= len(frame)
            self.send_frame(digest.digest())
        else:
            raise AssertionError(f"unknown order {word}")


class FakeDc:
    """A data centre on loopback.  manual: after the header the test drives the peers that `take` returns; rude: resets everybody."""

    def __init__(self, manual: bool = False, host: str = "127.0.0.1", port: int = 0, rcvbuf: int = 0, rude: bool = False,
                 peer: type[DcPeer] = DcPeer) -> None:
        self.manual, self.rude, self._peer = manual, rude, peer
        self.peers: list[DcPeer] = []           # everybody who sent a header
        self.faults: list[str] = []             # what a real data centre would not understand
        self._fresh: queue.SimpleQueue[DcPeer] = queue.SimpleQueue()
        self._open: set[DcPeer] = set()
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if rcvbuf:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        self._listener.bind((host, port))
        self._listener.listen(1024)
        self.port = self._listener.getsockname()[1]
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer = self._peer(self._listener.accept()[0])
                if self.rude:
                    peer.reset()
                    continue
                peer.sock.settimeout(patient(10) if self.manual else 600)
                with self._lock:
                    self._open.add(peer)
                threading.Thread(target=self._attend, args=(peer,), daemon=True).start()

    def _attend(self, peer: DcPeer) -> None:
        try:
            peer.read_header()
            self.peers.append(peer)
            self._fresh.put(peer)
            if not self.manual:
                peer.serve()
        except (EOFError, OSError):
            pass
        except Exception as fault:
            self.faults.append(repr(fault))
        if not (self.manual and peer.header):
            peer.close()
            with self._lock:
                self._open.discard(peer)

    def take(self, timeout: float = 5.0) -> DcPeer:
        """The next connection that sent its header."""
        try:
            return self._fresh.get(timeout=patient(timeout))
        except queue.Empty:
            raise AssertionError("nobody came to the data centre") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)       # wakes the thread in accept
        self._listener.close()
        self.hang_up()

    def hang_up(self) -> None:
        """Close what is open."""
        with self._lock:
            for peer in self._open:
                with contextlib.suppress(OSError):
                    peer.sock.shutdown(socket.SHUT_RDWR)
                peer.close()


class BlackHole:
    """An address whose SYN is never answered: a listener with a full backlog."""

    def __init__(self) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._guest = socket.create_connection(self._listener.getsockname())        # the only place in the backlog

    def close(self) -> None:
        self._guest.close()
        self._listener.close()


# -- the proxy ---------------------------------------------------------------------------------------------------------------------

LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z (TRACE|DEBUG| INFO| WARN|ERROR) telemt(::\w+)*: \S?.*")      # config.md 5.4
_LIMITED = ("import os, resource, sys; n = int(sys.argv[1]); resource.setrlimit(resource.RLIMIT_NOFILE, (n, n)); "
            "os.execv(sys.argv[2], sys.argv[2:])")
_ENV_DROPPED = ("RUST_LOG", "NO_COLOR", "TELEMT_", "PYTHON", "COVERAGE",
                "MAKE", "MFLAGS", "ARGS", "VENV", "JOBS")      # of the `make test` around us: no matter of the make that a test runs


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, table by table; None takes a key away."""
    out = dict(base)
    for key, value in over.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merged(out[key], value)
        else:
            out[key] = value
    return out


def base_config(port: int, dc: str) -> dict[str, Any]:
    """Direct mode, all modes, every DC index at `dc`, and no reason to leave loopback.

    bind_addresses keeps the start-up checks of the built-in DC table on this machine: from a loopback source they cannot be reached.
    """
    return {
        "general": {"use_middle_proxy": False, "middle_proxy_nat_probe": False, "log_level": "debug", "beobachten": False,
                    "event_loop": os.environ.get("TELEMT_POLLER", "auto"),
                    "modes": {"classic": True, "secure": True, "tls": True}, "links": {"show": []}},
        "network": {"stun_use": False, "stun_servers": [], "http_ip_detect_urls": []},
        "server": {"port": port, "listeners": [{"ip": "127.0.0.1"}]},
        "timeouts": {"client_handshake": 10},
        "censorship": {"tls_domain": "example.com", "mask": False, "tls_emulation": False},
        "access": {"users": dict(USERS)},
        "upstreams": [{"type": "direct", "bind_addresses": ["127.0.0.1", "::1"]}],
        "dc_overrides": {str(index): [dc] for n in (1, 2, 3, 4, 5, 203, 10002) for index in (n, -n)},
    }


class Proxy:
    """telemt.py as a subprocess; the constructor returns when it listens (or, with `ready`, when that pattern is logged)."""

    def __init__(self, folder: Path, config: dict[str, Any] | str, *, port: int = 0, ready: str = r"Listening on ", nofile: int = 0,
                 env: dict[str, str] | None = None, args: Sequence[str] = (), command: Sequence[str] = ()) -> None:
        self.port, self.folder = port, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "config.toml"
        self.config.write_text(config if isinstance(config, str) else tomli_w.dumps(config), encoding="utf-8")
        start = [*(command or [sys.executable, "-B", str(PROGRAM)]), str(self.config), *args]
        if nofile:
            start = [sys.executable, "-S", "-c", _LIMITED, str(nofile), *start]
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._news = threading.Condition()
        self._may_read = threading.Lock()
        self.process = subprocess.Popen(start, cwd=folder, env=clean_env(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="backslashreplace")
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True)
                         for pair in ((self.process.stdout, self.lines), (self.process.stderr, self.errors))]
        for reader in self._readers:
            reader.start()
        self.pid = self.process.pid
        self.quiet_fds: Counter[str] = Counter()
        if ready:
            try:
                self.wait_log(ready)
            except AssertionError:
                self.kill()                     # nobody gets hold of us to do it
                raise
            self.quiet_fds = self.fds()

    def _read(self, pipe: Any, into: list[str]) -> None:
        for line in pipe:
            with self._may_read, self._news:
                into.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    @contextlib.contextmanager
    def hold_log(self) -> Iterator[None]:
        """Nobody empties the pipes of the process meanwhile."""
        with self._may_read:
            yield

    def log(self, pattern_text: str) -> list[re.Match[str]]:
        """Every match in what was logged up to now."""
        return [found for line in list(self.lines) if (found := re.search(pattern_text, line))]

    def wait_log(self, pattern_text: str, count: int = 1, timeout: float = 10.0) -> re.Match[str]:
        """The `count`-th match, waiting for it."""
        end = time.monotonic() + patient(timeout)
        with self._news:
            while len(found := self.log(pattern_text)) < count:
                alive = any(reader.is_alive() for reader in self._readers)
                assert alive and time.monotonic() < end, f"not logged: {pattern_text}\n{self.tail()}"
                self._news.wait(0.2)
        return found[count - 1]

    def tail(self) -> str:
        return "\n".join([f"-- proxy in {self.folder}, exit {self.process.poll()}", *self.lines[-60:], "-- stderr", *self.errors[-40:]])

    # what /proc knows

    def fds(self) -> Counter[str]:
        """Open descriptors by kind: listen, tcp (connected or connecting), socket (neither), pipe, anon_inode, file."""
        states = {}
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(FileNotFoundError):
                for row in Path(f"/proc/{self.pid}/net/{table}").read_text().splitlines()[1:]:
                    cells = row.split()
                    states[cells[9]] = "listen" if cells[3] == "0A" else "tcp"
        kinds: Counter[str] = Counter()
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                kind, _, inode = os.readlink(entry).partition(":")
                kinds[states.get(inode.strip("[]"), "socket") if kind == "socket" else kind if inode else "file"] += 1
        return kinds

    def rss(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def cpu(self) -> float:
        """Seconds of processor time used so far."""
        cells = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(cells[11]) + int(cells[12])) / os.sysconf("SC_CLK_TCK")

    def leaks(self) -> Counter[str]:
        """Descriptors beyond those of the quiet start, by kind; no TCP connection at all may be left.

        Excused: the pipes that splice(2) goes through, kept for the next bulk flow, at most 16; and listeners, which may open one by one.
        """
        now = self.fds()
        spare = Counter({kind: n for kind, n in self.quiet_fds.items() if kind != "tcp"}) + Counter(pipe=32, listen=now["listen"])
        if self.log("poller=uvloop"):
            spare["socket"] += 2                # its pair for signals, opened when the loop begins to turn
        return now - spare

    # the end

    def settle(self, timeout: float = 8.0) -> None:
        """Wait until no descriptor is left over; call when all clients are closed."""
        end = time.monotonic() + patient(timeout)
        while left := self.leaks():
            assert self.process.poll() is None, f"the proxy is gone\n{self.tail()}"
            assert time.monotonic() < end, f"leaked descriptors: {dict(left)}\n{self.tail()}"
            time.sleep(0.02)

    def check_output(self) -> None:
        """No traceback, nothing on stderr, every line of the log in its layout."""
        assert not self.errors, self.tail()
        bad = [line for line in self.lines if not LOG_LINE.fullmatch(line)]
        assert not bad, bad[:20]
        assert not self.log("Traceback"), self.tail()

    def wait_exit(self, timeout: float = 4.0) -> int:
        """Exit code, within `timeout`; all output has been read then."""
        timeout = patient(timeout)
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s\n{self.tail()}") from None
        for reader in self._readers:
            reader.join(patient(5))
        return code

    def stop(self, sig: signal.Signals = signal.SIGTERM) -> None:
        """As an init system does: TERM, exit 0 within 4 s, clean output."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        code = self.wait_exit()
        assert code == 0, f"exit code {code}\n{self.tail()}"
        assert self.log("Shutting down"), self.tail()
        self.check_output()

    def kill(self) -> None:
        """Without manners; safe to call twice."""
        self.process.kill()
        for found in self.log(r"Process (\d+) accepts now"):     # programs that took over from it
            with contextlib.suppress(OSError):
                os.kill(int(found[1]), signal.SIGKILL)
        self.wait_exit()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


def clean_env(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Our environment without what would change the program's behaviour."""
    return {k: v for k, v in os.environ.items() if not k.startswith(_ENV_DROPPED)} | {"PYTHONDONTWRITEBYTECODE": "1"} | (extra or {})


def run_program(*args: str, cwd: Path, timeout: float = 10.0, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """telemt.py up to its end."""
    return subprocess.run([sys.executable, "-B", str(PROGRAM), *args], cwd=cwd, env=clean_env(env), timeout=patient(timeout), check=False,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)


class ApiScript:
    """A script that uses the Control API: one connection per request."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port, self.host = port, host

    def ask(self, method: str, path: str, body: Any = None, revision: str = "", timeout: float = 20.0) -> tuple[int, dict[str, Any]]:
        """(status, envelope)."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), {"If-Match": revision} if revision else {})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def data(self, path: str) -> Any:
        """`data` of a successful GET."""
        status, found = self.ask("GET", path)
        assert status == 200 and found["ok"], found
        return found["data"]

    def change(self, method: str, path: str, body: Any = None, revision: str = "") -> str:
        """A mutation that has to succeed; the new revision."""
        status, found = self.ask(method, path, body, revision)
        assert status in (200, 201) and found["ok"], (status, found)
        return str(found["revision"])


# -- everything for one journey ----------------------------------------------------------------------------------------------------

class Rig:
    """Makes proxies, data centres and clients, and ends a journey with its checks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.proxies: list[Proxy] = []
        self.dcs: list[FakeDc] = []
        self.clients: list[Client] = []
        self.env: dict[str, str] = {}           # of proxies that are given none
        self._main: FakeDc | None = None
        self._things: list[Any] = []

    @property
    def dc(self) -> FakeDc:
        """The data centre for all indices that a test does not override."""
        return self._main or self.main_dc()

    def main_dc(self, **options: Any) -> FakeDc:
        self._main = self.add_dc(**options)
        return self._main

    def add_dc(self, **options: Any) -> FakeDc:
        self.dcs.append(FakeDc(**options))
        return self.dcs[-1]

    def black_hole(self) -> BlackHole:
        hole = BlackHole()
        self._things.append(hole)
        return hole

    def proxy(self, config: dict[str, Any] | None = None, **options: Any) -> Proxy:
        """A running proxy; `config` is laid over base_config."""
        port = options.pop("port", 0) or free_port()
        options.setdefault("env", self.env)
        folder = self.folder / f"proxy{len(self.proxies)}"
        self.proxies.append(Proxy(folder, merged(base_config(port, self.dc.address), config or {}), port=port, **options))
        return self.proxies[-1]

    def dial(self, user: str = "alice", mode: str = "tls", transport: str = "", dc: int = 2, **options: Any) -> Client:
        """A client that has connected to the last proxy and said nothing."""
        self.clients.append(Client(options.pop("port", 0) or self.proxies[-1].port, user, mode, transport, dc, **options))
        return self.clients[-1]

    def local(self, path: str, **options: Any) -> Client:
        """The same through a unix socket."""
        return self.dial(path=path, **options)

    def client(self, user: str = "alice", mode: str = "tls", transport: str = "", dc: int = 2, **options: Any) -> Client:
        """A client that has sent its header."""
        return self.dial(user, mode, transport, dc, **options).start()

    def close_clients(self) -> None:
        for client in self.clients:
            client.close()

    def finish(self) -> None:
        """The end of a good journey: nothing leaked, nothing complained, everybody leaves in order."""
        self.close_clients()
        for dc in self.dcs:
            if dc.manual:                       # the others go by themselves when the proxy passes the end on
                dc.hang_up()
        for proxy in self.proxies:
            if proxy.process.poll() is None:
                proxy.settle()
                proxy.stop()
        faults = [fault for dc in self.dcs for fault in dc.faults]
        assert not faults, faults

    def close(self) -> None:
        self.close_clients()
        for proxy in self.proxies:
            proxy.kill()
        for thing in [*self.dcs, *self._things]:
            thing.close()
