"""What a comparison of runs says, computed from their folders. No HTML is made here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fedmed_flower.data.pictures import PALETTE
from fedmed_flower.data.site import some_of
from fedmed_flower.errors import InputError
from fedmed_flower.files import file_name, read_file, read_object
from fedmed_flower.metrics.counts import Counts, read_counts
from fedmed_flower.reports import contents, frame, trained
from fedmed_flower.reports.noise import noise_of, told
from fedmed_flower.reports.rounds import Curves, read_rounds
from fedmed_flower.reports.scores import of_test
from fedmed_flower.reports.summary import (
    Total,
    by_site,
    entries,
    judged_by,
    measured,
    metrics_by_site,
    nested,
    number,
    total,
)
from fedmed_flower.reports.tested import estimates
from fedmed_flower.server.run_folder import SUMMARY
from fedmed_flower.wire import ALL_SITES, HOSPITAL_EPSILON

# Each run has a colour of its own.
MOST_RUNS = len(PALETTE)
_HINT = "give the folders of runs that `fedmed run` has started"
# Settings of the machine, not of the model.
_NOT_COMPARED = ("run-dir", "resume")
_MOST_SPLITS = 1000


@dataclass(frozen=True)
class Run:
    """A run folder as read.

    Attributes
    ----------
    label
        What the page calls it: the name of its folder, or its path if two have one name.
    counts
        None if the folder has none.
    """

    label: str
    folder: Path
    summary: dict[str, Any]
    counts: Counts | None
    curves: Curves

    @property
    def validated(self) -> set[str]:
        """The metrics of the validation over the rounds."""
        return {metric for phase, metric, _ in self.curves if phase == "val"}

    @property
    def main(self) -> str:
        """The metric by which the run is judged."""
        return judged_by(self.summary, self.validated)

    @property
    def has_results(self) -> bool:
        """Whether the model was measured, in a test or over the rounds."""
        return bool(measured(self.summary) or self.validated)

    @property
    def tested(self) -> dict[str, float]:
        """The number of test records of each hospital that took part."""
        return by_site(nested(self.summary, "sites"), "test")


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read the folders of runs to compare.

    Raises
    ------
    InputError
        If there are fewer than two or too many, one is given twice or is no folder of a run that
        trained a model, or they are judged by different metrics.
    """
    if not 2 <= len(folders) <= MOST_RUNS:
        raise InputError(
            f"compare takes 2 to {MOST_RUNS} run folders, got {len(folders)}: "
            "fedmed compare RUN RUN ..."
        )
    paths = [folder.resolve() for folder in folders]
    for path, folder in zip(paths, folders, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"the run folder {folder} is given more than once: name others")
    runs = []
    for folder, path in zip(folders, paths, strict=True):
        is_alone = [each.name for each in paths].count(path.name) == 1
        runs.append(_read_run(folder, path.name if is_alone else str(folder)))
    judged = [run for run in runs if run.has_results]
    for run in judged:
        if run.main != judged[0].main:
            raise InputError(
                f"{judged[0].folder} is judged by {judged[0].main} and {run.folder} by "
                f"{run.main}: runs of different tasks cannot be compared; leave one out"
            )
    return runs


def _read_run(folder: Path, label: str) -> Run:
    summary = read_object(folder, SUMMARY, _HINT)
    if "kind" in summary:
        raise InputError(
            f"{folder} is a run of the kind {summary['kind']!r}: runs that trained a model can be "
            "compared"
        )
    counts = of_test(read_counts(folder), summary)
    # Figures that are mere noise are not compared.
    summary = told(summary, noise_of(summary, counts))
    return Run(label, folder, summary, counts, read_rounds(folder))


def cautions(runs: Sequence[Run]) -> list[str]:
    """Return why the runs cannot simply be compared: what differs beside their settings."""
    first = runs[0]
    found = [
        f"{run.label} is {run.summary.get('status')}: its numbers are of an unfinished model."
        for run in runs
        if run.summary.get("status") != "finished"
    ]
    if any(run.summary.get("generated") is True for run in runs):
        named = some_of([run.label for run in runs if run.summary.get("generated") is True])
        found.append(f"Generated data, not patients: {named}.")
    noised = [run.label for run in runs if noise_of(run.summary, run.counts) is not None]
    if noised:
        found.append(
            f"Tested by counts with noise: {some_of(noised)}. Small differences mean nothing, and "
            "figures of too few patients are left out."
        )
    for run in runs[1:]:
        found += _differs(run, first)
    return found


