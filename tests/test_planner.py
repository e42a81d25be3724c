"""Room 12: the planner, organ by organ, and the pool over simulated time."""
from __future__ import annotations

import math

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


def test_two_hours_of_flapping_endpoints_and_the_laws_hold():
    """The short form of tests/laws/test_planner_laws.py::test_48_hours, with every law checked after every plan."""
    sim = pool_sim.two_days(hours=2.0, dcs=4, each=4, seed=5, check=True)
    print(pool_sim.report(sim, 2.0))
    assert max(sim.tally.gap_s.values(), default=0.0) < 47.0 and sim.counts.totals["pool_swap_total"] >= 7


# -- refill, quarantine, outage

def kill(sim: Sim, *doomed: telemt.LinkFacts) -> None:
    for link in doomed:
        sim.lose(link.link_id)
    sim.act()


def totals(sim: Sim, *names: str) -> list[int]:
    return [sim.counts.totals[name] for name in names]


REFILL = ("refill_triggered_total", "refill_skipped_inflight_total", "refill_failed_total", "writer_restored_same_endpoint_total",
          "writer_restored_fallback_total")
RECONNECT = ("reconnect_attempt_total", "reconnect_success_total")


def test_a_lost_link_is_redialled_at_once_on_its_endpoint():
    sim = pool()
    sim.run(20)
    lost = links(sim)[0]
    kill(sim, lost)
    assert [(link.purpose, link.endpoint) for link in links(sim, Phase.DIALLING)] == [(Purpose.REFILL, lost.endpoint)]
    sim.run(1)
    assert len(links(sim)) == 3 and totals(sim, *REFILL) == [1, 0, 0, 1, 0] and totals(sim, *RECONNECT) == [1, 1]
    assert totals(sim, "writer_removed_total", "writer_removed_unexpected_total", "endpoint_quarantine_total") == [1, 1, 0]


def test_an_endpoint_that_refuses_is_left_for_another_after_its_turn():
    sim = pool()
    sim.run(20)
    lost = links(sim)[0]
    sim.sites[lost.endpoint].mode = "refuse"
    kill(sim, lost)
    sim.run(5)
    assert len(links(sim)) == 3 and totals(sim, *REFILL) == [1, 0, 0, 0, 1]


def test_one_episode_at_a_time_and_none_when_the_floor_is_met():
    sim = pool()
    sim.run(20)
    first, second, third = links(sim)
    kill(sim, first, second)
    assert totals(sim, *REFILL)[:2] == [1, 1]
    sim.run(5)
    assert len(links(sim)) == 3
    spare = sim.planner.roster.open(sim.now, sim.planner.roster.groups[1], ("10.0.1.1", 8888), Purpose.FLOOR)
    sim.act()
    sim.run(1)
    before = totals(sim, *REFILL)
    kill(sim, spare)
    assert totals(sim, *REFILL) == before


def test_an_exhausted_refill_gives_way_to_the_back_off():
    sim = pool(me_reconnect_fast_retry_count=3)
    sim.run(20)
    for site in sim.sites.values():
        site.mode = "refuse"
    kill(sim, *links(sim))
    sim.run(60)
    assert totals(sim, *REFILL)[:3] == [1, 2, 1]
    attempts = sim.counts.totals["reconnect_attempt_total"]
    sim.run(300)
    assert 8 <= sim.counts.totals["reconnect_attempt_total"] - attempts <= 60      # at most every 30 s, three dials
    for site in sim.sites.values():
        site.mode = "up"
    sim.run(50)
    assert len(links(sim)) == 3
    assert (telemt.Level.WARN, "DC 1: no new link after 3 tries, going on with pauses") in sim.lines


def test_a_link_that_lived_too_short_puts_its_endpoint_into_quarantine():
    sim = pool()
    lost = links(sim)[0]
    kill(sim, lost)
    assert sim.counts.totals["endpoint_quarantine_total"] == 1
    assert telemt.pool_snapshot(sim.planner, sim.now).quarantined == ((telemt.endpoint_text(lost.endpoint), 25_000),)
    sim.run(24)
    assert lost.endpoint not in [link.endpoint for link in links(sim)] and len(links(sim)) == 3
    sim.lose(next(link for link in links(sim)).link_id)
    sim.run(30)
    assert telemt.pool_snapshot(sim.planner, sim.now).quarantined == ()


