"""What a request declares of columns, and by what it chooses rows, opens nothing else."""

from types import SimpleNamespace

import pytest
from statistics_rows import ask, group, where, withheld
from tiny import says

from fedmed_flower import InputError
from fedmed_flower.statistics.columns import Columns
from fedmed_flower.statistics.declared import Declared
from fedmed_flower.statistics.noised import Cells, plan
from fedmed_flower.statistics.request import Request

# All but two of those who were admitted first lie on ward A.
KINDS_OF_PATIENTS = [
    (30, {"admitted": "2024-01-03", "ward": "A", "age": 35, "event": "yes"}),
    (2, {"admitted": "2024-01-03", "ward": "B", "age": 35, "event": "yes"}),
    (40, {"admitted": "2024-01-10", "ward": "A", "age": 55, "event": "no"}),
    (20, {"admitted": "2024-01-10", "ward": "B", "age": 55, "event": "no"}),
]
BANDS = SimpleNamespace(bands={"age": (40,)})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hospital.answers"


def rows(kinds=KINDS_OF_PATIENTS):
    made = []
    for count, values in kinds:
        made += [{"patient": len(made) + n, **values} for n in range(count)]
    return made


def test_texts_of_numbers_are_numbers_in_a_column_that_is_declared_numeric(tmp_path):
    numbers = [3.0, 3.0, 5.0, 8.5] * 15
    asked = {"ranges": {"time": (0.0, 10.0)}, "survival": ("time", "event", 9.0, 3.0)}

    def curve(cells, name):
        made = [{"patient": n, "time": t, "event": n % 2} for n, t in enumerate(cells)]
        return group(ask(made, tmp_path / name, **asked))["survival"]

    found = curve(map(str, numbers), "texts")
    assert sum(found["events"]) == 30
    assert found == curve(numbers, "numbers")
    # Of these none is a number: the column lacks 40 of 100 values.
    odd = ["1_000", "nan", "inf", "1e100"] * 10
    made = [{"patient": n, "x": x} for n, x in enumerate([*map(str, numbers), *odd])]
    told = group(ask(made, tmp_path / "odd", ranges={"x": (0.0, 10.0)}))["numeric"]["x"]
    assert told["n"] == 60
    assert told["mean"] == pytest.approx(4.875)


def test_a_column_of_texts_has_no_curve_until_it_is_declared_numeric(tmp_path):
    made = [{"patient": n, "time": "5", "event": 1} for n in range(30)]
    text = (
        "time holds no numbers, which a survival curve needs: if its texts are numbers, declare "
        "their range: --range time=0,9"
    )
    with pytest.raises(InputError, match=says(text)):
        ask(made, tmp_path / "book", survival=("time", "event", 9.0, 3.0))


