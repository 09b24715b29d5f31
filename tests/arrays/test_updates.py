import io
import itertools
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import reference
from builders import arrays, dump
from dtypes import NUMBERS, SHAPES
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmed_flower.arrays import kernels
from fedmed_flower.arrays.kernels import narrow, widen
from fedmed_flower.arrays.updates import Mean, NotUsableError, Updates
from fedmed_flower.arrays.views import view

OVERFLOW = "the squares of its values overflow"
NOT_FINITE = "w holds NaN or infinite values"


def saved(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def brain(values) -> ArrayRecord:
    """Return a record of one bfloat16 array."""
    array = Array(np.asarray(narrow(np.asarray(values, float), kernels.BFLOAT16)))
    array.dtype = "bfloat16"
    return ArrayRecord({"w": array})


def vectors(*rows) -> list[ArrayRecord]:
    return [arrays(w=row) for row in rows]


def updates(*rows, **kwargs) -> Updates:
    records = vectors(*rows)
    return Updates(records, records[0], **kwargs)


def matrix_of(records) -> np.ndarray:
    return np.array([
        np.concatenate([array.numpy().reshape(-1) for array in record.values()])
        for record in records
    ])  # fmt: skip


def reasons(function, *args) -> dict[int, str]:
    with pytest.raises(NotUsableError) as caught:
        function(*args)
    return caught.value.reasons


def peak_of(function) -> int:
    function()
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- Results are Flower's arrays ------------------------------------------------------------------


def ordinary(number) -> bool:
    """Return whether a multiple of a number is one, and an integer a float64."""
    if isinstance(number, np.integer | int):
        return abs(int(number)) <= 2**53
    parts = [abs(float(number.real)), abs(float(number.imag))]
    return all(part == 0 or 1e-280 < part < 1e300 for part in parts)


@settings(max_examples=100, deadline=None)
@given(st.data(), st.booleans())
def test_results_are_the_bytes_that_numpy_saves(data, fortran):
    dtype = data.draw(NUMBERS)
    numbers = hnp.from_dtype(dtype, allow_nan=False, allow_infinity=False)
    values = data.draw(hnp.arrays(dtype, SHAPES, elements=numbers.filter(ordinary)))
    array = Array(np.asfortranarray(values) if fortran and values.ndim else values)
    record = ArrayRecord({"a": array, "b": Array(np.zeros(2, np.float32))})
    before = dump(record)
    given_updates = Updates([record] * 3, record)
    mean = Mean(record)
    mean.add(record, 4)
    results = [given_updates.weighted_sum([1, 0, 0]), mean.result()]
    if dtype.kind != "c":
        results.append(given_updates.order_statistics(1, 2))
    for result in results:
        got = result["a"]
        assert (got.dtype, tuple(got.shape), got.stype) == (str(dtype), values.shape, array.stype)
        assert got.numpy().dtype == dtype
        # A sum may lose the sign of zero.
        assert saved(got.numpy() + dtype.type(0)) == saved(values + dtype.type(0))
        assert got.data == saved(got.numpy())
    assert dump(record) == before


def test_bfloat16_stays_bfloat16():
    rows = [brain([1.0, 2.0]), brain([3.0, 5.0]), brain([8.0, -1.0])]
    given_updates = Updates(rows, rows[0])
    mean = Mean(rows[0])
    for row in rows:
        mean.add(row, 2)
    for result, wanted in [
        (given_updates.weighted_sum([0.25, 0.5, 0.25]), [3.75, 2.75]),
        (given_updates.order_statistics(1, 2), [3.0, 2.0]),
        (mean.result(), [4.0, 2.0]),
    ]:
        assert result["w"].dtype == "bfloat16"
        assert result["w"].data == brain(wanted)["w"].data
    assert given_updates.gram()[0].tolist() == [0, 0, 0]
    assert given_updates.gram()[1].tolist() == [0, 13, 5]


def test_results_come_in_the_order_of_the_model_whatever_the_replies():
    rows = [arrays(a=[1.0], b=[2.0]), arrays(b=[4.0], a=[3.0])]
    got = Updates(rows, arrays(b=[0.0], a=[0.0])).weighted_sum([0.5, 0.5])
    assert list(got) == ["b", "a"]
    assert dump(got) == dump(arrays(b=[3.0], a=[2.0]))


def test_the_rest_of_a_sum_is_the_global_model():
    given_updates = updates([1.0], [3.0], centre=arrays(w=[10.0]))
    assert given_updates.centred
    assert given_updates.weighted_sum([0.25, 0.25], rest=0.5)["w"].numpy() == 6
    assert given_updates.weighted_sum([0, 0], rest=1)["w"].numpy() == 10
    alone = updates([1.0], [3.0])
    assert not alone.centred
    assert alone.weighted_sum([0.25, 0.25], rest=0.5)["w"].numpy() == 1.5


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, bool, complex])
def test_weights_that_are_all_zero_make_zero(dtype):
    record = arrays(w=np.ones((50, 2), dtype))
    got = Updates([record] * 2, record).weighted_sum([0, 0])
    assert dump(got) == dump(arrays(w=np.zeros((50, 2), dtype)))


