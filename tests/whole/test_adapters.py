"""Runs of transformers with adapters: what travels, what is kept, and what the files hold."""

import json

import numpy as np
import pytest
import torch
from flwr.serverapp import ServerApp
from monai.networks.nets import UNETR, ViT
from PIL import Image
from predicting import predict, run_of
from safetensors.torch import load_file
from tiny import CONFIG, bits, context_of, nodes_of, run_tiny, says, see
from torch import nn

from fedmed_flower import (
    ClassificationClient,
    InputError,
    SegmentationClient,
    SiteData,
    federate,
    run_local,
)
from fedmed_flower.metrics.plain import plain_metrics
from fedmed_flower.prediction import Predictor
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.strategies import FedAdam, FedAvg

LORA = {"lora": "*.qkv,*.out_proj", "trainable": "*.classification_head.*"}
ADAPTED = {f"vit.blocks.{n}.attn.{layer}" for n in (0, 1) for layer in ("qkv", "out_proj")}
WEIGHTS = {f"{layer}.weight" for layer in ADAPTED}
HEAD = {f"vit.classification_head.{part}" for part in ("weight", "bias")}


class Transformer(nn.Module):
    """The classes of a vision transformer, without its hidden states."""

    def __init__(self):
        super().__init__()
        sizes = {"img_size": 12, "patch_size": 6, "hidden_size": 16, "mlp_dim": 8}
        self.vit = ViT(
            in_channels=1,
            spatial_dims=2,
            num_layers=2,
            num_heads=2,
            classification=True,
            num_classes=3,
            post_activation="",
            **sizes,
        )

    def forward(self, images):
        return self.vit(images)[0]


class Hospital(ClassificationClient):
    num_classes = 3
    image_shape = (1, 12, 12)

    def build_model(self):
        return Transformer()

    def load_data(self, site):
        rows = [self.row(site.index, number) for number in range(36)]
        return SiteData(rows[:18], rows[18:24], rows[24:], source="made up")

    def row(self, seed, number):
        label = number % 3
        image = np.random.default_rng((seed, number)).normal(size=(12, 12)).astype(np.float32)
        image[:, 4 * label : 4 * label + 4] += 1
        return {"image": image, "label": label, "patient": f"{seed}-{number}"}


