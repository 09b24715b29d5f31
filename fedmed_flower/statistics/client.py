"""A hospital answers a question about its rows: exactly under the guard, or with noise."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedmed_flower.arrays.views import is_finite, view
from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.duplicates import digests_of
from fedmed_flower.clients.queries import refuse_other_version
from fedmed_flower.clients.secure import require_summed, summands
from fedmed_flower.data.site import all_rows, min_cell_count
from fedmed_flower.errors import DeclinedError, InputError, shown
from fedmed_flower.metrics.survival import followed
from fedmed_flower.privacy.accounting import Release, noise_for
from fedmed_flower.privacy.grid import divergence_once
from fedmed_flower.privacy.patient import budget_of
from fedmed_flower.secure.magnitudes import in_sizes
from fedmed_flower.statistics.columns import Columns
from fedmed_flower.statistics.declared import Declared
from fedmed_flower.statistics.local import answer_exactly
from fedmed_flower.statistics.noised import Cells, noised, plan
from fedmed_flower.statistics.request import Request, Survival
from fedmed_flower.statistics.tallies import about, counts, require_tallied, squares, told
from fedmed_flower.wire import ANSWER, MODELS, REQUEST, STATISTICS

log = logging.getLogger("flwr.fedmed")


def statistics(client: MedicalClient, message: Message) -> RecordDict:
    """Return what may leave of the answer to ``request`` in the message's config.

    The answer is about the rows of all splits together. An exact answer is first recorded in a file
    beside the hospital's ledger; an answer with noise is charged to the ledger.

    Raises
    ------
    InputError
        If the request cannot be read or does not fit the columns, or a file cannot be written.
    DeclinedError
        If the message is of another version, the hospital answers only with noise, or noise is
        asked of a real hospital that has no budget, or the charge would exceed the budget, or the
        conditions use too many values.
    """
    refuse_other_version(client, message)
    config = client.read(message)
    request = Request.from_text(str(config.get(REQUEST, "")))
    if client.secretive and not request.epsilon:
        raise DeclinedError(
            "this hospital, or this run, protects patients by noise: ask with --epsilon"
        )
    if request.epsilon and not client.site.simulated and budget_of(client.context) is None:
        # Without a budget a large epsilon, or many questions, would make noise useless.
        raise DeclinedError(
            "noise replaces the minimum count only if the hospital has a budget: budget-epsilon in "
            "its node config"
        )
    minimum = max(min_cell_count(client.context, client.site), request.minimum)
    reported: dict[str, Any] = {"minimum": minimum, "noise": None}
    reported |= (_noised if request.epsilon else _exact)(client, config, request, minimum)
    # In a simulation the server reports it in the same process.
    level = logging.DEBUG if client.site.simulated else logging.INFO
    for group, what, why in reported["withheld"]:
        log.log(level, "%s withholds %s: %s", client.site.name, f"{group} {what}".strip(), why)
    text = json.dumps(reported, allow_nan=False)
    return RecordDict(
        {
            STATISTICS: ConfigRecord({ANSWER: text}),
            **digests_of(client.site, client.data(), client.context.run_id),
        }
    )


def tallies(client: MedicalClient, message: Message) -> RecordDict:
    """Add what may leave of an exact answer to a secure sum, number by number.

    What the hospital withholds adds 0, and so does what is not asked for.

    Raises
    ------
    InputError
        As `statistics`.
    DeclinedError
        As `statistics`, or if the message does not ask for a secure sum.
    """
    require_summed(message, "statistics")
    refuse_other_version(client, message)
    config = client.read(message)
    request = Request.from_text(str(config.get(REQUEST, "")))
    require_tallied(request, "")
    if client.secretive:
        raise DeclinedError(
            "this hospital, or this run, protects patients by noise, and a secure sum of "
            "statistics carries none"
        )
    minimum = max(min_cell_count(client.context, client.site), request.minimum)
    reported = _exact(client, config, request, minimum)
    arrays = message.content.array_records.get(MODELS, ArrayRecord())
    given = {name: view(arrays[name]) for name in arrays}
    wanted = given.get("asked", np.zeros(0, bool))
    tells = told(reported, request)
    if wanted.shape != tells.shape or wanted.dtype != np.bool_:
        raise InputError(f"asked must be {len(tells)} times true or false")
    parts: dict[str, Any] = {"told": tells * wanted, "counts": counts(reported, request, wanted)}
    large = squares(reported, request, wanted)
    parts["squares"] = in_sizes(large)
    if "units" in given:
        centres, units = (given.get(name, np.zeros(0)) for name in ("centres", "units"))
        for array in (centres, units):
            if array.shape != large.shape or array.dtype != np.float64 or not is_finite(array):
                raise InputError(f"centres and units must be {len(large)} finite numbers each")
        if (units <= 0).any():
            raise InputError("units must be above 0")
        sums = about(reported, request, wanted, centres, units)
        parts |= dict(zip(("sums", "deviations", "products"), sums, strict=True))
    return summands(**parts)


def _exact(
    client: MedicalClient, config: ConfigRecord, request: Request, minimum: int
) -> dict[str, Any]:
    columns = Columns(all_rows(client.data()), request, client.declared)
    node = client.node
    reported = answer_exactly(
        client.book_path(config),
        columns,
        request,
        minimum,
        node.hide_few_missing,
        node.max_filter_values,
    )
    if (asked := request.survival) is not None:
        times, _ = columns.survival(asked)
        _warn_of_horizon(client, asked, followed(times, columns.patients, asked.horizon), minimum)
    return reported


def _noised(
    client: MedicalClient, config: ConfigRecord, request: Request, minimum: int
) -> dict[str, Any]:
    """Answer with noise; before the ledger is charged, only the patients are read from the rows.

    So a faulty request fails before the charge, with an error that does not depend on the rows.
    """
    declared = Declared(request, client.declared)
    planned = plan(request, declared)
    multiplier = noise_for(request.epsilon, request.delta, 1.0, 1)
    ledger = client.ledger(config)
    cells = Cells(all_rows(client.data()), declared)
    charge = ledger.charge(
        cells.patients,
        Release(1.0, multiplier),
        1,
        run=client.run_key(config),
        purpose="statistics",
        app=type(client).__name__,
        budget=budget_of(client.context),
        divergence=divergence_once(planned.size),
    )
    groups, withheld = noised(planned, cells, multiplier, minimum)
    ledger.settle(charge)
    if (asked := request.survival) is not None:
        times, _ = cells.follow_up(asked)
        _warn_of_horizon(client, asked, followed(times, cells.patients, asked.horizon), minimum)
    noise = {"epsilon": request.epsilon, "delta": request.delta, "multiplier": multiplier}
    return {"groups": groups, "withheld": withheld, "noise": noise}


def _warn_of_horizon(client: MedicalClient, asked: Survival, count: int, minimum: int) -> None:
    """Log at the hospital, for itself, that hardly anybody is followed up to the horizon."""
    if count < minimum:
        log.warning(
            "%s: fewer than %d patients are followed up to %s=%g, the horizon of the survival "
            "curve: its last part rests on hardly any patient here. Ask with a shorter horizon",
            client.site.name,
            minimum,
            shown(asked.time),
            asked.horizon,
        )
