"""Regions that overlap, predicted for files and in other forms: a mask for each region."""

import json
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from dicom_files import STUDY, write_series
from predicting import GRID, Regions, Volumes, lines_of, predict, run_of, write_volumes
from tiny import context_of
from torch import nn
from typer.testing import CliRunner

from fedmed_flower import InputError, SegmentationClient, SiteData
from fedmed_flower.cli.main import app
from fedmed_flower.data.site import simulation
from fedmed_flower.images.reading import read_image
from fedmed_flower.images.regions import label_map, nested, read_regions
from fedmed_flower.prediction import Predictor
from fedmed_flower.prediction.description import Description
from fedmed_flower.prediction.files import predict_files
from fedmed_flower.prediction.segmentations import SegmentationWriter

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


class Thresholds(nn.Module):
    """Gives x - 0.705, x - 0.205 and x - 0.505 for a value x."""

    def forward(self, images):
        thresholds = torch.tensor([0.705, 0.205, 0.505]).view(1, -1, *[1] * (images.ndim - 2))
        return images - thresholds


class Tumours(SegmentationClient):
    """Regions of which each holds the next, by brightness."""

    regions = {"ET": (400,), "WT": (1, 2, 400), "TC": (1, 400)}  # noqa: RUF012
    spatial_dims = 3
    modality = "ct"
    ct_window = (0.0, 100.0)

    def load_data(self, site):
        raise NotImplementedError


def write_scan(folder):
    voxels = np.random.default_rng(1).integers(0, 101, (7, 6, 5))
    write_series(folder, voxels, (0.7, 0.8, 3.0), origin=(-9, 4, 5), seed=1, **STUDY)
    return folder, np.stack([voxels > 70, voxels > 20, voxels > 50])


def test_nested_regions_are_a_label_map_and_a_seg_of_one_segment_each(tmp_path):
    scan, wanted = write_scan(tmp_path / "scan")
    client = Tumours(context_of(orientation=""))
    table, problems = predict_files(client, Thresholds(), [scan, scan], tmp_path / "o", seg=True)
    assert problems == 0
    lines = lines_of(table)
    columns = ["mask ET", "mask WT", "mask TC", "label map", "segmentation"]
    assert list(lines[0]) == ["file", *columns, "problem"]
    names = ("scan-mask-ET.nii.gz", "scan-mask-WT.nii.gz", "scan-mask-TC.nii.gz")
    names += ("scan-mask.nii.gz", "scan-mask.dcm")
    assert [Path(lines[0][column]).name for column in columns] == [*names]
    assert Path(lines[1]["label map"]).name == "scan-mask-2.nii.gz"
    image = read_image(scan, 3)
    found = nibabel.load(lines[0]["label map"])
    assert found.affine == pytest.approx(image.affine.numpy())
    assert found.get_data_dtype() == np.int16
    values = np.where(wanted[0], 400, np.where(wanted[2], 1, np.where(wanted[1], 2, 0)))
    assert np.array_equal(found.get_fdata(), values)
    # A client reads the three forms as the same regions.
    parts = [lines[0][column] for column in columns[:3]]
    for source in (lines[0]["label map"], lines[0]["segmentation"], parts):
        read = read_regions(source, 3, Tumours.regions, image)
        assert np.array_equal(read.numpy(), wanted), source
    theirs = highdicom.seg.segread(lines[0]["segmentation"])
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in sorted(scan.iterdir())]
    uids.sort(key=lambda uid: _place_of(scan, uid))
    volume = theirs.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    assert np.array_equal(volume.transpose(3, 2, 1, 0), wanted)
    assert theirs.SegmentsOverlap == "YES"


def _place_of(folder, uid):
    headers = map(pydicom.dcmread, folder.iterdir())
    return next(one.ImagePositionPatient[2] for one in headers if one.SOPInstanceUID == uid)


def test_regions_of_one_slice_and_of_none(tmp_path):
    files = write_series(tmp_path / "s", np.zeros((7, 6, 1)), patient="p", **STUDY)
    image = read_image(files[0], 2)
    found = np.random.default_rng(2).integers(0, 2, (2, 6, 7)).astype(np.uint8)
    writer = SegmentationWriter(("a", "b"), "Hospital", nn.Linear(2, 1))
    regions = {"a": (1, 3), "b": (2, 3)}
    for masks in (found, 0 * found):
        (tmp_path / "m.dcm").write_bytes(writer.content(masks, image, files[0]))
        read = read_regions(tmp_path / "m.dcm", 2, regions, image)
        assert np.array_equal(read.numpy(), masks)


@pytest.mark.parametrize(
    ("regions", "order"),
    [
        ({"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}, ((0, 2), (1, 1), (2, 4))),
        ({"tumour": (2,), "organ": (1, 2)}, ((1, 1), (0, 2))),
        ({"liver": (7,)}, ((0, 7),)),
        # Which of two values the ring has cannot be said.
        ({"WT": (1, 2, 4), "ET": (4,)}, ()),
        ({"organ": (1, 2)}, ()),
        # Beside each other, and one and the same.
        ({"body": (1, 2), "front": (1,), "back": (2,)}, ()),
        ({"a": (1, 2), "b": (2, 3)}, ()),
        ({"a": (1, 2), "b": (1, 2)}, ()),
        ({}, ()),
    ],
)
def test_which_regions_one_mask_of_values_can_show(regions, order):
    assert nested(regions) == order


def test_the_innermost_region_counts_as_in_nnunets_label_maps():
    """Its export: ``for i, c in enumerate(regions_class_order): segmentation[found[i]] = c``."""
    regions = {"WT": (1, 2, 3), "TC": (2, 3), "ET": (3,)}
    found = np.random.default_rng(0).integers(0, 2, (3, 9, 8)).astype(np.uint8)
    wanted = np.zeros((9, 8), np.uint8)
    for region, value in zip(found, (1, 2, 3), strict=True):
        wanted[region == 1] = value
    assert np.array_equal(label_map(found, nested(regions)), wanted)


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
