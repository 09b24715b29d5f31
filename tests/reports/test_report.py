import base64
import copy
import hashlib
import html
import io
import json
import re
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
from html_pages import Page
from PIL import Image

from fedmed_flower.errors import InputError
from fedmed_flower.reports.frame import WORST_PATIENT, own_file
from fedmed_flower.reports.report import write_report
from fedmed_flower.reports.summary import quartiles

KEYS = ("auc", "accuracy", "balanced-accuracy", "sensitivity", "specificity")
FEDERATED = {
    "hospital-1": (0.9, 0.70, 0.75, 0.60, 0.95),
    "hospital-2": (0.8, 0.85, 0.80, 0.75, 0.80),
    "hospital-10": (0.7, 0.76, 0.73, 0.90, 0.50),
}
ALONE = {"hospital-1": (0.85, 0.7), "hospital-2": (0.82, 0.6), "hospital-10": (0.6, 0.5)}
POOLED = {"hospital-1": 0.91, "hospital-2": 0.85, "hospital-10": 0.75}


def full_summary():
    return {
        "status": "finished",
        "message": "",
        "app": "chest",
        "engine": "local",
        "strategy": "FedMedian",
        "data": "pneumoniamnist",
        "generated": False,
        "rounds": 2,
        "rounds-planned": 2,
        "seed": 7,
        "started": "2025-11-04T09:12:44+00:00",
        "seconds": 3725.2,
        "sites": {site: {"train": 1000, "val": 90, "test": 110} for site in FEDERATED},
        "test": {
            "federated": {
                **dict(zip(KEYS, (0.81, 0.77, 0.76, 0.75, 0.74), strict=True)),
                "num-examples": 330,
            },
            "sites": {s: dict(zip(KEYS, v, strict=True)) for s, v in FEDERATED.items()},
            "local": {s: {"auc": own, "all": {"auc": all_}} for s, (own, all_) in ALONE.items()},
            "pooled": {"auc": 0.84, "sites": {s: {"auc": v} for s, v in POOLED.items()}},
        },
        "failures": [{"round": 3, "phase": "train", "site": "hospital-2", "reason": "OSError"}],
        "versions": {"flwr": "1.41.0"},
        "config": {"local-epochs": 1, "baselines": True, "lr": 0.01},
    }


def metrics(sites, rounds=2):
    lines = ["round,phase,site,metric,value"]
    for turn in range(1, rounds + 1):
        for index, site in enumerate(sites):
            for phase, metric in (("val", "auc"), ("val", "loss"), ("train", "loss")):
                lines.append(f"{turn},{phase},{site},{metric},{0.9 - index / 100 + turn / 1000}")
        lines.append(f"{turn},val,all,auc,0.8")
    return "\n".join(lines) + "\n"


OWN_SCRIPT = f"<script>{own_file('script.js')}</script>"


def report(folder, summary, curves=None):
    """Return the page without its own script, which stands in it once."""
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    if curves is not None:
        (folder / "metrics.csv").write_text(curves, encoding="utf-8")
    text = write_report(folder).read_text(encoding="utf-8")
    assert text.count(OWN_SCRIPT) <= 1
    return text.replace(OWN_SCRIPT, "")


def test_table_of_hospitals_has_mean_and_named_worst_of_each_column(tmp_path):
    page = Page(report(tmp_path, full_summary(), metrics(FEDERATED)))
    table = page.table("Records per split")
    assert list(table) == [
        *("Hospital", "hospital-1", "hospital-2", "hospital-10"),
        *("Mean over hospitals", "Worst hospital", "All records together"),
    ]
    assert table["hospital-1"][:3] == ["1,000", "90", "110"]
    assert table["hospital-1"][3:] == ["0.900", "0.700", "0.750", "0.600", "0.950"]
    assert table["Mean over hospitals"] == ["", "", "", "0.800", "0.770", "0.760", "0.750", "0.750"]
    assert table["Worst hospital"] == [
        *("", "", "", "0.700 hospital-10", "0.700 hospital-1", "0.730 hospital-10"),
        *("0.600 hospital-1", "0.500 hospital-10"),
    ]
    assert table["All records together"][:3] == ["3,000", "270", "330"]
    assert table["All records together"][3:] == ["0.810", "0.770", "0.760", "0.750", "0.740"]


def test_comparison_says_who_gained_and_who_lost(tmp_path):
    page = Page(report(tmp_path, full_summary()))
    table = page.table("AUC on each")
    assert table["hospital-1"] == ["0.850", "0.900", "0.910 best", "+0.050"]
    assert table["hospital-2"] == ["0.820", "0.800", "0.850 best", "−0.020"]
    assert table["Mean over hospitals"] == ["0.757", "0.800", "0.837", "+0.043"]
    assert table["Worst hospital"] == [
        *("0.600 hospital-10", "0.700 hospital-10", "0.750 hospital-10", "−0.020 hospital-2"),
    ]
    assert table["All records together"] == ["0.600 mean of all models", "0.810", "0.840", "+0.210"]
    assert (
        "By AUC on each hospital’s own test records (higher is better):"
        "The federated model is better at 2 of 3 hospitals "
        "(hospital-10 +0.100, hospital-1 +0.050) and worse at 1 (hospital-2 −0.020) than one "
        "trained on their own records alone; how much of this is chance is not known."
    ) in page.text


def test_result_and_run_in_words(tmp_path):
    text = Page(report(tmp_path, full_summary())).text
    assert (
        "On 330 test records of all hospitals together the federated model reaches AUC 0.810, "
        in (text)
    )
    assert "Mean AUC over 3 hospitals: 0.800. Worst hospital: hospital-10, AUC 0.700." in text
    assert "2025-11-04 09:12 · 3 hospitals · 2 of 2 rounds" in text
    assert "1:02:05 h:min:s" in text
    assert "did not finish" not in text


def test_coarse_figures_show_between_what_the_auc_of_all_lies(tmp_path):
    summary = full_summary()
    summary["test"]["federated"] |= {"auc-low": 0.702, "auc-high": 0.869}
    summary["test"]["federated"] |= {
        name + group: value
        for group in ("@sex=0", "@sex=1")
        for name, value in (("auc", 0.8), ("auc-low", 0.71), ("auc-high", 0.9))
    }
    summary["test"]["pooled"] |= {"auc-low": 0.8, "auc-high": 0.9}
    page = Page(report(tmp_path, summary))
    assert "reaches AUC 0.810 (between 0.702 and 0.869), accuracy 0.770" in page.text
    hospitals = page.table("Records per split")["All records together"]
    assert hospitals[3:] == ["0.810 0.702 to 0.869", "0.770", "0.760", "0.750", "0.740"]
    models = page.table("AUC on each")["All records together"]
    assert models[1:3] == ["0.810 0.702 to 0.869", "0.840 0.800 to 0.900"]
    assert page.table("By sex")["1"][2] == "0.800 0.710 to 0.900"
    assert "The AUC of all records lies between the two" in page.text
    plain = Page(report(tmp_path, full_summary())).text
    assert not [words for words in ("between 0", "report coarsely") if words in plain]


