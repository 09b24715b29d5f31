import math
from dataclasses import replace

import lifelines
import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import ArrayRecord
from lifelines.utils import concordance_index
from safetensors.numpy import load_file
from sksurv.metrics import integrated_brier_score
from sksurv.util import Surv
from tables import SURVIVAL, TinySurvival, TinyTable, changed, holding, lives, run_tables
from tiny import ask, context_of, node_of, says, says_of_setting, see

from fedmed_flower import InputError, Schema, SiteData, SurvivalClient
from fedmed_flower.data.preparation import Preparation
from fedmed_flower.data.site import Site
from fedmed_flower.metrics import classification, survival
from fedmed_flower.privacy import optimizer
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.wire import read_error

DECLARED = {"preparation": "declared"}
DISCRETE = {"survival_loss": "discrete", "survival_horizon": 1000.0}
PRIVATE = {"privacy": "patient", "target_epsilon": 50.0} | DECLARED
TWO = Schema(
    "days", "survival", ("age", "dose"), event="died", ranges={"age": (0, 100), "dose": (-5, 5)}
)


class Two(SurvivalClient):
    """Two columns that count; whole days, so that some die on the same one."""

    schema = TWO
    sizes = (80, 20, 60)

    def load_data(self, site):
        rng = np.random.default_rng((site.index, 4))
        parts = []
        for name, size in zip(("train", "val", "test"), self.sizes, strict=True):
            rows = lives(size, (site.index, name == "val", name == "test"), f"{site.name}-{name}")
            doses = rng.normal(size=size)
            parts.append(
                [
                    row
                    | {"dose": float(dose), "days": math.ceil(row["days"] * np.exp(-0.7 * dose))}
                    for row, dose in zip(rows, doses, strict=True)
                ]
            )
        return SiteData(*parts, source="made up")


def own_of(client, folder, index=0, num_sites=3, **config):
    """Return the client of a site, and the model of a finished run."""
    own = client(context_of(index, num_sites, **config))
    own.agreed = RunFolder(folder).read_config()["run"].get("agreed", "")
    model = own.build_model().eval()
    state = load_file(folder / "model.safetensors")
    model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    return own, model


def outputs_of(own, model, rows):
    features = torch.from_numpy(own.prepared_by.transform(rows))
    return model(features).detach().numpy()


def times_of(rows):
    return (np.array([row[name] for row in rows], dtype=float) for name in ("days", "died"))


def surv(rows):
    times, events = times_of(rows)
    return Surv.from_arrays(events.astype(bool), times)


def error_of(client, context, kind="train", arrays=None, **config):
    reply = ask(client, kind, context, ArrayRecord() if arrays is None else arrays, **config)
    assert reply.has_error()
    return read_error(reply.error.reason)[1]


def arrays_of(client, context):
    return ArrayRecord(client(context).build_model().state_dict())


def test_cox_by_whole_batches_at_one_hospital_is_lifelines_fit(tmp_path):
    config = {"batch_size": 100, "learning_rate": 1.0, "local_steps": 150, "num_server_rounds": 1}
    run_tables(tmp_path, Two, 1, **config)
    own, model = own_of(Two, tmp_path, num_sites=1)
    frame = pd.DataFrame(own.data().train)[["age", "dose", "days", "died"]]
    assert frame.duplicated("days").any()
    fitter = lifelines.CoxPHFitter().fit(frame, "days", "died")
    scales = own.prepared_by.scales
    found = model.weight.detach().numpy()[0] / [scales["age"], scales["dose"]]
    np.testing.assert_allclose(found, fitter.params_[["age", "dose"]], rtol=1e-3)


def test_the_c_index_is_that_of_lifelines_and_that_of_all_is_of_the_sums_of_pairs(tmp_path):
    _, summary = run_tables(tmp_path, Two, survival_horizon=800.0)
    test, pairs = summary["test"], np.zeros(3)
    for index in range(3):
        own, model = own_of(Two, tmp_path, index)
        rows = own.data().test
        times, events = times_of(rows)
        risks = outputs_of(own, model, rows)[:, 0]
        found = test["sites"][f"hospital-{index + 1}"]["c-index"]
        assert found == pytest.approx(concordance_index(times, -risks, events), abs=1e-12)
        pairs += survival.concordance(times, events, risks)
    wanted = (pairs[0] + pairs[1] / 2) / pairs[2]
    assert test["federated"]["c-index"] == pytest.approx(wanted, abs=1e-12)
    assert wanted > 0.6


