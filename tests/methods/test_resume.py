"""A run that is killed in the middle and goes on ends with the bits of one that was not."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from squares import Squares, dying, own_weights, pooled_optimum, run_squares, weights_of
from tiny import context_of
from torch import nn

from fedmed_flower.clients.state import SiteState
from fedmed_flower.data.site import Site
from fedmed_flower.errors import InputError
from fedmed_flower.strategies import FedAvg


class Deep(Squares):
    """Two layers, so that one can be kept."""

    def build_model(self):
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


METHODS = {
    "scaffold": {"method": "scaffold"},
    "feddyn": {"method": "feddyn", "dyn_alpha": 0.5},
    "fednova": {"method": "fednova"},
    "cyclic": {"method": "cyclic"},
    "ditto": {"method": "ditto"},
    "apfl": {"method": "apfl"},
    "moon": {"method": "moon"},
    "norm": {"keep": "norm"},
    "head": {"keep": "2.*", "keep_sent": False},
    "fedrep": {"keep": "2.*", "method": "fedrep"},
    "ditto and norm": {"keep": "norm", "method": "ditto"},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_run_that_goes_on_has_the_bits_of_an_unbroken_one(name, tmp_path):
    settings = METHODS[name] | {"num_server_rounds": 6, "local_epochs": 2}
    settings["learning_rate"] = 0.02
    whole = run_squares(tmp_path / "whole", Deep, **settings)
    client = dying(Deep, 1, 4)
    with pytest.raises(KeyboardInterrupt):
        run_squares(tmp_path / "broken", client, **settings)
    # The first site has trained in the round that is repeated, and kept what it made of it.
    resumed = run_squares(tmp_path / "broken", client, resume=True, **settings)
    for key, array in whole.arrays.items():
        assert array.data == resumed.arrays[key].data, key
    for path in sorted((tmp_path / "whole" / "own").glob("*")):
        assert path.read_bytes() == (tmp_path / "broken" / "own" / path.name).read_bytes()


def test_two_generations_stay_and_a_lost_state_starts_anew(tmp_path, caplog):
    folder = tmp_path / "run"
    settings = {"method": "ditto", "local_epochs": 2}
    run_squares(folder, num_server_rounds=3, **settings)
    state = folder / "state" / "rounds" / "hospital-1"
    assert sorted(path.name for path in state.iterdir()) == ["2.safetensors", "3.safetensors"]
    shutil.rmtree(state)
    run_squares(folder, num_server_rounds=4, resume=True, **settings)
    assert "hospital-1: the state after 3 rounds is not here: it starts anew" in caplog.text
    assert sorted(path.name for path in state.iterdir()) == ["4.safetensors"]


@pytest.mark.parametrize("method", ["scaffold", "feddyn"])
def test_a_site_whose_part_the_server_counts_on_does_not_start_anew(method, tmp_path):
    folder = tmp_path / "run"
    run_squares(folder, num_server_rounds=2, method=method)
    shutil.rmtree(folder / "state" / "rounds" / "hospital-1")
    strategy = FedAvg()
    run_squares(folder, strategy=strategy, num_server_rounds=3, resume=True, method=method)
    (failure,) = strategy.history.failures
    assert failure.site == "hospital-1"
    assert failure.reason.startswith("the state after 2 rounds is not in ")
    assert "hospital-1, and the run would end at a wrong model without it" in failure.reason


@pytest.mark.parametrize("method", ["fedprox", "fednova", "cyclic"])
def test_a_method_that_keeps_nothing_misses_nothing(method, tmp_path, caplog):
    run_squares(tmp_path / "run", num_server_rounds=3, method=method)
    assert "anew" not in caplog.text


def test_a_run_goes_on_without_a_run_folder_in_flowers_own_state():
    context = context_of()
    site = Site("north", simulated=True)
    for taken in range(3):
        state = SiteState(context, site, "run", {"replies-taken": taken})
        before = state.part("method")
        assert before == ({"v": torch.tensor(taken - 1)} if taken else {})
        state.save({"method": {"v": torch.tensor(taken)}})
    assert len(context.state.array_records) == 2


def state_of(folder, taken, run="run"):
    site = Site("north", data_dir=folder)
    config = ConfigRecord({"replies-taken": taken})
    node = {"site-name": "north", "data-dir": str(folder)}
    return SiteState(context_of(node_config=node), site, run, config)


def test_a_round_that_is_repeated_goes_on_from_the_state_before_it(tmp_path):
    for taken, value in enumerate([1.0, 2.0, 3.0]):
        state_of(tmp_path, taken).save({"method": {"v": torch.tensor(value)}})
    # The server has lost two rounds: the third state is of a round that did not count.
    assert state_of(tmp_path, 2).part("method") == {"v": torch.tensor(2.0)}
    state_of(tmp_path, 2).save({"method": {"v": torch.tensor(5.0)}})
    assert state_of(tmp_path, 3).part("method") == {"v": torch.tensor(5.0)}
    assert state_of(tmp_path, 1).part("method") == {}


def test_each_run_and_each_comparison_has_a_state_of_its_own(tmp_path):
    for run in ("a", "b", "a/local-1"):
        state_of(tmp_path, 0, run).save({"method": {"v": torch.tensor([float(len(run))])}})
    for run in ("a", "b", "a/local-1"):
        assert state_of(tmp_path, 1, run).part("method")["v"].tolist() == [float(len(run))]


def test_a_damaged_or_foreign_state_is_named(tmp_path):
    state_of(tmp_path, 0).save({"method": {"v": torch.zeros(2)}})
    (path,) = Path(tmp_path).rglob("1.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(InputError, match="remove it, and the site starts anew") as caught:
        state_of(tmp_path, 1).part("method")
    assert str(path) in str(caught.value)
    path.write_bytes(whole.replace(b'"generation":"1"', b'"generation":"7"'))
    with pytest.raises(InputError, match=r"'generation': '7'.* and this is .*'generation': '1'"):
        state_of(tmp_path, 1).part("method")


def test_the_own_model_of_a_site_is_in_its_folder(tmp_path):
    run_squares(tmp_path / "run", num_server_rounds=2, method="ditto")
    assert len(own_weights(tmp_path / "run", "hospital-1")) == 2


def test_a_site_without_test_rows_has_its_own_model_too(tmp_path):
    class Untested(Squares):
        def load_data(self, site):
            data = super().load_data(site)
            return data if site.index else replace(data, test=[])

    run_squares(tmp_path / "run", Untested, num_server_rounds=1, method="ditto")
    assert len(own_weights(tmp_path / "run", "hospital-1")) == 2


@pytest.mark.parametrize("method", ["scaffold", "feddyn"])
def test_a_site_whose_reply_was_left_out_is_not_one_step_ahead(method, tmp_path):
    """What it kept in that round is NaN; it goes on from the state before it."""

    class Broken(Squares):
        def fit(self, model, prepared, seed):
            metrics = super().fit(model, prepared, seed)
            if self.site.index == 1 and self.progress == 3 / 80:
                torch.nn.init.constant_(model.weight, float("nan"))
            return metrics

    strategy = FedAvg()
    more = {"dyn_alpha": 0.5} if method == "feddyn" else {}
    result = run_squares(
        tmp_path / "run", Broken, strategy, num_server_rounds=80, method=method, **more
    )
    assert [(each.round, each.site) for each in strategy.history.failures] == [(4, "hospital-2")]
    assert strategy.run.method.taken == {"hospital-1": 80, "hospital-2": 79}
    assert np.abs(weights_of(result) - pooled_optimum(Squares.sites)).max() < 2e-4
