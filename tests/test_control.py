"""Room 23: links, the seam to the control plane, reload."""
import os
import threading

import pytest

import telemt
from telemt import Level, LogBook, is_bogon, link_host, user_links
from tests.cases import LOCAL, OTHER, SECRET, control_of, settings_of


# -- links


def test_rows_of_a_user():
    settings = settings_of('[general.modes]\nclassic = true\nsecure = true\n[censorship]\ntls_domain = "a.b"\ntls_domains = ["c.d"]')
    base = "tg://proxy?server=2001:db8::1&port=443&secret="
    assert [row[:2] for row in user_links(settings, SECRET, "2001:db8::1", 443)] == [
        ("Classic", base + SECRET), ("DD", f"{base}dd{SECRET}"),
        ("EE-TLS", f"{base}ee{SECRET}612e62"), ("EE-TLS", f"{base}ee{SECRET}632e64")]


@pytest.mark.parametrize(("listener", "general", "detected", "host"), [
    ('ip = "0.0.0.0"', "", ("8.8.4.4", None), "8.8.4.4"),
    ('ip = "0.0.0.0"', "", (None, None), "0.0.0.0"),
    ('ip = "0.0.0.0"', 'middle_proxy_nat_ip = "9.9.9.9"', ("10.0.0.1", None), "9.9.9.9"),
    ('ip = "0.0.0.0"', 'middle_proxy_nat_ip = "9.9.9.9"', ("8.8.4.4", None), "8.8.4.4"),
    ('ip = "192.168.1.1"', "", ("8.8.4.4", None), "192.168.1.1"),
    ('ip = "0.0.0.0"\nannounce = "proxy.example"', "", ("8.8.4.4", None), "proxy.example"),
    ('ip = "::"', "", ("8.8.4.4", "2001:4860::1"), "2001:4860::1"),
])
def test_host_of_a_listener(listener, general, detected, host):
    settings = settings_of(f"[general]\n{general}\n[[server.listeners]]\n{listener}")
    assert link_host(settings.server.listeners[0], detected, settings) == host


NOWHERE = '[server]\nlisten_addr_ipv4 = ""\nlisten_addr_ipv6 = ""\nlisten_tcp = false\n'


@pytest.mark.parametrize(("text", "detected", "hosts"), [
    pytest.param('[general.links]\npublic_host = " h.example "', ("8.8.4.4", None), ["h.example"], id="public host alone"),
    pytest.param('[general.links]\npublic_host = "  "', ("8.8.4.4", None), ["8.8.4.4"], id="a blank one is none"),
    pytest.param('[[server.listeners]]\nip = "0.0.0.0"\nannounce = "a.example"\n[[server.listeners]]\nip = "9.9.9.9"\n'
                 '[[server.listeners]]\nip = "::"', ("8.8.4.4", "2001:4860::1"), ["a.example", "9.9.9.9", "2001:4860::1"], id="in order"),
    pytest.param('[[server.listeners]]\nip = "0.0.0.0"\nannounce_ip = "0.0.0.0"', ("8.8.4.4", None), ["8.8.4.4"], id="announce 0.0.0.0"),
    pytest.param('[[server.listeners]]\nip = "0.0.0.0"\n[[server.listeners]]\nip = "8.8.4.4"', ("8.8.4.4", None), ["8.8.4.4"], id="once"),
    pytest.param("[server]\nlisten_tcp = false", ("8.8.4.4", "2001:4860::1"), ["8.8.4.4", "2001:4860::1"], id="detected"),
    pytest.param('[server]\nlisten_tcp = false\nlisten_addr_ipv4 = " 7.7.7.7 "', (None, None), ["7.7.7.7"], id="configured"),
    pytest.param(NOWHERE, (None, None), [], id="none"),
])
def test_hosts_of_the_links_that_the_api_gives(text, detected, hosts):
    assert telemt.link_hosts(settings_of(text), detected) == hosts


