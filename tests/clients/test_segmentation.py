import csv
import json
import zlib
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch
from dicom_files import write_rtstruct, write_seg, write_series
from flwr.app import ArrayRecord
from monai.data import get_track_meta, set_track_meta
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet, UNet
from monai.transforms import Flipd, RandCropByPosNegLabeld, RandFlipd, RandGaussianNoised, Resized
from PIL import Image
from safetensors.torch import load_file
from tiny import ask, bits, context_of, fixed, model_arrays, run_tiny, trained
from torch import nn

from fedmed_flower import SegmentationClient, SiteData
from fedmed_flower.clients.augmenting import random_affine
from fedmed_flower.data.phantoms import hippocampi
from fedmed_flower.metrics.segmentation import mask_scores
from fedmed_flower.wire import ALL_SITES, read_error

LEVELS = (0.0, 0.5, 1.0)


class Nearest(nn.Module):
    """Gives each voxel the class whose level its value is nearest to, the background's first."""

    def __init__(self, dims=2, levels=LEVELS):
        super().__init__()
        self.levels = nn.Parameter(torch.tensor(levels).view(1, -1, *[1] * dims))

    def forward(self, images):
        return -50 * (images - self.levels) ** 2


class Levels(SegmentationClient):
    """Images of three levels, which are the classes; trains a network that looks at one voxel."""

    classes = ("low", "high")
    modality = "ct"
    ct_window = (0.0, 200.0)

    def build_model(self):
        return Nearest(self.spatial_dims)

    def load_data(self, site):
        return data_of(1)


class Volumes(Levels):
    spatial_dims = 3


def image_of(mask, seed=0, noise=0.0):
    rough = noise * np.random.default_rng(seed).normal(size=mask.shape)
    return (100.0 * mask + rough).astype(np.float32)


