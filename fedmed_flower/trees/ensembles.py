"""Tree ensembles as XGBoost's JSON: what one is made of, checked before anybody makes use of it.

What is read here is written again from scratch before it goes on, to a server's model or to
XGBoost's own parser, so that nothing travels but the trees. Numbers that no prediction needs are
written as zeros: gain and cover tell how many patients are behind a node, and what became of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedmed_flower.arrays.views import view
from fedmed_flower.settings.trees import TreeSettings

# Of the server's messages: that they are about trees, and how these travel; and which part of the
# learning rate a hospital's trees have.
BAGGING, CYCLIC = "bagging", "cyclic"
MODEL = "model.json"

MOST_TREES = 10_000

# Parsed, a model takes up to twenty times as much.
_MOST_BYTES = 2**27
_VERSION = [3, 2, 0]
_OBJECTIVES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "binary": ("binary:logistic", {"reg_loss_param": {"scale_pos_weight": "1"}}),
    "multi-class": ("multi:softprob", {}),
    "count": ("count:poisson", {"poisson_regression_param": {"max_delta_step": "0.7"}}),
    "continuous": ("reg:squarederror", {"reg_loss_param": {"scale_pos_weight": "1"}}),
    "survival": ("survival:cox", {}),
}
# XGBoost's parameters may not hold these, nor its feature names.
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
        Of the schema.
    features : tuple of str
        Names of the columns of the matrix.
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
        """Return the greatest length of so many trees as JSON."""
        nodes: int = 2 ** (self.settings.tree_max_depth + 1)
        names = sum(len(name) for name in self.features)
        length = 2**16 + 16 * (names + len(self.features))
        return min(_MOST_BYTES, length + trees * nodes * (400 + 60 * self.outputs))


def plain_name(name: str) -> str:
    """Return a feature's name without what XGBoost's names may not hold."""
    return name.translate(_PLAIN)


def write_trees(form: Form, trees: Sequence[Tree], named: bool = True) -> bytes:
    """Return trees as a model in XGBoost's JSON.

    Parameters
    ----------
    form : Form
    trees : sequence of dict
        As `read_trees` returns them; those of a round after those of the round before.
    named : bool
        With the features' names; XGBoost then asks for them in the data, too.
    """
    side_by_side = form.settings.trees_a_round
    objective: dict[str, Any] = dict(_OBJECTIVES[form.task][1])
    if form.task == "multi-class":
        objective = {"softmax_multiclass_param": {"num_class": str(form.outputs)}}
    model = {
        "cats": {"enc": [], "feature_segments": [], "sorted_idx": []},
        "gbtree_model_param": {
            "num_parallel_tree": str(side_by_side),
            "num_trees": str(len(trees)),
        },
        "iteration_indptr": list(range(0, len(trees) + 1, side_by_side)),
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
        Of anybody; nothing for no trees.
    form : Form
        What it must be.
    most : int
        Trees that it may hold.
    named : bool
        Whether it must have the features' names.

    Returns
    -------
    list of dict
        Which XGBoost's parser can be given without fear: each is a tree, with splits by features
        that there are and finite numbers.

    Raises
    ------
    ValueError
        If it is something else, with the reason.
    """
    if not data:
        return []
    if len(data) > (longest := form.most_bytes(most)):
        raise ValueError(f"a model of {most} trees has at most {longest} bytes, got {len(data)}")
    # Counted before the text is parsed, which takes memory.
    if (count := data.count(b'"left_children"')) > most:
        raise ValueError(f"there are {count} trees, where {most} may be")
    try:
        learner = json.loads(data)["learner"]
        features = int(learner["learner_model_param"]["num_feature"])
        base = [float(each) for each in _base_scores(learner)]
        names, objective = learner["feature_names"], learner["objective"]["name"]
        model = learner["gradient_booster"]["model"]
        given, side_by_side = model["trees"], model["gbtree_model_param"]["num_parallel_tree"]
        count = len(given) if isinstance(given, list) else -1
    except _MALFORMED as error:
        raise ValueError(f"this is no model in XGBoost's JSON ({type(error).__name__})") from None
    if objective != form.objective:
        raise ValueError(f"the trees are for {str(objective)[:40]!r} instead of {form.objective!r}")
    if features != len(form.features):
        raise ValueError(f"the trees are of {features} features instead of {len(form.features)}")
    if named and names != list(form.features):
        raise ValueError("the features have other names, or another order")
    if not all(math.isclose(each, form.base, rel_tol=1e-5) for each in base):
        raise ValueError(f"the trees start from {base[0]:g} instead of {form.base:g}")
    if not 0 <= count <= most or count % form.settings.trees_a_round:
        raise ValueError(f"there are {count} trees, where {most} may be")
    if side_by_side != str(form.settings.trees_a_round):
        wanted = form.settings.trees_a_round
        raise ValueError(f"{str(side_by_side)[:20]!r} trees a round are named instead of {wanted}")
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
    """Return a tree none of whose leaves holds a larger number."""
    if "leaf_weights" in tree:
        return tree | {"leaf_weights": np.clip(leaves(tree), -most, most).tolist()}
    values = np.asarray(tree["split_conditions"])
    leaf = np.asarray(tree["left_children"]) < 0
    values[leaf] = np.clip(values[leaf], -most, most)
    return tree | {"split_conditions": values.tolist()}


