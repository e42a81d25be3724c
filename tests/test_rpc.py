"""Room 9: the link protocol, byte by byte against vectors/middle-proxy.json."""
import functools
import re
from collections import deque

import pytest

import telemt
from telemt import FrameReader, FrameWriter, LinkEnds, LinkHandshake, Origin, ProxySecret, RequestHead, RouteError, RpcError, WireError
from tests.cases import BACKEND, load_vector

MIDDLE = load_vector("middle-proxy")
CHECKSUMS = {"crc32": telemt.binascii.crc32, "crc32c": telemt.crc32c}
FAULTS = MIDDLE["handshake_failures"]


def test_type_ids():
    names = {name: getattr(telemt, name) for name in MIDDLE["type_ids"] if name != "TL_PROXY_TAG"}
    assert names == {name: int(value, 16) for name, value in MIDDLE["type_ids"].items() if name != "TL_PROXY_TAG"}


@pytest.mark.parametrize("case", MIDDLE["key_selector"], ids=lambda case: case["secret_prefix"])
def test_key_selector(case):
    assert ProxySecret(bytes.fromhex(case["secret_prefix"]) + bytes(28)).selector == int(case["key_selector"], 16)


@pytest.mark.parametrize("case", MIDDLE["proxy_secret_len"], ids=lambda case: f"{case['len']}/{case['max_len']}")
def test_secret_size(case):
    if case["expect"] == "ok":
        telemt.check_secret_size(case["len"], case["max_len"])
        return
    with pytest.raises(WireError) as caught:
        telemt.check_secret_size(case["len"], case["max_len"])
    assert str(caught.value) == case["expect"]


@pytest.mark.parametrize("case", MIDDLE["kdf"], ids=lambda case: case["name"])
def test_key_derivation(case):
    ends = LinkEnds(case["client_ip"], case["client_port"], case["server_ip"], case["server_port"])
    nonces = bytes.fromhex(case["nonce_srv"]), bytes.fromhex(case["nonce_clt"])
    for purpose in ("client", "server"):
        material = telemt.key_material(purpose.upper().encode(), *nonces, case["client_ts"], ends, bytes.fromhex(case["secret"]))
        assert material.hex() == case[purpose]["prekey"]
        key, iv = telemt.derive_link_key(material)
        assert (key.hex(), iv.hex()) == (case[purpose]["key"], case[purpose]["iv"])


@pytest.mark.parametrize("case", MIDDLE["kdf_address_selection"], ids=lambda case: case["name"])
def test_which_addresses_enter_the_keys(case):
    endpoint = tuple(case["me_endpoint"])
    family = "6" if ":" in endpoint[0] else "4"
    nat = case["nat_ip_config"] or ""
    choose = functools.partial(
        telemt.choose_link_ends, endpoint, tuple(case["socket_local"]), socks=case["route"] != "direct",
        bound=tuple(case["socks_bound"]) if case["socks_bound"] else None, nat_ip=nat if (":" in nat) == (family == "6") else "",
        detected=case["detected_public"].get(family, ""), strict=case["policy"] == "strict")
    if "reject" in case["expect"]:
        with pytest.raises(RouteError, match=re.escape(case["expect"]["reject"])):
            choose()
        return
    ends = choose()
    assert ends._asdict() == {**case["expect"], "compat": case["policy"] == "compat"}


def test_our_address_prefers_what_is_configured():
    assert telemt.our_address("10.0.0.1", "51.15.1.1", "93.184.216.34") == "51.15.1.1"
    assert telemt.our_address("10.0.0.1", "", "93.184.216.34") == "93.184.216.34"
    assert telemt.our_address("93.184.216.1", "", "93.184.216.34") == "93.184.216.1"
    assert telemt.our_address("10.0.0.1", "", "") == "10.0.0.1"


# -- frames

def spans(reader, data):
    """Payloads that a reader finds in `data`, and what it leaves."""
    view = memoryview(bytearray(data))
    found, at = reader.spans(view, 0, len(view))
    return [bytes(view[start:start + size]) for start, size in found], len(view) - at


@pytest.mark.parametrize("case", MIDDLE["codec_decode"], ids=lambda case: case["name"])
def test_decode(case):
    reader = FrameReader(case["first_seq"], CHECKSUMS[case["crc"]])
    found, left = spans(reader, bytes.fromhex(case["plaintext"]))
    frames = [event for event in case["expect"] if "frame" in event]
    faults = [event for event in case["expect"] if "error" in event]
    assert [payload.hex() for payload in found] == [event["frame"] for event in frames]
    if not faults:
        assert reader.failed is None and left == case["leftover"]
        return
    assert f"bad_{reader.failed.kind}" == faults[0]["error"]
    if "got" in faults[0]:
        assert str(reader.failed) == f"Expected seq={faults[0]['expected']}, got {faults[0]['got']}"
    if "value" in faults[0]:
        assert str(reader.failed) == f"Bad RPC frame length: {faults[0]['value']}"


