"""Networks as lists of operations give the same bits as the networks themselves."""

import json

import pytest
import torch
from monai.networks.nets import DenseNet, UNet
from tiny import says
from torch import nn

from fedmed_flower import InputError
from fedmed_flower.models.graph import GraphNetwork, UnsavableError, graph_of


def saved(network, shape, free=(0,)):
    """Return the network that a graph of JSON gives back."""
    content, constants = graph_of(network, torch.rand(shape), free)
    return GraphNetwork(json.loads(json.dumps(content)), network.state_dict(), constants)


def require_same(network, graph, *shapes):
    network.eval()
    with torch.no_grad():
        for shape in shapes:
            batch = torch.randn(shape)
            assert torch.equal(graph(batch), network(batch)), shape


def test_a_network_for_images_of_one_size():
    network = DenseNet(2, 1, 2, 8, 4, (1, 1), norm=("batch", {}))
    graph = saved(network, (2, 1, 20, 24))
    require_same(network, graph, (1, 1, 20, 24), (7, 1, 20, 24))
    with pytest.raises(InputError, match=says(
        "the network was saved for batches of the shape (any, 1, 20, 24), got (1, 1, 24, 24): give "
        "images of such a shape, or the app's own network (--app)"
    )):  # fmt: skip
        graph(torch.rand(1, 1, 24, 24))


def test_a_network_for_images_of_any_size():
    network = UNet(2, 1, 2, (4, 8), (2,), num_res_units=1)
    graph = saved(network, (2, 1, 32, 48), (0, 2, 3))
    require_same(network, graph, (1, 1, 32, 48), (3, 1, 64, 16), (2, 1, 80, 80))


class Halving(nn.Module):
    """Takes another way for sides that are no multiple of four."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, images):
        if images.shape[2] % 4:
            return -self.layer(images)
        return self.layer(images)


def test_a_size_that_takes_another_way_is_refused():
    graph = saved(Halving(), (2, 1, 32, 48), (0, 2, 3))
    assert graph(torch.rand(1, 1, 36, 17)).shape == (1, 1, 36, 17)
    with pytest.raises(InputError, match="was saved for batches of the shape"):
        graph(torch.rand(1, 1, 34, 48))


class Several(nn.Module):
    """Two outputs, tensors of its own, a buffer that is not saved, and changes in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("steps", torch.arange(3.0), persistent=False)
        self.tied = self.layer

    def forward(self, features):
        values = torch.relu_(self.layer(features) + self.steps)
        values[:, 0] = 5.0
        return values, self.tied(values).clamp(max=float("inf"))


def test_outputs_constants_and_changes_in_place():
    network = Several()
    graph = saved(network, (2, 3))
    batch = torch.rand(4, 3)
    with torch.no_grad():
        for found, wanted in zip(graph(batch), network(batch), strict=True):
            assert torch.equal(found, wanted)


class Drawing(nn.Module):
    def forward(self, images):
        return images + torch.rand_like(images)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, images):
        self.count.add_(1)
        return images * self.count


class Fixed(nn.Module):
    def forward(self, images):
        return images.view(2, 3)


@pytest.mark.parametrize(
    ("network", "text"),
    [
        (Drawing(), "it calls aten.rand_like.default, which a graph cannot hold"),
        (Counting(), "would change a weight"),
        (Fixed(), "its graph fixes the number of images in a batch"),
        (nn.Sequential(nn.Flatten(0), nn.Linear(6, 1)), "fixes the number of images in a batch"),
    ],
)
def test_what_a_graph_cannot_hold_is_said(network, text):
    state = torch.get_rng_state()
    with pytest.raises(UnsavableError, match=text):
        graph_of(network, torch.rand(2, 3, generator=torch.Generator().manual_seed(0)), (0,))
    assert torch.equal(torch.get_rng_state(), state)
