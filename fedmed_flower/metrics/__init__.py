"""Metrics of one hospital, and of all hospitals from the counts and sums that each sends."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.metrics.classification import (
        classification_metrics as classification_metrics,
    )
    from fedmed_flower.metrics.outcomes import outcome_metrics as outcome_metrics
    from fedmed_flower.metrics.pooling import pool as pool
    from fedmed_flower.metrics.segmentation import mask_scores as mask_scores
    from fedmed_flower.metrics.segmentation import site_scores as site_scores
    from fedmed_flower.metrics.survival import concordance_index as concordance_index
    from fedmed_flower.metrics.survival import integrated_brier_score as integrated_brier_score

__getattr__, __all__ = on_demand(
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
