"""One run of rounds: sample, send, screen, aggregate, record, checkpoint, resume, stop."""

from __future__ import annotations

import inspect
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from fedmed_flower.arrays import keep_dtypes
from fedmed_flower.errors import InputError
from fedmed_flower.metrics import SUMMABLE, pool
from fedmed_flower.runfolder import ALL_SITES, Failure, History, RunFolder
from fedmed_flower.strategies.resuming import restore, save
from fedmed_flower.strategies.screening import (
    first_arrays,
    metrics_of,
    screen,
    with_shared_metrics,
)
from fedmed_flower.strategies.sites import draw, learn_name, wait_for_sites

log = logging.getLogger("flwr.fedmed")

_MINIMA = ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
_TRAIN, _EVALUATE = 0, 1


class FedAvg(flower.FedAvg):
    """Federated averaging that survives failed sites, records each site and can be resumed.

    McMahan, Moore, Ramage, Hampson, Aguera y Arcas: Communication-Efficient Learning of Deep
    Networks from Decentralized Data, AISTATS 2017, https://arxiv.org/abs/1602.05629

    Takes the arguments of Flower's `FedAvg` and those below. Two things differ: the minimum
    numbers of nodes are 1 where they are not given, so that a run with one site does not wait for
    a second one; and sites are counted and sampled after they have connected.

    Parameters
    ----------
    run_dir : str or Path, optional
        Folder for checkpoint, metrics and model. None keeps everything in memory.
    resume : bool
        Go on from the checkpoint in `run_dir` where there is one.
    seed : int, optional
        Decides which sites are sampled in a round, together with the sites' names. Drawn from the
        operating system where None.
    min_replies : int
        A round in which fewer usable training replies come back leaves the model as it is. At
        least 1.

    Attributes
    ----------
    history : History
        Every number of every site and every failure, round by round.
    result : flwr.serverapp.strategy.Result
        What `start` returns; also there while it runs and after it was interrupted.
    only : set of int, optional
        Node ids to which training and evaluation are confined.
    site_names : dict
        Site name by node id, as far as the sites have told it.

    Raises
    ------
    InputError
        Where `min_replies` is below 1, `seed` below 0, or `resume` is given without `run_dir`.
    """

    def __init__(
        self,
        *args: Any,
        run_dir: str | Path | None = None,
        resume: bool = False,
        seed: int | None = None,
        min_replies: int = 1,
        **kwargs: Any,
    ) -> None:
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        kwargs |= {name: 1 for name in _MINIMA if name not in given}
        super().__init__(*args, **kwargs)
        if min_replies < 1:
            raise InputError(f"min_replies must be at least 1, got {min_replies}")
        if resume and run_dir is None:
            raise InputError("resume needs run_dir, the folder of the run to go on with")
        self.folder = None if run_dir is None else RunFolder(run_dir)
        self.resume = resume
        if seed is not None and seed < 0:
            raise InputError(f"seed must be at least 0, got {seed}")
        self.seed = secrets.randbits(63) if seed is None else seed
        self.min_replies = min_replies
        self.history = History()
        self.result = flower.Result()
        self.only: set[int] | None = None
        self.site_names: dict[int, str] = {}
        self._evaluating = "val"
        self._timeout = math.inf
        self._sent: dict[str, int] = {}
        self._connected: set[int] = set()
        self._global: ArrayRecord | None = None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> flower.Result:
        """Run the rounds.

        Parameters
        ----------
        grid, initial_arrays, train_config, evaluate_config, evaluate_fn
            As in Flower.
        num_rounds : int
            At least 1. A resumed run does what is left of them.
        timeout : float
            Seconds to wait for the replies of a phase, and before it for the minimum of sites to
            be connected. Sites that have not replied by then are recorded as failed for that
            phase; where too few are connected, the phase is recorded as failed.

        Returns
        -------
        flwr.serverapp.strategy.Result
            Its `arrays` are the last model, and the initial one where no round succeeded.

        Raises
        ------
        InputError
            Where an argument is out of range, or the checkpoint is damaged or belongs to another
            model.
        """
        if num_rounds < 1:
            raise InputError(f"num_rounds must be at least 1, got {num_rounds}")
        if not timeout > 0:
            raise InputError(f"timeout must be above 0 seconds, got {timeout}")
        configs = {
            _TRAIN: ConfigRecord() if train_config is None else train_config,
            _EVALUATE: ConfigRecord() if evaluate_config is None else evaluate_config,
        }
        self._timeout = timeout
        self.history, self.result = History(), flower.Result(arrays=initial_arrays)
        first = restore(self, grid, initial_arrays) + 1
        if first > num_rounds + 1:
            raise InputError(
                f"num_rounds must be at least {first - 1}, the rounds that are done, "
                f"got {num_rounds}"
            )
        if first == 1 and evaluate_fn is not None:
            self._keep(0, "evaluate_metrics_serverapp", evaluate_fn(0, initial_arrays), "server")
        for server_round in range(first, num_rounds + 1):
            began = time.perf_counter()
            arrays = self.result.arrays
            messages = list(self.configure_train(server_round, arrays, configs[_TRAIN], grid))
            replies = self._exchange(grid, messages, timeout, server_round, "train")
            aggregated, metrics = self.aggregate_train(server_round, replies)
            if aggregated is not None:
                self.result.arrays = arrays = aggregated
            self._keep(server_round, "train_metrics_clientapp", metrics, "train")

            messages = list(self.configure_evaluate(server_round, arrays, configs[_EVALUATE], grid))
            replies = self._exchange(grid, messages, timeout, server_round, "val")
            metrics = self.aggregate_evaluate(server_round, replies)
            self._keep(server_round, "evaluate_metrics_clientapp", metrics, "val")

            if evaluate_fn is not None:
                metrics = evaluate_fn(server_round, arrays)
                self._keep(server_round, "evaluate_metrics_serverapp", metrics, "server")
            save(self, grid, server_round)
            seconds, line = time.perf_counter() - began, self.history.describe(server_round)
            log.info("round %d/%d  %s  %.1f s", server_round, num_rounds, line, seconds)
        return self.result

    def test(
        self,
        grid: Grid,
        arrays: ArrayRecord,
        config: ConfigRecord | None = None,
        timeout: float = 3600,
    ) -> dict[str, dict[str, float]]:
        """Evaluate a model once on every connected site's test split.

        Returns
        -------
        dict
            ``{site: {metric: value}}``, with ``"all"`` for all sites together.
        """
        content = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: ConfigRecord()})
        content.config_records[self.configrecord_key].update(config or {}, split="test")
        server_round = max((row[0] for row in self.history.rows), default=0)
        messages = [
            Message(content, node_id, MessageType.EVALUATE) for node_id in grid.get_node_ids()
        ]
        before = len(self.history.rows)
        self._evaluating = "test"
        try:
            replies = self._exchange(grid, messages, timeout, server_round, "test")
            metrics = self.aggregate_evaluate(server_round, replies)
        finally:
            self._evaluating = "val"
        self.history.add(server_round, "test", ALL_SITES, metrics or {})
        table: dict[str, dict[str, float]] = {}
        for _, _, site, metric, value in self.history.rows[before:]:
            table.setdefault(site, {})[metric] = value
        return table

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Wait for the sites, then address this round's training messages to a sample of them."""
        self._global = arrays
        if not self._enough(grid, server_round, "train", self.fraction_train, self.min_train_nodes):
            return []
        messages = super().configure_train(server_round, arrays, config, grid)
        return self._address(messages, grid, server_round, _TRAIN)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Wait for the sites, then address this round's evaluation messages to a sample of them."""
        minimum = self.min_evaluate_nodes
        if not self._enough(grid, server_round, "val", self.fraction_evaluate, minimum):
            return []
        messages = super().configure_evaluate(server_round, arrays, config, grid)
        return self._address(messages, grid, server_round, _EVALUATE)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Screen the replies, then aggregate those that passed as Flower does.

        Returns
        -------
        tuple of (ArrayRecord or None, MetricRecord or None)
            (None, None) where fewer than `min_replies` passed.
        """
        replies = list(replies)
        like = self._global if self._global is not None else first_arrays(replies)
        usable = self._admit(server_round, "train", replies, like)
        if not replies:
            return None, None
        if like is None or len(usable) < self.min_replies:
            log.warning(
                "round %d: %d usable replies, %d needed: the model stays as it was",
                server_round, len(usable), self.min_replies,
            )  # fmt: skip
            return None, None
        arrays, metrics = super().aggregate_train(server_round, with_shared_metrics(usable))
        return None if arrays is None else keep_dtypes(arrays, like), metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Screen the replies, average their metrics as Flower does, and add the pooled figures."""
        usable = [
            reply
            for reply in self._admit(server_round, self._evaluating, list(replies), None)
            if metrics_of(reply)[self.weighted_by_key]
        ]
        if not usable:
            return None
        trimmed = with_shared_metrics(usable)
        metrics = super().aggregate_evaluate(server_round, trimmed)
        shared = [dict(metrics_of(message)) for message in trimmed]
        if metrics is not None and all(key in shared[0] for key in SUMMABLE):
            for key in SUMMABLE:
                metrics.pop(key, None)
            metrics.update(pool(shared))
        return metrics

    def site_name(self, node_id: int) -> str:
        """Return a node's site name, or ``node <id>`` where it has not told it."""
        return self.site_names.get(node_id, f"node {node_id}")

    def _keep(self, server_round: int, name: str, metrics: MetricRecord | None, phase: str) -> None:
        if metrics is not None:
            getattr(self.result, name)[server_round] = metrics
            self.history.add(server_round, phase, ALL_SITES, metrics)

    def _enough(
        self, grid: Grid, server_round: int, phase: str, fraction: float, minimum: int
    ) -> bool:
        """Wait for the sites; record it where too few of them come within the timeout."""
        needed = max(minimum, self.min_available_nodes) if fraction > 0 else 0
        if (count := wait_for_sites(grid, needed, self._timeout)) >= needed:
            return True
        reason = f"{count} sites are connected, {needed} needed"
        self.history.failures.append(Failure(server_round, phase, ALL_SITES, reason))
        log.warning("round %d: no %s: %s", server_round, phase, reason)
        return False

    def _address(
        self, messages: Iterable[Message], grid: Grid, server_round: int, phase: int
    ) -> list[Message]:
        """Send Flower's messages to sites drawn by this run's seed, in the order of their names."""
        messages = list(messages)
        self._connected = set(grid.get_node_ids())
        nodes = self._connected if self.only is None else self._connected & self.only
        drawn = draw(nodes, self.site_names, len(messages), (self.seed, server_round, phase))
        for message, node_id in zip(messages, drawn, strict=False):
            message.metadata.dst_node_id = node_id
        return messages[: len(drawn)]

    def _exchange(
        self, grid: Grid, messages: list[Message], timeout: float, server_round: int, phase: str
    ) -> list[Message]:
        """Send, collect, and record the sites from which nothing came back in time."""
        if not messages:
            return []
        began = time.monotonic()
        replies = list(grid.send_and_receive(messages, timeout=timeout))
        addressed = {message.metadata.dst_node_id for message in messages}
        self._sent = {m.metadata.message_id: m.metadata.dst_node_id for m in messages}
        self._sent.pop("", None)
        for node_id in addressed - {self._node_id(reply) for reply in replies}:
            waited = time.monotonic() - began
            self._fail(server_round, phase, node_id, f"no reply after {waited:.0f} s")
        return replies

    def _admit(
        self, server_round: int, phase: str, replies: list[Message], like: ArrayRecord | None
    ) -> list[Message]:
        """Record every reply and return the usable ones in the order of their sites' names."""
        usable = []
        for reply in replies:
            node_id = self._node_id(reply)
            learn_name(self.site_names, node_id, reply, self._connected)
            reason = screen(reply, self.weighted_by_key, like)
            if reason is None:
                usable.append(reply)
            else:
                self._fail(server_round, phase, node_id, reason)
        # The order of a sum decides its last bits: it must not depend on who replied first.
        usable.sort(key=lambda reply: self.site_names.get(self._node_id(reply), ""))
        for reply in usable:
            site = self.site_name(self._node_id(reply))
            self.history.add(server_round, phase, site, metrics_of(reply))
        return usable

    def _node_id(self, reply: Message) -> int:
        """Return the site that a reply speaks of: the SuperLink answers for one that died."""
        return self._sent.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)

    def _fail(self, server_round: int, phase: str, node_id: int, reason: str) -> None:
        site, reason = self.site_name(node_id), " ".join(reason.split())
        if len(reason) > 400:
            # An engine's traceback names the cause in its last line.
            reason = f"{reason[:120]} … {reason[-270:]}"
        self.history.failures.append(Failure(server_round, phase, site, reason))
        log.warning("round %d: %s left out of %s: %s", server_round, site, phase, reason)
