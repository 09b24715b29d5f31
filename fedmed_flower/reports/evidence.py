"""The sections of a report on the test: intervals of each hospital, curves, confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

from fedmed_flower.data.pictures import PALETTE
from fedmed_flower.reports import frame, plots
from fedmed_flower.reports.charts import Axis, Chart, axis
from fedmed_flower.reports.frame import COUNT, DASH, count_of, escaped, format_of, format_value
from fedmed_flower.reports.plots import Styles
from fedmed_flower.reports.tested import Curve, Estimate, Estimates, Tested

_FOREST = "How the hospitals compare, each on its own test records"
_INTERVALS = """Lines are 95% intervals: how far chance alone could move the number with other test
records of the same hospital. They follow from counts (DeLong for the AUC, Wilson for shares), as if
each record were of another patient; with several records a patient they are too narrow. The dashed
line is that of all records together."""
_POINTS = """The dashed line is that of all records together. Intervals are not shown: they do not
follow from what the hospitals sent."""
_NOISED_POINTS = """The dashed line is that of all records together. The counts behind these numbers
carry noise that protects patients, so no interval is shown: one from noised counts would be too
narrow."""
_NOISED = """The counts carry noise that protects patients. It was taken out as far as all hospitals
together allow; what is left moves these curves. They have no intervals."""
_READ = {
    "roc": "Each point is a threshold: how many records with the class it finds, against how many "
    "without it that it takes for one. The dashed line is chance.",
    "precision": "Each point is a threshold: how many of its alarms are right, against how many "
    "records with the class it finds. The dashed line is chance.",
    "calibration": "On the dashed line, what is predicted with 30% comes true in 30%.",
    "benefit": "Of 100 records so many right alarms, less the false ones as the threshold weighs "
    "them: at 0.1 nine false alarms are as bad as one missed. Solid: alarms of the model; dashed: "
    "an alarm for every record; at 0: none.",
}
_SHARE = (0.0, 1.0)
# More classes do not fit on a page.
_MOST_CLASSES = 40
_MARKED = 0.5


def forest(listed: Sequence[Estimates], styles: Styles, noised: bool) -> str:
    """Return a table that draws metrics of each hospital with their intervals."""
    listed = [each for each in listed if each.sites]
    if not listed:
        return ""
    ends = [_ends(each) for each in listed]
    head = ["Hospital"]
    for each, (low, high) in zip(listed, ends, strict=True):
        spec = format_of(each.metric)
        ticks = f"<span>{format_value(low, spec)}</span><span>{format_value(high, spec)}</span>"
        head.append(f'{frame.title(each.metric)}<span class="range">{ticks}</span>')
    rows = [
        [
            style.key,
            *(
                _cell(each.sites.get(site), each, ends, style.css)
                for each, ends in zip(listed, ends, strict=True)
            ),
        ]
        for site, style in styles.items()
    ]
    total = [_cell(each.total, each, e, "all") for each, e in zip(listed, ends, strict=True)]
    has_interval = any(e.interval for each in listed for e in each.sites.values())
    table = frame.table(
        _FOREST, head, rows, [["All records together", *total]], kind="forest", sites=[*styles]
    )
    note = _INTERVALS if has_interval else _NOISED_POINTS if noised else _POINTS
    folded = frame.folded(table, len(styles), ", drawn")
    return f'{folded}<p class="note">{note}</p>'


def _ends(estimates: Estimates) -> tuple[float, float]:
    """Return the ends of the scale on which a metric is drawn."""
    known = [*estimates.sites.values(), *([estimates.total] if estimates.total else [])]
    values = [value for each in known for value in (each.value, *(each.interval or ()))]
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    bounded = low >= 0 and high <= 1
    return (max(0.0, low - room), min(1.0, high + room)) if bounded else (low - room, high + room)


def _cell(
    estimate: Estimate | None, estimates: Estimates, ends: tuple[float, float], css: str
) -> str:
    if estimate is None:
        return DASH
    low, high = ends

    def across(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.1f}"

    spec = format_of(estimates.metric)
    drawn = ""
    total = estimates.total
    if total is not None:
        drawn += _path("rule", f"M{across(total.value)} 0V12")
    shown = format_value(estimate.value, spec)
    if estimate.interval is not None:
        start, end = estimate.interval
        drawn += _path("w", f"M{across(start)} 6H{across(end)}")
        shown += f" <small>{format_value(start, spec)} to {format_value(end, spec)}</small>"
    drawn += _path("p", f"M{across(estimate.value)} 6h0")
    drawing = (
        f'<svg class="{css}" viewBox="0 0 100 12" preserveAspectRatio="none" aria-hidden="true">'
        f"{drawn}</svg>"
    )
    return drawing + shown


def _path(css: str, path: str) -> str:
    # The drawing is stretched to the width of its cell, its lines are not.
    return f'<path class="{css}" vector-effect="non-scaling-stroke" d="{path}"/>'


def curves(tested: Tested | None, styles: Styles) -> str:
    """Return the section on how well the classes are told apart; empty without counts."""
    if tested is None:
        return ""
    notes = []
    if tested.noised and tested.roc:
        notes.append(_NOISED)
    if tested.missing:
        reason = escaped(tested.missing)
        notes.append(f"There is no curve of all records together: {reason}.")
    if tested.coarse and not tested.missing:
        notes.append(f"No curve: {escaped(', '.join(tested.coarse))}.")
    chosen = " Of the class that the model chose." if len(tested.classes) > 2 else ""
    drawn = "".join(
        (
            _figure("ROC curve", _roc(tested, styles), _READ["roc"]) if tested.roc else "",
            _figure("Precision and recall", _precision(tested, styles), _READ["precision"])
            if tested.precision_recall
            else "",
            _figure("Calibration", _calibration(tested), _READ["calibration"] + chosen)
            if tested.calibration
            else "",
            _figure("Net benefit", _benefit(tested), _READ["benefit"])
            if tested.net_benefit
            else "",
        )
    )
    matrix = _confusion(tested)
    if not drawn and not matrix:
        return ""
    of_class = ""
    is_binary = len(tested.classes) == 2
    if is_binary:
        of_class = f"<p>Scores and curves are of the class “{escaped(tested.classes[1])}”.</p>"
    said = "".join(f'<p class="note">{note}</p>' for note in notes)
    keys = _keys(tested, styles) if drawn else ""
    return (
        f"<h2>How well it tells the classes apart</h2>{of_class}{keys}"
        f'<div class="plots">{drawn}{matrix if is_binary else ""}</div>{said}'
        f"{'' if is_binary else matrix}"
    )


def _figure(title: str, chart: Chart, note: str) -> str:
    caption = f"<figcaption><b>{title}</b></figcaption>"
    return f'<figure>{caption}{chart.svg()}<p class="note">{note}</p></figure>'


def _css(curve: Curve, number: int, styles: Styles) -> str:
    if curve.site is not None:
        style = styles.get(curve.site)
        return style.css if style and style.css != "crowd" else "faint"
    if curve.name == "all together":
        return "all"
    return f"s{number}" if number < len(PALETTE) else "crowd"


def _keys(tested: Tested, styles: Styles) -> str:
    sites = {curve.site for curve in tested.roc if curve.site is not None}
    listed = [style.key for site, style in styles.items() if site in sites]
    if len(styles) > len(PALETTE):
        listed = [f"{plots.line('crowd')}a hospital each"] if sites else []
    others = [curve for curve in tested.roc if curve.site is None]
    listed += [
        plots.line(_css(curve, number, styles)) + escaped(curve.name)
        for number, curve in enumerate(others)
    ]
    return plots.legend(listed) if listed else ""


def _lines(chart: Chart, drawn: Sequence[Curve], styles: Styles) -> None:
    for number, curve in enumerate(drawn):
        chart.line(curve.name, curve.points, _css(curve, number, styles), site=curve.site)


def _share(title: str) -> Axis:
    return axis(title, (), _SHARE)


def _roc(tested: Tested, styles: Styles) -> Chart:
    x = _share("false positive rate")
    chart = Chart("ROC curves", x, _share("sensitivity"), 300)
    chart.rule((0, 0), (1, 1))
    _lines(chart, tested.roc, styles)
    return chart


def _precision(tested: Tested, styles: Styles) -> Chart:
    chart = Chart("Precision and recall", _share("recall"), _share("precision"), 300)
    if tested.prevalence is not None:
        chart.rule((0, tested.prevalence), (1, tested.prevalence))
    _lines(chart, tested.precision_recall, styles)
    return chart


def _calibration(tested: Tested) -> Chart:
    chart = Chart("Calibration", _share("predicted probability"), _share("came true"), 300)
    chart.rule((0, 0), (1, 1))
    for each in tested.calibration:
        if each.interval is not None:
            chart.whisker(each.predicted, *each.interval, "all")
    more = []
    for each in tested.calibration:
        text = count_of(each.rows, "record")
        if each.interval is not None:
            low, high = each.interval
            text += f", 95% interval {format_value(low)} to {format_value(high)}"
        more.append(text)
    points = [(each.predicted, each.observed) for each in tested.calibration]
    chart.line("all together", points, "all", more=more, joined=False)
    return chart


def _benefit(tested: Tested) -> Chart:
    by_model, by_all = tested.net_benefit
    values = [100 * value for _, value in (*by_model.points, *by_all.points)]
    y = axis("net benefit of 100", [*values, 0.0])
    chart = Chart("Net benefit", _share("threshold"), y, 300)
    chart.rule((0, 0), (1, 0))
    for curve, css in ((by_all, "crowd"), (by_model, "all")):
        points = [(threshold, 100 * value) for threshold, value in curve.points]
        if points:
            chart.line(curve.name, points, css, dashed=css == "crowd", spec=".1f")
    return chart


def _confusion(tested: Tested) -> str:
    """Return the confusion matrix of all hospitals; empty if a part of it is not known."""
    if tested.confusion is None or len(tested.classes) > _MOST_CLASSES:
        return ""
    head = ["True class", *(f"called {escaped(name)}" for name in tested.classes)]
    lines = []
    for name, row in zip(tested.classes, tested.confusion, strict=True):
        total = sum(row)
        cells = []
        for value in row:
            share = value / total if total else 0.0
            marked = ' class="q"' if share >= _MARKED else ""
            cells.append(f"<td{marked}>{format_value(value, COUNT)}<small>{share:.0%}</small></td>")
        lines.append(f'<tr><th scope="row">{escaped(name)}</th>{"".join(cells)}</tr>')
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    caption = "Confusion matrix, test records of all hospitals; shares are of a true class"
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="{caption}">'
        f'<table class="confusion fixed"><caption>{caption}</caption><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
