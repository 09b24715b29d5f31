"""What hospitals contribute before the first round, by secure sums."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedmed_flower.data.summed import (
    mean_of,
    moments,
    parts_of_means,
    parts_of_squares,
    parts_told,
    told_by,
)
from fedmed_flower.secure.encoding import SecureError
from fedmed_flower.secure.parts import ONES
from fedmed_flower.secure.record import DATA
from fedmed_flower.secure.ring import Layout, Part
from fedmed_flower.server.secure import Opened, SecureSums
from fedmed_flower.settings.text import setting_error
from fedmed_flower.wire import COLUMNS, CONTRIBUTION, MEANS, RUN_KEY

log = logging.getLogger("flwr.fedmed")


def sum_contributions(
    sums: SecureSums, nodes: Collection[int], columns: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """Ask for the moments of columns of all hospitals together.

    A column that fewer hospitals can tell than a sum is of at least is left out; the log names it.

    Parameters
    ----------
    sums : SecureSums
    nodes : collection of int
        They are asked.
    columns : sequence of str

    Returns
    -------
    dict
        One contribution, as `data.preparation.contribution` returns it, by "sum of K hospitals";
        empty if there is no column.

    Raises
    ------
    InputError
        If a sum cannot be opened.
    """
    if not columns:
        return {}
    try:
        return _summed(sums, nodes, columns)
    except SecureError as error:
        raise setting_error(
            f"the statistics of columns cannot be summed: {error}. Run it again when all hospitals "
            'are there, or set preparation="declared" and give ranges in the schema',
            "preparation",
        ) from error


def _summed(
    sums: SecureSums, nodes: Collection[int], columns: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    sums.greet(nodes, 0)
    told = _asked(sums, nodes, "told", parts_told(columns))
    name = f"sum of {len(told.members)} hospitals"
    least = told.record.least
    known = []
    for column in columns:
        if told_by(told.values, column) >= least:
            known.append(column)
        else:
            text = "column %s: fewer than %d hospitals have enough patients with a value"
            log.warning(text, column, least)
    if not known:
        return {name: {}}
    of_means = _asked(sums, nodes, "means", parts_of_means(known))
    means = {column: mean_of(of_means.values, column) for column in known}
    of_squares = _asked(sums, nodes, "squares", parts_of_squares(known), means)
    return {name: moments(of_means.values | of_squares.values, means)}


def _asked(
    sums: SecureSums,
    nodes: Collection[int],
    question: str,
    parts: Iterable[Part],
    means: Mapping[str, float] | None = None,
) -> Opened:
    """Ask one of the three questions."""
    layout = Layout((*parts, ONES))
    record = sums.record(nodes, f"{CONTRIBUTION}/{question}", DATA, 0, layout, {})
    config: dict[str, Any] = {RUN_KEY: sums.run}
    if means is not None:
        config |= {COLUMNS: list(means), MEANS: list(means.values())}
    messages = [
        Message(
            RecordDict({"config": ConfigRecord(config)}),
            node_id,
            f"{MessageType.QUERY}.{CONTRIBUTION}",
        )
        for node_id in sums.nodes_of(record)
    ]
    return sums.sum(messages, record, CONTRIBUTION, sums.timeout)