def test_a_group_whose_endpoints_all_rest_waits_for_the_first():
    sim = pool(2)
    kill(sim, *links(sim))
    sim.run(24)
    before = dials(sim)
    assert not links(sim)
    sim.run(2)
    assert dials(sim) > before and links(sim)


def test_quarantine_forgets_endpoints_that_nobody_asks_about_again():
    """Each stayed for ever once the list no longer had it."""
    quarantine = telemt.Quarantine()
    for number in range(1000):
        quarantine.add(float(number), (f"10.0.{number >> 8}.{number & 255}", 443))
    assert len(quarantine._until) <= telemt.QUARANTINE_S + 1 and len(quarantine.rows(1000.0)) == telemt.QUARANTINE_S - 1


def test_draining_links_never_put_their_endpoint_into_quarantine():
    sim = pool(2)
    link = links(sim)[0]
    sim.dial_in(1)
    bound = next(link for link in links(sim) if link.sessions)
    sim.planner.roster.drain(sim.now, bound)
    sim.act()
    kill(sim, bound)
    assert totals(sim, "endpoint_quarantine_total", "writer_removed_unexpected_total") == [0, 0] and link.dc == 1


OUTAGE = ("single_endpoint_outage_enter_total", "single_endpoint_outage_exit_total", "single_endpoint_outage_reconnect_attempt_total",
          "single_endpoint_outage_reconnect_success_total", "single_endpoint_quarantine_bypass_total")


def test_outage_of_an_only_endpoint_is_dialled_at_its_own_pace():
    sim = pool(1)
    sim.sites[("10.0.1.1", 8888)].mode = "refuse"
    kill(sim, *links(sim))
    sim.run(60)
    enter, leave, attempts, success, bypass = totals(sim, *OUTAGE)
    assert (enter, leave, success) == (1, 0, 0) and 60 / 4.5 - 1 <= attempts <= 60 / 3 + 6 and bypass == attempts
    sim.sites[("10.0.1.1", 8888)].mode = "up"
    sim.run(10)
    assert totals(sim, *OUTAGE)[:2] == [1, 1] and len(links(sim)) == 3
    assert [text for _, text in sim.lines if "only" in text] == [
        "DC 1: its only Middle-End endpoint 10.0.1.1:8888 has no link left", "DC 1: outage of its only Middle-End endpoint is over"]


def test_outage_respects_quarantine_if_it_is_told_to():
    sim = pool(1, me_single_endpoint_outage_disable_quarantine=False)
    kill(sim, *links(sim))
    sim.run(24)
    assert totals(sim, *OUTAGE) == [1, 0, 0, 0, 0]
    sim.run(3)
    assert totals(sim, *OUTAGE)[1:] == [1, 1, 1, 0] and links(sim)


def test_an_endpoint_that_accepts_and_hangs_up_is_not_hammered():
    sim = pool(1)
    site = sim.sites[("10.0.1.1", 8888)]
    site.mode, site.life_s = "flap", 0.01
    kill(sim, *links(sim))
    before = dials(sim)
    sim.run(120)
    assert dials(sim) - before <= 120 / 3 * 3 + 20


def test_silent_endpoints_do_not_pile_up_dials():
    sim = pool(4, 3)
    for point, site in sim.sites.items():
        if point[0].startswith("10.0.1."):
            site.mode = "silent"
    sim.run(20)
    kill(sim, *[link for link in links(sim) if link.dc == 1])
    most = 0
    for _ in range(200):
        sim.run(1)
        most = max(most, len([link for link in links(sim, Phase.DIALLING) if link.dc == 1]))
    assert 1 <= most <= 8
    kill(sim, next(link for link in links(sim) if link.dc == 2))
    sim.run(2)
    assert len([link for link in links(sim) if link.dc == 2]) == 4, "a living data centre found no place for its dial"


def test_dead_data_centres_leave_a_place_for_the_dial_of_a_living_one():
    sim = pool(4, 12)
    sim.run(20)
    for point, site in sim.sites.items():
        site.mode = "up" if point[0].startswith("10.0.12.") else "silent"
    kill(sim, *[link for link in links(sim) if link.dc != 12])
    most = 0
    for _ in range(20):
        sim.run(0.5)
        most = max(most, len(links(sim, Phase.DIALLING)))
        spare = next(link for link in links(sim) if link.dc == 12)
        sim.planner.roster.quarantine._until.clear()
        kill(sim, spare)
        assert [link for link in links(sim, Phase.DIALLING) if link.dc == 12], "no place"
        sim.run(1)
    assert 20 < most <= 32, "the dials of the dead ones have filled what they may"


