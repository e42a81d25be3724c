"""Strangers in front of a real nginx: through the proxy they see what they see directly, byte for byte."""
from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from doubles import HANGUP, USERS, Rig, build_hello, free_port, helper, poll
from programs import Nginx, big_file, curl, needs, path_of

STRANGER = bytes.fromhex("ffeeddccbbaa99887766554433221100")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Nginx]:
    needs("nginx", "openssl")
    server = Nginx(tmp_path / "nginx", header=3, keepalive=4)
    yield server
    server.close()


def masking(site: Nginx, plain: bool = False, **more: object) -> dict[str, object]:
    """Configuration of a proxy whose mask host is the site; `plain`: the site without TLS."""
    return {"general": {"modes": {"classic": False, "secure": False}},
            "censorship": {"mask": True, "mask_host": "127.0.0.1", "mask_port": site.plain if plain else site.port, **more}}


# -- a browser ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [("--tls-max", "1.2", "--http1.1"), ("--tls-max", "1.2", "--http2"), ("--tlsv1.3", "--http1.1"),
                                   ("--tlsv1.3", "--http2"), ("--http1.0",)], ids=lambda words: "-".join(words).replace("--", ""))
def test_a_browser_sees_the_site(rig: Rig, site: Nginx, words: tuple[str, ...]) -> None:
    needs("curl")
    proxy = rig.proxy(masking(site))
    direct, through = curl(site.port, "index.txt", *words), curl(proxy.port, "index.txt", *words)
    assert through == direct and direct["body"] == b"the real site\n" and direct["status"] == 200
    assert curl(proxy.port, "nothing", *words) == curl(site.port, "nothing", *words)
    headers = [re.sub(rb"(?im)^date:.*$", b"", curl(port, "index.txt", "--include", *words)["body"]) for port in (site.port, proxy.port)]
    assert headers[0] == headers[1]


def test_fifty_megabytes_arrive_whole_while_a_client_is_served(rig: Rig, site: Nginx) -> None:
    """A FakeTLS session on the same port goes on meanwhile."""
    needs("curl")
    proxy = rig.proxy(masking(site))
    client = rig.client()
    client.req_pq()
    got: list[str] = []

    def download() -> None:
        got.append(hashlib.sha256(curl(proxy.port, "big")["body"]).hexdigest())

    with helper(download):
        for _ in range(20):
            client.echo()
    assert got == [big_file()[1]]
    client.download(4 << 20)
    assert len(rig.dc.peers) == 1


@pytest.mark.parametrize("how", ["localhost", "override"])
def test_the_site_under_a_name(rig: Rig, site: Nginx, how: str) -> None:
    """By the system's resolver, whose first address may be ::1 where nobody listens; and by an override."""
    needs("curl")
    named = {"localhost": ("localhost", []), "override": ("Mask.Example", [f"mask.example:{site.port}:127.0.0.1"])}[how]
    proxy = rig.proxy(masking(site, mask_host=named[0]) | {"network": {"dns_overrides": named[1]}})
    for _ in range(3):
        assert curl(proxy.port, "index.txt")["body"] == b"the real site\n"


def test_a_reload_moves_the_mask_host(rig: Rig, site: Nginx) -> None:
    """For strangers to come; who is joined already stays with the old one."""
    needs("curl")
    proxy = rig.proxy(masking(site))
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as early:
        early.sendall(HELLO)
        assert early.recv(5)[:1] == b"\x16"
        text = proxy.config.read_text().replace(f"mask_port = {site.port}", f"mask_port = {site.plain}")
        proxy.config.write_text(text)
        proxy.process.send_signal(signal.SIGHUP)
        proxy.wait_log("config reload: censorship.mask_port: ")
        assert say(proxy.port, OLD + b"\r\n")[0].startswith(b"HTTP/1.1 200")
        early.sendall(HELLO)                    # a second hello: the old site answers with an alert, encrypted
        while piece := early.recv(65536):
            last = piece
        assert last[-24:-19] == b"\x17\x03\x03\x00\x13"


def test_an_upload_gets_the_answer_of_the_site(rig: Rig, site: Nginx, tmp_path: Path) -> None:
    """Eight megabytes that nginx does not want: its refusal arrives, however much is still on the way."""
    needs("curl")
    proxy = rig.proxy(masking(site))
    (tmp_path / "up").write_bytes(big_file()[0][:8 << 20])
    words = ("--data-binary", f"@{tmp_path}/up", "--http1.1", "--header", "Expect:")
    direct, through = curl(site.port, "index.txt", *words), curl(proxy.port, "index.txt", *words)
    assert direct == through and direct["status"] in (405, 413)


