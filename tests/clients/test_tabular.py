import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from safetensors.numpy import load_file
from tables import (
    OUTCOMES,
    SCHEMA,
    TinyTable,
    changed,
    holding,
    patients,
    predicting,
    run_tables,
)
from tiny import ask, bits, context_of, node_of, nodes_of, says, says_of_setting, see

from fedmed_flower import InputError, SiteData
from fedmed_flower.clients.targets import Unit, require_rows, with_target
from fedmed_flower.data.preparation import Preparation
from fedmed_flower.data.rows import Rows
from fedmed_flower.data.schema import table_of
from fedmed_flower.data.site import Site
from fedmed_flower.errors import DeclinedError
from fedmed_flower.metrics import classification, outcomes
from fedmed_flower.metrics.outcomes import outcome_metrics
from fedmed_flower.models.tabular import InUnit
from fedmed_flower.privacy import optimizer
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.runs.verdict import RunFailedError
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.settings import Section
from fedmed_flower.statistics.request import Request
from fedmed_flower.wire import read_error

NAMES = ("north", "south", "west")
DECLARED = {"preparation": "declared"}
PRIVATE = {"privacy": "patient", "target_epsilon": 50.0}


def named(folder, index):
    return nodes_of(folder, *NAMES)[index] | {"partition-id": index, "num-partitions": 3}


def site(index, num_sites=3):
    return Site(f"hospital-{index + 1}", index, num_sites, None, simulated=True)


def rows_of(client, split="train", sites=3):
    loaded = [client.load_data(client(context_of()), site(index)) for index in range(sites)]
    return [row for data in loaded for row in getattr(data, split)]


def agreed_in(folder):
    return Preparation.from_text(RunFolder(folder).read_config()["run"]["agreed"])


def watched(client=TinyTable, answer=None, index=2):
    """Return a client that writes down what it is asked; one site answers the first round so."""
    good, asked = client.client_app(), []

    class Watched(client):
        @staticmethod
        def client_app():
            def handle(message, context):
                number, kind = context.node_config["partition-id"], message.metadata.message_type
                asked.append((kind, number))
                if kind == "query.contribution" and number == index and answer is not None:
                    return answer(message)
                return good(message, context)

            return handle

    return Watched, asked


def error_of(client, context, kind="train", arrays=None, **config):
    reply = ask(client, kind, context, ArrayRecord() if arrays is None else arrays, **config)
    assert reply.has_error()
    return read_error(reply.error.reason)[1]


def arrays_of(client, context, agreed="", seed=0):
    """Return the arrays of a client's own model, from a seed."""
    own = client(context)
    own.agreed = agreed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ArrayRecord(own.build_model().state_dict())


# The first round, in which hospitals agree.


def test_the_preparation_is_that_of_the_pooled_training_table(tmp_path):
    client, asked = watched()
    _, summary = run_tables(tmp_path, client)
    found, rows = agreed_in(tmp_path), rows_of(TinyTable)
    for column in SCHEMA.numeric:
        values = np.array([row[column] for row in rows])
        values = values[~np.isnan(values)]
        assert found.means[column] == pytest.approx(values.mean(), rel=1e-12)
        assert found.scales[column] == pytest.approx(values.std(ddof=1), rel=1e-12)
    assert found.categories == {"sex": ("f", "m"), "ward": ("a", "b", "c")}
    kinds = [kind for kind, _ in asked]
    assert kinds[:7] == ["query.describe"] * 3 + ["query.contribution"] * 3 + ["train"]
    assert kinds.count("query.contribution") == 3
    assert summary["failures"] == []
    # Each message tells it, so that a hospital keeps nothing between two of them.
    features = found.transform(rows_of(TinyTable, "test"))
    state = load_file(tmp_path / "model.safetensors")
    logits = features @ state["weight"].T + state["bias"]
    wanted = outcome_metrics("binary", [row["ill"] for row in rows_of(TinyTable, "test")], logits)
    assert summary["test"]["federated"]["accuracy"] == pytest.approx(wanted["accuracy"])
    assert summary["test"]["federated"]["brier"] == pytest.approx(wanted["brier"], rel=1e-5)


def stopping(base):
    """Return a client that is interrupted when the second site trains for the second time."""

    class Stopping(base):
        calls = 0

        def fit(self, model, prepared, seed):
            if self.site.index == 1:
                Stopping.calls += 1
                if Stopping.calls == 2:
                    raise KeyboardInterrupt
            return super().fit(model, prepared, seed)

    return Stopping


@pytest.mark.parametrize("base", [TinyTable, predicting("cost")])
def test_a_resumed_run_asks_nobody_again_and_ends_in_the_same_bits(base, tmp_path):
    def refuse(self):
        raise AssertionError("nobody is asked again")

    silent, asked = watched(type("Silent", (base,), {"contribute": refuse}))
    whole, _ = run_tables(tmp_path / "whole", base)
    with pytest.raises(KeyboardInterrupt):
        run_tables(tmp_path / "parts", stopping(base))
    before = RunFolder(tmp_path / "parts").read_config()["run"]
    resumed, summary = run_tables(tmp_path / "parts", silent, resume=True)
    assert bits(resumed.arrays) == bits(whole.arrays)
    assert "query.contribution" not in {kind for kind, _ in asked}
    assert RunFolder(tmp_path / "parts").read_config()["run"] == before
    assert before["agreed"] == RunFolder(tmp_path / "whole").read_config()["run"]["agreed"]
    assert summary["failures"] == []


def failed(reason):
    error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
    return lambda message: Message(error, reply_to=message)


def told(**columns):
    record = ConfigRecord({key.replace("_", " "): value for key, value in columns.items()})
    return lambda message: Message(RecordDict({"contribution": record}), reply_to=message)


