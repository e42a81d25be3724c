"""The doubles agree with the vectors, and with each other where no proxy stands between them."""
from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import doubles
from doubles import CCS, MIB, TAGS, USERS, BlackHole, Client, FakeDc, Peer

VECTORS = Path(__file__).parent / "vectors"
ALICE = bytes.fromhex(USERS["alice"])


def load(name: str) -> dict[str, Any]:
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


def cases(name: str, group: str = "cases") -> list[Any]:
    return [pytest.param(case, id=case["name"]) for case in load(name)[group]]


OBFUSCATED = [case for case in cases("obfuscated2") if case.values[0]["expect"] == "accept"]


@pytest.mark.parametrize("case", OBFUSCATED)
def test_keys_and_streams_of_the_header_vectors(case: dict[str, Any]) -> None:
    header = bytes.fromhex(case["header"])
    secret = bytes.fromhex(case["secret"]) if case["secret"] else None
    there, back = doubles.header_keys(header, secret)
    assert [part.hex() for part in (*there, *back)] == [case[k] for k in ("decrypt_key", "decrypt_iv", "encrypt_key", "encrypt_iv")]
    stream = doubles.ctr(*there)
    assert stream(header)[56:].hex() == case["decrypted_header_56_64"]
    assert stream(bytes.fromhex(case["fwd_ciphertext"])).hex() == case["fwd_plaintext"]
    assert doubles.ctr(*back)(bytes.fromhex(case["bwd_plaintext"])).hex() == case["bwd_ciphertext"]


@pytest.mark.parametrize("case", cases("dc-header"))
def test_a_data_centre_reads_the_header_vectors(case: dict[str, Any]) -> None:
    near, far = socket.socketpair()
    peer = doubles.DcPeer(far)
    near.sendall(bytes.fromhex(case["header_to_dc"]))
    peer.read_header()
    assert (TAGS[peer.transport].hex(), peer.dc) == (case["proto_tag"], case["dc_idx"])
    assert peer.decrypt(bytes.fromhex(case["c2s"]["to_dc"])).hex() == case["c2s"]["plain"]
    assert peer.encrypt(bytes.fromhex(case["s2c"]["plain"])).hex() == case["s2c"]["from_dc"]
    for sock in (near, far):
        sock.close()


@pytest.mark.parametrize("transport", TAGS)
@pytest.mark.parametrize("dc", [2, -4, 10002, 0])
def test_built_header_reads_back(transport: str, dc: int) -> None:
    header = doubles.build_header(ALICE, TAGS[transport], dc)
    plain = doubles.ctr(*doubles.header_keys(header, ALICE)[0])(header)
    assert plain[56:62] == TAGS[transport] + struct.pack("<h", dc)


@pytest.mark.parametrize("case", [case for case in cases("faketls") if case.values[0].get("timestamp") is not None])
def test_signature_equals_the_hello_vectors(case: dict[str, Any]) -> None:
    record = bytes.fromhex(case["record"])
    assert doubles.sign_hello(record, bytes.fromhex(case["secret"]), case["timestamp"]) == record


@pytest.mark.parametrize("case", cases("faketls", "flights"))
def test_flight_verdicts_equal_the_vectors(case: dict[str, Any]) -> None:
    session = bytes.fromhex(case["session_id"])
    hello = bytes(11) + bytes.fromhex(case["client_digest"]) + bytes([len(session)]) + session
    exactly_three = case["client_accepts"] and len(case["app_data_sizes"]) == 1
    try:
        doubles.parse_flight(bytes.fromhex(case["flight"]), hello, bytes.fromhex(case["secret"]))
    except AssertionError:
        assert not exactly_three
    else:
        assert exactly_three


@pytest.mark.parametrize(("shape", "length"), [({}, 517), ({"session": 0}, 517), ({"length": 900}, 905),
                                               ({"shares": (doubles.MLKEM, doubles.X25519)}, None)], ids=str)
def test_hello_has_the_shape_of_a_client(shape: dict[str, Any], length: int | None) -> None:
    hello = doubles.build_hello(ALICE, at=1_760_000_000, **shape)
    assert len(hello) == length or (length is None and 1500 < len(hello) < 2050)
    assert struct.unpack_from(">H", hello, 3)[0] == len(hello) - 5
    assert int.from_bytes(hello[6:9], "big") == len(hello) - 9
    assert doubles.sign_hello(hello, ALICE, 1_760_000_000) == hello != doubles.sign_hello(hello, ALICE, 1_760_000_001)


@pytest.mark.parametrize("case", [case for case in cases("framing", "encode")
                                  if case.values[0]["proto"] != "secure" and case.values[0].get("wire_len") and "ack" not in case.id])
def test_frames_equal_the_vectors(case: dict[str, Any]) -> None:
    def join(segments: list[dict[str, Any]]) -> bytes:
        return b"".join(bytes.fromhex(s["hex"]) if "hex" in s else bytes.fromhex(s["fill"]) * s["len"] for s in segments)
    assert doubles.wrap_frame(case["proto"], join(case["payload"])) == join(case["wire"])


def test_pattern_is_reproducible_and_does_not_repeat() -> None:
    whole = b"".join(doubles.pattern(1, 3 * MIB + 5))
    assert len(whole) == 3 * MIB + 5 and whole == b"".join(doubles.pattern(1, 3 * MIB + 5))
    assert len({whole[:16], whole[MIB:MIB + 16], b"".join(doubles.pattern(2, 16))}) == 3


