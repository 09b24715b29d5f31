"""From the replies of a round to the new model: all at once, or one by one as they come."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, Message, MetricRecord

from fedmed_flower.arrays.updates import Mean, NotUsableError, Updates
from fedmed_flower.arrays.views import keep_dtypes, not_finite, view
from fedmed_flower.errors import InputError
from fedmed_flower.server.inbox import Kept
from fedmed_flower.server.screening import (
    capped,
    first_arrays,
    metrics_of,
    with_shared_metrics,
    without_arrays,
)
from fedmed_flower.strategies.server_optimizers import OPTIMISERS, step
from fedmed_flower.wire import ALL_SITES, EPSILON

if TYPE_CHECKING:
    from fedmed_flower.strategies.base import FedAvg

# More replies than these are added to the mean one by one where the rule is a mean.
STREAM_ABOVE = 100
# The sum of all weights, and a weight times a value, must be finite.
_MOST_WEIGHT = 1e100
Outcome = tuple[ArrayRecord | None, MetricRecord | None]


def aggregate(strategy: FedAvg, server_round: int, replies: Iterable[Message]) -> Outcome:
    """Screen replies and apply the strategy's rule, as `FedAvg.aggregate_train` tells."""
    strategy.server_round = server_round
    try:
        return _aggregate(strategy, server_round, replies)
    finally:
        strategy.faulty = 0


def _aggregate(strategy: FedAvg, server_round: int, replies: Iterable[Message]) -> Outcome:
    if not isinstance(replies, Sequence):
        rest = iter(replies)
        first = list(itertools.islice(rest, STREAM_ABOVE + 1))
        if len(first) > STREAM_ABOVE and strategy.is_plain_mean:
            return _one_by_one(strategy, server_round, first, rest)
        replies = [*first, *rest]
    if not replies and strategy.needed() > 0:
        return None, None
    like = _layout(strategy, replies)
    kept = strategy.inbox.admit(server_round, "train", replies, strategy.weighted_by_key, like)
    usable = strategy.inbox.in_order(_weighed(strategy, server_round, kept))
    strategy.faulty = strategy.inbox.malformed
    arrays, usable = _combine(strategy, server_round, usable, like)
    strategy.inbox.record(server_round, "train", usable)
    return (None, None) if arrays is None else _conclude(strategy, server_round, arrays, usable)


def _one_by_one(
    strategy: FedAvg, server_round: int, first: list[Message], rest: Iterator[Message]
) -> Outcome:
    """Add replies to the mean as they come, so that none is kept."""
    inbox, like = strategy.inbox, _layout(strategy, first)
    if like is None:
        return _aggregate(strategy, server_round, [*first, *rest])
    mean, slim = Mean(like), []
    first.reverse()
    replies = itertools.chain((first.pop() for _ in range(len(first))), rest)
    kept = inbox.admit(server_round, "train", replies, strategy.weighted_by_key, like)
    for reply in _weighed(strategy, server_round, kept):
        if (reason := not_finite(reply.arrays)) is not None:
            inbox.fail(server_round, "train", reply.site, reason)
            continue
        mean.add(reply.arrays, reply.weight)
        reply.message, reply.used = without_arrays(reply.message), True
        slim.append(reply)
    slim = inbox.in_order(slim)
    inbox.record(server_round, "train", slim)
    if not _suffice(strategy, server_round, slim):
        return None, None
    arrays = mean.result()
    if not _is_model(strategy, server_round, arrays):
        return None, None
    return _conclude(strategy, server_round, arrays, slim)


def _layout(strategy: FedAvg, replies: list[Message] | Sequence[Message]) -> ArrayRecord | None:
    """Return the arrays whose keys, shapes and dtypes all replies must have."""
    return strategy.sent_arrays if strategy.sent_arrays is not None else first_arrays(replies)


def _weighed(strategy: FedAvg, server_round: int, kept: Iterable[Kept]) -> Iterator[Kept]:
    for reply in kept:
        try:
            reply.weight = strategy.weigh(reply.site, reply.message)
            if not 0 < reply.weight <= _MOST_WEIGHT:
                raise ValueError(
                    f"its weight must be above 0 and at most {_MOST_WEIGHT:.0e}, got {reply.weight}"
                )
        except ValueError as error:
            strategy.inbox.fail(server_round, "train", reply.site, str(error))
        else:
            yield reply