# --- Memory ---------------------------------------------------------------------------------------


def test_results_are_made_without_a_second_copy():
    size = 1_000_000
    records = vectors(*np.random.default_rng(0).normal(size=(5, size)).astype(np.float32))
    model = 4 * size
    given_updates = Updates(records, records[0])
    assert peak_of(lambda: Updates(records, records[0])) < 0.1 * model
    assert peak_of(lambda: given_updates.weighted_sum([0.2] * 5)) < 1.2 * model
    assert peak_of(lambda: given_updates.order_statistics(2, 3)) < 1.3 * model
    assert peak_of(lambda: updates_gram(records)) < 0.3 * model
    assert peak_of(given_updates.norms) < 0.3 * model


def updates_gram(records):
    return Updates(records, records[0], records[1]).gram()


def test_a_running_mean_takes_what_it_says():
    size = 1_000_000
    records = vectors(*np.random.default_rng(0).normal(size=(2, size)).astype(np.float32))

    def mean():
        made = Mean(records[0])
        for record in records * 5:
            made.add(record, 2)
        return made.result()

    assert peak_of(mean) < (16 + 4) * size * 1.05


# --- What cannot be used --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", [np.float16, np.float32, np.float64])
def test_every_way_through_the_parameters_names_what_is_not_finite(bad, layout):
    good, flawed = np.array([1, 2, 3], layout), np.array([1, bad, 3], layout)
    rows = [good, flawed, good, -good, flawed]
    wanted = dict.fromkeys([1, 4], NOT_FINITE)
    for centre, mix in itertools.product([None, arrays(w=good)], [None, np.full((3, 5), 0.2)]):
        for way in (
            lambda u: u.check(),
            lambda u: u.gram(),
            lambda u: u.weighted_sum([1 / u.count] * u.count),
            lambda u: u.order_statistics(1, 2),
            lambda u: u.require_norms(1e9),
            lambda u: u.weighted_sum([1.0] + [0.0] * (u.count - 1)),
        ):
            assert reasons(way, updates(*rows, centre=centre, mix=mix)) == wanted


def test_a_zero_weight_hides_nothing():
    assert reasons(updates([1.0], [np.nan]).weighted_sum, [1, 0]) == {1: NOT_FINITE}
    assert reasons(updates([np.inf], [1.0]).subset([1, 0]).weighted_sum, [1, 0]) == {1: NOT_FINITE}


def test_opposite_infinities_do_not_cancel_out():
    assert reasons(updates([np.inf], [-np.inf]).weighted_sum, [0.5, 0.5]) == {
        0: NOT_FINITE, 1: NOT_FINITE,
    }  # fmt: skip


def test_complex_entries_are_looked_at_though_they_have_no_distance():
    good = arrays(w=[1.0], z=np.array([1j]))
    flawed = arrays(w=[2.0], z=np.array([complex(0, np.nan)]))
    for way in (Updates.gram, lambda u: u.weighted_sum([0.5, 0.5])):
        assert reasons(way, Updates([good, flawed], good, good)) == {
            1: "z holds NaN or infinite values"
        }
    both = Updates([good, good], good, good)
    assert both.gram().tolist() == [[0, 0], [0, 0]]
    assert dump(both.weighted_sum([0.5, 0.5])) == dump(good)


