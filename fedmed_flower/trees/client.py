"""Tree ensembles (XGBoost) grown by the clients for tables.

T. Chen and C. Guestrin: XGBoost: A Scalable Tree Boosting System, KDD 2016,
https://arxiv.org/abs/1603.02754

Flower's `FedXgbBagging` and `FedXgbCyclic`, which `fedmed_flower.trees.server.grow` runs, make one
ensemble of several hospitals' trees.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed_flower.clients.tabular import TableRows, TabularClient
from fedmed_flower.data.cells import LARGEST, category_text
from fedmed_flower.data.preparation import Preparation
from fedmed_flower.data.rows import column_of
from fedmed_flower.data.schema import Schema
from fedmed_flower.data.site import Row, min_cell_count, patients_of
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.models.trainable import Travelling
from fedmed_flower.settings.registry import Sections
from fedmed_flower.settings.text import setting_error
from fedmed_flower.settings.trees import LEAST_PART, TreeSettings
from fedmed_flower.statistics.declared import Declared
from fedmed_flower.statistics.request import Request
from fedmed_flower.trees.ensembles import (
    BAGGING,
    CYCLIC,
    MOST_TREES,
    Form,
    Tree,
    clipped,
    model_bytes,
    plain_name,
    read_trees,
    write_trees,
)
from fedmed_flower.trees.thresholds import (
    Edges,
    at_edges,
    in_bins,
    quantile_edges,
    spaced_edges,
)
from fedmed_flower.wire import TREE_SHARE, TREES

# The furthest that the trees of one round may move log odds, log rates and log hazards.
_REACH = 10.0


class TreeClient(TabularClient):
    """A client for tables that grows trees instead of training a network; made by `as_trees`.

    Everything else is the client's: its rows, what it measures, what it declines. Features are the
    columns' own values, NaN if missing, and a column for each category of the preparation.
    Objectives are ``binary:logistic``, ``multi:softprob`` (a tree for all classes, with a number
    for each in its leaves), ``count:poisson``, ``reg:squarederror`` and, for survival whatever
    ``survival-loss`` says, ``survival:cox``.

    A hospital's new trees have no leaf with fewer training patients than ``min-cell-count``, and
    hospitals with fewer decline. Thresholds are multiples of about a fiftieth of a column's
    declared range. If none is declared, they are quantiles with at least ``min-cell-count``
    patients between any two. Thresholds and leaves carry no noise. If the sent trees, combined,
    separate fewer patients than that from all others, no ``loss`` is sent: it would disclose
    something of those few. The server may send any trees: they are read and checked here, and
    XGBoost's parser is given what was written from scratch. Nothing is unpickled.

    Attributes
    ----------
    trees : TreeSettings
        From the run config.
    whole : bool
        Whether the ensemble goes back with the new trees (cyclic) or these alone (bagging).
    share : float
        The part of the learning rate that this hospital's trees have in a round, above 0 to 1.
    """

    sections: ClassVar[Sections] = (TreeSettings,)
    stand_ins: ClassVar[Mapping[str, str]] = {}
    prepared_for: ClassVar[str] = TREES

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.trees = TreeSettings.from_run_config(context.run_config)
        self.whole = False
        self.share = 1.0
        if self.schema.task == "survival":
            client: Any = self
            client.survival = replace(client.survival, survival_loss="cox")

    def read(self, message: Message) -> ConfigRecord:
        """Return the config of a message, and store what it says of trees."""
        config = super().read(message)
        if config[TREES] not in (BAGGING, CYCLIC):
            raise InputError(f"{TREES} must be {BAGGING} or {CYCLIC}, got {config[TREES]!r}")
        self.whole = config[TREES] == CYCLIC
        share = config.get(TREE_SHARE, 1.0)
        if not isinstance(share, int | float) or not LEAST_PART <= share <= 1:
            raise InputError(f"{TREE_SHARE} must be from {LEAST_PART:g} to 1, got {share!r}")
        self.share = float(share)
        return config

    @cached_property
    def prepared_by(self) -> Preparation:
        """The lists of categories, with means and scales that trees do not use."""
        if self.tables.preparation != "site":
            return super().prepared_by
        named = self.schema.categories
        if lacking := [column for column in self.schema.categorical if column not in named]:
            raise setting_error(
                'preparation="site" needs declared categories: the schema has none of '
                f"{lacking[0]}",
                "preparation",
            )
        return Preparation.agreed(self.schema, {})

    @cached_property
    def form(self) -> Form:
        """What all ensembles of this run have in common."""
        schema = self.schema
        names = tuple(plain_name(name) for name in _raw(schema, self.prepared_by).names)
        if not names:
            raise InputError(
                "trees need a feature, and the schema has no numeric column and no categories: add "
                "one of them"
            )
        base = {"count": 1.0, "continuous": 0.0, "survival": 1.0}.get(schema.task, 0.5)
        reach = LARGEST if schema.task == "continuous" else _REACH
        if schema.task in ("count", "continuous") and schema.target in schema.ranges:
            low, high = schema.ranges[schema.target]
            base = (low + high) / 2
            reach = high - low if schema.task == "continuous" else _REACH
        if schema.task == "count":
            base = max(base, 1e-3)
        return Form(schema.task, names, self.outputs, base, self.trees, reach)

    @property
    def threads(self) -> int:
        """XGBoost's threads: torch's setting, else one if sites share a machine, else all (0)."""
        return self.settings.torch_threads or int(self.site.simulated)

    def build_model(self) -> nn.Module:
        """Return an ensemble without trees."""
        return Ensemble(self.form, [])

    def model_of(self, arrays: ArrayRecord, config: ConfigRecord) -> tuple[nn.Module, Travelling]:
        """Return the ensemble that came with a message.

        Raises
        ------
        InputError
            If it is not one of this run.
        """
        try:
            trees = read_trees(model_bytes(arrays), self.form, MOST_TREES)
        except ValueError as error:
            raise InputError(f"the server has sent no ensemble of this run: {error}") from None
        model = Ensemble(self.form, trees, self.threads)
        return model, Travelling(model, "")

    def prepare(self, rows: Sequence[Row], train: bool) -> TableRows:
        """Return the rows with features as trees take them, on the CPU."""
        prepared = super().prepare(rows, train)
        inputs = {name: values.cpu() for name, values in prepared.inputs.items()}
        features = torch.from_numpy(raw_features(self.schema, self.prepared_by, rows))
        return TableRows(inputs | {"features": features}, rows)

    def fit(self, model: nn.Module, prepared: TableRows, seed: int) -> dict[str, Any]:
        """Grow the trees of a round; return the training rows' ``loss``, if it may be disclosed.

        Raises
        ------
        DeclinedError
            If the hospital has too few patients for one leaf.
        """
        if not isinstance(model, Ensemble):
            raise TypeError(f"fit must be given an Ensemble, got {type(model).__name__}")
        minimum = min_cell_count(self.context, self.site)
        patients = _patients(prepared)
        if len(np.unique(patients)) < minimum:
            raise DeclinedError(f"growing trees needs at least {minimum} patients")
        most = self.form.most_leaf(self.share)
        new = [clipped(tree, most) for tree in self._grow(model, prepared, patients, seed)]
        grown = Ensemble(self.form, [*model.trees, *new], self.threads)
        model.send(grown.trees if self.whole else new)
        if self._separates_few(model, prepared, patients):
            return {}
        loss = self.loss(torch.from_numpy(self.predict(grown, prepared)), prepared.inputs)
        return {"loss": float(loss)}

    def measure(self, model: nn.Module, prepared: TableRows) -> dict[str, Any]:
        """Return the metrics, with ``loss`` if it may be disclosed."""
        if not isinstance(model, Ensemble):
            raise TypeError(f"measure must be given an Ensemble, got {type(model).__name__}")
        metrics = super().measure(model, prepared)
        if self._separates_few(model, prepared, _patients(prepared)):
            del metrics["loss"]
        return metrics

    def _separates_few(
        self, model: Ensemble, prepared: TableRows, patients: NDArray[np.intp]
    ) -> bool:
        """Return whether the sent trees separate fewer patients than the minimum from all others.

        Each leaf may hold enough patients, and yet only few may be in the same leaves of all trees.
        Then their predictions alone change with what the server puts into these leaves.
        """
        minimum = min_cell_count(self.context, self.site)
        classes = np.zeros(len(prepared), np.intp)
        for leaves in model.leaf_indices(prepared.inputs["features"].numpy()):
            pairs = np.column_stack([classes, leaves])
            classes = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
            if _fewest(classes, patients) < minimum:
                return True
        return False

    def _edges(self, features: NDArray[np.float32], patients: NDArray[np.intp]) -> list[Edges]:
        """Return where each feature may be split."""
        minimum = min_cell_count(self.context, self.site)
        declared = Declared(Request(), self.schema)
        edges: list[Edges] = []
        for index, column in enumerate(self.schema.numeric):
            if step := declared.resolution(column):
                edges.append(spaced_edges(*self.schema.ranges[column], step))
            else:
                edges.append(quantile_edges(features[:, index], patients, minimum))
        categories = features.shape[1] - len(edges)
        return edges + [np.array([0.5], np.float32)] * categories

    def _grow(
        self, model: Ensemble, prepared: TableRows, patients: NDArray[np.intp], seed: int
    ) -> list[Tree]:
        """Return new trees; the least child weight is raised until no leaf has too few patients."""
        xgboost = _xgboost()
        settings = self.trees
        minimum = min_cell_count(self.context, self.site)
        features = prepared.inputs["features"]
        edges = self._edges(features.numpy(), patients)
        bins = in_bins(features.numpy(), edges)
        labels = _labels(prepared)
        # Of the features, not of their bins: earlier trees split the features themselves.
        margins = model(features).numpy()
        parameters: dict[str, Any] = {
            "objective": self.form.objective,
            "tree_method": "hist",
            "max_depth": settings.tree_max_depth,
            # The trees of a round are a forest, of which the mean is added.
            "learning_rate": settings.tree_learning_rate * self.share / settings.trees_a_round,
            "min_child_weight": settings.tree_min_child_weight,
            "lambda": settings.tree_lambda,
            "base_score": self.form.base,
            "seed": seed % 2**31,
            "nthread": self.threads,
            "verbosity": 0,
        }
        if self.form.outputs > 1:
            # One tree for all classes: Flower would assign a tree of one class to the first class.
            parameters |= {"num_class": self.form.outputs, "multi_strategy": "multi_output_tree"}
        rng = np.random.default_rng(seed)
        trees: list[Tree] = []
        form_of_one = replace(self.form, settings=replace(settings, trees_a_round=1))
        for _ in range(settings.trees_a_round):
            drawn = _drawn(patients, settings.tree_subsample, minimum, rng)
            data = xgboost.DMatrix(
                bins[drawn], labels[drawn], base_margin=margins[drawn], nthread=self.threads
            )
            weight = {"min_child_weight": settings.tree_min_child_weight}
            while True:
                grown = xgboost.train(parameters | weight, data, 1)
                indices = grown.predict(data, pred_leaf=True).reshape(len(labels[drawn]), -1)
                if all(_fewest(leaf, patients[drawn]) >= minimum for leaf in indices.T):
                    break
                weight = {"min_child_weight": max(2 * weight["min_child_weight"], 1e-3)}
            trees += read_trees(bytes(grown.save_raw("json")), form_of_one, 1, named=False)
        return [at_edges(tree, edges) for tree in trees]

    def require_protection(self) -> None:
        """Decline to grow trees if the run or the hospital asks for privacy."""
        if self.privacy.on:
            raise DeclinedError("trees are grown without the privacy that this run asks for")
        super().require_protection()


class Ensemble(nn.Module):
    """Trees as a network: maps features (n, width) to margins (n, outputs).

    Its one buffer, ``0``, is what travels: the bytes of a model in XGBoost's JSON.

    Parameters
    ----------
    form : Form
    trees : sequence of dict
        As `read_trees` returns them.
    threads : int
        How many XGBoost uses; 0 for all.
    """

    def __init__(self, form: Form, trees: Sequence[Tree], threads: int = 0) -> None:
        super().__init__()
        self.form = form
        self.trees = list(trees)
        self.threads = threads
        self.send(trees)

    def send(self, trees: Sequence[Tree]) -> None:
        """Replace the trees that travel; predictions still use `trees`."""
        content = bytearray(write_trees(self.form, trees))
        self.register_buffer("0", torch.frombuffer(content, dtype=torch.uint8))

    @property
    def rounds(self) -> int:
        """How often trees were added."""
        return len(self.trees) // self.form.settings.trees_a_round

    @cached_property
    def booster(self) -> Any:
        """The trees as XGBoost's object."""
        booster = _xgboost().Booster({"nthread": self.threads, "verbosity": 0})
        booster.load_model(bytearray(write_trees(self.form, self.trees, named=False)))
        booster.set_param({"nthread": self.threads})
        return booster

    def leaf_indices(self, features: NDArray[np.float32]) -> Iterator[NDArray[Any]]:
        """Yield for each tree the leaf (n,) of each row of features (n, width)."""
        data = _xgboost().DMatrix(features, nthread=self.threads)
        for number in range(self.rounds):
            leaves = self.booster[number : number + 1].predict(data, pred_leaf=True)
            yield from leaves.reshape(len(features), -1).T

    def forward(self, features: Tensor) -> Tensor:
        """Return log odds, log rates, log hazards or the predicted number."""
        margins = self.booster.inplace_predict(features.numpy(), predict_type="margin")
        return torch.from_numpy(np.asarray(margins)).reshape(len(features), -1)