def _differs(run: Run, first: Run) -> list[str]:
    """Return in what the data of a run differ from those of the first one."""
    apart = f"{run.label} and {first.label}"
    found = []
    for key, what in (("app", "are of different apps"), ("data", "have different data")):
        texts = [str(each.summary.get(key)) for each in (run, first)]
        if texts[0] != texts[1]:
            found.append(f"{apart} {what}: {texts[0]} and {texts[1]}.")
    if run.counts and first.counts and run.counts.classes != first.counts.classes:
        found.append(f"{apart} predict different classes.")
    added = sorted({*run.tested} - {*first.tested}, key=frame.natural)
    missing = sorted({*first.tested} - {*run.tested}, key=frame.natural)
    if added:
        found.append(f"{some_of(added)} took part in {run.label} and not in {first.label}.")
    if missing:
        found.append(f"{some_of(missing)} took part in {first.label} and not in {run.label}.")
    common = sorted(run.tested.keys() & first.tested.keys(), key=frame.natural)
    other = [site for site in common if run.tested[site] != first.tested[site]]
    if not other:
        other = _split_otherwise(run.folder, first.folder, common)
    if other:
        found.append(
            f"The test records of {some_of(other)} are not the same in {apart}: their results "
            "differ by that alone."
        )
    return found


def _split_otherwise(folder: Path, other: Path, sites: Iterable[str]) -> list[str]:
    """Return the hospitals whose test patients differ, as far as both folders hold the splits."""
    differing = []
    for site in [*sites][:_MOST_SPLITS]:
        parts = [_test_patients(each, site) for each in (folder, other)]
        if None not in parts and parts[0] != parts[1]:
            differing.append(site)
    return differing


def _test_patients(folder: Path, site: str) -> set[bytes] | None:
    """Return the lines of a hospital's test patients; None if a run keeps none, as a real one."""
    try:
        lines = read_file(folder, f"splits/{file_name(site)}.csv").splitlines()
    except OSError:
        return None
    return {line for line in lines if line.endswith(b",test")}


def splits_known(runs: Sequence[Run]) -> bool:
    """Return whether every folder holds which patients were tested, as those of simulations do."""
    return all(
        _test_patients(run.folder, site) is not None
        for run in runs
        for site in [*run.tested][:_MOST_SPLITS]
    )


class Reached(NamedTuple):
    """A metric of a run on all test records, its interval, and the difference to the first run."""

    total: Total
    interval: tuple[float, float] | None
    difference: float | None


def reached(runs: Sequence[Run], main: str) -> dict[str, list[Reached]]:
    """Return by metric what each run reaches on all test records together."""
    keys = dict.fromkeys(key for run in runs for key in metrics_by_site(run.summary, main))
    listed: dict[str, list[Reached]] = {}
    for key in keys:
        totals = [total(nested(run.summary, "test", "federated"), key) for run in runs]
        if any(each.value is not None for each in totals):
            found = [estimates(run.summary, run.counts, key).total for run in runs]
            listed[key] = [
                Reached(each, known and known.interval, minus(each.value, totals[0].value))
                for each, known in zip(totals, found, strict=True)
            ]
    return listed


def minus(value: float | None, first: float | None) -> float | None:
    """Return a difference; None if a side of it is not known."""
    return None if value is None or first is None else value - first


def by_hospital(runs: Sequence[Run], main: str) -> list[dict[str, float]]:
    """Return of each run the main metric of each hospital."""
    return [by_site(nested(run.summary, "test", "sites"), main) for run in runs]


def in_use(runs: Sequence[Run], main: str) -> list[dict[str, float]]:
    """Return of each run the main metric of the model that each hospital uses.

    That is its own model if the run has made one, else the federated model. Empty if no run has
    made one.
    """
    own = [by_site(nested(run.summary, "test", "own"), main) for run in runs]
    if not any(own):
        return []
    return [{**all_, **each} for all_, each in zip(by_hospital(runs, main), own, strict=True)]


