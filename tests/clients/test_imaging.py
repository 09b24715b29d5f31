import json
import re
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from monai.data import get_track_meta, set_track_meta
from monai.transforms import (
    RandAffined,
    RandCoarseDropoutd,
    RandCoarseShuffled,
    RandFlipd,
    RandGaussianNoised,
    RandShiftIntensityd,
)
from PIL import Image
from tiny import (
    TinyClient,
    ask,
    bits,
    context_of,
    fixed,
    linear,
    make_rows,
    model_arrays,
    node_of,
    run_tiny,
    says,
    says_of_setting,
    trained,
)
from torch import nn

from fedmed_flower import ClassificationClient, InputError, SiteData
from fedmed_flower.clients import whole_image
from fedmed_flower.metrics.classification import classification_metrics
from fedmed_flower.settings.imaging import ImagingSettings
from fedmed_flower.wire import read_error


def with_images(images, labels=None):
    """Return a client whose training rows are these images, and its test rows the first of them."""
    labels = [number % 2 for number in range(len(images))] if labels is None else labels
    rows = [
        {"image": image, "label": label, "patient": number}
        for number, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    return fixed(SiteData(train=rows))


def reason_of(client, kind="train", **config):
    reply = ask(client, kind, context_of(), **config)
    assert reply.has_error()
    name, text = read_error(reply.error.reason)
    assert name == "hospital-1"
    return text


def pictures(count=6, shape=(2, 2)):
    return list(np.random.default_rng(8).integers(0, 255, (count, *shape)).astype(np.uint8))


def rejected(caplog):
    return [r.getMessage() for r in caplog.records if "rejected" in r.getMessage()]


@pytest.mark.parametrize("label", [2, -1, 1.0, True, None])
def test_a_row_with_a_label_out_of_range_is_rejected_and_the_others_train(caplog, label):
    rows = make_rows(6, 0)
    bad = [row | {"label": label} if number == 3 else row for number, row in enumerate(rows)]
    found = trained(fixed(SiteData(train=bad)), context_of())
    assert rejected(caplog) == [
        f"hospital-1: rejected, train split, patient p-3: label {label!r} is out of range: "
        "labels must be integers from 0 to 1 (num_classes - 1)"
    ]
    assert found == trained(fixed(SiteData(train=[*rows[:3], *rows[4:]])), context_of())


@pytest.mark.parametrize("label", ["1", np.ones((2, 2)), [[0, 1], [1, 0]]])
def test_a_mask_is_no_class(caplog, label):
    rows = make_rows(6, 0)
    bad = [row | {"label": label} if number == 3 else row for number, row in enumerate(rows)]
    found = trained(fixed(SiteData(train=bad)), context_of())
    (line,) = rejected(caplog)
    assert line.startswith("hospital-1: rejected, train split, patient p-3: ")
    if isinstance(label, str):
        text = "label '1' is a text: labels must be integers from 0 on, so number the classes"
        assert line.endswith(text)
    else:
        assert line.endswith("its label is not a class number, which Fixed needs")
    assert found == trained(fixed(SiteData(train=[*rows[:3], *rows[4:]])), context_of())


@pytest.mark.parametrize("key", ["image", "label"])
def test_a_row_without_image_or_label_is_rejected(caplog, key):
    rows = make_rows(4, 0)
    del rows[1][key]
    found = trained(fixed(SiteData(train=rows)), context_of())
    assert rejected(caplog) == [
        f"hospital-1: rejected, train split, patient p-1: the row has no {key}"
    ]
    assert found == trained(fixed(SiteData(train=[rows[0], *rows[2:]])), context_of())


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, np.int32])
def test_labels_may_be_integers_of_any_kind(kind):
    rows = [row | {"label": kind(row["label"])} for row in make_rows(10, 0)]
    expected = trained(fixed(SiteData(train=make_rows(10, 0))), context_of())
    assert trained(fixed(SiteData(train=rows)), context_of()) == expected


BROKEN = {
    "NaN": (np.array([[1.0, np.nan], [2.0, 3.0]]), "it holds NaN or infinite values"),
    "infinite": (np.array([[1.0, np.inf], [2.0, 3.0]]), "it holds NaN or infinite values"),
}
for _shape in ((4,), (2, 2, 2, 2), ()):
    BROKEN[str(_shape)] = (
        np.ones(_shape),
        f"its shape is {_shape}; spatial_dims = 2 asks for 2 dimensions, or one more with the "
        "channel first",
    )


@pytest.mark.parametrize("name", BROKEN)
def test_an_image_that_cannot_be_used_is_rejected_and_the_others_train(caplog, name):
    image, text = BROKEN[name]
    images = pictures()
    found = trained(with_images([image, *images], [0] + [n % 2 for n in range(6)]), context_of())
    assert rejected(caplog) == [f"hospital-1: rejected, train split, patient 0: {text}"]
    assert found == trained(with_images(images), context_of())


@pytest.mark.parametrize("text", [None, "this is no picture"])
def test_a_file_that_is_not_there_or_no_image_is_rejected(caplog, tmp_path, text):
    path = tmp_path / "scan.png"
    if text:
        path.write_text(text)
    trained(with_images([path, *pictures()]), context_of())
    (line,) = rejected(caplog)
    end = f"{path} cannot be read: cannot identify image file" if text else f"{path} is not there"
    assert line.startswith(f"hospital-1: rejected, train split, patient 0: {end}")


