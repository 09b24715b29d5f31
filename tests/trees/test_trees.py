import json
import logging
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import xgboost
from flwr.app import ArrayRecord, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg, FedXgbBagging, FedXgbCyclic
from flwr.serverapp.strategy.strategy_utils import aggregate_bagging
from forests import DECLARED, STUMP, TARGETS, Hospital, bagged, binary, make_rows, schema_of
from sklearn.metrics import roc_auc_score
from tiny import ask, context_of, says, says_of_setting, see

from fedmed_flower import InputError, Schema, SiteData, SurvivalClient, TabularClient, run_local
from fedmed_flower.clients import app
from fedmed_flower.clients.app import train as plain_train
from fedmed_flower.data.preparation import Preparation
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.runs.verdict import RunFailedError
from fedmed_flower.settings.trees import TreeSettings
from fedmed_flower.trees.client import Ensemble, as_trees, raw_features
from fedmed_flower.trees.ensembles import (
    Form,
    clipped,
    leaves,
    model_bytes,
    read_trees,
    write_trees,
)
from fedmed_flower.trees.server import grow


def run(
    folder,
    client=Hospital,
    sites=3,
    strategy=None,
    node_configs=None,
    evaluate_fn=None,
    **config,
):
    server = ServerApp()

    @server.main()
    def main(grid, context):
        grow(strategy or FedXgbBagging(), grid, context, client(context), evaluate_fn)

    settings = DECLARED | {"num-server-rounds": 2, "run-dir": str(folder)}
    settings |= {key.replace("_", "-"): value for key, value in config.items()}
    app = client if isinstance(client, ClientApp) else client.client_app()
    return run_local(server, app, sites, run_config=settings, node_configs=node_configs).result


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def margins(model, trees, rows):
    form = trees.form
    features = raw_features(trees.schema, trees.prepared_by, rows)
    booster = xgboost.Booster()
    booster.load_model(bytearray(model))
    data = xgboost.DMatrix(features, feature_names=list(form.features))
    return booster.predict(data, output_margin=True)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("task", TARGETS)
def test_one_hospital_grows_what_xgboost_grows_of_values_between_edges(task, declared):
    """Between fifths of a unit where ranges are declared, else between any two values."""
    base = SurvivalClient if task == "survival" else TabularClient
    schema = schema_of(task)
    if not declared:
        schema = replace(schema, ranges={k: v for k, v in schema.ranges.items() if k == "y"})
    sizes = {"sizes": (80, 0, 0), "schema": schema}
    client = type("Alone", (base,), {"load_data": Hospital.load_data, **sizes})
    more = {"survival_loss": "discrete", "survival_horizon": 1.0} if task == "survival" else {}
    if not declared:
        more["preparation"] = "site"
    model, trees = bagged(client, 4, tree_max_depth=3, **more)
    rows = client(trees.context).data().train
    features = raw_features(trees.schema, trees.prepared_by, rows)
    if declared:
        features[:, :2] = np.floor(features[:, :2] / np.float32(0.2))
    label = np.asarray([row["y"] for row in rows])
    if task == "survival":
        label = np.where([row["died"] for row in rows], label, -label)
    objective, start = {
        "binary": ("binary:logistic", 0.5),
        "multi-class": ("multi:softprob", 0.5),
        "count": ("count:poisson", 5.0),
        "continuous": ("reg:squarederror", 5.0),
        "survival": ("survival:cox", 1.0),
    }[task]
    settings = {"objective": objective, "max_depth": 3, "base_score": start, "nthread": 1}
    settings |= {"learning_rate": 0.3, "tree_method": "hist"}
    if task == "multi-class":
        settings |= {"num_class": 3, "multi_strategy": "multi_output_tree"}
    data = xgboost.DMatrix(features, label, feature_names=list(trees.form.features))
    expected = xgboost.train(settings, data, 4).predict(data, output_margin=True)
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(margins(model, trees, rows), expected, rtol=1e-5, atol=1e-6)


def test_the_seed_decides_what_is_grown():
    settings = {"trees_a_round": 2, "tree_subsample": 0.5}
    one, same = (bagged(Hospital, 2, seed=1, **settings)[0] for _ in range(2))
    assert one == same
    assert one != bagged(Hospital, 2, seed=2, **settings)[0]


