"""Evaluation by secure sums: the same figures over all rows as in the plain run, and no others."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from eyes import Cups, Findings, Grades
from flwr.app import MetricRecord
from flwr.serverapp import ServerApp
from html_pages import Page
from tables import SCHEMA, TinySurvival, TinyTable, predicting
from tiny import CONFIG, TinyClient, connect_late, make_rows, nodes_of
from torch import nn

from fedmed_flower import SegmentationClient, SiteData, federate, run_local
from fedmed_flower.errors import InputError
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.reports.card import write_card
from fedmed_flower.runs.verdict import RunFailedError
from fedmed_flower.secure.identity import Identity, key_text
from fedmed_flower.strategies import FedAvg
from fedmed_flower.strategies import secure as rounds

# Of scores on the grid of all hospitals.
TOLERANCES = {"auc": 1e-3, "average-precision": 2e-3}
# Spreads are differences of two sums.
EXACT = 1e-9
DECLARED = {"preparation": "declared"}
# Scores that are apart: those of single grades and those above are counted on the first grid.
LEARNING = {"optimizer": "adam", "learning-rate": 0.02, "local-epochs": 20}


class Three(TinyClient):
    num_classes = 3

    def load_data(self, site):
        train, val, test = (
            make_rows(count, (site.index, split), f"{site.name}-{split}", 3)
            for split, count in enumerate((12, 6, 20 + site.index))
        )
        return SiteData(train=train, val=val, test=test, source="tiny images")


def few(client):
    """Return a client for generated eyes with few of them."""
    return type(client.__name__, (client,), {"train": 4, "test": 16})


class Declared(TinyTable):
    schema = replace(SCHEMA, categories={"sex": ("f", "m"), "ward": ("a", "b", "c")})


class Masks(SegmentationClient):
    classes = ("low", "high")
    image_shape = (1, 8, 8)

    def build_model(self):
        return nn.Conv2d(1, 3, 1)

    def load_data(self, site):
        def rows(split, count):
            rng = np.random.default_rng((site.index, split))
            masks = [rng.integers(0, 3, (8, 8)).astype(np.uint8) for _ in range(count)]
            return [
                {
                    "image": (mask * 80.0 + rng.normal(0, 30, mask.shape)).astype(np.float32),
                    "label": mask,
                    "patient": f"{site.name}-{split}-{number}",
                }
                for number, mask in enumerate(masks)
            ]

        return SiteData(train=rows(0, 4), val=rows(1, 2), test=rows(2, 3 + site.index))


def run(folder, client, num_sites=4, strategy=None, **config):
    """Run an experiment; return its summary."""
    server = ServerApp()

    @server.main()
    def main(grid, context):
        federate(strategy or FedAvg(), grid, context, client(context))

    settings = CONFIG | {"num-server-rounds": 1, "run-dir": str(folder)}
    settings |= {key.replace("_", "-"): value for key, value in config.items()}
    run_local(server, client.client_app(), num_sites, run_config=settings)
    return json.loads((folder / "summary.json").read_text())


def differences(folder, client, **config):
    """Return the figures of one model by plain replies, and those by a secure sum that differ."""
    run(folder / "model", client, **config)
    plain, secure = (
        run(folder / kind, client, evaluate=str(folder / "model"), secure=kind, **config)
        for kind in ("none", "sum")
    )
    first = plain["test"]["federated"]
    second = secure["test"]["federated"]
    assert secure["test"]["sites"] == {}
    assert len(plain["test"]["sites"]) == 4
    return first, {
        name: (first.get(name), second.get(name))
        for name in first.keys() | second.keys()
        if second.get(name)
        != pytest.approx(
            first.get(name), rel=EXACT, abs=TOLERANCES.get(name.partition("@")[0], EXACT)
        )
    }


@pytest.mark.parametrize(
    ("client", "config", "expected"),
    [
        (TinyClient, {}, {"loss", "accuracy", "sensitivity", "auc"}),
        (Three, {}, {"loss", "accuracy", "balanced-accuracy", "auc"}),
        (Masks, {}, {"dice", "dice-low", "hd95-high"}),
        (few(Findings), {}, {"auc", "auc@finding=exudates", "brier@finding=large cup", "loss"}),
        (few(Cups), {}, {"r2", "mae", "rmse"}),
        (few(Grades), LEARNING, {"quadratic-kappa", "mae", "auc", "auc@grade=severe or above"}),
        (
            Declared,
            DECLARED | {"report-by": "sex,age-band"},
            {"auc", "average-precision", "brier", "calibration-error", "auc@sex=f", "loss"},
        ),
        (predicting("multi-class"), DECLARED, {"auc", "brier", "calibration-error"}),
        (predicting("continuous"), DECLARED, {"r2", "mae", "rmse"}),
        (predicting("cost"), DECLARED, {"r2", "mae", "rmse"}),
        (predicting("count"), DECLARED, {"d2", "mae", "deviance"}),
        (predicting("stays"), DECLARED, {"d2", "mae", "deviance"}),
        (
            TinySurvival,
            DECLARED | {"survival-horizon": 365.0},
            {"c-index", "integrated-brier", "loss"},
        ),
    ],
)
def test_figures_of_all_rows_are_those_of_the_plain_run(tmp_path, client, config, expected):
    plain, different = differences(tmp_path, client, **config)
    # What is no sum, the lowest Dice of a patient, does not travel.
    different.pop("dice-worst", None)
    assert not different
    assert expected <= plain.keys()


def failing(split, times=99, site=3):
    """Return a client that fails at one site when a split is measured, so many times."""
    left = [times]

    class Failing(TinyClient):
        def measure(self, model, prepared):
            if self.site.index == site and self.split == split and left[0]:
                left[0] -= 1
                raise RuntimeError("no measure")
            return super().measure(model, prepared)

    return Failing


def rows_of(folder):
    lines = (folder / "metrics.csv").read_text().splitlines()[1:]
    return [tuple(line.split(",")) for line in lines]


def test_a_run_ends_with_a_report_that_names_the_hospitals_of_each_sum(tmp_path):
    summary = run(tmp_path / "secure", TinyClient, secure="sum", num_server_rounds=2)
    names = [f"hospital-{number}" for number in (1, 2, 3, 4)]
    purposes = {(round, purpose) for round, purpose, _ in summary["secure"]["sums"]}
    assert purposes == {
        (0, "count"),
        *((round, kind) for round in (1, 2) for kind in ("train", "evaluate/val")),
        (2, "evaluate/test"),
    }
    assert all(members == names for _, _, members in summary["secure"]["sums"])
    assert summary["trained"] == dict.fromkeys(names, 2)
    assert summary["status"] == "finished"
    # No figure of a single hospital, nor of the node that stands for all.
    assert {site for _, _, site, _, _ in rows_of(tmp_path / "secure")} == {"all"}
    page = Page((tmp_path / "secure" / "report.html").read_text())
    assert "sums over 4 hospitals and no single hospital’s figures" in page.text
    table = page.table(f"{len(summary['secure']['sums'])} sums, by the hospitals that each")
    assert table["change of the model"] == ["1 to 2", "4", ", ".join(names)]
    assert "ROC curve" in page.text
    for absent in ("Worst hospital", "sum of 4 hospitals", "Was it worth it?"):
        assert absent not in page.text
    card = write_card(tmp_path / "secure").read_text()
    assert "Not known: the test was a secure sum over all hospitals." in card
    assert "lacks hospitals" not in card
    counts = json.loads((tmp_path / "secure" / "counts.json").read_text())
    assert counts["sites"].keys() == {"all"}


def test_models_and_figures_of_all_rounds_are_those_of_the_plain_run(tmp_path):
    settings = {"num_server_rounds": 2, "secure_exponent": 2}
    for kind in ("none", "sum"):
        run(tmp_path / kind, TinyClient, secure=kind, **settings)
    plain, secure = (
        {row[:4]: float(row[4]) for row in rows_of(tmp_path / kind) if row[2] == "all"}
        for kind in ("none", "sum")
    )
    # How long training took, a mean over hospitals, is not told.
    assert {key[3] for key in plain.keys() ^ secure.keys()} == {"seconds"}
    for key, value in secure.items():
        assert plain[key] == pytest.approx(value, abs=TOLERANCES.get(key[3], 1e-6)), key


def test_a_round_whose_evaluation_loses_a_hospital_is_left_out_and_the_run_goes_on(tmp_path):
    summary = run(tmp_path, failing("val", 1), 5, secure="sum", num_server_rounds=2)
    assert summary["status"] == "finished"
    assert [(one["round"], one["phase"], one["site"]) for one in summary["failures"]] == [
        (1, "val", "hospital-4"),
        (1, "val", "all"),
    ]
    assert summary["failures"][1]["reason"] == (
        "the secure sum is left out: hospital-4 could not be added, and figures of patients are "
        "summed over all 5 hospitals or not at all"
    )
    assert {row[0] for row in rows_of(tmp_path) if row[1] == "val"} == {"2"}


def test_a_test_that_loses_a_hospital_is_no_result_until_it_is_resumed(tmp_path):
    client = failing("test", 1)
    with pytest.raises(RunFailedError) as failure:
        run(tmp_path, client, secure="sum")
    assert str(failure.value) == (
        "the model has no test figures, since a secure sum is of all hospitals or of none: "
        "hospital-4: RuntimeError: no measure"
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert f"go on with --resume {tmp_path}" in summary["message"]
    summary = run(tmp_path, client, secure="sum", resume=True)
    assert summary["status"] == "finished"
    assert summary["test"]["federated"]["num-examples"] == 32
    # The sums before the interruption are known too.
    sums = dict.fromkeys(purpose for _, purpose, _ in summary["secure"]["sums"])
    assert [*sums] == ["count", "train", "evaluate/val", "evaluate/test"]


def node_configs(count, index, **given):
    """Return node configs of simulated sites of which one has settings of its own."""
    configs = [{"partition-id": number, "num-partitions": count} for number in range(count)]
    configs[index] |= {key.replace("_", "-"): value for key, value in given.items()}
    return configs


def test_a_hospital_with_too_few_patients_adds_zeros(tmp_path):
    summary = run_nodes(tmp_path, node_configs(5, 1, min_evaluated_patients=7))
    # Six validation rows a hospital, and eight test rows.
    rows = {(row[1], row[3]): row[4] for row in rows_of(tmp_path)}
    assert float(rows["val", "num-examples"]) == 4 * 6
    assert summary["test"]["federated"]["num-examples"] == 5 * 8


def test_a_sum_of_too_few_hospitals_with_figures_is_not_used(tmp_path):
    with pytest.raises(RunFailedError, match="3 of 4 hospitals have enough patients, and 4 must"):
        run_nodes(tmp_path, node_configs(4, 1, min_evaluated_patients=9))


def figures_of(folder):
    """Return the number of every evaluation of each site, by phase, site and metric."""
    listed = rows_of(folder)
    return {tuple(row[1:4]): float(row[4]) for row in listed if row[1] in ("val", "test")}


def test_a_hospital_that_tells_its_own_figures_is_in_the_sum_and_in_the_report(tmp_path):
    teller = node_configs(5, 1, tell_own=True)
    run_nodes(tmp_path / "told", teller)
    run_nodes(tmp_path / "plain", teller, secure="none")
    run_nodes(tmp_path / "hidden", node_configs(5, 1))
    told, plain, hidden = (figures_of(tmp_path / name) for name in ("told", "plain", "hidden"))
    assert {site for _, site, _ in hidden} == {"all"}
    assert {site for _, site, _ in told} == {"all", "hospital-2"}
    shared = {key: value for key, value in told.items() if key[1] == "all"}
    assert shared == pytest.approx({key: hidden[key] for key in shared}, abs=1e-6)
    own = {key: value for key, value in told.items() if key[1] != "all"}
    # The models of both runs differ by the rounding of the sums.
    assert own == pytest.approx({key: plain[key] for key in own}, abs=1e-5)
    assert own.keys() == {key for key in plain if key[1] == "hospital-2"}
    summary = json.loads((tmp_path / "told" / "summary.json").read_text())
    assert summary["test"]["sites"] == {}
    assert [*summary["secure"]["told"]] == ["hospital-2"]
    tables = Page((tmp_path / "told" / "report.html").read_text()).tables
    (listed,) = (table for caption, table in tables.items() if caption.startswith("Own figures"))
    assert [row[0] for row in listed] == ["Hospital", "hospital-2"]
    # Of one hospital there is no mean and no worst.
    assert not any("Worst hospital" in row for table in tables.values() for row in table)


def test_a_hospital_answers_in_sums_alone_where_it_says_so_although_it_tells_others(tmp_path):
    run_nodes(tmp_path, node_configs(5, 1, tell_own=True, secure_only="evaluate"))
    assert {site for _, site, _ in figures_of(tmp_path)} == {"all"}


def test_own_figures_of_a_hospital_that_hides_are_not_taken(tmp_path):
    def add(message, context, call):
        reply = call(message, context)
        if message.metadata.message_type == "evaluate" and "masked" in reply.content:
            reply.content["metrics"] = MetricRecord({"num-examples": 3, "auc": 1.0})
        return reply

    run_nodes(tmp_path, node_configs(5, 1), mods=[add])
    assert {site for _, site, _ in figures_of(tmp_path)} == {"all"}


def test_own_figures_that_cannot_be_used_are_noted(tmp_path):
    def spoil(message, context, call):
        reply = call(message, context)
        if "metrics" in reply.content and "masked" in reply.content:
            reply.content["metrics"] = MetricRecord({"num-examples": -3, "auc": 1.0})
        return reply

    summary = run_nodes(tmp_path, node_configs(5, 1, tell_own=True), mods=[spoil])
    assert {site for _, site, _ in figures_of(tmp_path)} == {"all"}
    assert any("its own figures cannot be used" in str(note) for note in summary["notes"])


def test_coarse_figures_are_declined_with_the_way_out(tmp_path):
    with pytest.raises(RunFailedError, match="set coarse-figures=false in the node config"):
        run_nodes(tmp_path, node_configs(4, 2, coarse_figures=True))


def run_nodes(folder, configs, client=TinyClient, secure="sum", mods=()):
    server = ServerApp()

    @server.main()
    def main(grid, context):
        federate(FedAvg(), grid, context, client(context))

    settings = CONFIG | {"num-server-rounds": 1, "run-dir": str(folder), "secure": secure}
    app = client.client_app(mods=list(mods))
    run_local(server, app, len(configs), run_config=settings, node_configs=configs)
    return json.loads((folder / "summary.json").read_text())


def test_hospitals_that_would_sum_other_figures_are_named(tmp_path):
    class Odd(TinyClient):
        def measure(self, model, prepared):
            more = {"f1": 0.5} if self.site.index == 2 else {}
            return super().measure(model, prepared) | more

    with pytest.raises(RunFailedError) as failure:
        run(tmp_path, Odd, secure="sum")
    assert str(failure.value).endswith(
        "hospital-3 would sum other figures than the rest: all must run the same app with the same "
        "declared columns, classes and settings"
    )


def test_figures_with_noise_are_summed_too(tmp_path):
    run(tmp_path / "model", Declared, **DECLARED)
    private = {"privacy": "patient", "target-epsilon": 50.0, "secure": "sum"}
    place = str(tmp_path / "model")
    summary = run(tmp_path / "test", Declared, evaluate=place, **DECLARED, **private)
    tested = summary["test"]["federated"]
    assert tested["num-examples"] == pytest.approx(160, abs=40)
    assert {"auc", "accuracy"} <= tested.keys()
    assert "loss" not in tested
    text = (tmp_path / "test" / "report.html").read_text()
    assert "carry noise" in text


def test_a_client_without_rows_of_no_patient_is_refused_at_the_start(tmp_path):
    class Bare(TinyClient):
        image_shape = ()

    with pytest.raises(InputError, match='secure="sum" needs the names of all figures before a'):
        run(tmp_path, Bare, secure="sum")
    assert not tmp_path.joinpath("summary.json").exists()


def test_groups_whose_values_nobody_declares_are_refused_at_the_start(tmp_path):
    class Wards(Declared):
        schema = replace(Declared.schema, categorical=("sex",), categories={"sex": ("f", "m")})

    with pytest.raises(InputError, match="report-by names 'ward', whose values the schema does"):
        run(tmp_path, Wards, secure="sum", report_by="ward", **DECLARED)


def test_evaluation_of_some_hospitals_alone_is_refused(tmp_path):
    with pytest.raises(InputError, match="excludes fraction_evaluate: figures of patients are"):
        run(tmp_path, TinyClient, strategy=FedAvg(fraction_evaluate=0.5), secure="sum")


def test_a_run_ends_in_its_first_round_if_all_hospitals_fail_alike(tmp_path):
    class Broken(TinyClient):
        def measure(self, model, prepared):
            if self.split:
                raise RuntimeError("no measure")
            return super().measure(model, prepared)

    with pytest.raises(RunFailedError, match="round 1, val: all 4 sites failed alike"):
        run(tmp_path, Broken, secure="sum", num_server_rounds=3)


def real_hospitals(folder, names, **given):
    """Return node configs of real hospitals with keys, and the files that these name."""
    nodes = nodes_of(folder, *names, **given)
    keys = {}
    for node in nodes:
        node["secure-key"] = str(folder / f"{node['site-name']}.key")
        identity = Identity.create(Path(node["secure-key"]), node["site-name"])
        keys[identity.name] = key_text(identity.public)
        node["secure-peers"] = str(folder / "peers.toml")
    peers = {"study": {"name": "lungs", "members": keys}}
    (folder / "peers.toml").write_text(tomli_w.dumps(peers))
    return nodes


def test_minimum_and_book_of_real_hospitals_stay_in_force_before_masking(tmp_path):
    class Many(TinyClient):
        def load_data(self, site):
            # Of the last hospital too few patients are evaluated.
            count = 9 if site.name == "west" else 12
            train, val, test = (
                make_rows(rows, (len(site.name), split), f"{site.name}-{split}")
                for split, rows in enumerate((20, count, count + 1))
            )
            return SiteData(train=train, val=val, test=test, source="tiny images")

    names = ("centre", "east", "north", "south", "west")
    nodes = real_hospitals(tmp_path / "nodes", names)
    summary = run_nodes(tmp_path / "run", nodes, Many)
    assert summary["status"] == "finished"
    rows = {(row[1], row[3]): float(row[4]) for row in rows_of(tmp_path / "run")}
    assert rows["val", "num-examples"] == 4 * 12
    assert summary["test"]["federated"]["num-examples"] == 4 * 13 + 10
    assert {tuple(sites) for _, _, sites in summary["secure"]["sums"]} == {names}
    # Each hospital's ledger counts who was measured without noise.
    measured = {}
    for node in nodes:
        (path,) = Path(node["data-dir"]).rglob("*.sqlite")
        plain = Ledger(path).plain()
        measured[node["site-name"]] = {(entry.purpose, entry.patients) for entry in plain}
    enough = {("val", 12), ("test", 13)}
    assert measured == dict.fromkeys(names[:4], enough) | {"west": {("test", 10)}}


@pytest.mark.parametrize(
    ("grids", "said"),
    [
        (
            [(0.0, -1.0)],
            "declined: the secure sum counts scores on grids that are none",
        ),
        ([(0.0, 1.0)] * 2, "there must be one grid for each of 1 scores: 2"),
    ],
)
def test_hospitals_refuse_grids_that_are_none(tmp_path, monkeypatch, grids, said):
    monkeypatch.setattr(rounds, "finer_grids", lambda figures, before: grids)
    with pytest.raises(RunFailedError):
        run(tmp_path, TinyClient, secure="sum")
    failures = json.loads((tmp_path / "summary.json").read_text())["failures"]
    assert failures[0] == {"round": 1, "phase": "val", "site": "hospital-1", "reason": said}


def test_a_hospital_that_comes_after_the_first_sum_is_not_in_later_ones(tmp_path, monkeypatch):
    connect_late(monkeypatch, 1006)
    summary = run(tmp_path, TinyClient, 6, secure="sum", num_server_rounds=2)
    first = [f"hospital-{number}" for number in range(1, 6)]
    for _, purpose, members in summary["secure"]["sums"]:
        assert purpose == "train" or members == first
    assert summary["test"]["federated"]["num-examples"] == 5 * 8
    notes = {(note["round"], note["phase"]): note["text"] for note in summary["notes"]}
    assert (
        notes[2, "val"]
        == notes[2, "test"]
        == ("the sum is without hospital-6: the first sum of figures was too")
    )
