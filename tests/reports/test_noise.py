import numpy as np
import pytest
from run_folders import rows_of, write_run

from fedmed_flower.metrics.classification import noised_counts, noised_metrics
from fedmed_flower.metrics.counts import counted
from fedmed_flower.metrics.names import NOISED
from fedmed_flower.reports.noise import MOST_ERROR, Noise, error, noise_of, number_tested, told
from fedmed_flower.reports.report import write_report

SENT = {"evaluate": {"north": ["metrics.noised-dice"], "south": ["metrics.noised-dice"]}}


def record(size, noise, seed=0, classes=2):
    labels, outputs = rows_of(size, classes, seed)
    return {NOISED: noised_counts(labels, outputs.reshape(size, -1), range(size), noise)}


def summary_of(north, south, **test):
    sites = {"north": {"num-examples": 7, "dice": 0.8}, "south": {"num-examples": 9, "dice": 0.7}}
    return {
        "sites": {"north": {"test": north}, "south": {"test": south}},
        "test": {"federated": {"num-examples": 16, "dice": 0.75}, "sites": sites} | test,
        "sent": SENT,
    }


def test_the_error_is_that_of_the_standard_deviations_of_both_sums():
    # Of 32 counts each 16 are 2 below 0, the others 6 above it: 64 patients.
    counts = [-2.0, 6.0] * 32
    assert error([{NOISED: counts}]) == pytest.approx(2 * np.sqrt(32) * np.sqrt(2) / 64)
    # With two such hospitals the noise grows with the root, the patients double.
    assert error([{NOISED: counts}] * 2) == pytest.approx(2 * np.sqrt(32) / 64)
    assert error([{NOISED: [0.0, 6.0] * 32}]) == 0
    assert error([{NOISED: [-1.0] * 32 + [3.0] * 32}]) == np.inf


@pytest.mark.parametrize(("size", "noise"), [(110, 0.7), (300, 1.0), (300, 2.0)])
def test_the_error_is_how_far_noise_moves_the_auc_19_times_of_20(size, noise):
    labels, outputs = rows_of(size)

    def measured(scale):
        counts = noised_counts(labels, outputs[:, None], range(size), scale)
        return noised_metrics(counts)["auc"], error([{NOISED: counts}])

    exact, _ = measured(0.0)
    found = [measured(noise) for _ in range(300)]
    moved = float(np.quantile([abs(auc - exact) for auc, _ in found], 0.95))
    # 300 draws leave the quantile itself uncertain.
    assert 0.5 * moved < np.median([each for _, each in found]) < 2 * moved


def test_every_class_must_stand_out_of_the_noise():
    assert error([record(3000, 0.1, classes=3)]) < 0.01
    counts = np.asarray(record(3000, 0.1, classes=3)[NOISED])
    counts[32:64] = 0.0
    assert error([{NOISED: counts.tolist()}]) == np.inf


def test_hospitals_of_few_patients_are_hidden_and_all_together_need_not_be():
    records = {"north": record(40, 0.5), "south": record(5000, 0.5, seed=1)}
    assert error([records["north"]]) > MOST_ERROR
    summary = summary_of(40, 5000)
    noise = noise_of(summary, counted(records))
    assert noise == Noise(frozenset(records), frozenset({"north"}), False)
    shown = told(summary, noise)["test"]
    assert shown["sites"] == {
        "north": {"num-examples": 7},
        "south": {"num-examples": 9, "dice": 0.7},
    }
    assert shown["federated"] == {"num-examples": 16, "dice": 0.75}


@pytest.mark.parametrize(
    ("north", "south", "hidden", "hides_total"),
    [(99, 100, {"north"}, False), (100, 100, set(), False), (70, 71, {"north", "south"}, True)],
)
def test_without_counts_the_number_of_test_patients_decides(north, south, hidden, hides_total):
    # 100 times the root of 2 is 141.4.
    noise = noise_of(summary_of(north, south), None)
    assert noise == Noise(frozenset({"north", "south"}), frozenset(hidden), hides_total)


