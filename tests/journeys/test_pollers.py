"""The same session over every poller; TELEMT_POLLER=uvloop lets all other journeys run over it."""
from __future__ import annotations

import importlib.util
import signal
import sys
import time
from pathlib import Path

import pytest

from doubles import MIB, PROGRAM, Rig
from tests.journeys.test_exchange import exchange

POLLERS = ["epoll", "selectors", pytest.param("uvloop", marks=pytest.mark.skipif(importlib.util.find_spec("uvloop") is None,
                                                                                 reason="uvloop is not installed"))]
NO_UVLOOP = "import sys, runpy; sys.modules['uvloop'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def switches(pid: int) -> int:
    """How often a process went to sleep up to now."""
    return int(Path(f"/proc/{pid}/status").read_text().split("voluntary_ctxt_switches:")[1].split()[0])


@pytest.mark.parametrize("poller", POLLERS)
def test_a_day_of_a_proxy(rig: Rig, poller: str) -> None:
    proxy = rig.proxy({"general": {"event_loop": poller}})
    proxy.wait_log(rf"crypto=\S+ poller={poller} ")
    for mode in ("classic", "secure", "tls"):
        client = rig.client("bob", mode)
        client.req_pq()
        client.both_ways(8 * MIB)
        client.close()
    crowd = [rig.client("alice", mode) for mode in ("secure", "tls") * 10]
    for client in crowd:
        client.echo()
    for client in crowd[::2]:
        client.reset()
    for client in crowd[1::2]:
        client.echo()
    slow = rig.client("bob", rcvbuf=16_384)
    slow.order("send", 16 * MIB, 5)
    rig.client("bob").download(4 * MIB)                     # nobody waits for who does not read
    slow.recv_digest(16 * MIB)
    rig.close_clients()
    proxy.settle()
    proxy.process.send_signal(signal.SIGHUP)
    proxy.wait_log("SIGHUP received")
    time.sleep(0.3)
    before, begin = switches(proxy.pid), time.monotonic()
    time.sleep(1.0)
    assert switches(proxy.pid) - before <= 2 + 2 * (time.monotonic() - begin), "at rest it looks at the configuration once a second"
    client = rig.client("bob")
    client.echo()
    exchange(proxy)
    assert len(proxy.log(f"poller={poller} ")) == 2
    client.echo()
    rig.client("alice").req_pq()


def test_without_uvloop_it_is_said(rig: Rig) -> None:
    proxy = rig.proxy({"general": {"event_loop": "uvloop"}}, command=[sys.executable, "-B", "-c", NO_UVLOOP, str(PROGRAM)])
    proxy.wait_log(r'WARN telemt::cli: general\.event_loop = "uvloop": the uvloop package is not installed, using epoll')
    rig.client().req_pq()
