"""Room 20: places, the sweep, links, bind failures, stopping."""
import datetime
import errno
import math
import os
import socket
import stat
import sys
import threading
import time

import pytest

import telemt
from telemt import Housework, Level, LogBook, Places, Server, is_bogon, link_host, slot_cap, user_links
from tests.cases import BACKEND, SECRET, TestLoop, client_preamble, control_of, read_all, settings_of

LOCAL = '[censorship]\ntls_emulation = false\n[server]\nport = 0\n[[server.listeners]]\nip = "127.0.0.1"\n'


@pytest.fixture
def make_server():
    made = []

    def make(text=LOCAL, fd_limit=4096):
        server = Server(settings_of(text), TestLoop(), BACKEND, fd_limit)
        made.append(server)
        return server

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


def client_of(server):
    sock = socket.create_connection(server.places.listeners[0].address)
    sock.setblocking(False)
    server.loop.settle()
    return sock


@pytest.mark.parametrize(("fds", "cap"), [(64, 64), (300, 64), (1024, 384), (4096, 1920), (65_536, 10_000)])
def test_cap_follows_the_fd_limit(fds, cap):
    assert slot_cap(fds) == cap


def test_accepting_stops_at_the_cap_and_goes_on_below(make_server, logged):
    server = make_server()
    list(server.open_listeners())
    server.accept()
    server.places.cap = 2
    clients = [client_of(server) for _ in range(4)]
    assert len(server.places.owners) == 2 and server.places.listeners[0].fd not in server.loop.poller.masks
    assert sum("Connection limit reached" in text for _, text in logged) == 1
    clients[0].close()
    server.loop.settle()
    assert len(server.places.owners) == 2 and server.counters.connections_total == 3
    for sock in clients:
        sock.close()
    server.loop.settle()
    assert not server.places.owners


def relay_of(server, monkeypatch):
    """A running session of alice through a data centre on loopback."""
    dc = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(telemt.DcDirectory, "find", lambda *_: telemt.Destination((dc.getsockname()[:2],)))
    client = client_of(server)
    client.sendall(client_preamble()[0])
    server.loop.settle()
    far, _ = dc.accept()
    server.loop.settle()
    dc.close()
    return client, far


def test_idle_server_has_no_deadline_before_the_idle_limit(make_server, monkeypatch):
    server = make_server(LOCAL + "[general.modes]\nsecure = true\n")
    list(server.open_listeners())
    server.accept()
    client, far = relay_of(server, monkeypatch)
    assert len(server.sweep.relays) == 1
    server.loop.turn(31)
    assert server.loop._patience() > 1700
    client.close()
    far.close()


def test_sweep_ends_idle_sessions(make_server, monkeypatch, logged):
    server = make_server(LOCAL + "[general.modes]\nsecure = true\n")
    list(server.open_listeners())
    server.accept()
    client, far = relay_of(server, monkeypatch)
    server.loop.turn(1799)
    assert server.sweep.relays
    server.loop.turn(12)
    assert not server.sweep.relays and any("Activity timeout" in text for _, text in logged)
    client.close()
    far.close()


def test_sweep_ends_expired_sessions(make_server, monkeypatch, logged):
    until = datetime.datetime.fromtimestamp(time.time() + 30, datetime.UTC).isoformat()
    server = make_server(f'{LOCAL}[general.modes]\nsecure = true\n[access.user_expirations]\nalice = "{until}"\n')
    list(server.open_listeners())
    server.accept()
    client, far = relay_of(server, monkeypatch)
    server.loop.turn(29)
    assert server.sweep.relays
    monkeypatch.setattr(telemt.time, "time", lambda: time.monotonic() + 4e9)
    server.loop.turn(10)
    assert not server.sweep.relays and (Level.INFO, "User alice expired: closed 1 connections") in logged
    client.close()
    far.close()


