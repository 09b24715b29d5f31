import hashlib
import tracemalloc

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from fedmed_flower.errors import InputError
from fedmed_flower.secure import streams
from fedmed_flower.secure.encoding import SecureError, encoded
from fedmed_flower.secure.streams import (
    LABEL,
    SUITE,
    add_stream,
    add_streams,
    agreed_key,
    commitment,
    envelope_key,
    expanded,
    pair_seed,
    stream_key,
)

SEED = bytes(range(16))
SALT = bytes(range(32))
WORDS = [np.uint32, np.uint64]


def key_of(number):
    return X25519PrivateKey.from_private_bytes(bytes([number]) * 32)


def public_of(number):
    return key_of(number).public_key().public_bytes_raw()


def plain_stream(key, length):
    return Cipher(AES(key), CTR(bytes(16))).encryptor().update(bytes(length))


# RFC 5869, appendix A.1 to A.3: key material, salt, info, length, result.
RFC_5869 = [
    (
        b"\x0b" * 22,
        bytes(range(13)),
        bytes(range(0xF0, 0xFA)),
        42,
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(80)),
        bytes(range(0x60, 0xB0)),
        bytes(range(0xB0, 0x100)),
        82,
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c6"
        "5e590e09da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        b"\x0b" * 22,
        b"",
        b"",
        42,
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]


@pytest.mark.parametrize(("material", "salt", "info", "length", "expected"), RFC_5869)
def test_the_two_halves_of_hkdf_are_those_of_rfc_5869(material, salt, info, length, expected):
    prk = HKDF.extract(SHA256(), salt, material)
    assert HKDFExpand(SHA256(), length, info).derive(prk).hex() == expected
    assert HKDF(SHA256(), length, salt, info).derive(material).hex() == expected


@pytest.mark.parametrize("secret", [b"", b"agreed by telephone"])
def test_keys_are_hkdf_of_the_key_agreement(secret):
    shared = key_of(1).exchange(key_of(2).public_key())
    prk = agreed_key(key_of(1), public_of(2), SALT, secret)
    assert len(prk) == 32
    about = encoded([LABEL, "pair", "north", "south", 3])
    whole = HKDF(SHA256(), 40, SALT + secret, about).derive(shared)
    assert expanded(prk, "pair", "north", "south", 3, 40) == whole


def test_both_ends_have_the_same_pair_seed_and_envelope_keys():
    one = agreed_key(key_of(1), public_of(2), SALT, b"s")
    other = agreed_key(key_of(2), public_of(1), SALT, b"s")
    assert pair_seed(one, "north", "south") == pair_seed(other, "south", "north")
    assert envelope_key(one, "north", "south") == envelope_key(other, "north", "south")
    assert len(pair_seed(one, "north", "south")) == len(envelope_key(one, "a", "b")) == 16


def test_no_two_uses_have_the_same_key():
    prk = agreed_key(key_of(1), public_of(2), SALT)
    others = [
        agreed_key(key_of(1), public_of(3), SALT),
        agreed_key(key_of(1), public_of(2), bytes(32)),
        agreed_key(key_of(1), public_of(2), SALT, b"s"),
    ]
    keys = [pair_seed(key, "north", "south") for key in (prk, *others)]
    keys += [pair_seed(prk, "north", "west"), pair_seed(prk, "north", "southwest")]
    keys += [pair_seed(prk, "norths", "outh")]
    keys += [envelope_key(prk, "north", "south"), envelope_key(prk, "south", "north")]
    keys += [stream_key(keys[0], 0), stream_key(keys[0], 1), stream_key(keys[1], 0)]
    assert len(set(keys)) == len(keys)


# All points of low order on the curve and its twist, with their encodings beyond 2^255 - 19: see
# D. J. Bernstein, https://cr.yp.to/ecdh.html, "validate".
PRIME = 2**255 - 19
EIGHTH = 0xB8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0
OTHER_EIGHTH = 0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F
LOW = [0, 1, EIGHTH, OTHER_EIGHTH, PRIME - 1, PRIME, PRIME + 1]


@pytest.mark.parametrize("point", LOW)
@pytest.mark.parametrize("top", [0, 2**255])
def test_points_whose_result_everybody_knows_are_refused(point, top):
    with pytest.raises(SecureError, match="no point of low order"):
        agreed_key(key_of(1), (point + top).to_bytes(32, "little"), SALT)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_what_is_no_key_is_refused(length):
    with pytest.raises(SecureError, match=f"^{length} bytes that are no X25519 key"):
        agreed_key(key_of(1), b"\1" * length, SALT)


