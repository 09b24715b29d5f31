"""Federated statistics: counts, moments, quantiles and curves of tables that nobody shares."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.statistics.drift import ks as ks
    from fedmed_flower.statistics.drift import psi as psi
    from fedmed_flower.statistics.request import Request as Request
    from fedmed_flower.statistics.request import parse_filter as parse_filter
    from fedmed_flower.statistics.server import ask as ask
    from fedmed_flower.statistics.server import survey as survey

__getattr__, __all__ = on_demand(
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
