"""A round of Flower's SecAgg+ in one process, and what it costs.

Flower has SecAgg+ for apps of its legacy API: `SecAggPlusWorkflow` at the server and
`secaggplus_mod` at each hospital. Both run as they are, over an exchange that hands messages over
and counts CPU seconds. Training, network and the strategy's own step are not counted.

The protocol: Bell, Bonawitz, Gascón, Lepoint, Raykova, "Secure single-server aggregation with
(poly)logarithmic overhead", CCS 2020, https://eprint.iacr.org/2020/704.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any
from unittest import mock

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation import quantization
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.supercore.task_identity import TaskIdentity
from peers.costs import Cost, Weights, vectors_of

EXAMPLES = 400
"""Rows of the first hospital; each further one has fifty more. Flower weighs by them."""


class Hospital:
    """A hospital with Flower's mod, whose training is over: it replies with weights that it has.

    Parameters
    ----------
    node : int
    weights : array of float32
    examples : int
        Its rows, by which Flower weighs.

    Attributes
    ----------
    context : Context
        Where the mod keeps its state.
    """

    def __init__(self, node: int, weights: Weights, examples: int) -> None:
        self.examples = examples
        self.context = Context(1, node, {}, RecordDict(), {})
        self._parameters = ndarrays_to_parameters([weights])
        self._training = 0.0

    def answer(self, message: Message) -> tuple[Message, float]:
        """Return the mod's reply, and the CPU seconds that it took without training."""
        self._training = 0.0
        began = time.process_time()
        reply = secaggplus_mod(message, self.context, self._train)
        return reply, time.process_time() - began - self._training

    def _train(self, message: Message, context: Context) -> Message:
        began = time.process_time()
        metrics = {"loss": 0.5}
        result = FitRes(Status(Code.OK, ""), self._parameters, self.examples, metrics)
        reply = Message(compat.fitres_to_recorddict(result, keep_input=True), reply_to=message)
        self._training = time.process_time() - began
        return reply


class Exchange:
    """Hands messages to hospitals of this process, as a `Grid` does that a workflow sends by.

    Parameters
    ----------
    hospitals : dict of int to Hospital
        By node id.
    lost : int, optional
        Node of a hospital whose masked vector does not arrive.

    Attributes
    ----------
    received : list of Message
        Replies of the latest exchange.
    exchanges : int
    at_hospital : dict of str to list of float
        CPU seconds of each hospital in a stage.
    at_server : dict of str to float
        CPU seconds of the server from the end of a stage's exchange to its next one, or to
        `finish`.
    uploaded : int
        Bytes of masked vectors and envelopes of all hospitals.
    """

    def __init__(self, hospitals: dict[int, Hospital], lost: int | None = None) -> None:
        self.hospitals = hospitals
        self.lost = lost
        self.received: list[Message] = []
        self.exchanges = 0
        self.at_hospital: defaultdict[str, list[float]] = defaultdict(list)
        self.at_server: dict[str, float] = {}
        self.uploaded = 0
        self._stage = ""
        self._left = time.process_time()
        # Messages are made as by the server of run 1.
        TaskIdentity.run_id = 1
        TaskIdentity.node_id = 1
        TaskIdentity.task_id = 1

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Return the replies, without that of a hospital that is lost."""
        self.finish()
        self.exchanges += 1
        self.received = []
        for message in messages:
            node = message.metadata.dst_node_id
            sent = copied(message)
            self._stage = str(sent.content.config_records[RECORD_KEY_CONFIGS][Key.STAGE])
            gone = self._stage in (Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK)
            if gone and node == self.lost:
                continue
            reply, seconds = self.hospitals[node].answer(sent)
            self.at_hospital[self._stage].append(seconds)
            self.uploaded += upload_of(reply)
            self.received.append(reply)
        self._left = time.process_time()
        return self.received

    def finish(self) -> None:
        """Count what the server did since the latest exchange."""
        self.at_server[self._stage] = time.process_time() - self._left


def copied(message: Message) -> Message:
    """Return a message whose config is its own: the mod takes entries out, and nodes share one."""
    records = dict(message.content)
    records[RECORD_KEY_CONFIGS] = ConfigRecord(dict(records[RECORD_KEY_CONFIGS]))
    return Message(RecordDict(records), metadata=message.metadata)


def upload_of(reply: Message) -> int:
    """Return the bytes of a reply's masked vector or envelopes."""
    record = reply.content.config_records[RECORD_KEY_CONFIGS]
    lists = (record.get(key, []) for key in (Key.MASKED_PARAMETERS, Key.CIPHERTEXT_LIST))
    return sum(len(each) for values in lists for each in values)


