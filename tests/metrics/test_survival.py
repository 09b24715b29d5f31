import itertools
import math
import warnings

import lifelines
import numpy as np
import pandas as pd
import pytest
import torch
from lifelines.utils import concordance_index as lifelines_index
from sklearn.linear_model import LogisticRegression
from sksurv import metrics as sksurv_metrics
from sksurv.linear_model.coxph import BreslowEstimator
from sksurv.nonparametric import kaplan_meier_estimator
from statsmodels.duration.hazard_regression import PHReg
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.metrics import survival
from fedmed_flower.metrics.survival import (
    brier_at,
    check_outcomes,
    concordance,
    concordance_index,
    followed,
    integrated_brier_score,
    kaplan_meier,
)
from fedmed_flower.models.survival import (
    cox_loss,
    discrete_time_loss,
    interval_edges,
    risk_from_hazards,
    survival_from_hazards,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def cohort(count, seed, step=0.0):
    """Patients with three features whose times are rounded up to whole steps, for ties."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 3))
    times = rng.exponential(10 * np.exp(-features @ [0.8, -0.5, 0.0]))
    leaves = rng.exponential(15, size=count)
    events = (times <= leaves).astype(int)
    times = np.minimum(times, leaves)
    return features, np.ceil(times / step) * step if step else times, events


def tensors(*arrays):
    return tuple(torch.as_tensor(np.asarray(array), dtype=torch.float64) for array in arrays)


def fitted(loss, count):
    """Return the parameters at which the loss is least."""
    values = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [values],
        max_iter=200,
        tolerance_grad=1e-10,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss(values)
        value.backward()
        return value

    optimizer.step(closure)
    return values.detach()


# Cox


def test_cox_loss_worked_by_hand():
    # Hazards 1, 2, 3, 4; the first is censored and at risk of nothing. Events: 2 of {2, 3, 4}, 4 of
    # {4}; the third is censored between them.
    loss = cox_loss(*tensors(np.log([1, 2, 3, 4]), [1, 2, 3, 4], [0, 1, 0, 1]))
    assert loss.item() == pytest.approx(math.log(9 / 2) / 2, abs=1e-12)


def test_cox_loss_of_ties_worked_by_hand():
    # The events with hazards 2 and 3 at one time, with 4 at risk, which is censored at that time.
    case = tensors(np.log([3, 4, 2]), [5, 5, 5], [1, 0, 1])
    efron = math.log(9) + math.log(9 - 5 / 2) - math.log(6)
    assert cox_loss(*case).item() == pytest.approx(efron / 2, abs=1e-12)
    breslow = 2 * math.log(9) - math.log(6)
    assert cox_loss(*case, ties="breslow").item() == pytest.approx(breslow / 2, abs=1e-12)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
@pytest.mark.parametrize("step", [0.0, 2.0])
def test_cox_loss_equals_statsmodels(ties, step):
    features, times, events = cohort(150, 1, step)
    model = PHReg(times, features, status=events, ties=ties)
    for coefficients in ([0.0, 0.0, 0.0], [1.5, -2.0, 0.3]):
        loss = cox_loss(*tensors(features @ coefficients, times, events), ties=ties)
        reference = model.loglike(np.asarray(coefficients))
        assert loss.item() * events.sum() == pytest.approx(-reference, rel=1e-10)


def test_cox_fit_equals_lifelines():
    features, times, events = cohort(200, 2, 1.0)
    frame = pd.DataFrame(features, columns=list("abc")).assign(time=times, event=events)
    reference = lifelines.CoxPHFitter().fit(
        frame, "time", "event", fit_options={"precision": 1e-12}
    )
    x, t, e = tensors(features, times, events)
    coefficients = fitted(lambda beta: cox_loss((x @ beta)[:, None], t, e), 3)
    assert np.allclose(coefficients, reference.params_, atol=1e-6)
    loss = cox_loss(x @ coefficients, t, e).item()
    assert loss * events.sum() == pytest.approx(-reference.log_likelihood_, rel=1e-9)


def test_cox_loss_does_not_depend_on_the_order_of_rows():
    features, times, events = cohort(60, 3, 2.0)
    scores, t, e = tensors(features[:, 0], times, events)
    mixed = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert cox_loss(scores[mixed], t[mixed], e[mixed]).item() == pytest.approx(
        cox_loss(scores, t, e).item(), abs=1e-12
    )


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_cox_gradients_are_right(ties):
    features, times, events = cohort(14, 4, 4.0)
    assert len(np.unique(times[events == 1])) < events.sum()
    scores, t, e = tensors(features[:, 0], times, events)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: cox_loss(s, t, e, ties=ties), scores)


@pytest.mark.parametrize("times", [[3.0], [1.0, 2.0, 2.0], [5.0, 5.0, 5.0]])
def test_cox_loss_without_events_is_zero_with_gradients_of_zero(times):
    scores = torch.linspace(-3, 80, len(times), requires_grad=True)
    loss = cox_loss(scores, torch.tensor(times), torch.zeros(len(times)))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.tolist() == [0] * len(times)


@pytest.mark.parametrize("ties", ["efron", "breslow"])
def test_cox_loss_of_huge_log_hazards_is_finite(ties):
    scores = torch.tensor([500.0, -500, 0, 499, -400], requires_grad=True)
    times, events = torch.tensor([1.0, 2, 2, 2, 3]), torch.tensor([1, 1, 1, 0, 1])
    loss = cox_loss(scores, times, events, ties=ties)
    loss.backward()
    # The first shares the hazard at risk with 499, at first; then 499 stands against -500 and 0.
    exact = math.log1p(math.exp(-1)) + 999 + 499
    assert loss.item() == pytest.approx(exact / 4, rel=1e-6)
    assert torch.isfinite(scores.grad).all()
    shifted = cox_loss(scores.detach() + 1e4, times, events, ties=ties)
    assert shifted.item() == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_cox_loss_of_an_event_beside_hardly_any_hazard_is_zero(order):
    scores = torch.tensor([200.0, -200])[order].requires_grad_()
    loss = cox_loss(scores, torch.ones(2), torch.tensor([1, 0])[order])
    loss.backward()
    assert loss.item() == 0
    assert scores.grad.tolist() == [0, 0]


def test_cox_loss_of_half_precision_is_summed_in_single():
    features, times, events = cohort(300, 5, 1.0)
    scores, t, e = tensors(features[:, 0], times, events)
    half = scores.to(torch.bfloat16)
    loss = cox_loss(half, t, e)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cox_loss(half.double(), t, e).item(), rel=1e-5)


def test_cox_loss_refuses_what_is_out_of_range():
    scores, times, events = torch.zeros(3), torch.ones(3), torch.ones(3)
    cases = {
        "ties must be one of efron, breslow, got 'exact'": {"ties": "exact"},
        "one row a patient is needed in each, got rows of log_hazards 3, times 2, events 3": {
            "times": torch.ones(2)
        },
        "times must be 0 or more; row 1 has -1": {"times": torch.tensor([1.0, -1, 2])},
        "events must be 0 or 1; row 2 has 2": {"events": torch.tensor([0, 1, 2])},
    }
    for text, change in cases.items():
        given = {"log_hazards": scores, "times": times, "events": events} | change
        with pytest.raises(InputError, match=says(text)):
            cox_loss(**given)


# Hazards in intervals


def slow_discrete_loss(logits, times, events, edges):
    """Return the mean loss by going through patients and intervals one by one."""
    total = 0.0
    for row, (time, event) in enumerate(zip(times, events, strict=True)):
        for interval, (start, end) in enumerate(itertools.pairwise(edges)):
            hazard = 1 / (1 + math.exp(-logits[row][interval]))
            if start < time <= end and event:
                total -= math.log(hazard)
            elif end <= time:
                total -= math.log(1 - hazard)
    return total / len(times)


def test_discrete_loss_worked_by_hand():
    # Hazards 1/2, 1/4, 1/5 in (0, 1], (1, 2], (2, 3].
    logits = torch.log(torch.tensor([[1.0, 1 / 3, 1 / 4]]))
    edges = torch.tensor([0.0, 1, 2, 3])
    expected = {
        # On the day of admission.
        (0.0, 1): 1 / 2,
        (0.0, 0): 1,
        (0.5, 1): 1 / 2,
        (1.0, 1): 1 / 2,
        (1.5, 1): 1 / 2 * 1 / 4,
        (3.0, 1): 1 / 2 * 3 / 4 * 1 / 5,
        (0.9, 0): 1,
        (1.0, 0): 1 / 2,
        (1.9, 0): 1 / 2,
        (3.0, 0): 1 / 2 * 3 / 4 * 4 / 5,
        (7.0, 0): 1 / 2 * 3 / 4 * 4 / 5,
        (7.0, 1): 1 / 2 * 3 / 4 * 4 / 5,
    }
    for (time, event), likelihood in expected.items():
        loss = discrete_time_loss(logits, torch.tensor([time]), torch.tensor([event]), edges)
        assert loss.item() == pytest.approx(-math.log(likelihood), abs=1e-6)
    times, events = zip(*expected, strict=True)
    together = discrete_time_loss(
        logits.expand(len(times), -1), torch.tensor(times), torch.tensor(events), edges
    )
    mean = -sum(map(math.log, expected.values())) / len(times)
    assert together.item() == pytest.approx(mean, abs=1e-6)


def test_discrete_loss_equals_a_slow_one():
    rng = np.random.default_rng(6)
    _, times, events = cohort(80, 6, 0.5)
    logits = rng.normal(size=(80, 7)) * 2
    edges = interval_edges(21, 7)
    loss = discrete_time_loss(*tensors(logits, times, events), edges)
    assert loss.item() == pytest.approx(
        slow_discrete_loss(logits, times, events, edges.tolist()), rel=1e-12
    )


def test_discrete_loss_of_each_patient_goes_through_vmap():
    rng = np.random.default_rng(7)
    features, times, events = tensors(*cohort(30, 7, 0.5))
    weights = {"weight": torch.as_tensor(rng.normal(size=(3, 5))), "bias": torch.zeros(5).double()}
    edges = interval_edges(10, 5)

    def one(values, x, time, event):
        logits = x[None] @ values["weight"] + values["bias"]
        return discrete_time_loss(logits, time[None], event[None], edges)

    each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0, 0))
    together = each(weights, features, times, events)
    for row in range(30):
        values = {name: value.clone().requires_grad_() for name, value in weights.items()}
        one(values, features[row], times[row], events[row]).backward()
        for name, value in values.items():
            assert torch.allclose(together[name][row], value.grad, atol=1e-14)
    # The mean of the patients' gradients is the gradient of the batch.
    values = {name: value.clone().requires_grad_() for name, value in weights.items()}
    logits = features @ values["weight"] + values["bias"]
    discrete_time_loss(logits, times, events, edges).backward()
    for name, value in values.items():
        assert torch.allclose(together[name].mean(0), value.grad, atol=1e-14)


def test_discrete_fit_equals_logistic_regression_of_the_intervals_lived_through():
    features, times, events = cohort(250, 8)
    edges = interval_edges(12, 4)
    rows, labels = [], []
    for x, time, event in zip(features, times, events, strict=True):
        for interval, (start, end) in enumerate(itertools.pairwise(edges.tolist())):
            if (failed := event and start < time <= end) or time >= end:
                rows.append([*np.eye(4)[interval], *x])
                labels.append(failed)
    reference = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000)
    reference.fit(rows, np.asarray(labels, dtype=int))
    x, t, e = tensors(features, times, events)
    best = fitted(lambda b: discrete_time_loss(b[:4] + (x @ b[4:])[:, None], t, e, edges), 7)
    assert np.allclose(best, reference.coef_[0], atol=1e-4)


def test_discrete_loss_of_huge_logits_is_finite():
    logits = torch.tensor([[-1e4, 1e4, 3.0]], requires_grad=True)
    loss = discrete_time_loss(logits, torch.tensor([0.5]), torch.tensor([1]), interval_edges(3, 3))
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert logits.grad.tolist() == [[-1, 0, 0]]


def test_discrete_loss_of_half_precision_is_summed_in_single():
    rng = np.random.default_rng(15)
    _, times, events = tensors(*cohort(300, 15))
    half = torch.as_tensor(rng.normal(size=(300, 7))).to(torch.bfloat16)
    loss = discrete_time_loss(half, times, events, interval_edges(21, 7))
    exact = discrete_time_loss(half.double(), times, events, interval_edges(21, 7))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_a_time_on_an_edge_is_on_it_in_single_precision_too():
    edges = interval_edges(1, 10)
    logits = torch.linspace(-2, 2, 10)[None]
    time = torch.tensor([0.3], dtype=torch.float32)
    for kind in (torch.float32, torch.float64):
        loss = discrete_time_loss(logits, time, torch.tensor([1]), edges.to(kind))
        exact = slow_discrete_loss(logits.tolist(), [0.25], [1], np.linspace(0, 1, 11))
        assert loss.item() == pytest.approx(exact, rel=1e-6)
    days = discrete_time_loss(logits, torch.tensor([2]), torch.tensor([1]), interval_edges(5, 10))
    assert days.item() == pytest.approx(
        slow_discrete_loss(logits.tolist(), [2], [1], np.linspace(0, 5, 11)), rel=1e-6
    )


def test_shapes_that_do_not_fit_are_refused():
    edges = interval_edges(3, 3)
    with pytest.raises(
        InputError,
        match=says(
            "logits must have shape (n, intervals) and edges (intervals + 1,), got (2, 4) and (4,)"
        ),
    ):
        discrete_time_loss(torch.zeros(2, 4), torch.ones(2), torch.ones(2), edges)
    with pytest.raises(
        InputError,
        match=says("one row a patient is needed in each, got rows of logits 2, times 2, events 1"),
    ):
        discrete_time_loss(torch.zeros(2, 3), torch.ones(2), torch.ones(1), edges)
    with pytest.raises(InputError, match=says("count must be at least 1 interval, got 0")):
        interval_edges(3, 0)
    with pytest.raises(InputError, match=says("horizon must be a finite number above 0, got nan")):
        interval_edges(math.nan, 3)


def test_survival_and_risk_from_hazards_worked_by_hand():
    assert interval_edges(3, 2).tolist() == [0, 1.5, 3]
    logits = np.log([[1, 1 / 3], [1 / 3, 1]])
    curves = survival_from_hazards(logits)
    assert np.allclose(curves, [[1, 1 / 2, 3 / 8], [1, 3 / 4, 3 / 8]], atol=1e-15)
    # Trapezoids: 3/4 + 7/16 and 7/8 + 9/16.
    assert np.allclose(risk_from_hazards(logits), [-19 / 16, -23 / 16], atol=1e-15)
    extreme = np.array([[1000.0, 0], [-1000, -1000]])
    assert survival_from_hazards(extreme).tolist() == [[1, 0, 0], [1, 1, 1]]
    assert risk_from_hazards(extreme).tolist() == [-0.5, -2]


# Concordance


def test_concordance_worked_by_hand():
    # Times 1, 2, 2+, 3 with risks 4, 1, 1, 2: pairs of the first with three, all right; of the
    # second with who left at that time (tied) and with the last (wrong).
    counts = concordance([1, 2, 2, 3], [1, 1, 0, 1], [4, 1, 1, 2])
    assert counts == (3, 1, 5)
    assert counts.comparable == 5
    assert concordance_index([1, 2, 2, 3], [1, 1, 0, 1], [4, 1, 1, 2]) == pytest.approx(3.5 / 5)


def test_concordance_equals_lifelines_and_scikit_survival_with_ties():
    for seed in range(30):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(3, 120))
        times, risks = rng.integers(1, 15, count), rng.integers(-6, 6, count)
        events = rng.integers(0, 2, count)
        events[times.argmin()] = 1
        concordant, tied, comparable = concordance(times, events, risks)
        index = (concordant + tied / 2) / comparable
        assert index == pytest.approx(lifelines_index(times, -risks, events), abs=1e-12)
        assert concordance_index(times, events, risks) == pytest.approx(index, abs=1e-12)
        reference = sksurv_metrics.concordance_index_censored(events == 1, times, risks)
        assert (concordant, tied) == (reference[1], reference[3])
        assert comparable == sum(reference[1:4])


@pytest.mark.parametrize(
    ("times", "events"),
    [([], []), ([3], [1]), ([3, 4], [0, 0]), ([3, 3], [1, 1]), ([3, 2], [1, 0])],
)
def test_without_a_comparable_pair_there_is_no_index(times, events):
    risks = np.arange(len(times))
    assert concordance(times, events, risks) == (0, 0, 0)
    assert concordance_index(times, events, risks) is None


def test_concordance_of_many_patients():
    rng = np.random.default_rng(9)
    times, events = np.ceil(rng.exponential(50, 20_000)), rng.integers(0, 2, 20_000)
    risks = rng.normal(size=20_000).round(2) - times / 50
    concordant, tied, comparable = concordance(times, events, risks)
    assert (concordant + tied / 2) / comparable == pytest.approx(
        lifelines_index(times, -risks, events), abs=1e-12
    )


# Curves


def test_kaplan_meier_worked_by_hand():
    times, curve = kaplan_meier([2, 1, 2, 3, 2], [1, 0, 1, 1, 0])
    assert times.tolist() == [1, 2, 3]
    assert np.allclose(curve, [1, 2 / 4, 0], atol=1e-15)


@pytest.mark.parametrize("step", [0.0, 2.0])
def test_kaplan_meier_equals_lifelines_and_scikit_survival(step):
    _, times, events = cohort(120, 10, step)
    distinct, curve = kaplan_meier(times, events)
    reference = kaplan_meier_estimator(events == 1, times)
    assert np.array_equal(distinct, reference[0])
    assert np.allclose(curve, reference[1], atol=1e-12)
    fitter = lifelines.KaplanMeierFitter().fit(times, events)
    assert np.allclose(curve, fitter.survival_function_at_times(distinct), atol=1e-10)


def test_curves_of_few_patients():
    assert [list(part) for part in kaplan_meier([], [])] == [[], []]
    assert [list(part) for part in kaplan_meier([4], [1])] == [[4], [0]]
    assert [list(part) for part in kaplan_meier([4, 4], [0, 0])] == [[4], [1]]
    for events in ([], [0]):
        nobody = survival.breslow([4.0] * len(events), events, [1.0] * len(events))
        assert survival.survival_of_cox(nobody, [2], [1, 9]).tolist() == [[1, 1]]


def test_breslow_worked_by_hand():
    # Hazards 1, 2, 3; two events at time 2 among all, one at 5 of the last.
    baseline = survival.breslow([2, 5, 2], [1, 1, 1], np.log([1, 3, 2]))
    assert baseline[0].tolist() == [2, 5]
    assert np.allclose(baseline[1], [2 / 6, 2 / 6 + 1 / 3], atol=1e-15)
    curves = survival.survival_of_cox(baseline, np.log([1, 6]), [1, 2, 4.9, 5, 80])
    third, all_of_it = math.exp(-1 / 3), math.exp(-2 / 3)
    expected = np.array([1, third, third, all_of_it, all_of_it])
    assert np.allclose(curves, [expected, expected**6], atol=1e-15)


@pytest.mark.parametrize("step", [0.0, 2.0])
def test_breslow_equals_scikit_survival_and_lifelines(step):
    features, times, events = cohort(120, 11, step)
    scores = features @ [0.7, -0.4, 0.1]
    distinct, cumulative = survival.breslow(times, events, scores)
    reference = BreslowEstimator().fit(scores, events == 1, times)
    assert np.array_equal(distinct, reference.cum_baseline_hazard_.x)
    assert np.allclose(cumulative, reference.cum_baseline_hazard_.y, atol=1e-12)
    frame = pd.DataFrame(features, columns=list("abc")).assign(time=times, event=events)
    fitter = lifelines.CoxPHFitter().fit(frame, "time", "event")
    scores = features @ fitter.params_.to_numpy()
    at = np.unique(times)
    curves = survival.survival_of_cox(survival.breslow(times, events, scores), scores, at)
    reference = fitter.predict_survival_function(frame).to_numpy().T
    assert np.allclose(curves, reference, atol=1e-10)


def test_survival_by_huge_log_hazards_is_a_probability():
    times, events = [1, 2, 3, 4], [1, 1, 0, 1]
    for scores in ([2e3, -2e3, 0, 5], [-2e3] * 4, [2e3] * 4):
        baseline = survival.breslow(times, events, scores)
        curves = survival.survival_of_cox(baseline, [*scores, 0], [0.5, 1, 2.5, 9])
        assert ((curves >= 0) & (curves <= 1)).all()
        assert (curves[:, 0] == 1).all()


# Brier score


def outcomes(times, events):
    kinds = [("event", bool), ("time", float)]
    return np.array([(bool(e), t) for t, e in zip(times, events, strict=True)], dtype=kinds)


def test_brier_score_worked_by_hand():
    # Of four training rows one is censored at 2, when three are left, another at 6: the curve of
    # being censored is 2/3 from 2 on and 0 from 6 on.
    train = ([1, 2, 4, 6], [1, 0, 1, 0])
    times, events = [1, 2, 3, 7], [1, 0, 1, 1]
    at_3 = [0.5, 0.9, 0.4, 0.8]
    # The first had the event before anybody was censored; the second is left out.
    expected = (0.5**2 + 0.4**2 / (2 / 3) + 0.2**2 / (2 / 3)) / 4
    columns = np.stack([[1, 1, 1, 1], at_3, at_3, at_3], axis=1)
    scores = brier_at(*train, times, events, columns, [0.5, 3, 6, 7])
    assert scores[:2] == pytest.approx([0, expected], abs=1e-15)
    assert np.isnan(scores[2:]).all()
    whole = integrated_brier_score(*train, times, events, columns, [0.5, 3, 6, 7])
    assert whole == pytest.approx(expected / 2, abs=1e-15)


def test_who_has_the_event_is_not_censored_at_that_time():
    # At time 2 one has the event and two of the three that are left are censored.
    scores = brier_at([2, 2, 2, 5], [1, 0, 0, 1], [3, 9], [0, 0], [[0.3], [0.5]], [2])
    assert scores[0] == pytest.approx((0.7**2 + 0.5**2) / 2 * 3, abs=1e-12)


@pytest.mark.parametrize("step", [0.0, 1.0])
def test_integrated_brier_score_equals_scikit_survival(step):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        _, train_times, train_events = cohort(200, 20 + seed, step)
        _, times, events = cohort(60, 40 + seed, step)
        within = times <= train_times.max()
        times, events = times[within], events[within]
        grid = np.unique(np.linspace(times.min(), min(times.max(), 12) - 0.01, 25))
        if step:
            grid = np.unique(np.concatenate([grid, np.arange(2.0, 9)]))
        curves = np.sort(rng.random((len(times), len(grid))), axis=1)[:, ::-1]
        train, test = outcomes(train_times, train_events), outcomes(times, events)
        given = (train_times, train_events, times, events, curves, grid)
        reference = sksurv_metrics.integrated_brier_score(train, test, curves, grid)
        assert integrated_brier_score(*given) == pytest.approx(reference, abs=1e-10)
        _, references = sksurv_metrics.brier_score(train, test, curves, grid)
        assert np.allclose(brier_at(*given), references, atol=1e-10)


def test_the_score_is_defined_at_the_last_training_time():
    # Nobody was censored: the mean of 0.5, 0.1 and 0.9 squared.
    scores = brier_at(
        [1, 2], [1, 1], [1, 3, 9], [1, 1, 0], [[0.5] * 2, [0.9] * 2, [0.1] * 2], [2, 3]
    )
    assert scores[0] == pytest.approx((0.25 + 0.01 + 0.81) / 3, abs=1e-15)
    assert np.isnan(scores[1])


def test_times_at_which_the_score_is_not_defined_are_left_out():
    rng = np.random.default_rng(12)
    _, train_times, train_events = cohort(100, 13)
    _, times, events = cohort(50, 14)
    grid = np.linspace(0, times.max() * 2, 40)
    curves = np.sort(rng.random((50, 40)), axis=1)[:, ::-1]
    end = min(times.max(), train_times.max())
    kept = grid < end
    whole = integrated_brier_score(train_times, train_events, times, events, curves, grid)
    part = integrated_brier_score(
        train_times, train_events, times, events, curves[:, kept], grid[kept]
    )
    assert 2 < kept.sum() < 40
    assert whole == part
    assert whole is not None


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        # One row, which has the event later: only its probability counts.
        (([9.0], [1]), ([5.0], [1]), 0.25),
        (([9.0], [0]), ([5.0], [0]), 0.25),
        (([9.0, 9.0], [0, 0]), ([5.0, 5.0], [0, 0]), 0.25),
        # The grid lies beyond one of the two, or all of the training rows were censored before.
        (([9.0], [1]), ([1.0], [1]), None),
        (([1.0], [1]), ([9.0], [1]), None),
        (([1.0, 9.0], [0, 0]), ([9.0], [1]), 0.5),
        (([0.5, 0.5], [0, 0]), ([9.0], [1]), None),
        (([], []), ([9.0], [1]), None),
        (([9.0], [1]), ([], []), None),
    ],
)
def test_brier_scores_of_few_patients(train, test, expected):
    grid, curves = [1, 2, 3], np.full((len(test[0]), 3), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score = integrated_brier_score(*train, *test, curves, grid)
    assert score == (None if expected is None else pytest.approx(expected, abs=1e-15))


def test_brier_scores_refuse_what_is_out_of_range():
    good = {
        "train_times": [1, 2, 3],
        "train_events": [1, 0, 1],
        "times": [1, 4],
        "events": [1, 0],
        "survival": [[0.9, 0.5], [0.8, 0.7]],
        "grid": [1, 2],
    }
    assert integrated_brier_score(**good) is not None
    cases = {
        "survival must have the shape (2, 2), a row a patient and a column a time of grid, "
        "got (2,)": {"survival": [0.9, 0.5]},
        "survival must be from 0 to 1; row 1 is not": {"survival": [[0.9, 0.5], [0.8, math.nan]]},
        "grid must ascend; index 1 has 2 after 2": {"grid": [2, 2]},
        "grid must be finite; row 1 has inf": {"grid": [2, math.inf]},
        "times must be 0 or more; row 0 has -1": {"times": [-1, 4]},
        "events must be 0 or 1; row 1 has 0.5": {"train_events": [1, 0.5, 1]},
    }
    for text, change in cases.items():
        with pytest.raises(InputError, match=says(text)):
            integrated_brier_score(**good | change)


def test_outcomes_out_of_range_are_refused_with_their_row():
    cases = {
        "times must be finite; row 1 has nan": ([1, math.nan], [0, 1]),
        "times must be finite; row 0 has inf": ([math.inf, 1], [0, 1]),
        "times must be 0 or more; row 1 has -1": ([1, -1], [0, 1]),
        "events must be finite; row 0 has nan": ([1, 2], [math.nan, 1]),
        "events must be 0 or 1; row 1 has -1": ([1, 2], [0, -1]),
        "one row a patient is needed in each, got rows of times 2, events 1": ([1, 2], [1]),
        "times must have shape (n,), got (1, 2)": ([[1, 2]], [1, 1]),
        "times must be numbers: could not convert string to float: 'long'": (["long"], [1]),
    }
    for text, given in cases.items():
        for check in (check_outcomes, kaplan_meier):
            with pytest.raises(InputError, match=says(text)):
                check(*given)
    times, events = check_outcomes([2, 1], [True, False])
    assert (times.tolist(), events.tolist()) == ([2, 1], [True, False])


@pytest.mark.parametrize(
    ("function", "name"),
    [(concordance, "risks"), (concordance_index, "risks"), (survival.breslow, "log_hazards")],
)
def test_scores_that_are_not_finite_are_refused(function, name):
    with pytest.raises(InputError, match=says(f"{name} must be finite; row 1 has nan")):
        function([1, 2], [1, 0], [0, math.nan])
    with pytest.raises(
        InputError,
        match=says(f"one row a patient is needed in each, got rows of times 2, {name} 3"),
    ):
        function([1, 2], [1, 0], [0, 1, 2])


def test_patients_who_are_followed_long_enough_count_once():
    times = [5, 9, 10, 12, math.nan, 11]
    patients = ["a", "b", "c", "c", "d", "e"]
    assert followed(times, patients, 10) == 2
    assert followed(times, patients, 12.5) == 0
    assert followed([], [], 1) == 0
