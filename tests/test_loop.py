"""Room 13: turns, lanes, timers, threads, and what an exception costs."""
import functools
import math
import os
import signal
import socket
import threading

import pytest

import telemt
from telemt import READ, EpollPoller, Level, LogBook, Loop, SelectorsPoller, pick_poller
from tests.cases import TestLoop


@pytest.fixture
def loop():
    found = TestLoop()
    yield found
    found.dispose()


def test_lane_fires_in_order_and_once(loop):
    fired = []
    lane = loop.lane(5.0, fired.append)
    lane.arm("a")
    loop.turn(1.0)
    lane.arm("b")
    loop.turn(3.9)
    assert fired == []
    loop.turn(0.2)
    assert fired == ["a"]
    loop.turn(10)
    assert fired == ["a", "b"] and loop.wake_at == math.inf


def test_lane_rearm_moves_and_cancel_forgets(loop):
    fired = []
    lane = loop.lane(5.0, fired.append)
    lane.arm("a")
    lane.arm("b")
    loop.turn(4.0)
    lane.arm("a")
    lane.cancel("b")
    lane.cancel("b")
    loop.turn(2.0)
    assert fired == []
    loop.turn(3.0)
    assert fired == ["a"]


def test_patience_fits_what_epoll_can_count(loop):
    """Found by review: a timeout of 30 days ended the process."""
    loop.call_later(3_000_000, lambda: None)
    assert loop._patience() == 86_400.0
    loop.turn(86_400)
    assert loop._patience() == 86_400.0


def test_call_later_and_cancel(loop):
    fired = []
    loop.call_later(2.0, lambda: fired.append("late"))
    timer = loop.call_later(1.0, lambda: fired.append("never"))
    timer.cancel()
    loop.turn(1.5)
    loop.turn(1.0)
    assert fired == ["late"]


def test_idle_loop_waits_for_ever(loop):
    assert loop._patience() == -1.0
    loop.call_later(3.0, lambda: None)
    assert loop._patience() == pytest.approx(3.0)
    loop.turn(3.0)
    assert loop._patience() == -1.0


def test_deferred_runs_after_handlers_and_makes_the_loop_hurry(loop):
    order = []
    loop.defer(lambda: order.append("deferred"))
    assert loop._patience() == 0.0
    loop.turn()
    assert order == ["deferred"] and loop._patience() == -1.0


def test_socket_is_closed_only_after_the_batch(loop):
    one, two = socket.socketpair()
    three, four = socket.socketpair()
    seen = []

    def close_both(_mask):
        seen.append("first")
        loop.drop(one, READ)
        loop.drop(three, READ)
        assert one.fileno() >= 0, "closed at the end of the turn, so the number cannot be reused in this batch"

    loop.watch(one.fileno(), READ, close_both)
    loop.watch(three.fileno(), READ, close_both)
    two.send(b"x")
    four.send(b"x")
    loop.turn()
    assert seen == ["first"] and one.fileno() == three.fileno() == -1
    two.close()
    four.close()


class Victim:
    """Owner of a handler that fails."""

    def __init__(self):
        self.crashed = 0

    def on_ready(self, *_):
        raise ZeroDivisionError("planted")

    def on_crash(self):
        self.crashed += 1


def test_an_exception_costs_its_owner_only(loop, monkeypatch):
    records = []
    monkeypatch.setattr(LogBook, "sink", lambda level, target, text: records.append((level, text)))
    monkeypatch.setattr(LogBook, "threshold", Level.TRACE)
    victim, one, two = Victim(), *socket.socketpair()
    loop.watch(one.fileno(), READ, victim.on_ready)
    two.send(b"x")
    loop.turn()
    assert victim.crashed == 1 and records[0][0] is Level.ERROR and "ZeroDivisionError" in records[0][1]
    loop.drop(one, READ)
    loop.turn()
    two.close()


def test_a_crash_takes_effect_before_the_next_event_of_the_batch(loop):
    """Found by a journey: the other socket of a crashed session went on in the same turn."""
    victim, order = Victim(), []
    pairs = [socket.socketpair(), socket.socketpair()]
    loop.watch(pairs[0][0].fileno(), READ, victim.on_ready)
    loop.watch(pairs[1][0].fileno(), READ, lambda _: order.append(victim.crashed))
    for _, far in pairs:
        far.send(b"x")
    loop.turn()
    assert order == [1]
    for near, far in pairs:
        loop.drop(near, READ)
        far.close()
    loop.turn()


def test_a_crash_behind_a_partial_costs_its_owner_too(loop):
    victim = Victim()
    loop.call_later(1.0, functools.partial(victim.on_ready, 1, 2))
    loop.turn(1.0)
    assert victim.crashed == 1


def test_a_crash_of_the_crash_handler_is_the_end_of_it(loop):
    class Worse:
        def on_crash(self):
            raise ZeroDivisionError("planted")

        def on_ready(self, *_):
            raise ZeroDivisionError("planted")

    loop.call(Worse().on_ready, 1)


def test_an_exception_in_a_lane_costs_the_key(loop):
    victim = Victim()
    loop.lane(1.0, Victim.on_ready).arm(victim)
    loop.turn(1.0)
    loop.turn()
    assert victim.crashed == 1


def test_idle_jobs_run_until_they_say_no(loop):
    left = [3]

    def job():
        left[0] -= 1
        return left[0] > 0

    loop.when_idle(job)
    loop.settle()
    assert left == [0] and loop._patience() == -1.0


@pytest.mark.parametrize("poller", [SelectorsPoller, *([EpollPoller] if hasattr(telemt.select, "epoll") else [])])
def test_real_pollers(poller):
    found = poller()
    one, two = socket.socketpair()
    found.register(one.fileno(), 5)
    assert found.poll(1.0) == [(one.fileno(), 4)]
    two.send(b"x")
    found.modify(one.fileno(), 1)
    assert found.poll(1.0) == [(one.fileno(), 1)]
    found.unregister(one.fileno())
    assert found.poll(0.0) == []
    one.close()
    two.close()


def test_pick_poller_honours_selectors():
    assert pick_poller("selectors").name == "selectors"
    assert pick_poller("auto").name == ("epoll" if hasattr(telemt.select, "epoll") else "selectors")


def test_offload_brings_result_or_exception_back_to_the_loop_thread():
    loop = Loop(pick_poller("auto"), telemt.time.monotonic)
    results = []

    def done(result):
        results.append((result, threading.current_thread() is threading.main_thread()))
        if len(results) == 9:
            loop.stop()

    for number in range(8):
        loop.offload(lambda number=number: number * number, done)
    loop.offload(lambda: 1 // 0, done)
    guard = loop.call_later(20, loop.stop)
    loop.run()
    guard.cancel()
    values = [value for value, _ in results]
    assert sorted(value for value in values if isinstance(value, int)) == [n * n for n in range(8)]
    assert any(isinstance(value, ZeroDivisionError) for value in values) and all(main for _, main in results)


def test_signal_is_delivered_on_the_loop():
    before = signal.getsignal(signal.SIGUSR1)
    loop = Loop(pick_poller("auto"), telemt.time.monotonic)
    loop.on_signal(signal.SIGUSR1, lambda *_: loop.stop())
    loop.call_later(20, lambda: os._exit(3))
    loop.defer(lambda: os.kill(os.getpid(), signal.SIGUSR1))
    loop.run()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGUSR1, before)
