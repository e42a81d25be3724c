"""Bare reference loops: the same system calls as the proxy's data path and nothing else.

usage: bench_loops.py DC_PORT       prints one JSON object {loop name: port}

Every loop takes one client at a time (`echo` and `many`: all that come), passes its 64-byte preamble on to the data centre and then
moves bytes.  Blocking sockets: one system call per read and one per write is all there is.
  scatter   data centre -> client: recvmsg_into 128 payload views between ready record headers, one send
  splice    data centre -> client: splice(2) through a pipe of 1 MiB
  aes2      client -> data centre: recv_into 1 MiB, two AES-CTR passes in place, one send
  scatter2  as scatter with two AES-CTR passes over the run first (fast_mode off)
  copy2     data centre -> client: recv_into 1 MiB, two AES-CTR passes in place, one send (fast_mode off)
  many      scatter for any number of sessions: epoll, non-blocking, what a client does not take is kept and its source rests
  echo      both ways on many sockets: epoll, recv, AES in place, send
  minimum   the least a FakeTLS handshake costs: accept, recv, one HMAC, one X25519 share, send, connect, one preamble, two key set-ups
"""
from __future__ import annotations

import fcntl
import hmac
import json
import os
import select
import socket
import sys
import threading
from collections.abc import Callable

from bench_peers import HELLO, aes, preamble
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

PAYLOAD, COUNT = 8209, 128
STRIDE = PAYLOAD + 5
MIB = 1 << 20
FLIGHT = b"\x16\x03\x03\x00\x7a" + bytes(122) + b"\x14\x03\x03\x00\x01\x01" + b"\x17\x03\x03\x08\x00" + bytes(2048)
DC_PORT = int(sys.argv[1]) if len(sys.argv) > 1 else 0


def listen() -> socket.socket:
    """A listener on an ephemeral port."""
    return socket.create_server(("127.0.0.1", 0), backlog=1024)


def to_dc() -> socket.socket:
    """A connection to the data centre."""
    sock = socket.create_connection(("127.0.0.1", DC_PORT))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def one_by_one(listener: socket.socket, move: Callable[[socket.socket, socket.socket], None]) -> None:
    """Serve clients one after the other."""
    while True:
        client, _ = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        dc = to_dc()
        dc.sendall(client.recv(64))
        try:
            move(client, dc)
        except OSError:
            pass
        client.close()
        dc.close()


def ready_records() -> tuple[bytearray, list[memoryview]]:
    """A buffer with 128 record headers in place, and the views between them."""
    memory = bytearray(COUNT * STRIDE + 5)     # a header more, so that a full run needs no case of its own
    for at in range(0, COUNT * STRIDE, STRIDE):
        memory[at:at + 5] = b"\x17\x03\x03" + PAYLOAD.to_bytes(2, "big")
    whole = memoryview(memory)
    return memory, [whole[at + 5:at + STRIDE] for at in range(0, COUNT * STRIDE, STRIDE)]


def scatter(client: socket.socket, dc: socket.socket) -> None:
    """Read between record headers, send once."""
    memory, views = ready_records()
    whole = memoryview(memory)
    while size := dc.recvmsg_into(views)[0]:
        full, tail = divmod(size, PAYLOAD)
        end = full * STRIDE
        if tail:
            memory[end + 3:end + 5] = tail.to_bytes(2, "big")
            client.sendall(whole[:end + 5 + tail])
            memory[end + 3:end + 5] = PAYLOAD.to_bytes(2, "big")
        else:
            client.sendall(whole[:end])


def scatter2(client: socket.socket, dc: socket.socket) -> None:
    """scatter with two cipher passes on the contiguous run."""
    memory, _ = ready_records()
    whole, source = memoryview(memory), memoryview(bytearray(COUNT * PAYLOAD))
    first, second = aes(bytes(32), bytes(16)), aes(bytes(32), bytes(16))
    while size := dc.recv_into(source):
        first.update_into(source[:size], source[:size])
        end = 0
        for at in range(0, size, PAYLOAD):
            length = min(PAYLOAD, size - at)
            start = at // PAYLOAD * STRIDE
            memory[start + 3:start + 5] = length.to_bytes(2, "big")
            second.update_into(source[at:at + length], whole[start + 5:start + 5 + length])
            end = start + 5 + length
        client.sendall(whole[:end])


