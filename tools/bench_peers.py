"""The other ends of a benchmark: a data centre that does what the DC number says, and cheap clients.

The data centre runs as a process of its own (`python tools/bench_peers.py dc ...`), so that only the proxy's CPU time is
measured.  Nothing here decrypts: a payload is constant bytes, whatever they mean to a cipher.
"""
from __future__ import annotations

import hashlib
import hmac
import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

SOURCE, SINK, ECHO, DRIP, HELLO, SILENT = range(1, 7)            # what the DC number asks for
SHARE = 100                                                      # SHARE + n: one n-th of the bulk (at least 1 MiB), once told to
CHUNK = bytes(1 << 20)
DRIP_BYTES = 4096
DRIP_EVERY_S = 150e-6                                            # 27 MB/s: every write is a read of its own at the proxy
TAG = b"\xdd\xdd\xdd\xdd"


def step_back() -> None:
    """Run only when nobody else wants the processor."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def aes(key: bytes, iv: bytes) -> CipherContext:
    """An AES-256-CTR keystream."""
    return Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor()


# -- data centre


class DataCentre:
    """Serves every connection by the DC number in its preamble."""

    def __init__(self, bulk: int) -> None:
        self.bulk = bulk
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        self.scrap = bytearray(1 << 20)

    def serve(self) -> None:
        """Print the port, then run until killed."""
        print(self.listener.getsockname()[1], flush=True)
        while True:
            for key, _ in self.selector.select():
                key.data(key.fileobj)

    def accept(self, _: object) -> None:
        """Take every waiting connection."""
        while True:
            try:
                sock, _peer = self.listener.accept()
            except BlockingIOError:
                return
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(sock, selectors.EVENT_READ, self.preamble)

    def preamble(self, sock: socket.socket) -> None:
        """Read the 64 bytes and become what they ask for."""
        head = sock.recv(64)
        if len(head) < 64:
            self.drop(sock)
            return
        plain = aes(head[8:40], head[40:56]).update(head)
        dc = int.from_bytes(plain[60:62], "little", signed=True)
        if dc == SOURCE:
            self.start(sock, self.bulk)
        elif dc > SHARE:                           # when told, so that all sessions stand before the first byte flows
            self.selector.modify(sock, selectors.EVENT_READ, lambda sock: self.start(sock, max(self.bulk // (dc - SHARE), 1 << 20)))
        elif dc == DRIP:
            self.selector.unregister(sock)
            threading.Thread(target=self.drip, args=(sock,), daemon=True).start()
        elif dc == HELLO:
            sock.send(b"answer to the first message")
            self.selector.modify(sock, selectors.EVENT_READ, self.sink)
        else:
            self.selector.modify(sock, selectors.EVENT_READ, self.echo if dc == ECHO else self.sink)

    def start(self, sock: socket.socket, size: int) -> None:
        """Send `size` bytes from now on."""
        left = [size]
        self.selector.modify(sock, selectors.EVENT_WRITE, lambda sock: self.pour(sock, left))

    def pour(self, sock: socket.socket, left: list[int]) -> None:
        """Send the bulk, then end the stream."""
        try:
            left[0] -= sock.send(CHUNK[:min(len(CHUNK), left[0])] if left[0] < len(CHUNK) else CHUNK)
        except OSError:
            self.drop(sock)
            return
        if left[0] <= 0:
            sock.shutdown(socket.SHUT_WR)
            self.selector.modify(sock, selectors.EVENT_READ, self.sink)

    def drip(self, sock: socket.socket) -> None:
        """Send an eighth of the bulk in paced writes of 4 KiB."""
        sock.setblocking(True)
        piece, due = CHUNK[:DRIP_BYTES], time.perf_counter()
        try:
            for _ in range(self.bulk // 8 // DRIP_BYTES):
                sock.sendall(piece)
                due += DRIP_EVERY_S
                while time.perf_counter() < due:
                    pass
        except OSError:
            pass
        sock.close()

    def sink(self, sock: socket.socket) -> None:
        """Throw away what comes; count by closing when the client does."""
        try:
            size = sock.recv_into(self.scrap, len(self.scrap), socket.MSG_TRUNC)
        except OSError:
            size = 0
        if not size:
            self.drop(sock)

    def echo(self, sock: socket.socket) -> None:
        """Send back what comes."""
        try:
            data = sock.recv(65_536)
            if data:
                sock.send(data)
        except OSError:
            data = b""
        if not data:
            self.drop(sock)

    def drop(self, sock: socket.socket) -> None:
        """Forget a connection."""
        self.selector.unregister(sock)
        sock.close()


# -- clients


def preamble(secret: bytes, dc: int) -> bytes:
    """64 obfuscated bytes of a client with `secret` that wants `dc`; random, never a reserved prefix."""
    head = b"A" + os.urandom(55)
    key = hashlib.sha256(head[8:40] + secret).digest() if secret else head[8:40]
    plain = head + TAG + struct.pack("<h", dc) + b"\0\0"
    return head + aes(key, head[40:56]).update(plain)[56:]


def client_hello(secret: bytes) -> bytes:
    """A signed ClientHello record of 517 bytes."""
    name = b"front.example"
    extensions = b"".join(kind.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body for kind, body in (
        (0, struct.pack(">HBH", len(name) + 3, 0, len(name)) + name), (51, b"\x00\x24\x00\x1d\x00\x20" + os.urandom(32)),
        (43, b"\x02\x03\x04")))
    fixed = b"\x03\x03" + bytes(32) + b"\x20" + os.urandom(32) + b"\x00\x02\x13\x01\x01\x00"
    padding = 512 - 4 - len(fixed) - 2 - len(extensions) - 4
    extensions += b"\x00\x15" + padding.to_bytes(2, "big") + bytes(padding)
    body = fixed + len(extensions).to_bytes(2, "big") + extensions
    record = bytearray(b"\x16\x03\x01\x02\x00\x01" + len(body).to_bytes(3, "big") + body)
    mac = hmac.digest(secret, record, "sha256")
    record[11:43] = mac[:28] + (int(time.time()) ^ int.from_bytes(mac[28:], "little")).to_bytes(4, "little")
    return bytes(record)


def record(data: bytes) -> bytes:
    """One application-data record."""
    return b"\x17\x03\x03" + len(data).to_bytes(2, "big") + data


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes; ConnectionError at an early end."""
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise ConnectionError(f"peer ended after {len(data)} of {size} bytes")
        data += piece
    return data


