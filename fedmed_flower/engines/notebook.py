"""A run in a notebook: how far it is, below its cell, and its report in a frame of its own."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.app import Message

from fedmed_flower.cli.progress import Position, reading_log
from fedmed_flower.files import REPORT, read_file

# Seconds between two drawings.
_PAUSE = 0.25
# Bytes: all of a report would stand in the notebook.
_MOST_REPORT = 1 << 24
_FRAME = (
    '<iframe sandbox title="Report of the run" srcdoc="{}" '
    'style="width:100%;height:40rem;border:1px solid #8888"></iframe>'
)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def framed_report(folder: Path) -> str | None:
    """Return the report of a run as HTML for a notebook; None if there is none.

    The frame runs no script and reaches nothing outside it, whoever wrote the report.
    """
    try:
        report = read_file(folder, REPORT, _MOST_REPORT)
    except FileNotFoundError:
        return None
    except OSError as error:
        path = html.escape(str(folder / REPORT))
        return f"<p>{path} cannot be shown here ({html.escape(str(error.strerror))}).</p>"
    return _FRAME.format(html.escape(report.decode(errors="replace")))


@contextmanager
def inline_progress(rounds: int | None) -> Iterator[Callable[[Message, int, int], None]]:
    """Show how far a run is below the cell of a notebook.

    Parameters
    ----------
    rounds : int, optional
        As in `Position`.

    Yields
    ------
    callable
        For `run_local` to call with its messages.
    """
    inline = _Inline(Position(rounds))
    with reading_log(inline.on_line):
        try:
            yield inline.on_message
        finally:
            inline.end()


class _Inline:
    """Draws a position into the output of a cell, by IPython's display alone."""

    def __init__(self, position: Position, clock: Callable[[], float] = time.monotonic) -> None:
        ipython: Any = import_module("IPython.display")
        self._html: Callable[[str], Any] = ipython.HTML
        self._position = position
        self._clock = clock
        self._drawn = clock()
        self._output: Any = ipython.display(self._html(self._drawing()), display_id=True)

    def on_message(self, message: Message, done: int, sent: int) -> None:
        """Draw where the run is, if it is time or a phase begins."""
        self._position.read_message(message, done, sent)
        self._draw(at_once=done == 0)

    def on_line(self, line: str) -> None:
        """Take up a line of the log."""
        self._position.read_line(line)
        self._draw()

    def end(self) -> None:
        """Leave nothing behind: the report says what there was."""
        self._output.update(self._html(""))

    def _draw(self, at_once: bool = False) -> None:
        if at_once or self._clock() - self._drawn >= _PAUSE:
            self._drawn = self._clock()
            self._output.update(self._html(self._drawing()))

    def _drawing(self) -> str:
        position = self._position
        share = ""
        if position.rounds:
            share = f'<progress max="{position.rounds}" value="{position.finished}"></progress> '
        words = "  ".join(filter(None, (position.where or "start", position.times)))
        return f"<div>{share}{html.escape(words)}</div>"
