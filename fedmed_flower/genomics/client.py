"""A hospital with genotypes: it answers an association study with sums over its people."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from fedmed_flower.clients.queries import refuse_other_version
from fedmed_flower.data.site import Row, Site, SiteData, all_rows, min_cell_count
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.genomics.association import WITHHELD, count_copies, withheld
from fedmed_flower.genomics.coding import (
    CODINGS,
    MISSING_CODES,
    case_status,
    lone_text,
    lone_values,
    number_of,
    require_quantitative,
    without_codes,
)
from fedmed_flower.genomics.plink import FAM_COLUMNS, FAM_PHENOTYPE, Fileset
from fedmed_flower.genomics.regression import linear_sums, logistic_terms, standardised
from fedmed_flower.genomics.types import Floats
from fedmed_flower.privacy.patient import budget_of
from fedmed_flower.settings.text import with_type_of
from fedmed_flower.wire import COHORT, COUNT, OFFSET, POSITIONS, SQUARES, SUMS, VARIANTS

log = logging.getLogger("flwr.fedmed")

# Genotypes that are read at a time; several arrays of this size are in memory.
_CELLS = 1 << 22
# Numbers of one answer: 128 MB.
MOST_NUMBERS = 1 << 24
_MOST_LINES = 1 << 20
_MOST_OFFSET = 1 << 62
# A study of 50 components asks for this many columns, with the few more that the search takes.
_MOST_LOADINGS = 64
# Components are made of common variants: in a rarer one a few carriers have all the weight.
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
        Their indices in the fam file.
    trait : (n,) float array
        0 or 1 if the trait is binary.
    covariates : (n, c) float array
        Centred on their means at this hospital.
    minimum : int
        A variant is withheld if there are fewer copies of its rarer allele, fewer cases or fewer
        controls, unless there are none.
    left_out : tuple of str
        How many people or rows take no part, and why.
    suspicious : tuple of str
        Values that may stand for a missing one, in words, for the hospital's own log.
    """

    fileset: Fileset
    people: NDArray[np.intp]
    trait: Floats
    covariates: Floats
    minimum: int
    left_out: tuple[str, ...]
    suspicious: tuple[str, ...]