@pytest.mark.parametrize("loss", ["cox", "discrete"])
def test_the_integrated_brier_score_is_that_of_scikit_survival(loss, tmp_path):
    horizon = 700.0
    config = {"survival_loss": loss, "survival_horizon": horizon, "survival_intervals": 7}
    _, summary = run_tables(tmp_path, Two, 2, learning_rate=0.2, **config)
    own, model = own_of(Two, tmp_path, 1, 2, **config)
    train, rows = own.data().train, own.data().test
    grid = np.linspace(0, horizon, 51)[1:]
    grid = grid[grid < max(row["days"] for row in rows)]
    outputs = outputs_of(own, model, rows)
    if loss == "cox":
        times, events = times_of(train)
        risks = np.exp(outputs_of(own, model, train)[:, 0])
        steps = [
            (when, sum(events[times == when]) / risks[times >= when].sum())
            for when in np.unique(times)
        ]
        hazard = np.array([sum(step for when, step in steps if when <= at) for at in grid])
        curves = np.exp(-np.exp(outputs) * hazard)
    else:
        alive = np.cumprod(1 - 1 / (1 + np.exp(-outputs)), axis=1)
        alive = np.hstack([np.ones((len(rows), 1)), alive])
        curves = np.stack([np.interp(grid, np.linspace(0, horizon, 8), one) for one in alive])
    wanted = integrated_brier_score(surv(train), surv(rows), curves, grid)
    found = summary["test"]["sites"]["hospital-2"]["integrated-brier"]
    assert found == pytest.approx(wanted, rel=1e-4)
    sites = [own["integrated-brier"] for own in summary["test"]["sites"].values()]
    assert summary["test"]["federated"]["integrated-brier"] == pytest.approx(np.mean(sites))
    assert 0 < found < 0.25


@pytest.mark.parametrize("config", [{"survival_loss": "cox"}, DISCRETE])
def test_training_lowers_the_loss(config, tmp_path):
    usual = {"learning_rate": 0.3, "num_server_rounds": 4, "batch_size": 80, "local_epochs": 5}
    _, summary = run_tables(tmp_path, Two, 2, **usual, **config)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    losses = [float(line.split(",")[4]) for line in lines if ",train,all,loss," in line]
    assert losses[3] < losses[0] - 0.05
    assert summary["test"]["federated"]["c-index"] > 0.6
    assert ("integrated-brier" in summary["test"]["federated"]) == ("survival_horizon" in config)


def alive(data):
    return changed(died=0)(data)


def beyond(data):
    return changed(days=5000.0)(data)


@pytest.mark.parametrize("config", [{"survival_horizon": 900.0}, DISCRETE])
def test_hospitals_that_differ_keep_nobody_from_going_on(config, tmp_path):
    changes = [
        None,
        alive,
        beyond,
        lambda data: SiteData(train=data.train[:3], test=data.test[:2]),
        lambda data: replace(data, train=(), val=()),
        changed(days=-1.0),
        changed(died=2),
    ]
    client = holding(dict(enumerate(changes)), TinySurvival)
    _, summary = run_tables(tmp_path, client, len(changes), **config)
    assert summary["status"] == "finished"
    names = [f"hospital-{number}" for number in range(1, 8)]
    assert list(summary["test"]["sites"]) == names[:5]
    assert {failure["site"] for failure in summary["failures"]} == {*names[5:]}
    log = (tmp_path / "log.txt").read_text()
    wrong = "row 0 of the train split has "
    assert f"(hospital-6): {wrong}days -1.0: it must be a finite number, 0 or more" in log
    assert f"(hospital-7): {wrong}died 2: it must be 0 or 1" in log
    test = summary["test"]["sites"]
    # Where nobody has the event, no pair can be compared.
    assert "c-index" not in test["hospital-2"]
    assert test["hospital-2"]["integrated-brier"] >= 0
    # All live on beyond the horizon.
    assert 0 <= test["hospital-3"]["integrated-brier"] < 1
    assert "integrated-brier" not in test["hospital-5"]
    assert test["hospital-5"]["c-index"] > 0.5
    figures = [value for found in test.values() for value in found.values()]
    assert all(math.isfinite(value) for value in figures)
    # Its pairs together with the others' give the figure of all.
    assert "c-index" in summary["test"]["federated"]
    assert "not averaged: c-index" not in log


