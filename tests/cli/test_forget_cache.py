import os

import pytest
from kept import PATIENTS, Hospital, Volumes, write_volume
from typer.testing import CliRunner

from fedmed_flower.cli.main import app


@pytest.fixture
def hospital(tmp_path, monkeypatch):
    return Hospital(tmp_path, monkeypatch, Volumes, write_volume)


def forget(*arguments):
    """Return exit code and printed text, on one line."""
    done = CliRunner().invoke(app, ["data", "forget-cache", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, " ".join(done.output.split())


def test_all_entries_are_deleted_and_the_command_says_how_many(hospital):
    hospital.asked()
    megabytes = sum(path.stat().st_size for path in hospital.entries()) / 1e6
    count = 2 * (PATIENTS - 2)
    text = f"{count} entries deleted from {hospital.cache}, {megabytes:.1f} MB"
    assert forget(hospital.cache) == (0, text)
    assert not hospital.cache.exists()
    assert hospital.asked() == hospital.asked(cache="off")
    assert len(hospital.entries()) == count


def test_other_files_stay(hospital):
    hospital.asked()
    (hospital.cache / "notes.txt").write_text("x")
    (hospital.cache / "link.entry").symlink_to(hospital.data / "image-0.nii.gz")
    code, text = forget(hospital.cache)
    assert code == 0
    assert text.endswith(f"{hospital.cache} stays, since it holds other files")
    assert {path.name for path in hospital.entries()} == {"notes.txt", "link.entry"}
    assert (hospital.data / "image-0.nii.gz").exists()


def test_the_default_folder_is_the_one_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMED_CACHE", str(tmp_path))
    assert forget() == (0, f"0 entries deleted from {tmp_path / 'images'}, 0.0 MB")


def test_a_link_is_refused(hospital):
    hospital.asked()
    link = hospital.data.parent / "link"
    link.symlink_to(hospital.cache)
    code, text = forget(link)
    assert code == 2
    assert "is a link: give the folder" in text
    assert len(hospital.entries()) == 2 * (PATIENTS - 2)


def test_a_folder_that_cannot_be_emptied(hospital, monkeypatch):
    hospital.asked()

    def refused(path, **_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.unlink", refused)
    code, text = forget(hospital.cache)
    assert code == 2
    assert "cannot be emptied (Permission denied): delete it by hand" in text


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("kept", "image-cache in the node config must be an absolute path or off, got 'kept'"),
        ("DATA/kept", "image-cache must not lie in data-dir"),
        ("PARENT/open", "image-cache must be closed to others"),
    ],
)
def test_a_node_config_with_a_folder_that_cannot_be_used(hospital, given, told):
    parent = hospital.data.parent
    (parent / "open").mkdir()
    os.chmod(parent / "open", 0o750)  # noqa: PTH101
    place = given.replace("DATA", str(hospital.data)).replace("PARENT", str(parent))
    text = f'site-name="north" data-dir="{hospital.data}" image-cache="{place}"'
    done = CliRunner().invoke(app, ["data", "check", "--node-config", text])
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())


def test_a_check_by_an_app_keeps_nothing(hospital, monkeypatch):
    from fedmed_flower.cli import checking

    monkeypatch.setenv("FEDMED_CACHE", str(hospital.cache))
    client = Volumes.client_app()

    class Project:
        declared = ()

        def client_app(self):
            return client

    monkeypatch.setattr(checking, "load_project", lambda app: Project())
    monkeypatch.setattr(checking, "complete", lambda declared, sections: {"device": "cpu"})
    found = checking.check_by_app(hospital.data, [hospital.data])
    assert [checked.refused for checked in found.values()] == [""]
    assert hospital.read
    assert hospital.entries() == []
