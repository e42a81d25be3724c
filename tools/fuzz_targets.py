"""What `make fuzz` throws mutated input at: every parser of telemt.py and telemt_api.py, with valid inputs to start from.

A target calls the parser, lets its one kind of error pass, and asserts what the parser promises: any split of a stream reads the
same, what was read can be written and read again, sizes stay within their limits.
"""
from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import hashlib
import hmac
import io
import re
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import telemt  # noqa: E402 - it stands beside this folder and is not installed
import telemt_api  # noqa: E402


class Target(NamedTuple):
    """A parser under test: `call` raises nothing but `allowed`."""

    name: str
    call: Callable[[bytes], object]
    seeds: Sequence[bytes]
    allowed: tuple[type[Exception], ...]
    words: Sequence[bytes] = ()                 # what the format is made of, for inserting
    cost: int = 1                               # of so many runs it gets one: an input takes so much longer than usual


# -- targets: clients --------------------------------------------------------------------------------------------------------------

SECRET = bytes(range(16))
NOW_WALL = 1_767_225_600
BACKEND = telemt.pick_backend()
WIRE = (telemt.WireError,)


def noise(size: int) -> bytes:
    """Entropy that repeats and never is what a preamble must not be."""
    return (b"\x5a\xa5\x3c" * (size // 3 + 1))[:size]


def field(width: int, body: bytes) -> bytes:
    """`body` behind its length."""
    return len(body).to_bytes(width, "big") + body


def extension(kind: int, body: bytes) -> bytes:
    """One TLS extension."""
    return kind.to_bytes(2, "big") + field(2, body)


def client_hello(name: bytes, shares: dict[int, int], session: int = 32, size: int = 512) -> bytes:
    """A ClientHello record of our test user at NOW_WALL; shares: group -> bytes of its key."""
    groups = b"".join(group.to_bytes(2, "big") + field(2, noise(length)) for group, length in shares.items())
    extensions = (extension(0, field(2, b"\0" + field(2, name))) + extension(16, field(2, field(1, b"h2") + field(1, b"http/1.1")))
                  + extension(43, b"\x02\x03\x04") + extension(51, field(2, groups)))
    head = b"\x03\x03" + bytes(32) + field(1, noise(session)) + field(2, b"\x13\x01\x13\x02\x13\x03") + b"\x01\0"
    padding = max(0, size - 4 - len(head) - 2 - len(extensions) - 4)
    return signed(b"\x16\x03\x01" + field(2, b"\x01" + field(3, head + field(2, extensions + extension(21, bytes(padding))))))


def signed(record: bytes) -> bytes:
    """The record with the digest that our test user would put into it."""
    mac = hmac.digest(SECRET, record[:11] + bytes(32) + record[43:], "sha256")
    clock = int.from_bytes(mac[28:], "little") ^ NOW_WALL
    return record[:11] + mac[:28] + clock.to_bytes(4, "little") + record[43:]


@functools.cache
def make_doorman() -> telemt.Doorman:
    """Knows one user."""
    doorman = telemt.Doorman(BACKEND)
    doorman.apply(load_config(f'[access.users]\nalice = "{SECRET.hex()}"\n').settings.access)
    return doorman


def answer_hello(record: bytes) -> str:
    """All that a ClientHello record goes through; returns what kind of client it was."""
    doorman = make_doorman()
    hello = telemt.parse_client_hello(record)
    user, timed = doorman.find_hello(record, hello, "192.0.2.1", NOW_WALL)
    group = telemt.choose_group(hello, telemt.GROUP_HYBRID)
    share = noise(1120 if group == telemt.GROUP_HYBRID else 32)
    flight = telemt.build_server_hello(hello, telemt.FrontShape(1000), group, share, user.sign, noise)
    assert len(hello.session_id) <= 32 and flight[44:44 + flight[43]] == hello.session_id
    assert flight[-1005:-1000] == b"\x17\x03\x03\x03\xe8"
    return f"{group} {timed} {hello.server_name is None} {min(len(hello.suites), 4)} {min(len(hello.alpn), 4)}"


def check_hello(data: bytes) -> str:
    """The record as it came, which any change makes a stranger's, and signed again, so that all of it is reached."""
    try:
        answer_hello(data)
    except telemt.WireError:
        pass
    return answer_hello(signed(data) if len(data) >= 43 else data)


def check_records(data: bytes) -> int:
    """One chunk and any cut of it must find the same payload, and fail alike behind it."""
    whole, pieces = telemt.RecordReader(), telemt.RecordReader()
    step = data[-1] % 23 + 1 if data else 1
    found, found_cut = read_records(whole, [data]), read_records(pieces, [data[at:at + step] for at in range(0, len(data), step)])
    assert (found, whole.closed, str(whole.failed)) == (found_cut, pieces.closed, str(pieces.failed))
    if whole.failed is not None:
        raise whole.failed
    assert whole.closed or whole.mid_record == pieces.mid_record, "after an alert nothing more is read"
    return min(len(found), 3)


def read_records(reader: telemt.RecordReader, chunks: Sequence[bytes]) -> bytes:
    """Payload of all chunks."""
    return b"".join(map(reader.payload, chunks))


def server_flight(group: int, suite: bytes, order: Sequence[int], sizes: Sequence[int]) -> bytes:
    """What a TLS 1.3 server answers to the probe."""
    bodies = {43: b"\3\4", 51: group.to_bytes(2, "big") + field(2, noise(32 if group == 29 else 1120)), 23: b""}
    body = b"\3\3" + noise(32) + field(1, noise(32)) + suite + b"\0" + field(2, b"".join(extension(kind, bodies[kind]) for kind in order))
    return (b"\x16\3\3" + field(2, b"\2" + field(3, body)) + b"\x14\3\3\0\1\1"
            + b"".join(b"\x17\3\3" + field(2, noise(size)) for size in sizes))


def check_flight(data: bytes) -> str:
    """One chunk and any cut of it must measure the same; what was measured makes a file that says it again."""
    step = data[-1] % 29 + 1 if data else 1
    whole, error = measure([data])
    pieces, error_cut = measure([data[at:at + step] for at in range(0, len(data), step)])
    assert (whole.hello, whole.flight, str(error)) == (pieces.hello, pieces.flight, str(error_cut))
    if error is not None:
        raise error
    assert len(whole._data) < 5 + telemt.RECORD_IN_MAX and whole.heard == bool(data)
    if whole.hello is None or not whole.flight:
        return "unfinished"
    profile = telemt.profile_of(whole.hello)._replace(flights=(whole.flight,), fetched_wall=1.0, source="file")
    assert telemt.parse_front_file(telemt.build_front_file("a.example", profile, whole.hello), 2.0) == ("a.example", profile)
    assert telemt.FLIGHT_MIN <= profile.shape(noise).size <= telemt.FLIGHT_MAX
    return f"{profile.group} {profile.suite} {profile.order}"


def measure(chunks: Sequence[bytes]) -> tuple[telemt.FlightReader, telemt.WireError | None]:
    """A reader that was fed all chunks, or those up to its error."""
    reader = telemt.FlightReader()
    try:
        for chunk in chunks:
            reader.feed(chunk)
    except telemt.WireError as error:
        return reader, error
    return reader, None


def check_front_file(data: bytes) -> str:
    """A cache file of ours or of the reference."""
    domain, profile = telemt.parse_front_file(data, 1.0)
    shape = profile.shape(noise, hybrid=len(data) % 2 == 0)
    assert telemt.FLIGHT_MIN <= shape.size <= telemt.FLIGHT_MAX and shape.group in (29, 4588) and sorted(shape.order) == [43, 51]
    return f"{telemt.is_front_name(domain)} {len(profile.flights)} {shape.suite} {shape.group}"


def front_files() -> list[bytes]:
    """One of ours for each group, and one as telemt 3.2.1 writes it."""
    found = []
    for group in (29, 4588):
        reader, _ = measure([server_flight(group, b"\x13\2", (51, 43), (3000,))])
        assert reader.hello is not None
        profile = telemt.profile_of(reader.hello)._replace(flights=(3000, 3001, 3000), fetched_wall=1_760_000_000.0)
        found.append(telemt.build_front_file("example.com", profile, reader.hello))
    reference = found[0].replace(b'"cert_payload": null', b'"cert_payload": {"cert_chain_der": [[48]], "certificate_message": [11, 0]}')
    return [*found, reference.partition(b',\n  "profile"')[0] + b"}"]


def client_preamble(transport: telemt.Transport, dc: int) -> bytes:
    """A client's 64 bytes."""
    plain = noise(56) + transport.value + dc.to_bytes(2, "little", signed=True) + b"\x11\x22"
    cipher = BACKEND.ctr(hashlib.sha256(plain[8:40] + SECRET).digest(), plain[40:56])
    return plain[:56] + cipher.update(plain)[56:]


def check_preamble(data: bytes) -> str:
    """What a plain client opens with, and what we then open at the data centre with."""
    strange = telemt.has_reserved_prefix(data[:8])
    assert strange or not any(telemt.has_reserved_prefix(data[:size]) for size in range(8)), "a reserved prefix stays reserved"
    preamble = telemt.parse_client_preamble(data[:64].ljust(64, b"\0"), SECRET, BACKEND)
    for key in (b"", preamble.to_client_key + preamble.to_client_iv):
        opening = telemt.make_dc_preamble(preamble.transport, preamble.dc, BACKEND, noise, key)
        assert len(opening.block) == telemt.PREAMBLE_SIZE
        assert not key or key == opening.from_dc_key + opening.from_dc_iv
    return preamble.transport.name + (" reserved" if strange else "")


def check_proxy(data: bytes) -> str:
    """A PROXY header: no byte more changes what was said, and what we build of it says the same."""
    earlier = None
    for size in range(min(len(data), telemt.PROXY_HEAD_MAX + 20) + 1):
        header = telemt.parse_proxy_header(data[:size])
        assert earlier is None or header == earlier, "a header changed its mind"
        earlier = header
    if earlier is None or earlier.source is None or earlier.destination is None:
        return str(earlier and earlier.version)
    for version in (1, 2):
        again = telemt.parse_proxy_header(telemt.build_proxy_header(version, earlier.source, earlier.destination))
        same_family = (":" in earlier.source[0]) == (":" in earlier.destination[0])     # IPv4-mapped ends may differ
        assert again is not None
        assert (again.source, again.destination) == ((earlier.source, earlier.destination) if same_family else (None, None))
    return f"v{earlier.version}"


FRONT_WORDS = [b"null", b"[", b"]", b"{", b"}", b"-1", b"256", b"1e9", b'"profile"', b'"x": ', b"true", b'"v": 1', b"[43, 51]",
               b"4588", b"NaN"]


# -- targets: text of the operator -------------------------------------------------------------------------------------------------

CONFIG = (telemt.ConfigError,)
SAMPLE = (ROOT / "config.toml").read_bytes()
MOMENTS = (b"2027-01-31T23:59:59Z", b"2027-1-31 23:59:59.5 +03:00", b"2024-02-29t00:00:60utc", b"0001-01-01T00:00:00+23:59",
           b"9999-12-31T23:59:60-2359", "2027-01-31T23:59:59 \u22120300".encode())
NETWORKS = (b"10.0.0.5/8", b"192.0.2.1", b"10.0.0.0/255.0.0.0", b"2001:db8::1/64", b"::ffff:1.2.3.4/128", b"fe80::1%eth0/64")
ENDPOINTS = (b"149.154.167.51:443", b"[2001:b28:f23d:f001::a]:443", b"proxy.example.org:443:[::1]", b"a:1:192.0.2.1")


def load_config(text: str) -> telemt.Loaded:
    """Settings of a configuration text."""
    return telemt.parse_settings(telemt.parse_document(text), telemt.Draws(lambda: 2000))


def check_config(data: bytes) -> str:
    """A configuration file."""
    return str(len(load_config(data.decode("utf-8", "replace")).warnings))


VALUES: tuple[object, ...] = (
    True, False, 0, 1, -1, 2, 4, 6, 10, 32, 101, 256, 4096, 65_536, 2**31, 2**63 - 1, 0.0, 0.5, -1.5, 1e308, float("nan"), float("inf"),
    "", " ", "*", "x", "ttl", "adaptive", "a b", "a/b", "\n", "\u0130", "x" * 120, "0" * 32, "f" * 32, "127.0.0.1", "::1", "0.0.0.0/0",
    "127.0.0.1:9091", "[::1]:0", "host:443:192.0.2.1", "https://example.org/x", "http://localhost", "0666", "2027-01-31T23:59:59Z",
    datetime.datetime(2027, 1, 31, tzinfo=datetime.UTC), datetime.datetime(2027, 1, 31), datetime.date(2027, 1, 31), datetime.time(1, 2),
    [], [""], ["a", "a"], [1], [[]], [True], ["::1", "10.0.0.5/8"], {}, {"alice": "f" * 32}, {"alice": 0, "bob": 1}, {"alice": True},
    {"a\nb": "0" * 32, "": "f" * 32}, {"alice": "2027-01-31T23:59:59Z"}, {"203": [], "-2": "192.0.2.1:443", "x": ["", " "]},
    [{"ip": "0.0.0.0"}], [{"ip": "::1", "announce_ip": "192.0.2.1"}], [{"type": "socks5", "address": "a:1"}], [{"type": "direct"}],
    [{"type": "shadowsocks", "x": 1}], [{"type": "socks4"}], [{}])


def check_settings(data: bytes) -> str:
    """Any value at any key, known and unknown: pairs of bytes choose them."""
    document: dict[str, Any] = {}
    for which, value in zip(data[:40:2], data[1:40:2], strict=False):
        path = KEY_PATHS[which % len(KEY_PATHS)]
        *tables, name = path.removesuffix("[]").split(".")
        node = document
        for table in tables:
            node = node[table] if isinstance(node.get(table), dict) else node.setdefault(table + "_" * (table in node), {})
        node[name] = copy.deepcopy(VALUES[value % len(VALUES)])
    return str(len(telemt.parse_settings(document, telemt.Draws(lambda: 2000)).warnings))


KEY_PATHS = [*telemt.KEYS, "general.unknown", "unknown", "server.api.whitelst"]


def check_include(data: bytes) -> int:
    """Three files that include each other by chance; the second and third begin after a NUL."""
    parts = (data.decode("utf-8", "replace").split("\0") + ["", ""])[:3]

    def read(_including: str, wanted: str) -> tuple[str, str]:
        if wanted not in ("1", "2") or int(wanted) >= len(parts):
            raise FileNotFoundError(2, "No such file or directory", wanted)
        return wanted, parts[int(wanted)]

    return len(telemt.expand_includes(parts[0], "0", read)[1])


def check_moment(data: bytes) -> str:
    """Text of an expiration: a moment in UTC or nothing."""
    moment = telemt.parse_expiration(data.decode("utf-8", "replace"))
    assert moment is None or moment.utcoffset() is not None
    return "none" if moment is None else "moment"


def check_network(data: bytes) -> str:
    """Text of a network; what was read reads the same when it is printed."""
    network = telemt.parse_network(data.decode("utf-8", "replace"))
    assert network is None or telemt.parse_network(str(network)) == network
    return "none" if network is None else f"v{network.version}"


def check_endpoint(data: bytes) -> str:
    """Text of `ip:port`, and of a DNS override."""
    text = data.decode("utf-8", "replace")
    found = telemt.parse_ip_port(text)
    if found is None:
        return f"override {len(telemt.parse_dns_overrides([text]))}"
    return f"v{found[0].version}"


def config_words() -> list[bytes]:
    """What configuration files are made of: tables, keys, values."""
    tables = sorted({f"[{path.rpartition('.')[0]}]\n".encode() for path in telemt.KEYS if "." in path})
    keys = [f"{path.rpartition('.')[2]} = ".encode() for path in telemt.KEYS]
    values = [b"true\n", b"0\n", b"-1\n", b"1.5\n", b"nan\n", b'""\n', b'"*"\n', b"[]\n", b'["a"]\n', b"{}\n", b'{ a = "b" }\n',
              MOMENTS[0], b"'''", b'"""', b"\\u0000", b"\r\n", b"0" * 32]
    return [*tables, *keys, *values]


PROXIES = [telemt.build_proxy_header(version, (ip, 1234), (other, 443)) + b"\x16\x03\x01" for version in (1, 2)
           for ip, other in (("192.0.2.1", "203.0.113.9"), ("2001:db8::1", "::1"), ("192.0.2.1", "::1"))]


# -- targets: what operators and panels change -------------------------------------------------------------------------------------

EDITS: tuple[tuple[tuple[str, ...], telemt_api.Value | None], ...] = (
    (("access", "users", "alice"), "c" * 32), (("access", "users", "z z"), "d" * 32), (("access", "users", "bob"), None),
    (("access", "user_max_tcp_conns", "alice"), None), (("access", "user_enabled", "alice"), False))
ACCESS = (
    b'[access.users] # x\nalice = "1"\r\n"bob" = \'2\'\n[access.user_max_tcp_conns]\nalice = 1\n',
    b'[access]\nusers = { alice = "1", bob = "2" } # }\nuser_max_tcp_conns.alice = 1\n[x]\ny = """\n[access.users]\n"""\n',
    b"access.users.alice = '1'\naccess.'users'.bob = '2'\n[[upstreams]]\na = [\n1, # ]\n]\n[[upstreams]]",
    b"access = { users.alice = '1', users = {} }\n", b"access = { users = { alice = '''1''' }, user_max_tcp_conns = { alice = 1 } }")
ACCESS_WORDS = [b'"""', b"\'\'\'", b'"', b"'", b"[", b"]", b"{", b"}", b"=", b"#", b"\n", b"\r\n", b",", b".", b"access", b"users",
                b"alice", b"[access.users]\n", b"[[a]]\n", b"\\", b"x = 1\n", b" "]


def check_edit(data: bytes) -> str:
    """A text that the program takes is edited into what was meant, or not at all (which is rare)."""
    text = data.decode("utf-8", "replace").replace("include", "")
    document = telemt.parse_document(text)
    access = document.get("access", {})
    tables = [access.get(name, {}) for name in ("users", "user_max_tcp_conns", "user_enabled")] if isinstance(access, dict) else [None]
    if not all(isinstance(table, dict) and not any(isinstance(value, dict) for value in table.values()) for table in tables):
        raise telemt.ConfigError("would not load")
    for edit in EDITS:
        edited = telemt_api.edit_texts({"c": text}, "c", lambda including, line: None, [edit])["c"]
        assert telemt_api.same_documents(telemt.parse_document(edited), telemt_api.change_document(document, [edit])), edit
    return f"{len(tables[0] or ())} {len(document)}"


BODIES = (b'{"username":"a.b-c_1","secret":"%s","max_tcp_conns":1,"data_quota_bytes":0}' % (b"aB" * 16), b"{}",
          b'{"expiration_rfc3339":"2027-01-01T02:59:59.5+03:00","enabled":false,"user_ad_tag":null}',
          b'{"max_unique_ips":9223372036854775807}')
BODY_WORDS = [b"null", b"true", b"-0", b"-1", b"1e3", b"5.0", b'"', b"\\ud800", b"[", b"{", b"}", b"2026-02-29T00:00:60Z", b"+23:59",
              b"\xff"]


def check_body(data: bytes) -> str:
    """A request body for every action; what passes can be written as TOML and means the same."""
    said = []
    for action in telemt_api.ACTIONS:
        try:
            command = telemt_api.parse_command(action, "alice", data)
        except telemt_api.ApiError as error:
            said.append(error.message[:12])
            continue
        changes = [(("access", table, command.username), value) for table, value in command.entries.items() if value is not None]
        edited = telemt_api.edit_texts({"c": ""}, "c", lambda including, line: None, changes)["c"]
        assert telemt_api.same_documents(telemt.parse_document(edited), telemt_api.change_document({}, changes))
        said.append(f"{len(changes)}")
    return " ".join(said)


def check_quota(data: bytes) -> str:
    """A state file of ours, or of anybody; what is read is written back the same."""
    found = telemt.parse_quota_state(data)
    again = telemt.parse_quota_state(telemt.render_quota_state((name, *pair) for name, pair in found.items()))
    assert len(again) <= len(found) and all(pair in found.values() for pair in again.values())
    return str(min(len(found), 3))
# -- the control plane -------------------------------------------------------------------------------------------------------------

class FakeSocket:
    """Gives out bytes in pieces, takes what is sent; the peer has closed its side."""

    family = socket.AF_UNIX

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self.sent = bytearray()

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        return bytes(16)                        # of a timeval

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        assert option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO) and struct.unpack("@qq", value) > (0, 0)

    def recv(self, size: int) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    def send(self, data: bytes) -> int:
        self.sent += data
        return len(data)

    def shutdown(self, how: int) -> None:
        pass


class EchoSite:
    """Says what it understood."""

    def admits(self, peer: str) -> bool:
        return True

    def refuse(self, error: telemt_api.ApiError, peer: str) -> telemt_api.Answer:
        return telemt_api.Answer(error.status, "text/plain", [error.code.encode()], close=True)

    def answer(self, request: telemt_api.Request) -> telemt_api.Answer:
        try:
            body = request.body(1000) if request.head.method != "GET" else b""
        except telemt_api.ApiError as error:
            return self.refuse(error, "")
        assert len(body) <= 1000
        return telemt_api.Answer(200, "text/plain", [request.head.method.encode(), request.head.target.encode(), body])


class EchoServer:
    """As much of a server as a handler needs."""

    site, stopped = EchoSite(), False


def converse(pieces: Sequence[bytes]) -> bytes:
    """What a client gets back that sends these pieces and closes; dates removed."""
    sock: Any = FakeSocket(pieces)
    server: Any = EchoServer()
    wire: Any = telemt_api.Wire(sock)
    telemt_api.Handler(wire, ("127.0.0.1", 1), server)
    return re.sub(rb"Date: [^\r]*", b"Date:", bytes(sock.sent))


def check_http(data: bytes) -> str:
    """A conversation: every split of the bytes is answered alike; only our own status codes leave."""
    whole = converse([data])
    cut = len(data) // 3
    assert whole == converse([data[:cut], data[cut:2 * cut], data[2 * cut:]])
    assert whole == converse([data[at:at + 7] for at in range(0, len(data), 7)])
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", whole)
    assert set(statuses) <= {b"100", b"200", b"400", b"408", b"413", b"414", b"431", b"501", b"505"}
    return b" ".join(statuses[:4]).decode()


def check_target(data: bytes) -> str:
    """A request target: a route and a user, or ApiError; the readers of queries never fail otherwise."""
    method, _, rest = data.decode("latin-1").partition(" ")
    target = re.sub("[^!-~]", "", rest)
    assert 1 <= telemt_api.events_limit(target) <= 1000
    route, name = telemt_api.find_route(method, telemt_api.path_of(target))
    assert "/" not in name and "\0" not in name
    if route.name == "get_qr":
        telemt_api.wanted_link(target)
    return route.name


API = (telemt_api.ApiError,)
CONVERSATIONS = [
    b"GET /1?a HTTP/1.1\r\nHost: a\r\n\r\nPOST /2 HTTP/1.1\nContent-Length: 2\n\nabGET /3 HTTP/1.0\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n2;x\r\nab\r\n0\r\nT: 1\r\n\r\nHEAD / HTTP/1.1\r\n\r\n",
    b"PATCH /v1/users/bob HTTP/1.1\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"]
HTTP_WORDS = [b"\r\n", b"\n\n", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", b" HTTP/1.1\r\n", b"Host: b\r\n",
              b";" * 40, b"a" * 400]


# -- targets: the middle end -------------------------------------------------------------------------------------------------------

FRAMINGS = (telemt.Abridged, telemt.Intermediate, telemt.Secure)
FRAME_LIMIT = 4096


def check_framing(data: bytes) -> str:
    """Frames of a client, of all three kinds: one chunk and any cut of it are the same frames, and an answer reads back as one."""
    said = []
    for cls in FRAMINGS:
        step = data[-1] % 31 + 1 if data else 1
        whole = take_frames(cls, [data])
        assert whole == take_frames(cls, [data[at:at + step] for at in range(0, len(data), step)])
        said.append(f"{min(len(whole[0]), 3)}{whole[1][:12]}")
        if body := data[:400 & -4][:len(data) & -4]:
            assert take_frames(cls, [cls(FRAME_LIMIT).wrap(body, b"abcd")]) == ([(body, False)], "", 0)
    return " ".join(said)


def take_frames(cls: type[telemt.Framing], chunks: Sequence[bytes]) -> tuple[list[tuple[bytes, bool]], str, int]:
    """(frames, kind of the error that ended them, bytes kept of an incomplete one)."""
    codec, found = cls(FRAME_LIMIT), list[tuple[bytes, bool]]()
    for chunk in chunks:
        while True:
            found += [(bytes(payload), quick) for payload, quick in codec.feed(chunk)]
            if codec.failed or not codec.rest:
                break
            chunk = bytes(codec.rest)
        if codec.failed:
            return found, codec.failed.kind, 0
    assert codec.waiting <= FRAME_LIMIT + 4, "more is kept than a frame may have"
    return found, "", codec.waiting


def check_frames(data: bytes) -> str:
    """A decrypted stream of a link: one chunk and any cut of it; what passes has a checksum that is right."""
    step = data[-1] % 37 + 1 if data else 1
    whole = read_link([data])
    assert whole == read_link([data[at:at + step] for at in range(0, len(data), step)])
    return f"{min(len(whole[0]), 4)} {whole[1][:6]}"


def read_link(chunks: Sequence[bytes], seq: int = 0) -> tuple[list[bytes], str]:
    """(payloads of a decrypted stream that arrives in chunks, why there are no more), kept like a link keeps them."""
    reader, kept, found = telemt.FrameReader(seq), bytearray(), list[bytes]()
    for chunk in chunks:
        kept += chunk
        view = memoryview(bytes(kept))
        places, at = reader.spans(view, 0, len(view))
        found += [bytes(view[start:start + size]) for start, size in places]
        del kept[:at]
        if reader.failed:
            return found, str(reader.failed)
    return found, f"rest {len(kept)}"


ENDS = telemt.LinkEnds("192.0.2.1", 40_000, "203.0.113.9", 8888)
LINK_SECRET = telemt.ProxySecret(bytes(range(64)))
NONCE_FRAME = telemt.FrameWriter(-2).frame(struct.pack("<IIII16s", 0x7ACB87AA, LINK_SECRET.selector, 1, NOW_WALL, noise(16)))
REPLY_FRAME = telemt.FrameWriter(-1).frame(struct.pack("<II12s12s", 0x7682EEF5, 0, bytes(12), bytes(12)))


def check_link_handshake(data: bytes) -> str:
    """The server's half: its nonce frame, then, encrypted with the key that follows from it, the rest; in one chunk and cut."""
    outcomes = {shake(data, step) for step in (0, data[-1] % 19 + 1 if data else 1)}
    assert len(outcomes) == 1, outcomes
    return outcomes.pop()


def shake(data: bytes, step: int) -> str:
    """How the handshake ends with the answers in `data`; step: bytes per chunk, 0 = all at once."""
    machine = telemt.LinkHandshake(telemt.Origin(BACKEND, noise, 7, NOW_WALL), LINK_SECRET, ENDS, NOW_WALL)
    machine.open()
    opening, rest = data[:len(NONCE_FRAME)], data[len(NONCE_FRAME):]
    try:
        for chunk in pieces(opening, step):
            machine.feed(chunk)
        if machine.keyed:
            key = telemt.derive_link_key(telemt.key_material(b"SERVER", noise(16), machine.nonce, NOW_WALL, ENDS, LINK_SECRET.data))
            rest = BACKEND.cbc_encryptor(*key).update(rest[:len(rest) & -16])
        for chunk in pieces(rest, step):
            machine.feed(chunk)
    except telemt.RpcError as error:
        return str(error)[:40]
    plain, raw = machine.take_rest()
    assert len(plain) + len(raw) <= len(data)
    return f"done {machine.done} {machine.keyed}"


def pieces(data: bytes, step: int) -> list[bytes]:
    """`data` in chunks of `step` bytes; 0 = whole."""
    return [data[at:at + step] for at in range(0, len(data), step)] if step else [data]


def check_proxy_list(data: bytes) -> str:
    """A list of middle ends; what was read reads the same when it is printed."""
    text = data.decode("utf-8", "replace")
    said = []
    for family in (4, 6):
        found = telemt.parse_proxy_config(text, family)
        printed = "".join(f"proxy_for {dc} {telemt.format_address(*end)};\n" for dc, ends in found.endpoints.items() for end in ends)
        assert telemt.parse_proxy_config(printed, family).endpoints == found.endpoints
        said.append(f"{min(len(found.endpoints), 3)} {found.default_dc is None}")
    return " ".join(said)


def check_http_date(data: bytes) -> str:
    """Text of a Date header."""
    moment = telemt.parse_http_date(data.decode("latin-1"))
    return "none" if moment is None else "moment"


# -- targets: the ways out ---------------------------------------------------------------------------------------------------------

def converse_socks(dialogue: telemt.Dialogue, data: bytes) -> str:
    """What a SOCKS server that answers `data` brings about."""
    at, (_, wanted) = 0, next(dialogue)
    try:
        while at + wanted <= len(data):
            assert 0 < wanted <= 260, "no answer of a SOCKS server is so long"
            at, (_, wanted) = at + wanted, dialogue.send(data[at:at + wanted])
    except StopIteration as done:
        ip, port = done.value
        assert telemt.parse_ip(ip) is not None and 0 <= port < 65_536
        return f"bound {':' in ip}"
    except telemt.RouteError as error:
        return str(error)[:40]
    return "waits"


def check_socks(data: bytes) -> str:
    """All dialogues with one set of answers."""
    return " ".join(converse_socks(dialogue, data) for dialogue in (
        telemt.socks4_dialogue(("192.0.2.1", 443), b"user"), telemt.socks5_dialogue(("192.0.2.1", 443), None),
        telemt.socks5_dialogue(("2001:db8::1", 443), (b"user", b"password")), telemt.socks5_dialogue(("192.0.2.1", 443), (b"user", None))))


def check_stun(data: bytes) -> str:
    """A STUN answer, for both families."""
    if len(data) >= 20:
        assert 20 <= telemt.stun_size(data[:20]) <= 20 + 65_535
    found = [telemt.parse_stun_response(data, b"T" * 12, version) for version in (4, 6)]
    for version, address in zip((4, 6), found, strict=True):
        ip = address and telemt.parse_ip(address[0])
        assert address is None or (ip is not None and ip.version == version and 0 <= address[1] < 65_536)
    return f"{found[0] is None} {found[1] is None}"


def stun_answer(kind: int, value: bytes) -> bytes:
    """An answer with one attribute."""
    body = struct.pack(">HH", kind, len(value)) + value + bytes(-len(value) % 4)
    return struct.pack(">HHI12s", 0x0101, len(body), 0x2112A442, b"T" * 12) + body


def check_http_answer(data: bytes) -> str:
    """An HTTP answer that arrives: once it is whole more bytes change nothing, and never more than the limit comes back."""
    limit, first = 600, None
    for end in [*range(0, len(data), max(1, len(data) // 12)), len(data)]:
        found = telemt.parse_http(data[:end], limit, False)
        assert first is None or (found is not None and (found.status, found.headers) == (first.status, first.headers))
        first = found or first
    answer = telemt.parse_http(data, limit, True)
    assert answer is not None and len(answer.body) <= limit and 100 <= answer.status <= 599
    return f"{answer.status // 100} {len(answer.body) == limit} {first is None}"


def check_url(data: bytes) -> str:
    """An URL from a file or a redirect."""
    url = telemt.parse_url(data.decode("latin-1"))
    url.host.encode("ascii"), url.path.encode("ascii")
    assert "\r" not in url.path and "\n" not in url.path and " " not in url.path
    return f"{url.secure} {':' in url.host} {url.port > 65_535}"


def check_interface(data: bytes) -> str:
    """An address message of the kernel."""
    return str(len(telemt._one_address(data[:8].ljust(8, b"\0") + data[8:], 2)))


def check_host_port(data: bytes) -> str:
    """Text of `host:port`, `ip:port`; what is read is a port, and reads the same when it is written."""
    text = data.decode("utf-8", "replace")
    host, port = telemt.parse_host_port(text)
    assert 0 <= port < 65_536 and telemt.parse_host_port(telemt.format_address(host, port)) == (host, port)
    return f"{telemt.parse_ip(host) is None}"


def check_overrides(data: bytes) -> str:
    """network.dns_overrides, a line each."""
    found = telemt.parse_dns_overrides(data.decode("utf-8", "replace").split("\n"))
    assert all(host and 0 <= port < 65_536 for host, port in found)
    return str(min(len(found), 4))


# -- targets: command line, links, ping --------------------------------------------------------------------------------------------

def check_link(data: bytes) -> str:
    """A proxy link."""
    link = telemt.parse_proxy_link(data.decode("utf-8", "replace"))
    assert len(link.secret) == 16 and 0 < link.port < 65_536 and len(link.domain) <= 253 and link.where
    return f"{link.mode} {len(link.host) > 15}"


def check_qr(data: bytes) -> str:
    """A QR code of any text: a square of 0 and 1 of a legal size."""
    text = data[:2600].decode("utf-8", "replace")
    code = telemt_api.make_qr(text)
    assert 1 <= code.version <= 40 and {len(row) for row in code.rows} == {len(code.rows)} == {17 + 4 * code.version}
    assert set("".join(code.rows)) == {"0", "1"}
    return f"version {code.version}"


def check_words(data: bytes) -> str:
    """A command line, and a value of RUST_LOG; what is said about unknown options goes nowhere."""
    text = data.decode("utf-8", "replace")
    words = [word for word in text.split("\n") if word]
    telemt.parse_rust_log(text)
    with contextlib.redirect_stderr(io.StringIO()):
        action = telemt.parse_arguments(words).action
    try:
        request = telemt.parse_init(words)
    except telemt.ConfigError:
        return action
    assert 0 <= request.port < 65_536 and re.fullmatch("[0-9A-Fa-f]{32}", request.secret)
    return f"{action} {request.start} {request.port == 443}"


class StillCipher:
    """Encrypts nothing: what is mutated is what is read."""

    def update(self, data: bytes) -> bytes:
        return bytes(data)


class PingWorld:
    """Desk, loop, lane, cipher backend and stream of one attempt; answers are given out in pieces."""

    def __init__(self, answers: Sequence[bytes]) -> None:
        self.loop = self.steps = self.backend = self
        self.answers = list(answers)
        self.x25519_public = lambda entropy: bytes(31) + b"\x09"
        self.closed = False

    def defer(self, job: object) -> None: pass
    def arm(self, owner: object) -> None: pass
    def cancel(self, owner: object) -> None: pass
    def watch(self, mask: int, handler: object) -> None: pass
    def ctr(self, key: bytes, iv: bytes) -> StillCipher: return StillCipher()
    def write(self, data: bytes) -> int: return len(data)
    def read(self, limit: int) -> bytes: return self.answers.pop(0)[:limit]
    def close(self) -> None: self.closed = True


def check_ping(data: bytes) -> str:
    """What may answer our own client, in all modes, whole and in pieces: exactly one verdict, and the stream is closed."""
    return " ".join(ask(mode, data, step) for mode in ("classic", "ee") for step in (0, data[-1] % 29 + 3 if data else 3))


def ask(mode: str, data: bytes, step: int) -> str:
    """The verdict on these answers."""
    link: Any = telemt.ProxyLink("", 1, SECRET, mode, "a.example" if mode == "ee" else "", path="/x")
    verdicts: list[telemt.Pong] = []
    world: Any = PingWorld(())
    attempt = telemt.Attempt(world, link, "", 2, verdicts.append)
    attempt.nonce = b"N" * 16
    attempt._on_connected(world)
    size = telemt.flight_size(data)
    if mode == "ee" and 43 <= size <= len(data):
        flight = telemt.without_random(data[:size])
        mac = hmac.digest(SECRET, attempt.hello[11:43] + flight, "sha256")
        data = flight[:11] + mac + flight[43:] + data[size:]
    world.answers = [piece for piece in pieces(data, step) if piece] + [b""]
    while not verdicts:
        attempt.on_readable(1)
    assert len(verdicts) == 1 and world.closed
    return f"{verdicts[0].step} {verdicts[0].reason[:30]}"


PING_FRAME = struct.pack("<QQII16s16s", 0, 1, 36, 0x05162463, b"N" * 16, bytes(16))


def more_targets() -> list[Target]:
    """Other parsers than those of clients and configurations."""
    frames = [b"\x01abcd" + b"\x7f\x80\0\0" + noise(512), b"\x10\0\0\0" + noise(16) + b"\x14\0\0\x80" + noise(20), b"\x06\0\0\0abcdefg"]
    writer = telemt.FrameWriter(0)
    link = b"".join(writer.frame(noise(size)) + b"\4\0\0\0" * (size % 3) for size in (4, 64, 300))
    flight = server_flight(29, b"\x13\1", (43, 51), (64,))
    record = b"\x17\3\3" + field(2, field_le(PING_FRAME))
    answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"HTTP/1.0 302 Found\r\nLocation: /x\r\n\r\nrest",
               b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a\r\nhello\r\n3\r\nabc\r\n0\r\n\r\n"]
    lists = [b"# x\ndefault 2;\nproxy_for 1 192.0.2.1:8888;\nproxy_for -4 [2001:db8::1]:80;proxy_for 203 192.0.2.7:443;\n"]
    stuns = [stun_answer(0x20, b"\0\1" + noise(6)), stun_answer(1, b"\0\2" + noise(18)), stun_answer(0x8022, b"abc")]
    socks = [b"\0\x5a\x1f\x90\x7f\0\0\1", b"\5\0\5\0\0\1\x7f\0\0\1\x1f\x90", b"\5\2\1\0\5\0\0\4" + noise(18), b"\5\0\5\0\0\3\4name\0\1"]
    links = [b"tg://proxy?server=192.0.2.1&port=443&secret=" + b"0" * 32,
             b"https://t.me/proxy?server=a.example&port=8443&secret=dd" + b"ab" * 16,
             b"tg://proxy?server=[2001:db8::1]&port=1&secret=ee" + b"0" * 32 + b"a.example".hex().encode(),
             b"tg://proxy?port=443&server=a&secret=7gAAAAAAAAAAAAAAAAAAAABhLmV4YW1wbGU"]
    return [
        Target("framing", check_framing, frames, (), [b"\x7f", b"\xff\x80\0\0", b"\4\0\0\0", b"\0\0\0\x80", b"\1\x10\0\0"]),
        Target("frames", check_frames, [link, link[:-1]], (), [b"\4\0\0\0", b"\x10\0\0\0", b"\0\0\0\1", link[:16]]),
        Target("link_handshake", check_link_handshake, [NONCE_FRAME + REPLY_FRAME + b"\4\0\0\0" * 3,
               NONCE_FRAME + b"\4\0\0\0" * 4 + REPLY_FRAME],
               (), [b"\4\0\0\0", REPLY_FRAME, NONCE_FRAME, b"\x04\x20\0\0"]),
        Target("proxy_list", check_proxy_list, lists, (), [b"proxy_for ", b"default ", b";", b"#", b"\n", b"-", b"[", b"]:",
               b"::ffff:1.2.3.4"]),
        Target("http_date", check_http_date, [b"Tue, 15 Nov 1994 08:12:31 GMT"], (), [b"GMT", b"Feb", b"29", b":", b" ", b"9999",
               b"9" * 30]),
        Target("socks", check_socks, socks, (), [b"\5\0", b"\5\2", b"\1\0", b"\5\0\0\1", b"\5\0\0\3", b"\5\0\0\4", b"\0\x5a"]),
        Target("stun", check_stun, stuns, (), [b"\0\x20", b"\0\1", b"\1\1", b"\x21\x12\xa4\x42", b"T" * 12]),
        Target("http_answer", check_http_answer, answers, (ValueError,),
               [b"\r\n", b"\r\n\r\n", b"0\r\n\r\n", b"ffffffff\r\n", b"-1", b"1_0", b"Content-Length: ", b"chunked", b"9" * 30]),
        Target("url", check_url, [b"https://core.telegram.org/getProxySecret", b"http://[::1]:8080/x?y#z"], (ValueError,),
               [b"http://", b"[", b"]", b":", b"/", b"#", b"65536", b"@", b"%0d"]),
        Target("interface", check_interface, [b"\2\x18\x80\0\2\0\0\0\x08\0\1\0\x7f\0\0\1\x08\0\2\0\x7f\0\0\1",
                                             b"\x0a\x40\0\0\2\0\0\0\x14\0\1\0" + noise(16)], (), [b"\x08\0\1\0", b"\0\0", b"\x14\0\1\0"]),
        Target("host_port", check_host_port, ENDPOINTS, (ValueError,), [b":", b"[", b"]", b"::", b"0" * 20, b"65536"]),
        Target("overrides", check_overrides, [b"\n".join(ENDPOINTS[2:])], CONFIG, [b":", b"\n", b"[", b"]", b"::1", b"0", b"65536", b" "]),
        Target("link", check_link, links, CONFIG, [b"&", b"=", b"%41", b"%", b"&amp;", b"port=", b"server=", b"secret=", b"-_",
               b"#", b"9" * 5000]),
        Target("qr", check_qr, [links[0], b"", b"x" * 2331], (ValueError,), ["\u00e4".encode(), b"A" * 300], cost=100),
        Target("words", check_words, [b"config.toml\n--log-level\ndebug\n-s", b"--init\n--port\n443\n--domain\na.example\n--no-start",
                                     b"info,telemt=debug,hyper::x=trace"], (),
               [b"--init", b"\n", b"--port", b"--secret", b"f" * 32, b"--log-level=", b"--help", b"=", b",", b"9" * 5000]),
        Target("ping", check_ping, [flight + record, record[5:], field_le(b"\x6c\xfe\xff\xff"),
               b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n"],
               (), [b"\x15\3\3\0\2", b"\x17\3\3", b"SSH-2", b"HTTP/", b"N" * 16, b"\0\0\0\x80"]),
    ]


def field_le(body: bytes) -> bytes:
    """`body` behind its length, as an intermediate frame has it."""
    return len(body).to_bytes(4, "little") + body


def all_targets() -> list[Target]:
    """Every pure parser."""
    hellos = [client_hello(b"petrovich.ru", {29: 32}), client_hello(b"", {4588: 1216, 29: 32}, size=1700),
              client_hello(b"x" * 250, {29: 32}, session=0), client_hello(b"petrovich.ru", {0x0A0A: 1, 29: 32, 23: 65})]
    records = b"\x17\x03\x03\0\x04abcd\x14\x03\x03\0\x01\x01\x17\x03\x01\0\0\x17\x03\x03\0\x02ef"
    flights = [server_flight(29, b"\x13\1", (43, 51), (2000,)), server_flight(4588, b"\x13\2", (51, 43), (27, 900, 280, 53)),
               server_flight(29, b"\x13\3", (23, 43, 51), (64, 64))]
    preambles = [client_preamble(transport, dc) for transport, dc in zip(telemt.Transport, (2, -4, 203), strict=True)]
    includes = [b"include = \"1\"\nx\n\0a\r\ninclude='2' # b\n\0y = \"\"\"\ninclude = \"1\"\n\"\"\"", b'include = "1"\0include = "1"']
    return [
        Target("client_hello", check_hello, hellos, WIRE, [b"\x16\x03\x01", b"\0\x1d\0\x20", b"\x13\x01", b"\0\x33", b"\0\x10"]),
        Target("records", check_records, [records, records + b"\x15\x03\x03\0\x02\x02\x28more", b"\x17\x03\x03\x40\0" + noise(16_384)],
               WIRE, [b"\x17\x03\x03", b"\x14\x03\x03\0\x01\x01", b"\x15\x03\x03\0\x02", b"\x41\0"]),
        Target("flight", check_flight, flights, WIRE,
               [b"\x17\3\3", b"\x15\3\3\0\2\2\x28", b"\0\x2b\0\2\3\4", b"\x11\xec\4\x60", b"\x13\1"]),
        Target("front_file", check_front_file, front_files(), (ValueError,), FRONT_WORDS),
        Target("preamble", check_preamble, preambles, WIRE, [b"\xef", b"GET ", b"\xdd\xdd\xdd\xdd", b"\0\0\0\0"]),
        Target("proxy", check_proxy, PROXIES, WIRE, [b"TCP6", b"UNKNOWN", b"\r\n", b"::ffff:", b" ", b"0", b"\x21\x21\0\x24"]),
        Target("config", check_config, [SAMPLE, SAMPLE.replace(b"\n#", b"\n"), b"", b"a = " + b"[" * 3_000], CONFIG, config_words()),
        Target("settings", check_settings, [b"", bytes(range(80)), bytes(range(80, 160)), bytes(range(160, 240))], CONFIG),
        Target("include", check_include, includes, CONFIG, [b"include = ", b'"1"', b"'2'", b"\0", b'"""', b"'''", b"\n", b"#", b"\\"]),
        Target("moment", check_moment, MOMENTS, (), [b" " * 50, b"+", b"Z", b".", b"T", "\u2212".encode()]),
        Target("network", check_network, NETWORKS, (), [b"/", b".", b"::", b"%", b"255.255.0.0"]),
        Target("edit", check_edit, ACCESS, (*CONFIG, telemt_api.EditError), ACCESS_WORDS),
        Target("body", check_body, BODIES, (), BODY_WORDS),
        Target("quota", check_quota, [telemt.render_quota_state([("alice", 5, 0), ("b", 0, 7)]), b'{"users":{}}'], (ValueError,),
               [b"null", b"-1", b"1e5", b"[", b"{", b'"', b"18446744073709551616", b"\\ud800"]),
        Target("http", check_http, CONVERSATIONS, (), HTTP_WORDS),
        Target("target", check_target, [b"GET /v1/users/bob/qr?kind=tls&index=1", b"PATCH /v1/users/%C3%A4?limit=5",
               b"GET http://h/v1/health/"],
               API, [b"/", b"%2F", b"%00", b"?", b"&", b"limit=", b"kind=", b"index=", b"users/", b"%ff"]),
        Target("endpoint", check_endpoint, ENDPOINTS, CONFIG, [b":", b"[", b"]", b"::", b"%", "\u0663".encode()]),
        *more_targets(),
    ]
