"""The pool as a whole: fake middle ends that change, die, come back, and what sessions and the API see of it (middle-proxy-pool.md)."""
from __future__ import annotations

import random
import signal
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tomli_w

from doubles import Client, Proxy, Rig, free_port, merged, poll
from fake_middle_end import MeLink, MeWorld
from tests.api_client import ApiClient

PATIENCE = 60.0             # of every wait: nothing here measures time


@pytest.fixture
def make_world() -> Iterator[Callable[..., MeWorld]]:
    """make_world({dc: endpoints}) -> a world; at the end nobody has anything to complain about."""
    worlds: list[MeWorld] = []

    def make(counts: dict[int, int], **knobs: Any) -> MeWorld:
        worlds.append(MeWorld(counts, **knobs))
        return worlds[-1]
    yield make
    for world in worlds:
        world.close()
        assert world.faults == []


class Talker:
    """A client that echoes without pause in a thread of its own; its first trouble is kept."""

    def __init__(self, client: Client) -> None:
        self.client, self.rounds, self.trouble = client, 0, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._talk, daemon=True)
        self._thread.start()

    def _talk(self) -> None:
        try:
            while not self._stop.is_set():
                self.client.echo(b"TALK%08d" % self.rounds)
                self.rounds += 1
                time.sleep(0.02)
        except (OSError, EOFError, AssertionError) as trouble:
            self.trouble = repr(trouble)

    def more(self, rounds: int = 5) -> None:
        """It goes on talking."""
        wanted = self.rounds + rounds
        poll(lambda: self.trouble or self.rounds >= wanted, "echoes", PATIENCE)
        assert not self.trouble, self.trouble

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(PATIENCE)
        assert not self.trouble, self.trouble


def start(rig: Rig, world: MeWorld, general: dict[str, Any] | None = None, **tables: Any) -> Proxy:
    """A proxy whose DCs all have a link."""
    proxy = rig.proxy(merged(merged(world.config(), {"general": general or {}}), tables))
    poll(lambda: all(world.links(dc) for dc in world.mes), "a link to every DC", PATIENCE)
    proxy.wait_log("Middle-End pool ready", timeout=PATIENCE)
    return proxy


def owner(world: MeWorld, client: Client) -> MeLink:
    """The link that carries the client: it alone has its newest echo."""
    mark = b"WHERE" + id(client).to_bytes(11, "little")
    client.echo(mark)
    return next(link for me in world for link in me.all_links for request in link.requests if request.data == mark)


def reload(proxy: Proxy, general: dict[str, Any]) -> None:
    """Put keys of [general] into the file and tell the proxy."""
    config = merged(tomllib.loads(proxy.config.read_text(encoding="utf-8")), {"general": general})
    proxy.config.write_text(tomli_w.dumps(config), encoding="utf-8")
    proxy.process.send_signal(signal.SIGHUP)


QUICK = {"update_every": 1, "me_config_stable_snapshots": 1, "me_config_apply_cooldown_secs": 0, "proxy_secret_stable_snapshots": 1,
         "me_reinit_coalesce_window_ms": 0, "me_hardswap_warmup_delay_min_ms": 0, "me_hardswap_warmup_delay_max_ms": 20,
         "me_warmup_step_delay_ms": 10, "me_warmup_step_jitter_ms": 10}


@pytest.mark.parametrize("hardswap", [True, False])
def test_the_list_changes_mid_traffic(rig: Rig, make_world: Callable[..., MeWorld], hardswap: bool) -> None:
    world = make_world({2: 2})
    proxy = start(rig, world, QUICK | {"hardswap": hardswap})
    talkers = [Talker(rig.client(dc=dc)) for dc in (2, 2, -2, -2)]
    for talker in talkers:
        talker.more(2)
    old = list(world.mes[2])
    world.mes[2] = []
    new = [world.add(2) for _ in range(2)]
    world.publish()
    poll(lambda: all(me.links() for me in new), "links to the new endpoints", PATIENCE)
    proxy.wait_log("Middle-End renewal done", timeout=PATIENCE)
    for talker in talkers:
        talker.more()                           # their links drain, and they go on
    assert not any(link for me in old for link in me.links() if not link.open), "idle links to endpoints that are not listed"
    late = rig.client(dc=2)
    late.echo(b"which endpoint?!")
    assert any(request.data == b"which endpoint?!" for me in new for request in me.requests())
    for talker in talkers:
        talker.stop()
        talker.client.close()
    poll(lambda: not any(me.links() for me in old), "the old endpoints to be left", PATIENCE)
    assert sum(len(me.closes()) for me in old) == len(talkers)
    late.echo()
    for me in old:
        world.mes[2].append(me)                 # closed at the end


