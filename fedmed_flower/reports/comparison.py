"""The sections of a report that compare: models with each other, and groups of patients."""

from __future__ import annotations

from fedmed_flower.metrics.names import lower_is_better
from fedmed_flower.reports import frame, plots
from fedmed_flower.reports.contents import Cell, Comparison, FineTuned, Groups
from fedmed_flower.reports.frame import COUNT, count_of, escaped, format_of, format_value, name
from fedmed_flower.reports.plots import Styles
from fedmed_flower.reports.summary import mean
from fedmed_flower.reports.tables import site_table, total_cell, worst_cell
from fedmed_flower.reports.worth import Gain, in_words

_HEADING = "<h2>Was it worth it?</h2>"
_TO_COMPARE = """<p>{}To compare with each hospital’s own model and with one trained on all data
pooled, run with <code>-c baselines=true</code>.</p>"""
_CHANCE = "One run with one seed: small differences can be chance, above all on few test records."
_BEFORE_AFTER = """<p class="note">Each metric is {}, or, if the hospital’s validation records
leave it undefined, the next metric that they have.</p>"""
_CAUTIOUS = """ A difference is put down to chance if its 95% interval holds 0. The interval takes
the two models to be tested on different records, which is cautious. Of twenty hospitals where the
models are equally good, one may still seem to differ."""
_OWN = """ Own model: what a hospital keeps and uses itself; the method of this run makes it. The
federated model is what it shares."""
_BEST = " Bold: the best figure of each hospital."
_CHANGE = "+,.3f"


def models(comparison: Comparison | None, styles: Styles, main: str) -> str:
    """Return the section on what the federated model is compared with."""
    if comparison is None:
        return _HEADING + _TO_COMPARE.format("Not measured in this run. ")
    heading = _HEADING if comparison.baselines else _HEADING + _TO_COMPARE.format("")
    gained = "".join(f"<li>{escaped(in_words(each))}</li>" for each in comparison.gains)
    if gained:
        gained = f'<p>{_by(main)}:</p><ul class="said">{gained}</ul>'
    names = {site: style.key for site, style in styles.items()}
    title = frame.title(main)
    caption = f"{title} on each hospital’s own test records"
    table = site_table(names, caption, comparison.columns, comparison.complete)
    note = f'<p class="note">{_notes(comparison, len(styles))}</p>'
    drawn = _drawn(comparison, styles, title, main)
    tuned = comparison.fine_tuned
    fine_tuned = "" if tuned is None else _fine_tuned(tuned, names, main)
    return heading + gained + table + note + drawn + fine_tuned


def _by(main: str) -> str:
    better = "lower" if lower_is_better(main) else "higher"
    return f"By {name(main)} on each hospital’s own test records ({better} is better)"


def _notes(comparison: Comparison, count: int) -> str:
    tuned = comparison.fine_tuned
    told = [*comparison.gains, *([tuned.gain] if tuned is not None and tuned.gain else [])]
    note = _CHANCE
    if any(_is_known(each) for each in told):
        note += _CAUTIOUS
    if comparison.has_own:
        note += _OWN
    if sum(column.ranked for column in comparison.columns) > 1:
        note += _BEST
    return note + _left_out(comparison, count)


def _is_known(gain: Gain) -> bool:
    """Return whether it is known of a hospital what chance can make."""
    return any(gain.known)


def _left_out(comparison: Comparison, count: int) -> str:
    """Return the sentence that names the rows which leave out hospitals, if any do."""
    complete = len(comparison.complete)
    if complete == count:
        return ""
    rows = "Mean, quartiles" if count > frame.MANY else "Mean"
    return f" {rows} and worst are over the {count_of(complete, 'hospital')} with every number."


def _drawn(comparison: Comparison, styles: Styles, title: str, main: str) -> str:
    """Return the drawing of the models: a row for each hospital, or their spread if many."""
    if len(styles) <= frame.MANY:
        return plots.dots(styles, comparison.models, title)
    of_complete = [
        {site: values[site] for site in comparison.complete if site in values}
        for values in comparison.models
    ]
    return plots.spreads(of_complete, title, lower_is_better(main))


def _fine_tuned(tuned: FineTuned, names: dict[str, str], main: str) -> str:
    """Return what fine-tuning did, on the validation records it was chosen by and on test."""
    words = (
        f"The federated model was fine-tuned at {count_of(len(tuned.sites), 'hospital')}: "
        f"{tuned.num_kept or 'none'} kept the result, "
        f"{tuned.num_measured - tuned.num_kept or 'none'} the federated model. "
        "A hospital keeps what is best on its validation records, so that by construction none "
        "is worse there. "
    )
    if tuned.gain is not None:
        change = format_value(mean(tuned.gain.changes), _CHANGE)
        words += f"{_by(main)}: {escaped(in_words(tuned.gain))} "
        words += f"Mean change of {name(main)}: <b>{change}</b>."
    tuned_names = {site: named for site, named in names.items() if site in tuned.sites}
    caption = "On each hospital’s own validation records"
    table = site_table(tuned_names, caption, tuned.columns, tuned_names)
    note = _BEFORE_AFTER.format(name(main))
    return f"<h3>Fine-tuned at the hospital</h3><p>{words}</p>{table}{note}"


def groups(columns: list[Groups]) -> str:
    """Return the sections on groups of patients and on findings; nothing of what there is not."""
    section = ""
    for predicted in (column for column in columns if not column.of_patients):
        title = frame.capital(f"by {predicted.column}")
        note = frame.BY_PREDICTED[predicted.column]
        section += f'<h2>{title}</h2>{_group_table(predicted)}<p class="note">{note}</p>'
    of_patients = [column for column in columns if column.of_patients]
    if not of_patients:
        return section
    tables = "".join(map(_group_table, of_patients))
    return f'{section}<h2>By group</h2>{tables}<p class="note">{frame.GROUPS}</p>'


def _group_table(groups: Groups) -> str:
    title = escaped(groups.column)
    head = [title, "Records", *(["Hospitals"] if groups.apart else [])]
    head += metric_heads(groups.metrics, groups.apart)
    rows = []
    for group in groups.groups:
        row = [escaped(group.value), format_value(group.records, COUNT)]
        row += [format_value(group.num_sites, COUNT)] if groups.apart else []
        rows.append([*row, *metric_cells(group.cells, groups.apart)])
    table = frame.table(f"By {title}, all test records together", head, rows)
    if not groups.gaps:
        return table
    differences = ", ".join(
        f"in {name(key)} by <b>{format_value(gap, format_of(key))}</b>"
        for key, gap in groups.gaps.items()
    )
    return f"{table}<p>Best and worst group of {title} differ {differences}.</p>"


def metric_heads(metrics: list[str], apart: bool = True) -> list[str]:
    """Return the heads of `metric_cells`."""
    worst_of = ["Worst hospital"] if apart else []
    return [text for key in metrics for text in (frame.title(key), *worst_of)]


def metric_cells(cells: list[Cell], apart: bool = True) -> list[str]:
    """Return for each metric two cells: of all hospitals together, and the worst hospital.

    The second is left out if figures of single hospitals are not known (`apart`).
    """
    texts = []
    for cell in cells:
        spec = format_of(cell.key)
        texts.append(total_cell(cell.total, spec))
        if apart:
            texts.append(worst_cell(cell.by_site, spec, lower_is_better(cell.key)))
    return texts
