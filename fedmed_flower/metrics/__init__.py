"""Metrics of one hospital, and of all hospitals from what each sends."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.metrics.classification import classification_metrics
    from fedmed_flower.metrics.outcomes import outcome_metrics
    from fedmed_flower.metrics.pooling import pool
    from fedmed_flower.metrics.segmentation import mask_scores, site_scores
    from fedmed_flower.metrics.survival import concordance_index, integrated_brier_score

__all__ = [
    "classification_metrics",
    "concordance_index",
    "integrated_brier_score",
    "mask_scores",
    "outcome_metrics",
    "pool",
    "site_scores",
]

__getattr__ = on_demand(
    __name__,
    {
        "classification_metrics": "classification",
        "concordance_index": "survival",
        "integrated_brier_score": "survival",
        "mask_scores": "segmentation",
        "outcome_metrics": "outcomes",
        "pool": "pooling",
        "site_scores": "segmentation",
    },
)
