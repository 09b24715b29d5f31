import math
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedmed_flower.errors import InputError
from fedmed_flower.secure.encoding import SecureError, decoded, digest, encoded
from fedmed_flower.secure.ring import COUNT, FIXED, MOST_SITES, REAL, ArrayChange, Layout, Part


def seeded(seed):
    return np.random.default_rng(seed).bytes


def added(encodings):
    """Return the sum of the words of several hospitals, in the ring."""
    small = sum(each.words[0] for each in encodings)
    large = sum(each.words[1] for each in encodings)
    return small, large


def fixed(size, bound=2.0**-4, sigma=0.0):
    return Layout((Part("w", size, FIXED, bound, sigma),))


def signed(word, bits):
    return int(word) - (1 << bits if int(word) >> (bits - 1) else 0)


def exact_real(words, size, row):
    """Return a real number as its two words say, in units of its bound."""
    upper = Fraction(signed(words[row], 64), 2**50)
    return upper + Fraction(signed(words[size + row], 64), 2**102)


def test_words_are_those_of_the_worked_example():
    layout = Layout(
        (
            Part("w", 3, FIXED, bound=2.0),
            Part("rows", 2, COUNT),
            Part("sum", 2, REAL, bound=1.0),
            Part("b", 1, FIXED, bound=0.5),
        )
    )
    values = {
        "w": np.array([[1.0, -2.0, 2.0**-29]]),
        "rows": np.array([0, 7]),
        "sum": np.array([0.75, -(2.0**-60)]),
        "b": np.float32([-0.25]),
    }
    assert layout.sizes == (4, 6)
    small, large = layout.encode(values).words
    # A bound of 2 leaves 29 bits behind the point, a bound of 1/2 leaves 31.
    assert small.tolist() == [1 << 29, 2**32 - (1 << 30), 1, 2**32 - (1 << 29)]
    assert small.dtype == np.uint32
    assert large.tolist() == [0, 7, 3 << 48, 0, 0, 2**64 - (1 << 42)]
    assert large.dtype == np.uint64
    sums = layout.decode((small, large), 1)
    assert list(sums) == ["w", "rows", "sum", "b"]
    assert sums["w"].tolist() == [1.0, -2.0, 2.0**-29]
    assert sums["rows"].tolist() == [0, 7]
    assert sums["rows"].dtype == np.int64
    assert sums["sum"].tolist() == [0.75, -(2.0**-60)]
    assert sums["b"].tolist() == [-0.25]


@pytest.mark.parametrize(
    ("bound", "sigma", "exponent"),
    [
        (1.0, 0.0, 30),
        (2.0**-4, 0.0, 34),
        (2.0**-40, 0.0, 70),
        (2.0**40, 0.0, -10),
        # The sum must be below 2^31, so 1 + 8/8 = 2 leaves 29 bits, and a little less leaves 30.
        (1.0, 0.125, 29),
        (1.0, 0.124, 30),
        (1.0, 0.126, 29),
        (1.0, 1.0, 27),
        # Of the room for 8 sigma 256 steps are kept for the rounding.
        (1.0, (2**31 - 257) / 2**30 / 8 - 0.125, 30),
        (1.0, (2**31 - 256) / 2**30 / 8 - 0.125, 29),
        (1.0, (2**31 - 255) / 2**30 / 8 - 0.125, 29),
    ],
)
def test_scale_is_the_largest_power_of_two_with_room_for_the_sum(bound, sigma, exponent):
    scale = Part("w", 1, FIXED, bound, sigma).scale
    assert scale == 2.0**exponent
    steps = (Fraction(bound) + 8 * Fraction(sigma)) * Fraction(scale)
    assert steps + MOST_SITES < 2**31 <= 2 * steps + MOST_SITES


@pytest.mark.parametrize("sites", [3, 5, 12])
def test_sums_are_those_of_whole_numbers_in_python(sites):
    size = 500
    layout = Layout(
        (
            Part("w", size, FIXED, bound=2.0**-3),
            Part("rows", size, COUNT),
            Part("sum", size, REAL, bound=2.0**20),
        )
    )
    rng = np.random.default_rng(sites)
    encodings = []
    for site in range(sites):
        values = {
            "w": rng.uniform(-0.125, 0.125, size),
            "rows": rng.integers(0, 2**56, size),
            "sum": rng.uniform(-(2.0**20), 2.0**20, size),
        }
        encodings.append(layout.encode(values, 1 / sites, seeded(site)))
    small, large = added(encodings)
    sums = layout.decode((small, large), sites)
    scale = 2**33
    for row in range(size):
        steps = sum(signed(each.words[0][row], 32) for each in encodings)
        assert int(small[row]) == steps % 2**32
        assert sums["w"][row] == steps / scale
        rows = sum(int(each.words[1][row]) for each in encodings)
        assert int(large[row]) == rows
        assert int(sums["rows"][row]) == rows
        total = sum(exact_real(each.words[1][size:], size, row) for each in encodings) * 2**20
        assert exact_real(large[size:], size, row) * 2**20 == total
        assert abs(Fraction(sums["sum"][row]) - total) <= Fraction(math.ulp(float(total)))