def test_a_dial_that_takes_too_long_counts_for_the_pace():
    sim = pool(4, me_reconnect_backoff_base_ms=5000, me_reconnect_fast_retry_count=1)
    sim.run(20)
    for site in sim.sites.values():
        site.mode = "silent"
    before = dials(sim)
    kill(sim, *links(sim))
    sim.run(5)
    assert dials(sim) - before == 4
    sim.run(14)
    assert 4 < dials(sim) - before <= 8


def test_after_an_exhausted_refill_there_is_a_pause():
    sim = pool(3, me_reconnect_backoff_base_ms=20_000, me_reconnect_fast_retry_count=2, me_floor_mode="static")
    sim.run(25)
    for site in sim.sites.values():
        site.mode = "refuse"
    for _ in range(6):
        sim.dial_in(1)
    before = dials(sim)
    kill(sim, links(sim)[0])
    sim.run(2)
    assert sim.counts.totals["refill_failed_total"] == 1 and dials(sim) == before + 2
    before = dials(sim)
    sim.run(15)
    assert dials(sim) == before
    sim.run(20)
    assert dials(sim) > before


# -- floors

def single(sim: Sim) -> int:
    return sim.planner.roster.floors.floor(sim.planner.roster.groups[1], telemt.Due(sim.now))


def test_the_adaptive_floor_sinks_when_unused_and_rises_with_use():
    sim = pool(1)
    assert len(links(sim)) == 3
    sim.run(85)
    assert single(sim) == 1
    sim.run(60)
    assert len(links(sim)) == 1                                    # the surplus went as it idled
    assert telemt.pool_snapshot(sim.planner, sim.now).dcs[0].required_writers == 1
    sim.dial_in(1, life_s=10)
    sim.act()
    assert single(sim) == 3
    sim.run(5)
    assert len(links(sim)) == 3
    sim.run(5 + 180 + 85)
    assert single(sim) == 3
    sim.run(10)
    assert single(sim) == 1


def test_the_mode_of_the_floor_can_be_switched():
    sim = pool(1, me_floor_mode="static")
    sim.run(400)
    assert len(links(sim)) == 3
    for mode in ("adaptive", "static", "static"):
        sim.planner.apply(sim.now, telemt.Settings(general=telemt.General(me_floor_mode=mode)))
        sim.act()
    assert totals(sim, "floor_mode_switch_total", "floor_mode_switch_static_to_adaptive_total",
                  "floor_mode_switch_adaptive_to_static_total") == [2, 1, 1]


# -- idle links

def test_idle_links_are_replaced_before_the_middle_end_closes_them():
    sim = pool(3)
    sim.run(600)
    assert sim.tally.lost == 0 and len(links(sim)) == 3
    assert {link.purpose for link in links(sim)} == {Purpose.REFRESH} and totals(sim, *RECONNECT) == [0, 0]
    assert all(sim.now - link.idle_at < 60 for link in links(sim))


def test_a_refresh_spares_a_link_that_got_a_session_meanwhile():
    sim = pool(3)
    sim.auto = False
    while not links(sim, Phase.DIALLING):
        sim.run(1)
    dial, = links(sim, Phase.DIALLING)
    old = sim.planner.roster.links[dial.replaces]
    sim.sessions[old.link_id][1] = 1
    sim.planner.on_bound(sim.now, old.link_id, 1)
    sim.ready(dial.link_id)
    sim.act()
    assert old.live and len(links(sim)) == 4


def test_shadow_links_rotate():
    sim = pool(1, me_floor_mode="static", me_single_endpoint_shadow_rotate_every_secs=40)
    for _ in range(3):
        sim.dial_in(1)
    sim.run(45)
    assert sim.counts.totals["single_endpoint_shadow_rotate_total"] == 0           # every link is busy
    for link_id, bound in list(sim.sessions.items()):
        for session in list(bound)[:1]:
            sim.hang_up(link_id, session)
    sim.run(35)
    assert sim.counts.totals["single_endpoint_shadow_rotate_total"] == 1


def test_a_rotation_skips_an_endpoint_that_rests():
    sim = pool(1, me_floor_mode="static", me_single_endpoint_shadow_rotate_every_secs=40)
    sim.run(28)
    sim.planner.roster.quarantine.add(sim.now, ("10.0.1.1", 8888))
    sim.run(12)
    assert totals(sim, "single_endpoint_shadow_rotate_total", "single_endpoint_shadow_rotate_skipped_quarantine_total") == [0, 1]


