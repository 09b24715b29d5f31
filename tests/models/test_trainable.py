import copy
import gc
import hashlib
import pickle
import struct
import weakref

import pytest
import torch
from monai.networks.nets import DynUNet
from monai.networks.utils import eval_mode, train_mode
from tiny import says, see
from torch import nn

from fedmed_flower.errors import InputError
from fedmed_flower.models.trainable import Travelling
from fedmed_flower.privacy.gradients import RecordGradients


def block(channels):
    return nn.Sequential(nn.Conv1d(channels, 2, 3, padding=1), nn.BatchNorm1d(2), nn.Dropout(0.5))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = block(1), block(2)

    def forward(self, images):
        return self.decoder(torch.relu(self.encoder(images)))


class Token(nn.Module):
    """Holds a parameter of its own beside a layer that is trained."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Parameter(torch.ones(4)), nn.BatchNorm1d(4)

    def forward(self, rows):
        return self.head(rows + self.token)


ENCODER = [f"encoder.0.{name}" for name in ("weight", "bias")]
ENCODER += [
    f"encoder.1.{name}"
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
]
DECODER = [name.replace("encoder", "decoder") for name in ENCODER]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


def state_bits(model):
    return {key: value.numpy().tobytes() for key, value in model.state_dict().items()}


def images(count=6, seed=1):
    return torch.randn(count, 1, 5, generator=torch.Generator().manual_seed(seed))


def test_without_a_pattern_everything_travels_and_nothing_is_changed(model):
    model.encoder[0].bias.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    travelling = Travelling(model, "")
    assert list(travelling.names) == ENCODER + DECODER
    assert list(travelling.state(model)) == ENCODER + DECODER
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(layer.training for layer in model.train().modules())
    assert travelling.digest(model) == ""


@pytest.mark.parametrize(
    ("trainable", "names"),
    [
        ("*.decoder.*", DECODER),
        ("decoder.*", DECODER),
        ("*decoder*", DECODER),
        (" decoder.0.* ,encoder.1.*", ENCODER[2:] + DECODER[:2]),
        ("*.0.bias", [name for name in ENCODER + DECODER if name.endswith("0.bias")]),
        ("*.[0].weight", [name for name in ENCODER + DECODER if name.endswith("0.weight")]),
        ("*", ENCODER + DECODER),
    ],
)
def test_what_matches_travels_and_is_trained_and_the_rest_is_frozen(model, trainable, names):
    travelling = Travelling(model, trainable)
    assert list(travelling.names) == names
    assert list(travelling.state(model)) == names
    wanted = {name: name in names for name, _ in model.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted


def test_a_layer_that_learns_and_keeps_what_does_not_travel_is_refused(model):
    text = (
        "trainable matches a part of the layer encoder.1 but not encoder.1.num_batches_tracked, "
        "which it changes in training: match all of the layer or nothing, got '*.bias'"
    )
    with pytest.raises(InputError, match=says(text)):
        Travelling(model, "*.bias")


def test_a_dot_before_the_name_is_all_that_is_added():
    model = nn.ModuleDict({"xdecoder": nn.Linear(2, 2), "net": nn.ModuleDict()})
    model["net"]["decoder"] = nn.Linear(2, 2)
    names = Travelling(model, "*.decoder.*").names
    assert names == ("net.decoder.weight", "net.decoder.bias")


@pytest.mark.parametrize(
    ("trainable", "text"),
    [
        (
            "*.head.*",
            "trainable: no parameter matches '*.head.*'; the network has 8, such as "
            "encoder.0.weight, encoder.1.bias, decoder.1.weight",
        ),
        (
            "decoder.*, Encoder.*",
            "trainable: no parameter matches 'Encoder.*'; the network has 8, such as "
            "encoder.0.weight, encoder.1.bias, decoder.1.weight",
        ),
        # Buffers alone are nothing to train.
        (
            "*.running_mean",
            "trainable: no parameter matches '*.running_mean'; the network has 8, such as "
            "encoder.0.weight, encoder.1.bias, decoder.1.weight",
        ),
        (
            "decoder.*,",
            "trainable must be patterns separated by commas, such as *.decoder.*, or empty, got "
            "'decoder.*,'" + see("trainable"),
        ),
        (
            " ",
            "trainable must be patterns separated by commas, such as *.decoder.*, or empty, got "
            "' '" + see("trainable"),
        ),
    ],
)
def test_patterns_that_match_nothing_are_refused_and_leave_the_model(model, trainable, text):
    with pytest.raises(InputError, match=says(text)):
        Travelling(model, trainable)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("layer", "examples"),
    [
        (nn.Linear(2, 2), "2, such as weight, bias"),
        (nn.Linear(2, 2, bias=False), "1, such as weight"),
        (nn.Sequential(nn.Linear(2, 2), nn.PReLU()), "3, such as 0.weight, 0.bias, 1.weight"),
    ],
)
def test_a_small_network_gives_the_examples_that_it_has(layer, examples):
    text = f"trainable: no parameter matches 'x'; the network has {examples}"
    with pytest.raises(InputError, match=says(text)):
        Travelling(layer, "x")


def test_what_was_frozen_before_stays_frozen_and_travels_by_its_name(model):
    model.decoder[0].requires_grad_(False)
    travelling = Travelling(model, "decoder.*")
    assert list(travelling.names) == DECODER
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["decoder.1.weight", "decoder.1.bias"]


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_frozen_batch_norm_neither_learns_nor_mixes_patients(model, copied):
    model.encoder[1].running_mean += 0.5
    Travelling(model, "decoder.*")
    original, model = model, copied(model)
    before, other = state_bits(model), state_bits(original)
    assert model.train() is model
    assert not model.encoder[1].training
    assert not model.encoder[0].training
    assert model.encoder[2].training
    assert model.decoder[1].training
    alone = [model.encoder[1](row) for row in images(6).repeat(1, 2, 1).split(1)]
    torch.testing.assert_close(model.encoder[1](images(6).repeat(1, 2, 1)), torch.cat(alone))
    for seed in range(3):
        model(images(seed=seed))
    after = state_bits(model)
    changed = [name for name in after if after[name] != before[name]]
    assert changed == [
        "decoder.1.running_mean",
        "decoder.1.running_var",
        "decoder.1.num_batches_tracked",
    ]
    assert (state_bits(original) == other) is (model is not original)


def test_a_copy_answers_for_itself():
    model = Token()
    Travelling(model, "head.*")
    twin = copy.deepcopy(model)
    assert twin.train() is twin
    assert twin.train().head.training
    model.eval()
    assert twin.head.training
    assert not model.head.training


def test_what_a_frozen_layer_contains_follows_the_mode():
    model = Token()
    Travelling(model, "head.*")
    for mode in (True, False, True):
        assert model.train(mode) is model
        assert not model.training
        assert model.head.training is mode
    assert model.eval() is model
    with train_mode(model):
        assert model.head.training
    model.train()
    with eval_mode(model):
        assert not model.head.training
    model(torch.randn(3, 4))
    assert model.head.num_batches_tracked == 0


def test_a_layer_with_buffers_alone_is_frozen_too():
    norm = nn.BatchNorm1d(2, affine=False)
    model = nn.Sequential(norm, nn.Linear(2, 2)).train()
    Travelling(model, "1.*")
    model.train()
    model(torch.randn(3, 2) + 1)
    assert norm.running_mean.tolist() == [0, 0]


def test_a_layer_of_which_a_part_travels_follows_the_mode():
    model = nn.Sequential(nn.Module(), nn.Module())
    model[0].gain = nn.Parameter(torch.ones(1))
    model[0].register_buffer("scale", torch.ones(1))
    model[1].scale = nn.Parameter(torch.ones(1))
    assert Travelling(model, "*.scale").names == ("0.scale", "1.scale")
    assert model.train()[0].training
    assert not model[0].gain.requires_grad


def test_a_network_goes_as_soon_as_nobody_holds_it(model):
    Travelling(model, "decoder.*")
    layer = weakref.ref(model.encoder[1])
    twin = copy.deepcopy(model)
    other = weakref.ref(twin.encoder[1])
    gc.collect()
    gc.disable()
    try:
        del twin
        assert other() is None
        assert layer() is not None
    finally:
        gc.enable()


def tied():
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    model["second"].weight = model["first"].weight
    return model


def shared_norm():
    norm = nn.BatchNorm1d(2)
    return nn.ModuleDict({"first": norm, "second": norm})


@pytest.mark.parametrize(
    ("make", "trainable", "names"),
    [
        (tied, "second.*", "first.weight and second.weight"),
        (tied, "first.*", "first.weight and second.weight"),
        (shared_norm, "*.weight,*.bias,second.*", "first.running_mean and second.running_mean"),
    ],
)
def test_one_tensor_with_two_names_is_not_half_frozen(make, trainable, names):
    model = make()
    text = (
        f"trainable must match both or neither of {names}, which are one tensor in this network, "
        f"got {trainable!r}" + see("trainable")
    )
    with pytest.raises(InputError, match=says(text)):
        Travelling(model, trainable)
    assert all(p.requires_grad for p in model.parameters())


def test_one_tensor_may_travel_under_both_names_or_stay():
    model = tied()
    assert len(Travelling(model, "*.weight").names) == 2
    assert model["first"].weight.requires_grad
    Travelling(model, "second.bias")
    assert not model["first"].weight.requires_grad
    net = DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8])
    names = Travelling(net, "*upsample*,output_block.*").names
    assert any(name.startswith("skip_layers.") for name in names)
    assert not any("input_block" in name for name in names)


def test_what_travelled_arrives_and_the_rest_stays(model):
    torch.manual_seed(1)
    other = Net()
    other.decoder[1].num_batches_tracked += 7
    travelling = Travelling(model, "decoder.*")
    before, sent = state_bits(model), travelling.state(other)
    travelling.load(model, sent)
    after, theirs = state_bits(model), state_bits(other)
    assert after == {key: (theirs if key in DECODER else before)[key] for key in after}
    assert not any(value.requires_grad for value in sent.values())


def test_everything_arrives_without_a_pattern(model):
    torch.manual_seed(1)
    other = Net()
    travelling = Travelling(model, "")
    travelling.load(model, travelling.state(other))
    assert state_bits(model) == state_bits(other)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"decoder.0.bias": None},
            "decoder.0.bias should have shape torch.Size([2]), got None (None: no such entry)",
        ),
        (
            {"encoder.0.bias": torch.zeros(2)},
            "encoder.0.bias should have shape None, got torch.Size([2]) (None: no such entry)",
        ),
        (
            {"other": torch.zeros(2)},
            "other should have shape None, got torch.Size([2]) (None: no such entry)",
        ),
        (
            {"decoder.1.weight": torch.zeros(3)},
            "decoder.1.weight should have shape torch.Size([2]), got torch.Size([3]) "
            "(None: no such entry)",
        ),
        # torch itself would take the first of them.
        (
            {"decoder.1.num_batches_tracked": torch.ones(4)},
            "decoder.1.num_batches_tracked should have shape torch.Size([]), got torch.Size([4]) "
            "(None: no such entry)",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(model, change, text):
    travelling = Travelling(model, "decoder.*")
    state = {name: torch.zeros_like(value) for name, value in travelling.state(model).items()}
    state = {name: value for name, value in (state | change).items() if value is not None}
    before = state_bits(model)
    with pytest.raises(ValueError, match=says(text)) as raised:
        travelling.load(model, state)
    assert not isinstance(raised.value, InputError)
    assert state_bits(model) == before


def test_the_digest_worked_out_by_hand():
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.5, -3.0]]))
    model[0].bias = nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    header = b"('0.weight', 'torch.float32', (1, 2))"
    wanted = header + struct.pack("<2f", 0.5, -3.0)
    # bfloat16 is the upper half of a float32.
    wanted += b"('0.bias', 'torch.bfloat16', (1,))" + struct.pack("<f", 1.0)[2:]
    assert Travelling(model, "1.*").digest(model) == hashlib.sha256(wanted).hexdigest()


def test_the_digest_tells_one_bit_of_what_stays_and_nothing_of_what_travels(model):
    travelling = Travelling(model, "decoder.*")
    before = travelling.digest(model)
    assert travelling.digest(copy.deepcopy(model)) == before
    strided = copy.deepcopy(model)
    weight = strided.encoder[0].weight
    weight.data = weight.data.flip(2).contiguous().flip(2).transpose(0, 2).contiguous()
    weight.data = weight.data.transpose(0, 2)
    bias = strided.encoder[0].bias
    bias.data = bias.data.repeat_interleave(2)[::2]
    assert not weight.is_contiguous()
    assert not bias.is_contiguous()
    assert travelling.digest(strided) == before
    with torch.no_grad():
        for value in model.decoder.state_dict().values():
            value += 1
    assert travelling.digest(model) == before
    for name in ENCODER:
        other = copy.deepcopy(model)
        kind = {4: torch.int32, 8: torch.int64}
        value = other.state_dict()[name]
        value.view(kind[value.element_size()]).view(-1)[-1].bitwise_xor_(1)
        assert travelling.digest(other) != before, name


def test_the_digest_tells_type_and_shape(model):
    travelling = Travelling(model, "decoder.*")
    before = travelling.digest(model)
    model.encoder[1].running_mean = torch.zeros(2, dtype=torch.int32)
    other = travelling.digest(model)
    model.encoder[1].running_mean = torch.zeros(1, 2)
    assert len({before, other, travelling.digest(model)}) == 3


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_private_gradients_of_a_partly_frozen_network(model, method):
    model.decoder[1] = nn.GroupNorm(1, 2)
    model.encoder[2] = model.decoder[2] = nn.Identity()
    model.double()
    Travelling(model, "decoder.*")
    model.train()
    before = state_bits(model)

    def loss(network, batch):
        return network(batch["image"]).square().sum()

    gradients = RecordGradients(model, loss, method=method)
    trained = ["decoder.0.weight", "decoder.0.bias", "decoder.1.weight", "decoder.1.bias"]
    assert list(gradients.parameters) == trained
    found, _ = gradients({"image": images(3).double()})
    # A batch norm that mixed the records would not add up to this.
    wanted = torch.autograd.grad(
        loss(model, {"image": images(3).double()}), [model.get_parameter(name) for name in trained]
    )
    for each, total in zip(found, wanted, strict=True):
        torch.testing.assert_close(each.sum(0), total)
    assert all(p.grad is None for p in model.parameters())
    assert state_bits(model) == before
