"""What a reply must satisfy before it may touch the model."""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedmed_flower.arrays.views import Forms, form_of, record_of, records_of
from fedmed_flower.data.site import in_simulation
from fedmed_flower.metrics.names import is_pooled_only
from fedmed_flower.metrics.pooling import check_counts
from fedmed_flower.server.traffic import size_of
from fedmed_flower.wire import read_error

log = logging.getLogger("flwr.fedmed")

# No hospital has more examples: a site that reports more would be the whole mean.
MOST_EXAMPLES = 10**9
# Of one reply: how many metrics, letters of a metric's name, and bytes beside the arrays that were
# asked for. More would cost the server minutes and memory.
MOST_METRICS = 1000
_MOST_NAME = 200
_MOST_BESIDE = 64 * 2**20


def screen(
    reply: Message,
    weighted_by_key: str,
    layout: ArrayRecord | None,
    companions: Mapping[str, ArrayRecord] | None = None,
) -> str | None:
    """Return why a reply cannot be used; None if it can.

    Parameters
    ----------
    reply : Message
    weighted_by_key : str
        Name of the metric that is the reply's weight.
    layout : ArrayRecord or None
        Keys, shapes and dtypes that a training reply's arrays must have. `Updates` checks that the
        values are finite, when it reads them for the first time. None for an evaluation reply,
        which carries no arrays.
    companions : mapping of str to ArrayRecord, optional
        Layouts of the records that must come back beside the model, by name.
    """
    if reply.has_error():
        return error_text(reply)
    if not reply.has_content():
        return "the reply is empty"
    excess = metrics_excess(reply.content) or _size_excess(
        reply.content, layout is not None, companions or {}
    )
    if excess is not None:
        return excess
    metrics = list(records_of(reply.content, MetricRecord).values())
    if len(metrics) != 1:
        return f"the reply has {len(metrics)} metric records instead of one"
    reason = _screen_weight(metrics[0], weighted_by_key, layout is not None)
    if reason is not None:
        return reason
    for name, value in metrics[0].items():
        if not _fits(value if isinstance(value, list) else [value]):
            return f"{name} is an integer beyond 64 bits"
    if layout is None:
        return check_counts(metrics[0])
    return screen_arrays(reply, layout, companions or {})


def metrics_excess(content: RecordDict) -> str | None:
    """Return why a reply's metrics are too many, or their names too long; None if they are not."""
    for record in records_of(content, MetricRecord).values():
        if len(record) > MOST_METRICS:
            return f"the reply has {len(record):,} metrics, at most {MOST_METRICS:,} are taken"
        longest = max(map(len, record), default=0)
        if longest > _MOST_NAME:
            return f"the name of a metric has {longest:,} letters, at most {_MOST_NAME} are taken"
    return None


def _size_excess(content: RecordDict, with_model: bool, companions: Collection[str]) -> str | None:
    """Return why what a reply holds beside model and companions is too large; None if it is not."""
    beside = {
        name: record
        for name, record in content.items()
        if not isinstance(record, ArrayRecord) or not (with_model or name in companions)
    }
    size = size_of(beside)
    if size > _MOST_BESIDE:
        return f"the reply has {size:,} bytes beside the model, at most {_MOST_BESIDE:,} are taken"
    return None


def screen_arrays(
    reply: Message, layout: ArrayRecord, companions: Mapping[str, ArrayRecord]
) -> str | None:
    """Return why the arrays of a reply with content cannot be used; None if they can."""
    records = records_of(reply.content, ArrayRecord)
    for name, wanted in companions.items():
        if name not in records:
            return f"the reply has no array record {name}"
        flaw = _layout_flaw(records[name], wanted)
        if flaw is not None:
            return f"in {name}, {flaw}"
    models = [arrays for name, arrays in records.items() if name not in companions]
    if len(models) != 1:
        return f"the reply has {len(models)} array records instead of one"
    return _layout_flaw(models[0], layout)


def model_of(reply: Message, companions: Collection[str]) -> ArrayRecord:
    """Return the model in a reply that passed `screen`: the record that is no companion."""
    records = records_of(reply.content, ArrayRecord)
    return next(arrays for name, arrays in records.items() if name not in companions)


def error_text(reply: Message) -> str:
    """Return why a site failed; outside a simulation, only the class of an exception.

    If a ClientApp is not ours or cannot be imported, Flower sends the exception's text. It may name
    a patient, so it must not reach log, history and report.
    """
    reason = reply.error.reason or f"error {reply.error.code}"
    site, text = read_error(reason)
    exception = re.match(r"<class '([\w.]+)'>:", text)
    if exception and site is None and not in_simulation():
        return exception[1].rpartition(".")[2]
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


def _fits(numbers: Sequence[float]) -> bool:
    # Flower's wire format has 64 bits; a run in one process hands over any integer. The numbers of
    # a list are of one type.
    if not numbers or not isinstance(numbers[0], int):
        return True
    return min(numbers) >= -(2**63) and max(numbers) < 2**63


def _layout_flaw(arrays: ArrayRecord, layout: ArrayRecord) -> str | None:
    try:
        forms = {key: form_of(array) for key, array in layout.items()}
    except ValueError as error:
        return f"an array cannot be read: {error}"
    return form_flaw(arrays, forms)


