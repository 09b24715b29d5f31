import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import DiceMetric, HausdorffDistanceMetric, SurfaceDiceMetric
from scipy import stats
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.pooling import check_counts, pool, pool_masks
from fedmed_flower.metrics.segmentation import (
    dice_of,
    mask_scores,
    noised_dice,
    patient_dice,
    region_scores,
    site_scores,
)

CLASSES = ("liver", "spleen")
# One test in a million fails by chance.
CHANCE = 1e-6
SPACINGS = {2: (0.7, 2.5), 3: (1.0, 0.5, 4.0)}


def random_pair(dims, seed, classes=2):
    """Return a mask of blocks and one that differs from it here and there."""
    rng = np.random.default_rng([dims, seed])
    shape = tuple(rng.integers(6, 12, dims))
    truth = np.zeros(shape, np.uint8)
    for number in range(1, classes + 1):
        low = rng.integers(0, 4, dims)
        high = low + rng.integers(2, 7, dims)
        truth[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = number
    guess = np.roll(truth, rng.integers(-1, 2, dims), tuple(range(dims)))
    wrong = rng.random(shape) < 0.05
    guess[wrong] = rng.integers(0, classes + 1, wrong.sum())
    return truth, guess


def one_hot(mask, classes):
    return torch.stack([torch.from_numpy(mask == k) for k in range(classes + 1)])[None].float()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dims", [2, 3])
def test_scores_equal_those_of_monai(dims, seed):
    (truth, guess), spacing = random_pair(dims, seed), SPACINGS[dims]
    found = mask_scores(truth, guess, CLASSES, spacing, tolerance=1.5)
    pair = {"y_pred": one_hot(guess, 2), "y": one_hot(truth, 2)}
    grid = {"spacing": list(spacing)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = {
            "dice": DiceMetric(include_background=False, reduction="none")(**pair),
            "hd95": HausdorffDistanceMetric(percentile=95, reduction="none")(**pair, **grid),
            "surface-dice": SurfaceDiceMetric([1.5, 1.5], reduction="none")(**pair, **grid),
        }
    assert {*found} == {f"{kind}-{name}" for kind in wanted for name in CLASSES}
    for kind, values in wanted.items():
        assert values.shape == (1, 2)
        for name, value in zip(CLASSES, values[0], strict=True):
            assert found[f"{kind}-{name}"] == pytest.approx(float(value), abs=1e-6)


def border(mask):
    """Return the voxels of a mask that have a neighbour outside it."""
    inside = {tuple(place) for place in np.argwhere(mask)}
    steps = [s * np.eye(mask.ndim, dtype=int)[axis] for axis in range(mask.ndim) for s in (-1, 1)]
    return [p for p in inside if any(tuple(np.array(p) + step) not in inside for step in steps)]


def by_definition(truth, guess, spacing, tolerance):
    both = (truth & guess).sum()
    ours, theirs = (np.array(border(mask)) * spacing for mask in (truth, guess))
    apart = np.linalg.norm(ours[:, None] - theirs[None], axis=-1)
    there, back = apart.min(axis=0), apart.min(axis=1)
    near = (there <= tolerance).sum() + (back <= tolerance).sum()
    distance = max(np.percentile(there, 95), np.percentile(back, 95))
    return 2 * both / (truth.sum() + guess.sum()), distance, near / (len(there) + len(back))


@pytest.mark.parametrize("dims", [2, 3])
def test_scores_are_what_their_definitions_say(dims):
    for seed in range(6):
        (truth, guess), spacing = random_pair(dims, seed, 1), SPACINGS[dims]
        found = mask_scores(truth, guess, ("it",), spacing, tolerance=0.8)
        wanted = by_definition(truth == 1, guess == 1, spacing, 0.8)
        assert list(found.values()) == pytest.approx(wanted, abs=1e-5)


def test_a_case_worked_out_by_hand():
    # A square of 3 x 3, found one row (2 mm) further down. 6 of 9 pixels are in both. The outlines
    # have 8 pixels each. Of one, four lie on the other, the middle of a side is 1 mm off, and the
    # three of the last row are 2 mm off.
    truth, guess = np.zeros((7, 6), int), np.zeros((7, 6), int)
    truth[1:4, 1:4], guess[2:5, 1:4] = 1, 1
    found = mask_scores(truth, guess, ("it",), (2.0, 1.0))
    assert found == pytest.approx(
        {"dice-it": 2 * 6 / 18, "hd95-it": 2.0, "surface-dice-it": 10 / 16}
    )
    wider = mask_scores(truth, guess, ("it",), (2.0, 1.0), tolerance=2.0)
    assert wider["surface-dice-it"] == 1
    strict = mask_scores(truth, guess, ("it",), (2.0, 1.0), tolerance=0.0)
    assert strict["surface-dice-it"] == 8 / 16


def test_single_voxels_are_as_far_apart_as_the_grid_says():
    truth, guess = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)
    truth[0, 0, 0] = guess[3, 4, 2] = 1
    found = mask_scores(truth, guess, ("it",), (1.0, 2.0, 3.0))
    assert found["dice-it"] == found["surface-dice-it"] == 0
    assert found["hd95-it"] == pytest.approx(math.hypot(3, 8, 6), abs=1e-5)


def test_a_structure_that_fills_the_image_agrees_with_itself():
    full = np.ones((3, 4), int)
    assert list(mask_scores(full, full, ("it",), (1.0, 1.0)).values()) == [1.0, 0.0, 1.0]


def test_a_structure_that_is_in_neither_is_agreed_upon():
    empty = np.zeros((3, 4), int)
    found = mask_scores(empty, empty, ("it",), (1.0, 1.0))
    assert found == {"dice-it": 1.0, "hd95-it": 0.0, "surface-dice-it": 1.0}


@pytest.mark.parametrize("missed", [True, False])
def test_a_structure_that_is_missed_or_invented_is_as_far_off_as_can_be(missed):
    empty, full = np.zeros((3, 4), int), np.zeros((3, 4), int)
    full[1, 1] = 1
    pair = (full, empty) if missed else (empty, full)
    found = mask_scores(*pair, ("it", "other"), (2.0, 4.0))
    # The image measures 6 by 16 mm.
    assert found["dice-it"] == found["surface-dice-it"] == 0.0
    assert found["hd95-it"] == pytest.approx(math.hypot(6, 16))
    assert found["dice-other"] == 1.0


def test_masks_that_do_not_fit():
    flat, deep = np.zeros((2, 3)), np.zeros((2, 3, 4))
    text = (
        "truth has the shape (2, 3) and guess (2, 3, 4), with 2 spacings: the shapes must be the "
        "same, and each axis has one spacing"
    )
    with pytest.raises(InputError, match=says(text)):
        mask_scores(flat, deep, ("it",), (1.0, 1.0))
    with pytest.raises(InputError, match="with 1 spacings"):
        mask_scores(flat, flat, ("it",), (1.0,))


def scored(*rows):
    """Return scores of patients from (dice, hd95, surface) of liver and of spleen."""
    kinds = ("dice", "hd95", "surface-dice")
    return [
        {
            f"{kind}-{name}": value
            for name, values in zip(CLASSES, row, strict=True)
            for kind, value in zip(kinds, values, strict=True)
        }
        for row in rows
    ]


def test_the_figures_of_a_site_are_means_over_its_patients():
    scores = scored(
        [(0.5, 4.0, 0.2), (1.0, 0.0, 1.0)],
        [(0.1, 8.0, 0.4), (0.9, 2.0, 0.8)],
    )
    assert patient_dice(scores[0]) == 0.75
    assert site_scores(scores) == pytest.approx(
        {
            "num-examples": 2,
            "dice": (0.3 + 0.95) / 2,
            "hd95": (6 + 1) / 2,
            "surface-dice": (0.3 + 0.9) / 2,
            "dice-worst": 0.5,
            "dice-liver": 0.3,
            "hd95-liver": 6.0,
            "surface-dice-liver": 0.3,
            "dice-spleen": 0.95,
            "hd95-spleen": 1.0,
            "surface-dice-spleen": 0.9,
        }
    )


def dices(*rows):
    """Return scores of which only the Dice matters here."""
    return [
        {f"dice-{k}": value for k, value in enumerate(row)} | {"hd95-0": 1e6, "surface-dice-0": 5.0}
        for row in rows
    ]


def test_sums_without_noise_give_the_true_means():
    scores = dices([0.5, 1.0], [0.25, 0.5], [0.75, 0.0])
    sums = noised_dice(scores, ["a", "b", "b"], 0.0, "01")
    # b's two records weigh a half each.
    assert sums == pytest.approx([2.0, 0.5 + 0.5, 1.0 + 0.25])
    found = dice_of(sums, ("x", "y"))
    assert found == pytest.approx(
        {"num-examples": 2.0, "dice": 0.5625, "dice-x": 0.5, "dice-y": 0.625}
    )


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda classes: st.lists(
            st.tuples(
                st.sampled_from("abc"),
                st.lists(st.floats(0, 1), min_size=classes, max_size=classes),
            ),
            min_size=1,
            max_size=9,
        )
    )
)
def test_a_patient_changes_the_sums_by_no_more_than_is_claimed(records):
    patients = [patient for patient, _ in records]
    scores = dices(*(values for _, values in records))
    classes = len(records[0][1])
    leaving = patients[0]
    rest = [number for number, patient in enumerate(patients) if patient != leaving]
    names = [str(k) for k in range(classes)]
    # Nobody may be left.
    left = [scores[number] for number in rest]
    change = np.array(noised_dice(scores, patients, 0.0, names))
    change -= noised_dice(left, [patients[number] for number in rest], 0.0, names)
    assert np.linalg.norm(change) <= math.sqrt(classes + 1) + 1e-9


