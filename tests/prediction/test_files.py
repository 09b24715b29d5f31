"""Predictions of files equal the model called by hand, and the run's own evaluation."""

import json
import tomllib

import nibabel
import numpy as np
import pytest
import torch
from dicom_files import write_image, write_series
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet
from PIL import Image
from predicting import (
    GRID,
    Pictures,
    Volumes,
    lines_of,
    picture,
    predict,
    run_of,
    volumes,
    write_volumes,
)
from safetensors.torch import load_file
from scipy.special import expit, softmax
from sklearn.metrics import roc_auc_score
from tables import TinySurvival, TinyTable, patients, predicting, run_tables
from tiny import context_of
from torch import nn

from fedmed_flower import SegmentationClient, SiteData
from fedmed_flower.data.phantoms import hippocampi
from fedmed_flower.data.preparation import Preparation
from fedmed_flower.data.site import Site, simulation
from fedmed_flower.files import write_rows


def write_table(path, rows, columns):
    with path.open("w", newline="") as file:
        write_rows(file, [columns, *([row[name] for name in columns] for row in rows)])
    return path


def site(index, num_sites=3):
    return Site(f"hospital-{index + 1}", index, num_sites, simulated=True)


def client_rows(client, index, num_sites=3):
    made = client.__new__(client)
    return client.load_data(made, site(index, num_sites))


FEATURES = ("patient", "age", "pressure", "sex", "ward")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables") / "run"
    with simulation():
        _, summary = run_tables(folder)
    return folder, summary


def test_a_table_is_predicted_as_by_the_model_called_by_hand(tables, tmp_path):
    folder, _ = tables
    rows = patients(30, 99, "new")
    path = write_table(tmp_path / "new.csv", rows, FEATURES)
    predict(folder, path, "--out", tmp_path / "out.csv")
    lines = lines_of(tmp_path / "out.csv")
    agreed = tomllib.loads((folder / "config.toml").read_text())["run"]["agreed"]
    features = torch.from_numpy(Preparation.from_text(agreed).transform(rows))
    state = load_file(folder / "model.safetensors")
    outputs = nn.functional.linear(features, state["weight"], state["bias"]).numpy()
    assert len(np.unique(outputs)) == len(rows)
    shares = expit(outputs.astype(np.float64))[:, 0]
    assert [float(line["probability 1"]) for line in lines] == shares.tolist()
    assert [line["predicted"] for line in lines] == [str(int(p > 0.5)) for p in shares]
    assert [line["patient"] for line in lines] == [row["patient"] for row in rows]
    assert [int(line["line"]) for line in lines] == list(range(2, 32))
    assert {line["problem"] for line in lines} == {""}


def test_predicted_test_rows_have_the_figures_of_the_run(tables, tmp_path):
    folder, summary = tables
    for index in range(3):
        rows = client_rows(TinyTable, index).test
        path = write_table(tmp_path / f"{index}.csv", rows, FEATURES)
        predict(folder, path, "--out", tmp_path / f"out-{index}.csv")
        lines = lines_of(tmp_path / f"out-{index}.csv")
        truth = np.array([row["ill"] for row in rows])
        shares = np.array([float(line["probability 1"]) for line in lines])
        figures = summary["test"]["sites"][f"hospital-{index + 1}"]
        assert roc_auc_score(truth, shares) == pytest.approx(figures["auc"], abs=1e-12)
        assert ((shares > 0.5) == truth).mean() == pytest.approx(figures["accuracy"], abs=1e-12)
        assert np.square(shares - truth).mean() == pytest.approx(figures["brier"], rel=1e-12)


