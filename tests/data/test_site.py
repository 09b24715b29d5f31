import re
from pathlib import Path

import numpy as np
import pytest
from tiny import TinyClient, ask, context_of, says, says_of_setting

from fedmed_flower.data.site import (
    LineNumber,
    Site,
    SiteData,
    fewest_patients,
    min_cell_count,
    patient_text,
    with_patients,
)
from fedmed_flower.errors import InputError
from fedmed_flower.settings.node import NodeSettings


def read(**node_config):
    config = {key.replace("_", "-"): value for key, value in node_config.items()}
    return Site.from_context(context_of(node_config=config))


def test_flowers_simulation_names_sites_from_one_on():
    assert read(partition_id=2, num_partitions=5) == Site("hospital-3", 2, 5, None, simulated=True)


def test_a_supernode_with_data_of_its_own(tmp_path):
    site = read(site_name="Charité", data_dir=str(tmp_path))
    assert site == Site("Charité", 0, 1, tmp_path, simulated=False)


def test_a_supernode_that_splits_a_shared_dataset(tmp_path):
    site = read(site_name="north", data_dir=str(tmp_path), partition_id=1, num_partitions=3)
    assert site == Site("north", 1, 3, tmp_path, simulated=False)


def test_a_tilde_in_data_dir_is_the_home_folder(tmp_path, monkeypatch):
    (tmp_path / "scans").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read(site_name="a", data_dir="~/scans").data_dir == tmp_path / "scans"


@pytest.mark.parametrize("name", [{}, {"site_name": ""}, {"site_name": "  "}])
def test_a_supernode_needs_a_name(name):
    text = "this SuperNode has no name: give --node-config 'site-name=\"...\"'"
    with pytest.raises(InputError, match=says(text)):
        read(**name)


def test_data_dir_must_be_a_folder(tmp_path):
    file = tmp_path / "scans.npz"
    file.write_text("")
    for path in (file, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=says(f"data-dir of site a is not a folder: {path}")):
            read(site_name="a", data_dir=str(path))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"partition_id": 5, "num_partitions": 5},
            "partition-id must lie in 0..4 (num-partitions - 1), got 5",
        ),
        (
            {"partition_id": -1, "num_partitions": 5},
            "partition-id must lie in 0..4 (num-partitions - 1), got -1",
        ),
        (
            {"partition_id": 1, "site_name": "a"},
            "partition-id must lie in 0..0 (num-partitions - 1), got 1",
        ),
    ],
)
def test_the_index_must_be_in_range(config, text):
    with pytest.raises(InputError, match=says(text)):
        read(**config)


def test_an_index_that_is_no_number():
    with pytest.raises(InputError, match="partition-id"):
        read(site_name="a", partition_id="two", num_partitions=3)


def test_a_folder_of_its_own_makes_no_simulation(tmp_path):
    # A SuperNode started with a partition and a folder must not be taken for a simulated site:
    # those send the texts of their errors.
    with pytest.raises(InputError, match="this SuperNode has no name"):
        read(data_dir=str(tmp_path), partition_id=0, num_partitions=2)


def test_a_site_needs_a_name():
    with pytest.raises(InputError, match=says_of_setting("site-name must not be empty")):
        Site("")


def test_data_without_val_and_test():
    data = SiteData(train=[{"image": 0, "label": 0, "patient": 0}])
    assert len(data.train) == 1
    assert len(data.val) == len(data.test) == 0
    assert data.source == "not named"
    assert not data.generated


def test_a_site_can_be_a_key():
    assert len({Site("a", data_dir=Path("x")), Site("a", data_dir=Path("x")), Site("b")}) == 2


@pytest.mark.parametrize(
    ("node", "run", "count"),
    [
        # A real hospital: the server's wish can raise its own count, and not lower it.
        ({"site-name": "a"}, None, 10),
        ({"site-name": "a"}, 1, 10),
        ({"site-name": "a"}, 25, 25),
        ({"site-name": "a", "min-cell-count": 3}, None, 3),
        ({"site-name": "a", "min-cell-count": 3}, 1, 3),
        ({"site-name": "a", "min-cell-count": 3}, 7, 7),
        ({"site-name": "a", "min-cell-count": 30}, 7, 30),
        # In a simulation nothing leaves.
        ({}, None, 10),
        ({}, 1, 1),
        ({}, 25, 25),
        ({"min-cell-count": 5}, None, 5),
        ({"min-cell-count": 5}, 1, 5),
    ],
)
def test_the_fewest_patients_of_whom_a_hospital_tells(node, run, count):
    node = {"partition-id": 0, "num-partitions": 2} | node
    context = context_of(node_config=node, **({} if run is None else {"min_cell_count": run}))
    assert min_cell_count(context, Site.from_context(context)) == count


