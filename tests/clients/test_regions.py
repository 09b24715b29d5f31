"""Regions that overlap: whole tumour, tumour core and enhancing tumour, a channel each."""

import json

import nibabel
import numpy as np
import pytest
import torch
from monai.losses import DiceLoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.transforms import AsDiscrete
from safetensors.torch import load_file
from tiny import ask, bits, context_of, fixed, model_arrays, run_tiny, says, trained
from torch import nn

from fedmed_flower import InputError, SegmentationClient, SiteData
from fedmed_flower.clients.augmenting import random_affine
from fedmed_flower.clients.structures import RegionLoss
from fedmed_flower.data.phantoms import brain_tumours
from fedmed_flower.metrics.segmentation import region_scores
from fedmed_flower.privacy.gradients import RecordGradients
from fedmed_flower.wire import read_error

BRATS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}


class Tumours(SegmentationClient):
    """Three hospitals with generated heads."""

    regions = BRATS
    spatial_dims = 3
    image_shape = (4, 16, 16, 16)
    modality = "mr"

    def build_model(self):
        return UNet(3, 4, 3, (8, 16), (2,), num_res_units=1, norm="instance")

    def load_data(self, site):
        rows = brain_tumours(10, site.index, size=16).rows
        return SiteData(rows[:6], rows[6:7], rows[7:])


def test_a_federated_run_learns_all_three_regions(tmp_path):
    run = tmp_path / "run"
    config = {"num_server_rounds": 3, "local_epochs": 6, "batch_size": 2, "pictures": 1}
    config |= {"optimizer": "adam", "learning_rate": 0.02}
    model = Tumours(context_of()).build_model
    run_tiny(run, Tumours, num_sites=3, model=model, **config)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["failures"] == []
    found = summary["test"]["federated"]
    kinds = ("dice", "hd95", "surface-dice")
    assert set(found) == {
        *(f"{kind}-{name}" for kind in kinds for name in BRATS),
        *("dice", "hd95", "surface-dice", "dice-worst"),
    }
    # Of one test patient in three there is no enhancing tumour: a voxel too many is a Dice of 0.
    for name, least in (("WT", 0.8), ("TC", 0.6), ("ET", 0.45)):
        assert found[f"dice-{name}"] > least, name
    assert len(summary["pictures"]) >= 3
    # MONAI's own metric on outputs that are thresholded by MONAI.
    network = model()
    network.load_state_dict(load_file(run / "model.safetensors"))
    network.eval()
    client = Tumours(context_of())
    metric = DiceMetric(reduction="mean_batch", ignore_empty=False)
    discrete = AsDiscrete(threshold=0.5)
    for index in range(3):
        rows = Tumours(context_of(index, 3)).load_data(type("Site", (), {"index": index})()).test
        prepared = client.prepare(rows, train=False)
        for row, number in zip(rows, range(len(rows)), strict=True):
            image = torch.as_tensor(np.asarray(prepared[number]["image"]))
            with torch.no_grad():
                guess = discrete(network(image[None])[0].sigmoid())
            truth = np.stack([np.isin(row["label"], values) for values in BRATS.values()])
            metric(guess[None], torch.from_numpy(truth)[None].float())
    wanted = metric.aggregate().tolist()
    assert [found[f"dice-{name}"] for name in BRATS] == pytest.approx(wanted, abs=1e-6)


# --- What is read ---------------------------------------------------------------------------------


def channels_of(label):
    return np.stack([np.isin(label, values) for values in BRATS.values()]).astype(np.uint8)


def rows_of(count, name="p"):
    return [
        row | {"patient": f"{name}-{row['patient']}"} for row in brain_tumours(count, 9, 16).rows
    ]


def client_of(data, base=Tumours, **members):
    return fixed(data, base, **members)


def start(client):
    return model_arrays(client(context_of()).build_model)


def reason_of(client, kind="train", context=None, **config):
    reply = ask(client, kind, context or context_of(), start(client), **config)
    assert reply.has_error()
    return read_error(reply.error.reason)[1]


def measured(client, context=None, **more):
    reply = ask(client, "evaluate", context or context_of(**more), start(client), split="test")
    assert not reply.has_error(), reply.error.reason
    return dict(reply.content["metrics"])


def save(path, array, affine=None):
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return str(path)


