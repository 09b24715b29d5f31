"""A reply in the code for which the server asks, with what the code loses kept at the site.

The change is coded after all that protects patients: in a private run it carries its noise by then,
and what is computed of it alone costs them nothing more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedmed_flower.arrays.packing import Packed, Packing
from fedmed_flower.arrays.views import is_finite

log = logging.getLogger("flwr.fedmed")


class Compressed(NamedTuple):
    """A reply as it leaves.

    Attributes
    ----------
    content : RecordDict
    residual : dict of str to Tensor
        What the code has lost so far, for the site's state; empty without a code.
    """

    content: RecordDict
    residual: dict[str, Tensor]


def compressed(
    site: str,
    config: ConfigRecord,
    content: RecordDict,
    sent: RecordDict,
    residual: Mapping[str, Tensor],
) -> Compressed:
    """Code the model and its companions if the server asks for it.

    Parameters
    ----------
    site : str
        Name of the site, for its log.
    config : ConfigRecord
        The message's config.
    content : RecordDict
        The reply, in which each record of arrays is the one that was sent as the site would change
        it. It is not changed.
    sent : RecordDict
        The message.
    residual : mapping of str to Tensor
        `Compressed.residual` of the site's last reply that counted; empty if there is none.

    Raises
    ------
    InputError
        If the message asks for a code that is not known.
    """
    packing = Packing.of(config)
    if packing is None:
        return Compressed(content, {})
    own = RecordDict({**content})
    lost: dict[str, Tensor] = {}
    for name, record in content.array_records.items():
        if name not in sent.array_records:
            continue
        # Layers that the site keeps to itself are not sent.
        whole = sent.array_records[name]
        start = ArrayRecord({key: whole[key] for key in record})
        before = {
            key.removeprefix(f"{name}/"): value.numpy()
            for key, value in residual.items()
            if key.startswith(f"{name}/")
        }
        packed = packing.pack(start, record, before)
        own[name] = packed.coded
        if _is_sound(packed):
            lost |= {f"{name}/{k}": torch.from_numpy(v) for k, v in packed.residual.items()}
        else:
            # The server leaves such a reply out. What was lost before stays to be added.
            log.warning("%s: %s holds NaN or infinite values after training", site, name)
            lost |= {f"{name}/{key}": torch.from_numpy(value) for key, value in before.items()}
    return Compressed(own, lost)


def _is_sound(packed: Packed) -> bool:
    return all(map(is_finite, packed.residual.values()))
