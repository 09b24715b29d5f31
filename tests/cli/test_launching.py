"""`fedmed node` and `fedmed link`: what Flower's command is given, and whose signals and exit code.

Flower's commands stand beside a Python of the test's own and say what they were given.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import venv
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import says

from fedmed_flower.cli.launching import POLL, launch_environment
from fedmed_flower.engines.processes import family, living
from fedmed_flower.errors import InputError

MAIN = "from fedmed_flower.cli.main import main; main()"
# With a fork server that imports little.
FORKING = """
    import sys
    from fedmed_flower.cli.launching import Launched, launch

    launch(Launched("flower-supernode", False, ["flwr-clientapp"], ["json"]), sys.argv[1:], 0.1)
"""
# Starts an app if it is to, and prints what both were given, as one line; then may wait.
FLOWER = """
    import json, os, signal, subprocess, sys, time

    given = {"argv": sys.argv, "pid": os.getpid(), "environment": dict(os.environ)}
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), lambda number, frame: sys.exit(40 + number))
    if sys.argv[2:3] == ["--app"]:
        app = subprocess.run(["flwr-clientapp", "--token", "x"], stdout=subprocess.PIPE)
        given["app"] = json.loads(app.stdout)
    print(json.dumps(given), flush=True)
    if sys.argv[1:2] == ["--wait"]:
        time.sleep(60)
    sys.exit(7)
"""
# Prints its options and who has started it.
APP = """
    import json, os, sys

    with open(f"/proc/{os.getppid()}/cmdline") as file:
        print(json.dumps({"argv": sys.argv, "parent": file.read()}), flush=True)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python with Flower's commands beside it, which are the test's."""
    folder = tmp_path_factory.mktemp("own") / "python"
    venv.create(folder, symlinks=True)
    scripts = {"flower-supernode": FLOWER, "flower-superlink": FLOWER, "flwr-clientapp": APP}
    for name, code in scripts.items():
        program = folder / "bin" / name
        program.write_text(f"#!{folder}/bin/python\n{textwrap.dedent(code)}")
        program.chmod(0o755)
    return folder / "bin" / "python"


class Left:
    """What a command with a fork server has started, which must go with it."""

    def __init__(self, pid, folder):
        self.pids = family({pid}, living())
        self.folder = folder

    def is_gone(self):
        """Wait until processes and folder are gone."""
        deadline = time.monotonic() + 60
        while self.pids & living().keys() or self.folder.exists():
            assert time.monotonic() < deadline, (self.pids & living().keys(), self.folder.exists())
            time.sleep(0.05)


def environment(**more):
    """Return the environment of this process without what the commands set."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("FLWR_")}
    paths = [path for path in sys.path if path]
    return kept | {"PYTHONPATH": os.pathsep.join(paths)} | more


def fedmed(python, *arguments, **more):
    """Run the command and return the finished process, and what Flower's was given."""
    name, *options = arguments
    if name == "node":
        options = ["--no-check", *options]
    command = [python, "-c", MAIN, name, *options]
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True)
    given = json.loads(done.stdout) if done.stdout.startswith("{") else None
    return done, given


@pytest.mark.parametrize("name", ["node", "link"])
def test_flowers_command_gets_its_options_untouched_and_its_exit_code_is_returned(python, name):
    config = 'site-name="north" data-dir="/data/no rth"'
    options = ["--superlink", "host:9092", "--node-config", config, "--insecure", "-V", "--max=-1"]
    done, given = fedmed(python, name, "--no-fork-server", *options, "--", "--poll", "x", "--help")
    assert done.returncode == 7, done.stderr
    program = {"node": "flower-supernode", "link": "flower-superlink"}[name]
    assert given["argv"] == [str(python.with_name(program)), *options, "--poll", "x", "--help"]