def _base_scores(learner: dict[str, Any]) -> list[str]:
    text: str = learner["learner_model_param"]["base_score"]
    return text.strip("[]").split(",")


def _checked(given: Any, number: int, form: Form) -> Tree:
    """Return one tree, written from scratch from what a prediction needs."""
    if not isinstance(given, dict) or not isinstance(given.get("left_children"), list):
        raise ValueError(f"tree {number} is none")
    count, most = len(given["left_children"]), 2 ** (form.settings.tree_max_depth + 1) - 1
    if not 1 <= count <= most:
        raise ValueError(f"tree {number} has {count} nodes, where {most} may be")

    def column(key: str, length: int, whole: bool) -> NDArray[Any]:
        values = given.get(key)
        fine = isinstance(values, list) and len(values) == length
        try:
            found = np.asarray(values if fine else None)
        except ValueError:  # Lists of lists.
            found = np.asarray(None)
        if found.shape != (length,) or found.dtype.kind not in ("i" if whole else "if"):
            raise ValueError(f"tree {number} has no {key} of {length} numbers")
        if not (np.abs(found.astype(np.float64)) <= _MOST_FLOAT).all():
            raise ValueError(f"tree {number} has {key} that are not finite")
        return found

    left, right, split = (
        column(key, count, True) for key in ("left_children", "right_children", "split_indices")
    )
    default, values = column("default_left", count, True), column("split_conditions", count, False)
    inner = left != -1
    indices = np.flatnonzero(inner)
    children = np.concatenate([left[inner], right[inner]])
    # Each but the root is the child of one before it: so there is no circle and no node apart.
    if not (
        np.array_equal(np.sort(children), np.arange(1, count))
        and (children > np.tile(indices, 2)).all()
    ):
        raise ValueError(f"tree {number} is none: its nodes do not hang together")
    if not ((split[inner] >= 0) & (split[inner] < len(form.features))).all():
        raise ValueError(f"tree {number} splits by a feature that there is not")
    parents = np.full(count, -1 if form.outputs > 1 else _NO_PARENT)
    parents[children] = np.tile(indices, 2)
    tree: Tree = {
        "base_weights": [0.0] * (count * form.outputs),
        "categories": [],
        "categories_nodes": [],
        "categories_segments": [],
        "categories_sizes": [],
        "default_left": (default != 0).astype(int).tolist(),
        "id": 0,
        "left_children": left.tolist(),
        "loss_changes": [0.0] * count,
        "parents": parents.tolist(),
        "right_children": np.where(inner, right, -1).tolist(),
        "split_conditions": values.astype(np.float64).tolist(),
        "split_indices": np.where(inner, split, 0).tolist(),
        "split_type": [0] * count,
        "sum_hessian": [0.0] * count,
        "tree_param": {
            "num_deleted": "0",
            "num_feature": str(len(form.features)),
            "num_nodes": str(count),
            "size_leaf_vector": str(form.outputs),
        },
    }
    if form.outputs > 1:
        ends = np.flatnonzero(~inner)
        if not np.array_equal(np.sort(right[ends]), np.arange(len(ends))):
            raise ValueError(f"tree {number} has leaves without numbers")
        weights = column("leaf_weights", len(ends) * form.outputs, False)
        tree["leaf_weights"] = weights.astype(np.float64).tolist()
        tree["right_children"] = right.tolist()
        tree["split_conditions"] = np.where(inner, values, 0.0).astype(np.float64).tolist()
    return tree
