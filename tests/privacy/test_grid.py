import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from mpmath import mpf
from scipy import stats
from ziggurat import LAYERS, PLACES, Fed, bell, exact_layers, tables_of_numpy

from fedmed_flower.privacy.grid import (
    divergence_of,
    divergence_once,
    excess_delta,
    grid_for,
    step_once,
)

# The last place of floats from 1 to 2: all errors of the argument are in its units.
PLACE = 2.0**-52


@pytest.fixture(scope="module")
def tables():
    return tables_of_numpy()


@pytest.fixture(scope="module")
def exact():
    return exact_layers()


def spread(values, weights):
    """Return the root of the weighted mean of squares."""
    return math.sqrt((weights * np.square(values)).sum() / weights.sum())


# What docs/explanation/noise.md says of NumPy's tables and bits.


def test_numpy_draws_as_the_argument_supposes(tables, exact):
    edge, _, widths = exact
    for layer in (0, 2, 100, 255):
        fed = Fed()
        place = tables.ends[layer] // 3
        right = fed.draw(layer, place)
        assert right == float(place * tables.widths[layer] / PLACES)
        assert fed.taken
        assert fed.draw(layer, place, sign=1) == -right
    # In the wedge, one double decides.
    place = (tables.ends[100] + PLACES) // 2
    x = place * tables.widths[100] / PLACES
    high, low = tables.heights[99], tables.heights[100]
    share = float((bell(x) - low) / (high - low))
    for double, taken in ((share - 1e-12, True), (share + 1e-12, False)):
        fed = Fed()
        fed.draw(100, place, (double,))
        assert fed.taken == taken
    # The tail takes two doubles, and its sign from bit 8 of the place.
    for bit, sign in ((0, 1), (256, -1)):
        place = PLACES - 512 + bit
        found = Fed().draw(0, place, (0.5, 0.9))
        assert found == pytest.approx(sign * (float(edge) + math.log(2) / float(edge)), rel=1e-14)
    assert float(widths[255]) == pytest.approx(float(edge))


def test_the_layers_add_up_to_the_normal_density(tables, exact):
    _, area, _ = exact
    widths, heights = tables.widths, tables.heights
    ends = [end * width / PLACES for end, width in zip(tables.ends, widths, strict=True)]

    def density(x):
        total = mpf(0)
        for layer in range(LAYERS):
            if x < ends[layer]:
                total += 1 / widths[layer]
            elif layer and x < widths[layer]:
                drop = heights[layer - 1] - heights[layer]
                total += (bell(x) - heights[layer]) / drop / widths[layer]
        return total

    points, errors, weights = [], [], []
    for layer in range(1, LAYERS):
        for share in (0.1, 0.5, 0.9):
            points.append(ends[layer] + (widths[layer] - ends[layer]) * mpf(share))
            errors.append(float(density(points[-1]) * area / bell(points[-1]) - 1) / PLACE)
            weights.append(float(bell(points[-1]) * (widths[layer] - ends[layer])))
    errors, weights = np.array(errors), np.array(weights)
    mean = (errors * weights).sum() / weights.sum()
    assert spread(errors - mean, weights) < 3.0
    # The mass of the tail, which weighs 3e-4.
    tail = (1 - mpf(tables.ends[0]) / PLACES) * area
    edge = exact[0]
    true = math.sqrt(math.pi / 2) * mpf(math.erfc(float(edge) / math.sqrt(2)))
    assert abs(float(tail / true - 1)) < 100 * PLACE


def test_the_tail_has_an_unfair_sign_by_five_parts_in_ten_to_the_thirteen(tables):
    end = tables.ends[0]

    def with_bit(below):
        return below // 512 * 256 + max(0, below % 512 - 256)

    count = PLACES - end
    bias = (2 * (with_bit(PLACES) - with_bit(end)) - count) / count
    assert abs(bias) == pytest.approx(5.1e-13, rel=0.01)


def displaced(x, ratio, widths):
    """How far an edge of a cell at x can be off, in units of 2^-52 standard deviations."""
    layers = (widths[:, None] > x).sum(axis=0)
    # Half a place of each layer that reaches so far, on average over the layers.
    places = 0.5 * layers * 0.0049286732339746554 / np.exp(-x * x / 2)
    product = 0.5 * np.spacing(x) / PLACE
    return places + product + 0.5 * x + 0.5 * (x + ratio / 2)


