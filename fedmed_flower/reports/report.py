"""A run folder as one page, for the clinic and for whoever answers for privacy."""

import csv
import io
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib

from fedmed_flower.data.site import some_of
from fedmed_flower.errors import InputError
from fedmed_flower.files import (
    MOST_TABLE,
    as_input_error,
    open_file,
    read_lines,
    read_object,
    write_atomic,
)
from fedmed_flower.metrics.names import lower_is_better
from fedmed_flower.reports import comparison, frame, plots
from fedmed_flower.reports.frame import count_of, escaped, format_of, format_value, name
from fedmed_flower.reports.plots import Pens
from fedmed_flower.reports.summary import (
    COUNT,
    Column,
    at_worst,
    bounds,
    by_site,
    classes,
    figures,
    main_figure,
    mean,
    measured,
    nested,
    number,
    of_all,
    site_table,
    tested_only,
    worst,
)
from fedmed_flower.server.run_folder import METRICS as METRICS_TABLE
from fedmed_flower.server.run_folder import SUMMARY
from fedmed_flower.wire import ALL_SITES, EPSILON, Sent, noised_evaluation

Curves = dict[tuple[str, str, str], dict[int, float]]  # (phase, metric, site) -> round -> value

MOST_FAILURES, MOST_SAID = 100, 5
# What can be drawn; NaN is not below the second.
_MOST_ROUND, _MOST_VALUE = 10**9, 1e100
# Where pages are written of runs that train no model.
_HOMES = {
    "association": "fedmed_flower.genomics.page",
    "statistics": "fedmed_flower.statistics.page",
}
STATUS = {"finished": "Finished", "failed": "Failed", "stopped": "Stopped", "running": "Running"}


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder: one file that loads nothing.

    Parameters
    ----------
    folder
        A run folder with ``summary.json`` and, where the run got that far, ``metrics.csv``.

    Returns
    -------
    Path
        The page, ``folder / "report.html"``. It appears whole or not at all.

    Raises
    ------
    InputError
        ``summary.json`` is missing, not a JSON object or none of a run, or ``metrics.csv`` has a
        bad line; a link leads one of them out of the folder, or it is too large.
    """
    summary = read_object(folder, SUMMARY, "give the folder of a run that `fedmed run` has started")
    with as_input_error(f"{folder / SUMMARY}", "restore it from a copy"):
        return _write(folder, summary)


def _write(folder: Path, summary: dict[str, Any]) -> Path:
    if (home := _HOMES.get(str(summary.get("kind")))) is not None:
        write_page: Callable[[Path], Path] = import_module(home).write_page
        return write_page(folder)
    curves = _read_metrics(folder)
    names = {*nested(summary, "sites"), *nested(summary, "test", "sites")}
    names |= {*nested(summary, "test", "local")} | {key[2] for key in curves if key[2] != ALL_SITES}
    sites = sorted(names, key=frame.natural)
    styles, main = (
        plots.styles(sites),
        main_figure(summary, {key[1] for key in curves if key[0] == "val"}),
    )
    with matplotlib.rc_context(plots.SETTINGS):
        parts = [_head(summary, styles), _result(summary, main), _hospitals(summary, styles, main)]
        parts += [comparison.groups(summary, main), comparison.models(summary, styles, main)]
        parts += [_cases(summary, styles, main, folder), _curves(curves, styles, main)]
        parts += [_failures(summary), _privacy(summary, curves, styles), _making(summary)]
    text = frame.PAGE.substitute(
        title=escaped(summary.get("app") or "Run"),
        images=frame.EMBEDDED if _pictures(summary) else "",
        banner=frame.BANNER if summary.get("generated") is True else "",
        body="\n".join(parts),
    )
    target = folder / "report.html"
    write_atomic(target, text.encode())
    return target


def _read_metrics(folder: Path) -> Curves:
    path, curves = folder / METRICS_TABLE, Curves()
    try:
        file = open_file(folder, METRICS_TABLE, MOST_TABLE)
    except FileNotFoundError:
        return curves
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): mend or remove it") from error
    with io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="") as text:
        lines: Any = csv.DictReader(read_lines(text))
        try:
            for line in lines:
                key = (line["phase"], line["metric"], f"{line['site']}")
                turn, value = int(line["round"]), float(line["value"])
                if abs(turn) > _MOST_ROUND:
                    raise ValueError(f"there is no round {turn}")
                if abs(value) < _MOST_VALUE:
                    curves.setdefault(key, {})[turn] = value
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            where = f"{path} line {lines.line_num}"
            raise InputError(f"{where} is not a metric ({error!r}): mend or remove it") from error
    return {key: dict(sorted(values.items())) for key, values in curves.items()}


def _head(summary: dict[str, Any], styles: Pens) -> str:
    status, message = str(summary.get("status")), summary.get("message")
    date = escaped(summary.get("started")).replace("T", " ")[:16]
    rounds = [format_value(number(summary, key), COUNT) for key in ("rounds", "rounds-planned")]
    facts = f"{date} · {count_of(len(styles), 'hospital')} · {' of '.join(rounds)} rounds"
    app = escaped(summary.get("app") or "Run")
    return (
        f'<h1>{app}</h1><p class="soft">Federated run · {facts}</p>'
        f'<div class="status {status if status in STATUS else "unknown"}" role="status">'
        f"<b>{STATUS.get(status, 'Status not known')}</b>{escaped(message or ' ')}</div>"
    )


def _said(key: str, value: float, between: tuple[float, float] | None = None) -> str:
    what, millimetres, _ = name(key).partition(" (mm)")
    text = f"{what} <b>{format_value(value, format_of(key))}</b>{' mm' if millimetres else ''}"
    return text + (
        f" (between {format_value(between[0])} and {format_value(between[1])})" if between else ""
    )


def _result(summary: dict[str, Any], main: str) -> str:
    together, sites = (nested(summary, "test", key) for key in ("federated", "sites"))
    values, records = by_site(sites, main), number(together, "num-examples")
    overall = [key for key in figures(summary, main) if not key.startswith("dice-")][:MOST_SAID]
    found = {key: number(together, key) for key in overall}
    numbers = ", ".join(
        _said(key, value, bounds(together, key))
        for key, value in found.items()
        if value is not None
    )
    words = ""
    if numbers:
        which = "all test records" if records is None else count_of(records, "test record")
        words += f"On {which} of all hospitals together the federated model reaches {numbers}. "
    if values:
        site = worst(values, lower_is_better(main))
        words += f"Mean {name(main)} over {count_of(len(values), 'hospital')}: "
        words += f"<b>{format_value(mean(values), format_of(main))}</b>. "
        words += f"Worst hospital: {escaped(site)}, {_said(main, values[site])}. "
    if main == "dice" and (patient := number(together, frame.WORST_PATIENT)) is not None:
        words += f"Worst patient: {_said(main, patient)}. "
    if words and summary.get("status") != "finished":
        words += "The run did not finish: these numbers describe an unfinished model."
    words = words or "There are no test results: no model was tested in this run."
    return f'<h2>Result</h2><p class="lead">{words}</p>'


def _hospitals(summary: dict[str, Any], styles: Pens, main: str) -> str:
    if not styles:
        return "<h2>Hospitals</h2><p>No hospital is recorded in this run.</p>"
    test, columns, shown = nested(summary, "test"), list[Column](), figures(summary, main)
    tested = nested(test, "sites")
    for split in ("train", "val", "test"):
        counts = by_site(nested(summary, "sites"), split)
        total = format_value(sum(counts.values()) if counts else None, COUNT)
        columns.append(Column(split.capitalize(), counts, total, COUNT))
    if away := by_site(nested(summary, "sites"), "turned-away"):
        columns.append(Column("Turned away", away, format_value(sum(away.values()), COUNT), COUNT))
    for key in shown:
        total = of_all(test.get("federated"), key, format_of(key))
        columns.append(
            Column(
                frame.title(key), by_site(tested, key), total, format_of(key), lower_is_better(key)
            )
        )
    undefined = [
        site
        for site, own in tested.items()
        if main in frame.UNDEFINED and main not in nested(own) and {*nested(own)} - {"num-examples"}
    ]
    untrained, names = tested_only(summary), {site: pen[2] for site, pen in styles.items()}
    for site in untrained & names.keys():
        names[site] += ' <span class="soft">tested&nbsp;only</span>'
    caption = "Records per split, and the federated model on each hospital’s own test records"
    note = frame.UNDEFINED[main] if undefined else ""
    note += "".join(frame.NOTES.get(key, "") for key in shown)
    note += frame.BETWEEN if bounds(test.get("federated"), main) else ""
    if untrained:
        note += f"Tested only: {count_of(len(untrained), 'hospital')} without training records. "
    if away:
        note += "Turned away: records that cannot be used; the hospital’s own log says which. "
    for reason, refused in nested(summary, "refused").items():
        which = some_of([*map(str, refused)]) if isinstance(refused, list) else ""
        note += f"Could not take part: {escaped(which)} ({escaped(reason[:300])}). "
    return (
        f"<h2>Hospitals</h2>{site_table(names, caption, columns, styles, undefined)}"
        f'<p class="note">{note}The worst hospital is looked up in each column by itself.</p>'
        f"{_by_class(summary, shown)}"
    )


def _by_class(summary: dict[str, Any], shown: list[str]) -> str:
    """Return the table of a segmentation's classes, unless the table of hospitals tells all."""
    outlined, known = classes(summary), measured(summary)
    found = {kind: [f"{kind}-{one}" for one in outlined] for kind in frame.OUTLINED}
    found = {kind: keys for kind, keys in found.items() if {*keys} & {*known}}
    reported = {*shown} >= {key for keys in found.values() for key in keys}
    if "dice" not in shown or len(outlined) < 2 or reported:
        return ""
    together, sites = (nested(summary, "test", key) for key in ("federated", "sites"))
    frame.require_small(len(outlined), len(sites))
    rows = []
    for one in outlined:
        row = [escaped(one)]
        for key in (f"{kind}-{one}" for kind in found):
            cell = at_worst(by_site(sites, key), format_of(key), lower_is_better(key))
            row += [format_value(number(together, key), format_of(key)), cell]
        rows.append(row)
    head = [text for kind in found for text in (frame.title(kind), "Worst hospital")]
    return frame.table("By class, all test records together", ["Class", *head], rows)


