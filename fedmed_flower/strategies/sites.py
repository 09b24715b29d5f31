"""Which sites take part: waiting for them, drawing a sample, their names."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from fedmed_flower.data.site import SITE_RECORD
from fedmed_flower.runfolder import ALL_SITES

log = logging.getLogger("flwr.fedmed")


def wait_for_sites(grid: Grid, needed: int) -> None:
    """Wait until enough sites are connected; once waiting, until no further one turns up."""
    count = len(list(grid.get_node_ids()))
    if count >= needed:
        return
    log.info("waiting for %d sites, %d are connected", needed, count)
    while True:
        time.sleep(1)
        before, count = count, len(list(grid.get_node_ids()))
        if count >= needed and count == before:
            return


def draw(
    nodes: Iterable[int], names: Mapping[int, str], count: int, seed: tuple[int, ...]
) -> list[int]:
    """Draw nodes by seed and site name alone: Flower gives a site another node id in each run.

    Returns
    -------
    list of int
        `count` nodes, or all where there are fewer, in the order of their names.
    """
    candidates = sorted(set(nodes), key=lambda node_id: (names.get(node_id, ""), node_id))
    count = min(count, len(candidates))
    places = np.random.default_rng(seed).choice(len(candidates), count, replace=False)
    return [candidates[place] for place in sorted(places)]


def learn_name(names: dict[int, str], node_id: int, reply: Message) -> None:
    """Take up the name that a reply gives its site; a name that is taken gets the node id."""
    if reply.has_error() or not reply.has_content() or node_id in names:
        return
    name = reply.content.config_records.get(SITE_RECORD, ConfigRecord()).get("name")
    if not isinstance(name, str) or not name.strip():
        return
    name = name.strip()[:80]
    taken = name == ALL_SITES or name in names.values()
    names[node_id] = f"{name} (node {node_id})" if taken else name
