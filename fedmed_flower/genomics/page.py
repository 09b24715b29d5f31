"""The page of an association study: Manhattan plot, QQ plot, hits and hospitals."""

from __future__ import annotations

import csv
import io
import math
from array import array
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedmed_flower.errors import InputError
from fedmed_flower.files import (
    MOST_TABLE,
    as_input_error,
    open_file,
    read_lines,
    write_atomic,
)
from fedmed_flower.genomics.association import log10_of_text
from fedmed_flower.reports import frame, plots
from fedmed_flower.reports.frame import DASH, count_of, escaped
from fedmed_flower.server.run_folder import read_summary
from fedmed_flower.settings.study import REGRESSIONS, TESTS

TABLE = "association.csv"
# What is estimated of a variant.
NUMBERS = (
    *("freq", "freq_least", "freq_most", "effect", "se", "low", "high", "statistic", "p"),
    *("q", "q_p", "i2"),
)
COLUMNS = (
    *("chrom", "position", "id", "a1", "a2", "sites", "people", "cases", "controls"),
    *NUMBERS,
    "note",
)
# Genome-wide significance, as a decimal logarithm.
_LINE = math.log10(5e-8)
_STATUS = {"finished": "Finished", "failed": "Failed", "stopped": "Stopped", "running": "Running"}
_BANNER = '<p class="banner" role="note">Generated data: {}</p>'
_MOST_CHROMOSOMES = 100
# A plot is drawn with one dot a cell: this many cells across, and this many up to the height below
# which dots are crowded.
_ACROSS = 400
_UP = 45
_CROWDED = 3.0
# Colours of every other chromosome.
_EVEN, _ODD = "#0072b2", "#5b7f9c"
_LEAVES = """<h2>What left each hospital</h2><p>No genotype and no row of a person. Of each variant
a hospital sends sums over its people: how many cases and controls have a genotype, how many copies
of the allele they have together{}. Before, it sent how many people, cases and variants it has, and
the ids, positions and alleles of its variants.{} A variant is withheld if the hospital has fewer
copies of its rarer allele, fewer cases or fewer controls than its minimum, unless it has none.</p>
<p>None of this carries noise: the minimum does not bound what can be inferred about one person.
Whoever has a person’s genotypes can tell from the allele frequencies of many variants whether this
person was among a hospital’s cases. Hospitals with a privacy budget decline.</p>"""
_SENT = {
    "trend": ", and the sum of the squared numbers of copies",
    "allelic": "",
    "linear": ", and the sums of products of copies, trait and covariates",
    "logistic": ", and in each step of Newton’s method score and information, unless one person "
    "has more than one part in the hospital’s minimum of their weight",
}
_SUMMED = """<h2>What the server learned</h2><p>Sums over hospitals, not what a single hospital
sent: each answer left under masks that cancel in the sum alone. So it is not known which hospitals
withhold a variant, only how many. Of each hospital the server knows the ids, positions and alleles
of its variants, its minimum and the names of its columns.</p>"""
_COMPONENTS = """ For the principal components it sent the sum over its people of their genotypes,
each weighted with the person’s score; the scores themselves stayed. As many such sums as there are
people give the genotypes of all of them."""


_OWN_ODDS = """the common odds ratio of A1 after Mantel and Haenszel, with the interval of Robins,
Breslow and Greenland. Cochran’s Q compares the logarithms of the hospitals’ own odds ratios; a
hospital has none if a cell of its table is empty"""
_EFFECT = {
    "trend": _OWN_ODDS,
    "allelic": _OWN_ODDS,
    "linear": "the slope of the trait for each copy of A1. Cochran’s Q compares the slopes of the "
    "hospitals’ own models",
    "logistic": "the odds ratio of each copy of A1. Cochran’s Q compares the hospitals’ own "
    "slopes, each one Newton step from the common model towards the hospital’s own",
}


