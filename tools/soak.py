#!/usr/bin/env python3
"""soak - the whole program for minutes or hours in a crowd that misbehaves, while everything around it changes.

usage: soak.py [--minutes N | --hours N | --seconds N] [--seed S] [--only NAME] [--write] [--prove]

Three instances run side by side, each with API, metrics and masking: one straight to data centres, one through the middle end, and one
that is exchanged by SIGUSR2 again and again, which must not cost one session.
Clients of every kind and strangers of every kind come and go, half of them through a chaos relay (slices of one byte, delays,
resets, half-open connections); users are created, patched, disabled, rotated and deleted through the API; the file is edited,
broken and mended under SIGHUP; metrics and the status page are polled; a data centre and middle ends restart, corrupt and reset.

Now and then everybody comes to rest, and the process is measured: see tools/soak_judge.py for what must hold and why.
--prove runs short soaks of programs with a planted leak each and expects them to be found.
Results: a table, build/soak.json, with --write a section of docs/performance.md.  Exit 0 sound, 1 findings, 2 wrong use.
"""
from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_report

import soak_judge
from soak_crowd import PATIENCE_S, WEB_PAGE, Crowd, Relay, Tally, User, doubles
from soak_judge import MIB, Account, Sample

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "soak.json"
PAGE = ROOT / "docs" / "performance.md"

fake: Any = importlib.import_module("fake_middle_end")

USERS = [User("exact", os.urandom(16), exact=True), *(User(name, os.urandom(16)) for name in ("anna", "boris", "c-3"))]
NAMES = ("direct", "middle", "exchanged")
TENANTS = 4                              # sessions of the direct instance that must outlive everything
GENTLE_DCS = {1: True, 2: True, 3: True, 4: False, 5: False}     # 2 slices, 3 delays, 4 breaks, 5 restarts
READS = ("/v1/health", "/v1/stats/summary", "/v1/stats/zero/all", "/v1/users", "/v1/stats/upstreams", "/v1/stats/me-writers",
         "/v1/stats/dcs", "/v1/runtime/me_pool_state", "/v1/runtime/events/recent", "/v1/security/posture", "/v1/system/info")
LEAKS = {
    "descriptors": "keep.append(os.open('/dev/null', 0)) if not n[0] % 3 else None",
    "memory": "keep.append(bytes(range(256)) * 1200)",
    "threads": "threading.Thread(target=threading.Event().wait, daemon=True).start() if not n[0] % 5 else None",
    "counter": "server.counters.connections_total += not n[0] % 7",
}
LEAKY = """
import os, sys, threading
sys.path.insert(0, {root!r})
import telemt
keep, n, real = [], [0], telemt.Server._on_accept
def leaky(server, *rest):
    n[0] += 1
    {leak}
    return real(server, *rest)
telemt.Server._on_accept = leaky
sys.exit(telemt.main(sys.argv[1:]))
"""


# -- the world around one instance -------------------------------------------------------------------------------------------------

