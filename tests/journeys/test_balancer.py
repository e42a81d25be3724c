"""Behind a real HAProxy: whoever the client is, logs, limits and the mask host know; nobody else may say so."""
from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from doubles import HANGUP, Rig, poll
from programs import Haproxy, Nginx, curl, needs

LISTENER = {"ip": "127.0.0.1", "proxy_protocol": True}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Nginx]:
    needs("nginx", "openssl")
    server = Nginx(tmp_path / "nginx", proxy_protocol=True)
    yield server
    server.close()


@pytest.mark.parametrize("how", ["send-proxy", "send-proxy-v2"])
def test_clients_and_strangers_behind_haproxy(rig: Rig, site: Nginx, tmp_path: Path, how: str) -> None:
    """The address of a client in log and limits, and of a stranger in the header to nginx, is the one that HAProxy saw."""
    needs("haproxy", "curl")
    version = 2 if how.endswith("v2") else 1
    proxy = rig.proxy({"server": {"listeners": [LISTENER], "proxy_protocol_trusted_cidrs": ["127.0.0.1/32"]},
                       "access": {"user_max_unique_ips": {"alice": 1}},
                       "general": {"beobachten": True, "beobachten_flush_secs": 1},
                       "censorship": {"mask": True, "mask_host": "127.0.0.1", "mask_port": site.port, "mask_proxy_protocol": version}})
    front = Haproxy(tmp_path / "haproxy", f"127.0.0.1:{proxy.port}", how, check=True)
    try:
        client = rig.client(port=front.port, source="127.0.0.7")
        client.req_pq()
        client.download(1 << 20)
        port = client.sock.getsockname()[1]
        proxy.wait_log(rf"PROXY protocol header parsed peer=127.0.0.1:\d+ client=127.0.0.7:{port} version={version}")
        proxy.wait_log(r"MTProto handshake successful peer=127\.0\.0\.7:\d+ user=alice")
        second = rig.dial(port=front.port, source="127.0.0.8").start()
        second.expect_closed()
        proxy.wait_log("IP limit exceeded .*ip=127.0.0.8")
        rig.client("bob", port=front.port, source="127.0.0.8").req_pq()

        answer = curl(front.port, "index.txt", "--interface", "127.0.0.9")
        assert answer["body"] == b"the real site\n"
        line = poll(lambda: [line for line in site.log() if "index.txt" in line], "a line in the log of the site")[0]
        stranger, source, target, peer, *_ = line.split()
        assert (stranger, target, peer) == ("127.0.0.9", "127.0.0.1", "127.0.0.1") and source.isdigit()
        report = proxy.folder / "cache" / "beobachten.txt"
        poll(lambda: "[TLS-scanner]\n127.0.0.9-1\n" in report.read_text(), "the stranger in beobachten.txt")
        time.sleep(0.5)                         # some health checks of HAProxy, every 200 ms
        assert not proxy.log("Invalid PROXY protocol header") and "127.0.0.1-" not in report.read_text()
    finally:
        front.close()


def test_a_header_from_an_untrusted_peer_is_refused(rig: Rig, site: Nginx, tmp_path: Path) -> None:
    needs("haproxy")
    proxy = rig.proxy({"server": {"listeners": [LISTENER], "proxy_protocol_trusted_cidrs": ["10.0.0.0/8", "127.0.0.5/32"]},
                       "censorship": {"mask": True, "mask_host": "127.0.0.1", "mask_port": site.port}})
    front = Haproxy(tmp_path / "haproxy", f"127.0.0.1:{proxy.port}", "send-proxy")
    try:
        for client in (rig.dial(port=front.port), rig.dial()):
            try:
                client.push(client.hello)
            except HANGUP:
                pass
            client.expect_closed()
        proxy.wait_log(r"WARN .*Invalid PROXY protocol header peer=127.0.0.1:\d+ reason=proxy_protocol_untrusted", count=2)
    finally:
        front.close()
    trusted = rig.dial(source="127.0.0.5")
    trusted.push(b"PROXY TCP4 203.0.113.5 203.0.113.1 1 2\r\n")
    trusted.start().req_pq()
    proxy.wait_log("MTProto handshake successful peer=203.0.113.5:1 ")
    assert [line.split()[4] for line in site.log()] == ["GET"] * len(site.log())        # the site saw none of it


