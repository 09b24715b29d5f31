"""An association study over several hospitals, from the server's side."""

from __future__ import annotations

import heapq
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import tomli_w
from flwr.app import Context, UserConfig
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.files import write_rows
from fedmed_flower.genomics.association import (
    CASE_COPIES,
    CASES,
    CONTROL_COPIES,
    CONTROLS,
    WITHHELD,
    Results,
    allelic_test,
    genomic_inflation,
    p_text,
    trend_test,
)
from fedmed_flower.genomics.covariates import CovariateCheck
from fedmed_flower.genomics.page import COLUMNS, NUMBERS, TABLE, write_page
from fedmed_flower.genomics.panel import Panel, assemble
from fedmed_flower.genomics.rounds import blocks, find_components, regress
from fedmed_flower.genomics.types import Counts, Floats
from fedmed_flower.genomics.variants import ABSENT, REASONS, SWAPPED, Block
from fedmed_flower.reports.frame import DASH
from fedmed_flower.runs.verdict import require_tested
from fedmed_flower.server.run_folder import CONFIG, RunFolder, early_lines
from fedmed_flower.server.sites import wait_for_sites
from fedmed_flower.settings.plan import refuse_evaluation
from fedmed_flower.settings.registry import Sections, effective, require_known
from fedmed_flower.settings.secure import refuse_sums
from fedmed_flower.settings.study import REGRESSIONS, Study
from fedmed_flower.settings.text import expand, setting_error
from fedmed_flower.wire import COHORT

log = logging.getLogger("flwr.fedmed")

_TOP = 10
_PACKAGES = ("fedmed-flower", "flwr", "numpy", "scipy")


def associate(grid: Grid, context: Context, sections: Sections = ()) -> dict[str, Any]:
    """Run an association study by the run config and leave a complete run folder.

    The folder holds ``association.csv`` with a line a variant, ``summary.json``, ``report.html``,
    ``config.toml`` and ``log.txt``. Nothing is written until at least one site takes part.

    Parameters
    ----------
    grid, context
        As Flower gives them to a ServerApp.
    sections : sequence of Section classes
        The app's own settings.

    Returns
    -------
    dict
        The content of ``summary.json``.

    Raises
    ------
    InputError
        If the run config is wrong or no site can take part.
    RunFailedError
        If all sites failed during the study, or no variant has a result.
    """
    require_known(context.run_config, sections)
    refuse_evaluation(context.run_config, "tests variants")
    refuse_sums(context.run_config, "tests variants")
    study = Study.from_run_config(context.run_config)
    config = expand(context.run_config) | effective(context.run_config, [Study, *sections])
    if config.get("privacy", "none") != "none":
        raise setting_error(
            "an association study carries no noise: set privacy=none, which hospitals with a "
            "budget decline",
            "privacy",
        )
    folder = RunFolder.named(study.run_dir)
    folder.require_unused()
    trait = "continuous" if study.test == "linear" else "binary"
    with early_lines() as lines:
        wait_for_sites(grid, study.min_sites, study.round_timeout)
        panel = assemble(grid, study.round_timeout, trait)
        if trait == "binary":
            _leave_out_one_sided(panel)
    app = grid.run.fab_id.rpartition("/")[2] or "association study"
    return _Association(study, panel, folder, config, app, lines).run()


def _leave_out_one_sided(panel: Panel) -> None:
    for site, about in enumerate(panel.about):
        if about["cases"] in (0, about["people"]):
            only = "cases" if about["cases"] else "controls"
            reason = f"it has {only} only: cases are compared with controls of the same hospital"
            panel.leave_out(site, COHORT, reason)
    if not panel.taking:
        raise InputError(
            "no hospital has both cases and controls: cases are compared with controls of the "
            "same hospital, since hospitals differ in more than the trait"
        )


class _Tested(NamedTuple):
    """What came of the test of some variants.

    Attributes
    ----------
    results : Results
    counts : (variants, 5) int64 array
        Summed over the hospitals that take part.
    held : (hospitals, variants) bool array
        Which hospital withheld its counts of which variant.
    weighty : (hospitals, variants) bool array
        Which hospital withheld which variant because one person has too much weight.
    taking : (hospitals, variants) bool array
        Which hospital takes part in which variant.
    frequency : (variants, 2) float array
        The least and the largest that A1 can have; they are equal if no hospital withholds its
        counts.
    """

    results: Results
    counts: Counts
    held: NDArray[np.bool_]
    weighty: NDArray[np.bool_]
    taking: NDArray[np.bool_]
    frequency: Floats


