"""``predictor.zip`` of a run folder: all that a prediction needs, in one file.

It holds the weights, what the client declares, the settings that prepare rows, the preparation that
hospitals agreed upon, and how the network is built: by the name of one that this package knows, or
as a graph (`models/graph`). It holds no code, and nothing in it is unpickled.

Nothing in it is new to whoever ran the server: weights, run config and agreed preparation were
there before, and the rest is the app's own text. It holds no patient's data. It is as confidential
as ``model.safetensors``: weights that were trained without privacy can give away whom they were
trained on.
"""

from __future__ import annotations

import json
import logging
import textwrap
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord
from safetensors.torch import load, save
from torch import Tensor, nn

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.errors import InputError
from fedmed_flower.files import (
    MOST_TEXT,
    StoredMembers,
    open_file,
    read_object,
    replacing,
)
from fedmed_flower.models.device import torch_device
from fedmed_flower.models.graph import GraphNetwork, UnsavableError, graph_of
from fedmed_flower.models.weights import read_weights, require_same
from fedmed_flower.prediction.description import Description, UndescribedError
from fedmed_flower.server.run_folder import MODEL, PREDICTOR, SUMMARY, RunFolder

log = logging.getLogger("flwr.fedmed")

FORMAT = 1
_ABOUT = "predictor.json"
_WEIGHTS = MODEL
_GRAPH = "graph.json"
_CONSTANTS = "constants.safetensors"
# Bytes.
_MOST_FILE = 1 << 36
# Sides of an image on which a network is traced that takes images of any size. They differ, so that
# equal sides are not taken for a condition.
_SIDES = {2: (64, 80), 3: (32, 48, 64)}


@dataclass(frozen=True)
class Predictor:
    """A run's model, with all that a prediction needs.

    Attributes
    ----------
    where : str
        The file's name in errors.
    app : str
        Name of the app.
    generated : bool
        Whether the model was trained on generated data.
    description : Description
    state : dict of str to Tensor
        The weights: the state dict of the network.
    graph : dict or None
        As `graph_of` returns it; None if the network is built by name, or could not be saved.
    constants : dict of str to Tensor
        The other tensors of the graph.
    unsaved : str
        Why the app's network could not be saved as a graph; empty if it could, or is built by name.
    """

    where: str
    app: str
    generated: bool
    description: Description
    state: Mapping[str, Tensor]
    graph: Any = None
    constants: Mapping[str, Tensor] | None = None
    unsaved: str = ""

    @classmethod
    def load(cls, path: str | Path) -> Predictor:
        """Read the predictor of a run folder, or a file ``predictor.zip`` by itself.

        A stranger may have written it: it holds no code, and is read with bounds.

        Raises
        ------
        InputError
            If there is none, which names the reason that the run has recorded; or if the file is
            damaged, or of a later version.
        """
        path = Path(path).expanduser()
        file = path / PREDICTOR if path.is_dir() else path
        try:
            with open_file(file.parent, file.name, _MOST_FILE) as stream:
                return _read(StoredMembers(stream), str(file))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(_why_none(path)) from error
        except InputError as error:
            raise InputError(f"{file} cannot be used: {error}") from error
        except Exception as error:  # Readers of a damaged archive raise a dozen different ones.
            reason = error.strerror if isinstance(error, OSError) else error
            raise InputError(
                f"{file} cannot be read ({type(error).__name__}: {reason}): restore it from a copy"
            ) from error

    def with_weights(self, path: str | Path) -> Predictor:
        """Return this predictor with other weights, such as those that a hospital fine-tuned.

        Raises
        ------
        InputError
            If the file is no ``.safetensors``, or not of the same network.
        """
        weights = read_weights(Path(path).expanduser())
        require_same(weights.state, self.state, weights.path, f"the model of {self.where}")
        return replace(self, state=weights.state)

    def client(self, device: str = "cpu", app: type[MedicalClient] | None = None) -> MedicalClient:
        """Return a client that prepares rows, and predicts, as the clients of the run did.

        Parameters
        ----------
        device : str
            As the setting ``device``.
        app : type of MedicalClient, optional
            The app's own class.

        Raises
        ------
        InputError
            As `Description.client`.
        """
        return self.description.client(device, app)

    def network(self, client: MedicalClient, app: bool = False) -> nn.Module:
        """Return the network with its weights, in evaluation mode, on the client's device.

        Parameters
        ----------
        client : MedicalClient
            As `client` returned it.
        app : bool
            Whether the client is the app's own, so that its `build_model` may be called.

        Raises
        ------
        InputError
            If the network is the app's own, could not be saved, and `app` is False; or if weights
            and network do not fit.
        """
        network: nn.Module
        if self.graph is not None:
            network = GraphNetwork(self.graph, self.state, self.constants or {})
        elif self.description.builds and not app:
            raise InputError(
                f"the network of {self.where} is built by the app's own code, and could not be "
                f"saved without it ({self.unsaved}): give the folder of the app, --app FOLDER"
            )
        else:
            with torch.random.fork_rng(devices=[]):
                network = client.build_model()
            require_same(self.state, network.state_dict(), self.where, "the network of the app")
            network.load_state_dict(dict(self.state))
        network.eval()
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        return network.to(torch_device(client.settings))

    def write(self, path: Path) -> None:
        """Write the predictor as one file."""
        about = {
            "format": FORMAT,
            "app": self.app,
            "generated": self.generated,
            "unsaved": self.unsaved,
            "description": asdict(self.description),
        }
        with (
            replacing(path) as temporary,
            zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED) as archive,
        ):
            archive.writestr(_ABOUT, json.dumps(about, indent=1, allow_nan=False))
            archive.writestr(_WEIGHTS, save(_copies(self.state)))
            if self.graph is not None:
                archive.writestr(_GRAPH, json.dumps(self.graph, allow_nan=False))
                archive.writestr(_CONSTANTS, save(_copies(self.constants or {})))


