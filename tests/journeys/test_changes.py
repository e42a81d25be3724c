"""api.md 11-13: changes through the API, seen from the network: live before the reply, never half, never lost."""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from doubles import ROOT, USERS, ApiScript, Proxy, Rig, free_port
from test_reload import rename_over

EVE = "0123456789abcdef0123456789abcdef"


def start(rig: Rig, **api: object) -> tuple[Proxy, ApiScript]:
    """A proxy with its API, and somebody to use it; the file has comments that have to stay."""
    port = free_port()
    proxy = rig.proxy({"server": {"api": {"enabled": True, "listen": f"127.0.0.1:{port}", **api}}})
    rename_over(proxy.config, "# kept\n" + proxy.config.read_text().replace("[access.users]", "[access.users]  # kept as well"))
    proxy.wait_log("API endpoint")
    return proxy, ApiScript(port)


def users_of(proxy: Proxy) -> dict[str, str]:
    found: dict[str, str] = tomllib.loads(proxy.config.read_text())["access"]["users"]
    return found


def test_a_change_is_live_before_its_reply(rig: Rig) -> None:
    proxy, api = start(rig)
    before = proxy.config.read_text()
    api.change("POST", "/v1/users", {"username": "eve", "secret": EVE})
    session = rig.client(secret=bytes.fromhex(EVE))
    session.req_pq()
    assert [row["username"] for row in api.data("/v1/users")] == ["alice", "bob", "eve"]
    assert api.data("/v1/users/eve")["current_connections"] == 1
    api.change("POST", "/v1/users/eve/disable")
    session.expect_closed(1)
    assert proxy.log("closed 1 connections of user eve")
    api.change("POST", "/v1/users/eve/enable")
    session = rig.client(secret=bytes.fromhex(EVE))
    session.req_pq()
    api.change("POST", "/v1/users/eve/rotate-secret", {"secret": EVE[::-1]})
    session.expect_closed(1)
    rig.client(secret=bytes.fromhex(EVE[::-1])).req_pq()
    api.change("PATCH", "/v1/users/eve", {"max_tcp_conns": 1})
    rig.client(secret=bytes.fromhex(EVE[::-1])).expect_closed()
    api.change("DELETE", "/v1/users/eve")
    assert proxy.log("closed 1 connections of user eve")
    assert proxy.config.read_text() == before + "\n[access.user_enabled]\n\n[access.user_max_tcp_conns]\n"
    rig.client("alice").req_pq()


def test_the_watcher_does_not_read_what_the_api_wrote(rig: Rig) -> None:
    proxy, api = start(rig)

    def reloads_of_five_changes(turn: int) -> int:
        before = api.data("/v1/system/info")["config_reload_count"]
        for n in range(5):
            api.change("POST", "/v1/users", {"username": f"u{turn}-{n}"})
        threading.Event().wait(2.5)
        return int(api.data("/v1/system/info")["config_reload_count"]) - before

    # Once a second it may look between the file's change and its publication, and then it reads: not in three rounds in a row.
    assert 5 in map(reloads_of_five_changes, range(3))
    assert api.data("/v1/system/info")["config_hash"] == api.ask("GET", "/v1/health")[1]["revision"]


def test_sixteen_writers_over_http(rig: Rig) -> None:
    """Each reads the revision and writes with If-Match until it wins: one winner per revision, and nothing is lost."""
    proxy, api = start(rig)
    wins: list[str] = []
    faults: list[object] = []

    def write(number: int) -> None:
        for turn in range(2):
            for _ in range(400):
                revision = str(api.ask("GET", "/v1/health")[1]["revision"])
                status, found = api.ask("POST", "/v1/users", {"username": f"u{number}-{turn}"}, revision)
                if status == 201:
                    wins.append(revision)
                    break
                if (status, found["error"]["code"]) != (409, "revision_conflict"):
                    faults.append(found)
                    return

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not faults
    assert len(wins) == len(set(wins)) == 32
    assert users_of(proxy).keys() == {*USERS, *(f"u{number}-{turn}" for number in range(16) for turn in range(2))}
    assert proxy.config.read_text().startswith("# kept\n")


def test_an_editor_and_the_api_do_not_undo_each_other(rig: Rig) -> None:
    """The editor takes what is there and adds a line, as sed does; the API changes users meanwhile."""
    proxy, api = start(rig)
    stop = threading.Event()
    added: list[str] = []

    def edit() -> None:
        while not stop.is_set() and len(added) < 60:
            text, inode = proxy.config.read_text(), os.stat(proxy.config).st_ino
            new = proxy.config.with_name("edited")
            new.write_text(f"{text}# edit {len(added)}\n")
            if os.stat(proxy.config).st_ino == inode:       # as good as an editor can: it asks whether the file has changed
                new.replace(proxy.config)
                added.append(f"# edit {len(added)}\n")
            stop.wait(0.03)

    editor = threading.Thread(target=edit)
    editor.start()
    made = []
    for n in range(40):
        status, found = api.ask("POST", "/v1/users", {"username": f"u{n}"})
        assert status == 201 or found["error"]["code"] == "revision_conflict", found
        if status == 201:
            made.append(f"u{n}")
    stop.set()
    editor.join()
    api.change("POST", "/v1/users", {"username": "last"})
    text = proxy.config.read_text()
    lost = [line for line in added if line not in text] + [name for name in made if f"{name} =" not in text]
    # Between the editor's question and its rename a change of ours can slip in: that is the editor's race, not ours.
    assert len(lost) <= 3, lost
    assert [row["username"] for row in api.data("/v1/users")] == sorted(users_of(proxy))


