"""Texts from files stay texts in Markdown."""

import html
import re

import pytest
from markdown_it import MarkdownIt

from fedmed_flower.reports.markdown import plain, table

HOSTILE = [
    "[click](https://example.org)",
    "![x](https://example.org/x.png)",
    "<script>alert(1)</script>",
    "&lt;b&gt;",
    "| a | b |",
    "`code` and ``more``",
    "**bold** _it_ ~~gone~~",
    "https://example.org www.example.org someone@example.org",
    "<https://example.org>",
    "{{ template }} {role}`x` $x^2$",
    "back\\slash \\| \\[x](y)",
    "[note]: https://example.org",
]


def rendered(text):
    page = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    return page, html.unescape(re.sub(r"<[^>]*>", "", page))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_shown_literally_and_makes_nothing(text):
    page, seen = rendered(f"Name: {plain(text)}.")
    assert seen.strip() == f"Name: {text}."
    assert set(re.findall(r"<(\w+)", page)) == {"p"}


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_cell_stays_in_its_cell(text):
    page, _ = rendered(table(["Name", "Value"], [[plain(text), "1"]]))
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert len(cells) == 2
    assert html.unescape(re.sub(r"<[^>]*>", "", cells[0])) == text
    assert not re.search(r"<(a|img|em|strong|code|s|script)\b", page)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_bare_address_is_left_that_a_reader_makes_a_link_of(text):
    assert not re.search(r"(?i)(?<!\\):\S|www\.|(?<!\\)@", plain(text))


def test_line_breaks_and_control_codes_cannot_start_a_block():
    assert plain("north\n\n# Model card: safe") == "north \\# Model card: safe"
    assert plain("a\x1b[31mb") == "a\\\\x1b\\[31mb"
    assert plain("a\u202eb") == "a\\\\u202eb"
    assert len(plain("x" * 10_000)) == 299


@pytest.mark.parametrize(("value", "shown"), [(None, "–"), ("", "–"), (True, "true"), (0.5, "0.5")])
def test_other_values_are_shown_as_the_summary_has_them(value, shown):
    assert plain(value) == shown
