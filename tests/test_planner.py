"""Room 12: the planner, organ by organ, and the pool over simulated time."""
from __future__ import annotations

import math
import time

import pytest

import pool_sim
import telemt
from pool_sim import Sim, endpoints
from telemt import Phase, Purpose

A, B, C = ("10.0.0.1", 443), ("10.0.0.2", 443), ("10.0.0.3", 443)
SIX = ("2001:db8::1", 80)


# -- the pieces

def test_a_pace_doubles_up_to_its_cap_and_a_dial_of_before_does_not_move_it():
    pace, waits = telemt.Pace(), []
    now = 0.0
    for _ in range(9):
        pace.failed(now, now, 0.5, 30.0, 0.0)
        waits.append(pace.next_at - now)
        now = pace.next_at
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    pace.failed(now, now - 1, 0.5, 30.0, 0.0)
    before = pace.next_at
    pace.failed(now + 5, now - 1, 0.5, 30.0, 0.0)
    assert pace.next_at == before
    pace.reset()
    pace.failed(now, now, 0.5, 30.0, 0.5)
    assert pace.next_at == now + 0.5 + 0.125


def test_groups_join_both_signs_and_forget_the_order():
    listed = telemt.ProxyMap({2: [B, A, A], -2: [C], 1: [A]}, {2: [SIX]}, 1)
    assert listed.groups == {1: (A,), 2: (A, B, C)}
    assert listed.exact(2) == {A, B} and listed.exact(-2) == {C} and listed.exact(-1) == {A}
    assert listed.group_of(-2) == 2 and listed.group_of(7) == 1
    assert listed == telemt.ProxyMap({-2: [C], 2: [A, B], 1: [A], -1: [A]}, {}, 5)
    assert listed != telemt.ProxyMap({-2: [C, A], 2: [A, B], 1: [A]}, {}, 1)
    assert telemt.ProxyMap({2: [A]}, {2: [SIX], 3: [SIX]}, 0, (4, 6)).groups == {2: (A,), 3: (SIX,)}
    assert telemt.ProxyMap({2: [A]}, {2: [SIX]}, 0, (6, 4), True).groups == {2: (A, SIX)}
    assert telemt.ProxyMap({2: [A], 0: [B], 70_000: [C]}, {}, 0).groups == {2: (A,)}
    assert telemt.ProxyMap({}, {}, 0).group_of(9) == 2


def test_endpoints_are_ordered_by_number():
    mixed = [SIX, ("10.0.0.10", 1), ("10.0.0.9", 2), ("10.0.0.9", 1), ("9.0.0.1", 1)]
    assert [telemt.endpoint_text(endpoint) for endpoint in sorted(mixed, key=telemt.endpoint_order)] == [
        "9.0.0.1:1", "10.0.0.9:1", "10.0.0.9:2", "10.0.0.10:1", "[2001:db8::1]:80"]


def test_a_generation_is_reused_for_the_same_list_until_it_is_too_old():
    generations, listed = telemt.Generations(), telemt.ProxyMap({2: [A]}, {}, 0)
    assert (generations.active, generations.pending) == (1, 0) and not generations.reusable(0.0, listed)
    assert generations.begin(0.0, listed) == 2
    assert generations.reusable(1800.0, telemt.ProxyMap({2: [A, A]}, {}, 0)) and not generations.expired(1800.0)
    assert not generations.reusable(1.0, telemt.ProxyMap({2: [B]}, {}, 0))
    assert not generations.reusable(1800.5, listed) and generations.expired(1800.5)
    generations.drop()
    assert generations.begin(0.0, listed) == 3
    generations.promote()
    assert (generations.active, generations.pending) == (3, 0)


def test_quarantine_ends_by_itself_and_is_rearmed():
    quarantine = telemt.Quarantine()
    quarantine.add(100.0, B)
    quarantine.add(101.0, A)
    quarantine.add(110.0, B)
    assert quarantine.until_at(120.0, B) == 135.0 and quarantine.until_at(120.0, C) == -math.inf
    assert quarantine.rows(120.0005) == (("10.0.0.1:443", 5999), ("10.0.0.2:443", 14999))
    assert quarantine.rows(130.0) == (("10.0.0.2:443", 5000),) and quarantine.until_at(135.0, B) == -math.inf


@pytest.mark.parametrize(("count", "shadow", "floor"), [(0, 2, 0), (1, 0, 3), (1, 2, 3), (1, 5, 6), (2, 2, 3), (3, 2, 3), (7, 2, 7)])
def test_static_floors(count, shadow, floor):
    assert telemt.Floors(telemt.General(me_single_endpoint_shadow_writers=shadow)).static(count) == floor


# -- the pool over simulated time

def pool(count: int = 3, dcs: int = 1, **general: object) -> Sim:
    """A pool that is up and complete."""
    sim = Sim(**general)
    sim.publish(endpoints(dcs, count))
    sim.run(10)
    return sim


def links(sim: Sim, *phases: Phase) -> list[telemt.LinkFacts]:
    return [link for link in sim.planner.roster.links.values() if link.phase in (phases or (Phase.ACTIVE,))]


def dials(sim: Sim) -> int:
    return sim.tally.dials.total()


def test_a_new_pool_reaches_its_floor_on_every_endpoint_with_pauses_between_dials():
    sim = Sim()
    sim.publish(endpoints(2, 4))
    assert [link.dc for link in sim.planner.roster.links.values()] == [1, 1, 2, 2]         # two different endpoints at a time
    assert len({link.endpoint for link in sim.planner.roster.links.values()}) == 4
    sim.run(0.4)
    assert len(links(sim)) == 4 and dials(sim) == 4
    sim.run(5)
    assert sorted(link.endpoint for link in links(sim)) == sorted(point for points in endpoints(2, 4).values() for point in points)
    assert sim.counts.totals["reconnect_attempt_total"] == 0 and (telemt.Level.INFO, "Middle-End pool ready: 2 DC groups") in sim.lines


def test_nothing_is_dialled_without_a_secret():
    sim = Sim()
    sim.publish(endpoints(1, 2), epoch=0)
    sim.run(7)
    assert not dials(sim)
    assert [text for level, text in sim.lines if level is telemt.Level.WARN] == [
        "Middle-End not usable (no proxy-secret): new sessions go direct; no ad tag, media of other DCs may not load"]
    sim.planner.on_secret(sim.now, 1)
    sim.act()
    sim.run(5)
    assert len(links(sim)) == 3 and "Middle-End usable again after 1 s" in [text for _, text in sim.lines]


def test_48_hours_of_flapping_endpoints_short_form():
    sim = pool_sim.two_days(hours=2.0, dcs=4, each=4, seed=5, check=True)
    print(pool_sim.report(sim, 2.0))
    assert max(sim.tally.gap_s.values(), default=0.0) < 5.0 and sim.counts.totals["pool_swap_total"] >= 7


def test_a_simulated_day_is_quick():
    started = time.process_time()
    sim = pool_sim.two_days(hours=3.0)
    assert sim.tally.plans > 1000 and time.process_time() - started < 3 * 20 / 48 * 8          # 48 h in 20 s, with room for a slow machine


def test_purposes_name_what_a_dial_was_for():
    sim = pool()
    assert {link.purpose for link in links(sim)} == {Purpose.INIT}
    sim.run(25)
    sim.lose(links(sim)[0].link_id)
    sim.act()
    assert [link.purpose for link in links(sim, Phase.DIALLING)] == [Purpose.REFILL]
