import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from deployment_helper import write_app

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.engines import gpu
from fedmed_flower.engines.gpu import gpu_share, main, measure_site, train_once
from fedmed_flower.engines.project import load_project
from fedmed_flower.errors import InputError
from fedmed_flower.settings.text import assign, expand

ROOT = Path(__file__).parents[2]
GB = 10**9


@pytest.mark.parametrize(
    ("peak", "gpus", "workers", "share"),
    [
        # 72 of 80 GB may be used. 24 sites of 3 GB would fit, but there are 8 workers.
        (3 * GB, 1, 8, 0.1249),
        # 6 sites of 11 GB fit, so that two workers wait.
        (11 * GB, 1, 8, 0.1666),
        (36 * GB, 1, 8, 0.4999),
        (37 * GB, 1, 8, 1.0),
        (100 * GB, 1, 8, 1.0),
        # Four workers on each of two cards.
        (3 * GB, 2, 8, 0.2499),
        (11 * GB, 2, 8, 0.2499),
        (30 * GB, 2, 8, 0.4999),
        (100 * GB, 2, 8, 1.0),
        # Nothing known: as many as there are workers.
        (0, 1, 8, 0.1249),
        (0, 2, 8, 0.2499),
        # No site lies across two cards: two share one, the third has one alone.
        (0, 2, 3, 0.4999),
        (0, 1, 1, 1.0),
        (3 * GB, 4, 2, 1.0),
    ],
)
def test_the_share_of_a_gpu(peak, gpus, workers, share):
    assert gpu_share(peak, 80 * GB, gpus, workers) == share


@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 6, 7, 10, 13, 25, 49])
def test_as_many_workers_share_a_gpu_as_are_meant_to(gpus, workers):
    # As Flower's engine counts them, from a number that it keeps in single precision.
    share = np.float32(gpu_share(0, 80 * GB, gpus, gpus * workers))
    assert int(gpus / share) == gpus * workers
    assert int(1 / share) == workers


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder and an empty folder for temporary files; apps are forgotten."""
    for name in ("work", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = dict(sys.modules)
    yield tmp_path
    for name in ("server_app", "client_app"):
        sys.modules.pop(name, None)
        if name in before:
            sys.modules[name] = before[name]


def empty(place):
    return not [*(place / "work").iterdir(), *(place / "temporary").glob("fedmed*")]


def settings_of(app, **changes):
    project = load_project(app)
    values = {key.replace("_", "-"): v for key, v in changes.items()}
    return project, assign(project.declared, values)


def test_one_site_of_the_example_trains_once_and_nobody_else(place, monkeypatch):
    app, fits, fit = ROOT / "examples" / "pneumonia", [], MedicalClient.fit

    def counting(self, model, prepared, seed):
        fits.append((self.site.name, len(prepared), self.settings.local_epochs))
        return fit(self, model, prepared, seed)

    monkeypatch.setattr(MedicalClient, "fit", counting)
    project, config = settings_of(
        app, dataset="phantoms", alpha=50.0, baselines=True, num_server_rounds=7
    )
    folder = place / "once"
    assert train_once(project, config, 40, folder) == 1
    ((name, rows, epochs),) = fits
    assert (name, epochs) == ("hospital-1", config["local-epochs"])
    assert 30 < rows < 70
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert (summary["rounds"], summary["rounds-planned"], summary["pictures"]) == (1, 1, [])
    assert "local" not in summary["test"]
    assert empty(place)
    # The settings of the run itself stay as they were.
    assert (config["num-server-rounds"], "run-dir" in expand(config)) == (7, False)


CLIENT = """
    from dataclasses import dataclass

    from tiny import TinyClient

    from fedmed_flower.settings import Section


    @dataclass(frozen=True)
    class Faults(Section):
        fails: bool = False
        empty: bool = False


    class Client(TinyClient):
        sections = (Faults,)

        def fit(self, model, prepared, seed):
            if Faults.from_run_config(self.context.run_config).fails:
                raise ArithmeticError("no training today")
            return super().fit(model, prepared, seed)

        def load_data(self, site):
            if Faults.from_run_config(self.context.run_config).empty:
                raise ValueError("no data")
            return super().load_data(site)


    app = Client.client_app()