def test_an_error_where_no_training_row_is_left():
    reason = reason_of(with_images([np.full((2, 2), np.nan)] * 3))
    assert reason == (
        "all 3 rows of the train split were rejected; patient 0: it holds NaN or infinite values"
    )


def test_other_splits_may_be_rejected_altogether(caplog):
    broken = [row | {"image": np.full((2, 2), np.nan)} for row in make_rows(2, 1, "q")]
    client, context = fixed(SiteData(train=make_rows(4, 0), test=broken)), context_of()
    assert not ask(client, "train", context).has_error()
    # Rows are looked at when their split is asked for, once a run.
    assert rejected(caplog) == []
    for _ in range(2):
        reply = ask(client, "evaluate", context, split="test")
        assert dict(reply.content["metrics"]) == {"num-examples": 0}
    assert len(rejected(caplog)) == 2
    reply = ask(client, "query.describe", context)
    counts = dict(reply.content["metrics"])
    assert (counts["test"], counts["rejected"], counts["labels"]) == (0, 2, [2, 2])


def test_of_very_many_the_log_names_twenty(caplog):
    images = [*[np.full((2, 2), np.nan)] * 33, *pictures()]
    trained(with_images(images), context_of())
    lines = rejected(caplog)
    assert len(lines) == 21
    assert lines[-1] == "hospital-1: and 13 more of the train split rejected"


