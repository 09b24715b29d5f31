"""Where each method ends on problems whose solution is known."""

from dataclasses import replace

import numpy as np
import pytest
from squares import (
    Squares,
    own_weights,
    points,
    pooled_optimum,
    run_squares,
    weights_of,
)

from fedmed_flower.strategies import FedAvg, FedMedian, WeightedFedAvg

OPTIONS = {"scaffold": {"method": "scaffold"}, "feddyn": {"method": "feddyn", "dyn_alpha": 0.5}}
OPTIMUM = pooled_optimum(Squares.sites)


def distance(result):
    return np.abs(weights_of(result) - OPTIMUM).max()


def test_fedavg_ends_elsewhere_than_pooled_training(tmp_path):
    assert distance(run_squares(tmp_path / "run", num_server_rounds=60)) > 0.1


@pytest.mark.parametrize("method", ["scaffold", "feddyn"])
def test_the_pooled_optimum_is_reached_at_unequal_sites(method, tmp_path):
    result = run_squares(tmp_path / "run", num_server_rounds=80, **OPTIONS[method])
    assert distance(result) < 2e-4


@pytest.mark.parametrize("method", ["scaffold", "feddyn"])
def test_uniform_weights_lead_to_the_optimum_of_uniform_weights(method, tmp_path):
    strategy = WeightedFedAvg(weights="uniform")
    result = run_squares(
        tmp_path / "run", strategy=strategy, num_server_rounds=80, **OPTIONS[method]
    )
    squares = [(x.astype(float) / np.sqrt(len(x)), y / np.sqrt(len(y))) for x, y in Squares.sites]
    assert np.abs(weights_of(result) - pooled_optimum(squares)).max() < 2e-4


def test_scaffold_reaches_it_although_one_site_trains_in_a_round(tmp_path):
    strategy = FedAvg(fraction_train=0.5, method="scaffold")
    result = run_squares(tmp_path / "run", strategy=strategy, num_server_rounds=400, local_epochs=4)
    assert distance(result) < 0.02


def fixed_point(values, epochs, rate, normalised):
    """Return where rounds of unequal numbers of steps end, for losses of curvature 1."""
    means = np.array([np.mean(each) for each in values])
    shares = np.array([len(each) for each in values], float)
    pulls = np.array([1 - (1 - rate) ** count for count in epochs])
    if normalised:
        pulls /= epochs
    return (shares * pulls * means).sum() / (shares * pulls).sum()


@pytest.mark.parametrize("method", ["", "fednova"])
def test_uneven_steps_move_fedavg_and_not_fednova(method, tmp_path):
    values = ([0.0, 2.0], [8.0, 9.0, 10.0])
    steps = (2, 12)

    class Uneven(points(*values)):
        def fit(self, model, prepared, seed):
            self.settings = replace(self.settings, local_epochs=steps[self.site.index])
            return super().fit(model, prepared, seed)

    result = run_squares(tmp_path / "run", Uneven, num_server_rounds=60, method=method)
    wanted = fixed_point(values, steps, 0.1, normalised=bool(method))
    assert weights_of(result) == pytest.approx([wanted], abs=1e-4)


def test_the_number_of_steps_is_what_the_rule_makes_of_it(tmp_path):
    strategy = FedMedian(method="fednova")
    result = run_squares(tmp_path / "run", strategy=strategy, num_server_rounds=1, local_epochs=3)
    plain = run_squares(
        tmp_path / "plain", strategy=FedMedian(), num_server_rounds=1, local_epochs=3
    )
    assert weights_of(result) == pytest.approx(weights_of(plain), rel=1e-5)


def test_ditto_ends_in_its_closed_form_for_a_mean(tmp_path):
    values = ([0.0, 2.0], [8.0, 9.0, 10.0])
    folder = tmp_path / "run"
    result = run_squares(
        folder, points(*values), num_server_rounds=60, method="ditto", ditto_lambda=0.5
    )
    (together,) = weights_of(result)
    assert together == pytest.approx((0 + 2 + 8 + 9 + 10) / 5, abs=1e-4)
    for number, each in enumerate(values, start=1):
        wanted = (np.mean(each) + 0.5 * together) / 1.5
        assert own_weights(folder, f"hospital-{number}") == pytest.approx([wanted], abs=1e-4)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_apfl_at_its_limits_is_the_site_s_model_or_training_alone(share, tmp_path):
    values = ([0.0, 2.0], [8.0, 9.0, 10.0])
    folder = tmp_path / "run"
    settings = {"apfl_alpha": share, "apfl_adaptive": False}
    result = run_squares(folder, points(*values), num_server_rounds=40, method="apfl", **settings)
    for number, each in enumerate(values, start=1):
        (own,) = own_weights(folder, f"hospital-{number}")
        if share:
            assert own == pytest.approx(np.mean(each), abs=1e-4)
        else:
            # Eight steps of the site from the global model before the last round, which is as now.
            (together,) = weights_of(result)
            wanted = np.mean(each) + (together - np.mean(each)) * 0.9**8
            assert own == pytest.approx(wanted, abs=1e-4)


def test_apfl_learns_the_share_that_a_site_gains_from(tmp_path):
    # The first site's own mean is far from that of all: its own part must win.
    values = ([-20.0, -21.0], [8.0, 9.0, 10.0, 9.0, 8.0, 10.0])
    folder = tmp_path / "run"
    run_squares(folder, points(*values), num_server_rounds=20, method="apfl", learning_rate=0.02)
    (own,) = own_weights(folder, "hospital-1")
    assert own == pytest.approx(-20.5, abs=2.0)


def test_cyclic_transfer_trains_one_site_after_the_other(tmp_path):
    values = ([0.0], [8.0])
    folder = tmp_path / "run"
    strategy = FedAvg()
    run_squares(folder, points(*values), strategy=strategy, num_server_rounds=3, method="cyclic")
    trained = [row[2] for row in strategy.history.rows if row[1] == "train" and row[3] == "loss"]
    assert [site for site in trained if site != "all"] == ["hospital-1", "hospital-2", "hospital-1"]
