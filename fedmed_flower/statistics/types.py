"""Arrays and records of this room by name, with their shapes.

Rows are those of one hospital, all splits together, in the order of ``train``, ``val``, ``test``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# (rows,) numbers of a column, NaN if missing; or the numbers of some cells.
Floats = NDArray[np.float64]
# (rows,) whether a row is selected.
Mask = NDArray[np.bool_]
# (rows,) the number of each row's cell, class, category or patient; -1 for none.
Codes = NDArray[np.int64]
# (rows,) the values of a column: numbers of a table, NaN if missing, or any objects.
Cells = NDArray[Any] | list[Any]
# (elements,) keyed hashes by which later runs recognise rows.
Hashes = NDArray[np.uint64]
# What a hospital answers of one group, as it travels.
Reported = dict[str, Any]
# Head and rows of a table of texts.
Table = dict[str, Any]