class Watched(FedXgbBagging):
    """Remembers what Flower's aggregation was given."""

    def __init__(self):
        super().__init__()
        self.given = []

    def aggregate_train(self, server_round, replies):
        self.given += [model_bytes(reply.content["arrays"]) for reply in replies]
        return super().aggregate_train(server_round, replies)


@pytest.fixture(scope="module")
def bagging(tmp_path_factory):
    """Three hospitals' bagging: folder, result, strategy."""
    folder = tmp_path_factory.mktemp("runs") / "bagging"
    strategy = Watched()
    settings = {"trees_a_round": 2, "tree_subsample": 0.8, "num_server_rounds": 8}
    result = run(folder, strategy=strategy, pictures=3, preparation="federated", **settings)
    return folder, result, strategy


def test_bagging_is_flowers_aggregation_of_the_same_trees(bagging):
    folder, result, strategy = bagging
    first, *others = strategy.given
    assert len(strategy.given) == 24
    model = first
    for other in others:
        model = aggregate_bagging(model, other)
    found = model_bytes(result.arrays)
    trees = json.loads(model)["learner"]["gradient_booster"]["model"]["trees"]
    assert json.loads(found)["learner"]["gradient_booster"]["model"]["trees"] == trees
    assert len(trees) == 48
    assert (folder / "model.json").read_bytes() == found


def test_trees_of_all_hospitals_are_better_than_of_each_alone(bagging):
    folder = bagging[0]
    trees = as_trees(Hospital(context_of(**DECLARED)))
    rows = [row for n in range(3) for row in make_rows(300, (n, 9), "new", binary)]
    truth = [row["y"] for row in rows]
    together = roc_auc_score(truth, margins((folder / "model.json").read_bytes(), trees, rows))
    for number in range(3):

        def load_data(self, site, number=number):
            return SiteData(make_rows(60, (number, 0), "own", binary))

        own = type("Own", (Hospital,), {"load_data": load_data})
        model, _ = bagged(own, 8, trees_a_round=2, tree_subsample=0.8)
        assert together > roc_auc_score(truth, margins(model, trees, rows)) + 0.01


def test_the_server_may_measure_the_ensemble_after_each_round(tmp_path):
    sizes = []

    def evaluate(server_round, arrays):
        if server_round == 0:
            return None
        sizes.append(len(model_bytes(arrays)))
        return MetricRecord({"bytes": sizes[-1]})

    result = run(tmp_path / "run", evaluate_fn=evaluate)
    assert sizes[0] < sizes[1] == len(model_bytes(result.arrays))
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert [row for row in rows if ",server," in row] == [
        f"{number},server,all,bytes,{size:.1f}" for number, size in enumerate(sizes, start=1)
    ]


def test_the_folder_is_that_of_any_run(bagging):
    folder, _, _ = bagging
    summary = summary_of(folder)
    assert (summary["status"], summary["strategy"], summary["rounds"]) == ("finished", "Watched", 8)
    assert summary["failures"] == []
    assert set(summary["test"]["sites"]) == {"hospital-1", "hospital-2", "hospital-3"}
    assert summary["test"]["federated"]["num-examples"] == 600
    assert 0.5 < summary["test"]["federated"]["auc"] < 1
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == {
        "config.toml",
        "counts.json",
        "live.json",
        "log.txt",
        "metrics.csv",
        "model.json",
        "report.html",
        "summary.json",
    }
    booster = xgboost.Booster(model_file=folder / "model.json")
    assert booster.feature_names == ["a", "b", "c=x", "c=y", "c=z"]
    sent = json.loads((folder / "model.json").read_text())
    for tree in sent["learner"]["gradient_booster"]["model"]["trees"]:
        # Gain and cover would tell how many patients are behind a node.
        for name in ("base_weights", "loss_changes", "sum_hessian"):
            assert not any(tree[name])


def test_the_metrics_of_a_network_of_the_same_run_are_not_mixed_up():
    context = context_of(num_sites=1, **DECLARED)
    network = Hospital(context)
    network.prepared("test", False)
    trees = as_trees(Hospital(context))
    assert trees.prepared("test", False)[1].inputs["features"].shape == (200, 5)
    assert trees.data() is network.data()
    assert trees.prepared("test", False)[1] is not network.prepared("test", False)[1]


