"""Room 24: what is handed from program to program, and what the one that drains leaves alone.  The whole: journeys/test_exchange.py."""
import contextlib
import os
import signal
import socket
import sys

import pytest

import telemt
from telemt import HANDED, Heritage, Level, Places, Server
from tests.cases import BACKEND, LOCAL, SECRET, TestLoop, settings_of


def listening(host="127.0.0.1", family=socket.AF_INET):
    sock = socket.socket(family)
    sock.bind((host, 0))
    sock.listen(5)
    return sock


def inherit(**named):
    """A Heritage of these sockets, as a new program finds it; the environment is empty afterwards."""
    words = [f"{name}={','.join(str(sock.detach()) for sock in socks)}" for name, socks in named.items()]
    environ = {HANDED: "\t".join(words)}
    found = Heritage(environ, os.getpid())
    assert not environ and not found.replaces
    return found


def test_nothing_is_inherited_as_a_rule():
    found = Heritage({"LISTEN_PID": "1", "LISTEN_FDS": "1"}, 2)          # meant for another process
    assert (found.replaces, found.talk, found.life, found.cwd, found.users_explicit) == (False, -1, -1, "", False)
    assert found.take("clients", "0.0.0.0", 443) is None


def test_a_socket_is_found_by_its_kind_and_address():
    one, two, api = listening(), listening(), listening()
    ports = [sock.getsockname()[1] for sock in (one, two, api)]
    found = inherit(clients=[one, two], control=[api])
    assert found.take("clients", "127.0.0.1", ports[2]) is None          # of another kind
    assert found.take("clients", "127.0.0.2", ports[0]) is None
    with contextlib.closing(found.take("clients", "127.0.0.1", ports[1])) as sock:
        assert sock.getsockname()[1] == ports[1] and not os.get_inheritable(sock.fileno()) and not sock.getblocking()
    with contextlib.closing(found.take("clients", "127.0.0.1", 0)) as sock:                  # whatever the system chose
        assert sock.getsockname()[1] == ports[0]
    assert found.take("clients", "127.0.0.1", 0) is None
    with contextlib.closing(found.take("control", "127.0.0.1", ports[2])) as sock:
        assert sock.getblocking()


def test_a_unix_socket_is_found_by_its_path(tmp_path):
    path = str(tmp_path / "sock")
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen(1)
    found = inherit(clients=[sock])
    assert found.take("clients", path + "x") is None
    found.take("clients", path).close()


def test_ipv6_is_compared_as_an_address():
    found = inherit(clients=[listening("::1", socket.AF_INET6)])
    found.take("clients", "0:0:0:0:0:0:0:1", 0).close()


def test_what_nobody_wants_is_closed(logged):
    sock = listening()
    fd, address = sock.fileno(), sock.getsockname()
    found = inherit(clients=[sock])
    found.drop_rest("control")
    os.fstat(fd)
    found.drop_rest("clients")
    with pytest.raises(OSError):
        os.fstat(fd)
    assert logged == [(Level.INFO, f"Not listening on {address} any more")]


def test_a_server_accepts_at_what_it_inherited():
    old = listening()
    port = old.getsockname()[1]
    caller = socket.create_connection(old.getsockname())                 # came while nobody accepted
    server = Server(settings_of(LOCAL.replace("port = 0", f"port = {port}")), TestLoop(), BACKEND, 4096)
    server.handed = inherit(clients=[old]).take
    assert [found for _, found in server.open_listeners()] == [port]
    server.accept()
    server.loop.settle()
    assert len(server.places.owners) == 1
    caller.close()
    server.loop.settle()
    server.stop()
    server.loop.turn(2)
    server.loop.dispose()


class Rests:
    """A listener that tells whether it accepts."""

    on = False

    def pause(self):
        self.on = False

    def resume(self):
        self.on = True


def test_places_at_rest_stay_so_when_somebody_leaves():
    places, door, guests = Places(2), Rests(), [object(), object()]
    places.listeners.append(door)
    door.resume()
    places.take(guests[0])
    places.rest(True)
    assert not door.on
    places.take(guests[1])                                               # full
    places.give(guests[1])                                               # and not any more
    assert not door.on
    places.rest(False)
    assert door.on
    places.take(guests[1])
    places.rest(True)
    places.rest(False)
    assert not door.on                                                   # full as before


