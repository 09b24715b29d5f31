import gc
import inspect
import logging

import numpy as np
import pytest
from builders import FakeGrid, arrays, dump, reply, run, site_app
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import strategy as flower

from fedmed_flower import strategies
from fedmed_flower.errors import InputError
from fedmed_flower.server.history import History
from fedmed_flower.server.run_folder import Checkpoint, RunFolder
from fedmed_flower.strategies import (
    Bulyan,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    GeometricMedian,
    MultiKrum,
    WeightedFedAvg,
)

OPTIONS = {
    FedAvgM: {"server_learning_rate": 0.5, "server_momentum": 0.9},
    FedAdam: {"eta": 0.05, "beta_1": 0.9, "beta_2": 0.99},
    FedYogi: {"eta": 0.05, "beta_1": 0.9, "beta_2": 0.99},
    FedAdagrad: {"eta": 0.05, "tau": 0.01},
}
EACH = pytest.mark.parametrize("kind", OPTIONS)


def configure(strategy, number, model):
    strategy.configure_train(number, model, ConfigRecord(), FakeGrid([1, 2], lambda m: None))


def one_round(strategy, number, model, replies):
    configure(strategy, number, model)
    return strategy.aggregate_train(number, replies)


def sent_in(number, model, dtype=np.float32):
    """Return three sites' replies: the model plus noise that the round decides."""
    rng = np.random.default_rng(number)
    return [
        reply(
            n,
            {k: np.asarray(a.numpy() + rng.normal(size=a.shape), dtype) for k, a in model.items()},
            f"s{n}",
            n + 1,
            loss=float(n),
        )
        for n in range(3)
    ]


def single(record):
    """Return a record rounded to float32, as a model that stays what it was would be."""
    return ArrayRecord({k: Array(np.asarray(a.numpy(), np.float32)) for k, a in record.items()})


@EACH
def test_rounds_of_a_float32_model_are_flowers_to_the_bit(kind):
    model = arrays(w=np.linspace(-1, 1, 12).reshape(3, 4).astype(np.float32), b=np.float32(2))
    ours, theirs = kind(**OPTIONS[kind]), getattr(flower, kind.__name__)(**OPTIONS[kind])
    for number in range(1, 6):
        replies = sent_in(number, model)
        got, metrics = one_round(ours, number, model, replies)
        wanted, wanted_metrics = one_round(theirs, number, model, replies)
        # FedAdam's step is a float64 in Flower, so that its model becomes one.
        assert dump(got) == dump(single(wanted))
        assert metrics == wanted_metrics
        model = got
        theirs.current_arrays = model


@EACH
def test_rounds_of_a_float64_model_are_flowers_to_the_bit(kind):
    model = arrays(w=np.linspace(-1, 1, 12))
    ours, theirs = kind(**OPTIONS[kind]), getattr(flower, kind.__name__)(**OPTIONS[kind])
    for number in range(1, 4):
        replies = sent_in(number, model, np.float64)
        got, wanted = (one_round(s, number, model, replies)[0] for s in (ours, theirs))
        assert dump(got) == dump(wanted)
        model = got


def test_momentum_that_is_off_is_plain_averaging():
    model = arrays(w=[0.0, 1.0])
    got, wanted = (one_round(s, 1, model, sent_in(1, model))[0] for s in (FedAvgM(), FedAvg()))
    assert dump(got) == dump(wanted)


# --- Entries ------------------------------------------------------------------------------------


@EACH
def test_counters_are_those_of_the_mean_and_keep_their_dtype(kind):
    model = arrays(w=[0.0], n=np.array(3), mask=np.array([True, False]), u=np.array([4], np.uint8))
    changed = {"w": [1.0], "n": np.array(9), "mask": np.array([False, True]),
               "u": np.array([7], np.uint8)}  # fmt: skip
    strategy = kind(**OPTIONS[kind])
    for number in (1, 2):
        got, _ = one_round(strategy, number, model, [reply(1, changed), reply(2, changed)])
        for key in ("n", "mask", "u"):
            assert dump(got)[key] == dump(arrays(**changed))[key]
        assert list(got) == list(model)
        assert 0 < got["w"].numpy()[0] != 1.0
    for record in strategy.export_state().values():
        assert len(record) == 1