def test_hospitals_take_turns_in_a_cycle_and_cannot_change_what_others_grew(tmp_path, monkeypatch):
    def train(client, message):
        """Each hospital sends the first one's tree with another leaf."""
        content = plain_train(client, message)
        model = json.loads(model_bytes(content["arrays"]))
        trees = model["learner"]["gradient_booster"]["model"]["trees"]
        if client.site.index:
            trees[0]["split_conditions"][-1] += 0.01
            changed.append(client.site.name)
            data = np.frombuffer(json.dumps(model).encode(), np.uint8)
            content["arrays"] = ArrayRecord([data])
        else:
            grown.append(trees[0])
        return content

    monkeypatch.setattr(app, "train", train)
    changed, grown = [], []
    result = run(tmp_path / "run", strategy=FedXgbCyclic(), num_server_rounds=4)
    assert changed == ["hospital-2", "hospital-3"]
    model = json.loads(model_bytes(result.arrays))["learner"]["gradient_booster"]["model"]
    assert model["trees"][0] == grown[0]
    assert model["iteration_indptr"] == [0, 1, 2, 3, 4]
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    turns = [row.split(",")[2] for row in rows if ",train," in row and ",num-examples," in row]
    turns = [site for site in turns if site != "all"]
    assert turns == ["hospital-1", "hospital-2", "hospital-3", "hospital-1"]
    assert summary_of(tmp_path / "run")["failures"] == []


def spoil(content, index):
    """Make of a reply what a hospital of this number sends."""
    model = json.loads(model_bytes(content["arrays"]))
    learner = model["learner"]
    trees = learner["gradient_booster"]["model"]["trees"]
    tree = trees[0]
    if index == 1:
        raise RuntimeError("no room")
    if index == 2:
        content["arrays"] = ArrayRecord([np.frombuffer(b"\x80\x04pickle", np.uint8)])
        return
    if index == 3:
        learner["learner_model_param"]["num_feature"] = "9"
    if index == 4:
        tree["split_conditions"][-1] = math.nan
    if index == 5:
        trees += [tree] * 5
    if index == 6:
        tree["left_children"][0] = 0
    if index == 7:
        values = np.asarray(tree["split_conditions"])
        values[np.asarray(tree["left_children"]) < 0] = 30.0
        tree["split_conditions"] = values.tolist()
    data = np.frombuffer(json.dumps(model).encode(), np.uint8)
    content["arrays"] = ArrayRecord([data, data] if index == 8 else [data])
    if index == 9:
        content["more"] = ArrayRecord([data])
    if index == 10:
        content["arrays"] = ArrayRecord([np.zeros(4, np.float32)])


def test_no_reply_however_malformed_ends_the_run_or_reaches_the_model(tmp_path, monkeypatch):
    class Any(Hospital):
        sizes = (40, 0, 20)

    def train(client, message):
        content = plain_train(client, message)
        if client.site.index:
            spoil(content, client.site.index)
        return content

    monkeypatch.setattr(app, "train", train)

    strategy = Watched()
    settings = {"num_server_rounds": 1, "tree_max_depth": 2}
    run(tmp_path / "run", Any, sites=11, strategy=strategy, **settings)
    found = {f["site"]: f["reason"] for f in summary_of(tmp_path / "run")["failures"]}
    expected = {
        1: "RuntimeError: no room",
        2: "this is no model in XGBoost's JSON (UnicodeDecodeError)",
        3: "the trees are of 9 features instead of 5",
        4: "split_conditions of tree 0 must be finite numbers from -3e+38 to 3e+38",
        5: "the model must have at most 1 trees, got 6",
        6: "each node of tree 0 but the first must be the child of one node before it",
        7: "the numbers in leaves must be at most 0.272727 in size, got 30",
        8: "there are 2 arrays instead of one, named 0",
        9: "the reply has 2 array records instead of one",
        10: "the model is float32[4] instead of bytes",
    }
    assert found == {f"hospital-{index + 1}": reason for index, reason in expected.items()}
    assert len(strategy.given) == 1


