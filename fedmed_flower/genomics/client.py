"""A hospital with genotypes: it answers an association study with sums over its people."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from fedmed_flower.arrays.views import view
from fedmed_flower.clients.base import MedicalClient, Query
from fedmed_flower.clients.duplicates import digests_of
from fedmed_flower.data.site import SPLITS, Row, Site, SiteData, min_cell_count
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.genomics.association import WITHHELD, count_copies, withheld
from fedmed_flower.genomics.plink import Fileset
from fedmed_flower.genomics.regression import linear_sums, logistic_terms, standardised
from fedmed_flower.genomics.types import Floats
from fedmed_flower.privacy.patient import budget_of
from fedmed_flower.settings.section import with_type_of
from fedmed_flower.wire import COHORT, COUNT, OFFSET, PLACES, SQUARES, TOLD, VARIANTS

log = logging.getLogger("flwr.fedmed")

# Genotypes that are in memory at a time, as numbers of several kinds.
_CELLS = 1 << 22
# Of one answer: 128 MB.
_MOST_NUMBERS = 1 << 24
_MOST_LINES, _MOST_OFFSET = 1 << 20, 1 << 62
# What a study of 50 components asks for, with the few more that the search for them takes.
_MOST_LOADINGS = 64
# Components are made of common variants. A rarer one would weigh by its few carriers alone.
_LEAST_FREQUENCY = 0.01
_SCORES = "component-scores"
TRAITS = ("binary", "continuous")


@dataclass(frozen=True)
class Cohort:
    """The people of a hospital who take part in an association study.

    Attributes
    ----------
    fileset : Fileset
    people : (n,) int array
        Their places in the fam file.
    trait : (n,) float array
        0 or 1 if it is binary.
    covariates : (n, c) float array
        About their means here.
    minimum : int
        A variant is withheld of whose rarer allele, or of whose cases or controls, there are fewer,
        unless there are none.
    left_out : tuple of str
        Who takes no part, and how many.
    """

    fileset: Fileset
    people: NDArray[np.intp]
    trait: Floats
    covariates: Floats
    minimum: int
    left_out: tuple[str, ...]


class GenomicsClient(MedicalClient):
    """A hospital with PLINK files. Give `load_data` and `genotypes`; training is not part of it.

    Rows of all splits take part: one a person, with ``patient``, the individual id (IID) of the fam
    file, with the phenotype and the covariates. A person without a row, without a phenotype or
    without a covariate takes no part, nor does a row without a person.

    Attributes
    ----------
    phenotype : str
        Column of the trait.
    covariates : tuple of str
        Columns of numbers.
    trait : {"binary", "continuous"}
        A binary one is 0 for controls and 1 for cases.
    """

    phenotype: ClassVar[str] = "phenotype"
    covariates: ClassVar[tuple[str, ...]] = ()
    trait: ClassVar[str] = "binary"

    @abstractmethod
    def genotypes(self, site: Site) -> Path:
        """Return the path of the site's bed, bim and fam files without the endings."""

    def check(self, data: SiteData) -> None:
        """Refuse rows without the columns, with text in them, and a person with two rows."""
        if self.trait not in TRAITS:
            raise InputError(f"trait must be one of {', '.join(TRAITS)}, got {self.trait!r}")
        seen = set()
        for row in (row for split in SPLITS for row in getattr(data, split)):
            name = person(row["patient"])
            for column in (self.phenotype, *self.covariates):
                if column not in row:
                    raise InputError(
                        f"the row of patient {name} has no {column}: it has {', '.join(row)}"
                    )
                _number(row, column)
            if name in seen:
                raise InputError(f"patient {name} has two rows: an association takes one a person")
            seen.add(name)

    def cohort(self) -> Cohort:
        """Return who takes part; what does not depend on the message is kept for the run.

        Raises
        ------
        DeclinedError
            If the hospital asks for noise, or too few people, cases or controls are there.
        InputError
            If files and rows do not fit each other.
        """
        if budget_of(self.context) is not None or self.privacy.on:
            raise DeclinedError("an association study carries no noise")
        kept, key, noted = self.cache.more, self.key("cohort"), self.key("cohort noted")
        if key not in kept:
            kept[key] = self._cohort()
        cohort: Cohort = kept[key]
        cases = int(cohort.trait.sum()) if self.trait == "binary" else 0
        for what, count in (
            ("people", len(cohort.trait)),
            ("cases", cases),
            ("controls", len(cohort.trait) - cases),
        ):
            if count < cohort.minimum and (count or what == "people"):
                raise DeclinedError(f"it has fewer {what} than min-cell-count")
        if noted not in kept:
            self._note(cohort)
            kept[noted] = True
        return cohort

    def _note(self, cohort: Cohort) -> None:
        """Write down of whom a real hospital tells, beside what it told before.

        Raises
        ------
        DeclinedError
            If these people and those of an earlier answer differ by too few.
        """
        if self.site.simulated:
            return
        names = {cohort.fileset.people[at] for at in cohort.people}
        with self.open_book({}, cohort.minimum) as book:
            inside = np.array([person(row["patient"]) in names for row in book.rows])
            cells = None
            if self.trait == "binary":
                cells = np.array([int(_number(row, self.phenotype) == 1) for row in book.rows])
            usable = book.column(self.phenotype, inside, cells)
        if usable is None or not bool((usable == inside).all()):
            raise DeclinedError("its people differ by too few from those of an earlier answer")

    def _cohort(self) -> Cohort:
        fileset, data = Fileset.open(self.genotypes(self.site)), self.data()
        rows: dict[str, Row] = {
            person(row["patient"]): row for split in SPLITS for row in getattr(data, split)
        }
        found = [at for at, name in enumerate(fileset.people) if name in rows]
        if not found:
            raise InputError(
                f"none of the {len(rows)} patients is in {fileset.prefix}.fam: ids are compared as "
                f"texts, such as {next(iter(rows))!r} and {fileset.people[0]!r}"
            )
        columns = (self.phenotype, *self.covariates)
        values = np.array(
            [[_number(rows[fileset.people[at]], column) for column in columns] for at in found]
        )
        known = np.isfinite(values).all(1)
        if self.trait == "binary" and not np.isin(values[known, 0], (0, 1)).all():
            odd = next(value for value in values[known, 0] if value not in (0, 1))
            raise InputError(
                f"{self.phenotype} of a binary trait must be 0 or 1, got {odd:g}: PLINK's 1 and 2 "
                "are 0 and 1 here"
            )
        without = {
            "people of the fam file have no row": len(fileset.people) - len(found),
            "rows have no person in the fam file": len(rows) - len(found),
            "people lack the phenotype or a covariate": int((~known).sum()),
        }
        if not known.any():
            raise InputError(f"nobody has both {self.phenotype} and all covariates")
        values, people = values[known], np.array(found, np.intp)[known]
        covariates = values[:, 1:] - values[:, 1:].mean(0)
        minimum = min_cell_count(self.context, self.site)
        left_out = tuple(f"{count} {what}" for what, count in without.items() if count)
        return Cohort(fileset, people, values[:, 0], covariates, minimum, left_out)