def test_a_proxy_that_does_not_start_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow machine they piled up, and made it slower."""
    monkeypatch.setattr(doubles, "patient", lambda limit_s: limit_s * 0.05 if limit_s == 10.0 else limit_s)
    started: list[int] = []

    class Watched(doubles.subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **words: Any) -> None:
            super().__init__(*args, **words)
            started.append(self.pid)

    monkeypatch.setattr(doubles.subprocess, "Popen", Watched)
    with pytest.raises(AssertionError, match="not logged: Listening"):
        doubles.Proxy(tmp_path / "proxy", "", command=[sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    assert len(started) == 1 and not Path(f"/proc/{started[0]}").exists()


def test_poll_gives_up_with_its_reason() -> None:
    with pytest.raises(AssertionError, match="pigs fly"):
        doubles.poll(lambda: False, "pigs fly", timeout=0.005)


# -- a proxy of some forty lines, to prove Client and FakeDc before there is a real one ---------------------------------------------

class Bridge:
    """Serves one client after the other: reads the header with alice's secret, writes a fresh one, copies."""

    def __init__(self, dc: FakeDc) -> None:
        self.dc = dc
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        try:
            while True:
                threading.Thread(target=self.serve, args=(self.listener.accept()[0],), daemon=True).start()
        except OSError:
            pass

    def serve(self, sock: socket.socket) -> None:
        near = Peer(sock)
        first = near.pull(5)
        if tls := first.startswith(b"\x16\x03\x01"):
            hello = first + near.pull(struct.unpack(">H", first[3:])[0])
            near.push(self.answer(hello))
            assert near.pull(len(CCS)) == CCS
            first = b""
        header = first + self.pull(near, 64 - len(first), tls)
        there, back = doubles.header_keys(header, ALICE)
        near.decrypt, near.encrypt = doubles.ctr(*there), doubles.ctr(*back)
        tag, dc = struct.unpack_from("<4sh", near.decrypt(header), 56)
        far = Peer(socket.create_connection(("127.0.0.1", self.dc.port)))
        header = doubles.build_header(None, tag, dc)
        there, back = doubles.header_keys(header, None)
        far.encrypt, far.decrypt = doubles.ctr(*there), doubles.ctr(*back)
        far.encrypt(bytes(64))
        far.push(header)
        if tls:
            near.wrap = lambda data: b"".join(doubles.APP + struct.pack(">H", len(data[at:at + 8209])) + data[at:at + 8209]
                                              for at in range(0, len(data), 8209))
            reader = Client.__new__(Client)
            reader.mode, reader.largest_record, reader._cipher_text = "tls", 0, bytearray()
            near.unwrap = reader.unwrap
        with doubles.helper(self.copy, near, far):
            self.copy(far, near)

    @staticmethod
    def pull(peer: Peer, size: int, tls: bool) -> bytes:
        if tls:
            assert struct.unpack(">H", peer.pull(5)[3:])[0] == size
        return peer.pull(size)

    @staticmethod
    def copy(source: Peer, sink: Peer) -> None:
        try:
            while piece := source.take(MIB):
                sink.send(piece)
            sink.shutdown()
        except OSError:
            sink.close()

    @staticmethod
    def answer(hello: bytes) -> bytes:
        """The first flight of the vectors, signed for this hello."""
        session, flight = hello[44:76], bytes.fromhex(load("faketls")["flights"][0]["flight"])
        flight = flight[:11] + bytes(32) + b"\x20" + session + flight[76:]
        return flight[:11] + doubles.hmac.digest(ALICE, hello[11:43] + flight, "sha256") + flight[43:]


@pytest.fixture
def bridge() -> Iterator[Bridge]:
    dc = FakeDc()
    bridge = Bridge(dc)
    yield bridge
    bridge.listener.shutdown(socket.SHUT_RDWR)
    bridge.listener.close()
    dc.close()
    assert not dc.faults


@pytest.mark.parametrize(("mode", "transport"), doubles.ROUTES)
def test_client_and_data_centre_understand_each_other(bridge: Bridge, mode: str, transport: str) -> None:
    client = Client(bridge.port, "alice", mode, transport, dc=-3).start()
    client.req_pq()
    client.req_pq(doubles.REQ_PQ)
    client.echo(b"12345678")
    client.download(MIB + 3)
    client.upload(MIB + 3)
    client.both_ways(MIB)
    peer = bridge.dc.take()
    assert (peer.dc, peer.transport) == (-3, transport)
    client.shutdown()
    client.expect_eof()
    client.close()


def test_both_ends_can_half_close_and_reset() -> None:
    dc = FakeDc(manual=True, host="::1") if socket.has_ipv6 else FakeDc(manual=True)
    def join() -> tuple[Peer, doubles.DcPeer]:
        near = Peer(socket.create_connection((dc.address.rpartition(":")[0].strip("[]"), dc.port)))
        near.push(doubles.build_header(None, TAGS["padded"], 1))
        return near, dc.take()
    near, far = join()
    near.shutdown()
    far.expect_eof()
    far.push(b"late")
    assert near.pull(4) == b"late"
    far.shutdown()
    with pytest.raises(EOFError):
        near.pull(1)
    near, far = join()
    far.reset()
    with pytest.raises(ConnectionResetError):
        near.pull(1)
    near.close()
    dc.close()


def test_a_connectivity_check_is_no_fault_and_a_reserved_prefix_is_one() -> None:
    dc = FakeDc()
    socket.create_connection(("127.0.0.1", dc.port)).close()
    with socket.create_connection(("127.0.0.1", dc.port)) as sock:
        sock.sendall(b"GET " + os.urandom(60))
        doubles.poll(lambda: dc.faults, "the fault")
    dc.close()


def test_nobody_gets_through_to_the_black_hole() -> None:
    hole = BlackHole()
    host, _, port = hole.address.rpartition(":")
    with socket.socket() as sock, pytest.raises(TimeoutError):
        sock.settimeout(0.3)
        sock.connect((host, int(port)))
    hole.close()