def test_failures_settings_and_versions_are_listed(tmp_path):
    page = Page(report(tmp_path, full_summary()))
    assert page.table("1 of 1")["3"] == ["train", "hospital-2", "OSError"]
    assert page.table("Settings")["baselines"] == ["true"]
    assert page.table("Versions")["flwr"] == ["1.41.0"]
    assert page.table("Run")["seed"] == ["7"]
    assert "No site failed." not in page.text
    assert "No site failed." in report(tmp_path, full_summary() | {"failures": []})


def test_without_baselines_says_how_to_get_them(tmp_path):
    summary = full_summary()
    del summary["test"]["local"], summary["test"]["pooled"]
    page = report(tmp_path, summary)
    assert "<code>-c baselines=true</code>" in page
    assert "AUC on each" not in page
    assert "-c baselines=true" not in report(tmp_path, full_summary())


def test_failed_run_with_nothing_but_status(tmp_path):
    page = report(
        tmp_path, {"status": "failed", "message": "no replies"}, "round,phase,site,metric,value\n"
    )
    text = Page(page).text
    assert 'class="status failed"' in page
    assert "Failedno replies" in text
    assert "no model was tested" in text
    assert "No hospital is recorded" in text
    assert "No round has recorded a metric." in text
    assert "No site failed." not in text


def test_numbers_of_an_unfinished_run_are_marked(tmp_path):
    page = report(tmp_path, full_summary() | {"status": "stopped"})
    assert 'class="status stopped"' in page
    assert "these numbers describe an unfinished model" in page


def test_an_early_stop_is_said_at_the_top_and_is_no_failure(tmp_path):
    stopped = {"round": 2, "reason": "the budget of <all> is used up"}
    summary = full_summary() | {"stopped": stopped, "failures": []}
    page = report(tmp_path, summary)
    words = "Stopped after round 2: the budget of &lt;all&gt; is used up"
    assert f"<b>Finished</b>{words}</div>" in page
    assert page.count("Stopped after round 2") == 1
    assert "No site failed." in page
    page = report(tmp_path, summary | {"status": "stopped", "message": "stopped by the user"})
    assert f"<b>Stopped</b>{words}. stopped by the user</div>" in page
    for odd in ({}, {"round": "2"}, [3], "early"):
        assert "Stopped after" not in report(tmp_path, summary | {"stopped": odd})


def test_one_class_site_has_a_dash_and_a_footnote(tmp_path):
    summary = full_summary()
    for part in (summary["test"]["sites"], summary["test"]["local"]):
        del part["hospital-10"]["auc"]
    page = Page(report(tmp_path, summary))
    table = page.table("Records per split")
    assert table["hospital-10"][3:5] == ["–†", "0.760"]
    assert table["Mean over hospitals"][3] == "0.850"
    assert table["Worst hospital"][3] == "0.800 hospital-2"
    assert "† one class only in this test set" in page.text
    comparison = page.table("AUC on each")
    assert comparison["hospital-10"] == ["–", "–", "0.750", "–"]
    assert comparison["Mean over hospitals"] == ["0.835", "0.850", "0.880", "+0.015"]
    assert "Mean and worst are over the 2 hospitals with every number." in page.text
    assert "one class only" not in report(tmp_path, full_summary())


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", '" onload="x', "$\\nope{$", "\ud800\x00", ""]
)
def test_hostile_names_are_text(tmp_path, name):
    summary = full_summary()
    for part in (summary["sites"], *(summary["test"][key] for key in ("sites", "local"))):
        part[name] = part.pop("hospital-1")
    summary |= {"app": name, "message": name, "config": {name: name}}
    summary["failures"][0]["site"] = name
    page = report(tmp_path, summary, metrics(["hospital-2"]))
    parsed = Page(page)
    assert "<script" not in page
    assert not [tag for tag, attrs in parsed.tags if tag == "script" or "onload" in attrs]
    shown = name.replace("\ud800\x00", "\ufffd\ufffd") or "–"
    assert parsed.table("Records per split")[shown][3] == "0.900"
    assert parsed.table("1 of 1")["3"][1] == shown


def test_forty_sites_fall_back_to_a_band_and_name_the_worst(tmp_path):
    sites = [f"hospital-{number}" for number in range(1, 41)]
    summary = full_summary()
    summary["sites"] = {site: {"train": 5, "val": 5, "test": 5} for site in sites}
    summary["test"] = {"sites": {s: {"auc": 0.9 - i / 100} for i, s in enumerate(sites)}}
    page = report(tmp_path, summary, metrics(sites, rounds=20))
    parsed = Page(page)
    assert list(parsed.table("Each hospital: Records per split"))[1:] == sites
    assert "shaded: all hospitals" in parsed.text
    assert "Validation AUC · worst: hospital-40, 0.530" in parsed.text
    assert "Validation loss · worst: hospital-1, 0.920" in parsed.text
    assert "var(--s0)" not in page.partition("</style>")[2]
    assert 'class="series s0"' not in page


def test_one_colour_per_hospital_throughout(tmp_path):
    page = report(tmp_path, full_summary(), metrics(FEDERATED))
    keys = re.findall(r'<svg class="key (s\d+)"[^>]*><path[^>]*/></svg>(hospital-\d+)', page)
    assert set(keys) == {("s0", "hospital-1"), ("s1", "hospital-2"), ("s2", "hospital-10")}
    assert "shaded" not in page
    for colour, site in set(keys):
        # Three charts over the rounds, and the row of the hospital's metrics.
        assert page.count(f'<g class="series {colour}" data-name="{site}"') == 3
        assert page.count(f'<svg class="{colour}" ') == 3
        # The drawing of the models, by Matplotlib.
        assert page.count(f'stroke="var(--{colour})"') >= 3
    assert "var(--s3)" not in page.partition("</style>")[2]


def test_generated_images_are_said_so_before_anything_else(tmp_path):
    page = report(tmp_path, full_summary() | {"generated": True})
    first = page[page.index("<body>") :].split("</p>")[0]
    assert first.endswith(">generated data, not patients")
    assert Page(page).text.count("All data of this run are generated") == 1
    assert "generated images" not in report(tmp_path, full_summary())


def test_page_loads_nothing_and_is_small(tmp_path):
    page = report(tmp_path, full_summary(), metrics([f"h{n}" for n in range(5)], rounds=50))
    parsed = Page(page)
    loads = [v for _, attrs in parsed.tags for k, v in attrs.items() if k.endswith(("src", "href"))]
    assert page.count("<svg role") == 4
    assert page.count("<style>") == 1
    assert not [attrs for _, attrs in parsed.tags if "style" in attrs]
    assert not [value for value in loads if not value.startswith("#")]
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in parsed.tags}
    assert not re.search(r"https?://|@import|url\((?!#)", page)
    assert len(page) < 300_000


