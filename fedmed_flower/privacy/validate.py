"""Checks of a model and a loss before private training, and the usual remedy."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import (
    Callable,
    Iterable,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    Sequence,
    Set,
)

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedmed_flower.errors import InputError
from fedmed_flower.privacy.gradients import Batch, Loss, require_number, with_values

_REMEDY = "build_model can return fedmed_flower.privacy.validate.with_group_norm(model)"
_PRECISE = (torch.float32, torch.float64)
# How often a random change is tried: it may mix patients only now and then.
_TRIALS = 8


def with_group_norm(model: nn.Module, num_groups: int = 8) -> nn.Module:
    """Replace, in place, the layers that normalise over the patients of a batch.

    Parameters
    ----------
    model : Module
        BatchNorm becomes GroupNorm and keeps its weight and bias. InstanceNorm with running
        statistics loses them.
    num_groups : int
        Largest number of groups of a layer; at least 1. If it does not divide the number of
        channels, the greatest common divisor is used. Each group has at least two channels, unless
        the layer has only one.

    Returns
    -------
    Module
        `model`, or the new layer if `model` is itself a BatchNorm.

    Raises
    ------
    InputError
        If `num_groups` is out of range, or if a lazy layer does not know its channels yet.
    """
    if num_groups < 1:
        raise InputError(f"num_groups must be at least 1, got {num_groups}")
    new: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, (_BatchNorm, _InstanceNorm)) and not module.num_features:
            raise InputError(
                f"{_layer(name, module)} does not know its channels yet: run the model on one "
                "input first"
            )
        if isinstance(module, _BatchNorm):
            new[module] = _group_norm(module, num_groups)
        elif isinstance(module, _InstanceNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    for module in list(model.modules()):
        # Not named_children(), which leaves out the second name of a layer that has two.
        for name, child in module._modules.items():
            if child in new:
                setattr(module, name, new[child])
    return new.get(model, model)


def _group_norm(layer: _BatchNorm, num_groups: int) -> nn.GroupNorm:
    channels = layer.num_features
    groups = math.gcd(num_groups, channels)
    if groups == channels:
        # A group of one number is normalised to 0.
        groups = next((n for n in range(channels // 2, 0, -1) if channels % n == 0), 1)
    norm = nn.GroupNorm(groups, channels, eps=layer.eps, affine=layer.affine)
    if layer.affine:
        norm.weight = layer.weight
        norm.bias = layer.bias
    return norm.train(layer.training)


def require_private_model(model: nn.Module, loss: Loss, batch: Batch) -> None:
    """Refuse a model that cannot be trained privately.

    Parameters
    ----------
    model : Module
        Is put into training mode.
    loss : callable
        As in `RecordGradients`.
    batch : dict of tensors
        Its first record is run through the model once.

    Raises
    ------
    InputError
        If a module normalises over the batch, changes a buffer or a parameter in training, or has
        parameters that never get a gradient or are not precise enough to be clipped. The error
        names the module and the remedy. Also if the loss is not one number, or does not depend on
        the model that it is given.
    """
    model.train()
    _require_separate_patients(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _require_clippable(trained)
    before = _copies(model, trained=True)
    copies = {name: p.detach().clone().requires_grad_() for name, p in trained.items()}
    record = {key: part[:1] for key, part in batch.items()}
    value = require_number(loss(with_values(model, copies), record))
    name = _difference(before, _state(model, trained=True) | copies)
    if name is not None:
        owner, _, local = name.rpartition(".")
        kind = "parameter" if name in dict(model.named_parameters()) else "buffer"
        raise InputError(
            f"{_layer(owner, model.get_submodule(owner))} changes its {kind} {local} in training, "
            f"and its content leaves the hospital without noise: {_REMEDY}, or replace the layer"
        )
    _require_gradients(value, copies)


def _require_separate_patients(model: nn.Module) -> None:
    """Refuse layers that normalise over the batch or keep statistics of it."""
    for name, module in model.named_modules():
        keeps_statistics = isinstance(module, _InstanceNorm) and module.track_running_stats
        # A layer that stays in evaluation mode is frozen and harmless.
        if module.training and (keeps_statistics or isinstance(module, _BatchNorm)):
            raise InputError(
                f"{_layer(name, module)} mixes patients or keeps statistics of them: {_REMEDY}"
            )


def _require_clippable(trained: Mapping[str, Tensor]) -> None:
    """Refuse a model without trained parameters, and one whose gradients cannot be clipped."""
    if not trained:
        raise InputError("no parameter of the model requires a gradient: there is nothing to train")
    for name, parameter in trained.items():
        if parameter.dtype not in _PRECISE:
            raise InputError(
                f"the parameter {name} is {parameter.dtype}, in which gradients cannot be clipped "
                "exactly: build_model can return model.float(); mixed-precision=true still runs "
                "it in bfloat16 on a GPU"
            )


def _require_gradients(value: Tensor, parameters: Mapping[str, Tensor]) -> None:
    """Refuse a loss that gives some of the parameters no gradient."""
    if not value.requires_grad:
        raise InputError("the loss does not depend on any parameter that requires a gradient")
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise InputError(
            "the loss does not depend on the model that it is given: it must call its argument, "
            "not another copy of the model"
        )
    unused = [name for name, grad in zip(parameters, gradients, strict=True) if grad is None]
    if unused:
        more = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
        raise InputError(
            f"the parameter {unused[0]}{more} never gets a gradient and would be moved by noise "
            "alone: build_model can freeze it by "
            f'model.get_parameter("{unused[0]}").requires_grad_(False)'
        )


def require_private_loss(model: nn.Module, loss: Loss, batch: Batch) -> None:
    """Refuse a loss of a batch that is not the mean or the sum of the losses of its records.

    Parameters
    ----------
    model : Module
        Is left in training mode.
    loss : callable
        As in `RecordGradients`.
    batch : dict of tensors
        Several records; with one record nothing can be found.

    Raises
    ------
    InputError
        If the loss couples patients. Batch Dice and the Cox partial likelihood do; so does a mean
        weighted by class, whose weight cancels out for a single record.
    """
    count = len(next(iter(batch.values())))
    model.eval()
    with torch.no_grad():
        rows = [{key: part[i : i + 1] for key, part in batch.items()} for i in range(count)]
        alone = torch.stack([require_number(loss(model, row)) for row in rows]).double()
        together = loss(model, batch).double()
    model.train()
    if together.ndim:
        raise InputError(
            "the loss of several records must be one number, their mean or sum, got shape "
            f"{tuple(together.shape)}"
        )
    allowed = torch.stack([alone.mean(), alone.sum()])
    close = torch.isclose(together, allowed, rtol=1e-4, atol=1e-6, equal_nan=True)
    if not bool(close.any()):
        raise InputError(
            "the loss of a batch is not the mean or sum of its records' losses: "
            f"{float(together):.6g} for {count} records, {float(alone.mean()):.6g} as the mean of "
            "single records. Private training needs Dice with batch=False, survival as "
            "discrete-time likelihood, class weights with reduction='sum'"
        )


def require_forgetful(model: nn.Module, loss: Loss, batch: Batch) -> None:
    """Refuse a model or a loss that remembers one record while it sees the next.

    Parameters
    ----------
    model : Module
        Is left in training mode.
    loss : callable
        As in `RecordGradients`.
    batch : dict of tensors
        At least two records; with one record little can be found.

    Raises
    ------
    InputError
        If the second record changes the loss of the first, or an attribute of the model, of its
        classes or of the loss's object. Attributes count too, since a memory bank may have no
        effect until it is full.
    """
    model.train()
    first, second = ({key: part[i : i + 1] for key, part in batch.items()} for i in (0, 1))

    def loss_of_first() -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return loss(model, first)

    with torch.no_grad():
        before = loss_of_first()
        # Taken after the first record: what is created once, at the first call, must not count as
        # a change.
        held_before = _held_by(model, loss)
        if len(next(iter(second.values()))):
            loss(model, second)
        held_after = _held_by(model, loss)
        after = loss_of_first()
    remedy = "Private training needs a model and a loss that keep nothing"
    if not torch.allclose(before, after, rtol=1e-6, atol=0, equal_nan=True):
        raise InputError(
            "the model or the loss keeps something of one record until the next: the loss of a "
            f"record was {float(before):.6g}, and {float(after):.6g} after another one. {remedy}"
        )
    for name, state in held_after.items():
        if held_before.get(name) != state:
            raise InputError(
                f"the model or the loss keeps something of one record until the next, in {name}. "
                f"{remedy}"
            )


def _held_by(model: nn.Module, loss: Loss) -> dict[str, object]:
    """Return what model and loss hold besides parameters and buffers, by name."""
    owner = loss if isinstance(loss, nn.Module) else getattr(loss, "__self__", None)
    seen = {id(model), id(owner)}
    held = {
        f"{_layer(path, module)}, attribute {name}": _content(value, seen)
        for path, module in model.named_modules()
        for name, value in _attributes(module).items()
    }
    mine = _attributes(owner)
    for name, value in mine.items():
        if isinstance(value, nn.Module) and value is not model:
            for inner, item in _attributes(value).items():
                held[f"the module {name} of the loss, attribute {inner}"] = _content(item, seen)
    for name, value in mine.items():
        held[f"the object of the loss, attribute {name}"] = _content(value, seen)
    return held


def _attributes(owner: object) -> dict[str, object]:
    """Return the attributes of an object, and the mutable ones of its classes."""
    mutable = (Tensor, np.ndarray, MutableMapping, MutableSequence, MutableSet, deque)
    shared = {
        name: value
        for kind in type(owner).__mro__
        for name, value in vars(kind).items()
        if isinstance(value, mutable)
    }
    attributes = getattr(owner, "__dict__", {})
    hidden = vars(nn.Module()).keys() if isinstance(owner, nn.Module) else ()
    return shared | {name: value for name, value in attributes.items() if name not in hidden}


def _content(value: object, seen: set[int], depth: int = 6) -> object:
    """Return a copy of an object's content that can be compared with a later one."""
    if isinstance(value, Tensor | np.ndarray):
        array = value.detach().cpu().float().numpy() if isinstance(value, Tensor) else value
        return array.shape, str(value.dtype), array.tobytes()
    if isinstance(value, str | bytes | int | float | bool | None):
        return repr(value)
    if id(value) in seen or not depth:
        return type(value).__name__
    seen.add(id(value))
    if isinstance(value, Mapping):
        return [(repr(key), _content(item, seen, depth - 1)) for key, item in value.items()]
    if isinstance(value, Sequence | Set | deque):
        return [_content(item, seen, depth - 1) for item in value]
    inside = [*_attributes(value).values()]
    if isinstance(value, nn.Module):
        inside += [*value.buffers(recurse=False), *value.children()]
    return [type(value).__name__, *(_content(item, seen, depth - 1) for item in inside)]


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
        Name of the change in the error.

    Raises
    ------
    InputError
        If the outcome for one record depends on another, as in mixup, if the number of records
        changes, or if `change` does not draw all random numbers from torch's global generator.
    """
    cuda = [inputs.device] if inputs.is_cuda else []

    def changed(version: Tensor, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seed)
            return change(version.clone())

    for seed in range(_TRIALS):
        plain = changed(inputs, seed)
        if len(plain) == len(inputs) and not _equal(plain, changed(inputs, seed)):
            raise InputError(
                f"{name} does not draw all random numbers from torch's global generator, so nobody "
                "can check whether it mixes patients: draw all of them from it"
            )
        for index in range(len(inputs)):
            others = (inputs.flip(-1) + 1).to(inputs.dtype)
            others[index] = inputs[index]
            other = changed(others, seed)
            same_length = len(plain) == len(other) == len(inputs)
            if not same_length or not _equal(plain[index], other[index]):
                raise InputError(
                    f"{name} mixes patients: the outcome for one record depends on another, as in "
                    "mixup. Private training needs a change of each record alone"
                )


def first_changed(before: Iterable[tuple[str, Tensor]], model: nn.Module) -> str | None:
    """Return the name of the first entry that training must not change but did; None if none.

    Such entries are the buffers, including new ones, the frozen parameters, and whatever else the
    model's state dict holds that is not trained.
    """
    return _difference(dict(before), _state(model, trained=False))


def held(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return copies of all that private training must not change, for `first_changed`."""
    return list(_copies(model, trained=False).items())


def _state(model: nn.Module, trained: bool) -> dict[str, Tensor]:
    """Return the state dict and all buffers, by name; the trained parameters only if `trained`."""
    parameters = model.named_parameters(remove_duplicate=False)
    trainable = {name for name, parameter in parameters if parameter.requires_grad}
    state = model.state_dict() | dict(model.named_buffers())
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and (trained or name not in trainable)
    }


def _copies(model: nn.Module, trained: bool) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in _state(model, trained).items()}


def _difference(before: dict[str, Tensor], after: dict[str, Tensor]) -> str | None:
    """Return the name of the first entry that differs or that only one of the two holds."""
    for name in before | after:
        if name not in before or name not in after or not _equal(before[name], after[name]):
            return name
    return None


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(
        torch.equal(one, other) or ((one == other) | ((one != one) & (other != other))).all()
    )


def _layer(name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    return f"the layer {name} ({kind})" if name else f"the model ({kind})"
