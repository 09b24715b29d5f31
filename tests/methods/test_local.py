"""Methods of the hospitals alone, beside the formulas of their papers."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from squares import Squares, own_weights, points, run_squares, weights_of
from tiny import TinyClient, bits, halves, linear, run_tiny
from torch import nn
from torch.nn import functional

from fedmed_flower.methods.base import SiteRound
from fedmed_flower.methods.moon import MOON, contrast

SGD = {"optimizer": "sgd", "num_server_rounds": 3, "local_epochs": 2}


class Halves(TinyClient):
    def build_model(self):
        return halves()


def test_the_contrastive_term_is_a_cross_entropy_of_two_similarities():
    torch.manual_seed(1)
    now, positive, negative = torch.randn(3, 5, 4).double()
    logits = torch.stack(
        [functional.cosine_similarity(now, other) / 0.5 for other in (positive, negative)], dim=1
    )
    wanted = functional.cross_entropy(logits, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(contrast(now, positive, negative, 0.5), wanted)


def test_moon_compares_what_goes_into_the_last_layer():
    model = halves()
    names = tuple(name for name, _ in model.named_parameters())
    images = torch.rand(6, 1, 2, 2)
    batch = {"image": images, "label": torch.randint(0, 2, (6,))}
    method = MOON(moon_mu=2.0)
    last = {name: value + 0.1 for name, value in model.state_dict().items()}
    method.begin(SiteRound(model, names, tuple(last), {}, last, 0.1, fit=None, optimizer=None))
    entropy = nn.CrossEntropyLoss()
    model.train()
    twin = deepcopy(model)
    value = method.loss(model, batch, lambda m, b: entropy(m(b["image"]), b["label"]))
    before = deepcopy(twin)
    before.load_state_dict(last)
    models = (deepcopy(twin), deepcopy(twin).eval(), before.eval())
    seen = [each.stem(images) for each in models]
    wanted = entropy(twin(images), batch["label"]) + 2 * contrast(*seen, 0.5)
    torch.testing.assert_close(value, wanted)


def test_moon_without_weight_and_fedprox_without_pull_are_fedavg(tmp_path):
    plain = run_tiny(tmp_path / "plain", Halves, model=halves, **SGD)
    for method, more in (("moon", {"moon_mu": 0.0}), ("fedprox", {"proximal_mu": 0.0})):
        folder = tmp_path / method
        result = run_tiny(folder, Halves, model=halves, method=method, **SGD, **more)
        assert bits(result.arrays) == bits(plain.arrays), method
    moved = run_tiny(tmp_path / "moon 1", Halves, model=halves, method="moon", **SGD)
    assert bits(moved.arrays) != bits(plain.arrays)


def test_a_layer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(Exception, match=r"moon-layer must be a layer of the network, such as head"):
        run_tiny(tmp_path / "a", Halves, model=halves, method="moon", moon_layer="tail", **SGD)


def test_fedrep_trains_the_head_first_and_then_the_rest(tmp_path):
    """With one site and plain SGD, both halves are those of training by hand."""
    values = Squares.sites[0]

    class Two(Squares):
        sites = (values,)

        def build_model(self):
            torch.manual_seed(2)
            return nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))

    settings = {"num_server_rounds": 1, "local_epochs": 3, "learning_rate": 0.02}
    more = {"method": "fedrep", "keep": "1.*", "fedrep_head_epochs": 2}
    result = run_squares(tmp_path / "run", Two, **settings, **more)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    features, targets = map(torch.tensor, values)
    # The head's passes have three epochs each: `local-epochs`.
    for layer, steps in ((1, 6), (0, 3)):
        optimizer = torch.optim.SGD(model[layer].parameters(), lr=0.02)
        for _ in range(steps):
            model.zero_grad()
            (0.5 * ((model(features)[:, 0] - targets) ** 2).mean()).backward()
            optimizer.step()
    for key, value in model.state_dict().items():
        np.testing.assert_allclose(result.arrays[key].numpy(), value.numpy(), rtol=1e-5)


def test_apfl_steps_its_part_by_the_gradient_of_the_mixture(tmp_path):
    """One site, one step, a fixed share: v and w are worked out by hand."""
    folder = tmp_path / "run"
    client = points([4.0, 6.0])
    settings = {"num_server_rounds": 1, "local_epochs": 1, "apfl_adaptive": False}
    result = run_squares(folder, client, method="apfl", apfl_alpha=0.25, **settings)
    (after,) = weights_of(result)
    # The gradient of half the squared distance from 5 is w - 5, and the rate .1.
    start = (after - 0.5) / 0.9
    mixture = 0.25 * start + 0.75 * after
    part = start - 0.1 * 0.25 * (mixture - 5)
    wanted = 0.25 * part + 0.75 * after
    assert own_weights(folder, "hospital-1") == pytest.approx([wanted], rel=1e-5)


@pytest.mark.parametrize("method", ["scaffold", "feddyn", "fednova", "fedprox", ""])
def test_methods_that_correct_steps_run_in_private_training(method, tmp_path):
    settings = {"privacy": "patient", "target_epsilon": 1e4, "optimizer": "sgd"}
    folder = tmp_path / "run"
    keep = {} if method else {"keep": "1.bias"}
    result = run_tiny(folder, TinyClient, model=linear, method=method, **settings, **keep)
    assert result.train_metrics_clientapp
    assert all(np.isfinite(array.numpy()).all() for array in result.arrays.values())