NOTHING = "west sent nothing to prepare the model with: "
UNUSABLE = "the statistics that west sent cannot be used: "


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (failed("site west: OSError"), NOTHING + "OSError"),
        (told(moments_age=[9.0, math.nan, 1.0]), UNUSABLE + "'moments age' must be the number of"),
        (told(name="patient Smith"), UNUSABLE + "'name' is not asked for by the schema"),
        (lambda message: None, NOTHING + "no answer"),
    ],
)
def test_a_real_hospital_that_tells_rubbish_is_left_out_by_name_and_trains(answer, text, tmp_path):
    client, asked = watched(TinyTable, answer)
    run = tmp_path / "run"
    _, summary = run_tables(
        run, client, node_configs=nodes_of(tmp_path, *NAMES), num_server_rounds=1
    )
    own = [TinyTable(context_of(index, node_config=named(tmp_path, index))) for index in (0, 1)]
    others = {name: site.contribute() for name, site in zip(NAMES, own, strict=False)}
    assert agreed_in(run) == Preparation.agreed(SCHEMA, others)
    assert ("train", 2) in asked
    assert summary["failures"] == []
    assert set(summary["test"]["sites"]) == {*NAMES}
    assert text in (run / "log.txt").read_text()


def test_a_hospital_that_fails_in_the_first_round_tells_the_class_alone(tmp_path):
    class Failing(TinyTable):
        def contribute(self):
            if self.site.index == 2:
                raise InputError("Mr Smith has no age")
            if self.site.index == 1:
                raise DeclinedError("not today")
            return super().contribute()

    run_tables(
        tmp_path / "run", Failing, node_configs=nodes_of(tmp_path, *NAMES), num_server_rounds=1
    )
    log = (tmp_path / "run" / "log.txt").read_text()
    assert NOTHING + "InputError" in log
    assert "south sent nothing to prepare the model with: declined: not today" in log
    for name in ("report.html", "summary.json"):
        assert "Smith" not in (tmp_path / "run" / name).read_text()


ALONE = (
    "no hospital could share statistics of its columns: each needs at least min-cell-count "
    'patients. Set preparation="declared" and give ranges and categories in the schema'
    + see("preparation")
)


@pytest.mark.parametrize(
    ("client", "answer", "text"),
    [
        (
            TinyTable,
            failed("site x: declined: no"),
            "sent nothing to prepare the model with: decl",
        ),
        (TinyTable, told(moments_age=[1.0]), "the statistics that hospital-1 sent cannot be used"),
        (holding({0: SiteData(train=patients(9, 1))}), None, ""),
    ],
)
def test_where_nobody_tells_anything_the_run_ends_before_it_begins(
    client, answer, text, tmp_path, caplog
):
    client, _ = watched(client, answer, index=0)
    with pytest.raises(InputError, match=says(ALONE)):
        run_tables(tmp_path / "run", client, num_sites=1)
    assert not (tmp_path / "run").exists()
    # Why it is so must not be lost with the log that there is not.
    assert text in caplog.text


class Wards(TinyTable):
    schema = replace(SCHEMA, categories=SCHEMA.categories | {"ward": ("a", "b", "c")})


def test_federate_must_be_given_the_client_where_hospitals_agree(tmp_path):
    text = (
        'preparation="federated" needs contributions from all hospitals before the first round: '
        "give federate an instance, TinyTable(context), in place of its build_model"
        + see("preparation")
    )
    by_model = {"wrap": lambda client: client.build_model, "num_server_rounds": 1}
    with pytest.raises(InputError, match=says(text)):
        run_tables(tmp_path / "run", **by_model)
    assert not (tmp_path / "run").exists()
    _, summary = run_tables(tmp_path / "run", Wards, **by_model, preparation="declared")
    assert summary["failures"] == []


def test_hospitals_with_another_schema_than_the_servers_are_told_so(tmp_path):
    other = replace(SCHEMA, numeric=("age", "weight", "pressure"))
    text = (
        "hospitals have agreed upon the columns age, weight, pressure, sex, ward; the schema here "
        "has age, pressure, sex, ward: all must run the same app"
    )
    with pytest.raises(RunFailedError, match=f"all 3 sites failed alike, so the run ends: {text}$"):
        run_tables(
            tmp_path,
            wrap=lambda client: type("Other", (TinyTable,), {"schema": other})(client.context),
        )


def test_what_comes_in_place_of_an_agreement_is_refused():
    context, rubbish = context_of(), '{"means": {}}'
    assert error_of(TinyTable, context, agreed=rubbish).startswith("this is not a preparation of")
    text = 'preparation="federated" needs contributions from all hospitals before the first round'
    assert error_of(TinyTable, context).startswith(text)


def test_a_preparation_by_site_knows_a_hospitals_own_training_rows_alone(tmp_path):
    context = context_of(1, 3, preparation="site")
    own = Wards(context)
    train, ages = own.data().train, np.array([row["age"] for row in own.data().train])
    features = own.prepared("val", pooled=False)[1].inputs["features"].numpy()
    val = np.array([row["age"] for row in own.data().val])
    np.testing.assert_allclose(features[:, 0], (val - ages.mean()) / ages.std(ddof=1), rtol=1e-5)
    assert own.prepared_by == Preparation.of_rows(Wards.schema, train)
    client, asked = watched(Wards)
    _, summary = run_tables(tmp_path, client, preparation="site", baselines=True)
    assert summary["failures"] == []
    assert "query.contribution" not in {kind for kind, _ in asked}
    assert "agreed" not in RunFolder(tmp_path).read_config()["run"]
    # The model on all data pooled is given each hospital's rows as the hospital prepares them.
    pooled = Wards(context_of(0, 3, preparation="site"))
    pooled.pooled = True
    features = pooled.prepared("val", pooled=True)[1].inputs["features"].numpy()
    np.testing.assert_array_equal(
        features[20:40], own.prepared("val", pooled=False)[1].inputs["features"].numpy()
    )


