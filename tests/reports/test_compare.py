import json
import re

import pytest
from html_pages import Page
from run_folders import SITES, write_run

from fedmed_flower.errors import InputError
from fedmed_flower.reports.compare import write_comparison
from fedmed_flower.reports.several import MOST_RUNS, cautions, read_runs, settings


def compared(tmp_path, *folders):
    page = write_comparison(folders, tmp_path / "compare.html").read_text()
    return page, Page(page)


@pytest.fixture
def two(tmp_path):
    """Two runs on the same rows, of which the second reaches less."""
    first = write_run(tmp_path / "first")
    second = write_run(
        tmp_path / "second",
        config={"learning-rate": 0.5, "seed": 7, "run-dir": "/elsewhere"},
        seconds=10.0,
        failures=[{"round": 1, "phase": "train", "site": "hospital-2", "reason": "OSError"}],
    )
    summary = json.loads((second / "summary.json").read_text())
    summary["test"]["federated"]["auc"] -= 0.1
    summary["test"]["sites"]["hospital-2"]["auc"] -= 0.3
    (second / "summary.json").write_text(json.dumps(summary))
    return first, second


def test_metrics_stand_side_by_side_with_intervals_and_differences(tmp_path, two):
    _, page = compared(tmp_path, *two)
    auc = json.loads((two[0] / "summary.json").read_text())["test"]["federated"]["auc"]
    first, second = page.table("The federated model on all test records")["AUC"]
    assert re.fullmatch(rf"{auc:.3f} 0\.\d{{3}} to 0\.\d{{3}}", first)
    assert re.fullmatch(rf"{auc - 0.1:.3f} 0\.\d{{3}} to 0\.\d{{3}} −0\.100", second)
    assert f"AUC, higher is better: first {auc:.3f}, second {auc - 0.1:.3f} (−0.100)." in page.text
    assert not [caption for caption in page.tables if "that a hospital uses" in caption]


def test_own_models_of_a_run_are_compared_with_what_the_hospitals_of_another_use(tmp_path, two):
    second = json.loads((two[1] / "summary.json").read_text())
    second["test"]["own"] = {"hospital-1": {"auc": 0.95}, "hospital-2": {"auc": 0.9}}
    (two[1] / "summary.json").write_text(json.dumps(second))
    _, page = compared(tmp_path, *two)
    table = page.table("AUC of the model that a hospital uses")
    assert table["Hospital"] == ["first", "second", "second − first"]
    first = json.loads((two[0] / "summary.json").read_text())["test"]["sites"]["hospital-1"]["auc"]
    shown = f"{0.95 - first:+.3f}".replace("-", "−")
    assert table["hospital-1"] == [f"{first:.3f}", "0.950", shown]
    # This one keeps no model of its own: it uses the federated one.
    same = second["test"]["sites"]["hospital-10"]["auc"]
    assert table["hospital-10"] == [f"{same:.3f}", f"{same:.3f}", "+0.000"]
    assert "All records together" not in table


def test_each_hospital_has_its_difference_to_the_first_run(tmp_path, two):
    _, page = compared(tmp_path, *two)
    table = page.table("AUC on each hospital’s own test records")
    assert table["Hospital"] == ["first", "second", "second − first"]
    assert [*table][1:4] == ["hospital-1", "hospital-2", "hospital-10"]
    assert [table[site][2] for site in SITES] == ["+0.000", "−0.300", "+0.000"]
    assert table["Worst hospital"][2] == "−0.300 hospital-2"
    assert table["All records together"][2] == "−0.100"
    # A row for each hospital, with a dot for each run.
    assert page.text.count("AUC on the hospital’s own test records") == 1


def test_only_settings_that_differ_stand_in_the_open(tmp_path, two):
    _, page = compared(tmp_path, *two)
    assert page.table("What differs") == {
        "Setting": ["first", "second"],
        "learning-rate": ["0.01", "0.5"],
    }
    same = page.table("What is the same")
    assert same["strategy"] == ["FedAvg"]
    assert same["version of flwr"] == ["1.41.0"]
    assert "run-dir" not in same
    assert "/elsewhere" not in page.text


