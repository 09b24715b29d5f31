"""Coded replies at the server: unpacked for every rule; hostile ones are left out by name."""

from contextlib import suppress

import numpy as np
import pytest
from builders import FakeGrid, arrays, dump, reply, run
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny import says

from fedmed_flower.arrays.packing import Packing
from fedmed_flower.server.compression import Unpacker, saved_bytes
from fedmed_flower.strategies import DPFedAvg, FedAdam, FedAvg, FedMedian, MultiKrum

CODES = ("int8", "int4", "top-k")
EACH = pytest.mark.parametrize("compression", CODES)
MODEL = arrays(w=np.linspace(-1, 1, 12, dtype=np.float32), b=[0.5], steps=np.int64(3))
CONTROL = arrays(c=[0.0, 1.0])
SITES, ROUNDS = 5, 3


def packing_of(compression):
    return Packing.named(compression, 0.25)


def coded(compression, new=MODEL, sent=MODEL):
    return packing_of(compression).pack(sent, new, {}).coded


def unpacked(message, compression="int8", companions=None, request=None):
    unpacker = Unpacker(packing_of(compression), "arrays", MODEL, companions or {})
    return unpacker.unpacked(message, request)


# --- One reply ----------------------------------------------------------------------------------


@EACH
def test_model_and_companion_are_unpacked_and_the_rest_is_kept(compression):
    message = reply(1, coded(compression), site="north", weight=7)
    message.content["control"] = coded(compression, arrays(c=[2.0, 1.0]), CONTROL)
    dense = unpacked(message, compression, {"control": CONTROL})
    assert dump(dense.content["arrays"]) == dump(MODEL)
    assert dense.content["control"]["c"].numpy().tolist() == pytest.approx([2, 1])
    assert dense.content["metrics"] == message.content["metrics"]
    assert dense.content["site"] == message.content["site"]
    # The reply itself is as it came.
    assert "steps" in message.content["arrays"]
    assert "w" not in message.content["arrays"]


def test_the_change_counts_from_what_the_site_was_sent():
    other = arrays(w=np.zeros(12, np.float32), b=[0.0], steps=np.int64(0))
    new = arrays(w=np.full(12, 2, np.float32), b=[0.0], steps=np.int64(1))
    message = reply(1, coded("int8", new, other))
    dense = unpacked(message, request=RecordDict({"arrays": other}))
    assert np.allclose(dense.content["arrays"]["w"].numpy(), 2)
    text = "the site was not sent all of arrays, from which a change counts"
    for request in (RecordDict(), RecordDict({"arrays": arrays(w=[0.0])})):
        with pytest.raises(ValueError, match=says(text)):
            unpacked(message, request=request)


@EACH
def test_the_bytes_that_a_code_has_saved(compression):
    large = arrays(w=np.zeros(100_000, np.float32))
    dense = reply(1, large)
    message = reply(1, packing_of(compression).pack(large, large, {}).coded)
    # Each array has a header of 128 bytes, and each key its letters.
    scales = {"int8": 391, "int4": 391, "top-k": 98}[compression]
    codes = {"int8": 100_000, "int4": 50_000, "top-k": 25_000}[compression]
    size = codes + 4 * scales + 2 * 128 + len(".codes" + ".scales")
    if compression == "top-k":
        size += 4 * 25_000 + 2 * 128 + len(".indices16" + ".indices32")
    assert saved_bytes(message, dense) == 400_000 + 128 + len("w") - size


UNCODED = (
    'all arrays came back uncoded, although compression="int8" was asked for: install the same '
    "fedmed-flower at server and hospital, or train without compression"
)
# What a site sends in place of its code, and why that is refused.
WRONG = {
    "dense": (lambda: MODEL, UNCODED),
    "other code": (
        lambda: coded("top-k"),
        "2 arrays are not in the model, such as .indices16",
    ),
    "no scales": (lambda: without(".scales"), "1 arrays are missing, such as .scales"),
    "more": (lambda: changed(x=[0.0]), "1 arrays are not in the model, such as x"),
    "longer": (
        lambda: changed(**{".codes": np.zeros(14, np.int8)}),
        ".codes is int8[14] instead of int8[13]",
    ),
    "wide": (
        lambda: changed(**{".codes": np.zeros(13, np.int16)}),
        ".codes is int16[13] instead of int8[13]",
    ),
    "NaN": (
        lambda: changed(**{".scales": [0.0, np.nan]}),
        "in the code of w, a scale must be at least 0 and finite, got nan",
    ),
    "negative": (
        lambda: changed(**{".scales": [-1.0, 0.0]}),
        "in the code of b, a scale must be at least 0 and finite, got -1.0",
    ),
}


