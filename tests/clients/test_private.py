import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from dp_accounting import dp_event, pld
from flwr.app import ArrayRecord
from tiny import (
    TinyClient,
    ask,
    bits,
    context_of,
    fixed,
    linear,
    make_rows,
    model_arrays,
    node_of,
    pulled,
    run_tiny,
    says,
    trained,
)
from torch import nn

from fedmed_flower import InputError, MedicalClient, SiteData
from fedmed_flower.clients.training import train_epochs, train_privately
from fedmed_flower.data.site import LineNumber
from fedmed_flower.methods.base import Method
from fedmed_flower.privacy import optimizer
from fedmed_flower.privacy.accounting import Release, epsilon_of
from fedmed_flower.privacy.grid import divergence_once, excess_delta
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.privacy.optimizer import PatientOptimizer
from fedmed_flower.privacy.patient import Mechanism
from fedmed_flower.privacy.validate import require_forgetful
from fedmed_flower.runs.verdict import RunFailedError
from fedmed_flower.server.history import Stop
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.settings.privacy import PrivacySettings
from fedmed_flower.strategies import FedAvg, WeightedFedAvg
from fedmed_flower.wire import read_error

PRIVATE = {"privacy": "patient", "target_epsilon": 4.0}
NO_NOISE = Release(1.0, 0.0)


def private(tmp_path, index=0, node_config=None, **config):
    return context_of(index, node_config=node_config, run_dir=str(tmp_path), **PRIVATE | config)


def error_of(client, context, kind="train", **config):
    reply = ask(client, kind, context, **config)
    assert reply.has_error()
    return read_error(reply.error.reason)[1]


def ledger_of(tmp_path, index=0):
    return Ledger(tmp_path / "ledgers" / f"hospital-{index + 1}.sqlite", read_only=True)


def losses(model, batch):
    return nn.functional.cross_entropy(model(batch["image"]), batch["label"])


def table(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 1, 2, 2, generator=generator)
    labels = torch.arange(rows) % 2
    return images, labels


# Records that nobody stands behind.
PROBE = dict(zip(("image", "label"), table(4, seed=1), strict=True))


def private_steps(model, images, labels, patients, steps=3, clip=1e6, size=0, mu=0.0, **settings):
    mechanism = Mechanism(
        NO_NOISE,
        steps,
        len(set(patients)),
        PrivacySettings(privacy="patient", max_grad_norm=clip, micro_batch_size=size, **settings),
    )

    def batch_of(places):
        return {"image": images[list(places)], "label": labels[list(places)]}

    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.5, weight_decay=0.1)
    return train_privately(
        model, batch_of, patients, losses, optimizer, mechanism, PROBE, method=pulled(model, mu)
    )


@pytest.mark.parametrize("grid", [0.0, 0.125])
def test_the_gradients_of_private_training_lie_on_the_grid_of_its_plan(grid):
    images, labels = table(8)
    settings = PrivacySettings(privacy="patient", max_grad_norm=0.5)
    mechanism = Mechanism(Release(1.0, 2.0), 3, 8, settings, grid)
    model = linear()
    seen = []

    class Seeing(Method):
        def before_step(self, model):
            # Times the expected number of patients, they are the noised sums.
            seen.extend(8 * p.grad.double() for p in model.parameters())

    train_privately(
        model,
        lambda places: {"image": images[list(places)], "label": labels[list(places)]},
        range(8),
        losses,
        torch.optim.SGD(model.parameters(), 0.1),
        mechanism,
        PROBE,
        method=Seeing(),
    )
    numbers = torch.cat([one.flatten() for one in seen])
    assert len(seen) == 3 * len(list(model.parameters()))
    on_grid = numbers % 0.125 == 0
    assert on_grid.all() if grid else not on_grid.any()


def twin(model):
    copied = linear()
    copied.load_state_dict(model.state_dict())
    return copied


def assert_alike(model, other):
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mu", [0.0, 0.7])
@pytest.mark.parametrize("size", [0, 1, 3, 100])
def test_without_noise_and_clipping_private_training_is_plain_training(size, mu):
    images, labels = table(8)
    model = linear()
    plain = twin(model)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.5, weight_decay=0.1)
    batch = [{"image": images, "label": labels}]
    loss = nn.CrossEntropyLoss()
    train_epochs(
        plain,
        batch,
        lambda m, b: loss(m(b["image"]), b["label"]),
        optimizer,
        3,
        method=pulled(plain, mu),
    )
    _, dropped = private_steps(model, images, labels, range(8), size=size, mu=mu)
    assert dropped == 0
    assert_alike(model, plain)


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_a_patient_with_many_records_counts_once(size):
    images, labels = table(7)
    patients = ["a", "b", "a", "c", "a", "a", "c"]
    model = linear()
    plain = twin(model)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.5, weight_decay=0.1)
    share = torch.tensor([1 / patients.count(patient) for patient in patients]) / 3
    for _ in range(3):
        optimizer.zero_grad()
        each = nn.functional.cross_entropy(plain(images), labels, reduction="none")
        (each * share).sum().backward()
        optimizer.step()
    private_steps(model, images, labels, patients, size=size, patient_records="mean")
    assert_alike(model, plain)


def test_a_patient_of_whom_one_record_is_not_finite_is_left_out():
    images, labels = table(5)
    images[3] = math.nan
    model = linear()
    plain = twin(model)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.5, weight_decay=0.1)
    # One row of "a" is broken, so "a" is left out; the sum is divided by three all the same.
    rest = [1, 4]
    total = nn.functional.cross_entropy(plain(images[rest]), labels[rest], reduction="sum")
    (total / 3).backward()
    optimizer.step()
    patients = ["a", "b", "a", "a", "d"]
    mean, dropped = private_steps(model, images, labels, patients, steps=1, patient_records="mean")
    assert (dropped, math.isfinite(mean)) == (1, True)
    assert_alike(model, plain)


