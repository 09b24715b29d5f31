import importlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from kept import PATIENTS, Hospital, Pictures, Volumes, write_picture, write_volume
from monai.transforms import Lambdad, ScaleIntensityd
from tiny import ask, context_of, says_of_setting

from fedmed_flower.clients import fingerprints, image_store, kept_images
from fedmed_flower.clients.imaging import ImagingClient
from fedmed_flower.errors import FAILED
from fedmed_flower.wire import read_error

KINDS = {"volumes": (Volumes, write_volume), "pictures": (Pictures, write_picture)}


@pytest.fixture(params=KINDS)
def hospital(request, tmp_path, monkeypatch):
    return Hospital(tmp_path, monkeypatch, *KINDS[request.param])


@pytest.fixture
def volumes(tmp_path, monkeypatch):
    return Hospital(tmp_path, monkeypatch, Volumes, write_volume)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_answers_are_the_same_without_with_a_new_and_with_a_filled_cache(hospital, kind):
    settings = {"spacing": "1,1,1", "patch_size": "4,4,4"} if hospital.client is Volumes else {}
    answers = [hospital.asked(kind, cache, **settings) for cache in ("off", None, None)]
    assert answers[1] == answers[0]
    assert answers[2] == answers[0]


def test_the_first_message_reads_each_file_once_and_the_second_none(hospital):
    hospital.asked()
    files = 2 if hospital.client is Volumes else 1
    assert len(hospital.read) == len(set(hospital.read)) == files * (PATIENTS - 2)
    hospital.asked()
    assert hospital.read == []
    hospital.asked("evaluate")
    assert len(hospital.read) == len(set(hospital.read)) == files * 2


def test_without_a_cache_each_message_reads_each_file_once(volumes):
    for _ in range(2):
        volumes.asked(cache="off")
        assert len(volumes.read) == len(set(volumes.read)) == 2 * (PATIENTS - 2)


def test_without_memory_and_cache_files_are_read_again(volumes):
    expected = volumes.asked(cache="off")
    assert volumes.asked(cache="off", cache_gigabytes=0.0) == expected
    assert len(volumes.read) > 2 * (PATIENTS - 2)
    # With a cache they come from the disk.
    assert volumes.asked(cache_gigabytes=0.0) == expected
    assert len(volumes.read) == 2 * (PATIENTS - 2)


def test_private_training_draws_the_same_from_kept_rows(volumes, monkeypatch):
    monkeypatch.setattr("secrets.randbits", lambda bits: 5)
    config = {"privacy": "patient", "target_epsilon": 8.0, "patch_size": "4,4,4", "batch_size": 2}
    answers = []
    for cache in ("off", None, None):
        answers.append(volumes.asked(cache=cache, **config))
        # The next one has a ledger in which nothing was released.
        for path in volumes.data.glob("privacy-ledger*"):
            path.unlink()
    assert volumes.read == []
    assert answers[1] == answers[0]
    assert answers[2] == answers[0]
    assert answers[0] != {k: v.numpy().tobytes() for k, v in volumes.arrays().items()}


def test_a_file_that_changes_is_read_again_and_its_old_entry_goes(volumes):
    volumes.asked()
    count = len(volumes.entries())
    path = volumes.data / "image-1.nii.gz"
    write_volume(volumes.data, 1, seed=9)
    expected = volumes.asked(cache="off")
    assert volumes.asked() == expected
    assert [Path(name).name for name in volumes.read] == ["image-1.nii.gz", "mask-1.nii.gz"]
    assert len(volumes.entries()) == count
    # A change that keeps the size and the time of change.
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1]]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    volumes.asked()
    assert len(volumes.read) == 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(volumes, monkeypatch):
    check = ImagingClient._checked.__globals__["check_row"]

    def changing(row, **arguments):
        found = check(row, **arguments)
        if row["patient"] == "p0":
            write_volume(volumes.data, 0, seed=next(seeds))
        return found

    seeds = itertools.count(1)
    monkeypatch.setattr("fedmed_flower.clients.imaging.check_row", changing)
    volumes.asked()
    monkeypatch.undo()
    assert len(volumes.entries()) == 2 * (PATIENTS - 3)


