"""The archive is served by a local server; nothing here needs the network."""

import hashlib
import io
import os
import socket
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel
import numpy as np
import pytest
from monai.apps import DecathlonDataset
from tiny import says

from fedmed_flower.data import decathlon
from fedmed_flower.data.decathlon import load_hippocampus
from fedmed_flower.data.download import SourceUnavailable
from fedmed_flower.errors import InputError

TASK = "Task04_Hippocampus"
TITLE = "Hippocampus (Medical Segmentation Decathlon, Task04)"


def volume(seed):
    """Return the bytes of a small NIfTI file."""
    values = np.random.default_rng(seed).integers(0, 3, (3, 4, 5)).astype(np.uint8)
    return nibabel.Nifti1Image(values, np.eye(4)).to_bytes()


def members(count=3):
    """Return the files of an archive in the layout of the Decathlon, by path."""
    found = {f"{TASK}/dataset.json": b"{}", f"{TASK}/imagesTs/hippocampus_900.nii.gz": volume(9)}
    for number in range(count):
        # macOS leaves such files beside the images.
        for name in (f"hippocampus_{number:03d}.nii.gz", f"._hippocampus_{number:03d}.nii.gz"):
            found[f"{TASK}/imagesTr/{name}"] = volume(number)
            found[f"{TASK}/labelsTr/{name}"] = volume(100 + number)
    return found


def packed(files):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


