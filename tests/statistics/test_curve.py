"""Bounds of a curve are those of the worst and the best arrangement, and contain the truth."""

from itertools import combinations_with_replacement, product

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lifelines import KaplanMeierFitter
from lifelines.datasets import load_lung
from statistics_rows import ask, group, make_patients

from fedmed_flower.statistics.curve import pool_noised_survival, pool_survival

# Places inside a step at which somebody may be: two suffice for every order of a pair.
PLACES = (0.3, 0.6, 1.0)


def plain(people, time):
    """Return the Kaplan-Meier survival at a time of pairs (time, event)."""
    alive = 1.0
    for at in sorted({when for when, event in people if event and when <= time}):
        left = sum(when >= at for when, _ in people)
        alive *= 1 - sum(when == at and event for when, event in people) / left
    return alive


def arrangements(parts, horizon):
    """Yield everybody's times in all ways that the counts allow; no event is beyond the horizon."""
    ways = []
    for part in parts:
        start = 0
        for stop, *counts in zip(part["times"], part["events"], part["censored"], strict=True):
            places = [step + place for step in range(start, int(stop)) for place in PLACES]
            for count, event in zip(counts, (1, 0), strict=True):
                allowed = [place for place in places if place <= horizon or not event]
                chosen = combinations_with_replacement(allowed, count)
                ways.append([[(place, event) for place in each] for each in chosen])
            start = int(stop)
    for way in product(*ways):
        yield [one for some in way for one in some]


@st.composite
def hospitals(draw):
    """Draw the counts of two hospitals with four patients together, whose intervals differ."""
    parts = []
    for _ in range(2):
        times = sorted(draw(st.sets(st.sampled_from([1.0, 2.0, 3.0]), min_size=1)))
        none = [0] * len(times)
        parts.append({"times": times, "events": [*none], "censored": [*none]})
    for _ in range(4):
        part = draw(st.sampled_from(parts))
        counts = part[draw(st.sampled_from(["events", "censored"]))]
        counts[draw(st.integers(0, len(counts) - 1))] += 1
    return parts


@settings(max_examples=60, deadline=None)
@given(hospitals(), st.sampled_from([2.0, 3.0]))
def test_bounds_are_the_extremes_of_all_arrangements(parts, horizon):
    found = pool_survival(parts, horizon, 1.0)
    people = [*arrangements(parts, horizon)]
    # There is none if an event is in an interval that begins at the horizon.
    assume(people)
    for index, time in enumerate(found.times):
        reached = [plain(way, time) for way in people]
        assert found.survival_low[index] == pytest.approx(min(reached), abs=1e-12)
        assert found.survival_high[index] == pytest.approx(max(reached), abs=1e-12)
        after = [sum(when > time for when, _ in way) for way in people]
        bounds = found.at_risk_low[index], found.at_risk_high[index]
        assert bounds == (min(after), max(after))
        until = [sum(event for when, event in way if when <= time) for way in people]
        assert (found.events_low[index], found.events_high[index]) == (min(until), max(until))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(st.lists(st.sampled_from(range(1, 13)), max_size=5, unique=True), max_size=4),
)
def test_the_truth_lies_between(seed, cuts):
    """Any intervals, of which the last ends at 12; times that are not whole, and times that are."""
    rng = np.random.default_rng(seed)
    parts = []
    everybody = []
    for chosen in cuts:
        times = sorted({*map(float, chosen), 12.0})
        people = [
            (float(when), int(rng.random() < 0.5))
            for when in np.minimum(rng.exponential(5, 30).round(int(rng.integers(3))), 12)
        ]
        everybody += people
        stops = np.searchsorted(times, [when for when, _ in people])
        happened = np.array([event for _, event in people])
        parts.append({"times": times})
        for name, value in (("events", 1), ("censored", 0)):
            counts = np.bincount(stops[happened == value], minlength=len(times))
            parts[-1][name] = counts.tolist()
    found = pool_survival(parts, 12.0, 1.0)
    rounded = [(max(1.0, np.ceil(when)), event) for when, event in everybody]
    for time, estimate, low, high in zip(found.times, *found[-3:], strict=True):
        assert low - 1e-12 <= plain(everybody, time) <= high + 1e-12
        if estimate is not None:
            assert estimate == pytest.approx(plain(rounded, time))
            assert low <= estimate <= high


