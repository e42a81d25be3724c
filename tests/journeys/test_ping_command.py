"""`telemt.py ping`: through our own program in every mode, and what it says of everything that is no proxy."""
from __future__ import annotations

import base64
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from doubles import PROGRAM, USERS, BlackHole, Rig, helper, patient, run_program
from programs import Nginx, needs

DOMAIN = "www.example.com"
LATE = """import runpy, sys, time
real, sys.argv = time.time, sys.argv[1:]
time.time = lambda: real() - 7200
runpy.run_path(sys.argv[0], run_name="__main__")"""
SECRETS = {"classic": "{}", "dd": "dd{}", "ee": "ee{}" + DOMAIN.encode().hex()}


def link(port: int, mode: str = "ee", user: str = "alice", secret: str = "") -> str:
    return f"tg://proxy?server=127.0.0.1&port={port}&secret={secret or SECRETS[mode].format(USERS[user])}"


@contextmanager
def server(answer: bytes, wait: bool = True) -> Iterator[int]:
    """Something that listens and answers the first bytes of everybody with `answer`; nothing = closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    peer.settimeout(patient(5))
                    if wait:
                        peer.recv(4096)
                    if answer:
                        peer.sendall(answer)
                        time.sleep(0.2)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(6)


@pytest.mark.parametrize("mode", ["classic", "dd", "ee"])
def test_every_mode_reaches_every_data_centre(rig: Rig, mode: str) -> None:
    proxy = rig.proxy()
    done = run_program("ping", link(proxy.port, mode), cwd=rig.folder, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"127.0.0.1:{proxy.port} {mode}" + (f" {DOMAIN}" if mode == "ee" else "")
    assert [re.sub(r"\d+ ms", "T", line).split() for line in lines[2:]] == [
        [str(dc), "T", "T" if mode == "ee" else "-", "T", "T"] for dc in range(1, 6)]
    assert sorted(peer.dc for peer in rig.dc.peers) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("form", ["base64", "base64url", "https", "escaped"])
def test_every_form_of_a_link(rig: Rig, form: str) -> None:
    proxy = rig.proxy()
    raw = bytes.fromhex(SECRETS["ee"].format(USERS["alice"]))
    coded = {"base64": base64.b64encode(raw), "base64url": base64.urlsafe_b64encode(raw).rstrip(b"=")}
    text = link(proxy.port, secret=coded[form].decode() if form in coded else raw.hex())
    if form == "https":
        text = text.replace("tg://", "https://t.me/")
    if form == "escaped":
        text = text.replace("ee", "%65e", 1)
    done = run_program("ping", text, "--dc", "-4", "--count", "2", "--json", cwd=rig.folder, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)[0]
    assert {key: report[key] for key in report if key != "attempts"} == {
        "server": "127.0.0.1", "port": proxy.port, "mode": "ee", "domain": DOMAIN, "ok": True}
    assert [(row["dc"], row["ok"], row["reason"]) for row in report["attempts"]] == [(-4, True, None)] * 2
    assert all(row[key] >= 0 for row in report["attempts"] for key in ("connect_ms", "handshake_ms", "answer_ms"))
    assert USERS["alice"] not in done.stdout


def test_wrong_secret(rig: Rig) -> None:
    proxy = rig.proxy()
    done = run_program("ping", link(proxy.port, secret=SECRETS["ee"].format("ab" * 16)), cwd=rig.folder, timeout=60)
    assert done.returncode == 1
    assert "at handshake" in done.stdout and "secret" in done.stdout


def test_clocks_apart_are_told_from_a_wrong_secret(rig: Rig) -> None:
    """The hello is taken with a clock since boot and not with today's: then it is the clock."""
    proxy = rig.proxy(command=[sys.executable, "-B", "-c", LATE, str(PROGRAM)])
    done = run_program("ping", link(proxy.port), cwd=rig.folder, timeout=60)
    assert done.returncode == 1
    assert "the secret is right, but the clocks differ" in done.stdout


