"""What a hospital has told without noise, and of whom: one book under all kinds of answers.

Figures of an evaluation, sums before the first round, counts of a study, pictures and the answers
to questions for statistics are written down in one file beside the privacy ledger, over all runs,
before they leave. Few patients who come or go are told apart by no kind: see `fedmed_flower.
statistics.guard` for the rule. In a simulation nothing leaves, and nothing is written down.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fedmed_flower.data.schema import Schema
from fedmed_flower.data.site import Row
from fedmed_flower.errors import InputError
from fedmed_flower.statistics.cells import pool_small
from fedmed_flower.statistics.columns import Columns
from fedmed_flower.statistics.guard import NEW, OUTSIDE, Guard, Members, open_guard
from fedmed_flower.statistics.request import Request
from fedmed_flower.statistics.types import Codes, Mask

# Beside the ledger, and not taken for one.
_ENDING = ".answers"
# The cell of all categories that are not told apart.
POOLED = 2**30


def book_path(ledger: Path) -> Path:
    """Return the file beside a hospital's ledger that holds what it has told."""
    return ledger.with_name(ledger.name.removesuffix(".sqlite") + _ENDING)


class Book:
    """The book of one real hospital, open for one answer.

    Parameters
    ----------
    guard : Guard
    columns : Columns
        Of all rows of all splits.
    rows : sequence of Row
        The same rows.
    app : str
        The client's class: figures of one client cannot be compared with those of another.
    """

    def __init__(self, guard: Guard, columns: Columns, rows: Sequence[Row], app: str) -> None:
        self._guard, self._columns, self._rows, self._app = guard, columns, rows, app

    def admit(
        self,
        members: Members,
        inside: Mask,
        values: Codes | None = None,
    ) -> Mask | None:
        """Write down that something is told of some rows, and return of which it may be.

        Rows that came since an earlier answer, and are too few to be told apart from it, are left
        out.

        Parameters
        ----------
        members : Members
            What is told of.
        inside : ndarray of bool
            (rows,) of which is to be told.
        values : ndarray of int64, optional
            (rows,) cells, at least 0, that the answer tells apart.

        Returns
        -------
        ndarray of bool or None
            None if nothing may be told.
        """
        new = self._guard.labels(members) == NEW
        for usable in (inside, inside & ~new):
            cells = np.full(len(self._rows), OUTSIDE, np.int64)
            cells[usable] = 0 if values is None else values[usable]
            if usable.any() and self._guard.admit([members], [cells], new & ~usable):
                return usable
        return None

    @property
    def rows(self) -> Sequence[Row]:
        """All rows, split after split."""
        return self._rows

    def evaluation(self, rows: Sequence[Row]) -> list[Row] | None:
        """Return of which rows figures may leave; None if of none.

        Raises
        ------
        InputError
            If a row is not one that was loaded, so that it cannot be known again.
        """
        ids = {id(row) for row in rows}
        inside = self.of(ids)
        if int(inside.sum()) != len(ids):
            raise InputError("screen must return rows that it was given, not others")
        usable = self.admit(self._guard.everybody(f"evaluations by {self._app}"), inside)
        if usable is None:
            return None
        reported = {id(row) for row, fine in zip(self._rows, usable, strict=True) if fine}
        return [row for row in rows if id(row) in reported]

    def column(self, name: str, inside: Mask, values: Codes | None = None) -> Mask | None:
        """Return of which rows a column may be told of; None if of none, or it is not there."""
        if name not in self._columns.names:
            return None
        return self.admit(self._guard.members(name), inside, values)

    def known(self, name: str) -> Mask:
        """Return the rows of which a column was told before."""
        if name not in self._columns.names:
            return np.zeros(len(self._rows), bool)
        known: Mask = self._guard.labels(self._guard.members(name)) != NEW
        return known

    def categories(self, name: str, inside: Mask, minimum: int) -> Codes | None:
        """Return (rows,) the number of each row's category, as far as these may be told apart.

        `POOLED` are those of few patients, the smallest first, until together they are enough; -1
        is a row that is not inside or has no category.

        Parameters
        ----------
        name : str
        inside : ndarray of bool
            (rows,) of which is to be told.
        minimum : int

        Returns
        -------
        ndarray or None
            None if all categories together are of too few patients.
        """
        codes = self._columns.codes(name)[0]
        here = inside & (codes >= 0)
        labels = self._guard.labels(self._guard.members(name))
        pooled = pool_small(codes[here], labels[here], self._columns.patient_of_row[here], minimum)
        if pooled is None:
            return None
        codes = np.full(len(self._rows), -1, np.int64)
        codes[here] = np.where(pooled < 0, POOLED, pooled)
        return codes

    def of(self, rows: Collection[int]) -> Mask:
        """Return which rows are among some, by their identity."""
        return np.array([id(row) in rows for row in self._rows])

    def shown(self, run: str) -> tuple[bool, set[str] | None]:
        """Return whether a run had pictures, and of whom here any had; None if of nobody."""
        return self._guard.shown(run)

    def show(self, run: str, patients: Collection[str]) -> None:
        """Write down that pictures of patients leave."""
        self._guard.show(run, patients)


@contextmanager
def open_book(
    path: Path,
    rows: Sequence[Row],
    schema: Schema | None,
    minimum: int,
    hide_few_missing: bool,
    app: str,
) -> Iterator[Book]:
    """Open the book of a real hospital; what was admitted is on the disk when this is left.

    Parameters
    ----------
    path : Path
        As `book_path` returns it.
    rows : sequence of Row
        All rows of all splits.
    schema : Schema, optional
        What the hospital declares of its columns.
    minimum : int
        The fewest patients who may be told apart; at least 1.
    hide_few_missing : bool
        As the hospital's node config has it.
    app : str
        As `Book` takes it.
    """
    columns = Columns(rows, Request(), schema)
    with open_guard(path, columns, minimum, hide_few_missing) as guard:
        yield Book(guard, columns, rows, app)
