"""Settings of how tables are prepared, modelled and reported."""

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
        Source of means, scales and lists of categories. ``federated``: all hospitals' training
        rows, reported before the first round. ``site``: each hospital's own rows; then all
        categories must be declared. ``declared``: the schema's ``ranges`` and ``categories`` alone,
        so that nothing is learnt from patients, as privacy needs it. A numeric target has the mean
        and scale of the reports if there are any, else those of its declared range.
    tabular_network : {"linear", "mlp", "residual"}
        Linear (or logistic) regression, or a network of `network_depth` layers or blocks.
    network_width : int
        Width of a layer; from 1 to 16,384. Its square times `network_depth` is at most 2^28. It has
        no effect on ``linear``.
    network_depth : int
        From 1 to 1,000. It has no effect on ``linear``.
    network_dropout : float
        Share of dropped values; in [0, 1).
    report_by : str
        Columns, separated by commas: metrics are also reported for each of their values. Example:
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
