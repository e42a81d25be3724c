"""An independent client: Telethon's MTProxy connections ask our data centre for a key exchange through the proxy."""
from __future__ import annotations

import asyncio
import collections
import logging
import os

import pytest

from doubles import FINGERPRINT, PQ, USERS, Rig

pytest.importorskip("telethon")

from telethon.network import MTProtoPlainSender
from telethon.network.connection import (
    ConnectionTcpMTProxyAbridged,
    ConnectionTcpMTProxyIntermediate,
    ConnectionTcpMTProxyRandomizedIntermediate,
)
from telethon.tl.functions import ReqPqMultiRequest
from telethon.tl.types import ResPQ


@pytest.mark.parametrize(("kind", "transport", "prefix"), [
    (ConnectionTcpMTProxyAbridged, "abridged", ""), (ConnectionTcpMTProxyIntermediate, "intermediate", ""),
    (ConnectionTcpMTProxyRandomizedIntermediate, "padded", ""), (ConnectionTcpMTProxyRandomizedIntermediate, "padded", "dd"),
], ids=["abridged", "intermediate", "padded", "padded-dd-secret"])
def test_telethon_gets_its_res_pq(rig: Rig, kind: type, transport: str, prefix: str) -> None:
    proxy = rig.proxy()
    loggers: dict[str, logging.Logger] = collections.defaultdict(lambda: logging.getLogger("telethon"))

    async def ask() -> tuple[int, list[ResPQ]]:
        connection = kind("unused", 0, 2, loggers=loggers, proxy=("127.0.0.1", proxy.port, prefix + USERS["bob"]))
        await connection.connect(timeout=5)
        try:
            sender = MTProtoPlainSender(connection, loggers=loggers)
            nonces = [int.from_bytes(os.urandom(16), "big", signed=True) for _ in range(5)]
            answers = [await asyncio.wait_for(sender.send(ReqPqMultiRequest(nonce)), 5) for nonce in nonces]
        finally:
            await connection.disconnect()
        return nonces, answers

    nonces, answers = asyncio.run(ask())
    assert [answer.nonce for answer in answers] == nonces
    assert {type(answer) for answer in answers} == {ResPQ}
    assert {(answer.pq, answer.server_public_key_fingerprints[0] & (1 << 64) - 1) for answer in answers} == {(PQ, FINGERPRINT)}
    assert [(peer.dc, peer.transport) for peer in rig.dc.peers] == [(2, transport)]
    proxy.wait_log(r"MTProto handshake successful .*\buser=bob\b")
