"""Hospitals that add shares of noise to secure sums: whole runs, and what they refuse."""

import json
import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from scipy import stats
from secure_members import members_of, record_of
from squares import Squares
from tiny import (
    TinyClient,
    bits,
    context_of,
    fixed,
    linear,
    make_rows,
    model_arrays,
    nodes_of,
    run_tiny,
)
from torch import nn

from fedmed_flower import InputError, SiteData
from fedmed_flower.clients import shares as client_shares
from fedmed_flower.clients.secure import SecureReply
from fedmed_flower.clients.shares import WHOLE, HospitalShare, PatientShare, share_of
from fedmed_flower.clients.training import sum_privately
from fedmed_flower.errors import DeclinedError
from fedmed_flower.privacy.accounting import Release, epsilon_of
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.privacy.patient import Mechanism
from fedmed_flower.runs.verdict import RunFailedError
from fedmed_flower.secure.encoding import SecureError
from fedmed_flower.secure.identity import Identity, key_text
from fedmed_flower.secure.member import Member
from fedmed_flower.secure.parts import LOSS, ONES
from fedmed_flower.secure.ring import FIXED, REAL, Layout, Part
from fedmed_flower.secure.shares import HospitalNoise, PatientNoise, Shares
from fedmed_flower.server.secure import SecureSums
from fedmed_flower.settings.privacy import PrivacySettings
from fedmed_flower.strategies import DPFedAvg, FedAdam, FedAvg, WeightedFedAvg

# One test in a million fails by chance.
CHANCE = 1e-6
PATIENTS = {"secure": "sum", "privacy": "patient", "local_steps": 1, "sampling_rate": 1.0}
# What is measured at the end has no part in this.
PATIENTS |= {"private_metrics": False}
# So little noise that the model is that of training without any.
LITTLE = {"target_epsilon": 1e8, "num_server_rounds": 1, "secure_exponent": -2}


def shared(folder, strategy=None, client=TinyClient, sites=5, **more):
    """Run an experiment of secure sums with shares of noise; return its strategy."""
    made = strategy or FedAvg(fraction_evaluate=0.0)
    run_tiny(folder, client, sites, strategy=made, **PATIENTS | more)
    return made


def ledger_of(folder, number=1):
    return Ledger(folder / "ledgers" / f"hospital-{number}.sqlite", read_only=True)


def failures(strategy):
    return [(f.round, f.site, f.reason) for f in strategy.history.failures]


def flat(arrays):
    return np.concatenate([a.numpy().astype(np.float64).ravel() for a in arrays.values()])


class Wide(TinyClient):
    """A network of 14,000 weights."""

    def build_model(self):
        return wide()


def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2000), nn.Linear(2000, 2))


@pytest.fixture
def opened(monkeypatch):
    """What is asked of the sums of a run in training, and what they gave."""
    kept, true = [], SecureSums.sum_each

    def sums_of(self, messages, records, *args, **kwargs):
        results = true(self, messages, records, *args, **kwargs)
        for record, result in zip(records, results, strict=True):
            if record.purpose == "train":
                kept.append((messages, record, result))
        return results

    monkeypatch.setattr(SecureSums, "sum_each", sums_of)
    return kept


# --- Patients -----------------------------------------------------------------------------------


def test_a_run_costs_its_target_by_the_noise_of_all_hospitals(tmp_path, opened):
    strategy = shared(tmp_path / "run", sampling_rate=0.5, target_epsilon=3.0)
    assert failures(strategy) == []
    names = {metric for _, phase, _, metric, _ in strategy.history.rows if phase == "train"}
    assert names - {"num-examples"} == {"patient-epsilon"}
    for number in range(1, 6):
        (entry,) = ledger_of(tmp_path / "run", number).entries()
        assert entry.purpose == "train, in sums of at least 4 hospitals"
        assert (entry.rounds, entry.unsettled, entry.patients) == (2, 0, 10)
        ((release, count),) = entry.releases.items()
        assert (release.sampling_rate, count) == (0.5, 2)
        assert 2.99 < epsilon_of(entry.releases, 1e-5) <= 3.0
        noise = release.noise_multiplier
    assert ledger_of(tmp_path / "run").has_trained(["'hospital-1-train-0'"])
    assert not ledger_of(tmp_path / "run").has_trained(["somebody"])
    assert strategy.result.train_metrics_clientapp[2]["patient-epsilon"] == epsilon_of(
        {Release(0.5, noise): 2}, 1e-5
    )
    report = (tmp_path / "run" / "report.html").read_text()
    assert "The noise is that of secure sums over several hospitals" in report
    for _, record, _ in opened:
        # Nobody counts rows, losses or what was cut.
        assert record.weighting == {"by": "uniform", "noise": noise}
        assert [part.name for part in record.layout.parts] == [
            "model/1.weight",
            "model/1.bias",
            "tail/ones",
        ]
        assert [part.kind for part in record.layout.parts] == ["fixed", "fixed", "count"]


