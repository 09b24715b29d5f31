"""What the report says in plain words, worked out by hand."""

import copy

import pytest
from scipy.stats import binomtest

from fedmed_flower.metrics.classification import noised_counts
from fedmed_flower.metrics.counts import counted
from fedmed_flower.metrics.outcomes import outcome_metrics
from fedmed_flower.metrics.pooling import pool
from fedmed_flower.reports import words as room
from fedmed_flower.reports.tested import estimates

NAMES = ("normal", "pneumonia")


def words(summary, main, counts):
    return room.words(summary, counts, estimates(summary, counts, main))


def record(sick, found, healthy, alarms):
    """A hospital where `found` of `sick` are recognised, with `alarms` among the healthy."""
    labels = [1] * sick + [0] * healthy
    scores = [2.0] * found + [-1.0] * (sick - found)
    scores += [1.0] * alarms + [-2.0] * (healthy - alarms)
    return outcome_metrics("binary", labels, scores)


def run(**sites):
    """Return the summary and the counts of a run in which each site has the given counts."""
    records = {site: record(*numbers) for site, numbers in sites.items()}
    numbers = {
        site: {name: value for name, value in found.items() if not isinstance(value, list)}
        for site, found in records.items()
    }
    summary = {
        "status": "finished",
        "rounds": 3,
        "engine": "Flower deployment",
        "sites": {site: {"train": 1000, "val": 50, "test": 100} for site in sites},
        "trained": dict.fromkeys(sites, 3),
        "test": {"federated": pool([*records.values()]), "sites": numbers},
        "failures": [],
    }
    return summary, counted(records, NAMES)


NORTH_AND_SOUTH = {"north": (100, 93, 60, 3), "south": (50, 40, 40, 10)}


def test_a_run_in_everyday_words():
    summary, counts = run(**NORTH_AND_SOUTH)
    said = words(summary, "auc", counts)
    assert said.trained == [
        "2 hospitals trained one model together, in 3 rounds and on 2,000 training records.",
        "The model tells “pneumonia” from “normal”.",
        "No record left a hospital; what did is listed below.",
    ]
    # 133 of 150 are 88.7%; 87 of 100 are 87%. Wilson's intervals, by SciPy.
    for right, rows, ends in ((133, 150, (83, 93)), (87, 100, (79, 92))):
        interval = binomtest(right, rows).proportion_ci(method="wilson")
        assert (round(100 * interval.low), round(100 * interval.high)) == ends
    assert said.quality[:4] == [
        "It was tested on 250 records kept apart from training.",
        "Of 150 test records of “pneumonia” it recognised 133: about 89 of 100 "
        "(95% interval 83 to 93).",
        "Of 100 test records of “normal” it rightly said so of 87: about 87 of 100 "
        "(95% interval 79 to 92).",
        "It says “pneumonia” if it takes this to be likelier than not; another threshold gives "
        "other shares.",
    ]
    assert said.quality[-1].endswith("how good the model is elsewhere is not known.")
    assert said.part == ["All 2 hospitals trained in each of the 3 rounds."]
    assert said.privacy == [
        "No noise protects single patients: how much could be inferred about one of them is not "
        "bounded."
    ]


def test_the_auc_as_pairs_and_the_worst_hospital_with_its_interval():
    summary, counts = run(**NORTH_AND_SOUTH)
    said = words(summary, "auc", counts)
    (worst,) = said.worst
    # Of 50 · 40 pairs 40 · (30 + 10) are in order: a recognised one is above every healthy one.
    # A missed one is above the 30 without alarm: 10 · 30 more. That is 1,900 of 2,000.
    assert worst.startswith("It did worst at south: AUC 0.950 on 90 test records (95% interval 0.")
    # Likewise of 150 · 100 pairs 133 · 100 + 17 · 87.
    assert (
        "gives the right one the higher score in 99 of 100 such pairs (AUC 0.985; 50 of 100 would "
        "be chance)."
    ) in said.quality[4]


def test_few_records_give_no_share_of_100():
    summary, counts = run(north=(29, 20, 30, 3))
    quality = words(summary, "auc", counts).quality
    assert quality[1] == (
        "Of 29 test records of “pneumonia” it recognised 20 (too few to say how many of 100)."
    )
    assert "about 90 of 100" in quality[2]


def test_all_is_said_only_of_all():
    summary, counts = run(north=(400, 399, 40, 0))
    quality = words(summary, "auc", counts).quality
    assert "recognised 399: more than 99 of 100 (95% interval 99 to 100)." in quality[1]
    assert "said so of 40: all of them (95% interval 91 to 100)." in quality[2]
    summary, counts = run(north=(400, 1, 40, 40))
    quality = words(summary, "auc", counts).quality
    assert "recognised 1: fewer than 1 of 100" in quality[1]
    assert "said so of 0: none of them" in quality[2]


def test_a_difference_that_chance_explains_is_said_so():
    summary, counts = run(north=(100, 90, 100, 10), south=(12, 10, 12, 3))
    (worst,) = words(summary, "auc", counts).worst
    assert "That can be chance: the interval holds the" in worst
    summary, counts = run(north=(500, 490, 500, 10), south=(500, 300, 500, 200))
    (worst,) = words(summary, "auc", counts).worst
    assert "chance" not in worst


def test_without_counts_nothing_is_counted():
    summary, _ = run(**NORTH_AND_SOUTH)
    said = words(summary, "auc", None)
    assert not [sentence for sentence in said.quality if "recognised" in sentence]
    assert "(95%" not in said.worst[0]


