import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Commands, end_of, run, server_of

from fedmed_flower.engines import forking
from fedmed_flower.engines.fork_client import SOCKET

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="runs on Linux alone")
OFF = "no fork server, each command is a new process: "


@pytest.fixture
def commands(tmp_path):
    made = Commands(tmp_path)
    made.command("import os; print(os.getppid())")
    return made


@on_linux
def test_the_environment_has_the_shims_first_and_nothing_is_left(commands):
    with commands.served("json") as environment:
        changed = {n: t for n, t in environment.items() if commands.environment.get(n) != t}
        assert changed.keys() <= {"PATH", SOCKET, "JE_ARROW_MALLOC_CONF"}
        shims = Path(environment["PATH"].split(os.pathsep)[0])
        assert environment["PATH"] == f"{shims}{os.pathsep}{commands.environment['PATH']}"
        assert [path.name for path in shims.iterdir()] == ["probe"]
        assert [path.stat().st_mode & 0o777 for path in (shims, shims.parent)] == [0o700, 0o700]
        assert (shims / "probe").read_text().startswith(f"#!{sys.executable} -IS\n")
        server = server_of(environment)
        os.kill(server, 0)
    assert not shims.parent.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)
    assert len(commands.log) == 1
    assert commands.log[0].startswith("fork server: ")
    # A setting of the user stays.
    commands.environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false,narenas:1"
    with commands.served() as environment:
        assert environment["JE_ARROW_MALLOC_CONF"] == "background_thread:false,narenas:1"


@on_linux
@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("import nowhere", "wrong cannot be imported (ModuleNotFoundError)"),
        ("import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True)"
         ".start()", "the fork server has threads: python"),
        ("kept = open('/dev/zero')", "the imports have opened /dev/zero"),
        ("import os; os.environ['MPLCONFIGDIR'] = '/tmp/matplotlib-x'",
         "matplotlib has made a folder for its settings, which the first child would delete: set "
         "MPLCONFIGDIR to a folder that can be written"),
        ("import os; os._exit(0)", "it ended while it started"),
    ],
)  # fmt: skip
def test_imports_that_forbid_a_fork_are_named(commands, module, reason):
    commands.write("wrong", module)
    with commands.served("wrong") as environment:
        assert environment == commands.environment
        assert run(environment).stdout == f"{os.getpid()}\n"
    # Lines of the imports come from another thread.
    assert [line for line in commands.log if line.startswith(OFF + reason)]


@on_linux
def test_a_server_that_has_asked_for_a_gpu_does_not_serve(commands):
    commands.write("torch", "class cuda:\n    def is_initialized():\n        return True\n")
    with commands.served("torch") as environment:
        assert environment == commands.environment
    assert commands.log == [OFF + "the imports have asked for a GPU"]


@on_linux
@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ("#!/bin/sh", "is a script of /bin/sh, not of "),
        (f"#!{sys.executable} -s", "starts Python with options"),
        ("", "is no Python script"),
    ],
)
def test_a_command_of_another_interpreter_is_not_served(commands, first, reason):
    commands.command("", first=first)
    with commands.served() as environment:
        assert environment == commands.environment
    assert commands.log[0].startswith(f"{OFF}{commands.real} {reason}")


@on_linux
def test_a_command_that_is_not_there_is_named(commands):
    with commands.served(command="nowhere") as environment:
        assert environment == commands.environment
    assert commands.log == [OFF + "PATH has no nowhere"]


@on_linux
def test_paths_that_are_too_long_are_named(commands, monkeypatch, tmp_path):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(forking.tempfile, "tempdir", str(long))
    with commands.served() as environment:
        assert environment == commands.environment
    assert (
        f"the path of the socket is too long, set TMPDIR to a shorter one: {long}"
        in (commands.log[0])
    )
    assert list(long.iterdir()) == []
    monkeypatch.setattr(forking.sys, "executable", "/a path/python")
    with commands.served() as environment:
        assert environment == commands.environment
    assert (
        "no script can start /a path/python: too long a path, or a blank in it" in (commands.log[1])
    )


@on_linux
def test_imports_that_take_too_long_are_ended(commands, monkeypatch):
    commands.write("slow", "import time; time.sleep(60)")
    monkeypatch.setattr(forking, "_IMPORTS", 0.2)
    with commands.served("slow") as environment:
        assert environment == commands.environment
    assert commands.log == [OFF + "the imports took more than 0.2 s"]


def test_another_system_than_linux_has_no_fork_server(commands, monkeypatch):
    monkeypatch.setattr(forking.sys, "platform", "darwin")
    with commands.served() as environment:
        assert environment == commands.environment
    assert commands.log == [OFF + "it runs on Linux alone"]


@on_linux
def test_lines_of_imports_come_into_the_log_in_one_line_each(commands):
    commands.write("loud", "import os; os.write(1, b'a \\x1b[31mline\\n\\xff\\n')")
    with commands.served("loud"):
        pass
    assert commands.log[:2] == [r"a \x1b[31mline", "\ufffd"]


WAITING = r"""
    import os, signal, sys, time

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7) if sys.argv[1:] else None)
    os.write(1, f"{os.getpid()}\n".encode())
    while True:
        time.sleep(60)
"""


@on_linux
@pytest.mark.parametrize("obedient", [True, False])
def test_commands_that_still_run_at_the_end_are_ended(commands, monkeypatch, obedient):
    commands.command(WAITING)
    monkeypatch.setattr(forking, "_GRACE", 0.5)
    with commands.served() as environment:
        command = ["probe", "obedient"] if obedient else ["probe"]
        started = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        pid = int(started.stdout.readline())
        over = end_of(pid)
        over.__enter__()
    over.__exit__(None, None, None)
    with started:
        assert started.wait(60) == (7 if obedient else 1)


LAUNCHER = """
    import os, sys, time
    from fedmed_flower.engines.forking import fork_server
    from forked import server_of

    with fork_server(("probe",), (), os.environ, [].append) as environment:
        print(server_of(environment), environment["PATH"].split(":")[0], flush=True)
        import subprocess
        subprocess.Popen(["probe"], env=environment)
        time.sleep(60)
"""


@on_linux
def test_the_server_ends_with_its_last_command_if_its_launcher_is_killed(commands):
    commands.command("import os, sys; os.write(1, b'begun\\n'); sys.exit(len(sys.stdin.read()))")
    commands.command(LAUNCHER, "launcher")
    with subprocess.Popen(
        ["launcher"],
        env=commands.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as launcher:
        pid, shims = launcher.stdout.readline().split()
        assert launcher.stdout.readline() == "begun\n"
        with end_of(int(pid)):
            launcher.send_signal(signal.SIGKILL)
            launcher.wait(60)
            # The command waits for the end of its input.
            launcher.stdin.close()
        launcher.stdout.read()
    # A killed launcher cannot remove its folder.
    assert not (Path(shims).parent / "socket").exists()


def test_the_modules_of_both_sides_can_be_named_without_an_import():
    program = (
        "import sys; from fedmed_flower.engines.forking import HOSPITAL_MODULES, SERVER_MODULES;"
        "print(*HOSPITAL_MODULES, *SERVER_MODULES);"
        "print(*{'torch', 'monai', 'flwr', 'pandas'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    names, loaded = done.stdout.splitlines()
    assert loaded == ""
    assert {"fedmed_flower.clients.tabular", "fedmed_flower.runs.experiment"} <= {*names.split()}
