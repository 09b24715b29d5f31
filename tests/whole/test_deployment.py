"""The example deployment: TLS, node authentication, one SuperLink and three SuperNodes."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployment_helper import ECHO_CLIENT, SCRIPT, Deployment, deployment, write_app

from fedmed_flower.engines.processes import family, living
from fedmed_flower.privacy.accounting import epsilon_of
from fedmed_flower.privacy.ledger import Ledger

pytestmark = pytest.mark.slow

SERVER = """
    import numpy as np
    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg

    app = ServerApp()


    class NamingFedAvg(FedAvg):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            names = sorted(reply.content["site"]["name"] for reply in replies)
            print("ROUND", server_round, *names, flush=True)
            return super().aggregate_train(server_round, replies)


    @app.main()
    def main(grid, context):
        if context.run_config["fail"]:
            raise RuntimeError("this server was told to fail")
        strategy = NamingFedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
        result = strategy.start(
            grid=grid, initial_arrays=ArrayRecord([np.arange(3.0)]), num_rounds=2
        )
        print("MODEL", result.arrays.to_numpy_ndarrays()[0].tolist(), flush=True)
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployment(tmp_path_factory.mktemp("deployment") / "files") as started:
        yield started


@pytest.fixture(scope="module")
def toy_app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_app(tmp_path_factory.mktemp("apps") / "toy-app", SERVER, fail=False, sleep=0.0)


def processes_naming(*texts: str) -> list[str]:
    table = subprocess.run(["ps", "-Awwo", "args="], capture_output=True, text=True, check=True)
    flower = [line for line in table.stdout.splitlines() if re.search("/(flower|flwr)-", line)]
    return [line for line in flower if any(text in line for text in texts)]


