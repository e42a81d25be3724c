"""`make install` and `make deploy` for real: the program from an installed tree, and over an sshd with throw-away keys."""
from __future__ import annotations

import contextlib
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import tomli_w

from doubles import ROOT, USERS, ApiScript, Rig, base_config, clean_env, free_port, poll
from programs import needs, start_sshd

SSHD = """Subsystem sftp internal-sftp
SetEnv PATH={folder}/bin:/usr/local/bin:/usr/bin:/bin
"""
# What systemd does, as far as this tool sees it: ExecStart of the unit, in the background, after the end of the one before.
SYSTEMCTL = """#!/bin/sh
case "$1" in
restart)
	if [ -f {folder}/pid ]; then kill "$(cat {folder}/pid)"; while kill -0 "$(cat {folder}/pid)" 2>/dev/null; do sleep 0.05; done; fi
	NOTIFY_SOCKET={folder}/notify $(sed -n 's/^ExecStart=//p' {folder}/units/telemt.service) </dev/null >> {folder}/log 2>&1 &
	echo $! > {folder}/pid ;;
show) case "$3" in Type) sed -n 's/^Type=//p' {folder}/units/telemt.service ;; MainPID) cat {folder}/pid ;; esac ;;
is-enabled) exit 1 ;;
esac
"""


class Host:
    """A server behind sshd, with a proxy that may run on it."""

    def __init__(self, rig: Rig) -> None:
        needs("ssh", "sshd", "scp", "ssh-keygen")
        self.rig, self.folder, self.port, self.api = rig, rig.folder / "host", free_port(), free_port()
        for name in ("bin", "etc/telemt"):
            (self.folder / name).mkdir(parents=True)
        config = base_config(self.port, rig.dc.address)
        config["server"]["api"] = {"enabled": True, "listen": f"127.0.0.1:{self.api}"}
        self.config = self.folder / "etc/telemt/config.toml"
        self.config.write_text(tomli_w.dumps(config))
        (self.folder / "bin" / "systemctl").write_text(SYSTEMCTL.format(folder=self.folder))
        (self.folder / "bin" / "systemctl").chmod(0o755)
        self.notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notified.bind(str(self.folder / "notify"))
        threading.Thread(target=self._listen, daemon=True).start()
        self.sshd, ssh_port, words = start_sshd(self.folder, SSHD.format(folder=self.folder))
        options = " ".join([*words, "-o", "LogLevel=ERROR"])
        self.settings = [f"HOST={pwd.getpwuid(os.getuid()).pw_name}@127.0.0.1", f"SSH=ssh -p {ssh_port} {options}",
                         f"SCP=scp -P {ssh_port} {options}", f"PREFIX={self.folder}/prefix", f"UNITDIR={self.folder}/units",
                         f"CONFIG={self.config}", f"PYTHON={sys.executable}", "WAIT=20"]

    def _listen(self) -> None:
        """As systemd does: a new MAINPID is the service from now on."""
        with contextlib.suppress(OSError):
            while message := self.notified.recv(4096):
                if found := re.search(rb"MAINPID=(\d+)", message):
                    (self.folder / "pid").write_bytes(found[1])

    def make(self, word: str, *more: str, code: int = 0) -> str:
        run = subprocess.run(["make", "-s", word, *self.settings, *more], cwd=ROOT, env=clean_env(), check=False, capture_output=True,
                             text=True, timeout=120)
        assert (run.returncode == 0) is (code == 0), run.stdout + run.stderr + self.log()
        return run.stdout + run.stderr

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    def pid(self) -> int:
        return int((self.folder / "pid").read_text())

    def session(self) -> None:
        self.rig.client(port=self.port).req_pq()

    def close(self) -> None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(self.pid(), signal.SIGTERM)
            end = time.monotonic() + 5
            while time.monotonic() < end:
                os.kill(self.pid(), 0)
                time.sleep(0.02)
            os.kill(self.pid(), signal.SIGKILL)
        self.sshd.close()
        self.notified.shutdown(socket.SHUT_RDWR)
        self.notified.close()


@pytest.fixture
def host(rig: Rig) -> Iterator[Host]:
    host = Host(rig)
    try:
        yield host
        rig.close_clients()
    finally:
        host.close()


def test_a_version_that_serves_and_one_that_does_not(host: Host) -> None:
    """First deployment; one by exchange, in which a session goes on; a program that passes `check` and dies at its start; a
    configuration that does not load; back.
    """
    assert "healthy" in host.make("deploy")
    host.session()
    assert ApiScript(host.api).data("/v1/health")["status"] == "ok"
    first = host.pid()
    client = host.rig.client(port=host.port)
    later = host.folder / "later" / "telemt.py"
    later.parent.mkdir()
    later.write_text((ROOT / "telemt.py").read_text(encoding="utf-8").replace('VERSION: Final = "', 'VERSION: Final = "8.'))
    assert "deploy: now version 8." in host.make("deploy", f"FILES={later} telemt_api.py", "EXCHANGE=1")
    client.req_pq()
    assert host.pid() != first, "somebody was disconnected, or nothing was exchanged"
    first = host.pid()
    client.close()
    text = (ROOT / "telemt.py").read_text(encoding="utf-8").replace('VERSION: Final = "', 'VERSION: Final = "9.')
    broken = host.folder / "telemt.py"
    text, count = re.subn(r"^    loop\.run\(\)\n    server\.", "    sys.exit(3)\n    server.", text, flags=re.M)
    assert count == 1
    broken.write_text(text, encoding="utf-8")
    said = host.make("deploy", f"FILES={broken} telemt_api.py", "WAIT=1", code=1)
    assert "no health within 1 s" in said and "going back to version" in said and ": healthy, " in said.partition("going back")[2], said
    assert host.pid() != first
    host.session()
    second, good = host.pid(), host.config.read_text()
    host.config.write_text(good + "\n[general.modes]\n")
    assert "nothing was changed" in host.make("deploy", code=1)
    host.config.write_text(good)
    assert host.pid() == second
    host.session()
    assert "rollback: now version 0" in host.make("rollback")
    host.session()


def test_the_installed_command_serves(rig: Rig) -> None:
    """`make install DESTDIR=`: from there, by its command, with the configuration that it brought."""
    tree = rig.folder / "tree"
    subprocess.run(["make", "-s", "install", f"DESTDIR={tree}", f"PYTHON={sys.executable}"], cwd=ROOT, check=True, capture_output=True,
                   env=clean_env(), timeout=60)
    command, api = str(tree / "usr/local/bin/telemt"), free_port()
    run = subprocess.run([command, "check", "--offline", "--json", str(tree / "etc/telemt/config.toml")], env=clean_env(), check=False,
                         capture_output=True, text=True, timeout=60)
    assert '"loads": true' in run.stdout and "all-zero" not in run.stdout, run.stdout + run.stderr
    rig.proxy({"server": {"api": {"enabled": True, "listen": f"127.0.0.1:{api}"}}}, command=[command])
    rig.client().req_pq()
    assert ApiScript(api).data("/v1/health")["status"] == "ok"
    poll(lambda: len(USERS) == len(ApiScript(api).data("/v1/users")), "the users")
