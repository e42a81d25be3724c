"""config.md 2.11: used octets outlive the process."""
from __future__ import annotations

import json
import signal
from pathlib import Path

from doubles import MIB, ApiScript, Proxy, Rig, free_port, poll


def start(rig: Rig) -> tuple[Proxy, ApiScript, Path]:
    port = free_port()
    proxy = rig.proxy({"general": {"quota_state_path": "state/quota.json"}, "access": {"user_data_quota": {"bob": 3 * MIB}},
                       "server": {"api": {"enabled": True, "listen": f"127.0.0.1:{port}"}}})
    proxy.wait_log("API endpoint")
    return proxy, ApiScript(port), proxy.folder / "state" / "quota.json"


def again(rig: Rig, proxy: Proxy) -> Proxy:
    """The same configuration in a new process."""
    rig.proxies.append(Proxy(proxy.folder, proxy.config.read_text(), port=proxy.port))
    rig.proxies[-1].wait_log("API endpoint")
    return rig.proxies[-1]


def used(api: ApiScript, user: str = "bob") -> int:
    return int(api.data(f"/v1/users/{user}")["quota_used_bytes"])


def test_used_octets_survive_a_restart_and_a_kill_loses_a_minute_at_most(rig: Rig) -> None:
    proxy, api, state = start(rig)
    assert not state.exists() and not proxy.log("quota state")
    rig.client("bob").download(MIB)
    rig.client("alice").upload(MIB)
    rig.close_clients()
    poll(lambda: used(api) > MIB and used(api, "alice") > MIB, "all octets")
    seen = used(api)
    proxy.settle()
    proxy.stop(signal.SIGTERM)
    stored = json.loads(state.read_text())["users"]
    assert stored["bob"]["used_bytes"] == seen and stored["alice"]["used_bytes"] > MIB      # users without a quota as well
    assert state.stat().st_mode & 0o777 == 0o600

    proxy = again(rig, proxy)
    proxy.wait_log(r"INFO telemt::server: Loaded per-user quota state path=\S+ loaded_users=2")
    assert used(api) == seen and api.data("/v1/users/bob")["total_octets"] == 0
    rig.client("bob").download(MIB)
    poll(lambda: used(api) > 2 * MIB, "more octets")
    proxy.process.kill()                                    # within the minute: what was stored before stays
    proxy.wait_exit()
    assert json.loads(state.read_text())["users"] == stored

    proxy = again(rig, proxy)
    assert used(api) == seen
    client = rig.client("bob")
    client.order("send", 4 * MIB)
    proxy.wait_log("WARN .*User data quota reached, closing relay user=bob")     # 1 MiB before, 2 MiB now
    rig.client("bob").expect_closed()
    proxy.wait_log("User bob exceeded data quota")

    api.change("POST", "/v1/users/bob/reset-quota")         # written before the answer
    proxy.process.kill()
    proxy.wait_exit()
    entry = json.loads(state.read_text())["users"]["bob"]
    assert entry["used_bytes"] == 0 and entry["last_reset_epoch_secs"] > 1_700_000_000
    again(rig, proxy)
    rig.client("bob").download(MIB)
    assert not [name for name in state.parent.iterdir() if name != state]


def test_a_user_that_leaves_loses_its_entry(rig: Rig) -> None:
    proxy, api, state = start(rig)
    rig.client("bob").download(MIB)
    rig.close_clients()
    poll(lambda: used(api) > MIB, "octets")
    api.change("DELETE", "/v1/users/bob")
    api.change("POST", "/v1/users", {"username": "bob"})
    assert used(api) == 0
    proxy.settle()
    proxy.stop()
    assert "bob" not in json.loads(state.read_text())["users"]


def test_a_broken_state_is_put_aside_and_an_unwritable_one_costs_a_warning(rig: Rig) -> None:
    proxy, api, state = start(rig)
    proxy.stop()
    state.parent.mkdir(exist_ok=True)
    state.write_text("{ half")
    proxy = again(rig, proxy)
    proxy.wait_log(r"WARN telemt::server: Failed to parse quota state file path=\S+/state/quota\.json error=")
    assert state.with_name("quota.json.bad").read_text() == "{ half"
    state.mkdir()
    (state / "in the way").write_text("")
    rig.client("bob").req_pq()
    status, found = api.ask("POST", "/v1/users/bob/reset-quota")
    assert (status, found["error"]["code"]) == (500, "internal_error")
    assert found["error"]["message"].startswith("failed to write quota state: ")
    rig.client("bob").req_pq()
    rig.close_clients()
    proxy.settle()
    proxy.stop()
    assert len(proxy.log("WARN telemt::server: Failed to write quota state file")) == 1