def changed(**values):
    """Return the model in 8 bits with other arrays."""
    return ArrayRecord({**coded("int8"), **arrays(**values)})


def without(key):
    record = coded("int8")
    del record[key]
    return record


@pytest.mark.parametrize("case", WRONG)
def test_a_reply_that_is_not_in_the_code_is_refused_with_the_reason(case):
    make, reason = WRONG[case]
    with pytest.raises(ValueError, match=says(reason)):
        unpacked(reply(1, make()))
    message = reply(1, coded("int8"))
    message.content["control"] = make()
    with pytest.raises(ValueError, match=says(f"in control, {reason}")):
        unpacked(message, companions={"control": MODEL})


@pytest.mark.parametrize(
    ("indices", "reason"),
    [
        ([0, 0, 5], "in the code of w, indices must ascend, each once"),
        ([0, 9, 12], "in the code of w, an index must be below 12, got 12"),
        ([0, 1], ".indices16 is uint16[3] instead of uint16[4]"),
    ],
)
def test_wrong_indices_are_refused_with_the_reason(indices, reason):
    parts = {".indices16": np.uint16([0, *indices]), ".indices32": np.zeros(0, np.uint32)}
    parts |= {".codes": np.ones(4, np.int8), ".scales": np.ones(2, np.float32)}
    record = arrays(**parts, steps=np.int64(0))
    with pytest.raises(ValueError, match=says(reason)):
        unpacked(reply(1, record), "top-k")


def test_small_codes_do_not_become_many_models():
    message = reply(1, coded("top-k"))
    message.content["more"] = coded("top-k")
    with pytest.raises(ValueError, match="several array records instead of one"):
        unpacked(message, "top-k")


@st.composite
def hostile(draw):
    """Draw a code and arrays for it, whose bytes may be anything."""
    compression = draw(st.sampled_from(CODES))
    forms = packing_of(compression).forms(MODEL)
    values = {}
    for key, (shape, dtype) in forms.items():
        right = draw(st.integers(0, 9))
        shape = shape if right else draw(hnp.array_shapes(max_dims=2, max_side=15))
        kind = dtype if right < 9 else draw(st.sampled_from(["f4", "i1", "u1", "u4", "f8"]))
        values[key] = draw(hnp.arrays(kind, shape))
    return compression, arrays(**values)


@given(case=hostile())
def test_whatever_a_stranger_sends_is_a_model_of_the_layout_or_is_refused(case):
    compression, record = case
    dense = None
    with suppress(ValueError):
        dense = unpacked(reply(1, record), compression).content["arrays"]
    if dense is not None:
        layout = {key: (a.dtype, tuple(a.shape)) for key, a in MODEL.items()}
        assert {key: (a.dtype, tuple(a.shape)) for key, a in dense.items()} == layout


# --- A run --------------------------------------------------------------------------------------


def drift(values, number, server_round):
    return values["w"] * np.float32(0.5) + np.float32(number + server_round / 4)


def coding_app(compression, behave=None, control=False):
    """Return sites that code what a plain site would send; `behave` may change their reply."""
    lost = {}
    app = ClientApp()

    @app.train()
    def _(message, context):
        number = int(context.node_config["partition-id"])
        server_round = int(message.content["config"]["server-round"])
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1 + number})})
        content["site"] = ConfigRecord({"name": f"site-{number}"})
        values = {key: a.numpy() for key, a in message.content["arrays"].items()}
        new = {"w": drift(values, number, server_round)}
        content["arrays"] = ArrayRecord(dict(message.content["arrays"]) | dict(arrays(**new)))
        names = ["arrays"]
        if control:
            names.append("control")
            content["control"] = arrays(c=message.content["control"]["c"].numpy() + number)
        packing = Packing.of(message.content["config"])
        assert (packing is None) == (compression == "none")
        for name in names if packing else ():
            sent = message.content[name]
            packed = packing.pack(sent, content[name], lost.get((number, name), {}))
            lost[number, name] = packed.residual
            if compression == "dense":
                content[name] = packing.unpack(sent, packed.coded)
            else:
                content[name] = packed.coded
        if behave is not None:
            behave(number, server_round, content)
        return Message(content, reply_to=message)

    return app


class Uncoded:
    """Asks for a code and takes replies without one."""

    def _unpacker(self, layout):
        return None