def blocks(shape, seed):
    """Return a mask with a block of each class at a random place."""
    rng, mask = np.random.default_rng([*shape, seed]), np.zeros(shape, np.uint8)
    for number in (1, 2):
        low = [rng.integers(0, side // 2) for side in shape]
        mask[tuple(slice(a, a + side // 2) for a, side in zip(low, shape, strict=True))] = number
    return mask


def rows_of(count, shape=(16, 16), name="p", noise=20.0):
    rows = []
    for number in range(count):
        mask = blocks(shape, number)
        # No two patients have one image, whatever their split.
        image = image_of(mask, number + 1000 * zlib.crc32(name.encode()), noise)
        rows.append({"image": image, "label": mask, "patient": f"{name}-{number}"})
    return rows


def data_of(train=4, val=0, test=0, **more):
    parts = {"train": train, "val": val, "test": test}
    return SiteData(**{k: rows_of(count, name=k, **more) for k, count in parts.items()})


def client_of(data, base=Levels, **members):
    return fixed(data, base, **members)


def start(client, seed=0):
    """Return the arrays of the client's own network."""
    return model_arrays(client(context_of()).build_model, seed)


def reason_of(client, kind="train", context=None, **config):
    reply = ask(client, kind, context or context_of(), start(client), **config)
    assert reply.has_error()
    return read_error(reply.error.reason)[1]


def measured(client, context=None, split="test", **more):
    arrays = start(client)
    reply = ask(client, "evaluate", context or context_of(**more), arrays, split=split)
    assert not reply.has_error(), reply.error.reason
    return dict(reply.content["metrics"])


def seeing(client):
    """Return a client that also keeps each mask that counts, on the grid of the file."""
    seen = []

    def postprocess(self, mask):
        seen.append(mask)
        return mask

    return type("Seeing", (client,), {"postprocess": postprocess}), seen


# --- Runs -----------------------------------------------------------------------------------------


class Discs(SegmentationClient):
    """Bright discs in pictures, the truth as PNG files with 0 and 255."""

    classes, label_values, folder = ("disc",), (0, 255), None

    def build_model(self):
        return nn.Conv2d(1, 2, 3, padding=1)

    def rows_of(self, index):
        rows = []
        for number in range(6 + 2 * index):
            rng = np.random.default_rng([index, number])
            y, x = np.mgrid[:20, :24]
            mask = np.hypot(y - rng.integers(6, 14), x - rng.integers(6, 18)) < 5
            image = np.clip(60 + 120 * mask + rng.normal(0, 40, mask.shape), 0, 255)
            paths = [self.folder / f"{index}-{number}-{kind}.png" for kind in ("image", "mask")]
            for path, pixels in zip(paths, (image, 255 * mask), strict=True):
                Image.fromarray(pixels.astype(np.uint8)).save(path)
            patient = f"hospital-{index}-{number}"
            rows.append({"image": paths[0], "label": str(paths[1]), "patient": patient})
        return rows

    def held_out(self, index):
        return self.rows_of(index)[4:]

    def load_data(self, site):
        rows = self.rows_of(site.index)
        return SiteData(rows[:3], rows[3:4], self.held_out(site.index))


def test_a_run_on_pictures_learns_and_its_figures_are_those_over_all_patients(tmp_path):
    (tmp_path / "data").mkdir()
    client = type("Client", (Discs,), {"folder": tmp_path / "data"})
    run = tmp_path / "run"
    config = {"num_server_rounds": 3, "local_epochs": 8, "learning_rate": 1.0, "pictures": 1}
    run_tiny(run, client, model=client(context_of()).build_model, **config)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["failures"] == []
    together, sites = summary["test"]["federated"], summary["test"]["sites"]
    assert 0.9 < together["dice"] < 1
    assert [one["num-examples"] for one in sites.values()] == [2, 4]
    assert sites["hospital-1"]["dice"] != sites["hospital-2"]["dice"]
    # All test patients at one hospital.
    rows = [row for index in (0, 1) for row in client(context_of(index)).held_out(index)]
    data = SiteData(client(context_of()).held_out(7), test=rows)
    arrays = ArrayRecord(load_file(run / "model.safetensors"))
    reply = ask(client_of(data, client), "evaluate", context_of(), arrays, split="test")
    wanted = dict(reply.content["metrics"])
    assert wanted.pop("num-examples") == 6
    assert together == pytest.approx(wanted, abs=1e-9)
    assert set(wanted) == {
        *("dice", "hd95", "surface-dice", "dice-worst"),
        *("dice-disc", "hd95-disc", "surface-dice-disc"),
    }
    titles = [picture["title"] for picture in summary["pictures"]]
    assert len(titles) in (3, 4)
    assert "hospital" not in " ".join(titles)


class Hippocampi(SegmentationClient):
    classes, spatial_dims, modality = ("anterior", "posterior"), 3, "mr"

    def build_model(self):
        return UNet(3, 1, 3, (4, 8), (2,), norm="instance")

    def load_data(self, site):
        rows = hippocampi(8, site.index, size=13).rows
        return SiteData(rows[:5], rows[5:6], rows[6:])


def test_a_run_on_volumes_of_different_shapes(tmp_path):
    # Without patch-size they are padded to a multiple of 16, in training as in evaluation.
    config = {"num_server_rounds": 2, "optimizer": "adam", "learning_rate": 0.02, "batch_size": 2}
    model = Hippocampi(context_of()).build_model
    run_tiny(tmp_path / "run", Hippocampi, model=model, local_epochs=4, **config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["failures"] == []
    losses = [
        float(row["value"])
        for row in csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines())
        if (row["phase"], row["metric"], row["site"]) == ("train", "loss", ALL_SITES)
    ]
    assert losses[1] < losses[0]
    assert 0 < summary["test"]["federated"]["dice"] < 1


def test_masks_in_every_form_train_to_the_same_bits(tmp_path):
    rows = rows_of(4)
    expected = trained(client_of(SiteData(rows)), context_of(), start(Levels))
    assert expected != bits(start(Levels))
    forms = {
        "channel": lambda mask, path: mask[None],
        "float": lambda mask, path: mask.astype(np.float64),
        "list": lambda mask, path: mask.tolist(),
        "npy": lambda mask, path: np.save(path.with_suffix(".npy"), mask),
        "png": lambda mask, path: Image.fromarray(mask).save(path.with_suffix(".png")),
        # Of one slice: (columns, rows).
        "nii.gz": lambda mask, path: nibabel.save(
            nibabel.Nifti1Image(mask.T[..., None], np.eye(4)), f"{path}.nii.gz"
        ),
    }
    for form, convert in forms.items():
        changed = []
        for number, row in enumerate(rows):
            path = tmp_path / f"{number}"
            made = convert(row["label"], path)
            changed.append(row | {"label": f"{path}.{form}" if made is None else made})
        found = trained(client_of(SiteData(changed)), context_of(), start(Levels))
        assert found == expected, form


def test_volumes_from_nifti_train_to_the_same_bits_as_arrays(tmp_path):
    rows = rows_of(3, (10, 9, 8))
    files = [
        {
            "patient": row["patient"],
            **{
                key: save(tmp_path / f"{number}-{key}.nii.gz", row[key], np.eye(4))
                for key in ("image", "label")
            },
        }
        for number, row in enumerate(rows)
    ]
    outcomes = [
        trained(client_of(SiteData(part), Volumes), context_of(), start(Volumes))
        for part in (rows, files)
    ]
    assert outcomes[0] == outcomes[1] != bits(start(Volumes))


def test_masks_from_dicom_files_train_to_the_same_bits_as_arrays(tmp_path):
    outlines = []
    for number, row in enumerate(rows_of(3, (10, 9, 8))):
        folder = tmp_path / str(number)
        mask = row["label"]
        write_series(folder, row["image"], origin=(5, 6, 7), seed=number)
        image = {"image": str(folder), "patient": row["patient"]}
        frames = [
            (place, (5, 6, 7 + z), (mask[:, :, z] == place).T) for z in range(8) for place in (1, 2)
        ]
        labels = [{"SegmentLabel": "Low"}, {"meaning": "high"}]
        segments = write_seg(tmp_path / f"{number}-seg.dcm", labels, frames, frame_of_reference="")
        regions = {
            name: [np.add((5, 6, 7), around(voxel)) for voxel in np.argwhere(mask == place)]
            for place, name in ((1, "LOW"), (2, "High"))
        }
        contours = write_rtstruct(tmp_path / f"{number}-rs.dcm", regions)
        outlines.append([image | {"label": part} for part in (mask, str(segments), str(contours))])
    clients = [client_of(SiteData(rows), Volumes) for rows in zip(*outlines, strict=True)]
    found = [trained(client, context_of(), start(Volumes)) for client in clients]
    assert found[0] == found[1] == found[2] != bits(start(Volumes))


def around(voxel):
    """The outline of one voxel on its plane."""
    steps = [(-0.5, -0.5, 0), (-0.5, 0.5, 0), (0.5, 0.5, 0), (0.5, -0.5, 0)]
    return np.add(voxel, steps)


def save(path, array, affine):
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return str(path)


# --- Where things are -----------------------------------------------------------------------------

# Voxels to millimetres: mirrored, permuted, tilted; spacing 1.5 x 1 x 2 along the file's axes.
PLACES = {
    "LAS": np.diag([-1.5, 1.0, 2.0, 1.0]),
    "PSR": np.array([[0, 0, 2.0, 5], [-1.5, 0, 0, 7], [0, 1.0, 0, -3], [0, 0, 0, 1]]),
    "tilted": np.array(
        [[-1.45, 0.2, 0, 5], [0.3, 0.98, 0.1, 7], [0, -0.05, 2.0, -3], [0, 0, 0, 1]]
    ),
}


def corner_case(tmp_path, place, shape=(18, 14, 12)):
    """A block in one corner of the file and a second one elsewhere, both with the file's place."""
    mask = np.zeros(shape, np.uint8)
    mask[:7, -7:, :5] = 1
    mask[10:16, 2:7, 6:11] = 2
    paths = {
        "image": save(tmp_path / "image.nii.gz", image_of(mask), PLACES[place]),
        "label": save(tmp_path / "label.nii.gz", mask, PLACES[place]),
    }
    return {**paths, "patient": "a"}, mask


GRIDS = [
    {},
    {"spacing": "1,1,1"},
    {"spacing": "0.8,0.9,1.1", "orientation": "LPS"},
    {"orientation": "", "spacing": "1,1,1"},
    {"spacing": "1,1,1", "patch_size": "12,12,12"},
    {"spacing": "2,0.7,1.2", "orientation": "SRA", "patch_size": "40,6,12"},
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: " ".join(grid.values()))
@pytest.mark.parametrize("place", PLACES)
def test_masks_come_back_to_the_grid_of_their_file(tmp_path, place, grid):
    row, truth = corner_case(tmp_path, place)
    client = client_of(SiteData([], test=[row]), Volumes)
    client, seen = seeing(client)
    found = measured(client, **grid)
    # Where the grid is another one, a border may move by part of a voxel.
    least = 0.8 if "spacing" in grid else 1.0
    assert found["dice-low"] >= least
    assert found["dice-high"] >= least
    (mask,) = seen
    assert mask.shape == truth.shape
    inside = np.zeros(truth.shape, bool)
    inside[1:6, -6:-1, 1:4] = True
    assert (mask[inside] == 1).all()
    assert (mask[::-1][inside] != 1).any()
    # Millimetres of the file, not of the grid on which the network works.
    assert found["hd95-high"] <= 2.0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("gigabytes", [8.0, 0.0])
@pytest.mark.parametrize("tracked", [True, False])
def test_image_and_mask_of_a_training_row_lie_on_each_other(tmp_path, place, gigabytes, tracked):
    row, truth = corner_case(tmp_path, place)
    # An array has no place of its own: it lies where its image does.
    rows = [row, row | {"label": truth, "patient": "b"}]
    context = context_of(spacing="1.5,1,2", orientation="LPI", cache_gigabytes=gigabytes)
    client = client_of(SiteData(rows), Volumes)(context)
    before = get_track_meta()
    set_track_meta(tracked)
    try:
        prepared = client.prepare(client.load_data(client.site).train, train=True)
        batch = client.batch_of(prepared, [0, 1])
        assert get_track_meta() is tracked
    finally:
        set_track_meta(before)
    assert type(batch["image"]) is torch.Tensor
    assert torch.equal(batch["label"][0], batch["label"][1])
    # The image, halved to 0, 0.5 and 1, is its own truth; interpolation blurs the borders.
    right = batch["label"] == (2 * batch["image"]).round()
    assert right.float().mean() > (0.99 if place != "tilted" else 0.95)
    # The block in the file's corner is in the corner that is left, posterior and inferior.
    turned = nibabel.orientations.apply_orientation(
        truth,
        nibabel.orientations.ornt_transform(
            nibabel.io_orientation(PLACES[place]), nibabel.orientations.axcodes2ornt("LPI")
        ),
    )
    if place == "LAS":
        off = [(a - b) // 2 for a, b in zip(batch["label"].shape[2:], turned.shape, strict=True)]
        middle = batch["label"][0, 0].numpy()[
            tuple(slice(o, o + side) for o, side in zip(off, turned.shape, strict=True))
        ]
        assert np.array_equal(middle, turned)


def test_a_mask_that_lies_elsewhere_is_rejected(tmp_path):
    row, truth = corner_case(tmp_path, "LAS")
    other = save(tmp_path / "other.nii.gz", truth, PLACES["tilted"])
    data = SiteData([], test=[{**row, "label": other}])
    assert measured(client_of(data, Volumes)) == {"num-examples": 0}


@pytest.mark.parametrize("tracked", [True, False])
def test_the_setting_of_monai_for_places_changes_no_figure(tmp_path, tracked):
    row, _ = corner_case(tmp_path, "LAS")
    client = client_of(SiteData([], test=[row]), Volumes)
    before = get_track_meta()
    set_track_meta(tracked)
    try:
        assert measured(client)["dice"] == 1
        assert get_track_meta() is tracked
    finally:
        set_track_meta(before)


@pytest.mark.parametrize("gigabytes", [8.0, 0.0])
def test_figures_do_not_depend_on_the_cache(tmp_path, gigabytes):
    row, _ = corner_case(tmp_path, "PSR")
    client = client_of(SiteData([], test=[row]), Volumes)
    found = measured(client, spacing="1,1,1", cache_gigabytes=gigabytes)
    assert found["dice"] > 0.8
    assert found == measured(client, spacing="1,1,1")


@pytest.mark.parametrize("patch", ["8,8", "5,7", "40,40", "8,40", ""])
def test_sliding_windows_give_what_the_whole_image_gives(patch):
    truth = blocks((21, 30), 0)
    row = {"image": image_of(truth, 1, 30.0), "label": truth, "patient": "a"}
    client = client_of(SiteData([], test=[row]))
    client, seen = seeing(client)
    found = measured(client, patch_size=patch)
    (mask,) = seen
    nearest = np.clip(np.rint(row["image"] / 100), 0, 2).astype(np.uint8)
    assert np.array_equal(mask, nearest)
    wanted = mask_scores(truth, nearest, Levels.classes, (1.0, 1.0))
    assert 0.5 < wanted["dice-low"] < 1
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value)


def test_a_pixel_is_as_large_as_the_file_of_the_image_says(tmp_path):
    truth, off = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    truth[5:10, 5:10], off[5:10, 8:13] = 1, 1
    image = save(tmp_path / "a.nii.gz", image_of(off).T[..., None], np.diag([0.5, 4, 1, 1]))
    row = {"image": image, "label": truth, "patient": "a"}
    found = measured(client_of(SiteData([], test=[row])))
    assert found["hd95-low"] == pytest.approx(1.5)


# --- What networks may give -----------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, outputs, model):
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, images):
        return self.outputs(self.model(images))


def with_outputs(outputs, data=None):
    data = data_of(test=1) if data is None else data
    build = {"build_model": lambda self: Wrapped(outputs, Nearest(self.spatial_dims))}
    return client_of(data, **build)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_network_with_another_number_of_output_channels(kind):
    client = with_outputs(lambda outputs: outputs[:, :2])
    assert reason_of(client, kind, split="test") == (
        "the network has 2 output channels: 3 are needed, one for the background and one for each "
        "of low, high"
    )


def test_a_network_that_gives_a_smaller_mask():
    client = with_outputs(lambda outputs: outputs[:, :, ::2, ::2])
    assert reason_of(client) == (
        "the network returns a mask of shape (8, 8) for an image of shape (16, 16): the shapes "
        "must be the same"
    )


def test_of_several_outputs_the_first_counts():
    plain, context = client_of(data_of(test=2)), context_of()
    wanted = trained(plain, context, start(plain)), measured(plain, context)
    for outputs in (
        lambda found: [found, found[:, :, ::2, ::2]],
        lambda found: (found, -found),
        # As DynUNet gives them in training.
        lambda found: torch.stack([found, -found], dim=1),
    ):
        client, context = with_outputs(outputs, data_of(test=2)), context_of()
        found = trained(client, context, start(client)), measured(client, context)
        assert {key.removeprefix("model."): value for key, value in found[0].items()} == wanted[0]
        assert found[1] == wanted[1]


def test_networks_are_tested_in_evaluation_mode_and_keep_their_state():
    class Moody(Nearest):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, images):
            found = super().forward(images)
            self.norm(images)
            return -found if self.training else found

    seen = []

    class Client(Levels):
        def build_model(self):
            seen.append(Moody().train())
            return seen[-1]

    assert measured(client_of(data_of(test=2, noise=0.01), Client))["dice"] == 1
    assert seen[-1].norm.num_batches_tracked == 0


def test_deep_supervision_as_monai_has_it():
    def build(self):
        return DynUNet(
            2, 1, 3, [3] * 4, [1, 2, 2, 2], [2] * 3, [4] * 4, deep_supervision=True, deep_supr_num=2
        )

    client = client_of(data_of(2, test=1), build_model=build)
    assert trained(client, context_of(), start(client)) != bits(start(client))
    assert np.isfinite(measured(client)["dice"])


def test_postprocessing_decides_what_counts():
    class Cleaned(Levels):
        def postprocess(self, mask):
            mask = mask.copy()
            mask[:, :8] = 0
            return mask

    data = data_of(1, test=2, noise=0.01)
    plain, cleaned = measured(client_of(data)), measured(client_of(data, Cleaned))
    assert plain["dice"] == 1
    shares = [row["label"][:, 8:] for row in data.test]
    wanted = [
        np.mean([2 * (s == k).sum() / ((s == k).sum() + (r["label"] == k).sum()) for k in (1, 2)])
        for s, r in zip(shares, data.test, strict=True)
    ]
    assert cleaned["dice"] == pytest.approx(np.mean(wanted))
    assert cleaned["dice-worst"] == pytest.approx(min(wanted))


MISFIT = (
    "the network's mask has shape {}, the label (16, 16): transforms that change an image's "
    "position must be invertible, and postprocess must keep the shape"
)


def test_a_step_that_cannot_be_undone():
    class Cropped(Levels):
        def intensity(self):
            crop = [lambda row: {**row, "image": row["image"][:, 3:]}]
            return [*super().intensity(), *crop]

    reason = reason_of(client_of(data_of(test=1), Cropped), "evaluate", split="test")
    assert reason == MISFIT.format("(13, 16)")


def test_postprocessing_that_changes_the_shape():
    client = client_of(data_of(test=1), postprocess=lambda self, mask: mask[None])
    reason = reason_of(client, "evaluate", split="test")
    assert reason == MISFIT.format("(1, 16, 16)")


def test_steps_of_a_subclass_are_undone():
    class Turned(Levels):
        def intensity(self):
            return [*super().intensity(), Flipd("image", 0), Resized("image", (32, 48))]

    client, seen = seeing(client_of(data_of(test=1, noise=0.01), Turned))
    assert measured(client)["dice"] > 0.9
    assert seen[0].shape == (16, 16)


# --- What sites may give --------------------------------------------------------------------------


def test_images_of_different_shapes_need_a_patch_size():
    rows = [rows_of(1, (16, 16))[0], rows_of(1, (33, 12), "q")[0]]
    client = client_of(SiteData(rows))
    assert reason_of(client) == (
        "images of different shapes cannot be in one batch, such as (1, 16, 16) and (1, 48, 16): "
        "set image-size, which takes whole images, or patch-size"
    )
    assert trained(client, context_of(patch_size="24,24"), start(client)) != bits(start(client))
    assert trained(client, context_of(batch_size=1), start(client)) != bits(start(client))


@pytest.mark.parametrize("gigabytes", [8.0, 0.0])
def test_patches_have_their_size_and_half_of_them_lie_on_a_structure(gigabytes):
    mask = np.zeros((60, 9), np.uint8)
    mask[50, 4] = 1
    row = {"image": image_of(mask), "label": mask, "patient": "a"}
    context = context_of(patch_size="11,13", cache_gigabytes=gigabytes)
    client = client_of(SiteData([row]))(context)
    prepared = client.prepare(client.load_data(client.site).train, train=True)
    client.seed_transforms(prepared, 1)
    batch = client.batch_of(prepared, [0] * 200)
    assert batch["image"].shape == batch["label"].shape == (200, 1, 11, 13)
    assert batch["label"].dtype == torch.uint8
    # Interpolates nowhere: where the mask is, the image is.
    assert torch.equal(batch["label"] == 1, batch["image"] == 0.5)
    on = float((batch["label"] == 1).flatten(1).any(1).float().mean())
    assert 0.45 < on < 0.75


def names_rejected(caplog):
    return [record.getMessage() for record in caplog.records if "rejected" in record.message]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"label": np.full((16, 16), 7)},
         "its mask array: it holds the values 7, which are not classes: a mask holds 0, 1, 2"),
        ({"label": np.ones((16, 15))},
         "its mask array: its shape is (16, 15), the image's (16, 16)"),
        ({"label": 1},
         "its label is not a mask, which Fixed needs"),
        ({"image": np.full((16, 16), np.nan)}, "it holds NaN or infinite values"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_rejected_by_name(caplog, change, text):
    rows = rows_of(3)
    rows[1] = {**rows[1], **change}
    client, context = client_of(SiteData(rows)), context_of()
    found = trained(client, context, start(client))
    assert names_rejected(caplog) == [f"hospital-1: rejected, train split, patient p-1: {text}"]
    rest = client_of(SiteData([rows[0], rows[2]]))
    assert found == trained(rest, context_of(), start(rest))


@pytest.mark.parametrize("names", [(), ("a", "a"), "liver", ("tumour", "worst")])
def test_classes_that_cannot_be_told_apart(names):
    client = client_of(data_of(), classes=names)
    reply = ask(client, "query.describe", context_of())
    assert read_error(reply.error.reason)[1] == (
        "classes must be a tuple of one or more different names, none of them 'worst', got "
        f"{names!r}"
    )


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("overlap", 1.0, "overlap must be at least 0 and below 1, got 1.0"),
        ("overlap", -0.1, "overlap must be at least 0 and below 1, got -0.1"),
        ("surface_tolerance", -1.0, "surface_tolerance must be at least 0 and finite, got -1.0"),
    ],
)
def test_attributes_out_of_range(name, value, text):
    assert reason_of(client_of(data_of(), **{name: value})) == text