def test_a_patient_who_is_perfect_changes_the_sums_by_all_that_is_claimed():
    scores = dices([1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    assert np.linalg.norm(noised_dice(scores, ["a", "a"], 0.0, "012")) == pytest.approx(2.0)


def test_no_score_weighs_more_than_a_perfect_one():
    assert noised_dice(dices([7.0, -3.0]), ["a"], 0.0, "01") == [1.0, 1.0, 0.0]


def test_where_no_record_can_be_used_the_sums_are_noise_alone():
    assert noised_dice([], [], 0.0, ("liver", "spleen")) == [0.0, 0.0, 0.0]
    drawn = noised_dice([], [], 2.0, ("liver", "spleen"))
    assert len(drawn) == 3
    assert all(drawn)


def test_the_sums_are_in_the_order_of_the_classes():
    scores = [{"dice-b": 0.25, "dice-a": 1.0, "dice-worst": 0.0}]
    assert noised_dice(scores, ["p"], 0.0, ("a", "b")) == [1.0, 1.0, 0.25]
    assert noised_dice(scores, ["p"], 0.0, ("b", "a")) == [1.0, 0.25, 1.0]


@pytest.mark.parametrize(("classes", "multiplier"), [(1, 0.7), (3, 2.5)])
def test_the_sums_have_the_noise_that_is_claimed(classes, multiplier):
    scores, patients = dices([0.5] * classes, [0.25] * classes), ["a", "b"]
    names = [str(k) for k in range(classes)]
    exact = np.array(noised_dice(scores, patients, 0.0, names))
    drawn = np.concatenate(
        [np.array(noised_dice(scores, patients, multiplier, names)) - exact for _ in range(400)]
    )
    drawn /= multiplier * math.sqrt(classes + 1)
    low, high = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], drawn.size)
    assert low < (drawn**2).sum() < high
    assert stats.kstest(drawn, "norm").pvalue > CHANCE