@pytest.mark.parametrize(("name", "poll"), [("node", "0.1"), ("link", "1.0")])
def test_flower_calls_nobody_installs_nothing_and_finds_its_other_commands(python, name, poll):
    _, given = fedmed(python, name, "--no-fork-server", PATH="/usr/bin:/bin")
    set_ = given["environment"]
    assert set_["FLWR_TELEMETRY_ENABLED"] == "0"
    assert set_["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert set_["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert set_[POLL] == poll
    assert set_["PATH"].split(os.pathsep) == [str(python.parent), "/usr/bin", "/bin"]
    assert set_["no_proxy"] == set_["NO_PROXY"] == "localhost,127.0.0.1,::1"
    # Threads are the hospital's own choice.
    assert set_.get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")


def test_what_the_environment_sets_stays(python):
    own = {
        "FLWR_TELEMETRY_ENABLED": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "0",
        "no_proxy": "hospital.example",
        POLL: "5",
    }
    _, given = fedmed(python, "link", "--no-fork-server", **own)
    set_ = given["environment"]
    assert set_["FLWR_TELEMETRY_ENABLED"] == "1"
    assert set_["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "0"
    assert set_["no_proxy"] == "hospital.example,localhost,127.0.0.1,::1"
    assert float(set_[POLL]) == 5
    _, given = fedmed(python, "link", "--no-fork-server", "--poll", "0.25", **own)
    assert float(given["environment"][POLL]) == 0.25


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_command_is_flowers(python, number):
    command = [python, "-c", MAIN, "node", "--no-check", "--no-fork-server", "--", "--wait"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        given = json.loads(process.stdout.readline())
        assert given["pid"] == process.pid
        process.send_signal(number)
        assert process.wait(30) == 40 + number


@pytest.mark.parametrize("poll", ["0.001", "60.5", "-1", "nan", "inf"])
def test_a_poll_that_flower_would_refuse_later_is_refused(poll):
    text = f"--poll ({POLL}) must be from 0.01 to 60 seconds, got {float(poll):g}"
    with pytest.raises(InputError, match=says(text)):
        launch_environment({}, float(poll), Path("/bin"))


def test_a_refusal_is_one_line_with_exit_code_2(python):
    done, _ = fedmed(python, "node", "--poll=nan")
    assert done.returncode == 2
    assert done.stdout.startswith("not started: --poll (")
    assert len(done.stdout.splitlines()) == 1


def test_a_missing_command_is_named(python, tmp_path):
    other = tmp_path / "other"
    venv.create(other, symlinks=True)
    done, _ = fedmed(other / "bin" / "python", "link")
    assert done.returncode == 2
    assert done.stdout.strip() == (
        f"not started: the program {other / 'bin' / 'flower-superlink'} is missing: install flwr "
        f"into the environment of {other / 'bin' / 'python'}"
    )


def test_a_command_that_cannot_be_executed_is_named(tmp_path):
    other = tmp_path / "other"
    venv.create(other, symlinks=True)
    program = other / "bin" / "flower-supernode"
    program.write_text("#!/nowhere/python\n")
    program.chmod(0o755)
    done, _ = fedmed(other / "bin" / "python", "node", "--no-fork-server")
    assert done.returncode == 2
    assert done.stdout.strip() == (
        f"not started: {program} cannot be started: No such file or directory"
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["node", "--allow-runtime-dependency-installation"], "packages that are installed"),
        (["node", "--allow"], "packages that are installed"),
        (["node", "--isolation=process"], "--isolation process"),
        (["link", "--isolation", "process"], "--isolation process"),
        (["link", "--allow-runtime-dependency-installation"], "packages that are installed"),
        (["link"], "packages that are installed"),
    ],
)
def test_a_fork_server_that_is_of_no_use_is_not_started_and_one_line_says_why(
    python, options, reason
):
    # A SuperLink installs packages unless it is told not to.
    done, given = fedmed(python, *options, FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="0")
    assert done.returncode == 7, done.stderr
    assert "FEDMED_FORK_SERVER" not in given["environment"]
    (line,) = done.stderr.splitlines()
    assert line.startswith("no fork server, each command is a new process: ")
    assert reason in line


@pytest.mark.parametrize("option", ["--help", "-V", "--vers"])
def test_help_and_version_come_without_a_fork_server(python, option):
    done, given = fedmed(python, "node", "--", option)
    assert given["argv"][1:] == [option]
    assert done.stderr == ""
    assert "FEDMED_FORK_SERVER" not in given["environment"]


linux = pytest.mark.skipif(sys.platform != "linux", reason="fork servers are Linux's alone")


@dataclass
class Started:
    """A command with a fork server, and what it and an app were given."""

    process: subprocess.Popen
    given: dict

    @property
    def folder(self):
        """Of the fork server."""
        return Path(self.given["environment"]["FEDMED_FORK_SERVER"]).parent


@pytest.fixture
def started(python):
    command = [python, "-c", textwrap.dedent(FORKING), "--wait", "--app"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        yield Started(process, json.loads(process.stdout.readline()))
        process.kill()


@linux
def test_an_app_is_a_child_of_the_fork_server(python, started):
    given = started.given
    assert given["pid"] == started.process.pid
    assert given["argv"] == [str(python.with_name("flower-supernode")), "--wait", "--app"]
    assert given["app"]["argv"] == [str(python.with_name("flwr-clientapp")), "--token", "x"]
    assert str(started.folder / "fork-server") in given["app"]["parent"]


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_command_has_ended_or_was_killed(started, number):
    left = Left(started.process.pid, started.folder)
    # The command, the keeper and the fork server.
    assert len(left.pids) == 3
    started.process.send_signal(number)
    code = started.process.wait(30)
    assert code == (40 + signal.SIGTERM if number == signal.SIGTERM else -signal.SIGKILL)
    left.is_gone()


@linux
def test_all_are_asked_to_end_at_once_as_service_managers_do(started):
    left = Left(started.process.pid, started.folder)
    for pid in left.pids:
        # The others may have ended with the first.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    assert started.process.wait(30) == 40 + signal.SIGTERM
    left.is_gone()


@linux
@pytest.mark.slow
def test_ctrl_c_while_the_fork_server_imports_leaves_nothing(python, tmp_path):
    (tmp_path / "slow_to_import.py").write_text(
        f"import time, pathlib; pathlib.Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(600)"
    )
    code = textwrap.dedent(FORKING).replace("json", "slow_to_import")
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"}
    where = {"TMPDIR": str(tmp_path)} | paths
    with subprocess.Popen([python, "-c", code], env=environment(**where)) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (folder,) = tmp_path.glob("fedmed-fork-*")
        left = Left(process.pid, folder)
        assert len(left.pids) == 3
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
        left.is_gone()


def test_a_node_that_cannot_work_is_not_started(python, tmp_path):
    command = [python, "-c", MAIN, "node", "--no-fork-server", "--insecure"]
    command += ["--superlink", "192.0.2.1:9092"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "site-name is not in the node config" in done.stdout
    assert "the node was not started, see the table: name, certificate" in done.stdout
    assert "argv" not in done.stdout


def test_a_node_that_can_work_says_so_and_starts(python, tmp_path):
    config = f'site-name="north" data-dir="{tmp_path}" FLWR="x"'
    command = [python, "-c", MAIN, "node", "--no-fork-server", "--node-config", config]
    command += ["--superlink", "127.0.0.1:1"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 7, done.stdout
    assert "Before the node starts" in done.stdout
    assert "does not answer" in done.stdout
    assert '"argv"' in done.stdout


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--isolation=process", "--approvals excludes --isolation process"),
        (
            "--allow-runtime-dependency-installation",
            "--approvals excludes --allow-runtime-dependency-installation",
        ),
    ],
)
def test_no_option_lets_apps_start_past_the_list(python, tmp_path, option, text):
    listed = ("--approvals", str(tmp_path / "list"))
    done, given = fedmed(python, "node", *listed, option)
    assert done.returncode == 2
    assert given is None
    assert text in done.stdout


def test_with_a_list_flower_finds_the_guarded_commands_first(python, tmp_path):
    listed = ("--approvals", str(tmp_path / "list"))
    _, given = fedmed(python, "node", "--no-fork-server", *listed)
    set_ = given["environment"]
    guarded = tmp_path / "list" / "commands"
    assert set_["FEDMED_APPROVALS"] == str(tmp_path / "list")
    assert set_["PATH"].split(os.pathsep)[:2] == [str(guarded), str(python.parent)]
    assert {"flwr-clientapp", "flwr-agentapp", "flwr-serverapp"} <= {
        each.name for each in guarded.iterdir()
    }
    agent = subprocess.run([guarded / "flwr-agentapp"], capture_output=True, text=True)
    assert agent.returncode == 1
    assert "only approved ClientApps run at this hospital" in agent.stderr


def test_a_list_that_cannot_be_read_is_said_before_the_start(python, tmp_path):
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "approved.toml").write_text("[")
    done, given = fedmed(python, "node", "--approvals", str(tmp_path / "list"))
    assert (done.returncode, given) == (2, None)
    assert "cannot be read (not valid TOML" in done.stdout
