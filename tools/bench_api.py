"""What a panel that polls costs the sessions: relay throughput with and without it.

usage: bench_api.py [--rounds N] [--seconds S] [--write]

One FakeTLS download at full speed through a proxy with 1,000 users, while another process asks for stats/zero/all 50 times and for the
list of users once a second.  Runs with and without polling alternate, so that whatever else the machine does hits both; the figures
are medians.  --write puts them into docs/performance.md.
"""
from __future__ import annotations

import argparse
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
        self.port = self.api_port = 0
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


def measure(rounds: int, seconds: float) -> tuple[Run, Run, list[float]]:
    """(median run without, with polling, throughput ratio of each round)."""
    scrap, quiet, polled = bytearray(MIB), list[Run](), list[Run]()
    bulk = int(seconds * 8000) * MIB // 2          # more than a download can use up
    with tempfile.TemporaryDirectory() as folder:
        dc = Worker([sys.executable, str(TOOLS / "bench_peers.py"), "dc", str(bulk)])
        proxy = ApiProxy(Path(folder), int(dc.line()))
        try:
            stretch(proxy, seconds / 2, scrap)
            for number in range(rounds):
                for polling in (number % 2 == 0, number % 2 == 1):
                    panel = subprocess.Popen([sys.executable, __file__, "--poll", str(proxy.api_port)]) if polling else None
                    time.sleep(0.2)
                    (polled if polling else quiet).append(stretch(proxy, seconds, scrap))
                    if panel is not None:
                        assert panel.poll() is None, "the panel ended"
                        panel.terminate()
                        panel.wait()
        finally:
            proxy.stop()
            dc.stop()
    ratios = [with_it.mb_per_s / without.mb_per_s for with_it, without in zip(polled, quiet, strict=True)]
    return middle(quiet), middle(polled), ratios


def middle(runs: list[Run]) -> Run:
    """Median of each figure."""
    return Run(median(run.mb_per_s for run in runs), median(run.cpu_s_per_gb for run in runs))


def report(quiet: Run, polled: Run, ratios: list[float]) -> str:
    """Markdown of a measurement."""
    ratio = median(ratios)
    shown = f"{ratio:.3f}" if ratio >= TARGET else f"**{ratio:.3f} (missed)**"
    return (f"| figure | target | without | with polling | ratio |\n|---|---|---|---|---|\n"
            f"| FakeTLS download, 1 session, 1,000 users | >= {TARGET} | {quiet.mb_per_s:.0f} MB/s | {polled.mb_per_s:.0f} MB/s | "
            f"{shown} |\n"
            f"| CPU of the proxy, API threads included | - | {quiet.cpu_s_per_gb:.3f} s/GB | {polled.cpu_s_per_gb:.3f} s/GB | "
            f"{polled.cpu_s_per_gb / quiet.cpu_s_per_gb:.3f} |")


def main() -> int:
    """Measure and print; 1 when the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--poll", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.poll:
        poll(options.poll)
        return 0
    quiet, polled, ratios = measure(options.rounds, options.seconds)
    text = report(quiet, polled, ratios)
    print(text)
    if options.write:
        page = ROOT / "docs" / "performance.md"
        page.write_text(bench_report.between(page.read_text(encoding="utf-8"), "polling", text), encoding="utf-8")
    return int(median(ratios) < TARGET)


if __name__ == "__main__":
    sys.exit(main())
