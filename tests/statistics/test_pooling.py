import math
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
from statistics_rows import ask, group, make_patients, where, withheld
from tiny import says

from fedmed_flower import InputError
from fedmed_flower.data.sources import HEART_FEATURES, load_heart_disease
from fedmed_flower.statistics.cells import grid, merge_neighbours, pool_small
from fedmed_flower.statistics.declared import Declared
from fedmed_flower.statistics.pooling import (
    below_edges,
    cumulate,
    pool_counts,
    pool_moments,
    pool_quantile,
    same_bins,
)
from fedmed_flower.statistics.request import KINDS, Filter, Request, Survival, parse_filter
from fedmed_flower.statistics.summary import (
    alarms,
    alert_weeks,
    summarise,
)
from fedmed_flower.statistics.withheld import NO_DATES

TENTH = 1e-10


def hospitals(tmp_path, counts=(120, 60, 250), minimum=10, rows=None, **request):
    """Return the answers of several hospitals, and their rows as one table."""
    tables = rows or [make_patients(n, number, f"{number}-") for number, n in enumerate(counts)]
    told = [
        group(ask(table, tmp_path / f"{number}", minimum, **request))
        for number, table in enumerate(tables)
    ]
    return told, pd.DataFrame([row for table in tables for row in table])


def test_bands_and_numbers_stand_as_they_grow_and_words_after_them():
    names = ["words", "60-75", "10", ">=75", "9.5", "<60", "a"]
    counted, few = pool_counts([{"names": names, "counts": range(7), "few": 3}])
    assert [*counted] == ["9.5", "10", "<60", "60-75", ">=75", "a", "words"]
    assert counted["10"] == 2
    assert few == 3


