"""One SuperLink and several SuperNodes on one machine, with TLS and node authentication.

Every command that it runs is printed as it would be typed. On real machines the SuperLink's
commands belong to the server and each SuperNode's to its hospital: see the README beside this file.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Set
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import typer
from keys import make_certificates, make_site_key, write

from fedmed_flower.engines.processes import family, living, without_loopback_proxy
from fedmed_flower.engines.project import load_project
from fedmed_flower.errors import InputError, shown
from fedmed_flower.settings.registry import Sectioned, defaults
from fedmed_flower.settings.text import override

HOST = "127.0.0.1"
CONNECTION = "consortium"
NAMES = ("north", "south", "east", "west")
NAME = re.compile(r"[A-Za-z0-9_-]{1,40}")
READY_SECONDS, STOP_SECONDS = 180, 8
SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}

app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Option("--dir", help="Where keys, logs and process numbers lie.")]


@app.command()
def start(
    directory: Folder = Path("deployment"),
    sites: Annotated[
        int | None,
        typer.Option(min=1, help="Number of hospitals; else a folder of data each, or 3."),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(help="A folder with one folder for each hospital, its name; else DIR/data."),
    ] = None,
    port_base: Annotated[int | None, typer.Option(min=1024, help="First port; else any.")] = None,
    node_config: Annotated[
        str, typer.Option(help="More of every node config; {site} stands for the hospital's name.")
    ] = "",
    approvals: Annotated[
        Path | None,
        typer.Option(help="A folder with each hospital's list of approved apps, by its name."),
    ] = None,
    no_fork_server: Annotated[
        bool, typer.Option("--no-fork-server", help="Start each app process with all imports.")
    ] = False,
    no_launchers: Annotated[
        bool, typer.Option("--no-launchers", help="Start Flower's commands without `fedmed`.")
    ] = False,
) -> None:
    """Make the keys, start everything and wait until all hospitals are online."""
    directory = directory.expanduser().resolve()
    if live_processes(directory):
        raise InputError(f"a deployment is already running in {directory}: use stop first")
    (directory / "processes.json").unlink(missing_ok=True)
    if data_root is not None and not data_root.expanduser().is_dir():
        raise InputError(f"data-root is not a folder: {data_root}")
    given = data_root is not None
    data_root = (data_root or directory / "data").expanduser().resolve()
    if set('"\\\n') & set(str(data_root)):
        raise InputError(f"data-root must hold no quote, backslash or newline, got {data_root}")
    names = hospitals(data_root, sites, given)
    port, *site_ports = choose_ports(1 + len(names), port_base)
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    make_certificates(directory / "server")
    for name in names:
        (data_root / name).mkdir(parents=True, exist_ok=True)
        make_site_key(directory / "sites" / name)
    connection = f'[superlink.{CONNECTION}]\naddress = "{HOST}:{port}"\n'
    connection += f"root-certificates = {json.dumps(str(directory / 'server' / 'ca.crt'))}\n"
    write(directory / "flwr-home" / "config.toml", connection)
    own = environment(directory)
    exported = {key: own[key] for key in (*SETTINGS, "no_proxy", "NO_PROXY")}
    print("$ export " + " ".join(f"{key}={shlex.quote(value)}" for key, value in exported.items()))
    ours = ["--no-fork-server"] if no_fork_server else []
    link = ["flower-superlink"] if no_launchers else ["fedmed", "link", *ours]
    node = ["flower-supernode"] if no_launchers else ["fedmed", "node", *ours]
    try:
        launch(directory, "superlink", port, [*link, *superlink_options(directory, port)])
        wait_until(directory, lambda: is_listening(port), f"the SuperLink listens on port {port}")
        nodes = {name: register(directory, name) for name in names}
        for name, site_port in zip(names, site_ports, strict=True):
            options = supernode_options(
                directory, name, data_root / name, port, site_port, node_config
            )
            listed = ["--approvals", str(approvals / name)] if approvals else []
            launch(directory, name, site_port, [*node, *listed, *options], nodes[name])
        wait_until(
            directory,
            lambda: set(site_states(directory).values()) == {"online"},
            "all SuperNodes are online",
        )
    except BaseException:
        stop(directory)
        raise
    print(f"The hospitals: {', '.join(names)}. Their data: {data_root}. Logs: {directory / 'logs'}")


@app.command()
def run(
    app_path: Annotated[Path, typer.Argument(metavar="APP", help="Folder of a Flower app.")],
    directory: Folder = Path("deployment"),
    config: Annotated[list[str] | None, typer.Option("-c", help="KEY=VALUE, repeatable.")] = None,
) -> None:
    """Run an app and exit with 0 only where its run ended as finished:completed."""
    directory = running(directory)
    settings = run_config(app_path, config or [], directory)
    command = show(["flwr", "run", str(app_path), CONNECTION, "--stream", *settings], directory)
    run_id, own = "", environment(directory)
    with subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            run_id = run_id or "".join(re.findall(r"^Successfully started run (\d+)", line))
    if not run_id:
        raise RuntimeError(f"flwr run started no run of {app_path}: see its message above")
    report = flwr_json(directory, "ls", CONNECTION, "--run-id", run_id)["runs"][0]
    print(f"Run {run_id} ended as {report['status']}, details: {report['status-details']}")
    if report["status"] != "finished:completed":
        print_errors(directory)
        raise typer.Exit(1)


def run_config(app_path: Path, texts: list[str], directory: Path) -> list[str]:
    """Write what is set to a file and return Flower's option for it.

    What the app does not declare goes into its text `settings`.
    """
    project = load_project(app_path)
    client = project.client_app()
    known = defaults(client.sections) if isinstance(client, Sectioned) else {}
    config = override(project.declared, texts, known)
    changed = {key: value for key, value in config.items() if value != project.declared[key]}
    if not changed:
        return []
    path = directory / "run-config.toml"
    write(path, tomli_w.dumps(changed))
    return ["--run-config", str(path)]


@app.command()
def status(directory: Folder = Path("deployment")) -> None:
    """Say which processes live and which hospitals are online; exit 1 where one is not."""
    directory = running(directory)
    processes, live = read_processes(directory), live_processes(directory)
    states = site_states(directory) if processes["superlink"]["pid"] in live else {}
    for name, p in processes.items():
        state = "running" if p["pid"] in live else "dead"
        print(f"{name:10} pid {p['pid']:<8} port {p['port']:<6} {state:8} {states.get(name, '')}")
    if set(states.values()) != {"online"} or any(p["pid"] not in live for p in processes.values()):
        raise typer.Exit(1)


@app.command()
def stop(directory: Folder = Path("deployment")) -> None:
    """Ask every process to end, kill what is left some seconds later; keys and logs stay."""
    directory = directory.expanduser().resolve()
    if not read_processes(directory):
        print(f"Nothing is running in {directory}.")
        return
    alive = asked = live_processes(directory)
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 2 * STOP_SECONDS)):
        # Who keeps a fork server ends after the others, and leaves no folder.
        targets = alive - keepers() if number == signal.SIGKILL else alive
        forced = len(targets)
        for pid in targets:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while alive and time.monotonic() < deadline:
            time.sleep(0.2)
            alive = live_processes(directory, asked)
    (directory / "processes.json").unlink()
    print(f"Stopped {len(asked)} processes, {forced} of them by force. Kept: {directory}")


def hospitals(data_root: Path, sites: int | None, given: bool) -> list[str]:
    """Return the hospitals' names: those of the folders in `data_root`, else made-up ones.

    Raises
    ------
    InputError
        If `given`, and there are no folders or another number than `sites`; if a name is unusable.
    """
    folders = sorted(data_root.iterdir()) if data_root.is_dir() else []
    names = [each.name for each in folders if each.is_dir() and not each.name.startswith(".")]
    if not names and given:
        raise InputError(f"{data_root} has no folders: make one for each hospital, named after it")
    if not names:
        count = sites or 3
        return [*NAMES[:count]] if count <= len(NAMES) else [f"site-{i + 1}" for i in range(count)]
    if sites not in (None, len(names)):
        raise InputError(f"--sites is {sites}, and {data_root} has the folders {', '.join(names)}")
    for name in names:
        if not NAME.fullmatch(name):
            raise InputError(
                f"a hospital's name must be up to 40 letters, digits, - and _: got {name!r}, a "
                f"folder of {data_root}"
            )
    return names


def print_errors(directory: Path) -> None:
    """Print the last error line of each hospital's log, which the server is not sent."""
    for name in read_processes(directory):
        log = directory / "logs" / f"{name}.log"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if re.search(r"Error|ERROR", line)]
        if errors and name != "superlink":
            print(f"{name}: {shown(errors[-1].strip(), 300)}\n  all of it: {log}")


