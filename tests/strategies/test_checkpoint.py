import numpy as np
import pytest
from builders import FakeGrid, dump
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp import strategy as flower

from fedmed_flower.engines.local import run_local
from fedmed_flower.errors import InputError
from fedmed_flower.server.history import History
from fedmed_flower.server.run_folder import Checkpoint, RunFolder
from fedmed_flower.strategies import (
    DPFedAvg,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    WeightedFedAvg,
)

client = ClientApp()


@client.train()
def train(message, context):
    moved = Array(message.content["arrays"]["w"].numpy() + 1)
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": ArrayRecord({"w": moved}), "metrics": metrics})
    return Message(content, reply_to=message)


def run(strategy, rounds):
    results = []
    server = ServerApp()

    @server.main()
    def main(grid, context):
        arrays = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
        results.append(strategy.start(grid, arrays, num_rounds=rounds))

    run_local(server, client, 2)
    return results[0].arrays["w"].numpy().tolist()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FedAvgM, {"server_momentum": 0.9}),
        (FedAdam, {"eta": 0.1}),
        (FedYogi, {"eta": 0.1, "beta_1": 0.5}),
        (FedAdagrad, {"eta": 0.1}),
    ],
)
def test_a_server_optimiser_goes_on_with_its_state(tmp_path, kind, options):
    options |= {"fraction_evaluate": 0.0}
    whole = run(kind(**options), 4)
    run(kind(**options, run_dir=tmp_path), 2)
    assert run(kind(**options, run_dir=tmp_path, resume=True), 4) == whole
    twin = getattr(flower, kind.__name__)(**options)
    assert run(twin, 4) == pytest.approx(whole, rel=1e-6)
    assert whole != run(FedAvg(fraction_evaluate=0.0), 4)


class FedXgb(FedAvg, flower.FedXgbBagging):
    """Keeps trees at the server, of which the checkpoint knows nothing."""


def test_a_strategy_with_unknown_state_is_not_resumed(tmp_path):
    folder = RunFolder(tmp_path)
    arrays = ArrayRecord({"0": Array(np.zeros(2, np.float32))})
    folder.save(Checkpoint(1, 0, arrays, History(), {}))
    with pytest.raises(InputError, match="FedXgb cannot be resumed: what FedXgbBagging keeps"):
        FedXgb(run_dir=tmp_path, resume=True).find_checkpoint(arrays)


def test_a_strategy_without_state_of_its_own_is_resumed(tmp_path):
    options = {"fraction_evaluate": 0.0, "proximal_mu": 0.1, "run_dir": tmp_path}
    assert run(FedProx(**options), 2) == [2.0, 2.0]
    assert run(FedProx(**options, resume=True), 3) == [3.0, 3.0]


def test_fewer_rounds_than_are_done_are_refused(tmp_path):
    run(FedAvg(fraction_evaluate=0.0, run_dir=tmp_path), 3)
    again = FedAvg(fraction_evaluate=0.0, run_dir=tmp_path, resume=True)
    with pytest.raises(InputError, match="num_rounds must be at least 3, the rounds that are done"):
        run(again, 2)