def test_odd_hospitals(tmp_path, caplog):
    """One class only, three patients, no training rows, a budget; two patients of each label."""
    everybody = make_rows(60, 5, "p", binary)

    class Odd(Hospital):
        def load_data(self, site):
            rows = [row | {"patient": f"{site.name}-{row['patient']}"} for row in everybody]
            train = rows[:40]
            if site.index == 1:
                train = [row | {"y": 1} for row in train]
            train = {2: train[:3], 3: ()}.get(site.index, train)
            return SiteData(train, rows[40:50], rows[50:], "made up")

    ledger = tmp_path / "ledger.sqlite"
    Ledger(ledger)
    careful = {"site-name": "careful", "ledger": str(ledger)}
    careful |= {"budget-epsilon": 500.0, "budget-delta": 1e-5}
    nodes = [{}, {}, {}, {}, careful]
    settings = {"min_cell_count": 10, "report_by": "", "num_server_rounds": 2}
    with caplog.at_level(logging.WARNING, "flwr.fedmed"):
        run(tmp_path / "run", Odd, sites=5, node_configs=nodes, baselines=True, **settings)
    summary = summary_of(tmp_path / "run")
    failed = {(f["phase"], f["site"], f["reason"]) for f in summary["failures"]}
    assert {entry for entry in failed if entry[0] == "train"} == {
        ("train", "hospital-3", "declined: growing trees needs at least 10 patients"),
        (
            "train",
            "careful",
            "declined: this hospital has set a privacy budget and trains with "
            'privacy="patient" only',
        ),
    }
    tested = {"hospital-1", "hospital-2", "hospital-3", "hospital-4", "careful"}
    assert tested <= set(summary["test"]["sites"])
    assert {entry for entry in failed if entry[0] != "train"} == set()
    assert "baselines is for networks: trees are grown without it" in caplog.messages
    model = (tmp_path / "run" / "model.json").read_bytes()
    trees = as_trees(Odd(context_of(**DECLARED)))
    assert np.isfinite(margins(model, trees, everybody)).all()
    assert np.ptp(margins(model, trees, everybody)) > 0


