"""Models in other forms give the outputs of the model, or are not written."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from predicting import GRID, Pictures, Volumes, lines_of, picture, predict, run_of, volumes
from predicting import write_volumes as write
from tables import TinyTable, run_tables
from typer.testing import CliRunner

from fedmed_flower import InputError
from fedmed_flower.cli.main import app
from fedmed_flower.data.site import simulation
from fedmed_flower.prediction import Predictor, export


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A table, pictures of the app's own network, and volumes of a UNet by name."""
    folder = tmp_path_factory.mktemp("exported")
    write(folder)
    Volumes.folder = folder
    with simulation():
        run_tables(folder / "table", TinyTable, 2, **{"tabular-network": "mlp"})
        run_of(folder / "pictures", Pictures)
        settings = GRID | {"local-steps": 30, "learning-rate": 0.02, "optimizer": "adam"}
        run_of(folder / "volumes", Volumes, **settings)
    return folder


def exported(folder, form, out, code=0):
    result = CliRunner().invoke(app, ["export", str(folder), "--to", form, "--out", str(out)])
    assert result.exit_code == code, (result.stdout, result.exception)
    return result.stdout


SHAPES = {"table": (6,), "pictures": (1, 12, 12), "volumes": (1, 16, 16, 16)}


def batches_of(kind, folder):
    """Yield batches, and the outputs of the network that was trained for them."""
    predictor = Predictor.load(folder / kind)
    network = predictor.network(predictor.client())
    for count in (1, 2, 5):
        batch = torch.randn(count, *SHAPES[kind], generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            yield batch, network(batch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SHAPES))
def test_onnx_gives_the_outputs_of_the_model(kind, runs, tmp_path):
    import onnx
    import onnxruntime

    printed = exported(runs / kind, "onnx", tmp_path / "model.onnx")
    assert f"onnx, with the outputs of the model: {tmp_path / 'model.onnx'}" in printed
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (given,) = session.get_inputs()
    assert given.name == ("features" if kind == "table" else "images")
    for batch, wanted in batches_of(kind, runs):
        found = session.run(None, {given.name: batch.numpy()})[0]
        distance = np.abs(found - wanted.numpy()).max()
        assert distance <= 1e-5 * float(wanted.abs().max())
    model = onnx.load(tmp_path / "model.onnx")
    known = {entry.key: entry.value for entry in model.metadata_props}
    assert known["notice"] == "research software, not a medical device"
    if kind == "table":
        assert json.loads(known["features"]) == [
            "age", "pressure", "sex=m", "ward=a", "ward=b", "ward=c",
        ]  # fmt: skip
    else:
        assert json.loads(known["declared"])["num_classes" if kind == "pictures" else "classes"]


@pytest.mark.parametrize("kind", list(SHAPES))
def test_torchscript_gives_the_outputs_of_the_model(kind, runs, tmp_path):
    exported(runs / kind, "torchscript", tmp_path / "model.ts")
    extra = {"metadata.json": ""}
    with export._quiet():
        script = torch.jit.load(tmp_path / "model.ts", _extra_files=extra)
        for batch, wanted in batches_of(kind, runs):
            assert torch.equal(script(batch), wanted)
    assert json.loads(extra["metadata.json"])["kind"].endswith("Client")


def test_a_missing_package_is_named_with_its_extra(runs, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    printed = exported(runs / "table", "onnx", tmp_path / "model.onnx", code=2)
    assert "--to onnx needs onnxscript: pip install 'fedmed-flower[onnx]'" in printed
    assert not (tmp_path / "model.onnx").exists()


def test_other_outputs_are_not_written(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    printed = exported(runs / "pictures", "torchscript", tmp_path / "model.ts", code=2)
    assert "the model as TorchScript gives other outputs than the model" in printed
    assert not (tmp_path / "model.ts").exists()


def test_what_cannot_be_a_bundle_or_exists_is_refused(runs, tmp_path):
    printed = exported(runs / "table", "bundle", tmp_path / "bundle", code=2)
    assert "a MONAI bundle is for images, and this model takes tables" in printed
    (tmp_path / "model.ts").write_text("")
    printed = exported(runs / "table", "torchscript", tmp_path / "model.ts", code=2)
    assert f"{tmp_path / 'model.ts'} exists already: give another --out" in printed
    with pytest.raises(InputError, match="is not there"):
        Predictor.load(tmp_path / "nowhere")


def run_bundle(folder):
    """Run a bundle as its user does; by MONAI's function where the package `fire` is missing."""
    code = "from monai.bundle import run; run(config_file='configs/inference.json')"
    command = [sys.executable, "-c", code]
    if importlib.util.find_spec("fire"):
        command = [sys.executable, "-m", "monai.bundle", "run"]
        command += ["--config_file", "configs/inference.json"]
    # No package of ours on the path: the bundle stands alone.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_bundle_outlines_volumes_as_the_model_does(runs, tmp_path):
    exported(runs / "volumes", "bundle", tmp_path / "bundle")
    (tmp_path / "bundle" / "images").mkdir()
    for number in range(2):
        source = runs / f"2-{number}.nii.gz"
        (tmp_path / "bundle" / "images" / source.name).write_bytes(source.read_bytes())
    run_bundle(tmp_path / "bundle")
    images = [row["image"] for row in volumes(runs, 2)[:2]]
    predict(runs / "volumes", *images, "--out", tmp_path / "out")
    for number, line in enumerate(lines_of(tmp_path / "out" / "predictions.csv")):
        found = nibabel.load(tmp_path / "bundle" / "eval" / f"2-{number}_mask.nii.gz")
        wanted = nibabel.load(line["mask"])
        assert np.array_equal(found.dataobj, wanted.dataobj)
        assert np.allclose(found.affine, wanted.affine, atol=1e-6)


@pytest.mark.slow
def test_a_bundle_classifies_pictures_as_the_model_does(runs, tmp_path):
    exported(runs / "pictures", "bundle", tmp_path / "bundle")
    files = []
    (tmp_path / "bundle" / "images").mkdir()
    for number in range(3):
        files.append(tmp_path / "bundle" / "images" / f"{number}.png")
        Image.fromarray(picture(number, 9)["image"]).save(files[-1])
    run_bundle(tmp_path / "bundle")
    predict(runs / "pictures", *files, "--out", tmp_path / "out.csv")
    wanted = [
        [float(line[f"probability {number}"]) for number in range(3)]
        for line in lines_of(tmp_path / "out.csv")
    ]
    with (tmp_path / "bundle" / "eval" / "predictions.csv").open() as file:
        found = {Path(name).name: list(map(float, shares)) for name, *shares in csv.reader(file)}
    got = [found[f"{number}.png"] for number in range(3)]
    assert np.allclose(got, wanted, rtol=1e-5)
