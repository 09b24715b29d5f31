"""FedDyn: a term in each site's loss that moves until the sites' optima are that of all.

Acar, Zhao, Navarro, Mattina, Whatmough, Saligrama: Federated Learning Based on Dynamic
Regularization, ICLR 2021, https://arxiv.org/abs/2111.04263, algorithm 1.

When to take it: as SCAFFOLD, with no more bytes than FedAvg. It is less stable where sites do few
steps: the term assumes that each site nearly minimises its loss in a round.

Two differences: sites count as the strategy weighs their first replies, where the paper counts all
alike; and the sum over sites that have not replied yet is not divided by their number before they
are known.
"""

from __future__ import annotations

from flwr.app import ArrayRecord
from torch import nn

from fedmed_flower.arrays.linear import linear, zeros_like
from fedmed_flower.methods.base import Ended, Method, Moved, ServerRound, SiteRound
from fedmed_flower.methods.tensors import copies, pull
from fedmed_flower.settings.methods import FedDynSettings

_SUM = "drift"


class FedDyn(Method):
    """The loss gains ``-<g_k, w> + alpha / 2 |w - w_global|^2``; ``g_k`` starts at 0."""

    name = "feddyn"
    section = FedDynSettings
    sgd = True
    private = True
    needs_kept = True
    needs_all = True
    moves = True

    def begin(self, site: SiteRound) -> None:
        """Take up the site's gradient ``g_k``."""
        self._start = copies(site.parameters)
        self._gradient = {
            name: site.kept.get(name, value.new_zeros(value.shape))
            for name, value in self._start.items()
        }

    def before_step(self, model: nn.Module) -> None:
        """Add the gradient of both terms, which do not depend on records."""
        pull(model, self._start, self.settings.dyn_alpha)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and name in self._gradient:
                parameter.grad.sub_(self._gradient[name])

    def end(self, site: SiteRound) -> Ended:
        """Move ``g_k`` by ``-alpha`` times the round's change of the model."""
        alpha = self.settings.dyn_alpha
        return Ended(
            {
                name: self._gradient[name] - alpha * (value.detach() - self._start[name])
                for name, value in site.parameters.items()
            }
        )

    def move(self, server: ServerRound) -> Moved:
        """Return the rule's model less ``h / alpha``, and the next ``h``."""
        alpha = self.settings.dyn_alpha
        last = server.state.get(_SUM) or zeros_like(server.model, server.trained)
        pulled = [
            (server.retained, last),
            (-alpha * server.share, _part(server.model, last)),
            (alpha * server.share, _part(server.sent, last)),
        ]
        drift = linear(pulled)
        model = linear([(1.0, server.model), (-1 / alpha, drift)], keys=server.trained)
        return Moved(model, {}, {_SUM: drift})


def _part(record: ArrayRecord, layout: ArrayRecord) -> ArrayRecord:
    return ArrayRecord({key: record[key] for key in layout})