def test_a_preparation_by_site_needs_what_the_hospitals_cannot_agree_upon(tmp_path):
    text = 'the schema declares too little for preparation="site": it needs '
    end = see("preparation")
    with pytest.raises(InputError, match=says(f"{text}categories of 'ward'{end}")):
        run_tables(tmp_path / "run", preparation="site")
    with pytest.raises(
        InputError, match=says(f"{text}a range of 'outcome', which is predicted{end}")
    ):
        run_tables(tmp_path / "run", predicting("cost", ranges={}), preparation="site")
    assert not (tmp_path / "run").exists()
    tested = holding({1: SiteData(train=(), test=patients(20, 3))}, Wards)
    _, summary = run_tables(tmp_path / "run", tested, preparation="site", num_server_rounds=1)
    assert [(f["site"], f["reason"]) for f in summary["failures"]] == [
        (
            "hospital-2",
            f'preparation="site" needs training rows, and there are none{see("preparation")}',
        )
    ]


def test_a_declared_preparation_learns_nothing():
    own = Wards(context_of(**DECLARED))
    features = own.prepared("train", pooled=False)[1].inputs["features"].numpy()
    for row, found in zip(own.data().train, features, strict=True):
        pressure = 0.0 if math.isnan(row["pressure"]) else (row["pressure"] - 150) / 50
        wards = [row["ward"] == ward for ward in "abc"]
        wanted = [(row["age"] - 50) / 25, pressure, row["sex"] == "m", *wards]
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    text = (
        "the schema declares too little: it needs categories of 'ward'; without privacy "
        'preparation="federated" learns them from all hospitals together'
    )
    with pytest.raises(InputError, match=says(text)):
        TinyTable(context_of(**DECLARED)).build_model()


# Hospitals that differ.


def renamed(data):
    return replace(data, **{split: [
        row | {"patient": f"hospital-1-{split}-{number}"}
        for number, row in enumerate(getattr(data, split))
    ] for split in ("train", "val", "test")})  # fmt: skip


def unusable(data):
    frame = pd.DataFrame(data.train).assign(ill=None)
    return SiteData(train=table_of(frame, SCHEMA, "ill.csv").rows)


OUT = {
    "no target": (
        changed(ill=math.nan),
        "row 0 of the train split has ill nan: it must be the num",
    ),
    "unknown class": (changed(ill=2), "row 0 of the train split has ill 2: it must be the number"),
    "a column less": (lambda data: replace(data, test=[{"patient": 1}]), "row 0 of the test split"),
    "rejected": (unusable, "ill.csv: none of 60 rows can be used"),
}
TESTED = {"tested only": lambda data: replace(data, train=(), val=())}
TRAINED = {
    "usual": None,
    "one class": changed(ill=1),
    "few patients": lambda data: SiteData(train=data.train[:3], test=data.test[:1]),
    "constant": changed(age=50.0),
    "own category": changed(ward="z"),
    "unknown to all": changed(ward=None, sex="x"),
    "no values": changed(pressure=math.nan),
    "no val": lambda data: replace(data, val=()),
    "ids of another": renamed,
}


def test_hospitals_that_differ_keep_nobody_from_going_on(tmp_path):
    changes = TRAINED | TESTED | {name: change for name, (change, _) in OUT.items()}
    names = {name: f"hospital-{number}" for number, name in enumerate(changes, start=1)}
    client, asked = watched(holding(dict(enumerate(changes.values()))))
    config = {"num_server_rounds": 1, "personal_epochs": 1}
    _, summary = run_tables(tmp_path, client, len(changes), **config)
    assert summary["status"] == "finished"
    trained, tested, out = ({names[name] for name in kind} for kind in (TRAINED, TESTED, OUT))
    assert set(summary["sites"]) == set(summary["test"]["sites"]) == trained | tested
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {line.split(",")[2] for line in lines if line.startswith("1,train,")} == (
        trained | {"all"}
    )
    assert {index for kind, index in asked if kind == "query.personal"} == set(range(len(TRAINED)))
    telling = [index for kind, index in asked if kind == "query.contribution"]
    assert sorted(telling) == list(range(len(TRAINED) + 1))
    assert set(summary["test"]["personal"]) == trained - {names["no val"], names["few patients"]}
    assert {failure["site"] for failure in summary["failures"]} == out
    log = (tmp_path / "log.txt").read_text()
    for name, (_, text) in OUT.items():
        assert f"1 of {len(changes)} sites cannot take part ({names[name]}): {text}" in log
    for name in ("no val", "few patients"):
        text = "has no model of its own: there are no validation rows, by which"
        assert f"{names[name]} {text}" in log
    assert f"{names['unknown to all']}: categories that are not in the list: sex=x (60 rows)" in log
    found = agreed_in(tmp_path)
    assert found.categories == {"sex": ("f", "m"), "ward": ("a", "b", "c", "z")}
    assert found.still == ()
    # The figure that one class leaves undefined is told of all together.
    assert "auc" not in summary["test"]["sites"][names["one class"]]
    assert 0 < summary["test"]["federated"]["auc"] < 1


def test_a_hospital_that_is_only_tested_is_in_no_comparison(tmp_path):
    client = holding({1: TESTED["tested only"]})
    _, summary = run_tables(
        tmp_path, client, num_server_rounds=1, personal_epochs=1, baselines=True
    )
    test = summary["test"]
    assert test["sites"]["hospital-2"]["num-examples"] == 40
    assert set(test["local"]) == set(test["personal"]) == {"hospital-1", "hospital-3"}
    assert set(test["pooled"]["sites"]) == {"hospital-1", "hospital-2", "hospital-3"}
    assert test["pooled"]["num-examples"] == 120
    assert summary["failures"] == []


