import math

import pytest
import torch
from tiny import says, says_of_setting
from torch import nn

from fedmed_flower.errors import InputError
from fedmed_flower.models.device import (
    arranged,
    derive_seed,
    half_precision,
    make_optimizer,
    torch_device,
    torch_environment,
)
from fedmed_flower.settings.imaging import ImagingSettings
from fedmed_flower.settings.tabular import TabularSettings
from fedmed_flower.settings.training import Settings

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"local-epochs": 0}, "local-epochs must be from 1 to 10,000, got 0"),
        ({"local-steps": -1}, "local-steps must be from 0 to 1,000,000, got -1"),
        ({"local-steps": 2.0}, "local-steps must be of type int, got 2.0"),
        ({"personal-epochs": -1}, "personal-epochs must be from 0 to 10,000, got -1"),
        ({"batch-size": -4}, "batch-size must be from 1 to 1,000,000, got -4"),
        ({"weight-decay": -0.1}, "weight-decay must be at least 0 and finite, got -0.1"),
        ({"weight-decay": math.nan}, "weight-decay must be at least 0 and finite, got nan"),
        ({"seed": -1}, "seed must be from 0 to 9,223,372,036,854,775,807, got -1"),
        ({"torch-threads": -1}, "torch-threads must be from 0 to 1,024, got -1"),
        ({"learning-rate": 0.0}, "learning-rate must be above 0 and finite, got 0.0"),
        ({"learning-rate": math.nan}, "learning-rate must be above 0 and finite, got nan"),
        ({"learning-rate": math.inf}, "learning-rate must be above 0 and finite, got inf"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"momentum": -0.5}, "momentum must be at least 0 and below 1, got -0.5"),
        ({"momentum": math.nan}, "momentum must be at least 0 and below 1, got nan"),
        ({"optimizer": "lion"}, "optimizer must be one of adam, sgd, got 'lion'"),
        ({"schedule": "linear"}, "schedule must be one of constant, cosine, got 'linear'"),
        ({"schedule": "cosine"}, "schedule=cosine needs num-server-rounds in the run config"),
        ({"num-server-rounds": -1}, "num-server-rounds must be from 1 to 100,000, or 0, got -1"),
        (
            {"num-server-rounds": 10**15},
            "num-server-rounds must be from 1 to 100,000, or 0, got 1000000000000000",
        ),
        ({"torch-threads": 10**6}, "torch-threads must be from 0 to 1,024, got 1000000"),
        ({"torch-threads": 1025}, "torch-threads must be from 0 to 1,024, got 1025"),
        ({"local-epochs": 10_001}, "local-epochs must be from 1 to 10,000, got 10001"),
        ({"local-steps": 10**6 + 1}, "local-steps must be from 0 to 1,000,000, got 1000001"),
        ({"batch-size": 10**6 + 1}, "batch-size must be from 1 to 1,000,000, got 1000001"),
        ({"personal-epochs": 10_001}, "personal-epochs must be from 0 to 10,000, got 10001"),
        (
            {"seed": 2**63},
            "seed must be from 0 to 9,223,372,036,854,775,807, got 9223372036854775808",
        ),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:NUMBER, got 'tpu'"),
        ({"device": "cpu:1"}, "device must be auto, cpu, cuda or cuda:NUMBER, got 'cpu:1'"),
        ({"device": "auto:1"}, "device must be auto, cpu, cuda or cuda:NUMBER, got 'auto:1'"),
        ({"device": "cuda:x"}, "device must be auto, cpu, cuda or cuda:NUMBER, got 'cuda:x'"),
        ({"device": "cuda:-1"}, "device must be auto, cpu, cuda or cuda:NUMBER, got 'cuda:-1'"),
        ({"device": "auto:"}, "device must be auto, cpu, cuda or cuda:NUMBER, got 'auto:'"),
        ({"device": "cpu:"}, "device must be auto, cpu, cuda or cuda:NUMBER, got 'cpu:'"),
        ({"device": "cuda:"}, "device must be auto, cpu, cuda or cuda:NUMBER, got 'cuda:'"),
        ({"device": ""}, "device must be auto, cpu, cuda or cuda:NUMBER, got ''"),
        ({"local-epochs": 1.0}, "local-epochs must be of type int, got 1.0"),
        ({"batch-size": True}, "batch-size must be of type int, got True"),
        ({"learning-rate": True}, "learning-rate must be of type float, got True"),
        ({"learning-rate": "0.1"}, "learning-rate must be of type float, got '0.1'"),
        ({"mixed-precision": 1}, "mixed-precision must be of type bool, got 1"),
        ({"device": 0}, "device must be of type str, got 0"),
    ],
)
def test_settings_name_key_bound_and_value(config, text):
    with pytest.raises(InputError, match=says_of_setting(text)):
        Settings.from_run_config(config)


def test_weight_decay_must_be_finite():
    with pytest.raises(InputError, match=r"^weight-decay must be .*got inf; see"):
        Settings.from_run_config({"weight-decay": math.inf})