def test_no_step_moves_the_model_further_than_the_clipping_norm():
    images, labels = table(6)
    torch.manual_seed(0)
    model = linear()
    before = [p.detach().clone() for p in model.parameters()]
    mechanism = Mechanism(NO_NOISE, 1, 6, PrivacySettings(privacy="patient", max_grad_norm=0.01))

    def batch_of(places):
        return {"image": 10 * images[list(places)], "label": labels[list(places)]}

    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    train_privately(model, batch_of, range(6), losses, optimizer, mechanism, PROBE)
    moved = [p.detach() - start for p, start in zip(model.parameters(), before, strict=True)]
    length = math.sqrt(sum(float(change.square().sum()) for change in moved))
    assert 0 < length <= 0.01 * (1 + 1e-6)


def test_a_step_in_which_nobody_is_drawn_moves_the_model_by_noise():
    images, labels = table(2)
    model = linear()
    before = [p.detach().clone() for p in model.parameters()]
    settings = PrivacySettings(privacy="patient")
    mechanism = Mechanism(Release(1e-12, 1.0), 2, 2, settings)

    def batch_of(places):
        raise AssertionError("nobody is drawn")

    optimizer = torch.optim.SGD(model.parameters(), 1e-12)
    mean, dropped = train_privately(model, batch_of, range(2), losses, optimizer, mechanism, PROBE)
    assert math.isnan(mean)
    assert dropped == 0
    assert all((p != b).all() for p, b in zip(model.parameters(), before, strict=True))
    assert len(labels) == len(images)


@pytest.mark.parametrize("where", ["batch_of", "loss"])
@pytest.mark.parametrize("bad", [[2], [0, 5], list(range(6))])
@pytest.mark.parametrize("size", [0, 1, 3, 100])
def test_a_record_that_fails_adds_nothing_and_changes_nothing_of_the_others(size, bad, where):
    images, labels = table(6)
    model = linear()
    plain = twin(model)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    good = [place for place in range(6) if place not in bad]
    nn.functional.cross_entropy(plain(images[good]), labels[good], reduction="sum").div(
        7
    ).backward()
    optimizer.step()
    # A label that nobody has told of, as it may stand in a table.
    labels[bad] = 7

    def batch_of(places):
        if where == "batch_of" and not {*places}.isdisjoint(bad):
            raise OSError("a file that cannot be read")
        return {"image": images[list(places)], "label": labels[list(places)]}

    settings = PrivacySettings(privacy="patient", max_grad_norm=1e6, micro_batch_size=size)
    # A seventh patient has no record that can be used.
    mechanism = Mechanism(NO_NOISE, 1, 7, settings)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mean, dropped = train_privately(model, batch_of, range(6), losses, optimizer, mechanism, PROBE)
    assert dropped == len(bad)
    assert math.isfinite(mean) == bool(good)
    assert_alike(model, plain)


class Card:
    """Records that lie on a card with room for so many at a time, and for fewer after a while."""

    def __init__(self, images, labels, room, later=None, calls=0):
        self.images, self.labels = images, labels
        self.room, self.later, self.calls = room, later, calls
        self.sizes = []

    def __call__(self, places):
        self.calls -= 1
        room = self.room if self.later is None or self.calls >= 0 else self.later
        if len(places) > room:
            raise torch.OutOfMemoryError(f"no room for {len(places)}")
        self.sizes.append(len(places))
        return {"image": self.images[list(places)], "label": self.labels[list(places)]}


def steps_on_card(model, card, patients, size, records="one", noise=0.0, mu=0.0):
    settings = PrivacySettings(
        privacy="patient", max_grad_norm=0.4, micro_batch_size=size, patient_records=records
    )
    mechanism = Mechanism(Release(1.0, noise), 3, len(set(patients)), settings)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.5)
    return train_privately(
        model, card, patients, losses, optimizer, mechanism, PROBE, method=pulled(model, mu)
    )


@pytest.fixture
def taken(monkeypatch):
    """How many patients are added up at a time, None after each step; noise that does not vary."""
    found, generators = [], itertools.count()
    accumulate, release = PatientOptimizer.accumulate, PatientOptimizer.release

    def counting(self, made):
        found.append(len(made[0]))
        accumulate(self, made)

    def ending(self):
        found.append(None)
        release(self)

    def fixed(count, std, generator):
        return std * np.random.default_rng(next(generators) % 3).standard_normal(count)

    monkeypatch.setattr(PatientOptimizer, "accumulate", counting)
    monkeypatch.setattr(PatientOptimizer, "release", ending)
    monkeypatch.setattr(optimizer, "gaussian", fixed)
    return found


PATIENTS = ["a", "b", "a", "c", "d", "a", "e", "c", "f"]


@pytest.mark.parametrize("mu", [0.0, 0.7])
@pytest.mark.parametrize("records", ["one", "mean"])
@pytest.mark.parametrize("size", [0, 8])
@pytest.mark.parametrize("room", [1, 2, 3])
def test_too_little_memory_changes_nothing_of_a_private_step(taken, room, size, records, mu):
    images, labels = table(9)
    patients = PATIENTS if records == "mean" else list(range(9))
    model = linear()
    other = twin(model)
    steps_on_card(model, Card(images, labels, 9), patients, 8, records, noise=0.5, mu=mu)
    taken.clear()
    card = Card(images, labels, room)
    _, dropped = steps_on_card(other, card, patients, size, records, noise=0.5, mu=mu)
    assert dropped == 0
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    assert max(card.sizes) <= room
    # In each of three steps every patient once, and noise once.
    assert patients_a_step(taken) == [len(set(patients))] * 3


def patients_a_step(taken):
    counts = [0]
    for number in taken:
        counts = [*counts, 0] if number is None else [*counts[:-1], counts[-1] + number]
    return counts[:-1]


