"""One side says that it has finished; the other may go on."""
from __future__ import annotations

import pytest

from doubles import HANGUP, MIB, Rig, pattern_sha

MODE = pytest.mark.parametrize("mode", ["classic", "secure", "tls"])
FAST = pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])


@MODE
@FAST
def test_client_finishes_first(rig: Rig, mode: str, fast: bool) -> None:
    dc = rig.main_dc(manual=True)
    rig.proxy({"general": {"fast_mode": fast}})
    client = rig.client("alice", mode)
    peer = dc.take()
    client.send_pattern(1, MIB)
    client.shutdown()
    assert peer.recv_digest(MIB) == pattern_sha(1, MIB)
    peer.expect_eof()
    peer.send_pattern(2, 3 * MIB)
    peer.close()
    assert client.recv_digest(3 * MIB) == pattern_sha(2, 3 * MIB)
    client.expect_eof()


@MODE
@FAST
def test_data_centre_finishes_first(rig: Rig, mode: str, fast: bool) -> None:
    dc = rig.main_dc(manual=True)
    rig.proxy({"general": {"fast_mode": fast}})
    client = rig.client("alice", mode)
    peer = dc.take()
    peer.send_pattern(3, MIB)
    peer.shutdown()
    assert client.recv_digest(MIB) == pattern_sha(3, MIB)
    client.expect_eof()
    client.send_pattern(4, 3 * MIB)
    client.shutdown()
    assert peer.recv_digest(3 * MIB) == pattern_sha(4, 3 * MIB)
    peer.expect_eof()
    peer.close()


@MODE
def test_client_leaves_in_order(rig: Rig, mode: str) -> None:
    """close() of the client ends the session at the data centre too, whether FIN or (with unread bytes) RST."""
    dc = rig.main_dc(manual=True)
    proxy = rig.proxy()
    client = rig.client("alice", mode)
    peer = dc.take()
    peer.send(b"unread..")
    client.fill()
    client.close()
    peer.expect_eof()
    peer.close()
    proxy.settle()


def test_alert_of_the_client_is_its_end(rig: Rig) -> None:
    """client-protocol 6.7: record type 0x15 is treated as EOF."""
    dc = rig.main_dc(manual=True)
    rig.proxy()
    client = rig.client()
    peer = dc.take()
    client.send(b"bye.")
    client.push(b"\x15\x03\x03\x00\x02\x01\x00")
    assert peer.recv(4) == b"bye."
    peer.expect_eof()
    peer.close()


@pytest.mark.parametrize("junk", ["16030300010a", "1803030001aa", "1703040001aa", "1703034101", "140303000201"])
def test_broken_record_ends_the_session(rig: Rig, junk: str) -> None:
    """A record that is none (6.7, D14: a CCS is one byte): both ends are closed, nothing is answered."""
    dc = rig.main_dc(manual=True)
    proxy = rig.proxy()
    client = rig.client()
    peer = dc.take()
    client.push(bytes.fromhex(junk) + bytes(8))
    client.expect_closed()
    try:
        peer.expect_eof()
    except HANGUP:
        pass
    peer.close()
    client.close()
    proxy.settle()