@pytest.mark.parametrize(
    ("node", "run", "text"),
    [
        ({}, 0, "min-cell-count must be at least 1, got 0"),
        ({"min-cell-count": 0}, 0, "min-cell-count must be at least 1, got 0"),
        ({"min-cell-count": -2}, -3, "min-cell-count must be at least 1, got -3"),
        ({}, "ten", "min-cell-count must be of type int, got 'ten'"),
        ({"min-cell-count": 1.5}, 1, "min-cell-count must be of type int, got 1.5"),
        ({"min-cell-count": True}, 1, "min-cell-count must be of type int, got True"),
    ],
)
def test_a_wrong_fewest_number_of_patients(node, run, text):
    context = context_of(
        node_config={"partition-id": 0, "num-partitions": 2} | node, min_cell_count=run
    )
    with pytest.raises(InputError, match=says_of_setting(text)):
        min_cell_count(context, Site.from_context(context))


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("budget_epsilon", "did you mean budget-epsilon?"),
        ("buget-epsilon", "did you mean budget-epsilon?"),
        ("min_cell_count", "did you mean min-cell-count?"),
        ("privat-metrics", "did you mean private-metrics?"),
        ("xyz", "`fedmed settings` lists those there are"),
    ],
)
@pytest.mark.parametrize("kind", ["train", "evaluate", "query.describe", "query.statistics"])
def test_a_hospital_refuses_a_key_it_does_not_know_before_it_answers(
    tmp_path, caplog, key, near, kind
):
    loaded = []

    class Client(TinyClient):
        def load_data(self, site):
            loaded.append(site)
            return super().load_data(site)

    node = {"site-name": "north", "data-dir": str(tmp_path), key: 1.0}
    reply = ask(Client, kind, context_of(node_config=node))
    assert reply.error.reason == "site north: InputError"
    (said,) = caplog.messages
    assert re.search(
        says_of_setting(f"north: the node config has an unknown key {key!r}: {near}"), said
    )
    assert loaded == []
    assert list(tmp_path.iterdir()) == []


def test_an_app_names_the_keys_that_are_its_own(tmp_path):
    class Client(TinyClient):
        node_keys = ("ward",)

    node = {"site-name": "north", "data-dir": str(tmp_path), "ward": "ICU"}
    assert not ask(Client, "query.describe", context_of(node_config=node)).has_error()
    text = "the node config has an unknown key 'wards': did you mean ward?"
    with pytest.raises(InputError, match=says_of_setting(text, ["ward"])):
        NodeSettings.of({"wards": "ICU"}, Client.node_keys)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"min-train-patients": 0}, "min-train-patients must be at least 1, got 0"),
        ({"min-evaluated-patients": -1}, "min-evaluated-patients must be at least 1, got -1"),
        ({"most-runs-a-day": 0}, "most-runs-a-day must be at least 1, got 0"),
        ({"max-filter-values": -1}, "max-filter-values must be at least 0, got -1"),
        ({"personal": 1}, "personal must be of type bool, got 1"),
        ({"ledger": 3}, "ledger must be of type str, got 3"),
        ({"budget-epsilon": 1.0}, "budget-epsilon in the node config needs budget-delta beside it"),
        ({"budget-delta": 1e-5}, "budget-delta in the node config needs budget-epsilon beside it"),
        (
            {"budget-epsilon": 1.0, "budget-delta": 1e-5, "private-metrics": False},
            "private-metrics=false excludes budget-epsilon, since no budget bounds metrics without "
            "noise: remove one of them from the node config",
        ),
    ],
)
def test_what_a_hospital_says_is_checked_whole(given, text):
    with pytest.raises(InputError, match=says_of_setting(text)):
        NodeSettings.of(given)


@pytest.mark.parametrize(
    ("purpose", "key"), [("train", "min-train-patients"), ("evaluated", "min-evaluated-patients")]
)
def test_the_fewest_patients_are_ten_at_a_real_hospital_and_one_in_a_simulation(purpose, key):
    for node, fewest in (({}, 1), ({key: 4}, 4)):
        node = {"partition-id": 0, "num-partitions": 2} | node
        context = context_of(node_config=node)
        assert fewest_patients(context, Site.from_context(context), purpose) == fewest
    for node, fewest in (({}, 10), ({key: 4}, 4)):
        context = context_of(node_config={"site-name": "north"} | node)
        assert fewest_patients(context, Site.from_context(context), purpose) == fewest


@pytest.mark.parametrize(
    "name", [1, 1.0, "1", " 1", "1.0", "001", True, np.int64(1), LineNumber(1)]
)
def test_one_patient_however_the_number_is_written(name):
    assert patient_text(name) == "1"


@pytest.mark.parametrize("name", ["1a", "1.5", "-1", "1 1", "1_0", "one", "\u0661", b"1", (1,)])
def test_other_names_are_other_patients(name):
    assert patient_text(name) != "1"


def test_rows_of_a_patient_in_two_splits_decide_about_nobody_else():
    rows = [{"patient": name} for name in ("a", "b", "b", " 7", "c")]
    data = SiteData(train=rows[:2], val=[*rows[2:4], {"patient": None}, {}], test=[{"patient": 7}])
    found = with_patients(data)
    assert [[row["patient"] for row in part] for part in (found.train, found.val, found.test)] == [
        ["a", "b"],
        [" 7"],
        [],
    ]