def test_the_tolerance_of_the_surface_is_that_of_the_client():
    truth, off = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    truth[5:10, 5:10], off[5:10, 8:13] = 1, 1
    row = {"image": image_of(off), "label": truth, "patient": "a"}
    data = SiteData([], test=[row])
    found = [measured(client_of(data, surface_tolerance=t))["surface-dice-low"] for t in (2.0, 3.0)]
    assert found[0] < found[1] == 1


def test_nothing_is_counted_for_the_roll_call():
    reply = ask(client_of(data_of()), "query.describe", context_of())
    counts = dict(reply.content["metrics"])
    assert counts == {"num-examples": 4, "train": 4, "val": 0, "test": 0, "rejected": 0}


def test_an_empty_split_has_no_figures():
    assert measured(client_of(data_of(test=0))) == {"num-examples": 0}


# --- Privacy --------------------------------------------------------------------------------------


# How large the images of `rows_of` are.
SIZED = {"image_shape": (1, 16, 16)}


def private(tmp_path, **config):
    return context_of(
        **{"privacy": "patient", "target_epsilon": 50.0, "run_dir": str(tmp_path), **config}
    )


def ledgers(tmp_path):
    return list(tmp_path.rglob("*.sqlite"))


def test_a_private_run(tmp_path):
    config = {"privacy": "patient", "target_epsilon": 50.0, "sampling_rate": 0.5}
    config |= {"num_server_rounds": 1, "patch_size": "12,12", "private_metrics": True}

    class Client(Levels):
        def load_data(self, site):
            return data_of(6, 2, 3)

        def augment(self, images, labels):
            return random_affine(images, labels)

    model = Client(context_of()).build_model
    run_tiny(tmp_path / "run", Client, model=model, **config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["failures"] == []
    assert 0 < summary["privacy"]["patient"]["sites"]["hospital-1"]["epsilon"] <= 50
    assert set(summary["test"]["federated"]) <= {"num-examples", "dice", "dice-low", "dice-high"}
    assert "noised-dice" not in (tmp_path / "run" / "metrics.csv").read_text()
    moved = load_file(tmp_path / "run" / "model.safetensors")["levels"]
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, Nearest().levels)


