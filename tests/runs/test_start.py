"""Runs that start from the weights of another."""

import json
import shutil

import pytest
import torch
from flwr.app import ArrayRecord
from safetensors.numpy import load_file
from tables import TinyTable, changed, holding, run_tables
from tiny import TinyClient, bits, halves, linear, model_arrays, run_tiny, says

from fedmed_flower import InputError
from fedmed_flower.models.weights import Weights
from fedmed_flower.runs.start import start_model
from fedmed_flower.server.run_folder import RunFolder


class Still(TinyClient):
    """Trains nothing, so that a model stays what it was at the start."""

    def fit(self, model, prepared, seed):
        return {"loss": 0.0}


class HalvesOf(TinyClient):
    stem = 0

    def build_model(self):
        return halves(self.stem)


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def written(folder):
    return {k: v.tobytes() for k, v in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a finished run of one round."""
    folder = tmp_path_factory.mktemp("first") / "run"
    run_tiny(folder, num_server_rounds=1)
    return folder


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_run_starts_from_the_weights_of_another(first, is_folder, tmp_path):
    place = first if is_folder else first / "model.safetensors"
    # The first model that hospitals are sent is that one, whatever the seed.
    still = run_tiny(tmp_path / "still", Still, init_from=str(place), seed=5)
    assert bits(still.arrays) == written(first) != bits(model_arrays(seed=5))
    # Without momentum or schedule, training goes on as if it had not ended.
    config = {"num_server_rounds": 1, "init_from": str(place)}
    again = run_tiny(tmp_path / "again", **config)
    assert bits(again.arrays) != written(first)
    tables = RunFolder(tmp_path / "again").read_config()
    started = summary_of(tmp_path / "again")["started-from"]
    assert started["path"] == str(first / "model.safetensors")
    assert tables["run"]["weights"] == started["sha256"]
    assert tables["config"]["init-from"] == str(place)
    page = (tmp_path / "again" / "report.html").read_text()
    said = f"Started from the weights in {started['path']} (SHA-256 {started['sha256']})"
    assert page.count(said) == 1
    assert "is not in its privacy figures" not in page


def test_a_run_of_fresh_weights_says_nothing_of_others(first):
    assert summary_of(first)["started-from"] is None
    assert "weights" not in RunFolder(first).read_config()["run"]
    assert "Started from" not in (first / "report.html").read_text()


def test_models_for_comparison_start_from_the_same_weights(first, tmp_path):
    run_tiny(tmp_path / "run", Still, init_from=str(first), baselines=True)
    test, same = summary_of(tmp_path / "run")["test"], summary_of(first)["test"]
    assert test["federated"] == same["federated"]
    for site, metrics in same["sites"].items():
        alone = {k: v for k, v in test["local"][site].items() if k not in ("all", "sites")}
        assert alone == metrics
        for other, judged in test["local"][site]["sites"].items():
            assert judged == {key: same["sites"][other][key] for key in judged}
    assert test["pooled"]["sites"] == same["sites"]


def test_the_part_that_travels_starts_from_weights_and_the_rest_must_agree(tmp_path):
    head = {"model": lambda: halves(0), "trainable": "head.*", "num_server_rounds": 1}
    run_tiny(tmp_path / "first", HalvesOf, **head)
    still = type("StillHalves", (Still,), {"build_model": lambda self: halves(0)})
    run_tiny(tmp_path / "still", still, **head, init_from=str(tmp_path / "first"))
    assert written(tmp_path / "still") == written(tmp_path / "first")
    # All of it may travel now.
    whole = head | {"trainable": ""}
    run_tiny(tmp_path / "whole", still, **whole, init_from=str(tmp_path / "first"))
    assert written(tmp_path / "whole") == written(tmp_path / "first")
    other = type("Other", (HalvesOf,), {"stem": 1})
    with pytest.raises(InputError, match=r"has other values of stem\.1\.bias than the network"):
        run_tiny(
            tmp_path / "other",
            other,
            **head | {"model": lambda: halves(1)},
            init_from=str(tmp_path / "first"),
        )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (
            "absent",
            "init-from: {} is not there: give a run folder with model.safetensors, or a "
            ".safetensors file",
        ),
        (
            "empty",
            "init-from: {} has no model.safetensors: give the folder of a run that has trained a "
            "network, or a .safetensors file",
        ),
    ],
)
def test_what_holds_no_weights_is_refused(place, text, tmp_path):
    (tmp_path / "empty").mkdir()
    path = tmp_path / place
    with pytest.raises(InputError, match=says(text.format(path))):
        run_tiny(tmp_path / "run", init_from=str(path))
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network_are_refused_before_anything_is_written(first, tmp_path):
    text = (
        f"{first / 'model.safetensors'} does not fit the network of the app: 1.bias is float32 "
        "(2,) and must be float32 (3,)"
    )
    with pytest.raises(InputError, match=says(text)):
        run_tiny(tmp_path / "run", model=lambda: linear(3), init_from=str(first))
    assert not (tmp_path / "run").exists()


def test_a_folder_of_a_stranger_leads_to_no_other_file(first, tmp_path):
    folder = tmp_path / "theirs"
    shutil.copytree(first, folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(first / "model.safetensors")
    with pytest.raises(InputError, match="a link leads out of the folder"):
        run_tiny(tmp_path / "run", init_from=str(folder))
    # A config that no run wrote is refused as well.
    (folder / "model.safetensors").unlink()
    shutil.copy(first / "model.safetensors", folder)
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(config.replace("sites = 2", "sites = -2"))
    with pytest.raises(InputError, match=r"sites in .* must be in 1..100000, got -2"):
        run_tiny(tmp_path / "run", init_from=str(folder))


class Stopping(TinyClient):
    fits = 0
    stop_in = 3

    def fit(self, model, prepared, seed):
        type(self).fits += 1
        if type(self).fits == self.stop_in:
            raise KeyboardInterrupt
        return super().fit(model, prepared, seed)


def test_a_resumed_run_goes_on_from_its_checkpoint(first, tmp_path):
    options = {"num_server_rounds": 3, "init_from": str(first)}
    whole = run_tiny(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "cut", type("Once", (Stopping,), {}), **options)
    again = run_tiny(tmp_path / "cut", resume=True, **options)
    assert bits(again.arrays) == bits(whole.arrays)
    assert summary_of(tmp_path / "cut")["started-from"]["path"].endswith("model.safetensors")


def test_a_run_does_not_go_on_with_other_weights(first, tmp_path):
    place = tmp_path / "weights.safetensors"
    shutil.copy(first / "model.safetensors", place)
    run_tiny(tmp_path / "run", num_server_rounds=1, init_from=str(place))
    for other in ("", str(first)):
        with pytest.raises(InputError, match=r"^init-from was .* give them: -c init-from=/"):
            run_tiny(tmp_path / "run", init_from=other, resume=True)
    with torch.no_grad():
        record = ArrayRecord(linear().state_dict())
    RunFolder(tmp_path / "other").make(record)
    shutil.copy(RunFolder(tmp_path / "other").write_model(record), place)
    before = summary_of(tmp_path / "run")["started-from"]["sha256"]
    with pytest.raises(InputError, match=rf"is another file than when .* and then {before}\): put"):
        run_tiny(tmp_path / "run", init_from=str(place), resume=True)


def test_a_preparation_that_differs_from_that_of_the_weights_is_said(tmp_path, caplog):
    run_tables(tmp_path / "first", num_server_rounds=1)
    caplog.clear()
    run_tables(tmp_path / "same", num_server_rounds=1, init_from=str(tmp_path / "first"))
    assert not any("prepare rows otherwise" in line for line in caplog.messages)
    older = holding({0: changed(age=88.0)}, TinyTable)
    run_tables(tmp_path / "other", older, num_server_rounds=1, init_from=str(tmp_path / "first"))
    assert any("prepare rows otherwise than those of" in line for line in caplog.messages)


def test_a_private_run_says_what_its_figures_leave_out(first, tmp_path):
    private = {"privacy": "patient", "target_epsilon": 50.0, "delta": 1e-3, "sampling_rate": 0.5}
    run_tiny(tmp_path / "run", init_from=str(first), **private)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What those weights tell of their patients is not in its privacy figures" in page


TRAVELLING = {"trainable": "head.*", "keep": "", "lora": ""}


def part_of(state, **config):
    made = start_model(halves, "", TRAVELLING | config, 0)
    return made.part_of(Weights("own.safetensors", "", state))


def test_of_a_whole_network_the_part_that_travels_is_taken():
    state = halves().state_dict()
    state["head.bias"] = torch.tensor([3.0, 4.0])
    assert part_of(state)["head.bias"].numpy().tolist() == [3.0, 4.0]
    assert part_of(state).keys() == {"head.weight", "head.bias"}
    # All of it travels: all of it is taken, counters of batch normalisation too.
    state["stem.2.num_batches_tracked"] = torch.tensor(7)
    assert part_of(state, trainable="").keys() == state.keys()
    assert part_of(state, trainable="")["stem.2.num_batches_tracked"].numpy() == 7


@pytest.mark.parametrize(
    ("changed", "config", "text"),
    [
        (
            {"head.bias": torch.zeros(3)},
            {},
            "own.safetensors does not fit the network of this run: head.bias is float32 (3,) and "
            "must be float32 (2,)",
        ),
        (
            {"head.bias": torch.zeros(2, dtype=torch.float64)},
            {},
            "own.safetensors does not fit the network of this run: head.bias is float64 (2,) and "
            "must be float32 (2,)",
        ),
        (
            {"more": torch.zeros(1)},
            {"trainable": ""},
            "own.safetensors does not fit the network of this run, which has no more",
        ),
        (
            {"stem.1.bias": torch.zeros(6)},
            {},
            "own.safetensors has other values of stem.1.bias than the network of this run, and "
            "that entry does not travel: trainable does not name it",
        ),
        (
            {},
            {"trainable": "", "lora": "head", "lora-rank": 1},
            "own.safetensors holds the network with its adapters (lora) merged into weights that "
            "do not travel",
        ),
    ],
)
def test_weights_that_cannot_travel_are_refused(changed, config, text):
    with pytest.raises(InputError, match=says(text)):
        part_of(halves().state_dict() | changed, **config)
