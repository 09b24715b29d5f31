import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from sklearn.metrics import roc_auc_score
from tiny import says
from torch.nn import functional

from fedmed_flower.data.phantoms import brain_tumours, chest_xrays, hippocampi, slides
from fedmed_flower.data.site import GENERATED
from fedmed_flower.errors import InputError


def test_shapes_types_and_the_share_of_label_1():
    splits = chest_xrays(100, 0, 50, size=32)
    assert {name: rows.shape for name, rows in splits.images.items()} == {
        "train": (100, 32, 32),
        "val": (0, 32, 32),
        "test": (50, 32, 32),
    }
    assert all(rows.dtype == np.uint8 for rows in splits.images.values())
    assert all(rows.dtype == np.int64 for rows in splits.labels.values())
    assert np.bincount(splits.labels["train"]).tolist() == [26, 74]
    assert np.bincount(splits.labels["test"]).tolist() == [13, 37]
    assert splits.generated
    assert splits.source == GENERATED


def test_what_is_kept_cannot_be_changed():
    splits = chest_xrays(3, 0, 0)
    for array in (splits.images["train"], splits.labels["train"]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_the_seed_decides_and_splits_do_not_depend_on_each_other():
    first, other = chest_xrays(20, 5, 10, seed=1), chest_xrays(20, 5, 10, seed=2)
    chest_xrays.cache_clear()
    again, more = chest_xrays(20, 5, 10, seed=1), chest_xrays(40, 8, 10, seed=1)
    np.testing.assert_array_equal(first.images["train"], again.images["train"])
    np.testing.assert_array_equal(first.labels["train"], again.labels["train"])
    np.testing.assert_array_equal(first.images["test"], more.images["test"])
    assert (first.images["test"] != other.images["test"]).any()
    equal = chest_xrays(10, 0, 10, seed=1).images
    assert (equal["train"] != equal["test"]).any()


def test_no_image_comes_twice():
    images = chest_xrays(1500, 200, 300).images
    every = np.concatenate(list(images.values())).reshape(2000, -1)
    assert len(np.unique(every, axis=0)) == 2000


def test_lungs_are_darker_than_the_mediastinum():
    splits = chest_xrays(400, 0, 0)
    healthy = splits.images["train"][splits.labels["train"] == 0].astype(float)
    lungs = healthy[:, 8:18, [6, 7, 8, 19, 20, 21]].mean(axis=(1, 2))
    mediastinum = healthy[:, 8:18, 13:15].mean(axis=(1, 2))
    assert np.mean(mediastinum - lungs > 20) > 0.95


def test_opacities_make_lungs_brighter_but_brightness_alone_does_not_tell_them():
    splits = chest_xrays(2000, 0, 0)
    images, labels = splits.images["train"].astype(float), splits.labels["train"]
    lungs = images[:, 5:19, [5, 6, 7, 8, 19, 20, 21, 22]].mean(axis=(1, 2))
    contrast = lungs - images[:, 5:19, 13:15].mean(axis=(1, 2))
    assert roc_auc_score(labels, contrast) > 0.75
    assert roc_auc_score(labels, images.mean(axis=(1, 2))) < 0.75


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_train": 0}, "num_train must be a whole number from 1 to 10000000, got 0"),
        ({"num_val": -1}, "num_val must be a whole number from 0 to 10000000, got -1"),
        ({"num_test": 1.5}, "num_test must be a whole number from 0 to 10000000, got 1.5"),
        ({"seed": -3}, "seed must be a whole number from 0 to 9223372036854775808, got -3"),
        ({"size": 15}, "size must be a whole number from 16 to 1024, got 15"),
    ],
)
def test_arguments_are_checked(arguments, text):
    with pytest.raises(InputError) as caught:
        chest_xrays(**({"num_train": 1, "num_val": 0, "num_test": 0} | arguments))
    assert str(caught.value) == text


def test_patients_of_different_seeds_have_different_names():
    for sets in (
        [chest_xrays(2, 1, 1, seed=seed) for seed in range(3)],
        [hippocampi(2, seed, 16) for seed in range(3)],
    ):
        rows = [s.rows("train") if hasattr(s, "images") else s.rows for s in sets]
        names = [row["patient"] for part in rows for row in part]
        assert len(set(names)) == len(names) == 6
    assert [row["patient"] for row in chest_xrays(2, 1, 1).rows("train")] == ["train-0", "train-1"]
    assert [row["patient"] for row in hippocampi(2, size=16).rows] == ["phantom-0", "phantom-1"]


def test_hippocampi_are_rows_of_a_client_and_marked_as_generated():
    volumes = hippocampi(6, seed=4, size=20)
    assert (volumes.source, volumes.generated) == (GENERATED, True)
    assert [row["patient"] for row in volumes.rows] == [f"phantom-4-{n}" for n in range(6)]
    for row in volumes.rows:
        assert set(row) == {"image", "label", "patient"}
        assert (row["image"].dtype, row["label"].dtype) == (np.float32, np.uint8)
        assert row["image"].shape == row["label"].shape
        assert all(18 <= side <= 22 for side in row["image"].shape)
        assert np.isfinite(row["image"]).all()
    assert len({row["image"].shape for row in volumes.rows}) > 1


