"""Bags of patches, predicted for folders and in other forms."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from predicting import lines_of, predict, run_of
from scipy.special import expit
from torch import nn
from typer.testing import CliRunner

from fedmed_flower import BagClient, SiteData
from fedmed_flower.cli.main import app
from fedmed_flower.data.phantoms import slides
from fedmed_flower.data.site import simulation
from fedmed_flower.models.bags import AttentionMIL
from fedmed_flower.models.graph import GraphNetwork
from fedmed_flower.prediction import Predictor

ARGS = (
    "{spatial_dims = 2, in_channels = 3, out_channels = 5, init_features = 4, growth_rate = 2, "
    'block_config = [1, 1], norm = "instance"}'
)
NAMED = {"network": "DenseNet", "network-args": ARGS, "patch-features": 5, "attention-size": 7}


class Named(BagClient):
    num_classes = 2
    image_shape = (3, 16, 16)

    def load_data(self, site):
        rows = slides(12, site.index)
        return SiteData(rows[:8], rows[8:10], rows[10:])


class Own(Named):
    def build_model(self):
        features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten())
        return AttentionMIL(features, 4, 1, 6)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bags")
    with simulation():
        run_of(folder / "named", Named, **NAMED)
        run_of(folder / "own", Own)
    for number, row in enumerate(slides(3, 9)):
        place = folder / f"slide-{number}"
        place.mkdir()
        for k, patch in enumerate(row["image"]):
            Image.fromarray(np.moveaxis(patch, 0, -1)).save(place / f"{k:02}.png")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize("kind", ["named", "own"])
def test_folders_are_predicted_as_by_the_model_called_by_hand(kind, runs, tmp_path):
    folders = [runs / f"slide-{number}" for number in range(3)]
    predict(runs / kind, *folders, runs / "empty", "--out", tmp_path / "out.csv", code=1)
    lines = lines_of(tmp_path / "out.csv")
    predictor = Predictor.load(runs / kind)
    client = predictor.client()
    network = predictor.network(client)
    assert isinstance(network, AttentionMIL if kind == "named" else GraphNetwork)
    for line, folder, row in zip(lines, folders, slides(3, 9), strict=False):
        patches = row["image"].astype(np.float32)
        mean, spread = (f(patches, axis=(2, 3), keepdims=True) for f in (np.mean, np.std))
        with torch.no_grad():
            output = float(network(torch.from_numpy((patches - mean) / spread)[None]))
        assert line["file"] == str(folder)
        assert float(line["probability 1"]) == pytest.approx(expit(output), abs=1e-5)
        assert line["problem"] == ""
    assert lines[3]["problem"] == f"{runs / 'empty'}: a bag must have 1 to 100000 patches, got 0"


def exported(run, form, out, code=0):
    result = CliRunner().invoke(app, ["export", str(run), "--to", form, "--out", str(out)])
    assert result.exit_code == code, (result.stdout, result.exception)
    return result.stdout


def test_torchscript_takes_bags_of_any_size_and_names_them(runs, tmp_path):
    exported(runs / "own", "torchscript", tmp_path / "model.ts")
    extra = {"metadata.json": ""}
    script = torch.jit.load(tmp_path / "model.ts", _extra_files=extra)
    known = json.loads(extra["metadata.json"])
    assert known["input"] == (
        "float32 (batch, patches, channels, x, y), on the grid and scaled as declared"
    )
    predictor = Predictor.load(runs / "own")
    network = predictor.network(predictor.client())
    bags = torch.rand(2, 9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    bags[1, 6:] = torch.nan
    assert torch.allclose(script(bags), network(bags), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["named", "own"])
def test_onnx_takes_bags_of_any_size(kind, runs, tmp_path):
    import onnxruntime

    exported(runs / kind, "onnx", tmp_path / "model.onnx")
    predictor = Predictor.load(runs / kind)
    network = predictor.network(predictor.client())
    bags = torch.rand(2, 9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    bags[1, 6:] = torch.nan
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {"images": bags.numpy()})[0]
    assert np.allclose(found, network(bags).numpy(), atol=1e-5)


def test_a_bundle_holds_no_bags(runs, tmp_path):
    printed = exported(runs / "own", "bundle", tmp_path / "bundle", code=2)
    assert "a MONAI bundle is for images, and this model takes bags of patches" in printed