def test_the_noise_of_the_mean_is_that_of_all_shares(tmp_path, opened):
    strategy = shared(
        tmp_path / "run", client=Wide, model=wide, target_epsilon=0.02, num_server_rounds=1,
        secure_exponent=2, learning_rate=0.5,
    )  # fmt: skip
    assert failures(strategy) == []
    ((messages, _, _),) = opened
    (entry,) = ledger_of(tmp_path / "run").entries()
    ((release, _),) = entry.releases.items()
    # rate * C / (B * n), of which 5 hospitals add shares for 3.
    std = 0.5 * 1.0 / (4 * 5) * release.noise_multiplier * math.sqrt(5 / 3)
    sent = flat(messages[0].content["arrays"])
    noise = (flat(strategy.result.arrays) - sent) / std
    # 50 patients, each of whom moves all weights together by at most one sensitivity.
    assert 50 / release.noise_multiplier < 0.5
    low, high = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], noise.size)
    assert low < (noise**2).sum() < high
    assert stats.kstest(noise, "norm").pvalue > CHANCE


def table(broken=False):
    """Return features and targets of five hospitals; of each, one patient's are no numbers."""
    rng = np.random.default_rng(5)
    sites = [(rng.normal(size=(9, 2)), rng.normal(size=9)) for _ in range(5)]
    if broken:
        for features, _ in sites:
            features[3, 0] = np.nan
    return [(x.astype(np.float32), y.astype(np.float32)) for x, y in sites]


class Table(Squares):
    sites = table()

    def made_up(self, count):
        return [{"x": np.array([1.0, n], np.float32), "y": n - 1} for n in range(count)]


def row_model():
    return nn.Linear(2, 1, bias=False)


class Broken(Table):
    sites = table(broken=True)


@pytest.mark.parametrize("client", [Table, Broken])
@pytest.mark.parametrize("norm", [0.3, 10.0])
def test_the_model_is_that_of_one_step_on_all_patients_together(tmp_path, opened, norm, client):
    strategy = FedAvg(fraction_evaluate=0.0)
    little = LITTLE | {"max_grad_norm": norm, "learning_rate": 0.05}
    shared(tmp_path / "run", strategy, client, model=row_model, **little)
    assert failures(strategy) == []
    ((messages, record, _),) = opened
    sent = flat(messages[0].content["arrays"])
    total = np.zeros(2)
    for features, targets in client.sites:
        for x, y in zip(features.astype(float), targets.astype(float), strict=True):
            gradient = (sent @ x - y) * x
            if np.isfinite(gradient).all():
                total += gradient * min(1.0, norm / np.linalg.norm(gradient))
    step = 0.05 * total / (4 * 5)
    sigma = record.layout.parts[0].sigma
    assert np.linalg.norm(step) > 100 * sigma
    # Beside the noise, float32 rounds gradients and weights.
    assert np.abs(flat(strategy.result.arrays) - (sent - step)).max() < 8 * sigma + 1e-6


def test_the_strategy_steps_what_the_sum_gives(tmp_path, opened):
    strategy = shared(tmp_path / "run", FedAdam(fraction_evaluate=0.0, eta=0.1), **LITTLE)
    assert failures(strategy) == []
    ((messages, _, _),) = opened
    moved = flat(strategy.result.arrays) - flat(messages[0].content["arrays"])
    assert 0.001 < np.abs(moved).max() < 0.2


def test_until_it_leaves_the_change_stands_beside_the_model_and_never_in_the_reply(
    tmp_path, monkeypatch
):
    seen, true = [], SecureReply.reply

    def reply(self, message, content):
        if message.metadata.message_type != "train":
            return true(self, message, content)
        (before,) = message.content.array_records.values()
        (after,) = content.array_records.values()
        sent = true(self, message, content)
        seen.append((bits(before) == bits(after), {*sent.keys()}))
        return sent

    monkeypatch.setattr(SecureReply, "reply", reply)
    shared(tmp_path / "run", **LITTLE)
    assert seen == [(True, {"masked", "secure"})] * 5


