"""From the replies of a round to a model: all at once, or one by one as they come.

Nothing here knows a strategy: the functions take replies, layouts and the strategy's rule, and
report each reply that they leave out through a callback.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedmed_flower.arrays.updates import Mean, NotUsableError, Updates
from fedmed_flower.arrays.views import not_finite, view
from fedmed_flower.server.inbox import AcceptedReply
from fedmed_flower.server.screening import (
    capped,
    metrics_of,
    partly_finite,
    with_shared_metrics,
    without_arrays,
)
from fedmed_flower.wire import EPSILON

# If more replies than this are awaited and the rule is a mean, each is added to it as it comes.
STREAM_ABOVE = 100
# The sum of all weights, and a weight times a value, must be finite.
_MOST_WEIGHT = 1e100

Weigh = Callable[[str, Message], float]
Decode = Callable[[ArrayRecord], ArrayRecord]
MetricsRule = Callable[[list[RecordDict], str], MetricRecord]
# Records that a site's reply does not count: site, reason, and whether no honest site sends such
# a reply.
Reject = Callable[[str, str, bool], None]
# Makes the new model from replies, given as messages and as updates with their weights.
Rule = Callable[[list[AcceptedReply], Updates, list[float]], ArrayRecord | None]
# Records something about a site whose reply counts: site, text.
Note = Callable[[str, str], None]
# Makes the next companion of a name.
CompanionRule = Callable[[str, Updates, list[float]], ArrayRecord]


@dataclass(frozen=True)
class Limits:
    """Bounds of one reply: `max_weight_share` and `max_update_norm` of `FedAvg`.

    `lengths` are the largest median lengths of the run so far, by companion. A control variate of
    SCAFFOLD hardly changes at the end, and wholly in a site's first round: an honest site would be
    too long by the median of the round alone.
    """

    weight_share: float | None = None
    update_norm: float | None = None
    lengths: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Combined:
    """What a rule made of a round's replies.

    Attributes
    ----------
    model : ArrayRecord or None
        None if there were too few replies, or the rule returned no model.
    replies : list of AcceptedReply
        The replies that were not rejected, in the order of their sites' names.
    companions : dict of str to ArrayRecord
        The companions of the next round, by name.
    tried : bool
        Whether there were enough replies for the rule.
    lengths : dict of str to float
        As `Limits.lengths`, with this round.
    """

    model: ArrayRecord | None
    replies: list[AcceptedReply]
    companions: dict[str, ArrayRecord] = field(default_factory=dict)
    tried: bool = True
    lengths: dict[str, float] = field(default_factory=dict)


def first_and_rest(replies: Iterable[Message]) -> tuple[list[Message], Iterator[Message] | None]:
    """Return the first replies as a list, and an iterator over the rest.

    The rest is None if all replies are in the list: if they come as a sequence, or are at most
    `STREAM_ABOVE`.
    """
    if isinstance(replies, Sequence):
        return list(replies), None
    rest = iter(replies)
    first = list(itertools.islice(rest, STREAM_ABOVE + 1))
    return first, (rest if len(first) > STREAM_ABOVE else None)


def drain(first: list[Message], rest: Iterator[Message]) -> Iterator[Message]:
    """Yield the messages of `first`, emptying it to save memory, then those of `rest`."""
    first.reverse()
    while first:
        yield first.pop()
    yield from rest


def weighed(
    replies: Iterable[AcceptedReply], weigh: Weigh, decode: Decode, reject: Reject
) -> Iterator[AcceptedReply]:
    """Give each reply its weight and the decoded arrays; reject a reply if either fails."""
    for reply in replies:
        try:
            reply.weight = weigh(reply.site, reply.message)
            if not 0 < reply.weight <= _MOST_WEIGHT:
                raise ValueError(
                    f"its weight must be above 0 and at most {_MOST_WEIGHT:.0e}, got {reply.weight}"
                )
            reply.arrays = decode(reply.arrays)
        except ValueError as error:
            reject(reply.site, str(error), False)
        else:
            yield reply


def mean_one_by_one(
    replies: Iterable[AcceptedReply], layout: ArrayRecord, reject: Reject
) -> tuple[Mean, list[AcceptedReply]]:
    """Add each reply to the mean as it comes, then drop its arrays to save memory."""
    mean = Mean(layout)
    added = []
    for reply in replies:
        if (flaw := not_finite(reply.arrays)) is not None:
            reject(reply.site, flaw, False)
            continue
        mean.add(reply.arrays, reply.weight)
        reply.drop_arrays()
        reply.used = True
        added.append(reply)
    return mean, added


def combine(
    replies: list[AcceptedReply],
    layout: ArrayRecord | None,
    sent: ArrayRecord | None,
    companions: Mapping[str, ArrayRecord],
    rule: Rule,
    companion_rule: CompanionRule,
    limits: Limits,
    suffice: Callable[[int], bool],
    reject: Reject,
) -> Combined:
    """Apply a rule; if it rejects replies, apply it again without them.

    Parameters
    ----------
    replies : list of AcceptedReply
        In the order of their sites' names.
    layout : ArrayRecord or None
        Keys, shapes and dtypes of the model; None if they are not known.
    sent : ArrayRecord or None
        The global model that the sites started from; None if it is not known.
    companions : mapping of str to ArrayRecord
        What was sent beside the model, by name.
    rule, companion_rule : callable
        Raise `NotUsableError` if updates must not be used.
    limits : Limits
    suffice : callable
        Whether a number of replies is enough; called again after replies were left out.
    reject : callable
        Called for each reply that is left out.

    Returns
    -------
    Combined
    """
    norms_checked = False
    lengths = dict(limits.lengths)
    while suffice(len(replies)) and layout is not None:
        updates = _updates([reply.arrays for reply in replies], layout, sent, replies)
        try:
            if limits.update_norm is not None and not norms_checked:
                updates.check()
                beside = _companion_updates(replies, companions)
                for each in beside.values():
                    each.check()
                # Lengths are compared once: without the longest the median would be lower.
                norms_checked = True
                _require_norms(updates, beside, limits.update_norm, lengths)
            fresh = [reply.weight * reply.freshness for reply in replies]
            weights = capped(fresh, limits.weight_share)
            # Changes of companions add up over the rounds: an old one counts as much as a new one.
            whole = capped([reply.weight for reply in replies], limits.weight_share)
            following = {}
            for name, record in companions.items():
                returned = [reply.companions[name] for reply in replies]
                following[name] = _next_companion(
                    name, returned, record, replies, whole, companion_rule
                )
            model = rule(replies, updates, weights)
        except NotUsableError as error:
            for index, reason in error.reasons.items():
                reject(replies[index].site, reason, error.broken)
            replies = [reply for k, reply in enumerate(replies) if k not in error.reasons]
            continue
        for index in updates.used:
            replies[index].used = True
        return Combined(model, replies, following, lengths=lengths)
    return Combined(None, replies, tried=False)


def _updates(
    arrays: Sequence[ArrayRecord],
    layout: ArrayRecord,
    sent: ArrayRecord | None,
    replies: Sequence[AcceptedReply],
) -> Updates:
    sites = [reply.site for reply in replies]
    metrics = [reply.metrics for reply in replies]
    return Updates(arrays, layout, sent, sites, metrics)


def _companion_updates(
    replies: Sequence[AcceptedReply], companions: Mapping[str, ArrayRecord]
) -> dict[str, Updates]:
    return {
        name: _updates([reply.companions[name] for reply in replies], sent, sent, replies)
        for name, sent in companions.items()
    }


def _require_norms(
    model: Updates, companions: Mapping[str, Updates], times: float, lengths: dict[str, float]
) -> None:
    """Require the norms of all records of each reply; raise once for all that are too long.

    Parameters
    ----------
    model : Updates
    companions : mapping of str to Updates
    times : float
        As in `Updates.require_norms`.
    lengths : dict of str to float
        The largest median so far of each companion; that of this round joins it.
    """
    reasons: dict[int, str] = {}
    try:
        model.require_norms(times)
    except NotUsableError as error:
        reasons |= error.reasons
    for name, updates in companions.items():
        least = lengths.get(name, 0.0)
        try:
            lengths[name] = max(least, updates.require_norms(times, least, name))
        except NotUsableError as error:
            reasons |= error.reasons
    if reasons:
        raise NotUsableError(reasons, broken=False)


def _next_companion(
    name: str,
    returned: list[ArrayRecord],
    sent: ArrayRecord,
    replies: list[AcceptedReply],
    weights: list[float],
    rule: CompanionRule,
) -> ArrayRecord:
    updates = _updates(returned, sent, sent, replies)
    combined = rule(name, updates, weights)
    updates.check()
    return combined


def shapes(arrays: ArrayRecord) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array."""
    return {key: view(array).shape for key, array in arrays.items()}


