"""Rows of a table of methods, always with what each hospital reaches alone.

On some data a method repairs federated averaging and is still no better than each hospital's own
model. A table without that model would hide it, so `rows` refuses runs that have not trained one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import documented

from fedmed_flower.metrics.names import lower_is_better

HEAD = ("method", "model", "mean hospital", "worst hospital", "mean hospital of each seed")
# Keys of a summary's test, and what the table calls the models.
_MODELS = {"sites": "federated", "own": "own", "personal": "fine-tuned"}

Test = Mapping[str, Any]


def rows(
    methods: Mapping[str, Sequence[Test]], metric: str, digits: int = 3
) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a table with `HEAD`: the models of each method, then pooled and alone.

    Parameters
    ----------
    methods
        By name of the method, the ``test`` of the summary of each of its runs, one a seed. At
        least one method was run with ``baselines=true``: the last rows are of its models.
    metric
        On each hospital's own test records.

    Raises
    ------
    SystemExit
        If no method was run so, or a model lacks the metric at one of the hospitals.
    """
    beside = [tests for tests in methods.values() if tests and all(t.get("local") for t in tests)]
    if not beside:
        raise SystemExit(
            "no method of this table was run with baselines=true: what each hospital reaches alone "
            "is not known; run one of them so"
        )
    for name, tests in methods.items():
        for key, model in _MODELS.items():
            if all(test.get(key) for test in tests):
                yield _row((name, model), [test[key] for test in tests], metric, digits)
    tests = beside[0]
    if all(test.get("pooled") for test in tests):
        pooled = [test["pooled"]["sites"] for test in tests]
        yield _row(("none", "all data pooled"), pooled, metric, digits)
    alone = [test["local"] for test in tests]
    yield _row(("none", "each hospital alone"), alone, metric, digits)


def _row(names: tuple[str, str], seeds: list[Test], metric: str, digits: int) -> tuple[str, ...]:
    """Return a row; each of `seeds` has the metrics of each hospital."""
    worst = max if lower_is_better(metric) else min
    means = []
    worsts = []
    for sites in seeds:
        lacking = [site for site, metrics in sites.items() if metrics.get(metric) is None]
        if lacking:
            raise SystemExit(f"{' '.join(names)}: no {metric} of {', '.join(lacking)}")
        values = [metrics[metric] for metrics in sites.values()]
        means.append(statistics.fmean(values))
        worsts.append(worst(values))

    def shown(value: float) -> str:
        return documented.without_zero(f"{value:.{digits}f}")

    both = shown(statistics.fmean(means)), shown(statistics.fmean(worsts))
    return (*names, *both, " ".join(map(shown, means)))
