"""Room top: rates as properties, screens without a terminal, and what a script reads."""
from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import telemt_api
from hypothesis import given
from hypothesis import strategies as st
from telemt_api import (TOP_ORDERS, ApiClient, TopError, Traffic, Watch, draw_once, draw_top, explain_refusal, human_bytes, human_span,
                        plain_text, sparkline, user_state)

NOW = 1_772_611_200.0


def user(name: str = "alice", **members: Any) -> dict[str, Any]:
    return {"username": name, "enabled": True, "max_tcp_conns": None, "max_unique_ips": None, "data_quota_bytes": None,
            "expiration_rfc3339": None, "current_connections": 0, "active_unique_ips": 0, "active_unique_ips_list": [], "total_octets": 0,
            "quota_used_bytes": 0} | members


class FakeApi(ApiClient):
    """Answers from a dict; a path that is not in it is 404."""

    def __init__(self, answers: dict[str, Any]) -> None:
        super().__init__("127.0.0.1", 1, "")
        self.answers = answers

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        if path not in self.answers:
            return 404, {"ok": False, "error": {"code": "not_found", "message": "Route not found"}}
        return 200, {"ok": True, "data": self.answers[path]}


def watch_of(*users: dict[str, Any], uptime: float = 100.0, **answers: Any) -> Watch:
    core = {"uptime_seconds": uptime, "telemetry_user_enabled": True, "telemetry_core_enabled": True}
    watch = Watch(FakeApi({"/stats/zero/all": {"core": core, "generated_at_epoch_secs": NOW}, "/users": list(users),
                           "/runtime/gates": {"accepting_new_connections": True, "startup_status": "ready", "route_mode": "direct"},
                           **{path.replace("_", "/"): data for path, data in answers.items()}}))
    watch.look(0.0)
    return watch


# -- rates

COUNTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 10**12), max_size=6)


@given(st.lists(COUNTS, min_size=1, max_size=8))
def test_a_rate_is_never_negative_and_the_total_is_the_sum_of_growth(samples: list[dict[str, int]]) -> None:
    traffic, before = Traffic(), None
    for at, octets in enumerate(samples):
        traffic.feed(octets, float(at))
        if before is None:
            assert traffic.total is None and all(traffic.rate(name) is None for name in octets)
        else:
            grown = sum(max(0, count - before.get(name, 0)) for name, count in octets.items())
            assert traffic.total == grown
            assert all((traffic.rate(name) or 0.0) >= 0 for name in octets)
        before = octets
        assert set(traffic.users) == set(octets)


def test_deleting_a_user_is_no_negative_traffic_and_creating_it_again_counts_all_it_has() -> None:
    traffic = Traffic()
    traffic.feed({"a": 1000, "b": 5000}, 0.0)
    traffic.feed({"a": 1100}, 1.0)
    assert traffic.total == 100
    traffic.feed({"a": 1100, "b": 300}, 2.0)
    assert (traffic.total, traffic.rate("b")) == (300, 300)


def test_a_clock_that_stands_still_is_no_sample() -> None:
    traffic = Traffic()
    traffic.feed({"a": 1}, 5.0)
    traffic.feed({"a": 9}, 5.0)
    assert traffic.total is None
    traffic.feed({"a": 11}, 10.0)
    assert traffic.total == 2.0


def test_a_restart_drops_every_baseline() -> None:
    watch = watch_of(user(total_octets=10**9))
    assert isinstance(watch.client, FakeApi)
    watch.client.answers["/stats/zero/all"]["core"]["uptime_seconds"] = 3.0
    watch.client.answers["/users"] = [user(total_octets=500)]
    watch.look(1.0)
    assert watch.traffic.total is None and watch.restarted_wall > 0
    assert "counters began again" in draw_top(watch, 80, 24, "t", paused=False, blocks=False)[2]


# -- words

@pytest.mark.parametrize(("members", "word"), [
    ({}, "idle"), ({"current_connections": 2}, "online"), ({"enabled": False, "current_connections": 1}, "disabled"),
    ({"expiration_rfc3339": "2026-01-01T00:00:00+00:00"}, "expired"), ({"expiration_rfc3339": "2099-01-01T00:00:00+00:00"}, "idle"),
    ({"max_unique_ips": 0}, "blocked"), ({"data_quota_bytes": 5, "quota_used_bytes": 5}, "quota used up"),
    ({"max_tcp_conns": 2, "current_connections": 2}, "at connection limit"),
    ({"max_unique_ips": 1, "active_unique_ips": 1}, "at address limit"),
])
def test_states(members: dict[str, Any], word: str) -> None:
    assert user_state(user(**members), NOW) == word


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (999.6, "1.0 kB"), (1500, "1.5 kB"), (99_949, "99.9 kB"),
                                             (99_950, "100 kB"), (999_499, "999 kB"), (999_500, "1.0 MB"), (1e18, "1000 PB")])
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


def test_spans_and_sparks() -> None:
    assert [human_span(s) for s in (5, 65, 3700, 90_000)] == ["5 s", "1 min", "1 h 1 min", "1 d 1 h"]
    assert sparkline([0, 50, 100], 9) == "▁▄█" and sparkline([0, 0], 9) == "▁▁" and sparkline([], 9) == ""
    assert len(sparkline([1] * 99, 9)) == 9


