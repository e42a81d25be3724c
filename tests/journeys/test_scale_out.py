"""Several processes on one port, several hosts behind a real HAProxy and nginx: one of them goes, and every new session succeeds."""
from __future__ import annotations

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

from doubles import HANGUP, ROOT, ApiScript, Proxy, Rig, base_config, free_port, merged, poll
from programs import Program, needs, path_of

SHARED = {"server": {"listeners": [{"ip": "127.0.0.1", "reuse_allow": True}]}}


def served(proxy: Proxy) -> int:
    """Clients whose handshake this process has completed."""
    return len(proxy.log("MTProto handshake successful"))


# -- several processes on one port

def test_sessions_spread_over_processes_and_survive_the_end_of_one(rig: Rig) -> None:
    """Three listen; one is stopped as systemd does, one is killed; the rest goes on, and who comes afterwards is served."""
    first = rig.proxy(SHARED)
    others = [rig.proxy(SHARED, port=first.port) for _ in range(2)]
    clients = [rig.client(port=first.port) for _ in range(48)]
    for client in clients:
        client.req_pq()
    poll(lambda: all(served(proxy) >= 4 for proxy in (first, *others)), "each serves some of 48")     # 16 on average
    poll(lambda: sum(map(served, (first, *others))) == 48, "all are logged")

    others[0].process.terminate()
    assert others[0].wait_exit(8) == 0
    before = served(first) + served(others[1])
    for _ in range(24):
        rig.client(port=first.port).echo()
    poll(lambda: served(first) + served(others[1]) == before + 24, "24 more with the two that are left")
    others[1].process.kill()
    others[1].wait_exit(8)
    for _ in range(12):
        rig.client(port=first.port).echo()

    alive = 0
    for client in clients:                        # sessions of the process that was left alone never noticed
        with contextlib.suppress(*HANGUP, EOFError):
            client.echo()
            alive += 1
    assert 4 <= alive < len(clients)


def test_processes_share_users_through_one_file(rig: Rig, tmp_path: Path) -> None:
    """A change through one API is in the shared file, and in force in the other process within seconds; each has its own quotas."""
    shared = tmp_path / "users.toml"
    shared.write_text('[access.users]\nalice = "000102030405060708090a0b0c0d0e0f"\nbob = "f0e1d2c3b4a5968778695a4b3c2d1e0f"\n'
                      "# limits, for all\n[access.user_data_quota]\nbob = 1048576\n")
    port, ports = free_port(), [free_port(), free_port()]
    instances = []
    for n, own in enumerate(ports):
        config = merged(base_config(port, rig.dc.address), {"access": None})
        config["server"] = {**config["server"], **SHARED["server"], "api": {"enabled": True, "listen": f"127.0.0.1:{own}"}}
        text = f'include = "{shared}"\n' + tomli_w.dumps(config)      # above all tables: what it opens is closed by the next one
        instances.append(Proxy(tmp_path / f"instance{n}", text, port=port))
        rig.proxies.append(instances[-1])
    for instance in instances:
        instance.wait_log("API endpoint")
    ApiScript(ports[0]).change("POST", "/v1/users", {"username": "carol", "secret": "cc" * 16})
    assert "carol" in shared.read_text() and "# limits, for all" in shared.read_text()
    instances[1].wait_log(r"users added: \[carol\]", timeout=20)
    names = {user["username"] for user in ApiScript(ports[1]).data("/v1/users")}
    assert names == {"alice", "bob", "carol"}
    while not all(instance.log("handshake successful .*user=carol") for instance in instances):
        rig.client(secret=b"\xcc" * 16, port=port).req_pq()
        assert len(rig.clients) < 200
    ApiScript(ports[1]).change("DELETE", "/v1/users/carol")
    instances[0].wait_log(r"users removed: \[carol\]", timeout=20)


# -- several hosts behind a balancer

class Balancer(Program):
    """A sample of deploy/, with the addresses, ports and descriptors of this test in place of its own; nothing else is changed."""

    def __init__(self, folder: Path, kind: str, targets: list[int]) -> None:
        folder.mkdir(parents=True)
        port = free_port()
        if kind == "haproxy":
            text = (ROOT / "deploy/haproxy/haproxy.cfg").read_text(encoding="utf-8")
            text, count = re.subn(r"bind :::443 v4v6", f"bind 127.0.0.1:{port}", text)
            text = text.replace("maxconn 50000", "maxconn 2000")           # what the descriptors of a test machine carry
            command = [path_of("haproxy"), "-db", "-f", "sample"]
        else:
            text = (ROOT / "deploy/nginx/nginx.conf").read_text(encoding="utf-8")
            text = text.replace("include /etc/nginx/modules-enabled/*.conf;", f"{stream_module()} pid {folder}/pid;")
            text = re.sub(r"^ *listen \[::\]:443.*\n", "", text, flags=re.M)
            text, count = re.subn(r"listen 443 ", f"listen 127.0.0.1:{port} ", text)
            command = [path_of("nginx"), "-p", str(folder), "-c", str(folder / "sample"), "-e", "stderr", "-g", "daemon off;"]
        assert count == 1
        for n, target in enumerate(targets):
            text, count = re.subn(rf"192\.0\.2\.1{n + 1}:443", f"127.0.0.1:{target}", text)
            assert count == 1
        (folder / "sample").write_text(text)
        super().__init__(folder, command, port)


