"""Every AES backend serves a FakeTLS session (platform.md 3), and the first usable one is taken without being asked."""
from __future__ import annotations

import importlib.util

import pytest

from doubles import MIB, Rig

BACKENDS = {"cryptography": "cryptography", "libcrypto": "_ctypes", "pycryptodome": "Crypto", "python": ""}      # name -> what it needs


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend(rig: Rig, backend: str, fast: bool) -> None:
    if BACKENDS[backend] and not importlib.util.find_spec(BACKENDS[backend]):
        pytest.skip(f"no {BACKENDS[backend]} here")
    proxy = rig.proxy({"general": {"fast_mode": fast}}, env={"TELEMT_CRYPTO": backend})
    assert proxy.log(rf"crypto={backend}\b"), proxy.lines[0]
    assert bool(proxy.log("WARN .*no AES library found: pure-Python AES")) is (backend == "python")
    size = MIB // 8 if backend == "python" else 8 * MIB
    for mode, transport in (("tls", "padded"), ("classic", "abridged")):
        client = rig.client("bob", mode, transport)
        client.req_pq()
        client.download(size + 1)
        client.upload(size + 1)
        client.both_ways(size // 4)


def test_the_fastest_is_the_default(rig: Rig) -> None:
    assert rig.proxy().log(r"crypto=cryptography\b")


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_shares_are_points(rig: Rig, backend: str) -> None:
    """client-protocol D13; the client checks each share that it is sent."""
    if BACKENDS[backend] and not importlib.util.find_spec(BACKENDS[backend]):
        pytest.skip(f"no {BACKENDS[backend]} here")
    rig.proxy(env={"TELEMT_CRYPTO": backend})
    shares = set()
    for _ in range(80):                         # more than the pool of 64 holds
        client = rig.client()
        assert client.flight
        shares.add(client.flight.share)
        client.close()
    assert len(shares) == 80