def test_a_file_that_has_changed_in_this_moment_is_kept_later(volumes, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(kept_images, "FRESH_NS", 3600 * 10**9)
    volumes.asked()
    assert volumes.entries() == []
    text = "images are not kept on the disk because of a file that has changed in this moment"
    assert caplog.messages.count(f"north: {text}") == 1


@pytest.mark.parametrize(
    "config", [{"spacing": "2,2,2"}, {"orientation": "LPS"}, {"patch_size": "4,4,4"}]
)
def test_other_settings_have_entries_of_their_own(volumes, config):
    volumes.asked()
    assert volumes.asked(**config) == volumes.asked(cache="off", **config)
    volumes.asked(**config)
    assert volumes.read == []
    volumes.asked()
    assert volumes.read == []


def test_another_parameter_of_a_transform_makes_rows_anew(volumes):
    highest = []

    class Scaled(Volumes):
        def intensity(self):
            return [ScaleIntensityd("image", 0.0, highest[-1])]

    answers = []
    for value in (1.0, 2.0, 1.0):
        highest.append(value)
        answers.append(volumes.asked(client=Scaled))
    assert answers[0] == answers[2] != answers[1]
    assert volumes.read == []


def test_other_attributes_make_findings_anew(volumes):
    volumes.asked()

    class Two(Volumes):
        label_values = (0, 1, 2)

    Two.__qualname__ = Volumes.__qualname__
    volumes.asked(client=Two)
    assert len(volumes.read) == 2 * (PATIENTS - 2)


def test_rows_after_a_function_of_the_app_are_not_kept(volumes, caplog):
    caplog.set_level(logging.INFO)

    class Doubled(Volumes):
        def intensity(self):
            return [Lambdad("image", lambda image: image * 2)]

    expected = volumes.asked(cache="off", client=Doubled)
    for _ in range(2):
        assert volumes.asked(client=Doubled) == expected
    (line,) = {text for text in caplog.messages if "not kept" in text}
    assert line.startswith(
        "north: images are not kept on the disk because of step 3 of the transforms, Lambdad, and "
        "the function "
    )
    assert line.endswith(
        ".<lambda> (define it by its name at the top of a module, and not as a lambda or within "
        "another function): no fingerprint tells what it does. What is found in each image is kept"
    )
    # What was found in them is kept.
    assert len(volumes.entries()) == PATIENTS - 2


def doubled(image):
    return 2 * image


def test_rows_after_a_function_with_a_name_are_kept(volumes):
    class Doubled(Volumes):
        def intensity(self):
            return [Lambdad("image", doubled)]

    expected = volumes.asked(cache="off", client=Doubled)
    volumes.asked(client=Doubled)
    assert volumes.asked(client=Doubled) == expected
    assert volumes.read == []


def test_a_row_with_a_problem_is_looked_at_in_each_message(volumes, caplog):
    (volumes.data / "image-1.nii.gz").write_bytes(b"no volume")
    answers = [volumes.asked() for _ in range(2)]
    assert answers[0] == answers[1]
    rejected = [text for text in caplog.messages if "rejected" in text]
    assert len(rejected) == 2
    assert "patient p1" in rejected[0]
    assert [Path(name).name for name in volumes.read] == ["image-1.nii.gz"]


def test_patients_who_are_gone_are_deleted_at_the_next_message(volumes, caplog):
    caplog.set_level(logging.INFO)
    volumes.asked()
    for name in ("image", "mask"):
        (volumes.data / f"{name}-0.nii.gz").unlink()
    before = {path.name for path in volumes.entries()}
    volumes.asked("evaluate")
    gone = before - {path.name for path in volumes.entries()}
    assert len(gone) == 2
    assert any("2 entries of the image cache deleted" in text for text in caplog.messages)


def test_patients_of_another_app_are_deleted_once_their_files_are_gone(volumes):
    class Other(Volumes):
        pass

    volumes.asked(client=Other)
    volumes.asked()
    assert len(volumes.entries()) == 4 * (PATIENTS - 2)
    # Moved, so that the others stay in their split.
    (volumes.data / "image-0.nii.gz").rename(volumes.data / "was-0.nii.gz")
    volumes.asked("evaluate", client=Volumes)
    mine = {path.name[:16] for path in volumes.entries()}
    assert len(mine) == 2
    assert len(volumes.entries()) == 4 * (PATIENTS - 3) + 4


def test_what_was_not_used_for_a_month_is_deleted(volumes):
    volumes.asked()
    # A prepared row: what was found in rows of earlier splits is looked at in evaluation too.
    old = max(volumes.entries(), key=lambda path: path.stat().st_size)
    month = time.time() - (image_store.DAYS_UNUSED + 1) * 24 * 3600
    os.utime(old, (month, month))
    volumes.asked("evaluate")
    assert old not in volumes.entries()
    assert len(volumes.entries()) == 2 * (PATIENTS - 2) - 1 + 4


@pytest.mark.parametrize("place", [0, 9, 40, -1])
def test_a_damaged_entry_is_made_anew(volumes, place, caplog):
    expected = volumes.asked()
    for path in volumes.entries():
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
    assert volumes.asked() == expected
    assert len(set(volumes.read)) == 2 * (PATIENTS - 2)
    assert "a damaged entry of the image cache is deleted, and made anew" in caplog.messages
    assert volumes.asked() == expected
    assert volumes.read == []


def test_an_entry_that_was_cut_off_is_made_anew(volumes):
    expected = volumes.asked()
    for path in volumes.entries():
        path.write_bytes(path.read_bytes()[:20])
    assert volumes.asked() == expected
    assert len(set(volumes.read)) == 2 * (PATIENTS - 2)
    volumes.asked()
    assert volumes.read == []


def test_an_entry_that_makes_no_sense_is_made_anew(volumes):
    expected = volumes.asked()
    for path in volumes.entries():
        text = json.dumps({"__metadata__": {"text": "{}"}}).encode()
        image_store._write(path.with_suffix(".new"), [len(text).to_bytes(8, "little") + text])
        path.with_suffix(".new").rename(path)
    assert volumes.asked() == expected
    assert volumes.asked() == expected
    assert volumes.read == []


def test_no_patients_name_stands_in_what_is_kept_but_in_paths(volumes):
    volumes.asked()
    for path in volumes.entries():
        content = path.read_bytes()
        assert str(volumes.data).encode() in content
        assert b"p1" not in content.replace(str(volumes.data).encode(), b"")
        assert path.stat().st_mode & 0o777 == 0o600
    assert volumes.cache.stat().st_mode & 0o777 == 0o700


def test_another_source_of_the_app_makes_rows_anew(volumes, tmp_path, monkeypatch):
    source = Path(sys.modules[Volumes.__module__].__file__).read_text()
    monkeypatch.syspath_prepend(tmp_path)
    answers = []
    for number, version in enumerate((source, source, source + "# Changed.\n")):
        (tmp_path / "own_app.py").write_text(version)
        # As another process would.
        monkeypatch.delitem(sys.modules, "own_app", raising=False)
        importlib.invalidate_caches()
        fingerprints._source_digest.cache_clear()
        app = importlib.import_module("own_app")
        answers.append(volumes.asked(client=app.Volumes))
        assert len(volumes.read) == (0 if number == 1 else 2 * (PATIENTS - 2))
    assert answers[0] == answers[1] == answers[2]


def test_all_goes_on_if_the_disk_is_full(volumes, monkeypatch, caplog):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    expected = volumes.asked(cache="off")
    assert volumes.asked() == expected
    assert volumes.entries() == []
    lines = [text for text in caplog.messages if "not kept" in text]
    reason = "less than 1 GiB of the disk would be left"
    assert lines == [f"images are not kept in {volumes.cache} any more: {reason}"]


def test_a_full_cache_keeps_what_this_message_uses(volumes):
    volumes.asked()
    sizes = [path.stat().st_size for path in volumes.entries()]
    shutil.rmtree(volumes.cache)
    room = {"image_cache_gigabytes": 0.7 * sum(sizes) / 2**30}
    expected = volumes.asked(cache="off")
    for _ in range(3):
        assert volumes.asked(node=room) == expected
        assert sum(path.stat().st_size for path in volumes.entries()) <= 0.7 * sum(sizes)
        kept = {path.name for path in volumes.entries()}
    assert 0 < len(volumes.read) < 2 * (PATIENTS - 2)
    # Other settings need room: what was used least recently goes.
    volumes.asked(orientation="LPS", node=room)
    now = {path.name for path in volumes.entries()}
    assert now - kept
    assert kept - now


def test_a_cache_without_room_keeps_nothing(volumes):
    volumes.asked(node={"image_cache_gigabytes": 0.0})
    assert volumes.entries() == []


def test_a_simulation_keeps_nothing_on_the_disk(volumes, monkeypatch):
    monkeypatch.setenv("FEDMED_CACHE", str(volumes.cache))
    rows = volumes.client.load_data(None, type("Site", (), {"data_dir": volumes.data}))
    client = type("Here", (Volumes,), {"load_data": lambda self, site: rows})
    context = context_of()
    for _ in range(2):
        assert not ask(client, "train", context, volumes.arrays()).has_error()
    assert volumes.entries() == []
    # Its process lives on, and reads nothing twice.
    assert len(volumes.read) == 2 * (PATIENTS - 2)


def test_the_default_is_in_the_users_cache(volumes, monkeypatch):
    monkeypatch.setenv("FEDMED_CACHE", str(volumes.cache))
    volumes.asked(cache="")
    assert [path.name for path in volumes.entries()] == ["images"]
    assert len(list((volumes.cache / "images").iterdir())) == 2 * (PATIENTS - 2)


def closed(place):
    place.mkdir(mode=0o700)
    place.chmod(0o755)
    return f"image-cache must be closed to others, and {place} has the mode 755: chmod 700 {place}"


def linked(place):
    place.with_name("elsewhere").mkdir(mode=0o700)
    place.symlink_to(place.with_name("elsewhere"))
    return f"image-cache must be a folder, and {place} is a link: give the folder"


def a_file(place):
    place.write_text("x")
    return f"image-cache must be a folder, and {place} is no folder: give the folder"


@pytest.mark.parametrize("make", [closed, linked, a_file])
def test_a_folder_that_is_not_private_is_refused(volumes, make, caplog, monkeypatch):
    text = make(volumes.cache)
    reply = ask(volumes.client, "train", volumes.context(), volumes.arrays())
    assert read_error(reply.error.reason)[1] in (FAILED, "InputError")
    assert caplog.messages[-1] == f"north: {text}"
    # The default folder is nobody's choice: nothing is kept.
    (volumes.data.parent / "user").mkdir()
    volumes.cache.rename(volumes.data.parent / "user" / "images")
    monkeypatch.setenv("FEDMED_CACHE", str(volumes.data.parent / "user"))
    volumes.asked(cache="")
    assert any("no images are kept on the disk: " in line for line in caplog.messages)


def test_a_folder_of_somebody_else_is_refused(volumes, monkeypatch):
    volumes.cache.mkdir(mode=0o700)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(image_store.InputError, match=f"belongs to number {own}: give another"):
        image_store.ImageStore(volumes.cache, 1e9)


def test_a_link_in_the_folder_is_not_followed(volumes):
    expected = volumes.asked()
    place = volumes.data.parent / "elsewhere"
    place.mkdir()
    for path in volumes.entries():
        path.rename(place / path.name)
        path.symlink_to(place / path.name)
    assert volumes.asked() == expected
    assert len(set(volumes.read)) == 2 * (PATIENTS - 2)
    assert not any(path.is_symlink() for path in volumes.entries())
    assert len(list(place.iterdir())) == 2 * (PATIENTS - 2)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            "kept",
            "image-cache in the node config must be an absolute path or off, got 'kept': a "
            "relative path names another folder in another working directory",
        ),
        (
            "DATA/kept",
            "image-cache must not lie in data-dir, whose files are taken for patients', got "
            "DATA/kept: give a folder outside of DATA",
        ),
    ],
)
def test_the_folder_must_be_absolute_and_outside_of_the_data(tmp_path, given, text):
    def full(words):
        return words.replace("DATA", str(tmp_path))

    with pytest.raises(image_store.InputError, match=says_of_setting(full(text))):
        image_store.folder_of(full(given), tmp_path)