def form_flaw(arrays: ArrayRecord, forms: Forms) -> str | None:
    """Return which array of a record has not the wanted shape and dtype; None if all have."""
    if missing := forms.keys() - arrays.keys():
        return f"{len(missing)} arrays are missing, such as {min(missing)}"
    if extra := arrays.keys() - forms.keys():
        return f"{len(extra)} arrays are not in the model, such as {min(extra)}"
    for key, array in arrays.items():
        try:
            shape, dtype = form_of(array)
        except ValueError as error:
            return f"{key} cannot be read: {error}"
        if (shape, dtype) != forms[key]:
            wanted_shape, wanted_dtype = forms[key]
            return f"{key} is {dtype}{list(shape)} instead of {wanted_dtype}{list(wanted_shape)}"
    return None


def _shared_metrics(records: list[MetricRecord]) -> list[str]:
    """Return the names of the metrics that all records hold in the same form.

    A name counts if it stands for one finite number in each record, or for lists of one length with
    finite sums: one site's NaN must not become the mean of all.
    """
    first, *others = records
    return [
        name
        for name, value in first.items()
        if _form(value) is not None
        and all(name in other and _form(other[name]) == _form(value) for other in others)
    ]


def partly_finite(replies: Sequence[Message]) -> dict[str, list[bool]]:
    """Return the metrics that are finite in more than half of the replies, but not in all.

    Only metrics count that each reply holds as one number.

    Returns
    -------
    dict of str to list of bool
        Of each such metric: whether it is finite in each of the replies.
    """
    records = [metrics_of(reply) for reply in replies]
    partly = {}
    for name in records[0]:
        values = [record.get(name) for record in records]
        if all(isinstance(value, int | float) for value in values):
            finite = [_form(value) is not None for value in values]
            if len(finite) < 2 * sum(finite) and not all(finite):
                partly[name] = finite
    return partly


def _form(value: object) -> int | None:
    """Return -1 for a finite number, the length of a list with a finite sum; None for others."""
    try:
        whole: float = sum(value) if isinstance(value, list) else value  # type: ignore[assignment]
        if not math.isfinite(whole):
            return None
    except (TypeError, OverflowError):
        return None
    return len(value) if isinstance(value, list) else -1


def metrics_of(reply: Message) -> MetricRecord:
    """Return the only metric record of a reply that passed `screen`."""
    return next(iter(records_of(reply.content, MetricRecord).values()))


def first_arrays(replies: Iterable[Message]) -> ArrayRecord | None:
    """Return the first arrays among the replies that can be read; None if there are none."""
    for reply in replies:
        if not reply.has_error() and reply.has_content():
            for arrays in records_of(reply.content, ArrayRecord).values():
                if _layout_flaw(arrays, arrays) is None:
                    return arrays
    return None


def capped(weights: Sequence[float], share: float | None) -> list[float]:
    """Cut weights so that none is more than a share of the sum of all.

    Parameters
    ----------
    weights : sequence of float
        Above 0.
    share : float or None
        Above 0, at most 1. All weights become equal if it is at most 1 / their number. None cuts
        nothing.
    """
    if share is None or max(weights) <= share * sum(weights):
        return list(weights)
    ordered = sorted(weights, reverse=True)
    for count in range(1, len(ordered)):
        # If `count` weights are cut to one limit, the limit is `share` of the sum after the cut.
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
    """Return copies with the same record names that hold only the metrics that all replies have.

    The copies have records of their own: taking entries out of them does not change the replies.

    Parameters
    ----------
    weighted_by_key : str
        Name of the metric that is a reply's weight.
    share : float, optional
        Largest share of a copy's weight in the sum of all, as in `capped`.
    weights : sequence of float, optional
        The copies' weights, in place of those of the replies.
    pooled : collection of str, optional
        Metrics that are pooled: if some replies lack one, no warning is logged.
    """
    names = _shared_metrics([metrics_of(reply) for reply in replies])
    reported = {name for reply in replies for name in metrics_of(reply) if name not in pooled}
    # Metrics of groups, and sums, are pooled: not every site must have them.
    dropped = {name for name in reported - {*names} if "@" not in name and not is_pooled_only(name)}
    if dropped:
        log.warning("not in every reply, so not averaged: %s", ", ".join(sorted(dropped)))
    metrics_key = next(iter(records_of(replies[0].content, MetricRecord)))
    arrays_key = next(iter(records_of(replies[0].content, ArrayRecord)), None)
    given: list[float] = [metrics_of(reply)[weighted_by_key] for reply in replies]  # type: ignore[misc]
    wanted = capped(given, share) if weights is None else weights
    messages = []
    for reply, given_weight, weight in zip(replies, given, wanted, strict=True):
        content = RecordDict({**records_of(reply.content, ConfigRecord)})
        for arrays in records_of(reply.content, ArrayRecord).values():
            content[arrays_key or "arrays"] = record_of(arrays)
        metrics = {name: metrics_of(reply)[name] for name in names}
        # An integer stays an integer, so that Flower's averages are equal to the bit.
        weight = given_weight if given_weight == weight else weight
        content[metrics_key] = MetricRecord(metrics | {weighted_by_key: weight})
        message = copy.copy(reply)
        message.content = content
        messages.append(message)
    return messages


def without_arrays(reply: Message) -> Message:
    """Return a copy that does not hold the reply's arrays."""
    content = RecordDict({**records_of(reply.content, ConfigRecord)})
    for key, metrics in records_of(reply.content, MetricRecord).items():
        content[key] = metrics
    message = copy.copy(reply)
    message.content = content
    return message


def with_arrays(reply: Message, arrays: ArrayRecord) -> Message:
    """Return a copy that holds `arrays` alone, under the name of the reply's first record."""
    message = without_arrays(reply)
    message.content[next(iter(records_of(reply.content, ArrayRecord)))] = arrays
    return message