class Web:
    """The site that strangers see."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.listener.accept()[0],), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(PATIENCE_S)
            if sock.recv(65_536):
                sock.sendall(WEB_PAGE)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(65_536):
                    pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


class DirectWorld:
    """Data centres on loopback: 1 is sound, 2 to 4 lie behind relays, 5 restarts."""

    def __init__(self, tally: Tally, rng: random.Random) -> None:
        self.tally, self.rng = tally, rng
        self.dc, self.restarting = self.new(), self.new()
        self.relays = {index: Relay(self.dc.port, fate, tally, random.Random(rng.random()))
                       for index, fate in ((2, "slices"), (3, "delays"), (4, "resets"))}

    def new(self, port: int = 0) -> Any:
        return doubles.FakeDc(port=port, peer=doubles.FramedPeer)

    def config(self) -> dict[str, Any]:
        at = {1: self.dc.port, **{index: relay.port for index, relay in self.relays.items()}, 5: self.restarting.port}
        return {"dc_overrides": {str(sign * index): [f"127.0.0.1:{port}"] for index, port in at.items() for sign in (1, -1)}}

    def strike(self, crowd: Crowd, quick: bool) -> None:
        """The fifth data centre goes away and comes back."""
        with crowd.weather.storm("dc5"):
            self.restarting.close()
            time.sleep(self.rng.uniform(0.05, 0.3 if quick else 3))
            self.restarting = self.new(self.restarting.port)
        self.tally.add(dc_restarts=1)

    def tidy(self) -> None:
        """Forget the peers that are gone: the doubles remember for tests."""
        for dc in (self.dc, self.restarting):
            dc.peers.clear()
            while not dc._fresh.empty():
                dc._fresh.get()

    def links(self) -> int:
        return 0

    def faults(self) -> list[str]:
        return [*self.dc.faults, *self.restarting.faults]

    def close(self) -> None:
        for thing in (self.dc, self.restarting, *self.relays.values()):
            thing.close()


class MiddleWorld:
    """Middle ends for five data centres: 1 sound, 2 in slices, 3 coalescing, 4 breaks links, 5 restarts; behind them direct ones."""

    def __init__(self, tally: Tally, rng: random.Random) -> None:
        self.tally, self.rng = tally, rng
        self.behind = DirectWorld(tally, rng)
        self.world = fake.MeWorld(dict.fromkeys(GENTLE_DCS, 1), keep_messages=0)
        self.mes: dict[int, Any] = {dc: mes[0] for dc, mes in self.world.mes.items()}
        self.mes[2].split, self.mes[3].coalesce = (1, 1, 7, 40_000, 3), True

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = doubles.merged(self.behind.config(), self.world.config())
        return found

    def strike(self, crowd: Crowd, quick: bool) -> None:
        """One of: the fifth middle end restarts; the fourth loses its links, breaks a checksum or repeats a frame."""
        deed = self.rng.choice(("restart", "fin", "rst", "corrupt_crc", "wrong_seq", "truncate"))
        if deed == "restart":
            with crowd.weather.storm("dc5"):
                self.mes[5].down(self.rng.choice(("fin", "rst")))
                time.sleep(self.rng.uniform(0.05, 0.3 if quick else 5))
                self.mes[5].up()
        elif deed in ("fin", "rst"):
            self.mes[4].kill_links(deed)
        else:
            for link in self.mes[4].links()[:1]:
                setattr(self.mes[4], deed, link.wire.next_out + 1)
            time.sleep(0.5)
            setattr(self.mes[4], deed, None)
        self.tally.add(me_restarts=deed == "restart", link_faults=deed != "restart")

    def tidy(self) -> None:
        self.behind.tidy()
        for me in self.world:
            me.all_links[:] = [link for link in me.all_links if not link.closed.is_set()]
            while not me._fresh.empty():
                me._fresh.get()

    def links(self) -> int:
        """Connections of the proxy to middle ends."""
        return sum(not link.closed.is_set() for me in self.world for link in list(me.all_links))

    def faults(self) -> list[str]:
        return [*self.behind.faults(), *(fault for fault in self.world.faults)]

    def close(self) -> None:
        self.world.close()
        self.behind.close()


# -- one instance ------------------------------------------------------------------------------------------------------------------

class Instance:
    """One running program with its world and its crowd; the threads that change and watch it."""

    def __init__(self, name: str, folder: Path, seed: int, quick: bool, command: Sequence[str]) -> None:
        self.name, self.quick, self.rng = name, quick, random.Random(f"{seed}/{name}")
        self.tally, self.account = Tally(), Account(name)
        self.web = Web()
        self.world: Any = (MiddleWorld if name == "middle" else DirectWorld)(self.tally, random.Random(self.rng.random()))
        self.api = doubles.ApiScript(doubles.free_port())
        self.metrics_port = doubles.free_port()
        port = doubles.free_port()
        config = doubles.merged(doubles.base_config(port, f"127.0.0.1:{self.web.port}"), self.config())
        config["access"]["users"] = {user.name: user.secret.hex() for user in USERS}
        self.proxy = doubles.Proxy(folder / name, doubles.merged(config, self.world.config()), port=port, command=command)
        self.proxy.wait_log("API endpoint", timeout=60)
        self.crowd = Crowd(port, USERS, GENTLE_DCS, self.tally, random.Random(self.rng.random()), quick, name == "middle")
        self.over = threading.Event()
        self.began = time.monotonic()
        self.may_change = threading.Lock()       # held by the calm
        self.file_lock = threading.Lock()        # editors take turns among themselves, not with the API
        self.grown: dict[str, float] = {}
        self.tenants: list[Any] = []             # sessions that stay from the first moment to the last, idle between the calms
        jobs: list[Callable[[random.Random], None]] = [self.change_users, self.race, self.edit_file, self.strike, self.poll]
        self.pace = {"strike": 4, "exchange": 10}        # how much more seldom than the others
        self.alone: list[Callable[[random.Random], None]] = [self.edit_file, self.strike]      # jobs that exclude each other
        self.threads = [threading.Thread(target=self._repeat, args=(job, random.Random(self.rng.random())), daemon=True) for job in jobs]

    def config(self) -> dict[str, Any]:
        return {
            "general": {"log_level": "normal", "beobachten": True},
            "server": {"metrics_port": self.metrics_port, "api": {"enabled": True, "listen": f"127.0.0.1:{self.api.port}"}},
            "timeouts": {"client_handshake": 60, "tg_connect": 5},
            "censorship": {"mask": True, "mask_host": "127.0.0.1", "mask_port": self.web.port},
            # tables that remember a while are full after the warm-up, not after half an hour
            "access": {"replay_check_len": 1000, "replay_window_secs": 60},
        }

    def _repeat(self, job: Callable[[random.Random], None], rng: random.Random) -> None:
        """`job` again and again, never in a calm; its error is a finding."""
        while not self.over.is_set():
            try:
                with self.may_change if job in self.alone else contextlib.nullcontext():
                    if self.crowd.may_go.is_set():
                        job(rng)
            except Exception as error:
                self.tally.fault(f"{job.__name__}: {error!r}")
            low, high = (0.02, 0.2) if self.quick else (0.2, 2.0)
            self.over.wait(rng.uniform(low, high) * self.pace.get(job.__name__, 1))

    # what changes

    def ask(self, method: str, path: str, body: Any = None, revision: str = "", good: Sequence[int] = (200, 201)) -> dict[str, Any]:
        """A change; refused for a reason that the other writers explain, it is counted and forgotten."""
        status, found = self.api.ask(method, path, body, revision, timeout=PATIENCE_S)
        self.tally.add(changes=status in (200, 201), refused=status not in (200, 201))
        others = status in (404, 409) or (status == 500 and "failed to load config" in found["error"]["message"])
        if status not in good and not others:
            raise AssertionError(f"{method} {path}: {status} {found}")
        return found if status in (200, 201) else {}

    def change_users(self, rng: random.Random) -> None:
        """One change to one of the users who come and go."""
        churn = self.crowd.churn
        name = rng.choice(list(churn)) if churn else ""
        deed = rng.choice(("create", "patch", "disable", "enable", "rotate", "delete", "stale")) if name else "create"
        if deed == "create" and len(churn) < 12:
            name, secret = f"guest-{rng.randrange(10_000)}", os.urandom(16)
            if self.ask("POST", "/v1/users", {"username": name, "secret": secret.hex()}):
                churn[name] = secret
        elif deed == "patch":
            limits = {"max_tcp_conns": rng.choice((None, 1, 50)), "max_unique_ips": rng.choice((None, 1, 3)),
                      "data_quota_bytes": rng.choice((None, 1, 10_000_000)),
                      "expiration_rfc3339": rng.choice((None, "2020-01-01T00:00:00Z", "2099-01-01T00:00:00Z"))}
            self.ask("PATCH", f"/v1/users/{name}", limits, self.api.ask("GET", "/v1/health")[1]["revision"])
        elif deed in ("disable", "enable"):
            self.ask("POST", f"/v1/users/{name}/{deed}")
        elif deed == "rotate":
            secret = os.urandom(16)
            if self.ask("POST", f"/v1/users/{name}/rotate-secret", {"secret": secret.hex()}):
                churn[name] = secret
        elif deed == "delete":
            churn.pop(name, None)
            self.ask("DELETE", f"/v1/users/{name}")
        elif deed == "stale" and self.ask("PATCH", f"/v1/users/{name}", {"max_tcp_conns": 3}, "0" * 64, good=()):
            raise AssertionError("a change with a stale If-Match went through")

    def race(self, rng: random.Random) -> None:
        """Another administrator, at the same time."""
        name = f"racer-{rng.randrange(3)}"
        if rng.random() < 0.5:
            self.ask("POST", "/v1/users", {"username": name})
        else:
            self.ask("DELETE", f"/v1/users/{name}")

    def edit_file(self, rng: random.Random) -> None:
        """An editor and SIGHUP; sometimes what it saves is broken, and mended a moment later."""
        path = self.proxy.config
        text = path.read_text()
        if rng.random() < 0.25:
            half = f'{text[:len(text) // 2]}\n"""'       # without the quotes it may be a good file with fewer users
            self._save(rng.choice((f"{text}nonsense\n", "", half, text.replace("[access.users]", "[access.nobody]"))))
            self.account.broken_files += 1
            self.tally.add(broken_files=1)
            time.sleep(rng.uniform(0.05, 0.5))
            self._save(text)
        else:
            kept = re.sub(r"# soak \d+\n", "", text)
            hot = rng.choice((("log_level", '"normal"'), ("beobachten_minutes", str(rng.randrange(1, 20)))))
            if hot[0] == "beobachten_minutes":
                kept = re.sub(r"(?m)^beobachten_minutes = .*\n", "", kept).replace("[general]\n", f"[general]\n{hot[0]} = {hot[1]}\n", 1)
            self._save(f"{kept}# soak {rng.randrange(10**6)}\n")
            self.tally.add(edits=1)

    def _save(self, text: str) -> None:
        """By rename, or in place, then SIGHUP."""
        path = self.proxy.config
        if self.rng.random() < 0.7:
            new = path.with_name("edited.toml")
            new.write_text(text)
            new.replace(path)
        else:
            path.write_text(text)
        os.kill(self.proxy.pid, signal.SIGHUP)
        self.tally.add(hangups=1)

    def strike(self, rng: random.Random) -> None:
        self.world.strike(self.crowd, self.quick)

    # what watches

    def poll(self, rng: random.Random) -> None:
        """A panel, Prometheus and somebody with the status page open."""
        for path in rng.sample(READS, 3):
            status, found = self.api.ask("GET", path, timeout=PATIENCE_S)
            if status != 200 or not found["ok"]:
                raise AssertionError(f"GET {path}: {status} {found}")
        self.fetch(self.api.port, "/")
        self.fetch(self.metrics_port, "/beobachten")
        now = self.metrics()
        for key, value in now.items():
            if key.partition("{")[0].endswith("_total") and "{" not in key and value < self.grown.get(key, 0.0) and "minus" not in key:
                raise AssertionError(f"{key} went from {self.grown[key]} to {value}")
        self.grown = now
        self.tally.add(polls=1)

    def fetch(self, port: int, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read().decode()
        finally:
            connection.close()
        if answer.status != 200:
            raise AssertionError(f"{path}: {answer.status}")
        return body

    def metrics(self) -> dict[str, float]:
        """All samples of /metrics."""
        lines = [line for line in self.fetch(self.metrics_port, "/metrics").splitlines() if line and not line.startswith("#")]
        return {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines)}

    def read_log(self) -> None:
        """Keep the lines that complain, forget the rest."""
        with self.proxy._news:
            lines, self.proxy.lines[:] = list(self.proxy.lines), []
        with self.proxy._news:
            errors, self.proxy.errors[:] = list(self.proxy.errors), []
        bad = [line for line in lines if soak_judge.GRUMBLE.search(line) or not doubles.LOG_LINE.fullmatch(line)]
        self.account.grumbles += [*bad, *(f"stderr: {line}" for line in errors)]

    def sample(self, calm: bool = False) -> Sample:
        """Measure the process now."""
        fds = soak_judge.leftovers(self.proxy.fds(), self.proxy.quiet_fds)
        fds["tcp"] = max(0, fds["tcp"] - self.world.links())
        open_now = self.crowd.busy + sum(relay.busy // 2 for relay in self.crowd.relays.values())
        count = len(os.listdir(f"/proc/{self.proxy.pid}/task"))
        return Sample(time.monotonic() - self.began, calm, self.proxy.rss(), dict(+fds), count, open_now)

    def calm(self) -> None:
        """Let everybody come to rest, measure, and go on."""
        if not self.crowd.calm(PATIENCE_S * 2):
            self.tally.fault(f"the crowd does not come to rest: {self.crowd.late()}")
        with self.may_change:
            self.account.samples.append(self.settled(2 if self.quick else 60))
            self.knock()
            self.read_log()
        self.world.tidy()
        self.crowd.go_on()

    def knock(self) -> None:
        """Whoever stays is still served, whatever has changed around him."""
        for tenant in list(self.tenants):
            try:
                tenant.echo()
            except (AssertionError, OSError, EOFError) as error:
                self.tally.fault(f"a session that nothing disturbed was lost: {error!r}")
                self.tenants.remove(tenant)

    def settled(self, limit_s: float) -> Sample:
        """A calm sample as soon as no more descriptors are open than in the first one; the last try counts."""
        first = next((sample for sample in self.account.samples if sample.calm), None)
        until = time.monotonic() + limit_s
        while True:
            found = self.sample(calm=True)
            aim = first.fds if first else {"anon_inode": 9, "file": 9, "socket": 9, "tcp": 2 * len(self.tenants)}
            if all(number <= aim.get(kind, 0) for kind, number in found.fds.items()) or time.monotonic() > until:
                return found
            time.sleep(0.1)

    # the end

    def start(self) -> None:
        for _ in range(TENANTS if self.name == "direct" else 0):         # renewed links to middle ends take theirs with them
            self.tenants.append(doubles.Client(self.proxy.port, secret=USERS[1].secret, dc=1, timeout=PATIENCE_S).start())
            self.crowd.count_dial()
        self.knock()
        self.account.samples.append(self.settled(30))
        self.crowd.start()
        for thread in self.threads:
            thread.start()

    def finish(self) -> None:
        """Everybody leaves; count what is to be counted, then the process."""
        self.over.set()
        for thread in self.threads:
            thread.join(PATIENCE_S)
        if not self.crowd.calm(PATIENCE_S * 2):
            self.tally.fault(f"the crowd does not come to rest: {self.crowd.late()}")
        self.crowd.stop()
        account = self.account
        account.samples.append(self.settled(2 if self.quick else 60))
        self.knock()
        for tenant in self.tenants:
            tenant.close()
        self._count()
        before, at = self.proxy.cpu(), time.monotonic()
        time.sleep(1 if self.quick else 10)
        account.idle_cpu = (self.proxy.cpu() - before) / (time.monotonic() - at)
        self.proxy.process.send_signal(signal.SIGTERM)
        try:
            account.exit_code = self.proxy.process.wait(30)
            self.proxy.wait_exit(30)
        except (subprocess.TimeoutExpired, AssertionError):
            account.exit_code = None
        self.read_log()
        account.faults += self.tally.faults + [f"the other end: {fault}" for fault in self.world.faults()]

    def _count(self) -> None:
        account, counts = self.account, self.tally.counts
        account.dialled = self.crowd.connections_made()
        until = time.monotonic() + 20
        while True:
            now = self.metrics()
            rows = {row["username"]: row for row in self.api.data("/v1/users")}
            account.current = {name: row["current_connections"] for name, row in rows.items()}
            account.accepted = int(now["telemt_connections_total"])
            even = account.accepted == account.dialled or not account.one_program
            if time.monotonic() > until or (not any(account.current.values()) and even):
                break
            time.sleep(0.2)
        account.bad = int(now["telemt_connections_bad_total"])
        account.bad_by_class = int(sum(value for key, value in now.items() if key.startswith("telemt_connections_bad_by_class_total")))
        account.moved = counts["exact_up"], counts["exact_down"]
        account.counted = rows["exact"]["octets_from_client"], rows["exact"]["octets_to_client"]
        account.exact_good, account.exact_other = counts["exact_good"], counts["exact_other"]
        account.exact_total = int(now.get('telemt_user_connections_total{user="exact"}', 0))
        account.good = counts["good"]
        account.users_live = frozenset(rows)
        account.users_file = frozenset(tomllib.loads(self.proxy.config.read_text())["access"]["users"])

    def close(self) -> None:
        self.over.set()
        self.crowd.over.set()
        for tenant in self.tenants:
            tenant.close()
        self.proxy.kill()
        self.web.close()
        self.world.close()


class Exchanged(Instance):
    """The same, and the program is exchanged again and again.  Each has counters of its own; sessions of all of them must end well."""

    def __init__(self, folder: Path, seed: int, quick: bool, command: Sequence[str]) -> None:
        super().__init__("exchanged", folder, seed, quick, command)
        self.account.one_program = False
        self.alone.append(self.exchange)
        self.threads.append(threading.Thread(target=self._repeat, args=(self.exchange, random.Random(self.rng.random())), daemon=True))

    def start(self) -> None:
        self.exchange(self.rng)                  # the first calm point is of a program that took over, as all later ones are
        super().start()

    def exchange(self, rng: random.Random) -> None:
        """SIGUSR2, and wait until the new program serves."""
        with self.crowd.weather.storm("replay"):         # the table of those that were seen begins anew
            done, count = len(self.proxy.log("Took over")), len(self.proxy.log(r"Process \d+ accepts now"))
            os.kill(self.proxy.process.pid, signal.SIGUSR2)
            self.proxy.wait_log("Took over", done + 1, PATIENCE_S)
            self.proxy.pid = int(self.proxy.wait_log(r"Process (\d+) accepts now", count + 1, PATIENCE_S)[1])
            self.grown = {}
        self.tally.add(exchanges=1)

    def processes(self) -> int:
        """Programs with our configuration, a caretaker of them not included."""
        found = 0
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                found += folder.name.isdigit() and str(self.proxy.config).encode() in (folder / "cmdline").read_bytes()
        return found

    def settled(self, limit_s: float) -> Sample:
        """And with the last session of a program goes the program."""
        until = time.monotonic() + limit_s + 10
        while (left := self.processes()) > 1 and time.monotonic() < until:
            time.sleep(0.1)
        if left > 1:
            self.tally.fault(f"{left} programs in a calm")
        return super().settled(limit_s)

    def finish(self) -> None:
        super().finish()
        if left := self.processes():
            self.account.faults.append(f"{left} programs are left at the end")


# -- a run -------------------------------------------------------------------------------------------------------------------------

def run(seconds: float, seed: int, names: Sequence[str], command: Sequence[str] = (),
        tell: bool = True) -> tuple[list[Instance], list[str]]:
    """Soak for so long; the instances with their accounts, and the findings."""
    quick = seconds < 60
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    instances: list[Instance] = []
    try:
        for name in names:
            more = seed, quick, command
            instances.append(Exchanged(folder, *more) if name == "exchanged" else Instance(name, folder, *more))
        for instance in instances:
            instance.start()
        soak(instances, seconds, quick, tell)
        for instance in instances:
            instance.finish()
    finally:
        for instance in instances:
            instance.close()
        shutil.rmtree(folder, ignore_errors=True)
    return instances, [text for instance in instances for text in soak_judge.judge(instance.account)]


def soak(instances: Sequence[Instance], seconds: float, quick: bool, tell: bool) -> None:
    """Sample every few seconds, and come to rest a dozen times."""
    began = time.monotonic()
    every, rest = (0.25, seconds / 4) if quick else (3.0, max(30.0, min(120.0, seconds / 12)))
    next_rest = began + rest
    while (now := time.monotonic()) < began + seconds:
        time.sleep(min(every, max(0.0, began + seconds - now)))
        for instance in instances:
            if instance.proxy.process.poll() is not None:
                instance.tally.fault(f"the process is gone: {instance.proxy.tail()}")
                return
            instance.account.samples.append(instance.sample())
        if time.monotonic() >= next_rest:
            for instance in instances:
                instance.calm()
            next_rest = time.monotonic() + rest
        if tell:
            progress(instances, time.monotonic() - began, seconds)


def progress(instances: Sequence[Instance], passed: float, seconds: float) -> None:
    """One line on a terminal, written over."""
    if sys.stdout.isatty():
        parts = [f"{one.name}: {one.tally.counts['good']} sessions, {one.account.samples[-1].rss / MIB:.1f} MiB, "
                 f"{len(one.tally.faults)} faults" for one in instances]
        print(f"\r\033[K{passed:.0f} of {seconds:.0f} s  {'  '.join(parts)}", end="", flush=True)


def figures(instance: Instance, seconds: float) -> dict[str, Any]:
    """What a run has to show for itself."""
    counts, samples = instance.tally.counts, instance.account.samples
    calm = soak_judge.warm(samples) or samples
    first = next(sample for sample in samples if sample.calm)
    return {
        "seconds": round(seconds), "sessions": counts["good"], "sessions_broken": counts["lost"], "connections": instance.account.dialled,
        "strangers": counts["strangers"] + counts["replays"], "bytes": counts["bytes_up"] + counts["bytes_down"],
        "restarts": counts["dc_restarts"] + counts["me_restarts"] + counts["link_faults"],
        "exchanges": counts["exchanges"],
        "relay_faults": counts["resets"] + counts["half_open"] + counts["slices"],
        "changes": counts["changes"], "refused": counts["refused"], "edits": counts["edits"], "broken_files": counts["broken_files"],
        "hangups": counts["hangups"], "polls": counts["polls"],
        "rss_start": first.rss, "rss_warm": calm[0].rss, "rss_end": calm[-1].rss, "rss_peak": max(sample.rss for sample in samples),
        "fds_start": sum(first.fds.values()), "fds_end": sum(calm[-1].fds.values()),
        "fds_peak": max(sum(sample.fds.values()) for sample in samples),
        "threads_start": first.threads, "threads_end": calm[-1].threads, "idle_cpu": instance.account.idle_cpu,
        "calm_points": sum(sample.calm for sample in samples), "faults": len(instance.account.faults),
        "smallest_leak": round(soak_judge.bound_per_session(samples, instance.account.dialled)),
    }


ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("duration", lambda f: f"{f['seconds'] / 60:.1f} min"),
    ("sessions that ended well, with every byte right", lambda f: f"{f['sessions']:,}"),
    ("sessions broken on purpose", lambda f: f"{f['sessions_broken']:,}"),
    ("strangers", lambda f: f"{f['strangers']:,}"),
    ("connections in all", lambda f: f"{f['connections']:,}"),
    ("bytes through the clients", lambda f: f"{f['bytes'] / 1e9:.2f} GB"),
    ("restarts and broken links of data centres and middle ends", lambda f: f"{f['restarts']:,}"),
    ("exchanges of the program (SIGUSR2)", lambda f: f"{f['exchanges']:,}"),
    ("faults of the relay", lambda f: f"{f['relay_faults']:,}"),
    ("changes through the API, refused ones", lambda f: f"{f['changes']:,}, {f['refused']:,}"),
    ("edits of the file, broken files, SIGHUPs", lambda f: f"{f['edits']:,}, {f['broken_files']:,}, {f['hangups']:,}"),
    ("rounds of polling", lambda f: f"{f['polls']:,}"),
    ("RSS at the start, warm, at the end, at most, MiB",
     lambda f: ", ".join(f"{f['rss_' + key] / MIB:.1f}" for key in ("start", "warm", "end", "peak"))),
    ("descriptors at the start, at the end, at most", lambda f: f"{f['fds_start']}, {f['fds_end']}, {f['fds_peak']}"),
    ("threads at the start, at the end", lambda f: f"{f['threads_start']}, {f['threads_end']}"),
    ("processor when idle afterwards", lambda f: f"{f['idle_cpu']:.2%}"),
    ("smallest leak it would have seen, per connection", lambda f: f"{f['smallest_leak']:,} bytes"),
    ("findings", lambda f: str(f["findings"])),
)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per figure, a column per instance."""
    lines = ["| figure | " + " | ".join(results) + " |", "|---" * (len(results) + 1) + "|"]
    return "\n".join([*lines, *(f"| {label} | " + " | ".join(say(found) for found in results.values()) + " |" for label, say in ROWS)])


def prove(seed: int) -> int:
    """Programs with a planted leak each: 0 when all are found."""
    missed = 0
    for name, leak in LEAKS.items():
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder) / "leaky.py"
            program.write_text(LEAKY.format(root=str(ROOT), leak=leak))
            _, findings = run(6, seed, ["direct"], [sys.executable, "-B", str(program)], tell=False)
        print(f"planted leak of {name}: {findings[0] if findings else 'NOT FOUND'}", flush=True)
        missed += not findings
    return int(missed > 0)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="soak.py", description="The whole program for a while in a crowd that misbehaves.")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=10.0)
    length.add_argument("--hours", type=float)
    length.add_argument("--seconds", type=float)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--out", type=Path, default=OUT, help="where the JSON goes")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--prove", action="store_true", help="run programs with planted leaks instead, which must be found")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    """0 sound, 1 findings, 2 wrong use."""
    options = arguments(words)
    seconds = options.seconds or (options.hours * 3600 if options.hours else options.minutes * 60)
    if seconds <= 0:
        print("how long?", file=sys.stderr)
        return 2
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    if options.prove:
        return prove(seed)
    names = [options.only] if options.only else NAMES
    instances, findings = run(seconds, seed, names)
    results = {one.name: figures(one, seconds) | {"findings": sum(text.startswith(one.name) for text in findings)} for one in instances}
    print(f"\n{table(results)}\n")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"seed": seed, "results": results, "findings": findings,
              "samples": {one.name: [sample._asdict() for sample in one.account.samples] for one in instances}}
    options.out.write_text(json.dumps(report, indent=1))
    if options.write:
        PAGE.write_text(bench_report.between(PAGE.read_text(), "soak", table(results)))
    for text in findings:
        print(f"FINDING {text}")
    print("sound" if not findings else f"{len(findings)} findings")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