def test_a_hospital_whose_rows_cannot_be_used_is_not_in_the_pooled_data(tmp_path):
    client = holding({1: OUT["no target"][0]})
    _, summary = run_tables(tmp_path, client, num_server_rounds=1, baselines=True)
    assert set(summary["test"]["pooled"]["sites"]) == {"hospital-1", "hospital-3"}
    lines = (tmp_path / "baselines" / "pooled" / "metrics.csv").read_text().splitlines()
    assert "1,train,hospital-1,num-examples,120.0" in lines
    assert "the pooled data lack hospital-2: row 0 of" in (tmp_path / "log.txt").read_text()


def test_a_column_that_no_hospital_knows_or_that_never_varies_is_0_for_all(tmp_path):
    change = changed(age=50.0, pressure=math.nan)
    run_tables(tmp_path, holding(dict.fromkeys(range(3), change)), num_server_rounds=1)
    assert agreed_in(tmp_path).still == ("age",)
    log = (tmp_path / "log.txt").read_text()
    assert "column age never varies: its feature is 0 in all rows" in log
    assert "column pressure: no hospital reports it; scaled by its range" in log


# What is predicted.


@pytest.mark.parametrize("kind", ["binary", "multi-class", "count", "continuous"])
def test_training_lowers_the_loss_and_the_figures_are_those_of_the_outputs(kind, tmp_path):
    client = predicting(kind)
    config = {"learning_rate": 0.2, "num_server_rounds": 6}
    _, summary = run_tables(tmp_path, client, **config)
    losses = [float(line.split(",")[4]) for line in (tmp_path / "metrics.csv").read_text().split()
              if re.match(r"\d,val,all,loss,", line)]  # fmt: skip
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.02
    own, rows = client(context_of()), client.load_data(client(context_of()), site(0)).test
    own.agreed = RunFolder(tmp_path).read_config()["run"]["agreed"]
    model = own.build_model()
    state = load_file(tmp_path / "model.safetensors")
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    outputs = model(torch.from_numpy(own.prepared_by.transform(rows))).detach().numpy()
    wanted = outcome_metrics(own.schema.task, [row["outcome"] for row in rows], outputs)
    found = summary["test"]["sites"]["hospital-1"]
    figures = {name: value for name, value in wanted.items() if not isinstance(value, list)}
    assert set(figures) == set(found) - {"loss"}
    assert found == pytest.approx(figures | {"loss": found["loss"]}, rel=1e-4)
    main = {"binary": "auc", "multi-class": "auc", "count": "d2", "continuous": "r2"}[kind]
    assert summary["test"]["federated"][main] > (0.7 if main == "auc" else 0.3)


@pytest.mark.parametrize("preparation", ["federated", "declared", "site"])
@pytest.mark.parametrize("kind", ["continuous", "cost", "stays"])
def test_a_target_far_from_0_is_learnt_too(kind, preparation, tmp_path):
    config = {"learning_rate": 0.3, "preparation": preparation, "local_steps": 20}
    _, summary = run_tables(tmp_path, predicting(kind), 2, **config)
    figures = summary["test"]["federated"]
    assert figures["d2" if kind == "stays" else "r2"] > 0.7
    # In the target's own unit.
    low, high = {"continuous": (2, 15), "cost": (3e3, 2e4), "stays": (20, 200)}[kind]
    assert low < figures["mae"] < high


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("kind", ["cost", "stays"])
def test_default_settings_do_not_diverge_on_large_numbers(kind, optimizer, tmp_path):
    usual = {"learning_rate": 1e-3, "batch_size": 32, "optimizer": optimizer}
    _, summary = run_tables(tmp_path, predicting(kind), 2, **usual)
    assert summary["failures"] == []
    lines = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    assert all(math.isfinite(float(line.split(",")[4])) for line in lines)
    losses = [float(line.split(",")[4]) for line in lines if ",val,all,loss," in line]
    assert losses[1] < losses[0]


def test_the_unit_of_a_number_is_what_hospitals_agree_upon_or_its_range(tmp_path):
    cost, stays = predicting("cost"), predicting("stays")
    run_tables(tmp_path, cost, num_server_rounds=1)
    values = np.array([row["outcome"] for row in rows_of(cost)])
    own = cost(context_of())
    own.agreed = RunFolder(tmp_path).read_config()["run"]["agreed"]
    assert own.unit == pytest.approx(Unit(values.mean(), values.std(ddof=1)), rel=1e-9)
    assert cost(context_of(**DECLARED)).unit == Unit(200_000, 100_000)
    assert stays(context_of(**DECLARED)).unit == pytest.approx(Unit(math.log(2000), 1.0, 1 / 2000))
    assert TinyTable(context_of(**DECLARED)).unit == Unit()
    # It is no feature.
    assert own.prepared_by.names == ("age", "sex=m")
    text = (
        'the schema declares too little for preparation="declared": it needs a range of '
        "'outcome', which is predicted" + see("preparation")
    )
    bare = predicting("cost", ranges={"age": (0, 100)})
    with pytest.raises(InputError, match=says(text)):
        bare(context_of(**DECLARED)).build_model()


def test_the_unit_is_put_on_in_32_bits_at_least():
    last = InUnit(100_000, 2.0)
    for kind, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        found = last(torch.tensor([[0.5]], dtype=kind))
        assert (found.dtype, found.item()) == (wanted, 100_001)


