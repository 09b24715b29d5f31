"""A client for tables with one row for each patient or visit, such as health records."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from flwr.app import Context
from numpy.typing import NDArray

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.book import POOLED, Book
from fedmed_flower.clients.pooled import indices_by_site
from fedmed_flower.clients.targets import (
    CLASSED,
    SCALED,
    Unit,
    agreed_upon,
    declared_unit,
    require_declared,
    require_rows,
    with_target,
)
from fedmed_flower.data.outlying import Outlying, outlying
from fedmed_flower.data.preparation import Preparation, check_contribution, contribution
from fedmed_flower.data.rows import Rows, column_of, has_column
from fedmed_flower.data.schema import Schema, band_name, band_names
from fedmed_flower.data.site import SPLITS, Row, SiteData, min_cell_count, patients_of
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.metrics.classification import noised_counts, noised_metrics
from fedmed_flower.metrics.names import NOISED, NOISED_ERRORS
from fedmed_flower.metrics.outcomes import (
    by_group,
    noised_error_metrics,
    noised_errors,
    outcome_metrics,
    reported_groups,
)
from fedmed_flower.models.device import half_precision, torch_device
from fedmed_flower.settings.registry import Sections
from fedmed_flower.settings.tabular import TabularSettings
from fedmed_flower.settings.text import setting_error
from fedmed_flower.statistics.types import Mask
from fedmed_flower.wire import TREES

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger("flwr.fedmed")

# Rows in a batch of prediction.
_BATCH = 4096


@dataclass(frozen=True)
class TableRows:
    """Rows as tensors.

    Attributes
    ----------
    inputs : dict of str to Tensor
        ``features`` (n, width), and the targets that the loss needs, each of length n.
    rows : sequence of dict
        The n rows as they were loaded.
    """

    inputs: Mapping[str, Tensor]
    rows: Sequence[Row]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows at these indices as a batch."""
        import torch

        device = self.inputs["features"].device
        index = torch.as_tensor(indices, dtype=torch.long, device=device)
        return {name: values.index_select(0, index) for name, values in self.inputs.items()}


