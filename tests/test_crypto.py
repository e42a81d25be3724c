"""Room 3: AES of every backend, the choice between them, X25519 points, keyed HMAC."""
import ctypes.util
import hashlib
import hmac
import importlib
import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import telemt
from telemt import ConfigError, InternalError, KeyedHmac, Region, make_x25519_public, pick_backend

NAMES = ("cryptography", "libcrypto", "pycryptodome", "python")
MODULES = {"cryptography": "cryptography", "libcrypto": "ctypes", "pycryptodome": "Crypto"}      # what a backend cannot do without
KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
PLAIN = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
                      "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710")
CTR_IV, CTR = bytes(range(0xF0, 0x100)), bytes.fromhex(
    "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c52b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6")
CBC_IV, CBC = bytes(range(16)), bytes.fromhex(
    "f58c4c04d6e5f1ba779eabfb5f7bfbd69cfc4e967edb808d679f777bc6702c7d39f23369a9d9bacfa530e26304231461b2eb05e2c39be9fcda6c19078c6a9d1b")
P = 2**255 - 19


@pytest.fixture(params=NAMES)
def backend(request):
    """Each backend that loads here."""
    try:
        return pick_backend(request.param)
    except ConfigError as error:
        pytest.skip(str(error))


def counter_block(number):
    return (number % 2**128).to_bytes(16, "big")


# -- AES

@pytest.mark.parametrize("cuts", [(), (1,), (16,), (17, 18), (16, 32, 48)])
def test_nist_ctr(backend, cuts):
    cipher = backend.ctr(KEY, CTR_IV)
    points = [0, *cuts, 64]
    assert b"".join(cipher.update(PLAIN[start:stop]) for start, stop in zip(points, points[1:], strict=False)) == CTR
    assert backend.ctr(KEY, CTR_IV).update(CTR) == PLAIN


@pytest.mark.parametrize("cuts", [(), (16,), (16, 32, 48)])
def test_nist_cbc(backend, cuts):
    points = [0, *cuts, 64]
    for make, given, wanted in ((backend.cbc_encryptor, PLAIN, CBC), (backend.cbc_decryptor, CBC, PLAIN)):
        cipher = make(KEY, CBC_IV)
        assert b"".join(cipher.update(given[start:stop]) for start, stop in zip(points, points[1:], strict=False)) == wanted


def test_fips_197_example(backend):
    """FIPS-197 C.3, one block of AES-256, through both modes."""
    key, block = bytes(range(32)), bytes.fromhex("00112233445566778899aabbccddeeff")
    coded = bytes.fromhex("8ea2b7ca516745bfeafc49904b496089")
    assert backend.cbc_encryptor(key, bytes(16)).update(block) == coded
    assert backend.cbc_decryptor(key, bytes(16)).update(coded) == block
    assert backend.ctr(key, block).update(bytes(16)) == coded


def test_update_takes_any_buffer(backend):
    for kind in (bytes, bytearray, memoryview):
        result = backend.ctr(KEY, CTR_IV).update(kind(PLAIN))
        assert (result, type(result)) == (CTR, bytes)
    cipher = backend.ctr(KEY, CTR_IV)
    assert cipher.update(b"") == b"" and cipher.update(PLAIN) == CTR


@pytest.mark.parametrize("memory", [lambda: bytearray(4096), lambda: mmap.mmap(-1, 4096)], ids=["bytearray", "mmap"])
def test_crypt_moves_and_works_in_place(backend, memory):
    """client-protocol 6.7: payloads are decrypted from where they lie to their place in one run."""
    source, target = backend.region(memory()), backend.region(memory())
    assert source.size == 4096
    source.view[100:164] = PLAIN
    target.view[:] = b"\xaa" * 4096
    cipher = backend.ctr(KEY, CTR_IV)
    cipher.crypt(source, 100, target, 7, 21)
    cipher.crypt(source, 121, target, 28, 0)
    cipher.crypt(source, 121, target, 28, 43)
    assert bytes(target.view) == b"\xaa" * 7 + CTR + b"\xaa" * (4096 - 71)
    cipher = backend.ctr(KEY, CTR_IV)
    cipher.crypt(target, 7, target, 7, 64)
    assert bytes(target.view[7:71]) == PLAIN
    cipher = backend.cbc_encryptor(KEY, CBC_IV)
    cipher.crypt(source, 100, source, 1000, 48)
    cipher.crypt(source, 148, source, 1048, 16)
    assert bytes(source.view[1000:1064]) == CBC
    backend.cbc_decryptor(KEY, CBC_IV).crypt(source, 1000, source, 1000, 64)
    assert bytes(source.view[1000:1064]) == PLAIN