def _suffice(strategy: FedAvg, server_round: int, usable: list[Kept]) -> bool:
    # A strategy that needs none releases something where nobody replied.
    needed = max(strategy.min_replies, strategy.needed()) if strategy.needed() else 0
    if len(usable) >= needed:
        return True
    reason = f"{len(usable)} usable replies, {needed} needed: the model stays as it was"
    strategy.inbox.fail(server_round, "train", ALL_SITES, reason)
    return False


def _combine(
    strategy: FedAvg, server_round: int, usable: list[Kept], like: ArrayRecord | None
) -> tuple[ArrayRecord | None, list[Kept]]:
    """Apply the rule, and again without the replies that prove not to be usable."""
    longest = strategy.max_update_norm
    while _suffice(strategy, server_round, usable) and like is not None:
        arrays = [reply.arrays for reply in usable]
        names, metrics = [reply.site for reply in usable], [reply.metrics for reply in usable]
        updates = Updates(arrays, like, strategy.sent_arrays, names, metrics)
        try:
            if longest is not None:
                updates.check()
                # Once: the median of those that are left would be a lower one.
                times, longest = longest, None
                updates.require_norms(times)
            weights = capped([reply.weight for reply in usable], strategy.max_weight_share)
            combined = _apply(strategy, server_round, usable, updates, weights)
        except NotUsableError as error:
            for place, reason in error.reasons.items():
                strategy.inbox.fail(server_round, "train", usable[place].site, reason)
            strategy.faulty += len(error.reasons) if error.broken else 0
            usable = [reply for place, reply in enumerate(usable) if place not in error.reasons]
            continue
        for place in updates.used:
            usable[place].used = True
        return combined if _is_model(strategy, server_round, combined) else None, usable
    return None, usable


def _is_model(strategy: FedAvg, server_round: int, arrays: ArrayRecord | None) -> bool:
    """Return whether a round has led to a finite model; record it where it has not."""
    flaw = "there is none" if arrays is None else not_finite(arrays)
    if flaw is not None:
        strategy.inbox.fail(server_round, "train", ALL_SITES, f"in the new model, {flaw}")
    return flaw is None


def _apply(
    strategy: FedAvg,
    server_round: int,
    usable: list[Kept],
    updates: Updates,
    weights: Sequence[float],
) -> ArrayRecord | None:
    """Apply our rule, or that of a strategy that is neither ours nor Flower's."""
    other = strategy.below
    if other is None or issubclass(other, OPTIMISERS):
        combined = strategy.combine(updates, weights)
        updates.check()
        return combined
    updates.check()
    replies = [reply.message for reply in usable]
    messages = with_shared_metrics(replies, strategy.weighted_by_key, weights=weights)
    made, _ = other.aggregate_train(strategy, server_round, messages)
    if made is not None and _shapes(made) != _shapes(updates.like):
        raise InputError(f"{other.__name__} returns a model of other entries or shapes")
    return None if made is None else keep_dtypes(made, updates.like)


def _shapes(arrays: ArrayRecord) -> dict[str, tuple[int, ...]]:
    return {key: view(array).shape for key, array in arrays.items()}


def _conclude(
    strategy: FedAvg, server_round: int, arrays: ArrayRecord, usable: list[Kept]
) -> Outcome:
    """Average the metrics, and let Flower's server optimiser make its step."""
    metrics = None
    # As in Flower, those that the rule selects.
    if chosen := [without_arrays(reply.message) for reply in usable if reply.used]:
        key, share = strategy.weighted_by_key, strategy.max_weight_share
        messages = with_shared_metrics(chosen, key, share)
        contents = [message.content for message in messages]
        metrics = strategy.train_metrics_aggr_fn(contents, key)
        if EPSILON in metrics:
            metrics[EPSILON] = max(metrics_of(message)[EPSILON] for message in messages)
    strategy.begun = True
    other = strategy.below
    if other is not None and issubclass(other, OPTIMISERS):
        if strategy.sent_arrays is None:
            raise InputError(
                f"{type(strategy).__name__} moves the global model, which it does not know: "
                "call configure_train before aggregate_train"
            )
        moved = step(strategy, other, server_round, arrays, strategy.sent_arrays)
        if moved is None:
            reason = f"the step of {other.__name__} leads beyond what the model can hold"
            strategy.inbox.fail(server_round, "train", ALL_SITES, reason)
            return None, None
        arrays = moved
    return arrays, metrics