def test_order_of_the_hospitals_does_not_matter_to_the_bit():
    rng = np.random.default_rng(3)
    layout = fixed(1000)
    encodings = [
        layout.encode({"w": rng.normal(0, 1e-3, 1000)}, 0.1, seeded(site)) for site in range(10)
    ]
    one = layout.decode(added(encodings), 10)["w"]
    other = layout.decode(added(encodings[::-1]), 10)["w"]
    assert one.tobytes() == other.tobytes()


# A block is 32,768 values; the fraction of a step that remains is one that 16 bits hold, or not.
@pytest.mark.parametrize("fraction", [0.5, 0.25, 1 / 3, 1e-3, 1 - 1e-3, -0.7])
def test_rounding_is_unbiased_and_goes_to_a_neighbour(fraction):
    draws = 1_000_000
    steps = -1234 + fraction
    layout = fixed(draws, bound=1.0)
    values = np.full(draws, steps / 2**30)
    words = layout.encode({"w": values}, random=seeded(7)).words[0].view(np.int32)
    assert set(np.unique(words).tolist()) == {math.floor(steps), math.ceil(steps)}
    chance = steps - math.floor(steps)
    error = math.sqrt(chance * (1 - chance) / draws)
    # Four standard errors, and the stated bias.
    assert abs(words.mean() - steps) < 4 * error + 2**-17


def test_rounding_of_random_numbers_is_unbiased_and_goes_to_a_neighbour():
    draws = 1_000_000
    values = np.random.default_rng(1).uniform(-1, 1, draws)
    words = fixed(draws, bound=1.0).encode({"w": values}, 0.7, seeded(2)).words[0].view(np.int32)
    steps = values * 0.7 * 2**30
    errors = words - steps
    assert np.abs(errors).max() < 1
    # A uniform fraction has the variance 1/6.
    assert abs(errors.mean()) < 4 * math.sqrt(1 / 6 / draws)
    assert errors.var() == pytest.approx(1 / 6, abs=4 * math.sqrt(0.04 / draws))
    # No pattern over the places within a block, nor over neighbours.
    assert abs(np.corrcoef(errors[1:], errors[:-1])[0, 1]) < 4 / math.sqrt(draws)


def test_whole_steps_are_never_rounded():
    steps = np.random.default_rng(2).integers(-(2**30), 2**30, 100_000)
    steps[:2] = [-(2**30), 2**30]
    words = fixed(steps.size, bound=1.0).encode({"w": steps / 2**30}).words[0]
    assert (words.view(np.int32) == steps).all()


def test_random_bits_come_from_the_operating_system_unless_told():
    layout = fixed(50_000)
    values = {"w": np.random.default_rng(0).normal(0, 1e-3, 50_000)}
    assert (layout.encode(values).words[0] != layout.encode(values).words[0]).any()
    one = layout.encode(values, random=seeded(1)).words[0]
    assert (one == layout.encode(values, random=seeded(1)).words[0]).all()
    asked = []

    def key(length):
        asked.append(length)
        return bytes(length)

    layout.encode(values, random=key)
    assert asked == [16]


def test_values_beyond_the_bound_are_clipped_and_counted():
    layout = Layout((Part("w", 7, FIXED, 2.0**-4), Part("sum", 7, REAL, 4.0)))
    wild = [math.inf, -math.inf, math.nan]
    values = {
        "w": np.float32([0.0625, -0.0625, 0.07, -3.0, *wild]),
        "sum": np.array([4.0, -4.0, 4.5, -1e300, *wild]),
    }
    result = layout.encode(values, 0.5)
    assert result.clipped == 10
    sums = layout.decode(result.words, 1)
    # Clipped first, the weight second.
    assert sums["w"].tolist() == [0.03125, -0.03125, 0.03125, -0.03125, 0, 0, 0]
    assert sums["sum"].tolist() == [4, -4, 4, -4, 0, 0, 0]
    assert np.isnan(values["w"][6])


def test_all_kinds_of_nan_count_as_zero():
    bits = np.array([0x7F800001, 0x7FC00000, 0xFFC00001, 0xFF800001] * 20, np.uint32)
    result = fixed(80).encode({"w": bits.view(np.float32)})
    assert result.clipped == 80
    assert not result.words[0].any()