# -- renewal

def test_a_hardswap_warms_up_then_swaps_and_drains():
    sim = pool(3, 2)
    sim.dial_in(1)
    sim.run(880)
    before = {link.link_id for link in links(sim)}
    seen: set[Phase] = set()
    for _ in range(60):
        sim.run(0.5)
        seen |= {link.phase for link in sim.planner.roster.links.values()}
        if sim.counts.totals["pool_swap_total"]:
            break
    assert Phase.WARM in seen and sim.planner.roster.generations.active == 2 and sim.planner.roster.generations.pending == 0
    now = telemt.pool_snapshot(sim.planner, sim.now)
    assert (now.active_generation, now.draining_generations) == (2, (1,)) and sim.counts.draining == 1
    assert all(link.generation == 2 and link.link_id not in before for link in links(sim)) and len(links(sim)) == 6
    sim.run(130)
    assert sim.counts.totals["pool_force_close_total"] == 1 and sim.tally.cut == 1 and sim.counts.draining == 0


def test_the_gate_waits_and_the_generation_is_reused_until_it_is_too_old():
    sim = pool(3, 2, me_hardswap_warmup_extra_passes=0)
    for point, site in sim.sites.items():
        if point[0].startswith("10.0.2."):
            site.mode = "refuse"
    sim.run(950)
    assert (telemt.Level.WARN, "Middle-End renewal waits: 1 of 2 DC groups are complete") in sim.lines
    assert sim.planner.roster.generations.pending == 2 and sim.counts.totals["pool_swap_total"] == 0
    assert links(sim, Phase.WARM) and all(link.dc == 1 for link in links(sim, Phase.WARM))
    sim.run(200)
    assert sim.counts.totals["hardswap_pending_reuse_total"] >= 2 and sim.planner.roster.generations.pending == 2
    sim.run(1900)
    assert sim.counts.totals["hardswap_pending_ttl_expired_total"] == 1 and sim.planner.roster.generations.pending == 3
    for site in sim.sites.values():
        site.mode = "up"
    sim.run(200)
    assert sim.planner.roster.generations.active == 3 and len(links(sim)) == 6 and not links(sim, Phase.WARM)


def test_a_pending_generation_is_not_reused_after_a_change_of_the_secret():
    sim = pool(3, 2, me_hardswap_warmup_extra_passes=0)
    for point, site in sim.sites.items():
        if point[0].startswith("10.0.2."):
            site.mode = "refuse"
    sim.run(950)
    assert sim.planner.roster.generations.pending == 2 and links(sim, Phase.WARM)
    old = {link.link_id for link in links(sim, Phase.WARM)}
    for site in sim.sites.values():
        site.mode = "up"
    sim.planner.on_secret(sim.now, 2)
    sim.act()
    sim.run(1)
    assert sim.planner.roster.generations.pending == 3 and not old & set(sim.planner.roster.links)
    sim.run(40)
    assert sim.planner.roster.generations.active == 3 and {link.generation for link in links(sim)} == {3}


def test_a_swap_keeps_what_works_where_nothing_is_fresh():
    sim = pool(3, 5, me_hardswap_warmup_extra_passes=0)
    for _ in range(9):
        sim.dial_in(5)                          # the middle end does not close links that are used
    sim.run(890)
    for point, site in sim.sites.items():
        if point[0].startswith("10.0.5."):
            site.mode = "refuse"
    sim.run(60)
    assert sim.planner.roster.generations.active == 2
    kept = [link for link in links(sim) if link.dc == 5]
    assert kept and all(link.generation == 2 for link in kept)


def test_triggers_within_the_window_are_one_and_changes_during_a_warm_up_are_remembered():
    sim = pool(3, me_reinit_coalesce_window_ms=1000)
    swap = sim.planner.swap
    swap.trigger(sim.now, telemt.Trigger.PERIODIC)
    sim.act()
    sim.run(0.5)
    swap.trigger(sim.now, telemt.Trigger.MAP)
    sim.act()
    sim.run(0.6)
    assert swap.warming and not swap.triggers
    assert (telemt.Level.INFO, "Middle-End renewal (map-change, periodic): warming up generation 2") in sim.lines
    swap.trigger(sim.now, telemt.Trigger.PERIODIC)
    assert not swap.triggers
    sim.planner.on_secret(sim.now, 2)
    sim.act()
    assert swap.triggers == {telemt.Trigger.SECRET} and swap.warming
    sim.run(60)
    assert sim.planner.roster.generations.active == 3 and sim.counts.totals["pool_swap_total"] == 2