@pytest.mark.parametrize(("ip", "bogon"), [("8.8.8.8", False), ("10.1.2.3", True), ("100.64.0.1", True), ("127.0.0.1", True),
                                           ("172.32.0.1", False), ("2001:4860::1", False), ("2001:db8::1", True), ("fe80::1", True)])
def test_bogons(ip, bogon):
    assert is_bogon(ip) is bogon


def test_link_block(logged):
    settings = settings_of('[general.links]\nshow = ["bob", "nobody"]\n[censorship]\ntls_domain = "a.b"\n[access.users]\n'
                           f'alice = "{SECRET}"\nbob = "{SECRET.upper()}"')
    telemt.print_links(settings, "h.example", 8443)
    link = f"proxy?server=h.example&port=8443&secret=ee{SECRET.upper()}612e62"
    assert logged == [
        (Level.INFO, "--- Proxy Links (h.example) ---"), (Level.INFO, "User: bob"), (Level.INFO, f"  EE-TLS:  tg://{link}"),
        (Level.WARN, "User 'nobody' in show_link not found"), (Level.INFO, "------------------------"),
        (Level.INFO, f"Web link of bob (EE-TLS): https://t.me/{link}")]


def test_no_block_when_nothing_is_shown(logged):
    telemt.print_links(settings_of("[general.links]\nshow = []"), "h", 1)
    assert not logged


# -- the seam to the control plane


@pytest.fixture
def control(make_server, tmp_path):
    """A Control whose loop is turned by this thread."""
    return control_of(make_server(), str(tmp_path / "config.toml"))


def asked(control, build, timeout_s=5.0):
    """Outcome of ask() in another thread, while this one turns the loop until it is there."""
    found = []

    def work():
        try:
            found.append(control.ask(build, timeout_s))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        control._server.loop.turn(0.01)
    thread.join()
    return found[0]


def test_ask_runs_on_the_loop_thread_and_answers(control):
    assert asked(control, threading.get_ident) == threading.get_ident()


def test_an_error_in_a_question_reaches_the_asker_and_not_the_loop(control, logged):
    def build():
        raise ValueError("no")
    assert repr(asked(control, build)) == "ValueError('no')"
    assert not logged
    assert asked(control, lambda: 7) == 7


def test_a_question_nobody_waits_for_is_not_run_later(control):
    ran = []
    with pytest.raises(TimeoutError):
        control.ask(lambda: ran.append(1), 0.01)
    control._server.loop.turn()
    assert ran == []


def test_a_text_is_loaded_with_includes_of_the_config_directory(make_server, tmp_path):
    (tmp_path / "users.toml").write_text(f'[access.users]\nzoe = "{SECRET}"\n')
    control = control_of(make_server(), str(tmp_path / "config.toml"))
    text = 'include = "users.toml"\n'
    assert control.load(text).settings.access.users == {"zoe": SECRET}
    expanded, files = control.expand(text, {str(tmp_path / "users.toml"): f'[access.users]\nadam = "{SECRET}"\n'.encode()})
    assert (files, control.parse(expanded)["access"]["users"]) == ((str(tmp_path / "users.toml"),), {"adam": SECRET})
    with pytest.raises(telemt.ConfigError, match="No users configured"):
        control.load("[access.users]\n")


def test_a_published_configuration_is_live_when_publish_returns(control):
    text = f'[access.users]\nzoe = "{SECRET}"\n'
    assert asked(control, lambda: control._reloader.apply(control.load(text), {control.config_path: text.encode()})) is None
    assert list(control.users) == ["zoe"]
    assert control.settings.access.users == {"zoe": SECRET}


def test_links_of_a_user(make_server):
    server = make_server(LOCAL.replace("127.0.0.1", "::1").replace("false\n", 'false\ntls_domain = "a.b"\n')
                         + f'announce = "häuser.example"\n[general.links]\npublic_port = 8443\n[access.users]\nzoe = "{SECRET}"')
    control = control_of(server, "config.toml")
    link = f"tg://proxy?server=h%C3%A4user.example&port=8443&secret=ee{SECRET}612e62"
    assert control.links("zoe") == [telemt.Link("EE-TLS", link, "tls", "h%C3%A4user.example", "a.b")]
    assert control.links("nobody") == []


