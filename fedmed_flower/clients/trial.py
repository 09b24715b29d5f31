"""A batch tried before the first round, so that a broken app ends before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.errors import InputError
from fedmed_flower.models.device import derive_seed, half_precision

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger("flwr.fedmed")

# Rows of the batch: batch normalisation needs two; images of two shapes are likelier among more.
_ROWS = 4


def try_batch(client: MedicalClient) -> None:
    """Compute the gradients of one training step, on a model that is then thrown away.

    Nothing is tried if the model depends on what all sites agree upon, or if the client trains in a
    way of its own. The random generators that training uses are not moved.

    Parameters
    ----------
    client : MedicalClient
        If it trains privately, made-up rows are tried; else its first training rows.

    Raises
    ------
    InputError
        If the network cannot be trained on the batch.
    """
    has_loop = type(client).fit is MedicalClient.fit
    if client.must_agree or not has_loop:
        return
    with client.seeded(derive_seed(client.settings.seed, client.site.name, "trial")):
        batch = client.probe(_ROWS) if client.privacy.on else _first_batch(client)
        if batch is not None:
            _try(client, client.fresh_model()[0], batch)


def _first_batch(client: MedicalClient) -> Mapping[str, Tensor] | None:
    """Return the first training rows as a batch; None if there are none, or they must not be read.

    The rows are prepared apart: those that the run keeps in memory stay as they are.
    """
    if client.sealed:
        return None
    rows = client.screened("train")[: min(_ROWS, client.settings.batch_size)]
    if not rows:
        return None
    prepared = client.prepare(rows, train=True)
    client.seed_transforms(prepared, derive_seed(client.settings.seed, "trial"))
    return client.batch_of(prepared, range(len(prepared)))


def _try(client: MedicalClient, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    import torch

    from fedmed_flower.models.adapters import require_adapters_used

    model.train()
    kind = next(iter(batch.values())).device.type
    try:
        with torch.autocast(kind, torch.bfloat16, enabled=half_precision(client.settings)):
            loss = client.loss_of(model, batch)
        torch.autograd.backward(loss)
        require_adapters_used(model)
    except InputError:
        raise
    except torch.OutOfMemoryError:
        log.debug("%s: a batch of %d rows does not fit into memory", client.site.name, _ROWS)
    except Exception as error:  # A network or a loss can raise anything.
        shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in batch.items())
        reason = " ".join(str(error).split())
        raise InputError(
            f"the network cannot be trained on a batch of {shapes}: {type(error).__name__}: "
            f"{reason}"
        ) from error
