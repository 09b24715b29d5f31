"""A run folder as a model card in Markdown, a draft that people complete.

The sections follow TRIPOD+AI (see `reports/tripod.py`), and the idea of a model card: Mitchell et
al., Model Cards for Model Reporting, FAT* 2019, https://doi.org/10.1145/3287560.3287596.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fedmed_flower.data.site import GENERATED, some_of
from fedmed_flower.errors import InputError
from fedmed_flower.files import as_input_error, read_object, write_atomic
from fedmed_flower.metrics.counts import Counts, read_counts
from fedmed_flower.metrics.curves import Interval
from fedmed_flower.metrics.names import lower_is_better
from fedmed_flower.reports import contents, frame, scores, secure, trained, tripod
from fedmed_flower.reports.contents import Hospitals
from fedmed_flower.reports.frame import COUNT, DASH, count_of, format_of, format_value
from fedmed_flower.reports.markdown import plain, table
from fedmed_flower.reports.noise import MARK, TOO_LARGE, Noise, noise_of, told
from fedmed_flower.reports.summary import (
    Total,
    by_site,
    counted_at,
    entries,
    judged_by,
    nested,
    number,
    quartiles,
    total,
    worst,
)
from fedmed_flower.reports.tested import Estimates, estimates, evidence_of
from fedmed_flower.reports.words import FEWEST
from fedmed_flower.reports.worth import chance_of, in_words
from fedmed_flower.server.run_folder import CONFIG, METRICS, MODEL, SUMMARY

Ends = tuple[float, float]

CARD = "card.md"
# Metrics in the table of hospitals, beside the main one: first those that have an interval.
_MOST_BESIDE = 3
_BESIDE = ("sensitivity", "specificity", "accuracy")
# Settings of the machine, not of the model.
_NOT_SHOWN = ("run-dir", "resume")
_MOST_EVENTS = 20
_MOST_CLASSES = 50
_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

_DRAFT = """This card is a draft from a run folder. It states what the run recorded. What only
people can say is marked **To be filled in**; the last section lists the items of TRIPOD+AI with
where each stands."""
_RECORDS = """These are records (images, or rows of a table). The run folder does not hold the
number of patients they are of."""
_PATIENTS = """These are numbers of patients where a hospital protects its patients by noise, else
of records (images, or rows of a table)."""
_SAMPLES = """Intervals are 95% intervals over samples of test records: of the AUC by DeLong's
variance, of shares by Wilson's method. They take records to be independent; if patients have
several records, they are too narrow. They say nothing of hospitals that took no part."""
_NO_COUNTS = """Not available: the run folder has no `counts.json`, which a run writes if its model
predicts classes."""
_INCOMPLETE = "Not available: `counts.json` lacks hospitals that the test has metrics of."
_NOISED = """The hospitals counted with noise, for the privacy of patients. An interval over samples
of records would leave out the noise and be too narrow, so none is given."""
_NOISED_CURVES = """The counts carry noise, which was taken out as far as it can be; bins of few
patients may be far off."""
_UNPROTECTED = """This run has no differential privacy. Nothing bounds what could be inferred about
a patient from the models and numbers that hospitals sent. The server and whoever gets the model can
try; attacks that recover parts of training data from such models are known."""
_NO_RECORD = "No patient record left a hospital: no image, no row of a table."
_PICTURES = """No patient record left a hospital but pictures of single test cases, where a
hospital permits it. No bound on privacy covers them."""
_BY_SERVER = """The guarantee is for a whole hospital, and the server gives it, by clipping the
hospitals' updates and adding noise: whether a hospital took part is hidden in the models of all
rounds together, to epsilon {epsilon} at delta {delta}. Who sees what hospitals send to the server
is not covered."""
_BY_HOSPITALS = """The guarantee is for a whole hospital, and the hospitals give it together: each
clips its update and adds a share of the noise, and the server sees sums alone. What each of them
gave to the models of all rounds together is hidden, to epsilon {epsilon} at delta {delta}, as long
as no more hospitals work with the server than their study allows for. Who took part is not hidden.
"""
_BY_HOSPITAL = """The guarantee is for a patient with all records, and each hospital gives it, by
clipping and noise while it trains (DP-SGD). The target was epsilon {target} at delta {delta}. The
hospitals reported {most} at most, and their own ledgers hold what other runs cost the same
patients. {evaluated}"""
_SHARED = """The noise is that of secure sums over several hospitals, each of which added a share:
it holds as long as no more hospitals work with the server than their study allows for."""
_NOISED_TOO = """Counts of the evaluation carry noise too. Not covered: numbers of records, and
which rounds a hospital declined."""
_EXACT = (
    "Not covered: numbers of records, and all that was measured on validation and test records."
)


@dataclass(frozen=True)
class _Run:
    """What the sections are made of; `counts` is None if the folder has none."""

    summary: dict[str, Any]
    counts: Counts | None
    main: str
    hospitals: Hospitals
    estimates: dict[str, Estimates]
    noise: Noise | None

    @property
    def is_hidden(self) -> bool:
        """Whether the noise hides the figures of all hospitals together."""
        return self.noise is not None and self.noise.hides_total

    @property
    def is_complete(self) -> bool:
        """Whether the counts are of all hospitals that the test has metrics of."""
        known = {} if self.counts is None else self.counts.sites
        return known.keys() == {*counted_at(self.summary)}

    @property
    def beside(self) -> list[str]:
        """The metrics in the table of hospitals, the main one first."""
        shown = self.hospitals.metrics
        first = [key for key in _BESIDE if key in shown]
        others = [key for key in (*first, *shown) if key != self.main]
        return [self.main, *[*dict.fromkeys(others)][:_MOST_BESIDE]]


def write_card(folder: Path, out: Path | None = None) -> Path:
    """Write the card of a run folder.

    Parameters
    ----------
    folder : Path
    out : Path, optional
        By default ``card.md`` in the folder. A card that people have completed is not replaced.

    Returns
    -------
    Path
        The card. It appears whole or not at all.

    Raises
    ------
    InputError
        As `card` does, and if `out` exists already or cannot be written.
    """
    target = folder / CARD if out is None else out
    text = card(folder)
    if target.exists() or target.is_symlink():
        raise InputError(
            f"{target} exists already, and may hold what people have filled in: remove it, or "
            "give another name with --out"
        )
    try:
        write_atomic(target, text.encode())
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror})") from error
    return target


def card(folder: Path) -> str:
    """Return the card of a run folder, as Markdown.

    Raises
    ------
    InputError
        If ``summary.json`` is missing or is not of a run that trained a model, or ``counts.json``
        is malformed.
    """
    summary = read_object(folder, SUMMARY, "give the folder of a run that `fedmed run` has started")
    if "kind" in summary:
        raise InputError(
            f"{folder} is a run of the kind {summary['kind']!r}: a card describes a trained model"
        )
    counts = read_counts(folder)
    with as_input_error(f"{folder / SUMMARY}", "restore it from a copy"):
        main = judged_by(summary, ())
        counts = scores.of_test(counts, summary)
        noise = noise_of(summary, counts)
        summary = told(summary, noise)
        hospitals = contents.hospitals(summary, main, noise)
        keys = dict.fromkeys((main, *hospitals.metrics))
        measured = {key: estimates(summary, counts, key) for key in keys}
        run = _Run(summary, counts, main, hospitals, measured, noise)
        sections = [_head(run), _use(), _data(run), _outcome(run), _training(run), _results(run)]
        sections += [_calibration(run), _benefit(run), _groups(run), _privacy(run), _limits(run)]
        sections += [_versions(run), _section(tripod.DECLARATIONS), _checklist()]
    return "\n\n".join(sections) + "\n"


def _section(title: str, *parts: str) -> str:
    """Return a section: its heading, the items it is about, its parts, and what is to fill in."""
    items = tripod.numbers(title)
    about = [f"*{items}*"] if items else []
    left = "\n".join(f"- {tripod.to_fill(item)}" for item in tripod.left_over(title))
    written = [part for part in (*about, *parts, left) if part]
    return "\n\n".join([f"## {title}", *written])


def _head(run: _Run) -> str:
    summary = run.summary
    status = str(summary.get("status"))
    words = [*contents.course(summary), summary.get("message"), contents.happened(summary)]
    happened = ". ".join(plain(word) for word in words if word)
    lines = [f"# Model card: {plain(summary.get('app') or 'run')}"]
    if summary.get("generated") is True:
        lines.append(f"> **{GENERATED.capitalize()}.** The figures describe no patient.")
    lines.append(_DRAFT)
    if status != "finished":
        lines.append(f"> **Status: {plain(status)}. The figures are of an unfinished model.**")
    facts = f"Run started {_date(summary)}, status {plain(status)}. {happened}".strip()
    return "\n\n".join([*lines, _section(tripod.SUMMARY, facts, _in_a_sentence(run))])


def _in_a_sentence(run: _Run) -> str:
    reached = contents.result(run.summary, run.main, run.noise)
    value = reached.metrics.get(run.main)
    if run.is_hidden:
        return TOO_LARGE
    if value is None or value.value is None:
        return "The run has no test result."
    estimate = run.estimates[run.main].total
    found = None if estimate is None else estimate.interval
    trained = nested(run.summary, "sites").keys() - run.hospitals.untrained
    sites = count_of(len(trained), "hospital")
    mark = "" if run.noise is None else f" ({MARK})"
    few = ""
    if reached.records is not None and reached.records < FEWEST:
        few = " These are too few to say how good the model is."
    return (
        f"The model was trained by federated learning at {sites}. {_on(run, reached.records)} it "
        f"reaches {_name(run.main)} {_with(run.main, value, found)}{mark}.{few}"
    )


def _on(run: _Run, records: float | None) -> str:
    """Return on how many test records of which hospitals, as a sentence begins."""
    unit = "test record" if run.noise is None else "test patient"
    shown = f"all {unit}s" if records is None else count_of(records, unit)
    tested = nested(run.summary, "test", "sites")
    where = "at one hospital" if len(tested) == 1 else "of all hospitals together"
    return f"On {shown} {where}"


def _use() -> str:
    return _section(tripod.USE, "A run does not know what a model is for.")


def _data(run: _Run) -> str:
    summary = run.summary
    generated = summary.get("generated") is True
    source = "generated data" if generated else plain(summary.get("data"))
    parts = [
        f"Source, as the hospitals named it: {source}. Hospitals split their records into training,"
        " validation and test by patient, unless the app brings a split of its own.",
        _records(run),
        _RECORDS if run.noise is None else _PATIENTS,
    ]
    hospitals = run.hospitals
    untrained = sorted(hospitals.untrained, key=frame.natural)
    parts.append(
        f"Tested only, without training records: {plain(some_of(untrained))}."
        if untrained
        else "Training and test records are of the same hospitals."
    )
    if hospitals.rejected:
        parts.append("Rejected are records that could not be used; the hospital's log says why.")
    if hospitals.withheld:
        withheld = sorted(hospitals.withheld, key=frame.natural)
        parts.append(f"{frame.WITHHELD}: {plain(some_of(withheld))}.")
    lacking = [
        f"- {plain(site)} has no column {plain(', '.join(columns))}."
        for site, columns in hospitals.lacking.items()
    ]
    lacking += [
        f"- {plain(site)} has no value of {plain(', '.join(columns))}."
        for site, columns in hospitals.empty.items()
    ]
    refused = [
        f"- Could not take part: {plain(which)} ({plain(reason)})."
        for reason, which in hospitals.refused
    ]
    parts += ["\n".join([*lacking, *refused]), _events_of_test(run)]
    return _section(tripod.DATA, *parts)


def _records(run: _Run) -> str:
    columns = [column for column in run.hospitals.columns if column.spec == COUNT]
    sites = sorted(nested(run.summary, "sites"), key=frame.natural)
    head = ["Hospital", *(column.title for column in columns)]
    totals = [f"All {len(sites)}"]
    for column in columns:
        value = None if column.total is None else column.total.value
        totals.append(format_value(value, COUNT))
    rows = [
        [plain(site), *(format_value(column.values.get(site), COUNT) for column in columns)]
        for site in (sites if len(sites) <= frame.MANY else ())
    ]
    return table(head, [*rows, totals])


def _events_of_test(run: _Run) -> str:
    """Return how many test records are of each class."""
    confusion = None if run.counts is None else run.counts.confusion()
    if run.counts is None or confusion is None:
        return ""
    pairs = [*zip(run.counts.classes, confusion, strict=True)][:_MOST_CLASSES]
    rows = [[_class(name), format_value(float(sum(row)), COUNT)] for name, row in pairs]
    return table(["Class of the outcome", "Test records"], rows)


def _outcome(run: _Run) -> str:
    if run.counts is None:
        return _section(tripod.OUTCOME, "The run folder names no classes of the outcome.")
    named = some_of([_class(name) for name in run.counts.classes])
    return _section(tripod.OUTCOME, f"Classes of the outcome, as the app names them: {named}.")


def _training(run: _Run) -> str:
    summary = run.summary
    model = nested(summary, "model")
    seconds = number(summary, "seconds")
    done, planned = (
        format_value(number(summary, key), COUNT) for key in ("rounds", "rounds-planned")
    )
    duration = DASH if seconds is None else f"{timedelta(seconds=round(seconds))} (h:min:s)"
    facts = {
        "Strategy": plain(summary.get("strategy")),
        **{frame.capital(key): plain(value) for key, value in trained.facts(summary).items()},
        "Rounds": f"{done} of {planned}",
        "Network": plain(model.get("network")),
        "Weights": format_value(number(model, "weights"), COUNT),
        "Weights trained": format_value(number(model, "weights-trained"), COUNT),
        "Seed": plain(summary.get("seed")),
        "Engine": plain(summary.get("engine")),
        "Duration": duration,
    }
    return _section(
        tripod.TRAINING,
        table(["Training", "Value"], [*map(list, facts.items())], words=2),
        f"All settings are under {tripod.VERSIONS}.",
    )


def _results(run: _Run) -> str:
    if run.is_hidden:
        return _section(tripod.RESULTS, TOO_LARGE)
    if not contents.result(run.summary, run.main).metrics:
        return _section(tripod.RESULTS, "No model was tested in this run.")
    return _section(
        tripod.RESULTS,
        _about_intervals(run),
        _threshold(run),
        "### All test records together",
        _overall(run),
        _each_class(run),
        *_predicted(run),
        "### By hospital",
        _by_hospital(run),
        _compared(run),
    )


def _about_intervals(run: _Run) -> str:
    if run.counts is None:
        return f"Intervals: {_NO_COUNTS[:1].lower()}{_NO_COUNTS[1:]}"
    return _NOISED if run.counts.noised else _SAMPLES


def _threshold(run: _Run) -> str:
    if "accuracy" not in run.hospitals.metrics:
        return ""
    return (
        "Accuracy, sensitivity and specificity are of the likeliest class; of two classes, of a "
        "threshold of 0.5 on the probability. No threshold was chosen for a use."
    )


def _overall(run: _Run) -> str:
    federated = nested(run.summary, "test", "federated")
    rows = []
    for key in run.hospitals.metrics:
        estimate = run.estimates[key].total
        if estimate is not None:
            better = "lower" if lower_is_better(key) else "higher"
            shown = _with(key, total(federated, key), estimate.interval)
            rows.append([frame.capital(_name(key)), shown, better])
    return table(["Metric", "Value", "Better"], rows)


def _each_class(run: _Run) -> str:
    figures = [] if run.counts is None else scores.by_class(run.counts)
    rows = []
    for one in figures[:_MOST_CLASSES]:
        rows.append(
            [
                _class(one.name),
                format_value(one.records, COUNT),
                _interval("sensitivity", one.sensitivity),
                _interval("auc", one.auc),
                format_value(one.calibration_error),
            ]
        )
    head = ["Class, against the rest", "Test records", "Sensitivity", "AUC", "Calibration error"]
    return table(head, rows) if rows else ""


def _by_hospital(run: _Run) -> str:
    tested = nested(run.summary, "test", "sites")
    if not tested:
        return "Not known: the test was a secure sum over all hospitals."
    by_key = {key: by_site(tested, key) for key in run.beside}
    sites = sorted(tested, key=frame.natural)
    head = ["Hospital", *(frame.capital(_name(key)) for key in run.beside)]
    rows = []
    if len(sites) <= frame.MANY:
        for site in sites:
            cells = []
            for key in run.beside:
                estimate = run.estimates[key].sites.get(site)
                cells.append(
                    DASH
                    if estimate is None
                    else _with(key, Total(estimate.value), estimate.interval)
                )
            rows.append([plain(site), *cells])
    else:
        cuts = [quartiles(values.values()) for values in by_key.values()]
        for index, label in enumerate(("Lower quartile", "Median", "Upper quartile")):
            rows.append([label, *(format_value(cut[index]) for cut in cuts)])
    rows.append(["Worst", *(_worst(key, values) for key, values in by_key.items())])
    return table(head, rows)


def _worst(key: str, values: Mapping[str, float]) -> str:
    if not values:
        return DASH
    site = worst(values, lower_is_better(key))
    return f"{format_value(values[site], format_of(key))}, {plain(site)}"


def _compared(run: _Run) -> str:
    """Return what the federated model is compared with; empty if the run has no other model."""
    chance = chance_of(run.summary, run.counts, run.main)
    compared = contents.comparison(run.summary, nested(run.summary, "sites"), chance)
    if compared is None:
        return ""
    rows = []
    for column in compared.columns:
        together = None if column.total is None else column.total.value
        low, high = (
            min(column.values.values(), default=None),
            max(column.values.values(), default=None),
        )
        cells = [format_value(value, column.spec) for value in (together, low, high)]
        rows.append([column.title, *cells])
    head = [
        f"{frame.capital(_name(run.main))} on test records",
        "All",
        "Lowest",
        "Highest hospital",
    ]
    said = [in_words(gain, named=False) for gain in compared.gains]
    return "\n\n".join(["### Beside other models", *said, table(head, rows)])


def _calibration(run: _Run) -> str:
    found = evidence_of(run.counts)
    if run.is_hidden:
        return _section(tripod.CALIBRATION, f"Not available. {TOO_LARGE}")
    if run.counts is None or found is None:
        return _section(tripod.CALIBRATION, _NO_COUNTS)
    if not run.is_complete:
        return _section(tripod.CALIBRATION, _INCOMPLETE)
    if not found.calibration:
        why = plain(found.missing or "the hospitals sent no sums for more than two classes")
        return _section(tripod.CALIBRATION, f"Not available: {why}.")
    rows = []
    for one in found.calibration:
        shown = format_value(one.observed)
        if one.interval is not None:
            shown += f" ({_ends('calibration', one.interval)})"
        rows.append([format_value(one.rows, COUNT), format_value(one.predicted), shown])
    unit = "Patients" if found.noised else "Records"
    grid = table([unit, "Mean probability", "Observed share"], rows, words=0)
    is_binary = len(found.classes) == 2
    which = _class(found.classes[1]) if is_binary else "the likeliest class"
    distance = sum(one.rows * abs(one.predicted - one.observed) for one in found.calibration)
    error = distance / sum(one.rows for one in found.calibration)
    words = (
        f"Probability of {which}, in bins of a tenth, on the test records of all hospitals. "
        f"Expected calibration error: {format_value(error)} (0 is perfect)."
    )
    line = scores.recalibrated(run.counts) if is_binary else None
    if line is not None:
        words += (
            f" Calibration slope {format_value(line.slope)} (1 is perfect; below 1, probabilities "
            f"are too extreme) and intercept {format_value(line.intercept)} (0 is perfect)."
        )
    return _section(tripod.CALIBRATION, words, grid, _NOISED_CURVES if found.noised else "")


def _benefit(run: _Run) -> str:
    if run.is_hidden:
        return _section(tripod.BENEFIT, f"Not available. {TOO_LARGE}")
    if run.counts is None:
        return _section(tripod.BENEFIT, _NO_COUNTS)
    if len(run.counts.classes) > 2:
        return _section(tripod.BENEFIT, "Net benefit is computed for two classes only.")
    if not run.is_complete:
        return _section(tripod.BENEFIT, _INCOMPLETE)
    try:
        curve = scores.benefit(run.counts, _THRESHOLDS)
    except InputError as error:
        return _section(tripod.BENEFIT, f"Not available: {plain(str(error))}.")
    words = (
        "Net benefit a record (Vickers and Elkin 2006) of acting on those whose probability of "
        f"{_class(run.counts.classes[1])} is above a threshold: true positives, less false "
        "positives weighed by the threshold's odds. To act on nobody has 0. The model helps at a "
        "threshold if it is above 0 and above acting on all."
    )
    specs = (".2f", ".3f", ".3f")
    rows = [
        [format_value(float(value), spec) for value, spec in zip(row, specs, strict=True)]
        for row in zip(*curve, strict=True)
    ]
    grid = table(["Threshold", "Model", "Act on all"], rows, words=0)
    return _section(tripod.BENEFIT, words, grid, _NOISED_CURVES if run.counts.noised else "")


def _groups(run: _Run) -> str:
    listed = [each for each in contents.groups(run.summary, run.main) if each.of_patients]
    if not listed:
        words = "Nothing was measured by group of patients. The setting `report-by` names columns."
        return _section(tripod.GROUPS, words)
    words = (
        "On the test records of all hospitals that report the group; groups of few patients are "
        "not reported. The run folder holds no counts by group, so there are no intervals: small "
        "groups differ by chance."
    )
    return _section(tripod.GROUPS, words, *_group_tables(listed))


def _predicted(run: _Run) -> list[str]:
    """Return what was measured of each finding, or of each grade and those above."""
    listed = [each for each in contents.groups(run.summary, run.main) if not each.of_patients]
    notes = [frame.BY_PREDICTED[each.column].strip() for each in listed]
    return [*_group_tables(listed), *notes]


def _group_tables(listed: Sequence[contents.Groups]) -> list[str]:
    parts: list[str] = []
    for groups in listed:
        heads = [frame.capital(_name(key)) for key in groups.metrics]
        first = "Group" if groups.of_patients else frame.capital(groups.column)
        head = [first, "Test records", *(["Hospitals"] if groups.apart else []), *heads]
        rows = []
        for group in groups.groups:
            cells = [format_value(cell.total.value, format_of(cell.key)) for cell in group.cells]
            records = format_value(group.records, COUNT)
            sites = [str(group.num_sites)] if groups.apart else []
            rows.append([plain(group.value), records, *sites, *cells])
        parts += [f"### By {plain(groups.column)}", table(head, rows)]
    return parts


def _privacy(run: _Run) -> str:
    found = contents.privacy(run.summary)
    parts = []
    if found.hospital:
        epsilon = format_value(number(found.hospital, "epsilon"))
        text = _BY_SERVER if found.by_server else _BY_HOSPITALS
        parts.append(text.format(epsilon=epsilon, delta=plain(found.hospital.get("delta"))))
    patients = found.patients
    if patients is not None:
        parts.append(
            _BY_HOSPITAL.format(
                target=plain(patients.target_epsilon),
                delta=plain(patients.delta),
                most=f"epsilon {format_value(patients.most)}",
                evaluated=_NOISED_TOO if patients.noised else _EXACT,
            )
        )
        if patients.shared:
            parts.append(_SHARED)
    if not parts:
        parts.append(_UNPROTECTED)
    if said := secure.in_words(run.summary):
        parts.append(plain(said))
    parts.append(_PICTURES if entries(run.summary, "pictures") else _NO_RECORD)
    parts.append("`report.html` lists all that each hospital sent.")
    return _section(tripod.PRIVACY, *parts)


def _limits(run: _Run) -> str:
    failures = entries(run.summary, "failures")
    notes = entries(run.summary, "notes")
    recorded = isinstance(run.summary.get("failures"), list)
    none = "No hospital failed in a round." if recorded else "Failures were not recorded."
    parts = [_events(failures, "reason") if failures else none]
    if notes:
        parts.append(_events(notes, "text"))
    limits = [
        "- How the model does at hospitals that took no part is not known.",
        "- Whether test records are later than training records is not recorded, so a change over "
        "time may go unseen.",
    ]
    return _section(tripod.LIMITS, *parts, "\n".join(limits))


def _events(events: list[dict[str, Any]], words: str) -> str:
    rows = [
        [plain(event.get(key)) for key in ("round", "phase", "site", words)]
        for event in events[:_MOST_EVENTS]
    ]
    grid = table(["Round", "Phase", "Hospital", words.capitalize()], rows, words=4)
    left_out = len(events) - len(rows)
    return f"{grid}\n\n{left_out:,} more are in `{SUMMARY}`." if left_out else grid


def _versions(run: _Run) -> str:
    versions = [[plain(name), plain(v)] for name, v in nested(run.summary, "versions").items()]
    settings = [
        [plain(key), plain(value)]
        for key, value in nested(run.summary, "config").items()
        if key not in _NOT_SHOWN
    ]
    words = (
        f"The weights are in `{MODEL}`, the settings in `{CONFIG}`, the rounds in `{METRICS}`. To "
        "predict, the app's code builds the network and loads the weights."
    )
    return _section(
        tripod.VERSIONS,
        words,
        table(["Package", "Version"], versions, words=2) if versions else "",
        table(["Setting", "Value"], settings, words=2) if settings else "",
    )


def _checklist() -> str:
    rows = [[item.number, item.subject, item.section, item.answered] for item in tripod.ITEMS]
    open_numbers = [item.number for item in tripod.ITEMS if item.answered == tripod.BY_HAND]
    words = f"A run cannot answer items {', '.join(open_numbers)}."
    return "\n\n".join(
        [
            "## Items of TRIPOD+AI",
            f"TRIPOD+AI (Collins et al., BMJ 2024, 385:e078378) has 27 items. {words}",
            table(["Item", "Subject", "Section", "Answered"], rows, words=4),
        ]
    )


def _name(key: str) -> str:
    return plain(frame.plain_name(key))


def _with(key: str, value: Total, found: Ends | None) -> str:
    """Return a metric with its interval, or with its bounds if a hospital reports coarsely."""
    spec = format_of(key)
    text = format_value(value.value, spec)
    if value.bounds is not None:
        low, high = value.bounds
        return f"{text} (lies between {format_value(low, spec)} and {format_value(high, spec)})"
    return text if found is None else f"{text} ({_ends(key, found)})"


def _interval(key: str, found: Interval | None) -> str:
    if found is None:
        return DASH
    return f"{format_value(found.value, format_of(key))} ({_ends(key, found[1:])})"


def _ends(key: str, ends: Ends) -> str:
    return " to ".join(format_value(end, format_of(key)) for end in ends)


def _class(name: str) -> str:
    """Return a class's name in a sentence; the app may have given only its number."""
    return f"class {name}" if name.isdigit() else plain(name)


def _date(summary: dict[str, Any]) -> str:
    try:
        return f"{datetime.fromisoformat(str(summary.get('started'))):%Y-%m-%d %H:%M}"
    except ValueError:
        return plain(summary.get("started"))