# -- reload


class Reloading:
    """A server with a configuration file; helper threads work at once and sleeping takes no time."""

    def __init__(self, server, directory, text, monkeypatch, level_of=None):
        self.path = directory / "config.toml"
        self.write(text)
        self.server, self.loop = server, server.loop
        self.sleeps = 0
        self.between = []                      # called one by one between two readings
        monkeypatch.setattr(telemt.time, "sleep", self.sleep)
        monkeypatch.setattr(self.loop, "offload", lambda work, done: self.loop.defer(lambda: done(work())))
        reading = telemt.read_config(str(self.path))
        loaded = telemt.load_reading(reading)
        server.apply(loaded.settings)
        self.reloader = telemt.Reloader(server, loaded, reading, "conf.toml", level_of or (lambda word: None))
        self.reloader.start()

    def sleep(self, seconds):
        assert seconds == 0.05
        self.sleeps += 1
        if self.between:
            self.between.pop(0)()

    def write(self, text):
        """Replace the file by another one."""
        new = self.path.with_name("new")
        new.write_bytes(text if isinstance(text, bytes) else text.encode())
        new.rename(self.path)

    def look(self, seconds=1):
        """Let the reloader look so many times."""
        for _ in range(seconds):
            self.loop.turn(1.0)
            self.loop.turn()
            self.loop.turn()

    @property
    def users(self):
        return dict(self.server.settings.access.users)


BASE = f'[general]\nuse_middle_proxy = false\n[general.links]\nshow = []\n[access.users]\nalice = "{SECRET}"\n'


@pytest.fixture
def make_reloading(make_server, tmp_path, monkeypatch, logged):
    def make(text=BASE, **rest):
        made = Reloading(make_server(), tmp_path, text, monkeypatch, **rest)
        logged.clear()
        return made
    return make


def test_a_new_file_is_in_force_within_a_second(make_reloading, logged):
    bench = make_reloading()
    bench.write(BASE + f'bob = "{OTHER}"\n')
    bench.look()
    assert bench.users == {"alice": SECRET, "bob": OTHER}
    assert logged == [(Level.INFO, "config reload: users added: [bob]")]
    assert bench.server.sources.reloads == 1 and bench.sleeps == 1
    bench.look(10)
    assert (bench.server.sources.reloads, bench.sleeps, len(logged)) == (1, 1, 1)


def test_a_quiet_file_is_stated_once_a_second_and_read_every_three(make_reloading, monkeypatch):
    bench = make_reloading()
    stats, reads = [], []
    real_stat, real_read = telemt.stat_mark, telemt.read_config_bytes
    monkeypatch.setattr(telemt, "stat_mark", lambda path: (stats.append(path), real_stat(path))[1])
    monkeypatch.setattr(telemt, "read_config_bytes", lambda path: (reads.append(path), real_read(path))[1])
    turns = bench.loop.turns
    for _ in range(30):
        bench.loop.turn(1.0)
    assert (len(stats), len(reads), bench.loop.turns - turns) == (30, 10, 30)


def test_a_touch_changes_nothing(make_reloading, logged):
    bench = make_reloading()
    os.utime(bench.path, (1, 1))
    bench.look(4)
    assert (logged, bench.server.sources.reloads, bench.sleeps) == ([], 0, 1)