@EACH
def test_a_step_in_float16_is_made_in_float32(kind):
    model = {"w": np.array([1.0, -2.0], np.float16)}
    moves = {"w": np.array([1.5, -1.0], np.float16)}
    half, wide = (kind(**OPTIONS[kind]) for _ in range(2))
    current, reference = arrays(**model), single(arrays(**model))
    for number in (1, 2, 3):
        got, _ = one_round(half, number, current, [reply(1, moves)])
        wanted, _ = one_round(wide, number, reference, [reply(1, single(arrays(**moves)))])
        assert got["w"].numpy().dtype == np.float16
        assert got["w"].numpy().tolist() == wanted["w"].numpy().astype(np.float16).tolist()
        current, reference = got, single(got)
    for record in half.export_state().values():
        assert {array.numpy().dtype for array in record.values()} == {np.dtype(np.float32)}


@EACH
@pytest.mark.filterwarnings("error")
def test_a_step_beyond_float32_leaves_model_and_state_as_they_were(kind):
    model = arrays(w=[-3e38, 0.0])
    strategy = kind(**OPTIONS[kind])
    one_round(strategy, 1, model, [reply(1, {"w": [-3e38, 1.0]}, "a")])
    before = {name: dump(record) for name, record in strategy.export_state().items()}
    bad = [reply(1, {"w": [3e38, 1.0]}, "a")]
    assert one_round(strategy, 2, model, bad) == (None, None)
    assert {name: dump(record) for name, record in strategy.export_state().items()} == before
    (failure,) = strategy.history.failures
    assert (failure.round, failure.site) == (2, "all")
    assert failure.reason == (f"the step of {kind.__name__} leads to NaN or infinite values")
    good = [reply(1, {"w": [-3e38, 2.0]}, "a")]
    got, _ = one_round(strategy, 3, model, good)
    assert np.isfinite(got["w"].numpy()).all()


# --- As a strategy ------------------------------------------------------------------------------


@EACH
def test_the_callers_average_is_asked_once_and_only_of_the_sites(kind):
    seen = []

    def worst(contents, key):
        seen.append([content["metrics"]["loss"] for content in contents])
        return MetricRecord({"worst": max(seen[-1])})

    model = arrays(w=[0.0])
    strategy = kind(**OPTIONS[kind], train_metrics_aggr_fn=worst)
    for number in (1, 2):
        _, metrics = one_round(strategy, number, model, sent_in(number, model))
        assert metrics == {"worst": 2.0}
    assert seen == [[0.0, 1.0, 2.0]] * 2


@EACH
def test_an_optimiser_that_does_not_know_the_global_model_says_so(kind):
    strategy = kind(**OPTIONS[kind])
    text = f"{kind.__name__} moves the global model, which it does not know: call configure_train"
    with pytest.raises(InputError, match=f"^{text} before aggregate_train, or set current_arrays"):
        strategy.aggregate_train(1, sent_in(1, arrays(w=[0.0])))


@EACH
def test_a_global_model_that_was_set_by_hand_is_taken(kind):
    model = arrays(w=np.linspace(-1, 1, 4))
    replies = sent_in(1, model, np.float64)
    ours, theirs = kind(**OPTIONS[kind]), getattr(flower, kind.__name__)(**OPTIONS[kind])
    for strategy in (ours, theirs):
        # FedAvgM keeps a record there, the others a dictionary.
        by_name = {key: array.numpy() for key, array in model.items()}
        strategy.current_arrays = model if kind is FedAvgM else by_name
    got, _ = ours.aggregate_train(1, replies)
    wanted, _ = theirs.aggregate_train(1, replies)
    assert dump(got) == dump(wanted)


@EACH
def test_a_model_set_by_hand_that_is_another_one_is_refused(kind):
    strategy = kind(**OPTIONS[kind])
    strategy.current_arrays = arrays(w=[0.0, 1.0])
    with pytest.raises(InputError, match="or set current_arrays to a model with the keys and shap"):
        strategy.aggregate_train(1, sent_in(1, arrays(w=[0.0])))


# --- Buffers ------------------------------------------------------------------------------------


@EACH
def test_running_statistics_are_averaged_and_only_parameters_are_stepped(kind):
    model = arrays(weight=[1.0], **{"norm.running_mean": [0.0], "norm.running_var": [1.0]})
    strategy, plain = kind(**OPTIONS[kind]), kind(**OPTIONS[kind])
    for number in range(1, 6):
        # A variance that falls: momentum would carry it below 0.
        sent = {"weight": [0.5], "norm.running_mean": [2.0], "norm.running_var": [1.0 / number]}
        replies = [reply(1, sent, "a", 1), reply(2, sent, "b", 3)]
        model, _ = one_round(strategy, number, model, replies)
        assert model["norm.running_mean"].numpy() == [2.0]
        assert model["norm.running_var"].numpy() == np.float32([1.0 / number])
    alone = arrays(weight=[1.0])
    for number in range(1, 6):
        replies = [reply(1, {"weight": [0.5]}, "a", 1), reply(2, {"weight": [0.5]}, "b", 3)]
        alone, _ = one_round(plain, number, alone, replies)
    assert model["weight"].numpy() == alone["weight"].numpy()
    assert model["weight"].numpy() != [0.5]


