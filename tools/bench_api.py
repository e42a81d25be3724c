"""What those who watch cost the sessions: relay throughput with and without a panel, two status pages and `top`.

usage: bench_api.py [--rounds N] [--seconds S] [--write]

One FakeTLS download at full speed through a proxy with 1,000 users, in four ways that take turns, so that whatever else the machine does
hits all of them:

    quiet       nobody asks
    panel       another process asks for stats/zero/all 50 times and for the list of users once a second
    elsewhere   the same, but of another proxy: what the panel takes from the processors, and not from ours
    watchers    two open status pages (the requests of each page, in its rhythm) and `telemt.py top`

The ratios are those of one round; the figures are medians.  --write puts them into docs/performance.md.
"""
from __future__ import annotations

import argparse
import contextlib
import operator
import os
import pty
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import bench_peers as peers
import bench_report
from bench import MIB, ROOT, SECRET, TOOLS, Worker
from bench_peers import connect, read_exactly

TARGET = 0.97
ZERO_PER_S, USERS = 50, 1000


class ApiProxy(Worker):
    """telemt.py with many users and the API."""

    def __init__(self, folder: Path, dc_port: int) -> None:
        path, log = folder / "config.toml", folder / "log"
        fillers = "\n".join(f'filler{n} = "{n + 2:032x}"' for n in range(USERS - 1))
        path.write_text(f"""
[general]
use_middle_proxy = false
[general.links]
show = []
[server]
port = 0
[server.api]
enabled = true
listen = "127.0.0.1:{free_port()}"
[[server.listeners]]
ip = "127.0.0.1"
[censorship]
mask = false
tls_emulation = false
[dc_overrides]
"{peers.SOURCE}" = "127.0.0.1:{dc_port}"
[access.users]
bench = "{SECRET.hex()}"
{fillers}
""")
        with log.open("w") as output:
            super().__init__([sys.executable, str(ROOT / "telemt.py"), str(path)], None, output)
        self.port, self.api_port, self.config = 0, 0, path
        deadline = time.perf_counter() + 20
        while not (self.port and self.api_port) and time.perf_counter() < deadline:
            time.sleep(0.01)
            for line in log.read_text().splitlines():
                if "Listening on " in line:
                    self.port = int(line.rpartition(":")[2])
                if "API endpoint: " in line:
                    self.api_port = int(line.rpartition("/v1")[0].rpartition(":")[2])
        assert self.port and self.api_port, "the proxy did not start"


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def ask(sock: socket.socket, path: str) -> None:
    """One request over a kept connection; the answer is read and dropped."""
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    head = b""
    while b"\r\n\r\n" not in head:
        head += sock.recv(65536)
    block, _, body = head.partition(b"\r\n\r\n")
    assert block.startswith(b"HTTP/1.1 200"), block
    left = int(block.partition(b"Content-Length: ")[2].split()[0]) - len(body)
    while left > 0:
        left -= len(sock.recv(min(left, 1 << 20)))