def test_the_period_can_be_lowered_and_raised():
    sim = pool(3)
    for seconds, wait_s, last in ((2000, 1000, 1), (500, 1, 2)):
        sim.planner.apply(sim.now, telemt.Settings(general=telemt.General(me_reinit_every_secs=seconds)))
        sim.act()
        sim.run(wait_s)
        assert sim.planner.roster.generations.last == last


def test_hardswap_switched_off_drops_the_pending_generation():
    sim = pool(3)
    sim.planner.swap.trigger(sim.now, telemt.Trigger.PERIODIC)
    sim.act()
    sim.run(3)
    assert links(sim, Phase.WARM)
    sim.planner.apply(sim.now, telemt.Settings(general=telemt.General(hardswap=False)))
    sim.act()
    assert not links(sim, Phase.WARM) and sim.planner.roster.generations.pending == 0 and len(links(sim)) == 3


def test_a_dropped_generation_stays_where_nothing_else_works():
    sim = pool(3)
    sim.planner.swap.trigger(sim.now, telemt.Trigger.PERIODIC)
    sim.act()
    sim.run(3)
    warm = links(sim, Phase.WARM)
    sim.auto = False
    kill(sim, *links(sim))
    sim.planner.apply(sim.now, telemt.Settings(general=telemt.General(hardswap=False)))
    actions = sim.act()
    assert warm and all(link.phase is Phase.ACTIVE and link.generation == 1 for link in warm)
    assert {action.link_id for action in actions if isinstance(action, telemt.PromoteLink)} == {link.link_id for link in warm}


def test_without_hardswap_only_links_that_are_not_listed_go_and_may_be_bound_meanwhile():
    sim = pool(2, hardswap=False)
    for _ in range(4):
        sim.dial_in(1)
    sim.publish({1: [A, B]})
    sim.run(3)
    assert sim.counts.totals["pool_swap_total"] == 1 and sim.planner.roster.generations.active == 1
    assert {link.endpoint for link in links(sim)} == {A, B}
    draining = links(sim, Phase.DRAINING)
    assert draining and all(link.drain is not None and link.drain.fallback for link in draining)
    kill(sim, *links(sim))
    assert isinstance(sim.dial_in(1), telemt.Bind)                 # ttl: for 90 s
    sim.settings = telemt.Settings(general=telemt.General(hardswap=False, me_bind_stale_mode="never"))
    sim.planner.apply(sim.now, sim.settings)
    assert sim.planner.dispatch.pick(sim.now, 1) is None


def test_a_group_that_left_the_list_is_drained_by_the_next_swap_and_forgotten():
    sim = pool(2, 2)
    sim.dial_in(2)
    sim.publish({1: [A, B]})
    group = sim.planner.roster.groups[2]
    assert not group.endpoints and [row.dc for row in telemt.pool_snapshot(sim.planner, sim.now).writers if row.dc is None]
    sim.run(200)
    assert 2 not in sim.planner.roster.groups and [row.dc for row in telemt.pool_snapshot(sim.planner, sim.now).dcs] == [1]


def test_an_empty_list_drains_nothing():
    sim = pool(2)
    before = links(sim)
    sim.planner.on_map(sim.now, {1: []}, {}, 2)
    assert [type(action) for action in sim.planner.plan(sim.now)] == [telemt.Say, telemt.WakeAt] and links(sim) == before


# -- sessions

def test_a_session_takes_the_best_link():
    sim = pool(3)
    one, two, three = links(sim)
    one.sessions, sim.planner.roster.links[two.link_id].pulse.degraded = 5, True
    assert sim.planner.dispatch.pick(sim.now, 1) is three
    three.generation = 0
    assert sim.planner.dispatch.pick(sim.now, 1) is one
    one.generation = 0
    assert sim.planner.dispatch.pick(sim.now, 1) is two            # degraded, but not stale
    one.generation, three.generation, three.phase = 1, 1, Phase.WARM
    assert sim.planner.dispatch.pick(sim.now, 1) is one
    three.phase, two.pulse.degraded, two.idle_at = Phase.ACTIVE, False, sim.now - 50
    assert sim.planner.dispatch.pick(sim.now, 1) is three
    two.idle_at = sim.now
    sim.planner.queued = lambda link_id: 100 if link_id == three.link_id else 0
    one.sessions, two.sessions, three.sessions = 1, 2, 2
    assert sim.planner.dispatch.pick(sim.now, 1) is one
    one.sessions = 3
    assert sim.planner.dispatch.pick(sim.now, 1) is two