@pytest.mark.parametrize("size", [12, 24, 40])
def test_each_hippocampus_has_both_parts_and_the_anterior_one_lies_in_front(size):
    for row in hippocampi(30, seed=1, size=size).rows:
        label = row["label"]
        counts = np.bincount(label.ravel(), minlength=3)
        assert len(counts) == 3
        assert counts[0] > 0.5 * label.size
        assert counts.min() >= 3
        # The second axis runs to the front.
        front, back = (np.nonzero(label == number)[1] for number in (1, 2))
        assert front.min() > back.max()
        image, inside = row["image"], label > 0
        assert image[inside].mean() > image[~inside].mean()


def test_hippocampi_follow_the_seed_and_a_larger_count_begins_alike():
    def volumes(*arguments, **more):
        rows = hippocampi(*arguments, **more).rows
        return [row["image"].tobytes() + row["label"].tobytes() for row in rows]

    first = volumes(5, seed=3)
    np.random.seed(7)  # noqa: NPY002
    assert volumes(5, seed=3) == first == volumes(9, seed=3)[:5]
    assert len({*first, *volumes(5, seed=4), *volumes(5, seed=3, size=25)}) == 15


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"count": 0}, "count must be a whole number from 1 to 1000000, got 0"),
        ({"count": 2.0}, "count must be a whole number from 1 to 1000000, got 2.0"),
        ({"seed": -1}, "seed must be a whole number from 0 to 9223372036854775808, got -1"),
        ({"size": 11}, "size must be a whole number from 12 to 128, got 11"),
        ({"size": "24"}, "size must be a whole number from 12 to 128, got '24'"),
    ],
)
def test_arguments_of_hippocampi_are_checked(arguments, text):
    with pytest.raises(InputError, match=says(text)):
        hippocampi(**{"count": 1} | arguments)


def test_a_small_network_learns_to_tell_the_parts():
    rows = hippocampi(10, seed=0, size=12).rows
    images, labels = (
        torch.stack([torch.as_tensor(crop(row[key])) for row in rows]) for key in ("image", "label")
    )
    images = ((images - images.mean()) / images.std())[:, None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet(3, 1, 3, (8, 16), (2,), num_res_units=1, norm="instance")
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(60):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[:8]), labels[:8].long()).backward()
            optimizer.step()
        with torch.no_grad():
            guess = model(images[8:]).argmax(1)
    for number in (1, 2):
        found, truth = guess == number, labels[8:] == number
        dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
        assert dice > 0.6


def crop(volume):
    """Return a cube of ten voxels about the middle: shapes vary by a voxel or two."""
    starts = [(side - 10) // 2 for side in volume.shape]
    return volume[tuple(slice(start, start + 10) for start in starts)]


def test_tumours_are_nested_and_one_in_five_has_no_rim():
    drawn = brain_tumours(10, seed=2, size=16)
    assert drawn.generated
    for number, row in enumerate(drawn.rows):
        assert row["image"].shape == (4, 16, 16, 16)
        assert row["image"].dtype == np.float32
        counts = np.bincount(row["label"].ravel(), minlength=5)
        assert counts[[0, 1, 2]].min() > 0
        assert (counts[4] > 0) == (number % 5 != 4)
        assert counts[3] == 0
    again = brain_tumours(3, seed=2, size=16).rows
    for row, other in zip(again, drawn.rows[:3], strict=True):
        assert np.array_equal(row["image"], other["image"])
        assert row["patient"] == other["patient"]
    assert brain_tumours(1, seed=3).rows[0]["patient"] not in {r["patient"] for r in drawn.rows}


def test_bags_of_a_slide_have_a_few_lesions_or_none():
    rows = slides(30, seed=1)
    assert [row["label"] for row in rows] == [0, 1] * 15
    for row in rows:
        assert row["image"].shape[1:] == (3, 16, 16)
        assert 5 <= len(row["image"]) <= 20
        assert len(row["lesions"]) == 0 if row["label"] == 0 else 1 <= len(row["lesions"]) <= 3
        assert all(0 <= index < len(row["image"]) for index in row["lesions"])
    # A lesion is dark: the darkest patch of a positive bag is mostly one.
    hits = [
        int(row["image"].mean(axis=(1, 2, 3)).argmin()) in row["lesions"]
        for row in rows
        if row["label"]
    ]
    assert np.mean(hits) > 0.8
    assert np.array_equal(slides(2, seed=1)[1]["image"], rows[1]["image"])


@pytest.mark.parametrize("draw", [brain_tumours, slides])
def test_counts_out_of_range(draw):
    with pytest.raises(
        InputError, match=says("count must be a whole number from 1 to 1000000, got 0")
    ):
        draw(0)
