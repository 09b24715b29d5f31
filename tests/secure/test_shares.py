"""How much noise each hospital adds, and what is left when some shares are subtracted."""

import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from scipy import stats
from tiny import says_of_setting

from fedmed_flower.clients.shares import HospitalShare
from fedmed_flower.errors import InputError
from fedmed_flower.privacy.accounting import Release, epsilon_of, noise_for
from fedmed_flower.secure.encoding import SecureError
from fedmed_flower.secure.identity import Identity
from fedmed_flower.secure.parts import CLIPPED, ONES
from fedmed_flower.secure.ring import COUNT, FIXED, REAL, Layout, Part
from fedmed_flower.secure.shares import HospitalNoise, PatientNoise, Shares
from fedmed_flower.secure.study import Study
from fedmed_flower.settings.privacy import PrivacySettings
from fedmed_flower.settings.training import Settings

# One test in a million fails by chance.
CHANCE = 1e-6
STEP = {"local_steps": 1, "optimizer": "sgd", "learning_rate": 0.5, "batch_size": 8}
PATIENTS = {"privacy": "patient", "sampling_rate": 0.25, "num_server_rounds": 320}


def study_of(hospitals, colluders):
    names = [f"h{number}" for number in range(hospitals)]
    members = {name: Identity.simulated(name, "run").public for name in names}
    return Study.of("study", members, colluders=colluders)


def shares_in(hospitals, colluders, noise=1.0, sensitivity=1.0):
    study = study_of(hospitals, colluders)
    return Shares(noise, sensitivity, hospitals, study.needed, study.colluders)


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha")
@pytest.mark.parametrize(
    ("hospitals", "colluders", "counted", "wanted"),
    [(3, 0, 2, 5.2), (5, 1, 3, 4.1), (10, 1, 5, 3.0), (20, 2, 10, 2.0)],
)
def test_the_noise_that_alone_gives_epsilon_8_gives_less_in_a_sum(
    hospitals, colluders, counted, wanted
):
    alone = noise_for(8.0, 1e-5, 0.25, 320)
    shares = shares_in(hospitals, colluders)
    assert shares.counted == counted
    # Each hospital adds all the noise that it would add alone.
    left = alone / shares.share
    epsilon = epsilon_of({Release(0.25, left): 320}, 1e-5)
    assert epsilon == pytest.approx(wanted, abs=0.07)
    accountant = PRVAccountant()
    accountant.history = [(alone * math.sqrt(counted), 0.25, 320)]
    assert epsilon == pytest.approx(accountant.get_epsilon(1e-5, eps_error=0.01), rel=0.01)


@given(
    st.integers(3, 60), st.integers(0, 6), st.floats(0.01, 1e3), st.floats(1e-9, 1e3)
)  # fmt: skip
def test_shares_that_nobody_can_subtract_make_the_noise_that_is_charged(
    hospitals, colluders, noise, sensitivity
):
    if max((hospitals + colluders) // 2 + 1, 3 + colluders) > hospitals:
        return
    shares = shares_in(hospitals, colluders, noise, sensitivity)
    # The smallest sum that opens, less those of the hospitals that work with the server, or of one.
    left = shares.needed - max(colluders, 1)
    assert left >= 2
    assert math.sqrt(left) * shares.share == pytest.approx(noise * sensitivity)
    assert shares.total**2 == pytest.approx(hospitals * shares.share**2)


def test_two_hospitals_of_three_that_both_work_with_the_server_leave_no_share():
    with pytest.raises(SecureError, match="of 2 shares of noise 2 can be subtracted, and none is"):
        Shares(1.0, 1.0, 3, 2, 2)


def layout_for(shares, sizes, exponent=-4):
    parts = [
        Part(f"model/{key}", size, FIXED, 2.0**exponent, shares.total)
        for key, size in sizes.items()
    ]
    return Layout((*parts, ONES))


SIZES = {"a": 30_000, "b": 20_000}


def words_of(shares, layout, change=0.0):
    """Return what a hospital adds whose every weight has changed by the same."""
    before = ArrayRecord({key: Array(np.zeros(size, np.float32)) for key, size in SIZES.items()})
    after = ArrayRecord(
        {key: Array(np.full(size, change, np.float32)) for key, size in SIZES.items()}
    )
    share = HospitalShare(shares, HospitalNoise(shares.noise_multiplier, 1e-3), None, {})
    return share.words(layout, before, after)


@pytest.mark.parametrize(("hospitals", "colluders"), [(3, 0), (5, 1), (10, 3)])
def test_the_noise_of_a_sum_is_what_is_claimed_also_when_colluders_subtract_theirs(
    hospitals, colluders
):
    shares = shares_in(hospitals, colluders, noise=2.0, sensitivity=1e-3)
    layout = layout_for(shares, SIZES)
    added = [words_of(shares, layout)[0] for _ in range(hospitals)]

    def noise_of(parts):
        total = sum(parts, np.zeros(50_000, np.uint32)).view(np.int32)
        return total / layout.parts[0].scale

    # All that may be subtracted is, of the smallest sum that opens.
    left = noise_of(added[: shares.needed]) - noise_of(added[: max(colluders, 1)])
    for noise, std in ((noise_of(added), shares.total), (left, 2.0 * 1e-3)):
        low, high = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], noise.size)
        assert low < ((noise / std) ** 2).sum() < high
        assert stats.kstest(noise / std, "norm").pvalue > CHANCE
    correlation = np.corrcoef([part.view(np.int32) for part in added]) - np.eye(hospitals)
    assert abs(correlation).max() < 5.5 / math.sqrt(50_000)