def shake_hands(sock: socket.socket, secret: bytes, hello: bytes = b"") -> None:
    """FakeTLS up to and including the server's flight of three records."""
    sock.sendall(hello or client_hello(secret))
    for _ in range(3):
        head = read_exactly(sock, 5)
        read_exactly(sock, int.from_bytes(head[3:5], "big"))


def connect(port: int, kind: str, secret: bytes, dc: int) -> socket.socket:
    """A client that is through its handshake.  kind: tls, plain, or bare (a reference loop)."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if kind == "tls":
        shake_hands(sock, secret)
        sock.sendall(b"\x14\x03\x03\x00\x01\x01" + record(preamble(secret, dc)))
    else:
        sock.sendall(preamble(secret if kind == "plain" else b"", dc))
    return sock


def discard(sock: socket.socket, scrap: bytearray) -> int:
    """Read to the end without copying; returns the bytes that came."""
    total = 0
    while size := sock.recv_into(scrap, len(scrap), socket.MSG_TRUNC):
        total += size
    return total


def records_of(size: int, payload: int = 16_384) -> bytes:
    """`size` payload bytes in client records of `payload` bytes."""
    piece = record(bytes(payload))
    return piece * (size // payload)


def upload(sock: socket.socket, chunk: bytes, times: int) -> None:
    """Send `chunk` `times` times, end the stream, and wait until the other side closed."""
    for _ in range(times):
        sock.sendall(chunk)
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(65_536):
        pass


def drain_all(socks: list[socket.socket], scrap: bytearray) -> int:
    """Read every socket to its end without copying; returns the bytes that came."""
    selector = selectors.DefaultSelector()
    for sock in socks:
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ, sock)
    total, busy = 0, len(socks)
    while busy:
        for key, _ in selector.select(60):
            size = key.data.recv_into(scrap, len(scrap), socket.MSG_TRUNC)
            total += size
            if not size:
                selector.unregister(key.data)
                busy -= 1
    selector.close()
    return total


def ping_pong(socks: list[socket.socket], message: bytes, answer: int, rounds: int,
              on_time: Callable[[float], None] | None = None) -> None:
    """Every socket sends `message` and waits for `answer` bytes, `rounds` times; on_time(seconds of one round trip)."""
    selector = selectors.DefaultSelector()
    state: dict[socket.socket, list[float]] = {}
    for sock in socks:
        sock.setblocking(False)
        selector.register(sock, selectors.EVENT_READ, sock)
        state[sock] = [rounds, answer, time.perf_counter()]
        sock.send(message)
    busy = len(socks)
    while busy:
        for key, _ in selector.select(30):
            sock = key.data
            row = state[sock]
            row[1] -= len(sock.recv(65_536))
            if row[1] > 0:
                continue
            if on_time:
                on_time(time.perf_counter() - row[2])
            row[0] -= 1
            if row[0] == 0:
                busy -= 1
                continue
            row[1], row[2] = answer, time.perf_counter()
            sock.send(message)
    selector.close()
    for sock in socks:
        sock.setblocking(True)


if __name__ == "__main__":
    if "idle" in sys.argv:
        step_back()
    DataCentre(int(sys.argv[2])).serve()