def test_flowers_momentum_makes_a_running_variance_negative_and_ours_does_not():
    name = "norm.running_var"
    found = {}
    for module in (strategies, flower):
        strategy, model = module.FedAvgM(server_momentum=0.9), arrays(**{name: [1.0]})
        for number in range(1, 4):
            # Each site's variance moves half way to .1.
            sent = {name: (model[name].numpy() + 0.1) / 2}
            replies = [reply(n, sent, f"s{n}") for n in (1, 2)]
            model, _ = one_round(strategy, number, model, replies)
        found[module] = float(model[name].numpy()[0])
    assert found[strategies] == pytest.approx(0.1 + 0.9 / 8)
    assert found[flower] < 0


@EACH
def test_a_buffer_of_any_name_is_averaged_if_it_is_named(kind):
    strategy = kind(**OPTIONS[kind])
    strategy.buffers = {"scale"}
    model = arrays(weight=[1.0], scale=[1.0])
    for number in (1, 2):
        sent = {"weight": [0.0], "scale": [3.0]}
        model, _ = one_round(strategy, number, model, [reply(1, sent, "a")])
    assert model["scale"].numpy() == [3.0]
    assert all(len(record) == 1 for record in strategy.export_state().values())


@EACH
def test_complex_weights_are_refused_before_anything_is_sent(kind):
    strategy = kind(**OPTIONS[kind])
    text = f"w is complex64, which {kind.__name__} cannot step: its rule is for real numbers"
    with pytest.raises(InputError, match=text):
        configure(strategy, 1, arrays(w=np.zeros(2, np.complex64)))


@EACH
def test_the_replies_are_not_changed(kind):
    model = arrays(w=[0.0, 1.0], n=np.array(2))
    replies = [reply(1, {"w": [1.0, 2.0], "n": np.array(4)}, loss=1.0)]
    before, sent = [repr(m.content) for m in replies], dump(model)
    one_round(kind(**OPTIONS[kind]), 1, model, replies)
    assert [repr(m.content) for m in replies] == before
    assert dump(model) == sent


NAMES = ["FedAvg", "FedProx", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "QFedAvg"]


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_summary_are_flowers(name, caplog):
    theirs, ours = getattr(flower, name), getattr(strategies, name)
    parameters = inspect.signature(theirs).parameters
    values = {
        key: (p.default if isinstance(p.default, str | None) else p.default + 1)
        if p.default is not p.empty else 0.5
        for key, p in parameters.items()
    }  # fmt: skip
    values |= {"fraction_train": 0.5, "fraction_evaluate": 0.5}
    values |= {key: f"my {values[key]}" for key in values if isinstance(values[key], str)}
    wanted = vars(theirs(**values))
    got = vars(ours(**values))
    assert wanted == {key: got[key] for key in wanted}
    if all(p.kind is not p.KEYWORD_ONLY for p in parameters.values()):
        positional = list(values.values())
        got = vars(ours(*positional))
        assert wanted == {key: got[key] for key in wanted}
    logging.getLogger("flwr").addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, "flwr"):
            theirs(**values).summary()
            lines = [record.getMessage() for record in caplog.records]
            caplog.clear()
            ours(**values).summary()
    finally:
        logging.getLogger("flwr").removeHandler(caplog.handler)
    assert len(lines) >= 8
    assert [record.getMessage() for record in caplog.records] == lines


# --- With our rules -----------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize(
    "rule", [FedMedian, FedTrimmedAvg, MultiKrum, Bulyan, GeometricMedian, WeightedFedAvg]
)
def test_an_optimiser_goes_with_each_rule(kind, rule):
    def seven():
        return [reply(n, {"w": [float(n), 2.0]}, f"s{n}", loss=1.0) for n in range(7)]

    mixed = type("Mixed", (kind, rule), {})(**OPTIONS[kind])
    mean, _ = rule().aggregate_train(1, seven())
    model = arrays(w=[0.5, 0.5])
    wanted, _ = one_round(kind(**OPTIONS[kind]), 1, model, [reply(1, mean)])
    strategy = mixed
    grid = FakeGrid(range(7), lambda m: None)
    strategy.configure_train(1, model, ConfigRecord(), grid)
    assert dump(strategy.aggregate_train(1, seven())[0]) == dump(wanted)