def test_masks_in_every_form_train_to_the_same_bits(tmp_path):
    rows = rows_of(2)
    expected = trained(client_of(SiteData(rows)), context_of(), start(Tumours))
    assert expected != bits(start(Tumours))
    forms = {
        "channels": lambda label, path: channels_of(label),
        "values in a channel": lambda label, path: label[None],
        "a tensor": lambda label, path: torch.from_numpy(channels_of(label)),
        "a file": lambda label, path: save(f"{path}.nii.gz", label),
        "a list of one file": lambda label, path: [save(f"{path}-1.nii.gz", label)],
        "a file a region": lambda label, path: [
            save(f"{path}-{name}.nii.gz", mask)
            for name, mask in zip(BRATS, channels_of(label), strict=True)
        ],
    }
    for form, convert in forms.items():
        changed = [
            row | {"label": convert(row["label"], tmp_path / f"{form}-{number}")}
            for number, row in enumerate(rows)
        ]
        found = trained(client_of(SiteData(changed)), context_of(), start(Tumours))
        assert found == expected, form


def test_a_file_of_one_volume_a_region_trains_to_the_same_bits(tmp_path):
    rows = rows_of(2)
    expected = trained(client_of(SiteData(rows)), context_of(), start(Tumours))
    changed = []
    for number, row in enumerate(rows):
        volumes = np.moveaxis(channels_of(row["label"])[[1, 2, 0]], 0, -1)
        file = save(tmp_path / f"{number}.nii.gz", volumes)
        changed.append(row | {"label": file, "mask_regions": ("TC", "ET", "WT")})
    assert trained(client_of(SiteData(changed)), context_of(), start(Tumours)) == expected
    classes = ("edema", "core", "rim", "more")
    client = client_of(SiteData(changed), regions={}, classes=classes, empty_masks=True)
    assert "mask_regions of its row names the regions TC, ET, WT" in reason_of(client)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda label: np.where(label == 2, 3, label),
            "its mask array: it holds the values 3, which are not classes: a mask holds 0, 1, 2, 4 "
            "(regions: WT of 1, 2, 4; TC of 1, 4; ET of 4)",
        ),
        (
            lambda label: channels_of(label)[:2],
            "its mask array: there are 2 masks: one for each of the regions WT, TC, ET is needed, "
            "in this order, or one mask of values",
        ),
        (
            lambda label: channels_of(label) * np.asarray([1, 1, 4]).reshape(3, 1, 1, 1),
            "its mask array: mask of the region ET: it holds the values 4, which are not classes: "
            "a mask holds 0, 1",
        ),
        (
            lambda label: channels_of(label)[:, 1:],
            "its mask array: mask of the region WT: its shape is (15, 16, 16), the image's "
            "(16, 16, 16)",
        ),
        (lambda label: 0 * label, "its mask array is empty: it holds only the background"),
    ],
)
def test_a_mask_that_cannot_be_used_is_rejected_by_name(caplog, change, text):
    rows = rows_of(2)
    rows[1] = rows[1] | {"label": change(rows[1]["label"])}
    client = client_of(SiteData(rows))
    trained(client, context_of(), start(client))
    found = [r.getMessage() for r in caplog.records if "rejected" in r.message]
    assert found == [f"hospital-1: rejected, train split, patient {rows[1]['patient']}: {text}"]


@pytest.mark.parametrize(
    ("members", "text"),
    [
        (
            {"regions": {"WT": (1, 2), "TC": ()}},
            "region 'TC' must hold one or more different whole numbers, the values of the mask "
            "that belong to it, got ()",
        ),
        (
            {"regions": {"WT": (1, 1)}},
            "region 'WT' must hold one or more different whole numbers, the values of the mask "
            "that belong to it, got (1, 1)",
        ),
        (
            {"regions": {"WT": (0, 1)}},
            "region 'WT' must hold values from 1 to 16777215, since 0 is the background, got "
            "(0, 1)",
        ),
        (
            {"regions": {"WT": (1, 2), "wt ": (2,)}},
            "names of regions must differ by more than case, got ('WT', 'wt ')",
        ),
        (
            {"regions": (("WT", (1,)),)},
            'regions must be a dict of names and values, such as {"WT": (1, 2, 4), "ET": (4,)}, '
            "got (('WT', (1,)),)",
        ),
        (
            {"label_values": (0, 1, 2, 4)},
            "regions name the values of masks, so that label_values must be left out, got "
            "(0, 1, 2, 4)",
        ),
        (
            {"classes": ("edema", "core", "rim")},
            "classes are the names of the regions, WT, TC, ET: leave out classes, got "
            "('edema', 'core', 'rim')",
        ),
        ({"regions": {}}, "Fixed must define classes, or regions"),
        (
            {"regions": {"WT": (1,), "worst": (2,)}},
            "classes must be a tuple of one or more different names, none of them 'worst', got "
            "('WT', 'worst')",
        ),
    ],
)
def test_regions_that_cannot_be(members, text):
    client = client_of(SiteData(rows_of(1)), **members)
    with pytest.raises(InputError, match=says(text)):
        client(context_of()).check(SiteData(()))


