import json
import math
from decimal import Decimal
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from dicom_files import write_image, write_seg, write_series
from PIL import Image

from fedmed_flower.data.checks import Finding, check_row
from fedmed_flower.data.folders import check_folder
from fedmed_flower.errors import InputError

AFFINE = np.diag([-0.5, -0.75, 2, 1])


def voxels(shape=(4, 3, 2)):
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def mask(shape=(4, 3, 2), *marks):
    array = np.zeros(shape, np.uint8)
    for value in marks or (1,):
        array.ravel()[value] = value
    return array


def save(path, array, affine=AFFINE):
    volume = nibabel.Nifti1Image(array, None)
    volume.set_sform(affine, code=1)
    nibabel.save(volume, path)
    return str(path)


def row(image, label, patient="p1"):
    return {"image": image, "label": label, "patient": patient}


@pytest.fixture
def scan(tmp_path):
    return save(tmp_path / "x.nii.gz", voxels())


def problem(*arguments):
    return check_row(*arguments).problem


def test_a_volume_with_its_mask(tmp_path, scan):
    label = save(tmp_path / "m.nii.gz", mask((4, 3, 2), 1, 3))
    expected = Finding(
        "p1", scan, (1, 4, 3, 2), (0.5, 0.75, 2.0), "LPS", 0.0, 23.0, (0, 1, 3), None, "val"
    )
    assert check_row(row(scan, label) | {"split": "val"}, 3, 4) == expected
    assert check_row(row(scan, label) | {"split": "val"}, None) == expected
    # Without a background: all voxels are of one class.
    whole = save(tmp_path / "w.nii.gz", np.full((4, 3, 2), 2, np.uint8))
    assert check_row(row(scan, whole), 3, 3).label == (2,)


def test_arrays_and_class_numbers():
    image = np.array([[-1.5, 2], [0, 1]])
    found = check_row(row(image, np.int64(1), 7), 2, 2)
    assert found == Finding("7", "array", (1, 2, 2), (1.0, 1.0), "", -1.5, 2.0, 1)
    assert type(found.label) is int
    found = check_row(row(image, np.array([[0, 255], [0, 0]])), 2, 2, (0, 255))
    assert found.label == (0, 1)
    assert check_row(row(image, np.array([[0, 7], [0, 0]])), 2).label == (0, 7)


def test_several_files_and_dicom(tmp_path, scan):
    assert check_row(row([scan, scan], 0), 3).shape == (2, 4, 3, 2)
    assert check_row(row([scan, scan], 0), 3).image == f"{scan}; {scan}"
    write_series(tmp_path / "ct", voxels(), (0.5, 0.75, 2))
    label = save(tmp_path / "m.nii.gz", mask())
    found = check_row(row(str(tmp_path / "ct"), label), 3, 2)
    assert (found.problem, found.orientation, found.label) == (None, "LPS", (0, 1))


@pytest.mark.parametrize("label", [2, -1, True, np.True_, 1.0, np.float32(1), None, "no file"])
def test_labels_out_of_range(label):
    text = problem(row(np.ones((2, 2)), label), 2, 2)
    if label == "no file":
        assert text == "its mask no file is not there"
        return
    shown = label.item() if isinstance(label, np.generic) else label
    assert text == (
        f"label {shown!r} is out of range: labels must be integers from 0 to 1 (num_classes - 1)"
    )


def test_labels_where_the_number_of_classes_is_not_known():
    assert check_row(row(np.ones((2, 2)), 12), 2).label == 12
    for label in (-1, 1.5):
        text = f"label {label} is out of range: labels must be integers from 0 on"
        assert problem(row(np.ones((2, 2)), label), 2) == text


@pytest.mark.parametrize("name", ["image", "label", "patient"])
def test_a_row_that_lacks_something(name):
    lacking = row(np.ones((2, 2)), 0)
    del lacking[name]
    assert problem(lacking, 2, 2) == f"the row has no {name}"


def test_a_bad_image_is_named(tmp_path, scan):
    assert problem(row("x.nii", 0), 3) == "x.nii is not there"
    holes = voxels().astype(np.float32)
    holes[0, 0, 0] = np.nan
    path = save(tmp_path / "nan.nii.gz", holes)
    assert problem(row(path, 0), 3) == f"{path}: it holds NaN or infinite values"
    assert problem(row(scan, 0), 2) == (
        f"{scan}: its shape is (1, 4, 3, 2); spatial_dims = 2 asks for 2 dimensions, or one more "
        "with the channel first"
    )
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes((tmp_path / "x.nii.gz").read_bytes()[:-10])
    assert problem(row(str(cut), 0), 3).startswith(f"{cut} cannot be read: ")
    assert problem(row({"a": 1}, 0), 3) == "it holds object, not numbers"


