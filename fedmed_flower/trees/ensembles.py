"""Tree ensembles in XGBoost's JSON, checked before they are used.

What is read here is written again from scratch before it goes to the server's model or to XGBoost's
own parser, so that nothing but the trees travels. Numbers that no prediction needs are written as
zeros: gain and cover disclose how many patients are behind a node, and their outcomes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedmed_flower.arrays.views import view
from fedmed_flower.settings.trees import TreeSettings

# How trees travel, as the server's messages say: the new ones alone, or the whole ensemble.
BAGGING = "bagging"
CYCLIC = "cyclic"
MODEL = "model.json"

MOST_TREES = 10_000

# The longest model; parsed, it takes up to twenty times as much memory.
_MOST_BYTES = 2**27
_VERSION = [3, 2, 0]
_OBJECTIVES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "binary": ("binary:logistic", {"reg_loss_param": {"scale_pos_weight": "1"}}),
    "multi-class": ("multi:softprob", {}),
    "count": ("count:poisson", {"poisson_regression_param": {"max_delta_step": "0.7"}}),
    "continuous": ("reg:squarederror", {"reg_loss_param": {"scale_pos_weight": "1"}}),
    "survival": ("survival:cox", {}),
}
# Characters that XGBoost's parameters and feature names must not contain.
_PLAIN = str.maketrans({"[": "(", "]": ")", "<": "less than "})
_NO_PARENT = 2**31 - 1
_MOST_FLOAT = 3e38
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)

Tree = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """What all ensembles of a run have in common.

    Attributes
    ----------
    task : str
        The schema's task.
    features : tuple of str
        The names of the feature matrix's columns, in order.
    outputs : int
        Number of classes of a multi-class task, else 1.
    base : float
        XGBoost's ``base_score``, where trees start from; on the scale of the prediction.
    settings : TreeSettings
    reach : float
        The furthest that one round may move a prediction at a learning rate of 1: log odds, log
        rate, log hazard, or the number itself.
    """

    task: str
    features: tuple[str, ...]
    outputs: int
    base: float
    settings: TreeSettings
    reach: float

    @property
    def objective(self) -> str:
        """XGBoost's name of the objective."""
        return _OBJECTIVES[self.task][0]

    def most_leaf(self, share: float) -> float:
        """Return the largest number that a leaf of a round may hold."""
        settings = self.settings
        return self.reach * settings.tree_learning_rate * share / settings.trees_a_round

    def most_bytes(self, trees: int) -> int:
        """Return the greatest length in bytes that a number of trees has as JSON."""
        nodes: int = 2 ** (self.settings.tree_max_depth + 1)
        names = sum(len(name) for name in self.features)
        length = 2**16 + 16 * (names + len(self.features))
        return min(_MOST_BYTES, length + trees * nodes * (400 + 60 * self.outputs))


def plain_name(name: str) -> str:
    """Return a feature's name without the characters that XGBoost refuses."""
    return name.translate(_PLAIN)


def write_trees(form: Form, trees: Sequence[Tree], named: bool = True) -> bytes:
    """Return trees as a model in XGBoost's JSON.

    Parameters
    ----------
    form : Form
    trees : sequence of dict
        As `read_trees` returns them, in the order of the rounds.
    named : bool
        Whether to write the features' names; XGBoost then asks for them in the data, too.
    """
    trees_a_round = form.settings.trees_a_round
    objective: dict[str, Any] = dict(_OBJECTIVES[form.task][1])
    if form.task == "multi-class":
        objective = {"softmax_multiclass_param": {"num_class": str(form.outputs)}}
    model = {
        "cats": {"enc": [], "feature_segments": [], "sorted_idx": []},
        "gbtree_model_param": {
            "num_parallel_tree": str(trees_a_round),
            "num_trees": str(len(trees)),
        },
        "iteration_indptr": list(range(0, len(trees) + 1, trees_a_round)),
        "tree_info": [0] * len(trees),
        "trees": [tree | {"id": number} for number, tree in enumerate(trees)],
    }
    learner = {
        "attributes": {},
        "feature_names": list(form.features) if named else [],
        "feature_types": ["float"] * len(form.features) if named else [],
        "gradient_booster": {"model": model, "name": "gbtree"},
        "learner_model_param": {
            "base_score": f"[{','.join([repr(form.base)] * form.outputs)}]",
            "boost_from_average": "0",
            "num_class": str(form.outputs if form.outputs > 1 else 0),
            "num_feature": str(len(form.features)),
            "num_target": "1",
        },
        "objective": {"name": form.objective} | objective,
    }
    return json.dumps({"learner": learner, "version": _VERSION}, allow_nan=False).encode()


