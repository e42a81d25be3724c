#!/usr/bin/env python3
"""pool_sim - the middle-end pool over simulated time, without sockets.

usage: pool_sim.py [--hours H] [--dcs N] [--endpoints N] [--seed N]

`Sim` is a driver for telemt.PoolPlanner: it performs the actions in a world of endpoints that answer, refuse, say nothing, or lose
their links, moves the clock from event to event, and checks the laws of the planner after every plan.  The tests build their histories
on it.  As a program it plays a pool with flapping endpoints for two days and prints what an operator would want to know.
"""
from __future__ import annotations

import argparse
import heapq
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import telemt
from telemt import Endpoint, Phase

IDLE_CLOSE_S = 60.0            # a middle end closes links without clients after about a minute (middle-proxy-pool.md 9.2)
DIAL_S = 0.15
SILENT_DIAL_S = 10.0           # timeouts.tg_connect


@dataclass
class Site:
    """How an endpoint behaves: `up`, `refuse`, `silent`, or `flap` (links live `life_s`); `outage` overrides it."""

    mode: str = "up"
    life_s: float = 5.0
    outage: str = ""

    @property
    def now(self) -> str:
        return self.outage or self.mode


@dataclass
class Tally:
    """What happened in a simulation."""

    dials: Counter[int] = field(default_factory=Counter)               # hour -> dials
    failed: int = 0
    lost: int = 0
    refused: int = 0
    direct: int = 0
    bound: int = 0
    cut: int = 0
    plans: int = 0
    levels: Counter[str] = field(default_factory=Counter)
    gap_s: dict[int, float] = field(default_factory=dict)              # dc -> longest time without a link though its endpoints answered
    down_s: dict[int, float] = field(default_factory=dict)             # dc -> all of it
    outages: Counter[int] = field(default_factory=Counter)             # dc -> times when none of them did