def test_images_in_every_form_train_to_the_same_bits(tmp_path):
    images = pictures()
    expected = trained(with_images(images), context_of())
    assert trained(with_images([i[None] for i in images]), context_of()) == expected
    assert trained(with_images([i.astype(np.float64) for i in images]), context_of()) == expected
    assert trained(with_images([i.tolist() for i in images]), context_of()) == expected
    # MONAI alone would read the transposed picture.
    paths = [tmp_path / f"{number}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        Image.fromarray(image).save(path)
    assert trained(with_images(paths), context_of()) == expected
    assert trained(with_images([str(path) for path in paths]), context_of()) == expected


def test_volumes_from_nifti_train_to_the_same_bits_as_arrays(tmp_path):
    volumes = pictures(4, (2, 2, 1))
    paths = [tmp_path / f"{number}.nii.gz" for number in range(4)]
    for volume, path in zip(volumes, paths, strict=True):
        nibabel.save(nibabel.Nifti1Image(volume, np.diag([2.0, 1.0, 3.0, 1.0])), path)
    members = {"spatial_dims": 3, "image_shape": (1, 2, 2, 1)}
    outcomes = [
        trained(type("Client", (with_images(images),), members), context_of())
        for images in (volumes, paths)
    ]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != bits(model_arrays())


def test_a_colour_image_has_three_channels(tmp_path):
    colours = pictures(4, (2, 2, 3))
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for image, path in zip(colours, paths, strict=True):
        Image.fromarray(image).save(path)
    network = {"build_model": lambda self: nn.Sequential(nn.Flatten(), nn.Linear(12, 2))}
    arrays = model_arrays(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
    from_file = type("Client", (with_images(paths),), network)
    channels_first = [image.transpose(2, 0, 1) for image in colours]
    from_array = type("Client", (with_images(channels_first),), network)
    assert trained(from_file, context_of(), arrays) == trained(from_array, context_of(), arrays)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_sites_own_arrays_are_not_changed(dtype):
    images = [image.astype(dtype) for image in pictures(shape=(1, 2, 2))]
    before = [image.copy() for image in images]
    context, client = context_of(), with_images(images)
    ask(client, "train", context)
    ask(client, "evaluate", context, split="train")
    np.testing.assert_array_equal(images, before)


def test_each_image_is_scaled_to_mean_0_and_deviation_1():
    client = with_images([np.array([[0, 10], [20, 30]]), np.full((2, 2), 9)])(context_of())
    prepared = client.prepare(client.load_data(client.site).train, train=True)
    spread = np.sqrt(125)
    expected = np.array([[-15, -5], [5, 15]]) / spread
    np.testing.assert_allclose(prepared[0]["image"][0], expected, atol=1e-6)
    np.testing.assert_array_equal(prepared[1]["image"][0], np.zeros((2, 2)))
    assert type(prepared[0]["image"]) is torch.Tensor


TRANSFORMS = {
    "flip": lambda: RandFlipd("image", prob=0.5, spatial_axis=0),
    "noise": lambda: RandGaussianNoised("image", prob=0.7, std=0.3),
    "shift": lambda: RandShiftIntensityd("image", offsets=0.4, prob=0.8),
    "affine": lambda: RandAffined("image", prob=0.5, rotate_range=0.5, padding_mode="border"),
    "dropout": lambda: RandCoarseDropoutd("image", holes=1, spatial_size=1, prob=0.5),
    "shuffle": lambda: RandCoarseShuffled("image", holes=1, spatial_size=2, prob=0.5),
}


def shaking(name):
    class Client(TinyClient):
        def transforms(self, train):
            return [*super().transforms(train), *([TRANSFORMS[name]()] if train else [])]

    return Client


@pytest.mark.parametrize("name", TRANSFORMS)
def test_random_transforms_are_reproducible(name):
    client = shaking(name)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = trained(client, context_of(local_epochs=3))
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert trained(client, context_of(local_epochs=3)) == first
    assert trained(TinyClient, context_of(local_epochs=3)) != first
    assert trained(client, context_of(local_epochs=3, seed=1)) != first


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_round_does_not_depend_on_random_transforms_of_earlier_rounds(name):
    client = shaking(name)
    context = context_of(local_epochs=3)
    trained(client, context, server_round=1)
    second = trained(client, context, server_round=2)
    assert trained(client, context_of(local_epochs=3), server_round=2) == second


def test_random_transforms_are_drawn_anew_in_each_epoch():
    client = shaking("noise")(context_of())
    prepared = client.prepare(client.load_data(client.site).train, train=True)
    prepared.transform.set_random_state(4)
    epochs = [np.stack([row["image"] for row in prepared]) for _ in range(2)]
    assert (epochs[0] != epochs[1]).any()
    prepared.transform.set_random_state(4)
    np.testing.assert_array_equal(np.stack([row["image"] for row in prepared]), epochs[0])


@pytest.mark.parametrize("tracked", [True, False])
def test_monais_track_meta_is_left_as_it_was(tracked):
    before = get_track_meta()
    set_track_meta(tracked)
    try:
        context = context_of()
        ask(shaking("affine"), "train", context)
        ask(shaking("affine"), "evaluate", context)
        assert get_track_meta() is tracked

        class Failing(TinyClient):
            def loss(self):
                return lambda outputs, labels: 1 / 0

        assert reason_of(Failing) == "ZeroDivisionError: division by zero"
        assert get_track_meta() is tracked
    finally:
        set_track_meta(before)


def test_track_meta_does_not_change_what_is_trained():
    before = get_track_meta()
    outcomes = []
    try:
        for tracked in (True, False):
            set_track_meta(tracked)
            outcomes.append(trained(shaking("affine"), context_of(local_epochs=2)))
    finally:
        set_track_meta(before)
    assert outcomes[0] == outcomes[1]


class OneOutput(TinyClient):
    def build_model(self):
        return linear(1)


def test_one_output_with_binary_cross_entropy_is_two_outputs_with_cross_entropy():
    one = model_arrays(lambda: linear(1), seed=8)
    weight, bias = (one[key].numpy() for key in ("1.weight", "1.bias"))
    with torch.no_grad():
        network = linear(2)
        network[1].weight.copy_(torch.from_numpy(np.concatenate([0 * weight, weight])))
        network[1].bias.copy_(torch.from_numpy(np.concatenate([0 * bias, bias])))
    two = type(one)(network.state_dict())
    first, second = (
        dict(ask(client, "evaluate", context_of(), arrays, split="test").content["metrics"])
        for client, arrays in ((OneOutput, one), (TinyClient, two))
    )
    assert first["confusion-counts"] == second["confusion-counts"]
    assert 0 not in first["confusion-counts"]
    for name in ("loss", "auc", "accuracy", "sensitivity", "specificity"):
        assert first[name] == pytest.approx(second[name], abs=1e-6), name


def test_one_output_trains_as_by_hand():
    data = SiteData(train=make_rows(6, 4))
    arrays = model_arrays(lambda: linear(1))
    context = context_of(batch_size=6, learning_rate=0.3)
    reply = ask(fixed(data, OneOutput), "train", context, arrays)
    images = np.array([row["image"].ravel() for row in data.train], dtype=float)
    images = (images - images.mean(1, keepdims=True)) / images.std(1, keepdims=True)
    weight, bias = (arrays[key].numpy().astype(float) for key in ("1.weight", "1.bias"))
    chance = 1 / (1 + np.exp(-(images @ weight.T + bias)[:, 0]))
    truth = np.array([row["label"] for row in data.train])
    np.testing.assert_allclose(
        reply.content["arrays"]["1.weight"].numpy(),
        weight - 0.3 * (chance - truth)[None] @ images / 6,
        atol=1e-6,
    )
    loss = -np.log(np.where(truth, chance, 1 - chance)).mean()
    assert reply.content["metrics"]["loss"] == pytest.approx(loss, abs=1e-6)


def test_evaluation_equals_the_model_by_hand_whatever_the_batches():
    data = SiteData(train=make_rows(1, 0), test=make_rows(70, 5, "q"))
    arrays = model_arrays(seed=2)
    images = np.array([row["image"].ravel() for row in data.test], dtype=float)
    images = (images - images.mean(1, keepdims=True)) / images.std(1, keepdims=True)
    logits = images @ arrays["1.weight"].numpy().T + arrays["1.bias"].numpy()
    labels = np.array([row["label"] for row in data.test])
    expected = classification_metrics(labels, logits)
    reply = ask(fixed(data), "evaluate", context_of(batch_size=3), arrays, split="test")
    metrics = dict(reply.content["metrics"])
    assert metrics["confusion-counts"] == expected["confusion-counts"]
    assert metrics["auc"] == pytest.approx(expected["auc"])
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.log(chances[np.arange(70), labels]).mean()
    assert metrics["loss"] == pytest.approx(loss, abs=1e-6)


def test_three_classes():
    data = SiteData(*(make_rows(9, n, f"s{n}", classes=3) for n in range(3)))
    client = fixed(data, num_classes=3)
    context, arrays = context_of(local_epochs=40), model_arrays(lambda: linear(3))
    reply = ask(client, "train", context, arrays)
    arrays = reply.content["arrays"]
    metrics = ask(client, "evaluate", context, arrays, split="test").content["metrics"]
    assert sum(metrics["confusion-counts"]) == 9
    assert len(metrics["confusion-counts"]) == 9
    assert metrics["accuracy"] > 0.6
    assert metrics["auc"] > 0.7
    reply = ask(client, "query.describe", context)
    assert reply.content["metrics"]["labels"] == [3, 3, 3]


def test_a_test_set_of_one_class_has_no_auc():
    data = SiteData(train=make_rows(4, 0), test=make_rows(5, 1, "q", classes=1))
    metrics = ask(fixed(data), "evaluate", context_of(), split="test").content["metrics"]
    assert "auc" not in metrics
    assert metrics["num-examples"] == 5
    assert np.isfinite(metrics["loss"])


def test_mixed_precision_has_no_effect_on_a_cpu():
    outcomes = [trained(TinyClient, context_of(mixed_precision=mixed)) for mixed in (True, False)]
    assert outcomes[0] == outcomes[1]


# --- One grid, one scale --------------------------------------------------------------------------


NUMBERS = "empty or numbers above 0 separated by commas"
LETTERS = "empty or three letters such as RAS"


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("spacing", "1,x", NUMBERS),
        ("spacing", "1,0", NUMBERS),
        ("spacing", "nan", NUMBERS),
        ("spacing", "1,", NUMBERS),
        ("patch-size", "8,8.5", NUMBERS),
        ("patch-size", "8,1e300", NUMBERS),
        ("patch-size", "8,-8", NUMBERS),
        ("orientation", "RAR", LETTERS),
        ("orientation", "RA", LETTERS),
        ("orientation", "ras", LETTERS),
        ("cache-gigabytes", -1.0, "at least 0 and finite"),
        ("cache-gigabytes", "8", "of type float"),
    ],
)
def test_settings_of_images_that_cannot_be(key, value, bound):
    with pytest.raises(InputError, match=says_of_setting(f"{key} must be {bound}, got {value!r}")):
        ImagingSettings.from_run_config({key: value})


