"""Stopping under load, twice, by either signal; and a hang-up that is never the end."""
from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from doubles import HANGUP, MIB, PROGRAM, Client, Proxy, Rig, base_config, clean_env, free_port, helper, patient, poll


def crowd_at_work(rig: Rig) -> list[Client]:
    """Sessions in every state: quiet, half a hello, a stalled download, a stalled upload; returns those that wait for an end."""
    waiting = [rig.client("alice", mode) for mode in ("classic", "secure", "tls") * 4]
    for client in waiting[::2]:
        client.echo()
    half = rig.dial()
    half.push(half.hello[:200])
    late = rig.dial()
    late.push(late.hello)
    late.read_flight()
    for mode in ("classic", "secure", "tls"):
        stalled = rig.client("bob", mode, rcvbuf=16384)
        stalled.order("send", 64 * MIB)
    hole = rig.dial("alice", "classic", dc=3)
    hole.push(hole.header)
    return [*waiting, half, late, hole]


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT], ids=lambda sig: sig.name)
def test_stop_under_load(rig: Rig, sig: signal.Signals) -> None:
    hole = rig.black_hole()
    proxy = rig.proxy({"dc_overrides": {"3": [hole.address]}})
    waiting = crowd_at_work(rig)
    busy = rig.client("bob", "tls")

    def download() -> None:
        with pytest.raises((EOFError, *HANGUP)):
            busy.order("send", 1 << 40)
            busy.recv_digest(1 << 40)
    with helper(download):
        poll(lambda: busy.got_bytes > 20 * MIB, "a download at full speed")
        proxy.stop(sig)                                     # within 4 s
    for client in waiting:
        client.expect_closed()


def slow_to_stop(rig: Rig) -> Proxy:
    """A proxy that may take an hour to stop, for flushing and as a whole: whatever ends sooner has not waited for its limits."""
    program, whole = rig.folder / "telemt.py", PROGRAM.read_text(encoding="utf-8")
    for name in ("_STOP_FLUSH_S", "_STOP_LIMIT_S"):
        whole, count = re.subn(rf"^{name}: Final = [0-9.]+", f"{name}: Final = 3600.0", whole, flags=re.MULTILINE)
        assert count == 1, name
    program.write_text(whole, encoding="utf-8")
    return rig.proxy(command=[sys.executable, "-B", str(program)])


def stands_still(peer: Any) -> bool:
    """All buffers on the way are full: what the proxy read last lies in its queue."""
    before = peer.sent_bytes
    threading.Event().wait(0.3)
    return bool(peer.sent_bytes == before)


def test_stop_when_idle_waits_for_nobody(rig: Rig) -> None:
    proxy = slow_to_stop(rig)
    client = rig.client()
    client.req_pq()
    proxy.stop()
    client.expect_closed()


@pytest.mark.parametrize("sigs", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)],
                         ids=lambda pair: "+".join(sig.name for sig in pair))
def test_second_signal_ends_at_once(rig: Rig, sigs: tuple[signal.Signals, signal.Signals]) -> None:
    proxy = slow_to_stop(rig)
    for mode in ("classic", "secure", "tls"):               # bytes for somebody who does not read make the first signal wait
        rig.client("bob", mode, rcvbuf=16384).order("send", 64 * MIB)
    for peer in [rig.dc.take() for _ in range(3)]:
        poll(lambda peer=peer: peer.sent_bytes >= MIB and stands_still(peer), "bytes in the queue")
    proxy.process.send_signal(sigs[0])
    proxy.wait_log("Shutting down")
    proxy.process.send_signal(sigs[1])
    assert proxy.wait_exit() == -sigs[1]                    # config.md 6.4: "by signal"
    proxy.check_output()


def test_hang_up_is_never_fatal(rig: Rig) -> None:
    proxy = rig.proxy(ready=r"INFO telemt::?\w*: telemt\.py .* crypto=")    # the first line: handlers stand before anything slow
    for _ in range(20):
        proxy.process.send_signal(signal.SIGHUP)
    proxy.wait_log("Listening on")
    proxy.wait_log("SIGHUP received")                       # remembered (config.md 8 item 2)
    client = rig.client()
    client.req_pq()
    for _ in range(20):
        proxy.process.send_signal(signal.SIGHUP)
        client.echo()
    rig.client("bob", "classic").req_pq()
    proxy.quiet_fds = proxy.quiet_fds | proxy.fds()         # the first count was made before there was a listener
    del proxy.quiet_fds["tcp"]


@pytest.mark.parametrize("name", ["SIGPIPE", "SIGURG", "SIGWINCH", "SIGCONT"])
def test_other_signals_change_nothing(rig: Rig, name: str) -> None:
    proxy = rig.proxy()
    client = rig.client()
    for _ in range(5):
        proxy.process.send_signal(getattr(signal, name))
        client.echo()


def test_nobody_reads_the_log(rig: Rig) -> None:
    """A full pipe on stdout costs lines and nothing else; the process stops in order, and in time, all the same."""
    proxy = rig.proxy()
    session = rig.client()
    with proxy.hold_log():
        for _ in range(4000):                               # 100 bytes and more each: a pipe holds 64 KiB, the proxy 256
            rig.dial("alice", "classic").push(b"GET / HTTP/1.0\r\n\r\n")
            rig.clients.pop().close()
        session.echo(b"are you there...")
    rig.dial("alice", "classic").push(b"GET / HTTP/1.0\r\n\r\n")
    proxy.wait_log(r" WARN telemt::cli: \d+ log lines lost")
    session.echo(b"still there, yes")
    with proxy.hold_log():
        for _ in range(1000):
            rig.dial("alice", "classic").push(b"GET / HTTP/1.0\r\n\r\n")
            rig.clients.pop().close()
        proxy.process.send_signal(signal.SIGTERM)
        assert proxy.process.wait(patient(4)) == 0
    proxy.wait_exit()
    proxy.check_output()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("after_ms", [0, 10, 30, 60, 100, 200])
def test_a_signal_during_the_start(tmp_path: Path, name: str, after_ms: int) -> None:
    """Exit 0 from the first moment that the program can speak for itself, through its change of images; never a traceback.

    The moment is when SIGHUP is ignored.  Before it the interpreter compiles the file, and nobody can help.
    """
    (tmp_path / "config.toml").write_text(tomli_w.dumps(base_config(free_port(), "127.0.0.1:9")), encoding="utf-8")
    with subprocess.Popen([sys.executable, "-B", str(PROGRAM), "config.toml"], cwd=tmp_path, env=clean_env(), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        status = Path(f"/proc/{process.pid}/status")
        poll(lambda: int(next(line for line in status.read_text().splitlines() if line.startswith("SigIgn")).split()[1], 16) & 1,
             "the first moment", 20.0)
        time.sleep(after_ms / 1000 + 0.003)                 # SIGTERM's handler stands three lines further down
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