def test_small_messages_through_one_cipher_and_two(backend):
    """Wherever the result lies, it is the next piece of the same stream."""
    source, target = backend.region(bytearray(256)), backend.region(bytearray(256))
    source.view[100:164] = PLAIN
    cipher, other, same = (backend.ctr(KEY, CTR_IV) for _ in range(3))
    assert bytes(cipher.take(source, 100, 21, target)) + bytes(cipher.take(source, 121, 43, target)) == CTR
    assert bytes(other.recrypt(same, source, 100, 64, target)) == PLAIN and bytes(source.view[100:164]) == PLAIN


def test_output_may_end_with_the_slack(backend):
    region = backend.region(bytearray(PLAIN + bytes(telemt.CRYPT_SLACK)))
    backend.ctr(KEY, CTR_IV).crypt(region, 0, region, 0, 64)
    assert bytes(region.view) == CTR + bytes(telemt.CRYPT_SLACK)


def test_a_region_made_by_hand_will_do(backend):
    """libcrypto finds out where regions lie when it first sees them."""
    source, target = Region(bytearray(PLAIN)), Region(bytearray(96))
    backend.ctr(KEY, CTR_IV).crypt(source, 0, target, 3, 64)
    assert bytes(target.view[3:67]) == CTR
    assert [region.address is not None for region in (source, target)] == [backend.name == "libcrypto"] * 2


def test_counter_wraps(backend):
    """The block after ff..ff is 00..00, not an error and not a carry into nowhere."""
    blocks = [backend.ctr(KEY, counter_block(number)).update(bytes(16)) for number in range(-3, 4)]
    assert backend.ctr(KEY, counter_block(-3)).update(bytes(7 * 16)) == b"".join(blocks)
    cipher = backend.ctr(KEY, b"\xff" * 16)
    assert cipher.update(bytes(16)) + cipher.update(bytes(16)) == b"".join(blocks[2:4])


@pytest.mark.parametrize("start", [-1, -700, -1024, 5 * 1024 - 1, 2**64 - 100, 2**127 - 333, 12345])
def test_long_streams_cross_every_kind_of_carry(backend, start):
    """The pure keystream comes in batches; each block must be the one that its counter makes alone."""
    stream = backend.ctr(KEY, counter_block(start)).update(bytes(2000 * 16))
    for index in (0, 1, 99, 100, 332, 333, 699, 700, 895, 896, 1023, 1024, 1791, 1792, 1999):
        assert stream[16 * index:16 * index + 16] == backend.ctr(KEY, counter_block(start + index)).update(bytes(16)), index


# -- the choice

def test_unknown_word_names_the_allowed_ones():
    with pytest.raises(ConfigError, match="TELEMT_CRYPTO must be one of cryptography, libcrypto, pycryptodome, python, not 'openssl'"):
        pick_backend("openssl")


def test_forced_backend_or_nothing(backend):
    assert pick_backend(backend.name).name == backend.name


