"""Arrays of this room by name, with their shapes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# (variants, ...) sums, or (people, ...) values; each use states its shape.
Floats = NDArray[np.float64]
# (variants, 5): cases, copies of cases, controls, copies of controls, sum of squares.
Counts = NDArray[np.int64]