@pytest.mark.parametrize("kind", ["multi-class", "count", "continuous"])
def test_each_task_has_columns_of_its_own(kind, tmp_path):
    client = predicting(kind)
    _, summary = run_tables(tmp_path / "run", client, 2, **{"tabular-network": "mlp"})
    rows = client_rows(client, 0, 2).test
    path = write_table(tmp_path / "new.csv", rows, ("patient", "age", "sex"))
    predict(tmp_path / "run", path, "--out", tmp_path)
    lines = lines_of(tmp_path / "predictions.csv")
    figures = summary["test"]["sites"]["hospital-1"]
    truth = np.array([row["outcome"] for row in rows], float)
    if kind == "multi-class":
        names = ("low", "middle", "high")
        shares = np.array([[float(line[f"probability {n}"]) for n in names] for line in lines])
        guess = np.array([names.index(line["predicted"]) for line in lines])
        assert (guess == shares.argmax(axis=1)).all()
        assert (guess == truth).mean() == pytest.approx(figures["accuracy"], abs=1e-12)
        assert shares.sum(axis=1) == pytest.approx(1)
    else:
        guess = np.array([float(line["predicted"]) for line in lines])
        # The run holds targets as float32.
        assert np.abs(guess - truth).mean() == pytest.approx(figures["mae"], rel=1e-6)


@pytest.mark.parametrize("loss", ["cox", "discrete"])
def test_survival_is_a_risk_and_probabilities_at_the_ends_of_the_intervals(loss, tmp_path):
    settings = {"survival-loss": loss, "survival-horizon": 1000.0, "survival-intervals": 4}
    _, summary = run_tables(tmp_path / "run", TinySurvival, 2, **settings)
    rows = client_rows(TinySurvival, 1, 2).test
    path = write_table(tmp_path / "new.csv", rows, ("patient", "age"))
    predict(tmp_path / "run", path, "--out", tmp_path / "out.csv")
    lines = lines_of(tmp_path / "out.csv")
    risks = np.array([float(line["risk"]) for line in lines])
    times = np.array([row["days"] for row in rows])
    events = np.array([row["died"] for row in rows])
    better = (times[:, None] < times) & (events[:, None] == 1)
    right = (risks[:, None] > risks)[better].mean() + (risks[:, None] == risks)[better].mean() / 2
    figures = summary["test"]["sites"]["hospital-2"]
    assert right == pytest.approx(figures["c-index"], abs=1e-12)
    names = [name for name in lines[0] if name.startswith("survival")]
    ends = {"cox": [], "discrete": ["survival 250", "survival 500", "survival 750"]}[loss]
    assert names == [*ends, *(["survival 1000"] if ends else [])]
    if ends:
        curves = np.array([[float(line[name]) for name in names] for line in lines])
        state = load_file(tmp_path / "run" / "model.safetensors")
        config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
        features = Preparation.from_text(config["run"]["agreed"]).transform(rows)
        score = nn.functional.linear(
            torch.from_numpy(features), state["score.weight"], state["score.bias"]
        )
        logits = (score + state["baseline"]).double().numpy()
        assert curves == pytest.approx(np.cumprod(expit(-logits), axis=1), rel=1e-12)


def test_a_row_that_is_no_row_and_a_column_that_is_missing_are_named(tables, tmp_path):
    folder, _ = tables
    path = write_table(tmp_path / "new.csv", patients(3, 5), ("age", "sex"))
    with path.open("a") as file:
        file.write("50,f,one too many\n")
    (tmp_path / "none.csv").write_text("height\n1\n")
    sources = (path, tmp_path / "none.csv", tmp_path / "absent.csv")
    printed = predict(folder, *sources, "--out", tmp_path / "out.csv", code=1)
    assert "6 with a problem: see that column" in printed
    lines = lines_of(tmp_path / "out.csv")
    assert [line["line"] for line in lines] == ["2", "3", "4", "", "", ""]
    missing = "no column 'pressure', 'ward': counted as missing"
    assert [line["problem"] for line in lines[:3]] == [missing] * 3
    assert all(line["probability 1"] for line in lines[:3])
    assert "in 1 row, rejected; the first is line 5 with 3" in lines[3]["problem"]
    assert "has none of the features 'age'" in lines[4]["problem"]
    absent = f"{tmp_path / 'absent.csv'} cannot be read: No such file or directory"
    assert lines[5]["problem"] == absent


