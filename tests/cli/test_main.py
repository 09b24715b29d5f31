import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fedmed_flower.cli.main import app
from fedmed_flower.cli.tables import LineConsole, input_errors
from fedmed_flower.metrics import pool
from fedmed_flower.metrics.counts import read_counts
from fedmed_flower.privacy.accounting import Release, epsilon_of
from fedmed_flower.privacy.grid import excess_delta
from fedmed_flower.privacy.ledger import Ledger, Limit

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "pneumonia"
SMALL = ["-c", "dataset=phantoms", "--sites", "3", "--rounds", "1"]


def fedmed(*arguments, cwd=None, **environment):
    """Run the command as a user does and return the finished process."""
    return subprocess.run(
        ["fedmed", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PATH": path(), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )


def path():
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one round on generated images, with the comparison."""
    folder = tmp_path_factory.mktemp("run") / "out"
    done = fedmed("run", EXAMPLE, *SMALL, "-c", "baselines=true", "--out", folder)
    return done, folder


def test_run_ends_with_what_happened_and_where(finished):
    done, folder = finished
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("finished: 1 rounds in")
    assert "(generated data, not patients)" in last
    assert last.endswith(str(folder))


def test_run_folder_is_complete_and_marked(finished):
    _, folder = finished
    files = {entry.name for entry in folder.iterdir()}
    assert files == {
        "baselines",
        "checkpoint.zip",
        "config.toml",
        "counts.json",
        "cross-sites.csv",
        "live.json",
        "log.txt",
        "metrics.csv",
        "model.safetensors",
        "pictures",
        "predictor.zip",
        "report.html",
        "splits",
        "summary.json",
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["data"] == "generated data, not patients"
    assert summary["rounds"] == 1
    assert 0 <= summary["test"]["federated"]["auc"] <= 1
    counts = read_counts(folder)
    assert counts.classes == ("normal", "pneumonia")
    figures = summary["test"]["federated"]
    assert sum(map(sum, counts.confusion())) == figures["num-examples"]
    assert pool([*counts.sites.values()])["auc"] == figures["auc"]
    assert set(summary["test"]["sites"]) == {"hospital-1", "hospital-2", "hospital-3"}
    assert set(summary["test"]["local"]) == {"hospital-1", "hospital-2", "hospital-3"}
    assert 0 <= summary["test"]["pooled"]["auc"] <= 1
    assert {picture["site"] for picture in summary["pictures"]} == set(summary["sites"])
    assert len(list((folder / "pictures").iterdir())) == len(summary["pictures"])
    for name in ("log.txt", "report.html"):
        assert "generated data, not patients" in (folder / name).read_text()


def test_a_taken_folder_is_not_overwritten(finished):
    _, folder = finished
    before = (folder / "summary.json").read_bytes()
    result = CliRunner().invoke(app, ["run", str(EXAMPLE), *SMALL, "--out", str(folder)])
    assert result.exit_code == 2
    assert "is in use: choose another (--out, run-dir)" in result.stdout
    assert f"or go on with that run (--resume {folder}, resume=true)" in result.stdout
    assert (folder / "summary.json").read_bytes() == before


def test_report_is_written_anew(finished):
    _, folder = finished
    (folder / "report.html").unlink()
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0
    assert (folder / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--rounds", "0"], "num-server-rounds must be from 1 to 100,000, got 0"),
        (["--sites", "0"], "--sites must be at least 1, got 0"),
        (["-c", "local-epoch=2"], "no setting 'local-epoch': did you mean local-epochs?"),
        (["-c", "local-epochs"], "-c takes key=value, got 'local-epochs'"),
        (["-c", "local-epochs=many"], "local-epochs must be of type int, got 'many'"),
        (["-c", "batch-size=0"], "batch-size must be from 1 to 1,000,000, got 0"),
        (["-c", "learning-rate=-1"], "learning-rate must be above 0 and finite, got -1.0"),
        (["-c", "dataset=chest"], "dataset must be one of pneumoniamnist, breastmnist, phantoms"),
        (["--sites", "4000"], "num_sites must be at most 2000, the number of patients; got 4000"),
        (["-c", "privacy=yes"], "privacy must be one of none, patient, got 'yes'"),
        (["-c", "delta=1"], "delta must be above 0 and below 1, got 1.0"),
        (["--resume", "nowhere"], "nowhere is no run folder: it has no config.toml"),
        (["--resume", "a", "--out", "b"], "--out and --resume exclude each other"),
        (["-c", "run-dir=x"], "fedmed run sets run-dir itself: give --out instead of -c run-dir"),
        (["-c", "resume=true"], "fedmed run sets resume itself: give --resume instead of -c"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(arguments, text, workdir):
    settings = ["-c", "dataset=phantoms", *arguments]
    result = CliRunner().invoke(app, ["run", str(EXAMPLE), *settings])
    assert result.exit_code == 2
    last = result.stdout.strip().splitlines()[-1]
    assert last.startswith("not started: ")
    assert text in last
    assert "Traceback" not in result.stdout
    assert list(workdir.iterdir()) == []


def test_no_such_app(workdir):
    result = CliRunner().invoke(app, ["run", "elsewhere"])
    assert result.exit_code == 2
    assert "elsewhere is no Flower app: it has no pyproject.toml" in result.stdout


def test_npz_without_arrays_is_named(workdir, monkeypatch):
    import numpy as np

    folder = workdir / "data" / "medmnist"
    folder.mkdir(parents=True)
    np.savez(folder / "pneumoniamnist.npz", train_images=np.zeros((4, 28, 28), np.uint8))
    monkeypatch.setenv("FEDMED_DATA", str(workdir / "data"))
    result = CliRunner().invoke(app, ["run", str(EXAMPLE)])
    assert result.exit_code == 2
    last = result.stdout.strip().splitlines()[-1]
    assert "pneumoniamnist.npz" in last
    assert "train_labels" in last
    assert not (workdir / "runs").exists()


def test_hospitals_that_number_their_images_from_0_share_no_patients(workdir):
    import numpy as np

    from fedmed_flower.data.phantoms import chest_xrays

    for seed, name in enumerate(("north", "south")):
        images = chest_xrays(6, 2, 2, seed)
        arrays = {f"{split}_images": part for split, part in images.images.items()}
        arrays |= {f"{split}_labels": part for split, part in images.labels.items()}
        (workdir / "data" / name).mkdir(parents=True)
        np.savez(workdir / "data" / name / "phantoms.npz", **arrays, generated=np.array(True))
    settings = ["-c", "dataset=phantoms", "-c", "num-server-rounds=1"]
    arguments = ["run", str(EXAMPLE), "--data", "data", "--out", "run", *settings]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "more than one hospital" not in (workdir / "run" / "log.txt").read_text()


def broken_copy(folder, old, new):
    """Copy the example with a change in its client."""
    shutil.copytree(EXAMPLE, folder)
    client = (folder / "client_app.py").read_text()
    assert old in client
    (folder / "client_app.py").write_text(client.replace(old, new))
    return folder


def test_labels_out_of_range_are_one_line(workdir):
    old = "images.rows(split, parts[site.index])"
    new = f'[row | {{"label": row["label"] + 2}} for row in {old}]'
    copy = broken_copy(workdir / "app", old, new)
    done = fedmed("run", copy, *SMALL, cwd=workdir)
    assert done.returncode == 2
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("not started: ")
    assert "rows of the train split have labels that are no class, such as that of patient " in last
    assert "is out of range: labels must be integers from 0 to 1" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not (workdir / "runs").exists()


def test_every_site_failing_is_a_failed_run(workdir):
    old = "        return SiteData("
    copy = broken_copy(workdir / "app", "class PneumoniaHospital(ClassificationClient):", (
        "class PneumoniaHospital(ClassificationClient):\n"
        "    def fit(self, model, prepared, seed):\n"
        '        raise ArithmeticError("no training today")\n'
    ))  # fmt: skip
    assert old in (copy / "client_app.py").read_text()
    done = fedmed("run", copy, *SMALL, "--out", "out", cwd=workdir)
    assert done.returncode == 1
    last = done.stdout.strip().splitlines()[-1]
    assert "failed: RunFailedError: round 1, train: all 3 sites failed alike, so the" in last
    assert "ArithmeticError: no training today" in last
    assert str(workdir / "out") in last
    summary = json.loads((workdir / "out" / "summary.json").read_text())
    assert summary["status"] == "failed"
    failed = {f["site"] for f in summary["failures"]}
    assert failed == {"all", "hospital-1", "hospital-2", "hospital-3"}
    assert "no training today" in (workdir / "out" / "report.html").read_text()


def test_an_app_without_federate_ends_well(workdir):
    toy = ROOT / "benchmarks" / "toy"
    done = fedmed("run", toy, "--sites", "2", "--out", "toy", cwd=workdir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1] == f"finished: {workdir / 'toy'}"
    assert (workdir / "toy" / "model.safetensors").exists()


RESUMABLE = ["-c", "dataset=phantoms", "-c", "local-epochs=1", "-c", "alpha=50.0"]
RESUMABLE += ["--sites", "3", "--rounds", "6"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    done = fedmed("run", EXAMPLE, *RESUMABLE, "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def stop_after(line, how, workdir, *arguments):
    """Start a run, send a signal a moment after a line; return exit code and what came after."""
    with subprocess.Popen(
        ["fedmed", "run", str(EXAMPLE), *arguments],
        cwd=workdir,
        env=os.environ | {"PATH": path(), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background lets them ignore it, and so its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        for printed in process.stdout:
            if printed.startswith(line):
                # Into the middle of the next round, which takes longer than this.
                time.sleep(0.3)
                process.send_signal(how)
                break
        rest = process.stdout.read()
        return process.wait(60), rest.strip().splitlines()


def has_stopped(folder, said):
    status = json.loads((folder / "summary.json").read_text())["status"]
    assert status == "stopped"
    assert (folder / "report.html").exists()
    assert "stopped by the user" in said[-1]
    assert f"--resume {folder} -c dataset=phantoms -c local-epochs=1" in said[-1]


def test_a_polite_kill_leaves_summary_and_report(workdir):
    code, said = stop_after("round 1/6", signal.SIGTERM, workdir, *RESUMABLE, "--out", "killed")
    assert code == 130
    has_stopped(workdir / "killed", said)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_killed_in_round_four_and_resumed_gives_the_same_bits(workdir, unbroken, how, code):
    got, said = stop_after("round 3/6", how, workdir, *RESUMABLE, "--out", "killed")
    assert got == code
    if how is not signal.SIGKILL:
        has_stopped(workdir / "killed", said)
    models = [folder / "model.safetensors" for folder in (unbroken, workdir / "killed")]
    assert models[0].read_bytes() != models[1].read_bytes()
    # Numbers and choices are taken from the folder.
    resumed = fedmed("run", EXAMPLE, "--resume", "killed", cwd=workdir)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "going on after round 3" in resumed.stdout
    folders = (unbroken, workdir / "killed")
    one, two = (load_file(folder / "model.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)
    scores = [
        json.loads((folder / "summary.json").read_text())["test"]["sites"] for folder in folders
    ]
    assert scores[0] == scores[1]


def test_demo_without_a_network_says_so_and_goes_on_with_phantoms(workdir, monkeypatch):
    from fedmed_flower.cli import job
    from fedmed_flower.data import sources
    from fedmed_flower.data.download import SourceUnavailable
    from fedmed_flower.settings.text import expand

    def unreachable(name, timeout):
        raise SourceUnavailable(f"{name} cannot be reached")

    jobs = []
    monkeypatch.setattr(sources, "load_dataset", unreachable)
    monkeypatch.setattr(job, "execute", jobs.append)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0
    assert "pneumoniamnist cannot be reached" in result.stdout
    assert "goes on with generated data, not patients" in result.stdout
    (planned,) = jobs
    assert expand(planned.config)["dataset"] == "phantoms"
    assert expand(planned.config)["baselines"] is True
    assert planned.num_sites == 5


@pytest.mark.realdata
@pytest.mark.slow
def test_real_chest_x_rays_reach_the_floor(workdir):
    done = fedmed("run", EXAMPLE, "--out", "real", cwd=workdir)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((workdir / "real" / "summary.json").read_text())
    assert summary["data"].startswith("PneumoniaMNIST")
    assert summary["test"]["federated"]["num-examples"] == 624
    assert summary["test"]["federated"]["auc"] >= 0.945


def test_a_ledger_is_shown_run_by_run(tmp_path, monkeypatch):
    monkeypatch.setattr("fedmed_flower.cli.main.console", LineConsole(width=200))
    folder = tmp_path / "ledgers"
    ledger = Ledger(folder / "north.sqlite")
    release = Release(0.1, 1.0)
    budget = Limit(9.0, 1e-6, "the budget")
    for run, rounds in (("first", 2), ("second", 1)):
        for number in range(rounds):
            charge = ledger.charge(
                range(40), release, 5, run=run, purpose="train", app="Heart", budget=budget,
                divergence=2e-20 if run == "first" else None,
            )  # fmt: skip
            if number == 0:
                ledger.settle(charge)
    for place in (folder, folder / "north.sqlite"):
        result = CliRunner().invoke(app, ["privacy", str(place)])
        assert result.exit_code == 0
        lines = [line.split("│") for line in result.stdout.splitlines() if "Heart" in line]
        shown = [[cell.strip() for cell in line[2:-1]] for line in lines]
        first, second = (epsilon_of({release: count}, 1e-6) for count in (10, 5))
        added = f"{excess_delta(4e-20, first):.1g}"
        assert 1e-10 < float(added) < 1e-8
        assert shown == [
            ["first", "Heart", "train", "40", "2 (1 interrupted)", "10", f"{first:.3f}", added],
            ["second", "Heart", "train", "40", "1", "5", f"{second:.3f}", "-"],
        ]
        assert "delta +: by how much at most the computer's arithmetic raises" in result.stdout
        spent = epsilon_of({release: 15}, 1e-6)
        assert f"all runs together: {spent:.3f} of 9; left: about {9 - spent:.3f}" in result.stdout
    result = CliRunner().invoke(app, ["privacy", str(folder), "--delta", "0.001"])
    assert f"together: {epsilon_of({release: 15}, 1e-3):.3f}" in " ".join(result.stdout.split())


def test_a_new_ledger_is_made_where_none_is(tmp_path):
    path = tmp_path / "north.sqlite"
    result = CliRunner().invoke(app, ["privacy", "--new", str(path)])
    assert result.exit_code == 0
    assert Ledger(path, read_only=True).entries() == []
    result = CliRunner().invoke(app, ["privacy", "--new", str(path)])
    assert result.exit_code == 2
    assert "exists already: give the new ledger another name" in result.stdout


def test_a_ledger_that_is_not_there_or_none_is_one_line(tmp_path):
    (tmp_path / "notes.sqlite").write_text("no ledger")
    (tmp_path / "empty").mkdir()
    for place, text in (
        ("nowhere.sqlite", f"there is no ledger {tmp_path / 'nowhere.sqlite'}"),
        ("empty", f"there is no ledger (*.sqlite) in the folder {tmp_path / 'empty'}"),
        ("notes.sqlite", f"the privacy ledger {tmp_path / 'notes.sqlite'} cannot be used"),
    ):
        result = CliRunner().invoke(app, ["privacy", str(tmp_path / place)])
        assert result.exit_code == 2
        assert result.stdout.startswith(f"not started: {text}")


def test_the_privacy_of_a_run_is_that_of_its_ledgers(workdir):
    (workdir / "run").mkdir()
    (workdir / "run" / "summary.json").write_text("{}")
    plain = CliRunner().invoke(app, ["privacy", "run"])
    assert plain.exit_code == 2
    assert "only a simulation with privacy keeps ledgers in its run folder" in plain.output
    (workdir / "run" / "ledgers").mkdir()
    ledger = Ledger(workdir / "run" / "ledgers" / "hospital-1.sqlite")
    release = Release(sampling_rate=0.1, noise_multiplier=2.0)
    ledger.charge(["p"], release, count=3, run="r", purpose="train", server_round=1, app="a")
    shown = CliRunner().invoke(app, ["privacy", "run"])
    assert shown.exit_code == 0, shown.output
    assert "hospital-1.sqlite" in shown.output


@pytest.mark.parametrize("verbose", [False, True])
def test_flowers_own_lines_are_shown_only_when_asked_for(verbose, capsys):
    flower = logging.getLogger("flwr")
    with input_errors(verbose):
        flower.info("configure_train: Sampled 2 nodes")
        flower.warning("a warning")
        logging.getLogger("flwr.fedmed").info("round 1/2")
    own = ["configure_train: Sampled 2 nodes"] if verbose else []
    assert capsys.readouterr().out.splitlines() == [*own, "a warning", "round 1/2"]
