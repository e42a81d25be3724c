"""Room 8: PROXY headers in and out."""
import pytest

from telemt import PROXY_HEAD_MAX, Reason, WireError, build_proxy_header, parse_proxy_header
from tests.cases import load_vector

VECTORS = load_vector("proxy-protocol")
# The text (D4: close as soon as the bytes fit neither signature) is stricter than this vector, which waits for 16 bytes.
EARLIER = {"not-proxy-short"}


def verdict(data, step=0):
    """("ok", header) | ("bad", bytes it took) | ("need_more", None); fed at once, or `step` bytes more each time."""
    for size in range(step, len(data), step) if step else ():
        try:
            header = parse_proxy_header(data[:size])
        except WireError as error:
            assert error.reason is Reason.PROXY_INVALID
            return "bad", size
        if header is not None and header.size <= size:
            return "ok", header
    try:
        header = parse_proxy_header(data)
    except WireError as error:
        assert error.reason is Reason.PROXY_INVALID
        return "bad", len(data)
    return ("need_more", None) if header is None or header.size > len(data) else ("ok", header)


@pytest.mark.parametrize("case", VECTORS["parse"], ids=lambda case: case["name"])
@pytest.mark.parametrize("step", [0, 1, 7], ids=["whole", "bytewise", "sevens"])
def test_parse_vectors(case, step):
    word, header = verdict(bytes.fromhex(case["data"]), step)
    assert word == ("bad" if case["name"] in EARLIER else case["expect"])
    if word == "ok":
        source, destination = header.source or tuple(case["peer"]), header.destination
        assert (header.version, header.size) == (case["version"], case["consumed"])
        assert (list(source), destination and list(destination)) == (case["src"], case["dst"])


@pytest.mark.parametrize("case", VECTORS["build"], ids=lambda case: case["name"])
def test_build_vectors(case):
    ends = [end and tuple(end) for end in (case["src"], case["dst"])]
    assert build_proxy_header(case["version"], *ends).hex() == case["wire"]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("source", "destination"), [
    (("192.0.2.1", 1), ("198.51.100.1", 65_535)), (("2001:db8::1", 0), ("::1", 443)), (None, None), (("1.2.3.4", 5), ("::1", 6)),
])
def test_what_we_build_we_understand(version, source, destination):
    wire = build_proxy_header(version, source, destination)
    header = parse_proxy_header(wire + b"what follows")
    mixed = source is None or (":" in source[0]) != (":" in destination[0])
    assert header == (version, len(wire), *((None, None) if mixed else (source, destination)))


@pytest.mark.parametrize("head", [b"G", b"PROXX", b"\r\n\r\n\0\r\nQUIT\r", b"\x16\x03\x01"])
def test_a_stranger_is_refused_on_the_first_byte_that_does_not_fit(head):
    assert verdict(head, 1) == ("bad", len(head) if head[0] != 0x16 else 1)


def test_tlvs_need_not_arrive_to_be_understood():
    """65,535 bytes behind the addresses cost no memory."""
    head = bytearray(build_proxy_header(2, ("192.0.2.1", 7), ("192.0.2.2", 8)))
    head[14:16] = b"\xff\xff"
    header = parse_proxy_header(bytes(head))
    assert header.size == 16 + 65_535 and header.source == ("192.0.2.1", 7) and len(head) <= PROXY_HEAD_MAX


@pytest.mark.parametrize("line", [
    b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \r\n", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 +2\r\n", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 0x2\r\n",
    b"PROXY TCP6 fe80::1%lo ::1 1 2\r\n", b"PROXY TCP6 [::1] ::1 1 2\r\n", b"PROXY UNKNOWNX\r\n", b"PROXY  UNKNOWN\r\n",
    "PROXY TCP4 192.0.2.1 192.0.2.2 1 \u0662\r\n".encode(), b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n\r\n", b"PROXY \r\n",
])
def test_sloppy_lines_are_refused(line):
    assert verdict(line)[0] == "bad"
