"""How a run was trained: method, layers kept, messages. No HTML is made here."""

from __future__ import annotations

from typing import Any, NamedTuple

from fedmed_flower.data.site import some_of
from fedmed_flower.reports.frame import COUNT, format_value
from fedmed_flower.reports.summary import nested

_MEGA = 1e6
_MOST_BYTES = 1e18
_WAYS = {"from-sites": "From the hospitals", "to-sites": "To the hospitals"}


def facts(summary: dict[str, Any]) -> dict[str, str]:
    """Return the method, the layers that hospitals keep, and the form of messages, as texts.

    What the run did not use, or its summary does not say, is missing.
    """
    found = {}
    if method := _text(summary, "method"):
        found["method"] = method
    layers = summary.get("kept-layers")
    names = [name for name in layers if isinstance(name, str)] if isinstance(layers, list) else []
    if names:
        count = format_value(len(names), COUNT)
        found["kept at each hospital"] = f"{count} of the model’s arrays: {some_of(names)}"
    if compression := _text(summary, "compression"):
        found["messages"] = compression
    return found


def _text(summary: dict[str, Any], key: str) -> str:
    value = summary.get(key)
    return value if isinstance(value, str) else ""


class Saved(NamedTuple):
    """Bytes of one way: as they were sent, and as whole arrays would have been."""

    way: str
    sent: float
    dense: float


def saved(summary: dict[str, Any]) -> list[Saved]:
    """Return what smaller messages have saved, each way; empty if nothing was recorded."""
    listed = []
    for key, way in _WAYS.items():
        pair = nested(summary, "saved").get(key)
        if not isinstance(pair, list) or len(pair) != 2:
            continue
        if all(isinstance(size, int | float) and 0 < size < _MOST_BYTES for size in pair):
            listed.append(Saved(way, *map(float, pair)))
    return listed


def saved_in_words(summary: dict[str, Any]) -> list[str]:
    """Return a sentence a way, such as how many times fewer bytes were sent."""
    sentences = []
    for way, sent, dense in saved(summary):
        sizes = [format_value(size / _MEGA, ",.2f") for size in (sent, dense)]
        times = format_value(dense / sent, ",.1f")
        if times == "1.0":
            sentences.append(f"{way} {sizes[0]} MB were sent: nothing was saved.")
        elif dense > sent:
            sentences.append(
                f"{way} {sizes[0]} MB were sent instead of {sizes[1]} MB ({times} times fewer)."
            )
        else:
            sentences.append(
                f"{way} {sizes[0]} MB were sent, more than the {sizes[1]} MB of whole arrays."
            )
    return sentences
