"""Engines that execute a run: in one process, or on Flower's simulation engine."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.engines.local import LocalRun as LocalRun
    from fedmed_flower.engines.local import run_local as run_local

__getattr__, __all__ = on_demand(
    __name__,
    {
        "LocalRun": "local",
        "run_local": "local",
    },
)