def test_a_setting_that_one_run_lacks_and_true_beside_1_differ(tmp_path):
    write_run(tmp_path / "a", config={"x": True})
    write_run(tmp_path / "b", config={"x": 1, "y": 2})
    differing = settings(read_runs([tmp_path / "a", tmp_path / "b"])).differing
    assert differing == {"x": [True, 1], "y": [None, 2]}


def test_rounds_are_drawn_over_each_other(tmp_path, two):
    page, parsed = compared(tmp_path, *two)
    labels = [tag[1].get("aria-label") for tag in parsed.tags if tag[0] == "svg"]
    assert "Validation AUC over 2 rounds" in labels
    assert "Training loss over 2 rounds" in labels
    assert page.count("<figure") >= 3


def test_cost_failures_and_privacy_of_each_run(tmp_path, two):
    sites = {"hospital-1": {"epsilon": 2.5, "rounds": 2, "declined": 0}}
    patient = {"target-epsilon": 3.0, "delta": 1e-5, "sites": sites}
    privacy = {"patient": patient, "hospital": {"epsilon": 1.5, "delta": 1e-3}}
    third = write_run(tmp_path / "third", privacy=privacy)
    page = Page(write_comparison([*two, third], tmp_path / "page.html").read_text())
    cost = page.table("Time of the whole run")
    assert cost["first"] == ["2", "1:02:05", "12", "15.00", "6.00"]
    assert cost["second"][1] == "0:00:10"
    failed = page.table("In all rounds")
    assert failed["second"] == ["1", "hospital-2", "OSError", "–"]
    assert failed["first"] == ["0", "–", "–", "–"]
    rows = next(rows for caption, rows in page.tables.items() if caption == "Differential privacy")
    assert rows[1][1].startswith("none: nothing bounds")
    assert rows[3][1:] == ["one hospital", "the server", "–", "0.001", "1.500"]
    assert rows[4][1:] == ["one patient", "each hospital", "3.0", "1e-05", "2.500"]


def test_the_same_test_patients_are_said_to_be_the_same(tmp_path, two):
    _, page = compared(tmp_path, *two)
    assert "are the same in all runs, and so are the test patients" in " ".join(page.text.split())
    for folder in two:
        for file in (folder / "splits").iterdir():
            file.unlink()
    _, page = compared(tmp_path, *two)
    assert "whether the patients are the same is not recorded" in page.text


@pytest.mark.parametrize(
    ("changed", "caution"),
    [
        ({"sizes": {"hospital-1": 150, "new": 80}}, "new took part in other and not in first."),
        ({"sizes": SITES | {"hospital-2": 80}}, "The test records of hospital-2 are not the same"),
        ({"data": "elsewhere"}, "other and first have different data: elsewhere and made up."),
        ({"app": "heart"}, "other and first are of different apps: heart and chest."),
        ({"status": "failed"}, "other is failed: its numbers are of an unfinished model."),
        ({"generated": True}, "Generated data, not patients: other."),
        ({"classes": 3}, "other and first predict different classes."),
    ],
)
def test_runs_that_cannot_simply_be_compared_have_a_caution(tmp_path, two, changed, caution):
    other = write_run(tmp_path / "other", **changed)
    assert any(words.startswith(caution) for words in cautions(read_runs([two[0], other])))
    page, _ = compared(tmp_path, two[0], other)
    assert "Not alike in all but their settings" in page


def test_other_test_patients_in_the_same_number_are_noticed(tmp_path, two):
    split = two[1] / "splits" / "hospital-10.csv"
    split.write_text(split.read_text().replace("hospital-10-3,test", "hospital-10-99,test"))
    (caution,) = cautions(read_runs(two))
    assert caution.startswith("The test records of hospital-10 are not the same in second and")


def test_runs_without_results_counts_or_rounds_still_have_a_page(tmp_path, two):
    empty = write_run(tmp_path / "empty", status="running", test={}, traffic=None, failures=None)
    for file in ("counts.json", "metrics.csv"):
        (empty / file).unlink()
    _, page = compared(tmp_path, two[0], empty)
    assert page.table("The federated model on all test records")["AUC"][1] == "–"
    assert page.table("In all rounds")["empty"][0] == "not recorded"
    assert page.table("Time of the whole run")["empty"][2:] == ["–", "–", "–"]
    other = write_run(tmp_path / "nothing", test={})
    (other / "metrics.csv").unlink()
    _, page = compared(tmp_path, empty, other)
    assert "No run has test results." in page.text
    assert "No run has recorded a metric of its rounds." in page.text


