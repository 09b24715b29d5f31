from dataclasses import dataclass

import pytest
from tiny import says_of_setting

from fedmed_flower.errors import InputError
from fedmed_flower.settings import OneOf, Section, Within, setting


@dataclass(frozen=True)
class Training(Section):
    local_epochs: int = setting(1, "Passes.", Within(1), "passes")
    learning_rate: float = setting(0.01, "Of the optimizer.", Within(0.0, above=True))
    optimizer: str = setting("adam", "", OneOf(("adam", "sgd")))
    amp: bool = False


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
        ({"optimizer": "lion"}, "optimizer must be one of adam, sgd, got 'lion'"),
    ],
)
def test_section_says_what_is_wrong(config, text):
    with pytest.raises(InputError, match=says_of_setting(text, ["amp"])):
        Training.from_run_config(config)


def test_a_number_too_large_for_a_float_is_an_input_error():
    with pytest.raises(InputError, match="learning-rate"):
        Training.from_run_config({"learning-rate": 10**400})


def test_bounds_hold_where_the_section_is_made_by_hand():
    with pytest.raises(
        InputError, match=says_of_setting("local-epochs must be at least 1, got -1")
    ):
        Training(local_epochs=-1)
