"""Kills the store of telemt_api while it changes a configuration, again and again; exits with 1 if it ever left a mess.

usage: crash.py DIRECTORY [--kills 300] [--seed N]

A child process makes the changes of a fixed plan, each fsynced and renamed as in the running program, and tells how far it
got; SIGKILL hits it at a random moment.  The file must then be what the plan says before or after the change under way, and
the next start must leave no temp file.  One line of JSON at the end tells how often a kill met a write.
"""
from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import telemt
import telemt_api

SECRETS = ["a" * 32, "b" * 32, "c" * 32]
START = f'# kept\r\n[access.users] # kept\r\nfirst = "{SECRETS[0]}"\r\n\r\n[server]\r\nport = 1\r\n'


class Port(telemt.Control):
    """The seam, with nothing behind it."""

    def __init__(self, path: Path) -> None:
        self.config_path, self.log, self.config_error = str(path), telemt.Log("api"), telemt.ConfigError

    @property
    def settings(self) -> telemt.Settings:
        return telemt.Settings()

    def publish(self, loaded: telemt.Loaded, files: Mapping[str, bytes], timeout_s: float = 10.0) -> None:
        """Nobody listens."""


def plan(number: int) -> telemt_api.Command:
    """The change with this number; three in a row make, change and delete a user."""
    name = f"u{number // 4}"
    return [telemt_api.Command("create", name, SECRETS[number // 4 % 3], {"user_max_tcp_conns": number}),
            telemt_api.Command("patch", name, None, {"user_data_quota": number, "user_max_tcp_conns": None}),
            telemt_api.Command("rotate_secret", name, SECRETS[(number // 4 + 1) % 3]),
            telemt_api.Command("delete", name)][number % 4]


def expected(number: int) -> dict[str, dict[str, object]]:
    """Non-empty tables of [access] after the changes before `number`."""
    users: dict[str, object] = {"first": SECRETS[0]}
    tables: dict[str, dict[str, object]] = {"users": users}
    done, name = number % 4, f"u{number // 4}"
    if done:
        users[name] = SECRETS[(number // 4 + (done == 3)) % 3]
    if done == 1:
        tables["user_max_tcp_conns"] = {name: number - 1}
    elif done > 1:
        tables["user_data_quota"] = {name: number - done + 1}
    return tables


def found(path: Path) -> dict[str, dict[str, object]]:
    """The same as the file has it, read as the program would."""
    loaded = telemt.load_config(str(path))
    document = telemt.parse_document(path.read_bytes().decode())
    assert path.read_bytes().startswith(START[:36].encode()), "comments are gone"
    assert loaded.settings.server.port == 1
    return {name: table for name, table in document["access"].items() if table}


def work(path: Path, number: int, told: int) -> None:
    """The child: change after change from `number` on, until it is killed."""
    store = telemt_api.Store(Port(path))
    os.write(told, b"\0\0\0\0")
    while True:
        store.apply(plan(number), None)
        number += 1
        os.write(told, number.to_bytes(4, "big"))


def crash(path: Path, number: int, rng: random.Random) -> tuple[int, bool]:
    """One child and its end; return (number of the next change, a temp file was left)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            work(path, number, writer)
        finally:
            os._exit(1)
    os.close(writer)
    os.read(reader, 4)                         # it has begun
    time.sleep(rng.uniform(0, 0.025))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert status == signal.SIGKILL, f"the child ended by itself: {status}"
    told = b"".join(iter(lambda: os.read(reader, 4096), b""))
    os.close(reader)
    done = int.from_bytes(told[-4:], "big") if told else number
    state = found(path)
    assert state in (expected(done), expected(done + 1)), f"change {done}: {state}"
    left = any(".tmp-" in name for name in os.listdir(path.parent))
    telemt_api.Store(Port(path))               # the next start
    assert not [name for name in os.listdir(path.parent) if ".tmp-" in name], "temp files are left over"
    return done + (state == expected(done + 1)), left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    rng = random.Random(options.seed)
    path = options.directory / "config.toml"
    path.write_bytes(START.encode())
    number = hits = 0
    for kill in range(options.kills):
        try:
            number, left = crash(path, number, rng)
        except (AssertionError, telemt.TelemtError) as error:
            print(f"kill {kill}, seed {options.seed}: {error}\n{path.read_bytes()!r}")
            return 1
        hits += left
    print(json.dumps({"kills": options.kills, "changes": number, "in_a_write": hits, "seed": options.seed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