def test_several_steps_a_round_have_each_hospitals_own_noise(tmp_path, opened):
    strategy = shared(tmp_path / "run", local_steps=2, target_epsilon=5.0, secure_exponent=2)
    assert failures(strategy) == []
    (entry,) = ledger_of(tmp_path / "run").entries()
    assert entry.purpose == "train"
    assert entry.releases.total() == 4
    assert all("noise" not in record.weighting for _, record, _ in opened)
    # No loss leaves a private round, so none is shown.
    told = {metric for _, phase, _, metric, _ in strategy.history.rows if phase == "train"}
    assert told <= {"num-examples"}


class Failing(TinyClient):
    """Two hospitals fail as they begin to train."""

    def seed_transforms(self, prepared, seed):
        if self.site.index < 2:
            raise OSError("the disk is gone")


def test_a_round_that_is_lost_stays_charged(tmp_path):
    strategy = FedAvg(fraction_evaluate=0.0)
    with pytest.raises(RunFailedError):
        shared(tmp_path / "run", strategy, Failing, target_epsilon=3.0)
    assert "the secure sum is lost" in failures(strategy)[-1][2]
    entries = [ledger_of(tmp_path / "run", number).entries() for number in (1, 5)]
    assert [(entry.rounds, entry.unsettled) for (entry,) in entries] == [(2, 2), (2, 0)]


def keyed_nodes(folder, *names):
    """Return node configs of real hospitals that have pinned each other's keys."""
    nodes = nodes_of(folder, *names)
    lines = ["[study]", 'name = "icu"', "[study.members]"]
    for node, name in zip(nodes, names, strict=True):
        path = folder / f"{name}.key"
        lines.append(f'{name} = "{key_text(Identity.create(path, name).public)}"')
        node |= {"secure-key": str(path), "secure-peers": str(folder / "peers.toml")}
    (folder / "peers.toml").write_text("\n".join(lines) + "\n")
    return nodes


def test_after_the_charge_a_real_hospital_says_one_word(tmp_path, monkeypatch):
    true = Member.mask

    def mask(self, *args):
        if self.identity.name == "south":
            raise SecureError("the book of secure sums is damaged")
        return true(self, *args)

    monkeypatch.setattr(Member, "mask", mask)
    nodes = keyed_nodes(tmp_path, "north", "south", "east")
    strategy = FedAvg(fraction_evaluate=0.0)
    more = {"node_configs": nodes, "target_epsilon": 3.0, "num_server_rounds": 1}
    with pytest.raises(RunFailedError):
        shared(tmp_path / "run", strategy, sites=3, **more)
    assert (1, "south", "failed") in failures(strategy)
    ledger = Ledger(tmp_path / "node-1" / "privacy-ledger.sqlite", read_only=True)
    assert [entry.rounds for entry in ledger.entries()] == [1]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"sampling_rate": 0.0}, "sampling-rate must be above 0 with shares of noise"),
        ({"optimizer": "adam"}, "optimizer must be sgd with shares of noise"),
        ({"momentum": 0.5}, "momentum must be 0.0 with shares of noise"),
        ({"weight_decay": 0.5}, "weight-decay must be 0.0 with shares of noise"),
    ],
)
def test_the_server_refuses_what_hospitals_would_refuse(tmp_path, config, text):
    with pytest.raises(InputError, match=text):
        shared(tmp_path / "run", **config)


def test_weights_of_hospitals_that_shares_do_not_have_are_refused(tmp_path):
    with pytest.raises(InputError, match="local-steps must not be 1 with WeightedFedAvg"):
        shared(tmp_path / "run", WeightedFedAvg(weights="uniform"))


def test_noise_too_small_for_the_ring_is_refused_with_the_way_out(tmp_path):
    strategy = FedAvg(fraction_evaluate=0.0)
    config = {"max_grad_norm": 1e-6, "learning_rate": 1e-3, "secure_exponent": 10}
    with pytest.raises(RunFailedError):
        shared(tmp_path / "run", strategy, **config)
    assert "must be from 100 to below 2^40 steps of the ring" in failures(strategy)[0][2]
    assert "lower secure-exponent" in failures(strategy)[0][2]
    assert not (tmp_path / "run" / "ledgers" / "hospital-1.sqlite").exists()


# --- One patient more or less ---------------------------------------------------------------------


