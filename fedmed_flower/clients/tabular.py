"""A client for tables: health records and whatever else has a row a patient or a visit."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.training import predict
from fedmed_flower.config import Section
from fedmed_flower.data.preparing import Preparation, check_contribution, contribution
from fedmed_flower.data.schema import Schema
from fedmed_flower.data.site import SPLITS, Row, SiteData, min_cell_count
from fedmed_flower.errors import InputError
from fedmed_flower.metrics import NOISED, noised_counts, noised_metrics
from fedmed_flower.outcomes import (
    NOISED_ERRORS,
    by_group,
    noised_error_metrics,
    noised_errors,
    outcome_metrics,
)
from fedmed_flower.tabular_networks import tabular_network

log = logging.getLogger("flwr.fedmed")

_PREPARATIONS = ("federated", "site", "declared")
# Tasks with classes, and those whose target is a number that has a scale.
_CLASSED, _SCALED = ("binary", "multi-class"), ("count", "continuous")


@dataclass(frozen=True)
class TabularSettings(Section):
    """How tables are prepared, modelled and reported, from the run config.

    Attributes
    ----------
    preparation : {"federated", "site", "declared"}
        Where means, scales and lists of categories come from: from all hospitals' training rows,
        told before the first round; from each hospital's own (all categories must then be
        declared); or from the schema's ``ranges`` and ``categories`` alone, so that nothing is
        learnt from patients, as privacy needs it. A number to predict has the mean and scale that
        all hospitals tell, and else those of its declared range.
    tabular_network : {"linear", "mlp", "residual"}
        Linear (or logistic) regression, or a network of `network_depth` layers or blocks.
    network_width, network_depth : int
        At least 1; no effect on ``linear``.
    network_dropout : float
        In [0, 1).
    report_by : str
        Columns, with commas between them, for whose values the figures are reported apart, such as
        ``sex,age-band``.
    """

    preparation: str = "federated"
    tabular_network: str = "linear"
    network_width: int = 64
    network_depth: int = 2
    network_dropout: float = 0.0
    report_by: str = ""

    def __post_init__(self) -> None:
        known = ", ".join(_PREPARATIONS)
        self.require("preparation", self.preparation in _PREPARATIONS, f"one of {known}")

    @property
    def groups(self) -> tuple[str, ...]:
        """The columns of `report_by`."""
        return tuple(name.strip() for name in self.report_by.split(",") if name.strip())


@dataclass(frozen=True)
class TableRows:
    """Rows as tensors.

    Attributes
    ----------
    inputs : dict of str to Tensor
        ``features`` (n, width), and what the loss compares with, each of length n.
    rows : sequence of dict
        As they were loaded.
    """

    inputs: Mapping[str, Tensor]
    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def some(self, places: Sequence[int]) -> dict[str, Tensor]:
        """Return rows as a batch."""
        device = self.inputs["features"].device
        chosen = torch.as_tensor(places, dtype=torch.long, device=device)
        return {name: values.index_select(0, chosen) for name, values in self.inputs.items()}


class Unit(NamedTuple):
    """How a network's output o becomes a number: factor * o + shift.

    Attributes
    ----------
    shift, factor : float
        The target's mean and scale; of a count, whose logarithm is predicted, its mean's.
    weight : float
        By which the loss is multiplied, so that it is that of a target of about 1.
    """

    shift: float = 0.0
    factor: float = 1.0
    weight: float = 1.0


class _InUnit(nn.Module):
    """The last step of a network that predicts numbers."""

    def __init__(self, unit: Unit) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, outputs: Tensor) -> Tensor:
        """Return what the outputs are in the target's own unit, for which 16 bits are too few."""
        precise = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return self.unit.factor * precise + self.unit.shift


