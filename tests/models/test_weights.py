import hashlib

import pytest
import torch
from safetensors.torch import save_file
from tiny import halves, says
from torch import nn

from fedmed_flower import InputError
from fedmed_flower.models.trainable import Travelling
from fedmed_flower.models.weights import read_weights


def written(path, state):
    save_file({name: value.clone().contiguous() for name, value in state.items()}, path)
    return path


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_file_is_read_with_its_checksum(tmp_path):
    model = halves()
    path = written(tmp_path / "w.safetensors", model.state_dict())
    weights = read_weights(path)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert weights.path == str(path)
    for name, value in model.state_dict().items():
        assert torch.equal(weights.state[name], value)


def test_all_or_the_part_that_travels_is_loaded(tmp_path):
    first = halves(0)
    for state in (values(first), {k: v for k, v in values(first).items() if "head" in k}):
        for value in (state["head.weight"], state["head.bias"]):
            value += 1
        model = halves(0)
        weights = read_weights(written(tmp_path / "w.safetensors", state))
        weights.load_into(model, Travelling(model, "head.*"))
        assert torch.equal(model.head.weight, first.head.weight + 1)
        assert torch.equal(model.stem[1].weight, first.stem[1].weight)


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "trainable", "text"),
    [
        (
            lambda state: state | {"head.bias": torch.zeros(3)},
            "",
            "{} does not fit the network of the app: head.bias is float32 (3,) and must be "
            "float32 (2,)",
        ),
        (
            lambda state: state | {"head.bias": torch.zeros(2, dtype=torch.float64)},
            "",
            "{} does not fit the network of the app: head.bias is float64 (2,) and must be "
            "float32 (2,)",
        ),
        (
            without("head.bias"),
            "",
            "{} does not fit the network of the app: head.bias is missing and must be float32 (2,)",
        ),
        (
            lambda state: state | {"tail": torch.zeros(1)},
            "",
            "{} does not fit the network of the app, which has no tail",
        ),
        (
            lambda state: state | {"head.bias": torch.tensor([0.0, float("nan")])},
            "",
            "{} holds NaN or infinite values in head.bias: its run has diverged; give the weights "
            "of another",
        ),
        (
            lambda state: state | {"stem.1.bias": state["stem.1.bias"] + 1},
            "head.*",
            "{} has other values of stem.1.bias than the network of the app, and neither trainable "
            "nor lora names that entry: each hospital builds it itself; build it there with the "
            "same values (such as by the seed of the run that trained the weights), or let it "
            "travel (trainable)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, trainable, text, tmp_path):
    path = written(tmp_path / "w.safetensors", change(values(halves(0))))
    model = halves(0)
    with pytest.raises(InputError, match=says(text.format(path))):
        read_weights(path).load_into(model, Travelling(model, trainable))


def test_what_is_no_file_of_weights(tmp_path):
    with pytest.raises(InputError, match=r"absent cannot be read: No such file or directory$"):
        read_weights(tmp_path / "absent")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match=r"text is no file of weights \(.safetensors\): "):
        read_weights(tmp_path / "text")
    whole = written(tmp_path / "whole", values(nn.Linear(3, 1))).read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-4])
    with pytest.raises(InputError, match="cut is no file of weights"):
        read_weights(tmp_path / "cut")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "whole")
    with pytest.raises(InputError, match="link cannot be read: a link leads out of the folder"):
        read_weights(tmp_path / "inside" / "link")
