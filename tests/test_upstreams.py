"""Room 15: which address a data-centre index means, and what a connect cycle does and counts."""
import os
import socket

import pytest

import telemt
from telemt import Counters, DcDirectory, Families, Level, LogBook, RouteError, Stream, Upstreams, decide_families, parse_target
from tests.cases import TestLoop, settings_of

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


@pytest.mark.parametrize(("families", "dc", "targets"), [
    (V4, 1, [("149.154.175.50", 443)]), (V4, -4, [("149.154.167.91", 443)]), (V4, 5, [("149.154.171.5", 443)]),
    (BOTH, 2, [("149.154.167.51", 443), ("2001:67c:4e8:f002::a", 443)]),
    (V6_FIRST, 3, [("2001:b28:f23d:f003::a", 443), ("149.154.175.100", 443)]),
    (Families(False, True, True), 1, [("2001:b28:f23d:f001::a", 443)]),
    (V4, 203, [("91.105.192.100", 443)]), (V4, 0, [("149.154.167.51", 443)]), (V4, 10002, [("149.154.167.51", 443)]),
    (V4, -203, [("149.154.167.51", 443)]),
])
def test_table_and_default_cluster(families, dc, targets):
    text = '[general]\nunknown_dc_log_path = ""'
    assert DcDirectory(families).targets(dc, settings_of(text)) == targets


@pytest.mark.parametrize(("families", "texts", "targets"), [
    (V4, ["[::1]:1", "1.2.3.4:5", "1.2.3.5:6"], [("1.2.3.4", 5), ("1.2.3.5", 6), ("::1", 1)]),
    (V6_FIRST, ["1.2.3.4:5", "[::1]:1"], [("::1", 1), ("1.2.3.4", 5)]),
    (V4, ["[::1]:1"], [("::1", 1)]),
    (V4, [" 1.2.3.4:5", "host:1", "1.2.3.4:5"], [("1.2.3.4", 5)]),
])
def test_overrides(families, texts, targets, warnings):
    settings = settings_of(f"[dc_overrides]\n2 = {texts!r}")
    assert DcDirectory(families).targets(2, settings) == targets
    assert len(warnings) == len(texts) - len(targets)
    assert DcDirectory(families).targets(-2, settings)[0][0].startswith(("149.", "2001:")), "exact text: 2 does not serve -2"


def test_only_bad_overrides_fall_back_to_the_table(warnings):
    assert DcDirectory(V4).targets(4, settings_of('[dc_overrides]\n4 = "nonsense"')) == [("149.154.167.91", 443)]


@pytest.mark.parametrize(("default_dc", "ip"), [
    ("", "149.154.167.51"), ("default_dc = 4", "149.154.167.91"), ("default_dc = 9", "149.154.167.51"),
])
def test_default_dc(default_dc, ip):
    settings = settings_of(f'{default_dc}\n[general]\nunknown_dc_log_path = ""')
    assert DcDirectory(V4).targets(77, settings) == [(ip, 443)]


def test_cdn_has_an_ipv6_address_of_its_own():
    settings = settings_of("[network]\nipv4 = false\nipv6 = true\nprefer = 6")
    assert DcDirectory(Families(False, True, True)).targets(203, settings) == [("2a0a:f280:203:a:5000::100", 443)]


def test_unknown_dc_file_gets_each_index_once(tmp_path, warnings):
    path = tmp_path / "unknown.txt"
    settings = settings_of(f'[general]\nunknown_dc_log_path = "{path}"')
    directory = DcDirectory(V4)
    for dc in (77, 77, -78, 77):
        directory.targets(dc, settings)
    assert path.read_text() == "dc_idx=77\ndc_idx=-78\n" and path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("path", ["fifo", "nul\\u0000byte", "no/such/directory"])
def test_unknown_dc_file_that_cannot_be_written_is_one_warning(tmp_path, warnings, path):
    """Found by review: a NUL in the path was a crash, a FIFO held up the loop."""
    os.mkfifo(tmp_path / "fifo")
    directory = DcDirectory(V4)
    for dc in (77, 78):
        directory.targets(dc, settings_of(f'[general]\nunknown_dc_log_path = "{tmp_path}/{path}"'))
    assert sum("cannot be written" in text for text in warnings) == 1


def test_unknown_dc_file_refuses_dots_and_links(tmp_path, warnings):
    (tmp_path / "real").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for path in (f"{tmp_path}/x/../escape", f"{tmp_path}/link"):
        DcDirectory(V4).targets(77, settings_of(f'[general]\nunknown_dc_log_path = "{path}"'))
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
        self.where, self.timeout_s, self.done, self.source_ip, self.aborted = (ip, port), deadlines.seconds, done, source_ip, False
        FakeDial.made.append(self)

    def abort(self):
        self.aborted = True

    def on_timeout(self):
        raise AssertionError("the test ends its dials itself")


@pytest.fixture
def dials(monkeypatch):
    FakeDial.made = []
    monkeypatch.setattr(telemt, "Dial", FakeDial)
    return FakeDial.made


def upstreams(loop, text=""):
    settings = settings_of(text)
    return Upstreams(loop, settings, Counters(), V4), settings