"""

SERVER = """
    from client_app import Faults
    from flwr.serverapp import ServerApp
    from tiny import linear

    from fedmed_flower import federate
    from fedmed_flower.strategies import Krum

    app = ServerApp()


    @app.main()
    def main(grid, context):
        federate(Krum(num_malicious_nodes=1), grid, context, linear, sections=(Faults,))
"""


def app_of(place, **config):
    settings = {"num-server-rounds": 2, "run-dir": "", "resume": False, "device": "cpu"}
    settings |= {"fails": False, "empty": False}
    return write_app(place / "app", SERVER, CLIENT, **settings | config)


@pytest.mark.parametrize("fails", [False, True])
def test_a_rule_that_needs_more_replies_does_not_matter(place, fails):
    project, config = settings_of(app_of(place, fails=fails))
    assert train_once(project, config, 5, place / "once") == 1
    assert empty(place)


def test_an_app_that_never_trains_is_no_measurement(place):
    project, config = settings_of(app_of(place, empty=True))
    with pytest.raises(InputError):
        train_once(project, config, 5, place / "once")


def written(place, app, config, sites=2):
    (place / "settings.json").write_text(json.dumps(config))
    main([str(app), str(place / "settings.json"), str(sites), str(place / "peak.json")])
    return json.loads((place / "peak.json").read_text())


def test_what_a_site_took_is_the_most_that_was_reserved_and_what_cuda_takes(place, monkeypatch):
    toy = ROOT / "benchmarks" / "toy"
    _, config = settings_of(toy)
    assert written(place, toy, config) == 0
    reserved = {0: 7 * GB, 1: 0}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: reserved[device])
    assert written(place, toy, config) == 7 * GB + 2**29
    reserved[0] = 0
    # What ran on the CPU says nothing of a GPU.
    assert written(place, toy, config) == 0
    assert empty(place)


def test_measuring_is_done_in_a_process_of_its_own(place, monkeypatch):
    done, run = [], subprocess.run

    def remembering(command, **options):
        done.append(run(command, **options))
        return done[-1]

    monkeypatch.setattr(gpu.subprocess, "run", remembering)
    toy = ROOT / "benchmarks" / "toy"
    _, config = settings_of(toy)
    # Without a GPU there is nothing to measure, which is no error.
    assert measure_site(toy, config, 2) == 0
    assert done[0].returncode == 0, done[0].stderr
    assert empty(place)
    assert "client_app" not in sys.modules


def test_a_process_that_fails_has_measured_nothing(place, monkeypatch):
    calls = []
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **_: calls.append(command))
    assert measure_site(place / "nowhere", {"a": 1}, 3) == 0
    ((program, *command),) = calls
    assert program == sys.executable
    assert command[:3] == ["-m", "fedmed_flower.engines.gpu", str(place / "nowhere")]
    assert command[4] == "3"
    assert empty(place)


@pytest.mark.parametrize(
    ("total", "peak", "fits"),
    [
        # 72 of 80 GB may be used.
        (80 * GB, 11 * GB, 6),
        (80 * GB, 36 * GB, 2),
        (80 * GB, 37 * GB, 1),
        (80 * GB, 100 * GB, 1),
        (80 * GB, 3 * GB, 8),
        # Nothing known of the site.
        (80 * GB, 0, 8),
        # No GPU: nothing is measured.
        (0, None, 8),
    ],
)
def test_how_many_of_the_workers_fit_on_the_gpu(total, peak, fits, monkeypatch):
    def run(command, **options):
        assert command[0] == sys.executable
        return subprocess.CompletedProcess(command, 0, stdout=f"{total}\n")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    monkeypatch.setattr(gpu, "measure_site", lambda app, config, sites: peak)
    assert gpu.fitting(ROOT, {}, 9, 8) == fits
