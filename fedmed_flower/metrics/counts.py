"""The counts behind the figures of a test, as a run folder keeps them in ``counts.json``.

The file holds what the sites sent for `pool` when the final model was tested, and nothing else::

    {"version": 1,
     "classes": ["no pneumonia", "pneumonia"],
     "sites": {"north": {"rows": 120,
                         "confusion": [[40, 5], [6, 69]],
                         "histograms": [{"class": 1, "centre": 0.3, "width": 0.5, "auc": 0.94,
                                         "merged": false,
                                         "without": {"bins": [700, 812], "rows": [44, 1]},
                                         "with": {"bins": [812], "rows": [75]}}],
                         "calibration": [[45, 3.1, 4], ...]}},
     "all": {"rows": 120, "confusion": [[40, 5], [6, 69]], "calibration": [[45, 3.1, 4], ...]}}

- ``classes``: their names, or their numbers as texts. A ``class`` is counted from 0.
- ``confusion``: rows are the true classes, columns those that the model chose.
- ``histograms``: of the score (log odds) of each class against the rest; of two classes, only of
  class 1. ``without`` are the rows that are not of the class. The edges are `histogram_edges`.
  Bins that are not listed are empty or, if the site reports coarsely (``merged``), part of the last
  listed bin before them. ``auc`` is that of the site's own rows, -1 if it is not reported.
- ``calibration``: ten bins of the predicted probability; of each its rows, the sum of their
  probabilities, and how many came true.
- ``noised``: in a private run all that a site has instead: counts with noise, of patients, as
  `noised_counts` returns them. They may be below 0.

Of a secure sum only the total is known. ``sites`` then has one entry, ``all``, and its histograms
are on one grid.

What a site has withheld, or its kind of model does not have, is missing. ``all`` is the sum over
the sites; a part of it is missing if a site lacks that part. Histograms have no sum, because each
site has a grid of its own.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmed_flower.errors import InputError
from fedmed_flower.files import as_input_error, read_object
from fedmed_flower.metrics.auc import BINS, EDGES, MERGED
from fedmed_flower.metrics.classification import classes_of_noised
from fedmed_flower.metrics.names import (
    CALIBRATION,
    CALIBRATION_BINS,
    CONFUSION,
    COUNTS,
    GRID,
    NOISED,
)
from fedmed_flower.metrics.pooling import check_counts
from fedmed_flower.metrics.types import Floats

COUNTS_FILE = "counts.json"
_VERSION = 1
_ROWS = "num-examples"
_KEPT = (CONFUSION, GRID, COUNTS, CALIBRATION, NOISED)
_MOST_ROWS = 1e12
_REMEDY = "restore it from a copy, or remove it"


@dataclass(frozen=True)
class Counts:
    """What the sites counted when a model was tested.

    Attributes
    ----------
    classes : tuple of str
        Names of the classes, or their numbers.
    sites : dict
        By site the record that `pool` takes, with those of ``num-examples``, `CONFUSION`, `GRID`,
        `COUNTS`, `CALIBRATION` and `NOISED` that the site sent.
    """

    classes: tuple[str, ...]
    sites: Mapping[str, Mapping[str, Any]]

    @property
    def noised(self) -> bool:
        """Whether a site counted with noise."""
        return any(NOISED in record for record in self.sites.values())

    def of(self, sites: Container[str]) -> Counts:
        """Return the counts of these sites alone."""
        kept = {site: record for site, record in self.sites.items() if site in sites}
        return Counts(self.classes, kept)

    def total(self, key: str) -> list[float] | None:
        """Return a list of counts over all sites; None if a site lacks it or has another length."""
        lists = [record[key] for record in self.sites.values() if key in record]
        if len(lists) < len(self.sites) or len({len(values) for values in lists}) != 1:
            return None
        total: list[float] = np.sum([np.asarray(values) for values in lists], axis=0).tolist()
        return total

    def confusion(self, site: str | None = None) -> list[list[float]] | None:
        """Return the confusion matrix of a site, or of all; None if it is not known."""
        counts = self.total(CONFUSION) if site is None else self.sites[site].get(CONFUSION)
        return None if counts is None else _square(counts)

    def calibration(self, site: str | None = None) -> list[list[float]] | None:
        """Return rows, sum of probabilities and events of each bin; None if they are not known."""
        sums = self.total(CALIBRATION) if site is None else self.sites[site].get(CALIBRATION)
        return None if sums is None else _triples(sums)

    def content(self) -> dict[str, Any]:
        """Return the content of ``counts.json``, as the docstring of this file describes it."""
        together: dict[str, Any] = {"rows": sum(r.get(_ROWS, 0) for r in self.sites.values())}
        parts = {
            "confusion": self.confusion(),
            "calibration": self.calibration(),
            "noised": self.total(NOISED),
        }
        return {
            "version": _VERSION,
            "classes": [*self.classes],
            "sites": {site: _to_json(record) for site, record in self.sites.items()},
            "all": together | {key: part for key, part in parts.items() if part is not None},
        }


def counted(sites: Mapping[str, Mapping[str, Any]], names: Sequence[str] = ()) -> Counts | None:
    """Return what the sites sent for `pool` in an evaluation; None if they sent no counts.

    Parameters
    ----------
    sites : dict
        The metrics of each site's reply.
    names : sequence of str
        Names of the classes. If their number is not that of the counts, they are not used.
    """
    kept = {
        site: {key: record[key] for key in (_ROWS, *_KEPT) if key in record}
        for site, record in sites.items()
    }
    kept = {site: record for site, record in kept.items() if _num_classes(record)}
    sizes = {_num_classes(record) for record in kept.values()}
    if len(sizes) != 1:
        # Sites that count different numbers of classes have nothing in common.
        return None
    count = sizes.pop()
    classes = tuple(map(str, names)) if len(names) == count else tuple(map(str, range(count)))
    return Counts(classes, kept)


def read_counts(folder: Path) -> Counts | None:
    """Read ``counts.json`` of a run folder, which a stranger may have written.

    Returns
    -------
    Counts or None
        None if the folder has no such file, as that of a segmentation.

    Raises
    ------
    InputError
        If the file cannot be read, is of another version, or holds counts that no site can have.
    """
    # A link that leads nowhere is not taken for a file that is missing.
    if not os.path.lexists(folder / COUNTS_FILE):
        return None
    content = read_object(folder, COUNTS_FILE, _REMEDY)
    path = folder / COUNTS_FILE
    if content.get("version") != _VERSION:
        version = content.get("version")
        raise InputError(f"version in {path} must be {_VERSION}, got {version!r}: {_REMEDY}")
    with as_input_error(str(path), _REMEDY):
        records = {site: _from_json(entry) for site, entry in content["sites"].items()}
        for site, record in records.items():
            if reason := check_counts(record):
                raise ValueError(f"{site}: {reason}")
        counts = counted(records, content["classes"])
        if counts is None or len(counts.sites) < len(records):
            raise ValueError("the sites must all have counts, of one number of classes")
        return counts


def histogram_edges(centre: float, width: float) -> Floats:
    """Return the edges of a histogram, shape (2049,), in log odds: centre + width * sinh(x).

    x goes from -10 to 10 in 2,048 equal steps. Rows beyond the ends are counted in the end bins.
    """
    return np.asarray(centre + width * EDGES)


def _num_classes(record: Mapping[str, Any]) -> int:
    """Return the number of classes that a record counts; 0 if it counts none."""
    if NOISED in record:
        return classes_of_noised(len(record[NOISED]))
    scores = len(record.get(GRID, ())) // 3
    return 2 if scores == 1 else scores


def _to_json(record: Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"rows": record.get(_ROWS, 0)}
    if CONFUSION in record:
        entry["confusion"] = _square(record[CONFUSION])
    if GRID in record:
        entry["histograms"] = _histograms(record[GRID], record[COUNTS])
    if CALIBRATION in record:
        entry["calibration"] = _triples(record[CALIBRATION])
    if NOISED in record:
        entry["noised"] = [*record[NOISED]]
    return entry


def _histograms(grid: Sequence[float], counts: Sequence[int]) -> list[dict[str, Any]]:
    scores = len(grid) // 3
    merged = MERGED in counts
    empty = MERGED if merged else 0
    listed = []
    for score in range(scores):
        centre, width, auc = grid[3 * score : 3 * score + 3]
        entry: dict[str, Any] = {"class": 1 if scores == 1 else score}
        entry |= {"centre": centre, "width": width, "auc": auc, "merged": merged}
        for group, name in enumerate(("without", "with")):
            start = (2 * score + group) * BINS
            rows = np.asarray(counts[start : start + BINS])
            bins = np.flatnonzero(rows != empty)
            entry[name] = {"bins": bins.tolist(), "rows": rows[bins].tolist()}
        listed.append(entry)
    return listed


def _from_json(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a site; its values are not checked yet."""
    rows = entry["rows"]
    if type(rows) not in (int, float) or not 0 <= rows <= _MOST_ROWS:
        raise ValueError(f"rows must be a number from 0 to {_MOST_ROWS:.0e}, got {rows!r}")
    record: dict[str, Any] = {_ROWS: rows}
    if "confusion" in entry:
        record[CONFUSION] = [count for row in entry["confusion"] for count in row]
    if "histograms" in entry:
        grid: list[Any] = []
        counts: list[int] = []
        for histogram in entry["histograms"]:
            grid += [histogram[key] for key in ("centre", "width", "auc")]
            empty = MERGED if histogram["merged"] else 0
            for name in ("without", "with"):
                counts += _dense(histogram[name], empty)
        record |= {GRID: grid, COUNTS: counts}
    if "calibration" in entry:
        record[CALIBRATION] = [value for triple in entry["calibration"] for value in triple]
    if "noised" in entry:
        record[NOISED] = entry["noised"]
    return record


def _dense(listed: Mapping[str, Any], empty: int) -> list[int]:
    dense = [empty] * BINS
    for index, rows in zip(listed["bins"], listed["rows"], strict=True):
        if type(index) is not int or not 0 <= index < BINS:
            raise ValueError(f"there is no bin {index!r}: they are from 0 to {BINS - 1}")
        dense[index] = rows
    return dense


def _square(counts: Sequence[Any]) -> list[list[Any]]:
    size = math.isqrt(len(counts))
    return [[*counts[row * size : (row + 1) * size]] for row in range(size)]


def _triples(sums: Sequence[float]) -> list[list[float]]:
    return [[*sums[3 * index : 3 * index + 3]] for index in range(CALIBRATION_BINS)]
