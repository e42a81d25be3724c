"""Laws of room 12: whatever happens to the pool, in whatever order, no plan breaks a rule (pool_sim.Sim._check lists them).

A history is a mixture of dials that succeed or fail, losses, map, family, secret and settings changes, sessions, idle periods and jumps
of the clock.  20,000 histories in `make laws`, 500 in `make test`, in ten parts so that they spread over processes.
"""
from __future__ import annotations

import math
import os
import time

import hypothesis
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import pool_sim
import telemt
from pool_sim import Sim

PARTS = 10
BIG = os.environ.get("HYPOTHESIS_PROFILE") == "big"
HISTORIES = 20_000 if BIG else 500
POINTS = [(f"10.0.0.{n}", 443) for n in range(1, 7)] + [("2001:db8::1", 443), ("2001:db8::2", 443)]
FOUR, SIX = [point for point in POINTS if "." in point[0]], [point for point in POINTS if ":" in point[0]]


def lists(points: list[telemt.Endpoint]) -> st.SearchStrategy[dict[int, list[telemt.Endpoint]]]:
    return st.dictionaries(st.sampled_from((1, 2, 3, -1, -2, 203)), st.lists(st.sampled_from(points), max_size=4), max_size=4)


GENERAL = st.fixed_dictionaries({
    "hardswap": st.booleans(), "me_floor_mode": st.sampled_from(("static", "adaptive")),
    "me_reinit_every_secs": st.sampled_from((20, 300, 900)),
    "me_single_endpoint_outage_mode_enabled": st.booleans(), "me_single_endpoint_outage_disable_quarantine": st.booleans(),
    "me_reinit_drain_timeout_secs": st.sampled_from((0, 5, 120)), "me_pool_min_fresh_ratio": st.sampled_from((0.0, 0.5, 0.8, 1.0)),
    "me_bind_stale_mode": st.sampled_from(("never", "ttl", "always")), "me_reconnect_max_concurrent_per_dc": st.sampled_from((0, 1, 8)),
    "auto_degradation_enabled": st.booleans(), "me_single_endpoint_shadow_rotate_every_secs": st.sampled_from((0, 60, 900)),
    "me_warmup_stagger_enabled": st.booleans(), "me_deterministic_writer_sort": st.booleans(),
    "me_adaptive_floor_idle_secs": st.sampled_from((0, 90)), "me_reconnect_fast_retry_count": st.sampled_from((0, 3, 16)),
})


