import csv

import pytest
import torch
from tables import TinyTable, holding, run_tables
from tiny import bits, context_of, says

from fedmed_flower import SiteData
from fedmed_flower.clients.pooled import indices_by_site
from fedmed_flower.errors import InputError
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
    with (tmp_path / "cross-sites.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == ["model", "trained-at", "tested-at", "metric", "value"]
    listed = {tuple(line.values())[:4]: float(line["value"]) for line in lines}
    assert len(listed) == len(lines)
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
    assert keys == {"", "pooled", *(f"local-{n}-hospital-{n}" for n in (1, 2, 3))}
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
