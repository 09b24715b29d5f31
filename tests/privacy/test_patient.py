import math
from collections import Counter
from pathlib import Path

import pytest
from dp_accounting import dp_event, pld
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny import context_of, says, says_of_setting, see

from fedmed_flower.data.site import Site
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.privacy.accounting import Release, epsilon_of
from fedmed_flower.privacy.grid import divergence_of, excess_delta, grid_for
from fedmed_flower.privacy.ledger import Ledger, Limit
from fedmed_flower.privacy.patient import PatientPrivacy, budget_of, ledger_path
from fedmed_flower.settings.privacy import PrivacySettings
from fedmed_flower.wire import EPSILON

ON = {"privacy": "patient"}


def private(folder=None, run="a", budget=None, **values):
    ledger = None if folder is None else Ledger(folder / "ledger.sqlite")
    return PatientPrivacy(PrivacySettings(**ON, **values), ledger, run, budget, "Tiny")


def test_settings_come_from_the_run_config_and_are_off_by_default():
    assert not PrivacySettings.from_run_config({}).on
    got = PrivacySettings.from_run_config(
        {
            "privacy": "patient",
            "target-epsilon": 3,
            "num-server-rounds": 7,
            "private-metrics": False,
        }
    )
    assert got.on
    assert got == PrivacySettings(
        "patient", target_epsilon=3.0, num_server_rounds=7, private_metrics=False
    )
    assert PrivacySettings.from_run_config(ON).private_metrics


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"privacy": "patients"}, "privacy must be one of none, patient, got 'patients'"),
        ({"privacy": True}, "privacy must be of type str, got True"),
        ({"target-epsilon": 0.0}, "target-epsilon must be above 0 and finite, got 0.0"),
        ({"target-epsilon": math.inf}, "target-epsilon must be above 0 and finite, got inf"),
        ({"target-epsilon": "8"}, "target-epsilon must be of type float, got '8'"),
        ({"delta": 0.0}, "delta must be above 0 and below 1, got 0.0"),
        ({"delta": 1}, "delta must be above 0 and below 1, got 1.0"),
        ({"delta": math.nan}, "delta must be above 0 and below 1, got nan"),
        ({"max-grad-norm": -1.0}, "max-grad-norm must be from 1e-06 to 1,000,000, got -1.0"),
        ({"sampling-rate": 1.01}, "sampling-rate must be from 1e-06 to 1, or 0, got 1.01"),
        ({"sampling-rate": -0.1}, "sampling-rate must be from 1e-06 to 1, or 0, got -0.1"),
        ({"sampling-rate": math.nan}, "sampling-rate must be from 1e-06 to 1, or 0, got nan"),
        ({"patient-records": "all"}, "patient-records must be one of one, mean, got 'all'"),
        ({"micro-batch-size": -1}, "micro-batch-size must be from 0 to 1,000,000, got -1"),
        ({"num-server-rounds": 0}, "num-server-rounds must be from 1 to 100,000, got 0"),
        ({"private-metrics": 1}, "private-metrics must be of type bool, got 1"),
        ({"max-grad-norm": 5e-324}, "max-grad-norm must be from 1e-06 to 1,000,000, got 5e-324"),
        ({"max-grad-norm": 0.0}, "max-grad-norm must be from 1e-06 to 1,000,000, got 0.0"),
        ({"max-grad-norm": 1e7}, "max-grad-norm must be from 1e-06 to 1,000,000, got 10000000.0"),
        ({"max-grad-norm": math.nan}, "max-grad-norm must be from 1e-06 to 1,000,000, got nan"),
        ({"sampling-rate": 1e-320}, "sampling-rate must be from 1e-06 to 1, or 0, got 1e-320"),
        (
            {"num-server-rounds": 10**15},
            "num-server-rounds must be from 1 to 100,000, got 1000000000000000",
        ),
        (
            {"micro-batch-size": 10**6 + 1},
            "micro-batch-size must be from 0 to 1,000,000, got 1000001",
        ),
    ],
)
def test_settings_out_of_range_are_refused(config, text):
    with pytest.raises(InputError, match=says_of_setting(text)):
        PrivacySettings.from_run_config(ON | config)


