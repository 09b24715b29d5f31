"""How far a run is: a bar whose clock moves on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Self

from flwr.app import Message, MessageType
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from fedmed_flower.errors import shown
from fedmed_flower.wire import SERVER_ROUND, SPLIT

# Flower's engine streams the lines with their level. A round of ours has ended; one of Flower's
# own strategies begins.
_ENDED = re.compile(r"(?:INFO\s*:\s+)?round (\d+)/(\d+)  ")
_BEGINS = re.compile(r"(?:INFO\s*:\s+)?\[ROUND (\d+)/(\d+)\]")
_COMPARISON = re.compile(r"(?:INFO\s*:\s+)?for comparison: (.+)")
_MOST_LETTERS = 30
_SILENCE = 60.0
# Audit events that come before a prompt for the user: breakpoint(), a debugger, input().
_PROMPTS = ("builtins.breakpoint", "pdb.Pdb", "builtins.input")


class Position:
    """How far a run is, by its messages and by the lines of its log.

    Parameters
    ----------
    rounds : int, optional
        Rounds that are planned; None if that is unknown. The log corrects it.
    clock : callable
        Returns the time in seconds.

    Attributes
    ----------
    rounds : int or None
    current : int
        Number of the round; 0 before the first, after the last, and if it is unknown.
    finished : int
        Number of the last round that has ended; 0 before, and again for each model for comparison.
    """

    def __init__(self, rounds: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.rounds = rounds
        self._clock = clock
        self._start = clock()
        self._begin("")

    def _begin(self, part: str) -> None:
        """Begin the rounds of the run, or those of a model for comparison."""
        self._part = part
        self._phase = ""
        self._sites = ""
        self.current = 0
        self.finished = 0
        # Of the rounds that have ended since the first one began: how many, from when to when.
        self._timed = 0
        self._since: float | None = None
        self._until = 0.0

    def read_message(self, message: Message, done: int, sent: int) -> None:
        """Take up that `done` of the `sent` sites have been served; as `run_local` reports it."""
        kind, _, name = message.metadata.message_type.partition(".")
        records = message.content.config_records.values() if message.has_content() else ()
        config = {key: value for record in records for key, value in record.items()}
        number = config.get(SERVER_ROUND)
        # In asynchronous rounds a reply may be to the message of an earlier round.
        self.current = max(number, self.finished + 1) if isinstance(number, int) else 0
        self._phase = "test" if config.get(SPLIT) == "test" else shown(name or kind, _MOST_LETTERS)
        self._sites = f"{done}/{sent} sites"
        if kind == MessageType.TRAIN and self._since is None:
            self._since = self._clock()

    def read_line(self, line: str) -> None:
        """Take up a line of the log."""
        if match := _ENDED.match(line):
            self.finished, self.rounds = int(match[1]), int(match[2])
            self._until = self._clock()
            if self._since is None:
                # When this round began is unknown.
                self._since = self._until
            else:
                self._timed += 1
            # Without messages it is unknown what goes on after it.
            self.current = self.finished if self._sites else 0
        elif match := _BEGINS.match(line):
            self.current, self.rounds = int(match[1]), int(match[2])
            self.finished = self.current - 1
        elif match := _COMPARISON.match(line):
            self._begin(shown(match[1], _MOST_LETTERS))

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the rounds have ended, by the mean of those that have; None if unknown."""
        left = (self.rounds or 0) - self.finished
        if self._since is None or not self._timed or left <= 0:
            return None
        seconds = (self._until - self._since) / self._timed
        return max(0.0, left * seconds - (self._clock() - self._until))

    @property
    def where(self) -> str:
        """Part, round, phase and sites, such as ``round 3/10  train  2/5 sites``."""
        of = f"/{self.rounds}" if self.rounds else ""
        number = f"round {self.current}{of}" if self.current else ""
        if self.finished and not self.current and not self._sites:
            number = f"{self.finished}{of} rounds"
        return "  ".join(filter(None, (self._part, number, self._phase, self._sites)))

    @property
    def times(self) -> str:
        """Time since the start and time left, such as ``0:00:12, 0:00:30 left``."""
        left = self.seconds_left
        more = "" if left is None else f", {_hours(left)} left"
        return f"{_hours(self._clock() - self._start)}{more}"