def step_of(rows, norm):
    """Return the change of the model by a step on all rows, as it enters the ring before noise."""
    privacy = PrivacySettings(privacy="patient", sampling_rate=1.0, max_grad_norm=norm)
    client = fixed(SiteData(train=rows), TinyClient)(
        context_of(privacy="patient", sampling_rate=1.0, max_grad_norm=norm, local_steps=1)
    )
    noise = PatientNoise(client.settings, privacy, 1.0)
    shares = Shares(1.0, noise.sensitivity(1, 5), 5, 4, 1)
    share = PatientShare(shares, noise, 1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = linear()
    images = torch.tensor(np.array([row["image"] for row in rows])).float()[:, None]
    labels = torch.tensor([row["label"] for row in rows])
    probe = {"image": torch.zeros(2, 1, 2, 2), "label": torch.tensor([0, 1])}
    sums, _ = sum_privately(
        model,
        lambda numbers: {"image": images[list(numbers)], "label": labels[list(numbers)]},
        [row["patient"] for row in rows],
        lambda m, batch: nn.functional.cross_entropy(m(batch["image"]), batch["label"]),
        Mechanism(Release(1.0, 1.0), 1, len(rows), privacy),
        probe,
    )
    share.take(model, sums)
    changes = share.changes(ArrayRecord(), ArrayRecord())
    cut = np.clip(np.concatenate(list(changes.values())), -(2.0**-4), 2.0**-4)
    return cut / 5, shares.sensitivity


def test_one_patient_changes_the_sum_without_noise_by_at_most_the_sensitivity():
    apart = []
    rng = np.random.default_rng(8)
    for case in range(40):
        norm = 10 ** rng.uniform(-4, 1)
        rows = make_rows(6, case)
        size = rng.choice([1e-3, 1.0, 1e6, 1e30])
        image = (rng.normal(size=(2, 2)) * size).astype(np.float32)
        if case % 8 == 0:
            image[0, 0] = rng.choice([np.nan, np.inf])
        one = {"image": image, "label": int(rng.integers(2)), "patient": "one more"}
        without, sensitivity = step_of(rows, norm)
        with_one, _ = step_of([*rows, one], norm)
        assert np.isfinite(with_one).all()
        apart.append(np.linalg.norm(with_one - without) / sensitivity)
        # Sums of many gradients are rounded in the last places of float64.
        assert apart[-1] <= 1 + 1e-9
    # Else nothing was clipped, and nothing tried.
    assert max(apart) > 0.999
    assert min(apart) == 0


def test_a_tensor_of_two_names_has_one_noise(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    client = TinyClient(context_of(privacy="patient", sampling_rate=1.0, local_steps=1))
    noise = PatientNoise(client.settings, client.privacy, 1.0)
    shares = Shares(1.0, noise.sensitivity(1, 5), 5, 4, 1)
    share = PatientShare(shares, noise, 1)
    share.take(model, {"0.weight": torch.ones(2, 2, dtype=torch.float64)})
    names = ("model/0.weight", "model/1.weight", "model/frozen")
    parts = [Part(name, 4, FIXED, 1.0, shares.total) for name in names]
    small, _ = share.words(Layout((*parts, ONES)), ArrayRecord(), ArrayRecord())
    steps = small.view(np.int32).reshape(3, 4).astype(np.int64)
    # Rounded each for itself.
    assert np.abs(steps[0] - steps[1]).max() <= 1
    assert np.abs(np.diff(steps[0])).min() > 1
    # No patient decides about an entry that is not trained, and it stays as it is.
    assert steps[2].tolist() == [0, 0, 0, 0]


def test_nothing_is_sent_if_nothing_was_summed_privately():
    client = TinyClient(context_of(privacy="patient", sampling_rate=1.0, local_steps=1))
    noise = PatientNoise(client.settings, client.privacy, 1.0)
    share = PatientShare(Shares(1.0, 1.0, 5, 4, 1), noise, 1)
    with pytest.raises(SecureError, match="the step was not made by private training"):
        share.words(Layout((ONES,)), ArrayRecord(), ArrayRecord())


# --- What a hospital refuses ----------------------------------------------------------------------


def asked(tmp_path, weighting, parts=None, sigma=None, study=None, **fields):
    """Return the share that a hospital of five gives to a record, or its refusal."""
    members = members_of(tmp_path, 5)
    record = record_of(members, weighting={"by": "uniform", "noise": 1.0} | weighting, **fields)
    config = {"privacy": "patient", "sampling_rate": 0.5, "local_steps": 1}
    client = TinyClient(context_of(**config))
    noise = PatientNoise(client.settings, client.privacy, 1.0)
    total = Shares.of(record, noise).total if sigma is None else sigma
    usual = [Part("model/1.weight", 8, FIXED, 0.5, total), ONES]
    fields = {**vars(record), "layout": Layout(tuple(parts or usual))}
    record = type(record)(**fields)
    content = RecordDict({"arrays": model_arrays(), "config": ConfigRecord({"server-round": 1})})
    message = Message(content, 1, "train")
    return share_of(client, message, record, study or members["h00"].study)


def test_a_hospital_works_out_its_share_itself(tmp_path):
    share = asked(tmp_path, {})
    assert isinstance(share, PatientShare)
    assert share.release == Release(0.5, 1.0)
    assert share.shares.share == pytest.approx(0.05 * 1.0 / (4 * 5) / math.sqrt(3))
    assert share.shares.counted == 3


@pytest.mark.parametrize(
    ("weighting", "more", "text"),
    [
        ({"by": "examples"}, {}, "in which all hospitals weigh the same"),
        ({}, {"purpose": "evaluate/val"}, "shares of noise are for training"),
        ({}, {"sigma": 1e-3}, "leaves room for noise of 0.001, and the shares of 5 hospitals make"),
        ({}, {"parts": [Part(LOSS, 1, REAL, 1.0)]}, "beside noise nothing may be summed but"),
        ({"noise": 0.0}, {}, "the noise multiplier must be a number above 0, got 0.0"),
        ({"noise": 2.0}, {}, "leaves room for noise of"),
        ({"norm": 0.0}, {}, "norm must be above 0 and finite, got 0.0"),
    ],
)
def test_a_record_that_would_weaken_the_noise_is_refused(tmp_path, weighting, more, text):
    with pytest.raises(SecureError, match=text):
        asked(tmp_path, weighting, **more)


def test_a_hospital_of_other_rules_refuses(tmp_path):
    other = members_of(tmp_path / "other", 5, colluders=2)["h00"].study
    with pytest.raises(SecureError) as error:
        asked(tmp_path, {}, study=other)
    assert str(error.value) == (
        "the noise counts on sums of at least 4 hospitals of which 1 may work with the server, and "
        "this hospital's study says 5 and 2: all members must set the same least and c"
    )


# --- Whole hospitals ------------------------------------------------------------------------------


def hidden(folder, client=TinyClient, secure=True, **options):
    """Run rounds that hide each hospital; return the strategy."""
    given = {"noise_multiplier": 1.0, "clipping_norm": 0.05, "population_size": 5}
    config = options.pop("config", {})
    strategy = DPFedAvg(**given | {"fraction_evaluate": 0.0, "secure": secure} | options)
    run_tiny(folder, client, 5, strategy=strategy, **{"num_server_rounds": 1} | config)
    return strategy


def test_hospitals_add_the_noise_that_the_server_then_need_not(tmp_path, opened):
    strategy = hidden(
        tmp_path / "run", Wide, noise_multiplier=300.0,
        config={"secure_exponent": 2, "model": wide},
    )  # fmt: skip
    assert failures(strategy) == []
    ((messages, record, _),) = opened
    assert record.weighting == {"by": "uniform", "noise": 300.0, "norm": 0.05}
    assert {part.kind for part in record.layout.parts} == {"fixed", "count"}
    std = 300.0 * 0.05 / 5 * math.sqrt(5 / 3)
    noise = (flat(strategy.result.arrays) - flat(messages[0].content["arrays"])) / std
    low, high = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], noise.size)
    assert low < (noise**2).sum() < high
    assert stats.kstest(noise, "norm").pvalue > CHANCE
    metrics = strategy.result.train_metrics_clientapp[1]
    assert metrics["hospital-epsilon"] == epsilon_of([Release(1.0, 300.0)], 1e-5)
    assert strategy.releases == {Release(1.0, 300.0): 1}
    written = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert written["releases"] == [[1.0, 300.0, 1]]


