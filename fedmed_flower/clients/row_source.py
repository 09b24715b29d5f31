"""Where prepared rows come from: from memory, from the hospital's disk, or from their files."""

from __future__ import annotations

import logging
from typing import Any

from fedmed_flower.clients.cache import Chain, bytes_of
from fedmed_flower.clients.kept_images import KeptImages
from fedmed_flower.data.site import Row

log = logging.getLogger("flwr.fedmed")


class RowSource:
    """Gives rows after the steps of a chain whose results never change.

    Parameters
    ----------
    chain : Chain
    kept : KeptImages or None
        What the hospital keeps on its disk, if it keeps anything.
    limit : float
        The most memory, in bytes, for rows that `prepare` makes before they are asked for.
    """

    def __init__(self, chain: Chain, kept: KeptImages | None, limit: float) -> None:
        self.chain = chain
        self._kept = kept
        self._slot = None if kept is None else kept.slot_of("prepared", steps=chain.fixed)
        self._left = limit
        # Rows are held as well, so that no other row gets the id of one.
        self._ready: dict[int, tuple[Row, Any]] = {}

    @property
    def slot(self) -> str | None:
        """What names this source's rows among those on the disk; None if it keeps none there."""
        return self._slot

    def is_on_disk(self, row: Row) -> bool:
        """Return whether an earlier message has left a row on the disk."""
        return self._kept is not None and self._kept.has_prepared(row, self._slot)

    def prepare(self, row: Row) -> None:
        """Make a row while its files are at hand, if there is room for it in memory or on the disk.

        A row that cannot be made is left to the call that asks for it.
        """
        if self._left <= 0 and self._slot is None:
            return
        try:
            result = self._made(row)
        except Exception as error:  # It is raised again when the row is asked for.
            log.debug("a row is not prepared while it is checked: %s", error)
            return
        size = bytes_of(result)
        if size <= self._left:
            self._left -= size
            self._ready[id(row)] = (row, result)

    def __call__(self, row: Row) -> Any:
        """Return a row; what `prepare` made of it is given out once."""
        _, result = self._ready.pop(id(row), (row, None))
        if result is None and self._kept is not None:
            result = self._kept.prepared(row, self._slot, self.chain.fixed)
        return self._made(row) if result is None else result

    def forget(self) -> None:
        """Give up the rows that nobody has asked for."""
        self._ready.clear()

    def _made(self, row: Row) -> Any:
        result = self.chain.after_fixed(row)
        if self._kept is not None:
            self._kept.keep_prepared(row, self._slot, self.chain.fixed, result)
        return result
