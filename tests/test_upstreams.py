"""Room 16: which address a data-centre index means, and what a connect cycle does and counts."""
import os
import socket
import threading
import time

import pytest

import telemt
from telemt import (Connected, Counters, DcDirectory, Families, Level, LogBook, Resolver, RouteError, Stream, Upstreams, decide_families,
                    parse_target)
from doubles import patient
from tests.cases import TestLoop, load_vector, settings_of

BOTH = Families(True, True, False)
V4 = Families(True, False, False)
V6_FIRST = Families(True, True, True)


@pytest.fixture
def loop():
    found = TestLoop()
    yield found
    found.dispose()


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(LogBook, "sink", lambda level, target, text: found.append(text) if level >= Level.WARN else None)
    monkeypatch.setattr(LogBook, "threshold", Level.TRACE)
    return found


def targets(families, dc, settings):
    """Addresses in the order of a direct way that nothing is known about."""
    return DcDirectory(families).find(dc, settings).targets(families)


@pytest.mark.parametrize(("families", "dc", "expected"), [
    (V4, 1, [("149.154.175.50", 443)]), (V4, -4, [("149.154.167.91", 443)]), (V4, 5, [("149.154.171.5", 443)]),
    (BOTH, 2, [("149.154.167.51", 443), ("2001:67c:4e8:f002::a", 443)]),
    (V6_FIRST, 3, [("2001:b28:f23d:f003::a", 443), ("149.154.175.100", 443)]),
    (Families(False, True, True), 1, [("2001:b28:f23d:f001::a", 443)]),
    (V4, 203, [("91.105.192.100", 443)]), (V4, 0, [("149.154.167.51", 443)]), (V4, 10002, [("149.154.167.51", 443)]),
    (V4, -203, [("149.154.167.51", 443)]),
])
def test_table_and_default_cluster(families, dc, expected):
    text = '[general]\nunknown_dc_log_path = ""'
    assert targets(families, dc, settings_of(text)) == expected


@pytest.mark.parametrize(("families", "texts", "expected"), [
    (V4, ["[::1]:1", "1.2.3.4:5", "1.2.3.5:6"], [("1.2.3.4", 5), ("1.2.3.5", 6), ("::1", 1)]),
    (V6_FIRST, ["1.2.3.4:5", "[::1]:1"], [("::1", 1), ("1.2.3.4", 5)]),
    (V4, ["[::1]:1"], [("::1", 1)]),
    (V4, [" 1.2.3.4:5", "host:1", "1.2.3.4:5"], [("1.2.3.4", 5)]),
])
def test_overrides(families, texts, expected, warnings):
    settings = settings_of(f"[dc_overrides]\n2 = {texts!r}")
    assert targets(families, 2, settings) == expected
    assert len(warnings) == len(texts) - len(expected)
    assert targets(families, -2, settings)[0][0].startswith(("149.", "2001:")), "exact text: 2 does not serve -2"


