"""Each setting refuses the values that its bound excludes; unknown keys are refused."""

import re
from dataclasses import dataclass, fields

import pytest

from fedmed_flower.errors import InputError
from fedmed_flower.settings import OneOf, Section, Within, setting
from fedmed_flower.settings.allowed import Matching, Numbers
from fedmed_flower.settings.node import NodeSettings
from fedmed_flower.settings.plan import Plan
from fedmed_flower.settings.registry import (
    RUN,
    choices,
    complete,
    defaults,
    effective,
    entries,
    node_entries,
    require_known,
    sections_of,
)
from fedmed_flower.settings.section import key_of, setting_of
from fedmed_flower.settings.training import Settings

SECTIONS = (*RUN, NodeSettings)
FIELDS = [(section, entry) for section in SECTIONS for entry in fields(section)]
IDS = [f"{section.__name__}-{entry.name}" for section, entry in FIELDS]
OTHER_TYPES = {bool: [1, "true", 0.5], int: [True, "3", 1.5], float: [True, "0.1"], str: [True, 3]}


@dataclass(frozen=True)
class Mine(Section):
    tissue_type: str = setting("brain", "Which tissue.", OneOf(("brain", "liver")))


@pytest.mark.parametrize(("section", "entry"), FIELDS, ids=IDS)
def test_every_setting_says_what_it_means_and_its_default_is_allowed(section, entry):
    known = setting_of(entry)
    assert known.meaning.endswith((".", ")"))
    if known.allowed is not None:
        assert known.allowed.holds(entry.default)
    if type(entry.default) is int and not isinstance(entry.default, bool):
        assert known.allowed is not None or entry.name in ("partition_id", "num_partitions")


@pytest.mark.parametrize(("section", "entry"), FIELDS, ids=IDS)
def test_every_wrong_value_is_refused_by_key_bound_and_value(section, entry):
    key = key_of(entry.name)
    kind = type(entry.default)
    more = f"; see `fedmed settings --search {key}`"
    for value in OTHER_TYPES[kind]:
        text = f"{key} must be of type {kind.__name__}, got {value!r}{more}"
        with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
            section.from_run_config({key: value})
    allowed = setting_of(entry).allowed
    if allowed is None:
        return
    wrong = allowed.wrong()
    assert wrong
    for value in wrong:
        value = int(value) if kind is int else value
        text = f"{key} must be {allowed.words}, got {value!r}{more}"
        with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
            section.from_run_config({key: value})


def test_a_key_of_several_sections_has_one_default_and_one_meaning():
    # How many rounds a schedule is planned for must be said: 3 would be a guess.
    told_apart = {("num-server-rounds", Settings)}
    first = {}
    for section in RUN:
        for entry in fields(section):
            key = key_of(entry.name)
            if (key, section) not in told_apart:
                known = (entry.default, setting_of(entry))
                assert first.setdefault(key, known) == known, key


def test_every_section_of_the_package_is_in_the_registry():
    def below(cls):
        for sub in cls.__subclasses__():
            yield sub
            yield from below(sub)

    ours = {c for c in below(Section) if c.__module__.startswith("fedmed_flower.settings.")}
    assert ours == {*SECTIONS}
    assert [entry.key for entry in entries(RUN)] == list(defaults())
    assert {entry.where for entry in node_entries()} == {"node config"}


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("target_epsilon", "did you mean target-epsilon?"),
        ("learning_rate", "did you mean learning-rate?"),
        ("learning-rte", "did you mean learning-rate?"),
        ("site-name", "`fedmed settings` lists those there are"),
        ("zzz", "`fedmed settings` lists those there are"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key, hint):
    for config in ({key: 1.0}, {"settings": f"{key} = 1.0"}):
        with pytest.raises(InputError) as error:
            require_known(config)
        nearest = re.findall(r"did you mean (.*)\?", hint)
        assert str(error.value) == (
            f"unknown setting {key!r}: {hint} (an app's own key must be a field of a Section that "
            "its client names in `sections`)"
        ) + "".join(f"; see `fedmed settings --search {known}`" for known in nearest)


def test_keys_of_the_apps_own_are_known_and_checked():
    require_known({"tissue-type": "liver"}, [Mine])
    # The command lists an app's own keys only if it is given the app.
    with pytest.raises(InputError, match=r"did you mean tissue-type.* APP --search"):
        require_known({"tissue_typ": "liver"}, [Mine])
    text = "tissue-type must be one of brain, liver, got 'bone'"
    with pytest.raises(InputError) as error:
        Mine(tissue_type="bone")
    assert str(error.value) == f"{text}; see `fedmed settings APP --search tissue-type`"
    assert defaults([Mine])["tissue-type"] == "brain"
    assert "tissue-type" not in defaults()
    assert choices([Mine]) - choices() == {"tissue-type"}


def test_effective_settings_are_those_given_and_the_defaults_of_the_others():
    got = effective({"settings": "local-epochs = 4"}, [Plan, Settings, Mine])
    assert (got["local-epochs"], got["batch-size"], got["tissue-type"]) == (4, 32, "brain")
    assert got["num-server-rounds"] == 3
    assert "privacy" not in got
    assert complete({"alpha": 1})["alpha"] == 1
    assert complete({"settings": "seed = 9"})["seed"] == 9


def test_sections_are_collected_over_the_bases():
    class Base:
        sections = (Plan,)

    class Client(Base):
        sections = (Mine, Plan)

    assert sections_of(Client) == [Plan, Mine]
    assert sections_of(int) == []


def test_a_field_without_a_default_is_an_error_of_the_programmer():
    @dataclass(frozen=True)
    class Bad(Section):
        rounds: int

    with pytest.raises(TypeError, match=r"Bad\.rounds needs a default"):
        entries([Bad])


@pytest.mark.parametrize(
    ("allowed", "words", "holds"),
    [
        (Within(1), "at least 1", [1, 10**9]),
        (Within(0, 10), "from 0 to 10", [0, 10]),
        (Within(0.0), "at least 0 and finite", [0.0, 1e300]),
        (Within(0.0, above=True), "above 0 and finite", [1e-300]),
        (Within(0.0, 1.0, below=True), "at least 0 and below 1", [0.0, 0.999]),
        (Within(0.0, 1.0, above=True, below=True), "above 0 and below 1", [0.5]),
        (Within(0.5, 1.0, or_zero=True), "from 0.5 to 1, or 0", [0, 0.5, 1]),
        (Within(0.5, 2.0, above=True), "above 0.5 and at most 2", [2.0]),
        (OneOf(("a", "b")), "one of a, b", ["a"]),
        (Numbers(), "empty or numbers above 0 separated by commas", ["", " ", "1,2.5", "1e-3"]),
        (Numbers(whole=True), "empty or numbers above 0 separated by commas", ["8,8", "8.0"]),
        (Matching("a+", "some a", ("b",)), "some a", ["a", "aa"]),
    ],
)
def test_bounds_as_data(allowed, words, holds):
    assert allowed.words == words
    assert all(allowed.holds(value) for value in holds)
    assert not any(allowed.holds(value) for value in allowed.wrong())
