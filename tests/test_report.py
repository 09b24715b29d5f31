import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedmed_flower.errors import InputError
from fedmed_flower.report import PALETTE, write_report

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


def report(folder, summary, curves=None):
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    if curves is not None:
        (folder / "metrics.csv").write_text(curves, encoding="utf-8")
    return write_report(folder).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Text of the page, and its tables as {caption: [[cell, ...], ...]}."""

    def __init__(self, page):
        super().__init__()
        self.tables, self.tags, self.text, self.caption = {}, [], "", ""
        self.sink = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "caption":
            self.caption, self.sink = "", "caption"
        elif tag == "tr":
            self.tables.setdefault(self.caption, []).append([])
        elif tag in ("th", "td"):
            self.tables[self.caption][-1].append("")
            self.sink = "cell"
        elif tag == "small" and self.sink == "cell":
            self.tables[self.caption][-1][-1] += " "

    def handle_endtag(self, tag):
        if tag in ("caption", "th", "td"):
            self.sink = None

    def handle_data(self, data):
        self.text += data
        if self.sink == "caption":
            self.caption += data
        elif self.sink == "cell":
            self.tables[self.caption][-1][-1] += data

    def table(self, start):
        (found,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return {row[0]: row[1:] for row in found}


def test_table_of_hospitals_has_mean_and_named_worst_of_each_column(tmp_path):
    page = Page(report(tmp_path, full_summary(), metrics(FEDERATED)))
    table = page.table("Images per split")
    assert list(table) == [
        *("Hospital", "hospital-1", "hospital-2", "hospital-10"),
        *("Mean over hospitals", "Worst hospital", "All images together"),
    ]
    assert table["hospital-1"][:3] == ["1,000", "90", "110"]
    assert table["hospital-1"][3:] == ["0.900", "0.700", "0.750", "0.600", "0.950"]
    assert table["Mean over hospitals"] == ["", "", "", "0.800", "0.770", "0.760", "0.750", "0.750"]
    assert table["Worst hospital"] == [
        *("", "", "", "0.700 hospital-10", "0.700 hospital-1", "0.730 hospital-10"),
        *("0.600 hospital-1", "0.500 hospital-10"),
    ]
    assert table["All images together"][:3] == ["3,000", "270", "330"]
    assert table["All images together"][3:] == ["0.810", "0.770", "0.760", "0.750", "0.740"]


def test_comparison_says_who_gained_and_who_lost(tmp_path):
    page = Page(report(tmp_path, full_summary()))
    table = page.table("AUC on each")
    assert table["hospital-1"] == ["0.850", "0.900", "0.910", "+0.050"]
    assert table["hospital-2"] == ["0.820", "0.800", "0.850", "−0.020"]
    assert table["Mean over hospitals"] == ["0.757", "0.800", "0.837", "+0.043"]
    assert table["Worst hospital"] == [
        *("0.600 hospital-10", "0.700 hospital-10", "0.750 hospital-10", "−0.020 hospital-2"),
    ]
    assert table["All images together"] == ["0.600 mean of all models", "0.810", "0.840", "+0.210"]
    assert (
        "Of 3 hospitals 2 gained AUC (hospital-10 +0.100, hospital-1 +0.050) "
        "and 1 lost (hospital-2 −0.020) against their own models alone."
    ) in page.text


def test_result_and_run_in_words(tmp_path):
    text = Page(report(tmp_path, full_summary())).text
    assert (
        "On 330 test images of all hospitals together the federated model reaches AUC 0.810, "
        in (text)
    )
    assert "Mean AUC over 3 hospitals: 0.800. Worst hospital: hospital-10, AUC 0.700." in text
    assert "2025-11-04 09:12 · 3 hospitals · 2 of 2 rounds" in text
    assert "1:02:05 h:min:s" in text
    assert "did not finish" not in text


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


def test_one_class_site_has_a_dash_and_a_footnote(tmp_path):
    summary = full_summary()
    for part in (summary["test"]["sites"], summary["test"]["local"]):
        del part["hospital-10"]["auc"]
    page = Page(report(tmp_path, summary))
    table = page.table("Images per split")
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
    assert parsed.table("Images per split")[shown][3] == "0.900"
    assert parsed.table("1 of 1")["3"][1] == shown


def test_forty_sites_fall_back_to_a_band_and_name_the_worst(tmp_path):
    sites = [f"hospital-{number}" for number in range(1, 41)]
    summary = full_summary()
    summary["sites"] = {site: {"train": 5, "val": 5, "test": 5} for site in sites}
    summary["test"] = {"sites": {s: {"auc": 0.9 - i / 100} for i, s in enumerate(sites)}}
    page = report(tmp_path, summary, metrics(sites, rounds=20))
    parsed = Page(page)
    assert list(parsed.table("Images per split"))[1:41] == sites
    assert "shaded: all hospitals" in parsed.text
    assert "Validation AUC · worst: hospital-40, 0.530" in parsed.text
    assert "Validation loss · worst: hospital-1, 0.920" in parsed.text
    assert PALETTE[0] not in page


def test_one_colour_per_hospital_throughout(tmp_path):
    page = report(tmp_path, full_summary(), metrics(FEDERATED))
    keys = re.findall(r'stroke="(#\w+)"[^>]*/></svg>(hospital-\d+)', page)
    assert set(keys) == set(zip(PALETTE, ("hospital-1", "hospital-2", "hospital-10"), strict=False))
    assert "shaded" not in page
    for colour in PALETTE[:3]:
        assert page.count(f"stroke: {colour}") >= 4
    assert f"stroke: {PALETTE[3]}" not in page


def test_generated_images_are_said_so_before_anything_else(tmp_path):
    page = report(tmp_path, full_summary() | {"generated": True})
    first = page[page.index("<body>") :].split("</div>")[0]
    assert first.endswith(">generated images, not patients")
    assert "generated images" not in report(tmp_path, full_summary())


def test_page_loads_nothing_and_is_small(tmp_path):
    page = report(tmp_path, full_summary(), metrics([f"h{n}" for n in range(5)], rounds=50))
    parsed = Page(page)
    loads = [v for _, attrs in parsed.tags for k, v in attrs.items() if k.endswith(("src", "href"))]
    assert page.count("<svg role") == 4
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
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
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
    assert page.table("Images per split")["Mean over hospitals"][3] == "0.750"
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
    assert "the hospitals told <b>2.500</b> at most" in words
    assert "Not covered, since it carries no noise: numbers of images, and all that" in words
    assert "Each model for comparison is a run of its own" in words
    assert "Privacy accounting" not in page
    text = " ".join(re.sub("<[^>]*>", " ", page).split())
    assert "hospital-1 2.500 2 0" in text
    assert "hospital-2 – 0 2" in text
    page = report(tmp_path, private_summary(**{"private-metrics": True}))
    assert "Evaluation counts carry noise too" in page
    assert "confusion counts" not in " ".join(page.split())


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
