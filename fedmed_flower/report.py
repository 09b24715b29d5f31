"""A run folder as one page, for the clinic and for whoever answers for privacy."""

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from fedmed_flower import page, plots
from fedmed_flower.errors import InputError
from fedmed_flower.metrics import EPSILON, main_metric
from fedmed_flower.metrics import lower_is_better as lower
from fedmed_flower.page import DASH, escaped, many, name, show, spec
from fedmed_flower.plots import Pens
from fedmed_flower.runfolder import ALL_SITES, SUMMARY, write_atomic
from fedmed_flower.runfolder import METRICS as METRICS_TABLE

Curves = dict[tuple[str, str, str], dict[int, float]]  # (phase, metric, site) -> round -> value

COUNT, MOST_FAILURES, MOST_COLUMNS = ",.0f", 100, 8
# Where pages are written of runs that train no model.
_HOMES = {
    "association": "fedmed_flower.manhattan",
    "statistics": "fedmed_flower.statistics.table",
}
STATUS = {"finished": "Finished", "failed": "Failed", "stopped": "Stopped", "running": "Running"}


class Column(NamedTuple):
    """A column of the table of hospitals."""

    title: str
    values: dict[str, float]
    together: str
    spec: str = ".3f"
    lower: bool = False  # is better


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
        ``summary.json`` is missing or not a JSON object, or ``metrics.csv`` has a bad line.
    """
    summary = _read_summary(folder / SUMMARY)
    if (home := _HOMES.get(str(summary.get("kind")))) is not None:
        page_of: Callable[[Path, dict[str, Any]], Path] = import_module(home).write_page
        return page_of(folder, summary)
    curves = _read_metrics(folder / METRICS_TABLE)
    names = {*_part(summary, "sites"), *_part(summary, "test", "sites")}
    names |= {*_part(summary, "test", "local")} | {key[2] for key in curves if key[2] != ALL_SITES}
    sites = sorted(names, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(9), name))
    pens, main = plots.pens(sites), _main(summary, curves)
    with matplotlib.rc_context(plots.SETTINGS):
        parts = [_head(summary, pens), _result(summary, main), _hospitals(summary, pens, main)]
        parts += [_comparison(summary, pens, main), _cases(summary, pens, main, folder)]
        parts += [_curves(curves, pens, main)]
        parts += [_failures(summary), _privacy(summary, curves, pens, main), _making(summary)]
    text = page.PAGE.substitute(
        title=escaped(summary.get("app") or "Run"),
        images=page.EMBEDDED if _pictures(summary) else "",
        banner=page.BANNER if summary.get("generated") is True else "",
        body="\n".join(parts),
    )
    target = folder / "report.html"
    write_atomic(target, text.encode())
    return target


def _read_summary(path: Path) -> dict[str, Any]:
    hint = "give the folder of a run that `fedmed run` has started"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not valid JSON: {error}"
        raise InputError(f"{path} cannot be read ({reason}): {hint}") from error
    if not isinstance(summary, dict):
        raise InputError(f"{path} holds a {type(summary).__name__}, not a JSON object: {hint}")
    return summary


def _read_metrics(path: Path) -> Curves:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    curves, lines = {}, csv.DictReader(io.StringIO(text))  # type: Curves, Any
    try:
        for line in lines:
            key, value = (line["phase"], line["metric"], f"{line['site']}"), float(line["value"])
            if math.isfinite(value):
                curves.setdefault(key, {})[int(line["round"])] = value
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        where = f"{path} line {lines.line_num}"
        raise InputError(f"{where} is not a metric ({error!r}): mend or remove it") from error
    return {key: dict(sorted(values.items())) for key, values in curves.items()}


def _part(node: Any, *keys: str) -> dict[str, Any]:
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node if isinstance(node, dict) else {}


def _number(node: Any, key: str) -> float | None:
    value = _part(node).get(key)
    return float(value) if isinstance(value, int | float) and abs(value) < 1e12 else None


def _by_site(node: dict[str, Any], key: str) -> dict[str, float]:
    values = {site: _number(part, key) for site, part in node.items()}
    return {site: value for site, value in values.items() if value is not None}


def _measured(summary: dict[str, Any]) -> list[str]:
    """Return the names of the test's figures: a site adds none to those of all together."""
    test = _part(summary, "test")
    parts = [_part(test, "federated"), *map(_part, _part(test, "sites").values())]
    found = [[key for key in part if _number(part, key) is not None] for part in parts]
    keys = found[0] if len(found[0]) > 1 else [key for names in found for key in names]
    return [key for key in dict.fromkeys(keys) if key != "num-examples"]


def _main(summary: dict[str, Any], curves: Curves) -> str:
    return main_metric(_measured(summary) or {key[1] for key in curves if key[0] == "val"})


