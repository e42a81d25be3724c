"""Room check: what a configuration says by itself, and the probes run side by side; the rest is in journeys/test_check_command.py."""
from __future__ import annotations

import threading

import pytest

from cases import settings_of
from telemt import Draws, Finding, draw_finding, look_at_config, network_probes, parse_document, parse_settings, run_probes

HEALTHY = '[access.users]\nalice = "0123456789abcdef0123456789abcdef"\n[general]\nuse_middle_proxy = false\n'


def problems(text: str) -> list[Finding]:
    loaded = parse_settings(parse_document(text), Draws(lambda: 2048))
    return [finding for finding in look_at_config(loaded) if not finding.note]


def test_nothing_to_say_about_a_healthy_file() -> None:
    assert problems(HEALTHY) == []


def test_a_missing_users_table_is_one_finding_not_two() -> None:
    found = problems("[general]\nuse_middle_proxy = false\n")
    assert [finding.key for finding in found].count("access.users") == 1 and "all zeros" in found[0].what


def test_every_unknown_key_is_listed_where_the_log_stops_at_20() -> None:
    found = problems("".join(f"strange_{index} = 1\n" for index in range(50)) + HEALTHY)
    assert len(found) == 50 and all(finding.cure.startswith("remove ") for finding in found)


def test_ad_tag_text_is_the_documented_one() -> None:
    found = problems(HEALTHY + 'ad_tag = "' + "a" * 32 + '"\n')
    assert found[0].what == "ad tag without effect: it is sent only through the middle end (general.use_middle_proxy = true)"


def test_secrets_never_show() -> None:
    text = HEALTHY.replace("[general]", 'bob = "0123456789abcdef0123456789abcdef"\n[general]')
    lines = [line for finding in problems(text) for line in draw_finding(finding)]
    assert lines and "0123456789abcdef" not in "\n".join(lines)


def test_probes_keep_their_order_and_a_late_one_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("telemt._PROBE_LIMIT_S", -0.9)
    release, told = threading.Event(), list[str]()

    def late() -> list[Finding]:
        release.wait(20)
        return []

    def broken() -> list[Finding]:
        raise LookupError("unknown encoding: idna")

    found = run_probes({"late": late, "broken": broken, "good": lambda: [Finding("x", "y")]}, told.append)
    release.set()
    assert [finding.what.partition(":")[0] for finding in found] == ["late", "broken could not be asked", "y"]
    assert told[0] == "late, broken, good" and told[-1] == ""


def test_a_unix_mask_or_none_asks_nobody() -> None:
    assert set(network_probes(settings_of("[censorship]\nmask = false\n"))) == {"core.telegram.org"}
    assert "mask host" in network_probes(settings_of(""))
