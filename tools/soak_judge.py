"""What `make soak` holds against the program: samples and counts in, findings out.  Pure, so that tests can plant every fault.

No bound depends on how fast the machine is: memory and descriptors are compared between calm points (every session ended, the
same few idle ones left), counters are compared with what the crowd itself counted, and processor time only where it must be nil.
"""
from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

MIB = 1 << 20
RSS_GROWTH = 4 * MIB        # from calm to calm after the warm-up: malloc keeps what the busiest moment needed, which may come late
RSS_BUSY = 64 * MIB         # above that, at any time: bulk flows hold at most 1 MiB each, and the crowd has at most 24 of them
FDS_PER_CONNECTION = 4      # both sockets and a pair of pipe ends
FDS_SPARE = 48              # listeners, poller, 16 pairs of spare pipes, a file being read
THREADS_SPARE = 2           # helpers start when they are first needed and stay
THREADS_BUSY = 48           # requests of the API and of the metrics have one each
IDLE_CPU = 0.01             # of one core, over a few seconds: nothing to do means nothing done (the file is looked at once a second)
WARM_POINTS = 1             # calm points that only warm up
GRUMBLE = re.compile(r"^\S+ ERROR |Traceback")
EXPECTED = re.compile(r"config reload")         # we wrote those broken files


class Sample(NamedTuple):
    """The process at one moment.  fds: by kind, listeners and spare pipes left out; connections: what the crowd has open to it."""

    at_s: float
    calm: bool
    rss: int
    fds: Mapping[str, int]
    threads: int
    connections: int


@dataclasses.dataclass
class Account:
    """What one instance of the program and its crowd ended with."""

    name: str
    samples: list[Sample] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)             # sessions that failed without excuse, damage, wrong answers
    grumbles: list[str] = dataclasses.field(default_factory=list)           # lines of the log that should not be there
    broken_files: int = 0                       # configuration files that we broke on purpose
    dialled: int = 0                            # connections that the kernel says were made to its port
    accepted: int = 0                           # telemt_connections_total
    bad: int = 0                                # telemt_connections_bad_total
    bad_by_class: int = 0                       # sum of the same by class
    moved: tuple[int, int] = (0, 0)             # bytes from and to the clients of the exact user, as they counted
    counted: tuple[int, int] = (0, 0)           # the same as the program counted
    one_program: bool = True                    # False: programs followed each other, each with counters of its own
    exact_good: int = 0                         # his sessions that ended well
    exact_other: int = 0                        # and those that a planned disturbance ended
    exact_total: int = 0                        # sessions of his that the program counted
    current: Mapping[str, int] = dataclasses.field(default_factory=dict)    # connections that each user still has at the end
    users_file: frozenset[str] = frozenset()
    users_live: frozenset[str] = frozenset()
    idle_cpu: float = 0.0                       # processor seconds per second at the end
    exit_code: int | None = 0
    good: int = 0                               # sessions that ended well


def judge(account: Account) -> list[str]:
    """Everything that is wrong, one line each; empty for a sound run."""
    found = [*memory(account.samples), *descriptors(account.samples), *threads(account.samples), *counters(account), *ends(account)]
    found += [f"fault: {text}" for text in account.faults[:20]]
    if len(account.faults) > 20:
        found.append(f"... and {len(account.faults) - 20} faults more")
    return [f"{account.name}: {text}" for text in found]


def warm(samples: Sequence[Sample]) -> list[Sample]:
    """Calm points after the warm-up."""
    return [sample for sample in samples if sample.calm][WARM_POINTS:]