@dataclass
class _Association:
    study: Study
    panel: Panel
    folder: RunFolder
    config: UserConfig
    app: str
    lines: list[logging.LogRecord]
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    began: float = field(default_factory=time.monotonic)
    best: list[tuple[float, list[str]]] = field(default_factory=list)
    log10_p: list[Floats] = field(default_factory=list)
    untested: Counter[str] = field(default_factory=Counter)
    values: list[float] = field(default_factory=list)
    covariates: CovariateCheck = field(default_factory=lambda: CovariateCheck(()))

    def __post_init__(self) -> None:
        zeros = dict.fromkeys(("counted", "withheld", "swapped", "left out", "absent"), 0)
        self.tally = [dict(zeros) for _ in self.panel.names]

    def run(self) -> dict[str, Any]:
        text = tomli_w.dumps(
            {
                "run": {"app": self.app, "sites": len(self.panel.nodes)},
                "config": dict(self.config),
                "versions": {name: version(name) for name in _PACKAGES},
            }
        )
        self.folder.write(CONFIG, text.encode())
        with self.folder.log_file(self.lines):
            if self.panel.generated:
                log.warning("generated data: %s", "; ".join(sorted(self.panel.sources)))
            for name, about in zip(self.panel.names, self.panel.about, strict=True):
                log.info("%s: %d people, %d variants", name, about["people"], about["variants"])
            try:
                self._write_summary("running")
                self._sweep()
                require_tested(self._count_results(), self.untested)
            except BaseException as error:
                stopped = isinstance(error, KeyboardInterrupt)
                reason = "stopped by the user" if stopped else f"{type(error).__name__}: {error}"
                self._write_summary("stopped" if stopped else "failed", reason)
                write_page(self.folder.path)
                raise
            summary = self._write_summary("finished")
            log.info("report: %s", write_page(self.folder.path))
        return summary

    def _sweep(self) -> None:
        study = self.study
        size = study.block_size
        if study.components:
            most = study.component_variants
            self.values = find_components(self.panel, size, study.components, most, study.seed)
        named = self.panel.about[0]["covariates"]
        if study.test in REGRESSIONS:
            components = [f"component {number + 1}" for number in range(len(self.values))]
            self.covariates = CovariateCheck([*named, *components])
        elif named:
            text = "test=%s takes no covariates: it is adjusted for the hospital alone, not for %s"
            log.warning(text, study.test, ", ".join(named))
        with _table(self.folder.path / TABLE) as lines:
            for number, block, counts in blocks(self.panel, size, study.test == "trend"):
                tested = self._test(block, counts, number)
                rows = self._rows(block, tested)
                for site, total in enumerate(self.tally):
                    for key, count in self._counted(block, tested, site).items():
                        total[key] += count
                self.log10_p.append(tested.results.log10_p)
                self.best = _smallest(self.best, tested.results.log10_p, rows)
                write_rows(lines, rows, "\n")

    def _test(self, block: Block, counts: Counts, number: int) -> _Tested:
        held = counts[:, :, CASES] == WITHHELD
        taking = block.usable() & ~held
        taking[list(self.panel.left_out)] = False
        weighty = np.zeros_like(taking)
        counts = np.where(taking[:, :, None], counts, 0)
        frequency = self._frequency(counts.sum(0), held)
        if self.study.test in REGRESSIONS:
            results, taking, weighty = regress(
                self.panel, block, counts, taking, number, self.study.test, self.covariates
            )
        else:
            test = trend_test if self.study.test == "trend" else allelic_test
            results = test(counts)
            taking = taking & (counts[:, :, [CASES, CONTROLS]] > 0).all(2)
        counts = np.where(taking[:, :, None], counts, 0)
        return _Tested(results, counts.sum(0), held, weighty, taking, frequency)

    def _frequency(self, counts: Counts, held: NDArray[np.bool_]) -> Floats:
        """Return the least and the largest frequency that A1 can have, as (variants, 2).

        Hospitals withhold rare alleles, so the frequency at the others is too high. Of those that
        withhold it, anybody may have two copies or none.
        """
        people, copies = _people_and_copies(counts)
        everybody = np.array([about["people"] for about in self.panel.about])
        everybody[list(self.panel.left_out)] = 0
        hidden = (held * everybody[:, None]).sum(0)
        total = 2.0 * (people + hidden)
        with np.errstate(invalid="ignore"):
            bounds = np.stack([copies, copies + 2 * hidden], 1) / total[:, None]
        return np.where(people[:, None] > 0, bounds, np.nan)

    def _count_results(self) -> int:
        """Return how many variants have a result."""
        return sum(int(np.isfinite(part).sum()) for part in self.log10_p)

    def _counted(self, block: Block, tested: _Tested, site: int) -> dict[str, int]:
        """Return how many variants a hospital takes part in, withholds, has swapped or lacks."""
        codes = block.codes[site]
        taking = tested.taking[site]
        return {
            "counted": int(taking.sum()),
            "withheld": int((tested.held[site] | tested.weighty[site]).sum()),
            "swapped": int((taking & (codes == SWAPPED)).sum()),
            "absent": int((codes == ABSENT).sum()),
            "left out": int((codes > SWAPPED).sum()),
        }

    def _excluded(self, block: Block, tested: _Tested, site: int) -> dict[str, NDArray[np.bool_]]:
        """Return by reason in which variants a hospital does not take part."""
        held = tested.held[site]
        weighty = tested.weighty[site]
        idle = block.usable()[site] & ~tested.taking[site]
        if site in self.panel.left_out:
            return {"failed": idle}
        excluded = {text: block.codes[site] == code for code, text in REASONS.items()}
        excluded["withheld"] = held
        excluded["one person weighs too much"] = weighty
        linear = self.study.test == "linear"
        reason = "no genotype" if linear else "cases or controls only"
        excluded[reason] = idle & ~held & ~weighty
        return excluded

    def _notes(self, block: Block, tested: _Tested) -> dict[int, list[str]]:
        """Return for each variant which hospitals do not take part and why, and why no result."""
        names_of: dict[tuple[int, str], list[str]] = {}
        for site, name in enumerate(self.panel.names):
            for reason, variants in self._excluded(block, tested, site).items():
                for index in np.flatnonzero(variants).tolist():
                    names_of.setdefault((index, reason), []).append(name)
        notes: dict[int, list[str]] = {}
        for (index, reason), names in names_of.items():
            notes.setdefault(index, []).append(f"{reason}: {', '.join(names)}")
        people, copies = _people_and_copies(tested.counts)
        for index in np.flatnonzero(np.isnan(tested.results.log10_p)).tolist():
            if not people[index]:
                note = "no hospital counts"
            elif copies[index] in (0, 2 * people[index]):
                note = "one allele only"
            elif self.study.test in REGRESSIONS:
                note = "no result: not identified or not converged"
            else:
                note = "no result: nobody differs from the others of the same hospital"
            self.untested[note] += 1
            notes.setdefault(index, []).append(note)
        return notes

    def _rows(self, block: Block, tested: _Tested) -> list[list[str]]:
        """Return the variants' lines of the table."""
        results = tested.results
        counts = tested.counts
        sites = tested.taking.sum(0)
        notes = self._notes(block, tested)
        people, _ = _people_and_copies(counts)
        binary = self.study.test != "linear"
        least, most = tested.frequency.T
        numbers = {
            "freq": np.where(least == most, least, np.nan),
            "freq_least": least,
            "freq_most": most,
            **results._asdict(),
        }
        texts = {
            name: [f"{value:.12g}" for value in numbers[name].tolist()]
            for name in NUMBERS
            if name != "p"
        }
        texts["p"] = [p_text(value) for value in results.log10_p.tolist()]
        totals = zip(sites.tolist(), people.tolist(), counts.tolist(), strict=True)
        return [
            [
                str(variant.chromosome),
                str(variant.position),
                variant.name,
                variant.a1,
                variant.a2,
                str(count),
                str(everybody),
                *([str(sums[CASES]), str(sums[CONTROLS])] if binary else ["", ""]),
                *(texts[name][index] for name in NUMBERS),
                "; ".join(notes.get(index, ())),
            ]
            for index, (variant, (count, everybody, sums)) in enumerate(
                zip(block.variants, totals, strict=True)
            )
        ]

    def _write_summary(self, status: str, message: str = "") -> dict[str, Any]:
        panel = self.panel
        log10_p = np.concatenate([*self.log10_p, np.zeros(0)])
        local = hasattr(panel.grid, "export_states")
        engine = "Flower simulation" if panel.simulated else "Flower deployment"
        sites = {}
        for name, about, tally in zip(panel.names, panel.about, self.tally, strict=True):
            sites[name] = {key: about[key] for key in ("people", "cases", "variants", "minimum")}
            sites[name] |= tally
        summary: dict[str, Any] = {
            "kind": "association",
            "status": status,
            "message": message,
            "app": self.app,
            "engine": "local" if local else engine,
            "data": "; ".join(sorted(panel.sources)),
            "generated": panel.generated,
            "rounds": panel.asked,
            "started": self.started,
            "seconds": round(time.monotonic() - self.began, 1),
            "sites": sites,
            "association": {
                "test": self.study.test,
                "phenotype": panel.about[0]["phenotype"],
                "covariates": panel.about[0]["covariates"],
                "components": self.values,
                "variants": len(log10_p),
                "tested": self._count_results(),
                "lambda-gc": genomic_inflation(log10_p),
            },
            "tables": [],
            "failures": [asdict(failure) for failure in panel.failures],
            "versions": {"python": platform.python_version()}
            | {package: version(package) for package in _PACKAGES},
            "config": dict(self.config),
        }
        if self.best:
            rows = [dict(zip(COLUMNS, row, strict=True)) for _, row in self.best]
            summary["tables"] += _top_variants(rows)
        self.folder.write_summary(summary)
        return summary


