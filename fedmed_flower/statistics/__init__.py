"""Federated statistics: counts, moments, quantiles and curves of tables that nobody shares."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.statistics.drift import ks, psi
    from fedmed_flower.statistics.request import Request, parse_filter
    from fedmed_flower.statistics.server import ask, survey

__all__ = [
    "Request",
    "ask",
    "ks",
    "parse_filter",
    "psi",
    "survey",
]

__getattr__ = on_demand(
    __name__,
    {
        "Request": "request",
        "ask": "server",
        "ks": "drift",
        "parse_filter": "request",
        "psi": "drift",
        "survey": "server",
    },
)