def test_s_client_sees_the_same_certificate(rig: Rig, site: Nginx) -> None:
    proxy = rig.proxy(masking(site))

    def look(port: int) -> list[str]:
        run = subprocess.run([path_of("openssl"), "s_client", "-connect", f"127.0.0.1:{port}", "-servername", "example.com", "-alpn", "h2"],
                             check=False, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=30)
        assert run.returncode == 0, run.stderr
        facts = re.findall(r"(?m)^(?:subject|issuer|New, .*|ALPN .*|Server Temp Key.*|SSL handshake has read .*)$", run.stdout)
        return [*facts, *re.findall(r"-----BEGIN.*?-----END", run.stdout, re.S)]

    direct, through = look(site.port), look(proxy.port)
    assert through == direct and len(direct) > 3


def test_the_site_behind_a_unix_socket(rig: Rig, site: Nginx) -> None:
    needs("curl")
    proxy = rig.proxy(masking(site, mask_host=None, mask_unix_sock=str(site.folder / "site.sock")))
    assert curl(proxy.port, "big")["body"] == big_file()[0]
    rig.client().req_pq()


# -- a prober: every trick through the proxy and directly, side by side ------------------------------------------------------------

def say(port: int, *pieces: bytes, pause: float = 0.0, end: str = "", patience: float = 12.0) -> tuple[bytes, str, bool]:
    """Send pieces, `end` with fin or rst or not at all; returns (answer, how it ended: fin, rst, open, ended quickly?)."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=patience)
    begin = time.monotonic()
    data, how = bytearray(), "open"
    try:
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(pause)
        if end == "fin":
            sock.shutdown(socket.SHUT_WR)
        while piece := sock.recv(65536):
            data += piece
        how = "fin"
    except HANGUP:
        how = "rst"
    except TimeoutError:
        pass
    finally:
        sock.close()
    return bytes(data), how, time.monotonic() - begin < 2


HELLO = build_hello(STRANGER)
REQUEST = b"GET /index.txt HTTP/1.1\r\nHost: example.com\r\n\r\n"
OLD = b"GET /index.txt HTTP/1.0\r\nHost: example.com\r\n"
PROBES: dict[str, tuple[tuple[bytes, ...], str]] = {
    "http-on-https": ((REQUEST,), ""),
    "http-1.0": ((OLD + b"\r\n",), ""),
    "http-garbage": ((b"GARBAGE\r\n\r\n",), ""),
    "http-line-without-end": ((b"GET " + b"a" * 20_000,), "fin"),
    "ssh": ((b"SSH-2.0-OpenSSH_9.9\r\n",), ""),
    "zeros": ((bytes(100),), ""),
    "ones": ((b"\xff" * 100,), ""),
    "alert": ((b"\x15\x03\x01\x00\x02\x02\x28",), ""),
    "change-cipher-spec": ((b"\x14\x03\x03\x00\x01\x01",), ""),
    "application-data": ((b"\x17\x03\x03\x00\x10" + bytes(16),), ""),
    "heartbeat": ((b"\x18\x03\x02\x00\x03\x01\x40\x00",), ""),
    "sslv2-hello": ((bytes.fromhex("802e0100020015000000100100800200800300800400800500800600400700c0") + bytes(16),), ""),
    "ssl-3-record": ((b"\x16\x03\x00" + HELLO[3:],), ""),
    "record-version-3": ((b"\x16\x03\x03" + HELLO[3:],), ""),
    "tiny-hello": ((b"\x16\x03\x01\x00\x04\x01\x00\x00\x00",), ""),
    "empty-record": ((b"\x16\x03\x01\x00\x00",), ""),
    "hello-of-511": ((b"\x16\x03\x01\x01\xff" + HELLO[5:516],), ""),
    "hello-too-long": ((b"\x16\x03\x01\x48\x00" + bytes(2000),), ""),
    "hello-of-16384": ((b"\x16\x03\x01\x40\x00" + HELLO[5:] + bytes(16_384 - 512),), ""),
    "length-beyond-body": ((HELLO[:6] + b"\xff\xff\xff" + HELLO[9:],), ""),
    "body-of-noise": ((HELLO[:5] + b"\x01" + bytes(range(256)) * 2,), ""),
    "session-id-of-255": ((HELLO[:43] + b"\xff" + HELLO[44:],), ""),
    "cut-hello-fin": ((HELLO[:300],), "fin"),
    "one-byte-fin": ((b"\x16",), "fin"),
    "hello-then-garbage": ((HELLO, b"garbage"), ""),
    "hello-then-fin": ((HELLO,), "fin"),
    "hello-then-alert": ((HELLO + b"\x15\x03\x03\x00\x02\x02\x28",), ""),
    "two-hellos": ((HELLO * 2,), ""),
    "cut-hello-idle": ((HELLO[:300],), ""),
}


def shape(answer: tuple[bytes, str, bool]) -> tuple[object, str, bool]:
    """What can be compared: a TLS answer has random parts, so its records by type and length; anything else by its bytes."""
    data, how, quick = answer
    data = re.sub(rb"\r\nDate: [^\r]*", b"", data)
    if not (data[:1] in b"\x14\x15\x16\x17" and data[1:2] == b"\x03"):
        return data, how, quick
    rows, at = [], 0
    while at + 5 <= len(data):
        size = int.from_bytes(data[at + 3:at + 5], "big")
        rows.append((data[at], data[at + 1:at + 3].hex(), size, data[at + 5:at + 7].hex() if data[at] == 0x15 else ""))
        at += 5 + size
    return rows, how, quick


def compare(ports: dict[str, int], cases: dict[str, tuple[tuple[bytes, ...], str]], patience: float = 15.0,
            pause: float = 0.0, more: int = 3) -> list[str]:
    """Every case at both ports, all at once; returns the differences.  Who was merely late is asked again: a busy machine may be."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = {(case, way): pool.submit(say, port, *pieces, end=end, patience=patience, pause=pause)
                   for case, (pieces, end) in cases.items() for way, port in ports.items()}
        seen = {key: shape(answer.result()) for key, answer in answers.items()}
    other = [case for case in cases if seen[case, "direct"] != seen[case, "through"]]
    late = [case for case in other if more and seen[case, "direct"][:2] == seen[case, "through"][:2]]
    again = compare(ports, {case: cases[case] for case in late}, patience, pause, more - 1) if late else []
    return again + [f"{case}: {seen[case, 'direct']} directly, {seen[case, 'through']} through us" for case in other if case not in late]