@pytest.mark.parametrize("name", ["", "LPS", "SRA", "AIL"])
def test_orientations_that_can_be(name):
    assert ImagingSettings(orientation=name).orientation == name


@pytest.mark.parametrize(
    ("members", "config", "text"),
    [
        ({}, {"spacing": "1,1,1"}, "spacing must be empty or 2 numbers, one an axis, got '1,1,1'"),
        ({}, {"patch_size": "8"}, "patch-size must be empty or 2 numbers, one an axis, got '8'"),
        ({"modality": "pet"}, {}, "modality must be one of '', 'ct', 'mr', 'xray', got 'pet'"),
        ({"spatial_dims": 4}, {}, "spatial_dims must be 2 or 3, got 4"),
    ],
)
def test_settings_that_do_not_fit_the_images(members, config, text):
    client = fixed(SiteData(train=make_rows(2, 0)), **members)
    reply = ask(client, "query.describe", context_of(**config))
    assert re.search(says_of_setting(text), read_error(reply.error.reason)[1])


def prepared_of(images, context=None, **members):
    client = fixed(SiteData(train=make_rows(1, 0)), ClassificationClient, num_classes=2, **members)
    made = client(context or context_of())
    rows = [{"image": image, "label": 0, "patient": k} for k, image in enumerate(images)]
    prepared = made.prepare(rows, train=True)
    assert torch.equal(made.batch_of(prepared, [0])["label"], torch.tensor([0]))
    return [made.batch_of(prepared, [k])["image"][0].numpy() for k in range(len(rows))]


def test_ct_is_cut_to_its_window_and_scaled_to_0_and_1():
    units = np.array([[-1000.0, -160.0], [40.0, 500.0]])
    (found,) = prepared_of([units], modality="ct")
    np.testing.assert_allclose(found, [[[0, 0], [0.5, 1]]], atol=1e-6)
    (found,) = prepared_of([units], modality="ct", ct_window=(-1000.0, 1000.0))
    np.testing.assert_allclose(found, [[[0, 0.42], [0.52, 0.75]]], atol=1e-6)


def test_mr_brings_what_is_not_0_to_mean_0_and_deviation_1():
    image = np.array([[0, 10], [20, 30.0]])
    step = 10 / np.sqrt(200 / 3)
    found, constant = prepared_of([image, np.zeros((2, 2))], modality="mr")
    np.testing.assert_allclose(found, [[[0, -step], [0, step]]], atol=1e-5)
    np.testing.assert_array_equal(constant, np.zeros((1, 2, 2)))


def test_channels_are_scaled_by_themselves():
    image = np.array([[[0, 10], [20, 30.0]], [[7, 7], [7, 9.0]]])
    for modality in ("", "mr", "xray"):
        (found,) = prepared_of([image], modality=modality)
        alone = prepared_of(list(image), modality=modality)
        np.testing.assert_allclose(found, np.concatenate(alone), atol=1e-6)


