"""What `fedmed list networks` says of each network is so."""

import pytest
from networks import NETWORKS as TRAINED
from tiny import context_of

from fedmed_flower import ClassificationClient, SegmentationClient
from fedmed_flower.errors import InputError
from fedmed_flower.models.catalog import NETWORKS, YES
from fedmed_flower.privacy import with_group_norm

IN_2D_AND_3D = [
    pytest.param(
        network,
        dims,
        id=f"{network.name}-{dims}D",
        marks=[pytest.mark.slow] * (dims == 3 or network.name == "UNETR"),
    )
    for network in NETWORKS
    for dims in (2, 3)
]


@pytest.mark.parametrize(("network", "dims"), IN_2D_AND_3D)
def test_a_network_takes_the_arguments_and_private_training_asks_what_is_said(network, dims):
    masks = network.purpose == "masks"
    members = {"spatial_dims": dims, "load_data": lambda self, site: None}
    members |= {"classes": ("it",)} if masks else {"num_classes": 2}
    kind = type("Client", (SegmentationClient if masks else ClassificationClient,), members)
    args = network.args.replace("spatial_dims = 2", f"spatial_dims = {dims}")
    settings = {"network": network.name, "network_args": args, "privacy": "patient"}
    client = kind(context_of(patch_size=",".join(["64"] * dims), **settings))
    model = client.build_model()
    probe = client.probe(2)
    if network.private == YES:
        client.check_private(model, probe)
        return
    wanted, _, _ = network.private.partition(" in build_model")
    with pytest.raises(InputError) as refused:
        client.check_private(model, probe)
    assert wanted.removeprefix("freeze ") in str(refused.value)
    if wanted == "with_group_norm":
        model = with_group_norm(model)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm_cross_attn" not in name)
    client.check_private(model, probe)


def test_the_networks_whose_training_is_tested_are_listed():
    names = {"ResNet18": "resnet18", "EfficientNet-B0": "EfficientNetBN"}
    assert {network.name for network in NETWORKS} - {"DenseNet"} == {
        names.get(name, name) for name in TRAINED
    }
    purposes = {network.name: network.purpose == "masks" for network in NETWORKS}
    for name, (_, masks, _) in TRAINED.items():
        assert purposes[names.get(name, name)] is masks
