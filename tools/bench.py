"""What a byte, an event, a handshake and an idle session cost, as ratios to bare loops that do the same system calls.

usage: bench.py [--quick] [--rounds N] [--only WORD] [--write] [--check] [--profile]

The proxy, the reference loops and the data centre are processes of their own; the load comes from this one.  CPU seconds are read
from /proc (all threads, user + system).  Every round runs each work through the proxy of each backend and then through its reference,
so that whatever else the machine does hits all of them; the figure of a row is the median of the rounds' ratios.

--write    docs/performance.json, the tables of docs/performance.md and docs/images/scaling.svg; what an interrupted run has measured
           with the same sources is kept in build/bench and not measured again
--check    compare with docs/performance.json: exit 1 where a ratio is worse by more than a quarter twice in a row
--profile  a flame graph of the FakeTLS download beside docs/performance.md (py-spy)
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import bench_peers as peers
import bench_report
from bench_peers import connect, discard, ping_pong, record
from bench_report import Kept

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
SECRET = bytes(range(1, 17))
MIB = 1 << 20
FDS = 40_000
SCALES = (1, 10, 100, 1000, 5000)
BACKENDS = ("cryptography", "libcrypto")


# -- processes


class Worker:
    """A subprocess whose CPU time and memory we read."""

    def __init__(self, args: list[str], env: dict[str, str] | None = None, output: Any = subprocess.PIPE) -> None:
        self.process = subprocess.Popen(args, stdout=output, stderr=subprocess.DEVNULL, text=True, env={**os.environ, **(env or {})})
        self.proc = Path(f"/proc/{self.process.pid}")

    def line(self) -> str:
        """The next line it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def cpu_s(self) -> float:
        """CPU seconds of all its threads, user and system (nanosecond resolution)."""
        total = 0
        for task in (self.proc / "task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9

    def status(self, field: str) -> int:
        """A number of /proc/PID/status: VmRSS in KB, voluntary_ctxt_switches."""
        for line in (self.proc / "status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
        raise KeyError(field)

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def raise_fds() -> None:
    """Allow ten thousand sessions, two descriptors each, here and in every process started from here."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(FDS, hard), max(FDS, hard)))
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def most_sessions() -> int:
    """10,000, or as many as the descriptors of this system allow (the proxy keeps 256 and some for itself)."""
    return min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 - 300)


class Proxy(Worker):
    """telemt.py as a subprocess, every DC number of the bench pointing at the data-centre double."""

    def __init__(self, folder: Path, dc_port: int, backend: str, *, users: int = 1, fast: bool = True, source_port: int = 0,
                 poller: str = "auto") -> None:
        numbers = [*range(peers.SOURCE, peers.SILENT + 1), *(peers.SHARE + count for count in sorted({64, *SCALES}))]
        lines = ["[general]", f"fast_mode = {str(fast).lower()}", f'event_loop = "{poller}"',
                 "use_middle_proxy = false", "[general.modes]", "classic = true",
                 "secure = true", "tls = true", "[general.links]", "show = []", "[network]", "ipv6 = false", "[server]", "port = 0",
                 "[[server.listeners]]", 'ip = "127.0.0.1"', "[censorship]", "mask = false", "tls_emulation = false",
                 "[access]", "replay_check_len = 200000", "[dc_overrides]"]
        lines += [f'"{number}" = "127.0.0.1:{source_port if number == peers.SOURCE and source_port else dc_port}"' for number in numbers]
        lines += ["[[upstreams]]", 'type = "direct"', 'bind_addresses = ["127.0.0.1"]']        # its checks of the real ones stay here
        lines += ["[access.users]", *(f'filler{n} = "{n + 2:032x}"' for n in range(users - 1)), f'bench = "{SECRET.hex()}"']
        path = folder / f"{backend}-{users}-{fast}-{source_port}-{poller}.toml"
        path.write_text("\n".join(lines) + "\n")
        log = path.with_suffix(".log")
        begin = time.perf_counter()
        with log.open("w") as output:              # a file: a pipe would charge its reader's wake-ups to the proxy
            super().__init__([sys.executable, str(ROOT / "telemt.py"), str(path)], {"TELEMT_CRYPTO": backend}, output)
        self.port, self.banner = 0, ""
        while not self.port and time.perf_counter() < begin + 10:
            time.sleep(0.005)
            lines = log.read_text().splitlines()
            self.banner = lines[0] if lines else ""
            self.port = next((int(line.rpartition(":")[2]) for line in lines if "Listening on " in line), 0)
        self.ready_s = time.perf_counter() - begin
        assert self.port, "the proxy did not start"


class Rig:
    """Everything that runs during a bench."""

    def __init__(self, bulk: int) -> None:
        self.bulk = bulk
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name)
        self.scrap = bytearray(MIB)
        self.dc = Worker([sys.executable, str(TOOLS / "bench_peers.py"), "dc", str(bulk)])
        self.dc_port = int(self.dc.line())
        self.loops = Worker([sys.executable, str(TOOLS / "bench_loops.py"), str(self.dc_port)])
        self.ports: dict[str, int] = json.loads(self.loops.line())
        self.proxies: dict[str, Proxy] = {}

    def proxy(self, backend: str, **more: Any) -> Proxy:
        """The proxy of that backend and shape, started at its first use."""
        name = f"{backend} {more}"
        if name not in self.proxies:
            self.proxies[name] = Proxy(self.path, self.dc_port, backend, **more)
        return self.proxies[name]

    def close(self) -> None:
        """End every process."""
        for worker in (*self.proxies.values(), self.loops, self.dc):
            worker.stop()
        self.folder.cleanup()


# -- works: each returns a cost


class Job(NamedTuple):
    """One measured piece of work: a row of the table."""

    name: str
    unit: str
    target: float                                  # ratio that must not be passed; 0 = for information
    cost: Callable[[Rig, Proxy], float]            # of the proxy
    reference: str                                 # what it is compared with, in words
    bare: Callable[[Rig], float]                   # cost of the reference
    fast: bool = True                              # general.fast_mode of the proxy


def measured(worker: Worker, work: Callable[[], float]) -> float:
    """CPU seconds of `worker` per unit of `work`, which returns how many units it did."""
    before = worker.cpu_s()
    units = work()
    time.sleep(0.02)                               # the last close is still being handled
    return (worker.cpu_s() - before) / units


def download(rig: Rig, worker: Worker, port: int, kind: str, dc: int = peers.SOURCE) -> float:
    """CPU seconds per GB of one download."""
    def work() -> float:
        sock = connect(port, kind, SECRET, dc)
        size = discard(sock, rig.scrap)
        sock.close()
        return size / 1e9
    return measured(worker, work)


def uploading(rig: Rig, worker: Worker, port: int, kind: str) -> float:
    """CPU seconds per GB of one upload."""
    chunk = peers.records_of(MIB) if kind == "tls" else bytes(MIB)

    def work() -> float:
        sock = connect(port, kind, SECRET, peers.SINK)
        times = rig.bulk // MIB
        peers.upload(sock, chunk, times)
        sock.close()
        return times * MIB / 1e9
    return measured(worker, work)


def parallel(rig: Rig, worker: Worker, port: int, kind: str, count: int) -> float:
    """CPU seconds per GB of `count` downloads side by side, handshakes not counted."""
    socks = [connect(port, kind, SECRET, peers.SHARE + count) for _ in range(count)]
    time.sleep(0.1)

    def work() -> float:
        for sock in socks:
            sock.sendall(record(b"go") if kind == "tls" else b"go")
        return peers.drain_all(socks, rig.scrap) / 1e9
    cost = measured(worker, work)
    close_all(socks)
    return cost


def echoes(worker: Worker, port: int, kind: str, count: int, rounds: int, on_time: Callable[[float], None] | None = None) -> float:
    """CPU seconds per 128-byte round trip of `count` sessions."""
    socks = [connect(port, kind, SECRET, peers.ECHO) for _ in range(count)]
    message = bytes(128)
    wire, answer = (record(message), 133) if kind == "tls" else (message, 128)
    ping_pong(socks, wire, answer, 5)

    def work() -> float:
        ping_pong(socks, wire, answer, rounds, on_time)
        return count * rounds
    cost = measured(worker, work)
    close_all(socks)
    return cost


def handshakes(worker: Worker, port: int, count: int, sources: Iterator[str] | None = None) -> float:
    """CPU seconds per FakeTLS handshake up to the first answer; `sources`: a new client IP each time."""
    hellos = [peers.client_hello(SECRET) for _ in range(count)]
    openings = [record(peers.preamble(SECRET, peers.HELLO)) for _ in range(count)]

    def work() -> float:
        for hello, opening in zip(hellos, openings, strict=True):
            source = (next(sources), 0) if sources is not None else None
            with socket.create_connection(("127.0.0.1", port), source_address=source) as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                peers.shake_hands(sock, SECRET, hello)
                sock.sendall(opening)
                peers.read_exactly(sock, 32)
        return count
    return measured(worker, work)


def loopback_addresses() -> Iterator[str]:
    """127.1.0.1, 127.1.0.2 ... : clients that were never here before."""
    for n in range(1, 1 << 22):
        yield f"127.{1 + (n >> 16)}.{n >> 8 & 255}.{n & 255}"


FRESH = loopback_addresses()


def close_all(socks: list[socket.socket]) -> None:
    """Close every socket."""
    for sock in socks:
        sock.close()


def jobs(quick: bool) -> list[Job]:
    """The rows with a bare loop beside them (issue: the cheapest byte)."""
    trips, greets = (150, 100) if quick else (400, 300)

    def down(kind: str, dc: int = peers.SOURCE) -> Callable[[Rig, Proxy], float]:
        return lambda rig, proxy: download(rig, proxy, proxy.port, kind, dc)

    def bare(loop: str, dc: int = peers.SOURCE) -> Callable[[Rig], float]:
        return lambda rig: download(rig, rig.loops, rig.ports[loop], "bare", dc)

    def bare_up(rig: Rig) -> float:
        return uploading(rig, rig.loops, rig.ports["aes2"], "bare")

    def bare_echo(rig: Rig) -> float:
        return echoes(rig.loops, rig.ports["echo"], "bare", 32, trips)

    return [
        Job("FakeTLS download, 1 session", "s/GB", 1.3, down("tls"), "scatter", bare("scatter")),
        Job("dd download, 1 session", "s/GB", 1.25, down("plain"), "splice", bare("splice")),
        Job("FakeTLS upload, 1 session", "s/GB", 1.35, lambda rig, proxy: uploading(rig, proxy, proxy.port, "tls"), "aes2", bare_up),
        Job("dd upload, 1 session", "s/GB", 1.25, lambda rig, proxy: uploading(rig, proxy, proxy.port, "plain"), "aes2", bare_up),
        Job("128-byte round trip, 32 FakeTLS sessions", "us", 1.5,
            lambda rig, proxy: 1e6 * echoes(proxy, proxy.port, "tls", 32, trips), "echo", lambda rig: 1e6 * bare_echo(rig)),
        Job("128-byte round trip, 32 dd sessions", "us", 0,
            lambda rig, proxy: 1e6 * echoes(proxy, proxy.port, "plain", 32, trips), "echo", lambda rig: 1e6 * bare_echo(rig)),
        Job("FakeTLS handshake to the first answer, 1 user", "us", 3.0,
            lambda rig, proxy: 1e6 * handshakes(proxy, proxy.port, greets), "minimum",
            lambda rig: 1e6 * handshakes(rig.loops, rig.ports["minimum"], greets)),
        Job("FakeTLS download, fast_mode off", "s/GB", 0, down("tls"), "scatter2", bare("scatter2"), False),
        Job("dd download, fast_mode off", "s/GB", 0, down("plain"), "copy2", bare("copy2"), False),
        Job("FakeTLS download in 4 KiB writes", "s/GB", 0, down("tls", peers.DRIP), "scatter", bare("scatter", peers.DRIP)),
        Job("dd download in 4 KiB writes", "s/GB", 0, down("plain", peers.DRIP), "splice", bare("splice", peers.DRIP)),
    ]


# -- figures without a bare loop


def parallel_costs(rig: Rig, proxy: Proxy) -> dict[str, float]:
    """64 parallel FakeTLS downloads: s/GB, the ratio to the single one, and both again for a bare loop that does the same."""
    many, one = parallel(rig, proxy, proxy.port, "tls", 64), download(rig, proxy, proxy.port, "tls")
    bare_many, bare_one = (parallel(rig, rig.loops, rig.ports["many"], "bare", count) for count in (64, 1))
    return {"s_per_gb": many, "ratio": many / one, "bare_ratio": bare_many / bare_one, "to_bare": many / bare_many}


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """The median of each field."""
    return {name: median(row[name] for row in rows) for name in rows[0]}


def user_costs(rig: Rig, backend: str, count: int) -> dict[str, float]:
    """Handshake with 1,000 users: microseconds per user tried, and the ratio to one user where that IP was seen before."""
    one, many = rig.proxy(backend), rig.proxy(backend, users=1000)
    handshakes(many, many.port, 5)
    single = handshakes(one, one.port, count)
    seen = handshakes(many, many.port, count)
    fresh = handshakes(many, many.port, count // 3, FRESH)
    return {"per_user_us": 1e6 * (fresh - single) / 999, "seen_ratio": seen / single}


def idle_costs(rig: Rig, backend: str, count: int) -> dict[str, float]:
    """Memory and wake-ups of `count` idle FakeTLS sessions in a fresh process."""
    proxy = Proxy(rig.path, rig.dc_port, backend)
    try:
        time.sleep(0.5)
        base = proxy.status("VmRSS")
        socks = [connect(proxy.port, "tls", SECRET, peers.SILENT) for _ in range(count)]
        time.sleep(1.0)
        full = proxy.status("VmRSS")
        before = proxy.status("voluntary_ctxt_switches")
        time.sleep(3.0)
        wakes = (proxy.status("voluntary_ctxt_switches") - before) / 3
        begin = time.perf_counter()
        close_all(socks)
        while proxy.status("VmRSS") and len(list((proxy.proc / "fd").iterdir())) > 40 and time.perf_counter() < begin + 30:
            time.sleep(0.02)
        return {"sessions": count, "base_mb": base / 1024, "ready_s": proxy.ready_s, "session_kb": (full - base) / count,
                "total_mb": full / 1024, "wakeups_per_s": wakes, "close_all_s": time.perf_counter() - begin}
    finally:
        proxy.stop()


def fairness(rig: Rig, backend: str, rounds: int) -> dict[str, float]:
    """p99 of 128-byte round trips of 31 sessions, alone and while another downloads at full speed; the control: by another process.

    The other ends of the download are processes of their own and run when no other process wants the processor: with two
    cores the figure would else be that of the system's scheduler, and of a data centre that answers after a megabyte of bulk.
    So does the other process of the control, a proxy as well: what is left there is a kernel that copies up to a megabyte for
    somebody before it looks who else wants the processor.
    """
    def p99() -> float:
        times: list[float] = []
        echoes(proxy, proxy.port, "tls", 31, rounds, times.append)
        return sorted(times)[int(len(times) * 0.99)] * 1e3

    def p99_beside(bulk: Proxy) -> float:
        helper = subprocess.Popen([sys.executable, "-c", _BULK_CLIENT, str(TOOLS), str(bulk.port), SECRET.hex()])
        try:
            time.sleep(0.5)
            return median(p99() for _ in range(3))
        finally:
            helper.terminate()
            helper.wait()

    source = Worker([sys.executable, str(TOOLS / "bench_peers.py"), "dc", str(rig.bulk), "idle"])
    port = int(source.line())
    proxy = Proxy(rig.path, rig.dc_port, backend, source_port=port)
    other = Proxy(rig.path, rig.dc_port, backend, source_port=port)
    os.sched_setscheduler(other.process.pid, os.SCHED_IDLE, os.sched_param(0))
    try:
        alone, busy, control = median(p99() for _ in range(3)), p99_beside(proxy), p99_beside(other)
        return {"alone_ms": alone, "busy_ms": busy, "ratio": busy / alone, "control_ratio": control / alone}
    finally:
        for worker in (other, proxy, source):
            worker.stop()


_BULK_CLIENT = """
import sys; sys.path.insert(0, sys.argv[1])
from bench_peers import *
step_back()
scrap = bytearray(1 << 20)
while True:
    sock = connect(int(sys.argv[2]), "tls", bytes.fromhex(sys.argv[3]), SOURCE)
    discard(sock, scrap)
    sock.close()
"""


def slow_clients(proxy: Proxy, count: int, seconds: float) -> dict[str, float]:
    """Clients behind 1 Mbit/s each: CPU and wake-ups of the proxy per client, and its growth, while they read 12.5 KB every 100 ms.

    It begins when nothing moves any more, all buffers are full: from then on the proxy has to act whenever a third of the
    kernel's send buffer is free again, which is every seven seconds.
    """
    socks = []
    for _ in range(count):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
        sock.connect(("127.0.0.1", proxy.port))
        peers.shake_hands(sock, SECRET)
        sock.sendall(record(peers.preamble(SECRET, peers.SOURCE)))
        socks.append(sock)
    time.sleep(2.0)

    def read_slowly() -> tuple[float, int]:
        """Seconds times clients, and bytes they read in them."""
        begin = due = time.perf_counter()
        got = 0
        while due < begin + seconds:
            for sock in socks:
                want = 12_500
                while want and (size := len(sock.recv(want))):
                    want -= size
                    got += size
            due += 0.1
            time.sleep(max(0.0, due - time.perf_counter()))
        return count * (time.perf_counter() - begin), got

    read_slowly()                              # what each read leaves for later has its lasting size then
    rss, cpu, wakes = proxy.status("VmRSS"), proxy.cpu_s(), proxy.status("voluntary_ctxt_switches")
    spent, got = read_slowly()
    found = {"cpu_ms_per_s": 1e3 * (proxy.cpu_s() - cpu) / spent, "growth_kb": proxy.status("VmRSS") - rss,
             "wakeups_per_s": (proxy.status("voluntary_ctxt_switches") - wakes) / spent, "mbit_per_s": got * 8e-6 / spent}
    close_all(socks)
    return found


def sparse(proxy: Proxy, count: int, rounds: int) -> dict[str, float]:
    """Round trips of 1 % of `count` sessions, as a ratio to the same number of sessions without the idle ones."""
    active = count // 100
    alone = echoes(proxy, proxy.port, "tls", active, rounds)
    idle = [connect(proxy.port, "tls", SECRET, peers.SILENT) for _ in range(count - active)]
    among = echoes(proxy, proxy.port, "tls", active, rounds)
    close_all(idle)
    time.sleep(0.5)
    return {"us": 1e6 * among, "ratio": among / alone}


def scaling(rig: Rig, scales: tuple[int, ...], trips: int, kept: Kept, rounds: int = 3) -> dict[str, list[float]]:
    """Cost per byte and per event against the number of sessions, of the proxy and of bare loops at the same number, interleaved."""
    def measure(count: int) -> dict[str, float]:
        proxy, each = rig.proxy(BACKENDS[0]), max(3, trips // count)
        return medians([{"s_per_gb": parallel(rig, proxy, proxy.port, "tls", count),
                         "bare_s_per_gb": parallel(rig, rig.loops, rig.ports["many"], "bare", count),
                         "us_per_trip": 1e6 * echoes(proxy, proxy.port, "tls", count, each),
                         "bare_us_per_trip": 1e6 * echoes(rig.loops, rig.ports["echo"], "bare", count, each)} for _ in range(rounds)])

    rows = {count: kept.part(f"{count} sessions", functools.partial(measure, count)) for count in scales}
    for count, row in rows.items():
        print(f"  {count:>5} sessions: " + ", ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    return {"sessions": [float(count) for count in rows], **{name: [row[name] for row in rows.values()] for name in rows[scales[0]]}}


def pure_python_speed() -> float:
    """MB/s of the pure-Python AES-CTR on 1 MiB."""
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); import telemt; c = telemt.pick_backend('python').ctr(bytes(32), bytes(16));"
            "c.update(bytes(65536)); t = time.perf_counter(); c.update(bytes(1 << 20)); print((1 << 20) / 1e6 / (time.perf_counter() - t))")
    return float(subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True).stdout)


def compile_ms() -> float:
    """Milliseconds to compile telemt.py, as every start on a router does."""
    code = ("import sys, time; s = open(sys.argv[1]).read(); t = time.perf_counter(); compile(s, 'telemt.py', 'exec');"
            "print(1e3 * (time.perf_counter() - t))")
    return float(subprocess.run([sys.executable, "-c", code, str(ROOT / "telemt.py")], capture_output=True, text=True, check=True).stdout)


# -- a run


def compare_one(rig: Rig, job: Job, rounds: int) -> dict[str, Any]:
    """A row with a reference, interleaved: {unit, target, reference, bare, BACKEND: {cost, ratio}}."""
    costs: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    bare: list[float] = []
    for number in range(rounds + 1):               # the first round only warms up
        row = {backend: job.cost(rig, rig.proxy(backend, fast=job.fast)) for backend in BACKENDS}
        reference = job.bare(rig)
        if number:
            bare.append(reference)
            for backend, cost in row.items():
                costs[backend].append(cost)
    found: dict[str, Any] = {"unit": job.unit, "target": job.target, "reference": job.reference, "bare": median(bare)}
    for backend in BACKENDS:
        found[backend] = {"cost": median(costs[backend]), "ratio": median(bench_report.ratios(costs[backend], bare))}
    return found


def compare(rig: Rig, todo: list[Job], rounds: int, kept: Kept | None = None) -> dict[str, Any]:
    """The rows of `todo` by name."""
    kept = kept or Kept("bench", use=False)
    found = {}
    for job in todo:
        found[job.name] = kept.part(job.name, functools.partial(compare_one, rig, job, rounds))
        print("  " + bench_report.one_line(job.name, found[job.name], BACKENDS), flush=True)
    return found


def figures_of(rig: Rig, backend: str, quick: bool, rounds: int, kept: Kept) -> dict[str, Any]:
    """What one backend does where there is no bare loop."""
    def part(name: str, make: Callable[[], Any]) -> Any:
        return kept.part(f"{backend} {name}", make)

    row: dict[str, Any] = {"parallel": part("parallel", lambda: medians([parallel_costs(rig, rig.proxy(backend)) for _ in range(rounds)]))}
    row |= part("users", lambda: user_costs(rig, backend, 60 if quick else 150))
    row |= part("idle", lambda: idle_costs(rig, backend, 500 if quick else 2000))
    row["ten_thousand"] = part("ten thousand", lambda: idle_costs(rig, backend, 1000 if quick else most_sessions()))
    row["fairness"] = part("fairness", lambda: fairness(rig, backend, 100 if quick else 1000))
    row["slow_client"] = part("slow client", lambda: slow_clients(rig.proxy(backend), 5 if quick else 20, 3 if quick else 15))
    row["sparse"] = part("sparse", lambda: sparse(rig.proxy(backend), 1000 if quick else 2000, 100 if quick else 300))
    print(f"  {backend}: " + json.dumps(row, default=float), flush=True)
    return row


def figures(rig: Rig, quick: bool, rounds: int, kept: Kept) -> dict[str, Any]:
    """Everything without a bare loop, per backend."""
    return {"compile_ms": compile_ms(), "pure_python_mb_per_s": pure_python_speed(),
            **{backend: figures_of(rig, backend, quick, rounds, kept) for backend in BACKENDS}}


def machine(rig: Rig) -> dict[str, str]:
    """Where the figures come from."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    versions = {"cryptography": "", "openssl": ""}
    code = "import cryptography, ssl; print(cryptography.__version__); print(ssl.OPENSSL_VERSION)"
    versions["cryptography"], versions["openssl"] = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                                                   check=True).stdout.splitlines()
    return {"processor": f"{model}, {os.cpu_count()} cores", "kernel": f"{platform.system()} {platform.release()}",
            "python": platform.python_version(), **versions, "telemt.py": rig.proxy(BACKENDS[0]).banner.rpartition(": ")[2]}


def profile(rig: Rig) -> None:
    """Write a flame graph of the FakeTLS download."""
    proxy = rig.proxy(BACKENDS[0])
    target = ROOT / "docs" / "images" / "flame.svg"
    target.parent.mkdir(parents=True, exist_ok=True)
    spy = subprocess.Popen([str(Path(sys.executable).parent / "py-spy"), "record", "--native", "--rate", "500", "--duration", "8",
                            "--output", str(target), "--pid", str(proxy.process.pid)])
    while spy.poll() is None:
        download(rig, proxy, proxy.port, "tls")
    print(f"flame graph: {target.relative_to(ROOT)}")


def main() -> int:
    """Run what the arguments ask for; 1 when --check finds a ratio that got worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--only", default="", help="rows whose name holds this word")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    if options.write and (options.only or options.quick):
        parser.error("--write wants a whole run: neither --only nor --quick")
    raise_fds()
    rounds = options.rounds or (3 if options.quick else 7)
    rig = Rig((96 if options.quick else 512) * MIB)
    try:
        if options.profile:
            profile(rig)
            return 0
        todo = [job for job in jobs(options.quick) if options.only.lower() in job.name.lower()]
        if options.check:
            return bench_report.check(lambda: compare(rig, [job for job in todo if job.target], rounds), ROOT / "docs" / "performance.json",
                                      BACKENDS)
        kept = Kept("bench", use=options.write)
        found: dict[str, Any] = {"rows": compare(rig, todo, rounds, kept)}
        if not options.only:
            found |= {"figures": figures(rig, options.quick, rounds, kept), "machine": machine(rig), "rounds": rounds}
            found["scaling"] = scaling(rig, SCALES[:4] if options.quick else SCALES, 1000 if options.quick else 3000, kept,
                                       1 if options.quick else 3)
        if options.write:
            bench_report.write(found, ROOT / "docs", BACKENDS)
    finally:
        rig.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
