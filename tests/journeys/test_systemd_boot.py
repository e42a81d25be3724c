"""The units under a real systemd: process 1 of a machine made of namespaces and an overlay of this one's files.

Nothing outside changes: mounts, processes, network and control groups are its own and go with it.
"""
from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from doubles import ROOT, poll
from programs import needs

SYSTEMD = Path("/lib/systemd/systemd")

# Keeps the machine until its standard input ends.  Exit 77: this kernel or user may not.
HOUSE = """
fail() { echo "$1" >&2; exit 77; }
mount --make-rprivate / 2>/dev/null || fail "no mount namespaces"
mkdir -p "$1/groups" && mount -t cgroup2 cgroup2 "$1/groups" 2>/dev/null || fail "no control groups"
group="$1/groups/$(basename "$1")-$$"
mkdir "$group" && echo $$ > "$group/cgroup.procs" || fail "no control group of our own"
unshare --pid --fork --kill-child --mount --uts --ipc --net --cgroup sh "$1/machine" "$1" < /dev/null & machine=$!
cat > /dev/null
kill -9 $machine 2>/dev/null
wait $machine 2>/dev/null
echo $$ > "$1/groups/cgroup.procs"
for again in 1 2 3 4 5 6 7 8 9 10; do
  find "$group" -depth -type d -exec rmdir {} + 2>/dev/null
  [ -d "$group" ] || exit 0
  sleep 0.2
done
exit 1
"""
MACHINE = """
set -e
mkdir "$1/disk" && mount -t tmpfs tmpfs "$1/disk"
mkdir "$1/disk/upper" "$1/disk/work" "$1/disk/root"
root=$1/disk/root
layers="lowerdir=/,upperdir=$1/disk/upper,workdir=$1/disk/work"
mount -t overlay overlay -o "$layers" "$root" || { echo overlay > "$1/out/refused"; exit 77; }
mount -t proc proc "$root/proc"; mount -t sysfs sysfs "$root/sys"; mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount --rbind /dev "$root/dev"; touch "$1/out/console"; mount --bind "$1/out/console" "$root/dev/console"
mount -t tmpfs tmpfs "$root/run"; mount -t tmpfs tmpfs "$root/tmp"
ip link set lo up
rm -rf "$root/etc/telemt" "$root/var/lib/telemt" "$root/var/lib/private"
mkdir -p "$root/usr/local/lib/telemt" "$root/etc/systemd/system" "$root/var/log" "$root/out"
mount --bind "$1/out" "$root/out"
cp "$1"/program/* "$root/usr/local/lib/telemt/"
cp -r "$1/units/." "$root/etc/systemd/system/"
cp -r "$1/config" "$root/etc/telemt"; chmod 0700 "$root/etc/telemt"; chmod 0600 "$root"/etc/telemt/*
cp "$1/probe.py" "$root/out/probe.py"
exec chroot "$root" env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb \\
  /lib/systemd/systemd --system --unit=probe.service --log-target=console --log-level=notice --show-status=no
"""
# No other unit of this machine is wanted, and the log goes to a file instead of a journal.
ALONE = "[Unit]\nDefaultDependencies=no\nWants=\nAfter=\n[Service]\nStandardOutput=append:/out/log\nStandardError=append:/out/log\n"
PROBE_UNIT = ("[Unit]\nDefaultDependencies=no\n[Service]\nType=oneshot\nTimeoutStartSec=60\nExecStart=/usr/bin/python3 /out/probe.py\n"
              "StandardOutput=file:/out/probe.log\nStandardError=file:/out/probe.log\n")
PROBE = '''
import json, os, subprocess, time, urllib.request
found = {}
def systemctl(*words):
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, timeout=20)
    return done.stdout.strip() or done.stderr.strip() or f"exit {done.returncode}"
def fact(name, unit="telemt.service"):
    return systemctl("show", "--value", "-p", name, unit)
def wait(what, *args):
    for _ in range(400):
        if what(*args): return True
        time.sleep(0.02)
    return False
def said(text): return text in open("/out/log").read()
def ask(method, path, body=None):
    request = urllib.request.Request("http://127.0.0.1:9091" + path, json.dumps(body).encode() if body else None, method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer: return json.load(answer)
    except OSError as error: return {"ok": False, "error": repr(error)}
def status(pid, key):
    return next(line.split()[1] for line in open(f"/proc/{pid}/status") if line.startswith(key + ":"))
try:
    found["start"] = systemctl("start", "telemt.service")
    found["active"], pid = systemctl("is-active", "telemt.service"), fact("MainPID")
    found["uid"], found["caps"], found["seccomp"] = int(status(pid, "Uid")), status(pid, "CapEff"), status(pid, "Seccomp")
    found["listens"] = said("Listening on 0.0.0.0:443")
    found["api"] = wait(lambda: ask("GET", "/v1/health")["ok"])
    before = os.stat("/etc/telemt/config.toml")
    found["created"] = ask("POST", "/v1/users", {"username": "carol"})["ok"]
    after = os.stat("/etc/telemt/config.toml")
    found["renamed"] = before.st_ino != after.st_ino and after.st_uid == found["uid"]
    found["written"] = "carol" in open("/etc/telemt/config.toml").read()
    found["state"] = os.stat("/var/lib/telemt/.").st_uid == found["uid"] and os.readlink(f"/proc/{pid}/cwd").endswith("/telemt")
    found["reload"] = systemctl("reload", "telemt.service")
    found["reloaded"] = wait(said, "SIGHUP received")
    found["exchange"] = systemctl("kill", "--kill-whom=main", "-s", "USR2", "telemt.service")
    found["exchanged"] = wait(lambda: fact("MainPID") not in ("0", pid)) and wait(said, "Took over from the program before")
    found["still"] = systemctl("is-active", "telemt.service"), wait(lambda: ask("GET", "/v1/users/carol")["ok"])
    systemctl("stop", "telemt.service")
    found["result"] = fact("Result")                       # not "timeout", not "signal"
    found["template"] = systemctl("start", "telemt@1.service", "telemt@2.service")
    found["both"] = [systemctl("is-active", f"telemt@{n}.service") for n in (1, 2)]
    found["doors"] = open("/out/log").read().count("Listening on 0.0.0.0:444")
    found["states"] = [os.path.isdir(f"/var/lib/telemt-{n}/.") for n in (1, 2)]
except Exception as error:
    found["error"] = repr(error)
with open("/out/draft", "w") as file: json.dump(found, file)
os.rename("/out/draft", "/out/found")
'''
CONFIG = """
[general]
use_middle_proxy = false
middle_proxy_nat_probe = false
[general.links]
show = []
public_host = "127.0.0.1"
[network]
stun_use = false
http_ip_detect_urls = []
[server]
port = {port}
[[server.listeners]]
ip = "0.0.0.0"
reuse_allow = {shared}
[server.api]
enabled = {api}
[censorship]
tls_emulation = false
mask = false
[access.users]
alice = "000102030405060708090a0b0c0d0e0f"
[[upstreams]]
type = "direct"
bind_addresses = ["127.0.0.1"]
"""