@pytest.mark.parametrize("ratio", [0.25, 0.2, 0.125, 2**-5, 2**-8])
@pytest.mark.parametrize("offset", [0.0, 0.3, 0.5])
def test_the_deviation_of_a_number_is_below_the_bound_that_is_claimed(ratio, offset, exact):
    edge, _, found = exact
    widths = np.array([float(edge), *map(float, found[1:])])
    edges = np.arange(0, float(edge) / ratio + 1) * ratio + offset * ratio
    edges = edges[edges < 3.65]
    # Both ends of a cell are off, the worse way.
    off = displaced(edges, ratio, widths) * stats.norm.pdf(edges)
    cells = stats.norm.cdf(edges[1:]) - stats.norm.cdf(edges[:-1])
    weights = cells
    arithmetic = spread((off[1:] + off[:-1]) / cells, weights)
    # The tables, 3, and the rounding of the test in the wedge, 2.1; the tail is far smaller.
    assert arithmetic + 3.0 + 2.1 < 6 / ratio
    assert arithmetic + 3.0 + 2.1 > 3 / ratio


def coarse_ziggurat(bits, offset, ratio, exact):
    """Return cells' probabilities of a ziggurat with few places, and of exact normal numbers.

    All of its numbers are enumerated, in arithmetic that is exact beside their distances.
    """
    edge, _, found = exact
    widths = np.array([float(width) for width in found])
    edge = float(edge)
    places = np.arange(2**bits)
    numbers, masses = [], []
    for layer, width in enumerate(widths):
        x = places * width / 2**bits
        if layer == 0:
            taken = (x < edge).astype(float)
        else:
            high = np.exp(-(widths[layer - 1] ** 2) / 2) if layer > 1 else 1.0
            low = np.exp(-(width**2) / 2)
            taken = np.clip((np.exp(-x * x / 2) - low) / (high - low), 0.0, 1.0)
        numbers.append(x)
        masses.append(taken)
    x, mass = np.concatenate(numbers), np.concatenate(masses)
    edges = (np.arange(-80, 82) - 0.5) * ratio + offset
    # Of the body alone: the tail is drawn in another way.
    both = np.concatenate([x, -x])
    kept = np.abs(both) < edge
    found, _ = np.histogram(both[kept], edges, weights=np.concatenate([mass, mass])[kept])
    inside = np.clip(edges, -edge, edge)
    true = np.diff(stats.norm.cdf(inside))
    return found / found.sum(), true / true.sum()


@pytest.mark.parametrize("bits", [8, 11])
@pytest.mark.parametrize("ratio", [0.25, 0.125, 0.0625])
def test_a_ziggurat_with_few_places_keeps_the_bound_of_its_places(bits, ratio, exact):
    worst = 0.0
    for offset in np.linspace(-0.5, 0.5, 6) * ratio:
        found, true = coarse_ziggurat(bits, offset, ratio, exact)
        cells = true > 0
        divergence = (np.square(found - true)[cells] / true[cells]).sum()
        worst = max(worst, math.sqrt(divergence))
    # Half a place at both ends of a cell, .83 of 2^-bits in the mean over the layers.
    bound = 2 * 0.83 * 2.0**-bits / ratio
    assert bound / 100 < worst < 1.1 * bound


# How it adds up.


@given(st.floats(1e-14, 1e-9), st.integers(0, 1000))
def test_the_divergence_of_numbers_is_that_of_their_product(deviation, numbers):
    exact = (1 + mpf(deviation) ** 2) ** numbers - 1
    assert divergence_of(deviation, numbers) == pytest.approx(float(exact), rel=1e-9, abs=1e-300)


def added(grid, numbers, epsilon):
    return excess_delta(divergence_of(grid.deviation, numbers), epsilon)


