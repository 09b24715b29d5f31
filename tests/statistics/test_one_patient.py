"""With noise: whatever one patient's rows are like, the vector moves by no more than its bound."""

from datetime import date, datetime
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from statistics_rows import where
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.statistics import noised
from fedmed_flower.statistics.declared import Declared
from fedmed_flower.statistics.noised import Cells, Plan, plan
from fedmed_flower.statistics.request import KINDS, Filter, Request, Survival
from fedmed_flower.statistics.values import cells_of, number_of, text_of

EXACTLY = 1 + 1e-9


def vector(rows, request, schema=None):
    """Return the plan, and the sums without noise: one row for each group."""
    declared = Declared(request, schema)
    planned = plan(request, declared)
    return planned, planned.sums(Cells(rows, declared))


def moved(rows, others, request, schema=None):
    """Return how far two data sets lie apart, in bounds."""
    planned, one = vector(rows, request, schema)
    _, other = vector(others, request, schema)
    return np.linalg.norm(one - other) / planned.bound


class TestThreeFaults:
    """Each of them was decided by all patients' rows, and moved by one of them."""

    def test_what_a_column_mostly_holds_decides_nothing(self):
        """Codes and numbers, half each: one more patient made texts of the numbers too."""
        rows = [{"patient": n, "code": "J10" if n % 2 else 250} for n in range(100)]
        request = Request(categories={"code": ("J10", "250")}, epsilon=1.0)
        more = [*rows, {"patient": "one", "code": "J10"}]
        assert moved(rows, more, request) == pytest.approx(1)
        # All, those with J10, those with 250, those with another code, those without.
        assert vector(more, request)[1].tolist() == [[101, 51, 50, 0, 0]]

    def test_a_list_in_one_cell_is_missing_there_alone(self):
        rows = [{"patient": n, "sex": "f"} for n in range(100)]
        asked = {"columns": ("sex",), "categories": {"sex": ("f", "m")}, "epsilon": 1.0}
        request = Request(**asked, **where("sex == f"))
        more = [*rows, {"patient": "one", "sex": ["f", "m"]}]
        assert moved(rows, more, request) == 0
        assert vector(more, request)[1].tolist() == [[100, 100, 0, 0, 0]]
        _, sums = vector(more, Request(**asked))
        assert sums.tolist() == [[101, 100, 0, 0, 1]]

    def test_a_column_of_one_patient_is_missing_for_all_others(self):
        rows = [{"patient": n, "t": 1} for n in range(100)]
        request = Request(
            categories={"e": ("1",)}, survival=Survival("t", "e", 2.0, 1.0), epsilon=1.0
        )
        more = [*rows, {"patient": "one", "t": 1, "e": 1}]
        # One more patient, one event in the first interval, one "1" in the table.
        assert moved(rows, more, request) == pytest.approx(1)
        _, sums = vector(rows, request)
        assert sums.tolist() == [[100, 0, 0, 100, 0, 0, 0, 0, 100]]


class Unreadable(dict):
    """A row whose cells are read when they are asked for, and cannot be."""

    def get(self, name, default=None):
        raise OSError("the file is gone")


class Odd:
    ndim = 0

    def item(self):
        raise RuntimeError("no number")


SINGLE = ["f", "m", "J10", "250", "1", "1.0", "0", "", "na", " f ", np.str_("f"), True, False]
SINGLE += [0, 1, 1.0, 2, -3, 250, 50.5, 1e99, 1e308, 10**400, 10**5000, float("nan"), float("inf")]
SINGLE += [np.float32(1), np.int64(1), np.bool_(True), np.array(1.0), torch.tensor(1), None]
SINGLE += [np.float64("nan"), np.float64("-inf"), date(2024, 1, 3), datetime(2024, 1, 3), pd.NaT]
OTHER = [[1], ["f", "m"], (1,), {"x": 1}, set(), b"f", Decimal(1), 1j, object(), Odd(), pd.NA]
OTHER += [np.zeros(3), np.array([1.0]), torch.zeros(2), torch.tensor([1]), np.ma.masked]
PATIENTS = [0, 1, "1", 1.0, " 1", True, "p", b"p", (1, "x"), np.int64(7), torch.tensor(8), 2.5]
PATIENTS += [float("nan"), None, [1], {}, Decimal(1), 10**5000, Odd(), np.zeros(2)]
COLUMNS = ("x", "y", "k", "g", "t", "e", "x-band", "image")