def test_what_is_added_is_noised_before_it_is_rounded_and_never_cut_afterwards():
    shares = shares_in(5, 1, noise=1e3, sensitivity=1.0)
    # Noise of a thousand, and a bound of a thousandth.
    layout = layout_for(shares, SIZES, exponent=-10)
    noise = words_of(shares, layout)[0].view(np.int32) / layout.parts[0].scale
    assert np.abs(noise).max() > 3 * shares.share
    assert noise.std() == pytest.approx(shares.share, rel=0.03)
    # The same words again, or without fractions of a share, would show what was added.
    assert len(np.unique(noise)) > 49_000


def test_each_hospital_adds_a_one_and_the_mean_of_what_it_changed():
    shares = shares_in(5, 1, noise=1e-2, sensitivity=1e-7)
    layout = layout_for(shares, SIZES, exponent=-20)
    small, large = words_of(shares, layout, change=1e-8)
    assert large.tolist() == [1]
    change = small.view(np.int32) / layout.parts[0].scale
    assert change.mean() == pytest.approx(1e-8 / 5, abs=6 * shares.share / math.sqrt(50_000))
    assert shares.share < 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1e-30, 1e-3, 1.0, 1e30, np.inf, np.nan]))
def test_a_hospital_changes_the_sum_without_noise_by_at_most_the_sensitivity(seed, size):
    rng = np.random.default_rng(seed)
    old = {key: rng.normal(size=number).astype(np.float32) for key, number in (("a", 7), ("b", 90))}
    norm = 10 ** rng.uniform(-6, 6)
    with np.errstate(over="ignore", invalid="ignore"):
        moved = {key: values + size * rng.normal(size=values.size) for key, values in old.items()}
        new = {key: values.astype(np.float32) for key, values in moved.items()}
    if rng.random() < 0.3:
        new["a"][:3] = [np.nan, np.inf, -np.inf]
    shares = Shares(1.0, HospitalNoise(1.0, norm).sensitivity(1, 4), 4, 4, 1)
    share = HospitalShare(shares, HospitalNoise(1.0, norm), None, {})
    records = [ArrayRecord({k: Array(v) for k, v in model.items()}) for model in (old, new)]
    changes = share.changes(*records)
    # What the ring makes of it before noise: cut to the bound, and weighted.
    cut = np.clip(np.concatenate(list(changes.values())), -(2.0**-4), 2.0**-4)
    assert np.linalg.norm(np.concatenate(list(changes.values()))) <= norm
    assert np.linalg.norm(cut) / 4 <= shares.sensitivity
    if size == 1.0 and norm < 1 and np.isfinite(new["a"]).all():
        length = np.linalg.norm(np.concatenate(list(changes.values())))
        assert length == pytest.approx(norm, rel=1e-6)


def test_a_share_must_be_much_wider_than_the_steps_of_the_ring():
    shares = shares_in(5, 1, noise=1.0, sensitivity=1e-9)
    (part, _) = layout_for(shares, {"w": 1}).parts
    with pytest.raises(SecureError) as error:
        shares.require_room(part)
    assert str(error.value) == (
        "a hospital's share of the noise must be from 100 to below 2^40 steps of the ring, got "
        "9.92 for model/w: lower secure-exponent, which bounds changes at 0.0625 and so makes the "
        "steps as wide"
    )
    (part, _) = layout_for(shares, {"w": 1}, exponent=-12).parts
    shares.require_room(part)


