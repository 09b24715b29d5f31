"""A hospital's part of the secure sums of an association study.

All hospitals get the same message, so variants are named, not numbered, and nothing in it is one
hospital's own. A hospital that lacks a variant, or withholds it, adds zeros to every part of its
sums, `told` among them: by that the server knows over how many hospitals each sum is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from fedmed_flower.arrays.views import view
from fedmed_flower.clients.duplicates import digests_of
from fedmed_flower.clients.queries import refuse_other_version
from fedmed_flower.clients.secure import require_summed, summands
from fedmed_flower.errors import InputError
from fedmed_flower.genomics.association import (
    CASES,
    CONTROLS,
    TERMS,
    allelic_terms,
    count_copies,
    own_odds,
    spread_terms,
    trend_terms,
    withheld,
)
from fedmed_flower.genomics.client import (
    MOST_NUMBERS,
    Cohort,
    GenomicsClient,
    about_study,
    case_mask,
    genotype_blocks,
)
from fedmed_flower.genomics.lookup import Named, locate, stretches, usable
from fedmed_flower.genomics.regression import (
    linear_sums,
    logistic_terms,
    own_intercepts,
    own_slopes,
    own_step,
    profile_parts,
    profile_terms,
)
from fedmed_flower.genomics.types import Counts, Floats
from fedmed_flower.genomics.variants import SWAPPED
from fedmed_flower.secure.magnitudes import LARGEST, in_sizes
from fedmed_flower.wire import BLOCK, COHORT, MODELS, NAMED, TEST

# Returns the terms of some variants, a row each, and which of them this hospital tells.
_TermsOf = Callable[[NDArray[np.int8], Counts, NDArray[np.intp]], tuple[Floats, NDArray[np.bool_]]]
_STRATIFIED = {"allelic": allelic_terms, "trend": trend_terms}


def design(client: GenomicsClient, message: Message) -> RecordDict:
    """Report in which study this hospital takes part, without the numbers of its people."""
    refuse_other_version(client, message)
    cohort = client.cohort()
    return RecordDict(
        {
            COHORT: ConfigRecord(about_study(client, cohort)),
            **digests_of(client.site, client.data(), client.context.run_id),
        }
    )


def people(client: GenomicsClient, message: Message) -> RecordDict:
    """Add how many people and cases there are, and how much covariates and trait vary."""
    require_summed(message, "people")
    client.read(message)
    cohort = client.cohort()
    cases = case_mask(client, cohort)
    columns = [cohort.covariates]
    if client.trait == "continuous":
        columns.append((cohort.trait - cohort.trait.mean())[:, None])
    squares = (np.column_stack(columns) ** 2).sum(0)
    return summands(
        people=np.array([len(cases)]), cases=np.array([cases.sum()]), squares=in_sizes(squares)
    )


def totals(client: GenomicsClient, message: Message) -> RecordDict:
    """Add counts of the named variants, and the terms of a test that is stratified by hospital."""
    question = _Question.of(client, message, 5 + TERMS)
    terms_of = _STRATIFIED.get(question.test)

    def terms(
        genotypes: NDArray[np.int8], counts: Counts, variants: NDArray[np.intp]
    ) -> tuple[Floats, NDArray[np.bool_]]:
        told = np.ones(len(counts), bool)
        if terms_of is None:
            return np.zeros((len(counts), TERMS)), told
        return terms_of(counts[None])[0], told

    return summands(**question.sums(terms, TERMS))


def products(client: GenomicsClient, message: Message) -> RecordDict:
    """Add the sums from which linear models are computed, of covariates and trait in units."""
    question = _Question.of(client, message, _linear_width(client))

    def terms(
        genotypes: NDArray[np.int8], counts: Counts, variants: NDArray[np.intp]
    ) -> tuple[Floats, NDArray[np.bool_]]:
        sums = linear_sums(genotypes, question.trait, question.covariates)
        return sums, np.ones(len(counts), bool)

    return summands(**question.sums(terms, _linear_width(client)))


def steps(client: GenomicsClient, message: Message) -> RecordDict:
    """Add the terms of one Newton step of logistic models, at the intercepts that fit best here.

    A variant is not told if one person has more than one part in the minimum of the weight, as
    `logistic_terms` measures it.
    """
    question = _Question.of(client, message, _profile_width(client))
    slopes = question.array("slopes", len(question.usable), len(client.covariates) + 1)
    return summands(
        **question.sums(lambda *given: question.profile(slopes, *given), _profile_width(client))
    )


def spreads(client: GenomicsClient, message: Message) -> RecordDict:
    """Add to how far hospitals' own effects differ: told only where this hospital has one."""
    width = max(5, _linear_width(client), _profile_width(client))
    question = _Question.of(client, message, width)
    centre = question.array("centre", len(question.usable))

    def own(
        genotypes: NDArray[np.int8], counts: Counts, variants: NDArray[np.intp]
    ) -> tuple[Floats, Floats]:
        if question.test in _STRATIFIED:
            effects, errors = own_odds(counts[None])
            return effects[0], errors[0]
        columns = len(client.covariates) + (2 if question.test == "linear" else 1)
        scale = question.array("scale", len(question.usable), columns)[variants]
        if question.test == "linear":
            sums = linear_sums(genotypes, question.trait, question.covariates)
            effects, errors = own_slopes(sums[None], counts[None, :, CONTROLS], scale)
            return effects[0], errors[0]
        slopes = question.array("slopes", len(question.usable), columns)
        terms, told = question.profile(slopes, genotypes, counts, variants)
        wanted, information = profile_parts(terms, len(client.covariates))
        change, errors = own_step(wanted[None], information[None], scale)
        return slopes[variants, -1] + change[0], np.where(told, errors[0], np.nan)

    def terms(
        genotypes: NDArray[np.int8], counts: Counts, variants: NDArray[np.intp]
    ) -> tuple[Floats, NDArray[np.bool_]]:
        effects, errors = own(genotypes, counts, variants)
        with np.errstate(all="ignore"):
            known, values = spread_terms(effects, errors, centre[variants])
        # A hospital whose own model fits without any rest has no weight that a sum may hold.
        return values, (known == 1) & (np.abs(values) <= LARGEST).all(1)

    return summands(**question.sums(terms, 3))