def test_an_augment_that_mixes_patients_is_refused_before_anything_is_charged(tmp_path):
    def mixup(self, images, labels):
        return (images + images.flip(0)) / 2, labels

    def swap(self, images, labels):
        return images, labels.flip(0)

    for augment in (mixup, swap):
        client = client_of(data_of(4), augment=augment, **SIZED)
        reason = reason_of(client, context=private(tmp_path))
        assert reason == (
            "augment mixes patients: the outcome for one record depends on another, as in mixup. "
            "Private training needs a change of each record alone"
        )
        assert trained(client, context_of(), start(client)) != bits(start(client))
    assert ledgers(tmp_path) == []


@pytest.mark.parametrize("side", [8, 16, 64])
def test_a_loss_over_the_batch_is_refused(tmp_path, side):
    # Also where the made-up images are large, and so would be alike on average.
    client = client_of(
        data_of(4, shape=(side, side)),
        loss=lambda self: DiceCELoss(softmax=True, batch=True),
        image_shape=(1, side, side),
    )
    assert reason_of(client, context=private(tmp_path)).startswith(
        "the loss of a batch is not the mean or sum of its records' losses: "
    )
    assert ledgers(tmp_path) == []
    plain = client_of(data_of(4), **SIZED)
    assert trained(plain, private(tmp_path), start(plain)) != bits(start(plain))


