"""Rows after MONAI's transforms; results that never change stay in memory."""

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
def tracking(positions: bool) -> Iterator[None]:
    """Let MONAI's transforms track the position of images, or not, which takes less time."""
    before = get_track_meta()
    set_track_meta(positions)
    try:
        yield
    finally:
        set_track_meta(before)


class Chain:
    """The transforms of a row, of which the first ones give the same result each time.

    Parameters
    ----------
    steps : sequence of callable
        MONAI's transforms, and plain functions.

    Attributes
    ----------
    transform : Compose
        All steps; a caller seeds or inverts them here.
    """

    def __init__(self, steps: Sequence[Callable[[Any], Any]]) -> None:
        self.transform = Compose(list(steps))
        self._end = len(steps)
        random = (i for i, step in enumerate(steps) if isinstance(step, RandomizableTrait))
        self._random = next(random, self._end)
        plain = (i for i, step in enumerate(steps) if not isinstance(step, Transform))
        self._fixed = min(self._random, next(plain, self._end))

    @property
    def fixed(self) -> Sequence[Any]:
        """The steps before the first random transform or plain function."""
        steps: Sequence[Any] = self.transform.transforms
        return steps[: self._fixed]

    def after_fixed(self, row: Row) -> Any:
        """Return a row after the steps whose results never change."""
        with tracking(True):
            return convert_to_contiguous(self.transform(row, end=self._fixed))

    def after_all(self, row: Any, shared: bool) -> Any:
        """Return a row after the other steps too.

        Parameters
        ----------
        row : dict, or list of dict
            As `after_fixed` returned it.
        shared : bool
            Whether somebody else keeps the row, which must then stay as it is.
        """
        if self._fixed == self._end:
            return row
        with tracking(True):
            row = deepcopy(row) if shared else row
            row = self.transform(row, start=self._fixed, end=self._random)
        with tracking(False):
            return self.transform(row, start=self._random)


class CachedRows(Dataset[Any]):
    """Rows after their transforms; results that never change are kept in memory, within a limit.

    Rows beyond the limit come out the same, more slowly. (MONAI's CacheDataset limits the number of
    rows, whatever their size. It also runs the whole chain of a row that is not cached with one
    setting of `set_track_meta`. If that is off, images lose their position before they are brought
    to a grid; if it is on, random transforms take much longer.)

    Parameters
    ----------
    rows : sequence of dict
    chain : Chain
        The results before the first random transform or plain function are kept. From the first
        random transform on, images have no position.
    limit : float
        The most memory for kept rows, in bytes.
    source : callable, optional
        Maps a row to what `Chain.after_fixed` makes of it; left out, that is called.

    Attributes
    ----------
    transform : Compose
        All steps; a caller seeds or inverts them here.
    count, held : int
        Number of kept rows, and of bytes that they take.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        chain: Chain,
        limit: float,
        source: Callable[[Row], Any] | None = None,
    ) -> None:
        self.rows = list(rows)
        self.transform = chain.transform
        self._chain = chain
        self._source = chain.after_fixed if source is None else source
        self._cache: list[Any] = []
        self.count = 0
        self.held = 0
        while self.count < len(self.rows) and self.held < limit:
            row = self._source(self.rows[self.count])
            size = bytes_of(row)
            if self.held + size > limit:
                break
            self._cache.append(row)
            self.count += 1
            self.held += size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """Return a row after all transforms: a dict, or a list of dicts after one that crops."""
        kept = index < self.count
        row = self._cache[index] if kept else self._source(self.rows[index])
        return self._chain.after_all(row, shared=kept)


def bytes_of(row: Any) -> int:
    """Return how much memory the arrays of a prepared row take."""
    rows = row if isinstance(row, list) else [row]
    values = (value for entries in rows for value in entries.values())
    return sum(value.nbytes for value in values if hasattr(value, "nbytes"))
