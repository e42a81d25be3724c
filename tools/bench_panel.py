"""Be a panel: ask an API for stats/zero/all and now and then for the list of users, until somebody ends this process.

usage: python -I -S bench_panel.py PORT POLLS_PER_S

bench_api.py runs it beside a download, on the same few processors: so it does no more than it must, and imports next to nothing.
One connection, requests made once, the length of an answer read from its head, the answer dropped unread.
"""
from __future__ import annotations

import socket
import sys
import time

ZERO, USERS = (b"GET /v1/%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path for path in (b"stats/zero/all", b"users"))
PER_CONNECTION = 900                   # a connection serves 1,000 requests
MIB = 1 << 20


def connect(port: int) -> socket.socket:
    """A connection to the API on this machine."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def ask(sock: socket.socket, request: bytes, scrap: bytearray) -> None:
    """One request; the answer is read and dropped.  AssertionError: it was no 200."""
    sock.sendall(request)
    have, end = 0, -1
    while end < 0:
        got = sock.recv_into(memoryview(scrap)[have:])
        assert got, "the API closed the connection"
        have += got
        end = scrap.find(b"\r\n\r\n", 0, have)
    assert scrap.startswith(b"HTTP/1.1 200"), bytes(scrap[:end])
    at = scrap.index(b"Content-Length: ", 0, end) + 16
    left = int(scrap[at:scrap.index(b"\r\n", at)]) - (have - end - 4)
    while left > 0:
        left -= sock.recv_into(scrap, min(left, len(scrap)))


def main(port: int, polls_per_s: int) -> None:
    """Ask at an even pace."""
    scrap, sock, count = bytearray(MIB), connect(port), 0
    begin = time.perf_counter()
    while True:
        ask(sock, ZERO, scrap)
        if count % polls_per_s == 0:
            ask(sock, USERS, scrap)
        count += 1
        if count % PER_CONNECTION == 0:
            sock.close()
            sock = connect(port)
        time.sleep(max(0.0, begin + count / polls_per_s - time.perf_counter()))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
