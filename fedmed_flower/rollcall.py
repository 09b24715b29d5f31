"""The sites of a run, before its first round."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedmed_flower.data.site import SITE_RECORD, SPLITS
from fedmed_flower.errors import InputError
from fedmed_flower.strategies.screening import error_text
from fedmed_flower.strategies.sites import learn_name


@dataclass
class Sites:
    """What the sites said of themselves before the first round."""

    counts: dict[int, dict[str, int]] = field(default_factory=dict)
    labels: dict[int, Any] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    sources: set[str] = field(default_factory=set)
    generated: bool = False
    simulated: bool = True
    asked: int = 0
    refusals: list[str] = field(default_factory=list)


def roll_call(grid: Grid, timeout: float) -> Sites:
    """Ask every connected site for its name and its numbers of rows."""
    nodes = list(grid.get_node_ids())
    question = f"{MessageType.QUERY}.describe"
    messages = [Message(RecordDict(), node_id, question) for node_id in nodes]
    sites = Sites(asked=len(nodes))
    for reply in grid.send_and_receive(messages, timeout=timeout):
        node_id = reply.metadata.src_node_id
        learn_name(sites.names, node_id, reply)
        if reply.has_error():
            sites.refusals.append(error_text(reply))
            continue
        try:
            about = reply.content.config_records[SITE_RECORD]
            (counts,) = reply.content.metric_records.values()
            rows = {split: int(counts[split]) for split in SPLITS}  # type: ignore[arg-type]
            if min(rows.values()) < 0:
                raise ValueError(f"negative number of rows in {rows}")
            source, generated, simulated = about["data"], about["generated"], about["simulated"]
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            sites.refusals.append(f"malformed answer: {type(error).__name__} {error}")
            continue
        sites.names.setdefault(node_id, f"node {node_id}")
        sites.counts[node_id], sites.labels[node_id] = rows, counts.get("labels")
        sites.sources.add(str(source))
        sites.generated |= bool(generated)
        sites.simulated &= bool(simulated)
    if not sites.counts:
        raise InputError(sites.refusals[0] if sites.refusals else "no site answered the roll call")
    in_order = sorted(sites.counts, key=lambda node_id: sites.names[node_id])
    sites.counts = {node_id: sites.counts[node_id] for node_id in in_order}
    return sites