def test_only_tested_hospitals_that_sent_counts_with_noise_count():
    summary = summary_of(50, 50)
    assert noise_of(summary | {"sent": {}}, None) is None
    assert (
        noise_of(summary | {"sent": {"evaluate": {"east": ["metrics.noised-dice"]}}}, None) is None
    )
    exact = {"evaluate": {"north": ["metrics.dice"], "south": ["metrics.noised-dice"]}}
    assert noise_of(summary | {"sent": exact}, None).sites == {"south"}


def test_other_models_are_hidden_with_the_hospital_they_were_tested_at():
    models = {
        "local": {
            "north": {"dice": 0.6, "all": {"dice": 0.5}},
            "south": {"dice": 0.6, "all": {"dice": 0.5}},
        },
        "personal": {"north": {"dice": 0.6}},
        "pooled": {"dice": 0.9, "sites": {"north": {"dice": 0.6}, "south": {"dice": 0.7}}},
    }
    summary = summary_of(50, 200, **models)
    shown = told(summary, Noise(frozenset({"north"}), frozenset({"north"}), False))["test"]
    assert shown["local"] == {"south": models["local"]["south"]}
    assert "personal" not in shown
    assert shown["pooled"] == {"dice": 0.9, "sites": {"south": {"dice": 0.7}}}
    shown = told(summary, Noise(frozenset({"north"}), frozenset(), True))["test"]
    assert shown["local"]["south"] == {"dice": 0.6}
    assert shown["pooled"] == {"sites": models["pooled"]["sites"]}
    every = Noise(frozenset({"north", "south"}), frozenset({"north", "south"}), True)
    assert told(summary, every)["test"].keys() == {"federated", "sites"}
    assert told(summary, None) is summary


def test_no_model_is_told_at_a_hospital_whose_noise_hides_it():
    at_each = {"north": {"dice": 0.4}, "south": {"dice": 0.5}}
    models = {
        "local": {site: {"dice": 0.6, "all": {"dice": 0.5}, "sites": at_each} for site in at_each},
        "own": {site: {"dice": 0.7} for site in at_each},
    }
    noise = Noise(frozenset({"north"}), frozenset({"north"}), False)
    shown = told(summary_of(50, 200, **models), noise)["test"]
    seen = {"sites": {"south": {"dice": 0.5}}}
    # North's own model may be told of where it was tested by others.
    assert shown["local"] == {"north": seen, "south": {"dice": 0.6, "all": {"dice": 0.5}} | seen}
    assert shown["own"] == {"south": {"dice": 0.7}}
    both = Noise(frozenset(at_each), frozenset(at_each), True)
    assert not {"local", "own"} & told(summary_of(50, 50, **models), both)["test"].keys()


def test_the_number_of_test_patients_is_that_of_the_table_of_hospitals():
    summary = summary_of(50, 61)
    noise = noise_of(summary, None)
    assert number_tested(summary, noise) == 111
    assert number_tested(summary, None) == 16
    assert number_tested(summary | {"sites": {"north": {"test": 50}}}, noise) == 16


def test_a_run_of_few_patients_hides_all(tmp_path):
    folder = write_run(tmp_path, noise=1.0, sizes={"a": 30, "b": 34, "c": 47})
    page = write_report(folder).read_text()
    words = " ".join(page.split())
    assert "<b>–</b><small>counted with noise, which is too large to tell</small>" in words
    assert words.count("so no figure is given") == 2
    assert "It was tested on 111 patients kept apart from training." in words
    assert "one class only" not in words
    assert "reaches" not in words
    assert "How well it tells the classes apart" not in words


def test_a_run_of_many_patients_marks_its_figures(tmp_path):
    folder = write_run(tmp_path, noise=0.5, sizes={"a": 30, "b": 3000})
    words = " ".join(write_report(folder).read_text().split())
    assert words.count("</b><small>counted with noise</small>") == 3
    assert "On 3,030 test patients of all hospitals together the federated model reaches" in words
    assert "(counted with noise); 0.500 would be chance" in words
    assert "† too few test patients to tell by counts with noise." in words
    assert "one class only" not in words
    assert "Validation figures are counted with noise" in words
