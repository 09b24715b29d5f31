"""Boosted trees over hospitals' tables."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.trees.server import grow as grow

__getattr__, __all__ = on_demand(
    __name__,
    {
        "grow": "server",
    },
)
