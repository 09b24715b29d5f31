"""The hospitals of an association study: which take part, and how they are asked a question."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from fedmed_flower.errors import InputError
from fedmed_flower.genomics.answers import read_about, read_design
from fedmed_flower.runs.verdict import RunFailedError
from fedmed_flower.server.ask import ask_all
from fedmed_flower.server.duplicates import Namesakes
from fedmed_flower.server.history import Failure
from fedmed_flower.wire import (
    COHORT,
    DESIGN,
    MESSAGE_VERSION,
    SITE_RECORD,
    VERSION,
    require_version,
)

log = logging.getLogger("flwr.fedmed")

T = TypeVar("T")


@dataclass
class Panel:
    """The hospitals that take part, in the order of their names.

    Attributes
    ----------
    grid : Grid
    timeout : float
        Seconds that each question may take.
    nodes : list of int
    names : list of str
    about : list of dict
        Each hospital's description of its people, as `read_about` returns it.
    left_out : set of int
        Indices of the hospitals that no longer take part.
    failures : list of Failure
    asked : int
        How many questions were asked so far.
    sources : set of str
        Names of the hospitals' data.
    generated : bool
        Whether a hospital's data are generated.
    simulated : bool
        Whether all hospitals are simulated.
    """

    grid: Grid
    timeout: float
    nodes: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    about: list[dict[str, Any]] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)
    failures: list[Failure] = field(default_factory=list)
    asked: int = 0
    sources: set[str] = field(default_factory=set)
    generated: bool = False
    simulated: bool = True

    @property
    def taking(self) -> list[int]:
        """Indices of the hospitals that take part."""
        return [site for site in range(len(self.nodes)) if site not in self.left_out]

    def ask(
        self,
        question: str,
        contents: Mapping[int, RecordDict],
        read: Callable[[int, RecordDict], T],
        block: int = 0,
    ) -> dict[int, T]:
        """Ask hospitals a question; leave out those that fail or send a malformed answer.

        Parameters
        ----------
        question : str
            Name of the query.
        contents : dict
            What is sent to each hospital, by its index.
        read : callable
            Maps a hospital's index and the content of its answer to a value; raises `ValueError`
            or the like if the answer is malformed.
        block : int
            Number of the block, for the list of failures.

        Returns
        -------
        dict
            The values that `read` returned, by the hospital's index.

        Raises
        ------
        RunFailedError
            If no hospital is left.
        """
        self.asked += 1
        sites = {self.nodes[site]: site for site in contents}
        sent = {self.nodes[site]: content for site, content in contents.items()}
        names = dict(zip(self.nodes, self.names, strict=True))
        answers, failures = ask_all(
            self.grid,
            question,
            sent,
            lambda node_id, content: read(sites[node_id], content),
            self.timeout,
            names,
        )
        for failure in failures:
            self.leave_out(sites[failure.node_id], question, failure.reason, block)
        if not self.taking:
            raise RunFailedError(f"no site is left: {self.failures[-1].reason}")
        values = {sites[answer.node_id]: answer.value for answer in answers}
        return dict(sorted(values.items()))

    def leave_out(self, site: int, question: str, reason: str, block: int = 0) -> None:
        """Leave out a hospital from here on."""
        self.left_out.add(site)
        self.failures.append(Failure(block, question, self.names[site], reason))
        log.warning("%s is left out: %s", self.names[site], reason)


def assemble(grid: Grid, timeout: float, trait: str, sums: bool = False) -> Panel:
    """Ask every connected site for its people; return the panel of those that take part.

    A site takes part if its trait is the wanted one, and its phenotype and covariates are those of
    most sites.

    Parameters
    ----------
    grid : Grid
    timeout : float
        Seconds that each question may take.
    trait : {"binary", "continuous"}
    sums : bool
        Whether only sums over hospitals are to be known: sites then do not report how many people
        they have.

    Raises
    ------
    InputError
        If no site takes part.
    """
    panel = Panel(grid, timeout)
    names: dict[int, str] = {}
    about_of: dict[int, dict[str, Any]] = {}
    namesakes = Namesakes()

    def read(node_id: int, content: RecordDict) -> tuple[dict[str, Any], str, bool, bool]:
        record = content.config_records[SITE_RECORD]
        site = names.get(node_id, f"node {node_id}")
        require_version(record.get(VERSION), site, "hospital")
        about = (read_design if sums else read_about)(content)
        return about, str(record["data"]), bool(record["generated"]), bool(record["simulated"])

    config = ConfigRecord({VERSION: MESSAGE_VERSION})
    contents = {node: RecordDict({"config": config}) for node in grid.get_node_ids()}
    answers, failures = ask_all(grid, DESIGN if sums else COHORT, contents, read, timeout, names)
    for answer in answers:
        about_of[answer.node_id], source, generated, simulated = answer.value
        panel.sources.add(source)
        panel.generated |= generated
        panel.simulated &= simulated
        namesakes.take(answer.node_id, answer.content)
    refused = [(failure.node_id, failure.reason) for failure in failures]
    for node, reason in _other_studies(about_of, trait):
        del about_of[node]
        refused.append((node, reason))
    for node, reason in refused:
        failure = Failure(0, COHORT, names.get(node, f"node {node}"), reason)
        panel.failures.append(failure)
        log.warning("%s does not take part: %s", failure.site, reason)
    if not about_of:
        raise InputError(
            f"no site takes part: {refused[0][1]}" if refused else "no site is connected"
        )
    for node in sorted(about_of, key=lambda node: (names.get(node, ""), node)):
        panel.nodes.append(node)
        panel.names.append(names.get(node, f"node {node}"))
        panel.about.append(about_of[node])
    if text := namesakes.text(dict(zip(panel.nodes, panel.names, strict=True))):
        log.warning("%s", text)
    return panel


def _other_studies(about_of: dict[int, dict[str, Any]], trait: str) -> list[tuple[int, str]]:
    """Return the nodes with another trait, or other columns than most, and the reason of each."""
    others = []
    columns_of: dict[int, tuple[str, ...]] = {}
    for node, about in about_of.items():
        if about["trait"] == trait:
            columns_of[node] = (about["phenotype"], *about["covariates"])
        else:
            reason = f"its trait is {about['trait']}, and the test takes a {trait} one"
            others.append((node, reason))
    counts = Counter(columns_of.values())
    for node, columns in columns_of.items():
        usual = counts.most_common(1)[0][0]
        if columns != usual:
            reason = f"its columns are {', '.join(columns)}, most hospitals' {', '.join(usual)}"
            others.append((node, reason))
    return others
