"""The ClientApp of a hospital: from a message to a reply, by the handler of the message's type.

If something fails at a real site, only the class of the error leaves it.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Collection, Sequence
from functools import partial
from importlib import import_module
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.constant import ErrorCode

from fedmed_flower.clients.base import MedicalClient, Query
from fedmed_flower.clients.secure import SecureReply, asks_for_sum, refuse_in_plain
from fedmed_flower.clients.storage import keep_model, keep_splits, rows_of
from fedmed_flower.data.site import SPLITS, Row, Site
from fedmed_flower.errors import FAILED, DeclinedError, InputError
from fedmed_flower.metrics.plain import plain_metrics
from fedmed_flower.models.device import derive_seed
from fedmed_flower.settings.node import NodeSettings
from fedmed_flower.settings.registry import Sections, require_known, sections_of
from fedmed_flower.wire import (
    CHANGES,
    DECLINED,
    EPSILON,
    MESSAGE_VERSION,
    OWN,
    ROWS_RECORD,
    SERVER_ROUND,
    SITE_RECORD,
    SPLIT,
    VALIDATE,
    VALIDATION,
    VERSION,
    WHY,
    error_reason,
)

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("flwr.fedmed")

# Of each traceback that this process has logged: run, class of the error, file and line. A broken
# app fails at each site and in each round; one traceback is enough.
_logged: set[tuple[object, ...]] = set()


class HospitalApp(ClientApp):
    """A Flower ClientApp that knows its client, and which settings that reads.

    Attributes
    ----------
    client : type of MedicalClient
    sections : sequence of Section classes
        The groups of settings in the run config.
    node_keys : collection of str
        The keys that the app adds to the hospital's node config.
    """

    def __init__(self, client: type[MedicalClient]) -> None:
        super().__init__()
        self.client = client
        self.sections: Sections = sections_of(client)
        self.node_keys: Collection[str] = client.node_keys


def app_of(cls: type[MedicalClient], mods: Sequence[Mod] = ()) -> HospitalApp:
    """Return the Flower ClientApp of a client: train, evaluate and its queries."""
    app = HospitalApp(cls)
    app.train()(partial(answer, cls, train, mods=mods))
    app.evaluate()(partial(answer, cls, evaluate, mods=mods))
    for name, query in cls.queries.items():
        app.query(name)(partial(answer, cls, query, mods=mods))
    return app


def answer(
    cls: type[MedicalClient],
    handler: Query | str,
    message: Message,
    context: Context,
    mods: Sequence[Mod] = (),
) -> Message:
    """Return the reply to a message; if anything fails, the reply is an error.

    Parameters
    ----------
    cls : type of MedicalClient
    handler : callable or str
        Maps (client, message) to the content of the reply; or the name of such a function, as
        ``"module:function"``.
    message, context
        As Flower passes them.
    mods : sequence of Mod
        They run around the handler, the first one outermost. An error of the handler passes through
        them; an error of their own is treated like one of the handler.
    """
    site = None
    client = None
    state = copy.deepcopy(context.state)

    def reply(message: Message, context: Context) -> Message:
        nonlocal client
        client = _stand_in(cls(context), message)
        handle = _function_at(handler) if isinstance(handler, str) else handler
        part = SecureReply.of(client, message)
        content = handle(client, message)
        if part is not None:
            content = part.reply(message, content)
        site = client.site
        about: dict[str, Any] = {"name": site.name, "simulated": site.simulated}
        about[VERSION] = MESSAGE_VERSION
        if client.touched or not client.sealed:
            data = client.data()
            about |= {"data": data.source, "generated": data.generated}
        content[SITE_RECORD] = ConfigRecord(about)
        return Message(content, reply_to=message)

    try:
        site = Site.from_context(context)
        # A misspelled budget would bound nothing: no message is answered if a key is unknown.
        NodeSettings.of(context.node_config, cls.node_keys)
        require_known(context.run_config, sections_of(cls))
        call: ClientAppCallable = reply
        for mod in reversed(mods):
            call = partial(_through, mod, call)
        return call(message, context)
    except Exception as error:
        context.state = state
        failure = _logged_failure(error, site, client, context.run_id)
        return Message(failure, reply_to=message)


def _through(mod: Mod, call: ClientAppCallable, message: Message, context: Context) -> Message:
    return mod(message, context, call)


def _logged_failure(
    error: Exception, site: Site | None, client: MedicalClient | None, run_id: int
) -> Error:
    """Log an error at the site and return the one that is sent.

    Parameters
    ----------
    error : Exception
    site : Site or None
        None if the error came before the site was known.
    client : MedicalClient or None
        None if the error came before the client was made.
    run_id : int
        The traceback is logged once a run.
    """
    cause = _input_error(error) or error
    name = "without a name" if site is None else site.name
    simulated = site is not None and site.simulated
    sealed = not simulated and client is not None and client.touched and client.sealed
    reason, level = _reason(cause, simulated, sealed)
    traceback = level == logging.ERROR and not isinstance(cause, InputError)
    log.log(level, "%s: %s", name, cause, exc_info=traceback and _is_new(cause, run_id))
    return Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=error_reason(name, reason))


def _is_new(cause: Exception, run_id: int) -> bool:
    """Return whether no traceback from the same line of code was logged in this run."""
    frames = [(frame.filename, frame.lineno) for frame in extract_tb(cause.__traceback__)]
    source = (run_id, type(cause).__name__, *frames[-1:])
    new = source not in _logged
    _logged.add(source)
    return new


def _reason(cause: Exception, simulated: bool, sealed: bool) -> tuple[str, int]:
    """Return the text that the server receives for an error, and the level of the site's own log.

    Parameters
    ----------
    cause : Exception
    simulated : bool
        Whether the site is simulated. Then the whole text is sent, and the server, which runs on
        the same machine, logs it.
    sealed : bool
        Whether a patient's rows were looked at and only noise may leave. Then not even the class is
        sent, since which error it is may depend on a patient.
    """
    kind = type(cause).__name__
    if isinstance(cause, DeclinedError):
        return f"{DECLINED}{cause}", logging.DEBUG
    if simulated and isinstance(cause, InputError):
        return f"{cause}", logging.DEBUG
    if simulated:
        return f"{kind}: {cause}", logging.ERROR
    return (FAILED if sealed else kind), logging.ERROR


def train(client: MedicalClient, message: Message) -> RecordDict:
    """Train the model that came with a message on the site's training rows, and return it.

    If the message asks for it, the model is also validated as it came.
    """
    from fedmed_flower.clients.compression import compressed
    from fedmed_flower.clients.methods import MethodRound, records_of

    config = client.read(message)
    if config.get(VALIDATE) and asks_for_sum(message):
        raise InputError("figures of validation are no part of a secure sum of training")
    server_round = int(config.get(SERVER_ROUND, 0))  # type: ignore[arg-type]
    client.require_protection()
    arrays_key, arrays = next(iter(message.content.array_records.items()))
    client.progress = client.settings.progress(server_round)
    seed = derive_seed(
        client.settings.seed,
        client.site.name,
        server_round,
        "train",
        *filter(None, [client.draw_key]),
    )
    began = time.perf_counter()
    model, travelling = client.model_of(arrays, config)
    work = MethodRound.of(client, config, model, travelling)
    if client.privacy.on:
        with client.seeded(seed):
            metrics, ended = work.train(message.content, None, seed)
    else:
        data, prepared = client.prepared("train", client.pooled)
        client.require_usable(data.train)
        with client.seeded(seed):
            metrics, ended = work.train(message.content, prepared, seed)
        client.require_several(data.train)
    if client.secretive:
        metrics = {name: metrics[name] for name in metrics if name == EPSILON}
    else:
        metrics = client.disclosed(metrics) | {"seconds": time.perf_counter() - began}
    changes = _changes(client, config)
    metrics["num-examples"] = client.count("train", client.pooled)
    content = RecordDict({arrays_key: work.sent(), "metrics": MetricRecord(metrics)})
    content.update(records_of(ended))
    if changes and not client.secretive:
        content[ROWS_RECORD] = ConfigRecord({CHANGES: changes})
    if config.get(VALIDATE):
        # Only now: a site that cannot train is charged for no figures. Its state is still that of
        # the round before.
        content[VALIDATION] = _validation(client, message, config)
    reply = compressed(client.site.name, config, content, message.content, work.residual())
    work.keep(ended, reply.residual)
    return reply.content


def _validation(
    client: MedicalClient, message: Message, config: ConfigRecord
) -> MetricRecord | ConfigRecord:
    """Validate the model that came with a training message, as an evaluation message would ask.

    Returns
    -------
    MetricRecord or ConfigRecord
        What such a message would be replied; or, if that were an error, its reason.
    """
    asked = copy.copy(message)
    asked.content = RecordDict(dict(message.content.array_records.items()))
    before = int(config.get(SERVER_ROUND, 0)) - 1  # type: ignore[arg-type]
    asked.content["config"] = ConfigRecord({**config, SERVER_ROUND: before, SPLIT: "val"})
    context = client.context
    state = copy.deepcopy(context.state)
    # One of its own, as for each message.
    validator = type(client)(context)
    try:
        refuse_in_plain(validator, MessageType.EVALUATE)
        (metrics,) = evaluate(validator, asked).metric_records.values()
        return metrics
    except Exception as error:
        context.state = state
        failure = _logged_failure(error, client.site, validator, context.run_id)
        return ConfigRecord({WHY: str(failure.reason)})


def _changes(client: MedicalClient, config: ConfigRecord) -> str:
    """Return how the site's patients have changed since the run began; empty if they have not.

    A simulated site says how many have come and gone; of a real one not even that leaves.
    """
    data = client.data()
    counted = keep_splits(client.context, client.site, config, data)
    if client.site.simulated:
        return counted
    run = client.run_key(config).partition("/")[0]
    if not client.ledger(config).note_rows(run, rows_of(data)):
        return ""
    log.warning("%s: patients have come or gone since the run's last round", client.site.name)
    return "patients have come or gone"


def evaluate(client: MedicalClient, message: Message) -> RecordDict:
    """Measure the model that came with a message on one split of the site's rows."""
    from fedmed_flower.clients.private import measure_protected

    config = client.read(message)
    split = str(config.get(SPLIT, "val"))
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if split == "train" and client.privacy.on and not client.noises_metrics:
        raise DeclinedError("training patients are measured with noise only")
    client.split = split
    arrays = next(iter(message.content.array_records.values()))
    if client.noises_metrics:
        model = _evaluated(client, arrays, config)
        with client.seeded(derive_seed(client.settings.seed, client.site.name, split)):
            metrics = measure_protected(client, model, config)
        return RecordDict({"metrics": MetricRecord(plain_metrics(metrics))})
    data, prepared = client.prepared(split, client.pooled)
    rows: Sequence[Row] = getattr(data, split)
    metrics = {"num-examples": len(rows)}
    reported = client.disclosable(rows, split, config) if rows else None
    if reported:
        if len(reported) < len(rows):
            prepared = client.prepare(reported, train=split == "train")
        model = _evaluated(client, arrays, config)
        with client.seeded(derive_seed(client.settings.seed, client.site.name, split)):
            metrics = client.measure(model, prepared)
    elif config.get(OWN):
        # A hospital whose figures may not leave has its own model all the same.
        _evaluated(client, arrays, config)
    return RecordDict({"metrics": MetricRecord(client.disclosed(metrics))})


