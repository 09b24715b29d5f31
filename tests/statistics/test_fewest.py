import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedmed_flower.statistics.fewest import class_codes, numbered, patients_of

codes = st.lists(
    st.one_of(st.integers(-1, 5), st.sampled_from([2**31, 2**40, -(2**40)])), max_size=12
)


@settings(max_examples=300)
@given(codes)
@example([])
@example([7, 7])
@example([-1, 0, 2**31, 0])
@example([2**31, 2**31])
@example([-(2**40), 3, 2**40])
def test_codes_are_numbered_as_by_sorting(given_codes):
    array = np.array(given_codes, np.int64)
    distinct, numbers = numbered(array)
    wanted, wanted_numbers = np.unique(array, return_inverse=True)
    assert distinct.tolist() == wanted.tolist()
    assert numbers.tolist() == wanted_numbers.tolist()


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(-1, 3), st.sampled_from([-1, 0, 2**31])), min_size=1))
def test_combinations_are_numbered_in_their_order(rows):
    number = {row: index for index, row in enumerate(sorted({*rows}))}
    labels = [np.array(column, np.int64) for column in zip(*rows, strict=True)]
    assert class_codes(*labels).tolist() == [number[row] for row in rows]


def test_patients_are_counted_once_a_class():
    classes = np.array([0, 0, 2, 2, 2])
    assert patients_of(classes, np.arange(5)).tolist() == [2, 0, 3]
    assert patients_of(classes, np.array([0, 0, 0, 1, 1])).tolist() == [1, 0, 2]
    assert patients_of(classes[:0], classes[:0]).tolist() == []
