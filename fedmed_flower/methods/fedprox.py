"""FedProx: the global model pulls on each site's while it trains.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous Networks, MLSys
2020, https://arxiv.org/abs/1812.06127, equation 2.

When to take it: sites make many local steps and drift apart. It keeps them near the start of the
round, so that more local work does less harm; it does not change where the run ends much.
"""

from __future__ import annotations

from torch import Tensor, nn

from fedmed_flower.methods.base import Method, SiteRound
from fedmed_flower.methods.tensors import copies, pull
from fedmed_flower.settings.methods import FedProxSettings


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
