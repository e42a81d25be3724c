"""SIGUSR2: a new program takes over the listening sockets, and nobody is lost (docs/operations.md)."""
from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from doubles import MIB, PROGRAM, ApiScript, Client, Proxy, Rig, free_port, patient, pattern_sha, poll
from fake_middle_end import MeWorld

GENERATIONS = int(os.environ.get("TELEMT_GENERATIONS", "5"))


def exchange(proxy: Proxy, sig_to: int = 0, timeout: float = 30.0) -> int:
    """Have the program replaced; returns the process that serves now."""
    done = len(proxy.log("Took over"))
    os.kill(sig_to or proxy.process.pid, signal.SIGUSR2)
    proxy.wait_log("Took over", done + 1, timeout)
    proxy.pid = int(proxy.wait_log(r"Process (\d+) accepts now", done + 1)[1])
    return proxy.pid


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gone(pid: int) -> bool:
    """No process of this number, and no zombie but one that init is to bury."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return (state, parent) == ("Z", "1")


class Knocking:
    """Clients that connect every 5 ms, get the answer to their hello and leave; visitors of the API every 20 ms."""

    def __init__(self, port: int, path: str, api: int) -> None:
        self.good, self.faults = Counter[str](), Counter[str]()
        self._stop = threading.Event()
        works = [(self._tcp, port, 0.01), (self._tcp, port, 0.01), (self._unix, path, 0.02), (self._api, api, 0.02)]
        self._threads = [threading.Thread(target=self._knock, args=work, daemon=True) for work in works]

    def __enter__(self) -> Knocking:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _knock(self, work, where, period_s: float) -> None:
        due_at = time.monotonic()
        while not self._stop.is_set():
            due_at = max(due_at + period_s, time.monotonic() - 1.0)
            time.sleep(max(0.0, due_at - time.monotonic()))
            try:
                work(where)
                self.good[work.__name__] += 1
            except Exception as fault:
                self.faults[f"{work.__name__} {fault!r}"] += 1

    @staticmethod
    def _tcp(port: int) -> None:
        with closing(Client(port)) as client:
            client.start()

    @staticmethod
    def _unix(path: str) -> None:
        with closing(Client(0, path=path)) as client:
            client.start()

    @staticmethod
    def _api(port: int) -> None:
        ApiScript(port).data("/v1/health")

    def more(self, count: int) -> None:
        """Wait for so many more clients of each kind."""
        before = Counter(self.good)
        poll(lambda: all(self.good[work] >= before[work] + count for work in ("_tcp", "_unix", "_api")) or self.faults,
             f"{count} more clients", 30)
        assert not self.faults, self.faults


def test_nobody_is_refused_and_transfers_go_on(rig: Rig) -> None:
    """200 connections a second, unix socket, API and metrics beside them, across the exchange; then one of everything is left."""
    api, metrics = free_port(), free_port()
    proxy = rig.proxy({"general": {"quota_state_path": "quota.json"}, "access": {"user_data_quota": {"bob": 1 << 40}},
                       "server": {"api": {"enabled": True, "listen": f"127.0.0.1:{api}"}, "metrics_listen": f"127.0.0.1:{metrics}",
                                  "listen_unix_sock": str(rig.folder / "sock")}})
    proxy.wait_log("Metrics endpoint")
    first = proxy.pid
    old = rig.client("bob")
    old.order("send", 40 * MIB, 7)
    digest = hashlib.sha256(old.recv(8 * MIB))
    waiting = rig.client("alice", "secure")                 # in the middle of nothing
    waiting.echo()
    rest = http.client.HTTPConnection("127.0.0.1", api, timeout=20)
    rest.request("GET", "/v1/health")
    rest.getresponse().read()
    with Knocking(proxy.port, str(rig.folder / "sock"), api) as knocking:
        knocking.more(25)
        second = exchange(proxy)
        assert second != first and children(first) == [second]
        knocking.more(25)
    assert rest.sock is not None and rest.sock.recv(1) == b""          # the old program serves no API any more
    assert fetch_metric(metrics, "telemt_uptime_seconds") < 60
    state = json.loads((proxy.folder / "quota.json").read_text())["users"]
    assert state["bob"]["used_bytes"] >= 8 * MIB             # written before the hand-over
    proxy.wait_log("Loaded per-user quota state")
    assert ApiScript(api).data("/v1/users/bob")["quota_used_bytes"] == state["bob"]["used_bytes"]
    for _ in range(32):
        digest.update(old.recv(MIB))
    assert digest.digest() == pattern_sha(7, 40 * MIB), "download damaged"
    old.upload(MIB)
    waiting.echo()
    ApiScript(api).change("POST", "/v1/users", {"username": "carol"})  # one program reads and writes the configuration
    proxy.wait_log(r"users added: \[carol\]")
    time.sleep(1.2)
    assert len(proxy.log("users added")) == 1
    rig.close_clients()
    poll(lambda: Path(f"/proc/{first}/cmdline").read_bytes().count(b"lifeline"), "the caretaker")
    assert rss_kb(first) < 16_000, "the caretaker is small"
    assert json.loads((proxy.folder / "quota.json").read_text())["users"] == state       # nobody wrote over it
    assert (rig.folder / "sock").exists()


def fetch_metric(port: int, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", "/metrics")
    found = re.search(rf"^{name} (\S+)$", connection.getresponse().read().decode(), re.MULTILINE)
    connection.close()
    assert found is not None, name
    return float(found[1])


def rss_kb(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def test_what_does_not_start_changes_nothing(rig: Rig) -> None:
    """Broken configuration, no configuration, broken program: the old one goes on, and says why."""
    program, whole = rig.folder / "telemt.py", PROGRAM.read_text()
    program.write_text(whole)
    proxy = rig.proxy(command=[sys.executable, "-B", str(program)])
    client = rig.client("bob")
    good, fds = proxy.config.read_text(), proxy.fds()

    def refused(why: str) -> None:
        count = len(proxy.log("does not take over"))
        proxy.process.send_signal(signal.SIGUSR2)
        proxy.wait_log(f"ERROR telemt::exchange: The new program does not take over: {why}.*; this one goes on", 1, 60)
        assert len(proxy.log("does not take over")) == count + 1
        client.echo()
        rig.client().req_pq()
        poll(lambda: not children(proxy.pid), "no child, no zombie")

    proxy.config.write_text(good.replace("[access.users]", "[access.users]\nbad = 5"))
    refused(r"it ended with exit code 1: \[telemt\] Error: .*bad")
    proxy.config.write_text("# emptied by a full disk\n")
    refused(r"it ended with exit code 1: .*\[access.users\] is missing")
    proxy.config.rename(f"{proxy.config}.away")
    refused(r"it ended with exit code 1: .*No such file")
    assert not proxy.config.exists()
    proxy.config.write_text(good)
    program.write_text("def (:\n")
    refused(r"it ended with exit code 1: SyntaxError")
    client.close()
    poll(lambda: proxy.fds()["listen"] == fds["listen"] and not children(proxy.pid), "everything as before")
    program.write_text(whole.replace('VERSION: Final = "', 'VERSION: Final = "9.'))
    exchange(proxy)
    assert proxy.log(r"telemt\.py 9\.")                     # the file as it is now
    rig.client().echo()


def test_one_that_hangs_is_killed(rig: Rig) -> None:
    program, whole = rig.folder / "telemt.py", PROGRAM.read_text()
    program.write_text(whole.replace("_EXCHANGE_S: Final = 60.0", "_EXCHANGE_S: Final = 1.0"))
    proxy = rig.proxy(command=[sys.executable, "-B", str(program)])
    fds = proxy.fds()
    program.write_text("import time\ntime.sleep(60)\n")
    proxy.process.send_signal(signal.SIGUSR2)
    proxy.wait_log("SIGUSR2 received")
    proxy.process.send_signal(signal.SIGUSR2)
    proxy.wait_log("WARN telemt::exchange: SIGUSR2 ignored: a new program is being started")
    proxy.wait_log(r"does not take over: it was not ready within 1 s", 1, 30)
    rig.client().req_pq()
    poll(lambda: proxy.fds()["listen"] == fds["listen"] and not children(proxy.pid), "everything as before")


def test_generations(rig: Rig) -> None:
    """Each takes over from the one before; no descriptor and no process is left; signals to the first reach the last."""
    proxy = rig.proxy()
    first, before, seen = proxy.pid, Counter[str](), [proxy.pid]
    for number in range(GENERATIONS):
        client = rig.client("bob")
        client.echo()
        seen.append(exchange(proxy))
        client.echo()
        client.close()
        poll(lambda: all(gone(pid) for pid in seen[1:-1]), "the ones between", 10)
        rig.client().req_pq()
        rig.close_clients()
        poll(lambda: not proxy.fds()["tcp"], "rest")
        if number == 0:
            before = proxy.fds()
    assert len(set(seen)) == GENERATIONS + 1
    poll(lambda: not proxy.fds() - before, f"the descriptors of {before}")
    poll(lambda: b"lifeline" in Path(f"/proc/{first}/cmdline").read_bytes(), "the caretaker")
    proxy.process.send_signal(signal.SIGHUP)
    proxy.wait_log("SIGHUP received")
    os.kill(seen[-1], signal.SIGKILL)                       # who takes care of the program ends with it
    assert proxy.wait_exit(5) == 1


def test_the_drain_has_a_limit(rig: Rig) -> None:
    rig.env = {"TELEMT_DRAIN": "1"}
    proxy = rig.proxy()
    client = rig.client("bob")
    client.echo()
    exchange(proxy)
    client.echo()
    client.expect_closed(10)
    proxy.wait_log("Drain limit reached: closing 1 sessions")
    poll(lambda: b"lifeline" in Path(f"/proc/{proxy.process.pid}/cmdline").read_bytes(), "the caretaker")


def test_the_service_manager_follows(rig: Rig) -> None:
    """The messages of sd_notify; the old process leaves for good, and a signal ends its drain at once."""
    path = str(rig.folder / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(20)
        rig.env = {"NOTIFY_SOCKET": path}
        proxy = rig.proxy()

        def heard() -> dict[str, str]:
            return dict(line.split("=", 1) for line in manager.recv(4096).decode().splitlines())

        assert heard() == {"READY": "1"}
        proxy.process.send_signal(signal.SIGHUP)
        assert int(heard()["MONOTONIC_USEC"]) > 0 and heard() == {"READY": "1"}
        good = proxy.config.read_text()
        proxy.config.write_text("[")
        proxy.process.send_signal(signal.SIGUSR2)
        assert heard()["RELOADING"] == "1"
        failed = heard()
        assert failed["READY"] == "1" and "failed" in failed["STATUS"]
        proxy.config.write_text(good)
        client = rig.client("bob")
        client.echo()
        second = exchange(proxy)
        assert heard()["RELOADING"] == "1"
        assert heard() == {"MAINPID": str(second), "READY": "1", "STATUS": ""}
        assert heard() == {"READY": "1"}
        proxy.process.send_signal(signal.SIGUSR2)
        proxy.wait_log(f"process {second} serves, this one drains")
        client.echo()
        proxy.process.send_signal(signal.SIGTERM)
        assert proxy.process.wait(patient(4)) == 0
        client.expect_closed()
        rig.client().req_pq()                               # the new one does not care
        rig.close_clients()
        os.kill(second, signal.SIGTERM)
        assert heard() == {"STOPPING": "1"}
        poll(lambda: gone(second), "its end")


def test_a_container_stops_as_a_whole(rig: Rig) -> None:
    """Without sd_notify the first process is the one that is known: its SIGTERM is for everybody, also while it drains."""
    proxy = rig.proxy()
    client = rig.client("bob")
    client.echo()
    second = exchange(proxy)
    proxy.process.send_signal(signal.SIGTERM)
    assert proxy.process.wait(patient(4)) == 0               # its drain would take ten minutes
    poll(lambda: gone(second), "its end", 1)
    client.expect_closed()
    assert len(proxy.log("Shutting down")) == 2


@pytest.mark.parametrize("manager", ["none", "systemd"])
def test_when_the_new_one_dies_the_old_one_does_not_drain_on(rig: Rig, manager: str) -> None:
    """It drained for up to ten minutes, and nobody accepted: who watches over the service waits for its end."""
    if manager == "systemd":
        rig.env = {"NOTIFY_SOCKET": str(rig.folder / "nobody")}
    proxy = rig.proxy()
    client = rig.client("bob")
    client.echo()
    second = exchange(proxy)
    client.echo()
    os.kill(second, signal.SIGKILL)
    assert proxy.wait_exit() == (0 if manager == "systemd" else 1)       # systemd judges the main process, which the second was
    assert proxy.log("ERROR telemt::exchange: The program that took over does not serve any more: .*; this one stops too")
    client.expect_closed()
    proxy.check_output()


def test_who_is_told_to_stop_lets_the_old_one_drain(rig: Rig) -> None:
    """SIGTERM to the new one alone, under systemd: an end in order is no death."""
    rig.env = {"NOTIFY_SOCKET": str(rig.folder / "nobody")}
    proxy = rig.proxy()
    client = rig.client("bob")
    client.echo()
    second = exchange(proxy)
    os.kill(second, signal.SIGTERM)
    proxy.wait_log("The program after us: it ended with exit code 0")
    client.echo()
    proxy.process.send_signal(signal.SIGTERM)
    assert proxy.wait_exit() == 0
    assert not proxy.log("ERROR")


def test_the_program_outlives_its_caretaker(rig: Rig) -> None:
    """SIGKILL cannot be passed on: docs/operations.md says how to find the one that is left, and how to end it."""
    proxy = rig.proxy()
    second = exchange(proxy)
    poll(lambda: b"lifeline" in Path(f"/proc/{proxy.process.pid}/cmdline").read_bytes(), "the caretaker")
    proxy.process.kill()
    proxy.process.wait()
    client = rig.client()
    client.req_pq()
    assert Path(f"/proc/{second}/comm").read_text() == "telemt\n"        # what pidof looks for
    os.kill(second, signal.SIGTERM)
    poll(lambda: gone(second), "its end")
    client.expect_closed()
    proxy.wait_log("Shutting down")
    proxy.check_output()


def test_a_session_through_the_middle_end(rig: Rig) -> None:
    """The old program keeps the link that a session is bound to; the new one has links before it accepts."""
    with MeWorld({2: 1}) as world:
        proxy = rig.proxy(world.config())
        old = rig.client("bob")
        old.req_pq()
        exchange(proxy)
        assert proxy.log("Middle-End link up")
        new = rig.client("alice")
        new.req_pq()
        old.req_pq()
        proxy.wait_log("mode=middle_proxy", 2)
        assert not proxy.log("link lost")
        rig.close_clients()
        proxy.stop()


ACTIVATE = """
import os, socket, sys
sock = socket.create_server(("127.0.0.1", int(sys.argv[1])))
os.dup2(sock.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def test_sockets_of_systemd(rig: Rig) -> None:
    """sd_listen_fds(3): a socket that the service manager opened is served, and handed on."""
    port = free_port()
    proxy = rig.proxy(port=port, command=[sys.executable, "-S", "-c", ACTIVATE, str(port), "-B", str(PROGRAM)])
    rig.client().req_pq()
    exchange(proxy)
    rig.client().req_pq()


@pytest.mark.parametrize("sig", [signal.SIGUSR2])
def test_an_early_signal_is_not_fatal(rig: Rig, sig: signal.Signals) -> None:
    """While the program starts it is deaf to it."""
    proxy = rig.proxy(ready="")
    end = time.monotonic() + 20
    while not proxy.log("Listening on") and time.monotonic() < end:
        if Path(f"/proc/{proxy.pid}/status").read_text().split("SigIgn:")[1].split()[0].endswith("801"):
            proxy.process.send_signal(sig)
        time.sleep(0.01)
    proxy.wait_log("Listening on")
    poll(lambda: proxy.fds()["listen"], "the listener")
    proxy.quiet_fds = proxy.fds()
    rig.client().req_pq()
