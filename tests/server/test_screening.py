import re

import numpy as np
import pytest
from builders import arrays, dump, error_reply, header, message, npy, reply
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedmed_flower.server.screening import first_arrays, screen, with_shared_metrics

MODEL = arrays(w=[[1.0, 2.0]], n=np.array(3, np.int64))
GOOD = {"w": np.array([[3.0, 4.0]], np.float32), "n": np.array(5, np.int64)}


def content(**records) -> Message:
    return Message(RecordDict(records), reply_to=message(1))


def with_bytes(data: bytes, stype: str = "numpy.ndarray") -> Message:
    record = arrays(**GOOD)
    record["w"] = Array("float32", (1, 2), stype, data)
    return reply(1, record)


def changed(**values) -> Message:
    return reply(1, GOOD | values)


def test_a_well_formed_reply_passes():
    assert screen(reply(1, GOOD), "num-examples", MODEL) is None
    assert screen(reply(1, GOOD, weight=0.5), "num-examples", MODEL) is None
    assert screen(reply(1, dict(reversed(GOOD.items()))), "num-examples", MODEL) is None
    assert screen(reply(1, loss=float("nan"), curve=[1.0]), "num-examples", None) is None
    assert screen(reply(1, weight=0), "num-examples", None) is None


def test_the_weight_is_what_the_strategy_says():
    named = reply(1, GOOD, weight=None, patients=3)
    assert screen(named, "patients", MODEL) is None
    assert screen(named, "num-examples", MODEL) == "the metric num-examples is missing"


REFUSED = {
    "error": (error_reply(1, "out of memory"), "out of memory"),
    "error without a reason": (error_reply(1, None), "error 6"),
    "nothing in it": (content(), "the reply has 0 metric records instead of one"),
    "no metrics": (
        content(arrays=arrays(**GOOD)),
        "the reply has 0 metric records instead of one",
    ),
    "two metric records": (
        content(arrays=arrays(**GOOD), a=MetricRecord({"num-examples": 1}), b=MetricRecord()),
        "the reply has 2 metric records instead of one",
    ),
    "no arrays": (reply(1), "the reply has 0 array records instead of one"),
    "two array records": (
        content(a=arrays(**GOOD), b=arrays(**GOOD), m=MetricRecord({"num-examples": 1})),
        "the reply has 2 array records instead of one",
    ),
    "no weight": (reply(1, GOOD, weight=None), "the metric num-examples is missing"),
    "zero": (reply(1, GOOD, weight=0), "num-examples must be above 0 and at most 1e+09, got 0"),
    "negative": (
        reply(1, GOOD, weight=-2),
        "num-examples must be above 0 and at most 1e+09, got -2",
    ),
    "NaN": (
        reply(1, GOOD, weight=float("nan")),
        "num-examples must be above 0 and at most 1e+09, got nan",
    ),
    "infinite": (
        reply(1, GOOD, weight=float("inf")),
        "num-examples must be above 0 and at most 1e+09, got inf",
    ),
    "list": (reply(1, GOOD, weight=[1]), "num-examples is a list instead of one number"),
    "missing key": (
        reply(1, {"w": GOOD["w"]}),
        "1 arrays are missing, such as n",
    ),
    "no key": (reply(1, ArrayRecord()), "2 arrays are missing, such as n"),
    "extra key": (changed(b=[1.0], a=[1.0]), "2 arrays are not in the model, such as a"),
    "other shape": (
        changed(w=np.ones((2, 1), np.float32)),
        "w is float32[2, 1] instead of float32[1, 2]",
    ),
    "shape that would broadcast": (
        changed(w=np.ones(1, np.float32)),
        "w is float32[1] instead of float32[1, 2]",
    ),
    "0-d as 1-d": (changed(n=np.array([5], np.int64)), "n is int64[1] instead of int64[]"),
    "other dtype": (
        changed(w=np.ones((1, 2))),
        "w is float64[1, 2] instead of float32[1, 2]",
    ),
    "other byte order": (
        changed(w=np.ones((1, 2), ">f4")),
        "w is >f4[1, 2] instead of float32[1, 2]",
    ),
    "integer as float": (changed(n=np.array(5.0)), "n is float64[] instead of int64[]"),
    "other serialisation": (
        with_bytes(b"", "torch.tensor"),
        "w cannot be read: unknown serialisation 'torch.tensor'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_training_reply_that_cannot_be_used(name):
    bad, reason = REFUSED[name]
    assert screen(bad, "num-examples", MODEL) == reason


@pytest.mark.parametrize(
    "data",
    [
        b"",
        Array(GOOD["w"]).data[:-1],
        Array(GOOD["w"]).data + b"\0",
        npy(header(shape="(-1, 2)"), bytes(8)),
        npy(header(shape=f"({10**30}, 2)"), bytes(8)),
        npy(header(shape="(True, 2)"), bytes(8)),
        npy(header(descr="()"), bytes(8)),
        npy("{'descr': ("),
        npy("-" * 9000 + "1"),
    ],
    ids=["empty", "truncated", "trailing", "negative side", "vast side", "sides of booleans",
         "no dtype", "cut header", "deep header"],
)  # fmt: skip
def test_arrays_that_cannot_be_read_are_a_reason_and_no_exception(data):
    assert re.match("^w cannot be read: ", screen(with_bytes(data), "num-examples", MODEL) or "")


def test_a_weight_beyond_floats_is_a_reason_and_no_exception():
    # Flower's wire format ends at 64 bits, but a run in one process hands the number over as it is.
    reason = screen(reply(1, GOOD, weight=10**400), "num-examples", MODEL)
    assert reason is not None
    assert reason.startswith("num-examples must be above 0 and at most 1e+09, got 1000")


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (-1, "num-examples must be at least 0 and at most 1e+09, got -1"),
        (float("nan"), "num-examples must be at least 0 and at most 1e+09, got nan"),
        (float("inf"), "num-examples must be at least 0 and at most 1e+09, got inf"),
        ([], "num-examples is a list instead of one number"),
        (None, "the metric num-examples is missing"),
    ],
)
def test_an_evaluation_reply_that_cannot_be_used(weight, reason):
    assert screen(reply(1, weight=weight), "num-examples", None) == reason