def _pictures(summary: dict[str, Any]) -> list[dict[str, Any]]:
    found = summary.get("pictures")
    return [entry for entry in found if nested(entry)] if isinstance(found, list) else []


def _cases(summary: dict[str, Any], styles: Pens, main: str, folder: Path) -> str:
    if not (entries := _pictures(summary)):
        return ""
    words = frame.CASES + (frame.LINES if main == "dice" else frame.HEAT)
    shown: dict[str, str] = dict.fromkeys(styles, "")
    # Each file once: named again and again, one would make a page without end.
    for entry in {str(entry.get("file")): entry for entry in entries}.values():
        site = str(entry.get("site"))
        shown[site] = shown.get(site, "") + plots.case(entry, folder)
    silent = sum(not drawn for drawn in shown.values()) if len(styles) > frame.MANY else 0
    for site, drawn in shown.items():
        if drawn or not silent:
            kept = '<p class="soft">keeps its pictures to itself</p>'
            words += f'<h3>{escaped(site)}</h3><div class="cases">{drawn or kept}</div>'
    if silent:
        words += f'<p class="soft">{count_of(silent, "hospital")} sent no picture.</p>'
    return f"<h2>Test cases</h2>{words}"


def _curves(curves: Curves, styles: Pens, main: str) -> str:
    drawn = _panel(curves, styles, "val", main, f"Validation {name(main)}")
    drawn += _panel(curves, styles, "val", "loss", "Validation loss") if main != "loss" else ""
    drawn += _panel(curves, styles, "train", "loss", "Training loss")
    if not drawn:
        return "<h2>Over the rounds</h2><p>No round has recorded a metric.</p>"
    keys = plots.keys(styles, any(site == ALL_SITES for _, _, site in curves))
    return f'<h2>Over the rounds</h2>{keys}<div class="plots">{drawn}</div>'


