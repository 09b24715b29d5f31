"""Tables of methods always say what each hospital reaches alone."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("beside_alone", BENCHMARKS / "beside_alone.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield lambda *given: [*module.rows(*given)]
    sys.modules.pop("documented", None)


def at(north, south, key="auc"):
    return {"north": {key: north}, "south": {key: south}}


def test_rows_of_methods_end_with_the_hospitals_alone(rows):
    fedavg = [
        {"sites": at(0.8, 0.6), "local": at(0.9, 0.7), "pooled": {"auc": 0.9, "sites": at(1, 0.8)}},
        {"sites": at(0.9, 0.7), "local": at(0.7, 0.5), "pooled": {"auc": 0.9, "sites": at(1, 0.9)}},
    ]
    ditto = [{"sites": at(0.8, 0.6), "own": at(0.85, 0.75)}]
    assert rows({"FedAvg": fedavg, "Ditto": ditto}, "auc") == [
        ("FedAvg", "federated", ".750", ".650", ".700 .800"),
        ("Ditto", "federated", ".700", ".600", ".700"),
        ("Ditto", "own", ".800", ".750", ".800"),
        ("none", "all data pooled", ".925", ".850", ".900 .950"),
        ("none", "each hospital alone", ".700", ".600", ".800 .600"),
    ]


def test_of_a_loss_the_largest_is_the_worst(rows):
    test = {"sites": at(0.8, 0.6, "loss"), "local": at(0.9, 0.7, "loss")}
    assert rows({"FedAvg": [test]}, "loss", 2) == [
        ("FedAvg", "federated", ".70", ".80", ".70"),
        ("none", "each hospital alone", ".80", ".90", ".80"),
    ]


def test_without_models_trained_alone_there_is_no_table(rows):
    with pytest.raises(SystemExit, match="was run with baselines=true"):
        rows({"FedAvg": [{"sites": at(0.8, 0.6)}]}, "auc")
    lacking = {"sites": at(0.8, 0.6), "local": {"north": {"auc": 0.9}, "south": {"all": {}}}}
    with pytest.raises(SystemExit, match="none each hospital alone: no auc of south"):
        rows({"FedAvg": [lacking]}, "auc")