def test_a_table_of_results_is_not_overwritten(tables, tmp_path):
    folder, _ = tables
    path = write_table(tmp_path / "new.csv", patients(3, 5), FEATURES)
    assert "exists already: give another --out" in predict(folder, path, "--out", path, code=2)
    text = predict(folder, path, path, path, "--out", tmp_path, "--channels", "2", code=2)
    assert "--channels 2 needs a multiple of 2 files, got 3" in text


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    with simulation():
        return run_of(tmp_path_factory.mktemp("pictures") / "run", Pictures)


def test_pictures_are_predicted_as_by_the_model_called_by_hand(pictures, tmp_path):
    rows = [picture(number, 9) for number in range(8)]
    for number, row in enumerate(rows):
        Image.fromarray(row["image"]).save(tmp_path / f"{number}.png")
    files = [tmp_path / f"{number}.png" for number in range(8)]
    predict(pictures, *files, "--out", tmp_path / "out.csv")
    lines = lines_of(tmp_path / "out.csv")
    model = Pictures.build_model(None)
    model.load_state_dict(load_file(pictures / "model.safetensors"))
    model.eval()
    for line, row in zip(lines, rows, strict=True):
        image = row["image"].astype(np.float32)
        scaled = torch.from_numpy(image)
        scaled = (scaled - scaled.mean()) / scaled.std(unbiased=False)
        with torch.no_grad():
            outputs = model(scaled[None, None]).double().numpy()
        shares = softmax(outputs, axis=1)[0]
        got = [float(line[f"probability {number}"]) for number in range(3)]
        assert got == pytest.approx(shares, rel=1e-6)
        assert int(line["predicted"]) == shares.argmax()


def test_pictures_have_the_digits_and_the_accuracy_of_the_run(pictures, tmp_path):
    client = Pictures(context_of(0))
    model = client.build_model()
    model.load_state_dict(load_file(pictures / "model.safetensors"))
    summary = json.loads((pictures / "summary.json").read_text())
    for index in range(2):
        rows = client.load_data(site(index, 2)).test
        files = []
        for number, row in enumerate(rows):
            files.append(tmp_path / f"{index}-{number}.png")
            Image.fromarray(row["image"]).save(files[-1])
        predict(pictures, *files, "--out", tmp_path / f"{index}.csv")
        lines = lines_of(tmp_path / f"{index}.csv")
        guesses = [int(line["predicted"]) for line in lines]
        right = [guess == row["label"] for guess, row in zip(guesses, rows, strict=True)]
        figures = summary["test"]["sites"][f"hospital-{index + 1}"]
        assert np.mean(right) == pytest.approx(figures["accuracy"], abs=1e-12)
        for file, line in zip(files, lines, strict=True):
            row = {"image": str(file), "patient": "x"}
            outputs = client.predict(model, client.prepare([row], train=False))
            shares = softmax(outputs.astype(np.float64), axis=1)[0].tolist()
            assert [float(line[f"probability {number}"]) for number in range(3)] == shares


