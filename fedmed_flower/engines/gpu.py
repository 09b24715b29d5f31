"""How much of a GPU one site takes, so that as many share one as fit.

``python -m fedmed_flower.engines.gpu APP SETTINGS SITES OUT`` lets one site of an app train a round
in a process of its own and writes what it took.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.object_ref import load_app

from fedmed_flower.engines.local import run_local
from fedmed_flower.errors import InputError

# What CUDA itself takes in each process, and what is left free for others.
_CONTEXT, _USABLE = 2**29, 0.9


def gpu_share(peak: int, total: int, gpus: int, workers: int) -> float:
    """Return the part of a GPU that each worker is given.

    Parameters
    ----------
    peak : int
        Bytes that one site takes, CUDA's own included; 0 if that is not known.
    total : int
        Bytes of a GPU.
    gpus, workers : int
        How many there are; at least 1 each.

    Returns
    -------
    float
        A little less than 1 over how many workers share a GPU, in four decimals, which is as exact
        as Ray counts; 1 if a site needs a whole GPU, or more than there is.
    """
    most = -(-workers // gpus)
    if peak:
        most = min(most, int(_USABLE * total / peak))
    # Flower hands the number on in single precision: 0.2 would be above a fifth.
    return 9999 // most / 10_000 if most > 1 else 1.0


def measure_site(app: Path, config: UserConfig, num_sites: int) -> int:
    """Return how many bytes of a GPU one site takes in a round; 0 if that cannot be found out.

    Parameters
    ----------
    app : Path
        Folder of the Flower app.
    config : dict
        The whole run config.
    num_sites : int
        How many sites the data are split among.
    """
    with tempfile.TemporaryDirectory(prefix="fedmed-measure-") as folder:
        settings, out = Path(folder) / "settings.json", Path(folder) / "peak.json"
        settings.write_text(json.dumps(dict(config)), encoding="utf-8")
        command = [sys.executable, "-m", "fedmed_flower.engines.gpu"]
        command += [str(app), str(settings), str(num_sites), str(out)]
        subprocess.run(command, capture_output=True, check=False)
        return int(json.loads(out.read_text())) if out.exists() else 0


def train_once(
    references: tuple[str, str], app: Path, config: UserConfig, num_sites: int, folder: Path
) -> int:
    """Run one round in which the first site alone takes part; return how often it trained.

    Parameters
    ----------
    references : tuple of str
        Of the app's ServerApp and ClientApp.
    app, config, num_sites
        As `measure_site` takes them.
    folder : Path
        Gets the run folder.
    """
    server, client = (load_app(reference, InputError, app) for reference in references)
    trained = 0

    def first_site_alone(message: Message, context: Context) -> Message:
        nonlocal trained
        if context.node_config["partition-id"] != 0 or message.metadata.message_type == "evaluate":
            text = "not measured"
            error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=text)
            return Message(error, reply_to=message)
        trained += message.metadata.message_type == "train"
        reply: Message = client(message, context)
        return reply

    once: dict[str, Any] = {"num-server-rounds": 1, "run-dir": str(folder / "run"), "resume": False}
    once |= {"baselines": False, "pictures": 0}
    known = {key: value for key, value in once.items() if key in config}
    try:
        run_local(server, _as_app(first_site_alone), num_sites, run_config=dict(config) | known)
    except Exception as error:
        # A rule that needs more than one reply fails: what the site took is known all the same.
        if not trained:
            raise error
    return trained


def _as_app(handle: Callable[[Message, Context], Message]) -> ClientApp:
    app = ClientApp()
    for register in (app.train(), app.evaluate(), app.query("describe"), app.query("pictures")):
        register(handle)
    return app


def main(arguments: list[str]) -> None:
    """Measure one site, as the module says."""
    import torch

    from fedmed_flower.engines.project import load_project

    app, settings, sites, out = arguments
    _, _, references = load_project(Path(app))
    config = json.loads(Path(settings).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="fedmed-measure-") as folder:
        train_once(references, Path(app), config, int(sites), Path(folder))
    devices = range(torch.cuda.device_count())
    peak = max((torch.cuda.max_memory_reserved(device) for device in devices), default=0)
    Path(out).write_text(json.dumps(peak + _CONTEXT if peak else 0))


if __name__ == "__main__":
    main(sys.argv[1:])