class Sim:
    """Planner, clock and world.  `check`: verify the laws after each plan (slower)."""

    def __init__(self, seed: int = 1, check: bool = True, now: float = 1000.0, **general: object) -> None:
        self.random = random.Random(seed)
        self.now, self.check = now, check
        self.settings = telemt.Settings(general=telemt.General(**general))
        self.counts = telemt.MeCounters()
        self.counts.level = 2
        self.planner = telemt.PoolPlanner(self.settings, self.random.random, now, self.counts)
        self.sites: dict[Endpoint, Site] = {}
        self.tally = Tally()
        self.lines: list[tuple[telemt.Level, str]] = []
        self.auto = True                        # the world answers dials by itself
        self.open: dict[int, telemt.OpenLink] = {}                     # dials under way
        self.sessions: dict[int, dict[int, int]] = {}                  # link -> {session: dc}
        self.wake_at = -math.inf
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self._gone_since: dict[int, float] = {}
        self._healed_at: dict[int, float] = {}
        self._moved = True                      # links came or went
        self._session_ids = 0
        self._generation = 1
        self._news = False
        self.start = now

    # the world

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._events, (self.now + delay_s, self._serial, call))

    def publish(self, v4: dict[int, list[Endpoint]], default_dc: int = 2, order: tuple[int, ...] = (4,), epoch: int = 1) -> None:
        """A list, a family and a secret are there."""
        for endpoints in v4.values():
            for endpoint in endpoints:
                self.sites.setdefault(endpoint, Site())
        self.planner.on_families(self.now, order, False)
        self.planner.on_secret(self.now, epoch)
        self.planner.on_map(self.now, v4, {}, default_dc)
        self.act()

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.now + seconds
        while True:
            at = min(self._events[0][0] if self._events else math.inf, self.wake_at)
            if at > end:
                break
            self.now = max(self.now, at)
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            self.act()
        self.now = end

    # the driver

    def act(self) -> list[telemt.Action]:
        """Plan, and do what it says."""
        before = self._live() if self.check else {}
        actions: list[telemt.Action] = []
        self._news = True
        while self._news:                       # performing may have told the planner something
            self._news = False
            self.tally.plans += 1
            todo = self.planner.plan(self.now)
            actions += todo
            for action in todo:
                self._perform(action)
        self._watch()
        if self.check:
            self._check(before, actions)
        return actions

    def _perform(self, action: telemt.Action) -> None:
        match action:
            case telemt.OpenLink():
                self.tally.dials[int((self.now - self.start) // 3600)] += 1
                self.open[action.link_id] = action
                if self.auto:
                    self._answer(action)
            case telemt.CloseLink(link_id):
                self._moved = True
                self._end_sessions(self.sessions.pop(link_id), link_id)
            case telemt.CutSessions(link_id, count):
                bound = self.sessions[link_id]
                doomed = {session: bound[session] for session in sorted(bound)[:count]}
                for session in doomed:
                    del bound[session]
                self.tally.cut += len(doomed)
                self._end_sessions(doomed, link_id)
            case telemt.Say(level, text):
                self.tally.levels[level.name] += 1
                if len(self.lines) < 10_000:
                    self.lines.append((level, text))
            case telemt.WakeAt(at):
                self.wake_at = at
            case telemt.DrainLink():
                self._moved = True
            case _:
                pass

    def _end_sessions(self, sessions: dict[int, int], link_id: int) -> None:
        for dc in sessions.values():
            self.planner.on_unbound(self.now, link_id, dc)
        self._news = self._news or bool(sessions)

    def _answer(self, action: telemt.OpenLink) -> None:
        site = self.sites.setdefault(action.endpoint, Site())
        delay_s = {"refuse": 0.03, "silent": SILENT_DIAL_S}.get(site.now, DIAL_S) * (0.8 + 0.4 * self.random.random())
        self.later(delay_s, lambda: self.settle(action.link_id))

    def settle(self, link_id: int) -> None:
        """A dial ends as its endpoint is now."""
        action = self.open.get(link_id)
        if action is None:
            return
        site = self.sites[action.endpoint]
        if site.now in ("refuse", "silent"):
            self.fail(link_id)
            return
        self.ready(link_id)
        if site.now == "flap":
            self.later(site.life_s * (0.5 + self.random.random()), lambda: self.lose(link_id))
        else:
            self.later(IDLE_CLOSE_S, lambda: self._idle_close(link_id))

    def ready(self, link_id: int) -> None:
        del self.open[link_id]
        self._moved = True
        self.sessions[link_id] = {}
        self.planner.on_link_ready(self.now, link_id)

    def fail(self, link_id: int) -> None:
        del self.open[link_id]
        self.tally.failed += 1
        self.planner.on_dial_failed(self.now, link_id)

    def lose(self, link_id: int, why: telemt.Lost = telemt.Lost.ERROR) -> None:
        """A link ends by itself."""
        bound = self.sessions.pop(link_id, None)
        if bound is None:
            return
        self._moved = True
        self.tally.lost += 1
        self.planner.on_link_lost(self.now, link_id, why)
        self._end_sessions(bound, link_id)

    def _idle_close(self, link_id: int) -> None:
        link = self.planner.roster.links.get(link_id)
        if link is None:
            return
        idle_s = self.now - link.idle_at if not link.sessions else 0.0
        if idle_s >= IDLE_CLOSE_S:
            self.lose(link_id, telemt.Lost.EOF)
        else:
            self.later(max(0.001, IDLE_CLOSE_S - idle_s), lambda: self._idle_close(link_id))

    def dial_in(self, dc: int, life_s: float | None = None, waited: bool = False) -> telemt.Way:
        """A session comes."""
        way = self.planner.route(self.now, dc, True, waited)
        if isinstance(way, telemt.Bind):
            self._session_ids += 1
            session, self.tally.bound = self._session_ids, self.tally.bound + 1
            self.sessions[way.link_id][session] = dc
            self.planner.on_bound(self.now, way.link_id, dc)
            if life_s is not None:
                self.later(life_s, lambda: self.hang_up(way.link_id, session))
        elif isinstance(way, telemt.Hold):
            self.later(way.until_at - self.now, lambda: self._again(dc, life_s))
        elif isinstance(way, telemt.GoDirect):
            self.tally.direct += 1
        else:
            self.tally.refused += 1
        return way

    def _again(self, dc: int, life_s: float | None) -> None:
        self.dial_in(dc, life_s, waited=True)

    def hang_up(self, link_id: int, session: int) -> None:
        """A session leaves."""
        bound = self.sessions.get(link_id)
        if bound is not None and session in bound:
            self.planner.on_unbound(self.now, link_id, bound.pop(session))

    # what is watched

    def _live(self) -> dict[int, set[int]]:
        return {group.dc: {link.link_id for link in group.links.values() if link.live} for group in self.planner.roster.groups.values()}

    def outage(self, dcs: list[int], mode: str, seconds: float) -> None:
        """All endpoints of these DCs are gone for a while."""
        for dc in dcs:
            self.tally.outages[dc] += 1
            self._healed_at[dc] = self.now + seconds
            sites = [self.sites[endpoint] for endpoint in self.planner.roster.groups[dc].endpoints]
            for site in sites:
                site.outage = mode
                self.later(seconds, lambda site=site: setattr(site, "outage", ""))        # type: ignore[misc]
            for link in list(self.planner.roster.groups[dc].links.values()):
                self.lose(link.link_id)

    def _watch(self) -> None:
        if not self._moved:
            return
        self._moved = False
        for group in self.planner.roster.groups.values():
            alive = not group.endpoints or any(link.live for link in group.links.values())
            if not alive:
                self._gone_since.setdefault(group.dc, self.now)
            elif group.dc in self._gone_since:
                gap_s = max(0.0, self.now - max(self._gone_since.pop(group.dc), self._healed_at.get(group.dc, -math.inf)))
                self.tally.gap_s[group.dc] = max(gap_s, self.tally.gap_s.get(group.dc, 0.0))
                self.tally.down_s[group.dc] = self.tally.down_s.get(group.dc, 0.0) + gap_s

    def _check(self, before: dict[int, set[int]], actions: list[telemt.Action]) -> None:
        roster, general = self.planner.roster, self.planner.roster.general
        limit = max(1, general.me_reconnect_max_concurrent_per_dc)
        # a plan is complete, and nothing is due before the moment it names
        patience_s = min(self.wake_at - self.now, 100.0)
        for moment in (self.now, self.now + 0.999 * patience_s) if patience_s > 0.001 else (self.now,):
            again = self.planner.plan(moment)
            assert len(again) == 1 and isinstance(again[0], telemt.WakeAt), f"a second plan at +{moment - self.now} wants {again}"
            assert again[0].at >= self.wake_at - 1e-6, f"{again} is earlier than {self.wake_at}"
        assert self.wake_at > self.now
        # dials
        for action in actions:
            if isinstance(action, telemt.OpenLink):
                group = roster.groups[action.dc]
                assert roster.may_dial and action.endpoint in group.endpoints, f"{action} is not listed"
                bypass = (len(group.endpoints) == 1 and general.me_single_endpoint_outage_mode_enabled
                          and general.me_single_endpoint_outage_disable_quarantine)
                held = roster.quarantine.until_at(self.now, action.endpoint) > self.now
                assert not held or bypass, f"{action} is in quarantine"
        dials = Counter(link.dc for link in roster.links.values() if link.phase is Phase.DIALLING)
        dialled = {action.dc for action in actions if isinstance(action, telemt.OpenLink)}
        assert all(dials[dc] <= limit for dc in dialled) and dials.total() <= telemt.DIALS_MAX, dials
        # links
        after = self._live()
        for dc, links in before.items():
            if dc in roster.groups and roster.groups[dc].endpoints and links:
                assert after[dc], f"DC {dc} lost its last link by our own doing: {actions}"
        known = {link.link_id for link in roster.links.values() if link.phase is not Phase.DIALLING}
        assert known == set(self.sessions), known ^ set(self.sessions)
        assert {link.link_id for link in roster.links.values() if link.phase is Phase.DIALLING} == set(self.open)
        for link in roster.links.values():
            assert link.sessions == len(self.sessions.get(link.link_id, ()))
            assert roster.groups[link.dc].links[link.link_id] is link
            assert link.phase is not Phase.DRAINING or link.sessions, "an empty draining link was kept"
            assert link.phase is not Phase.WARM or link.generation == roster.generations.pending
            assert link.phase is not Phase.ACTIVE or link.generation <= roster.generations.active
        assert self.counts.draining == sum(link.phase is Phase.DRAINING for link in roster.links.values())
        assert sum(self.planner.load.values()) == sum(map(len, self.sessions.values()))
        for group in roster.groups.values():
            replacing = [link for link in group.links.values() if link.phase is Phase.DIALLING
                         and link.purpose in (telemt.Purpose.REFRESH, telemt.Purpose.ROTATE)]
            assert len(replacing) <= 1
            assert group.endpoints or group.links, "an empty group was kept"
            ready, need = group.count(Phase.ACTIVE), self.planner._need(group, telemt.Due(self.now))
            assert ready >= need or not roster.may_dial or group.dialling() or self.wake_at < math.inf, f"DC {group.dc} is forgotten"
        # numbers
        assert roster.generations.active >= self._generation
        self._generation = roster.generations.active
        totals = self.counts.totals
        assert totals["reconnect_success_total"] <= totals["reconnect_attempt_total"]
        assert totals["writer_removed_unexpected_total"] <= totals["writer_removed_total"]
        # a session finds a link of its own group, and a bindable one, if there is any
        for dc, group in ((dc, group) for dc, group in roster.groups.items() if dc in roster.listed.groups):
            bindable = [link for link in group.links.values()
                        if link.phase is not Phase.DIALLING and roster.bindable_until(link) > self.now]
            picked = self.planner.dispatch.pick(self.now, dc)
            assert (picked in bindable) if bindable else picked is None
        telemt.pool_snapshot(self.planner, self.now)


def endpoints(dcs: int, each: int) -> dict[int, list[Endpoint]]:
    """A list of `dcs` data centres with `each` endpoints."""
    return {dc: [(f"10.0.{dc}.{n}", 8888) for n in range(1, each + 1)] for dc in range(1, dcs + 1)}


def two_days(hours: float = 48.0, dcs: int = 10, each: int = 4, seed: int = 1, check: bool = False) -> Sim:
    """Return a finished simulation: endpoints flap, fall silent, refuse and recover; sessions come and go; the list changes at times."""
    sim = Sim(seed, check)
    sim.lines = []
    listed = endpoints(dcs, each)
    sim.publish(listed)
    chance = sim.random

    def trouble() -> None:
        """Every minute or so something changes for one endpoint; it is bad for a few minutes."""
        site = sim.sites[chance.choice(sorted(sim.sites))]
        site.mode = chance.choice(("flap", "flap", "refuse", "silent"))
        site.life_s = chance.choice((1.0, 5.0, 15.0, 40.0))
        sim.later(chance.uniform(30, 600), lambda: setattr(site, "mode", "up"))
        sim.later(chance.expovariate(1 / 60), trouble)

    def visitor() -> None:
        sim.dial_in(chance.choice((1, -1)) * chance.randint(1, dcs), chance.expovariate(1 / 300))
        sim.later(chance.expovariate(1 / 20), visitor)

    def relist() -> None:
        """Twice a day one data centre gets another endpoint in the place of its first."""
        dc = chance.randint(1, dcs)
        listed[dc] = [*listed[dc][1:], (f"10.1.{dc}.{chance.randint(1, 254)}", 443)]
        sim.publish(listed, epoch=1 + int(chance.random() < 0.3))
        sim.later(12 * 3600, relist)

    def disaster() -> None:
        """Every three hours or so a whole data centre is gone for minutes; every fourth time all are."""
        everything = sim.tally.outages.total() % 4 == 3
        gone = list(listed) if everything else [chance.choice(list(listed))]
        sim.outage(gone, chance.choice(("refuse", "silent")), chance.uniform(20, 900))
        sim.later(chance.expovariate(1 / 10_000), disaster)

    sim.later(60, trouble)
    sim.later(2 * 3600, disaster)
    sim.later(1, visitor)
    sim.later(6 * 3600, relist)
    sim.run(hours * 3600)
    return sim


def report(sim: Sim, hours: float) -> str:
    """The summary that is printed."""
    tally, totals = sim.tally, sim.counts.totals
    per_hour = [tally.dials[hour] for hour in range(max(1, math.ceil(hours)))]
    lines = [f"dials per hour: min {min(per_hour)}, mean {sum(per_hour) / len(per_hour):.0f}, max {max(per_hour)}"
             f"  (failed {tally.failed}, links lost {tally.lost}, plans {tally.plans})"]
    for dc in sorted(sim.planner.roster.groups):
        down = tally.down_s.get(dc, 0.0)
        lines.append(f"DC {dc:3}: coverage {100 - 100 * down / (hours * 3600):7.3f} %, longest gap {tally.gap_s.get(dc, 0.0):6.2f} s,"
                     f" {tally.outages[dc]} outages not counted")
    lines.append(f"sessions: {tally.bound} bound, {tally.direct} direct, {tally.refused} refused, {tally.cut} cut at a drain deadline")
    shown = ("pool_swap_total", "endpoint_quarantine_total", "refill_triggered_total", "refill_failed_total", "writer_removed_total",
             "writer_removed_unexpected_total", "reconnect_attempt_total", "reconnect_success_total")
    lines += [f"{name} {totals[name]}" for name in shown]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="the middle-end pool over simulated time")
    parser.add_argument("--hours", type=float, default=48.0)
    parser.add_argument("--dcs", type=int, default=10)
    parser.add_argument("--endpoints", type=int, default=4, help="per data centre")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="verify the planner's laws after every plan (slow)")
    options = parser.parse_args()
    started = time.monotonic()
    sim = two_days(options.hours, options.dcs, options.endpoints, options.seed, options.check)
    print(report(sim, options.hours))
    print(f"{options.hours:g} simulated hours in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
