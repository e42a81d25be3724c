"""What unit tests share: vectors, settings from TOML text, a loop whose clock is set by hand, socket pairs."""
import hashlib
import hmac
import json
import random
import select
import socket
import time
from pathlib import Path

import telemt

VECTORS = Path(__file__).parent / "vectors"
SECRET = "000102030405060708090a0b0c0d0e0f"
OTHER = "f0e1d2c3b4a5968778695a4b3c2d1e0f"
LOCAL = '[censorship]\ntls_emulation = false\n[server]\nport = 0\n[[server.listeners]]\nip = "127.0.0.1"\n'


def load_vector(name):
    """The parsed vectors/NAME.json."""
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


def settings_of(text):
    """Settings of a configuration text; a user `alice` is there unless the text has its own table."""
    if "[access.users]" not in text:
        text += f'\n[access.users]\nalice = "{SECRET}"\n'
    document = telemt.parse_document(text)
    document.setdefault("general", {}).setdefault("use_middle_proxy", False)       # nothing here may ask the real Telegram
    return telemt.parse_settings(document, telemt.Draws(lambda: 1500)).settings


def control_of(server, path):
    """A Control of a server that was started with the file at `path`, which need not exist."""
    text = f'[access.users]\nalice = "{SECRET}"\n'
    loaded = telemt.parse_settings(telemt.parse_document(text), telemt.Draws(lambda: 1500))
    reading = telemt.Reading({path: text.encode()}, {path: ()}, text, None)
    return telemt.Control(server, telemt.Reloader(server, loaded, reading, "config.toml", lambda word: None))


class FakePoller:
    """Readiness comes from the test: `ready` is what the next poll returns."""

    name = "fake"

    def __init__(self):
        self.masks = {}
        self.ready = []
        self.waited = []

    def register(self, fd, mask):
        assert fd not in self.masks and mask
        self.masks[fd] = mask

    def modify(self, fd, mask):
        assert self.masks[fd] != mask and mask
        self.masks[fd] = mask

    def unregister(self, fd):
        del self.masks[fd]

    def poll(self, timeout_s):
        self.waited.append(timeout_s)
        ready, self.ready = self.ready, []
        return ready


class TestLoop(telemt.Loop):
    """A Loop without a thread of its own: turn() runs one turn with what really is ready now; `at` is the clock."""

    __test__ = False

    def __init__(self):
        self.at = 1000.0
        super().__init__(FakePoller(), lambda: self.at)

    def turn(self, seconds=0.0):
        """Let `seconds` pass, then run one turn over every registered fd that is ready."""
        self.at += seconds
        polling = select.poll()
        for fd, mask in self.poller.masks.items():
            polling.register(fd, mask & (select.POLLIN | select.POLLOUT | select.POLLRDHUP))
        ready = [(fd, (1 if event & select.POLLIN else 0) | (4 if event & select.POLLOUT else 0) | (8 if event & ~5 else 0))
                 for fd, event in polling.poll(0)]
        self._turn(ready)
        return len(ready)

    def settle(self, limit=10_000):
        """Run turns until nothing is ready any more (a writable socket that is waited for counts as ready)."""
        for _ in range(limit):
            if not self.turn() and not self._deferred and not self._idle_jobs:
                return
        raise AssertionError("the loop does not come to rest")

    def dispose(self):
        """Close what the loop itself holds."""
        self.mailbox.close()


def tcp_pair(buffer=None):
    """Two connected non-blocking loopback TCP sockets; `buffer` makes the kernel's queues small."""
    with socket.socket() as listener:
        if buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        one = socket.socket()
        if buffer:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        one.connect(listener.getsockname())
        other, _ = listener.accept()
    if buffer:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    for sock in (one, other):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)     # or a test waits for delayed acknowledgements
    return one, other


def read_all(sock, limit=1 << 26):
    """(bytes that are there now, True if the peer ended)."""
    data = bytearray()
    while len(data) < limit:
        try:
            piece = sock.recv(1 << 20)
        except BlockingIOError:
            return bytes(data), False
        if not piece:
            return bytes(data), True
        data += piece
    return bytes(data), False


# -- a client's first bytes, and a core for sessions and relays

BACKEND = telemt.pick_backend()
TAGS = {"abridged": b"\xef" * 4, "intermediate": b"\xee" * 4, "secure": b"\xdd" * 4}


def client_preamble(secret=SECRET, proto="secure", dc=2, seed=1):
    """(64 bytes a client sends, cipher for what it sends next, cipher for what it receives)."""
    rng = random.Random(seed)
    head = bytes([0x41]) + rng.randbytes(55)
    key = bytes.fromhex(secret)
    sending = BACKEND.ctr(hashlib.sha256(head[8:40] + key).digest(), head[40:56])
    back = head[55:7:-1]
    receiving = BACKEND.ctr(hashlib.sha256(back[:32] + key).digest(), back[32:])
    plain = head + TAGS[proto] + dc.to_bytes(2, "little", signed=True) + b"\1\2"
    return head + sending.update(plain)[56:], sending, receiving


