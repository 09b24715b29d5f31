import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed_flower.data.partition import (
    by_column,
    by_quantity,
    counts,
    dirichlet_shares,
    format_counts,
    split_by_shares,
)
from fedmed_flower.errors import InputError

EVEN = [[0.5, 0.5], [0.5, 0.5]]


def as_lists(parts):
    return [rows.tolist() for rows in parts]


@st.composite
def cases(draw):
    """Labels, whose they are, shares, a seed and a minimum that can be met."""
    patient_of_row = draw(st.lists(st.integers(0, 12), min_size=1, max_size=60))
    labels = draw(
        st.lists(st.integers(0, 3), min_size=len(patient_of_row), max_size=len(patient_of_row))
    )
    num_patients = len(set(patient_of_row))
    num_sites = draw(st.integers(1, num_patients))
    alpha = draw(st.sampled_from([1e-9, 0.1, 1.0, 1e9]))
    minimum = draw(st.integers(0, num_patients // num_sites))
    seed = draw(st.integers(0, 2**32))
    return labels, patient_of_row, dirichlet_shares(4, num_sites, alpha, seed), seed, minimum


@settings(max_examples=150, deadline=None)
@given(cases())
def test_each_row_once_whole_patients_minimum_and_seed(case):
    labels, patient_of_row, shares, seed, minimum = case
    parts = split_by_shares(labels, shares, seed, patient_of_row, minimum)
    assert len(parts) == shares.shape[1]
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    patients = [{patient_of_row[row] for row in rows} for rows in parts]
    assert sum(map(len, patients)) == len(set(patient_of_row))
    assert min(map(len, patients)) >= minimum
    assert all(np.all(np.diff(rows) > 0) for rows in parts)
    assert as_lists(parts) == as_lists(
        split_by_shares(labels, shares, seed, patient_of_row, minimum)
    )


@settings(max_examples=100, deadline=None)
@given(cases())
def test_no_class_is_a_patient_away_from_its_share(case):
    labels, _, shares, seed, _ = case
    parts = split_by_shares(labels, shares, seed, min_patients=0)
    got = np.array([np.bincount(np.array(labels)[rows], minlength=4) for rows in parts]).T
    exact = shares * np.bincount(labels, minlength=4)[:, None]
    assert np.all(np.abs(got - exact) < 1 + 1e-6)


def test_largest_remainders_worked_by_hand():
    shares = [[0.5, 0.3, 0.2], [0.0, 0.0, 1.0]]
    parts = split_by_shares([0] * 7 + [1] * 2, shares, seed=0)
    # 7 patients: 3.5, 2.1 and 1.4; the seventh goes to the first site.
    assert [row["label 0"] for row in counts(parts, [0] * 7 + [1] * 2)] == [4, 2, 1]
    assert {7, 8} <= set(parts[2])


def test_another_seed_gives_other_patients():
    first = split_by_shares([0] * 50, [[0.5, 0.5]], seed=0)
    second = split_by_shares([0] * 50, [[0.5, 0.5]], seed=1)
    assert as_lists(first) != as_lists(second)


def test_a_patient_has_the_most_frequent_label_and_the_smaller_in_a_tie():
    labels = [1, 1, 0, 0, 1, 1]
    patient_of_row = ["a", "a", "a", "b", "b", "c"]
    parts = split_by_shares(labels, np.eye(2), seed=0, patients=patient_of_row, min_patients=0)
    assert as_lists(parts) == [[3, 4], [0, 1, 2, 5]]


def test_patients_are_moved_from_the_largest_site_alone():
    labels = [0] * 10 + [1] * 3
    shares = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    parts = split_by_shares(labels, shares, seed=0, min_patients=2)
    assert [len(rows) for rows in parts] == [8, 3, 2]
    assert parts[1].tolist() == [10, 11, 12]


def test_without_rows_every_site_is_empty():
    assert as_lists(split_by_shares([], EVEN, seed=0, min_patients=0)) == [[], []]


def test_dirichlet_shares_are_skewed_by_a_small_alpha():
    for alpha in (5e-324, 0.1, 1.0, 1.7e308):
        shares = dirichlet_shares(3, 4, alpha, seed=7)
        assert shares.shape == (3, 4)
        np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert dirichlet_shares(200, 4, 0.01, seed=0).max(axis=1).mean() > 0.95
    np.testing.assert_allclose(dirichlet_shares(200, 4, 1e300, seed=0), 0.25, atol=1e-4)
    assert (dirichlet_shares(3, 4, 1.0, 0) == dirichlet_shares(3, 4, 1.0, 0)).all()
    assert (dirichlet_shares(3, 4, 1.0, 0) != dirichlet_shares(3, 4, 1.0, 1)).any()


def test_dirichlet_shares_have_the_moments_of_the_distribution():
    shares = dirichlet_shares(20_000, 4, 2.0, seed=0)
    np.testing.assert_allclose(shares.mean(axis=0), 1 / 4, atol=0.005)
    np.testing.assert_allclose(shares.var(axis=0), (1 / 4) * (3 / 4) / (4 * 2 + 1), atol=0.001)


def test_by_quantity_follows_sizes_and_keeps_patients_whole():
    assert [len(rows) for rows in by_quantity(8, [2, 1, 1], seed=0)] == [4, 2, 2]
    assert [len(rows) for rows in by_quantity(5, [1, 0], seed=0)] == [4, 1]
    patient_of_row = ["a", "a", "b", "b", "c", "c", "d", "d"]
    parts = by_quantity(patient_of_row, [3, 1], seed=3)
    assert [len(rows) for rows in parts] == [6, 2]
    assert patient_of_row[parts[1][0]] == patient_of_row[parts[1][1]]


def test_by_column_sorts_names_and_refuses_missing_ones():
    parts = by_column(np.array(["va ", "ulm", "va"], dtype=object))
    assert {name: rows.tolist() for name, rows in parts.items()} == {"ulm": [1], "va": [0, 2]}
    assert list(parts) == ["ulm", "va"]
    for missing in (None, float("nan"), " "):
        with pytest.raises(InputError, match="values must not be missing in any row; row 1 has"):
            by_column(np.array(["ulm", missing], dtype=object))


def test_counts_make_an_aligned_table():
    parts = [np.array([0, 1, 2]), np.array([3])]
    table = counts(parts, [0, 2, 2, 0], patients=["a", "a", "b", "c"])
    assert table[0] == {
        "site": "hospital-1", "patients": 2, "rows": 3, "label 0": 1, "label 1": 0, "label 2": 2
    }  # fmt: skip
    assert format_counts(table).splitlines() == [
        "site        patients  rows  label 0  label 1  label 2",
        "hospital-1         2     3        1        0        2",
        "hospital-2         1     1        1        0        0",
    ]
    named = counts(by_column(["b", "a"]), [0, 0])
    assert [row["site"] for row in named] == ["a", "b"]
    assert format_counts([]) == "no sites"


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: dirichlet_shares(0, 2, 1.0, 0),
            "num_classes must be a whole number, 1 or greater, got 0",
        ),
        (
            lambda: dirichlet_shares(2, 0, 1.0, 0),
            "num_sites must be a whole number, 1 or greater, got 0",
        ),
        (
            lambda: dirichlet_shares(2, 2, 1.0, -1),
            "seed must be a whole number, 0 or greater, got -1",
        ),
        (
            lambda: dirichlet_shares(2, 2, 0.0, 0),
            "alpha must be a finite number above 0, got 0.0",
        ),
        (
            lambda: dirichlet_shares(2, 2, float("inf"), 0),
            "alpha must be a finite number above 0, got inf",
        ),
        (
            lambda: dirichlet_shares(2, 2, float("nan"), 0),
            "alpha must be a finite number above 0, got nan",
        ),
        (
            lambda: split_by_shares([0], EVEN, 0),
            "num_sites must be at most 1, the number of patients; got 2",
        ),
        (
            lambda: split_by_shares([0, 1, 0], EVEN, 0, ["a", "b", "c"], 2),
            "num_sites must be at most 1, the number of patients over 2 (min_patients); got 2",
        ),
        (
            lambda: split_by_shares([0, 1], EVEN, 0, min_patients=-1),
            "min_patients must be a whole number, 0 or greater, got -1",
        ),
        (
            lambda: split_by_shares([0, 2], EVEN, 0),
            "labels must be at most 1, the last row of shares; got 2",
        ),
        (
            lambda: split_by_shares([0, -1], EVEN, 0),
            "labels must be whole numbers, 0 or greater, got -1",
        ),
        (
            lambda: split_by_shares([0.0, 1.0], EVEN, 0),
            "labels must be whole numbers, 0 or greater, got float64",
        ),
        (lambda: split_by_shares([[0]], EVEN, 0), "labels must have shape (n,), got (1, 1)"),
        (
            lambda: split_by_shares([0, 1], [0.5, 0.5], 0),
            "shares must have shape (num_classes, num_sites), got (2,)",
        ),
        (
            lambda: split_by_shares([0, 1], [[0.5, 0.4]] * 2, 0),
            "shares must be 0 or greater with sum 1 in each row",
        ),
        (
            lambda: split_by_shares([0, 1], [[1.5, -0.5]] * 2, 0),
            "shares must be 0 or greater with sum 1 in each row",
        ),
        (lambda: split_by_shares([0], "half", 0), "shares must hold numbers, got 'half'"),
        (
            lambda: split_by_shares([0, 1], EVEN, 0, ["a"]),
            "patients must be as long as labels, 2, got 1",
        ),
        (
            lambda: split_by_shares([0, 1], EVEN, 0, ["a", ""]),
            'patients must not be missing in any row; row 1 has ""',
        ),
        (
            lambda: by_quantity(5, [1, -1], 0),
            "shares must be sizes, 0 or greater with a sum above 0, got [1, -1]",
        ),
        (
            lambda: by_quantity(5, [0, 0], 0),
            "shares must be sizes, 0 or greater with a sum above 0, got [0, 0]",
        ),
        (
            lambda: by_quantity(2.5, [1], 0),
            "patients must be a whole number, 0 or greater, got 2.5",
        ),
        (
            lambda: by_quantity(2, [1, 1, 1], 0),
            "num_sites must be at most 2, the number of patients; got 3",
        ),
    ],
)
def test_arguments_are_checked(call, text):
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == text
