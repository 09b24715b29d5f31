"""Rounds by secure sums, in one process: the same model as without, and what happens to losses."""

from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
import torch
from flwr.app import Array
from key_files import make_hospitals, pin_another_key
from secure_runs import difference, failures, start_of, trained
from tiny import TinyClient, halves, nodes_of

from fedmed_flower import InputError
from fedmed_flower.data.site import SiteData
from fedmed_flower.errors import DeclinedError
from fedmed_flower.secure.audit import Chain, verify
from fedmed_flower.secure.trails import compare
from fedmed_flower.server.secure import SecureSums
from fedmed_flower.strategies import (
    FedAdam,
    FedAvg,
    FedProx,
    QFedAvg,
    WeightedFedAvg,
)

SUMS = {"secure": "sum"}
ROWS = (6, 11, 8, 14, 9)


class Unequal(TinyClient):
    """Hospitals of different sizes."""

    def load_data(self, site):
        data = super().load_data(site)
        return SiteData(train=data.train[: ROWS[site.index % 5]], val=data.val, source="tiny")


def seldom(*numbers):
    """Return a client that does something in these calls of a hospital's `fit`."""

    def choose(do):
        class Seldom(Unequal):
            calls: ClassVar[Counter] = Counter()

            def fit(self, model, prepared, seed):
                metrics = super().fit(model, prepared, seed)
                self.calls[self.site.name] += 1
                if self.calls[self.site.name] in numbers:
                    do(self, model)
                return metrics

        return Seldom

    return choose


class Normalised(Unequal):
    def build_model(self):
        return halves()


def uniform(**options):
    return WeightedFedAvg(weights="uniform", **options)


def adam(**options):
    return FedAdam(eta=0.1, **options)


def prox(**options):
    return FedProx(proximal_mu=0.5, **options)


@pytest.mark.parametrize("make", [FedAvg, uniform, adam, prox], ids=lambda make: make.__name__)
def test_the_model_is_that_of_plain_rounds(tmp_path, make):
    plain = trained(make, Unequal, tmp_path / "plain")
    secure = trained(lambda **o: make(**o, **SUMS), Unequal, tmp_path / "secure")
    assert failures(secure) == []
    assert difference(plain.result.arrays, start_of(Unequal)) > 1e-3
    assert difference(plain.result.arrays, secure.result.arrays) < 3e-7
    losses = [
        [strategy.result.train_metrics_clientapp[number]["loss"] for number in (1, 2)]
        for strategy in (plain, secure)
    ]
    if make is not uniform:
        # Elsewhere the loss is weighted by rows whatever the model is weighted by.
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_buffers_are_averaged_and_whole_numbers_stay(tmp_path):
    plain = trained(FedAvg, Normalised, tmp_path / "plain", rounds=1)
    secure = trained(
        lambda **o: FedAvg(secure_exponent=0, **o, **SUMS),
        Normalised,
        tmp_path / "secure",
        rounds=1,
    )
    whole = "stem.2.num_batches_tracked"
    sums = {key: array for key, array in secure.result.arrays.items() if key != whole}
    assert difference(sums, plain.result.arrays) < 1e-6
    assert secure.result.arrays[whole].numpy() == start_of(Normalised)[whole].numpy()


def test_the_mean_change_is_exact_beyond_float32(tmp_path, monkeypatch):
    kept = {}

    class Noting(FedAvg):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            kept[self.secure] = [reply.content["arrays"] for reply in replies]
            kept["weights"] = kept.get("weights") or [
                reply.content["metrics"]["num-examples"] for reply in replies
            ]
            return super().aggregate_train(server_round, replies)

    trained(Noting, Unequal, tmp_path / "plain", rounds=1)
    opened = []
    original = SecureSums.sum_each

    def noting(self, *args, **kwargs):
        opened.extend(outcomes := original(self, *args, **kwargs))
        return outcomes

    monkeypatch.setattr(SecureSums, "sum_each", noting)
    trained(lambda **o: FedAvg(**o, **SUMS), Unequal, tmp_path / "secure", rounds=1)
    sent = start_of(Unequal)
    weights = np.array(kept["weights"]) / sum(kept["weights"])
    for key in sent:
        changes = [
            each[key].numpy().astype(np.float64) - sent[key].numpy() for each in kept["none"]
        ]
        mean = sum(w * change for w, change in zip(weights, changes, strict=True))
        assert np.abs(changes[0]).max() > 1e-4
        assert np.abs(opened[-1].values[f"model/{key}"] - mean.ravel()).max() < 2e-8