@pytest.mark.parametrize("calls", range(0, 16, 2))
def test_patients_of_a_part_that_breaks_off_are_taken_once(taken, calls):
    images, labels = table(9)
    model = linear()
    other = twin(model)
    mean, _ = steps_on_card(model, Card(images, labels, 9), PATIENTS, 8, "mean")
    taken.clear()
    # The room shrinks on the way, also between the records of one patient.
    card = Card(images, labels, 2, later=1, calls=calls)
    mean_of_parts, _ = steps_on_card(other, card, PATIENTS, 2, "mean")
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    assert mean_of_parts == pytest.approx(mean, abs=1e-6)
    assert patients_a_step(taken) == [6] * 3


@pytest.mark.parametrize("size", [0, 1, 8])
def test_a_private_step_for_which_one_record_is_too_large(size):
    images, labels = table(4)
    with pytest.raises(torch.OutOfMemoryError, match=says("no room for 1")):
        steps_on_card(linear(), Card(images, labels, 0), range(4), size)


def test_a_private_step_halves_what_it_has_tried(caplog):
    images, labels = table(5)
    steps_on_card(linear(), Card(images, labels, 2), range(5), 100)
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 5 records at a time: going on with 3",
        "out of memory with 3 records at a time: going on with 2",
    ]


def test_a_client_trains_privately_by_run_config_alone(tmp_path):
    context = private(tmp_path, num_server_rounds=2, local_epochs=2, delta=1e-4)
    reply = ask(TinyClient, "train", context)
    assert not reply.has_error()
    metrics = reply.content["metrics"]
    assert set(metrics) == {"num-examples", "patient-epsilon"}
    (entry,) = ledger_of(tmp_path).entries()
    ((release, steps),) = entry.releases.items()
    assert (entry.purpose, entry.patients, entry.rounds, entry.unsettled) == ("train", 10, 1, 0)
    # A half of the run, whose arithmetic adds at most a hundredth to delta.
    target = PrivacySettings().target_epsilon
    assert 0 < excess_delta(2 * entry.divergence, target) <= 1e-6
    assert release.sampling_rate == 0.4
    assert steps == 5
    accountant = pld.PLDAccountant()
    noise = dp_event.GaussianDpEvent(release.noise_multiplier)
    accountant.compose(dp_event.PoissonSampledDpEvent(0.4, noise), 5)
    assert metrics["patient-epsilon"] == pytest.approx(accountant.get_epsilon(1e-4), rel=0.01)
    assert epsilon_of({release: 2 * steps}, 1e-4) == pytest.approx(4.0, rel=0.01)
    assert not np.array_equal(
        reply.content["arrays"]["1.weight"].numpy(), model_arrays()["1.weight"].numpy()
    )


def test_equal_seeds_do_not_give_equal_noise(tmp_path):
    models = []
    for attempt in range(2):
        models.append(trained(TinyClient, private(tmp_path / str(attempt), seed=3)))
    assert models[0]["1.weight"] != models[1]["1.weight"]
    images = make_rows(10, 0)
    same = fixed(SiteData(train=images))
    sites = [trained(same, private(tmp_path, index, seed=3)) for index in range(2)]
    assert sites[0]["1.weight"] != sites[1]["1.weight"]


def test_the_ledger_adds_up_rounds_and_runs(tmp_path):
    run = private(tmp_path, num_server_rounds=2)
    epsilons = []
    for context, key in ((run, "first"), (run, "first"), (private(tmp_path), "second")):
        metrics = ask(TinyClient, "train", context, run_key=key).content["metrics"]
        epsilons.append((metrics["patient-epsilon"], ledger_of(tmp_path).most(1e-5)))
    (one, one_total), (two, two_total), (other, total) = epsilons
    assert one == one_total < two == two_total < total
    assert 0 < other < total
    assert [entry.run for entry in ledger_of(tmp_path).entries()] == ["first", "second"]


def test_a_run_is_declined_before_its_target_is_passed(tmp_path):
    context = private(tmp_path, num_server_rounds=1)
    assert not ask(TinyClient, "train", context, run_key="r").has_error()
    text = "declined: the run's target-epsilon would be passed"
    assert error_of(TinyClient, context, run_key="r") == text
    assert ledger_of(tmp_path).entries()[0].rounds == 1


def test_a_real_hospital_declines_by_name_and_reason(tmp_path, caplog):
    caplog.set_level("INFO", "flwr.fedmed")
    node = {
        "site-name": "north",
        "ledger": str(tmp_path / "ledger.sqlite"),
        "budget-epsilon": 1,
        "budget-delta": 1e-5,
    }
    context = private(tmp_path, node_config=node)
    text = error_of(TinyClient, context)
    assert text == "InputError"
    Ledger(tmp_path / "ledger.sqlite")
    text = "declined: the hospital's privacy budget would be passed"
    assert error_of(TinyClient, context) == text
    # How near it was stays at the hospital.
    assert re.search(r"epsilon would come to [\d.]+ at delta 1e-05, above 1, the hosp", caplog.text)


def test_a_hospital_with_a_budget_declines_training_without_privacy(tmp_path):
    node = {"partition-id": 0, "num-partitions": 2, "budget-epsilon": 9.0, "budget-delta": 1e-5}
    context = context_of(node_config=node)
    text = 'this hospital has set a privacy budget and trains with privacy="patient" only'
    assert error_of(TinyClient, context) == f"declined: {text}"


