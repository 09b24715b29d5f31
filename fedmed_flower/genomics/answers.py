"""The hospitals of an association study: who takes part, and what is made of their answers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedmed_flower.arrays.views import is_finite, view
from fedmed_flower.errors import InputError
from fedmed_flower.genomics.association import (
    CASE_COPIES,
    CASES,
    CONTROL_COPIES,
    CONTROLS,
    SQUARES,
    WITHHELD,
    Counts,
    Floats,
)
from fedmed_flower.genomics.plink import MOST_POSITION, Listing
from fedmed_flower.runs.experiment import RunFailedError
from fedmed_flower.server.duplicates import Namesakes
from fedmed_flower.server.history import Failure
from fedmed_flower.server.screening import error_text
from fedmed_flower.server.sites import learn_name
from fedmed_flower.wire import SITE_RECORD

log = logging.getLogger("flwr.fedmed")

T = TypeVar("T")
# No hospital has more people or variants, and no study more covariates.
_MOST, _MOST_COVARIATES = 10**9, 200
# What a malformed answer makes its readers raise.
_MALFORMED = (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, StopIteration)


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
            Where no hospital is left.
        """
        self.asked += 1
        places = {self.nodes[site]: site for site in contents}
        kind, found = f"{MessageType.QUERY}.{question}", dict[int, T]()
        messages = [Message(contents[site], node, kind) for node, site in places.items()]
        for reply in self.grid.send_and_receive(messages, timeout=self.timeout):
            if (site := places.pop(reply.metadata.src_node_id, None)) is None:
                continue
            if reply.has_error():
                self.leave_out(site, question, error_text(reply), block)
                continue
            try:
                found[site] = read(site, reply.content)
            except _MALFORMED as error:
                text = str(error) if isinstance(error, ValueError) else type(error).__name__
                self.leave_out(site, question, f"malformed answer: {text}", block)
        for site in places.values():
            self.leave_out(site, question, f"no answer within {self.timeout:g} s", block)
        if not self.taking:
            raise RunFailedError(f"no site is left: {self.failures[-1].reason}")
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
        Where none does.
    """
    panel, names, found = Panel(grid, timeout), dict[int, str](), dict[int, dict[str, Any]]()
    refused: list[tuple[int, str]] = []
    namesakes = Namesakes()
    messages = [
        Message(RecordDict(), node, f"{MessageType.QUERY}.cohort") for node in grid.get_node_ids()
    ]
    waiting = {message.metadata.dst_node_id for message in messages}
    for reply in grid.send_and_receive(messages, timeout=timeout):
        node = reply.metadata.src_node_id
        waiting.discard(node)
        learn_name(names, node, reply)
        if reply.has_error():
            refused.append((node, error_text(reply)))
            continue
        try:
            found[node] = _about(reply.content)
            record = reply.content.config_records[SITE_RECORD]
            panel.sources.add(str(record["data"]))
            panel.generated |= bool(record["generated"])
            panel.simulated &= bool(record["simulated"])
            namesakes.take(reply)
        except _MALFORMED as error:
            found.pop(node, None)
            refused.append((node, f"malformed answer: {type(error).__name__} {error}"))
    refused += [(node, f"no answer within {timeout:g} s") for node in waiting]
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
        failure = Failure(0, "cohort", names.get(node, f"node {node}"), reason)
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


def _about(content: RecordDict) -> dict[str, Any]:
    record = dict(content.config_records["cohort"])
    about: dict[str, Any] = {
        key: int(record[key])  # type: ignore[arg-type]
        for key in ("people", "cases", "variants", "minimum")
    }
    within = min(about.values()) >= 0 and max(about.values()) <= _MOST
    if not within or about["cases"] > about["people"] or not about["people"]:
        raise ValueError(f"{about} cannot be")
    about |= {key: str(record[key]) for key in ("trait", "phenotype")}
    about["covariates"] = [str(name) for name in record["covariates"]]  # type: ignore[union-attr]
    if (many := len(about["covariates"])) > _MOST_COVARIATES:
        raise ValueError(f"{many} covariates, where at most {_MOST_COVARIATES} can be")
    return about


def read_listing(content: RecordDict, most: int) -> Listing:
    """Return the part of a list of variants that a hospital sent.

    Raises
    ------
    ValueError
        Where it is malformed, or longer than `most`.
    """
    record, places = content.config_records["variants"], content.array_records["places"]
    chromosomes, positions = view(places["chromosomes"]), view(places["positions"])
    texts = [str(record[name]).split("\n") for name in ("names", "first", "second")]
    count = len(positions)
    if chromosomes.dtype != np.int8 or positions.dtype != np.int64:
        raise ValueError("places of another type")
    if chromosomes.shape != (count,) or not 0 < count <= most:
        raise ValueError(f"{count} variants where 1 to {most} were asked for")
    if any(len(text) != count for text in texts):
        raise ValueError("ids and alleles for another number of variants")
    if chromosomes.min() < 0 or chromosomes.max() > 22 or not _within(positions, 0, MOST_POSITION):
        raise ValueError("places on no chromosome")
    return Listing(chromosomes, positions, *texts, offset=int(record["offset"]))  # type: ignore


def read_counts(content: RecordDict, variants: int, about: Mapping[str, int]) -> Counts:
    """Return the counts that a hospital sent.

    Raises
    ------
    ValueError
        Where they are malformed, or no counts of as many people.
    """
    values = _values(content, (variants, 5))
    if values.dtype != np.int64:
        raise ValueError(f"counts of type {values.dtype}")
    known = values[(values != WITHHELD).any(1)]
    people = about["cases"], about["people"] - about["cases"]
    for status, copies, most in (
        (CASES, CASE_COPIES, people[0]),
        (CONTROLS, CONTROL_COPIES, people[1]),
    ):
        if not _within(known[:, status], 0, most):
            raise ValueError(f"numbers of people outside 0..{most}")
        if not _within(known[:, copies], 0, 2 * known[:, status]):
            raise ValueError("more alleles than people can have")
    both = known[:, CASE_COPIES] + known[:, CONTROL_COPIES]
    if known[:, SQUARES].any() and not _within(known[:, SQUARES], both, 2 * both):
        raise ValueError("a sum of squares that does not fit the number of alleles")
    return values


def read_sums(content: RecordDict, shape: tuple[int, ...]) -> Floats:
    """Return sums of this shape that a hospital sent.

    Raises
    ------
    ValueError
        Where they are malformed or not finite.
    """
    values = _values(content, shape)
    if values.dtype != np.float64 or not is_finite(values):
        raise ValueError("sums that are no finite numbers")
    return values


def read_terms(content: RecordDict, shape: tuple[int, int]) -> tuple[Floats, NDArray[np.bool_]]:
    """Return sums of this shape that a hospital sent, and of which variants it withholds them.

    Raises
    ------
    ValueError
        Where they are malformed or not finite.
    """
    sums = read_sums(content, shape)
    withheld = view(content.array_records["told"]["withheld"])
    if withheld.dtype != np.bool_ or withheld.shape != shape[:1]:
        raise ValueError("nothing that says which variants are withheld")
    return sums, withheld


def _values(content: RecordDict, shape: tuple[int, ...]) -> NDArray[Any]:
    values = view(content.array_records["told"]["values"])
    if values.shape != shape:
        raise ValueError(f"an array of shape {values.shape}, {shape} was asked for")
    return values


def _within(values: NDArray[Any], least: Any, most: Any) -> bool:
    return bool(((values >= least) & (values <= most)).all())
