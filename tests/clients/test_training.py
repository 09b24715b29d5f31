import math

import numpy as np
import pytest
import torch
from tiny import TinyClient, context_of, linear, model_arrays, pulled, says
from tiny import trained as sent_back
from torch import nn
from torch.utils.data import DataLoader

from fedmed_flower.clients.training import Parts, Steps, predict, predict_alone, train_epochs
from fedmed_flower.errors import DivergedError
from fedmed_flower.models.device import derive_seed


def batches_of(*sizes, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "image": torch.randn(size, 3, generator=generator),
            "label": torch.randint(0, 2, (size,), generator=generator),
        }
        for size in sizes
    ]


class SquaredError(nn.Module):
    def forward(self, outputs, labels):
        return ((outputs[:, 0] - labels) ** 2).mean()


def of(loss):
    """Return a loss of outputs and labels as one of model and batch."""
    return lambda model, batch: loss(model(batch["image"]), batch["label"])


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
    assert train_epochs(model, batches, of(SquaredError()), optimizer, 1) == pytest.approx(8 / 3)
    assert model.weight.item() == 1.5


def network():
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def test_training_equals_a_loop_by_hand_to_the_bit():
    batches, loss = batches_of(5, 5, 3), nn.CrossEntropyLoss()
    ours, plain = network(), network()
    ours.eval()
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.1)
    mean = train_epochs(ours, batches, of(loss), optimizer, 4)
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
    text = f"^the training loss is {value} in epoch 1: a lower learning-rate may help$"
    with pytest.raises(DivergedError, match=text):
        train_epochs(model, batches_of(2), of(Fixed(value)), optimizer, 3)


def test_the_epoch_of_a_loss_that_is_not_finite_is_named():
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e12)
    batches = [{"image": torch.ones(1, 1), "label": torch.tensor([1.0])}]
    with pytest.raises(DivergedError, match=r"epoch [2-9]"):
        train_epochs(model, batches, of(SquaredError()), optimizer, 9)


def test_prediction_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.9))
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = batches_of(4, 1)
    model.eval()
    outputs = predict(lambda batch: model(batch["image"]), batches)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    images = torch.cat([batch["image"] for batch in batches])
    expected = model[0](images) / math.sqrt(1 + 1e-5)
    np.testing.assert_allclose(outputs, expected.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert outputs.dtype == np.float32
    assert outputs.shape == (5, 2)


@pytest.mark.parametrize("mu", [0.0, 0.5, 4.0])
def test_the_proximal_term_is_that_of_the_loss_written_out(mu):
    torch.manual_seed(0)
    ours, twin = nn.Linear(3, 1), nn.Linear(3, 1)
    twin.load_state_dict(ours.state_dict())
    start = [p.detach().clone() for p in twin.parameters()]
    batches, loss = batches_of(3), SquaredError()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    train_epochs(ours, batches, of(loss), optimizer, 2, method=pulled(ours, mu))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    for _ in range(2):
        for batch in batches:
            optimizer.zero_grad()
            away = sum(((p - s) ** 2).sum() for p, s in zip(twin.parameters(), start, strict=True))
            (loss(twin(batch["image"]), batch["label"]) + mu / 2 * away).backward()
            optimizer.step()
    for got, wanted in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)


class Card:
    """A loss on a graphics card with room for so many records, and for fewer from a call on."""

    def __init__(self, loss, room, later=None, calls=0):
        self.loss, self.room, self.later, self.calls = loss, room, later, calls
        self.sizes = []

    def __call__(self, model, batch):
        size = len(batch["image"])
        self.calls -= 1
        room = self.room if self.later is None or self.calls >= 0 else self.later
        # A true card fails in the forward pass or in the backward one: here it may have begun.
        value = self.loss(model, batch)
        if size > room:
            raise torch.OutOfMemoryError(f"no room for {size}")
        self.sizes.append(size)
        return value


def small():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def doubled(batches):
    return [{**batch, "image": batch["image"].double()} for batch in batches]