def as_trees(client: TabularClient) -> TreeClient:
    """Return a client of the same hospital that grows trees."""
    return _tree_class(type(client))(client.context)


def raw_features(
    schema: Schema, prepared_by: Preparation, rows: Sequence[Row]
) -> NDArray[np.float32]:
    """Return the columns' own values, (n, width), and 1 or 0 for each category; NaN if missing.

    A category that is not in the list is 0 in all columns.
    """
    plain = _raw(schema, prepared_by)
    features = plain.transform(rows)
    for index, column in enumerate(schema.numeric):
        values = np.asarray(column_of(rows, column), dtype=np.float64)
        features[~(np.abs(values) <= LARGEST), index] = np.nan
    index = len(schema.numeric)
    for column in plain.categories:
        width = Preparation({}, {}, {column: plain.categories[column]}).width
        missing = np.asarray(
            [category_text(cell) is None for cell in column_of(rows, column)], dtype=bool
        )
        features[missing, index : index + width] = np.nan
        index += width
    return features


@functools.cache
def _tree_class(cls: type[TabularClient]) -> type[TreeClient]:
    # Under the same name: what is loaded for one class need not be loaded again for the other.
    names = {"__qualname__": cls.__qualname__, "__module__": cls.__module__}
    return type(cls.__name__, (TreeClient, cls), names)