def test_the_empty_message_is_refused():
    empty = reply(1, GOOD)
    empty.__dict__["_content"] = None
    assert screen(empty, "num-examples", MODEL) == "the reply is empty"


def test_only_what_all_replies_hold_in_one_form_is_kept():
    replies = [
        reply(1, GOOD, weight=1, loss=0.5, curve=[1.0, 2.0], pair=[1, 2], mixed=1.0, mine=1),
        reply(2, GOOD, weight=2, pair=[3, 4], loss=0.25, curve=[1.0], mixed=[1.0], other=2),
    ]
    got = [dict(m.content["metrics"]) for m in with_shared_metrics(replies, "num-examples")]
    assert got == [
        {"num-examples": 1, "loss": 0.5, "pair": [1, 2]},
        {"num-examples": 2, "loss": 0.25, "pair": [3, 4]},
    ]
    assert list(got[1]) == ["num-examples", "loss", "pair"]


def test_records_get_the_names_of_the_first_reply_and_others_stay():
    first = content(
        weights=arrays(**GOOD), numbers=MetricRecord({"num-examples": 1}), site=ConfigRecord()
    )
    second = content(
        arrays=arrays(**GOOD), metrics=MetricRecord({"num-examples": 2}), more=ConfigRecord()
    )
    got = with_shared_metrics([first, second], "num-examples")
    assert [set(m.content) for m in got] == [
        {"weights", "numbers", "site"},
        {"weights", "numbers", "more"},
    ]
    assert got[1].content["numbers"] == {"num-examples": 2}


def test_the_replies_are_not_changed():
    replies = [reply(1, GOOD, site="a", loss=0.5), reply(2, GOOD, site="b", mine=1.0)]
    before = [repr(m.content) for m in replies]
    kept = [m.content for m in replies]
    got = with_shared_metrics(replies, "num-examples")
    assert [repr(m.content) for m in replies] == before
    assert all(m.content is c for m, c in zip(replies, kept, strict=True))
    assert [m.metadata.src_node_id for m in got] == [1, 2]