def test_settings_at_their_bounds():
    config = {"local-epochs": 1, "batch-size": 1, "weight-decay": 0, "seed": 0, "momentum": 0}
    settings = Settings.from_run_config(config | {"torch-threads": 0, "learning-rate": 1})
    assert settings == Settings(batch_size=1, learning_rate=1.0)
    assert type(settings.learning_rate) is float
    most = {"local-epochs": 10_000, "local-steps": 10**6, "batch-size": 10**6}
    most |= {"personal-epochs": 10_000, "torch-threads": 1024, "num-server-rounds": 100_000}
    found = Settings.from_run_config(most | {"seed": 2**63 - 1})
    assert (found.torch_threads, found.num_server_rounds, found.seed) == (1024, 10**5, 2**63 - 1)


def test_settings_are_read_in_kebab_case_and_others_are_left():
    config = {"local-epochs": 3, "batch_size": 7, "alpha": 2.0, "torch-threads": 2}
    assert Settings.from_run_config(config) == Settings(local_epochs=3, torch_threads=2)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = f"device is {device}, but torch sees no GPU here: set device to auto or cpu"
    with pytest.raises(InputError, match=says(text)):
        torch_device(Settings(device=device))


@pytest.mark.parametrize("there", [False, True])
def test_auto_takes_a_gpu_where_there_is_one(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert torch_device(Settings()).type == ("cuda" if there else "cpu")
    assert torch_device(Settings(device="cpu")) == CPU


def test_optimizers_are_torchs_own_over_trainable_parameters():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    adam = make_optimizer(Settings(learning_rate=0.2, weight_decay=0.1), model)
    sgd = make_optimizer(Settings(optimizer="sgd", learning_rate=0.2, momentum=0.9), model)
    assert type(adam) is torch.optim.Adam
    assert (adam.defaults["lr"], adam.defaults["weight_decay"]) == (0.2, 0.1)
    assert type(sgd) is torch.optim.SGD
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.9, 0.0)
    for optimizer in (adam, sgd):
        assert optimizer.param_groups[0]["params"] == [model.weight]


def test_derived_seeds_are_stable():
    # sha256("0/hospital-1/1/train") begins with these four bytes.
    assert derive_seed(0, "hospital-1", 1, "train") == 0xBBC51CB2
    assert derive_seed() == 0xE3B0C442


def test_derived_seeds_differ_in_each_part():
    parts = [
        (seed, site, turn, purpose)
        for seed in range(4)
        for site in ("hospital-1", "hospital-11", "hospital-2")
        for turn in range(30)
        for purpose in ("train", "val", "test")
    ]
    assert len({derive_seed(*each) for each in parts}) == len(parts)


def test_derived_seeds_do_not_mix_up_neighbouring_parts():
    assert derive_seed(1, 11) != derive_seed(11, 1) != derive_seed(111)
    assert derive_seed("a/1", 2) != derive_seed("a", "1/2")


@pytest.mark.parametrize("fails", [False, True])
def test_torch_is_put_back_as_it_was(fails):
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        with torch_environment(7, threads + 2, CPU):
            inside = torch.rand(3)
            assert torch.get_num_threads() == threads + 2
            if fails:
                raise OSError
    except OSError:
        assert fails
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(7)))


def test_no_threads_asked_for_leaves_their_number():
    threads = torch.get_num_threads()
    with torch_environment(0, 0, CPU):
        assert torch.get_num_threads() == threads


def test_the_cosine_schedule_is_the_formula():
    settings = Settings(learning_rate=0.4, schedule="cosine", num_server_rounds=4)
    model = nn.Linear(2, 1)

    def rate(server_round):
        optimizer = make_optimizer(settings, model, settings.progress(server_round))
        return optimizer.param_groups[0]["lr"]

    # (1 + cos x) / 2 for x = 0, 45, 90 and 135 degrees.
    known = [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert [rate(number) for number in (1, 2, 3, 4)] == pytest.approx([0.4 * k for k in known])
    # Neither a round before the first nor one after the last leaves these bounds.
    assert (rate(0), rate(9)) == (rate(1), rate(4))


def test_the_constant_schedule_needs_no_number_of_rounds():
    settings = Settings(learning_rate=0.4, optimizer="sgd")
    for server_round in (0, 1, 7):
        assert settings.progress(server_round) == 0
    optimizer = make_optimizer(settings, nn.Linear(2, 1), 0.9)
    assert optimizer.param_groups[0]["lr"] == 0.4


@pytest.mark.parametrize(
    ("there", "wanted", "used"),
    [(True, True, True), (True, False, False), (False, True, False), (False, False, False)],
)
def test_half_precision_is_for_gpus_and_where_it_is_wanted(there, wanted, used, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert half_precision(Settings(mixed_precision=wanted)) is used
    assert half_precision(Settings(mixed_precision=wanted, device="cpu")) is False


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2, 3, 4, 5), (60, 1, 15, 3)), ((2, 3, 4, 5, 6), (360, 1, 90, 18, 3)), ((2, 3), (3, 1))],
)
def test_channels_are_last_in_memory_and_values_as_before(shape, strides):
    values = torch.randn(shape)
    found = arranged(values)
    assert found.stride() == strides
    assert torch.equal(found, values)


def test_networks_and_patches_of_more_memory_than_there_is_are_refused():
    text = "network-width must be at most 16384 and, squared and times network-depth, at most"
    with pytest.raises(InputError, match=text):
        TabularSettings(network_width=16_384, network_depth=2)
    assert TabularSettings(network_width=16_384, network_depth=1).network_width == 16_384
    with pytest.raises(InputError, match="patch-size must be of at most 134,217,728 pixels"):
        ImagingSettings(patch_size="20000,20000")
