import numpy as np
import pytest

from fedmed_flower.data.microscopy import STAINS, nuclei
from fedmed_flower.errors import InputError


def brightness(rows):
    """Return the mean value in nuclei, and that of the rest."""
    inside = np.concatenate([row["image"][:, row["label"] == 1].mean(0) for row in rows])
    outside = np.concatenate([row["image"][:, row["label"] == 0].mean(0) for row in rows])
    return inside.mean(), outside.mean()


@pytest.mark.parametrize("stain", STAINS, ids=lambda stain: stain.name)
def test_nuclei_differ_from_what_lies_around_them(stain):
    volumes = nuclei(8, stain, size=48)
    assert volumes.generated
    for row in volumes.rows:
        assert row["image"].shape == (3, 48, 48)
        assert row["image"].dtype == np.float32
        assert 0 <= row["image"].min() < row["image"].max() <= 255
        assert {*np.unique(row["label"])} == {0, 1}
        assert 0.02 < row["label"].mean() < 0.6
    inside, outside = brightness(volumes.rows)
    bright = stain.name in ("fluorescence", "dark field")
    assert (inside > 1.05 * outside) if bright else (inside < 0.95 * outside)


def test_pictures_follow_from_the_seed_and_not_from_their_number():
    stain = STAINS[1]
    first = nuclei(2, stain, 5).rows
    more = nuclei(4, stain, 5).rows
    other = nuclei(2, stain, 6).rows
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(first, more[:2], strict=True))
    assert not np.array_equal(first[0]["image"], other[0]["image"])
    patients = [row["patient"] for row in (*more, *other)]
    assert len({*patients}) == 6


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"count": 0}, "count must be a whole number from 1 to 1000000, got 0"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"size": 31}, "size must be a whole number from 32 to 1024, got 31"),
    ],
)
def test_arguments_out_of_range_are_refused(options, text):
    with pytest.raises(InputError, match=text):
        nuclei(**({"count": 1, "stain": STAINS[0]} | options))