def write_predictor(
    folder: RunFolder, model: Any, arrays: ArrayRecord, seed: int, app: str, generated: bool
) -> str:
    """Write the predictor of a finished run; return why there is none, or an empty text.

    Torch's generators are left as they were. A run is not lost by a predictor that cannot be
    written: whatever goes wrong becomes the reason.

    Parameters
    ----------
    folder : RunFolder
    model : MedicalClient or callable
        As `federate` takes it.
    arrays : ArrayRecord
        The whole model.
    seed : int
        With which the network of the run was built.
    app : str
        Name of the app.
    generated : bool
        Whether no patients stand behind the model.
    """
    try:
        description = Description.of(model)
        client: MedicalClient = getattr(model, "__self__", model)
        state = arrays.to_torch_state_dict()
        predictor = Predictor(PREDICTOR, app, generated, description, state)
        if description.builds:
            predictor = _with_graph(predictor, client, seed)
        if not description.overridden:
            # As somebody else will use it. The app's own class is checked when it is given.
            made = description.client("cpu")
            if predictor.graph is not None or not description.builds:
                predictor.network(made)
    except UndescribedError as error:
        return str(error)
    except Exception as error:  # Of the app, which is not this package's.
        log.debug("no predictor: %s", error, exc_info=True)
        return textwrap.shorten(f"{type(error).__name__}: {error}", 500)
    try:
        predictor.write(folder.path / PREDICTOR)
    except OSError as error:
        return f"{folder.path / PREDICTOR} cannot be written: {error.strerror}"
    return ""


