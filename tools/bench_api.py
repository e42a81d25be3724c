"""What those who watch cost the sessions: relay throughput with and without a panel, two status pages and `top`.

usage: bench_api.py [--rounds N] [--seconds S] [--write]

One FakeTLS download at full speed through a proxy with 1,000 users, in five ways that take turns, in another order every round, so that
whatever else the machine does hits all of them:

    quiet       nobody asks
    again       nobody asks once more: how far two equal runs are apart
    panel       another process (bench_panel.py) asks for stats/zero/all 50 times and for the list of users once a second
    elsewhere   the same, but of another proxy: what the panel takes from the processors, and not from ours
    watchers    two open status pages (the requests of each page, in its rhythm) and `telemt.py top`

A ratio is that of two runs of one round; shown are the median of the rounds and its quartiles.  --write puts them into
docs/performance.md.
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
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import bench_panel
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


PAGE: dict[str, float] = {            # what the page asks for, and how often (seconds); above 300 users the list comes every 15
    "/stats/zero/all": 5, "/users": 15, "/runtime/gates": 5, "/health": 15, "/health/ready": 15, "/stats/minimal/all": 15,
    "/stats/upstreams": 15, "/runtime/connections/summary": 15, "/system/info": 1e9, "/security/posture": 1e9}


def watch(port: int) -> None:
    """Be an open status page, until somebody ends this process."""
    scrap = bytearray(MIB)
    requests = {path: b"GET /v1%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode() for path in PAGE}
    with bench_panel.connect(port) as sock:
        due = dict.fromkeys(PAGE, time.perf_counter())
        while True:
            path, at = min(due.items(), key=operator.itemgetter(1))
            time.sleep(max(0.0, at - time.perf_counter()))
            bench_panel.ask(sock, requests[path], scrap)
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


VISITORS: dict[str, tuple[str, ...]] = {"quiet": (), "again": (), "panel": ("panel",), "elsewhere": ("other",),
                                        "watchers": ("page", "page", "top")}


class Run(NamedTuple):
    """One timed stretch of a download."""

    mb_per_s: float
    loop_s_per_gb: float           # CPU of the proxy's loop
    api_ms_per_s: float            # of its other threads
    own_ms_per_s: float            # of those who watch


def cpu_s(pid: int) -> tuple[float, float]:
    """CPU seconds of a process: of its first thread, of the others that live (nanosecond resolution)."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
    first = found.pop(pid)
    return first, sum(found.values())


def stretch(proxy: ApiProxy, seconds: float, scrap: bytearray, watching: Sequence[int] = ()) -> Run:
    """Download for about `seconds`; handshake and the first burst do not count.  watching: processes whose CPU is counted too."""
    with connect(proxy.port, "tls", SECRET, peers.SOURCE) as sock:
        read_exactly(sock, 8 * MIB)
        pids = (proxy.process.pid, *watching)
        size, begin, before = 0, time.perf_counter(), [cpu_s(pid) for pid in pids]
        while time.perf_counter() < begin + seconds:
            got = sock.recv_into(scrap)
            if not got:
                break
            size += got
        took = time.perf_counter() - begin
        spent = [(first - first_then, rest - rest_then)
                 for (first, rest), (first_then, rest_then) in zip(map(cpu_s, pids), before, strict=True)]
        (loop, api), own = spent[0], sum(map(sum, spent[1:]))
        return Run(size / took / 1e6, loop / size * 1e9, api / took * 1e3, own / took * 1e3)


def begin(visitors: tuple[str, ...], proxy: ApiProxy, other: ApiProxy) -> list[subprocess.Popen[bytes]]:
    """Start those who watch."""
    panel = ["-I", "-S", str(TOOLS / "bench_panel.py")]
    words = {"panel": [*panel, str(proxy.api_port), str(ZERO_PER_S)], "other": [*panel, str(other.api_port), str(ZERO_PER_S)],
             "page": [__file__, "--watch", str(proxy.api_port)], "top": [__file__, "--top", str(proxy.config)]}
    return [subprocess.Popen([sys.executable, *words[visitor]]) for visitor in visitors]


