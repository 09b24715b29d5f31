"""MOON: what a site's model sees in a record stays like what the global model sees in it.

Li, He, Song: Model-Contrastive Federated Learning, CVPR 2021, https://arxiv.org/abs/2103.16257,
equation 3.

When to take it: image classification with deep networks and many local steps. It costs two further
forward passes a batch.

One difference: the paper adds a projection head to the network. Here the input of the last layer
with weights is compared, or that of the layer that ``moon-layer`` names; maps of images are
averaged over their pixels first, and tokens over each record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmed_flower.errors import InputError
from fedmed_flower.methods.base import Ended, Method, SiteRound
from fedmed_flower.methods.tensors import state_of, with_state
from fedmed_flower.settings.methods import MoonSettings
from fedmed_flower.settings.text import setting_error


class MOON(Method):
    """The loss gains ``moon-mu`` times the contrastive term.

    A record's representation by the model in training shall be nearer to that by the global model
    than to that by the model which the site sent last. In a site's first round the latter is the
    global model, and the term is constant.
    """

    name = "moon"
    section = MoonSettings

    def begin(self, site: SiteRound) -> None:
        """Make copies of the global model and of the one that the site sent last."""
        name = self.settings.moon_layer or _last_layer(site.model)
        self._global = _Watched(deepcopy(site.model), name, fixed=True)
        self._last = _Watched(with_state(deepcopy(site.model), site.kept), name, fixed=True)
        self._now = _Watched(site.model, name)

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], loss_of: Callable[..., Tensor]
    ) -> Tensor:
        """Return the loss plus the contrastive term, the mean over the records of the batch."""
        with torch.no_grad():
            positive = self._global.seen(batch, loss_of)
            negative = self._last.seen(batch, loss_of)
        value = loss_of(model, batch)
        term = contrast(self._now.taken(), positive, negative, self.settings.moon_temperature)
        weight: float = self.settings.moon_mu
        return value + weight * term

    def end(self, site: SiteRound) -> Ended:
        """Keep the model that is sent."""
        self._now.close()
        return Ended(state_of(site.model, site.travelling))


def contrast(now: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """Return equation 3: the mean over records of minus the logarithm of the positive's share.

    Parameters
    ----------
    now, positive, negative : Tensor of shape (n, d)
    temperature : float
        Above 0.
    """
    near = functional.cosine_similarity(now, positive, dim=1) / temperature
    far = functional.cosine_similarity(now, negative, dim=1) / temperature
    return functional.softplus(far - near).mean()


class _Watched:
    """A network, and what came last into one of its layers."""

    def __init__(self, model: nn.Module, layer: str, fixed: bool = False) -> None:
        layers = dict(model.named_modules())
        if layer not in layers:
            raise setting_error(
                f"moon-layer must be a layer of the network, such as {_last_layer(model)}, got "
                f"{layer!r}",
                "moon-layer",
            )
        self._model = model.eval() if fixed else model
        self._layer = layer
        self._features_last = isinstance(layers[layer], nn.Linear | nn.LayerNorm)
        self._input: Tensor | None = None
        self._handle = layers[layer].register_forward_pre_hook(self._take)

    def seen(self, batch: Mapping[str, Tensor], loss_of: Callable[..., Tensor]) -> Tensor:
        """Return the representations (n, d) of a batch."""
        loss_of(self._model, batch)
        return self.taken()

    def taken(self) -> Tensor:
        """Return the representations of the last forward pass, once."""
        values = self._input
        self._input = None
        if values is None:
            raise InputError(
                f"moon: the layer {self._layer} was not reached in a forward pass; set moon-layer "
                "to one that is"
            )
        if values.ndim <= 2:
            return values
        return values.flatten(1, -2).mean(1) if self._features_last else values.flatten(2).mean(2)

    def close(self) -> None:
        """Watch no longer."""
        self._handle.remove()

    def _take(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._input = inputs[0]


def _last_layer(model: nn.Module) -> str:
    """Return the name of the last layer that has a weight of its own, in the order of definition.

    Raises
    ------
    InputError
        If there is none.
    """
    layers: list[tuple[str, nn.Module]] = list(model.named_modules())
    names = [name for name, layer in layers if _has_weight(layer) and name]
    if not names:
        raise setting_error(
            "moon finds no layer with weights: set moon-layer to the name of one", "moon-layer"
        )
    return names[-1]


def _has_weight(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "weight", None), nn.Parameter)