def test_counts_that_are_all_zero_can_be_learnt(tmp_path):
    client = holding(dict.fromkeys(range(2), changed(outcome=0)), predicting("count"))
    _, summary = run_tables(tmp_path, client, 2, num_server_rounds=1)
    assert summary["failures"] == []
    assert summary["test"]["federated"]["mae"] > 0


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("binary", None, "None: it must be the number of a class, 0 to 1"),
        ("binary", 0.5, "0.5: it must be the number of a class, 0 to 1"),
        ("multi-class", 3, "3: it must be the number of a class, 0 to 2"),
        ("count", -1, "-1: it must be a count: 0, 1, 2, ..."),
        ("count", 1.5, "1.5: it must be a count: 0, 1, 2, ..."),
        ("continuous", math.inf, "inf: it must be a finite number"),
        ("continuous", "9", "'9': it must be a finite number"),
    ],
)
def test_a_target_that_cannot_be_is_named(kind, value, text):
    client = holding({0: changed(outcome=value)}, predicting(kind))
    found = error_of(client, context_of(), "query.describe")
    assert found == f"row 0 of the train split has outcome {text}"


# Groups.


def test_groups_are_reported_on_test_rows_only_and_pooled(tmp_path):
    _, summary = run_tables(tmp_path, report_by="sex, age-band", num_server_rounds=1)
    rows = rows_of(TinyTable, "test")
    test = summary["test"]
    for column, value in (("sex", "f"), ("sex", "m"), ("age-band", "<50"), ("age-band", ">=50")):
        group = f"@{column}={value}"
        count = sum(row[column] == value for row in rows)
        assert test["federated"][f"num-examples{group}"] == count
        # A hospital's share of a group.
        parts = [own.get(f"num-examples{group}", 0) for own in test["sites"].values()]
        assert sum(parts) == count
        own = [row for row in rows[:40] if row[column] == value]
        state = load_file(tmp_path / "model.safetensors")
        logits = agreed_in(tmp_path).transform(own) @ state["weight"].T + state["bias"]
        wanted = outcome_metrics("binary", [row["ill"] for row in own], logits)
        found = test["sites"]["hospital-1"]
        assert found[f"auc{group}"] == pytest.approx(wanted["auc"])
        assert found[f"brier{group}"] == pytest.approx(wanted["brier"], rel=1e-5)
        right = [own[f"accuracy{group}"] * own[f"num-examples{group}"]
                 for own in test["sites"].values()]  # fmt: skip
        assert test["federated"][f"accuracy{group}"] == pytest.approx(sum(right) / count)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert {line.split(",")[1] for line in lines if "@" in line} == {"test"}


def test_no_small_group_leaves_a_hospital_whatever_the_server_asks_for(tmp_path):
    some = patients(200, 5, "t", wards=("a", "b"))
    few = [row | {"ward": "c"} for row in patients(7, 6, "c")]
    data = SiteData(train=patients(40, 1, "train"), test=some + few)
    client = holding(dict.fromkeys(range(4), data), Wards)
    north, south, west = nodes_of(tmp_path, *NAMES)
    nodes = [north, south | {"min-cell-count": 5}, west | {"min-cell-count": 120}, {}]
    config = {"report_by": "ward", "num_server_rounds": 1, "node_configs": nodes}
    _, summary = run_tables(tmp_path / "low", client, 4, **config, min_cell_count=1)
    groups = {
        name: {key.partition("=")[2] for key in found if key.startswith("num-examples@")}
        for name, found in summary["test"]["sites"].items()
    }
    # With c hidden in the rest, b must be hidden too, or c were all less the others.
    assert groups["south"] == groups["hospital-4"] == {"a", "b", "c"}
    assert len(groups["north"]) == 1
    assert groups["west"] == set()
    assert summary["test"]["federated"]["num-examples@ward=c"] == 14
    declared = {"preparation": "declared", "min_cell_count": 300}
    _, summary = run_tables(tmp_path / "high", client, 4, **config, **declared)
    assert not [key for found in summary["test"]["sites"].values() for key in found if "@" in key]


def test_a_group_has_as_many_patients_however_their_numbers_are_written():
    rows = patients(20, 1)
    for number, row in enumerate(rows):
        # Nine women, each with two rows.
        row |= {
            "sex": "f" if number < 18 else "m",
            "patient": f"{'00' * (number % 2)}{number // 2}",
        }
    men = [row | {"sex": "m"} for row in patients(40, 3, "u")]
    client = holding({0: SiteData(train=patients(20, 2, "t"), test=[*rows, *men])}, Wards)
    context = context_of(report_by="sex", min_cell_count=10, **DECLARED)
    reply = ask(client, "evaluate", context, arrays_of(client, context), split="test")
    assert not [name for name in reply.content["metrics"] if "@" in name]
    context = context_of(report_by="sex", min_cell_count=9, **DECLARED)
    reply = ask(client, "evaluate", context, arrays_of(client, context), split="test")
    assert reply.content["metrics"]["num-examples@sex=f"] == 18


def test_a_column_to_report_by_that_is_not_there_or_is_a_number_is_told_at_once(tmp_path):
    text = "report-by names town, which row 0 of the train split does not have: it has "
    text += "patient, age-band, sex, ward; report-by is set in the app's pyproject.toml or by "
    text += "-c report-by=" + see("report-by")
    with pytest.raises(InputError, match=says(text)):
        run_tables(tmp_path, report_by="sex,town")
    age = rows_of(TinyTable)[0]["age"]
    text = (
        f"row 0 of the train split has age {age!r}: report-by takes columns of texts, such as "
        "categories, or the bands into which the schema cuts a number"
    )
    with pytest.raises(InputError, match=says(text)):
        run_tables(tmp_path, report_by="age")