def test_settings_at_their_bounds():
    for low in (True, False):
        config = {"max-grad-norm": 1e-6 if low else 1e6, "sampling-rate": 1e-6 if low else 1}
        config |= {
            "num-server-rounds": 1 if low else 100_000,
            "micro-batch-size": 0 if low else 10**6,
        }
        found = PrivacySettings.from_run_config(ON | config)
        assert (found.max_grad_norm, found.sampling_rate) == ((1e-6, 1e-6) if low else (1e6, 1.0))
    # Evaluation with noise is a hospital's own word, too: the run need not be private.
    assert not PrivacySettings.from_run_config({"private-metrics": True}).on


@pytest.mark.parametrize(
    ("patients", "epochs", "batch_size", "given", "rate", "steps"),
    [
        (range(100), 2, 25, 0.0, 0.25, 8),
        (range(100), 1, 30, 0.0, 0.3, 3),
        (range(10), 1, 32, 0.0, 1.0, 1),
        (range(10), 3, 32, 0.0, 1.0, 3),
        ([1, 1, 1, 2] * 5, 1, 1, 0.0, 0.5, 2),
        (range(100), 1, 25, 0.5, 0.5, 2),
        (range(7), 1, 1, 0.05, 0.05, 20),
        (range(7), 1, 1, 1.0, 1.0, 1),
    ],
)
def test_a_round_passes_over_the_patients_as_often_as_its_epochs_say(
    patients, epochs, batch_size, given, rate, steps
):
    plan = private(sampling_rate=given).plan_training(list(patients), epochs, batch_size, weights=7)
    assert plan.release.sampling_rate == rate
    assert plan.steps == steps
    assert plan.num_patients == len(set(patients))
    assert plan.settings.sampling_rate == given


@hypothesis_settings(max_examples=6, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 64), st.integers(1, 3), st.integers(1, 20),
    st.sampled_from([1.0, 3.0, 8.0]),
)  # fmt: skip
def test_all_planned_rounds_stay_within_the_target_and_one_more_would_not(
    count, batch_size, epochs, rounds, target
):
    privacy = private(target_epsilon=target, num_server_rounds=rounds)
    plan = privacy.plan_training(range(count), epochs, batch_size, weights=7)
    costs = [epsilon_of({plan.release: plan.steps * r}, 1e-5) for r in (rounds, rounds + 1)]
    assert 0.99 * target < costs[0] <= target < costs[1]


@pytest.mark.parametrize(("split", "planned"), [("val", 5), ("test", 2), ("train", 5)])
def test_all_planned_evaluations_of_a_split_stay_within_the_target(split, planned):
    privacy = private(target_epsilon=2.0, num_server_rounds=5)
    release = privacy.plan_evaluation(split)
    assert release.sampling_rate == 1.0
    costs = [epsilon_of({release: n}, 1e-5) for n in (planned, planned + 1)]
    assert 1.98 < costs[0] <= 2.0 < costs[1]


def _round(privacy, patients, number=1):
    plan = privacy.plan_training(patients, 1, 4, weights=7)
    with privacy.charged(patients, plan.release, plan.steps, "train", number):
        pass
    return plan


def test_the_run_takes_its_planned_rounds_and_is_declined_the_next(tmp_path):
    patients = range(20)
    for number in (1, 2, 3):
        plan = _round(private(tmp_path, num_server_rounds=3), patients, number)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert epsilon_of({plan.release: plan.steps * 4}, 1e-5) > 8
    text = "the run's target-epsilon would be passed"
    with pytest.raises(DeclinedError, match=says(text)):
        _round(private(tmp_path, num_server_rounds=3), patients, 4)
    (entry,) = ledger.entries()
    assert (entry.run, entry.app, entry.purpose) == ("a", "Tiny", "train")
    assert (entry.rounds, entry.unsettled, entry.patients) == (3, 0, 20)
    assert entry.releases == {plan.release: plan.steps * 3}