def test_a_port_of_six_digits_is_none():
    """Found by the fuzzer: only the first six of `0368547` were compared with the largest port."""
    assert telemt.parse_host_port("proxy.example:0443") == ("proxy.example", 443)
    for text in ("proxy.example:0368547", "proxy.example:65536", f"proxy.example:{'9' * 5000}"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            telemt.parse_host_port(text)


def test_only_bad_overrides_fall_back_to_the_table(warnings):
    assert targets(V4, 4, settings_of('[dc_overrides]\n4 = "nonsense"')) == [("149.154.167.91", 443)]


@pytest.mark.parametrize(("default_dc", "ip"), [
    ("", "149.154.167.51"), ("default_dc = 4", "149.154.167.91"), ("default_dc = 9", "149.154.167.51"),
])
def test_default_dc(default_dc, ip):
    settings = settings_of(f'{default_dc}\n[general]\nunknown_dc_log_path = ""')
    assert targets(V4, 77, settings) == [(ip, 443)]


def test_cdn_has_an_ipv6_address_of_its_own():
    settings = settings_of("[network]\nipv4 = false\nipv6 = true\nprefer = 6")
    assert targets(Families(False, True, True), 203, settings) == [("2a0a:f280:203:a:5000::100", 443)]


def test_unknown_dc_file_gets_each_index_once(tmp_path, warnings):
    path = tmp_path / "unknown.txt"
    settings = settings_of(f'[general]\nunknown_dc_log_path = "{path}"')
    directory = DcDirectory(V4)
    for dc in (77, 77, -78, 77):
        directory.find(dc, settings)
    assert path.read_text() == "dc_idx=77\ndc_idx=-78\n" and path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("path", ["fifo", "nul\\u0000byte", "no/such/directory"])
def test_unknown_dc_file_that_cannot_be_written_is_one_warning(tmp_path, warnings, path):
    """Found by review: a NUL in the path was a crash, a FIFO held up the loop."""
    os.mkfifo(tmp_path / "fifo")
    directory = DcDirectory(V4)
    for dc in (77, 78):
        directory.find(dc, settings_of(f'[general]\nunknown_dc_log_path = "{tmp_path}/{path}"'))
    assert sum("cannot be written" in text for text in warnings) == 1


def test_unknown_dc_file_refuses_dots_and_links(tmp_path, warnings):
    (tmp_path / "real").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for path in (f"{tmp_path}/x/../escape", f"{tmp_path}/link"):
        targets(V4, 77, settings_of(f'[general]\nunknown_dc_log_path = "{path}"'))
    assert (tmp_path / "real").read_text() == "" and not (tmp_path / "escape").exists()


@pytest.mark.parametrize(("text", "target"), [("1.2.3.4:5", ("1.2.3.4", 5)), ("[::1]:65535", ("::1", 65535))])
def test_parse_target(text, target):
    assert parse_target(text) == target


@pytest.mark.parametrize("text", ["", "1.2.3.4", "1.2.3.4:", "1.2.3.4:65536", "1.2.3.4:-1", "::1:5", "[1.2.3.4]:5", "a:5", "1.2.3.4:٣"])
def test_parse_target_refuses(text):
    with pytest.raises(ValueError):
        parse_target(text)


@pytest.mark.parametrize(("text", "v4", "v6", "families"), [
    ("", "1.2.3.4", None, Families(True, False, False)), ("", None, None, Families(True, False, False)),
    ("ipv6 = true\nprefer = 6", "1.2.3.4", "2001:4860::1", Families(True, True, True)),
    ("ipv6 = true\nprefer = 6", "1.2.3.4", None, Families(True, False, False)),
    ("ipv6 = true", None, None, Families(True, True, False)),
    ("ipv4 = false\nipv6 = true\nprefer = 6", "1.2.3.4", None, Families(False, True, True)),
])
def test_families(text, v4, v6, families, warnings):
    assert decide_families(settings_of(f"[network]\n{text}").network, v4, v6) == families


# -- cycles


class FakeDial:
    """Stands in for Dial: remembers where to, ends as the test says."""

    made: list = []

    def __init__(self, loop, ip, port, deadlines, done, source_ip=""):
        assert deadlines is None, "the attempt watches the time"
        self.where, self.done, self.source_ip, self.aborted = (ip, port), done, source_ip, False
        FakeDial.made.append(self)

    def abort(self):
        self.aborted = True


@pytest.fixture
def dials(monkeypatch):
    FakeDial.made = []
    monkeypatch.setattr(telemt, "Dial", FakeDial)
    return FakeDial.made


def upstreams(loop, text="", families=V4):
    settings = settings_of(text)
    resolver = Resolver(loop)
    resolver.overrides = telemt.parse_dns_overrides(settings.network.dns_overrides)
    return Upstreams(loop, settings, Counters(), families, resolver), settings


def entries(*texts):
    """[[upstreams]] of these lines each; without a type they are direct."""
    return "".join("[[upstreams]]\n" + ("" if "type" in text else 'type = "direct"\n') + text + "\n" for text in texts)


class Ends:
    """Streams for dials that succeed, closed at the end of the test."""

    def __init__(self, loop):
        self.loop, self.sockets = loop, []

    def __call__(self):
        near, far = socket.socketpair()
        self.sockets += [near, far]
        return Stream(self.loop, near)


@pytest.fixture
def a_stream(loop):
    ends = Ends(loop)
    yield ends
    for sock in ends.sockets:
        sock.close()


def order(monkeypatch, *positions):
    """Draws of the weighted choice: fractions in [0, 1), then 0 for ever."""
    left = list(positions)
    monkeypatch.setattr(telemt, "draw_fraction", lambda: left.pop(0) if left else 0.0)


TWO = '[dc_overrides]\n2 = ["1.1.1.1:1", "2.2.2.2:2"]\n'
REFUSED = RouteError("IO error: Connection refused (os error 111)", code=111)
SLOW = RouteError("Connection timeout to 1.1.1.1:1")


def test_cycle_succeeds_at_once(loop, dials, warnings, a_stream):
    ways, settings = upstreams(loop, TWO)
    found = []
    ways.connect_dc(2, settings, "", found.append)
    assert dials[0].where == ("1.1.1.1", 1)
    stream = a_stream()
    dials[0].done(stream)
    assert found == [Connected(stream)] and found[0].kind == "direct" and not warnings
    counters = ways.counters
    assert (counters.connect_attempt_total, counters.connect_success_total, counters.connect_fail_total) == (1, 1, 0)


def test_an_attempt_ends_with_tg_connect(loop, dials, warnings):
    ways, settings = upstreams(loop, TWO + "[timeouts]\ntg_connect = 3\n[general]\nupstream_connect_retry_attempts = 1")
    found = []
    ways.connect_dc(2, settings, "", found.append)
    loop.turn(2.9)
    assert not found
    loop.turn(0.2)
    assert str(found[0]) == "Connection timeout to 1.1.1.1:1" and not found[0].hard and dials[0].aborted


def test_cycle_retries_on_the_next_address_and_gives_up(loop, dials, warnings):
    ways, settings = upstreams(loop, TWO + "[general]\nupstream_connect_retry_attempts = 3")
    found = []
    ways.connect_dc(2, settings, "", found.append)
    dials[0].done(REFUSED)
    loop.turn()
    loop.turn(0.2)
    dials[1].done(SLOW)
    loop.turn()
    loop.turn(0.2)
    assert [dial.where for dial in dials] == [("1.1.1.1", 1), ("2.2.2.2", 2), ("1.1.1.1", 1)]
    dials[2].done(REFUSED)
    loop.turn()
    assert found == [REFUSED] and warnings == [f"Upstream failed after retries: {REFUSED} fails=1 attempts=3"]
    counters = ways.counters
    assert (counters.connect_attempt_total, counters.connect_fail_total, counters.connect_attempts) == (3, 1, [0, 0, 1, 0])
    assert counters.connect_fail_ms == [0, 1, 0, 0]


@pytest.mark.parametrize(("attempts", "bucket"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (9, 3)])
@pytest.mark.parametrize(("pause", "slot"), [(0.1, 0), (0.1015, 1), (0.5, 1), (0.5015, 2), (1.0, 2), (1.0015, 3)])
def test_buckets(loop, dials, warnings, attempts, bucket, pause, slot):
    ways, settings = upstreams(loop, f"[general]\nupstream_connect_retry_attempts = {attempts}\nupstream_connect_retry_backoff_ms = 0")
    ways.connect_dc(2, settings, "", lambda _: None)
    loop.turn(pause)
    for _ in range(attempts):
        dials[-1].done(REFUSED)
        loop.turn()
        loop.turn()
    assert ways.counters.connect_attempts == [int(n == bucket) for n in range(4)]
    assert ways.counters.connect_fail_ms == [int(n == slot) for n in range(4)]
    assert sum(ways.counters.connect_success_ms) == 0


@pytest.mark.parametrize(("backoff", "fraction", "pause_ms"), [(100, 0.0, 100), (100, 0.9999, 150), (1, 0.9999, 2), (0, 0.9999, 0)])
def test_pause_between_two_attempts(loop, dials, warnings, monkeypatch, backoff, fraction, pause_ms):
    """upstream-and-relay.md 7.4: whole milliseconds in 0..max(1, backoff // 2) upon it; none at all for 0."""
    monkeypatch.setattr(telemt, "draw_fraction", lambda: fraction)
    ways, settings = upstreams(loop, f"[general]\nupstream_connect_retry_backoff_ms = {backoff}")
    ways.connect_dc(2, settings, "", lambda _: None)
    dials[0].done(REFUSED)
    if pause_ms:
        loop.turn((pause_ms - 0.5) / 1000)
        assert len(dials) == 1
    loop.turn(0.001)
    loop.turn()
    assert len(dials) == 2


def test_switched_off_counters_stand_still(loop, dials, a_stream):
    ways, settings = upstreams(loop)
    ways.counters.enabled = False
    ways.connect_dc(2, settings, "", lambda _: None)
    dials[0].done(a_stream())
    assert (ways.counters.connect_attempt_total, ways.counters.connect_success_total) == (0, 0)


def test_failfast_ends_at_a_hard_error_only(loop, dials, warnings):
    ways, settings = upstreams(loop, TWO + "[general]\nupstream_connect_failfast_hard_errors = true\nupstream_connect_retry_backoff_ms = 0")
    found = []
    ways.connect_dc(2, settings, "", found.append)
    dials[0].done(SLOW)
    loop.turn()
    loop.turn()
    assert not found
    dials[1].done(REFUSED)
    loop.turn()
    ways.connect_dc(2, settings, "", found.append)
    dials[2].done(REFUSED)
    loop.turn()
    assert found == [REFUSED, REFUSED] and ways.counters.connect_failfast_hard_error_total == 2


def test_aborted_cycle_counts_nothing_and_closes_a_late_stream(loop, dials, a_stream):
    ways, settings = upstreams(loop, TWO)
    found = []
    cycle = ways.connect_dc(2, settings, "", found.append)
    cycle.abort()
    stream = a_stream()
    dials[0].done(stream)
    loop.turn()
    assert dials[0].aborted and not found and stream.sock.fileno() == -1 and ways.counters.connect_fail_total == 0


@pytest.mark.parametrize(("scope", "scopes", "admits"), [
    ("", "", True), ("", "a", False), ("a", "", False), ("a", "b, a", True), ("a", "*", False), ("A", "a", False),
])
def test_scopes(loop, dials, scope, scopes, admits, warnings):
    ways, settings = upstreams(loop, entries(f'scopes = "{scopes}"'))
    found = []
    ways.connect_dc(2, settings, scope, found.append)
    loop.turn()
    assert bool(dials) is admits
    if not admits:
        assert str(found[0]) == "Config error: No upstreams available" and ways.counters.connect_attempt_total == 0
        assert ways.counters.connect_fail_total == 0 and ways.routes[0].fails == 0


def test_all_entries_disabled(loop, dials, warnings):
    ways, settings = upstreams(loop, entries("enabled = false"))
    found = []
    ways.connect_dc(2, settings, "", found.append)
    loop.turn()
    assert str(found[0]) == "Config error: No upstreams available" and ways.rows() == []
    assert ways.network_path()[0] == {"dc": 1, "ip_preference": None, "selected_addr_v4": "149.154.175.50:443",
                                      "selected_addr_v6": "[2001:b28:f23d:f001::a]:443"}


# -- selection and failover


def test_weights_and_latencies_share_out_the_connections(loop):
    ways, _ = upstreams(loop, entries("weight = 3", "weight = 1", "weight = 0"))
    drawn = [ways.draw(ways.routes, 2) for _ in range(4000)]
    counts = [drawn.count(route) for route in ways.routes]
    assert counts[2] == 0 and 0.70 < counts[0] / 4000 < 0.80
    ways.routes[0].paths[2].feed(100.0)
    ways.routes[1].paths[2].feed(20.0)
    drawn = [ways.draw(ways.routes, 2) for _ in range(4000)]
    assert 0.33 < drawn.count(ways.routes[0]) / 4000 < 0.42, "3 * 1000/100 against 1000/20"


@pytest.mark.parametrize(("fraction", "chosen"), [(0.0, 0), (0.399, 0), (0.401, 1), (0.9999, 1)])
def test_a_millisecond_is_the_shortest_latency(loop, monkeypatch, fraction, chosen):
    """upstream-and-relay.md 7.3: 1000 / 1.5 against 1000."""
    ways, _ = upstreams(loop, entries("", ""))
    for route, latency_ms in zip(ways.routes, (1.5, 0.5), strict=True):
        route.paths[2].feed(latency_ms)
    monkeypatch.setattr(telemt, "draw_fraction", lambda: fraction)
    assert ways.draw(ways.routes, 2) is ways.routes[chosen]


def test_no_weight_at_all_is_an_even_choice(loop):
    ways, _ = upstreams(loop, entries("weight = 0", "weight = 0"))
    drawn = [ways.draw(ways.routes, 0) for _ in range(2000)]
    assert 0.4 < drawn.count(ways.routes[0]) / 2000 < 0.6


@pytest.mark.parametrize(("samples", "slot", "latency"), [
    ({}, 2, None), ({2: [10.0]}, 2, 10.0), ({2: [10.0, 20.0]}, 2, 13.0), ({1: [10.0], 3: [20.0]}, 2, 15.0), ({1: [8.0]}, 0, 8.0),
])
def test_effective_latency(loop, samples, slot, latency):
    route = upstreams(loop)[0].routes[0]
    for dc, values in samples.items():
        for value in values:
            route.paths[dc].feed(value)
    assert route.latency_ms(slot) == (latency if latency is None else pytest.approx(latency))


def test_failover_inside_one_request(loop, dials, warnings, a_stream, monkeypatch):
    order(monkeypatch)
    ways, settings = upstreams(loop, entries(*(f'bind_addresses = ["127.0.0.{n}"]' for n in (1, 2, 3)))
                               + "[general]\nupstream_connect_retry_attempts = 3")
    found = []
    ways.connect_dc(2, settings, "", found.append)
    dials[0].done(REFUSED)
    assert len(dials) == 2, "no pause before a different entry"
    dials[1].done(SLOW)
    stream = a_stream()
    dials[2].done(stream)
    assert found == [Connected(stream)] and [dial.source_ip for dial in dials] == ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    assert [route.fails for route in ways.routes] == [1, 1, 0], "each that failed once per cycle"
    counters = ways.counters
    assert (counters.connect_attempt_total, counters.connect_success_total, counters.connect_fail_total) == (3, 1, 0)
    assert counters.connect_attempts == [0, 0, 1, 0]


def test_threshold_and_recovery(loop, dials, warnings, a_stream):
    ways, settings = upstreams(loop, "[general]\nupstream_unhealthy_fail_threshold = 2\nupstream_connect_retry_attempts = 1")
    for fails in (1, 2, 3):
        ways.connect_dc(2, settings, "", lambda _: None)
        dials[-1].done(REFUSED)
        loop.turn()
        assert (ways.routes[0].fails, ways.routes[0].healthy) == (fails, fails < 2)
    assert sum("Upstream marked unhealthy" in text for text in warnings) == 1
    assert ways.summary() == {"configured_total": 1, "healthy_total": 0, "unhealthy_total": 1, "direct_total": 1, "socks4_total": 0,
                              "socks5_total": 0}
    ways.connect_dc(2, settings, "", lambda _: None)
    dials[-1].done(a_stream())
    assert (ways.routes[0].fails, ways.routes[0].healthy) == (0, True)


def test_unhealthy_ones_are_used_only_when_nothing_else_is_left(loop, dials, warnings, monkeypatch):
    monkeypatch.setattr(telemt, "_none_healthy", telemt.Throttle(5.0))
    order(monkeypatch)
    ways, settings = upstreams(loop, entries('bind_addresses = ["127.0.0.1"]', 'bind_addresses = ["127.0.0.2"]'))
    ways.routes[0].healthy = False
    ways.connect_dc(2, settings, "", lambda _: None)
    dials[0].done(REFUSED)
    loop.turn()
    loop.turn(0.2)
    assert [dial.source_ip for dial in dials] == ["127.0.0.2", "127.0.0.2"], "no healthy one left: the same again"
    ways.routes[1].healthy = False
    ways.connect_dc(2, settings, "", lambda _: None)
    assert dials[-1].source_ip in ("127.0.0.1", "127.0.0.2")
    assert sum("No healthy upstreams available! Using random." in text for text in warnings) == 1


def test_a_silent_attempt_is_overtaken(loop, dials, warnings, a_stream, monkeypatch):
    order(monkeypatch)
    ways, settings = upstreams(loop, entries('bind_addresses = ["127.0.0.1"]', 'bind_addresses = ["127.0.0.2"]'))
    found = []
    ways.connect_dc(2, settings, "", found.append)
    loop.turn(2.4)
    assert len(dials) == 1
    loop.turn(0.2)
    assert [dial.source_ip for dial in dials] == ["127.0.0.1", "127.0.0.2"] and not dials[0].aborted
    dials[1].done(a_stream())
    assert dials[0].aborted and len(found) == 1
    assert [route.fails for route in ways.routes] == [0, 0], "nobody knows whether the slow one would have answered"
    assert ways.counters.connect_attempts == [0, 1, 0, 0]


def test_the_overtaken_one_may_still_win(loop, dials, warnings, a_stream, monkeypatch):
    order(monkeypatch)
    ways, settings = upstreams(loop, entries('bind_addresses = ["127.0.0.1"]', 'bind_addresses = ["127.0.0.2"]'))
    found = []
    ways.connect_dc(2, settings, "", found.append)
    loop.turn(2.6)
    dials[1].done(REFUSED)
    loop.turn()
    assert not found, "the first is still under way"
    stream = a_stream()
    dials[0].done(stream)
    assert found == [Connected(stream)] and [route.fails for route in ways.routes] == [0, 1]


def test_failfast_with_others_left(loop, dials, warnings, monkeypatch):
    order(monkeypatch)
    ways, settings = upstreams(loop, entries("", "") + "[general]\nupstream_connect_failfast_hard_errors = true\n"
                                                       "upstream_connect_retry_attempts = 5")
    found = []
    ways.connect_dc(2, settings, "", found.append)
    dials[0].done(REFUSED)
    dials[1].done(REFUSED)
    loop.turn()
    assert found == [REFUSED] and len(dials) == 2
    assert ways.counters.connect_failfast_hard_error_total == 1, "at most one per cycle"
    assert [route.fails for route in ways.routes] == [1, 1]


def test_requests_of_others_never_change_health(loop, dials, a_stream):
    ways, _ = upstreams(loop, "[general]\nupstream_connect_retry_attempts = 1")
    found = []
    ways.connect([("1.2.3.4", 5)], found.append, blame=False)
    dials[0].done(REFUSED)
    loop.turn()
    assert found == [REFUSED] and ways.routes[0].fails == 0 and ways.counters.connect_fail_total == 1
    ways.routes[0].healthy = False
    ways.connect([("1.2.3.4", 5)], found.append, blame=False)
    dials[1].done(a_stream())
    assert not ways.routes[0].healthy


def test_connect_tells_the_latency_of_its_data_centre(loop, dials, a_stream):
    ways, _ = upstreams(loop)
    for dc in (-4, 203):
        ways.connect([("1.2.3.4", 5)], lambda _: None, dc=dc)
        loop.at += 0.05
        dials[-1].done(a_stream())
    assert {dc: path.ema_ms for dc, path in ways.routes[0].paths.items()} == {1: None, 2: None, 3: None, 4: pytest.approx(50), 5: None}
    assert ways.routes[0].paths[4].label() == "unknown", "that was no address of the table"


# -- families


def test_a_later_attempt_uses_the_other_family(loop, dials, warnings):
    ways, settings = upstreams(loop, "[network]\nipv6 = true\nprefer = 6\n[general]\nupstream_connect_retry_backoff_ms = 0", V6_FIRST)
    ways.connect_dc(2, settings, "", lambda _: None)
    dials[0].done(REFUSED)
    loop.turn()
    loop.turn()
    assert [dial.where[0] for dial in dials] == ["2001:67c:4e8:f002::a", "149.154.167.51"]


def test_what_was_learned_overrules_prefer(loop, dials, a_stream):
    ways, settings = upstreams(loop, "[network]\nipv6 = true\nprefer = 6", V6_FIRST)
    path = ways.routes[0].paths[2]
    path.works_v4, path.works_v6 = True, False
    for dc in (2, -2, 3):
        ways.connect_dc(dc, settings, "", lambda _: None)
    assert [":" in dial.where[0] for dial in dials] == [False, False, True]
    dials[2].done(a_stream())
    assert ways.routes[0].paths[3].label() == "prefer_v6", "a real connect says yes"


@pytest.mark.parametrize(("v4", "v6", "label", "path_label"), [
    (None, None, "unknown", "unknown"), (True, True, "both_work", "both"), (True, False, "prefer_v4", "prefer_v4"),
    (True, None, "prefer_v4", "prefer_v4"), (False, True, "prefer_v6", "prefer_v6"), (None, True, "prefer_v6", "prefer_v6"),
    (False, False, "unavailable", "unavailable"), (False, None, "unavailable", "unavailable"),
])
def test_labels(loop, v4, v6, label, path_label):
    ways, _ = upstreams(loop)
    ways.routes[0].paths[5].works_v4, ways.routes[0].paths[5].works_v6 = v4, v6
    assert ways.rows()[0]["dc"][4] == {"dc": 5, "latency_ema_ms": None, "ip_preference": label}
    assert ways.network_path()[4]["ip_preference"] == path_label


def test_socks4_and_ipv6(loop, dials, warnings):
    """D5: left out for IPv6 if another entry is there, else the DC's IPv4 address, else refused before any connect."""
    v6 = "[network]\nipv6 = true\nprefer = 6\n"
    socks4 = 'type = "socks4"\naddress = "127.0.0.1:1080"'
    ways, settings = upstreams(loop, v6 + entries(socks4, "weight = 0"), V6_FIRST)
    ways.connect_dc(2, settings, "", lambda _: None)
    assert dials[-1].where == ("2001:67c:4e8:f002::a", 443)
    ways, settings = upstreams(loop, v6 + entries(socks4), V6_FIRST)
    assert ways.connect_dc(2, settings, "", lambda _: None).where == ("149.154.167.51", 443)
    found = []
    ways.connect([("2001:db8::1", 1)], found.append)
    loop.turn()
    assert str(found[0]) == "Proxy error: SOCKS4 does not support IPv6" and len(dials) == 2
    assert (ways.routes[0].fails, ways.counters.connect_fail_total) == (0, 0)


def test_families_of_socks_entries_come_from_the_configuration(loop, dials):
    ways, settings = upstreams(loop, "[network]\nipv6 = true\nprefer = 6\n" + entries('type = "socks5"\naddress = "127.0.0.1:1080"'), V4)
    assert ways.connect_dc(2, settings, "", lambda _: None).where == ("2001:67c:4e8:f002::a", 443)


# -- bindings


def test_binding_rotates_and_fails_closed(loop, dials, warnings):
    ways, settings = upstreams(loop, entries('bind_addresses = ["127.0.0.2", "127.0.0.3", "::1", "nonsense"]'))
    for _ in range(3):
        ways.connect_dc(2, settings, "", lambda _: None)
    assert [dial.source_ip for dial in dials] == ["127.0.0.2", "127.0.0.3", "127.0.0.2"]
    for text, message in (('bind_addresses = ["::1"]', "No valid bind_addresses for target family 149.154.167.51:443"),
                          ('interface = "nosuch9"', "No usable address on interface nosuch9 for target family 149.154.167.51:443"),
                          ('interface = "::1"', "No usable address on interface ::1 for target family 149.154.167.51:443"),
                          ('bind_addresses = ["10.9.8.7"]\ninterface = "lo"',
                           "No valid bind_addresses for target family 149.154.167.51:443")):
        ways, settings = upstreams(loop, entries(text) + "[general]\nupstream_connect_retry_attempts = 1")
        found = []
        for _ in range(2):
            ways.connect_dc(2, settings, "", found.append)
            loop.turn()
        assert str(found[0]) == message and found[0].hard and len(dials) == 3
        assert sum("connections of this upstream fail" in line for line in warnings) == 1, "one warning per entry and reason"
        warnings.clear()


@pytest.mark.parametrize(("text", "source"), [
    ('interface = "lo"', "127.0.0.1"), ('interface = "127.0.0.9"', "127.0.0.9"), ("bind_addresses = []", ""),
    ('bind_addresses = ["::1"]\ninterface = "127.0.0.9"', "127.0.0.9"),
    ('bind_addresses = ["10.9.8.7", "127.0.0.1"]\ninterface = "lo"', "127.0.0.1"),
])
def test_where_a_direct_way_comes_from(loop, dials, text, source):
    ways, settings = upstreams(loop, entries(text))
    ways.connect_dc(2, settings, "", lambda _: None)
    assert dials[0].source_ip == source


def test_interface_addresses_are_looked_up_every_ten_seconds(loop, dials, monkeypatch):
    asked = []
    monkeypatch.setattr(telemt, "interface_addresses", lambda name: asked.append(name) or ["127.0.0.1"])
    ways, settings = upstreams(loop, entries('interface = "eth7"'))
    for pause in (0, 5, 4.9, 0.2):
        loop.turn(pause)
        ways.connect_dc(2, settings, "", lambda _: None)
    assert asked == ["eth7", "eth7"]


# -- health checks and the table after the start


def answer(loop, dials, a_stream, works):
    """End every dial under way, and those that follow, as works(target) says; returns the targets in order."""
    seen = []
    while fresh := [dial for dial in dials if dial not in seen]:
        for dial in fresh:
            seen.append(dial)
            dial.done(a_stream() if works(dial.where) else REFUSED)
        loop.turn()
    dials.clear()
    return [dial.where for dial in seen]


def dc_of(target):
    return next((dc for dc, ips in telemt.DC_TABLE.items() if target[0] in ips), 203)


def checked(loop, ways, dials, a_stream, works):
    loop.turn(30.1)
    return answer(loop, dials, a_stream, works)


def test_health_threshold_and_recovery(loop, dials, warnings, a_stream):
    ways, _ = upstreams(loop, "[general]\nupstream_unhealthy_fail_threshold = 2")
    ways.health.start()
    route = ways.routes[0]
    loop.turn(29)
    assert not dials and ways.rows()[0]["last_check_age_secs"] == 29
    seen = checked(loop, ways, dials, a_stream, lambda target: dc_of(target) in (1, 2, 203))
    assert sorted(map(dc_of, seen)) == [1, 2, 3, 4, 5, 203]
    assert (route.healthy, route.fails, ways.rows()[0]["last_check_age_secs"]) == (True, 0, 0)
    for fails in (1, 2, 3):
        checked(loop, ways, dials, a_stream, lambda target: dc_of(target) in (1, 203))
        assert (route.healthy, route.fails) == (fails < 2, fails)
    assert sum("Upstream unhealthy (insufficient reachable DC groups)" in text for text in warnings) == 2, "every time"
    checked(loop, ways, dials, a_stream, lambda target: dc_of(target) in (3, 4, 5))
    assert (route.healthy, route.fails) == (True, 0)
    assert {dc: path.label() for dc, path in route.paths.items()} == {1: "unavailable", 2: "unavailable", 3: "prefer_v4", 4: "prefer_v4",
                                                                      5: "prefer_v4"}
    counters = ways.counters
    assert (counters.connect_attempt_total, counters.connect_success_total, counters.connect_fail_total) == (0, 0, 0)


def test_fewer_groups_need_fewer_answers(loop, dials, a_stream, warnings):
    """A SOCKS4 entry of an IPv6-only configuration still has the table's IPv4 addresses; 203 has none for it."""
    ways, _ = upstreams(loop, "[network]\nipv4 = false\nipv6 = true\nprefer = 6", Families(False, True, True))
    ways.health.start()
    seen = checked(loop, ways, dials, a_stream, lambda target: True)
    assert len(seen) == 6 and all(":" in ip for ip, _ in seen)


def test_a_group_falls_back_to_the_other_family_and_rotates(loop, dials, a_stream):
    ways, _ = upstreams(loop, '[network]\nipv6 = true\nprefer = 6\n[dc_overrides]\n2 = ["1.1.1.1:1", "1.1.1.2:1"]', V6_FIRST)
    ways.health.start()

    def asked(works):
        found = checked(loop, ways, dials, a_stream, works)
        return [target[0] for target in found if target[0].startswith("1.1.") or dc_of(target) == 2]
    dead = {"2001:67c:4e8:f002::a", "1.1.1.1", "1.1.1.2"}
    assert asked(lambda target: target[0] not in dead) == ["2001:67c:4e8:f002::a", "1.1.1.1", "1.1.1.2", "149.154.167.51"]
    assert ways.routes[0].paths[2].label() == "prefer_v4"
    assert asked(lambda target: target[0] != "2001:67c:4e8:f002::a") == ["2001:67c:4e8:f002::a", "1.1.1.1"], "behind the last good one"
    assert asked(lambda target: True) == ["2001:67c:4e8:f002::a"]
    assert ways.routes[0].paths[2].label() == "both_work"


def test_checks_hold_at_most_sixteen_sockets(loop, dials, a_stream):
    ways, _ = upstreams(loop, entries(*["weight = 1"] * 5))
    ways.health.start()
    loop.turn(30.1)
    assert len(dials) == 16
    assert len(answer(loop, dials, a_stream, lambda target: True)) == 30


def test_a_dead_route_does_not_hold_up_the_others(loop, dials, a_stream, warnings):
    ways, _ = upstreams(loop, entries('bind_addresses = ["127.0.0.1"]', 'bind_addresses = ["127.0.0.2"]'))
    ways.health.start()
    loop.turn(30.1)
    for dial in list(dials):
        if dial.source_ip == "127.0.0.2":
            dial.done(a_stream())
    loop.turn()
    assert [row["last_check_age_secs"] for row in ways.rows()] == [30, 0]
    loop.turn(10.1)
    assert ways.routes[0].fails == 1, "10 s each, all at once"


def test_a_scoped_entry_is_checked_with_its_first_scope(loop, monkeypatch, dials):
    ways, _ = upstreams(loop, entries('type = "socks5"\naddress = "127.0.0.1:1"\nscopes = " vip , gold"\nusername = "u"\npassword = "p"'))
    said = []
    monkeypatch.setattr(telemt, "socks5_dialogue", lambda target, login: said.append(login) or iter(()))
    monkeypatch.setattr(telemt.Route, "dialogue", lambda self, target, scope: said.append(scope))
    ways.health.start()
    loop.turn(30.1)
    assert set(said) == {"vip"}


def test_overrides_are_hot_for_the_checks(loop, dials, a_stream, warnings):
    ways, settings = upstreams(loop)
    ways.health.start()
    ways.apply(settings_of('[dc_overrides]\n2 = "1.1.1.1:1"\n0 = "1.1.1.1:2"\nx = "1.1.1.1:3"\n-2 = "1.1.1.1:4"\n"05" = "1.1.1.1:5"'))
    seen = checked(loop, ways, dials, a_stream, lambda target: False)
    assert ("1.1.1.1", 1) in seen and ("1.1.1.1", 5) in seen and not {("1.1.1.1", n) for n in (2, 3, 4)} & set(seen)
    assert sum("Invalid dc_overrides key for health-check, skipping" in text for text in warnings) == 3


@pytest.fixture
def infos(monkeypatch):
    found = []
    monkeypatch.setattr(LogBook, "sink", lambda level, target, text: found.append(text) if level == Level.INFO else None)
    monkeypatch.setattr(LogBook, "threshold", Level.TRACE)
    return found


def test_the_table_after_the_start(loop, dials, a_stream, infos):
    ways, _ = upstreams(loop, "[network]\nipv6 = true\nprefer = 6\n[dc_overrides]\n7 = \"1.1.1.1:1\"\n2 = \"2.2.2.2:2\"", V6_FIRST)
    telemt.Survey(ways).start()
    assert len(dials) == 13, "all at once"
    loop.at += 0.0231
    for dial in list(dials):
        if (dc_of(dial.where) in (1, 203) and ":" not in dial.where[0]) or dc_of(dial.where) == 3:
            dial.done(a_stream())
        elif dc_of(dial.where) == 2:
            dial.done(REFUSED)
    assert infos == []
    loop.turn(5.1)
    rule = "=" * 60
    assert infos == [
        "================= Telegram DC Connectivity =================", "  IPv6 in use / IPv4 is fallback", "  via direct", rule,
        "    DC1 [IPv6] 2001:b28:f23d:f001::a:443 - FAIL (timeout)",
        "    DC2 [IPv6] 2001:67c:4e8:f002::a:443 - FAIL (IO error: Connection refused (os error 111))",
        "    DC3 [IPv6] 2001:b28:f23d:f003::a:443 - 23 ms", "    DC4 [IPv6] 2001:67c:4e8:f004::a:443 - FAIL (timeout)",
        "    DC5 [IPv6] 2001:b28:f23f:f005::a:443 - FAIL (timeout)", rule,
        "    DC1 [IPv4] 149.154.175.50:443\t\t\t\t23 ms",
        "    DC2 [IPv4] 149.154.167.51:443:\t\t\t\tFAIL (IO error: Connection refused (os error 111))",
        "    DC3 [IPv4] 149.154.175.100:443\t\t\t\t23 ms", "    DC4 [IPv4] 149.154.167.91:443:\t\t\t\tFAIL (timeout)",
        "    DC5 [IPv4] 149.154.171.5:443:\t\t\t\tFAIL (timeout)",
        "    DC2 [IPv4] 2.2.2.2:2\t\t\t\t23 ms", "    DC7 [IPv4] 1.1.1.1:1\t\t\t\t23 ms",
        "    DC203 [IPv4] 91.105.192.100:443\t\t\t\t23 ms", rule]
    paths = ways.routes[0].paths
    assert [path.label() for path in paths.values()] == ["prefer_v4", "unavailable", "both_work", "unavailable", "unavailable"]
    assert [path.ema_ms and round(path.ema_ms) for path in paths.values()] == [23, None, 23, None, None]
    assert ways.routes[0].healthy and ways.counters.connect_attempt_total == 0


@pytest.mark.parametrize(("text", "families", "works", "line"), [
    ("", V4, True, "  IPv4 only / IPv6 unavailable"), ("", V4, False, "  No DC connectivity"),
    ("[network]\nipv4 = false\nipv6 = true\nprefer = 6", Families(False, True, True), True, "  IPv6 only / IPv4 unavailable"),
    ("[network]\nipv6 = true", BOTH, True, "  IPv4 in use / IPv6 is fallback"),
])
def test_the_status_line_of_the_table(loop, dials, a_stream, infos, text, families, works, line):
    ways, _ = upstreams(loop, text, families)
    telemt.Survey(ways).start()
    answer(loop, dials, a_stream, lambda target: works)
    assert infos[1] == line
    assert ways.routes[0].paths[1].label() == ("unavailable" if not works else "both_work" if families == BOTH
                                               else "prefer_v4" if families == V4 else "prefer_v6")


@pytest.mark.parametrize(("entry", "name"), [
    ("", "direct"), ('interface = "lo"\nbind_addresses = ["127.0.0.1", "::1"]', "direct dev=lo src=127.0.0.1,::1"),
    ('type = "socks4"\naddress = "10.0.0.1:1080"\nuser_id = "secret"', "socks4://10.0.0.1:1080"),
    ('type = "socks5"\naddress = "h:1"\nusername = "secret"\npassword = "secret"', "socks5://h:1"),
])
def test_names_of_routes(loop, entry, name):
    assert upstreams(loop, entries(entry))[0].routes[0].name() == name


def test_rows_as_the_api_shows_them(loop):
    ways, _ = upstreams(loop, entries("weight = 7", 'type = "socks5"\naddress = "h:1"\nscopes = "a, b"'))
    ways.routes[1].paths[3].feed(12.5)
    row = ways.rows()[1]
    assert {name: value for name, value in row.items() if name != "dc"} == {
        "upstream_id": 1, "route_kind": "socks5", "address": "h:1", "weight": 1, "scopes": "a, b", "healthy": True, "fails": 0,
        "last_check_age_secs": 0, "effective_latency_ms": 12.5}
    assert [cell["dc"] for cell in row["dc"]] == [1, 2, 3, 4, 5] and row["dc"][2]["latency_ema_ms"] == 12.5
    assert ways.rows()[0]["address"] == "direct" and ways.summary()["socks5_total"] == 1


# -- SOCKS


class Script(threading.Thread):
    """A SOCKS server that reads what it expects and answers in the pieces it is told; then it echoes, unless it is mute."""

    def __init__(self, *steps, pieces=0, then=b"", mute=False):
        super().__init__(daemon=True)
        self.steps, self.pieces, self.then, self.mute, self.fault = steps, pieces, then, mute, None
        self.finished = threading.Event()      # the last step is done
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self):
        try:
            peer, _ = self.listener.accept()
            peer.settimeout(patient(10))
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with peer:
                for expected, answer in self.steps:
                    got = b""
                    while len(got) < len(expected):
                        got += peer.recv(len(expected) - len(got)) or b"EOF" * 100
                    assert got == expected, got.hex()
                    if answer is None:
                        return
                    answer += self.then if (expected, answer) == self.steps[-1] else b""
                    step = self.pieces or len(answer) or 1
                    for at in range(0, len(answer), step):
                        peer.sendall(answer[at:at + step])
                        time.sleep(0.001 if self.pieces else 0)
                self.finished.set()
                while data := peer.recv(4096):
                    peer.sendall(b"" if self.mute else data)
        except (OSError, AssertionError) as fault:
            self.fault = fault
        finally:
            self.listener.close()


