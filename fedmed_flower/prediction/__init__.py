"""Use of a model after its run: what a prediction needs, predictions for files, other formats."""

from typing import TYPE_CHECKING

from fedmed_flower.exports import on_demand

if TYPE_CHECKING:
    from fedmed_flower.prediction.predictor import Predictor as Predictor

__getattr__, __all__ = on_demand(
    __name__,
    {
        "Predictor": "predictor",
    },
)
