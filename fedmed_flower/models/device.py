"""The settings of torch for a site: device, precision, optimizer, seeds, threads, memory layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fedmed_flower.errors import InputError
from fedmed_flower.settings.training import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def require_device(settings: Settings) -> None:
    """Raise `InputError` if the settings ask for a GPU and torch sees none."""
    if not settings.device.startswith("cuda"):
        return
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            f"device is {settings.device}, but torch sees no GPU here: set device to auto or cpu"
        )


def torch_device(settings: Settings) -> torch.device:
    """Return the device to train on.

    Raises
    ------
    InputError
        If the settings ask for a GPU and torch sees none.
    """
    import torch

    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    require_device(settings)
    return torch.device(settings.device)


def half_precision(settings: Settings) -> bool:
    """Return whether models run in bfloat16."""
    return settings.mixed_precision and torch_device(settings).type == "cuda"


def make_optimizer(
    settings: Settings, model: nn.Module, progress: float = 0.0
) -> torch.optim.Optimizer:
    """Return the optimizer over the model's trainable parameters.

    Parameters
    ----------
    settings : Settings
    model : Module
    progress : float
        Share of the run's rounds that are done, for ``schedule``; in [0, 1).
    """
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = settings.rate_at(progress)
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        parameters, lr=rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def derive_seed(*parts: object) -> int:
    """Return a seed, in [0, 2**32), that depends on all parts, such as seed, site and round."""
    text = "/".join(str(part).replace("/", "//") for part in parts)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big")


@contextmanager
def torch_environment(seed: int, threads: int, device: torch.device) -> Iterator[None]:
    """Seed torch and set its threads; restore both when the context is left.

    Parameters
    ----------
    seed : int
        For torch's global generators.
    threads : int
        Number of threads; 0 leaves it as it is.
    device : torch.device
        Its generator is restored too.
    """
    import torch

    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if threads:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def arranged(values: Tensor) -> Tensor:
    """Return images, or the weights of a convolution, with their channels last in memory."""
    import torch

    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(values.ndim)
    return values if layout is None else values.contiguous(memory_format=layout)