def test_same_run_gives_the_same_page(tmp_path):
    first = report(tmp_path, full_summary(), metrics(FEDERATED))
    assert report(tmp_path, full_summary(), metrics(FEDERATED)) == first


def test_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    before = report(tmp_path, full_summary())
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "report.html"}

    def fail(self, target):
        assert self.parent == tmp_path
        assert self.stat().st_size > 1000
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report(tmp_path, full_summary() | {"app": "other"})
    after = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert after.replace(OWN_SCRIPT, "") == before
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "report.html"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read (No such file or directory)"),
        (
            b'{"status": ',
            "cannot be read (not valid JSON: Expecting value: line 1 column 12 (char 11))",
        ),
        (b"\xff\xfe", "cannot be read (not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"[1, 2]", "holds a list, not a JSON object"),
    ],
)
def test_bad_summary_is_named(tmp_path, content, problem):
    path = tmp_path / "summary.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        write_report(tmp_path)
    text = str(error.value)
    assert text.startswith(f"{path} {problem}")
    assert text.endswith(": give the folder of a run that `fedmed run` has started")
    assert "\n" not in text
    assert not (tmp_path / "report.html").exists()


def test_bad_line_of_metrics_is_named(tmp_path):
    with pytest.raises(InputError) as error:
        report(tmp_path, full_summary(), "round,phase,site,metric,value\n1,val,a,auc,high\n")
    assert str(error.value) == (
        f"{tmp_path / 'metrics.csv'} line 2 is not a metric "
        "(ValueError(\"could not convert string to float: 'high'\")): mend or remove it"
    )


def test_values_that_are_not_finite_are_left_out(tmp_path):
    curves = "round,phase,site,metric,value\n1,val,a,auc,nan\n2,val,a,auc,0.5\n"
    summary = full_summary()
    summary["test"]["sites"]["hospital-1"]["auc"] = float("nan")
    page = Page(report(tmp_path, summary, curves))
    assert page.table("Records per split")["Mean over hospitals"][3] == "0.750"
    labels = [attrs.get("aria-label") for _, attrs in page.tags]
    assert "Validation AUC over 1 round" in labels


def paths(node, here=()):
    for key, value in node.items():
        yield (*here, key)
        if isinstance(value, dict):
            yield from paths(value, (*here, key))


@pytest.mark.parametrize("wrong", ["absent", "text"])
def test_no_missing_or_odd_part_stops_the_report(tmp_path, wrong):
    top = [path for path in paths(full_summary()) if len(path) <= 2 and path[0] != "config"]
    for *parents, key in top:
        summary = copy.deepcopy(full_summary())
        node = summary
        for parent in parents:
            node = node[parent]
        if wrong == "absent":
            del node[key]
        else:
            node[key] = wrong
        page = report(tmp_path, summary)
        assert "What left each hospital" in page


def private_summary(**part):
    sites = {
        "hospital-1": {"rounds": 2, "declined": 0, "epsilon": 2.5},
        "hospital-2": {"rounds": 0, "declined": 2},
    }
    patient = {"target-epsilon": 4.0, "delta": 1e-05, "private-metrics": False, "sites": sites}
    return full_summary() | {"privacy": {"patient": patient | part}}


def test_what_each_patient_has_cost_is_told_with_its_unit(tmp_path):
    page = report(tmp_path, private_summary())
    assert "Unit: the patient, with all records, in or out." in page
    words = " ".join(page.split())
    assert "target, epsilon <b>4.0</b> at delta 1e-05" in words
    assert "the hospitals reported <b>2.500</b> at most" in words
    assert "Not covered, since it carries no noise: numbers of records, and all that" in words
    assert "Each model for comparison is a run of its own" in words
    assert "Privacy accounting" not in page
    text = " ".join(re.sub("<[^>]*>", " ", page).split())
    assert "hospital-1 2.500 2 0" in text
    assert "hospital-2 – 0 2" in text
    summary = private_summary() | {"sent": {"evaluate": {"hospital-1": ["metrics.noised-counts"]}}}
    assert "Evaluation counts carry noise too" in report(tmp_path, summary)
    summary["sent"]["evaluate"]["hospital-2"] = ["metrics.num-examples"]
    assert "Evaluation counts carry noise too" in report(tmp_path, summary)
    summary["sent"]["evaluate"]["hospital-3"] = ["metrics.auc", "metrics.num-examples"]
    assert "Evaluation counts carry noise too" not in report(tmp_path, summary)


def test_the_two_guarantees_are_told_apart(tmp_path):
    hospital = {"hospital": {"epsilon": 7.5, "delta": 1e-06}}
    page = " ".join(report(tmp_path, full_summary() | {"privacy": hospital}).split())
    assert "Unit: the hospital." in page
    assert "to epsilon <b>7.500</b> at delta 1e-06" in page
    assert "Nothing here bounds what could be inferred about one patient." in page
    both = private_summary()
    both["privacy"] |= hospital
    page = " ".join(report(tmp_path, both).split())
    assert "Unit: the hospital." in page
    assert "Unit: the patient" in page
    assert "Nothing here bounds" not in page


def test_without_privacy_the_report_says_that_nothing_is_bounded(tmp_path):
    page = " ".join(report(tmp_path, full_summary()).split())
    assert "nothing here bounds what could be inferred about one patient" in page


CLASSES = ("anterior", "posterior")
DICE = {"hospital-1": 0.9, "hospital-2": 0.7, "hospital-10": 0.8}


def outlines(dice, classes=CLASSES):
    """Figures of a site whose classes have Dice 0.01 above each other, HD95 40 * (1 - Dice)."""
    own = [dice + number / 100 for number in range(len(classes))]
    figures = {"num-examples": 20, "dice": dice, "hd95": 40 * (1 - dice), "surface-dice": dice}
    figures |= {"dice-worst": dice - 0.5, "loss": 1 - dice}
    for name, value in zip(classes, own, strict=True):
        figures |= {f"dice-{name}": value, f"hd95-{name}": 40 * (1 - value)}
        figures |= {f"surface-dice-{name}": value}
    return figures


def segmentation_summary(classes=CLASSES):
    test = {
        "federated": outlines(0.82, classes) | {"num-examples": 60, "dice-worst": 0.2},
        "sites": {site: outlines(dice, classes) for site, dice in DICE.items()},
        "local": {s: outlines(d - 0.1) | {"all": outlines(d - 0.2)} for s, d in DICE.items()},
        "pooled": outlines(0.85) | {"sites": {s: outlines(d + 0.02) for s, d in DICE.items()}},
    }
    return full_summary() | {"test": test}


