"""Folders of generated patients are read as a hospital's own, and never replace them."""

import csv
from pathlib import Path

import numpy as np
import pytest
from tiny import says
from typer.testing import CliRunner

from fedmed_flower.cli.main import app
from fedmed_flower.data import load_folder, phantom_folder
from fedmed_flower.data.phantom_folders import PHANTOMS, write_phantoms
from fedmed_flower.data.site import MARK, Site
from fedmed_flower.errors import InputError


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kind", PHANTOMS)
def test_a_folder_is_marked_the_same_each_time_and_another_at_each_hospital(tmp_path, kind):
    for name, index in (("a", 0), ("again", 0), ("b", 1)):
        write_phantoms(tmp_path / name, kind, index)
    first, again, other = (content(tmp_path / name) for name in ("a", "again", "b"))
    assert first.pop(MARK) == b""
    assert again.pop(MARK) == b""
    assert first.keys() == again.keys() == other.keys() - {MARK}
    # gzip and zip write the time of day beside the content.
    stamped = (".nii.gz", ".npz")
    assert all(first[name] == again[name] for name in first if not name.endswith(stamped))
    assert all(first[name] != other[name] for name in first if name.endswith(("csv", "npz", "bed")))


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_the_images_are_read_as_a_hospitals_own(tmp_path, kind):
    write_phantoms(tmp_path / "north", kind, 0)
    data = load_folder(tmp_path / "north", seed=0)
    assert (data.generated, data.rejected) == (True, 0)
    assert data.source == "folder north, datalist.csv"
    (tmp_path / "north" / MARK).unlink()
    assert load_folder(tmp_path / "north", seed=0).generated is False


def test_no_patient_is_in_two_hospitals(tmp_path):
    named = []
    for index in range(2):
        write_phantoms(tmp_path / str(index), "table", index)
        with (tmp_path / str(index) / "patients.csv").open(newline="") as file:
            named.append({row["patient"] for row in csv.DictReader(file)})
    assert len(named[0]) == len(named[1]) == 200
    assert not named[0] & named[1]


def test_beats_are_plain_arrays(tmp_path):
    write_phantoms(tmp_path / "north", "other", 0)
    with np.load(tmp_path / "north" / "beats.npz", allow_pickle=False) as file:
        assert file["beat"].shape == (100, 100)
        assert {*file["sick"].tolist()} == {0, 1}


def test_a_simulated_hospital_has_one_folder_in_a_process():
    site = Site("hospital-3", 2, 5, simulated=True)
    folder = phantom_folder(site, "table")
    assert folder.name == "hospital-3"
    assert phantom_folder(site, "table") == folder
    assert phantom_folder(Site("hospital-1", 0, 5, simulated=True), "table") != folder


def test_a_real_hospital_never_gets_generated_patients(tmp_path):
    with pytest.raises(InputError, match=r"^north has no folder of its own: .* give data-dir in"):
        phantom_folder(Site("north"), "table")
    assert phantom_folder(Site("north", data_dir=tmp_path), "table") == tmp_path


def test_what_is_there_is_not_written_over(tmp_path):
    with pytest.raises(InputError, match=says(f"{tmp_path} exists already: give another folder")):
        write_phantoms(tmp_path, "table", 0)
    with pytest.raises(InputError, match=r"^kind must be one of images, .*, got 'tables'$"):
        write_phantoms(tmp_path / "new", "tables", 0)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/new cannot be written: Not a directory$"):
        write_phantoms(tmp_path / "file" / "new", "table", 0)


def test_the_command_writes_each_hospital_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fedmed(*names):
        result = CliRunner().invoke(app, ["data", "phantoms", "data", *names, "--for", "table"])
        return result.exit_code, result.output

    assert fedmed("north", "south") == (0, "data/north: 2 files\ndata/south: 2 files\n")
    code, output = fedmed("east", "north")
    assert code == 2
    assert "data/north exists already: give another folder or name" in output
    for name in ("../east", "..", "a/b", ""):
        code, output = fedmed("east", name)
        assert code == 2
        assert "a hospital's name must be that of one folder, got " in output
    assert sorted(path.name for path in Path("data").iterdir()) == ["north", "south"]
