"""Room 8 of telemt_api: the HTTP server against clients that are slow, wrong or hostile (api.md 14.1, 14.2)."""
from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import telemt_api as api
from doubles import poll
from telemt import Log
from telemt_api import Answer, ApiError, Handler, Head, Listener, Request, Wire

LOG = Log("test")
LIMIT = 1000


def parse_head(line: bytes, section: bytes) -> Head:
    return api.parse_head(api.parse_line(line), section)


class Echo:
    """Answers what it was asked; POST reads its body, /error answers one."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def admits(self, peer: str) -> bool:
        return True

    def refuse(self, error: ApiError, peer: str) -> Answer:
        return Answer(error.status, "text/plain", [error.code.encode()])

    def answer(self, request: Request) -> Answer:
        head = request.head
        self.asked.append(head.target)
        try:
            body = request.body(LIMIT) if head.method == "POST" else b"-"
        except ApiError as error:
            return self.refuse(error, "")
        return Answer(200, "text/plain", [f"{head.method} {head.target} ".encode(), body])


class Stub:
    """As much of an HttpServer as a Handler needs."""

    stopped = False

    def __init__(self, site: Echo) -> None:
        self.site = site


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection over loopback, with the buffers and deadlines of the real thing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]


class Talk:
    """A client at one end of a socket pair, a Handler at the other."""

    def __init__(self, *, tcp: bool = False) -> None:
        self.sock, far = tcp_pair() if tcp else socket.socketpair()
        self.sock.settimeout(20)
        self.site = Echo()
        self.failure: list[OSError] = []
        self._thread = threading.Thread(target=self._serve, args=(far,))
        self._thread.start()

    def _serve(self, far: socket.socket) -> None:
        with far:
            try:
                Handler(Wire(far), ("127.0.0.1", 1), Stub(self.site))      # type: ignore[arg-type]
            except OSError as error:
                self.failure.append(error)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def rest(self) -> bytes:
        """Everything until the server closes."""
        found = b""
        with contextlib.suppress(ConnectionError):
            while data := self.sock.recv(65536):
                found += data
        return found

    def answers(self, data: bytes, *, end: bool = True) -> list[tuple[int, bytes]]:
        """Send, finish, and take apart what comes back."""
        self.send(data)
        if end:
            self.sock.shutdown(socket.SHUT_WR)
        return split_answers(self.rest())

    def close(self) -> None:
        self.sock.close()
        self._thread.join(20)
        assert not self._thread.is_alive()


def split_answers(stream: bytes) -> list[tuple[int, bytes]]:
    """(status, body) of each answer; `100 Continue` has no body."""
    found = []
    while stream:
        block, _, stream = stream.partition(b"\r\n\r\n")
        status = int(block.split()[1])
        size = next((int(line.split(b":")[1]) for line in block.split(b"\r\n") if line.startswith(b"Content-Length:")), 0)
        found.append((status, stream[:size]))
        stream = stream[size:]
    return found


@pytest.fixture
def talk() -> Iterator[Talk]:
    made = Talk()
    yield made
    made.close()


# -- heads -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("line", "section", "status"), [
    (b"GET /", b"", 400), (b"GET / HTTP/0.9", b"", 505), (b"GET / HTTP/2.0", b"", 505), (b"PRI * HTTP/2.0", b"", 505),
    (b"GET / HTTP/1.2", b"", 505), (b"GET  / HTTP/1.1", b"", 400), (b"GET / HTTP/1.1 ", b"", 400), (b" GET / HTTP/1.1", b"", 400),
    (b"GET /a b HTTP/1.1", b"", 400), (b"GET /\x00 HTTP/1.1", b"", 400), (b"GET /\xff HTTP/1.1", b"", 400), (b"G@T / HTTP/1.1", b"", 400),
    (b"GET / http/1.1", b"", 400), (b"GET / HTTP/11", b"", 400),
    (b"GET / HTTP/1.1", b"a : b\r\n", 400), (b"GET / HTTP/1.1", b"a\r\n", 400), (b"GET / HTTP/1.1", b": b\r\n", 400),
    (b"GET / HTTP/1.1", b"a: b\r\n c\r\n", 400), (b"GET / HTTP/1.1", b"a: b\x00c\r\n", 400), (b"GET / HTTP/1.1", b"a: b\rc\r\n", 400),
    (b"GET / HTTP/1.1", b"Host: a\r\nHost: a\r\n", 400), (b"GET / HTTP/1.1", b"Content-Length: 1\r\nContent-Length: 1\r\n", 400),
    (b"GET / HTTP/1.1", b"Content-Length: +1\r\n", 400), (b"GET / HTTP/1.1", b"Content-Length: 1, 1\r\n", 400),
    (b"GET / HTTP/1.1", b"Content-Length: \r\n", 400), (b"GET / HTTP/1.1", b"Content-Length: 0x1\r\n", 400),
    (b"GET / HTTP/1.1", b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n", 400),
    (b"GET / HTTP/1.1", b"Transfer-Encoding: gzip\r\n", 501), (b"GET / HTTP/1.1", b"Transfer-Encoding: gzip, chunked\r\n", 501),
    (b"GET / HTTP/1.1", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", 501),
    (b"GET / HTTP/1.0", b"Transfer-Encoding: chunked\r\n", 501), (b"GET / HTTP/1.1", b"a: b\r\n" * 101, 431)])
def test_a_wrong_head(line: bytes, section: bytes, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        parse_head(line, section)
    assert caught.value.status == status
    assert {400: "Malformed HTTP request", 431: "Request header fields too large", 501: "Unsupported transfer encoding",
            505: "HTTP version not supported"}[status] == caught.value.message


def test_a_right_head() -> None:
    head = parse_head(b"GET /x?y HTTP/1.1", b"Host: a:1\r\nX-A:\t 1 \t\nx-a:2\r\nEmpty:\r\nContent-Length: 007\r\n")
    assert (head.method, head.target, head.old, head.length, head.keep) == ("GET", "/x?y", False, 7, True)
    assert (head.values("x-a"), head.values("empty"), head.values("no")) == (["1", "2"], [""], [])
    assert parse_head(b"GET / HTTP/1.1", b"Transfer-Encoding: Chunked\r\n").length == -1
    assert parse_head(b"GET / HTTP/1.1", b"a: b\r\n" * 100).fields[99] == ("a", "b")


def test_a_length_beyond_all_numbers() -> None:
    assert parse_head(b"POST / HTTP/1.1", b"Content-Length: " + b"9" * 5000 + b"\r\n").length > 1 << 40


@pytest.mark.parametrize(("line", "section", "keep"), [
    (b"GET / HTTP/1.1", b"", True), (b"GET / HTTP/1.0", b"Connection: keep-alive\r\n", False),
    (b"GET / HTTP/1.1", b"Connection: close\r\n", False),
    (b"GET / HTTP/1.1", b"Connection: TE, Close\r\n", False), (b"GET / HTTP/1.1", b"Connection: keep-alive\r\n", True)])
def test_keep_alive(line: bytes, section: bytes, keep: bool) -> None:
    assert parse_head(line, section).keep is keep


def test_spaces_in_a_field_cost_no_time() -> None:
    """A pattern that backtracks would take minutes for this, with the interpreter's lock held."""
    assert parse_head(b"GET / HTTP/1.1", b"a:" + b" " * 32_000 + b"b" + b" \t" * 16_000 + b"\r\n").values("a") == ["b"]