def test_segmentation_is_told_in_its_own_figures(tmp_path):
    curves = "round,phase,site,metric,value\n1,val,hospital-1,dice,0.5\n1,val,hospital-1,loss,1\n"
    page = Page(report(tmp_path, segmentation_summary(), curves))
    assert (
        "On 60 test records of all hospitals together the federated model reaches "
        "Dice 0.820, HD95 7.2 mm, surface Dice 0.820. Mean Dice over 3 hospitals: 0.800. "
        "Worst hospital: hospital-2, Dice 0.700. Worst patient: Dice 0.200. "
    ) in page.text
    table = page.table("Records per split")
    assert table["Hospital"][3:] == [
        *("Dice", "Dice, worst patient", "Dice anterior", "Dice posterior"),
        *("HD95 (mm)", "Surface Dice"),
    ]
    assert table["hospital-1"][3:] == ["0.900", "0.400", "0.900", "0.910", "4.0", "0.900"]
    assert table["Mean over hospitals"][3:] == ["0.800", "0.300", "0.800", "0.810", "8.0", "0.800"]
    assert table["Worst hospital"][3:] == [
        *("0.700 hospital-2", "0.200 hospital-2", "0.700 hospital-2", "0.710 hospital-2"),
        *("12.0 hospital-2", "0.700 hospital-2"),
    ]
    assert table["All records together"][3:] == ["0.820", "0.200", "0.820", "0.830", "7.2", "0.820"]
    comparison = page.table("Dice on each")
    assert comparison["hospital-2"] == ["0.600", "0.700", "0.720 best", "+0.100"]
    assert comparison["All records together"][1:] == ["0.820", "0.850", "+0.220"]
    assert "The federated model is better at 3 of 3 hospitals (" in page.text
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg" and "aria-label" in a]
    assert labels == [
        *("Dice of the models", "Validation Dice over 1 round"),
        "Validation loss over 1 round",
    ]
    assert "AUC" not in page.text
    for figure in ("Dice: overlap", "HD95: the", "Surface Dice: the"):
        assert page.text.count(figure) == 1


def test_figures_of_the_classes_that_the_table_of_hospitals_leaves_out(tmp_path):
    table = Page(report(tmp_path, segmentation_summary())).table("By class")
    worst = "Worst hospital"
    assert table["Class"] == ["Dice", worst, "HD95 (mm)", worst, "Surface Dice", worst]
    assert table["posterior"] == [
        *("0.830", "0.710 hospital-2", "6.8", "11.6 hospital-2"),
        *("0.830", "0.710 hospital-2"),
    ]
    names = [f"<organ {number}>" for number in range(5)]
    page = Page(report(tmp_path, segmentation_summary(names)))
    hospitals = page.table("Records per split")["Hospital"]
    assert hospitals[3:] == ["Dice", "Dice, worst patient", "HD95 (mm)", "Surface Dice"]
    assert list(page.table("By class")) == ["Class", *names]
    # Four classes still fit.
    hospitals = Page(report(tmp_path, segmentation_summary(names[:4]))).table("Records per split")
    assert len(hospitals["Hospital"]) == 3 + 8
    assert "Dice <organ 3>" in hospitals["Hospital"]


def test_one_class_and_dice_alone_need_no_second_table(tmp_path):
    page = Page(report(tmp_path, segmentation_summary(["organ"])))
    assert "Dice organ" not in page.text
    assert not [caption for caption in page.tables if caption.startswith("By class")]
    summary = segmentation_summary()
    test = summary["test"]
    for part in (test["federated"], *test["sites"].values()):
        for key in [
            key for key in part if key.startswith(("hd95", "surface")) or key == WORST_PATIENT
        ]:
            del part[key]
    page = Page(report(tmp_path, summary))
    head = page.table("Records per split")["Hospital"]
    assert head[3:] == ["Dice", "Dice anterior", "Dice posterior"]
    assert not [caption for caption in page.tables if caption.startswith("By class")]
    assert "HD95" not in page.text.partition("What left")[0]
    assert "reaches Dice 0.820. Mean" in page.text
    assert "Worst patient" not in page.text


def test_a_site_cannot_change_what_the_run_is_judged_by(tmp_path):
    summary = segmentation_summary()
    summary["test"]["sites"]["hospital-2"] |= {"auc": 1.0, "dice-invented": 1.0}
    page = Page(report(tmp_path, summary))
    assert "AUC" not in page.text
    assert "invented" not in page.table("By class")
    assert "Worst hospital: hospital-2, Dice 0.700." in page.text


def test_of_losses_the_largest_is_the_worst(tmp_path):
    summary = full_summary()
    losses = {"hospital-1": 0.3, "hospital-2": 0.5, "hospital-10": 0.4}
    summary["test"] = {
        "federated": {"loss": 0.4, "num-examples": 9},
        "sites": {site: {"loss": loss} for site, loss in losses.items()},
        "local": {site: {"loss": 0.45} for site in losses},
    }
    sites = [f"hospital-{number}" for number in range(1, 20)]
    page = Page(report(tmp_path, summary, metrics(sites)))
    assert "Mean loss over 3 hospitals: 0.400. Worst hospital: hospital-2, loss 0.500." in page.text
    assert page.table("Records per split")["Worst hospital"][3:] == ["0.500 hospital-2"]
    comparison = page.table("Loss on each")
    assert comparison["Worst hospital"][1] == "0.500 hospital-2"
    assert comparison["Worst hospital"][2] == "+0.050 hospital-2"
    assert (
        "By loss on each hospital’s own test records (lower is better):"
        "The federated model is better at 2 of 3 hospitals (hospital-1 −0.150, hospital-10 −0.050) "
        "and worse at 1 (hospital-2 +0.050) than"
    ) in page.text
    assert "Validation loss · worst: hospital-1, 0.902" in page.text
    labels = [attrs.get("aria-label") for _, attrs in page.tags]
    assert labels.count("Validation loss over 2 rounds") == 1


def test_accuracy_stands_in_for_a_missing_auc(tmp_path):
    summary = full_summary()
    for part in (summary["test"]["federated"], *summary["test"]["sites"].values()):
        del part["auc"]
    page = Page(report(tmp_path, summary))
    assert "Worst hospital: hospital-1, accuracy 0.700." in page.text
    assert page.table("Records per split")["Hospital"][3] == "Accuracy"
    assert "one class only" not in page.text


def png(shade=0, size=(4, 4)):
    file = io.BytesIO()
    Image.new("L", size, shade).save(file, "PNG")
    return file.getvalue()


def with_pictures(folder, summary, pictures):
    """Write `pictures`, (site, title, bytes), into the run folder and name them in the summary."""
    (folder / "pictures").mkdir(exist_ok=True)
    named = []
    for number, (site, title, content) in enumerate(pictures, start=1):
        if content is not None:
            (folder / f"pictures/{number}.png").write_bytes(content)
        named.append({"site": site, "file": f"pictures/{number}.png", "title": title})
    return summary | {"pictures": named}


