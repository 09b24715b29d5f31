import math

import pytest

from fedmed_flower.approval.rules import Rule, parse, refused, rule_of
from fedmed_flower.errors import InputError


@pytest.mark.parametrize(
    ("text", "allowed", "others"),
    [
        ("n=1..50", [1, 50, 7.5], [0, 51, math.nan, True, "7", math.inf]),
        ("n=-1.5..-0.5", [-1, -0.5], [0, -2]),
        ("n=0.001|0.003", [0.001, 0.003], [0.002, "0.001"]),
        ("n=true", [True], [1, False]),
        ("n=1", [1, 1.0], [True, "1"]),
        ("n=runs/trial", ["runs/trial"], ["runs", ""]),
        ('n="1"', ["1"], [1]),
        ("n=*", [1, "", False, math.nan], []),
    ],
)
def test_what_a_rule_allows_also_from_its_file(text, allowed, others):
    key, rule = parse(text)
    assert key == "n"
    for each in (rule, rule_of("n", rule.content()), parse(f"n={rule.words}")[1]):
        if text == 'n="1"' and each != rule:
            continue  # Its words have no quotes: they are for people.
        assert all(each.allows(value) for value in allowed)
        assert not any(each.allows(value) for value in others)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n", "a setting is allowed by KEY=VALUE"),
        ("n=", "a setting is allowed by KEY=VALUE"),
        ("=1", "a setting is allowed by KEY=VALUE"),
        ("n=5..1", "the range of n is empty: 5 is above 1"),
        ("n=a..b", "the range of n must be of two numbers, got 'a'"),
        ("n=nan..1", "the range of n must be of two numbers, got nan"),
        ("n=true..1", "the range of n must be of two numbers, got True"),
    ],
)
def test_a_rule_that_is_none_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "content",
    [None, 1, {}, {"any": False}, {"any": 1}, {"least": 1}, {"one-of": []}, {"one-of": [[]]},
     {"any": True, "one-of": [1]}, {"least": 1, "most": 2, "x": 3}],
)  # fmt: skip
def test_a_rule_in_a_file_that_is_none_is_refused(content):
    with pytest.raises(InputError, match="the rule of n must be"):
        rule_of("n", content)


def test_every_change_without_a_rule_is_named():
    before = {"a": 1, "b": "x", "c": True, "d": 5}
    after = {"a": 2, "b": "x", "c": 1, "e": "new", "d": 6}
    rules = {"a": Rule((2,)), "d": Rule(low=0, high=5)}
    assert refused(before, after, rules) == [
        "c is 1, allowed is the app's true",
        "d is 6, allowed is the app's 5 or 0..5",
        "e is new, allowed is the app's nothing",
    ]
    assert refused(before, before, {}) == []


def test_a_setting_that_a_run_drops_is_a_change():
    assert refused({"a": 1}, {}, {"a": Rule(any=True)}) == [
        "a is nothing, allowed is the app's 1 or *"
    ]