def superlink_options(directory: Path, port: int) -> list[str]:
    """Return the options of the server's command."""
    own = directory / "server"
    return [
        *("--host", HOST, "--port", str(port), "--enable-supernode-auth"),
        *("--ssl-ca-certfile", str(own / "ca.crt")),
        *("--ssl-certfile", str(own / "server.crt"), "--ssl-keyfile", str(own / "server.key")),
    ]


def supernode_options(
    directory: Path, name: str, data: Path, port: int, own: int, more: str = ""
) -> list[str]:
    """Return the options of one hospital's command.

    `own` is the port between the SuperNode and its ClientApp.
    """
    config = f'site-name="{name}" data-dir="{data}" {more.replace("{site}", name)}'
    return [
        *("--superlink", f"{HOST}:{port}", "--host", HOST, "--port", str(own)),
        *("--root-certificates", str(directory / "server" / "ca.crt")),
        *("--auth-supernode-private-key", str(directory / "sites" / name / "key")),
        *("--node-config", config.strip()),
    ]


def register(directory: Path, name: str) -> str:
    """Tell the SuperLink a hospital's public key; return the node's number."""
    key = str(directory / "sites" / name / "key.pub")
    answer = flwr_json(directory, "supernode", "register", key, CONNECTION, "--name", name)
    return str(answer["node-id"])