def test_more_metrics_than_a_thousand_are_a_reason():
    many = {f"m{k}": 1.0 for k in range(1000)}
    text = "the reply has 1,001 metrics, at most 1,000 are taken"
    assert screen(reply(1, GOOD, **many), "num-examples", MODEL) == text
    many.pop("m0")
    assert screen(reply(1, GOOD, **many), "num-examples", MODEL) is None


def test_a_metric_with_a_long_name_is_a_reason():
    text = "the name of a metric has 201 letters, at most 200 are taken"
    assert screen(reply(1, GOOD, **{"m" * 201: 1.0}), "num-examples", None) == text
    assert screen(reply(1, GOOD, **{"m" * 200: 1.0}), "num-examples", None) is None


def test_much_beside_the_model_is_a_reason():
    sent = reply(1, GOOD)
    sent.content["more"] = ConfigRecord({"text": "x" * (64 * 2**20)})
    reason = screen(sent, "num-examples", MODEL)
    assert reason.endswith("bytes beside the model, at most 67,108,864 are taken")
    # An evaluation has no model: arrays are beside it.
    sent = reply(1, arrays(w=np.zeros(2**24 + 1, np.float32)))
    assert "bytes beside the model" in screen(sent, "num-examples", None)
    # A model may be as large as it is.
    large = arrays(w=np.zeros(2**24 + 1, np.float32))
    assert screen(reply(1, large), "num-examples", large) is None


def test_first_arrays():
    replies = [error_reply(1, "x"), reply(2), reply(3, GOOD), reply(4, {"w": [0.0]})]
    assert dump(first_arrays(replies)) == dump(arrays(**GOOD))
    assert first_arrays([error_reply(1, "x"), reply(2)]) is None
    assert first_arrays([]) is None


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**400, [1, 10**400]])
@pytest.mark.parametrize("model", [MODEL, None])
def test_a_metric_beyond_64_bits_is_a_reason_and_no_exception(value, model):
    bad = reply(1, GOOD, steps=value)
    assert screen(bad, "num-examples", model) == "steps is an integer beyond 64 bits"


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), 1e300, [2**63 - 1]])
def test_a_metric_of_64_bits_passes(value):
    assert screen(reply(1, GOOD, steps=value), "num-examples", MODEL) is None


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (10**9, None),
        (10**9 + 1, "num-examples must be above 0 and at most 1e+09, got 1000000001"),
        (1e12, "num-examples must be above 0 and at most 1e+09, got 1000000000000.0"),
    ],
)
def test_no_hospital_has_more_than_a_billion_examples(weight, reason):
    assert screen(reply(1, GOOD, weight=weight), "num-examples", MODEL) == reason


def test_taking_a_copys_records_apart_leaves_the_reply():
    sent = reply(1, GOOD, loss=0.5)
    before = repr(sent.content)
    (copied,) = with_shared_metrics([sent], "num-examples")
    copied.content["arrays"].clear()
    copied.content["metrics"].clear()
    assert repr(sent.content) == before


def test_copies_may_carry_other_weights_and_keep_integers():
    sent = [reply(1, GOOD, weight=6), reply(2, GOOD, weight=2)]

    def weights(**options):
        copies = with_shared_metrics(sent, "num-examples", **options)
        return [repr(m.content["metrics"]["num-examples"]) for m in copies]

    assert weights() == ["6", "2"]
    assert weights(share=0.5) == ["2.0", "2"]
    assert weights(weights=[6.0, 0.5]) == ["6", "0.5"]


def test_a_record_beside_the_model_is_screened_as_the_model_is():
    wanted = {"control": arrays(c=[0.0])}

    def reason(**control):
        beside = {"control": arrays(**control)} if control else {}
        metrics = MetricRecord({"num-examples": 1})
        sent = content(arrays=arrays(**GOOD), metrics=metrics, **beside)
        return screen(sent, "num-examples", MODEL, wanted)

    assert reason(c=[1.0]) is None
    assert reason() == "the reply has no array record control"
    assert reason(d=[1.0]) == "in control, 1 arrays are missing, such as c"
    assert reason(c=[1.0, 2.0]) == "in control, c is float32[2] instead of float32[1]"
