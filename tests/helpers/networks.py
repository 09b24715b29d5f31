"""The MONAI networks that private training must carry, each as small as it goes."""

import torch
from monai.networks import nets
from torch import nn

from fedmed_flower.privacy.validate import with_group_norm


def _unet(dims):
    return nets.UNet(dims, 1, 2, (4, 8, 8), (2, 2), norm="batch")


def _attention_unet(dims):
    return nets.AttentionUnet(dims, 1, 2, (4, 8, 8), (2, 2))


def _basic_unet(dims):
    return nets.BasicUNet(dims, 1, 2, (4, 4, 4, 8, 8, 4), norm="batch")


def _dynunet(dims):
    return nets.DynUNet(dims, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8])


def _segresnet(dims):
    return nets.SegResNet(dims, 8, 1, 2, blocks_down=(1, 1, 1), blocks_up=(1, 1))


def _resnet18(dims):
    return nets.resnet18(spatial_dims=dims, n_input_channels=1, num_classes=2, widen_factor=0.125)


def _densenet121(dims):
    return nets.DenseNet121(dims, 1, 2, init_features=8, growth_rate=4)


def _efficientnet(dims):
    return nets.EfficientNetBN(
        "efficientnet-b0", pretrained=False, spatial_dims=dims, in_channels=1, num_classes=2
    )


def _vnet(dims):
    return nets.VNet(dims, 1, 2, dropout_prob_down=0.0, dropout_prob_up=(0.0, 0.0))


def _unetr(dims):
    net = nets.UNETR(1, 2, (32,) * dims, 4, 12, 24, 2, spatial_dims=dims)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("norm_cross_attn" not in name)
    return net


def _swin_unetr(dims):
    return nets.SwinUNETR(
        in_channels=1,
        out_channels=2,
        feature_size=12,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 1),
        window_size=2,
        spatial_dims=dims,
    )


# Name -> builder, whether it segments, and a small input that it takes in 3D.
NETWORKS = {
    "UNet": (_unet, True, (8, 8, 8)),
    "AttentionUnet": (_attention_unet, True, (8, 8, 8)),
    "BasicUNet": (_basic_unet, True, (16, 16, 16)),
    "DynUNet": (_dynunet, True, (8, 8, 8)),
    "SegResNet": (_segresnet, True, (8, 8, 8)),
    "ResNet18": (_resnet18, False, (16, 16, 16)),
    "DenseNet121": (_densenet121, False, (32, 32, 32)),
    "EfficientNet-B0": (_efficientnet, False, (32, 32, 32)),
    "VNet": (_vnet, True, (16, 16, 16)),
    "UNETR": (_unetr, True, (32, 32, 32)),
    "SwinUNETR": (_swin_unetr, True, (64, 32, 32)),
}


def input_of(name, dims):
    return NETWORKS[name][2][:dims]


def build(name, dims):
    """Return the network without what draws at random, ready for private training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = with_group_norm(NETWORKS[name][0](dims))
    for module in net.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
            module.p = 0.0
        if hasattr(module, "drop_connect_rate"):
            module.drop_connect_rate = 0.0
    return net.train()
