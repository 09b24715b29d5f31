"""Association studies and polygenic scores over hospitals that share no genotype."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.genomics.client import GenomicsClient as GenomicsClient
    from fedmed_flower.genomics.scores import polygenic_scores as polygenic_scores
    from fedmed_flower.genomics.scores import read_weights as read_weights
    from fedmed_flower.genomics.server import associate as associate

__getattr__, __all__ = on_demand(
    __name__,
    {
        "GenomicsClient": "client",
        "associate": "server",
        "polygenic_scores": "scores",
        "read_weights": "scores",
    },
)