def test_by_hand():
    """Ten at risk: two die by 1, one is censored; of seven left seven die by 2."""
    parts = [
        {"times": [1.0, 2.0], "events": [2, 3], "censored": [1, 0]},
        {"times": [1.0, 2.0], "events": [0, 4], "censored": [0, 0]},
    ]
    found = pool_survival(parts, 12.0, 1.0)
    assert found.patients == 10
    assert found.at_risk_low == found.at_risk_high == [7, 0]
    assert found.events_low == found.events_high == [2, 9]
    assert found.survival == pytest.approx([0.8, 0.0])
    assert found.survival_high == pytest.approx([0.8, 0.0])
    # The one is censored before the two die.
    assert found.survival_low == pytest.approx([7 / 9, 0.0])


def test_an_interval_that_is_wider_than_those_of_others_by_hand():
    """The four of the second hospital die at 2 at the latest: by 0.5 none of them may have."""
    parts = [
        {"times": [0.5, 1.0, 2.0], "events": [0, 2, 3], "censored": [0, 1, 0]},
        {"times": [2.0], "events": [4], "censored": [0]},
    ]
    found = pool_survival(parts, 12.0, 0.5)
    assert found.survival == [None, None, None]
    assert found.at_risk_low == [6, 3, 0]
    assert found.at_risk_high == [10, 7, 0]
    assert found.events_low == [0, 2, 9]
    assert found.events_high == [4, 6, 9]
    assert found.survival_high == pytest.approx([1.0, 0.8, 0.0])
    assert found.survival_low == pytest.approx([0.6, 1 / 3, 0.0])


def test_the_estimate_ends_where_a_withheld_stretch_begins():
    parts = [
        {"times": [1.0, 2.0, 3.0, 5.0], "events": [10, 0, 10, 10], "censored": [0, 0, 10, 10]},
        # Nobody is in the stretch from 1 to 3: it hides nothing.
        {"times": [1.0, 3.0, 4.0, 5.0], "events": [10, 0, 10, 0], "censored": [0] * 4},
    ]
    found = pool_survival(parts, 12.0, 1.0)
    assert found.survival == [
        pytest.approx(5 / 7),
        *[pytest.approx(5 / 7)],
        pytest.approx(4 / 7),
        None,
        None,
    ]


def test_no_patients():
    assert pool_survival([], 12.0, 1.0).survival == []
    nobody = [{"times": [1.0], "events": [0], "censored": [0]}]
    assert pool_survival(nobody, 12.0, 1.0).survival_low == [1.0]


def test_noise_leaves_an_estimate_without_bounds():
    part = {"times": [1.0, 2.0], "events": [2.5, 3.0], "censored": [1.5, 1.0]}
    found = pool_noised_survival([part, part])
    assert found.survival == pytest.approx([1 - 5 / 16, (1 - 5 / 16) * (1 - 6 / 8)])
    assert found.survival_low == found.survival_high == [None, None]
    assert found.at_risk_low == [8.0, 0.0]


def test_who_is_followed_beyond_the_horizon_is_at_risk_until_then():
    """Seven are; one more is censored in the last interval, perhaps before the event in it."""
    parts = [{"times": [1.0, 2.0, 3.0], "events": [2, 1, 0], "censored": [0, 1, 7]}]
    found = pool_survival(parts, 2.0, 1.0)
    assert found.times == [1.0, 2.0]
    assert found.at_risk_low == found.at_risk_high == [9, 7]
    assert found.survival == pytest.approx([9 / 11, 9 / 11 * 8 / 9])
    assert found.survival_low == pytest.approx([9 / 11, 9 / 11 * 7 / 8])
    # Merged with the last interval, nobody knows how many of them there are.
    parts = [{"times": [1.0, 3.0], "events": [2, 1], "censored": [0, 8]}]
    found = pool_survival(parts, 2.0, 1.0)
    assert found.times == [1.0, 2.0]
    assert (found.at_risk_low[1], found.at_risk_high[1]) == (0, 8)
    assert found.survival == pytest.approx([9 / 11, 9 / 11 * 8 / 9])
    assert found.survival_low == pytest.approx([9 / 11, 0.0])