class GenomicsClient(MedicalClient):
    """A hospital with PLINK files. Give `load_data` and `genotypes`; training is not part of it.

    Rows of all splits take part, one a person. A row has ``patient`` (the individual id, IID, of
    the fam file), the phenotype and the covariates. A person without a row, a phenotype or a
    covariate takes no part, nor does a row without a person.

    Attributes
    ----------
    phenotype : str
        Column of the trait; ``fam.phenotype`` is that of the fam file.
    covariates : tuple of str
        Columns of numbers; ``fam.sex`` is that of the fam file: 1 for men, 2 for women.
    trait : {"binary", "continuous"}
    coding : {"", "0/1", "1/2"}
        How controls and cases of a binary trait are written. In ``1/2``, PLINK's coding, which
        that of the fam file always has, 0 is missing. Empty stands for ``0/1``; data in which that
        cannot be seen, because somebody has 2 or nobody has 0, are refused.
    missing : dict
        By column: the numbers that stand for a missing value there. For a column that is not named
        it is -9, PLINK's code; an empty tuple stands for none. None, NaN and texts such as ``NA``
        are always missing.
    """

    phenotype: ClassVar[str] = "phenotype"
    covariates: ClassVar[tuple[str, ...]] = ()
    trait: ClassVar[str] = "binary"
    coding: ClassVar[str] = ""
    missing: ClassVar[Mapping[str, Collection[float]]] = {}

    @abstractmethod
    def genotypes(self, site: Site) -> Path:
        """Return the path of the site's bed, bim and fam files without the endings."""

    def check(self, data: SiteData) -> None:
        """Check the trait and the rows.

        Raises
        ------
        InputError
            If an attribute of the class is not what it may be, a row lacks a column or has no
            number in it, or a person has two rows.
        """
        self._require_declared()
        seen = set()
        columns = [column for column in self._columns if column not in FAM_COLUMNS]
        for row in all_rows(data):
            name = person(row["patient"])
            for column in columns:
                if column not in row:
                    raise InputError(
                        f"the row of patient {name} has no {column}: it has {', '.join(row)}"
                    )
                number_of(row[column], column, name)
            if name in seen:
                raise InputError(f"patient {name} has two rows: an association takes one a person")
            seen.add(name)

    @property
    def _columns(self) -> tuple[str, ...]:
        return (self.phenotype, *self.covariates)

    def _require_declared(self) -> None:
        if self.trait not in TRAITS:
            raise InputError(f"trait must be one of {', '.join(TRAITS)}, got {self.trait!r}")
        if self.coding not in ("", *CODINGS):
            raise InputError(
                f"coding must be empty or one of {', '.join(CODINGS)}, got {self.coding!r}"
            )
        for column, codes in self.missing.items():
            if column not in self._columns:
                raise InputError(
                    f"missing has the column {column!r}, which is not one of the study's: "
                    f"{', '.join(self._columns)}"
                )
            listed = isinstance(codes, Collection) and not isinstance(codes, str)
            if not listed or not all(isinstance(code, Real) for code in codes):
                raise InputError(
                    f"missing[{column!r}] must be a tuple of numbers, such as (-9, 99), got "
                    f"{codes!r}"
                )

    def cohort(self) -> Cohort:
        """Return who takes part; read once a run.

        Raises
        ------
        DeclinedError
            If the hospital asks for noise, or has too few people, cases or controls.
        InputError
            If files and rows do not fit each other.
        """
        if budget_of(self.context) is not None or self.privacy.on:
            raise DeclinedError("an association study carries no noise")
        cache = self.cache.more
        key = self.key("cohort")
        noted_key = self.key("cohort noted")
        if key not in cache:
            cache[key] = self.read_cohort(self.data())
        cohort: Cohort = cache[key]
        cases = int(cohort.trait.sum()) if self.trait == "binary" else 0
        for what, count in (
            ("people", len(cohort.trait)),
            ("cases", cases),
            ("controls", len(cohort.trait) - cases),
        ):
            if count < cohort.minimum and (count or what == "people"):
                raise DeclinedError(f"it has fewer {what} than min-cell-count")
        if noted_key not in cache:
            self._note(cohort)
            cache[noted_key] = True
        return cohort

    def _note(self, cohort: Cohort) -> None:
        """Record in a real hospital's book which people its answers are about.

        Raises
        ------
        DeclinedError
            If fewer than min-cell-count of these people, or of the cases or controls among them,
            differ between this answer and an earlier one.
        """
        if self.site.simulated:
            return
        names = [cohort.fileset.people[index] for index in cohort.people]
        trait_of = dict(zip(names, cohort.trait.tolist(), strict=True))
        with self.open_book({}, cohort.minimum) as book:
            traits = [trait_of.get(person(row["patient"])) for row in book.rows]
            inside = np.array([trait is not None for trait in traits])
            cells = None
            if self.trait == "binary":
                cells = np.array([int(trait == 1) for trait in traits])
            usable = book.study(self.phenotype, inside, cells)
        if usable is None or not bool((usable == inside).all()):
            raise DeclinedError(
                "fewer than min-cell-count people (or cases, or controls) differ between this "
                "answer and an earlier one"
            )

    def read_cohort(self, data: SiteData) -> Cohort:
        """Return who of these rows takes part, and note nothing.

        Raises
        ------
        InputError
            If files and rows do not fit each other.
        """
        fileset = Fileset.open(self.genotypes(self.site))
        rows: dict[str, Row] = {person(row["patient"]): row for row in all_rows(data)}
        indices = [index for index, name in enumerate(fileset.people) if name in rows]
        if not indices:
            raise InputError(
                f"none of the {len(rows)} patients is in {fileset.prefix}.fam: ids are compared as "
                f"texts, such as {next(iter(rows))!r} and {fileset.people[0]!r}"
            )
        values = np.column_stack(
            [self._values(column, fileset, rows, indices) for column in self._columns]
        )
        suspicious = [
            lone_text(column, lone)
            for column, numbers in zip(self._columns, values.T, strict=True)
            for lone in lone_values(numbers)
        ]
        if self.trait == "binary":
            coding = "1/2" if self.phenotype == FAM_PHENOTYPE else self.coding
            values[:, 0] = case_status(values[:, 0], coding, self.phenotype)
        elif self.phenotype == FAM_PHENOTYPE:
            require_quantitative(values[:, 0])
        known = np.isfinite(values).all(1)
        omitted = {
            "people of the fam file have no row": len(fileset.people) - len(indices),
            "rows have no person in the fam file": len(rows) - len(indices),
            "people lack the phenotype or a covariate": int((~known).sum()),
        }
        if not known.any():
            raise InputError(f"nobody has both {self.phenotype} and all covariates")
        people = np.array(indices, np.intp)[known]
        values = values[known]
        covariates = values[:, 1:] - values[:, 1:].mean(0)
        # Rounding would make numbers of a column that has one value.
        covariates[:, np.ptp(values[:, 1:], axis=0) == 0] = 0.0
        minimum = min_cell_count(self.context, self.site)
        left_out = tuple(f"{count} {what}" for what, count in omitted.items() if count)
        return Cohort(
            fileset, people, values[:, 0], covariates, minimum, left_out, tuple(suspicious)
        )

    def _values(
        self, column: str, fileset: Fileset, rows: Mapping[str, Row], indices: Sequence[int]
    ) -> Floats:
        """Return a column of the people at these lines of the fam file; NaN if missing."""
        if column in FAM_COLUMNS:
            values = fileset.column(column)[indices]
        else:
            names = [fileset.people[index] for index in indices]
            values = np.array([number_of(rows[name][column], column, name) for name in names])
        return without_codes(values, self.missing.get(column, MISSING_CODES))