def test_a_broken_file_refuses_changes_and_keeps_serving(rig: Rig) -> None:
    proxy, api = start(rig)
    text = proxy.config.read_text()
    rename_over(proxy.config, text + "broken\n")
    status, found = api.ask("POST", "/v1/users", {"username": "eve"})
    assert (status, found["error"]["code"]) == (500, "internal_error")
    assert found["error"]["message"].startswith("failed to load config: Config error: ")
    assert [row["username"] for row in api.data("/v1/users")] == ["alice", "bob"]
    rig.client().req_pq()
    rename_over(proxy.config, text)
    api.change("POST", "/v1/users", {"username": "eve"})


def test_a_directory_without_a_right_to_write_is_named(rig: Rig) -> None:
    proxy, api = start(rig)
    if os.geteuid() == 0:
        run = subprocess.run(["chattr", "+i", str(proxy.folder)], check=False, capture_output=True)
        if run.returncode:
            pytest.skip("root may write everywhere here, and chattr does not work")
    else:
        proxy.folder.chmod(0o555)
    try:
        status, found = api.ask("POST", "/v1/users", {"username": "eve"})
        assert status == 500 and str(proxy.folder) in found["error"]["message"], found
        assert found["error"]["message"].startswith("failed to write config: ")
        assert "eve" not in users_of(proxy)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["chattr", "-i", str(proxy.folder)], check=True)
        else:
            proxy.folder.chmod(0o755)
    api.change("POST", "/v1/users", {"username": "eve"})


def test_a_mounted_file_is_written_in_place(rig: Rig) -> None:
    """Docker's way: one file mounted into the container.  Needs the right to mount."""
    proxy, api = start(rig)
    outside = proxy.folder / "outside.toml"
    outside.write_text(proxy.config.read_text())
    run = subprocess.run(["mount", "--bind", str(outside), str(proxy.config)], check=False, capture_output=True, text=True)
    if run.returncode:
        pytest.skip(f"cannot mount: {run.stderr.strip()}")
    try:
        api.change("POST", "/v1/users", {"username": "eve", "secret": EVE})
        api.change("POST", "/v1/users", {"username": "adam"})
        assert outside.read_text() == proxy.config.read_text() and users_of(proxy).keys() >= {"eve", "adam"}
        assert len(proxy.log("WARN .*written in place")) == 1
        rig.client(secret=bytes.fromhex(EVE)).req_pq()
    finally:
        subprocess.run(["umount", str(proxy.config)], check=True)
    assert not [name for name in os.listdir(proxy.folder) if ".tmp-" in name]


def test_killed_while_it_writes(rig: Rig) -> None:
    """The whole program, a few times; tests/crash.py does the store alone some hundred times, `make kills` this many more."""
    kills = int(os.environ.get("TELEMT_KILLS", "3"))
    proxy, api = start(rig)
    for kill in range(kills):
        states = [users_of(proxy)]
        done = threading.Event()

        def change(kill: int = kill, states: list[dict[str, str]] = states, done: threading.Event = done) -> None:
            """Two users more, the older one gone, and so on; `states` ends with the one that is being written."""
            number = 0
            with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
                while not done.is_set():
                    number += 1
                    states.append({**states[-1], f"u{kill}-{number}": EVE})
                    api.change("POST", "/v1/users", {"username": f"u{kill}-{number}", "secret": EVE})
                    if number % 3 == 0:
                        states.append({name: secret for name, secret in states[-1].items() if name != f"u{kill}-{number - 1}"})
                        api.change("DELETE", f"/v1/users/u{kill}-{number - 1}")

        writer = threading.Thread(target=change)
        writer.start()
        threading.Event().wait(0.15 + int.from_bytes(os.urandom(2), "big") / 65536 / 5)
        proxy.process.kill()
        done.set()
        writer.join()
        proxy.wait_exit()
        found = users_of(proxy)
        assert found in states[-2:], "neither the state before nor the one after"
        text = proxy.config.read_text()
        proxy = Proxy(proxy.folder, text, port=proxy.port)
        rig.proxies.append(proxy)
        proxy.wait_log("API endpoint")
        assert not [name for name in os.listdir(proxy.folder) if ".tmp-" in name]
        assert {row["username"] for row in api.data("/v1/users")} == found.keys()


def test_three_hundred_kills_of_the_store(tmp_path: Path) -> None:
    """SIGKILL at random points of continuous changes: the file always parses, and is the state before or after a change."""
    kills = int(os.environ.get("TELEMT_STORE_KILLS", "300"))
    run = subprocess.run([sys.executable, str(ROOT / "tests" / "crash.py"), str(tmp_path), "--kills", str(kills)], check=False,
                         capture_output=True, text=True, timeout=60 + kills)
    assert run.returncode == 0, run.stdout + run.stderr
    said = json.loads(run.stdout)
    assert said["kills"] == kills and said["in_a_write"] > kills / 20, said