@pytest.mark.parametrize("minimum", [1, 10])
def test_no_leaf_tells_of_fewer_patients_than_the_hospital_allows(minimum):
    """Two rows a patient."""

    def load_data(self, site):
        rows = make_rows(80, 3, "p", binary)
        return SiteData([row | {"patient": n // 2} for n, row in enumerate(rows)])

    client = type("Twice", (Hospital,), {"load_data": load_data})
    context = context_of(num_sites=1, **DECLARED | {"min-cell-count": minimum})
    trees = as_trees(client(context))
    arrays = ArrayRecord([np.frombuffer(write_trees(trees.form, []), np.uint8)])
    reply = ask(client, "train", context, arrays, trees="bagging")
    booster = xgboost.Booster()
    booster.load_model(bytearray(model_bytes(reply.content["arrays"])))
    rows = trees.data().train
    features = raw_features(trees.schema, trees.prepared_by, rows)
    data = xgboost.DMatrix(features, feature_names=list(trees.form.features))
    patients: dict = {}
    for leaf, row in zip(booster.predict(data, pred_leaf=True).ravel(), rows, strict=True):
        patients.setdefault(leaf, set()).add(row["patient"])
    fewest = min(len(those) for those in patients.values())
    assert len(patients) > 1
    assert fewest >= 10 if minimum == 10 else fewest < 10


def test_one_thread_where_hospitals_share_a_machine(tmp_path, monkeypatch):
    asked = []
    train = xgboost.train

    def watched(parameters, data, *args, **kwargs):
        asked.append((parameters["nthread"], parameters["learning_rate"]))
        return train(parameters, data, *args, **kwargs)

    monkeypatch.setattr(xgboost, "train", watched)
    run(tmp_path / "run", sites=2, num_server_rounds=1, tree_learning_rate=0.5)
    assert asked == [(1, 0.25), (1, 0.25)]


def test_without_xgboost(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xgboost", None)
    expected = (
        "round 1, train: the only site failed, so the run ends: trees are grown by XGBoost, which "
        'is not installed: pip install "fedmed-flower[xgboost]"'
    )
    with pytest.raises(RunFailedError, match=says(expected)):
        run(tmp_path / "run", sites=1, num_server_rounds=1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"resume": True, "run_dir": "somewhere"},
            "a run that grows trees cannot be resumed: start a new run, without resume",
        ),
        (
            {"privacy": "patient"},
            "trees are grown without differential privacy: federate a network with "
            f'privacy="patient"{see("privacy")}',
        ),
        (
            {"compression": "int8"},
            'compression must be "none" for trees, got "int8": it is for networks',
        ),
        (
            {"evaluate": "runs/first"},
            f"evaluate tests a network, and this app grows trees{see('evaluate')}",
        ),
        (
            {"secure": "sum"},
            'secure="sum" trains a network, and this app grows trees, for which hospitals would '
            f"have to send their own figures: leave it out{see('secure')}",
        ),
        (
            {"init_from": "runs/first"},
            "init-from needs a network, and this app grows trees: leave it out",
        ),
        (
            {"strategy": FedAvg()},
            "strategy must be FedXgbBagging or FedXgbCyclic of flwr.serverapp.strategy, got FedAvg",
        ),
        (
            {"trees_a_round": 2},
            "trees-a-round must be 1 unless tree-subsample is below 1 (they are alike), got 2",
        ),
        ({"tree_max_depth": 13}, "tree-max-depth must be from 1 to 12, got 13"),
        (
            {"tree_learning_rate": 0.0},
            "tree-learning-rate must be from 1e-06 to 1, got 0.0",
        ),
        ({"trees_a_round": 10**9}, "trees-a-round must be from 1 to 1,000, got 1000000000"),
        ({"tree_subsample": 1e-320}, "tree-subsample must be from 1e-06 to 1, got 1e-320"),
        ({"tree_lambda": math.inf}, "tree-lambda must be from 0 to 1,000,000, got inf"),
        (
            {"tree_min_child_weight": 1e300},
            "tree-min-child-weight must be from 0 to 1,000,000, got 1e+300",
        ),
        (
            {"trees_a_round": 500, "tree_subsample": 0.5, "num_server_rounds": 21},
            "num-server-rounds times trees-a-round must be at most 10,000, got 10,500"
            + see("trees-a-round"),
        ),
        (
            {"preparation": "site", "client": "bare"},
            'preparation="site" needs declared categories: the schema has none of c',
        ),
    ],
)
def test_what_grow_refuses(tmp_path, given, expected):
    if given.get("client") == "bare":
        schema = Schema("y", "binary", ("a", "b"), ("c",))
        given = given | {"client": type("Bare", (Hospital,), {"schema": schema})}
    with pytest.raises(InputError, match=says_of_setting(expected)):
        run(tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_hospital_declines_what_the_server_may_not_ask():
    context = context_of(num_sites=1, **DECLARED, privacy="patient")
    form = as_trees(Hospital(context)).form
    arrays = ArrayRecord([np.frombuffer(write_trees(form, []), np.uint8)])
    reply = ask(Hospital, "train", context, arrays, trees="bagging")
    assert "declined: trees are grown without the privacy that this run asks for" in (
        reply.error.reason
    )


@pytest.mark.parametrize(
    ("arrays", "told", "expected"),
    [
        (None, {"trees": "forest"}, "trees must be bagging or cyclic, got 'forest'"),
        (
            None,
            {"trees": "bagging", "tree-share": 2.0},
            "tree-share must be from 1e-06 to 1, got 2.0",
        ),
        (
            None,
            {"trees": "bagging", "tree-share": "all"},
            "tree-share must be from 1e-06 to 1, got 'all'",
        ),
        (
            ArrayRecord([np.frombuffer(b"{}", np.uint8)]),
            {"trees": "bagging"},
            "the server has sent no ensemble of this run: this is no model in XGBoost's JSON "
            "(KeyError)",
        ),
    ],
)
def test_a_hospital_trusts_no_message_blindly(arrays, told, expected):
    context = context_of(num_sites=1, **DECLARED)
    empty = ArrayRecord([np.frombuffer(b"", np.uint8)])
    reply = ask(Hospital, "train", context, arrays or empty, **told)
    assert expected in reply.error.reason


FORM = Form("binary", ("a", "b"), 1, 0.5, TreeSettings(tree_max_depth=2), 10.0)


def edited(*path, value, trees=(STUMP,)):
    model = json.loads(write_trees(FORM, trees))
    place = model
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(model).encode()


def test_what_is_written_is_read_again():
    written = write_trees(FORM, [STUMP, STUMP])
    read = read_trees(written, FORM, 2)
    assert [tree["split_conditions"] for tree in read] == [[0.5, -1.0, 2.0]] * 2
    assert [tree["parents"] for tree in read] == [[2**31 - 1, 0, 0]] * 2
    assert leaves(read[0]).tolist() == [-1.0, 2.0]
    assert clipped(read[0], 1.5)["split_conditions"] == [0.5, -1.0, 1.5]
    found = Ensemble(FORM, read)(torch.tensor([[0.0, 0.4], [0.0, 0.6], [0.0, math.nan]]))
    assert found.ravel().tolist() == [-2.0, 4.0, -2.0]
    assert read_trees(b"", FORM, 0) == []


LEARNER = ("learner",)
BOOSTED = ("learner", "gradient_booster", "model")
TREE = (*BOOSTED, "trees", 0)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"[" * 60_000, "this is no model in XGBoost's JSON (RecursionError)"),
        (b"null", "this is no model in XGBoost's JSON (TypeError)"),
        (b" " * 10**6, "a model of 1 trees has at most 69280 bytes, got 1000000"),
        (b'[{"left_children": 0}, {"left_children"', "the model must have at most 1 trees, got 2"),
        (
            edited("learner", "learner_model_param", "num_feature", value=math.inf),
            "this is no model in XGBoost's JSON (OverflowError)",
        ),
        (
            edited("learner", "objective", "name", value="reg:squarederror"),
            "the trees are for 'reg:squarederror' instead of 'binary:logistic'",
        ),
        (
            edited("learner", "feature_names", value=["b", "a"]),
            "the features have other names, or another order",
        ),
        (
            edited("learner", "learner_model_param", "base_score", value="[9E-1]"),
            "the trees start from 0.9 instead of 0.5",
        ),
        (
            edited(*BOOSTED, "gbtree_model_param", "num_parallel_tree", value="7"),
            "the model has '7' trees a round, not 1",
        ),
        (edited(*BOOSTED, "trees", value={}), "the trees must be a list, got dict"),
        (
            edited(*BOOSTED, "trees", value=[3]),
            "tree 0 must be an object with a list left_children",
        ),
        (
            edited(*TREE, "left_children", value=[-1] * 9),
            "tree 0 must have 1 to 7 nodes, got 9",
        ),
        (
            edited(*TREE, "right_children", value=[1, -1, -1]),
            "each node of tree 0 but the first must be the child of one node before it",
        ),
        (
            # A root that is a leaf, and beside it two nodes that are each other's children.
            write_trees(
                FORM,
                [
                    STUMP
                    | {"left_children": [-1, 2, 1, -1, -1], "right_children": [-1, 3, 4, -1, -1]}
                    | {
                        key: [0] * 5
                        for key in ("split_indices", "default_left", "split_conditions")
                    }
                ],
            ),
            "each node of tree 0 but the first must be the child of one node before it",
        ),
        (
            edited(*TREE, "right_children", value=[2.0, -1, -1]),
            "right_children of tree 0 must be 3 whole numbers",
        ),
        (
            edited(*TREE, "split_indices", value=[2, 0, 0]),
            "tree 0 must split by the features 0 to 1 only",
        ),
        (
            edited(*TREE, "split_conditions", value=[[1], [2], [3, 4]]),
            "split_conditions of tree 0 must be 3 numbers",
        ),
        (
            edited(*TREE, "split_conditions", value=[0.5, 1e39, 1]),
            "split_conditions of tree 0 must be finite numbers from -3e+38 to 3e+38",
        ),
    ],
)
def test_what_is_no_ensemble(data, expected):
    with pytest.raises(ValueError, match=says(expected)):
        read_trees(data, FORM, 1)


