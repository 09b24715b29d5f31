import hashlib
import multiprocessing
import os
import re
import sqlite3
import stat
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statistics_rows import ask, group, make_patients, where, withheld
from tiny import says

from fedmed_flower import InputError
from fedmed_flower.errors import DeclinedError
from fedmed_flower.statistics import local
from fedmed_flower.statistics.request import Request
from fedmed_flower.statistics.withheld import FEW, MISSING

MINIMUM = 10


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hospital.answers"


@pytest.fixture
def rows():
    """100 patients: ages 0 to 99, of whom 40 smoke; a value of which sums can be told apart."""
    return [
        {
            "patient": f"p{number}",
            "age": number,
            "smoker": "yes" if number % 5 < 2 else "no",
            "ward": "a" if number < 97 else "b",
            "value": float(2**number),
            "other": float(number % 7),
        }
        for number in range(100)
    ]


def told_of(told, name, kind="numeric", of=""):
    found = group(told, of)
    return None if found is None else found[kind].get(name)


class TestDifferences:
    """Two or more answers whose difference would be a sum over fewer than ten patients."""

    def test_nested_conditions(self, rows, path):
        assert (
            told_of(ask(rows, path, columns=("value",), **where("age >= 50")), "value")["n"] == 50
        )
        second = ask(rows, path, columns=("value",), **where("age >= 51"))
        assert second == {"groups": [], "withheld": [["", "patients", FEW]]}
        # Ten patients less may be told.
        third = ask(rows, path, columns=("value",), **where("age >= 60"))
        assert told_of(third, "value")["n"] == 40

    def test_nested_conditions_asked_about_different_variables(self, rows, path):
        assert group(ask(rows, path, columns=("value",), **where("age >= 50")))
        assert not group(ask(rows, path, columns=("other",), **where("age >= 51")))

    def test_nested_conditions_behind_conditions_that_all_meet(self, rows, path):
        assert group(ask(rows, path, columns=("value",), **where("age >= 50", "other >= -1")))
        assert not group(ask(rows, path, columns=("value",), **where("age >= 51", "value > -1")))

    def test_all_minus_a_part(self, rows, path):
        assert group(ask(rows, path, columns=("value",)))
        assert not group(ask(rows, path, columns=("value",), **where("age >= 3")))

    def test_a_part_alone_where_the_rest_is_small(self, rows, path):
        """The number of patients may be known from elsewhere."""
        assert not group(ask(rows, path, columns=("value",), **where("age >= 3")))

    def test_parts_and_their_union(self, rows, path):
        """Under 30, 27 to 60, and under 60 would give the three patients of 27 to 29."""
        assert group(ask(rows, path, columns=("value",), **where("age < 30")))
        assert not group(ask(rows, path, columns=("value",), **where("age >= 27", "age < 60")))
        assert group(ask(rows, path, columns=("value",), **where("age < 60")))

    def test_both_margins_and_a_corner(self, rows, path):
        """Old or smoking, by inclusion and exclusion: the few who are neither."""
        for row in rows:
            row["smoker"] = "yes" if row["age"] > 4 and row["age"] % 2 else "no"
            row["old"] = "yes" if row["age"] > 9 else "no"
        tables = ask(rows, path, columns=("old", "smoker"))
        assert told_of(tables, "old", "categorical")["counts"] == [10, 90]
        assert told_of(tables, "smoker", "categorical")["counts"] == [52, 48]
        corner = ask(rows, path, columns=("value",), **where("old == yes", "smoker == yes"))
        assert not group(corner)

    def test_a_histogram_and_a_condition_on_the_same_variable(self, rows, path):
        kinds = ("histograms",)
        first = ask(rows, path, columns=("age",), kinds=kinds, resolutions={"age": 10})
        edges = told_of(first, "age")["histogram"]["edges"]
        assert edges == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
        assert not group(ask(rows, path, columns=("other",), **where("age < 45")))
        assert group(ask(rows, path, columns=("other",), **where("age < 50")))

    def test_histograms_of_different_resolution(self, rows, path):
        asked = {"columns": ("age",), "kinds": ("histograms",)}
        ask(rows, path, resolutions={"age": 10}, **asked)
        second = ask(rows, path, resolutions={"age": 13}, **asked)
        # Edges that would cut a tenth are not told: 13, 26, ... but for 130, beside 0.
        assert withheld(second) == ["histogram of age"] or set(
            told_of(second, "age")["histogram"]["edges"]
        ) <= {0.0, 130.0}

    def test_a_table_by_and_a_margin(self, rows, path):
        """One variable by groups, then among those of a single value only."""
        by = ask(rows, path, columns=("value",), by="smoker")
        assert [told["name"] for told in by["groups"]] == ["no", "yes"]
        assert not group(ask(rows, path, columns=("value",), **where("ward == a")))
        again = ask(rows, path, columns=("ward",), by="smoker")
        # Three patients of ward b, none of whom smokes: no cell of them.
        assert [told["categorical"] for told in again["groups"]] == [
            {"ward": {"n": 60, "missing": 0, "names": [], "counts": [], "few": 60}},
            {"ward": {"n": 40, "missing": 0, "names": ["a"], "counts": [40], "few": 0}},
        ]

    def test_two_way_tables_and_their_margins(self, rows, path):
        """Rows without a value on the one side are missing in the table but not in the margin."""
        for row in rows[:3]:
            row["smoker"] = None
        for row in rows:
            row["sex"] = "f" if row["age"] % 2 else "m"
        margins = ask(rows, path, columns=("sex", "smoker"))
        assert told_of(margins, "sex", "categorical")["counts"] == [50, 50]
        table = ask(rows, path, columns=("sex",), pairs=(("sex", "smoker"),))
        assert withheld(table) == ["sex by smoker"]
        complete = [row | {"smoker": row["smoker"] or "no"} for row in rows]
        fresh = ask(complete, path.with_name("fresh"), pairs=(("sex", "smoker"),))
        assert group(fresh)["pairs"][0]["counts"] == [[31, 19], [31, 19]]

    def test_a_two_way_table_with_a_small_cell_is_withheld_whole(self, rows, path):
        for row in rows:
            row["sex"] = "f" if row["age"] % 2 else "m"
        told = ask(rows, path, columns=("sex",), pairs=(("sex", "ward"), ("sex", "smoker")))
        assert withheld(told) == ["sex by ward"]
        assert len(group(told)["pairs"]) == 1

    def test_correlations_of_rows_that_few_lack(self, rows, path):
        """The sums of the one variable over complete rows, less those over all of its rows."""
        for row in rows[:3]:
            row["other"] = None
        told = ask(rows, path, columns=("age", "other", "value"), kinds=("moments", "correlations"))
        assert withheld(told) == ["correlation of age and other", "correlation of other and value"]
        assert [entry["columns"] for entry in group(told)["correlations"]] == [["age", "value"]]

    def test_a_variable_and_its_bands(self, rows, path):
        """Under 50 by its band, and by a histogram that would cut at 48."""
        for row in rows:
            row["age-band"] = "<50" if row["age"] < 50 else ">=50"
        schema = type("Schema", (), {"bands": {"age": (50,)}})
        assert group(ask(rows, path, schema=schema, columns=("age-band",)))
        asked = {"columns": ("age",), "kinds": ("histograms",), "resolutions": {"age": 12.0}}
        told = told_of(ask(rows, path, schema=schema, **asked), "age")
        assert told["histogram"]["edges"] == [0, 12, 24, 36, 60, 72, 84]
        assert not group(ask(rows, path, schema=schema, **where("age < 45")))

    def test_kinds_of_one_variable_share_a_partition(self, rows, path):
        """First as categories of ten years, then as numbers from 25 on."""
        coded = [row | {"age": row["age"] // 10} for row in rows]
        ask(coded, path, columns=("age",), categorical=("age",))
        assert not group(ask(coded, path, columns=("other",), **where("ward == b")))
        assert group(ask(coded, path, columns=("other",), **where("age >= 5")))
        assert not told_of(ask(coded, path, columns=("age",), **where("smoker == yes")), "age")

    def test_a_curve_then_its_times(self, rows, path):
        for row in rows:
            row["event"] = row["age"] % 2
        curve = ask(rows, path, columns=("other",), survival=("age", "event", 100.0, 20.0))
        assert group(curve)["survival"]["times"] == [20, 40, 60, 120]
        assert not group(ask(rows, path, columns=("other",), **where("age <= 55")))
        assert group(ask(rows, path, columns=("other",), **where("age <= 60")))


class TestChanges:
    """The same question after the patients have changed, in a new run: the file is what lasts."""

    asked: ClassVar = {"columns": ("value", "smoker")}

    def test_the_same_patients_get_the_same_answer(self, rows, path):
        first = ask(rows, path, **self.asked)
        assert ask(list(reversed(rows)), path, **self.asked) == first
        assert withheld(first) == []

    def test_a_patient_has_come(self, rows, path):
        first = ask(rows, path, **self.asked)
        assert ask([*rows, rows[0] | {"patient": "new"}], path, **self.asked) == first

    def test_enough_patients_have_come(self, rows, path):
        ask(rows, path, **self.asked)
        more = [*rows, *(row | {"patient": f"new {row['age']}"} for row in rows[:20])]
        second = ask(more, path, **self.asked)
        assert told_of(second, "value")["n"] == 120
        # 8 of the 20 smoke, which is too few to be told: the table waits for more.
        assert told_of(second, "smoker", "categorical") == {
            **{"n": 100, "missing": 20, "names": ["no", "yes"], "counts": [60, 40], "few": 0}
        }

    def test_a_patient_has_gone(self, rows, path):
        ask(rows, path, **self.asked)
        assert ask(rows[1:], path, **self.asked)["groups"] == []
        assert told_of(ask(rows[10:], path, **self.asked), "value")["n"] == 90

    def test_a_value_has_changed(self, rows, path):
        ask(rows, path, **self.asked)
        rows[0]["value"] += 1
        second = ask(rows, path, **self.asked)
        assert withheld(second) == ["value"]
        assert told_of(second, "smoker", "categorical")["n"] == 100

    def test_a_value_has_been_added(self, rows, path):
        rows[0]["value"] = None
        first = told_of(ask(rows, path, **self.asked), "value")
        rows[0]["value"] = 1.0
        assert told_of(ask(rows, path, **self.asked), "value") == first
        assert first["n"] == 99

    def test_a_second_row_of_a_patient(self, rows, path):
        first = ask(rows, path, **self.asked)
        assert ask([*rows, rows[0] | {"value": 3.0}], path, **self.asked) == first

    def test_a_new_variable_where_patients_wait(self, rows, path):
        ask(rows, path, columns=("value",))
        more = [*rows, rows[0] | {"patient": "new"}]
        assert told_of(ask(more, path, columns=("other",)), "other")["n"] == 100

    def test_a_condition_that_is_new_where_patients_wait(self, rows, path):
        """The condition is remembered though the answer goes on without the new patient."""
        ask(rows, path, columns=("value",))
        more = [*rows, rows[0] | {"patient": "new"}]
        assert group(ask(more, path, columns=("value",), **where("age >= 50")))
        kinds = {"columns": ("age",), "kinds": ("histograms",), "resolutions": {"age": 15}}
        edges = told_of(ask(more, path, **kinds), "age")["histogram"]["edges"]
        assert 45 not in edges or 60 not in edges

    def test_a_new_process(self, rows, path):
        context = multiprocessing.get_context("fork")
        process = context.Process(target=ask, args=(rows, path), kwargs=self.asked)
        process.start()
        process.join()
        assert process.exitcode == 0
        assert ask(rows[1:], path, **self.asked)["groups"] == []


class TestRandomQuestions:
    """Whatever is asked in whatever order: what was told never tells few patients apart."""

    @pytest.mark.parametrize("seed", range(12))
    def test_cells_that_were_told(self, path, seed):
        rng = np.random.default_rng(seed)
        rows = make_patients(150, seed)
        told = defaultdict(list)
        answered = 0
        for _ in range(8):
            conditions = {}
            if rng.random() < 0.7:
                bound = int(rng.integers(20, 90))
                conditions = where(f"age {rng.choice(['<', '>=', '!='])} {bound}")
            if rng.random() < 0.3:
                extra = where(f"sex == {rng.choice(['f', 'm'])}")["where"]
                conditions = {"where": conditions.get("where", ()) + extra}
            request = {
                "by": str(rng.choice(["", "", "sex", "centre"])),
                "kinds": ("tables", "moments", *(["histograms"] if rng.random() < 0.4 else [])),
                "resolutions": {"age": float(rng.choice([1, 4, 10])), "lab": 1.0},
                "columns": ("age", "lab", "sex", "centre"),
                **conditions,
            }
            if rng.random() < 0.2:
                rows = rows[int(rng.integers(0, 4)) :] + make_patients(2, seed, f"n{len(told)}-")
            answer = ask(rows, path, **request)
            for found in answer["groups"]:
                answered += 1
                self.note(told, rows, Request(**request), found)
        assert answered
        for name, cells in told.items():
            assert smallest_atom(cells) >= MINIMUM, name

    def note(self, told, rows, request, found):
        """Add the sets of patients that this answer has counted, where they are known for certain.

        That is where the counts are those of all rows in the cell: nobody waits.
        """
        inside = [row for row in rows if meets(row, request)]
        if request.by:
            inside = [row for row in inside if row[request.by] == found["name"]]
        if len(inside) != found["rows"]:
            return
        told["cohort"].append(patients(inside))
        for name, part in found["numeric"].items():
            present = [row for row in inside if row[name] is not None]
            if len(present) != part["n"]:
                continue
            told[name].append(patients(present))
            edges = part.get("histogram", {}).get("edges", [])
            for low, high in zip([-np.inf, *edges], [*edges, np.inf], strict=True):
                told[name].append(patients(r for r in present if low <= r[name] < high))
        for name, part in found["categorical"].items():
            if len(inside) == part["n"]:
                told[name].append(patients(inside))
                for value in part["names"]:
                    told[name].append(patients(row for row in inside if row[name] == value))


def patients(rows):
    return {row["patient"] for row in rows}


def meets(row, request):
    compare = {"<": float.__lt__, ">=": float.__ge__, "!=": float.__ne__, "==": None}
    for column, operation, value in request.where:
        if operation == "==":
            if row[column] != value:
                return False
        elif not compare[operation](float(row[column]), float(value)):
            return False
    return True


def smallest_atom(cells):
    """Return the size of the smallest set of patients that no cell tells apart, but some count."""
    where_in = defaultdict(set)
    for number, cell in enumerate(cells):
        for patient in cell:
            where_in[patient].add(number)
    sizes = defaultdict(int)
    for numbers in where_in.values():
        sizes[frozenset(numbers)] += 1
    return min(sizes.values(), default=MINIMUM)


class TestMissing:
    def test_how_many_lack_a_value_is_told(self, rows, path):
        for row in rows[:3]:
            row["other"] = None
        assert told_of(ask(rows, path, columns=("other",)), "other")["missing"] == 3

    def test_unless_the_hospital_hides_it(self, rows, path):
        for row in rows[:3]:
            row["other"] = None
        assert withheld(ask(rows, path, hide=True, columns=("other",))) == ["other"]
        for row in rows[:12]:
            row["other"] = None
        told = ask(rows, path.with_name("second"), hide=True, columns=("other",))
        assert told_of(told, "other")["missing"] == 12


class TestFile:
    def test_it_holds_no_patient_and_no_value(self, rows, path):
        named = [row | {"patient": f"Anna Example {row['age']}"} for row in rows]
        ask(named, path, columns=("smoker",), **where("age >= 50"))
        assert b"Anna" not in path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_one_that_cannot_be_written(self, rows, path):
        path.parent.joinpath("folder").write_text("a file", encoding="utf-8")
        with pytest.raises(InputError, match=r"cannot be used .*: repair its folder, or restore"):
            ask(rows, path.parent / "folder" / "x.answers")

    @pytest.mark.parametrize("content", [b"", b"no database"])
    def test_one_that_is_damaged(self, rows, path, content):
        path.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(f"the record of answers {path} cannot")):
            ask(rows, path)

    @pytest.mark.parametrize(
        "change",
        [
            "UPDATE about SET value = 7 WHERE key = 'version'",
            # What a later format may hold as well is not looked at.
            "PRAGMA user_version = 7; CREATE TABLE news (x)",
        ],
    )
    def test_one_of_a_later_version(self, change, rows, path):
        ask(rows, path, columns=("smoker",))
        with sqlite3.connect(path) as connection:
            connection.executescript(change)
        text = (
            f"{path} was written by a later fedmed-flower (format 7, this one reads up to 2): "
            "update fedmed-flower"
        )
        with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
            ask(rows, path)

    def test_one_of_an_earlier_version(self, rows, path):
        ask(rows, path, columns=("smoker",))
        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE about SET value = 1 WHERE key = 'version'")
        with pytest.raises(InputError, match=r"version \(1,\) instead of 2"):
            ask(rows, path)

    def test_one_that_names_its_version_in_its_table_alone_is_read(self, rows, path):
        first = ask(rows, path, columns=("smoker",))
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 0")
        assert ask(rows, path, columns=("smoker",)) == first

    def test_nothing_is_told_where_the_disk_is_full(self, rows, path, monkeypatch):
        ask(rows, path, columns=("smoker",))
        before = path.read_bytes()

        def full(self):
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr("fedmed_flower.statistics.guard.Guard.save", full)
        with pytest.raises(InputError, match="disk is full"):
            ask(rows, path, columns=("value",))
        assert path.read_bytes() == before

    def test_it_is_synced_before_the_answer_leaves(self, rows, path):
        """A process that is killed at once has told what is in the file."""
        pid = os.fork()
        if not pid:
            ask(rows, path, columns=("value",))
            os.kill(os.getpid(), 9)
        os.waitpid(pid, 0)
        assert ask(rows[1:], path, columns=("value",))["groups"] == []


def noted(path):
    """Return the values that the file of answers holds, by column."""
    with sqlite3.connect(path) as connection:
        found = defaultdict(list)
        for column, value in connection.execute("SELECT * FROM compared ORDER BY 1, 2"):
            found[column].append(value)
    return dict(found)


# Each fails, or is declined, whatever the rows are; at ages from 95 on no group may be told of.
UNFIT = [
    ({"survival": ("no", "nothing", 9.0, 1.0)}, "there is no column 'no' of single values: "),
    ({"survival": ("smoker", "ward", 9.0, 1.0)}, "smoker holds no numbers, which a survival "),
    ({"by": "nowhere"}, "there is no column 'nowhere' of single values: "),
    ({"weekly": "nowhere"}, "there is no column 'nowhere' of single values: "),
]


class TestErrors:
    """Whether a group could be told of shows in no error, and no error takes back what is noted."""

    @pytest.mark.parametrize(("asked", "said"), UNFIT)
    def test_the_same_error_is_raised_whether_or_not_anybody_meets_the_condition(
        self, rows, path, asked, said
    ):
        texts = set()
        for bound in (50, 95, 200):
            with pytest.raises(InputError, match=f"^{re.escape(said)}") as caught:
                ask(rows, path, **asked, **where(f"age >= {bound}"))
            texts.add(str(caught.value))
        assert len(texts) == 1
        assert noted(path)["age"] == ["200.0", "50.0", "95.0"]

    @pytest.mark.parametrize(
        ("conditions", "said"),
        [
            (["age >= 95", "smoker > 3"], "smoker holds categories: compare it by == or !=, not >"),
            (["age >= 5", "other == x"], "other holds numbers and cannot be compared with 'x'"),
        ],
    )
    def test_a_comparison_that_does_not_fit_is_refused_before_rows_are_chosen(
        self, rows, path, conditions, said
    ):
        with pytest.raises(InputError, match=says(said)):
            ask(rows, path, **where(*conditions))
        assert "age" in noted(path)

    def test_values_of_requests_that_fail_are_used_up_as_others_are(self, rows, path):
        """Once 237 values were told, where 20 may be."""
        asked = {"survival": ("no", "nothing", 9.0, 1.0)}
        for bound in range(20):
            with pytest.raises(InputError):
                ask(rows, path, **asked, **where(f"age >= {bound}"))
        said = (
            "all requests together may compare age with at most 20 values (conditions and cell "
            "widths), and these are used up: use values of earlier requests"
        )
        for more in ({}, asked):
            with pytest.raises(DeclinedError, match=says(said)):
                ask(rows, path, **more, **where("age >= 20.5"))
        assert len(noted(path)["age"]) == 20
        assert group(ask(rows, path, columns=("value",), **where("age >= 10")))

    def test_what_a_declined_request_compared_with_before_is_noted(self, rows, path):
        with pytest.raises(DeclinedError, match="may compare age with"):
            ask(rows, path, most_compared=2, **where("age > 1", "age > 2", "age > 3", "other > 1"))
        assert noted(path) == {"age": ["1.0", "2.0"], "other": ["1.0"]}

    def test_nothing_is_noted_of_columns_that_are_not_there(self, rows, path):
        """Else a server could fill a hospital's disk with names."""
        with pytest.raises(InputError):
            ask(rows, path, **where("nowhere == 1", "age > 1"))
        assert noted(path) == {"age": ["1.0"]}

    @pytest.mark.parametrize("bound", [5, 95])
    def test_a_resolution_too_many_is_declined_whether_or_not_a_group_is_told(
        self, rows, path, bound
    ):
        asked = {"columns": ("other",), "kinds": ("histograms",), **where(f"age >= {bound}")}
        ask(rows, path, most_compared=1, resolutions={"other": 2.0}, **asked)
        assert noted(path)["other"] == ["2.0"]
        with pytest.raises(DeclinedError, match="may compare other with"):
            ask(rows, path, most_compared=1, resolutions={"other": 3.0}, **asked)

    def test_a_lower_limit_holds_for_what_was_noted_before(self, rows, path):
        for bound in (10, 20, 30):
            ask(rows, path, columns=("value",), **where(f"age >= {bound}"))
        with pytest.raises(DeclinedError, match="may compare age with"):
            ask(rows, path, most_compared=2, columns=("value",), **where("age >= 10"))

    def test_what_fails_in_the_middle_is_withheld_and_stays_written_down(
        self, rows, path, monkeypatch
    ):
        def fails(values):
            raise MemoryError(f"{len(values)} values")

        with monkeypatch.context() as patch:
            patch.setattr(local, "moments", fails)
            told = ask(rows, path, columns=("value", "ward"), **where("age >= 50"))
        assert told["withheld"] == [["", "value", FEW]]
        assert told_of(told, "ward", "categorical")["n"] == 50
        assert not group(ask(rows, path, columns=("other",), **where("age >= 51")))

    def test_groups_that_fail_are_withheld_as_if_there_were_none(self, rows, path, monkeypatch):
        monkeypatch.setattr(local, "pool_small", lambda *_: 1 / 0)
        told = ask(rows, path, columns=("value",), **where("age >= 50"))
        assert told == {"groups": [], "withheld": [["", "patients", FEW]]}

    def test_an_interrupt_leaves_what_was_admitted(self, rows, path, monkeypatch):
        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(local, "moments", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ask(rows, path, columns=("value",), **where("age >= 50"))
        assert not group(ask(rows, path, columns=("other",), **where("age >= 51")))

    def test_a_process_that_is_killed_while_it_answers_has_noted_the_values(self, rows, path):
        pid = os.fork()
        if not pid:
            local.Local.answer = lambda self: os.kill(os.getpid(), 9)
            ask(rows, path, columns=("value",), **where("age >= 50"))
        os.waitpid(pid, 0)
        assert noted(path) == {"age": ["50.0"]}

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(0, 120),
        st.fixed_dictionaries(
            {},
            optional={
                "by": st.sampled_from(["ward", "nowhere", "other"]),
                "weekly": st.sampled_from(["other", "nowhere", "smoker"]),
                "survival": st.sampled_from(
                    [("value", "other", 1e100, 1e99), ("smoker", "ward", 9.0, 1.0)]
                ),
                "columns": st.sampled_from([("nowhere",), ("value",)]),
                "pairs": st.sampled_from([(("ward", "nowhere"),), (("ward", "smoker"),)]),
                "resolutions": st.sampled_from([{"value": 1e-300}, {"smoker": 1.0}]),
                "ranges": st.sampled_from([{"value": (0.0, 1e-14)}, {"ward": (0.0, 1.0)}]),
                "kinds": st.sampled_from([(), ("histograms", "moments", "correlations")]),
            },
        ),
        st.sampled_from([10, 10**30]),
    )
    def test_no_condition_decides_whether_there_is_an_error(self, bound, asked, minimum):
        """A request that fails for one bound fails for each with the same words."""
        rows = [
            {"patient": n, "age": n, "smoker": "yes" if n % 5 < 2 else "no", "value": n * 1e98}
            | {"ward": "a" if n < 97 else "b", "other": float(n % 7), "odd": 10**5000}
            for n in range(100)
        ]

        def fails(*_):
            raise AssertionError("something was withheld because it failed")

        outcomes = set()
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            patch.setattr(local.log, "exception", fails)
            for conditions in (where("age >= 0"), where(f"age >= {bound}"), where("age >= 99")):
                try:
                    ask(rows, Path(folder) / "a", minimum, **asked, **conditions)
                except InputError as error:
                    outcomes.add(str(error))
                else:
                    outcomes.add("answered")
        assert len(outcomes) == 1


class TestOddValues:
    """Values that no float, or no table, holds: an answer, and no error of Python's."""

    def test_a_number_of_thousands_of_digits(self, path):
        rows = [{"patient": n, "x": 10**5000 if n == 3 else n % 2} for n in range(40)]
        told = ask(rows, path, columns=("x",), categorical=("x",))
        assert told_of(told, "x", "categorical") == {
            **{"n": 39, "missing": 1, "names": ["0", "1"], "counts": [20, 19], "few": 0}
        }

    def test_a_row_whose_keys_are_no_texts(self, path):
        rows = [{"patient": n, "x": n % 2, 7: 1, ("a",): 2, "y" * 201: 3} for n in range(40)]
        told = ask(rows, path)
        assert withheld(told) == []
        assert list(group(told)["numeric"]) == ["x"]

    def test_a_two_way_table_of_a_million_cells(self, path, monkeypatch):
        rows = [{"patient": n, "a": f"a{n % 3}", "b": f"b{n % 2}"} for n in range(120)]
        monkeypatch.setattr(local, "_MOST_CELLS", 5)
        told = ask(rows, path, columns=("a",), pairs=(("a", "b"),))
        assert told["withheld"] == [["", "a by b", "it has more than 5 cells"]]
        monkeypatch.setattr(local, "_MOST_CELLS", 6)
        assert group(ask(rows, path, pairs=(("a", "b"),)))["pairs"][0]["counts"] == [[20, 20]] * 3

    def test_names_of_other_groups_make_no_table_larger(self, path):
        """Two columns of 2,000 names each: the table is of those that the answer tells of."""
        rows = [{"patient": n, "a": f"{n}", "b": f"{n}", "x": 0} for n in range(2000)]
        rows += [{"patient": -1 - n, "a": "a", "b": "b", "x": 1} for n in range(40)]
        told = ask(rows, path, columns=("x",), pairs=(("a", "b"),), **where("x == 1"))
        assert group(told)["pairs"] == [
            {"columns": ["a", "b"], "rows": ["a"], "across": ["b"], "counts": [[40]]}
        ]

    def test_weeks_that_lie_too_far_apart_are_withheld(self, path):
        rows = [{"patient": n, "day": 1e99 if n % 2 else 0} for n in range(40)]
        told = ask(rows, path, columns=("day",), kinds=(), weekly="day")
        reason = "it spans more than 10,000 weeks"
        assert told["withheld"] == [["", "weeks by day", reason]]
        # What that tells of the two weeks is written down.
        with sqlite3.connect(path) as connection:
            query = "SELECT labels FROM partitions WHERE key = '[[\"day\"]]'"
            (labels,) = connection.execute(query).fetchone()
        assert len(set(np.frombuffer(labels, np.int64))) == 2

    def test_what_is_not_there_is_said_of_each_column(self, rows, path):
        told = ask(rows, path, columns=("nowhere", "value", "neither"))
        assert told["withheld"] == [["", "nowhere", MISSING], ["", "neither", MISSING]]


class TestProbing:
    def test_only_so_many_values_can_be_compared_with(self, rows, path):
        """With more of them a single patient's value could be found by what is refused."""
        for bound in (50.0, 50.5, 50.25):
            ask(rows, path, most_compared=3, **where(f"age >= {bound}"))
        text = (
            "all requests together may compare age with at most 3 values (conditions and cell "
            "widths), and these are used up: use values of earlier requests"
        )
        with pytest.raises(DeclinedError, match=says(text)):
            ask(rows, path, most_compared=3, **where("age >= 50.125"))
        # The ones before may be used again, and other columns.
        assert group(ask(rows, path, most_compared=3, **where("age >= 50")))
        assert not group(ask(rows, path, most_compared=3, **where("other >= 3", "ward == b")))

    def test_edges_are_no_values_of_single_patients(self, path):
        """A grid so fine that each patient has a cell is made coarser until cells fill up."""
        values = np.random.default_rng(0).normal(100, 15, 400)
        rows = [{"patient": str(n), "x": float(value)} for n, value in enumerate(values)]
        told = ask(rows, path, columns=("x",), kinds=("histograms",), resolutions={"x": 1e-9})
        edges = np.array(told_of(told, "x")["histogram"]["edges"])
        # 1e-9 times the power of 2 that leaves half of them, beside the fullest cell, in cells of
        # ten.
        assert np.diff(edges).min() == pytest.approx(2**31 * 1e-9)
        assert min(abs(edge - values).min() for edge in edges) > 1e-6

    def test_edges_beside_a_value_that_most_have_are_none_of_single_patients(self, path):
        values = np.random.default_rng(0).lognormal(1, 0.6, 400)
        values[:240] = 0
        rows = [{"patient": str(n), "x": float(value)} for n, value in enumerate(values)]
        told = ask(rows, path, columns=("x",), kinds=("histograms",), resolutions={"x": 1e-3})
        edges = [edge for edge in told_of(told, "x")["histogram"]["edges"] if edge > 0.01]
        assert len(edges) > 2
        # Of cells of a thousandth, an edge would be the value of the patient next to it.
        assert max(abs(edge - values).min() for edge in edges) > 0.005
        assert np.diff(edges).min() > 0.2

    def test_ends_are_no_values_of_single_patients(self, path):
        rows = [{"patient": str(n), "x": float(n)} for n in [*range(100), 100_000]]
        told = ask(rows, path, columns=("x",), kinds=("histograms",), resolutions={"x": 10.0})
        assert max(told_of(told, "x")["histogram"]["edges"]) == 90

    def test_times_of_a_curve_are_none_of_single_patients(self, path):
        """Those beyond the horizon share one cell, and do not make the others coarse."""
        days = [*range(1, 3281, 41), *range(4000, 4200)]
        rows = [{"patient": str(day), "day": day, "event": int(day < 4000)} for day in days]
        asked = {"columns": ("other",), "survival": ("day", "event", 3650.0, 1.0)}
        curve = group(ask(rows, path, **asked))["survival"]
        assert [time % 512 for time in curve["times"]] == [*[0] * 6, 3650 % 512, 0]
        assert curve["censored"][-1] == 200

    def test_rare_categories_are_not_named(self, rows, path):
        text = str(ask(rows, path, columns=("ward", "smoker")))
        assert "'b'" not in text
        assert "'yes'" in text

    def test_a_column_of_names_tells_none(self, rows, path):
        named = [row | {"name": f"Anna {row['age']}"} for row in rows]
        told = ask(named, path, columns=("name",))
        assert told_of(told, "name", "categorical") == {
            **{"n": 100, "missing": 0, "names": [], "counts": [], "few": 100}
        }
        assert (
            ask(named, path.with_name("by"), columns=("other",), by="name")["groups"][0]["name"]
            == "all others"
        )

    def test_the_minimum_counts_patients(self, path):
        """Thirty rows of six patients are too few."""
        rows = [{"patient": n % 6, "x": float(n)} for n in range(30)]
        assert ask(rows, path, columns=("x",))["groups"] == []
        more = [{"patient": n % 10, "x": float(n)} for n in range(30)]
        assert group(ask(more, path.with_name("more"), columns=("x",)))["rows"] == 30

    @pytest.mark.parametrize("count", [0, 3, 9])
    def test_a_small_hospital(self, path, count):
        told = ask(make_patients(count), path)
        assert [found["rows"] for found in told["groups"]] == ([] if count else [0])


@pytest.mark.parametrize("part", ["elements", "patients", "labels"])
def test_a_partition_that_lacks_a_part_is_an_error(rows, path, part):
    ask(rows, path, columns=("age",))
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(f"UPDATE partitions SET {part} = substr({part}, 9)")
    connection.close()
    with pytest.raises(InputError, match=r"the partition of .* is damaged"):
        ask(rows, path, columns=("age",))


class TestDigests:
    """A file that an earlier version has written must be understood: its digests stay the same."""

    def test_classes_are_written_in_64_bits(self, path):
        rows = [{"patient": str(n), "x": float(n // 20)} for n in range(60)]
        ask(rows, path, columns=("x",), kinds=("histograms",), resolutions={"x": 1.0})
        with sqlite3.connect(path) as connection:
            query = """SELECT elements, labels FROM partitions WHERE key = '[["x"]]'"""
            ((elements, labels),) = connection.execute(query).fetchall()
        assert len(labels) == len(elements) == 8 * 60
        classes = np.frombuffer(labels, np.int64)
        assert sorted(np.unique(classes, return_counts=True)[1].tolist()) == [20, 20, 20]

    @pytest.mark.parametrize("visits", [1, 2])
    def test_digests_are_those_of_patient_text_and_number(self, path, visits):
        rows = [
            {"patient": f"p\u00e9{n // visits}", "x": [0.5, 2.0, "a"][n % 3], "c": "it's"[n % 4 :]}
            for n in range(60)
        ]
        ask(rows, path, columns=("x", "c"), categorical=("c",))
        with sqlite3.connect(path) as connection:
            (key,) = connection.execute("SELECT value FROM about WHERE key = 'key'").fetchone()
            query = "SELECT key, elements, patients FROM partitions"
            found = {k: (e, p) for k, e, p in connection.execute(query)}

        def digest(text):
            letters = text.encode(errors="backslashreplace")
            return int.from_bytes(hashlib.blake2b(letters, key=key).digest()[:8])

        def partition(texts):
            """Digest and patient of each row with a text, by the digest."""
            seen = Counter()
            digests = []
            for row, text in zip(rows, texts, strict=True):
                if text is not None:
                    patient = ascii(row["patient"])
                    number = seen[patient, text]
                    seen[patient, text] += 1
                    digests.append((digest(f"{patient}\n{text}\n{number}"), digest(patient)))
            return tuple(
                np.array(one, np.uint64).tobytes() for one in zip(*sorted(digests), strict=True)
            )

        # Of a column of numbers a text is missing.
        numbers = [{0.5: "0.5", 2.0: "2"}.get(row["x"]) for row in rows]
        written = [number and ascii((ascii((number,)),)) for number in numbers]
        assert found['[["x"]]'] == partition(written)
        assert found['[["c"]]'] == partition([ascii((ascii((row["c"],)),)) for row in rows])
        assert found["[]"] == partition([""] * len(rows))
