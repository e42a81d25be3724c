"""What a session through the middle end costs, as ratios: downloads to a bare loop, small messages to the direct way.

usage: bench_middle.py [--rounds N] [--quick] [--write]

The proxy, the middle end and the bare loop are processes of their own; CPU seconds are read from /proc, as bench.py does it.
The bare loop does what cannot be avoided and nothing else: read what is there, AES-CBC decrypt it in one call, AES-CTR encrypt it
frame by frame, send; no checksum, no lengths, no records.  --write: docs/performance-middle.json and the table in docs/performance.md.
"""
from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import bench
import bench_peers as peers
import bench_report
from bench import BACKENDS, MIB, ROOT, SECRET, Worker
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

OVERHEAD = 28                            # bytes that an answer has around it on the link
WINDOW = 4 * MIB                         # what a client asks for at a time; it has two such requests out
ECHO_BYTES = 128
TARGETS = {65_536: 1.5, 4096: 2.5}       # payload bytes of an answer -> ratio
TRIP_TARGET = 1.6
STALL_TARGET = 2.0                       # p99 of the others beside a client that does not read, as a multiple of the undisturbed one
STALL_BYTES, QUEUE_BYTES = 12 * MIB, 6 * MIB         # what it asks for, below the limit of a queue; what at least stands in the proxy


# -- processes