def _evaluated(client: MedicalClient, arrays: ArrayRecord, config: ConfigRecord) -> nn.Module:
    """Return the model to measure: the global one, or the site's own if the message asks for it.

    It is measured as it will be used, with adapters merged.
    """
    from fedmed_flower.clients.methods import MethodRound
    from fedmed_flower.models.adapters import merge_adapters

    model, travelling = client.model_of(arrays, config)
    if not config.get(OWN):
        return merge_adapters(model)
    own = merge_adapters(MethodRound.of(client, config, model, travelling).own())
    if client.split == "test":
        keep_model("own", client.context, client.site, config, own.state_dict())
    return own


def _stand_in(client: MedicalClient, message: Message) -> MedicalClient:
    """Return the client that answers a message: this one, or its stand-in for the config's key."""
    for config in message.content.config_records.values():
        for key, maker in client.stand_ins.items():
            if key in config:
                stand_in: MedicalClient = _function_at(maker)(client)
                return stand_in
    return client


def _function_at(name: str) -> Any:
    """Return the function that a text names as ``module:function``."""
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


def _input_error(error: BaseException | None) -> InputError | None:
    """Return the `InputError` behind an error, since MONAI wraps what its transforms raise.

    A site that declines has said why itself.
    """
    if isinstance(error, DeclinedError):
        return None
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__
    return error
