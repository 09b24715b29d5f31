"""What a report says of secure sums: who was in each of them."""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

from fedmed_flower.data.site import some_of
from fedmed_flower.reports import frame
from fedmed_flower.reports.frame import COUNT, count_of, escaped, format_of, format_value
from fedmed_flower.reports.summary import nested, number

_PURPOSES = {
    "count": "number of training records",
    "train": "change of the model",
    "evaluate/val": "figures of validation records",
    "evaluate/test": "figures of test records",
}
_RECORDS = "num-examples"
# Columns of a table of figures.
_MOST_METRICS = 8
_WORDS = """<p>Hospitals hid what they sent under masks that cancel in the sum: the server has seen
the sums below, and no single hospital’s part. A sum can still tell what only one hospital has, and
two sums that differ by a hospital tell of that hospital.</p>"""


class Sum(NamedTuple):
    """A secure sum: in which round it was opened, for what, over which hospitals."""

    round: int
    purpose: str
    sites: tuple[str, ...]


def sums(summary: dict[str, Any]) -> list[Sum]:
    """Return the secure sums of a run, in their order; empty if hospitals replied in plain."""
    listed = nested(summary, "secure").get("sums")
    return [
        Sum(entry[0], str(entry[1]), tuple(map(str, entry[2])))
        for entry in (listed if isinstance(listed, list) else ())
        if isinstance(entry, list)
        and len(entry) == 3
        and type(entry[0]) is int
        and isinstance(entry[2], list)
    ]


def told(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the test figures of the hospitals that told their own, by name and metric."""
    listed = nested(summary, "secure", "told")
    return {
        site: {key: value for key in figures if (value := number(figures, key)) is not None}
        for site in sorted(listed, key=frame.natural)
        if (figures := nested(listed, site))
    }


def in_words(summary: dict[str, Any]) -> str:
    """Return what the server has seen, in a sentence; empty if hospitals replied in plain."""
    sizes = sorted({len(one.sites) for one in sums(summary)})
    if not sizes:
        return ""
    shown = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
    text = f"The server has seen sums over {shown} hospitals and no single hospital’s figures"
    if own := told(summary):
        text += f" but those of {some_of([*own], frame.MANY)}, which told their own"
    return f"{text}."


def section(summary: dict[str, Any]) -> str:
    """Return the section with the hospitals of each sum; empty if hospitals replied in plain."""
    by_set: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    for one in sums(summary):
        by_set.setdefault((one.purpose, one.sites), []).append(one.round)
    if not by_set:
        return ""
    rows = [
        [
            escaped(_PURPOSES.get(purpose, purpose)),
            escaped(_rounds(rounds)),
            str(len(sites)),
            escaped(some_of(sites, frame.MANY)),
        ]
        for (purpose, sites), rounds in by_set.items()
    ]
    head = ("Sum", "Rounds", "Hospitals", "Which")
    caption = f"{count_of(len(sums(summary)), 'sum')}, by the hospitals that each is over"
    table = frame.table(caption, head, rows, kind="wordy")
    return f"<h2>Secure sums</h2>{_WORDS}{table}{_told(summary)}"


def _told(summary: dict[str, Any]) -> str:
    """Return the table of the figures of hospitals that told their own; empty if none did."""
    own = told(summary)
    if not own:
        return ""
    known = {key: None for figures in own.values() for key in figures}
    metrics = [key for key in known if key != _RECORDS][:_MOST_METRICS]
    rows = [
        [
            escaped(site),
            format_value(figures.get(_RECORDS), COUNT),
            *(format_value(figures.get(key), format_of(key)) for key in metrics),
        ]
        for site, figures in own.items()
    ]
    head = ("Hospital", "Test records", *(escaped(frame.title(key)) for key in metrics))
    caption = "Own figures of the hospitals that tell them, which are in the sums too"
    return frame.table(caption, head, rows)


def _rounds(rounds: list[int]) -> str:
    """Return rounds as a text, those that follow each other as a range."""
    runs = groupby(enumerate(sorted({*rounds})), lambda pair: pair[1] - pair[0])
    ranges = [[number for _, number in run] for _, run in runs]
    return ", ".join(
        f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
        for numbers in ranges
    )