def test_a_hospital_that_fails_is_left_out_and_named(tmp_path):
    @seldom(2)
    def failing(client, model):
        if client.site.name == "hospital-2":
            raise OSError("the disk is gone")

    strategy = trained(lambda **o: FedAvg(**o, **SUMS), failing, tmp_path / "run")
    assert failures(strategy) == [(2, "train", "hospital-2", "OSError: the disk is gone")]
    (note,) = strategy.history.notes
    assert note.text == ("the sum is without hospital-2; the others count the same in its place")
    assert set(strategy.result.train_metrics_clientapp) == {1, 2}
    assert {row[2] for row in strategy.history.rows} == {"all"}
    sums = [(each.round, each.purpose, len(each.sites)) for each in strategy.history.sums]
    assert sums == [(0, "count", 5), (1, "train", 5), (2, "train", 4)]


class Equal(TinyClient):
    """Hospitals of the same size."""


def test_a_sample_of_the_hospitals_makes_a_whole_mean(tmp_path):
    def some(**options):
        strategy = uniform(fraction_train=0.8, **options)
        # Sites are drawn by name, as far as names are known.
        strategy.site_names = {1000 + number: f"hospital-{number}" for number in range(1, 6)}
        return strategy

    plain = trained(some, Unequal, tmp_path / "plain", rounds=3)
    secure = trained(lambda **o: some(**o, **SUMS), Unequal, tmp_path / "secure", rounds=3)
    assert failures(secure) == []
    sampled = [each.sites for each in secure.history.sums if each.purpose == "train"]
    assert {len(sites) for sites in sampled} == {4}
    assert len({*sampled}) > 1
    assert difference(plain.result.arrays, start_of(Unequal)) > 1e-3
    assert difference(plain.result.arrays, secure.result.arrays) < 3e-7


def away(make, *rounds):
    """Return what makes a strategy that asks hospital-1 for nothing in some rounds."""

    def made(**options):
        strategy = make(**options)

        def choose(server_round):
            strategy.excluded = {1001} if server_round in rounds else ()

        strategy.before_round = choose
        return strategy

    return made


@pytest.mark.parametrize("make", [FedAvg, uniform], ids=lambda make: make.__name__)
def test_a_round_that_does_not_ask_a_hospital_is_a_whole_mean_of_the_others(tmp_path, make):
    plain = trained(away(make, 2), Equal, tmp_path / "plain", rounds=3)
    secure = trained(away(lambda **o: make(**o, **SUMS), 2), Equal, tmp_path / "run", rounds=3)
    assert failures(secure) == []
    sums = [len(each.sites) for each in secure.history.sums if each.purpose == "train"]
    assert sums == [5, 4, 5]
    assert difference(plain.result.arrays, secure.result.arrays) < 3e-7
    losses = [
        [strategy.result.train_metrics_clientapp[number]["loss"] for number in (1, 2, 3)]
        for strategy in (plain, secure)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    notes = [note.text for note in secure.history.notes]
    text = "the sum is without hospital-1; the others count the same in its place"
    assert notes == ([text] if make is FedAvg else [])


def test_a_hospital_whose_rows_were_not_counted_is_left_out(tmp_path):
    plain = trained(away(FedAvg, 1, 2, 3), Unequal, tmp_path / "plain", rounds=3)
    late = trained(away(lambda **o: FedAvg(**o, **SUMS), 1), Unequal, tmp_path / "late", rounds=3)
    assert difference(plain.result.arrays, late.result.arrays) < 3e-7
    text = "it is left out: its rows were not counted; `fedmed keys regroup`, then a new run"
    notes = [(note.round, note.site, note.text) for note in late.history.notes]
    assert notes == [(2, "hospital-1", text), (3, "hospital-1", text)]


def test_a_run_that_is_stopped_and_resumed_ends_at_the_same_model(tmp_path):
    def make(**options):
        return FedAvg(resume=True, **options, **SUMS)

    whole = trained(lambda **o: FedAvg(**o, **SUMS), Unequal, tmp_path / "whole", rounds=4)
    trained(make, Unequal, tmp_path / "parts", rounds=2)
    resumed = trained(make, Unequal, tmp_path / "parts", rounds=4)
    assert failures(resumed) == []
    assert difference(whole.result.arrays, start_of(Unequal)) > 1e-3
    assert difference(whole.result.arrays, resumed.result.arrays) < 1e-6


def test_a_round_with_too_many_losses_leaves_the_model(tmp_path):
    @seldom(2)
    def failing(client, model):
        if client.site.index < 2:
            raise DeclinedError("not today")

    strategy = trained(lambda **o: FedAvg(**o, **SUMS), failing, tmp_path / "run")
    once = trained(lambda **o: FedAvg(**o, **SUMS), Unequal, tmp_path / "once", rounds=1)
    assert difference(strategy.result.arrays, once.result.arrays) < 1e-6
    assert failures(strategy)[-1] == (
        2,
        "train",
        "all",
        "the secure sum is lost: a sum must be over at least 4 hospitals, and this one is over 3 "
        "(hospital-3, hospital-4, hospital-5)",
    )


def test_two_hospitals_are_too_few(tmp_path):
    strategy = trained(lambda **o: FedAvg(**o, **SUMS), Unequal, tmp_path / "run", sites=2)
    assert strategy.result.train_metrics_clientapp == {}
    reasons = [reason for *_, reason in failures(strategy)]
    assert any("a study must have from 3 to 255 members, got 2" in reason for reason in reasons)


def test_large_changes_are_cut_and_told(tmp_path):
    def make(**options):
        return FedAvg(secure_exponent=-12, **options, **SUMS)

    strategy = trained(make, Unequal, tmp_path / "run", rounds=1)
    moved = difference(strategy.result.arrays, start_of(Unequal))
    assert 0 < moved <= 2.0**-12
    (note,) = strategy.history.notes
    assert "changes of weights were cut to 0.000244141 or were no numbers" in note.text


def test_a_hospital_whose_model_is_no_number_adds_nothing(tmp_path):
    @seldom(1)
    def broken(client, model):
        if client.site.index == 0:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))

    strategy = trained(lambda **o: FedAvg(**o, **SUMS), broken, tmp_path / "run", rounds=1)
    assert all(np.isfinite(array.numpy()).all() for array in strategy.result.arrays.values())
    assert "8 changes of weights were cut" in strategy.history.notes[0].text


