import itertools
import random
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import (
    DiceCELoss,
    DiceLoss,
    FocalLoss,
    GeneralizedDiceLoss,
    HausdorffDTLoss,
    TverskyLoss,
)
from networks import NETWORKS, build, input_of
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from scipy import stats
from tiny import says
from torch import nn
from torch.nn import functional as F

from fedmed_flower.clients import training
from fedmed_flower.errors import InputError
from fedmed_flower.privacy.gradients import RecordGradients, with_values
from fedmed_flower.privacy.optimizer import PatientOptimizer

# One test in a million fails by chance.
CHANCE = 1e-6
# What the sum may move by, beside the clipping norm, through rounding.
ROUNDING = 1 + 1e-6


# --- The meter ----------------------------------------------------------------------------------


def silent(model, norm=1.0, noise=0.0, expected=1.0, **options):
    """Return an optimizer without noise, unless it is given."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return PatientOptimizer(torch.optim.SGD(parameters, lr=1.0, **options), noise, norm, expected)


def clipped_sum(model, gradients, norm):
    """Return the sum of clipped gradients as one float64 vector; 0 where there are none."""
    optimizer = silent(model, norm)
    if gradients is not None:
        optimizer.accumulate(gradients)
        return torch.cat([p.summed_grad.flatten() for p in optimizer.params])
    return torch.zeros(sum(p.numel() for p in optimizer.params), dtype=torch.float64)


def movement(model, gradients_of, batch, place, norm=1.0):
    """Return how far the sum moves, in units of the norm, when one record comes or goes."""
    count = len(next(iter(batch.values())))
    rest = [i for i in range(count) if i != place]
    without = {key: part[rest] for key, part in batch.items()}
    after = clipped_sum(model, gradients_of(batch), norm)
    before = clipped_sum(model, gradients_of(without) if rest else None, norm)
    return float((after - before).norm()) / norm


def ours(model, loss, method):
    return lambda batch: RecordGradients(model, loss, method=method)(batch)[0]


def hooked(model, loss):
    """Return what makes gradients as Opacus's hooks do, from one batch loss."""

    def gradients_of(batch):
        wrapped = GradSampleModule(model, strict=False)
        loss(wrapped, batch).backward()
        found = [p.grad_sample.detach() for p in model.parameters() if p.requires_grad]
        wrapped.to_standard_module()
        return found

    return gradients_of


def one_by_one(model, loss, batch):
    """Return each record's gradient by plain autograd: the obvious version."""
    rows = []
    for place in range(len(next(iter(batch.values())))):
        model.zero_grad()
        loss(model, {key: part[place : place + 1] for key, part in batch.items()}).backward()
        rows.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def norms(gradients):
    """Return the norm of each record's gradient."""
    each = [g.reshape(len(g), -1).norm(dim=1) for g in gradients]
    return torch.stack(each).norm(dim=0)


def assert_same(found, wanted, tolerance=1e-4):
    size = norms(wanted)
    assert (size > 0).all()
    off = norms([one - other for one, other in zip(found, wanted, strict=True)])
    assert (off <= tolerance * size).all()


# --- Losses -------------------------------------------------------------------------------------


def classifier(outputs=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, outputs))


def segmenter(outputs=2):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, outputs, 1)
    )


def records(count, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (count,), generator=generator)
    pixels = torch.randint(0, 2, (count, 4, 4), generator=generator)
    return {
        "image": scale * torch.randn(count, 1, 4, 4, generator=generator),
        "label": label,
        "pixels": pixels,
        "mask": F.one_hot(pixels, 2).movedim(-1, 1).float(),
        "event": torch.randint(0, 2, (count,), generator=generator),
    }


def survival(outputs, batch):
    """Discrete-time likelihood: the hazard of each interval up to the one of event or censoring."""
    last, event = 1 + batch["label"][:, None], batch["event"][:, None]
    place = torch.arange(outputs.shape[1])[None]
    died = ((place == last) & (event == 1)).float()
    each = F.binary_cross_entropy_with_logits(outputs, died, reduction="none")
    return (each * (place <= last)).sum()


def cox(outputs, batch):
    risk, time = outputs[:, 0], batch["image"].flatten(1).sum(1)
    at_risk = time[None] >= time[:, None]
    return -(risk - (risk[None] + at_risk.float().log()).logsumexp(1)).mean()