def trained(loss, mu=0.0, epochs=3):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9, weight_decay=0.01)
    batches = doubled(batches_of(8, 8, 5))
    return model, train_epochs(model, batches, loss, optimizer, epochs, method=pulled(model, mu))


CROSS = of(nn.CrossEntropyLoss())


@pytest.mark.parametrize("mu", [0.0, 0.7])
@pytest.mark.parametrize("room", [1, 2, 3, 5, 7])
def test_parts_that_fit_train_as_whole_batches_do(room, mu):
    model, mean = trained(CROSS, mu)
    card = Card(CROSS, room)
    other, mean_of_parts = trained(card, mu)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=1e-9)
    assert mean_of_parts == pytest.approx(mean, abs=1e-9)
    assert max(card.sizes) <= room
    assert sum(card.sizes) == 3 * (8 + 8 + 5)


@pytest.mark.parametrize("mu", [0.0, 0.7])
@pytest.mark.parametrize("calls", range(12))
def test_gradients_of_a_batch_that_breaks_off_are_not_added_up_twice(calls, mu):
    model, mean = trained(CROSS, mu)
    # After so many calls the room shrinks, also between the parts of a batch.
    other, mean_of_parts = trained(Card(CROSS, 3, later=1, calls=calls), mu)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=1e-9)
    assert mean_of_parts == pytest.approx(mean, abs=1e-9)


def test_training_goes_on_with_the_smaller_parts_and_says_so(caplog):
    card = Card(CROSS, 3)
    with caplog.at_level("WARNING", "flwr.fedmed"):
        trained(card, epochs=1)
    # 8 records are too many, and so are 4: parts of at most 2, and 5 records in parts alike.
    assert card.sizes == [2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 8 records at a time: going on with 4",
        "out of memory with 4 records at a time: going on with 2",
    ]


@pytest.mark.parametrize("calls", [0, 4])
def test_one_record_that_does_not_fit_ends_training(calls):
    with pytest.raises(torch.OutOfMemoryError, match=says("no room for 1")):
        trained(Card(CROSS, 8, later=0, calls=calls))


def test_other_errors_are_not_taken_for_too_little_memory():
    def failing(model, batch):
        raise RuntimeError("a CUDA error of another kind")

    with pytest.raises(RuntimeError, match=says("a CUDA error of another kind")):
        trained(failing)


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [
        (9, 4, [3, 3, 3]),
        (9, 8, [5, 4]),
        (7, 7, [7]),
        (5, 1, [1] * 5),
        (3, 9, [3]),
        (10, 4, [4, 3, 3]),
    ],
)
def test_parts_are_alike_so_that_none_has_one_record_without_need(count, size, sizes):
    parts = Parts()
    parts.size = size
    batch = {"image": torch.arange(count), "label": torch.arange(count) * 2}
    found = parts.run(batch, lambda part, share: (part, share))
    assert [len(part["image"]) for part, _ in found] == sizes
    assert [share for _, share in found] == pytest.approx([n / count for n in sizes])
    for key, values in batch.items():
        assert torch.equal(torch.cat([part[key] for part, _ in found]), values)


def test_batch_norm_trains_in_parts():
    card = Card(CROSS, 4)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    # In parts of four and a rest, the ninth record would stand alone.
    mean = train_epochs(model, batches_of(8, 9), card, optimizer, 1)
    assert card.sizes == [4, 4, 3, 3, 3]
    assert math.isfinite(mean)


@pytest.mark.parametrize("room", [1, 2, 3, 4])
def test_prediction_in_parts_gives_the_same_outputs_in_order(room):
    model, sizes = small(), []
    batches = doubled(batches_of(5, 5, 1, 3))

    def outputs(batch):
        if len(batch["image"]) > room:
            raise torch.OutOfMemoryError("no room")
        sizes.append(len(batch["image"]))
        return model(batch["image"])

    expected = model(torch.cat([batch["image"] for batch in batches])).detach().float().numpy()
    found = predict(outputs, batches)
    np.testing.assert_allclose(found, expected, atol=1e-7)
    assert max(sizes) <= room
    assert sum(sizes) == 14


