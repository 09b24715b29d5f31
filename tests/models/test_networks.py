import copy
import json
import os
import sys
from collections import OrderedDict

import pytest
import torch
from monai.networks import nets
from tiny import context_of, says, see
from torch import nn
from torch.utils import model_zoo

from fedmed_flower.errors import InputError, shown
from fedmed_flower.models.networks import build_network
from fedmed_flower.models.trainable import Travelling
from fedmed_flower.settings.model import ModelSettings

UNET = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8],
    "strides": [2],
    "norm": ["batch", {"affine": False}],
    "bias": True,
    "dropout": 0.5,
}
UNET_TOML = (
    "{spatial_dims = 2, in_channels = 1, out_channels = 3, channels = [4, 8], strides = [2], "
    'norm = ["batch", {affine = false}], bias = true, dropout = 0.5}'
)
SEGRESNET = {
    "_target_": "SegResNet",
    "spatial_dims": "@dims",
    "init_filters": 8,
    "in_channels": 1,
    "out_channels": "$len(@classes)",
    "norm": "batch",
    "blocks_down": [1, 1],
    "blocks_up": [1],
}
CONFIG = {
    "imports": ["$import os"],
    "dims": 2,
    "classes": ["background", "tumour"],
    "network_def": SEGRESNET,
    # Another machine's data folder: only the network is made.
    "dataset": "$open('/not/there')",
    "inferer": {"_target_": "NoSuchInferer"},
}
DECODER = "up_*,conv_final.*"


def segresnet():
    return nets.SegResNet(2, 8, 1, 2, norm="batch", blocks_down=[1, 1], blocks_up=[1])


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def build(**settings):
    return build_network(ModelSettings(**settings))


def write_bundle(folder, config=CONFIG, name="inference.json", weights=None):
    """Write a MONAI bundle; a text as it is, else as JSON."""
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "configs" / name).write_text(text)
    if weights is not None:
        (folder / "models").mkdir(exist_ok=True)
        torch.save(weights, folder / "models" / "model.pt")
    return str(folder)


def pretrained(seed=7):
    """Return weights as training leaves them: the statistics of batch norm moved too."""
    model = seeded(segresnet, seed)
    for _ in range(2):
        model(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) + 1)
    return model.state_dict()


def test_settings_come_from_the_run_config():
    config = {"network": "UNet", "network-args": UNET_TOML, "trainable": "*.model.2.*"}
    got = ModelSettings.from_run_config(config)
    assert got == ModelSettings("UNet", UNET_TOML, "", "*.model.2.*")


@pytest.mark.parametrize("text", [UNET_TOML, json.dumps(UNET), json.dumps(UNET, indent=2)])
def test_a_network_by_name_is_the_one_that_monai_makes(text):
    found = seeded(lambda: build(network="UNet", network_args=text))
    wanted = seeded(lambda: nets.UNet(**UNET))
    assert type(found) is nets.UNet
    assert repr(found) == repr(wanted)
    assert same(found, wanted)
    assert not same(seeded(lambda: build(network="UNet", network_args=text), seed=1), wanted)


@pytest.mark.parametrize(
    ("name", "args", "make"),
    [
        (
            "resnet10",
            '{spatial_dims = 2, n_input_channels = 1, num_classes = 2, norm = "batch"}',
            lambda: nets.resnet10(spatial_dims=2, n_input_channels=1, num_classes=2, norm="batch"),
        ),
        (
            "densenet121",
            "{spatial_dims = 2, in_channels = 1, out_channels = 2, pretrained = false}",
            lambda: nets.DenseNet121(2, 1, 2),
        ),
        (
            "MedNeXtS",
            '{"spatial_dims": 2, "in_channels": 1, "out_channels": 2}',
            lambda: nets.MedNeXtS(spatial_dims=2, in_channels=1, out_channels=2),
        ),
        ("SegResNet", "", lambda: nets.SegResNet()),
    ],
)
def test_functions_and_other_spellings_make_networks_too(name, args, make):
    assert same(seeded(lambda: build(network=name, network_args=args)), seeded(make))


