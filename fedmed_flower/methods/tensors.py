"""Weights of a model by name: copied, kept, loaded again, and pulled towards others."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from fedmed_flower.methods.base import Tensors


def pull(model: nn.Module, anchor: Tensors, strength: float) -> None:
    """Add to each gradient `strength` times the parameter's distance from its anchor.

    Parameters
    ----------
    model : Module
    anchor : dict of str to Tensor
        By the parameter's name; parameters that are not in it stay free.
    strength : float
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in anchor:
            parameter.grad.add_(parameter.detach() - anchor[name], alpha=strength)


def copies(parameters: Tensors) -> Tensors:
    """Return detached copies of tensors."""
    return {name: value.detach().clone() for name, value in parameters.items()}


def state_of(model: nn.Module, names: Collection[str]) -> Tensors:
    """Return copies of some entries of a model."""
    entries = model.state_dict()
    return copies({name: entries[name] for name in names})


def with_state(model: nn.Module, state: Tensors) -> nn.Module:
    """Load what `state_of` returned into a model and return it; nothing if `state` is empty."""
    if state:
        model.load_state_dict(model.state_dict() | state)
    return model