def test_links_to_just_this_signed_dc_come_first_and_never_another_group():
    sim = Sim()
    sim.publish({1: [A], -1: [B], 2: [C]})
    sim.run(10)
    pick = sim.planner.dispatch.pick
    assert {pick(sim.now, dc).endpoint for dc in (1,)} == {A} and pick(sim.now, -1).endpoint == B
    assert pick(sim.now, 7).endpoint == C                          # default 2
    kill(sim, *[link for link in links(sim) if link.endpoint == B])
    assert pick(sim.now, -1).endpoint == A
    kill(sim, *[link for link in links(sim) if link.dc == 1])
    assert pick(sim.now, 1) is None


def test_a_stale_pick_is_counted():
    sim = pool(3)
    link = links(sim)[0]
    link.generation = 0
    sim.sessions[link.link_id][1] = 1
    sim.planner.on_bound(sim.now, link.link_id, 1)
    assert sim.counts.totals["pool_stale_pick_total"] == 1


def test_what_a_session_does_without_a_link():
    sim = pool(2, 3)
    for point, site in sim.sites.items():
        if point[0].startswith("10.0.1."):
            site.mode = "refuse"
    kill(sim, *[link for link in links(sim) if link.dc == 1])
    route = sim.planner.route
    assert route(sim.now, 1, True) == telemt.Hold(1, sim.now + 3)
    assert route(sim.now, 1, False, waited=True) == telemt.Refuse()
    assert route(sim.now, 1, True, waited=True) == telemt.GoDirect() and route(sim.now, -1, True, waited=True) == telemt.GoDirect()
    sim.act()
    warned = [text for _, text in sim.lines if "no Middle-End link" in text]
    assert warned == ["DC 1 has no Middle-End link: its new sessions go direct"]        # once in 60 s
    sim.run(10)
    assert sim.planner.availability.degraded_at is None                                # one of three is down
    for point, site in sim.sites.items():
        if point[0].startswith("10.0.2."):
            site.mode = "refuse"
    kill(sim, *[link for link in links(sim) if link.dc == 2])
    sim.run(5.9)
    assert isinstance(route(sim.now, 1, True), telemt.Hold)
    sim.run(0.2)
    assert route(sim.now, 1, True) == telemt.GoDirect() and isinstance(route(sim.now, 3, True), telemt.Bind)
    now = telemt.route_snapshot(sim.planner, sim.now, 1_700_000_000.0, 4)
    assert now == telemt.RouteSnapshot(me_ready=True, middle=False, direct_since_wall=1_699_999_999, was_ready=True, down_dcs=(1, 2),
                                       fallback_sessions=4)
    sim.planner.apply(sim.now, telemt.Settings(general=telemt.General(auto_degradation_enabled=False)))
    assert isinstance(route(sim.now, 1, True), telemt.Hold) and route(sim.now, 1, True, waited=True) == telemt.Refuse()


def test_waiting_sessions_hurry_the_dial_but_not_beyond_its_base():
    sim = pool(2)
    sim.run(20)
    for site in sim.sites.values():
        site.mode = "refuse"
    kill(sim, *links(sim))
    sim.run(120)
    before = dials(sim)
    for _ in range(100):
        assert sim.planner.route(sim.now, 1, has_direct=False) == telemt.Hold(1, sim.now + 3)
        sim.act()
        sim.run(0.05)
    assert 2 <= dials(sim) - before <= 5 / 0.5 * 3 + 3


def test_held_sessions_are_served_by_the_first_link():
    sim = pool(1)
    kill(sim, *links(sim))
    sim.auto = False
    sim.run(1)
    link_id = next(iter(sim.open))
    sim.ready(link_id)
    assert telemt.ServeWaiters(1) in sim.act()


def test_no_usable_family_is_a_reason():
    sim = Sim()
    sim.publish(endpoints(1, 1), order=())
    sim.run(7)
    assert [text for level, text in sim.lines if level is telemt.Level.WARN] == [
        "Middle-End not usable (no usable address family): new sessions go direct; no ad tag, media of other DCs may not load"]


