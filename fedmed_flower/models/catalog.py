"""The networks that are tested by name, in 2D and in 3D, and what private training asks of each."""

from __future__ import annotations

from dataclasses import dataclass

YES = "yes"
_GROUP_NORM = "with_group_norm in build_model"


@dataclass(frozen=True)
class Network:
    """A network of ``monai.networks.nets`` as the setting ``network`` names it.

    Attributes
    ----------
    name : str
    purpose : {"classes", "masks"}
        What it predicts.
    private : str
        ``yes`` if `args` are enough for ``privacy=patient``. Otherwise what `build_model` of a
        client must do: replace batch normalisation by `privacy.with_group_norm`, or freeze
        parameters.
    args : str
        ``network-args`` to start from: 2D (for 3D, ``spatial_dims = 3``), one channel, two classes.
    """

    name: str
    purpose: str
    private: str
    args: str


def _masks(name: str, private: str, more: str = "") -> Network:
    args = f"{{spatial_dims = 2, in_channels = 1, out_channels = 2{more}}}"
    return Network(name, "masks", private, args)


def _classes(name: str, private: str, args: str) -> Network:
    return Network(name, "classes", private, f"{{spatial_dims = 2, {args}}}")


NETWORKS = (
    _classes("DenseNet", YES, 'in_channels = 1, out_channels = 2, norm = "instance"'),
    _classes("DenseNet121", _GROUP_NORM, "in_channels = 1, out_channels = 2"),
    _classes(
        "EfficientNetBN",
        _GROUP_NORM,
        'model_name = "efficientnet-b0", in_channels = 1, num_classes = 2',
    ),
    _classes("resnet18", _GROUP_NORM, "n_input_channels = 1, num_classes = 2"),
    _masks("AttentionUnet", _GROUP_NORM, ", channels = [16, 32, 64], strides = [2, 2]"),
    _masks("BasicUNet", YES),
    _masks(
        "DynUNet",
        YES,
        ", kernel_size = [3, 3, 3], strides = [1, 2, 2], upsample_kernel_size = [2, 2]",
    ),
    _masks("SegResNet", YES),
    _masks("SwinUNETR", YES),
    _masks("UNet", YES, ', channels = [16, 32, 64], strides = [2, 2], norm = "instance"'),
    _masks("UNETR", "freeze norm_cross_attn in build_model", ", img_size = 64"),
    _masks("VNet", _GROUP_NORM),
)