def test_the_layout_must_leave_the_room_that_the_shares_need():
    shares = shares_in(5, 1)
    for sigma in (0.0, shares.total / 2, shares.total * 2):
        with pytest.raises(SecureError, match=r"and the shares of 5 hospitals make 1\.29099$"):
            shares.require_room(Part("model/w", 1, FIXED, 0.5, sigma))


@pytest.mark.parametrize(
    "part",
    [
        CLIPPED,
        Part("tail/loss", 1, REAL, 8.0),
        Part("rows", 1, COUNT),
        Part("model/buffer", 1, REAL, 8.0),
        Part("model/w", 3, FIXED, 0.5, 1.0),
        Part("model/other", 2, FIXED, 0.5, 1.0),
        Part("w", 2, FIXED, 0.5, 1.0),
    ],
)
def test_nothing_is_summed_beside_noise(part):
    shares = shares_in(5, 1)
    sizes = {"w": 2, "buffer": 1}
    shares.require_layout(layout_for(shares, {"w": 2}), sizes)
    with pytest.raises(SecureError) as error:
        shares.require_layout(Layout((part, ONES)), sizes)
    assert str(error.value) == (
        f"beside noise nothing may be summed but changes of the model, got {part.name}"
    )


def test_a_patient_changes_a_step_by_the_declared_rate_norm_batch_and_hospitals():
    step = Settings(**STEP, schedule="cosine", num_server_rounds=4)
    noise = PatientNoise(step, PrivacySettings(**PATIENTS, max_grad_norm=3.0), 1.0)
    assert noise.sensitivity(1, 5) == pytest.approx(0.5 * 3.0 / 8 / 5)
    assert noise.sensitivity(3, 5) == pytest.approx(0.25 * 3.0 / 8 / 5)
    assert noise.weighting == {"noise": 1.0}


def test_the_planned_noise_keeps_all_rounds_to_the_target():
    privacy = PrivacySettings(**PATIENTS, target_epsilon=3.0)
    noise = PatientNoise.planned(Settings(**STEP), privacy)
    assert 2.99 < noise.spent(320)["patient-epsilon"] <= 3.0
    assert noise.spent(1)["patient-epsilon"] < 1.5


SHARES = '(secure="sum", privacy="patient", local-steps=1)'
MORE = (
    "the sum is of clipped gradients alone; let a strategy such as FedAdam or FedAvgM make more of "
    "it, or take several local-steps, in which each hospital adds noise of its own"
)


@pytest.mark.parametrize(
    ("step", "patients", "text"),
    [
        ({"optimizer": "adam"}, {},
         f"optimizer must be sgd with shares of noise {SHARES}, got adam: {MORE}"),
        ({"momentum": 0.9}, {},
         f"momentum must be 0.0 with shares of noise {SHARES}, got 0.9: {MORE}"),
        ({"weight_decay": 0.1}, {},
         f"weight-decay must be 0.0 with shares of noise {SHARES}, got 0.1: {MORE}"),
        ({"local_steps": 3}, {},
         'local-steps must be 1 and privacy "patient" for shares of noise, got 3 and "patient": '
         "with several steps a round each hospital adds noise of its own"),
        ({}, {"privacy": "none"},
         'local-steps must be 1 and privacy "patient" for shares of noise, got 1 and "none": '
         "with several steps a round each hospital adds noise of its own"),
        ({}, {"sampling_rate": 0.0},
         f"sampling-rate must be above 0 with shares of noise {SHARES}, got 0: all hospitals draw "
         "patients with one probability; batch-size is then the mean number of patients that a "
         "hospital draws"),
    ],
)  # fmt: skip
def test_what_hospitals_could_not_declare_alike_is_refused(step, patients, text):
    given = Settings(**STEP | step), PrivacySettings(**PATIENTS | patients)
    with pytest.raises(InputError, match=says_of_setting(text)):
        PatientNoise.planned(*given)
    with pytest.raises(InputError, match=says_of_setting(text)):
        PatientNoise(*given, 1.0)


@pytest.mark.parametrize("noise", [0.0, -1.0, math.nan, 1, "1", None])
def test_a_noise_multiplier_that_is_no_number_above_0_is_refused(noise):
    with pytest.raises(SecureError, match="the noise multiplier must be a number above 0, got"):
        HospitalNoise(noise, 1.0)
    with pytest.raises(SecureError, match="the noise multiplier must be a number above 0, got"):
        PatientNoise(Settings(**STEP), PrivacySettings(**PATIENTS), noise)


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf, math.nan])
def test_a_norm_that_bounds_nothing_is_refused(norm):
    with pytest.raises(SecureError, match="norm must be above 0 and finite"):
        HospitalNoise(1.0, norm)
