import json

import numpy as np
import pytest
import torch
from eyes import Grades, run_eyes
from scipy.special import expit
from sklearn.metrics import cohen_kappa_score, mean_absolute_error
from tiny import ask, context_of, fixed, make_rows, model_arrays, says
from torch import nn

from fedmed_flower import GradingClient, InputError, SiteData
from fedmed_flower.clients.grading import _AboveEach, above_each


class Stages(GradingClient):
    """Grades images of two by two."""

    grades = ("none", "mild", "severe")
    image_shape = (1, 2, 2)

    def build_model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

    def load_data(self, site):
        raise NotImplementedError


def rows_of(count, seed=0, name="p"):
    return make_rows(count, seed, name, classes=3)


def start():
    return model_arrays(lambda: Stages.build_model(None))


def test_two_hospitals_learn_grades(tmp_path):
    run_eyes(tmp_path, Grades, 4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    together = summary["test"]["federated"]
    assert together["quadratic-kappa"] > 0.7
    assert together["mae"] < 0.8
    assert together["auc@grade=moderate or above"] > 0.9
    page = (tmp_path / "report.html").read_text()
    assert "quadratic weighted kappa" in page.lower()
    assert "By grade" in page


def test_log_odds_never_rise_and_the_first_is_the_output_itself():
    outputs = torch.tensor([[1.0, -3.0, 2.0], [-2.0, 0.0, -30.0]])
    above = above_each(outputs)
    falls = np.log1p(np.exp(outputs[:, 1:].numpy().astype(float))).cumsum(axis=1)
    expected = outputs[:, :1].numpy() - falls
    np.testing.assert_allclose(above[:, 1:], expected, rtol=1e-6)
    assert torch.equal(above[:, 0], outputs[:, 0])
    assert (above.diff(dim=1) <= 0).all()


def test_the_loss_asks_of_each_grade_whether_it_is_passed():
    outputs = torch.tensor([[0.5, 1.0], [-1.0, 0.3]])
    labels = torch.tensor([1, 2])
    passed = expit(above_each(outputs).double().numpy())
    truth = np.array([[1, 0], [1, 1]])
    expected = -np.log(np.where(truth, passed, 1 - passed)).mean()
    assert _AboveEach()(outputs, labels).item() == pytest.approx(expected, rel=1e-5)


def test_what_is_given_is_the_median_and_figures_are_those_of_scikit_learn():
    rows = rows_of(30)
    client = fixed(SiteData(rows), Stages)(context_of())
    torch.manual_seed(1)
    model = client.build_model()
    prepared = client.prepare(rows, train=False)
    shares = client.predict(model, prepared)
    assert shares.shape == (30, 3)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    guess = (1 - shares.cumsum(axis=1)[:, :-1] > 0.5).sum(axis=1)
    truth = [row["label"] for row in rows]
    found = client.measure(model, prepared)
    assert len({*guess.tolist()}) > 1
    assert found["quadratic-kappa"] == pytest.approx(
        cohen_kappa_score(truth, guess, weights="quadratic")
    )
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, guess))


@pytest.mark.parametrize(
    "names", ["none", ("a", "b"), ("a", "a", "b"), ("a", "b", "c=d"), (0, 1, 2)]
)
def test_grades_that_cannot_be_are_refused(names):
    client = fixed(SiteData(rows_of(3)), Stages, grades=names)(context_of())
    text = (
        "grades must be a tuple of 3 or more different names without @ and =, the lowest first (of "
        f"two grades ClassificationClient makes classes), got {names!r}"
    )
    with pytest.raises(InputError, match=says(text)):
        client.data()


def test_a_network_with_an_output_for_each_grade_is_refused():
    client = fixed(SiteData(rows_of(3)), Stages)(context_of())
    text = "the network returns outputs of shape (2, 3): 3 grades need (rows, 2)"
    with pytest.raises(InputError, match=says(text)):
        client._outputs(torch.zeros(2, 3))


def test_pictures_name_the_grades():
    rows = rows_of(3)
    client = fixed(SiteData(rows), Stages)(context_of())
    model = client.build_model()
    nn.init.zeros_(model[1].weight)
    model[1].bias.data = torch.tensor([3.0, -1.0])
    titles = [picture.title for picture in client.draw(model, client.prepare(rows, False), 3)]
    assert titles == [
        "the highest loss: none, given severe",
        "case 2: mild, given severe",
        "case 3: severe, given severe",
    ]


def test_a_private_round_and_figures_with_noise(tmp_path):
    client = fixed(SiteData(rows_of(12), test=rows_of(12, 1, "t")), Stages)
    context = context_of(run_dir=str(tmp_path), privacy="patient", target_epsilon=8.0)
    reply = ask(client, "train", context, start())
    assert not reply.has_error(), reply.error.reason
    reply = ask(client, "evaluate", context, start(), split="test")
    assert not reply.has_error(), reply.error.reason
    assert "noised-counts" in reply.content["metrics"]
    assert "loss" not in reply.content["metrics"]


def test_without_noise_the_counts_are_those_of_the_rows():
    rows = rows_of(30)
    client = fixed(SiteData(rows), Stages)(context_of())
    torch.manual_seed(1)
    model = client.build_model()
    prepared = client.prepare(rows, train=False)
    found = client.measure_privately(model, prepared, [row["patient"] for row in rows], 0.0)
    plain = client.measure(model, prepared)
    for name in ("num-examples", "accuracy", "mae", "quadratic-kappa"):
        assert found[name] == pytest.approx(plain[name]), name
