"""Predicted masks as DICOM SEG, read again by highdicom and by this package."""

import sys
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from dicom_files import AXIAL, SAGITTAL, STUDY, write_image, write_series
from predicting import GRID, Pictures, Volumes, lines_of, predict, run_of, write_volumes
from pydicom.data import get_testdata_file
from tiny import context_of
from torch import nn

from fedmed_flower.data.phantoms import hippocampi
from fedmed_flower.data.site import simulation
from fedmed_flower.errors import InputError
from fedmed_flower.images.geometry import FILE_AFFINE
from fedmed_flower.images.reading import read_image, read_label
from fedmed_flower.prediction.files import predict_files
from fedmed_flower.prediction.segmentations import SegmentationWriter

NAMES = ("Müller's node", "left lung")


@pytest.fixture(scope="module")
def writer():
    return SegmentationWriter(NAMES, "Hospital", nn.Linear(2, 1))


def masks(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 3, shape).astype(np.uint8)


def series(folder, sides=(7, 6, 5), seed=1, **tags):
    return write_series(
        folder, masks(sides), (0.7, 0.8, 3.0), origin=(-9, 4, 5), seed=seed, **STUDY | tags
    )


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, (0.8, 0.6, 0, 0, 0, -1)])
def test_a_mask_comes_back_as_it_was_written(writer, tmp_path, orientation):
    files = series(tmp_path / "s", orientation=orientation, PatientName="Müller^Jörg",
                   SpecificCharacterSet="ISO_IR 100")  # fmt: skip
    image = read_image(tmp_path / "s", 3)
    mask = masks((7, 6, 5), 2)
    mask[:, :, 1] = 0
    path = tmp_path / "m.dcm"
    path.write_bytes(writer.content(mask, image, tmp_path / "s"))
    assert np.array_equal(read_label(path, 3, 3, image=image, names=NAMES)[0].numpy(), mask)
    seg = highdicom.seg.segread(path)
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in files]
    theirs = seg.get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True
    )
    assert np.array_equal(theirs.transpose(2, 1, 0), mask)
    # The plane without a structure is left out, and its image is referenced all the same.
    assert {uid for _, _, uid in seg.get_source_image_uids()} == {*uids}
    assert [item.SegmentLabel for item in seg.SegmentSequence] == [*NAMES]
    assert len({item.TrackingUID for item in seg.SegmentSequence}) == 2
    assert {item.SegmentAlgorithmType for item in seg.SegmentSequence} == {"AUTOMATIC"}
    assert (seg.PatientID, str(seg.PatientName)) == ("p1", "Müller^Jörg")
    assert seg.StudyInstanceUID == STUDY["StudyInstanceUID"]
    assert seg.SeriesInstanceUID != pydicom.dcmread(files[0]).SeriesInstanceUID
    assert "not for diagnosis" in seg.SeriesDescription


def test_an_empty_mask_is_a_file_too(writer, tmp_path):
    series(tmp_path / "s")
    image = read_image(tmp_path / "s", 3)
    path = tmp_path / "m.dcm"
    path.write_bytes(writer.content(np.zeros((7, 6, 5), np.uint8), image, tmp_path / "s"))
    assert not read_label(path, 3, 3, image=image, names=NAMES).any()


@pytest.mark.parametrize("placed", [True, False])
def test_one_slice_and_an_x_ray(writer, tmp_path, placed):
    if placed:
        (file,) = series(tmp_path / "s", (7, 6, 1))
    else:
        tags = {name: value for name, value in STUDY.items() if name != "FrameOfReferenceUID"}
        file = write_image(tmp_path / "x.dcm", masks((6, 7)), **tags | {"Modality": "DX"})
    image = read_image(file, 2)
    mask = masks((6, 7), 3)
    path = tmp_path / "m.dcm"
    path.write_bytes(writer.content(mask, image, file))
    assert np.array_equal(read_label(path, 2, 3, image=image, names=NAMES)[0].numpy(), mask)


