"""Tables show what is certain: bounds of quantiles and curves, and no interpolated value."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from statistics_rows import ask, make_patients

from fedmed_flower.statistics.replies import read_reply
from fedmed_flower.statistics.request import Request, Survival
from fedmed_flower.statistics.server import Answer, _content
from fedmed_flower.statistics.table import APART, _drift, table_one, tables


def surveyed(tmp_path, hospitals, minimum=10, schema=None, **request):
    """Return the content of ``statistics.json`` of hospitals' rows, by their names."""
    if "survival" in request:
        request["survival"] = Survival(*request["survival"])
    answer = Answer(Request(**request))
    for name, rows in hospitals.items():
        found = ask(rows, tmp_path / name, minimum, schema=schema, **request)
        answer.sites[name] = read_reply(json.dumps({"minimum": minimum, "noise": None} | found))
    return _content(answer, "", "c2")


def of_values(values, name="x"):
    return [{"patient": f"p{number}", name: value} for number, value in enumerate(values)]


def medians(content, variable="x"):
    """Return the medians and quartiles by hospital and overall, as Table 1 shows them."""
    (rows,) = [table["rows"] for table in tables(content) if table["title"] == "Table 1"]
    (row,) = [row[1:] for row in rows if row[0] == f"{variable}, median [Q1, Q3]"]
    return row


