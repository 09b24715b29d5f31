import json

import numpy as np
import pytest
import torch
from eyes import Cups, run_eyes
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from tiny import ask, context_of, fixed, make_rows, model_arrays, says
from torch import nn

from fedmed_flower import InputError, MeasurementClient, SiteData


class Age(MeasurementClient):
    """Reads an age from images of two by two."""

    low = 0
    high = 228.0
    unit = "months"
    image_shape = (1, 2, 2)

    def build_model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 1))

    def load_data(self, site):
        raise NotImplementedError


def rows_of(count, seed=0, name="p"):
    rng = np.random.default_rng(seed)
    ages = rng.uniform(0, 228, count)
    return [
        row | {"label": float(age)}
        for row, age in zip(make_rows(count, seed, name), ages, strict=True)
    ]


def start():
    return model_arrays(lambda: Age.build_model(None))


def test_two_hospitals_learn_a_number_and_are_pooled_exactly(tmp_path):
    run_eyes(tmp_path, Cups, 1)
    summary = json.loads((tmp_path / "summary.json").read_text())
    together = summary["test"]["federated"]
    # The numbers are spread evenly over 0.7: to give their middle is wrong by 0.175 on average.
    assert together["mae"] < 0.13
    assert together["r2"] > 0.4
    sites = summary["test"]["sites"]
    # Both have as many rows.
    assert together["mae"] == pytest.approx(np.mean([one["mae"] for one in sites.values()]))
    squares = [one["rmse"] ** 2 for one in sites.values()]
    assert together["rmse"] == pytest.approx(np.mean(squares) ** 0.5)
    assert "MAE" in (tmp_path / "report.html").read_text()


def test_figures_are_in_the_unit_and_those_of_scikit_learn():
    rows = rows_of(20)
    client = fixed(SiteData(rows), Age)(context_of())
    torch.manual_seed(0)
    model = client.build_model()
    prepared = client.prepare(rows, train=False)
    outputs = model(client._rows(prepared, range(20))["image"]).detach().numpy()
    given = 114 + 57 * outputs[:, 0]
    truth = [row["label"] for row in rows]
    np.testing.assert_allclose(client.predict(model, prepared)[:, 0], given, rtol=1e-6)
    found = client.measure(model, prepared)
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, given), rel=1e-5)
    assert found["rmse"] == pytest.approx(root_mean_squared_error(truth, given), rel=1e-5)
    assert found["r2"] == pytest.approx(r2_score(truth, given), rel=1e-5)
    scaled = torch.tensor((np.array(truth) - 114) / 57)
    huber = nn.functional.huber_loss(torch.tensor(outputs[:, 0]).double(), scaled, delta=0.5)
    assert found["loss"] == pytest.approx(huber.item(), rel=1e-5)


@pytest.mark.parametrize("label", [-1, 228.5, np.nan, "100", None, True])
def test_a_number_out_of_the_range_is_rejected(caplog, label):
    rows = rows_of(4)
    rows[2] = rows[2] | {"label": label}
    client = fixed(SiteData(rows), Age)(context_of())
    assert len(client.screened("train")) == 3
    assert (
        f"hospital-1: rejected, train split, patient p-2: label {label!r} must be a number from 0 "
        "to 228 (low and high)"
    ) in caplog.messages


def test_another_unit_stops_the_hospital():
    rows = [row | {"label": 365.0} for row in rows_of(4)]
    client = fixed(SiteData(rows), Age)(context_of())
    with pytest.raises(
        InputError,
        match=r"labels that are no such number, such as that of patient "
        r"p-0: label 365.0 must .*; give numbers in one unit, or declare another low and high$",
    ):
        client.screened("train")


@pytest.mark.parametrize("bounds", [{}, {"low": 0}, {"low": 3, "high": 3}, {"low": 0, "high": "9"}])
def test_bounds_must_be_declared(bounds):
    client = type("Client", (MeasurementClient,), {"load_data": Age.load_data, **bounds})
    made = client(context_of())
    text = (
        "low and high must be the lowest and the highest possible number, such as low = 0 and "
        f"high = 228 for a bone age in months, got {made.low!r} and {made.high!r}"
    )
    with pytest.raises(InputError, match=says(text)):
        made.check(SiteData(rows_of(2)))


def test_pictures_give_both_numbers_in_their_unit():
    rows = rows_of(2)
    client = fixed(SiteData(rows), Age)(context_of())
    model = client.build_model()
    nn.init.zeros_(model[1].weight)
    nn.init.ones_(model[1].bias)
    titles = [picture.title for picture in client.draw(model, client.prepare(rows, False), 2)]
    ages = [row["label"] for row in rows]
    worst = int(np.argmax(np.abs(np.array(ages) - 171)))
    names = ["case 1", "case 2"]
    names[worst] = "the highest loss"
    assert titles == [
        f"{name}: {age:.4g} months, given 171" for name, age in zip(names, ages, strict=True)
    ]


def test_a_private_round_and_figures_with_noise(tmp_path):
    client = fixed(SiteData(rows_of(12), test=rows_of(12, 1, "t")), Age)
    context = context_of(run_dir=str(tmp_path), privacy="patient", target_epsilon=8.0)
    reply = ask(client, "train", context, start())
    assert not reply.has_error(), reply.error.reason
    reply = ask(client, "evaluate", context, start(), split="test")
    assert not reply.has_error(), reply.error.reason
    assert {*reply.content["metrics"]} <= {"num-examples", "mae", "noised-errors", "epsilon"}


def test_without_noise_errors_are_clipped_to_the_range():
    rows = rows_of(4)
    client = fixed(SiteData(rows), Age)(context_of())
    model = client.build_model()
    nn.init.zeros_(model[1].weight)
    nn.init.constant_(model[1].bias, 1e6)
    prepared = client.prepare(rows, train=False)
    found = client.measure_privately(model, prepared, [row["patient"] for row in rows], 0.0)
    assert found["num-examples"] == 4
    assert found["mae"] == pytest.approx(228)
