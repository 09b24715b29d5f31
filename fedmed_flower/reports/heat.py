"""The tables of each model at each hospital, as HTML: heat maps that are tables."""

from __future__ import annotations

from typing import NamedTuple

from fedmed_flower.files import CROSS_SITES
from fedmed_flower.metrics.names import lower_is_better
from fedmed_flower.reports import frame
from fedmed_flower.reports.crossed import (
    AT_HOME,
    LEVELS,
    NO_ANSWER,
    NOT_TRAINED,
    Crossed,
    Group,
    Model,
)
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
_STAYED = """A model that a hospital keeps for itself is tested elsewhere in a simulation only; if
it could not be sent there, the log says why. """


class _Words(NamedTuple):
    """What models of a kind are called.

    Attributes
    ----------
    one
        One of them in a sentence, of all of which it says the mean.
    such
        The same if it has been named.
    many
        All of them in a title.
    head
        Before the name of a hospital.
    mark
        What tells the rows of this table from those of the first one; empty for the first.
    """

    one: str
    such: str
    many: str
    head: str
    mark: str = ""


_WORDS = {
    "local": _Words(
        one="a model that one hospital has trained alone",
        such="such a model",
        many="models trained at one hospital alone",
        head="Trained alone at",
    ),
    "own": _Words(
        one="a hospital's own model",
        such="an own model",
        many="hospitals' own models",
        head="Own model of",
        mark=" (own model)",
    ),
    "personal": _Words(
        one="a model that a hospital has fine-tuned",
        such="a fine-tuned model",
        many="fine-tuned models",
        head="Fine-tuned at",
        mark=" (fine-tuned model)",
    ),
}


def models_at_hospitals(crossed: Crossed | None, styles: Styles) -> str:
    """Return what each model reaches at each hospital; empty if the run has no such table."""
    if crossed is None:
        return ""
    lead = f"<p>{_in_a_sentence(crossed)}</p>"
    if max(len(crossed.sites), *(len(group.models) for group in crossed.groups)) > frame.MANY:
        note = f'<p class="note">{_MANY}<code>{CROSS_SITES}</code> in the run folder.</p>'
        spreads = "".join(_spread(crossed, group, styles) for group in crossed.groups)
        return f"{_HEADING}{lead}{spreads}{note}"
    is_many = len(crossed.sites) > frame.ROOMY
    note = _HOW + _missing(crossed) + (_ROUNDED if is_many else "") + _WHOLE
    tables = "".join(_heat(crossed, group, styles, is_many) for group in crossed.groups)
    return f'{_HEADING}{lead}{_scale(crossed)}{tables}<p class="note">{note}</p>'


def _in_a_sentence(crossed: Crossed) -> str:
    """Return what models reach at home and elsewhere, on average."""
    federated = next((model.values for model in crossed.others if model.is_federated), {})
    means = {}
    for group in crossed.groups:
        words = _WORDS[group.kind]
        means[f"{words.one} reaches {{}} there on average"] = mean(group.at_home())
        means[f"at another hospital {words.such} reaches {{}}"] = mean(group.mean_elsewhere())
    means["the federated model reaches {}"] = mean(federated)
    spec = format_of(crossed.metric)
    parts = [
        said.format(f"<b>{format_value(value, spec)}</b>")
        for said, value in means.items()
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


def _heat(crossed: Crossed, group: Group, styles: Styles, is_many: bool) -> str:
    """Return the table of a group; that of the first one ends with the models of all hospitals."""
    is_first = group is crossed.groups[0]
    words = _WORDS[group.kind]
    top = "".join(f'<th scope="col"><span>{escaped(site)}</span></th>' for site in crossed.sites)
    rows = [
        f'<tr data-site="{escaped(model.name)}"><th scope="row">{styles[model.name].key}</th>'
        f"{_cells(crossed, model, is_many, model.name)}</tr>"
        for model in group.models
    ]
    others = [
        f'<tr><th scope="row">{model.name}</th>{_cells(crossed, model, is_many)}</tr>'
        for model in crossed.others
        if is_first
    ]
    foot = f"<tfoot>{''.join(others)}</tfoot>" if others else ""
    models = "each model" if is_first else words.many
    title = f"{frame.title(crossed.metric)} of {models} on the test records of each hospital"
    kind = "heat many" if is_many else "heat"
    return frame.wide(
        f'<table class="{kind}"><caption>{title}</caption><thead><tr><th scope="col">{words.head}'
        f"</th>{top}</tr></thead><tbody>{''.join(rows)}</tbody>{foot}</table>",
        title,
    )


def _cells(crossed: Crossed, model: Model, is_many: bool, home: str | None = None) -> str:
    """Return a row's cells; `home` is the hospital whose model it is, if it is of one."""
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
        if site == home:
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
    rows: dict[str, list[str]] = {}
    for group in crossed.groups:
        for model in group.models:
            why = AT_HOME if model.stayed else "" if model.values else NOT_TRAINED
            rows.setdefault(why, []).append(f"{model.name}{_WORDS[group.kind].mark}")
    notes += [
        f"{DASH} in the row of {escaped(', '.join(names))}: {why}. "
        for why, names in rows.items()
        if why
    ]
    if crossed.has_gaps:
        notes.append(f"{DASH} {'elsewhere' if notes else 'in a cell'}: {NO_ANSWER}. ")
    return "".join(notes) + (_STAYED if crossed.has_stayed else "")


def _spread(crossed: Crossed, group: Group, styles: Styles) -> str:
    """Return a table with a row a model, for more hospitals than a heat map can show."""
    lower = lower_is_better(crossed.metric)
    spec = format_of(crossed.metric)
    elsewhere = group.elsewhere()
    away = group.mean_elsewhere()
    worst = {site: (max if lower else min)(values.values()) for site, values in elsewhere.items()}
    columns = [
        Column("At home", group.at_home(), spec=spec, lower=lower),
        Column(
            "Mean elsewhere",
            {s: v for s, v in away.items() if v is not None},
            spec=spec,
            lower=lower,
        ),
        Column("Worst elsewhere", worst, spec=spec, lower=lower),
    ]
    names = {model.name: styles[model.name].key for model in group.models}
    caption = f"{frame.title(crossed.metric)} of {_WORDS[group.kind].many}"
    return site_table(names, caption, columns, names)