def stream_module() -> str:
    """The line that loads it, where it is a file of its own."""
    module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
    return f"load_module {module};" if module.exists() else ""


BEHIND = {"server": {"listeners": [{"ip": "127.0.0.1", "proxy_protocol": True}], "proxy_protocol_trusted_cidrs": ["127.0.0.1/32"]}}


@contextlib.contextmanager
def load(rig: Rig, port: int, pause_s: float) -> Iterator[tuple[list[float], list[tuple[float, str]]]]:
    """New sessions all the time, each with a question to the data centre: (moments of those that worked, (begin, fault))."""
    good: list[float] = []
    faults: list[tuple[float, str]] = []
    over = threading.Event()

    def run(source: str) -> None:
        while not over.is_set():
            began = time.monotonic()
            try:
                client = rig.client(port=port, source=source)
                client.req_pq()
                client.close()
                good.append(time.monotonic())
            except (OSError, EOFError, AssertionError) as fault:
                faults.append((began, f"{source}: {fault!r}"))
            over.wait(pause_s)
    threads = [threading.Thread(target=run, args=(f"127.0.0.{n}",), daemon=True) for n in (21, 22, 23, 24)]
    for thread in threads:
        thread.start()
    yield good, faults
    over.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
def test_a_host_is_killed_under_load_and_every_new_session_succeeds(rig: Rig, tmp_path: Path, kind: str) -> None:
    """The sample as it is: PROXY protocol, retry on the other host, true addresses, and the host comes back."""
    needs(kind)
    one, two = rig.proxy(BEHIND), rig.proxy(BEHIND)
    front = Balancer(tmp_path / kind, kind, [one.port, two.port])
    try:
        held = [rig.client(port=front.port, source="127.0.0.9") for _ in range(8)]
        for client in held:
            client.req_pq()
        version = 2 if kind == "haproxy" else 1
        for proxy in (one, two):
            proxy.wait_log(rf"PROXY protocol header parsed peer=127.0.0.1:\d+ client=127.0.0.9:\d+ version={version}")
            proxy.wait_log(r"MTProto handshake successful peer=127\.0\.0\.9:\d+ user=alice", count=2)
        poll(lambda: served(one) + served(two) == 8, "leastconn spreads them, and all are logged")
        inside = served(one)
        with load(rig, front.port, 0.05) as (good, faults):
            poll(lambda: len(good) >= 12, "some sessions before", 30)
            one.process.kill()
            one.process.wait(8)
            gone_at = time.monotonic()
            poll(lambda: sum(moment > gone_at for moment in good) >= 40, "sessions afterwards", 60)
        # One per thread may have been inside the killed process at that moment.
        assert len(faults) <= 4 and all(began <= gone_at for began, _ in faults), (gone_at, faults)
        rig.proxies.remove(one)
        lost = 0
        for client in held:
            client.sock.settimeout(10)
            try:
                client.echo()
            except (*HANGUP, EOFError):
                lost += 1
        assert lost == inside, "the sessions of the other host go on, and those of the killed one have ended"
        back = rig.proxy(BEHIND, port=one.port)
        with load(rig, front.port, 0.05) as (good, faults):
            poll(lambda: served(back) > 0, "the host is used again", 60)
        assert not faults
        assert not two.log("Invalid PROXY protocol header") and not back.log("Invalid PROXY protocol header")
    finally:
        rig.close_clients()
        front.close()


# -- the packet filter

def test_the_nft_limits_let_an_app_in_and_stop_a_flood(rig: Rig) -> None:
    """A network namespace of our own with a wire to another: 60 connections at once pass (five apps), of 500 most are dropped."""
    needs("nft", "ip", "unshare")
    script = f"""
set -e
ip link set lo up; ip link add wire type veth peer name far 2>/dev/null || exit 77
unshare --net sleep 60 & peer=$!
trap 'kill $peer' EXIT
while [ "$(readlink /proc/$peer/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
ip link set far netns $peer
ip addr add 10.9.0.1/24 dev wire; ip link set wire up
nsenter --net=/proc/$peer/ns/net sh -c 'ip addr add 10.9.0.2/24 dev far; ip link set far up'
nft -f {ROOT}/deploy/nftables/telemt.nft || exit 77
python3 -c 'import socket, time
sock = socket.create_server(("10.9.0.1", 443), backlog=1000)
print("up", flush=True)
time.sleep(30)' > up & server=$!
trap 'kill $peer $server' EXIT
while ! grep -q up up; do sleep 0.02; done
nsenter --net=/proc/$peer/ns/net python3 -c '
import select, socket, sys
for count in (60, 500):
    socks = []
    for _ in range(count):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("10.9.0.1", 443))
        socks.append(sock)
    poller = select.poll()
    for sock in socks:
        poller.register(sock, select.POLLOUT)
    done = set()
    while events := poller.poll(300):
        for fd, _ in events:
            done.add(fd)
            poller.unregister(fd)
    print(count, len(done))
'
nft list table inet telemt | grep drop
"""
    done = subprocess.run([path_of("unshare"), "--net", "sh", "-c", script], capture_output=True, text=True, timeout=60, check=False,
                          cwd=rig.folder)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"this kernel or user may not: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(\d+) (\d+)$", done.stdout, re.M)
    assert found[0] == ("60", "60") and 100 <= int(found[1][1]) <= 250, done.stdout
    assert int(re.findall(r"packets (\d+)", done.stdout)[0]) >= 250, done.stdout
