"""The entries of a network's state dict that travel between server and sites."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedmed_flower.errors import InputError
from fedmed_flower.models.adapters import NO_ADAPTERS, Adapters
from fedmed_flower.models.patterns import matches, patterns_of
from fedmed_flower.settings.text import setting_error


class Travelling:
    """The part of a network that sites train together; the rest is frozen and does not travel.

    Parameters
    ----------
    model : Module
        It is changed. Parameters that do not travel no longer require a gradient. A layer whose
        parameters and buffers all stay is put into evaluation mode and remains there, also after
        ``model.train()``; so batch normalisation of a frozen encoder neither learns nor mixes
        patients. Layers without parameters and buffers, such as dropout, follow ``model.train()``.
    trainable : str
        Patterns of `fnmatch`, separated by commas, for the names of parameters and buffers; case
        matters. ``*.decoder.*`` also matches ``decoder.conv.weight``. If it is empty, everything
        travels and the model is not changed.
    adapters : Adapters
        As `add_adapters` returned them for this model. What of them is trained travels, with what
        `trainable` matches besides.

    Attributes
    ----------
    names : tuple of str
        The entries that travel, in the order of the state dict. A parameter that was frozen before
        travels if its name does, and stays frozen.

    Raises
    ------
    InputError
        If a pattern is empty or matches no parameter, if the patterns match only one of two names
        of a tensor, if they match a part of a layer without the buffers that it changes, or if they
        match weights that an adapter stands for.
    """

    def __init__(self, model: nn.Module, trainable: str, adapters: Adapters = NO_ADAPTERS) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        always = adapters.trained
        patterns = [] if always else ["*"]
        if trainable:
            patterns = patterns_of(
                "trainable", trainable, list(parameters), "parameter", "*.decoder.*"
            )

        def travels(name: str) -> bool:
            return name in always or any(matches(name, pattern) for pattern in patterns)

        for name in sorted(adapters.adapted):
            if travels(name):
                raise setting_error(
                    f"trainable matches {name}, which stays as it is since lora trains an adapter "
                    f"beside it: match it by one of the two, got {trainable!r}",
                    "trainable",
                )

        entries = model.state_dict(keep_vars=True)
        self.names = tuple(name for name in entries if travels(name))
        _require_whole(entries, travels, trainable)
        for name, parameter in parameters.items():
            if not travels(name):
                parameter.requires_grad_(False)
        for prefix, layer in model.named_modules():
            buffers = [name for name, _ in layer.named_buffers(prefix, recurse=False)]
            names = [name for name, _ in layer.named_parameters(prefix, recurse=False)] + buffers
            travelling = any(map(travels, names))
            frozen = sorted(name for name in buffers if not travels(name))
            if travelling and frozen:
                raise InputError(
                    f"trainable matches a part of the layer {prefix} but not {frozen[0]}, which it "
                    f"changes in training: match all of the layer or nothing, got {trainable!r}"
                )
            if names and not travelling:
                layer.training = False
                layer.train = _Evaluating(layer)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the entries of a model that travel, on the CPU.

        The values of a model on the CPU are not copied, so they change with the model.
        """
        entries = model.state_dict()
        return {name: entries[name].detach().cpu() for name in self.names}

    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Load the entries that travelled into a model.

        Raises
        ------
        ValueError
            If `state` lacks an entry, or has an entry that does not travel or has another shape;
            the model is then not changed.
        """
        entries = model.state_dict()
        wanted = {name: entries[name].shape for name in self.names}
        given = {name: value.shape for name, value in state.items()}
        for name in wanted | given:
            if wanted.get(name) != given.get(name):
                raise ValueError(
                    f"{name} should have shape {wanted.get(name)}, got {given.get(name)} "
                    "(None: no such entry)"
                )
        entries.update(state)
        model.load_state_dict(entries)

    def digest(self, model: nn.Module) -> str:
        """Return a SHA-256 of the entries that do not travel; empty if all travel.

        Equal names, types, shapes and values give the same digest on all machines with the usual
        byte order.
        """
        travelling = set(self.names)
        frozen = {n: value for n, value in model.state_dict().items() if n not in travelling}
        digest = hashlib.sha256()
        for name, value in frozen.items():
            digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
            # NumPy has no bfloat16, so the bytes are torch's.
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest() if frozen else ""


class _Evaluating:
    """A layer's `train` that switches the layers inside it, but not the layer itself."""

    def __init__(self, layer: nn.Module) -> None:
        # A strong reference to the layer would be a cycle, and would keep the network in memory.
        self._layer = weakref.ref(layer)

    def __call__(self, mode: bool = True) -> nn.Module | None:
        layer = self._layer()
        if layer is not None:
            for child in layer.children():
                child.train(mode)
        return layer

    # So that a copy or a pickle of the layer refers to the copy.
    def __reduce__(self) -> tuple[type[_Evaluating], tuple[nn.Module | None]]:
        return _Evaluating, (self._layer(),)


def _require_whole(
    entries: Mapping[str, Tensor], travels: Callable[[str], bool], trainable: str
) -> None:
    """Raise `InputError` if a tensor has two names and only one of them travels."""
    known: dict[int, str] = {}
    for name, value in entries.items():
        other = known.setdefault(id(value), name)
        if travels(name) != travels(other):
            raise setting_error(
                f"trainable must match both or neither of {other} and {name}, which are one tensor "
                f"in this network, got {trainable!r}",
                "trainable",
            )