def test_a_file_of_several_frames(writer, tmp_path):
    file = Path(get_testdata_file("eCT_Supplemental.dcm"))
    header = pydicom.dcmread(file, stop_before_pixels=True)
    affine = np.diag([1.0, -1, 1, 1])
    frames = header.PerFrameFunctionalGroupsSequence
    measures = header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
    first, last = (frame.PlanePositionSequence[0].ImagePositionPatient for frame in frames)
    # Its rows run from left to right: both axes of DICOM are turned, and so is the row's.
    affine[0, 0], affine[1, 1], affine[2, 2] = measures[1], -measures[0], last[2] - first[2]
    affine[:3, 3] = (-first[0], -first[1], first[2])
    image = read_image(np.zeros((512, 512, 2), np.float32), 3)
    image.meta[FILE_AFFINE] = torch.from_numpy(affine)
    mask = masks((512, 512, 2), 4)
    path = tmp_path / "m.dcm"
    path.write_bytes(writer.content(mask, image, file))
    assert np.array_equal(read_label(path, 3, 3, image=image, names=NAMES)[0].numpy(), mask)
    seg = highdicom.seg.segread(path)
    theirs = seg.get_pixels_by_source_frame(header.SOPInstanceUID, [1, 2], combine_segments=True)
    assert np.array_equal(theirs.transpose(2, 1, 0), mask)


def test_a_series_without_names_of_patients_is_enough(writer, tmp_path):
    lacking = ("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
               "AccessionNumber", "ReferringPhysicianName", "Modality")  # fmt: skip
    series(tmp_path / "s", **dict.fromkeys(lacking))
    image = read_image(tmp_path / "s", 3)
    mask = masks((7, 6, 5), 5)
    path = tmp_path / "m.dcm"
    path.write_bytes(writer.content(mask, image, tmp_path / "s"))
    assert np.array_equal(read_label(path, 3, 3, image=image, names=NAMES)[0].numpy(), mask)


def test_what_a_series_must_have_is_named(writer, tmp_path):
    series(tmp_path / "s", FrameOfReferenceUID=None)
    image = read_image(tmp_path / "s", 3)
    with pytest.raises(InputError, match=r"no SEG is written: .*Frame Of Reference UID"):
        writer.content(masks((7, 6, 5)), image, tmp_path / "s")
    series(tmp_path / "t")
    (tmp_path / "t" / "IM0003.dcm").unlink()
    with pytest.raises(InputError, match="has images of 4 of the 5 planes of the mask"):
        writer.content(masks((7, 6, 5)), image, tmp_path / "t")


@pytest.mark.parametrize("name", ["x" * 65, "a\\b", ""])
def test_names_that_a_segment_cannot_have(name):
    with pytest.raises(InputError, match="--seg needs classes of 1 to 64 letters without a back"):
        SegmentationWriter((name,), "Hospital", nn.Linear(2, 1))


# The command


@pytest.fixture(scope="module")
def outlining(tmp_path_factory):
    folder = tmp_path_factory.mktemp("volumes")
    write_volumes(folder)
    with simulation():
        settings = GRID | {"local-steps": 30, "learning-rate": 0.02, "optimizer": "adam"}
        run_of(folder / "run", Volumes, **settings)
    return folder


def test_the_command_writes_both_masks_of_a_series(outlining, tmp_path):
    voxels = 1000 * hippocampi(1, 8, 20).rows[0]["image"]
    write_series(tmp_path / "scan", voxels, (1.1, 1.3, 2.0), seed=1, **STUDY)
    sources = (tmp_path / "scan", outlining / "2-0.nii.gz")
    printed = predict(outlining / "run", *sources, "--out", tmp_path / "o", "--seg", code=1)
    assert "1 with a problem" in printed
    first, second = lines_of(tmp_path / "o" / "predictions.csv")
    assert first["segmentation"] == str(tmp_path / "o" / "scan-mask.dcm")
    assert first["problem"] == second["segmentation"] == ""
    assert second["problem"] == f"no SEG is written, since {sources[1]} is not DICOM"
    image = read_image(sources[0], 3)
    # The file holds classes, whatever the values of masks are.
    label = read_label(first["segmentation"], 3, 3, image=image, names=Volumes.classes)
    values = np.asarray(nibabel.load(first["mask"]).dataobj)
    assert np.array_equal(np.array(Volumes.label_values)[label[0].numpy()], values)
    assert {*np.unique(values)} == {0, 5, 9}
    assert nibabel.load(second["mask"]).shape
    assert highdicom.seg.segread(first["segmentation"]).ManufacturerModelName == "Volumes"


def test_without_highdicom_the_extra_is_named(outlining, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "highdicom", None)
    arguments = (outlining / "run", outlining / "2-0.nii.gz", "--out", tmp_path / "o", "--seg")
    text = predict(*arguments, code=2)
    assert "--seg needs highdicom: pip install 'fedmed-flower[imaging]'" in " ".join(text.split())
    assert not (tmp_path / "o").exists()


def test_a_model_that_outlines_nothing_writes_none(tmp_path):
    with pytest.raises(InputError, match="--seg is for models that outline structures"):
        predict_files(Pictures(context_of()), nn.Identity(), [], tmp_path, seg=True)
