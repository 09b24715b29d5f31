"""Regions that overlap, predicted for files and in other forms: a mask for each region."""

import json

import nibabel
import numpy as np
import pytest
import torch
from predicting import GRID, Regions, Volumes, lines_of, predict, run_of, write_volumes
from tiny import context_of
from typer.testing import CliRunner

from fedmed_flower import InputError, SiteData
from fedmed_flower.cli.main import app
from fedmed_flower.data.site import simulation
from fedmed_flower.prediction import Predictor
from fedmed_flower.prediction.description import Description

FILES = {"body": "body", "Front part": "Front-part", "back": "back"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("regions")
    write_volumes(folder)
    Regions.folder = folder
    with simulation():
        settings = {"local-steps": 20, "learning-rate": 0.02, "optimizer": "adam"}
        run_of(folder / "run", Regions, **GRID, **settings)
    return folder / "run"


def masks_by_hand(run, path):
    """Return the masks that the run's own client gives for a file."""
    predictor = Predictor.load(run)
    client = predictor.client()
    prepared = client.prepare([{"image": str(path), "patient": "a"}], train=False)
    (found,) = client.predict(predictor.network(client), prepared)
    return found


def test_each_region_has_a_mask_on_the_grid_of_the_file(run, tmp_path):
    image = Volumes.folder / "2-0.nii.gz"
    predict(run, image, image, "--out", tmp_path)
    lines = lines_of(tmp_path / "predictions.csv")
    assert list(lines[0]) == ["file", "mask body", "mask Front part", "mask back", "problem"]
    assert [line["problem"] for line in lines] == ["", ""]
    found = masks_by_hand(run, image)
    assert found.shape == (3, *nibabel.load(image).shape)
    # Two of the regions overlap, and each is found.
    assert (found[0] & (found[1] | found[2])).any()
    assert found.any(axis=(1, 2, 3)).all()
    for (name, part), wanted in zip(FILES.items(), found, strict=True):
        paths = [line[f"mask {name}"] for line in lines]
        assert paths == [str(tmp_path / f"2-0-mask-{part}{n}.nii.gz") for n in ("", "-2")]
        mask = nibabel.load(paths[0])
        assert mask.affine == pytest.approx(nibabel.load(image).affine)
        assert np.array_equal(mask.get_fdata(), wanted)
        assert mask.get_data_dtype() == np.uint8


def test_regions_that_may_overlap_are_not_written_as_seg(run, tmp_path):
    image = Volumes.folder / "2-0.nii.gz"
    text = predict(run, image, "--out", tmp_path / "o", "--seg", code=2)
    assert "this model outlines regions that may overlap: leave it out" in " ".join(text.split())
    assert not (tmp_path / "o").exists()


def test_the_predictor_keeps_the_regions_in_their_order(run):
    description = Predictor.load(run).description
    assert description.declared["regions"] == {"body": [5, 9], "Front part": [5], "back": [9]}
    client = Predictor.load(run).client()
    assert tuple(client.classes) == tuple(FILES)
    assert client.regions == {"body": (5, 9), "Front part": (5,), "back": (9,)}
    declared = description.declared | {"regions": {"body": [5, 9.5]}}
    content = {"base": description.base, "name": "x", "settings": {}, "declared": declared}
    with pytest.raises(ValueError, match="regions must be a list"):
        Description.read(content | {"agreed": "", "overridden": [], "builds": False})


def test_a_predictor_of_an_earlier_version_has_no_regions():
    client = type("Client", (Volumes,), {"load_data": lambda self, site: SiteData(())})
    written = Description.of(
        client(context_of(**{k.replace("-", "_"): v for k, v in GRID.items()}))
    )
    declared = {key: value for key, value in written.declared.items() if key != "regions"}
    content = {"base": written.base, "name": written.name, "settings": dict(written.settings)}
    content |= {"declared": declared, "agreed": "", "overridden": [], "builds": False}
    assert Description.read(content).client("cpu").regions == {}


def test_postprocessing_that_changes_the_shape_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fedmed_flower.clients.segmentation.SegmentationClient.postprocess",
        lambda self, mask: mask[0],
    )
    image = Volumes.folder / "2-0.nii.gz"
    predict(run, image, "--out", tmp_path, code=1)
    (line,) = lines_of(tmp_path / "predictions.csv")
    assert "postprocess must keep the shape" in line["problem"]


def exported(run, form, out):
    result = CliRunner().invoke(app, ["export", str(run), "--to", form, "--out", str(out)])
    assert result.exit_code == 0, (result.stdout, result.exception)


def test_torchscript_names_the_outputs(run, tmp_path):
    exported(run, "torchscript", tmp_path / "model.ts")
    extra = {"metadata.json": ""}
    torch.jit.load(tmp_path / "model.ts", _extra_files=extra)
    known = json.loads(extra["metadata.json"])
    assert known["outputs"] == (
        "float32 (batch, regions, x, y, z), before the sigmoid of each region"
    )


def test_a_bundle_thresholds_each_region_as_the_model_does(run, tmp_path):
    from monai.bundle import ConfigParser

    bundle = tmp_path / "bundle"
    exported(run, "bundle", bundle)
    about = json.loads((bundle / "configs" / "metadata.json").read_text())
    outputs = about["network_data_format"]["outputs"]["pred"]
    assert outputs["channel_def"] == {"0": "body", "1": "Front part", "2": "back"}
    assert outputs["num_channels"] == 3
    source = Volumes.folder / "2-0.nii.gz"
    (bundle / "images").mkdir()
    (bundle / "images" / source.name).write_bytes(source.read_bytes())
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    parser.config["bundle_root"] = str(bundle)
    with torch.no_grad():
        parser.get_parsed_content("run")
    found = nibabel.load(bundle / "eval" / "2-0_mask.nii.gz").get_fdata()
    wanted = masks_by_hand(run, source)
    assert found.shape == (*wanted.shape[1:], 3)
    assert np.array_equal(np.moveaxis(found, -1, 0), wanted)


def test_regions_of_a_stranger_are_checked(run):
    description = Predictor.load(run).description
    declared = dict(description.declared) | {"regions": {"body": [0]}, "classes": ["body"]}
    with pytest.raises(InputError, match="region 'body' must hold values from 1"):
        Description(**{**vars(description), "declared": declared}).client("cpu")