def test_the_reasons_are_told():
    with pytest.raises(NotUsableError, match=f"^update 0: {NOT_FINITE}; update 2: {NOT_FINITE}$"):
        updates([np.nan], [1.0], [np.inf]).check()


def test_the_largest_numbers_can_be_used():
    most = np.finfo(np.float32).max
    given_updates = updates([most, most], [most, -most], [most, -most])
    assert given_updates.order_statistics(1, 2)["w"].numpy().tolist() == [most, -most]
    assert given_updates.weighted_sum([0.5, 0.25, 0.25])["w"].numpy().tolist() == [most, 0]
    given_updates.check()


def test_a_sum_that_overflows_is_not_blamed_on_the_updates():
    most = np.finfo(np.float32).max
    assert updates([most], [most]).weighted_sum([1, 1])["w"].numpy() == np.inf
    assert updates([most], [most]).order_statistics(0, 2)["w"].numpy() == np.inf


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("known", [True, False])
def test_an_update_whose_squares_overflow_is_the_only_one_blamed(place, known):
    rows = [[1.0, k] for k in range(5)]
    rows[place] = [1e30, 0.0]
    centre = arrays(w=[1.0, 1.0]) if known else None
    assert reasons(updates(*rows, centre=centre).gram) == {place: OVERFLOW}
    if not known:
        assert reasons(updates(*rows).require_norms, 1000) == {place: OVERFLOW}


def test_several_updates_whose_squares_overflow_are_left_out_one_after_the_other():
    rows = [[-1e30], [1e30], [1.0], [2.0], [3.0], [1e35], [4.0]]
    left = list(range(7))
    for _ in range(3):
        found = reasons(updates(*[rows[k] for k in left]).gram)
        assert set(found.values()) == {OVERFLOW}
        left = [k for place, k in enumerate(left) if place not in found]
    assert left == [2, 3, 4, 6]
    assert np.isfinite(updates(*[rows[k] for k in left]).gram()).all()


# --- Distances ------------------------------------------------------------------------------------


def distances(given_updates):
    products = given_updates.gram()
    lengths = products.diagonal()
    return lengths[:, None] + lengths - 2 * products


@pytest.mark.parametrize("ratio", [1e-3, 1e-4, 3e-5])
@pytest.mark.parametrize("size", [1, 1e3, 1e6, 1e15])
@pytest.mark.parametrize("place", [0, 4, 9])
@pytest.mark.parametrize("known", [True, False])
def test_no_update_drowns_the_distances_between_the_others(ratio, size, place, known):
    rng = np.random.default_rng(0)
    model = rng.normal(size=3000).astype(np.float32)
    rows = (model + ratio * rng.normal(size=(10, 3000))).astype(np.float32)
    rows[place] = size * rng.normal(size=3000)
    centre = arrays(w=model) if known else None
    others = [k for k in range(10) if k != place]
    got = distances(updates(*rows, centre=centre))
    want = reference.distances(rows.astype(float))
    np.testing.assert_allclose(
        got[np.ix_(others, others)], want[np.ix_(others, others)], rtol=1e-4, atol=1e-6 * ratio**2
    )
    np.testing.assert_allclose(got[place, others], want[place, others], rtol=1e-4)


def test_updates_that_are_all_the_same_have_no_distance():
    np.testing.assert_allclose(distances(updates(*[[1.5, -2.5]] * 7)), 0)
    one = updates([3.0, 4.0])
    assert one.gram().tolist() == [[0]]
    assert one.norms().tolist() == [0]


