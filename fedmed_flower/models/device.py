"""Seeds, threads and the layout of arrays in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def derive_seed(*parts: object) -> int:
    """Return a seed that depends on all parts, such as seed, site, round and purpose."""
    text = "/".join(str(part).replace("/", "//") for part in parts)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big")


@contextmanager
def torch_environment(seed: int, threads: int, device: torch.device) -> Iterator[None]:
    """Seed torch and set its threads, and put both back as they were.

    Parameters
    ----------
    seed : int
        For torch's global generators.
    threads : int
        0 leaves the number of threads as it is.
    device : torch.device
        Its generator is put back too.
    """
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
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(values.ndim)
    return values if layout is None else values.contiguous(memory_format=layout)
