"""A hospital answers a question about its rows: exactly under the guard, or with noise."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Message, RecordDict

from fedmed_flower.config import with_type_of
from fedmed_flower.data.site import RUN_KEY, SPLITS, min_cell_count
from fedmed_flower.errors import DeclinedError
from fedmed_flower.namesakes import told_names
from fedmed_flower.privacy.accounting import Release, noise_for
from fedmed_flower.privacy.ledger import Ledger
from fedmed_flower.privacy.patient import budget_of, ledger_path
from fedmed_flower.statistics.columns import Columns
from fedmed_flower.statistics.guard import open_guard
from fedmed_flower.statistics.local import MOST_COMPARED, Local
from fedmed_flower.statistics.noised import noised, plan
from fedmed_flower.statistics.request import Request

if TYPE_CHECKING:
    from fedmed_flower.clients.base import MedicalClient

log = logging.getLogger("flwr.fedmed")

# Beside the ledger, and not taken for one.
ANSWERS = ".answers"


def answer_statistics(client: MedicalClient, message: Message) -> RecordDict:
    """Return what may leave of the answer to ``request`` in the message's config.

    All rows of all splits together are asked about. What is told without noise is first written
    down in a file beside the hospital's ledger; noise is charged to the ledger.

    Raises
    ------
    InputError
        Where the request is none, or names what is not there, or a file cannot be written.
    DeclinedError
        Where the hospital tells nothing without noise, or the budget would be passed.
    """
    config = client.read(message)
    request = Request.from_text(str(config.get("request", "")))
    if client.secretive and not request.epsilon:
        raise DeclinedError(
            "this hospital, or this run, protects patients by noise: ask with --epsilon"
        )
    if request.epsilon and not client.site.simulated and budget_of(client.context) is None:
        # With a large epsilon, or often enough, noise is no protection.
        raise DeclinedError("noise takes the place of the minimum count only under a budget")
    data = client.data()
    rows = [row for split in SPLITS for row in getattr(data, split)]
    columns = Columns(rows, request, getattr(client, "schema", None))
    minimum = max(min_cell_count(client.context, client.site), request.minimum)
    told: dict[str, Any] = {"minimum": minimum, "noise": None}
    told |= (_noised if request.epsilon else _exact)(client, config, columns, request, minimum)
    # In a simulation the server prints it, in the same process.
    level = logging.DEBUG if client.site.simulated else logging.INFO
    for group, what, why in told["withheld"]:
        log.log(level, "%s withholds %s: %s", client.site.name, f"{group} {what}".strip(), why)
    text = json.dumps(told, allow_nan=False)
    return RecordDict({"statistics": ConfigRecord({"answer": text}), **told_names(client)})


def _exact(
    client: MedicalClient, config: ConfigRecord, columns: Columns, request: Request, minimum: int
) -> dict[str, Any]:
    node = client.context.node_config
    hide = with_type_of(False, node.get("hide-few-missing", False), "hide-few-missing")
    most = with_type_of(
        MOST_COMPARED, node.get("max-filter-values", MOST_COMPARED), "max-filter-values"
    )
    ledger = ledger_path(client.context, client.site, config)
    path = ledger.with_name(ledger.name.removesuffix(".sqlite") + ANSWERS)
    if not (client.site.simulated or path.exists()):
        log.warning("%s: %s is new: no earlier answer is known", client.site.name, path)
    with open_guard(path, columns, minimum, hide) as guard:
        return Local(columns, request, guard, most).answer()


def _noised(
    client: MedicalClient, config: ConfigRecord, columns: Columns, request: Request, minimum: int
) -> dict[str, Any]:
    context = client.context
    planned = plan(columns, request)
    multiplier = noise_for(request.epsilon, request.delta, 1.0, 1)
    # A ledger that the hospital has named and that is gone is no reason to begin anew.
    ledger = Ledger(
        ledger_path(context, client.site, config), create="ledger" not in context.node_config
    )
    charge = ledger.charge(
        columns.patients,
        Release(1.0, multiplier),
        1,
        run=str(config.get(RUN_KEY, context.run_id)),
        purpose="statistics",
        app=type(client).__name__,
        budget=budget_of(context),
    )
    groups, withheld = noised(planned, columns, multiplier, minimum)
    ledger.settle(charge)
    noise = {"epsilon": request.epsilon, "delta": request.delta, "multiplier": multiplier}
    return {"groups": groups, "withheld": withheld, "noise": noise}