def _people_and_copies(counts: Counts) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the people and the copies of A1 behind each variant's counts."""
    people = counts[:, CASES] + counts[:, CONTROLS]
    copies = counts[:, CASE_COPIES] + counts[:, CONTROL_COPIES]
    return people, copies


def _smallest(
    best: list[tuple[float, list[str]]], log10_p: Floats, rows: list[list[str]]
) -> list[tuple[float, list[str]]]:
    """Return the lines with the smallest p-values, of the best so far and of more variants."""
    known = np.flatnonzero(np.isfinite(log10_p))
    first = known[np.argsort(log10_p[known], kind="stable")[:_TOP]]
    more = [(float(log10_p[index]), rows[index]) for index in first]
    return heapq.nsmallest(_TOP, [*best, *more], key=lambda pair: pair[0])


def _top_variants(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Return the tables of the variants with the smallest p-values."""
    effect = "OR" if rows[0]["cases"] else "beta"
    found = [
        [
            row["id"],
            f"{row['chrom']}:{row['position']}",
            f"{row['a1']}/{row['a2']}",
            _range(row["freq_least"], row["freq_most"]),
            _number(row["effect"]),
            _range(row["low"], row["high"]),
            _short(row["p"]),
        ]
        for row in rows
    ]
    spread = [
        [row["id"], row["sites"], *(_number(row[key]) for key in ("q", "q_p", "i2"))]
        for row in rows
    ]
    return [
        {
            "title": "Variants with the smallest p-values",
            "head": ["variant", "place", "A1/A2", "A1 freq", effect, "95% interval", "p"],
            "rows": found,
        },
        {
            "title": "How far the hospitals agree on them",
            "head": ["variant", "sites", "Q", "p of Q", "I² in %"],
            "rows": spread,
        },
    ]


def _number(text: str) -> str:
    """Return a number of the table in a short form; a dash if there is none."""
    number = float(text)
    return DASH if np.isnan(number) else f"{number:.3g}"


def _range(low: str, high: str) -> str:
    """Return two numbers of the table as bounds, or the one that they both are."""
    if low == high:
        return _number(low)
    return f"{_number(low)} to {_number(high)}"


def _short(p: str) -> str:
    mantissa, _, exponent = p.partition("e")
    return f"{float(mantissa):.2f}e{exponent}" if exponent else f"{float(p):.3g}"


@contextmanager
def _table(path: Path) -> Iterator[TextIO]:
    """Write a CSV file line by line; it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            write_rows(file, [COLUMNS], "\n")
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