def poll(port: int) -> None:
    """Be the panel, until somebody ends this process."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begin, count = time.perf_counter(), 0
        while True:
            if count % 900 == 899:                 # a connection serves 1,000 requests
                return poll(port)
            ask(sock, "/v1/stats/zero/all")
            if count % ZERO_PER_S == 0:
                ask(sock, "/v1/users")
            count += 1
            time.sleep(max(0.0, begin + count / ZERO_PER_S - time.perf_counter()))


PAGE: dict[str, float] = {            # what the page asks for, and how often (seconds); above 300 users the list comes every 15
    "/stats/zero/all": 5, "/users": 15, "/runtime/gates": 5, "/health": 15, "/health/ready": 15, "/stats/minimal/all": 15,
    "/stats/upstreams": 15, "/runtime/connections/summary": 15, "/system/info": 1e9, "/security/posture": 1e9}


def watch(port: int) -> None:
    """Be an open status page, until somebody ends this process."""
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        due = dict.fromkeys(PAGE, time.perf_counter())
        while True:
            path, at = min(due.items(), key=operator.itemgetter(1))
            time.sleep(max(0.0, at - time.perf_counter()))
            ask(sock, "/v1" + path)
            due[path] += PAGE[path]


def run_top(config: Path) -> None:
    """`telemt.py top` on a terminal of its own, whose screen is read and dropped."""
    pid, screen = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, str(ROOT / "telemt.py"), "top", str(config)])
    signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGINT))
    with contextlib.suppress(OSError):          # EIO: it has ended
        while os.read(screen, 65_536):
            pass
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


VISITORS: dict[str, tuple[str, ...]] = {"quiet": (), "panel": ("--poll",), "elsewhere": ("--poll-other",),
                                        "watchers": ("--watch", "--watch", "--top")}


class Run(NamedTuple):
    """One timed stretch of a download."""

    mb_per_s: float
    cpu_s_per_gb: float


def stretch(proxy: ApiProxy, seconds: float, scrap: bytearray) -> Run:
    """Download for about `seconds`; handshake and the first burst do not count."""
    with connect(proxy.port, "tls", SECRET, peers.SOURCE) as sock:
        read_exactly(sock, 8 * MIB)
        size, begin, cpu = 0, time.perf_counter(), proxy.cpu_s()
        while time.perf_counter() < begin + seconds:
            got = sock.recv_into(scrap)
            if not got:
                break
            size += got
        took = time.perf_counter() - begin
        return Run(size / took / 1e6, (proxy.cpu_s() - cpu) / size * 1e9)


def begin(visitors: tuple[str, ...], proxy: ApiProxy, other: ApiProxy) -> list[subprocess.Popen[bytes]]:
    """Start those who watch."""
    words = {"--poll": ["--poll", str(proxy.api_port)], "--poll-other": ["--poll", str(other.api_port)],
             "--watch": ["--watch", str(proxy.api_port)], "--top": ["--top", str(proxy.config)]}
    return [subprocess.Popen([sys.executable, __file__, *words[visitor]]) for visitor in visitors]


def end(running: list[subprocess.Popen[bytes]]) -> None:
    """And end them; whoever ended by himself was not watching."""
    for process in running:
        assert process.poll() is None, f"{process.args!r} ended"
        process.terminate()
        process.wait(20)


def measure(rounds: int, seconds: float) -> dict[str, list[Run]]:
    """Runs of every way, in the order of the rounds."""
    scrap, found = bytearray(MIB), {name: list[Run]() for name in VISITORS}
    bulk = int(seconds * 8000) * MIB // 2          # more than a download can use up
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as elsewhere:
        dc = Worker([sys.executable, str(TOOLS / "bench_peers.py"), "dc", str(bulk)])
        dc_port = int(dc.line())
        proxy, other = ApiProxy(Path(folder), dc_port), ApiProxy(Path(elsewhere), dc_port)
        try:
            stretch(proxy, seconds / 2, scrap)
            order = list(VISITORS)
            for _ in range(rounds):
                for name in order:
                    running = begin(VISITORS[name], proxy, other)
                    time.sleep(0.7 if running else 0.1)        # interpreters start, the first answers are read
                    found[name].append(stretch(proxy, seconds, scrap))
                    end(running)
                order.append(order.pop(0))
        finally:
            for worker in (proxy, other, dc):
                worker.stop()
    return found


def middle(runs: list[Run]) -> Run:
    """Median of each figure."""
    return Run(median(run.mb_per_s for run in runs), median(run.cpu_s_per_gb for run in runs))


def ratio(runs: list[Run], quiet: list[Run]) -> float:
    """Median of the throughput of each round as a part of the quiet one's."""
    return median(mine.mb_per_s / theirs.mb_per_s for mine, theirs in zip(runs, quiet, strict=True))


ROWS = (("panel", "a panel: 50 polls and one list a second", TARGET), ("elsewhere", "the same panel at another process (control)", 0.0),
        ("watchers", "two open status pages and one `top`", TARGET))


def report(found: dict[str, list[Run]]) -> str:
    """Markdown of a measurement."""
    quiet = middle(found["quiet"])
    lines = ["| who watches, 1,000 users | target | download | ratio | CPU of the proxy, API included | ratio |",
             "|---|---|---|---|---|---|",
             f"| nobody | - | {quiet.mb_per_s:.0f} MB/s | 1 | {quiet.cpu_s_per_gb:.3f} s/GB | 1 |"]
    for name, label, target in ROWS:
        mine, part = middle(found[name]), ratio(found[name], found["quiet"])
        shown = f"{part:.3f}" if part >= target else f"**{part:.3f} (missed)**"
        goal = f">= {target}" if target else "-"
        lines.append(f"| {label} | {goal} | {mine.mb_per_s:.0f} MB/s | {shown} | {mine.cpu_s_per_gb:.3f} s/GB | "
                     f"{mine.cpu_s_per_gb / quiet.cpu_s_per_gb:.3f} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print; the exit code tells whether a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--poll", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--watch", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--top", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.poll:
        poll(options.poll)
    elif options.watch:
        watch(options.watch)
    elif options.top:
        run_top(options.top)
    found = measure(options.rounds, options.seconds)
    text = report(found)
    print(text)
    if options.write:
        page = ROOT / "docs" / "performance.md"
        page.write_text(bench_report.between(page.read_text(encoding="utf-8"), "polling", text), encoding="utf-8")
    return bench_report.MISSED if any(ratio(found[name], found["quiet"]) < target for name, _, target in ROWS) else 0


if __name__ == "__main__":
    sys.exit(main())
