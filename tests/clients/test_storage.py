import csv
import io
import itertools
import re

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from tiny import (
    TinyClient,
    ask,
    context_of,
    fixed,
    make_rows,
    node_of,
    nodes_of,
    run_tiny,
    says,
    says_of_setting,
)

from fedmed_flower import SiteData
from fedmed_flower.clients.storage import keep_pictures, keep_splits, output_folder
from fedmed_flower.data.pictures import Picture
from fedmed_flower.data.site import Site
from fedmed_flower.errors import InputError
from fedmed_flower.wire import read_error

PICTURES = [
    Picture("case 1: class 0, given 50%", b"one", "hospital-1-test-0"),
    Picture("../../the worst", b"two", "hospital-1-test-1"),
]
BUDGET = {"budget-epsilon": 3.0, "budget-delta": 1e-5}


class Drawing(TinyClient):
    """Gives ready pictures, and counts how often it was asked for some."""

    pictures: tuple = tuple(PICTURES)
    drawn = 0

    def draw(self, model, prepared, count):
        type(self).drawn += 1
        return list(self.pictures)


def drawing(*pictures):
    return type("Drawing", (Drawing,), {"pictures": pictures or Drawing.pictures})


def shared(client, context, **config):
    """Return the pictures in the reply to a query, as pairs of title and bytes."""
    reply = ask(client, "query.pictures", context, count=3, **config)
    assert not reply.has_error(), reply.error.reason
    found = reply.content["pictures"]
    return list(zip(found["titles"], found["images"], strict=True))