def build(folder: Path) -> None:
    """What the machine needs, in a folder that its scripts know."""
    for name in ("out", "program", "units", "config"):
        (folder / name).mkdir()
    for name in ("telemt.py", "telemt_api.py"):
        (folder / "program" / name).write_bytes((ROOT / name).read_bytes())
    for name in ("telemt.service", "telemt@.service"):
        (folder / "units" / name).write_text((ROOT / "deploy/systemd" / name).read_text(encoding="utf-8"))
        (folder / "units" / f"{name}.d").mkdir()
        (folder / "units" / f"{name}.d" / "alone.conf").write_text(ALONE)
    (folder / "units" / "probe.service").write_text(PROBE_UNIT)
    (folder / "config" / "config.toml").write_text(CONFIG.format(port=443, shared="false", api="true"))
    for n in (1, 2):
        (folder / "config" / f"{n}.toml").write_text(CONFIG.format(port=444, shared="true", api="false"))
    for name, text in (("house", HOUSE), ("machine", MACHINE), ("probe.py", PROBE)):
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was seen inside."""
    needs("unshare", "ip", "systemctl")
    version = subprocess.run(["/usr/bin/python3", "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, text=True,
                             check=False).stdout if os.path.exists("/usr/bin/python3") else ""
    if os.getuid() or not SYSTEMD.exists() or version != "True\n":
        pytest.skip("needs root, systemd, and a system Python of 3.11 or newer")
    folder = tmp_path_factory.mktemp("machine")
    build(folder)
    house = subprocess.Popen(["unshare", "--mount", "sh", str(folder / "house"), str(folder)], stdin=subprocess.PIPE,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert house.stdin and house.stderr
    answer, end = folder / "out" / "found", time.monotonic() + 90
    try:
        while not answer.exists() and house.poll() is None and time.monotonic() < end:
            if (folder / "out" / "refused").exists():
                pytest.skip("no overlay file system here")
            time.sleep(0.05)
    finally:
        house.stdin.close()
        code, said = house.wait(30), house.stderr.read()
        house.stderr.close()
    if code == 77:
        pytest.skip(said.strip())
    inside = {path.name: path.read_text() for path in (folder / "out").iterdir()}
    assert code == 0 and answer.exists(), (code, said, inside)
    poll(lambda: not [row for row in Path("/proc/mounts").read_text().splitlines() if str(folder) in row], "nothing stays mounted")
    seen: dict[str, Any] = json.loads(answer.read_text())
    seen["log"] = inside["log"]
    assert "error" not in seen, seen
    return seen


def test_systemd_starts_it_without_privileges(found: dict[str, Any]) -> None:
    """Port 443, a user that systemd invented, one capability, a filter of system calls."""
    assert (found["start"], found["active"]) == ("exit 0", "active"), found["log"]
    assert found["uid"] >= 61184 and int(found["caps"], 16) == 1 << 10 and found["seccomp"] == "2"
    assert found["listens"], "READY=1 came before it listened"


def test_the_api_changes_the_configuration_by_rename(found: dict[str, Any]) -> None:
    assert found["api"] and found["created"] and found["renamed"] and found["written"] and found["state"], found


def test_reload_exchange_and_stop(found: dict[str, Any]) -> None:
    assert (found["reload"], found["reloaded"]) == ("exit 0", True), found["log"]
    assert found["exchanged"] and found["still"] == ["active", True], found["log"]
    assert "Traceback" not in found["log"], found["log"]


def test_a_program_that_came_by_an_exchange_stops_in_order(found: dict[str, Any]) -> None:
    """systemd 252 killed it at once, without the time to write anything: it was no child of process 1 when it became the main process."""
    assert found["result"] == "success", found
    assert found["log"].split("Took over from the program before")[1].count("Shutting down...") == 1, found["log"]


def test_two_instances_share_a_port(found: dict[str, Any]) -> None:
    assert (found["template"], found["both"], found["doors"], found["states"]) == ("exit 0", ["active"] * 2, 2, [True] * 2), found["log"]
