"""FedNova: sites that do more steps do not pull the model further to themselves.

Wang, Liu, Liang, Joshi, Poor: Tackling the Objective Inconsistency Problem in Heterogeneous
Federated Optimization, NeurIPS 2020, https://arxiv.org/abs/2007.07481, equation 7 for plain SGD.

When to take it: hospitals of different size train for the same number of passes, so that the large
ones do many more steps. FedAvg then minimises a loss in which they count twice: by their weight and
by their steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedmed_flower.arrays.linear import linear, single
from fedmed_flower.arrays.views import view
from fedmed_flower.methods.base import Ended, Method, Moved, ServerRound, SiteRound
from fedmed_flower.methods.tensors import copies
from fedmed_flower.settings.text import setting_error

STEPS = "steps"


class FedNova(Method):
    """Each site sends its change per step and the number of steps; the server multiplies both.

    The number of steps of all is what the strategy's rule makes of the sites' numbers: their
    weighted mean, or with `FedMedian` their median. A site could make everybody's step as long as
    it likes by it: ``max_update_norm`` bounds the number as it bounds the change.
    """

    name = "fednova"
    sgd = True
    private = True

    def begin(self, site: SiteRound) -> None:
        """Remember the global model."""
        self._start = copies(site.parameters)
        self._steps = 0

    def after_step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Count the step."""
        self._steps += 1

    @torch.no_grad()
    def end(self, site: SiteRound) -> Ended:
        """Divide the change of the model by the number of steps."""
        steps = max(1, self._steps)
        for name, parameter in site.parameters.items():
            start = self._start[name]
            parameter.copy_(start + (parameter - start) / steps)
        sent = site.received[STEPS][STEPS]
        return Ended({}, {STEPS: {STEPS: torch.full_like(sent, float(steps))}})

    def companions(self, model: ArrayRecord, trained: Sequence[str]) -> dict[str, ArrayRecord]:
        """Return a record for the number of steps.

        Raises
        ------
        InputError
            If the model has 16 bits: the change of one step is lost in their rounding.
        """
        for key in trained:
            if view(model[key]).dtype.itemsize < 4:
                raise setting_error(
                    f"fednova sends the change of the model per step, which {key} cannot hold in "
                    "16 bits: take a model of 32 bits, or another method",
                    "method",
                )
        return {STEPS: single(STEPS, 0.0)}

    def move(self, server: ServerRound) -> Moved:
        """Multiply the rule's change of the model by the rule's number of steps."""
        # No honest site does less than one: a hostile one must not turn the step around.
        steps = max(1.0, float(view(server.companions[STEPS][STEPS])[0]))
        terms = [(steps, server.model), (1 - steps, server.sent)]
        return Moved(linear(terms, keys=server.trained), {STEPS: single(STEPS, 0.0)})
