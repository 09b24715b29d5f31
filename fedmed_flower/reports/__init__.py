"""The page, the pictures and the tables of a finished run."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.reports.report import write_report as write_report

__getattr__, __all__ = on_demand(
    __name__,
    {
        "write_report": "report",
    },
)