def test_three_hospitals_stop_at_their_own_budgets_and_the_run_ends_well(tmp_path):
    budgets = [2.6, 3.4, 50.0]
    node_configs = [{"budget-epsilon": b, "budget-delta": 1e-5} for b in budgets]
    strategy = FedAvg()
    result = run_tiny(
        tmp_path / "run",
        num_sites=3,
        node_configs=node_configs,
        strategy=strategy,
        num_server_rounds=4,
        **PRIVATE,
    )
    rounds = {
        site: [
            row[0]
            for row in strategy.history.rows
            if row[1:4] == ("train", site, "patient-epsilon")
        ]
        for site in ("hospital-1", "hospital-2", "hospital-3")
    }
    assert [len(taken) for taken in rounds.values()] == [1, 2, 4]
    for index, budget in enumerate(budgets):
        ledger = ledger_of(tmp_path / "run", index)
        spent = ledger.most(1e-5)
        assert spent <= min(budget, 4.0)
        (entry,) = [entry for entry in ledger.entries() if entry.purpose == "train"]
        ((release, steps),) = entry.releases.items()
        more = Release(*release), steps + steps // entry.rounds
        assert epsilon_of({more[0]: more[1]}, 1e-5) > min(budget, 4.0)
    assert set(result.train_metrics_clientapp) == {1, 2, 3, 4}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "finished"
    sites = summary["privacy"]["patient"]["sites"]
    assert [(s["rounds"], s["declined"]) for _, s in sorted(sites.items())] == [
        (1, 3), (2, 2), (4, 0),
    ]  # fmt: skip
    assert sites["hospital-3"]["epsilon"] == pytest.approx(4.0, rel=0.01)
    for number in (1, 4):
        together = result.train_metrics_clientapp[number]["patient-epsilon"]
        assert together == max(
            row[4]
            for row in strategy.history.rows
            if row[0] == number and row[3] == "patient-epsilon" and row[2] != "all"
        )


def test_a_run_ends_with_its_model_when_every_hospital_has_declined(tmp_path):
    node = {"budget-epsilon": 3.4, "budget-delta": 1e-5}
    strategy = FedAvg()
    result = run_tiny(
        tmp_path / "run",
        node_configs=[node, node],
        strategy=strategy,
        num_server_rounds=9,
        **PRIVATE | {"target_epsilon": 6.0},
    )
    trained_rounds = set(result.train_metrics_clientapp)
    assert trained_rounds
    last = max(trained_rounds) + 1
    stopped = strategy.history.stopped
    assert stopped == Stop(last, "every connected site has declined to train further")
    assert max(f.round for f in strategy.history.failures if f.phase == "train") == last
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
    assert all(np.isfinite(array.numpy()).all() for array in result.arrays.values())


def test_a_strategy_that_needs_the_loss_leaves_private_hospitals_out(tmp_path):
    strategy = WeightedFedAvg(weights="inverse-loss")
    with pytest.raises(RunFailedError, match=r"^no site could train in any of 1 rounds"):
        run_tiny(tmp_path / "run", strategy=strategy, num_server_rounds=1, **PRIVATE)
    assert {f.site for f in strategy.history.failures} >= {"hospital-1", "hospital-2"}


def test_a_second_start_forgets_who_declined(tmp_path):
    node = {"budget-epsilon": 0.001, "budget-delta": 1e-5}
    strategy = FedAvg()
    with pytest.raises(RunFailedError):
        run_tiny(tmp_path / "a", node_configs=[node, node], strategy=strategy, **PRIVATE)
    result = run_tiny(tmp_path / "b", strategy=strategy, num_server_rounds=1, **PRIVATE)
    assert set(result.train_metrics_clientapp) == {1}


def test_a_resumed_run_goes_on_in_the_same_account(tmp_path):
    run_tiny(tmp_path / "run", num_server_rounds=2, **PRIVATE)
    key = RunFolder(tmp_path / "run").read_config()["run"]["key"]
    before = ledger_of(tmp_path / "run").most(1e-5)
    strategy = FedAvg()
    run_tiny(tmp_path / "run", strategy=strategy, num_server_rounds=3, resume=True, **PRIVATE)
    assert RunFolder(tmp_path / "run").read_config()["run"]["key"] == key
    entries = ledger_of(tmp_path / "run").entries()
    # The test split is asked for once more where a run is resumed at its end.
    assert [(entry.run, entry.purpose, entry.rounds) for entry in entries] == [
        (key, "train", 2), (key, "val counts", 2), (key, "test counts", 2),
    ]  # fmt: skip
    assert ledger_of(tmp_path / "run").most(1e-5) == before <= 4.0
    for phase in ("train", "val"):
        failures = [f for f in strategy.history.failures if (f.round, f.phase) == (3, phase)]
        told = [(f.site, f.reason) for f in failures]
        declined = "declined: the run's target-epsilon would be passed"
        assert told[:2] == [("hospital-1", declined), ("hospital-2", declined)]
        rest = [("all", "0 usable replies, 1 needed: the model stays as it was")]
        assert told[2:] == (rest if phase == "train" else [])


def test_models_for_comparison_are_runs_of_their_own(tmp_path):
    run_tiny(tmp_path / "run", num_server_rounds=1, baselines=True, **PRIVATE)
    key = RunFolder(tmp_path / "run").read_config()["run"]["key"]
    found = {"train": [], "val counts": [], "test counts": []}
    for entry in ledger_of(tmp_path / "run").entries():
        found[entry.purpose].append(entry.run.removeprefix(key))
    both = ["", "/local-1-hospital-1"]
    # Each model is measured on the test patients of each hospital.
    tested = [*both, "/local-2-hospital-2", "/pooled"]
    assert found == {"train": both, "val counts": both, "test counts": tested}
    pooled = Ledger(tmp_path / "run" / "ledgers" / "all-sites.sqlite", read_only=True)
    assert [(e.run, e.purpose, e.patients) for e in pooled.entries()] == [
        (f"{key}/pooled", "train", 20), (f"{key}/pooled", "val counts", 12),
    ]  # fmt: skip