@pytest.mark.parametrize("gigabytes", [8.0, 0.0])
def test_several_patches_a_patient_are_refused_under_privacy_and_train_without(tmp_path, gigabytes):
    sizes = []

    class Client(Levels):
        def to_size(self, train):
            return [RandCropByPosNegLabeld(self._keys, "label", (8, 8), num_samples=4)]

        def augment(self, images, labels):
            sizes.append(len(images))
            return images, labels

    client = client_of(data_of(4), Client, **SIZED)
    more = {"cache_gigabytes": gigabytes, "fewest_steps": 0}
    assert reason_of(client, context=private(tmp_path, **more)) == (
        "the transforms make 16 samples of 4 records: private training needs one sample of each "
        "record (num_samples=1)"
    )
    assert sizes == []
    assert ledgers(tmp_path) == []
    found = trained(client, context_of(batch_size=2, **more), start(client))
    assert found != bits(start(client))
    assert sizes == [8, 8]


def test_private_figures_are_those_of_patients_and_carry_little_else(tmp_path):
    rows = rows_of(5, noise=30.0)
    for number, row in enumerate(rows):
        row["patient"] = "xxyzz"[number]
    data = SiteData(rows_of(2, name="q"), test=rows)
    # So large a budget needs next to no noise.
    context = private(tmp_path, target_epsilon=1e7, private_metrics=True)
    found = measured(client_of(data, **SIZED), context)
    nearest = [np.clip(np.rint(row["image"] / 100), 0, 2) for row in rows]
    each = [
        mask_scores(row["label"], mask, Levels.classes, (1.0, 1.0))
        for row, mask in zip(rows, nearest, strict=True)
    ]
    weights = np.array([1 / 2, 1 / 2, 1, 1 / 2, 1 / 2])
    assert set(found) == {"num-examples", "dice", "dice-low", "dice-high", "noised-dice"}
    assert found["num-examples"] == 3
    for name in ("dice-low", "dice-high"):
        wanted = np.average([one[name] for one in each], weights=weights)
        assert 0.5 < wanted < 1
        assert found[name] == pytest.approx(wanted, abs=0.02)


