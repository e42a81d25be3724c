"""The bench's arithmetic and its documents: ratios, tables, the plot, the guard."""
from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MISSED = 3                         # exit code: everything was measured, a target was missed
_FOLDER = Path(__file__).resolve().parent.parent / "build" / "bench"
_BOOKS = ("telemt.py", "telemt_api.py", "tools/bench*.py")
WORSE = 1.25                       # the guard trips when a ratio is this much above the committed one, twice in a row


class Kept:
    """The finished parts of a run, in a file: a run that was interrupted goes on with the next one.

    Parts of another program count for nothing: the file names the sources they were measured with.  `use`: False keeps nothing.
    """

    def __init__(self, name: str, *, use: bool = True, folder: Path = _FOLDER, books: Sequence[str] = _BOOKS) -> None:
        self.path = folder / f"{name}.json" if use else None
        root = _FOLDER.parent.parent
        sources = hashlib.sha256(b"".join(path.read_bytes() for book in books for path in sorted(root.glob(book)))).hexdigest()
        self.data: dict[str, Any] = {"sources": sources, "parts": {}}
        if self.path is not None and self.path.exists():
            before = json.loads(self.path.read_text(encoding="utf-8"))
            self.data = before if before["sources"] == sources else self.data

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns (JSON), or returned in a run before."""
        parts = self.data["parts"]
        if name in parts:
            print(f"  {name}: measured before", flush=True)
            return parts[name]
        parts[name] = make()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.path.with_suffix(".new")
            fresh.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
            fresh.replace(self.path)
        return parts[name]

    @staticmethod
    def forget(folder: Path = _FOLDER) -> None:
        """The next run begins anew."""
        shutil.rmtree(folder, ignore_errors=True)


def ratios(costs: Sequence[float], bare: Sequence[float]) -> list[float]:
    """Cost of each round as a multiple of the reference of the same round."""
    if len(costs) != len(bare):
        raise ValueError("every round has one reference")
    return [cost / reference for cost, reference in zip(costs, bare, strict=True)]


def one_line(name: str, row: dict[str, Any], backends: Sequence[str]) -> str:
    """A row as progress output."""
    parts = [f"{backend} {row[backend]['cost']:.3g} {row['unit']} = {row[backend]['ratio']:.2f}x" for backend in backends]
    goal = f" (target {row['target']:g}x)" if row["target"] else ""
    return f"{name}: {', '.join(parts)}; {row['reference']} {row['bare']:.3g} {row['unit']}{goal}"


def verdict(value: float, target: float) -> str:
    """`1.21x` or `1.41x (missed)`."""
    return f"{value:.2f}x" if not target or value <= target else f"**{value:.2f}x (missed)**"


def table(rows: dict[str, Any], backends: Sequence[str]) -> str:
    """Markdown of the rows that have a reference."""
    head = ["work", "target", *(f"{backend}: cost, ratio" for backend in backends), "bare loop"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in rows.items():
        cells = [name, f"<= {row['target']:g}x {row['reference']}" if row["target"] else "-"]
        cells += [f"{row[backend]['cost']:.3g} {row['unit']}, {verdict(row[backend]['ratio'], row['target'])}" for backend in backends]
        lines.append("| " + " | ".join([*cells, f"{row['reference']} {row['bare']:.3g} {row['unit']}"]) + " |")
    return "\n".join(lines)


FIGURES: Sequence[tuple[str, str, tuple[str, ...], dict[str, float], str]] = (
    # label, target text, path in the backend's figures, limit per backend ("*" = all), format
    ("64 parallel FakeTLS downloads, ratio to the single one", "<= 1.5x", ("parallel", "ratio"), {"*": 1.5}, "{:.2f}x"),
    ("the same ratio of a bare loop", "-", ("parallel", "bare_ratio"), {}, "{:.2f}x"),
    ("64 parallel FakeTLS downloads, ratio to that bare loop", "-", ("parallel", "to_bare"), {}, "{:.2f}x"),
    ("handshake, per further user tried", "<= 4 us", ("per_user_us",), {"*": 4.0}, "{:.2f} us"),
    ("handshake with 1,000 users, IP seen before, ratio to 1 user", "<= 1x (+ noise)", ("seen_ratio",), {"*": 1.1}, "{:.2f}x"),
    ("idle FakeTLS session", "<= 6 KB", ("session_kb",), {"*": 6.0}, "{:.2f} KB"),
    ("wake-ups per second, all sessions idle (one looks at the configuration file)", "<= 1", ("wakeups_per_s",), {"*": 1.34},
     "{:.1f}"),
    ("whole process with these sessions", "<= 34 MB", ("total_mb",), {"*": 34.0}, "{:.1f} MB"),
    ("time to close all of them", "-", ("close_all_s",), {}, "{:.2f} s"),
    ("10,000 idle sessions (or as many as the system has descriptors for)", "-", ("ten_thousand", "sessions"), {}, "{:.0f}"),
    ("the same: whole process", "-", ("ten_thousand", "total_mb"), {}, "{:.1f} MB"),
    ("the same: wake-ups per second", "<= 1", ("ten_thousand", "wakeups_per_s"), {"*": 1.34}, "{:.1f}"),
    ("the same: time to close all of them", "-", ("ten_thousand", "close_all_s"), {}, "{:.2f} s"),
    ("start to listening", "<= 0.4 s", ("ready_s",), {"*": 0.4}, "{:.2f} s"),
    ("base memory", "<= 22 MB, libcrypto 17", ("base_mb",), {"cryptography": 22.0, "libcrypto": 17.0}, "{:.1f} MB"),
    ("p99 of 128-byte round trips beside a full-speed download, ratio to undisturbed", "<= 3x", ("fairness", "ratio"), {"*": 3.0},
     "{:.2f}x"),
    ("the same with the download through another process, only the machine shared (control)", "-", ("fairness", "control_ratio"), {},
     "{:.2f}x"),
    ("the same p99, undisturbed", "-", ("fairness", "alone_ms"), {}, "{:.2f} ms"),
    ("client behind 1 Mbit/s: CPU of the proxy", "-", ("slow_client", "cpu_ms_per_s"), {}, "{:.2f} ms/s"),
    ("client behind 1 Mbit/s: wake-ups per second", "-", ("slow_client", "wakeups_per_s"), {}, "{:.1f}"),
    ("20 clients behind 1 Mbit/s: growth of the proxy", "-", ("slow_client", "growth_kb"), {}, "{:.0f} KB"),
    ("1 % of 2,000 sessions active: round trip, ratio to those alone", "-", ("sparse", "ratio"), {}, "{:.2f}x"),
)


def dig(data: dict[str, Any], path: Sequence[str]) -> float:
    """The number at a path of nested dicts."""
    value: Any = data
    for step in path:
        value = value[step]
    return float(value)


def figure_table(figures: dict[str, Any], backends: Sequence[str]) -> str:
    """Markdown of the figures that have no bare loop."""
    lines = ["| figure | target | " + " | ".join(backends) + " |", "|" + "---|" * (2 + len(backends))]
    for label, goal, path, limits, form in FIGURES:
        cells = []
        for backend in backends:
            value = dig(figures[backend], path)
            limit = limits.get(backend, limits.get("*", float("inf")))
            cells.append(form.format(value) if value <= limit else f"**{form.format(value)} (missed)**")
        lines.append(f"| {label} | {goal} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def between(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers `<!-- NAME -->` and `<!-- /NAME -->` replaced."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the document needs {begin} and {end} once each")
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{content}\n{end}{tail}"


def spread(values: Sequence[float]) -> float:
    """How far the largest value is above the smallest: 0.2 = within 20 %."""
    return max(values) / min(values) - 1


SCALED: Sequence[tuple[str, str, str]] = (("s_per_gb", "download, CPU s/GB", "tab:blue"),
                                          ("us_per_trip", "128-byte round trip, CPU us", "tab:orange"))


def plot(scaling: dict[str, list[float]], target: Path) -> None:
    """Draw cost per byte and per event against the number of sessions; dashed: the bare loops."""
    import matplotlib
    matplotlib.use("svg")
    from matplotlib import pyplot
    matplotlib.rcParams["svg.hashsalt"] = "telemt"
    figure, left = pyplot.subplots(figsize=(7, 3.6))
    left.set(xscale="log", xlabel="FakeTLS sessions")
    for axis, (name, label, color) in zip((left, left.twinx()), SCALED, strict=True):
        axis.plot(scaling["sessions"], scaling[name], "o-", color=color, label="telemt.py")
        axis.plot(scaling["sessions"], scaling["bare_" + name], "x--", color=color, alpha=0.6, label="bare loop")
        axis.set_ylabel(label, color=color)
        axis.set_ylim(0, 1.6 * max(scaling[name]))
    left.legend(loc="lower right")
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})


def scaling_table(scaling: dict[str, list[float]]) -> str:
    """Markdown of the scaling, with the bare loops beside it."""
    lines = ["| sessions | download, s/GB | bare loop | ratio | round trip, us | bare loop | ratio |", "|---|---|---|---|---|---|---|"]
    rows = zip(*(scaling[name] for name in ("sessions", "s_per_gb", "bare_s_per_gb", "us_per_trip", "bare_us_per_trip")), strict=True)
    lines += [f"| {int(count):,} | {gb:.3f} | {bare_gb:.3f} | {gb / bare_gb:.2f} | {trip:.1f} | {bare_trip:.1f} | {trip / bare_trip:.2f} |"
              for count, gb, bare_gb, trip, bare_trip in rows]
    words = []
    for name, label in (("s_per_gb", "per byte"), ("us_per_trip", "per event")):
        words.append(f"{label} {spread(scaling[name]):.0%}, of the ratio to the bare loop "
                     f"{spread(ratios(scaling[name], scaling['bare_' + name])):.0%}")
    return "\n".join([*lines, "", f"Spread: {'; '.join(words)}."])


# What the capacity table takes for granted; its document says so in the same words.
SLOTS, PER_PERSON, USED = 10_000, 10, 0.7          # connections of a process; of an app; how much of a core is planned for
KBIT_S, TRIPS_S, DIALS_MIN = 100, 0.2, 2           # of a person in the busy hour: traffic, messages per second, connections per minute
PLACES: Sequence[tuple[str, int, int]] = (("one core", 1, 1), ("four cores", 4, 1), ("ten hosts of four cores", 4, 10))


def capacity_table(found: dict[str, Any], backend: str = "cryptography") -> str:
    """Markdown: what some numbers of cores carry, and the arithmetic, from the figures of performance.json."""
    rows, figures = found["rows"], found["figures"][backend]

    def cost(name: str) -> float:
        return float(rows[name][backend]["cost"])
    bulk, small, dial_us = cost("FakeTLS download, 1 session"), cost("FakeTLS download in 4 KiB writes"), cost(
        "FakeTLS handshake to the first answer, 1 user")
    trip_us = max(found["scaling"]["us_per_trip"][2:])             # with hundreds of sessions and more: one alone is woken for each
    gb_s = KBIT_S / 8e6
    parts = (("traffic", f"{KBIT_S} kbit/s x {small:.2f} s/GB", gb_s * small * 1e6), ("messages", f"{TRIPS_S:g}/s x {trip_us:.1f} us",
             TRIPS_S * trip_us), ("connections", f"{DIALS_MIN}/min x {dial_us:.0f} us", DIALS_MIN / 60 * dial_us))
    person_us = sum(us for _, _, us in parts)
    people = SLOTS // PER_PERSON
    memory_mb = figures["base_mb"] + SLOTS * figures["session_kb"] / 1024
    lines = ["| | " + " | ".join(name for name, _, _ in PLACES) + " |", "|---|" + "---|" * len(PLACES)]
    table_rows: Sequence[tuple[str, Callable[[int, int], str]]] = (
        ("processes, one per core", lambda cores, hosts: f"{cores * hosts:,}"),
        ("connections", lambda cores, hosts: f"{SLOTS * cores * hosts:,}"),
        ("people online", lambda cores, hosts: f"{people * cores * hosts:,}"),
        ("memory per host", lambda cores, hosts: f"{memory_mb * cores:.0f} MB"),
        ("their traffic per host", lambda cores, hosts: f"{people * cores * KBIT_S / 1000:,.0f} Mbit/s"),
        ("share of each core that they use", lambda cores, hosts: f"{people * person_us / 1e4:.0f} %"),
        ("most traffic per host, 4 KiB at a time", lambda cores, hosts: f"{cores * USED / small * 8:.1f} Gbit/s"),
        ("most traffic per host, 1 MiB at a time", lambda cores, hosts: f"{cores * USED / bulk * 8:.0f} Gbit/s"),
        ("most new connections per second", lambda cores, hosts: f"{cores * hosts * USED / dial_us * 1e6:,.0f}"),
        ("most messages per second", lambda cores, hosts: f"{cores * hosts * USED / trip_us * 1e6:,.0f}"))
    lines += [f"| {label} | " + " | ".join(show(cores, hosts) for _, cores, hosts in PLACES) + " |" for label, show in table_rows]
    told = " + ".join(f"{us:.1f} us ({name}: {how})" for name, how, us in parts)
    return "\n".join([
        *lines, "", "The arithmetic:", "",
        f"- people online = {SLOTS:,} connections of a process / {PER_PERSON} of an app = {people:,} per process",
        f"- memory = {figures['base_mb']:.1f} MB + {SLOTS:,} x {figures['session_kb']:.2f} KB = {memory_mb:.0f} MB per process",
        f"- a second of a person costs {told} = {person_us:.1f} us",
        f"- {people:,} people x {person_us:.1f} us = {people * person_us / 1e4:.0f} % of a core",
        f"- most traffic = {USED:.0%} of a core / {small:.2f} s/GB (4 KiB at a time) or / {bulk:.3f} s/GB (1 MiB at a time)",
        f"- most connections = {USED:.0%} of a core / {dial_us:.0f} us; most messages = {USED:.0%} of a core / {trip_us:.1f} us"])


def write(found: dict[str, Any], docs: Path, backends: Sequence[str]) -> None:
    """Write performance.json, the generated parts of performance.md and operations.md, and the plot."""
    (docs / "performance.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    page = docs / "performance.md"
    text = page.read_text(encoding="utf-8")
    facts = "\n".join(f"- {name}: {value}" for name, value in found["machine"].items())
    figures = found["figures"]
    text = between(text, "machine", f"{facts}\n- rounds: {found['rounds']}, medians")
    text = between(text, "rows", table(found["rows"], backends))
    text = between(text, "figures", figure_table(figures, backends) + f"\n\nCompiling `telemt.py`: {figures['compile_ms']:.0f} ms. "
                   f"AES-CTR in pure Python: {figures['pure_python_mb_per_s']:.1f} MB/s (target 0.6).")
    scaling = found["scaling"]
    page.write_text(between(text, "scaling", scaling_table(scaling)), encoding="utf-8")
    page = docs / "operations.md"
    page.write_text(between(page.read_text(encoding="utf-8"), "capacity", capacity_table(found)), encoding="utf-8")
    plot(scaling, docs / "images" / "scaling.svg")


def worse(now: dict[str, Any], committed: dict[str, Any], backends: Sequence[str]) -> list[str]:
    """Rows whose ratio is more than a quarter above the committed one: `name (backend): 1.10 -> 1.50`."""
    found = []
    for name, row in now.items():
        for backend in backends:
            before = committed.get(name, {}).get(backend, {}).get("ratio")
            if before is not None and row[backend]["ratio"] > max(before, 1.0) * WORSE:        # below one is luck
                found.append(f"{name} ({backend}): {before:.2f} -> {row[backend]['ratio']:.2f}")
    return found


def check(run: Callable[[], dict[str, Any]], committed: Path, backends: Sequence[str]) -> int:
    """Run once, and again if something got worse; 1 if the same row is worse both times."""
    before = json.loads(committed.read_text(encoding="utf-8"))["rows"]
    first = worse(run(), before, backends)
    if not first:
        print("no ratio is worse than the committed table by more than a quarter")
        return 0
    print("worse, running again: " + "; ".join(first))
    second = worse(run(), before, backends)
    again = [row for row in second if row.partition(":")[0] in {other.partition(":")[0] for other in first}]
    print("\n".join(f"WORSE {row}" for row in again) or "not confirmed by the second run")
    return 1 if again else 0