def test_the_secret_rotates_and_links_follow_one_by_one(rig: Rig, make_world: Callable[..., MeWorld]) -> None:
    world = make_world({2: 2})
    proxy = start(rig, world, QUICK)
    talker = Talker(rig.client(dc=2))
    talker.more(2)
    before = world.links()
    world.rotate_secret(bytes(range(1, 129)))
    proxy.wait_log(r"Middle-End renewal \(.*secret-change.*\)", timeout=PATIENCE)
    proxy.wait_log("Middle-End renewal done", timeout=PATIENCE)
    fresh = [link for link in world.links() if link not in before]
    assert fresh and all(link._secret == bytes(range(1, 129)) for link in fresh)
    talker.more()
    other = rig.client(dc=2)
    assert owner(world, other) in fresh
    talker.stop()
    assert [link for link in before if link in world.links()] == [link for link in before if link.open], "an old link without sessions"


def test_one_dead_data_centre_leaves_the_others_alone(rig: Rig, make_world: Callable[..., MeWorld]) -> None:
    world = make_world({2: 2, 4: 1})
    proxy = start(rig, world, QUICK | {"me_reconnect_backoff_cap_ms": 1000})
    talker = Talker(rig.client(dc=2))
    doomed = rig.client(dc=4)
    doomed.echo()
    for me in world.mes[4]:
        me.down()
    doomed.expect_closed(PATIENCE)
    proxy.wait_log("DC 4: its only Middle-End endpoint .* has no link left", timeout=PATIENCE)
    late = rig.client(dc=4)
    late.echo(b"by another way!!")              # waits for a link, then goes direct
    proxy.wait_log(r"WARN .*DC 4 has no Middle-End link: its new sessions go direct", timeout=PATIENCE)
    assert rig.dc.peers and rig.dc.peers[-1].dc == 4
    talker.more()
    other = rig.client(dc=-2)
    assert owner(world, other).me in world.mes[2]
    assert not proxy.log("Middle-End not usable")
    for me in world.mes[4]:
        me.up()
    poll(lambda: world.links(4), "links to the revived data centre", PATIENCE)
    assert owner(world, rig.client(dc=4)).me in world.mes[4]
    late.echo()                                 # running sessions are never moved
    talker.stop()


def test_everything_dies_and_comes_back(rig: Rig, make_world: Callable[..., MeWorld]) -> None:
    world = make_world({2: 1, 4: 1})
    port = free_port()
    proxy = start(rig, world, QUICK | {"me_reconnect_backoff_cap_ms": 1000},
                  server={"api": {"enabled": True, "listen": f"127.0.0.1:{port}", "minimal_runtime_enabled": True,
                                  "minimal_runtime_cache_ttl_ms": 0}})
    api = ApiClient(port)
    rig.client(dc=4).echo()
    for me in world:
        me.down()
    proxy.wait_log(r"WARN .*Middle-End not usable \(2 of 2 DC groups down\): new sessions go direct; no ad tag", timeout=PATIENCE)
    started = time.monotonic()
    direct = rig.client(dc=4)
    direct.echo()                               # at once
    print(f"a direct session while degraded took {time.monotonic() - started:.2f} s")
    gates = api.call("GET", "/v1/runtime/gates").data
    assert (gates["route_mode"], gates["reroute_active"], gates["reroute_reason"]) == ("direct", True, "strict_grace_fallback")
    assert gates["me_down_dc_groups"] == [2, 4] and gates["fallback_sessions_current"] == 1 and gates["fallback_sessions_total"] == 1
    assert abs(gates["reroute_to_direct_at_epoch_secs"] - time.time()) < 120 and gates["me_runtime_ready"] is False
    for me in world:
        me.up()
    proxy.wait_log(r"INFO .*Middle-End usable again after \d+ s", timeout=PATIENCE)
    poll(lambda: world.links(2) and world.links(4), "links", PATIENCE)
    assert owner(world, rig.client(dc=4)).me in world.mes[4]
    gates = api.call("GET", "/v1/runtime/gates").data
    assert (gates["route_mode"], gates["reroute_active"], gates["me_runtime_ready"]) == ("middle", False, True)
    assert gates["fallback_sessions_current"] == 1 and gates["me_down_dc_groups"] == []
    direct.echo()
    counted = api.call("GET", "/v1/stats/zero/all").data
    middle = counted["middle_proxy"]
    assert middle["reconnect_attempt_total"] >= middle["reconnect_success_total"] > 0
    assert middle["single_endpoint_outage_enter_total"] == middle["single_endpoint_outage_exit_total"] == 2
    assert counted["pool"]["writer_removed_unexpected_total"] >= 2


