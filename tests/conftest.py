"""What all tests share: the seed, the hypothesis profiles, and the rig of the journeys."""
from __future__ import annotations

import os
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

import doubles
import telemt
from tests.cases import BACKEND, LOCAL, TestLoop, settings_of

SLOW_IS_WELL = [hypothesis.HealthCheck.too_slow]           # of the machine, not of the test
hypothesis.settings.register_profile("dev", max_examples=60, deadline=None, suppress_health_check=SLOW_IS_WELL)
hypothesis.settings.register_profile("big", max_examples=3000, deadline=None, suppress_health_check=SLOW_IS_WELL)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

FAILED = pytest.StashKey[bool]()


def pytest_configure() -> None:
    """Journeys hold both ends of many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "journeys" in item.path.parts:
            item.add_marker(pytest.mark.journey)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[telemt.Level, str]]:
    """(level, line) of what is logged in this process, from DEBUG up; files that want another level have a fixture of this name."""
    found: list[tuple[telemt.Level, str]] = []
    monkeypatch.setattr(telemt.LogBook, "sink", lambda level, target, line: found.append((level, line)))
    monkeypatch.setattr(telemt.LogBook, "threshold", telemt.Level.DEBUG)
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report


@pytest.fixture
def rng() -> random.Random:
    """Random numbers; the seed is printed when the test fails, TELEMT_SEED repeats it."""
    seed = int(os.environ.get("TELEMT_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"TELEMT_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def make_server() -> Iterator[Callable[..., telemt.Server]]:
    """Makes servers whose clock is the test's; each has to leave nothing behind in its loop."""
    made: list[telemt.Server] = []

    def make(text: str = LOCAL, fd_limit: int = 4096) -> telemt.Server:
        made.append(telemt.Server(settings_of(text), TestLoop(), BACKEND, fd_limit))
        return made[-1]

    yield make
    for server in made:
        server.stop()
        server.loop.turn(2)
        server.loop.turn(2)
        assert not server.sweep.relays or server.loop._stopped
        for owner in list(server.places.owners):
            owner.close(None)
        server.loop.turn()
        assert set(server.loop.handlers) == {server.loop.mailbox.fd}
        server.loop.dispose()


@pytest.fixture
def rig(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[doubles.Rig]:
    """Proxies, data centres and clients of one journey, which ends with the leak check unless it has failed before."""
    rig = doubles.Rig(tmp_path)
    try:
        yield rig
        if request.node.stash.get(FAILED, False):
            print(*[proxy.tail() for proxy in rig.proxies], sep="\n")
        else:
            rig.finish()
    finally:
        rig.close()
