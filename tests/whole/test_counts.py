"""What a round costs, counted: messages, passes over the arrays, bytes at the peak."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from builders import FakeGrid, arrays, reply
from flwr.app import ConfigRecord
from flwr.serverapp import ServerApp
from tables import TinyTable
from tiny import CONFIG

from fedmed_flower import federate, run_local
from fedmed_flower.arrays import kernels
from fedmed_flower.engines.local import LocalGrid
from fedmed_flower.strategies import FedAdam, FedAvg, FedMedian, FedTrimmedAvg, Krum

SITES, SIZE = 8, 500_000
MODEL_BYTES = 4 * SIZE


def aggregated(strategy):
    """Let a strategy aggregate the replies of some sites; return the bytes at the peak."""
    rng = np.random.default_rng(0)
    strategy.configure_train(1, arrays(w=np.zeros(SIZE, np.float32)), ConfigRecord(), GRID)
    values = [rng.normal(size=SIZE).astype(np.float32) for _ in range(SITES)]
    replies = [reply(n, {"w": value}, f"site {n}") for n, value in enumerate(values)]
    tracemalloc.start()
    try:
        assert strategy.aggregate_train(1, replies)[0] is not None
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


GRID = FakeGrid(range(SITES), lambda message: None)


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        (FedAvg, {"weighted_sum": 1}),
        (FedAdam, {"weighted_sum": 1}),
        (FedMedian, {"order_statistics": 1}),
        (FedTrimmedAvg, {"order_statistics": 1}),
        (Krum, {"gram": 1, "weighted_sum": 1}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_passes_over_what_the_sites_sent(rule, passes, monkeypatch):
    made = Counter()

    def counted(name, kernel):
        def count(*args, **kwargs):
            made[name] += 1
            return kernel(*args, **kwargs)

        return count

    for name in ("weighted_sum", "order_statistics", "gram", "accumulate"):
        monkeypatch.setattr(kernels, name, counted(name, getattr(kernels, name)))
    aggregated(rule())
    assert made == passes


@pytest.mark.parametrize(("rule", "models"), [(FedAvg, 2.5), (FedMedian, 3), (FedTrimmedAvg, 3)])
def test_bytes_at_the_peak_of_a_round(rule, models):
    # However many sites there are, no copy of what they sent.
    assert aggregated(rule()) < models * MODEL_BYTES


def test_messages_of_a_run(tmp_path, monkeypatch):
    sent = Counter()

    class Counting(LocalGrid):
        def push_messages(self, messages):
            sent.update(message.metadata.message_type for message in messages)
            return super().push_messages(messages)

    monkeypatch.setattr("fedmed_flower.engines.local.LocalGrid", Counting)
    server = ServerApp()

    @server.main()
    def main(grid, context):
        federate(FedAvg(), grid, context, TinyTable(context))

    settings = CONFIG | {"run-dir": str(tmp_path / "run"), "num-server-rounds": 3, "pictures": 2}
    run_local(server, TinyTable.client_app(), 4, run_config=settings)
    # The test is one evaluation more.
    assert sent == {
        "query.describe": 4,
        "query.contribution": 4,
        "train": 3 * 4,
        "evaluate": (3 + 1) * 4,
        "query.pictures": 4,
    }
