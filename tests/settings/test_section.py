import re
from dataclasses import dataclass

import pytest

from fedmed_flower.errors import InputError
from fedmed_flower.settings.section import Section, override

APP = {"learning-rate": 0.1, "local-epochs": 2, "model": "unet", "resume": False}


@dataclass(frozen=True)
class Training(Section):
    local_epochs: int = 1
    learning_rate: float = 0.01
    optimizer: str = "adam"
    amp: bool = False

    def __post_init__(self) -> None:
        self.require_at_least(1, "local_epochs")
        self.require_positive("learning_rate")
        self.require("optimizer", self.optimizer in ("adam", "sgd"), "adam or sgd")


def exactly(text: str) -> str:
    return f"^{re.escape(text)}$"


def test_section_takes_its_keys_and_leaves_the_others():
    got = Training.from_run_config({"local-epochs": 3, "amp": True, "somebody-elses": 1})
    assert got == Training(local_epochs=3, amp=True)


def test_section_ignores_the_field_name_as_key():
    assert Training.from_run_config({"local_epochs": 3}) == Training()


def test_an_int_stands_for_a_float():
    got = Training.from_run_config({"learning-rate": 1})
    assert got.learning_rate == 1.0
    assert type(got.learning_rate) is float


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"local-epochs": "3"}, "local-epochs must be of type int, got '3'"),
        ({"local-epochs": 3.0}, "local-epochs must be of type int, got 3.0"),
        ({"local-epochs": True}, "local-epochs must be of type int, got True"),
        ({"learning-rate": True}, "learning-rate must be of type float, got True"),
        ({"learning-rate": "fast"}, "learning-rate must be of type float, got 'fast'"),
        ({"amp": 1}, "amp must be of type bool, got 1"),
        ({"optimizer": 1}, "optimizer must be of type str, got 1"),
        ({"local-epochs": 0}, "local-epochs must be at least 1, got 0"),
        ({"learning-rate": 0.0}, "learning-rate must be above 0 and finite, got 0.0"),
        ({"learning-rate": -1}, "learning-rate must be above 0 and finite, got -1.0"),
        (
            {"learning-rate": float("inf")},
            "learning-rate must be above 0 and finite, got inf",
        ),
        (
            {"learning-rate": float("nan")},
            "learning-rate must be above 0 and finite, got nan",
        ),
        ({"optimizer": "lion"}, "optimizer must be adam or sgd, got 'lion'"),
    ],
)
def test_section_says_what_is_wrong(config, text):
    with pytest.raises(InputError, match=exactly(text)):
        Training.from_run_config(config)


def test_a_number_too_large_for_a_float_is_an_input_error():
    with pytest.raises(InputError, match="learning-rate"):
        Training.from_run_config({"learning-rate": 10**400})


def test_bounds_hold_where_the_section_is_made_by_hand():
    with pytest.raises(InputError, match=exactly("local-epochs must be at least 1, got -1")):
        Training(local_epochs=-1)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("local-epochs=5", "local-epochs", 5),
        (" local-epochs = 5 ", "local-epochs", 5),
        ("learning-rate=1e-3", "learning-rate", 0.001),
        ("learning-rate=2", "learning-rate", 2.0),
        ("resume=true", "resume", True),
        ("model=resnet", "model", "resnet"),
        ("model='resnet'", "model", "resnet"),
        ('model="res net"', "model", "res net"),
        ("model=a=b", "model", "a=b"),
        ("model=", "model", ""),
        ("model=true", "model", "true"),
        ("model=18", "model", "18"),
        ("model=[1, 2]", "model", "[1, 2]"),
        ("model='a'\nb = 1", "model", "'a'\nb = 1"),
        ("model=" + "9" * 5000, "model", "9" * 5000),
        ("model=2024-01-01", "model", "2024-01-01"),
        ("model=C:\\data\\new", "model", "C:\\data\\new"),
        ("model=/data/a#b", "model", "/data/a#b"),
    ],
)
def test_override_reads_the_value_as_the_default_is_typed(text, key, value):
    got = override(APP, [text])
    assert got == APP | {key: value}
    assert type(got[key]) is type(APP[key])


def test_override_leaves_the_defaults_and_takes_the_last_of_two():
    before = dict(APP)
    assert override(APP, ["local-epochs=5", "local-epochs=6"])["local-epochs"] == 6
    assert before == APP
    assert override(APP, []) == APP


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("local-epochs", "-c takes key=value, got 'local-epochs'"),
        ("=5", "-c takes key=value, got '=5'"),
        ("", "-c takes key=value, got ''"),
        ("local-epoch=5", "the app has no setting 'local-epoch': did you mean local-epochs?"),
        ("local_epochs=5", "the app has no setting 'local_epochs': did you mean local-epochs?"),
        (
            "zzz=5",
            "the app has no setting 'zzz': known: learning-rate, local-epochs, model, resume",
        ),
        ("local-epochs=five", "local-epochs must be of type int, got 'five'"),
        ("local-epochs=", "local-epochs must be of type int, got ''"),
        ("local-epochs=5.0", "local-epochs must be of type int, got 5.0"),
        ("local-epochs=true", "local-epochs must be of type int, got True"),
        ("learning-rate=true", "learning-rate must be of type float, got True"),
        ("resume=1", "resume must be of type bool, got 1"),
        ("resume=True", "resume must be of type bool, got 'True'"),
    ],
)
def test_override_says_what_is_wrong(text, expected):
    with pytest.raises(InputError, match=exactly(expected)):
        override(APP, [text])


NESTED = "{" + ".".join("a" * 3000) + " = 1}"


@pytest.mark.parametrize(
    "raw",
    ["1" + "0" * 400, "[" * 100_000, "{a = " * 100_000, NESTED, "9" * 5000, "0.1\nlearning = 1"],
)
def test_a_value_that_cannot_be_read_is_an_input_error(raw):
    with pytest.raises(InputError, match=r"^learning-rate must be"):
        override(APP, [f"learning-rate={raw}"])