def test_inner_products_without_a_global_model_go_with_the_rest_of_a_sum():
    rows = [[1e6, 0.0], [1.0, 2.0], [3.0, 2.0], [1.0, 4.0]]
    given_updates = updates(*rows)
    products = given_updates.gram()
    (origin,) = np.flatnonzero(products.diagonal() == 0)
    assert origin != 0
    want = reference.gram(np.array(rows), np.array(rows[origin]))
    np.testing.assert_allclose(products, want)
    again = given_updates.mixed(np.eye(4)[1:])
    for both in (given_updates, again):
        rest = both.weighted_sum([0] * both.count, rest=1)["w"].numpy()
        assert rest.tolist() == rows[origin]
    np.testing.assert_allclose(again.gram(), want[1:, 1:])


def test_norms_are_those_of_the_changes():
    rows = [[4.0, 5.0], [1.0, 1.0], [1e30, 1.0], [np.nan, 1.0]]
    got = updates(*rows, centre=arrays(w=[1.0, 1.0])).norms()
    assert got[:2].tolist() == [5, 0]
    assert got[2] == np.inf
    assert np.isnan(got[3])


def test_a_long_update_is_refused():
    rows = [[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 11.0], [1e30, 0.0]]
    given_updates = updates(*rows, centre=arrays(w=[0.0, 0.0]))
    given_updates.subset([0, 1, 2]).require_norms(1.5)
    text = "its change of the model has the norm {}, the limit is {}"
    # The median of 1, 2, 3 and 11 is 2.5.
    assert reasons(given_updates.require_norms, 4) == {
        3: text.format("11", "10"), 4: text.format("inf", "10"),
    }  # fmt: skip
    assert reasons(given_updates.subset([0, 1, 2]).require_norms, 1) == {2: text.format(3, 2)}


@pytest.mark.parametrize("place", [0, 2])
def test_a_long_update_is_refused_without_a_global_model(place):
    rows = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0]]
    rows.insert(place, [1000.0, 0.0])
    assert list(reasons(updates(*rows).require_norms, 10)) == [place]


# --- Weighted sums of updates ---------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**32), st.booleans(), st.booleans())
def test_mixed_updates_are_as_if_the_sites_had_sent_the_mixtures(made, count, seed, known, twice):
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 2), "b": (), "c": (0,), "d": (5,)}
    draw = {key: rng.normal(size=(count, *shape)) for key, shape in shapes.items()}
    records = [arrays(**{key: np.asarray(v[k]) for key, v in draw.items()}) for k in range(count)]
    mix = rng.dirichlet(np.ones(count), made)
    given_updates = Updates(records, records[0], records[0] if known else None)
    if twice:
        first = rng.dirichlet(np.ones(count), 3)
        second = rng.dirichlet(np.ones(3), made)
        given_updates, mix = given_updates.mixed(first), second @ first
        got = given_updates.mixed(second)
    else:
        got = given_updates.mixed(mix)
    explicit = [
        arrays(**{key: np.asarray(np.tensordot(row, v, 1)) for key, v in draw.items()})
        for row in mix
    ]
    want = Updates(explicit, records[0], records[0])
    assert got.count == made
    weights = rng.dirichlet(np.ones(made))
    close = {"rtol": 1e-12, "atol": 1e-12}
    for way in (
        lambda u: u.weighted_sum(weights, rest=0.5),
        lambda u: u.order_statistics((made - 1) // 2, made // 2 + 1),
        lambda u: u.subset([0, made - 1]).order_statistics(0, 2),
        lambda u: u.subset([made - 1]).weighted_sum([1]),
    ):
        np.testing.assert_allclose(matrix_of([way(got)]), matrix_of([way(want)]), **close)
    np.testing.assert_allclose(distances(got), distances(want), **close)
    chosen = [made - 1, 0]
    np.testing.assert_allclose(distances(got.subset(chosen)), distances(want.subset(chosen)),
                               **close)  # fmt: skip


def test_a_subset_keeps_the_order_and_what_belongs_to_it():
    numbers = [MetricRecord({"loss": float(k)}) for k in range(3)]
    given_updates = updates([0.0], [1.0], [2.0], sites=["a", "b", "c"], metrics=numbers)
    part = given_updates.subset([2, 0])
    assert part.count == 2
    assert part.sites == ("c", "a")
    assert [record["loss"] for record in part.metrics] == [2, 0]
    assert part.weighted_sum([1, 0])["w"].numpy() == 2
    assert updates([0.0], [1.0]).subset([1]).sites == ()


def test_a_subset_without_the_flawed_update_can_be_used():
    given_updates = updates([1.0], [np.nan], [3.0])
    with pytest.raises(NotUsableError):
        given_updates.gram()
    assert given_updates.subset([0, 2]).weighted_sum([0.5, 0.5])["w"].numpy() == 2


def test_integers_and_bools_are_the_others():
    records = [
        arrays(w=[k], n=np.array(k), z=np.array([1j]), b=np.array([k > 1])) for k in range(3)
    ]
    given_updates = Updates(records, records[0], records[2])
    others = given_updates.others()
    assert list(others.layout) == ["n", "b"]
    assert (others.count, others.centred) == (3, True)
    assert dump(others.weighted_sum([0, 0, 0], rest=1)) == dump(
        arrays(n=np.array(2), b=np.array([True]))
    )
    halves = given_updates.mixed(np.array([[0.5, 0, 0.5]])).others()
    assert halves.order_statistics(0, 1)["n"].numpy() == 1
    assert updates([1.0], [2.0]).others() is None


def test_a_selection_rule_of_flowers_form_chooses():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(7, 20))
    rows[2] += 50
    given_updates = updates(*rows, metrics=[MetricRecord({"n": k}) for k in range(7)])
    chosen = given_updates.chosen_by(select_multikrum, 1, 4)
    assert chosen == np.argsort(reference.krum_scores(rows, 1))[:4].tolist()
    assert 2 not in chosen


