"""The model at the start of a run: fresh, or with weights from another run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from flwr.app import ArrayRecord, UserConfig
from torch import nn

from fedmed_flower.data.outlying import Outlying
from fedmed_flower.errors import InputError
from fedmed_flower.methods.kept import kept_names
from fedmed_flower.models.adapters import Adapters, add_adapters
from fedmed_flower.models.trainable import Travelling
from fedmed_flower.models.weights import Weights, read_weights, require_same
from fedmed_flower.server.run_folder import MODEL
from fedmed_flower.settings.model import ModelSettings


@runtime_checkable
class Modeller(Protocol):
    """An object that makes the model of a run, such as a `MedicalClient`."""

    agreed: str

    @property
    def must_agree(self) -> bool:
        """Whether the model depends on contributions of the sites before the first round."""

    def columns_to_sum(self) -> Sequence[str]:
        """Return the columns whose moments are all of a contribution; an error if it is more."""

    def agree(self, contributions: dict[str, dict[str, Any]]) -> str:
        """Return what is agreed, made of all sites' contributions and the same at each site."""

    def outlying(
        self, contributions: dict[str, dict[str, Any]], rows: dict[str, int]
    ) -> list[Outlying]:
        """Return the sites whose contribution stands out; `rows` are their training rows."""

    def build_model(self) -> nn.Module:
        """Return the network with fresh weights."""


class StartModel(NamedTuple):
    """The model at the start of a run.

    Attributes
    ----------
    initial : ArrayRecord
        The part that travels.
    frozen : str
        Digest of the part that does not travel; empty if all of the model travels.
    whole : ArrayRecord
        The whole model; empty if all of it travels.
    buffers : frozenset of str
        Keys of its buffers, which are averaged and not trained.
    kept : tuple of str
        Keys of the layers that stay different at each site.
    adapters : Adapters
        What of the part that travels stands for weights of the network.
    about : dict
        Its class, the numbers of its weights, of those that travel, and of the bytes that do; the
        bytes of the network whole, without adapters.
    """

    initial: ArrayRecord
    frozen: str
    whole: ArrayRecord
    buffers: frozenset[str]
    kept: tuple[str, ...]
    adapters: Adapters
    about: dict[str, Any]

    def part_of(self, weights: Weights) -> ArrayRecord:
        """Return the part that travels of other weights of this network, such as a hospital's own.

        Raises
        ------
        InputError
            If the weights are of another network, or another part of them differs than travels.
        """
        if self.adapters.layers:
            raise InputError(
                f"{weights.path} holds the network with its adapters (lora) merged into weights "
                "that do not travel"
            )
        wanted = (self.whole or self.initial).to_torch_state_dict()
        require_same(weights.state, wanted, weights.path, "the network of this run")
        for name, value in sorted(weights.state.items()):
            if name not in self.initial and not torch.equal(value, wanted[name]):
                raise InputError(
                    f"{weights.path} has other values of {name} than the network of this run, "
                    "and that entry does not travel: trainable does not name it"
                )
        return ArrayRecord({name: weights.state[name] for name in self.initial})


def start_model(
    model: Modeller | Callable[[], nn.Module],
    agreed: str,
    config: UserConfig,
    seed: int,
    weights: Weights | None = None,
) -> StartModel:
    """Build the network of an app, with fresh weights or with given ones.

    Parameters
    ----------
    model : MedicalClient or callable
        As `federate` takes it.
    agreed : str
        What the sites have agreed upon; empty if there is nothing to agree upon.
    config : dict
        The whole run config.
    seed : int
        Of torch, for fresh weights.
    weights : Weights, optional

    Raises
    ------
    InputError
        If the weights do not fit the network, or `trainable` does not.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(model, Modeller):
            model.agreed = agreed
            network = model.build_model()
        else:
            network = model()
        adapters = add_adapters(network, ModelSettings.from_run_config(config))
    travelling = Travelling(network, str(config["trainable"]), adapters)
    if weights is not None:
        weights.load_into(network, travelling, fresh=adapters.names)
    frozen = travelling.digest(network)
    whole = ArrayRecord(network.state_dict()) if frozen else ArrayRecord()
    initial = ArrayRecord(travelling.state(network))
    parameters = dict(network.named_parameters())
    about = {
        "network": type(network).__name__,
        "weights": sum(parameter.numel() for parameter in parameters.values()),
        "weights-trained": sum(p.numel() for name, p in parameters.items() if name in initial),
        "bytes": sum(len(array.data) for array in initial.values()),
        "bytes-whole": sum(
            len(array.data)
            for name, array in (whole or initial).items()
            if name not in adapters.names
        ),
    }
    buffers = frozenset(name for name, _ in network.named_buffers())
    kept = kept_names(network, travelling.names, str(config["keep"]))
    return StartModel(initial, frozen, whole, buffers, kept, adapters, about)


def weights_at(place: str, key: str) -> Weights | None:
    """Return the weights of a run folder, or of a file; None if the place is an empty text.

    Parameters
    ----------
    place : str
        A run folder with ``model.safetensors``, or a ``.safetensors`` file.
    key : str
        The setting that names it, for the error.

    Raises
    ------
    InputError
        If there is none, or it cannot be read.
    """
    if not place:
        return None
    path = Path(place).expanduser()
    if not path.exists():
        raise InputError(
            f"{key}: {path} is not there: give a run folder with {MODEL}, or a .safetensors file"
        )
    file = path / MODEL if path.is_dir() else path
    if not file.exists():
        raise InputError(
            f"{key}: {path} has no {MODEL}: give the folder of a run that has trained a network, "
            "or a .safetensors file"
        )
    return read_weights(file)


def require_unchanged(weights: Weights | None, sha256: str, folder: Path) -> None:
    """Refuse to resume a run with other weights than it began with.

    Parameters
    ----------
    weights : Weights or None
        Those of now.
    sha256 : str
        Of the file that the run began with; empty if it began with fresh weights.
    folder : Path
        Of the run.

    Raises
    ------
    InputError
        If the files differ.
    """
    if weights is not None and weights.sha256 != sha256:
        raise InputError(
            f"init-from: {weights.path} is another file than when {folder} was started (SHA-256 "
            f"{weights.sha256}, and then {sha256 or 'none'}): put the first one back"
        )