def _classes(summary: dict[str, Any]) -> list[str]:
    keys = [
        key for key in _measured(summary) if key.startswith("dice-") and key != page.WORST_PATIENT
    ]
    return [key.removeprefix("dice-") for key in keys]


def _figures(summary: dict[str, Any], main: str) -> list[str]:
    """Return the figures in the table of hospitals, without classes where they are too many."""
    measured, classes = _measured(summary), _classes(summary)
    if main != "dice":
        return [key for key in (page.CLASSIFIED if main != "loss" else [main]) if key in measured]
    first = [key for key in ("dice", page.WORST_PATIENT) if key in measured]
    last = [key for key in ("hd95", "surface-dice") if key in measured]
    few = 1 < len(classes) <= MOST_COLUMNS - len(first + last)
    return [*first, *(f"dice-{name}" for name in classes if few), *last]


def _worst(values: dict[str, float], lower: bool) -> str:
    return (max if lower else min)(values, key=lambda site: values[site], default="")


def _at_worst(values: dict[str, float], spec: str, lower: bool) -> str:
    site = _worst(values, lower)
    return show(values.get(site), spec) + (f"<small>{escaped(site)}</small>" if values else "")


def _mean(values: dict[str, float]) -> float | None:
    return statistics.fmean(values.values()) if values else None


def _site_table(pens: Pens, caption: str, columns: list[Column], sites: Any, marked: Any) -> str:
    rows, mean, worst = [], ["Mean over hospitals"], ["Worst hospital"]
    for site, pen in pens.items():
        mark = "<sup>†</sup>" if site in marked else ""
        cells = [show(column.values.get(site), column.spec) for column in columns]
        rows.append([pen[2], *(cell + mark * (cell == DASH) for cell in cells)])
    for column in columns:
        values = {site: column.values[site] for site in sites if site in column.values}
        counted = column.spec == COUNT
        mean.append("" if counted else show(_mean(values), column.spec))
        worst.append("" if counted else _at_worst(values, column.spec, column.lower))
    head, total = ["Hospital"], ["All images together"]
    head += [column.title for column in columns]
    total += [column.together for column in columns]
    return page.table(caption, head, rows, [mean, worst, total])


def _head(summary: dict[str, Any], pens: Pens) -> str:
    status, message = str(summary.get("status")), summary.get("message")
    date = escaped(summary.get("started")).replace("T", " ")[:16]
    rounds = [show(_number(summary, key), COUNT) for key in ("rounds", "rounds-planned")]
    facts = f"{date} · {many(len(pens), 'hospital')} · {' of '.join(rounds)} rounds"
    app = escaped(summary.get("app") or "Run")
    return (
        f'<h1>{app}</h1><p class="soft">Federated run · {facts}</p>'
        f'<div class="status {status if status in STATUS else "unknown"}" role="status">'
        f"<b>{STATUS.get(status, 'Status not known')}</b>{escaped(message or ' ')}</div>"
    )


def _said(key: str, value: float) -> str:
    what, millimetres, _ = name(key).partition(" (mm)")
    return f"{what} <b>{show(value, spec(key))}</b>{' mm' if millimetres else ''}"


def _result(summary: dict[str, Any], main: str) -> str:
    together, sites = (_part(summary, "test", key) for key in ("federated", "sites"))
    values, images = _by_site(sites, main), _number(together, "num-examples")
    overall = [key for key in _figures(summary, main) if not key.startswith("dice-")]
    found = {key: _number(together, key) for key in overall}
    numbers = ", ".join(_said(key, value) for key, value in found.items() if value is not None)
    words = ""
    if numbers:
        which = "all test images" if images is None else many(images, "test image")
        words += f"On {which} of all hospitals together the federated model reaches {numbers}. "
    if values:
        worst = _worst(values, lower(main))
        words += f"Mean {name(main)} over {many(len(values), 'hospital')}: "
        words += f"<b>{show(_mean(values))}</b>. "
        words += f"Worst hospital: {escaped(worst)}, {_said(main, values[worst])}. "
    if main == "dice" and (patient := _number(together, page.WORST_PATIENT)) is not None:
        words += f"Worst patient: {_said(main, patient)}. "
    if words and summary.get("status") != "finished":
        words += "The run did not finish: these numbers describe an unfinished model."
    words = words or "There are no test results: no model was tested in this run."
    return f'<h2>Result</h2><p class="lead">{words}</p>'