def of_masks(loss):
    return lambda outputs, batch: loss(outputs, batch["mask"])


WEIGHT = torch.tensor([0.1, 3.0])
LOSSES = {
    "cross entropy": (classifier, lambda o, b: F.cross_entropy(o, b["label"])),
    "weighted cross entropy, summed": (
        classifier,
        lambda o, b: F.cross_entropy(o, b["label"], weight=WEIGHT, reduction="sum"),
    ),
    "binary cross entropy": (
        partial(classifier, 1),
        lambda o, b: F.binary_cross_entropy_with_logits(o[:, 0], b["label"].float()),
    ),
    "squared error": (classifier, lambda o, b: F.mse_loss(o, b["mask"][:, :, 0, 0])),
    "discrete-time survival": (partial(classifier, 4), survival),
    "pixelwise cross entropy": (segmenter, lambda o, b: F.cross_entropy(o, b["pixels"])),
    "pixelwise binary": (segmenter, of_masks(F.binary_cross_entropy_with_logits)),
    "Dice": (segmenter, of_masks(DiceLoss(softmax=True))),
    "DiceCE": (segmenter, of_masks(DiceCELoss(softmax=True))),
    "Focal": (segmenter, of_masks(FocalLoss())),
    "Tversky": (segmenter, of_masks(TverskyLoss(softmax=True))),
}
BY_LOOP = {
    "GeneralizedDice": (segmenter, of_masks(GeneralizedDiceLoss(softmax=True))),
    "HausdorffDT": (segmenter, of_masks(HausdorffDTLoss(softmax=True))),
}


def loss_of(name):
    kind, value = (LOSSES | BY_LOOP)[name]
    return kind(), lambda model, batch: value(model(batch["image"]), batch)


@st.composite
def neighbours(draw):
    """A batch, the place of the record that comes or goes, and the clipping norm."""
    count = draw(st.integers(1, 5))
    batch = records(count, draw(st.integers(0, 10_000)), draw(st.sampled_from([1.0, 1e-3])))
    for place in draw(st.sets(st.integers(0, count - 1), max_size=3)):
        kind = draw(st.sampled_from(["huge", "zero", "duplicate"]))
        if kind == "duplicate":
            batch = {key: part.clone() for key, part in batch.items()}
            for part in batch.values():
                part[place] = part[0]
        else:
            batch["image"][place] *= 1e6 if kind == "huge" else 0.0
    return batch, draw(st.integers(0, count - 1)), draw(st.sampled_from([1e-4, 0.3, 1e4]))


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in LOSSES for method in ("vmap", "loop")]
    + [(name, "loop") for name in BY_LOOP],
)
def test_one_patient_moves_the_sum_by_at_most_the_clipping_norm(name, method):
    model, loss = loss_of(name)

    @settings(max_examples=20, deadline=None)
    @given(neighbours())
    def check(drawn):
        batch, place, norm = drawn
        assert movement(model, ours(model, loss, method), batch, place, norm) <= ROUNDING

    check()


@pytest.mark.parametrize("name", LOSSES | BY_LOOP)
def test_a_gradient_that_is_clipped_moves_the_sum_by_the_clipping_norm(name):
    model, loss = loss_of(name)
    moved = movement(model, ours(model, loss, "loop"), records(4), 1, 1e-5)
    assert 1 - 1e-6 < moved < ROUNDING


@pytest.mark.parametrize("name", BY_LOOP)
def test_a_loss_that_cannot_be_vectorised_takes_the_loop(name):
    model, loss = loss_of(name)
    made = RecordGradients(model, loss)
    assert_same(made(records(3))[0], one_by_one(model, loss, records(3)))
    assert made.method == "loop"


@pytest.mark.parametrize("name", LOSSES)
def test_every_other_loss_can_be_vectorised_and_gives_the_same_gradients(name):
    model, loss = loss_of(name)
    batch = records(4)
    wanted = one_by_one(model, loss, batch)
    for method in ("vmap", "loop"):
        found, losses = RecordGradients(model, loss, method=method)(batch)
        assert_same(found, wanted)
        rows = ({key: part[i : i + 1] for key, part in batch.items()} for i in range(4))
        torch.testing.assert_close(losses, torch.stack([loss(model, row) for row in rows]).detach())