def test_a_picture_that_cannot_be_used_is_named_and_the_others_are_predicted(pictures, tmp_path):
    Image.fromarray(picture(1, 9)["image"]).save(tmp_path / "good.png")
    Image.fromarray(picture(1, 9, 20)["image"]).save(tmp_path / "large.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    files = [tmp_path / name for name in ("bad.png", "large.png", "absent.png", "good.png")]
    predict(pictures, *files, "--out", tmp_path / "out.csv", code=1)
    bad, large, absent, good = lines_of(tmp_path / "out.csv")
    assert bad["problem"].startswith(f"{files[0]} cannot be read: cannot identify image file")
    assert large["problem"].startswith(
        "the network was saved for batches of the shape (any, 1, 12, 12), got (1, 1, 20, 20)"
    )
    assert absent["problem"] == f"{files[2]} is not there"
    assert (bad["predicted"], good["problem"]) == ("", "")
    assert good["predicted"] in "012"


@pytest.fixture(scope="module")
def outlined(tmp_path_factory):
    """A run on volumes of NIfTI files, of which each hospital has five."""
    folder = tmp_path_factory.mktemp("volumes")
    write_volumes(folder)
    with simulation():
        settings = GRID | {"local-steps": 30, "learning-rate": 0.02, "optimizer": "adam"}
        run_of(folder / "run", Volumes, **settings)
    return folder


def test_volumes_are_outlined_on_their_own_grid_with_the_figures_of_the_run(outlined, tmp_path):
    folder = outlined
    summary = json.loads((folder / "run" / "summary.json").read_text())
    rows = [row for seed in range(2) for row in volumes(folder, seed)[3:]]
    predict(folder / "run", *(row["image"] for row in rows), "--out", tmp_path / "out")
    lines = lines_of(tmp_path / "out" / "predictions.csv")
    assert [line["file"] for line in lines] == [row["image"] for row in rows]
    dice = []
    for line, row in zip(lines, rows, strict=True):
        mask = nibabel.load(line["mask"])
        image = nibabel.load(row["image"])
        assert mask.get_data_dtype() == np.uint8
        assert mask.shape == image.shape
        assert np.array_equal(mask.affine, image.affine)
        found = np.asarray(mask.dataobj)
        truth = np.asarray(nibabel.load(row["label"]).dataobj)
        assert set(np.unique(found)) == {0, 5, 9}
        both = [
            2 * ((found == value) & (truth == value)).sum()
            / ((found == value).sum() + (truth == value).sum())
            for value in (5, 9)
        ]  # fmt: skip
        dice.append(np.mean(both))
    for index in range(2):
        figures = summary["test"]["sites"][f"hospital-{index + 1}"]
        assert np.mean(dice[2 * index : 2 * index + 2]) == pytest.approx(figures["dice"], rel=1e-6)


def test_a_new_volume_is_outlined_as_by_the_model_called_by_hand(outlined, tmp_path):
    folder = outlined
    predict(folder / "run", folder / "2-0.nii.gz", "--out", tmp_path)
    (line,) = lines_of(tmp_path / "predictions.csv")
    found = np.asarray(nibabel.load(line["mask"]).dataobj)
    model = UNet(3, 1, 3, (4, 8), (2,), norm="instance")
    model.load_state_dict(load_file(folder / "run" / "model.safetensors"))
    model.eval()
    client = Volumes(context_of(0, **GRID))
    row = {"image": folder / "2-0.nii.gz", "patient": "new"}
    prepared = client.prepare([row], train=False)
    image = prepared[0]["image"]
    with torch.no_grad():
        outputs = sliding_window_inference(
            image.as_tensor()[None], (16, 16, 16), 4, model, overlap=0.25, mode="gaussian"
        )
    assert max(image.shape[1:]) > 16
    shares = image.clone()
    shares.set_array(outputs[0].softmax(dim=0))
    for step in reversed(prepared.transform.transforms):
        if type(step).__name__ in ("Spacingd", "Orientationd"):
            inner = getattr(step, "spacing_transform", None) or step.ornt_transform
            shares = inner.inverse(shares)
    numbers = shares.as_tensor().argmax(dim=0).numpy()
    assert np.array_equal(found, np.array([0, 5, 9])[numbers])


class Slices(SegmentationClient):
    """2D masks of a network that looks at one pixel."""

    classes = ("bright",)
    label_values = (0, 255)
    modality = "ct"
    ct_window = (0.0, 200.0)

    def build_model(self):
        return nn.Conv2d(1, 2, 1)

    def load_data(self, site):
        rows = []
        for number in range(6):
            image = np.random.default_rng(number).integers(0, 200, (16, 32)).astype(np.float32)
            label = np.where(image > 100, 255, 0).astype(np.uint8)
            rows.append({"image": image, "label": label, "patient": f"{site.index}-{number}"})
        return SiteData(rows[:4], rows[4:5], rows[5:], source="made up")


@pytest.fixture(scope="module")
def sliced(tmp_path_factory):
    with simulation():
        settings = {"local-steps": 40, "learning-rate": 0.5, "optimizer": "adam"}
        return run_of(tmp_path_factory.mktemp("slices") / "run", Slices, **settings)


def test_masks_of_slices_lie_on_the_grids_of_their_files(sliced, tmp_path):
    values = np.random.default_rng(3).integers(0, 200, (20, 10)).astype(np.int16)
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "a.png")
    # The same slice, x first, as a volume of one slice along each of two axes.
    affine = np.diag([0.7, 0.9, 3.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(values.T[..., None], affine), tmp_path / "b.nii")
    nibabel.save(nibabel.Nifti1Image(values.T[:, None], affine), tmp_path / "c.nii.gz")
    (place,) = write_series(tmp_path / "d", values.T[..., None], (0.7, 0.9, 3.0))
    xray = write_image(tmp_path / "e.dcm", values.astype(np.uint16), PixelSpacing=[0.9, 0.7])
    files = [tmp_path / "a.png", tmp_path / "b.nii", tmp_path / "c.nii.gz", place, xray]
    predict(sliced, *files, "--out", tmp_path / "out")
    lines = lines_of(tmp_path / "out" / "predictions.csv")
    names = [line["mask"].rpartition("/")[2] for line in lines]
    assert names == ["a-mask.png", "b-mask.nii.gz", "c-mask.nii.gz", "IM0001-mask.nii.gz",
                     "e-mask.nii.gz"]  # fmt: skip
    picture = np.asarray(Image.open(lines[0]["mask"]))
    assert set(np.unique(picture)) == {0, 255}
    assert picture.shape == values.shape
    for line, axis in zip(lines[1:], (2, 1, 2, 2), strict=True):
        mask = nibabel.load(line["mask"])
        assert np.array_equal(np.squeeze(np.asarray(mask.dataobj), axis), picture.T)
    for line, file in zip(lines[1:3], files[1:3], strict=True):
        mask = nibabel.load(line["mask"])
        assert mask.shape == nibabel.load(file).shape
        assert np.array_equal(mask.affine, nibabel.load(file).affine)
    assert np.allclose(nibabel.load(lines[3]["mask"]).affine, np.diag([-0.7, -0.9, 1.0, 1.0]))


def test_masks_of_files_of_one_name_have_names_of_their_own(sliced, tmp_path):
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "scan.png")
        Image.fromarray(picture(1, 2)["image"]).save(files[-1])
    predict(sliced, *files, "--out", tmp_path / "out")
    lines = lines_of(tmp_path / "out" / "predictions.csv")
    names = [line["mask"].rpartition("/")[2] for line in lines]
    assert names == ["scan-mask.png", "scan-mask-2.png"]
    text = predict(sliced, *files, "--out", tmp_path / "out.csv", code=2)
    assert "--out must be a folder, since masks are written" in text


def test_a_series_of_slices_is_a_volume(outlined, tmp_path):
    folder = outlined
    voxels = 1000 * hippocampi(1, 8, 20).rows[0]["image"]
    write_series(tmp_path / "series", voxels, (1.1, 1.3, 2.0), seed=1)
    predict(folder / "run", tmp_path / "series", "--out", tmp_path / "out")
    (line,) = lines_of(tmp_path / "out" / "predictions.csv")
    mask = nibabel.load(line["mask"])
    assert line["mask"].endswith("/series-mask.nii.gz")
    assert mask.shape == voxels.shape
    assert np.allclose(np.abs(np.diag(mask.affine)), (1.1, 1.3, 2.0, 1))
