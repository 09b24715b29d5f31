"""Number types and shapes of arrays, for tests."""

from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

NUMBERS = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
    hnp.complex_number_dtypes(endianness="?"),
)


SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
