"""The weights of a network in a file that a stranger may have written, and whether they fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn

from fedmed_flower.errors import InputError
from fedmed_flower.files import open_file
from fedmed_flower.models.trainable import Travelling

# Bytes.
MOST_WEIGHTS = 1 << 36


@dataclass(frozen=True)
class Weights:
    """The weights that a file holds.

    Attributes
    ----------
    path : str
        The file, as it was given.
    sha256 : str
        Of its bytes, in hexadecimal digits.
    state : dict of str to Tensor
        Each entry by its name.
    """

    path: str
    sha256: str
    state: Mapping[str, Tensor]

    def load_into(self, model: nn.Module, travelling: Travelling) -> None:
        """Load the entries that travel into a network.

        A file that holds the whole network must agree with it in what does not travel: each
        hospital builds that part itself.

        Raises
        ------
        InputError
            If the file is of another network, holds NaN or infinite values, or the part that does
            not travel differs. The network may have been changed then.
        """
        before = model.state_dict()
        names = set(travelling.names)
        wanted = before
        if self.state.keys() == names:
            wanted = {name: before[name] for name in travelling.names}
        require_same(self.state, wanted, self.path, "the network of the app")
        for name, value in sorted(self.state.items()):
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise InputError(
                    f"{self.path} holds NaN or infinite values in {name}: its run has diverged; "
                    "give the weights of another"
                )
        for name, value in sorted(self.state.items()):
            if name not in names and not torch.equal(value, before[name].cpu()):
                raise InputError(
                    f"{self.path} has other values of {name} than the network of the app, and "
                    "trainable leaves that entry out, so that each hospital builds it itself: "
                    "build it there with the same values (such as by the seed of the run that "
                    "trained the weights), or let it travel (trainable)"
                )
        travelling.load(model, {name: self.state[name] for name in travelling.names})


def read_weights(path: Path) -> Weights:
    """Read a ``.safetensors`` file, with a bound of 64 GiB.

    Raises
    ------
    InputError
        If it cannot be read, or is no such file.
    """
    try:
        with open_file(path.parent, path.name, MOST_WEIGHTS) as file:
            data = file.read()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    try:
        state = load(data)
    except Exception as error:  # The library's own error, which it does not export.
        raise InputError(f"{path} is no file of weights (.safetensors): {error}") from error
    return Weights(str(path), hashlib.sha256(data).hexdigest(), state)


def require_same(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str, whose: str
) -> None:
    """Refuse weights whose names, shapes or dtypes are not those of a network.

    Parameters
    ----------
    state, wanted : mapping of str to Tensor
    where, whose : str
        What the error calls them.

    Raises
    ------
    InputError
        It names the first entry that differs, and both forms.
    """
    given = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
    needed = {name: (tuple(value.shape), value.dtype) for name, value in wanted.items()}
    # A file's own order of names differs from read to read.
    for name in sorted(needed | given):
        if name not in needed:
            raise InputError(f"{where} does not fit {whose}, which has no {name}")
        if given.get(name) != needed[name]:
            raise InputError(
                f"{where} does not fit {whose}: {name} is {_form(given.get(name))} and must be "
                f"{_form(needed[name])}"
            )


def _form(entry: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if entry is None else f"{str(entry[1]).removeprefix('torch.')} {entry[0]}"
