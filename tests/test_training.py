import math

import numpy as np
import pytest
import torch
from tiny import says
from torch import nn

from fedmed_flower.clients.training import (
    Settings,
    derive_seed,
    predict,
    probe_places,
    torch_environment,
    train_epochs,
)
from fedmed_flower.errors import InputError

CPU = torch.device("cpu")


def batches_of(*sizes, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "image": torch.randn(size, 3, generator=generator),
            "label": torch.randint(0, 2, (size,), generator=generator),
        }
        for size in sizes
    ]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"local-epochs": 0}, "local-epochs must be at least 1, got 0"),
        ({"batch-size": -4}, "batch-size must be at least 1, got -4"),
        ({"weight-decay": -0.1}, "weight-decay must be at least 0 and finite, got -0.1"),
        ({"weight-decay": math.nan}, "weight-decay must be at least 0 and finite, got nan"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"torch-threads": -1}, "torch-threads must be at least 0, got -1"),
        ({"learning-rate": 0.0}, "learning-rate must be above 0 and finite, got 0.0"),
        ({"learning-rate": math.nan}, "learning-rate must be above 0 and finite, got nan"),
        ({"learning-rate": math.inf}, "learning-rate must be above 0 and finite, got inf"),
        ({"momentum": 1.0}, "momentum must be in [0, 1), got 1.0"),
        ({"momentum": -0.5}, "momentum must be in [0, 1), got -0.5"),
        ({"momentum": math.nan}, "momentum must be in [0, 1), got nan"),
        ({"optimizer": "lion"}, "optimizer must be one of adam, sgd, got 'lion'"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got 'tpu'"),
        ({"device": "cpu:1"}, "device must be one of auto, cpu, cuda, got 'cpu:1'"),
        ({"device": "auto:1"}, "device must be one of auto, cpu, cuda, got 'auto:1'"),
        ({"device": "cuda:x"}, "device must be one of auto, cpu, cuda, got 'cuda:x'"),
        ({"device": "cuda:-1"}, "device must be one of auto, cpu, cuda, got 'cuda:-1'"),
        ({"device": "auto:"}, "device must be one of auto, cpu, cuda, got 'auto:'"),
        ({"device": "cpu:"}, "device must be one of auto, cpu, cuda, got 'cpu:'"),
        ({"device": "cuda:"}, "device must be one of auto, cpu, cuda, got 'cuda:'"),
        ({"device": ""}, "device must be one of auto, cpu, cuda, got ''"),
        ({"local-epochs": 1.0}, "local-epochs must be of type int, got 1.0"),
        ({"batch-size": True}, "batch-size must be of type int, got True"),
        ({"learning-rate": True}, "learning-rate must be of type float, got True"),
        ({"learning-rate": "0.1"}, "learning-rate must be of type float, got '0.1'"),
        ({"mixed-precision": 1}, "mixed-precision must be of type bool, got 1"),
        ({"device": 0}, "device must be of type str, got 0"),
    ],
)
def test_settings_name_key_bound_and_value(config, text):
    with pytest.raises(InputError, match=says(text)):
        Settings.from_run_config(config)


def test_weight_decay_must_be_finite():
    with pytest.raises(InputError, match=r"^weight-decay must be .*got inf$"):
        Settings.from_run_config({"weight-decay": math.inf})


def test_settings_at_their_bounds():
    config = {"local-epochs": 1, "batch-size": 1, "weight-decay": 0, "seed": 0, "momentum": 0}
    settings = Settings.from_run_config(config | {"torch-threads": 0, "learning-rate": 1})
    assert settings == Settings(batch_size=1, learning_rate=1.0)
    assert type(settings.learning_rate) is float


def test_settings_are_read_in_kebab_case_and_others_are_left():
    config = {"local-epochs": 3, "batch_size": 7, "alpha": 2.0, "torch-threads": 2}
    assert Settings.from_run_config(config) == Settings(local_epochs=3, torch_threads=2)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = f"device is {device}, but torch sees no GPU here: set device to auto or cpu"
    with pytest.raises(InputError, match=says(text)):
        Settings(device=device).torch_device()


