#!/usr/bin/env python3
"""What strangers feel and what they cost: the time that masking adds, masked bulk, thousands of slow connections.

usage: bench_strangers.py [--quick] [--write] [--check] [--loris N] [--seconds S]

  hello    a ClientHello that no secret fits: time to the first byte of the answer, through the proxy and from the mask host itself,
           in turns.  The mask host is nginx where it is installed, else a double that answers at once.
  bulk     a download through a masked connection: CPU seconds of the proxy per GB, beside splice(2) alone
  loris    N connections that stop in every phase of a handshake and drip bytes, for S seconds: what a good handshake takes
           meanwhile, and what the memory of a fresh proxy is before, during and after, with either crypto library

--write puts the table into docs/performance.md; --check exits 1 where a limit is missed.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import bench_peers as peers
import bench_report
from bench import BACKENDS, SECRET, Worker, raise_fds

ROOT = Path(__file__).resolve().parent.parent
STRANGE = bytes(range(100, 116))                # a secret that nobody has
SOURCES = 20                                    # loopback addresses that the slow ones come from
HELLO_LIMIT_MS = 1.0
LORIS_LIMIT_MS = 50.0
MEMORY_LIMIT = 1.05
PHASES = ("nothing", "three bytes", "half a hello", "a hello, then nothing", "masked, then nothing")


# -- the mask host

class Site(Worker):
    """A mask host as a process of its own: nginx, or ourselves."""

    def __init__(self, folder: Path) -> None:
        nginx = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
        self.name = "nginx" if nginx and shutil.which("openssl") else "a double"
        if self.name == "nginx":
            assert nginx is not None
            with socket.create_server(("127.0.0.1", 0)) as free:
                self.port = free.getsockname()[1]
            subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "9", "-subj", "/CN=front.example",
                            "-keyout", "key", "-out", "crt"], cwd=folder, check=True, capture_output=True)
            (folder / "nginx.conf").write_text(
                "daemon off; master_process off; pid pid; error_log error.log; worker_rlimit_nofile 20000;\n"
                "events { worker_connections 15000; } http { access_log off; client_header_timeout 600s; ssl_session_tickets off;\n"
                "  client_body_temp_path t; proxy_temp_path t; fastcgi_temp_path t; uwsgi_temp_path t; scgi_temp_path t;\n"
                f"  ssl_certificate crt; ssl_certificate_key key; server {{ listen 127.0.0.1:{self.port} ssl backlog=8192; }} }}\n")
            super().__init__([nginx, "-p", str(folder), "-c", "nginx.conf", "-e", "error.log"], output=subprocess.DEVNULL)
        else:
            super().__init__([sys.executable, __file__, "--site"])
            self.port = int(self.line())
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)
        raise RuntimeError("the mask host does not start")


def serve(bulk: int = 0) -> None:
    """The double: answers the first bytes with 1,500 bytes, or with `bulk`, and keeps the connection."""
    selector = selectors.DefaultSelector()
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(listener.getsockname()[1], flush=True)
    chunk = bytes(1 << 20)

    def pour(sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            sock.settimeout(60)
            for _ in range(bulk >> 20):
                sock.sendall(chunk)

    def answer(sock: socket.socket) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = sock.recv(65_536)
        if not data or bulk:
            selector.unregister(sock)
        if not data:
            sock.close()
        elif bulk:
            threading.Thread(target=pour, args=(sock,), daemon=True).start()
        else:
            sock.sendall(chunk[:1500])

    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                selector.register(listener.accept()[0], selectors.EVENT_READ)
            else:
                assert isinstance(key.fileobj, socket.socket)
                answer(key.fileobj)


class Proxy(Worker):
    """telemt.py in front of a mask host."""

    def __init__(self, folder: Path, dc_port: int, mask_port: int, backend: str = BACKENDS[0]) -> None:
        path, log = folder / f"{mask_port}-{backend}.toml", folder / f"{mask_port}-{backend}.log"
        dcs = "\n".join(f'"{n}" = "127.0.0.1:{dc_port}"' for n in range(peers.SOURCE, peers.SILENT + 1))
        path.write_text(f"""[general]
use_middle_proxy = false
beobachten_file = "{folder}/seen.txt"
[general.links]
show = []
[network]
ipv6 = false
stun_use = false
[server]
port = 0
[[server.listeners]]
ip = "127.0.0.1"
[censorship]
tls_domain = "front.example"
mask_host = "127.0.0.1"
mask_port = {mask_port}
tls_emulation = false
[dc_overrides]
{dcs}
[access.users]
bench = "{SECRET.hex()}"
""")
        with log.open("w") as output:
            super().__init__([sys.executable, str(ROOT / "telemt.py"), str(path)], {"TELEMT_CRYPTO": backend}, output)
        self.port = 0
        end = time.monotonic() + 10
        while not self.port and time.monotonic() < end:
            time.sleep(0.01)
            self.port = next((int(line.rpartition(":")[2]) for line in log.read_text().splitlines() if "Listening on " in line), 0)
        assert self.port, log.read_text()


# -- hello

def browser_hello() -> bytes:
    """A ClientHello that a real server answers with its whole flight; long enough that we look at its digest."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1", "x" * 250])
    written = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), written, server_hostname="front.example").do_handshake()
    hello = written.read()
    assert len(hello) > 517
    return hello


