"""Figures in a sum: zeros of hospitals without them, and numbers beyond the bound."""

import numpy as np
import pytest

from fedmed_flower.secure.parts import LARGE, ONES, TOLD, figure_in, figure_parts, figures_of
from fedmed_flower.secure.ring import COUNT, REAL, Layout

LAYOUT = Layout((*figure_parts("loss", 2, False), *figure_parts("rows", 1, True), TOLD, ONES))


def summed(*hospitals):
    """Return the figures of hospitals by the ring, without masks."""
    words = [np.zeros(size, kind) for size, kind in zip(LAYOUT.sizes, ("u4", "u8"), strict=True)]
    for figures in hospitals:
        values = {part.name: figure_in(part, figures) for part in LAYOUT.parts[:-2]}
        values |= {TOLD.name: np.array([bool(figures)]), ONES.name: np.array([1])}
        for vector, added in zip(words, LAYOUT.encode(values).words, strict=True):
            vector += added
    return figures_of(LAYOUT, LAYOUT.decode(tuple(words), len(hospitals)))


def test_a_real_figure_has_two_parts_and_a_whole_one_has_one():
    kinds = {part.name: part.kind for part in LAYOUT.parts[:-2]}
    assert kinds == {"loss": REAL, f"{LARGE}loss": REAL, "rows": COUNT}


def test_hospitals_without_figures_add_zeros():
    first = {"loss": np.array([0.1, -3e-9]), "rows": np.array([7])}
    found = summed(first, {}, {"loss": np.array([0.2, 1e-9]), "rows": np.array([5])}, {})
    assert found["loss"] == pytest.approx([0.1 + 0.2, -2e-9], rel=1e-15)
    assert found["rows"].tolist() == [12]


@pytest.mark.parametrize("largest", [1.1e12, 2.0**60, 3e26, -4e20])
def test_a_number_beyond_the_bound_is_taken_in_large_units(largest):
    found = summed({"loss": np.array([largest, 0.25])}, {"loss": np.array([5e11, 0.5])})
    assert found["loss"] == pytest.approx([largest + 5e11, 0.75], rel=1e-15)


def test_small_numbers_keep_their_digits_beside_large_ones():
    small = [2.0**-60, 1e-15]
    found = summed({"loss": np.array(small)}, {"loss": np.array(small)})
    assert found["loss"] == pytest.approx([2 * value for value in small], abs=1e-18)