def test_strict_mode_waits_and_closes(rig: Rig, make_world: Callable[..., MeWorld]) -> None:
    world = make_world({2: 2})
    proxy = start(rig, world, {"auto_degradation_enabled": False})
    for me in world:
        me.down()
    proxy.wait_log(r"Middle-End not usable \(1 of 1 DC groups down\): new sessions wait and close", timeout=PATIENCE)
    started = time.monotonic()
    rig.client(dc=2).expect_closed(PATIENCE)
    assert time.monotonic() - started >= 2.5 and not rig.dc.peers


def test_a_waiting_session_takes_the_first_link_that_comes(rig: Rig, make_world: Callable[..., MeWorld]) -> None:
    world = make_world({2: 2, 4: 1})            # an only endpoint is dialled again although its links lived too short (D10)
    proxy, me = start(rig, world), world.mes[4][0]
    for number in range(1, 11):                 # it waits for three seconds: on a very busy machine the link may come later than that
        me.down()
        proxy.wait_log("DC 4: its only Middle-End endpoint .* has no link left", number, PATIENCE)
        gone_direct = len(rig.dc.peers)
        client = rig.client(dc=4)
        client.send_frame(b"early bird......")
        time.sleep(0.3)                         # it waits; nothing to see from outside
        me.up()
        assert client.recv_frame() == b"early bird......"
        if len(rig.dc.peers) == gone_direct:
            return
        poll(lambda: world.links(4), "a link", PATIENCE)
    raise AssertionError("went direct ten times although a link came in time")


def test_renewal_under_load_loses_no_session_younger_than_the_drain_limit(rig: Rig, make_world: Callable[..., MeWorld]) -> None:
    world = make_world({2: 2, 4: 1})
    proxy = start(rig, world, QUICK | {"me_reinit_every_secs": 2, "me_reinit_drain_timeout_secs": 90})
    talkers = [Talker(rig.client(dc=dc)) for dc in (2, -2, 2, 4, -4, 4)]
    quiet = [rig.client(mode="secure", dc=dc) for dc in (2, -2, 4) * 20]
    for client in quiet:
        client.echo()
    first = set(world.links())
    proxy.wait_log("Middle-End renewal done", 3, PATIENCE)
    for talker in talkers:
        talker.more()
    for client in quiet:
        client.echo()                           # its link drains for the third time at least
    assert owner(world, rig.client(dc=2)) not in first
    for talker in talkers:
        talker.stop()
        talker.client.close()
    for client in quiet:
        client.close()
    poll(lambda: not first & set(world.links()), "the first generation to be gone", PATIENCE)
    assert not proxy.log("WARN .*Middle-End renewal waits")


def test_at_the_drain_limit_sessions_are_cut(rig: Rig, make_world: Callable[..., MeWorld]) -> None:
    world = make_world({2: 1})
    port = free_port()
    start(rig, world, QUICK | {"me_reinit_every_secs": 2, "me_pool_drain_ttl_secs": 1, "me_reinit_drain_timeout_secs": 1},
          server={"api": {"enabled": True, "listen": f"127.0.0.1:{port}", "minimal_runtime_enabled": True}})
    client = rig.client(dc=2)
    client.echo()
    client.expect_closed(PATIENCE)
    poll(lambda: ApiClient(port).call("GET", "/v1/stats/zero/all").data["pool"]["pool_force_close_total"] >= 1, "the count", PATIENCE)


def test_hot_keys_of_the_pool(rig: Rig, make_world: Callable[..., MeWorld]) -> None:
    world = make_world({2: 1})
    proxy = start(rig, world, QUICK | {"me_floor_mode": "static"})
    poll(lambda: len(world.links()) == 3, "the floor", PATIENCE)
    reload(proxy, {"me_single_endpoint_shadow_writers": 5})
    poll(lambda: len(world.links()) == 6, "the higher floor", PATIENCE)
    reload(proxy, {"me_reinit_every_secs": 3})
    proxy.wait_log("Middle-End renewal done", timeout=PATIENCE)
    poll(lambda: len(world.links()) == 6 and len(world.mes[2][0].all_links) >= 12, "a whole new generation", PATIENCE)


