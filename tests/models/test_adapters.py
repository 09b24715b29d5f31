"""Adapters beside the layers of a network, against torch's own gradients and merged weights."""

import copy
import pickle

import pytest
import torch
from monai.networks.nets import UNETR, DynUNet, UNet, ViT
from networks import build, input_of
from tiny import says, see
from torch import nn
from torch.nn.utils import parametrize

from fedmed_flower.errors import InputError
from fedmed_flower.models.adapters import (
    Adapters,
    add_adapters,
    merge_adapters,
    require_adapters_used,
)
from fedmed_flower.models.trainable import Travelling
from fedmed_flower.privacy.gradients import RecordGradients
from fedmed_flower.privacy.validate import (
    require_private_loss,
    require_private_model,
)
from fedmed_flower.settings.model import ModelSettings

# Each with the shape of a batch of two, and the most that an adapter of rank 2 can have.
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (2, 5)),
    "tokens": (lambda: nn.Linear(5, 4, bias=False), (2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 1), padding="same", dilation=2), (2, 3, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=2, bias=False), (2, 2, 4, 4, 6)),
}


def with_adapters(model, lora="*", rank=2, alpha=3.0, seed=1):
    torch.manual_seed(seed)
    return add_adapters(model, ModelSettings(lora=lora, lora_rank=rank, lora_alpha=alpha))


def trained(model):
    """Give the adapters of a network weights as after training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora.b"):
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    return model


def layer_of(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    return nn.Sequential(make().double()), torch.randn(shape, dtype=torch.float64)


class Product(nn.Module):
    """The weights of equation 3, computed for each use by torch's own parametrisation."""

    def __init__(self, a, b, scale):
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a.clone()), nn.Parameter(b.clone()), scale

    def forward(self, weight):
        return weight + self.scale * (self.b.flatten(1) @ self.a.flatten(1)).view(weight.shape)


def test_equation_3_worked_out_by_hand():
    model = nn.Sequential(nn.Linear(2, 2))
    adapters = with_adapters(model, rank=1, alpha=0.5)
    values = {"weight": [[1.0, 2.0], [3.0, 4.0]], "bias": [0.5, -0.5]}
    values |= {"lora.a": [[1.0, -1.0]], "lora.b": [[2.0], [4.0]]}
    model.load_state_dict({f"0.{name}": torch.tensor(value) for name, value in values.items()})
    # A x = 3 - 1 = 2; half of B A x is (2, 4); W x + b is (5.5, 12.5).
    assert model(torch.tensor([3.0, 1.0])).tolist() == [7.5, 16.5]
    assert adapters.merged(model.state_dict())["0.weight"].tolist() == [[2.0, 1.0], [5.0, 2.0]]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_new_adapter_changes_nothing(kind):
    model, inputs = layer_of(kind)
    before = model(inputs)
    with_adapters(model)
    assert torch.equal(model(inputs), before)


@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_the_product_of_both(kind):
    model, inputs = layer_of(kind)
    other = copy.deepcopy(model)
    with_adapters(model)
    adapter = trained(model)[0].lora
    parametrize.register_parametrization(
        other[0], "weight", Product(adapter.a.data, adapter.b.data, 1.5)
    )
    product = other[0].parametrizations.weight[0]
    outputs = model(inputs)
    torch.testing.assert_close(outputs, other(inputs))
    found = torch.autograd.grad(outputs.square().sum(), (adapter.a, adapter.b))
    wanted = torch.autograd.grad(other(inputs).square().sum(), (product.a, product.b))
    for gradient, reference in zip(found, wanted, strict=True):
        assert gradient.abs().max() > 0.1
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_network_alone_holds_what_was_merged(kind):
    model, inputs = layer_of(kind)
    plain = copy.deepcopy(model)
    adapters = with_adapters(model)
    trained(model)
    outputs = model(inputs)
    state = model.state_dict()
    assert list(state) == [*plain.state_dict(), "0.lora.a", "0.lora.b"]
    merged = adapters.merged(state)
    assert all(torch.equal(state[name], plain.state_dict()[name]) for name in plain.state_dict())
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(inputs), outputs)
    weight = model[0].weight
    before = weight.detach().clone()
    assert merge_adapters(model) is model
    assert torch.equal(weight, before)
    assert {n: v.numpy().tobytes() for n, v in model.state_dict().items()} == {
        n: v.numpy().tobytes() for n, v in merged.items()
    }
    assert torch.equal(model(inputs), plain(inputs))


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_adapters_of_its_own(copied, kind):
    model, inputs = layer_of(kind)
    with_adapters(model)
    twin = copied(model)
    before = model(inputs)
    trained(twin)
    assert torch.equal(model(inputs), before)
    assert not torch.equal(twin(inputs), before)
    merge_adapters(twin)
    assert "0.lora.a" in model.state_dict()


