from collections import deque
from typing import ClassVar

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss
from monai.networks.nets import DynUNet
from tiny import says
from torch import nn
from torch.nn import functional as F

from fedmed_flower.errors import InputError
from fedmed_flower.privacy.validate import (
    first_changed,
    held,
    require_forgetful,
    require_independent,
    require_private_loss,
    require_private_model,
    with_group_norm,
)

REMEDY = "build_model can return fedmed_flower.privacy.validate.with_group_norm(model)"
ROWS = {"x": torch.arange(24.0).view(4, 6).sin(), "y": torch.tensor([0, 1, 1, 0])}


def mean_square(model, batch):
    return model(batch["x"]).square().mean()


def cross_entropy(model, batch, **options):
    return F.cross_entropy(model(batch["x"]), batch["y"], **options)


def refusal(model, loss=mean_square, batch=ROWS):
    """Return the text with which a model is refused."""
    with pytest.raises(InputError) as caught:
        require_private_model(model, loss, batch)
    return str(caught.value)


# --- The replacement ----------------------------------------------------------------------------


def test_batch_normalisation_becomes_group_normalisation_wherever_it_is():
    model = nn.ModuleDict(
        {"a": nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16)), "b": nn.ModuleList()}
    )
    model["b"].append(nn.Sequential(nn.BatchNorm2d(24), nn.BatchNorm3d(6, affine=False)))
    returned = with_group_norm(model)
    assert returned is model
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert [(m.num_groups, m.num_channels) for m in norms] == [(8, 16), (8, 24), (2, 6)]
    assert [m.affine for m in norms] == [True, True, False]
    assert not [m for m in model.modules() if "BatchNorm" in type(m).__name__]
    assert not list(model.buffers())


def test_a_batch_normalisation_that_is_the_model_is_replaced():
    assert isinstance(with_group_norm(nn.BatchNorm2d(4)), nn.GroupNorm)


def test_a_layer_in_several_places_is_replaced_in_all_of_them_by_one():
    shared = nn.BatchNorm1d(6)
    model = nn.Sequential(shared, nn.Sequential(shared), shared)
    with_group_norm(model)
    assert isinstance(model[0], nn.GroupNorm)
    assert model[0] is model[1][0]
    assert model[0] is model[2]


def test_weights_dtype_mode_and_frozen_parameters_are_kept():
    norm = nn.BatchNorm2d(4, eps=0.1).double().eval().requires_grad_(False)
    nn.init.uniform_(norm.weight)
    new = with_group_norm(norm)
    assert new.weight is norm.weight
    assert new.bias is norm.bias
    assert new.eps == 0.1
    assert not new.training


@pytest.mark.parametrize(
    ("channels", "most", "groups"),
    [(16, 8, 8), (12, 8, 4), (7, 8, 1), (8, 8, 4), (4, 8, 2), (9, 9, 3), (1, 8, 1), (10, 1, 1)],
)
def test_groups_divide_the_channels_and_hold_more_than_one(channels, most, groups):
    new = with_group_norm(nn.BatchNorm2d(channels), most)
    assert new.num_groups == groups
    assert new(torch.randn(3, channels, 5, 5)).isfinite().all()


def test_a_replaced_layer_after_a_linear_one_still_tells_records_apart():
    model = with_group_norm(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))).eval()
    assert model(ROWS["x"]).abs().mean() > 0.1


def test_instance_normalisation_loses_its_statistics_and_keeps_the_rest():
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    weight = norm.weight
    model = with_group_norm(nn.Sequential(norm))
    assert model[0] is norm
    assert norm.weight is weight
    assert not list(model.buffers())
    images = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(model.eval()(images), nn.InstanceNorm2d(4)(images))


def test_what_the_replacement_refuses():
    with pytest.raises(InputError, match=says("num_groups must be at least 1, got 0")):
        with_group_norm(nn.BatchNorm1d(4), 0)
    text = (
        "the layer 0 (LazyBatchNorm1d) does not know its channels yet: run the model on one input "
        "first"
    )
    with pytest.raises(InputError, match=says(text)):
        with_group_norm(nn.Sequential(nn.LazyBatchNorm1d()))


# --- Models -------------------------------------------------------------------------------------