def test_a_norm_over_millions_of_numbers_is_not_underestimated():
    model = nn.Linear(3_000_000, 1, bias=False)
    heavy = torch.full((2, 1, 3_000_000), 1e-4)
    heavy[:, :, :16] = 1.0
    heavy[1] *= 1e6
    for gradient in heavy:
        assert clipped_sum(model, [gradient[None]], 1.0).norm() == pytest.approx(1, abs=1e-9)
    rounded = silent(model)
    for parameter in rounded.params:
        parameter.grad_sample = heavy[1:].clone()
    DPOptimizer.clip_and_accumulate(rounded)
    assert rounded.params[0].summed_grad.double().norm() > 1 + 1e-5


def test_a_sum_over_many_patients_forgets_none_of_them():
    model = nn.Linear(1, 1, bias=False)
    many = [torch.ones(3_000, 1, 1)]
    optimizer = silent(model, 1.0)
    for _ in range(20):
        optimizer.accumulate(many)
    before = float(optimizer.params[0].summed_grad)
    optimizer.accumulate([torch.full((1, 1, 1), 1e-4)])
    assert float(optimizer.params[0].summed_grad) - before == pytest.approx(1e-4, rel=1e-6)


# --- The networks -------------------------------------------------------------------------------


def network_loss(name):
    value = DiceCELoss(softmax=True) if NETWORKS[name][1] else nn.CrossEntropyLoss()

    def loss(model, batch):
        outputs = model(batch["image"])
        return value(outputs, batch["target"])

    return loss


def network_batch(name, dims, count):
    generator = torch.Generator().manual_seed(dims)
    shape = (count, 1, *input_of(name, dims))
    images = torch.randn(shape, generator=generator)
    if not NETWORKS[name][1]:
        return {"image": images, "target": torch.arange(count) % 2}
    pixels = torch.rand(shape, generator=generator) > 0.7
    return {"image": images, "target": torch.cat([pixels, ~pixels], 1).float()}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_a_network_are_those_of_each_record_alone_and_bounded(name, dims):
    model, loss, batch = build(name, dims), network_loss(name), network_batch(name, dims, 2)
    if name == "DenseNet121" or (name, dims) == ("SwinUNETR", 2):
        # So small, its last layers normalise two numbers, which magnifies what float32 rounds.
        model = model.double()
        batch["image"] = batch["image"].double()
    held = {key: (value, value.clone()) for key, value in model.named_parameters()}
    wanted = one_by_one(model, loss, batch)
    for method in ("vmap", "loop"):
        gradients_of = ours(model, loss, method)
        found = gradients_of(batch)
        assert [(g.shape[1:], g.dtype) for g in found] == [(w.shape[1:], w.dtype) for w in wanted]
        assert_same(found, wanted)
        alone = gradients_of({key: part[:1] for key, part in batch.items()})
        norm = float(norms(found).min()) / 2
        before, after = (clipped_sum(model, each, norm) for each in (alone, found))
        assert (after - before).norm() <= norm * ROUNDING
    now = dict(model.named_parameters())
    assert all(now[key] is value for key, (value, _) in held.items())
    assert all(torch.equal(value, copy) for value, copy in held.values())


def test_dropout_is_drawn_anew_for_each_record():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 1))
    batch = {"image": torch.ones(8, 1, 4, 4)}
    for method in ("vmap", "loop"):
        found = ours(model, lambda m, b: m(b["image"]).sum(), method)(batch)[0]
        assert len(found.unique(dim=0)) > 4


def test_one_broken_record_leaves_the_gradients_of_the_others_as_they_are():
    for name in ("cross entropy", "DiceCE"):
        model, loss = loss_of(name)
        batch = records(4)
        wanted = one_by_one(model, loss, batch)
        batch["image"][2, 0, 1, 1] = float("inf")
        for method in ("vmap", "loop"):
            found = ours(model, loss, method)(batch)
            assert not norms(found)[2].isfinite()
            rest = [0, 1, 3]
            assert_same([g[rest] for g in found], [w[rest] for w in wanted])