def test_sessions_are_cut_in_twentieths():
    sim = pool(3)
    link = links(sim)[0]
    for session in range(50):
        sim.sessions[link.link_id][session] = 1
        sim.planner.on_bound(sim.now, link.link_id, 1)
    sim.planner.roster.drain(sim.now, link)
    sim.act()
    sim.run(119)
    assert link.sessions == 50
    sim.run(1.5)
    left = [link.sessions]
    for _ in range(18):
        sim.run(1)
        left.append(link.sessions)
    assert left[:3] == [47 - 3 * (left[0] == 44), 44 - 3 * (left[0] == 44), 41 - 3 * (left[0] == 44)] and left[-1] == 0
    assert sim.counts.totals["pool_force_close_total"] == 1


# -- keepalive

def beats(sim: Sim, link: telemt.LinkFacts, heard: bool, pong_ms: float | None = None, until_s: float = 60.0) -> list[telemt.Beat]:
    found, end = [], sim.now + until_s
    while sim.now < end:
        beat = sim.planner.beat(sim.now, link.link_id, heard)
        found.append(beat)
        if beat.dead:
            break
        if beat.ping and pong_ms is not None:
            sim.planner.on_pong(sim.now, link.link_id, pong_ms)
        sim.now += beat.again_s
    return found


def test_a_link_may_beat_between_its_last_session_and_its_end():
    """The timer of a draining link ran out in the turn in which its last session left: KeyError, and a traceback in the log."""
    sim = pool(3)
    link = links(sim)[0]
    sim.planner.on_bound(sim.now, link.link_id, 1)
    sim.planner.roster.drain(sim.now, link)
    sim.planner.on_unbound(sim.now, link.link_id, 1)
    assert link.link_id not in sim.planner.roster.links
    beat = sim.planner.beat(sim.now, link.link_id, heard=True)
    assert (beat.ping, beat.dead) == (False, False) and beat.again_s > 1
    assert telemt.CloseLink(link.link_id) in sim.planner.plan(sim.now)


def test_pings_keep_their_pace():
    sim = pool(1)
    link = links(sim)[0]
    first, *rest = beats(sim, link, True, 10.0)
    assert not first.ping and 5 <= first.again_s <= 5 + 2 * 2 and all(beat.ping and 5 <= beat.again_s <= 7 for beat in rest)
    link.sessions = 1
    assert all(8 <= beat.again_s <= 10 for beat in beats(sim, link, True, 10.0)[1:])
    sim.planner.roster.general = telemt.General(me_keepalive_enabled=False)
    assert all(20 <= beat.again_s <= 30 for beat in beats(sim, link, True, 10.0))
    sim.planner.roster.general = telemt.General(me_keepalive_interval_secs=0, me_keepalive_jitter_secs=0)
    assert all(1 <= beat.again_s <= 1.001 for beat in beats(sim, link, True, 10.0, 5.0))


def test_a_silent_link_is_given_up_and_one_that_talks_is_not():
    sim = pool(1)
    link, other, _ = links(sim)
    start = sim.now
    assert beats(sim, link, False)[-1].dead and 30 <= sim.now - start <= 40
    assert not any(beat.dead for beat in beats(sim, other, True, until_s=300.0))


def test_round_trips_are_averaged_and_a_slow_link_is_degraded():
    sim = pool(1)
    link = links(sim)[0]
    sim.planner.on_pong(sim.now, link.link_id, 100.0)
    sim.planner.on_pong(sim.now, link.link_id, 50.0)
    assert (link.pulse.ema_ms, link.pulse.base_ms, link.pulse.degraded) == (90.0, 50.0, False)
    sim.planner.on_pong(sim.now, link.link_id, 500.0)
    assert link.pulse.ema_ms == pytest.approx(172.0) and link.pulse.base_ms == pytest.approx(54.5) and link.pulse.degraded
    sim.planner.on_pong(sim.now, 99_999, 5.0)                      # a link that is gone


def test_signals_have_their_period():
    sim = Sim(rpc_proxy_req_every=10)
    assert all(0 <= sim.planner.signal_pause(True) <= 2 and 10 <= sim.planner.signal_pause() <= 12 for _ in range(50))
    assert Sim().planner.signal_pause() is None