def write_page(folder: Path) -> Path:
    """Write ``report.html`` of an association study into its run folder.

    Parameters
    ----------
    folder
        With ``summary.json`` and, if the study got that far, ``association.csv``.

    Returns
    -------
    Path
        The page. It appears whole or not at all.

    Raises
    ------
    InputError
        If a file is damaged.
    """
    hint = "the folder holds no association study that can be shown"
    summary = read_summary(folder, hint)
    with as_input_error(f"the association study in {folder}", "run it again"):
        study = summary["association"]
        chromosomes, positions, log10_p = _read(folder)
        parts = [_head(summary), _result(summary, study)]
        if np.isfinite(log10_p).any():
            with matplotlib.rc_context(plots.SETTINGS):
                parts += [_plots(chromosomes, positions, log10_p, study)]
        parts += [_tables(summary, study), _hospitals(summary), _failures(summary)]
        parts += [_leaves(study), _making(summary)]
        banner = _BANNER.format(escaped(summary.get("data"))) if summary.get("generated") else ""
        text = frame.page(escaped(summary["app"]), "\n".join(parts), banner)
    target = folder / "report.html"
    write_atomic(target, text.encode())
    return target


def _read(folder: Path) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return chromosome, position and the p-value's decimal logarithm of each variant."""
    # Plain numbers: a study may have millions of variants.
    chromosomes = array("q")
    positions = array("q")
    logarithms = array("d")
    try:
        file = open_file(folder, TABLE, MOST_TABLE)
    except FileNotFoundError:
        return np.array(chromosomes), np.array(positions), np.array(logarithms)
    except OSError as error:
        path = folder / TABLE
        raise InputError(f"{path} cannot be read ({error.strerror}): mend or remove it") from error
    with io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        rows = csv.reader(read_lines(text))
        if tuple(next(rows, ())) != COLUMNS:
            raise InputError(
                f"{folder / TABLE} does not have the columns {', '.join(COLUMNS)}: run the study "
                "again if an earlier version wrote it"
            )
        p_index = COLUMNS.index("p")
        for row in rows:
            chromosomes.append(int(row[0]))
            positions.append(int(row[1]))
            logarithms.append(log10_of_text(row[p_index]))
    if len(np.unique(chromosomes)) > _MOST_CHROMOSOMES:
        raise InputError(f"{folder / TABLE} has more than {_MOST_CHROMOSOMES} chromosomes")
    return np.array(chromosomes), np.array(positions), np.array(logarithms)


def _head(summary: dict[str, Any]) -> str:
    status = str(summary["status"])
    date = escaped(summary.get("started")).replace("T", " ")[:16]
    facts = f"{date} · {count_of(len(summary['sites']), 'hospital')}"
    return (
        f'<h1>{escaped(summary["app"])}</h1><p class="soft">Association study · {facts}</p>'
        f'<div class="status {status if status in _STATUS else "unknown"}" role="status">'
        f"<b>{_STATUS.get(status, 'Status not known')}</b>{escaped(summary.get('message') or ' ')}"
        "</div><nav></nav>"
    )


def _result(summary: dict[str, Any], study: dict[str, Any]) -> str:
    people, cases = (
        study[key] if study.get("sums") else sum(site[key] for site in summary["sites"].values())
        for key in ("people", "cases")
    )
    named = [*study["covariates"]] if study["test"] in REGRESSIONS else []
    if study["components"]:
        named.append(count_of(len(study["components"]), "principal component"))
    adjustment = f", adjusted for {escaped(', '.join(named))}" if named else ""
    words = f"{count_of(people, 'person').replace('persons', 'people')}"
    if study["test"] != "linear":
        words += f", {cases:,} of them cases"
    words += f": {escaped(study['phenotype'])} by {TESTS[study['test']]}"
    words += f"{adjustment}, on {count_of(study['tested'], 'variant')}"
    if untested := study["variants"] - study["tested"]:
        words += f" ({untested:,} more gave no result)"
    ignored = study["covariates"] if study["test"] not in REGRESSIONS else []
    alone = f" Not adjusted for {escaped(', '.join(ignored))}: this test takes no covariates."
    inflation = study["lambda-gc"]
    shown = DASH if inflation is None else f"{inflation:.3f}"
    return (
        f'<h2>Result</h2><p class="lead">{words}. Genomic inflation λ: <b>{shown}</b>.</p>'
        '<p class="note">People are compared with others of their own '
        "hospital: one with more cases and other alleles than the rest makes no hit by that."
        f"{alone if ignored else ''} λ compares the median statistic with that of no association; "
        "well above 1 points to people of different ancestry among the cases and controls of one "
        "hospital, or, on few variants of one region, to a hit that many of them lie near.</p>"
    )