def test_groups_have_a_concordance_too(tmp_path):
    class Banded(TinySurvival):
        def load_data(self, site):
            data = super().load_data(site)
            halves = ("old", "young")
            rows = [row | {"half": halves[row["age"] < 55]} for row in data.test]
            train = [row | {"half": None} for row in data.train]
            return replace(data, train=train, val=(), test=rows)

    _, summary = run_tables(tmp_path, Banded, 2, report_by="half")
    own, model = own_of(Banded, tmp_path)
    rows = [row for row in own.data().test if row["half"] == "old"]
    times, events = times_of(rows)
    wanted = concordance_index(times, -outputs_of(own, model, rows)[:, 0], events)
    assert summary["test"]["sites"]["hospital-1"]["c-index@half=old"] == pytest.approx(wanted)
    assert 0 < summary["test"]["federated"]["c-index@half=old"] < 1


def test_settings_are_checked_before_anything_is_asked(tmp_path):
    for config, text in (
        ({"survival_loss": "weibull"}, "survival-loss must be one of cox, discrete, got 'weibull'"),
        ({"survival_horizon": -1.0}, "survival-horizon must be at least 0 and finite, got -1.0"),
        ({"survival_horizon": math.inf}, "survival-horizon must be at least 0 and finite, got inf"),
        ({"survival_intervals": 0}, "survival-intervals must be from 1 to 10,000, got 0"),
        ({"survival_intervals": 10_001}, "survival-intervals must be from 1 to 10,000, got 10001"),
        (
            {"survival_loss": "discrete"},
            "survival-horizon must be above 0 and finite, got 0.0",
        ),
    ):
        with pytest.raises(InputError, match=says_of_setting(text)):
            run_tables(tmp_path / "run", TinySurvival, **config)
    wrong = type("Wrong", (SurvivalClient,), {
        "schema": TinyTable.schema, "load_data": TinyTable.load_data, "sizes": TinyTable.sizes,
    })  # fmt: skip
    text = "Wrong needs a schema with task=\"survival\", got 'binary'"
    with pytest.raises(InputError, match=says_of_setting(text)):
        run_tables(tmp_path / "run", wrong)
    assert not (tmp_path / "run").exists()


# Privacy.


def test_cox_is_refused_with_privacy_before_anything_is_asked(tmp_path):
    text = (
        'survival-loss="cox" compares patients with each other: privacy="patient" needs '
        'survival-loss="discrete"' + see("survival-loss")
    )
    with pytest.raises(InputError, match=says(text)):
        run_tables(tmp_path / "run", TinySurvival, **PRIVATE)
    assert not (tmp_path / "run").exists()
    arrays = arrays_of(TinySurvival, context_of(run_dir=str(tmp_path), **DECLARED))
    context = context_of(run_dir=str(tmp_path), **PRIVATE)
    assert error_of(TinySurvival, context, arrays=arrays) == text
    plain = TinySurvival(context_of(**DECLARED)).build_model
    own = type("Own", (TinySurvival,), {"build_model": lambda self: plain()})
    assert error_of(own, context, arrays=arrays) == text
    assert not (tmp_path / "ledgers").exists()


def test_discrete_times_are_trained_privately(tmp_path):
    config = PRIVATE | DISCRETE | {"learning_rate": 0.5, "sampling_rate": 0.5, "local_steps": 10}
    config["private_metrics"] = False
    _, summary = run_tables(tmp_path, TinySurvival, 2, **config)
    assert summary["failures"] == []
    assert summary["test"]["federated"]["c-index"] > 0.6
    (entry,) = Ledger(tmp_path / "ledgers" / "hospital-1.sqlite", read_only=True).entries()
    assert sum(entry.releases.values()) == 20


def no_numbers(count, std, generator):
    return np.zeros(count)