def _with_graph(predictor: Predictor, client: MedicalClient, seed: int) -> Predictor:
    """Return the predictor with the graph of the app's network, or with why there is none."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = client.build_model()
    network.load_state_dict(dict(predictor.state))
    example, free = example_of(client, network)
    try:
        graph, constants = graph_of(network, example, free)
    except UnsavableError as error:
        log.warning(
            "%s holds no network, so a prediction needs the app (--app): %s", PREDICTOR, error
        )
        return replace(predictor, unsaved=str(error))
    return replace(predictor, graph=graph, constants=constants)


def example_of(client: Any, network: nn.Module) -> tuple[Tensor, tuple[int, ...]]:
    """Return a batch of two for a client's network, and the dimensions whose size may differ."""
    example, free = _example_of_images(client, network)
    if not hasattr(client, "bags"):
        return example, free
    # Of each image, a bag of three.
    bags = torch.stack([example, example.flip(-1), 1 - example], dim=1)
    return bags, (0, 1, *(dim + 1 for dim in free if dim))


def _example_of_images(client: Any, network: nn.Module) -> tuple[Tensor, tuple[int, ...]]:
    # Of its own generator, since that of torch is the app's.
    generator = torch.Generator().manual_seed(0)
    if hasattr(client, "schema"):
        return torch.rand(2, client.prepared_by.width, generator=generator), (0,)
    shape = client.image_shape
    channels = shape[0] if shape else _channels(network)
    sides = client.patch_size
    fixed = shape and client.spatial_dims == 2 and not client.imaging.spacing
    # Segmentation pads whole images, and volumes are turned to one orientation.
    if not sides and not hasattr(client, "classes"):
        sides = client.image_size or (shape[1:] if fixed else ())
    if sides:
        return torch.rand(2, channels, *sides, generator=generator), (0,)
    free = (0, *range(2, 2 + client.spatial_dims))
    sides = _SIDES[client.spatial_dims]
    return torch.rand(2, channels, *sides, generator=generator), free


def _channels(network: nn.Module) -> int:
    """Return the number of channels that a network's first convolution takes; 1 if it has none."""
    for layer in network.modules():
        count = getattr(layer, "in_channels", None)
        if isinstance(layer, nn.modules.conv._ConvNd) and isinstance(count, int):
            return count
    return 1


def _read(members: StoredMembers, where: str) -> Predictor:
    about = json.loads(members.pop(_ABOUT, MOST_TEXT))
    if about["format"] != FORMAT:
        raise InputError(
            f"it has the format {str(about['format'])[:20]!r} and this version reads {FORMAT}: "
            "use the version of fedmed-flower that wrote it"
        )
    graph = None
    constants: dict[str, Tensor] = {}
    if _GRAPH in members.left:
        graph = json.loads(members.pop(_GRAPH, MOST_TEXT))
        constants = load(members.pop(_CONSTANTS, _MOST_FILE))
    state = load(members.pop(_WEIGHTS, _MOST_FILE))
    if members.left:
        raise ValueError(f"it has a member {min(members.left)}, which no predictor has")
    return Predictor(
        where,
        str(about["app"])[:200],
        bool(about["generated"]),
        Description.read(about["description"]),
        state,
        graph,
        constants,
        str(about["unsaved"])[:1000],
    )


def _why_none(path: Path) -> str:
    """Return why there is no predictor at a path, and what to do."""
    if not path.exists():
        return f"{path} is not there: give a run folder, or the predictor.zip of one"
    if not (path / SUMMARY).is_file():
        return f"{path} is no run folder: it has no {PREDICTOR} and no {SUMMARY}"
    summary = read_object(path, SUMMARY, "restore it from a copy")
    reason = str(summary.get("predictor") or "")
    if reason:
        return f"{path} has no {PREDICTOR}: {reason}"
    status = str(summary.get("status"))
    if status not in ("finished", "None"):
        return f"{path} has no {PREDICTOR}, as its run is {status}: go on with --resume {path}"
    return (
        f"{path} has no {PREDICTOR}: its app does not call federate, or an earlier version wrote "
        f"the folder: load {MODEL} into the app's own network"
    )


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies: the library refuses tensors that share memory."""
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
