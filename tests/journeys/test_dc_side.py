"""Which data centre a client gets, and what happens when it cannot be had."""
from __future__ import annotations

import stat
import time

import pytest

from doubles import Rig, free_port, poll


@pytest.mark.parametrize("index", [1, 5, -2, -5, 203, -203, 10002, -10002, 77, 32767, -32768])
def test_override_for_exactly_this_index(rig: Rig, index: int) -> None:
    """upstream-and-relay 2.2: the key is the decimal text with its sign; the header carries the index unchanged (8)."""
    other = rig.add_dc()
    proxy = rig.proxy({"dc_overrides": {str(index): [other.address]}})
    client = rig.client("alice", "tls", "intermediate", dc=index)
    client.req_pq()
    assert [(peer.dc, peer.transport) for peer in other.peers] == [(index, "intermediate")]
    assert not rig.dc.peers
    proxy.wait_log(rf"INFO .*Connecting to Telegram DC .*\bdc={index}\b.*\bdc_addr={other.address}\b")


def test_a_string_is_a_list_of_one(rig: Rig) -> None:
    rig.proxy({"dc_overrides": {"4": rig.dc.address}})
    rig.client(dc=4).req_pq()


@pytest.mark.parametrize("enabled", [True, False], ids=["ipv6", "no-ipv6"])
def test_an_ipv6_data_centre(rig: Rig, enabled: bool) -> None:
    """2.2 step 2: without an entry of the wanted family the first of any family is taken."""
    try:
        rig.main_dc(host="::1")
    except OSError:
        pytest.skip("no IPv6 on this machine")
    rig.proxy({"network": {"ipv6": enabled}})
    client = rig.client(dc=4)
    client.req_pq()
    client.upload(1 << 20)


def test_bad_entries_are_skipped_with_a_warning(rig: Rig) -> None:
    proxy = rig.proxy({"dc_overrides": {"2": ["nonsense", "", "1.2.3.4", " 127.0.0.1:1", rig.dc.address]}})
    rig.client().req_pq()
    proxy.wait_log("WARN .*Invalid DC override address in config, ignoring")


@pytest.mark.parametrize("default", [None, 3, 9], ids=["none", "3", "out-of-range"])
def test_unknown_index_goes_to_the_default_cluster(rig: Rig, default: int | None) -> None:
    """2.2 step 4 and D18: never fails for want of an address; each index is written once."""
    proxy = rig.proxy({"default_dc": default, "general": {"upstream_connect_retry_attempts": 1}})
    table = {3: "149.154.175.100:443"}.get(default or 0, "149.154.167.51:443")
    for n, index in enumerate((0, 77, 77, -77, 10001, 77, 0)):
        client = rig.client("alice", ("classic", "tls")[n & 1], dc=index)
        client.expect_closed()              # from a loopback address the built-in table cannot be reached
        client.close()
        proxy.wait_log(rf"INFO .*Connecting to Telegram DC .*\bdc={index}\b.*\bdc_addr={table}\b")
    proxy.wait_log("INFO .*Special DC ---> default_cluster", count=7)
    assert proxy.log("WARN .*Requested non-standard DC with no override; falling back to default cluster")
    written = proxy.folder / "unknown-dc.txt"
    poll(lambda: written.exists() and written.read_text().count("\n") == 4, "four lines")
    assert written.read_text() == "dc_idx=0\ndc_idx=77\ndc_idx=-77\ndc_idx=10001\n"
    assert stat.S_IMODE(written.stat().st_mode) == 0o600


def test_known_indices_are_not_written(rig: Rig) -> None:
    proxy = rig.proxy()
    for index in (1, -5, 203, 10002):
        rig.client(dc=index).req_pq()
    assert not (proxy.folder / "unknown-dc.txt").exists()


@pytest.mark.parametrize("mode", ["classic", "tls"])
def test_refused_connection_ends_the_session(rig: Rig, mode: str) -> None:
    """7.4: two attempts, then the client is closed and told nothing."""
    proxy = rig.proxy({"dc_overrides": {"3": [f"127.0.0.1:{free_port()}"]}})
    client = rig.client("alice", mode, dc=3)
    client.send(b"anybody there")
    client.expect_closed()
    client.close()
    proxy.wait_log(r"WARN .*Upstream failed after retries: .*Connection refused \(os error 111\)")
    proxy.settle()


def test_second_attempt_succeeds(rig: Rig) -> None:
    """A data centre that is back before the attempts are used up: what the client sent meanwhile arrives."""
    port = free_port()
    proxy = rig.proxy({"dc_overrides": {"3": [f"127.0.0.1:{port}"]},
                       "general": {"upstream_connect_retry_attempts": 3, "upstream_connect_retry_backoff_ms": 1000}})
    client = rig.client(dc=3)
    client.send(b"\x08\0\0\0patience")
    proxy.wait_log(r"Connecting to Telegram DC .*\bdc=3\b")
    late = rig.add_dc(port=port)
    assert client.recv_frame() == b"patience"
    assert late.peers[0].dc == 3


def test_second_address_when_the_first_refuses(rig: Rig) -> None:
    rig.proxy({"dc_overrides": {"3": [f"127.0.0.1:{free_port()}", rig.dc.address]}})
    client = rig.client(dc=3)
    client.req_pq()
    assert rig.dc.peers[0].dc == 3


@pytest.mark.parametrize("mode", ["classic", "tls"])
def test_connect_timeout_ends_the_session(rig: Rig, mode: str) -> None:
    hole = rig.black_hole()
    proxy = rig.proxy({"dc_overrides": {"3": [hole.address]}, "timeouts": {"tg_connect": 1},
                       "general": {"upstream_connect_retry_attempts": 2}})
    client = rig.client("alice", mode, dc=3)
    begin = time.monotonic()
    rig.client("bob", mode).req_pq()                    # nobody else waits
    client.expect_closed(timeout=6)
    assert 1.5 < time.monotonic() - begin < 15          # two attempts of a second each, not of the ten that are the default
    rig.close_clients()
    proxy.wait_log(f"WARN .*Upstream failed after retries: .*Connection timeout to {hole.address}")
    proxy.settle()


def test_many_bytes_during_the_dial_are_held_back_not_lost(rig: Rig) -> None:
    """D10: at most 64 KiB wait for the data centre, then the client is not read."""
    port = free_port()
    proxy = rig.proxy({"dc_overrides": {"3": [f"127.0.0.1:{port}"]},
                       "general": {"upstream_connect_retry_attempts": 3, "upstream_connect_retry_backoff_ms": 1500}})
    client = rig.client("alice", "secure", dc=3)
    before = proxy.rss()
    frame = b"D10 " * 60_000
    client.sock.settimeout(30)
    proxy.wait_log(r"Connecting to Telegram DC .*\bdc=3\b")
    client.send_frame(frame)
    assert proxy.rss() - before < 4 << 20
    rig.add_dc(port=port)
    assert client.recv_frame() == frame


def test_the_data_centre_that_hangs_up_at_once(rig: Rig) -> None:
    rude = rig.add_dc(rude=True)
    proxy = rig.proxy({"dc_overrides": {"3": [rude.address]}})
    for n in range(20):
        client = rig.client("alice", ("classic", "tls")[n & 1], dc=3)
        client.expect_closed()
        client.close()
    proxy.settle()
    rig.client("bob").req_pq()
