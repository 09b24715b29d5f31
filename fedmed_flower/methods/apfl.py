"""APFL: each site's own model is a mixture of the global one and one that it trains for itself.

Deng, Kamani, Mahdavi: Adaptive Personalized Federated Learning, 2020,
https://arxiv.org/abs/2003.13461, algorithm 1, with equation 11 for an adaptive share.

When to take it: as Ditto. The share of the own part is learned, so a site that gains nothing from
the others ends near its own model, and one that gains ends near the global one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from fedmed_flower.methods.base import Ended, Method, SiteRound, Tensors
from fedmed_flower.methods.tensors import copies, state_of, with_state
from fedmed_flower.settings.methods import APFLSettings

# Names of what is kept: the part of the site's own, its mixture with the global model, the share.
_PART = "part."
_MIXTURE = "mixture."
_ALPHA = "alpha"


class APFL(Method):
    """The own model is ``alpha v + (1 - alpha) w``, with ``w`` the model in training.

    In each step, ``v`` moves on the same batch as ``w``, by the loss of the mixture before the
    step; so does ``alpha``. The part ``v`` starts as the global model of the site's first round.
    Entries that are not trained, such as running statistics, are those that the mixture has seen.
    """

    name = "apfl"
    section = APFLSettings
    personal = True

    def begin(self, site: SiteRound) -> None:
        """Take up the own part and the share."""
        kept = site.kept
        self._names = [name for name, p in site.model.named_parameters() if p.requires_grad]
        parameters = dict(site.model.named_parameters())
        first = copies({name: parameters[name] for name in self._names})
        self._part: Tensors = {n: kept.get(f"{_PART}{n}", v) for n, v in first.items()}
        alpha = kept.get(_ALPHA)
        self._alpha = self.settings.apfl_alpha if alpha is None else float(alpha)
        self._mixture = self.own(deepcopy(site.model), kept)
        self._mixture.train()
        self._optimizer = site.optimizer(self._mixture)
        (group,) = self._optimizer.param_groups
        self._rate = float(group["lr"])
        self._slope = 0.0

    def loss(
        self, model: nn.Module, batch: Mapping[str, Tensor], loss_of: Callable[..., Tensor]
    ) -> Tensor:
        """Return the loss of the model in training; its gradient reaches the mixture too."""
        # Neither has a gradient at the start of a batch, nor when it is repeated in parts.
        if all(parameter.grad is None for parameter in model.parameters()):
            self._optimizer.zero_grad(set_to_none=True)
            self._mix(dict(self._mixture.named_parameters()), dict(model.named_parameters()))
        value = loss_of(model, batch)
        mixed = loss_of(self._mixture, batch)
        return value + (mixed - mixed.detach())

    @torch.no_grad()
    def before_step(self, model: nn.Module) -> None:
        """Compute the slope of the mixture's loss by the share, before the model moves."""
        mixed = dict(self._mixture.named_parameters())
        current = dict(model.named_parameters())
        slopes = [
            (gradient * (self._part[name] - current[name])).sum()
            for name in self._names
            if (gradient := mixed[name].grad) is not None
        ]
        self._slope = float(sum(slopes)) if self.settings.apfl_adaptive else 0.0

    @torch.no_grad()
    def after_step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Take a step of the own part, and of the share if it is learned."""
        mixed = dict(self._mixture.named_parameters())
        for name in self._names:
            gradient = mixed[name].grad
            if gradient is not None:
                # The optimizer steps the own part; its gradient is that of the mixture by alpha.
                gradient.mul_(self._alpha)
            mixed[name].copy_(self._part[name])
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._part = copies({name: mixed[name] for name in self._names})
        self._alpha = min(1.0, max(0.0, self._alpha - self._rate * self._slope))

    def end(self, site: SiteRound) -> Ended:
        """Keep the own part, its mixture with the model as it is sent, and the share."""
        self._mix(dict(self._mixture.named_parameters()), dict(site.model.named_parameters()))
        mixture = state_of(self._mixture, site.travelling)
        kept = {f"{_PART}{name}": value for name, value in self._part.items()}
        kept |= {f"{_MIXTURE}{name}": value for name, value in mixture.items()}
        return Ended(kept | {_ALPHA: torch.tensor(self._alpha, dtype=torch.float64)})

    def own(self, model: nn.Module, kept: Tensors) -> nn.Module:
        """Return the mixture as it was after the site's last round."""
        mixture = {
            name.removeprefix(_MIXTURE): value
            for name, value in kept.items()
            if name.startswith(_MIXTURE)
        }
        return with_state(model, mixture)

    @torch.no_grad()
    def _mix(self, mixed: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
        for name in self._names:
            own = self._alpha * self._part[name]
            mixed[name].copy_(own + (1 - self._alpha) * current[name].detach())