def test_equal_seeds_give_equal_adapters_and_layers_draw_each_for_itself():
    first, second, other = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(3))
    with_adapters(first)
    with_adapters(second)
    with_adapters(other, seed=3)
    assert torch.equal(first[1].lora.a, second[1].lora.a)
    assert not torch.equal(first[1].lora.a, other[1].lora.a)
    assert not torch.equal(first[0].lora.a, first[1].lora.a)


def test_a_rank_says_how_many_weights_are_trained():
    model = nn.Sequential(nn.Linear(20, 30), nn.Conv2d(4, 6, 3))
    with_adapters(model, rank=3)
    counts = [sum(p.numel() for p in layer.lora.parameters()) for layer in model]
    assert counts == [3 * (20 + 30), 3 * (4 * 9 + 6)]


def test_the_mean_of_adapters_is_that_of_the_networks_if_b_alone_is_trained():
    settings = ModelSettings(lora="*", lora_rank=2, lora_train="b")
    states = []
    for site in (1, 2):
        torch.manual_seed(0)
        model = Attention().double()
        adapters = add_adapters(model, settings)
        assert Travelling(model, "", adapters).names == ("qkv.lora.b", "head.lora.b")
        torch.manual_seed(site)
        for layer in (model.qkv, model.head):
            nn.init.normal_(layer.lora.b)
        states.append(model.state_dict())
    mean = {name: (states[0][name] + value) / 2 for name, value in states[1].items()}
    merged = [adapters.merged(state) for state in states]
    assert not torch.equal(merged[0]["qkv.weight"], merged[1]["qkv.weight"])
    for name, value in adapters.merged(mean).items():
        torch.testing.assert_close(value, (merged[0][name] + merged[1][name]) / 2)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, rows):
        return self.head(self.norm(self.qkv(rows)))


def test_adapters_alone_travel_and_what_trainable_names_besides():
    model = Attention()
    adapters = with_adapters(model, "*.qkv")
    travelling = Travelling(model, "", adapters)
    assert travelling.names == ("qkv.lora.a", "qkv.lora.b")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == list(travelling.names)
    assert not model.train().norm.training
    digest = travelling.digest(model)
    assert digest
    trained(model)
    assert travelling.digest(model) == digest
    model = Attention()
    adapters = with_adapters(model, "*.qkv")
    names = Travelling(model, "head.*,qkv.bias", adapters).names
    assert names == ("qkv.bias", "qkv.lora.a", "qkv.lora.b", "head.weight", "head.bias")


@pytest.mark.parametrize("trainable", ["qkv.*", "*", "*.weight"])
def test_weights_are_not_trained_beside_their_adapter(trainable):
    model = Attention()
    adapters = with_adapters(model, "qkv")
    text = (
        "trainable matches qkv.weight, which stays as it is since lora trains an adapter beside "
        f"it: match it by one of the two, got {trainable!r}" + see("trainable")
    )
    with pytest.raises(InputError, match=says(text)):
        Travelling(model, trainable, adapters)


