"""Ditto: beside the global model, each site trains its own, which the global one pulls on.

Li, Hu, Beirami, Smith: Ditto: Fair and Robust Federated Learning Through Personalization, ICML
2021, https://arxiv.org/abs/2012.04221, algorithm 1.

When to take it: hospitals differ so much that one model serves none of them best, and each has
enough patients for a model that leans on the global one. It costs each site the training twice.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import nn

from fedmed_flower.methods.base import Ended, Method, SiteRound, Tensors
from fedmed_flower.methods.tensors import copies, pull, state_of, with_state
from fedmed_flower.settings.methods import DittoSettings


class Ditto(Method):
    """``ditto-lambda / 2`` times the squared distance from the global model joins the own loss.

    A site's own model starts as the global one of its first round.
    """

    name = "ditto"
    section = DittoSettings
    personal = True

    def begin(self, site: SiteRound) -> None:
        """Take up the own model, and remember the global one."""
        self._global = copies(site.parameters)
        self._own = self.own(deepcopy(site.model), site.kept)

    def train(self, site: SiteRound) -> dict[str, Any]:
        """Train the global model as usual, then the own one."""
        metrics = site.fit(site.model, self, "")
        site.fit(self._own, _Pulled(self._global, self.settings.ditto_lambda), "own model")
        return metrics

    def end(self, site: SiteRound) -> Ended:
        """Keep the own model."""
        return Ended(state_of(self._own, site.travelling))

    def own(self, model: nn.Module, kept: Tensors) -> nn.Module:
        """Return the own model; the global one before the first round."""
        return with_state(model, kept)


class _Pulled(Method):
    """Training under the pull of other weights."""

    def __init__(self, anchor: Tensors, strength: float) -> None:
        super().__init__()
        self._anchor = anchor
        self._strength = strength

    def before_step(self, model: nn.Module) -> None:
        pull(model, self._anchor, self._strength)