def digest(name):
    found = hashlib.sha256(own_file(name).encode()).digest()
    return f"sha256-{base64.b64encode(found).decode()}"


def images(page):
    return [attrs for tag, attrs in page.tags if tag == "img"]


def test_pictures_are_embedded_by_site(tmp_path):
    pictures = [
        ("hospital-2", "case 1", png(10)),
        ("hospital-1", 'worst" onload="x', png(20)),
        ("hospital-2", "<b>case</b>", png(30)),
    ]
    text = report(tmp_path, with_pictures(tmp_path, segmentation_summary(), pictures))
    page = Page(text)
    shown = {attrs["alt"]: attrs["src"] for attrs in images(page)}
    assert list(shown) == [
        *('hospital-1: worst" onload="x', "hospital-2: case 1", "hospital-2: <b>case</b>"),
    ]
    for site, title, content in pictures:
        start, data = shown[f"{site}: {title}"].split(",")
        assert start == "data:image/png;base64"
        assert base64.b64decode(data) == content
        assert f"<figcaption>{html.escape(title)}</figcaption>" in text
    (policy,) = [attrs["content"] for _, attrs in page.tags if "http-equiv" in attrs]
    assert policy == (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"style-src '{digest('style.css')}'; script-src '{digest('script.js')}'; img-src data:"
    )
    section = text.partition(">Test cases</h2>")[2].partition("<h2")[0]
    order = re.findall(r"<h3>(.*?)</h3>", section)
    assert order == ["hospital-1", "hospital-2", "hospital-10"]
    silent = section.partition("<h3>hospital-10</h3>")[2]
    assert "keeps its pictures to itself" in silent
    assert section.count("keeps its pictures to itself") == 1
    assert "Outlines are solid as the hospital drew them" in section
    words = " ".join(page.text.split())
    assert "of images only the pictures of test cases above" in words
    assert "No patient record: no image, no row of a table." not in words


@pytest.mark.parametrize("pictures", [[], None, "text", ["text"], {"a": 1}])
def test_without_pictures_there_is_no_section(tmp_path, pictures):
    text = report(tmp_path, full_summary() | {"pictures": pictures})
    assert "Test cases" not in text
    assert "img-src" not in text
    assert "keeps its pictures" not in text
    assert "No patient record: no image, no row of a table." in text


def test_what_is_no_picture_is_named_and_left_out(tmp_path):
    pictures = [
        ("hospital-1", "lost", None),
        ("hospital-1", "<script>", b"<script>alert(1)</script>"),
        ("hospital-2", "large", png(size=(1025, 4))),
        ("hospital-2", "long", png() + b"\0" * 600_000),
        ("elsewhere", "good", png()),
    ]
    summary = with_pictures(tmp_path, full_summary(), pictures)
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "pictures" / "9.png").mkdir()
    for file in ("pictures/../secret.png", f"{tmp_path}/secret.png", "secret.png", 3, None):
        summary["pictures"].append({"site": "hospital-2", "file": file, "title": "other"})
    summary["pictures"] += [{"site": "hospital-2", "file": "pictures/9.png"}, {}, {"site": None}]
    text = report(tmp_path, summary)
    page = Page(text)
    assert [attrs["alt"] for attrs in images(page)] == ["elsewhere: good"]
    assert "<script" not in text
    for line in (
        "Not shown: lost (pictures/1.png): it cannot be read (No such file or directory)",
        "Not shown: <script> (pictures/2.png): it is not a PNG",
        "Not shown: large (pictures/3.png): it has 1025 x 4 pixels, more than 1024 x 1024",
        "Not shown: long (pictures/4.png): it cannot be read (it has "
        f"{len(pictures[3][2]):,} bytes, more than 512,000)",
        "Not shown: other (pictures/../secret.png): it is no picture of the run folder",
        f"Not shown: other ({tmp_path}/secret.png): it is no picture of the run folder",
        "Not shown: other (secret.png): it is no picture of the run folder",
        "Not shown: – (pictures/9.png): it cannot be read (it is no file)",
    ):
        assert line in page.text
    assert page.text.count("Not shown: ") == 10
    assert "In a heat map orange places" in page.text


BINARY = {
    "loss": 0.5,
    "num-examples": 50,
    **dict(zip(KEYS, (0.8, 0.7, 0.6, 0.5, 0.9), strict=True)),
    "average-precision": 0.65,
    "brier": 0.2,
    "calibration-error": 0.125,
}


def in_groups(figures):
    """Figures by group, {group: {name: value}}, under the names of a table's metrics."""
    return {f"{name}@{g}": value for g, part in figures.items() for name, value in part.items()}


def table_summary():
    """Three hospitals with a table, of which the third tells of one group alone."""
    sites = {
        "a": {"sex=0": {"auc": 0.7, "num-examples": 12}, "sex=1": {"auc": 0.9, "num-examples": 20}},
        "b": {"sex=0": {"auc": 0.6, "num-examples": 11}, "sex=1": {"auc": 0.8, "num-examples": 20}},
        "c": {"sex=1": {"auc": 0.85, "num-examples": 30}},
    }
    together = {
        "sex=0": {"auc": 0.65, "sensitivity": 0.5, "num-examples": 23},
        "sex=1": {"auc": 0.875, "sensitivity": 0.75, "num-examples": 70},
        "age-band=>=65": {"auc": 0.7, "num-examples": 40},
        "age-band=50-65": {"auc": 0.75, "num-examples": 40},
        "age-band=<50": {"auc": 0.72, "num-examples": 13},
    }
    test = {
        "federated": BINARY | {"auc": 0.82, "num-examples": 93} | in_groups(together),
        "sites": {site: BINARY | in_groups(figures) for site, figures in sites.items()},
    }
    counts = {site: {"train": 100, "val": 20, "test": 31} for site in sites}
    config = {"preparation": "federated", "report-by": "sex,age-band"}
    return full_summary() | {"sites": counts, "test": test, "config": config}


def test_figures_of_a_table(tmp_path):
    summary = table_summary()
    # A ninth has no place.
    summary["test"]["federated"]["rmse"] = 0.5
    page = Page(report(tmp_path, summary))
    table = page.table("Records per split")
    assert table["Hospital"][3:] == [
        *("AUC", "Accuracy", "Balanced accuracy", "Sensitivity", "Specificity"),
        *("Average precision", "Brier score", "Calibration error"),
    ]
    assert table["a"][3:] == [
        *("0.800", "0.700", "0.600", "0.500", "0.900", "0.650", "0.200", "0.125"),
    ]
    assert table["All records together"][3:5] == ["0.820", "0.700"]
    for figure in ("Average precision: the", "Brier score: the", "Calibration error: how"):
        assert page.text.count(figure) == 1
    assert "reaches AUC 0.820, accuracy 0.700, balanced accuracy 0.600, sensitivity 0.500, " in (
        page.text
    )
    # The rest is in the table.
    assert "specificity 0.900. Mean AUC over 3 hospitals: 0.800. Worst" in page.text