@dataclass(frozen=True)
class _Question:
    """What a message asks of which variants, and where they stand at this hospital.

    Attributes
    ----------
    client : GenomicsClient
    cohort : Cohort
    test : str
    models : ArrayRecord
        What the server says of the models: units, slopes and so on.
    lines : (m,) int64 array
    usable, swapped : (m,) bool array
    """

    client: GenomicsClient
    cohort: Cohort
    test: str
    models: ArrayRecord
    lines: NDArray[np.int64]
    usable: NDArray[np.bool_]
    swapped: NDArray[np.bool_]

    @classmethod
    def of(cls, client: GenomicsClient, message: Message, width: int) -> _Question:
        """Read a message; `width` is how many numbers the answer has for each variant.

        Raises
        ------
        DeclinedError
            If it does not ask for a secure sum.
        InputError
            If it does not name variants.
        """
        require_summed(message, "variants")
        config = client.read(message)
        cohort = client.cohort()
        records = message.content.array_records
        texts = message.content.config_records.get(NAMED, ConfigRecord())
        named = Named.read(records.get(BLOCK, ArrayRecord()), texts, MOST_NUMBERS // width)
        cache = client.cache.more
        key = client.key("stretches")
        if key not in cache:
            cache[key] = stretches(cohort.fileset)
        lines, codes = locate(cohort.fileset, cache[key], named)
        return cls(
            client,
            cohort,
            str(config.get(TEST, "")),
            records.get(MODELS, ArrayRecord()),
            lines,
            usable(codes),
            codes == SWAPPED,
        )

    def array(self, name: str, *shape: int) -> Floats:
        """Return an array of the models by name.

        Raises
        ------
        InputError
            If it is missing, or not finite float64 of this shape.
        """
        if name not in self.models:
            raise InputError(f"the message has no array {name}")
        values: Floats = view(self.models[name])
        if values.dtype != np.float64 or values.shape != shape or not np.isfinite(values).all():
            raise InputError(f"{name} must be finite float64 of shape {shape}")
        return values

    @property
    def units(self) -> Floats:
        """The units of covariates and, of a continuous trait, of the trait."""
        count = len(self.client.covariates) + (self.client.trait == "continuous")
        units = self.array("units", count)
        if (units <= 0).any():
            raise InputError("units must be above 0")
        return units

    @property
    def covariates(self) -> Floats:
        """The people's covariates in units."""
        return self.cohort.covariates / self.units[: self.cohort.covariates.shape[1]]

    @property
    def trait(self) -> Floats:
        """The people's trait, in its unit if it is continuous."""
        centred = self.cohort.trait - self.cohort.trait.mean()
        return np.asarray(centred / self.units[-1], np.float64)

    def profile(
        self,
        slopes: Floats,
        genotypes: NDArray[np.int8],
        counts: Counts,
        variants: NDArray[np.intp],
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """Return `profile_terms` of some variants, and of which no person has too much weight."""
        cases = case_mask(self.client, self.cohort)
        covariates = self.covariates
        chosen = slopes[variants]
        intercepts = own_intercepts(genotypes, cases, covariates, chosen)
        with np.errstate(all="ignore"):
            terms, shares = logistic_terms(genotypes, cases, covariates, chosen, intercepts)
            values = profile_terms(terms, covariates.shape[1])
        # Ten equal people have a tenth each, but for rounding.
        told = (shares * self.cohort.minimum <= 1 + 1e-9) & np.isfinite(values).all(1)
        return values, told

    def sums(self, terms_of: _TermsOf, width: int) -> dict[str, NDArray[Any]]:
        """Return the parts of the sums: zeros wherever this hospital tells nothing.

        Parameters
        ----------
        terms_of : callable
            Maps genotypes, counts and indices of some variants, which may all be disclosed.
        width : int
            How many terms it returns for each.
        """
        variants = len(self.usable)
        told = np.zeros(variants, np.int64)
        held = np.zeros(variants, np.int64)
        counts = np.zeros((variants, 5), np.int64)
        terms = np.zeros((variants, width))
        cases = case_mask(self.client, self.cohort)
        places = np.flatnonzero(self.usable)
        blocks = genotype_blocks(self.cohort, self.lines[places], self.swapped[places])
        for part, genotypes in blocks:
            found = count_copies(genotypes, cases, squares=True)
            hidden = withheld(found, self.cohort.minimum)
            held[places[part]] = hidden
            compared = found[:, CONTROLS] > 0
            if self.client.trait == "binary":
                compared &= found[:, CASES] > 0
            chosen = np.flatnonzero(compared & ~hidden)
            if not len(chosen):
                continue
            at = places[part][chosen]
            values, kept = terms_of(genotypes[:, chosen], found[chosen], at)
            told[at] = kept
            counts[at] = np.where(kept[:, None], found[chosen], 0)
            terms[at] = np.where(kept[:, None], values, 0.0)
        return {"told": told, "held": held, "counts": counts, "terms": terms}


def _linear_width(client: GenomicsClient) -> int:
    width = len(client.covariates) + 2
    return width * (width + 1) // 2


def _profile_width(client: GenomicsClient) -> int:
    width = len(client.covariates) + 1
    return width + width * (width + 1) // 2
