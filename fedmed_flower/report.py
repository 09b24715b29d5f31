"""A run folder as one page, for the clinic and for whoever answers for privacy."""

import csv
import html
import io
import json
import math
import re
import statistics
import warnings
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from fedmed_flower import page
from fedmed_flower.errors import InputError
from fedmed_flower.metrics import EPSILON
from fedmed_flower.page import FAINT, INK, PAPER, SCHEME
from fedmed_flower.runfolder import ALL_SITES, SUMMARY, write_atomic
from fedmed_flower.runfolder import METRICS as METRICS_TABLE

Curves = dict[tuple[str, str, str], dict[int, float]]  # (phase, metric, site) -> round -> value
Pens = dict[str, tuple[str, str, str]]  # site -> colour, line style, name with its key
Column = tuple[str, dict[str, float], str, str]  # title, site -> value, all together, format

DASH, COUNT, MOST_FAILURES = "–", ",.0f", 100
METRICS = {"auc": "AUC", "accuracy": "accuracy", "balanced-accuracy": "balanced accuracy"}
METRICS |= {"sensitivity": "sensitivity", "specificity": "specificity"}
STATUS = {"finished": "Finished", "failed": "Failed", "stopped": "Stopped", "running": "Running"}
COLOURS = "#0072b2 #d55e00 #009e73 #c066a0 #d99000 #3fa7dc #7a68b3 #a8743a #7f8c1d #c23b4e #1c9c9c"
PALETTE = (*COLOURS.split(), "#808080")
CROWD, WORST = "#5b7f9c", "#d55e00"
PLOTS: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "0", "text.parse_math": False}


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
    summary, curves = _read_summary(folder / SUMMARY), _read_metrics(folder / METRICS_TABLE)
    names = {*_part(summary, "sites"), *_part(summary, "test", "sites")}
    names |= {*_part(summary, "test", "local")} | {key[2] for key in curves if key[2] != ALL_SITES}
    sites = sorted(names, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(9), name))
    pens: Pens = {site: (CROWD, "-", _text(site)) for site in sites}
    if len(sites) <= len(PALETTE):
        looks = {site: (PALETTE[i], "--" if i > 5 else "-") for i, site in enumerate(sites)}
        pens = {site: (*look, _line(*look) + _text(site)) for site, look in looks.items()}
    with matplotlib.rc_context(PLOTS):
        parts = [_head(summary, pens), _result(summary), _hospitals(summary, pens)]
        parts += [_comparison(summary, pens), _curves(curves, pens), _failures(summary)]
        parts += [_privacy(summary, curves, pens), _making(summary)]
    body = "\n".join(parts)
    banner = page.BANNER if summary.get("generated") is True else ""
    text = page.PAGE.substitute(title=_text(summary.get("app") or "Run"), banner=banner, body=body)
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


def _by_site(node: dict[str, Any], key: str = "auc") -> dict[str, float]:
    values = {site: _number(part, key) for site, part in node.items()}
    return {site: value for site, value in values.items() if value is not None}


def _mean(values: dict[str, float]) -> float | None:
    return statistics.fmean(values.values()) if values else None


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    clean = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
    return DASH if value is None or value == "" else html.escape(clean)


def _show(value: float | None, spec: str = ".3f") -> str:
    return DASH if value is None else format(round(value, 3) + 0.0, spec).replace("-", "−")


def _many(count: float, noun: str) -> str:
    return f"{count:,.0f} {noun}{'' if count == 1 else 's'}"


def _line(colour: str, line: str = "-") -> str:
    path = f'<path d="M0 5H20" stroke="{colour}" stroke-width="3" stroke-dasharray="'
    path += '4 2.5"/>' if line == "--" else 'none"/>'
    return f'<svg class="key" viewBox="0 0 20 10" aria-hidden="true">{path}</svg>'


def _table(caption: str, head: Any, rows: Iterable[Any], foot: Any = (), kind: str = "") -> str:
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    line = '<tr><th scope="row">{}</th><td>{}</td></tr>\n'.format
    body, end = ("".join(line(a, "</td><td>".join(b)) for a, *b in part) for part in (rows, foot))
    table = f'<table class="{kind}"><caption>{caption}</caption><thead><tr>{top}</tr></thead>'
    return f'<div class="wide">{table}<tbody>{body}</tbody><tfoot>{end}</tfoot></table></div>'