def test_a_prober_cannot_tell(rig: Rig, site: Nginx) -> None:
    """The same bytes: the same records or text, the same kind of end, at once or late alike."""
    proxy = rig.proxy(masking(site) | {"timeouts": {"client_handshake": 3}})
    assert not compare({"direct": site.port, "through": proxy.port}, PROBES)


def test_a_prober_who_sends_byte_by_byte_cannot_tell(rig: Rig, site: Nginx) -> None:
    """What comes back is the same; whether the last bytes meet a reset is a race that nginx has with itself."""
    proxy = rig.proxy(masking(site) | {"timeouts": {"client_handshake": 3}})
    cases = {name: (tuple(whole[at:at + 1] for at in range(len(whole))), end) for name, (pieces, end) in PROBES.items()
             if len(whole := b"".join(pieces)) < 600}
    differences = compare({"direct": site.port, "through": proxy.port}, cases, pause=0.0005)
    assert not [text for text in differences if len(set(re.findall(r"'(?:fin|rst)'", text))) < 2]


def test_a_prober_with_plain_modes_on_cannot_tell_http_ssh_and_tls(rig: Rig, site: Nginx) -> None:
    """Other garbage of less than 64 bytes is silence there: the operator's choice (client-protocol 11.2)."""
    proxy = rig.proxy(masking(site) | {"general": {"modes": {"classic": True, "secure": True}}, "timeouts": {"client_handshake": 3}})
    chosen = {case: PROBES[case] for case in ("http-on-https", "http-1.0", "ssh", "zeros", "ones", "tiny-hello", "hello-of-511",
                                              "body-of-noise", "cut-hello-fin", "hello-then-garbage", "hello-of-16384", "two-hellos")}
    assert not compare({"direct": site.port, "through": proxy.port}, chosen)


def test_known_secrets_that_are_not_welcome_see_the_site(rig: Rig, site: Nginx) -> None:
    """Replays, wrong clocks, no usable key share: the digest is right, the answer is the site's all the same."""
    proxy = rig.proxy(masking(site))
    first = rig.client()
    first.req_pq()
    alice = bytes.fromhex(USERS["alice"])
    hellos = {"replay": first.hello, "ten-minutes-behind": build_hello(alice, clock=-700), "ahead": build_hello(alice, clock=1300),
              "p-256-only": build_hello(alice, shares=())}
    assert not compare({"direct": site.port, "through": proxy.port}, {name: ((hello,), "fin") for name, hello in hellos.items()})
    proxy.wait_log("WARN .*TLS replay attack detected")
    first.req_pq()


