"""Where each method ends on problems whose solution is known."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from squares import (
    Squares,
    own_weights,
    points,
    pooled_optimum,
    run_squares,
    weights_of,
)
from torch import nn

from fedmed_flower.methods.base import ServerRound
from fedmed_flower.methods.fednova import STEPS, FedNova
from fedmed_flower.strategies import FedAvg, FedMedian, WeightedFedAvg
from fedmed_flower.strategies.methods import MethodState

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


@pytest.mark.slow
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


class Changing(FedAvg):
    """A site counts three times as much as the other, until it does not any more."""

    def weigh(self, site, reply):
        return 3.0 if site == "hospital-1" and self.run.server_round < 20 else 1.0


@pytest.mark.parametrize("method", ["scaffold", "feddyn"])
def test_a_weight_that_changes_does_not_move_the_end(method, tmp_path):
    result = run_squares(
        tmp_path / "run", strategy=Changing(), num_server_rounds=100, **OPTIONS[method]
    )
    scales = [
        np.sqrt(factor / len(y)) for factor, (_, y) in zip((3, 1), Squares.sites, strict=True)
    ]
    squares = [(x * s, y * s) for s, (x, y) in zip(scales, Squares.sites, strict=True)]
    assert np.abs(weights_of(result) - pooled_optimum(squares)).max() < 1e-3


class Unused(Squares):
    """A second head, which the first site does not use."""

    def build_model(self):
        return nn.ModuleDict({"a": nn.Linear(2, 1, bias=False), "b": nn.Linear(2, 1, bias=False)})

    def loss_of(self, model, batch):
        heads = ("a", "b") if self.site.index else ("a",)
        return sum(super(Unused, self).loss_of(model[head], batch) for head in heads)


def test_a_parameter_that_a_site_does_not_use_has_gradient_zero_there(tmp_path):
    result = run_squares(tmp_path / "run", Unused, num_server_rounds=80, method="scaffold")
    for head, sites in (("a", Squares.sites), ("b", Squares.sites[1:])):
        weights = result.arrays[f"{head}.weight"].numpy().ravel()
        assert np.abs(weights - pooled_optimum(sites)).max() < 1e-3, head


class Lying(points([4.0], [4.0], [4.0], [4.0], [4.0])):
    """The last site says that it has done a million steps."""

    def fit(self, model, prepared, seed):
        metrics = super().fit(model, prepared, seed)
        if self.site.index == 4:
            self.method._steps *= 1_000_000
        return metrics


def test_a_false_number_of_steps_is_bounded_as_the_change_is(tmp_path):
    strategy = FedAvg(max_update_norm=3.0)
    result = run_squares(tmp_path / "run", Lying, strategy, num_server_rounds=3, method="fednova")
    assert {failure.site for failure in strategy.history.failures} == {"hospital-5"}
    assert abs(weights_of(result)[0] - 4) < 1


def test_a_negative_number_of_steps_does_not_turn_the_step_around():
    sent = ArrayRecord({"w": Array(np.zeros(1))})
    model = ArrayRecord({"w": Array(np.ones(1))})
    steps = {STEPS: ArrayRecord({STEPS: Array(np.array([-5.0]))})}
    moved = FedNova().move(ServerRound(sent, model, ("w",), {}, steps, {}))
    assert moved.model["w"].numpy().tolist() == [1.0]


def test_a_weight_in_the_mean_of_controls_is_cut_as_in_the_mean_of_models():
    state = MethodState().after({}, {"a": 10.0, "b": 10.0, "liar": 1e9}, {})
    retained, share = state.shares({"a": 10.0, "b": 10.0}, 0.4)
    assert retained == 1.0
    assert share == pytest.approx(0.6)
    assert state.shares({"a": 10.0, "b": 10.0})[1] < 1e-7


def test_a_limit_of_lengths_leaves_no_honest_site_out_at_the_end(tmp_path):
    """Where a run has ended, changes are of the size of rounding errors, and of no length."""
    six = type("Six", (Squares,), {"sites": [*Squares.sites] * 3})
    strategy = FedAvg(method="scaffold", max_update_norm=3.0)
    run_squares(tmp_path / "run", six, strategy, num_server_rounds=60)
    controls = [each for each in strategy.history.failures if "method-control" in each.reason]
    assert controls == []
    lengths = strategy.run.method.lengths
    assert lengths.keys() == {"method-control"}
    assert lengths["method-control"] > 0.01
