"""An association study of which the server learns sums over hospitals alone."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedmed_flower.genomics.association import (
    CASES,
    CONTROLS,
    TERMS,
    Results,
    Spread,
    result_of_terms,
    spread_of_terms,
)
from fedmed_flower.genomics.covariates import CovariateCheck
from fedmed_flower.genomics.lookup import Named
from fedmed_flower.genomics.panel import Panel
from fedmed_flower.genomics.regression import (
    MOST_STEPS,
    LogisticFit,
    linear_covariance,
    linear_result,
    linear_scale,
    logistic_covariance,
    profile_parts,
    with_intercept,
)
from fedmed_flower.genomics.types import Counts, Floats
from fedmed_flower.genomics.variants import Block
from fedmed_flower.runs.verdict import RunFailedError
from fedmed_flower.secure.encoding import SecureError
from fedmed_flower.secure.magnitudes import LARGEST, part_of, total, units
from fedmed_flower.secure.ring import COUNT, REAL, Part
from fedmed_flower.server.inbox import Inbox
from fedmed_flower.server.secure import SecureSums
from fedmed_flower.wire import MODELS, SECURE, TEST

log = logging.getLogger("flwr.fedmed")

# Numbers that a hospital sends in one answer for the models of some variants.
_MOST_NUMBERS = 1 << 20
_UNTOLD = "fewer hospitals tell it than a sum needs"
_WITHHELD = "withheld"
_IDLE = "no genotype, or cases or controls only"
_WEIGHTY = "one person weighs too much"


@dataclass(frozen=True)
class Tested:
    """What came of the test of some variants.

    Attributes
    ----------
    results : Results
    counts : (variants, 5) int64 array
    told : (variants,) int64 array
        Over how many hospitals each result is; 0 if there is none.
    frequency : (variants, 2) float array
        The least and the largest that A1 can have.
    excluded : dict of str to (variants,) int64 array
        By reason, how many hospitals take no part; nobody knows which.
    """

    results: Results
    counts: Counts
    told: NDArray[np.int64]
    frequency: Floats
    excluded: Mapping[str, NDArray[np.int64]]


class StudySums:
    """The sums of an association study.

    Parameters
    ----------
    panel : Panel
    test : str
    folder : Path
        The run folder.
    simulated : bool
        Whether the hospitals' books lie in it too.

    Attributes
    ----------
    people, cases : int
        Of all hospitals together.
    """

    def __init__(self, panel: Panel, test: str, folder: Path, simulated: bool) -> None:
        self._panel = panel
        self._test = test
        books = folder / SECURE if simulated else None
        inbox = Inbox()
        run = secrets.token_hex(8)
        self._sums = SecureSums(panel.grid, inbox, run, panel.timeout, books, folder)
        self._covariates = CovariateCheck(())
        self._units: Floats = np.ones(0)
        self._number = 0
        self.people = 0
        self.cases = 0

    def begin(self) -> None:
        """Greet the hospitals and count their people.

        Raises
        ------
        RunFailedError
            If too few say hello, or one of those that did does not answer.
        """
        panel = self._panel
        self._sums.greet([panel.nodes[site] for site in panel.taking], 0)
        failures = self._sums.inbox.history.failures
        for site in panel.taking:
            if panel.names[site] not in self._sums.greeted:
                reasons = [one.reason for one in failures if one.site == panel.names[site]]
                panel.leave_out(site, "hello", reasons[-1] if reasons else "it says no hello")
        names = panel.about[0]["covariates"]
        self._covariates = CovariateCheck(names)
        columns = len(names) + (self._test == "linear")
        parts = [Part("people", 1, COUNT), Part("cases", 1, COUNT), part_of("squares", columns)]
        found = self._asked("people", RecordDict({"config": ConfigRecord()}), parts)
        self.people = int(found["people"][0])
        self.cases = int(found["cases"][0])
        self._units = units(total(found["squares"]))

    @property
    def fewest(self) -> int:
        """The fewest hospitals over which a figure may be.

        Those that may work with the server, or tell their own figures, do not hide the others.
        """
        hellos = self._sums.hellos.values()
        least = max(hello.least for hello in hellos)
        colluders = max(hello.colluders for hello in hellos)
        return least + colluders + sum(hello.tells for hello in hellos)

    def test(self, block: Block, number: int) -> Tested:
        """Test the variants of a block.

        Raises
        ------
        RunFailedError
            If a hospital does not answer: a sum is over all hospitals or not known.
        InputError
            If covariates cannot be told apart.
        """
        self._number = number
        named = Named.of(block.variants)
        told, held = self._told("totals", named, {}, held=True)
        asked = np.flatnonzero(told >= self.fewest)
        counts = np.zeros((len(told), 5), np.int64)
        terms = np.zeros((len(told), TERMS))
        for piece in _pieces(asked, 5 + TERMS):
            parts = [Part("counts", 5 * len(piece), COUNT), _real("terms", piece, TERMS)]
            found = self._summed("totals", named.chosen(piece), parts, told[piece])
            counts[piece] = found["counts"].reshape(-1, 5)
            terms[piece] = found["terms"].reshape(-1, TERMS)
        usable = block.usable().sum(0)
        excluded = {_WITHHELD: held, _IDLE: np.maximum(usable - held - told, 0)}
        reported = np.where(told >= self.fewest, told, 0)
        excluded[_UNTOLD] = np.where(reported > 0, 0, told)
        if self._test == "linear":
            results = self._linear(named, asked, counts, told)
        elif self._test == "logistic":
            results, weighty = self._logistic(named, asked, counts, told)
            excluded[_WEIGHTY] = weighty
            reported = np.where(weighty > 0, 0, reported)
        else:
            results = result_of_terms(terms, _unknown(len(told)))
            centre = np.log(results.effect)
            spread = self._spread(named, np.flatnonzero(np.isfinite(centre)), centre, {})
            results = results._replace(**spread)
        counts[reported == 0] = 0
        frequency = self._frequency(counts, held)
        return Tested(results, counts, reported, frequency, excluded)

    def _linear(
        self, named: Named, asked: NDArray[np.intp], counts: Counts, told: NDArray[np.int64]
    ) -> Results:
        width = len(self._covariates.names) + 2
        width = width * (width + 1) // 2
        sums = np.zeros((len(told), width))
        for piece in _pieces(asked, width):
            parts = [_real("terms", piece, width)]
            found = self._summed("products", named.chosen(piece), parts, told[piece])
            sums[piece] = found["terms"].reshape(-1, width)
        people = counts[:, CONTROLS]
        everywhere = np.where(told == len(self._panel.taking), people, 0)
        self._covariates.add(linear_covariance(sums)[None], everywhere[None], [0])
        scale = linear_scale(sums)
        results = linear_result(sums, people, told, _unknown(len(told)))
        known = np.flatnonzero(np.isfinite(results.effect))
        spread = self._spread(named, known, results.effect, {"scale": scale})
        unit = self._units[-1]
        in_units = ("effect", "se", "low", "high")
        scaled = {name: getattr(results, name) * unit for name in in_units}
        return results._replace(**scaled, **spread)

    def _logistic(
        self, named: Named, asked: NDArray[np.intp], counts: Counts, told: NDArray[np.int64]
    ) -> tuple[Results, NDArray[np.int64]]:
        count = len(self._covariates.names)
        width = count + 1
        width = width + width * (width + 1) // 2
        chosen = np.zeros(len(told), bool)
        chosen[asked] = True
        fit = LogisticFit(
            np.where(chosen, counts[:, CASES], 0)[None],
            np.where(chosen, counts[:, CONTROLS], 0)[None],
            count,
        )
        weighty = np.zeros_like(told)
        scale = np.zeros((len(told), count + 1))
        for _ in range(MOST_STEPS):
            waiting = fit.waiting
            if not len(waiting):
                break
            for piece in _pieces(waiting, width):
                models = {"slopes": fit.slopes[piece]}
                now, _ = self._told("steps", named.chosen(piece), models)
                weighty[piece] = told[piece] - now
                lost = piece[now < told[piece]]
                fit.leave_out(0, lost)
                kept = piece[now == told[piece]]
                if not len(kept):
                    continue
                found = self._summed(
                    "steps",
                    named.chosen(kept),
                    [_real("terms", kept, width)],
                    told[kept],
                    {"slopes": fit.slopes[kept]},
                )
                sums = found["terms"].reshape(-1, width)
                terms = with_intercept(sums, count)[None]
                if not self._covariates.done:
                    people = counts[kept, :2].sum(1)
                    everywhere = np.where(told[kept] == len(self._panel.taking), people, 0)
                    self._covariates.add(logistic_covariance(terms, count), everywhere[None], [0])
                scale[kept] = np.einsum("mii->mi", profile_parts(sums, count)[1])
                fit.step(terms, kept)
        results = fit.finish()
        known = np.flatnonzero(np.isfinite(results.effect))
        models = {"slopes": fit.slopes, "scale": scale}
        spread = self._spread(named, known, fit.slopes[:, -1], models)
        return results._replace(**spread), weighty

    def _spread(
        self,
        named: Named,
        variants: NDArray[np.intp],
        centre: Floats,
        models: Mapping[str, Floats],
    ) -> dict[str, Floats]:
        """Return how far the hospitals' own effects of some variants differ, as fields."""
        known = np.zeros(len(centre), np.int64)
        terms = np.zeros((len(centre), 3))
        given = {**models, "centre": centre}
        width = max([3, *(array.shape[1] for array in models.values())])
        for piece in _pieces(variants, width):
            arrays = {name: array[piece] for name, array in given.items()}
            known[piece], _ = self._told("spreads", named.chosen(piece), arrays)
        # A result has an effect of two hospitals or more.
        known[known < self.fewest] = 0
        for piece in _pieces(np.flatnonzero(known), width):
            arrays = {name: array[piece] for name, array in given.items()}
            parts = [_real("terms", piece, 3)]
            found = self._summed("spreads", named.chosen(piece), parts, known[piece], arrays)
            terms[piece] = found["terms"].reshape(-1, 3)
        spread = spread_of_terms(known, terms)
        return {"q": spread.q, "q_p": spread.p, "i2": spread.i2}

    def _told(
        self, query: str, named: Named, models: Mapping[str, Floats], held: bool = False
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return how many hospitals tell each variant, and how many withhold it if asked for."""
        count = len(named.names)
        parts = [Part("told", count, COUNT)]
        if held:
            parts.append(Part("held", count, COUNT))
        found = self._asked(query, self._content(named, models), parts)
        return found["told"], found.get("held", np.zeros(count, np.int64))

    def _summed(
        self,
        query: str,
        named: Named,
        parts: Sequence[Part],
        told: NDArray[np.int64],
        models: Mapping[str, Floats] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Return the sums of variants; they must be told by as many hospitals as before."""
        both = [Part("told", len(told), COUNT), *parts]
        found = self._asked(query, self._content(named, models or {}), both)
        if (found["told"] != told).any():
            raise RunFailedError(
                f"other hospitals answer {query} than have said so: patients may have come or "
                "gone. Begin the study again"
            )
        return found

    def _content(self, named: Named, models: Mapping[str, Floats]) -> RecordDict:
        arrays = {"units": self._units, **models}
        content = RecordDict({"config": ConfigRecord({TEST: self._test}), **named.content()})
        content[MODELS] = ArrayRecord(
            {name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()}
        )
        return content

    def _asked(
        self, query: str, content: RecordDict, parts: Sequence[Part]
    ) -> dict[str, NDArray[Any]]:
        panel = self._panel
        panel.asked += 1
        nodes = [panel.nodes[site] for site in panel.taking]
        known = len(self._sums.inbox.history.failures)
        try:
            return self._sums.question(nodes, query, content, parts, self._number).values
        except SecureError as error:
            panel.failures += self._sums.inbox.history.failures[known:]
            raise RunFailedError(str(error)) from error

    def _frequency(self, counts: Counts, held: NDArray[np.int64]) -> Floats:
        """Return the least and the largest frequency that A1 can have, as (variants, 2).

        Where hospitals withhold a variant, all people who are not counted may be theirs, and each
        may have two copies or none.
        """
        people = counts[:, CASES] + counts[:, CONTROLS]
        copies = counts[:, 2] + counts[:, 3]
        hidden = np.where(held > 0, self.people - people, 0)
        everybody = 2.0 * (people + hidden)
        with np.errstate(invalid="ignore", divide="ignore"):
            bounds = np.stack([copies, copies + 2 * hidden], 1) / everybody[:, None]
        return np.where(people[:, None] > 0, bounds, np.nan)


def _real(name: str, variants: NDArray[np.intp], width: int) -> Part:
    return Part(name, len(variants) * width, REAL, LARGEST)


def _unknown(count: int) -> Spread:
    return Spread(*(np.full(count, np.nan) for _ in range(3)))


def _pieces(variants: NDArray[np.intp], width: int) -> Iterator[NDArray[np.intp]]:
    """Yield variants in pieces whose sums are of bounded size."""
    size = max(1, _MOST_NUMBERS // width)
    for start in range(0, len(variants), size):
        yield variants[start : start + size]