def _plots(
    chromosomes: NDArray[np.int64],
    positions: NDArray[np.int64],
    log10_p: NDArray[np.float64],
    study: dict[str, Any],
) -> str:
    known = np.isfinite(log10_p)
    height = -log10_p[known]
    manhattan = _manhattan(chromosomes[known], positions[known], height)
    return f"<h2>Variants</h2>{manhattan}{_qq(height, study['lambda-gc'])}"


def _thin(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the indices of the dots to draw: one of those that would cover each other."""
    span = max(float(x.max() - x.min()), 1e-9)
    cells = np.round((x - x.min()) / span * _ACROSS) * 1e6
    fine = np.where(y > _CROWDED, 1e3 + y * 40, y * _UP / _CROWDED)
    return np.unique(cells + np.round(fine), return_index=True)[1]


def _manhattan(
    chromosomes: NDArray[np.int64], positions: NDArray[np.int64], height: NDArray[np.float64]
) -> str:
    present = np.unique(chromosomes)
    start = 0.0
    ticks: list[tuple[float, str]] = []
    x = np.zeros(len(height))
    for chromosome in present:
        on_it = chromosomes == chromosome
        first, last = int(positions[on_it].min()), int(positions[on_it].max())
        x[on_it] = start + positions[on_it] - first
        ticks.append((start + (last - first) / 2, str(chromosome)))
        start += (last - first) * 1.02 + 1
    axes: Any = Figure((8.4, 3.1), layout="constrained").subplots()
    drawn = _thin(x, height)
    for odd, colour in enumerate((_EVEN, _ODD)):
        dots = drawn[np.searchsorted(present, chromosomes[drawn]) % 2 == odd]
        axes.plot(x[dots], height[dots], "o", ms=2.2, mew=0, color=colour)
    if len(present) == 1:
        first = int(positions.min())
        indices = np.linspace(0, float(x.max()), 5)
        axes.set_xticks(indices, [f"{(first + index) / 1e6:.2f}" for index in indices])
        across = f"position on chromosome {present[0]} (Mb)"
    else:
        axes.set_xticks(*zip(*ticks, strict=True))
        across = "chromosome"
    if height.max() > -_LINE / 2:
        axes.axhline(-_LINE, color=plots.WORST, lw=1, ls="--")
    axes.set_ylim(0, max(float(height.max()) * 1.06, 1))
    axes.set_ylabel("−log10 p", color=frame.INK)
    picture = plots.svg(axes, "Manhattan plot", across, grid="y")
    key = "Dashed: p = 5 × 10<sup>−8</sup>. Dots that would cover each other are drawn once."
    return f"<figure><figcaption><b>Manhattan plot</b> · {key}</figcaption>{picture}</figure>"


def _qq(height: NDArray[np.float64], inflation: float | None) -> str:
    ordered = np.sort(height)[::-1]
    expected = -np.log10((np.arange(len(ordered)) + 0.5) / len(ordered))
    drawn = _thin(expected, ordered)
    axes: Any = Figure((6.2, 3.6), layout="constrained").subplots()
    top = float(expected.max())
    axes.plot([0, top], [0, top], color=frame.INK, lw=1)
    axes.plot(expected[drawn], ordered[drawn], "o", ms=2.6, mew=0, color=_EVEN)
    axes.set_ylabel("−log10 p, observed", color=frame.INK)
    axes.set_ylim(0, max(float(ordered.max()) * 1.06, top))
    picture = plots.svg(axes, "QQ plot", "−log10 p, expected without association", grid="y")
    shown = "" if inflation is None else f" · λ = {inflation:.3f}"
    caption = f"<figcaption><b>QQ plot</b>{shown}</figcaption>"
    return f'<figure class="dots">{caption}{picture}</figure>'


def _tables(summary: dict[str, Any], study: dict[str, Any]) -> str:
    drawn = ""
    for table in summary["tables"]:
        rows = [[escaped(cell) for cell in row] for row in table["rows"]]
        drawn += frame.table(escaped(table["title"]), map(escaped, table["head"]), rows)
    if not drawn:
        return ""
    return (
        f'{drawn}<p class="note">The effect is {_EFFECT[study["test"]]}. The p-value of Q is small '
        "if the hospitals’ effects differ by more than chance; I² is the share of Q beyond chance. "
        "Two frequencies are the least and the largest possible where a hospital withholds its "
        f"counts. {TABLE} has all variants.</p>"
    )


def _hospitals(summary: dict[str, Any]) -> str:
    keys: tuple[str, ...] = (
        "people",
        "cases",
        "variants",
        "counted",
        "withheld",
        "swapped",
        "left out",
        "absent",
    )
    if summary["association"]["test"] == "linear":
        keys = tuple(key for key in keys if key != "cases")
    rows = [
        [
            escaped(name),
            *(DASH if site[key] is None else f"{site[key]:,}" for key in keys),
            f"{site['minimum']:,}",
        ]
        for name, site in summary["sites"].items()
    ]
    head = ["Hospital", *(key.capitalize() for key in keys), "Minimum"]
    note = (
        "Counted: variants in which this hospital’s people are counted. Withheld: too few copies "
        "of the rarer allele, cases or controls. Swapped: A1 and A2 are the other way round than "
        "at most hospitals, and counted. Left out: other alleles, or swapped alleles that read the "
        f"same on both strands. Absent: at other hospitals only. The notes of {TABLE} name "
        "the variants and hospitals. Only chromosomes 1 to 22 are tested."
    )
    table = frame.table("People and variants of each hospital", head, rows)
    return f'<h2>Hospitals</h2>{table}<p class="note">{note}</p>'


def _failures(summary: dict[str, Any]) -> str:
    if not summary["failures"]:
        return "<h2>What failed</h2><p>No hospital failed.</p>"
    keys = {"site": "Hospital", "phase": "Question", "round": "Block", "reason": "Reason"}
    rows = [[escaped(entry.get(key)) for key in keys] for entry in summary["failures"]]
    table = frame.table(
        "The study went on without these hospitals", keys.values(), rows, kind="wordy"
    )
    return f"<h2>What failed</h2>{table}"


def _leaves(study: dict[str, Any]) -> str:
    text = _LEAVES.format(_SENT[study["test"]], _COMPONENTS if study["components"] else "")
    return _SUMMED + text if study.get("sums") else text


def _making(summary: dict[str, Any]) -> str:
    facts = {key: summary.get(key) for key in ("data", "engine")}
    facts["exchanges"] = summary.get("rounds")
    facts["duration"] = f"{timedelta(seconds=round(summary['seconds']))} h:min:s"
    tables = ""
    for heading, part in (
        ("Run", facts),
        ("Settings", summary.get("config") or {}),
        ("Versions", summary.get("versions") or {}),
    ):
        rows = [[escaped(key), escaped(value)] for key, value in part.items()]
        tables += frame.table(heading, ("Name", "Value"), rows, kind="wordy") if rows else ""
    return f'<h2>How it was made</h2><div class="plots">{tables}</div>'