def test_a_site_that_leaves_for_good_does_not_hang_the_run(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("fedmed_flower.server.sites.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(
        "fedmed_flower.server.sites.time.sleep", lambda s: clock.__setitem__(0, clock[0] + s)
    )

    def answer(message):
        content = RecordDict(
            {
                "arrays": ArrayRecord({"w": Array(np.ones(2, np.float32))}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
        )
        grid.nodes[:] = [1]
        return Message(content, reply_to=message)

    grid = FakeGrid([1, 2], answer)
    strategy = FedAvg(min_available_nodes=2, fraction_evaluate=0.0)
    arrays = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
    result = strategy.start(grid, arrays, num_rounds=2, timeout=5)
    assert result.arrays["w"].numpy().tolist() == [1.0, 1.0]
    (failure,) = [f for f in strategy.history.failures if f.round == 2]
    assert failure.reason == "1 sites are connected, 2 needed"


def test_another_strategy_does_not_go_on_with_a_run(tmp_path):
    run(FedAdam(fraction_evaluate=0.0, run_dir=tmp_path), 2)
    again = FedAvg(fraction_evaluate=0.0, run_dir=tmp_path, resume=True)
    text = f"the checkpoint in {tmp_path} is of the strategy 'FedAdam', and this is FedAvg: resume "
    with pytest.raises(InputError, match=f"^{text}it with the strategy and the arguments that it"):
        run(again, 4)


@pytest.mark.parametrize(
    ("kind", "before", "now", "text"),
    [
        (FedAvgM, {"server_momentum": 0.9}, {"server_momentum": 0.5}, "'0.9' .* is 0.5 now"),
        (FedAvgM, {}, {"server_learning_rate": 0.5}, "server_learning_rate of FedAvgM was '1.0'"),
        (FedTrimmedAvg, {"beta": 0.1}, {}, "beta of FedTrimmedAvg was '0.1' .* is 0.2 now"),
        (FedAvg, {"max_update_norm": 3.0}, {}, "max_update_norm of FedAvg was '3.0' .* is None"),
        (WeightedFedAvg, {"weights": {"a": 1.0}}, {"weights": {"a": 2.0}}, "weights of Weighted"),
    ],
)
def test_other_arguments_do_not_go_on_with_a_run(tmp_path, kind, before, now, text):
    run(kind(fraction_evaluate=0.0, run_dir=tmp_path, **before), 1)
    again = kind(fraction_evaluate=0.0, run_dir=tmp_path, resume=True, **now)
    with pytest.raises(InputError, match=text):
        run(again, 2)


def test_what_does_not_change_the_model_may_be_changed_when_a_run_goes_on(tmp_path):
    run(FedAvg(fraction_evaluate=0.0, run_dir=tmp_path, seed=3), 1)
    again = FedAvg(fraction_evaluate=0.0, run_dir=tmp_path, resume=True, min_available_nodes=2)
    assert run(again, 2) == [2.0, 2.0]


def test_an_argument_that_a_strategy_changes_as_it_runs_does_not_stop_it_from_going_on(tmp_path):
    options = {
        "noise_multiplier": 0.0,
        "clipping_norm": 1.0,
        "sampling_rate": 1.0,
        "population_size": 2,
        "target_quantile": 0.5,
        "fraction_evaluate": 0.0,
        "run_dir": tmp_path,
    }
    first = DPFedAvg(**options)
    run(first, 2)
    assert first.clipping_norm != 1.0
    run(DPFedAvg(**options, resume=True), 3)


def test_a_checkpoint_that_does_not_record_the_strategy_is_gone_on_from(tmp_path):
    folder = RunFolder(tmp_path)
    first = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
    folder.save(Checkpoint(1, 0, first, History(), {}))
    assert FedAvg(run_dir=tmp_path, resume=True).find_checkpoint(first).strategy == {}


@pytest.mark.parametrize("kind", [FedAvgM, FedAdam, FedYogi, FedAdagrad])
def test_an_optimiser_goes_on_after_a_crash_in_the_middle_of_a_round(tmp_path, kind):
    options = {"server_momentum": 0.9} if kind is FedAvgM else {"eta": 0.1}
    options |= {"fraction_evaluate": 0.0}
    if kind in (FedAdam, FedYogi):
        options |= {"beta_1": 0.9, "beta_2": 0.99}
    whole = kind(**options)
    run(whole, 5)

    class Crashing(kind):
        def aggregate_train(self, server_round, replies):
            if server_round == 4:
                raise KeyboardInterrupt
            return super().aggregate_train(server_round, replies)

    Crashing.__name__ = kind.__name__
    with pytest.raises(KeyboardInterrupt):
        run(Crashing(**options, run_dir=tmp_path), 5)
    again = kind(**options, run_dir=tmp_path, resume=True)
    run(again, 5)
    assert dump(again.result.arrays) == dump(whole.result.arrays)
    states = [{k: dump(v) for k, v in s.export_state().items()} for s in (again, whole)]
    assert states[0]
    assert states[0] == states[1]