def person(patient: Any) -> str:
    """Return a patient's id as text, as in a fam file: 7.0 is ``7``."""
    value = patient.item() if hasattr(patient, "item") else patient
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def cohort(client: GenomicsClient, message: Message) -> RecordDict:
    """Report how many people take part, and in which study; declines another version's message."""
    refuse_other_version(client, message)
    cohort = client.cohort()
    for text in cohort.left_out:
        log.warning("%s: %s: they take no part", client.site.name, text)
    for text in cohort.suspicious:
        log.warning("%s: %s", client.site.name, text)
    cases = int(cohort.trait.sum()) if client.trait == "binary" else 0
    numbers = {"people": len(cohort.trait), "cases": cases}
    return RecordDict(
        {
            COHORT: ConfigRecord({**numbers, **about_study(client, cohort)}),
            **digests_of(client.site, client.data(), client.context.run_id),
        }
    )


def about_study(client: GenomicsClient, cohort: Cohort) -> dict[str, Any]:
    """Return what a hospital reports of its study beside the numbers of people."""
    return {
        "variants": cohort.fileset.num_variants,
        "trait": client.trait,
        "phenotype": client.phenotype,
        "covariates": list(client.covariates),
        "minimum": cohort.minimum,
    }


def variants(client: GenomicsClient, message: Message) -> RecordDict:
    """Send the next lines of the bim file."""
    config = client.read(message)
    fileset = client.cohort().fileset
    offset = _whole(config, OFFSET, 0, _MOST_OFFSET)
    listing = fileset.variants(offset, _whole(config, COUNT, 1, _MOST_LINES))
    texts: dict[str, Any] = {
        name: "\n".join(getattr(listing, name)) for name in ("names", "first", "second")
    }
    places = {"chromosomes": Array(listing.chromosomes), "positions": Array(listing.positions)}
    return RecordDict(
        {
            VARIANTS: ConfigRecord(texts | {"offset": listing.offset}),
            POSITIONS: ArrayRecord(places),
        }
    )


def counts(client: GenomicsClient, message: Message) -> RecordDict:
    """Send the counts of the requested variants; -1 if a variant's counts are withheld."""
    cohort = client.cohort()
    request = _Request(message, cohort, 5)
    cases = case_mask(client, cohort)
    squares = bool(client.read(message).get(SQUARES, False))
    reported = []
    for _, genotypes in request.blocks(cohort):
        part = count_copies(genotypes, cases, squares)
        part[withheld(part, cohort.minimum)] = WITHHELD
        reported.append(part)
    return _reply(np.concatenate(reported))