@pytest.mark.parametrize("raw", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"PROXY TCP4 1.2.3.4\r\n", b"PROXY NONSENSE\r\n"])
def test_without_a_header_nobody_comes_in(rig: Rig, raw: bytes) -> None:
    proxy = rig.proxy({"server": {"listeners": [LISTENER]}})
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as sock:
        sock.sendall(raw)
        try:
            assert sock.recv(100) == b""
        except HANGUP:
            pass
    proxy.wait_log("WARN .*Invalid PROXY protocol header .*proxy_protocol_invalid_header")


def test_the_header_has_five_seconds_at_most(rig: Rig) -> None:
    proxy = rig.proxy({"server": {"listeners": [LISTENER]}, "timeouts": {"client_handshake": 1}})
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=20) as sock:
        sock.sendall(b"PROXY TCP4")
        assert sock.recv(100) == b""
    proxy.wait_log("WARN .*Invalid PROXY protocol header .*proxy_protocol_header_timeout")


# -- several doors -----------------------------------------------------------------------------------------------------------------

def test_listeners_with_and_without_header_and_a_unix_socket(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "telemt.sock"
    proxy = rig.proxy({"server": {"listeners": [{"ip": "127.0.0.1"}, {"ip": "127.0.0.2", "proxy_protocol": True}],
                                  "listen_unix_sock": str(path), "listen_unix_sock_perm": "0660"}},
                      ready=r"Listening on unix:.*\(mode 0660\)")
    assert len(proxy.log(r"Listening on 127.0.0.[12]:")) == 2
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    rig.client().req_pq()
    behind = rig.dial(host="127.0.0.2")
    behind.push(b"PROXY UNKNOWN\r\n")
    behind.start().download(1 << 20)
    for n in (1, 2):
        local = rig.local(str(path)).start()
        local.req_pq()
        local.download(2 << 20)
        local.upload(1 << 20)
        proxy.wait_log(rf"MTProto handshake successful peer=127.0.0.1:{n} ")
    rig.close_clients()
    proxy.settle()
    proxy.stop()
    assert not path.exists()


def test_a_dead_unix_socket_is_replaced_and_a_live_one_is_not(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "telemt.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    config = {"server": {"listen_unix_sock": str(path), "listen_tcp": False, "listeners": [], "listen_unix_sock_perm": "0x1"}}
    proxy = rig.proxy(config, ready="Listening on unix:")
    proxy.wait_log("WARN .*Invalid listen_unix_sock_perm '0x1': invalid digit found in string. Ignoring.")
    rig.local(str(path)).start().req_pq()
    second = rig.proxy(config, ready="")
    assert second.wait_exit(10) == 1
    assert second.log(rf"ERROR .*Failed to bind to unix:{path}: .*Address already in use")
    rig.local(str(path)).start().req_pq()


def test_a_file_that_is_no_socket_is_left_alone(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("mine")
    proxy = rig.proxy({"server": {"listen_unix_sock": str(path)}}, ready="")
    assert proxy.wait_exit(10) == 1 and path.read_text() == "mine"
    assert proxy.log("ERROR .*Failed to bind to unix:.*Address already in use")


def test_the_unix_socket_with_a_proxy_header(rig: Rig, tmp_path: Path) -> None:
    path = tmp_path / "telemt.sock"
    proxy = rig.proxy({"server": {"listen_unix_sock": str(path), "proxy_protocol": True, "listeners": [{"ip": "127.0.0.1"}],
                                  "proxy_protocol_trusted_cidrs": []}}, ready="Listening on unix:")
    local = rig.local(str(path))
    local.push(b"PROXY TCP6 2001:db8::7 2001:db8::1 77 443\r\n")
    local.start().req_pq()
    proxy.wait_log(r"MTProto handshake successful peer=\[2001:db8::7\]:77 ")
    refused = rig.dial()                        # over TCP nobody is trusted: []
    refused.expect_closed()


def test_two_processes_share_a_port(rig: Rig) -> None:
    """reuse_allow: a second instance may listen on the same port; without it it says so."""
    listeners = {"server": {"listeners": [{"ip": "127.0.0.1", "reuse_allow": True}]}}
    first = rig.proxy(listeners)
    second = rig.proxy(listeners, port=first.port)
    for _ in range(20):
        rig.client(port=first.port).req_pq()
    assert first.log("handshake successful") and second.log("handshake successful")
    alone = rig.proxy(port=first.port, ready="")
    assert alone.wait_exit(10) == 1
    assert alone.log("Failed to bind: address already in use .*pid=") and alone.log("reuse_allow=false; set")
