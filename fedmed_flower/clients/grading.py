"""A client that grades images: classes in an order, such as the stages of a disease."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed_flower.clients.classification import ClassificationClient
from fedmed_flower.clients.whole_image import Outputs
from fedmed_flower.data.site import Row, SiteData, patients_of
from fedmed_flower.errors import InputError
from fedmed_flower.metrics.classification import noised_counts, noised_metrics
from fedmed_flower.metrics.grades import grade_metrics, grade_shares, guessed_grades
from fedmed_flower.metrics.names import NOISED

_FEWEST = 3


class GradingClient(ClassificationClient):
    """Trains a network that grades images.

    A subclass defines `grades`, `load_data` and, unless the run config names a network,
    `build_model`, which returns a network with one output fewer than there are grades. The first
    output is the log-odds that the grade is above the lowest one. Each further output says how much
    lower the log-odds are that it is above the next one: they fall by softplus(output), so that
    they never rise from grade to grade. Rows are those of `ClassificationClient`: ``label`` is the
    number of a grade, from 0.

    The grade that is given is the median: above as many grades as are passed with a probability of
    more than one half.

    Hooks
    -----
    transforms, intensity, random_transforms, augment, loss
        As in `WholeImageClient`. The loss is given the network's outputs and grades (batch,).

    Attributes
    ----------
    grades : tuple of str
        The names of the grades, the lowest first; three or more.
    spatial_dims, modality, cam_layer
        As in `WholeImageClient`.
    """

    grades: tuple[str, ...]

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The number of grades."""
        return len(self.grades)

    @property
    def class_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """What the report calls the classes: the grades."""
        return tuple(self.grades)

    def loss(self) -> nn.Module:
        """Return the training loss: binary cross entropy of "above this grade", a mean over grades.

        Cao, Mirjalili and Raschka, Rank consistent ordinal regression for neural networks,
        Pattern Recognition Letters 140, 2020, https://arxiv.org/abs/1901.07884, equation 4, with
        equal weights. There all grades share the weights of the last layer.
        """
        return _AboveEach()

    def check(self, data: SiteData) -> None:
        """Raise `InputError` if a setting or an attribute is out of its range."""
        super().check(data)
        names = self.grades
        several = not isinstance(names, str) and len(names) == len({*names}) >= _FEWEST
        if not several or not all(isinstance(name, str) and _is_shown(name) for name in names):
            raise InputError(
                f"grades must be a tuple of {_FEWEST} or more different names without @ and =, the "
                f"lowest first (of two grades ClassificationClient makes classes), got {names!r}"
            )

    @property
    def _widths(self) -> tuple[int, ...]:
        return (len(self.grades) - 1,)

    @property
    def _predicted(self) -> str:
        return f"{len(self.grades)} grades need"

    def answers(self, outputs: Outputs) -> NDArray[np.float64]:
        """Return the probability of each grade, (n, grades)."""
        return grade_shares(above_each(torch.from_numpy(outputs).double()).numpy())

    def metrics_of_rows(
        self, outputs: Outputs, labels: NDArray[Any], rows: Sequence[Row]
    ) -> dict[str, Any]:
        """Return the metrics and counts of `grade_metrics`."""
        above = above_each(torch.from_numpy(outputs).double()).numpy()
        coarse = self.node.coarse_figures
        return grade_metrics(self.grades, labels, above, patients_of(rows), coarse)

    def _noised(
        self, outputs: Outputs, labels: NDArray[Any], patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        above = above_each(torch.from_numpy(outputs).double()).numpy()
        logits = np.log(grade_shares(above))
        counts = noised_counts(labels, logits, patients, noise, guessed_grades(above))
        return noised_metrics(counts, ordered=True) | {NOISED: counts}

    def _scores(self, outputs: Tensor) -> Tensor:
        """Return one score, which rises with the grade."""
        return above_each(outputs).mean(dim=1, keepdim=True)

    def _caption(
        self, output: NDArray[np.float32], label: NDArray[Any], worst: bool
    ) -> tuple[str, int]:
        above = above_each(torch.from_numpy(output[None])).numpy()
        return f"{self.grades[int(label)]}, given {self.grades[guessed_grades(above)[0]]}", 0


class _AboveEach(nn.Module):
    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the batch."""
        above = above_each(outputs)
        truth = labels[:, None] > torch.arange(above.shape[1], device=labels.device)
        return nn.functional.binary_cross_entropy_with_logits(above, truth.to(above.dtype))


def above_each(outputs: Tensor) -> Tensor:
    """Return the log-odds that the grade is above 0, 1, ..., which never rise.

    Parameters
    ----------
    outputs : Tensor
        (batch, grades - 1), as the network returns them.

    Returns
    -------
    Tensor
        (batch, grades - 1).
    """
    falls = nn.functional.softplus(outputs[:, 1:]).cumsum(dim=1)
    return torch.cat([outputs[:, :1], outputs[:, :1] - falls], dim=1)


def _is_shown(name: str) -> bool:
    return bool(name.strip()) and name.isprintable() and not {*name} & {*"@="}