@pytest.mark.parametrize("settings", [{}, {"network": "UNet", "bundle": "here"}])
def test_one_of_network_and_bundle_is_given(settings):
    network, bundle = settings.get("network", ""), settings.get("bundle", "")
    text = (
        "give either network, a name in monai.networks.nets, or bundle, the folder of a MONAI "
        f"bundle: got network={network!r} and bundle={bundle!r}" + see("network")
    )
    with pytest.raises(InputError, match=says(text)):
        build(**settings)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("unet", "did you mean UNet?"),
        ("UNett", "did you mean UNet?"),
        ("ResNet50", "did you mean resnet50?"),
        ("DENSENET121", "did you mean DenseNet121?"),
        ("swin-unetr", "did you mean SwinUNETR?"),
        # What the module also holds: submodules, tables, functions that make no network.
        ("vnet", "did you mean VNet?"),
        ("annotations", "it has UNet, SegResNet and others"),
        ("BlockArgs", "it has UNet, SegResNet and others"),
        ("FLEXUNET_BACKBONE", "did you mean FlexUNet?"),
        ("__builtins__", "it has UNet, SegResNet and others"),
        ("os.system", "it has UNet, SegResNet and others"),
        (" ", "it has UNet, SegResNet and others"),
    ],
)
def test_other_names_are_refused(name, hint):
    text = f"monai.networks.nets has no network {name!r}: {hint}"
    with pytest.raises(InputError, match=says(text)):
        build(network=name)


def test_what_monai_imports_from_elsewhere_is_no_network_of_it(monkeypatch):
    monkeypatch.setattr(nets, "Linear", nn.Linear, raising=False)
    monkeypatch.setattr(nets, "gethostname", lambda: nn.Linear(2, 2), raising=False)
    for name in ("Linear", "gethostname"):
        with pytest.raises(InputError, match=f"^monai.networks.nets has no network '{name}': "):
            build(network=name, network_args="{in_features = 2, out_features = 2}")


@pytest.mark.parametrize(
    "name", ["get_pretrained_resnet_medicalnet", "get_medicalnet_pretrained_resnet_args"]
)
def test_functions_that_download_or_look_up_are_not_called(name, monkeypatch):
    monkeypatch.setattr("monai.networks.nets.resnet.hf_hub_download", pytest.fail)
    with pytest.raises(InputError, match=f"^monai.networks.nets has no network '{name}': "):
        build(network=name, network_args="{resnet_depth = 18}")


def test_a_function_that_returns_no_network_is_refused():
    args = "{inputs = [1], p = 0.5, training = false}"
    text = "network drop_connect is a function that returns no network: name another one"
    with pytest.raises(InputError, match=says(text)):
        build(network="drop_connect", network_args=args)


@pytest.mark.parametrize(
    "text",
    [
        "{spatial_dims = 2",
        '{"spatial_dims": 2,}',
        "spatial_dims = 2",
        "[2]",
        "2",
        "null",
        "{}\nspatial_dims = 2",
        "{norm = 2024-01-01}",
        "{norm = [[{a = 10:00:00}]]}",
        "[" * 5000,
    ],
)
def test_arguments_are_one_table_of_plain_data(text):
    wanted = (
        "network-args must be a TOML inline table or a JSON object of numbers, texts, lists and "
        f"tables, such as {{spatial_dims = 2, channels = [16, 32]}}, got {text!r}"
    )
    with pytest.raises(InputError, match=says(shown(wanted + see("network-args")))):
        build(network="UNet", network_args=text)


def test_arguments_are_data_and_never_a_bundles_config():
    table = {"_target_": "os.system", "command": "true"}
    with pytest.raises(InputError, match=r"^network UNet with network-args .*: "):
        build(network="UNet", network_args=json.dumps(UNET | {"act": table}))