# Privacy.


@pytest.mark.parametrize("preparation", ["federated", "site"])
def test_what_is_learnt_without_noise_is_refused_with_privacy(preparation, tmp_path):
    text = (
        f'preparation="{preparation}" learns from patients without noise: privacy="patient" needs '
        'preparation="declared", with ranges and categories in the schema' + see("preparation")
    )
    client, asked = watched(Wards)
    with pytest.raises(InputError, match=says(text)):
        run_tables(tmp_path / "run", client, preparation=preparation, **PRIVATE)
    assert asked == []
    assert not (tmp_path / "run").exists()
    # Nor does a hospital rely on its server.
    context = context_of(run_dir=str(tmp_path), preparation=preparation, **PRIVATE)
    agreed = Preparation.of_rows(Wards.schema, rows_of(Wards)).to_text()
    arrays = ArrayRecord({"weight": torch.zeros(1, 6), "bias": torch.zeros(1)})
    assert error_of(Wards, context, arrays=arrays, agreed=agreed) == text
    assert not (tmp_path / "ledgers").exists()


KINDS = ["binary", "multi-class", "count", "continuous", "cost"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_is_trained_privately(kind, tmp_path):
    config = PRIVATE | DECLARED | {"learning_rate": 0.5, "sampling_rate": 0.5, "local_steps": 10}
    config["private_metrics"] = False
    _, summary = run_tables(tmp_path, predicting(kind), 2, **config)
    assert summary["failures"] == []
    main = {"binary": "auc", "multi-class": "auc", "count": "d2"}.get(kind, "r2")
    assert summary["test"]["federated"][main] > (0.65 if main == "auc" else 0.1)
    ledger = Ledger(tmp_path / "ledgers" / "hospital-1.sqlite", read_only=True)
    (entry,) = ledger.entries()
    assert sum(entry.releases.values()) == 20
    assert entry.patients == 60


@pytest.mark.parametrize("kind", KINDS)
def test_a_private_run_measures_every_task_by_noise(kind, tmp_path):
    config = PRIVATE | DECLARED | {"num_server_rounds": 1}
    _, summary = run_tables(tmp_path, predicting(kind), 2, **config)
    assert summary["failures"] == []
    main = {"binary": "auc", "multi-class": "auc"}.get(kind, "mae")
    assert main in summary["test"]["federated"]
    assert not {"loss", "d2", "r2", "brier"} & summary["test"]["federated"].keys()
    entries = Ledger(tmp_path / "ledgers" / "hospital-1.sqlite", read_only=True).entries()
    assert [(e.purpose, e.patients) for e in entries] == [
        ("train", 60), ("val counts", 20), ("test counts", 40),
    ]  # fmt: skip


@pytest.mark.parametrize("client", [*map(predicting, KINDS), Wards])
def test_made_up_rows_are_like_those_of_a_hospital_and_learnt_from_none(client):
    class Silent(client):
        def load_data(self, site):
            raise AssertionError("the rows are looked at")

    own, real = Silent(context_of(**DECLARED)), client(context_of(**DECLARED))
    rows = own.made_up(30)
    assert rows == own.made_up(30)
    own.check(SiteData(rows))
    schema = own.schema
    for row in rows:
        for name in schema.numeric:
            low, high = schema.ranges[name]
            assert low <= row[name] <= high
        assert all(row[name] in schema.categories[name] for name in schema.categorical)
    # Each class and more than one number: a loss that is the same for all would show nothing.
    assert len({row[schema.target] for row in rows}) >= max(2, len(schema.classes))
    made, some = own.probe(4), real.batch_of(real.prepared("train", pooled=False)[1], range(4))
    assert {name: (part.shape, part.dtype) for name, part in made.items()} == {
        name: (part.shape, part.dtype) for name, part in some.items()
    }


def no_numbers(count, std, generator):
    return np.zeros(count)


def without_noise(total, std):
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_no_patient_moves_a_private_model_further_than_the_clipping_norm(
    kind, tmp_path, monkeypatch
):
    """One patient among twenty is replaced by the most extreme one: twice the norm / 20."""
    # The target is so large that no grid keeps its bound: these numbers are rounded to none.
    monkeypatch.setattr(optimizer, "gaussian", no_numbers)
    client = predicting(kind)
    limits, _ = OUTCOMES[kind]
    train = rows_of(client)[:20]
    odd = {"age": 1e9, "sex": "f", "outcome": 0 if limits is None else limits[1]}
    states = []
    for rows in (train, [train[0] | odd, *train[1:]], train):
        site = holding({0: SiteData(train=rows)}, client)
        config = {"sampling_rate": 1.0, "learning_rate": 1.0, "max_grad_norm": 0.1, **DECLARED}
        context = context_of(run_dir=str(tmp_path / str(len(states))), **PRIVATE, **config)
        reply = ask(site, "train", context, arrays_of(site, context))
        assert not reply.has_error(), reply.error.reason
        arrays = reply.content["arrays"].values()
        states.append(np.concatenate([array.numpy().ravel() for array in arrays]))
    assert 0 < np.linalg.norm(states[0] - states[1]) <= 2 * 0.1 / 20 * (1 + 1e-5)
    np.testing.assert_array_equal(states[0], states[2])


@pytest.mark.parametrize("kind", KINDS)
def test_no_patient_changes_noised_counts_by_more_than_the_noise_is_for(
    kind, tmp_path, monkeypatch
):
    for module in (classification, outcomes):
        monkeypatch.setattr(module, "noised_once", without_noise)
    client = predicting(kind)
    limits, _ = OUTCOMES[kind]
    val = [row | {"patient": f"p{number // 2}"} for number, row in enumerate(rows_of(client))]
    val = [*val, *([val[0] | {"patient": "odd", "age": 1e9}] * 3)]
    told = []
    for rows in (val, val[:-3]):
        data = SiteData(train=[row | {"patient": "t"} for row in val[:5]], val=rows)
        site = holding({0: data}, client)
        config = {"private_metrics": True, "num_server_rounds": 1, **DECLARED}
        context = context_of(run_dir=str(tmp_path / str(len(told))), **PRIVATE, **config)
        reply = ask(site, "evaluate", context, arrays_of(site, context))
        assert not reply.has_error(), reply.error.reason
        record = reply.content["metrics"]
        told.append(record)
    counted = "noised-counts" if limits is None else "noised-errors"
    assert (told[0]["num-examples"], told[1]["num-examples"]) == (91, 90)
    change = np.asarray(told[0][counted]) - np.asarray(told[1][counted])
    if limits is not None:
        # Sums are told in the target's own unit.
        change[1] /= limits[1] - limits[0]
        assert set(told[0]) == {"num-examples", "mae", counted}
    most = {"binary": 1, "multi-class": 2}.get(kind, math.sqrt(2))
    assert 0 < np.linalg.norm(change) <= most * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["count", "continuous"])