class Settings(NamedTuple):
    """By name the value of each run: those that differ, and those that are the same."""

    differing: dict[str, list[Any]]
    same: dict[str, Any]


def settings(runs: Sequence[Run]) -> Settings:
    """Return how the runs were made. A setting that a run lacks is None."""
    listed = [_made_by(run.summary) for run in runs]
    frame.require_small(len(runs), sum(map(len, listed)))
    differing = {}
    same = {}
    for key in dict.fromkeys(key for made in listed for key in made):
        values = [made.get(key) for made in listed]
        # 1 and True are equal, but not the same setting.
        if len({repr(value) for value in values}) > 1:
            differing[key] = values
        else:
            same[key] = values[0]
    return Settings(differing, same)


def _made_by(summary: dict[str, Any]) -> dict[str, Any]:
    model = nested(summary, "model")
    made = {key: summary.get(key) for key in ("app", "data", "strategy", "engine")}
    made |= {"network": model.get("network"), "weights": number(model, "weights")}
    made["weights trained"] = number(model, "weights-trained")
    config = nested(summary, "config")
    made |= {key: value for key, value in config.items() if key not in _NOT_COMPARED}
    made |= trained.facts(summary)
    return made | {f"version of {key}": v for key, v in nested(summary, "versions").items()}


class Spent(NamedTuple):
    """The privacy of a run: what its noise hides, the target, and what was reported."""

    unit: str
    giver: str
    target: Any
    delta: Any
    epsilon: float | None


def spent(run: Run) -> list[Spent]:
    """Return the guarantees of a run; empty if it has none."""
    curve = run.curves.get(("train", HOSPITAL_EPSILON, ALL_SITES))
    found = contents.privacy(run.summary, [*curve.values()][-1] if curve else None)
    listed = []
    if found.hospital:
        epsilon = number(found.hospital, "epsilon")
        giver = "the server" if found.by_server else "all hospitals together"
        listed.append(Spent("hospital", giver, None, found.hospital.get("delta"), epsilon))
    if found.patients is not None:
        patients = found.patients
        listed.append(
            Spent(
                "patient",
                "all hospitals together" if patients.shared else "each hospital",
                patients.target_epsilon,
                patients.delta,
                patients.most,
            )
        )
    return listed


class Cost(NamedTuple):
    """What a run took; None for what it did not record."""

    rounds: float | None
    seconds: float | None
    replies: float | None
    megabytes_to_sites: float | None
    megabytes_from_sites: float | None


def cost(run: Run) -> Cost:
    """Return what a run took, the messages of its rounds summed over the hospitals."""
    traffic = contents.traffic(run.summary).values()
    replies = [part.replies for part in traffic if part.replies is not None]
    to_sites = [part.megabytes_to_site for part in traffic if part.megabytes_to_site is not None]
    back = [part.megabytes_from_site for part in traffic if part.megabytes_from_site is not None]
    return Cost(
        rounds=number(run.summary, "rounds"),
        seconds=number(run.summary, "seconds"),
        replies=sum(replies) if replies else None,
        megabytes_to_sites=sum(to_sites) if to_sites else None,
        megabytes_from_sites=sum(back) if back else None,
    )


class Failed(NamedTuple):
    """How often hospitals failed in a run; `times` is None if that was not recorded."""

    times: int | None
    sites: list[str]
    first: str


def failed(run: Run) -> Failed:
    """Return how often hospitals failed, which, and the first reason."""
    failures = entries(run.summary, "failures")
    recorded = isinstance(run.summary.get("failures"), list)
    sites = dict.fromkeys(str(failure.get("site")) for failure in failures)
    first = str(failures[0].get("reason")) if failures else ""
    return Failed(len(failures) if recorded else None, [*sites], first)


def over_rounds(runs: Sequence[Run], phase: str, key: str) -> dict[str, dict[int, float]]:
    """Return by run a metric of all hospitals together over the rounds."""
    curves = {run.label: run.curves.get((phase, key, ALL_SITES), {}) for run in runs}
    return {label: curve for label, curve in curves.items() if curve}
