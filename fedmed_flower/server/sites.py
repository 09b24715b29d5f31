"""Which sites take part: waiting for them, drawing a sample, their names."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterable, Mapping

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from fedmed_flower.arrays.views import records_of
from fedmed_flower.errors import InputError
from fedmed_flower.wire import ALL_SITES, SITE_RECORD, read_error

log = logging.getLogger("flwr.fedmed")


def app_name(grid: Grid) -> str:
    """Return the name of the app that runs; empty if it is not known."""
    return str(getattr(getattr(grid, "run", None), "fab_id", "")).rpartition("/")[2]


def wait_for_sites(grid: Grid, needed: int, timeout: float = math.inf) -> int:
    """Wait until enough sites are connected; after a wait, also until no further site connects.

    Returns
    -------
    int
        Number of connected sites; fewer than `needed` only if `timeout` seconds have passed.

    Raises
    ------
    InputError
        If the grid says that no further site can come.
    """
    count = len(list(grid.get_node_ids()))
    if count >= needed:
        return count
    if getattr(grid, "complete", False):
        raise InputError(
            f"{needed} sites are asked for (min-sites, min_available_nodes, min_train_nodes, "
            f"min_evaluate_nodes or num_malicious_nodes), but this run has {count}"
        )
    log.info("waiting for %d sites, %d are connected", needed, count)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        time.sleep(1)
        before = count
        count = len(list(grid.get_node_ids()))
        if count >= needed and count == before:
            break
    return count


def shortfall(strategy: str, needed: int, count: int, aside: str = "") -> str | None:
    """Return why too few sites take part for what a strategy promises; None if there are enough.

    Parameters
    ----------
    strategy : str
        The strategy's name.
    needed : int
        Replies that the strategy needs in a round.
    count : int
        Sites that take part; 0 gives None.
    aside : str
        What is added about them: a space, then text in brackets.
    """
    if count == 0 or count >= needed:
        return None
    return (
        f"{strategy} needs {needed} replies a round to keep its promise, but "
        f"{count} sites take part{aside}: raise min_train_nodes or lower num_malicious_nodes"
    )


def nobody_left(
    connected: Collection[int], declined: Collection[int], only: Collection[int] | None
) -> str | None:
    """Return why no further round can be trained; None if a connected site may train.

    Parameters
    ----------
    connected, declined : collection of int
        Nodes that are connected, and nodes that have declined to train.
    only : collection of int, optional
        Nodes to which training is confined.
    """
    if not declined:
        return None
    nodes = set(connected) if only is None else set(connected) & set(only)
    if not nodes or nodes - set(declined):
        return None
    return "every connected site has declined to train further"


def draw(
    nodes: Iterable[int], names: Mapping[int, str], count: int, seed: tuple[int, ...]
) -> list[int]:
    """Draw nodes by seed and site name alone: a site has another node id in each run.

    Returns
    -------
    list of int
        `count` nodes, or all if there are fewer, in the order of their names.
    """
    candidates = sorted(set(nodes), key=lambda node_id: (names.get(node_id, ""), node_id))
    count = min(count, len(candidates))
    drawn = np.random.default_rng(seed).choice(len(candidates), count, replace=False)
    return [candidates[index] for index in sorted(drawn)]


def learn_name(
    names: dict[int, str], node_id: int, reply: Message, connected: Collection[int] = ()
) -> None:
    """Add the name that a reply gives its site to `names`, if the site has none yet.

    The node id is added to a name that another site has, or that could be mistaken for ``all`` or
    ``node <id>``. A site that comes back under another node id gets its name back, if the node that
    had it is not in `connected`.
    """
    if node_id in names:
        return
    if reply.has_error():
        name: object = read_error(reply.error.reason or "")[0]
    elif reply.has_content():
        name = records_of(reply.content, ConfigRecord).get(SITE_RECORD, ConfigRecord()).get("name")
    else:
        return
    if not isinstance(name, str) or not name.strip():
        return
    name = "".join(letter for letter in name.strip()[:80] if letter.isprintable())
    if not name:
        return
    if connected:
        gone = [node for node, held in names.items() if held == name and node not in connected]
        for other in gone:
            log.warning("node %d replaces node %d as %s", node_id, other, name)
            del names[other]
    taken = name == ALL_SITES or name in names.values() or "node " in name
    names[node_id] = f"{name} (node {node_id})" if taken else name
