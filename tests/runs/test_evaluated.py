"""A finished model is tested at all sites, and nothing is trained."""

import json
import shutil

import pytest
from flwr.app import MetricRecord
from tables import TinyTable, changed, holding, predicting, run_tables
from tiny import TinyClient, bits, fixed, halves, make_rows, nodes_of, run_tiny, says

from fedmed_flower import InputError, SiteData
from fedmed_flower.prediction import Predictor
from fedmed_flower.reports.card import card
from fedmed_flower.runs.verdict import RunFailedError
from fedmed_flower.server import Listener
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.settings.plan import Plan
from fedmed_flower.strategies import FedAvg, Krum


class NeverTrains(TinyClient):
    def fit(self, model, prepared, seed):
        raise AssertionError("a model was trained")


class NeverTrainsTable(TinyTable):
    def fit(self, model, prepared, seed):
        raise AssertionError("a model was trained")


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def folders(path):
    """Return a folder with one for each of three hospitals, whose names are those of simulated."""
    for number in (1, 2, 3):
        (path / "data" / f"hospital-{number}").mkdir(parents=True)
    return str(path / "data")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    run_tiny(folder, num_server_rounds=2, pictures=1)
    return folder


@pytest.mark.parametrize("is_folder", [True, False])
def test_the_figures_are_those_of_the_run_to_the_last_digit(first, is_folder, tmp_path):
    place = first if is_folder else first / "model.safetensors"
    result = run_tiny(tmp_path / "test", NeverTrains, evaluate=str(place), pictures=1)
    before, now = summary_of(first), summary_of(tmp_path / "test")
    assert now["test"] == before["test"]
    counts = [(folder / "counts.json").read_bytes() for folder in (first, tmp_path / "test")]
    assert counts[0] == counts[1]
    assert [p["title"] for p in now["pictures"]] == [p["title"] for p in before["pictures"]]
    assert (now["status"], now["rounds"], now["rounds-planned"]) == ("finished", 0, 0)
    assert (now["trained"], now["started-from"], now["kept"]) == ({}, None, None)
    tables = RunFolder(tmp_path / "test").read_config()
    assert now["evaluated"] == {
        "path": str(first / "model.safetensors"),
        "sha256": tables["run"]["weights"],
    }
    assert bits(result.arrays) == bits(RunFolder(first).load().arrays)
    rows = (tmp_path / "test" / "metrics.csv").read_text().splitlines()[1:]
    assert {tuple(row.split(",")[:2]) for row in rows} == {("0", "test")}
    names = {path.name for path in (tmp_path / "test").iterdir()}
    assert not names & {"checkpoint.zip", "model.safetensors", "predictor.zip"}


def test_all_say_that_nothing_was_trained(first, tmp_path):
    run_tiny(tmp_path, evaluate=str(first))
    about = summary_of(tmp_path)["evaluated"]
    said = (
        f"Nothing was trained: these are tests of the weights in {about['path']} "
        f"(SHA-256 {about['sha256']})"
    )
    page = (tmp_path / "report.html").read_text()
    assert page.count(said) == 1
    assert "Nothing was trained in this run: a finished model was tested." in page
    assert "trained one model together" not in page
    assert "Nothing was trained" in card(tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert f"nothing is trained: the model in {about['path']} is tested" in log
    with pytest.raises(InputError, match=r"nothing was trained here: predict by .*model.safe"):
        Predictor.load(tmp_path)
    assert json.loads((tmp_path / "live.json").read_text())["status"] == "finished"


def test_rows_are_prepared_as_the_hospitals_of_the_run_agreed(tmp_path):
    _, before = run_tables(tmp_path / "first")
    asked = []

    class Asked(NeverTrainsTable):
        def contribution(self, *args, **kwargs):
            asked.append(self.site.name)
            return super().contribution(*args, **kwargs)

    _, now = run_tables(tmp_path / "test", Asked, evaluate=str(tmp_path / "first"))
    assert now["test"] == before["test"]
    assert asked == []
    agreed = [
        RunFolder(tmp_path / name).read_config()["run"]["agreed"] for name in ("first", "test")
    ]
    assert agreed[0] == agreed[1] != ""
    # Without the folder nobody knows how.
    weights = str(tmp_path / "first" / "model.safetensors")
    with pytest.raises(
        InputError, match=r"^evaluate must be the folder of the run, and not a file"
    ):
        run_tables(tmp_path / "other", evaluate=weights)
    assert not (tmp_path / "other").exists()


def test_a_model_is_tested_where_nobody_trains(first, tmp_path):
    apart = fixed(SiteData([], [], make_rows(9, 5)), base=NeverTrains)
    # Another number of hospitals may have other data alone.
    run_tiny(
        tmp_path / "test", apart, 3, evaluate=str(first), data=folders(tmp_path), strategy=Krum()
    )
    summary = summary_of(tmp_path / "test")
    assert summary["test"]["federated"]["num-examples"] == 27
    assert summary["status"] == "finished"


@pytest.mark.parametrize(
    ("sites", "config", "text"),
    [
        (3, {}, "the number of sites was 2 in {0} and is 3 now, {1}: give 2, or other data"),
        (2, {"seed": 4}, "the seed was 0 in {0} and is 4 now, {1}: give 0, or other data"),
    ],
)
def test_a_model_is_not_tested_on_patients_that_it_was_trained_on(
    first, sites, config, text, tmp_path
):
    why = "which would test the model on patients that it was trained on"
    with pytest.raises(InputError, match=says("evaluate: " + text.format(first, why))):
        run_tiny(tmp_path / "test", num_sites=sites, evaluate=str(first), **config)
    assert not (tmp_path / "test").exists()


def test_settings_that_differ_from_those_of_the_run_are_noted(first, tmp_path):
    run_tiny(tmp_path, evaluate=str(first), batch_size=2, num_server_rounds=7)
    (note,) = summary_of(tmp_path)["notes"]
    assert note["text"] == "batch-size was 4 in the run that trained the model and is 2"
    assert note["text"] in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"baselines": True}, "baselines"),
        ({"personal_epochs": 1}, "personal-epochs"),
        ({"init_from": "x"}, "init-from"),
        ({"patience": 1}, "keep-model or patience"),
        ({"keep_model": "best"}, "keep-model or patience"),
        ({"resume": True, "run_dir": "x"}, "resume"),
    ],
)
def test_what_is_for_training_is_refused(setting, named):
    text = f"evaluate excludes {named}: nothing is trained when a model is only tested; see "
    with pytest.raises(InputError, match="^" + text):
        Plan(evaluate="runs/first", **setting)


