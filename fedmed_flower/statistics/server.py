"""Federated statistics: the server asks, adds up what hospitals answer, and writes it down."""

from __future__ import annotations

import json
import logging
import platform
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from flwr.app import ConfigRecord, Context, RecordDict
from flwr.serverapp import Grid

from fedmed_flower.data.site import in_simulation
from fedmed_flower.errors import InputError, shown
from fedmed_flower.privacy.patient import LEDGERS
from fedmed_flower.server.ask import ask_all
from fedmed_flower.server.duplicates import Namesakes
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.server.sites import wait_for_sites
from fedmed_flower.settings.disclosure import DisclosureSettings
from fedmed_flower.settings.plan import refuse_evaluation
from fedmed_flower.settings.registry import Sections, effective, require_known
from fedmed_flower.settings.secure import refuse_sums
from fedmed_flower.settings.survey import SurveySettings
from fedmed_flower.settings.text import expand
from fedmed_flower.statistics.local import OTHERS
from fedmed_flower.statistics.outlying import drift_between_groups, drift_between_sites
from fedmed_flower.statistics.page import STATISTICS_FILE, write_page
from fedmed_flower.statistics.pooling import place_of
from fedmed_flower.statistics.replies import read_reply
from fedmed_flower.statistics.request import Request
from fedmed_flower.statistics.summary import (
    alarms,
    alert_weeks,
    compared,
    summarise,
)
from fedmed_flower.statistics.table import tables
from fedmed_flower.statistics.weekly import METHODS
from fedmed_flower.statistics.withheld import MISSING
from fedmed_flower.wire import (
    ANSWER,
    LEDGER_DIR,
    MESSAGE_VERSION,
    REQUEST,
    RUN_KEY,
    SITE_RECORD,
    STATISTICS,
    VERSION,
    require_version,
)

log = logging.getLogger("flwr.fedmed")

DRIFT = ("", "sites", "groups")
_NOT_COMPARED = {
    "sites": "nothing was compared: no two hospitals have sent the same column",
    "groups": "nothing was compared by {}: no hospital has sent two groups of it. Dates and "
    "numbers need windows, wide enough for the minimum of patients: --window, in days for dates",
}
_PACKAGES = ("fedmed-flower", "flwr", "numpy")


