"""Room 13: turns, lanes, timers, threads, and what an exception costs."""
import contextlib
import errno
import functools
import importlib.util
import itertools
import math
import os
import random
import select
import signal
import socket
import struct
import sys
import threading
import time

import pytest

import telemt
from telemt import READ, WRITE, Level, LogBook, Loop, UvloopPoller, pick_poller
from tests.cases import TestLoop, settings_of, tcp_pair


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


def test_a_slow_start_is_not_taken_off_the_first_limits(loop):
    """`now` was the moment the loop was made: the import of the control plane was taken off the 5 s that links wait for an answer."""
    fired = []
    loop.at += 3.0
    loop.catch_up()
    loop.call_later(5.0, lambda: fired.append(loop.now))
    loop.turn(2.5)
    assert fired == []
    loop.turn(2.5)
    assert fired == [1008.0]


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


# -- real pollers: the same laws for each

POLLERS = [name for name, there in (("epoll", hasattr(select, "epoll")), ("selectors", True),
                                    ("uvloop", importlib.util.find_spec("uvloop") is not None)) if there]


@pytest.fixture(params=POLLERS)
def turning(request):
    """A loop over a real poller, which is ended after 20 s."""
    loop = Loop(pick_poller(request.param), time.monotonic)
    assert loop.poller.name == request.param
    guard = threading.Timer(20, lambda: loop.call_from_thread(lambda: pytest.fail("the loop hangs")))
    guard.daemon = True
    guard.start()
    yield loop
    guard.cancel()
    signal.set_wakeup_fd(-1)
    loop.mailbox.close()
    if isinstance(loop.poller, UvloopPoller):
        loop.poller.close()


@pytest.fixture
def pair():
    near, far = socket.socketpair()
    near.setblocking(False)
    yield near, far
    near.close()
    far.close()


def run_for(loop, seconds=0.01):
    """Turn for a moment."""
    loop.call_later(seconds, loop.stop)
    loop.run()
    loop._stopped = False


def test_handlers_are_told_what_is_ready_as_long_as_it_is(turning, pair):
    near, far = pair
    seen = []

    def on_ready(mask):
        seen.append(mask)
        if len(seen) == 3:                       # nobody read: level-triggered
            turning.stop()

    turning.watch(near.fileno(), READ, on_ready)
    far.send(b"xy")
    turning.run()
    assert [mask & (READ | WRITE) for mask in seen] == [READ] * 3


def test_a_law_of_all_masks(turning):
    """Whatever is watched, changed and forgotten: called is who is ready for what he waits for, with that."""
    random_ = random.Random(f"masks {turning.poller.name}")
    pairs = [socket.socketpair() for _ in range(6)]
    masks, called = {}, {}
    for sock, _ in pairs:
        sock.setblocking(False)
    for _step in range(100):
        near, far = random_.choice(pairs)
        fd = near.fileno()
        match random_.randrange(4):
            case 0:
                far.send(b"x")
            case 1:
                with contextlib.suppress(BlockingIOError):
                    near.recv(1000)
            case 2 if fd in masks:
                turning.unwatch(fd, masks.pop(fd))
            case _:
                mask = random_.choice([READ, WRITE, READ | WRITE])
                if fd not in masks:
                    turning.watch(fd, mask, lambda found, fd=fd: called.update({fd: called.get(fd, 0) | found & (READ | WRITE)}))
                elif masks[fd] != mask:
                    turning.poller.modify(fd, mask)
                masks[fd] = mask
        called.clear()
        truth = select.poll()
        for watched, mask in masks.items():
            truth.register(watched, mask)
        wanted = dict(truth.poll(0))
        run_for(turning, 0.001)
        for _ in range(100):                               # on a busy machine the moment may be over before anybody was asked
            if called != wanted:
                run_for(turning, 0.005)
        assert called == wanted
    for fd, mask in masks.items():
        turning.unwatch(fd, mask)
    for sock in itertools.chain(*pairs):
        sock.close()


def test_a_reset_is_told_and_ends_the_watch(turning):
    near, far = tcp_pair()
    told = []

    def on_ready(_mask):
        try:
            told.append(near.recv(10))
        except ConnectionResetError:
            told.append("reset")
            turning.drop(near, READ)
            turning.call_later(0.01, turning.stop)

    turning.watch(near.fileno(), READ, on_ready)
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    turning.run()
    assert told == ["reset"] and near.fileno() == -1