def _hospitals(summary: dict[str, Any], pens: Pens, main: str) -> str:
    if not pens:
        return "<h2>Hospitals</h2><p>No hospital is recorded in this run.</p>"
    test, columns, figures = _part(summary, "test"), list[Column](), _figures(summary, main)
    tested = _part(test, "sites")
    for split in ("train", "val", "test"):
        counts = _by_site(_part(summary, "sites"), split)
        total = show(sum(counts.values()) if counts else None, COUNT)
        columns.append(Column(split.capitalize(), counts, total, COUNT))
    for key in figures:
        total = show(_number(test.get("federated"), key), spec(key))
        columns.append(Column(page.title(key), _by_site(tested, key), total, spec(key), lower(key)))
    aucs = _by_site(tested, "auc")
    one_class = [s for s in tested if main == "auc" and _part(tested, s) and s not in aucs]
    caption = "Images per split, and the federated model on each hospital’s own test images"
    note = page.ONE_CLASS if one_class else ""
    note += "".join(page.NOTES.get(key, "") for key in figures)
    return (
        f"<h2>Hospitals</h2>{_site_table(pens, caption, columns, pens, one_class)}"
        f'<p class="note">{note}The worst hospital is looked up in each column by itself.</p>'
        f"{_by_class(summary, figures)}"
    )


def _by_class(summary: dict[str, Any], figures: list[str]) -> str:
    """Return the table of a segmentation's classes, unless the table of hospitals tells all."""
    classes, measured = _classes(summary), _measured(summary)
    found = {kind: [f"{kind}-{one}" for one in classes] for kind in page.OUTLINED}
    found = {kind: keys for kind, keys in found.items() if {*keys} & {*measured}}
    told = {*figures} >= {key for keys in found.values() for key in keys}
    if "dice" not in figures or len(classes) < 2 or told:
        return ""
    together, sites = (_part(summary, "test", key) for key in ("federated", "sites"))
    rows = []
    for one in classes:
        row = [escaped(one)]
        for key in (f"{kind}-{one}" for kind in found):
            worst = _at_worst(_by_site(sites, key), spec(key), lower(key))
            row += [show(_number(together, key), spec(key)), worst]
        rows.append(row)
    head = [text for kind in found for text in (page.title(kind), "Worst hospital")]
    return page.table("By class, all test images together", ["Class", *head], rows)


def _comparison(summary: dict[str, Any], pens: Pens, main: str) -> str:
    heading, test = "<h2>Was it worth it?</h2>", _part(summary, "test")
    local, pooled = _part(test, "local"), _part(test, "pooled")
    if not local and not pooled:
        words = "To compare with each hospital’s own model and with one trained on all data pooled"
        how = "run with <code>-c baselines=true</code>"
        return f"{heading}<p>Not measured in this run. {words}, {how}.</p>"
    parts = (local, _part(test, "sites"), _part(pooled, "sites"))
    alone, federated, central = models = [_by_site(part, main) for part in parts]
    gains = {s: federated[s] - alone[s] for s in pens if s in federated and s in alone}
    everybody = _mean(_by_site({site: _part(own, "all") for site, own in local.items()}, main))
    together, best = _number(test.get("federated"), main), _number(pooled, main)
    gain = None if everybody is None or together is None else together - everybody
    of_all, sign = f"{show(everybody)}<small>mean of all models</small>", -1 if lower(main) else 1
    columns = [
        Column("Own model alone", alone, of_all, lower=lower(main)),
        Column("Federated", federated, show(together), lower=lower(main)),
        Column("Trained on pooled data", central, show(best), lower=lower(main)),
        Column("Federated − alone", gains, show(gain, "+.3f"), "+.3f", lower(main)),
    ]
    full = [s for s in pens if all(s in column.values for column in columns if column.values)]
    note = "One run with one seed: small differences can be chance, above all on few test images."
    if len(full) < len(pens):
        note += f" Mean and worst are over the {many(len(full), 'hospital')} with every number."
    better = {s: round(sign * gain, 3) for s, gain in gains.items()}
    gained = sorted((s for s in better if better[s] > 0), key=lambda s: -sign * gains[s])
    lost = sorted((s for s in better if better[s] < 0), key=lambda s: sign * gains[s])
    some = []
    for names in (gained, lost):
        shown = ", ".join(f"{escaped(s)} {show(gains[s], '+.3f')}" for s in names[:8])
        some.append(f" ({shown}{', …' if len(names) > 8 else ''})" if names else "")
    what = f"{'a lower ' if lower(main) else ''}{name(main)}"
    words = f"Of {many(len(gains), 'hospital')} {len(gained) or 'none'} gained {what}{some[0]} and "
    words += f"{len(lost) or 'none'} lost{some[1]} against their own models alone."
    caption = f"{page.title(main)} on each hospital’s own test images"
    found = _site_table(pens, caption, columns, full, [])
    drawn = plots.dots(pens, models, page.title(main))
    return f'{heading}<p>{words}</p>{found}<p class="note">{note}</p>{drawn}'


def _pictures(summary: dict[str, Any]) -> list[dict[str, Any]]:
    found = summary.get("pictures")
    return [entry for entry in found if _part(entry)] if isinstance(found, list) else []