def test_an_xray_is_scaled_between_its_first_and_last_percent():
    image = np.arange(101.0).reshape(1, 101)
    image[0, 0], image[0, 100] = -5000, 9000
    found, constant = prepared_of([image, np.full((1, 101), 3.0)], modality="xray")
    np.testing.assert_allclose(found[0, 0, 1:100], np.linspace(0, 1, 99), atol=1e-6)
    assert found[0, 0, [0, 100]].tolist() == [0, 1]
    assert np.isfinite(constant).all()


@pytest.mark.parametrize("modality", ["", "mr", "xray", "ct"])
@pytest.mark.parametrize("dims", [2, 3])
def test_an_image_of_one_value_stays_finite(modality, dims):
    flat = np.full((4, 5, 6)[:dims], 7.0)
    (found,) = prepared_of([flat], modality=modality, spatial_dims=dims)
    assert np.isfinite(found).all()


def test_a_patch_is_the_middle_of_an_image_and_small_images_are_padded():
    wide, small = np.arange(70.0).reshape(7, 10), np.ones((2, 2))
    context = context_of(patch_size="3,4")
    found, padded = prepared_of([wide, small], context, modality="ct", ct_window=(0, 70))
    np.testing.assert_allclose(found[0] * 70, wide[2:5, 3:7], atol=1e-4)
    assert padded.shape == (1, 3, 4)
    assert np.count_nonzero(padded) == 4


PLACE = np.diag([-2.0, 1.0, 3.0, 1.0])


def nifti(path, volume, affine=PLACE):
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)
    return path


@pytest.mark.parametrize("gigabytes", [8.0, 0.0])
def test_volumes_come_to_the_grid_of_the_run(tmp_path, gigabytes):
    volume = np.zeros((6, 5, 4), np.float32)
    volume[:3] = 100
    path = nifti(tmp_path / "a.nii.gz", volume)
    members = {"spatial_dims": 3, "modality": "ct", "ct_window": (0, 100)}
    more = {"cache_gigabytes": gigabytes}
    (found,) = prepared_of([path], context_of(spacing="1,1,1", **more), **members)
    # 6 voxels of 2 mm are 11 mm from the first middle to the last: as many steps of 1 mm.
    assert found.shape == (1, 11, 5, 10)
    # The file begins at the right.
    assert (found[0, -4:] == 1).all()
    assert (found[0, :5] == 0).all()
    (kept,) = prepared_of([path], context_of(orientation="", **more), **members)
    np.testing.assert_array_equal(kept[0], volume / 100)


# --- Made-up images -------------------------------------------------------------------------------


class Plain(ClassificationClient):
    num_classes = 3

    def load_data(self, site):
        raise AssertionError("the rows are looked at")


@pytest.mark.parametrize(
    ("members", "config", "shape"),
    [
        ({"image_shape": (1, 6, 5)}, {}, (1, 6, 5)),
        ({"image_shape": (3, 6, 5)}, {}, (3, 6, 5)),
        ({}, {"patch_size": "4,7"}, (1, 4, 7)),
        ({"image_shape": (3, 6, 5)}, {"patch_size": "4,7"}, (3, 4, 7)),
        ({"spatial_dims": 3, "image_shape": (2, 6, 5, 4)}, {}, (2, 6, 5, 4)),
        ({"spatial_dims": 3}, {"patch_size": "4,7,2", "spacing": "1,1,2"}, (1, 4, 7, 2)),
    ],
)
def test_made_up_images_have_the_declared_shape_and_each_class(members, config, shape):
    own = type("Client", (Plain,), members)(context_of(**config))
    rows = own.made_up(7)
    assert [row["image"].shape for row in rows] == [shape] * 7
    assert [row["label"] for row in rows] == [0, 1, 2, 0, 1, 2, 0]
    assert len({row["patient"] for row in rows}) == 7
    batch = own.probe(4)
    assert batch["image"].shape == (4, *shape)
    assert batch["label"].tolist() == [0, 1, 2, 0]
    assert len(batch["image"].unique(dim=0)) == 4


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"image_shape": (4, 4)}, "3 whole numbers above 0, got (4, 4)"),
        ({"image_shape": (1, 4, 0)}, "3 whole numbers above 0, got (1, 4, 0)"),
        ({"image_shape": (1, 4, 4.0)}, "3 whole numbers above 0, got (1, 4, 4.0)"),
        ({"image_shape": (1, 4, 10**6)}, "3 whole numbers above 0, got (1, 4, 1000000)"),
        (
            {"image_shape": (1, 4, 4), "spatial_dims": 3},
            "4 whole numbers above 0, got (1, 4, 4)",
        ),
    ],
)
def test_a_shape_that_images_cannot_have_is_refused(members, text):
    own = type("Client", (Plain,), members)(context_of())
    with pytest.raises(InputError, match=says(f"image_shape must be (channels, *spatial), {text}")):
        own.made_up(1)