def blocked(monkeypatch, *names):
    for name in names:
        for module in [module for module in sys.modules if module == name or module.startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_forced_backend_that_does_not_load(monkeypatch, name):
    blocked(monkeypatch, MODULES[name])
    told = []
    with pytest.raises(ConfigError, match=f"TELEMT_CRYPTO={name}: .*{MODULES[name]}"):
        pick_backend(name, told.append)
    assert len(told) == 1 and told[0].startswith(f"crypto backend {name}: ")


RUN = """
import sys
for name in sys.argv[1:]: sys.modules[name] = None
import telemt
told = []
print(telemt.pick_backend("", told.append).name, *[text.split()[2] for text in told])
print(*[name for name in ("ctypes", "Crypto") if sys.modules.get(name)])
"""


def choice(*without):
    root = str(Path(telemt.__file__).parent)
    run = subprocess.run([sys.executable, "-c", RUN, *without], check=False, capture_output=True, text=True, cwd=root, timeout=60,
                         env={**os.environ, "PYTHONPATH": root})
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


def test_order_of_fallback():
    """platform.md 3, and nothing that was not reached is loaded."""
    for need in ("cryptography", "Crypto", "ctypes"):
        pytest.importorskip(need)
    if not ctypes.util.find_library("crypto"):
        pytest.skip("no libcrypto here")
    assert choice() == ["cryptography"]
    assert choice("cryptography") == ["libcrypto", "cryptography:", "ctypes"]
    assert choice("cryptography", "ctypes", "Crypto") == ["python", "cryptography:", "libcrypto:", "pycryptodome:"]
    # pycryptodome itself wants cffi or ctypes, so libcrypto has to fail otherwise: next test


class Broken(telemt.PythonBackend):
    """Dies at the second piece."""

    def ctr(self, key, iv):
        class Cipher(telemt._SoftCtr):
            def update(self, data):
                if self._counter != int.from_bytes(iv, "big"):
                    raise ValueError("second piece")
                return super().update(data)
        return Cipher(key, iv)


class WrongInPlace(telemt.PythonBackend):
    """update() is right, crypt() is not."""

    def cbc_decryptor(self, key, iv):
        class Cipher(telemt._SoftCbcDecryptor):
            def crypt(self, source, at, target, to, size):
                super().crypt(source, at, target, to, size)
                target.view[to + size] ^= 1  # touches a spare byte
        return Cipher(key, iv)


class WrongAnswer(telemt.PythonBackend):
    """The second block of CBC encryption is wrong."""

    def cbc_encryptor(self, key, iv):
        class Cipher(telemt._SoftCbcEncryptor):
            def update(self, data):
                result = super().update(data)
                return result[:16] + bytes(len(result) - 16)
        return Cipher(key, iv)


class Panic(BaseException):
    """What pyo3 raises: no Exception."""


def panics():
    raise Panic("Python API call failed")


def test_a_backend_that_fails_its_test_is_passed_over(monkeypatch):
    told = []
    table = {"panic": panics, "answer": WrongAnswer, "wrong": WrongInPlace, "broken": Broken, "python": telemt.PythonBackend}
    monkeypatch.setattr(telemt, "_BACKENDS", table)
    assert type(pick_backend("", told.append)) is telemt.PythonBackend
    assert told == ["crypto backend panic: Panic: Python API call failed",
                    "crypto backend answer: InternalError: AES-256-CBC encryption self-test failed",
                    "crypto backend wrong: InternalError: AES-256-CBC decryption self-test in place failed",
                    "crypto backend broken: ValueError: second piece"]
    with pytest.raises(ConfigError, match="TELEMT_CRYPTO=answer: crypto backend answer: InternalError"):
        pick_backend("answer")


def test_keyboard_interrupt_is_not_a_reason_to_go_on(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt
    monkeypatch.setattr(telemt, "_BACKENDS", {"a": interrupted, "b": telemt.PythonBackend})
    with pytest.raises(KeyboardInterrupt):
        pick_backend()


def test_warning_text():
    assert telemt.PURE_PYTHON_WARNING == ("no AES library found: pure-Python AES is thousands of times slower; "
                                          "install python3-cryptography or python3-ctypes with libopenssl")


# -- libcrypto

@pytest.fixture
def libcrypto():
    try:
        return pick_backend("libcrypto")
    except ConfigError as error:
        pytest.skip(str(error))


def test_libcrypto_names_in_order(monkeypatch):
    """find_library comes last: it starts subprocesses."""
    tried = []

    def load(name):
        tried.append(name)
        if name != "found.so":
            raise OSError(name)
        return name
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: {"crypto": "found.so"}[name])
    assert telemt._open_libcrypto(load) == "found.so"
    assert tried == ["libcrypto.so.3", "libcrypto.so.1.1", "libcrypto.so", "/opt/lib/libcrypto.so.3", "/opt/lib/libcrypto.so.1.1",
                     "/opt/lib/libcrypto.so", "found.so"]
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(OSError, match="libcrypto not found"):
        telemt._open_libcrypto(load)


def test_libcrypto_checks_what_c_would_not(libcrypto):
    for key, iv in ((b"k" * 31, b"i" * 16), (b"k" * 32, b"i" * 15)):
        for make in (libcrypto.ctr, libcrypto.cbc_encryptor, libcrypto.cbc_decryptor):
            with pytest.raises(InternalError):
                make(key, iv)


def test_libcrypto_return_values(libcrypto):
    cipher, region = libcrypto.ctr(KEY, CTR_IV), libcrypto.region(bytearray(64))
    cipher._update = lambda *arguments: 0
    with pytest.raises(InternalError):
        cipher.update(b"x")
    with pytest.raises(InternalError):
        cipher.crypt(region, 0, region, 0, 16)
    evp = libcrypto._evp
    for name in ("new", "encrypt_init", "set_padding"):
        kept = getattr(evp, name)
        setattr(evp, name, lambda *arguments: None)
        with pytest.raises(InternalError):
            libcrypto.ctr(KEY, CTR_IV)
        setattr(evp, name, kept)


def test_libcrypto_frees_every_context(libcrypto):
    evp, living = libcrypto._evp, set()
    new, free, init = evp.new, evp.free, evp.encrypt_init

    def counted_new():
        context = new()
        living.add(context)
        return context

    def counted_free(context):
        living.remove(context)
        free(context)
    evp.new, evp.free = counted_new, counted_free
    ciphers = [make(KEY, CTR_IV) for make in (libcrypto.ctr, libcrypto.cbc_encryptor, libcrypto.cbc_decryptor)]
    assert len(living) == 3
    evp.encrypt_init = lambda *arguments: 0
    with pytest.raises(InternalError):
        libcrypto.ctr(KEY, CTR_IV)
    evp.encrypt_init = init
    assert len(living) == 3
    del ciphers
    assert not living


# -- pure Python

def multiply(a, b):
    """Product in GF(2^8), bit by bit."""
    product = 0
    for bit in range(8):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(14, 7, -1):
        if product >> bit & 1:
            product ^= 0x11B << bit - 8
    return product


def computed_sbox():
    """FIPS-197 5.1.1, by search."""
    box = []
    for byte in range(256):
        inverse = next((other for other in range(256) if multiply(byte, other) == 1), 0)
        box.append(sum((inverse >> i ^ inverse >> (i + 4) % 8 ^ inverse >> (i + 5) % 8 ^ inverse >> (i + 6) % 8 ^ inverse >> (i + 7) % 8
                        ^ 0x63 >> i) % 2 << i for i in range(8)))
    return bytes(box)


def test_sbox_circuit_for_all_bytes():
    """The 115 gates leave out the constant, which stands in the round keys."""
    box = computed_sbox()
    assert box[:4].hex() == "637c777b" and telemt._tools().encrypt.box == box
    planes = [sum((byte >> 7 - j & 1) << byte for byte in range(256)) for j in range(8)]
    forward = telemt._sliced_sbox(*planes)
    assert bytes(sum((plane >> byte & 1) << 7 - j for j, plane in enumerate(forward)) ^ 0x63 for byte in range(256)) == box
    shifted = [sum(((byte ^ 0x63) >> 7 - j & 1) << byte for byte in range(256)) for j in range(8)]
    backward = telemt._sliced_unbox(*shifted)
    unbox = bytes(sum((plane >> byte & 1) << 7 - j for j, plane in enumerate(backward)) for byte in range(256))
    assert all(unbox[box[byte]] == byte for byte in range(256)) and telemt._tools().decrypt.box == unbox


def test_counter_slices_are_the_counters():
    for start, n in ((0, 8), (5, 1024), (1016, 8), (1017, 8), (1023, 896), (2**128 - 300, 896), (2**80 - 1, 16), (2**128 - 1, 8)):
        patterns = telemt._patterns(n)
        blocks = telemt._from_slices(telemt._counter_slices(start, n, patterns), n, patterns)
        assert blocks == b"".join(counter_block(start + index) for index in range(n))


def test_slices_hold_the_bytes(rng):
    for n in (8, 40, 896):
        data, patterns = rng.randbytes(16 * n), telemt._patterns(n)
        assert telemt._from_slices(telemt._to_slices(data, n, patterns), n, patterns, mirrored=True) == data


def test_pure_cipher_keeps_little():
    """A handshake leaves less than a block behind, later calls 2 KiB, a download no more than that."""
    backend, limit = telemt.PythonBackend(), 4096
    cipher, region = backend.ctr(KEY, CTR_IV), Region(bytearray(1 << 18))
    cipher.update(bytes(64))
    assert len(cipher._spare) < 16
    for size in (128,) * 40 + (100_000, 3, 200_001, 5000):
        cipher.crypt(region, 0, region, 0, size)
        assert len(cipher._spare) + len(cipher._schedule) + len(cipher._nibbles) < limit


def test_pure_cipher_slices_what_is_long():
    """Tables for a handshake, slices for a download: by tables it would take fifteen times as long."""
    backend = telemt.PythonBackend()
    for make, sliced in ((backend.ctr, True), (backend.cbc_decryptor, True), (backend.cbc_encryptor, False)):
        cipher = make(KEY, CBC_IV)
        cipher.update(bytes(64))
        assert not cipher._nibbles
        cipher.update(bytes(4096))
        assert bool(cipher._nibbles) is sliced


def test_pure_cipher_refuses_what_is_no_block():
    backend = telemt.PythonBackend()
    for make in (backend.cbc_encryptor, backend.cbc_decryptor):
        with pytest.raises(InternalError):
            make(KEY, CBC_IV).update(bytes(17))
        with pytest.raises(InternalError):
            make(KEY[1:], CBC_IV)
    with pytest.raises(InternalError):
        backend.ctr(KEY[1:], CBC_IV)


# -- X25519

def on_curve(x):
    """True for an x of Curve25519 itself; the other half of the numbers lies on its twist."""
    return pow(x * (x * x + 486662 * x + 1), (P - 1) // 2, P) == 1


def times(scalar, x):
    """z of scalar * point, by the ladder of RFC 7748 without clamping: 0 means the neutral element."""
    x2, z2, x3, z3 = 1, 0, x, 1
    for bit in range(scalar.bit_length() - 1, -1, -1):
        swap = scalar >> bit & 1
        if swap:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        x3, z3 = (d * a + c * b) ** 2 % P, x * (d * a - c * b) ** 2 % P
        x2, z2 = a * a * b * b % P, (a * a - b * b) * (a * a + 121665 * (a * a - b * b)) % P
        if swap:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return z2


ORDER = 2**252 + 27742317777372353535851937790883648493


def check_point(share):
    x = int.from_bytes(share, "little")
    assert len(share) == 32 and x < P and on_curve(x)
    assert times(8, x) != 0 and times(ORDER, x) == 0       # of large order, in the subgroup of the base point


def test_the_ladder_of_this_file():
    assert times(ORDER, 9) == 0 and times(ORDER - 1, 9) != 0 and times(8, 1) == 0


def test_x25519_public(backend):
    shares = [backend.x25519_public(os.urandom) for _ in range(5)]
    for share in shares:
        check_point(share)
    assert len(set(shares)) == 5


def test_made_points_are_deterministic_and_never_small(rng):
    seeds = [rng.randbytes(32) for _ in range(20)] + [bytes(32), b"\1" + bytes(31), b"\xff" * 32, (P - 1).to_bytes(32, "little")]
    for seed in seeds:                       # the last ones: x = 0, 1, -1 have order 2 and 4; constant entropy must not hang
        share = make_x25519_public(lambda n, seed=seed: seed[:n])
        check_point(share)
        assert make_x25519_public(lambda n, seed=seed: seed[:n]) == share


def test_points_are_halves_of_real_exchanges():
    x25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.x25519")
    peer = x25519.X25519PublicKey.from_public_bytes(make_x25519_public(os.urandom))
    assert len(x25519.X25519PrivateKey.generate().exchange(peer)) == 32      # raises for points of small order


def test_libcrypto_without_x25519(monkeypatch):
    """1.1.0 and FIPS mode: our own arithmetic takes over."""
    def missing(_):
        raise AttributeError("EVP_PKEY_get_raw_public_key")

    monkeypatch.setattr(telemt, "_EvpKeys", missing)
    try:
        backend = pick_backend("libcrypto")
    except ConfigError as error:
        pytest.skip(f"libcrypto does not load here: {error}")
    assert backend.x25519_public(lambda n: b"\5" * n) == make_x25519_public(lambda n: b"\5" * n)


def public_way_only(monkeypatch):
    """A `cryptography` whose core has no short cut to X25519 keys; returns its public module."""
    x25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.x25519")
    x25519.X25519PrivateKey.generate()             # it has loaded all it needs
    importlib.import_module("cryptography.hazmat.primitives.serialization")
    monkeypatch.setattr(sys.modules["cryptography.hazmat.bindings._rust"], "openssl", None)
    return x25519


def test_cryptography_gives_keys_by_its_public_way_too(monkeypatch):
    public_way_only(monkeypatch)
    check_point(pick_backend("cryptography").x25519_public(os.urandom))


def test_keys_do_not_load_the_public_module():
    """It is 1.3 MB more of every process that serves FakeTLS."""
    pytest.importorskip("cryptography", "42")
    code = ("import os, sys, telemt; telemt.pick_backend('cryptography').x25519_public(os.urandom);"
            "sys.exit('cryptography.hazmat.primitives.asymmetric.x25519' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(telemt.__file__).parent, timeout=60).returncode == 0


def test_cryptography_without_x25519(monkeypatch):
    """OpenSSL in FIPS mode refuses X25519."""
    x25519 = public_way_only(monkeypatch)
    from cryptography.exceptions import UnsupportedAlgorithm
    backend = pick_backend("cryptography")

    class Refusing:
        @staticmethod
        def generate():
            raise UnsupportedAlgorithm("X25519 is not supported by this version of OpenSSL.")
    monkeypatch.setattr(x25519, "X25519PrivateKey", Refusing)
    assert backend.x25519_public(lambda n: b"\5" * n) == make_x25519_public(lambda n: b"\5" * n)


def test_cryptography_38_has_no_short_cut_to_raw_bytes(monkeypatch):
    x25519 = public_way_only(monkeypatch)
    backend, private = pick_backend("cryptography"), x25519.X25519PrivateKey

    class OldKey:
        def __init__(self, key):
            self.public_bytes = key.public_bytes

    class OldPrivate:
        @classmethod
        def generate(cls):
            return cls()

        def public_key(self):
            return OldKey(private.generate().public_key())
    monkeypatch.setattr(x25519, "X25519PrivateKey", OldPrivate)
    check_point(backend.x25519_public(os.urandom))


# -- HMAC

@pytest.mark.parametrize("key", [b"", b"k", bytes(range(16)), b"x" * 64, b"y" * 65, b"z" * 200], ids=len)
def test_keyed_hmac_is_hmac(key, rng):
    keyed = KeyedHmac(key)
    for size in (0, 1, 55, 56, 64, 517, 2000):
        message = rng.randbytes(size)
        wanted = hmac.digest(key, message, hashlib.sha256)
        assert keyed.digest(message) == wanted
        assert keyed.digest(message[:10], bytearray(message[10:20]), memoryview(message)[20:]) == wanted
    assert keyed.digest() == hmac.digest(key, b"", "sha256")


# -- ML-KEM as far as anybody can see


FOUR = {word for word in range(1024) if sum(((x << 11) + 3329) // 6658 & 1023 == word for x in range(3329)) == 4}


def four_valued(ciphertext):
    """How many of the 768 ten-bit words stand for four values mod 3329 each."""
    bits = int.from_bytes(ciphertext[:960], "little")
    return sum((bits >> 10 * index & 1023) in FOUR for index in range(768))


def test_ciphertext_passes_where_random_bytes_do_not():
    """tls-front.md 9.3: with the threshold of 215 one share tells them apart."""
    assert len(FOUR) == 257
    rng = random.Random(3)
    shares = [telemt.make_mlkem_ciphertext(rng.randbytes) for _ in range(300)]
    assert {len(share) for share in shares} == {1088} and len(set(shares)) == 300
    assert sum(four_valued(share) >= 215 for share in shares) >= 280
    assert sum(four_valued(rng.randbytes(1088)) >= 215 for _ in range(300)) <= 20
    nibbles = [share[960 + at] >> shift & 15 for share in shares for at in range(128) for shift in (0, 4)]
    counts = [nibbles.count(value) for value in range(16)]       # 16 * 208 values, and the one that rounds to 0 twice
    assert max(counts) - min(counts) < 0.08 * len(nibbles) / 16


def test_ciphertext_looks_like_genuine_ones():
    mlkem = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.mlkem", reason="this cryptography has no ML-KEM")
    try:
        public = mlkem.MLKEM768PrivateKey.generate().public_key()
    except Exception as error:
        pytest.skip(f"its libcrypto has no ML-KEM: {error}")
    genuine = [four_valued(public.encapsulate()[1]) for _ in range(200)]
    ours = [four_valued(telemt.make_mlkem_ciphertext(random.Random(seed).randbytes)) for seed in range(200)]
    assert abs(sum(genuine) - sum(ours)) / 200 < 6               # of 237; random bytes have 193


@pytest.mark.parametrize("seed", range(5))
def test_encapsulation_key_is_taken_by_a_library(seed):
    mlkem = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.mlkem", reason="this cryptography has no ML-KEM")
    key = telemt.make_mlkem_key(random.Random(seed).randbytes)
    values = [(key[at] | key[at + 1] << 8 | key[at + 2] << 16) >> shift & 4095 for at in range(0, 1152, 3) for shift in (0, 12)]
    assert len(key) == 1184 and max(values) < 3329
    _, ciphertext = mlkem.MLKEM768PublicKey.from_public_bytes(key).encapsulate()
    assert len(ciphertext) == 1088