class TestAsPandas:
    def test_moments(self, tmp_path):
        told, frame = hospitals(tmp_path)
        found = summarise(told)["numeric"]
        for name in ("age", "lab", "time"):
            assert found[name]["n"] == frame[name].count()
            assert found[name]["missing"] == frame[name].isna().sum()
            assert found[name]["mean"] == pytest.approx(frame[name].mean(), rel=TENTH)
            assert found[name]["variance"] == pytest.approx(frame[name].var(), rel=TENTH)
            assert found[name]["sd"] == pytest.approx(frame[name].std(), rel=TENTH)

    @pytest.mark.parametrize("offset", [1e6, -1e6, 1e9])
    def test_moments_of_values_far_from_zero(self, tmp_path, offset):
        """Compared with exact values: 1e9 + x is rounded as a float, and so it is taken."""
        rng = np.random.default_rng(3)
        values = [offset + rng.normal(site, 0.01, 40) for site in range(3)]
        tables = [
            [{"patient": f"{site}-{n}", "x": float(v)} for n, v in enumerate(own)]
            for site, own in enumerate(values)
        ]
        told, _ = hospitals(tmp_path, rows=tables)
        found = summarise(told)["numeric"]["x"]
        exact = pd.Series(np.concatenate(values) - offset)
        assert found["mean"] - offset == pytest.approx(exact.mean(), abs=abs(offset) * 2e-16)
        assert found["variance"] == pytest.approx(exact.var(), rel=TENTH)

    def test_moments_of_a_group_and_under_conditions(self, tmp_path):
        conditions = where("age >= 40", "sex == f")
        told, frame = hospitals(tmp_path, (200, 150, 250), columns=("lab",), **conditions)
        part = frame[(frame.age >= 40) & (frame.sex == "f")].lab
        found = summarise(told)["numeric"]["lab"]
        assert found["n"] == part.count()
        assert found["variance"] == pytest.approx(part.var(), rel=TENTH)

    def test_tables(self, tmp_path):
        told, frame = hospitals(tmp_path, categorical=("event",))
        found = summarise(told)["categorical"]
        assert found["sex"]["counts"] == frame.sex.value_counts().sort_index().to_dict()
        assert found["event"]["counts"] == {
            str(k): v for k, v in frame.event.value_counts().items()
        }
        # The rare centre is named where it has ten patients; else it is among the few.
        named = found["centre"]["counts"]
        assert sum(named.values()) + found["centre"]["few"] == len(frame)
        assert named["c"] < (frame.centre == "c").sum()

    def test_two_way_tables(self, tmp_path):
        told, frame = hospitals(tmp_path, categorical=("event",), pairs=(("sex", "event"),))
        (found,) = summarise(told)["pairs"]
        crossed = pd.crosstab(frame.sex, frame.event.astype(str))
        assert (found["rows"], found["across"]) == (["f", "m"], ["0", "1"])
        assert found["counts"] == crossed.to_numpy().tolist()

    def test_correlations(self, tmp_path):
        rows = [
            [row | {"lab": row["lab"] and row["lab"] + row["age"] / 9} for row in table]
            for table in (make_patients(n, n, f"{n}-") for n in (120, 130, 250))
        ]
        told, frame = hospitals(tmp_path, rows=rows, kinds=("moments", "correlations"))
        expected = frame[["age", "lab", "time", "event"]].corr()
        found = summarise(told)["correlations"]
        assert len(found) == 6
        for entry in found:
            one, other = entry["columns"]
            assert entry["r"] == pytest.approx(expected.loc[one, other], rel=1e-9)
            assert entry["n"] == frame[[one, other]].dropna().shape[0]

    @pytest.mark.parametrize("minimum", [1, 10])
    def test_quantiles(self, tmp_path, minimum):
        told, frame = hospitals(
            tmp_path,
            minimum=minimum,
            kinds=("histograms",),
            columns=("age", "lab", "time"),
            resolutions={"age": 1, "lab": 0.5, "time": 0.1},
        )
        found = summarise(told)["numeric"]
        for name, width in (("age", 1), ("lab", 0.5), ("time", 0.1)):
            for share, quantile in found[name]["quantiles"].items():
                value, low, high = quantile.values()
                exact = frame[name].quantile(float(share))
                assert low <= exact <= high
                assert low <= value <= high
                if minimum == 1:
                    nearest = [
                        frame[name].quantile(float(share), interpolation=end)
                        for end in ("lower", "higher")
                    ]
                    assert nearest[0] - low <= width * 1.001
                    assert high - nearest[1] <= width * 1.001
        spread = frame.age.std()
        assert found["age"]["quantiles"]["0.5"]["estimate"] == pytest.approx(
            frame.age.median(), abs=spread / 5
        )

    def test_quantiles_of_few_values_are_exact(self, tmp_path):
        """Where cells are full none is merged, and the ends are told too."""
        rows = [[{"patient": n, "x": n % 4} for n in range(80)] for _ in range(2)]
        told, frame = hospitals(tmp_path, rows=rows, kinds=("histograms",), resolutions={"x": 1.0})
        assert told[0]["numeric"]["x"]["histogram"] == {
            **{"edges": [0, 1, 2, 3, 4], "counts": [0, 20, 20, 20, 20, 0], "whole": False}
        }
        quantiles = summarise(told)["numeric"]["x"]["quantiles"].values()
        assert [frame.x.quantile(q) for q in (0.25, 0.5, 0.75)] == [0.75, 1.5, 2.25]
        bounds = [(quantile["low"], quantile["high"]) for quantile in quantiles]
        # Between the 40th value, from 0 to 1, and the 41st, from 1 to 2: three quarters of it.
        assert bounds == [(0.75, 1.75), (1.5, 2.5), (2.25, 3.25)]

    def test_rows_of_one_patient(self, tmp_path):
        """Rows are what is counted and averaged."""
        table = [row | {"patient": n // 3} for n, row in enumerate(make_patients(90))]
        told, frame = hospitals(tmp_path, rows=[table])
        found = summarise(told)
        assert (found["rows"], found["patients"]) == (90, 30)
        assert found["numeric"]["age"]["variance"] == pytest.approx(frame.age.var(), rel=TENTH)

    @pytest.mark.realdata
    def test_heart_disease(self, tmp_path):
        tables = []
        for name, table in load_heart_disease().items():
            columns = [dict(zip(HEART_FEATURES, row, strict=True)) for row in table.features]
            tables.append([{"patient": f"{name}-{n}", **row} for n, row in enumerate(columns)])
        told, frame = hospitals(tmp_path, rows=tables, categorical=("sex", "cp"))
        found = summarise(told)
        for name in ("age", "chol", "trestbps", "thalach", "oldpeak"):
            assert found["numeric"][name]["n"] == frame[name].count()
            assert found["numeric"][name]["mean"] == pytest.approx(frame[name].mean(), rel=TENTH)
            assert found["numeric"][name]["variance"] == pytest.approx(frame[name].var(), rel=TENTH)
        # Six women in Long Beach: their number leaves together with that of the men alone.
        assert found["categorical"]["sex"]["counts"] == {"0": 188, "1": 532}
        assert found["categorical"]["sex"]["few"] == 200


class TestSurvival:
    def test_the_longest_time_is_told_of_ten_patients_only(self, tmp_path):
        times = [2.0] * 30 + [3.5] * 30 + [5.5] * 40
        rows = [{"patient": n, "time": time, "event": n % 2} for n, time in enumerate(times)]
        told = group(ask(rows, tmp_path / "a", survival=("time", "event", 50.0, 1.0)))
        assert told["survival"]["times"][-1] == 6
        rows.append({"patient": 999, "time": 33.0, "event": 1})
        told = group(ask(rows, tmp_path / "b", survival=("time", "event", 50.0, 1.0)))
        # Nor is it told whether it is beyond the horizon.
        assert told["survival"]["times"][-1] == 51


class TestCells:
    def test_grid_by_hand(self):
        steps, width = grid(np.array([-0.1, 0.0, 0.3, 0.7, 1.1]), 0.1)
        assert width == 0.1
        # 0.3 is below 3 * 0.1 in floating point, which is 0.30000000000000004.
        assert steps.tolist() == [-1, 0, 2, 6, 11]

    def test_values_lie_between_their_edges(self):
        values = np.random.default_rng(0).normal(0, 1e3, 1000).round(1)
        steps, width = grid(values, 0.1)
        assert (steps * width <= values).all()
        assert (values < (steps + 1) * width).all()

    def test_a_width_that_floats_cannot_hold(self):
        steps, width = grid(np.array([1e90, 2e90]), 1.0)
        assert width > 1e70
        assert steps[0] < steps[1]

    def test_neighbours_by_hand(self):
        steps = np.array([0, 0, 1, 1, 1, 5, 6, 6])
        patient_of_row, apart = np.arange(8), np.zeros(8, np.int64)
        assert merge_neighbours(steps, [apart], patient_of_row, 2) == [(0, 0), (1, 1), (5, 6)]
        assert merge_neighbours(steps, [apart], patient_of_row, 4) == [(0, 6)]
        assert merge_neighbours(steps, [apart], patient_of_row, 9) is None
        # Each bin must have two of either class, or none.
        assert merge_neighbours(steps, [np.array([0, 0, 0, 1, 1, 1, 0, 0])], patient_of_row, 2) == [
            *[(0, 0), (1, 6)]
        ]

    def test_small_cells_by_hand(self):
        cells, labels = np.array([0] * 5 + [1] * 2 + [2] * 3), np.zeros(10, np.int64)
        patient_of_row = np.arange(10)
        assert pool_small(cells, labels, patient_of_row, 3).tolist() == [0] * 5 + [-1] * 5
        assert pool_small(cells, labels, patient_of_row, 2).tolist() == cells.tolist()
        assert pool_small(cells, labels, patient_of_row, 6).tolist() == [-1] * 10
        assert pool_small(cells, labels, patient_of_row, 11) is None

    def test_one_bin_has_no_edges(self):
        parts = [{"edges": [], "counts": [10]}]
        assert pool_quantile(parts, 0.5)[1:] == (-math.inf, math.inf)
        assert same_bins(parts) is None

    def test_quantile_by_hand(self):
        """Of 0 to 1, 1 to 2 and 2 to 4 with 10 each; the middle two of 30 lie in the second."""
        part = {"edges": [0.0, 1.0, 2.0, 4.0], "counts": [0, 10, 10, 10, 0]}
        assert pool_quantile([part], 0.5) == (1.5, 1.0, 2.0)
        assert pool_quantile([part, part], 1.0)[1:] == (2.0, 4.0)

    def test_cumulated_by_hand(self):
        fine = {"edges": [0.0, 1.0, 2.0], "counts": [0, 10, 30, 0]}
        coarse = {"edges": [1.5], "counts": [20, 20]}
        edges, below = cumulate([fine, coarse])
        assert edges == [0.0, 1.0, 1.5, 2.0]
        assert below.tolist() == [[0, 10, 25, 40], [0, 40 / 3, 20, 40]]
        assert [counts.tolist() for counts in same_bins([fine, coarse])] == [[25, 15], [20, 20]]

    def test_what_rounding_leaves_in_a_bin_counts_nobody(self):
        """0.1 + 0.2 + 0.3, one after the other, is more than their sum, and 3 * 0.1 than 0.3."""
        noised = {"edges": [1.0, 2.0, 3.0], "counts": [0.1, 0.2, 0.3, 0.0]}
        assert same_bins([noised])[0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.0])
        assert same_bins([noised])[0][-1] == 0
        tenths = {"edges": [0.1, 0.2, 3 * 0.1], "counts": [0, 10, 10, 0]}
        other = {"edges": [0.1, 0.3], "counts": [0, 20, 0]}
        assert same_bins([tenths, other])[0].tolist() == pytest.approx([0, 20, 0])
        assert same_bins([tenths, other])[0][-1] == 0

    def test_bounds_below_each_edge_by_hand(self):
        """At 0 up to the twenty below 1.5 may be below it; at 1.5 those from 1 to 2 may be."""
        fine = {"edges": [0.0, 1.0, 2.0], "counts": [0, 10, 30, 0]}
        coarse = {"edges": [1.5], "counts": [20, 20]}
        edges, least, most = below_edges([fine, coarse])
        assert edges == [0.0, 1.0, 1.5, 2.0]
        assert least.tolist() == [0, 10, 30, 60]
        assert most.tolist() == [20, 30, 60, 80]

    def test_values_lie_between_the_bounds_below_each_edge(self, tmp_path):
        told, frame = hospitals(tmp_path, kinds=("histograms",), resolutions={"age": 2.0})
        parts = [part["numeric"]["age"]["histogram"] for part in told]
        edges, least, most = below_edges(parts)
        below = [(frame.age < edge).sum() for edge in edges]
        assert (least <= below).all()
        assert (below <= most).all()
        assert (least < most).any()


class TestBadColumns:
    def test_text_and_nan_in_numbers(self, tmp_path):
        values = ["high", math.nan, math.inf, None, 10**400, 1e200, True, *range(1, 31)]
        rows = [{"patient": n, "x": value} for n, value in enumerate(values)]
        told = group(ask(rows, tmp_path / "a"))["numeric"]["x"]
        assert (told["n"], told["missing"]) == (31, 6)
        assert told["mean"] == pytest.approx((sum(range(1, 31)) + 1) / 31)

    def test_one_category_however_it_is_written(self, tmp_path):
        values = [1, 1.0, "1", True, " 1 ", "1.0", np.int64(1), np.float32(1)] * 2 + [
            "",
            "NA",
            None,
        ]
        rows = [{"patient": n, "x": value} for n, value in enumerate(values)]
        told = group(ask(rows, tmp_path / "a", categorical=("x",)))["categorical"]["x"]
        assert told == {"n": 16, "missing": 3, "names": ["1"], "counts": [16], "few": 0}

    def test_constant_and_empty_columns(self, tmp_path):
        rows = [{"patient": n, "x": 7, "y": None, "z": n} for n in range(20)]
        told = ask(rows, tmp_path / "a", kinds=KINDS, resolutions={"x": 1.0, "z": 1.0, "y": 1.0})
        found = summarise(told["groups"])
        assert found["numeric"]["x"]["sd"] == 0
        assert [*found["numeric"]["x"]["quantiles"]["0.5"].values()][1:] == [7, 8]
        assert found["numeric"]["y"] == {"n": 0, "missing": 20, "hospitals": 1}
        (constant,) = [e for e in found["correlations"] if e["columns"] == ["x", "z"]]
        assert math.isnan(constant["r"])

    def test_a_column_that_is_missing(self, tmp_path):
        told = ask(make_patients(30), tmp_path / "a", columns=("age", "weight"))
        assert told["withheld"] == [["", "weight", "there is no such column of single values"]]
        assert "age" in group(told)["numeric"]

    def test_columns_of_arrays_are_none(self, tmp_path):
        rows = [{"patient": n, "image": "x.png", "scan": np.zeros(3), "age": n} for n in range(20)]
        assert list(group(ask(rows, tmp_path / "a"))["numeric"]) == ["age"]

    def test_nothing_says_how_finely(self, tmp_path):
        told = ask(make_patients(30), tmp_path / "a", columns=("age",), kinds=("histograms",))
        reason = "it has neither a resolution nor a declared range"
        assert told["withheld"] == [["", "histogram of age", reason]]

    def test_a_declared_range_says_how_finely(self, tmp_path):
        schema = type("Schema", (), {"ranges": {"age": (0.0, 100.0)}, "categorical": ("event",)})
        asked = {"columns": ("age", "event"), "kinds": ("histograms", "tables")}
        told = group(ask(make_patients(3000), tmp_path / "a", schema=schema, **asked))
        assert told["numeric"]["age"]["histogram"]["edges"][:2] == [20, 22]
        assert told["categorical"]["event"]["names"] == ["0", "1"]

    @pytest.mark.parametrize(
        ("limits", "width"),
        [
            *[((0, 100), 2), ((18, 100), 1), ((50, 700), 10), ((-5, 10), 0.2), ((0, 5e6), 1e5)],
            *[((0, 0.25), 0.005), ((0, 5e-14), 1e-15), ((0, 1e-299), 2e-301), ((0, 5e24), 1e23)],
        ],
    )
    def test_a_range_gives_a_round_resolution(self, limits, width):
        assert Declared(Request(ranges={"x": limits})).resolution("x") == width

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (
                "weight > 3",
                "there is no column 'weight' of single values: there are age, lab, sex,"
                " centre, time, event",
            ),
            ("age == old", "age holds numbers and cannot be compared with 'old'"),
            ("sex < 3", "sex holds categories: compare it by == or !=, not <"),
        ],
    )
    def test_conditions_that_cannot_be_met(self, tmp_path, text, said):
        with pytest.raises(InputError, match=says(said)):
            ask(make_patients(30), tmp_path / "a", **where(text))

    def test_weeks(self, tmp_path):
        """Two full weeks, one with three rows between them, and one long before."""
        days = ["2024-01-01"] * 12 + ["2024-01-07"] * 5 + ["2024-01-10"] * 3 + ["2024-01-22"] * 11
        rows = [{"patient": n, "day": day} for n, day in enumerate([*days, *["2020-02-02"] * 9])]
        told = group(ask(rows, tmp_path / "a", weekly="day"))
        assert told["weeks"]["start"] == "2024-01-01"
        assert told["weeks"]["counts"] == [17, None, 0, 11]

    def test_dates_that_cannot_be_read_are_said(self, tmp_path, caplog):
        days = [f"{day}.01.2020" for day in range(10, 31)] + ["2020-01-13"] * 4
        rows = [{"patient": n, "day": day, "x": n} for n, day in enumerate(days)]
        reply = ask(rows, tmp_path / "a", weekly="day")
        assert ["", "weeks by day", NO_DATES] in reply["withheld"]
        text = "day: no date in 21 of 25 values, such as '10.01.2020': write dates as 2020-01-13"
        assert caplog.text.count(text) == 1
        windows = ask(rows, tmp_path / "b", columns=("x",), by="day", by_width=30.0)
        assert windows["groups"] == []
        assert windows["withheld"][0][2] == NO_DATES

    def test_windows(self, tmp_path):
        rows = [{"patient": n, "day": n, "x": n} for n in range(95)]
        told = ask(rows, tmp_path / "a", columns=("x",), by="day", by_width=30.0)
        assert [(g["name"], g["rows"]) for g in told["groups"]] == [
            *[("30 to 60", 30), ("60 to 90", 30), ("all others", 35)]
        ]


