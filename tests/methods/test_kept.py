"""Layers that are trained at each site and stay different at each."""

import numpy as np
import pytest
from monai.networks.nets import SwinUNETR, UNet
from squares import Squares, run_squares
from tiny import TinyClient, ask, context_of, halves, model_arrays
from torch import nn

from fedmed_flower.errors import InputError
from fedmed_flower.methods.kept import kept_names
from fedmed_flower.strategies import FedAvg


class Deep(Squares):
    def build_model(self):
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def names_of(model, keep):
    return kept_names(model, tuple(model.state_dict()), keep)


def test_norm_is_all_of_the_normalisation_layers():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Linear(4, 1)
    )
    entries = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    wanted = [f"1.{entry}" for entry in entries] + ["2.weight", "2.bias"]
    assert names_of(model, "norm") == tuple(wanted)


@pytest.mark.parametrize("norm", ["batch", ("group", {"num_groups": 2})])
def test_norm_finds_the_layers_of_monai_s_networks(norm):
    kept = names_of(UNet(2, 1, 2, (4, 8), (2,), norm=norm), "norm")
    assert kept
    assert all(".N." in name for name in kept)


def test_a_norm_without_weights_and_statistics_cannot_be_kept():
    with pytest.raises(InputError, match="keep=norm, but the network has no normalisation layer"):
        names_of(UNet(2, 1, 2, (4, 8), (2,), norm="instance"), "norm")


def test_norm_finds_layer_normalisation_in_a_transformer():
    model = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=2)
    kept = names_of(model, "norm")
    assert kept
    assert all("norm" in name for name in kept)


def test_patterns_name_parameters_and_buffers():
    assert names_of(halves(), "head.*") == ("head.weight", "head.bias")
    assert names_of(halves(), " *.bias , *.running_*") == (
        "stem.1.bias",
        "stem.2.bias",
        "stem.2.running_mean",
        "stem.2.running_var",
        "head.bias",
    )


def entries(folder, **settings):
    strategy = FedAvg()
    result = run_squares(folder, Deep, strategy, num_server_rounds=2, local_epochs=1, **settings)
    return {key: array.numpy() for key, array in result.arrays.items()}, strategy


def test_what_is_not_sent_does_not_leave_and_the_rest_is_as_with_it(tmp_path):
    plain, _ = entries(tmp_path / "sent", keep="2.*", learning_rate=0.02)
    unsent, strategy = entries(tmp_path / "not", keep="2.*", keep_sent=False, learning_rate=0.02)
    for key in plain:
        equal = plain[key].tobytes() == unsent[key].tobytes()
        assert equal == (not key.startswith("2.")), key
    start = {key: array.numpy() for key, array in strategy.run.sent_arrays.items()}
    assert unsent["2.weight"].tobytes() == start["2.weight"].tobytes()


def test_a_reply_without_kept_layers_has_none_of_their_keys():
    config = {"keep": "1.bias", "keep_sent": False, "replies_taken": 0, "run_key": "k"}
    reply = ask(TinyClient, "train", context_of(), **config)
    assert {*reply.content["arrays"]} == {"1.weight"}


def test_a_site_goes_on_from_its_own_layers_and_the_global_rest():
    context = context_of()
    config = {"keep": "1.bias", "run_key": "k"}
    first = ask(TinyClient, "train", context, replies_taken=0, **config).content["arrays"]
    # The server's model has other biases; the site's own count.
    fresh = model_arrays(seed=5)
    mixed = {"1.weight": fresh["1.weight"], "1.bias": first["1.bias"]}
    kept = ask(TinyClient, "train", context, fresh, replies_taken=1, server_round=2, **config)
    by_hand = ask(
        TinyClient, "train", context_of(), type(fresh)(mixed), server_round=2, replies_taken=0
    )
    for key in mixed:
        wanted = by_hand.content["arrays"][key].numpy()
        np.testing.assert_array_equal(kept.content["arrays"][key].numpy(), wanted)


def test_own_layers_are_measured_where_the_message_asks_for_them():
    context = context_of()
    config = {"keep": "1.*bias", "run_key": "k"}
    trained = ask(TinyClient, "train", context, replies_taken=0, **config).content["arrays"]
    fresh = model_arrays(seed=5)
    mixed = type(fresh)({"1.weight": fresh["1.weight"], "1.bias": trained["1.bias"]})

    def loss(arrays, **more):
        reply = ask(TinyClient, "evaluate", context, arrays, split="val", **more)
        return reply.content["metrics"]["loss"]

    assert loss(fresh, own_model=True, replies_taken=1, **config) == loss(mixed)
    assert loss(fresh) != loss(mixed)


@pytest.mark.parametrize("method", ["fednova", "feddyn", "scaffold"])
def test_a_step_of_the_server_leaves_kept_layers_alone(method, tmp_path):
    """The global model's kept layers are the mean of the sites', as without a method."""
    plain, _ = entries(tmp_path / "plain", keep="2.*", learning_rate=0.001)
    moved, _ = entries(tmp_path / "moved", keep="2.*", learning_rate=0.001, method=method)
    for key in ("2.weight", "2.bias"):
        np.testing.assert_allclose(moved[key], plain[key], atol=2e-3)
