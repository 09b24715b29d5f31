"""FedRep: hospitals share the layers that describe a patient, and each has its own last layers.

Collins, Hassani, Mokhtari, Shakkottai: Exploiting Shared Representations for Personalized Federated
Learning, ICML 2021, https://arxiv.org/abs/2102.07078, algorithm 1.

When to take it: hospitals agree on what is seen in a patient and differ in what follows from it,
such as other prevalences or coding habits. `keep` names the last layers.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from fedmed_flower.methods.base import Method, SiteRound
from fedmed_flower.settings.methods import FedRepSettings
from fedmed_flower.settings.text import setting_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fedmed_flower.settings.training import Settings


class FedRep(Method):
    """First the kept layers are trained while the shared ones rest, then the other way round.

    Kept layers are taken up and kept by ``keep`` as with every method.
    """

    name = "fedrep"
    section = FedRepSettings

    def require(self, training: Settings, keep: str) -> None:
        """Refuse to run without kept layers."""
        super().require(training, keep)
        if not keep:
            raise setting_error(
                "fedrep needs the layers that stay at each site: set keep to patterns of the last "
                "layers, such as head.*",
                "keep",
            )

    def train(self, site: SiteRound) -> dict[str, Any]:
        """Train the kept layers, then the shared ones; the metrics are those of the latter."""
        shared = set(site.shared)
        named = site.model.named_parameters()
        if not any(p.requires_grad and name not in shared for name, p in named):
            raise setting_error(
                "fedrep trains the kept layers, but keep names none with weights that are trained",
                "keep",
            )
        with _resting(site.model, shared):
            for epoch in range(self.settings.fedrep_head_epochs):
                site.fit(site.model, Method(), f"head {epoch}" if epoch else "head")
        with _resting(site.model, {n for n, _ in site.model.named_parameters()} - shared):
            return site.fit(site.model, self, "")


@contextmanager
def _resting(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Keep some parameters as they are while the context lasts."""
    trained = [p for name, p in model.named_parameters() if name in names and p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
