"""Laws of room 3: however a stream is cut and wherever its bytes lie, every backend says the same, and touches nothing else."""
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import telemt
from telemt import ConfigError, pick_backend


def usable():
    """The backends that load here; the last one always does."""
    found = []
    for name in telemt._BACKENDS:
        try:
            found.append(pick_backend(name))
        except ConfigError:
            continue
    return found


BACKENDS = usable()
KEYS = st.binary(min_size=32, max_size=32)
# counters anywhere, and just below the places where a carry or the end is near
IVS = st.binary(min_size=16, max_size=16) | st.builds(
    lambda power, before: ((1 << power) - before).to_bytes(17, "big")[-16:],
    st.sampled_from((10, 11, 32, 64, 127, 128)), st.integers(1, 1000))
PIECES = st.lists(st.one_of(st.integers(0, 40), st.sampled_from((64, 128, 640, 1000, 4096)), st.integers(0, 20_000)), max_size=8)
BLOCKS = st.lists(st.one_of(st.integers(0, 8), st.sampled_from((40, 63, 64, 65, 127, 896, 1000))), max_size=6)


def pattern(size):
    """Bytes that are all alike in no stretch of 16."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def pieces_of(data, sizes):
    at = 0
    for size in sizes:
        yield data[at:at + size]
        at += size


def crypted(backend, cipher, data, sizes, gaps, moved):
    """What crypt() makes of `data`, cut into `sizes` that lie `gaps` apart; moved: close the gaps, in another region."""
    starts, at = [], 0
    for size, gap in zip(sizes, gaps, strict=True):
        starts.append(at + gap)
        at += gap + size
    source = backend.region(bytearray(b"\x55" * (at + telemt.CRYPT_SLACK)))
    for start, piece in zip(starts, pieces_of(data, sizes), strict=True):
        source.view[start:start + len(piece)] = piece
    before = bytes(source.view)
    target, lead = backend.region(bytearray(b"\xaa" * (len(data) + telemt.CRYPT_SLACK + 9))) if moved else source, 9
    done = 0
    for start, size in zip(starts, sizes, strict=True):
        cipher.crypt(source, start, target, lead + done if moved else start, size)
        done += size
    if moved:
        assert bytes(source.view) == before, "the source changed"
        assert bytes(target.view[:lead]) == b"\xaa" * lead and bytes(target.view[lead + done:]) == b"\xaa" * telemt.CRYPT_SLACK
        return bytes(target.view[lead:lead + done])
    after, result, end = bytes(source.view), b"", 0
    for start, size in zip(starts, sizes, strict=True):
        assert after[end:start] == b"\x55" * (start - end), "bytes between the pieces changed"
        result, end = result + after[start:start + size], start + size
    assert after[end:] == b"\x55" * telemt.CRYPT_SLACK
    return result


@given(KEYS, IVS, PIECES)
def test_ctr_is_one_stream_however_cut(key, iv, sizes):
    data = pattern(sum(sizes))
    wanted = BACKENDS[0].ctr(key, iv).update(data)
    for backend in BACKENDS:
        cipher = backend.ctr(key, iv)
        assert b"".join(cipher.update(piece) for piece in pieces_of(data, sizes)) == wanted, backend.name
        assert backend.ctr(key, iv).update(wanted) == data, backend.name


@given(KEYS, IVS, st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 20)), max_size=6), st.booleans())
def test_ctr_in_place_and_moving(key, iv, cuts, moved):
    sizes, gaps = [size for size, _ in cuts], [gap for _, gap in cuts]
    data = pattern(sum(sizes))
    wanted = BACKENDS[0].ctr(key, iv).update(data)
    for backend in BACKENDS:
        assert crypted(backend, backend.ctr(key, iv), data, sizes, gaps, moved) == wanted, backend.name


@given(KEYS, st.binary(min_size=16, max_size=16), BLOCKS)
def test_cbc_is_one_chain_however_cut(key, iv, counts):
    sizes = [16 * count for count in counts]
    data = pattern(sum(sizes))
    wanted = BACKENDS[0].cbc_encryptor(key, iv).update(data)
    for backend in BACKENDS:
        there, back = backend.cbc_encryptor(key, iv), backend.cbc_decryptor(key, iv)
        assert b"".join(there.update(piece) for piece in pieces_of(data, sizes)) == wanted, backend.name
        assert b"".join(back.update(piece) for piece in pieces_of(wanted, sizes)) == data, backend.name


@given(KEYS, st.binary(min_size=16, max_size=16), st.lists(st.tuples(st.integers(0, 100), st.integers(0, 20)), max_size=5), st.booleans())
def test_cbc_in_place_and_moving(key, iv, cuts, moved):
    sizes, gaps = [16 * count for count, _ in cuts], [gap for _, gap in cuts]
    data = pattern(sum(sizes))
    wanted = BACKENDS[0].cbc_encryptor(key, iv).update(data)
    for backend in BACKENDS:
        assert crypted(backend, backend.cbc_encryptor(key, iv), data, sizes, gaps, moved) == wanted, backend.name
        assert crypted(backend, backend.cbc_decryptor(key, iv), wanted, sizes, gaps, moved) == data, backend.name


@given(KEYS, IVS, st.integers(1, 3000), st.data())
def test_pure_batches_equal_single_blocks(key, iv, blocks, data):
    """Single blocks come from tables, long runs from bit slices: two programs that check each other where no library does."""
    backend, start = telemt.PythonBackend(), int.from_bytes(iv, "big")
    stream = backend.ctr(key, iv).update(bytes(16 * blocks))
    for index in data.draw(st.lists(st.integers(0, blocks - 1), max_size=5)):
        alone = ((start + index) % (1 << 128)).to_bytes(16, "big")
        assert stream[16 * index:16 * index + 16] == backend.ctr(key, alone).update(bytes(16))