def test_a_refused_connection_is_told_to_who_waits_to_write(turning):
    with socket.socket() as sock, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))                      # bound, not listening
        sock.setblocking(False)
        assert sock.connect_ex(nobody.getsockname()) == errno.EINPROGRESS
        found = []

        def on_ready(_mask):
            found.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
            turning.unwatch(sock.fileno(), WRITE)
            turning.stop()

        turning.watch(sock.fileno(), WRITE, on_ready)
        turning.run()
    assert found == [errno.ECONNREFUSED]


@pytest.mark.parametrize("mask", [READ, telemt.HANGUP], ids=["read", "hang-up"])
def test_a_reset_behind_bytes_is_told_too(turning, mask):
    """uvloop told the bytes, and never again anything: libuv had seen the error in the same moment, and stopped watching."""
    if mask != READ and turning.poller.name == "selectors":
        pytest.skip("cannot tell a hang-up alone")
    near, far = tcp_pair()
    far.sendall(b"bytes")
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    far.close()
    heard = []

    def on_ready(_mask):
        try:
            heard.append(near.recv(10))
        except ConnectionResetError:
            heard.append("reset")
            turning.drop(near, mask)
            turning.stop()

    turning.watch(near.fileno(), mask, on_ready)
    turning.run()
    assert heard == [b"bytes", "reset"]


def test_timers_and_lanes_come_in_order_and_never_early(turning):
    """A machine that sleeps meanwhile makes several of them due in one turn; lanes are first then."""
    begin, fired = turning.now, []
    lane = turning.lane(0.015, lambda key: fired.append((key, time.monotonic() - begin)))
    turning.call_later(0.03, lambda: (fired.append(("late", time.monotonic() - begin)), turning.stop()))
    turning.call_later(0.0, lambda: fired.append(("now", 0.0)))
    lane.arm("lane")
    turning.call_later(0.02, lambda: fired.append(("never", 0.0))).cancel()
    turning.run()
    assert [name for name, _ in fired] in (["now", "lane", "late"], ["lane", "now", "late"])
    assert dict(fired)["lane"] >= 0.015 and dict(fired)["late"] >= 0.03


def test_a_timer_that_is_set_later_and_due_earlier_wins(turning):
    order = []
    turning.call_later(60.0, lambda: (order.append("outer"), turning.stop()))
    turning.call_later(0.001, lambda: turning.call_later(0.005, lambda: (order.append("inner"), turning.stop())))
    turning.run()
    assert order == ["inner"]


def test_deferred_and_idle_work_is_done_and_starves_nobody(turning, pair):
    near, far = pair
    order = []

    def job():
        order.append("job")
        if order.count("job") == 3:
            far.send(b"x")
        return "ready" not in order

    def on_ready(_mask):
        near.recv(10)
        turning.defer(lambda: order.append("deferred"))
        order.append("ready")
        turning.call_later(0.01, turning.stop)

    turning.watch(near.fileno(), READ, on_ready)
    turning.when_idle(job)
    turning.run()
    assert order[:3] == ["job"] * 3 and order.index("deferred") == order.index("ready") + 1


def test_what_is_dropped_in_a_batch_is_not_called_and_its_number_may_come_again(turning):
    pairs = [socket.socketpair() for _ in range(4)]
    called, fresh = [], []

    def on_ready(number, _mask):
        called.append(number)
        if len(called) > 1:
            return
        for near, _ in pairs:                              # the first one ends all, itself included
            turning.drop(near, READ)

    for number, (near, far) in enumerate(pairs):
        near.setblocking(False)
        turning.watch(near.fileno(), READ, functools.partial(on_ready, number))
        far.send(b"x")
    numbers = {near.fileno() for near, _ in pairs}
    for _ in range(100):                                   # a busy machine may be told to stop before it looked
        run_for(turning)
        if called:
            break
    assert len(called) == 1
    spare = []
    while True:
        near, far = socket.socketpair()
        if near.fileno() in numbers:                       # recycled
            break
        spare += [near, far]
    turning.watch(near.fileno(), READ, lambda _mask: (fresh.append(near.recv(10)), turning.stop()))
    far.send(b"new")
    turning.run()
    turning._stopped = False
    assert fresh == [b"new"] and len(called) == 1
    turning.drop(near, READ)
    run_for(turning)
    for sock in [*(other for _, other in pairs), far, *spare]:
        sock.close()