def test_a_session_expires_within_ten_seconds_whatever_comes_and_the_clock_does(make_server, monkeypatch):
    """Found by review: every newcomer put the sweep off, and a clock that jumped was not noticed for half an hour."""
    until = datetime.datetime.fromtimestamp(time.time() + 3600, datetime.UTC).isoformat()
    server = make_server(f'{LOCAL}[general.modes]\nsecure = true\n[access.user_expirations]\nalice = "{until}"\n')
    list(server.open_listeners())
    server.accept()
    client, far = relay_of(server, monkeypatch)
    (relay,) = server.sweep.relays
    jumped = time.time() + 7200
    monkeypatch.setattr(telemt.time, "time", lambda: jumped)
    for _ in range(9):
        server.sweep.add(relay)
        server.loop.turn(1)
        assert server.sweep.relays
    server.loop.turn(1)
    assert not server.sweep.relays
    client.close()
    far.close()


def test_stop_closes_everything_and_leaves_the_loop(make_server, monkeypatch, logged):
    server = make_server(LOCAL + "[general.modes]\nsecure = true\n")
    list(server.open_listeners())
    server.accept()
    client, far = relay_of(server, monkeypatch)
    other = client_of(server)
    server.stop()
    server.stop()
    server.loop.turn()
    assert server.loop._stopped and not server.places.owners and not server.sweep.relays
    assert read_all(client)[1] and read_all(far)[1] and read_all(other)[1]
    assert [text for _, text in logged].count("Shutting down...") == 1
    for sock in (client, far, other):
        sock.close()


def test_family_gates_and_addresses_in_use(make_server, logged):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = make_server(f'[server]\nport = {port}\n[[server.listeners]]\nip = "127.0.0.1"\n[[server.listeners]]\nip = "::1"\n')
        assert list(server.open_listeners()) == []
    texts = [text for _, text in logged]
    assert "Skipping IPv6 listener: IPv6 disabled by [network] addr=::1" in texts
    assert any(text.startswith("Failed to bind: address already in use") and "pid=" in text for text in texts)
    assert "reuse_allow=false; set [[server.listeners]].reuse_allow=true to allow multi-instance listening" in texts


