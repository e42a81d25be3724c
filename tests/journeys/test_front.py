"""The front: a real mask host is measured, and clients see what it would have answered (tls-front.md 9)."""
from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import sites
from doubles import MLKEM, X25519, Proxy, Rig, free_port

OPENSSL = pytest.mark.skipif(not sites.knows_mlkem(), reason="no pyOpenSSL whose OpenSSL knows X25519MLKEM768")
NGINX = pytest.mark.skipif(not sites.NGINX, reason=sites.NGINX_MISSING)
UPDATED = r"TLS cache updated domain=example\.com len=(\d+)"


def fronted(port: int, **more: Any) -> dict[str, Any]:
    """Configuration whose mask host is at `port`."""
    return {"censorship": {"tls_emulation": True, "mask_host": "127.0.0.1", "mask_port": port, **more}}


def profile(proxy: Proxy, domain: str = "example.com") -> dict[str, Any]:
    """What the cache file says, once the first fetch is over."""
    proxy.wait_log(rf"TLS cache updated domain={domain}", timeout=30)
    path = proxy.folder / "tlsfront" / f"{domain}.json"
    end = time.monotonic() + 10
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return json.loads(path.read_bytes())


def shapes(rig: Rig, shares: tuple[int, ...], count: int = 8) -> list[tuple[int, int, int, tuple[int, ...]]]:
    """(suite, group, size, order) of some answers."""
    found = []
    for _ in range(count):
        flight = rig.client(shares=shares).flight
        assert flight is not None
        found.append((int.from_bytes(flight.suite, "big"), flight.group, flight.records[2], flight.order))
    return found


@contextlib.contextmanager
def nginx(rig: Rig, kind: str, chain: int, *ssl: str, **more: Any) -> Iterator[sites.Nginx]:
    certificate = sites.make_certificate(rig.folder / "certificates", kind, chain)
    with sites.Nginx(rig.folder / "nginx", certificate, ssl, **more) as host:
        yield host


# -- hosts that can be imitated

@NGINX
@pytest.mark.parametrize(("kind", "chain", "suite", "low", "high"), [
    ("ec", 0, "TLS_CHACHA20_POLY1305_SHA256", 450, 650), ("rsa2048", 2, "TLS_AES_256_GCM_SHA384", 1700, 2100),
    ("rsa2048", 5, "TLS_AES_128_GCM_SHA256", 3800, 4600)])
def test_answers_look_like_those_of_nginx(rig: Rig, kind: str, chain: int, suite: str, low: int, high: int) -> None:
    with nginx(rig, kind, chain, "ssl_protocols TLSv1.3;", f"ssl_conf_command Ciphersuites {suite};") as host:
        proxy = rig.proxy(fronted(host.port))
        rig.client().req_pq()                    # served from the first moment
        known = profile(proxy)["profile"]
        number = {"TLS_AES_128_GCM_SHA256": 0x1301, "TLS_AES_256_GCM_SHA384": 0x1302, "TLS_CHACHA20_POLY1305_SHA256": 0x1303}[suite]
        assert (known["suite"], known["group"], len(known["flights"])) == (number, X25519, 3)
        assert all(low <= size <= high for size in known["flights"])
        for shares in ((X25519,), (MLKEM, X25519)):
            assert all(shape[:2] == (number, X25519) and shape[2] in known["flights"] and list(shape[3]) == known["order"]
                       for shape in shapes(rig, shares, 4))
        assert not proxy.log("WARN.*(TLS|front)")
    assert "(SSL:" not in (rig.folder / "nginx" / "error.log").read_text(), "nginx did not like our hello"


@OPENSSL
@pytest.mark.parametrize("groups", [b"X25519MLKEM768:X25519", b"X25519"])
def test_answers_use_the_group_of_the_host(rig: Rig, groups: bytes) -> None:
    certificate = sites.make_certificate(rig.folder / "certificates", "rsa2048", 1)
    with sites.openssl_host(certificate, groups) as host:
        proxy = rig.proxy(fronted(host.port))
        known = profile(proxy)
        expected = MLKEM if b"MLKEM" in groups else X25519
        assert known["profile"]["group"] == expected
        template = known["server_hello_template"]
        assert [len(entry["data"]) for entry in template["extensions"] if entry["ext_type"] == 51] == [1124 if expected == MLKEM else 36]
        assert {shape[1] for shape in shapes(rig, (MLKEM, X25519), 4)} == {expected}
        assert {shape[1] for shape in shapes(rig, (X25519,), 2)} == {X25519}
        client = rig.client(shares=(MLKEM, X25519))
        client.req_pq()
        client.download(200_000)