class TestRequest:
    def test_it_travels_as_it_is(self):
        request = Request(
            columns=("age",),
            where=(parse_filter("age>=50"), parse_filter(" sex = 'f' ")),
            survival=Survival("time", "event", 5.0, 0.5),
            ranges={"age": (0.0, 120.0)},
            categories={"sex": ("f", "m")},
            pairs=(("sex", "centre"),),
            resolutions={"age": 2.0},
            whole=("visits",),
            epsilon=1.0,
        )
        assert Request.from_text(request.to_text()) == request
        assert request.where == (Filter("age", ">=", 50.0), Filter("sex", "==", "f"))

    @pytest.mark.parametrize(
        "text",
        [
            *("", "[]", "3", '{"columns": 3}', '{"where": [[1]]}', '{"epsilon": NaN}', '{"x": 1}'),
            *('{"ranges": {"a": [1]}}', '{"survival": []}', '{"minimum": true}', "[" * 10**5),
            *('{"resolutions": {"a": "x"}}', '{"where": [["a", "<", true]]}', '{"by": 3}'),
            *('{"columns": [["a"]]}', '{"delta": 1' + "0" * 400 + "}", '{"pairs": [["a", "a"]]}'),
        ],
    )
    def test_what_is_no_request(self, text):
        with pytest.raises(InputError):
            Request.from_text(text)

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            (
                {"kinds": ("rows",)},
                "kinds must be among tables, moments, histograms, correlations, got 'rows'",
            ),
            (
                {"resolutions": {"age": 0.0}},
                "the resolution of age must be above 0 and at most 1e+100, got 0.0",
            ),
            (
                {"survival": Survival("t", "e", 1.7e308, 1e308)},
                "the horizon of survival must be above 0 and at most 1e+100, got 1.7e+308",
            ),
            (
                {"by": "t", "by_width": -1.0},
                "by_width must be above 0 and at most 1e+100, got -1.0",
            ),
            (
                {"ranges": {"age": (5.0, 5.0)}},
                "the range of age must be two numbers from -1e+100 to 1e+100, the lower first, "
                "got 5.0 and 5.0",
            ),
            (
                {"pairs": (("a", "b"),) * 1001},
                "pairs must be at most 1000, got 1001",
            ),
            (
                {"where": (Filter("age", "=<", 3.0),)},
                "a condition must use one of == != < <= > >=, got '=<'",
            ),
            ({"where": (Filter("sex", "<", "f"),)}, "sex < must be followed by a number, got 'f'"),
            (
                {"epsilon": 1.0, "weekly": "day"},
                "weekly counts and windows carry no noise: leave epsilon, weekly or by_width out",
            ),
            ({"columns": ("a", "a")}, "columns must name each column once"),
            (
                {"categorical": ("a",), "whole": ("a",)},
                "a is declared categorical and to hold whole numbers: leave one of them out",
            ),
            ({"whole": ("",)}, "whole must be of texts of 1 to 200 letters, got ''"),
            (
                {"survival": Survival("t", "t", 1.0, 1.0)},
                "survival must have two different columns"
                " and a horizon of at most 10,000 widths, got t, t, 1.0, 1.0",
            ),
        ],
    )
    def test_what_cannot_be_asked(self, fields, said):
        with pytest.raises(InputError, match=says(said)):
            Request(**fields)

    def test_what_is_no_condition(self):
        with pytest.raises(
            InputError,
            match=says(
                "a condition must be a column, one of == != < <= > >= and a value, got 'age'"
            ),
        ):
            parse_filter("age")
        with pytest.raises(InputError, match="and a value, got 'age=>50'"):
            parse_filter("age=>50")


