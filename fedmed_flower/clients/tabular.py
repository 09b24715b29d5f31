"""A client for tables: health records and whatever else has a row a patient or a visit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message, RecordDict
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.pooling import places_by_site
from fedmed_flower.clients.settings import TabularSettings
from fedmed_flower.clients.targets import (
    CLASSED,
    SCALED,
    InUnit,
    Unit,
    agreed_upon,
    declared_unit,
    require_declared,
    require_rows,
    with_target,
)
from fedmed_flower.clients.training import predict
from fedmed_flower.data.preparing import Preparation, check_contribution, contribution
from fedmed_flower.data.schema import Schema
from fedmed_flower.data.site import SPLITS, Row, SiteData, min_cell_count
from fedmed_flower.errors import DeclinedError, InputError
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
        return contribution(
            train, with_target(self.schema), min_cell_count(self.context, self.site)
        )

    def agree(self, contributions: Mapping[str, Mapping[str, Any]]) -> str:
        """Return what all hospitals' columns give together.

        Raises
        ------
        InputError
            Where no hospital told anything that can be used.
        """
        schema = with_target(self.schema)
        # Names in the log those who tell what cannot be used.
        found = Preparation.agreed(schema, contributions)
        learnt = schema.numeric or {*schema.categorical} - schema.categories.keys()
        fine = [told for told in contributions.values() if check_contribution(told, schema) is None]
        if learnt and not any(fine):
            raise InputError(
                "no hospital tells of its columns what can be used (each needs min-cell-count "
                'patients for that): with preparation="declared" the schema\'s ranges and '
                "categories do instead"
            )
        return found.to_text()

    @cached_property
    def _agreed_upon(self) -> tuple[Preparation, Unit]:
        if not self.agreed:
            raise InputError(
                'preparation="federated" needs what hospitals tell before the first round: give '
                f"federate an instance, {type(self).__name__}(context), in place of its build_model"
            )
        return agreed_upon(self.agreed, self.schema)

    @cached_property
    def prepared_by(self) -> Preparation:
        """How features are made of columns.

        Raises
        ------
        InputError
            Where privacy is on and the preparation would be learnt from patients without noise, or
            nothing was agreed upon, or a hospital without training rows would have to learn its
            own.
        DeclinedError
            Where a hospital with a privacy budget would have to learn its own.
        """
        self._require_unlearnt()
        kind = self.tables.preparation
        if kind == "declared":
            return Preparation.declared(self.schema)
        if kind == "site":
            return self._of_own(self.prepared(None, pooled=False)[0].train)
        return self._agreed_upon[0]

    def _of_own(self, rows: Sequence[Row]) -> Preparation:
        if self.secretive:
            raise DeclinedError(
                'preparation="site" learns from patients without noise, and this hospital has a '
                'privacy budget: preparation="declared" learns nothing'
            )
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
        """In what the network predicts a number: its last step brings it into the target's own."""
        learnt = self.tables.preparation == "federated"
        return self._agreed_upon[1] if learnt else declared_unit(self.schema)

    def build_model(self) -> nn.Module:
        """Return the network that the run config names.

        Raises
        ------
        InputError
            Where the schema declares too little for the run config's preparation.
        """
        self._require_unlearnt()
        schema, tables = self.schema, self.tables
        require_declared(schema, tables.preparation)
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
        return nn.Sequential(network, InUnit(self.unit)) if schema.task in SCALED else network

    def check(self, data: SiteData) -> None:
        """Raise `InputError` where a row lacks a column or holds what cannot be predicted."""
        for split in SPLITS:
            where = f"the {split} split"
            require_rows(getattr(data, split), self.schema, self.tables.groups, where)

    def describe(self, data: SiteData) -> dict[str, Any]:
        """Return the number of training rows of each class."""
        if self.schema.task not in CLASSED:
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
        owned = places_by_site(train)
        features = np.zeros((len(rows), Preparation.agreed(self.schema, {}).width), np.float32)
        for number, places in places_by_site(rows).items():
            own = self._of_own([train[place] for place in owned.get(number, [])])
            features[places] = own.transform([rows[place] for place in places])
        return features

    def targets(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return what the loss compares outputs with, by its name in a batch."""
        values = [row[self.schema.target] for row in rows]
        whole = self.schema.task in CLASSED
        return {"target": torch.tensor(values, dtype=torch.long if whole else torch.float32)}

    def batch_of(self, prepared: TableRows, places: Sequence[int]) -> dict[str, Tensor]:
        """Return training rows as ``features`` and what `targets` gives."""
        return prepared.some(places)

    def loss_of(self, model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the training loss."""
        return self.loss(model(batch["features"]), batch)

    def loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss: cross entropy, Poisson (of the log rate) or half the squared error.

        The latter two are those of a target by its `unit`, whatever it is measured in.

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
        return ((scores - target) / self.unit.factor).square().mean() / 2

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
        if task in CLASSED:
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