def test_a_part_of_the_model_travels_as_it_did(tmp_path):
    members = {"build_model": lambda self: halves(0)}
    head = {"model": lambda: halves(0), "trainable": "head.*"}
    run_tiny(tmp_path / "first", type("Halves", (TinyClient,), members), **head)
    never = type("Never", (NeverTrains,), members)
    for name, given in (("part", head), ("whole", head | {"trainable": ""})):
        run_tiny(tmp_path / name, never, evaluate=str(tmp_path / "first"), **given)
        assert summary_of(tmp_path / name)["test"] == summary_of(tmp_path / "first")["test"]


def test_the_server_and_listeners_take_part(first, tmp_path):
    heard = []

    class Hearing(Listener):
        def began(self, part, rounds, rows):
            heard.append(("began", rounds))

        def tested(self, rows):
            heard.append(("tested", rows[0][:2]))

        def ended(self, status, message):
            heard.append((status, message))

    seen = []

    def evaluate(server_round, arrays):
        seen.append(bits(arrays))
        return MetricRecord({"auc": 0.75})

    strategy = FedAvg(listeners=[Hearing()])
    result = run_tiny(
        tmp_path, evaluate=str(first), strategy=strategy, evaluate_fn=evaluate, track="tensorboard"
    )
    assert seen == [bits(result.arrays)]
    assert "0,server,all,auc,0.75" in (tmp_path / "metrics.csv").read_text()
    assert heard == [("began", 0), ("tested", (0, "test")), ("finished", "")]


Declared = predicting("binary")
PRIVATE = {"privacy": "patient", "target_epsilon": 50.0, "delta": 1e-3, "sampling_rate": 0.5}
DECLARED = {"preparation": "declared", "num_server_rounds": 1}


def test_a_hospital_that_declines_is_shown(tmp_path):
    nodes = nodes_of(tmp_path, "north", "south")
    nodes[1]["most-runs-a-day"] = 1
    run_tables(tmp_path / "first", Declared, 2, node_configs=nodes, **DECLARED)
    place = str(tmp_path / "first")
    config = {"evaluate": place, **DECLARED}
    _, summary = run_tables(tmp_path / "test", Declared, 2, node_configs=nodes, **config)
    before = summary_of(tmp_path / "first")["test"]["sites"]
    assert summary["test"]["sites"] == {"north": before["north"]}
    (failure,) = summary["failures"]
    assert (failure["round"], failure["phase"], failure["site"]) == (0, "test", "south")
    assert failure["reason"].startswith("declined: ")
    page = (tmp_path / "test" / "report.html").read_text()
    assert failure["reason"] in page
    with pytest.raises(
        RunFailedError, match=r"nobody could evaluate the model, .* south: declined"
    ):
        run_tables(tmp_path / "alone", Declared, 1, node_configs=nodes[1:], **config)


def test_a_private_model_is_tested_with_noise_that_is_charged(tmp_path):
    run_tables(tmp_path / "first", Declared, 2, **DECLARED, **PRIVATE)
    place = str(tmp_path / "first")
    _, summary = run_tables(tmp_path / "test", Declared, 2, evaluate=place, **DECLARED, **PRIVATE)
    assert "metrics.noised-counts" in summary["sent"]["evaluate"]["hospital-1"]
    assert [*(tmp_path / "test" / "ledgers").glob("*.sqlite")]
    assert "Nothing was trained" in (tmp_path / "test" / "report.html").read_text()


def test_another_table_than_the_models_does_not_fit(tmp_path):
    run_tables(tmp_path / "first")
    other = predicting("multi-class")
    with pytest.raises(InputError):
        run_tables(tmp_path / "test", other, evaluate=str(tmp_path / "first"))
    assert not (tmp_path / "test").exists()


def test_a_changed_config_of_a_stranger_is_refused(first, tmp_path):
    folder = tmp_path / "theirs"
    shutil.copytree(first, folder)
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("sites = 2", 'sites = 2\nagreed = "["'))
    with pytest.raises(InputError):
        run_tables(tmp_path / "test", evaluate=str(folder))
    (folder / "more").symlink_to("/etc/hostname")
    with pytest.raises(InputError, match="a link leads out of the folder"):
        run_tiny(tmp_path / "test", evaluate=str(folder))


def test_other_data_with_the_same_hospitals_is_prepared_alike(tmp_path):
    run_tables(tmp_path / "first")
    older = holding({0: changed(age=88.0)}, NeverTrainsTable)
    _, summary = run_tables(
        tmp_path / "test", older, evaluate=str(tmp_path / "first"), data=folders(tmp_path)
    )
    first = json.loads((tmp_path / "first" / "summary.json").read_text())
    for name in ("hospital-2", "hospital-3"):
        assert summary["test"]["sites"][name] == first["test"]["sites"][name]
    assert summary["test"]["sites"]["hospital-1"] != first["test"]["sites"]["hospital-1"]
