"""The names of what is summed, which server and hospital must agree upon."""

from __future__ import annotations

from fedmed_flower.secure.ring import COUNT, Part

# How a hospital's part in a mean is weighted, and by what.
BY = "by"
TOTAL = "total"
EXAMPLES = "examples"
UNIFORM = "uniform"
# The noise of the sum, as a noise multiplier, if hospitals add shares of it; and the norm to which
# each clips its own change, if the noise hides whole hospitals.
NOISE = "noise"
NORM = "norm"

MODEL = "model/"
# One from each hospital, by which a wrong mask is noticed.
ONES = Part("tail/ones", 1, COUNT)
# Values that were beyond the bound, or no numbers.
CLIPPED = Part("tail/clipped", 1, COUNT)
LOSS = "tail/loss"
ROWS = Part("rows", 1, COUNT)
