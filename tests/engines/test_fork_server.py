import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import Commands, end_of, run, server_of

from fedmed_flower.engines.fork_client import LENGTHS, SOCKET

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="runs on Linux alone")
# What the server imports in these tests: it leaves what imports may leave.
PRELOADED = """
    import logging, random, sys, warnings, multiprocessing, tempfile, json, uuid

    import fedmed_flower.engines.fork_server

    generator = random.Random()
    logging.getLogger("preloaded").addHandler(logging.StreamHandler())
    logging.basicConfig(stream=sys.stdout)
    warnings.filterwarnings("ignore", "of preloaded")
"""


@pytest.fixture
def commands(tmp_path):
    return Commands(tmp_path)


@pytest.fixture
def echo(commands):
    """A command that says by whom it was started, and with what."""
    commands.command("import os, sys; print(os.getppid(), sys.argv[1:])")
    return commands


def is_served(done, environment):
    return done.stdout.split()[0] == str(server_of(environment))


# As a new process


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"PYTHONUNBUFFERED": "1"},
        # Python then sets LC_CTYPE itself, also in the processes that start the command.
        {"LC_ALL": "", "LANG": "C"},
        {"PYTHONIOENCODING": "latin-1:replace", "PYTHONFAULTHANDLER": "1"},
        {"PYTHONSAFEPATH": "1"},
    ],
)
def test_a_child_finds_what_a_new_process_finds(tmp_path, variables):
    commands = Commands(tmp_path, **variables)
    commands.write("preloaded", PRELOADED)
    commands.command("import preloaded, probe\nif __name__ == '__main__': probe.main()")
    arguments = ("--x", "", "\udcff", "a b")
    where = tmp_path / "where"
    where.mkdir()

    def state(command):
        with (tmp_path / "in").open("w+") as given:
            given.write("some lines")
            given.seek(5)
            done = run(environment, *arguments, command=command, cwd=where, stdin=given)
        assert done.stderr == ""
        return json.loads(done.stdout)

    with commands.served("preloaded") as environment:
        fresh, fresh_numbers, _ = state(commands.real)
        _, again, _ = state(commands.real)
        child, numbers, names = state("probe")
        second, others, _ = state("probe")
        assert commands.log[-1].startswith("fork server: ")
    assert child.keys() == fresh.keys()
    assert {n: (v, fresh[n]) for n, v in child.items() if v != fresh[n]} == {}
    assert second == child
    assert numbers.keys() == fresh_numbers.keys() >= {"preloaded.generator"}
    for name, value in numbers.items():
        assert len({value, others[name], fresh_numbers[name], again[name]}) == 4, name
    assert "preloaded" in names


# How it ends


ENDINGS = {
    "returns": "print('all')",
    "code": "sys.exit(3)",
    "large code": "sys.exit(515)",
    "text": "sys.exit('wrong')",
    "nothing": "sys.exit()",
    "error": "print('before')\n1 / 0",
    "at once": "print('lost')\nos._exit(7)",
    "abort": (
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\nos.kill(os.getpid(), signal.SIGABRT)"
    ),
    "interrupted": "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)",
    "at exit": "atexit.register(print, 'second')\natexit.register(print, 'first')",
    "error at exit": "atexit.register(lambda: 1 / 0)",
    "thread": "threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
    "threads at exit": (
        "pool = concurrent.futures.ThreadPoolExecutor()\npool.submit(lambda: print('in a thread'))"
    ),
    "file left open": "kept.append(open('left', 'w'))\nkept[0].write('whole')",
    "file of C": "ctypes.CDLL(None).printf(b'of C')",
    "closed": "sys.stdout.close()\nsys.stderr.write('still there')",
    "full": "sys.stdout = open('/dev/full', 'w')\nprint('lost')",
    "full, with a code": "sys.stdout = open('/dev/full', 'w')\nprint('lost')\nsys.exit(4)",
    "a child of its own": (
        "os.fork() or sys.exit(5)\nprint(os.waitstatus_to_exitcode(os.wait()[1]))"
    ),
    "a process of its own": (
        "p = multiprocessing.get_context('spawn').Process(target=print, args=('spawned',))\n"
        "p.start()\np.join()\nprint(p.exitcode)"
    ),
    "input": "print(sys.stdin.read().upper())",
}