def _raw(schema: Schema, prepared_by: Preparation) -> Preparation:
    """Return a preparation that leaves numbers as they are."""
    means = dict.fromkeys(schema.numeric, 0.0)
    scales = dict.fromkeys(schema.numeric, 1.0)
    return Preparation(means, scales, prepared_by.categories)


def _labels(prepared: TableRows) -> NDArray[Any]:
    """Return the labels for XGBoost; the times of patients without the event are negative."""
    if "target" in prepared.inputs:
        return prepared.inputs["target"].numpy()
    times = prepared.inputs["time"].numpy()
    events = prepared.inputs["event"].numpy()
    return np.where(events == 1, times, -times)


def _patients(prepared: TableRows) -> NDArray[np.intp]:
    """Return (n,), the number of each row's patient."""
    texts = patients_of(prepared.rows)
    return np.unique(texts, return_inverse=True)[1]


def _drawn(
    patients: NDArray[np.intp], share: float, minimum: int, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Return which rows a tree grows on: those of a share of the patients, at least `minimum`."""
    everybody = np.unique(patients)
    count = min(len(everybody), max(minimum, round(share * len(everybody))))
    return np.isin(patients, rng.choice(everybody, count, replace=False))


def _fewest(leaf: NDArray[Any], patients: NDArray[Any]) -> int:
    """Return the number of patients in that leaf of a tree that has the fewest."""
    pairs = np.unique(np.stack([leaf, patients]), axis=1)
    return int(np.unique(pairs[0], return_counts=True)[1].min())


def _xgboost() -> Any:
    try:
        import xgboost
    except ImportError as error:
        raise InputError(
            "trees are grown by XGBoost, which is not installed: "
            'pip install "fedmed-flower[xgboost]"'
        ) from error
    return xgboost
