"""What a model and a loss must satisfy to be trained privately, and the usual remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmed_flower.errors import InputError
from fedmed_flower.privacy.gradients import Batch, Loss

_REMEDY = "build_model can return fedmed_flower.privacy.validate.with_group_norm(model)"
_PRECISE = (torch.float32, torch.float64)
_BATCH_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d),
)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def with_group_norm(model: nn.Module, num_groups: int = 8) -> nn.Module:
    """Replace the layers that learn from the patients of a batch together, in place.

    Parameters
    ----------
    model : Module
        BatchNorm becomes GroupNorm. InstanceNorm with running statistics loses them.
    num_groups : int
        The most groups of a layer; at least 1. A layer whose channels it does not divide gets the
        greatest common divisor.

    Returns
    -------
    Module
        `model`, or the new layer where `model` is a BatchNorm itself.
    """
    if num_groups < 1:
        raise InputError(f"num_groups must be at least 1, got {num_groups}")
    for name, child in list(model.named_children()):
        setattr(model, name, with_group_norm(child, num_groups))
    if isinstance(model, _INSTANCE_NORMS) and model.track_running_stats:
        return type(model)(model.num_features, model.eps, affine=model.affine)
    if not isinstance(model, _BATCH_NORMS):
        return model
    channels = model.num_features
    groups = math.gcd(num_groups, channels)
    return nn.GroupNorm(groups, channels, eps=model.eps, affine=model.affine)


def require_private_model(model: nn.Module, loss: Loss, batch: Batch) -> None:
    """Refuse a model that cannot be trained privately.

    Parameters
    ----------
    model : Module
        Is put into training mode.
    loss : callable
        As `RecordGradients` takes it.
    batch : dict of tensors
        Its first record is run through the model once.

    Raises
    ------
    InputError
        Naming the module and the remedy, where a module normalises over the batch, changes a
        buffer in training, or has parameters that are never trained or not precise enough to be
        clipped.
    """
    model.train()
    for name, module in model.named_modules():
        keeps = isinstance(module, _INSTANCE_NORMS) and module.track_running_stats
        if keeps or isinstance(module, _BATCH_NORMS):
            raise InputError(
                f"{_layer(name, module)} mixes patients or keeps statistics of them: {_REMEDY}"
            )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise InputError("no parameter of the model requires a gradient: there is nothing to train")
    for name, parameter in trained.items():
        if parameter.dtype not in _PRECISE:
            raise InputError(
                f"the parameter {name} is {parameter.dtype}, in which gradients cannot be clipped "
                "exactly: build_model can return model.float(); mixed-precision=true still runs "
                "it in bfloat16 on a GPU"
            )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = trained | buffers

    def run(*args: object, **kwargs: object) -> object:
        return functional_call(model, state, args, kwargs)

    value = loss(run, {key: part[:1] for key, part in batch.items()})
    for name, buffer in model.named_buffers():
        if not _equal(buffer, buffers[name]):
            owner, _, own = name.rpartition(".")
            raise InputError(
                f"{_layer(owner, model.get_submodule(owner))} changes its buffer {own} in "
                f"training: what it keeps there leaves the hospital without noise; {_REMEDY}, or "
                "replace the layer"
            )
    if not value.requires_grad:
        raise InputError("the loss does not depend on any parameter that requires a gradient")
    gradients = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    unused = [name for name, found in zip(trained, gradients, strict=True) if found is None]
    if unused:
        more = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
        raise InputError(
            f"the parameter {unused[0]}{more} never gets a gradient and would be moved by noise "
            "alone: build_model can freeze it by "
            f'model.get_parameter("{unused[0]}").requires_grad_(False)'
        )


def require_private_loss(model: nn.Module, loss: Loss, batch: Batch) -> None:
    """Refuse a loss that is not the mean, or the sum, of what it gives for one patient each.

    Parameters
    ----------
    model : Module
        Is left in training mode.
    loss : callable
        As `RecordGradients` takes it.
    batch : dict of tensors
        Of several patients; with one there is nothing to see.

    Raises
    ------
    InputError
        Where the loss couples patients: batch Dice, the Cox partial likelihood, or a mean weighted
        by class, whose weights would cancel out for one patient.
    """
    count = len(next(iter(batch.values())))
    model.eval()
    with torch.no_grad():
        rows = [{key: part[i : i + 1] for key, part in batch.items()} for i in range(count)]
        alone = torch.stack([loss(model, row) for row in rows]).double()
        together = loss(model, batch).double()
    model.train()
    wanted = (alone.mean(), alone.sum())
    if not any(torch.allclose(together, value, rtol=1e-4, atol=1e-6) for value in wanted):
        raise InputError(
            f"the loss couples patients: for {count} of them it is {float(together):.6g}, and what "
            f"it is for each alone has the mean {float(alone.mean()):.6g}. Private training needs "
            "a loss of one patient: Dice with batch=False, survival as discrete-time likelihood, "
            "class weights with reduction='sum'"
        )


def require_independent(
    change: Callable[[Tensor], Tensor], inputs: Tensor, name: str = "augment"
) -> None:
    """Refuse a random change of a batch that lets one record's outcome depend on another record.

    Parameters
    ----------
    change : callable
        Maps (n, ...) to (n, ...); draws from torch's global generator.
    inputs : Tensor of shape (n, ...)
        n at least 2.
    name : str
        As it shall stand in the error.

    Raises
    ------
    InputError
        Where it does, as in mixup, or where the number of records changes.
    """
    other = inputs.clone()
    other[0] = other[0].flip(-1) + 1
    results = []
    for version in (inputs, other):
        with torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []):
            torch.manual_seed(0)
            results.append(change(version.clone()))
    if len(results[0]) != len(inputs) or not _equal(results[0][1:], results[1][1:]):
        raise InputError(
            f"{name} mixes patients: the outcome for one record depends on another, as in mixup. "
            "Private training needs each to be changed by itself"
        )


def unchanged(before: Iterable[tuple[str, Tensor]], model: nn.Module) -> str | None:
    """Return the first buffer or frozen parameter that training changed; None where none was."""
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    return next((name for name, value in before if not _equal(value, state[name])), None)


def held(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return copies of all that private training must leave as it is: for `unchanged`."""
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    return [(name, value.detach().clone()) for name, value in [*frozen, *model.named_buffers()]]


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return bool(
        torch.equal(one, other) or ((one == other) | ((one != one) & (other != other))).all()
    )


def _layer(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    return f"the layer {name} ({kind})" if name else f"the model ({kind})"
