from pathlib import Path

import pytest
from tiny import context_of, says

from fedmed_flower.data.site import Site, SiteData, min_cell_count
from fedmed_flower.errors import InputError


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
    with pytest.raises(InputError, match=says("site-name must not be empty")):
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
        ({"min-cell-count": -2}, -3, "min-cell-count must be at least 1, got -2"),
        ({}, "ten", "min-cell-count must be of type int, got 'ten'"),
        ({"min-cell-count": 1.5}, 1, "min-cell-count must be of type int, got 1.5"),
        ({"min-cell-count": True}, 1, "min-cell-count must be of type int, got True"),
    ],
)
def test_a_wrong_fewest_number_of_patients(node, run, text):
    context = context_of(
        node_config={"partition-id": 0, "num-partitions": 2} | node, min_cell_count=run
    )
    with pytest.raises(InputError, match=says(text)):
        min_cell_count(context, Site.from_context(context))
