"""FedProx: the global model pulls on each site's while it trains.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks, MLSys
2020, https://arxiv.org/abs/1812.06127, equation 2.

When to take it: sites make many local steps and drift apart. It keeps them near the start of the
round, so that more local work does less harm; it does not change where the run ends much.
"""

from __future__ import annotations

from torch import Tensor, nn

from fedmed_flower.methods.base import Method, SiteRound, Tensors
from fedmed_flower.settings.methods import FedProxSettings


def pull(model: nn.Module, anchor: Tensors, strength: float) -> None:
    """Add to each gradient `strength` times the parameter's distance from its anchor.

    Parameters
    ----------
    model : Module
    anchor : dict of str to Tensor
        By the parameter's name; parameters that are not in it stay free.
    strength : float
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in anchor:
            parameter.grad.add_(parameter.detach() - anchor[name], alpha=strength)


def copies(parameters: Tensors) -> Tensors:
    """Return detached copies of tensors."""
    return {name: value.detach().clone() for name, value in parameters.items()}


class FedProx(Method):
    """Adds ``proximal-mu / 2`` times the squared distance from the global model to the loss.

    0 gives back FedAvg. The term is not part of the training loss that is reported.
    """

    name = "fedprox"
    section = FedProxSettings
    private = True

    def begin(self, site: SiteRound) -> None:
        """Remember the global model."""
        self._anchor: dict[str, Tensor] = {}
        if self.settings.proximal_mu:
            self._anchor = copies(site.parameters)

    def before_step(self, model: nn.Module) -> None:
        """Add the gradient of the proximal term, which does not depend on records."""
        if self._anchor:
            pull(model, self._anchor, self.settings.proximal_mu)
