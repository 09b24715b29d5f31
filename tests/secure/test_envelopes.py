import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedmed_flower.secure.encoding import SecureError, encoded
from fedmed_flower.secure.envelopes import seal, unseal
from fedmed_flower.secure.streams import envelope_key

PRK = bytes(range(32))
KEY = envelope_key(PRK, "north", "south")
DIGEST = b"\7" * 32
HEADER = encoded([DIGEST, "north", "south"])
CONTENT = b"shares of two seeds"


@pytest.mark.parametrize("content", [b"", CONTENT, bytes(100_000)])
def test_content_comes_back(content):
    sealed = seal(KEY, HEADER, content)
    assert len(sealed) == 12 + len(content) + 16
    assert unseal(KEY, HEADER, sealed, "north") == content
    assert AESGCM(KEY).decrypt(sealed[:12], sealed[12:], HEADER) == content


def test_each_envelope_has_its_own_nonce():
    assert len({seal(KEY, HEADER, CONTENT)[:12] for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("key", "header"),
    [
        (KEY, encoded([b"\6" * 32, "north", "south"])),
        (KEY, encoded([DIGEST, "south", "north"])),
        (KEY, encoded([DIGEST, "north", "west"])),
        (KEY, encoded([DIGEST, "east", "south"])),
        (envelope_key(PRK, "south", "north"), HEADER),
        (envelope_key(bytes(32), "north", "south"), HEADER),
    ],
    ids=["digest", "direction", "receiver", "sender", "key of the direction", "key of the round"],
)
def test_an_envelope_opens_for_its_own_round_and_direction_only(key, header):
    sealed = seal(KEY, HEADER, CONTENT)
    with pytest.raises(SecureError, match="envelope from north does not open"):
        unseal(key, header, sealed, "north")


def test_each_bit_is_guarded():
    sealed = seal(KEY, HEADER, CONTENT)
    for bit in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SecureError, match="from north does not open: it was changed"):
            unseal(KEY, HEADER, bytes(changed), "north")


def test_an_envelope_that_was_cut_is_refused():
    sealed = seal(KEY, HEADER, CONTENT)
    for length in range(len(sealed)):
        with pytest.raises(SecureError, match="envelope from north"):
            unseal(KEY, HEADER, sealed[:length], "north")
    with pytest.raises(SecureError, match="from north is too short: 27 bytes"):
        unseal(KEY, HEADER, bytes(27), "north")
