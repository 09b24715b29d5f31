"""Measure the GPU memory of one site, so that as many sites share a GPU as fit.

``python -m fedmed_flower.engines.gpu APP SETTINGS SITES OUT`` lets one site of an app train for one
round in its own process, and writes the peak to the file OUT.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from fedmed_flower.engines.local import run_local
from fedmed_flower.engines.project import Project, load_project
from fedmed_flower.server.run_folder import DEFAULT_FOLDER
from fedmed_flower.settings.text import expand

log = logging.getLogger("flwr.fedmed")

# Bytes that CUDA itself takes in each process.
_CONTEXT = 2**29
# Share of a GPU that may be planned; the rest stays free for others.
_USABLE = 0.9


def gpu_share(peak: int, total: int, gpus: int, workers: int) -> float:
    """Return the part of a GPU that each worker is given.

    Parameters
    ----------
    peak : int
        Bytes that one site takes, including those of CUDA itself; 0 if that is not known.
    total : int
        Bytes of a GPU.
    gpus, workers : int
        Their numbers; at least 1 each.

    Returns
    -------
    float
        A little less than 1 / the number of workers that share a GPU, in four decimals, the
        precision of Ray. 1 if a site needs a whole GPU or more.
    """
    sharing = -(-workers // gpus)
    if peak:
        sharing = min(sharing, int(_USABLE * total / peak))
    # A little less, because Flower converts it to single precision, in which 0.2 exceeds a fifth.
    return 9999 // sharing / 10_000 if sharing > 1 else 1.0


def measure_site(app: Path, config: UserConfig, num_sites: int) -> int:
    """Return how many bytes of a GPU one site takes in a round; 0 if measuring fails.

    Parameters
    ----------
    app : Path
        Folder of the Flower app.
    config : dict
        The whole run config.
    num_sites : int
        Number of sites among which the data are split.
    """
    with tempfile.TemporaryDirectory(prefix="fedmed-measure-") as folder:
        settings = Path(folder) / "settings.json"
        out = Path(folder) / "peak.json"
        settings.write_text(json.dumps(dict(config)), encoding="utf-8")
        command = [sys.executable, "-m", "fedmed_flower.engines.gpu"]
        command += [str(app), str(settings), str(num_sites), str(out)]
        # The run folder is for the run that is measured, not for measuring.
        environment = {key: os.environ[key] for key in os.environ if key != DEFAULT_FOLDER}
        subprocess.run(command, capture_output=True, check=False, env=environment)
        return int(json.loads(out.read_text())) if out.exists() else 0


def fitting(app: Path, config: UserConfig, num_sites: int, wanted: int) -> int:
    """Return how many sites may share the GPU at once; all that are wanted if there is none.

    Parameters
    ----------
    app, config, num_sites
        As in `measure_site`.
    wanted : int
        At least 1.

    Returns
    -------
    int
        From 1 to `wanted`. All share the first GPU.
    """
    # This process must not use the GPU itself: workers will be forked from it.
    query = "import torch; n = torch.cuda.device_count(); "
    query += "print(torch.cuda.get_device_properties(0).total_memory if n else 0)"
    found = subprocess.run([sys.executable, "-c", query], capture_output=True, text=True)
    total = int(found.stdout) if found.returncode == 0 else 0
    if not total:
        return wanted
    share = gpu_share(measure_site(app, config, num_sites), total, 1, wanted)
    fits = min(wanted, int(1 / share))
    log.info("%d of %d workers fit on the GPU", fits, wanted)
    return fits


def train_once(project: Project, config: UserConfig, num_sites: int, folder: Path) -> int:
    """Run one round in which only the first site takes part; return how often it trained.

    Parameters
    ----------
    project : Project
        The Flower app.
    config, num_sites
        As in `measure_site`.
    folder : Path
        The run folder is made in it.
    """
    server = project.server_app()
    client = project.client_app()
    trained = 0

    def first_site_alone(message: Message, context: Context) -> Message:
        nonlocal trained
        if context.node_config["partition-id"] != 0 or message.metadata.message_type == "evaluate":
            error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="not measured")
            return Message(error, reply_to=message)
        trained += message.metadata.message_type == "train"
        reply: Message = client(message, context)
        return reply

    once: dict[str, Any] = {"num-server-rounds": 1, "run-dir": str(folder / "run"), "resume": False}
    once |= {"baselines": False, "pictures": 0}
    try:
        run_local(server, _as_app(first_site_alone), num_sites, run_config=expand(config) | once)
    except Exception as error:
        # A rule that needs several replies fails, but only after the site has trained.
        if not trained:
            raise error
    return trained


def _as_app(handle: Callable[[Message, Context], Message]) -> ClientApp:
    app = ClientApp()
    for register in (app.train(), app.evaluate(), app.query("describe"), app.query("pictures")):
        register(handle)
    return app


def main(arguments: list[str]) -> None:
    """Measure one site and write the peak in bytes to a file, as the module docstring describes."""
    import torch

    app, settings, sites, out = arguments
    project = load_project(Path(app))
    config = json.loads(Path(settings).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="fedmed-measure-") as folder:
        train_once(project, config, int(sites), Path(folder))
    devices = range(torch.cuda.device_count())
    peak = max((torch.cuda.max_memory_reserved(device) for device in devices), default=0)
    Path(out).write_text(json.dumps(peak + _CONTEXT if peak else 0))


if __name__ == "__main__":
    main(sys.argv[1:])