def test_noise_that_drowns_everything_gives_no_figures_that_cannot_be():
    rng = np.random.default_rng(0)
    for _ in range(50):
        found = dice_of(rng.normal(size=3) * 50, ("x", "y"))
        assert found["num-examples"] >= 0
        assert all(0 <= value <= 1 for name, value in found.items() if name != "num-examples")
    for count in (-3.0, 0.49, 0.0):
        assert dice_of([count, 1.0, 1.0], ("x", "y")) == {"num-examples": 0.0}


def test_pooled_figures_are_those_over_all_patients_together():
    rng = np.random.default_rng(1)
    scores = scored(*rng.random((9, 2, 3)))
    parts = [scores[:2], scores[2:3], scores[3:]]
    whole = site_scores(scores)
    records = [site_scores(part) for part in parts]
    weights = [record["num-examples"] for record in records]
    assert sum(weights) == whole["num-examples"]
    pooled = pool(records)
    assert pooled == {"dice-worst": whole["dice-worst"]}
    for name in whole.keys() - pooled.keys() - {"num-examples"}:
        mean = np.average([record[name] for record in records], weights=weights)
        assert mean == pytest.approx(whole[name])


def test_noised_sums_of_several_sites_add_up():
    scores = dices([0.5, 1.0], [0.25, 0.5], [0.75, 0.0], [0.5, 0.25])
    names = ("x", "y")
    records = []
    for part in (slice(0, 1), slice(1, 4)):
        sums = noised_dice(scores[part], "abcd"[part], 0.0, "01")
        records.append(dice_of(sums, names) | {"noised-dice": sums})
    assert pool(records) == pytest.approx(dice_of(noised_dice(scores, "abcd", 0.0, "01"), names))