CELLS = st.sampled_from([*SINGLE, *SINGLE, *OTHER])
ROWS = st.one_of(
    *[st.dictionaries(st.sampled_from(COLUMNS), CELLS)] * 8,
    st.dictionaries(st.sampled_from([7, ("x",), "x"]), CELLS),
    st.builds(Unreadable, st.dictionaries(st.sampled_from(COLUMNS), CELLS)),
)
OWN_ROWS = st.lists(ROWS.map(lambda row: type(row)(row, patient="one")), max_size=4)
OTHERS = st.lists(
    st.tuples(ROWS, st.sampled_from(PATIENTS)).map(lambda p: type(p[0])(p[0], patient=p[1])),
    max_size=12,
)
CONDITIONS = st.lists(
    st.one_of(
        st.builds(
            Filter,
            st.sampled_from(["x", "y", "nobody"]),
            st.sampled_from(["==", "!=", "<", "<=", ">", ">="]),
            st.sampled_from([0.0, 1, 50.5, 10**30]),
        ),
        st.builds(
            Filter,
            st.sampled_from(["k", "g", "nobodys-kind"]),
            st.sampled_from(["==", "!="]),
            st.sampled_from(["f", "J10", "1.0", "na", 1, 250.0]),
        ),
    ),
    max_size=2,
).map(tuple)
NUMERIC, CODED = ("x", "y", "nobody"), ("k", "g", "nobodys-kind", "x-band")
CATEGORIES = dict.fromkeys(CODED, ("f", "J10", "250", "1"))
LIMITS = st.sampled_from([(0.0, 1.0), (-1e100, 1e100), (1e99, 1.0000000000000002e99), (0, 100)])


@st.composite
def questions(draw):
    """Return a request and a schema: some columns are declared by the one, some by the other."""
    by_schema = draw(st.booleans())
    ranges, categories = {name: draw(LIMITS) for name in NUMERIC}, dict(CATEGORIES)
    schema = None
    if by_schema:
        schema = SimpleNamespace(
            ranges={"x": ranges.pop("x")},
            numeric=("y",),
            categorical=("g",),
            categories={"k": categories.pop("k")},
            bands={"x": (0.5,)},
        )
    pairs = st.tuples(st.sampled_from((*CODED, "undeclared")), st.sampled_from(CODED))
    curve = st.builds(
        Survival,
        st.sampled_from(["t", "x", "nobody", "image"]),
        st.sampled_from(["e", "k", "g", "nobodys-kind", "patient"]),
        st.sampled_from([1.0, 60.0]),
        st.sampled_from([0.5, 1.0]),
    )
    return (
        Request(
            columns=tuple(
                draw(st.lists(st.sampled_from([*NUMERIC, *CODED, "t", "image"]), unique=True))
            ),
            where=draw(CONDITIONS),
            by=draw(st.sampled_from(["", "", *CODED])),
            kinds=tuple(draw(st.lists(st.sampled_from(KINDS), unique=True))),
            resolutions=draw(st.sampled_from([{}, {"x": 0.1, "k": 1.0}, {"x": 1e-320}])),
            ranges=ranges,
            categories=categories,
            pairs=tuple(draw(st.lists(pairs.filter(lambda p: p[0] != p[1]), max_size=2))),
            survival=draw(st.none() | curve),
            epsilon=1.0,
        ),
        schema,
    )


@settings(max_examples=400, deadline=None)
@given(questions(), OTHERS, OWN_ROWS, OWN_ROWS, st.integers(0, 12))
def test_one_patient_moves_the_vector_by_no_more_than_its_bound(question, others, own, new, place):
    """A patient comes, goes, or has other rows; in between others' rows, whose are as they were."""
    request, schema = question
    planned, without = vector(others, request, schema)
    everybody = [[*others[:place], *rows, *others[place:]] for rows in (own, new)]
    one, other = (vector(rows, request, schema)[1] for rows in everybody)
    assert np.isfinite(without).all()
    assert without.shape == one.shape == other.shape
    assert np.linalg.norm(one - without) <= planned.bound * EXACTLY
    assert np.linalg.norm(other - one) <= 2 * planned.bound * EXACTLY


