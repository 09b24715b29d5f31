"""A client that classifies images, 2D and 3D."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed_flower.clients.whole_image import Outputs, WholeImageClient
from fedmed_flower.data.site import Row, SiteData, patients_of
from fedmed_flower.metrics.classification import (
    class_probabilities,
    classification_metrics,
    noised_counts,
    noised_metrics,
)
from fedmed_flower.metrics.names import NOISED


class ClassificationClient(WholeImageClient):
    """Trains a network that classifies images.

    A subclass defines `num_classes`, `load_data` and, unless the run config names a network,
    `build_model`. The network has `num_classes` outputs (cross entropy), or one output for two
    classes (binary cross entropy). Rows are dicts:

    - ``image``: an array of shape (*spatial) or (channels, *spatial), a file that MONAI reads, a
      DICOM file or a folder with a DICOM series, or a list of files that are channels;
    - ``label``: an integer from 0 to ``num_classes - 1``; for two classes, 1 is the finding;
    - ``patient``: anything hashable.

    Hooks
    -----
    transforms, intensity, random_transforms, augment, loss
        As in `WholeImageClient`.

    Attributes
    ----------
    num_classes, spatial_dims, modality, cam_layer
        As in `WholeImageClient`.
    class_names : tuple of str
        What the classes 0, 1, ... are called in the report and its pictures. If there is not one
        for each class, they are called by their numbers.
    """

    class_names: tuple[str, ...] = ()

    def loss(self) -> nn.Module:
        """Return the training loss: cross entropy, or its binary form for one output."""
        return _CrossEntropy()

    def describe(self, data: SiteData) -> dict[str, Any]:
        """Return the number of training rows of each class."""
        labels = [int(row["label"]) for row in data.train]
        return {"labels": np.bincount(labels, minlength=self.num_classes).tolist()}

    def label_of(self, row: Row) -> Hashable | None:
        """Return the class of a row."""
        return str(row.get("label"))

    @property
    def _widths(self) -> tuple[int, ...]:
        return (1, 2) if self.num_classes == 2 else (self.num_classes,)

    @property
    def _predicted(self) -> str:
        return f"{self.num_classes} classes need"

    def metrics_of_rows(
        self, outputs: Outputs, labels: NDArray[Any], rows: Sequence[Row]
    ) -> dict[str, Any]:
        """Return the metrics and counts of `classification_metrics`."""
        coarse = self.node.coarse_figures
        return {**classification_metrics(labels, outputs, patients_of(rows), coarse)}

    def _noised(
        self, outputs: Outputs, labels: NDArray[Any], patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        counts = noised_counts(labels, outputs, patients, noise)
        return noised_metrics(counts) | {NOISED: counts}

    def _scores(self, outputs: Tensor) -> Tensor:
        """Return the log-odds of each class against the rest."""
        if outputs.shape[1] == 1:
            return torch.cat([-outputs, outputs], dim=1)
        rest = [
            torch.cat([outputs[:, :c], outputs[:, c + 1 :]], dim=1).logsumexp(dim=1)
            for c in range(outputs.shape[1])
        ]
        return outputs - torch.stack(rest, dim=1)

    def _caption(
        self, output: NDArray[np.float32], label: NDArray[Any], worst: bool
    ) -> tuple[str, int]:
        number = int(label)
        share = float(class_probabilities(output[None])[0, number])
        named = len(self.class_names) == self.num_classes
        name = self.class_names[number] if named else f"class {number}"
        return f"{name}, given {share:.0%}", number


class _CrossEntropy(nn.Module):
    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the batch."""
        if outputs.shape[1] == 1:
            return nn.functional.binary_cross_entropy_with_logits(
                outputs[:, 0], labels.to(outputs.dtype)
            )
        return nn.functional.cross_entropy(outputs, labels)
