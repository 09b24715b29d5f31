"""What a report says of secure sums, also of a summary that a stranger wrote."""

import pytest
from html_pages import Page

from fedmed_flower.reports.secure import in_words, section, sums


def summary(*listed):
    return {"secure": {"sums": [[*one] for one in listed]}}


def test_sums_are_listed_by_the_hospitals_that_they_are_over():
    three = ["east", "north", "south"]
    page = Page(
        section(
            summary(
                (0, "count", [*three, "west"]),
                (1, "train", [*three, "west"]),
                (2, "train", [*three, "west"]),
                (3, "train", three),
                (5, "train", [*three, "west"]),
                (5, "evaluate/test", [*three, "west"]),
                (5, "evaluate/test", [*three, "west"]),
            )
        )
    )
    (rows,) = page.tables.values()
    everybody = ["4", "east, north, south, west"]
    assert rows[1:] == [
        ["number of training records", "0", *everybody],
        ["change of the model", "1 to 2, 5", *everybody],
        ["change of the model", "3", "3", "east, north, south"],
        ["figures of test records", "5", *everybody],
    ]


def test_the_number_of_hospitals_is_said_in_words():
    said = in_words(summary((1, "train", ["a", "b", "c"]), (2, "train", ["a", "b", "c", "d"])))
    assert (
        said == "The server has seen sums over 3 to 4 hospitals and no single hospital’s figures."
    )


def test_figures_of_hospitals_that_tell_their_own_have_a_table():
    content = summary((1, "evaluate/test", ["a", "b", "c"]))
    content["secure"]["told"] = {
        "c": {"num-examples": 31, "auc": 0.75, "loss": 0.5},
        "<b>": {"num-examples": 4, "auc": 1.0},
    }
    page = Page(section(content))
    rows = next(table for caption, table in page.tables.items() if caption.startswith("Own"))
    assert rows == [
        ["Hospital", "Test records", "AUC", "Loss"],
        ["<b>", "4", "1.000", "–"],
        ["c", "31", "0.750", "0.500"],
    ]
    assert in_words(content).endswith("figures but those of <b>, c, which told their own.")


@pytest.mark.parametrize("strange", [3, [1], {"a": 3}, {"a": {"auc": "high"}}])
def test_told_figures_that_are_none_are_left_out(strange):
    content = summary((1, "train", ["a", "b", "c"]))
    content["secure"]["told"] = strange
    assert "high" not in section(content)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"secure": None},
        {"secure": {"sums": 3}},
        summary(("1", "train", ["a"]), (1, "train", 2)),
    ],
)
def test_a_run_without_sums_says_nothing_of_them(content):
    assert sums(content) == []
    assert section(content) == in_words(content) == ""


def test_names_are_text():
    page = section(summary((1, "<b>", ["<script>"])))
    assert "<script>" not in page
    assert "<b>" not in page