@pytest.mark.parametrize("case", MIDDLE["codec_encode"], ids=lambda case: f"{case['name']}")
def test_encode(case):
    payload = bytes.fromhex(case["payload"])
    frame = FrameWriter(case["seq"], CHECKSUMS[case["crc"]]).frame(payload)
    assert frame.hex() == case["frame"]
    assert (frame + telemt.padding(len(frame))).hex() == case["padded"]
    out = []
    queue = deque([(payload[:4], payload[4:])])
    assert FrameWriter(case["seq"], CHECKSUMS[case["crc"]]).add(out, queue, 1) == len(frame) and b"".join(out) == frame and not queue


def test_incomplete_frame_tells_what_it_needs():
    frame = FrameWriter(0).frame(bytes(100))
    reader = FrameReader()
    assert spans(reader, frame[:50]) == ([], 50) and reader.needs == 112
    assert spans(reader, frame[:3]) == ([], 3) and reader.needs == 0
    assert spans(reader, frame)[0] == [bytes(100)] and reader.needs == 0


def test_sequence_numbers_wrap_as_signed():
    writer = FrameWriter(0x7FFF_FFFF)
    assert spans(FrameReader(0x7FFF_FFFF), writer.frame(b"abcd") + writer.frame(b"efgh"))[0] == [b"abcd", b"efgh"]


# -- handshake

def origin_of(case_or_nonce, offer=False, pid=4321, start=1_699_990_000):
    return Origin(BACKEND, lambda size: bytes.fromhex(case_or_nonce), pid, start, telemt.crc32c if offer else None)


def steps_of(case, direction):
    return [step for step in case["steps"] if step["dir"] == direction]


@pytest.mark.parametrize("size", [1, 7, 16, 17, 10_000])
@pytest.mark.parametrize("case", MIDDLE["exchanges"], ids=lambda case: case["name"])
def test_exchange(case, size):
    kdf = case["kdf"]
    ends = LinkEnds(kdf["client_ip"], kdf["client_port"], kdf["server_ip"], kdf["server_port"])
    offered = int(case["client_handshake_flags"], 16) != 0
    machine = LinkHandshake(origin_of(case["nonce_clt"], offered), ProxySecret(bytes.fromhex(case["secret"])), ends, case["client_ts"])
    sent = machine.open()
    wire = bytes.fromhex(case["s2c_wire"])
    at = 0
    while not machine.done:
        sent += machine.feed(wire[at:at + size])
        at += size
    ours, theirs = steps_of(case, "c2s"), steps_of(case, "s2c")
    assert sent.hex() == "".join(step["wire"] for step in ours[:2])
    # the encrypted stream goes on where the handshake stopped, whatever came with it
    plain, cipher = machine.take_rest()
    cipher += wire[at:]
    plain += machine.decryptor.update(cipher)
    reader = FrameReader(0, machine.checksum)
    found, left = spans(reader, plain)
    wanted = [frame for step in theirs[1:] for frame in step.get("frames", [step])]
    assert [payload.hex() for payload in found] == [frame["payload"] for frame in wanted][1:] and left == 0 and reader.failed is None
    writer = FrameWriter(0, machine.checksum)
    for step in ours[2:]:
        plain = b"".join(writer.frame(bytes.fromhex(frame["payload"])) for frame in step.get("frames", [step]))
        assert machine.encryptor.update(plain + telemt.padding(len(plain))).hex() == step["wire"]


@pytest.mark.parametrize("size", [1, 10_000])
@pytest.mark.parametrize("case", FAULTS["cases"], ids=lambda case: case["name"])
def test_handshake_fault(case, size):
    ends = LinkEnds(FAULTS["client_ip"], FAULTS["client_port"], FAULTS["server_ip"], FAULTS["server_port"])
    offered = int(case.get("client_flags", "0"), 16) != 0
    machine = LinkHandshake(origin_of(FAULTS["nonce_clt"], offered), ProxySecret(bytes.fromhex(FAULTS["secret"])), ends,
                            FAULTS["client_ts"])
    if case["stage"] == "handshake":
        machine.feed(bytes.fromhex(next(other["server_wire"] for other in FAULTS["cases"] if other["name"] == "nonce_ok")))
        assert machine.keyed
    wire = bytes.fromhex(case["server_wire"])
    if case["expect"].startswith("ok"):
        for at in range(0, len(wire), size):
            machine.feed(wire[at:at + size])
        assert machine.done == (case["stage"] == "handshake") and machine.keyed
        if machine.done:
            assert machine.checksum is CHECKSUMS[case["expect"].partition(":")[2]]
        return
    with pytest.raises(RpcError) as caught:
        for at in range(0, len(wire), size):
            machine.feed(wire[at:at + size])
    text = str(caught.value)
    assert text.startswith("Invalid handshake: ")
    if "counters" in case:
        assert caught.value.kind == "rejected" and [str(caught.value.code)] == list(case["counters"]["handshake_error_codes"])
    if case["expect"] != "any handshake error":
        assert text.removeprefix("Invalid handshake: ") == case["expect"]


