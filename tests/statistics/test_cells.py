from collections import Counter, defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmed_flower.statistics.cells import merge_neighbours


def one_by_one(steps, constraints, patients, minimum):
    """Merge bins row by row, as the docstring of `merge_neighbours` says."""
    rows = defaultdict(list)
    for row, step in enumerate(steps):
        rows[step].append(row)
    left = Counter()
    for number, codes in enumerate(constraints):
        left.update((number, code) for code, _ in {*zip(codes, patients, strict=True)})
    merged, held, first = [], defaultdict(set), None
    for step in sorted(rows):
        first = step if first is None else first
        later = [row for other in rows if other > step for row in rows[other]]
        for number, codes in enumerate(constraints):
            for row in rows[step]:
                held[number, codes[row]].add(patients[row])
        behind = [
            {patients[row] for row in later if codes[row] == code}
            for codes in constraints
            for code in {*codes}
        ]
        enough = all(len(members) >= minimum for members in held.values())
        if enough and all(len(members) >= minimum or not members for members in behind):
            merged.append((first, step))
            held, first = defaultdict(set), None
    return None if held else merged


@settings(max_examples=400)
@given(st.data())
def test_bins_are_merged_as_one_by_one(data):
    count = data.draw(st.integers(0, 25))

    def column(most):
        return data.draw(st.lists(st.integers(0, most), min_size=count, max_size=count))

    steps = [step - 3 for step in column(data.draw(st.integers(0, 8)))]
    visits = data.draw(st.booleans())
    patients = column(data.draw(st.integers(0, 12))) if visits else [*range(count)]
    constraints = [column(2) for _ in range(data.draw(st.integers(1, 2)))]
    minimum = data.draw(st.integers(1, 6))
    arrays = [np.array(codes, np.int64) for codes in constraints]
    given_arrays = np.array(steps, np.int64), arrays, np.array(patients, np.int64)
    wanted = one_by_one(steps, constraints, patients, minimum)
    assert merge_neighbours(*given_arrays, minimum) == wanted


def test_a_patient_who_returns_counts_once_in_a_bin():
    """Two visits in neighbouring bins, and one in a bin far behind."""
    steps = np.array([0, 0, 1, 1, 9, 9])
    patients = np.array([0, 1, 0, 1, 0, 1])
    classes = np.zeros(6, np.int64)
    assert merge_neighbours(steps, [classes], patients, 2) == [(0, 0), (1, 1), (9, 9)]
    assert merge_neighbours(steps, [classes], patients, 3) is None
