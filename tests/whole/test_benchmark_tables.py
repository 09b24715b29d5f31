"""The tables of the benchmark pages: each has one place and one script, which writes it alone."""

import argparse
import ast
import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS, PAGES = ROOT / "benchmarks", ROOT / "docs" / "benchmarks"
SPEC = importlib.util.spec_from_file_location("documented", BENCHMARKS / "documented.py")
documented = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(documented)
MARK = re.compile(r"^<!-- table (.*): (begin|end) -->$", re.MULTILINE)
HEAD, ROWS = ("rule", "s"), [("mean", "1.5"), ("median", "2")]


def tables_of(script):
    """Return the names that a script hands to `documented.show`."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    return [call.args[0].value for call in calls if ast.unparse(call.func) == "documented.show"]


@pytest.fixture
def pages(tmp_path):
    """Return a copy of the pages."""
    return Path(shutil.copytree(PAGES, tmp_path / "pages"))


@pytest.fixture
def options(pages):
    """Return the options of a script that writes into the copy."""
    parser = argparse.ArgumentParser()
    documented.add_options(parser)
    return parser.parse_args(["--write", "--pages", str(pages)])


def test_each_table_of_a_page_is_that_of_one_script_and_has_an_end():
    scripts = sorted(BENCHMARKS.rglob("*.py"))
    made = [name for script in scripts for name in tables_of(script)]
    marks = [MARK.findall(page.read_text()) for page in sorted(PAGES.glob("*.md"))]
    begun = [name for page in marks for name, what in page if what == "begin"]
    assert sorted(made) == sorted(begun)
    assert len({*made}) == len(made)
    for page in marks:
        pairs = zip(page[::2], page[1::2], strict=True)
        assert all(one == (other[0], "begin") and other[1] == "end" for one, other in pairs)


def test_every_table_stands_between_its_marks_with_its_command_and_machine():
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text()
        for name in [name for name, what in MARK.findall(text) if what == "begin"]:
            begin, end = documented.marks(name)
            inside = text.partition(begin)[2].partition(end)[0]
            assert re.fullmatch(
                r"\n\n(\|.*\|\n){3,}\nMade by `.*`.*\. Machine: .*\.\n\n", inside
            ), name


def test_only_what_stands_between_the_marks_is_replaced(pages, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/x/benchmarks/outlying.py", "--clean", "2", "--write"])
    monkeypatch.setenv("FEDMED_DATA", "/somewhere")
    page = pages / "tables.md"
    with_carriage_returns = page.read_bytes().replace(b"\n", b"\r\n") + b"no line end"
    page.write_bytes(with_carriage_returns)
    others = {path: path.read_bytes() for path in pages.glob("*.md") if path != page}
    documented.show("outlying", HEAD, ROWS, options, versions=["numpy"], threads=1)
    begin, end = (mark.encode() for mark in documented.marks("outlying"))
    before, _, rest = page.read_bytes().partition(begin)
    inside, _, after = rest.partition(end)
    assert with_carriage_returns.startswith(before + begin)
    assert with_carriage_returns.endswith(end + after)
    lines = inside.decode().strip().splitlines()
    assert lines[:4] == ["| rule | s |", "|---|---|", "| mean | 1.5 |", "| median | 2 |"]
    made = "Made by `FEDMED_DATA=... python benchmarks/outlying.py --clean 2`. Machine: "
    assert lines[5].startswith(made)
    assert ", 1 thread, Python " in lines[5]
    assert {path: path.read_bytes() for path in others} == others
    assert sorted(path.name for path in pages.iterdir()) == sorted(
        path.name for path in PAGES.iterdir()
    )
    printed = capsys.readouterr().out
    assert inside.decode().strip() in printed
    documented.show("outlying", HEAD, ROWS, options, versions=["numpy"], threads=1)
    assert page.read_bytes() == before + begin + inside + end + after


def test_without_the_option_the_table_is_printed_and_no_page_changes(pages, options, capsys):
    options.write = False
    documented.show("on no page", HEAD, ROWS, options)
    assert "| median | 2 |\n\nMade by `" in capsys.readouterr().out
    assert all((PAGES / path.name).read_bytes() == path.read_bytes() for path in pages.iterdir())


def refused(name, options):
    """Return why a table is not written; no row was asked for."""

    def rows():
        raise AssertionError("a row was measured")
        yield

    with pytest.raises(SystemExit) as stop:
        documented.show(name, HEAD, rows(), options)
    return str(stop.value)


def test_a_table_without_exactly_one_place_is_refused_before_it_is_measured(pages, options):
    assert refused("unknown", options) == (
        f"no page of {pages} has the table unknown: its place is between the lines "
        "<!-- table unknown: begin --> and <!-- table unknown: end -->"
    )
    shutil.copy(pages / "tables.md", pages / "twice.md")
    assert refused("outlying", options) == (
        f"<!-- table outlying: begin --> stands 2 times in {pages} (tables.md, twice.md): keep one"
    )
    options.pages = pages / "missing"
    assert "missing has the table outlying" in refused("outlying", options)


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table a: begin -->\n",
        "<!-- table a: end -->\n<!-- table a: begin -->\n",
        "<!-- table a: begin -->\n<!-- table b: begin -->\n<!-- table b: end -->\n"
        "<!-- table a: end -->\n",
    ],
)
def test_a_table_without_an_end_of_its_own_is_refused(pages, options, text):
    (pages / "more.md").write_text(text)
    assert refused("a", options) == (
        f"{pages / 'more.md'}: <!-- table a: end --> must follow <!-- table a: begin -->, "
        "before any other table"
    )


def test_a_cell_breaks_no_table_and_a_row_has_as_many_cells_as_the_head(options, capsys):
    options.write = False
    documented.show("any", ("", "b"), [("x|y", "two\n lines")], options)
    assert "| | b |\n|---|---|\n| x\\|y | two lines |\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="a row has 1 cells, the head 2"):
        documented.show("any", ("", "b"), [("x",)], options)


@pytest.mark.parametrize(
    ("given", "command"),
    [
        (["--write"], "python benchmarks/flamby.py"),
        (["--seeds", "42", "43", "--pages", "/x", "--write"],
         "python benchmarks/flamby.py --seeds 42 43"),
        (["--pages=/x", "--write", "--epsilons", "0", "8", "--plink2", "a b"],
         "python benchmarks/flamby.py --epsilons 0 8 --plink2 'a b'"),
    ],
)  # fmt: skip
def test_the_command_below_a_table_is_that_of_the_script_alone(monkeypatch, given, command):
    monkeypatch.setattr(sys, "argv", ["benchmarks/flamby.py", *given])
    monkeypatch.delenv("FEDMED_DATA", raising=False)
    assert documented.command() == command


def test_an_abbreviation_of_the_option_is_refused():
    parser = argparse.ArgumentParser()
    documented.add_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--wri"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.944", ".944"), ("-0.12", "-.12"), ("1.000", "1.000"), ("10.5", "10.5"), ("nan", "nan")],
)
def test_a_number_stands_without_the_zero_before_its_point(text, expected):
    assert documented.without_zero(text) == expected
