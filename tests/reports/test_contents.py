"""What a report says, without its HTML."""

import pytest

from fedmed_flower.reports import contents
from fedmed_flower.reports.summary import Total
from fedmed_flower.reports.worth import FEDERATED, Chance

SUMMARY = {
    "status": "stopped",
    "sites": {
        "north": {"train": 10, "val": 2, "test": 5},
        "south": {"train": 0, "val": 0, "test": 7, "rejected": 3},
        "west": {"train": 6, "val": 2, "test": 0},
    },
    "refused": {"no column 'age'": ["east"]},
    "test": {
        "federated": {"auc": 0.8, "auc-low": 0.7, "auc-high": 0.9, "num-examples": 12},
        "sites": {
            "north": {"auc": 0.9, "loss": 0.3, "num-examples": 5},
            "south": {"loss": 0.4, "num-examples": 7},
            "west": {"num-examples": 0},
        },
        "local": {"north": {"auc": 0.75, "all": {"auc": 0.6}}, "west": {"all": {"auc": 0.7}}},
    },
}


def test_result_names_the_worst_hospital_and_that_the_run_is_unfinished():
    result = contents.result(SUMMARY, "auc")
    assert result.metrics == {"auc": Total(0.8, (0.7, 0.9))}
    assert (result.records, result.mean, result.worst) == (12, 0.9, "north")
    assert not result.finished
    assert result.worst_patient is None


def test_table_of_hospitals():
    table = contents.hospitals(SUMMARY, "auc")
    assert {column.title: column.values for column in table.columns} == {
        "Train": {"north": 10, "south": 0, "west": 6},
        "Val": {"north": 2, "south": 0, "west": 2},
        "Test": {"north": 5, "south": 7, "west": 0},
        "Rejected": {"south": 3},
        "AUC": {"north": 0.9},
    }
    assert [column.total.value for column in table.columns] == [16, 4, 12, 3, 0.8]
    # South has test records and measured them; west has none.
    assert table.undefined == ["south"]
    assert table.untrained == {"south"}
    assert table.refused == [("no column 'age'", "east")]
    assert table.bounded


def test_comparison_is_of_hospitals_with_every_number():
    chance = Chance("auc", {})
    comparison = contents.comparison(SUMMARY, ["north", "south", "west"], chance)
    (gain,) = comparison.gains
    assert (gain.model, gain.changes) == (FEDERATED, {"north": pytest.approx(0.15)})
    assert [column.title for column in comparison.columns] == [
        *("Trained alone", "Federated", "Federated − alone"),
    ]
    assert comparison.columns[0].total == (pytest.approx(0.65), None, "mean of all models")
    assert comparison.columns[2].total.value == pytest.approx(0.15)
    assert comparison.complete == ["north"]
    assert comparison.baselines
    assert comparison.fine_tuned is None
    assert contents.comparison({"test": {}}, ["north"], chance) is None


def test_groups_of_two_columns():
    federated = {"auc@sex=f": 0.9, "auc@sex=m": 0.7, "num-examples@sex=f": 20, "auc@age=<50": 0.8}
    sites = {"north": {"auc@sex=f": 0.95, "num-examples@sex=f": 20}}
    sex, age = contents.groups({"test": {"federated": federated, "sites": sites}}, "auc")
    assert (sex.column, [group.value for group in sex.groups]) == ("sex", ["f", "m"])
    assert (sex.groups[0].records, sex.groups[0].num_sites) == (20, 1)
    assert sex.groups[0].cells == [("auc", Total(0.9), {"north": 0.95})]
    assert sex.gaps == {"auc": pytest.approx(0.2)}
    assert (age.column, age.gaps) == ("age", {})


def test_privacy_by_unit():
    assert contents.privacy({}) == contents.Privacy({}, None)
    sites = {"north": {"epsilon": 2.0, "rounds": 3}, "south": {"epsilon": 2.5}}
    patient = {"target-epsilon": 4.0, "delta": 1e-5, "sites": sites}
    sent = {"evaluate": {"north": ["metrics.noised-counts"], "south": ["metrics.auc"]}}
    privacy = contents.privacy({"privacy": {"patient": patient}, "sent": sent})
    assert privacy.patients.most == 2.5
    assert privacy.patients.by_site["north"] == (2.0, 3, None)
    assert not privacy.patients.noised
    assert not privacy.patients.baselines


def test_what_all_hospitals_sent_alike_is_one_entry():
    sent = {"train": {"north": ["metrics.loss"], "south": ["metrics.loss", "arrays.*"]}}
    entries = contents.disclosed({"sent": sent})
    assert {(entry.reply, entry.sites, len(entry.what)) for entry in entries} == {
        ("train", "all 2", 1),
        ("train", "south", 1),
    }
    assert contents.disclosed({"sent": None}) == []


def test_metrics_that_are_drawn_beside_the_main_one():
    figures = {"auc": 0.8, "accuracy": 0.7, "balanced-accuracy": 0.7, "sensitivity": 0.6}
    figures |= {"specificity": 0.9, "dice": 0.8, "hd95": 3.0, "r2": 0.4, "mae": 2.0, "rmse": 3.0}
    summary = {"test": {"federated": figures, "sites": {}}}
    assert contents.explaining(summary, "auc", 2) == ["sensitivity", "specificity"]
    assert contents.explaining(summary, "auc", 0) == ["sensitivity", "specificity"]
    assert contents.explaining(summary, "auc", 3) == ["accuracy", "balanced-accuracy"]
    assert contents.explaining(summary, "dice", 0) == ["hd95"]
    assert contents.explaining(summary, "r2", 0) == ["mae", "rmse"]
    assert contents.explaining({}, "loss", 0) == []