class TestQuantiles:
    # How many patients have had 0, 1, 2, ... visits.
    VISITS = (60, 50, 20, 20, 24, 16, 14)

    def visits(self):
        values = np.repeat(np.arange(len(self.VISITS)), self.VISITS)
        return np.random.default_rng(0).permutation(values).tolist()

    def test_whole_numbers_are_exact(self, tmp_path):
        """Between whole numbers 1.99 [0.80, 4.25] would be nobody's numbers of visits."""
        values = self.visits()
        hospitals = {"north": of_values(values[:100]), "south": of_values(values[100:])}
        series = pd.Series(values)
        assert [series.quantile(q) for q in (0.25, 0.5, 0.75)] == [0, 1, 4]
        content = surveyed(tmp_path, hospitals, 5, kinds=("histograms",), whole=("x",))
        assert medians(content)[-1] == "1 [0, 4]"
        assert content["groups"][""]["overall"]["numeric"]["x"]["whole"] is True

    def test_without_that_declaration_they_are_bounds(self, tmp_path):
        hospitals = {"north": of_values(self.visits())}
        content = surveyed(tmp_path, hospitals, 5, kinds=("histograms",), resolutions={"x": 1.0})
        assert medians(content)[-1] == "1.00 to <2.00 [0.000 to <1.00, 4.00 to <5.00]"

    def test_merged_bins_of_whole_numbers_have_a_first_and_a_last(self, tmp_path):
        hospitals = {"north": of_values(self.visits())}
        content = surveyed(tmp_path, hospitals, 15, kinds=("histograms",), whole=("x",))
        assert medians(content)[-1] == "1 [0, 4]"
        content = surveyed(
            tmp_path / "coarse",
            hospitals,
            kinds=("histograms",),
            whole=("x",),
            resolutions={"x": 3.0},
        )
        assert medians(content)[-1] == "0 to 2 [0 to 2, 3 to 5]"

    def test_a_median_between_two_whole_numbers(self, tmp_path):
        values = [3] * 20 + [4] * 20
        content = surveyed(
            tmp_path, {"north": of_values(values)}, kinds=("histograms",), whole=("x",)
        )
        assert medians(content)[-1] == "3.50 [3, 4]"

    def test_a_column_with_many_zeros(self, tmp_path):
        """Interpolated between 0 and .2, the median would be .142; nobody has that."""
        values = [0.0] * 70 + [0.2 * step + 0.1 for step in range(1, 4) for _ in range(10)]
        content = surveyed(
            tmp_path,
            {"north": of_values(values)},
            kinds=("histograms",),
            resolutions={"x": 0.2},
        )
        quantile = content["groups"][""]["overall"]["numeric"]["x"]["quantiles"]["0.5"]
        assert quantile["estimate"] == pytest.approx(0.143, abs=1e-3)
        assert (quantile["low"], quantile["high"]) == (0.0, 0.2)
        assert medians(content)[-1] == "0.000 to <0.200 [0.000 to <0.200, 0.200 to <0.400]"

    def test_bounds_that_are_printed_alike_are_one_number(self, tmp_path):
        values = [54.30, 54.31] * 20
        content = surveyed(
            tmp_path,
            {"north": of_values(values)},
            kinds=("histograms",),
            resolutions={"x": 0.01},
        )
        assert medians(content)[-1] == "54.3 [54.3, 54.3]"

    def test_hospitals_that_differ_in_the_declaration_are_bounded_together(self, tmp_path):
        values = self.visits()
        answer = Answer(Request(kinds=("histograms",), resolutions={"x": 1.0}))
        for name, whole in (("north", ("x",)), ("south", ())):
            found = ask(
                of_values(values),
                tmp_path / name,
                5,
                kinds=("histograms",),
                resolutions={"x": 1.0},
                whole=whole,
            )
            answer.sites[name] = read_reply(json.dumps({"minimum": 5, "noise": None} | found))
        assert medians(_content(answer, "", "c2")) == [
            "1 [0, 4]",
            *["1.00 to <2.00 [0.000 to <1.00, 4.00 to <5.00]"] * 2,
        ]

    @pytest.mark.parametrize(
        ("low", "high", "whole", "text"),
        [
            *[(None, 20.0, False, "<20.0"), (None, 20.0, True, "≤20")],
            *[(20.0, None, False, "≥20.0"), (20.0, None, True, "≥20"), (None, None, True, "–")],
            *[(-math.inf, 3.0, False, "<3.00"), (-5.0, -2.0, True, "−5 to −2")],
            *[(1999.0, 2001.0, True, "1,999 to 2,001"), (1.5, 1.5, True, "1.50")],
        ],
    )
    def test_open_ends(self, low, high, whole, text):
        quantile = {"estimate": 19.0, "low": low, "high": high}
        numbers = {"n": 9, "missing": 0, "whole": whole}
        numbers["quantiles"] = dict.fromkeys(("0.25", "0.5", "0.75"), quantile)
        figures = {"rows": 9, "patients": 9, "numeric": {"x": numbers}, "categorical": {}}
        rows = table_one("", {"sites": {}, "overall": figures})["rows"]
        assert rows[1] == ["x, median [Q1, Q3]", f"{text} [{text}, {text}]"]

    def test_with_noise_bounds_are_not_certain_and_the_estimate_is_shown(self):
        quantile = {"estimate": 19.0, "low": 10.0, "high": 20.0}
        open_one = {"estimate": 19.0, "low": None, "high": 20.0}
        numbers = {"n": 9, "missing": 0, "whole": False}
        numbers["quantiles"] = {"0.25": open_one, "0.5": quantile, "0.75": quantile}
        figures = {"rows": 9, "patients": 9, "numeric": {"x": numbers}, "categorical": {}}
        rows = table_one("", {"sites": {}, "overall": figures}, noised=True)["rows"]
        assert rows[1] == ["x, median [Q1, Q3]", "19.0 [<20.0, 19.0]"]


