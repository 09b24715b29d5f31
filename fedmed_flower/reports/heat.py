"""The table of each model at each hospital, as HTML: a heat map that is a table."""

from __future__ import annotations

from fedmed_flower.files import CROSS_SITES
from fedmed_flower.metrics.names import lower_is_better
from fedmed_flower.reports import frame
from fedmed_flower.reports.crossed import LEVELS, NO_ANSWER, NOT_TRAINED, Crossed, Model
from fedmed_flower.reports.frame import DASH, escaped, format_of, format_value
from fedmed_flower.reports.plots import Styles
from fedmed_flower.reports.summary import mean
from fedmed_flower.reports.tables import Column, site_table

_HEADING = "<h3>Each model at each hospital</h3>"
_HOW = """A row is a model and where it was trained, a column the hospital whose test patients it
was tested on. Bold: the best at that hospital. Framed: a model at its own hospital. """
_MANY = f"For more than {frame.MANY} hospitals each model at each hospital is in "
_WHOLE = f"The whole table, with all metrics, is <code>{CROSS_SITES}</code> in the run folder."
_ROUNDED = "Rounded to two digits. "


def models_at_hospitals(crossed: Crossed | None, styles: Styles) -> str:
    """Return what each model reaches at each hospital; empty if the run has no such table."""
    if crossed is None:
        return ""
    lead = f"<p>{_in_a_sentence(crossed)}</p>"
    if max(len(crossed.sites), len(crossed.alone)) > frame.MANY:
        note = f'<p class="note">{_MANY}<code>{CROSS_SITES}</code> in the run folder.</p>'
        return f"{_HEADING}{lead}{_spread(crossed, styles)}{note}"
    is_many = len(crossed.sites) > frame.ROOMY
    note = _HOW + _missing(crossed) + (_ROUNDED if is_many else "") + _WHOLE
    table = _heat(crossed, styles, is_many)
    return f'{_HEADING}{lead}{_scale(crossed)}{table}<p class="note">{note}</p>'


def _in_a_sentence(crossed: Crossed) -> str:
    """Return what models reach at home and elsewhere, on average."""
    federated = next((model.values for model in crossed.others if model.is_federated), {})
    means = {
        "a model that one hospital has trained alone reaches {} there on average": mean(
            crossed.at_home()
        ),
        "at another hospital such a model reaches {}": mean(crossed.mean_elsewhere()),
        "the federated model reaches {}": mean(federated),
    }
    spec = format_of(crossed.metric)
    parts = [
        words.format(f"<b>{format_value(value, spec)}</b>")
        for words, value in means.items()
        if value is not None
    ]
    better = "lower" if lower_is_better(crossed.metric) else "higher"
    return f"{frame.title(crossed.metric)}, {better} is better: {'; '.join(parts)}."


def _scale(crossed: Crossed) -> str:
    """Return the key of the colours, from the worst to the best figure."""
    spec = format_of(crossed.metric)
    low, high = (format_value(end, spec) for end in crossed.ends)
    ends = (high, low) if lower_is_better(crossed.metric) else (low, high)
    steps = "".join(f'<i class="h{level}"></i>' for level in range(LEVELS))
    return f'<p class="scale"><span>worst {ends[0]}</span>{steps}<span>{ends[1]} best</span></p>'


def _heat(crossed: Crossed, styles: Styles, is_many: bool) -> str:
    top = "".join(f'<th scope="col"><span>{escaped(site)}</span></th>' for site in crossed.sites)
    alone = [
        f'<tr data-site="{escaped(model.name)}"><th scope="row">{styles[model.name].key}</th>'
        f"{_cells(crossed, model, is_many)}</tr>"
        for model in crossed.alone
    ]
    others = [
        f'<tr><th scope="row">{model.name}</th>{_cells(crossed, model, is_many)}</tr>'
        for model in crossed.others
    ]
    title = f"{frame.title(crossed.metric)} of each model on the test records of each hospital"
    kind = "heat many" if is_many else "heat"
    return frame.wide(
        f'<table class="{kind}"><caption>{title}</caption><thead><tr><th scope="col">Trained alone '
        f"at</th>{top}</tr></thead><tbody>{''.join(alone)}</tbody>"
        f"<tfoot>{''.join(others)}</tfoot></table>",
        title,
    )


def _cells(crossed: Crossed, model: Model, is_many: bool) -> str:
    spec = format_of(crossed.metric)
    cells = []
    for site in crossed.sites:
        value = model.values.get(site)
        if value is None:
            why = crossed.why(model, site)
            cells.append(f'<td>{DASH}<small class="hidden">{why}</small></td>')
            continue
        shown = format_value(value, spec)
        text = _short(value) if is_many else shown
        marks = []
        css = f"h{crossed.level(value)}"
        if shown == crossed.best(site):
            text = f"<b>{text}</b>"
            marks.append("best here")
        if model.name == site and model in crossed.alone:
            css += " home"
            marks.append("at home")
        said = f'<small class="hidden">{", ".join(marks)}</small>' if marks else ""
        cells.append(f'<td class="{css}" data-v="{value:.6g}">{text}{said}</td>')
    return "".join(cells)


def _short(value: float) -> str:
    """Return a figure in as few digits as tell it."""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    text = format(round(value, digits) + 0.0, f",.{digits}f").replace("-", "−")
    return text.replace("0.", ".", 1) if abs(value) < 1 and text != "0.00" else text


def _missing(crossed: Crossed) -> str:
    """Return why figures are missing, hospital by hospital."""
    by_reason: dict[str, list[str]] = {}
    for site, why in crossed.silent.items():
        by_reason.setdefault(why, []).append(site)
    notes = [
        f"{DASH} in the column of {escaped(', '.join(sites))}: {why}. "
        for why, sites in by_reason.items()
    ]
    if untrained := [model.name for model in crossed.alone if not model.values]:
        notes.append(f"{DASH} in the row of {escaped(', '.join(untrained))}: {NOT_TRAINED}. ")
    if crossed.has_gaps:
        notes.append(f"{DASH} {'elsewhere' if notes else 'in a cell'}: {NO_ANSWER}. ")
    return "".join(notes)


def _spread(crossed: Crossed, styles: Styles) -> str:
    """Return a table with a row a model, for more hospitals than a heat map can show."""
    lower = lower_is_better(crossed.metric)
    spec = format_of(crossed.metric)
    elsewhere = crossed.elsewhere()
    away = crossed.mean_elsewhere()
    worst = {site: (max if lower else min)(values.values()) for site, values in elsewhere.items()}
    columns = [
        Column("At home", crossed.at_home(), spec=spec, lower=lower),
        Column(
            "Mean elsewhere",
            {s: v for s, v in away.items() if v is not None},
            spec=spec,
            lower=lower,
        ),
        Column("Worst elsewhere", worst, spec=spec, lower=lower),
    ]
    names = {model.name: styles[model.name].key for model in crossed.alone}
    caption = f"{frame.title(crossed.metric)} of models trained at one hospital alone"
    return site_table(names, caption, columns, names)