def test_noised_errors_need_a_declared_range(kind, tmp_path, caplog):
    class Client(predicting(kind, ranges={"age": (0, 100)})):
        def load_data(self, site):
            raise AssertionError("the rows are looked at")

    text = "metrics with noise need a range of outcome in the schema's ranges"
    with pytest.raises(InputError, match=says(text)):
        Client(context_of()).require_measurable()
    context = context_of(node_config=node_of(tmp_path, private_metrics=True))
    agreed = Preparation.of_rows(with_target(Client.schema), rows_of(predicting(kind))).to_text()
    arrays = arrays_of(Client, context, agreed)
    assert error_of(Client, context, "evaluate", arrays, agreed=agreed) == "InputError"
    assert caplog.messages[-1] == f"north: {text}"


BUDGET = {"site-name": "north", "budget-epsilon": 9.0, "budget-delta": 1e-5}


def test_a_hospital_with_a_budget_tells_nothing_without_noise(tmp_path):
    node = BUDGET | {"data-dir": str(tmp_path)}
    context = context_of(node_config=node, personal_epochs=1, report_by="sex", **DECLARED)
    arrays = arrays_of(Wards, context)
    for kind, config in (
        ("train", {}),
        ("query.contribution", {}),
        ("query.personal", {}),
        ("query.statistics", {"request": Request(("age",)).to_text()}),
    ):
        assert error_of(Wards, context, kind, arrays, **config).startswith("declined: "), kind
    for split in ("train", "val", "test"):
        reply = ask(Wards, "evaluate", context, arrays, split=split)
        if reply.has_error():
            assert read_error(reply.error.reason)[1].startswith("declined: ")
        else:
            found = set(reply.content["metrics"])
            assert "noised-counts" in found
            assert not {name for name in found if "@" in name or name == "loss"}
    assert not list(tmp_path.rglob("*.safetensors"))
    told = ask(Wards, "query.describe", context).content["metrics"]
    assert set(told) == {"train", "val", "test", "num-examples"}


def test_a_hospital_with_a_budget_learns_no_preparation_of_its_own(tmp_path):
    """Its noised figures would follow from means of training rows that nothing is charged for."""
    context = context_of(node_config=BUDGET | {"data-dir": str(tmp_path)}, preparation="site")
    arrays = arrays_of(Wards, context_of(preparation="site"))
    for split in ("val", "test"):
        text = error_of(Wards, context, "evaluate", arrays, split=split)
        assert text.startswith('declined: preparation="site" learns from patients without noise')


def test_a_real_hospital_tells_its_number_of_rows_and_no_labels(tmp_path):
    node = node_of(tmp_path)
    told = ask(TinyTable, "query.describe", context_of(node_config=node))
    assert set(told.content["metrics"]) == {"train", "val", "test", "num-examples", "rejected"}
    simulated = ask(TinyTable, "query.describe", context_of()).content["metrics"]
    assert sum(simulated["labels"]) == 60
    private = context_of(node_config=node, **PRIVATE, **DECLARED)
    told = ask(Wards, "query.describe", private).content["metrics"]
    assert set(told) == {"train", "val", "test", "num-examples"}


def test_a_contribution_tells_of_nothing_that_fewer_than_ten_patients_have(tmp_path):
    rows = patients(9, 1) + [row | {"ward": "z"} for row in patients(9, 2, "z")]
    client = holding({0: SiteData(train=rows)})
    north, south, _ = nodes_of(tmp_path, *NAMES)
    for node, told in ((north, {"a"}), (south | {"min-cell-count": 2}, None)):
        reply = ask(client, "query.contribution", context_of(node_config=node, min_cell_count=1))
        record = reply.content["contribution"]
        counts = record.get("counts ward", [])
        assert min([*counts, 99]) >= (10 if told else 2)
        assert ("z" in record.get("categories ward", [])) == (told is None)
        assert record["moments age"][0] == 18


def test_rows_that_are_rejected_are_not_told_of():
    class Screening(TinyTable):
        def screen(self, rows, split):
            return [row for row in rows if row["age"] < 60]

    own = Screening(context_of())
    ages = [row["age"] for row in own.data().train if row["age"] < 60]
    assert own.contribute()["moments age"][:2] == [len(ages), pytest.approx(np.mean(ages))]
    site = Wards(context_of(preparation="site"))
    assert site.prepared_by.means["age"] > 50
    site = type("Both", (Screening, Wards), {})(context_of(preparation="site"))
    assert site.prepared_by.means["age"] == pytest.approx(np.mean(ages))


# Queries of one's own.


