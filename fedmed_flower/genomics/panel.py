"""The hospitals of an association study: who takes part, asked one question after the other."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedmed_flower.errors import InputError
from fedmed_flower.genomics.answers import read_about
from fedmed_flower.runs.experiment import RunFailedError
from fedmed_flower.server.ask import ask_all
from fedmed_flower.server.duplicates import Namesakes
from fedmed_flower.server.history import Failure
from fedmed_flower.wire import COHORT, SITE_RECORD

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
        What each told of its people.
    left_out : set of int
        Places of those that do not take part any more.
    failures : list of Failure
    asked : int
        Questions so far, each to all hospitals.
    sources : set of str
    generated, simulated : bool
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
        """Places of the hospitals that take part."""
        return [site for site in range(len(self.nodes)) if site not in self.left_out]

    def ask(
        self,
        question: str,
        contents: Mapping[int, RecordDict],
        read: Callable[[int, RecordDict], T],
        block: int = 0,
    ) -> dict[int, T]:
        """Ask hospitals a question; leave those out that fail or answer what cannot be.

        Parameters
        ----------
        question : str
            Name of the query.
        contents : dict
            What each is sent, by its place.
        read : callable
            Maps place and content of an answer to what is returned; raises `ValueError` or the
            like where it is malformed.
        block : int
            For the list of failures.

        Returns
        -------
        dict
            What `read` made of the answers, by place.

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
        found = {sites[answer.node_id]: answer.value for answer in answers}
        return dict(sorted(found.items()))

    def leave_out(self, site: int, question: str, reason: str, block: int = 0) -> None:
        """Go on without a hospital."""
        self.left_out.add(site)
        self.failures.append(Failure(block, question, self.names[site], reason))
        log.warning("%s is left out: %s", self.names[site], reason)


def assemble(grid: Grid, timeout: float, trait: str) -> Panel:
    """Ask every connected site for its people; those with the same study take part.

    Raises
    ------
    InputError
        If none does.
    """
    panel, names, found = Panel(grid, timeout), dict[int, str](), dict[int, dict[str, Any]]()
    namesakes = Namesakes()

    def read(_: int, content: RecordDict) -> tuple[dict[str, Any], str, bool, bool]:
        about, record = read_about(content), content.config_records[SITE_RECORD]
        return about, str(record["data"]), bool(record["generated"]), bool(record["simulated"])

    contents = {node: RecordDict() for node in grid.get_node_ids()}
    answers, failures = ask_all(grid, COHORT, contents, read, timeout, names)
    for answer in answers:
        found[answer.node_id], source, generated, simulated = answer.value
        panel.sources.add(source)
        panel.generated |= generated
        panel.simulated &= simulated
        namesakes.take(answer.node_id, answer.content)
    refused = [(failure.node_id, failure.reason) for failure in failures]
    for node, about in list(found.items()):
        if about["trait"] != trait:
            del found[node]
            refused.append(
                (node, f"its trait is {about['trait']}, and the test takes a {trait} one")
            )
    studies = Counter((about["phenotype"], *about["covariates"]) for about in found.values())
    for node, about in list(found.items()):
        study = (about["phenotype"], *about["covariates"])
        if study != (most := studies.most_common(1)[0][0]):
            del found[node]
            ours, theirs = ", ".join(most), ", ".join(study)
            refused.append((node, f"its columns are {theirs}, most hospitals' {ours}"))
    for node, reason in refused:
        failure = Failure(0, COHORT, names.get(node, f"node {node}"), reason)
        panel.failures.append(failure)
        log.warning("%s does not take part: %s", failure.site, reason)
    if not found:
        raise InputError(
            f"no site takes part: {refused[0][1]}" if refused else "no site is connected"
        )
    for node in sorted(found, key=lambda node: (names.get(node, ""), node)):
        panel.nodes.append(node)
        panel.names.append(names.get(node, f"node {node}"))
        panel.about.append(found[node])
    if text := namesakes.text(dict(zip(panel.nodes, panel.names, strict=True))):
        log.warning("%s", text)
    return panel