def test_short_salts_and_keys_are_refused():
    # Otherwise a salt that ends in the first bytes of a secret would give the key of another pair.
    with pytest.raises(InputError, match="salt of a key must be 32 bytes long, got 31"):
        agreed_key(key_of(1), public_of(2), SALT[:-1], SALT[-1:])
    with pytest.raises(InputError, match="key must be at least 16 bytes long, got 15"):
        stream_key(SEED[:-1], 0)


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("words", [0, 1, 3, 2**16, 2**17, 2**17 + 1, 150_001])
def test_a_stream_is_the_plain_keystream_added(dtype, words):
    start = np.random.default_rng(1).integers(2**32, size=words, dtype=dtype)
    start[-1:] = np.iinfo(dtype).max
    vector = start.copy()
    add_stream(vector, SEED, 1)
    size = np.dtype(dtype).itemsize
    stream = plain_stream(stream_key(SEED, 1), words * size)
    numbers = [int.from_bytes(stream[i : i + size], "little") for i in range(0, len(stream), size)]
    modulus = 2 ** (8 * size)
    sums = [(int(a) + b) % modulus for a, b in zip(start, numbers, strict=True)]
    assert vector.tolist() == sums
    add_stream(vector, SEED, 1, subtract=True)
    assert np.array_equal(vector, start)


def test_a_stream_continues_over_blocks(monkeypatch):
    whole = np.zeros((1000, 3), np.uint32)
    add_stream(whole, SEED, 0)
    monkeypatch.setattr(streams, "_BLOCK_BYTES", 112)
    parts = np.zeros(3000, np.uint32)
    add_stream(parts, SEED, 0)
    assert np.array_equal(whole.reshape(-1), parts)


@pytest.mark.parametrize("dtype", WORDS)
def test_many_streams_in_one_pass_are_those_of_many(dtype, monkeypatch):
    monkeypatch.setattr(streams, "_BLOCK_BYTES", 112)
    seeds = [bytes([number]) * 16 for number in range(5)]
    one_by_one = np.arange(1000, dtype=dtype)
    together = one_by_one.copy()
    for seed in seeds:
        add_stream(one_by_one, seed, 1, subtract=seed in seeds[3:])
    add_streams(together, seeds[:3], seeds[3:], 1)
    assert np.array_equal(one_by_one, together)
    add_streams(together, seeds[3:], seeds[:3], 1)
    assert np.array_equal(together, np.arange(1000))


def test_a_long_stream_takes_the_memory_of_one_block():
    vector = np.zeros(4_000_000, np.uint32)
    tracemalloc.start()
    add_stream(vector, SEED, 0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1_000_000


def test_streams_of_two_vectors_share_no_bytes():
    vectors = [np.zeros(10_000, np.uint64) for _ in range(3)]
    add_stream(vectors[0], SEED, 0)
    add_stream(vectors[1], SEED, 1)
    add_stream(vectors[2], SEED[::-1], 0)
    assert len(set(np.concatenate(vectors).tolist())) == 30_000


def read_only(vector):
    vector.flags.writeable = False
    return vector


@pytest.mark.parametrize(
    ("vector", "text"),
    [
        (np.zeros(4, np.int32), "must be of uint32 or uint64, got int32"),
        (np.zeros(4, np.float64), "got float64"),
        (np.zeros(4, np.uint16), "got uint16"),
        (np.zeros(4, np.dtype(np.uint32).newbyteorder()), "must be of uint32 or uint64"),
        (np.zeros(4, np.uint32)[::2], "must be contiguous"),
        (np.zeros((4, 2), np.uint64).T, "must be contiguous"),
        (read_only(np.zeros(4, np.uint32)), "is read-only; copy it"),
    ],
)
def test_vectors_that_cannot_be_changed_in_place_are_refused(vector, text):
    with pytest.raises(InputError, match=text):
        add_stream(vector, SEED, 0)
    assert not vector.any()


def test_a_commitment_is_the_same_from_both_ends():
    content = encoded([LABEL, "commitment", "pair", "north", "south", SEED])
    expected = hashlib.new("sha512_256", content).digest()
    assert commitment(SEED, "pair", "north", "south") == expected
    assert commitment(SEED, "pair", "south", "north") == expected
    others = [
        commitment(SEED, "self", "north", "north"),
        commitment(SEED, "self", "south", "south"),
        commitment(SEED, "pair", "north", "west"),
        commitment(SEED[::-1], "pair", "north", "south"),
    ]
    assert len({expected, *others}) == 5


def test_the_label_names_the_format():
    assert (SUITE, LABEL) == (1, "fedmed-secure/1")