def test_a_peer_that_is_not_known_yet_cannot_announce_megabytes():
    """Ten seconds a phase would let each of 32 dials gather 16 MiB."""
    shake = LinkHandshake(origin_of("00" * 16), ProxySecret(bytes(128)), LinkEnds("1.2.3.4", 5, "6.7.8.9", 10), 0)
    with pytest.raises(RpcError, match="Bad RPC frame length: 4100"):
        shake.feed((4100).to_bytes(4, "little"))


def test_no_secret_in_the_repr_of_an_error():
    machine = LinkHandshake(origin_of("00" * 16), ProxySecret(b"\xAB" * 32), LinkEnds("1.1.1.1", 1, "2.2.2.2", 2), 0)
    with pytest.raises(RpcError) as caught:
        machine.feed(bytes(12))
    assert "abab" not in repr(caught.value).lower()


# -- requests

@pytest.mark.parametrize("case", MIDDLE["proxy_req"], ids=lambda case: case["name"])
def test_proxy_req(case):
    tag = None if case["ad_tag"] is None else bytes.fromhex(case["ad_tag"])
    head = RequestHead(case["transport"], int(case["conn_id"], 16), tuple(case["client"]), tuple(case["our"]), tag)
    data = bytes.fromhex(case["data"])
    built = head.build(data, case["quickack"])
    assert (built + data).hex() == case["payload"]
    assert len(built) == (56 if tag is None else 84)
    assert len(built) + telemt.CLIENT_FRAME_MAX + telemt.RPC_FRAME_MIN <= telemt.RPC_FRAME_MAX


def test_close_conn():
    assert telemt.build_close(0x1122334455667788).hex() == "5d42cf1f8877665544332211"


# -- lists

@pytest.mark.parametrize("case", MIDDLE["proxy_config"], ids=lambda case: case["name"])
def test_proxy_config(case):
    found = telemt.parse_proxy_config(case["text"], case["family"])
    wanted = case["expect"]
    assert {str(dc): [list(target) for target in listed] for dc, listed in found.endpoints.items()} == wanted["map"]
    assert (found.default_dc, found.lines, bool(found.endpoints)) == (wanted["default_dc"], wanted["proxy_for_lines"], wanted["usable"])


@pytest.mark.parametrize("case", MIDDLE["proxy_config"], ids=lambda case: case["name"])
def test_proxy_config_mirrored(case):
    """A number that is listed with one sign only serves the other one too."""
    found = telemt.parse_proxy_config(case["text"], case["family"]).endpoints
    joined = telemt.ProxyMap(found if case["family"] == 4 else {}, found if case["family"] == 6 else {}, 2, (case["family"],))
    wanted = {int(dc): frozenset(map(tuple, listed)) for dc, listed in case["expect"]["mirrored_map"].items()}
    assert {dc: joined.exact(dc) for dc in wanted} == wanted
    assert {dc for group in joined.groups for dc in (group, -group) if joined.exact(dc)} == set(wanted)


@pytest.mark.parametrize(("text", "wanted"), [
    ("default 0; default 3", 0), ("default 32768; default -32769; default 4", 4), ("default -32768", -32768),
    ("default 32767; default 2", 32767),
])
def test_the_default_of_a_list_is_a_dc(text, wanted):
    """middle-proxy-wire.md D2: -32768..32767 as in proxy_for; 0 stands for none."""
    assert telemt.parse_proxy_config(text, 4).default_dc == wanted


def test_a_list_is_read_so_far_and_no_further():
    """128 endpoints and 2,048 directives; a duplicate is a line and no endpoint."""
    row = "proxy_for 2 10.0.{}.{}:80;"
    whole = telemt.parse_proxy_config("".join(row.format(n >> 8, n & 255) for n in range(128)) * 2 + "default 3", 4)
    assert (len(whole.endpoints[2]), whole.lines, whole.default_dc, whole.cut) == (128, 256, 3, False)
    assert telemt.parse_proxy_config("".join(row.format(n >> 8, n & 255) for n in range(129)), 4).cut
    for text in ("x;" * 500_000, "x\n" * 500_000):
        long = telemt.parse_proxy_config("proxy_for 2 10.0.0.1:80;" + text + "proxy_for 3 10.0.0.2:80", 4)
        assert set(long.endpoints) == {2} and long.cut


def test_builtin_lists_cover_every_dc():
    for family in (4, 6):
        assert sorted(telemt.builtin_list(family).endpoints) == [-5, -4, -3, -2, -1, 1, 2, 3, 4, 5]
