"""The server's side of every question: asking sites, screening replies, recording runs."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.server.listener import Listener as Listener
    from fedmed_flower.server.run_folder import RunFolder as RunFolder

__getattr__, __all__ = on_demand(
    __name__,
    {
        "Listener": "listener",
        "RunFolder": "run_folder",
    },
)