@given(st.text())
def test_no_name_steers_the_terminal(name: str) -> None:
    assert all(char.isprintable() for char in plain_text(name)) and len(plain_text(name)) == len(name)


def test_refusals_name_the_remedy() -> None:
    assert "auth_header" in explain_refusal(401, {"error": {"message": "Missing or invalid Authorization header"}})
    assert "whitelist" in explain_refusal(403, {"error": {"message": "Source IP is not allowed"}})
    assert explain_refusal(500, {"error": {"message": "failed to read config: x"}}) == "failed to read config: x"
    assert explain_refusal(502, {}) == "HTTP status 502"


# -- screens

@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 15), (200, 60), (20, 5), (1, 1)])
@pytest.mark.parametrize("order", sorted(TOP_ORDERS))
def test_a_screen_has_exactly_the_lines_and_never_more_columns(width: int, height: int, order: str) -> None:
    watch = watch_of(*(user(f"user{number:03}", current_connections=number) for number in range(50)))
    lines = draw_top(watch, width, height, order, paused=True, blocks=True)
    assert len(lines) == height and all(len(line) <= width for line in lines)


def test_80_columns_show_everything_and_40_what_matters() -> None:
    watch = watch_of(user("alice", max_tcp_conns=40, current_connections=5, total_octets=734_003_200, data_quota_bytes=10**9,
                          quota_used_bytes=5 * 10**8, expiration_rfc3339="2026-12-31T23:59:59+00:00", active_unique_ips=2))
    wide = draw_top(watch, 80, 24, "t", paused=False, blocks=False)
    assert wide[3].split() == ["NAME", "STATE", "CONNS", "RATE", "TOTAL", "ADDRS", "QUOTA", "EXPIRES"]
    assert wide[4].split() == ["alice", "online", "5/40", "-", "734", "MB", "2", "50", "%", "2026-12-31"]
    assert draw_top(watch, 40, 15, "t", paused=False, blocks=False)[3].split() == ["NAME", "STATE", "CONNS", "RATE"]


def test_orders() -> None:
    watch = watch_of(user("a", current_connections=1), user("b", current_connections=9), user("c", total_octets=0))
    names = {order: [line.split()[0] for line in draw_top(watch, 80, 10, order, paused=False, blocks=False)[4:7]] for order in TOP_ORDERS}
    assert names["c"] == ["b", "a", "c"] and names["n"] == ["a", "b", "c"]


def test_more_users_than_lines_are_counted() -> None:
    watch = watch_of(*(user(f"user{number:03}") for number in range(50)))
    assert draw_top(watch, 80, 24, "n", paused=False, blocks=False)[-1].endswith("31 more")


def test_once_is_what_a_script_reads() -> None:
    watch = watch_of(user("with space\x1b[31m", max_tcp_conns=3, current_connections=3, total_octets=7,
                          expiration_rfc3339="2099-01-01T00:00:00+00:00"), user("bob"))
    lines = draw_once(watch)
    assert not any("\x1b" in line for line in lines)
    head = next(at for at, line in enumerate(lines) if not line.startswith("#"))
    keys = lines[head].split()
    rows = [dict(zip(keys, line.split(" ", len(keys) - 1), strict=True)) for line in lines[head + 1:]]
    assert rows[0]["name"] == "bob" and rows[0]["max_conns"] == "-" and rows[0]["state"] == "idle"
    assert rows[1] | {"expires": ""} == {"conns": "3", "max_conns": "3", "ips": "0", "max_ips": "-", "octets": "7", "octets_per_s": "-",
                                        "state": "at-connection-limit", "expires": "", "name": "with space?[31m"}
    assert rows[1]["expires"] == "4070908800"


# -- the client

def _serve(answers: list[bytes]) -> int:
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with listener:
            for answer in answers:
                peer, _ = listener.accept()
                with peer:
                    peer.recv(4096)
                    peer.sendall(answer)
    threading.Thread(target=run, daemon=True).start()
    return int(listener.getsockname()[1])


def test_a_connection_that_was_closed_meanwhile_is_opened_again() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n" + b'{"ok":true,"data": 1 }'
    client = ApiClient("127.0.0.1", _serve([answer, answer]), "x")
    assert client.get("/health")[1]["data"] == 1 == client.get("/health")[1]["data"]


@pytest.mark.parametrize("answer", [b"", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
                                    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n{"])
def test_what_is_no_answer_is_said(answer: bytes) -> None:
    client = ApiClient("127.0.0.1", _serve([answer, answer]), "")
    with pytest.raises(TopError, match=r"no answer from the API at 127\.0\.0\.1"):
        client.get("/health")


def test_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(TopError, match=r"Connection refused; is the proxy running, and was server\.api\.enabled true"):
        ApiClient("127.0.0.1", port, "").get("/health")


def test_a_signal_while_the_terminal_is_being_set_up_ends_it_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def enter(_screen: telemt_api.Screen) -> None:
        raise telemt_api.TopEnded(15)

    left: list[bool] = []
    monkeypatch.setattr(telemt_api.signal, "signal", lambda *_: None)
    monkeypatch.setattr(telemt_api.Screen, "enter", enter)
    monkeypatch.setattr(telemt_api.Screen, "leave", lambda _screen: left.append(True))
    assert telemt_api._run_screen(watch_of(user()), 1.0) == 128 + 15
    assert left == [True]
