"""The parts of a report that compare: models with each other, and groups of patients."""

from __future__ import annotations

from typing import Any

from fedmed_flower.metrics.names import in_groups, lower_is_better
from fedmed_flower.metrics.outcomes import gaps
from fedmed_flower.reports import frame, plots
from fedmed_flower.reports.frame import DASH, count_of, escaped, format_of, format_value, name
from fedmed_flower.reports.plots import Pens
from fedmed_flower.reports.summary import (
    COUNT,
    Column,
    at_worst,
    by_site,
    mean,
    nested,
    number,
    of_all,
    site_table,
)

_TO_COMPARE = """<p>{}To compare with each hospital’s own model and with one trained on all data
pooled, run with <code>-c baselines=true</code>.</p>"""
_CHANCE = "One run with one seed: small differences can be chance, above all on few test records."
_BEFORE_AFTER = """<p class="note">Each figure is {}, or where the hospital’s validation records
leave it undefined the next figure that they have.</p>"""


def models(summary: dict[str, Any], styles: Pens, main: str) -> str:
    """Return the section on what the federated model is held against."""
    heading, test = "<h2>Was it worth it?</h2>", nested(summary, "test")
    local, pooled, personal = (nested(test, key) for key in ("local", "pooled", "personal"))
    baselines = bool(local or pooled)
    if not baselines:
        heading += _TO_COMPARE.format("" if personal else "Not measured in this run. ")
    if not baselines and not personal:
        return heading
    parts = (local, nested(test, "sites"), personal, nested(pooled, "sites"))
    alone, federated, tuned, central = (by_site(own, main) for own in parts)
    gains, changes = _differences(federated, alone), _differences(tuned, federated)
    together = number(test.get("federated"), main)
    everybody = mean(by_site({site: nested(own, "all") for site, own in local.items()}, main))
    gain = None if everybody is None or together is None else together - everybody
    of_alone = f"{format_value(everybody)}<small>mean of all models</small>"
    lower = lower_is_better(main)
    columns = [
        Column("Own model alone", alone, of_alone, lower=lower),
        Column("Federated", federated, of_all(test.get("federated"), main), lower=lower),
        Column("Fine-tuned at the hospital", tuned, format_value(None), lower=lower),
        Column("Trained on pooled data", central, of_all(pooled, main), lower=lower),
        Column("Federated − alone", gains, format_value(gain, "+,.3f"), "+,.3f", lower),
        Column("Fine-tuned − federated", changes, format_value(None), "+,.3f", lower),
    ]
    # A model may have no number at any hospital and yet one on all records together.
    columns = [one for one in columns if one.values or not one.together.startswith(DASH)]
    full = [s for s in styles if all(s in one.values for one in columns if one.values)]
    names, crowd = {site: pen[2] for site, pen in styles.items()}, len(styles) > frame.MANY
    note = _CHANCE
    if len(full) < len(styles):
        rows = "Mean, quartiles" if crowd else "Mean"
        note += (
            f" {rows} and worst are over the {count_of(len(full), 'hospital')} with every number."
        )
    words = f"<p>{_gained(gains, main)}</p>" if gains else ""
    title = frame.title(main)
    table = site_table(names, f"{title} on each hospital’s own test records", columns, full)
    reached = [alone, federated, tuned, central]
    if crowd:
        same = [{site: values[site] for site in full if site in values} for values in reached]
        drawn = plots.spreads(same, title, lower_is_better(main))
    else:
        drawn = plots.dots(styles, reached, title)
    fine_tuned = _fine_tuned(personal, changes, names, main) if personal else ""
    return f'{heading}{words}{table}<p class="note">{note}</p>{drawn}{fine_tuned}'


def _differences(values: dict[str, float], others: dict[str, float]) -> dict[str, float]:
    return {site: value - others[site] for site, value in values.items() if site in others}


def _sides(differences: dict[str, float], main: str) -> tuple[list[str], list[str]]:
    """Return who is better and who is worse, as far as the page shows it, the most first."""
    sign = -1 if lower_is_better(main) else 1
    shown = {site: sign * round(value, 3) for site, value in differences.items()}
    better = sorted((s for s in shown if shown[s] > 0), key=lambda s: -sign * differences[s])
    worse = sorted((s for s in shown if shown[s] < 0), key=lambda s: sign * differences[s])
    return better, worse


