"""The same hello to the mask host itself, through the proxy as a stranger, and through the proxy with a good digest: what an observer sees.

Every test prints the three side by side (pytest -s, or when it fails).  A stranger's connection is the host's own, so everything must be
equal.  Ours differs in one thing that Telegram's clients force upon us: the encrypted flight is one record, of a size that the host had
in one of its samples (tls-front.md D1); all else must be equal again, up to the way the connection ends when garbage follows.
"""
from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import sites
from doubles import APP, CCS, ROOT, USERS, Rig, sign_hello

HELLOS = {name: bytes.fromhex(entry["record"])
          for name, entry in json.loads((ROOT / "tests" / "vectors" / "hellos.json").read_text())["hellos"].items()}
NGINX = pytest.param("nginx", marks=pytest.mark.skipif(not sites.NGINX, reason=sites.NGINX_MISSING))
OPENSSL = pytest.param("openssl", marks=pytest.mark.skipif(not sites.knows_mlkem(), reason="no pyOpenSSL that knows X25519MLKEM768"))
QUIET_S = 0.7

# What follows the flight: nothing but the end, a record that no key fits, bytes that are no TLS at all, an alert in clear.
AFTER: dict[str, bytes] = {
    "fin": b"", "bad record": CCS + APP + b"\x00\x80" + b"\x5a" * 128, "no tls": b"GET / HTTP/1.1\r\nHost: www.example.com\r\n\r\n" * 3,
    "bad version": b"\x17\x02\x00\x00\x80" + b"\x5a" * 128, "long record": b"\x17\x03\x03\x50\x00" + b"\x5a" * 128,
    "hello again": HELLOS["chrome-x25519"],
}


@dataclasses.dataclass
class Seen:
    """What anybody on the way can read."""

    record_versions: str = ""
    record_types: str = ""              # of the flight, repeated application data told once
    server_hello_size: int = 0
    legacy_version: str = ""
    random_is_fresh: bool = False
    session_id_echoed: bool = False
    suite: str = ""
    compression: int = 0
    extensions: str = ""                # types in order
    supported_version: str = ""
    group: int = 0
    share_size: int = 0
    ja3s: str = ""
    ccs: str = ""
    flight_bytes: int = 0               # all application data together
    flight_records: int = 0
    after: str = ""                     # records, then how it ended


def read_quietly(sock: socket.socket) -> tuple[bytes, str]:
    """(everything until nothing comes any more, `open`, `fin` or `rst`)."""
    data = b""
    sock.settimeout(QUIET_S)
    while True:
        try:
            piece = sock.recv(65_536)
        except TimeoutError:
            return data, "open"
        except ConnectionResetError:
            return data, "rst"
        if not piece:
            return data, "fin"
        data += piece


def records(data: bytes) -> list[tuple[int, int, bytes]]:
    """(type, version, body) of every record; the rest, if any, as type 0."""
    found, at = [], 0
    while len(data) - at >= 5:
        kind, version, size = struct.unpack_from(">BHH", data, at)
        found.append((kind, version, data[at + 5:at + 5 + size]))
        at += 5 + size
    return found + ([(0, 0, data[at:])] if data[at:] else [])