@pytest.mark.parametrize(
    ("bases", "text"),
    [
        ((FedAvg, flower.FedMedian), "take FedMedian from fedmed_flower.strategies, not from"),
        ((FedAvg, flower.FedTrimmedAvg), "take FedTrimmedAvg from fedmed_flower.strategies, not"),
        ((FedAvg, flower.Bulyan), "take Bulyan from fedmed_flower.strategies, not from Flower"),
        ((FedAvg, flower.MultiKrum), "take MultiKrum from fedmed_flower.strategies, not from"),
        ((FedAvg, flower.Krum), "take Krum from fedmed_flower.strategies, not from Flower"),
        ((FedAvg, flower.QFedAvg), "take QFedAvg from fedmed_flower.strategies, not from Flower"),
        ((FedAdam, flower.FedMedian), "take FedMedian from fedmed_flower.strategies, not from"),
        ((FedAdam, FedAvgM), "FedAdam and FedAvgM both move the model: derive it from one of"),
        ((FedYogi, FedAdagrad), "FedYogi and FedAdagrad both move the model: derive it from one"),
        ((flower.FedAdam, FedAvg), "name FedAvg before FedAdam among its bases"),
        ((flower.FedAvgM, FedMedian), "name FedAvg before FedAvgM among its bases"),
    ],
)
def test_a_mixture_that_would_lose_one_of_two_rules_is_refused(bases, text):
    with pytest.raises(TypeError, match=f"^Mixed: {text}"):
        type("Mixed", bases, {})


def test_making_a_class_does_not_change_what_is_a_subclass_of_what():
    # A refused class lives on until then.
    gc.collect()
    mixed = type("Mixed", (FedAvg, flower.FedAdam), {})
    assert issubclass(mixed, flower.FedAdam)
    assert not issubclass(FedAvg, flower.FedAdam)
    assert not issubclass(flower.FedAdam, FedAvg)


# --- State --------------------------------------------------------------------------------------


@EACH
def test_the_state_survives_the_run_folder_to_the_bit(kind, tmp_path):
    model = arrays(w=np.linspace(-1, 1, 6).astype(np.float32), b=np.float32(1), n=np.array(3))

    def play(strategy, current, rounds):
        for number in rounds:
            replies = [
                reply(m.metadata.src_node_id, dict_of(m, current), f"s{k}")
                for k, m in enumerate(sent_in(number, current, np.float64))
            ]
            current, _ = one_round(strategy, number, current, replies)
        return current

    def dict_of(message, current):
        return {
            key: np.asarray(array.numpy()).astype(current[key].numpy().dtype)
            for key, array in message.content["arrays"].items()
        }

    whole = kind(**OPTIONS[kind])
    wanted = play(whole, model, range(1, 6))
    first, second = kind(**OPTIONS[kind]), kind(**OPTIONS[kind])
    middle = play(first, model, range(1, 4))
    folder = RunFolder(tmp_path)
    folder.save(Checkpoint(3, 0, middle, History(), {}, strategy_state=first.export_state()))
    loaded = folder.load()
    second.import_state(loaded.strategy_state)
    assert dump(play(second, loaded.arrays, range(4, 6))) == dump(wanted)
    kept, again = whole.export_state(), second.export_state()
    assert kept
    assert {k: dump(v) for k, v in kept.items()} == {k: dump(v) for k, v in again.items()}


@EACH
def test_a_second_start_begins_without_the_first_ones_momentum(kind):
    def train(values, message, context):
        return {key: value + np.float32(1) for key, value in values.items()}, {"loss": 0.5}

    strategy = kind(**OPTIONS[kind], fraction_evaluate=0.0)
    first, second = (
        run(strategy, site_app(train), arrays(w=[0.0]), rounds=2, sites=2).arrays for _ in range(2)
    )
    assert dump(first) == dump(second)


@EACH
def test_state_from_before_the_first_step_is_none(kind):
    strategy = kind(**OPTIONS[kind])
    assert strategy.export_state() == {}
    model = arrays(w=[0.0])
    one_round(strategy, 1, model, sent_in(1, model))
    strategy.import_state({})
    assert strategy.export_state() == {}


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [(FedAdam, FedAvg, "m_t"), (FedAvgM, FedAdam, "momentum_vector"), (FedYogi, FedAvgM, "m_t")],
)
def test_the_state_of_another_optimiser_is_refused(first, second, name):
    model = arrays(w=[0.0])
    strategy = first(**OPTIONS[first])
    one_round(strategy, 1, model, sent_in(1, model))
    text = (
        f"^the checkpoint holds {name}, which {second.__name__} does not keep: resume it with the "
        "strategy that it was started with$"
    )
    with pytest.raises(InputError, match=text):
        second().import_state(strategy.export_state())