class TestAlarms:
    weeks: ClassVar = [12, 11, None, 13, 12, 10, 12, 11, 13, 40, 12, 41]

    def told(self, counts):
        return {"weeks": {"first": 105_555, "start": "2024-01-01", "counts": counts}}

    def test_a_week_with_more_cases(self):
        sites = {"north": self.told(self.weeks), "south": self.told([12, 11] * 6)}
        north, south = alarms(sites, "c2")
        assert alert_weeks(north) == ["2024-03-04", "2024-03-18"]
        assert (north["weeks"][0], north["weeks"][-1]) == ("2024-01-01", "2024-03-18")
        assert north["counts"][2] is None
        assert south["alert"] == [None] * 9 + [False] * 3

    def test_a_withheld_week_is_not_judged(self):
        (found,) = alarms({"north": self.told([12, 11] * 5 + [None, 12])}, "c2")
        assert found["alert"] == [None] * 9 + [False, None, False]

    def test_weeks_of_numbered_days(self):
        weeks = {"first": 2, "start": "day 14", "counts": self.weeks}
        (found,) = alarms({"north": {"weeks": weeks}}, "c2")
        assert alert_weeks(found) == ["day 77", "day 91"]

    def test_a_hospital_that_withholds_all_its_weeks_is_listed(self):
        (found,) = alarms({"north": {"numeric": {}}}, "c2")
        assert found == {
            **{"site": "north", "weeks": [], "counts": []},
            "note": "all its weeks are withheld",
        }

    def test_by_farrington(self):
        """Each winter brings more cases, and one summer does."""
        season = [30 if week % 52 < 8 else 10 for week in range(261)]
        season[240] = 30
        (found,) = alarms({"north": self.told(season)}, "farrington")
        assert alert_weeks(found) == ["2028-08-07"]

    def test_by_cusum(self):
        (found,) = alarms({"north": self.told([12, 11, 13] * 5 + [30, 30])}, "cusum")
        assert alert_weeks(found) == ["2024-04-15", "2024-04-22"]

    def test_too_few_weeks(self):
        (found,) = alarms({"north": self.told([12])}, "c2")
        assert found["note"].startswith("counts must have more than 9 weeks")

    def test_an_unknown_method(self):
        with pytest.raises(
            InputError, match=says("alert must be one of c2, cusum, farrington, got 'c9'")
        ):
            alarms({}, "c9")


def test_moments_of_nothing():
    assert math.isnan(pool_moments([]).mean)
    one = [{"n": 1, "mean": 4.0, "rest": 0.0, "m2": 0.0}]
    assert pool_moments(one).mean == 4
    assert math.isnan(pool_moments(one).variance)


def test_nothing_is_withheld_of_many_patients(tmp_path):
    asked = {"kinds": KINDS, "resolutions": {"age": 5.0, "lab": 2.0, "time": 2.0, "event": 1.0}}
    assert withheld(ask(make_patients(4000), tmp_path / "a", **asked)) == []
