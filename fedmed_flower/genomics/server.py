"""An association study over several hospitals, from the server's side."""

from __future__ import annotations

import csv
import heapq
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from flwr.app import Context, UserConfig
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedmed_flower.errors import InputError
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
from fedmed_flower.genomics.page import COLUMNS, TABLE, write_page
from fedmed_flower.genomics.panel import Panel, assemble
from fedmed_flower.genomics.rounds import blocks, find_components, regress
from fedmed_flower.genomics.types import Counts, Floats
from fedmed_flower.genomics.variants import ABSENT, REASONS, SWAPPED, Block
from fedmed_flower.runs.roll_call import held_back
from fedmed_flower.server.run_folder import CONFIG, SUMMARY, RunFolder
from fedmed_flower.server.sites import wait_for_sites
from fedmed_flower.settings.study import Study

log = logging.getLogger("flwr.fedmed")

_TOP = 10
_PACKAGES = ("fedmed-flower", "flwr", "numpy", "scipy")


def associate(grid: Grid, context: Context) -> dict[str, Any]:
    """Run an association study by the run config and leave a complete run folder.

    The folder holds ``association.csv`` with a line a variant, ``summary.json``, ``report.html``,
    ``config.toml`` and ``log.txt``. Nothing is written until at least one site takes part.

    Parameters
    ----------
    grid, context
        As Flower gives them to a ServerApp.

    Returns
    -------
    dict
        The content of ``summary.json``.

    Raises
    ------
    InputError
        If the run config is wrong or no site can take part.
    RunFailedError
        If all sites failed during the study.
    """
    config = context.run_config
    study = Study.from_run_config(config)
    if config.get("privacy", "none") != "none":
        raise InputError(
            "an association study carries no noise: set privacy=none, which hospitals with a "
            "budget decline"
        )
    folder = RunFolder.named(study.run_dir)
    folder.require_unused()
    wait_for_sites(grid, study.min_sites, study.round_timeout)
    trait = "continuous" if study.test == "linear" else "binary"
    with held_back() as lines:
        panel = assemble(grid, study.round_timeout, trait)
        if study.test == "logistic":
            _leave_out_one_sided(panel)
    app = grid.run.fab_id.rpartition("/")[2] or "association study"
    return _Association(study, panel, folder, config, app, lines).run()


