"""Settings of how trees are grown."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.section import Section

# XGBoost computes in float32, in which a smaller learning rate would have no effect.
LEAST_PART = 1e-6
_MOST_WEIGHT = 10**6


@dataclass(frozen=True)
class TreeSettings(Section):
    """How trees are grown, from the run config.

    Attributes
    ----------
    tree_max_depth : int
        From 1 to 12.
    tree_learning_rate : float
        Learning rate of all trees of a round together; from 1e-6 to 1. In bagging each hospital's
        trees get an equal share of it.
    trees_a_round : int
        Number of trees that a hospital grows side by side in a round, as a random forest does; from
        1 to 1,000. More than one needs a `tree_subsample` below 1.
    tree_subsample : float
        Share of the training rows that each tree is grown from; from 1e-6 to 1.
    tree_min_child_weight, tree_lambda : float
        XGBoost's ``min_child_weight`` and ``lambda``; from 0 to 1,000,000.
    """

    tree_max_depth: int = 4
    tree_learning_rate: float = 0.3
    trees_a_round: int = 1
    tree_subsample: float = 1.0
    tree_min_child_weight: float = 1.0
    tree_lambda: float = 1.0

    def __post_init__(self) -> None:
        self.require_within(1, 12, "tree_max_depth")
        self.require_within(1, 1000, "trees_a_round")
        self.require_within(LEAST_PART, 1, "tree_learning_rate", "tree_subsample")
        self.require_within(0, _MOST_WEIGHT, "tree_min_child_weight", "tree_lambda")
        alone = self.trees_a_round == 1 or self.tree_subsample < 1
        self.require("trees_a_round", alone, "1 unless tree-subsample is below 1 (they are alike)")
