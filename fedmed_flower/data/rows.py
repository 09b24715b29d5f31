"""The rows of a table whose columns are arrays, read as mappings one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from threading import Lock
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# Two threads that ask for one row must be given one object: rows are recognised by identity.
_making = Lock()


class TableRow(Mapping[str, Any]):
    """One row of a table, by the names of its columns; it cannot be changed.

    ``{**row, "age": 50.0}`` and ``row | {"age": 50.0}`` give a dict with another value.
    """

    __slots__ = ("_columns", "_index")

    def __init__(self, columns: _Columns, index: int) -> None:
        self._columns = columns
        self._index = index

    def __getitem__(self, name: str) -> Any:
        # A float or an int of Python, not one of NumPy.
        return self._columns.arrays[name].item(self._index)

    def __contains__(self, name: object) -> bool:
        return name in self._columns.arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns.arrays)

    def __len__(self) -> int:
        return len(self._columns.arrays)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self, **other}

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**other, **self}

    def __repr__(self) -> str:
        return repr(dict(self))


class _Columns:
    """The columns of all rows of a table, and what was made of them."""

    def __init__(self, arrays: Mapping[str, Array], count: int) -> None:
        self.arrays = arrays
        self.mapped: dict[tuple[str, Callable[[Any], Any]], list[Any]] = {}
        self._rows: list[TableRow | None] = [None] * count

    def row(self, index: int) -> TableRow:
        """Return a row, each time the same object."""
        row = self._rows[index]
        if row is None:
            with _making:
                row = self._rows[index] or TableRow(self, index)
                self._rows[index] = row
        return row


class Rows(Sequence[Mapping[str, Any]]):
    """Rows of one table, in any order: a sequence of `TableRow` that also gives whole columns.

    Parameters
    ----------
    columns : dict of str to ndarray
        By name, arrays of shape (n,): float64, int64, or objects that are a text, None or a number.
        They are not copied, and must not be changed.

    Examples
    --------
    >>> rows = Rows({"patient": np.array(["a", "b"], object), "age": np.array([50.0, 61.0])})
    >>> rows[1]["age"], rows.column("age")
    (61.0, array([50., 61.]))
    """

    def __init__(self, columns: Mapping[str, Array]) -> None:
        counts = {len(array) for array in columns.values()}
        if len(counts) != 1:
            raise ValueError(f"columns must be of one length, got {sorted(counts)}")
        (self._count,) = counts
        self._columns = _Columns(columns, self._count)
        # None for all rows of the table in their order.
        self._indices: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return the same rows with their columns, if all are `TableRow` of one table."""
        if isinstance(rows, Rows) or not rows or type(rows[0]) is not TableRow:
            return rows
        columns = rows[0]._columns
        if not all(type(row) is TableRow and row._columns is columns for row in rows):
            return rows
        indices = np.fromiter((row._index for row in rows), np.int64, len(rows))  # type: ignore[attr-defined]
        return cls._selected(columns, indices)

    @classmethod
    def joined(cls, parts: Iterable[Sequence[Mapping[str, Any]]]) -> Sequence[Mapping[str, Any]]:
        """Return the rows of all parts, one part after the other."""
        filled = [part for part in parts if len(part)]
        if len(filled) == 1:
            return filled[0]
        tables = {part._columns if isinstance(part, Rows) else None for part in filled}
        if len(tables) == 1 and (columns := tables.pop()) is not None:
            indices = [part._positions() for part in filled if isinstance(part, Rows)]
            return cls._selected(columns, np.concatenate(indices))
        return [row for part in filled for row in part]

    @classmethod
    def _selected(cls, columns: _Columns, indices: NDArray[np.int64]) -> Rows:
        rows = cls.__new__(cls)
        rows._columns = columns
        rows._indices = indices
        rows._count = len(indices)
        return rows

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        return (*self._columns.arrays,)

    def column(self, name: str) -> Array:
        """Return a column, (n,); it must not be changed.

        Raises
        ------
        KeyError
            If there is no such column.
        """
        array = self._columns.arrays[name]
        return array if self._indices is None else array[self._indices]

    def mapped(self, name: str, function: Callable[[Any], Any]) -> list[Any]:
        """Return a function's value for each cell of a column; it is kept for the next time."""
        key = (name, function)
        if key not in self._columns.mapped:
            cells = self._columns.arrays[name].tolist()
            pairs = zip(cells, map(function, cells), strict=True)
            # Two equal texts would take twice the memory.
            self._columns.mapped[key] = [
                cell if type(value) is type(cell) and value == cell else value
                for cell, value in pairs
            ]
        values = self._columns.mapped[key]
        return values if self._indices is None else [values[i] for i in self._indices.tolist()]

    def take(self, indices: Sequence[int]) -> Rows:
        """Return the rows at some indices."""
        return self._selected(self._columns, self._positions()[np.asarray(indices, np.int64)])

    def _positions(self) -> NDArray[np.int64]:
        return np.arange(self._count) if self._indices is None else self._indices

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> TableRow: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> TableRow | Rows:
        if isinstance(index, slice):
            return self._selected(self._columns, self._positions()[index])
        position = range(self._count)[index]
        return self._columns.row(
            position if self._indices is None else int(self._indices[position])
        )

    def __iter__(self) -> Iterator[TableRow]:
        positions = range(self._count) if self._indices is None else self._indices.tolist()
        return map(self._columns.row, positions)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | tuple | Rows):
            return NotImplemented
        return len(self) == len(other) and all(
            one == another for one, another in zip(self, other, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [*self, *other]

    def __radd__(self, other: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        return [*other, *self]

    def __repr__(self) -> str:
        return repr([*self])


def column_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any] | Array:
    """Return a column of rows of any kind: an array of a table's numbers, else a list.

    Raises
    ------
    KeyError
        If a row lacks it.
    """
    if not isinstance(rows, Rows):
        return [row[name] for row in rows]
    column = rows.column(name)
    cells: list[Any] = column.tolist() if column.dtype == object else []
    return cells if column.dtype == object else column


def has_column(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Return whether all rows have a column."""
    if isinstance(rows, Rows):
        return name in rows.names
    return all(name in row for row in rows)