def test_the_plain_site_on_the_same_port(rig: Rig, site: Nginx) -> None:
    """A mask host that speaks HTTP: keep-alive, HTTP/1.0, pipelines, bad requests, answered byte for byte."""
    proxy = rig.proxy(masking(site, plain=True))
    cases = {
        "keep-alive-1.0": ((OLD + b"Connection: keep-alive\r\n\r\n", OLD + b"\r\n"), ""),
        "pipeline": ((REQUEST * 3, REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")), ""),
        "bad": ((b"BAD\r\n\r\n",), ""), "bad-version": ((b"GET / HTTP/9.9\r\n\r\n",), ""),
        "no-host": ((b"GET / HTTP/1.1\r\n\r\n",), ""), "too-large": ((b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n",), ""),
        "half-closed": ((OLD + b"\r\n",), "fin"), "half-closed-inside": ((OLD,), "fin"),
        "big": ((b"GET /big HTTP/1.0\r\nHost: example.com\r\n\r\n",), ""),
    }
    assert not compare({"direct": site.plain, "through": proxy.port}, cases, patience=8)


def test_idle_times_are_those_of_the_site(rig: Rig, site: Nginx) -> None:
    """Once a stranger is masked the site's own patience counts, not ours: after a TLS handshake, and after an answer."""
    proxy = rig.proxy(masking(site))
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def lasts(port: int, request: bytes) -> float:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw, context.wrap_socket(raw) as sock:
            sock.sendall(request)
            begin = time.monotonic()
            while sock.recv(65536):
                pass
            return time.monotonic() - begin

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        times = {(request[:3], port): pool.submit(lasts, port, request) for request in (b"", REQUEST) for port in (site.port, proxy.port)}
    for request in (b"", b"GET"):
        direct, through = (times[request, port].result() for port in (site.port, proxy.port))
        assert direct > 1.5 and abs(direct - through) < 6, (request, direct, through)      # ours would be minutes


def test_a_reset_is_passed_on_both_ways(rig: Rig, site: Nginx) -> None:
    """What a load balancer or a firewall in front of the real site would show."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = rig.proxy({"general": {"modes": {"classic": False, "secure": False}},
                           "censorship": {"mask": True, "mask_host": "127.0.0.1", "mask_port": server.getsockname()[1]}})
        for rude in ("site", "stranger"):
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as stranger:
                stranger.sendall(REQUEST)
                host, _ = server.accept()
                host.settimeout(10)
                assert host.recv(1000) == REQUEST
                first, other = (host, stranger) if rude == "site" else (stranger, host)
                first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                first.close()
                with pytest.raises(ConnectionResetError):
                    other.recv(1)
                host.close()


# -- no mask host, and ourselves ---------------------------------------------------------------------------------------------------

def test_an_unreachable_site_is_silence(rig: Rig) -> None:
    proxy = rig.proxy({"general": {"modes": {"classic": False, "secure": False}}, "timeouts": {"client_handshake": 2},
                       "censorship": {"mask": True, "mask_host": "127.0.0.1", "mask_port": free_port()}})
    assert say(proxy.port, REQUEST)[:2] == (b"", "fin")
    proxy.wait_log("DEBUG .*Failed to connect to mask host")
    assert not proxy.log("Handshake timeout")
    rig.client().req_pq()


@pytest.mark.parametrize("listen", ["127.0.0.1", "0.0.0.0"])
def test_a_mask_host_that_is_this_proxy_is_refused(rig: Rig, listen: str) -> None:
    port = free_port()
    proxy = rig.proxy({"server": {"listeners": [{"ip": listen}]}, "timeouts": {"client_handshake": 1},
                       "censorship": {"mask": True, "mask_host": "127.0.0.1", "mask_port": port}}, port=port)
    for _ in range(2):
        assert say(proxy.port, REQUEST)[:2] == (b"", "fin")
    assert len(proxy.log("ERROR .*Mask target is this proxy")) == 1
    rig.client().req_pq()


def test_a_loop_through_somebody_else_is_cut(rig: Rig) -> None:
    """A forwarder that leads back to us: the second time round the connection is recognised, not masked again and again."""
    back = socket.create_server(("127.0.0.1", 0))
    proxy = rig.proxy({"general": {"modes": {"classic": False, "secure": False}}, "timeouts": {"client_handshake": 2},
                       "censorship": {"mask": True, "mask_host": "127.0.0.1", "mask_port": back.getsockname()[1], "mask_proxy_protocol": 1},
                       "server": {"listeners": [{"ip": "127.0.0.1", "proxy_protocol": True}]}})
    passed = []

    def forward() -> None:                     # as HAProxy with send-proxy would
        with contextlib.suppress(OSError):
            while True:
                near, address = back.accept()
                passed.append(address)
                far = socket.create_connection(("127.0.0.1", proxy.port))
                far.sendall(f"PROXY TCP4 {address[0]} 127.0.0.1 {address[1]} 443\r\n".encode() + near.recv(1000))
                far.close()
                near.close()

    with helper(forward):
        with contextlib.suppress(*HANGUP):
            say(proxy.port, b"PROXY UNKNOWN\r\n", REQUEST)
        poll(lambda: passed, "the way round")
        time.sleep(0.5)                         # a loop would go on
        assert len(passed) == 1
        back.shutdown(socket.SHUT_RDWR)
        back.close()