TWO = '[dc_overrides]\n2 = ["1.1.1.1:1", "2.2.2.2:2"]\n'
REFUSED = RouteError("IO error: Connection refused (os error 111)", hard=True)
SLOW = RouteError("Connection timeout to 1.1.1.1:1")


def test_cycle_succeeds_at_once(loop, dials, warnings):
    ways, settings = upstreams(loop, TWO + "[timeouts]\ntg_connect = 3")
    found = []
    ways.connect_dc(2, settings, "", found.append)
    assert dials[0].where == ("1.1.1.1", 1) and dials[0].timeout_s == 3
    one, two = socket.socketpair()
    dials[0].done(Stream(loop, one))
    assert isinstance(found[0], Stream) and not warnings
    counters = ways.counters
    assert (counters.connect_attempt_total, counters.connect_success_total, counters.connect_fail_total) == (1, 1, 0)
    one.close()
    two.close()


def test_cycle_retries_on_the_next_address_and_gives_up(loop, dials, warnings):
    ways, settings = upstreams(loop, TWO + "[general]\nupstream_connect_retry_attempts = 3")
    found = []
    ways.connect_dc(2, settings, "", found.append)
    dials[0].done(REFUSED)
    loop.turn(0.2)
    dials[1].done(SLOW)
    loop.turn(0.2)
    assert [dial.where for dial in dials] == [("1.1.1.1", 1), ("2.2.2.2", 2), ("1.1.1.1", 1)]
    dials[2].done(REFUSED)
    assert found == [REFUSED] and warnings == [f"Upstream failed after retries: {REFUSED} fails=1 attempts=3"]
    counters = ways.counters
    assert (counters.connect_attempt_total, counters.connect_fail_total, counters.connect_attempts) == (3, 1, [0, 0, 1, 0])
    assert counters.connect_fail_ms == [0, 1, 0, 0]


def test_failfast_ends_at_a_hard_error_only(loop, dials, warnings):
    ways, settings = upstreams(loop, TWO + "[general]\nupstream_connect_failfast_hard_errors = true\nupstream_connect_retry_backoff_ms = 0")
    found = []
    ways.connect_dc(2, settings, "", found.append)
    dials[0].done(SLOW)
    loop.turn()
    assert not found
    dials[1].done(REFUSED)
    ways.connect_dc(2, settings, "", found.append)
    dials[2].done(REFUSED)
    assert found == [REFUSED, REFUSED] and ways.counters.connect_failfast_hard_error_total == 2


def test_aborted_cycle_counts_nothing_and_closes_a_late_stream(loop, dials):
    ways, settings = upstreams(loop, TWO)
    found = []
    cycle = ways.connect_dc(2, settings, "", found.append)
    cycle.abort()
    one, two = socket.socketpair()
    dials[0].done(Stream(loop, one))
    loop.turn()
    assert dials[0].aborted and not found and one.fileno() == -1 and ways.counters.connect_fail_total == 0
    two.close()


@pytest.mark.parametrize(("scope", "scopes", "admits"), [
    ("", "", True), ("", "a", False), ("a", "", False), ("a", "b, a", True), ("a", "*", False), ("A", "a", False),
])
def test_scopes(loop, dials, scope, scopes, admits, warnings):
    ways, settings = upstreams(loop, f'[[upstreams]]\ntype = "direct"\nscopes = "{scopes}"')
    found = []
    ways.connect_dc(2, settings, scope, found.append)
    loop.turn()
    assert bool(dials) is admits
    if not admits:
        assert str(found[0]) == "Config error: No upstreams available" and ways.counters.connect_attempt_total == 0


def test_binding_rotates_and_fails_closed(loop, dials, warnings):
    ways, settings = upstreams(loop, '[[upstreams]]\ntype = "direct"\nbind_addresses = ["127.0.0.2", "127.0.0.3", "::1"]')
    for _ in range(3):
        ways.connect_dc(2, settings, "", lambda _: None)
    assert [dial.source_ip for dial in dials] == ["127.0.0.2", "127.0.0.3", "127.0.0.2"]
    for text, message in (('bind_addresses = ["::1"]', "No valid bind_addresses for target family 149.154.167.51:443"),
                          ('interface = "eth9"', "No usable address on interface eth9 for target family 149.154.167.51:443")):
        ways, settings = upstreams(loop, f'[[upstreams]]\ntype = "direct"\n{text}\n[general]\nupstream_connect_retry_attempts = 1')
        found = []
        ways.connect_dc(2, settings, "", found.append)
        loop.turn()
        assert str(found[0]) == message and len(dials) == 3


def test_socks_entries_fail_and_never_leave_directly(loop, dials, warnings):
    ways, settings = upstreams(loop, '[[upstreams]]\ntype = "socks5"\naddress = "127.0.0.1:1"\n'
                                     "[general]\nupstream_connect_retry_attempts = 1")
    found = []
    ways.connect_dc(2, settings, "", found.append)
    loop.turn()
    assert not dials and "socks5" in str(found[0]) and 'type "socks5" is not available' in warnings[0]
