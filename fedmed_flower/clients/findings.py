"""A client that looks for several findings in an image, each of which may be there or not."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Hashable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor, nn

from fedmed_flower.clients.whole_image import Outputs, WholeImageClient
from fedmed_flower.data.checks import Finding
from fedmed_flower.data.findings import check_findings, is_unread, read_in
from fedmed_flower.data.site import Row, SiteData, min_cell_count, patients_of, some_of
from fedmed_flower.errors import InputError
from fedmed_flower.metrics.findings import finding_metrics, noised_findings

log = logging.getLogger("flwr.fedmed")

_MOST_LETTERS = 80
# Letters that separate parts of a metric's name.
_RESERVED = "@="


class FindingsClient(WholeImageClient):
    """Trains a network that looks for several findings in an image.

    A subclass defines `findings`, `load_data` and, unless the run config names a network,
    `build_model`, which returns a network with one output for each finding: its log-odds. Rows are
    dicts:

    - ``image``: as for `ClassificationClient`;
    - ``label``: a dict by finding of 1 (there), 0 (not there) or None (not read). A finding that
      the dict lacks was not read. `load_folder` makes such dicts of the columns of a table:
      ``load_folder(folder, seed, labels=self.findings)``;
    - ``patient``: anything hashable.

    A finding that was not read in a row gives no loss and no figure. Each finding is measured on
    the rows in which it was read, at the hospitals that read it: ``auc@finding=edema``. It needs
    `min-cell-count` patients at a hospital.

    Hooks
    -----
    transforms, intensity, random_transforms, augment, loss
        As in `WholeImageClient`.

    Attributes
    ----------
    findings : tuple of str
        What to look for.
    spatial_dims, modality, cam_layer
        As in `WholeImageClient`.
    """

    findings: tuple[str, ...]
    _mislabelled: ClassVar[str] = "no findings"
    _remedy: ClassVar[str] = "give 1, 0 or nothing for each finding that the client names"

    def loss(self) -> nn.Module:
        """Return the training loss: binary cross entropy over what was read.

        It is summed over the findings of an image and divided by the number of all findings, so
        that a hospital that reads few of them has no more weight in these.
        """
        return _ReadCrossEntropy()

    def check(self, data: SiteData) -> None:
        """Raise `InputError` if a setting or an attribute is out of its range."""
        super().check(data)
        names = self.findings
        several = not isinstance(names, str) and 0 < len(names) == len({*names})
        if not several or not all(map(_is_name, names)):
            raise InputError(
                "findings must be a tuple of one or more different names, each of at most "
                f"{_MOST_LETTERS} printable letters without @ and =, got {names!r}"
            )

    def warn(self, data: SiteData) -> None:
        """Log the findings that nobody read in the training rows."""
        read = {name for row in data.train for name in read_in(row.get("label"))}
        if unread := [name for name in self.findings if name not in read]:
            log.warning("%s: no training row says of %s", self.site.name, some_of(unread))

    @property
    def _checking(self) -> dict[str, Any]:
        return {"spatial_dims": self.spatial_dims, "findings": tuple(self.findings)}

    def _checked(self, row: Row) -> Finding:
        return check_findings(row, self.spatial_dims, self.findings)

    def _made_up_label(self, number: int, sides: Sequence[int], rng: np.random.Generator) -> Any:
        return {name: (number + index) % 2 for index, name in enumerate(self.findings)}

    def _labels(self, rows: Sequence[Row]) -> Tensor:
        values = [[_value_of(row["label"].get(name)) for name in self.findings] for row in rows]
        return torch.tensor(values, dtype=torch.float32).reshape(-1, len(self.findings))

    @property
    def _widths(self) -> tuple[int, ...]:
        return (len(self.findings),)

    @property
    def _predicted(self) -> str:
        return f"{len(self.findings)} findings need"

    def metrics_of_rows(
        self, outputs: Outputs, labels: NDArray[Any], rows: Sequence[Row]
    ) -> dict[str, Any]:
        """Return the metrics of `finding_metrics`, of findings that enough patients have."""
        patients = patients_of(rows)
        reported = self._reported(labels, rows, patients)
        coarse = self.node.coarse_figures
        return finding_metrics(self.findings, labels, outputs, patients, reported, coarse)

    def _reported(
        self, labels: NDArray[Any], rows: Sequence[Row], patients: Sequence[str]
    ) -> list[Collection[int]]:
        """Return for each finding the rows by which it may be measured.

        At a real hospital its book decides which: rows that are new since earlier figures of a
        finding are left out while they are of too few patients.
        """
        minimum = min_cell_count(self.context, self.site)
        read = [set(np.flatnonzero(~np.isnan(of_finding)).tolist()) for of_finding in labels.T]
        if not self.site.simulated:
            with self.open_book({}, minimum) as book:
                for number, name in enumerate(self.findings):
                    mask = book.mask_of({id(rows[index]) for index in read[number]})
                    usable = book.study(f"the finding {name}", mask)
                    admitted: set[int] = set()
                    if usable is not None:
                        pairs = zip(book.rows, usable, strict=True)
                        admitted = {id(row) for row, is_usable in pairs if is_usable}
                    read[number] = {i for i in read[number] if id(rows[i]) in admitted}
        enough: list[Collection[int]] = []
        for name, indices in zip(self.findings, read, strict=True):
            few = len({patients[index] for index in indices}) < minimum
            if few:
                log.info("%s: %s was read in too few patients", self.site.name, name)
            enough.append(() if few else indices)
        return enough

    def figures(self, model: nn.Module, split: str) -> dict[str, Any]:
        """Return the names of what `measure` returns, with those of all findings."""
        if self.noises_metrics:
            return super().figures(model, split)
        self.require_named()
        rows = self.made_up(2)
        outputs, labels = self._outputs_and_labels(model, self.prepare(rows, train=False))
        every = [range(len(rows))] * len(self.findings)
        metrics = finding_metrics(self.findings, labels, outputs, patients_of(rows), every)
        return metrics | {"loss": 0.0}

    def _noised(
        self, outputs: Outputs, labels: NDArray[Any], patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        return noised_findings(self.findings, labels, outputs, patients, noise)

    def _scores(self, outputs: Tensor) -> Tensor:
        return outputs

    def _caption(
        self, output: NDArray[np.float32], label: NDArray[Any], worst: bool
    ) -> tuple[str, int]:
        """Name the likeliest finding; of the worst case, the one that adds most to the loss."""
        shares = expit(output)
        off = np.nan_to_num(np.abs(shares - label), nan=-1.0)
        number = int(np.argmax(off if worst else shares))
        truth = "not read" if np.isnan(label[number]) else ("there" if label[number] else "absent")
        return f"{self.findings[number]} ({truth}), given {shares[number]:.0%}", number


class _ReadCrossEntropy(nn.Module):
    def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the batch of the mean over findings, unread ones counting 0."""
        read = ~labels.isnan()
        losses = nn.functional.binary_cross_entropy_with_logits(
            outputs, labels.nan_to_num().to(outputs.dtype), reduction="none"
        )
        return torch.where(read, losses, torch.zeros_like(losses)).mean()


def _is_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and 0 < len(name) <= _MOST_LETTERS
        and name.isprintable()
        and name == name.strip()
        and not {*name} & {*_RESERVED}
    )


def _value_of(value: Any) -> float:
    return math.nan if is_unread(value) else float(value)