@pytest.mark.parametrize(
    ("args", "cause"),
    [
        (
            "{spatial_dims = 2, in_channels = 1, out_channels = 3, channels = [4, 8]}",
            "TypeError: UNet.__init__() missing 1 required positional argument: 'strides'",
        ),
        (
            "{spatial_dims = 2, in_channels = 1, out_channels = 3, channels = [4], strides = []}",
            "ValueError: the length of `channels` should be no less than 2.",
        ),
        (
            '{"spatial_dims": 2, "colour": null}',
            "TypeError: UNet.__init__() got an unexpected keyword argument 'colour'",
        ),
    ],
)
def test_a_network_that_cannot_be_built_tells_why(args, cause):
    text = f"network UNet with network-args {args!r}: {cause}"
    with pytest.raises(InputError, match=says(text)):
        build(network="UNet", network_args=args)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("resnet10", "pretrained", True),
        ("resnet10", "pretrained", "/etc/passwd"),
        ("DenseNet121", "pretrained", True),
        ("HoVerNet", "pretrained_url", "http://localhost/x"),
        ("TorchVisionFCModel", "weights", "DEFAULT"),
        ("Transchex", "path_or_repo_id", "bert-base-uncased"),
    ],
)
def test_no_argument_makes_a_network_fetch_weights(name, key, value):
    text = (
        f"network-args must not set {key}, got {value!r}: for a network with weights, set bundle "
        "to a folder that holds them as models/model.pt" + see("network-args")
    )
    with pytest.raises(InputError, match=says(text)):
        build(network=name, network_args=json.dumps({key: value}))


def test_no_network_downloads_by_itself(monkeypatch):
    monkeypatch.setattr(model_zoo, "load_url", lambda *args, **kwargs: pytest.fail("downloads"))
    args = {"model_name": "efficientnet-b0", "spatial_dims": 2, "in_channels": 3, "num_classes": 2}
    found = seeded(lambda: build(network="EfficientNetBN", network_args=json.dumps(args)))
    assert same(found, seeded(lambda: nets.EfficientNetBN(pretrained=False, **args)))


def test_a_bundle_gives_its_network_with_fresh_weights_by_the_seed(tmp_path):
    bundle = write_bundle(tmp_path)
    assert same(seeded(lambda: build(bundle=bundle)), seeded(segresnet))
    assert not same(seeded(lambda: build(bundle=bundle), seed=1), seeded(segresnet))


@pytest.mark.parametrize(
    "stored",
    [
        lambda state: state,
        lambda state: dict(state),
        lambda state: OrderedDict((f"module.{name}", value) for name, value in state.items()),
        lambda state: {"model": state},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {
            "network": {f"module.{name}": value for name, value in state.items()},
            "optimizer": {"state": {0: {"step": torch.ones(1)}}, "param_groups": []},
        },
    ],
)
def test_the_network_starts_with_the_bundles_weights(tmp_path, stored):
    state = pretrained()
    found = build(bundle=write_bundle(tmp_path, weights=stored(state)))
    assert isinstance(found, nets.SegResNet)
    assert list(found.state_dict()) == list(state)
    for name, value in found.state_dict().items():
        assert torch.equal(value, state[name]), name
        assert value.dtype == state[name].dtype


def test_a_layer_that_is_called_module_keeps_its_name(tmp_path):
    config = {"network_def": {"_target_": "torch.nn.DataParallel", "module": "@layer"}}
    config["layer"] = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 1}
    state = {"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}
    found = build(bundle=write_bundle(tmp_path, config, weights=state))
    assert found.module.weight.tolist() == [[1, 1]]


def test_network_is_the_key_where_there_is_no_network_def(tmp_path):
    config = {key: value for key, value in CONFIG.items() if key != "network_def"}
    config |= {"net": SEGRESNET, "network": "$@net.to('cpu')"}
    assert same(seeded(lambda: build(bundle=write_bundle(tmp_path, config))), seeded(segresnet))
    config["network_def"] = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 1}
    assert isinstance(build(bundle=write_bundle(tmp_path, config)), nn.Linear)