def test_a_strict_run_goes_on_without_a_hospital_that_would_cut_its_change(tmp_path):
    @seldom(1)
    def broken(client, model):
        if client.site.index == 0:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))

    strategy = trained(
        lambda **o: FedAvg(**o, **SUMS),
        broken,
        tmp_path / "run",
        rounds=1,
        **{"secure-strict": True},
    )
    (failure,) = failures(strategy)
    assert failure == (1, "train", "hospital-1", "declined: out of bounds")
    assert [len(one.sites) for one in strategy.history.sums] == [5, 4]
    assert not any("were cut" in note.text for note in strategy.history.notes)


def test_a_mean_that_is_far_too_long_is_not_used(tmp_path):
    @seldom(3)
    def growing(client, model):
        with torch.no_grad():
            next(model.parameters()).add_(1.0)

    def make(**options):
        return FedAvg(secure_exponent=1, **options, **SUMS)

    strategy = trained(make, growing, tmp_path / "run", rounds=3)
    assert set(strategy.result.train_metrics_clientapp) == {1, 2}
    assert "more than 4 times the median of the last rounds" in failures(strategy)[-1][3]


def another_model(message, context, call):
    """Tell hospital-4 a model that differs in one bit."""
    if message.metadata.message_type == "train" and context.node_config["partition-id"] == 3:
        record = message.content["arrays"]
        key = next(iter(record))
        values = record[key].numpy().copy()
        values.view(np.uint8).ravel()[0] ^= 1
        record[key] = Array(values)
    return call(message, context)


def test_a_hospital_that_is_told_another_model_is_named_and_nothing_opens(tmp_path):
    strategy = trained(
        lambda **o: FedAvg(**o, **SUMS), Unequal, tmp_path / "run", 4, 1, [another_model]
    )
    assert strategy.result.train_metrics_clientapp == {}
    assert [(site, reason) for _, _, site, reason in failures(strategy)] == [
        (
            "hospital-4",
            "it was told something else than the others, or has another version of the app",
        ),
        (
            "all",
            "the secure sum is lost: a sum must be over at least 4 hospitals, and this one is "
            "over 3 (hospital-1, hospital-2, hospital-3)",
        ),
    ]


def test_real_hospitals_need_keys_and_keep_a_book(tmp_path):
    names = ["north", "south", "east"]
    nodes = [*make_hospitals(tmp_path, names).values()]
    strategy = trained(
        lambda **o: FedAvg(**o, **SUMS), TinyClient, tmp_path / "run", 3, 1, nodes=nodes
    )
    assert failures(strategy) == []
    assert {each.sites for each in strategy.history.sums} == {("east", "north", "south")}
    books = list(tmp_path.glob("data/*/*.secure"))
    assert len(books) == 3
    assert all(book.stat().st_mode & 0o077 == 0 for book in books)