@pytest.mark.parametrize(
    ("figures", "head", "worst", "words"),
    [
        (
            {"c-index": (0.7, 0.6), "integrated-brier": (0.1, 0.2)},
            ["C-index", "Integrated Brier score"],
            ["0.600 b", "0.200 b"],
            "reaches C-index 0.700, integrated Brier score 0.100. Mean C-index over 2 hospitals: ",
        ),
        (
            {"mae": (1200.5, 1000.25), "rmse": (1300, 1500), "r2": (0.5, 0.25)},
            ["R²", "MAE", "RMSE"],
            ["0.250 b", "1,200.500 a", "1,500.000 b"],
            "reaches R² 0.500, MAE 1,200.500, RMSE 1,300.000. Mean R² over 2 hospitals: 0.375. ",
        ),
        (
            {"mae": (2, 3), "deviance": (1.5, 1.25), "d2": (0.5, 0.5)},
            ["D²", "MAE", "Deviance"],
            ["0.500 a", "3.000 b", "1.500 a"],
            "reaches D² 0.500, MAE 2.000, deviance 1.500. Mean D² over 2 hospitals: 0.500. ",
        ),
        (
            {"mae": (2, 3), "rmse": (3, 4)},
            ["MAE", "RMSE"],
            ["3.000 b", "4.000 b"],
            "Mean MAE over 2 hospitals: 2.500. Worst hospital: b, MAE 3.000. ",
        ),
    ],
)
def test_figures_of_times_numbers_and_counts(tmp_path, figures, head, worst, words):
    summary = full_summary()
    own = {site: {k: v[i] for k, v in figures.items()} for i, site in enumerate("ab")}
    summary["sites"] = {site: {"train": 9, "val": 9, "test": 9} for site in own}
    summary["test"] = {"federated": own["a"] | {"num-examples": 18, "loss": 1.0}, "sites": own}
    page = Page(report(tmp_path, summary))
    table = page.table("Records per split")
    assert table["Hospital"][3:] == head
    assert table["Worst hospital"][3:] == worst
    assert words in page.text
    for name in head:
        assert page.text.count(f"{name}: ") == 1


def test_groups_have_a_table_a_column_and_the_gap_in_words(tmp_path):
    page = Page(report(tmp_path, table_summary()))
    table = page.table("By sex")
    worst = "Worst hospital"
    assert table["sex"] == ["Records", "Hospitals", "AUC", worst, "Sensitivity", worst]
    assert table["0"] == ["23", "2", "0.650", "0.600 b", "0.500", "–"]
    assert table["1"] == ["70", "3", "0.875", "0.800 b", "0.750", "–"]
    assert (
        "Best and worst group of sex differ in AUC by 0.225, in sensitivity by 0.250." in page.text
    )
    bands = page.table("By age-band")
    assert list(bands) == ["age-band", "<50", "50-65", ">=65"]
    assert "Best and worst group of age-band differ in AUC by 0.050." in page.text
    words = " ".join(page.text.split())
    assert "A hospital sends nothing of a group of fewer than ten patients" in words
    assert "auc@" not in page.text
    assert "By group" not in report(tmp_path, full_summary())


def test_a_group_alone_has_no_gap_and_a_hostile_one_is_text(tmp_path):
    summary = table_summary()
    federated = {"num-examples": 93, "auc": 0.8, "auc@<b>=<script>": 0.7, "auc@b": 0.1}
    summary["test"]["federated"] = federated | {"auc@c=1": "high", "auc@c=2": 0.5}
    text = report(tmp_path, summary)
    page = Page(text)
    assert page.table("By <b>")["<script>"] == ["–", "0", "0.700", "–"]
    assert list(page.table("By c")) == ["c", "2"]
    assert "<script" not in text
    assert "Best and worst group" not in text
    assert page.table("Records per split")["Hospital"][3:] == ["AUC"]


def test_groups_are_no_classes_of_a_segmentation(tmp_path):
    summary = segmentation_summary()
    for part in (summary["test"]["federated"], *summary["test"]["sites"].values()):
        part |= {"dice@sex=1": 0.5, "dice-anterior@sex=1": 0.5, "hd95@sex=1": 9.0}
    page = Page(report(tmp_path, summary))
    assert page.table("Records per split")["Hospital"][5:7] == ["Dice anterior", "Dice posterior"]
    assert list(page.table("By class")) == ["Class", "anterior", "posterior"]
    assert page.table("By sex")["1"][2:] == ["0.500", "0.500 hospital-1", "9.0", "9.0 hospital-1"]


# Validation before and after, passes, on test.
PERSONAL = {
    "hospital-1": (0.8, 0.85, 3, 0.95),
    "hospital-2": (0.7, 0.7, 0, 0.8),
    "hospital-10": (0.6, 0.65, 1, 0.68),
}


def personal_summary(baselines=True):
    names = ("val-global", "val-own", "personal-epochs", "auc")
    summary = full_summary()
    summary["test"]["personal"] = {
        site: dict(zip(names, values, strict=True)) for site, values in PERSONAL.items()
    }
    if not baselines:
        del summary["test"]["local"], summary["test"]["pooled"]
    return summary


def test_fine_tuned_models_beside_the_others(tmp_path):
    page = Page(report(tmp_path, personal_summary()))
    table = page.table("AUC on each")
    assert table["Hospital"] == [
        *("Trained alone", "Federated", "Fine-tuned at the hospital", "Trained on pooled data"),
        *("Federated − alone", "Fine-tuned − federated"),
    ]
    assert table["hospital-1"] == ["0.850", "0.900", "0.950 best", "0.910", "+0.050", "+0.050"]
    assert table["Mean over hospitals"][5] == "+0.010"
    assert table["Worst hospital"][5] == "−0.020 hospital-10"
    assert table["All records together"][2] == "–"
    assert "◆ fine-tuned" in page.text
    validation = page.table("On each hospital’s own validation")
    assert validation["Hospital"] == ["Federated", "Fine-tuned", "Change", "Passes kept"]
    assert validation["hospital-2"] == ["0.700", "0.700", "+0.000", "0"]
    assert list(validation)[4:] == ["Mean over hospitals", "Worst hospital"]
    assert validation["Mean over hospitals"] == ["0.700", "0.733", "+0.033", ""]
    words = " ".join(page.text.split())
    assert (
        "The federated model was fine-tuned at 3 hospitals: 2 kept the result, 1 the federated "
        "model. A hospital keeps what is best on its validation records, so that by construction "
        "none is worse there. By AUC on each hospital’s own test records (higher is better): "
        "The fine-tuned model is better at 1 of 3 hospitals (hospital-1 +0.050) and worse at 1 "
        "(hospital-10 −0.020) than the federated model, and equal at 1; how much of this is "
        "chance is not known. Mean change of AUC: +0.010."
    ) in words
    before = Page(report(tmp_path, full_summary()))
    assert "ine-tuned" not in before.text
    assert len(before.table("AUC on each")["Hospital"]) == 4