def can_bind(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def test_every_hospital_is_online_and_private_keys_are_private(running: Deployment) -> None:
    status = running.command("status")
    assert status.returncode == 0, status.stdout
    assert status.stdout.count("online") == 3
    keys = [*running.directory.glob("server/*.key"), *running.directory.glob("sites/*/key")]
    assert len(keys) == 5
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_a_second_start_in_the_same_folder_is_refused(running: Deployment) -> None:
    again = running.command("start")
    assert again.returncode == 2
    assert "already running" in again.stdout


def test_an_app_runs_on_all_hospitals(running: Deployment, toy_app: Path) -> None:
    done = running.command("run", str(toy_app))
    assert done.returncode == 0, done.stdout
    assert "ROUND 1 east north south" in done.stdout
    assert "ROUND 2 east north south" in done.stdout
    assert "MODEL [0.0, 1.0, 2.0]" in done.stdout
    for name in running.processes:
        log = running.log(name)
        assert re.search(r"^fork server: \d+ modules", log, re.MULTILINE), log
        # Neither the fork server nor the process that asks it has found a reason not to.
        assert "new process" not in log, log


def test_a_failing_app_gives_a_failing_exit_code(running: Deployment, toy_app: Path) -> None:
    done = running.command("run", str(toy_app), "-c", "fail=true")
    assert done.returncode == 1
    assert "finished:failed" in done.stdout


def test_a_folder_that_is_no_app_gives_a_failing_exit_code(running: Deployment) -> None:
    done = running.command("run", str(running.directory / "sites"))
    assert done.returncode == 2
    assert "is no Flower app: it has no pyproject.toml" in done.stdout


def test_an_unregistered_key_cannot_join(running: Deployment, tmp_path: Path) -> None:
    key = tmp_path / "key"
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", str(key)]
    subprocess.run(command, check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    link = f"127.0.0.1:{running.processes['superlink']['port']}"
    command = [
        *(str(Path(sys.executable).with_name("flower-supernode")), "--superlink", link),
        *("--root-certificates", str(running.directory / "server" / "ca.crt")),
        *("--auth-supernode-private-key", str(key), "--port", str(port)),
    ]
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    # The SuperNode starts flower-superexec by its name, also where no environment is activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | quiet | {"FLWR_HOME": str(tmp_path), "PATH": path}
    said = tmp_path / "log"
    with said.open("w") as log:
        stranger = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        # What the SuperLink answered is the claim; that Flower's process then ends is not ours.
        ended = None
        while "Failed to activate SuperNode" not in said.read_text():
            assert ended is None, said.read_text()
            assert time.monotonic() < deadline, said.read_text()
            ended = stranger.poll()
            time.sleep(0.5)
    finally:
        stranger.kill()
        stranger.wait()
    assert running.command("status").stdout.count("online") == 3


def test_stop_in_mid_training_leaves_no_process_and_no_taken_port(
    running: Deployment, toy_app: Path
) -> None:
    processes = running.processes
    names = [
        str(running.directory),
        *(f"127.0.0.1:{entry['port']}" for entry in processes.values()),
    ]
    command = [sys.executable, str(SCRIPT), "run", str(toy_app), "-c", "sleep=60.0"]
    with subprocess.Popen([*command, "--dir", str(running.directory)]) as run:
        deadline = time.monotonic() + 60
        while sum("flwr-clientapp" in line for line in processes_naming(*names)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        # The fork servers and those who keep them, too, which name no folder of the deployment.
        every = family({entry["pid"] for entry in processes.values()}, living())
        servers = [running.started(name)[1]["FEDMED_FORK_SERVER"] for name in processes]
        folders = [Path(server).parent for server in servers]
        running.kill("north")
        assert running.command("status").returncode == 1
        stopped = running.command("stop")
        assert stopped.returncode == 0, stopped.stdout
        assert run.wait(60) == 1
    # What was running for the killed hospital ends by itself when its SuperNode is gone.
    deadline = time.monotonic() + 60
    while left := [
        *processes_naming(*names),
        *(every & living().keys()),
        *(folder for folder in folders if folder.exists()),
    ]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    assert all(can_bind(entry["port"]) for entry in processes.values())
    assert "Nothing is running" in running.command("stop").stdout
    assert (running.directory / "sites" / "north" / "key").exists()


@pytest.mark.parametrize("option", ["--no-fork-server", "--no-launchers"])
def test_an_app_runs_without_fork_servers_and_by_flowers_own_commands(
    tmp_path: Path, option: str
) -> None:
    server = MORTAL_SERVER.replace("min_available_nodes=3", "min_available_nodes=1")
    app = write_app(tmp_path / "app", server)
    with deployment(tmp_path / "files", "--sites", "1", option) as started:
        command, _ = started.started("north")
        done = started.command("run", str(app))
        assert "fork server" not in started.log("north")
    assert Path(command[1]).name == "flower-supernode"
    assert done.returncode == 0, done.stdout
    assert "MODEL [0.0, 1.0, 2.0]" in done.stdout


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        refused = Deployment(tmp_path / "files").command("start", "--port-base", str(port))
    assert refused.returncode == 2
    assert f"port {port}" in refused.stdout
    assert "--port-base" in refused.stdout


EXAMPLE = Path(__file__).parents[2] / "examples" / "pneumonia"


def test_the_pneumonia_example_runs_on_hospitals_with_images_of_their_own(tmp_path: Path) -> None:
    with deployment(tmp_path / "files", "--sites", "2") as started:
        folder = tmp_path / "files" / "data"
        names = ("north", "south")
        split = [sys.executable, str(EXAMPLE / "split.py"), str(folder), *names]
        subprocess.run([*split, "--dataset", "phantoms"], check=True, capture_output=True)
        settings = ["dataset='phantoms'", "min-sites=2", "num-server-rounds=1", "local-epochs=1"]
        settings += [f"run-dir='{tmp_path / 'run'}'", "privacy='patient'", "sampling-rate=0.1"]
        texts = [part for setting in settings for part in ("-c", setting)]
        done = started.command("run", str(EXAMPLE), *texts)
    assert done.returncode == 0, done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["engine"] == "Flower deployment"
    assert summary["data"] == "generated data, not patients"
    assert list(summary["sites"]) == ["north", "south"]
    assert sum(site["train"] for site in summary["sites"].values()) == 2000
    assert set(summary["test"]["sites"]) == {"north", "south"}
    assert summary["failures"] == []
    spent = summary["privacy"]["patient"]["sites"]
    for name in names:
        ledger = Ledger(folder / name / "privacy-ledger.sqlite", read_only=True)
        (train, *measured) = ledger.entries()
        assert epsilon_of(train.releases, 1e-5) == pytest.approx(spent[name]["epsilon"])
        assert 7.9 < spent[name]["epsilon"] <= ledger.most(1e-5) <= 8
        assert [entry.purpose for entry in measured] == ["val counts", "test counts"]


MORTAL_SERVER = """
    import numpy as np
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp import ServerApp

    from fedmed_flower.strategies import FedAvg

    app = ServerApp()


    @app.main()
    def main(grid, context):
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=3)
        arrays = ArrayRecord({"w": Array(np.arange(3.0))})
        result = strategy.start(grid, arrays, num_rounds=2, timeout=25)
        for failure in strategy.history.failures:
            print("FAILURE", failure.round, failure.phase, failure.site, failure.reason, flush=True)
        print("MODEL", result.arrays["w"].numpy().tolist(), flush=True)
"""


def test_a_hospital_killed_in_mid_round_is_named_and_the_run_ends_well(tmp_path: Path) -> None:
    dying = 'site == "north" and message.content["config"]["server-round"] == 2'
    client = ECHO_CLIENT.replace(
        'time.sleep(float(context.run_config.get("sleep", 0)))', f"time.sleep(60 * ({dying}))"
    )
    app = write_app(tmp_path / "mortal", MORTAL_SERVER, client)
    with deployment(tmp_path / "files") as started:
        command = [sys.executable, str(SCRIPT), "run", str(app), "--dir", str(started.directory)]
        lines = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                lines.append(line)
                if "round 1/2" in line:
                    time.sleep(8)
                    started.kill("north")
    text = "".join(lines)
    assert process.returncode == 0, text
    assert "round 2/2" in text
    assert re.search(r"FAILURE 2 train north no reply within 25 s", text), text
    assert "MODEL [0.0, 1.0, 2.0]" in text


def test_behind_a_proxy_the_processes_reach_each_other_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):
        # Nothing listens there.
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server = MORTAL_SERVER.replace("min_available_nodes=3", "min_available_nodes=1")
    app = write_app(tmp_path / "app", server)
    with deployment(tmp_path / "files", "--sites", "1") as started:
        done = started.command("run", str(app))
    assert done.returncode == 0, done.stdout
    assert "MODEL [0.0, 1.0, 2.0]" in done.stdout