def memory(samples: Sequence[Sample]) -> Iterable[str]:
    """Resident memory is flat from calm to calm, and bounded between."""
    calm = warm(samples)
    if len(calm) < 2:
        yield f"only {len(calm)} calm points after the warm-up: nothing to compare"
        return
    part = max(1, len(calm) // 3)
    begin, end = (min(sample.rss for sample in some) for some in (calm[:part], calm[-part:]))
    if end - begin > RSS_GROWTH:
        yield f"memory grew from {begin / MIB:.1f} to {end / MIB:.1f} MiB between calm points, more than {RSS_GROWTH / MIB:g}"
    peak = max(sample.rss for sample in samples)
    if peak - begin > RSS_BUSY:
        yield f"memory reached {peak / MIB:.1f} MiB, more than {RSS_BUSY / MIB:g} above {begin / MIB:.1f}"


def descriptors(samples: Sequence[Sample]) -> Iterable[str]:
    """Calm points have the descriptors of the first one; in between each connection has its few."""
    calm = [sample for sample in samples if sample.calm]
    for sample in calm[1:]:
        for kind in sorted({*sample.fds, *calm[0].fds}):
            if sample.fds.get(kind, 0) > calm[0].fds.get(kind, 0):
                yield f"at {sample.at_s:.0f} s, in a calm: {sample.fds[kind]} descriptors of kind {kind}, not {calm[0].fds.get(kind, 0)}"
    for sample in samples:
        limit = sum(calm[0].fds.values()) + FDS_PER_CONNECTION * sample.connections + FDS_SPARE if calm else 0
        if calm and not sample.calm and sum(sample.fds.values()) > limit:
            yield f"at {sample.at_s:.0f} s: {sum(sample.fds.values())} descriptors for {sample.connections} connections"


def threads(samples: Sequence[Sample]) -> Iterable[str]:
    """The same for threads."""
    calm = [sample.threads for sample in samples if sample.calm]
    if calm and calm[-1] > max(calm[:max(1, len(calm) // 2)]) + THREADS_SPARE:
        yield f"{calm[-1]} threads in the last calm, {calm[0]} in the first"
    if calm and (most := max(sample.threads for sample in samples)) > calm[0] + THREADS_BUSY:
        yield f"{most} threads at a time, {calm[0]} in the first calm"


def counters(account: Account) -> Iterable[str]:
    """What was counted is what happened."""
    if account.bad != account.bad_by_class:
        yield f"{account.bad} bad connections, {account.bad_by_class} by class"
    if not account.exact_good:
        yield "not one session of the exact user ended well: nothing was proved"
    if account.one_program:
        yield from exact(account)
    if left := {name: number for name, number in account.current.items() if number}:
        yield f"connections left at the end: {left}"
    if account.users_file != account.users_live:
        yield f"users of the file and of the process differ: {sorted(account.users_file ^ account.users_live)}"


def exact(account: Account) -> Iterable[str]:
    """Connections, and the bytes of the exact user, one by one."""
    if account.accepted != account.dialled:
        yield f"{account.accepted} connections accepted, {account.dialled} made"
    for way, moved, counted in zip(("from", "to"), account.moved, account.counted, strict=True):
        if counted < moved or (counted > moved and not account.exact_other):
            yield f"{counted} bytes counted {way} clients of the exact user, {moved} moved"
    sessions = account.exact_good + account.exact_other
    if not account.exact_good <= account.exact_total <= sessions:
        yield f"{account.exact_total} sessions of the exact user counted, {sessions} made, {account.exact_good} ended well"


def ends(account: Account) -> Iterable[str]:
    """The log, the rest, the end."""
    unexpected = [line for line in account.grumbles if not EXPECTED.search(line)]
    yield from (f"logged: {line}" for line in unexpected[:10])
    expected = len(account.grumbles) - len(unexpected)
    if expected > 2 * account.broken_files:
        yield f"{expected} complaints about {account.broken_files} broken files"
    if account.idle_cpu > IDLE_CPU:
        yield f"idle, it uses {account.idle_cpu:.1%} of a core"
    if account.exit_code != 0:
        yield f"exit code {account.exit_code} after SIGTERM"
    if not account.good:
        yield "not one session ended well"


def bound_per_session(samples: Sequence[Sample], sessions: int) -> float:
    """Bytes per session of the smallest leak that `memory` would have found."""
    return RSS_GROWTH / max(1, sessions)


def leftovers(now: Mapping[str, int], quiet: Mapping[str, int]) -> Counter[str]:
    """Descriptors that count: no listeners (they may open one by one), no pipes (at most 16 pairs are kept for the next bulk flow)."""
    spare = {"listen": now.get("listen", 0), "pipe": quiet.get("pipe", 0) + 32}
    return Counter({kind: max(0, number - spare.get(kind, 0)) for kind, number in now.items()})