def _cases(summary: dict[str, Any], pens: Pens, main: str, folder: Path) -> str:
    if not (entries := _pictures(summary)):
        return ""
    words = page.CASES + (page.LINES if main == "dice" else page.HEAT)
    shown: dict[str, str] = dict.fromkeys(pens, "")
    for entry in entries:
        site = str(entry.get("site"))
        shown[site] = shown.get(site, "") + plots.case(entry, folder)
    for site, figures in shown.items():
        kept = '<p class="soft">keeps its pictures to itself</p>'
        words += f'<h3>{escaped(site)}</h3><div class="cases">{figures or kept}</div>'
    return f"<h2>Test cases</h2>{words}"


def _curves(curves: Curves, pens: Pens, main: str) -> str:
    drawn = _panel(curves, pens, "val", main, f"Validation {name(main)}")
    drawn += _panel(curves, pens, "val", "loss", "Validation loss") if main != "loss" else ""
    drawn += _panel(curves, pens, "train", "loss", "Training loss")
    if not drawn:
        return "<h2>Over the rounds</h2><p>No round has recorded a metric.</p>"
    keys = plots.keys(pens, any(site == ALL_SITES for _, _, site in curves))
    return f'<h2>Over the rounds</h2>{keys}<div class="plots">{drawn}</div>'


def _panel(curves: Curves, pens: Pens, phase: str, key: str, words: str) -> str:
    series = {site: curves.get((phase, key, site), {}) for site in (*pens, ALL_SITES)}
    together = series.pop(ALL_SITES)
    return plots.panel(pens, series, together, words, lower(key) or key == EPSILON)


def _failures(summary: dict[str, Any]) -> str:
    found = summary.get("failures")
    failures = [entry for entry in found if _part(entry)] if isinstance(found, list) else []
    if not failures:
        words = "No site failed." if isinstance(found, list) else "Failures were not recorded."
        return f"<h2>What failed</h2><p>{words}</p>"
    keys = ("round", "phase", "site", "reason")
    rows = [[escaped(entry.get(key)) for key in keys] for entry in failures[:MOST_FAILURES]]
    caption = f"{len(rows)} of {len(failures)} shown; all are in summary.json"
    return "<h2>What failed</h2>" + page.table(
        caption, map(str.capitalize, keys), rows, kind="words"
    )


def _privacy(summary: dict[str, Any], curves: Curves, pens: Pens, main: str) -> str:
    patient, hospital = (_part(summary, "privacy", unit) for unit in ("patient", "hospital"))
    private = patient.get("private-metrics") is True
    sent = (page.OPEN, page.COUNTED) if main != "dice" else (page.OUTLINES, page.COUNTED_OUTLINES)
    words = page.PICTURES if _pictures(summary) else page.NO_PICTURE
    words = page.LEAVES.format(words, sent[private])
    if not patient and not hospital:
        return words + page.UNPROTECTED
    if hospital:
        cost = show(_number(hospital, "epsilon"))
        words += page.HOSPITAL.format(epsilon=cost, delta=escaped(hospital.get("delta")))
    if not patient:
        return words + page.NO_PATIENT
    sites = _part(patient, "sites")
    costs = _by_site(sites, "epsilon")
    counts = [_by_site(sites, key) for key in ("rounds", "declined")]
    rows = []
    for site in pens:
        shown = [show(n.get(site), COUNT) for n in counts]
        rows.append([pens[site][2], show(costs.get(site)), *shown])
    most = show(max(costs.values(), default=None))
    target, delta = (escaped(patient.get(key)) for key in ("target-epsilon", "delta"))
    words += page.PATIENT.format(epsilon=most, target=target, delta=delta)
    words += page.NOISED if private else page.EXACT
    if _part(summary, "config").get("baselines") is True:
        words += page.COMPARED
    head = ["Hospital", "Epsilon per patient", "Rounds trained", "Rounds declined"]
    told = page.table("This run, as each hospital last told it", head, rows)
    drawn = _panel(curves, pens, "train", EPSILON, "Epsilon per patient")
    return f'{words}{told}<div class="plots">{drawn}</div>'


def _making(summary: dict[str, Any]) -> str:
    facts = {key: summary.get(key) for key in ("data", "strategy", "engine", "seed")}
    seconds = _number(summary, "seconds")
    facts["duration"] = None if seconds is None else f"{timedelta(seconds=round(seconds))} h:min:s"
    parts = {"Run": facts, "Settings": _part(summary, "config")}
    tables = ""
    for heading, part in (parts | {"Versions": _part(summary, "versions")}).items():
        rows = [map(escaped, row) for row in part.items()]
        tables += page.table(heading, ("Name", "Value"), rows, kind="words") if rows else ""
    return f'<h2>How it was made</h2><div class="plots">{tables}</div>'
