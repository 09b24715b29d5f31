"""A plain table of decimal numbers and texts, read column by column without a loop over cells.

A text is plain if it has no quotation marks, and each of its lines as many cells as the first. All
that cannot be told from its bytes alone is left to Python: a number here is digits with at most one
point and a sign before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

# Bytes that are searched, and rows that are read, at a time; they fit into a processor's cache.
_PART = 1 << 20
_ROWS = 1 << 13
_BREAK = ord("\n")
# The csv module refuses longer cells.
_MOST_LETTERS = 100_000
# Longer cells are taken one by one.
_SHORT = 32
# Digits that an integer of 64 bits can hold, without zeros at the beginning.
_MOST_DIGITS = 18
# Up to it floats hold all integers, and a quotient of two exact floats is rounded once.
_EXACT = 2**53
# By byte: what the digits before it are multiplied with, and what is added.
_FACTORS = np.array([10 if chr(byte) in "0123456789" else 1 for byte in range(256)])
_DIGITS = np.array([byte - 48 if chr(byte) in "0123456789" else 0 for byte in range(256)])
# Floats hold these powers exactly, and no higher ones.
_POWERS = np.array([float(10**power) for power in range(23)])
# The 64 bits of a mantissa of 80-bit floats, where a processor has them.
_HAS_64_BITS = np.finfo(np.longdouble).nmant == 63 and np.dtype(np.longdouble).itemsize == 16


class PlainColumn(Sequence[str]):
    """The cells of one column of a text.

    Parameters
    ----------
    content : bytes
        The text, in UTF-8.
    starts, ends : ndarray
        (cells,) where each cell begins and ends.
    """

    def __init__(
        self, content: bytes, starts: NDArray[np.integer], ends: NDArray[np.integer]
    ) -> None:
        self._content = content
        self._starts = starts
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> PlainColumn: ...
    def __getitem__(self, index: int | slice) -> str | PlainColumn:
        if isinstance(index, slice):
            return PlainColumn(self._content, self._starts[index], self._ends[index])
        return self._content[int(self._starts[index]) : int(self._ends[index])].decode()

    def __iter__(self) -> Iterator[str]:
        return iter([cell.decode() for cell in self.encoded()])

    def encoded(self) -> list[bytes]:
        """Return the cells in UTF-8."""
        cells: list[bytes] = []
        for starts, ends in self._parts():
            lengths = ends - starts
            width = max(1, int(lengths.max()))
            if width <= _SHORT:
                # NumPy leaves out the zeros behind a text, and no cell has one.
                cells += self._letters(starts, lengths, width).view(f"S{width}")[:, 0].tolist()
            else:
                pairs = zip(starts.tolist(), ends.tolist(), strict=True)
                cells += [self._content[start:end] for start, end in pairs]
        return cells

    def numbers(self) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return the numbers of cells of digits, at most one point and a sign, and the other cells.

        A number is what `float` makes of the cell. It is NaN if a cell is empty, or of another
        kind.
        """
        values = np.full(len(self), np.nan)
        others = np.ones(len(self), bool)
        first = 0
        for starts, ends in self._parts():
            part = slice(first, first + len(starts))
            first = part.stop
            lengths = ends - starts
            width = max(1, min(_SHORT, int(lengths.max())))
            values[part], others[part] = _decimals(self._letters(starts, lengths, width), lengths)
        return values, others

    def _parts(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield where the cells begin and end, some cells at a time."""
        for first in range(0, len(self), _ROWS):
            part = slice(first, first + _ROWS)
            yield self._starts[part].astype(np.int64), self._ends[part].astype(np.int64)

    def _letters(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64], width: int
    ) -> NDArray[np.uint8]:
        """Return (cells, width) the first bytes of cells, with zeros behind each."""
        content = np.frombuffer(self._content, np.uint8)
        windows = np.lib.stride_tricks.sliding_window_view(content, width)
        letters = windows[np.minimum(starts, len(windows) - 1)]
        # The last cells begin less than a window before the end.
        for number in np.flatnonzero(starts >= len(windows)).tolist():
            rest = content[starts[number] :]
            letters[number, : len(rest)] = rest
        letters *= np.arange(width) < lengths[:, None]
        return letters


def plain_columns(content: bytes, separator: str) -> list[PlainColumn] | None:
    """Return the columns of a text with their headings, or None if the text is not plain.

    Parameters
    ----------
    content : bytes
        UTF-8 without a mark at its beginning.
    separator : str
        One letter of ASCII.
    """
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n")
    # The usual text is not copied.
    if not content.endswith(b"\n") or content.endswith(b"\n\n"):
        content = content.rstrip(b"\n") + b"\n"
    between = separator.encode()
    # The csv module leaves out blanks at the beginning of cells, and reads what stands in quotes.
    special = [b'"', b"\r", b"\0"] + [between + b" ", b"\n "] * (b" " in content)
    if content.startswith(b" ") or any(map(content.__contains__, special)):
        return None
    ends = _ends(content, ord(separator))
    width = content[: content.index(b"\n")].count(between) + 1
    if ends.size % width:
        return None
    letters = np.frombuffer(content, np.uint8)
    starts = np.concatenate((np.zeros(1, ends.dtype), ends[:-1] + 1)).reshape(-1, width)
    ends = ends.reshape(-1, width)
    if not (letters[ends[:, -1]] == _BREAK).all() or content.count(b"\n") != len(ends):
        return None
    if (ends - starts).max() > _MOST_LETTERS:
        return None
    # A line without a letter is no row; that is clear if its first cell begins with one.
    firsts = letters[starts[:, 0]]
    if ((firsts <= 32) | (firsts >= 127) | (firsts == ord(separator))).any():
        return None
    columns = zip(starts.T, ends.T, strict=True)
    return [PlainColumn(content, *column) for column in columns]


def column_of_lines(content: bytes) -> PlainColumn | None:
    """Return the lines of a text as a column, or None if a line holds a zero byte.

    Parameters
    ----------
    content : bytes
        UTF-8 in which each line, also the last, ends with a line feed.
    """
    if b"\0" in content:
        return None
    ends = _ends(content, _BREAK)
    starts = np.concatenate((np.zeros(min(1, ends.size), ends.dtype), ends[:-1] + 1))
    return PlainColumn(content, starts, ends)


def _ends(content: bytes, separator: int) -> NDArray[np.integer]:
    """Return where the separators and line breaks of a text stand."""
    letters = np.frombuffer(content, np.uint8)
    small = np.int32 if len(content) < 2**31 else np.int64
    parts = [np.zeros(0, small)]
    for first in range(0, len(letters), _PART):
        part = letters[first : first + _PART]
        found = np.flatnonzero((part == separator) | (part == _BREAK))
        parts.append((found + first).astype(small))
    return np.concatenate(parts)


def _decimals(
    letters: NDArray[np.uint8], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the numbers of some cells, and which of the cells are not empty and no such number.

    Parameters
    ----------
    letters : array of shape (cells, width)
        The first bytes of each cell, with zeros behind them.
    lengths : array of shape (cells,)
    """
    mantissa = np.zeros(len(letters), np.int64)
    digits = np.zeros(len(letters), np.int8)
    significant = np.zeros(len(letters), np.int8)
    behind = np.zeros(len(letters), np.int8)  # Digits behind the point.
    points = np.zeros(len(letters), np.int8)
    for column in np.ascontiguousarray(letters.T):
        mantissa *= _FACTORS[column]
        mantissa += _DIGITS[column]
        is_digit = column - np.uint8(48) < 10
        digits += is_digit
        significant += is_digit & (mantissa != 0)
        behind += is_digit & (points > 0)
        points += column == ord(".")
    first = letters[:, 0]
    negative = first == ord("-")
    signs = negative | (first == ord("+"))
    fine = (digits + points + signs == lengths) & (points <= 1)
    fine &= (digits > 0) & (significant <= _MOST_DIGITS) & (behind < len(_POWERS))
    values = mantissa / _POWERS[np.where(fine, behind, 0)]
    large = fine & (mantissa > _EXACT)
    if large.any():
        if _HAS_64_BITS:
            powers = _POWERS[behind[large]].astype(np.longdouble)
            quotients = mantissa[large].astype(np.longdouble) / powers
            values[large] = quotients
            # A mantissa in the middle between two floats may itself have been rounded to there.
            bits = quotients.view(np.uint64)[::2]
            fine[large] = bits & np.uint64(0x7FF) != 0x400
        else:
            fine &= ~large
    np.negative(values, out=values, where=negative)
    values[~fine] = np.nan
    return values, ~fine & (lengths > 0)