def test_prediction_of_one_record_that_does_not_fit():
    def outputs(batch):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match=says("no room")):
        predict(outputs, batches_of(3))


@pytest.mark.parametrize("bad", [(), (0,), (2, 4), range(5)])
def test_a_record_for_which_the_network_fails_changes_nothing_of_the_others(bad):
    model, (batch,) = small(), doubled(batches_of(5))
    asked = []

    def batch_at(place):
        asked.append(place)
        if place in bad and place % 2:
            raise ValueError("a record that cannot be read")
        image = batch["image"][place : place + 1]
        return {"image": image, "bad": torch.tensor([place in bad])}

    def outputs(one):
        assert one["image"].shape == (1, 3)
        if one["bad"].any():
            raise RuntimeError("a record of a label nobody declared")
        return model(one["image"])

    places, found = predict_alone(outputs, batch_at, 5)
    assert asked == [0, 1, 2, 3, 4]
    assert places == [place for place in range(5) if place not in bad]
    expected = model(batch["image"]).detach().float().numpy()[places]
    np.testing.assert_allclose(np.reshape(found, expected.shape), expected, atol=1e-7)


def test_too_little_memory_for_one_record_is_not_taken_for_a_bad_one():
    def outputs(batch):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match=says("no room")):
        predict_alone(outputs, lambda place: {"image": torch.zeros(1, 3)}, 2)


class Passes:
    """Gives so many batches, and counts how often it was gone over."""

    def __init__(self, count):
        self.count, self.begun, self.given = count, 0, 0

    def __iter__(self):
        self.begun += 1
        for number in range(self.count):
            self.given += 1
            yield number


@pytest.mark.parametrize(("batches", "count"), [(3, 1), (3, 3), (3, 7), (1, 4), (5, 10)])
def test_steps_go_over_the_data_as_often_as_they_must(batches, count):
    passes = Passes(batches)
    steps = Steps(passes, count)
    assert list(steps) == [number % batches for number in range(count)]
    # Nothing is loaded in vain.
    assert (passes.given, passes.begun) == (count, math.ceil(count / batches))
    assert len(list(steps)) == count


def test_steps_over_nothing_end():
    assert list(Steps([], 5)) == []


class Counting(TinyClient):
    def loss_of(self, model, batch):
        self.seen.append(len(batch["label"]))
        return super().loss_of(model, batch)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({"local_steps": 2}, [4, 4]),
        # Ten rows in batches of four: the third of a pass has two.
        ({"local_steps": 7, "local_epochs": 9}, [4, 4, 2, 4, 4, 2, 4]),
        ({"local_steps": 0, "local_epochs": 2}, [4, 4, 2, 4, 4, 2]),
    ],
)
def test_a_round_has_as_many_steps_as_local_steps_says(config, sizes):
    client = type("Client", (Counting,), {"seen": []})
    sent_back(client, context_of(**config))
    assert client.seen == sizes


def test_steps_and_passes_are_a_loop_over_torchs_batches_to_the_bit():
    own = TinyClient(context_of(momentum=0.5))
    prepared = own.prepared("train", pooled=False)[1]
    model, seed = linear(), derive_seed(0, "hospital-1", 1, "train")
    model.load_state_dict(model_arrays().to_torch_state_dict())
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(range(10), 4, shuffle=True, collate_fn=list, generator=order)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.5)
    for places in (*loader, *loader):
        optimizer.zero_grad()
        own.loss_of(model, own.batch_of(prepared, places)).backward()
        optimizer.step()
    wanted = {key: value.numpy().tobytes() for key, value in model.state_dict().items()}
    for config in ({"local_epochs": 2}, {"local_epochs": 2, "local_steps": 0}, {"local_steps": 6}):
        assert sent_back(TinyClient, context_of(momentum=0.5, **config)) == wanted
    for config in ({"local_steps": 5}, {"local_epochs": 3}):
        assert sent_back(TinyClient, context_of(momentum=0.5, **config)) != wanted
