"""A client for the time until an event, such as death or a relapse."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from flwr.app import Context
from numpy.typing import NDArray

from fedmed_flower.clients.tabular import TableRows, TabularClient
from fedmed_flower.data.rows import column_of
from fedmed_flower.data.site import Row, SiteData, all_rows, min_cell_count, patients_of
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.metrics.classification import noised_counts, noised_metrics
from fedmed_flower.metrics.names import NOISED, PAIRS
from fedmed_flower.metrics.survival import (
    breslow,
    concordance,
    followed,
    integrated_brier_score,
    survival_of_cox,
)
from fedmed_flower.models.device import torch_device
from fedmed_flower.settings.registry import Sections
from fedmed_flower.settings.survival import SurvivalSettings
from fedmed_flower.settings.text import setting_error
from fedmed_flower.statistics.values import cells_of, numbers_of

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger("flwr.fedmed")
# Number of times, between 0 and the horizon, over which the Brier score is integrated.
_NUM_TIMES = 50


class SurvivalClient(TabularClient):
    """Predicts the time until an event from the columns of a table.

    The schema has ``task="survival"``, the time as its target, and a column for the event. The
    metrics are ``c-index``, Harrell's concordance index among each hospital's own patients, and, if
    a horizon is set, ``integrated-brier``.

    Attributes
    ----------
    survival : SurvivalSettings
        From the run config.
    """

    sections: ClassVar[Sections] = (SurvivalSettings,)
    # All risks start equal, so that the few steps of a private run need not undo a random guess.
    zeros = True

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.survival = SurvivalSettings.from_run_config(context.run_config)

    def build_model(self) -> nn.Module:
        """Return the network of the log hazard; ``discrete`` adds a number for each interval.

        Raises
        ------
        InputError
            If ``survival-loss`` is ``cox`` in a private run: Cox's partial likelihood compares
            patients with each other.
        """
        from fedmed_flower.models.survival import Hazards

        network = super().build_model()
        self._require_uncoupled()
        if self.survival.survival_loss == "cox":
            return network
        return Hazards(network, self.survival.survival_intervals)

    def check_private(self, model: nn.Module, probe: Mapping[str, Tensor]) -> None:
        """Raise `InputError` as `TabularClient` does, and for Cox's partial likelihood."""
        self._require_uncoupled()
        super().check_private(model, probe)

    def _require_uncoupled(self) -> None:
        if self.privacy.on and self.survival.survival_loss == "cox":
            raise setting_error(
                'survival-loss="cox" compares patients with each other: privacy="patient" needs '
                'survival-loss="discrete"',
                "survival-loss",
            )

    def check(self, data: SiteData) -> None:
        """Raise `InputError` if the schema is for another task, or a row lacks a column."""
        if self.schema.task != "survival":
            raise InputError(
                f'{type(self).__name__} needs a schema with task="survival", got '
                f"{self.schema.task!r}"
            )
        super().check(data)

    def warn(self, data: SiteData) -> None:
        """Log that hardly anybody is followed up to the horizon; no patient's time is named."""
        horizon = self.survival.survival_horizon
        rows = all_rows(data)
        # Rows of a private run need not be valid.
        times = numbers_of(cells_of(rows, self.schema.target))
        patients = patients_of(rows)
        minimum = min_cell_count(self.context, self.site)
        if horizon and followed(times, patients, horizon) < minimum:
            log.warning(
                "%s: fewer than %d patients are followed up to survival-horizon=%g: what is "
                "predicted of that time rests on hardly any patient here. Set a shorter horizon",
                self.site.name,
                minimum,
                horizon,
            )

    def targets(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return ``time`` and ``event`` of the rows, as numbers."""
        import torch

        columns = {"time": self.schema.target, "event": self.schema.event}
        return {
            name: torch.tensor([float(cell) for cell in column_of(rows, column)])
            for name, column in columns.items()
        }

    def loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss over a batch with ``time`` and ``event``."""
        from fedmed_flower.models.survival import cox_loss, discrete_time_loss

        if self.survival.survival_loss == "cox":
            return cox_loss(outputs, batch["time"], batch["event"])
        return discrete_time_loss(outputs, batch["time"], batch["event"], self._edges)

    @property
    def _width(self) -> int:
        cox = self.survival.survival_loss == "cox"
        return 1 if cox else self.survival.survival_intervals

    @property
    def _edges(self) -> Tensor:
        import torch

        from fedmed_flower.models.survival import interval_edges

        settings = self.survival
        edges = interval_edges(settings.survival_horizon, settings.survival_intervals)
        return torch.as_tensor(edges, dtype=torch.float32, device=torch_device(self.settings))

    def metrics_of_rows(self, outputs: NDArray[np.float32], prepared: TableRows) -> dict[str, Any]:
        """Return ``c-index`` and the counts of pairs behind it."""
        times, events = _times(prepared)
        counts = concordance(times, events, self._risks(outputs))
        metrics: dict[str, Any] = {"num-examples": len(prepared), PAIRS: [float(n) for n in counts]}
        concordant, tied, comparable = counts
        if comparable:
            metrics["c-index"] = (concordant + tied / 2) / comparable
        return metrics

    def measure(self, model: nn.Module, prepared: TableRows) -> dict[str, Any]:
        """Return ``loss``, ``c-index`` (by group too) and ``integrated-brier``."""
        metrics = super().measure(model, prepared)
        if self.survival.survival_horizon and self.data(self.pooled).train:
            score = self._integrated_brier(model, prepared)
            if score is not None:
                metrics["integrated-brier"] = score
        return metrics

    def figures(self, model: nn.Module, split: str) -> dict[str, Any]:
        """Return the names of what `measure` returns; patients' times decide about none of them."""
        figures = super().figures(model, split)
        if self.survival.survival_horizon and not self.noises_metrics:
            figures["integrated-brier"] = 0.0
        return figures

    def _integrated_brier(self, model: nn.Module, prepared: TableRows) -> float | None:
        """Return the integrated Brier score; None if the hospital's training rows may not be used.

        The censoring, and for Cox the baseline hazard, are estimated from the training rows. In a
        private run these must not be used without noise, so the censoring is estimated from the
        measured rows.
        """
        from fedmed_flower.models.survival import survival_from_hazards

        settings = self.survival
        if not self.privacy.on:
            try:
                self.require_usable(self.prepared("train", self.pooled)[0].train)
            except DeclinedError as error:
                log.info("%s: no integrated Brier score: %s", self.site.name, error)
                return None
        grid = np.linspace(0.0, settings.survival_horizon, _NUM_TIMES + 1)[1:]
        train = prepared if self.privacy.on else self.prepared("train", self.pooled)[1]
        outputs = self.predict(model, prepared)
        if settings.survival_loss == "cox":
            baseline = breslow(*_times(train), self.predict(model, train)[:, 0])
            curves = survival_of_cox(baseline, outputs[:, 0], grid)
        else:
            steps = survival_from_hazards(outputs)
            edges = self._edges.cpu().numpy()
            curves = np.stack([np.interp(grid, edges, curve) for curve in steps])
        return integrated_brier_score(*_times(train), *_times(prepared), curves, grid)

    def _risks(self, outputs: NDArray[np.float32]) -> NDArray[Any]:
        """Return one number for each row, higher for an earlier event."""
        from fedmed_flower.models.survival import risk_from_hazards

        if self.survival.survival_loss == "cox":
            return outputs[:, 0]
        risks: NDArray[Any] = np.asarray(risk_from_hazards(outputs))
        return risks

    def require_measurable(self) -> None:
        """Raise `InputError` if the loss gives no probability of an event before the horizon."""
        if self.survival.survival_loss == "cox":
            raise setting_error(
                'metrics with noise need survival-loss="discrete", got "cox"', "survival-loss"
            )

    def measure_privately(
        self, model: nn.Module, prepared: TableRows, patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        """Return how well the risk predicts an event before the horizon, by counts with noise.

        Patients who are censored before the horizon are not counted.
        """
        from fedmed_flower.models.survival import survival_from_hazards

        indices, outputs = self._predict_alone(model, prepared)
        times, events = (part[indices] for part in _times(prepared))
        before = (times <= self.survival.survival_horizon) & (events == 1)
        known = before | (times > self.survival.survival_horizon)
        alive = survival_from_hazards(outputs)[:, -1].clip(1e-6, 1 - 1e-6)
        scores = np.log((1 - alive) / alive)
        patient_of_row = [
            patients[index] for index, counted in zip(indices, known, strict=True) if counted
        ]
        counts = noised_counts(before[known], scores[known, None], patient_of_row, noise)
        return noised_metrics(counts) | {NOISED: counts}


def _times(prepared: TableRows) -> tuple[NDArray[Any], NDArray[Any]]:
    return prepared.inputs["time"].cpu().numpy(), prepared.inputs["event"].cpu().numpy()