# -- every field of the API against the state that the journey made

def test_api_fields_tell_the_state(rig: Rig, make_world: Callable[..., MeWorld]) -> None:
    world = make_world({2: 2, 4: 1})
    port = free_port()
    proxy = start(rig, world, QUICK | {
        "me_floor_mode": "static", "me_keepalive_interval_secs": 1, "me_keepalive_jitter_secs": 0, "me_bind_stale_mode": "always",
        "me_pool_min_fresh_ratio": 0.5, "me_reconnect_fast_retry_count": 7, "telemetry": {"me_level": "debug"}},
        server={"api": {"enabled": True, "listen": f"127.0.0.1:{port}", "minimal_runtime_enabled": True,
                        "minimal_runtime_cache_ttl_ms": 0}})
    api = ApiClient(port)
    clients = [rig.client(dc=dc) for dc in (2, 2, -2)]
    for client in clients:
        client.echo()
    poll(lambda: len(world.links(2)) == 3 and len(world.links(4)) == 3, "the floors", PATIENCE)

    def complete() -> Any:
        data = api.call("GET", "/v1/stats/minimal/all").data["data"]
        rows = data["me_writers"]["writers"]
        return data if len(rows) == 6 and all(row["rtt_ema_ms"] is not None for row in rows) else None
    data = poll(complete, "six links with a round trip", PATIENCE)
    addresses = {dc: sorted(me.address for me in mes) for dc, mes in world.mes.items()}
    bound = {me.address: sum(len(link.open) for link in me.links()) for me in world}
    writers = data["me_writers"]
    assert writers["summary"] == {"configured_dc_groups": 2, "configured_endpoints": 3, "available_endpoints": 3, "available_pct": 100.0,
                                  "required_writers": 6, "alive_writers": 6, "coverage_pct": 100.0}
    assert [row["dc"] for row in writers["writers"]] == [2, 2, 2, 4, 4, 4]
    assert {row["endpoint"] for row in writers["writers"]} == {*addresses[2], *addresses[4]}
    for address, sessions in bound.items():
        rows = [row for row in writers["writers"] if row["endpoint"] == address]
        assert sum(row["bound_clients"] for row in rows) == sessions
        assert all((row["idle_for_secs"] is None) == (row["bound_clients"] > 0) for row in rows)
    for row in writers["writers"]:
        assert (row["generation"], row["state"], row["draining"]) == (1, "active", False) and 0 < row["rtt_ema_ms"] < 60_000
    assert len({row["writer_id"] for row in writers["writers"]}) == 6
    two, four = data["dcs"]["dcs"]
    assert (two["dc"], two["load"], four["dc"], four["load"]) == (2, 3, 4, 0)
    assert sorted(two["endpoints"]) == addresses[2] and (two["available_endpoints"], two["available_pct"]) == (2, 100.0)
    assert (four["required_writers"], four["alive_writers"], four["coverage_pct"]) == (3, 3, 100.0) and four["rtt_ms"] > 0
    runtime = data["me_runtime"]
    told = {"active_generation": 1, "warm_generation": 0, "pending_hardswap_generation": 0, "pending_hardswap_age_secs": None,
            "hardswap_enabled": True, "floor_mode": "static", "me_keepalive_interval_secs": 1, "me_keepalive_jitter_secs": 0,
            "me_reconnect_fast_retry_count": 7, "me_pool_force_close_secs": 120, "me_pool_min_fresh_ratio": 0.5,
            "me_bind_stale_mode": "always", "me_socks_kdf_policy": "strict", "quarantined_endpoints_total": 0, "quarantined_endpoints": []}
    assert {name: runtime[name] for name in told} == told
    assert len(data["network_path"]) == 5

    # one endpoint dies young and rests; its data centre has the other
    gone = world.mes[2][0]
    gone.rude = True
    gone.kill_links()
    poll(lambda: len([link for link in world.links(2) if link.me is world.mes[2][1]]) >= 3, "refill on the other endpoint", PATIENCE)
    data = api.call("GET", "/v1/stats/minimal/all").data["data"]
    row = data["dcs"]["dcs"][0]
    assert row["available_endpoints"] == 1 and row["available_pct"] == 50.0 and row["alive_writers"] >= 3
    counted = api.call("GET", "/v1/stats/zero/all").data
    if counted["middle_proxy"]["endpoint_quarantine_total"]:        # the links lived for less than 20 s: else it does not rest
        rest = data["me_runtime"]["quarantined_endpoints"]
        assert [entry["endpoint"] for entry in rest] in ([gone.address], []) and all(0 < entry["remaining_ms"] <= 25_000 for entry in rest)
    pool = counted["pool"]
    assert pool["writer_removed_total"] >= pool["writer_removed_unexpected_total"] >= 1
    assert pool["refill_triggered_total"] >= 1 and pool["pool_drain_active"] == 0 and pool["pool_stale_pick_total"] == 0
    assert counted["middle_proxy"]["keepalive_sent_total"] >= counted["middle_proxy"]["keepalive_pong_total"] >= 6
    assert proxy.process.poll() is None