@settings(max_examples=100, deadline=None)
@given(questions(), OTHERS, OWN_ROWS, st.integers(0, 2**32))
def test_all_else_of_an_answer_follows_from_question_and_noised_numbers(
    question, others, own, seed
):
    """With the same noised numbers the answer is the same, whatever the rows are."""
    request, schema = question
    declared = Declared(request, schema)
    planned = plan(request, declared)
    numbers = np.random.default_rng(seed).normal(10, 20, planned.sums(Cells([], declared)).shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "sums", lambda self, cells: numbers.copy())
        patch.setattr(noised, "noised_once", lambda total, std: total)
        first = noised.noised(planned, Cells(others, declared), 1.0, 10)
        assert noised.noised(planned, Cells([*others, *own], declared), 1.0, 10) == first


@pytest.mark.parametrize("other", OTHER, ids=lambda value: type(value).__name__)
def test_what_is_no_single_value_counts_as_missing(other):
    assert cells_of([{"x": other}], "x") == [None]
    assert np.isnan(number_of(None))
    assert text_of(None) is None
    request = Request(ranges={"x": (0.0, 1.0)}, categories={"k": ("f",)}, epsilon=1.0)
    rows = [{"patient": 1, "x": other, "k": other}]
    assert vector(rows, request)[1].tolist() == [[1, 0, 1, 0, 0, 0, 0, 1]]


def test_rows_of_nobody_are_left_out_and_charge_nobody():
    request = Request(categories={"k": ("f",)}, epsilon=1.0)
    named = [{"patient": patient, "k": "f"} for patient in (1, "1.0", "p", (1, "x"))]
    nobody = [{"patient": patient, "k": "f"} for patient in (None, float("nan"), [1], Odd())]
    cells = Cells([*named, *nobody, {"k": "f"}], Declared(request))
    assert len(cells.patients) == 4
    # 1 and "1.0" are one patient, of whom each row counts by half.
    assert vector([*named, *nobody], request)[1].tolist() == [[3, 3, 0, 0]]


class TestDeclarations:
    """What one column is must be one thing, and follows from request and schema alone."""

    SCHEMA = SimpleNamespace(
        task="survival", event="e", categorical=("sex",), numeric=("age",), bands={"age": (50,)}
    )

    def test_a_range_and_categories_of_one_column_are_refused(self):
        text = "age is declared categorical and has a range, as numbers have: leave one of them out"
        for declared in ({"categorical": ("age",)}, {"categories": {"age": ("1",)}}):
            with pytest.raises(InputError, match=says(text)):
                Request(ranges={"age": (0.0, 1.0)}, **declared)

    @pytest.mark.parametrize("name", ["sex", "e", "age-band"])
    def test_a_range_of_what_the_schema_calls_categorical_is_refused(self, name):
        request = Request(ranges={name: (0.0, 1.0)}, epsilon=1.0)
        text = (
            f"the request declares a range of {name}, which holds categories by the hospital's "
            "schema: leave that out, or change the schema"
        )
        with pytest.raises(InputError, match=says(text)):
            plan(request, Declared(request, self.SCHEMA))

    @pytest.mark.parametrize("declared", [{"categorical": ("age",)}, {"categories": {"age": "1"}}])
    def test_categories_of_what_the_schema_calls_numeric_are_refused(self, declared):
        request = Request(**declared, epsilon=1.0)
        text = (
            "the request declares age categorical, which holds numbers by the hospital's schema: "
            "leave that out, or change the schema"
        )
        with pytest.raises(InputError, match=says(text)):
            plan(request, Declared(request, self.SCHEMA))

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            (
                where("x == f"),
                "x holds numbers and cannot be compared with 'f'",
            ),
            (where("k >= 1"), "k holds categories: compare it by == or !=, not >="),
            (
                {"survival": Survival("k", "e", 1.0, 1.0)},
                "k holds no numbers, which a survival curve needs: if its texts are numbers, "
                "declare their range: --range k=0,1",
            ),
            ({"by": "x"}, "with noise the categories of x must be declared"),
        ],
    )
    def test_what_does_not_fit_a_declaration_is_refused(self, asked, said):
        request = Request(ranges={"x": (0.0, 1.0)}, categories={"k": ("1",)}, epsilon=1.0, **asked)
        with pytest.raises(InputError, match=says(said)):
            plan(request, Declared(request))

    def test_numbers_that_answers_cannot_hold_are_refused(self):
        """Else the square of the range would be infinite, and no answer could be written."""
        text = "the range of x must be two numbers from -1e+100 to 1e+100, the lower first, got "
        with pytest.raises(InputError, match=says(f"{text}0.0 and 1e+155")):
            Request(ranges={"x": (0.0, 1e155)})
