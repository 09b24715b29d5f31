import numpy as np
import pytest
import torch
from tiny import says
from torch import nn
from torch.nn import functional as F

from fedmed_flower.errors import InputError
from fedmed_flower.models.tabular import tabular_network
from fedmed_flower.privacy.gradients import RecordGradients
from fedmed_flower.privacy.validate import (
    first_changed,
    held,
    require_forgetful,
    require_private_loss,
    require_private_model,
)

KINDS = ("linear", "mlp", "residual")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rows(count=6, inputs=5):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(count, inputs, generator=generator)
    return {"features": features, "target": torch.arange(count) % 3}


def loss_of(model, batch):
    return F.cross_entropy(model(batch["features"]), batch["target"])


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("linear", 5 * 3 + 3),
        ("mlp", (5 * 8 + 8) + 2 * (8 * 8 + 8) + (8 * 3 + 3)),
        ("residual", (5 * 8 + 8) + 3 * (16 + (8 * 16 + 16) + (16 * 8 + 8)) + 16 + (8 * 3 + 3)),
    ],
)
def test_a_network_has_the_layers_that_are_asked_for(kind, numbers):
    network = tabular_network(kind, 5, 3, width=8, depth=3, dropout=0.25)
    assert sum(p.numel() for p in network.parameters()) == numbers
    assert network(torch.zeros(7, 5)).shape == (7, 3)
    shares = {layer.p for layer in network.modules() if isinstance(layer, nn.Dropout)}
    assert shares == (set() if kind == "linear" else {0.25})


def affine(values, network, name):
    state = {key: value.numpy().astype(float) for key, value in network.state_dict().items()}
    return values @ state[f"{name}weight"].T + state[f"{name}bias"]


def normalised(values, network, name):
    centred = values - values.mean(axis=1, keepdims=True)
    scaled = centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + 1e-5)
    weight, bias = (network.get_parameter(name + part).detach().numpy() for part in NORM)
    return scaled * weight + bias


NORM = ("weight", "bias")


def by_hand(kind, network, values):
    if kind == "linear":
        return affine(values, network, "")
    if kind == "mlp":
        for number in (0, 3):
            values = np.maximum(affine(values, network, f"{number}."), 0)
        return affine(values, network, "6.")
    values = affine(values, network, "0.")
    for block in ("1.layers.", "2.layers."):
        inner = affine(normalised(values, network, f"{block}0."), network, f"{block}1.")
        values = values + affine(np.maximum(inner, 0), network, f"{block}4.")
    return affine(np.maximum(normalised(values, network, "3."), 0), network, "5.")


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_computes_what_its_paper_says(kind):
    network = tabular_network(kind, 5, 3, width=8, dropout=0.5).eval()
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -1, 1)
    features = rows()["features"]
    wanted = by_hand(kind, network, features.numpy().astype(float))
    np.testing.assert_allclose(network(features).detach().numpy(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_can_be_trained_privately(kind):
    network, batch = tabular_network(kind, 5, 3, width=8), rows()
    require_private_model(network, loss_of, batch)
    require_private_loss(network, loss_of, batch)
    require_forgetful(network, loss_of, batch)
    before = held(network)
    found, losses = RecordGradients(network, loss_of, method="vmap")(batch)
    assert first_changed(before, network) is None
    for place in range(6):
        one = {name: part[place : place + 1] for name, part in batch.items()}
        value = loss_of(network, one)
        assert losses[place] == pytest.approx(value.item(), rel=1e-5)
        wanted = torch.autograd.grad(value, list(network.parameters()))
        for mine, its in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine[place], its, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "residual"])
def test_dropout_draws_for_each_patient_under_privacy(kind):
    network, batch = tabular_network(kind, 5, 3, width=32, dropout=0.5), rows()
    require_private_model(network, loss_of, batch)
    same = {name: part[:1].repeat_interleave(4, dim=0) for name, part in batch.items()}
    _, losses = RecordGradients(network, loss_of, method="vmap")(same)
    assert len(losses.unique()) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_network_can_learn(kind):
    # Whether two signs agree, which no straight line tells.
    features = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    target = torch.tensor([1.0, 0.0, 0.0, 1.0])
    network = tabular_network(kind, 2, 1, width=16)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(network(features)[:, 0], target)
        loss.backward()
        optimizer.step()
    assert (loss.item() < 0.05) == (kind != "linear")


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_give_outputs_of_zero_and_can_be_left_behind(kind):
    batch = rows()
    assert tabular_network(kind, 5, 3)(batch["features"]).abs().min() > 0
    network = tabular_network(kind, 5, 3, zeros=True)
    assert not network(batch["features"]).any()
    loss_of(network, batch).backward()
    last = list(network.parameters())[-2]
    assert last.grad.norm() > 0.1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": "tree"}, "kind must be one of linear, mlp, residual, got 'tree'"),
        ({"inputs": 0}, "inputs must be at least 1, got 0"),
        ({"outputs": 0}, "outputs must be at least 1, got 0"),
        ({"width": -3}, "width must be at least 1, got -3"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, got -0.1"),
        ({"dropout": float("nan")}, "dropout must be at least 0 and below 1, got nan"),
        ({"width": 1}, "width must be at least 2 for a residual network, got 1"),
    ],
)
def test_what_no_network_can_be_is_refused(change, text):
    with pytest.raises(InputError, match=says(text)):
        tabular_network(**{"kind": "residual", "inputs": 4, "outputs": 2} | change)
