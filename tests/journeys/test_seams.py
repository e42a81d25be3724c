"""Where parts meet: reload x masking x SOCKS x PROXY headers x API, all in one running program."""
from __future__ import annotations

import contextlib
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from doubles import HANGUP, ApiScript, Rig, build_hello, free_port, poll
from programs import Microsocks, Nginx, curl, needs

HEADERS = {1: b"PROXY TCP4 203.0.113.5 203.0.113.1 40000 443\r\n",
           2: b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xcb\0\x71\x05\xcb\0\x71\x01\x9c\x40\x01\xbb"}
STRANGER = build_hello(bytes.fromhex("ffeeddccbbaa99887766554433221100"))


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[dict[int, Nginx]]:
    """The mask site twice: with and without a PROXY header in front."""
    needs("nginx", "openssl", "curl", "microsocks")
    with contextlib.ExitStack() as stack:
        found = {}
        for n in (0, 1):
            found[n] = Nginx(tmp_path / f"nginx{n}", proxy_protocol=bool(n))
            stack.callback(found[n].close)
        yield found


def test_everything_changes_while_everything_runs(rig: Rig, sites: dict[int, Nginx], tmp_path: Path) -> None:
    """Ten reloads move the mask host, its PROXY header, ours, and a user comes and goes by the API; who is connected does not notice."""
    socks = Microsocks(tmp_path / "socks", ("courier", "secret"))
    api_port = free_port()
    proxy = rig.proxy({
        "server": {"api": {"enabled": True, "listen": f"127.0.0.1:{api_port}"}, "proxy_protocol_trusted_cidrs": ["127.0.0.0/8"]},
        "upstreams": [{"type": "socks5", "address": f"127.0.0.1:{socks.port}", "username": "courier", "password": "secret"}],
        "censorship": {"mask": True, "mask_host": "127.0.0.1", "mask_port": sites[0].port, "mask_proxy_protocol": 0}})
    api = ApiScript(api_port)
    poll(lambda: api.ask("GET", "/v1/health")[0] == 200, "the API")
    try:
        old = [rig.client("alice", mode) for mode in ("tls", "secure", "classic")]
        masked = socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
        masked.sendall(STRANGER)
        before = masked.recv(65_536)
        half = rig.dial()                              # began before the first reload: it keeps what it was accepted under
        half.push(half.hello[:300])
        for n in range(1, 11):
            headed = n % 3
            text = proxy.config.read_text()
            for key, value in (("mask_port", sites[n % 2].port), ("mask_proxy_protocol", n % 2 and 1 + n // 2 % 2)):
                text = re.sub(rf"(?m)^{key} = \d+$", f"{key} = {value}", text)
            text = re.sub(r"(?m)^proxy_protocol = .*\n", "", text)
            proxy.config.write_text(text.replace("[server]\n", f"[server]\nproxy_protocol = {'true' if headed else 'false'}\n", 1))
            assert api.data("/v1/stats/summary")
            proxy.process.send_signal(signal.SIGHUP)
            head = HEADERS.get(headed, b"")
            poll(lambda head=head: speaks(rig, head), f"reload {n} in force")
            if not headed:
                assert curl(proxy.port, "index.txt")["body"] == b"the real site\n"
            stranger = socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
            stranger.sendall(head + STRANGER)
            assert stranger.recv(65_536)[:3] == before[:3]          # the site answers, whichever it is now
            stranger.close()
            if n % 2:
                status, _ = api.ask("POST", "/v1/users", {"username": f"user{n}"})
                assert status in (200, 201)
            else:
                assert api.ask("DELETE", f"/v1/users/user{n - 1}")[0] == 200
            for client in old:
                client.echo()
        masked.close()
        half.push(half.hello[300:])
        half.read_flight()
    finally:
        socks.close()
    assert not proxy.log("ERROR|Internal error|Traceback") and not proxy.log("courier|secret=")


def speaks(rig: Rig, head: bytes) -> bool:
    """True if a client that begins with this PROXY header, or none, is served."""
    client = rig.dial("bob")
    try:
        client.push(head)
        client.start()
        client.sock.settimeout(1.0)
        client.req_pq()
    except (*HANGUP, OSError, EOFError, AssertionError):
        return False
    finally:
        client.close()
        rig.clients.remove(client)
    return True