@NGINX
@pytest.mark.parametrize("version", [1, 2])
def test_through_a_unix_socket_with_a_proxy_header(rig: Rig, version: int) -> None:
    with nginx(rig, "ec", 0, proxy_protocol=True) as host:
        proxy = rig.proxy({"censorship": {"tls_emulation": True, "mask_unix_sock": str(host.path), "mask_proxy_protocol": version}})
        assert profile(proxy)["profile"]["suite"] in (0x1301, 0x1302, 0x1303)
        assert not re.search('broken header: "[^"]', (host.folder / "error.log").read_text())      # an empty one is our look at it


@NGINX
def test_every_domain_has_its_own_profile(rig: Rig) -> None:
    """Six names, five of them the same host; a name with strange characters stays inside the directory."""
    strange = r"..\..\up"
    with nginx(rig, "rsa2048", 1) as host:
        names = ["a.example", "b.example", "c.example", "d.example", strange]
        proxy = rig.proxy(fronted(host.port, tls_domains=names))
        for name in ("example.com", *names[:4]):
            assert profile(proxy, name)["domain"] == name
        proxy.wait_log(r"TLS cache updated domain=\.\.", timeout=30)
        assert len({size for name in ("a.example", "example.com") for size in profile(proxy, name)["profile"]["flights"]}) <= 3
        inside = sorted(os.listdir(proxy.folder / "tlsfront"))
        assert inside == sorted(f"{name}.json" for name in ("example.com", *names[:4]))
        assert not list(rig.folder.glob("**/up*"))


# -- hosts that cannot

@pytest.mark.parametrize(("answer", "hang_up", "error"), [
    (b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", True, "no TLS 1.3"), (os.urandom(200_000), False, "no TLS 1.3"),
    (b"\x15\x03\x03\x00\x02\x02\x28", True, "alert 40"), (b"\x15\x03\x03\x00\x02\x02\x70", True, "alert 112"), (b"", True, "closed")])
def test_a_host_that_answers_something_else(rig: Rig, answer: bytes, hang_up: bool, error: str) -> None:
    with sites.Host(sites.says(answer, hang_up)) as host:
        proxy = rig.proxy(fronted(host.port))
        proxy.wait_log(rf"WARN .*TLS emulation initial fetch failed domain=example\.com error={error}$", timeout=20)
        rig.client().req_pq()
        assert len({shape[:3] for shape in shapes(rig, (X25519,), 3)}) == 1
        assert bool(proxy.log("front server does not know example.com")) == (error == "alert 112")
        assert not (proxy.folder / "tlsfront").exists()


@NGINX
@pytest.mark.parametrize(("ssl", "error"), [("ssl_protocols TLSv1.2;", "no TLS 1.3"),
                                            ("ssl_protocols TLSv1.3; ssl_ecdh_curve prime256v1;", "hello retry")])
def test_a_real_host_that_cannot_be_imitated(rig: Rig, ssl: str, error: str) -> None:
    with nginx(rig, "ec", 0, ssl) as host:
        proxy = rig.proxy(fronted(host.port))
        proxy.wait_log(rf"TLS emulation initial fetch failed domain=example\.com error={error}$", timeout=20)
        rig.client().req_pq()


def test_a_host_that_is_not_there(rig: Rig) -> None:
    proxy = rig.proxy(fronted(free_port()))
    proxy.wait_log(r"TLS emulation initial fetch failed domain=example\.com error=.*Connection refused", timeout=20)
    rig.client().req_pq()


def test_a_host_that_never_answers_holds_up_nobody(rig: Rig) -> None:
    """Twice 5 s of silence, for the large hello and for the small one; clients come and go as ever."""
    with sites.Host(sites.stays_silent) as host:
        proxy = rig.proxy(fronted(host.port, tls_domains=[f"{letter}.example" for letter in "abcdefgh"]))
        slowest = 0.0
        for _ in range(40):
            start = time.monotonic()
            client = rig.client()
            client.req_pq()
            client.close()
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.05)
        assert slowest < 4.5, "a fetch must not hold up clients"
        proxy.wait_log("TLS-front fetch not ready within timeout; using cache/default fake cert fallback domain=h.example "
                       "timeout_secs=5 fake_cert_len=2048", timeout=20)
        assert host.count <= 8, "at most four domains at once"