class Histories(RuleBasedStateMachine):
    """One pool and everything that can happen to it."""

    @initialize(seed=st.integers(0, 1 << 30), general=GENERAL, default=st.sampled_from((0, 2, 9)), known=lists(FOUR))
    def begin(self, seed, general, default, known):
        self.sim = Sim(seed, **general)
        self.sim.auto = False
        self.default, self.epoch = default, 1
        self.v4, self.v6, self.order = known or {2: FOUR[:3]}, {}, (4,)
        self.sim.planner.on_secret(self.sim.now, 1)
        self.sim.planner.on_families(self.sim.now, self.order, False)
        self.relist()

    def relist(self):
        self.sim.planner.on_map(self.sim.now, self.v4, self.v6, self.default)
        self.sim.act()

    def pick(self, items, data):
        return data.draw(st.sampled_from(sorted(items)))

    @rule(seconds=st.sampled_from((0.0, 0.01, 0.3, 1.3, 7.0, 30.0, 61.0, 300.0, 5000.0)))
    def time_passes(self, seconds):
        """A leap longer than the next wake is a clock jump or a stopped process: the plan comes late."""
        self.sim.now += seconds
        self.sim.act()

    @rule(steps=st.integers(1, 8))
    def wakes_pass(self, steps):
        for _ in range(steps):
            if self.sim.wake_at < math.inf:
                self.sim.now = self.sim.wake_at
                self.sim.act()

    @rule(share=st.sampled_from((0.0, 0.5, 1.0)), seconds=st.sampled_from((0.1, 2.0)))
    def dials_end(self, share, seconds):
        self.sim.now += seconds
        for link_id in sorted(self.sim.open):
            (self.sim.ready if self.sim.random.random() < share else self.sim.fail)(link_id)
        self.sim.act()

    @rule(data=st.data(), good=st.booleans())
    def one_dial_ends(self, data, good):
        if self.sim.open:
            (self.sim.ready if good else self.sim.fail)(self.pick(self.sim.open, data))
            self.sim.act()

    @rule(data=st.data(), why=st.sampled_from(telemt.Lost))
    def a_link_is_lost(self, data, why):
        if self.sim.sessions:
            self.sim.lose(self.pick(self.sim.sessions, data), why)
            self.sim.act()

    @rule(share=st.sampled_from((0.5, 1.0)))
    def many_links_are_lost(self, share):
        for link_id in sorted(self.sim.sessions):
            if self.sim.random.random() < share:
                self.sim.lose(link_id)
        self.sim.act()

    @rule(known=lists(FOUR), default=st.sampled_from((0, 2, 9)))
    def the_list_changes(self, known, default):
        before = len(self.sim.planner.roster.links)
        if any(known.values()) or any(self.v6.values()):
            self.v4, self.default = known, default
            self.relist()
            return
        self.sim.planner.on_map(self.sim.now, known, {}, default)      # refused
        actions = self.sim.planner.plan(self.sim.now)
        assert not [action for action in actions if not isinstance(action, (telemt.Say, telemt.WakeAt))], "an empty list moved something"
        assert len(self.sim.planner.roster.links) == before

    @rule(known=lists(SIX), order=st.sampled_from(((4,), (4, 6), (6, 4), (6,), ())), multipath=st.booleans())
    def the_families_change(self, known, order, multipath):
        self.v6 = known
        self.sim.planner.on_families(self.sim.now, order, multipath)
        self.sim.act()
        if any(self.v4.values()) or any(known.values()):
            self.relist()

    @rule(have=st.booleans())
    def the_secret_changes(self, have):
        self.epoch += 1
        self.sim.planner.on_secret(self.sim.now, self.epoch if have else 0)
        self.sim.act()

    @rule(general=GENERAL)
    def the_settings_change(self, general):
        self.sim.planner.apply(self.sim.now, telemt.Settings(general=telemt.General(**general)))
        self.sim.act()

    @rule(dc=st.sampled_from((1, -1, 2, -2, 3, 203, -203, 7)), count=st.integers(1, 30))
    def sessions_come(self, dc, count):
        for _ in range(count):
            way = self.sim.dial_in(dc)
            if isinstance(way, telemt.Bind):
                link = self.sim.planner.roster.links[way.link_id]
                assert link.dc == self.sim.planner.roster.listed.group_of(dc), "bound across groups"
            elif isinstance(way, telemt.GoDirect):
                assert self.sim.planner.availability.degraded_at is not None and self.sim.planner.roster.general.auto_degradation_enabled
        self.sim.act()

    @rule(dc=st.sampled_from((1, -2, 7)), has_direct=st.booleans())
    def a_session_has_waited(self, dc, has_direct):
        way = self.sim.planner.route(self.sim.now, dc, has_direct, waited=True)
        direct = has_direct and self.sim.planner.roster.general.auto_degradation_enabled
        assert isinstance(way, telemt.Bind) or isinstance(way, telemt.GoDirect) == direct
        self.sim.act()

    @rule(share=st.sampled_from((0.3, 1.0)))
    def sessions_leave(self, share):
        for link_id, bound in sorted(self.sim.sessions.items()):
            for session in sorted(bound):
                if self.sim.random.random() < share:
                    self.sim.hang_up(link_id, session)
        self.sim.act()

    @rule(data=st.data())
    def keepalive_asks(self, data):
        if self.sim.sessions:
            link_id = self.pick(self.sim.sessions, data)
            beat = self.sim.planner.beat(self.sim.now, link_id, heard=data.draw(st.booleans()))
            assert 0 < beat.again_s < 60 and not (beat.ping and beat.dead)
            if beat.dead:
                self.sim.lose(link_id, telemt.Lost.SILENT)
            elif beat.ping and data.draw(st.booleans()):
                self.sim.planner.on_pong(self.sim.now, link_id, data.draw(st.floats(0, 5000)))
            self.sim.act()

    @invariant()
    def degradation_says_what_is(self):
        if hasattr(self, "sim"):
            routes = telemt.route_snapshot(self.sim.planner, self.sim.now, 1_700_000_000.0, 0)
            assert routes.middle == (routes.direct_since_wall == 0)

    def teardown(self):
        """Whatever happened: with a good world for a while, every group meets its floor and nothing drains for ever."""
        if not hasattr(self, "sim"):
            return
        sim = self.sim
        sim.auto = True
        if not any(self.v4.values()):
            self.v4 = {2: FOUR[:3]}
        sim.planner.on_secret(sim.now, 99_999)
        sim.planner.on_families(sim.now, (4,), False)
        sim.planner.apply(sim.now, telemt.Settings(general=telemt.General(me_reinit_every_secs=900)))
        self.relist()
        for link_id in sorted(sim.open):
            sim._answer(sim.open[link_id])
        sim.check = False                       # the laws held on every plan so far; this is about where it ends
        sim.run(200)
        sim.check = True
        sim.act()
        for group in sim.planner.roster.groups.values():
            need = sim.planner._need(group, telemt.Due(sim.now))
            ready = group.count(telemt.Phase.ACTIVE)
            assert ready >= min(need, 1) and ready + group.young(telemt.Purpose) >= need - 1
        assert sim.planner.availability.degraded_at is None


def part(number: int) -> type:
    """One tenth of the histories as a test of its own."""
    machine = type(f"Histories{number}", (Histories,), {})
    case = machine.TestCase
    # no shrinking: a history is readable as it is, and shrinking thousands of plans would outlast the limit of a test
    case.settings = hypothesis.settings(max_examples=HISTORIES // PARTS, stateful_step_count=30, deadline=None,
                                        phases=[hypothesis.Phase.reuse, hypothesis.Phase.generate],
                                        suppress_health_check=list(hypothesis.HealthCheck))
    return case


globals().update({f"TestHistories{number}": part(number) for number in range(PARTS)})


def test_48_hours():
    """Ten data centres with four endpoints each that flap, refuse, fall silent and vanish: every DC is served, and nobody is hammered."""
    hours, started = (48.0 if BIG else 4.0), time.process_time()
    sim = pool_sim.two_days(hours)
    seconds = time.process_time() - started
    print(f"{pool_sim.report(sim, hours)}\n{hours:g} simulated hours in {seconds:.1f} s of processor time")
    # the longest back-off is 30 s and half of it at random; then a dial, perhaps to an endpoint that does not answer at first
    assert max(sim.tally.gap_s.values(), default=0.0) < 60.0
    assert all(down_s < 0.003 * hours * 3600 for down_s in sim.tally.down_s.values())
    # forty idle links are replaced every 50 s: 2,880 dials an hour without any trouble; a swap adds 160
    assert max(sim.tally.dials.values()) < 6000
    assert sim.counts.totals["pool_swap_total"] >= hours * 3600 / 900 * 0.9 and sim.tally.refused == 0
    assert seconds < 20 * (1 if BIG else 0.25)