def end(running: list[subprocess.Popen[bytes]]) -> None:
    """And end them; whoever ended by himself was not watching."""
    for process in running:
        assert process.poll() is None, f"{process.args!r} ended"
        process.terminate()
        process.wait(20)


def order_of(number: int) -> list[str]:
    """The ways in the order of a round (a Williams design): in ten rounds each has every place and every predecessor twice."""
    names = list(VISITORS)
    steps = [step // 2 + 1 if step % 2 else -(step // 2) for step in range(len(names))]       # 0, 1, -1, 2, -2
    order = [names[(number // 2 + step) % len(names)] for step in steps]
    return order[::-1] if number % 2 else order


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
            for number in range(rounds):
                for name in order_of(number):
                    running = begin(VISITORS[name], proxy, other)
                    time.sleep(0.7)                            # interpreters start, the first answers are read
                    found[name].append(stretch(proxy, seconds, scrap, [process.pid for process in running]))
                    end(running)
        finally:
            for worker in (proxy, other, dc):
                worker.stop()
    return found


def middle(runs: list[Run]) -> Run:
    """Median of each figure."""
    return Run(*(median(figures) for figures in zip(*runs, strict=True)))


def ratios(runs: list[Run], quiet: list[Run]) -> tuple[float, float, float]:
    """The throughput of each round as a part of the quiet one's: lower quartile, median, upper quartile."""
    found = [mine.mb_per_s / theirs.mb_per_s for mine, theirs in zip(runs, quiet, strict=True)]
    low, middle, high = quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return low, middle, high


ROWS = (("again", "nobody, once more (noise)", 0.0), ("panel", f"a panel: {ZERO_PER_S} polls and one list a second", TARGET),
        ("elsewhere", "the same panel at another process (control)", 0.0), ("watchers", "two open status pages and one `top`", TARGET))


def report(found: dict[str, list[Run]]) -> str:
    """Markdown of a measurement."""
    quiet = middle(found["quiet"])
    heads = ("who watches, 1,000 users", "target", "download", "ratio", "quartiles", "CPU of the loop", "ratio", "of the API's threads",
             "of who watches")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads),
             f"| nobody | - | {quiet.mb_per_s:.0f} MB/s | 1 | - | {quiet.loop_s_per_gb:.3f} s/GB | 1 | - | - |"]
    for name, label, target in ROWS:
        mine, (low, part, high) = middle(found[name]), ratios(found[name], found["quiet"])
        shown = f"{part:.3f}" if part >= target else f"**{part:.3f} (missed)**"
        goal = f">= {target}" if target else "-"
        api = f"{mine.api_ms_per_s:.1f} ms/s" if VISITORS[name] and name != "elsewhere" else "-"
        if name == "panel":
            api += f", {mine.api_ms_per_s / ZERO_PER_S:.2f} ms per poll"
        own = f"{mine.own_ms_per_s:.1f} ms/s" if VISITORS[name] else "-"
        lines.append(f"| {label} | {goal} | {mine.mb_per_s:.0f} MB/s | {shown} | {low:.3f}-{high:.3f} | {mine.loop_s_per_gb:.3f} s/GB | "
                     f"{mine.loop_s_per_gb / quiet.loop_s_per_gb:.3f} | {api} | {own} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print; the exit code tells whether a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--watch", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--top", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watch:
        watch(options.watch)
    elif options.top:
        run_top(options.top)
    found = measure(options.rounds, options.seconds)
    text = report(found)
    print(text)
    if options.write:
        page = ROOT / "docs" / "performance.md"
        page.write_text(bench_report.between(page.read_text(encoding="utf-8"), "polling", text), encoding="utf-8")
    return bench_report.MISSED if any(ratios(found[name], found["quiet"])[1] < target for name, _, target in ROWS) else 0


if __name__ == "__main__":
    sys.exit(main())