def test_values_beyond_the_bound_are_counted_in_every_block():
    values = np.zeros(100_000, np.float32)
    values[[0, 40_000, 99_999]] = 1
    result = fixed(100_000).encode({"w": values})
    assert result.clipped == 3
    sums = fixed(100_000).decode(result.words, 1)["w"]
    assert np.flatnonzero(sums).tolist() == [0, 40_000, 99_999]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sum_at_the_bound_decodes_without_a_wrap(sign):
    sites = MOST_SITES
    # The bound and 8 sigma together come as near to the room as they may.
    sigma = (2**31 - 257) / 2**30 / 8 - 0.125
    layout = Layout((Part("w", 1000, FIXED, 1.0, sigma),))
    largest = np.full(1000, float(sign))
    small, _ = added(
        [layout.encode({"w": largest}, 1 / sites, seeded(site)) for site in range(sites)]
    )
    words = (small, np.zeros(0, np.uint64))
    assert layout.decode(words, sites)["w"].tolist() == [sign] * 1000
    # And noise of 8 standard deviations, with one step of each hospital.
    steps = sign * (math.floor(8 * sigma * 2**30) + sites)
    noised = small + np.array([steps]).astype(np.uint32)
    sums = layout.decode((noised, words[1]), sites)
    assert sums["w"] == pytest.approx(sign * (1 + 8 * sigma), abs=2**-20)
    assert layout.excess(sums, sites) is None


def test_the_extremes_of_thirds_stay_within_the_steps_of_rounding():
    layout = fixed(10_000)
    for value in (2.0**-4, -(2.0**-4)):
        words = added(
            [layout.encode({"w": np.full(10_000, value)}, 1 / 3, seeded(site)) for site in range(3)]
        )
        sums = layout.decode(words, 3)
        assert np.abs(sums["w"] - value).max() < 3 * 2.0**-34
        assert layout.excess(sums, 3) is None


# With a bound of 2^-4 a step is 2^-34, with 2^-8 it is 2^-38. The error of a sum of 20 has the
# standard deviation sqrt(20 / 6) steps. The largest of 2 million was 5.2e-10 and 3.5e-11; none can
# be above 20 steps, 1.2e-9 and 7.3e-11.
@pytest.mark.parametrize(("bound", "largest"), [(2.0**-4, 1.2e-9), (2.0**-8, 7.3e-11)])
def test_the_mean_change_of_twenty_hospitals_is_that_in_float64(bound, largest):
    sites = 20
    size = 200_000
    rng = np.random.default_rng(20)
    rows = rng.integers(50, 5000, sites)
    # Of 4e-3 there are some; 2^-8 is 3.9e-3.
    changes = rng.uniform(-min(4e-3, bound), min(4e-3, bound), (sites, size)).astype(np.float32)
    layout = fixed(size, bound)
    encodings = [
        layout.encode({"w": change}, count / rows.sum(), seeded(int(count)))
        for change, count in zip(changes, rows, strict=True)
    ]
    assert sum(each.clipped for each in encodings) == 0
    sums = layout.decode(added(encodings), sites)["w"]
    mean = np.average(changes.astype(np.float64), axis=0, weights=rows)
    difference = np.abs(sums - mean).max()
    assert 0 < difference < largest < 2e-8


@pytest.mark.parametrize("bound", [2.0**-40, 1.0, 2.0**40])
def test_real_numbers_are_exact_to_far_below_2_to_the_minus_60(bound):
    size = 300
    rng = np.random.default_rng(4)
    values = rng.uniform(-1, 1, size) * 2.0 ** rng.integers(-80, 1, size) * bound
    values[:4] = [bound, -bound, 0, math.nextafter(bound, 0)]
    words = Layout((Part("s", size, REAL, bound),)).encode({"s": values}).words[1]
    for row, value in enumerate(values.tolist()):
        error = abs(exact_real(words, size, row) * Fraction(bound) - Fraction(value))
        assert error <= Fraction(bound) / 2**103


