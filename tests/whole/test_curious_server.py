"""A server that sets the run config and sends any message learns nothing but what carries noise.

Two hospitals differ in one patient. Whatever the server asks, both answer alike: message types are
those that the app registers, keys those of its settings, so that a new one is drawn here too.
"""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from curious_models import OUTPUTS, PRIVATE, model_of, network
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity
from hospitals import CLIENTS, DIFFERENCES, Images, Lives, Masks, Table, hospital
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CONFIG, context_of

import fedmed_flower
from fedmed_flower import wire
from fedmed_flower.metrics.classification import noised_metrics
from fedmed_flower.metrics.names import NOISED, NOISED_DICE, NOISED_ERRORS
from fedmed_flower.metrics.outcomes import noised_error_metrics
from fedmed_flower.metrics.segmentation import dice_of
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.settings.plan import Plan
from fedmed_flower.settings.registry import RUN
from fedmed_flower.statistics.request import Request
from fedmed_flower.trees import ensembles
from fedmed_flower.wire import (
    AGREED,
    FROZEN,
    LEDGER_DIR,
    MESSAGE_VERSION,
    MESSAGES,
    RUN_KEY,
    TREE_SHARE,
    TREES,
    read_error,
)

# Of the server's own, and of the hospital's, a message holds nothing.
SECTIONS = [section for section in RUN if section is not Plan]
# Of messages: what each key may hold.
MESSAGE_KEYS = {
    "server-round": (0, 1, -1, 10**15, "one"),
    "compression": ("none", "int8", "int4", "top-k", "zip", 3),
    "top-k-share": (0.01, 1.0, 0.0, float("nan"), "much"),
    "uncoded": ([], ["w"], "w"),
    "proximal-mu": (0.0, 0.5, -1.0, float("nan"), "much"),
    "method": ("scaffold", "fednova", "ditto", "fedprox", "x"),
    "method-settings": ("", "ditto-lambda = 0.5", "["),
    "keep": ("norm", "*", "0.*"),
    "keep-sent": (True, False),
    "replies-taken": (0, 1, -1, "one"),
    "own-model": (False, True),
    "split": ("train", "val", "test", "all", 1),
    "validate": (False, True, "x"),
    "test": ("linear", "", "x"),
    "pool-sites": (False, True),
    "count": (0, 1, 1000, -1, "all"),
    "request": ("", "{", "[]"),
    "squares": (True,),
    "offset": (0, -1),
    "columns": ([], ["age"], "age"),
    "means": ([], [50.0], [1, 2], "much"),
    AGREED: ("", "{}", '{"means": {}}'),
    FROZEN: ("", "abc"),
    LEDGER_DIR: ("/nowhere",),
    RUN_KEY: ("k", "k/local", "../x"),
    TREES: ("bagging", "cyclic", "x"),
    TREE_SHARE: (1.0, 0.0, -1.0),
    "version": (0, 1, "x"),
}
# What follows from the number of patients, which is taken as known.
COUNTS = ("num-examples", "train", "val", "test", "patient-epsilon")


# What the server sees -----------------------------------------------------------------------------


def told(content, counted):
    """Return all of a reply but the numbers that noise has made, which are held to be noised."""
    found = {}
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            found[name] = {key: (a.dtype, tuple(a.shape)) for key, a in record.items()}
            continue
        entries = dict(record)
        if NOISED in entries:
            counts = entries.pop(NOISED)
            assert entries == pytest.approx(noised_metrics(counts), nan_ok=True)
            entries = {NOISED: len(counts)}
        if NOISED_ERRORS in entries:
            assert (
                entries.pop("num-examples")
                == noised_error_metrics(entries[NOISED_ERRORS])["num-examples"]
            )
            entries = {NOISED_ERRORS: len(entries[NOISED_ERRORS])}
        if NOISED_DICE in entries:
            sums = entries.pop(NOISED_DICE)
            assert entries == pytest.approx(dice_of(sums, Masks.classes), nan_ok=True)
            entries = {NOISED_DICE: len(sums)}
        if "answer" in entries:
            answer = json.loads(entries["answer"])
            entries = {key: answer[key] for key in ("minimum", "noise")}
        found[name] = {k: v for k, v in entries.items() if counted or k not in COUNTS}
    return found


def seen(client, node, kind, run, message, outputs, counted):
    """Return what a server and a ledger have of one message."""
    context = context_of(node_config=node, **{})
    context.run_config = CONFIG | PRIVATE | run
    TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1
    arrays = ArrayRecord(model_of(client, outputs).state_dict())
    config = ConfigRecord({"server-round": 1, "count": 3, RUN_KEY: "k"} | message)
    if kind == "query.statistics":
        config.setdefault("version", MESSAGE_VERSION)
        config.setdefault("request", Request(columns=("age",), epsilon=1.0).to_text())
    content = RecordDict({"arrays": arrays, "config": config})
    reply = client.client_app()(Message(content, context.node_id, kind), context)
    path = Path(node["data-dir"]) / "privacy-ledger.sqlite"
    entries = []
    if path.exists():
        for entry in Ledger(path, read_only=True).entries():
            count, size = (entry.patients, entry.releases) if counted else (None, None)
            entries.append((entry.purpose, entry.rounds, count, size))
    if reply.has_error():
        return {"error": read_error(reply.error.reason)[1]}, entries
    return told(reply.content, counted), entries


