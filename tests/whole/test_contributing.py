"""The recipes of CONTRIBUTING do what they say."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from builders import arrays, reply
from flwr.serverapp import ServerApp
from tables import SCHEMA, patients
from tiny import CONFIG, says, says_of_setting

import fedmed_flower
from fedmed_flower import InputError, SiteData, federate, run_local
from fedmed_flower.strategies import FedAvg

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()


def code_under(heading):
    """Run the code under a heading; return the names that it defines."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {"__name__": "recipe"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    return names


def hospital(base):
    """Return a client of this class with rows."""

    def load_data(self, site):
        parts = [patients(n, (site.index, n), f"{site.name}-{n}") for n in (40, 20, 30)]
        return SiteData(*parts, source="made up", generated=True)

    return type("Hospital", (base,), {"schema": SCHEMA, "load_data": load_data})


def summary_of(client, folder, **config):
    server = ServerApp()

    @server.main()
    def main(grid, context):
        federate(FedAvg(), grid, context, client(context))

    settings = CONFIG | {"run-dir": str(folder), "num-server-rounds": 2} | config
    run_local(server, client.client_app(), 2, run_config=settings)
    return json.loads((folder / "summary.json").read_text())


def test_a_rule():
    strategy = code_under("Add a rule")["ClippedMean"]()
    strategy.run.sent_arrays = arrays(w=[1.0, 1.0])
    # Lengths 5, 5 and 50: the last is cut to 5.
    sent = {"a": [4.0, 5.0], "b": [1.0, 6.0], "c": [31.0, -39.0], "d": [np.nan, 0.0]}
    replies = [reply(n, {"w": w}, site) for n, (site, w) in enumerate(sent.items())]
    got, _ = strategy.aggregate_train(1, replies)
    assert got["w"].numpy() == pytest.approx([3.0, 1 + 5 / 3])
    assert [failure.site for failure in strategy.history.failures] == ["d"]


def test_a_client_for_another_kind_of_row(tmp_path):
    client = code_under("Add a client")["BeatClient"]
    summary = summary_of(client, tmp_path / "run", **{"local-epochs": 20, "optimizer": "adam"})
    assert summary["status"] == "finished"
    assert summary["test"]["federated"]["accuracy"] > 0.7


def test_a_metric(tmp_path):
    client = hospital(code_under("Add a metric")["WithPrevalence"])
    summary = summary_of(client, tmp_path / "run")
    of_sites = [found["prevalence"] for found in summary["test"]["sites"].values()]
    assert len(of_sites) == 2
    assert min(of_sites) <= summary["test"]["federated"]["prevalence"] <= max(of_sites)


def test_a_question_to_all_sites():
    names = code_under("Add a question to all sites")
    client, found = hospital(names["AskedForAges"]), []
    server = ServerApp()

    @server.main()
    def main(grid, context):
        found.append(names["ages_of"](grid))

    nodes = [{}, {}, {"private-metrics": True}]
    run_local(server, client.client_app(), 3, run_config=CONFIG, node_configs=nodes)
    ages, reasons = found[0]
    assert sorted(ages) == ["hospital-1", "hospital-2"]
    assert all(45 < age < 65 for age in ages.values())
    noise = "declined: this run, or this hospital, protects patients by noise"
    assert reasons == {"hospital-3": noise}


def test_a_reader(tmp_path):
    read_lines = code_under("Add a reader")["read_lines"]
    path = tmp_path / "rows.jsonl"
    path.write_text('{"patient": 1, "age": 50}\n{"patient": 2, "age": 61}\n')
    assert read_lines(path) == [{"patient": 1, "age": 50}, {"patient": 2, "age": 61}]
    path.write_text('{"patient": 1}\n{"age": 61}\n')
    with pytest.raises(InputError, match=says(f"{path}, line 2: must be an object with a patient")):
        read_lines(path)
    with pytest.raises(InputError, match=says(f"{path} has 27 bytes, more than 10")):
        read_lines(path, most=10)


def test_a_setting(tmp_path):
    client = hospital(code_under("Add a setting")["Warming"])
    seen = []

    class Seeing(client):
        def fit(self, model, prepared, seed):
            seen.append(self.warmup.warmup_rounds)
            return super().fit(model, prepared, seed)

    summary_of(Seeing, tmp_path / "run", **{"warmup-rounds": 3})
    assert seen == [3] * 4
    with pytest.raises(
        InputError,
        match=says_of_setting("warmup-rounds must be from 0 to 100, got 101", ["warmup-rounds"]),
    ):
        summary_of(Seeing, tmp_path / "other", **{"warmup-rounds": 101})


def test_the_table_of_rooms_names_each_file():
    package = Path(fedmed_flower.__file__).parent
    for room in sorted(path.parent for path in package.glob("*/__init__.py")):
        (row,) = re.findall(rf"^\| `{room.name}` \| (.*) \|$", TEXT, re.MULTILINE)
        readme = room / "README.md"
        named = set(re.findall(r"`(\w+)`", row + (readme.read_text() if readme.exists() else "")))
        files = {path.stem for path in room.glob("*.py")} - {"__init__"}
        # Of the settings each file is a group.
        assert room.name == "settings" or files <= named, (room.name, files - named)
