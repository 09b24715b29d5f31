"""The rows of its sites that a process keeps during a run, since a client lives for one message."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmed_flower.data.site import Row, Site, SiteData

# The name of the client's class, the site, and further parts, such as a split's name.
Key = tuple[Hashable, ...]


@dataclass
class RunCache:
    """Rows of the sites of one run, as they were loaded, screened and prepared.

    Attributes
    ----------
    run_id : int or None
        The run to which the rows belong; None before the first run.
    loaded : dict of Key to SiteData
        All rows, as a client's `load_data` returned them.
    screened : dict of Key to sequence of Row
        The rows of a split that can be used.
    prepared : dict of Key to any
        The rows of a split as a client's `prepare` makes them.
    more : dict of Key to any
        Anything else that a client keeps.
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
            for rows in (self.loaded, self.screened, self.prepared, self.more):
                rows.clear()
        return self

    def prepared_of(self, site: Site) -> Iterator[Any]:
        """Yield the prepared rows of a site, whichever client has prepared them."""
        return (prepared for key, prepared in self.prepared.items() if site in key)