class TestOtherDeclarations:
    """Everybody, and then those on ward A under another declaration: two patients less."""

    def test_dates_as_numbers(self, path):
        for declared in ({}, {"ranges": {"admitted": (0.0, 1.0)}}):
            asked = {"columns": ("ward",), "kinds": (), "weekly": "admitted"} | declared
            whole = ask(rows(), path, **asked)
            assert group(whole)["weeks"]["counts"] == [32, 60]
            assert "weeks by admitted" in withheld(ask(rows(), path, **asked, **where("ward == A")))

    @pytest.mark.parametrize("declared", [{}, {"ranges": {"event": (0.0, 1.0)}}])
    def test_events_as_numbers(self, declared, path):
        made = rows(
            [
                (30, {"ward": "A", "t": 2.0, "event": "1"}),
                (2, {"ward": "B", "t": 2.0, "event": "1"}),
                (30, {"ward": "A", "t": 2.0, "event": "0"}),
                (20, {"ward": "B", "t": 2.0, "event": "0"}),
            ]
        )
        asked = {"columns": ("ward",), "kinds": (), "survival": ("t", "event", 4.0, 2.0)} | declared
        assert group(ask(made, path, **asked))["survival"]["events"] == [32]
        assert "survival by t" in withheld(ask(made, path, **asked, **where("ward == A")))

    @pytest.mark.parametrize("declared", [{}, {"ranges": {"age-band": (0.0, 1.0)}}])
    def test_a_band_as_a_number(self, declared, path):
        made = [row | {"age-band": "<40" if row["age"] < 40 else ">=40"} for row in rows()]
        told = ask(made, path, columns=("age-band",), schema=BANDS)
        assert group(told)["categorical"]["age-band"]["counts"] == [32, 60]
        told = ask(made, path, columns=("age",), schema=BANDS, **declared, **where("ward == A"))
        assert withheld(told) == ["age"]

    def test_large_codes_as_numbers(self, path):
        made = [row | {"code": 2**53 + 1 + 10 * (row["event"] == "no")} for row in rows()]
        told = ask(made, path, columns=("code",), categorical=("code",))
        assert group(told)["categorical"]["code"]["counts"] == [32, 60]
        assert withheld(ask(made, path, columns=("code",), **where("ward == A"))) == ["code"]

    def test_text_in_a_column_of_numbers_is_no_value(self, path):
        made = rows([(20, {"x": 1}), (20, {"x": 2}), (3, {"x": "unclear"}), (1, {"x": None})])
        told = group(ask(made, path, columns=("x",)))["numeric"]["x"]
        assert (told["n"], told["missing"]) == (40, 4)
        told = group(ask(made, path, columns=("x",), categorical=("x",)))["categorical"]["x"]
        assert told == {"n": 40, "missing": 4, "names": ["1", "2"], "counts": [20, 20], "few": 0}

    def test_the_hospitals_own_schema_wins(self):
        schema = SimpleNamespace(categorical=("ward",), numeric=("age",))
        request = Request(ranges={"ward": (0.0, 1.0)}, categorical=("age",))
        columns = Columns(rows(), request, schema)
        assert columns.is_categorical("ward")
        # A number may be tabulated as a code.
        assert columns.is_categorical("age")


class TestBesideConditions:
    """Two of the men with the disease lie on ward B: a table of two columns, less one of men."""

    def rows(self):
        counts = [
            ("yes", "m", 30, 2),
            ("no", "m", 40, 18),
            ("yes", "f", 25, 15),
            ("no", "f", 40, 20),
        ]
        kinds = []
        for disease, sex, *wards in counts:
            values = {"disease": disease, "sex": sex, "event": int(disease == "yes")}
            values["time"] = 5.0 if sex == "m" else 1.0
            kinds += [(n, values | {"ward": ward}) for n, ward in zip(wards, "AB", strict=True)]
        return rows(kinds)

    @pytest.mark.parametrize("turned", [False, True])
    def test_a_table_of_two(self, turned, path):
        pair = {"columns": ("sex",), "pairs": (("disease", "sex"),), "kinds": ()}
        part = {"columns": ("disease",), **where("sex == m", "ward == A")}
        both = [ask(self.rows(), path, **one) for one in ((part, pair) if turned else (pair, part))]
        if turned:
            assert group(both[0])["categorical"]["disease"]["counts"] == [40, 30]
            assert withheld(both[1]) == ["disease by sex"]
        else:
            assert group(both[0])["pairs"][0]["counts"] == [[60, 58], [40, 32]]
            assert withheld(both[1]) == ["disease"]

    def test_a_curve(self, path):
        asked = {"columns": ("sex",), "kinds": (), "survival": ("time", "event", 6.0, 2.0)}
        assert group(ask(self.rows(), path, **asked))["survival"]["events"] == [40, 0, 32]
        part = where("time > 2", "ward == A")
        told = ask(self.rows(), path, columns=("event",), categorical=("event",), **part)
        assert withheld(told) == ["event"]

    def test_groups_of_one_column(self, path):
        pair = {"columns": ("sex",), "pairs": (("disease", "sex"),), "kinds": ()}
        assert group(ask(self.rows(), path, **pair))["pairs"]
        part = {"columns": ("disease",), "by": "sex", **where("ward == A")}
        told = ask(self.rows(), path, **part)
        assert [entry[:2] for entry in told["withheld"]] == [["m", "disease"]]
        assert group(told, "f")["categorical"]["disease"]["counts"] == [40, 25]


