"""A run from its first question to its report."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.runs.experiment import federate
    from fedmed_flower.settings.plan import Plan

__all__ = [
    "Plan",
    "federate",
]

__getattr__ = on_demand(
    __name__,
    {
        "Plan": "experiment",
        "federate": "experiment",
    },
)
