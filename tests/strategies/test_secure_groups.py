"""Rounds over the groups of a study: rules that compare replies get the groups' means."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array
from key_files import make_hospitals
from secure_runs import difference, failures, start_of, trained
from tiny import TinyClient, make_rows, run_tiny

from fedmed_flower import InputError
from fedmed_flower.arrays.views import view
from fedmed_flower.data.site import SiteData
from fedmed_flower.secure.audit import Chain
from fedmed_flower.secure.study import Peers
from fedmed_flower.secure.trails import compare
from fedmed_flower.strategies import (
    Bulyan,
    CenteredClipping,
    DPFedAvg,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    GeometricMedian,
    Krum,
    MultiKrum,
    WeightedFedAvg,
)

NAMES = ["ash", "bay", "cay", "dell", "elm", "fen", "gap", "hill", "isle"]
GROUPS = (tuple(NAMES[:3]), tuple(NAMES[3:6]), tuple(NAMES[6:]))
TEN = [*NAMES, "june"]
SLOW = pytest.mark.slow


def client_of(do=None):
    """Return a client whose hospitals differ in size, and that keeps what each has trained.

    `do` is called with hospital, number of the training and model after each training.
    """

    class Keeping(TinyClient):
        kept = {}  # noqa: RUF012

        def load_data(self, site):
            number = TEN.index(site.name)
            return SiteData(
                train=make_rows(10 + 2 * number, (number, 0), f"{site.name}-train"),
                val=make_rows(12, (number, 1), f"{site.name}-val"),
                test=make_rows(12, (number, 2), f"{site.name}-test"),
                source="tiny images",
            )

        def fit(self, model, prepared, seed):
            metrics = super().fit(model, prepared, seed)
            kept = self.kept.setdefault(self.site.name, [])
            if do is not None:
                do(self.site.name, len(kept) + 1, model)
            state = {key: each.double().numpy() for key, each in model.state_dict().items()}
            kept.append((state, len(self.data().train)))
            return metrics

    return Keeping


def run(make, client, folder, rounds=1, groups=GROUPS, nodes=None, mods=()):
    """Train at hospitals with keys and groups; return the strategy."""
    if nodes is None:
        names = [name for group in groups for name in group]
        nodes = [*make_hospitals(folder, names, colluders=0, groups=groups).values()]
    return trained(
        lambda **options: make(secure="sum", **options),
        client,
        folder / "run",
        len(nodes),
        rounds,
        mods,
        nodes,
    )


def mean_of(models):
    """Return the mean of models, each with its weight."""
    total = sum(weight for _, weight in models)
    return {
        key: sum(model[key] * (weight / total) for model, weight in models) for key in models[0][0]
    }


def means_of(client, groups=GROUPS, number=0):
    """Return the mean of each group, of what its hospitals have trained, in float64."""
    return [mean_of([client.kept[name][number] for name in group]) for group in groups]


def distance(arrays, model):
    return max(float(np.abs(view(arrays[key]) - model[key]).max()) for key in arrays)


def sums_of(strategy, purpose="train"):
    return [(s.round, s.sites) for s in strategy.history.sums if s.purpose == purpose]


def test_the_median_is_that_of_the_groups_means(tmp_path):
    client = client_of()
    strategy = run(FedMedian, client, tmp_path)
    assert failures(strategy) == []
    means = means_of(client)
    median = {key: np.median([mean[key] for mean in means], axis=0) for key in means[0]}
    assert distance(strategy.result.arrays, median) < 1e-7
    assert min(distance(strategy.result.arrays, mean) for mean in means) > 1e-4
    assert sums_of(strategy, "count") == [(0, tuple(NAMES))]
    assert sums_of(strategy) == [(1, group) for group in GROUPS]
    # No group stands as a site of its own in any table.
    assert {site for _, _, site, *_ in strategy.history.rows} == {"all"}
    rows = {name: 10 + 2 * number for number, name in enumerate(NAMES)}
    assert strategy.run.secure.totals == {
        name: sum(rows[each] for each in group) for name, group in zip("ABC", GROUPS, strict=True)
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: FedTrimmedAvg(beta=0.4, num_malicious_nodes=1, **o),
        Krum,
        Bulyan,
        pytest.param(lambda **o: GeometricMedian(num_malicious_nodes=1, **o), marks=SLOW),
        pytest.param(lambda **o: CenteredClipping(num_malicious_nodes=1, **o), marks=SLOW),
        pytest.param(lambda **o: MultiKrum(num_nodes_to_select=2, **o), marks=SLOW),
    ],
    ids=["trimmed", "krum", "bulyan", "geometric", "clipping", "multikrum"],
)
def test_every_robust_rule_takes_the_groups_means(tmp_path, make):
    client = client_of()
    strategy = run(make, client, tmp_path)
    assert failures(strategy) == []
    means = means_of(client)
    low = {key: np.min([mean[key] for mean in means], axis=0) - 1e-6 for key in means[0]}
    high = {key: np.max([mean[key] for mean in means], axis=0) + 1e-6 for key in means[0]}
    for key, array in strategy.result.arrays.items():
        assert (low[key] <= view(array)).all()
        assert (view(array) <= high[key]).all()
    assert difference(strategy.result.arrays, start_of(client)) > 1e-4


def test_one_hostile_group_does_not_move_the_median_beyond_the_honest_ones(tmp_path):
    def lie(name, number, model):
        if name == "elm":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.24)

    client = client_of(lie)
    strategy = run(lambda **o: FedMedian(num_malicious_nodes=1, **o), client, tmp_path)
    assert failures(strategy) == []
    ash, dell, gap = means_of(client)
    for key, array in strategy.result.arrays.items():
        honest = np.stack([ash[key], gap[key]])
        assert (dell[key] > honest.max(axis=0) + 0.02).all()
        assert (view(array) >= honest.min(axis=0) - 1e-6).all()
        assert (view(array) <= honest.max(axis=0) + 1e-6).all()


def spoil(message, context, call):
    """Let one hospital send other words than its own, which a mean of honest ones cannot be."""
    reply = call(message, context)
    if message.metadata.message_type == "train" and context.node_config["site-name"] == "elm":
        words = view(reply.content["masked"]["words32"]).copy()
        words[:4] += np.uint32(1 << 31)
        reply.content["masked"]["words32"] = Array(words)
    return reply


def test_a_group_that_is_spoilt_counts_as_one_of_the_malicious(tmp_path):
    client = client_of()
    strategy = run(
        lambda **o: FedMedian(num_malicious_nodes=1, **o), client, tmp_path, mods=[spoil]
    )
    ((number, phase, site, reason),) = failures(strategy)
    assert (number, phase, site) == (1, "train", "group B")
    assert "the secure sum is lost: one of the hospitals has sent what cannot be" in reason
    ash, _, gap = means_of(client)
    middle = {key: (ash[key] + gap[key]) / 2 for key in ash}
    assert distance(strategy.result.arrays, middle) < 1e-7


class Once:
    """Fails at hospitals in one of their trainings, and not when they are asked again."""

    def __init__(self, number, *names):
        self.number = number
        self.names = names
        self.failed = set()

    def __call__(self, name, number, model):
        if name in self.names and number == self.number and name not in self.failed:
            self.failed.add(name)
            raise OSError("the disk is gone")


def test_a_group_that_loses_too_many_is_named_and_the_others_go_on(tmp_path):
    client = client_of(Once(1, "hill"))
    strategy = run(FedMedian, client, tmp_path)
    assert failures(strategy) == [
        (1, "train", "hill", "OSError"),
        (
            1,
            "train",
            "group C",
            "the secure sum is lost: a sum must be over at least 3 hospitals, and this one is "
            "over 2 (gap, isle)",
        ),
    ]
    ash, dell = means_of(client, GROUPS[:2])
    middle = {key: (ash[key] + dell[key]) / 2 for key in ash}
    assert distance(strategy.result.arrays, middle) < 1e-7
    assert sums_of(strategy) == [(1, GROUPS[0]), (1, GROUPS[1])]


def test_a_round_with_too_few_groups_leaves_the_model_and_can_be_done_again(tmp_path):
    client = client_of(Once(2, "hill"))
    strategy = run(lambda **o: FedMedian(num_malicious_nodes=1, **o), client, tmp_path, rounds=3)
    assert set(strategy.result.train_metrics_clientapp) == {1, 3}
    assert failures(strategy)[-1] == (
        2,
        "train",
        "all",
        "2 usable replies, 3 needed: the model stays as it was",
    )
    # Two groups have answered for the model of round 2, and do so again over the same hospitals.
    rounds = {number: [s for n, s in sums_of(strategy) if n == number] for number in (1, 2, 3)}
    assert rounds == {1: [*GROUPS], 2: [*GROUPS[:2]], 3: [*GROUPS]}


def test_a_loss_within_what_a_group_tolerates_is_noted(tmp_path):
    groups = (tuple(TEN[:5]), tuple(TEN[5:]))
    client = client_of(Once(1, "bay"))
    strategy = run(FedAvg, client, tmp_path, groups=groups)
    assert failures(strategy) == [(1, "train", "bay", "OSError")]
    (note,) = strategy.history.notes
    assert (note.site, note.text) == (
        "group A",
        "the sum is without bay; the others count the same in its place",
    )
    assert sums_of(strategy) == [(1, ("ash", "cay", "dell", "elm")), (1, groups[1])]


def test_the_mean_over_groups_is_that_of_all_hospitals(tmp_path):
    client = client_of()
    strategy = run(FedAvg, client, tmp_path)
    assert failures(strategy) == []
    every = mean_of([client.kept[name][0] for name in NAMES])
    assert distance(strategy.result.arrays, every) < 1e-7


def test_uniform_weights_count_hospitals_and_not_groups(tmp_path):
    groups = (tuple(NAMES[:3]), tuple(NAMES[3:]))
    client = client_of()
    strategy = run(lambda **o: WeightedFedAvg(weights="uniform", **o), client, tmp_path, 1, groups)
    assert failures(strategy) == []
    every = mean_of([(client.kept[name][0][0], 1) for name in NAMES])
    assert distance(strategy.result.arrays, every) < 1e-7
    assert sums_of(strategy, "count") == []


def test_hospitals_add_noise_within_their_groups(tmp_path):
    def make(**options):
        return DPFedAvg(noise_multiplier=1e-4, clipping_norm=1.0, population_size=9, **options)

    client = client_of()
    strategy = run(make, client, tmp_path)
    assert failures(strategy) == []
    assert sums_of(strategy) == [(1, group) for group in GROUPS]
    every = mean_of([(client.kept[name][0][0], 1) for name in NAMES])
    assert 1e-7 < distance(strategy.result.arrays, every) < 1e-3


def test_a_rule_needs_a_study_with_groups(tmp_path):
    nodes = [*make_hospitals(tmp_path, NAMES, colluders=0).values()]
    with pytest.raises(InputError) as error:
        run(FedMedian, client_of(), tmp_path, nodes=nodes)
    assert str(error.value).startswith(
        'secure="sum" with FedMedian, whose rule compares replies, needs a study with groups: at '
        "least 3 of least + c = 3 + 0 members each, which is 9 hospitals; this study has no "
        "groups. Each member writes them into its own file (fedmed keys regroup; in a "
        "simulation set secure-groups), or take FedAvg"
    )


def test_a_rule_needs_as_many_groups_as_it_would_need_hospitals(tmp_path):
    with pytest.raises(InputError, match="which is 15 hospitals; this study has 3 groups"):
        run(lambda **o: Krum(num_malicious_nodes=1, **o), client_of(), tmp_path)


def test_a_rule_of_ones_own_needs_groups_too(tmp_path):
    class Ours(FedAvg):
        def combine(self, updates, weights):
            return super().combine(updates, weights)

    nodes = [*make_hospitals(tmp_path, NAMES[:3]).values()]
    with pytest.raises(InputError, match="with Ours, whose rule compares replies, needs a study"):
        run(Ours, client_of(), tmp_path, nodes=nodes)


def simulated(folder, groups, sites=12):
    return trained(
        lambda **options: FedMedian(num_malicious_nodes=1, secure="sum", **options),
        TinyClient,
        folder,
        sites,
        1,
        **{"secure-groups": groups},
    )


def test_a_simulation_parts_its_hospitals_by_a_setting(tmp_path):
    strategy = simulated(tmp_path, 3)
    assert failures(strategy) == []
    names = sorted(f"hospital-{number}" for number in range(1, 13))
    assert sums_of(strategy) == [(1, tuple(names[first::3])) for first in range(3)]


def test_a_simulation_of_too_few_hospitals_says_how_many_groups_need(tmp_path):
    reasons = {reason for _, _, _, reason in failures(simulated(tmp_path, 3, 9))}
    assert any("got 3: hospital-1, hospital-4, hospital-7; 3 groups need 12" in r for r in reasons)


def test_a_hospital_with_other_groups_is_named_by_the_others(tmp_path):
    nodes = make_hospitals(tmp_path, NAMES, colluders=0, groups=GROUPS)
    path = Path(nodes["bay"]["secure-peers"])
    groups = (("ash", "bay", "isle"), *GROUPS[1:2], ("cay", "gap", "hill"))
    Peers("trial", Peers.load(path).members, colluders=0, groups=groups).save(path)
    strategy = run(FedMedian, client_of(), tmp_path, nodes=[*nodes.values()])
    assert strategy.result.train_metrics_clientapp == {}
    said = {site: reason for _, _, site, reason in failures(strategy)}
    text = "the study of bay has other groups than that of ash: compare the fingerprints"
    assert all(text in said[name] for name in NAMES)


def test_a_group_of_which_too_few_are_there_takes_no_part(tmp_path):
    nodes = make_hospitals(tmp_path, NAMES, colluders=0, groups=GROUPS)
    client = client_of()
    strategy = run(
        FedMedian, client, tmp_path, nodes=[nodes[name] for name in NAMES if name != "isle"]
    )
    assert failures(strategy) == []
    assert sums_of(strategy, "count") == [(0, tuple(NAMES[:6]))]
    assert sums_of(strategy) == [(1, GROUPS[0]), (1, GROUPS[1])]
    assert {note.site for note in strategy.history.notes} == {"gap", "hill"}


def test_if_of_no_group_enough_are_there_nothing_is_asked(tmp_path):
    nodes = make_hospitals(tmp_path, NAMES, colluders=0, groups=GROUPS)
    strategy = run(
        FedAvg, client_of(), tmp_path, nodes=[nodes[name] for group in GROUPS for name in group[:2]]
    )
    assert strategy.history.sums == []
    assert failures(strategy) == [
        (
            1,
            "train",
            "all",
            "the secure sum is lost: of no group are there as many hospitals as a sum needs",
        )
    ]


def test_a_group_that_loses_a_hospital_while_rows_are_counted_is_left_out(tmp_path):
    def lose(message, context, call):
        counting = message.metadata.message_type == "query.count"
        if counting and context.node_config["site-name"] == "dell":
            raise OSError("the disk is gone")
        return call(message, context)

    strategy = run(FedMedian, client_of(), tmp_path, mods=[lose])
    assert [failure[1:3] for failure in failures(strategy)] == [
        ("count", "dell"),
        ("count", "group B"),
    ]
    assert sums_of(strategy, "count") == [(0, GROUPS[0] + GROUPS[2])]
    assert sums_of(strategy) == [(1, GROUPS[0]), (1, GROUPS[2])]


def test_a_run_over_groups_that_is_stopped_and_resumed_ends_at_the_same_model(tmp_path):
    # In a simulation, since real hospitals draw by keys of their own.
    def go(folder, rounds, **more):
        def make(**options):
            return FedMedian(secure="sum", num_malicious_nodes=1, **more, **options)

        return trained(make, TinyClient, folder, 12, rounds, **{"secure-groups": 3})

    whole = go(tmp_path / "whole", 3)
    go(tmp_path / "parts", 1, resume=True)
    resumed = go(tmp_path / "parts", 3, resume=True)
    assert failures(resumed) == []
    assert difference(whole.result.arrays, start_of(TinyClient)) > 1e-3
    assert difference(whole.result.arrays, resumed.result.arrays) < 1e-6
    assert [number for number, _ in sums_of(resumed)] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_whole_run_evaluates_over_all_hospitals(tmp_path):
    nodes = [*make_hospitals(tmp_path, NAMES, colluders=0, groups=GROUPS).values()]
    strategy = FedMedian(num_malicious_nodes=1)
    run_tiny(
        tmp_path / "run", client_of(), 9, node_configs=nodes, strategy=strategy, secure="sum",
        num_server_rounds=2,
    )  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["failures"] == []
    assert summary["test"]["federated"]["num-examples"] == 9 * 12
    by_purpose = {}
    for _, purpose, members in summary["secure"]["sums"]:
        by_purpose.setdefault(purpose, []).append(tuple(members))
    assert by_purpose == {
        "count": [tuple(NAMES)],
        "train": [*GROUPS, *GROUPS],
        "evaluate/val": [tuple(NAMES)] * 2,
        "evaluate/test": [tuple(NAMES)],
    }
    trails = {"the server": Chain.read(tmp_path / "run" / "audit.jsonl")}
    for path in tmp_path.glob("data/*/*.audit"):
        trails[path.parent.name] = Chain.read(path)
    assert len(trails) == 10
    assert compare(trails) == []