def first_byte(port: int) -> float:
    """Seconds from a stranger's ClientHello to the first byte of the answer."""
    hello = browser_hello()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        time.sleep(0.001)                       # accepted, and everybody asleep again
        begin = time.perf_counter()
        sock.sendall(hello)
        assert sock.recv(1), "no answer"
        return time.perf_counter() - begin


class Hello(NamedTuple):
    """Milliseconds to the first byte: medians, the median difference of a pair, and the 99th percentiles."""

    direct: float
    through: float
    added: float
    direct_p99: float
    through_p99: float


def measure_hello(direct: int, through: int, count: int) -> Hello:
    """Pairs in turns, so that whatever else the machine does hits both."""
    pairs = [(1e3 * first_byte(direct), 1e3 * first_byte(through)) for _ in range(count)]
    columns = [sorted(column) for column in zip(*pairs, strict=True)]
    p99 = [column[int(len(column) * 0.99)] for column in columns]
    return Hello(median(columns[0]), median(columns[1]), median(b - a for a, b in pairs), p99[0], p99[1])


# -- bulk

def measure_bulk(folder: Path, dc_port: int, size: int) -> dict[str, float]:
    """CPU seconds per GB of the proxy for a masked download."""
    site = Worker([sys.executable, __file__, "--site", "--bulk", str(size)])
    proxy = Proxy(folder, dc_port, int(site.line()))
    scrap = bytearray(1 << 20)

    def download() -> float:
        with socket.create_connection(("127.0.0.1", proxy.port)) as sock:
            sock.sendall(peers.client_hello(STRANGE))
            return peers.discard(sock, scrap) / 1e9

    try:
        download()
        before, begin = proxy.cpu_s(), time.perf_counter()
        moved = sum(download() for _ in range(3))
        return {"s_per_gb": (proxy.cpu_s() - before) / moved, "gb_per_s": moved / (time.perf_counter() - begin)}
    finally:
        proxy.stop()
        site.stop()


# -- loris

class Loris(NamedTuple):
    """Milliseconds of a good handshake alone and meanwhile, and MB of the proxy before, at the peak, and after."""

    alone: float
    among: float
    among_p99: float
    before: float
    during: float
    after: float


def storms(proxy: Proxy, count: int, seconds: float) -> tuple[Loris, Loris]:
    """Two storms over a fresh process that has served one client and one stranger, a long one and a short one.

    What those two load and fill belongs to the process: every proxy in use has it.
    """
    first_byte(proxy.port)
    shake(proxy.port)
    time.sleep(0.3)
    return measure_loris(proxy, count, seconds), measure_loris(proxy, count, min(seconds, 10.0))


def shake(port: int) -> float:
    """Milliseconds of a FakeTLS handshake, connecting included, up to the answer of the data centre."""
    begin = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peers.shake_hands(sock, SECRET)
        sock.sendall(peers.record(peers.preamble(SECRET, peers.HELLO)))
        peers.read_exactly(sock, 32)
    return 1e3 * (time.perf_counter() - begin)


def open_slow(port: int, n: int) -> socket.socket:
    """The n-th slow connection: it stops in one of the phases."""
    sock = socket.socket()
    sock.bind((f"127.0.1.{1 + n % SOURCES}", 0))
    sock.settimeout(10)
    sock.connect(("127.0.0.1", port))
    secret = SECRET if PHASES[n % 5] == "a hello, then nothing" else STRANGE
    sock.sendall(peers.client_hello(secret)[:(0, 3, 250, 517, 517)[n % 5]])
    sock.setblocking(False)
    return sock