def _site_table(pens: Pens, caption: str, columns: list[Column], sites: Any, marked: Any) -> str:
    rows, mean, worst = [], ["Mean over hospitals"], ["Worst hospital"]
    for site, pen in pens.items():
        mark = "<sup>†</sup>" if site in marked else ""
        cells = [_show(values.get(site), spec) for _, values, _, spec in columns]
        rows.append([pen[2], *(cell + mark * (cell == DASH) for cell in cells)])
    for _, everywhere, _, spec in columns:
        values = {site: everywhere[site] for site in sites if site in everywhere}
        low = min(values, key=lambda site: values[site], default="")
        name = f"<small>{_text(low)}</small>" if values else ""
        mean.append("" if spec == COUNT else _show(_mean(values), spec))
        worst.append("" if spec == COUNT else _show(values.get(low), spec) + name)
    total = ["All images together", *(together for _, _, together, _ in columns)]
    return _table(caption, ["Hospital", *(c[0] for c in columns)], rows, [mean, worst, total])


def _head(summary: dict[str, Any], pens: Pens) -> str:
    status, message = str(summary.get("status")), summary.get("message")
    date = _text(summary.get("started")).replace("T", " ")[:16]
    rounds = [_show(_number(summary, key), COUNT) for key in ("rounds", "rounds-planned")]
    facts = f"{date} · {_many(len(pens), 'hospital')} · {' of '.join(rounds)} rounds"
    return (
        f'<h1>{_text(summary.get("app") or "Run")}</h1><p class="soft">Federated run · {facts}</p>'
        f'<div class="status {status if status in STATUS else "unknown"}" role="status">'
        f"<b>{STATUS.get(status, 'Status not known')}</b>{_text(message or ' ')}</div>"
    )


def _result(summary: dict[str, Any]) -> str:
    test = _part(summary, "test")
    aucs, images = _by_site(_part(test, "sites")), _number(test.get("federated"), "num-examples")
    found = {name: _number(test.get("federated"), key) for key, name in METRICS.items()}
    numbers = ", ".join(f"{name} <b>{_show(n)}</b>" for name, n in found.items() if n is not None)
    words = ""
    if numbers:
        which = "all test images" if images is None else _many(images, "test image")
        words += f"On {which} of all hospitals together the federated model reaches {numbers}. "
    if aucs:
        worst = min(aucs, key=lambda site: aucs[site])
        words += f"Mean AUC over {_many(len(aucs), 'hospital')}: <b>{_show(_mean(aucs))}</b>. "
        words += f"Worst hospital: {_text(worst)}, AUC <b>{_show(aucs[worst])}</b>. "
    if words and summary.get("status") != "finished":
        words += "The run did not finish: these numbers describe an unfinished model."
    words = words or "There are no test results: no model was tested in this run."
    return f'<h2>Result</h2><p class="lead">{words}</p>'


def _hospitals(summary: dict[str, Any], pens: Pens) -> str:
    if not pens:
        return "<h2>Hospitals</h2><p>No hospital is recorded in this run.</p>"
    test, columns = _part(summary, "test"), list[Column]()
    tested = _part(test, "sites")
    for split in ("train", "val", "test"):
        counts = _by_site(_part(summary, "sites"), split)
        total = _show(sum(counts.values()) if counts else None, COUNT)
        columns.append((split.capitalize(), counts, total, COUNT))
    for key, name in METRICS.items():
        total = _show(_number(test.get("federated"), key))
        columns.append((name[0].upper() + name[1:], _by_site(tested, key), total, ".3f"))
    one_class = [site for site in tested if _part(tested, site) and site not in columns[3][1]]
    caption = "Images per split, and the federated model on each hospital’s own test images"
    note = "† one class only in this test set. " if one_class else ""
    return (
        f"<h2>Hospitals</h2>{_site_table(pens, caption, columns, pens, one_class)}"
        f'<p class="note">{note}AUC: how often an image with the finding is scored above one '
        "without; 0.500 is chance. The worst hospital is looked up in each column by itself.</p>"
    )