# --- The same bits --------------------------------------------------------------------------------


class Shaken(Levels):
    def random_transforms(self):
        return [RandFlipd(self._keys, 0.5, 0), RandGaussianNoised("image", prob=0.7, std=0.1)]

    def augment(self, images, labels):
        return random_affine(images, labels)


def test_a_seed_decides_all_and_sites_differ():
    client = client_of(data_of(5), Shaken)
    config = {"local_epochs": 2, "patch_size": "10,10", "batch_size": 2}
    first = trained(client, context_of(**config), start(client))
    torch.manual_seed(9)
    assert trained(client, context_of(**config), start(client)) == first
    assert trained(client, context_of(index=1, **config), start(client)) != first
    assert trained(client, context_of(seed=1, **config), start(client)) != first


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_small_cache_changes_no_bit(tmp_path, share):
    rows = []
    for number in range(4):
        (tmp_path / f"{number}").mkdir()
        row, _ = corner_case(tmp_path / f"{number}", list(PLACES)[number % 3])
        rows.append(row | {"patient": number})
    client = client_of(SiteData(rows), type("Client", (Shaken,), {"spatial_dims": 3}))
    config = {"local_epochs": 2, "patch_size": "8,8,8", "spacing": "1,1,1"}
    wanted = trained(client, context_of(**config), start(client))
    few = trained(client, context_of(cache_gigabytes=share * 2e-4, **config), start(client))
    assert few == wanted != bits(start(client))