def test_a_stranger_in_the_place_of_a_data_centre_is_no_wrong_secret(rig: Rig) -> None:
    """Found from outside: a network that answers every connection itself was explained as a wrong secret."""
    dc = rig.main_dc(manual=True)
    proxy = rig.proxy()

    def answer() -> None:
        dc.take(20.0).sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with helper(answer):
        done = run_program("ping", link(proxy.port, "ee"), "--dc", "2", cwd=rig.folder, timeout=60)
    assert done.returncode == 1 and "what answers is not data centre 2" in done.stdout, done.stdout


@pytest.mark.parametrize(("answer", "mode", "text"), [
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "ee", "answered by a web server"),
    (b"\x15\x03\x01\0\2\2\x28", "ee", "answered by a web server"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "dd", "answered by a web server"),
    (b"SSH-2.0-OpenSSH_9\r\n", "ee", "SSH server"),
    (b"", "ee", "closed by the other side"),
    (b"", "dd", "closed by the other side"),
    (bytes(range(256)), "dd", "makes no sense"),
])
def test_what_answers_is_named(rig: Rig, answer: bytes, mode: str, text: str) -> None:
    with server(answer) as port:
        done = run_program("ping", link(port, mode), "--dc", "2", cwd=rig.folder, timeout=60)
    assert done.returncode == 1 and text in done.stdout, done.stdout


@pytest.mark.parametrize("mode", ["ee", "dd", "classic"])
def test_a_real_nginx_is_called_a_web_server(rig: Rig, mode: str) -> None:
    """Its https port and its plain one: it is not the proxy whose link somebody typed."""
    needs("nginx", "openssl")
    with closing(Nginx(rig.folder / "site")) as nginx:
        for port in (nginx.port, nginx.plain):
            done = run_program("ping", link(port, mode), "--dc", "2", cwd=rig.folder, timeout=60)
            # what a TLS port makes of the random bytes of dd and classic is chance: error 400, or it closes without a word
            text = "answered by a web server" if mode == "ee" or port == nginx.plain else "web server"
            assert done.returncode == 1 and text in done.stdout, (port == nginx.plain, done.stdout)


def test_closed_port_and_black_hole(rig: Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = run_program("ping", link(port), cwd=rig.folder, timeout=60)
    assert done.returncode == 1 and "at connect: port closed" in done.stdout
    hole = BlackHole()
    try:
        done = run_program("ping", link(int(hole.address.rpartition(":")[2])), cwd=rig.folder, timeout=60)
        assert done.returncode == 1 and "at connect: no answer" in done.stdout
    finally:
        hole.close()


def test_handshake_fine_but_no_data_centre(rig: Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = f"127.0.0.1:{listener.getsockname()[1]}"
    proxy = rig.proxy({"dc_overrides": {"2": closed}, "timeouts": {"tg_connect": 2}})
    done = run_program("ping", link(proxy.port), "--dc", "2", cwd=rig.folder, timeout=60)
    assert done.returncode == 1
    assert "the handshake was fine, so the proxy does not reach data centre 2" in done.stdout


@pytest.mark.parametrize(("words", "text"), [
    (["ping"], "LINK"),
    (["ping", "http://example.com/"], "not a proxy link"),
    (["ping", "tg://proxy?server=a&port=1"], "no secret="),
    (["ping", "tg://proxy?server=a&port=99999&secret=" + "a" * 32], "port=99999"),
    (["ping", "tg://proxy?server=a&port=1&secret=abc"], "secret= in the link"),
    (["ping", "tg://proxy?server=a&port=1&secret=" + "a" * 32, "--dc", "0"], "--dc"),
    (["ping", "tg://proxy?server=a&port=1&secret=" + "a" * 32, "--nonsense"], "--nonsense"),
])
def test_usage_errors(rig: Rig, words: list[str], text: str) -> None:
    done = run_program(*words, cwd=rig.folder)
    assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr
