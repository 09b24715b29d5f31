"""A run folder as one page, for the clinic and for whoever answers for privacy."""

from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import matplotlib

from fedmed_flower.data.site import some_of
from fedmed_flower.files import (
    as_input_error,
    write_atomic,
)
from fedmed_flower.metrics.counts import read_counts
from fedmed_flower.metrics.names import STALENESS, VIRTUAL_SECONDS, lower_is_better
from fedmed_flower.reports import (
    comparison,
    contents,
    evidence,
    frame,
    heat,
    plots,
    secure,
    trained,
)
from fedmed_flower.reports.contents import (
    Classes,
    Disclosure,
    Hospitals,
    Patients,
    Privacy,
    Result,
    SiteCost,
    SiteTraffic,
)
from fedmed_flower.reports.crossed import crossed
from fedmed_flower.reports.frame import (
    COUNT,
    DASH,
    count_of,
    escaped,
    format_of,
    format_value,
    name,
)
from fedmed_flower.reports.noise import MARK, TOO_LARGE, Noise, noise_of, told
from fedmed_flower.reports.plots import Styles
from fedmed_flower.reports.rounds import Curves, read_rounds
from fedmed_flower.reports.scores import of_test
from fedmed_flower.reports.summary import Total, entries, judged_by, nested, number
from fedmed_flower.reports.tables import site_table
from fedmed_flower.reports.tested import Estimates, estimates, evidence_of
from fedmed_flower.reports.words import Words, words
from fedmed_flower.reports.worth import chance_of
from fedmed_flower.server.run_folder import METRICS as METRICS_TABLE
from fedmed_flower.server.run_folder import SUMMARY, read_summary
from fedmed_flower.wire import ALL_SITES, BYTES_SAVED, EPSILON, HOSPITAL_EPSILON

MOST_FAILURES = 100
# Of a phase whose metrics are not known.
_MOST_PANELS = 4
_NO_PANEL = (
    "num-examples",
    "seconds",
    EPSILON,
    HOSPITAL_EPSILON,
    "clipping-norm",
    STALENESS,
    VIRTUAL_SECONDS,
    BYTES_SAVED,
)
_MOST_REASON = 300
# Longer lists of settings are folded away.
_MOST_SHOWN = 30
# The modules that write the pages of runs that train no model.
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
        A run folder with ``summary.json`` and, if the run got that far, ``metrics.csv``. The folder
        of a strategy that was used without `federate` has only ``metrics.csv``.

    Returns
    -------
    Path
        The page, ``folder / "report.html"``. It appears whole or not at all.

    Raises
    ------
    InputError
        If ``summary.json`` is missing, is not a JSON object or is not of a run; if ``metrics.csv``
        has a bad line; if a link leads one of them out of the folder; if one is too large.
    """
    if not (folder / SUMMARY).exists() and (folder / METRICS_TABLE).exists():
        # A strategy that the app calls itself, without `federate`, writes no summary.
        return _write(folder, {"app": folder.resolve().name})
    summary = read_summary(folder, "give the folder of a run that `fedmed run` has started")
    with as_input_error(f"{folder / SUMMARY}", "restore it from a copy"):
        return _write(folder, summary)


def _write(folder: Path, summary: dict[str, Any]) -> Path:
    if (home := _HOMES.get(str(summary.get("kind")))) is not None:
        write_page: Callable[[Path], Path] = import_module(home).write_page
        return write_page(folder)
    curves = read_rounds(folder)
    sites = _sites(summary, curves)
    styles = plots.styles(sites)
    main = judged_by(summary, {metric for phase, metric, _ in curves if phase == "val"})
    pictures = entries(summary, "pictures")
    counts = of_test(read_counts(folder), summary)
    noise = noise_of(summary, counts)
    # What follows says nothing of figures that are mere noise.
    summary = told(summary, noise)
    shows_scores = noise is None or not noise.hides_total
    judged = estimates(summary, counts, main)
    hospitals = contents.hospitals(summary, main, noise)
    num_classes = 0 if counts is None else len(counts.classes)
    others = contents.explaining(summary, main, num_classes)
    shown = [judged, *(estimates(summary, counts, key) for key in others)]
    chance = chance_of(summary, counts, main)
    epsilon = _hospital_epsilon(curves)
    with matplotlib.rc_context(plots.SETTINGS):
        sections = [
            _head(summary, len(sites)),
            _words(words(summary, counts, judged, epsilon)),
            _result(contents.result(summary, main, noise), main, shown, noise),
            _hospitals(hospitals, styles, main, shown, noise),
            _classes(contents.by_class(summary, hospitals.metrics)) if styles else "",
            evidence.curves(evidence_of(counts) if shows_scores else None, styles),
            comparison.groups(contents.groups(summary, main)),
            # Secure sums exclude models of one hospital.
            ""
            if secure.sums(summary)
            else comparison.models(contents.comparison(summary, styles, chance), styles, main),
            heat.models_at_hospitals(crossed(summary, styles, main, noise), styles),
            _curves(curves, styles, main, noise, bool(nested(summary, "test", "own"))),
            _cases(pictures, styles, main, folder),
            _failures(summary),
            _notes(summary),
            secure.section(summary),
            _disclosed(contents.disclosed(summary), bool(pictures)),
            _privacy(contents.privacy(summary, epsilon), curves, styles),
            _traffic(contents.traffic(summary), trained.saved_in_words(summary), styles),
            _making(summary),
        ]
    text = frame.page(
        title=escaped(summary.get("app") or "Run"),
        body="\n".join(sections),
        banner=frame.BANNER if summary.get("generated") is True else "",
        pictures=bool(pictures),
    )
    target = folder / "report.html"
    write_atomic(target, text.encode())
    return target


def _hospital_epsilon(curves: Curves) -> float | None:
    """Return the epsilon of the last round that `DPFedAvg` has recorded."""
    curve = curves.get(("train", HOSPITAL_EPSILON, ALL_SITES))
    return [*curve.values()][-1] if curve else None


def _sites(summary: dict[str, Any], curves: Curves) -> list[str]:
    """Return the names of all hospitals that the run folder names, in order."""
    names = {*nested(summary, "sites")}
    names |= {*nested(summary, "test", "sites")}
    for models in ("local", "own"):
        names |= {*nested(summary, "test", models)}
    names |= {site for _, _, site in curves if site != ALL_SITES}
    return sorted(names, key=frame.natural)


def _head(summary: dict[str, Any], num_sites: int) -> str:
    app = escaped(summary.get("app") or "Run")
    date = escaped(summary.get("started")).replace("T", " ")[:16]
    rounds = [format_value(number(summary, key), COUNT) for key in ("rounds", "rounds-planned")]
    facts = f"{date} · {count_of(num_sites, 'hospital')} · {' of '.join(rounds)} rounds"
    status = str(summary.get("status"))
    title = STATUS.get(status, "Status not known")
    parts = [
        *(said[:_MOST_REASON] for said in contents.course(summary)),
        summary.get("message"),
        contents.happened(summary)[:_MOST_REASON],
    ]
    message = ". ".join(escaped(part) for part in parts if part) or " "
    return (
        f'<h1>{app}</h1><p class="soft">Federated run · {facts}</p>'
        f'<div class="status {status if status in STATUS else "unknown"}" role="status">'
        f"<b>{title}</b>{message}</div><nav></nav>"
    )


def _words(said: Words) -> str:
    """Return the run in plain words; empty if there is nothing to say."""
    parts = {
        "What was trained": said.trained,
        "How good it is": said.quality,
        "Where it did worst": said.worst,
        "Who took part": said.part,
        "Privacy": said.privacy,
    }
    listed = "".join(
        f"<dt>{title}</dt><dd>{escaped(' '.join(sentences))}</dd>"
        for title, sentences in parts.items()
        if sentences
    )
    return f'<div class="words"><h2>In plain words</h2><dl>{listed}</dl></div>'


def _tiles(shown: list[Estimates], noise: Noise | None) -> str:
    """Return the metrics of all records together in large digits, with their intervals."""
    if noise is not None and noise.hides_total:
        title = frame.title(shown[0].metric)
        why = f"<small>{MARK}, which is too large to tell</small>"
        return f'<dl class="tiles"><div><dt>{title}</dt><dd><b>{DASH}</b>{why}</dd></div></dl>'
    tiles = []
    for each in shown:
        if each.total is None:
            continue
        spec = format_of(each.metric)
        interval = "" if noise is None else f"<small>{MARK}</small>"
        if each.total.interval is not None:
            low, high = (format_value(end, spec) for end in each.total.interval)
            interval = f"<small>95%: {low} to {high}</small>"
        value = format_value(each.total.value, spec)
        tiles.append(
            f"<div><dt>{frame.title(each.metric)}</dt><dd><b>{value}</b>{interval}</dd></div>"
        )
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


def _result(result: Result, main: str, shown: list[Estimates], noise: Noise | None) -> str:
    sentences = _result_sentences(result, main, noise)
    if not sentences:
        sentences = ["There are no test results: no model was tested in this run."]
    elif not result.finished:
        sentences.append("The run did not finish: these numbers describe an unfinished model.")
    return f"<h2>Result</h2>{_tiles(shown, noise)}<p>{''.join(sentences)}</p>"


def _result_sentences(result: Result, main: str, noise: Noise | None) -> list[str]:
    sentences = []
    unit = "test record" if noise is None else "test patient"
    mark = "" if noise is None else f" ({MARK})"
    if noise is not None and noise.hides_total:
        sentences.append(f"{TOO_LARGE} ")
    if result.metrics:
        records = result.records
        which = f"all {unit}s" if records is None else count_of(records, unit)
        metrics = ", ".join(_metric(key, total) for key, total in result.metrics.items())
        sentences.append(
            f"On {which} of all hospitals together the federated model reaches {metrics}{mark}. "
        )
    if result.by_site:
        count = count_of(len(result.by_site), "hospital")
        mean = format_value(result.mean, format_of(main))
        worst = _metric(main, Total(result.by_site[result.worst]))
        sentences.append(
            f"Mean {name(main)} over {count}: <b>{mean}</b>. "
            f"Worst hospital: {escaped(result.worst)}, {worst}{mark}. "
        )
    if result.worst_patient is not None:
        sentences.append(f"Worst patient: {_metric(main, Total(result.worst_patient))}{mark}. ")
    return sentences


def _metric(key: str, total: Total) -> str:
    """Return a metric's name and value in a sentence, with its bounds if it has some."""
    what, millimetres, _ = name(key).partition(" (mm)")
    text = f"{what} <b>{format_value(total.value, format_of(key))}</b>"
    if millimetres:
        text += " mm"
    if total.bounds is None:
        return text
    low, high = map(format_value, total.bounds)
    return f"{text} (between {low} and {high})"


