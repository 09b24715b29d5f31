"""From the replies of a round to the new model: all at once, or one by one as they come."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, Message, MetricRecord

from fedmed_flower.arrays import keep_dtypes, not_finite
from fedmed_flower.errors import InputError
from fedmed_flower.runfolder import ALL_SITES
from fedmed_flower.strategies.inbox import Kept
from fedmed_flower.strategies.optimising import OPTIMISERS, step
from fedmed_flower.strategies.screening import (
    capped,
    first_arrays,
    with_shared_metrics,
    without_arrays,
)
from fedmed_flower.updates import Mean, NotUsableError, Updates

if TYPE_CHECKING:
    from fedmed_flower.strategies.base import FedAvg

# More replies than these are added to the mean one by one where the rule is a mean.
STREAM_ABOVE = 100
Outcome = tuple[ArrayRecord | None, MetricRecord | None]


def aggregate(strategy: FedAvg, server_round: int, replies: Iterable[Message]) -> Outcome:
    """Screen replies and apply the strategy's rule, as `FedAvg.aggregate_train` tells."""
    strategy.server_round = server_round
    if not isinstance(replies, Sequence):
        rest = iter(replies)
        first = list(itertools.islice(rest, STREAM_ABOVE + 1))
        if len(first) > STREAM_ABOVE and strategy.is_plain_mean:
            return _one_by_one(strategy, server_round, first, rest)
        replies = [*first, *rest]
    if not replies:
        return None, None
    like = _layout(strategy, replies)
    kept = strategy.inbox.admit(server_round, "train", replies, strategy.weighted_by_key, like)
    usable = strategy.inbox.in_order(_weighed(strategy, server_round, kept))
    arrays, usable = _combine(strategy, server_round, usable, like)
    strategy.inbox.record(server_round, "train", usable)
    if arrays is None or like is None:
        return None, None
    return _conclude(strategy, server_round, arrays, usable, like)


def _one_by_one(
    strategy: FedAvg, server_round: int, first: list[Message], rest: Iterator[Message]
) -> Outcome:
    """Add replies to the mean as they come, so that none is kept."""
    inbox, like = strategy.inbox, _layout(strategy, first)
    if like is None:
        return aggregate(strategy, server_round, [*first, *rest])
    mean, slim = Mean(like), []
    first.reverse()
    replies = itertools.chain((first.pop() for _ in range(len(first))), rest)
    kept = inbox.admit(server_round, "train", replies, strategy.weighted_by_key, like)
    for reply in _weighed(strategy, server_round, kept):
        if (reason := not_finite(reply.arrays)) is not None:
            inbox.fail(server_round, "train", reply.site, reason)
            continue
        mean.add(reply.arrays, reply.weight)
        reply.message = without_arrays(reply.message)
        slim.append(reply)
    slim = inbox.in_order(slim)
    inbox.record(server_round, "train", slim)
    if not _suffice(strategy, server_round, slim):
        return None, None
    return _conclude(strategy, server_round, mean.result(), slim, like)


def _layout(strategy: FedAvg, replies: list[Message] | Sequence[Message]) -> ArrayRecord | None:
    """Return the arrays whose keys, shapes and dtypes all replies must have."""
    return strategy.sent_arrays if strategy.sent_arrays is not None else first_arrays(replies)


def _weighed(strategy: FedAvg, server_round: int, kept: Iterable[Kept]) -> Iterator[Kept]:
    for reply in kept:
        try:
            reply.weight = strategy.weigh(reply.site, reply.message)
            if not 0 < reply.weight < math.inf:
                raise ValueError(f"its weight must be above 0 and finite, got {reply.weight}")
        except ValueError as error:
            strategy.inbox.fail(server_round, "train", reply.site, str(error))
        else:
            yield reply


def _suffice(strategy: FedAvg, server_round: int, usable: list[Kept]) -> bool:
    needed = max(strategy.min_replies, strategy.needed())
    if len(usable) >= needed:
        return True
    reason = f"{len(usable)} usable replies, {needed} needed: the model stays as it was"
    strategy.inbox.fail(server_round, "train", ALL_SITES, reason)
    return False


def _combine(
    strategy: FedAvg, server_round: int, usable: list[Kept], like: ArrayRecord | None
) -> tuple[ArrayRecord | None, list[Kept]]:
    """Apply the rule, and again without the replies that prove not to be usable."""
    while _suffice(strategy, server_round, usable) and like is not None:
        arrays = [reply.arrays for reply in usable]
        names, metrics = [reply.site for reply in usable], [reply.metrics for reply in usable]
        updates = Updates(arrays, like, strategy.sent_arrays, names, metrics)
        try:
            if strategy.max_update_norm is not None:
                updates.require_norms(strategy.max_update_norm)
            weights = capped([reply.weight for reply in usable], strategy.max_weight_share)
            combined = _apply(strategy, server_round, usable, updates, weights)
        except NotUsableError as error:
            for place, reason in error.reasons.items():
                strategy.inbox.fail(server_round, "train", usable[place].site, reason)
            usable = [reply for place, reply in enumerate(usable) if place not in error.reasons]
            continue
        if (flaw := not_finite(combined)) is None:
            return combined, usable
        strategy.inbox.fail(server_round, "train", ALL_SITES, f"in the new model, {flaw}")
        break
    return None, usable


def _apply(
    strategy: FedAvg,
    server_round: int,
    usable: list[Kept],
    updates: Updates,
    weights: Sequence[float],
) -> ArrayRecord:
    """Apply our rule, or that of a strategy that is neither ours nor Flower's."""
    other = strategy.below
    if other is None or issubclass(other, OPTIMISERS):
        combined = strategy.combine(updates, weights)
        updates.check()
        return combined
    updates.check()
    messages = with_shared_metrics([reply.message for reply in usable], strategy.weighted_by_key)
    made, _ = other.aggregate_train(strategy, server_round, messages)
    return ArrayRecord() if made is None else keep_dtypes(made, updates.like)


def _conclude(
    strategy: FedAvg, server_round: int, arrays: ArrayRecord, usable: list[Kept], like: ArrayRecord
) -> Outcome:
    """Average the metrics, and let Flower's server optimiser make its step."""
    key, share = strategy.weighted_by_key, strategy.max_weight_share
    messages = with_shared_metrics([reply.message for reply in usable], key, share)
    contents = [message.content for message in messages]
    metrics = strategy.train_metrics_aggr_fn(contents, key)
    strategy.begun = True
    other = strategy.below
    if other is not None and issubclass(other, OPTIMISERS):
        if strategy.sent_arrays is None:
            raise InputError(
                f"{type(strategy).__name__} moves the global model, which it does not know: "
                "call configure_train before aggregate_train"
            )
        arrays = step(strategy, other, server_round, arrays, strategy.sent_arrays)
    return arrays, metrics