class TestWholeNumbers:
    """A column that is declared whole: fractions are missing, and not rounded."""

    SCHEMA = SimpleNamespace(numeric=("visits",), whole=("visits",))

    def of(self, *kinds):
        return rows([(count, {"visits": value}) for count, value in kinds])

    def test_a_fraction_is_missing_and_in_the_hospitals_log(self, path, caplog):
        made = self.of((20, 1), (20, 2.0), (12, 2.5), (1, None))
        told = group(ask(made, path, whole=("visits",), kinds=("histograms", "moments")))
        found = told["numeric"]["visits"]
        assert (found["n"], found["missing"], found["mean"]) == (40, 13, 1.5)
        assert found["histogram"] == {
            "edges": [1.0, 2.0, 3.0],
            "counts": [0, 20, 20, 0],
            "whole": True,
        }
        assert (
            caplog.text.count(
                "visits is declared to hold whole numbers: 12 of 52 values, such as 2.5, count as "
                "missing"
            )
            == 1
        )

    def test_fractions_of_few_patients_are_not_singled_out_by_a_request(self, path):
        """All, and then those with whole numbers: the difference would be three patients."""
        made = self.of((20, 1), (20, 2), (3, 2.5))
        assert group(ask(made, path, columns=("visits",)))["numeric"]["visits"]["n"] == 43
        told = ask(made, path, columns=("visits",), whole=("visits",))
        assert withheld(told) == ["visits"]

    def test_fractions_that_the_schema_rules_out_are_no_values(self, path):
        """What no request can change: as a text among numbers, they are nobody's value."""
        made = self.of((20, 1), (20, 2), (3, 2.5))
        told = group(ask(made, path, columns=("visits",), schema=self.SCHEMA))
        assert (told["numeric"]["visits"]["n"], told["numeric"]["visits"]["missing"]) == (40, 3)
        # Declared again by the request, they are the same.
        told = ask(made, path, columns=("visits",), schema=self.SCHEMA, whole=("visits",))
        assert group(told)["numeric"]["visits"]["n"] == 40

    def test_the_target_of_a_count_task_is_whole(self):
        declared = Declared(Request(), SimpleNamespace(task="count", target="visits"))
        assert declared.is_whole("visits")
        assert not declared.is_whole("age")
        # A request cannot make whole numbers of categories.
        schema = SimpleNamespace(categorical=("ward",))
        assert not Declared(Request(whole=("ward",)), schema).is_whole("ward")

    @pytest.mark.parametrize(
        ("request_", "width"),
        [
            ({}, 1.0),
            ({"ranges": {"x": (0.0, 10.0)}}, 1.0),
            ({"ranges": {"x": (0.0, 100.0)}}, 2.0),
            ({"resolutions": {"x": 5.0}, "ranges": {"x": (0.0, 10.0)}}, 5.0),
        ],
    )
    def test_cells_divide_no_whole_number(self, request_, width):
        assert Declared(Request(whole=("x",), **request_)).resolution("x") == width

    def test_with_noise_a_fraction_is_missing_too(self):
        request = Request(
            whole=("x",), ranges={"x": (0.0, 4.0)}, kinds=("histograms",), epsilon=1.0
        )
        declared = Declared(request)
        made = [{"patient": n, "x": value} for n, value in enumerate([0, 1, 1.5, 4])]
        sums = plan(request, declared).sums(Cells(made, declared))
        # Everybody; values of 0, 1, 2 and 3 to 4; missing.
        assert sums.tolist() == [[4, 1, 1, 0, 1, 1]]

    def test_request_and_schema_must_agree_for_noise(self):
        schema = SimpleNamespace(categorical=("ward",))
        text = (
            "the request declares that ward holds whole numbers, which holds categories by the "
            "hospital's schema: leave that out, or change the schema"
        )
        with pytest.raises(InputError, match=says(text)):
            Declared(Request(whole=("ward",)), schema).require_agreement()