def test_where_others_images_must_not_decide_the_declared_channels_do(tmp_path, caplog):
    colours = [row | {"image": np.zeros((3, 2, 2), np.uint8)} for row in make_rows(12, 1, "c")]
    data = SiteData(train=[*colours, *make_rows(11, 2, "g")])
    client = fixed(data)
    plain = context_of(node_config=node_of(tmp_path))
    of_colours = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    coloured = fixed(data, build_model=lambda self: of_colours)
    assert ask(coloured, "query.describe", plain).content["metrics"]["num-examples"] == 12
    assert "has 1 channels, most images have 3" in caplog.text
    caplog.clear()
    private = context_of(node_config=node_of(tmp_path), privacy="patient")
    assert ask(client, "train", private).content["metrics"]["num-examples"] == 23
    assert "has 3 channels, the client expects 1" in caplog.text
    assert "most images have" not in caplog.text


# --- Volumes --------------------------------------------------------------------------------------


def volumes(count, name="v"):
    """Volumes of which those with the finding have a bright spot."""
    rows = []
    for number in range(count):
        image = np.random.default_rng([len(name), number]).normal(size=(4, 5, 6))
        image[1:3, 2:4, 2:5] += 6 * (number % 2)
        rows.append({"image": image, "label": number % 2, "patient": f"{name}-{number}"})
    return rows


class VolumeClient(ClassificationClient):
    num_classes, spatial_dims, image_shape = 2, 3, (1, 4, 5, 6)

    def build_model(self):
        return nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2))

    def load_data(self, site):
        parts = zip(("train", "val", "test"), (8, 2, 4), strict=True)
        return SiteData(*(volumes(n, f"{site.name}-{name}") for name, n in parts))