def _hospitals(
    hospitals: Hospitals,
    styles: Styles,
    main: str,
    shown: list[Estimates],
    noise: Noise | None,
) -> str:
    if not styles:
        return "<h2>Hospitals</h2><p>No hospital is recorded in this run.</p>"
    names = {site: style.key for site, style in styles.items()}
    for site in hospitals.untrained & names.keys():
        names[site] += ' <span class="soft">tested&nbsp;only</span>'
    caption = "Records per split"
    measured = any(column.spec != COUNT for column in hospitals.columns)
    if measured:
        caption += ", and the federated model on each hospital’s own test records"
    table = site_table(names, caption, hospitals.columns, styles, hospitals.undefined)
    note = "".join(_hospital_notes(hospitals, main, noise))
    if measured:
        note += "The worst hospital is looked up in each column by itself."
    elif hospitals.metrics:
        note += "Of a secure sum no hospital’s own figures are known."
    forest = evidence.forest(shown, styles, noise is not None)
    return f'<h2>Hospitals</h2>{forest}{table}<p class="note">{note}</p>'


def _hospital_notes(hospitals: Hospitals, main: str, noise: Noise | None) -> list[str]:
    noised = frozenset() if noise is None else noise.sites
    notes = [frame.UNDEFINED[main]] if {*hospitals.undefined} - noised else []
    if noised.intersection(hospitals.undefined):
        notes.append(frame.NOISED_UNDEFINED)
    if noised and hospitals.metrics:
        notes.append(frame.COUNTED_WITH_NOISE)
    notes += [frame.NOTES.get(key, "") for key in hospitals.metrics]
    if hospitals.bounded:
        notes.append(frame.BETWEEN)
    if hospitals.untrained:
        count = count_of(len(hospitals.untrained), "hospital")
        notes.append(f"Tested only: {count} without training records. ")
    if hospitals.rejected:
        notes.append(frame.REJECTED)
    if hospitals.withheld:
        withheld = escaped(some_of(sorted(hospitals.withheld, key=frame.natural)))
        notes.append(f"{frame.WITHHELD}: {withheld}. ")
    for site, columns in hospitals.lacking.items():
        notes.append(f"{escaped(site)} has no column {escaped(', '.join(columns))}. ")
    for site, columns in hospitals.empty.items():
        notes.append(f"{escaped(site)} has no value of {escaped(', '.join(columns))}. ")
    for reason, which in hospitals.refused:
        shown = escaped(reason[:_MOST_REASON])
        notes.append(f"Could not take part: {escaped(which)} ({shown}). ")
    return notes


