"""The code of the documentation runs as it stands; `helpers/pages` says how."""

import os
import re
from pathlib import Path

import pytest
from pages import ROOT, Block, agrees, blocks_of, run_block, run_blocks, run_page, sessions

DOCS = ROOT / "docs"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if DOCS / "generated" not in path.parents]
BLOCKS = {path: [block for block in blocks_of(path) if block.runs] for path in PAGES}
# `test_table_examples` runs what the guide to tables holds, and looks at what comes out.
ELSEWHERE = {DOCS / "guides" / "tables.md"}
RUN = [path for path in PAGES if BLOCKS[path] and path not in ELSEWHERE]
COMMANDS = [path for path in RUN if any(block.is_command for block in BLOCKS[path])]


def name_of(path):
    return str(path.relative_to(DOCS).with_suffix(""))


@pytest.mark.parametrize("path", sorted({*RUN} - {*COMMANDS}), ids=name_of)
def test_the_code_of_a_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMANDS, ids=name_of)
def test_the_commands_of_a_page_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(path, tmp_path)


def test_few_blocks_do_not_run_and_each_says_why():
    left_out = [block for path in PAGES for block in blocks_of(path) if "not run" in block.marks]
    assert all(len(block.marks["not run"].split()) >= 3 for block in left_out)
    assert len(left_out) <= sum(map(len, BLOCKS.values())) / 4


def test_no_mark_is_misspelt():
    # A comment above a block that is none of the marks would be ignored.
    known = re.compile(r"<!-- (long|always|realdata|file: \S+|not run: .+) -->")
    for path in PAGES:
        for line in re.findall(r"^(<!-- .* -->)\n\n?(?=```|<!--)", path.read_text(), re.MULTILINE):
            assert known.fullmatch(line), (path, line)


def test_a_console_block_holds_commands_and_what_they_print(tmp_path):
    text = "$ echo one \\\n  two\none two\n$ ls nowhere\n...No such file\nexit code 2\n"
    assert sessions(text) == [
        ("echo one \\\n  two", "one two"),
        ("ls nowhere", "...No such file\nexit code 2"),
    ]
    run_block(Block("console", text, 1, {}), "page", tmp_path, {})
    with pytest.raises(AssertionError, match="page: echo three printed\nthree"):
        run_block(Block("console", "$ echo three\nfour\n", 1, {}), "page", tmp_path, {})
    with pytest.raises(AssertionError, match="page: false: exit code 1"):
        run_block(Block("console", "$ false\n", 1, {}), "page", tmp_path, {})


def test_a_block_writes_a_file(tmp_path):
    run_block(Block("toml", "a = 1\n", 1, {"file": "app/x.toml"}), "page", tmp_path, {})
    assert (tmp_path / "app" / "x.toml").read_text() == "a = 1\n"


def test_what_always_runs_runs_after_a_failure(tmp_path):
    made = [
        Block("sh", "false\n", 1, {}),
        Block("sh", "touch left-out\n", 2, {}),
        Block("sh", "touch stopped\n", 3, {"always": ""}),
    ]
    with pytest.raises(AssertionError, match=r"page\.md, line 1: exit code 1"):
        run_blocks(made, Path("page.md"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stopped"]


def test_numbers_and_lines_of_tables_may_differ():
    assert agrees("│ auc │ .961 │ 20 s\n────", "auc  .97 31 s")
    assert agrees("round 1/10  val auc 0.8099  3.9 s", "round 1/10  val auc 0.81  47.8 s")
    assert agrees("│ 7bec4fcb57734a3 │\n│ f │", "│ 845ac2d6eb2f5ca │\n│ 5 │")
    assert agrees("a b c d", "a ... d")
    assert not agrees("auc .961", "dice .961")


def test_links_between_the_files_of_the_repository_lead_somewhere():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md")]
    for path in texts:
        if not {"build", ".venv", "generated"} & set(path.relative_to(ROOT).parts):
            for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
                if ":" not in target:
                    there = os.path.normpath(path.parent / target)
                    # What is written as the pages are built.
                    made = Path(there).is_relative_to(DOCS / "reference" / "api")
                    made |= there == str(DOCS / "reference" / "cli.md")
                    assert made or Path(there).exists(), (path, target)