def test_ten_million_weights_and_ten_thousand_steps():
    # By hand: a number is off by 6 places over a quarter, 5.33e-15; the root of 10^11 is 3.16e5,
    # and 1 + e^4 is 55.6.
    grid = grid_for(1.0, 10**11, 8.0, 1e-5)
    assert grid.step == 0.25
    assert added(grid, 10**11, 8.0) == pytest.approx(5.33e-15 * 3.162e5 * 55.6, rel=1e-3)
    # With less epsilon the grid is finer; with much more no grid keeps the bound.
    assert grid_for(1.0, 10**11, 3.0, 1e-5).step == 2**-5
    assert grid_for(1.0, 10**11, 9.0, 1e-5) is None


@hypothesis_settings(deadline=None)
@given(st.floats(1e-6, 1e6), st.integers(1, 10**12), st.floats(0, 30), st.floats(1e-9, 0.1))
def test_the_finest_grid_that_keeps_the_bound_is_chosen(std, numbers, epsilon, delta):
    grid = grid_for(std, numbers, epsilon, delta)
    if grid is None:
        step = 2.0 ** math.floor(math.log2(std / 4))
        coarsest = excess_delta(divergence_of(6 * PLACE * std / step, numbers), epsilon)
        assert coarsest > delta / 100
        return
    assert math.frexp(grid.step)[0] == 0.5
    assert std * 2**-20 <= grid.step <= std / 4
    assert grid.deviation == pytest.approx(6 * PLACE * std / grid.step)
    assert added(grid, numbers, epsilon) <= delta / 100
    finer = excess_delta(divergence_of(2 * grid.deviation, numbers), epsilon)
    assert finer > delta / 100 or grid.step < std * 2**-19


@given(st.integers(1, 10**12), st.floats(0, 40), st.floats(1e-14, 1e-10))
def test_more_numbers_a_larger_epsilon_and_a_finer_grid_cost_more(numbers, epsilon, deviation):
    cost = excess_delta(divergence_of(deviation, numbers), epsilon)
    assert excess_delta(divergence_of(deviation, 2 * numbers), epsilon) >= cost
    assert excess_delta(divergence_of(deviation, numbers), epsilon + 1) >= cost
    assert excess_delta(divergence_of(2 * deviation, numbers), epsilon) >= cost


def test_without_divergence_nothing_is_added_and_never_more_than_all():
    assert excess_delta(0.0, math.inf) == 0.0
    assert excess_delta(1e-30, math.inf) == 1.0
    assert excess_delta(1e-30, 501.0) == 1.0
    assert excess_delta(1e-12, 300.0) == 1.0


def worst_events(exact, other, epsilon):
    """Return the least delta of two distributions at an epsilon."""
    return np.maximum(exact - np.exp(epsilon) * other, 0).sum()


@hypothesis_settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32 - 1), st.floats(0, 6), st.floats(1e-4, 0.3))
def test_what_is_added_to_delta_covers_any_two_distributions(seed, epsilon, size):
    rng = np.random.default_rng(seed)
    ideal = rng.dirichlet(np.full(6, 0.4), 2)
    ideal = (ideal + 1e-9) / (1 + 6e-9)
    # Changed at random, each with its divergence from what it is in place of.
    moved = ideal * np.exp(size * rng.standard_normal(ideal.shape))
    moved /= moved.sum(axis=1, keepdims=True)
    divergence = (np.square(moved - ideal) / ideal).sum(axis=1).max()
    limit = worst_events(*ideal, epsilon) + excess_delta(divergence, epsilon)
    assert worst_events(*moved, epsilon) <= limit + 1e-12


def test_noise_of_nothing_has_no_grid():
    assert grid_for(0.0, 10, 1.0, 1e-5) is None
    assert step_once(0.0, 10) == 0.0


@given(st.floats(1e-6, 1e6), st.integers(0, 2**31))
def test_a_release_alone_has_a_grid_that_its_divergence_covers(std, numbers):
    step = step_once(std, numbers)
    assert math.frexp(step)[0] == 0.5
    assert std * 2**-17 * (1 - 1e-9) <= step <= std / 4
    actual = divergence_of(6 * PLACE * std / step, numbers)
    assert actual <= divergence_once(numbers) * (1 + 1e-9)
    if numbers <= 2**28:
        assert divergence_once(numbers) == pytest.approx(3.05e-20, rel=1e-3)