def _classes(classes: Classes | None) -> str:
    if classes is None:
        return ""
    head = ["Class", *comparison.metric_heads(classes.metrics, classes.apart)]
    rows = [
        [escaped(name), *comparison.metric_cells(cells, classes.apart)]
        for name, cells in classes.rows.items()
    ]
    return frame.table("By class, all test records together", head, rows)


def _cases(pictures: list[dict[str, Any]], styles: Styles, main: str, folder: Path) -> str:
    if not pictures:
        return ""
    drawn: dict[str, str] = dict.fromkeys(styles, "")
    # Each file once: named again and again, one would make a page without end.
    for picture in {str(entry.get("file")): entry for entry in pictures}.values():
        site = str(picture.get("site"))
        drawn[site] = drawn.get(site, "") + plots.case(picture, folder)
    explained = frame.LINES if main == "dice" else frame.HEAT
    silent = [site for site, cases in drawn.items() if not cases]
    counted = len(styles) > frame.MANY and bool(silent)
    parts = []
    for site, cases in drawn.items():
        if cases or not counted:
            shown = cases or '<p class="soft">keeps its pictures to itself</p>'
            title = f"<h3>{escaped(site)}</h3>"
            parts.append(f'<div>{title}<div class="cases">{shown}</div></div>')
    if counted:
        parts.append(f'<p class="soft">{count_of(len(silent), "hospital")} sent no picture.</p>')
    gallery = f'<div class="gallery">{"".join(parts)}</div>'
    return f"<h2>Test cases</h2>{frame.CASES}{explained}{gallery}"


def _curves(
    curves: Curves, styles: Styles, main: str, noise: Noise | None, of_own_models: bool
) -> str:
    panels = [_panel(curves, styles, "val", main, f"Validation {name(main)}")]
    if main != "loss":
        panels.append(_panel(curves, styles, "val", "loss", "Validation loss"))
    panels.append(_panel(curves, styles, "train", "loss", "Training loss"))
    panels += _other_panels(curves, styles, main)
    drawn = "".join(panels)
    if not drawn:
        return "<h2>Over the rounds</h2><p>No round has recorded a metric.</p>"
    sites = {site for _, _, site in curves}
    keys = plots.keys(styles if sites != {ALL_SITES} else {}, ALL_SITES in sites)
    note = "" if noise is None else frame.NOISED_ROUNDS
    note += frame.OWN_ROUNDS if of_own_models else ""
    return f'<h2>Over the rounds</h2>{keys}<div class="plots">{drawn}</div>{note}'


def _other_panels(curves: Curves, styles: Styles, main: str) -> list[str]:
    """Return panels of the server's metrics, and of a phase that has none of a known name."""
    panels = []
    for phase, title in (("val", "Validation"), ("train", "Training"), ("server", "Server")):
        keys = dict.fromkeys(metric for p, metric, _ in curves if p == phase)
        if phase != "server" and {main, "loss"} & keys.keys():
            continue
        shown = [key for key in keys if key not in _NO_PANEL][:_MOST_PANELS]
        panels += [_panel(curves, styles, phase, key, f"{title} {escaped(key)}") for key in shown]
    return panels


def _panel(
    curves: Curves, styles: Styles, phase: str, key: str, title: str, limit: float | None = None
) -> str:
    series = {site: curves.get((phase, key, site), {}) for site in (*styles, ALL_SITES)}
    together = series.pop(ALL_SITES)
    lower = lower_is_better(key) or key == EPSILON
    return plots.panel(styles, series, together, title, lower, limit)


def _failures(summary: dict[str, Any]) -> str:
    failures = entries(summary, "failures")
    if not failures:
        recorded = isinstance(summary.get("failures"), list)
        words = "No site failed." if recorded else "Failures were not recorded."
        return f"<h2>What failed</h2><p>{words}</p>"
    return f"<h2>What failed</h2>{_events(failures, 'reason')}"


def _notes(summary: dict[str, Any]) -> str:
    """Return what was noticed of sites whose replies counted; empty if there is nothing."""
    notes = entries(summary, "notes")
    return f"<h2>What else happened</h2>{_events(notes, 'text')}" if notes else ""


def _events(events: list[dict[str, Any]], words: str) -> str:
    """Return a table of events; `words` is the key under which each is described."""
    keys = ("round", "phase", "site", words)
    rows = [[escaped(event.get(key)) for key in keys] for event in events[:MOST_FAILURES]]
    caption = f"{len(rows)} of {len(events)} shown; all are in summary.json"
    return frame.table(caption, map(str.capitalize, keys), rows, kind="wordy")


