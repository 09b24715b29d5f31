"""What a process keeps of its sites for the length of a run: a client lives for one message."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmed_flower.data.site import Row, Site, SiteData

# The client's class, the site, and what tells several things of them apart.
Key = tuple[Hashable, ...]


@dataclass
class RunCache:
    """Rows of the sites of one run, as they were loaded, screened and prepared.

    Attributes
    ----------
    run_id : int or None
        The run that it belongs to.
    loaded : dict of Key to SiteData
    screened : dict of Key to sequence of Row
        The rows of a split that can be used.
    prepared : dict of Key to any
        The rows of a split as a client's `prepare` makes them.
    more : dict of Key to any
        What a client keeps of its own.
    """

    run_id: int | None = None
    loaded: dict[Key, SiteData] = field(default_factory=dict)
    screened: dict[Key, Sequence[Row]] = field(default_factory=dict)
    prepared: dict[Key, Any] = field(default_factory=dict)
    more: dict[Key, Any] = field(default_factory=dict)

    def of_run(self, run_id: int) -> RunCache:
        """Return the cache, emptied if it belonged to another run."""
        if run_id != self.run_id:
            self.run_id = run_id
            for kept in (self.loaded, self.screened, self.prepared, self.more):
                kept.clear()
        return self

    def prepared_of(self, site: Site) -> Iterator[Any]:
        """Yield all that is prepared of a site, whichever client has prepared it."""
        return (kept for key, kept in self.prepared.items() if site in key)