def test_a_good_model_passes_and_is_left_as_it_is():
    model = nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Dropout(), nn.Linear(8, 2))
    model.eval()
    before = [(p, p.clone()) for p in model.parameters()]
    require_private_model(model, cross_entropy, ROWS)
    assert model.training
    assert all(p is q for p, (q, _) in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(p, copy) and p.grad is None for p, copy in before)


def test_a_network_with_one_layer_in_two_places_passes_and_is_left_as_it_is():
    model = DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 8])
    before = {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)}
    require_private_model(model, mean_square, {"x": torch.randn(2, 1, 8, 8)})
    after = {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)}
    assert before == after


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(6),
        nn.BatchNorm1d(6).requires_grad_(False).eval(),
        nn.BatchNorm1d(6, affine=False),
        nn.BatchNorm1d(6, track_running_stats=False),
        nn.BatchNorm2d(6),
        nn.BatchNorm3d(6),
        nn.SyncBatchNorm(6),
        nn.LazyBatchNorm1d(),
        nn.InstanceNorm1d(6, track_running_stats=True),
        nn.InstanceNorm3d(6, track_running_stats=True, affine=True),
    ],
)
def test_a_layer_that_learns_from_the_batch_is_refused(norm):
    kind = type(norm).__name__
    text = f"mixes patients or keeps statistics of them: {REMEDY}"
    assert refusal(nn.Sequential(nn.Linear(6, 6), norm)) == f"the layer 1 ({kind}) {text}"
    assert refusal(norm) == f"the model ({kind}) {text}"