class TestHospitals:
    """Counts as hospitals report them, with a minimum of patients."""

    def pooled(self, tmp_path, tables, minimum, horizon, width):
        asked = ("time", "event", horizon, width)
        parts = [
            group(ask(rows, tmp_path / f"{number}", minimum, columns=("x",), survival=asked))
            for number, rows in enumerate(tables)
        ]
        curves = [part["survival"] for part in parts if "survival" in part]
        return pool_survival(curves, horizon, width)

    @pytest.mark.parametrize("minimum", [1, 10])
    def test_as_lifelines_where_it_is_known(self, tmp_path, minimum):
        tables = [make_patients(n, site, f"{site}-") for site, n in enumerate((120, 60, 250))]
        rows = [row for table in tables for row in table]
        frame = pd.DataFrame(rows)
        found = self.pooled(tmp_path, tables, minimum, 12.0, 0.5)
        late = frame.time > 12
        fitter = KaplanMeierFitter()
        rounded = np.ceil(frame.time.clip(upper=12) / 0.5) * 0.5
        expected = fitter.fit(rounded, frame.event.where(~late, 0)).predict(found.times)
        known = [value is not None for value in found.survival]
        assert all(known) == (minimum == 1)
        assert [v for v in found.survival if v is not None] == pytest.approx(
            expected.to_numpy()[known], abs=1e-12
        )
        truth = fitter.fit(frame.time, frame.event).predict(found.times).to_numpy()
        assert (np.array(found.survival_low) <= truth + 1e-12).all()
        assert (np.array(found.survival_high) >= truth - 1e-12).all()
        assert found.patients == len(frame)
        if minimum == 1:
            # Those beyond the horizon are known not to have left before it.
            assert found.at_risk_low[-1] == late.sum() > 10
            assert found.survival_low[-1] > 0.8 * found.survival_high[-1]

    def test_a_horizon_between_two_steps_ends_the_curve(self, tmp_path):
        tables = [make_patients(200, 0, "a")]
        frame = pd.DataFrame(tables[0])
        found = self.pooled(tmp_path, tables, 1, 5.0, 2.0)
        assert found.times == [2.0, 4.0, 5.0]
        assert found.at_risk_low[-1] == (frame.time > 5).sum()
        late = frame.time > 5
        rounded = np.minimum(np.ceil(frame.time / 2) * 2, 5).where(~late, 6)
        fitter = KaplanMeierFitter().fit(rounded, frame.event.where(~late, 0))
        assert found.survival == pytest.approx(fitter.predict(found.times).to_numpy(), abs=1e-12)

    def test_lung(self, tmp_path):
        """R's lung data at four hospitals of 57: what was printed as .638 is .434."""
        frame = load_lung().sample(frac=1, random_state=0)
        tables = [
            [
                {"patient": n, "x": n, "time": float(row.time), "event": int(row.status)}
                for n, row in enumerate(frame.iloc[start : start + 57].itertuples())
            ]
            for start in range(0, 228, 57)
        ]
        found = self.pooled(tmp_path, tables, 5, 1080.0, 90.0)
        truth = KaplanMeierFitter().fit(frame.time, frame.status).predict(found.times).to_numpy()
        assert found.patients == 228
        at = found.times.index(360.0)
        assert truth[at] == pytest.approx(0.434, abs=5e-4)
        assert found.survival[at] is None
        bounds = found.survival_low[at], found.survival_high[at]
        assert bounds == pytest.approx((0.114, 0.653), abs=5e-4)
        assert (found.survival_low <= truth).all()
        assert (truth <= found.survival_high).all()