def person(patient: Any) -> str:
    """Return a patient as the fam file has it, as text."""
    value = patient.item() if hasattr(patient, "item") else patient
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _number(row: Row, column: str) -> float:
    value = row[column]
    value = value.item() if hasattr(value, "item") else value
    if value is None:
        return math.nan
    if not isinstance(value, Real):
        raise InputError(
            f"{column} of patient {person(row['patient'])} must be a number, got {value!r}"
        )
    return float(value)


def cohort(client: GenomicsClient, message: Message) -> RecordDict:
    """Tell how many people take part, and in what."""
    found = client.cohort()
    for text in found.left_out:
        log.warning("%s: %s: they take no part", client.site.name, text)
    cases = int(found.trait.sum()) if client.trait == "binary" else 0
    about: dict[str, Any] = {
        "people": len(found.trait),
        "cases": cases,
        "variants": found.fileset.num_variants,
        "trait": client.trait,
        "phenotype": client.phenotype,
        "covariates": list(client.covariates),
        "minimum": found.minimum,
    }
    return RecordDict(
        {
            COHORT: ConfigRecord(about),
            **digests_of(client.site, client.data(), client.context.run_id),
        }
    )


def variants(client: GenomicsClient, message: Message) -> RecordDict:
    """Tell the next lines of the bim file."""
    config = client.read(message)
    fileset = client.cohort().fileset
    offset = _whole(config, OFFSET, 0, _MOST_OFFSET)
    found = fileset.variants(offset, _whole(config, COUNT, 1, _MOST_LINES))
    texts: dict[str, Any] = {
        name: "\n".join(getattr(found, name)) for name in ("names", "first", "second")
    }
    indices = {"chromosomes": Array(found.chromosomes), "positions": Array(found.positions)}
    return RecordDict(
        {
            VARIANTS: ConfigRecord(texts | {"offset": found.offset}),
            PLACES: ArrayRecord(indices),
        }
    )