def _hours(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


class _Times(ProgressColumn):
    """The times of a position, which go on between two events."""

    def __init__(self, position: Position) -> None:
        super().__init__()
        self._position = position

    def render(self, task: Task) -> Text:
        return Text(self._position.times)


class Bar:
    """Shows a position in the last line of a terminal, four times a second; gone when it is closed.

    What is printed meanwhile, also by clients and on stderr, stands above. A prompt has the
    terminal to itself: `breakpoint`, a debugger or `input` in this process closes the bar, and the
    next message of the run opens it again.

    Parameters
    ----------
    console : rich.console.Console
    position : Position
    """

    def __init__(self, console: Console, position: Position) -> None:
        self._position = position
        self._bar = Progress(
            BarColumn(20),
            TextColumn("{task.description}", markup=False),
            _Times(position),
            console=console,
            refresh_per_second=4,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        _watch_prompts()
        self._show()
        _open_bars.append(self)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        _open_bars.remove(self)
        self._bar.stop()

    def close(self) -> None:
        """Leave the terminal to a prompt, until the next message."""
        self._bar.stop()

    def on_message(self, message: Message, done: int, sent: int) -> None:
        """Show where the run is, as `run_local` reports it."""
        self._position.read_message(message, done, sent)
        self._show(refresh=done == 0)
        self._bar.start()

    def on_line(self, line: str) -> None:
        """Show what a line of the log says of the rounds."""
        self._position.read_line(line)
        self._show()

    def _show(self, refresh: bool = False) -> None:
        position = self._position
        # Of rounds that are not known to come, the bar shows no share.
        total = position.rounds if position.current or position.finished else None
        self._bar.update(
            self._task,
            description=position.where or "start",
            completed=position.finished,
            total=total,
            refresh=refresh,
        )


class Lines:
    """Prints the position in a line if no other line has come for a minute.

    Parameters
    ----------
    console : rich.console.Console
    position : Position
    clock : callable
        Returns the time in seconds.
    """

    def __init__(
        self, console: Console, position: Position, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._position = position
        self._clock = clock
        self._printed = clock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def on_message(self, message: Message, done: int, sent: int) -> None:
        """Print where the run is, as `run_local` reports it, if it is time."""
        self._position.read_message(message, done, sent)
        if self._clock() - self._printed >= _SILENCE:
            self._console.print(f"{self._position.where}  {self._position.times}")
            self._printed = self._clock()

    def on_line(self, line: str) -> None:
        """Take up a line of the log, which somebody else prints."""
        self._position.read_line(line)
        self._printed = self._clock()


_open_bars: list[Bar] = []


def _make_way(event: str, _: tuple[object, ...]) -> None:
    if event in _PROMPTS:
        for bar in _open_bars:
            bar.close()


@cache
def _watch_prompts() -> None:
    # The only way to hear of pdb.set_trace() and input() without replacing them; a hook stays for
    # good, so one serves all bars.
    sys.addaudithook(_make_way)


class _Reader(logging.Handler):
    """Hands on each line of the log."""

    def __init__(self, read: Callable[[str], None]) -> None:
        super().__init__()
        self._read = read

    def emit(self, record: logging.LogRecord) -> None:
        self._read(record.getMessage())


@contextmanager
def reading_log(read: Callable[[str], None]) -> Iterator[None]:
    """Call `read` with each line that Flower and this package log in this process."""
    reader = _Reader(read)
    flower = logging.getLogger("flwr")
    flower.addHandler(reader)
    try:
        yield
    finally:
        flower.removeHandler(reader)


@contextmanager
def show_progress(console: Console, rounds: int | None) -> Iterator[Bar | Lines]:
    """Show how far a run is: by a bar if the output is a terminal, else by plain lines.

    Parameters
    ----------
    console : rich.console.Console
    rounds : int, optional
        As in `Position`.

    Yields
    ------
    Bar or Lines
        Its `on_message` is for `run_local`. The log of this process is read; `on_line` is for the
        lines of another one.
    """
    position = Position(rounds)
    # Colours can be forced on where there is no terminal.
    terminal = console.is_interactive and console.file.isatty()
    display = Bar(console, position) if terminal else Lines(console, position)
    with reading_log(display.on_line), display:
        yield display