def linear(client: GenomicsClient, message: Message) -> RecordDict:
    """Send the sums from which the linear models of the requested variants are computed."""
    cohort = client.cohort()
    covariates = _with_scores(client, cohort)
    width = covariates.shape[1] + 2
    request = _Request(message, cohort, width * (width + 1) // 2)
    return _reply(
        np.concatenate(
            [
                linear_sums(_disclosable(client, cohort, genotypes), cohort.trait, covariates)
                for _, genotypes in request.blocks(cohort)
            ]
        )
    )


def logistic(client: GenomicsClient, message: Message) -> RecordDict:
    """Send the terms of one Newton step of the logistic models of the requested variants.

    ``withheld`` says for each variant whether its terms are withheld, and 0 is sent instead. They
    are withheld if one person has more than one part in `minimum` of the weight, as
    `logistic_terms` measures it.
    """
    cohort = client.cohort()
    covariates = _with_scores(client, cohort)
    width = covariates.shape[1] + 2
    request = _Request(message, cohort, width + width * (width + 1) // 2)
    count = len(request.lines)
    slopes = request.array("slopes", count, width - 1)
    intercepts = request.array("intercepts", count)
    reported = []
    weighty = []
    for part, genotypes in request.blocks(cohort):
        disclosable = _disclosable(client, cohort, genotypes)
        terms, shares = logistic_terms(
            disclosable, cohort.trait == 1, covariates, slopes[part], intercepts[part]
        )
        # Ten equal people have a tenth each, but for rounding.
        above = ~(shares * cohort.minimum <= 1 + 1e-9)
        terms[above] = 0.0
        reported.append(terms)
        weighty.append(above)
    return _reply(np.concatenate(reported), withheld=np.concatenate(weighty))


def loadings(client: GenomicsClient, message: Message) -> RecordDict:
    """Send the sum over the people of g (g' loadings), where g are their standardised genotypes.

    As many such sums as there are people determine all their genotypes. So a real hospital sends
    them only if its node config has ``share-components=true``.
    """
    cohort = client.cohort()
    request = _Request(message, cohort, _MOST_LOADINGS)
    scores, frequencies = request.scores(client, cohort)
    return _reply(
        np.concatenate(
            [
                standardised(genotypes, frequencies[part]).T @ scores
                for part, genotypes in request.blocks(cohort)
            ]
        )
    )


def scores(client: GenomicsClient, message: Message) -> RecordDict:
    """Store the people's scores on the principal components, as covariates of later models.

    The reply is empty.
    """
    cohort = client.cohort()
    scores, _ = _Request(message, cohort, _MOST_LOADINGS).scores(client, cohort)
    client.context.state[_SCORES] = ArrayRecord({"scores": Array(scores - scores.mean(0))})
    return RecordDict()


class _Request:
    """Which variants a message requests, and the arrays that come with it.

    Parameters
    ----------
    message : Message
    cohort : Cohort
    width : int
        How many numbers the answer has for each variant.

    Raises
    ------
    InputError
        If a line is not in the hospital's bim file or is repeated, or the answer would be too
        large.
    """

    def __init__(self, message: Message, cohort: Cohort, width: int) -> None:
        self._arrays = next(iter(message.content.array_records.values()), ArrayRecord())
        self.lines = self._view("lines")
        self.swapped = self._view("swapped")
        whole = self.lines.dtype.kind in "iu" and self.lines.ndim == 1
        if not whole or self.swapped.shape != self.lines.shape or self.swapped.dtype != np.bool_:
            raise InputError(
                "lines must be whole numbers, one a variant, and swapped true or false for each"
            )
        count = len(self.lines)
        most = MOST_NUMBERS // width
        last = cohort.fileset.num_variants - 1
        if count > most:
            raise InputError(f"lines must be at most {most} for this question, got {count}")
        if not count or self.lines.min() < 0 or self.lines.max() > last:
            raise InputError(f"lines must be one or more numbers in 0..{last}")
        if len(np.unique(self.lines)) < count:
            raise InputError("lines must be different: a question names a variant once")

    def _view(self, name: str) -> NDArray[Any]:
        if name not in self._arrays:
            raise InputError(f"the message has no array {name}")
        return view(self._arrays[name])

    def array(self, name: str, *shape: int) -> Floats:
        """Return an array of the message by name.

        Raises
        ------
        InputError
            If it is missing, is not float64 of this shape, or is not finite.
        """
        values: Floats = self._view(name)
        if values.dtype != np.float64 or values.shape != shape:
            raise InputError(
                f"{name} must be float64 of shape {shape}, got {values.dtype} of {values.shape}"
            )
        if not np.isfinite(values).all():
            raise InputError(f"{name} must be finite")
        return values

    def blocks(self, cohort: Cohort) -> Iterator[tuple[slice, NDArray[np.int8]]]:
        """Yield slices of the requested variants with their genotypes, each of bounded memory."""
        yield from genotype_blocks(cohort, self.lines.astype(np.int64), self.swapped)

    def scores(self, client: GenomicsClient, cohort: Cohort) -> tuple[Floats, Floats]:
        """Return each person's scores on the loadings, and the variants' frequencies.

        Returns
        -------
        scores : (n, k) float array
        frequencies : (m,) float array

        Raises
        ------
        DeclinedError
            If ``share-components`` is false in the node config, or not set at a real hospital.
        InputError
            If loadings or frequencies are malformed or out of range.
        """
        share = client.context.node_config.get("share-components", client.site.simulated)
        if not with_type_of(False, share, "share-components"):
            raise DeclinedError(
                "components need sums from which genotypes can be computed: to allow them, set "
                "share-components=true in the node config"
            )
        shape = self._view("loadings").shape
        columns = shape[1] if len(shape) == 2 else 0
        if not 1 <= columns <= _MOST_LOADINGS:
            raise InputError(f"loadings must have 1 to {_MOST_LOADINGS} columns, got {columns}")
        loadings = self.array("loadings", len(self.lines), columns)
        if np.abs(loadings).max() > 1:
            raise InputError("loadings must lie in -1..1: those of a component have length 1")
        frequencies = self.array("frequencies", len(self.lines))
        # A server could choose frequencies that give one person all the weight.
        if np.minimum(frequencies, 1 - frequencies).min() < _LEAST_FREQUENCY:
            raise InputError(
                f"frequencies must lie in {_LEAST_FREQUENCY}..{1 - _LEAST_FREQUENCY}: components "
                "are made of common variants"
            )
        total = np.zeros((len(cohort.people), columns))
        for part, genotypes in self.blocks(cohort):
            disclosable = _disclosable(client, cohort, genotypes)
            total += standardised(disclosable, frequencies[part]) @ loadings[part]
        return total, frequencies


def genotype_blocks(
    cohort: Cohort, lines: NDArray[np.int64], swapped: NDArray[np.bool_]
) -> Iterator[tuple[slice, NDArray[np.int8]]]:
    """Yield slices of variants with the genotypes of the people, each of bounded memory.

    Parameters
    ----------
    cohort : Cohort
    lines : (m,) int array
        Lines of the bim file, from 0.
    swapped : (m,) bool array
        Whether the other allele is counted.
    """
    size = max(1, _CELLS // len(cohort.people))
    everybody = len(cohort.people) == len(cohort.fileset.people)
    people = slice(None) if everybody else cohort.people
    for start in range(0, len(lines), size):
        part = slice(start, start + size)
        genotypes = cohort.fileset.read(people, lines[part])
        for column in np.flatnonzero(swapped[part]):
            copies = genotypes[:, column]
            copies[copies >= 0] = 2 - copies[copies >= 0]
        yield part, genotypes


def case_mask(client: GenomicsClient, cohort: Cohort) -> NDArray[np.bool_]:
    """Return who is a case: nobody if the trait is continuous."""
    return cohort.trait == 1 if client.trait == "binary" else np.zeros(len(cohort.trait), bool)


def _disclosable(
    client: GenomicsClient, cohort: Cohort, genotypes: NDArray[np.int8]
) -> NDArray[np.int8]:
    """Return the genotypes if sums over them may be disclosed; raise `InputError` if not."""
    cases = case_mask(client, cohort)
    if withheld(count_copies(genotypes, cases, squares=False), cohort.minimum).any():
        raise InputError("models were requested of variants whose counts are withheld")
    return genotypes


def _with_scores(client: GenomicsClient, cohort: Cohort) -> Floats:
    if _SCORES not in client.context.state:
        return cohort.covariates
    scores = view(client.context.state.array_records[_SCORES]["scores"])
    return np.column_stack([cohort.covariates, scores])


def _reply(values: NDArray[Any], **more: NDArray[Any]) -> RecordDict:
    arrays = {"values": values} | more
    reported = {name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return RecordDict({SUMS: ArrayRecord(reported)})


def _whole(config: ConfigRecord, name: str, least: int, most: int) -> int:
    value = config.get(name)
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"{name} must be a whole number in {least}..{most}, got {value!r}")
    return value


_QUERIES: Mapping[str, Query | str] = {
    **{
        query.__name__: query
        for query in (cohort, variants, counts, linear, logistic, loadings, scores)
    },
    **{
        name: f"fedmed_flower.genomics.secure_client:{name}"
        for name in ("design", "people", "totals", "products", "steps", "spreads")
    },
}
GenomicsClient.queries = {**MedicalClient.queries, **_QUERIES}