def read_trees(data: bytes, form: Form, most: int, named: bool = True) -> list[Tree]:
    """Return the trees of a model in XGBoost's JSON.

    Parameters
    ----------
    data : bytes
        From an untrusted sender; empty for no trees.
    form : Form
        The form that the model must have.
    most : int
        The most trees that it may hold.
    named : bool
        Whether it must have the features' names.

    Returns
    -------
    list of dict
        Safe for XGBoost's parser: each is a tree, splits by features that exist and has finite
        numbers.

    Raises
    ------
    ValueError
        If the data is anything else; the error's text gives the reason.
    """
    if not data:
        return []
    longest = form.most_bytes(most)
    if len(data) > longest:
        raise ValueError(f"a model of {most} trees has at most {longest} bytes, got {len(data)}")
    # Counted before the text is parsed, which takes memory.
    count = data.count(b'"left_children"')
    if count > most:
        raise ValueError(f"the model must have at most {most} trees, got {count}")
    try:
        learner = json.loads(data)["learner"]
        features = int(learner["learner_model_param"]["num_feature"])
        base_scores = [float(score) for score in _base_scores(learner)]
        names = learner["feature_names"]
        objective = learner["objective"]["name"]
        model = learner["gradient_booster"]["model"]
        given = model["trees"]
        trees_a_round = model["gbtree_model_param"]["num_parallel_tree"]
    except _MALFORMED as error:
        raise ValueError(f"this is no model in XGBoost's JSON ({type(error).__name__})") from None
    if objective != form.objective:
        raise ValueError(f"the trees are for {str(objective)[:40]!r} instead of {form.objective!r}")
    if features != len(form.features):
        raise ValueError(f"the trees are of {features} features instead of {len(form.features)}")
    if named and names != list(form.features):
        raise ValueError("the features have other names, or another order")
    if not all(math.isclose(score, form.base, rel_tol=1e-5) for score in base_scores):
        raise ValueError(f"the trees start from {base_scores[0]:g} instead of {form.base:g}")
    if not isinstance(given, list):
        raise ValueError(f"the trees must be a list, got {type(given).__name__}")
    wanted = form.settings.trees_a_round
    if len(given) > most or len(given) % wanted:
        raise ValueError(
            f"the model must have at most {most} trees, {wanted} a round, got {len(given)}"
        )
    if trees_a_round != str(wanted):
        raise ValueError(f"the model has {str(trees_a_round)[:20]!r} trees a round, not {wanted}")
    return [_checked(tree, number, form) for number, tree in enumerate(given)]


def model_bytes(arrays: ArrayRecord) -> bytes:
    """Return the bytes of the model that Flower's strategies for XGBoost send and expect.

    Raises
    ------
    ValueError
        If there is not one array of bytes, named ``0``.
    """
    if [*arrays] != ["0"]:
        raise ValueError(f"there are {len(arrays)} arrays instead of one, named 0")
    values = view(arrays["0"])
    if values.dtype != np.uint8 or values.ndim != 1:
        raise ValueError(f"the model is {values.dtype}{list(values.shape)} instead of bytes")
    return values.tobytes()


def leaves(tree: Tree) -> NDArray[np.float64]:
    """Return the numbers in a tree's leaves."""
    if "leaf_weights" in tree:
        return np.asarray(tree["leaf_weights"], dtype=np.float64)
    return np.asarray(tree["split_conditions"])[np.asarray(tree["left_children"]) < 0]


def clipped(tree: Tree, most: float) -> Tree:
    """Return a tree with the numbers of its leaves clipped to -`most` to `most`."""
    if "leaf_weights" in tree:
        return tree | {"leaf_weights": np.clip(leaves(tree), -most, most).tolist()}
    values = np.asarray(tree["split_conditions"])
    leaf = np.asarray(tree["left_children"]) < 0
    values[leaf] = np.clip(values[leaf], -most, most)
    return tree | {"split_conditions": values.tolist()}


def _base_scores(learner: dict[str, Any]) -> list[str]:
    text: str = learner["learner_model_param"]["base_score"]
    return text.strip("[]").split(",")


class _Nodes(NamedTuple):
    """The columns of a tree, one entry a node."""

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    split: NDArray[np.int64]
    default: NDArray[np.int64]
    values: NDArray[Any]

    @property
    def inner(self) -> NDArray[np.bool_]:
        """Which nodes are split; the others are leaves."""
        return np.not_equal(self.left, -1)

    @property
    def children(self) -> NDArray[np.int64]:
        """The left children of the inner nodes, then their right children."""
        return np.concatenate([self.left[self.inner], self.right[self.inner]])

    @property
    def parents(self) -> NDArray[np.int64]:
        """The parents of `children`."""
        return np.tile(np.flatnonzero(self.inner), 2)


