"""Room 6: preambles, byte by byte against vectors/obfuscated2.json and dc-header.json."""
import itertools

import pytest

import telemt
from telemt import Reason, Transport, WireError, has_reserved_prefix, make_dc_preamble, parse_client_preamble
from tests.cases import load_vector

OBFUSCATED = load_vector("obfuscated2")
DC_HEADER = load_vector("dc-header")
BACKEND = telemt.pick_backend()
ALLOWED = {"classic": (Transport.ABRIDGED, Transport.INTERMEDIATE), "secure": (Transport.PADDED,)}
# need_more and tls_path are decided by the session: tests/test_session.py runs every plain case through it.
CLIENT = [case for case in OBFUSCATED["cases"] if case["direction"] == "client_to_proxy" and case["expect"] in ("accept", "reject")]


def allowed_transports(case):
    """What the modes of a case admit (client-protocol.md 5.3, D8)."""
    if case["transport"] == "tls":
        return tuple(Transport) if case["modes"]["tls"] else ()
    return tuple(itertools.chain.from_iterable(ALLOWED[mode] for mode in ALLOWED if case["modes"][mode]))


@pytest.mark.parametrize("case", CLIENT, ids=lambda case: case["name"])
def test_client_header(case):
    header = bytes.fromhex(case["header"])
    users = {name: bytes.fromhex(secret) for name, secret in OBFUSCATED["header"]["users"].items()}
    found = None
    if not (case["transport"] == "plain" and has_reserved_prefix(header[:8])):
        for name, secret in users.items():
            try:
                preamble = parse_client_preamble(header, secret, BACKEND)
            except WireError as error:
                assert error.reason is Reason.BAD_HEADER
                continue
            if preamble.transport in allowed_transports(case):
                found = name, preamble
                break
    assert (found is not None) == (case["expect"] == "accept"), case.get("reason")
    if found is None:
        return
    name, preamble = found
    assert (name, preamble.transport.word, preamble.dc) == (case["user"], case["proto"], case["dc"])
    assert preamble.replay_key.hex() == case["replay_key"]
    assert (preamble.to_client_key.hex(), preamble.to_client_iv.hex()) == (case["encrypt_key"], case["encrypt_iv"])
    assert preamble.from_client.update(bytes.fromhex(case["fwd_ciphertext"])).hex() == case["fwd_plaintext"]
    to_client = BACKEND.ctr(preamble.to_client_key, preamble.to_client_iv)
    assert to_client.update(bytes.fromhex(case["bwd_plaintext"])).hex() == case["bwd_ciphertext"]


def entropy_of(candidates):
    """An Entropy that hands out the listed draws in order."""
    draws = iter(candidates)

    def draw(size):
        data = bytes.fromhex(next(draws))
        assert len(data) == size
        return data
    return draw


@pytest.mark.parametrize("case", DC_HEADER["cases"], ids=lambda case: case["name"])
def test_dc_header(case):
    client = case["client"]
    preamble = parse_client_preamble(bytes.fromhex(client["handshake"]), bytes.fromhex(client["secret"]), BACKEND)
    assert (preamble.transport.word, preamble.dc) == (case["proto"], case["dc_idx"])
    answer_key = preamble.to_client_key + preamble.to_client_iv if case["fast_mode"] else b""
    opening = make_dc_preamble(preamble.transport, preamble.dc, BACKEND, entropy_of(case["random_candidates"]), answer_key)
    assert opening.block.hex() == case["header_to_dc"]
    assert (opening.from_dc_key.hex(), opening.from_dc_iv.hex()) == (case["tg_dec_key"], case["tg_dec_iv"])
    plain = preamble.from_client.update(bytes.fromhex(case["c2s"]["from_client"]))
    assert plain.hex() == case["c2s"]["plain"]
    assert opening.to_dc.update(plain).hex() == case["c2s"]["to_dc"]
    from_dc = bytes.fromhex(case["s2c"]["from_dc"])
    if case["fast_mode"]:
        assert opening.from_dc_key + opening.from_dc_iv == answer_key and from_dc.hex() == case["s2c"]["to_client"]
    else:
        plain = BACKEND.ctr(opening.from_dc_key, opening.from_dc_iv).update(from_dc)
        assert plain.hex() == case["s2c"]["plain"]
        assert BACKEND.ctr(preamble.to_client_key, preamble.to_client_iv).update(plain).hex() == case["s2c"]["to_client"]


@pytest.mark.parametrize(("head", "reserved"), [
    (b"\xef", True), (b"\xee" * 4, True), (b"\xee" * 3, False), (b"\xdd" * 4, True), (b"GET ", True), (b"GET", False),
    (b"POST", True), (b"HEAD", True), (b"PUT ", True), (b"DELE", True), (b"OPTI", True), (b"PATC", True), (b"CONN", True),
    (b"TRAC", True), (b"PRI ", True), (b"SSH-", True), (b"abcd\0\0\0\0", True), (b"abcd\0\0\0", False), (b"abcd\0\0\0\1", False),
    (b"\x16\x03\x01\x02", False), (b"", False),
])
def test_reserved_prefixes(head, reserved):
    assert has_reserved_prefix(head) is reserved