def both(client, one, kind, run=None, message=None, outputs=3):
    """Return what is seen of a hospital, and of one in which a patient differs."""
    run, found = dict(run or {}), []
    # A line that a table cannot use is as a patient who is not there.
    counted = one not in ("absent", "no name", "no row") and (client, one) != (Images, "odd label")
    if client is Images:
        run = network(outputs) | run
    if client is Lives:
        run = {
            "survival-loss": "discrete",
            "survival-horizon": 365.0,
            "survival-intervals": 3,
        } | run
    for which in ("as it is", one):
        with hospital(which) as node:
            found.append(seen(client, node, kind, run, message or {}, outputs, counted))
    return found


# The test -----------------------------------------------------------------------------------------


def values_of(default):
    """Return values of a setting: mostly what may be, else beyond its bounds or of a wrong type."""
    wrong = st.sampled_from(["", "x", -1, True, 10**15])
    if isinstance(default, bool):
        return st.booleans() | st.booleans() | wrong
    if isinstance(default, int):
        return st.sampled_from([1, 2, 3, default]) | st.sampled_from([-1, 0, 10**15]) | wrong
    if isinstance(default, float):
        odd = (0.0, -1.0, float("nan"), float("inf"), 5e-324, 1e-320, 1e300)
        return st.sampled_from([1.0, 0.5, 0.01, default]) | st.sampled_from(odd) | wrong
    texts = (
        "auto",
        "none",
        "patient",
        "sum",
        "mean",
        "site",
        "federated",
        "declared",
        "mlp",
        "sgd",
    )
    texts += (
        "cosine",
        "cox",
        "discrete",
        "group",
        "age",
        "sex,group",
        "4,4",
        "16,16",
        "1,1",
        "Foo",
    )
    return st.sampled_from([default, *texts]) | wrong


RUN_KEYS = {
    entry.name.replace("_", "-"): entry.default for section in SECTIONS for entry in fields(section)
}
KINDS = {client: sorted(client.client_app()._registered_funcs) for client in CLIENTS}


@st.composite
def questions(draw):
    client = draw(st.sampled_from(CLIENTS))
    keys = draw(st.lists(st.sampled_from(sorted(RUN_KEYS)), max_size=2, unique=True))
    run = {key: draw(values_of(RUN_KEYS[key])) for key in keys}
    names = draw(st.lists(st.sampled_from(sorted(MESSAGE_KEYS)), max_size=2, unique=True))
    message = {name: draw(st.sampled_from(MESSAGE_KEYS[name])) for name in names}
    # Most of what can be learnt is in training and evaluation.
    kind = draw(st.sampled_from(KINDS[client]) | st.sampled_from(["train", "evaluate"]))
    outputs = draw(st.just(OUTPUTS[client]) | st.just(OUTPUTS[client]) | st.integers(1, 5))
    return client, draw(st.sampled_from(DIFFERENCES)), kind, run, message, outputs


def test_every_message_and_every_key_is_drawn():
    assert {"train.default", "evaluate.default"} < {*KINDS[Table]}
    assert all(len(kinds) >= 7 for kinds in KINDS.values())
    assert {"target-epsilon", "network", "report-by", "trees-a-round"} < RUN_KEYS.keys()
    # What the code of a hospital reads of a message.
    package, read = Path(fedmed_flower.__file__).parent, set()
    for path in (*package.glob("clients/*.py"), *package.glob("*/client.py")):
        text = path.read_text()
        read |= {*re.findall(r'\bconfig(?:\.get\(|\[)"([^"]+)"', text)}
        names = re.findall(r"\bconfig(?:\.get\(|\[)([A-Z_]+)\b", text)
        read |= {vars(wire).get(name, vars(ensembles).get(name)) for name in names}
    assert read <= MESSAGE_KEYS.keys()
    known = {each.key for each in MESSAGES if each.key.startswith("config.")}
    assert {f"config.{key}" for key in MESSAGE_KEYS} == known


@pytest.mark.parametrize("part", range(2))
def test_a_server_cannot_tell_two_hospitals_apart_that_differ_in_one_patient(part):
    @settings(max_examples=80, deadline=None, suppress_health_check=[*HealthCheck])
    @given(questions())
    def check(question):
        first, second = both(*question)
        assert first == second

    check()


@pytest.mark.parametrize("one", DIFFERENCES)
@pytest.mark.parametrize("client", CLIENTS)
def test_training_and_evaluation_answer_alike_and_cost_alike(client, one):
    outputs = OUTPUTS[client]
    for kind, message in (
        ("train", {}),
        *(("evaluate", {"split": split}) for split in ("train", "val", "test")),
        ("query.describe", {"version": MESSAGE_VERSION}),
    ):
        first, second = both(client, one, kind, {}, message, outputs)
        assert first == second
        assert "error" not in first[0], (kind, first)
        assert len(first[1]) == (kind != "query.describe")


@pytest.mark.parametrize("one", ["label", "no label", "odd label"])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("outputs", [1, 2, 3, 5])
def test_a_network_with_other_outputs_than_classes_is_refused_before_a_row_is_looked_at(
    kind, outputs, one
):
    for epsilon in (1e5, 1e-4):
        first, second = both(Images, one, kind, {"target-epsilon": epsilon}, {}, outputs)
        assert first == second == ({"error": "InputError"}, [])


def test_pictures_are_not_drawn_on_a_servers_word_where_there_is_a_budget():
    for one in ("label", "unreadable"):
        first, second = both(Images, one, "query.pictures", {}, {}, 2)
        assert first == second
        assert first[0]["pictures"] == {"titles": [], "images": []}


def test_report_by_a_column_in_which_one_patient_has_no_text_is_ignored():
    for kind in ("train", "evaluate"):
        first, second = both(Table, "unreadable", kind, {"report-by": "group"}, {"split": "test"})
        assert first == second
        assert "error" not in first[0]
