"""Which entries of a network's state dict travel between server and sites."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fedmed_flower.errors import InputError


class Travelling:
    """The part of a network that sites train together; the rest is frozen and stays in its place.

    Parameters
    ----------
    model : Module
        Is changed: parameters that do not travel require no gradient any more, and layers with
        parameters or buffers of which none travels evaluate from now on, also after
        ``model.train()``. So batch normalisation of a frozen encoder neither learns nor mixes
        patients. Layers with neither, such as dropout, follow ``model.train()``.
    trainable : str
        Patterns of `fnmatch`, separated by commas, for the names of parameters and buffers; case
        counts. ``*.decoder.*`` also matches ``decoder.conv.weight``. Empty: everything travels and
        the model is left as it is.

    Attributes
    ----------
    names : tuple of str
        The entries that travel, in the order of the state dict. A parameter that was frozen before
        travels if its name does, and stays frozen.

    Raises
    ------
    InputError
        If a pattern is empty or matches no parameter, or the patterns match one of two names of
        a tensor.
    """

    def __init__(self, model: nn.Module, trainable: str) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        patterns = _patterns(trainable, list(parameters))

        def travels(name: str) -> bool:
            return any(_matches(name, pattern) for pattern in patterns)

        entries = model.state_dict(keep_vars=True)
        self.names = tuple(name for name in entries if travels(name))
        _require_whole(entries, travels, trainable)
        for name, parameter in parameters.items():
            if not travels(name):
                parameter.requires_grad_(False)
        for prefix, layer in model.named_modules():
            own = [name for name, _ in layer.named_parameters(prefix, recurse=False)]
            own += [name for name, _ in layer.named_buffers(prefix, recurse=False)]
            buffers = {name for name, _ in layer.named_buffers(prefix, recurse=False)}
            if any(map(travels, own)) and (left := sorted(n for n in buffers if not travels(n))):
                raise InputError(
                    f"trainable matches a part of the layer {prefix} and not {left[0]}, which it "
                    f"changes in training: match all of it or nothing, got {trainable!r}"
                )
            if own and not any(map(travels, own)):
                layer.training = False
                layer.train = _Evaluating(layer)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what travels of a model like the first, on the CPU.

        The values of a model on the CPU are not copied: they change with it.
        """
        entries = model.state_dict()
        return {name: entries[name].detach().cpu() for name in self.names}

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Put into a model what travelled.

        Raises
        ------
        ValueError
            If `state` lacks an entry, has one that does not travel, or one of another shape; the
            model is left as it was.
        """
        entries = model.state_dict()
        wanted = {name: entries[name].shape for name in self.names}
        given = {name: value.shape for name, value in state.items()}
        for name in wanted | given:
            if wanted.get(name) != given.get(name):
                raise ValueError(
                    f"{name} should have shape {wanted.get(name)}, got {given.get(name)} "
                    "(None: not there)"
                )
        entries.update(state)
        model.load_state_dict(entries)

    def digest(self, model: nn.Module) -> str:
        """Return a SHA-256 of what does not travel; empty if everything does.

        The same on any machine (of the usual byte order) where names, types and values are.
        """
        travelling = set(self.names)
        kept = {n: value for n, value in model.state_dict().items() if n not in travelling}
        found = hashlib.sha256()
        for name, value in kept.items():
            found.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
            # NumPy has no bfloat16, so the bytes are torch's.
            found.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return found.hexdigest() if kept else ""


class _Evaluating:
    """A layer's `train` that leaves the layer itself in evaluation, but not what it contains."""

    def __init__(self, layer: nn.Module) -> None:
        # A layer that held itself would outlive its network until cycles are collected.
        self._layer = weakref.ref(layer)

    def __call__(self, mode: bool = True) -> nn.Module | None:
        layer = self._layer()
        if layer is not None:
            for child in layer.children():
                child.train(mode)
        return layer

    # A copy or a pickle of the layer gets one of its own.
    def __reduce__(self) -> tuple[type[_Evaluating], tuple[nn.Module | None]]:
        return _Evaluating, (self._layer(),)


def _patterns(trainable: str, names: list[str]) -> list[str]:
    """Return the patterns, each of which matches a parameter of these names."""
    if not trainable:
        return ["*"]
    patterns = [pattern.strip() for pattern in trainable.split(",")]
    if not all(patterns):
        raise InputError(
            "trainable must be patterns separated by commas, such as *.decoder.*, or empty, got "
            f"{trainable!r}"
        )
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            # Far apart: the first three would be of one layer.
            examples = names[:: max(1, (len(names) - 1) // 2)][:3]
            raise InputError(
                f"trainable: no parameter matches {pattern!r}; the network has {len(names)}, such "
                f"as {', '.join(examples)}"
            )
    return patterns


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(f".{name}", pattern)


def _require_whole(
    entries: Mapping[str, Tensor], travels: Callable[[str], bool], trainable: str
) -> None:
    """Raise `InputError` where a tensor has two names of which one travels."""
    known: dict[int, str] = {}
    for name, value in entries.items():
        other = known.setdefault(id(value), name)
        if travels(name) != travels(other):
            raise InputError(
                f"trainable must match both or neither of {other} and {name}, which are one tensor "
                f"in this network, got {trainable!r}"
            )