def serve_loop(size: int) -> None:
    """`loop SIZE`: a source of link frames behind the bare loop; prints its port; each client says first how many bytes it wants."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    stride = (size + OVERHEAD + 15) & -16
    while True:
        client, _ = listener.accept()
        left = int.from_bytes(peers.read_exactly(client, 8), "little")
        with socket.create_server(("127.0.0.1", 0)) as meeting:
            pump = socket.create_connection(meeting.getsockname())
            source, _ = meeting.accept()
        feeder = os.fork()                       # its CPU time is not ours
        if not feeder:
            source.close()
            chunk = bytes(stride * (MIB // stride))
            while left > 0:
                pump.sendall(chunk)
                left -= len(chunk) // stride * size
            os._exit(0)
        pump.close()
        pass_on(source, client, stride)
        client.close()
        source.close()
        os.waitpid(feeder, 0)


def pass_on(source: socket.socket, client: socket.socket, stride: int) -> None:
    """The bare loop."""
    view, out = memoryview(bytearray(MIB + 64)), memoryview(bytearray(MIB + 64))
    cbc = Cipher(algorithms.AES(bytes(32)), modes.CBC(bytes(16))).decryptor()
    ctr = peers.aes(bytes(32), bytes(16))
    while size := source.recv_into(view, MIB):
        cbc.update_into(view[:size & -16], view)
        for at in range(0, size, stride):
            end = min(at + stride, size)
            ctr.update_into(view[at:end], out[at:])
        client.sendall(out[:size])


def serve_middle(size: int) -> None:
    """`middle SIZE`: a middle end for DC 2 that answers orders in batches; prints the proxy's configuration, then runs until killed."""
    sys.path.insert(0, str(ROOT / "tests"))
    fake: Any = importlib.import_module("fake_middle_end")

    def pour(link: Any, conn_id: int, left: int) -> None:
        payload = fake.answer(conn_id, bytes(size))
        count = max(1, 512 * 1024 // size)
        while left > 0:
            with link._write:
                link._push(link.wire.seal(b"".join([link.wire.wrap(payload) for _ in range(count)])))
            left -= count * size

    class Link(fake.MeLink):  # type: ignore[misc]
        """Answers everything that one read brought with one write, as a real middle end does; the double writes each alone."""

        def _listen(self) -> None:
            while True:
                self.out: list[bytes] = []
                for seqno, payload in self.wire.frames():
                    self._handle(seqno, payload)
                out, self.out = self.out, None  # type: ignore[assignment]
                if out:
                    super().send(*out)
                self._fill()

        def send(self, *payloads: bytes) -> None:
            if getattr(self, "out", None) is None:
                super().send(*payloads)
            else:
                self.out += payloads

    fake.MeLink = Link

    def on_req(link: Any, _flags: int, conn_id: int, _client: Any, _our: Any, _tag: bytes, data: bytes) -> Iterable[bytes]:
        if len(data) == ECHO_BYTES:
            return [fake.answer(conn_id, data)]
        threading.Thread(target=pour, args=(link, conn_id, struct.unpack_from("<Q", data, 8)[0]), daemon=True).start()
        return []

    with fake.MeWorld({2: 1}, on_req=on_req, keep_messages=0, coalesce=True) as world:
        print(json.dumps(world.config()["general"]), flush=True)
        threading.Event().wait()


class Middle:
    """A middle end with answers of `size` bytes, and a proxy that goes through it."""

    def __init__(self, folder: Path, backend: str, size: int) -> None:
        self.size = size
        self.middle = Worker([sys.executable, __file__, "middle", str(size)])
        general = json.loads(self.middle.line())
        lines = ["[general]", *(f"{key} = {json.dumps(value)}" for key, value in general.items()), f'proxy_secret_path = "{folder}/secret"',
                 f'proxy_config_v4_cache_path = "{folder}/v4"', "[general.modes]", "tls = true", "[general.links]", "show = []",
                 "[network]", "ipv6 = false", "stun_use = false", "[server]", "port = 0", "[[server.listeners]]", 'ip = "127.0.0.1"',
                 "[censorship]", "tls_emulation = false", "mask = false", "[access.users]", f'bench = "{SECRET.hex()}"']
        path = folder / f"middle-{backend}-{size}.toml"
        path.write_text("\n".join(lines) + "\n")
        log = path.with_suffix(".log")
        with log.open("w") as output:
            self.proxy = Worker([sys.executable, str(ROOT / "telemt.py"), str(path)], {"TELEMT_CRYPTO": backend}, output)
        self.port = 0
        end = time.perf_counter() + 15
        while not (self.port and "link up" in log.read_text()):
            assert time.perf_counter() < end, log.read_text()
            time.sleep(0.01)
            self.port = next((int(line.rpartition(":")[2]) for line in log.read_text().splitlines() if "Listening on " in line), 0)

    def close(self) -> None:
        """End both."""
        self.proxy.stop()
        self.middle.stop()


# -- clients


def connect(port: int, dc: int = 2) -> tuple[socket.socket, CipherContext]:
    """A FakeTLS client, and the cipher for what it says."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peers.shake_hands(sock, SECRET)
    head = b"A" + os.urandom(55)
    cipher = peers.aes(hashlib.sha256(head[8:40] + SECRET).digest(), head[40:56])
    sock.sendall(peers.record(head + cipher.update(head + peers.TAG + struct.pack("<h", dc) + b"\0\0")[56:]))
    return sock, cipher


def frame(cipher: CipherContext, data: bytes) -> bytes:
    """A record with one padded-intermediate frame."""
    return peers.record(cipher.update(len(data).to_bytes(4, "little") + data))


def download(port: int, bulk: int, scrap: bytearray) -> float:
    """Read about `bulk` bytes in windows; returns GB."""
    sock, cipher = connect(port)
    order = b"\x11" * 8 + struct.pack("<QQ", WINDOW, 0)
    total = due = 0
    for _ in range(2):
        sock.sendall(frame(cipher, order))
    asked = 2 * WINDOW
    while total < bulk:
        total += sock.recv_into(scrap, len(scrap), socket.MSG_TRUNC)
        if total - due >= WINDOW and asked < bulk:
            due += WINDOW
            asked += WINDOW
            sock.sendall(frame(cipher, order))
    sock.close()
    return total / 1e9


def trips(worker: Worker, port: int, dc: int, count: int, rounds: int) -> float:
    """CPU seconds of `worker` per 128-byte message and its answer, `count` sessions at a time; handshakes not counted."""
    state: dict[Any, list[Any]] = {}
    for _ in range(count):
        client, cipher = connect(port, dc)
        state[client] = [5, cipher]
    exchange(state)                              # warm, and every session has its link

    def work() -> float:
        for row in state.values():
            row[0] = rounds
        exchange(state)
        return count * rounds

    cost = bench.measured(worker, work)
    for client in state:
        client.close()
    return cost


def exchange(state: dict[Any, list[Any]]) -> None:
    """Every socket sends a message and waits for its answer, as often as its row says."""
    selector = selectors.DefaultSelector()
    message = b"\x11" * ECHO_BYTES
    for client, row in state.items():
        selector.register(client, selectors.EVENT_READ)
        client.sendall(frame(row[1], message))
    busy = len(state)
    while busy:
        for key, _ in selector.select(30):
            sock: Any = key.fileobj
            row = state[sock]
            peers.read_exactly(sock, int.from_bytes(peers.read_exactly(sock, 5)[3:], "big"))
            row[0] -= 1
            if row[0]:
                sock.sendall(frame(row[1], message))
            else:
                busy -= 1
    selector.close()


def p99_ms(clients: dict[socket.socket, CipherContext], turns: int) -> float:
    """Of 128-byte round trips, one session after the other."""
    times, message = [], b"\x11" * ECHO_BYTES
    for _ in range(turns):
        for sock, cipher in clients.items():
            data, begin = frame(cipher, message), time.perf_counter()
            sock.sendall(data)
            peers.read_exactly(sock, int.from_bytes(peers.read_exactly(sock, 5)[3:], "big"))
            times.append(time.perf_counter() - begin)
    return sorted(times)[int(len(times) * 0.99)] * 1e3


def beside_stalled(middle: Middle, clients: dict[socket.socket, CipherContext], turns: int) -> float:
    """p99_ms while a client has asked for much, reads nothing, and the proxy holds it."""
    before_kb = middle.proxy.status("VmRSS")
    sock, cipher = connect(middle.port)
    sock.sendall(frame(cipher, b"\x11" * 8 + struct.pack("<QQ", STALL_BYTES, 0)))
    end = time.perf_counter() + 30
    while (middle.proxy.status("VmRSS") - before_kb) << 10 < QUEUE_BYTES:
        assert time.perf_counter() < end, "nothing is queued"
        time.sleep(0.01)
    found = p99_ms(clients, turns)
    assert (middle.proxy.status("VmRSS") - before_kb) << 10 >= QUEUE_BYTES, "the stalled client was dropped"
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    return found


# -- rows


def bare_download(port: int, bulk: int, scrap: bytearray) -> float:
    """The same through the bare loop."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(bulk.to_bytes(8, "little"))
        return peers.discard(sock, scrap) / 1e9


def row(name: str, unit: str, target: float, reference: str, rounds: int, cost: Callable[[str], float],
        bare: Callable[[str], float]) -> dict[str, Any]:
    """One row as bench.py's table has them; the reference may depend on the backend."""
    found: dict[str, Any] = {"unit": unit, "target": target, "reference": reference}
    for backend in BACKENDS:
        costs, bares = [], []
        for number in range(rounds + 1):
            pair = cost(backend), bare(backend)
            if number:
                costs.append(pair[0])
                bares.append(pair[1])
        found[backend] = {"cost": median(costs), "ratio": median(bench_report.ratios(costs, bares))}
        found["bare"] = median(bares)
    print("  " + bench_report.one_line(name, found, BACKENDS), flush=True)
    return found


def download_row(rig: bench.Rig, size: int, bulk: int, rounds: int) -> dict[str, Any]:
    """Answers of `size` bytes beside the bare loop."""
    worker = Worker([sys.executable, __file__, "loop", str(size)])
    port = int(worker.line())
    middles = {backend: Middle(rig.path, backend, size) for backend in BACKENDS}

    def cost(backend: str) -> float:
        middle = middles[backend]
        return bench.measured(middle.proxy, lambda: download(middle.port, bulk, rig.scrap))

    try:
        return row(f"FakeTLS download through the middle end, {size >> 10} KiB answers", "s/GB", TARGETS[size], "CBC+CTR", rounds, cost,
                   lambda _: bench.measured(worker, lambda: bare_download(port, bulk, rig.scrap)))
    finally:
        worker.stop()
        for middle in middles.values():
            middle.close()


def trip_row(rig: bench.Rig, count: int, times: int, rounds: int) -> dict[str, Any]:
    """Small messages beside the direct way of the same proxy."""
    middles = {backend: Middle(rig.path, backend, 4096) for backend in BACKENDS}

    def cost(backend: str) -> float:
        middle = middles[backend]
        return 1e6 * trips(middle.proxy, middle.port, 2, count, times)

    def direct(backend: str) -> float:
        proxy = rig.proxy(backend)
        return 1e6 * trips(proxy, proxy.port, peers.ECHO, count, times)

    try:
        name = f"128-byte round trip through the middle end, {count} FakeTLS sessions"
        return row(name, "us", TRIP_TARGET, "direct", rounds, cost, direct)
    finally:
        for middle in middles.values():
            middle.close()


def stall_row(rig: bench.Rig, count: int, turns: int, rounds: int) -> dict[str, Any]:
    """`count` sessions beside one that does not read and alone, in turn; the median of many pairs, for the machine has moods."""
    middles = {backend: Middle(rig.path, backend, 65_536) for backend in BACKENDS}
    crowds = {backend: dict(connect(middle.port) for _ in range(count)) for backend, middle in middles.items()}
    try:
        return row(STALL_ROW.format(count), "ms", STALL_TARGET, "undisturbed", rounds,
                   lambda backend: beside_stalled(middles[backend], crowds[backend], turns), lambda backend: p99_ms(crowds[backend], turns))
    finally:
        for crowd in crowds.values():
            for sock in crowd:
                sock.close()
        for middle in middles.values():
            middle.close()


STALL_ROW = "p99 of 128-byte round trips of {} sessions beside one that asked for 12 MiB and does not read"


def missed(found: dict[str, Any], backends: Sequence[str] = BACKENDS) -> bool:
    """Whether a row is above its target."""
    return any(line[backend]["ratio"] > line["target"] for line in found.values() for backend in backends)


def run(rig: bench.Rig, quick: bool, rounds: int) -> dict[str, Any]:
    """All rows."""
    bulk = (64 if quick else 256) * MIB
    found = {f"FakeTLS download, {size >> 10} KiB answers": download_row(rig, size, bulk, rounds) for size in TARGETS}
    found["128-byte round trip, 32 FakeTLS sessions"] = trip_row(rig, 32, 150 if quick else 400, rounds)
    found[STALL_ROW.format(500)] = stall_row(rig, 500, 2 if quick else 4, 3 * rounds)
    return found


def write(found: dict[str, Any], docs: Path) -> None:
    """Write performance-middle.json and its table in performance.md."""
    (docs / "performance-middle.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    page = docs / "performance.md"
    page.write_text(bench_report.between(page.read_text(encoding="utf-8"), "middle", bench_report.table(found, BACKENDS)), encoding="utf-8")


def main() -> int:
    """Run the rows; the exit code tells whether a target is missed."""
    if sys.argv[1:2] in (["loop"], ["middle"]):
        (serve_loop if sys.argv[1] == "loop" else serve_middle)(int(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rig = bench.Rig(64 * MIB)
    try:
        found = run(rig, options.quick, options.rounds or (3 if options.quick else 7))
    finally:
        rig.close()
    if options.write:
        write(found, ROOT / "docs")
    return bench_report.MISSED if missed(found) else 0


if __name__ == "__main__":
    sys.exit(main())
