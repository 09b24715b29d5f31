"""The page, the pictures and the tables of a finished run."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.reports.report import write_report

__all__ = [
    "write_report",
]

__getattr__ = on_demand(
    __name__,
    {
        "write_report": "report",
    },
)