def test_the_names_of_label_values_in_the_data_are_not_those_of_regions():
    data = SiteData(rows_of(1), class_names=("necrosis", "oedema", "unused", "rim"))
    Tumours(context_of()).check(data)


def test_regions_that_the_data_name_must_be_the_clients():
    same = {"et": (4,), "W-T": (4, 2, 1), "TC": (1, 4)}
    Tumours(context_of()).check(SiteData(rows_of(1), regions=same))
    other = same | {"TC": (1, 2)}
    text = (
        "the data name the regions: et of 4; W-T of 4, 2, 1; TC of 1, 2, this client the regions: "
        "WT of 1, 2, 4; TC of 1, 4; ET of 4: a region must mean the same at all hospitals, so make "
        "regions and data agree"
    )
    with pytest.raises(InputError, match=says(text)):
        Tumours(context_of()).check(SiteData(rows_of(1), regions=other))
    client = client_of(SiteData(rows_of(1), regions=same), regions={}, classes=("a", "b"))
    assert reason_of(client) == (
        "the data name regions that may overlap (regions: et of 4; W-T of 4, 2, 1; TC of 1, 4), "
        "and this client classes of which each voxel has one, a, b: give the client regions in "
        "place of classes, or name classes in the data"
    )


# --- Loss and outputs -----------------------------------------------------------------------------


def test_the_loss_is_dice_of_monai_and_binary_cross_entropy_of_each_region():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, 2, 5, 6, 7, generator=generator)
    truth = (torch.rand(3, 2, 5, 6, 7, generator=generator) < 0.3).float()
    parts = []
    for image in range(3):
        for region in range(2):
            output = outputs[image, region][None, None]
            wanted = truth[image, region][None, None]
            shares = output.sigmoid()
            entropy = -(wanted * shares.log() + (1 - wanted) * (1 - shares).log()).mean()
            parts.append(DiceLoss(sigmoid=True)(output, wanted) + entropy)
    assert float(RegionLoss()(outputs, truth)) == pytest.approx(float(sum(parts)) / 6, rel=1e-5)
    # By hand: one voxel of two, p = 1/2 in both.
    dice = 1 - 2 * 0.5 / (1 + 1)
    outputs, truth = torch.zeros(1, 1, 1, 2), torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    assert float(RegionLoss()(outputs, truth)) == pytest.approx(dice + np.log(2), abs=1e-5)


def test_a_network_with_another_number_of_output_channels():
    client = client_of(SiteData(rows_of(1)), build_model=lambda self: nn.Conv3d(4, 4, 1))
    assert reason_of(client) == (
        "the network has 4 output channels: 3 are needed, one for each of WT, TC, ET"
    )


class Levels(nn.Module):
    """Gives 1 - 2 x, 2 x - 1 and 2 x - 3 for a value x: one region and two nested ones."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([-2.0, 2.0, 2.0]))
        self.bias = nn.Parameter(torch.tensor([1.0, -1.0, -3.0]))

    def forward(self, images):
        shape = (1, -1, *[1] * (images.ndim - 2))
        return images * self.weight.view(shape) + self.bias.view(shape)


class Nested(SegmentationClient):
    """Pictures whose value, 0, 1 or 2 hundred, is the mask's."""

    regions = {"outside": (1,), "all": (2, 3), "inner": (3,)}  # noqa: RUF012
    modality = "ct"
    ct_window = (0.0, 100.0)
    image_shape = (1, 12, 12)

    def intensity(self):
        return [lambda row: {**row, "image": row["image"] / 100}]

    def build_model(self):
        return Levels()

    def load_data(self, site):
        raise NotImplementedError


def nested_row(seed=0):
    mask = np.ones((12, 12), np.uint8)
    mask[2:9, 3:10] = 2
    mask[4:7, 5:8] = 3
    mask = np.roll(mask, seed, axis=(0, 1))
    return {"image": 100.0 * (mask - 1.0), "label": mask, "patient": f"n-{seed}"}


def test_each_region_is_measured_by_itself_at_a_half():
    row = nested_row()
    row["label"] = row["label"].copy()
    row["label"][4, 5:8] = 2
    client = client_of(SiteData([], test=[row]), Nested)
    found = measured(client)
    assert found["dice-outside"] == found["dice-all"] == 1
    # 9 voxels were found, 6 are right.
    assert found["dice-inner"] == pytest.approx(2 * 6 / 15)
    guess = np.stack([row["image"] < 50, row["image"] > 50, row["image"] > 150])
    truth = np.stack([np.isin(row["label"], values) for values in Nested.regions.values()])
    wanted = region_scores(truth, guess, (*Nested.regions,), (1.0, 1.0))
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value), name