# -- the cache

@NGINX
def test_a_restart_without_the_host_uses_the_file(rig: Rig) -> None:
    with nginx(rig, "rsa2048", 2) as host:
        first = rig.proxy(fronted(host.port))
        known = profile(first)
        first.stop()
        port = host.port
    second = rig.proxy(fronted(port, tls_front_dir=str(first.folder / "tlsfront")))
    assert second.log(r"Loaded TLS cache entries from disk count=1")
    assert {shape[2] for shape in shapes(rig, (X25519,), 12)} <= set(known["profile"]["flights"])
    assert not second.log("fetch failed"), "it is fresh: nobody asked"


def test_a_cache_that_is_broken_huge_or_foreign(rig: Rig) -> None:
    folder = rig.folder / "cache"
    folder.mkdir()
    (folder / "example.com.json").write_text('{"domain": "example.com", "server_hello_template": [')
    (folder / "a.example.json").write_bytes(b"[" * (5 << 20))
    os.mkfifo(folder / "b.example.json")
    (folder / "c.example.json").symlink_to("/proc/self/mem")
    (folder / "d.example.json").write_text("[" * 500_000)
    (folder / "e.example.json").mkdir()
    names = [f"{letter}.example" for letter in "abcde"]
    proxy = rig.proxy(fronted(free_port(), tls_front_dir=str(folder), tls_domains=names))
    proxy.wait_log("TLS emulation initial fetch failed", count=6, timeout=20)
    rig.client().req_pq()
    assert not proxy.log("Loaded TLS cache entries")
    assert sorted(os.listdir(folder)) == sorted(f"{name}.json" for name in ("example.com", *names))


@NGINX
def test_a_cache_that_cannot_be_written(rig: Rig) -> None:
    with nginx(rig, "ec", 0) as host:
        blocked = rig.folder / "blocked"
        blocked.write_text("a file where the directory should be")
        proxy = rig.proxy(fronted(host.port, tls_front_dir=str(blocked)))
        proxy.wait_log(r"WARN .*TLS cache write failed domain=example\.com error=", timeout=20)
        rig.client().req_pq()
        assert {shape[2] < 700 for shape in shapes(rig, (X25519,), 3)} == {True}, "the profile is used all the same"


def test_a_file_of_the_reference_shapes_the_answers(rig: Rig) -> None:
    folder = rig.folder / "cache"
    folder.mkdir()
    (folder / "example.com.json").write_text(json.dumps({
        "server_hello_template": {"version": [3, 3], "random": [9] * 32, "session_id": [], "cipher_suite": [19, 3], "compression": 0,
                                  "extensions": [{"ext_type": 51, "data": [0, 29, 0, 32, *range(32)]}, {"ext_type": 43, "data": [3, 4]}]},
        "cert_info": None, "cert_payload": None, "app_data_records_sizes": [1234, 4321], "total_app_data_len": 5555,
        "domain": "example.com"}, indent=2))
    rig.proxy(fronted(free_port(), tls_front_dir=str(folder)))
    assert set(shapes(rig, (MLKEM, X25519), 3)) == {(0x1303, X25519, 5555, (51, 43))}


# -- beside everything else

