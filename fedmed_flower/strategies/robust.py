"""Strategies that malicious or broken sites cannot bend: each applies a rule of `rules`."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy.multikrum import select_multikrum

from fedmed_flower.arrays.updates import Updates
from fedmed_flower.errors import InputError
from fedmed_flower.strategies.base import FedAvg
from fedmed_flower.strategies.rules import (
    buckets,
    bulyan_selection,
    centered_clipping,
    geometric_median,
    median,
    multi_krum,
    nearest_neighbours,
    nearest_to_median,
    squared_distances,
    trimmed_mean,
)

log = logging.getLogger("flwr.fedmed")

NEAREST = "nearest"
BUCKETING = "bucketing"


class Robust(FedAvg):
    """What the strategies of this module have in common.

    Parameters
    ----------
    num_malicious_nodes : int
        Sites that may be malicious or broken (f). At least 0. A round is refused if it has too few
        sites for the rule to withstand f of them. A site whose reply is malformed, or has values
        that are not finite or overflow, counts as one of the f. Krum, MultiKrum, Bulyan and
        ``mixing="nearest"`` compute with f; the other rules only make that check.
    mixing : {"nearest", "bucketing"}, optional
        Average updates before the rule: honest hospitals with different patients send different
        updates, and a rule may take one of them for an attacker's. ``"nearest"``: each update with
        its ``K - f`` nearest. ``"bucketing"``: in random buckets. None does not average.
    bucket_size : int
        Updates in a bucket. At least 2.

    Raises
    ------
    InputError
        If an argument is out of range.
    """

    num_malicious_nodes: int
    # Whether the rule uses distances, which are over the floating-point entries alone.
    by_distance = False

    def __init__(
        self, *args: Any, mixing: str | None = None, bucket_size: int = 2, **kwargs: Any
    ) -> None:
        if {flower.MultiKrum, flower.Bulyan}.isdisjoint(type(self).__mro__):
            self.num_malicious_nodes = kwargs.pop("num_malicious_nodes", 0)
        super().__init__(*args, **kwargs)
        if self.num_malicious_nodes < 0:
            raise InputError(
                f"num_malicious_nodes must be at least 0, got {self.num_malicious_nodes}"
            )
        if mixing not in (None, NEAREST, BUCKETING):
            raise InputError(f"mixing must be {NEAREST!r}, {BUCKETING!r} or None, got {mixing!r}")
        if mixing == NEAREST and self.num_malicious_nodes == 0:
            raise InputError(
                f"mixing={NEAREST!r} needs num_malicious_nodes above 0: with 0 it is a plain mean"
            )
        if bucket_size < 2:
            raise InputError(f"bucket_size must be at least 2, got {bucket_size}")
        self.mixing = mixing
        self.bucket_size = bucket_size

    def needed(self) -> int:
        """Return the fewest replies with which the rule withstands the malicious sites."""
        rows = self.rows_needed(max(0, self.num_malicious_nodes - self.run.faulty))
        return (rows - 1) * self.bucket_size + 1 if self.mixing == BUCKETING else rows

    def rows_needed(self, num_malicious: int) -> int:
        """Return the fewest updates, after mixing, that the rule needs: an honest majority."""
        return 2 * num_malicious + 1

    def withstood(self, rows: int) -> int:
        """Return how many of `rows` updates the rule takes to be malicious.

        That is `num_malicious_nodes` if there are updates enough. With fewer updates it is the
        largest f for which they suffice, but not less than `num_malicious_nodes` minus the number
        of faulty replies of the round.
        """
        left = max(0, self.num_malicious_nodes - self.run.faulty)
        promised = range(self.num_malicious_nodes, left, -1)
        return next((f for f in promised if self.rows_needed(f) <= rows), left)

    def combine(self, updates: Updates, weights: Sequence[float]) -> ArrayRecord:
        """Mix the updates if `mixing` is set, then apply the rule.

        Raises
        ------
        InputError
            If an entry is complex: the rules need an order or a distance.
        """
        unmixed = updates
        for key, array in updates.layout.items():
            if array.dtype.startswith("complex"):
                raise InputError(f"{key} is {array.dtype}: no robust rule can combine it")
        if self.mixing == NEAREST:
            distances = squared_distances(updates.gram())
            mix = nearest_neighbours(distances, self.withstood(updates.count))
            updates = updates.mixed(mix)
        elif self.mixing == BUCKETING:
            rng = np.random.default_rng((self.seed, self.run.server_round, 2))
            updates = updates.mixed(buckets(updates.count, self.bucket_size, rng))
        if self.mixing is not None:
            weights = [1.0] * updates.count
        combined = self.rule(updates, weights)
        # The rule trusts a site for its floating-point entries: its integers may be anything.
        if self.by_distance and (others := unmixed.others()) is not None:
            return ArrayRecord(dict(combined) | dict(median(others)))
        return combined

    @abstractmethod
    def rule(self, updates: Updates, weights: Sequence[float]) -> ArrayRecord:
        """Return the new model: all that a new robust strategy must define."""


class FedMedian(Robust, flower.FedMedian):
    """The median of each parameter (`median`).

    Examples
    --------
    >>> from flwr.app import Array
    >>> sent = [ArrayRecord({"w": Array(np.array([v], np.float32))}) for v in (1, 2, 90)]
    >>> FedMedian().combine(Updates(sent, sent[0]), weights=[1, 1, 1])["w"].numpy()
    array([2.], dtype=float32)
    """

    def rule(self, updates: Updates, weights: Sequence[float]) -> ArrayRecord:
        """Return the medians."""
        return median(updates)


class FedTrimmedAvg(Robust, flower.FedTrimmedAvg):
    """The mean of each parameter without its extremes (`trimmed_mean`).

    Parameters
    ----------
    beta : float
        Share of the values that is cut off at each end. At least 0, below 0.5.

    Raises
    ------
    InputError
        If `beta` is out of range, or 0 while some sites may be malicious.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            # Positional, it is the last of Flower's arguments.
            beta = kwargs["beta"] if "beta" in kwargs else args[-1]
            raise InputError(f"beta must be at least 0 and below 0.5, got {beta}") from error
        if self.beta == 0 and self.num_malicious_nodes > 0:
            raise InputError(
                f"beta must be above 0 to withstand num_malicious_nodes={self.num_malicious_nodes}"
            )

    def rows_needed(self, num_malicious: int) -> int:
        """Return the fewest replies of which `num_malicious` are cut off at each end."""
        if num_malicious == 0:
            return 1
        near = math.ceil(num_malicious / self.beta)
        # `trimmed_mean` cuts by the same product, which may be rounded either way.
        fitting = (count for count in (near - 1, near) if int(self.beta * count) >= num_malicious)
        return max(2 * num_malicious + 1, next(fitting, near + 1))

    def rule(self, updates: Updates, weights: Sequence[float]) -> ArrayRecord:
        """Return the trimmed means."""
        if self.beta > 0 and int(self.beta * updates.count) == 0:
            log.warning(
                "beta=%s of %d updates is less than one: nothing is trimmed",
                self.beta,
                updates.count,
            )
        return trimmed_mean(updates, self.beta)


