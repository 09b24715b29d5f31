"""Each hospital's models at every hospital: what a run folder keeps of it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

from fedmed_flower.files import write_rows
from fedmed_flower.metrics.names import MAIN
from fedmed_flower.wire import ALL_SITES, PERSONAL

COLUMNS = ("model", "trained-at", "tested-at", "metric", "value")
# A summary must stay a file that can be read at once; of more models times sites it has no table.
_MOST_CELLS = 10_000

Table = Mapping[str, Mapping[str, float]]


def kept(table: Table, num_models: int) -> dict[str, dict[str, float]]:
    """Return what a summary keeps of a model's test: by site the metrics that judge a run.

    Parameters
    ----------
    table
        Metrics by site, with ``all`` for all sites together, which is left out.
    num_models
        How many models were tested so. The result is empty if the table of all of them would be
        too large for a summary; ``cross-sites.csv`` has it.
    """
    if num_models * len(table) > _MOST_CELLS:
        return {}
    return {
        site: {key: metrics[key] for key in MAIN if key in metrics}
        for site, metrics in table.items()
        if site != ALL_SITES
    }


def as_csv(by_kind: Mapping[str, Mapping[str, Table]], federated: Table, pooled: Table) -> bytes:
    """Return ``cross-sites.csv``: a line for each model, hospital of its test and metric.

    Parameters
    ----------
    by_kind
        Models of one hospital each: by kind, such as ``alone``, and by hospital, the tests of its
        model.
    federated, pooled
        The tests of the federated model and of the one trained on pooled data; empty if there is
        none.

    Returns
    -------
    bytes
        ``model`` is a kind, ``federated`` or ``pooled``; ``trained-at`` and ``tested-at`` are
        hospitals, or ``all``. Metrics of groups of patients are left out.
    """
    text = io.StringIO(newline="")
    lines = [COLUMNS]
    for kind, tables in by_kind.items():
        for site, table in tables.items():
            lines += _lines(kind, site, table)
    lines += _lines("federated", ALL_SITES, federated)
    lines += _lines("pooled", ALL_SITES, pooled)
    write_rows(text, lines)
    return text.getvalue().encode(errors="backslashreplace")


def _lines(model: str, trained_at: str, table: Table) -> Iterator[Any]:
    for tested_at, metrics in table.items():
        for metric, value in metrics.items():
            # What fine-tuning tells of itself is no figure of the test.
            if "@" not in metric and metric not in PERSONAL:
                yield model, trained_at, tested_at, metric, value