@dataclass
class Answer:
    """The answers of all hospitals.

    Attributes
    ----------
    request : Request
    sites : dict
        Each hospital's answer, by its name.
    failures : list of (str, str)
        Each hospital without an answer, and why.
    sources : set of str
        Where the hospitals' rows come from.
    generated : bool
        Whether rows were generated.
    """

    request: Request
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    sources: set[str] = field(default_factory=set)
    generated: bool = False

    def groups(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Return the answers by group and by hospital; the group ``""`` is all rows.

        Windows come in the order of their starts, other groups in that of their names; all others
        come last.
        """
        by_name: dict[str, dict[str, dict[str, Any]]] = {}
        starts: dict[str, float] = {}
        for site, reported in self.sites.items():
            for group in reported["groups"]:
                by_name.setdefault(group["name"], {})[site] = group
                starts[group["name"]] = float("inf") if group["start"] is None else group["start"]
        names = sorted(by_name, key=lambda n: (n == OTHERS, starts[n], place_of(n)))
        return {name: by_name[name] for name in names}

    def overall(self, group: str = "") -> dict[str, Any]:
        """Return the statistics of all hospitals together; see `summary.summarise`.

        The survival curve of a group is that of the hospitals in its ``sites``; see `curve_sites`.
        """
        groups = self.groups()
        return self._overall(groups.get(group, {}), curve_sites(groups).get(group, []))

    def summaries(self) -> dict[str, dict[str, Any]]:
        """Return by group the statistics of all hospitals together, and of each by itself."""
        groups = self.groups()
        sites = curve_sites(groups)
        return {
            name: {
                "overall": self._overall(reported, sites[name]),
                "sites": {
                    site: summarise([group], self.request) for site, group in reported.items()
                },
            }
            for name, reported in groups.items()
        }

    def _overall(self, reported: Mapping[str, Any], sites: list[str]) -> dict[str, Any]:
        curves = [reported[site]["survival"] for site in sites]
        figures = summarise(list(reported.values()), self.request, curves)
        if "survival" in figures:
            figures["survival"]["sites"] = sites
        return figures


def curve_sites(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return by group the hospitals whose survival curves are pooled.

    They are the same for all groups, so that the groups can be compared. A group that they have not
    all reported has no hospital. What each hospital puts among all others differs, so that group
    does not decide which hospitals they are.

    Parameters
    ----------
    groups : mapping of str to mapping of str to dict
        The answers by group and by hospital.
    """
    reporting = {
        name: [site for site, group in reported.items() if "survival" in group]
        for name, reported in groups.items()
    }
    named = {name: sites for name, sites in reporting.items() if name != OTHERS}
    _, hospitals = compared(named or reporting)
    return {
        name: hospitals if set(hospitals) <= set(sites) else [] for name, sites in reporting.items()
    }


def ask(
    grid: Grid, request: Request, timeout: float, config: Mapping[str, Any] | None = None
) -> Answer:
    """Ask every connected hospital, and keep the answers that pass all checks.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
    request : Request
    timeout : float
        Seconds to wait for answers.
    config : mapping, optional
        What travels beside the request.

    Returns
    -------
    Answer
        A hospital without an answer that passes all checks is among its `failures`.
    """
    record = ConfigRecord({VERSION: MESSAGE_VERSION, REQUEST: request.to_text(), **(config or {})})
    contents = {node_id: RecordDict({"config": record}) for node_id in grid.get_node_ids()}
    answer = Answer(request)
    names: dict[int, str] = {}
    namesakes = Namesakes()

    def read(node_id: int, content: RecordDict) -> tuple[dict[str, Any], str, bool]:
        site = names.get(node_id, f"node {node_id}")
        require_version(content.config_records[SITE_RECORD].get(VERSION), site, "hospital")
        return _read(content)

    answers, failures = ask_all(grid, STATISTICS, contents, read, timeout, names)
    for one in answers:
        answer.sites[one.site], source, generated = one.value
        namesakes.take(one.node_id, one.content)
        answer.sources.add(source[:200])
        answer.generated |= generated
    answer.failures = [(failure.site, failure.reason) for failure in failures]
    for reason in dict.fromkeys(reason for _, reason in answer.failures):
        hospitals = ", ".join(name for name, why in answer.failures if why == reason)
        log.warning("no statistics of %s: %s", hospitals, reason)
    if text := namesakes.text(names):
        log.warning("%s", text)
    return answer


def _read(content: RecordDict) -> tuple[dict[str, Any], str, bool]:
    """Return what a hospital answers, the source of its rows, and whether they were generated."""
    about = content.config_records[SITE_RECORD]
    reported = read_reply(content.config_records[STATISTICS][ANSWER])
    return reported, str(about.get("data", "not named")), about.get("generated") is True


def survey(
    grid: Grid,
    context: Context,
    request: Request | None = None,
    *,
    drift: str = "",
    alert: str = "c2",
    sections: Sections = (),
    command: Sequence[str] = ("APP",),
) -> Answer:
    """Ask all hospitals and leave a complete run folder.

    The folder holds ``summary.json``, ``statistics.json``, ``report.html`` and ``log.txt``.

    Parameters
    ----------
    grid, context
        As Flower gives them to a ServerApp.
    request : Request, optional
        By default tables and moments of all columns.
    drift : {"", "sites", "groups"}
        ``sites`` compares each hospital with all others, ``groups`` each group of the request's
        ``by`` with the first of the same hospital; see `statistics.outlying`.
    alert : {"c2", "cusum", "farrington"}
        The method that finds weeks with more cases than before; see `statistics.weekly`.
    sections : sequence of Section classes
        The app's own settings.
    command : sequence of str
        The app, and options, with which `fedmed statistics` asks these hospitals; the page shows
        how to ask again for what is withheld.

    Raises
    ------
    InputError
        If an argument or a setting is wrong, or if no hospital has sent statistics or has a column
        that was named.
    """
    if drift not in DRIFT:
        raise InputError(f"drift must be one of {', '.join(DRIFT[1:])}, or empty, got {drift!r}")
    if alert not in METHODS:
        raise InputError(f"alert must be one of {', '.join(METHODS)}, got {alert!r}")
    require_known(context.run_config, sections)
    refuse_evaluation(context.run_config, "asks for statistics")
    refuse_sums(context.run_config, "asks for statistics")
    settings = SurveySettings.from_run_config(context.run_config)
    used = (SurveySettings, DisclosureSettings, *sections)
    began = time.monotonic()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    folder = RunFolder.named(settings.run_dir)
    folder.require_unused()
    with folder.log_file():
        wait_for_sites(grid, settings.min_sites)
        config: dict[str, Any] = {RUN_KEY: secrets.token_hex(8)}
        if in_simulation():
            config[LEDGER_DIR] = str(folder.path / LEDGERS)
        answer = ask(grid, request or Request(), settings.round_timeout, config)
        content = _content(answer, drift, alert) | {"command": list(command)}
        folder.write_json(STATISTICS_FILE, content)
        about = {
            "app": grid.run.fab_id.rpartition("/")[2] or "federated statistics",
            "started": started,
            "seconds": round(time.monotonic() - began, 1),
            "config": expand(context.run_config) | effective(context.run_config, used),
        }
        folder.write_summary(about | _summary(answer, content))
        log.info("report: %s", write_page(folder.path))
    if not answer.sites:
        reason = answer.failures[0][1] if answer.failures else "no hospital is connected"
        raise InputError(f"no hospital has sent statistics: {reason}")
    if failure := _failure(answer):
        raise InputError(failure)
    return answer


def _content(answer: Answer, drift: str, alert: str) -> dict[str, Any]:
    """Return the content of ``statistics.json``; warn of who stands out, and of alerts."""
    groups = answer.groups()
    exact = not answer.request.epsilon
    changes: list[dict[str, Any]] = []
    if drift == "sites":
        changes = drift_between_sites(groups, exact)
    elif drift == "groups" and groups:
        changes = drift_between_groups(groups, exact)
    if drift and not changes:
        log.warning("%s", _NOT_COMPARED[drift].format(shown(answer.request.by)))
    for row in changes:
        if "stands_out" in row:
            named = " ".join((row["site"], row["group"])).strip()
            log.warning("stands out: %s", shown(f"{named}: {row['stands_out']}"))
    watched = [
        row | {"group": name}
        for name, reported in groups.items()
        for row in (alarms(reported, alert) if answer.request.weekly else ())
    ]
    for row in watched:
        if weeks := alert_weeks(row):
            named = " ".join((row["site"], row["group"])).strip()
            text = "alert: %s: more cases than before in %d week(s), the last %s"
            log.warning(text, named, len(weeks), weeks[-1])
    return {
        "request": json.loads(answer.request.to_text()),
        "sites": answer.sites,
        "failures": [{"site": name, "reason": reason} for name, reason in answer.failures],
        "groups": answer.summaries(),
        "drift": changes,
        "alerts": watched,
        "alert": alert,
    }


def _failure(answer: Answer) -> str:
    """Return why a survey has no result; empty if it has one."""
    if not answer.sites:
        return "no hospital has sent statistics"
    for column in answer.request.columns:
        reasons = {
            reason
            for reported in answer.sites.values()
            for _, name, reason in reported["withheld"]
            if name == column
        }
        # A hospital with too few patients does not say whether it has the column.
        if MISSING in reasons and not any(_reports(r, column) for r in answer.sites.values()):
            return f"no hospital has a column {column!r}"
    return ""


def _reports(reported: dict[str, Any], column: str) -> bool:
    return any(
        column in group[kind] for group in reported["groups"] for kind in ("numeric", "categorical")
    )


def _summary(answer: Answer, content: dict[str, Any]) -> dict[str, Any]:
    message = _failure(answer)
    return {
        "kind": "statistics",
        "status": "failed" if message else "finished",
        "message": message,
        "data": "generated rows, not patients"
        if answer.generated
        else "; ".join(sorted(answer.sources)),
        "generated": answer.generated,
        "sites": {
            name: sum(group["patients"] for group in reported["groups"])
            for name, reported in answer.sites.items()
        },
        "tables": tables(content),
        "failures": content["failures"],
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
    }