class TabularClient(MedicalClient):
    """Predicts a column of a table from others.

    A subclass defines `schema` and `load_data`. Rows are dicts with ``patient`` and the schema's
    columns, as `fedmed_flower.data.schema.read_table` returns them.

    Hooks
    -----
    loss
        Maps (outputs, batch) to a number.
    outputs
        The number of the network's outputs.

    Attributes
    ----------
    schema : Schema
        The columns, and which of them is predicted.
    tables : TabularSettings
        From the run config.
    zeros : bool
        Whether the network's last layer starts with zeros.
    """

    schema: Schema
    zeros: bool = False
    sections: ClassVar[Sections] = (TabularSettings,)
    stand_ins: ClassVar[Mapping[str, str]] = {TREES: "fedmed_flower.trees.client:as_trees"}

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.tables = TabularSettings.from_run_config(context.run_config)

    @property
    def outputs(self) -> int:
        """The number of outputs: one for each of several classes, else 1."""
        return len(self.schema.classes) if self.schema.task == "multi-class" else 1

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the report calls the target's classes; empty if it has none."""
        return tuple(f"{self.schema.target} = {name}" for name in self.schema.classes)

    @property
    def must_agree(self) -> bool:
        """Whether hospitals contribute statistics of their columns before the first round."""
        # In a private run no hospital contributes; `build_model` rejects this preparation at once.
        return self.tables.preparation == "federated" and not self.privacy.on

    def contribute(self) -> dict[str, Any]:
        """Return means, scales and categories of the training rows.

        Each is of at least ``min-cell-count`` patients. At a real hospital they are written down in
        its book before they leave. If the training rows would single out too few patients, after
        earlier answers about a column, all rows that those answers counted are used. If these may
        not be used either, the column is left out.
        """
        schema = with_target(self.schema)
        minimum = min_cell_count(self.context, self.site)
        train = self.screened_data().train
        if self.site.simulated:
            return contribution(train, schema, minimum)
        reported = dict[str, Any]()
        with self.open_book({}, minimum) as book:
            inside = book.mask_of({id(row) for row in train})
            for column in schema.features:
                if column not in schema.categories:
                    rows = self._reportable_rows(book, column, inside, minimum)
                    reported |= contribution(rows, schema, minimum, only=column)
        return reported

    def _reportable_rows(self, book: Book, column: str, inside: Mask, minimum: int) -> list[Row]:
        """Return the rows whose values in a column may be disclosed; none if too few.

        These are the training rows, or, if they may not be, all rows that earlier answers counted.
        """
        for rows in (inside, book.known(column)):
            values = None
            if column in self.schema.categorical:
                values = book.categories(column, rows, minimum)
                if values is None:
                    continue
            counted = rows if values is None else rows & (values >= 0)
            usable = book.column(column, counted, values)
            if usable is None:
                continue
            if rows is not inside:
                log.warning(
                    "%s: statistics of %s come from all rows: after earlier answers the training "
                    "rows alone would be of too few patients",
                    self.site.name,
                    column,
                )
            reported = usable if values is None else usable & (values != POOLED)
            return [row for row, fine in zip(book.rows, reported, strict=True) if fine]
        return []

    def columns_to_sum(self) -> Sequence[str]:
        """Return the numeric columns, and the target if it is a number.

        Raises
        ------
        InputError
            If categories of a column are not declared: which ones occur would have to be asked for
            first, and those that one hospital alone has tell of its patients.
        """
        schema = with_target(self.schema)
        undeclared = [name for name in schema.categorical if name not in schema.categories]
        if undeclared:
            raise setting_error(
                f'secure="sum" needs categories of {", ".join(map(repr, undeclared))} in the '
                "schema: which categories a hospital has leaves no hospital in a secure sum",
                "secure",
            )
        return schema.numeric

    def agree(self, contributions: Mapping[str, Mapping[str, Any]]) -> str:
        """Return the preparation that all hospitals' contributions give together, as text.

        Raises
        ------
        InputError
            If no hospital has sent a contribution that can be used.
        """
        schema = with_target(self.schema)
        # Logs the hospitals whose contributions cannot be used.
        preparation = Preparation.agreed(schema, contributions)
        learnt = schema.numeric or {*schema.categorical} - schema.categories.keys()
        usable = [
            reported
            for reported in contributions.values()
            if check_contribution(reported, schema) is None
        ]
        if learnt and not any(usable):
            raise setting_error(
                "no hospital could share statistics of its columns: each needs at least "
                'min-cell-count patients. Set preparation="declared" and give ranges and '
                "categories in the schema",
                "preparation",
            )
        return preparation.to_text()

    def outlying(
        self, contributions: Mapping[str, Mapping[str, Any]], rows: Mapping[str, int]
    ) -> list[Outlying]:
        """Return the hospitals of which a column differs from all others'."""
        return outlying(contributions, with_target(self.schema), rows)

    @cached_property
    def _agreed_upon(self) -> tuple[Preparation, Unit]:
        if not self.agreed:
            raise setting_error(
                'preparation="federated" needs contributions from all hospitals before the first '
                f"round: give federate an instance, {type(self).__name__}(context), in place of "
                "its build_model",
                "preparation",
            )
        return agreed_upon(self.agreed, self.schema)

    @cached_property
    def prepared_by(self) -> Preparation:
        """The preparation that makes features of columns.

        Raises
        ------
        InputError
            If privacy is on and the preparation would be learnt from patients without noise. If
            hospitals have not agreed on one yet. If a hospital without training rows would have to
            learn its own.
        DeclinedError
            If a `secretive` hospital would have to learn its own, or its training rows may not be
            used without noise.
        """
        self._require_unlearnt()
        kind = self.tables.preparation
        if kind == "declared":
            return Preparation.declared(self.schema)
        if kind == "site":
            if self.secretive:
                raise DeclinedError(
                    'preparation="site" learns from patients without noise, and this hospital '
                    'reports with noise only: set preparation="declared", which learns nothing'
                )
            rows = self.screened_data().train
            if rows:
                self.require_usable(rows)
            return self._learnt_from(rows)
        return self._agreed_upon[0]

    def _learnt_from(self, rows: Sequence[Row]) -> Preparation:
        if not rows:
            raise setting_error(
                'preparation="site" needs training rows, and there are none', "preparation"
            )
        return Preparation.of_rows(self.schema, rows)

    def _require_unlearnt(self) -> None:
        kind = self.tables.preparation
        if self.privacy.on and kind != "declared":
            raise setting_error(
                f'preparation="{kind}" learns from patients without noise: privacy="patient" needs '
                'preparation="declared", with ranges and categories in the schema',
                "preparation",
            )

    @cached_property
    def unit(self) -> Unit:
        """Unit of the network's raw output; the last layer converts it to the target's unit."""
        learnt = self.tables.preparation == "federated"
        return self._agreed_upon[1] if learnt else declared_unit(self.schema)

    def build_model(self) -> nn.Module:
        """Return the network that the run config names.

        Raises
        ------
        InputError
            If the schema declares too little for the run config's preparation.
        """
        from torch import nn

        from fedmed_flower.models.tabular import InUnit, tabular_network

        self._require_unlearnt()
        schema = self.schema
        tables = self.tables
        require_declared(schema, tables.preparation)
        # The server has no rows, from which each hospital learns its own preparation: it knows only
        # the width, which follows from the schema.
        if tables.preparation == "site":
            width = Preparation.agreed(schema, {}).width
        else:
            width = self.prepared_by.width
        network = tabular_network(
            tables.tabular_network,
            width,
            self.outputs,
            tables.network_width,
            tables.network_depth,
            tables.network_dropout,
            zeros=self.zeros,
        )
        if schema.task in SCALED:
            return nn.Sequential(network, InUnit(self.unit.shift, self.unit.factor))
        return network

    def check(self, data: SiteData) -> None:
        """Raise `InputError` if a row lacks a column or holds an impossible target or event."""
        # A secretive client reports no groups, so their columns need no check.
        groups = () if self.secretive else self.tables.groups
        for split in SPLITS:
            require_rows(getattr(data, split), self.schema, groups, f"the {split} split")

    def label_of(self, row: Row) -> Hashable | None:
        """Return the class of a row, or whether the event happened."""
        column = self.schema.target if self.schema.task in CLASSED else self.schema.event
        return row.get(column) if column else None

    def _classes_of(self, rows: Sequence[Row]) -> Counter[str]:
        column = self.schema.target if self.schema.task in CLASSED else self.schema.event
        usual = type(self).label_of is TabularClient.label_of
        if not (usual and column and isinstance(rows, Rows) and has_column(rows, column)):
            return super()._classes_of(rows)
        counts = Counter([*column_of(rows, column)])
        return Counter({"" if value is None else str(value): n for value, n in counts.items()})

    def made_up(self, count: int) -> list[Row]:
        """Return rows of random numbers, categories and outcomes that the schema allows."""
        schema = self.schema
        rng = np.random.default_rng(0)

        def number(name: str) -> float:
            low, high = schema.ranges.get(name, (1.0, 2.0))
            return float(rng.uniform(low, high))

        def outcome(index: int) -> dict[str, Any]:
            if schema.task in CLASSED:
                return {schema.target: index % max(2, len(schema.classes))}
            value = abs(number(schema.target)) + 1e-3
            event = {schema.event: index % 2} if schema.event else {}
            return {schema.target: int(value) if schema.task == "count" else value} | event

        return [
            {"patient": f"made up {index}"}
            | {name: number(name) for name in schema.numeric}
            | {
                name: str(rng.choice(schema.categories.get(name, ("a",))))
                for name in schema.categorical
            }
            | outcome(index)
            for index in range(count)
        ]

    def describe(self, data: SiteData) -> dict[str, Any]:
        """Return the number of training rows of each class."""
        if self.schema.task not in CLASSED:
            return {}
        labels = [int(label) for label in column_of(data.train, self.schema.target)]
        return {"labels": np.bincount(labels, minlength=max(2, self.outputs)).tolist()}

    def prepare(self, rows: Sequence[Row], train: bool) -> TableRows:
        """Return the rows as tensors on the device; unseen categories are logged."""
        import torch

        if self.pooled and self.tables.preparation == "site":
            features = self._pooled_features(rows)
        else:
            features = self.prepared_by.transform(rows)
            if train and (unseen := self.prepared_by.unseen(rows)):
                names = ", ".join(f"{name} ({count} rows)" for name, count in unseen.items())
                log.warning("%s: categories that are not in the list: %s", self.site.name, names)
        inputs = {"features": torch.from_numpy(features)}
        # Rows that are only predicted have no target.
        if has_column(rows, self.schema.target):
            inputs |= self.targets(rows)
        device = torch_device(self.settings)
        return TableRows({name: values.to(device) for name, values in inputs.items()}, rows)

    def _pooled_features(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Return the features of all sites' rows, prepared by each site's own training rows."""
        train = self.screened_data(pooled=True).train
        train_indices = indices_by_site(train)
        features = np.zeros((len(rows), Preparation.agreed(self.schema, {}).width), np.float32)
        for site, indices in indices_by_site(rows).items():
            preparation = self._learnt_from([train[i] for i in train_indices.get(site, [])])
            features[indices] = preparation.transform([rows[index] for index in indices])
        return features

    def targets(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return the targets that the loss compares outputs with, by their names in a batch."""
        import torch

        values = column_of(rows, self.schema.target)
        whole = self.schema.task in CLASSED
        return {"target": torch.tensor(values, dtype=torch.long if whole else torch.float32)}

    def batch_of(self, prepared: TableRows, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return training rows as a batch: ``features`` and the targets of `targets`."""
        return prepared.batch(indices)

    def loss_of(self, model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the training loss."""
        return self.loss(self._outputs(model(batch["features"])), batch)

    @property
    def _width(self) -> int:
        """The number of outputs of the whole network."""
        return self.outputs

    def _outputs(self, outputs: Tensor) -> Tensor:
        """Return the network's outputs.

        Raises
        ------
        InputError
            If their number does not fit the task.
        """
        if outputs.ndim != 2 or outputs.shape[1] != self._width:
            raise InputError(
                f"the network returns outputs of shape {tuple(outputs.shape)}: the task "
                f"{self.schema.task} needs (rows, {self._width})"
            )
        return outputs

    def loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean loss: cross entropy, Poisson (of the log rate) or half the squared error.

        The latter two are divided by the scale of `unit`, so that they do not depend on the unit in
        which the target is measured.

        Parameters
        ----------
        outputs : Tensor
            (batch, outputs), in the target's own unit.
        batch : dict of Tensor
            It holds ``target``, of shape (batch,).
        """
        from torch.nn import functional

        task = self.schema.task
        target = batch["target"]
        if task == "multi-class":
            return functional.cross_entropy(outputs, target)
        scores = outputs[:, 0]
        if task == "binary":
            return functional.binary_cross_entropy_with_logits(scores, target.to(scores.dtype))
        if task == "count":
            return functional.poisson_nll_loss(scores, target) * self.unit.weight
        return ((scores - target) / self.unit.factor).square().mean() / 2

    def measure(self, model: nn.Module, prepared: TableRows) -> dict[str, Any]:
        """Return ``loss``, `metrics_of_rows`, and on test rows also the metrics of each group."""
        import torch

        outputs = self.predict(model, prepared)

        def measured(indices: Sequence[int]) -> dict[str, Any]:
            chosen = list(indices)
            group = TableRows(prepared.batch(chosen), [prepared.rows[index] for index in chosen])
            return self.metrics_of_rows(outputs[chosen], group)

        metrics = self.metrics_of_rows(outputs, prepared)
        on_cpu = {name: values.cpu() for name, values in prepared.inputs.items()}
        metrics["loss"] = float(self.loss(torch.from_numpy(outputs), on_cpu))
        groups = self.tables.groups
        if groups and self.split == "test":
            minimum = min_cell_count(self.context, self.site)
            columns = self._disclosable_groups(prepared.rows, groups, minimum)
            metrics |= by_group(prepared.rows, columns, minimum, measured)
        return metrics

    def require_named(self) -> None:
        """Raise `InputError` if the values of a column of ``report-by`` are not declared."""
        super().require_named()
        learnt = () if self.tables.preparation != "federated" else self.schema.categorical
        for column in () if self.noises_metrics else self.tables.groups:
            if column not in learnt:
                self._declared_values(column)

    def figures(self, model: nn.Module, split: str) -> dict[str, Any]:
        """Return the names of what `measure` returns, with those of all groups that there can be.

        Raises
        ------
        InputError
            If the values of a column of ``report-by`` are not declared.
        """
        figures = super().figures(model, split)
        if self.noises_metrics or split != "test" or not self.tables.groups:
            return figures
        prepared = self.prepare(self.made_up(len(self.schema.classes) + 2), train=False)
        group = {"num-examples": len(prepared)}
        group |= self.metrics_of_rows(self.predict(model, prepared), prepared)
        for column in self.tables.groups:
            for value in self._declared_values(column):
                figures |= {f"{name}@{column}={value}": metric for name, metric in group.items()}
        return figures

    def _declared_values(self, column: str) -> Sequence[str]:
        """Return the values that a column can have, as all hospitals know them."""
        schema = self.schema
        for name, cuts in schema.bands.items():
            if column == band_name(name):
                return band_names(cuts)
        if column in schema.categories:
            return schema.categories[column]
        if column in schema.categorical and self.agreed:
            return self.prepared_by.categories[column]
        raise setting_error(
            f"report-by names {column!r}, whose values the schema does not declare: secure sums "
            "need the names of all groups before patients are counted; declare its categories, or "
            "leave it out",
            "report-by",
        )

    def _disclosable_groups(
        self, rows: Sequence[Row], names: Sequence[str], minimum: int
    ) -> Sequence[str]:
        """Return the columns for whose groups metrics of these rows may leave."""
        if self.site.simulated:
            return names
        disclosable = []
        with self.open_book({}, minimum) as book:
            inside = book.mask_of({id(row) for row in rows})
            for name in names:
                groups = reported_groups(rows, name, minimum)
                code_of = {text: code for code, text in enumerate(groups)}
                values = np.array([code_of.get(str(row.get(name)), POOLED) for row in book.rows])
                usable = book.column(name, inside, values)
                if usable is not None and bool((usable == inside).all()):
                    disclosable.append(name)
                else:
                    log.warning(
                        "%s: metrics by %s are withheld: after earlier answers they would be of "
                        "too few patients",
                        self.site.name,
                        name,
                    )
        return disclosable

    def metrics_of_rows(self, outputs: NDArray[np.float32], prepared: TableRows) -> dict[str, Any]:
        """Return the metrics of rows, from the network's outputs for them."""
        target = prepared.inputs["target"].cpu().numpy()
        patient_of_row = patients_of(prepared.rows)
        return outcome_metrics(
            self.schema.task, target, outputs, patient_of_row, self.node.coarse_figures
        )

    def require_measurable(self) -> None:
        """Raise `InputError` if a number is predicted and the schema does not give its range."""
        if self.schema.task in SCALED and self.schema.target not in self.schema.ranges:
            raise InputError(
                f"metrics with noise need a range of {self.schema.target} in the schema's ranges"
            )

    def measure_privately(
        self, model: nn.Module, prepared: TableRows, patients: Sequence[Hashable], noise: float
    ) -> dict[str, Any]:
        """Return metrics by counts with noise; for a number, by noised sums of clipped errors."""
        indices, outputs = self._predict_alone(model, prepared)
        target = prepared.inputs["target"].cpu().numpy()[indices]
        patient_of_row = [patients[index] for index in indices]
        task = self.schema.task
        if task in CLASSED:
            counts = noised_counts(target, outputs, patient_of_row, noise)
            return noised_metrics(counts) | {NOISED: counts}
        limits = self.schema.ranges[self.schema.target]
        sums = noised_errors(task, target, outputs, limits, patient_of_row, noise)
        return noised_error_metrics(sums) | {NOISED_ERRORS: sums}

    def _predict_alone(
        self, model: nn.Module, prepared: TableRows
    ) -> tuple[list[int], NDArray[np.float32]]:
        """Return the indices of the rows for which the network did not fail, and their outputs."""
        from fedmed_flower.clients.training import predict_alone

        model.eval()
        features = prepared.inputs["features"]
        indices, scores = predict_alone(
            lambda batch: self._outputs(model(batch["features"])),
            lambda index: {"features": features[index : index + 1]},
            len(prepared),
            half_precision(self.settings),
        )
        return indices, np.asarray(scores, np.float32).reshape(-1, self._width)

    def predict(self, model: nn.Module, prepared: TableRows) -> NDArray[np.float32]:
        """Return the outputs of all rows, (n, outputs)."""
        from fedmed_flower.clients.training import predict

        model.eval()
        batches = (
            {"features": prepared.inputs["features"][start : start + _BATCH]}
            for start in range(0, len(prepared), _BATCH)
        )
        half = half_precision(self.settings)
        return predict(lambda batch: self._outputs(model(batch["features"])), batches, half)