def test_a_selection_rule_sees_metrics_and_may_change_what_it_is_given():
    numbers = [MetricRecord({"loss": 3.0}), MetricRecord({"loss": 1.0})]
    records = vectors([1.0], [2.0])
    before = [dump(record) for record in records]
    given_updates = Updates(records, records[0], metrics=numbers)

    def lowest(contents, num_malicious, count):
        assert (num_malicious, count) == (5, 1)
        best = min(contents, key=lambda content: content["metrics"]["loss"])
        for content in contents:
            content["arrays"].to_numpy_ndarrays(keep_input=False)
            content["metrics"].clear()
        return [best]

    assert given_updates.chosen_by(lowest, 5, 1) == [1]
    assert [dump(record) for record in records] == before
    assert [record["loss"] for record in numbers] == [3, 1]
    assert given_updates.subset([1]).weighted_sum([1])["w"].numpy() == 2


def test_a_selection_rule_that_makes_its_own_records_is_refused():
    with pytest.raises(
        ValueError, match=r"^the selection rule returned other records than those it was given$"
    ):
        updates([1.0], [2.0]).chosen_by(lambda contents, *_: [contents[0].copy()], 0, 1)


def test_a_selection_rule_does_not_choose_among_mixtures():
    mixed = updates([1.0], [2.0]).mixed(np.full((1, 2), 0.5))
    with pytest.raises(
        ValueError, match=r"^a selection rule cannot choose among weighted sums of updates$"
    ):
        mixed.chosen_by(select_multikrum, 0, 1)


# --- One by one -----------------------------------------------------------------------------------


def nearest(exact: Fraction) -> np.float32:
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess,
              np.nextafter(guess, np.float32(np.inf))]  # fmt: skip
    return min(around, key=lambda value: abs(Fraction(float(value)) - exact))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-(2**24), 2**24), st.integers(-20, 20), st.integers(1, 10**9)),
             min_size=1, max_size=40),
    st.randoms(),
)  # fmt: skip
def test_a_running_mean_is_the_exact_mean_rounded_once(terms, random):
    values = [(np.float32(np.ldexp(float(digits), power)), w) for digits, power, w in terms]
    random.shuffle(values)
    mean = Mean(arrays(w=[0.0]))
    for value, weight in values:
        mean.add(arrays(w=np.array([value])), weight)
    total = sum(Fraction(float(value)) * weight for value, weight in values)
    exact = total / sum(weight for _, weight in values)
    got = mean.result()["w"].numpy()[0]
    best = nearest(exact)
    scale = max(abs(Fraction(float(value))) for value, _ in values)
    near_tie = abs(abs(Fraction(float(got)) - exact) - abs(Fraction(float(best)) - exact))
    assert near_tie <= scale / 2**60


