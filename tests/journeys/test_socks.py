"""Through real SOCKS servers of Debian (microsocks, dante, ssh -D), with and without login: sessions, bulk, ends, and the fast path."""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from doubles import MIB, MODES, Rig, free_port
from programs import Dante, Microsocks, Program, SshSocks, needs, system_user

LOGIN = ("courier", "s3cret-pass")
SERVERS: dict[str, tuple[tuple[str, ...], Callable[[Path], Program]]] = {
    "microsocks": (("microsocks",), Microsocks),
    "microsocks with login": (("microsocks",), lambda folder: Microsocks(folder, LOGIN)),
    "dante": (("danted",), Dante),
    "ssh": (("ssh", "sshd", "ssh-keygen"), SshSocks),
}
WAYS = [("microsocks", "socks5"), ("microsocks with login", "socks5"), ("dante", "socks4"), ("dante", "socks5"), ("ssh", "socks4"),
        ("ssh", "socks5")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Program]]:
    """Start a server when the first test asks for it."""
    running: dict[str, Program] = {}

    def of(name: str) -> Program:
        programs, start = SERVERS[name]
        needs(*programs)
        if name not in running:
            running[name] = start(tmp_path_factory.mktemp("socks") / "server")
        return running[name]
    yield of
    for program in running.values():
        program.close()


def through(kind: str, port: int, login: tuple[str, str] | None = None, **more: Any) -> dict[str, Any]:
    """A configuration whose only way out is this server."""
    entry: dict[str, Any] = {"type": kind, "address": f"127.0.0.1:{port}", **more}
    if login and kind == "socks5":
        entry |= {"username": login[0], "password": login[1]}
    return {"upstreams": [entry]}


@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_sessions_through(rig: Rig, server: Callable[[str], Program], name: str, kind: str) -> None:
    port = server(name).port
    proxy = rig.proxy(through(kind, port, LOGIN if "login" in name else None, **({"user_id": "courier"} if kind == "socks4" else {})))
    for mode in MODES:
        client = rig.client("alice", mode)
        client.req_pq()
        client.download(2 * MIB)
        client.upload(MIB)
        client.shutdown()
        client.expect_eof()
    rig.client("bob", "secure").both_ways(2 * MIB)
    assert len(rig.dc.peers) == 4
    proxy.wait_log(rf"  via {kind}://127.0.0.1:{port}$")
    assert not proxy.log(LOGIN[1]), "a password in the log"


def test_a_login_of_dante(rig: Rig, tmp_path: Path) -> None:
    """Users of the system: made for the test, gone after it."""
    needs("danted")
    name = f"telemt{os.getpid()}"
    with system_user(name, "s3cret: pass") as login:
        dante = Dante(tmp_path / "server", login=True)
        try:
            proxy = rig.proxy(through("socks5", dante.port, login))
            for mode in MODES:
                client = rig.client("alice", mode)
                client.req_pq()
                client.download(2 * MIB)
                client.upload(MIB)
            wrong = rig.proxy(through("socks5", dante.port, (name, "wrong")))
            rig.client().expect_closed()
            wrong.wait_log("WARN .*Upstream failed after retries: Proxy error: SOCKS5 authentication failed")
            nobody = rig.proxy(through("socks5", dante.port))
            rig.client().expect_closed()
            nobody.wait_log("WARN .*Upstream failed after retries: Proxy error: Unsupported SOCKS5 auth method")
            assert len(rig.dc.peers) == len(MODES) and not proxy.log("s3cret")
        finally:
            dante.close()


@pytest.mark.parametrize("name", ["microsocks with login", "dante"])
@pytest.mark.parametrize("mode", ["classic", "tls"])
def test_the_fast_path_is_the_same(rig: Rig, server: Callable[[str], Program], name: str, mode: str) -> None:
    """After the dialogue it is a plain stream: bulk is spliced, what splice leaves behind is its pipe (house.md, data path)."""
    proxy = rig.proxy(through("socks5", server(name).port, LOGIN if "login" in name else None))
    before = proxy.fds()["pipe"]
    client = rig.client("bob", mode)
    client.download(24 * MIB)
    assert (proxy.fds()["pipe"] > before) is (mode == "classic")
    client.upload(4 * MIB)


def test_a_scope_is_the_login(rig: Rig, tmp_path: Path) -> None:
    """A user scope_NAME goes through the entry of that scope only, with NAME as user and password; others never do."""
    needs("microsocks")
    vip = Microsocks(tmp_path / "vip", ("vip", "vip"))
    try:
        config = through("socks5", vip.port, scopes="gold, vip")
        config["upstreams"].append({"type": "direct", "bind_addresses": ["127.0.0.1"]})
        config["access"] = {"users": {"scope_vip": "11" * 16, "scope_lost": "22" * 16}}
        proxy = rig.proxy(config)
        rig.client(secret=bytes.fromhex("11" * 16)).req_pq()
        rig.client("alice").req_pq()
        rig.client(secret=bytes.fromhex("22" * 16)).expect_closed()
        proxy.wait_log(r"WARN .*No upstreams available! Using first \(direct\?\) scope=lost")
        vip.close()
        rig.client("alice").req_pq()
        rig.client(secret=bytes.fromhex("11" * 16)).expect_closed()
    finally:
        vip.close()


@pytest.mark.parametrize(("login", "text"), [
    (("courier", "wrong"), "Proxy error: SOCKS5 authentication failed"),
    (None, "Proxy error: (Unsupported SOCKS5 auth method|SOCKS5 server requires authentication)"),
])
def test_a_login_that_is_refused(rig: Rig, server: Callable[[str], Program], login: tuple[str, str] | None, text: str) -> None:
    proxy = rig.proxy(through("socks5", server("microsocks with login").port, login))
    rig.client().expect_closed()
    proxy.wait_log(f"WARN .*Upstream failed after retries: {text}")
    assert not proxy.log("courier") and not proxy.log("wrong")
    assert not rig.dc.peers


def test_a_server_by_name_to_an_ipv6_data_centre(rig: Rig, server: Callable[[str], Program]) -> None:
    """The server is looked up; families are the configuration's, not this host's (D12)."""
    port = server("dante").port
    far = rig.add_dc(host="::1")
    proxy = rig.proxy({"upstreams": [{"type": "socks5", "address": f"proxy.example:{port}"}],
                       "network": {"ipv6": True, "dns_overrides": [f"proxy.example:{port}:127.0.0.1"]},
                       "dc_overrides": {"4": [far.address]}})
    rig.client(dc=4).req_pq()
    assert len(far.peers) == 1 and proxy.log("Runtime DNS overrides configured: 1 entries")


def test_a_closed_port_of_the_data_centre(rig: Rig, server: Callable[[str], Program]) -> None:
    proxy = rig.proxy(through("socks5", server("microsocks").port) | {"dc_overrides": {"3": [f"127.0.0.1:{free_port()}"]}})
    rig.client(dc=3).expect_closed()
    proxy.wait_log("WARN .*Upstream failed after retries: Proxy error: SOCKS5 request failed: code 5 fails=1 attempts=2")
    rig.client(dc=2).req_pq()
