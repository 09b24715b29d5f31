"""Line charts as SVG, with the values that the page's script shows. No library draws them.

Colours come from the classes of the page's style, so that a chart follows the colour scheme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fedmed_flower.reports.frame import escaped

Points = Sequence[tuple[float, float]]

_WIDTH = 340.0
_RIGHT = 10.0
_TOP = 8.0
_BOTTOM = 34.0
_LETTER = 6.2
# Above so many points a line has no dots.
_DOTTED = 15
_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


class Axis(NamedTuple):
    """One axis of a chart: its title, its ends, and the values that are written."""

    title: str
    low: float
    high: float
    ticks: tuple[float, ...]


def axis(
    title: str,
    values: Iterable[float],
    ends: tuple[float, float] | None = None,
    whole: bool = False,
    most: int = 5,
) -> Axis:
    """Return an axis for some values.

    Parameters
    ----------
    title
        As HTML.
    values
        One or more finite numbers.
    ends
        The ends of the axis; by default the values and a little room.
    whole
        Whether only whole numbers are written.
    most
        About how many values are written.
    """
    if ends is None:
        known = [*values]
        low = min(known)
        high = max(known)
        room = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
        ends = (low - room, high + room)
    low, high = ends
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in _STEPS if power * factor >= 0.95 * rough)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    ticks = tuple(index * step for index in range(first, min(last, first + 2 * most) + 1))
    return Axis(title, low, high, ticks)


class Chart:
    """A chart that is filled line by line.

    Parameters
    ----------
    label
        What is shown, as HTML, for those who do not see it.
    x, y
        The axes.
    height
        In units of which a chart is 340 wide.
    """

    def __init__(self, label: str, x: Axis, y: Axis, height: float = 220.0) -> None:
        self._label = label
        self._x = x
        self._y = y
        self._texts = _texts(y.ticks)
        self._left = 12.0 + _LETTER * max((len(text) for text in self._texts), default=0)
        self._base = height - _BOTTOM
        self._height = height
        self._parts: list[str] = []

    def line(
        self,
        name: str,
        points: Points,
        css: str,
        *,
        site: str | None = None,
        more: Sequence[str] = (),
        dashed: bool = False,
        joined: bool = True,
        spec: str = ".3f",
    ) -> None:
        """Draw points and the line through them.

        Parameters
        ----------
        name
            What the line is of, as text.
        points
            (x, y) each, in the order of the line.
        css
            Class that sets the colour.
        site
            The hospital that the line is of, by which it is highlighted.
        more
            A text for each point, which is shown after its value; none has a semicolon.
        dashed, joined
            Whether the line is dashed, and whether there is one.
        spec
            Format of the values that are shown.
        """
        pixels = [self._pixel(x, y) for x, y in points]
        drawn = ""
        if joined:
            path = " ".join(f"{_short(x)},{_short(y)}" for x, y in pixels)
            drawn += f'<polyline class="l{" dash" if dashed else ""}" points="{path}"/>'
        if not joined or len(pixels) <= _DOTTED:
            path = "".join(f"M{_short(x)} {_short(y)}h0" for x, y in pixels)
            drawn += f'<path class="p" d="{path}"/>'
        data = f' data-name="{escaped(name)}"'
        if site is not None:
            data += f' data-site="{escaped(site)}"'
        data += f' data-at="{" ".join(f"{_short(x)},{_short(y)}" for x, y in pixels)}"'
        data += f' data-x="{" ".join(f"{round(x, 3):.10g}" for x, _ in points)}"'
        data += f' data-y="{" ".join(format(y, spec) for _, y in points)}"'
        if more:
            data += f' data-more="{";".join(more)}"'
        self._parts.append(f'<g class="series {css}"{data}>{drawn}</g>')

    def whisker(self, x: float, low: float, high: float, css: str) -> None:
        """Draw an interval of the y axis."""
        (across, top), (_, bottom) = self._pixel(x, high), self._pixel(x, low)
        path = f"M{_short(across)} {_short(top)}V{_short(bottom)}"
        self._parts.append(f'<path class="w {css}" d="{path}"/>')

    def band(self, lower: Points, upper: Points, css: str) -> None:
        """Fill what lies between two lines."""
        around = [*lower, *reversed([*upper])]
        path = " ".join(",".join(map(_short, self._pixel(x, y))) for x, y in around)
        self._parts.append(f'<polygon class="band {css}" points="{path}"/>')

    def rule(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draw a line to compare with."""
        (x1, y1), (x2, y2) = self._pixel(*start), self._pixel(*end)
        path = f"M{_short(x1)} {_short(y1)}L{_short(x2)} {_short(y2)}"
        self._parts.append(f'<path class="rule" d="{path}"/>')

    def svg(self) -> str:
        """Return the chart."""
        drawn = []
        for value, text in zip(self._y.ticks, self._texts, strict=True):
            y = self._pixel(self._x.low, value)[1]
            drawn.append(f'<path d="M{_short(self._left)} {_short(y)}H{_WIDTH - _RIGHT:.0f}"/>')
            x = self._left - 6
            drawn.append(f'<text x="{_short(x)}" y="{_short(y + 3.6)}" class="e">{text}</text>')
        for value, text in zip(self._x.ticks, _texts(self._x.ticks), strict=True):
            x = self._pixel(value, self._y.low)[0]
            drawn.append(
                f'<text x="{_short(x)}" y="{_short(self._base + 14)}" class="m">{text}</text>'
            )
        middle = (self._left + _WIDTH - _RIGHT) / 2
        title = f'<text x="{_short(middle)}" y="{_short(self._height - 5)}" class="m">'
        return (
            f'<svg role="img" class="chart" viewBox="0 0 {_WIDTH:.0f} {self._height:.0f}" '
            f'aria-label="{self._label}" data-x="{self._x.title}" data-y="{self._y.title}">'
            f'<g class="axis">{"".join(drawn)}'
            f'<path class="base" d="M{_short(self._left)} {_short(self._base)}'
            f'H{_WIDTH - _RIGHT:.0f}"/>{title}{self._x.title}</text></g>'
            f"{''.join(self._parts)}</svg>"
        )

    def _pixel(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self._x.low) / (self._x.high - self._x.low)
        up = (y - self._y.low) / (self._y.high - self._y.low)
        width = _WIDTH - _RIGHT - self._left
        return self._left + across * width, self._base - up * (self._base - _TOP)


def _texts(ticks: Sequence[float]) -> list[str]:
    """Return what is written at some ticks: as many digits as tell them apart."""
    if not ticks:
        return []
    largest = max(map(abs, ticks))
    step = ticks[1] - ticks[0] if len(ticks) > 1 else largest or 1.0
    if largest >= 1e6 or step < 1e-4:
        return [f"{tick:.4g}".replace("-", "−") for tick in ticks]
    digits = next(d for d in range(7) if abs(round(step, d) - step) <= 1e-6 * step)
    return [f"{tick + 0.0:,.{digits}f}".replace("-", "−") for tick in ticks]


def _short(value: float) -> str:
    """Return a length to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")
