"""Room 26: what a configuration says by itself, and the probes run side by side; the rest is in journeys/test_check_command.py."""
from __future__ import annotations

import datetime
import threading
from types import SimpleNamespace

import pytest

from cases import settings_of
from doubles import patient
from telemt import Draws, Finding, compare_clocks, draw_finding, look_at_config, network_probes, parse_document, parse_settings, run_probes

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
    release, told, clock = threading.Event(), list[str](), [1000.0]
    monkeypatch.setattr("telemt._PROBE_LIMIT_S", 60.0)
    monkeypatch.setattr("telemt.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def tell(waited_for: str) -> None:
        told.append(waited_for)
        clock[0] += 61 if waited_for == "late" else 0          # all others have answered

    def late() -> list[Finding]:
        release.wait(patient(20))
        return []

    def broken() -> list[Finding]:
        raise LookupError("unknown encoding: idna")

    found = run_probes({"late": late, "broken": broken, "good": lambda: [Finding("x", "y")]}, tell)
    release.set()
    assert [finding.what.partition(":")[0] for finding in found] == ["late", "broken could not be asked", "y"]
    assert told[0] == "late, broken, good" and told[-2:] == ["late", ""]


def test_a_unix_mask_or_none_asks_nobody() -> None:
    assert set(network_probes(settings_of("[censorship]\nmask = false\n"))) == {"core.telegram.org"}
    assert {"mask host", "clock of the mask host"} < set(network_probes(settings_of("")))


def test_the_middle_end_is_asked_for_only_where_it_is_wanted_and_directly() -> None:
    assert "middle end" in network_probes(settings_of("[general]\nuse_middle_proxy = true\n"))
    assert "middle end" not in network_probes(settings_of("[general]\nuse_middle_proxy = false\n"))
    socks = '[general]\nuse_middle_proxy = true\n[[upstreams]]\ntype = "socks5"\naddress = "127.0.0.1:1080"\n'
    assert "middle end" not in network_probes(settings_of(socks))


@pytest.mark.parametrize(("date", "text"), [
    ("Tue, 15 Nov 1994 08:12:31 GMT", ""), ("Tue, 15 Nov 1994 08:12:01 GMT", ""), ("Tue, 15 Nov 1994 08:13:02 GMT", "31 s behind"),
    ("Tue, 15 Nov 1994 08:11:00 GMT", "91 s ahead of"), ("", ""), ("yesterday", "")])
def test_clocks(date: str, text: str) -> None:
    now = datetime.datetime(1994, 11, 15, 8, 12, 31, tzinfo=datetime.UTC).timestamp()
    found = compare_clocks("mask.example", date, now)
    assert [text in finding.what for finding in found] == [True] * bool(text)
