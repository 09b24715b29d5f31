"""How tables are prepared, modelled and reported."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.section import Section

_PREPARATIONS = ("federated", "site", "declared")
KINDS = ("linear", "mlp", "residual")


@dataclass(frozen=True)
class TabularSettings(Section):
    """How tables are prepared, modelled and reported, from the run config.

    Attributes
    ----------
    preparation : {"federated", "site", "declared"}
        If means, scales and lists of categories come from: from all hospitals' training rows,
        told before the first round; from each hospital's own (all categories must then be
        declared); or from the schema's ``ranges`` and ``categories`` alone, so that nothing is
        learnt from patients, as privacy needs it. A number to predict has the mean and scale that
        all hospitals tell, and else those of its declared range.
    tabular_network : {"linear", "mlp", "residual"}
        Linear (or logistic) regression, or a network of `network_depth` layers or blocks.
    network_width, network_depth : int
        From 1 to 65,536 and to 1,000; no effect on ``linear``.
    network_dropout : float
        In [0, 1).
    report_by : str
        Columns, with commas between them, for whose values the figures are reported apart, such as
        ``sex,age-band``.
    """

    preparation: str = "federated"
    tabular_network: str = "linear"
    network_width: int = 64
    network_depth: int = 2
    network_dropout: float = 0.0
    report_by: str = ""

    def __post_init__(self) -> None:
        known = ", ".join(_PREPARATIONS)
        self.require("preparation", self.preparation in _PREPARATIONS, f"one of {known}")
        kinds = f"one of {', '.join(KINDS)}"
        self.require("tabular_network", self.tabular_network in KINDS, kinds)
        self.require_within(1, 2**14, "network_width")
        self.require_within(1, 1000, "network_depth")
        weights = self.network_width**2 * self.network_depth
        self.require(
            "network_width",
            weights <= 2**28,
            f"at most {2**14} and, squared and times network-depth, at most {2**28:,}",
        )

    @property
    def groups(self) -> tuple[str, ...]:
        """The columns of `report_by`."""
        return tuple(name.strip() for name in self.report_by.split(",") if name.strip())
