"""A run in plain words, for readers who are no data scientists. No HTML is made here.

Each sentence says what the run folder holds and no more: "of 100" needs counts without noise and
enough records behind it, and nothing is said of what was not recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedmed_flower.data.site import some_of
from fedmed_flower.metrics.counts import Counts
from fedmed_flower.metrics.curves import wilson
from fedmed_flower.metrics.names import KAPPA, lower_is_better
from fedmed_flower.reports import contents, secure
from fedmed_flower.reports.frame import COUNT, count_of, format_of, format_value, plain_name
from fedmed_flower.reports.noise import MARK, TOO_LARGE, Noise, noise_of, number_tested
from fedmed_flower.reports.summary import (
    by_site,
    classes,
    counted_at,
    entries,
    findings,
    nested,
    number,
    tested_only,
    worst,
)
from fedmed_flower.reports.summary import total as total_of
from fedmed_flower.reports.tested import Estimates, share_of
from fedmed_flower.reports.worth import ALONE, FEDERATED, OWN, chance_of, in_words
from fedmed_flower.wire import ALL_SITES

# Of fewer records no share "of 100" is given.
FEWEST = 30
_SIMULATED = ("local", "Flower simulation")
_PREDICTED = {
    "c-index": "predicts who has an event first",
    "r2": "predicts a number",
    "mae": "predicts a number",
    "d2": "predicts how often something happens",
}


@dataclass(frozen=True)
class Words:
    """Sentences about a run, as texts; an empty list if there is nothing to say.

    Attributes
    ----------
    trained
        What was trained, by whom, and whether it finished.
    quality
        How good it is, in everyday words.
    worst
        Where it did worst.
    part
        Who took part.
    privacy
        Which guarantee there is, and what of it was spent.
    """

    trained: list[str]
    quality: list[str]
    worst: list[str]
    part: list[str]
    privacy: list[str]


def words(
    summary: dict[str, Any],
    counts: Counts | None,
    measured: Estimates,
    hospital_epsilon: float | None = None,
) -> Words:
    """Return a run in plain words.

    Parameters
    ----------
    counts
        Those of the test, if the run folder has them.
    measured
        The metric that the run is judged by.
    hospital_epsilon
        As `contents.privacy` takes it.
    """
    main = measured.metric
    noise = noise_of(summary, counts)
    return Words(
        trained=_trained(summary, main, counts),
        quality=_quality(summary, counts, measured, noise),
        worst=_worst(summary, measured, noise is not None) + _gained(summary, counts, main),
        part=_part(summary),
        privacy=[
            *filter(None, [secure.in_words(summary)]),
            *_privacy(contents.privacy(summary, hospital_epsilon)),
        ],
    )


def _trained(summary: dict[str, Any], main: str, counts: Counts | None) -> list[str]:
    records = by_site(nested(summary, "sites"), "train")
    trainers = [site for site, count in records.items() if count]
    rounds = number(summary, "rounds")
    sentences = []
    if summary.get("generated") is True:
        sentences.append(
            "All data of this run are generated: its figures say nothing about patients."
        )
    if nested(summary, "evaluated"):
        sentences.append("Nothing was trained in this run: a finished model was tested.")
    if trainers and rounds:
        who = f"{count_of(len(trainers), 'hospital')} trained one model together"
        if len(trainers) == 1:
            who = "1 hospital trained a model alone"
        total = count_of(sum(records.values()), "training record")
        sentences.append(f"{who}, in {count_of(rounds, 'round')} and on {total}.")
        sentences += _purpose(summary, main, counts)
        if summary.get("engine") in _SIMULATED:
            sentences.append("The hospitals were simulated on one computer.")
        kept = "No record left a hospital; what did"
        if entries(summary, "pictures"):
            kept = "Besides the pictures below no record left a hospital; what did"
        sentences.append(f"{kept} is listed below.")
    if summary.get("status") != "finished":
        sentences.append("The run did not finish, so that the model is not what was planned.")
    return sentences


def _purpose(summary: dict[str, Any], main: str, counts: Counts | None) -> list[str]:
    """Return the sentence that says what the model does; none if it is not known."""
    outlined = classes(summary)
    if main == "dice":
        what = some_of(outlined) if outlined else "a structure"
        return [f"The model outlines {what} in images."]
    if looked_for := findings(summary):
        return [f"The model looks for {some_of(looked_for)} in images."]
    if counts is not None and main == KAPPA:
        first = _class(counts, 0)
        last = _class(counts, len(counts.classes) - 1)
        return [f"The model gives one of {len(counts.classes)} grades, from {first} to {last}."]
    if counts is not None and len(counts.classes) == 2:
        return [f"The model tells {_class(counts, 1)} from {_class(counts, 0)}."]
    if counts is not None:
        return [f"The model tells {len(counts.classes)} classes apart."]
    return [f"The model {_PREDICTED[main]}."] if main in _PREDICTED else []


def _class(counts: Counts, number: int) -> str:
    """Return what a class is called in a sentence."""
    name = counts.classes[number]
    return f"class {name}" if name == str(number) else f"“{name}”"


def _quality(
    summary: dict[str, Any], counts: Counts | None, measured: Estimates, noise: Noise | None
) -> list[str]:
    main = measured.metric
    total = measured.total
    records = number_tested(summary, noise)
    unit = "record" if noise is None else "patient"
    tested = []
    if records:
        tested.append(f"It was tested on {count_of(records, unit)} kept apart from training.")
    if noise is not None and noise.hides_total:
        return [*tested, TOO_LARGE]
    if total is None:
        return ["No model was tested." if not measured.sites else "It was not measured as a whole."]
    sentences = tested
    if noise is not None:
        sentences.append(
            "The counts of the test carry noise that protects patients. So no share “of 100” and "
            "no interval is given, and small differences mean nothing."
        )
    elif counts is not None and _is_complete(summary, counts):
        sentences += _recognised(counts)
    sentences += _main(main, total.value, counts, noise, bool(findings(summary)))
    bounds = total_of(nested(summary, "test", "federated"), main).bounds
    if bounds is not None:
        low, high = map(format_value, bounds)
        sentences.append(
            f"Some hospitals report coarsely: that is an estimate between {low} and {high}."
        )
    if summary.get("generated") is not True and len(sentences) > bool(records):
        sentences.append(
            "The test records come from the hospitals of this run: how good the model is "
            "elsewhere is not known."
        )
    return sentences


def _is_complete(summary: dict[str, Any], counts: Counts) -> bool:
    """Return whether there are counts of each hospital that the test has metrics of."""
    return all(site in counts.sites for site in counted_at(summary))


def _recognised(counts: Counts) -> list[str]:
    """Return what the confusion matrix says; nothing if a hospital withholds its own."""
    confusion = counts.confusion()
    if confusion is None:
        return []
    if len(confusion) > 2:
        share = share_of(confusion, "accuracy")
        return [] if share is None else [f"It named the right class for {_of(*share)}."]
    sentences = []
    for metric, label, verb in (
        ("sensitivity", 1, "recognised"),
        ("specificity", 0, "rightly said so of"),
    ):
        share = share_of(confusion, metric)
        if share is not None:
            right, rows = share
            whose = f"Of {count_of(rows, 'test record')} of {_class(counts, label)}"
            sentences.append(f"{whose} it {verb} {right:,.0f}{_per_hundred(right, rows)}.")
    if sentences:
        sentences.append(
            f"It says {_class(counts, 1)} if it takes this to be likelier than not; another "
            "threshold gives other shares."
        )
    return sentences


def _of(right: float, rows: float) -> str:
    return f"{right:,.0f} of {count_of(rows, 'test record')}{_per_hundred(right, rows)}"


def _per_hundred(right: float, rows: float) -> str:
    """Return a share as so many of 100, with its 95% interval; empty for fewer than `FEWEST`."""
    if rows < FEWEST:
        return " (too few to say how many of 100)"
    _, low, high = wilson(right, rows)
    shown = f"about {100 * right / rows:.0f} of 100"
    if right < rows and 100 * right / rows >= 99.5:
        shown = "more than 99 of 100"
    elif right > 0 and 100 * right / rows < 0.5:
        shown = "fewer than 1 of 100"
    elif right in (0, rows):
        shown = "all of them" if right else "none of them"
    return f": {shown} (95% interval {100 * low:.0f} to {100 * high:.0f})"


def _main(
    main: str, value: float, counts: Counts | None, noise: Noise | None, of_findings: bool
) -> list[str]:
    """Return the main metric in everyday words; `of_findings` if it is a mean over findings."""
    shown = format_value(value, format_of(main))
    if noise is not None:
        shown += f" ({MARK})"
    if main == "auc" and noise is not None:
        return [f"Its AUC is {shown}; 0.500 would be chance, 1.000 without error."]
    if main == "auc":
        pair = "one with and one without what it looks for"
        if counts is not None and len(counts.classes) > 2:
            pair = "one of a class and one of another (a mean over the classes)"
        if of_findings:
            pair = "one with and one without a finding (a mean over the findings)"
        return [
            f"Of two records, {pair}, it gives the right one the higher score in "
            f"{100 * value:.0f} of 100 such pairs (AUC {shown}; 50 of 100 would be chance)."
        ]
    if main == "dice":
        return [
            f"Its outlines and those of the hospitals overlap with a Dice of {shown} on average; "
            "1 is the same outline, 0 no overlap."
        ]
    if main == "c-index":
        return [
            f"Of two patients of one hospital, the one it gives the higher risk had the event "
            f"first in {100 * value:.0f} of 100 pairs (50 would be chance)."
        ]
    if main in ("r2", "d2"):
        what = "variance" if main == "r2" else "deviance"
        return [f"It explains {100 * value:.0f}% of the {what}; 0% is as good as the mean."]
    if main == KAPPA:
        return [
            f"Its grades agree with those of the hospitals with a quadratic weighted kappa of "
            f"{shown}; 0 is chance, 1 full agreement."
        ]
    if main == "mae":
        return [f"On average it is wrong by {shown}, in the unit of what it predicts."]
    return [f"Its {plain_name(main)} is {shown}."]


def _worst(summary: dict[str, Any], measured: Estimates, noised: bool) -> list[str]:
    main = measured.metric
    values = {site: estimate.value for site, estimate in measured.sites.items()}
    if len(values) < 2:
        return []
    site = worst(values, lower_is_better(main))
    estimate = measured.sites[site]
    shown = format_value(estimate.value, format_of(main))
    rows = estimate.rows or number(nested(summary, "test", "sites", site), "num-examples")
    if noised:
        rows = None
    on = f" on {count_of(rows, 'test record')}" if rows else ""
    sentence = f"It did worst at {site}: {plain_name(main)} {shown}{on}"
    total = measured.total
    if estimate.interval is not None:
        low, high = estimate.interval
        sentence += f" (95% interval {format_value(low)} to {format_value(high)})"
        if total is not None and low <= total.value <= high:
            in_all = format_value(total.value, format_of(main))
            sentence += f". That can be chance: the interval holds the {in_all} of all records"
    elif noised:
        sentence += ", by counts with noise"
    elif rows and rows < FEWEST:
        sentence += ", so few that it can be chance"
    return [f"{sentence}."]


def _gained(summary: dict[str, Any], counts: Counts | None, main: str) -> list[str]:
    """Return who is better served than by a model of their own, if that was measured."""
    chance = chance_of(summary, counts, main)
    compared = contents.comparison(summary, nested(summary, "sites"), chance)
    gains = [] if compared is None else compared.gains
    shown = [gain for gain in gains if gain.other == ALONE and gain.model in (FEDERATED, OWN)]
    return [in_words(gain, named=False) for gain in shown]


def _part(summary: dict[str, Any]) -> list[str]:
    rounds = number(summary, "rounds")
    trained = nested(summary, "trained")
    records = by_site(nested(summary, "sites"), "train")
    trainers = [site for site, count in records.items() if count]
    sentences = []
    if trained and rounds and trainers:
        counts = {site: number(trained, site) or 0.0 for site in trainers}
        fewer = sorted((count, site) for site, count in counts.items() if count < rounds)
        if fewer:
            parts = [f"{site} in {format_value(n, COUNT) if n else 'none'}" for n, site in fewer]
            sentences.append(
                f"{len(fewer)} of {count_of(len(trainers), 'hospital')} did not train in each of "
                f"the {count_of(rounds, 'round')}: {some_of(parts)}."
            )
        else:
            many = f"All {len(trainers)} hospitals" if len(trainers) > 1 else "The hospital"
            sentences.append(f"{many} trained in each of the {count_of(rounds, 'round')}.")
    if only := tested_only(summary):
        sentences.append(f"{count_of(len(only), 'hospital')} only tested the model.")
    refused = sum(
        len(sites) for sites in nested(summary, "refused").values() if isinstance(sites, list)
    )
    if refused:
        sentences.append(f"{count_of(refused, 'hospital')} could not take part.")
    failures = entries(summary, "failures")
    failed = {str(failure.get("site")) for failure in failures} - {ALL_SITES}
    if failed:
        sentences.append(
            f"{count_of(len(failed), 'hospital')} failed at least once; see what failed."
        )
    return sentences


def _privacy(privacy: contents.Privacy) -> list[str]:
    sentences = []
    patients = privacy.patients
    if patients is not None:
        target = patients.target_epsilon
        spent = patients.most
        shown = "not reported" if spent is None else f"{format_value(spent)} at most"
        sentences.append(
            f"Each training patient is protected by noise. The run may spend an epsilon of "
            f"{target} a patient; spent: {shown}. The smaller the epsilon, the less can be "
            "learned about any one patient."
        )
        if patients.shared:
            sentences.append(
                "The noise is that of sums over several hospitals, of which nobody sees a single "
                "part."
            )
    if privacy.hospital:
        epsilon = format_value(number(privacy.hospital, "epsilon"))
        if privacy.by_server:
            sentences.append(
                "Noise that the server added hides, in the model, whether a whole hospital took "
                f"part (epsilon {epsilon})."
            )
        else:
            sentences.append(
                "Noise that the hospitals added together hides what each of them gave to the model "
                f"(epsilon {epsilon})."
            )
    if patients is None:
        sentences.append(
            "No noise protects single patients: how much could be inferred about one of them is "
            "not bounded."
        )
    return sentences