@pytest.fixture
def real_loop():
    """For real sockets.  Its clock stands still: no deadline passes because the machine is slow."""
    loop = TestLoop()
    loop.turn()
    yield loop
    assert set(loop.handlers) == {loop.mailbox.fd}, "a socket was left in the poller"
    loop.dispose()


def dial_through(loop, entry, done, scope="", text=""):
    ways, _ = upstreams(loop, entries(entry) + f"[general]\nupstream_connect_retry_attempts = 1\n{text}")
    return ways, ways.connect([("149.154.167.51", 443)], done, scope=scope)


def wait_for(loop, condition, limit=10.0):
    end = time.monotonic() + patient(limit)
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        loop.turn()
        time.sleep(0.0005)


REQUEST4 = bytes.fromhex("040101bb959aa733") + b"me\0"
REQUEST5 = bytes.fromhex("05010001959aa73301bb")
BOUND = bytes.fromhex("05000001c000020a9c41")


@pytest.mark.parametrize("pieces", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("then", [b"", b"first bytes of the data centre"])
@pytest.mark.parametrize(("entry", "steps", "bound"), [
    ('type = "socks4"\nuser_id = "me"', [(REQUEST4, bytes.fromhex("005a9c41c000020a"))], ("192.0.2.10", 40001)),
    ('type = "socks5"', [(b"\5\1\0", b"\5\0"), (REQUEST5, BOUND)], ("192.0.2.10", 40001)),
    ('type = "socks5"\nusername = "u"\npassword = "pw"',
     [(b"\5\2\0\2", b"\5\2"), (b"\1\1u\2pw", b"\1\0"), (REQUEST5, bytes.fromhex("05000003026162") + b"\0\x50")], ("0.0.0.0", 80)),
    ('type = "socks5"',
     [(b"\5\1\0", b"\5\0"), (REQUEST5, b"\5\0\0\4" + bytes(15) + b"\1\0\7")], ("::1", 7)),
], ids=["socks4", "socks5", "login-and-name", "v6-bound"])
def test_socks_dialogue_in_any_pieces_loses_no_byte(real_loop, entry, steps, bound, pieces, then):
    server = Script(*steps, pieces=pieces, then=then)
    found = []
    ways, _ = dial_through(real_loop, f'{entry}\naddress = "127.0.0.1:{server.port}"', found.append)
    wait_for(real_loop, lambda: found)
    assert isinstance(found[0], Connected), found[0]
    assert found[0].bound == bound and found[0].kind == ways.routes[0].kind and found[0].local[0] == "127.0.0.1"
    sock = found[0].stream.release()
    sock.settimeout(patient(5))
    sock.sendall(b"ping")
    data = b""
    while len(data) < len(then) + 4:
        data += sock.recv(100)
    assert data == then + b"ping"
    sock.close()
    server.join(patient(5))
    assert server.fault is None


SOCKS = [case for case in load_vector("socks")["cases"] if not case["result"]["ok"] and case["steps"]]


@pytest.mark.parametrize("case", SOCKS, ids=lambda case: case["name"])
def test_socks_refusals(real_loop, case, warnings):
    steps, expected = [], b""
    for step in case["steps"]:
        (kind, value), = step.items()
        if kind == "send":
            expected = bytes.fromhex(value)
        else:
            steps.append((expected, None if kind == "eof" else bytes.fromhex(value)))
            expected = b""
    server = Script(*steps)
    keys = {"user_id": case.get("user_id"), "username": case.get("username"), "password": case.get("password")}
    lines = [f'{key} = "{value}"' for key, value in keys.items() if value is not None]
    found = []
    ways, _ = dial_through(real_loop, "\n".join([f'type = "{case["protocol"]}"', f'address = "127.0.0.1:{server.port}"', *lines]),
                           found.append)
    wait_for(real_loop, lambda: found)
    assert (str(found[0]), found[0].hard) == (case["result"]["display"], case["result"]["hard"])
    assert ways.routes[0].fails == 1 and not any("secret" in line for line in warnings)
    real_loop.turn()


@pytest.mark.parametrize("steps", [[], [(b"\5\1\0", b"")], [(b"\5\1\0", b"\5")], [(b"\5\1\0", b"\5\0"), (REQUEST5, BOUND[:-1])]],
                         ids=["accepts only", "reads only", "half a greeting", "half a reply"])
def test_a_half_answering_server_costs_one_timeout(real_loop, steps):
    server = Script(*steps, mute=True)
    found = []
    dial_through(real_loop, f'type = "socks5"\naddress = "127.0.0.1:{server.port}"', found.append, text="[timeouts]\ntg_connect = 1")
    wait_for(real_loop, server.finished.is_set)
    real_loop.turn(0.99)
    assert not found
    real_loop.turn(0.02)
    assert [str(error) for error in found] == ["Connection timeout to 149.154.167.51:443"]
    real_loop.turn()


def test_a_scope_replaces_the_credentials(real_loop):
    server = Script((b"\5\2\0\2", b"\5\2"), (b"\1\2vp\2vp", b"\1\0"), (REQUEST5, BOUND))
    found = []
    dial_through(real_loop, f'type = "socks5"\nscopes = "vp"\nusername = "u"\npassword = "p"\naddress = "127.0.0.1:{server.port}"',
                 found.append, scope="vp")
    wait_for(real_loop, lambda: found)
    found[0].stream.close()
    real_loop.turn()
    assert server.fault is None


def test_a_closed_port_and_a_bad_address(real_loop, warnings):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    found = []
    dial_through(real_loop, f'type = "socks5"\naddress = "127.0.0.1:{port}"', found.append)
    dial_through(real_loop, 'type = "socks5"\naddress = "nonsense"', found.append)
    wait_for(real_loop, lambda: len(found) == 2)
    texts = {str(error): error.hard for error in found}
    assert texts == {"IO error: Connection refused (os error 111)": True, "Config error: invalid SOCKS server address: nonsense": True}
    assert sum("invalid SOCKS server address" in line for line in warnings) >= 1


@pytest.mark.parametrize(("entry", "text"), [
    ('type = "socks4"\naddress = "127.0.0.1:1"\nuser_id = "a\\u0000b"', "Config error: SOCKS4 user id contains a NUL byte"),
    (f'type = "socks5"\naddress = "127.0.0.1:1"\nusername = "{"u" * 256}"\npassword = "p"',
     "Config error: SOCKS5 username or password is longer than 255 bytes"),
])
def test_credentials_that_cannot_be_sent(loop, dials, warnings, entry, text):
    found = []
    ways, _ = dial_through(loop, entry, found.append)
    loop.turn()
    assert (str(found[0]), found[0].hard, dials) == (text, True, [])
    assert sum("connections of this upstream fail" in line for line in warnings) == 1 and not any("uuu" in line for line in warnings)


def test_a_server_by_name(real_loop, monkeypatch):
    """Overrides first, else the system; all addresses in order; who waits for the same name is served by one question."""
    server = Script((b"\5\1\0", b"\5\0"), (REQUEST5, BOUND))
    asked = []

    def getaddrinfo(host, port, **_):
        asked.append(host)
        return [(0, 0, 0, "", (ip, port)) for ip in ("127.0.0.77", "127.0.0.1")]
    monkeypatch.setattr(telemt.socket, "getaddrinfo", getaddrinfo)
    found = []
    dial_through(real_loop, f'type = "socks5"\naddress = "proxy.example:{server.port}"', found.append)
    wait_for(real_loop, lambda: found)
    assert isinstance(found[0], Connected) and asked == [b"proxy.example"]
    found[0].stream.close()
    server = Script((b"\5\1\0", b"\5\0"), (REQUEST5, BOUND))
    dial_through(real_loop, f'type = "socks5"\naddress = "Proxy.example:{server.port}"', found.append,
                 text=f'[network]\ndns_overrides = ["proxy.example:{server.port}:127.0.0.1"]')
    wait_for(real_loop, lambda: len(found) == 2)
    assert isinstance(found[1], Connected) and len(asked) == 1
    found[1].stream.close()
    real_loop.turn()


@pytest.mark.parametrize(("answer", "text", "hard"), [
    (socket.gaierror(-2, "Name or service not known"), "IO error: failed to lookup address information: Name or service not known", False),
    ([], "IO error: failed to lookup address information: no address", False),
])
def test_a_name_that_does_not_resolve(real_loop, monkeypatch, answer, text, hard):
    def getaddrinfo(*_, **__):
        if isinstance(answer, Exception):
            raise answer
        return answer
    monkeypatch.setattr(telemt.socket, "getaddrinfo", getaddrinfo)
    found = []
    dial_through(real_loop, 'type = "socks5"\naddress = "proxy.example:1"', found.append)
    wait_for(real_loop, lambda: found)
    assert (str(found[0]), found[0].hard) == (text, hard)


def test_a_name_that_is_not_ascii_is_our_operators_fault(loop, dials, warnings):
    found = []
    dial_through(loop, 'type = "socks5"\naddress = "прокси.example:1"', found.append)
    loop.settle()
    assert str(found[0]) == "Config error: host name must be ASCII: прокси.example" and found[0].hard


@pytest.mark.parametrize(("prefer_v6", "took_v4", "ema"), [(False, 40.0, 40.0), (True, 40.0, 20.0), (False, None, 20.0)])
def test_the_table_teaches_the_time_of_the_preferred_family_that_works(loop, prefer_v6, took_v4, ema):
    """upstream-and-relay.md D6."""
    route = upstreams(loop, families=telemt.Families(True, True, prefer_v6))[0].routes[0]
    v4, v6 = telemt.DC_TABLE[2]
    telemt.Survey._learn(route, [telemt.Ping(2, (v6, 443), 20.0, ""), telemt.Ping(2, (v4, 443), took_v4, "")])
    assert route.paths[2].ema_ms == ema and route.paths[2].works_v4 is (took_v4 is not None)
