"""What the pollers of general.event_loop cost beside each other: the same works through one proxy for each.

usage: bench_pollers.py [--rounds N] [--quick] [--write]

Every round runs each work through every proxy, in an order that turns by one a round, so that whatever else the machine does hits
all of them; a ratio is that of one round to epoll in the same round, the figure the median of the rounds.
--write: docs/performance-pollers.json and the table in docs/performance.md.
"""
from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import bench
import bench_report
from bench import BACKENDS, MIB, ROOT, Proxy, Rig

POLLERS = ("epoll", "selectors", "uvloop")


class Work(NamedTuple):
    """A row: what is done, what a unit of it costs, and in what."""

    name: str
    unit: str
    cost: Callable[[Rig, Proxy], float]


def works(quick: bool) -> list[Work]:
    """The rows with a cost per unit."""
    trips = 100 if quick else 400

    def echo(count: int) -> Callable[[Rig, Proxy], float]:
        return lambda rig, proxy: 1e6 * bench.echoes(proxy, proxy.port, "tls", count, 32 * trips // count)

    return [
        Work("FakeTLS download, 1 session", "s/GB", lambda rig, proxy: bench.download(rig, proxy, proxy.port, "tls")),
        Work("64 parallel FakeTLS downloads", "s/GB", lambda rig, proxy: bench.parallel(rig, proxy, proxy.port, "tls", 64)),
        Work("128-byte round trip, 1 session", "us", echo(1)),
        Work("128-byte round trip, 32 sessions", "us", echo(32)),
        Work("128-byte round trip, 320 sessions", "us", echo(320)),
        Work("FakeTLS handshake to the first answer", "us",
             lambda rig, proxy: 1e6 * bench.handshakes(proxy, proxy.port, 60 if quick else 200)),
    ]


def measure(rig: Rig, proxies: dict[str, Proxy], todo: list[Work], rounds: int) -> dict[str, Any]:
    """{work: {unit, POLLER: {cost, ratio}}}, interleaved; the first round only warms up."""
    costs: dict[str, dict[str, list[float]]] = {work.name: {name: [] for name in proxies} for work in todo}
    names = list(proxies)
    for number in range(rounds + 1):
        order = names[number % len(names):] + names[:number % len(names)]
        for work in todo:
            for name in order:
                cost = work.cost(rig, proxies[name])
                if number:
                    costs[work.name][name].append(cost)
    return {work.name: {"unit": work.unit, **{name: {
        "cost": median(found), "ratio": median(bench_report.ratios(found, costs[work.name]["epoll"]))}
        for name, found in costs[work.name].items()}} for work in todo}


def rest(proxies: dict[str, Proxy]) -> dict[str, Any]:
    """Memory of a process before its first client, and how often one at rest wakes up."""
    time.sleep(1)                              # the start is over
    before = {name: (proxy.status("VmRSS"), proxy.status("voluntary_ctxt_switches")) for name, proxy in proxies.items()}
    time.sleep(5)
    wakes = {name: (proxy.status("voluntary_ctxt_switches") - before[name][1]) / 5 for name, proxy in proxies.items()}
    first = before["epoll"][0]
    return {"memory before the first client": {"unit": "MB", **{name: {"cost": rss / 1024, "ratio": rss / first}
                                                                for name, (rss, _) in before.items()}},
            "wake-ups per second at rest": {"unit": "", **{name: {"cost": wake, "ratio": 0.0} for name, wake in wakes.items()}}}


def table(rows: dict[str, Any], pollers: list[str]) -> str:
    """Markdown of it all."""
    lines = ["| work | " + " | ".join(pollers) + " |", "|" + "---|" * (1 + len(pollers))]
    for name, row in rows.items():
        cells = [f"{row[poller]['cost']:.3g} {row['unit']}".strip() + (f", {row[poller]['ratio']:.2f}x" if row[poller]["ratio"] else "")
                 for poller in pollers]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print; with --write into the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    bench.raise_fds()
    pollers = [name for name in POLLERS if name != "uvloop" or importlib.util.find_spec("uvloop") is not None]
    rig = Rig((96 if options.quick else 512) * MIB)
    try:
        proxies = {name: rig.proxy(BACKENDS[0], poller=name) for name in pollers}
        rows = rest(proxies)
        rows = measure(rig, proxies, works(options.quick), options.rounds or (3 if options.quick else 9)) | rows
    finally:
        rig.close()
    text = table(rows, pollers)
    print(text)
    if options.write and len(pollers) == len(POLLERS):
        (ROOT / "docs" / "performance-pollers.json").write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        page = ROOT / "docs" / "performance.md"
        page.write_text(bench_report.between(page.read_text(encoding="utf-8"), "pollers", text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