def test_hostile_texts_make_no_markup_and_the_page_loads_nothing(tmp_path, two):
    evil = "<img src=x onerror=alert(1)>\"'<script>"
    folder = write_run(
        tmp_path / "<b>run",
        app=evil,
        data=evil,
        status=evil,
        started=evil,
        message=evil,
        strategy=evil,
        config={evil: evil},
        versions={evil: evil},
        failures=[{"site": evil, "reason": evil}],
        privacy={"patient": {"target-epsilon": evil, "delta": evil, "sites": {}}},
    )
    text = (folder / "summary.json").read_text().replace('"hospital-1"', json.dumps(evil))
    (folder / "summary.json").write_text(text)
    page, parsed = compared(tmp_path, two[0], folder)
    assert not {"img", "link", "iframe"} & {tag for tag, _ in parsed.tags}
    # The page's own script, which the policy names by its digest.
    assert [tag for tag, _ in parsed.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert "default-src 'none'" in page
    links = [attrs[key] for _, attrs in parsed.tags for key in attrs if key.endswith("href")]
    assert all(link.startswith("#") for link in links)


def test_runs_of_one_folder_name_are_called_by_their_paths(tmp_path):
    folders = [write_run(tmp_path / name / "run") for name in ("a", "b")]
    assert [run.label for run in read_runs(folders)] == [*map(str, folders)]


def test_what_cannot_be_compared_is_refused_in_words(tmp_path, two):
    first, second = two
    with pytest.raises(InputError, match=f"takes 2 to {MOST_RUNS} run folders, got 1"):
        read_runs([first])
    with pytest.raises(InputError, match=f"got {MOST_RUNS + 1}"):
        read_runs([first] * (MOST_RUNS + 1))
    with pytest.raises(InputError, match="first is given more than once"):
        read_runs([first, second, first / ".." / "first"])
    with pytest.raises(InputError, match=r"nowhere.*give the folders of runs that"):
        read_runs([first, tmp_path / "nowhere"])
    masks = write_run(tmp_path / "masks", test={"federated": {"dice": 0.5}, "sites": {}})
    with pytest.raises(InputError, match=r"first is judged by auc and .*masks by dice: runs"):
        read_runs([first, masks])
    table = write_run(tmp_path / "table", kind="statistics")
    with pytest.raises(InputError, match="table is a run of the kind 'statistics'"):
        read_runs([first, table])
    (second / "metrics.csv").write_text("round,phase,site,metric,value\nx,val,all,auc,1\n")
    with pytest.raises(InputError, match=r"second/metrics\.csv line 2 is not a metric"):
        read_runs(two)


def test_a_page_that_cannot_be_written_is_refused_in_words(two):
    with pytest.raises(InputError, match=r"cannot be written .*: give another file with --out"):
        write_comparison(two, two[0])


def test_many_hospitals_are_folded_away(tmp_path):
    sizes = {f"hospital-{number}": 30 for number in range(31)}
    folders = [write_run(tmp_path / name, sizes=sizes) for name in ("a", "b")]
    page, parsed = compared(tmp_path, *folders)
    assert "All 31 hospitals" in page
    assert "Lower quartile" in parsed.table("AUC on each")


def test_figures_that_noise_makes_are_not_compared(tmp_path):
    first = write_run(tmp_path / "first")
    noised = write_run(tmp_path / "noised", noise=1.0, sizes={"hospital-1": 30, "hospital-2": 47})
    runs = read_runs([first, noised])
    assert [caution for caution in cautions(runs) if caution.startswith("Tested by counts")] == [
        "Tested by counts with noise: noised. Small differences mean nothing, and figures of too "
        "few patients are left out."
    ]
    page = Page(write_comparison([first, noised], tmp_path / "out.html").read_text())
    assert page.table("The federated model on all test")["AUC"][1] == "–"