def test_the_report_and_the_metrics_tell_what_each_patient_has_cost(tmp_path):
    run_tiny(tmp_path / "run", num_server_rounds=2, **PRIVATE)
    page = " ".join((tmp_path / "run" / "report.html").read_text().split())
    assert "Unit: the patient, with all records, in or out." in page
    assert "bounded by the run’s target, epsilon <b>4.0</b> at delta 1e-05" in page
    assert "the hospitals reported <b>4.000</b> at most" in page
    lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert sum("hospital-1,patient-epsilon," in line for line in lines) == 2


class Norm(TinyClient):
    def build_model(self):
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Mixing(TinyClient):
    def augment(self, images):
        return (images + images.flip(0)) / 2


class Weighted(TinyClient):
    def loss(self):
        return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0]))


class OwnFit(TinyClient):
    def fit(self, model, prepared, seed):
        return super().fit(model, prepared, seed)


class Bare(MedicalClient):
    num_classes = 2
    build_model = TinyClient.build_model
    load_data = TinyClient.load_data

    def check(self, data):
        pass

    def prepare(self, rows, train):
        return rows

    def fit(self, model, prepared, seed):
        return {}

    def measure(self, model, prepared):
        return {"num-examples": len(prepared)}


class Stateful(nn.Linear):
    """Changes a buffer after some calls, which it counts where nobody looks."""

    def __init__(self):
        super().__init__(4, 2)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = itertools.count(1)

    def forward(self, values):
        if next(self.calls) > 12:
            self.seen = self.seen + 1
        return super().forward(values)


class Remembering(TinyClient):
    def build_model(self):
        return nn.Sequential(nn.Flatten(), Stateful())


@pytest.mark.parametrize(
    ("client", "model", "text"),
    [
        (
            Norm,
            lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2)),
            "the layer 1 (BatchNorm1d) mixes patients or keeps statistics of them: build_model can "
            "return fedmed_flower.privacy.validate.with_group_norm(model)",
        ),
        (
            Mixing,
            linear,
            "augment mixes patients: the outcome for one record depends on another, as in mixup. "
            "Private training needs a change of each record alone",
        ),
        (
            OwnFit,
            linear,
            "OwnFit defines its own fit, which private training does not use: define batch_of and "
            "loss_of as well",
        ),
        (
            Bare,
            linear,
            "Bare defines its own fit, which private training does not use: define batch_of and "
            "loss_of as well",
        ),
    ],
)
def test_what_cannot_be_trained_privately_is_refused_and_costs_nothing(
    tmp_path, client, model, text
):
    arrays = model_arrays(model)
    reply = ask(client, "train", private(tmp_path), arrays)
    assert read_error(reply.error.reason)[1] == text
    assert not (tmp_path / "ledgers").exists()


def test_a_loss_that_couples_patients_is_refused(tmp_path):
    rows = sorted(make_rows(20, 0), key=lambda row: row["label"])
    text = error_of(fixed(SiteData(train=rows), Weighted), private(tmp_path))
    assert text.startswith("the loss of a batch is not the mean or sum of its records' losses: ")
    assert text.endswith("class weights with reduction='sum'")


def test_a_client_that_says_nothing_of_batches_cannot_train():
    bare = Bare(context_of())
    text = "Bare cannot train: it does not define batch_of and loss_of"
    for call in (lambda: bare.batch_of([], []), lambda: bare.loss_of(linear(), {})):
        with pytest.raises(InputError, match=says(text)):
            call()


def test_what_training_leaves_behind_in_a_buffer_never_leaves(tmp_path):
    arrays = model_arrays(lambda: nn.Sequential(nn.Flatten(), Stateful()))
    reply = ask(Remembering, "train", private(tmp_path, local_epochs=9), arrays)
    assert reply.has_error()
    text = read_error(reply.error.reason)[1]
    assert text == (
        "training has changed 1.seen, which is not trained and would leave the hospital without "
        "noise: the model must not change it"
    )
    (entry,) = ledger_of(tmp_path).entries()
    assert entry.unsettled == 1


class Slicing(TinyClient):
    def prepare(self, rows, train):
        return super().prepare([row for row in rows for _ in range(3)], train)


class Remember(nn.Module):
    """A loss that scales by a running mean of itself."""

    mean = 1.0

    def forward(self, outputs, labels):
        value = nn.functional.cross_entropy(outputs, labels)
        self.mean = 0.9 * self.mean + 0.1 * value.item()
        return value / self.mean


class Forgetless(TinyClient):
    def loss(self):
        return Remember()


def test_a_loss_that_remembers_the_record_before_is_refused(tmp_path):
    text = error_of(Forgetless, private(tmp_path))
    assert text.startswith(
        ("the loss of a batch is not the mean", "the model or the loss keeps something of one")
    )
    rows = {"image": torch.randn(2, 1, 2, 2), "label": torch.tensor([0, 1])}
    loss = Remember()
    with pytest.raises(InputError, match=r"^the model or the loss keeps something of one record"):
        require_forgetful(linear(), lambda model, b: loss(model(b["image"]), b["label"]), rows)
    dropout = nn.Sequential(nn.Dropout(0.5), linear())
    require_forgetful(dropout, losses, rows)


class Bank(nn.Module):
    """Keeps what it made of the records before; from the tenth on that has an effect."""

    def __init__(self):
        super().__init__()
        self.layer, self.bank = nn.Linear(4, 2), []

    def forward(self, images):
        made = self.layer(images.flatten(1))
        if len(self.bank) >= 10:
            made = made - torch.stack(self.bank).mean(0)
        self.bank.append(made.detach().mean(0))
        return made


class Banking(TinyClient):
    def build_model(self):
        return Bank()


