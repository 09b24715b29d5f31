"""What the sections of a report say, computed from a run's summary. No HTML is made here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fedmed_flower.data.site import some_of
from fedmed_flower.metrics.names import FINDING, GRADE, in_groups, lower_is_better
from fedmed_flower.metrics.outcomes import gaps
from fedmed_flower.reports import frame
from fedmed_flower.reports.frame import COUNT, format_of, format_value
from fedmed_flower.reports.noise import Noise, number_tested
from fedmed_flower.reports.summary import (
    Total,
    by_site,
    classes,
    entries,
    mean,
    measured,
    metrics_by_site,
    nested,
    number,
    tested_only,
    total,
    worst,
)
from fedmed_flower.reports.tables import Column
from fedmed_flower.reports.worth import (
    ALONE,
    FEDERATED,
    OWN,
    TUNED,
    Chance,
    Gain,
    differences,
    gain,
)
from fedmed_flower.wire import ALL_SITES, Sent, noised_evaluation

_MOST_IN_WORDS = 5
_MOST_EXPLAINING = 2
_CHANGE = "+,.3f"


def course(summary: dict[str, Any]) -> list[str]:
    """Return what is unlike a run of all rounds from fresh weights whose last model is kept.

    These are the weights it began with, or tested alone; why it ended early; and whose round's
    model is kept.
    """
    said = []
    if weights := nested(summary, "started-from"):
        said.append(f"Started from {_weights(weights)}")
        if nested(summary, "privacy"):
            said.append("What those weights tell of their patients is not in its privacy figures")
    if weights := nested(summary, "evaluated"):
        said.append(f"Nothing was trained: these are tests of {_weights(weights)}")
    stopped = nested(summary, "stopped")
    if (last := number(stopped, "round")) is not None:
        said.append(f"Stopped after round {format_value(last, COUNT)}: {stopped.get('reason')}")
    kept = nested(summary, "kept")
    if (best := number(kept, "round")) is not None:
        value = format_value(number(kept, "value"))
        said.append(
            f"The model of round {format_value(best, COUNT)} is kept: its {kept.get('metric')} on "
            f"validation records, {value}, is the {kept.get('direction')}"
        )
    return said


def _weights(weights: dict[str, Any]) -> str:
    """Return which weights they are, in a sentence."""
    return f"the weights in {weights.get('path')} (SHA-256 {weights.get('sha256')})"


@dataclass(frozen=True)
class Result:
    """What the federated model reaches.

    Attributes
    ----------
    metrics
        On all test records together; at most five.
    records
        The number of these records, if it is known; of patients, if they were counted with noise.
    by_site
        The main metric of each hospital.
    mean, worst
        Of `by_site`: its mean, and the hospital with the worst value.
    worst_patient
        The Dice of the patient with the lowest, for a segmentation.
    finished
        Whether the run finished.
    """

    metrics: dict[str, Total]
    records: float | None
    by_site: dict[str, float]
    mean: float | None
    worst: str
    worst_patient: float | None
    finished: bool


def result(summary: dict[str, Any], main: str, noise: Noise | None = None) -> Result:
    """Return what the federated model reaches; `noise` is that of the test."""
    together = nested(summary, "test", "federated")
    values = by_site(nested(summary, "test", "sites"), main)
    keys = [key for key in metrics_by_site(summary, main) if not key.startswith("dice-")]
    totals = {key: total(together, key) for key in keys[:_MOST_IN_WORDS]}
    return Result(
        metrics={key: each for key, each in totals.items() if each.value is not None},
        records=number_tested(summary, noise),
        by_site=values,
        mean=mean(values),
        worst=worst(values, lower_is_better(main)),
        worst_patient=number(together, frame.WORST_PATIENT) if main == "dice" else None,
        finished=summary.get("status") == "finished",
    )


def explaining(summary: dict[str, Any], main: str, num_classes: int) -> list[str]:
    """Return the metrics that are drawn beside the main one: two at most.

    `num_classes` is 0 if it is not known.
    """
    if main == "dice":
        keys: Iterable[str] = ("hd95", "surface-dice")
    elif main != "auc":
        keys = frame.PREDICTED
    elif num_classes > 2:
        keys = ("accuracy", "balanced-accuracy")
    else:
        keys = ("sensitivity", "specificity")
    known = measured(summary)
    return [key for key in keys if key in known and key != main][:_MOST_EXPLAINING]


@dataclass(frozen=True)
class Hospitals:
    """The table of hospitals.

    Attributes
    ----------
    columns
        Numbers of records, then metrics.
    metrics
        The names of these metrics.
    undefined
        Hospitals whose test records leave the main metric undefined, or whose noise hides it.
    untrained
        Hospitals that were only tested.
    rejected
        Whether a hospital has rejected rows.
    withheld
        Hospitals that tell no numbers of records.
    lacking
        Columns that the tables of hospitals lack, by hospital.
    empty
        Columns without a value in any row, by hospital.
    refused
        Why hospitals could not take part, and which.
    bounded
        Whether the main metric has bounds.
    """

    columns: list[Column]
    metrics: list[str]
    undefined: list[str]
    untrained: set[str]
    rejected: bool
    withheld: list[str]
    lacking: dict[str, list[str]]
    empty: dict[str, list[str]]
    refused: list[tuple[str, str]]
    bounded: bool


def hospitals(summary: dict[str, Any], main: str, noise: Noise | None = None) -> Hospitals:
    """Return the table of hospitals; `noise` is that of the test."""
    counts = nested(summary, "sites")
    tested = nested(summary, "test", "sites")
    together = nested(summary, "test", "federated")
    metrics = metrics_by_site(summary, main)
    undefined = _undefined(tested, main)
    if noise is not None and main in metrics:
        undefined += [site for site in tested if site in noise.hidden and site not in undefined]
    numbers = [_counts(split.capitalize(), counts, split) for split in ("train", "val", "test")]
    columns = [*numbers]
    rejected = _counts("Rejected", counts, "rejected")
    if rejected.values:
        columns.append(rejected)
    # Of a secure sum no hospital's own figures are known.
    for key in metrics if tested else ():
        values = by_site(tested, key)
        lower = lower_is_better(key)
        columns.append(
            Column(frame.title(key), values, total(together, key), format_of(key), lower)
        )
    return Hospitals(
        columns=columns,
        metrics=metrics,
        undefined=undefined,
        untrained=tested_only(summary),
        rejected=bool(rejected.values),
        withheld=[site for site in counts if any(site not in each.values for each in numbers)],
        lacking=_columns(summary, "lacking"),
        empty=_columns(summary, "empty"),
        refused=_refused(summary),
        bounded=total(together, main).bounds is not None,
    )


def happened(summary: dict[str, Any]) -> str:
    """Return which hospitals were left out of rounds, and of which something is noted."""
    sentences = []
    rounds = number(summary, "rounds")
    if rounds and (missed := _missed(summary, rounds)):
        parts = [f"{site} in {count or 'none'}" for site, count in missed.items()]
        sentences.append(f"Not trained in each of the {rounds:.0f} rounds: {some_of(parts)}")
    sites = dict.fromkeys(str(note.get("site")) for note in entries(summary, "notes"))
    if named := [site for site in sites if site != ALL_SITES]:
        sentences.append(f"See below, what else happened, for {some_of(named)}")
    return ". ".join(sentences)


def _missed(summary: dict[str, Any], rounds: float) -> dict[str, int]:
    """Return the rounds of the hospitals with training records that were left out of some."""
    trained = nested(summary, "trained")
    records = by_site(nested(summary, "sites"), "train")
    counts = {site: int(number(trained, site) or 0) for site, count in records.items() if count}
    fewer = {site: count for site, count in counts.items() if trained and count < rounds}
    return dict(sorted(fewer.items(), key=lambda item: item[1]))


def _counts(title: str, sites: Mapping[str, Any], key: str) -> Column:
    counts = by_site(sites, key)
    # Hospitals reject rows or do not say so; a number of rows that one does not tell has no total.
    known = counts and (key == "rejected" or len(counts) == len(sites))
    return Column(title, counts, Total(sum(counts.values()) if known else None), COUNT)


def _undefined(tested: dict[str, Any], main: str) -> list[str]:
    """Return the hospitals that measured their test records but could not say the main metric."""
    if main not in frame.UNDEFINED:
        return []
    measured_there = {
        site: {*nested(metrics)} - {"num-examples"} for site, metrics in tested.items()
    }
    return [site for site, keys in measured_there.items() if keys and main not in keys]


def _columns(summary: dict[str, Any], key: str) -> dict[str, list[str]]:
    sites = nested(summary, key)
    return {s: [*map(str, names)] for s, names in sites.items() if isinstance(names, list)}


def _refused(summary: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (reason, some_of([*map(str, sites)]) if isinstance(sites, list) else "")
        for reason, sites in nested(summary, "refused").items()
    ]


class Cell(NamedTuple):
    """A metric of one class or group: of all hospitals together, and of each."""

    key: str
    total: Total
    by_site: dict[str, float]


@dataclass(frozen=True)
class Classes:
    """The classes of a segmentation: by name the cells of one row, a metric each.

    `apart` says whether figures of single hospitals are known.
    """

    metrics: list[str]
    rows: dict[str, list[Cell]]
    apart: bool


def by_class(summary: dict[str, Any], shown: list[str]) -> Classes | None:
    """Return the metrics of each class; None if the table of hospitals has them all."""
    outlined = classes(summary)
    known = {*measured(summary)}
    keys = {kind: [f"{kind}-{name}" for name in outlined] for kind in frame.OUTLINED}
    keys = {kind: of_kind for kind, of_kind in keys.items() if known.intersection(of_kind)}
    sites = nested(summary, "test", "sites")
    # Of a secure sum that table has numbers of records alone.
    of_classes = {key for of_kind in keys.values() for key in of_kind}
    in_other_table = bool(sites) and {*shown} >= of_classes
    if "dice" not in shown or len(outlined) < 2 or in_other_table:
        return None
    together = nested(summary, "test", "federated")
    frame.require_small(len(outlined), len(sites))
    rows = {name: [_cell(f"{kind}-{name}", together, sites) for kind in keys] for name in outlined}
    return Classes([*keys], rows, apart=bool(sites))


def _cell(key: str, together: dict[str, Any], sites: Mapping[str, Any]) -> Cell:
    return Cell(key, total(together, key), by_site(sites, key))


@dataclass(frozen=True)
class Group:
    """Patients with one value of a column."""

    value: str
    records: float | None
    num_sites: int
    cells: list[Cell]


@dataclass(frozen=True)
class Groups:
    """The groups of one column, and how far the best and the worst lie apart by metric.

    `apart` says whether figures of single hospitals are known.
    """

    column: str
    metrics: list[str]
    groups: list[Group]
    gaps: dict[str, float]
    apart: bool

    @property
    def of_patients(self) -> bool:
        """Whether patients are grouped, and not what is predicted of each of them."""
        return self.column not in (FINDING, GRADE)


def groups(summary: dict[str, Any], main: str) -> list[Groups]:
    """Return the groups of patients, a column each; none if no metric was measured by group.

    Findings, and grades and those above, are listed so too. They are no groups of patients
    (`Groups.of_patients`).
    """
    federated = nested(summary, "test", "federated")
    shown = {key: value for key in federated if (value := number(federated, key)) is not None}
    together = {group: metrics for group, metrics in in_groups(shown).items() if group}
    if not together:
        return []
    tested = nested(summary, "test", "sites")
    sites = {site: in_groups(nested(metrics)) for site, metrics in tested.items()}
    frame.require_small(len(together), len(sites))
    candidates = dict.fromkeys((main, *frame.GROUPED))
    keys = [key for key in candidates if any(key in metrics for metrics in together.values())]
    widths = gaps(shown)
    listed = []
    for column in dict.fromkeys(_column(group) for group in together):
        names = sorted((g for g in together if _column(g) == column), key=_order)
        rows = []
        for name in names:
            of_group = {site: nested(parts, name) for site, parts in sites.items()}
            cells = [_cell(key, together[name], of_group) for key in keys]
            records = number(together[name], "num-examples")
            num_sites = len(by_site(of_group, "num-examples"))
            rows.append(Group(name.partition("=")[2], records, num_sites, cells))
        group = Groups(column, keys, rows, {}, apart=bool(tested))
        if group.of_patients:
            found = {key: widths[f"{key}@{column}"] for key in keys if f"{key}@{column}" in widths}
            group = replace(group, gaps=found)
        listed.append(group)
    return listed


def _column(group: str) -> str:
    return group.removeprefix("@").partition("=")[0]


def _order(group: str) -> tuple[int, str]:
    """Return what sorts groups: bands from below to above, numbers by their size."""
    value = group.partition("=")[2]
    rank = {"<": 0, ">": 2}.get(value[:1], 1)
    return rank, frame.natural(value)


@dataclass(frozen=True)
class FineTuned:
    """What fine-tuning at the hospitals did.

    Attributes
    ----------
    sites
        Hospitals that have fine-tuned.
    num_measured, num_kept
        Of these, how many reported the passes they kept, and how many kept at least one.
    gain
        On test records, beside the federated model; None if no hospital has both figures.
    columns
        On the validation records by which each hospital has chosen.
    """

    sites: list[str]
    num_measured: int
    num_kept: int
    gain: Gain | None
    columns: list[Column]


@dataclass(frozen=True)
class Comparison:
    """The federated model beside other models, by the main metric on test records.

    Attributes
    ----------
    baselines
        Whether models of one hospital alone, or of pooled data, were trained.
    models
        Of each model in the order of `plots.MODELS`: its value at each hospital.
    gains
        What the models of the run are to the hospitals beside one trained alone, and their own
        model beside the federated one.
    columns
        The table, without columns that are empty.
    complete
        The hospitals with a number in every column.
    fine_tuned
        None if no hospital has fine-tuned.
    """

    baselines: bool
    models: list[dict[str, float]]
    gains: list[Gain]
    columns: list[Column]
    complete: list[str]
    fine_tuned: FineTuned | None

    @property
    def has_own(self) -> bool:
        """Whether the run has left hospitals a model of their own, other than by fine-tuning."""
        return bool(self.models[2])


def comparison(summary: dict[str, Any], sites: Iterable[str], chance: Chance) -> Comparison | None:
    """Return what the federated model is compared with; None if there is no other model.

    `chance` is that of the metric by which the models are compared.
    """
    main = chance.metric
    test = nested(summary, "test")
    local = nested(test, "local")
    pooled = nested(test, "pooled")
    personal = nested(test, "personal")
    own = by_site(nested(test, "own"), main)
    if not local and not pooled and not personal and not own:
        return None
    alone = by_site(local, main)
    federated = by_site(nested(test, "sites"), main)
    tuned = by_site(personal, main)
    central = by_site(nested(pooled, "sites"), main)
    total_alone = mean(by_site({site: nested(part, "all") for site, part in local.items()}, main))
    total_federated = number(test.get("federated"), main)
    gain_of_all = None
    if total_alone is not None and total_federated is not None:
        gain_of_all = total_federated - total_alone
    lower = lower_is_better(main)
    columns = [
        _of_model("Trained alone", alone, Total(total_alone, remark="mean of all models")),
        _of_model("Federated", federated, total(test.get("federated"), main)),
        _of_model("Own model", own, Total()),
        _of_model("Fine-tuned at the hospital", tuned, Total()),
        _of_model("Trained on pooled data", central, total(pooled, main)),
        Column("Federated − alone", differences(federated, alone), Total(gain_of_all), _CHANGE),
        Column("Own − alone", differences(own, alone), Total(), _CHANGE),
        Column("Fine-tuned − federated", differences(tuned, federated), Total(), _CHANGE),
    ]
    columns = [column._replace(lower=lower) for column in columns if not _empty(column)]
    filled = [column.values for column in columns if column.values]
    gains = [
        gain(FEDERATED, federated, ALONE, alone, chance),
        gain(OWN, own, ALONE, alone, chance),
        gain(TUNED, tuned, ALONE, alone, chance),
        gain(OWN, own, FEDERATED, federated, chance),
    ]
    by_tuning = gain(TUNED, tuned, FEDERATED, federated, chance)
    return Comparison(
        baselines=bool(local or pooled),
        models=[alone, federated, own, tuned, central],
        gains=[each for each in gains if each is not None],
        columns=columns,
        complete=[site for site in sites if all(site in values for values in filled)],
        fine_tuned=_fine_tuned(personal, by_tuning, lower) if personal else None,
    )


def _of_model(title: str, values: dict[str, float], of_all: Total) -> Column:
    return Column(title, values, of_all, ranked=True)


def _empty(column: Column) -> bool:
    # A model may have no number at any hospital and yet one on all records together.
    return not column.values and (column.total is None or column.total.value is None)


def _fine_tuned(personal: dict[str, Any], by_tuning: Gain | None, lower: bool) -> FineTuned:
    before = by_site(personal, "val-global")
    after = by_site(personal, "val-own")
    passes = by_site(personal, "personal-epochs")
    return FineTuned(
        sites=[*personal],
        num_measured=len(passes),
        num_kept=sum(count > 0 for count in passes.values()),
        gain=by_tuning,
        columns=[
            Column("Federated", before, lower=lower),
            Column("Fine-tuned", after, lower=lower),
            Column("Change", differences(after, before), spec=_CHANGE, lower=lower),
            Column("Passes kept", passes, spec=COUNT),
        ],
    )


class SiteCost(NamedTuple):
    """What this run has cost a patient of one hospital, and in how many rounds."""

    epsilon: float | None
    rounds: float | None
    declined: float | None


@dataclass(frozen=True)
class Patients:
    """The guarantee for a patient: the run's target, and what each hospital reported.

    If it is `shared`, hospitals have added the noise together, in secure sums.
    """

    target_epsilon: Any
    delta: Any
    by_site: dict[str, SiteCost]
    noised: bool
    baselines: bool
    shared: bool

    @property
    def most(self) -> float | None:
        """The largest epsilon that a hospital reported."""
        costs = [cost.epsilon for cost in self.by_site.values() if cost.epsilon is not None]
        return max(costs, default=None)


@dataclass(frozen=True)
class Privacy:
    """The guarantees of a run. Without one, `hospital` is empty, and `patients` is None."""

    hospital: dict[str, Any]
    patients: Patients | None

    @property
    def by_server(self) -> bool:
        """Whether the server has added the noise that hides hospitals."""
        return self.hospital.get("shared") is not True


def privacy(summary: dict[str, Any], hospital_epsilon: float | None = None) -> Privacy:
    """Return what the run's noise guarantees, for a hospital and for a patient.

    `hospital_epsilon` is that of the table of metrics, for a run without a summary.
    """
    patient = nested(summary, "privacy", "patient")
    hospital = nested(summary, "privacy", "hospital")
    if not hospital and hospital_epsilon is not None:
        hospital = {"epsilon": hospital_epsilon}
    if not patient:
        return Privacy(hospital, None)
    sites = nested(patient, "sites")
    costs = {
        site: SiteCost(*(number(part, key) for key in ("epsilon", "rounds", "declined")))
        for site, part in sites.items()
    }
    return Privacy(
        hospital,
        Patients(
            target_epsilon=patient.get("target-epsilon"),
            delta=patient.get("delta"),
            by_site=costs,
            noised=_noised(summary),
            baselines=nested(summary, "config").get("baselines") is True,
            shared=patient.get("shared") is True,
        ),
    )


def _noised(summary: dict[str, Any]) -> bool:
    """Return whether the evaluations of every hospital carried noise."""
    sites = Sent.of(summary.get("sent")).keys.get("evaluate", {})
    return bool(sites) and all(noised_evaluation(keys) for keys in sites.values())


class SiteTraffic(NamedTuple):
    """What travelled in the rounds between the server and one hospital, and how long it took."""

    replies: float | None
    megabytes_to_site: float | None
    megabytes_from_site: float | None
    seconds_a_reply: float | None


def traffic(summary: dict[str, Any]) -> dict[str, SiteTraffic]:
    """Return the traffic of the rounds by hospital; empty if none was recorded."""
    listed = {}
    for site, part in nested(summary, "traffic").items():
        replies = number(part, "replies")
        seconds = number(part, "seconds")
        to_site, from_site = (number(part, f"bytes-{way}-site") for way in ("to", "from"))
        listed[site] = SiteTraffic(
            replies,
            None if to_site is None else to_site / 1e6,
            None if from_site is None else from_site / 1e6,
            seconds / replies if seconds is not None and replies else None,
        )
    return listed


class Disclosure(NamedTuple):
    """What some hospitals sent in one reply: its kind, how it left, which hospitals, what."""

    reply: str
    how: str
    sites: str
    what: tuple[str, ...]


def disclosed(summary: dict[str, Any]) -> list[Disclosure]:
    """Return what the hospitals have sent; what all sent alike is one entry."""
    sent = Sent.of(summary.get("sent"))
    for by_hospital in sent.keys.values():
        keys = {key for keys in by_hospital.values() for key in keys}
        frame.require_small(len(keys), len(by_hospital))
    count = len({site for sites in sent.keys.values() for site in sites})
    listed = []
    for reply, how, sites, what in sent.lines():
        names = sorted(sites, key=frame.natural)
        named = f"all {count}" if len(names) == count > 1 else some_of(names)
        listed.append(Disclosure(reply, how, named, what))
    return listed