def test_each_hospital_clips_its_own_change(tmp_path, opened):
    config = {"learning_rate": 0.5, "seed": 4}
    little = {"noise_multiplier": 1e-4, "config": config}
    plain = hidden(tmp_path / "plain", secure=False, noise_multiplier=0.0, config=config)
    strategy = hidden(tmp_path / "run", **little)
    ((messages, record, _),) = opened
    sent = flat(messages[0].content["arrays"])
    moved = flat(strategy.result.arrays) - sent
    assert 0.01 < np.linalg.norm(moved) <= 0.05 + 1e-4
    sigma = record.layout.parts[0].sigma
    assert np.abs(flat(strategy.result.arrays) - flat(plain.result.arrays)).max() < 8 * sigma + 1e-6


def test_the_hospitals_ledger_has_the_hospital_as_a_whole(tmp_path):
    hidden(tmp_path / "run", config={"num_server_rounds": 2})
    (entry,) = ledger_of(tmp_path / "run").entries()
    assert entry.purpose == "all of the hospital, in sums of at least 4 hospitals"
    assert (entry.rounds, entry.unsettled, entry.patients) == (2, 0, 1)
    assert entry.releases == {Release(1.0, 1.0): 2}
    ledger = ledger_of(tmp_path / "run")
    assert ledger.released([WHOLE]) == entry.releases
    report = (tmp_path / "run" / "report.html").read_text()
    assert "by noise of which each added a share" in report
    assert "Noise that the hospitals added together hides" in report
    assert "the server added" not in report
    assert ledger.released([WHOLE[0], "'hospital-1-train-0'"]).total() == 0


