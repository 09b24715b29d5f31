"""A run, from its roll call to its report."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.runs.experiment import federate as federate
    from fedmed_flower.settings.plan import Plan as Plan

__getattr__, __all__ = on_demand(
    __name__,
    {
        "Plan": "experiment",
        "federate": "experiment",
    },
)
