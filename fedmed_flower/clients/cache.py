"""Rows after MONAI's transforms, of which what never changes stays in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from monai.data import get_track_meta, set_track_meta
from monai.transforms import Compose, RandomizableTrait, Transform, convert_to_contiguous
from torch.utils.data import Dataset

from fedmed_flower.data.site import Row


@contextmanager
def tracking(indices: bool) -> Iterator[None]:
    """Let MONAI's transforms keep track of where images came from, or not: that takes less time."""
    before = get_track_meta()
    set_track_meta(indices)
    try:
        yield
    finally:
        set_track_meta(before)


class CachedRows(Dataset[Any]):
    """Rows after their transforms; what never changes is kept in memory, within a limit.

    Rows that are not kept come out as those that are. (MONAI's CacheDataset counts rows, whatever
    their size, and runs the whole chain of a row that is not kept with one setting for
    `set_track_meta`: without it images lose their place before they are brought to a grid, with it
    random transforms take much longer.)

    Parameters
    ----------
    rows : sequence of dict
    steps : sequence of callable
        What MONAI's transforms give up to the first random one, or the first plain function, is
        kept. From the first random one on, they see tensors without a place.
    limit : float
        Bytes.

    Attributes
    ----------
    transform : Compose
        All steps, to be seeded or undone.
    count, held : int
        How many rows are kept, and how many bytes they take.
    """

    def __init__(
        self, rows: Sequence[Row], steps: Sequence[Callable[[Any], Any]], limit: float
    ) -> None:
        self.rows, self.transform = list(rows), Compose(list(steps))
        self._end = len(steps)
        random = (at for at, step in enumerate(steps) if isinstance(step, RandomizableTrait))
        self._random = next(random, self._end)
        plain = (at for at, step in enumerate(steps) if not isinstance(step, Transform))
        self._fixed = min(self._random, next(plain, self._end))
        self._kept: list[Any] = []
        self.count = self.held = 0
        while self.count < len(self.rows) and self.held < limit:
            row = self._begun(self.count)
            if self.held + _bytes(row) > limit:
                break
            self._kept.append(row)
            self.count, self.held = self.count + 1, self.held + _bytes(row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """Return a row after all transforms: a dict, or a list of dicts after one that crops."""
        row = self._kept[index] if index < self.count else self._begun(index)
        if self._fixed == self._end:
            return row
        with tracking(True):
            row = deepcopy(row) if index < self.count else row
            row = self.transform(row, start=self._fixed, end=self._random)
        with tracking(False):
            return self.transform(row, start=self._random)

    def _begun(self, index: int) -> Any:
        with tracking(True):
            return convert_to_contiguous(self.transform(self.rows[index], end=self._fixed))


def _bytes(row: Any) -> int:
    rows = row if isinstance(row, list) else [row]
    return sum(part.nbytes for one in rows for part in one.values() if hasattr(part, "nbytes"))