def flaw_of(model: ArrayRecord | None) -> str | None:
    """Return why there is no finite model; None if there is one."""
    if model is None:
        return "the rule made no model"
    flaw = not_finite(model)
    return None if flaw is None else f"in the new model, {flaw}"


def average_metrics(
    replies: Iterable[AcceptedReply],
    key: str,
    share: float | None,
    rule: MetricsRule,
    note: Note,
) -> MetricRecord | None:
    """Average the metrics of the used replies, as Flower does; None if no reply was used.

    Parameters
    ----------
    replies : iterable of AcceptedReply
    key : str
        Name of the metric that is a reply's weight.
    share : float or None
        Largest share of one reply's weight in the sum of all.
    rule : callable
        Flower's average, or the app's own.
    note : callable
        As in `means_of_finite`.
    """
    used = [reply for reply in replies if reply.used]
    if not used:
        return None
    means = means_of_finite(used, key, share, rule, note)
    messages = with_shared_metrics(
        [without_arrays(reply.message) for reply in used], key, share, pooled=means
    )
    metrics = rule([message.content for message in messages], key)
    metrics.update(means)
    if EPSILON in metrics:
        metrics[EPSILON] = max(metrics_of(message)[EPSILON] for message in messages)
    return metrics


def means_of_finite(
    replies: Sequence[AcceptedReply],
    key: str,
    share: float | None,
    rule: MetricsRule,
    note: Note,
) -> dict[str, Any]:
    """Average the metrics that are not finite in some replies over the other replies.

    A rule of the app's own is not asked for single metrics: it may need others beside them.

    Parameters
    ----------
    replies : sequence of AcceptedReply
        At least one.
    key, share, rule
        As in `average_metrics`.
    note : callable
        Called for each site whose value is left out.

    Returns
    -------
    dict of str to float
        The mean of each metric of `partly_finite`; empty if the rule is the app's own.
    """
    messages = [without_arrays(reply.message) for reply in replies]
    partly = partly_finite(messages)
    means: dict[str, Any] = {}
    for name, finite in partly.items():
        for reply, usable in zip(replies, finite, strict=True):
            if not usable:
                value = reply.metrics[name]
                note(reply.site, f"its {name} is {value}: left out of the average")
        if rule.__module__.startswith("flwr."):
            usable_messages = list(itertools.compress(messages, finite))
            others = {other for message in messages for other in metrics_of(message)}
            trimmed = with_shared_metrics(usable_messages, key, share, pooled=others)
            means[name] = rule([message.content for message in trimmed], key)[name]
    return means
