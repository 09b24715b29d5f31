"""What a server sees of a masked vector looks like random words, round after round.

All keys come from fixed texts, so that each test gives the same figures each time.
"""

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedmed_flower.secure.streams import add_stream, agreed_key, pair_seed

NAMES = ("north", "south", "west")
TRIALS = 1000
WORDS = 1024
BYTES = 4 * WORDS
MOST = 3.3
# The same small changes at each hospital in each round: only the masks make uploads differ.
PLAIN = np.round(np.random.default_rng(5).normal(0, 2**20, WORDS)).astype(np.int32)
STATISTICS = (
    "histogram",
    "with the vector",
    "with the last",
    "equal to the last",
    "equal to south",
)


def bytes_of(*about):
    return hashlib.sha256(repr(about).encode()).digest()


KEYS = {name: X25519PrivateKey.from_private_bytes(bytes_of("key", name)) for name in NAMES}
PUBLIC = {name: key.public_key().public_bytes_raw() for name, key in KEYS.items()}


def masked(name, digest, own):
    """Return a hospital's vector as it leaves: masked by its own seed and one with each other."""
    vector = PLAIN.view(np.uint32).copy()
    add_stream(vector, own, 0)
    for other in NAMES:
        if other != name:
            prk = agreed_key(KEYS[name], PUBLIC[other], digest)
            add_stream(vector, pair_seed(prk, name, other), 0, subtract=name > other)
    return vector


def fresh(name, number):
    return masked(name, bytes_of("round", number), bytes_of("own", name, number)[:16])


def correlation(one, other):
    return np.corrcoef(one.view(np.int32), other.view(np.int32))[0, 1]


def equal_bytes(one, other):
    return int((one.view(np.uint8) == other.view(np.uint8)).sum())


def scores(upload, trials):
    """Return each statistic of each trial in standard errors; their shape is (trials, 5)."""
    last = upload("north", 0)
    rows = []
    for number in range(1, trials + 1):
        north = upload("north", number)
        south = upload("south", number)
        counts = np.bincount(north.view(np.uint8), minlength=256)
        histogram = ((counts - BYTES / 256) ** 2).sum() / (BYTES / 256)
        correlations = (correlation(north, PLAIN), correlation(north, last))
        equal = (equal_bytes(north, last), equal_bytes(north, south))
        rows.append([histogram, *correlations, *equal])
        last = north
    # Pearson's statistic has the variance 2 (k - 1) (n - 1) / n; a correlation, 1 / (n - 1).
    share = 1 / 256
    mean = np.array([255, 0, 0, BYTES * share, BYTES * share])
    variance = np.array(
        [
            2 * 255 * (BYTES - 1) / BYTES,
            1 / (WORDS - 1),
            1 / (WORDS - 1),
            BYTES * share * (1 - share),
            BYTES * share * (1 - share),
        ]
    )
    return (np.array(rows) - mean) / np.sqrt(variance)


def of_the_mean(trials):
    return dict(zip(STATISTICS, trials.mean(axis=0) * np.sqrt(len(trials)), strict=True))


def test_masked_vectors_look_random():
    trials = scores(fresh, TRIALS)
    means = of_the_mean(trials)
    assert {name for name, score in means.items() if abs(score) > MOST} == set()
    # Of 1,000 trials one is expected beyond 3.3 standard errors by chance.
    assert (np.abs(trials) > MOST).sum(axis=0).max() <= 6


def same_seeds(name, number):
    return masked(name, bytes_of("round", 0), bytes_of("own", name, 0)[:16])


def same_at_each_hospital(_, number):
    return fresh("north", number)


def without_a_mask(name, number):
    return PLAIN.view(np.uint32)


@pytest.mark.parametrize(
    ("upload", "seen"),
    [
        (same_seeds, {"with the last", "equal to the last"}),
        (same_at_each_hospital, {"equal to south"}),
        (without_a_mask, set(STATISTICS)),
    ],
)
def test_the_statistics_see_bad_masks(upload, seen):
    means = of_the_mean(scores(upload, 20))
    found = {name for name, score in means.items() if abs(score) > MOST}
    assert seen <= found


def test_masks_of_all_hospitals_cancel():
    vectors = [fresh(name, 3) for name in NAMES]
    total = np.sum(vectors, axis=0, dtype=np.uint32)
    for name in NAMES:
        add_stream(total, bytes_of("own", name, 3)[:16], 0, subtract=True)
    assert np.array_equal(total, 3 * PLAIN.view(np.uint32))
