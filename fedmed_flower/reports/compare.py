"""Several runs side by side, as one page that loads nothing."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fedmed_flower.data.site import some_of
from fedmed_flower.errors import InputError
from fedmed_flower.files import as_input_error, write_atomic
from fedmed_flower.metrics.names import lower_is_better
from fedmed_flower.reports import frame, plots, several
from fedmed_flower.reports.frame import COUNT, DASH, count_of, escaped, format_of, format_value
from fedmed_flower.reports.plots import Styles
from fedmed_flower.reports.several import Reached, Run
from fedmed_flower.reports.summary import Total, nested, total
from fedmed_flower.reports.tables import Column, site_table

# Names are escaped: no other text of the page holds a quotation mark.
_SITE = re.compile(r' data-site="[^"]*"')
_CHANGE = "+,.3f"
_MOST_REASON = 300
_MOST_LETTERS = 24
_SAME = """<p>The hospitals and the numbers of their test records are the same in all runs{which}.
</p>"""
_PAIRED = """The small numbers are the 95% interval over samples of test records (of the AUC by
DeLong’s variance, of shares by Wilson’s method) and the difference to {first}. Records are taken to
be independent. Two runs on the same records differ by less chance than their intervals show; a run
keeps no scores of single records, so the difference has no interval. """
_NO_INTERVAL = """There is no interval of a run that keeps no counts, or whose hospitals counted
with noise. """
_DIFFERENCE = """“−” columns: the run less {first}. Mean and worst are over the hospitals with a
number in every run. """
_IN_USE = """of the model that a hospital uses, on its own test records: its own model if the run
has made one, else the federated"""
_LINES = """<p class="note">All hospitals together, as each run recorded them.</p>"""
_NO_PRIVACY = "none: nothing bounds what could be inferred about one patient"
_NOT_ADDED = """<p class="note">Each row is of that run alone. Who was trained on in several of the
runs has spent the sum of them, which each hospital’s own ledger holds.</p>"""


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """Write a page that puts runs side by side.

    Parameters
    ----------
    folders : sequence of Path
        Run folders, of which the first is the one that the others are compared with.
    out : Path
        It appears whole or not at all.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    InputError
        As `read_runs` does, if a file of a run folder is malformed, or if `out` cannot be written.
    """
    with as_input_error("the comparison of these runs", "leave out the run that is malformed"):
        text = _page(several.read_runs(folders))
    try:
        write_atomic(out, text.encode())
    except OSError as error:
        raise InputError(
            f"{out} cannot be written ({error.strerror}): give another file with --out"
        ) from error
    return out


def _page(runs: list[Run]) -> str:
    main = next((run.main for run in runs if run.has_results), runs[0].main)
    styles = plots.styles([run.label for run in runs])
    with matplotlib.rc_context(plots.SETTINGS):
        sections = [
            _head(runs, styles),
            _result(runs, styles, main),
            _hospitals(runs, styles, main),
            _rounds(runs, styles, main),
            _settings(runs, styles),
            _privacy(runs, styles),
            _cost(runs, styles),
            _failures(runs, styles),
        ]
    generated = any(run.summary.get("generated") is True for run in runs)
    return frame.page(
        title=f"Comparison of {count_of(len(runs), 'run')}",
        # The page's script offers to highlight a hospital; the lines here are of runs.
        body=_SITE.sub("", "\n".join(sections)),
        banner=frame.BANNER if generated else "",
    )


def _head(runs: list[Run], styles: Styles) -> str:
    rows = []
    for run in runs:
        date = escaped(run.summary.get("started")).replace("T", " ")[:16]
        status = escaped(run.summary.get("status"))
        rows.append([styles[run.label].key, escaped(run.summary.get("app")), status, date])
    table = frame.table(
        "The first run is the one that the others are compared with",
        ("Run", "App", "Status", "Started"),
        rows,
        kind="wordy",
    )
    title = f"<h1>Comparison of {count_of(len(runs), 'run')}</h1>"
    return f"{title}{_cautions(runs)}<nav></nav>{table}"


def _cautions(runs: list[Run]) -> str:
    cautions = several.cautions(runs)
    if not cautions:
        known = several.splits_known(runs)
        which = (
            ", and so are the test patients"
            if known
            else ("; whether the patients are the same is not recorded")
        )
        return _SAME.format(which=which)
    listed = "</p><p>".join(escaped(caution[:_MOST_REASON]) for caution in cautions)
    return (
        '<div class="status unknown" role="status"><b>Not alike in all but their settings</b>'
        f"<p>{listed}</p></div>"
    )


def _result(runs: list[Run], styles: Styles, main: str) -> str:
    metrics = several.reached(runs, main)
    if not metrics:
        return "<h2>Result</h2><p>No run has test results.</p>"
    rows = [
        [frame.title(key), *(_reached(key, each, index) for index, each in enumerate(values))]
        for key, values in metrics.items()
    ]
    head = ["Metric", *(styles[run.label].key for run in runs)]
    table = frame.table(
        "The federated model on all test records of all hospitals together", head, rows
    )
    notes = _PAIRED.format(first=escaped(runs[0].label))
    if any(run.counts is None or run.counts.noised for run in runs):
        notes += _NO_INTERVAL
    notes += "".join(frame.NOTES.get(key, "") for key in metrics)
    lead = _in_a_sentence(runs, metrics.get(main), main)
    return f'<h2>Result</h2>{lead}{table}<p class="note">{notes}</p>'


def _in_a_sentence(runs: list[Run], values: list[Reached] | None, main: str) -> str:
    """Return what each run reaches by the metric that the runs are judged by."""
    if values is None:
        return ""
    spec = format_of(main)
    parts = []
    for index, (run, reached) in enumerate(zip(runs, values, strict=True)):
        part = f"{escaped(run.label)} <b>{format_value(reached.total.value, spec)}</b>"
        if index and reached.difference is not None:
            part += f" ({format_value(reached.difference, '+' + spec)})"
        parts.append(part)
    better = "lower" if lower_is_better(main) else "higher"
    words = f"{frame.title(main)}, {better} is better: {', '.join(parts)}."
    return f'<p class="lead">{words}</p>'


def _reached(key: str, reached: Reached, index: int) -> str:
    """Return a cell: the value, its interval or bounds, and its difference to the first run."""
    spec = format_of(key)
    cell = f"<b>{format_value(reached.total.value, spec)}</b>"
    ends = reached.total.bounds
    if ends is None and reached.interval is not None:
        ends = reached.interval
    if ends is not None:
        cell += f"<small>{' to '.join(format_value(end, spec) for end in ends)}</small>"
    if index and reached.difference is not None:
        mark = "+" + spec
        cell += f"<small>{format_value(reached.difference, mark)}</small>"
    return cell


def _hospitals(runs: list[Run], styles: Styles, main: str) -> str:
    by_run = several.by_hospital(runs, main)
    sites = sorted({site for values in by_run for site in values}, key=frame.natural)
    if not sites:
        return ""
    totals = [total(nested(run.summary, "test", "federated"), main) for run in runs]
    title = frame.title(main)
    caption = f"{title} on each hospital’s own test records"
    table = _by_hospital(styles, main, by_run, totals, caption)
    note = _DIFFERENCE.format(first=escaped(runs[0].label))
    drawn = _dots(sites, styles, by_run, title) if len(sites) <= frame.MANY else ""
    in_use = several.in_use(runs, main)
    used = _by_hospital(styles, main, in_use, None, f"{title} {_IN_USE}") if in_use else ""
    return f'<h2>By hospital</h2>{table}<p class="note">{note}</p>{drawn}{used}'


def _by_hospital(
    styles: Styles,
    main: str,
    by_run: list[dict[str, float]],
    totals: list[Total] | None,
    caption: str,
) -> str:
    """Return a table with a row a hospital, a column a run, and the differences to the first."""
    lower = lower_is_better(main)
    spec = format_of(main)
    sites = sorted({site for values in by_run for site in values}, key=frame.natural)
    of_all: list[Total | None] = [None] * len(by_run) if totals is None else [*totals]
    runs = [*zip(styles.items(), by_run, of_all, strict=True)]
    columns = [Column(style.key, values, value, spec, lower) for (_, style), values, value in runs]
    (first, _), before, total_before = runs[0]
    for (label, _), values, value in runs[1:]:
        change = {site: values[site] - before[site] for site in values if site in before}
        title = f"{escaped(label)} − {escaped(first)}"
        of_both = None
        if value is not None and total_before is not None:
            of_both = Total(several.minus(value.value, total_before.value))
        columns.append(Column(title, change, of_both, _CHANGE, lower))
    complete = [site for site in sites if all(site in values for values in by_run)]
    names = {site: escaped(site) for site in sites}
    return site_table(names, caption, columns, complete)


def _dots(sites: list[str], styles: Styles, by_run: list[dict[str, float]], title: str) -> str:
    """Draw a row for each hospital with a dot for each run."""
    axes: Any = Figure((6.2, 0.5 + 0.24 * len(sites)), layout="constrained").subplots()
    for row, site in enumerate(sites):
        values = [run[site] for run in by_run if site in run]
        axes.plot([min(values), max(values)], [row, row], "-", color=frame.FAINT, lw=1.6)
    for style, run in zip(styles.values(), by_run, strict=True):
        rows = [sites.index(site) for site in run]
        axes.plot([*run.values()], rows, "o", color=style.colour, ms=5)
    labels = [html.unescape(escaped(site))[:_MOST_LETTERS] for site in sites]
    axes.set_yticks(range(len(sites)), labels)
    axes.set_ylim(len(sites) - 0.4, -0.6)
    across = f"{title} on the hospital’s own test records"
    drawing = plots.svg(axes, f"{title} of the runs by hospital", across)
    return f'<figure class="dots">{plots.keys(styles, together=False)}{drawing}</figure>'


def _rounds(runs: list[Run], styles: Styles, main: str) -> str:
    wanted = {("val", main): f"Validation {frame.name(main)}"}
    wanted |= {("val", "loss"): "Validation loss", ("train", "loss"): "Training loss"}
    panels = []
    for (phase, key), title in wanted.items():
        curves = several.over_rounds(runs, phase, key)
        panels.append(plots.panel(styles, curves, {}, title, lower_is_better(key)))
    drawn = "".join(panels)
    if not drawn:
        return "<h2>Over the rounds</h2><p>No run has recorded a metric of its rounds.</p>"
    keys = plots.keys(styles, together=False)
    return f'<h2>Over the rounds</h2>{keys}<div class="plots">{drawn}</div>{_LINES}'


def _settings(runs: list[Run], styles: Styles) -> str:
    found = several.settings(runs)
    head = ["Setting", *(styles[run.label].key for run in runs)]
    rows = [
        [escaped(key), *(escaped(value) for value in values)]
        for key, values in found.differing.items()
    ]
    words = (
        frame.table("What differs", head, rows, kind="wordy")
        if rows
        else "<p>No setting differs.</p>"
    )
    same = [[escaped(key), escaped(value)] for key, value in found.same.items()]
    table = frame.table("What is the same in all runs", ("Setting", "Value"), same, kind="wordy")
    summary = f"{count_of(len(same), 'setting')} the same in all runs"
    return f"<h2>Settings</h2>{words}<details><summary>{summary}</summary>{table}</details>"


def _privacy(runs: list[Run], styles: Styles) -> str:
    rows = []
    for run in runs:
        for spent in several.spent(run):
            rows.append(
                [
                    styles[run.label].key,
                    f"one {spent.unit}",
                    spent.giver,
                    escaped(spent.target),
                    escaped(spent.delta),
                    format_value(spent.epsilon),
                ]
            )
        if not several.spent(run):
            rows.append([styles[run.label].key, _NO_PRIVACY, *[DASH] * 4])
    head = ("Run", "Protects", "Given by", "Target epsilon", "Delta", "Epsilon spent, at most")
    table = frame.table("Differential privacy", head, rows, kind="wordy")
    return f"<h2>Privacy</h2>{table}{_NOT_ADDED}"


def _cost(runs: list[Run], styles: Styles) -> str:
    rows = []
    for run in runs:
        cost = several.cost(run)
        duration = DASH if cost.seconds is None else str(timedelta(seconds=round(cost.seconds)))
        sizes = [
            format_value(size, ",.2f")
            for size in (cost.megabytes_to_sites, cost.megabytes_from_sites)
        ]
        counts = [format_value(count, COUNT) for count in (cost.rounds, cost.replies)]
        rows.append([styles[run.label].key, counts[0], duration, counts[1], *sizes])
    head = ("Run", "Rounds", "Hours:min:s", "Replies", "MB to hospitals", "MB from hospitals")
    table = frame.table("Time of the whole run, and messages of its rounds", head, rows)
    return f"<h2>Cost</h2>{table}"


def _failures(runs: list[Run], styles: Styles) -> str:
    rows: list[list[Any]] = []
    for run in runs:
        failed = several.failed(run)
        times = "not recorded" if failed.times is None else f"{failed.times:,}"
        sites = escaped(some_of(failed.sites)) if failed.sites else DASH
        message = escaped(str(run.summary.get("message") or "")[:_MOST_REASON])
        rows.append(
            [styles[run.label].key, times, sites, escaped(failed.first[:_MOST_REASON]), message]
        )
    head = ("Run", "Failures", "Hospitals", "First reason", "The run’s message")
    return f"<h2>What failed</h2>{frame.table('In all rounds', head, rows, kind='wordy')}"
