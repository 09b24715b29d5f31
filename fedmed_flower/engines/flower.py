"""`flwr run` on Flower's simulation engine, with its own SuperLink and a checked outcome."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import tomli_w
from flwr.app import UserConfig

from fedmed_flower.engines.gpu import gpu_share, measure_site
from fedmed_flower.engines.processes import family, living, without_loopback_proxy
from fedmed_flower.errors import InputError, shown

log = logging.getLogger("flwr.fedmed")

_LINK = "fedmed"
# Colour codes in Flower's lines.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_STARTED = re.compile(r"Successfully started run (\d+)")
_ENVIRONMENT = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class EngineError(RuntimeError):
    """Flower's engine could not be started, or its run did not end as completed."""


def run_flower(
    app: Path, config: UserConfig, num_sites: int, on_line: Callable[[str], None]
) -> None:
    """Run an app on Flower's simulation engine and follow its log.

    A SuperLink is started for this run alone, in the current environment and folder, and stopped
    afterwards. The user's Flower configuration is not changed.

    Parameters
    ----------
    app : Path
        Folder of the Flower app.
    config : dict
        The whole run config.
    num_sites : int
        Number of simulated SuperNodes.
    on_line : callable
        Called with each line of the log, without colours and without a line break.

    Raises
    ------
    InputError
        If Ray, which the engine runs on, is not installed.
    EngineError
        If the engine did not start or the run did not end as ``finished:completed``.
    """
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise InputError(
            'the Flower engine needs Ray: pip install "fedmed-flower[simulation]"'
        ) from error
    with _superlink() as (environment, link_log):
        command = [
            _program("flwr"),
            "run",
            str(app),
            _LINK,
            "--stream",
            "--federation-config",
            _federation_config(app, config, num_sites),
        ]
        settings = Path(environment["FLWR_HOME"]) / "run-config.toml"
        settings.write_text(tomli_w.dumps(dict(config)), encoding="utf-8")
        command += ["--run-config", str(settings)]
        with subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            try:
                run_id = _follow(process.stdout or (), on_line)
            except BaseException:
                # Otherwise leaving the block would wait until the run has ended.
                process.kill()
                raise
        if not run_id:
            raise EngineError(f"flwr run did not start the app (exit code {process.returncode})")
        status, details = _outcome(run_id, environment)
        if status != "finished:completed":
            reason = f" ({details})" if details else f"; {_last_line(link_log)}"
            raise EngineError(f"Flower reports {status}{reason}")


def _follow(lines: Iterable[str], on_line: Callable[[str], None]) -> str:
    """Hand on the lines of ``flwr run``; return the run's id, or an empty text if none began."""
    run_id = ""
    for line in lines:
        on_line(shown(_COLOUR.sub("", line.rstrip())))
        if match := _STARTED.search(line):
            run_id = match[1]
    return run_id


def _federation_config(app: Path, config: UserConfig, num_sites: int) -> str:
    """Return the engine's resources: per worker one core, and the share of a GPU a site needs."""
    import torch

    workers = max(1, min(num_sites, os.cpu_count() or 1))
    gpus = torch.cuda.device_count()
    share = 0.0
    if gpus and config.get("device") != "cpu":
        total = min(torch.cuda.get_device_properties(d).total_memory for d in range(gpus))
        share = gpu_share(measure_site(app, config, num_sites), total, gpus, workers)
        log.info("each site is given %g of a GPU", share)
    return (
        f"num-supernodes={num_sites} client-resources-num-cpus=1 client-resources-num-gpus={share}"
    )


@contextmanager
def _superlink() -> Iterator[tuple[dict[str, str], Path]]:
    home = Path(tempfile.mkdtemp(prefix="fedmed-flower-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    link = {"address": f"127.0.0.1:{port}", "insecure": True}
    (home / "config.toml").write_text(
        tomli_w.dumps({"superlink": {"default": _LINK, _LINK: link}}), encoding="utf-8"
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own = {"FLWR_HOME": str(home), "PATH": path}
    environment = without_loopback_proxy(os.environ | _ENVIRONMENT | own)
    command = [_program("flower-superlink"), "--insecure", "--simulation"]
    command += ["--host", "127.0.0.1", "--port", port]
    log = home / "superlink.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        _await(f"http://127.0.0.1:{port}/health", process, log)
        yield environment, log
    finally:
        _stop(process)
        shutil.rmtree(home, ignore_errors=True)


def _await(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            # A proxy of the environment does not reach this machine.
            if httpx.get(url, timeout=2, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise EngineError(f"flower-superlink did not start: {_last_line(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its descendants, by SIGTERM and, after five seconds, by SIGKILL.

    Flower's simulation runs in another session: after a signal to the SuperLink's group alone it
    would go on to train and write.
    """
    alive = family({process.pid}, living())
    for request in (signal.SIGTERM, signal.SIGKILL):
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, request)
        deadline = time.monotonic() + 5
        while alive and time.monotonic() < deadline:
            time.sleep(0.1)
            process.poll()
            alive &= living().keys()


def _outcome(run_id: str, environment: Mapping[str, str]) -> tuple[str, str]:
    command = [_program("flwr"), "ls", _LINK, "--run-id", run_id, "--format", "json"]
    deadline = time.monotonic() + 30
    while True:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        try:
            run = json.loads(done.stdout)["runs"][0]
            status = str(run["status"])
            details = str(run.get("status-details") or "")
        except (ValueError, KeyError, IndexError) as error:
            raise EngineError(f"flwr ls gave no status of run {run_id}: {done.stderr}") from error
        if status.startswith("finished") or time.monotonic() > deadline:
            return status, details
        time.sleep(0.5)


def _program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if not path:
        raise InputError(f"the program {name} is not installed: pip install flwr")
    return path


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it wrote no log"