class TestCurves:
    ASKED = ("time", "event", 12.0, 1.0)

    def curve(self, content, start="Kaplan-Meier"):
        return [table for table in tables(content) if table["title"].startswith(start)]

    def test_what_is_known_and_what_is_bounded(self, tmp_path):
        hospitals = {
            name: make_patients(count, number, name)
            for number, (name, count) in enumerate((("north", 400), ("south", 120), ("west", 4)))
        }
        (exact,) = self.curve(surveyed(tmp_path / "a", hospitals, 1, survival=self.ASKED))
        assert exact["title"] == "Kaplan-Meier: 524 patients of 3 of 3 hospitals"
        assert exact["head"] == [
            *[
                "time",
                "at risk after",
                "events until then",
                "survival, times rounded up",
                "at least",
                "at most",
            ]
        ]
        assert len(exact["rows"]) == 12
        frame = pd.DataFrame([row for rows in hospitals.values() for row in rows])
        left = int((frame.time > 1).sum())
        events = int(((frame.time <= 1) & (frame.event == 1)).sum())
        assert exact["rows"][0][:3] == ["1.00", str(left), str(events)]
        assert exact["rows"][0][3] == exact["rows"][0][5] == f"{1 - events / 524:.3f}"
        (bounded,) = self.curve(surveyed(tmp_path / "b", hospitals, 10, survival=self.ASKED))
        assert bounded["title"] == "Kaplan-Meier: 520 patients of 2 of 3 hospitals; not west"
        _, at_risk, happened, survival, low, high = bounded["rows"][-2]
        assert (survival, " to " in at_risk, " to " in happened) == ("–", True, True)
        assert 0 < float(low) < float(high) < 1

    def groups(self, sizes):
        """Return a hospital's rows: how many patients each group has."""
        rows = []
        for group, size in sizes.items():
            made = make_patients(size, size, group)
            rows += [row | {"stage": group} for row in made]
        return rows

    def test_groups_are_compared_over_the_same_hospitals(self, tmp_path):
        hospitals = {
            "north": self.groups({"I": 200, "II": 210}),
            "south": self.groups({"I": 190, "II": 220}),
            "west": self.groups({"II": 230}),
        }
        asked = {"by": "stage", "columns": ("age",), "survival": self.ASKED}
        content = surveyed(tmp_path, hospitals, **asked)
        one, two = self.curve(content)
        assert one["title"] == ("Kaplan-Meier, stage I: 390 patients of 2 of 3 hospitals; not west")
        assert two["title"] == (
            "Kaplan-Meier, stage II: 430 patients of 2 of 3 hospitals; not west"
        )
        groups = content["groups"]
        assert groups["II"]["overall"]["survival"]["sites"] == ["north", "south"]
        # Each hospital's own curve, and all other figures, are still there.
        assert groups["II"]["sites"]["west"]["survival"]["patients"] == 230
        assert groups["II"]["overall"]["patients"] == 660

    def test_a_group_without_a_common_hospital_is_not_pooled(self, tmp_path):
        hospitals = {
            "north": self.groups({"I": 200, "II": 210}),
            "west": self.groups({"III": 230}),
        }
        asked = {"by": "stage", "columns": ("age",), "survival": self.ASKED}
        content = surveyed(tmp_path, hospitals, **asked)
        assert [table["title"].partition(":")[0] for table in self.curve(content)] == [
            *["Kaplan-Meier, stage I", "Kaplan-Meier, stage II"]
        ]
        (apart,) = self.curve(content, APART)
        why = "no hospital has a curve of each compared group"
        assert apart["rows"] == [["stage III", "west", why]]
        assert content["groups"]["III"]["overall"]["survival"]["hospitals"] == 0

    def test_what_hospitals_put_among_all_others_does_not_decide(self, tmp_path):
        """North has seven patients of stage III and eight of stage IV, south none."""
        few = [row | {"time": 5.0, "event": 1} for row in self.groups({"III": 7, "IV": 8})]
        hospitals = {
            "north": self.groups({"I": 200, "II": 210}) + few,
            "south": self.groups({"I": 190, "II": 220}),
        }
        asked = {"by": "stage", "columns": ("age",), "survival": self.ASKED}
        content = surveyed(tmp_path, hospitals, **asked)
        groups = content["groups"]
        assert groups["all others"]["sites"]["north"]["survival"]["patients"] == 15
        assert groups["I"]["overall"]["survival"]["sites"] == ["north", "south"]
        assert groups["II"]["overall"]["survival"]["sites"] == ["north", "south"]
        (apart,) = self.curve(content, APART)
        assert [row[0] for row in apart["rows"]] == ["stage all others"]


def test_drift_says_in_one_column_what_was_compared_and_what_came_of_it():
    entry = {"site": "a", "group": "", "against": "all others", "column": "sex"}
    found = [
        entry | {"what": "categories", "psi": 0.5, "p": 0.001, "stands_out": "F and M swapped"},
        entry | {"what": "missing values", "difference": 0.0, "p": 1.0, "corrected": 1.0},
        entry | {"what": "numbers", "note": "no histogram"},
    ]
    table = _drift(found)
    assert [row[3] for row in table["rows"]] == [
        "categories: stands out",
        "missing values",
        "numbers: no histogram",
    ]
    assert all(len(row) == len(table["head"]) for row in table["rows"])
    assert table["head"][-1] == "p, corrected"