def test_a_bank_of_records_is_refused_before_anything_is_charged(tmp_path, monkeypatch):
    text = (
        "the model or the loss keeps something of one record until the next, in the model (Bank), "
        "attribute bank. Private training needs a model and a loss that keep nothing"
    )
    reply = ask(Banking, "train", private(tmp_path), model_arrays(Bank))
    assert read_error(reply.error.reason)[1] == text
    assert not (tmp_path / "ledgers").exists()
    # What this check is for: within torch, and charged.
    monkeypatch.setattr("fedmed_flower.privacy.validate.require_forgetful", lambda *_: None)
    reply = ask(Banking, "train", private(tmp_path), model_arrays(Bank))
    assert "INTERNAL ASSERT FAILED" in reply.error.reason
    (entry,) = ledger_of(tmp_path).entries()
    assert entry.unsettled == 1


def test_rows_that_prepare_multiplies_are_refused(tmp_path):
    text = error_of(Slicing, private(tmp_path))
    assert text.startswith(
        "prepare returned 30 rows for 10: private training must know the patient of each"
    )


def test_a_patient_is_one_whichever_type_its_number_has(tmp_path):
    rows = [
        {**row, "patient": kind(number % 5)}
        for number, row in enumerate(make_rows(10, 0))
        for kind in ([torch.tensor, np.int64][number // 5],)
    ]
    reply = ask(fixed(SiteData(train=rows)), "train", private(tmp_path))
    assert not reply.has_error()
    (entry,) = ledger_of(tmp_path).entries()
    assert entry.patients == 5
    assert next(iter(entry.releases)).sampling_rate == 0.8
    both = fixed(SiteData(train=rows, val=[{**rows[0], "patient": 0}]))
    text = error_of(both, private(tmp_path))
    assert text == "patient 0 is in the splits train and val: each patient must be in one"


BAD_ROWS = [
    {"image": np.zeros((3, 2), np.uint8), "label": 0, "patient": "of another shape"},
    {"image": np.zeros((2, 2, 2), np.uint8), "label": 0, "patient": "of two channels"},
    {"image": "nowhere.png", "label": 0, "patient": "without a file"},
    {"image": np.full((2, 2), np.nan), "label": 0, "patient": "without a number"},
    {"image": {"a": 1}, "label": 0, "patient": "without an image"},
    {"label": 0, "patient": "without an entry"},
    {"image": np.zeros((2, 2), np.uint8), "label": 9, "patient": "of a class nobody declared"},
    {"image": np.zeros((2, 2), np.uint8), "label": "x", "patient": "of no class"},
    {"image": np.zeros((2, 2), np.uint8), "patient": "without a label"},
]


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("records", ["one", "mean"])
def test_rows_that_cannot_be_used_add_nothing_and_their_patients_count(
    tmp_path, monkeypatch, real, records
):
    monkeypatch.setattr(optimizer, "standard", lambda count, generator: np.zeros(count))
    good, start, moved = make_rows(9, 0), model_arrays()["1.weight"].numpy(), []
    for rows in (good, good + BAD_ROWS):
        folder = tmp_path / str(len(rows))
        folder.mkdir()
        node, path = None, folder / "ledgers" / "hospital-1.sqlite"
        if real:
            node, path = node_of(folder), folder / "privacy-ledger.sqlite"
        settings = {"sampling_rate": 1.0, "local_steps": 1, "patient_records": records}
        context = private(folder, node_config=node, **settings)
        reply = ask(fixed(SiteData(train=rows)), "train", context)
        assert not reply.has_error(), reply.error.reason
        assert reply.content["metrics"]["num-examples"] == len(rows)
        (entry,) = Ledger(path, read_only=True).entries()
        assert (entry.purpose, entry.patients, entry.unsettled) == ("train", len(rows), 0)
        moved.append(len(rows) * (reply.content["arrays"]["1.weight"].numpy() - start))
    np.testing.assert_allclose(moved[1], moved[0], rtol=1e-3, atol=1e-6)
    assert np.abs(moved[0]).max() > 1e-3


def test_evaluation_with_noise_counts_the_rows_that_can_be_used(tmp_path, monkeypatch):
    quiet = "fedmed_flower.metrics.classification.noised_once"
    monkeypatch.setattr(quiet, lambda total, std: total)
    good, seen = make_rows(12, 0), []
    for rows in (good, good + BAD_ROWS):
        folder = tmp_path / str(len(rows))
        folder.mkdir()
        context = private(folder, node_config=node_of(folder))
        data = SiteData(train=make_rows(3, 1, "t"), val=rows)
        reply = ask(fixed(data), "evaluate", context)
        assert not reply.has_error(), reply.error.reason
        seen.append(dict(reply.content["metrics"]))
        (entry,) = Ledger(folder / "privacy-ledger.sqlite", read_only=True).entries()
        assert (entry.purpose, entry.patients) == ("val counts", len(rows))
    assert seen[0] == seen[1]
    assert seen[0]["num-examples"] == 12


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize("client", [Norm, Mixing, OwnFit, Weighted, Banking])
def test_model_and_loss_are_tried_before_a_row_is_looked_at(tmp_path, client, kind):
    def load_data(self, site):
        raise AssertionError("the rows are looked at")

    class Client(client):
        pass

    Client.load_data = load_data
    if kind == "evaluate":  # Whose network has another number of outputs than there are classes.
        Client.build_model = lambda self: linear(3)
    context = private(tmp_path, node_config=node_of(tmp_path))
    arrays = model_arrays(Client(context).build_model)
    reply = ask(Client, kind, context, arrays)
    assert reply.error.reason == "site north: InputError"


def test_images_that_say_nothing_of_their_size_cannot_be_tried(tmp_path):
    class Client(TinyClient):
        image_shape = ()

    text = (
        "Client must declare the size of its images before a patient's image is read: give it "
        "image_shape = (channels, *spatial), or set image-size or patch-size"
    )
    for kind in ("train", "evaluate"):
        assert error_of(Client, private(tmp_path), kind) == text
    assert not ask(Client, "train", private(tmp_path, patch_size="2,2")).has_error()
    assert not ask(Client, "train", context_of()).has_error()
    text = (
        "spacing makes images of different shapes, which private training cannot use: set "
        "patch-size as well"
    )
    assert error_of(TinyClient, private(tmp_path, spacing="1,1")) == text


class Failing(TinyClient):
    """Fails with a text that names somebody, once the rows were looked at."""

    error = ValueError("Anna Schmidt has no scan")
    failing = ""

    def load_data(self, site):
        if self.failing == "load_data":
            raise self.error
        return super().load_data(site)

    def seed_transforms(self, prepared, seed):
        if self.failing == "train":
            raise self.error

    def measure_privately(self, model, prepared, patients, noise):
        raise self.error


@pytest.mark.parametrize(
    "error", [ValueError("Anna Schmidt"), InputError("Anna Schmidt"), KeyError()]
)
@pytest.mark.parametrize(
    ("failing", "kind"),
    [
        ("train", "train"),
        ("", "evaluate"),
        ("load_data", "train"),
        ("load_data", "evaluate"),
        ("load_data", "query.describe"),
    ],
)
def test_once_rows_were_looked_at_a_failure_is_one_word(tmp_path, caplog, failing, kind, error):
    client = type("Client", (Failing,), {"failing": failing, "error": error})
    context = private(tmp_path, node_config=node_of(tmp_path))
    reply = ask(client, kind, context)
    assert reply.error.reason == "site north: failed"
    if str(error) == "Anna Schmidt":
        assert caplog.messages[-1] == "north: Anna Schmidt"
    # In a simulation the text is told.
    simulated = ask(client, kind, private(tmp_path))
    assert read_error(simulated.error.reason)[1] in (
        f"{error}", f"{type(error).__name__}: {error}",
    )  # fmt: skip


def test_a_failure_before_rows_are_looked_at_tells_its_class(tmp_path):
    context = private(tmp_path, node_config=node_of(tmp_path), trainable="x.*")
    for kind in ("train", "evaluate"):
        assert ask(TinyClient, kind, context).error.reason == "site north: InputError"


NO_PATIENTS = (
    "the table names no patients: with privacy or a budget it needs a column of patients, since "
    "the ledger must recognise each patient however the table is sorted"
)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_lines_of_a_table_are_no_patients_where_a_ledger_must_know_them_again(
    tmp_path, caplog, split
):
    rows = {s: make_rows(12, number, s) for number, s in enumerate(("train", "val", "test"))}
    rows[split] = [{**row, "patient": LineNumber(n)} for n, row in enumerate(rows[split])]
    client = fixed(SiteData(**rows))
    for kind in ("train", "evaluate", "query.describe"):
        assert error_of(client, private(tmp_path), kind) == NO_PATIENTS
        reply = ask(client, kind, private(tmp_path, node_config=node_of(tmp_path)))
        assert reply.error.reason == "site north: failed"
        assert caplog.messages[-1] == f"north: {NO_PATIENTS}"
        # Without privacy nobody has to be known again.
        assert not ask(client, kind, context_of(node_config=node_of(tmp_path))).has_error()
    budget = node_of(tmp_path, budget_epsilon=9.0, budget_delta=1e-5)
    assert ask(client, "query.describe", context_of(node_config=budget)).has_error()


def test_a_named_ledger_that_is_gone_stops_the_hospital(tmp_path):
    node = {"partition-id": 0, "num-partitions": 2, "ledger": str(tmp_path / "gone.sqlite")}
    text = error_of(TinyClient, private(tmp_path, node_config=node))
    hint = "mend the path or the disk, or make a new one (fedmed privacy --new)"
    assert text == f"there is no ledger {tmp_path / 'gone.sqlite'}: {hint}"


def test_whoever_has_no_budget_is_told_so(tmp_path, caplog):
    node = {"site-name": "north", "data-dir": str(tmp_path)}
    assert not ask(TinyClient, "train", private(tmp_path, node_config=node)).has_error()
    assert "is a new ledger, in which nothing was ever released" in caplog.text
    assert "north: budget-epsilon is not set, so that only the server limits" in caplog.text
    assert (tmp_path / "privacy-ledger.sqlite").exists()


def test_a_budget_covers_evaluation_whatever_the_server_asks(tmp_path):
    node = {"partition-id": 0, "num-partitions": 2, "budget-epsilon": 9.0, "budget-delta": 1e-5}
    for split in ("val", "train"):
        context = context_of(node_config=node, run_dir=str(tmp_path), target_epsilon=1e5)
        text = "declined: the hospital's privacy budget would be passed"
        assert error_of(TinyClient, context, "evaluate", split=split) == text
    assert ledger_of(tmp_path).entries() == []


def test_no_patient_changes_the_score_of_another_under_private_metrics(tmp_path):
    def build_model(self=None):
        return nn.Sequential(nn.Flatten(), Centred(), nn.Linear(4, 2))

    arrays, counts = model_arrays(build_model), []
    for number, kept in enumerate((300, 299)):
        data = many()
        data = SiteData(train=data.train, val=data.val[:kept], test=data.test)
        site = fixed(data, build_model=build_model)
        context = private(
            tmp_path / str(number), private_metrics=True, target_epsilon=1e5, num_server_rounds=1
        )
        reply = ask(site, "evaluate", context, arrays)
        counts.append(np.asarray(reply.content["metrics"]["noised-counts"]))
    assert np.linalg.norm(counts[0] - counts[1]) < 1.5


class Centred(nn.Module):
    def forward(self, values):
        return values - values.mean(0) if len(values) > 1 else values


def test_fedprox_reaches_private_training(tmp_path):
    lengths = []
    for mu in (0.0, 19.0):
        # So weak a target that noise hardly counts, and steps enough for any draw of patients.
        context = private(tmp_path / str(mu), target_epsilon=1e5, local_epochs=6)
        sent = ask(TinyClient, "train", context, proximal_mu=mu).content["arrays"]["1.weight"]
        lengths.append(np.linalg.norm(sent.numpy() - model_arrays()["1.weight"].numpy()))
    assert 0 < 2 * lengths[1] < lengths[0]


def many(classes=2, patients=None):
    def rows(seed, name):
        found = make_rows(300, seed, name, classes)
        if patients:
            found = [{**row, "patient": f"{name}{n % patients}"} for n, row in enumerate(found)]
        return found

    return SiteData(train=rows(0, "t"), val=rows(1, "v"), test=rows(2, "s"))


def test_private_metrics_are_near_the_true_ones_and_cost_other_patients(tmp_path):
    client = fixed(many())
    context = private(tmp_path, private_metrics=True, num_server_rounds=1, target_epsilon=99.0)
    exact = ask(client, "evaluate", context_of()).content["metrics"]
    reply = ask(client, "evaluate", context, server_round=1)
    noised = reply.content["metrics"]
    assert set(noised) == {
        "num-examples", "accuracy", "balanced-accuracy", "sensitivity", "specificity", "auc",
        "noised-counts",
    }  # fmt: skip
    assert abs(noised["num-examples"] - 300) < 20
    for name in ("auc", "accuracy"):
        assert abs(noised[name] - exact[name]) < 0.05
    assert noised["auc"] != exact["auc"]
    (entry,) = ledger_of(tmp_path).entries()
    assert (entry.purpose, entry.patients, entry.releases.total()) == ("val counts", 300, 1)
    assert entry.divergence == divergence_once()
    assert error_of(client, context, "evaluate") == (
        "declined: the run's target-epsilon would be passed"
    )
    assert not ask(client, "train", context).has_error()


def test_private_training_tells_its_cost_and_nothing_else(tmp_path):
    reply = ask(TinyClient, "train", private(tmp_path, private_metrics=True))
    assert set(reply.content["metrics"]) == {
        "num-examples", "patient-epsilon",
    }  # fmt: skip


def test_a_hospital_can_insist_on_private_metrics(tmp_path):
    node = {"partition-id": 0, "num-partitions": 2, "private-metrics": True}
    context = context_of(node_config=node, run_dir=str(tmp_path))
    assert "noised-counts" in ask(TinyClient, "evaluate", context).content["metrics"]
    assert set(ask(TinyClient, "train", context).content["metrics"]) == {"num-examples"}


def test_training_patients_are_never_measured_without_noise(tmp_path):
    exactly = private(tmp_path, private_metrics=False)
    text = "declined: training patients are measured with noise only"
    assert error_of(TinyClient, exactly, "evaluate", split="train") == text
    assert not (tmp_path / "ledgers").exists()
    context = private(tmp_path)
    assert not ask(TinyClient, "evaluate", context, split="train").has_error()
    (entry,) = ledger_of(tmp_path).entries()
    assert (entry.purpose, entry.releases.total()) == ("train counts", 1)
    assert not ask(TinyClient, "evaluate", context_of(), split="train").has_error()


@pytest.mark.parametrize("privacy", ["none", "patient"])
@pytest.mark.parametrize("run", [None, True, False])
@pytest.mark.parametrize("own", [None, True, False])
@pytest.mark.parametrize("real", [True, False])
def test_private_runs_measure_by_noise_unless_hospital_or_simulation_says_otherwise(
    tmp_path, real, own, run, privacy
):
    node = node_of(tmp_path) if real else {"partition-id": 0, "num-partitions": 2}
    node |= {} if own is None else {"private-metrics": own}
    config = {"privacy": privacy} | ({} if run is None else {"private_metrics": run})
    context = context_of(node_config=node, run_dir=str(tmp_path), num_server_rounds=1, **config)
    noised = own if own is not None else privacy == "patient" and (real or run is not False)
    assert TinyClient(context).noises_metrics == noised
    data = SiteData(train=make_rows(12, 0), val=make_rows(12, 1, "v"))
    found = ask(fixed(data), "evaluate", context).content["metrics"]
    assert ("noised-counts" in found, "loss" in found) == (noised, not noised)


def test_a_budget_asks_for_noise_whatever_the_run_says(tmp_path):
    node = node_of(tmp_path, budget_epsilon=9.0, budget_delta=1e-5)
    for privacy, run in itertools.product(("none", "patient"), (True, False)):
        context = context_of(node_config=node, privacy=privacy, private_metrics=run)
        assert TinyClient(context).noises_metrics


def test_a_run_with_private_metrics_pools_them(tmp_path):
    result = run_tiny(
        tmp_path / "run",
        fixed(many()),
        private_metrics=True,
        num_server_rounds=1,
        **PRIVATE | {"target_epsilon": 99.0},
    )
    metrics = result.evaluate_metrics_clientapp[1]
    assert "noised-counts" not in metrics
    assert abs(metrics["num-examples"] - 600) < 30
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert abs(summary["test"]["federated"]["num-examples"] - 600) < 30
    assert 0.4 < summary["test"]["federated"]["auc"] <= 1
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Evaluation counts carry noise too" in page


def test_a_client_that_gives_no_counts_with_noise_says_so(tmp_path):
    text = "Bare does not define measure_privately"
    assert error_of(Bare, private(tmp_path), "evaluate") == text
    exactly = private(tmp_path, private_metrics=False)
    assert not ask(Bare, "evaluate", exactly).has_error()
    assert not (tmp_path / "ledgers").exists()


def test_without_privacy_nothing_is_written_and_nothing_changes(tmp_path):
    context = context_of(run_dir=str(tmp_path), run_id=77)
    reply = ask(TinyClient, "train", context)
    again = ask(TinyClient, "train", context_of(run_dir=str(tmp_path), run_id=78))
    assert bits(reply.content["arrays"]) == bits(again.content["arrays"])
    assert set(reply.content["metrics"]) == {"loss", "num-examples", "seconds"}
    assert not (tmp_path / "ledgers").exists()
    assert isinstance(reply.content["arrays"], ArrayRecord)
