"""The judge of `make soak` finds each planted fault, and nothing where all is well (the soak itself: journeys/test_endurance)."""
from __future__ import annotations

import dataclasses
import random
import socket
import time
from collections.abc import Callable

import pytest

import soak
import soak_judge
from soak_crowd import WEB_PAGE, Relay, Tally, Weather
from soak_judge import MIB, Account, Sample

QUIET = {"file": 1, "anon_inode": 1, "socket": 3}


def sound() -> Account:
    """Ten calm points with busy ones between, all as it should be."""
    account = Account("direct", dialled=900, accepted=900, bad=7, bad_by_class=7, moved=(10, 20), counted=(10, 20), exact_good=5,
                      exact_total=5, current={"anna": 0, "exact": 0}, users_file=frozenset("ab"), users_live=frozenset("ab"),
                      idle_cpu=0.002, good=600, broken_files=3, grumbles=["t ERROR telemt::config: config reload: failed"] * 3)
    for n in range(10):
        account.samples.append(Sample(60.0 * n, True, 30 * MIB + 1000 * n, QUIET, 5, 0))
        account.samples.append(Sample(60.0 * n + 30, False, 36 * MIB, {**QUIET, "tcp": 40, "pipe": 20}, 11, 20))
    return account


def change(account: Account, calm: bool, **field: Callable[[int], object]) -> None:
    """Give the n-th calm (or busy) sample other values."""
    at = [n for n, sample in enumerate(account.samples) if sample.calm == calm]
    for n, where in enumerate(at):
        account.samples[where] = account.samples[where]._replace(**{name: make(n) for name, make in field.items()})


def test_a_sound_run_has_no_findings() -> None:
    assert soak_judge.judge(sound()) == []


def test_memory_that_grows_in_the_warm_up_only_is_fine() -> None:
    account = sound()
    change(account, True, rss=lambda n: (30 + 9 * min(n, 1)) * MIB)
    assert soak_judge.judge(account) == []


@pytest.mark.parametrize(("calm", "field", "make", "says"), [
    (True, "rss", lambda n: (30 + n) * MIB, "memory grew"),
    (False, "rss", lambda n: (36 + 70 * (n == 4)) * MIB, "memory reached"),
    (True, "fds", lambda n: QUIET | {"tcp": n // 9}, "1 descriptors of kind tcp, not 0"),
    (True, "fds", lambda n: QUIET | {"file": 1 + n // 5}, "kind file"),
    (False, "fds", lambda n: QUIET | {"tcp": 40 + 100 * (n == 3)}, "140|145 descriptors for 20 connections"),
    (True, "threads", lambda n: 5 + n, "14 threads in the last calm"),
    (False, "threads", lambda n: 5 + 30 * n, "threads at a time"),
])
def test_a_leak_is_found(calm: bool, field: str, make: Callable[[int], object], says: str) -> None:
    account = sound()
    change(account, calm, **{field: make})
    [finding] = soak_judge.judge(account)[:1]
    assert any(word in finding for word in says.split("|")), finding


@pytest.mark.parametrize(("fault", "says"), [
    ({"accepted": 899}, "899 connections accepted, 900 made"),
    ({"bad_by_class": 6}, "by class"),
    ({"counted": (10, 21)}, "21 bytes counted to"),
    ({"counted": (9, 20), "exact_other": 3}, "9 bytes counted from"),
    ({"exact_good": 0}, "nothing was proved"),
    ({"exact_total": 6}, "6 sessions of the exact user"),
    ({"exact_total": 4}, "4 sessions of the exact user"),
    ({"current": {"anna": 1}}, "connections left at the end: {'anna': 1}"),
    ({"users_live": frozenset("abc")}, "['c']"),
    ({"grumbles": ["t ERROR telemt::relay: what"]}, "logged: t ERROR"),
    ({"grumbles": ["Traceback (most recent call last):"]}, "logged: Traceback"),
    ({"grumbles": ["stderr: boom"]}, "logged: stderr"),
    ({"broken_files": 0}, "3 complaints about 0 broken files"),
    ({"idle_cpu": 0.02}, "2.0% of a core"),
    ({"exit_code": 1}, "exit code 1"),
    ({"exit_code": None}, "exit code None"),
    ({"good": 0}, "not one session"),
    ({"faults": ["download damaged"] * 30}, "fault: download damaged"),
    ({"samples": []}, "nothing to compare"),
], ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_a_fault_is_found(fault: dict[str, object], says: str) -> None:
    findings = soak_judge.judge(dataclasses.replace(sound(), **fault))  # type: ignore[arg-type]
    assert findings and any(says in text for text in findings), findings


def test_disturbed_sessions_excuse_bytes_too_many_but_never_too_few() -> None:
    assert soak_judge.judge(dataclasses.replace(sound(), counted=(15, 20), exact_other=1)) == []


def test_programs_that_follow_each_other_count_each_for_itself() -> None:
    account = dataclasses.replace(sound(), one_program=False, accepted=1, exact_total=1, counted=(0, 0))
    assert soak_judge.judge(account) == []
    assert len(soak_judge.judge(dataclasses.replace(account, current={"anna": 1}, users_live=frozenset(), bad=9))) == 3


def test_weather_excuses_what_it_met() -> None:
    weather = Weather()
    assert not weather.excuses("dc5", time.monotonic())
    with weather.storm("dc5"):
        assert weather.excuses("dc5", time.monotonic()) and not weather.excuses("dc1", time.monotonic())
    assert weather.excuses("dc5", time.monotonic()) and not weather.excuses("dc5", time.monotonic() + 3600)


@pytest.mark.parametrize(("fate", "whole"), [("slices", True), ("delays", True), ("resets", False)])
def test_the_relay_does_what_it_says(fate: str, whole: bool) -> None:
    web, tally = soak.Web(), Tally()
    relay = Relay(web.port, fate, tally, random.Random(6))
    broken = 0
    try:
        for _ in range(10):
            with socket.create_connection(("127.0.0.1", relay.port), timeout=20) as sock:
                got = b""
                try:
                    sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    while piece := sock.recv(4096):
                        got += piece
                except OSError:
                    pass
                assert WEB_PAGE.startswith(got)
                broken += got != WEB_PAGE
    finally:
        relay.close()
        web.close()
    assert relay.made == 10 and (broken == 0) == whole, broken
    assert tally.counts["resets"] >= broken


def test_the_table_names_every_figure() -> None:
    names = """seconds sessions sessions_broken strangers connections bytes restarts relay_faults changes refused edits broken_files
        hangups polls rss_start rss_warm rss_end rss_peak fds_start fds_end fds_peak threads_start exchanges
        threads_end idle_cpu smallest_leak
        findings"""
    figures = dict.fromkeys(names.split(), 1)
    lines = soak.table({"direct": figures, "middle": figures}).splitlines()
    assert len(lines) == len(soak.ROWS) + 2 and {line.count("|") for line in lines} == {4}


def test_wrong_use() -> None:
    assert soak.main(["--seconds", "-1"]) == 2
    with pytest.raises(SystemExit) as leaving:
        soak.main(["--minutes", "1", "--hours", "1"])
    assert leaving.value.code == 2