def test_what_a_run_has_spent_is_what_dp_accounting_composes(tmp_path):
    patients = range(20)
    plans = [
        (_round(private(tmp_path, run, num_server_rounds=rounds), patients), run)
        for run, rounds in [("a", 10), ("b", 5), ("b", 5)]
    ]
    for run in ("a", "b"):
        own = pld.PLDAccountant(value_discretization_interval=1e-3)
        for plan, its_run in plans:
            if run == its_run:
                gaussian = dp_event.GaussianDpEvent(plan.release.noise_multiplier)
                event = dp_event.PoissonSampledDpEvent(plan.release.sampling_rate, gaussian)
                own.compose(event, plan.steps)
        # Of the other run it tells nothing: that would tell whether these patients were in it.
        wanted = {EPSILON: pytest.approx(own.get_epsilon(1e-5), rel=0.01)}
        assert private(tmp_path, run).spent(patients) == wanted
    assert private(tmp_path, "a").spent(range(20, 30)) == {EPSILON: 0.0}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, DeclinedError])
def test_a_round_that_fails_stays_charged_and_unsettled(tmp_path, error):
    privacy, release = private(tmp_path), Release(1.0, 10.0)

    def fail():
        with privacy.charged([1], release, 1, "train", 1):
            assert privacy.ledger.released([1]) == {release: 1}
            raise error

    with pytest.raises(error):
        fail()
    (entry,) = privacy.ledger.entries()
    assert (entry.rounds, entry.unsettled, entry.releases) == (1, 1, {release: 1})


def test_past_the_budget_of_the_hospital_nothing_is_begun(tmp_path):
    release, begun = Release(1.0, 10.0), []
    budget = Limit(epsilon_of([release], 1e-5), 1e-5, "the hospital's privacy budget")
    for run in ("a", "b"):
        privacy = private(tmp_path, run, budget)
        try:
            with privacy.charged([1], release, 1, "train", 1):
                begun.append(run)
        except DeclinedError as declined:
            told = str(declined)
    assert begun == ["a"]
    assert told == "the hospital's privacy budget would be passed"
    assert privacy.ledger.released([1]) == Counter({release: 1})


def test_a_hospital_sets_its_budget_or_none():
    assert budget_of(context_of()) is None
    given = {"budget-epsilon": 10, "budget-delta": 1e-5, "site-name": "a"}
    name = "the hospital's privacy budget"
    assert budget_of(context_of(node_config=given)) == Limit(10.0, 1e-5, name)
    # What a run asks for is not the hospital's word.
    assert budget_of(context_of(budget_epsilon=1.0, budget_delta=1e-5)) is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"budget-epsilon": 3.0}, "budget-epsilon in the node config needs budget-delta beside it"),
        ({"budget-delta": 1e-5}, "budget-delta in the node config needs budget-epsilon beside it"),
        ({"budget-epsilon": "3", "budget-delta": 1e-5},
         "budget-epsilon must be of type float, got '3'"),
        ({"budget-epsilon": True, "budget-delta": 1e-5},
         "budget-epsilon must be of type float, got True"),
        ({"budget-epsilon": 0.0, "budget-delta": 1e-5},
         "budget-epsilon must be above 0 and finite, got 0.0"),
        ({"budget-epsilon": math.nan, "budget-delta": 1e-5},
         "budget-epsilon must be above 0 and finite, or 0, got nan"),
        ({"budget-epsilon": math.inf, "budget-delta": 1e-5},
         "budget-epsilon must be above 0 and finite, or 0, got inf"),
        ({"budget-epsilon": 3.0, "budget-delta": 0.0},
         "budget-delta must be above 0 and below 1, got 0.0"),
        ({"budget-epsilon": 3.0, "budget-delta": 1.0},
         "budget-delta must be above 0 and below 1, or 0, got 1.0"),
    ],
)  # fmt: skip
def test_a_budget_that_is_none_is_refused(given, text):
    with pytest.raises(InputError, match=says_of_setting(text)):
        budget_of(context_of(node_config=given))


