import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fedmed_flower.data.phantoms import chest_xrays
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