class FirstResult(FedAvg):
    """Flower's FedAvg over a model that the workflow has averaged already.

    The workflow hands the mean over once for each hospital, and FedAvg would average these copies.
    """

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """Return the model of the first hospital's result."""
        return results[0][1].parameters, {}


def hospitals_of(vectors: Sequence[Weights]) -> dict[int, Hospital]:
    """Return a hospital for each vector, by node id."""
    return {
        11 + number: Hospital(11 + number, weights, EXAMPLES + 50 * number)
        for number, weights in enumerate(vectors)
    }


def run_round(workflow: SecAggPlusWorkflow, exchange: Exchange) -> Weights | None:
    """Run a round and return the mean, or None if the workflow ended without one."""
    manager = SimpleClientManager()
    # It would wait a day for a second hospital.
    few = {"min_fit_clients": 1, "min_evaluate_clients": 1, "min_available_clients": 1}
    strategy = FirstResult(**few)
    for node in exchange.hospitals:
        manager.register(GridClientProxy(node, exchange, 1))
    state = RecordDict()
    state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    start = ndarrays_to_parameters([])
    state.array_records[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(start, True)
    context = LegacyContext(Context(1, 1, {}, state, {}), strategy=strategy, client_manager=manager)
    workflow(exchange, context)
    exchange.finish()
    record = context.state.array_records[MAIN_PARAMS_RECORD]
    made = parameters_to_ndarrays(compat.arrayrecord_to_parameters(record, keep_input=True))
    return made[0] if made else None


def mean_of(exchange: Exchange) -> Weights:
    """Return the mean that Flower's own server makes in a round of which most must stay.

    Raises
    ------
    RuntimeError
        If the round ended without one.
    """
    made = run_round(SecAggPlusWorkflow(1.0, len(exchange.hospitals) // 2 + 1), exchange)
    if made is None:
        raise RuntimeError("a round of SecAgg+ ended without a mean: its log says why")
    return made


def weighted_mean(vectors: Sequence[Weights], rows: Sequence[int]) -> np.ndarray[Any, Any]:
    """Return the mean weighted by rows, in float64."""
    total = np.zeros(vectors[0].shape)
    for vector, count in zip(vectors, rows, strict=True):
        total += vector.astype(float) * count
    return total / sum(rows)


def flower(size: int, sites: int) -> Cost:
    """Return the cost of Flower's SecAgg+, once with all hospitals and once with one lost."""
    vectors = vectors_of(size, sites)
    quantised: list[float] = []
    home = sys.modules[secaggplus_mod.__module__]
    original = quantization.quantize

    def quantize(*given: Any) -> Any:
        began = time.process_time()
        made = original(*given)
        quantised.append(time.process_time() - began)
        return made

    with mock.patch.object(home, "quantize", quantize):
        whole = Exchange(hospitals_of(vectors))
        mean = mean_of(whole)
    rows = [hospital.examples for hospital in whole.hospitals.values()]
    lossy = Exchange(hospitals_of(vectors), lost=12)
    mean_of(lossy)
    at = {stage: statistics.mean(seconds) for stage, seconds in whole.at_hospital.items()}
    quantise = statistics.mean(quantised)
    before = at[Stage.SETUP] + at[Stage.SHARE_KEYS] + at[Stage.COLLECT_MASKED_VECTORS]
    return Cost(
        quantise=quantise,
        mask=before - quantise,
        unmask=at[Stage.UNMASK],
        add=whole.at_server[Stage.COLLECT_MASKED_VECTORS] / sites,
        open=whole.at_server[Stage.UNMASK],
        open_one_lost=lossy.at_server[Stage.UNMASK],
        upload=whole.uploaded / sites / (4 * size),
        error=float(np.abs(mean - weighted_mean(vectors, rows)).max()),
        exchanges=whole.exchanges,
    )