def test_sums_of_real_numbers_of_256_hospitals_do_not_overflow():
    sites = MOST_SITES
    size = 300
    layout = Layout((Part("s", size, REAL, 1.0),))
    rng = np.random.default_rng(5)
    # The largest remainders of both signs, the bound itself, and sums that cancel.
    values = rng.uniform(-1, 1, (sites, size))
    values[:, 0] = 1
    values[:, 1] = -1
    values[:, 2] = math.nextafter(1, 0)
    values[:, 3] = 2.0**-51
    values[:, 4] = -(2.0**-51)
    values[: sites // 2, 5] = -values[sites // 2 :, 5]
    values[:, 6] = 2.0**-51 - 2.0**-102
    encodings = [layout.encode({"s": row}) for row in values]
    sums = layout.decode(added(encodings), sites)["s"]
    for column in range(size):
        # A fraction becomes the nearest float. All values are multiples of 2^-102.
        assert sums[column] == float(sum(Fraction(value) for value in values[:, column].tolist()))
    assert sums[:2].tolist() == [256, -256]
    assert sums[5] == 0


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint64, np.float32, np.float64, bool])
def test_counts_are_exact_in_every_type(dtype):
    layout = Layout((Part("rows", 3, COUNT),))
    words = layout.encode({"rows": np.array([0, 1, 1], dtype)}, 0.5).words
    assert layout.decode(added([layout.encode({"rows": np.array([0, 1, 1], dtype)})] * 3), 3)[
        "rows"
    ].tolist() == [0, 3, 3]
    assert words[1].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([-1], "from 0 to below 2^56"),
        ([2**56], "from 0 to below 2^56"),
        ([math.nan], "from 0 to below 2^56"),
        ([math.inf], "from 0 to below 2^56"),
        ([0.5], "got one with a fraction"),
        (["7"], "must be whole numbers, got <U1"),
        ([1j], "must be whole numbers, got complex128"),
        ([1, 2], "has 1 values, got 2"),
    ],
)
def test_what_is_no_count_is_refused(values, text):
    with pytest.raises(InputError, match="part 'rows'") as caught:
        Layout((Part("rows", 1, COUNT),)).encode({"rows": np.array(values)})
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("values", "weight", "text"),
    [
        ({"w": np.zeros(2)}, math.inf, "weight must be at least 0 and finite, got inf"),
        ({"w": np.zeros(2)}, -0.1, "weight must be at least 0 and finite, got -0.1"),
        ({"w": np.zeros(2)}, math.nan, "weight must be at least 0 and finite, got nan"),
        ({}, 1, "no values of part 'w'"),
        ({"w": np.zeros(2), "v": np.zeros(2)}, 1, "the layout has no part 'v'"),
        ({"w": np.zeros(3)}, 1, "part 'w' has 2 values, got 3"),
        ({"w": np.zeros(2, int)}, 1, "part 'w' must be float32 or float64, got int64"),
        ({"w": np.zeros(2, np.float16)}, 1, "part 'w' must be float32 or float64, got float16"),
        ({"w": np.zeros(2, ">f4")}, 1, "part 'w' must be float32 or float64, got >f4"),
    ],
)
def test_what_does_not_fit_the_layout_is_refused(values, weight, text):
    with pytest.raises(InputError) as caught:
        fixed(2).encode(values, weight)
    assert text in str(caught.value)


def test_upper_and_lower_words_that_cancel_lose_nothing():
    layout = Layout((Part("s", 1, REAL, 1.0),))
    words = np.array([128, 2**64 - 2**59 + 1], np.uint64)
    sums = layout.decode((np.zeros(0, np.uint32), words), 256)
    assert sums["s"].tolist() == [2.0**-102]


def test_sums_that_no_hospitals_can_have_are_refused():
    layout = Layout((Part("s", 1, REAL, 2.0), Part("rows", 1, COUNT)))
    small = np.zeros(0, np.uint32)
    most = 3 * (2**56 - 1)
    sound = np.array([3 << 50, 0, most], np.uint64)
    assert layout.decode((small, sound), 3)["s"].tolist() == [6.0]
    for upper, lower in [
        (3 << 50, 3 << 51),
        (-(3 << 50), -(3 << 51)),
        # Each of the two is impossible, whatever they are together.
        ((3 << 50) + 1, -(1 << 52)),
        (-(3 << 50) - 1, 1 << 52),
        (0, (3 << 51) + 1),
        (0, -(3 << 51) - 1),
        (-(1 << 63), 0),
        (0, -(1 << 63)),
    ]:
        wrong = np.array([upper % 2**64, lower % 2**64, most], np.uint64)
        with pytest.raises(SecureError, match="sum of part 's' is one that 3 hospitals"):
            layout.decode((small, wrong), 3)
    for word in (3 * (2**56 - 1) + 1, 2**63, 2**64 - 1):
        with pytest.raises(SecureError, match="sum of part 'rows' is one that 3 hospitals"):
            layout.decode((small, np.array([0, 0, word], np.uint64)), 3)