def test_noise_takes_away_the_shares_and_the_intervals():
    labels = [0, 1] * 100
    outputs = [[2.0 * label - 1] for label in labels]
    patients = [str(number) for number in range(200)]
    records = {
        site: {"num-examples": 200, "noised-counts": noised_counts(labels, outputs, patients, 0.1)}
        for site in ("north", "south")
    }
    summary, _ = run(**NORTH_AND_SOUTH)
    summary["test"] = {
        "federated": {"auc": 0.9, "num-examples": 401},
        "sites": {site: {"auc": 0.9, "num-examples": 200} for site in records},
    }
    patient = {"target-epsilon": 8.0, "delta": 1e-5, "sites": {"north": {"epsilon": 7.5}}}
    summary["privacy"] = {"patient": patient}
    said = words(summary, "auc", counted(records, NAMES))
    text = " ".join(said.quality + said.worst)
    # What the hospitals said at the start, not the 401 that were counted with noise.
    assert "It was tested on 200 patients kept apart from training." in text
    assert "Its AUC is 0.900 (counted with noise); 0.500 would be chance" in text
    assert "The counts of the test carry noise that protects patients." in text
    assert "recognised" not in text
    assert "(95%" not in text
    assert "of 100 such pairs" not in text
    assert said.privacy == [
        "Each training patient is protected by noise. The run may spend an epsilon of 8.0 a "
        "patient; spent: 7.500 at most. The smaller the epsilon, the less can be learned about "
        "any one patient."
    ]


def test_generated_data_pictures_and_simulation_are_said():
    summary, counts = run(**NORTH_AND_SOUTH)
    summary |= {"generated": True, "engine": "local", "pictures": [{"site": "north"}]}
    said = words(summary, "auc", counts)
    assert said.trained[0] == (
        "All data of this run are generated: its figures say nothing about patients."
    )
    assert "The hospitals were simulated on one computer." in said.trained
    assert said.trained[-1].startswith("Besides the pictures below no record left a hospital")
    assert "elsewhere" not in " ".join(said.quality)


def test_who_was_left_out():
    summary, counts = run(**NORTH_AND_SOUTH)
    summary["trained"]["south"] = 1
    summary["sites"]["west"] = {"train": 0, "val": 0, "test": 9}
    summary["refused"] = {"no column": ["east", "far east"]}
    summary["failures"] = [{"round": 2, "phase": "train", "site": "south", "reason": "OSError"}]
    said = words(summary | {"status": "stopped"}, "auc", counts)
    assert said.part == [
        "1 of 2 hospitals did not train in each of the 3 rounds: south in 1.",
        "1 hospital only tested the model.",
        "2 hospitals could not take part.",
        "1 hospital failed at least once; see what failed.",
    ]
    assert said.trained[-1] == (
        "The run did not finish, so that the model is not what was planned."
    )


def test_own_models_are_compared():
    summary, counts = run(**NORTH_AND_SOUTH)
    summary["test"]["local"] = {"north": {"auc": 0.5}, "south": {"auc": 0.99}}
    assert words(summary, "auc", counts).worst[-1] == (
        "1 of 2 hospitals is better served by the federated model than by one trained on their own "
        "records alone; none is worse served, and at 1 the difference is no more than chance can "
        "make."
    )


@pytest.mark.parametrize(
    ("main", "value", "sentence"),
    [
        ("dice", 0.815, "overlap with a Dice of 0.815 on average; 1 is the same outline"),
        ("c-index", 0.762, "had the event first in 76 of 100 pairs (50 would be chance)."),
        ("r2", 0.448, "It explains 45% of the variance; 0% is as good as the mean."),
        ("mae", 3.25, "On average it is wrong by 3.250, in the unit of what it predicts."),
        ("loss", 0.5, "Its loss is 0.500."),
    ],
)
def test_other_metrics(main, value, sentence):
    summary, _ = run(**NORTH_AND_SOUTH)
    summary["test"] = {"federated": {main: value}, "sites": {"north": {main: value}}}
    assert sentence in words(summary, main, None).quality[0]


def test_more_classes_and_coarse_reports():
    summary, _ = run(**NORTH_AND_SOUTH)
    labels = [0, 1, 2] * 20
    outputs = [[3.0 * (label == column) for column in range(3)] for label in labels]
    outputs[0] = [0.0, 1.0, 0.0]
    records = {"north": outcome_metrics("multi-class", labels, outputs)}
    summary["test"]["sites"] = {"north": {"auc": 0.9}}
    counts = counted(records)
    said = words(summary, "auc", counts)
    assert "The model tells 3 classes apart." in said.trained
    assert "It named the right class for 59 of 60 test records: about 98 of 100" in said.quality[1]
    summary["test"]["federated"] |= {"auc-low": 0.85, "auc-high": 0.95}
    said = words(summary, "auc", None)
    assert "that is an estimate between 0.850 and 0.950." in " ".join(said.quality)


def test_a_run_that_says_nothing_is_not_spoken_for():
    said = words({"status": "failed"}, "loss", None)
    assert said.trained == ["The run did not finish, so that the model is not what was planned."]
    assert said.quality == ["No model was tested."]
    assert not said.worst
    assert not said.part


def test_the_summary_is_not_changed():
    summary, counts = run(**NORTH_AND_SOUTH)
    before = copy.deepcopy(summary)
    words(summary, "auc", counts)
    assert summary == before