def without_noise(total, std):
    return total


def test_no_patient_moves_a_private_model_further_than_the_clipping_norm(tmp_path, monkeypatch):
    # The target is so large that no grid keeps its bound: these numbers are rounded to none.
    monkeypatch.setattr(optimizer, "gaussian", no_numbers)
    train = lives(20, 1)
    odd = {"age": -1e9, "days": 1e-9, "died": 1}
    states = []
    for rows in (train, [train[0] | odd, *train[1:]]):
        client = holding({0: SiteData(train=rows)}, TinySurvival)
        config = {"sampling_rate": 1.0, "learning_rate": 1.0, "max_grad_norm": 0.1, **DISCRETE}
        context = context_of(run_dir=str(tmp_path / str(len(states))), **PRIVATE, **config)
        reply = ask(client, "train", context, arrays_of(client, context))
        assert not reply.has_error(), reply.error.reason
        arrays = reply.content["arrays"].values()
        states.append(np.concatenate([array.numpy().ravel() for array in arrays]))
    assert 0 < np.linalg.norm(states[0] - states[1]) <= 2 * 0.1 / 20 * (1 + 1e-5)


def test_noised_counts_tell_who_has_the_event_before_the_horizon(tmp_path, monkeypatch):
    monkeypatch.setattr(classification, "noised_once", without_noise)
    val = [row | {"patient": f"p{number % 35}"} for number, row in enumerate(lives(40, 2))]
    odd = val[0] | {"patient": "odd", "days": 1.0, "died": 1}
    told = []
    for rows in ([*val, odd, odd, odd], val):
        client = holding({0: SiteData(train=lives(9, 3), val=rows)}, TinySurvival)
        config = {"private_metrics": True, "num_server_rounds": 1, **DISCRETE}
        context = context_of(run_dir=str(tmp_path / str(len(told))), **PRIVATE, **config)
        reply = ask(client, "evaluate", context, arrays_of(client, context))
        assert not reply.has_error(), reply.error.reason
        told.append(reply.content["metrics"])
    change = np.asarray(told[0]["noised-counts"]) - np.asarray(told[1]["noised-counts"])
    assert np.linalg.norm(change) == pytest.approx(1)
    # A patient counts who had the event before, or was seen after it.
    counted = {r["patient"] for r in val if r["days"] > 1000 or r["died"]}
    assert 0 < told[1]["num-examples"] == len(counted) < len({row["patient"] for row in val})
    # Neither the loss nor what follows from training patients goes along.
    assert not set(told[0]) & {"loss", "c-index", "integrated-brier", "concordance-pairs"}
    node = {"partition-id": 0, "num-partitions": 2, "private-metrics": True}
    context = context_of(node_config=node, run_dir=str(tmp_path), **DECLARED)
    text = 'metrics with noise need survival-loss="discrete", got "cox"' + see("survival-loss")
    found = error_of(TinySurvival, context, "evaluate", arrays_of(TinySurvival, context))
    assert found == text


def test_in_a_private_run_no_figure_follows_from_training_patients(tmp_path):
    test, figures = lives(60, 4, "test"), []
    for train in (lives(40, 5), [row | {"days": 30.0, "died": 0} for row in lives(40, 5)]):
        client = holding({0: SiteData(train=train, test=test)}, TinySurvival)
        for more in (PRIVATE | {"private_metrics": False}, DECLARED):
            context = context_of(run_dir=str(tmp_path), **DISCRETE, **more)
            reply = ask(client, "evaluate", context, arrays_of(client, context), split="test")
            figures.append(dict(reply.content["metrics"]))
    private, plain, other_private, other_plain = figures
    assert private == other_private
    assert private["integrated-brier"] > 0
    assert plain["integrated-brier"] != other_plain.get("integrated-brier")


def test_made_up_lives_are_like_those_of_a_hospital():
    own = TinySurvival(context_of(**DISCRETE, **DECLARED))
    rows = own.made_up(12)
    own.check(SiteData(rows))
    assert {row["died"] for row in rows} == {0, 1}
    assert len({row["days"] for row in rows}) == 12
    made, some = own.probe(4), own.batch_of(own.prepared("train", pooled=False)[1], range(4))
    assert {name: (part.shape, part.dtype) for name, part in made.items()} == {
        name: (part.shape, part.dtype) for name, part in some.items()
    }