def _gained(gains: dict[str, float], main: str) -> str:
    gained, lost = _sides(gains, main)
    some = []
    for names in (gained, lost):
        shown = ", ".join(f"{escaped(s)} {format_value(gains[s], '+,.3f')}" for s in names[:8])
        some.append(f" ({shown}{', …' if len(names) > 8 else ''})" if names else "")
    what = f"{'a lower ' if lower_is_better(main) else ''}{name(main)}"
    words = (
        f"Of {count_of(len(gains), 'hospital')} {len(gained) or 'none'} gained {what}{some[0]} and "
    )
    return f"{words}{len(lost) or 'none'} lost{some[1]} against their own models alone."


def _fine_tuned(
    personal: dict[str, Any], changes: dict[str, float], names: dict[str, str], main: str
) -> str:
    """Return what fine-tuning did, on the validation records that it was judged by and on test."""
    before, after, kept = (
        by_site(personal, key) for key in ("val-global", "val-own", "personal-epochs")
    )
    count = sum(passes > 0 for passes in kept.values())
    words = f"The federated model was fine-tuned at {count_of(len(personal), 'hospital')}: "
    words += f"{count or 'none'} kept the result, {len(kept) - count or 'none'} the federated "
    words += "model. A hospital keeps what is best on its validation records, so that by "
    words += "construction none is worse there. "
    if changes:
        better, worse = _sides(changes, main)
        equal = len(changes) - len(better) - len(worse)
        words += f"On the test records what it kept is better at {len(better) or 'none'}, equal at "
        words += f"{equal or 'none'} and worse at {len(worse) or 'none'} of "
        words += f"{count_of(len(changes), 'hospital')} (mean change of {name(main)} "
        words += f"<b>{format_value(mean(changes), '+,.3f')}</b>)."
    lower = lower_is_better(main)
    columns = [
        Column("Federated", before, lower=lower),
        Column("Fine-tuned", after, lower=lower),
        Column("Change", _differences(after, before), spec="+,.3f", lower=lower),
        Column("Passes kept", kept, spec=COUNT),
    ]
    own = {site: named for site, named in names.items() if site in personal}
    table = site_table(own, "On each hospital’s own validation records", columns, own)
    note = _BEFORE_AFTER.format(name(main))
    return f"<h3>Fine-tuned at the hospital</h3><p>{words}</p>{table}{note}"


def groups(summary: dict[str, Any], main: str) -> str:
    """Return the section on groups of patients; nothing if figures were not told by group."""
    test = nested(summary, "test")
    federated = nested(test, "federated")
    shown = {key: value for key in federated if (value := number(federated, key)) is not None}
    together = {group: own for group, own in in_groups(shown).items() if group}
    if not together:
        return ""
    sites = {site: in_groups(nested(own)) for site, own in nested(test, "sites").items()}
    frame.require_small(len(together), len(sites))
    chosen = dict.fromkeys((main, *frame.GROUPED))
    keys = [key for key in chosen if any(key in own for own in together.values())]
    head = [text for key in keys for text in (frame.title(key), "Worst hospital")]
    reported, section = gaps(shown), "<h2>By group</h2>"
    for column in dict.fromkeys(_column(group) for group in together):
        rows = []
        for group in sorted((g for g in together if _column(g) == column), key=_place):
            own = {site: nested(parts, group) for site, parts in sites.items()}
            records = format_value(number(together[group], "num-examples"), COUNT)
            telling = format_value(len(by_site(own, "num-examples")), COUNT)
            row = [escaped(group.partition("=")[2]), records, telling]
            for key in keys:
                worst = at_worst(by_site(own, key), format_of(key), lower_is_better(key))
                row += [of_all(together[group], key, format_of(key)), worst]
            rows.append(row)
        title = escaped(column)
        names = [title, "Records", "Hospitals", *head]
        section += frame.table(f"By {title}, all test records together", names, rows)
        apart = {key: reported[f"{key}@{column}"] for key in keys if f"{key}@{column}" in reported}
        if apart:
            words = [
                f"in {name(key)} by <b>{format_value(gap, format_of(key))}</b>"
                for key, gap in apart.items()
            ]
            section += f"<p>Best and worst group of {title} differ {', '.join(words)}.</p>"
    return f'{section}<p class="note">{frame.GROUPS}</p>'


def _column(group: str) -> str:
    return group.removeprefix("@").partition("=")[0]


def _place(group: str) -> tuple[int, str]:
    """Return what sorts groups: bands from below to above, numbers by their size."""
    value = group.partition("=")[2]
    rank = {"<": 0, ">": 2}.get(value[:1], 1)
    return rank, frame.natural(value)