def look(port: int, hello: bytes, after: bytes) -> Seen:
    """Send `hello`, read the flight, send `after` and our end, read what comes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        sock.sendall(hello)
        first = sock.recv(1, socket.MSG_PEEK)
        assert first, "no answer"
        flight, state = read_quietly(sock)
        assert state == "open", f"{state} after {flight.hex()}"
        with contextlib.suppress(OSError):
            if after:
                sock.sendall(after)
            else:
                sock.shutdown(socket.SHUT_WR)
        rest, end = read_quietly(sock)
    parts = records(flight)
    message = parts[0][2]
    session, at = message[39:39 + message[38]], 39 + message[38]
    suite, compression = message[at:at + 2], message[at + 2]
    at, kinds, bodies = at + 5, [], {}
    while at < len(message):
        kind, size = struct.unpack_from(">HH", message, at)
        kinds.append(kind)
        bodies[kind], at = message[at + 4:at + 4 + size], at + 4 + size
    sizes = [len(body) for kind, _, body in parts if kind == 0x17]
    types = [kind for kind, _, _ in parts]
    plain = f"771,{int.from_bytes(suite, 'big')},{'-'.join(map(str, kinds))}"
    return Seen(
        " ".join(sorted({f"{version:04x}" for _, version, _ in parts})),
        " ".join(f"{kind:02x}" for at, kind in enumerate(types) if not (at and kind == types[at - 1] == 0x17)), len(message),
        message[4:6].hex(), len(set(message[6:38])) > 8, session == hello[44:44 + hello[43]], suite.hex(), compression,
        " ".join(map(str, kinds)), bodies.get(43, b"").hex(), int.from_bytes(bodies[51][:2], "big"), len(bodies[51]) - 4,
        hashlib.md5(plain.encode(), usedforsecurity=False).hexdigest(), next((body.hex() for kind, _, body in parts if kind == 0x14), ""),
        sum(sizes), len(sizes), " ".join([*(f"{kind:02x}/{version:04x}/{len(body)}" for kind, version, body in records(rest)), end]))


def side_by_side(title: str, columns: dict[str, Seen]) -> str:
    """A table for people."""
    rows = [[field.name, *(str(getattr(seen, field.name)) for seen in columns.values())] for field in dataclasses.fields(Seen)]
    rows.insert(0, ["", *columns])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"-- {title}", *lines])


@contextlib.contextmanager
def host_of(kind: str, folder: Path) -> Iterator[int]:
    """Port of a mask host of that kind."""
    certificate = sites.make_certificate(folder / "certificates", "rsa2048", 1, ["www.example.com"])
    if kind == "nginx":
        with sites.Nginx(folder / "nginx", certificate) as host:
            yield host.port
    else:
        with sites.openssl_host(certificate) as other:
            yield other.port


@pytest.mark.parametrize("kind", [NGINX, OPENSSL])
def test_three_answers_to_one_hello(rig: Rig, kind: str) -> None:
    with host_of(kind, rig.folder) as host_port:
        proxy = rig.proxy({"censorship": {"mask": True, "tls_emulation": True, "tls_domain": "www.example.com", "mask_host": "127.0.0.1",
                                          "mask_port": host_port}, "timeouts": {"client_handshake": 30}})
        proxy.wait_log(r"TLS cache updated domain=www\.example\.com", timeout=30)
        cache = proxy.folder / "tlsfront" / "www.example.com.json"
        end = time.monotonic() + 10
        while not cache.exists() and time.monotonic() < end:
            time.sleep(0.02)
        profile = json.loads(cache.read_bytes())["profile"]
        with concurrent.futures.ThreadPoolExecutor(24) as pool:
            for name, hello in HELLOS.items():
                samples = profile["flights"] if name != "chrome-x25519" else profile.get("plain", profile["flights"])
                jobs = {what: {"mask host": pool.submit(look, host_port, fresh(hello), after),
                               "stranger": pool.submit(look, proxy.port, fresh(hello), after),
                               "client": pool.submit(look, proxy.port, fresh(hello, USERS["alice"]), after)}
                        for what, after in AFTER.items()}
                for what, columns in jobs.items():
                    compare(f"{kind}, {name}, then {what}; sampled flights {samples}", samples,
                            {column: job.result(60) for column, job in columns.items()})


def fresh(hello: bytes, secret: str = "") -> bytes:
    """The same hello with random bytes and a session id of its own (what was seen before is a replay), signed or not."""
    hello = hello[:11] + os.urandom(32) + hello[43:44] + os.urandom(32) + hello[76:]
    return sign_hello(hello, bytes.fromhex(secret), int(time.time())) if secret else hello


def compare(title: str, samples: list[int], seen: dict[str, Seen]) -> None:
    """Print the three, and fail where an observer could tell them apart."""
    table = side_by_side(title, seen)
    print(table)
    host, ours = seen["mask host"], seen["client"]
    assert seen["stranger"] == host, table
    assert ours.flight_records == 1 and ours.flight_bytes in samples and host.flight_bytes in samples, table
    assert dataclasses.replace(ours, flight_records=host.flight_records, flight_bytes=host.flight_bytes) == host, table
