"""Networks, their losses, and the form in which a model travels."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.models.networks import build_network as build_network

__getattr__, __all__ = on_demand(
    __name__,
    {
        "build_network": "networks",
    },
)
