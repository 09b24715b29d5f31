"""The documentation's client and the imaging examples, run as a user runs them."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import node_of, run_tiny
from typer.testing import CliRunner

from fedmed_flower.cli.main import app
from fedmed_flower.data.site import GENERATED
from fedmed_flower.engines.project import load_project
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.settings.registry import defaults, require_known
from fedmed_flower.settings.text import SETTINGS

ROOT = Path(__file__).parents[2]


def run(*arguments):
    """Run the command and return its folder's summary."""
    folder = Path(arguments[-1])
    result = CliRunner().invoke(app, ["run", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return json.loads((folder / "summary.json").read_text())


def cells(folder, seed, count=6):
    """Write fields of view with bright discs, two of each patient, and their masks."""
    generator = np.random.default_rng(seed)
    rows, columns = np.indices((32, 40))
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(2 * count):
        y, x = generator.integers(8, 24, 2)
        mask = (rows - y) ** 2 + (columns - x) ** 2 < 36
        image = 60 + 120 * mask + generator.normal(0, 10, mask.shape)
        name = f"patient{number // 2}-{number % 2}.png"
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / name)
        Image.fromarray(255 * mask.astype(np.uint8)).save(folder / "masks" / name)


def split_by(folder, key):
    """Give a hospital the key by which its patients are split, which else is drawn."""
    with Ledger(folder / "privacy-ledger.sqlite")._open() as connection:
        connection.execute("UPDATE about SET value = ? WHERE key = 'split-key'", (key,))


def test_a_new_data_set_takes_twenty_lines(tmp_path):
    text = (ROOT / "docs/guides/imaging.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    subclass = code[code.index("class ") :]
    assert len(subclass.splitlines()) <= 20
    names = {}
    exec(compile(code, "imaging.md", "exec"), names)
    client = names["CellHospital"]
    nodes = []
    for name in ("north", "south"):
        cells(tmp_path / name, len(nodes))
        split_by(tmp_path / name, bytes([6] * 32))
        few = {"min_train_patients": 1, "min_evaluated_patients": 1}
        nodes.append(node_of(tmp_path / name, name, **few))
    settings = {"patch-size": "32,32", "local-epochs": 12, "optimizer": "adam"}
    settings |= {"learning-rate": 0.01, "num-server-rounds": 3}
    result = run_tiny(
        tmp_path / "run",
        client,
        node_configs=nodes,
        model=lambda: client.build_model(None),
        **settings,
    )
    # Nothing, or everything, found would give a Dice below 0.2.
    assert result.evaluate_metrics_clientapp[3]["dice"] > 0.7
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    patients = summary["sites"]["north"]
    assert patients == {"train": 8, "val": 2, "test": 2}
    assert summary["test"]["sites"]["south"].keys() >= {"hd95-cell", "surface-dice", "dice-worst"}


def test_the_hippocampus_example_runs_on_phantoms(tmp_path):
    summary = run(
        *(ROOT / "examples/hippocampus", "--sites", 2, "--rounds", 2),
        *("-c", "dataset=phantoms", "-c", "patch-size=24,24,24", "-c", "local-epochs=1"),
        *("-c", 'network-args={"spatial_dims": 3, "in_channels": 1, "out_channels": 3, '
          '"channels": [8, 16], "strides": [2], "norm": "instance"}'),
        *("-c", "pictures=1", "--out", tmp_path / "run"),
    )  # fmt: skip
    assert summary["generated"] is True
    assert {"dice-anterior", "hd95-posterior"} <= summary["test"]["federated"].keys()
    assert len(summary["pictures"]) == 4
    assert GENERATED in (tmp_path / "run" / "report.html").read_text()


def test_the_dicom_example_writes_series_and_trains_on_them(tmp_path):
    write = runpy.run_path(str(ROOT / "examples/dicom/write.py"))["write_hospital"]
    for seed, name in enumerate(("axial", "coronal", "sagittal")):
        write(tmp_path / "data" / name, seed, patients=10)
    checked = CliRunner().invoke(app, ["data", "check", str(tmp_path / "data" / "coronal")])
    assert checked.exit_code == 0, checked.output
    assert "10 images of 10 patients" in checked.output
    summary = run(
        *(ROOT / "examples/dicom", "--sites", 3, "--rounds", 2, "-c", "pictures=0"),
        *("-c", f"folder={tmp_path / 'data'}", "--out", tmp_path / "run"),
    )
    assert summary["generated"] is True
    assert summary["sites"]["hospital-1"] == {"train": 5, "val": 0, "test": 5}


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_the_dicom_examples_lesion_is_where_it_was_drawn(tmp_path, plane):
    from monai.transforms import Compose, Orientation, Spacing

    from fedmed_flower.images.reading import read_image

    names = runpy.run_path(str(ROOT / "examples/dicom/write.py"))
    cube = np.full((24, 24, 24), -500.0)
    # To the left, in front and near the head; DICOM counts to the left and to the back.
    cube[16:20, 4:8, 18:22] = 400.0
    cuts = names["slices"](cube, plane, 3.0)
    names["write_series"](tmp_path / "series", cuts, plane, 3.0, {"PatientID": "p"})
    grid = Compose([Orientation("LPS", labels=None), Spacing((3.0, 3.0, 3.0))])
    found = grid(read_image(tmp_path / "series", 3))[0].numpy()
    np.testing.assert_allclose(found, cube, atol=1)


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/pyproject.toml")), ids=str)
def test_an_example_names_only_what_it_changes(path):
    project = load_project(path.parent)
    own = project.client_app().sections
    assert project.declared[SETTINGS] == ""
    require_known(project.declared, own)
    known = defaults(own)
    same = {key for key, value in project.declared.items() if known.get(key) == value}
    assert not same