def test_the_cache_keeps_to_its_limit_all_splits_and_sites_together():
    # A row takes 16 x 16 x (4 + 1) bytes; in evaluation its source as well.
    train, test = 1280, 2304
    data = data_of(9, 4, 5)
    client = client_of(data)
    arrays = start(client)

    def kept(limit, *kinds, **config):
        context = context_of(num_sites=2, cache_gigabytes=2 * limit / 2**30, **config)
        for kind, split in kinds:
            reply = ask(client, kind, context, arrays, split=split)
            assert not reply.has_error(), reply.error.reason
        own = client(context)
        return [own.prepared(split, False)[1].count for _, split in kinds]

    rounds = (("train", "train"), ("evaluate", "val"), ("evaluate", "test"))
    assert kept(10**6, *rounds) == [9, 4, 5]
    assert kept(4 * train, *rounds) == [4, 0, 0]
    assert kept(4 * train - 1, *rounds) == [3, 0, 0]
    assert kept(9 * train + 2 * test, *rounds) == [9, 2, 0]
    assert kept(9 * train + 6 * test, *rounds) == [9, 4, 2]
    assert kept(0, *rounds) == [0, 0, 0]


def test_the_cache_counts_bytes_not_rows():
    rows = [rows_of(1, (8, 8))[0], *rows_of(3, (64, 64), "q")]
    limit = (16 * 16 + 64 * 64) * 5
    context = context_of(num_sites=1, batch_size=1, cache_gigabytes=limit / 2**30)
    client = client_of(SiteData(rows))(context)
    prepared = client.prepare(rows, train=True)
    assert (prepared.count, prepared.held, len(prepared)) == (2, limit, 4)
    assert [prepared[place]["image"].shape[1] for place in range(4)] == [16, 64, 64, 64]


def test_what_is_kept_is_not_changed_by_what_is_random():
    class Wild(Levels):
        def random_transforms(self):
            class Spoiling(RandGaussianNoised):
                def __call__(self, row):
                    row["image"] += 1
                    return super().__call__(row)

            return [Spoiling("image", prob=1.0, std=0.1)]

    client = client_of(data_of(2), Wild)(context_of())
    prepared = client.prepare(client.load_data(client.site).train, train=True)
    means = [float(client.batch_of(prepared, [0, 1])["image"].mean()) for _ in range(3)]
    assert max(means) - min(means) < 0.1


def test_a_function_may_be_random_and_what_follows_it_still_knows_the_place(tmp_path):
    row, _ = corner_case(tmp_path, "LAS")
    calls = []

    class Client(Volumes):
        def transforms(self, train):
            first, *rest = super().transforms(train)
            return [first, lambda row: calls.append(1) or row, *rest, *self.random_transforms()]

        def random_transforms(self):
            return [RandGaussianNoised("image", prob=0.0)]

    client = client_of(SiteData([row]), Client)(context_of())
    prepared = client.prepare([row], train=True)
    batches = [client.batch_of(prepared, [0]) for _ in range(2)]
    assert len(calls) == 2
    plain = client_of(SiteData([row]), Volumes)(context_of())
    wanted = plain.batch_of(plain.prepare([row], train=True), [0])
    assert torch.equal(batches[1]["image"], wanted["image"])


# --- Pictures -------------------------------------------------------------------------------------


def pictures_of(client, count, context=None):
    context = context or context_of()
    made = client(context)
    model, _ = made.fresh_model()
    rows = made.load_data(made.site).test
    return made.draw(model, made.prepare(rows, train=False), count)


def spoilt(place):
    """Rows of which one is found badly, by a network that looks at the values."""
    rows = rows_of(5, name="Erika Mustermann", noise=0.0)
    rows[place]["image"] = np.roll(rows[place]["image"], 6, axis=0)
    return SiteData(rows_of(1), test=rows)