def test_accepted_clients_have_their_options(make_server):
    """On Linux they are inherited from the listener."""
    server = make_server(LOCAL + "[timeouts]\nclient_keepalive = 77\nclient_ack = 99\n")
    list(server.open_listeners())
    server.accept()
    client = client_of(server)
    (session,) = server.places.owners
    option = session.stream.sock.getsockopt
    assert option(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1 and option(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert option(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == option(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 77
    assert option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 99_000
    client.close()
    server.loop.settle()


def test_reuse_port_lets_two_share(make_server):
    first = make_server(LOCAL.replace('"127.0.0.1"', '"127.0.0.1"\nreuse_allow = true'))
    (_, port), = first.open_listeners()
    second = make_server(f'[server]\nport = {port}\n[[server.listeners]]\nip = "127.0.0.1"\nreuse_allow = true\n')
    assert list(second.open_listeners())


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


OTHER = "f0e1d2c3b4a5968778695a4b3c2d1e0f"
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


# -- quota state

STATE = '''{
  "last_reset_epoch_secs": 1700000000,
  "users": {
    "alice": {
      "used_bytes": 42,
      "last_reset_epoch_secs": 0
    },
    "häns": {
      "used_bytes": 0,
      "last_reset_epoch_secs": 1700000000
    }
  }
}
'''


def test_quota_state_reads_back():
    text = telemt.render_quota_state([("häns", 0, 1_700_000_000), ("alice", 42, 0), ("nobody", 0, 0)])
    assert text.decode() == STATE
    assert telemt.parse_quota_state(text) == {"alice": (42, 0), "häns": (0, 1_700_000_000)}
    assert telemt.render_quota_state([]) == b'{\n  "last_reset_epoch_secs": 0,\n  "users": {}\n}\n'


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "{}", '{"users": []}', '{"users": {"a": 5}}', '{"users": {"a": {"used_bytes": -1}}}',
                                  '{"users": {"a": {"used_bytes": 1.0}}}', '{"users": {"a": {"used_bytes": true}}}',
                                  '{"users": {"a": {"used_bytes": 18446744073709551616}}}', "\ud800", "[" * 100_000])
def test_what_is_no_quota_state(text):
    with pytest.raises(ValueError):
        telemt.parse_quota_state(text.encode(errors="surrogatepass"))


def test_unknown_members_of_a_quota_state_are_ignored():
    assert telemt.parse_quota_state(b'{"version": 2, "users": {"a": {"used_bytes": 5, "x": []}}}') == {"a": (5, 0)}


class Quotas:
    """A QuotaState whose helper thread works when told."""

    def __init__(self, loop, path):
        self.table = telemt.UserTable()
        self.table.apply(settings_of(f'[access.users]\nalice = "{SECRET}"\nbob = "{OTHER}"\n').access)
        self.loop, self.path, self.waiting = loop, path, []
        loop.offload = lambda work, done: self.waiting.append((work, done))
        self.state = telemt.QuotaState(loop, self.table, str(path))

    def use(self, name, octets):
        """What a relay does for a chunk."""
        user = self.table.users[name]
        user.used += octets
        if user.used >= user.mark:
            user.mark = user.quota
            self.state.touch()

    def work(self):
        work, done = self.waiting.pop(0)
        try:
            done(work())
        except OSError as error:
            done(error)

    @property
    def stored(self):
        return {name: used for name, (used, _) in telemt.parse_quota_state(self.path.read_bytes()).items()}


@pytest.fixture
def quotas(tmp_path):
    loop = TestLoop()
    yield Quotas(loop, tmp_path / "var" / "quota.json")
    loop.dispose()


def test_used_octets_are_written_a_minute_after_the_first_change(quotas):
    quotas.state.load()
    quotas.use("alice", 5)
    quotas.loop.turn(59.0)
    quotas.use("alice", 6)
    assert not quotas.waiting
    quotas.loop.turn(1.1)
    quotas.use("bob", 1)                       # after the numbers were taken: for the next time
    quotas.work()
    assert quotas.stored == {"alice": 11} and quotas.path.stat().st_mode & 0o777 == 0o600
    quotas.loop.turn(60.0)
    quotas.work()
    assert quotas.stored == {"alice": 11, "bob": 1}


def test_nothing_is_armed_while_everything_is_written(quotas):
    assert quotas.loop.wake_at == float("inf")
    quotas.use("alice", 5)
    quotas.loop.turn(60.0)
    quotas.work()
    quotas.loop.turn(1000.0)
    assert quotas.loop.wake_at == float("inf") and not quotas.waiting
    quotas.use("alice", 5)
    assert quotas.loop.wake_at == quotas.loop.at + 60.0


def test_only_the_first_chunk_after_a_write_costs_anything(quotas):
    quotas.use("alice", 5)
    assert quotas.table.users["alice"].mark == telemt.UNLIMITED
    quotas.loop.turn(60.0)
    assert quotas.table.users["alice"].mark == 0


def test_one_write_at_a_time(quotas):
    quotas.use("alice", 5)
    quotas.loop.turn(60.0)
    quotas.use("alice", 5)
    quotas.loop.turn(60.0)
    assert len(quotas.waiting) == 1
    quotas.work()
    quotas.loop.turn(60.0)
    quotas.work()
    assert quotas.stored == {"alice": 10}


def test_an_older_snapshot_never_replaces_a_newer(quotas):
    quotas.use("alice", 5)
    quotas.loop.turn(60.0)
    quotas.use("bob", 7)
    quotas.state.reset(quotas.table.users["alice"])()        # by the API, while the helper thread has not begun
    quotas.work()
    assert quotas.stored == {"alice": 0, "bob": 7}


def test_a_full_disk_is_said_once_and_tried_again(quotas, logged, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(telemt, "write_quota_file", full)
        quotas.use("alice", 5)
        for _ in range(3):
            quotas.loop.turn(60.0)
            quotas.work()
    assert logged == [(Level.WARN, f"Failed to write quota state file path={quotas.path} error=No space left on device (os error 28)")]
    quotas.loop.turn(60.0)
    quotas.work()
    assert quotas.stored == {"alice": 5}


def test_a_reset_that_cannot_be_written_is_in_force(quotas, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    quotas.use("alice", 5)
    quotas.loop.turn(60.0)
    quotas.work()
    alice = quotas.table.users["alice"]
    with monkeypatch.context() as patch:
        patch.setattr(telemt, "write_quota_file", full)
        with pytest.raises(OSError, match="No space"):
            quotas.state.reset(alice)()
    assert alice.used == 0 and alice.reset_wall > 1_700_000_000
    quotas.loop.turn()                         # the other thread asked for another try
    quotas.loop.turn(60.0)
    quotas.work()
    assert telemt.parse_quota_state(quotas.path.read_bytes()) == {"alice": (0, alice.reset_wall)}


def test_what_is_not_written_is_written_at_the_end(quotas):
    quotas.use("alice", 5)
    quotas.state.close()
    assert quotas.stored == {"alice": 5}


def test_nothing_new_is_not_written_at_the_end(quotas):
    quotas.use("alice", 5)
    quotas.loop.turn(60.0)
    quotas.work()
    quotas.path.unlink()
    quotas.state.close()
    assert not quotas.path.exists()


def test_used_octets_come_back(quotas, logged):
    quotas.path.parent.mkdir()
    quotas.path.write_text(STATE)
    quotas.state.load()
    assert (quotas.table.users["alice"].used, quotas.table.users["bob"].used) == (42, 0)
    assert logged == [(Level.INFO, f"Loaded per-user quota state path={quotas.path} loaded_users=1")]
    quotas.use("bob", 1)
    quotas.state.close()
    assert quotas.stored == {"alice": 42, "bob": 1}          # names that are not configured are dropped


def test_no_state_yet(quotas, logged):
    quotas.state.load()
    assert not logged


def test_an_unreadable_state_is_put_aside(quotas, logged):
    quotas.path.parent.mkdir()
    quotas.path.write_text("{")
    quotas.state.load()
    assert logged[0][1].startswith(f"Failed to parse quota state file path={quotas.path} error=")
    assert quotas.path.with_name("quota.json.bad").read_text() == "{" and not quotas.path.exists()


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/etc/hostname"), lambda path: path.mkdir(), lambda path: os.mkfifo(path)])
def test_what_is_no_plain_file_is_not_read(quotas, logged, make):
    quotas.path.parent.mkdir()
    make(quotas.path)
    quotas.state.load()
    assert len(logged) == 1 and logged[0][1].startswith(f"Failed to read quota state file path={quotas.path} error=")


def test_a_symlink_is_replaced_and_not_followed(quotas, tmp_path):
    quotas.path.parent.mkdir()
    (tmp_path / "victim").write_text("precious")
    quotas.path.symlink_to(tmp_path / "victim")
    quotas.use("alice", 5)
    quotas.state.close()
    assert (tmp_path / "victim").read_text() == "precious" and quotas.stored == {"alice": 5} and not quotas.path.is_symlink()


def test_without_a_path_nothing_is_written_and_resets_work(tmp_path, monkeypatch):
    loop = TestLoop()
    table = telemt.UserTable()
    table.apply(settings_of(f'[access.users]\nalice = "{SECRET}"\n').access)
    state = telemt.QuotaState(loop, table, None)
    state.load()
    state.touch()
    table.users["alice"].used = 5
    state.reset(table.users["alice"])()
    state.close()
    assert table.users["alice"].used == 0 and loop.wake_at == float("inf")
    loop.dispose()


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


# -- doors


def test_mode_of_a_unix_socket(tmp_path, logged):
    path = str(tmp_path / "file")
    (tmp_path / "file").write_text("")
    for text, mode, note in [("0666", 0o666, " (mode 0666)"), ("660", 0o660, " (mode 660)"), ("0o600", 0o600, " (mode 0o600)"),
                             ("00777", 0o777, " (mode 00777)")]:
        assert telemt.set_unix_mode(path, text) == note
        assert stat.S_IMODE(os.stat(path).st_mode) == mode
    empty, digit = "cannot parse integer from empty string", "invalid digit found in string"
    for text, why in [("0", empty), ("000", empty), ("0o", empty), ("abc", digit), ("888", digit), ("-1", digit), ("99999999999", digit)]:
        assert telemt.set_unix_mode(path, text) == ""
        assert logged[-1] == (Level.WARN, f"Invalid listen_unix_sock_perm '{text}': {why}. Ignoring.")
    assert telemt.set_unix_mode(str(tmp_path / "gone"), "600") == ""
    assert logged[-1][0] is Level.ERROR and "Failed to set unix socket permissions to 600:" in logged[-1][1]


def test_unix_clients_are_numbered_and_the_file_goes_with_us(make_server, tmp_path, logged):
    path = str(tmp_path / "sock")
    server = make_server(f'{LOCAL.replace("[server]", f"[server]{chr(10)}listen_unix_sock = {chr(34)}{path}{chr(34)}")}')
    server.open_unix()
    server.accept()
    clients = []
    for n in (1, 2):
        clients.append(socket.socket(socket.AF_UNIX))
        clients[-1].connect(path)
        server.loop.settle()
        assert {owner.peer for owner in server.places.owners} >= {f"127.0.0.1:{n}"}
    assert all(owner.local_end() == ("0.0.0.0", 0) for owner in server.places.owners)
    server.places.unix_count = 65_534
    clients.append(socket.socket(socket.AF_UNIX))
    clients[-1].connect(path)
    server.loop.settle()
    assert "127.0.0.1:0" in {owner.peer for owner in server.places.owners}
    for sock in clients:
        sock.close()
    server.loop.settle()
    server.stop()
    assert not os.path.exists(path)


def test_the_unix_socket_of_a_successor_is_left_alone(make_server, tmp_path):
    path = str(tmp_path / "sock")
    server = make_server(f'{LOCAL.replace("[server]", f"[server]{chr(10)}listen_unix_sock = {chr(34)}{path}{chr(34)}")}')
    server.open_unix()
    os.rename(path, path + ".old")             # keeps its inode in use
    with telemt.bind_unix(path):
        server.stop()
        assert os.path.exists(path)


@pytest.mark.parametrize(("flag", "entry", "asked"), [("false", "", False), ("true", "", True), ("true", "proxy_protocol = false", False),
                                                      ("false", "proxy_protocol = true", True)])
def test_which_listeners_demand_a_proxy_header(make_server, flag, entry, asked):
    server = make_server(LOCAL.replace("port = 0", f"port = 0\nproxy_protocol = {flag}") + entry + "\n")
    list(server.open_listeners())
    server.accept()
    client = client_of(server)
    client.sendall(b"PROXY TCP4 203.0.113.1 203.0.113.2 5 6\r\n")
    server.loop.settle()
    peers = {owner.peer for owner in server.places.owners}
    assert (peers == {"203.0.113.1:5"}) is asked
    client.close()
    server.loop.settle()


def test_a_reload_reaches_the_doors(make_server):
    server = make_server()
    list(server.open_listeners())
    server.accept()
    server.apply(settings_of(LOCAL.replace("port = 0", "port = 0\nproxy_protocol = true\nproxy_protocol_trusted_cidrs = []")
                             + '[timeouts]\nclient_handshake = 7\n[network]\ndns_overrides = ["a:1:192.0.2.1"]\n'
                             + "[general]\nbeobachten = false\n"))
    client = client_of(server)
    server.loop.settle()
    assert not server.places.owners and server.counters.bad_by_class == {telemt.Reason.PROXY_UNTRUSTED: 1}
    assert server.handshakes._lane.seconds == 7 and ("a", 1) in server.resolver.overrides
    assert server.sources.beobachten() == "beobachten disabled\n"
    client.close()


def test_a_crowd_that_has_left_is_tidied_up_after_once():
    loop, shrunk = TestLoop(), []
    places = Places(1000)
    places.on_left = Housework(loop, lambda: (places.shrink(), shrunk.append(len(places.owners)))).call
    guests = [object() for _ in range(400)]
    try:
        for owner in guests:
            places.take(owner)
        for owner in guests[:299]:
            places.give(owner)
        loop.turn(10)
        assert not shrunk and loop.wake_at == math.inf                   # three quarters have not left yet
        large = sys.getsizeof(places.owners)
        for owner in guests[299:350]:
            places.give(owner)
        loop.turn(1.9)
        assert not shrunk
        loop.turn(0.2)
        assert shrunk == [50] and sys.getsizeof(places.owners) < large // 4
        for owner in guests[350:]:                                       # no crowd any more
            places.give(owner)
        loop.turn(10)
        assert len(shrunk) == 2 and loop.wake_at == math.inf             # hundred at the first call: a quarter of them have left since
        for _ in range(3):
            places.take(guests[0])
            places.give(guests[0])
        loop.turn(10)
        assert len(shrunk) == 2
    finally:
        loop.dispose()
