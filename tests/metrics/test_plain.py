import numpy as np
import pytest
import torch
from flwr.app import MetricRecord
from tiny import TinyClient, ask, context_of

from fedmed_flower.errors import InputError
from fedmed_flower.metrics.plain import plain_metrics


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), 1),
        (True, 1),
        (np.array(2.5), 2.5),
        (np.array([1.0, 2.0]), [1.0, 2.0]),
        (torch.tensor(0.25, requires_grad=True), 0.25),
        (torch.tensor([3, 4]), [3, 4]),
        ([np.float64(1), torch.tensor(2)], [1.0, 2.0]),
        ((1, 2.5), [1.0, 2.5]),
        ([], []),
    ],
)
def test_numbers_of_numpy_and_torch_are_taken_as_pythons(value, wanted):
    got = plain_metrics({"m": value})["m"]
    assert got == wanted
    assert type(got) is type(wanted)
    MetricRecord({"m": got})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("good", "got str"),
        (None, "got NoneType"),
        (1j, "got complex"),
        (np.zeros((2, 3)), r"got ndarray of shape \(2, 3\)"),
        (torch.zeros(1, 1), r"got Tensor of shape \(1, 1\)"),
        ([1, "a"], "got list"),
        ({"a": 1}, "got dict"),
    ],
)
def test_what_is_no_number_is_refused_by_the_metrics_name(value, text):
    wanted = f"^the metric odd must be a number or a list of numbers, {text}$"
    with pytest.raises(InputError, match=wanted):
        plain_metrics({"loss": 1.0, "odd": value})


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(InputError, match="the name of a metric must be a text, got 3"):
        plain_metrics({3: 1.0})


class WithNumPy(TinyClient):
    odd = np.float32(1)

    def measure(self, model, prepared):
        return super().measure(model, prepared) | {"extra": self.odd}

    def fit(self, model, prepared, seed):
        return super().fit(model, prepared, seed) | {"extra": self.odd}


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_client_may_return_numpys_numbers(kind):
    reply = ask(WithNumPy, kind, context_of())
    assert reply.content["metrics"]["extra"] == 1.0


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_clients_metric_that_is_no_number_is_named(kind):
    client = type("WithText", (WithNumPy,), {"odd": "good"})
    reply = ask(client, kind, context_of())
    assert "the metric extra must be a number or a list of numbers, got str" in reply.error.reason