def _comparison(summary: dict[str, Any], pens: Pens) -> str:
    title, test = "<h2>Was it worth it?</h2>", _part(summary, "test")
    local, pooled = _part(test, "local"), _part(test, "pooled")
    if not local and not pooled:
        words = "To compare with each hospital’s own model and with one trained on all data pooled"
        how = "run with <code>-c baselines=true</code>"
        return f"{title}<p>Not measured in this run. {words}, {how}.</p>"
    parts = (local, _part(test, "sites"), _part(pooled, "sites"))
    alone, federated, central = models = [_by_site(part) for part in parts]
    gains = {s: federated[s] - alone[s] for s in pens if s in federated and s in alone}
    everybody = _mean(_by_site({site: _part(own, "all") for site, own in local.items()}))
    together, best = _number(test.get("federated"), "auc"), _number(pooled, "auc")
    gain = None if everybody is None or together is None else together - everybody
    columns = [
        ("Own model alone", alone, f"{_show(everybody)}<small>mean of all models</small>", ".3f"),
        ("Federated", federated, _show(together), ".3f"),
        ("Trained on pooled data", central, _show(best), ".3f"),
        ("Federated − alone", gains, _show(gain, "+.3f"), "+.3f"),
    ]
    full = [site for site in pens if all(site in column[1] for column in columns if column[1])]
    note = "One run with one seed: small differences can be chance, above all on few test images."
    if len(full) < len(pens):
        note += f" Mean and worst are over the {_many(len(full), 'hospital')} with every number."
    gained = [s for s in sorted(gains, key=lambda s: -gains[s]) if round(gains[s], 3) > 0]
    lost = [s for s in sorted(gains, key=lambda s: gains[s]) if round(gains[s], 3) < 0]
    some = []
    for names in (gained, lost):
        shown = ", ".join(f"{_text(s)} {_show(gains[s], '+.3f')}" for s in names[:8])
        some.append(f" ({shown}{', …' if len(names) > 8 else ''})" if names else "")
    words = f"Of {_many(len(gains), 'hospital')} {len(gained) or 'none'} gained AUC{some[0]} and "
    words += f"{len(lost) or 'none'} lost{some[1]} against their own models alone."
    table = _site_table(pens, "AUC on each hospital’s own test images", columns, full, [])
    return f'{title}<p>{words}</p>{table}<p class="note">{note}</p>{_dots(pens, models)}'