@pytest.mark.parametrize("name", ["inference.yaml", "inference.yml"])
def test_a_bundle_in_yaml_may_use_macros(tmp_path, name):
    pytest.importorskip("yaml")
    text = """
_meta_: {channels: 1}
dims: 2
levels: [1, 1]
network_def:
  _target_: SegResNet
  spatial_dims: "@dims"
  init_filters: 8
  in_channels: "@_meta_::channels"
  out_channels: $@dims
  norm: batch
  blocks_down: "%levels"
  blocks_up: [1]
"""
    state = pretrained()
    found = build(bundle=write_bundle(tmp_path, text, name, weights=state))
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())


def test_a_folder_with_a_comma_and_a_home_are_found(tmp_path, monkeypatch):
    write_bundle(tmp_path / "a,b.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert isinstance(build(bundle="~/a,b.json"), nets.SegResNet)


def test_yaml_needs_its_package(tmp_path, monkeypatch):
    bundle = write_bundle(tmp_path, "network_def: 1", "inference.yaml")
    monkeypatch.setitem(sys.modules, "yaml", None)
    path = tmp_path / "configs" / "inference.yaml"
    with pytest.raises(
        InputError, match=says(f"{path} needs the package pyyaml: pip install pyyaml")
    ):
        build(bundle=bundle)
    write_bundle(tmp_path)
    assert isinstance(build(bundle=bundle), nets.SegResNet)


def test_arguments_do_not_go_with_a_bundle(tmp_path):
    text = (
        "network-args is only for network: with bundle, put arguments into the bundle's config, "
        "got '{dims = 3}'"
    )
    with pytest.raises(InputError, match=says(text)):
        build(bundle=write_bundle(tmp_path), network_args="{dims = 3}")


def test_a_bundle_that_is_not_there_is_named(tmp_path):
    file = tmp_path / "nothing" / "configs" / "inference.json"
    text = f"bundle: there is no {file} (or inference.yaml, inference.yml)"
    with pytest.raises(InputError, match=says(text)):
        build(bundle=str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            '{"network_def": ',
            " cannot be read: JSONDecodeError: Expecting value: line 1 column 17 (char 16)",
        ),
        ("[1]", " cannot be read: AttributeError: 'list' object has no attribute 'items'"),
        ("{}", " has no key network_def or network"),
        ({"trainer": 1}, " has no key network_def or network"),
        ({"network_def": None}, ": network_def must be a network, got a NoneType"),
        ({"network": {"spatial_dims": 2}}, ": network must be a network, got a dict"),
        (
            {"network_def": SEGRESNET | {"_target_": "NoSuchNet"}, "dims": 2, "classes": []},
            ": network_def cannot be built: ModuleNotFoundError: Cannot locate class or function "
            "path: 'NoSuchNet'.",
        ),
        (
            {"network_def": {"_target_": "UNet", "spatial_dims": 2, "channels": []}},
            ": network_def cannot be built: TypeError: UNet.__init__() missing 3 required "
            "positional arguments: 'in_channels', 'out_channels', and 'strides'",
        ),
    ],
)
def test_a_config_that_is_wrong_is_named(tmp_path, config, text):
    bundle = write_bundle(tmp_path, config)
    path = tmp_path / "configs" / "inference.json"
    with pytest.raises(InputError, match=says(f"{path}{text}")):
        build(bundle=bundle)


def test_broken_yaml_is_named(tmp_path):
    pytest.importorskip("yaml")
    bundle = write_bundle(tmp_path, "network_def: [1, 2", "inference.yml")
    path = tmp_path / "configs" / "inference.yml"
    with pytest.raises(InputError) as raised:
        build(bundle=bundle)
    assert str(raised.value).startswith(f"{path} cannot be read: ParserError: ")
    assert "\n" not in str(raised.value)


