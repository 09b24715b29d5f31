"""Settings of networks for bags of patches."""

from __future__ import annotations

from dataclasses import dataclass

from fedmed_flower.settings.allowed import Within
from fedmed_flower.settings.section import Section, setting


@dataclass(frozen=True)
class BagSettings(Section):
    """How bags of patches are trained on."""

    bag_size: int = setting(
        64,
        "The most patches of a bag in a training step, drawn at random for each step. Evaluation "
        "takes all patches, as many at a time.",
        Within(1, 4096),
        "patches",
    )
    patch_features: int = setting(
        64,
        "Number of features that the network of `network` or `bundle` returns for a patch.",
        Within(1, 8192),
    )
    attention_size: int = setting(
        128, "Width of the layer that weights the patches of a bag.", Within(1, 8192)
    )