def files_of(folder):
    """Return what is in a folder, hidden files too, by path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def real(tmp_path, name="north", **config):
    """Return context and site of a hospital with an output-dir."""
    folder = tmp_path / "own"
    folder.mkdir(exist_ok=True)
    node_config = node_of(tmp_path, name, output_dir=str(folder)) | config
    return context_of(node_config=node_config), Site(name)


def message(key="k1", **more):
    return ConfigRecord({"run-key": key, **more})


def data(**splits):
    return SiteData(**{"train": make_rows(3, 0, "a"), "test": make_rows(2, 1, "b"), **splits})


def test_a_simulation_writes_each_sites_splits_once_into_the_run_folder(tmp_path):
    run_tiny(tmp_path / "run", baselines=True)
    found = files_of(tmp_path / "run" / "splits")
    assert set(found) == {"hospital-1.csv", "hospital-2.csv"}
    lines = list(csv.reader(io.StringIO(found["hospital-2.csv"].decode())))
    assert lines[0] == ["patient", "split"]
    expected = [
        [f"hospital-2-{split}-{number}", split]
        for split, count in (("train", 10), ("val", 6), ("test", 8))
        for number in range(count)
    ]
    assert lines[1:] == expected


def test_a_patient_with_the_name_of_a_formula_is_a_text_in_the_split(tmp_path):
    context, site = real(tmp_path)
    row = make_rows(1, 0, "a")[0]
    patients = ["=1+1", "-1", -1]
    rows = [row | {"patient": patient} for patient in patients]
    keep_splits(context, site, message(), SiteData(train=rows))
    path = tmp_path / "own" / "k1" / "splits" / "north.csv"
    assert path.read_text().split() == ["patient,split", "'=1+1,train", "-1,train"]


def test_a_real_site_writes_into_its_output_dir_and_the_server_gets_nothing(tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    north, south = nodes_of(tmp_path, "north", "south")
    node_configs = [north | {"output-dir": str(own)}, south]
    run_tiny(tmp_path / "run", node_configs=node_configs, baselines=True)
    (key,) = [path.name for path in own.iterdir()]
    assert len(key) == 16
    # South has no output-dir; the comparison adds no folder of its own.
    assert set(files_of(own)) == {f"{key}/splits/north.csv"}
    assert not (tmp_path / "run" / "splits").exists()
    assert f'key = "{key}"' in (tmp_path / "run" / "config.toml").read_text()


def test_splits_are_written_once_and_a_change_is_told(tmp_path, caplog):
    context, site = real(tmp_path)
    keep_splits(context, site, message(), data())
    path = tmp_path / "own" / "k1" / "splits" / "north.csv"
    before, written = path.read_bytes(), path.stat().st_mtime_ns
    assert (
        before
        == b"patient,split\r\na-0,train\r\na-1,train\r\na-2,train\r\nb-0,test\r\nb-1,test\r\n"
    )
    assert keep_splits(context, site, message(), data()) == ""
    assert caplog.messages == []
    changes = keep_splits(context, site, message(), data(val=make_rows(1, 2, "c")))
    assert changes == "of its patients, 1 come since the run began"
    told = f"north: of its patients, 1 come since {path} was written"
    assert caplog.messages == [told]
    moved = SiteData(train=make_rows(1, 0, "a"), test=make_rows(2, 0, "a")[1:])
    changes = keep_splits(context, site, message(), moved)
    assert changes == "of its patients, 3 gone, 1 moved to another split since the run began"
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, written)
    keep_splits(context, site, message("k2"), data())
    assert set(files_of(tmp_path / "own")) == {"k1/splits/north.csv", "k2/splits/north.csv"}


def test_the_split_is_that_of_all_rows_and_names_each_patient_once(tmp_path):
    class Client(TinyClient):
        def screen(self, rows, split):
            return rows[1:]

    rows = [
        {**row, "patient": patient}
        for row, patient in zip(
            make_rows(5, 0),
            [7, np.int64(7), torch.tensor(7), "Müller, Anna", 'the "second"'],
            strict=True,
        )
    ]
    context, _ = real(tmp_path, **{"min-train-patients": 1})
    reply = ask(fixed(SiteData(train=rows), Client), "train", context, run_key="k1")
    assert not reply.has_error()
    text = (tmp_path / "own" / "k1" / "splits" / "north.csv").read_text(encoding="utf-8")
    assert list(csv.reader(io.StringIO(text)))[1:] == [
        ["7", "train"], ["Müller, Anna", "train"], ['the "second"', "train"],
    ]  # fmt: skip


def test_without_a_run_key_the_folder_is_named_by_the_run(tmp_path):
    context, site = real(tmp_path)
    assert output_folder(context, site, ConfigRecord()) == tmp_path / "own" / str(context.run_id)


def test_without_output_dir_a_real_site_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    context = context_of(node_config=node_of(tmp_path / "data"))
    told = message(**{"ledger-dir": str(tmp_path / "ledgers")})
    # What a server says of its own folders is heeded in a simulation only.
    assert output_folder(context, Site("north"), told) is None
    keep_splits(context, Site("north"), told, data())
    client = drawing()
    assert shared(client, context, run_key="k1", ledger_dir=str(tmp_path / "ledgers")) == []
    # Pictures that nobody sees are not drawn.
    assert client.drawn == 0
    assert set(files_of(tmp_path)) == {"data/privacy-ledger.sqlite"}


def test_a_simulation_without_a_run_folder_keeps_nothing():
    site = Site("hospital-1", simulated=True)
    assert output_folder(context_of(), site, message()) is None
    keep_splits(context_of(), site, message(), data())


@pytest.mark.parametrize("budget", [False, True])
@pytest.mark.parametrize("share", [None, True, False])
@pytest.mark.parametrize("simulated", [True, False])
@pytest.mark.parametrize("output", [True, False])
def test_pictures_leave_only_where_the_hospital_says_so(
    tmp_path, simulated, share, budget, output, caplog
):
    node_config = BUDGET if budget else {}
    node_config = node_config | ({} if share is None else {"share-images": share})
    if output:
        node_config = node_config | {"output-dir": str(tmp_path / "own")}
        (tmp_path / "own").mkdir()
    if not simulated:
        (tmp_path / "data").mkdir()
        node_config = node_config | node_of(tmp_path / "data", "hospital-1")
    else:
        node_config = node_config | {"partition-id": 0, "num-partitions": 2}
    client, context = drawing(), context_of(node_config=node_config)
    with caplog.at_level("INFO", "flwr.fedmed"):
        got = shared(client, context, run_key="k1", ledger_dir=str(tmp_path / "run" / "ledgers"))
    leave = share is not False if simulated else share is True and not budget
    assert got == ([(picture.title, picture.png) for picture in PICTURES] if leave else [])
    files = ["hospital-1/1-case-1-class-0-given-50.png", "hospital-1/2-the-worst.png"]
    # Where a budget is set, none is drawn at all: whether that succeeds would tell of the rows.
    drawn = simulated or not budget
    kept = {"own/k1": output, "run": simulated and not output}
    expected = {
        f"{folder}/pictures-kept/{file}": picture.png
        for (folder, there), (file, picture) in itertools.product(
            kept.items(), zip(files, PICTURES, strict=True)
        )
        if there and not leave and drawn
    }
    own = {path: png for path, png in files_of(tmp_path).items() if not path.startswith("data/")}
    assert own == expected
    assert client.drawn == bool(leave or expected)
    nowhere = "hospital-1: no pictures: they may not leave, and output-dir is not set"
    assert (nowhere in caplog.messages) == (drawn and not leave and not expected)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"share-images": "true"}, "share-images must be of type bool, got 'true'"),
        ({"share-images": 1}, "share-images must be of type bool, got 1"),
        ({"output-dir": 3}, "output-dir must be of type str, got 3"),
        ({"share-images": True, "budget-epsilon": 3.0}, "budget-epsilon in the node config needs "
         "budget-delta beside it"),
        ({"share-images": True, "budget-epsilon": "3"}, "budget-epsilon must be of type float, "
         "got '3'"),
    ],
)  # fmt: skip
def test_wrong_values_in_the_node_config_share_nothing(config, text, tmp_path, caplog):
    client, context = drawing(), context_of(node_config=node_of(tmp_path) | config)
    reply = ask(client, "query.pictures", context, count=1)
    assert reply.error.reason == "site north: InputError"
    (said,) = caplog.messages
    assert re.search(says_of_setting(f"north: {text}"), said)
    assert client.drawn == 0


def test_an_output_dir_that_is_no_folder_stops_training(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    for place in (path, tmp_path / "nowhere"):
        node_config = node_of(tmp_path / "data", output_dir=str(place))
        context = context_of(node_config=node_config)
        text = f"output-dir of site north is not a folder: {place}"
        with pytest.raises(InputError, match=says(text)):
            keep_splits(context, Site("north"), message(), data())
        reply = ask(TinyClient, "train", context)
        assert reply.error.reason == "site north: InputError"
        assert caplog.messages[-1] == f"north: {text}"
    found = files_of(tmp_path)
    assert found.pop("data/privacy-ledger.sqlite")
    assert found == {"notes.txt": b"mine"}


HOSTILE = [
    "../../evil",
    "..",
    ".",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "ab" * 40,
    "Süd",
    "北京",
    "CON\x20",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_stay_in_their_folder(tmp_path, text):
    (tmp_path / "deep").mkdir()
    context, site = real(tmp_path / "deep", name=text)
    keep_splits(context, site, message(text), data())
    keep_pictures(output_folder(context, site, message(text)), site, [Picture(3 * text, b"p")])
    found = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(found) == 2
    for path in found:
        assert path.parts[:2] == ("deep", "own")
        assert len(path.parts) == {"splits": 5, "pictures-kept": 6}[path.parts[3]]


def test_names_that_look_alike_as_files_are_kept_apart(tmp_path):
    names = ["a/b", "a b", "a-b", "A-b", "A-B", "北京", "上海", "..", "..."]
    for name in names:
        context, site = real(tmp_path, name=name)
        keep_splits(context, site, message(), data())
    assert len({path.lower() for path in files_of(tmp_path)}) == len(names)
    assert "own/k1/splits/a-b.csv" in files_of(tmp_path)


def test_pictures_of_two_sites_never_have_one_file(tmp_path):
    for name, title in (("a", "1-x"), ("a-1", "x"), ("A", "1-x")):
        keep_pictures(tmp_path, Site(name), [Picture(title, name.encode())])
    found = files_of(tmp_path)
    assert len({path.lower() for path in found}) == 3
    assert sorted(found.values()) == [b"A", b"a", b"a-1"]


def test_pictures_leave_a_real_hospital_once_a_run_and_six_at_most(tmp_path):
    context, _ = real(tmp_path, **{"share-images": True})
    many = [Picture(f"case {number}", b"png", f"north-test-{number}") for number in range(8)]
    client = drawing(*many)
    # The worst comes last.
    last = [(picture.title, picture.png) for picture in many[-6:]]
    assert shared(client, context, run_key="k1") == last
    reply = ask(client, "query.pictures", context, count=3, run_key="k1")
    assert read_error(reply.error.reason) == ("north", "declined: pictures leave once a run")
    assert client.drawn == 1


def test_a_picture_whose_patient_is_not_named_does_not_leave_a_real_hospital(tmp_path):
    context, _ = real(tmp_path, **{"share-images": True})
    client = drawing(Picture("of whom", b"one"), Picture("named", b"two", "north-test-1"))
    assert shared(client, context, run_key="k1") == [("named", b"two")]


def test_an_output_folder_that_is_not_there_is_said_at_the_start(tmp_path, caplog):
    node = node_of(tmp_path, output_dir=str(tmp_path / "missing"))
    reply = ask(TinyClient, "query.describe", context_of(node_config=node))
    assert read_error(reply.error.reason) == ("north", "InputError")
    text = f"north: output-dir of site north is not a folder: {tmp_path / 'missing'}"
    assert caplog.messages[-1] == text