class TabularClient(MedicalClient):
    """Predicts a column of a table from others.

    A subclass gives `schema` and `load_data`. Rows are dicts with ``patient`` and the schema's
    columns, as `fedmed_flower.data.schema.read_table` makes them.

    Hooks
    -----
    loss
        Maps (outputs, batch) to a number.
    outputs
        How many outputs the network has.

    Attributes
    ----------
    schema : Schema
        Which columns there are, and which one is predicted.
    tables : TabularSettings
        From the run config.
    zeros : bool
        Whether the network's last layer starts with zeros.
    """

    schema: Schema
    zeros: bool = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.tables = TabularSettings.from_run_config(context.run_config)

    @property
    def outputs(self) -> int:
        """The number of outputs: one for each of several classes, else 1."""
        return len(self.schema.classes) if self.schema.task == "multi-class" else 1

    @property
    def must_agree(self) -> bool:
        """Whether hospitals tell of their columns before the first round."""
        # In a private run nobody tells anything, and `build_model` says so at once.
        return self.tables.preparation == "federated" and not self.privacy.on

    def contribute(self) -> dict[str, Any]:
        """Return means, spreads and categories of the training rows, by ten patients or more."""
        train = self.prepared(None, pooled=False)[0].train
        return contribution(train, self._told, min_cell_count(self.context, self.site))

    def agree(self, contributions: Mapping[str, Mapping[str, Any]]) -> str:
        """Return what all hospitals' columns give together.

        Raises
        ------
        InputError
            Where no hospital told anything that can be used.
        """
        schema = self._told
        learnt = schema.numeric or {*schema.categorical} - schema.categories.keys()
        fine = [told for told in contributions.values() if check_contribution(told, schema) is None]
        if learnt and not any(fine):
            raise InputError(
                "no hospital tells of its columns, or none has enough patients for that "
                '(min-cell-count): with preparation="declared" the schema\'s ranges and categories '
                "do instead"
            )
        return Preparation.agreed(schema, contributions).to_text()

    @property
    def _told(self) -> Schema:
        """The schema of what hospitals tell: a number to predict counts as one more column."""
        schema = self.schema
        if schema.task not in _SCALED:
            return schema
        numeric, target = (*schema.numeric, schema.target), f"{schema.target} (predicted)"
        return replace(schema, target=target, task="binary", numeric=numeric)

    @cached_property
    def _agreed_upon(self) -> Preparation:
        """What came with a message, of the columns of `_told`."""
        if not self.agreed:
            raise InputError(
                'preparation="federated" needs what hospitals tell before the first round: give '
                f"federate an instance, {type(self).__name__}(context), in place of its build_model"
            )
        found, schema = Preparation.from_text(self.agreed), self._told
        if ([*found.means], [*found.categories]) != ([*schema.numeric], [*schema.categorical]):
            columns = ", ".join((*found.means, *found.categories))
            raise InputError(
                f"hospitals have agreed upon the columns {columns}; here the schema has "
                f"{', '.join(schema.features)}: all must run the same app"
            )
        return found

    @cached_property
    def prepared_by(self) -> Preparation:
        """How features are made of columns.

        Raises
        ------
        InputError
            Where privacy is on and the preparation would be learnt from patients without noise, or
            nothing was agreed upon, or a hospital without training rows would have to learn its
            own.
        """
        self._require_unlearnt()
        kind = self.tables.preparation
        if kind == "declared":
            return Preparation.declared(self.schema)
        if kind == "site":
            return self._of_own(self.prepared(None, pooled=False)[0].train)
        found, numeric = self._agreed_upon, self.schema.numeric
        return replace(
            found,
            means={name: found.means[name] for name in numeric},
            scales={name: found.scales[name] for name in numeric},
            still=tuple(name for name in found.still if name in numeric),
        )

    def _of_own(self, rows: Sequence[Row]) -> Preparation:
        if not rows:
            raise InputError('preparation="site" needs training rows, and there are none')
        return Preparation.of_rows(self.schema, rows)

    def _require_unlearnt(self) -> None:
        kind = self.tables.preparation
        if self.privacy.on and kind != "declared":
            raise InputError(
                f'preparation="{kind}" learns from patients without noise: privacy="patient" needs '
                'preparation="declared", with ranges and categories in the schema'
            )

    @cached_property
    def unit(self) -> Unit:
        """In what the network predicts a number, so that its outputs are about 1."""
        schema = self.schema
        if schema.task not in _SCALED:
            return Unit()
        if self.tables.preparation == "federated":
            mean = self._agreed_upon.means[schema.target]
            scale = self._agreed_upon.scales[schema.target]
        elif schema.target in schema.ranges:
            low, high = schema.ranges[schema.target]
            mean, scale = (low + high) / 2, (high - low) / 4
        else:
            return Unit()
        if schema.task == "continuous":
            return Unit(mean, scale, 1 / scale**2)
        return Unit(math.log(mean), 1.0, 1 / mean) if mean > 0 else Unit()

    def build_model(self) -> nn.Module:
        """Return the network that the run config names.

        Raises
        ------
        InputError
            Where the schema declares too little for the run config's preparation.
        """
        self._require_unlearnt()
        schema, tables = self.schema, self.tables
        learnt, lacking = tables.preparation == "federated", list[str]()
        if not learnt and schema.task in _SCALED and schema.target not in schema.ranges:
            lacking.append(f"a range of {schema.target!r}, which is to be predicted")
        if tables.preparation == "site":
            undeclared = [name for name in schema.categorical if name not in schema.categories]
            lacking += [f"categories of {name!r}" for name in undeclared]
        if lacking:
            raise InputError(
                f'preparation="{tables.preparation}" finds too little in the schema: it needs '
                f"{', '.join(lacking)}"
            )
        # Of one hospital's own preparation the server knows the width alone.
        own = tables.preparation == "site"
        width = (Preparation.agreed(schema, {}) if own else self.prepared_by).width
        network = tabular_network(
            tables.tabular_network,
            width,
            self.outputs,
            tables.network_width,
            tables.network_depth,
            tables.network_dropout,
            zeros=self.zeros,
        )
        return nn.Sequential(network, _InUnit(self.unit)) if schema.task in _SCALED else network

    def check(self, data: SiteData) -> None:
        """Raise `InputError` where rows lack a column or its values are none of the schema's."""
        schema = self.schema
        needed = {*schema.numeric, *schema.categorical, schema.target, *self.tables.groups}
        needed |= {schema.event} if schema.event else set()
        for split in SPLITS:
            for number, row in enumerate(getattr(data, split)):
                if lacking := sorted(needed - row.keys()):
                    raise InputError(
                        f"row {number} of the {split} split has no {', '.join(lacking)}: rows come "
                        "from read_table, or have every column of the schema and of report-by"
                    )
                where = f"row {number} of the {split} split"
                for name, (fits, wanted) in self.wanted.items():
                    value = row[name]
                    if not (isinstance(value, Real) and math.isfinite(value) and fits(value)):
                        raise InputError(f"{where} has {name} {value!r}: it must be {wanted}")
                for name in self.tables.groups:
                    if not (row[name] is None or isinstance(row[name], str)):
                        raise InputError(
                            f"{where} has {name} {row[name]!r}: report-by takes columns of texts, "
                            "such as categories, or the bands into which the schema cuts a number"
                        )

    @property
    def wanted(self) -> dict[str, tuple[Callable[[float], bool], str]]:
        """What target and event must be: a test of a finite number, and that in words."""
        task, top = self.schema.task, max(2, self.outputs) - 1
        fits: tuple[Callable[[float], bool], str] = (lambda value: True), "a finite number"
        if task in _CLASSED:
            fits = (lambda value: value in range(top + 1)), f"the number of a class, 0 to {top}"
        elif task == "count":
            fits = (lambda value: value >= 0 and value == int(value)), "a count: 0, 1, 2, ..."
        return {self.schema.target: fits}

    def describe(self, data: SiteData) -> dict[str, Any]:
        """Return the number of training rows of each class."""
        if self.schema.task not in _CLASSED:
            return {}
        labels = [int(row[self.schema.target]) for row in data.train]
        return {"labels": np.bincount(labels, minlength=max(2, self.outputs)).tolist()}

    def prepare(self, rows: Sequence[Row], train: bool) -> TableRows:
        """Return the rows as tensors on the device; unseen categories are told in the log."""
        if self.pooled and self.tables.preparation == "site":
            features = self._features_of_each(rows)
        else:
            features = self.prepared_by.transform(rows)
            if train and (unseen := self.prepared_by.unseen(rows)):
                told = ", ".join(f"{name} ({count} rows)" for name, count in unseen.items())
                log.warning("%s: categories that are not in the list: %s", self.site.name, told)
        inputs = {"features": torch.from_numpy(features)} | self.targets(rows)
        device = self.settings.torch_device()
        return TableRows({name: values.to(device) for name, values in inputs.items()}, rows)

    def _features_of_each(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Return the features of all hospitals' rows, of each by its own training rows."""
        train = self.prepared(None, pooled=True)[0].train
        features = [np.empty(0, np.float32)] * len(rows)
        for number in {number_of_site(row) for row in rows}:
            places = [place for place, row in enumerate(rows) if number_of_site(row) == number]
            own = self._of_own([row for row in train if number_of_site(row) == number])
            for place, found in zip(
                places, own.transform([rows[place] for place in places]), strict=True
            ):
                features[place] = found
        return np.stack(features)

    def targets(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return what the loss compares outputs with, by its name in a batch."""
        values = [row[self.schema.target] for row in rows]
        whole = self.schema.task in _CLASSED
        return {"target": torch.tensor(values, dtype=torch.long if whole else torch.float32)}

    def batch_of(self, prepared: TableRows, places: Sequence[int]) -> dict[str, Tensor]:
        """Return training rows as ``features`` and what `targets` gives."""
        return prepared.some(places)

    def loss_of(self, model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the training loss."""
        return self.loss(model(batch["features"]), batch)

    def loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss: cross entropy, Poisson (of the log rate) or half the squared error.

        The latter two are those of a target in the network's `unit`.

        Parameters
        ----------
        outputs : Tensor
            (batch, outputs), in the target's own unit.
        batch : dict of Tensor
            With ``target``.
        """
        task, target = self.schema.task, batch["target"]
        if task == "multi-class":
            return functional.cross_entropy(outputs, target)
        scores = outputs[:, 0]
        if task == "binary":
            return functional.binary_cross_entropy_with_logits(scores, target.to(scores.dtype))
        if task == "count":
            return functional.poisson_nll_loss(scores, target) * self.unit.weight
        return functional.mse_loss(scores, target) / 2 * self.unit.weight

    def measure(self, model: nn.Module, prepared: TableRows) -> dict[str, Any]:
        """Return ``loss``, the figures of `outcome_metrics`, and on test rows each group's."""
        outputs = self._predict(model, prepared)

        def measured(places: Sequence[int]) -> dict[str, Any]:
            chosen = list(places)
            some = TableRows(prepared.some(chosen), [prepared.rows[place] for place in chosen])
            return self.figures(outputs[chosen], some)

        found = self.figures(outputs, prepared)
        cpu = {name: values.cpu() for name, values in prepared.inputs.items()}
        found["loss"] = float(self.loss(torch.from_numpy(outputs), cpu))
        if (groups := self.tables.groups) and self.split == "test":
            minimum = min_cell_count(self.context, self.site)
            found |= by_group(prepared.rows, groups, minimum, measured)
        return found

    def figures(self, outputs: NDArray[np.float32], prepared: TableRows) -> dict[str, Any]:
        """Return the figures of some rows, from the network's outputs for them."""
        target = prepared.inputs["target"].cpu().numpy()
        return outcome_metrics(self.schema.task, target, outputs)

    def _grower(self, message: Message) -> TabularClient | None:
        """Return what answers a message about trees; None where it is about a network."""
        from fedmed_flower.clients.trees import trees_asked

        return trees_asked(self, message)

    def _train(self, message: Message) -> RecordDict:
        grower = self._grower(message)
        return super()._train(message) if grower is None else grower._train(message)

    def _evaluate(self, message: Message) -> RecordDict:
        grower = self._grower(message)
        return super()._evaluate(message) if grower is None else grower._evaluate(message)

    def measure_privately(
        self, model: nn.Module, prepared: TableRows, patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        """Return figures that follow from counts with noise, or from errors clipped to a range.

        Raises
        ------
        InputError
            Where a number is predicted whose range the schema does not give.
        """
        outputs = self._predict(model, prepared, 1)
        target, task = prepared.inputs["target"].cpu().numpy(), self.schema.task
        if task in _CLASSED:
            counts = noised_counts(target, outputs, patients, noise)
            return noised_metrics(counts) | {NOISED: counts}
        if self.schema.target not in self.schema.ranges:
            raise InputError(
                f"private-metrics needs a range of {self.schema.target} in the schema's ranges"
            )
        limits = self.schema.ranges[self.schema.target]
        sums = noised_errors(task, target, outputs, limits, patients, noise)
        return noised_error_metrics(sums) | {NOISED_ERRORS: sums}

    def _predict(
        self, model: nn.Module, prepared: TableRows, batch_size: int = 4096
    ) -> NDArray[np.float32]:
        """Return the outputs of all rows, (n, outputs)."""
        model.eval()
        count = len(prepared)
        batches = (
            {"features": prepared.inputs["features"][start : start + batch_size]}
            for start in range(0, count, batch_size)
        )
        half = self.settings.half_precision
        return predict(lambda batch: model(batch["features"]), batches, half)
