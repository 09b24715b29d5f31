"""Tree ensembles of several hospitals, by Flower's strategies for XGBoost."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from fedmed_flower.arrays.compression import NONE
from fedmed_flower.errors import InputError
from fedmed_flower.runs.experiment import federate
from fedmed_flower.server.listener import Listener
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.server.screening import metrics_of, with_shared_metrics
from fedmed_flower.settings.plan import IN_ITS_ROUND, Plan, refuse_evaluation
from fedmed_flower.settings.privacy import PrivacySettings
from fedmed_flower.settings.secure import refuse_sums
from fedmed_flower.settings.text import expand, setting_error
from fedmed_flower.strategies.base import EvaluateFn, FedAvg
from fedmed_flower.trees.client import TreeClient, as_trees
from fedmed_flower.trees.ensembles import (
    BAGGING,
    CYCLIC,
    MODEL,
    MOST_TREES,
    leaves,
    model_bytes,
    read_trees,
    write_trees,
)
from fedmed_flower.wire import ALL_SITES, TREE_SHARE, TREES

if TYPE_CHECKING:
    from fedmed_flower.clients.tabular import TabularClient

log = logging.getLogger("flwr.fedmed")

_MINIMA = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")
_PASSED_ON = (
    "fraction_train",
    "fraction_evaluate",
    "weighted_by_key",
    "arrayrecord_key",
    "configrecord_key",
    "train_metrics_aggr_fn",
    "evaluate_metrics_aggr_fn",
    *_MINIMA,
)
# Settings of what `federate` does only with a network.
_NETWORKS_ONLY = ("baselines", "personal-epochs", "buffer")


def grow(
    strategy: flower.FedXgbBagging | flower.FedXgbCyclic,
    grid: Grid,
    context: Context,
    client: TabularClient,
    evaluate_fn: EvaluateFn | None = None,
    listeners: Iterable[Listener] = (),
) -> flower.Result:
    """Grow trees as the run config says and leave a complete run folder.

    The folder is that of `fedmed_flower.federate`, with the ensemble as ``model.json``, which
    XGBoost loads, in place of ``model.safetensors``, and without a checkpoint. Settings are those
    of `fedmed_flower.settings.trees.TreeSettings`.

    Parameters
    ----------
    strategy : FedXgbBagging or FedXgbCyclic
        Of ``flwr.serverapp.strategy``. In bagging the new trees of all hospitals in a round are
        added; in a cycle one hospital after the other adds its own. Minimum numbers of nodes that
        are Flower's default, 2, become 1; ``min-sites`` of the run config waits for more. Replies
        pass screening before the strategy is given them.
    grid, context
        As Flower gives them to a ServerApp.
    client : TabularClient
        An instance of the app's client, ``MyHospital(context)``.
    evaluate_fn : callable, optional
        As in `fedmed_flower.federate`; it is given the ensemble.
    listeners : iterable of Listener
        They hear how the run goes: see `fedmed_flower.server.Listener`.

    Returns
    -------
    flwr.serverapp.strategy.Result

    Raises
    ------
    InputError
        If the run config or every site's data is wrong, the strategy is another one, or the run
        config asks for privacy, to resume a run, to start from weights or to test a model.
    RunFailedError
        If no round succeeded.
    """
    config = expand(context.run_config)
    plan = Plan.from_run_config(config)
    if plan.resume:
        raise InputError(
            "a run that grows trees cannot be resumed: start a new run, without resume"
        )
    if PrivacySettings.from_run_config(config).on:
        raise setting_error(
            "trees are grown without differential privacy: federate a network with "
            'privacy="patient"',
            "privacy",
        )
    if plan.compression != NONE:
        raise setting_error(
            f'compression must be "none" for trees, got "{plan.compression}": it is for networks',
            "compression",
        )
    if plan.validate != IN_ITS_ROUND:
        raise setting_error(
            f'validate must be "{IN_ITS_ROUND}" for trees, got "{plan.validate}": an ensemble is '
            "validated in an exchange of its own",
            "validate",
        )
    refuse_evaluation(config, "grows trees")
    refuse_sums(config, "grows trees")
    if plan.init_from:
        raise setting_error(
            "init-from needs a network, and this app grows trees: leave it out", "init-from"
        )
    for key in _NETWORKS_ONLY:
        if config.get(key):
            log.warning("%s is for networks: trees are grown without it", key)
            config[key] = type(config[key])()
    tree_context = Context(
        context.run_id,
        context.node_id,
        context.node_config,
        context.state,
        config | {"pictures": 0},
    )
    tree_client = as_trees(type(client)(tree_context))
    count = plan.num_server_rounds * tree_client.trees.trees_a_round
    if count > MOST_TREES:
        raise setting_error(
            f"num-server-rounds times trees-a-round must be at most {MOST_TREES:,}, got {count:,}",
            "trees-a-round",
        )
    # Under the name of Flower's strategy, by which runs are distinguished.
    name = type(strategy).__name__
    strategy_class = type(name, (_Growing,), {"__doc__": type(strategy).__doc__})
    growing: FedAvg = strategy_class(strategy, tree_client, listeners)
    return federate(growing, grid, tree_context, tree_client, evaluate_fn=evaluate_fn)


class _Growing(FedAvg):
    """A strategy with our rounds that leaves the combining of trees to one of Flower's.

    Parameters
    ----------
    inner : FedXgbBagging or FedXgbCyclic
    client : TreeClient
        Holds the form of this run's ensembles, once hospitals have agreed.
    listeners : iterable of Listener
    """

    def __init__(
        self, inner: flower.FedAvg, client: TreeClient, listeners: Iterable[Listener] = ()
    ) -> None:
        if not isinstance(inner, flower.FedXgbBagging | flower.FedXgbCyclic):
            raise InputError(
                "strategy must be FedXgbBagging or FedXgbCyclic of flwr.serverapp.strategy, got "
                f"{type(inner).__name__}"
            )
        for name in _MINIMA:
            setattr(inner, name, 1 if getattr(inner, name) == 2 else getattr(inner, name))
        super().__init__(listeners=listeners, **{name: getattr(inner, name) for name in _PASSED_ON})
        self.inner = inner
        self.client = client
        self.share = 1.0
        self.cyclic = isinstance(inner, flower.FedXgbCyclic)
        self.run_folder: RunFolder | None = None

    def start(self, *args: Any, **kwargs: Any) -> flower.Result:
        """Run the rounds, without checkpoints."""
        self.run_folder = self.folder
        self.folder = None
        result = super().start(*args, **kwargs)
        if self.history.kept is not None and self.run_folder is not None:
            self.run_folder.write(MODEL, model_bytes(result.arrays))
        return result

    def test(
        self,
        grid: Grid,
        arrays: ArrayRecord,
        config: ConfigRecord | None = None,
        timeout: float = 3600,
        own: bool = False,
    ) -> dict[str, dict[str, float]]:
        """Evaluate an ensemble once on every connected site's test split."""
        mode = self._with_mode(config or ConfigRecord())
        return super().test(grid, arrays, mode, timeout, own)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Wait for the sites, then send Flower's messages to them."""
        self.run.sent_arrays = arrays
        if not self._wait(grid, server_round, "train", self.fraction_train, self.min_train_nodes):
            return []
        messages = self.inner.configure_train(server_round, arrays, self._with_mode(config), grid)
        addressed = self._address(messages, grid, server_round, 0)
        nodes = {message.metadata.dst_node_id for message in addressed}
        # All new trees are added up. A site that declines must not make the others' share smaller.
        self.share = 1 / max(1, len(nodes - self.inbox.declined))
        for message in addressed:
            message.content.config_records[self.configrecord_key][TREE_SHARE] = self.share
        return addressed

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Address this round's evaluation messages to a sample of the sites."""
        return super().configure_evaluate(server_round, arrays, self._with_mode(config), grid)

    def choose(
        self, nodes: Collection[int], count: int, server_round: int, training: bool
    ) -> list[int]:
        """Return which sites take part: in a cycle one after the other, in the order of names."""
        if not (self.cyclic and training):
            return super().choose(nodes, count, server_round, training)
        willing = [node_id for node_id in nodes if node_id not in self.inbox.declined] or [*nodes]
        willing.sort(key=lambda node_id: (self.site_name(node_id), node_id))
        return [willing[(server_round - 1) % len(willing)]] if willing and count else []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hand the replies that pass screening to Flower's strategy."""
        self.run.server_round = server_round
        key = self.weighted_by_key
        usable = []
        admitted = self.inbox.admit(server_round, "train", replies, key, None)
        for reply in self.inbox.in_order(admitted):
            try:
                reply.message = self._screened(reply.message)
            except ValueError as error:
                self.inbox.fail(server_round, "train", reply.site, str(error))
            else:
                usable.append(reply)
        if not usable:
            self.inbox.fail(server_round, "train", ALL_SITES, "no usable reply")
            return None, None
        messages = with_shared_metrics([reply.message for reply in usable], key)
        arrays, metrics = self.inner.aggregate_train(server_round, messages)
        self.inbox.record(server_round, "train", usable)
        if arrays is None:
            return None, None
        self.run.begun = True
        if self.run_folder is not None:
            self.run_folder.write(MODEL, model_bytes(arrays))
        return arrays, metrics

    def _with_mode(self, config: ConfigRecord) -> ConfigRecord:
        """Return a config that also says how trees travel."""
        return ConfigRecord({**config, TREES: CYCLIC if self.cyclic else BAGGING})

    def _screened(self, reply: Message) -> Message:
        """Return a copy of a reply that holds only what Flower uses, written from scratch.

        Raises
        ------
        ValueError
            If the reply cannot be used; the error's text gives the reason.
        """
        form = self.client.form
        sent = self.run.sent_arrays
        before = [] if sent is None else read_trees(model_bytes(sent), form, MOST_TREES)
        records = list(reply.content.array_records.values())
        if len(records) != 1:
            raise ValueError(f"the reply has {len(records)} array records instead of one")
        if not metrics_of(reply)[self.weighted_by_key]:
            raise ValueError(f"{self.weighted_by_key} must be above 0")
        # In a cycle the earlier trees come back, too; those that were sent are used instead.
        earlier = before if self.cyclic else []
        wanted = len(earlier) + form.settings.trees_a_round
        trees = read_trees(model_bytes(records[0]), form, wanted)
        if len(trees) != wanted:
            raise ValueError(f"the reply has {len(trees)} trees instead of {wanted}")
        new = trees[len(earlier) :]
        most = form.most_leaf(self.share)
        largest = max(float(np.abs(leaves(tree)).max()) for tree in new)
        if largest > most * (1 + 1e-5):
            raise ValueError(
                f"the numbers in leaves must be at most {most:g} in size, got {largest:g}"
            )
        content = RecordDict({"metrics": metrics_of(reply)})
        model = np.frombuffer(write_trees(form, [*earlier, *new]), dtype=np.uint8)
        content["arrays"] = ArrayRecord([model])
        message = copy.copy(reply)
        message.content = content
        return message
