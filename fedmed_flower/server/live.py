"""``live.json`` of a run folder: where a run is, while it goes on.

`fedmed watch` shows it. The file is replaced at most once a second, by a thread of its own, so that
a slow disk holds up no round. If nothing happens it is written anew every ten seconds: a run whose
file is older was killed.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from threading import Event, Lock, Thread
from typing import Any

from fedmed_flower.errors import InputError, shown
from fedmed_flower.files import LIVE
from fedmed_flower.server.history import Row
from fedmed_flower.server.listener import Listener
from fedmed_flower.server.run_folder import RunFolder
from fedmed_flower.wire import ALL_SITES

log = logging.getLogger("flwr.fedmed")

LIVE_VERSION = 1
# Seconds: between two writes at least, and at most.
LEAST_PAUSE = 1.0
LONGEST_PAUSE = 10.0
_MOST_FAILURES = 100
_MOST_REASON = 400
# What a phase is called; any other has no name.
_PHASES = {
    "describe": "roll call",
    "contribution": "roll call",
    "train": "train",
    "val": "validate",
    "test": "test",
    "pictures": "pictures",
}


class Live(Listener):
    """Keeps ``live.json``, once the run has a folder.

    Parameters
    ----------
    clock : callable
        Returns the time in seconds, from any start.
    now : callable
        Returns date and time in UTC.
    pause : float
        Seconds between two looks of the thread that writes.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        pause: float = LEAST_PAUSE,
    ) -> None:
        self._clock = clock
        self._now = now
        self._pause = pause
        self._lock = Lock()
        self._over = Event()
        self._thread: Thread | None = None
        self._folder: RunFolder | None = None
        self._app = ""
        self._started = now()
        self._status = "running"
        self._message = ""
        self._part = ""
        self._round = 0
        self._rounds = 0
        self._phase = ""
        self._asked: list[str] = []
        # Of sites that were asked by another name: the name by that one.
        self._names: dict[str, str] = {}
        # The keys of a dictionary, in the order of the replies: a run may have thousands of sites.
        self._replied: dict[str, None] = {}
        self._failed: dict[str, str] = {}
        self._failures: deque[dict[str, Any]] = deque(maxlen=_MOST_FAILURES)
        self._time_left = _TimeLeft()
        self._changed = True
        self._written: float | None = None
        self._warned = False

    def open(self, folder: RunFolder, app: str) -> None:
        """Write the file from here on; of several calls the first counts."""
        if self._thread is not None:
            return
        with self._lock:
            self._folder = folder
            self._app = app
            self._status = "running"
            self._message = ""
            self._changed = True
        self.tick()
        self._over.clear()
        self._thread = Thread(target=self._go_on, name=LIVE, daemon=True)
        self._thread.start()

    def tick(self) -> None:
        """Write the file if it is due: something has changed, or it has not been written for long.

        Never within a second of the last time.
        """
        with self._lock:
            seconds = self._clock()
            pause = LONGEST_PAUSE if self._written is None else seconds - self._written
            if pause < LEAST_PAUSE or not (self._changed or pause >= LONGEST_PAUSE):
                return
            content = self._content(seconds)
        self._write(content)

    def began(self, part: str, rounds: int, rows: Sequence[Row]) -> None:
        """Begin the rounds of the run, or of a model for comparison."""
        with self._lock:
            self._part = shown(part)
            self._rounds = rounds
            self._round = max((row[0] for row in rows), default=0)
            self._time_left = _TimeLeft(done=self._round)
            self._ask("", ())

    def asked(self, server_round: int, phase: str, sites: Sequence[str]) -> None:
        """Begin a phase, of which no site has replied."""
        with self._lock:
            self._round = server_round or self._round
            self._ask(_PHASES.get(phase, ""), sites)
            if phase == "train":
                self._time_left.begin(self._clock())

    def named(self, before: str, site: str) -> None:
        """Call a site by its name."""
        with self._lock:
            self._names[before] = site
            self._changed = True

    def replied(self, site: str) -> None:
        """Count a site's reply; one that fails as well does not count."""
        with self._lock:
            if site not in self._replied and site not in self._failed:
                self._replied[site] = None
                self._changed = True

    def failed(self, server_round: int, phase: str, site: str, reason: str) -> None:
        """Count a site as failed, even if it has replied."""
        name = _PHASES.get(phase, phase)
        reason = shown(reason, _MOST_REASON)
        failure = {
            "round": server_round or self._round,
            "phase": f"{self._part}, {name}" if self._part else name,
            "site": site,
            "reason": reason,
        }
        with self._lock:
            self._failures.append(failure)
            if site != ALL_SITES:
                self._failed.setdefault(site, reason)
                self._replied.pop(site, None)
            self._changed = True

    def round_ended(self, server_round: int, rows: Sequence[Row]) -> None:
        """Take up how long the round has taken."""
        with self._lock:
            self._time_left.end(server_round, self._clock())
            self._changed = True

    def ended(self, status: str, message: str) -> None:
        """Write how the run has ended, whenever the file was written last."""
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        self._thread = None
        with self._lock:
            self._status = status
            self._message = shown(message)
            self._part = ""
            self._ask("", ())
            content = self._content(self._clock())
        self._write(content)

    def _ask(self, phase: str, sites: Sequence[str]) -> None:
        self._phase = phase
        # A site may be sent several messages.
        self._asked = list(dict.fromkeys(sites))
        self._names = {}
        self._replied = {}
        self._failed = {}
        self._changed = True

    def _go_on(self) -> None:
        while not self._over.wait(self._pause):
            self.tick()

    def _content(self, seconds: float) -> dict[str, Any]:
        """Return what is written now, at `seconds` of the clock."""
        self._changed = False
        self._written = seconds
        running = self._status == "running"
        return {
            "version": LIVE_VERSION,
            "app": self._app,
            "status": self._status,
            "message": self._message,
            "started": self._started.isoformat(timespec="seconds"),
            "updated": self._now().isoformat(timespec="milliseconds"),
            "part": self._part,
            "round": self._round,
            "rounds": self._rounds,
            "phase": self._phase,
            "asked": [self._names.get(site, site) for site in self._asked],
            "replied": [*self._replied],
            "failed": [{"site": site, "reason": why} for site, why in self._failed.items()],
            "failures": list(self._failures),
            "seconds_left": self._time_left.at(self._rounds, seconds) if running else None,
        }

    def _write(self, content: dict[str, Any]) -> None:
        """Write the file; if that fails, say so once: the run needs it not."""
        if self._folder is None:
            return
        try:
            self._folder.write_json(LIVE, content)
        except (OSError, InputError) as error:
            if not self._warned:
                log.warning("%s cannot be written: %s", self._folder.path / LIVE, error)
            self._warned = True


class _TimeLeft:
    """How long the rounds still take, by the mean of those that have ended.

    Parameters
    ----------
    done : int
        Number of the last round that had ended before, of which the time is unknown.
    """

    def __init__(self, done: int = 0) -> None:
        self._done = done
        self._timed = 0
        self._since: float | None = None
        self._until = 0.0

    def begin(self, seconds: float) -> None:
        """Take up that a round begins; the first one counts."""
        if self._since is None:
            self._since = seconds

    def end(self, server_round: int, seconds: float) -> None:
        """Take up that a round has ended."""
        self._done = server_round
        self._timed += 1
        self._until = seconds

    def at(self, rounds: int, seconds: float) -> float | None:
        """Return the seconds until all rounds have ended; None if they are unknown or have."""
        left = rounds - self._done
        if self._since is None or not self._timed or left <= 0:
            return None
        mean = (self._until - self._since) / self._timed
        return round(max(0.0, left * mean - (seconds - self._until)), 1)
