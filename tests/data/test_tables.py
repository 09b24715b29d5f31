import json

import nibabel
import numpy as np
import pytest

from fedmed_flower.data.datalist import read_folder
from fedmed_flower.data.folders import check_folder

TIMES = np.arange(2 * 3 * 4 * 4, dtype=np.int16).reshape(2, 3, 4, 4)


def save(folder, *names, array=TIMES):
    for name in names:
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / name)


def rows_of(folder, text=None, **content):
    """Return rows and problems of a table, or of a dataset.json."""
    if text is not None:
        (folder / "datalist.csv").write_text(text)
    else:
        (folder / "dataset.json").write_text(json.dumps(content))
    listing = read_folder(folder)
    return listing.rows, listing.problems


def test_a_column_says_what_the_volumes_of_a_4d_file_are(tmp_path):
    save(tmp_path, "a.nii", "b.nii", "c.nii", "d.nii")
    lines = ["a.nii,0,p1,channels", "b.nii,0,p2,2", "c.nii,0,p3,3.0", "d.nii,0,p4,4 Channels"]
    text = "\n".join(["image,label,patient,frames", *lines])
    rows, problems = rows_of(tmp_path, text)
    assert problems == ()
    assert [row["frames"] for row in rows] == ["channels", 2, 3, "4 channels"]
    shapes = [finding.shape for finding in check_folder(tmp_path) if finding.shape]
    assert shapes == [(4, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), (4, 2, 3, 4)]


def test_one_file_may_give_several_images_by_other_volumes(tmp_path):
    save(tmp_path, "a.nii")
    lines = ["a.nii,0,p1,0", "a.nii,1,p1,3", "a.nii,1,p1,3"]
    rows, problems = rows_of(tmp_path, "\n".join(["image,label,patient,frames", *lines]))
    assert [(row["frames"], row["label"]) for row in rows] == [(0, 0), (3, 1)]
    assert problems == (
        "datalist.csv, line 4: its image was named before, in datalist.csv, line 3",
    )


def test_a_cell_without_frames_leaves_a_4d_file_unread(tmp_path):
    save(tmp_path, "a.nii", "b.nii")
    rows, problems = rows_of(
        tmp_path, "image,label,patient,frames\na.nii,0,p1,\nb.nii,0,p2,all of them"
    )
    assert ["frames" in row for row in rows] == [False]
    assert problems == (
        'datalist.csv, line 3: frames must be "channels" or a whole number from 0 on, got '
        "'all of them': it says which volumes of a 4D file are taken",
    )
    (finding, _) = check_folder(tmp_path)
    assert finding.problem.startswith(f"{tmp_path / 'a.nii'} holds 4 volumes (4D), which may be")


MODALITIES = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}


@pytest.mark.parametrize(
    ("about", "frames"),
    [
        ({"modality": MODALITIES, "tensorImageSize": "4D"}, "4 channels"),
        ({"modality": MODALITIES, "tensorImageSize": "3D"}, None),
        ({"modality": {"0": "MRI"}, "tensorImageSize": "4D"}, None),
        ({"modality": MODALITIES}, None),
        ({"modality": "MRI", "tensorImageSize": "4D"}, None),
        ({"tensorImageSize": ["4D"]}, None),
    ],
)
def test_a_dataset_says_it_of_all_its_files(tmp_path, about, frames):
    save(tmp_path, "a.nii", "b.nii")
    save(tmp_path, "c.nii", "d.nii", array=TIMES[..., 0])
    training = [
        {"image": "a.nii", "label": 0},
        {"image": "b.nii", "label": 0, "frames": 1},
        {"image": ["c.nii", "d.nii"], "label": 0},
    ]
    rows, problems = rows_of(tmp_path, training=training, **about)
    assert problems == ()
    assert [row.get("frames") for row in rows] == [frames, 1, None]
    shapes = [finding.shape for finding in check_folder(tmp_path) if finding.image]
    assert shapes == [(4, 2, 3, 4) if frames else (), (1, 2, 3, 4), (2, 2, 3, 4)]


def test_a_file_of_another_number_of_volumes_than_the_dataset_names_is_refused(tmp_path):
    save(tmp_path, "a.nii", array=TIMES[..., :3])
    training = [{"image": "a.nii", "label": 0}]
    rows_of(tmp_path, training=training, modality=MODALITIES, tensorImageSize="4D")
    (finding,) = check_folder(tmp_path)
    text = f"{tmp_path / 'a.nii'} holds 3 volumes (4D), and 4 channels are expected"
    assert finding.problem == text
