"""The documentation is built without a warning, and a reader's browser asks no other host."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
# An address to another host that a style sheet would load.
STYLES = re.compile(r"""(?:@import\s*["']|url\(\s*["']?)\s*(?:https?:)?//""")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(folder / "doctrees"), str(ROOT / "docs"), str(folder / "html")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


class Loaded(HTMLParser):
    """Collects the addresses that a browser loads for a page, and what its styles say."""

    def __init__(self):
        super().__init__()
        self.addresses = []
        self.styles = []

    def handle_starttag(self, tag, attrs):
        said = dict(attrs)
        if said.get("rel") not in ("author", "canonical") and tag in LOADS:
            self.addresses.append(said.get(LOADS[tag]) or "")
            sets = (said.get("srcset") or "").split(",")
            self.addresses += [part.split()[0] for part in sets if part.strip()]
        self.styles.append(said.get("style") or "")

    def handle_data(self, data):
        if self.get_starttag_text() and self.get_starttag_text().startswith("<style"):
            self.styles.append(data)


def from_elsewhere(text):
    """Return the addresses on other hosts that a page would load."""
    page = Loaded()
    page.feed(text)
    found = [address for address in page.addresses if re.match(r"(?:https?:)?//", address)]
    return found + [style for style in page.styles if STYLES.search(style)]


def test_what_is_loaded_from_elsewhere_is_found():
    pages = {
        '<script src="https://a.org/x.js"></script>': ["https://a.org/x.js"],
        '<link rel="stylesheet" href="//a.org/x.css">': ["//a.org/x.css"],
        '<a href="https://a.org">a link</a><img src="x.png">': [],
        '<p style="background: url(https://a.org/x.png)">': [
            "background: url(https://a.org/x.png)"
        ],
        "<style>@import 'https://a.org/x.css'</style>": ["@import 'https://a.org/x.css'"],
    }
    for text, expected in pages.items():
        assert from_elsewhere(text) == expected


@pytest.mark.slow
def test_no_page_loads_anything_from_another_host(site):
    pages = [*site.rglob("*.html")]
    assert len(pages) > 40
    for page in pages:
        assert not from_elsewhere(page.read_text(encoding="utf-8")), page
    for path in site.rglob("*.css"):
        # The addresses of licences in comments are not loaded.
        text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not STYLES.search(text), path


@pytest.mark.slow
def test_each_public_name_and_each_command_has_its_place(site):
    listed = (ROOT / "docs" / "reference" / "public-names.md").read_text(encoding="utf-8")
    reference = "".join(
        page.read_text(encoding="utf-8") for page in (site / "reference" / "api").glob("*.html")
    )
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \|$", listed, re.MULTILINE)
    assert len(rows) > 10
    for room, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            # At the root stand names that another room documents.
            anchor = rf'id="fedmed_flower\.\w+\.{name}"' if room == "fedmed_flower" else ""
            anchor = anchor or rf'id="{re.escape(room)}\.{name}"'
            at_root = rf'id="fedmed_flower\.{name}"'
            assert re.search(anchor, reference) or re.search(at_root, reference), (room, name)
    commands = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    for name in ("run", "demo", "statistics", "settings", "report", "privacy", "data-check"):
        assert f'id="fedmed-{name}"' in commands


def test_each_public_name_is_on_one_page_and_no_other(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "extensions")
    from generated_pages import names_of, room_page, rooms

    shown = re.findall(r"^\.\. auto\w+:: (\S+)$", "".join(map(room_page, rooms())), re.MULTILINE)
    assert len(shown) == len({*shown}) > 60
    every = {name for room in rooms() for name in names_of(room, twice=True)}
    assert {name.rpartition(".")[2] for name in shown} == every


def test_a_text_from_a_folder_links_to_the_pages_that_it_names(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "extensions")
    from generated_pages import text_of

    text = text_of("examples/deployment/README.md")
    assert "[Budgets and ledgers](/guides/budgets.md)" in text
    assert "](../" not in text


def test_attributes_that_are_described_at_once_are_split(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "extensions")
    from public_references import escape_stars, split_attributes

    lines = ["Of (n, *spatial).", "", "Attributes", "----------", "a, b : int", "    Both."]
    lines += ["c : str", "", "Raises", "------", "d, e", "    If."]
    split_attributes(None, "class", "x", None, None, lines)
    assert lines[4:10] == ["a : int", "    Both.", "b : int", "    Both.", "c : str", ""]
    assert lines[10:] == ["Raises", "------", "d, e", "    If."]
    text = ["Of (n, *spatial), ``(*spatial)`` and *this*."]
    escape_stars(None, "class", "x", None, None, text)
    assert text == [r"Of (n, \*spatial), ``(*spatial)`` and *this*."]


def test_pictures_are_small():
    pictures = [*(ROOT / "docs").rglob("*.png")]
    assert pictures
    assert all(path.stat().st_size < 250_000 for path in pictures)
