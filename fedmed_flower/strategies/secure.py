"""Rounds of which the server learns sums alone: what is summed, and what is made of a sum."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from numpy.typing import NDArray

from fedmed_flower.arrays import kernels
from fedmed_flower.arrays.views import own_content, view
from fedmed_flower.data.site import some_of
from fedmed_flower.methods.base import Method
from fedmed_flower.metrics.summing import Grid, finer_grids, partial_metrics, record_of_sums
from fedmed_flower.secure.collector import SpoiltError
from fedmed_flower.secure.encoding import SecureError
from fedmed_flower.secure.parts import (
    BY,
    CLIPPED,
    EXAMPLES,
    GRIDS,
    LOSS,
    MODEL,
    ONES,
    TOLD,
    TOTAL,
    UNIFORM,
    figures_of,
    rows_of,
)
from fedmed_flower.secure.record import DATA, TRAIN, Hello, Record, TooFewOfGroupError
from fedmed_flower.secure.ring import FIXED, REAL, Layout, Part
from fedmed_flower.secure.shares import Declared, Shares
from fedmed_flower.server.inbox import SUM_NODE
from fedmed_flower.server.screening import screen
from fedmed_flower.server.secure import Opened, SecureSums, reply_of
from fedmed_flower.settings.text import setting_error
from fedmed_flower.wire import ALL_SITES, RUN_KEY

log = logging.getLogger("flwr.fedmed")

# Buffers, such as a running variance, may change by as much in a round; so may a loss.
_REAL_BOUND = 2.0**20
# A mean that is longer than so many times the median of the last rounds is not used.
_LONGEST = 4.0
_REMEMBERED = 5
# How often an evaluation is asked for, until the grids of scores resolve them.
_MOST_GRIDS = 3
# With two groups no rule can tell which one is wrong.
_FEWEST_GROUPS = 3
_COUNT = "count"
_FEDPROX = "fedprox"


def _named(group: str) -> str:
    """Return how a group is named among the sites; without a name, all of them."""
    return f"group {group}" if group else ALL_SITES


@dataclass(frozen=True)
class GroupRule:
    """A rule that compares several replies, and so needs the means of several groups.

    Parameters
    ----------
    strategy : str
        Its name.
    replies : int
        The fewest replies with which it keeps its promise.
    """

    strategy: str
    replies: int

    def require_groups(self, hellos: Sequence[Hello]) -> None:
        """Raise `InputError` if the hospitals' study has no groups, or too few; with the way out.

        Parameters
        ----------
        hellos : sequence of Hello
            Nothing is known before the first.
        """
        if not hellos:
            return
        groups = max(hello.groups for hello in hellos)
        if groups >= max(1, self.replies):
            return
        least = max(hello.least for hello in hellos)
        colluders = max(hello.colluders for hello in hellos)
        wanted = max(_FEWEST_GROUPS, self.replies)
        raise setting_error(
            f'secure="sum" with {self.strategy}, whose rule compares replies, needs a study with '
            f"groups: at least {wanted} of least + c = {least} + {colluders} members each, which "
            f"is {wanted * (least + colluders)} hospitals; this study has "
            f"{groups or 'no'} groups. Each member writes them into its own file (fedmed keys "
            "regroup; in a simulation set secure-groups), or take FedAvg",
            "secure",
        )


class SecureRounds:
    """The rounds of a strategy by secure sums.

    Parameters
    ----------
    sums : SecureSums
    exponent : int
        No weight may change by more than 2 to the power of this in a round.
    by : {"examples", "uniform"}
        How hospitals are weighted.
    losses : bool
        Whether the mean training loss is part of the sum.
    noise : Declared, optional
        The noise of which each hospital adds a share. All hospitals then weigh the same, and beside
        the model nothing is summed.
    rule : GroupRule, optional
        The strategy's rule, if it compares several replies: the study must then have groups. None
        if it takes a mean.

    Attributes
    ----------
    totals : dict of str to int
        Training rows, by the name of the group, or by the empty name if the study has no groups;
        empty if the mean is not weighted by them.
    counted : dict of str to frozenset of str
        The hospitals whose rows these are, by group.
    spoilt : int
        Groups of the last round of which a hospital has sent what no honest one sends.
    """

    def __init__(
        self,
        sums: SecureSums,
        exponent: int,
        by: str,
        losses: bool,
        noise: Declared | None = None,
        rule: GroupRule | None = None,
    ) -> None:
        self.sums = sums
        self.bound = 2.0**exponent
        self.by = by if noise is None else UNIFORM
        self.losses = losses
        self.noise = noise
        self.rule = rule
        self.totals: dict[str, int] = {}
        self.counted: dict[str, frozenset[str]] = {}
        self.spoilt = 0
        # What is summed in each phase of evaluation.
        self._layouts: dict[str, Layout] = {}
        # On which scores are counted; empty before the first evaluation.
        self._grids: list[Grid] = []
        # Lengths of the last mean changes, by group.
        self._lengths: dict[str, deque[float]] = {}
        self._sent: ArrayRecord | None = None

    def begin(self, nodes: Collection[int], server_round: int, minimum: int | None = None) -> None:
        """Greet nodes, and count all training rows once if the mean is weighted by them.

        Parameters
        ----------
        nodes : collection of int
            All that may train, also those that a round does not ask.
        server_round : int
        minimum : int, optional
            As in `SecureSums.greet`. All are waited for if rows are to be counted, since no later
            question about data is answered over other hospitals than the first.

        Raises
        ------
        SecureError
            If the rows cannot be counted.
        InputError
            If the rule compares replies, and the study has no groups, or too few.
        """
        counted = self.by == UNIFORM or bool(self.counted)
        self.sums.greet(nodes, server_round, minimum if counted else None)
        if self.rule is not None:
            self.rule.require_groups([*self.sums.hellos.values()])
        if not counted:
            self._count({*nodes}, server_round)

    def _count(self, nodes: set[int], server_round: int) -> None:
        """Count training rows by group, in one sum over the hospitals of all groups.

        If a hospital is lost and too few of its group remain, the others are asked once more
        without that group.
        """
        record = self.sums.record(nodes, _COUNT, DATA, 0, Layout(()), {})
        groups = sorted({hello.group for hello in record.hellos})
        record = replace(record, layout=Layout((*map(rows_of, groups), ONES)))
        messages = [
            Message(
                RecordDict({"config": ConfigRecord({RUN_KEY: self.sums.run})}),
                node_id,
                f"{MessageType.QUERY}.{_COUNT}",
            )
            for node_id in self.sums.nodes_of(record)
        ]
        try:
            opened = self.sums.sum(messages, record, _COUNT, self.sums.timeout)
        except TooFewOfGroupError as error:
            by_group = self.sums.by_group(nodes)
            rest = nodes.difference(*(by_group[group] for group in error.groups))
            if not rest:
                raise
            for group in error.groups:
                self.sums.inbox.fail(server_round, _COUNT, f"group {group}", str(error))
            self._count(rest, server_round)
            return
        if sum(int(opened.values[rows_of(group).name][0]) for group in groups) < 1:
            raise SecureError("the hospitals have no training rows together")
        for group in groups:
            if total := int(opened.values[rows_of(group).name][0]):
                self.totals[group] = total
                self.counted[group] = frozenset(
                    name for name in opened.members if record.hello_of(name).group == group
                )

    def train(
        self,
        messages: Sequence[Message],
        everybody: Collection[int],
        sent: ArrayRecord,
        trained: Collection[str],
        server_round: int,
        timeout: float,
        minimum: int | None,
        grace: float,
    ) -> list[Message]:
        """Train a round; return a reply for each mean, of all hospitals or of those of a group.

        Parameters
        ----------
        messages : sequence of Message
        everybody : collection of int
            The nodes that may train, whether they are asked or not.
        sent : ArrayRecord
            The model that the messages hold.
        trained : collection of str
            Its trained entries; other floats are buffers, and whole numbers stay.
        server_round, timeout, minimum, grace
            As in `SecureSums.sum_each`.

        Returns
        -------
        list of Message
            Without the means that are lost.
        """
        self.spoilt = 0
        nodes = {message.metadata.dst_node_id for message in messages}
        try:
            self.begin(everybody, server_round, minimum)
            nodes = self._answering(self._weighed(nodes, server_round), sent)
            groups = self.sums.by_group(nodes)
            if not groups:
                raise SecureError("no hospital has said hello")
        except SecureError as error:
            self._lose(server_round, "", error)
            return []
        layout = self._layout(sent, trained)
        records = []
        for group in groups:
            try:
                records.append(self._record(groups[group], group, server_round, layout))
            except SecureError as error:
                self._lose(server_round, group, error)
        asked = {node for record in records for node in self.sums.nodes_of(record)}
        going = [message for message in messages if message.metadata.dst_node_id in asked]
        outcomes = self.sums.sum_each(going, records, "train", timeout, minimum, grace)
        replies = []
        for record, outcome in zip(records, outcomes, strict=True):
            try:
                replies.append(self._reply(outcome, sent))
            except SecureError as error:
                self.spoilt += isinstance(error, SpoiltError)
                self._lose(server_round, record.group, error)
        return replies

    def _lose(self, server_round: int, group: str, error: SecureError) -> None:
        """Record that the mean of a group, or of all hospitals, is lost."""
        text = f"the secure sum is lost: {error}"
        self.sums.inbox.fail(server_round, "train", _named(group), text)

    def _record(
        self, nodes: Collection[int], group: str, server_round: int, layout: Layout
    ) -> Record:
        """Return the record of the sum of a group, or of all hospitals."""
        weighting = {BY: self.by, TOTAL: self.totals.get(group, 0)}
        if self.noise is not None:
            weighting = {BY: UNIFORM, **self.noise.weighting}
        record = self.sums.record(nodes, "train", TRAIN, server_round, layout, weighting, group)
        if self.noise is not None:
            record = _with_room(record, Shares.of(record, self.noise))
        return record

    def _reply(self, outcome: Opened | SecureError, sent: ArrayRecord) -> Message:
        """Return a mean as a reply.

        Raises
        ------
        SecureError
            If the sum is lost, or the mean is much longer than those before.
        """
        if isinstance(outcome, SecureError):
            raise outcome
        inbox = self.sums.inbox
        record = outcome.record
        site = _named(record.group)
        expected = self.counted.get(record.group) or frozenset(record.names)
        share = len(outcome.members) / len(expected)
        model = self._model(outcome, sent, share)
        if lost := sorted(expected - {*outcome.members}):
            text = f"the sum is without {', '.join(lost)}; the others count the same in its place"
            inbox.note(record.server_round, "train", site, text)
        if self.noise is None and (clipped := int(outcome.values[CLIPPED.name][0])):
            text = (
                f"{clipped} changes of weights were cut to {self.bound:g} or were no numbers: "
                "raise secure-exponent, or train less in a round"
            )
            inbox.note(record.server_round, "train", site, text)
        examples = self.totals[record.group] if self.by == EXAMPLES else len(outcome.members)
        metrics = MetricRecord({"num-examples": examples})
        if self.noise is not None:
            metrics.update(self.noise.spent(record.server_round))
        elif self.losses:
            metrics["loss"] = float(outcome.values[LOSS][0] / share)
        content = RecordDict({"arrays": model, "metrics": metrics, "config": ConfigRecord()})
        return reply_of(outcome, MessageType.TRAIN, content, inbox)

    def evaluate(
        self, messages: Sequence[Message], server_round: int, phase: str, timeout: float
    ) -> list[Message]:
        """Evaluate a round; return one reply, the figures of all rows, or none if it is left out.

        Parameters
        ----------
        messages : sequence of Message
        server_round : int
        phase : {"val", "test"}
        timeout : float
        """
        if not messages:
            return []
        inbox = self.sums.inbox
        nodes = {message.metadata.dst_node_id for message in messages}
        try:
            self.sums.greet(nodes, server_round)
            settled = self.sums.settled
            figures, opened = self._figures(messages, server_round, phase, timeout)
        except SecureError as error:
            inbox.fail(server_round, phase, ALL_SITES, f"the secure sum is left out: {error}")
            return []
        asked = {*self.sums.nodes_of(opened.record)}
        if aside := sorted(inbox.name(node_id) for node_id in nodes - asked):
            why = "the first sum of figures was too" if settled else "too few of a group are there"
            text = f"the sum is without {some_of(aside)}: {why}"
            inbox.note(server_round, phase, ALL_SITES, text)
        for name, rows in partial_metrics(figures).items():
            text = f"{name} is of {rows} rows: hospitals with the others could not measure it"
            inbox.note(server_round, phase, ALL_SITES, text)
        self._record_told(opened, server_round, phase)
        metrics = MetricRecord(record_of_sums(figures, self._grids))
        return [reply_of(opened, MessageType.EVALUATE, RecordDict({"metrics": metrics}), inbox)]

    def _record_told(self, opened: Opened, server_round: int, phase: str) -> None:
        """Write down the figures of hospitals that tell their own; they are in the sum too."""
        inbox = self.sums.inbox
        for site, content in opened.told.items():
            asked = Message(RecordDict(), SUM_NODE, MessageType.EVALUATE)
            flaw = screen(Message(content, reply_to=asked), "num-examples", None)
            if flaw is not None:
                inbox.note(server_round, phase, site, f"its own figures cannot be used: {flaw}")
                continue
            (figures,) = content.metric_records.values()
            if len(figures) > 1:
                inbox.history.add(server_round, phase, site, figures)

    def _figures(
        self, messages: Sequence[Message], server_round: int, phase: str, timeout: float
    ) -> tuple[dict[str, NDArray[Any]], Opened]:
        """Return the total of each figure, with scores on grids that resolve them.

        If the grids of the evaluation before do not, hospitals are asked once more.

        Raises
        ------
        SecureError
            If a sum cannot be opened, or is of too few hospitals.
        """
        nodes = {message.metadata.dst_node_id for message in messages}
        for _ in range(_MOST_GRIDS):
            grids = [number for grid in self._grids for number in grid]
            record = self.sums.record(
                nodes,
                f"{MessageType.EVALUATE}/{phase}",
                DATA,
                server_round,
                self._layouts.get(phase, Layout(())),
                {GRIDS: grids},
            )
            asked = {*self.sums.nodes_of(record)}
            going = [
                Message(own_content(message.content), node_id, MessageType.EVALUATE)
                for message in messages
                if (node_id := message.metadata.dst_node_id) in asked
            ]
            if phase not in self._layouts:
                self._layouts[phase] = self.sums.figures(going, server_round)
                record = replace(record, layout=self._layouts[phase])
            opened = self.sums.sum(going, record, phase, timeout, whole=True)
            figures = self._counted(opened)
            finer = finer_grids(figures, self._grids)
            if finer is None:
                break
            before = self._grids
            self._grids = finer
        else:
            self._grids = before
            text = "scores lie so close together that their AUC and precision are rough"
            self.sums.inbox.note(server_round, phase, ALL_SITES, text)
        return figures, opened

    def _counted(self, opened: Opened) -> dict[str, NDArray[Any]]:
        """Return the total of each figure.

        Raises
        ------
        SecureError
            If fewer hospitals have figures than a sum must be of.
        """
        record = opened.record
        told = int(opened.values[TOLD.name][0])
        # Those that tell their own figures do not hide the others.
        tellers = sum(record.hello_of(name).tells for name in opened.members)
        needed = max(record.needed, record.least + record.colluders + tellers)
        if told < needed:
            raise SecureError(
                f"{told} of {len(opened.members)} hospitals have enough patients, and {needed} "
                "must add figures: the sum is not used"
            )
        return figures_of(record.layout, opened.values)

    def _weighed(self, nodes: set[int], server_round: int) -> set[int]:
        """Return the nodes whose rows are part of the weights; note the others.

        With one whose rows were not counted the weights would add up to more than 1.
        """
        if not self.counted:
            return nodes
        greeted = self.sums.greeted
        counted = {name for names in self.counted.values() for name in names}
        weighed = {node for name, node in greeted.items() if name in counted and node in nodes}
        late = sorted(name for name, node in greeted.items() if node in nodes - weighed)
        for name in late:
            text = (
                "it is left out: its rows were not counted; `fedmed keys regroup`, then a new run"
            )
            self.sums.inbox.note(server_round, "train", name, text)
        return weighed

    def _answering(self, nodes: set[int], sent: ArrayRecord) -> set[int]:
        """Return the nodes to ask for a model.

        If a round with the same model was lost after a hospital had settled on a set, it answers
        for no other set: the hospitals of that one are asked, if all are there. So it is with
        groups whose means were opened in a round that was lost since there were too few.
        """
        if sent is not self._sent:
            self._sent = sent
            self.sums.bound = {}
        asked: set[int] = set()
        for group, members in self.sums.by_group(nodes).items():
            bound = self.sums.bound_nodes(group)
            asked |= bound if bound and bound <= members else members
        return asked

    def _layout(self, sent: ArrayRecord, trained: Collection[str]) -> Layout:
        parts = []
        for key, array in sent.items():
            values = view(array)
            if not kernels.is_floating(values.dtype):
                continue
            if self.noise is not None and not self.noise.buffers and key not in trained:
                continue
            fixed = key in trained or self.noise is not None
            kind, bound = (FIXED, self.bound) if fixed else (REAL, _REAL_BOUND)
            parts.append(Part(f"{MODEL}{key}", values.size, kind, bound))
        if self.noise is not None:
            return Layout((*parts, ONES))
        tail = [ONES, CLIPPED]
        if self.losses:
            tail.append(Part(LOSS, 1, REAL, _REAL_BOUND))
        return Layout((*parts, *tail))

    def _model(self, opened: Opened, sent: ArrayRecord, share: float) -> ArrayRecord:
        """Return the model that was sent, moved by the mean change.

        Parameters
        ----------
        opened : Opened
        sent : ArrayRecord
        share : float
            What part of the weights is taken to be in the sum: each hospital counts the same.

        Raises
        ------
        SecureError
            If the mean is much longer than those before.
        """
        squares = 0.0
        model = ArrayRecord()
        for key, array in sent.items():
            values = view(array)
            if (change := opened.values.get(f"{MODEL}{key}")) is None:
                model[key] = array
                continue
            mean = change / share
            if opened.record.layout.part(f"{MODEL}{key}").kind == FIXED:
                squares += float(mean @ mean)
            moved = values.astype(np.float64) + mean.reshape(values.shape)
            model[key] = Array(moved.astype(values.dtype))
        # A rule that compares replies judges them itself.
        if self.rule is None:
            self._require_length(math.sqrt(squares), opened.record.group)
        return model

    def _require_length(self, length: float, group: str) -> None:
        """Refuse a mean change that is much longer than those of the rounds before."""
        lengths = self._lengths.setdefault(group, deque(maxlen=_REMEMBERED))
        if lengths and length > _LONGEST * float(np.median(lengths)) > 0:
            raise SecureError(
                f"the mean change has length {length:.3g}, more than {_LONGEST:g} times the median "
                f"of the last rounds, {np.median(lengths):.3g}: one hospital may be faulty"
            )
        lengths.append(length)


def _with_room(record: Record, shares: Shares) -> Record:
    """Return a record whose layout leaves room for the noise of all hospitals.

    Raises
    ------
    SecureError
        If hospitals would refuse it.
    """
    parts = record.layout.parts
    layout = Layout(
        tuple(replace(part, sigma=shares.total) if part.kind == FIXED else part for part in parts)
    )
    for part in layout.parts:
        if part.kind == FIXED:
            shares.require_room(part)
    return replace(record, layout=layout)


# What a strategy must not define anew: a sum is one reply, and whoever made it is not known. Its
# rule it may, if the study has groups.
OF_SUMS = ("aggregate_train", "exchange", "decode", "reply_layout")
_WAY_OUT = {
    "max_weight_share": "the server does not see the weights of single hospitals",
    "max_update_norm": "the server does not see the change of a single hospital",
    "compression": "the vectors of a sum are added as they are",
    "buffer": "a sum needs the hospitals of one round",
    "keep": "layers that stay different need a reply of their own",
    "fraction_train": (
        "weights by rows do not add up to 1 over a sample of the hospitals: leave it at 1, or take "
        "WeightedFedAvg with uniform weights"
    ),
    "fraction_evaluate": "figures of patients are summed over all hospitals: leave it at 1",
}


def require_summable(
    strategy: str, own_rule: bool, limits: dict[str, bool], method: Method | None
) -> None:
    """Raise `InputError` if a strategy cannot work with sums alone; the text has the way out.

    Parameters
    ----------
    strategy : str
        Its name.
    own_rule : bool
        Whether its rule is one that means of groups are not enough for.
    limits : dict of str to bool
        Which arguments that exclude sums are given.
    method : Method or None
    """
    if own_rule:
        raise setting_error(
            f'secure="sum" excludes {strategy}, whose rule needs single replies: take FedAvg, '
            "FedProx, WeightedFedAvg with uniform weights, a server optimiser on the mean, or a "
            "robust rule over a study with groups",
            "secure",
        )
    for name, given in limits.items():
        if given:
            raise setting_error(f'secure="sum" excludes {name}: {_WAY_OUT[name]}', "secure")
    if method is not None and method.name != _FEDPROX:
        raise setting_error(
            f'secure="sum" excludes the method {method.name}, which needs something of each '
            "hospital beside the sum: take fedprox, or none",
            "secure",
        )