# field of me_runtime -> key of [general] and a value that is not its default
ECHOED = {
    "hardswap_enabled": ("hardswap", False), "floor_mode": ("me_floor_mode", "static"),
    "adaptive_floor_idle_secs": ("me_adaptive_floor_idle_secs", 91),
    "adaptive_floor_min_writers_single_endpoint": ("me_adaptive_floor_min_writers_single_endpoint", 2),
    "adaptive_floor_recover_grace_secs": ("me_adaptive_floor_recover_grace_secs", 181),
    "me_keepalive_enabled": ("me_keepalive_enabled", False), "me_keepalive_interval_secs": ("me_keepalive_interval_secs", 9),
    "me_keepalive_jitter_secs": ("me_keepalive_jitter_secs", 3), "me_keepalive_payload_random": ("me_keepalive_payload_random", False),
    "rpc_proxy_req_every_secs": ("rpc_proxy_req_every", 11),
    "me_reconnect_max_concurrent_per_dc": ("me_reconnect_max_concurrent_per_dc", 7),
    "me_reconnect_backoff_base_ms": ("me_reconnect_backoff_base_ms", 501),
    "me_reconnect_backoff_cap_ms": ("me_reconnect_backoff_cap_ms", 30_001),
    "me_reconnect_fast_retry_count": ("me_reconnect_fast_retry_count", 15), "me_pool_drain_ttl_secs": ("me_pool_drain_ttl_secs", 89),
    "me_pool_force_close_secs": ("me_reinit_drain_timeout_secs", 121), "me_pool_min_fresh_ratio": ("me_pool_min_fresh_ratio", 0.625),
    "me_bind_stale_mode": ("me_bind_stale_mode", "never"), "me_bind_stale_ttl_secs": ("me_bind_stale_ttl_secs", 88),
    "me_single_endpoint_shadow_writers": ("me_single_endpoint_shadow_writers", 3),
    "me_single_endpoint_outage_mode_enabled": ("me_single_endpoint_outage_mode_enabled", False),
    "me_single_endpoint_outage_disable_quarantine": ("me_single_endpoint_outage_disable_quarantine", False),
    "me_single_endpoint_outage_backoff_min_ms": ("me_single_endpoint_outage_backoff_min_ms", 251),
    "me_single_endpoint_outage_backoff_max_ms": ("me_single_endpoint_outage_backoff_max_ms", 3001),
    "me_single_endpoint_shadow_rotate_every_secs": ("me_single_endpoint_shadow_rotate_every_secs", 901),
    "me_deterministic_writer_sort": ("me_deterministic_writer_sort", False), "me_socks_kdf_policy": ("me_socks_kdf_policy", "compat"),
}