def _svg(axes: Any, label: str, across: str, grid: str) -> str:
    """Draw for use inside the page: no ids, no links, colours from the page's style."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(length=0, colors=INK)
    axes.grid(axis=grid, color=FAINT, linewidth=0.6)
    axes.set_xlabel(across, color=INK)
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        axes.figure.savefig(buffer, format="svg", transparent=True)
    drawing = re.sub(r"(?s)<(metadata|style).*?</\1>|(?<=<g) id=\"[^\"]*\"", "", buffer.getvalue())
    drawing = re.sub(r"(?<=: )#01020[345]", lambda found: SCHEME[found[0]], drawing)
    start, shapes = re.search(r"viewBox=\"[^\"]*\"", drawing), drawing.partition("<defs>")[2]
    return f'<svg role="img" aria-label="{label}" {start[0] if start else ""}><defs>{shapes}'


def _dots(pens: Pens, models: list[dict[str, float]]) -> str:
    sites = [site for site in pens if any(site in values for values in models)]
    axes: Any = Figure((6.2, 0.5 + 0.24 * len(sites)), layout="constrained").subplots()
    for row, site in enumerate(sites):
        own, shared, best = (values.get(site, math.nan) for values in models)
        style: dict[str, Any] = {"color": pens[site][0], "lw": 1.6, "mew": 1.5}
        axes.plot([own, shared], [row, row], "-o", **style)
        axes.plot([own], [row], "o", mfc=PAPER, **style)
        axes.plot([best], [row], "|", ms=9, **style)
    axes.set_yticks(range(len(sites)), [html.unescape(_text(site))[:24] for site in sites])
    axes.set_ylim(len(sites) - 0.4, -0.6)
    drawing = _svg(axes, "AUC of the three models", "AUC on the hospital’s own test images", "x")
    key = "<b>○</b> own model alone &emsp;<b>●</b> federated &emsp;<b>|</b> trained on pooled data"
    return f'<figure class="dots"><figcaption>{key}</figcaption>{drawing}</figure>'


def _curves(curves: Curves, pens: Pens) -> str:
    drawn = _panel(curves, pens, "val", "auc", "Validation AUC")
    drawn += _panel(curves, pens, "val", "loss", "Validation loss")
    drawn += _panel(curves, pens, "train", "loss", "Training loss")
    if not drawn:
        return "<h2>Over the rounds</h2><p>No round has recorded a metric.</p>"
    keys = [pens[site][2] for site in pens]
    if len(pens) > len(PALETTE):
        keys = ["shaded: all hospitals", f"{_line(CROWD)}median", f"{_line(WORST)}worst at the end"]
    if any(site == "all" for _, _, site in curves):
        keys.append(f"{_line('var(--soft)')}all together")
    legend = "</li><li>".join(keys)
    return f'<h2>Over the rounds</h2><ul><li>{legend}</li></ul><div class="plots">{drawn}</div>'


def _panel(curves: Curves, pens: Pens, phase: str, metric: str, title: str) -> str:
    series = {site: c for site in pens if (c := curves.get((phase, metric, site)))}
    total = curves.get((phase, metric, "all"), {})
    rounds = sorted({turn for values in (*series.values(), total) for turn in values})
    if not rounds:
        return ""
    axes: Any = Figure((3.4, 2.4), layout="constrained").subplots()
    lines, caption = [(values, *pens[site][:2]) for site, values in series.items()], ""
    if len(pens) > len(PALETTE) and series:
        spread = {t: v for t in rounds if (v := [c[t] for c in series.values() if t in c])}
        low, high = [*map(min, spread.values())], [*map(max, spread.values())]
        axes.fill_between([*spread], low, high, color=CROWD, alpha=0.25, lw=0)
        ends = {site: [*values.values()][-1] for site, values in series.items()}
        worst = (min if metric == "auc" else max)(ends, key=lambda site: ends[site])
        middle = {turn: statistics.median(values) for turn, values in spread.items()}
        lines = [(middle, CROWD, "-"), (series[worst], WORST, "-")]
        caption = f" · worst: {_text(worst)}, {_show(ends[worst])}"
    style: dict[str, Any] = {"lw": 1.4, "marker": "o" if len(rounds) <= 15 else "", "ms": 2.6}
    for values, colour, line in (*lines, (total, INK, "-")):
        axes.plot([*values], [*values.values()], line, color=colour, **style)
    axes.locator_params(axis="x", nbins=6, integer=True)
    axes.locator_params(axis="y", nbins=6)
    drawing = _svg(axes, f"{title} over {_many(len(rounds), 'round')}", "round", "y")
    return f"<figure><figcaption><b>{title}</b>{caption}</figcaption>{drawing}</figure>"


def _failures(summary: dict[str, Any]) -> str:
    found = summary.get("failures")
    failures = [entry for entry in found if _part(entry)] if isinstance(found, list) else []
    if not failures:
        words = "No site failed." if isinstance(found, list) else "Failures were not recorded."
        return f"<h2>What failed</h2><p>{words}</p>"
    keys = ("round", "phase", "site", "reason")
    rows = [[_text(entry.get(key)) for key in keys] for entry in failures[:MOST_FAILURES]]
    caption = f"{len(rows)} of {len(failures)} shown; all are in summary.json"
    table = _table(caption, map(str.capitalize, keys), rows, kind="words")
    return f"<h2>What failed</h2>{table}"


def _privacy(summary: dict[str, Any], curves: Curves, pens: Pens) -> str:
    patient, hospital = (_part(summary, "privacy", unit) for unit in ("patient", "hospital"))
    private = patient.get("private-metrics") is True
    words = page.LEAVES.format(page.COUNTED if private else page.OPEN)
    if not patient and not hospital:
        return words + page.UNPROTECTED
    if hospital:
        cost = _show(_number(hospital, "epsilon"))
        words += page.HOSPITAL.format(epsilon=cost, delta=_text(hospital.get("delta")))
    if not patient:
        return words + page.NO_PATIENT
    sites = _part(patient, "sites")
    costs = _by_site(sites, "epsilon")
    counts = [_by_site(sites, key) for key in ("rounds", "declined")]
    rows = []
    for site in pens:
        shown = [_show(n.get(site), COUNT) for n in counts]
        rows.append([pens[site][2], _show(costs.get(site)), *shown])
    most = _show(max(costs.values(), default=None))
    target, delta = (_text(patient.get(key)) for key in ("target-epsilon", "delta"))
    words += page.PATIENT.format(epsilon=most, target=target, delta=delta)
    words += page.NOISED if private else page.EXACT
    if _part(summary, "config").get("baselines") is True:
        words += page.COMPARED
    head = ["Hospital", "Epsilon per patient", "Rounds trained", "Rounds declined"]
    table = _table("This run, as each hospital last told it", head, rows)
    drawn = _panel(curves, pens, "train", EPSILON, "Epsilon per patient")
    return f'{words}{table}<div class="plots">{drawn}</div>'


def _making(summary: dict[str, Any]) -> str:
    facts = {key: summary.get(key) for key in ("data", "strategy", "engine", "seed")}
    seconds = _number(summary, "seconds")
    facts["duration"] = None if seconds is None else f"{timedelta(seconds=round(seconds))} h:min:s"
    parts = {"Run": facts, "Settings": _part(summary, "config")}
    tables = ""
    for name, part in (parts | {"Versions": _part(summary, "versions")}).items():
        rows = [map(_text, row) for row in part.items()]
        tables += _table(name, ("Name", "Value"), rows, kind="words") if rows else ""
    return f'<h2>How it was made</h2><div class="plots">{tables}</div>'