def site_states(directory: Path) -> dict[str, str]:
    """Return what the SuperLink says of each started hospital, such as online or offline."""
    answer = flwr_json(directory, "supernode", "list", CONNECTION, quiet=True)
    states = {node["node-id"]: node["status"] for node in answer["nodes"]}
    processes = read_processes(directory)
    return {n: states.get(p["node"], "gone") for n, p in processes.items() if p["node"]}


def choose_ports(count: int, base: int | None) -> list[int]:
    """Return the ports from `base` on, or free ones; refuse where one is taken."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for offset, bound in enumerate(sockets):
            port = 0 if base is None else base + offset
            try:
                bound.bind((HOST, port))
            except (OSError, OverflowError) as error:
                text = f"port {port} of {HOST} cannot be used, {error}: give another --port-base"
                raise InputError(text) from error
        return [bound.getsockname()[1] for bound in sockets]


def environment(directory: Path, home: str = "flwr-home") -> dict[str, str]:
    """Return this process's environment with our settings and a Flower home of our own."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    own = {"PATH": path, "FLWR_HOME": str(directory / home)}
    return without_loopback_proxy(os.environ | SETTINGS | own)


def show(command: list[str], directory: Path, home: str = "flwr-home") -> list[str]:
    """Print a command as it would be typed and return it."""
    print(f"$ FLWR_HOME={shlex.quote(str(directory / home))} {shlex.join(command)}", flush=True)
    return command


def flwr_json(directory: Path, *arguments: str, quiet: bool = False) -> dict[str, Any]:
    """Run a `flwr` command and return its answer; raise RuntimeError where it fails."""
    command = ["flwr", *arguments, "--format", "json"]
    if not quiet:
        show(command, directory)
    done = subprocess.run(command, env=environment(directory), capture_output=True, text=True)
    if done.returncode or '"success": true' not in done.stdout:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stdout}{done.stderr}")
    return dict(json.loads(done.stdout))


def launch(directory: Path, name: str, port: int, command: list[str], node: str = "") -> None:
    """Start one lasting process with its own log and write down its number."""
    home = "server/flwr-home" if name == "superlink" else f"sites/{name}/flwr-home"
    with (directory / "logs" / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            show(command, directory, home),
            env=environment(directory, home),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    processes = read_processes(directory)
    processes[name] = {"pid": process.pid, "port": port, "node": node}
    write(directory / "processes.json", json.dumps(processes, indent=2))


def wait_until(directory: Path, ready: Callable[[], bool], what: str) -> None:
    """Wait for `ready`; raise RuntimeError with the end of the log where a process dies."""
    deadline = time.monotonic() + READY_SECONDS
    while not ready():
        live = live_processes(directory)
        dead = [n for n, p in read_processes(directory).items() if p["pid"] not in live]
        if dead or time.monotonic() > deadline:
            log = directory / "logs" / f"{dead[0] if dead else 'superlink'}.log"
            reason = f"{dead[0]} ended" if dead else f"{READY_SECONDS} seconds passed"
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{reason} before {what}. The end of {log}:\n{tail}")
        time.sleep(0.3)
    print(what[0].upper() + what[1:] + ".", flush=True)


def is_listening(port: int) -> bool:
    """Return whether a program on this machine accepts connections on the port."""
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def read_processes(directory: Path) -> dict[str, Any]:
    """Return what was started, by name; empty where nothing was."""
    path = directory / "processes.json"
    return json.loads(path.read_text()) if path.exists() else {}


def running(directory: Path) -> Path:
    """Return the folder of a started deployment, or raise InputError."""
    directory = directory.expanduser().resolve()
    if not read_processes(directory):
        raise InputError(f"nothing was started in {directory}: use start, or give its --dir")
    return directory


def live_processes(directory: Path, known: Set[int] = frozenset()) -> set[int]:
    """Return the numbers of the deployment's living processes, their children included.

    A recorded number whose command no longer names the folder was given to a stranger meanwhile.
    """
    table = living()
    recorded = {entry["pid"] for entry in read_processes(directory).values()}
    # A process that has ended may have left children.
    ours = {pid for pid in recorded if pid not in table or str(directory) in table[pid].command}
    return family(ours | known, table)


def keepers() -> set[int]:
    """Return the numbers of the processes that keep the fork server of another one."""
    return {n for n, each in living().items() if re.search(r"/fedmed (link|node) ", each.command)}


if __name__ == "__main__":
    try:
        app()
    except (InputError, RuntimeError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
