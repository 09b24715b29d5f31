"""What the server sees does not depend on the vectors but through their sum.

Streams stand for random words here. For any other vectors with the same sum there are streams with
which every byte that leaves is the same: so the bytes tell nothing else.
"""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from secure_members import ABOUT, RUN, members_of, names_of, record_of

from fedmed_flower.secure import collector as collector_module
from fedmed_flower.secure import member as member_module
from fedmed_flower.secure.book import SecureBook
from fedmed_flower.secure.collector import Collector
from fedmed_flower.secure.ring import vectors
from fedmed_flower.secure.shamir import values_at

COUNT = 4


def drawn(*parts):
    """Return 32 bytes that look random and follow from the parts."""
    return hashlib.sha256(repr(parts).encode()).digest()


class Streams:
    """Words by seed and number of the vector; some are shifted."""

    def __init__(self, shifts):
        self.shifts = shifts

    def words(self, seed, index, like):
        rng = np.random.default_rng([*seed, index])
        words = rng.integers(0, np.iinfo(like.dtype).max, like.size, like.dtype, endpoint=True)
        return words + self.shifts.get((seed, index), np.zeros_like(like))

    def add(self, vector, added, subtracted, index):
        for seed in added:
            vector += self.words(seed, index, vector)
        for seed in subtracted:
            vector -= self.words(seed, index, vector)


def split(secrets, threshold, count):
    """Cut secrets into shares by coefficients that follow from them."""
    higher = [
        np.frombuffer(drawn(secrets.tobytes(), power) * secrets.size, np.uint8)[: secrets.size]
        for power in range(1, threshold)
    ]
    rows = np.stack([secrets, *(row.reshape(secrets.shape) for row in higher)])
    return values_at(rows, range(1, count + 1))


def seal(key, header, content):
    nonce = drawn(header)[:12]
    return nonce + AESGCM(key).encrypt(nonce, content, header)


def transcript(folder, monkeypatch, values, shifts=None):
    """Return every byte that leaves the hospitals, the sum, and the seed of each pair."""
    folder.mkdir()
    streams = Streams(shifts or {})
    pairs = {}
    true_pair = member_module.pair_seed

    def pair_seed(key, one, other):
        pairs[tuple(sorted((one, other)))] = true_pair(key, one, other)
        return true_pair(key, one, other)

    left = []
    with monkeypatch.context() as patch:
        patch.setattr(member_module, "add_streams", streams.add)
        patch.setattr(collector_module, "add_streams", streams.add)
        patch.setattr(member_module, "split", split)
        patch.setattr(member_module, "seal", seal)
        patch.setattr(member_module, "pair_seed", pair_seed)
        members = members_of(folder, COUNT)
        hellos = []
        for name in names_of(COUNT):
            run_key = X25519PrivateKey.from_private_bytes(drawn("run", name))
            made = SimpleNamespace(generate=lambda run_key=run_key: run_key)
            made.from_private_bytes = X25519PrivateKey.from_private_bytes
            patch.setattr(member_module, "X25519PrivateKey", made)
            patch.setattr(SecureBook, "id", drawn("book")[:16].hex())
            members[name].trail = SimpleNamespace(append=lambda kind, about: bytes(32))
            hellos.append(members[name].hello(RUN))
        record = record_of(members, hellos=hellos)
        collector = Collector(record)
        for number, name in enumerate(record.names):
            patch.setattr(
                member_module.secrets, "token_bytes", lambda n, name=name: drawn("own", name)[:n]
            )
            words = tuple(vector.copy() for vector in values[number])
            masked = members[name].mask(record, ABOUT, ABOUT, words)
            left += [vector.tobytes() for vector in vectors(masked.words)]
            left.append(masked.letter)
            collector.add(name, masked.words, masked.letter)
        assert collector.settle()
        for name in record.names:
            answer = members[name].unmask(collector.digest, collector.envelopes_for(name))
            left.append(answer)
            collector.answer(name, answer)
        return left, collector.open(), pairs


def vectors_drawn(rng):
    return [
        (
            rng.integers(0, 2**32, 5, np.uint32),
            rng.integers(0, 2**63, 4, np.uint64),
        )
        for _ in range(COUNT)
    ]


def total(values):
    return [np.sum([pair[index] for pair in values], axis=0, dtype=d) for index, d in KINDS]


KINDS = ((0, np.uint32), (1, np.uint64))


@pytest.mark.parametrize("seed", range(3))
def test_other_vectors_of_the_same_sum_leave_the_same_bytes(folder, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    ours = vectors_drawn(rng)
    others = vectors_drawn(rng)
    # The last hospital makes up for the others.
    others[-1] = tuple(
        np.asarray(others[-1][index] + total(ours)[index] - total(others)[index], kind)
        for index, kind in KINDS
    )
    left, opened, pairs = transcript(folder / "one", monkeypatch, ours)
    names = names_of(COUNT)
    shifts = {}
    for index, kind in KINDS:
        shift = np.zeros_like(ours[0][index])
        for number in range(COUNT - 1):
            shift = np.asarray(shift + ours[number][index] - others[number][index], kind)
            shifts[pairs[names[number], names[number + 1]], index] = shift
    same, again, _ = transcript(folder / "two", monkeypatch, others, shifts)
    assert not any(np.array_equal(a, b) for a, b in zip(ours[0], others[0], strict=True))
    assert same == left
    for index, _ in KINDS:
        np.testing.assert_array_equal(opened[index], total(ours)[index])
        np.testing.assert_array_equal(again[index], opened[index])
    # With another sum they are not the same.
    others[0] = tuple(vector + kind(1) for vector, (_, kind) in zip(others[0], KINDS, strict=True))
    differs, _, _ = transcript(folder / "three", monkeypatch, others, shifts)
    assert differs != left
