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
from tiny import TinyClient, ask, bits, context_of, fixed, linear, make_rows, model_arrays, trained
from torch import nn

from fedmed_flower import SiteData
from fedmed_flower.data.site import read_error
from fedmed_flower.metrics import classification_metrics


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


@pytest.mark.parametrize("label", [2, -1, 1.0, "1", None])
def test_a_label_out_of_range(label):
    rows = make_rows(5, 0)
    rows[3]["label"] = label
    client = fixed(SiteData(train=make_rows(2, 1, "q"), test=rows))
    text = (
        f"label {label!r} of row 3 of the test split of hospital-1 is out of range: "
        "labels must be integers from 0 to 1 (num_classes - 1)"
    )
    assert reason_of(client) == text
    assert reason_of(client, "query.describe") == text


@pytest.mark.parametrize("key", ["image", "label"])
def test_a_row_without_image_or_label(key):
    rows = make_rows(2, 0)
    del rows[1][key]
    text = f"row 1 of the train split of hospital-1 has no {key}"
    assert reason_of(fixed(SiteData(train=rows))) == text


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, np.int32])
def test_labels_may_be_integers_of_any_kind(kind):
    rows = [row | {"label": kind(row["label"])} for row in make_rows(10, 0)]
    expected = trained(fixed(SiteData(train=make_rows(10, 0))), context_of())
    assert trained(fixed(SiteData(train=rows)), context_of()) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_with_values_that_are_not_finite(value):
    images = [image.astype(float) for image in pictures()]
    images[2][1, 1] = value
    reason = reason_of(with_images(images))
    assert reason == "image of patient 2: it holds NaN or infinite values"


@pytest.mark.parametrize(
    ("shape", "told"), [((4,), "(4,)"), ((1, 1, 2, 2), "(1, 1, 2, 2)"), ((), "()")]
)
def test_an_image_of_the_wrong_dimensions(shape, told):
    reason = reason_of(with_images([np.ones(shape)]))
    assert reason == (
        f"image of patient 0: its shape is {told}; spatial_dims = 2 asks for 2 dimensions, "
        "or one more with the channel first"
    )


def test_a_path_where_no_image_is(tmp_path):
    path = tmp_path / "gone.png"
    reason = reason_of(with_images([str(path)]))
    assert reason == f"image of patient 0: {path} is not there"


def test_a_file_that_is_no_image(tmp_path):
    path = tmp_path / "scan.png"
    path.write_text("this is no picture")
    reason = reason_of(with_images([str(path)]))
    assert str(path) in reason, reason


def test_a_broken_image_in_test_does_not_hinder_training():
    broken = make_rows(2, 1, "q")
    broken[0]["image"] = np.full((2, 2), np.nan)
    client = fixed(SiteData(train=make_rows(4, 0), test=broken))
    assert not ask(client, "train", context_of()).has_error()
    assert "NaN" in reason_of(client, "evaluate", split="test")


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
    outcomes = [
        trained(type("Client", (with_images(images),), {"spatial_dims": 3}), context_of())
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
