"""How tables are prepared, modelled and reported."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.allowed import OneOf, Within
from fedmed_flower.settings.section import Section, setting

KINDS = ("linear", "mlp", "residual")
_MOST_WIDTH = 2**14
_MOST_WEIGHTS = 2**28


@dataclass(frozen=True)
class TabularSettings(Section):
    """How tables are prepared, modelled and reported."""

    preparation: str = setting(
        "federated",
        "The source of means, scales and lists of categories. federated: all hospitals' training "
        "rows, reported before the first round. site: each hospital's own; all categories must "
        "then be declared. declared: the schema's ranges and categories alone, so that nothing is "
        "learnt from patients, as privacy needs it. A number to predict has the mean and scale "
        "that all hospitals report, or those of its declared range.",
        OneOf(("federated", "site", "declared")),
    )
    tabular_network: str = setting(
        "linear",
        "Linear or logistic regression, or a network of network-depth layers or residual blocks.",
        OneOf(KINDS),
    )
    network_width: int = setting(
        64,
        "Units of a layer. Squared and times network-depth it is at most "
        f"{_MOST_WEIGHTS:,}. No effect on linear.",
        Within(1, _MOST_WIDTH),
        "units",
    )
    network_depth: int = setting(
        2, "Layers or blocks. No effect on linear.", Within(1, 1000), "layers"
    )
    network_dropout: float = setting(
        0.0, "Share of units left out in a step.", Within(0.0, 1.0, below=True)
    )
    report_by: str = setting(
        "",
        "Columns, with commas between them, for whose values the metrics are reported apart, such "
        "as sex,age-band.",
    )

    def check(self) -> None:
        """Refuse a network that no hospital could hold."""
        self.require(
            "network_width",
            self.network_width**2 * self.network_depth <= _MOST_WEIGHTS,
            f"at most {_MOST_WIDTH} and, squared and times network-depth, at most "
            f"{_MOST_WEIGHTS:,}",
        )

    @property
    def groups(self) -> tuple[str, ...]:
        """The columns of `report_by`."""
        return tuple(name.strip() for name in self.report_by.split(",") if name.strip())