def test_a_change_that_no_time_stamp_tells_is_found_by_content(make_reloading):
    bench = make_reloading()
    before = os.stat(bench.path)
    with open(bench.path, "r+b") as file:
        file.write(BASE.replace(SECRET, OTHER).encode())
    os.utime(bench.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    bench.look(3)
    assert bench.users == {"alice": OTHER}


def test_an_included_file_is_watched_as_well(make_reloading, tmp_path):
    (tmp_path / "users.toml").write_text(f'alice = "{SECRET}"\n')
    bench = make_reloading("[access.users]\ninclude = 'users.toml'\n")
    (tmp_path / "users.toml").write_text(f'alice = "{OTHER}"\n# longer\n')
    bench.look()
    assert bench.users == {"alice": OTHER}


def test_a_symlink_that_points_elsewhere_is_a_change(make_reloading, tmp_path):
    bench = make_reloading()
    bench.path.rename(tmp_path / "one")
    (tmp_path / "two").write_text(BASE.replace(SECRET, OTHER))
    bench.path.symlink_to("two")
    bench.look()
    assert bench.users == {"alice": OTHER}


def test_a_file_that_is_being_written_is_read_when_it_is_done(make_reloading, logged):
    bench = make_reloading()
    whole = BASE + f'bob = "{OTHER}"\n'
    bench.between = [lambda size=size: bench.write(whole[:size]) for size in (10, 40, 60, len(whole))]
    bench.write("")
    bench.look()
    assert bench.users == {"alice": SECRET, "bob": OTHER}
    assert logged == [(Level.INFO, "config reload: users added: [bob]")] and bench.sleeps == 5


def test_a_file_that_keeps_changing_is_given_up_after_two_seconds(make_reloading, logged):
    bench = make_reloading()
    bench.between = [lambda n=n: bench.write(BASE + f"# {n}\n") for n in range(40)]
    bench.write(BASE + "# x\n")
    bench.look()
    assert logged == [(Level.ERROR, 'config reload: failed to parse "conf.toml": Config error: the file keeps changing')]
    bench.look()
    assert bench.server.sources.reloads == 1           # the next look finds it at rest


@pytest.mark.parametrize(("text", "said"), [
    pytest.param("x = \n", 'failed to parse "conf.toml": Config error: Invalid value (at line 1, column 5)', id="no TOML"),
    pytest.param("[access.users]\na = 'x'\n",
                 'failed to parse "conf.toml": Invalid secret for user a: Must be 32 hex characters', id="no secret"),
    pytest.param("[access.users]\n", "validation failed: Config error: No users configured; keeping old config", id="no users"),
    pytest.param("[general]\n", "validation failed: [access.users] is missing; keeping old config", id="cut off"),
    pytest.param("", "validation failed: [access.users] is missing; keeping old config", id="empty"),
    pytest.param(b"\xff", None, id="no UTF-8"),
])
def test_an_invalid_file_keeps_the_old_configuration_and_is_reported_once(make_reloading, logged, text, said):
    bench = make_reloading()
    bench.write(text)
    bench.look(7)
    assert bench.users == {"alice": SECRET} and bench.server.sources.reloads == 0
    assert len(logged) == 1 and logged[0][0] is Level.ERROR
    assert said is None or logged[0][1] == f"config reload: {said}"
    os.utime(bench.path, (5, 5))
    bench.look()
    assert len(logged) == 1                    # the same content
    bench.reloader.hang_up()
    bench.look()
    assert logged[1:] == [(Level.INFO, 'SIGHUP received \u2014 reloading "conf.toml"'), logged[0]]
    bench.write(BASE)
    bench.look()
    assert len(logged) == 3
    bench.write(text)
    bench.look()
    assert logged[3:] == [logged[0]]           # it was good in between


def test_a_missing_file_is_reported_once(make_reloading, logged):
    bench = make_reloading()
    bench.path.unlink()
    bench.look(5)
    assert logged == [(Level.ERROR, 'config reload: failed to parse "conf.toml": No such file or directory (os error 2)')]
    bench.write(BASE)
    bench.look()
    assert bench.users == {"alice": SECRET} and len(logged) == 1


def test_a_directory_in_the_place_of_the_file_is_reported_once(make_reloading, logged):
    bench = make_reloading()
    bench.path.unlink()
    bench.path.mkdir()
    bench.look(5)
    assert logged == [(Level.ERROR, 'config reload: failed to parse "conf.toml": Is a directory (os error 21)')]
    bench.path.rmdir()
    bench.write(BASE)
    bench.look()
    assert bench.users == {"alice": SECRET} and len(logged) == 1


def test_the_implicit_user_may_stay_implicit(make_reloading, logged):
    bench = make_reloading("[general]\n")
    bench.write("[general]\nfast_mode = false\n")
    bench.look()
    assert not bench.server.settings.general.fast_mode


def test_what_waits_for_a_restart_is_said_once_and_not_applied(make_reloading, logged):
    bench = make_reloading()
    bench.write("[server]\nport = 4443\n" + BASE)
    bench.look()
    assert logged == [(Level.WARN, "config reload: server.port changed (443 \u2192 4443); restart required")]
    assert bench.server.settings.server.port == 0
    bench.write("[server]\nport = 4443\n" + BASE + f'bob = "{OTHER}"\n')
    bench.look()
    assert logged[1:] == [(Level.INFO, "config reload: users added: [bob]")]


def test_the_order_of_the_lines(make_reloading, logged):
    bench = make_reloading()
    bench.write(f'[server]\nport = 1\n[general]\nhardswap = false\nfuture = 1\n[access.users]\nbob = "{OTHER}"\n'
                "[access.user_data_quota]\nbob = 0\n")
    bench.look()
    assert [text for _, text in logged] == [
        "config reload: server.port changed (443 \u2192 1); restart required",
        "config reload: use_middle_proxy changed; restart required",
        "config reload: user_data_quota updated (1 entries)", "config reload: hardswap: true \u2192 false",
        "config reload: general.links.show: [] \u2192 '*'",
        "config reload: users added: [bob]", "config reload: users removed: [alice]",
        "unknown keys in [general] ignored: future", "access.user_data_quota: 0 blocks user bob (no limit = remove the entry)",
        "--- New user: bob ---", logged[-2][1], "--------------------"]
    assert logged[-2][1].startswith("  EE-TLS:  tg://proxy?server=")


def test_advice_is_not_repeated(make_reloading, logged):
    bench = make_reloading("[x]\n" + BASE + f'bob = "{OTHER}"\n[access.user_data_quota]\nalice = 0\n')
    bench.write("[x]\n" + BASE + f'bob = "{OTHER}"\n[access.user_data_quota]\nalice = 0\nbob = 0\n')
    bench.look()
    assert [text for _, text in logged] == ["config reload: user_data_quota updated (2 entries)",
                                            "access.user_data_quota: 0 blocks user bob (no limit = remove the entry)"]


@pytest.mark.parametrize(("show", "printed"), [("'*'", 1), ('["bob"]', 1), ('["alice"]', 0), ("[]", 0)])
def test_links_of_a_new_user_follow_the_selection(make_reloading, logged, show, printed):
    text = BASE.replace("show = []", f"show = {show}\npublic_host = 'h.example'\npublic_port = 8443") + "[general.modes]\nsecure = true\n"
    bench = make_reloading(text)
    bench.write(text.replace("[general.modes]", f'bob = "{OTHER}"\n[general.modes]'))
    bench.look()
    domain = b"petrovich.ru".hex()
    base = "tg://proxy?server=h.example&port=8443&secret="
    assert [text for _, text in logged[1:]] == printed * [
        "--- New user: bob ---", f"  DD:      {base}dd{OTHER}", f"  EE-TLS:  {base}ee{OTHER}{domain}", "--------------------"]


def test_a_log_level_is_hot_and_its_line_is_seen_both_ways(make_reloading, logged, monkeypatch):
    monkeypatch.setattr(LogBook, "threshold", Level.INFO)
    bench = make_reloading(level_of={"normal": Level.INFO, "silent": Level.WARN, "debug": Level.TRACE}.get)
    bench.write(BASE.replace("[general]", '[general]\nlog_level = "silent"'))
    bench.look()
    assert (LogBook.threshold, logged) == (Level.WARN, [(Level.INFO, "config reload: log_level: 'normal' \u2192 'silent'")])
    bench.write(BASE.replace("[general]", '[general]\nlog_level = "debug"'))
    bench.look()
    assert (LogBook.threshold, logged[1:]) == (Level.TRACE, [(Level.INFO, "config reload: log_level: 'silent' \u2192 'debug'")])


def test_a_pinned_log_level_stays(make_reloading, logged):
    bench = make_reloading(level_of=lambda word: None)
    bench.write(BASE.replace("[general]", '[general]\nlog_level = "silent"'))
    bench.look()
    assert LogBook.threshold is Level.DEBUG
    assert [text for _, text in logged] == ["config reload: log_level: 'normal' \u2192 'silent'",
                                            "config reload: log_level ignored: RUST_LOG or the command line has set it"]


def test_a_change_by_the_api_is_not_read_again(make_reloading, logged):
    bench = make_reloading()
    text = BASE + f'bob = "{OTHER}"\n'
    bench.write(text)
    bench.reloader.apply(telemt.load_config(str(bench.path)), {str(bench.path): text.encode()})
    assert bench.users == {"alice": SECRET, "bob": OTHER} and len(logged) == 1
    bench.look(7)
    assert (bench.sleeps, bench.server.sources.reloads, len(logged)) == (0, 1, 1)


def test_an_older_reading_does_not_undo_a_change_by_the_api(make_reloading):
    """The watcher has read an edit when the API writes on top of it: the later one stays."""
    bench = make_reloading()
    waiting = []
    bench.loop.offload = lambda work, done: waiting.append((work(), done))
    bench.write(BASE.replace(SECRET, OTHER))
    bench.look()
    text = BASE.replace(SECRET, OTHER) + f'bob = "{OTHER}"\n'
    bench.write(text)
    bench.reloader.apply(telemt.load_config(str(bench.path)), {str(bench.path): text.encode()})
    result, done = waiting.pop()
    done(result)
    assert bench.users == {"alice": OTHER, "bob": OTHER}
    result, done = waiting.pop()               # read again, to be sure
    done(result)
    assert bench.users == {"alice": OTHER, "bob": OTHER} and not waiting


def test_an_error_of_ours_in_a_reading_costs_that_reading(make_reloading, logged):
    bench = make_reloading()
    bench.loop.offload = lambda work, done: bench.loop.defer(lambda: done(ZeroDivisionError("x")))
    bench.write(BASE + "# x\n")
    bench.look()
    assert any(level is Level.ERROR and "ZeroDivisionError" in text for level, text in logged)
    bench.loop.offload = lambda work, done: bench.loop.defer(lambda: done(work()))
    bench.write(BASE + f'bob = "{OTHER}"\n')
    bench.look()
    assert "bob" in bench.users


@pytest.mark.parametrize("by_api", [False, True])
def test_what_could_not_be_applied_is_tried_again(make_reloading, logged, monkeypatch, by_api):
    """The file is what counts: a bug of ours in a component must not make us forget it (api.md 13)."""
    bench = make_reloading()
    text = BASE + f'bob = "{OTHER}"\n'
    with monkeypatch.context() as patch:
        patch.setattr(bench.server, "_end_sessions", lambda users: 1 / 0)
        bench.write(text)
        if by_api:
            with pytest.raises(ZeroDivisionError):
                bench.reloader.apply(telemt.load_config(str(bench.path)), {str(bench.path): text.encode()})
        else:
            bench.look()
            assert any("ZeroDivisionError" in text for _, text in logged)
        assert bench.server.sources.reloads == 0
    logged.clear()
    bench.look(3)
    assert bench.users == {"alice": SECRET, "bob": OTHER} and bench.server.sources.reloads == 1
    assert (Level.INFO, "config reload: users added: [bob]") in logged
    logged.clear()
    bench.look(6)
    assert not logged and bench.server.sources.reloads == 1


class FakeSession:
    """Somebody who holds a place and a ticket."""

    def __init__(self, server, name):
        self.server = server
        self.ticket = telemt.admit(server.doorman.users.users[name], "10.0.0.1", 0.0)
        server.places.take(self)
        self.closed = 0

    def close(self, error):
        self.closed += 1
        self.ticket.release()
        self.server.places.give(self)


@pytest.mark.parametrize(("change", "ends", "line"), [
    pytest.param(lambda text: text.replace(f'bob = "{OTHER}"\n', ""), True, "users removed: [bob]", id="removed"),
    pytest.param(lambda text: text.replace(OTHER, "9" * 32), True, "users secret changed: [bob]", id="another secret"),
    pytest.param(lambda text: text + "[access.user_enabled]\nbob = false\n", True,
                 "user_enabled updated (1 disabled overrides)", id="disabled"),
    pytest.param(lambda text: text + "[access.user_max_tcp_conns]\nbob = 1\n", False, "user_max_tcp_conns updated (1 entries)", id="limit"),
    pytest.param(lambda text: text.replace(OTHER, OTHER.upper()), False, "users secret changed: [bob]", id="spelling"),
    pytest.param(lambda text: text + "[access.user_enabled]\nbob = true\n", False,
                 "user_enabled updated (0 disabled overrides)", id="enabled"),
])
def test_sessions_of_a_user_end_with_what_admitted_them(make_reloading, logged, change, ends, line):
    text = BASE + f'bob = "{OTHER}"\n'
    bench = make_reloading(text)
    sessions = [FakeSession(bench.server, name) for name in ("bob", "alice", "bob")]
    users = [session.ticket.user for session in sessions]
    bench.write(change(text))
    bench.look()
    assert [session.closed for session in sessions] == [ends, 0, ends]
    assert [text for _, text in logged] == [f"config reload: {line}", *["config reload: closed 2 connections of user bob"] * ends]
    for session in sessions:
        if not session.closed:
            session.close(None)
    assert [user.sessions for user in users] == [0, 0, 0]


def test_hot_limits_reach_the_users(make_reloading):
    bench = make_reloading()
    alice = bench.server.doorman.users.users["alice"]
    bench.write(BASE + '[access.user_max_tcp_conns]\nalice = 3\n[access.user_max_unique_ips]\nalice = 2\n'
                '[access.user_data_quota]\nalice = 9\n[access.user_expirations]\nalice = "2000-01-01T00:00:00Z"\n')
    bench.look()
    assert (alice.max_sessions, alice.max_ips, alice.quota, alice.expires_wall) == (3, 2, 9, 946684800.0)
    bench.write(BASE)
    bench.look()
    assert {alice.max_sessions, alice.max_ips, alice.quota} == {telemt.UNLIMITED}
    assert bench.server.doorman.users.users["alice"] is alice


def test_hot_keys_reach_the_components(make_reloading):
    bench = make_reloading()
    server = bench.server
    level = server.arena.patient_level
    bench.write("[timeouts]\nclient_handshake = 7\n[access]\nreplay_check_len = 5\n" + BASE.replace(
        "[general]", "[general]\ncrypto_pending_buffer = 4096") + "[general.telemetry]\ncore_enabled = false\nuser_enabled = false\n")
    bench.look()
    assert (server.handshakes._lane.seconds, server.doorman.headers.size) == (7, 5)
    assert (server.counters.enabled, server.count_users) == (False, False)
    assert server.arena.patient_level < level


def test_a_user_that_leaves_takes_its_used_octets_along(make_reloading):
    bench = make_reloading(BASE + f'bob = "{OTHER}"\n')
    bench.server.quotas.path = str(bench.path.with_name("q.json"))
    bench.server.doorman.users.users["bob"].used = 5
    bench.write(BASE)
    bench.look()
    assert bench.server.quotas._timer is not None
    bench.write(BASE + f'bob = "{OTHER}"\n')
    bench.look()
    assert bench.server.doorman.users.users["bob"].used == 0
    bench.server.quotas.path = None