def _checked(given: Any, number: int, form: Form) -> Tree:
    """Return one tree, written from scratch from what a prediction needs."""
    nodes = _read_nodes(given, number, form)
    _require_tree(nodes, number, form)
    if form.outputs == 1:
        return _as_json(nodes, form)
    length = int((~nodes.inner).sum()) * form.outputs
    weights = _column(given, number, "leaf_weights", length, whole=False)
    return _as_json(nodes, form) | _with_leaves(nodes, weights)


def _read_nodes(given: Any, number: int, form: Form) -> _Nodes:
    """Read the columns of a tree; raise `ValueError` if one is missing or malformed."""
    if not isinstance(given, dict) or not isinstance(given.get("left_children"), list):
        raise ValueError(f"tree {number} must be an object with a list left_children")
    count = len(given["left_children"])
    most = 2 ** (form.settings.tree_max_depth + 1) - 1
    if not 1 <= count <= most:
        raise ValueError(f"tree {number} must have 1 to {most} nodes, got {count}")
    return _Nodes(
        left=_column(given, number, "left_children", count, whole=True),
        right=_column(given, number, "right_children", count, whole=True),
        split=_column(given, number, "split_indices", count, whole=True),
        default=_column(given, number, "default_left", count, whole=True),
        values=_column(given, number, "split_conditions", count, whole=False),
    )


def _column(
    given: Mapping[str, Any], number: int, key: str, length: int, whole: bool
) -> NDArray[Any]:
    """Read one list of numbers of a tree; raise `ValueError` if it is malformed."""
    values = given.get(key)
    complete = isinstance(values, list) and len(values) == length
    try:
        numbers = np.asarray(values if complete else None)
    except ValueError:  # Lists of different lengths.
        numbers = np.asarray(None)
    if numbers.shape != (length,) or numbers.dtype.kind not in ("i" if whole else "if"):
        kind = "whole numbers" if whole else "numbers"
        raise ValueError(f"{key} of tree {number} must be {length} {kind}")
    if not (np.abs(numbers.astype(np.float64)) <= _MOST_FLOAT).all():
        raise ValueError(
            f"{key} of tree {number} must be finite numbers from -{_MOST_FLOAT:g} to "
            f"{_MOST_FLOAT:g}"
        )
    return numbers


def _require_tree(nodes: _Nodes, number: int, form: Form) -> None:
    """Raise `ValueError` if the nodes are not one tree on the features of the form."""
    count = len(nodes.left)
    inner = nodes.inner
    # Each node but the first is a child once, of an earlier node: no cycle, no separate part.
    each_once = np.array_equal(np.sort(nodes.children), np.arange(1, count))
    if not each_once or not (nodes.children > nodes.parents).all():
        raise ValueError(
            f"each node of tree {number} but the first must be the child of one node before it"
        )
    split = nodes.split[inner]
    if not ((split >= 0) & (split < len(form.features))).all():
        raise ValueError(
            f"tree {number} must split by the features 0 to {len(form.features) - 1} only"
        )
    if form.outputs > 1:
        # The right child of a leaf is the index of its numbers.
        indices = nodes.right[~inner]
        if not np.array_equal(np.sort(indices), np.arange(len(indices))):
            raise ValueError(f"each leaf of tree {number} must have numbers of its own")


def _as_json(nodes: _Nodes, form: Form) -> Tree:
    """Return the tree in XGBoost's JSON format."""
    count = len(nodes.left)
    inner = nodes.inner
    parents = np.full(count, -1 if form.outputs > 1 else _NO_PARENT)
    parents[nodes.children] = nodes.parents
    return {
        "base_weights": [0.0] * (count * form.outputs),
        "categories": [],
        "categories_nodes": [],
        "categories_segments": [],
        "categories_sizes": [],
        "default_left": (nodes.default != 0).astype(int).tolist(),
        "id": 0,
        "left_children": nodes.left.tolist(),
        "loss_changes": [0.0] * count,
        "parents": parents.tolist(),
        "right_children": np.where(inner, nodes.right, -1).tolist(),
        "split_conditions": nodes.values.astype(np.float64).tolist(),
        "split_indices": np.where(inner, nodes.split, 0).tolist(),
        "split_type": [0] * count,
        "sum_hessian": [0.0] * count,
        "tree_param": {
            "num_deleted": "0",
            "num_feature": str(len(form.features)),
            "num_nodes": str(count),
            "size_leaf_vector": str(form.outputs),
        },
    }


def _with_leaves(nodes: _Nodes, weights: NDArray[Any]) -> Tree:
    """Return the entries in which a tree with several numbers in each leaf differs from others."""
    return {
        "leaf_weights": weights.astype(np.float64).tolist(),
        "right_children": nodes.right.tolist(),
        "split_conditions": np.where(nodes.inner, nodes.values, 0.0).astype(np.float64).tolist(),
    }
