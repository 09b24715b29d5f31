"""Kept layers: trained at each hospital, and different at each.

Li, Jiang, Zhang, Kamp, Dou: FedBN: Federated Learning on Non-IID Features via Local Batch
Normalization, ICLR 2021, https://arxiv.org/abs/2102.07623, keeps the normalisation layers;
Arivazhagan, Aggarwal, Singh, Choudhary: Federated Learning with Personalization Layers, 2019,
https://arxiv.org/abs/1912.00818, keeps the last ones.

When to take it: other scanners or stains shift what comes into a network: keep the normalisation.
Other prevalences or coding shift what comes out of it: keep the last layer.
"""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

from torch import nn

from fedmed_flower.settings.text import setting_error

NORM = "norm"
_NORMALISING = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


def kept_names(model: nn.Module, travelling: Collection[str], keep: str) -> tuple[str, ...]:
    """Return the entries of a model's state dict that stay different at each site.

    Parameters
    ----------
    model : Module
    travelling : collection of str
        The entries that are not frozen.
    keep : str
        The setting ``keep``.

    Raises
    ------
    InputError
        If nothing is kept although something is asked for, if a pattern is empty or matches
        nothing, if only one of two names of a tensor is kept, or if everything is kept, so that
        nothing is learned together.
    """
    if not keep:
        return ()
    if keep == NORM:
        kept = _normalising(model)
        if not kept & {*travelling}:
            raise setting_error(
                "keep=norm, but the network has no normalisation layer with weights or statistics "
                "that is trained",
                "keep",
            )
    else:
        kept = _matching(travelling, keep)
    _require_whole(model, kept, keep)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not (trained & {*travelling}) - kept:
        raise setting_error(f"keep must leave a layer to be learned together, got {keep!r}", "keep")
    return tuple(name for name in travelling if name in kept)


def _require_whole(model: nn.Module, kept: Collection[str], keep: str) -> None:
    known: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        other = known.setdefault(id(value), name)
        if (name in kept) != (other in kept):
            raise setting_error(
                f"keep must match both or neither of {other} and {name}, which are one tensor in "
                f"this network, got {keep!r}",
                "keep",
            )


def _normalising(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in model.named_modules()
        if isinstance(layer, _NORMALISING)
        for name in layer.state_dict()
    }


def _matching(names: Collection[str], keep: str) -> set[str]:
    kept: set[str] = set()
    for pattern in (part.strip() for part in keep.split(",")):
        found = {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(f".{n}", pattern)}
        if not found:
            examples = ", ".join([*names][:: max(1, len(names) // 3)][:3])
            raise setting_error(
                f"keep: no parameter or buffer matches {pattern!r}; the network has {len(names)}, "
                f"such as {examples}",
                "keep",
            )
        kept |= found
    return kept