def _disclosed(disclosed: list[Disclosure], pictures: bool) -> str:
    words = frame.LEFT.format(stays=frame.PICTURES if pictures else frame.NO_RECORD)
    if not disclosed:
        return words + frame.NOT_RECORDED
    rows = [
        (
            frame.REPLIED.get(entry.reply, escaped(entry.reply)),
            escaped(", ".join(entry.what)),
            frame.WAYS[entry.how],
            escaped(entry.sites),
        )
        for entry in disclosed
    ]
    head = ("When", "What", "How", "Hospitals")
    return words + frame.table("As the hospitals sent it", head, rows, kind="wordy sent")


def _privacy(privacy: Privacy, curves: Curves, styles: Styles) -> str:
    words = "<h2>Privacy</h2>"
    if privacy.hospital:
        epsilon = format_value(number(privacy.hospital, "epsilon"))
        delta = escaped(privacy.hospital.get("delta"))
        text = frame.HOSPITAL if privacy.by_server else frame.HOSPITALS
        words = text.format(epsilon=epsilon, delta=delta)
    if privacy.patients is not None:
        return words + _patients(privacy.patients, curves, styles)
    return words + frame.NO_PATIENT if privacy.hospital else frame.UNPROTECTED


def _patients(patients: Patients, curves: Curves, styles: Styles) -> str:
    words = frame.PATIENT.format(
        epsilon=format_value(patients.most),
        target=escaped(patients.target_epsilon),
        delta=escaped(patients.delta),
    )
    words += frame.SHARED if patients.shared else ""
    words += frame.NOISED if patients.noised else frame.EXACT
    if patients.baselines:
        words += frame.COMPARED
    rows = []
    for site, style in styles.items():
        cost = patients.by_site.get(site, SiteCost(None, None, None))
        rounds = format_value(cost.rounds, COUNT)
        declined = format_value(cost.declined, COUNT)
        rows.append([style.key, format_value(cost.epsilon), rounds, declined])
    head = ["Hospital", "Epsilon per patient", "Rounds trained", "Rounds declined"]
    table = frame.table("This run, as each hospital last reported it", head, rows)
    folded = frame.folded(table, len(styles))
    target = number({"epsilon": patients.target_epsilon}, "epsilon")
    drawn = _panel(curves, styles, "train", EPSILON, "Epsilon per patient", target)
    note = frame.SPENT if drawn and target is not None else ""
    return f'{words}{folded}<div class="plots">{drawn}</div>{note}'


def _traffic(traffic: dict[str, SiteTraffic], saved: list[str], styles: Styles) -> str:
    words = f"<p>{' '.join(saved)}</p>" if saved else ""
    if not traffic:
        return f"<h2>Traffic</h2>{words}" if saved else ""
    rows = []
    for site, style in styles.items():
        part = traffic.get(site, SiteTraffic(None, None, None, None))
        sizes = [format_value(size, ",.2f") for size in part[1:3]]
        seconds = format_value(part.seconds_a_reply, ",.2f")
        rows.append([style.key, format_value(part.replies, COUNT), *sizes, seconds])
    head = ["Hospital", "Replies", "MB to it", "MB from it", "Seconds a reply"]
    table = frame.table("Messages of the rounds", head, rows)
    return f"<h2>Traffic</h2>{words}{frame.folded(table, len(styles))}"


def _making(summary: dict[str, Any]) -> str:
    facts = {key: summary.get(key) for key in ("data", "strategy")}
    facts |= trained.facts(summary)
    facts |= {key: summary.get(key) for key in ("engine", "seed")}
    model = nested(summary, "model")
    if model:
        facts["network"] = model.get("network")
        facts["weights"] = format_value(number(model, "weights"), COUNT)
        facts["weights trained"] = format_value(number(model, "weights-trained"), COUNT)
    seconds = number(summary, "seconds")
    facts["duration"] = None if seconds is None else f"{timedelta(seconds=round(seconds))} h:min:s"
    parts = {
        "Run": facts,
        "Settings": nested(summary, "config"),
        "Versions": nested(summary, "versions"),
    }
    tables = ""
    for heading, listed in parts.items():
        rows = [map(escaped, row) for row in listed.items()]
        table = frame.table(heading, ("Name", "Value"), rows, kind="wordy") if rows else ""
        if len(rows) > _MOST_SHOWN:
            table = f"<details><summary>All {len(rows)} settings</summary>{table}</details>"
        tables += table
    return f'<h2>How it was made</h2><div class="plots">{tables}</div>'