class Keeps(nn.Module):
    """Remembers something of its input in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.how, self.linear = how, nn.Linear(6, 2)
        if how != "new":
            self.register_buffer("seen", None if how == "none" else torch.zeros(()))

    def forward(self, x):
        mean = x.detach().mean() + 1
        if self.how == "in place":
            self.seen += mean
        elif self.how == "new":
            self.register_buffer("seen", mean)
        else:
            self.seen = mean
        return self.linear(x)


@pytest.mark.parametrize("how", ["in place", "assigned", "none", "new"])
def test_a_layer_that_changes_a_buffer_is_refused(how):
    assert refusal(nn.Sequential(Keeps(how))) == (
        "the layer 0 (Keeps) changes its buffer seen in training, and its content leaves the "
        f"hospital without noise: {REMEDY}, or replace the layer"
    )


def test_spectral_normalisation_is_refused():
    torch.manual_seed(0)
    text = refusal(nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 5))))
    assert text.startswith("the layer 0 (Linear) changes its buffer weight_")
    model = nn.Sequential(nn.Linear(6, 40), nn.Linear(40, 30))
    nn.utils.parametrizations.spectral_norm(model[1])
    text = refusal(model)
    assert text.startswith("the layer 1.parametrizations.weight.0 (_SpectralNorm) changes its buff")


def test_a_layer_that_writes_into_its_own_weights_is_refused():
    class Shrinks(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.mul_(1 - x.mean().abs())
            return super().forward(x)

    text = refusal(nn.Sequential(Shrinks(6, 2)))
    assert text.startswith("the layer 0 (Shrinks) changes its parameter weight in training, ")


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        return self.used(x)


def test_parameters_that_never_get_a_gradient_are_refused():
    model = Idle()
    assert refusal(model) == (
        "the parameter idle.weight (and 1 more) never gets a gradient and would be moved by noise "
        'alone: build_model can freeze it by model.get_parameter("idle.weight")'
        ".requires_grad_(False)"
    )
    model.idle.weight.requires_grad_(False)
    assert refusal(model).startswith("the parameter idle.bias never gets a gradient")
    model.idle.bias.requires_grad_(False)
    require_private_model(model, mean_square, ROWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_low_precision_are_refused(dtype):
    assert refusal(nn.Linear(6, 2).to(dtype)) == (
        f"the parameter weight is {dtype}, in which gradients cannot be clipped exactly: "
        "build_model can return model.float(); mixed-precision=true still runs it in bfloat16 on "
        "a GPU"
    )


def test_a_model_with_nothing_to_train_is_refused():
    text = "no parameter of the model requires a gradient: there is nothing to train"
    assert refusal(nn.Linear(6, 2).requires_grad_(False)) == text
    assert refusal(nn.Flatten()) == text


def test_a_loss_that_does_not_depend_on_the_model_it_is_given_is_refused():
    model = nn.Linear(6, 2)
    text = "the loss does not depend on any parameter that requires a gradient"
    assert refusal(model, lambda m, b: b["x"].sum()) == text
    text = (
        "the loss does not depend on the model that it is given: it must call its argument, not "
        "another copy of the model"
    )
    assert refusal(model, lambda m, b: model(b["x"]).sum()) == text


def test_a_loss_of_more_than_one_number_is_refused():
    text = refusal(nn.Linear(6, 2), lambda m, b: m(b["x"]).square())
    assert text == "the loss of one record must be one number, got shape (1, 2)"


# --- Losses -------------------------------------------------------------------------------------


def linear(outputs=2):
    torch.manual_seed(1)
    return nn.Linear(6, outputs)


def cox(model, batch):
    risk = model(batch["x"])[:, 0]
    at_risk = torch.ones(len(risk), len(risk)).tril().log()
    return ((risk[None] + at_risk).logsumexp(1) - risk).mean()


def dice(batch):
    value = DiceLoss(sigmoid=True, batch=batch)

    def loss(model, rows):
        target = F.one_hot(torch.arange(24).view(4, 6) % 2, 2).movedim(-1, 1).float()
        target[0] = 0
        outputs = model(rows["x"]).view(-1, 2, 6)
        return value(outputs, target[: len(outputs)] if len(outputs) > 1 else target[rows["i"]])

    return loss


WEIGHT = torch.tensor([1.0, 5.0])


def test_losses_that_couple_patients_are_refused():
    weighted = lambda m, b: cross_entropy(m, b, weight=WEIGHT)  # noqa: E731
    rows = ROWS | {"i": torch.arange(4)}
    for model, loss in ((linear(), weighted), (linear(1), cox), (linear(12), dice(True))):
        with pytest.raises(InputError) as caught:
            require_private_loss(model, loss, rows)
        assert model.training
        text = str(caught.value)
        assert text.startswith(
            "the loss of a batch is not the mean or sum of its records' losses: "
        )
        assert text.endswith(
            "Private training needs Dice with batch=False, survival as "
            "discrete-time likelihood, class weights with reduction='sum'"
        )


@pytest.mark.parametrize(
    ("outputs", "loss"),
    [
        (2, cross_entropy),
        (2, lambda m, b: cross_entropy(m, b, reduction="sum")),
        (2, lambda m, b: cross_entropy(m, b, weight=WEIGHT, reduction="sum")),
        (2, mean_square),
        (12, dice(False)),
        (2, lambda m, b: cross_entropy(m, b) * float("nan")),
        (2, lambda m, b: cross_entropy(m, b) * float("inf")),
    ],
)
def test_the_mean_or_the_sum_over_patients_passes(outputs, loss):
    model = nn.Sequential(nn.Dropout(), linear(outputs))
    require_private_loss(model, loss, ROWS | {"i": torch.arange(4)})
    assert model.training


def test_a_loss_of_several_numbers_for_several_records_is_refused():
    text = "the loss of several records must be one number, their mean or sum, got shape (4,)"
    with pytest.raises(InputError, match=says(text)):
        require_private_loss(linear(1), lambda m, b: m(b["x"]).squeeze(), ROWS)


# --- Memory -------------------------------------------------------------------------------------


class Drawer:
    """An object of one's own that a module may hold."""

    def __init__(self):
        self.kept = []


class Bank(nn.Module):
    """Keeps what it made of the records before; that has an effect once so many are there."""

    def __init__(self, put, bank=None, full=10**6):
        super().__init__()
        self.layer, self.bank, self.put, self.full = nn.Linear(6, 2), bank, put, full
        self.seen = 0

    def forward(self, x):
        made = self.layer(x)
        self.put(self, made.detach())
        return made if self.seen < self.full else 2 * made


def append(model, made):
    model.bank.append(made)


def enter(model, made):
    model.bank[len(model.bank)] = made


def replace(model, made):
    model.bank = made


def write(model, made):
    model.bank.copy_(made)


def write_array(model, made):
    model.bank[:] = made[0].numpy()


def file_away(model, made):
    model.bank.kept.append(made)


def add_up(model, made):
    model.bank = float(made.sum())


def nest(model, made):
    model.bank["of"]["records"].append(made)


