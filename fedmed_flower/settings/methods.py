"""Settings of methods for hospitals that differ."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.allowed import Matching, Within
from fedmed_flower.settings.section import Section, setting


@dataclass(frozen=True)
class MethodSettings(Section):
    """How hospitals that differ are trained together."""

    method: str = setting(
        "",
        "What sites do beside plain training: fedprox, scaffold, feddyn, fednova, cyclic, ditto, "
        "apfl, fedrep, moon, or the name of a method that the app has registered. Empty: nothing.",
        Matching(r"[a-z0-9-]{0,64}", "a name in small letters, or empty", ("SCAFFOLD", "a b")),
    )
    keep: str = setting(
        "",
        "Layers that are trained and stay different at each site: `norm` for all normalisation "
        "layers (FedBN), or patterns for the names of parameters and buffers, with commas between "
        "them, such as head.*. Empty: none.",
    )
    keep_sent: bool = setting(
        True,
        "Whether kept layers are sent to the server too, where their mean is part of the global "
        "model. If not, the global model holds them as they were at the start.",
    )


@dataclass(frozen=True)
class FedProxSettings(Section):
    """FedProx."""

    proximal_mu: float = setting(
        0.01, "Pull of the global model on each site's, for fedprox. 0: none.", Within(0.0)
    )


@dataclass(frozen=True)
class FedDynSettings(Section):
    """FedDyn."""

    dyn_alpha: float = setting(
        0.1,
        "Weight of the quadratic term of feddyn: the more local steps, the less.",
        Within(0.0, above=True),
    )


@dataclass(frozen=True)
class DittoSettings(Section):
    """Ditto."""

    ditto_lambda: float = setting(
        0.1,
        "Pull of the global model on the site's own, for ditto. 0: each site for itself.",
        Within(0.0),
    )


@dataclass(frozen=True)
class APFLSettings(Section):
    """APFL."""

    apfl_alpha: float = setting(
        0.5,
        "Share of a site's own model in its mixture with the global one, for apfl, at the start.",
        Within(0.0, 1.0),
    )
    apfl_adaptive: bool = setting(True, "Whether apfl-alpha is learned at each site.")


@dataclass(frozen=True)
class FedRepSettings(Section):
    """FedRep."""

    fedrep_head_epochs: int = setting(
        1,
        "How often the kept layers are trained before the others, each time for local-epochs or "
        "local-steps, for fedrep.",
        Within(1, 10_000),
        "times",
    )


@dataclass(frozen=True)
class MoonSettings(Section):
    """MOON."""

    moon_mu: float = setting(1.0, "Weight of the contrastive term of moon.", Within(0.0))
    moon_temperature: float = setting(
        0.5, "Temperature of the contrastive term of moon.", Within(0.0, above=True)
    )
    moon_layer: str = setting(
        "",
        "The layer whose input is the representation that moon compares. Empty: the last layer "
        "with weights.",
    )