def test_a_count_that_int64_cannot_hold_is_refused():
    layout = Layout((Part("rows", 1, COUNT),))
    small = np.zeros(0, np.uint32)
    most = np.array([2**63 - 1], np.uint64)
    assert layout.decode((small, most), 256)["rows"].tolist() == [2**63 - 1]
    with pytest.raises(SecureError):
        layout.decode((small, most + np.uint64(1)), 256)


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (np.zeros(1, np.uint32), np.zeros(3, np.uint64)),
        (np.zeros(2, np.int32), np.zeros(3, np.uint64)),
        (np.zeros(2, np.uint32), np.zeros(2, np.uint64)),
        (np.zeros(2, np.uint32), np.zeros(3, np.int64)),
        (np.zeros((2, 1), np.uint32), np.zeros(3, np.uint64)),
    ],
)
def test_words_of_another_number_or_type_are_refused(small, large):
    layout = Layout((Part("w", 2, FIXED, 1.0), Part("rows", 1, COUNT), Part("s", 1, REAL, 1.0)))
    with pytest.raises(SecureError, match="a sum must be"):
        layout.decode((small, large), 3)


@pytest.mark.parametrize("sites", [0, -1, 257])
def test_a_number_of_hospitals_out_of_range_is_refused(sites):
    words = fixed(1).encode({"w": np.zeros(1)}).words
    with pytest.raises(InputError, match=f"1 to 256 hospitals, got {sites}"):
        fixed(1).decode(words, sites)


def test_excess_names_the_first_part_beyond_its_bound():
    layout = Layout(
        (
            Part("empty", 0, FIXED, 1.0),
            Part("a", 2, FIXED, 1.0),
            Part("rows", 1, COUNT),
            Part("b", 1, FIXED, 2.0**-4, sigma=2.0**-6),
        )
    )
    sums = {"empty": np.zeros(0), "a": np.array([1.0, -1.0]), "b": np.zeros(1)}
    assert layout.excess(sums, 3) is None
    step = 2.0**-30
    assert layout.excess({**sums, "a": np.array([0, 1 + 1e-6 + 3 * step])}, 3) is None
    for beyond in (1 + 1e-6 + 4 * step, math.inf, math.nan):
        assert layout.excess({**sums, "a": np.array([0, beyond])}, 3) == "a"
        assert layout.excess({**sums, "a": np.array([-beyond, 0])}, 3) == "a"
    # Of noise 8 standard deviations are within.
    assert layout.excess({**sums, "b": np.array([-0.1874])}, 3) is None
    assert layout.excess({**sums, "b": np.array([-0.1876])}, 3) == "b"
    both = {**sums, "a": np.array([2.0, 0]), "b": np.array([1.0])}
    assert layout.excess(both, 3) == "a"
    with pytest.raises(InputError, match="no values of part 'b'"):
        layout.excess({"empty": np.zeros(0), "a": np.zeros(2)}, 3)


def test_a_wrong_mask_of_a_fixed_part_shows_as_excess():
    layout = fixed(1000)
    words = layout.encode({"w": np.zeros(1000)}).words
    words[0][:] += np.random.default_rng(1).integers(0, 2**32, 1000, np.uint32)
    assert layout.excess(layout.decode(words, 3), 3) == "w"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("w", -1, FIXED, 1.0), "size of part 'w' must be from 0 to 2^31, got -1"),
        (("w", 2**31 + 1, FIXED, 1.0), "must be from 0 to 2^31, got 2147483649"),
        (("w", 1, "float", 1.0), "kind of part 'w' must be one of fixed, count, real, got 'float'"),
        (("w", 1, FIXED), "bound of part 'w' must be a power of two from 2^-40 to 2^40, got 0"),
        (("w", 1, FIXED, 3.0), "must be a power of two from 2^-40 to 2^40, got 3.0"),
        (("w", 1, REAL, -1.0), "must be a power of two from 2^-40 to 2^40, got -1.0"),
        (("w", 1, REAL, math.nan), "must be a power of two from 2^-40 to 2^40, got nan"),
        (("w", 1, REAL, math.inf), "must be a power of two from 2^-40 to 2^40, got inf"),
        (("w", 1, FIXED, 2.0**41), "must be a power of two from 2^-40 to 2^40, got 2199"),
        (("w", 1, FIXED, 2.0**-41), "must be a power of two from 2^-40 to 2^40, got 4.5"),
        (("w", 1, COUNT, 1.0), "a count has no bound, part 'w' has 1.0"),
        (("w", 1, FIXED, 1.0, -1.0), "sigma of part 'w', which is fixed, must be from 0 to 1.0"),
        (("w", 1, FIXED, 1.0, math.nan), "got nan"),
        (("w", 1, FIXED, 1.0, math.inf), "got inf"),
        (("w", 1, REAL, 1.0, 1.0), "sigma of part 'w', which is real, must be from 0 to 0, got 1"),
        (("w", 1, COUNT, 0.0, 1.0), "sigma of part 'w', which is count, must be from 0 to 0"),
        (("w" * 1001, 1, COUNT), "has at most 1000 letters, got 1001"),
    ],
)
def test_a_wrong_part_is_refused(arguments, text):
    with pytest.raises(InputError) as caught:
        Part(*arguments)
    assert text in str(caught.value)