class Tied(nn.Module):
    """One parameter in two layers, one layer in two places, a number, and a frozen layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.shared = (nn.Linear(4, 4) for _ in range(3))
        self.second.weight = self.first.weight
        self.again = nn.Sequential(self.shared, nn.Tanh())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, image, age):
        hidden = self.again(self.second(self.first(image).tanh()))
        return self.scale * self.frozen(self.shared(hidden)) * age


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_shared_weights_and_two_inputs_give_the_same_gradients_and_leave_the_model(method):
    model, batch = Tied(), {"image": torch.randn(5, 4), "age": torch.rand(5, 1)}

    def loss(module, rows):
        return module(rows["image"], age=rows["age"]).square().sum()

    def places():
        return {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)}

    before = places()
    made = RecordGradients(model, loss, method=method)
    assert list(made.parameters) == [
        "scale", "first.weight", "first.bias", "second.bias", "shared.weight", "shared.bias"
    ]  # fmt: skip
    assert_same(made(batch)[0], one_by_one(model, loss, batch))
    assert places() == before
    assert movement(model, ours(model, loss, method), batch, 2, 1e-4) <= ROUNDING


def test_other_values_take_the_place_of_those_that_are_named_alone():
    model = Tied()
    values = {"first.weight": torch.zeros(4, 4), "shared.bias": torch.ones(4)}
    wanted = Tied()
    with torch.no_grad():
        wanted.first.weight.zero_()
        wanted.shared.bias.fill_(1)
    inputs = (torch.randn(2, 4), torch.ones(2, 1))
    wanted.frozen.load_state_dict(model.frozen.state_dict())
    torch.testing.assert_close(with_values(model, values)(*inputs), wanted(*inputs))
    assert model.first.weight.abs().sum() > 0


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_mixed_precision_keeps_the_gradients_in_float32(method):
    model, loss = loss_of("DiceCE")
    batch, seen = records(3), []

    def watched(module, rows):
        outputs = module(rows["image"])
        seen.append(outputs.dtype)
        return LOSSES["DiceCE"][1](outputs, rows)

    found, losses = RecordGradients(model, watched, True, method)(batch)
    assert set(seen) == {torch.bfloat16}
    assert {g.dtype for g in found} == {losses.dtype} == {torch.float32}
    assert_same(found, one_by_one(model, loss, batch), 0.1)
    assert movement(model, lambda b: RecordGradients(model, watched, True, method)(b)[0],
                    batch, 1, 1e-4) <= ROUNDING  # fmt: skip


def test_what_is_refused():
    model = classifier()
    with pytest.raises(InputError, match=says("method must be one of auto, vmap, loop, got 'x'")):
        RecordGradients(model, lambda m, b: 0, method="x")
    for method in ("auto", "vmap", "loop"):
        made = RecordGradients(model, lambda m, b: m(b["image"])[0], method=method)
        text = "the loss of one record must be one number, got shape (2,)"
        with pytest.raises(InputError, match=says(text)):
            made(records(2))


def test_memory_counts_activations_once_and_each_gradient():
    made = RecordGradients(nn.Linear(1000, 10), lambda m, b: m(b["x"]).tanh().sum())
    size = made.bytes_per_record({"x": torch.zeros(3, 1000)})
    assert 2 * 10_010 * 4 <= size <= 2 * 10_010 * 4 + 3 * 1000 * 4 + 200


# --- The meter has teeth ------------------------------------------------------------------------


def test_batch_dice_moves_the_sum_too_far():
    model, value = nn.Conv2d(1, 1, 1), DiceLoss(sigmoid=True, batch=True)
    nn.init.constant_(model.weight, 5.0)
    nn.init.constant_(model.bias, 0.0)
    batch = records(6, scale=0.1)
    batch["mask"] = torch.zeros(6, 1, 4, 4)
    batch["mask"][:, :, 0, 0] = 1.0
    batch["image"][0], batch["mask"][0] = 2.0, 1.0

    def loss(module, rows):
        return value(module(rows["image"]), rows["mask"])

    assert movement(model, hooked(model, loss), batch, 0, 1e-4) > 1.5
    assert movement(model, ours(model, loss, "vmap"), batch, 0, 1e-4) <= ROUNDING


def test_the_cox_likelihood_moves_the_sum_too_far():
    model = classifier(1)

    def loss(module, batch):
        return cox(module(batch["image"]), batch)

    assert movement(model, hooked(model, loss), records(6, 10), 3, 1e-4) > 1.5


def test_batch_normalisation_in_training_moves_the_sum_too_far():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    model[1].requires_grad_(False)
    batch = records(6)
    batch["image"][0] *= 100

    def loss(module, rows):
        return F.cross_entropy(module(rows["image"]), rows["label"])

    assert movement(model, hooked(model, loss), batch, 0, 1e-4) > 1.2


def test_class_weights_under_hooks_move_the_sum_too_far():
    model = classifier()
    batch = records(6)
    batch["label"] = torch.tensor([1, 0, 0, 0, 0, 0])

    def loss(module, rows):
        return F.cross_entropy(module(rows["image"]), rows["label"], weight=WEIGHT)

    assert movement(model, hooked(model, loss), batch, 0, 0.5) > 1.2
    assert movement(model, ours(model, loss, "vmap"), batch, 0, 0.5) <= ROUNDING


def test_four_crops_of_a_patient_counted_as_four_move_the_sum_four_times_as_far():
    model, loss = loss_of("DiceCE")
    batch = {key: part.repeat_interleave(4, 0) for key, part in records(3).items()}
    gradients_of = ours(model, loss, "vmap")
    after = clipped_sum(model, gradients_of(batch), 1e-4)
    before = clipped_sum(model, gradients_of({k: v[4:] for k, v in batch.items()}), 1e-4)
    assert (after - before).norm() / 1e-4 == pytest.approx(4, abs=1e-4)


@pytest.mark.parametrize(
    ("criterion", "target"),
    [
        (nn.BCEWithLogitsLoss(), lambda b: b["label"][:, None].float()),
        (nn.MSELoss(), lambda b: 10.0 * b["label"][:, None].float()),
    ],
)
def test_ghost_clipping_moves_the_sum_too_far(criterion, target):
    def sum_of(batch):
        model = classifier(1)
        wrapped = GradSampleModuleFastGradientClipping(
            model, max_grad_norm=1e-2, use_ghost_clipping=True
        )
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.SGD(model.parameters(), lr=1.0),
            noise_multiplier=0.0,
            max_grad_norm=1e-2,
            expected_batch_size=1,
        )
        loss = DPLossFastGradientClipping(wrapped, optimizer, criterion)
        loss(wrapped(batch["image"]), target(batch)).backward()
        optimizer.accumulate()
        return torch.cat([p.summed_grad.flatten() for p in optimizer.params])

    batch = records(6)
    batch["label"][0] = 1
    moved = sum_of(batch) - sum_of({key: part[1:] for key, part in batch.items()})
    assert moved.norm() / 1e-2 > 1.5


# --- Noise and the step -------------------------------------------------------------------------


def released(model, **options):
    """Return what a release without any patient leaves in ``grad``."""
    optimizer, seen = silent(model, **options), []
    optimizer.attach_step_hook(lambda o: seen.extend(p.grad.clone() for p in o.params))
    optimizer.release()
    return torch.cat([g.flatten() for g in seen]).double().numpy()


@pytest.mark.parametrize(("noise", "norm", "expected"), [(1.1, 0.5, 64.0), (3.0, 20.0, 0.25)])
def test_noise_has_the_variance_and_the_distribution_that_are_claimed(noise, norm, expected):
    drawn = released(nn.Linear(200, 300), noise=noise, norm=norm, expected=expected)
    drawn /= noise * norm / expected
    low, high = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], drawn.size)
    assert low < (drawn**2).sum() < high
    assert stats.kstest(drawn, "norm").pvalue > CHANCE


def test_zero_gradients_get_the_noise_that_an_empty_draw_gets():
    optimizer = silent(nn.Linear(100, 100), 2.0, 0.5)
    optimizer.accumulate([torch.zeros(3, *p.shape) for p in optimizer.params])
    before = torch.cat([p.detach().flatten().clone() for p in optimizer.params])
    optimizer.release()
    after = torch.cat([p.detach().flatten() for p in optimizer.params])
    assert stats.kstest((after - before).numpy(), "norm").pvalue > CHANCE


def test_no_seed_decides_the_noise():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        drawn.append(released(nn.Linear(20, 20), noise=1.0))
    assert not np.isin(drawn[0], drawn[1]).any()


def test_steps_of_one_optimizer_get_independent_noise():
    model = nn.Linear(100, 100)
    optimizer, seen = silent(model, noise=1.0), []
    optimizer.attach_step_hook(lambda o: seen.append(o.params[0].grad.clone().flatten().numpy()))
    optimizer.release()
    optimizer.release()
    assert abs(np.corrcoef(seen)[0, 1]) < 5 / 100


def gradients_like(model, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *p.shape, generator=generator) for p in model.parameters()]


def test_one_call_and_several_give_the_same_sum():
    model = classifier()
    gradients = gradients_like(model, 7)
    optimizer = silent(model, 2.0)
    for start, end in ((0, 1), (1, 1), (1, 5), (5, 7)):
        optimizer.accumulate([g[start:end].clone() for g in gradients])
    parts = torch.cat([p.summed_grad.flatten() for p in optimizer.params])
    torch.testing.assert_close(parts, clipped_sum(model, gradients, 2.0), rtol=1e-12, atol=1e-14)


def test_the_sum_is_that_of_gradients_clipped_to_the_norm():
    model = nn.Linear(2, 1, bias=False)
    gradients = [torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]], [[0.0, 0.0]]])]
    assert clipped_sum(model, gradients, 1.0).tolist() == pytest.approx([0.9, 1.2])


def test_the_sum_agrees_with_opacus():
    model = classifier()
    gradients, theirs = gradients_like(model, 9), silent(model, 3.0)
    for parameter, gradient in zip(theirs.params, gradients, strict=True):
        parameter.grad_sample = gradient.clone()
    DPOptimizer.clip_and_accumulate(theirs)
    wanted = torch.cat([p.summed_grad.flatten().double() for p in theirs.params])
    torch.testing.assert_close(clipped_sum(model, gradients, 3.0), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_is_left_out_and_counted(bad):
    model = classifier()
    gradients = gradients_like(model, 6)
    wanted = clipped_sum(model, [g[[0, 2, 3, 5]] for g in gradients], 1.0)
    gradients[0][1, 0, 0] = bad
    gradients[-1][4, 0] = bad
    optimizer = silent(model)
    optimizer.accumulate(gradients)
    assert optimizer.dropped == 2
    assert torch.equal(torch.cat([p.summed_grad.flatten() for p in optimizer.params]), wanted)


def test_a_batch_of_broken_gradients_adds_nothing():
    optimizer = silent(classifier())
    optimizer.accumulate([g * float("nan") for g in gradients_like(classifier(), 3)])
    assert optimizer.dropped == 3
    assert all((p.summed_grad == 0).all() for p in optimizer.params)


@pytest.mark.parametrize("size", [1e19, 1e30, 3e38])
def test_a_gradient_whose_square_overflows_is_clipped_and_poisons_nothing(size):
    model = nn.Linear(2, 1, bias=False)
    gradients = [torch.tensor([[[size, size]], [[0.1, 0.0]]])]
    half = 0.5**0.5
    assert clipped_sum(model, gradients, 1.0).tolist() == pytest.approx([half + 0.1, half])


def test_a_gradient_that_is_the_same_for_all_records_may_share_memory():
    optimizer = silent(nn.Linear(2, 1))
    shared = torch.ones(1).expand(3, 1)
    other = torch.tensor([[[0.0, 0.0]], [[float("nan"), 0.0]], [[0.0, 0.0]]])
    optimizer.accumulate([other, shared])
    assert optimizer.dropped == 1
    assert optimizer.params[1].summed_grad.tolist() == [2.0]


def test_nothing_of_a_micro_batch_stays_in_memory_after_it():
    optimizer = silent(nn.Linear(2, 1))
    optimizer.accumulate([torch.ones(50, 1, 2), torch.ones(50, 1)])
    sizes = [p.grad_sample.untyped_storage().nbytes() for p in optimizer.params]
    assert sizes == [0, 0]


def test_a_step_divides_by_the_expected_patients_however_many_came():
    for came in (0, 1, 5):
        model = nn.Linear(1, 1, bias=False)
        start = model.weight.item()
        optimizer = silent(model, 1.0, 0.0, 4.0)
        optimizer.accumulate([torch.full((came, 1, 1), 0.5)])
        optimizer.accumulate([torch.full((came, 1, 1), 0.5)])
        optimizer.release()
        assert model.weight.item() == pytest.approx(start - 2 * came * 0.5 / 4)
        optimizer.release()
        assert model.weight.item() == pytest.approx(start - 2 * came * 0.5 / 4)


def test_weight_decay_and_the_step_hook_come_after_clipping_and_noise():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1000.0)
    optimizer = silent(model, 1.0, 0.0, 4.0, weight_decay=0.5)
    optimizer.attach_step_hook(lambda o: o.params[0].grad.add_(100.0))
    optimizer.accumulate([torch.full((1, 1, 1), 50.0)])
    optimizer.release()
    assert model.weight.item() == pytest.approx(1000 - (1 / 4 + 100 + 0.5 * 1000))


def test_parameters_may_lie_in_memory_channels_last():
    model, batch = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last), torch.randn(5, 3, 4, 4)
    plain = nn.Conv2d(3, 4, 2)
    plain.load_state_dict(model.state_dict())
    for module in (model, plain):
        optimizer = silent(module)
        optimizer.accumulate(ours(module, lambda m, b: m(b["x"]).sum(), "loop")({"x": batch}))
        optimizer.release()
    torch.testing.assert_close(model.weight, plain.weight)


def test_gradients_of_another_number_of_parameters_are_refused():
    with pytest.raises(ValueError, match="zip"):
        silent(nn.Linear(2, 1)).accumulate([torch.ones(1, 1, 2)])


def test_the_names_of_opacus_that_the_optimizer_stands_on_are_there():
    plain = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=1.0)
    theirs = DPOptimizer(plain, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=4)
    calls = []

    class Watched(PatientOptimizer):
        def clip_and_accumulate(self):
            calls.append("clip")
            super().clip_and_accumulate()

        def add_noise(self):
            calls.append("noise")
            super().add_noise()

        def scale_grad(self):
            calls.append("scale")
            super().scale_grad()

    for name in ("clip_and_accumulate", "add_noise", "scale_grad", "zero_grad", "attach_step_hook"):
        assert callable(vars(DPOptimizer)[name])
    assert theirs.original_optimizer is plain
    assert theirs.step_hook is None
    assert all(p.summed_grad is None for p in theirs.params)
    model = nn.Linear(2, 1)
    mine = Watched(torch.optim.SGD(model.parameters(), lr=1.0), 0.0, 1.0, 4.0)
    mine.attach_step_hook(lambda o: calls.append("hook"))
    for parameter in mine.params:
        parameter.grad_sample = torch.ones(2, *parameter.shape)
    mine.step()
    assert calls == ["clip", "noise", "scale", "hook"]
    assert all(torch.allclose(p.grad, torch.tensor(2 / 3**0.5 / 4)) for p in mine.params)
    mine.zero_grad()
    assert all(p.summed_grad is None and p.grad_sample is None for p in mine.params)


# --- Noise drawn ahead, methods and micro-batches -----------------------------------------------


def noise_of(optimizer):
    kept = [p.detach().clone() for p in optimizer.params]
    optimizer.release()
    moved = [p.detach() - k for p, k in zip(optimizer.params, kept, strict=True)]
    return torch.cat([change.flatten() for change in moved])


def test_noise_drawn_ahead_is_that_of_one_step_and_never_used_again():
    model = nn.Linear(400, 50, bias=False)
    optimizer = PatientOptimizer(torch.optim.SGD(model.parameters(), 1.0), 2.0, 0.5, 1.0)
    optimizer.draw_ahead()
    steps = [noise_of(optimizer) for _ in range(3)]
    for drawn in steps:
        assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-6
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.corrcoef(steps[one], steps[other])[0, 1]) < 5 / 20_000**0.5


@pytest.mark.parametrize("ahead", [False, True])
def test_noised_sums_of_all_parameters_lie_on_the_grid(ahead):
    model = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 3, bias=False))
    optimizer = PatientOptimizer(torch.optim.SGD(model.parameters(), 1.0), 2.0, 0.5, 1.0, 0.25)
    made = [torch.randn(4, *p.shape) for p in model.parameters()]
    if ahead:
        optimizer.draw_ahead()
    optimizer.accumulate(made)
    sums = [p.summed_grad.clone() for p in optimizer.params]
    optimizer.add_noise()
    grads = [p.grad for p in optimizer.params]
    assert [g.shape for g in grads] == [p.shape for p in optimizer.params]
    assert all((g % 0.25 == 0).all() for g in grads)
    pairs = zip(grads, sums, strict=True)
    drawn = torch.cat([(g - s).flatten() for g, s in pairs]).numpy()
    wanted = 1 + 0.25**2 / 12
    assert drawn.var() == pytest.approx(wanted, abs=5.5 * wanted * (2 / drawn.size) ** 0.5)
    assert abs(drawn.mean()) < 5.5 / drawn.size**0.5
    # The part of the noise that follows the sums: rounding hides none of it.
    total = torch.cat([s.flatten() for s in sums]).numpy()
    assert abs(np.corrcoef(drawn, total)[0, 1]) < 5.5 / drawn.size**0.5


def test_a_parameter_of_few_bits_gets_a_rounded_multiple():
    weight = nn.Parameter(torch.zeros(5000, dtype=torch.bfloat16))
    optimizer = PatientOptimizer(torch.optim.SGD([weight], 1.0), 100.0, 1.0, 1.0, 0.25)
    optimizer.accumulate([torch.zeros(1, 5000, dtype=torch.bfloat16)])
    optimizer.add_noise()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.float().std() == pytest.approx(100, rel=0.08)


def test_a_failure_to_draw_ahead_ends_the_step_without_a_release(monkeypatch):
    model = nn.Linear(3, 1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = PatientOptimizer(torch.optim.SGD(model.parameters(), 1.0), 1.0, 1.0, 1.0)

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr("fedmed_flower.privacy.optimizer.gaussian", fail)
    optimizer.draw_ahead()
    with pytest.raises(MemoryError):
        optimizer.release()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_gradient_in_many_blocks_is_clipped_as_a_whole(monkeypatch):
    monkeypatch.setattr("fedmed_flower.privacy.optimizer._CPU_BLOCK", 7)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))
    made = [torch.randn(6, *p.shape, dtype=torch.float64) for p in model.parameters()]
    flat = torch.cat([g.flatten(1) for g in made], dim=1)
    wanted = (flat * (0.7 / flat.norm(dim=1, keepdim=True)).clamp(max=1.0)).sum(0)
    optimizer = silent(model, norm=0.7)
    optimizer.accumulate([g.float() for g in made])
    found = torch.cat([p.summed_grad.flatten() for p in optimizer.params])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("count", [1, 2, 9])
def test_whichever_method_is_chosen_the_gradients_are_the_same(count):
    model, batch = classifier(), records(count)

    def loss(network, rows):
        return F.cross_entropy(network(rows["image"]), rows["label"])

    chosen = RecordGradients(model, loss)
    found, _ = chosen(batch)
    assert chosen.method in ("vmap", "loop")
    assert_same(found, one_by_one(model, loss, batch))


class Watched(RecordGradients):
    """Writes down how many records are tried together; more than `room` do not fit."""

    room = 10**9

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.tried = []

    def choose(self, batch):
        count = len(batch["image"])
        self.tried.append(count)
        if count > self.room:
            raise torch.OutOfMemoryError(f"no room for {count}")
        super().choose(batch)


def test_a_micro_batch_keeps_to_the_memory_and_holds_at_least_one_record(monkeypatch):
    model, probe = classifier(), records(4)

    def loss(network, rows):
        return F.cross_entropy(network(rows["image"]), rows["label"])

    one = RecordGradients(model, loss).bytes_per_record(probe)
    for fit, drawn, tried in ((0, 40, 1), (3, 40, 3), (10**9, 40, 32), (10**9, 5, 5)):
        monkeypatch.setattr(training, "_CPU_MEMORY", 4 * one * fit)
        gradients = Watched(model, loss)
        size = training.micro_batch_size(gradients, probe, drawn)
        most = max(1, min(fit, 256))
        assert size == (most if gradients.method == "vmap" else min(most, 4))
        # Four made-up records are tried as often as so many records take.
        assert gradients.tried == [tried]


@pytest.mark.parametrize(
    ("wanted", "room", "tried", "size"),
    [(100, 32, [32], 100), (100, 10, [32, 16, 8], 8), (2, 10, [2], 2), (3, 1, [3, 2, 1], 1)],
)
def test_a_micro_batch_that_does_not_fit_is_halved(wanted, room, tried, size, caplog):
    def loss(network, rows):
        return F.cross_entropy(network(rows["image"]), rows["label"])

    gradients = Watched(classifier(), loss)
    gradients.room = room
    assert training.micro_batch_size(gradients, records(4), 40, wanted) == size
    assert gradients.tried == tried
    assert caplog.messages == [
        f"out of memory with {more} records at a time: going on with {fewer}"
        for more, fewer in itertools.pairwise(tried)
    ]


def test_one_record_that_does_not_fit_is_told():
    gradients = Watched(classifier(), lambda network, rows: network(rows["image"]).mean())
    gradients.room = 0
    with pytest.raises(torch.OutOfMemoryError, match=says("no room for 1")):
        training.micro_batch_size(gradients, records(4), 40, 100)
