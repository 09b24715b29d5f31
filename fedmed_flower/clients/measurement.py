"""A client that reads a number from an image, such as an age, an angle or a score."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed_flower.clients.targets import Unit, unit_of_range
from fedmed_flower.clients.whole_image import Outputs, WholeImageClient
from fedmed_flower.data.bounded import quoted
from fedmed_flower.data.checks import Finding, check_row
from fedmed_flower.data.site import Row, SiteData
from fedmed_flower.errors import InputError
from fedmed_flower.metrics.names import NOISED_ERRORS
from fedmed_flower.metrics.outcomes import (
    noised_error_metrics,
    noised_errors,
    outcome_metrics,
)

_TASK = "continuous"


class MeasurementClient(WholeImageClient):
    """Trains a network that reads a number from an image.

    A subclass defines `low`, `high`, `load_data` and, unless the run config names a network,
    `build_model`, which returns a network with one output. The output is of the order of 1,
    whatever the number's unit: 0 stands for the middle of the range, 2 for `high`, -2 for `low`.
    Rows are dicts:

    - ``image``: as for `ClassificationClient`;
    - ``label``: a number from `low` to `high`;
    - ``patient``: anything hashable.

    Hooks
    -----
    transforms, intensity, random_transforms, augment, loss
        As in `WholeImageClient`. The loss is given outputs (batch, 1) and labels (batch,), both in
        the unit of the output.

    Attributes
    ----------
    low, high : float
        The lowest and the highest possible number: stated, not taken from the data. Rows with
        another number are left out.
    unit : str
        What the number is measured in, such as months.
    spatial_dims, modality, cam_layer
        As in `WholeImageClient`.
    """

    low: float = math.nan
    high: float = math.nan
    unit: str = ""
    _mislabelled: ClassVar[str] = "no such number"
    _remedy: ClassVar[str] = "give numbers in one unit, or declare another low and high"

    def loss(self) -> nn.Module:
        """Return the training loss, Huber's: squared up to an eighth of the range, then linear.

        Huber, Robust Estimation of a Location Parameter, Annals of Mathematical Statistics 35,
        1964, https://doi.org/10.1214/aoms/1177703732.
        """
        return _Huber()

    @property
    def scale(self) -> Unit:
        """How an output becomes a number: number = factor * output + shift."""
        return unit_of_range(self.low, self.high)

    def check(self, data: SiteData) -> None:
        """Raise `InputError` if a setting or an attribute is out of its range."""
        super().check(data)
        if not (_is_number(self.low) and _is_number(self.high) and self.low < self.high):
            raise InputError(
                "low and high must be the lowest and the highest possible number, such as low = 0 "
                f"and high = 228 for a bone age in months, got {self.low!r} and {self.high!r}"
            )

    @property
    def _checking(self) -> dict[str, Any]:
        return {"spatial_dims": self.spatial_dims, "low": self.low, "high": self.high}

    def _checked(self, row: Row) -> Finding:
        whole = isinstance(row, Mapping) and "label" in row
        found = check_row({**row, "label": 0} if whole else row, self.spatial_dims, masks=False)
        if found.problem is not None or self._fits(row["label"]):
            return found
        problem = (
            f"label {quoted(row['label'])} must be a number from {self.low:g} to {self.high:g} "
            "(low and high)"
        )
        return replace(found, problem=problem, mislabelled=True)

    def _fits(self, label: Any) -> bool:
        return _is_number(label) and self.low <= label <= self.high

    def _made_up_label(self, number: int, sides: Sequence[int], rng: np.random.Generator) -> Any:
        return float(rng.uniform(self.low, self.high))

    def _labels(self, rows: Sequence[Row]) -> Tensor:
        """Return the labels of rows in the unit of the output."""
        numbers = torch.tensor([float(row["label"]) for row in rows], dtype=torch.float64)
        return ((numbers - self.scale.shift) / self.scale.factor).to(torch.float32)

    @property
    def _widths(self) -> tuple[int, ...]:
        return (1,)

    @property
    def _predicted(self) -> str:
        return "a number needs"

    def answers(self, outputs: Outputs) -> NDArray[np.float64]:
        """Return the numbers, (n, 1), from the network's outputs."""
        return self.scale.factor * outputs.astype(np.float64) + self.scale.shift

    def metrics_of_rows(
        self, outputs: Outputs, labels: NDArray[Any], rows: Sequence[Row]
    ) -> dict[str, Any]:
        """Return ``mae``, ``rmse`` and ``r2``, and the sums from which they follow, in the unit."""
        return outcome_metrics(_TASK, self.answers(labels), self.answers(outputs))

    def _noised(
        self, outputs: Outputs, labels: NDArray[Any], patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        numbers = self.answers(labels)
        limits = (self.low, self.high)
        sums = noised_errors(_TASK, numbers, self.answers(outputs), limits, patients, noise)
        return noised_error_metrics(sums) | {NOISED_ERRORS: sums}

    def _scores(self, outputs: Tensor) -> Tensor:
        return outputs

    def _caption(
        self, output: NDArray[np.float32], label: NDArray[Any], worst: bool
    ) -> tuple[str, int]:
        truth = float(self.answers(label))
        given = float(self.answers(output)[0])
        unit = f" {self.unit}" if self.unit else ""
        return f"{truth:.4g}{unit}, given {given:.4g}", 0


class _Huber(nn.Module):
    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the batch."""
        return nn.functional.huber_loss(outputs[:, 0], labels.to(outputs.dtype), delta=0.5)


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return is_real and math.isfinite(value)
