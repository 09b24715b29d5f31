"""What a reply must satisfy before it may touch the model."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedmed_flower.arrays.views import view
from fedmed_flower.data.site import in_simulation
from fedmed_flower.metrics.names import is_pooled_only
from fedmed_flower.metrics.pooling import check_counts
from fedmed_flower.wire import read_error

log = logging.getLogger("flwr.fedmed")

# No hospital has more records; who says so wants its update to be the whole mean.
MOST_EXAMPLES = 10**9


def screen(
    reply: Message,
    weighted_by_key: str,
    layout: ArrayRecord | None,
    companions: Mapping[str, ArrayRecord] | None = None,
) -> str | None:
    """Return why a reply cannot be used, or None if it can.

    Parameters
    ----------
    reply : Message
    weighted_by_key : str
        Name of the metric that is the reply's weight.
    layout : ArrayRecord or None
        Whose keys, shapes and dtypes a training reply's arrays must have. Whether the values are
        finite is seen when they are read for the first time, by `Updates`. None for an evaluation
        reply, which carries no arrays.
    companions : mapping of str to ArrayRecord, optional
        Layouts of the records that must come back beside the model, by name.
    """
    if reply.has_error():
        return error_text(reply)
    if not reply.has_content():
        return "the reply is empty"
    metrics = list(reply.content.metric_records.values())
    if len(metrics) != 1:
        return f"the reply has {len(metrics)} metric records instead of one"
    if (reason := _screen_weight(metrics[0], weighted_by_key, layout is not None)) is not None:
        return reason
    for name, value in metrics[0].items():
        if not all(_fits(number) for number in (value if isinstance(value, list) else [value])):
            return f"{name} is an integer beyond 64 bits"
    if layout is None:
        return check_counts(metrics[0])
    return screen_arrays(reply, layout, companions or {})


def screen_arrays(
    reply: Message, layout: ArrayRecord, companions: Mapping[str, ArrayRecord]
) -> str | None:
    """Return why the arrays of a reply with content cannot be used, or None if they can."""
    records = reply.content.array_records
    for name, wanted in companions.items():
        if name not in records:
            return f"the reply has no array record {name}"
        if (flaw := _flaw_of(records[name], wanted)) is not None:
            return f"in {name}, {flaw}"
    models = [arrays for name, arrays in records.items() if name not in companions]
    if len(models) != 1:
        return f"the reply has {len(models)} array records instead of one"
    return _flaw_of(models[0], layout)


def model_of(reply: Message, companions: Collection[str]) -> ArrayRecord:
    """Return the model in a reply that passed `screen`: the record that is no companion."""
    records = reply.content.array_records
    return next(arrays for name, arrays in records.items() if name not in companions)


def error_text(reply: Message) -> str:
    """Return why a site failed; outside a simulation, of an exception no more than its class.

    A ClientApp that is not ours, or cannot be imported, makes Flower send the exception's text,
    which may name a patient: it must not go on into log, history and report.
    """
    reason = reply.error.reason or f"error {reply.error.code}"
    site, text = read_error(reason)
    found = re.match(r"<class '([\w.]+)'>:", text)
    if found and site is None and not in_simulation():
        return found[1].rpartition(".")[2]
    return text


def _screen_weight(metrics: MetricRecord, key: str, training: bool) -> str | None:
    weight = metrics.get(key)
    if weight is None:
        return f"the metric {key} is missing"
    if isinstance(weight, list):
        return f"{key} is a list instead of one number"
    most = MOST_EXAMPLES if key == "num-examples" else 2**53
    if not 0 <= weight <= most or (training and weight == 0):
        least = "above" if training else "at least"
        return f"{key} must be {least} 0 and at most {most:.0e}, got {weight}"
    return None


def _fits(number: float) -> bool:
    # Flower's wire format ends there, but a run in one process hands any integer over.
    return not isinstance(number, int) or -(2**63) <= number < 2**63


def _flaw_of(arrays: ArrayRecord, layout: ArrayRecord) -> str | None:
    if missing := layout.keys() - arrays.keys():
        return f"{len(missing)} arrays are missing, such as {min(missing)}"
    if extra := arrays.keys() - layout.keys():
        return f"{len(extra)} arrays are not in the model, such as {min(extra)}"
    for key, array in arrays.items():
        try:
            values, wanted = view(array), view(layout[key])
        except ValueError as error:
            return f"{key} cannot be read: {error}"
        if values.shape != wanted.shape or values.dtype != wanted.dtype:
            return (
                f"{key} is {values.dtype}{list(values.shape)} "
                f"instead of {wanted.dtype}{list(wanted.shape)}"
            )
    return None


def _shared_metrics(records: list[MetricRecord]) -> list[str]:
    """Return the names of the metrics that all records hold in the same form.

    A name counts where it stands for one finite number in each record, or for lists of one length:
    one site's NaN must not become the mean of all.
    """
    first, *others = records
    return [
        name
        for name, value in first.items()
        if _form(value) is not None
        and all(name in other and _form(other[name]) == _form(value) for other in others)
    ]


def sound_figures(replies: list[Message]) -> list[Message]:
    """Leave out evaluation replies with a number that is not finite where most have a finite one.

    One site's NaN would take the figure from all others. Nothing is left out if most have none.
    """
    finite = [
        {name: _form(value) is not None for name, value in metrics_of(reply).items()}
        for reply in replies
    ]
    having = Counter(name for record in finite for name in record if record[name])
    usual = {name for name, count in having.items() if 2 * count > len(replies)}
    kept = []
    for reply, record in zip(replies, finite, strict=True):
        odd = [name for name in record if name in usual and not record[name]]
        if odd:
            log.warning("a site is left out of the averages: its %s is not finite", odd[0])
        else:
            kept.append(reply)
    return kept


def _form(value: object) -> int | None:
    try:
        # A sum is finite where all numbers are: a record's list holds numbers of one type.
        whole: float = sum(value) if isinstance(value, list) else value  # type: ignore[assignment]
        if not math.isfinite(whole):
            return None
    except (TypeError, OverflowError):
        return None
    return len(value) if isinstance(value, list) else -1


def metrics_of(reply: Message) -> MetricRecord:
    """Return the only metric record of a reply that passed `screen`."""
    return next(iter(reply.content.metric_records.values()))


def first_arrays(replies: Iterable[Message]) -> ArrayRecord | None:
    """Return the first sound arrays among the replies, where there are any."""
    for reply in replies:
        if not reply.has_error() and reply.has_content():
            for arrays in reply.content.array_records.values():
                if _flaw_of(arrays, arrays) is None:
                    return arrays
    return None


def capped(weights: Sequence[float], share: float | None) -> list[float]:
    """Cut weights so that none is more than a share of their sum.

    Parameters
    ----------
    weights : sequence of float
        Above 0.
    share : float or None
        Above 0, at most 1. All weights become equal where it is no more than 1 / their number.
    """
    if share is None or max(weights) <= share * sum(weights):
        return list(weights)
    ordered = sorted(weights, reverse=True)
    for count in range(1, len(ordered)):
        # With `count` weights cut to the same limit, the limit is the share of what results.
        if count * share < 1:
            limit = share * sum(ordered[count:]) / (1 - count * share)
            if limit >= ordered[count]:
                return [min(weight, limit) for weight in weights]
    return [1.0] * len(weights)


def with_shared_metrics(
    replies: list[Message],
    weighted_by_key: str,
    share: float | None = None,
    weights: Sequence[float] | None = None,
    pooled: Collection[str] = (),
) -> list[Message]:
    """Return copies that name their records alike and hold only the metrics that all have.

    Entries may be taken out of the copies' records: the replies do not change.

    Parameters
    ----------
    weighted_by_key : str
        Name of the metric that is a reply's weight.
    share : float, optional
        No copy's weight is more than this share of all, as in `capped`.
    weights : sequence of float, optional
        The copies' weights, in place of their own.
    pooled : collection of str, optional
        Metrics of which a figure is told in any case: where not all replies have one, nobody is
        warned.
    """
    names = _shared_metrics([metrics_of(reply) for reply in replies])
    reported = {name for reply in replies for name in metrics_of(reply) if name not in pooled}
    # Figures of groups, and sums, come from what all sites have together.
    if dropped := {
        name for name in reported - {*names} if "@" not in name and not is_pooled_only(name)
    }:
        log.warning("not in every reply, so not averaged: %s", ", ".join(sorted(dropped)))
    metrics_key = next(iter(replies[0].content.metric_records))
    arrays_key = next(iter(replies[0].content.array_records), None)
    given: list[float] = [metrics_of(reply)[weighted_by_key] for reply in replies]  # type: ignore[misc]
    wanted = capped(given, share) if weights is None else weights
    messages = []
    for reply, own, weight in zip(replies, given, wanted, strict=True):
        content = RecordDict(dict(reply.content.config_records.items()))
        for arrays in reply.content.array_records.values():
            content[arrays_key or "arrays"] = ArrayRecord(dict(arrays))
        metrics = {name: metrics_of(reply)[name] for name in names}
        # Integers stay integers, so that Flower's averages come out to the same bit.
        weight = own if own == weight else weight
        content[metrics_key] = MetricRecord(metrics | {weighted_by_key: weight})
        message = copy.copy(reply)
        message.content = content
        messages.append(message)
    return messages


def without_arrays(reply: Message) -> Message:
    """Return a copy that does not hold the reply's arrays."""
    content = RecordDict(dict(reply.content.config_records.items()))
    for key, metrics in reply.content.metric_records.items():
        content[key] = metrics
    message = copy.copy(reply)
    message.content = content
    return message


def with_arrays(reply: Message, arrays: ArrayRecord) -> Message:
    """Return a copy that holds these arrays alone, under the name of the reply's first."""
    message = without_arrays(reply)
    message.content[next(iter(reply.content.array_records))] = arrays
    return message
