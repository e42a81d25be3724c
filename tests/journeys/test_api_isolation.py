"""What HTTP clients may do to the API, and what of it the sessions notice: nothing (api.md 2, 14.1)."""
from __future__ import annotations

import contextlib
import itertools
import re
import select
import socket
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from doubles import MIB, Rig, free_port, patient, poll
from tests.api_client import ApiClient


@pytest.fixture
def serve(rig: Rig) -> Iterator[Callable[..., int]]:
    """serve(config, **server_api) -> port of the API of a new proxy."""
    def begin(config: dict[str, Any] | None = None, **keys: Any) -> int:
        port = free_port()
        config = dict(config or {})
        server = dict(config.pop("server", {})) | {"api": {"enabled": True, "listen": f"127.0.0.1:{port}", **keys}}
        rig.proxy({**config, "server": server}).wait_log("API endpoint")
        return port
    yield begin


def knock(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=patient(30))


def read_all(sock: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionError):
        while data := sock.recv(65536):
            found += data
    return found


def transfer_beside(rig: Rig, attack: Callable[[], None]) -> None:
    """A FakeTLS session that moves 24 MiB both ways, checked to the byte, while `attack` runs."""
    client = rig.client("alice")
    client.req_pq()
    thread = threading.Thread(target=attack)
    thread.start()
    try:
        for seed in range(3):
            client.download(4 * MIB, seed=seed + 1)
            client.upload(4 * MIB, seed=seed + 7)
    finally:
        thread.join(120)
    assert not thread.is_alive()


def test_a_thousand_idle_connections(serve: Callable[..., int], rig: Rig) -> None:
    """64 of them get a place, the others are closed at once; sessions go on, and so does the API when they have left."""
    port = serve()
    socks: list[socket.socket] = []

    def crowd() -> None:
        for _ in range(1000):
            with contextlib.suppress(OSError):
                socks.append(knock(port))

    transfer_beside(rig, crowd)
    proxy = rig.proxies[-1]
    poll(lambda: proxy.fds()["tcp"] <= 64 + 4, "only 64 connections of the API are kept", 20)
    assert len(socks) >= 900
    for sock in socks:
        sock.close()
    poll(lambda: proxy.fds()["tcp"] <= 4, "their places are free again", 20)
    client = ApiClient(port)
    assert client.get("/v1/health")["status"] == "ok"
    client.close()


def test_idle_connections_make_room_for_who_asks(serve: Callable[..., int], rig: Rig) -> None:
    """A client that holds all places and says nothing locks nobody out for longer than some seconds."""
    port = serve()
    socks = [knock(port) for _ in range(64)]
    assert read_all(knock(port)) == b""                     # full: closed at once

    def asks() -> bool:
        with contextlib.suppress(ConnectionError), contextlib.closing(ApiClient(port)) as client:
            return client.get("/v1/health")["status"] == "ok"
        return False
    poll(asks, "somebody who rests made room", 20)
    for sock in socks:
        sock.close()


def test_slow_requests_hold_up_nobody(serve: Callable[..., int], rig: Rig) -> None:
    """Slow loris on head and body, and clients that never read their answer, beside a session and beside another API client."""
    port = serve(request_body_limit_bytes=1_000_000)
    socks = [knock(port) for _ in range(30)]
    stop, begun = threading.Event(), threading.Event()
    unanswered: list[int] = []

    def attack() -> None:
        for number, sock in enumerate(socks):
            sock.sendall([b"GET /v1/he", b"POST /v1/users HTTP/1.1\r\nContent-Length: 1000\r\n\r\n{",
                          b"GET /v1/openapi.json HTTP/1.1\r\n\r\n" * 50][number % 3])
        begun.set()
        while not stop.wait(0.1):
            for number, sock in enumerate(socks):
                with contextlib.suppress(OSError):
                    if number % 3 < 2:
                        sock.sendall(b"x")

    client = ApiClient(port)
    thread = threading.Thread(target=attack)
    thread.start()
    try:
        def panel() -> None:
            assert begun.wait(patient(10))
            for _ in range(50):
                client.get("/v1/stats/zero/all")
                unanswered.append(len(halves) - len(select.select(halves, [], [], 0)[0]))
        halves = [sock for number, sock in enumerate(socks) if number % 3 == 0]
        transfer_beside(rig, panel)
        assert unanswered[0] == len(halves), "whoever asked waited until the slow ones had their 408"
        assert len(unanswered) == 50
    finally:
        stop.set()
        thread.join()
        client.close()
        for sock in socks:
            sock.close()