def test_names_must_differ_and_sizes_are_bounded():
    with pytest.raises(InputError, match="two parts of a layout have the name 'a'"):
        Layout((Part("a", 1, COUNT), Part("a", 1, COUNT)))
    # Two ways to write one name, which have one digest.
    with pytest.raises(InputError, match="two parts"):
        Layout((Part("\u00e9", 1, COUNT), Part("e\u0301", 1, COUNT)))
    with pytest.raises(InputError, match="at most 2\\^31 values, got 2147483649"):
        Layout((Part("a", 2**31, COUNT), Part("b", 1, COUNT)))
    part = Part("a", 0, COUNT)
    with pytest.raises(InputError, match="at most 100000 parts, got 100001"):
        Layout((part,) * 100_001)


def test_content_comes_back_and_has_one_digest():
    layout = Layout(
        (
            Part("w", np.int64(2), FIXED, 1, np.float64(0.5)),
            Part("rows", 0, COUNT),
            Part("s", 3, REAL, 2.0**-40),
        )
    )
    content = layout.content()
    assert content == [
        ["w", 2, "fixed", 1.0, 0.5],
        ["rows", 0, "count", 0.0, 0.0],
        ["s", 3, "real", 2.0**-40, 0.0],
    ]
    other = Layout.of_content(decoded(encoded(content)))
    assert other == layout
    assert digest(other.content()) == digest(content)
    assert Layout.of_content([]) == Layout(())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "must be a list of parts, got NoneType"),
        ("abc", "must be a list of parts, got str"),
        ({"w": 1}, "must be a list of parts, got dict"),
        ([None], "must be a list of five values"),
        ([["w", 1, "fixed", 1.0]], "must be a list of five values"),
        ([["w", 1, "fixed", 1.0, 0.0, 0]], "must be a list of five values"),
        (["fixed"], "must be a list of five values"),
        ([[b"w", 1, "fixed", 1.0, 0.0]], "got bytes, int, str, float, float"),
        ([["w", True, "fixed", 1.0, 0.0]], "got str, bool, str, float, float"),
        ([["w", 1.0, "fixed", 1.0, 0.0]], "got str, float, str, float, float"),
        ([["w", 1, None, 1.0, 0.0]], "got str, int, NoneType, float, float"),
        ([["w", 1, "fixed", 1, 0.0]], "got str, int, str, int, float"),
        ([["w", 1, "fixed", 1.0, [0.0]]], "got str, int, str, float, list"),
        ([["w", -1, "fixed", 1.0, 0.0]], "must be from 0 to 2^31, got -1"),
        ([["w", 10**400, "fixed", 1.0, 0.0]], "must be from 0 to 2^31"),
        ([["w", 10**5000, "fixed", 1.0, 0.0]], "4300 digits"),
        ([["w", 1, "fixed", 1.5, 0.0]], "must be a power of two"),
        ([["w", 1, "fixed", 1.0, math.inf]], "sigma of part 'w'"),
        ([["w", 1, "other", 1.0, 0.0]], "must be one of fixed, count, real, got 'other'"),
        ([["w", 1, "count", 0.0, 0.0]] * 2, "two parts of a layout have the name 'w'"),
        ([["w", 2**31, "count", 0.0, 0.0], ["v", 1, "count", 0.0, 0.0]], "at most 2^31 values"),
        ([None] * 100_001, "at most 100000 parts, got 100001"),
    ],
)
def test_a_wrong_content_from_a_stranger_is_refused(content, text):
    with pytest.raises(SecureError) as caught:
        Layout.of_content(content)
    assert text in str(caught.value)


def test_values_of_any_shape_and_stride_are_read_and_left_alone():
    layout = fixed(6, bound=8.0)
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    kept = table.copy()
    words = layout.encode({"w": table[:, ::2]}, 0.5).words
    assert layout.decode(words, 1)["w"].tolist() == [0, 1, 2, 3, 4, 4]
    assert (table == kept).all()