def test_what_a_reader_never_thought_of_is_a_problem_too():
    class Strange:
        def __array__(self, *_, **__):
            raise MemoryError("too large\nby far")

    assert problem(row(Strange(), 0), 2) == "array: MemoryError: too large by far"


class Hostile:
    """What hospital code may put into a row: each of its methods fails."""

    def fail(self, *_, **__):
        raise UnwritableError

    __str__ = __repr__ = __len__ = __iter__ = __getitem__ = __array__ = __bool__ = __eq__ = fail
    __float__ = __int__ = __index__ = __hash__ = __fspath__ = __getattr__ = fail
    __class__ = property(fail)


class UnwritableError(Exception):
    def __str__(self):
        raise ValueError("no text")


ODD = [
    Hostile(), Hostile, None, True, 10**5000, -(10**5000), math.nan, 1e400, 1j, "", "\0", "\ud800",
    "x" * 10**5, b"x", [], [[]], [[1], [1, 2]], {}, {"a": Hostile()}, (), ("", "x.nii"), ["\0"] * 2,
    [Hostile()], [None], {1}, iter([1]), object(), np.array(None), np.array([]), np.array("x"),
    np.array([object()]), np.ma.masked, np.datetime64("NaT"), np.zeros((2,) * 12),
    np.zeros((2, 2), "V8"), np.broadcast_to(1, (2**25, 2**25)), torch.zeros(2, 2).to_sparse(),
    torch.zeros(2, 2, device="meta"), torch.full((2, 2), torch.nan), Path("/dev/null"),
    Path("/proc"), Exception, lambda: 1, ..., NotImplemented,
]  # fmt: skip


@pytest.mark.parametrize("spatial_dims", [2, 3, None])
@pytest.mark.parametrize("name", ["image", "label", "patient", "split", "row"])
def test_whatever_a_row_holds_it_is_a_finding(name, spatial_dims):
    good = row(np.ones((2, 2)), 1) | {"split": "train"}
    for odd in ODD:
        found = check_row(odd if name == "row" else good | {name: odd}, spatial_dims, 2)
        assert isinstance(found, Finding)
        assert (type(found.patient), type(found.split)) == (str, str)
        assert found.image
        if name == "row":
            assert found.problem
        if found.problem is not None:
            assert found.problem.isprintable()
            assert len(found.problem) <= 4000


def test_what_a_finding_quotes_is_short_and_clean():
    text = problem(row(np.ones((2, 2)), ["x" * 10**6, "\n"]), 2, 2)
    assert len(text) < 5000
    odd = "a\nround 2: all is well\x1b[2J"
    assert problem(row(odd, 1), 2, 2) == "a round 2: all is well\\x1b[2J is not there"
    assert problem(row(np.ones((2, 2)), odd), 2, 2) == (
        "its mask a round 2: all is well\\x1b[2J is not there"
    )
    label = Decimal("1" * 500)
    assert problem(row(np.ones((2, 2)), label), 2, 2) == (
        f"label Decimal('{'1' * 29}...{'1' * 36}') is out of range: labels must be integers from 0 "
        "to 1 (num_classes - 1)"
    )
    assert problem(row(Hostile(), 1), 2, 2) == "array: UnwritableError: UnwritableError"


def test_a_bad_mask_is_named(tmp_path, scan):
    def found(array, affine=AFFINE, classes=2):
        path = save(tmp_path / "m.nii.gz", array, affine)
        text = problem(row(scan, path), 3, classes)
        assert text.count(path) == 1
        return text.replace(path, "M")

    assert found(mask((4, 3, 2), 1, 3)) == (
        "its mask M: it holds the values 3, which are not classes: a mask holds 0, 1"
    )
    assert found(mask((4, 3, 3))) == ("its mask M: its shape is (4, 3, 3), the image's (4, 3, 2)")
    assert found(mask(), np.diag([0.5, -0.75, 2, 1])) == (
        "its mask M: it lies up to 3 mm away from the image: spacing 0.5x0.75x2, orientation RPS, "
        "origin 0x0x0; the image: spacing 0.5x0.75x2, orientation LPS, origin 0x0x0"
    )
    empty = "its mask M is empty: it holds only the background"
    assert found(mask((4, 3, 2), 0)) == empty
    assert found(mask((4, 3, 2), 0), classes=None) == empty
    assert problem(row(scan, "m.nii"), 3, 2) == "its mask m.nii is not there"
    assert problem(row(voxels(), mask((4, 3, 2), 0)), 3, 2) == (
        "its mask array is empty: it holds only the background"
    )
    # What is known of the image is told although its mask is bad.
    assert check_row(row(scan, "m.nii"), 3, 2).spacing == (0.5, 0.75, 2.0)