def small():
    return {"network_def": {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 1}}


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        (
            {"weight": torch.ones(1, 2)},
            " does not fit the network of inference.json: 1 entries differ, such as bias (network: "
            "(1,), file: nothing)",
        ),
        (
            {"module.weight": torch.ones(1, 3), "module.bias": torch.ones(())},
            " does not fit the network of inference.json: 2 entries differ, such as weight "
            "(network: (1, 2), file: (1, 3))",
        ),
        (
            {"weight": torch.ones(1, 2), "bias": torch.ones(1), "head.bias": torch.ones(4)},
            " does not fit the network of inference.json: 1 entries differ, such as head.bias "
            "(network: nothing, file: (4,))",
        ),
        (
            {"model": {"weight": torch.ones(1, 2)}, "ema": {"weight": torch.ones(1, 2)}},
            " holds state dicts under 'model', 'ema': save the state dict of the network alone "
            "there",
        ),
        (
            {"epoch": 3, "model": {}},
            " holds no state dict: save the state dict of the network alone there",
        ),
        (
            {1: torch.ones(1)},
            " holds no state dict: save the state dict of the network alone there",
        ),
        (
            torch.ones(3),
            " holds no state dict: save the state dict of the network alone there",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, weights, text):
    bundle = write_bundle(tmp_path, small(), weights=weights)
    with pytest.raises(InputError, match=says(f"{tmp_path / 'models' / 'model.pt'}{text}")):
        build(bundle=bundle)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_weights_run_no_code(tmp_path):
    sign = tmp_path / "was here"
    bundle = write_bundle(tmp_path, small(), weights={"weight": Hostile(str(sign))})
    start = f"{tmp_path / 'models' / 'model.pt'} holds no weights that load without running its "
    with pytest.raises(InputError) as raised:
        build(bundle=bundle)
    assert str(raised.value).startswith(f"{start}code: save a state dict there (")
    assert not sign.exists()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b""])
def test_a_truncated_file_of_weights_is_named(tmp_path, damage):
    bundle = write_bundle(tmp_path, small(), weights={"weight": torch.ones(1, 2)})
    path = tmp_path / "models" / "model.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError) as raised:
        build(bundle=bundle)
    assert str(raised.value).startswith(f"{path} holds no weights that load without running its ")
    assert "\n" not in str(raised.value)


def test_a_pretrained_encoder_stays_as_it_was_while_the_rest_is_trained(tmp_path):
    state = pretrained()
    model = build(bundle=write_bundle(tmp_path, weights=state))
    travelling = Travelling(model, DECODER)
    before = travelling.digest(model)
    # Every site that has the bundle has the same frozen part, whatever its seed.
    twin = seeded(lambda: build(bundle=str(tmp_path)), seed=3)
    assert Travelling(twin, DECODER).digest(twin) == before
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, state[n])}
    assert moved == set(travelling.names)
    assert {name.split(".")[0] for name in moved} == {"up_layers", "up_samples", "conv_final"}
    assert any("running_mean" in name for name in state.keys() - moved)
    assert travelling.digest(model) == before
    travelling.load(twin, travelling.state(model))
    assert same(twin, model)


def test_a_real_site_takes_the_bundle_that_its_own_node_config_names():
    run = {"bundle": "/named/by/the/server", "trainable": "*.decoder.*"}
    simulated = context_of(**run)
    assert ModelSettings.of_site(simulated).bundle == "/named/by/the/server"
    own = context_of(node_config={"site-name": "north", "bundle": "/own"}, **run)
    assert ModelSettings.of_site(own) == ModelSettings(bundle="/own", trainable="*.decoder.*")
    text = (
        "this run asks for a MONAI bundle, whose config runs code: the node config must name the "
        "hospital's own copy, bundle=FOLDER" + see("bundle")
    )
    with pytest.raises(InputError, match=says(text)):
        ModelSettings.of_site(context_of(node_config={"site-name": "north"}, **run))
    # A run without a bundle leaves the hospital's own alone.
    named = context_of(node_config={"site-name": "north", "bundle": "/own"}, network="UNet")
    assert ModelSettings.of_site(named) == ModelSettings(network="UNet")


def test_a_network_of_more_weights_than_fit_is_refused_before_they_are_made():
    large = UNET | {"channels": [9999, 99999], "strides": [2]}
    text = (
        r"^network UNet with these network-args has [\d,]+ weights: at most 1,073,741,824 are "
        r"allowed$"
    )
    with pytest.raises(InputError, match=text):
        build(network="UNet", network_args=json.dumps(large))