def test_a_private_run_tells_of_survival_what_noise_allows(tmp_path):
    _, summary = run_tables(tmp_path, TinySurvival, 2, num_server_rounds=1, **PRIVATE, **DISCRETE)
    assert summary["failures"] == []
    assert "auc" in summary["test"]["federated"]
    assert not {"loss", "c-index", "integrated-brier"} & summary["test"]["federated"].keys()
    entries = Ledger(tmp_path / "ledgers" / "hospital-1.sqlite", read_only=True).entries()
    assert [(e.purpose, e.patients) for e in entries] == [
        ("train", 60), ("val counts", 20), ("test counts", 40),
    ]  # fmt: skip


def test_columns_are_those_of_the_schema():
    own = TinySurvival(context_of())
    assert own.schema is SURVIVAL
    assert own.describe(own.data()) == {}
    assert Preparation.of_rows(SURVIVAL, own.data().train).names == ("age",)
    assert own.load_data(Site("hospital-1")).train[0].keys() == {"patient", "age", "days", "died"}


@pytest.mark.parametrize("few", [True, False])
def test_few_training_patients_make_no_figure_of_others(few, tmp_path):
    sizes = (9 if few else 10, 20, 0)
    client = type("Few", (Two,), {"sizes": sizes})
    config = {"survival_loss": "cox", "survival_horizon": 700.0, "preparation": "declared"}
    context = context_of(node_config=node_of(tmp_path), **config)
    model = client(context).build_model()
    reply = ask(client, "evaluate", context, ArrayRecord(model.state_dict()))
    assert ("integrated-brier" in reply.content["metrics"]) == (not few)
    assert "c-index" in reply.content["metrics"]
    own = context_of(node_config=node_of(tmp_path), **config | {"preparation": "site"})
    reply = ask(client, "evaluate", own, ArrayRecord(model.state_dict()))
    assert reply.has_error() == few


def horizon_warnings(caplog):
    return [text for text in caplog.messages if "are followed up to" in text]


def of_times(days, **members):
    """Return a client whose patients have these times, half of them in training."""
    rows = [
        {"patient": f"p{number}", "age": 50.0, "days": float(day), "died": number % 2}
        for number, day in enumerate(days)
    ]

    def load_data(self, site):
        return SiteData(train=rows[::2], val=rows[1::2], source="made up")

    return type("Followed", (TinySurvival,), {"load_data": load_data, **members})


@pytest.mark.parametrize("privacy", [{}, {"privacy": "patient", "target_epsilon": 5.0} | DECLARED])
def test_a_horizon_past_the_follow_up_is_warned_of_and_names_no_time(privacy, tmp_path, caplog):
    config = {"survival_loss": "discrete", **privacy}
    client = of_times([*range(100, 140), *[1000] * 9])
    context = context_of(node_config=node_of(tmp_path), survival_horizon=1000.0, **config)
    own = client(context)
    own.data()
    own.data()
    assert horizon_warnings(caplog) == [
        "north: fewer than 10 patients are followed up to survival-horizon=1000: what is predicted "
        "of that time rests on hardly any patient here. Set a shorter horizon"
    ]
    assert "139" not in caplog.text
    caplog.clear()
    # With a tenth patient, from any split, it is no longer so.
    more = of_times([*range(100, 140), *[1000] * 10])
    context = context_of(node_config=node_of(tmp_path), survival_horizon=1000.0, **config)
    more(context).data()
    assert horizon_warnings(caplog) == []


def test_rows_of_one_patient_count_once_and_without_a_horizon_nothing_is_said(caplog):
    rows = [
        {"patient": f"p{number % 9}", "age": 50.0, "days": 900.0, "died": 0} for number in range(40)
    ]
    client = type(
        "Visits",
        (TinySurvival,),
        {"load_data": lambda self, site: SiteData(train=rows, source="made up")},
    )
    client(context_of()).data()
    assert horizon_warnings(caplog) == []
    client(context_of(survival_horizon=500.0)).data()
    assert len(horizon_warnings(caplog)) == 1
