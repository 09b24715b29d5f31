"""Each model at each hospital, worked out by hand."""

import copy
import json

import pytest
from crossed_runs import SITES, SUMMARY, elsewhere

from fedmed_flower.reports import crossed as room
from fedmed_flower.reports.crossed import crossed
from fedmed_flower.reports.noise import Noise


def test_rows_are_models_and_columns_the_hospitals_that_tested_them():
    found = crossed(SUMMARY, SITES, "auc")
    assert found.sites == SITES
    assert [(model.name, model.values) for model in found.models] == [
        ("north", {"north": 0.9, "south": 0.5}),
        ("south", {"south": 0.6}),
        ("west", {}),
        ("Federated", {"north": 0.8, "south": 0.7}),
        ("Own models, each at home", {"north": 0.85}),
        ("Trained on pooled data", {"north": 0.82, "south": 0.71}),
    ]
    assert [model.is_federated for model in found.models].index(True) == 3
    (alone,) = found.groups
    assert alone.at_home() == {"north": 0.9, "south": 0.6}
    assert alone.mean_elsewhere() == {"north": 0.5}
    assert found.has_stayed
    assert found.ends == (0.5, 0.9)


@pytest.mark.parametrize("kind", ["own", "personal"])
def test_models_that_hospitals_keep_are_a_group_if_one_was_tested_elsewhere(kind):
    found = crossed(elsewhere(kind), SITES, "auc")
    assert [group.kind for group in found.groups] == ["local", kind]
    kept = found.groups[1]
    north, south, west = kept.models
    # The figure at home is the one that the hospital has told of its own model.
    assert north.values == {"north": 0.95, "south": 0.65, "west": 0.55}
    assert found.why(south, "north") == room.AT_HOME
    assert found.why(south, "south") == room.NO_ANSWER
    assert west.values == {"west": 0.7}
    assert found.why(west, "north") == room.NO_ANSWER
    assert kept.at_home() == {"north": 0.95, "west": 0.7}
    assert kept.elsewhere() == {"north": {"south": 0.65, "west": 0.55}}
    assert kept.mean_elsewhere() == {"north": pytest.approx(0.6)}
    assert [model.name for model in found.others] == ["Federated", "Trained on pooled data"]
    assert found.ends == (0.5, 0.95)
    assert found.has_stayed
    assert found.silent == {}
    assert found.best("north") == "0.950"
    summary = elsewhere(kind)
    del summary["test"][kind]["south"]
    assert not crossed(summary, SITES, "auc").has_stayed


def test_what_is_missing_has_a_reason():
    found = crossed(SUMMARY, SITES, "auc")
    north, south, west, *_ = found.models
    assert found.why(north, "west") == "too few test patients, or all of one class"
    assert found.why(south, "north") == room.NO_ANSWER
    assert found.why(west, "west") == room.NOT_TRAINED
    assert found.has_gaps
    hidden = crossed(SUMMARY, SITES, "auc", Noise(frozenset({"west"}), frozenset({"west"}), False))
    assert hidden.why(north, "west") == room.NOISED
    # Nothing was tested at a hospital without test patients: it has no column.
    summary = copy.deepcopy(SUMMARY)
    del summary["test"]["sites"]["west"]
    assert crossed(summary, SITES, "auc").sites == ["north", "south"]


@pytest.mark.parametrize(
    ("metric", "best", "levels"), [("auc", "0.900", (0, 2, 8)), ("loss", "0.800", (8, 6, 0))]
)
def test_levels_and_the_best_go_by_the_direction_of_the_metric(metric, best, levels):
    text = json.dumps(SUMMARY).replace('"auc"', f'"{metric}"').replace('"loss": 1.0', '"x": 1.0')
    found = crossed(json.loads(text), SITES, metric)
    assert found.best("north") == best
    assert tuple(map(found.level, (0.5, 0.6, 0.9))) == levels
    assert found.best("west") == ""


def test_equal_figures_are_in_the_middle():
    local = {site: {"sites": {site: {"auc": 0.5}}} for site in SITES}
    found = crossed({"test": {"local": local}}, SITES, "auc")
    assert found.level(0.5) == 4
    assert found.best("north") == ""


def test_runs_without_such_a_table_have_none():
    before = {"test": {"local": {"north": {"auc": 0.8, "all": {"auc": 0.7}}}}}
    assert crossed(before, SITES, "auc") is None
    assert crossed({}, SITES, "auc") is None
    assert crossed({"test": {"local": {"north": {"sites": {}}}}}, SITES, "auc") is None
    # Too many models for a summary.
    summary = elsewhere("own")
    for metrics in summary["test"]["local"].values():
        metrics["sites"] = {}
    assert crossed(summary, SITES, "auc") is None
    for odd in (
        "text",
        [1],
        {"north": "text"},
        {"north": {"auc": "text"}},
        {"north": {"auc": 1e99}},
    ):
        assert crossed({"test": {"local": {"north": {"sites": odd}}}}, SITES, "auc") is None
        summary = copy.deepcopy(SUMMARY)
        summary["test"]["own"]["north"]["sites"] = odd
        (north,) = crossed(summary, SITES, "auc").groups[1].models
        assert north.values == {"north": 0.85}