def test_every_field_of_the_runtime_view_and_of_the_pool_state(rig: Rig, make_world: Callable[..., MeWorld]) -> None:
    world = make_world({2: 1})
    port = free_port()
    start(rig, world, QUICK | dict(ECHOED.values()), server={
        "api": {"enabled": True, "listen": f"127.0.0.1:{port}", "minimal_runtime_enabled": True, "minimal_runtime_cache_ttl_ms": 0}})
    poll(lambda: len(world.links()) == 4, "the floor", PATIENCE)
    api = ApiClient(port)
    made = {"active_generation": 1, "warm_generation": 0, "pending_hardswap_generation": 0, "pending_hardswap_age_secs": None,
            "quarantined_endpoints_total": 0, "quarantined_endpoints": []}
    runtime = api.call("GET", "/v1/stats/minimal/all").data["data"]["me_runtime"]
    assert runtime == {field: value for field, (_, value) in ECHOED.items()} | made
    rig.client(dc=2).echo()
    state = api.call("GET", "/v1/runtime/me_pool_state").data["data"]
    assert state == {
        "generations": {"active_generation": 1, "warm_generation": 0, "pending_hardswap_generation": 0, "pending_hardswap_age_secs": None,
                        "draining_generations": []},
        "hardswap": {"enabled": False, "pending": False},
        "writers": {"total": 4, "alive_non_draining": 4, "draining": 0, "degraded": 0, "contour": {"warm": 0, "active": 4, "draining": 0},
                    "health": {"healthy": 4, "degraded": 0, "draining": 0}},
        "refill": {"inflight_endpoints_total": 0, "inflight_dc_total": 0, "by_dc": []}}
    # its only endpoint goes away while a session is bound: quarantine, for nobody tries an endpoint that rests here
    world.mes[2][0].down()
    poll(lambda: not api.call("GET", "/v1/stats/me-writers").data["writers"], "every link to be lost", PATIENCE)
    data = api.call("GET", "/v1/stats/minimal/all").data["data"]
    assert data["me_writers"]["summary"] == {"configured_dc_groups": 1, "configured_endpoints": 1, "available_endpoints": 0,
                                             "available_pct": 0.0, "required_writers": 4, "alive_writers": 0, "coverage_pct": 0.0}
    assert data["dcs"]["dcs"] == [{"dc": 2, "endpoints": [world.mes[2][0].address], "available_endpoints": 0, "available_pct": 0.0,
                                   "required_writers": 4, "alive_writers": 0, "coverage_pct": 0.0, "rtt_ms": None, "load": 0}]
    if api.call("GET", "/v1/stats/zero/all").data["middle_proxy"]["endpoint_quarantine_total"]:        # its links lived for less than 20 s
        rest, = data["me_runtime"]["quarantined_endpoints"]
        assert rest["endpoint"] == world.mes[2][0].address and 0 < rest["remaining_ms"] <= 25_000
        assert data["me_runtime"]["quarantined_endpoints_total"] == 1


def test_a_foreign_file_is_not_a_list(rig: Rig, make_world: Callable[..., MeWorld]) -> None:
    world = make_world({2: 1})
    proxy = start(rig, world, QUICK)
    page = world.site.pages["/getProxyConfig"]
    client = rig.client(dc=2)
    client.echo()
    page.body, hits = b"<html>please log in to this network</html>", page.hits
    poll(lambda: page.hits >= hits + 3, "three downloads", PATIENCE)
    client.echo()
    assert world.links() and not proxy.log("Middle-End renewal done")



def test_links_die_all_the_time_and_nothing_is_left_behind(rig: Rig, make_world: Callable[..., MeWorld], rng: random.Random) -> None:
    """Random kills, refusals, silence and changes of list and secret under clients that come and go; then all is as at the start."""
    world = make_world({1: 1, 2: 1, 4: 1})      # an only endpoint does not rest, so the end is soon
    proxy = start(rig, world, QUICK | {"me_reinit_every_secs": 3, "me_reconnect_backoff_cap_ms": 500})
    served, deadline = 0, time.monotonic() + 6
    while time.monotonic() < deadline:
        me = rng.choice(list(world))
        match rng.randrange(7):
            case 0: me.kill_links(rng.choice(("rst", "fin")))
            case 1: me.rude = not me.rude
            case 2: me.mute = rng.choice(("", "", "nonce", "handshake"))
            case 3: world.rotate_secret(rng.randbytes(128))
            case 4:
                for link in me.links()[:1]:
                    link.kill()
            case 5: me.corrupt_crc = rng.choice((None, None, 2))
            case _: world.site.secret_page.failures = 2
        for _ in range(4):
            client = rig.client(mode="secure", dc=rng.choice((1, -1, 2, -2, 4)))
            try:
                client.sock.settimeout(15)
                client.echo()
                served += 1
            except (OSError, EOFError):
                pass                            # its link was killed
            if rng.random() < 0.8:
                client.close()
    for me in world:
        me.rude, me.mute, me.corrupt_crc = False, "", None
    assert served > 5
    rig.close_clients()
    poll(lambda: all(world.links(dc) for dc in world.mes), "links to every DC", PATIENCE)
    poll(lambda: not any(link.open for link in world.links()), "every session to be closed towards the middle ends", PATIENCE)
    for dc in (1, 2, -4):
        rig.client(dc=dc).echo()
    assert not proxy.log("Internal error")