def test_a_command_ends_as_a_new_process_ends(commands, tmp_path):
    blocks = "".join(
        f"    if case == {name!r}:\n" + "".join(f"        {line}\n" for line in text.split("\n"))
        for name, text in ENDINGS.items()
    )
    commands.command(
        "import atexit, concurrent.futures, ctypes, multiprocessing, os, resource, signal, sys\n"
        "import threading, time\n"
        "kept = []\n"
        "def main(case):\n"
        f"{blocks}"
        "if __name__ == '__main__':\n"
        "    main(sys.argv[1])\n"
    )
    outcomes = {}
    with commands.served("concurrent.futures", "multiprocessing") as environment:
        for command in ("probe", commands.real):
            for case in ENDINGS:
                (tmp_path / "left").unlink(missing_ok=True)
                done = run(environment, case, command=command, cwd=tmp_path, input="given")
                left = (tmp_path / "left").read_text() if (tmp_path / "left").exists() else None
                said = re.sub("0x[0-9a-f]+", "ADDRESS", done.stderr)
                outcomes[command, case] = (done.returncode, done.stdout, said, left)
        assert len(commands.log) == 1
    for case in ENDINGS:
        assert outcomes["probe", case] == outcomes[commands.real, case], case
    assert outcomes["probe", "code"][0] == 3
    assert outcomes["probe", "abort"][0] == -signal.SIGABRT
    assert outcomes["probe", "file left open"][3] == "whole"
    assert outcomes["probe", "error"][2].count("probe") == 2