def test_images_of_equal_values_have_one_digest(tmp_path, scan):
    def digest(image, dims=None):
        return check_row(row(image, 0), dims).digest

    assert digest(scan) == digest(voxels()) == digest(voxels().astype(np.float64))
    assert digest(scan) != digest(voxels((3, 4, 2)))
    assert digest(scan) != digest(voxels() + 1)
    assert digest("x.nii") == ""


def test_a_mask_of_high_numbers_is_read_as_one_of_low_numbers():
    for high in (9, 70_000):
        label = np.array([[0, 3], [high, 3]])
        assert check_row(row(np.ones((2, 2)), label), 2).label == (0, 3, high)


def test_a_4d_file_is_read_as_its_row_or_the_client_says(tmp_path):
    path = save(tmp_path / "x.nii.gz", voxels((4, 3, 2, 5)))
    assert "holds 5 volumes (4D)" in problem(row(path, 0), 3)
    assert check_row(row(path, 0) | {"frames": 2}, 3).shape == (1, 4, 3, 2)
    assert check_row(row(path, 0), 3, channels=5).shape == (5, 4, 3, 2)
    assert "and 4 channels are expected" in check_row(row(path, 0), 3, channels=4).problem
    assert "got 'time'" in problem(row(path, 0) | {"frames": "time"}, 3)


# Folders


def dataset(folder, entries, **more):
    (folder / "dataset.json").write_text(json.dumps({"training": entries, **more}))
    return folder


def test_a_folder_is_read_completely(tmp_path, scan):
    save(tmp_path / "m.nii.gz", mask())
    save(tmp_path / "high.nii.gz", mask((4, 3, 2), 2))
    save(tmp_path / "y.nii.gz", voxels() + 1)
    dataset(
        tmp_path,
        [
            {"image": "x.nii.gz", "label": "m.nii.gz", "split": "train"},
            {"image": "y.nii.gz", "label": "high.nii.gz", "split": "test"},
            {"image": "z.nii.gz", "label": "m.nii.gz", "split": "test"},
        ],
        labels={"background": 0, "liver": 1},
    )
    good, bad, lost = check_folder(tmp_path)
    assert (good.image, good.label, good.split, good.problem) == (scan, (0, 1), "train", None)
    assert bad.problem == (
        f"its mask {tmp_path}/high.nii.gz: it holds the values 2, which are not classes: a mask "
        "holds 0, 1"
    )
    assert lost == Finding("", "", problem="dataset.json, training entry 3: z.nii.gz is not there")
    assert check_folder(tmp_path, num_classes=3)[1].problem is None
    assert "spatial_dims = 2" in check_folder(tmp_path, 2)[0].problem


def test_a_patient_in_two_splits_is_found(tmp_path, scan):
    save(tmp_path / "y.nii.gz", voxels())
    entries = [
        {"image": "x.nii.gz", "label": 0, "patient": "Ana", "split": "train"},
        {"image": "y.nii.gz", "label": 0, "patient": "Ana", "split": "test"},
    ]
    assert [one.problem for one in check_folder(dataset(tmp_path, entries))] == [
        None,
        None,
        "patient Ana is in two splits, train and test: all rows of a patient belong in one",
    ]


def test_images_that_no_network_can_take_together(tmp_path):
    for name, shape in (("a.png", (4, 5)), ("b.png", (4, 5)), ("c.png", (4, 5, 3))):
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / name)
    save(tmp_path / "d.nii", voxels())
    write_image(tmp_path / "e.dcm", np.zeros((4, 5), np.uint8))
    names = ("a.png", "b.png", "c.png", "d.nii", "e.dcm")
    entries = [{"image": name, "label": 0} for name in names]
    findings = check_folder(dataset(tmp_path, entries))
    assert [len(one.shape) for one in findings] == [3, 3, 3, 4, 3, 0]
    assert findings[-1].problem == (
        "one network cannot take all images: there are 3 with 1 channel in 2D, 1 with 3 channels "
        "in 2D, 1 with 1 channel in 3D"
    )


# Masks in DICOM files


