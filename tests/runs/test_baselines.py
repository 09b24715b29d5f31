import csv
import json

import pytest
import torch
from safetensors.torch import load_file
from tables import TinyTable, holding, predicting, run_tables
from tiny import TinyClient, bits, context_of, halves, node_of, run_tiny, says

from fedmed_flower import SiteData
from fedmed_flower.clients.pooled import indices_by_site
from fedmed_flower.errors import InputError
from fedmed_flower.metrics.plain import plain_metrics
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.server.run_folder import RunFolder


class Failing(TinyTable):
    """Fails in training alone, at one site: there is nobody else in that run."""

    def fit(self, model, prepared, seed):
        if self.site.index == 1 and self.alone:
            raise ValueError("the disk is full")
        return super().fit(model, prepared, seed)

    @property
    def alone(self):
        return "/local" in self.key_told

    def read(self, message):
        config = super().read(message)
        self.key_told = str(config["run-key"]) if "run-key" in config else ""
        return config


def test_a_site_whose_own_model_cannot_be_trained_has_none_and_the_others_do(tmp_path):
    _, summary = run_tables(tmp_path, Failing, num_server_rounds=1, baselines=True)
    local = summary["test"]["local"]
    assert local["hospital-2"] == {"all": {}, "sites": {}}
    assert local["hospital-1"]["all"]["num-examples"] == local["hospital-3"]["all"]["num-examples"]
    assert local["hospital-1"]["auc"] > 0
    failures = {(f["site"], f["phase"], f["reason"]) for f in summary["failures"]}
    assert ("hospital-2", "local-2-hospital-2 train", "ValueError: the disk is full") in failures
    assert summary["status"] == "finished"
    assert "hospital-2" in summary["test"]["pooled"]["sites"]


class Numbered(TinyTable):
    """Training sets all weights to the site's number; the AUC says whose model was tested where."""

    def fit(self, model, prepared, seed):
        found = super().fit(model, prepared, seed)
        with torch.no_grad():
            for weights in model.parameters():
                weights.fill_(self.site.index + 1)
        return found

    def measure(self, model, prepared):
        found = super().measure(model, prepared)
        weights = next(model.parameters())
        return found | {"auc": float(weights.mean()) / 10 + self.site.index / 100}