def test_a_budget_of_the_hospital_bounds_what_is_told_of_all_of_it(tmp_path):
    context = context_of(
        run_dir=str(tmp_path),
        node_config={"partition-id": 0, "num-partitions": 5, "budget-epsilon": 6.0,
                     "budget-delta": 1e-5},
    )  # fmt: skip
    client = TinyClient(context)
    config = ConfigRecord({"server-round": 1, "run-key": "run"})
    noise = HospitalNoise(1.0, 0.5)
    share = HospitalShare(Shares(1.0, 0.1, 5, 4, 1), noise, client, config)
    with share.charged():
        pass
    refused = pytest.raises(DeclinedError, match="the hospital's privacy budget would be passed")
    with refused, share.charged():
        raise AssertionError("it is not run")


def test_patients_and_hospitals_are_hidden_side_by_side(tmp_path):
    config = {"privacy": "patient", "local_steps": 1, "target_epsilon": 5.0}
    config |= {"private_metrics": False}
    strategy = hidden(tmp_path / "run", config=config)
    assert failures(strategy) == []
    purposes = [entry.purpose for entry in ledger_of(tmp_path / "run").entries()]
    assert purposes == ["train", "all of the hospital, in sums of at least 4 hospitals"]


def test_a_lost_round_counts_as_released(tmp_path):
    strategy = DPFedAvg(
        noise_multiplier=1.0, clipping_norm=1.0, population_size=5, secure=True,
        fraction_evaluate=0.0,
    )  # fmt: skip
    with pytest.raises(RunFailedError):
        run_tiny(tmp_path / "run", Failing, 5, strategy=strategy, num_server_rounds=1)
    assert strategy.releases.total() == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_quantile": 0.5}, "target_quantile must be None: the norm stays, with secure"),
        ({"sampling_rate": 0.5}, "sampling_rate must be 1: the server would draw the hospitals"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be above 0, with secure, got 0.0"),
    ],
)
def test_what_hospitals_cannot_do_alone_is_refused(tmp_path, options, text):
    given = {"noise_multiplier": 1.0, "clipping_norm": 1.0, "population_size": 5}
    with pytest.raises(InputError, match=text):
        DPFedAvg(**given | options, secure=True)
    strategy = DPFedAvg(**given | options)
    with pytest.raises(InputError, match=text):
        run_tiny(tmp_path / "run", num_sites=5, strategy=strategy, secure="sum")


def test_shares_are_drawn_by_the_operating_system_and_never_twice(monkeypatch):
    made = []
    true = client_shares.secure_generator

    def generator():
        made.append(true())
        return made[-1]

    monkeypatch.setattr(client_shares, "secure_generator", generator)
    noise = HospitalNoise(1.0, 1.0)
    shares = Shares(1.0, 0.2, 5, 4, 1)
    share = HospitalShare(shares, noise, None, ConfigRecord())
    arrays = model_arrays()
    parts = [Part(f"model/{key}", a.numpy().size, FIXED, 1.0, shares.total)
             for key, a in arrays.items()]  # fmt: skip
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(share.words(Layout((*parts, ONES)), arrays, arrays)[0])
    assert len(made) == 2
    assert not (drawn[0] == drawn[1]).any()