WAITING = r"""
    import os, signal, sys, time

    def tell(number, frame):
        os.write(1, f"told {number}\n".encode())
        sys.exit(number + 40)

    for number in map(int, sys.argv[1:]):
        signal.signal(number, tell)
    os.write(1, f"{os.getpid()}\n".encode())
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_the_command(commands, number):
    commands.command(WAITING)
    with commands.served() as environment:
        for handled in (["probe", str(number.value)], ["probe"]):
            with subprocess.Popen(
                handled, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as started:
                pid = int(started.stdout.readline())
                assert pid != started.pid
                with end_of(pid):
                    started.send_signal(number)
                rest, errors = started.communicate(timeout=60)
            found = (rest, started.returncode, errors.split("\n")[-2:])
            if len(handled) > 1:
                assert found == (f"told {number.value}\n", number + 40, [""])
            else:
                errors = ["KeyboardInterrupt", ""] if number == signal.SIGINT else [""]
                assert found == ("", -number, errors)


def test_an_ignored_signal_stays_ignored(commands):
    commands.command("import signal; print(signal.getsignal(signal.SIGINT))")
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with commands.served() as environment:
            done = run(environment)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert done.stdout == "1\n"
    assert done.stderr == ""


def test_a_child_is_killed_with_the_process_that_asked_for_it(commands):
    commands.command(WAITING)
    with commands.served() as environment:
        with subprocess.Popen(
            ["probe", str(signal.SIGTERM.value)], env=environment, stdout=subprocess.PIPE, text=True
        ) as started:
            with end_of(int(started.stdout.readline())):
                started.kill()
            assert started.stdout.read() == ""
        assert started.returncode == -signal.SIGKILL


def test_a_command_ends_with_its_server(commands):
    commands.command(WAITING)
    with commands.served() as environment:
        with subprocess.Popen(
            ["probe"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as started:
            pid = int(started.stdout.readline())
            with end_of(pid):
                os.kill(server_of(environment), signal.SIGKILL)
            _, said = started.communicate(timeout=60)
        assert started.returncode == 1
        assert said == "probe: the fork server ended while the command ran\n"
        ended = "the fork server has ended (-9): from now on each command is a new process"
        deadline = time.monotonic() + 60
        while commands.log[-1] != ended and time.monotonic() < deadline:
            time.sleep(0.01)
    assert commands.log[-1] == ended


# When a new process is started in its place


def test_a_variable_that_differs_makes_a_new_process(echo):
    with echo.served() as environment:
        assert is_served(run(environment, "x"), environment)
        for other, name in (
            ({**environment, "OMP_NUM_THREADS": "7 of a kind"}, "OMP_NUM_THREADS"),
            ({**environment, "TMPDIR": str(echo.folder)}, "TMPDIR"),
            ({n: t for n, t in environment.items() if n != "JE_ARROW_MALLOC_CONF"}, "JE_ARROW"),
        ):
            done = run(other, "x")
            assert not is_served(done, environment)
            assert done.stdout.endswith("['x']\n")
            assert re.fullmatch(
                rf"probe: a new process instead of the fork server: {name}\w* differs in the "
                r"environment\n",
                done.stderr,
            )


def test_a_variable_that_the_imports_have_set_may_come_from_elsewhere(echo):
    echo.write("setting", "import os; os.environ['SET_BY_AN_IMPORT'] = 'this'")
    with echo.served("setting") as environment:
        assert is_served(run({**environment, "SET_BY_AN_IMPORT": "this"}), environment)
        assert not is_served(run({**environment, "SET_BY_AN_IMPORT": "that"}), environment)


def test_a_variable_that_flower_sets_may_have_any_value(commands):
    commands.command("import os; print(os.getppid(), os.environ.get('BROWSER_USE_SETUP_LOGGING'))")
    with commands.served() as environment:
        for value in ("false", None, "true"):
            given = {} if value is None else {"BROWSER_USE_SETUP_LOGGING": value}
            done = run({**environment, **given})
            assert done.stdout == f"{server_of(environment)} {value}\n"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("os.umask(0o117)", "Umask"),
        ("resource.setrlimit(resource.RLIMIT_NOFILE, (99, 99))", "Max open files"),
        ("os.nice(1)", "nice value"),
        ("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])", "SigBlk"),
        ("signal.signal(signal.SIGUSR2, signal.SIG_IGN)", "SigIgn"),
    ],
)
def test_what_a_process_was_given_otherwise_makes_a_new_process(echo, change, name):
    with echo.served() as environment:
        program = f"import os, resource, signal; {change}; os.execvp('probe', ['probe'])"
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.stdout
        assert not is_served(done, environment)
    assert done.stderr == (f"probe: a new process instead of the fork server: {name} differs\n")


def test_a_relative_path_of_modules_is_that_of_one_folder(echo, tmp_path):
    echo.environment["PYTHONPATH"] += os.pathsep + "modules"
    with echo.served() as environment:
        assert is_served(run(environment), environment)
        done = run(environment, cwd=tmp_path.parent)
        assert not is_served(done, environment)
    what = "the folder to which parts of PYTHONPATH are relative"
    assert done.stderr == f"probe: a new process instead of the fork server: {what} differs\n"


def test_packages_of_the_app_are_installed_in_a_new_process(echo):
    with echo.served() as environment:
        done = run(environment, "--allow-runtime-dependency-installation")
        assert not is_served(done, environment)
    assert "the app's own packages may be installed" in done.stderr


def test_a_changed_module_makes_a_new_process(echo):
    module = echo.write("changing", "x = 1")
    with echo.served("changing") as environment:
        assert is_served(run(environment), environment)
        module.write_text("x = 12")
        done = run(environment)
        assert not is_served(done, environment)
    assert f"{module} has changed since the fork server imported it" in done.stderr


def test_an_installed_package_makes_a_new_process(echo):
    with echo.served() as environment:
        (echo.folder / "lib" / "new-1.dist-info").mkdir()
        done = run(environment)
        assert not is_served(done, environment)
    assert "new-1.dist-info has changed since the fork server started" in done.stderr


def test_a_command_of_another_name_or_folder_is_not_served(echo, tmp_path):
    with echo.served() as environment:
        other = tmp_path / "other"
        other.mkdir()
        (other / "probe").write_text(f"#!{sys.executable}\nimport os; print(os.getppid())")
        (other / "probe").chmod(0o755)
        shims, rest = environment["PATH"].split(os.pathsep, 1)
        path = os.pathsep.join([shims, str(other), rest])
        done = run({**environment, "PATH": path})
        assert not is_served(done, environment)
    assert "was started for another command" in done.stderr


def test_a_dead_or_silent_server_makes_a_new_process(echo):
    with echo.served() as environment:
        shim = Path(environment["PATH"].split(os.pathsep)[0]) / "probe"
        text = shim.read_text()
        assert "PATIENCE = 20.0\n" in text
        shim.write_text(text.replace("PATIENCE = 20.0\n", "PATIENCE = 0.2\n"))
        pid = server_of(environment)
        os.kill(pid, signal.SIGSTOP)
        # Not into a pipe, whose end the stopped server would hold.
        with (echo.folder / "out").open("w+") as out:
            try:
                run(environment, capture_output=False, stdout=out, stderr=out)
            finally:
                os.kill(pid, signal.SIGCONT)
            # The server reads what was asked of it, and does nothing.
            assert is_served(run(environment, "later"), environment)
            out.seek(0)
            reason, line = out.read().splitlines()
        assert reason.endswith("no answer (timed out)")
        assert line == f"{os.getpid()} []"
        with end_of(pid):
            os.kill(pid, signal.SIGKILL)
        done = run(environment)
        assert done.stdout.endswith("[]\n")
        assert "it cannot be reached (" in done.stderr


def test_a_socket_that_others_can_reach_is_not_used(echo):
    with echo.served() as environment:
        folder = Path(environment[SOCKET]).parent
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.chmod(0o755)
        done = run(environment)
        assert not is_served(done, environment)
        folder.chmod(0o700)
    assert "the socket's folder is open to other users" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_is_not_served(echo):
    with echo.served() as environment:
        Path(environment[SOCKET]).parent.chmod(0o711)
        Path(environment[SOCKET]).chmod(0o777)
        with socket.socket(socket.AF_UNIX) as asking:
            os.seteuid(65534)
            try:
                asking.connect(environment[SOCKET])
            finally:
                os.seteuid(0)
            asking.settimeout(30)
            assert asking.recv(1) == b""


# Requests that are none


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0\0",
        LENGTHS.pack(2**31, 2**31),
        LENGTHS.pack(3, 3) + b"abc",
        LENGTHS.pack(1, 1) + b"abcdef",
        LENGTHS.pack(1, 1) + b"ab",
        b"\xff" * 100_000,
    ],
)
def test_a_stuck_or_wrong_request_stops_nobody(echo, sent):
    with echo.served() as environment, socket.socket(socket.AF_UNIX) as stuck:
        stuck.connect(environment[SOCKET])
        stuck.sendall(sent)
        assert is_served(run(environment), environment)


def test_a_request_that_does_not_become_whole_is_dropped(commands, monkeypatch):
    commands.command("print('never')")
    program = """
        from fedmed_flower.engines import fork_server

        fork_server.ASKING = 0.05
    """
    commands.write("impatient", program)
    with commands.served("impatient") as environment, socket.socket(socket.AF_UNIX) as stuck:
        stuck.connect(environment[SOCKET])
        stuck.sendall(b"\0")
        stuck.settimeout(30)
        assert stuck.recv(1) == b""


def test_no_more_requests_are_read_at_a_time_than_the_bound(echo):
    with echo.served() as environment:
        held = [socket.socket(socket.AF_UNIX) for _ in range(64)]
        try:
            for each in held:
                each.connect(environment[SOCKET])
            done = run(environment)
            assert done.stdout.endswith("[]\n")
            assert "a new process" in done.stderr
        finally:
            for each in held:
                each.close()
        assert is_served(run(environment), environment)


def test_a_hundred_commands_leave_nothing_behind(commands):
    commands.command("")
    with commands.served() as environment:
        pid = server_of(environment)

        def kept():
            status = Path(f"/proc/{pid}/status").read_text()
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            size = int(re.search(r"VmRSS:\s+(\d+)", status)[1])
            return len(list(Path(f"/proc/{pid}/fd").iterdir())), children, size

        run(environment)
        before = kept()
        for _ in range(10):
            started = [subprocess.Popen(["probe"], env=environment) for _ in range(10)]
            assert [each.wait(60) for each in started] == [0] * 10
        after = kept()
    # The connection by which the test asked for the number may still be open before.
    assert after[0] <= before[0]
    assert after[1] == ""
    # KiB; a request alone has several.
    assert after[2] < before[2] + 500