BANKS = [
    (append, list),
    (append, lambda: deque(maxlen=1)),
    (enter, dict),
    (replace, lambda: None),
    (replace, lambda: torch.zeros(1, 2)),
    (write, lambda: torch.zeros(1, 2)),
    (write_array, lambda: np.zeros(2, np.float32)),
    (file_away, Drawer),
    (add_up, lambda: 0.0),
    (nest, lambda: {"of": {"records": []}}),
]
NO_MEMORY = "Private training needs a model and a loss that keep nothing"


@pytest.mark.parametrize(("put", "bank"), BANKS)
@pytest.mark.parametrize("inside", [True, False])
def test_a_bank_of_records_that_is_not_full_yet_is_refused(put, bank, inside):
    model = Bank(put, bank())
    name = "the model (Bank)"
    if inside:
        model, name = nn.Sequential(nn.Identity(), model), "the layer 1 (Bank)"
    text = (
        f"the model or the loss keeps something of one record until the next, in {name}, attribute "
        f"bank. {NO_MEMORY}"
    )
    with pytest.raises(InputError, match=says(text)):
        require_forgetful(model, cross_entropy, ROWS)


class SharedBank(nn.Linear):
    """Whose bank is that of all its kind."""

    bank: ClassVar[list] = []

    def forward(self, x):
        made = super().forward(x)
        self.bank.append(made.detach())
        return made


class Aside(nn.Module):
    """Keeps a module where torch does not look."""

    def __init__(self):
        super().__init__()
        self.parts = [Bank(append, [])]

    def forward(self, x):
        return self.parts[0](x)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (SharedBank(6, 2), "the model (SharedBank), attribute bank"),
        (Aside(), "the model (Aside), attribute parts"),
    ],
)
def test_a_bank_that_is_no_attribute_of_the_module_alone_is_refused_too(model, name):
    text = (
        f"the model or the loss keeps something of one record until the next, in {name}. "
        f"{NO_MEMORY}"
    )
    with pytest.raises(InputError, match=says(text)):
        require_forgetful(model, cross_entropy, ROWS)


def test_a_bank_of_the_client_itself_is_refused():
    class Keeping(Hospital):
        def __init__(self, criterion):
            super().__init__(criterion)
            self.bank = []

        def loss_of(self, model, batch):
            self.bank.append(batch["x"])
            return super().loss_of(model, batch)

    text = (
        "the model or the loss keeps something of one record until the next, in the object of the "
        f"loss, attribute bank. {NO_MEMORY}"
    )
    with pytest.raises(InputError, match=says(text)):
        require_forgetful(nn.Linear(6, 2), Keeping(nn.CrossEntropyLoss()).loss_of, ROWS)


class Hospital:
    """Gives a loss as a client does: by a method, and a module of its own."""

    def __init__(self, criterion):
        self.criterion = criterion

    def loss_of(self, model, batch):
        return self.criterion(model(batch["x"]), batch["y"])


class BankOfLosses(nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__()
        self.losses = []

    def forward(self, outputs, labels):
        value = super().forward(outputs, labels)
        self.losses.append(value.detach())
        return value


def test_a_bank_in_the_module_of_a_loss_is_refused():
    text = (
        "the model or the loss keeps something of one record until the next, in the module "
        f"criterion of the loss, attribute losses. {NO_MEMORY}"
    )
    with pytest.raises(InputError, match=says(text)):
        require_forgetful(nn.Linear(6, 2), Hospital(BankOfLosses()).loss_of, ROWS)
    require_forgetful(nn.Linear(6, 2), Hospital(nn.CrossEntropyLoss()).loss_of, ROWS)


class Grid(nn.Module):
    """Makes once, at the first record, what depends on the shape alone."""

    def __init__(self):
        super().__init__()
        self.layer, self.places, self.by_shape = nn.Linear(6, 2), None, {}

    def forward(self, x):
        if self.places is None:
            self.places = torch.linspace(0, 1, x.shape[1])
        shape = tuple(x.shape[1:])
        if shape not in self.by_shape:
            self.by_shape[shape] = self.places + 1
        return self.layer(x + self.places + self.by_shape[shape])


def test_what_is_made_once_and_is_no_record_passes():
    for model in (Grid(), nn.Sequential(Grid(), nn.Flatten())):
        model.eval()
        require_forgetful(model, cross_entropy, ROWS)
        assert model.training


def test_chance_is_no_memory():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2))
    # Two losses of the same rows differ, and yet by no memory.
    assert cross_entropy(model, ROWS) != cross_entropy(model, ROWS)
    require_forgetful(model, cross_entropy, ROWS)