def test_the_order_of_replies_makes_no_difference_to_the_bits():
    rng = np.random.default_rng(0)
    records = [
        arrays(a=rng.normal(size=500).astype(np.float32), b=rng.normal(size=500),
               c=rng.normal(size=500).astype(np.float16), d=rng.integers(-99, 99, 500))
        for _ in range(30)
    ]  # fmt: skip
    weights = rng.uniform(0, 10, 30)
    results = []
    for _ in range(20):
        mean = Mean(records[0])
        for k in rng.permutation(30):
            mean.add(records[k], weights[k])
        results.append(dump(mean.result()))
    assert all(result == results[0] for result in results)


def test_the_order_of_weights_that_lose_digits_makes_no_difference():
    weights = [0.1, 0.2, 0.3, 0.7, 1e9, 1e-3]
    results = set()
    for order in itertools.permutations(range(6)):
        mean = Mean(arrays(w=np.zeros(1)))
        for k in order:
            mean.add(arrays(w=np.array([k / 3])), weights[k])
        results.add(mean.result()["w"].data)
    assert len(results) == 1


def test_a_running_mean_of_integers_and_complex_numbers():
    mean = Mean(arrays(n=np.array(0, np.int64), z=np.zeros(1, np.complex64), b=np.array([True])))
    mean.add(arrays(n=np.array(3), z=np.array([1 + 1j], np.complex64), b=np.array([True])), 1)
    mean.add(arrays(n=np.array(6), z=np.array([4 - 2j], np.complex64), b=np.array([False])), 2)
    assert dump(mean.result()) == dump(
        arrays(n=np.array(5), z=np.array([3 - 1j], np.complex64), b=np.array([False]))
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_running_mean_of_the_largest_numbers_is_finite(dtype):
    most = np.finfo(dtype).max
    mean = Mean(arrays(w=np.zeros(2, dtype)))
    for _ in range(1000):
        mean.add(arrays(w=np.array([most, -most], dtype)), 1e9)
    assert mean.result()["w"].numpy().tolist() == [most, -most]


def test_a_running_mean_is_that_of_all_at_once():
    rng = np.random.default_rng(0)
    records = [arrays(w=rng.normal(size=(40, 50)).astype(np.float32)) for _ in range(12)]
    weights = rng.dirichlet(np.ones(12))
    mean = Mean(records[0])
    for record, weight in zip(records, weights, strict=True):
        mean.add(record, weight)
    at_once = Updates(records, records[0]).weighted_sum(weights)["w"].numpy()
    np.testing.assert_allclose(mean.result()["w"].numpy(), at_once, rtol=0, atol=1e-6)


def test_no_update_is_changed():
    rng = np.random.default_rng(0)
    records = [
        arrays(a=np.asfortranarray(rng.normal(size=(5, 6))), b=rng.normal(size=3), c=np.arange(3))
        for _ in range(70)
    ]
    before = [{key: (array, array.data) for key, array in record.items()} for record in records]
    copies = [bytes(bytearray(array.data)) for record in records for array in record.values()]
    for count in (5, 70):
        given_updates = Updates(records[:count], records[0], records[1])
        given_updates.gram()
        given_updates.norms()
        given_updates.order_statistics(0, count)
        given_updates.weighted_sum([1 / count] * count, rest=0.5)
        given_updates.mixed(np.full((2, count), 1 / count)).order_statistics(0, 1)
        mean = Mean(records[0])
        mean.add(records[0], 1)
        mean.result()
    after = [{key: (array, array.data) for key, array in record.items()} for record in records]
    assert after == before
    assert [array.data for record in records for array in record.values()] == copies


def test_views_of_results_are_read_only():
    result = updates([1.0], [2.0]).weighted_sum([0.5, 0.5])
    assert not view(result["w"]).flags.writeable
    assert widen(view(result["w"])).tolist() == [1.5]