def _panel(curves: Curves, styles: Pens, phase: str, key: str, words: str) -> str:
    series = {site: curves.get((phase, key, site), {}) for site in (*styles, ALL_SITES)}
    together = series.pop(ALL_SITES)
    return plots.panel(styles, series, together, words, lower_is_better(key) or key == EPSILON)


def _failures(summary: dict[str, Any]) -> str:
    found = summary.get("failures")
    failures = [entry for entry in found if nested(entry)] if isinstance(found, list) else []
    if not failures:
        words = "No site failed." if isinstance(found, list) else "Failures were not recorded."
        return f"<h2>What failed</h2><p>{words}</p>"
    keys = ("round", "phase", "site", "reason")
    rows = [[escaped(entry.get(key)) for key in keys] for entry in failures[:MOST_FAILURES]]
    caption = f"{len(rows)} of {len(failures)} shown; all are in summary.json"
    return "<h2>What failed</h2>" + frame.table(
        caption, map(str.capitalize, keys), rows, kind="words"
    )


def _privacy(summary: dict[str, Any], curves: Curves, styles: Pens) -> str:
    patient, hospital = (nested(summary, "privacy", unit) for unit in ("patient", "hospital"))
    words = _left(summary)
    if not patient and not hospital:
        return words + frame.UNPROTECTED
    if hospital:
        cost = format_value(number(hospital, "epsilon"))
        words += frame.HOSPITAL.format(epsilon=cost, delta=escaped(hospital.get("delta")))
    if not patient:
        return words + frame.NO_PATIENT
    sites = nested(patient, "sites")
    costs = by_site(sites, "epsilon")
    counts = [by_site(sites, key) for key in ("rounds", "declined")]
    rows = []
    for site in styles:
        shown = [format_value(n.get(site), COUNT) for n in counts]
        rows.append([styles[site][2], format_value(costs.get(site)), *shown])
    most = format_value(max(costs.values(), default=None))
    target, delta = (escaped(patient.get(key)) for key in ("target-epsilon", "delta"))
    words += frame.PATIENT.format(epsilon=most, target=target, delta=delta)
    words += frame.NOISED if _noised(summary) else frame.EXACT
    if nested(summary, "config").get("baselines") is True:
        words += frame.COMPARED
    head = ["Hospital", "Epsilon per patient", "Rounds trained", "Rounds declined"]
    reported = frame.table("This run, as each hospital last told it", head, rows)
    reported = frame.folded(reported, len(styles))
    drawn = _panel(curves, styles, "train", EPSILON, "Epsilon per patient")
    return f'{words}{reported}<div class="plots">{drawn}</div>'