def test_a_memory_that_shows_at_once_is_told_by_the_losses():
    class Centred(nn.Linear):
        before = torch.zeros(6)

        def forward(self, x):
            made = super().forward(x - self.before)
            type(self).before = x[0].detach()
            return made

    text = (
        r"^the model or the loss keeps something of one record until the next: the loss of a "
        rf"record was [\d.]+, and [\d.]+ after another one\. {NO_MEMORY}$"
    )
    with pytest.raises(InputError, match=text):
        require_forgetful(Centred(6, 2), cross_entropy, ROWS)


def test_with_one_record_there_is_no_memory_to_see():
    with pytest.raises(InputError, match="keeps something of one record"):
        require_forgetful(Bank(append, []), cross_entropy, ROWS)
    require_forgetful(Bank(append, []), cross_entropy, {k: part[:1] for k, part in ROWS.items()})


# --- Random changes -----------------------------------------------------------------------------

IMAGES = torch.arange(64.0).view(4, 1, 4, 4).cos()


def flips(images):
    chosen = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(chosen, images.flip(-1), images) + 0.1 * torch.randn_like(images)


def mixup(images):
    share = torch.rand(())
    return share * images + (1 - share) * images[torch.randperm(len(images))]


def test_changing_each_record_by_itself_passes_and_leaves_the_generator():
    state, inputs = torch.get_rng_state(), IMAGES.clone()
    require_independent(flips, inputs)
    require_independent(lambda images: images, inputs)
    require_independent(lambda images: images * float("nan"), inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(inputs, IMAGES)


@pytest.mark.parametrize(
    "change",
    [
        mixup,
        lambda images: mixup(images) if torch.rand(()) < 0.5 else images,
        lambda images: images - images.mean(0, keepdim=True),
        lambda images: images / images.abs().max(),
        lambda images: torch.cat([images[:1] + images[1:2], images[1:]]),
        lambda images: images.roll(1, 0),
        lambda images: images[:-1],
        lambda images: images.add_(images.flip(0)),
    ],
)
@pytest.mark.parametrize("count", [2, 4])
def test_mixing_records_is_refused(change, count):
    text = (
        "augment mixes patients: the outcome for one record depends on another, as in mixup. "
        "Private training needs a change of each record alone"
    )
    with pytest.raises(InputError, match=says(text)):
        require_independent(change, IMAGES[:count])


def test_a_change_that_draws_from_elsewhere_is_refused():
    generator = np.random.default_rng(0)
    text = (
        "noise does not draw all random numbers from torch's global generator, so nobody can "
        "check whether it mixes patients: draw all of them from it"
    )
    with pytest.raises(InputError, match=says(text)):
        require_independent(lambda images: images + generator.normal(), IMAGES, "noise")


# --- What must stay as it is --------------------------------------------------------------------


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.trained, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.trained.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("gap", torch.tensor([float("nan")]))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)


def test_training_what_is_trained_is_no_change():
    model = Parts()
    before = held(model)
    assert {name for name, _ in before} == {
        "frozen.weight", "frozen.bias", "count", "gap", "hidden"
    }  # fmt: skip
    with torch.no_grad():
        model.trained.weight += 1
        model.tied.bias += 1
    assert first_changed(before, model) is None


@pytest.mark.parametrize("name", ["frozen.weight", "count", "gap", "hidden"])
def test_a_change_of_anything_else_is_found(name):
    model = Parts()
    before = held(model)
    with torch.no_grad():
        model.state_dict(keep_vars=True).get(name, model.hidden).copy_(torch.tensor(7))
    assert first_changed(before, model) == name


def test_a_buffer_that_comes_goes_or_changes_its_kind_is_found():
    model = Parts()
    before = held(model)
    model.register_buffer("new", torch.zeros(1))
    assert first_changed(before, model) == "new"
    model = Parts()
    before = held(model)
    model.count = None
    assert first_changed(before, model) == "count"
    model.count = torch.tensor(3.0)
    assert first_changed(before, model) == "count"
