"""Arrays of this room by name, with their shapes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Numbers of any shape; if no shape is stated, (n,), one a row.
Floats = NDArray[np.float64]
# (n,) times, events or risks, one a patient.
Numbers = NDArray[np.float64]
# (n,) codes or counts.
Whole = NDArray[np.int64]