def test_a_layer_with_two_names_has_one_adapter():
    net = DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8])
    adapters = with_adapters(net, "input_block.conv1.conv,bottleneck.conv?.conv")
    assert {layer.split(".")[0] for layer in adapters.layers} == {
        *("input_block", "bottleneck", "skip_layers")
    }
    travelling = Travelling(net, "", adapters)
    assert {*travelling.names} == adapters.names
    plain = DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8]).eval()
    images = torch.randn(1, 1, 16, 16)
    outputs = trained(net).eval()(images)
    plain.load_state_dict(adapters.merged(net.state_dict()))
    torch.testing.assert_close(plain(images), outputs, rtol=1e-4, atol=1e-5)
    assert all(
        torch.equal(value, plain.state_dict()[name])
        for name, value in merge_adapters(net).state_dict().items()
    )


def test_a_transformer_of_torch_takes_no_short_cut_past_an_adapter():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    tokens = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = model(tokens)
        adapters = with_adapters(model, "*.linear1,*.linear2")
        assert len(adapters.layers) == 4
        outputs = trained(model)(tokens)
        assert (outputs - before).abs().max() > 0.1
        torch.testing.assert_close(merge_adapters(model)(tokens), outputs, rtol=1e-4, atol=1e-5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


def grouped():
    return nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))


def reflecting():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))


def again():
    model = nn.Sequential(nn.Linear(3, 3))
    with_adapters(model)
    return model


OWN = ", and not torch's own Linear, Conv1d, Conv2d or Conv3d"


@pytest.mark.parametrize(
    ("make", "lora", "text"),
    [
        (
            lambda: nn.MultiheadAttention(4, 2),
            "out_proj",
            f"out_proj cannot have an adapter, since it is a NonDynamicallyQuantizableLinear{OWN}",
        ),
        (
            lambda: UNet(2, 1, 2, (4, 8), (2,)),
            "*",
            f"model.2.conv cannot have an adapter, since it is a ConvTranspose2d{OWN}",
        ),
        (
            lambda: nn.Sequential(nn.LazyLinear(4)),
            "0",
            f"0 cannot have an adapter, since it is a LazyLinear{OWN}",
        ),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))),
            "0",
            f"0 cannot have an adapter, since it is a ParametrizedLinear{OWN}",
        ),
        (grouped, "0", "0 cannot have an adapter, since its channels are in 2 groups"),
        (reflecting, "0", "0 cannot have an adapter, since it pads with reflect values"),
        (
            Tied,
            "second",
            "second cannot have an adapter, since its weights are shared by first and second",
        ),
        (
            again,
            "0",
            "0 cannot have an adapter, since it has one already (build_model must return a new "
            "network each time)",
        ),
    ],
)
def test_a_layer_that_cannot_have_an_adapter_is_named(make, lora, text):
    model = make()
    before = list(model.state_dict())
    text = f"lora: {text}: give patterns that leave it out" + see("lora")
    with pytest.raises(InputError, match=says(text)):
        with_adapters(model, lora, rank=1)
    assert list(model.state_dict()) == before


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"lora": "*.proj"},
            "lora: no linear layer or convolution matches '*.proj'; the network has 2, such as "
            "qkv, head",
        ),
        (
            {"lora": "*.norm"},
            "lora: no linear layer or convolution matches '*.norm'; the network has 2, such as "
            "qkv, head",
        ),
        (
            {"lora": "*.qkv,"},
            "lora must be patterns separated by commas, such as *.qkv, or empty, got '*.qkv,'"
            + see("lora"),
        ),
        (
            {"lora": "*", "lora_rank": 3},
            "lora-rank must be at most 2 for the layer head, whose weights have the shape (2, 4), "
            "got 3: give a lower one, or leave the layer out of lora" + see("lora-rank"),
        ),
        (
            {"lora_rank": 3},
            "lora-rank is 3, but no layer has an adapter: name layers by lora, such as "
            '"*.qkv", or leave it out',
        ),
        (
            {"lora_alpha": 8.0},
            "lora-alpha is 8.0, but no layer has an adapter: name layers by lora, such as "
            '"*.qkv", or leave it out',
        ),
    ],
)
def test_settings_that_do_not_fit_the_network_are_refused(settings, text):
    model = Attention()
    before = list(model.state_dict())
    with pytest.raises(InputError, match=says(text)):
        add_adapters(model, ModelSettings(**settings))
    assert list(model.state_dict()) == before


