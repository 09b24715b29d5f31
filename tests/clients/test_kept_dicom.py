"""What a real hospital keeps of the series and masks of a PACS export."""

import numpy as np
import pytest
from dicom_files import STUDY, write_image, write_seg, write_series
from kept import PATIENTS, Hospital, Volumes
from pacs import item
from pydicom.uid import generate_uid

from fedmed_flower.clients import kept_images
from fedmed_flower.data.datalist import load_folder
from fedmed_flower.images import reading

SIDES = (7, 6, 5)


class Scans(Volumes):
    """Outlines two structures of a SEG in series of DICOM files."""

    def load_data(self, site):
        return load_folder(site.data_dir, 0, (0.6, 0.1, 0.3), series="modality=CT")


def write_scan(folder, number, seed=0):
    """Write one patient's series and SEG into the folder that all patients share."""
    rng = np.random.default_rng((seed, number))
    own = folder / f"scan-{number}"
    own.mkdir(exist_ok=True)
    series = generate_uid()
    tags = STUDY | {"StudyInstanceUID": generate_uid(), "PatientName": f"P{number}"}
    files = write_series(
        own, rng.integers(-200, 200, SIDES), patient=f"p{number}", series_uid=series, **tags
    )
    voxels = rng.integers(0, 3, SIDES)
    frames = [
        (structure, (0, 0, plane), (voxels[:, :, plane] == structure).T)
        for plane in range(SIDES[2])
        for structure in (1, 2)
    ]
    segments = [{"SegmentLabel": "a"}, {"SegmentLabel": "b"}]
    referenced = [item(SeriesInstanceUID=series)]
    more = {"PatientID": f"p{number}", "ReferencedSeriesSequence": referenced}
    write_seg(folder / f"mask-{number}.dcm", segments, frames, **more)
    # What is no image of its own is left out.
    dose = {"ImageType": ["DERIVED", "SECONDARY", "DOSE_INFO"]}
    write_image(folder / f"dose-{number}.dcm", np.ones((4, 4), np.uint8), f"p{number}", **dose)
    return files


@pytest.fixture
def scans(tmp_path, monkeypatch):
    hospital = Hospital(tmp_path, monkeypatch, Scans, write_scan)
    read = reading.read_dicom

    def noted(source, *args):
        hospital.read.append(str(source))
        return read(source, *args)

    # `Hospital` counts paths alone, and a series is none.
    monkeypatch.setattr(reading, "read_dicom", noted)
    return hospital


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_answers_about_series_are_the_same_without_with_a_new_and_with_a_filled_cache(scans, kind):
    answers = [scans.asked(kind, cache, patch_size="4,4,4") for cache in ("off", None, None)]
    assert answers[0] == answers[1] == answers[2]
    assert scans.read == []


def test_a_slice_that_was_exported_anew_is_read_anew(scans):
    """Its content is the same here, which nothing but reading it tells."""
    scans.asked()
    rows = len(scans.read)
    assert 0 < rows < PATIENTS
    before = scans.asked()
    assert scans.read == []
    for number in range(PATIENTS):
        slices = sorted((scans.data / f"scan-{number}").iterdir())
        slices[2].write_bytes(slices[2].read_bytes())
    assert scans.asked() == before
    assert len(scans.read) == rows


def test_a_mask_that_was_drawn_anew_is_read_anew(scans):
    before = scans.asked()
    for number in range(PATIENTS):
        write_scan(scans.data, number, seed=1)
    assert scans.asked() != before
    assert len(scans.read) > 0


def test_files_of_this_moment_are_not_kept(scans, monkeypatch):
    monkeypatch.setattr(kept_images, "FRESH_NS", 10**18)
    scans.asked()
    assert scans.entries() == []