def _left(summary: dict[str, Any]) -> str:
    """Return what the hospitals have sent, in a row all that left alike."""
    stays = frame.PICTURES if _pictures(summary) else frame.NO_RECORD
    words, sent = frame.LEFT.format(stays=stays), Sent.of(summary.get("sent"))
    if not (count := len({site for sites in sent.keys.values() for site in sites})):
        return words + frame.NOT_RECORDED
    for each in sent.keys.values():
        frame.require_small(len({key for keys in each.values() for key in keys}), len(each))
    cells = []
    for reply, how, sites, what in sent.lines():
        when = frame.REPLIED.get(reply, escaped(reply))
        names = sorted(sites, key=frame.natural)
        who = f"all {count}" if len(names) == count > 1 else some_of(names)
        cells.append((when, escaped(", ".join(what)), frame.WAYS[how], escaped(who)))
    head = ("When", "What", "How", "Hospitals")
    return words + frame.table("As the hospitals sent it", head, cells, kind="words")


def _noised(summary: dict[str, Any]) -> bool:
    """Return whether each hospital's evaluations carried noise."""
    sites = Sent.of(summary.get("sent")).keys.get("evaluate", {})
    return bool(sites) and all(noised_evaluation(keys) for keys in sites.values())


def _making(summary: dict[str, Any]) -> str:
    facts = {key: summary.get(key) for key in ("data", "strategy", "engine", "seed")}
    seconds = number(summary, "seconds")
    facts["duration"] = None if seconds is None else f"{timedelta(seconds=round(seconds))} h:min:s"
    parts = {"Run": facts, "Settings": nested(summary, "config")}
    tables = ""
    for heading, listed in (parts | {"Versions": nested(summary, "versions")}).items():
        rows = [map(escaped, row) for row in listed.items()]
        tables += frame.table(heading, ("Name", "Value"), rows, kind="words") if rows else ""
    return f'<h2>How it was made</h2><div class="plots">{tables}</div>'