def signed_hello(secret=SECRET, timestamp=None, seed=1, group=29):
    """A ClientHello record of 517 bytes with an X25519 share (or one of another group), signed for `timestamp` (default: now)."""
    rng = random.Random(seed)

    def extension(kind, body):
        return kind.to_bytes(2, "big") + len(body).to_bytes(2, "big") + body

    name = b"front.example"
    extensions = (extension(0, (len(name) + 3).to_bytes(2, "big") + b"\0" + len(name).to_bytes(2, "big") + name)
                  + extension(51, b"\x00\x24" + group.to_bytes(2, "big") + b"\x00\x20" + rng.randbytes(32))
                  + extension(43, b"\x02\x03\x04"))
    fixed = b"\x03\x03" + bytes(32) + b"\x20" + rng.randbytes(32) + b"\x00\x04\x13\x01\x13\x02" + b"\x01\x00"
    padding = 512 - 4 - len(fixed) - 2 - len(extensions) - 4
    extensions += extension(21, bytes(padding))
    body = fixed + len(extensions).to_bytes(2, "big") + extensions
    record = bytearray(b"\x16\x03\x01\x02\x00\x01" + len(body).to_bytes(3, "big") + body)
    mac = hmac.digest(bytes.fromhex(secret), record, "sha256")
    clock = int(time.time()) if timestamp is None else timestamp
    record[11:43] = mac[:28] + (clock ^ int.from_bytes(mac[28:], "little")).to_bytes(4, "little")
    return bytes(record)


class FakeUpstreams:
    """Hands every session a loopback pair, or keeps it waiting: `waiting` holds the callbacks."""

    def __init__(self, loop):
        self.loop, self.waiting, self.asked, self.aborted = loop, [], [], 0
        self.where = ("127.0.0.1", 1)

    def connect_dc(self, dc, settings, scope, done):
        self.asked.append((dc, scope))
        self.waiting.append(done)
        return self

    def abort(self):
        self.aborted += 1

    def connect(self):
        """Let the oldest waiting session have its data centre; returns the far end."""
        near, far = tcp_pair()
        self.waiting.pop(0)(telemt.Connected(telemt.Stream(self.loop, near)))
        return far


class FakeCore:
    """What sessions and relays need of the server, with everything countable.  Masking is off unless the text has [censorship]."""

    def __init__(self, text="", paths=()):
        self.loop = TestLoop()
        self.settings = settings_of(text if "[censorship]" in text else f"{text}\n[censorship]\nmask = false\n")
        self.backend, self.arena, self.counters = BACKEND, telemt.Arena(BACKEND, paths=paths), telemt.Counters()
        self.doorman = telemt.Doorman(BACKEND)
        self.doorman.apply(self.settings.access)
        self.upstreams = FakeUpstreams(self.loop)
        self.fronts = telemt.FrontProfiles(self.settings, self.loop, lambda: b"k" * 32, random.Random(1).randbytes, lambda *_: None)
        self.handshakes = telemt.Handshakes(self.loop, self.settings, 10_000)
        self.resolver = telemt.Resolver(self.loop)
        self.masks = telemt.Masks(self.loop, self.arena, self.resolver, telemt.Observer(self.loop, self.settings), 10_000, self.ended)
        self.noted = []                        # (class, IP) of everybody who was observed
        self.masks.observer.note = lambda kind, ip: self.noted.append((kind, ip))
        self.half_closed = self.loop.lane(telemt.HALF_CLOSED_S, telemt.DirectRelay.on_half_closed_timeout)
        self.pool, self.answers, self.desyncs = None, telemt.AnswerBudget(0), telemt.DesyncLog(self.counters.me)
        self.count_users = True
        self.quotas = telemt.QuotaState(self.loop, self.doorman.users, None)
        self.owners, self.finished = set(), 0

    @property
    def relays(self):
        return [owner for owner in self.owners if isinstance(owner, telemt.DirectRelay)]

    def hand_over(self, old, new):
        self.owners.remove(old)
        self.owners.add(new)

    def quota_reached(self, user):
        return telemt.Server.quota_reached(self, user)

    def ended(self, owner):
        self.owners.remove(owner)
        self.finished += 1

    def connect(self, ip="10.0.0.1", trusted=None):
        """A new client; returns its socket.  trusted: it comes through a listener that demands a PROXY header."""
        client, accepted = tcp_pair()
        session = telemt.ClientSession(self, telemt.Stream(self.loop, accepted), ip, 1234)
        self.owners.add(session)
        if trusted is None:
            session.start()
        else:
            telemt.ProxyGate(session).start(trusted)
        return client

    def dispose(self):
        """Close what is left and check that nothing leaks."""
        for owner in list(self.owners):
            owner.close(None)
        self.loop.settle()
        assert set(self.loop.handlers) == {self.loop.mailbox.fd}
        assert set(self.loop.poller.masks) == {self.loop.mailbox.fd}
        assert not self.handshakes._crowds and self.masks.busy == 0
        for user in self.doorman.users:
            assert (user.sessions, user.ips, user.stats.current) == (0, {}, 0)
        self.loop.dispose()
