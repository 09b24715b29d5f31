import json
import re

import pytest
from markdown_it import MarkdownIt
from run_folders import SITES, write_run

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.counts import read_counts
from fedmed_flower.metrics.curves import auc_interval
from fedmed_flower.reports import tripod
from fedmed_flower.reports.card import card, write_card
from fedmed_flower.reports.scores import joined


def sections(text):
    """The parts of a card by their headings."""
    parts = re.split(r"(?m)^## (.*)$", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def cells(text, start):
    """The cells of the first row of a table whose first cell is `start`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def test_a_card_states_results_with_intervals_overall_and_by_hospital(run):
    text = card(run)
    results = sections(text)["Results"]
    test = json.loads((run / "summary.json").read_text())["test"]
    counts = read_counts(run)
    ((_, with_class, without),) = joined(counts)
    interval = auc_interval(with_class, without)
    shown = f"{test['federated']['auc']:.3f} ({interval.low:.3f} to {interval.high:.3f})"
    assert cells(results, "AUC") == [shown, "higher"]
    assert f"it reaches AUC {shown}." in sections(text)["Summary"]
    assert cells(results, "Brier score") == [f"{test['federated']['brier']:.3f}", "lower"]
    by_hospital = results.partition("### By hospital")[2]
    assert cells(by_hospital, "Hospital") == ["AUC", "Sensitivity", "Specificity", "Accuracy"]
    for site in SITES:
        row = cells(by_hospital, site)
        assert row[0].startswith(f"{test['sites'][site]['auc']:.3f} (")
        assert row[3].startswith(f"{test['sites'][site]['accuracy']:.3f} (")
    # Hospital 10 comes after hospital 2.
    assert by_hospital.index("hospital-2") < by_hospital.index("hospital-10")


def test_a_card_states_data_training_calibration_and_net_benefit(run):
    found = sections(card(run))
    assert cells(found["Data"], "hospital-2") == ["1,000", "90", "90"]
    assert cells(found["Data"], "All 3") == ["3,000", "270", "300"]
    (healthy,), (sick,) = (cells(found["Data"], name) for name in ("healthy", "sick"))
    assert int(healthy) + int(sick) == 300
    assert cells(found["Training"], "Duration") == ["1:02:05 (h:min:s)"]
    assert cells(found["Versions and files"], "learning-rate") == ["0.01"]
    assert "/secret/place" not in found["Versions and files"]
    assert "*TRIPOD+AI items 12e, 23a*" in found["Calibration"]
    assert "Probability of sick" in found["Calibration"]
    assert found["Calibration"].count("\n| ") == 12
    assert len(cells(found["Net benefit"], "0.50")) == 2
    assert "No hospital failed" in found["Failures and limits"]


def test_each_item_of_tripod_ai_stands_once_and_says_what_people_must_write(run):
    text = card(run)
    found = sections(text)
    numbers = [item.number for item in tripod.ITEMS]
    assert len(numbers) == len(set(numbers)) == 52
    # The 27 items, some of several parts.
    assert {int(re.match(r"\d+", number)[0]) for number in numbers} == {*range(1, 28)}
    for item in tripod.ITEMS:
        assert cells(found["Items of TRIPOD+AI"], item.number) == [*item[1:]]
        mark = {"to be filled in": "To be filled in", "in part": "To complete"}.get(item.answered)
        if mark is not None:
            assert f"- **{mark}:** {item.subject} ({item.number})" in found[item.section]
    assert "A run cannot answer items 2, 3a," in found["Items of TRIPOD+AI"]


def test_a_run_without_counts_has_a_card_that_says_what_is_missing(run):
    (run / "counts.json").unlink()
    found = sections(card(run))
    assert "Intervals: not available: the run folder has no `counts.json`" in found["Results"]
    assert "has no `counts.json`" in found["Calibration"]
    assert "has no `counts.json`" in found["Net benefit"]
    assert re.fullmatch(r"0\.\d{3}", cells(found["Results"], "AUC")[0])


def test_more_classes_have_a_row_each(tmp_path):
    found = sections(card(write_run(tmp_path, classes=3)))
    assert len(cells(found["Results"], "kind 2")) == 4
    assert "two classes only" in found["Net benefit"]


def test_a_private_run_names_mechanism_giver_epsilon_and_delta_and_has_no_interval(tmp_path):
    privacy = {
        "hospital": {"epsilon": 3.5, "delta": 1e-3},
        "patient": {
            "target-epsilon": 8.0,
            "delta": 1e-5,
            "sites": {"hospital-1": {"epsilon": 7.25, "rounds": 2, "declined": 0}},
        },
    }
    found = sections(card(write_run(tmp_path, noise=0.1, privacy=privacy)))
    words = " ".join(found["Privacy"].split())
    assert "for a patient with all records, and each hospital gives it" in words
    assert "The target was epsilon 8.0 at delta 1e-05" in words
    assert "reported epsilon 7.250 at most" in words
    assert "for a whole hospital, and the server gives it" in words
    assert "to epsilon 3.500 at delta 0.001" in words
    assert "counted with noise" in found["Results"]
    assert " to " not in cells(found["Results"], "AUC")[0]
    assert "| Patients | Mean probability | Observed share |" in found["Calibration"]
    summary = found["Summary"]
    assert "On 300 test patients of all hospitals together it reaches AUC" in summary
    assert "(counted with noise)." in summary
    assert "These are numbers of patients" in found["Data"]


def test_a_card_gives_no_figure_that_noise_makes(tmp_path):
    found = sections(card(write_run(tmp_path, noise=1.0, sizes={"a": 30, "b": 47})))
    for title in ("Summary", "Results"):
        assert "the noise is too large to tell how good the model is" in found[title]
        assert "AUC" not in found[title]
    for title in ("Calibration", "Net benefit"):
        assert "Not available. The test was counted with noise" in found[title]


def test_a_card_says_that_few_records_say_little(tmp_path):
    test = {"federated": {"mae": 2.0, "num-examples": 1}, "sites": {"a": {"mae": 2.0}}}
    found = sections(card(write_run(tmp_path, test=test)))
    assert (
        "On 1 test record at one hospital it reaches MAE 2.000. These are too few to say how good "
        "the model is."
    ) in found["Summary"]


def test_a_plain_run_says_what_it_does_not_protect(run):
    words = " ".join(sections(card(run))["Privacy"].split())
    assert "This run has no differential privacy." in words
    assert "Nothing bounds what could be inferred about a patient" in words


def test_groups_of_patients_have_a_table_each(tmp_path):
    groups = {
        "num-examples@sex=f": 40,
        "auc@sex=f": 0.8,
        "num-examples@sex=m": 50,
        "auc@sex=m": 0.7,
    }
    test = {"federated": {"auc": 0.75, "num-examples": 90} | groups, "sites": {"a": groups}}
    found = sections(card(write_run(tmp_path, test=test)))["Groups of patients"]
    assert "### By sex" in found
    assert cells(found, "m") == ["50", "1", "0.700"]
    assert "no intervals" in found


def test_a_run_that_failed_says_so_first(tmp_path):
    failures = [{"round": 1, "phase": "train", "site": "hospital-2", "reason": "OSError"}] * 25
    text = card(write_run(tmp_path, status="failed", message="too few", test={}, failures=failures))
    assert "> **Status: failed. The figures are of an unfinished model.**" in text
    found = sections(text)
    assert "No model was tested in this run." in found["Results"]
    assert cells(found["Failures and limits"], "1") == ["train", "hospital-2", "OSError"]
    assert "5 more are in `summary.json`" in found["Failures and limits"]


def test_generated_data_are_named_at_the_top(tmp_path):
    head = card(write_run(tmp_path, generated=True)).partition("## Summary")[0]
    assert "Generated data, not patients" in head


def write_hostile(folder, evil):
    write_run(folder)
    for file in ("summary.json", "counts.json"):
        text = (folder / file).read_text()
        replaced = text.replace('hospital-1"', f"{json.dumps(evil)[1:]}")
        replaced = replaced.replace('"chest"', json.dumps(evil)).replace('"sick"', json.dumps(evil))
        (folder / file).write_text(replaced)
    summary = json.loads((folder / "summary.json").read_text())
    names = ("data", "strategy", "message", "status", "started", "engine")
    summary |= dict.fromkeys(names, evil)
    summary |= {
        "config": {evil: evil},
        "versions": {evil: evil},
        "lacking": {evil: [evil]},
        "empty": {evil: [evil]},
    }
    summary |= {"refused": {evil: [evil]}, "model": {"network": evil}}
    summary["failures"] = [{"round": evil, "phase": evil, "site": evil, "reason": evil}]
    summary["notes"] = [{"round": 1, "phase": evil, "site": evil, "text": evil}]
    summary["privacy"] = {"patient": {"target-epsilon": evil, "delta": evil, "sites": {}}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_hostile_texts_make_no_markup(tmp_path):
    evil = "x | [y](https://example.org)\n\n# <img src=x> **b** `c`"
    text = card(write_hostile(tmp_path, evil))
    page = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    assert not re.search(r"<(a|img|script)\b", page)
    assert page.count("<h1>") == 1
    rows = re.findall(r"<tr>(.*?)</tr>", page, flags=re.S)
    assert all(len(re.findall(r"<t[dh]\b", row)) in (2, 3, 4, 5) for row in rows)


def test_a_card_is_not_written_over_what_people_have_filled_in(run, tmp_path):
    target = write_card(run)
    assert target == run / "card.md"
    assert target.read_text() == card(run)
    with pytest.raises(InputError, match=r"card\.md exists already, and may hold"):
        write_card(run)
    assert write_card(run, tmp_path / "other.md").exists()
    with pytest.raises(InputError, match="cannot be written"):
        write_card(run, run / "counts.json" / "card.md")


def test_what_is_no_run_of_a_model_is_refused_in_words(tmp_path):
    with pytest.raises(InputError, match="give the folder of a run"):
        card(tmp_path)
    (tmp_path / "summary.json").write_text('{"kind": "statistics"}')
    with pytest.raises(InputError, match="of the kind 'statistics': a card describes a trained"):
        card(tmp_path)


@pytest.mark.parametrize("wrong", [{"test": 5}, {"sites": []}, {"config": "x"}, {"failures": 3}])
def test_parts_of_a_malformed_summary_are_left_out(tmp_path, wrong):
    folder = write_run(tmp_path, **wrong)
    assert card(folder).startswith("# Model card: chest")


def test_counts_that_no_hospital_can_have_are_refused(run):
    text = (run / "counts.json").read_text().replace('"rows": 150', '"rows": 151')
    (run / "counts.json").write_text(text)
    with pytest.raises(InputError, match=r"counts\.json .*hospital-1"):
        card(run)


def test_counts_of_other_hospitals_than_those_of_the_test_give_no_figure_of_all(run):
    summary = json.loads((run / "summary.json").read_text())
    summary["test"]["sites"]["new"] = {"auc": 0.5}
    (run / "summary.json").write_text(json.dumps(summary))
    found = sections(card(run))
    assert "lacks hospitals that the test has metrics of" in found["Calibration"]
    assert "lacks hospitals that the test has metrics of" in found["Net benefit"]
    overall, _, by_hospital = found["Results"].partition("### By hospital")
    assert " to " not in cells(overall, "AUC")[0]
    assert " to " in cells(by_hospital, "hospital-1")[0]
    assert cells(by_hospital, "new")[0] == "0.500"


def test_pictures_that_left_a_hospital_are_named_under_privacy(tmp_path):
    with_picture = {"pictures": [{"site": "a", "file": "pictures/1.png", "title": "x"}]}
    shown = sections(card(write_run(tmp_path / "with", **with_picture)))["Privacy"]
    assert "but pictures of single test cases" in shown
    assert (
        "No patient record left a hospital: no image"
        in sections(card(write_run(tmp_path / "without")))["Privacy"]
    )