def test_drift_is_of_addresses_or_of_the_port_only():
    memory = telemt.DriftMemory()
    assert memory.note(A, ("1.2.3.4",), 1000) is None
    assert memory.note(A, ("1.2.3.4",), 1000) is None
    assert memory.note(A, ("1.2.3.4",), 1001) == "port_only"
    assert memory.note(A, ("5.6.7.8",), 1001) == "drift" and memory.note(B, ("1.2.3.4",), 1) is None
    for port in range(5000):
        memory.note(("10.9.9.9", port), (), 1)
    assert len(memory._seen) == 4096 and memory.note(A, ("0",), 1) is None


def test_the_level_gates_what_is_counted_but_not_the_gauge():
    sim = pool(3)
    sim.check = False
    sim.counts.level = 1
    sim.run(20)
    kill(sim, links(sim)[0])
    assert totals(sim, "writer_removed_total", "writer_removed_unexpected_total", "refill_triggered_total") == [0, 1, 0]
    sim.counts.level = 0
    kill(sim, links(sim)[0])
    assert totals(sim, "writer_removed_unexpected_total") == [1]


# -- what the API shows: a made state, every field

def test_the_snapshot_tells_every_field():
    sim = Sim(me_floor_mode="static")
    sim.publish({1: [A], 2: [B, C]})
    sim.run(10)
    roster = sim.planner.roster
    one = [link for link in links(sim) if link.dc == 1]
    two = [link for link in links(sim) if link.dc == 2]
    assert len(one) == 3 and len(two) == 3
    for link in list(roster.links.values()):                       # known ages
        link.idle_at = sim.now - 30.9
    for dc in (1, -1):
        sim.sessions[one[0].link_id][dc] = dc
        sim.planner.on_bound(sim.now, one[0].link_id, dc)
    sim.planner.on_bound(sim.now, one[2].link_id, 1)
    roster.drain(sim.now, one[2])
    sim.planner.on_pong(sim.now, one[0].link_id, 100.0)
    sim.planner.on_pong(sim.now, one[1].link_id, 200.0)
    sim.planner.on_pong(sim.now, one[2].link_id, 900.0)            # drains: not in the mean
    one[1].pulse.degraded = True
    two.sort(key=lambda link: link.endpoint)                       # B first, C last
    two[0].phase, two[0].generation = Phase.WARM, 2
    roster.generations.begin(sim.now - 12.5, roster.listed)
    roster.quarantine.add(sim.now - 1.0, C)
    two[2].endpoint = SIX                                          # left the list
    roster.groups[2].episode = telemt.Episode(B, 3)
    now = telemt.pool_snapshot(sim.planner, sim.now)
    assert (now.active_generation, now.warm_generation, now.pending_hardswap_generation, now.pending_hardswap_age_secs) == (1, 0, 2, 12)
    assert now.draining_generations == (1,) and now.refills == ((2, "V4", 1),)
    assert now.quarantined == (("10.0.0.3:443", 24_000),)
    rows = {row.writer_id: row for row in now.writers}
    assert rows[one[0].link_id] == telemt.WriterRow(one[0].link_id, 1, "10.0.0.1:443", 1, "active", False, False, 2, None, 100.0)
    assert rows[one[1].link_id] == telemt.WriterRow(one[1].link_id, 1, "10.0.0.1:443", 1, "active", False, True, 0, 30, 200.0)
    assert rows[one[2].link_id] == telemt.WriterRow(one[2].link_id, 1, "10.0.0.1:443", 1, "draining", True, False, 1, None, 900.0)
    assert (rows[two[0].link_id].state, rows[two[0].link_id].generation, rows[two[0].link_id].draining) == ("warm", 2, False)
    lost = [row for row in now.writers if row.dc is None]
    assert lost and all(row.endpoint == "[2001:db8::1]:80" for row in lost) and now.writers[-len(lost):] == tuple(lost)
    assert [row.dc for row in now.writers] == sorted([row.dc for row in now.writers], key=lambda dc: 99_999 if dc is None else dc)
    first, second = now.dcs
    assert first == telemt.DcRow(1, ("10.0.0.1:443",), 1, 3, 2, 150.0, 3)
    assert second == telemt.DcRow(2, ("10.0.0.2:443", "10.0.0.3:443"), len({two[0].endpoint, two[1].endpoint}), 3, 2, None, 0)
    sim.planner.swap.warming[1] = telemt.Warmup()
    assert telemt.pool_snapshot(sim.planner, sim.now).warm_generation == 2
