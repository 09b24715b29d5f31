"""NumPy's way of drawing normal numbers, taken apart: what it does with random bits of our choice.

`Generator.standard_normal` looks up one of 256 layers by 8 bits, a sign by one bit and a place
within the layer by 52 bits: at most 2^-52 of the layer's width lies between two numbers. Left of
the layer below (`at once`) a number is taken; right of it, in the wedge, by a test with one double.
"""

from collections import deque
from typing import NamedTuple

import numpy as np
from mpmath import erfc, exp, findroot, log, mp, mpf, pi, sqrt
from randomgen import UserBitGenerator

LAYERS = 256
PLACES = 2**52
mp.dps = 40


class Fed:
    """A generator that draws from given bits."""

    def __init__(self):
        self.words = deque()
        self.doubles = deque()
        bits = UserBitGenerator(
            lambda _: self.words.popleft(), 64, next_double=lambda _: self.doubles.popleft()
        )
        self.generator = np.random.Generator(bits)

    def draw(self, layer, place, doubles=(), sign=0):
        """Draw a number; if it is not taken, 0, the place 0 of the layer 255."""
        self.words = deque([layer | sign << 8 | place << 9, 255])
        self.doubles = deque(doubles)
        return self.generator.standard_normal()

    @property
    def tested(self):
        return not self.doubles

    @property
    def taken(self):
        return len(self.words) == 1


class Tables(NamedTuple):
    """What NumPy's tables hold, as exact numbers.

    Attributes
    ----------
    widths : list of mpf
        Width of each layer; of the lowest one, which has the tail, that of a box of its area.
    ends : list of int
        Places below are taken at once.
    heights : list of mpf
        Of the curve ``exp(-x^2 / 2)`` at the right end of each layer; 1 for layer 0.
    """

    widths: list
    ends: list
    heights: list


def bell(x):
    return exp(-x * x / 2)


def tables_of_numpy():
    """Find the tables by drawing numbers from chosen bits."""
    fed = Fed()
    widths, ends, heights = [], [], []
    for layer in range(LAYERS):
        below = (0.5, 1 - 2**-53)

        def at_once(place, layer=layer, below=below):
            fed.draw(layer, place, below)
            return len(fed.doubles) == len(below)

        ends.append(_first(lambda place: not at_once(place), 0, PLACES))
        # A power of two times the width of a place is exact.
        widths.append(mpf(fed.draw(layer, 2**40, (0.0,))) * 2**12)

        def under(place, layer=layer):
            fed.draw(layer, place, (0.0,))
            return fed.taken

        if layer == 0:
            heights.append(mpf(1))
            continue
        # With the double 0 the wedge takes a number where the curve is above its lower end.
        last = _first(lambda place: not under(place), ends[-1], PLACES)
        heights.append(bell(last * widths[-1] / PLACES))
    return Tables(widths, ends, heights)


def _first(holds, low, high):
    """Return the first number from which on a statement holds."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def exact_layers():
    """Return the edge of the tail, the area of a layer, and the exact widths of the layers."""

    def widths_of(edge):
        area = edge * bell(edge) + sqrt(pi / 2) * erfc(edge / sqrt(mpf(2)))
        found = [edge]
        for _ in range(LAYERS - 2):
            found.append(sqrt(-2 * log(bell(found[-1]) + area / found[-1])))
        return area, found

    def gap(edge):
        area, found = widths_of(edge)
        return bell(found[-1]) + area / found[-1] - 1

    edge = findroot(gap, (mpf("3.65415288536"), mpf("3.65415288537")), solver="secant")
    area, found = widths_of(edge)
    return edge, area, [area / bell(edge), *reversed(found)]