SIMULATED = Site("hospital-2", 1, 3, simulated=True)


@pytest.mark.parametrize(
    ("node", "site", "run", "message", "wanted"),
    [
        ({"ledger": "/disk/own.sqlite"}, Site("a", data_dir=Path("/data")), {}, {},
         "/disk/own.sqlite"),
        ({"ledger": "/disk/own.sqlite"}, SIMULATED, {"run-dir": "/run"}, {"ledger-dir": "/l"},
         "/disk/own.sqlite"),
        ({}, Site("a", data_dir=Path("/data")), {"run-dir": "/run"}, {"ledger-dir": "/l"},
         "/data/privacy-ledger.sqlite"),
        ({}, SIMULATED, {"run-dir": "/run"}, {"ledger-dir": "/l"}, "/l/hospital-2.sqlite"),
        ({}, SIMULATED, {"run-dir": "/run"}, {}, "/run/ledgers/hospital-2.sqlite"),
        ({}, SIMULATED, {"run-dir": "/run"}, {"pool-sites": True}, "/run/ledgers/all-sites.sqlite"),
        ({}, SIMULATED, {}, {"ledger-dir": "/l", "pool-sites": False}, "/l/hospital-2.sqlite"),
    ],
)  # fmt: skip
def test_where_a_site_keeps_its_ledger(node, site, run, message, wanted):
    context = context_of(node_config=node)
    context.run_config = run
    assert ledger_path(context, site, message) == Path(wanted)


def ledger_of(folder, name):
    return ledger_path(context_of(), Site(name, simulated=True), {"ledger-dir": str(folder)})


def test_sites_whose_names_differ_in_case_have_a_ledger_each(tmp_path):
    names = ["a", "A", "all-sites", "All-Sites", "Süd", "S-d", "SÜD"]
    paths = [ledger_of(tmp_path, name) for name in names]
    pooled = {"ledger-dir": str(tmp_path), "pool-sites": True}
    paths.append(ledger_path(context_of(), Site("a", simulated=True), pooled))
    assert len({str(path).lower() for path in paths}) == len(paths)
    for path in paths:
        Ledger(path)
    assert [ledger_of(tmp_path, name) for name in names] == paths[:-1]


def test_the_ledger_of_a_run_that_an_earlier_version_began_keeps_its_name(tmp_path):
    Ledger(tmp_path / "North.sqlite")
    assert ledger_of(tmp_path, "North") == tmp_path / "North.sqlite"
    assert ledger_of(tmp_path, "NORTH").name.startswith("NORTH~")


def test_the_home_folder_may_be_named_by_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/clinic")
    context = context_of(node_config={"ledger": "~/own.sqlite"})
    assert ledger_path(context, Site("a"), {}) == Path("/home/clinic/own.sqlite")


NO_FILE = (
    "a hospital needs a file for its privacy ledger: give --node-config "
    "'ledger=\"/path/privacy-ledger.sqlite\"', or a data-dir to hold it" + see("ledger")
)


@pytest.mark.parametrize(
    ("node", "site", "run", "message", "text"),
    [
        ({}, Site("a"), {}, {}, NO_FILE),
        # What the server says of folders is nothing to a real site.
        ({}, Site("a"), {"run-dir": "/run"}, {"ledger-dir": "/l"}, NO_FILE),
        ({}, SIMULATED, {}, {},
         "privacy needs a folder for the sites' ledgers: give run-dir" + see("run-dir")),
        ({}, SIMULATED, {"run-dir": ""}, {"ledger-dir": ""},
         "privacy needs a folder for the sites' ledgers: give run-dir" + see("run-dir")),
        ({"ledger": "own.sqlite"}, Site("a", data_dir=Path("/data")), {}, {},
         "ledger in the node config must be an absolute path, got 'own.sqlite': a relative path "
         "names another file in another working directory" + see("ledger")),
        ({"ledger": ""}, Site("a"), {}, {},
         "ledger in the node config must be an absolute path, got '.': a relative path names "
         "another file in another working directory" + see("ledger")),
    ],
)  # fmt: skip
def test_a_site_without_a_place_for_its_ledger_is_told(node, site, run, message, text):
    context = context_of(node_config=node)
    context.run_config = run
    with pytest.raises(InputError, match=says(text)):
        ledger_path(context, site, message)


