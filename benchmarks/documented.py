"""Tables of the documentation's benchmark pages, which the benchmarks write themselves.

`show` prints a table as Markdown, each row as it comes, and below it the command and the machine.
With ``--write`` all of this also replaces what stands between two comments of the one page of
docs/benchmarks that has the table; the rest of the page stays byte for byte:

    <!-- table outlying: begin -->
    <!-- table outlying: end -->
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from fedmed_flower.files import write_atomic

PAGES = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--write`` and ``--pages`` to a script's options."""
    # An abbreviated --write would stand in the command below the table.
    parser.allow_abbrev = False
    parser.add_argument(
        "--write", action="store_true", help="write the tables into the documentation's pages"
    )
    parser.add_argument(
        "--pages", type=Path, default=PAGES, help="folder of the pages, if it is another one"
    )


def show(
    name: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    options: argparse.Namespace,
    *,
    versions: Sequence[str] = ("torch", "flwr"),
    threads: int | None = None,
) -> None:
    """Print a table, and write it into its page if that is asked for.

    Parameters
    ----------
    name : str
        As in the comments of the page.
    head : sequence of str
    rows : iterable of sequences of str
        As many cells as `head` has. A row is printed as soon as it comes.
    options : Namespace
        With those of `add_options`. A GPU is named if there is a ``device`` and it is ``cuda``.
    versions : sequence of str
        Names of the packages whose versions matter.
    threads : int, optional
        Of one process; by default those of this one.

    Raises
    ------
    SystemExit
        If the table is to be written and does not stand on exactly one page. This is found before
        the first row is asked for.
    """
    if options.write:
        page_of(name, options.pages)
    lines = []

    def add(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    add(_line(head, len(head)))
    add("|" + "---|" * len(head))
    for row in rows:
        add(_line(row, len(head)))
    device = getattr(options, "device", "cpu")
    add("")
    add(f"Made by `{command()}`. Machine: {machine(versions, threads, device)}.")
    print()
    if options.write:
        page = replace(name, "\n".join(lines), options.pages)
        print(f"written: table {name} of {page}", flush=True)


def _line(cells: Sequence[str], count: int) -> str:
    """Return a line of a table."""
    if len(cells) != count:
        raise ValueError(f"a row has {len(cells)} cells, the head {count}: {cells}")
    texts = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
    return re.sub(" +", " ", f"| {' | '.join(texts)} |")


def without_zero(text: str) -> str:
    """Return a number as the pages have it: ``.5`` for ``0.5``.

    Examples
    --------
    >>> without_zero("0.50"), without_zero("-0.12"), without_zero("10.50")
    ('.50', '-.12', '10.50')
    """
    return re.sub(r"^(-?)0\.", r"\1.", text)


def command() -> str:
    """Return the command line of this process, without the options of this module."""
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser)
    _, own = parser.parse_known_args(sys.argv[1:])
    data = "FEDMED_DATA=... " if os.environ.get("FEDMED_DATA") else ""
    return data + shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *own])


def machine(versions: Sequence[str], threads: int | None = None, device: str = "cpu") -> str:
    """Return the processor, cores, threads and versions in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    count = threads or _threads()
    parts = [names[0] if names else platform.processor() or platform.machine()]
    parts += [f"{os.cpu_count()} cores", "1 thread" if count == 1 else f"{count} threads"]
    if device == "cuda":
        parts.append(sys.modules["torch"].cuda.get_device_name())
    parts.append(f"Python {platform.python_version()}")
    return ", ".join([*parts, *(f"{name} {version(name)}" for name in versions)])


def _threads() -> int:
    """Return on how many threads this process works."""
    if "torch" in sys.modules:
        return int(sys.modules["torch"].get_num_threads())
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def marks(name: str) -> tuple[str, str]:
    """Return the comments before and after a table."""
    return f"<!-- table {name}: begin -->", f"<!-- table {name}: end -->"


def page_of(name: str, folder: Path) -> Path:
    """Return the one page that has a table.

    Raises
    ------
    SystemExit
        If it stands on no page or more than once, has no end, or another one stands within.
    """
    begin, end = marks(name)
    texts = {page: _read(page) for page in sorted(folder.glob("*.md"))}
    # Within a sentence it is no mark.
    line = re.compile(rf"^{re.escape(begin)}\r?$", re.MULTILINE)
    found = [page for page, text in texts.items() for _ in line.findall(text)]
    if not found:
        raise SystemExit(
            f"no page of {folder} has the table {name}: its place is between the lines "
            f"{begin} and {end}"
        )
    if len(found) > 1:
        where = ", ".join(page.name for page in found)
        raise SystemExit(f"{begin} stands {len(found)} times in {folder} ({where}): keep one")
    if not _place(name).search(texts[found[0]]):
        raise SystemExit(f"{found[0]}: {end} must follow {begin}, before any other table")
    return found[0]


def replace(name: str, text: str, folder: Path) -> Path:
    """Replace a table and return its page.

    Raises
    ------
    SystemExit
        As in `page_of`.
    """
    page = page_of(name, folder)
    begin, end = marks(name)
    whole = _place(name).sub(lambda _: f"{begin}\n\n{text}\n\n{end}", _read(page))
    write_atomic(page, whole.encode())
    return page


def _place(name: str) -> re.Pattern[str]:
    """Return what matches a table with its marks, each a line of its own."""
    begin, end = map(re.escape, marks(name))
    return re.compile(rf"^{begin}\r?\n(?:(?!<!-- table ).*\n)*{end}(?=\r?$)", re.MULTILINE)


def _read(page: Path) -> str:
    """Return a page with its line ends as they are."""
    return page.read_bytes().decode()