@pytest.mark.parametrize("privacy", ["none", "patient"])
def test_volumes_are_told_apart(tmp_path, privacy):
    config = {"privacy": privacy, "target_epsilon": 1e6, "sampling_rate": 0.5}
    config |= {"num_server_rounds": 2, "local_epochs": 6, "learning_rate": 0.1, "pictures": 1}
    model = VolumeClient(context_of()).build_model
    run_tiny(tmp_path / "run", VolumeClient, model=model, **config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["failures"] == []
    assert summary["test"]["federated"]["auc"] > 0.9
    assert summary["test"]["federated"]["num-examples"] == 8
    assert ("patient" in summary["privacy"]) == (privacy == "patient")
    assert len(summary["pictures"]) in (2, 3, 4)


def test_volumes_go_through_the_network_one_by_one():
    sizes = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(120, 2)

        def forward(self, images):
            sizes.append(len(images))
            return self.layer(images.flatten(1))

    client = fixed(
        SiteData(train=volumes(2), test=volumes(3, "test")),
        VolumeClient,
        build_model=lambda self: Watched(),
    )
    arrays = model_arrays(Watched)
    ask(client, "evaluate", context_of(), arrays, split="test")
    assert sizes == [1, 1, 1]


# --- Pictures -------------------------------------------------------------------------------------


class LooksAt(nn.Module):
    """Adds up what is bright in one corner; above `least`, that is a finding."""

    def __init__(self, dims, outputs=2, least=0.02):
        super().__init__()
        self.features = (nn.Conv2d if dims == 2 else nn.Conv3d)(1, 2, 1, bias=False)
        nn.init.constant_(self.features.weight, 1.0)
        self.dims, self.outputs, self.least = dims, outputs, least

    def forward(self, images):
        found = self.features(images).clamp(min=0)
        corner = found[(slice(None), slice(None), *[slice(0, 8)] * self.dims)]
        score = corner.flatten(1).mean(1, keepdim=True) - self.least
        nothing = torch.zeros_like(score)
        return {
            1: score,
            2: torch.cat([nothing, score], 1),
            # The same in a network that is sure, of three classes, in which all is shifted.
            3: 300 + 40 * torch.cat([nothing, score, nothing - 1], 1),
        }[self.outputs]


def two_spots(dims):
    """An image with two bright spots: of the darker one the network above knows nothing."""
    image = np.zeros((24, 20, 28)[:dims], np.float32)
    image[tuple([slice(2, 5)] * dims)] = 10
    image[tuple([slice(-6, -2)] * dims)] = 5
    return image


def heat_of(model, image, label=1, **members):
    """Return the picture's map as `draw` hands it on, and the title."""
    dims = image.ndim
    seen = []
    row = {"image": image, "label": label, "patient": "Max Muster"}
    data = SiteData(make_rows(1, 0), test=[row])
    members = {"num_classes": max(2, model.outputs), "spatial_dims": dims} | members
    client = fixed(data, ClassificationClient, modality="ct", ct_window=(0.0, 10.0), **members)
    made = client(context_of())
    before = whole_image.heatmap
    try:
        whole_image.heatmap = lambda *given: seen.append(given) or before(*given)
        pictures = made.draw(model, made.prepare(data.test, train=False), 2)
    finally:
        whole_image.heatmap = before
    ((shown, found, title, _),) = seen
    assert [picture.title for picture in pictures] == [title]
    np.testing.assert_allclose(shown[0], image / 10)
    assert found.shape == image.shape
    return found, title


@pytest.mark.parametrize("layer", ["", "features"])
@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_map_points_at_what_the_network_looks_at(dims, outputs, layer):
    found, title = heat_of(LooksAt(dims, outputs), two_spots(dims), cam_layer=layer)
    at = np.unravel_index(found.argmax(), found.shape)
    assert all(place < 8 for place in at)
    assert title.startswith("the highest loss: class 1, given ")
    elsewhere = found[tuple([slice(12, None)] * dims)]
    if not layer:
        # Grad-CAM weighs channels, not places; covering shows what does not matter.
        assert abs(elsewhere).max() < 1e-4 * found.max()
        assert found.min() > -0.05 * found.max()
    middle = found[tuple([slice(10, 12)] * dims)]
    assert abs(middle).max() < 0.1 * found.max()


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_what_speaks_against_the_class_that_the_title_names_is_below_0(outputs, label):
    # The spot speaks for class 1, but is not bright enough: class 0 is likelier.
    found, title = heat_of(LooksAt(2, outputs, least=0.9), two_spots(2), label)
    sign = 1 if label else -1
    at = np.unravel_index(abs(found).argmax(), found.shape)
    assert max(at) < 8
    assert sign * found[at] > 0
    assert (sign * found).min() > -0.05 * abs(found[at])
    assert title.startswith(f"the highest loss: class {label}, given ")
    assert (int(re.search(r"given (\d+)%", title)[1]) < 50) == bool(label)


def test_a_map_of_a_frozen_layer():
    model = LooksAt(2)
    model.requires_grad_(False)
    found, _ = heat_of(model, two_spots(2), cam_layer="features")
    assert found.argmax() < 8 * 20
    assert found.max() > 0


def test_a_layer_that_is_not_there():
    text = "cam_layer must name a layer of the model, such as features, got 'feature'"
    with pytest.raises(InputError, match=says(text)):
        heat_of(LooksAt(2), two_spots(2), cam_layer="feature")


def test_titles_have_the_names_of_classes_if_there_is_one_for_each():
    rows = make_rows(2, 1)
    titles = {}
    for names in (("no finding", "pneumonia"), ("one",)):
        made = fixed(SiteData(rows), class_names=names)(context_of())
        pictures = made.draw(made.build_model(), made.prepare(rows, train=False), 2)
        titles[names] = [picture.title.partition(": ")[2].split(",")[0] for picture in pictures]
    assert titles == {
        ("no finding", "pneumonia"): ["no finding", "pneumonia"],
        ("one",): ["class 0", "class 1"],
    }


def test_titles_name_class_and_share_and_no_patient():
    weights = {"0.weight": torch.zeros(2, 4), "0.bias": torch.tensor([0.0, np.log(3.0)])}

    class Client(TinyClient):
        def build_model(self):
            return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

    rows = make_rows(5, 1, "Erika Mustermann")
    made = fixed(SiteData(make_rows(2, 0), test=rows), Client)(context_of())
    model = made.build_model()
    model.load_state_dict({name.replace("0.", "1."): value for name, value in weights.items()})
    pictures = made.draw(model, made.prepare(rows, train=False), 3)
    # Class 0 is given a quarter, so that the first of its rows has the highest loss.
    assert [picture.title for picture in pictures] == [
        "the highest loss: class 0, given 25%",
        "case 2: class 1, given 75%",
        "case 3: class 0, given 25%",
    ]
    pictures = made.draw(model, made.prepare(rows[1:], train=False), 1)
    assert [picture.title for picture in pictures] == [
        "case 1: class 1, given 75%",
        "the highest loss: class 0, given 25%",
    ]


def test_drawing_does_not_change_the_model():
    model = LooksAt(2)
    before = bits(model_arrays(lambda: model))
    for layer in ("", "features"):
        heat_of(model, two_spots(2), cam_layer=layer)
    assert bits(model_arrays(lambda: model)) == before


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ((1, 2), "label 2 is out of range: labels must be integers from 0 to 1"),
        (("cat", "dog"), "label 'cat' is a text: labels must be integers from 0 on, so number the"),
    ],
)
def test_labels_that_are_coded_otherwise_are_refused_before_the_first_round(tmp_path, labels, text):
    class Coded(TinyClient):
        def load_data(self, site):
            data = super().load_data(site)
            coded = [row | {"label": labels[row["label"]]} for row in data.train]
            return replace(data, train=coded)

    with pytest.raises(InputError, match=re.escape(text)) as error:
        run_tiny(tmp_path / "run", Coded)
    wrong = 5 if labels[0] == 1 else 10
    assert str(error.value).startswith(
        f"{wrong} of 10 rows of the train split have labels that are no class, such as that of "
    )
    assert not (tmp_path / "run").exists()


# Several volumes in a file, and one image under two names


class FourD(ClassificationClient):
    spatial_dims = 3
    num_classes = 2
    image_shape = (2, 2, 2, 2)

    def build_model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))


def volumes_in(folder, count=6, volumes=2):
    """Return rows whose images are files of several volumes."""
    rng = np.random.default_rng(3)
    rows = []
    for number in range(count):
        values = rng.normal(size=(2, 2, 2, volumes)).astype(np.float32)
        path = folder / f"{number}.nii"
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
        rows.append({"image": str(path), "label": number % 2, "patient": f"p{number}"})
    return rows


