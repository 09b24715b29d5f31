"""The code blocks of a page of the documentation, and what runs them.

Blocks of one page run in order, in one temporary folder in which ``examples`` and ``benchmarks``
are those of the repository. Pages with commands run in ``make test-slow`` alone.

- ``python``: run in one namespace for the page.
- ``sh``: run by bash; must exit with 0.
- ``console``: lines that begin with ``$ `` are run by bash; the lines after them are what is
  printed. Compared are words: numbers, spaces and the lines of tables may differ, and ``...``
  stands for anything. A command whose last printed line is ``exit code N`` must exit with N.
- Any other kind is not run.

A comment on the line above a block changes that:

- ``<!-- file: NAME -->``: the block is written to that file.
- ``<!-- long -->``: a page that goes on with this one leaves the block out.
- ``<!-- always -->``: the block runs also if one before it has failed.
- ``<!-- realdata -->``: the block runs if the variable FEDMED_DATA is set.
- ``<!-- not run: REASON -->``: the block does not run.

Several of them stand on several lines. A page whose first line is ``<!-- after: PAGE -->`` goes on
with what the blocks of another page, but for its long ones, have left.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?P<marks>(?:^[ ]*<!-- [^\n]* -->\n\n?)*)^(?P<fence>```+|:::+)(?P<kind>\w+)[^\n]*\n"
    r"(?P<text>.*?)^(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)
MARK = re.compile(r"<!-- (long|always|realdata|file|not run)(?:: ([^\n]*?))? -->")
AFTER = re.compile(r"<!-- after: (\S+) -->\n")
# Stands on the pages for the folder in which the commands are typed.
HOME = "/home/you"
SECONDS = 900


@dataclass(frozen=True)
class Block:
    """A block of code."""

    kind: str
    text: str
    line: int
    marks: dict[str, str]

    @property
    def runs(self) -> bool:
        """Whether anything is done with it."""
        return "not run" not in self.marks and (
            "file" in self.marks or self.kind in {"python", "sh", "console"}
        )

    @property
    def is_command(self) -> bool:
        """Whether it starts processes."""
        return "file" not in self.marks and self.kind in {"sh", "console"}

    @property
    def wanted(self) -> bool:
        """Whether what it needs is there."""
        return "realdata" not in self.marks or bool(os.environ.get("FEDMED_DATA"))


def blocks_of(path: Path) -> list[Block]:
    """Return the blocks of a page, in order."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(
            found["kind"],
            found["text"],
            text.count("\n", 0, found.start("fence")) + 1,
            {mark: said or "" for mark, said in MARK.findall(found["marks"])},
        )
        for found in BLOCK.finditer(text)
    ]


def words(text: str) -> str:
    """Return what a text says, without numbers and without what draws tables."""
    plain = re.sub(r"[\u2500-\u257f|]|-{3,}", " ", text)
    # The number of a run, of whose sixteen digits a narrow table puts the last on the next line.
    plain = re.sub(r"\b[0-9a-f]{15,16}\b|\b[a-f]\b", "#", plain)
    return " ".join(re.sub(r"\d[\d.,:]*", "#", plain).split())


def agrees(printed: str, expected: str) -> bool:
    """Say whether a command printed what the page has."""
    parts = [re.escape(part) for part in re.split(r"\s*\.\.\.\s*", words(expected))]
    return re.search(r".*?".join(parts), words(printed)) is not None


def shell(command: str, folder: Path) -> tuple[int, str]:
    """Run a command as somebody with the package installed would type it."""
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)
    # As wide as the pages are.
    environment["COLUMNS"] = "100"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stdout


def sessions(text: str) -> list[tuple[str, str]]:
    """Return the commands of a ``console`` block, each with what it prints."""
    found: list[tuple[list[str], list[str]]] = []
    goes_on = False
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append(([line[2:]], []))
        elif goes_on:
            found[-1][0].append(line)
        else:
            found[-1][1].append(line)
        goes_on = (line.startswith("$ ") or goes_on) and line.endswith("\\")
    return [("\n".join(command), "\n".join(output)) for command, output in found]


def run_block(block: Block, where: str, folder: Path, names: dict[str, object]) -> None:
    """Run a block; raise AssertionError with what was printed if it does not do what it says."""
    if "file" in block.marks:
        path = folder / block.marks["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
    elif block.kind == "python":
        # So that a traceback has the line of the page.
        exec(compile("\n" * block.line + block.text, where, "exec"), names)
    elif block.kind == "sh":
        code, printed = shell(block.text, folder)
        assert code == 0, f"{where}, line {block.line}: exit code {code}\n{printed}"
    else:
        for command, expected in sessions(block.text):
            expected, _, said = expected.partition("exit code ")
            code, printed = shell(command, folder)
            assert code == int(said or 0), f"{where}: {command}: exit code {code}\n{printed}"
            printed = printed.replace(str(folder.resolve()), HOME)
            assert agrees(printed, expected), f"{where}: {command} printed\n{printed}"


def run_page(path: Path, folder: Path) -> None:
    """Run the blocks of a page in a folder."""
    for name in ("examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    before = AFTER.match(path.read_text(encoding="utf-8"))
    if before:
        page = path.with_name(before[1])
        run_blocks([block for block in blocks_of(page) if "long" not in block.marks], page, folder)
    run_blocks(blocks_of(path), path, folder)


def run_blocks(blocks: list[Block], page: Path, folder: Path) -> None:
    """Run blocks of a page, one after the other."""
    names: dict[str, object] = {"__name__": "__main__"}
    wanted = [block for block in blocks if block.runs and block.wanted]
    for number, block in enumerate(wanted):
        try:
            run_block(block, page.name, folder, names)
        except BaseException:
            for left in wanted[number + 1 :]:
                if "always" in left.marks:
                    run_block(left, page.name, folder, names)
            raise