def test_ten_seconds_and_no_longer(serve: Callable[..., int], rig: Rig) -> None:
    """The deadlines of the whole program, all at once beside a session: half a head, half a body, half a chunk are 408; while another
    program never stops writing the file, changes are 409, and who waits for them longer than 10 s is told so (api.md 4, 12, 14.1)."""
    port = serve()
    path, stop = rig.proxies[-1].config, threading.Event()
    text = path.read_text()
    halves = [b"GET /v1/he", b"POST /v1/users HTTP/1.1\r\nContent-Length: 30\r\n\r\n{",
              b"POST /v1/users HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"]
    answers: list[tuple[bytes, float]] = []
    changes: list[tuple[int, str, str]] = []

    def hesitate(half: bytes) -> None:
        sock, begin = knock(port), time.monotonic()
        sock.sendall(half)
        answers.append((read_all(sock), time.monotonic() - begin))
        sock.close()

    def write() -> None:
        for number in itertools.count():
            if stop.wait(0.004):
                return
            new = path.with_name("config.toml.new")
            new.write_text(f"{text}\n# {number}\n")
            new.replace(path)

    def change(number: int) -> None:
        with contextlib.closing(ApiClient(port)) as client:
            reply = client.call("POST", "/v1/users", {"username": f"user{number}"})
            changes.append((201, "", "") if reply.status == 201 else reply.error)

    def attack() -> None:
        threads = [*(threading.Thread(target=hesitate, args=(half,)) for half in halves),
                   *(threading.Thread(target=change, args=(number,)) for number in range(7))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        transfer_beside(rig, attack)
    finally:
        stop.set()
        writer.join()
    assert len(answers) == 3 and all(b'"code":"request_timeout"' in answer and answer.startswith(b"HTTP/1.1 408 ") and seconds > 9
                                     for answer, seconds in answers), answers
    got_in = any(status == 201 for status, _, _ in changes)        # on a busy machine the writer pauses, and nobody waits so long
    assert len(changes) == 7 and (got_in or (500, "internal_error", "another change is still being written") in changes), changes
    assert {status for status, _, _ in changes} <= {201, 409, 500}
    left = tomllib.loads(path.read_text())         # never half of anything; a change that got in between two writes may be there
    known = [left["access"]["users"].pop(f"user{number}", None) for number in range(7)]
    assert left == tomllib.loads(text) and sum(map(bool, known)) <= sum(status == 201 for status, _, _ in changes)
    with contextlib.closing(ApiClient(port)) as client:
        assert client.call("POST", "/v1/users", {"username": "late"}).status == 201          # nobody keeps the lock


@pytest.mark.parametrize(("data", "status"), [
    (b"GET / HTTP/1.1\r\nA: " + b"a" * MIB + b"\r\n\r\n", 431), (b"G" * MIB, 414), (b"GET /" + b"a" * MIB + b" HTTP/1.1\r\n\r\n", 414),
    (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200_000 + b"\r\n", 431),
    (b"POST /v1/users HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}   ", 400),
    (b"POST /v1/users HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
    (b"POST /v1/users HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n" + b"{" * MIB, 413)],
    ids=["1 MB header", "1 MB without a line", "1 MB line", "200,000 headers", "two lengths", "length and chunks", "endless body"])
def test_wrong_requests_beside_a_session(serve: Callable[..., int], rig: Rig, data: bytes, status: int) -> None:
    port = serve()

    def attack() -> None:
        for _ in range(10):
            sock = knock(port)
            with contextlib.suppress(ConnectionError):
                sock.sendall(data)
            found.append(read_all(sock))
            sock.close()

    found: list[bytes] = []
    transfer_beside(rig, attack)
    assert len(found) == 10
    assert {answer[:12] for answer in found if answer} == {b"HTTP/1.1 %d" % status}     # a reset may eat an answer, not all


def test_pipelined_and_chunked_requests_are_answered_in_order(serve: Callable[..., int], rig: Rig) -> None:
    port = serve()
    sock = knock(port)
    body = b'{"username":"carol"}'
    chunks = b"".join(b"1;ext=1\r\n" + body[at:at + 1] + b"\r\n" for at in range(len(body))) + b"0\r\nTrailer: x\r\n\r\n"
    sock.sendall(b"GET /v1/health HTTP/1.1\r\n\r\n" * 20 + b"POST /v1/users HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
                 + b"GET /v1/users/carol HTTP/1.1\r\nConnection: close\r\n\r\n")
    found = read_all(sock)
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", found)
    assert statuses == [b"200"] * 20 + [b"201", b"200"]
    sock.close()


def test_a_thousand_requests_per_connection(serve: Callable[..., int], rig: Rig) -> None:
    port = serve()
    sock = knock(port)
    sock.sendall(b"HEAD /v1/health HTTP/1.1\r\n\r\n" * 1001)
    found = read_all(sock)
    assert found.count(b"HTTP/1.1 404") == 1000 and found.count(b"Connection: close") == 1
    sock.close()


def test_the_api_answers_while_the_data_plane_is_busy_and_stops_with_it(serve: Callable[..., int], rig: Rig) -> None:
    """Requests during a stop cost nothing: the process is gone within its four seconds."""
    port = serve(minimal_runtime_enabled=True)
    socks = [knock(port) for _ in range(20)]
    for sock in socks:
        sock.sendall(b"POST /v1/users HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
    rig.proxies[-1].stop()
    for sock in socks:
        sock.close()


def test_an_idle_control_plane_wakes_nobody(serve: Callable[..., int], rig: Rig) -> None:
    """Its threads wait in accept() and recv(), not in loops; a kept connection costs no wake-up either."""
    port = serve({"server": {"metrics_port": free_port()}})
    client = ApiClient(port)
    client.get("/v1/health")
    proxy = rig.proxies[-1]

    def switches() -> dict[str, int]:
        found = {}
        for task in Path(f"/proc/{proxy.pid}/task").iterdir():
            if task.name != str(proxy.pid):                 # the loop looks at the file of the configuration every second
                match = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", (task / "status").read_text(), re.M)
                found[task.name] = int(match[1]) if match else 0
        return found

    def rests() -> bool:
        before = switches()
        time.sleep(2.0)
        return switches() == before

    poll(lambda: len(switches()) >= 3, "both listeners and a connection have their threads")
    poll(rests, "two seconds in which none of them wakes", 4)        # whatever wakes by itself does so in every two seconds
    client.close()