def test_an_empty_layout_has_no_words():
    layout = Layout((Part("w", 0, FIXED, 1.0), Part("s", 0, REAL, 1.0), Part("n", 0, COUNT)))
    empty = np.zeros(0)
    result = layout.encode({"w": empty, "s": empty, "n": empty})
    assert result.clipped == 0
    assert [vector.size for vector in result.words] == [0, 0]
    assert {name: each.size for name, each in layout.decode(result.words, 3).items()} == {
        "w": 0,
        "s": 0,
        "n": 0,
    }


def test_a_part_is_found_in_the_vector_of_its_kind():
    layout = Layout(
        (
            Part("a", 3, FIXED, 1.0),
            Part("s", 2, REAL, 1.0),
            Part("b", 1, FIXED, 1.0),
            Part("rows", 1, COUNT),
        )
    )
    assert [layout.start(name) for name in ("a", "s", "b", "rows")] == [0, 0, 3, 4]
    with pytest.raises(InputError, match="the layout has no part 'c'"):
        layout.start("c")


def test_real_numbers_may_be_whole():
    layout = Layout((Part("s", 2, REAL, 64.0),))
    words = layout.encode({"s": np.array([35, -64])}).words
    assert layout.decode(words, 1)["s"].tolist() == [35, -64]


def test_noise_comes_after_clip_and_weight_and_is_not_clipped():
    layout = Layout((Part("w", 3, FIXED, 1.0, sigma=1.0), Part("b", 1, FIXED, 1.0)))
    values = {"w": np.float32([9.0, math.nan, -0.5]), "b": np.zeros(1)}
    noise = {"w": np.array([[2.0], [-3.0], [0.25]])}
    result = layout.encode(values, 0.5, noise=noise)
    assert result.clipped == 2
    assert layout.decode(result.words, 1)["w"].tolist() == [2.5, -3.0, 0.0]


def test_noised_values_are_rounded_once():
    size = 100_000
    part = Part("w", size, FIXED, 2.0**-4, sigma=2.0**-6)
    rng = np.random.default_rng(8)
    values = rng.uniform(-(2.0**-4), 2.0**-4, size)
    noise = rng.normal(0, part.sigma, size)
    layout = Layout((part,))
    words = layout.encode({"w": values}, 0.3, seeded(1), {"w": noise}).words[0].view(np.int32)
    errors = words - (values * 0.3 + noise) * part.scale
    assert np.abs(errors).max() < 1
    # Twice rounded, the variance would be 1/3.
    assert errors.var() == pytest.approx(1 / 6, abs=4 * math.sqrt(0.04 / size))


@pytest.mark.parametrize(
    ("noise", "text"),
    [
        ({"b": np.zeros(1)}, "noise for part 'b', which has no sigma"),
        ({"rows": np.zeros(1)}, "noise for part 'rows', which has no sigma"),
        ({"c": np.zeros(1)}, "the layout has no part 'c'"),
        ({"w": np.zeros(3)}, "part 'w' has 2 values, got 3"),
        ({"w": np.array([0, math.nan])}, "noise of part 'w' is not finite or far beyond"),
        ({"w": np.array([math.inf, 0])}, "noise of part 'w' is not finite or far beyond"),
        ({"w": np.array([0, -1e6])}, "noise of part 'w' is not finite or far beyond"),
    ],
)
def test_noise_that_does_not_fit_is_refused(noise, text):
    layout = Layout(
        (Part("w", 2, FIXED, 1.0, sigma=1.0), Part("b", 1, FIXED, 1.0), Part("rows", 1, COUNT))
    )
    values = {"w": np.zeros(2), "b": np.zeros(1), "rows": np.zeros(1)}
    with pytest.raises(InputError) as caught:
        layout.encode(values, noise=noise)
    assert text in str(caught.value)