def _leave_out_one_sided(panel: Panel) -> None:
    for site, about in enumerate(panel.about):
        if about["cases"] in (0, about["people"]):
            only = "cases" if about["cases"] else "controls"
            reason = f"it has {only} only, so its intercept is not identified"
            panel.leave_out(site, "logistic", reason)
    if not panel.taking:
        raise InputError(
            "no hospital has both cases and controls, which test=logistic needs: set test=trend "
            "or test=allelic"
        )


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
    values: list[float] = field(default_factory=list)

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
        with self.folder.log_file():
            for line in self.lines:
                log.handle(line)
            if self.panel.generated:
                log.warning("generated data: %s", "; ".join(sorted(self.panel.sources)))
            for name, about in zip(self.panel.names, self.panel.about, strict=True):
                log.info("%s: %d people, %d variants", name, about["people"], about["variants"])
            try:
                self._write_summary("running")
                self._sweep()
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
        with _table(self.folder.path / TABLE) as lines:
            for number, block, counts in blocks(self.panel, size, study.test == "trend"):
                lines.writerows(self._test(block, counts, number))

    def _test(self, block: Block, counts: Counts, number: int) -> list[list[str]]:
        """Test some variants; return their lines of the table."""
        held = counts[:, :, CASES] == WITHHELD
        taking = block.usable() & ~held
        taking[list(self.panel.left_out)] = False
        weighty = np.zeros_like(taking)
        counts = np.where(taking[:, :, None], counts, 0)
        notes: dict[int, list[str]] = {}
        if self.study.test in ("trend", "allelic"):
            test = trend_test if self.study.test == "trend" else allelic_test
            results = test(counts.sum(0))
        else:
            covariates = len(self.panel.about[0]["covariates"]) + len(self.values)
            results, taking, weighty = regress(
                self.panel, block, counts, taking, number, self.study.test, covariates
            )
        self._note_sites(block, held, weighty, taking, notes)
        counts = np.where(taking[:, :, None], counts, 0)
        self.log10_p.append(results.log10_p)
        rows = self._rows(block, counts.sum(0), taking.sum(0), results, notes)
        known = np.flatnonzero(np.isfinite(results.log10_p))
        first = known[np.argsort(results.log10_p[known], kind="stable")[:_TOP]]
        best = [(float(results.log10_p[index]), rows[index]) for index in first]
        self.best = heapq.nsmallest(_TOP, [*self.best, *best], key=lambda pair: pair[0])
        return rows

    def _note_sites(
        self,
        block: Block,
        held: NDArray[np.bool_],
        weighty: NDArray[np.bool_],
        taking: NDArray[np.bool_],
        notes: dict[int, list[str]],
    ) -> None:
        """Count, and note for each variant, which hospital does not take part and why."""
        reasons: dict[tuple[int, str], list[str]] = {}
        idle = "no genotype" if self.study.test == "linear" else "cases or controls only"
        for site, name in enumerate(self.panel.names):
            codes = block.codes[site]
            usable = block.usable()[site]
            tally = self.tally[site]
            excluded = {text: codes == code for code, text in REASONS.items()}
            excluded["withheld"] = held[site]
            excluded["one person weighs too much"] = weighty[site]
            excluded[idle] = usable & ~held[site] & ~weighty[site] & ~taking[site]
            if site in self.panel.left_out:
                excluded = {"failed": usable & ~taking[site]}
            for text, variants in excluded.items():
                for index in np.flatnonzero(variants).tolist():
                    reasons.setdefault((index, text), []).append(name)
            tally["counted"] += int(taking[site].sum())
            tally["withheld"] += int((held[site] | weighty[site]).sum())
            tally["swapped"] += int((taking[site] & (codes == SWAPPED)).sum())
            tally["absent"] += int((codes == ABSENT).sum())
            tally["left out"] += int((codes > SWAPPED).sum())
        for (index, text), names in reasons.items():
            notes.setdefault(index, []).append(f"{text}: {', '.join(names)}")

    def _rows(
        self,
        block: Block,
        counts: Counts,
        sites: NDArray[np.int64],
        results: Results,
        notes: dict[int, list[str]],
    ) -> list[list[str]]:
        people = counts[:, CASES] + counts[:, CONTROLS]
        copies = counts[:, CASE_COPIES] + counts[:, CONTROL_COPIES]
        with np.errstate(invalid="ignore"):
            frequency = copies / (2 * people)
        for index in np.flatnonzero(np.isnan(results.log10_p)).tolist():
            if not people[index]:
                note = "no hospital counts"
            elif copies[index] in (0, 2 * people[index]):
                note = "one allele only"
            else:
                note = "no result: not identified or not converged"
            notes.setdefault(index, []).append(note)
        binary = self.study.test != "linear"
        numbers = (frequency, results.effect, results.se, results.statistic)
        texts = [[f"{value:.12g}" for value in column.tolist()] for column in numbers]
        ps = [p_text(value) for value in results.log10_p.tolist()]
        totals = zip(sites.tolist(), people.tolist(), counts.tolist(), strict=True)
        return [
            [
                *(str(variant.chromosome), str(variant.position), variant.name),
                *(variant.a1, variant.a2, str(count), str(everybody)),
                *([str(sums[CASES]), str(sums[CONTROLS])] if binary else ["", ""]),
                *(column[index] for column in texts),
                ps[index],
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
                "tested": int(np.isfinite(log10_p).sum()),
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
            summary["tables"].append(_top_variants(rows))
        self.folder.write_json(SUMMARY, summary)
        return summary


def _top_variants(rows: list[dict[str, str]]) -> dict[str, Any]:
    """Return the table of the variants with the smallest p-values."""
    effect = "OR" if rows[0]["cases"] else "beta"
    head = ["variant", "chr", "position", "A1/A2", "A1 freq", effect, "p", "sites"]
    return {
        "title": "Variants with the smallest p-values",
        "head": head,
        "rows": [
            [
                *(row["id"], row["chrom"], row["position"], f"{row['a1']}/{row['a2']}"),
                *(f"{float(row['freq']):.3f}", f"{float(row['effect']):.3f}"),
                *(_short(row["p"]), row["sites"]),
            ]
            for row in rows
        ],
    }


def _short(p: str) -> str:
    mantissa, _, exponent = p.partition("e")
    return f"{float(mantissa):.2f}e{exponent}" if exponent else f"{float(p):.3g}"


@contextmanager
def _table(path: Path) -> Iterator[Any]:
    """Write a CSV file line by line; it appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            yield writer
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