class Publisher(BaseHTTPRequestHandler):
    body = b""
    asked: list[str]

    def do_GET(self):
        self.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def publish(monkeypatch, tmp_path):
    """Serve an archive with ``publish(body)``; its checksum is right unless another is given."""
    handler = type("Handler", (Publisher,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.delenv("FEDMED_DATA", raising=False)
    monkeypatch.setenv("FEDMED_CACHE", str(tmp_path / "cache"))

    def serve(body, md5=None, port=server.server_port):
        handler.body = body
        address = f"http://127.0.0.1:{port}/{TASK}.tar"
        monkeypatch.setitem(DecathlonDataset.resource, TASK, address)
        monkeypatch.setitem(DecathlonDataset.md5, TASK, md5 or hashlib.md5(body).hexdigest())
        return handler.asked

    yield serve
    server.shutdown()
    server.server_close()
    thread.join()


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").glob("*"))


def unpack(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["hippocampus", TASK])
def test_a_folder_of_ones_own_is_used_first(publish, tmp_path, monkeypatch, name):
    asked = publish(packed(members()))
    files = {path.replace(TASK, name): content for path, content in members().items()}
    unpack(tmp_path / "data", files)
    monkeypatch.setenv("FEDMED_DATA", str(tmp_path / "data"))
    volumes = load_hippocampus()
    assert (volumes.source, volumes.generated) == (f"{TITLE}, local copy", False)
    folder = tmp_path / "data" / name
    assert volumes.rows == tuple(
        {
            "image": str(folder / "imagesTr" / f"hippocampus_{n:03d}.nii.gz"),
            "label": str(folder / "labelsTr" / f"hippocampus_{n:03d}.nii.gz"),
            "patient": f"hippocampus_{n:03d}",
        }
        for n in range(3)
    )
    assert asked == []
    assert cached(tmp_path) == []


def test_an_archive_is_downloaded_and_unpacked_once(publish, tmp_path):
    asked = publish(packed(members()))
    volumes = load_hippocampus()
    assert (volumes.source, volumes.generated) == (f"{TITLE}, the publisher's checksum", False)
    assert [row["patient"] for row in volumes.rows] == [f"hippocampus_{n:03d}" for n in range(3)]
    for number, row in enumerate(volumes.rows):
        assert Path(row["image"]).read_bytes() == volume(number)
        assert Path(row["label"]).read_bytes() == volume(100 + number)
    unpacked = tmp_path / "cache" / f"{TASK}.tar-unpacked"
    written = unpacked.stat().st_mtime_ns
    assert load_hippocampus() == volumes
    assert (asked, unpacked.stat().st_mtime_ns) == ([f"/{TASK}.tar"], written)
    assert cached(tmp_path) == [f"{TASK}.tar", f"{TASK}.tar-unpacked"]


def test_an_archive_of_ones_own_is_unpacked_beside_it(publish, tmp_path, monkeypatch):
    asked = publish(b"another")
    (tmp_path / f"{TASK}.tar").write_bytes(packed(members()))
    monkeypatch.setenv("FEDMED_DATA", str(tmp_path))
    volumes = load_hippocampus()
    text = f"{TITLE}, local copy, not compared with the publisher's checksum"
    assert volumes.source == text
    assert volumes.rows[0]["image"].startswith(str(tmp_path / f"{TASK}.tar-unpacked"))
    assert asked == []


def test_a_wrong_checksum_leaves_nothing(publish, tmp_path):
    body = packed(members())
    publish(body, md5="0" * 32)
    found = hashlib.md5(body).hexdigest()
    with pytest.raises(InputError, match=f"has md5 {found}, expected {'0' * 32}") as caught:
        load_hippocampus()
    assert not isinstance(caught.value, SourceUnavailable)
    assert cached(tmp_path) == []


def test_a_publisher_that_cannot_be_reached(publish, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    publish(b"", port=port)
    with pytest.raises(SourceUnavailable, match=r"ConnectionError") as caught:
        load_hippocampus(timeout=2)
    text = str(caught.value)
    assert text.startswith(f"{TITLE}: no download from http://127.0.0.1:{port}/{TASK}.tar (")
    assert text.endswith(
        f"put {TASK}.tar into a folder and set FEDMED_DATA to that folder, "
        'or choose dataset="phantoms"'
    )
    assert cached(tmp_path) == []


def test_an_archive_that_is_cut_short_is_not_unpacked(publish, tmp_path):
    whole = packed(members())
    path = tmp_path / f"{TASK}.tar"
    # In the middle of a header or of a file, and where one ends.
    for size in range(256, len(members()) * 1024 + 1, 256):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=f"^{path} cannot be unpacked: "):
            decathlon._unpack(path, tmp_path / "unpacked")
        assert files_of(tmp_path) == {path.name}
    publish(whole[:3000])
    with pytest.raises(InputError, match=r"tar cannot be unpacked: "):
        load_hippocampus()
    # Only the archive as it came, so that it can be looked at.
    assert cached(tmp_path) == [f"{TASK}.tar"]


def test_what_is_no_archive(publish, tmp_path):
    publish(b"<html>try again later</html>")
    with pytest.raises(InputError, match=r"tar cannot be unpacked: "):
        load_hippocampus()
    assert cached(tmp_path) == [f"{TASK}.tar"]


def files_of(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() or p.is_symlink()}


def linked(name, target, kind):
    file = io.BytesIO(packed(members()))
    with tarfile.open(fileobj=file, mode="a") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        archive.addfile(member)
    return file.getvalue()


@pytest.mark.parametrize("name", ["../evil.txt", "../../evil.txt", f"{TASK}/../../evil.txt"])
def test_an_archive_writes_nothing_outside_its_folder(publish, tmp_path, name):
    publish(packed(members() | {name: b"evil"}))
    with pytest.raises(InputError, match=r"cannot be unpacked: .*outside the destination"):
        load_hippocampus()
    assert files_of(tmp_path) == {f"cache/{TASK}.tar"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("target", ["/etc/passwd", "../../../secret"])
def test_an_archive_links_to_nothing_outside_its_folder(publish, tmp_path, kind, target):
    (tmp_path / "secret").write_text("secret")
    publish(linked(f"{TASK}/imagesTr/hippocampus_7.nii.gz", target, kind))
    with pytest.raises(InputError, match="cannot be unpacked: "):
        load_hippocampus()
    assert files_of(tmp_path) == {f"cache/{TASK}.tar", "secret"}


def test_an_absolute_name_is_unpacked_inside(publish, tmp_path):
    publish(packed(members() | {f"{tmp_path}/evil.txt": b"evil"}))
    load_hippocampus()
    assert not (tmp_path / "evil.txt").exists()


def test_a_volume_without_a_mask_is_named(publish, tmp_path):
    files = members()
    del files[f"{TASK}/labelsTr/hippocampus_001.nii.gz"]
    publish(packed(files))
    folder = tmp_path / "cache" / f"{TASK}.tar-unpacked" / TASK
    image, label = (folder / part / "hippocampus_001.nii.gz" for part in ("imagesTr", "labelsTr"))
    with pytest.raises(InputError, match=says(f"{image} has no mask: {label} is not there")):
        load_hippocampus()


def test_an_archive_of_another_task(publish, tmp_path):
    publish(packed({name.replace(TASK, "Task05"): content for name, content in members().items()}))
    folder = tmp_path / "cache" / f"{TASK}.tar-unpacked" / TASK / "imagesTr"
    with pytest.raises(InputError, match=says(f"{folder} holds no .nii.gz files")):
        load_hippocampus()


def test_many_at_once_unpack_one_folder(publish, tmp_path):
    publish(packed(members(30)))
    archive, target = tmp_path / f"{TASK}.tar", tmp_path / "unpacked"
    archive.write_bytes(packed(members(30)))
    with ThreadPoolExecutor(8) as pool:
        # The sites of a simulation on Flower's engine, each in a process of its own.
        for done in [pool.submit(decathlon._unpack, archive, target) for _ in range(8)]:
            done.result()
    assert len(list((target / TASK / "imagesTr").glob("hippo*"))) == 30
    assert {path.name for path in tmp_path.iterdir()} == {archive.name, target.name}


def test_a_folder_that_cannot_be_written_is_named(publish, tmp_path, monkeypatch):
    publish(b"another")
    (tmp_path / f"{TASK}.tar").write_bytes(packed(members()))
    monkeypatch.setenv("FEDMED_DATA", str(tmp_path))

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(decathlon.tempfile, "TemporaryDirectory", refuse)
    path = tmp_path / f"{TASK}.tar"
    text = f"{path} cannot be unpacked: [Errno 13] Permission denied"
    with pytest.raises(InputError, match=says(text)):
        load_hippocampus()


@pytest.mark.realdata
def test_the_real_volumes():
    if not (Path(os.environ["FEDMED_DATA"]) / "hippocampus" / "imagesTr").is_dir():
        pytest.skip("FEDMED_DATA does not name a folder with the real volumes in hippocampus")
    volumes = load_hippocampus()
    assert len(volumes.rows) == 260
    first = volumes.rows[0]
    mask = np.asarray(nibabel.load(first["label"]).dataobj)
    assert nibabel.load(first["image"]).shape == mask.shape
    assert set(np.unique(mask)) == {0, 1, 2}