@pytest.mark.parametrize(
    ("worst", "count", "titles"),
    [
        (4, 2, ["case 1: Dice 1.00", "case 2: Dice 1.00", "the lowest Dice: Dice "]),
        (0, 2, ["case 1: Dice 1.00", "the lowest Dice: Dice "]),
        (1, 5, [*(f"case {n}: Dice 1.00" for n in (1, 2, 3, 4)), "the lowest Dice: Dice "]),
        (3, 0, ["the lowest Dice: Dice "]),
    ],
)
def test_the_first_cases_and_the_worst_are_drawn(worst, count, titles):
    found = [picture.title for picture in pictures_of(client_of(spoilt(worst)), count)]
    assert len(found) == len(titles)
    assert all(one.startswith(start) for one, start in zip(found, titles, strict=True))
    assert found[-1] != "the lowest Dice: Dice 1.00"
    assert "Mustermann" not in "".join(found)


def test_without_rows_there_are_no_pictures():
    assert pictures_of(client_of(data_of(1)), 3) == []


@pytest.mark.parametrize("place", ["LAS", "PSR"])
def test_a_volume_is_drawn_as_it_lies_in_the_patient(tmp_path, place):
    row, truth = corner_case(tmp_path, place)
    turn = nibabel.io_orientation(PLACES[place])
    upright, straight = (
        nibabel.orientations.apply_orientation(one, turn) for one in (image_of(truth), truth)
    )
    spacing = np.linalg.norm(
        nibabel.as_closest_canonical(nibabel.load(row["image"])).affine, axis=0
    )
    affine = np.diag([*spacing[:3], 1])
    (tmp_path / "ras").mkdir()
    other = {
        "image": save(tmp_path / "ras" / "image.nii.gz", upright, affine),
        "label": save(tmp_path / "ras" / "label.nii.gz", straight, affine),
        "patient": row["patient"],
    }
    found = [
        pictures_of(client_of(SiteData([], test=[one]), Volumes), 1)[0] for one in (row, other)
    ]
    assert found[0] == found[1]


# --- What a hospital must be able to rely on ----------------------------------------------------


def test_classes_must_be_called_alike_at_all_hospitals():
    swapped = replace(data_of(2), class_names=("high", "low"))
    assert reason_of(client_of(swapped)) == (
        "the data name their classes high, low, this client low, high: a class must mean the same "
        "at all hospitals, so make classes and data agree"
    )
    for names in (("low", "high"), ("Low", "_HIGH ")):
        same = replace(data_of(2), class_names=names)
        assert not ask(client_of(same), "train", context_of(), start(client_of(same))).has_error()


@pytest.mark.parametrize("names", [("Left lung", "left_lung"), ("tumour", "-")])
def test_classes_must_differ_by_more_than_how_they_are_written(names):
    assert reason_of(client_of(data_of(), classes=names)) == (
        "classes must differ by more than case, blanks, '_' and '-', and hold more than these, got "
        f"{names!r}"
    )


def counts_of(client, **config):
    reply = ask(client, "query.describe", context_of(**config))
    assert not reply.has_error(), reply.error.reason
    return dict(reply.content["metrics"])


def test_under_privacy_the_counts_tell_nothing_of_what_is_in_a_file():
    whole = data_of(4, test=2)
    empty = [{**whole.train[0], "label": np.zeros((16, 16), np.uint8)}, *whole.train[1:]]
    one_less = SiteData(empty, (), whole.test)
    plain = counts_of(client_of(one_less))
    assert (plain["train"], plain["num-examples"], plain["rejected"]) == (3, 3, 1)
    private = {"privacy": "patient", "patch-size": "16,16"}
    assert counts_of(client_of(one_less), **private) == counts_of(client_of(whole), **private)
    assert "rejected" not in counts_of(client_of(whole), **private)


def test_empty_masks_are_kept_where_the_client_says_so():
    rows = rows_of(2)
    rows[0]["label"] = np.zeros((16, 16), np.uint8)
    data = SiteData(rows, (), rows_of(1, name="t"), rejected=2)
    assert counts_of(client_of(data))["rejected"] == 3
    kept = counts_of(client_of(data, empty_masks=True))
    assert (kept["train"], kept["rejected"]) == (2, 2)


def test_an_image_with_other_channels_than_most_is_rejected(caplog):
    rows = rows_of(3)
    rows[1]["image"] = np.stack([rows[1]["image"]] * 3)
    with caplog.at_level("WARNING", "flwr.fedmed"):
        assert counts_of(client_of(SiteData(rows)))["train"] == 2
    assert (
        "hospital-1: rejected, train split, patient p-1: array has 3 channels, most images "
        "have 1" in caplog.messages
    )


def test_a_patient_counts_once_however_many_images_there_are():
    good, bad = rows_of(2, noise=0.0)
    bad["image"] = np.zeros_like(bad["image"])
    # Of 7 nine images are right and one is not, of "b" the only one is not.
    rows = [{**good, "patient": "7"}] * 5 + [{**good, "patient": 7}] * 4
    rows += [{**bad, "patient": "007"}, {**bad, "patient": "b"}]
    found = measured(client_of(SiteData(rows_of(1, name="t"), (), rows)))
    wrong = mask_scores(bad["label"], np.zeros((16, 16), np.uint8), ("low", "high"), (1.0, 1.0))
    assert {wrong[f"dice-{name}"] for name in ("low", "high")} == {0.0}
    assert found["num-examples"] == 2
    assert found["dice"] == pytest.approx((0.9 + 0.0) / 2)
    assert found["dice-worst"] == 0.0