@pytest.mark.slow
def test_two_processes_may_use_one_folder(volumes):
    expected = volumes.asked(cache="off")
    scores = volumes.asked("evaluate", cache="off")
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        found = [pool.apply_async(_several, (volumes,)) for _ in range(2)]
        for answers in (one.get(timeout=300) for one in found):
            assert answers == [expected, scores] * 3
    assert len(volumes.entries()) == 2 * PATIENTS


def _several(hospital):
    torch.set_num_threads(1)
    return [hospital.asked(kind) for _ in range(3) for kind in ("train", "evaluate")]


def test_prepared_rows_are_equal_to_the_bit_with_their_record_of_transforms(volumes):
    config = {"spacing": "1,1,1", "orientation": "LPI"}
    found = []
    for cache in ("off", None, None):
        client = volumes.client(volumes.context(cache, **config))
        prepared = client.prepared("test", pooled=False)[1]
        found.append([_written(prepared[0], prepared), _written(prepared[1], prepared)])
    assert found[1] == found[0]
    assert found[2] == found[0]


def _written(value, prepared):
    """Return a value as a text in which each bit counts; transforms by their place."""
    if isinstance(value, dict):
        return {key: _written(part, prepared) for key, part in value.items() if key != "id"}
    if isinstance(value, list | tuple):
        return [type(value), *(_written(part, prepared) for part in value)]
    if isinstance(value, torch.Tensor):
        own = _written(vars(value), prepared) if vars(value) else None
        array = value.detach().as_subclass(torch.Tensor).numpy()
        return (type(value), value.stride(), _written(array, prepared), own)
    if isinstance(value, np.ndarray):
        return (value.dtype, value.shape, value.tobytes())
    return (type(value), value)