# -- conversations -----------------------------------------------------------------------------------------------------------------

def test_requests_are_answered_in_order(talk: Talk) -> None:
    found = talk.answers(b"GET /1 HTTP/1.1\r\n\r\n\r\nPOST /2 HTTP/1.1\nContent-Length: 2\n\nabGET /3 HTTP/1.1\r\n\r\n")
    assert found == [(200, b"GET /1 -"), (200, b"POST /2 ab"), (200, b"GET /3 -")]


def test_every_split_of_the_bytes_is_understood(talk: Talk) -> None:
    talk.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    for byte in b"POST /2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\n1\r\nc\r\n0\r\nT: 1\r\n\r\n":
        talk.send(bytes([byte]))
    assert talk.answers(b"GET /3 HTTP/1.0\r\n\r\n") == [(200, b"POST /2 abc"), (200, b"GET /3 -")]


def test_head_has_the_fields_of_an_answer_without_its_body(talk: Talk) -> None:
    talk.send(b"HEAD /1 HTTP/1.1\r\nConnection: close\r\n\r\n")
    found = talk.rest()
    assert b"\r\nContent-Length: 9\r\n" in found and found.endswith(b"\r\n\r\n")


def test_answers_have_a_date_and_no_server(talk: Talk) -> None:
    talk.send(b"GET /1 HTTP/1.0\r\n\r\n")
    found = talk.rest()
    assert b"\r\nDate: " in found and b"\r\nConnection: close\r\n" in found
    assert b"erver:" not in found and b"chunked" not in found.lower()