def test_leaves_of_several_classes_are_checked():
    form = Form("multi-class", ("a", "b"), 3, 0.5, TreeSettings(tree_max_depth=2), 10.0)
    weights = [1.0, 2.0, 3.0, -1.0, -2.0, -3.0]
    tree = STUMP | {"right_children": [2, 0, 1], "leaf_weights": weights}
    (read,) = read_trees(write_trees(form, [tree]), form, 1)
    assert leaves(read).tolist() == weights
    assert clipped(read, 2.0)["leaf_weights"] == [1.0, 2.0, 2.0, -1.0, -2.0, -2.0]
    for wrong, expected in (
        ({"right_children": [2, 0, 0]}, "each leaf of tree 0 must have numbers of its own"),
        ({"leaf_weights": weights[:5]}, "leaf_weights of tree 0 must be 6 numbers"),
    ):
        with pytest.raises(ValueError, match=says(expected)):
            read_trees(write_trees(form, [tree | wrong]), form, 1)


def test_features_are_the_columns_own_values():
    schema = Schema("y", "binary", ("a",), ("c", "d"), categories={"d": ("no", "yes")})
    prepared_by = Preparation({"a": 50.0}, {"a": 10.0}, {"c": ("p", "q", "r"), "d": ("no", "yes")})
    rows = [
        {"a": 70.5, "c": "q", "d": "yes"},
        {"a": math.nan, "c": None, "d": "no"},
        {"a": 0.0, "c": "other", "d": None},
    ]
    found = raw_features(schema, prepared_by, rows)
    nan = math.nan
    expected = [[70.5, 0, 1, 0, 1], [nan, nan, nan, nan, 0], [0, 0, 0, 0, nan]]
    np.testing.assert_array_equal(found, np.asarray(expected, np.float32))


