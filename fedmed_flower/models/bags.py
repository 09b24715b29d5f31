"""A network for bags of patches, such as those of a slide: gated attention over their features.

M. Ilse, J. M. Tomczak, M. Welling, Attention-based Deep Multiple Instance Learning, ICML 2018,
https://arxiv.org/abs/1802.04712, equations 8 and 9. As in section 2.4 there, the weighted mean of
the features is classified; unlike there, the classifier may have several outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedmed_flower.errors import InputError


class AttentionMIL(nn.Module):
    """Classifies bags of patches by a mean of their features with learned weights.

    A bag that has fewer patches than another in its batch is padded by patches of NaN (`absent`).
    They change no output and no gradient.

    Parameters
    ----------
    features : Module
        Maps patches (n, channels, *spatial) to (n, num_features), each patch by itself.
    num_features : int
        At least 1.
    num_classes : int
        Number of outputs; at least 1.
    attention_size : int
        Width of the layer that weights patches; at least 1.

    Raises
    ------
    InputError
        If `features` normalises over its batch or keeps statistics of it, in which padding would
        count; or if a number is below 1.
    """

    def __init__(
        self, features: nn.Module, num_features: int, num_classes: int, attention_size: int = 128
    ) -> None:
        super().__init__()
        numbers = {
            "num_features": num_features,
            "num_classes": num_classes,
            "attention_size": attention_size,
        }
        for name, number in numbers.items():
            if number < 1:
                raise InputError(f"{name} must be at least 1, got {number}")
        _require_separate(features)
        self.num_features = num_features
        self.features = features
        self.content = nn.Linear(num_features, attention_size)
        self.gate = nn.Linear(num_features, attention_size)
        self.score = nn.Linear(attention_size, 1)
        self.classify = nn.Linear(num_features, num_classes)

    def forward(self, bags: Tensor) -> Tensor:
        """Return (batch, num_classes) for bags (batch, patches, channels, *spatial)."""
        lacking = absent(bags)
        shown = bags.masked_fill(_like(lacking, bags), 0.0)
        # By no number of patches, which TorchScript would take for a constant.
        wanted = lacking[..., None].expand(-1, -1, self.num_features)
        embedded = self.embed(shown.flatten(0, 1)).contiguous().view_as(wanted)
        return self.pool(embedded, lacking)

    def embed(self, patches: Tensor) -> Tensor:
        """Return the features (n, num_features) of patches (n, channels, *spatial).

        Raises
        ------
        InputError
            If the network for features returns another shape.
        """
        embedded: Tensor = self.features(patches)
        if embedded.ndim != 2 or embedded.shape[1] != self.num_features:
            raise InputError(
                f"the network for patches returns the shape {tuple(embedded.shape)}: it must be "
                f"(patches, {self.num_features}), the number of features that patch-features "
                "(num_features) declares"
            )
        return embedded

    def pool(self, embedded: Tensor, lacking: Tensor | None = None) -> Tensor:
        """Return (batch, num_classes) for features; parameters are those of `weights`."""
        shares = self.weights(embedded, lacking)
        outputs: Tensor = self.classify((shares[..., None] * embedded).sum(dim=1))
        return outputs

    def weights(self, embedded: Tensor, lacking: Tensor | None = None) -> Tensor:
        """Return the weight of each patch, (batch, patches); those of a bag add up to 1.

        Parameters
        ----------
        embedded : Tensor
            (batch, patches, num_features).
        lacking : Tensor, optional
            (batch, patches) booleans: patches that only fill up a bag, whose weight is 0.
        """
        gated = torch.tanh(self.content(embedded)) * torch.sigmoid(self.gate(embedded))
        scores: Tensor = self.score(gated)[..., 0].float()
        if lacking is not None:
            scores = scores.masked_fill(lacking, -torch.inf)
        return scores.softmax(dim=1)


def absent(bags: Tensor) -> Tensor:
    """Return which patches of bags (batch, patches, ...) only fill them up: those of NaN."""
    return bags.flatten(2)[:, :, 0].isnan()


def padded(bags: list[Tensor], size: int) -> Tensor:
    """Return bags (patches, ...) as one tensor (len(bags), size, ...), filled up by `absent` ones.

    Parameters
    ----------
    bags : list of Tensor
        Floating point, at least one; each of at most `size` patches.
    size : int
        Patches of each bag.
    """
    filled = bags[0].new_full((len(bags), size, *bags[0].shape[1:]), torch.nan)
    for number, bag in enumerate(bags):
        filled[number, : len(bag)] = bag
    return filled


def marked(bags: Tensor, lacking: Tensor) -> Tensor:
    """Return bags with NaN in the patches that only fill them up."""
    return bags.masked_fill(_like(lacking, bags), torch.nan)


def _like(lacking: Tensor, bags: Tensor) -> Tensor:
    return lacking[(..., *[None] * (bags.ndim - 2))]


def _require_separate(features: nn.Module) -> None:
    for name, layer in features.named_modules():
        tracking = isinstance(layer, _InstanceNorm) and layer.track_running_stats
        if tracking or isinstance(layer, _BatchNorm):
            raise InputError(
                f"the network for patches has {name or 'a layer'} ({type(layer).__name__}), which "
                "normalises over all patches of a batch, or keeps statistics of them, so that "
                'padding would count: give it norm = "instance", or '
                "fedmed_flower.privacy.validate.with_group_norm(network)"
            )
