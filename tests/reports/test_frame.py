"""The frame of a page: its policy, its colours, its parts for those who use no mouse."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from fedmed_flower.data.pictures import PALETTE
from fedmed_flower.reports import frame

STYLE = frame.own_file("style.css")


def schemes():
    """Return the variables of the light and of the dark scheme."""
    light, rest = STYLE.split("/*dark*/")
    dark = rest.split("/*end*/")[0]
    return {
        name: dict(re.findall(r"--([\w]+):(#[0-9a-f]{3,6})", text))
        for name, text in (("light", light), ("dark", dark))
    }


def luminance(colour):
    """Relative luminance by WCAG 2.2."""
    if len(colour) == 4:
        colour = "#" + "".join(2 * digit for digit in colour[1:])
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_by_known_pairs():
    assert contrast("#fff", "#000000") == pytest.approx(21)
    # The lightest grey that has enough contrast on white, by WCAG's own example.
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_the_contrast_of_wcag_aa(scheme):
    colours = schemes()[scheme]
    grounds = ("paper", "tint")
    pairs = [(text, ground) for text in ("ink", "soft", "link") for ground in grounds]
    pairs += [("good", "tint"), ("paper", "bad"), ("ink", "deep")]
    low = {pair: contrast(*(colours[name] for name in pair)) for pair in pairs}
    assert not {pair: ratio for pair, ratio in low.items() if ratio < 4.5}


def lightness(colour):
    """L* of CIELAB, in which equal steps look alike."""
    light = luminance(colour)
    return 116 * light ** (1 / 3) - 16 if light > (6 / 29) ** 3 else light * (29 / 3) ** 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_heat_map_goes_away_from_the_paper_in_even_steps_and_can_be_read(scheme):
    colours = schemes()[scheme]
    pairs = re.findall(r"\.(h\d)\{background:var\(--(\w+)\);color:var\(--(\w+)\)\}", STYLE)
    assert [css for css, _, _ in pairs] == [f"h{number}" for number in range(9)]
    assert [ground for _, ground, _ in pairs] == [css for css, _, _ in pairs]
    low = {css: contrast(colours[text], colours[ground]) for css, ground, text in pairs}
    assert not {css: ratio for css, ratio in low.items() if ratio < 4.5}
    lights = [lightness(colours[ground]) for _, ground, _ in pairs]
    steps = [after - before for before, after in pairwise(lights)]
    away = -1 if scheme == "light" else 1
    assert all(7 < away * step < 9.5 for step in steps)


def test_lightness_by_known_colours():
    assert lightness("#ffffff") == pytest.approx(100)
    assert lightness("#777777") == pytest.approx(50, abs=0.1)
    assert lightness("#000000") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_and_marks_can_be_seen(scheme):
    colours = schemes()[scheme]
    series = [f"s{index}" for index in range(len(PALETTE))]
    names = [*series, "crowd", "worst", "soft", "link"]
    low = {name: contrast(colours[name], colours["paper"]) for name in names}
    assert not {name: ratio for name, ratio in low.items() if ratio < 3}
    assert len({colours[name] for name in series}) == len(series)


def test_both_schemes_have_the_same_variables():
    light, dark = schemes().values()
    assert set(light) == set(dark)
    used = set(re.findall(r"var\(--(\w+)\)", STYLE))
    assert used <= set(light)


def test_the_banner_can_be_read():
    background, text = re.search(r"\.banner\{background:(#\w+);color:(#\w+)", STYLE).groups()
    assert contrast(background, text) > 7


def test_nothing_runs_but_the_pages_own_script():
    page = frame.page("A run", "<h1>A run</h1>")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    for name, text in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert "img-src" not in policy
    assert "; img-src data:" in frame.page("A run", "", pictures=True)
    # The script would end where a browser finds its end tag.
    assert "</" not in script
    for way_out in ("innerHTML", "eval(", "fetch(", "XMLHttp", "import(", "document.write"):
        assert way_out not in script


class Order(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.levels, self.ids, self.links = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "a":
            self.links.append(attrs["href"])


def test_contents_and_skip_link_lead_to_what_is_there():
    body = "<h1>A run</h1><nav></nav>" + "".join(f"<h2>Part <i>{n}</i></h2>" for n in range(4))
    page = frame.page("A run", body)
    order = Order(page)
    assert order.links[0] == "#main"
    assert order.links[1:] == ["#s1", "#s2", "#s3", "#s4"]
    assert {link[1:] for link in order.links} <= set(order.ids)
    assert len(set(order.ids)) == len(order.ids)
    assert '<li><a href="#s1">Part 0</a></li>' in page
    assert '<html lang="en">' in page
    # Few parts need no list of them.
    assert "<nav" not in frame.page("A run", "<nav></nav><h2>One</h2>")


def test_tables_name_rows_columns_and_hospitals():
    table = frame.table("What", ["Name", "A"], [["x", "1"], ["y", "2"]], [["all", "3"]], sites="xy")
    assert table.count('<th scope="col">') == 2
    assert table.count('<th scope="row">') == 3
    assert "<caption>What</caption>" in table
    assert '<tr data-site="x"><th scope="row">x' in table
    assert '<tr><th scope="row">all' in table
    assert 'tabindex="0" role="group" aria-label="What"' in table