@pytest.fixture
def study(tmp_path):
    """A folder with a series, a SEG of its structures a and c, and a dataset.json."""
    write_series(tmp_path / "scan", voxels((4, 3, 2)))
    frames = [(n, (0, 0, z), np.eye(3, 4, k=n - 1)) for z in (0, 1) for n in (1, 2)]
    labels = [{"SegmentLabel": "A"}, {"SegmentLabel": "c"}]
    write_seg(tmp_path / "m.dcm", labels, frames, frame_of_reference="")
    line = {"image": "scan", "label": "m.dcm", "patient": "p1"}
    content = {"labels": {"0": "background", "1": "a", "2": "b"}, "training": [line]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return tmp_path


def test_structures_are_found_by_the_names_of_the_classes(study):
    scan = row(str(study / "scan"), str(study / "m.dcm"))
    assert check_row(scan, 3, 3, names=("b", "c")).label == (0, 2)
    found = check_row(scan, 3, 3, names=("x", "y")).problem
    assert found == (
        f"its mask {study / 'm.dcm'}: it has none of the structures x, y, but A, c: name the "
        "classes so, or rename its structures"
    )
    assert check_row(scan, 3, 3).problem == (
        f"its mask {study / 'm.dcm'}: a DICOM SEG or RTSTRUCT holds structures by name: name the "
        'classes, by the client\'s classes or by "labels" in dataset.json'
    )


def test_a_folder_names_the_structures_in_its_dataset_json(study):
    (found,) = check_folder(study)
    assert (found.problem, found.label) == (None, (0, 1))
    # Several files of one image.
    frames = [(1, (0, 0, 1), np.eye(3, 4, k=2))]
    write_seg(study / "n.dcm", [{"SegmentLabel": "B"}], frames, frame_of_reference="")
    text = (study / "dataset.json").read_text()
    for label in ('["m.dcm", "n.dcm"]', '"m.dcm; n.dcm"'):
        (study / "dataset.json").write_text(text.replace('"m.dcm"', label))
        (found,) = check_folder(study)
        assert (found.problem, found.label) == (None, (0, 1, 2))
    (study / "dataset.json").write_text(text.replace('"m.dcm"', '["m.dcm", "../n.dcm"]'))
    with pytest.raises(InputError, match=r"\.\./n\.dcm leaves the folder"):
        check_folder(study)


def test_an_image_that_two_patients_have_is_found(tmp_path, scan):
    names = ["a.nii.gz", "b.nii", "c.nii", "d.nii", "e.nii"]
    for name in names[:4]:
        save(tmp_path / name, voxels() * (3 if name == "d.nii" else 2))
    save(tmp_path / "e.nii", np.full((4, 3, 2), 7, np.int16))
    save(tmp_path / "f.nii", np.full((4, 3, 2), 7, np.int16))
    patients = {"a.nii.gz": "Ana", "b.nii": "Bo", "c.nii": "Cy", "d.nii": "Di"}
    entries = [{"image": name, "label": 0, "patient": who} for name, who in patients.items()]
    # One patient may have an image twice, and nothing looks like nothing.
    entries += [{"image": "x.nii.gz", "label": 0, "patient": "Di"}]
    save(tmp_path / "y.nii", voxels())
    entries += [{"image": "y.nii", "label": 0, "patient": "Di"}]
    entries += [{"image": f"{k}.nii", "label": 0, "patient": k} for k in "ef"]
    problems = [one.problem for one in check_folder(dataset(tmp_path, entries)) if one.problem]
    assert problems == [
        f"{tmp_path}/e.nii has the value 7 everywhere: it shows nothing",
        f"{tmp_path}/f.nii has the value 7 everywhere: it shows nothing",
        f"patients Ana and Bo, and 1 more have the same image, value for value: "
        f"{tmp_path}/a.nii.gz and {tmp_path}/b.nii",
    ]


def test_masks_of_other_values_and_empty_masks_can_be_allowed(tmp_path, scan):
    save(tmp_path / "m.nii.gz", mask((4, 3, 2), 1) * 255)
    save(tmp_path / "empty.nii.gz", mask((4, 3, 2), 0))
    save(tmp_path / "y.nii.gz", voxels() + 1)
    entries = [
        {"image": "x.nii.gz", "label": "m.nii.gz", "patient": "Ana"},
        {"image": "y.nii.gz", "label": "empty.nii.gz", "patient": "Bo"},
    ]
    folder = dataset(tmp_path, entries, labels={"background": 0, "liver": 1})
    found = check_folder(folder, label_values=(0, 255), empty_masks=True)
    assert [(one.label, one.problem) for one in found] == [((0, 1), None), ((0,), None)]
    first, second = check_folder(folder)
    assert "it holds the values 255, which are not classes" in first.problem
    assert second.problem.endswith("empty.nii.gz is empty: it holds only the background")