def listed_in(folder):
    """Return the figures of ``cross-sites.csv``, by the rest of their lines."""
    with (folder / "cross-sites.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["model", "trained-at", "tested-at", "metric", "value"]
    listed = {tuple(line.values())[:4]: float(line["value"]) for line in lines}
    assert len(listed) == len(lines)
    return listed


def test_each_model_is_kept_as_each_hospital_has_tested_it(tmp_path):
    _, summary = run_tables(tmp_path, Numbered, num_server_rounds=1, baselines=True)
    test = summary["test"]
    sites = ["hospital-1", "hospital-2", "hospital-3"]
    for row, trained_at in enumerate(sites):
        found = test["local"][trained_at]
        at = {site: found["sites"][site]["auc"] for site in sites}
        assert at == pytest.approx(
            {site: (row + 1) / 10 + column / 100 for column, site in enumerate(sites)}
        )
        assert found["auc"] == at[trained_at]
        # Of a hospital's metrics those by which a run is judged.
        assert {*found["sites"]["hospital-1"]} == {"auc", "accuracy", "loss"}
    listed = listed_in(tmp_path)
    for trained_at in sites:
        for tested_at in sites:
            kept = test["local"][trained_at]["sites"][tested_at]["auc"]
            assert listed["alone", trained_at, tested_at, "auc"] == kept
            assert listed["federated", "all", tested_at, "auc"] == test["sites"][tested_at]["auc"]
            pooled = test["pooled"]["sites"][tested_at]["auc"]
            assert listed["pooled", "all", tested_at, "auc"] == pooled
    # The three models are averaged by their rows, of which all have as many.
    assert listed["federated", "all", "hospital-1", "auc"] == pytest.approx(0.2)
    assert listed["alone", "hospital-2", "all", "num-examples"] == 120
    assert {key[0] for key in listed} == {"alone", "federated", "pooled"}


class Unlike(TinyClient):
    """The second hospital's images are darker, and their labels swapped."""

    def build_model(self):
        return halves()

    def load_data(self, site):
        data = super().load_data(site)
        if site.index:
            for rows in (data.train, data.val, data.test):
                for row in rows:
                    row["image"] = row["image"] // 4
                    row["label"] = 1 - row["label"]
        return data


def run_unlike(folder, client=Unlike, **config):
    """Run two hospitals with models for comparison; return the test of the summary."""
    options = {"model": halves, "num_server_rounds": 1, "baselines": True, "learning_rate": 0.3}
    run_tiny(folder, client, **options | config)
    return json.loads((folder / "summary.json").read_text())["test"]


def numbers_of(state, index):
    """Return the metrics of a network with these weights on a hospital's test rows."""
    client = Unlike(context_of(index, 2))
    model = halves()
    model.load_state_dict(state)
    metrics = plain_metrics(client.measure(model, client.prepared("test", pooled=False)[1]))
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def files_in(folder):
    return [load_file(folder / f"hospital-{number}.safetensors") for number in (1, 2)]


KEEPING = {
    "ditto": {"method": "ditto"},
    "apfl": {"method": "apfl"},
    "fedrep": {"method": "fedrep", "keep": "head.*"},
    "ditto, most of it frozen": {"method": "ditto", "trainable": "head.*"},
    "layers that are sent": {"keep": "norm"},
    "layers that are not sent": {"keep": "head.*", "keep_sent": False},
}


@pytest.mark.parametrize("options", KEEPING.values(), ids=KEEPING)
def test_a_hospitals_own_model_is_tested_at_others_as_its_file_says(tmp_path, options):
    test = run_unlike(tmp_path, **options)
    states = files_in(tmp_path / "own")
    listed = listed_in(tmp_path)
    for row, state in enumerate(states):
        trained_at = f"hospital-{row + 1}"
        for column in (0, 1):
            tested_at = f"hospital-{column + 1}"
            key = ("own", trained_at, tested_at)
            found = {line[3]: value for line, value in listed.items() if line[:3] == key}
            assert found == pytest.approx(numbers_of(state, column))
            told = test["own"][trained_at]["sites"][tested_at]
            assert told == {name: found[name] for name in ("auc", "accuracy", "loss")}
        assert test["own"][trained_at]["loss"] == listed["own", trained_at, trained_at, "loss"]
    # At each hospital both models have another loss.
    for column in ("hospital-1", "hospital-2"):
        both = [listed["own", f"hospital-{row}", column, "loss"] for row in (1, 2)]
        assert both[0] != pytest.approx(both[1], rel=1e-3)


def test_nothing_that_a_hospital_keeps_enters_the_model_of_another(tmp_path):
    run_unlike(tmp_path, keep="norm")
    first, second = files_in(tmp_path / "own")
    kept = {name: second[name] for name in second if name.startswith("stem.2.")}
    assert kept.keys() == {f"stem.2.{name}" for name in halves().stem[2].state_dict()}
    mixed = numbers_of(first | kept, 1)["loss"]
    assert listed_in(tmp_path)["own", "hospital-1", "hospital-2", "loss"] != pytest.approx(
        mixed, rel=1e-3
    )


def test_a_fine_tuned_model_is_tested_at_others_as_its_file_says(tmp_path):
    test = run_unlike(tmp_path, personal_epochs=3)
    listed = listed_in(tmp_path)
    assert {line[0] for line in listed} == {"alone", "fine-tuned", "federated", "pooled"}
    assert not {line[3] for line in listed} & {"val-global", "val-own", "personal-epochs"}
    for row, state in enumerate(files_in(tmp_path / "personal")):
        for column in (0, 1):
            loss = numbers_of(state, column)["loss"]
            place = (f"hospital-{row + 1}", f"hospital-{column + 1}")
            assert listed["fine-tuned", *place, "loss"] == pytest.approx(loss)
            assert test["personal"][place[0]]["sites"][place[1]]["loss"] == pytest.approx(loss)
        assert "personal-epochs" in test["personal"][f"hospital-{row + 1}"]


def home_alone(folder, kind):
    """Return the hospitals whose models of a kind were tested at home only."""
    places = {line[1:3] for line in listed_in(folder) if line[0] == kind}
    away = {trained_at for trained_at, tested_at in places if trained_at != tested_at}
    return {trained_at for trained_at, _ in places} - away


def test_a_model_with_merged_adapters_is_tested_at_home_and_the_log_says_why(tmp_path):
    options = {"method": "ditto", "lora": "head", "lora_rank": 1}
    test = run_unlike(tmp_path, **options)
    assert home_alone(tmp_path, "own") == {"hospital-1", "hospital-2"}
    assert "sites" not in test["own"]["hospital-1"]
    file = tmp_path / "own" / "hospital-1.safetensors"
    text = (
        f"WARNING hospital-1: its own model is tested at home only: {file} holds the network with "
        "its adapters (lora) merged into weights that do not travel"
    )
    assert text in (tmp_path / "log.txt").read_text()


def test_a_model_without_a_file_in_the_run_folder_is_tested_at_home(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    nodes = [{}, {"output-dir": str(tmp_path / "elsewhere")}]
    test = run_unlike(tmp_path / "run", node_configs=nodes, keep="norm")
    assert home_alone(tmp_path / "run", "own") == {"hospital-2"}
    assert test["own"]["hospital-1"]["sites"].keys() == {"hospital-1", "hospital-2"}
    file = tmp_path / "run" / "own" / "hospital-2.safetensors"
    text = f"hospital-2: its own model is tested at home only: {file} cannot be read: No such file"
    assert text in (tmp_path / "run" / "log.txt").read_text()


def test_models_of_real_hospitals_stay_there(tmp_path):
    nodes = [{}, {}, node_of(tmp_path, "north")]
    options = {"num_server_rounds": 1, "baselines": True, "keep": "*bias"}
    _, summary = run_tables(tmp_path / "run", node_configs=nodes, **options)
    assert home_alone(tmp_path / "run", "own") == {"hospital-1", "hospital-2", "north"}
    assert "sites" in summary["test"]["local"]["north"]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "own models stay at their sites: each is tested at home only" in log


class Refusing(Unlike):
    """At the second hospital, models of others cannot be tested, or its own."""

    refused = "/own-"

    def measure(self, model, prepared):
        if self.site.index and self.refused in self.told:
            raise ValueError("the disk is full")
        return super().measure(model, prepared)

    def read(self, message):
        config = super().read(message)
        self.told = f"{config.get('run-key', '')} {'own-model' in config}"
        return config


def test_a_hospital_that_cannot_test_anothers_model_is_named(tmp_path):
    test = run_unlike(tmp_path, Refusing, keep="norm")
    assert test["own"]["hospital-1"]["sites"].keys() == {"hospital-1"}
    assert test["own"]["hospital-2"]["sites"].keys() == {"hospital-1", "hospital-2"}
    failures = json.loads((tmp_path / "summary.json").read_text())["failures"]
    assert [(each["site"], each["phase"], each["reason"]) for each in failures] == [
        ("hospital-2", "own-1-hospital-1 test", "ValueError: the disk is full")
    ]


def test_a_file_of_an_earlier_end_of_the_run_is_not_taken_for_the_model(tmp_path):
    run_unlike(tmp_path, keep="norm")
    assert (tmp_path / "own" / "hospital-2.safetensors").exists()
    client = type("Client", (Refusing,), {"refused": " True"})
    test = run_unlike(tmp_path, client, keep="norm", resume=True, num_server_rounds=2)
    assert test["own"].keys() == {"hospital-1"}
    assert {line[1] for line in listed_in(tmp_path) if line[0] == "own"} == {"hospital-1"}


def test_in_a_private_run_a_model_costs_patients_of_others_a_test(tmp_path, caplog):
    options = {"privacy": "patient", "target_epsilon": 50.0, "delta": 1e-3, "sampling_rate": 0.5}
    options |= {"preparation": "declared", "keep": "*bias", "num_server_rounds": 1}
    _, summary = run_tables(tmp_path, predicting("binary"), 2, baselines=True, **options)
    key = RunFolder(tmp_path).read_config()["run"]["key"]
    for number, other in ((1, 2), (2, 1)):
        ledger = Ledger(tmp_path / "ledgers" / f"hospital-{number}.sqlite", read_only=True)
        charged = [
            (entry.run, entry.purpose, entry.rounds)
            for entry in ledger.entries()
            if "/own-" in entry.run
        ]
        assert charged == [(f"{key}/own-{other}-hospital-{other}", "test counts", 1)]
        own = summary["test"]["own"][f"hospital-{number}"]
        # At home it has been tested before.
        assert own["sites"][f"hospital-{number}"]["auc"] == own["auc"]
    assert "a hospital's own model at another hospital a test; only the ledgers" in caplog.text


def test_models_for_comparison_are_prepared_as_the_run_is_and_told_nothing_more(tmp_path):
    good, asked = TinyTable.client_app(), []

    class Client(TinyTable):
        @staticmethod
        def client_app():
            def handle(message, context):
                configs = list(message.content.config_records.values())
                asked.append((message.metadata.message_type, dict(configs[0]) if configs else {}))
                return good(message, context)

            return handle

    run_tables(tmp_path, Client, num_server_rounds=1, baselines=True, personal_epochs=1)
    run = RunFolder(tmp_path).read_config()["run"]
    told = [(kind, config) for kind, config in asked if kind in ("train", "evaluate")]
    assert {config["agreed"] for _, config in told} == {run["agreed"]}
    assert [kind for kind, _ in asked].count("query.contribution") == 3
    keys = {config["run-key"].partition("/")[2] for _, config in told}
    kinds = ("local", "personal")
    assert keys == {"", "pooled", *(f"{k}-{n}-hospital-{n}" for k in kinds for n in (1, 2, 3))}
    assert not any("own-model" in config for _, config in told)
    pooling = [kind for kind, config in told if config.get("pool-sites")]
    assert pooling == ["train", "evaluate"]
    # A personal model begins with the last federated one, before any comparison.
    kinds = [kind for kind, _ in asked]
    assert kinds.index("query.personal") < [c.get("run-key", "") for _, c in asked].index(
        f"{run['key']}/local-1-hospital-1"
    )


def test_comparisons_change_nothing_of_the_run(tmp_path):
    few = {"num_sites": 2, "num_server_rounds": 1}
    more, _ = run_tables(tmp_path / "a", **few, baselines=True, personal_epochs=1)
    less, _ = run_tables(tmp_path / "b", **few)
    assert bits(more.arrays) == bits(less.arrays)


def pooled_of(splits, **members):
    client = holding(splits, **members)(context_of(0, 3))
    return client.pooled_data(), client


def test_pooled_rows_are_of_one_patient_each_whatever_the_hospitals_call_them():
    one = SiteData(train=[{**row, "patient": 7} for row in TinyTable.load_data(*_first()).train])
    data, client = pooled_of({0: one, 1: one})
    assert {row["patient"] for row in data.train[:120]} == {(0, 7), (1, 7)}
    places = indices_by_site(data.train)
    assert [len(places[number]) for number in (0, 1, 2)] == [60, 60, 60]
    assert [data.train[place]["patient"][0] for place in places[2]] == [2] * 60
    # The client stands for its own site as before.
    assert client.site.name == "hospital-1"
    assert len(client.data().train) == 60


def _first():
    client = TinyTable(context_of(0, 3))
    return client, client.site


def test_a_site_whose_rows_cannot_be_loaded_is_left_out_of_the_pool_by_name(caplog):
    data, _ = pooled_of({1: OSError("no disk"), 2: SiteData(train=[{"patient": 1}])})
    assert len(data.train) == 60
    assert caplog.messages[0] == "the pooled data lack hospital-2: no disk"
    assert caplog.messages[1].startswith("the pooled data lack hospital-3: row 0 of the")
    with pytest.raises(InputError, match=says("no site has rows to pool")):
        pooled_of(dict.fromkeys(range(3), OSError()))