def test_names_that_xgboost_does_not_take(tmp_path):
    schema = Schema("y", "binary", ("a [mg]",), ("c",), categories={"c": ("<1", "1", "2")})
    client = type("Odd", (Hospital,), {"schema": schema})
    found = as_trees(client(context_of(preparation="site"))).form.features
    assert found == ("a (mg)", "c=less than 1", "c=1", "c=2")
    xgboost.DMatrix(np.zeros((1, 4)), feature_names=list(found))


def test_a_tree_of_few_rows_has_no_leaf_of_fewer_patients_than_the_minimum(tmp_path):
    schema = schema_of("continuous")
    client = type(
        "Few",
        (TabularClient,),
        {"schema": schema, "sizes": (50, 0, 0), "load_data": Hospital.load_data},
    )
    own = client(context_of(num_sites=1, **DECLARED)).data().train
    targets = np.array([row["y"] for row in own])
    settings = {"tree_subsample": 0.02, "tree_lambda": 1e-9, "tree_min_child_weight": 1e-9}
    settings |= {"tree_learning_rate": 1.0, "trees_a_round": 3}
    context = context_of(num_sites=1, **DECLARED | settings)
    trees = as_trees(client(context))
    context.node_config["min-cell-count"] = 10
    reply = ask(
        client,
        "train",
        context,
        ArrayRecord([np.frombuffer(write_trees(trees.form, []), np.uint8)]),
        server_round=1,
        trees="bagging",
    )
    found = json.loads(model_bytes(reply.content["arrays"]))["learner"]["gradient_booster"]
    leaves = {
        value
        for tree in found["model"]["trees"]
        for value, left in zip(tree["base_weights"], tree["left_children"], strict=True)
        if left == -1
    }
    assert leaves
    # The mean of ten or more less where trees start: no patient's own distance from there.
    apart = np.abs(np.subtract.outer(targets - trees.form.base, 3 * np.array([*leaves])))
    assert apart.min() > 1e-4


def test_the_ensemble_of_the_best_round_is_kept(tmp_path):
    def measured(server_round, arrays):
        return MetricRecord({"auc": [0.5, 0.6, 0.9, 0.7][server_round]})

    options = {"keep_model": "best", "keep_metric": "server:auc"}
    kept = run(tmp_path / "kept", evaluate_fn=measured, num_server_rounds=3, **options)
    two = run(tmp_path / "two", num_server_rounds=2)
    assert model_bytes(kept.arrays) == model_bytes(two.arrays)
    for name in ("kept", "two"):
        assert (tmp_path / name / "model.json").read_bytes() == model_bytes(two.arrays)
    assert summary_of(tmp_path / "kept")["test"] == summary_of(tmp_path / "two")["test"]