@pytest.mark.parametrize(("data", "status", "code"), [
    (b"GET /" + b"a" * 8192 + b" HTTP/1.1\r\n\r\n", 414, b"uri_too_long"), (b"a" * 100_000, 414, b"uri_too_long"),
    (b"GET / HTTP/1.1\r\nA: " + b"a" * 32_768 + b"\r\n\r\n", 431, b"headers_too_large"),
    (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200_000, 431, b"headers_too_large"), (b"\x16\x03\x01\x02\x00\x01\n", 400, b"bad_request"),
    (b"GET / HTTP/1.1\r\nA: " + b"a" * 1_000_000, 431, b"headers_too_large")])
def test_too_long(talk: Talk, data: bytes, status: int, code: bytes) -> None:
    with contextlib.suppress(ConnectionError):          # it does not wait for the end of a megabyte
        talk.send(data)
    found = split_answers(talk.rest())
    assert found == [(status, code)]
    assert talk.site.asked == []


def test_the_longest_request_line_and_section_pass(talk: Talk) -> None:
    line = b"GET /" + b"a" * (8192 - 14) + b" HTTP/1.1"
    assert len(line) == 8192
    section = b"A: " + b"a" * 16_000 + b"\r\nB: " + b"b" * (32_768 - 16_000 - 10) + b"\r\n"
    assert len(section) == 32_768
    found = talk.answers(line + b"\r\n" + section + b"\r\n")
    assert [status for status, _ in found] == [200]


