"""Files: tables without formulas, a file name for each site, and nothing on Windows."""

import ast
import csv
import io
import re
import sys
from pathlib import Path

import pytest
from flwr.app import ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from tiny import nodes_of, run_tiny, says

import fedmed_flower
from fedmed_flower.errors import InputError
from fedmed_flower.files import (
    POOLED_FILE,
    cell_text,
    file_name,
    read_file,
    write_atomic,
    write_rows,
)
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.server.history import History
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.statistics.guard import open_guard

PACKAGE = Path(fedmed_flower.__file__).parent


def table(rows, ending="\r\n"):
    text = io.StringIO(newline="")
    write_rows(text, rows, ending)
    return text.getvalue()


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff20", "'="])
def test_a_text_that_starts_as_a_formula_is_written_as_text(start):
    (row,) = csv.reader(io.StringIO(table([[f"{start}1+1", 2]]), newline=""))
    assert row == [f"'{start}1+1", "2"]
    assert cell_text(row[0]) == f"{start}1+1"


def test_numbers_and_plain_texts_are_written_as_they_are():
    row = [-1, -0.5, float("-inf"), "-1", "+2.5e-3", "nan", "", "o'clock", "'quoted'", "a=1"]
    assert table([row], "\n") == ",".join(map(str, row)) + "\n"


@given(st.text("=+-@'1a\t\r\n"))
def test_every_text_comes_back(text):
    ((cell, _),) = csv.reader(io.StringIO(table([[text, ""]]), newline=""))
    assert cell_text(cell) == text


def test_a_metric_with_the_name_of_a_formula_stays_a_text():
    content = History([(1, "val", "=1+1", '=HYPERLINK("x")', -1.5)]).to_csv().decode()
    assert content.splitlines()[1] == '1,val,\'=1+1,"\'=HYPERLINK(""x"")",-1.5'


def test_a_site_with_the_name_of_a_formula_has_its_own_name_in_the_report(tmp_path):
    run_tiny(tmp_path / "run", node_configs=nodes_of(tmp_path, "=1+1", "south"))
    assert "\r\n1,train,'=1+1,loss," in (tmp_path / "run" / "metrics.csv").read_bytes().decode()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "=1+1" in page
    assert not re.search("('|&#39;|&#x27;)=1", page)


def test_every_table_is_written_by_the_one_function():
    """A `csv.writer` elsewhere would write formulas."""
    writing = re.compile(r"csv\.writer|DictWriter|\.to_csv\([^)]")
    users = [path for path in PACKAGE.rglob("*.py") if writing.search(path.read_text())]
    assert users == [PACKAGE / "files.py"]


@pytest.mark.parametrize("name", ["hospital-1", "north", "site_2", "st.mary", "a-12345678", "7"])
def test_a_plain_lowercase_name_is_its_own_file_name(name):
    assert file_name(name) == name


@given(st.lists(st.text("aA-.~ ü/", max_size=6), unique=True))
def test_different_names_have_different_files_where_case_is_ignored(texts):
    names = [*texts, *map(file_name, texts), POOLED_FILE]
    files = {file_name(name).lower() for name in set(names)}
    assert len(files) == len(set(names))
    assert POOLED_FILE not in files
    assert all(re.fullmatch(r"[a-z0-9_-][a-z0-9._~-]*", file) for file in files)


def open_a_book(folder):
    with open_guard(folder / "book.answers", {}, 10):
        pass


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: write_atomic(folder / "a", b""),
        lambda folder: read_file(folder, "a"),
        lambda folder: RunFolder(folder).make(ArrayRecord()),
        lambda folder: RunFolder(folder).log_file().__enter__(),
        lambda folder: Ledger(folder / "ledger.sqlite"),
        open_a_book,
    ],
    ids=["file", "reading", "run folder", "log", "ledger", "book"],
)
def test_windows_is_refused_in_one_line_before_a_file_is_written(use, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(
        InputError, match=says("fedmed_flower does not run on Windows: use Linux, macOS or WSL 2")
    ):
        use(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_file_imports_at_its_top_what_windows_lacks():
    lacking = {"fcntl", "grp", "pwd", "resource", "termios", "pty"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in getattr(node, "names", ())]
            assert not lacking & {*names, getattr(node, "module", None)}, path
