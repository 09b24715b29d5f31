"""The exchanges of an association study: what the hospitals are asked for some variants."""

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
from fedmed_flower.genomics.panel import Panel
from fedmed_flower.genomics.regression import (
    MOST_STEPS,
    LogisticFit,
    linear_test,
    principal_components,
)
from fedmed_flower.genomics.types import Counts, Floats
from fedmed_flower.genomics.variants import SWAPPED, Block, Merger
from fedmed_flower.wire import BLOCK, COUNT, OFFSET, SQUARES, VARIANTS

log = logging.getLogger("flwr.fedmed")

# Numbers that a hospital sends of the models of one part.
_MOST_NUMBERS = 1 << 20
_COMMON = 0.05
_Regressed = tuple[Results, NDArray[np.bool_], NDArray[np.bool_]]


def blocks(panel: Panel, size: int, squares: bool) -> Iterator[tuple[int, Block, Counts]]:
    """Yield number, variants and counts of one block after the other, in order of their place.

    Parameters
    ----------
    panel : Panel
    size : int
        Variants that a hospital sends at a time.
    squares : bool
        Whether sums of squares are counted.

    Yields
    ------
    number : int
        From 1.
    block : Block
    counts : (hospitals, variants, 5) int64 array
        -1 if withheld, 0 if nothing is counted.
    """
    number, offsets = 0, [0] * len(panel.nodes)
    merger = Merger(len(panel.nodes), size)
    for site, about in enumerate(panel.about):
        if not about["variants"]:
            merger.end(site)

    def read(site: int, content: RecordDict) -> None:
        part, reported = read_listing(content, merger.size), panel.about[site]["variants"]
        if (come := merger.read[site] + len(part.names)) > reported:
            raise ValueError(f"more variants than the {reported} that it told")
        merger.add(site, part, come == reported)
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
        if (block := merger.take()) is None:
            return
        if block.variants:
            number += 1
            yield number, block, _count(panel, block, number, squares)


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
    covariates: int,
) -> _Regressed:
    """Fit one regression a variant.

    Parameters
    ----------
    panel : Panel
    block : Block
    counts : (hospitals, variants, 5) int64 array
    taking : (hospitals, variants) bool array
        Which hospital may take part in which variant.
    number : int
        Of the block.
    test : {"logistic", "linear"}
    covariates : int
        How many, components and all.

    Returns
    -------
    results : Results
    taking : (hospitals, variants) bool array
        Which hospital took part in which variant.
    weighty : (hospitals, variants) bool array
        Which hospital has withheld which variant, because one person has too much weight.
    """
    width = covariates + 2
    size = max(1, _MOST_NUMBERS // (width + width * (width + 1) // 2))
    fit = _linear if test == "linear" else _logistic
    results, took, withheld = [], [], []
    for start in range(0, len(block.variants), size):
        part = slice(start, start + size)
        piece = Block(block.variants[part], block.lines[:, part], block.codes[:, part])
        own = taking[:, part] & (counts[:, part, :2].sum(2) > 0)
        result, own, few = fit(panel, piece, counts[:, part], own, number, covariates)
        results.append(result)
        took.append(own)
        withheld.append(few)
    whole = Results(*(np.concatenate(column) for column in zip(*results, strict=True)))
    return whole, np.concatenate(took, 1), np.concatenate(withheld, 1)


def _linear(
    panel: Panel,
    block: Block,
    counts: Counts,
    taking: NDArray[np.bool_],
    number: int,
    covariates: int,
) -> _Regressed:
    total = np.zeros((len(block.variants), (covariates + 2) * (covariates + 3) // 2))
    taking[list(panel.left_out)] = False
    asked = {
        site: RecordDict({BLOCK: _lines(block, site, taking[site])})
        for site in panel.taking
        if taking[site].any()
    }

    def read(site: int, content: RecordDict) -> Floats:
        return read_sums(content, (int(taking[site].sum()), total.shape[1]))

    for site, values in panel.ask("linear", asked, read, number).items():
        total[taking[site]] += values
    taking[list(panel.left_out)] = False
    people = (counts[:, :, CONTROLS] * taking).sum(0)
    return linear_test(total, people, taking.sum(0)), taking, np.zeros_like(taking)


def _logistic(
    panel: Panel,
    block: Block,
    counts: Counts,
    taking: NDArray[np.bool_],
    number: int,
    covariates: int,
) -> _Regressed:
    taking[list(panel.left_out)] = False
    own = np.where(taking[:, :, None], counts, 0)
    fit = LogisticFit(own[:, :, CASES], own[:, :, CONTROLS], covariates)
    weighty = np.zeros_like(taking)
    width = covariates + 2
    numbers = width + width * (width + 1) // 2
    for _ in range(MOST_STEPS):
        if not len(waiting := fit.waiting):
            break
        here = fit.taking[:, waiting]
        asked = {}
        for site in np.flatnonzero(here.any(1)).tolist():
            chosen = waiting[here[site]]
            record = _lines(block, site, chosen)
            record["slopes"] = Array(fit.slopes[chosen])
            record["intercepts"] = Array(fit.intercepts[site, chosen])
            asked[site] = RecordDict({BLOCK: record})

        def read(
            site: int, content: RecordDict, here: NDArray[np.bool_] = here
        ) -> tuple[Floats, NDArray[np.bool_]]:
            return read_terms(content, (int(here[site].sum()), numbers))

        found = panel.ask("logistic", asked, read, number)
        if gone := asked.keys() - found.keys():
            for site in gone:
                fit.leave_out(site, waiting)
            continue
        terms, few = np.zeros((*here.shape, numbers)), np.zeros_like(here)
        for site, (values, withheld) in found.items():
            terms[site, here[site]], few[site, here[site]] = values, withheld
        weighty[:, waiting] |= few
        whole = ~few.any(0)
        fit.step(terms[:, whole], waiting[whole])
        for site in found:
            fit.leave_out(site, waiting[few[site]])
    return fit.finish(), fit.taking, weighty


def find_components(panel: Panel, size: int, count: int, most: int, seed: int) -> list[float]:
    """Find principal components; each hospital keeps its people's scores to itself.

    Parameters
    ----------
    panel : Panel
    size : int
        Variants that a hospital sends at a time.
    count : int
        Components.
    most : int
        Variants that they are made of.
    seed : int

    Returns
    -------
    list of float
        Their eigenvalues.

    Raises
    ------
    InputError
        If too few variants or people are there.
    """
    while True:
        try:
            return _components(panel, size, count, most, seed)
        except _FewerHospitalsError:
            log.warning("components are looked for again, among the hospitals that are left")


class _FewerHospitalsError(Exception):
    """A hospital was left out, and what it told is in the sums so far."""


def _components(panel: Panel, size: int, count: int, most: int, seed: int) -> list[float]:
    left_out = len(panel.left_out)
    step, seen, lines, swapped, frequencies = 1, 0, list[Any](), list[Any](), list[float]()
    for _, block, counts in blocks(panel, size, squares=False):
        reported = (block.usable() & (counts[:, :, CASES] != WITHHELD))[panel.taking].all(0)
        pooled = counts[panel.taking].sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            copies = pooled[:, CASE_COPIES] + pooled[:, CONTROL_COPIES]
            frequency = copies / (2 * (pooled[:, CASES] + pooled[:, CONTROLS]))
        common = np.flatnonzero(reported & (np.minimum(frequency, 1 - frequency) >= _COMMON))
        kept = common[(np.arange(len(common)) + seen) % step == 0]
        seen += len(common)
        lines += list(block.lines[:, kept].T)
        swapped += list(block.codes[:, kept].T == SWAPPED)
        frequencies += frequency[kept].tolist()
        while len(lines) > 2 * most:
            # Every second one goes, so that what is left stays evenly spread.
            lines, swapped, frequencies = lines[::2], swapped[::2], frequencies[::2]
            step *= 2
    if len(panel.left_out) > left_out:
        raise _FewerHospitalsError
    chosen = np.linspace(0, len(lines) - 1, min(most, len(lines))).round().astype(int)
    people = sum(panel.about[site]["people"] for site in panel.taking)
    if len(chosen) < count or people <= count:
        raise InputError(
            f"{count} components cannot be made of {len(chosen)} common variants that every "
            f"hospital tells, and of {people} people: choose fewer components"
        )
    indices, flips = np.array(lines, np.int64)[chosen], np.array(swapped, bool)[chosen]
    frequency = np.array(frequencies)[chosen]

    # The most that a person's standardised genotypes, squared, can add up to.
    odds = frequency / (1 - frequency)
    longest = float(2 * np.maximum(odds, 1 / odds).sum())

    def asked(loadings: Floats) -> dict[int, RecordDict]:
        return {
            site: RecordDict(
                {
                    BLOCK: ArrayRecord(
                        {
                            "lines": Array(np.ascontiguousarray(indices[:, site])),
                            "swapped": Array(np.ascontiguousarray(flips[:, site])),
                            "frequencies": Array(frequency),
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
                raise ValueError("larger sums than people can have")
            return sums

        found = panel.ask("loadings", asked(loadings), read)
        if len(panel.left_out) > left_out:
            raise _FewerHospitalsError
        return np.asarray(sum(found.values()), np.float64)

    loadings, values, rounds = principal_components(multiply, len(chosen), people, count, seed)
    panel.ask("scores", asked(loadings), lambda site, content: None)
    if len(panel.left_out) > left_out:
        raise _FewerHospitalsError
    log.info("%d components of %d variants in %d rounds", len(values), len(chosen), rounds)
    return [float(value) for value in values]


def _lines(block: Block, site: int, where: NDArray[Any]) -> ArrayRecord:
    """Return which lines of its bim file a hospital is asked for."""
    return ArrayRecord(
        {
            "lines": Array(block.lines[site, where]),
            "swapped": Array(block.codes[site, where] == SWAPPED),
        }
    )