def test_a_network_without_such_layers_says_so():
    text = "lora: no linear layer or convolution matches '*'; the network has none"
    with pytest.raises(InputError, match=says(text)):
        with_adapters(nn.Sequential(nn.BatchNorm1d(2)))


def test_without_lora_nothing_is_changed():
    model = Attention()
    before = list(model.state_dict())
    assert add_adapters(model, ModelSettings()) == Adapters()
    assert list(model.state_dict()) == before
    assert Travelling(model, "", Adapters()).names == tuple(before)


class Reading(nn.Module):
    """Reads the weights of a layer instead of calling it."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, rows):
        return nn.functional.linear(self.called(rows), self.read.weight)


def test_an_adapter_that_the_network_passes_by_is_named():
    model = Reading()
    Travelling(model, "", with_adapters(model))
    model(torch.randn(2, 3)).sum().backward()
    text = (
        "lora: the network does not call its layer read, so that an adapter there would learn "
        "nothing: give patterns that leave it out" + see("lora")
    )
    with pytest.raises(InputError, match=says(text)):
        require_adapters_used(model)
    model = Reading()
    Travelling(model, "", with_adapters(model, "called"))
    model(torch.randn(2, 3)).sum().backward()
    require_adapters_used(model)


def loss_of(model, batch):
    return (model(batch["image"]) - batch["wanted"]).square().mean()


@pytest.mark.parametrize("name", ["SwinUNETR", "DenseNet121"])
def test_private_gradients_of_adapters_are_those_of_each_record_alone(name):
    swin = name == "SwinUNETR"
    model = build(name, 2).double()
    adapters = with_adapters(model, "*.qkv,*.proj,*.linear?" if swin else "*.conv1", rank=1)
    assert len(adapters.layers) > 10
    Travelling(model, "*.out.*" if swin else "class_layers.*", adapters)
    trained(model).train()
    sides = input_of(name, 2)
    generator = torch.Generator().manual_seed(3)
    outputs = (3, 2, *sides) if swin else (3, 2)
    batch = {
        "image": torch.randn(3, 1, *sides, generator=generator).double(),
        "wanted": torch.randn(outputs, generator=generator).double(),
    }
    require_private_model(model, loss_of, batch)
    require_private_loss(model, loss_of, batch)
    found = RecordGradients(model, loss_of, method="vmap")
    gradients, losses = found(batch)
    assert {name for name in found.parameters if "lora" in name} == adapters.names
    for number in range(3):
        alone = loss_of(model, {key: value[number : number + 1] for key, value in batch.items()})
        torch.testing.assert_close(losses[number], alone)
        wanted = torch.autograd.grad(alone, list(found.parameters.values()))
        for gradient, reference in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient[number], reference)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize(
    ("make", "lora", "weights", "trained"),
    [
        (lambda: UNETR(1, 3, (96, 96, 96)), "*.qkv,*.out_proj", 92_802_291, 221_184),
        (
            lambda: ViT(1, (224, 224), (16, 16), spatial_dims=2, classification=True),
            "*.qkv,*.out_proj",
            85_396_994,
            221_184,
        ),
    ],
)
def test_the_table_of_the_guide(make, lora, weights, trained):
    with torch.device("meta"):
        model = make()
    parameters = dict(model.named_parameters())
    assert sum(parameter.numel() for parameter in parameters.values()) == weights
    adapters = with_adapters(model, lora, rank=4)
    entries = model.state_dict()
    assert sum(entries[name].numel() for name in adapters.names) == trained
