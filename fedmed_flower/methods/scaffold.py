"""SCAFFOLD: each site corrects its steps by how its gradient differs from that of all.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: SCAFFOLD: Stochastic Controlled Averaging for
Federated Learning, ICML 2020, https://arxiv.org/abs/1910.06378, algorithm 1 with option II.

When to take it: FedAvg with several local steps ends at another optimum than pooled training, since
each site drifts to its own; SCAFFOLD removes that drift. It needs plain SGD, and twice the bytes.

One difference: the paper's server averages control variates uniformly. Here they are weighted as
the model is; uniform ones pull a run of unequal hospitals to the optimum of another weighting.
A site's weight is that of its first reply, also if its number of patients changes later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedmed_flower.arrays.linear import linear, zeros_like
from fedmed_flower.methods.base import Ended, Method, Moved, ServerRound, SiteRound, Tensors
from fedmed_flower.methods.tensors import copies

CONTROL = "control"


class Scaffold(Method):
    """Control variates ``c`` of the server and ``c_i`` of each site; each starts at 0."""

    name = "scaffold"
    sgd = True
    private = True
    needs_kept = True

    def begin(self, site: SiteRound) -> None:
        """Compute the correction of this round's steps, ``c - c_i``."""
        control = site.received[CONTROL]
        self._names = [name for name in site.shared if name in control]
        zero = {name: control[name].new_zeros(control[name].shape) for name in self._names}
        self._own: Tensors = {name: site.kept.get(name, zero[name]) for name in self._names}
        self._correction = {name: control[name] - self._own[name] for name in self._names}
        self._start = copies(site.parameters)
        self._steps = 0

    def before_step(self, model: nn.Module) -> None:
        """Add the correction to the gradients; a parameter that was not used has gradient 0."""
        for name, parameter in model.named_parameters():
            if name not in self._correction:
                continue
            if parameter.grad is None:
                parameter.grad = self._correction[name].clone()
            else:
                parameter.grad.add_(self._correction[name])

    def after_step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Count the step."""
        self._steps += 1

    def end(self, site: SiteRound) -> Ended:
        """Make the next ``c_i`` of the mean step, and return ``c`` plus its change."""
        parameters = site.parameters
        taken = max(1, self._steps) * site.learning_rate
        kept = {}
        returned = dict(site.received[CONTROL])
        for name in self._names:
            mean = (self._start[name] - parameters[name].detach()) / taken
            kept[name] = mean - self._correction[name]
            returned[name] = returned[name] + (kept[name] - self._own[name])
        return Ended(kept, {CONTROL: returned})

    def companions(self, model: ArrayRecord, trained: Sequence[str]) -> dict[str, ArrayRecord]:
        """Return the server's control variates of the first round: zeros."""
        return {CONTROL: zeros_like(model, trained)}

    def move(self, server: ServerRound) -> Moved:
        """Move ``c`` by what the rule made of the changes, for the sites that replied."""
        before = server.before[CONTROL]
        after = server.companions[CONTROL]
        control = linear([(server.retained - server.share, before), (server.share, after)])
        return Moved(server.model, {CONTROL: control})
