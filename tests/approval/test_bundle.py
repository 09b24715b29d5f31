import hashlib
import io
import stat
import zipfile

import pytest
from app_bundles import CLIENT, bundle, write_app
from flwr.cli.install import install_from_fab

from fedmed_flower.approval.bundle import (
    MOST_BYTES,
    bundle_at,
    forget_compiled,
    read_bundle,
    settled,
    unlike,
)
from fedmed_flower.errors import InputError

PROJECT = b'[project]\nname = "toy"\nversion = "1"\n[tool.flwr.app]\npublisher = "lab"\n'


def zipped(files, mode=0o100644):
    """Return a zip file of names and contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content)
    return buffer.getvalue()


def test_what_flower_bundles_of_a_folder_is_read(tmp_path):
    found, content = bundle(tmp_path, config='rounds = 3\n[tool.flwr.app.config.net]\nsize = "a"')
    assert found.digest == hashlib.sha256(content).hexdigest()
    assert (found.app, found.version) == ("lab/toy", "1.0.0")
    assert found.files["toy/client.py"] == CLIENT.encode()
    assert {*found.files} == {"pyproject.toml", "toy/client.py", "toy/server.py"}
    assert found.declared == {"rounds": 3, "net.size": "a"}
    assert found.dependencies == ("numpy>=1",)


def test_a_bundle_in_a_file_is_the_same_as_its_folder(tmp_path):
    found, content = bundle(tmp_path / "app")
    (tmp_path / "toy.fab").write_bytes(content)
    again, same = bundle_at(tmp_path / "toy.fab")
    assert (again, same) == (found, content)


def test_settings_in_the_text_are_read_and_defaults_filled_in():
    settings = settled({"settings": "{seed = 5}", "batch-size": 4})
    assert settings["seed"] == 5
    assert settings["batch-size"] == 4
    assert settings["learning-rate"] == 1e-3
    assert settled({"settings": "not a table", "other": 1}) == {
        "settings": "not a table",
        "other": 1,
    }


def test_an_installed_app_is_the_bundle_until_a_file_changes(tmp_path):
    found, content = bundle(tmp_path / "app")
    place = install_from_fab(content, tmp_path / "home", skip_prompt=True)
    assert unlike(found, place) == []
    cached = place / "toy" / "__pycache__"
    cached.mkdir()
    (cached / "client.pyc").write_bytes(b"compiled")
    assert unlike(found, place) == ["toy/__pycache__/client.pyc"]
    forget_compiled(place)
    assert unlike(found, place) == []
    (place / "toy" / "client.py").write_text("answer = 41\n")
    (place / "toy" / "more.py").write_text("")
    (place / "toy" / "server.py").unlink()
    (place / "toy" / "linked.py").symlink_to("client.py")
    assert unlike(found, place) == [
        "toy/client.py",
        "toy/linked.py",
        "toy/more.py",
        "toy/server.py",
    ]


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ([("../evil.py", b"")], "would lie outside the app's folder: ../evil.py"),
        ([("/evil.py", b"")], "would lie outside the app's folder: /evil.py"),
        ([("a\\..\\evil.py", b"")], "would lie outside the app's folder"),
        ([("toy/__pycache__/client.pyc", b"")], "must hold no compiled code"),
        ([("toy/client.py", b"1")] * 2, "two files of one name: toy/client.py"),
        ([("toy/client.py", b"")], "must have a pyproject.toml"),
        ([("pyproject.toml", b"[")], "pyproject.toml of the bundle cannot be read"),
        ([("pyproject.toml", b"[project]")], "must have project.name as a text, got None"),
        (
            [("pyproject.toml", PROJECT.replace(b"version", b'dependencies = "a"\nversion'))],
            "dependencies in pyproject.toml of the bundle must be a list of texts",
        ),
        ([("pyproject.toml", PROJECT + b"config = 5\n")], "config in pyproject.toml of the bundle"),
        (
            [("pyproject.toml", PROJECT + b"[tool.flwr.app.config]\na = [1]\n")],
            "the run config in pyproject.toml of the bundle: The value for key a",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_bundle_that_cannot_be_trusted_to_be_what_it_seems_is_refused(files, text):
    with pytest.raises(InputError, match=text.replace("(", r"\(")):
        read_bundle(zipped(files))


def test_links_in_a_bundle_are_refused():
    with pytest.raises(InputError, match=r"is a link: pyproject\.toml"):
        read_bundle(zipped([("pyproject.toml", PROJECT)], stat.S_IFLNK | 0o777))


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(InputError, match="no app bundle, which is a zip file"):
        read_bundle(b"text")
    with pytest.raises(InputError, match=f"at most {MOST_BYTES:,} bytes, this one 10,000,001"):
        read_bundle(bytes(MOST_BYTES + 1))
    with pytest.raises(InputError, match="is no Flower app"):
        bundle_at(tmp_path)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        bundle_at(tmp_path / "none.fab")


def test_a_broken_member_is_refused(tmp_path):
    _, content = bundle(tmp_path)
    at = content.index(b"PK\x03\x04") + 60
    with pytest.raises(InputError):
        read_bundle(content[:at] + b"\xff\xff\xff\xff" + content[at + 4 :])


def test_a_zip_that_unpacks_to_too_much_is_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pyproject.toml", bytes(100_000_001))
    with pytest.raises(InputError, match="at most 100,000,000 bytes unpacked, got 100,000,001"):
        read_bundle(buffer.getvalue())


def test_the_same_app_gives_the_same_bundle(tmp_path):
    one, _ = bundle_at(write_app(tmp_path / "one"))
    other, _ = bundle_at(write_app(tmp_path / "other"))
    assert one.digest == other.digest
