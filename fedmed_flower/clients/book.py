"""The book of a hospital: what left without noise, and about which patients.

Metrics of an evaluation, sums and columns without a value before the first round, counts of a
study, pictures and answers to questions for statistics are written down before they leave. One
file beside the privacy ledger holds them over all runs, so that no combination of them singles out
a few patients who came or went: see `fedmed_flower.statistics.guard` for the rule. In a simulation
nothing leaves the machine, and nothing is written down.
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

# Not ".sqlite": the file lies beside the ledger and must not be taken for one.
_ENDING = ".answers"
# The cell of all categories that are too small to be disclosed singly.
POOLED = 2**30


def book_path(ledger: Path) -> Path:
    """Return the path of a hospital's book, beside its ledger."""
    return ledger.with_name(ledger.name.removesuffix(".sqlite") + _ENDING)


class Book:
    """The book of one real hospital, open for one answer.

    Parameters
    ----------
    guard : Guard
    columns : Columns
        The columns of all rows of all splits.
    rows : sequence of Row
        The same rows.
    app : str
        Name of the client's class. Metrics of different clients cannot be compared, so each class
        has evaluations of its own.
    """

    def __init__(self, guard: Guard, columns: Columns, rows: Sequence[Row], app: str) -> None:
        self._guard = guard
        self._columns = columns
        self._rows = rows
        self._app = app

    def admit(
        self,
        members: Members,
        inside: Mask,
        values: Codes | None = None,
    ) -> Mask | None:
        """Write down an answer about some rows, and return the rows that may count in it.

        Rows that are new since an earlier answer are left out if too few patients are behind them.

        Parameters
        ----------
        members : Members
            The variable that the answer is about.
        inside : ndarray of bool
            (rows,) the rows that the answer should count.
        values : ndarray of int64, optional
            (rows,) the cell of each row in the answer, at least 0; left out, all are in one cell.

        Returns
        -------
        ndarray of bool or None
            (rows,) the rows that may count; None if no answer may leave.
        """
        new = self._guard.labels(members) == NEW
        for usable in (inside, inside & ~new):
            cells = np.full(len(self._rows), OUTSIDE, np.int64)
            cells[usable] = 0 if values is None else values[usable]
            if usable.any() and self._guard.admit([members], [cells], new & ~usable):
                return usable
        return None

    def everybody(self, kind: str) -> list[Row]:
        """Write down an answer about all rows, and return those that may count; none if none may.

        The answer puts all rows that count into one cell. It is combined with no answer of another
        kind.
        """
        inside = np.ones(len(self._rows), bool)
        usable = self.admit(self._guard.everybody(kind), inside)
        if usable is None:
            return []
        return [row for row, counts in zip(self._rows, usable, strict=True) if counts]

    @property
    def rows(self) -> Sequence[Row]:
        """All rows, split after split."""
        return self._rows

    def evaluation(self, rows: Sequence[Row]) -> list[Row] | None:
        """Return the rows whose metrics may leave; None if no metrics may leave.

        Raises
        ------
        InputError
            If a row is not one of the loaded rows, so that the book cannot recognise it.
        """
        ids = {id(row) for row in rows}
        inside = self.mask_of(ids)
        if int(inside.sum()) != len(ids):
            raise InputError("screen must return rows that it was given, not copies or new rows")
        usable = self.admit(self._guard.everybody(f"evaluations by {self._app}"), inside)
        if usable is None:
            return None
        reported = {id(row) for row, fine in zip(self._rows, usable, strict=True) if fine}
        return [row for row in rows if id(row) in reported]

    def column(self, name: str, inside: Mask, values: Codes | None = None) -> Mask | None:
        """Write down an answer about a column, as `admit`; None also if there is no such column."""
        if name not in self._columns.names:
            return None
        return self.admit(self._guard.members(name), inside, values)

    def study(self, trait: str, inside: Mask, values: Codes | None = None) -> Mask | None:
        """Write down an answer about people and a trait of theirs, as `admit`.

        The trait may be no column of the rows, such as that of a fam file.
        """
        if trait in self._columns.names:
            return self.column(trait, inside, values)
        return self.admit(self._guard.everybody(f"studies of {trait}"), inside, values)

    def known(self, name: str) -> Mask:
        """Return (rows,) the rows that an earlier answer about a column has counted."""
        if name not in self._columns.names:
            return np.zeros(len(self._rows), bool)
        known: Mask = self._guard.labels(self._guard.members(name)) != NEW
        return known

    def categories(self, name: str, inside: Mask, minimum: int) -> Codes | None:
        """Return the categories of a column as far as they may be disclosed singly.

        Categories of few patients are pooled, the smallest first, until the pool has enough
        patients.

        Parameters
        ----------
        name : str
        inside : ndarray of bool
            (rows,) the rows that the answer should count.
        minimum : int
            The fewest patients of a category that is disclosed singly; at least 1.

        Returns
        -------
        ndarray of int64 or None
            (rows,) the number of each row's category; `POOLED` for a pooled one, -1 for a row that
            is not inside or has no category. None if all categories together are of too few
            patients.
        """
        codes = self._columns.codes(name)[0]
        valued = inside & (codes >= 0)
        labels = self._guard.labels(self._guard.members(name))
        patient_of_row = self._columns.patient_of_row[valued]
        pooled = pool_small(codes[valued], labels[valued], patient_of_row, minimum)
        if pooled is None:
            return None
        codes = np.full(len(self._rows), -1, np.int64)
        codes[valued] = np.where(pooled < 0, POOLED, pooled)
        return codes

    def mask_of(self, ids: Collection[int]) -> Mask:
        """Return (rows,) whether each row's `id` is among the given ones."""
        return np.array([id(row) in ids for row in self._rows])

    def shown(self, run: str) -> tuple[bool, set[str] | None]:
        """Return whether this run has shown pictures, and the patients whom any run has shown.

        Of the patients, those in the hospital's present rows are returned; None if no run has shown
        anybody.
        """
        return self._guard.shown(run)

    def show(self, run: str, patients: Collection[str]) -> None:
        """Write down that a run has its pictures, and of which patients."""
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
    """Open the book of a real hospital; entries are on the disk when the context is left.

    Parameters
    ----------
    path : Path
        As `book_path` returns it.
    rows : sequence of Row
        All rows of all splits.
    schema : Schema, optional
        The hospital's declaration of its columns.
    minimum : int
        The fewest patients who may be singled out; at least 1.
    hide_few_missing : bool
        As in the hospital's node config.
    app : str
        As `Book` takes it.
    """
    columns = Columns(rows, Request(), schema)
    with open_guard(path, columns, minimum, hide_few_missing) as guard:
        yield Book(guard, columns, rows, app)