def test_fine_tuned_models_without_other_models(tmp_path):
    page = Page(report(tmp_path, personal_summary(baselines=False)))
    table = page.table("AUC on each")
    assert table["Hospital"] == [
        *("Federated", "Fine-tuned at the hospital", "Fine-tuned − federated"),
    ]
    assert table["hospital-10"] == ["0.700 best", "0.680", "−0.020"]
    assert "To compare with each hospital’s own model" in page.text
    assert "Not measured in this run" not in page.text
    assert "trained on their own records alone" not in page.text
    labels = [attrs.get("aria-label") for _, attrs in page.tags]
    assert labels.count("AUC of the models") == 1


def test_fine_tuning_that_lowers_a_loss_is_better(tmp_path):
    summary = full_summary()
    own = {"hospital-1": 0.4, "hospital-2": 0.5}
    summary["test"] = {
        "federated": {"loss": 0.5, "num-examples": 9},
        "sites": {site: {"loss": 0.5} for site in own},
        "personal": {site: {"loss": loss, "personal-epochs": 1} for site, loss in own.items()},
    }
    words = " ".join(Page(report(tmp_path, summary)).text.split())
    assert "is better at 1 of 2 hospitals (hospital-1 −0.100) and worse at none than" in words
    assert "Mean change of loss: −0.050." in words
    assert "2 kept the result, none the federated model" in words


def own_summary():
    summary = full_summary()
    own = {"hospital-1": 0.92, "hospital-2": 0.86, "hospital-10": 0.7}
    summary["test"]["own"] = {site: {"auc": value} for site, value in own.items()}
    return summary


def test_own_models_of_the_run_beside_the_others(tmp_path):
    page = Page(report(tmp_path, own_summary(), metrics(FEDERATED)))
    table = page.table("AUC on each")
    assert table["Hospital"] == [
        *("Trained alone", "Federated", "Own model", "Trained on pooled data"),
        *("Federated − alone", "Own − alone"),
    ]
    assert table["hospital-1"] == ["0.850", "0.900", "0.920 best", "0.910", "+0.050", "+0.070"]
    assert table["hospital-10"] == ["0.600", "0.700", "0.700", "0.750 best", "+0.100", "+0.100"]
    assert table["Mean over hospitals"][2] == "0.827"
    assert table["Worst hospital"][2] == "0.700 hospital-10"
    words = " ".join(page.text.split())
    assert (
        "Their own model of this run is better at 3 of 3 hospitals (hospital-10 +0.100, "
        "hospital-1 +0.070, hospital-2 +0.040) and worse at none than one trained on their own "
        "records alone; how much of this is chance is not known."
    ) in words
    assert "than the federated model, and equal at 1; how much" in words
    assert "■ own model" in words
    assert "Own model: what a hospital keeps and uses itself" in words
    assert "Validation figures are of each hospital’s own model, not of the global one." in words
    without = Page(report(tmp_path, full_summary())).text
    assert "own model" not in without.lower().replace("hospital’s own model", "")


def test_own_models_without_any_other(tmp_path):
    summary = own_summary()
    del summary["test"]["local"], summary["test"]["pooled"]
    page = Page(report(tmp_path, summary))
    assert page.table("AUC on each")["Hospital"] == ["Federated", "Own model"]
    assert page.table("AUC on each")["hospital-2"] == ["0.800", "0.860 best"]
    assert "Their own model of this run is better at 2 of 3 hospitals" in page.text
    assert "To compare with each hospital’s own model" in page.text


@pytest.mark.parametrize("own", ["text", {}, {"hospital-1": "text"}, {"x": {"auc": 9e99}}, [1]])
def test_odd_own_models_do_not_stop_the_report(tmp_path, own):
    summary = full_summary()
    summary["test"]["own"] = own
    page = report(tmp_path, summary)
    assert "AUC on each" in page
    assert "Own − alone" not in page


@pytest.mark.parametrize("personal", ["text", {}, {"hospital-1": "text"}, {"elsewhere": {}}])
def test_odd_personal_models_do_not_stop_the_report(tmp_path, personal):
    summary = full_summary()
    summary["test"]["personal"] = personal
    assert "AUC on each" in report(tmp_path, summary)


@pytest.mark.parametrize("name", ["c-index", "r2", "d2"])
def test_why_a_hospital_lacks_the_main_figure(tmp_path, name):
    summary = full_summary()
    sites = {site: {name: 0.5, "loss": 1.0, "num-examples": 9} for site in FEDERATED}
    del sites["hospital-2"][name]
    sites["hospital-10"] = {"num-examples": 0}
    summary["test"] = {"federated": {name: 0.5, "num-examples": 18}, "sites": sites}
    page = Page(report(tmp_path, summary))
    table = page.table("Records per split")
    assert [table[site][3] for site in FEDERATED] == ["0.500", "–†", "–"]
    why = "† no two patients" if name == "c-index" else "† the same value in all"
    assert why in page.text


def test_a_hospital_without_training_records_is_marked(tmp_path):
    summary = full_summary()
    summary["sites"]["hospital-2"] |= {"train": 0, "val": 0}
    page = Page(report(tmp_path, summary))
    table = page.table("Records per split")
    assert table["hospital-2 tested\xa0only"][:4] == ["0", "0", "110", "0.800"]
    assert "hospital-1" in table
    assert "Tested only: 1 hospital without training records." in page.text
    assert "tested\xa0only" not in report(tmp_path, full_summary())


def test_rows_rejected_and_hospitals_that_take_no_part_are_told(tmp_path):
    summary = full_summary()
    summary["sites"]["hospital-2"]["rejected"] = 12
    summary["refused"] = {"no <b> column 'ill'": ["north", "south"], "odd": 7}
    page = Page(report(tmp_path, summary))
    table = page.table("Records per split")
    assert table["Hospital"][3] == "Rejected"
    assert [table[site][3] for site in FEDERATED] == ["–", "12", "–"]
    assert table["All records together"][3] == "12"
    assert "Rejected: records that cannot be used; the hospital’s own log" in page.text
    assert "Could not take part: north, south (no <b> column 'ill')." in page.text
    plain = report(tmp_path, full_summary())
    assert "Rejected" not in plain
    assert "Could not take part" not in plain


def many_summary(count):
    sites = [f"h{number}" for number in range(count)]
    values = {site: {"auc": 0.5 + number / 1000} for number, site in enumerate(sites)}
    test = {"federated": {"auc": 0.7, "num-examples": 9}, "sites": values}
    test["local"] = {site: {"auc": 0.5} for site in sites[1:]}
    summary = full_summary() | {"test": test}
    summary["sites"] = {site: {"train": n, "val": 4, "test": 4} for n, site in enumerate(sites)}
    costs = {site: {"rounds": 2, "declined": 0, "epsilon": 1.0} for site in sites}
    patient = {"target-epsilon": 4.0, "delta": 1e-05, "sites": costs}
    return summary | {"privacy": {"patient": patient}}, sites