def test_records_of_neither_kind_pool_to_nothing():
    assert pool([{"num-examples": 3, "loss": 0.5}]) == {}


@pytest.mark.parametrize(
    "value", [3.0, [], [1.0], [1.0, float("nan")], [float("inf"), 1.0], (1.0, 2.0)]
)
def test_noised_sums_that_cannot_be_pooled_are_told(value):
    text = "noised-dice must be a list of two or more finite numbers"
    assert check_counts({"noised-dice": value, "num-examples": 3}) == text
    assert check_counts({"noised-dice": [3.0, 1.5], "num-examples": 3}) is None


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        # Which sum is whose cannot be told.
        ({"noised-dice": [4.0, 1.0, 1.0], "dice-x": 0.5}, {"num-examples": 8.0}),
        ({"noised-dice": [4.0, 1.0, 1.0]}, {"num-examples": 8.0}),
        ({"noised-dice": [-4.0, 1.0, 1.0]}, {"num-examples": 0.0}),
        # The sum of two such is beyond all floats.
        ({"noised-dice": [1e308, 1.0], "dice-x": 0.5}, {"num-examples": 0.0}),
        ({"noised-dice": [2.0, 1e308], "dice-x": 0.5},
         {"num-examples": 4.0, "dice": 1.0, "dice-x": 1.0}),
        ({"dice-worst": [0.5]}, {}),
    ],
)  # fmt: skip
def test_whatever_sites_send_pooling_does_not_fail(record, wanted):
    with np.errstate(over="ignore"):
        assert pool_masks([record, dict(record)]) == wanted


def test_each_region_is_scored_as_a_mask_of_its_own():
    rng = np.random.default_rng(0)
    truth = rng.random((3, 6, 7, 5)) < 0.4
    guess = rng.random((3, 6, 7, 5)) < 0.4
    truth[2] = False
    assert (truth[0] & truth[1]).any()
    found = region_scores(truth, guess, ("a", "b", "c"), (1.0, 2.0, 1.5), 2.0)
    for number, name in enumerate("abc"):
        alone = mask_scores(
            truth[number].astype(int), guess[number].astype(int), (name,), (1.0, 2.0, 1.5), 2.0
        )
        assert {key: found[key] for key in alone} == alone
    assert len(found) == 9
    assert found["dice-c"] == 0