class MultiKrum(Robust, flower.MultiKrum):
    """The mean of the ``num_nodes_to_select`` most trustworthy updates (`multi_krum`).

    The mean is weighted by the numbers of examples, as in Flower, or plain with `mixing`. With
    fewer than ``2f + 3`` replies, Flower's computes a model, which f malicious sites can bend; ours
    leaves the model as it was.
    """

    by_distance = True
    if_too_few = " (Flower's Krum and MultiKrum compute a model nevertheless)"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.num_nodes_to_select < 1:
            raise InputError(
                f"num_nodes_to_select must be at least 1, got {self.num_nodes_to_select}"
            )

    def rows_needed(self, num_malicious: int) -> int:
        """Return ``2f + 3``, or more if `num_nodes_to_select` honest updates need it."""
        f = num_malicious
        return max(2 * f + 3, self.num_nodes_to_select + f) if f else 1

    def rule(self, updates: Updates, weights: Sequence[float]) -> ArrayRecord:
        """Return the mean of the selected updates."""
        f = self.withstood(updates.count)
        return multi_krum(updates, weights, f, self.num_nodes_to_select)


class Krum(MultiKrum, flower.Krum):
    """The most trustworthy update alone (`multi_krum`)."""


class Bulyan(Robust, flower.Bulyan):
    """Krum's choice, then for each parameter the mean of the values nearest its median.

    El Mhamdi, Guerraoui, Rouault: The Hidden Vulnerability of Distributed Learning in Byzantium,
    ICML 2018, https://arxiv.org/abs/1802.07927. Updates are chosen one after the other, as in the
    paper; a `selection_rule` chooses them instead, as in Flower.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.mixing is not None and self.selection_rule is not select_multikrum:
            raise InputError(
                "mixing must be None with a selection_rule, which takes whole replies, "
                f"got {self.mixing!r}"
            )

    def rows_needed(self, num_malicious: int) -> int:
        """Return ``4f + 3``."""
        return 4 * num_malicious + 3

    def rule(self, updates: Updates, weights: Sequence[float]) -> ArrayRecord:
        """Return the means near the medians."""
        f = self.withstood(updates.count)
        if self.selection_rule is select_multikrum:
            chosen = bulyan_selection(squared_distances(updates.gram()), f)
        else:
            updates.check()
            chosen = updates.chosen_by(self.selection_rule, f, updates.count - 2 * f)
        near = max(1, len(chosen) - 2 * f)
        return updates.subset(chosen).order_statistics(0, len(chosen), nearest_to_median(near))


class GeometricMedian(Robust):
    """The point with the least sum of distances to all updates (`geometric_median`)."""

    by_distance = True

    def rule(self, updates: Updates, weights: Sequence[float]) -> ArrayRecord:
        """Return the geometric median."""
        return updates.weighted_sum(geometric_median(updates.gram()))


class CenteredClipping(Robust):
    """The mean of the updates, each clipped around the global model (`centered_clipping`).

    Parameters
    ----------
    tau : float, optional
        Radius of the clipping. Above 0; None takes the median distance.
    num_iterations : int
        Number of clippings, each around the result of the one before. At least 1.
    """

    by_distance = True

    def __init__(
        self, *args: Any, tau: float | None = None, num_iterations: int = 3, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if tau is not None and not tau > 0:
            raise InputError(f"tau must be above 0, got {tau}")
        if num_iterations < 1:
            raise InputError(f"num_iterations must be at least 1, got {num_iterations}")
        # Not `tau`, which is another number in Flower's adaptive optimisers.
        self.radius = tau
        self.num_iterations = num_iterations

    def rule(self, updates: Updates, weights: Sequence[float]) -> ArrayRecord:
        """Return the clipped mean; around the geometric median if the global model is unknown."""
        gram = updates.gram()
        start = None if updates.centred else geometric_median(gram)
        shares = centered_clipping(gram, self.radius, self.num_iterations, start)
        rest = 1 - shares.sum() if updates.centred else 0.0
        return updates.weighted_sum(shares, rest)
