"""`fedmed list` names what there is, and what it says of each name is so."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedmed_flower import strategies
from fedmed_flower.cli.listing import examples
from fedmed_flower.cli.main import app
from fedmed_flower.cli.options import MEANINGS
from fedmed_flower.data import cohorts, decathlon, sources
from fedmed_flower.data.catalog import DATA_SETS
from fedmed_flower.data.sources import DATASETS
from fedmed_flower.models.catalog import NETWORKS
from fedmed_flower.models.networks import known_networks

ROOT = Path(__file__).parents[2]


def listed(*arguments):
    result = CliRunner().invoke(app, ["list", *arguments])
    return result.exit_code, result.output


def rows(*arguments):
    """Return the cells of each row of a table, by its first."""
    code, output = listed(*arguments)
    assert code == 0, output
    lines = [line for line in output.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    # In a pipe each row is one line.
    assert all(cell[0] for cell in cells)
    return {first: rest for first, *rest in cells}


def test_strategies_have_the_first_line_of_their_docs():
    table = rows("strategies")
    assert [*table] == strategies.__all__
    assert table["Krum"] == ["The most trustworthy update alone (multi_krum)."]
    for name, (text,) in table.items():
        about = inspect.getdoc(getattr(strategies, name))
        assert text == about.partition("\n")[0].replace("`", "")


def test_networks_are_monais_and_the_others_are_named_once():
    assert [*rows("networks")] == [network.name for network in NETWORKS]
    _, output = listed("networks")
    others = output.splitlines()[-1].partition("not tested: ")[2].split(", ")
    known = known_networks()
    named = [network.name for network in NETWORKS] + others
    assert len(named) == len({known[name] for name in named}) == len({*known.values()})
    assert {"AHNet", "ViT", "SENet154"} <= {*others}


def test_examples_and_templates_are_those_in_their_folders():
    found = {path.name for path in (ROOT / "examples").iterdir() if path.is_dir()}
    assert {*rows("examples")} == found
    assert examples() == ROOT / "examples"
    assert rows("examples")["heart"] == [
        "Four hospitals predict heart disease from health records."
    ]
    table = rows("templates")
    assert {kind: cells[0] for kind, cells in table.items()} == {**MEANINGS}
    assert table["images"][1] == "A hospital that learns from its X-rays who has pneumonia."


def test_each_data_set_can_be_loaded_by_its_name():
    for data in DATA_SETS:
        if data.name.startswith("examples/"):
            assert (ROOT / data.name / "client_app.py").is_file()
            continue
        path, _, argument = data.name.partition("(")
        room, _, name = f"fedmed_flower.data.{path}".rpartition(".")
        assert callable(getattr(importlib.import_module(room), name))
        if argument:
            assert argument.strip('")') in DATASETS
    assert [*rows("datasets")] == [data.name for data in DATA_SETS]


@pytest.mark.realdata
def test_the_numbers_of_each_data_set_are_those_of_its_files():
    what = {data.name: data.what for data in DATA_SETS}

    def counts(name):
        return [int(text.replace(",", "")) for text in re.findall(r"\b\d[\d,]*\d\b", what[name])]

    for name in ("pneumoniamnist", "breastmnist"):
        labels = sources.load_dataset(name).labels
        assert counts(f'load_dataset("{name}")')[0] == sum(map(len, labels.values()))
    assert counts("load_hippocampus") == [len(decathlon.load_hippocampus().rows)]
    tables, _ = cohorts.heart_disease()
    patients = sum(map(len, tables.values()))
    columns = len(next(iter(tables.values())).columns) - 2
    assert counts("cohorts.heart_disease") == [patients, columns]
    frame = cohorts.breast_cancer()
    assert counts("cohorts.breast_cancer") == [len(frame), 1 + len(cohorts.TCGA_FLAGS)]
    stays = cohorts.intensive_care()
    columns = len(cohorts.ICU_RANGES) + len(cohorts.ICU_FLAGS) + len(("gender", "unit"))
    assert counts("cohorts.intensive_care") == [len(stays), stays["hospital"].nunique(), columns]


def test_an_unknown_list_is_refused_with_the_nearest_name():
    code, output = listed("strategy")
    assert code == 2
    assert "there is no list of 'strategy': did you mean strategies?" in output
    code, output = listed("xyz")
    assert code == 2
    assert "known: strategies, networks, datasets, examples, templates" in output


def test_without_a_name_all_lists_come():
    code, output = listed()
    assert code == 0, output
    lines = output.splitlines()
    titles = ("Strategies", "Networks", "Data sets", "Example apps", "Templates")
    for title in titles:
        assert any(line.startswith(title) for line in lines)