@OPENSSL
def test_clients_connect_while_the_profile_changes(rig: Rig) -> None:
    """The host is slow: the first answers have the default shape, the later ones its own, and no client notices."""
    certificate = sites.make_certificate(rig.folder / "certificates", "rsa2048", 1)
    with sites.openssl_host(certificate, delay_s=1.5) as host:
        proxy = rig.proxy(fronted(host.port))
        before = {shape[1:3] for shape in shapes(rig, (MLKEM, X25519), 3)}
        end = time.monotonic() + 40
        while not proxy.log(UPDATED):
            assert time.monotonic() < end
            client = rig.client(shares=(MLKEM, X25519))
            client.req_pq()
            client.close()
            time.sleep(0.05)
        after = {shape[1] for shape in shapes(rig, (MLKEM, X25519), 3)}
    assert {group for group, _ in before} == {X25519} and len(before) == 1 and after == {MLKEM}


@OPENSSL
def test_a_reload_measures_a_new_mask_host_at_once(rig: Rig) -> None:
    first, second = (sites.make_certificate(rig.folder / str(number), "rsa2048", number) for number in (0, 3))
    with sites.openssl_host(first, b"X25519") as old, sites.openssl_host(second) as new:
        proxy = rig.proxy(fronted(old.port))
        before = profile(proxy)["profile"]
        text = proxy.config.read_text()
        proxy.config.write_text(text.replace(f"mask_port = {old.port}", f"mask_port = {new.port}"))
        proxy.process.send_signal(signal.SIGHUP)
        proxy.wait_log(UPDATED, count=2, timeout=20)
        end = time.monotonic() + 10
        while profile(proxy)["profile"] == before and time.monotonic() < end:
            time.sleep(0.02)
        after = profile(proxy)["profile"]
        assert (before["group"], after["group"]) == (X25519, MLKEM) and min(after["flights"]) > max(before["flights"])
        assert {shape[2] for shape in shapes(rig, (MLKEM, X25519), 3)} <= set(after["flights"])


def test_no_probe_without_tls_or_without_emulation(rig: Rig) -> None:
    with sites.Host(sites.stays_silent) as host:
        rig.proxy({**fronted(host.port), "general": {"modes": {"tls": False}}})
        rig.proxy(fronted(host.port) | {"censorship": {"tls_emulation": False, "mask_host": "127.0.0.1", "mask_port": host.port}})
        time.sleep(1.0)
        assert host.count == 0


def test_the_own_port_as_mask_host_is_not_asked(rig: Rig) -> None:
    """The loop guard knows the probe too: it would measure ourselves."""
    port = free_port()
    proxy = rig.proxy(fronted(port), port=port)
    proxy.wait_log(r"TLS emulation initial fetch failed domain=example\.com error=Mask target is this proxy", timeout=20)
    with socket.create_connection(("127.0.0.1", port)):
        pass
    rig.client().req_pq()


def socks5(turned: dict[int, int]) -> sites.Host:
    """A SOCKS5 server without login; `turned` sends a port somewhere else on this machine."""
    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def serve(sock: socket.socket) -> None:
        assert sock.recv(2) == b"\x05\x01" and sock.recv(1) == b"\0"
        sock.sendall(b"\5\0")
        head = sock.recv(10, socket.MSG_WAITALL)
        assert head[:4] == b"\5\1\0\1", head
        port = int.from_bytes(head[8:], "big")
        with socket.create_connection((socket.inet_ntoa(head[4:8]), turned.get(port, port)), timeout=30) as far:
            sock.sendall(b"\5\0\0\1\0\0\0\0\0\0")
            thread = threading.Thread(target=pump, args=(sock, far), daemon=True)
            thread.start()
            pump(far, sock)
            thread.join(30)
    return sites.Host(serve)


@OPENSSL
def test_a_host_that_only_an_upstream_reaches(rig: Rig) -> None:
    """Direct is refused; through the upstream it is the same host, and the upstream's health does not hear of it."""
    certificate, dead = sites.make_certificate(rig.folder / "certificates", "ec"), free_port()
    with sites.openssl_host(certificate) as host, socks5({dead: host.port}) as server:
        config = {**fronted(dead), "upstreams": [{"type": "socks5", "address": f"127.0.0.1:{server.port}"}]}
        proxy = rig.proxy(config)
        assert profile(proxy)["profile"]["group"] == MLKEM
        rig.client(shares=(MLKEM, X25519)).req_pq()
        assert not proxy.log("fetch failed|unhealthy")