def test_regions_and_scores_that_do_not_fit():
    masks = np.zeros((2, 4, 4))
    with pytest.raises(InputError, match="both must have 3 channels, one for each of a, b, c"):
        region_scores(masks, masks, ("a", "b", "c"), (1.0, 1.0))


PLACES = {
    "LAS": np.diag([-1.5, 1.0, 2.0, 1.0]),
    "PSR": np.array([[0, 0, 2.0, 5], [-1.5, 0, 0, 7], [0, 1.0, 0, -3], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("place", PLACES)
def test_regions_come_back_to_the_grid_of_their_file(tmp_path, place):
    mask = np.ones((14, 12, 10), np.uint8)
    mask[:7, -6:, :5] = 2
    mask[:4, -3:, :3] = 3
    paths = {
        "image": save(tmp_path / "image.nii.gz", 100 * (mask - 1.0), PLACES[place]),
        "label": save(tmp_path / "label.nii.gz", mask, PLACES[place]),
    }
    row = {**paths, "patient": "a"}
    seen = []
    data = SiteData([], test=[row])
    keep = {"postprocess": lambda self, found: seen.append(found) or found, "spatial_dims": 3}
    client = client_of(data, Nested, image_shape=(), **keep)
    found = measured(client)
    assert found["dice"] == 1
    assert seen[0].shape == (3, 14, 12, 10)
    assert np.array_equal(seen[0][1], mask > 1)
    found = measured(client, spacing="1,1,1", orientation="SRA", patch_size="8,8,8")
    assert min(found[f"dice-{name}"] for name in Nested.regions) > 0.75


def test_patches_lie_on_any_of_the_regions():
    mask = np.zeros((60, 9), np.uint8)
    mask[50, 4] = 1
    row = {"image": mask * 100.0, "label": mask, "patient": "a"}
    context = context_of(patch_size="11,13")
    client = client_of(SiteData([row]), Nested)(context)
    prepared = client.prepare([row], train=True)
    client.seed_transforms(prepared, 1)
    batch = client.batch_of(prepared, [0] * 200)
    assert batch["label"].shape == (200, 3, 11, 13)
    # Only the first region is there, which MONAI takes for the background of several channels.
    on = float((batch["label"][:, 0] == 1).flatten(1).any(1).float().mean())
    assert 0.45 < on < 0.75


# --- Pictures and privacy -------------------------------------------------------------------------


def test_pictures_show_an_outline_of_each_region():
    client = client_of(SiteData([nested_row()], test=[nested_row(1)]), Nested)(context_of())
    prepared = client.prepare([nested_row(1)], train=False)
    (picture,) = client.draw(client.build_model(), prepared, 1)
    assert picture.title == "the lowest Dice: Dice 1.00"
    heads = client_of(SiteData([]), Tumours)(context_of())
    prepared = heads.prepare(rows_of(1), train=False)
    (picture,) = heads.draw(heads.build_model(), prepared, 1)
    assert picture.png.startswith(b"\x89PNG")


def private(tmp_path, **config):
    chosen = {"privacy": "patient", "target_epsilon": 50.0, "run_dir": str(tmp_path)}
    return context_of(**{**chosen, **config})


def test_a_private_step_and_figures_with_noise(tmp_path):
    rows = [nested_row(seed) for seed in range(6)]
    data = SiteData(rows[:4], test=rows[4:])

    class Moved(Nested):
        def augment(self, images, labels):
            return random_affine(images, labels)

    client = client_of(data, Moved, modality="", intensity=SegmentationClient.intensity)
    before = start(client)
    after = trained(client, private(tmp_path), before)
    assert after != bits(before)
    # So large a budget needs next to no noise.
    plain = client_of(data, Nested)
    context = private(tmp_path, target_epsilon=1e7, private_metrics=True)
    found = measured(plain, context)
    assert {"dice-outside", "dice-all", "dice-inner", "noised-dice"} < set(found)
    assert found["dice"] == pytest.approx(1, abs=0.02)


def test_the_gradient_of_each_record_is_that_of_the_record_alone():
    rows = [nested_row(seed) for seed in range(3)]
    client = client_of(SiteData(rows), Nested)(context_of())
    batch = client.batch_of(client.prepare(rows, train=True), [0, 1, 2])
    model = client.build_model()
    found = {
        method: RecordGradients(model, client.loss_of, method=method)(batch)
        for method in ("vmap", "loop")
    }
    for first, second in zip(found["vmap"][0], found["loop"][0], strict=True):
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-6)
    assert torch.allclose(found["vmap"][1], found["loop"][1], rtol=1e-5)