@pytest.mark.parametrize(
    ("steps", "batch_size", "given", "rate"),
    [(1, 25, 0.0, 0.25), (40, 25, 0.0, 0.25), (7, 500, 0.0, 1.0), (40, 1, 0.5, 0.5)],
)
def test_a_round_of_steps_has_so_many_and_noise_for_all_of_the_run(steps, batch_size, given, rate):
    privacy = private(sampling_rate=given, target_epsilon=3.0, num_server_rounds=4)
    plan = privacy.plan_training(range(100), 9, batch_size, steps, weights=7)
    assert (plan.steps, plan.release.sampling_rate) == (steps, rate)
    costs = [epsilon_of({plan.release: steps * rounds}, 1e-5) for rounds in (4, 5)]
    assert 2.97 < costs[0] <= 3.0 < costs[1]
    # As if so many had come of epochs.
    epochs = privacy.plan_training(range(100), round(steps * rate), batch_size, weights=7)
    if epochs.steps == steps:
        assert epochs == plan


def test_the_grid_of_a_round_follows_from_the_numbers_of_the_run():
    found = {}
    for weights in (1_000, 100_000_000):
        privacy = private(sampling_rate=0.5, target_epsilon=4.0, num_server_rounds=5)
        plan = privacy.plan_training(range(100), 9, 25, 40, weights=weights)
        std = plan.release.noise_multiplier * privacy.settings.max_grad_norm
        run = weights * 40 * 5
        grid = grid_for(std, run, 4.0, 1e-5)
        assert plan.grid == grid.step <= std / 4
        assert excess_delta(divergence_of(grid.deviation, run), 4.0) <= 1e-7
        # A round costs its share of the run.
        assert 5 * plan.divergence == pytest.approx(divergence_of(grid.deviation, run), rel=1e-6)
        found[weights] = plan.grid
    assert found[1_000] < found[100_000_000]


def test_where_no_grid_is_coarse_enough_there_is_none_and_no_bound():
    privacy = private(sampling_rate=0.5, target_epsilon=30.0, num_server_rounds=5)
    plan = privacy.plan_training(range(100), 9, 25, 40, weights=100_000_000)
    assert (plan.grid, plan.divergence) == (0.0, None)


def test_the_ledger_keeps_what_a_round_is_off_from_exact_noise(tmp_path):
    privacy = private(tmp_path, target_epsilon=4.0, num_server_rounds=5)
    plan = privacy.plan_training(range(100), 1, 25, weights=1_000)
    for number in (1, 2):
        charge = (range(100), plan.release, plan.steps, "train", number, plan.divergence)
        with privacy.charged(*charge):
            pass
    (entry,) = privacy.ledger.entries()
    assert entry.divergence == pytest.approx(2 * plan.divergence)


def test_too_many_steps_are_refused_with_the_setting_that_asks_for_them():
    text = "local-steps must be at most 100000 with privacy, got 100001" + see("local-steps")
    with pytest.raises(InputError, match=says(text)):
        private().plan_training(range(100), 1, 25, 100_001, weights=7)
    text = (
        "local-epochs = 9 at a sampling rate of 1e-05 makes 900000 steps a round, above 100000: "
        "raise sampling-rate or batch-size"
    )
    with pytest.raises(InputError, match=says(text)):
        private(sampling_rate=1e-5).plan_training(range(100), 9, 25, weights=7)


def test_a_run_of_more_steps_than_can_be_accounted_for_is_refused_at_once():
    text = (
        "100000 steps a round in num-server-rounds = 100 rounds are more than the 1,000,000 "
        "steps that privacy accounting can handle: lower one of them"
    )
    with pytest.raises(InputError, match=says(text)):
        private(sampling_rate=1e-6, num_server_rounds=100).plan_training(
            range(9), 1, 25, 100_000, weights=7
        )
