"""Settings of how trees are grown."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.allowed import Within
from fedmed_flower.settings.section import Section, setting

# XGBoost computes in float32, in which a smaller learning rate would have no effect.
LEAST_PART = 1e-6
_MOST_WEIGHT = 1e6


@dataclass(frozen=True)
class TreeSettings(Section):
    """How trees are grown."""

    tree_max_depth: int = setting(4, "Largest depth of a tree.", Within(1, 12), "levels")
    tree_learning_rate: float = setting(
        0.3,
        "Learning rate of all trees of a round together. In bagging each hospital's trees get an "
        "equal share of it.",
        Within(LEAST_PART, 1.0),
    )
    trees_a_round: int = setting(
        1,
        "Trees that a hospital grows side by side in a round, as a random forest does. More than "
        "one needs tree-subsample below 1.",
        Within(1, 1000),
        "trees",
    )
    tree_subsample: float = setting(
        1.0, "Share of the training patients that each tree is grown from.", Within(LEAST_PART, 1.0)
    )
    tree_min_child_weight: float = setting(
        1.0, "XGBoost's min_child_weight.", Within(0.0, _MOST_WEIGHT)
    )
    tree_lambda: float = setting(1.0, "XGBoost's lambda.", Within(0.0, _MOST_WEIGHT))

    def check(self) -> None:
        """Refuse trees that would all be alike."""
        alone = self.trees_a_round == 1 or self.tree_subsample < 1
        self.require("trees_a_round", alone, "1 unless tree-subsample is below 1 (they are alike)")