def test_other_threads_and_signals_wake_it(turning):
    seen = []
    later = threading.Timer(0.02, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    thread = threading.Timer(0.02, lambda: turning.call_from_thread(lambda: (seen.append("thread"), later.start())))
    before = signal.getsignal(signal.SIGUSR1)
    turning.on_signal(signal.SIGUSR1, lambda *_: turning.call_from_thread(lambda: (seen.append("signal"), turning.stop())))
    thread.start()
    turning.run()                                          # for ever, if nothing wakes it
    signal.signal(signal.SIGUSR1, before)
    assert seen == ["thread", "signal"]


def test_a_loop_at_rest_does_not_turn(turning, pair):
    near, _ = pair
    turning.watch(near.fileno(), READ, lambda _mask: None)
    turning.call_later(3600, lambda: None)
    run_for(turning, 0.01)
    before = turning.turns
    run_for(turning, 0.15)
    assert turning.turns - before <= 3
    turning.unwatch(near.fileno(), READ)


def test_an_exception_is_blamed_and_the_loop_goes_on(turning, pair, monkeypatch):
    logged = []
    monkeypatch.setattr(LogBook, "sink", lambda level, target, text: logged.append(text))
    monkeypatch.setattr(LogBook, "threshold", Level.TRACE)
    near, far = pair

    def on_ready(_mask):
        near.recv(10)
        turning.call_later(0.005, turning.stop)
        raise ZeroDivisionError

    turning.watch(near.fileno(), READ, on_ready)
    far.send(b"x")
    turning.run()
    assert any("Internal error" in text and "ZeroDivisionError" in text for text in logged)


def test_a_death_in_a_turn_ends_run(turning):
    """What is no Exception leaves the loop: KeyboardInterrupt, SystemExit."""
    turning.call_later(0.0, lambda: (_ for _ in ()).throw(SystemExit(3)))
    with pytest.raises(SystemExit):
        turning.run()


def test_pick_poller_honours_selectors():
    assert pick_poller("selectors").name == "selectors"
    assert pick_poller("auto").name == ("epoll" if hasattr(telemt.select, "epoll") else "selectors")


def test_a_poller_that_is_not_there_is_said_and_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvloop", None)
    found = pick_poller("uvloop")
    assert found.name == pick_poller("auto").name
    settings = settings_of('[general]\nevent_loop = "uvloop"\n')
    assert telemt.missing_parts(settings, found) == ['general.event_loop = "uvloop": the uvloop package is not installed, using epoll']
    monkeypatch.delattr(telemt.select, "epoll")
    settings = settings_of('[general]\nevent_loop = "epoll"\n')
    assert telemt.missing_parts(settings, pick_poller("epoll")) == [
        'general.event_loop = "epoll": this system does not have it, using selectors']
    assert telemt.missing_parts(settings_of(""), pick_poller("auto")) == []


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


def test_tables_shrink_to_what_is_in_them(loop):
    lane = loop.lane(5.0, lambda key: None)
    for n in range(5000):
        lane.arm(n)
    for n in range(4990):
        lane.cancel(n)
    large = sys.getsizeof(lane._due)
    loop.shrink()
    assert sys.getsizeof(lane._due) < large // 100 and list(lane._due) == list(range(4990, 5000))
    assert list(loop.handlers) == [loop.mailbox.fd]                      # and the loop still hears
    heard = []
    loop.call_from_thread(lambda: heard.append(1))
    loop.turn()
    assert heard == [1]


def test_shrinking_keeps_order_and_kind():
    table, group = {str(n): n for n in range(1000)}, set(range(1000))
    for n in range(997):
        del table[str(n)]
        group.remove(n)
    telemt.shrink(table)
    telemt.shrink(group)
    assert list(table.items()) == [("997", 997), ("998", 998), ("999", 999)] and group == {997, 998, 999}
    assert sys.getsizeof(table) < 1000 and sys.getsizeof(group) < 1000


@pytest.mark.parametrize(("mode", "before", "after"), [
    (0o600, None, 0o600), (None, None, 0o640), (None, 0o604, 0o604), (0o644, 0o604, 0o644)])
def test_permissions_of_a_file_that_is_written_whole(tmp_path, mode, before, after):
    """platform.md 5: caches have those of the umask, and an existing file keeps its own."""
    path = tmp_path / "file"
    old = os.umask(0o027)
    try:
        if before is not None:
            path.write_text("old")
            path.chmod(before)
        telemt.write_whole(str(path), "new", replace=True, mode=mode)
    finally:
        os.umask(old)
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == after