def splice(client: socket.socket, dc: socket.socket) -> None:
    """Move pages through a pipe."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, MIB)
    while size := os.splice(dc.fileno(), write_end, MIB):
        while size:
            size -= os.splice(read_end, client.fileno(), size)
    os.close(read_end)
    os.close(write_end)


def two_passes(source: socket.socket, sink: socket.socket) -> None:
    """Read 1 MiB, two cipher passes in place, send."""
    view = memoryview(bytearray(MIB))
    first, second = aes(bytes(32), bytes(16)), aes(bytes(32), bytes(16))
    while size := source.recv_into(view):
        part = view[:size]
        first.update_into(part, part)
        second.update_into(part, part)
        sink.sendall(part)


def aes2(client: socket.socket, dc: socket.socket) -> None:
    """Client to data centre."""
    two_passes(client, dc)
    dc.shutdown(socket.SHUT_WR)
    while dc.recv(65_536):
        pass


def copy2(client: socket.socket, dc: socket.socket) -> None:
    """Data centre to client."""
    two_passes(dc, client)


def echo(listener: socket.socket) -> None:
    """Relay small messages both ways on any number of sockets: epoll, recv, AES in place, send."""
    listener.setblocking(False)
    poll = select.epoll()
    poll.register(listener.fileno(), select.EPOLLIN)
    pairs: dict[int, tuple[socket.socket, socket.socket]] = {}
    view = memoryview(bytearray(65_536))
    cipher = aes(bytes(32), bytes(16))
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                client, _peer = listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                dc = to_dc()
                dc.sendall(client.recv(64))
                pairs[client.fileno()], pairs[dc.fileno()] = (client, dc), (dc, client)
                poll.register(client.fileno(), select.EPOLLIN)
                poll.register(dc.fileno(), select.EPOLLIN)
                continue
            source, sink = pairs[fd]
            size = source.recv_into(view)
            if not size:
                for sock in (source, sink):
                    poll.unregister(sock.fileno())
                    del pairs[sock.fileno()]
                    sock.close()
                break                          # the other end may be in this batch
            part = view[:size]
            cipher.update_into(part, part)
            sink.send(part)


def many(listener: socket.socket) -> None:
    """Read between record headers, send once, keep what is left; what scatter becomes with more than one session."""
    listener.setblocking(False)
    poll = select.epoll()
    poll.register(listener.fileno(), select.EPOLLIN)
    memory, views = ready_records()
    whole = memoryview(memory)
    pairs: dict[int, tuple[socket.socket, socket.socket]] = {}       # of both ends: (client, dc)
    kept: dict[int, memoryview] = {}                                 # client -> what it did not take
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                client, _peer = listener.accept()
                dc = to_dc()
                dc.sendall(client.recv(64))
                pairs[client.fileno()] = pairs[dc.fileno()] = (client, dc)
                for sock in (client, dc):
                    sock.setblocking(False)
                    poll.register(sock.fileno(), select.EPOLLIN)
                continue
            client, dc = pairs[fd]
            if fd == client.fileno():
                if fd in kept:
                    kept[fd] = kept[fd][client.send(kept[fd]):]
                    if not kept[fd]:
                        del kept[fd]
                        poll.modify(fd, select.EPOLLIN)
                        poll.modify(dc.fileno(), select.EPOLLIN)
                elif data := client.recv(65_536):
                    dc.send(data)
                else:
                    for sock in (client, dc):
                        poll.unregister(sock.fileno())
                        del pairs[sock.fileno()]
                        sock.close()
                    break                      # the other end may be in this batch
                continue
            size = dc.recvmsg_into(views)[0]
            if not size:
                client.shutdown(socket.SHUT_WR)
                poll.modify(fd, 0)
                continue
            full, tail = divmod(size, PAYLOAD)
            end = full * STRIDE + (5 + tail if tail else 0)
            memory[full * STRIDE + 3:full * STRIDE + 5] = tail.to_bytes(2, "big")
            try:
                sent = client.send(whole[:end])
            except BlockingIOError:
                sent = 0
            if sent < end:
                kept[client.fileno()] = memoryview(bytes(whole[sent:end]))
                poll.modify(client.fileno(), select.EPOLLOUT)
                poll.modify(fd, 0)
            memory[full * STRIDE + 3:full * STRIDE + 5] = PAYLOAD.to_bytes(2, "big")


def minimum(listener: socket.socket) -> None:
    """The least that a FakeTLS handshake up to the first answer costs."""
    while True:
        client, _ = listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hello = client.recv(4096)
        hmac.digest(bytes(16), hello, "sha256")
        X25519PrivateKey.generate().public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        client.sendall(FLIGHT)
        block = client.recv(4096)[-64:]
        aes(bytes(32), bytes(16)).update(block)
        dc = to_dc()
        dc.sendall(preamble(b"", HELLO))
        client.sendall(b"\x17\x03\x03\x00\x1b" + dc.recv(4096))
        client.recv(16)
        client.close()
        dc.close()


def main() -> None:
    """Start every loop in a thread of its own; at any time the bench uses one of them."""
    ports = {}
    threads = []
    for name, loop in (("scatter", scatter), ("scatter2", scatter2), ("splice", splice), ("aes2", aes2), ("copy2", copy2)):
        listener = listen()
        ports[name] = listener.getsockname()[1]
        threads.append(threading.Thread(target=one_by_one, args=(listener, loop), daemon=True))
    for name, serve in (("echo", echo), ("many", many), ("minimum", minimum)):
        listener = listen()
        ports[name] = listener.getsockname()[1]
        threads.append(threading.Thread(target=serve, args=(listener,), daemon=True))
    for thread in threads:
        thread.start()
    print(json.dumps(ports), flush=True)
    threads[0].join()


if __name__ == "__main__":
    main()