@pytest.mark.parametrize("body", [
    b"Content-Length: 1001\r\n\r\n", b"Content-Length: 99999999999999999999\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n",
    b"Transfer-Encoding: chunked\r\n\r\nffffffff\r\n",
    b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n" + b"a" * 1000 + b"\r\n1\r\na\r\n0\r\n\r\n"])
def test_a_body_beyond_the_limit(talk: Talk, body: bytes) -> None:
    talk.send(b"POST / HTTP/1.1\r\n" + body)
    assert split_answers(talk.rest()) == [(413, b"payload_too_large")]


@pytest.mark.parametrize("body", [
    b"g\r\n", b"\r\n", b"123456789\r\n", b"1\r\nab\r\n", b"1;" + b"x" * 300 + b"\r\na\r\n", b"-1\r\n", b"0x1\r\na",
    b"0\r\n" + b"a: b\r\n" * 9 + b"\r\n",
    b"1\r\na", b"5\r\nab"])
def test_chunks_that_are_wrong(talk: Talk, body: bytes) -> None:
    found = talk.answers(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
    assert found == [(400, b"bad_request")]


def test_chunks_with_eight_trailers_and_an_extension(talk: Talk) -> None:
    body = b'00000003 ; name="v"\r\nabc\r\n0\r\n' + b"a: b\r\n" * 8 + b"\r\n"
    assert talk.answers(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + body) == [(200, b"POST / abc")]


def test_continue_is_said_when_the_body_is_about_to_be_read(talk: Talk) -> None:
    talk.send(b"POST /1 HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert talk.sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert talk.answers(b"ab") == [(200, b"POST /1 ab")]


@pytest.mark.parametrize("head", [b"POST / HTTP/1.1\r\nContent-Length: 2000", b"GET / HTTP/1.1\r\nContent-Length: 2"])
def test_continue_is_not_said_otherwise(talk: Talk, head: bytes) -> None:
    talk.send(head + b"\r\nExpect: 100-continue\r\n\r\n")
    assert b"100 Continue" not in talk.rest()


def test_a_body_that_nobody_reads_ends_the_connection(talk: Talk) -> None:
    """The answer arrives although the client is still sending."""
    talk.send(b"GET /1 HTTP/1.1\r\nContent-Length: 50000\r\n\r\n" + b"a" * 20_000)
    assert split_answers(talk.rest()) == [(200, b"GET /1 -")]
    assert len(talk.site.asked) == 1


def test_at_most_1000_requests_per_connection(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    assert api.REQUESTS_MAX == 1000
    monkeypatch.setattr(api, "REQUESTS_MAX", 3)
    talk.send(b"GET / HTTP/1.1\r\n\r\n" * 5)
    found = talk.rest()
    assert found.count(b"HTTP/1.1 200") <= 1000
    assert b"Connection: close" in found or found.count(b"HTTP/1.1 200") == 3


def test_the_same_request_again_is_known_and_every_other_one_is_read(talk: Talk) -> None:
    """A panel's request is parsed once; one that begins or ends like it, has a body, or is cut short is another one."""
    same, other = b"GET /same HTTP/1.1\r\nHost: a\r\n\r\n", b"GET /sane HTTP/1.1\r\nHost: a\r\n\r\n"
    post = b"POST /same HTTP/1.1\r\nContent-Length: 1\r\n\r\n"
    pieces = [same, same, other, same, same, post + b"x", post + b"y", same[:-2], b"Accept: b\r\n\r\n", same + same, b"\r\n" + same,
              b"\r\n" + same, post, b"z", same]
    found = b""
    for piece in pieces:                       # the server sees each by itself: it waits for what comes next
        talk.send(piece)
        until = found.count(b"HTTP/1.1 200") + piece.count(b"\r\n\r\n") - (piece == post)
        until += piece == b"z"
        while found.count(b"HTTP/1.1 200") < until:
            found += talk.sock.recv(65536)
    assert talk.site.asked == ["/same", "/same", "/sane", *["/same"] * 11]
    assert [body for _, body in split_answers(found)][5:7] == [b"POST /same x", b"POST /same y"]


def test_a_close_in_a_known_request_still_closes(talk: Talk) -> None:
    talk.send(b"GET / HTTP/1.1\r\n\r\n")
    assert talk.sock.recv(65536).startswith(b"HTTP/1.1 200")
    assert [status for status, _ in talk.answers(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", end=False)] == [200]


def test_a_long_answer_arrives_whole() -> None:
    """More than any socket buffer takes, to a client that reads late."""
    talk = Talk(tcp=True)
    talk.site.answer = lambda request: Answer(200, "text/plain", [b"x" * 6_000_000, b"y" * 6_000_000])      # type: ignore[method-assign]
    talk.send(b"GET / HTTP/1.1\r\n\r\n")
    talk.sock.shutdown(socket.SHUT_WR)
    assert split_answers(talk.rest()) == [(200, b"x" * 6_000_000 + b"y" * 6_000_000)]
    talk.close()


def test_the_date_is_that_of_the_second(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for now in (0.5, 0.9, 1.0, 86_400.0, 1.0):
        monkeypatch.setattr(api.time, "time", lambda now=now: now)
        talk.send(b"GET / HTTP/1.1\r\n\r\n")
        found.append(talk.sock.recv(65536).partition(b"Date: ")[2].partition(b"\r\n")[0])
    first, second, day = (b"Thu, 01 Jan 1970 00:00:00 GMT", b"Thu, 01 Jan 1970 00:00:01 GMT", b"Fri, 02 Jan 1970 00:00:00 GMT")
    assert found == [first, first, second, day, second]


# -- deadlines: the real ones are seconds, here the one in question is short ---------------------------------------------------------

def shorten(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Only this one: on a busy machine a thread may not run for longer."""
    assert (api.HEAD_S, api.BODY_S, api.IDLE_S, api.WRITE_S) == (10, 10, 30, 10)
    monkeypatch.setattr(api, name, 0.2)


class TestDeadlines:
    def test_a_silent_client_is_closed_silently(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shorten(monkeypatch, "IDLE_S")
        talk = Talk()
        assert talk.rest() == b""
        talk.close()

    def test_a_slow_head_is_408(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shorten(monkeypatch, "HEAD_S")
        talk = Talk()
        talk.send(b"GET / HT")
        assert split_answers(talk.rest()) == [(408, b"request_timeout")]
        talk.close()

    def test_trickled_bytes_do_not_move_the_deadline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Slow loris: a byte now and then keeps no place."""
        shorten(monkeypatch, "HEAD_S")
        talk = Talk()
        stop = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                talk.send(b"GET / HTTP/1.1\r\n")
                while not stop.wait(0.02):
                    talk.send(b"a: b\r\n")

        thread = threading.Thread(target=trickle)
        thread.start()
        assert split_answers(talk.rest())[0] == (408, b"request_timeout")
        stop.set()
        thread.join()
        talk.close()

    @pytest.mark.parametrize("body", [b"Content-Length: 5\r\n\r\nab", b"Transfer-Encoding: chunked\r\n\r\n5\r\nab"])
    def test_a_slow_body_is_408(self, body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        shorten(monkeypatch, "BODY_S")
        talk = Talk()
        talk.send(b"POST / HTTP/1.1\r\n" + body)
        assert split_answers(talk.rest()) == [(408, b"request_timeout")]
        talk.close()

    @pytest.mark.parametrize("tcp", [False, True])
    def test_a_client_that_does_not_read_is_left(self, monkeypatch: pytest.MonkeyPatch, tcp: bool) -> None:
        shorten(monkeypatch, "WRITE_S")
        talk = Talk(tcp=tcp)
        monkeypatch.setattr(talk.site, "answer", lambda request: Answer(200, "text/plain", [b"x" * 10_000_000]))
        talk.send(b"GET / HTTP/1.1\r\n\r\n")
        talk._thread.join(20)
        assert isinstance(talk.failure[0], TimeoutError)
        talk.close()

    def test_who_reads_a_little_now_and_then_does_not_move_the_deadline(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shorten(monkeypatch, "WRITE_S")
        talk = Talk(tcp=True)
        monkeypatch.setattr(talk.site, "answer", lambda request: Answer(200, "text/plain", [b"x" * 100_000_000]))
        talk.send(b"GET / HTTP/1.1\r\n\r\n")
        while talk._thread.is_alive():
            talk.sock.recv(4096)
            talk._thread.join(0.01)
        assert isinstance(talk.failure[0], TimeoutError)
        talk.close()


# -- listeners ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener(("127.0.0.1", 0), 3, Echo(), LOG, "failed")
    opened: list[tuple[str, int]] = []
    made.start(opened.append)
    assert opened == [made.address] and made.address[1] > 0
    yield made
    made.stop()


def ask(listener: Listener, sock: socket.socket | None = None) -> bytes:
    """One request over a new or given connection; empty when the connection is closed."""
    sock = sock or socket.create_connection(listener.address, timeout=20)
    try:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        return sock.recv(1000)
    except ConnectionError:
        return b""


def test_the_last_place_is_taken_and_the_next_client_closed(listener: Listener) -> None:
    socks = [socket.create_connection(listener.address, timeout=20) for _ in range(3)]
    assert all(ask(listener, sock) for sock in socks)
    assert ask(listener) == b""
    assert all(ask(listener, sock) for sock in socks)          # nobody was hurt
    for sock in socks:
        sock.close()


def test_a_place_comes_back(listener: Listener) -> None:
    """Fifty clients one after the other, and three places: whoever finds none, because an old one is just being given back, tries again."""
    served = 0
    for _ in range(5000):
        with contextlib.suppress(ConnectionError), socket.create_connection(listener.address, timeout=20) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            found = b""
            while data := sock.recv(1000):
                found += data
            served += found.startswith(b"HTTP/1.1 200")
        if served == 50:
            return
    raise AssertionError(f"only {served} of 50 were served")


def test_who_rests_too_long_makes_room(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_CROWDED_IDLE_S", 0.0)
    socks = [socket.create_connection(listener.address, timeout=20) for _ in range(3)]
    assert all(ask(listener, sock) for sock in socks)
    assert ask(listener)
    assert sum(ask(listener, sock) == b"" for sock in socks) == 1


def test_stop_closes_everything(listener: Listener) -> None:
    sock = socket.create_connection(listener.address, timeout=20)
    assert ask(listener, sock)
    listener.stop()
    assert sock.recv(10) == b""
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(listener.address, timeout=20)


class Sockets:
    """The part of a ControlPort that hands listening sockets on."""

    def __init__(self, fd: int = -1) -> None:
        self.fd, self.told = fd, list[int]()

    def inherited(self, host: str, port: int) -> int:
        return self.fd

    def listens(self, fd: int) -> None:
        self.told.append(fd)


def test_another_program_goes_on_at_the_same_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is refused; who rests is closed, who is being answered gets the answer and is closed then."""
    sockets: Any = Sockets()
    site, asked, go_on = Echo(), threading.Event(), threading.Event()
    first = Listener(("127.0.0.1", 0), 5, site, LOG, "failed", sockets)
    first.start(lambda at: None)
    heirs: Any = Sockets(os.dup(sockets.told[0]))
    resting = socket.create_connection(first.address, timeout=20)
    assert ask(first, resting)
    poll(lambda: first._server is not None and all(wire.idle_since is not None for wire in first._server._wires), "rest")

    def answer(request: Request) -> Answer:
        asked.set()
        go_on.wait(20)
        return Echo.answer(site, request)

    monkeypatch.setattr(site, "answer", answer)
    monkeypatch.setattr(api, "_LAST_ANSWERS_S", 0.05)
    busy = socket.create_connection(first.address, timeout=20)
    busy.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert asked.wait(20)
    fresh = socket.create_connection(first.address, timeout=20)
    poll(lambda: first._server is not None and len(first._server._wires) == 3, "the third is accepted")
    first.stop(handed_on=True)
    assert resting.recv(10) == b""
    go_on.set()
    fresh.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert b"Connection: close" in fresh.recv(1000), "accepted, so it has an answer"
    assert b"Connection: close" in busy.recv(1000)
    early = [socket.create_connection(first.address, timeout=20) for _ in range(3)]         # nobody accepts
    second = Listener(first.address, 5, Echo(), LOG, "failed", heirs)
    second.start(lambda at: None)
    assert heirs.told == [heirs.fd] and second.address == first.address
    assert all(ask(second, sock) for sock in early) and ask(second)
    second.stop()


def test_a_taken_address_is_tried_again(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_RETRY_S", 0.05)
    second = Listener(listener.address, 3, Echo(), LOG, "failed")
    opened = threading.Event()
    second.start(lambda at: opened.set())
    assert not opened.is_set()
    second.stop()
    second = Listener(listener.address, 3, Echo(), LOG, "failed")
    second.start(lambda at: opened.set())
    listener.stop()
    assert opened.wait(20)
    assert ask(second)
    second.stop()


def test_an_address_that_is_not_needed_is_done_without(listener: Listener) -> None:
    spare = Listener(listener.address, 3, Echo(), LOG, "")
    spare.start(lambda at: pytest.fail("it cannot be bound"))
    assert spare._server is None
    spare.stop()


def test_no_thread_left_costs_the_listener_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    made = Listener(("127.0.0.1", 0), 3, Echo(), LOG, "failed")
    made.start(lambda at: None)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(made.address, timeout=20)


def test_no_thread_left_costs_one_connection(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed, its place comes back, and the next one is served."""
    with monkeypatch.context() as patch:
        def refuse(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(api._thread, "start_new_thread", refuse)
        with socket.create_connection(listener.address) as sock:
            sock.settimeout(20)
            assert sock.recv(1) == b""
    assert listener._server is not None and not listener._server._wires
    with socket.create_connection(listener.address) as sock:
        sock.settimeout(20)
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(("host", "ip"), [
    ("::ffff:127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("fe80::1%eth0", "fe80::1"), ("10.0.0.1", "10.0.0.1"), ("::ffff:1:2", "::ffff:1:2")])
def test_peer_addresses(host: str, ip: str) -> None:
    assert api.peer_ip(host) == ip