def start(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer()


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def measured(model, index, client=Hospital, split="test", num_sites=2, **config):
    """Return the figures of a network on the rows of a hospital, outside of any run."""
    made = client(context_of(index, num_sites, **config))
    _, prepared = made.prepared(split, pooled=False)
    with torch.no_grad():
        return plain_metrics(made.measure(model.eval(), prepared))


def network_of(path, make=Transformer):
    model = make()
    model.load_state_dict(load_file(path))
    return model


def agree(found, wanted):
    """Fail unless two tables of figures are the same to the last digits of single precision."""
    numbers = {k: v for k, v in wanted.items() if isinstance(v, int | float)}
    assert {"auc", "accuracy", "loss"} <= numbers.keys() & found.keys()
    common = numbers.keys() & found.keys()
    assert {k: found[k] for k in common} == pytest.approx({k: numbers[k] for k in common}, rel=1e-6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    more = {"num-server-rounds": 3, "learning-rate": 0.2, "personal-epochs": 2}
    return run_of(folder, Hospital, **LORA, **more)


def test_adapters_and_what_trainable_names_are_all_that_travels(finished):
    summary = summary_of(finished)
    assert (summary["status"], summary["failures"]) == ("finished", [])
    travelled = RunFolder(finished).load().arrays
    parts = {f"{layer}.lora.{part}" for layer in ADAPTED for part in "ab"}
    assert {*travelled} == parts | HEAD
    # rank 4: qkv is 48 x 16, out_proj 16 x 16; the head 3 x 16, with a bias.
    trained = 2 * (4 * (48 + 16) + 4 * (16 + 16)) + 3 * 17
    model = summary["model"]
    assert model["weights-trained"] == trained
    size = sum(len(array.data) for array in travelled.values())
    assert model["bytes"] == size < model["bytes-whole"] / 3
    line = (
        f"{trained} of {model['weights']:,} weights, with adapters in 4 layers, are trained and "
        f"travel: {size:,} bytes in place of {model['bytes-whole']:,}"
    )
    assert line in (finished / "log.txt").read_text()
    for site in ("hospital-1", "hospital-2"):
        # Training, validation and test, each with the part that travels.
        traffic = summary["traffic"][site]
        assert traffic["bytes-to-site"] < traffic["replies"] * (size + 3000)


def test_the_file_of_the_model_is_of_the_network_alone(finished):
    state = load_file(finished / "model.safetensors")
    before = start().state_dict()
    assert state.keys() == before.keys()
    moved = {name for name in state if not torch.equal(state[name], before[name])}
    assert moved == WEIGHTS | HEAD
    for name in WEIGHTS:
        assert torch.linalg.matrix_rank((state[name] - before[name]).double(), rtol=1e-4) == 4


def test_model_and_predictor_give_the_figures_of_the_runs_own_test(finished):
    model = network_of(finished / "model.safetensors")
    predictor = Predictor.load(finished)
    client = predictor.client()
    graph = predictor.network(client)
    for index, site in enumerate(("hospital-1", "hospital-2")):
        table = summary_of(finished)["test"]["sites"][site]
        agree(table, measured(model, index))
        agree(table, measured(graph, index))
        images = [Hospital.row(None, index, number) for number in range(24, 36)]
        prepared = client.prepare(
            [{"image": row["image"], "patient": row["patient"]} for row in images], train=False
        )
        found = client.predict(graph, prepared)
        with torch.no_grad():
            outputs = model(torch.stack([client_batch(client, row) for row in images]))
        np.testing.assert_allclose(found, outputs.numpy(), rtol=1e-5, atol=1e-6)


def client_batch(client, row):
    return client.batch_of(client.prepare([row], train=False), [0])["image"][0]


def test_a_hospitals_fine_tuned_model_is_of_the_network_alone(finished):
    found = summary_of(finished)["test"]["personal"]
    for index, site in enumerate(("hospital-1", "hospital-2")):
        path = finished / "personal" / f"{site}.safetensors"
        agree(found[site], measured(network_of(path), index))
        predictor = Predictor.load(finished).with_weights(path)
        agree(found[site], measured(predictor.network(predictor.client()), index))


def test_the_apps_own_evaluation_is_given_the_network_alone(tmp_path):
    seen = {}

    def evaluate(server_round, arrays):
        model = start()
        model.load_state_dict(arrays.to_torch_state_dict())
        seen[server_round] = model

    config = LORA | {"num_server_rounds": 1, "model": Transformer, "evaluate_fn": evaluate}
    run_tiny(tmp_path / "run", Hospital, **config)
    assert bits_of(seen[0]) == bits_of(start())
    assert bits_of(seen[1]) == bits_of(network_of(tmp_path / "run" / "model.safetensors"))


def bits_of(model):
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def test_a_run_with_adapters_resumes_to_the_same_bits_and_with_the_same_rank(tmp_path):
    config = {**LORA, "model": Transformer, "num_server_rounds": 2}
    whole = run_tiny(tmp_path / "whole", Hospital, strategy=FedAdam(), **config)
    parts = tmp_path / "parts"
    run_tiny(parts, Hospital, strategy=FedAdam(), **config | {"num_server_rounds": 1})
    resumed = run_tiny(parts, Hospital, strategy=FedAdam(), **config, resume=True)
    assert bits(resumed.arrays) == bits(whole.arrays)
    files = [load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", parts)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    with pytest.raises(InputError, match=r"lora-rank was 4 when .* and is 2 now: resume with"):
        run_tiny(parts, Hospital, resume=True, **config, lora_rank=2)


def test_adapters_are_trained_privately(tmp_path):
    config = {"privacy": "patient", "target_epsilon": 8.0, "num_server_rounds": 1}
    run_tiny(tmp_path / "run", Hospital, model=Transformer, **LORA, **config)
    summary = summary_of(tmp_path / "run")
    assert (summary["status"], summary["failures"]) == ("finished", [])
    assert {*summary["privacy"]["patient"]["sites"]} == {"hospital-1", "hospital-2"}
    state, before = load_file(tmp_path / "run" / "model.safetensors"), start().state_dict()
    moved = {name for name in state if not torch.equal(state[name], before[name])}
    assert moved == WEIGHTS | HEAD


@pytest.mark.parametrize("keep", ["*.lora.*", "*.lora.b"])
def test_each_hospital_keeps_adapters_of_its_own(keep, tmp_path):
    folder = run_of(tmp_path / "run", Hospital, **LORA, keep=keep, **{"learning-rate": 0.2})
    summary = summary_of(folder)
    assert (summary["status"], summary["failures"]) == ("finished", [])
    assert all("lora" in name for name in summary["kept-layers"])
    own = [network_of(folder / "own" / f"hospital-{n}.safetensors") for n in (1, 2)]
    for index, model in enumerate(own):
        agree(summary["test"]["own"][f"hospital-{index + 1}"], measured(model, index))
    names = [name for name, _ in start().named_parameters()]
    first, second = (model.state_dict() for model in own)
    differ = {name for name in names if not torch.equal(first[name], second[name])}
    assert differ == WEIGHTS
    predictor = Predictor.load(folder).with_weights(folder / "own" / "hospital-1.safetensors")
    agree(
        summary["test"]["own"]["hospital-1"],
        measured(predictor.network(predictor.client()), 0),
    )


def test_b_alone_travels_and_a_is_the_same_everywhere(tmp_path):
    config = {**LORA, "lora-train": "b", "num-server-rounds": 2, "learning-rate": 0.2}
    folder = run_of(tmp_path / "run", Hospital, **config)
    summary = summary_of(folder)
    assert (summary["status"], summary["failures"]) == ("finished", [])
    travelled = {*RunFolder(folder).load().arrays}
    assert travelled == {f"{layer}.lora.b" for layer in ADAPTED} | HEAD
    for index, site in enumerate(("hospital-1", "hospital-2")):
        agree(
            summary["test"]["sites"][site],
            measured(network_of(folder / "model.safetensors"), index),
        )


@pytest.mark.parametrize("method", ["scaffold", "ditto", "moon"])
def test_methods_work_on_what_travels(method, tmp_path):
    folder = run_of(tmp_path / "run", Hospital, **LORA, method=method)
    summary = summary_of(folder)
    assert (summary["status"], summary["failures"]) == ("finished", [])
    state = load_file(folder / "model.safetensors")
    before = start().state_dict()
    moved = {name for name in state if not torch.equal(state[name], before[name])}
    assert moved == WEIGHTS | HEAD
    for index, site in enumerate(("hospital-1", "hospital-2")):
        model = network_of(folder / "model.safetensors")
        agree(summary["test"]["sites"][site], measured(model, index))
        if method == "ditto":
            own = network_of(folder / "own" / f"{site}.safetensors")
            agree(summary["test"]["own"][site], measured(own, index))


def test_an_adapter_that_is_passed_by_ends_the_run_before_its_first_round(tmp_path):
    class Reading(Transformer):
        def forward(self, images):
            head = self.vit.classification_head
            hidden = self.vit.norm(self.vit.patch_embedding(images)).mean(1)
            return nn.functional.linear(hidden, head.weight, head.bias)

    client = type("Client", (Hospital,), {"build_model": lambda self: Reading()})
    text = (
        "lora: the network does not call its layer vit.classification_head, so that an adapter "
        "there would learn nothing: give patterns that leave it out" + see("lora")
    )
    with pytest.raises(InputError, match=says(text)):
        run_of(
            tmp_path / "run",
            client,
            lora="*.classification_head,*.patch_embeddings",
            **{"lora-rank": 1},
        )
    assert not (tmp_path / "run").exists()


SMALL = {"in_channels": 1, "out_channels": 2, "img_size": 32, "feature_size": 4, "hidden_size": 16}
SMALL |= {"mlp_dim": 16, "num_heads": 2, "spatial_dims": 2}


class Outlining(SegmentationClient):
    classes = ("spot",)

    def load_data(self, site):
        rows = [spot(site.index, number) for number in range(8)]
        return SiteData(rows[:4], rows[4:6], rows[6:], source="made up")


def spot(seed, number):
    rng = np.random.default_rng((seed, number))
    mask = np.zeros((32, 32), np.uint8)
    row, column = rng.integers(4, 20, 2)
    mask[row : row + 8, column : column + 8] = 1
    image = (mask + 0.3 * rng.normal(size=mask.shape)).astype(np.float32)
    return {"image": image, "label": mask, "patient": f"{seed}-{number}"}


def write_bundle(folder, seed=5):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = UNETR(**SMALL).state_dict()
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    network = {"_target_": "UNETR", **SMALL}
    (folder / "configs" / "inference.json").write_text(json.dumps({"network_def": network}))
    torch.save(state, folder / "models" / "model.pt")
    return state


def test_the_weights_of_a_bundle_stay_and_adapters_are_added_to_them(tmp_path):
    before = write_bundle(tmp_path / "bundle")
    write_bundle(tmp_path / "other", seed=6)
    sites = nodes_of(tmp_path / "sites", "north", "south", min_evaluated_patients=1)
    for site, name in zip(sites, ("bundle", "other"), strict=True):
        site |= {"bundle": str(tmp_path / name), "min-train-patients": 1}
    config = {"bundle": str(tmp_path / "bundle"), "lora": "*.qkv,*.linear?,*.decoder2*.conv?.conv"}
    config |= {"trainable": "out.*", "patch-size": "32,32", "num-server-rounds": 1}
    folder = tmp_path / "run"
    server = ServerApp()

    @server.main()
    def main(grid, context):
        federate(FedAvg(), grid, context, Outlining(context))

    settings = CONFIG | {"run-dir": str(folder)} | config
    run_local(server, Outlining.client_app(), 2, run_config=settings, node_configs=sites)
    summary = summary_of(folder)
    # The other hospital has another bundle, so that its frozen part is not the server's.
    assert {(f["site"], f["reason"]) for f in summary["failures"]} == {("south", "InputError")}
    state = load_file(folder / "model.safetensors")
    assert state.keys() == before.keys()
    moved = {name for name in state if not torch.equal(state[name], before[name])}
    layers = {name.removesuffix(".weight").split(".", 2)[-1] for name in moved}
    assert {"attn.qkv", "mlp.linear1", "mlp.linear2"} < {part.split(".", 1)[-1] for part in layers}
    assert any(name.startswith("decoder2.conv_block.conv1") for name in moved)
    assert len(moved) < len(before) / 3


def test_a_named_network_with_adapters_predicts_by_its_file_as_in_the_run(tmp_path):
    config = {"network": "UNETR", "network-args": json.dumps(SMALL), "patch-size": "32,32"}
    config |= {"lora": "*.qkv,*.out_proj", "trainable": "out.*", "lora-rank": 2}
    folder = run_of(tmp_path / "run", Outlining, **config)
    summary = summary_of(folder)
    assert (summary["status"], summary["failures"]) == ("finished", [])
    network = network_of(folder / "model.safetensors", lambda: UNETR(**SMALL))
    for index, site in enumerate(("hospital-1", "hospital-2")):
        found = measured(network, index, Outlining, patch_size="32,32")
        table = summary["test"]["sites"][site]
        assert 0 < table["dice"] < 1
        assert table["dice"] == pytest.approx(found["dice"], rel=1e-6)
    image = spot(7, 0)["image"]
    pixels = np.clip(60 + 90 * image, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "new.png")
    predict(folder, tmp_path / "new.png", "--out", tmp_path / "masks")
    (mask,) = (tmp_path / "masks").glob("*.png")
    client = Predictor.load(folder).client()
    row = {"image": str(tmp_path / "new.png"), "patient": "new"}
    (wanted,) = client.predict(network.eval(), client.prepare([row], train=False))
    assert 0 < wanted.sum() < wanted.size
    assert np.array_equal(np.asarray(Image.open(mask)), wanted)
