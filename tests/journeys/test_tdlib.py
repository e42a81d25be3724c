"""TDLib, the library of the official apps, tests the proxy itself.

`pingProxy` is its own measure of a proxy: through it to a data centre, there req_pq, and back.  `testProxy` goes on with a key exchange
under Telegram's RSA key, which no double has: the second request arrives, and its refusal (-404) comes back.  Both are asked in each mode,
FakeTLS with either key-share group.
"""
from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from typing import Any

import pytest

import sites
from doubles import MLKEM, ROOT, USERS, X25519, Rig, clean_env
from tests.test_faketls import dissect, is_grease, probe

pytest.importorskip("tdjson", reason="no wheel of tdjson for this Python")

# Runs in a process of its own: TDLib keeps threads, and ends the process where it finds a fault.
DRIVER = """
import json, sys, tdjson
tdjson.td_execute(json.dumps({"@type": "setLogVerbosityLevel", "new_verbosity_level": 0}).encode())
client = tdjson.td_create_client_id()
for line in sys.stdin:
    tdjson.td_send(client, json.dumps({**json.loads(line), "@extra": "ours"}).encode())
    while True:
        answer = json.loads(tdjson.td_receive(30.0) or b'{"@extra": "ours", "@type": "nothing"}')
        if answer.get("@extra") == "ours":
            print(json.dumps(answer), flush=True)
            break
"""
SECRETS = {"classic": USERS["alice"], "secure": "dd" + USERS["alice"], "tls": "ee" + USERS["alice"] + b"example.com".hex()}


def ask(rig: Rig, *questions: dict[str, Any]) -> list[dict[str, Any]]:
    """TDLib's answers."""
    first = {"@type": "setTdlibParameters", "database_directory": str(rig.folder / "td"), "files_directory": str(rig.folder / "td"),
             "api_id": 1, "api_hash": "0" * 32, "system_language_code": "en", "device_model": "x", "application_version": "1"}
    run = subprocess.run([sys.executable, "-c", DRIVER], input="".join(json.dumps(one) + "\n" for one in (first, *questions)), check=False,
                         capture_output=True, text=True, timeout=120, env=clean_env(), cwd=ROOT)
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(answers) == len(questions) + 1 and answers[0]["@type"] == "ok", (run.returncode, run.stdout, run.stderr)
    return answers[1:]


def questions_about(port: int, mode: str) -> tuple[dict[str, Any], dict[str, Any]]:
    proxy = {"@type": "proxy", "server": "127.0.0.1", "port": port, "type": {"@type": "proxyTypeMtproto", "secret": SECRETS[mode]}}
    return {"@type": "pingProxy", "proxy": proxy}, {"@type": "testProxy", "proxy": proxy, "dc_id": 2, "timeout": 20.0}


@pytest.mark.parametrize("group", [X25519, MLKEM])
def test_tdlib_passes_in_all_three_modes(rig: Rig, group: int) -> None:
    sites.write_profile(rig.folder / "front", group=group, flights=(3000, 3001, 3002))
    proxy = rig.proxy({"censorship": {"tls_emulation": True, "tls_front_dir": str(rig.folder / "front")}})
    answers = ask(rig, *[question for mode in SECRETS for question in questions_about(proxy.port, mode)])
    assert [answer["@type"] for answer in answers[::2]] == ["seconds"] * 3, answers
    assert [(answer["code"], answer["message"]) for answer in answers[1::2]] == [(400, "MTProto error: -404")] * 3
    for proto, tls in (("intermediate", "false"), ("secure", "false"), ("secure", "true")):
        assert len(proxy.log(f"MTProto handshake successful .*user=alice dc=.* proto={proto} tls={tls}")) == 2
    assert not proxy.log("fetch failed|Refused")


def test_the_probe_looks_like_tdlib(rig: Rig) -> None:
    """The hello of the TDLib that is installed, received by a listener, beside the one that we ask mask hosts with."""
    found: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def receive() -> None:
        sock, _ = listener.accept()
        with sock:
            sock.settimeout(10)
            data = sock.recv(5)
            while len(data) < 5 + int.from_bytes(data[3:5], "big"):
                data += sock.recv(65_536)
            found.append(data)

    thread = threading.Thread(target=receive, daemon=True)
    thread.start()
    with listener:
        answer = ask(rig, questions_about(listener.getsockname()[1], "tls")[0])
    thread.join(10)
    assert answer[0]["@type"] == "error" and len(found) == 1
    suites, extensions, session = dissect(found[0])
    ours_suites, ours, ours_session = dissect(probe("example.com"))
    assert (suites[2:], len(session)) == (ours_suites[2:], len(ours_session))

    def plain(listed: list[tuple[int, bytes]]) -> dict[int, bytes]:
        return {kind: body for kind, body in listed if not is_grease(kind)}

    theirs, mine = plain(extensions), plain(ours)
    assert set(theirs) == set(mine)
    # Newer TDLib puts ML-DSA (09 04, 09 05, 09 06) before the signature algorithms of tls-front.md 9.2; no host has such certificates.
    assert theirs[13][2:].removeprefix(bytes.fromhex("090409050906")) == mine[13][2:]
    for kind in sorted(set(mine) - {13, 10, 43, 51, 0xFE0D}):
        assert theirs[kind] == mine[kind], hex(kind)
    assert theirs[10][4:] == mine[10][4:] and theirs[43][3:] == mine[43][3:] and len(theirs[51]) == len(mine[51])
    assert theirs[51][7:11] == mine[51][7:11] == b"\x11\xec\x04\xc0" and theirs[0xFE0D][:5] == mine[0xFE0D][:5]
