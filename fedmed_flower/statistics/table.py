"""Statistics as texts: Table 1 by hospital and overall, drift, alerts, what is withheld."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from fedmed_flower.data.site import some_of
from fedmed_flower.statistics.summary import alert_weeks
from fedmed_flower.statistics.types import Table
from fedmed_flower.statistics.withheld import Withheld, all_withheld

DASH = "–"
FEW = "(few each)"
OVERALL = "Overall"
STANDS_OUT = "Stands out"
AGAIN = "Ask again"
CURVE = "Kaplan-Meier"
APART = "Not pooled: Kaplan-Meier"
_MOST_TIMES = 12


def tables(survey: Mapping[str, Any]) -> list[Table]:
    """Return all tables of a survey.

    Parameters
    ----------
    survey : mapping
        The content of ``statistics.json``.

    Returns
    -------
    list of dict
        Each with ``title``, ``head`` and ``rows`` of texts.
    """
    groups = {label(survey, name): group for name, group in survey["groups"].items()}
    noised = bool(survey["request"].get("epsilon"))
    candidates = [table_one(name, group, noised) for name, group in groups.items()]
    candidates += [pair for name, group in groups.items() for pair in _pairs(name, group)]
    candidates += [_correlations(name, group) for name, group in groups.items()]
    answered = list(survey["sites"])
    candidates += [_curve(name, group, answered) for name, group in groups.items()]
    candidates.append(_apart(groups))
    candidates += [_standing_out(survey["drift"]), _drift(survey["drift"])]
    candidates.append(_alerts(survey["alerts"], survey["alert"]))
    withheld = [*all_withheld(survey)]
    candidates += [_withheld(withheld), _again(withheld, survey.get("command", ["APP"]))]
    candidates.append(_failures(survey["failures"]))
    return [table for table in candidates if table["rows"]]


def label(survey: Mapping[str, Any], name: str) -> str:
    """Return the label of a group: the column that makes groups, and its value."""
    return f"{survey['request']['by']} {name}" if name else ""


def table_one(name: str, group: Mapping[str, Any], noised: bool = False) -> Table:
    """Return the table that describes the patients, by hospital and overall.

    Without noise, a value that a hospital may have pooled with other small ones is shown as few,
    and a quantile by the bounds between which it certainly lies.
    """
    columns = [*group["sites"].values(), group["overall"]]
    title = "Table 1" + (f", {name}" if name else "")
    rows = [["Patients", *(count(column["patients"]) for column in columns)]]
    if any(column["rows"] != column["patients"] for column in columns):
        rows.append(["Rows", *(count(column["rows"]) for column in columns)])
    for variable, reported in group["overall"]["numeric"].items():
        parts = [column["numeric"].get(variable) for column in columns]
        if "mean" in reported:
            rows.append([f"{variable}, mean (SD)", *map(_mean, parts)])
        if "quantiles" in reported:
            medians = [_median(part, noised) for part in parts]
            rows.append([f"{variable}, median [Q1, Q3]", *medians])
        rows.append([f"{variable}, missing", *map(_missing, parts)])
    for variable, reported in group["overall"]["categorical"].items():
        parts = [column["categorical"].get(variable) for column in columns]
        for value in reported.get("counts", ()):
            shown = [_share(part, value, noised) for part in parts]
            # The sum leaves out what hospitals count among their few.
            shown[-1] = "≥" * ("few" in shown) + shown[-1]
            rows.append([f"{variable} = {value}, n (%)", *shown])
        if reported.get("few"):
            rows.append([f"{variable} {FEW}, n (%)", *(_few(part) for part in parts)])
        rows.append([f"{variable}, missing", *map(_missing, parts)])
    return {"title": title, "head": ["", *group["sites"], OVERALL], "rows": rows}


def figure(value: float | None) -> str:
    """Return a number with about four digits; a dash if there is none."""
    if value is None or not math.isfinite(value):
        return DASH
    size = abs(value)
    if size and (size < 0.001 or size >= 1e7):
        return f"{value:.3g}".replace("-", "−")
    digits = 3 - sum(size >= bound for bound in (1, 10, 1000))
    return f"{value:,.{digits}f}".replace("-", "−")


def count(value: float | None) -> str:
    """Return a number of rows as text; a dash if there is none."""
    return DASH if value is None else f"{value:,.0f}"


def _mean(part: Mapping[str, Any] | None) -> str:
    if part is None or part.get("mean") is None:
        return DASH
    return f"{figure(part['mean'])} ({figure(part['sd'])})"


def _median(part: Mapping[str, Any] | None, noised: bool) -> str:
    if part is None or "quantiles" not in part:
        return DASH
    quantiles = part["quantiles"].values()
    if noised:
        texts = [_estimate(**quantile) for quantile in quantiles]
    else:
        texts = [_bounds(part["whole"], **quantile) for quantile in quantiles]
    low, middle, high = texts
    return f"{middle} [{low}, {high}]"


def _bounds(whole: bool, low: float | None, high: float | None, estimate: float | None) -> str:
    """Return the bounds of a quantile, as one number if they are printed alike.

    The upper one is not reached, unless the column holds whole numbers.
    """
    least = _number(low, whole)
    most = _number(high, whole)
    if least == DASH:
        return DASH if most == DASH else f"{'≤' if whole else '<'}{most}"
    if most == DASH:
        return f"≥{least}"
    if least == most:
        return least
    return f"{least} to {'' if whole else '<'}{most}"


def _estimate(low: float | None, high: float | None, estimate: float | None) -> str:
    """Return an estimate with noise; if its cell is open at one end, the bound at the other."""
    least = figure(low)
    most = figure(high)
    if least == DASH:
        return DASH if most == DASH else f"<{most}"
    return f"≥{least}" if most == DASH else figure(estimate)


def _number(value: float | None, whole: bool) -> str:
    """Return a bound; between two whole numbers lies a median that is not whole."""
    if whole and value is not None and math.isfinite(value) and value == int(value):
        return f"{value:,.0f}".replace("-", "−")
    return figure(value)


def _missing(part: Mapping[str, Any] | None) -> str:
    return DASH if part is None else count(part["missing"])


def _share(part: Mapping[str, Any] | None, value: str, noised: bool) -> str:
    if part is None or "counts" not in part:
        return DASH
    number = part["counts"].get(value, 0)
    # A hospital that has pooled small cells may have rows with this value among them.
    if not number and part["few"] and not noised:
        return "few"
    return f"{count(number)} ({100 * number / part['n']:.1f})" if part["n"] else DASH


def _few(part: Mapping[str, Any] | None) -> str:
    if part is None or "few" not in part or not part["n"]:
        return DASH
    return f"{count(part['few'])} ({100 * part['few'] / part['n']:.1f})"


def _named(title: str, group: str) -> str:
    return f"{title}, {group}" if group else title


def _pairs(name: str, group: Mapping[str, Any]) -> list[Table]:
    crossed = []
    for reported in group["overall"]["pairs"]:
        one, other = reported["columns"]
        rows = [
            [f"{one} = {value}", *map(count, counts)]
            for value, counts in zip(reported["rows"], reported["counts"], strict=True)
        ]
        head = ["", *(f"{other} = {value}" for value in reported["across"])]
        what = f"{one} by {other}, {reported['hospitals']} hospitals"
        crossed.append({"title": _named(what, name), "head": head, "rows": rows})
    return crossed


def _correlations(name: str, group: Mapping[str, Any]) -> Table:
    rows = [
        [
            *reported["columns"],
            figure(reported["r"]),
            count(reported["n"]),
            count(reported["hospitals"]),
        ]
        for reported in group["overall"]["correlations"]
    ]
    head = ["", "", "r", "n", "hospitals"]
    return {"title": _named("Correlations", name), "head": head, "rows": rows}


def _curve(name: str, group: Mapping[str, Any], answered: Sequence[str]) -> Table:
    """Return about a dozen points of the curve, the last among them; none if nothing is pooled."""
    title = _named(CURVE, name)
    head = [
        "time",
        "at risk after",
        "events until then",
        "survival, times rounded up",
        "at least",
        "at most",
    ]
    overall = group["overall"]
    if "survival" not in overall:
        return {"title": title, "head": head, "rows": []}
    curve = overall["survival"]
    step = max(1, math.ceil(len(curve["times"]) / _MOST_TIMES))
    indices = range(len(curve["times"]))[::-step][::-1]
    unit = "patients" if overall["rows"] == overall["patients"] else "rows"
    hospitals = hospitals_of(curve["sites"], answered)
    return {
        "title": f"{title}: {curve['patients']:,.0f} {unit} of {hospitals}",
        "head": head,
        "rows": [_point(curve, index) for index in indices],
    }


def _point(curve: Mapping[str, Any], index: int) -> list[str]:
    return [
        figure(curve["times"][index]),
        _from_to(curve["at_risk_low"][index], curve["at_risk_high"][index]),
        _from_to(curve["events_low"][index], curve["events_high"][index]),
        *(figure(curve[key][index]) for key in ("survival", "survival_low", "survival_high")),
    ]


def hospitals_of(sites: Sequence[str], answered: Sequence[str]) -> str:
    """Return how many of the hospitals that answered are in a figure, and which are not."""
    others = [name for name in answered if name not in sites]
    text = f"{len(sites)} of {len(answered)} hospitals"
    return f"{text}; not {some_of(others)}" if others else text


def _from_to(low: float, high: float) -> str:
    """Return bounds of a count, as one number if they agree."""
    texts = [count(low), count(high)]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def _apart(groups: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the groups of which a hospital reported a curve, and none is pooled."""
    rows = []
    for name, group in groups.items():
        curve = group["overall"].get("survival")
        if curve is not None and not curve["sites"]:
            own = [site for site, figures in group["sites"].items() if "survival" in figures]
            rows.append([name, some_of(own), "no hospital has a curve of each compared group"])
    head = ["group", "reported by", "why it is not pooled"]
    return {"title": APART, "head": head, "rows": rows}