@pytest.mark.parametrize("there", [False, True])
def test_auto_takes_a_gpu_where_there_is_one(there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert Settings().torch_device().type == ("cuda" if there else "cpu")
    assert Settings(device="cpu").torch_device() == CPU


def test_optimizers_are_torchs_own_over_trainable_parameters():
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    adam = Settings(learning_rate=0.2, weight_decay=0.1).make_optimizer(model)
    sgd = Settings(optimizer="sgd", learning_rate=0.2, momentum=0.9).make_optimizer(model)
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


class SquaredError(nn.Module):
    def forward(self, outputs, labels):
        return ((outputs[:, 0] - labels) ** 2).mean()


def test_one_epoch_worked_out_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    # lr 0.25: loss (0 - 2)^2 = 4, w = 0 - 0.25 * 2 * (0 - 2) = 1; then rows 1 and 3 at w = 1:
    # loss (0^2 + 2^2) / 2 = 2, w = 1 - 0.25 * (0 - 4) / 2 = 1.5. Mean over rows (4 + 2 * 2) / 3.
    batches = [
        {"image": torch.ones(1, 1), "label": torch.tensor([2.0])},
        {"image": torch.ones(2, 1), "label": torch.tensor([1.0, 3.0])},
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    assert train_epochs(model, batches, SquaredError(), optimizer, 1, CPU) == pytest.approx(8 / 3)
    assert model.weight.item() == 1.5


def network():
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_training_equals_a_loop_by_hand_to_the_bit():
    batches, loss = batches_of(5, 5, 3), nn.CrossEntropyLoss()
    ours, plain = network(), network()
    ours.eval()
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.1)
    mean = train_epochs(ours, batches, loss, optimizer, 4, CPU)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    for _ in range(4):
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            value = loss(plain(batch["image"]), batch["label"])
            value.backward()
            optimizer.step()
            losses.append(value.item())
    for key, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert mean == pytest.approx(np.average(losses, weights=[5, 5, 3]), rel=1e-12)


class Fixed(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, outputs, labels):
        return outputs.sum() * 0 + self.value


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_training(value):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match=says(f"the training loss is {value} in epoch 1")):
        train_epochs(model, batches_of(2), Fixed(value), optimizer, 3, CPU)


def test_the_epoch_of_a_loss_that_is_not_finite_is_named():
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e12)
    batches = [{"image": torch.ones(1, 1), "label": torch.tensor([1.0])}]
    with pytest.raises(FloatingPointError, match=r"epoch [2-9]"):
        train_epochs(model, batches, SquaredError(), optimizer, 9, CPU)


def test_prediction_is_done_in_eval_mode_and_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.9))
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = batches_of(4, 1)
    outputs, labels = predict(model, batches, CPU)
    assert not any(module.training for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    images = torch.cat([batch["image"] for batch in batches])
    expected = model[0](images) / math.sqrt(1 + 1e-5)
    np.testing.assert_allclose(outputs, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert outputs.dtype == np.float32
    assert outputs.shape == (5, 2)
    assert labels.dtype == np.int64
    assert labels.tolist() == torch.cat([batch["label"] for batch in batches]).tolist()


@pytest.mark.parametrize("mu", [0.0, 0.5, 4.0])
def test_the_proximal_term_is_that_of_the_loss_written_out(mu):
    torch.manual_seed(0)
    ours, twin = nn.Linear(3, 1), nn.Linear(3, 1)
    twin.load_state_dict(ours.state_dict())
    start = [p.detach().clone() for p in twin.parameters()]
    batches, loss = batches_of(3), SquaredError()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    train_epochs(ours, batches, loss, optimizer, 2, CPU, proximal_mu=mu)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    for _ in range(2):
        for batch in batches:
            optimizer.zero_grad()
            away = sum(((p - s) ** 2).sum() for p, s in zip(twin.parameters(), start, strict=True))
            (loss(twin(batch["image"]), batch["label"]) + mu / 2 * away).backward()
            optimizer.step()
    for got, wanted in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_few_rows_far_apart_show_what_all_are_like():
    assert [probe_places(count) for count in (1, 2, 3, 4, 100)] == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 33, 66, 99],
    ]  # fmt: skip