def test_who_drains_writes_asks_and_looks_no_more(tmp_path, logged):
    path = str(tmp_path / "sock")
    text = LOCAL.replace("[server]", f'[general]\nquota_state_path = "{tmp_path}/quota.json"\nbeobachten = true\n'
                         f'beobachten_file = "{tmp_path}/seen.txt"\n[server]\nlisten_unix_sock = "{path}"')
    loop = TestLoop()
    server = Server(settings_of(text), loop, BACKEND, 4096)
    list(server.open_listeners())
    server.open_unix()
    server.accept()
    server.upstreams.health.start()
    user = next(iter(server.doorman.users))
    user.used = 5
    server.quotas.touch()
    assert server.quotas.write_down()() is None and (tmp_path / "quota.json").read_text().count('"used_bytes": 5') == 1
    server.retire()
    user.used = 9
    server.quotas.touch()
    server.masks.observer.note("HTTP", "203.0.113.1")
    loop.turn(3600)
    loop.turn(3600)
    server.quotas.close()
    assert not server.places.listeners and server.stopping and os.path.exists(path)
    assert '"used_bytes": 9' not in (tmp_path / "quota.json").read_text() and not (tmp_path / "seen.txt").exists()
    assert loop.wake_at == float("inf")                                  # at rest for ever
    server.stop()
    assert loop._stopped and not (tmp_path / "seen.txt").exists() and os.path.exists(path)
    loop.dispose()


def test_numbers_that_are_written_are_not_written_again(tmp_path):
    loop = TestLoop()
    state = telemt.QuotaState(loop, telemt.UserTable(), str(tmp_path / "q.json"))
    state.write_down()()
    assert not (tmp_path / "q.json").exists()
    loop.dispose()


@pytest.mark.parametrize(("text", "limit_s"), [("", 600), ("0", 0), ("90", 90), ("-1", 600), ("1e3", 600), ("\u0661", 600)])
def test_limit_of_a_drain(monkeypatch, text, limit_s):
    monkeypatch.setenv("TELEMT_DRAIN", text)
    assert telemt.drain_limit() == limit_s


@pytest.mark.parametrize(("orig", "argv", "options", "command"), [
    (["python3", "telemt.py", "a.toml"], ["telemt.py", "a.toml"], {}, ["python3", "/w/telemt.py", "a.toml"]),
    (["python3", "-B", "-S", "-X", "telemt=telemt.py", "/proc/self/fd/3", "a.toml", "-s"], ["/proc/self/fd/3", "a.toml", "-s"],
     {"telemt": "telemt.py"}, ["python3", "-B", "/w/telemt.py", "a.toml", "-s"]),
    (["python3", "-S", "-X", "telemt=/x/t.pyz", "/proc/self/fd/3"], ["/proc/self/fd/3"], {"telemt": "/x/t.pyz"}, ["python3", "/x/t.pyz"]),
    (["python3", "-m", "telemt", "a.toml"], ["/x/telemt.py", "a.toml"], {}, ["python3", "-m", "telemt", "a.toml"]),
    (["python3", "-c", "code", "a.toml"], ["-c", "a.toml"], {}, ["python3", "-c", "code", "a.toml"]),
], ids=["plain", "fresh-image", "archive", "module", "code"])
def test_own_command_line(monkeypatch, orig, argv, options, command):
    monkeypatch.setattr(sys, "orig_argv", orig)
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "_xoptions", options)
    assert telemt.own_command("/w") == [sys.executable, *command]


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_is_told(monkeypatch, tmp_path, abstract):
    path = f"@telemt-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path.replace("@", "\0") if abstract else path)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        telemt.tell_manager("READY=1")
        assert manager.recv(100) == b"READY=1"
        telemt.tell_manager("RELOADING=1", timed=True)
        first, second = manager.recv(100).split(b"\n")
        assert first == b"RELOADING=1" and second.startswith(b"MONOTONIC_USEC=") and int(second[15:]) > 0
    telemt.tell_manager("READY=1")                                       # it is gone: not our trouble
    monkeypatch.delenv("NOTIFY_SOCKET")
    telemt.tell_manager("READY=1")


def test_a_program_that_cannot_be_started_leaves_nothing_open(monkeypatch, logged):
    """No such interpreter, no descriptor left: the exchange fails, and fails the same way again."""
    loop = TestLoop()
    server = Server(settings_of(LOCAL), loop, BACKEND, 4096)
    list(server.open_listeners())
    server.accept()
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    loaded = telemt.parse_settings(telemt.parse_document(f'[access.users]\nalice = "{SECRET}"\n'), telemt.Draws(lambda: 1500))
    reloader = telemt.Reloader(server, loaded, telemt.Reading({"a": b""}, {"a": ()}, "", None), "a", lambda word: None)
    exchange = telemt.Exchange(server, reloader, telemt.Control(server, reloader), ["/nowhere/python3", "python3"], "", -1)
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(2):
        exchange.begin()
        assert logged[-1] == (Level.ERROR, "The new program does not take over: it cannot be started: No such file or directory; "
                                           "this one goes on")
        assert sorted(os.listdir("/proc/self/fd")) == before
    monkeypatch.setattr(telemt.fcntl, "fcntl", lambda *_: (_ for _ in ()).throw(OSError(24, "Too many open files")))
    exchange.begin()
    assert "Too many open files" in logged[-1][1] and sorted(os.listdir("/proc/self/fd")) == before
    assert server.places.listeners[0].fd in loop.poller.masks
    exchange.stop(signal.SIGTERM)
    loop.turn(2)
    loop.dispose()
