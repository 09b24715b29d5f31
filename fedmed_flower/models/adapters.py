"""Low-rank adapters: few weights beside a layer's own, which are trained in their place.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: LoRA: Low-Rank Adaptation of Large Language
Models, ICLR 2022, https://arxiv.org/abs/2106.09685. A layer with the weights W gives
``W x + (alpha / rank) B A x`` (equation 3). A is drawn at random and B is 0 at first, so that the
network is the same at the start. The paper adapts linear layers. Here convolutions have adapters
too: A has the kernel of the layer and `rank` channels, B has the kernel 1.

When to take it: a large network that was trained before, on few patients or over a slow line; and
private training, where noise grows with the number of weights that are trained. The trap: a rule
averages A and B each by itself, and the product of the means is not the mean of the products. With
B alone trained it is: Sun, Li, Li, Ding: Improving LoRA in Privacy-preserving Federated Learning,
ICLR 2024, https://arxiv.org/abs/2403.12313, keeps A as it was drawn, the same at all sites. Half
travels then, and the noise of private training enters the product once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from fedmed_flower.errors import InputError
from fedmed_flower.models.patterns import matches, patterns_of
from fedmed_flower.settings.model import ModelSettings
from fedmed_flower.settings.section import key_of
from fedmed_flower.settings.text import setting_error

_NAME = "lora"
_BOTH = "ab"
_CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


class Adapter(nn.Module):
    """What is added to the output of one layer, as its child ``lora``.

    Parameters
    ----------
    layer : Linear or Conv1d, Conv2d, Conv3d
    rank : int
    alpha : float

    Attributes
    ----------
    a : Parameter of shape (rank, *shape of the layer's weight without its first side)
    b : Parameter of shape (outputs of the layer, rank), with sides of 1 for a convolution
    scale : float
        alpha / rank.
    """

    def __init__(self, layer: Any, rank: int, alpha: float) -> None:
        super().__init__()
        weight: Tensor = layer.weight
        self.scale = alpha / rank
        self.a = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]))
        self.b = nn.Parameter(weight.new_zeros(len(weight), rank, *[1] * (weight.ndim - 2)))
        # As torch draws the weights of such a layer.
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self._inner: Callable[..., Tensor] = functional.linear
        self._outer: Callable[..., Tensor] = functional.linear
        if type(layer) in _CONVOLUTIONS:
            self._outer = _CONVOLUTIONS[type(layer)]
            moves = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            self._inner = partial(self._outer, **moves)

    def forward(self, input: Tensor) -> Tensor:
        """Return what is added for an input of the layer."""
        return self.scale * self._outer(self._inner(input, self.a), self.b)


@dataclass(frozen=True)
class Adapters:
    """Which layers of a network have an adapter.

    Attributes
    ----------
    layers : tuple of str
        Their names; all names of a layer that has several.
    scale : float
        As in `Adapter`.
    parts : str
        Which of both matrices are trained: ``ab`` or ``b``.
    """

    layers: tuple[str, ...] = ()
    scale: float = 1.0
    parts: str = _BOTH

    @property
    def names(self) -> frozenset[str]:
        """The entries of the state dict that the adapters have added."""
        return self._names(_BOTH)

    @property
    def trained(self) -> frozenset[str]:
        """Those of `names` that are trained and travel."""
        return self._names(self.parts)

    @property
    def adapted(self) -> frozenset[str]:
        """The entries of the state dict beside which the adapters are trained."""
        return frozenset(_key(layer, "weight") for layer in self.layers)

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict of the network itself: each adapter is added to the weights.

        Parameters
        ----------
        state : mapping of str to Tensor
            The whole state dict of the network with adapters.
        """
        names = self.names
        merged = {name: value for name, value in state.items() if name not in names}
        for layer in self.layers:
            a, b = (state[_key(layer, f"{_NAME}.{part}")] for part in _BOTH)
            name = _key(layer, "weight")
            merged[name] = _added(state[name], a, b, self.scale)
        return merged

    def _names(self, parts: str) -> frozenset[str]:
        return frozenset(_key(layer, f"{_NAME}.{part}") for layer in self.layers for part in parts)


NO_ADAPTERS = Adapters()


def add_adapters(model: nn.Module, settings: ModelSettings) -> Adapters:
    """Give layers of a network an adapter, in place, and return which.

    Parameters
    ----------
    model : Module
        Without adapters. What it computes stays the same.
    settings : ModelSettings
        `lora` and what begins with it. A follows torch's generator.

    Raises
    ------
    InputError
        If a pattern is empty or matches no linear layer or convolution; if one of those that match
        cannot have an adapter; if the rank is larger than a layer; or if `lora` is empty and the
        others are set.
    """
    if not settings.lora:
        _require_unset(settings)
        return NO_ADAPTERS
    layers: dict[str, nn.Module] = {
        name: layer
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, nn.Linear | _ConvNd)
    }
    kind = "linear layer or convolution"
    patterns = patterns_of("lora", settings.lora, [*layers], kind, "*.qkv")
    chosen: dict[nn.Module, str] = {}
    for name, layer in layers.items():
        if any(matches(name, pattern) for pattern in patterns):
            chosen.setdefault(layer, name)
    owners = _owners(model)
    for layer, name in chosen.items():
        _require_adaptable(name, layer, owners, settings)
    for layer in chosen:
        layer.register_module(_NAME, Adapter(layer, settings.lora_rank, settings.lora_alpha))
        layer.register_forward_hook(_with_adapter, with_kwargs=True)
    names = tuple(name for name, layer in layers.items() if layer in chosen)
    return Adapters(names, settings.lora_alpha / settings.lora_rank, settings.lora_train)


