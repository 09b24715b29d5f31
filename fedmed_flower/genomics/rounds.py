"""The exchanges of an association study: what hospitals are asked, block by block."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.genomics.answers import read_counts, read_listing, read_sums, read_terms
from fedmed_flower.genomics.association import (
    CASE_COPIES,
    CASES,
    CONTROL_COPIES,
    CONTROLS,
    WITHHELD,
    Results,
)
from fedmed_flower.genomics.covariates import CovariateCheck
from fedmed_flower.genomics.panel import Panel
from fedmed_flower.genomics.regression import (
    MOST_STEPS,
    LogisticFit,
    linear_covariance,
    linear_test,
    logistic_covariance,
    principal_components,
)
from fedmed_flower.genomics.types import Counts, Floats
from fedmed_flower.genomics.variants import SWAPPED, Block, Merger
from fedmed_flower.wire import BLOCK, COUNT, OFFSET, SQUARES, VARIANTS

log = logging.getLogger("flwr.fedmed")

# Numbers that a hospital sends in one answer for the models of some variants.
_MOST_NUMBERS = 1 << 20
# Components are made of variants with at least this frequency of the rarer allele.
_COMMON = 0.05
_Regressed = tuple[Results, NDArray[np.bool_], NDArray[np.bool_]]


def blocks(panel: Panel, size: int, squares: bool) -> Iterator[tuple[int, Block, Counts]]:
    """Yield the blocks of `listed_blocks` with their counts.

    Parameters
    ----------
    panel : Panel
    size : int
        Variants that a hospital sends at a time.
    squares : bool
        Whether hospitals count sums of squares.

    Yields
    ------
    number : int
        From 1.
    block : Block
    counts : (hospitals, variants, 5) int64 array
        -1 if the hospital withholds the variant, 0 if it cannot count it.
    """
    for number, block in listed_blocks(panel, size):
        yield number, block, _count(panel, block, number, squares)


def listed_blocks(panel: Panel, size: int) -> Iterator[tuple[int, Block]]:
    """Yield the variants of all hospitals in blocks, in the order of chromosome and position.

    Parameters
    ----------
    panel : Panel
    size : int
        Variants that a hospital sends at a time.

    Yields
    ------
    number : int
        From 1.
    block : Block
    """
    number = 0
    offsets = [0] * len(panel.nodes)
    merger = Merger(len(panel.nodes), size)
    for site, about in enumerate(panel.about):
        if not about["variants"]:
            merger.end(site)

    def read(site: int, content: RecordDict) -> None:
        part = read_listing(content, merger.size)
        expected = panel.about[site]["variants"]
        count = merger.read[site] + len(part.names)
        if count > expected:
            raise ValueError(f"variants must be {expected}, as it reported, got {count} or more")
        merger.add(site, part, count == expected)
        offsets[site] = part.offset

    while True:
        for site in panel.left_out:
            merger.end(site)
        if hungry := merger.hungry():
            wanted = {site: {OFFSET: offsets[site], COUNT: merger.size} for site in hungry}
            asked = {
                site: RecordDict({"config": ConfigRecord(config)})  # type: ignore[arg-type]
                for site, config in wanted.items()
            }
            panel.ask(VARIANTS, asked, read, number)
            continue
        block = merger.take()
        if block is None:
            return
        if block.variants:
            number += 1
            yield number, block


def _count(panel: Panel, block: Block, number: int, squares: bool) -> Counts:
    usable = block.usable()
    counts = np.zeros((*usable.shape, 5), np.int64)
    asked = {
        site: RecordDict(
            {
                BLOCK: _lines(block, site, usable[site]),
                "config": ConfigRecord({SQUARES: squares}),
            }
        )
        for site in panel.taking
        if usable[site].any()
    }

    def read(site: int, content: RecordDict) -> Counts:
        return read_counts(content, int(usable[site].sum()), panel.about[site])

    for site, values in panel.ask("counts", asked, read, number).items():
        counts[site, usable[site]] = values
    return counts


def regress(
    panel: Panel,
    block: Block,
    counts: Counts,
    taking: NDArray[np.bool_],
    number: int,
    test: str,
    covariates: CovariateCheck,
) -> _Regressed:
    """Fit one regression a variant, in parts whose sums are of bounded size.

    Parameters
    ----------
    panel : Panel
    block : Block
    counts : (hospitals, variants, 5) int64 array
    taking : (hospitals, variants) bool array
        Which hospital may take part in which variant.
    number : int
        Number of the block.
    test : {"logistic", "linear"}
    covariates : CovariateCheck
        Of the covariates, components included.

    Returns
    -------
    results : Results
    taking : (hospitals, variants) bool array
        Which hospital took part in which variant.
    weighty : (hospitals, variants) bool array
        Which hospital withheld which variant because one person has too much weight.

    Raises
    ------
    InputError
        If the covariates cannot be told apart.
    """
    width = len(covariates.names) + 2
    size = max(1, _MOST_NUMBERS // (width + width * (width + 1) // 2))
    fit = _linear if test == "linear" else _logistic
    results = []
    took_part = []
    weighty = []
    for start in range(0, len(block.variants), size):
        part = slice(start, start + size)
        piece = Block(block.variants[part], block.lines[:, part], block.codes[:, part])
        active = taking[:, part] & (counts[:, part, :2].sum(2) > 0)
        result, active, withheld = fit(panel, piece, counts[:, part], active, number, covariates)
        results.append(result)
        took_part.append(active)
        weighty.append(withheld)
    whole = Results(*(np.concatenate(column) for column in zip(*results, strict=True)))
    return whole, np.concatenate(took_part, 1), np.concatenate(weighty, 1)


def _linear(
    panel: Panel,
    block: Block,
    counts: Counts,
    taking: NDArray[np.bool_],
    number: int,
    covariates: CovariateCheck,
) -> _Regressed:
    width = len(covariates.names) + 2
    sums = np.zeros((*taking.shape, width * (width + 1) // 2))
    taking[list(panel.left_out)] = False
    asked = {
        site: RecordDict({BLOCK: _lines(block, site, taking[site])})
        for site in panel.taking
        if taking[site].any()
    }

    def read(site: int, content: RecordDict) -> Floats:
        return read_sums(content, (int(taking[site].sum()), sums.shape[2]))

    for site, values in panel.ask("linear", asked, read, number).items():
        sums[site, taking[site]] = values
    taking[list(panel.left_out)] = False
    people = counts[:, :, CONTROLS] * taking
    covariates.add(linear_covariance(sums), people, panel.taking)
    return linear_test(sums, people), taking, np.zeros_like(taking)


def _logistic(
    panel: Panel,
    block: Block,
    counts: Counts,
    taking: NDArray[np.bool_],
    number: int,
    covariates: CovariateCheck,
) -> _Regressed:
    taking[list(panel.left_out)] = False
    people = np.where(taking[:, :, None], counts, 0)
    count = len(covariates.names)
    fit = LogisticFit(people[:, :, CASES], people[:, :, CONTROLS], count)
    weighty = np.zeros_like(taking)
    width = count + 2
    numbers = width + width * (width + 1) // 2
    for _ in range(MOST_STEPS):
        waiting = fit.waiting
        if not len(waiting):
            break
        active = fit.taking[:, waiting]
        asked = {}
        for site in np.flatnonzero(active.any(1)).tolist():
            chosen = waiting[active[site]]
            record = _lines(block, site, chosen)
            record["slopes"] = Array(fit.slopes[chosen])
            record["intercepts"] = Array(fit.intercepts[site, chosen])
            asked[site] = RecordDict({BLOCK: record})

        def read(
            site: int, content: RecordDict, active: NDArray[np.bool_] = active
        ) -> tuple[Floats, NDArray[np.bool_]]:
            return read_terms(content, (int(active[site].sum()), numbers))

        answers = panel.ask("logistic", asked, read, number)
        if failed := asked.keys() - answers.keys():
            for site in failed:
                fit.leave_out(site, waiting)
            continue
        terms = np.zeros((*active.shape, numbers))
        withheld = np.zeros_like(active)
        for site, (site_terms, site_withheld) in answers.items():
            terms[site, active[site]] = site_terms
            withheld[site, active[site]] = site_withheld
        if not covariates.done:
            sent = np.where(active & ~withheld, people[:, waiting, :2].sum(2), 0)
            covariates.add(logistic_covariance(terms, count), sent, panel.taking)
        weighty[:, waiting] |= withheld
        complete = ~withheld.any(0)
        fit.step(terms[:, complete], waiting[complete])
        for site in answers:
            fit.leave_out(site, waiting[withheld[site]])
    return fit.finish(), fit.taking, weighty


def find_components(panel: Panel, size: int, count: int, most: int, seed: int) -> list[float]:
    """Find principal components; the people's scores stay at their hospitals.

    Parameters
    ----------
    panel : Panel
    size : int
        Variants that a hospital sends at a time.
    count : int
        How many components to find.
    most : int
        How many variants, at most, the components are made of.
    seed : int
        Seed of the random start.

    Returns
    -------
    list of float
        The eigenvalues of the components.

    Raises
    ------
    InputError
        If there are too few common variants or people.
    """
    while True:
        try:
            return _components(panel, size, count, most, seed)
        except _FewerHospitalsError:
            log.warning("components are searched for again, among the hospitals that are left")


class _FewerHospitalsError(Exception):
    """A hospital was left out whose answers are in the sums so far."""


def _components(panel: Panel, size: int, count: int, most: int, seed: int) -> list[float]:
    left_out = len(panel.left_out)
    lines, swapped, frequencies = _common_variants(panel, size, most)
    if len(panel.left_out) > left_out:
        raise _FewerHospitalsError
    people = sum(panel.about[site]["people"] for site in panel.taking)
    if len(lines) < count or people <= count:
        raise InputError(
            f"{count} components cannot be made of {len(lines)} common variants that every "
            f"hospital reports, and of {people} people: choose fewer components"
        )

    # The most that a person's standardised genotypes, squared, can add up to.
    odds = frequencies / (1 - frequencies)
    longest = float(2 * np.maximum(odds, 1 / odds).sum())

    def asked(loadings: Floats) -> dict[int, RecordDict]:
        return {
            site: RecordDict(
                {
                    BLOCK: ArrayRecord(
                        {
                            "lines": Array(np.ascontiguousarray(lines[:, site])),
                            "swapped": Array(np.ascontiguousarray(swapped[:, site])),
                            "frequencies": Array(frequencies),
                            "loadings": Array(np.ascontiguousarray(loadings)),
                        }
                    )
                }
            )
            for site in panel.taking
        }

    def multiply(loadings: Floats) -> Floats:
        def read(site: int, content: RecordDict) -> Floats:
            sums = read_sums(content, loadings.shape)
            # Loadings have length 1.
            if np.abs(sums).max() > panel.about[site]["people"] * longest:
                raise ValueError("sums are larger than people can have")
            return sums

        answers = panel.ask("loadings", asked(loadings), read)
        if len(panel.left_out) > left_out:
            raise _FewerHospitalsError
        return np.asarray(sum(answers.values()), np.float64)

    loadings, values, rounds = principal_components(multiply, len(lines), people, count, seed)
    panel.ask("scores", asked(loadings), lambda site, content: None)
    if len(panel.left_out) > left_out:
        raise _FewerHospitalsError
    log.info("%d components of %d variants in %d rounds", len(values), len(lines), rounds)
    return [float(value) for value in values]


def _common_variants(
    panel: Panel, size: int, most: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_], Floats]:
    """Return up to `most` common variants that every hospital reports, evenly spread.

    Returns
    -------
    lines : (variants, hospitals) int64 array
    swapped : (variants, hospitals) bool array
    frequencies : (variants,) float array
    """
    step = 1
    seen = 0
    lines: list[NDArray[np.int64]] = []
    swapped: list[NDArray[np.bool_]] = []
    frequencies: list[float] = []
    for _, block, counts in blocks(panel, size, squares=False):
        reported = (block.usable() & (counts[:, :, CASES] != WITHHELD))[panel.taking].all(0)
        pooled = counts[panel.taking].sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            copies = pooled[:, CASE_COPIES] + pooled[:, CONTROL_COPIES]
            frequency = copies / (2 * (pooled[:, CASES] + pooled[:, CONTROLS]))
        common = np.flatnonzero(reported & (np.minimum(frequency, 1 - frequency) >= _COMMON))
        sampled = common[(np.arange(len(common)) + seen) % step == 0]
        seen += len(common)
        lines += list(block.lines[:, sampled].T)
        swapped += list(block.codes[:, sampled].T == SWAPPED)
        frequencies += frequency[sampled].tolist()
        while len(lines) > 2 * most:
            # Every second one is dropped, so that the others stay evenly spread.
            lines = lines[::2]
            swapped = swapped[::2]
            frequencies = frequencies[::2]
            step *= 2
    chosen = np.linspace(0, len(lines) - 1, min(most, len(lines))).round().astype(int)
    return (
        np.array(lines, np.int64)[chosen],
        np.array(swapped, bool)[chosen],
        np.array(frequencies)[chosen],
    )


def _lines(block: Block, site: int, chosen: NDArray[Any]) -> ArrayRecord:
    """Return which lines of its bim file a hospital is asked for, and whether A1 is swapped there.

    Parameters
    ----------
    chosen : bool or int array
        Which variants of the block.
    """
    return ArrayRecord(
        {
            "lines": Array(block.lines[site, chosen]),
            "swapped": Array(block.codes[site, chosen] == SWAPPED),
        }
    )