def towns(client, message):
    rows = client.data().train
    if Faults.from_run_config(client.context.run_config).fails:
        raise InputError("Mrs Smith lives nowhere")
    return RecordDict({"towns": MetricRecord({"wards": len({row["ward"] for row in rows})})})


@dataclass(frozen=True)
class Faults(Section):
    fails: bool = False


class Asked(TinyTable):
    sections = (Faults,)
    queries = TinyTable.queries | {"towns": towns}


def test_a_subclass_adds_a_query():
    reply = ask(Asked, "query.towns", context_of())
    assert reply.content["towns"]["wards"] == 3
    assert reply.content["site"]["name"] == "hospital-1"
    assert not ask(Asked, "query.describe", context_of()).has_error()
    with pytest.raises(ValueError, match="towns"):
        ask(TinyTable, "query.towns", context_of())


def test_of_an_error_in_a_query_a_real_site_tells_the_class_alone(tmp_path):
    broken = {"fails": True}
    assert error_of(Asked, context_of(**broken), "query.towns") == "Mrs Smith lives nowhere"
    context = context_of(node_config=node_of(tmp_path), **broken)
    assert error_of(Asked, context, "query.towns") == "InputError"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"preparation": "pooled"},
            "preparation must be one of federated, site, declared, got 'pooled'",
        ),
        ({"network_depth": 1.0}, "network-depth must be of type int, got 1.0"),
        ({"report_by": 3}, "report-by must be of type str, got 3"),
    ],
)
def test_settings_name_key_bound_and_value(config, text):
    with pytest.raises(InputError, match=says_of_setting(text)):
        TinyTable(context_of(**config))


def test_the_network_is_that_of_the_run_config():
    for kind, layers in (("linear", 1), ("mlp", 4), ("residual", 8)):
        config = {"tabular_network": kind, "network_width": 5, "network_depth": 3, **DECLARED}
        own = Wards(context_of(**config))
        model = own.build_model()
        linear = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
        assert len(linear) == layers
        assert linear[0].in_features == 6
        assert linear[-1].out_features == 1
    assert predicting("multi-class")(context_of(**DECLARED)).build_model().out_features == 3


def test_a_hospital_whose_column_stands_out_is_named_before_the_first_round(tmp_path, caplog):
    class Months(TinyTable):
        schema = replace(SCHEMA, ranges={})

        def load_data(self, site):
            data = super().load_data(site)
            if site.name != "hospital-2":
                return data
            train = [row | {"age": 12 * row["age"]} for row in data.train]
            return replace(data, train=train)

    _, summary = run_tables(tmp_path, Months, 3)
    (note,) = summary["notes"]
    assert (note["round"], note["phase"], note["site"]) == (1, "before training", "hospital-2")
    assert note["text"].startswith("age has the mean ")
    assert "hospital-2: age has the mean" in caplog.text
    assert "age has the mean" in (tmp_path / "report.html").read_text()


def in_table(rows, **columns):
    """Return rows as a table has them, some columns changed."""
    arrays = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    texts = {
        name: array.astype(object) for name, array in arrays.items() if array.dtype.kind == "U"
    }
    return Rows(arrays | texts | columns)


@pytest.mark.parametrize(
    ("column", "value"),
    [("ill", 2), ("ill", math.nan), ("ill", "1"), ("age", (1, 2)), ("ward", 3), ("ward", None)],
)
@pytest.mark.parametrize("groups", [(), ("ward", "age-band"), ("age",), ("height",)])
def test_rows_of_a_table_are_refused_as_dicts_are(column, value, groups):
    rows = patients(30, 0)
    changed_column = np.empty(30, object)
    changed_column[:] = [row[column] for row in rows]
    changed_column[7] = value
    for table in (in_table(rows), in_table(rows, **{column: changed_column})):
        told = []
        for given in (table, [*map(dict, table)]):
            try:
                require_rows(given, SCHEMA, groups, "the train split")
            except InputError as error:
                told.append(str(error))
            else:
                told.append("")
        assert told[0] == told[1]


def test_a_row_of_a_table_without_a_column_is_refused():
    table = in_table(patients(3, 0))
    short = Rows({name: table.column(name) for name in table.names if name != "ward"})
    wanted = (
        "row 0 of the val split has no ward: take rows from read_table, or give each row every "
        "column of the schema"
    )
    with pytest.raises(InputError, match=says(wanted)):
        require_rows(short, SCHEMA, (), "the val split")


def test_rows_of_a_table_are_prepared_as_dicts_are():
    table = in_table(patients(40, 1))
    schema = replace(SCHEMA, categories={**SCHEMA.categories, "ward": ("a", "b", "c")})
    client = type("Declared", (TinyTable,), {"schema": schema})(context_of(**DECLARED))
    ours, theirs = (client.prepare(rows, train=True) for rows in (table, [*map(dict, table)]))
    for name, values in theirs.inputs.items():
        assert torch.equal(ours.inputs[name], values)
        assert ours.inputs[name].dtype == values.dtype
    assert client._classes_of(table) == client._classes_of([*map(dict, table)])
    learnt = [Preparation.of_rows(SCHEMA, rows) for rows in (table, [*map(dict, table)])]
    assert learnt[0] == learnt[1]


def test_chosen_rows_of_a_table_are_loaded_as_columns():
    table = in_table(patients(40, 1))

    def load_data(self, site):
        return SiteData([row for row in table if row["age"] > 30], test=patients(3, 2, "q"))

    data = type("Chosen", (TinyTable,), {"load_data": load_data})(context_of(**DECLARED)).data()
    assert isinstance(data.train, Rows)
    assert (data.train.column("age") > 30).all()
    assert data.test == patients(3, 2, "q")
