"""tshark reads our answer as TLS 1.3: to a hello of Chrome with and without the post-quantum group, and to one of TDLib."""
from __future__ import annotations

import json
import shutil
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import sites
from doubles import MLKEM, ROOT, USERS, X25519, Rig, clean_env, sign_hello

HELLOS = json.loads((ROOT / "tests" / "vectors" / "hellos.json").read_text())["hellos"]
FIELDS = ("tls.record.content_type", "tls.record.opaque_type", "tls.record.version", "tls.record.length", "tls.handshake.type",
          "tls.handshake.version", "tls.handshake.ciphersuite", "tls.handshake.extension.type",
          "tls.handshake.extensions.supported_version", "tls.handshake.extensions_key_share_group",
          "tls.handshake.extensions_key_share_key_exchange_length", "_ws.malformed",
          "_ws.expert.severity", "tcp.srcport")

pytestmark = pytest.mark.skipif(not shutil.which("tshark"), reason="tshark is not installed: make deps-test")


def write_capture(path: Path, segments: Sequence[tuple[int, bytes]]) -> None:
    """A pcap file of one TCP connection to port 443; a segment is (0 from the client or 1 from the server, bytes)."""
    packets, numbers, names = [], [1000, 5000], ((40_000, b"\x0a\0\0\1"), (443, b"\x0a\0\0\2"))

    def packet(side: int, flags: int, data: bytes = b"") -> None:
        (source_port, source), (target_port, target) = names[side], names[1 - side]
        tcp = struct.pack(">HHIIBBHHH", source_port, target_port, numbers[side], numbers[1 - side] if flags & 16 else 0, 0x50, flags,
                          65_000, 0, 0) + data
        packets.append(struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0, source, target) + tcp)
        numbers[side] += len(data) + (flags & 2 > 0)

    packet(0, 2), packet(1, 18), packet(0, 16)
    for side, data in segments:
        for at in range(0, len(data), 1400):
            packet(side, 24, data[at:at + 1400])
    path.write_bytes(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65_535, 101)
                     + b"".join(struct.pack("<IIII", 1, at, len(one), len(one)) + one for at, one in enumerate(packets)))


def dissect(path: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The TLS fields of what the client sent and of what the server sent, in order."""
    run = subprocess.run(["tshark", "-r", str(path), "-Y", "tls", "-T", "fields", "-E", "separator=;", "-E", "occurrence=a",
                          *(word for field in FIELDS for word in ("-e", field))], check=True, capture_output=True, text=True, timeout=120,
                         env=clean_env())
    client: dict[str, list[str]] = {field: [] for field in FIELDS}
    server: dict[str, list[str]] = {field: [] for field in FIELDS}
    for line in run.stdout.splitlines():
        cells = line.split(";")
        for field, text in zip(FIELDS, cells, strict=True):
            (server if cells[-1] == "443" else client)[field] += text.split(",") if text else []
    return client, server


@pytest.mark.parametrize(("name", "preferred", "answered"), [
    ("chrome", MLKEM, MLKEM), ("chrome", X25519, X25519), ("chrome-x25519", MLKEM, X25519), ("chrome-x25519", X25519, X25519),
    ("tdlib", MLKEM, MLKEM), ("tdlib", X25519, X25519)])
def test_tshark_sees_tls_13(rig: Rig, name: str, preferred: int, answered: int) -> None:
    sites.write_profile(rig.folder / "front", "www.example.com", group=preferred, suite=0x1302, order=(51, 43), flights=(3456,))
    rig.proxy({"censorship": {"tls_emulation": True, "tls_domain": "www.example.com", "tls_front_dir": str(rig.folder / "front")}})
    hello = sign_hello(bytes.fromhex(HELLOS[name]["record"]), bytes.fromhex(USERS["alice"]), int(time.time()))
    client = rig.client(hello=hello)
    client.req_pq()
    write_capture(rig.folder / "capture.pcap", [(0, hello), (1, client.raw_flight)])
    asked, said = dissect(rig.folder / "capture.pcap")
    assert asked["tls.handshake.type"] == ["1"] and not asked["_ws.malformed"]
    assert str(answered) in asked["tls.handshake.extensions_key_share_group"]
    assert said["tls.record.content_type"] == ["22", "20"] and said["tls.record.opaque_type"] == ["23"]
    assert said["tls.record.version"] == ["0x0303"] * 3
    assert said["tls.record.length"] == [str({X25519: 122, MLKEM: 1210}[answered]), "1", "3456"]
    assert (said["tls.handshake.type"], said["tls.handshake.version"]) == (["2"], ["0x0303"])
    assert said["tls.handshake.ciphersuite"] == ["0x1302"] and said["tls.handshake.extensions.supported_version"] == ["0x0304"]
    assert said["tls.handshake.extension.type"] == ["51", "43"]
    assert said["tls.handshake.extensions_key_share_group"] == [str(answered)]
    assert said["tls.handshake.extensions_key_share_key_exchange_length"] == [str({X25519: 32, MLKEM: 1120}[answered])]
    assert not said["_ws.malformed"] and not said["_ws.expert.severity"], said
