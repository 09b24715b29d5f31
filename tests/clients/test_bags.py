"""Bags of patches: a federated run, padding, draws, and what a hospital may give."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from tiny import ask, bits, context_of, fixed, model_arrays, run_tiny, says, trained
from torch import nn

from fedmed_flower import BagClient, InputError, SiteData
from fedmed_flower.clients.augmenting import random_intensity
from fedmed_flower.data.phantoms import slides
from fedmed_flower.models.bags import AttentionMIL, absent
from fedmed_flower.privacy.gradients import RecordGradients
from fedmed_flower.wire import read_error


def features(width=8):
    return nn.Sequential(
        nn.Conv2d(3, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Conv2d(6, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
    )


class Slides(BagClient):
    num_classes = 2
    image_shape = (3, 16, 16)
    modality = "ct"
    ct_window = (0.0, 255.0)

    def build_model(self):
        return AttentionMIL(features(), 8, 1, 16)

    def load_data(self, site):
        rows = slides(60, site.index)
        return SiteData(rows[:40], rows[40:44], rows[44:])


class Scaled(Slides):
    """The same, each patch with mean 0 and standard deviation 1."""

    modality = ""


def by_hand(row):
    """Return the patches of a row as `Scaled` prepares them."""
    patches = row["image"].astype(np.float32)
    mean, spread = (f(patches, axis=(2, 3), keepdims=True) for f in (np.mean, np.std))
    return torch.from_numpy((patches - mean) / spread)


def client_of(data, base=Slides, **members):
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


def test_a_federated_run_finds_the_bags_with_a_lesion(tmp_path):
    run = tmp_path / "run"
    config = {"num_server_rounds": 4, "local_epochs": 4, "bag_size": 16, "pictures": 1}
    config |= {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 8}
    model = Scaled(context_of()).build_model
    run_tiny(run, Scaled, num_sites=2, model=model, **config)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["failures"] == []
    assert summary["test"]["federated"]["auc"] > 0.9
    # The AUC by hand: each bag through the network by itself.
    network = model()
    network.load_state_dict(load_file(run / "model.safetensors"))
    network.eval()
    rows = [slides(60, index)[44:] for index in (0, 1)]
    scores = []
    for row in rows[0] + rows[1]:
        with torch.no_grad():
            scores.append(float(network(by_hand(row)[None])))
    labels = [row["label"] for row in rows[0] + rows[1]]
    sites = summary["test"]["sites"]
    for number, found in enumerate(sites.values()):
        part = slice(16 * number, 16 * number + 16)
        assert found["auc"] == pytest.approx(roc_auc_score(labels[part], scores[part]), abs=1e-9)
    titles = [picture["title"] for picture in summary["pictures"]]
    assert any("of the weight" in title for title in titles)
    # Of a positive bag, patches with a lesion have more weight than the others.
    shares = []
    for row in rows[0] + rows[1]:
        if row["label"]:
            with torch.no_grad():
                weights = network.weights(network.embed(by_hand(row))[None])[0].numpy()
            shares.append(weights[row["lesions"]].mean() / weights.mean())
    assert np.median(shares) > 1.5


# --- The network ----------------------------------------------------------------------------------


def bag_of(count, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_attention_is_the_gated_one_of_the_paper():
    torch.manual_seed(0)
    network = AttentionMIL(features(), 8, 3, 5)
    bag = bag_of(4)
    h = network.features(bag)
    v, u, w = network.content, network.gate, network.score
    scores = []
    for k in range(4):
        gated = torch.tanh(v.weight @ h[k] + v.bias) * torch.sigmoid(u.weight @ h[k] + u.bias)
        scores.append(w.weight[0] @ gated + w.bias[0])
    shares = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
    assert torch.allclose(network.weights(h[None])[0], shares, atol=1e-6)
    wanted = network.classify((shares[:, None] * h).sum(dim=0))
    assert torch.allclose(network(bag[None])[0], wanted, atol=1e-6)


def test_weights_add_up_to_one_and_the_order_of_patches_does_not_count():
    torch.manual_seed(0)
    network = AttentionMIL(features(), 8, 2)
    bags = torch.stack([bag_of(7, seed) for seed in range(3)])
    bags[1, 4:] = torch.nan
    embedded = network.embed(bags.nan_to_num().flatten(0, 1)).unflatten(0, (3, 7))
    weights = network.weights(embedded, absent(bags))
    assert torch.allclose(weights.sum(dim=1), torch.ones(3))
    assert (weights[1, 4:] == 0).all()
    assert (weights[1, :4] > 0).all()
    assert torch.allclose(network(bags), network(bags.flip(1)), atol=1e-6)


def test_padding_changes_no_output_and_no_gradient():
    torch.manual_seed(0)
    network = AttentionMIL(features(), 8, 2)
    bag = bag_of(5)[None]
    filled = torch.cat([bag, torch.full((1, 4, 3, 16, 16), torch.nan)], dim=1)
    found = []
    for bags in (bag, filled):
        network.zero_grad()
        outputs = network(bags)
        outputs[:, 1].sum().backward()
        found.append((outputs.detach(), [p.grad.clone() for p in network.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    for first, second in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(first, second, atol=1e-6)
        assert second.isfinite().all()


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.BatchNorm2d(3), "BatchNorm2d"),
        (nn.InstanceNorm2d(3, track_running_stats=True), "InstanceNorm2d"),
    ],
)
def test_a_network_in_which_padding_would_count_is_refused(layer, name):
    text = (
        f"the network for patches has 0 ({name}), which normalises over all patches of a batch, or "
        'keeps statistics of them, so that padding would count: give it norm = "instance", or '
        "fedmed_flower.privacy.validate.with_group_norm(network)"
    )
    with pytest.raises(InputError, match=says(text)):
        AttentionMIL(nn.Sequential(layer, features()), 8, 2)


def test_numbers_and_features_that_do_not_fit():
    with pytest.raises(InputError, match=says("num_classes must be at least 1, got 0")):
        AttentionMIL(features(), 8, 0)
    text = (
        "the network for patches returns the shape (5, 8): it must be (patches, 9), the number of "
        "features that patch-features (num_features) declares"
    )
    with pytest.raises(InputError, match=says(text)):
        AttentionMIL(features(), 9, 2)(bag_of(5)[None])


# --- Training and evaluation ----------------------------------------------------------------------


def data_of(train=4, test=0):
    rows = slides(train + test, 3)
    return SiteData(rows[:train], (), rows[train:])


def test_a_step_takes_at_most_bag_size_patches_at_random():
    client = client_of(data_of(6))(context_of(bag_size=6))
    rows = client.load_data(client.site).train
    prepared = client.prepare(rows, train=True)
    assert len(prepared) == 6
    torch.manual_seed(1)
    batch = client.batch_of(prepared, range(6))
    sizes = [min(6, len(row["image"])) for row in rows]
    assert batch["image"].shape == (6, 6, 3, 16, 16)
    assert (~absent(batch["image"])).sum(dim=1).tolist() == sizes
    assert batch["label"].tolist() == [row["label"] for row in rows]
    drawn = set()
    for _ in range(20):
        again = client.batch_of(prepared, [5])["image"][0]
        for patch in again:
            found = (torch.from_numpy(rows[5]["image"]) == (patch * 255).round()).flatten(1).all(1)
            assert found.sum() == 1
            drawn.add(int(found.nonzero()))
    assert drawn == set(range(len(rows[5]["image"])))
    torch.manual_seed(1)
    assert torch.equal(
        client.batch_of(prepared, range(6))["image"].nan_to_num(), batch["image"].nan_to_num()
    )


def test_a_seed_decides_and_parts_change_no_figure():
    client = client_of(data_of(6, 4))
    config = {"bag_size": 5, "local_epochs": 2, "batch_size": 2}
    first = trained(client, context_of(**config), start(client))
    torch.manual_seed(9)
    assert trained(client, context_of(**config), start(client)) == first != bits(start(client))
    assert trained(client, context_of(seed=1, **config), start(client)) != first
    wanted = measured(client, bag_size=4096)
    for size in (1, 3, 7):
        found = measured(client, bag_size=size)
        for name, value in wanted.items():
            assert np.asarray(found[name]) == pytest.approx(np.asarray(value), abs=1e-6), name
    assert wanted["num-examples"] == 4


def test_bags_in_every_form_train_to_the_same_bits(tmp_path):
    rows = slides(3, 2)
    expected = trained(client_of(SiteData(rows)), context_of(), start(Slides))
    assert expected != bits(start(Slides))
    folders = []
    for number, row in enumerate(rows):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        for k, patch in enumerate(row["image"]):
            Image.fromarray(np.moveaxis(patch, 0, -1)).save(folder / f"patch-{k:03}.png")
        (folder / "positions.csv").write_text("x,y\n")
        (folder / ".hidden.png").write_text("")
        folders.append(folder)
    forms = {
        "folder": lambda folder: folder,
        "text": str,
        "files": lambda folder: sorted(folder.glob("patch-*.png")),
    }
    for form, convert in forms.items():
        changed = [
            row | {"image": convert(folder)} for row, folder in zip(rows, folders, strict=True)
        ]
        assert trained(client_of(SiteData(changed)), context_of(), start(Slides)) == expected, form


def test_a_network_of_the_app_that_is_no_attention_is_given_whole_bags():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(features(), nn.Linear(8, 1))

        def forward(self, bags):
            found = [self.head(bag[~absent(bag[None])[0]]).mean(dim=0) for bag in bags]
            return torch.stack(found)

    client = client_of(data_of(4, 4), build_model=lambda self: Mean())
    assert trained(client, context_of(bag_size=3), start(client)) != bits(start(client))
    assert measured(client)["num-examples"] == 4
    made = client(context_of())
    assert made.draw(made.build_model(), made.prepare(data_of(2).train, train=False), 1) == []


def test_a_network_that_the_run_config_names_gives_the_features():
    class Named(Slides):
        build_model = BagClient.build_model

    args = '{spatial_dims = 2, in_channels = 3, out_channels = 5, init_features = 4, growth_rate = 2, block_config = [1, 1], norm = "instance"}'  # noqa: E501
    config = {"network": "DenseNet", "network_args": args, "patch_features": 5}
    model = Named(context_of(**config)).build_model()
    assert isinstance(model, AttentionMIL)
    assert model.classify.out_features == 1
    assert model(bag_of(3)[None]).shape == (1, 1)


# --- What sites may give --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (np.zeros((3, 16, 16)), "a bag has the shape (3, 16, 16); spatial_dims = 2 asks for 4 "
         "dimensions, (patches, channels, *spatial)"),
        (np.zeros((0, 3, 16, 16)), "a bag must have 1 to 100000 patches, got 0"),
        (np.full((2, 3, 16, 16), np.nan), "it holds NaN or infinite values"),
        ("{folder}", "{folder}: a bag must have 1 to 100000 patches, got 0"),
        ("{folder}/none", "{folder}/none is not there: a bag is a folder of patches, or a list of "
         "files"),
        ("{folder}/file", "{folder}/file is not a folder: a bag is a folder of patches, or a list "
         "of files"),
        (["{folder}/a.png", "{folder}/b.png"], "the patches of its bag differ in shape: "
         "{folder}/a.png has (1, 4, 4), {folder}/b.png (1, 5, 4)"),
        ("{folder}/linked", "{folder}/linked/c.png is a link that leads out of its folder: copy "
         "the file"),
    ],
)  # fmt: skip
def test_a_bag_that_cannot_be_used_is_rejected_by_name(tmp_path, caplog, image, text):
    folder = tmp_path / "bags"
    (folder / "linked").mkdir(parents=True)
    (folder / "file").write_text("")
    if isinstance(image, list):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "a.png")
        Image.fromarray(np.zeros((5, 4), np.uint8)).save(folder / "b.png")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "c.png")
    (folder / "linked" / "c.png").symlink_to(tmp_path / "c.png")

    def put(value):
        return value.format(folder=folder)

    if isinstance(image, str):
        image = put(image)
    elif isinstance(image, list):
        image = [put(part) for part in image]
    rows = [*slides(3, 1), {"image": image, "label": 0, "patient": "odd"}]
    client = client_of(SiteData(rows))
    trained(client, context_of(), start(client))
    found = [r.getMessage() for r in caplog.records if "rejected" in r.message]
    assert found == [f"hospital-1: rejected, train split, patient odd: {put(text)}"]


def test_labels_and_channels_are_checked_as_those_of_images(caplog):
    good = slides(4, 1)
    rows = [*good, {"image": good[0]["image"], "label": 2, "patient": "a"}]
    rows += [{"image": good[0]["image"][:, :1], "label": 0, "patient": "b"}]
    client = client_of(SiteData(rows))
    reply = ask(client, "query.describe", context_of())
    assert reply.content["metrics"]["train"] == 4
    found = [r.getMessage() for r in caplog.records if "rejected" in r.message]
    assert found == [
        "hospital-1: rejected, train split, patient a: label 2 is out of range: labels must be "
        "integers from 0 to 1 (num_classes - 1)",
        "hospital-1: rejected, train split, patient b: array has 1 channels, most images have 3",
    ]


def test_patches_of_other_shapes_in_another_bag_need_a_patch_size():
    rows = [*slides(2, 1), *slides(2, 2, size=20)]
    client = client_of(SiteData(rows))
    # Each bag has one shape; the padding of a batch needs one for all.
    assert reason_of(client) == (
        "patches of different shapes cannot be in one batch, such as (3, 16, 16) and (3, 20, 20): "
        "set patch-size"
    )
    assert trained(client, context_of(patch_size="12,12"), start(client)) != bits(start(client))


# --- Privacy --------------------------------------------------------------------------------------


def private(tmp_path, **config):
    chosen = {"privacy": "patient", "target_epsilon": 50.0, "run_dir": str(tmp_path)}
    return context_of(**{**chosen, "bag_size": 6, **config})


def test_a_private_step_clips_a_bag_as_one_record(tmp_path):
    client = client_of(data_of(6, 4))
    assert trained(client, private(tmp_path), start(client)) != bits(start(client))
    # So large a budget needs next to no noise.
    context = private(tmp_path, target_epsilon=1e7, private_metrics=True)
    found = measured(client, context)
    plain = measured(client)
    assert found["num-examples"] == plain["num-examples"] == 4
    assert found["accuracy"] == pytest.approx(plain["accuracy"], abs=0.02)


def test_the_gradient_of_each_bag_is_that_of_the_bag_alone():
    client = client_of(data_of(5))(context_of(bag_size=20, privacy="patient"))
    rows = client.load_data(client.site).train
    prepared = client.prepare(rows, train=True)
    batch = client.batch_of(prepared, range(5))
    assert batch["image"].shape[1] == 20
    torch.manual_seed(0)
    model = client.build_model().train()
    found = RecordGradients(model, client.loss_of, method="vmap")(batch)
    for index, row in enumerate(rows):
        model.zero_grad()
        images = torch.from_numpy(row["image"] / np.float32(255))[None]
        loss = client.loss_of(model, {"image": images, "label": torch.tensor([row["label"]])})
        loss.backward()
        assert float(found[1][index]) == pytest.approx(float(loss.detach()), abs=1e-5)
        for gradient, parameter in zip(found[0], model.parameters(), strict=True):
            assert torch.allclose(gradient[index], parameter.grad, atol=1e-5)


def test_an_augment_that_mixes_bags_is_refused(tmp_path):
    mixing = client_of(data_of(4), augment=lambda self, images: (images + images.flip(0)) / 2)
    assert reason_of(mixing, context=private(tmp_path)).startswith("augment mixes patients")
    apart = client_of(data_of(4), augment=lambda self, images: random_intensity(images))
    assert trained(apart, private(tmp_path), start(apart)) != bits(start(apart))


def test_padding_stays_padding_after_augment():
    client = client_of(data_of(4), augment=lambda self, images: images + 1)(context_of())
    prepared = client.prepare(client.load_data(client.site).train, train=True)
    batch = client.batch_of(prepared, range(4))
    sizes = [len(row["image"]) for row in prepared.rows]
    assert (~absent(batch["image"])).sum(dim=1).tolist() == sizes
    shown = batch["image"][~absent(batch["image"])]
    assert shown.isfinite().all()
    assert shown.min() >= 1


def test_nan_of_transforms_or_augment_is_not_taken_for_padding():
    def spoilt(self):
        return [lambda row: {**row, "image": row["image"] * np.nan}]

    client = client_of(data_of(2), intensity=spoilt)
    assert reason_of(client) == (
        "patches hold NaN after the transforms, which marks those that fill up a bag"
    )
    client = client_of(data_of(2), augment=lambda self, images: images * torch.nan)
    assert reason_of(client) == (
        "patches hold NaN after augment, which marks those that fill up a bag"
    )


def test_several_samples_of_a_patch_are_refused():
    client = client_of(data_of(2), random_transforms=lambda self: [lambda row: [row, row]])
    assert reason_of(client) == (
        "the transforms make several samples of one patch: they must make one (num_samples=1)"
    )