def test_the_volumes_of_a_file_are_the_channels_that_the_client_declares(tmp_path):
    rows = volumes_in(tmp_path)
    client = fixed(SiteData(rows), FourD)
    model = model_arrays(lambda: FourD.build_model(None))
    found = trained(client, context_of(), model)
    said = [row | {"frames": "channels"} for row in rows]
    undeclared = fixed(SiteData(said), FourD, image_shape=())
    assert trained(undeclared, context_of(), model) == found


def test_volumes_that_nobody_explains_are_rejected(tmp_path, caplog):
    rows = volumes_in(tmp_path, volumes=3)
    model = model_arrays(lambda: FourD.build_model(None))
    unsaid = fixed(SiteData(rows), FourD, image_shape=())
    reply = ask(unsaid, "train", context_of(), model)
    assert "holds 3 volumes (4D), which may be channels, times or b-values" in reply.error.reason
    reply = ask(fixed(SiteData(rows), FourD), "train", context_of(), model)
    assert "0.nii holds 3 volumes (4D), and 2 channels are expected" in reply.error.reason
    one = [row | {"frames": 1} for row in rows]
    one[2] = one[2] | {"frames": 3}
    shape = (1, 2, 2, 2)
    client = fixed(SiteData(one), FourD, image_shape=shape, build_model=lambda self: eight())
    trained(client, context_of(), model_arrays(eight))
    path = rows[2]["image"]
    assert rejected(caplog)[-1] == (
        f"hospital-1: rejected, train split, patient p2: {path} holds 3 volumes, numbered from 0, "
        "and frames says 3"
    )


def eight():
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 2))


def with_copies(split, count=1, rows=6):
    """Return a hospital where images of the training have the names of other patients."""
    parts = {"train": make_rows(6, 0), "val": [], "test": make_rows(rows, 1, "t")}
    copies = [{**row, "patient": f"Bo-{k}"} for k, row in enumerate(parts["train"][2:])]
    return SiteData(**parts | {split: [*parts[split], *copies[:count]]})


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_image_that_another_patient_has_in_training_is_left_out_of_other_splits(caplog, split):
    client, context = fixed(with_copies(split, 2)), context_of()
    reply = ask(client, "query.describe", context)
    assert reply.content["metrics"]["rejected"] == 2
    assert reply.content["metrics"][split] == {"val": 0, "test": 6}[split]
    assert rejected(caplog) == [
        f"hospital-1: rejected, {split} split, patient Bo-{k}: array is the image array of patient "
        f"p-{k + 2} in an earlier split, value for value"
        for k in range(2)
    ]


def test_the_order_of_messages_does_not_decide_which_copy_is_left_out():
    data = with_copies("test", 2)
    client, context = fixed(data), context_of()
    assert not ask(client, "evaluate", context, split="test").has_error()
    found = {split: client(context).screened(split) for split in ("train", "val", "test")}
    assert (found["train"], found["test"]) == (data.train, data.test[:6])


def test_many_copies_stop_the_hospital_whatever_is_asked():
    text = (
        "3 of 9 rows of the test split have images of patients in an earlier split, such as "
        "patient Bo-0: array is the image array of patient p-2 in an earlier split, value for "
        "value; give each patient one name in all rows"
    )
    client, context = fixed(with_copies("test", 3)), context_of()
    for kind, config in (("query.describe", {}), ("evaluate", {"split": "test"})) * 2:
        reply = ask(client, kind, context, **config)
        assert read_error(reply.error.reason) == ("hospital-1", text)
    # Three among more are fewer than one in twenty.
    few = fixed(with_copies("test", 3, rows=60))
    assert not ask(few, "query.describe", context_of()).has_error()


def test_an_image_of_two_patients_in_one_split_is_a_warning(caplog):
    reply = ask(fixed(with_copies("train")), "query.describe", context_of())
    assert reply.content["metrics"]["train"] == 7
    lines = [r.getMessage() for r in caplog.records if "same image" in r.getMessage()]
    assert lines == [
        "hospital-1: train split, patients p-2 and Bo-0 have the same image, value for value: "
        "array and array"
    ]


def test_two_images_of_one_patient_and_images_of_one_value_may_be_the_same(caplog):
    rows = make_rows(6, 0)
    twice = [*rows, {**rows[0], "patient": " p-0"}]
    flat = [{**row, "image": np.full((2, 2), 7)} for row in make_rows(4, 1, "t")]
    data = SiteData([*twice, flat[0]], test=flat[1:])
    reply = ask(fixed(data), "query.describe", context_of())
    assert reply.content["metrics"]["rejected"] == 0
    assert "same image" not in caplog.text


def test_in_private_training_another_patient_does_not_decide_about_one(tmp_path, caplog):
    data = SiteData(make_rows(12, 0), test=make_rows(12, 0, "t"))
    client = fixed(data, image_shape=(1, 2, 2))
    context = context_of(node_config=node_of(tmp_path), privacy="patient")
    reply = ask(client, "train", context)
    assert not reply.has_error()
    plain = context_of(node_config=node_of(tmp_path))
    assert ask(client, "query.describe", plain).has_error()


def test_a_subclass_may_screen_in_its_own_way():
    client = fixed(with_copies("test"), screen=lambda self, rows, split: list(rows))
    reply = ask(client, "query.describe", context_of())
    assert reply.content["metrics"]["test"] == 7
