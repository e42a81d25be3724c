"""Room 20: places, the sweep, links, bind failures, stopping."""
import datetime
import socket
import threading
import time

import pytest

import telemt
from telemt import Level, LogBook, Server, is_bogon, link_host, slot_cap, user_links
from tests.cases import BACKEND, SECRET, TestLoop, client_preamble, read_all, settings_of

LOCAL = '[censorship]\ntls_emulation = false\n[server]\nport = 0\n[[server.listeners]]\nip = "127.0.0.1"\n'


@pytest.fixture
def logged(monkeypatch):
    found = []
    monkeypatch.setattr(LogBook, "sink", lambda level, target, text: found.append((level, text)))
    monkeypatch.setattr(LogBook, "threshold", Level.DEBUG)
    return found


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
def control(make_server):
    """A Control whose loop is turned by this thread."""
    server = make_server()
    return telemt.Control(server, "config.toml")


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
    control = telemt.Control(make_server(), str(tmp_path / "config.toml"))
    text = 'include = "users.toml"\n'
    assert control.load(text).settings.access.users == {"zoe": SECRET}
    expanded, files = control.expand(text, {str(tmp_path / "users.toml"): f'[access.users]\nadam = "{SECRET}"\n'.encode()})
    assert (files, control.parse(expanded)["access"]["users"]) == ((str(tmp_path / "users.toml"),), {"adam": SECRET})
    with pytest.raises(telemt.ConfigError, match="No users configured"):
        control.load("[access.users]\n")


def test_a_published_configuration_is_live_when_publish_returns(control):
    loaded = control.load(f'[access.users]\nzoe = "{SECRET}"\n')
    asked(control, lambda: control._server.reload(loaded))
    assert list(control.users) == ["zoe"]
    assert control.settings.access.users == {"zoe": SECRET}


def test_links_of_a_user(make_server):
    server = make_server(LOCAL.replace("127.0.0.1", "::1").replace("false\n", 'false\ntls_domain = "a.b"\n')
                         + f'announce = "häuser.example"\n[general.links]\npublic_port = 8443\n[access.users]\nzoe = "{SECRET}"')
    control = telemt.Control(server, "config.toml")
    link = f"tg://proxy?server=h%C3%A4user.example&port=8443&secret=ee{SECRET}612e62"
    assert control.links("zoe") == [telemt.Link("EE-TLS", link, "tls", "h%C3%A4user.example", "a.b")]
    assert control.links("nobody") == []
