"""The journeys of transfer, half-close and reset with each fast way of the data path switched off (TELEMT_PATHS)."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import test_half_close as half_close
import test_reset as reset
import test_transfer as transfer
from doubles import MIB, MODES, Rig

WORDS = {"no-splice": ("classic", "secure"), "no-scatter": ("tls",), "no-one-pass": ("classic", "secure", "tls"),
         "no-splice,no-scatter,no-one-pass": ("classic", "secure", "tls")}       # and the modes that take this way


def journeys(mode: str) -> list[tuple[Callable[..., None], dict[str, Any]]]:
    """What a mode can go through, with the arguments."""
    found: list[tuple[Callable[..., None], dict[str, Any]]] = []
    for fast in (True, False):
        found += [(transfer.test_key_exchange_and_bulk, {"mode": mode, "transport": MODES[mode], "fast": fast}),
                  (half_close.test_client_finishes_first, {"mode": mode, "fast": fast}),
                  (half_close.test_data_centre_finishes_first, {"mode": mode, "fast": fast})]
        if mode != "classic":
            found.append((reset.test_client_vanishes_in_the_middle_of_a_download, {"mode": mode, "fast": fast}))
    if mode != "classic":
        found.append((reset.test_data_centre_vanishes_in_the_middle_of_an_upload, {"mode": mode}))
    return found


CASES = [pytest.param(words, journey, arguments, id=f"{words}-{mode}-{journey.__name__[5:]}-{arguments.get('fast')}")
         for words, modes in WORDS.items() for mode in modes for journey, arguments in journeys(mode)]


@pytest.mark.parametrize(("words", "journey", "arguments"), CASES)
def test_journey_without(rig: Rig, monkeypatch: pytest.MonkeyPatch, words: str, journey: Callable[..., None],
                         arguments: dict[str, Any]) -> None:
    rig.env["TELEMT_PATHS"] = words
    monkeypatch.setattr(transfer, "BULK", 6 * MIB)
    monkeypatch.setattr(reset, "AGAIN", 2)
    journey(rig, **arguments)


@pytest.mark.parametrize("words", ["", "no-splice"])
def test_the_hook_works(rig: Rig, words: str) -> None:
    """A splice leaves its pipe behind, and nothing else has one."""
    rig.env["TELEMT_PATHS"] = words
    proxy = rig.proxy()
    before = proxy.fds()["pipe"]
    rig.client("bob", "secure").download(16 * MIB)
    assert (proxy.fds()["pipe"] > before) is (not words)
