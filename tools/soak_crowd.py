"""The other people of `make soak`: a chaos relay, clients of every kind, strangers, and the weather that excuses a lost session.

Clients are those of tests/doubles.py.  Whoever is not in the way of a planned disturbance must get every byte as it was sent; a
session that a disturbance met may end early, but what it got until then must be right.
"""
from __future__ import annotations

import contextlib
import importlib
import os
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

doubles: Any = importlib.import_module("doubles")

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_S = 120.0          # for one answer; the machine may be busy with other things
GRACE_S = 20.0              # a disturbance excuses what is begun so long after it: dials wait, middle ends are in quarantine
CLOCK_WRONG_S = 3 * 86_400
WEB_PAGE = b"HTTP/1.1 400 Bad Request\r\nServer: nginx\r\nContent-Length: 12\r\nConnection: close\r\n\r\nBad Request\n"
HANGUPS = (OSError, EOFError)
FATES = ("slices", "delays", "resets", "half_open")
GENTLE = frozenset(("straight", "slices", "delays"))         # ways on which nothing is lost
STRANGER = bytes.fromhex("ffeeddccbbaa99887766554433221100")


# -- what is being counted ---------------------------------------------------------------------------------------------------------

class Tally:
    """Counts of one crowd; any thread may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def add(self, **numbers: int) -> None:
        with self._lock:
            self.counts.update(numbers)

    def fault(self, text: str) -> None:
        with self._lock:
            self.faults.append(f"{time.strftime('%H:%M:%S', time.gmtime())} {text}")


class Weather:
    """Planned disturbances: a scope is a data centre (`dc5`), `replay`, or `all`."""

    def __init__(self) -> None:
        self._ends: dict[str, float] = {}

    @contextlib.contextmanager
    def storm(self, scope: str) -> Iterator[None]:
        """Sessions of `scope` are excused from now until some time after the end of this block."""
        self._ends[scope] = float("inf")
        try:
            yield
        finally:
            self._ends[scope] = time.monotonic() + GRACE_S

    def excuses(self, scope: str, begun: float) -> bool:
        """Whether a session of `scope` that began then met a storm."""
        return begun < max(self._ends.get(scope, 0.0), self._ends.get("all", 0.0))


# -- the relay ---------------------------------------------------------------------------------------------------------------------

class Relay:
    """Passes connections on to a port, each with the same fate: slices, delays, resets, half_open."""

    def __init__(self, target: int, fate: str, tally: Tally, rng: random.Random) -> None:
        self.target, self.fate, self.tally, self._rng = target, fate, tally, rng
        self.made = 0                           # connections made to the target
        self.hush = threading.Event()           # nobody stays half-open any longer
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                threading.Thread(target=self._carry, args=(near, random.Random(self._rng.random())), daemon=True).start()

    def _carry(self, near: socket.socket, rng: random.Random) -> None:
        """One connection, both ways, to its end."""
        far = socket.socket()
        far.bind((f"127.1.{rng.randrange(4)}.{rng.randrange(1, 50)}", 0))
        far.settimeout(PATIENCE_S)
        try:
            far.connect(("127.0.0.1", self.target))
        except OSError:
            near.close()
            far.close()
            return
        with self._lock:
            self.made += 1
            self._open |= {near, far}
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        doom = rng.choice((0, 1, 60, 300, 600, 3000, 60_000)) if self.fate in ("resets", "half_open") else -1
        way = threading.Thread(target=self._pump, args=(near, far, doom, random.Random(rng.random())), daemon=True)
        way.start()
        self._pump(far, near, doom, rng)
        way.join()
        with self._lock:
            self._open -= {near, far}
        near.close()
        far.close()

    def _pump(self, source: socket.socket, sink: socket.socket, doom: int, rng: random.Random) -> None:
        """One direction; after `doom` bytes (-1: never) the fate comes."""
        passed = 0
        try:
            while data := source.recv(64 * KIB):
                if doom >= 0 and passed + len(data) > doom:
                    sink.sendall(data[:max(0, doom - passed)])
                    self._doom(source, sink, rng)
                    return
                self._send(sink, data, passed, rng)
                passed += len(data)
            sink.shutdown(socket.SHUT_WR)
        except (OSError, ValueError):
            self._doom(source, sink, rng, again=True)

    def _send(self, sink: socket.socket, data: bytes, passed: int, rng: random.Random) -> None:
        """Whole, or in slices: the first 800 bytes one by one, so that every header arrives so."""
        if self.fate == "delays" and rng.random() < 0.3:
            time.sleep(rng.uniform(0, 0.2))
        if self.fate != "slices":
            sink.sendall(data)
            return
        at = 0
        while at < len(data):
            size = 1 if passed + at < 800 else rng.choice((3, 1447, 5000, 20_000))
            sink.sendall(data[at:at + size])
            at += size
        self.tally.add(slices=1)

    def _doom(self, source: socket.socket, sink: socket.socket, rng: random.Random, again: bool = False) -> None:
        """Reset both ends, or leave them open and silent for a while as a phone in a tunnel does, then reset."""
        if not again:
            self.tally.add(**{self.fate: 1})
            if self.fate == "half_open":
                self.hush.wait(rng.uniform(0.5, 6))
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.shutdown(socket.SHUT_RDWR)

    @property
    def busy(self) -> int:
        return len(self._open)

    def drop(self) -> None:
        """End whatever is still carried."""
        self.hush.set()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.drop()


# -- clients -----------------------------------------------------------------------------------------------------------------------

class User(NamedTuple):
    """Somebody with a secret.  steady: nobody changes him; exact: his bytes are compared."""

    name: str
    secret: bytes
    steady: bool = True
    exact: bool = False


class Walk:
    """What a session may need to know: how long it may take, and when everybody is asked to come to an end."""

    def __init__(self, rng: random.Random, hurry: threading.Event, quick: bool) -> None:
        self.rng, self.hurry, self.quick = rng, hurry, quick

    def pause(self, low: float, high: float) -> None:
        self.hurry.wait(self.rng.uniform(low, high) * (0.1 if self.quick else 1))

    def size(self) -> int:
        """Bytes of a transfer, whole words."""
        sizes = (4, 1000, 40_000, 300_000) if self.quick else (4, 1000, 40_000, 300_000, 300_000, 2_000_000, 8_000_000)
        return (self.rng.choice(sizes) + self.rng.randrange(4000)) & -4


def fetch(client: Any, size: int, seed: int) -> None:
    """Download in frames, windows of 2 MiB, and compare the digest."""
    digest = doubles.hashlib.sha256
    for at in range(0, size, 2 * MIB):
        part = min(2 * MIB, size - at)
        client.order("send", part, seed)
        found, got = digest(), 0
        while got < part:
            frame = client.recv_frame()
            found.update(frame)
            got += len(frame)
        if got != part or found.digest() != doubles.pattern_sha(seed, part):
            raise AssertionError("download damaged")


def give(client: Any, size: int, seed: int) -> None:
    """Upload in frames; the other end answers with the digest."""
    client.order("recv", size)
    for block in doubles.pattern(seed, size):
        for at in range(0, len(block), 32 * KIB):
            client.send_frame(block[at:at + 32 * KIB])
    if client.recv_frame() != doubles.pattern_sha(seed, size):
        raise AssertionError("upload damaged")


def chat(client: Any, walk: Walk) -> None:
    """A key exchange and a few messages."""
    client.req_pq()
    for _ in range(walk.rng.randrange(1, 6)):
        client.echo(b"ECHO" + os.urandom(4 * walk.rng.choice((1, 20, 3000))))
        walk.pause(0, 0.3)


def download(client: Any, walk: Walk) -> None:
    fetch(client, walk.size(), walk.rng.randrange(8))


def upload(client: Any, walk: Walk) -> None:
    give(client, walk.size(), walk.rng.randrange(8))


def both(client: Any, walk: Walk) -> None:
    """A busy app: everything in turn."""
    chat(client, walk)
    fetch(client, walk.size(), 1)
    give(client, walk.size(), 2)
    chat(client, walk)


def dwell(client: Any, walk: Walk) -> None:
    """A phone in a pocket: a message now and then."""
    until = time.monotonic() + walk.rng.uniform(1, 30) * (0.05 if walk.quick else 1)
    while time.monotonic() < until and not walk.hurry.is_set():
        client.echo()
        walk.pause(0.5, 4)
    client.echo()


def read_slowly(client: Any, walk: Walk) -> None:
    """Asks for much, takes it in sips, and leaves before it has all, or reads on."""
    size = 400_000
    client.order("send", size, 5)
    for _ in range(walk.rng.randrange(30)):
        if client.got_bytes < size // 2:
            client.fill()
            walk.pause(0, 0.1)
    found, got = doubles.hashlib.sha256(), 0
    while walk.rng.random() < 0.9 and not walk.hurry.is_set():
        frame = client.recv_frame()
        found.update(frame)
        got += len(frame)
        if got == size:
            if found.digest() != doubles.pattern_sha(5, size):
                raise AssertionError("slow download damaged")
            return


SESSIONS: tuple[tuple[Callable[[Any, Walk], None], int], ...] = (
    (chat, 8), (download, 4), (upload, 3), (both, 2), (dwell, 3), (read_slowly, 1))


# -- strangers ---------------------------------------------------------------------------------------------------------------------

class Stranger:
    """One connection of somebody who is no client, from an address of his own."""

    def __init__(self, port: int, walk: Walk, secret: bytes) -> None:
        self.walk, self.secret = walk, secret
        self.sock = socket.socket()
        self.sock.settimeout(PATIENCE_S)
        self.sock.bind((f"127.2.{walk.rng.randrange(4)}.{walk.rng.randrange(1, 50)}", 0))
        self.sock.connect(("127.0.0.1", port))

    def sees_the_site(self, data: bytes) -> None:
        """What every stranger who speaks must get: the answer of the web server, whole."""
        self.sock.sendall(data)
        got = b""
        while len(got) < len(WEB_PAGE) and (piece := self.sock.recv(4096)):
            got += piece
        if got != WEB_PAGE:
            raise AssertionError(f"a stranger got {got[:60]!r}")

    def browser(self) -> None:
        self.sees_the_site(doubles.build_hello(STRANGER, sni=self.walk.rng.choice(("example.com", "example.org", ""))))

    def http(self) -> None:
        self.sees_the_site(b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n")

    def wrong_clock(self) -> None:
        self.sees_the_site(doubles.build_hello(self.secret, clock=CLOCK_WRONG_S))

    def noise(self) -> None:
        self.sees_the_site(b"\x05\x01\x00" + os.urandom(self.walk.rng.randrange(70, 500)))

    def wrong_secret(self) -> None:
        self.sees_the_site(doubles.build_header(STRANGER, b"\xdd" * 4, 2) + os.urandom(300))

    def port_scanner(self) -> None:
        if self.walk.rng.random() < 0.5:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def half_hello(self) -> None:
        hello = doubles.build_hello(self.secret)
        self.sock.sendall(hello[:self.walk.rng.randrange(1, len(hello))])
        self.walk.pause(0, 5)

    def slow_loris(self) -> None:
        hello = doubles.build_hello(STRANGER)
        for at in range(self.walk.rng.randrange(40)):
            self.sock.sendall(hello[at:at + 1])
            self.walk.pause(0.1, 0.6)
            if self.walk.hurry.is_set():
                return

    def hello_and_silence(self) -> None:
        self.sock.sendall(doubles.build_hello(self.secret))
        self.walk.pause(0, 3)


STRANGERS = (Stranger.browser, Stranger.http, Stranger.wrong_clock, Stranger.noise, Stranger.wrong_secret, Stranger.port_scanner,
             Stranger.half_hello, Stranger.slow_loris, Stranger.hello_and_silence)
MAY_END = frozenset((Stranger.port_scanner, Stranger.half_hello, Stranger.slow_loris, Stranger.hello_and_silence))


# -- the crowd ---------------------------------------------------------------------------------------------------------------------

class Crowd:
    """Workers that make sessions one after the other through one instance of the program."""

    def __init__(self, port: int, users: list[User], dcs: dict[int, bool], tally: Tally, rng: random.Random, quick: bool,
                 framed: bool) -> None:
        """dcs: index of a data centre -> whether nothing is ever lost on the way to it.  framed: the program counts payloads of frames."""
        self.port, self.users, self.dcs, self.tally, self.rng = port, users, dcs, tally, rng
        self.weather = Weather()
        self.churn: dict[str, bytes] = {}       # users that come and go: name -> secret
        self.relays = {fate: Relay(port, fate, tally, random.Random(rng.random())) for fate in FATES}
        self.hurry, self.may_go, self.over = threading.Event(), threading.Event(), threading.Event()
        self.quick, self.framed = quick, framed
        self._lock = threading.Lock()
        self.dialled = 0                        # connections made without a relay
        self.busy = 0                           # workers within a session
        self.doing: dict[int, tuple[str, float]] = {}       # thread -> its session and when it began
        seeds = [rng.random() for _ in range(10 if quick else 24)]
        self.threads = [threading.Thread(target=self._work, args=(random.Random(seed),), daemon=True) for seed in seeds]

    def start(self) -> None:
        self.may_go.set()
        for thread in self.threads:
            thread.start()

    def connections_made(self) -> int:
        return self.dialled + sum(relay.made for relay in self.relays.values())

    def count_dial(self) -> None:
        with self._lock:
            self.dialled += 1

    def calm(self, limit_s: float) -> bool:
        """Ask everybody to come to an end; False when somebody does not."""
        self.may_go.clear()
        self.hurry.set()
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            for relay in self.relays.values():
                relay.hush.set()
            if not self.busy:
                for relay in self.relays.values():
                    relay.drop()
                if not any(relay.busy for relay in self.relays.values()):
                    return True
            time.sleep(0.05)
        return False

    def go_on(self) -> None:
        for relay in self.relays.values():
            relay.hush.clear()
        self.hurry.clear()
        self.may_go.set()

    def stop(self) -> None:
        self.over.set()
        self.may_go.set()
        for thread in self.threads:
            thread.join(PATIENCE_S)
        for relay in self.relays.values():
            relay.close()

    def _work(self, rng: random.Random) -> None:
        walk = Walk(rng, self.hurry, self.quick)
        while not self.over.is_set():
            self.may_go.wait()
            with self._lock:
                if not self.may_go.is_set() or self.over.is_set():
                    continue
                self.busy += 1
            try:
                if rng.random() < 0.3:
                    self._stranger(walk)
                else:
                    self._session(walk)
            except Exception as error:          # of this tool
                self.tally.fault(f"the crowd: {error!r}")
            finally:
                with self._lock:
                    self.busy -= 1
                    self.doing.pop(threading.get_ident(), None)
            walk.pause(0, 0.2)

    def _begin(self, what: str) -> float:
        """Note what this worker does now."""
        begun = time.monotonic()
        self.doing[threading.get_ident()] = what, begun
        return begun

    def late(self) -> str:
        """Who has not come to rest."""
        now = time.monotonic()
        return "; ".join(f"{what} for {now - begun:.1f} s" for what, begun in list(self.doing.values()))

    # one stranger

    def _stranger(self, walk: Walk) -> None:
        if walk.rng.random() < 0.1:
            return self._replay(walk)
        deed = walk.rng.choice(STRANGERS)
        begun = self._begin(deed.__name__)
        try:
            stranger = Stranger(self.port, walk, walk.rng.choice(self.users).secret)
        except OSError as error:
            return self._not_excused("all", begun, f"a stranger cannot connect: {error!r}")
        self.count_dial()
        try:
            deed(stranger)
            self.tally.add(strangers=1)
        except AssertionError as error:
            self._not_excused("all", begun, f"{deed.__name__}: {error}")
        except HANGUPS as error:
            if deed not in MAY_END:
                self._not_excused("all", begun, f"{deed.__name__}: {error!r}")
        finally:
            stranger.sock.close()
        return None

    def _replay(self, walk: Walk) -> None:
        """A good hello, recorded and sent again: its second sender sees the site."""
        user, begun = walk.rng.choice([user for user in self.users if not user.exact]), self._begin("replay")
        try:
            client = self._client(self.port, user, "tls", "padded", 1, walk)
            with contextlib.closing(client):
                client.start()
                client.echo()
            thief = Stranger(self.port, walk, user.secret)
            self.count_dial()
            with contextlib.closing(thief.sock):
                thief.sees_the_site(client.hello)
            self.tally.add(replays=1)
        except (AssertionError, *HANGUPS) as error:
            self._not_excused("replay", begun, f"replay: {error!r}")

    def _not_excused(self, scope: str, begun: float, text: str) -> None:
        if self.weather.excuses(scope, begun):
            self.tally.add(excused=1)
        else:
            self.tally.fault(text)

    # one client

    def _client(self, port: int, user: User, mode: str, transport: str, dc: int, walk: Walk, rcvbuf: int = 0) -> Any:
        source = f"127.1.{walk.rng.randrange(4)}.{walk.rng.randrange(1, 50)}" if port == self.port else ""
        client = doubles.Client(port, mode=mode, transport=transport, dc=dc, secret=user.secret, source=source, timeout=PATIENCE_S,
                                rcvbuf=rcvbuf)
        if port == self.port:
            self.count_dial()
        return client

    def _choose(self, rng: random.Random) -> tuple[User, str, int]:
        """(user, fate, data centre); the exact user meets no planned loss."""
        churn = list(self.churn.items())
        if churn and rng.random() < 0.25:
            name, secret = rng.choice(churn)
            user = User(name, secret, steady=False)
        else:
            user = rng.choice(self.users)
        safe = [dc for dc, gentle in self.dcs.items() if gentle]
        if user.exact:
            return user, rng.choice(("straight", "straight", "slices", "delays")), rng.choice(safe)
        return user, rng.choice(("straight",) * 4 + FATES), rng.choice(list(self.dcs)) * rng.choice((1, 1, -1))

    def _session(self, walk: Walk) -> None:
        user, fate, dc = self._choose(walk.rng)
        (deed,) = walk.rng.choices([deed for deed, _ in SESSIONS], [weight for _, weight in SESSIONS])
        if user.exact and deed is read_slowly:
            deed = chat                          # he may leave with answers on their way
        mode, transport = walk.rng.choice(doubles.ROUTES)
        what = f"{deed.__name__} of {user.name}, {mode}/{transport}, {fate}, dc {dc}"
        begun, client, started = self._begin(what), None, False
        try:
            port = self.relays[fate].port if fate in self.relays else self.port
            client = self._client(port, user, mode, transport, dc, walk, 32_768 if deed is read_slowly else 0)
            client.start()
            client.req_pq()                      # whoever has an old secret sees the site from here on
            started = True
            deed(client, walk)
            self._good(user, client)
        except AssertionError as error:
            if started or (user.steady and fate in GENTLE):
                self.tally.fault(f"{what}: {error}")
            else:
                self._lost(user, client)
        except HANGUPS as error:
            planned = not user.steady or fate not in GENTLE or not self.dcs[abs(dc)] or deed is read_slowly
            if not planned and not self.weather.excuses(f"dc{abs(dc)}", begun):
                self.tally.fault(f"{what}: {error!r} after {time.monotonic() - begun:.1f} s")
            self._lost(user, client)
        except (struct.error, IndexError):       # half an answer to half a hello
            if user.steady and fate in GENTLE:
                self.tally.fault(f"{what}: a malformed answer")
            self._lost(user, client)
        finally:
            if client is not None:
                (client.reset if walk.rng.random() < 0.2 else client.close)()

    def _good(self, user: User, client: Any) -> None:
        self.tally.add(good=1, bytes_up=client.sent_bytes, bytes_down=client.got_bytes)
        if user.exact:
            up, down = (client.sent_payload, client.got_payload) if self.framed else (client.sent_bytes, client.got_bytes)
            self.tally.add(exact_good=1, exact_up=up, exact_down=down)

    def _lost(self, user: User, client: Any) -> None:
        self.tally.add(lost=1)
        if client is not None:
            self.tally.add(bytes_up=client.sent_bytes, bytes_down=client.got_bytes)
        if user.exact:
            self.tally.add(exact_other=1)