RULES = pytest.mark.parametrize(
    ("rule", "options"),
    [
        (FedAvg, {}),
        (FedAvg, {"max_update_norm": 5.0, "max_weight_share": 0.3}),
        (FedMedian, {}),
        (FedAdam, {"eta": 0.1}),
        (MultiKrum, {"num_malicious_nodes": 1, "num_nodes_to_select": 2}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else " ".join(value),
)


@RULES
@EACH
def test_each_rule_makes_of_codes_what_it_makes_of_the_dense_arrays(rule, options, compression):
    given_all = {"fraction_evaluate": 0.0, "seed": 1, "compression": compression, **options}
    given_all["top_k_share"] = 0.25
    strategy = rule(**given_all)
    run(strategy, coding_app(compression), MODEL, ROUNDS, SITES)
    other = type("Dense", (Uncoded, rule), {})(**given_all)
    run(other, coding_app("dense"), MODEL, ROUNDS, SITES)
    assert not strategy.history.failures
    assert dump(strategy.result.arrays) == dump(other.result.arrays)
    assert strategy.history.rounds_trained() == {f"site-{k}": ROUNDS for k in range(SITES)}


class Controlled(FedAvg):
    def __init__(self, **kwargs):
        super().__init__(fraction_evaluate=0.0, seed=1, **kwargs)
        self.companions = {"control": CONTROL}


class ControlledDense(Uncoded, Controlled):
    pass


@EACH
def test_companions_are_coded_as_the_model_is(compression):
    results = []
    for kind, sending in ((Controlled, compression), (ControlledDense, "dense")):
        strategy = kind(compression=compression, top_k_share=0.25)
        run(strategy, coding_app(sending, control=True), MODEL, ROUNDS, SITES)
        assert not strategy.history.failures
        results.append(dump(strategy.current_companions["control"]))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", [Controlled, FedMedian])
def test_codes_that_are_unpacked_into_files_make_the_same_model(kind, tmp_path):
    results = []
    for bound in (1.0, 1e-9):
        options = {
            "compression": "int8",
            "memory_gigabytes": bound,
            "run_dir": tmp_path / f"{bound}",
        }
        strategy = kind(**options) if kind is Controlled else kind(seed=1, **options)
        run(strategy, coding_app("int8", control=kind is Controlled), MODEL, ROUNDS, SITES)
        assert not [f for f in strategy.history.failures if f.phase == "train"]
        assert bool(strategy.run.spill.spilled) == (bound < 1)
        companions = {name: dump(one) for name, one in strategy.current_companions.items()}
        results.append((dump(strategy.result.arrays), companions))
    assert results[0] == results[1]


def test_a_mean_of_many_sites_unpacks_each_reply_as_it_comes():
    results = []
    # With a limit of their lengths all changes must be known at once.
    for limit in (None, 1e9):
        options = {"fraction_evaluate": 0.0, "seed": 1, "compression": "int8"}
        strategy = FedAvg(max_update_norm=limit, **options)
        assert strategy.is_plain_mean == (limit is None)
        run(strategy, coding_app("int8"), MODEL, 1, 110)
        results.append(strategy.result.arrays["w"].numpy())
    assert np.allclose(*results, rtol=1e-6)


def test_in_asynchronous_rounds_a_change_counts_from_the_model_that_was_sent():
    results = []
    for compression in ("none", "int8"):
        options = {"fraction_evaluate": 0.0, "seed": 1, "buffer": 2, "staleness_exponent": 0.0}
        strategy = FedAvg(compression=compression, **options)
        run(strategy, coding_app(compression), MODEL, 4, 3)
        assert not strategy.history.failures
        stale = [row for row in strategy.history.rows if row[3] == "staleness" and row[4] > 0]
        assert stale
        results.append(strategy.result.arrays["w"].numpy())
    assert np.allclose(*results, rtol=0, atol=0.05)


def test_hostile_sites_are_left_out_by_name_and_count_as_malicious():
    def behave(number, server_round, content):
        record = content["arrays"]
        if number == 0 and server_round == 1:
            record[".scales"] = arrays(s=[np.nan, 1.0])["s"]
        if number == 1 and server_round == 1:
            # In float32 the change is infinite.
            record[".scales"] = arrays(s=[3e38, 3e38])["s"]
        if number == 2 and server_round == 1:
            content["arrays"] = MODEL

    strategy = FedMedian(
        fraction_evaluate=0.0, compression="int8", seed=1, num_malicious_nodes=3, min_replies=1
    )
    run(strategy, coding_app("int8", behave), MODEL, 2, 7)
    reasons = {each.site: each.reason for each in strategy.history.failures}
    assert reasons["site-0"] == "in the code of b, a scale must be at least 0 and finite, got nan"
    assert reasons["site-1"] == "w holds NaN or infinite values"
    assert reasons["site-2"].startswith("all arrays came back uncoded")
    assert {each.round for each in strategy.history.failures} == {1}
    assert strategy.history.rounds_trained()["site-6"] == 2


def test_what_was_saved_is_in_metrics_and_traffic():
    large = arrays(w=np.zeros(10_000, np.float32))
    strategy = FedAvg(fraction_evaluate=0.0, seed=1, compression="int8")
    run(strategy, coding_app("int8"), large, ROUNDS, 2)
    one = 10_000 * 4 + 128 + 1 - (10_000 + 4 * 40 + 256 + 13)
    for server_round in range(1, ROUNDS + 1):
        assert strategy.result.train_metrics_clientapp[server_round]["bytes-saved"] == 2 * one
    traffic = strategy.history.traffic["site-1"]
    assert traffic.bytes_saved == ROUNDS * one
    plain = FedAvg(fraction_evaluate=0.0, seed=1)
    run(plain, coding_app("none"), large, ROUNDS, 2)
    dense = plain.history.traffic["site-1"].bytes_from_site
    assert traffic.bytes_from_site + traffic.bytes_saved == dense
    assert "bytes-saved" not in plain.result.train_metrics_clientapp[1]
    assert plain.history.traffic["site-1"].bytes_saved == 0
    assert "bytes" not in strategy.history.describe(1)


class DPFedAvgDense(Uncoded, DPFedAvg):
    pass


def test_clipping_and_noise_of_hospital_privacy_see_dense_changes():
    models = []
    options = {"noise_multiplier": 0.0, "clipping_norm": 1.0, "population_size": SITES}
    for kind, sending in ((DPFedAvg, "int8"), (DPFedAvgDense, "dense")):
        strategy = kind(fraction_evaluate=0.0, compression="int8", **options)
        run(strategy, coding_app(sending), MODEL, 1, SITES)
        models.append(strategy.result.arrays)
    # Each of the hospitals would move it by more.
    moved = np.linalg.norm(models[0]["w"].numpy() - MODEL["w"].numpy())
    assert 0 < moved <= 1 + 1e-6
    assert dump(models[0]) == dump(models[1])


def test_a_run_that_asks_for_no_code_names_none():
    grid = FakeGrid([1], lambda message: None)
    config = ConfigRecord({"compression": "int8", "top-k-share": 0.5})
    (message,) = FedAvg().configure_train(1, MODEL, config, grid)
    assert "compression" not in message.content["config"]
    assert "top-k-share" not in message.content["config"]


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reply_layout", "decode"])
def test_sites_with_a_form_of_their_own_are_refused(name):
    kind = type("Own", (FedAvg,), {name: lambda self, record: record})
    text = (
        'compression must be "none" with Own, whose sites send the model in a form of their own '
        f'({name}), got "int8"'
    )
    with pytest.raises(ValueError, match=says(text)):
        run(kind(compression="int8"), coding_app("int8"), MODEL, 1, 2)


class Twice(FedAvg):
    def configure_train(self, *args, **kwargs):
        messages = list(super().configure_train(*args, **kwargs))
        return [copy for message in messages for copy in (message, message)]


def test_two_messages_to_a_site_in_one_round_are_refused():
    text = (
        'compression must be "none" if a site is sent two training messages in a round, since it '
        "adds what its code has lost to one change"
    )
    with pytest.raises(ValueError, match=says(text)):
        run(Twice(compression="int8"), coding_app("int8"), MODEL, 1, 2)


def test_replies_without_a_known_model_are_refused():
    text = (
        'compression="int8" needs the model that was sent: call configure_train before '
        "aggregate_train"
    )
    with pytest.raises(ValueError, match=says(text)):
        FedAvg(compression="int8").aggregate_train(1, [reply(1, coded("int8"))])


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="compression must be one of none, int8, int4, top-k, got"):
        FedAvg(compression="zip")
    with pytest.raises(ValueError, match="top-k-share must be above 0 and at most 1, got 2"):
        FedAvg(compression="top-k", top_k_share=2)


def test_a_run_with_another_code_is_not_resumed(tmp_path):
    run(FedAvg(run_dir=tmp_path, compression="int8"), coding_app("int8"), MODEL, 1, 2)
    other = FedAvg(run_dir=tmp_path, resume=True, compression="int4")
    with pytest.raises(ValueError, match=r"compression of FedAvg was 'int8' when .* and is 'int4'"):
        run(other, coding_app("int4"), MODEL, 2, 2)
