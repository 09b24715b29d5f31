import re

import pytest
from tiny import says, says_of_setting

from fedmed_flower.errors import InputError
from fedmed_flower.settings.text import SETTINGS, assign, expand, override

APP = {"learning-rate": 0.1, "local-epochs": 2, "model": "unet", "resume": False}
KNOWN = {"batch-size": 32, "device": "auto", "delta": 1e-5, "seed": 0}


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
    got = override(APP, [text], {})
    assert got == APP | {key: value}
    assert type(got[key]) is type(APP[key])


def test_override_leaves_the_defaults_and_takes_the_last_of_two():
    before = dict(APP)
    assert override(APP, ["local-epochs=5", "local-epochs=6"], {})["local-epochs"] == 6
    assert before == APP
    assert override(APP, [], {}) == APP


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
    with pytest.raises(InputError, match=says_of_setting(expected)):
        override(APP, [text], {})


NESTED = "{" + ".".join("a" * 3000) + " = 1}"


@pytest.mark.parametrize(
    "raw",
    ["1" + "0" * 400, "[" * 100_000, "{a = " * 100_000, NESTED, "9" * 5000, "0.1\nlearning = 1"],
)
def test_a_value_that_cannot_be_read_is_an_input_error(raw):
    with pytest.raises(InputError, match=r"^learning-rate must be"):
        override(APP, [f"learning-rate={raw}"], {})


def test_a_text_of_settings_stands_for_its_keys():
    assert expand({"seed": 1, SETTINGS: "batch-size = 4\ndevice = 'cpu'"}) == {
        **{"seed": 1, "batch-size": 4, "device": "cpu"}
    }
    assert expand({SETTINGS: "{batch-size = 4, delta = 1e-6}"}) == {"batch-size": 4, "delta": 1e-6}
    assert expand({SETTINGS: "  "}) == {}
    assert expand({"seed": 1}) == {"seed": 1}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("batch-size: 4", "settings must be TOML, such as"),
        ("{batch-size = 4} # comment", ""),
        ("{batch-size = 4}\nseed = 1", "there is something after the table"),
        ("batch-size = 4\nbatch-size = 5", "settings must be TOML"),
        (
            "batch-size = [4]",
            "must be a number, boolean or text, got a list",
        ),
        ("[more]\nseed = 1", "more in settings must be a number, boolean or text, got a dict"),
        ("seed = 2024-01-01", "seed in settings must be a number, boolean or text, got a date"),
        ("seed = " + "9" * 5000, "settings must be TOML"),
        ("seed = " + "[" * 5000, "settings must be TOML"),
        ("#" * (2**20 + 1), "settings must have at most 1,048,576 letters, got 1,048,577"),
        (7, "settings must be TOML, such as 'local-epochs = 2' or"),
        ("seed = 1", "seed is given twice, by itself (2) and in settings (1): give it once"),
    ],
)
def test_a_text_of_settings_that_can_be_read_in_two_ways_or_none_is_refused(text, reason):
    if not reason:
        assert expand({SETTINGS: text}) == {"batch-size": 4}
        return
    with pytest.raises(InputError, match=re.escape(reason)):
        expand({"seed": 2, SETTINGS: text})


def test_a_key_that_the_app_does_not_declare_goes_into_the_text():
    app = APP | {SETTINGS: "seed = 3"}
    config = override(app, ["batch-size=8", "device=cpu", "local-epochs=9", "seed=5"], KNOWN)
    assert config.keys() == app.keys()
    assert config["local-epochs"] == 9
    assert expand(config) == {
        **APP,
        **{"local-epochs": 9, "batch-size": 8, "device": "cpu", "seed": 5},
    }
    assert override(app, [], KNOWN) == app
    with pytest.raises(
        InputError, match=says_of_setting("batch-size must be of type int, got 'few'")
    ):
        override(app, ["batch-size=few"], KNOWN)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "batch-size=few",
            "batch-size must be of type int, got 'few'; see `fedmed settings --search batch-size`",
        ),
        (
            "delta=1" + "0" * 400,
            "delta must be a number between -1e308 and 1e308; see `fedmed settings --search delta`",
        ),
        (
            "resume=1",
            "resume must be of type bool, got 1; see `fedmed settings --search resume`",
        ),
        # The app's own.
        (
            "depth=deep",
            "depth must be of type int, got 'deep'; see `fedmed settings APP --search depth`",
        ),
        (
            "local-epoch=5",
            "the app has no setting 'local-epoch': did you mean local-epochs? see "
            "`fedmed settings --search local-epochs`",
        ),
        (
            "dept=5",
            "the app has no setting 'dept': did you mean depth? see "
            "`fedmed settings APP --search depth`",
        ),
    ],
)
def test_an_error_about_a_setting_ends_with_where_to_read_more_of_it(text, expected):
    with pytest.raises(InputError) as error:
        override(APP | {"depth": 2}, [text], KNOWN)
    assert str(error.value) == expected


def test_what_is_given_twice_says_where_to_read_more_of_it():
    with pytest.raises(InputError) as error:
        expand({"seed": 2, SETTINGS: "seed = 1"})
    assert str(error.value) == (
        "seed is given twice, by itself (2) and in settings (1): give it once; see "
        "`fedmed settings --search seed`"
    )


def test_an_app_without_the_text_is_told_to_declare_it():
    with pytest.raises(InputError) as error:
        override(APP, ["batch-size=8"], KNOWN)
    assert str(error.value) == (
        "the app does not declare batch-size, and Flower refuses an undeclared key: add "
        'settings = "" to [tool.flwr.app.config] of its pyproject.toml, which then takes any '
        "setting"
    )


def test_texts_with_quotes_and_lines_survive_the_text_of_settings():
    for text in ("a \"b\" 'c'", "two\nlines", "{x = 1}", "back\\slash", "ünï"):
        config = assign({SETTINGS: ""}, {"model": text})
        assert expand(config) == {"model": text}


def test_an_unknown_key_gets_the_nearest_name_or_where_they_are_listed():
    many = {f"key-{number}": 0 for number in range(20)}
    with pytest.raises(
        InputError,
        match=says("the app has no setting 'zz': `fedmed settings` lists those there are"),
    ):
        override(APP, ["zz=1"], many)
    with pytest.raises(InputError, match="did you mean batch-size"):
        override(APP, ["batch_sice=1"], KNOWN)