def test_of_many_hospitals_the_page_tells_the_spread(tmp_path):
    summary, sites = many_summary(186)
    text = report(tmp_path, summary, metrics(sites))
    page = Page(text)
    table = page.table("Records per split")
    assert list(table) == [
        *("Hospital", "Mean over hospitals", "Lower quartile", "Median", "Upper quartile"),
        *("Worst hospital", "All records together"),
    ]
    # Of 0.500, 0.501, … 0.685; the quartiles lie at 46.25, 92.5 and 138.75.
    assert [table[row][3] for row in list(table)[1:]] == [
        *("0.593", "0.546", "0.593", "0.639", "0.500 h0", "0.700"),
    ]
    assert [table[row][0] for row in list(table)[1:]] == ["", "46", "92", "139", "", "17,205"]
    assert list(page.table("Each hospital: Records"))[1:] == ["h0 tested\xa0only", *sites[1:]]
    assert list(page.table("Each hospital: AUC on"))[1:] == sites
    folded = text.split("<details>")[1:]
    assert len(folded) == 4
    for part in folded:
        assert part.startswith("<summary>All 186 hospitals")
    shown = re.sub("(?s)<details>.*?</details>", "", text)
    assert not {*re.findall(r">(h\d+)<", shown)} - {"h0", "h1"}
    drawing = text.partition('aria-label="AUC of the models"')[2].partition("</svg>")[0]
    assert ("trained alone" in drawing, "federated" in drawing) == (True, True)
    assert "h100" not in drawing
    assert len(text) < 200_000


def test_quartiles_lie_between_the_values():
    assert quartiles([4, 2, 3, 1]) == [1.75, 2.5, 3.25]
    assert quartiles([5]) == [5, 5, 5]
    assert quartiles([]) == [None, None, None]


def test_thirty_hospitals_are_shown_one_by_one(tmp_path):
    summary, sites = many_summary(30)
    text = report(tmp_path, summary)
    assert "<details>" not in text
    assert list(Page(text).table("AUC on each"))[1:31] == sites
    assert "<details>" in report(tmp_path, many_summary(31)[0])


def test_many_hospitals_without_pictures_are_counted(tmp_path):
    summary, _ = many_summary(40)
    text = report(tmp_path, with_pictures(tmp_path, summary, [("h7", "case", png())]))
    assert re.findall("<h3>(.*?)</h3>", text) == ["h7"]
    assert "39 hospitals sent no picture." in text
    assert "keeps its pictures" not in text


SITE = ["site.name", "site.data"]
SENT = {
    "describe": {name: [*SITE, "metrics.train"] for name in ("north", "south")},
    "train": {
        "north": [*SITE, "arrays.*", "metrics.loss", "metrics.num-examples"],
        "south": [*SITE, "arrays.*", "metrics.patient-epsilon", "metrics.num-examples"],
    },
    "evaluate": {
        "north": [*SITE, "metrics.auc", "metrics.METRIC@column=value", "metrics.own <b>"],
        "south": [*SITE, "metrics.auc", "metrics.noised-counts"],
    },
    "personal": {"south": ["metrics.METRIC", "metrics.personal-epochs"]},
    "own-query": {"south": ["record.key"]},
}


def test_what_left_each_hospital_is_what_it_sent(tmp_path):
    page = Page(report(tmp_path, full_summary() | {"sent": SENT}))
    assert page.tables["As the hospitals sent it"] == [
        ["When", "What", "How", "Hospitals"],
        [
            "With each reply",
            "the name that the hospital gave itself, name of the data source",
            *("exactly", "all 2"),
        ],
        [
            *("Before the first round", "number of training rows (private: of patients)"),
            *("exactly", "all 2"),
        ],
        [
            "After training",
            "the model after local training, or its change in a code, mean training loss",
            *("exactly, of several patients together", "north"),
        ],
        [
            *("After training", "the model after local training, or its change in a code"),
            *("with noise", "south"),
        ],
        ["After training", "number of training rows (private: of patients)", "exactly", "north"],
        [
            "After training",
            "number of training rows (private: of patients), "
            "what the run has cost a patient so far",
            *("exactly; every guarantee takes it as known", "south"),
        ],
        [
            *("After evaluation", "AUC, each metric above, of a group (report-by)"),
            *("exactly, of several patients together", "north"),
        ],
        [
            *("After evaluation", "AUC, histograms in 32 fixed bins, confusion counts"),
            *("with noise", "south"),
        ],
        ["After evaluation", "metrics.own <b>", "as the app has it", "north"],
        ["Of its own model", "passes after which its own was kept", "exactly", "south"],
        [
            *("Of its own model", "metrics of evaluate, of its own model"),
            *("exactly, of several patients together", "south"),
        ],
        ["own-query", "record.key", "as the app has it", "south"],
    ]


def test_a_summary_that_tells_nothing_of_what_was_sent_says_so(tmp_path):
    for sent in (None, {}, [], {"train": 3}, {"train": {"north": "all"}}):
        page = report(tmp_path, full_summary() | {"sent": sent})
        assert "What was sent was not recorded." in page


@pytest.mark.parametrize(
    ("kind", "home"),
    [
        ("association", "fedmed_flower.genomics.page"),
        ("statistics", "fedmed_flower.statistics.page"),
    ],
)
def test_runs_that_train_no_model_have_pages_of_their_own(tmp_path, monkeypatch, kind, home):
    def write_page(folder):
        (folder / "report.html").write_text("own page", encoding="utf-8")
        return folder / "report.html"

    assert [*signature(import_module(home).write_page).parameters] == ["folder"]
    monkeypatch.setitem(sys.modules, home, SimpleNamespace(write_page=write_page))
    assert report(tmp_path, {"kind": kind}) == "own page"
    assert "AUC" in report(tmp_path, full_summary() | {"kind": "other"})


def test_own_models_that_are_tested_elsewhere_alone(tmp_path):
    summary = full_summary()
    # Who trains keeps no test records; who has some does not train.
    summary["test"] = {
        "federated": {"auc": 0.8, "num-examples": 9},
        "sites": {"hospital-10": {"auc": 0.8}},
        "local": {site: {"all": {"auc": auc}} for site, auc in (("a", 0.5), ("b", 0.6))},
    }
    page = Page(report(tmp_path, summary))
    table = page.table("AUC on each")
    assert table["Hospital"] == ["Trained alone", "Federated", "Federated − alone"]
    assert table["hospital-10"] == ["–", "0.800", "–"]
    assert table["All records together"] == ["0.550 mean of all models", "0.800", "+0.250"]
    assert "trained on their own records alone" not in page.text