def counts(client: GenomicsClient, message: Message) -> RecordDict:
    """Tell the counts of some variants; -1 for one of which they are withheld."""
    found = client.cohort()
    asked = _Asked(message, found, 5)
    cases = found.trait == 1 if client.trait == "binary" else np.zeros(len(found.trait), bool)
    squares = bool(client.read(message).get(SQUARES, False))
    reported = []
    for _, genotypes in asked.blocks(found):
        part = count_copies(genotypes, cases, squares)
        part[withheld(part, found.minimum)] = WITHHELD
        reported.append(part)
    return _told(np.concatenate(reported))


def linear(client: GenomicsClient, message: Message) -> RecordDict:
    """Tell what the linear models of some variants are made of."""
    found = client.cohort()
    covariates = _with_scores(client, found)
    width = covariates.shape[1] + 2
    asked = _Asked(message, found, width * (width + 1) // 2)
    return _told(
        np.concatenate(
            [
                linear_sums(_tellable(client, found, genotypes), found.trait, covariates)
                for _, genotypes in asked.blocks(found)
            ]
        )
    )


def logistic(client: GenomicsClient, message: Message) -> RecordDict:
    """Tell what one Newton step of the logistic models of some variants is made of.

    ``withheld`` says for each variant whether nothing is told of it, because one person has more
    than one part in `minimum` of the weight, as `logistic_terms` has it: 0 stands in its place.
    """
    found = client.cohort()
    covariates = _with_scores(client, found)
    width = covariates.shape[1] + 2
    asked = _Asked(message, found, width + width * (width + 1) // 2)
    count = len(asked.lines)
    slopes = asked.array("slopes", count, width - 1)
    intercepts = asked.array("intercepts", count)
    reported, few = [], []
    for part, genotypes in asked.blocks(found):
        seen = _tellable(client, found, genotypes)
        at = (found.trait == 1, covariates, slopes[part], intercepts[part])
        terms, shares = logistic_terms(seen, *at)
        # Of ten people alike each has a tenth, but for rounding.
        above = ~(shares * found.minimum <= 1 + 1e-9)
        terms[above] = 0.0
        reported.append(terms)
        few.append(above)
    return _told(np.concatenate(reported), withheld=np.concatenate(few))


def loadings(client: GenomicsClient, message: Message) -> RecordDict:
    """Tell the sum over the people of g (g' loadings), g being their standardised genotypes.

    As many such sums as there are people give all their genotypes: a real hospital tells them only
    where its node config has ``share-components=true``.
    """
    found = client.cohort()
    asked = _Asked(message, found, _MOST_LOADINGS)
    scores, frequencies = asked.scores(client, found)
    return _told(
        np.concatenate(
            [
                standardised(genotypes, frequencies[part]).T @ scores
                for part, genotypes in asked.blocks(found)
            ]
        )
    )


def scores(client: GenomicsClient, message: Message) -> RecordDict:
    """Keep the people's scores on the principal components here, for the models that follow."""
    found = client.cohort()
    own, _ = _Asked(message, found, _MOST_LOADINGS).scores(client, found)
    client.context.state[_SCORES] = ArrayRecord({"scores": Array(own - own.mean(0))})
    return RecordDict()


class _Asked:
    """Which variants a message asks for, and the arrays that come with it.

    Parameters
    ----------
    message : Message
    cohort : Cohort
    width : int
        Numbers that the answer has of each variant.

    Raises
    ------
    InputError
        If the variants are not different lines of the hospital's file, or the answer would be
        too large.
    """

    def __init__(self, message: Message, cohort: Cohort, width: int) -> None:
        self._arrays = next(iter(message.content.array_records.values()), ArrayRecord())
        self.lines, self.swapped = self._view("lines"), self._view("swapped")
        whole = self.lines.dtype.kind in "iu" and self.lines.ndim == 1
        if not whole or self.swapped.shape != self.lines.shape or self.swapped.dtype != np.bool_:
            raise InputError(
                "lines must be whole numbers, one a variant, and swapped true or false for each"
            )
        count, most, last = len(self.lines), _MOST_NUMBERS // width, cohort.fileset.num_variants - 1
        if count > most:
            raise InputError(f"lines must be at most {most} for this question, got {count}")
        if not count or self.lines.min() < 0 or self.lines.max() > last:
            raise InputError(f"lines must lie in 0..{last} and be at least one")
        if len(np.unique(self.lines)) < count:
            raise InputError("lines must be different: a question names a variant once")

    def _view(self, name: str) -> NDArray[Any]:
        if name not in self._arrays:
            raise InputError(f"the message has no array {name}")
        return view(self._arrays[name])

    def array(self, name: str, *shape: int) -> Floats:
        """Return an array of finite numbers, of this shape.

        Raises
        ------
        InputError
        """
        found: Floats = self._view(name)
        if found.dtype != np.float64 or found.shape != shape:
            raise InputError(
                f"{name} must be float64 of shape {shape}, got {found.dtype} of {found.shape}"
            )
        if not np.isfinite(found).all():
            raise InputError(f"{name} must be finite")
        return found

    def blocks(self, cohort: Cohort) -> Iterator[tuple[slice, NDArray[np.int8]]]:
        """Yield places and genotypes of as many variants as are good for memory."""
        lines, size = self.lines, max(1, _CELLS // len(cohort.people))
        everybody = len(cohort.people) == len(cohort.fileset.people)
        people = slice(None) if everybody else cohort.people
        for start in range(0, len(lines), size):
            part = slice(start, start + size)
            found = cohort.fileset.read(people, lines[part].astype(np.int64))
            for column in np.flatnonzero(self.swapped[part]):
                copies = found[:, column]
                copies[copies >= 0] = 2 - copies[copies >= 0]
            yield part, found

    def scores(self, client: GenomicsClient, cohort: Cohort) -> tuple[Floats, Floats]:
        """Return what the loadings make of each person's genotypes, and the frequencies.

        Raises
        ------
        DeclinedError
            If the hospital has not said that it takes part in components.
        """
        given = client.context.node_config.get("share-components", client.site.simulated)
        if not with_type_of(False, given, "share-components"):
            raise DeclinedError(
                "components take sums from which genotypes can be computed: a hospital that is "
                "willing sets share-components=true in its node config"
            )
        shape = self._view("loadings").shape
        columns = shape[1] if len(shape) == 2 else 0
        if not 1 <= columns <= _MOST_LOADINGS:
            raise InputError(f"loadings must have 1 to {_MOST_LOADINGS} columns, got {columns}")
        wanted = self.array("loadings", len(self.lines), columns)
        if np.abs(wanted).max() > 1:
            raise InputError("loadings must lie in -1..1: those of a component have length 1")
        frequencies = self.array("frequencies", len(self.lines))
        # One for each person would give a single person all the weight.
        if np.minimum(frequencies, 1 - frequencies).min() < _LEAST_FREQUENCY:
            raise InputError(
                f"frequencies must lie in {_LEAST_FREQUENCY}..{1 - _LEAST_FREQUENCY}: components "
                "are made of common variants"
            )
        total = np.zeros((len(cohort.people), columns))
        for part, genotypes in self.blocks(cohort):
            seen = _tellable(client, cohort, genotypes)
            total += standardised(seen, frequencies[part]) @ wanted[part]
        return total, frequencies


def _tellable(
    client: GenomicsClient, cohort: Cohort, genotypes: NDArray[np.int8]
) -> NDArray[np.int8]:
    """Return genotypes of which sums may be told."""
    cases = cohort.trait == 1 if client.trait == "binary" else np.zeros(len(cohort.trait), bool)
    if withheld(count_copies(genotypes, cases, squares=False), cohort.minimum).any():
        raise InputError("models were asked for of variants whose counts are withheld")
    return genotypes


def _with_scores(client: GenomicsClient, cohort: Cohort) -> Floats:
    if _SCORES not in client.context.state:
        return cohort.covariates
    kept = view(client.context.state.array_records[_SCORES]["scores"])
    return np.column_stack([cohort.covariates, kept])


def _told(values: NDArray[Any], **more: NDArray[Any]) -> RecordDict:
    arrays = {"values": values} | more
    reported = {name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return RecordDict({TOLD: ArrayRecord(reported)})


def _whole(config: ConfigRecord, name: str, least: int, most: int) -> int:
    value = config.get(name)
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"{name} must be a whole number in {least}..{most}, got {value!r}")
    return value


_QUERIES: Mapping[str, Query] = {
    query.__name__: query
    for query in (cohort, variants, counts, linear, logistic, loadings, scores)
}
GenomicsClient.queries = {**MedicalClient.queries, **_QUERIES}
