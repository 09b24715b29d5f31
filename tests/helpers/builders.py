"""Small records, replies, grids and apps for the tests of the strategies."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedmed_flower.engines.local import run_local

Train = Callable[[dict[str, np.ndarray], Message, Context], tuple[dict[str, Any], dict[str, Any]]]


def arrays(**values: Any) -> ArrayRecord:
    """Return a record of float32 arrays; what comes from NumPy keeps its dtype."""
    return ArrayRecord(
        {
            key: Array(np.asarray(value, getattr(value, "dtype", np.float32)))
            for key, value in values.items()
        }
    )


def dump(record: ArrayRecord) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return all that must agree where two records agree to the bit."""
    return {
        key: (str(a.numpy().dtype), a.numpy().shape, a.numpy().tobytes())
        for key, a in record.items()
    }


def npy(header: str, body: bytes = b"") -> bytes:
    """Return the bytes of a .npy file, version 1.0, with any header."""
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + body


def header(descr: str = "'<f4'", shape: str = "(2,)", order: str = "False") -> str:
    """Return a .npy header from the source text of its three values."""
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


def message(node_id: int, message_type: str = MessageType.TRAIN) -> Message:
    """Return an instruction for a node."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SUPERLINK_NODE_ID, 1
    return Message(RecordDict(), node_id, message_type)


def reply(
    node_id: int,
    values: ArrayRecord | Mapping[str, Any] | None = None,
    site: str | None = None,
    weight: Any = 1,
    to: Message | None = None,
    **metrics: Any,
) -> Message:
    """Return a node's reply; `weight` None leaves ``num-examples`` out."""
    content = RecordDict()
    if values is not None:
        content["arrays"] = values if isinstance(values, ArrayRecord) else arrays(**values)
    numbers = {} if weight is None else {"num-examples": weight}
    content["metrics"] = MetricRecord(numbers | metrics)
    if site is not None:
        content["site"] = ConfigRecord({"name": site})
    return Message(content, reply_to=message(node_id) if to is None else to)


def error_reply(node_id: int, reason: str | None, to: Message | None = None) -> Message:
    """Return the reply of a node whose app raised."""
    return Message(Error(6, reason), reply_to=message(node_id) if to is None else to)


class FakeGrid(Grid):
    """Answers each message with ``answer(message)``; None stands for silence.

    `nodes` may be changed at any time. `sent` holds all messages.
    """

    in_process = True

    def __init__(self, nodes: Sequence[int], answer: Callable[[Message], Message | None]) -> None:
        self.nodes = list(nodes)
        self.answer = answer
        self.sent: list[Message] = []
        message(1)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for sent in messages:
            sent.metadata.__dict__["_message_id"] = f"message {len(self.sent)}"
            self.sent.append(sent)
        return [sent.metadata.message_id for sent in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        asked = [self.sent[int(each.split()[1])] for each in message_ids]
        return [answer for m in asked if (answer := self.answer(m)) is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(list(self.push_messages(list(messages))))


def site_app(train: Train, evaluate: Train | None = None) -> ClientApp:
    """Return a ClientApp of sites named ``site-0``, ``site-1``, ...

    `train` and `evaluate` get the arrays as NumPy, the message and the context and return arrays
    (not used for evaluation) and metrics; ``num-examples`` is 1 where they do not give it.
    """
    app = ClientApp()

    def handle(message: Message, context: Context, function: Train, with_arrays: bool) -> Message:
        values = {key: array.numpy() for key, array in message.content["arrays"].items()}
        new, metrics = function(values, message, context)
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1} | metrics)})
        if with_arrays:
            content["arrays"] = arrays(**new)
        content["site"] = ConfigRecord({"name": f"site-{context.node_config['partition-id']}"})
        return Message(content, reply_to=message)

    @app.train()
    def _(message: Message, context: Context) -> Message:
        return handle(message, context, train, with_arrays=True)

    @app.evaluate()
    def _(message: Message, context: Context) -> Message:
        return handle(message, context, evaluate or _sum, with_arrays=False)

    return app


def _sum(
    values: dict[str, np.ndarray], message: Message, context: Context
) -> tuple[dict[str, Any], dict[str, Any]]:
    return {}, {"sum": float(sum(v.sum(dtype=float) for v in values.values()))}


def run(
    strategy: Any,
    app: ClientApp,
    initial: ArrayRecord,
    rounds: int = 2,
    sites: int = 3,
    speeds: Sequence[float] | None = None,
    **start: Any,
) -> Result:
    """Run a strategy with `run_local` and return its result."""
    server = ServerApp()

    @server.main()
    def _(grid: Grid, context: Context) -> None:
        strategy.start(grid, initial, rounds, **start)

    run_local(server, app, sites, virtual_speeds=speeds)
    return strategy.result