def trails_of(folder):
    """Return the audit trails of a run in one process, by name."""
    trails = {"the server": Chain.read(folder / "audit.jsonl")}
    for path in sorted((folder / "secure").glob("*.audit")):
        trails[path.stem] = Chain.read(path)
    return trails


def test_the_trails_of_an_honest_run_say_the_same(tmp_path):
    @seldom(2)
    def failing(client, model):
        if client.site.name == "hospital-2":
            raise OSError("the disk is gone")

    trained(lambda **o: FedAvg(**o, **SUMS), failing, tmp_path / "run", rounds=3)
    trails = trails_of(tmp_path / "run")
    assert len(trails) == 6
    for entries in trails.values():
        verify(entries)
    assert compare(trails) == []


def test_the_trails_show_that_one_hospital_was_told_another_model(tmp_path):
    strategy = trained(
        lambda **o: FedAvg(**o, **SUMS), Unequal, tmp_path / "run", 5, 1, [another_model]
    )
    assert [site for _, _, site, _ in failures(strategy)] == ["hospital-4"]
    said = compare(trails_of(tmp_path / "run"))
    text = (
        "hospital-1, hospital-2, hospital-3 and hospital-5 were told another model than hospital-4"
    )
    assert said[0].startswith(f"{text} in round 1 of run ")
    assert said[0].endswith(": the server swapped one of them")


def test_a_hospital_with_another_key_for_a_peer_refuses_and_says_whose(tmp_path):
    names = ["north", "south", "east"]
    nodes = [*make_hospitals(tmp_path, names).values()]
    pin_another_key(tmp_path, "east", "south")
    strategy = trained(
        lambda **o: FedAvg(**o, **SUMS), TinyClient, tmp_path / "run", 3, 1, nodes=nodes
    )
    assert strategy.result.train_metrics_clientapp == {}
    reasons = {site: reason for _, _, site, reason in failures(strategy)}
    assert "the key of east is not the one that is pinned" in reasons["south"]
    assert "the secure sum is lost" in reasons["all"]


def test_a_hospital_without_keys_says_which_setting_it_needs(tmp_path, caplog):
    nodes = nodes_of(tmp_path, "north", "south", "east")
    strategy = trained(
        lambda **o: FedAvg(**o, **SUMS), TinyClient, tmp_path / "run", 3, 1, nodes=nodes
    )
    assert strategy.result.train_metrics_clientapp == {}
    assert "north: a secure sum needs secure-peers in the hospital's node config" in caplog.text
    assert failures(strategy)[-1][3] == "the secure sum is lost: no hospital has said hello"


def test_a_hospital_may_answer_in_secure_sums_alone(tmp_path):
    nodes = nodes_of(tmp_path, "north", "south", "east", secure_only="train, evaluate")
    strategy = trained(FedAvg, TinyClient, tmp_path / "run", 3, 1, nodes=nodes)
    assert {reason for _, _, site, reason in failures(strategy) if site != "all"} == {
        "declined: train would tell this hospital's own figures, which leave in secure sums alone: "
        'ask for it by secure="sum" in the run config'
    }


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda **o: QFedAvg(client_learning_rate=0.1, **o),
            "excludes QFedAvg, whose rule needs single replies: take FedAvg, FedProx, ",
        ),
        (lambda **o: WeightedFedAvg(weights="inverse-loss", **o), "excludes WeightedFedAvg"),
        (lambda **o: FedAvg(fraction_train=0.8, **o), "excludes fraction_train: weights by rows"),
        (lambda **o: FedAvg(max_weight_share=0.5, **o), "excludes max_weight_share: the server"),
        (lambda **o: FedAvg(max_update_norm=2.0, **o), "excludes max_update_norm: the server"),
        (lambda **o: FedAvg(compression="int8", **o), "excludes compression: the vectors of a sum"),
        (lambda **o: FedAvg(buffer=2, **o), "excludes buffer: a sum needs the hospitals of one"),
        (lambda **o: FedAvg(method="scaffold", **o), "excludes the method scaffold, which needs"),
    ],
)
def test_what_needs_single_replies_is_refused_by_name(tmp_path, make, text):
    with pytest.raises(InputError) as error:
        trained(lambda **o: make(**o, **SUMS), Unequal, tmp_path / "run")
    assert text in str(error.value)
    assert str(error.value).startswith('secure="sum" ')


def test_wrong_arguments_are_refused():
    with pytest.raises(InputError, match="secure must be 'none' or 'sum', got 'yes'"):
        FedAvg(secure="yes")
    with pytest.raises(InputError, match="secure_exponent must be from -40 to 10, got 11"):
        FedAvg(secure_exponent=11)