def _standing_out(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Return who stands out; if drift was looked for and nobody does, a row that says so."""
    rows = [
        [_hospital(entry), entry["what"], entry["stands_out"], figure(entry.get("corrected"))]
        for entry in entries
        if "stands_out" in entry
    ]
    if any("corrected" in entry for entry in entries) and not rows:
        unknown = sum("note" in entry for entry in entries)
        shown = f"{unknown} of {len(entries)} comparisons were not possible" if unknown else ""
        rows = [["nobody", "", shown, ""]]
    return {"title": STANDS_OUT, "head": ["hospital", "what", "how", "p, corrected"], "rows": rows}


def _drift(entries: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            *(_hospital(entry), entry["against"], entry["column"], _compared(entry)),
            *(figure(entry.get(key)) for key in ("psi", "ks", "difference", "p", "corrected")),
        ]
        for entry in entries
    ]
    head = [
        "hospital",
        "against",
        "column",
        "what",
        "PSI",
        "KS",
        "missing",
        "p",
        "p, corrected",
    ]
    return {"title": "Drift", "head": head, "rows": rows}


def _compared(entry: Mapping[str, Any]) -> str:
    """Return what was compared, and whether it stands out or could not be compared."""
    note = entry.get("note", "stands out" if "stands_out" in entry else "")
    return f"{entry['what']}: {note}" if note else str(entry["what"])


def _hospital(entry: Mapping[str, Any]) -> str:
    return f"{entry['site']}, {entry['group']}" if entry["group"] else f"{entry['site']}"


def _alerts(entries: Sequence[Mapping[str, Any]], method: str) -> Table:
    rows = []
    for entry in entries:
        weeks = entry["weeks"]
        unknown = sum(number is None for number in entry["counts"])
        judged = sum(alert is not None for alert in entry.get("alert", ()))
        shown = entry.get("note") or ", ".join(alert_weeks(entry))
        if not shown:
            shown = "none" if judged else "too few weeks are known to judge any"
        if unknown:
            shown += f" (not judged: {unknown} withheld)"
        first = weeks[0] if weeks else DASH
        rows.append([_hospital(entry), first, *map(str, (len(weeks), unknown, judged)), shown])
    head = ["hospital", "first week", "weeks", "withheld", "judged", "alerts"]
    return {"title": f"Weekly counts ({method})", "head": head, "rows": rows}


def _withheld(withheld: Sequence[Withheld]) -> Table:
    rows = [[entry.site, entry.group, entry.what, entry.why] for entry in withheld]
    return {"title": "Withheld", "head": ["hospital", "group", "what", "why"], "rows": rows}


def _again(withheld: Sequence[Withheld], command: Sequence[str]) -> Table:
    """Return a command for each figure that might be disclosed if it was asked for alone."""
    hospitals: dict[tuple[str, str], dict[str, None]] = {}
    for entry in withheld:
        if entry.alone is not None:
            words = shlex.join(["fedmed", "statistics", *command, *entry.alone.to_options()])
            hospitals.setdefault((entry.what, words), {})[entry.site] = None
    rows = [[what, ", ".join(names), words] for (what, words), names in hospitals.items()]
    return {"title": AGAIN, "head": ["what", "withheld by", "command"], "rows": rows}


def _failures(failures: Sequence[Mapping[str, str]]) -> Table:
    rows = [[entry["site"], entry["reason"]] for entry in failures]
    return {"title": "No answer", "head": ["hospital", "why"], "rows": rows}