def gone(sock: socket.socket) -> bool:
    """True if the proxy has closed it."""
    try:
        while data := sock.recv(65_536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return not data


def drip(slow: list[socket.socket], port: int, offset: int) -> None:
    """One more byte from every tenth of those who have begun; who was closed comes again."""
    for n in range(offset % 10, len(slow), 10):
        if gone(slow[n]):
            slow[n].close()
            slow[n] = open_slow(port, n)
        elif n % 5 in (1, 2):
            with contextlib.suppress(OSError):
                slow[n].send(b"\x03")


def measure_loris(proxy: Proxy, count: int, seconds: float) -> Loris:
    """`count` slow connections for `seconds`, again and again where the proxy closed them."""
    before = proxy.status("VmRSS") / 1024
    alone = [shake(proxy.port) for _ in range(100)]
    slow = [open_slow(proxy.port, n) for n in range(count)]
    among, during, turn = [], 0.0, 0
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            drip(slow, proxy.port, turn)
            turn += 1
            for _ in range(5):
                among.append(shake(proxy.port))
                time.sleep(0.02)
            during = max(during, proxy.status("VmRSS") / 1024)
    finally:
        for sock in slow:
            sock.close()
    limit = time.monotonic() + 20
    while len(list((proxy.proc / "fd").iterdir())) > 60 and time.monotonic() < limit:
        time.sleep(0.05)
    time.sleep(5.0)                             # the proxy tidies up two seconds after a crowd
    return Loris(median(alone), median(among), sorted(among)[int(len(among) * 0.99)], before, during, proxy.status("VmRSS") / 1024)


# -- report

def report(site: str, hello: Hello, bulk: dict[str, float], found: dict[str, tuple[Loris, Loris]], count: int, seconds: float) -> str:
    """The table of docs/performance.md."""
    def judged(text: str, good: bool) -> str:
        return text if good else f"**{text} (missed)**"

    loris, _ = found[BACKENDS[0]]
    rows = [
        ("unauthenticated ClientHello, time to the first byte: added by the proxy (median)", f"<= {HELLO_LIMIT_MS:g} ms",
         judged(f"{hello.added:.2f} ms", hello.added <= HELLO_LIMIT_MS)),
        (f"the same from {site} directly / through the proxy (median)", "-", f"{hello.direct:.2f} / {hello.through:.2f} ms"),
        ("the same, 99th percentile", "-", f"{hello.direct_p99:.2f} / {hello.through_p99:.2f} ms"),
        ("masked download, CPU of the proxy", "-", f"{bulk['s_per_gb']:.3f} s/GB ({bulk['gb_per_s']:.2f} GB/s)"),
        (f"FakeTLS handshake beside {count:,} slow connections for {seconds:g} s (median)", f"<= {LORIS_LIMIT_MS:g} ms",
         judged(f"{loris.among:.2f} ms", loris.among <= LORIS_LIMIT_MS)),
        ("the same alone / 99th percentile beside them", "-", f"{loris.alone:.2f} / {loris.among_p99:.2f} ms"),
    ]
    for backend, (first, second) in found.items():
        ratio = first.after / first.before
        rows += [
            (f"memory of a fresh process (after one handshake, one masked connection) / with them / when they have left, {backend}",
             f"after <= {MEMORY_LIMIT:g}x before",
             judged(f"{first.before:.1f} / {first.during:.1f} / {first.after:.1f} MB: {ratio:.3f}x", ratio <= MEMORY_LIMIT)),
            (f"the same when as many more have come and left, {backend}", "-",
             f"{second.after:.1f} MB: {second.after / first.before:.3f}x")]
    return "\n".join(["| what | target | measured |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> int:
    """Measure, print, perhaps write; the exit code is that of --check."""
    parser = argparse.ArgumentParser(description="What strangers feel and what they cost.")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    parser.add_argument("--check", action="store_true", help="exit 1 where a limit is missed")
    parser.add_argument("--loris", type=int, default=5000, help="slow connections (default 5000)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long they stay (default 60)")
    parser.add_argument("--site", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bulk", type=int, default=0, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.site:
        serve(words.bulk)
        return 0
    raise_fds()
    count, seconds = (words.loris // 10, min(words.seconds, 6.0)) if words.quick else (words.loris, words.seconds)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        dc = Worker([sys.executable, str(ROOT / "tools" / "bench_peers.py"), "dc", str(1 << 20)])
        stack.callback(dc.stop)
        site = Site(folder)
        stack.callback(site.stop)
        dc_port = int(dc.line())
        proxy = Proxy(folder, dc_port, site.port)
        stack.callback(proxy.stop)
        first_byte(proxy.port)
        hello = measure_hello(site.port, proxy.port, 100 if words.quick else 1000)
        bulk = measure_bulk(folder, dc_port, (128 if words.quick else 1024) << 20)
        proxy.stop()
        found = {}
        for backend in BACKENDS:
            proxy = Proxy(folder, dc_port, site.port, backend)
            stack.callback(proxy.stop)
            found[backend] = storms(proxy, count, seconds)
            proxy.stop()
        text = report(site.name, hello, bulk, found, count, seconds)
        print(text)
        if words.write:
            page = ROOT / "docs" / "performance.md"
            page.write_text(bench_report.between(page.read_text(encoding="utf-8"), "strangers", text), encoding="utf-8")
        return int(words.check and "(missed)" in text)


if __name__ == "__main__":
    sys.exit(main())
