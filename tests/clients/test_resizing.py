import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TinyClient, context_of, fixed, run_tiny, says_of_setting
from torch import nn

from fedmed_flower import InputError, SegmentationClient, SiteData
from fedmed_flower.clients.resizing import FitIntod
from fedmed_flower.prediction.predictor import example_of


def photograph(wide, high, seed=0):
    """Return a smooth grey picture with a bright corner, (rows, columns)."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 255, (8, 8)).astype(np.uint8))
    return np.asarray(rough.resize((wide, high), Image.Resampling.BICUBIC), np.float32)


def fitted(image, size, label=None):
    row = {"image": torch.as_tensor(image)[None]}
    if label is not None:
        row["label"] = torch.as_tensor(label)[None]
    return FitIntod([*row], size)(row)


@pytest.mark.parametrize(("wide", "high"), [(1024, 768), (800, 600)])
def test_a_photograph_is_whole_in_its_size_and_keeps_its_proportions(wide, high):
    image = photograph(wide, high)
    found = fitted(image, (224, 224))["image"][0].numpy()
    assert found.shape == (168, 224)
    # Another implementation: Pillow's mean over the area of each new pixel.
    expected = Image.fromarray(image).resize((224, 168), Image.Resampling.BOX)
    np.testing.assert_allclose(found, np.asarray(expected), atol=3.0)


def test_pixels_are_means_so_that_a_fine_pattern_turns_grey():
    stripes = np.tile(np.float32([0, 1]), (128, 64))
    found = fitted(stripes, (32, 32))["image"]
    assert torch.equal(found[0], torch.full((32, 32), 0.5))


def test_a_volume_that_grows_is_interpolated_and_its_mask_takes_the_nearest_class():
    image = np.random.default_rng(1).random((6, 4, 3)).astype(np.float32)
    mask = np.random.default_rng(2).integers(0, 3, (6, 4, 3)).astype(np.uint8)
    found = fitted(image, (12, 12, 12), mask)
    assert found["image"].shape == found["label"].shape == (1, 12, 8, 6)
    expected = nn.functional.interpolate(
        torch.as_tensor(image)[None, None], (12, 8, 6), mode="trilinear"
    )
    torch.testing.assert_close(found["image"].as_tensor(), expected[0])
    doubled = mask.repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(found["label"][0], doubled)


@pytest.mark.parametrize("sides", [(40, 30), (10, 5), (16, 16)])
def test_the_inverse_gives_back_size_and_place(sides):
    step = FitIntod(["image"], (20, 20))
    ramp = np.add.outer(np.arange(sides[0]), 2 * np.arange(sides[1])).astype(np.float32)
    back = step.inverse(step({"image": torch.as_tensor(ramp)[None]}))["image"]
    assert back.shape == (1, *sides)
    # A ramp survives but for its ends, wherever it is shrunk or grown about the right place.
    inner = (slice(3, -3),) if min(sides) > 6 else (slice(1, -1),)
    np.testing.assert_allclose(back[0][inner * 2], ramp[inner * 2], atol=1e-3)


class Shades(TinyClient):
    """Tells dark photographs from bright ones."""

    def build_model(self):
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 2))


def photographs(count, name):
    shapes = [(102, 76), (80, 60), (60, 80)]
    rows = []
    for number in range(count):
        image = 0.5 * photograph(*shapes[number % 3], 100 * ord(name) + number) + 100 * (number % 2)
        rows.append({"image": image, "label": number % 2, "patient": f"{name}-{number}"})
    return rows


def test_photographs_of_several_sizes_train_in_one_batch_and_are_padded():
    data = SiteData(photographs(6, "a"), test=photographs(6, "b"))
    client = fixed(data, Shades)(context_of(image_size="32,32", batch_size=6))
    prepared = client.prepare(data.train, train=True)
    batch = client.batch_of(prepared, range(6))["image"]
    assert batch.shape == (6, 1, 32, 32)
    # 76 to 102 is 24 to 32: four rows of padding above and below.
    assert not batch[0, 0, :4].any()
    assert not batch[0, 0, -4:].any()
    assert batch[0, 0, 4:-4].any(dim=1).all()
    # Patches are cut out of it: the middle, in classification.
    both = fixed(data, Shades)(context_of(image_size="32,32", patch_size="16,16"))
    middle = both.batch_of(both.prepare(data.train, train=True), [0])["image"]
    assert torch.equal(middle[0, 0], batch[0, 0, 8:24, 8:24])
    # What a predictor is traced on has the size too.
    assert example_of(client, client.build_model())[0].shape == (2, 1, 32, 32)


def test_sizes_are_declared_for_private_training():
    client = Shades(context_of(image_size="32,24", privacy="patient"))
    assert client.probe(3)["image"].shape == (3, 1, 32, 24)
    with pytest.raises(InputError, match="or set image-size or patch-size"):
        type("Unsized", (Shades,), {"image_shape": ()})(context_of()).made_up(3)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"image_size": "32,32", "spacing": "1,1"},
            "image-size must be empty if spacing is set: each scales the images, got '32,32'",
        ),
        ({"image_size": "32"}, "image-size must be empty or 2 numbers, one an axis, got '32'"),
        (
            {"image_size": "99999,99999"},
            "image-size must be of at most 134,217,728 pixels or voxels, got '99999,99999'",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, text):
    with pytest.raises(InputError, match=says_of_setting(text)):
        _ = Shades(context_of(**settings)).image_size


def test_images_of_two_shapes_hint_at_the_size():
    data = SiteData(photographs(2, "a"))
    client = fixed(data, Shades)(context_of())
    with pytest.raises(InputError, match="set image-size, which takes whole images, or patch-size"):
        client.batch_of(client.prepare(data.train, train=True), range(2))


class Bright(SegmentationClient):
    """Outlines what is bright; the network looks at one pixel."""

    classes = ("bright",)
    modality = "ct"
    ct_window = (0.0, 100.0)

    def build_model(self):
        return Threshold()

    def load_data(self, site):
        raise NotImplementedError


class Threshold(nn.Module):
    def __init__(self):
        super().__init__()
        self.steep = nn.Parameter(torch.tensor(40.0))

    def forward(self, images):
        score = self.steep * (images - 0.5)
        return torch.cat([-score, score], dim=1)


@pytest.mark.parametrize("sides", [(96, 64), (24, 16)])
@pytest.mark.parametrize("patch_size", ["", "32,32"])
def test_masks_are_measured_on_their_own_grid(sides, patch_size):
    mask = np.zeros(sides, np.uint8)
    mask[sides[0] // 8 : sides[0] // 2, sides[1] // 4 :] = 1
    rows = [{"image": 100.0 * mask.astype(np.float32), "label": mask, "patient": "a"}]
    client = fixed(SiteData(rows), Bright)(context_of(image_size="48,48", patch_size=patch_size))
    model = client.build_model()
    prepared = client.prepare(rows, train=False)
    (found,) = client.predict(model, prepared)
    assert found.shape == sides
    assert client.measure(model, prepared)["dice"] > 0.97
    batch = client.batch_of(client.prepare(rows, train=True), [0])
    size = (32, 32) if patch_size else (48, 48)
    assert batch["image"].shape == batch["label"].shape == (1, 1, *size)
    assert set(batch["label"].unique().tolist()) <= {0, 1}


def test_a_run_on_photographs_learns(tmp_path):
    data = SiteData(photographs(12, "a"), test=photographs(12, "b"))
    client = fixed(data, Shades, modality="ct", ct_window=(0, 255))
    run_tiny(
        tmp_path,
        client,
        model=lambda: Shades.build_model(None),
        image_size="16,16",
        learning_rate=0.5,
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test"]["federated"]["auc"] == 1.0