def test_a_layout_of_other_sizes_is_refused_before_memory_is_taken(monkeypatch):
    layout = Layout((Part("w", 2, FIXED, 1.0), Part("s", 2**30, REAL, 1.0)))
    monkeypatch.setattr(np, "empty", None)
    with pytest.raises(InputError, match="part 's' has 1073741824 values, got 2"):
        layout.encode({"w": np.zeros(2), "s": np.zeros(2)})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_words_follow_from_the_key_over_all_blocks_and_parts(dtype):
    # Sizes about one block of 32,768, which the stream crosses without a gap.
    sizes = [1, 32_767, 32_768, 0, 32_769, 65_537]
    layout = Layout(tuple(Part(f"p{i}", n, FIXED, 2.0**-4) for i, n in enumerate(sizes)))
    rng = np.random.default_rng(11)
    values = {f"p{i}": rng.uniform(-0.0625, 0.0625, n).astype(dtype) for i, n in enumerate(sizes)}
    key = rng.bytes(16)
    words = layout.encode(values, 0.3, lambda length: key[:length]).words[0]
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    random = np.frombuffer(stream.update(bytes(2 * sum(sizes))), "<u2").astype(np.int64)
    every = np.concatenate([values[part.name].astype(np.float64) for part in layout.parts])
    fine = np.rint(every * 0.3 * 2.0**34 * 2**16).astype(np.int64)
    assert (words.view(np.int32) == (fine + random) // 2**16).all()


def random_layout(rng):
    parts = []
    for number in range(rng.integers(1, 12)):
        kind = [FIXED, COUNT, REAL][rng.integers(3)]
        bound = 0.0 if kind == COUNT else 2.0 ** int(rng.integers(-40, 41))
        sigma = bound * rng.uniform(0, 3) if kind == FIXED and rng.random() < 0.5 else 0.0
        size = 0 if rng.random() < 0.1 else int(rng.integers(1, 20))
        parts.append(Part(f"part {number}", size, kind, bound, sigma))
    return Layout(tuple(parts))


def random_values(layout, rng):
    values = {}
    for part in layout.parts:
        if part.kind == COUNT:
            values[part.name] = rng.integers(0, 2 ** int(rng.integers(1, 57)), part.size)
            continue
        # About one in five is beyond the bound.
        array = rng.normal(0, part.bound * 0.8, part.size)
        array[rng.random(part.size) < 0.03] = rng.choice([math.nan, math.inf, -math.inf])
        values[part.name] = array.astype(rng.choice(["float32", "float64"]))
    return values


def clipped_in_python(value, bound):
    if not math.isfinite(value):
        return 0.0, 1
    return min(max(value, -bound), bound), int(abs(value) > bound)


@pytest.mark.parametrize("seed", range(40))
def test_random_layouts_give_the_sums_of_fractions(seed):
    rng = np.random.default_rng([22, seed])
    layout = Layout.of_content(decoded(encoded(random_layout(rng).content())))
    sites = int(rng.integers(3, 13))
    weights = rng.dirichlet(np.ones(sites))
    everything = [random_values(layout, rng) for _ in range(sites)]
    encodings = [
        layout.encode(values, float(weight), seeded([seed, site]))
        for site, (values, weight) in enumerate(zip(everything, weights, strict=True))
    ]
    # Masks that cancel leave no trace.
    small, large = added(encodings)
    masks = [rng.integers(0, 2**32, small.size, np.uint32) for _ in range(2)]
    small = small + masks[0] - masks[1] + masks[1] - masks[0]
    sums = layout.decode((small, large), sites)
    assert layout.excess(sums, sites) is None
    wild = 0
    for part in layout.parts:
        for row in range(part.size):
            column = [values[part.name][row].item() for values in everything]
            total = sums[part.name][row].item()
            if part.kind == COUNT:
                assert total == sum(column)
                continue
            within = [clipped_in_python(value, part.bound) for value in column]
            wild += sum(outside for _, outside in within)
            if part.kind == REAL:
                exact = sum(Fraction(value) for value, _ in within)
                allowed = Fraction(math.ulp(float(exact))) + sites * Fraction(part.bound) / 2**103
                assert abs(Fraction(total) - exact) <= allowed
            else:
                terms = [value * float(w) for (value, _), w in zip(within, weights, strict=True)]
                exact = sum(Fraction(term) for term in terms)
                assert abs(Fraction(total) - exact) < sites / Fraction(part.scale)
                assert (Fraction(total) * Fraction(part.scale)).denominator == 1
    assert sum(each.clipped for each in encodings) == wild


def test_a_change_of_an_array_is_encoded_as_the_difference_in_float64():
    rng = np.random.default_rng(0)
    size = 200_001
    before = rng.normal(size=(size, 1)).astype(np.float32)
    after = before + rng.normal(scale=1e-3, size=(size, 1)).astype(np.float32)
    layout = Layout((Part("w", size, FIXED, 2.0**-7), Part("mean", size, REAL, 1.0)))
    eager = np.subtract(after, before, dtype=np.float64)
    whole = layout.encode({"w": eager, "mean": eager}, 0.3, seeded(7))
    change = ArrayChange(after, before)
    blocks = layout.encode({"w": change, "mean": change}, 0.3, seeded(7))
    assert blocks.clipped == whole.clipped
    for one, other in zip(blocks.words, whole.words, strict=True):
        assert np.array_equal(one, other)
    with pytest.raises(InputError, match="an array of 200001 values became one of 3"):
        ArrayChange(after[:3], before)
    with pytest.raises(InputError, match="part 'w' has 5 values, got 200001"):
        fixed(5).encode({"w": change})