def merge_adapters(model: nn.Module) -> nn.Module:
    """Add each adapter to the weights of its layer; the network then has none.

    The results are those of `Adapters.merged`. The model is changed, but no tensor of it is:
    `build_model` may take weights from a network that it keeps.
    """
    for _, layer, adapter in [*_adapters_in(model)]:
        weight = layer.weight
        added = _added(weight.detach(), adapter.a.detach(), adapter.b.detach(), adapter.scale)
        layer.weight = nn.Parameter(added, requires_grad=weight.requires_grad)
        layer.register_module(_NAME, None)
    return model


def require_adapters_used(model: nn.Module) -> None:
    """Refuse a network that does not call a layer with an adapter.

    A network may read the weights of a layer instead of calling it; what the adapter learns would
    then have no effect.

    Parameters
    ----------
    model : Module
        After a backward pass.

    Raises
    ------
    InputError
    """
    for name, _, adapter in _adapters_in(model):
        if adapter.b.grad is None:
            raise setting_error(
                f"lora: the network does not call its layer {name}, so that an adapter there "
                "would learn nothing: give patterns that leave it out",
                "lora",
            )


def _with_adapter(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Tensor:
    adapter = layer.lora
    if adapter is None:  # It has been merged.
        return output
    added: Tensor = adapter(*args, **kwargs)
    return output + added


def _added(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the weights of a layer plus the product of its adapter, rounded once."""
    product = b.double().flatten(1) @ a.double().flatten(1)
    return (weight.double() + scale * product.view(weight.shape)).to(weight.dtype)


def _adapters_in(model: nn.Module) -> Iterator[tuple[str, Any, Adapter]]:
    for name, layer in model.named_modules():
        adapter = getattr(layer, _NAME, None)
        if isinstance(adapter, Adapter):
            yield name, layer, adapter


def _owners(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Return the names of the layers that hold each parameter; a layer counts once."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, layer in model.named_modules():
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(parameter, []).append(name)
    return owners


def _require_adaptable(
    name: str, layer: Any, owners: Mapping[nn.Parameter, list[str]], settings: ModelSettings
) -> None:
    reason = _unadaptable(layer, owners)
    if reason:
        raise setting_error(
            f"lora: {name or 'the network'} cannot have an adapter, since {reason}: give patterns "
            "that leave it out",
            "lora",
        )
    most = min(len(layer.weight), layer.weight[0].numel())
    if settings.lora_rank > most:
        raise setting_error(
            f"lora-rank must be at most {most} for the layer {name}, whose weights have the shape "
            f"{tuple(layer.weight.shape)}, got {settings.lora_rank}: give a lower one, or leave "
            "the layer out of lora",
            "lora-rank",
        )


def _unadaptable(layer: Any, owners: Mapping[nn.Parameter, list[str]]) -> str:
    """Return why a layer cannot have an adapter; empty if it can."""
    # A subclass may use its weights in another way, such as one whose weights are normalised.
    if type(layer) is not nn.Linear and type(layer) not in _CONVOLUTIONS:
        return (
            f"it is a {type(layer).__name__}, and not torch's own Linear, Conv1d, Conv2d or Conv3d"
        )
    if getattr(layer, _NAME, None) is not None:
        return "it has one already (build_model must return a new network each time)"
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return "its weights are computed from others, or are no floating point numbers"
    if getattr(layer, "groups", 1) != 1:
        return f"its channels are in {layer.groups} groups"
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"it pads with {layer.padding_mode} values"
    shared = owners[weight]
    if len(shared) > 1:
        return f"its weights are shared by {' and '.join(shared)}"
    return ""


def _require_unset(settings: ModelSettings) -> None:
    """Refuse settings of adapters without adapters, which nobody would read."""
    defaults = ModelSettings()
    for name in ("lora_rank", "lora_alpha", "lora_train"):
        value = getattr(settings, name)
        if value != getattr(defaults, name):
            raise InputError(
                f"{key_of(name)} is {value}, but no layer has an adapter: name layers by lora, "
                'such as "*.qkv", or leave it out'
            )


def _key(layer: str, part: str) -> str:
    """Return the name of an entry of a layer in a state dict; the network itself has no name."""
    return f"{layer}.{part}" if layer else part
