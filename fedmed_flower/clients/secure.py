"""A hospital's replies as parts of secure sums, and its answers about them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from numpy.typing import NDArray

from fedmed_flower.arrays.views import view
from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.data.site import site_names, some_of
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.files import file_name
from fedmed_flower.metrics.plain import plain_metrics
from fedmed_flower.metrics.summing import Grid, is_whole, sums_of_record
from fedmed_flower.models.adapters import merge_adapters
from fedmed_flower.privacy.patient import ledger_path
from fedmed_flower.secure.audit import Chain
from fedmed_flower.secure.book import SecureBook, secure_path
from fedmed_flower.secure.encoding import SecureError, Value, decoded, digest_of_arrays, encoded
from fedmed_flower.secure.identity import Identity
from fedmed_flower.secure.member import Member
from fedmed_flower.secure.parts import (
    BY,
    CLIPPED,
    EXAMPLES,
    GRIDS,
    LOSS,
    MODEL,
    ONES,
    ROWS,
    TOLD,
    TOTAL,
    UNIFORM,
    figure_in,
)
from fedmed_flower.secure.record import DATA, TRAIN, Record
from fedmed_flower.secure.ring import FIXED
from fedmed_flower.secure.study import Study
from fedmed_flower.settings.secure import SUM, SecureSettings
from fedmed_flower.settings.text import setting_error
from fedmed_flower.wire import (
    ASKED,
    BOOKS,
    IN_SUMS,
    LEDGER_DIR,
    LETTER,
    MASKED,
    OTHERWISE_IN_SUMS,
    RECORD,
    RUN_KEY,
    SECURE,
    SECURE_RUN,
    SERVER_ROUND,
    SPLIT,
    SUMMANDS,
    WITHOUT_FIGURES,
)

log = logging.getLogger("flwr.fedmed")

# What differs from one run or round to the next, and does not make another question.
_OF_THE_RUN = (RUN_KEY, SERVER_ROUND, LEDGER_DIR)
_OF_THE_SERVER = ("run-dir", "resume", "round-timeout", "quorum", "grace", "track", "baselines")


def member_of(client: MedicalClient, run: str, secure: ConfigRecord) -> Member:
    """Return the hospital as a member of its study.

    In a simulation all hospitals of the run are the study, and their keys follow from their names.

    Raises
    ------
    InputError
        If the node config does not name the study or the key, or these do not fit the hospital.
    SecureError
        If the hospital's book is not the one that belongs to the key.
    """
    site = client.site
    if site.simulated:
        names = site_names(client.context, site)
        folder = str(secure.get(BOOKS, ""))
        if not folder:
            text = "secure sums in a simulation need a run folder: give run-dir"
            raise setting_error(text, "run-dir")
        identity = Identity.simulated(site.name, run)
        path = Path(folder) / f"{file_name(site.name)}.secure"
        path.parent.mkdir(parents=True, exist_ok=True)
        return _member(identity, Study.simulated(names, run), path)
    for key in ("secure-peers", "secure-key"):
        if not client.context.node_config.get(key):
            raise setting_error(f"a secure sum needs {key} in the hospital's node config", key)
    identity = Identity.load(Path(client.node.secure_key).expanduser())
    if identity.name != site.name:
        raise setting_error(
            f"secure-key must be the key of {site.name}, and {client.node.secure_key} is that of "
            f"{identity.name}",
            "secure-key",
        )
    study = Study.load(Path(client.node.secure_peers).expanduser())
    return _member(identity, study, secure_path(ledger_path(client.context, site, {})))


def _member(identity: Identity, study: Study, path: Path) -> Member:
    """Return a member whose book and audit trail lie side by side."""
    trail = Chain(path.with_suffix(".audit"), identity, identity.name)
    return Member(identity, study, SecureBook(path, identity.id), trail)


def in_sums_alone(client: MedicalClient, kind: str) -> bool:
    """Return whether the figures that answer a kind of message leave in secure sums alone.

    A run with ``secure=sum`` asks for it, or the hospital by ``secure-only`` in its node config.
    """
    secure = SecureSettings.from_run_config(client.context.run_config).secure
    return secure == SUM or client.node.answers_in_sums_alone(kind)


def refuse_in_plain(client: MedicalClient, kind: str) -> None:
    """Refuse a message that asks for no secure sum, if its answer must not leave in plain.

    Parameters
    ----------
    client : MedicalClient
    kind : str
        Kind of message, without "query.".

    Raises
    ------
    DeclinedError
    """
    if kind in WITHOUT_FIGURES or not in_sums_alone(client, kind):
        return
    remedy = "it has no form as a sum, so leave it out"
    if kind in (*IN_SUMS, *OTHERWISE_IN_SUMS):
        remedy = 'ask for it by secure="sum" in the run config'
    raise DeclinedError(
        f"{kind} would tell this hospital's own figures, which leave in secure sums alone: {remedy}"
    )


@dataclass(frozen=True)
class SecureReply:
    """What a message asks this hospital to add to a sum.

    Attributes
    ----------
    member : Member
    record : Record
    about, asked : dict
        As `Record.digest` and `Record.question` take them.
    """

    member: Member
    record: Record
    about: dict[str, Value]
    asked: dict[str, Value]

    @classmethod
    def of(cls, client: MedicalClient, message: Message) -> Self | None:
        """Read what a message asks for; None if it does not ask for a secure sum.

        Raises
        ------
        DeclinedError
            If anything about the sum is not as this hospital knows it, or such a message is
            answered in secure sums alone, or no sum can answer it.
        """
        kind = message.metadata.message_type
        if not asks_for_sum(message):
            refuse_in_plain(client, kind.removeprefix("query."))
            return None
        secure = message.content.config_records[SECURE]
        with _refused():
            record = Record.from_bytes(secure[RECORD])
            purpose = record.purpose.partition("/")[0]
            if kind.removeprefix("query.") != purpose:
                raise SecureError(f"a sum of {record.purpose} was asked for by a message {kind}")
            if purpose not in IN_SUMS:
                raise SecureError(f"{purpose} has no form as a sum")
            # Otherwise a count could be asked for again of fewer hospitals.
            kind_due = TRAIN if purpose == "train" else DATA
            if record.kind != kind_due:
                raise SecureError(
                    f"a sum of {purpose} must be of kind {kind_due}, got {record.kind}"
                )
            member = member_of(client, record.run, secure)
            member.require_sound(record)
        asked = asked_of(client, message)
        return cls(member, record, {**asked, "run": _run_of(message)}, asked)

    def reply(self, message: Message, content: RecordDict) -> RecordDict:
        """Return a reply's content as one part of the sum, under masks."""
        layout = self.record.layout
        if self.record.purpose.startswith(f"{MessageType.EVALUATE}/"):
            values, weight = _figures(self.record, content), 1.0
        else:
            values, weight = _values(self.record, message, content)
        words, clipped = layout.encode(values, weight)
        if CLIPPED in layout.parts:
            words[1][layout.start(CLIPPED.name)] = clipped
        with _refused():
            masked = self.member.mask(self.record, self.about, self.asked, words)
        small, large = masked.words
        record = ArrayRecord({"words32": Array(small), "words64": Array(large)})
        return RecordDict({MASKED: record, SECURE: ConfigRecord({LETTER: masked.letter})})


def _values(
    record: Record, message: Message, content: RecordDict
) -> tuple[dict[str, NDArray[Any]], float]:
    """Return what a reply adds to each part of a sum, and the weight of its change of the model."""
    metrics = next(iter(content.metric_records.values()), MetricRecord())
    summands = content.array_records.get(SUMMANDS, ArrayRecord())
    weight = _weight(record, metrics)
    values: dict[str, NDArray[Any]] = {}
    before = next(iter(message.content.array_records.values()), ArrayRecord())
    after = next(iter(content.array_records.values()), ArrayRecord())
    for part in record.layout.parts:
        name = part.name
        if name.startswith(MODEL):
            key = name.removeprefix(MODEL)
            if key not in before or key not in after:
                raise DeclinedError(f"the secure sum is of {key}, which this model does not have")
            change = np.subtract(view(after[key]), view(before[key]), dtype=np.float64)
            # Only the change of trained weights is weighted with its rounding.
            values[name] = change if part.kind == FIXED else change * weight
        elif name == LOSS:
            values[name] = np.array([float(metrics.get("loss", 0.0)) * weight])  # type: ignore[arg-type]
        elif name == ONES.name:
            values[name] = np.array([1])
        elif name == CLIPPED.name:
            values[name] = np.array([0])
        # Sums of training may be asked for again of fewer hospitals; figures must not.
        elif record.kind == DATA and name in summands:
            values[name] = view(summands[name])
        elif record.kind == DATA and name in metrics:
            values[name] = np.atleast_1d(np.asarray(metrics[name]))
        else:
            raise DeclinedError(f"the secure sum is of {name}, which this hospital does not send")
    return values, weight


def _figures(record: Record, content: RecordDict) -> dict[str, NDArray[Any]]:
    """Return what an evaluation adds to each part of a sum.

    A hospital whose figures may not leave adds zeros.
    """
    (metrics,) = content.metric_records.values()
    figures = sums_of_record(metrics, _grids(record.weighting.get(GRIDS, [])))
    values: dict[str, NDArray[Any]] = {}
    for part in record.layout.parts:
        if part.name == ONES.name:
            values[part.name] = np.array([1])
        elif part.name == TOLD.name:
            values[part.name] = np.array([bool(figures)])
        else:
            values[part.name] = figure_in(part, figures)
            if values[part.name].size != part.size:
                raise DeclinedError(
                    f"the secure sum is of {part.size} numbers {part.name}, and this hospital has "
                    f"{values[part.name].size}"
                )
    if left := sorted(figures.keys() - values.keys()):
        log.info("not among what is summed, and not sent: %s", some_of(left))
    return values


def _grids(told: Value) -> list[Grid]:
    """Return the grids of scores that a server names.

    Raises
    ------
    DeclinedError
        If they are no centres and widths.
    """
    numbers = np.asarray(told, np.float64) if isinstance(told, list) else np.array(np.nan)
    if numbers.size % 2 or not (np.isfinite(numbers).all() and (numbers[1::2] > 0).all()):
        raise DeclinedError("the secure sum counts scores on grids that are none")
    return [(float(centre), float(width)) for centre, width in numbers.reshape(-1, 2)]


def _weight(record: Record, metrics: MetricRecord) -> float:
    by = record.weighting.get(BY)
    if by is None:
        return 1.0
    if by == UNIFORM:
        return 1 / len(record.names)
    total = record.weighting.get(TOTAL)
    rows = metrics.get("num-examples")
    if by != EXAMPLES or type(total) is not int or not isinstance(rows, int | float):
        raise DeclinedError(f"the secure sum weights hospitals in an unknown way: {by!r}")
    if not 0 <= rows <= total:
        raise DeclinedError(
            "this hospital has more training rows now than all had together when they were "
            "counted: begin a new run"
        )
    return float(rows) / total


def asked_of(client: MedicalClient, message: Message) -> dict[str, Value]:
    """Return all that a message asks, whoever asks it, in whichever run and round.

    Parameters
    ----------
    client : MedicalClient
        Its settings and its code decide the answer too.
    message : Message
    """
    content = message.content
    configs = {
        name: {key: value for key, value in record.items() if key not in _OF_THE_RUN}
        for name, record in content.config_records.items()
        if name != SECURE
    }
    settings = {
        key: value for key, value in client.context.run_config.items() if key not in _OF_THE_SERVER
    }
    return {
        "kind": message.metadata.message_type,
        "arrays": {
            name: digest_of_arrays({key: view(record[key]) for key in record})
            for name, record in content.array_records.items()
        },
        "order": {name: list(record) for name, record in content.array_records.items()},
        "configs": configs,
        "metrics": {name: dict(record) for name, record in content.metric_records.items()},
        "settings": settings,
        "app": code_digest(type(client)),
        "version": version("fedmed-flower"),
    }


def _run_of(message: Message) -> dict[str, Value]:
    """Return what a message holds of the run and the round."""
    return {
        name: {key: record[key] for key in _OF_THE_RUN if key in record}
        for name, record in message.content.config_records.items()
        if name != SECURE
    }


@cache
def code_digest(cls: type) -> bytes:
    """Return the digest of the Python files beside the one in which a class is defined.

    For a class that was typed into a session it is the digest of its name.
    """
    try:
        source = Path(inspect.getfile(cls))
    except (TypeError, OSError):
        return sha256(cls.__qualname__.encode()).digest()
    files = sorted(source.parent.glob("*.py")) if source.exists() else []
    content = {path.name: sha256(path.read_bytes()).digest() for path in files}
    return sha256(encoded([cls.__qualname__, content])).digest()


def hello(client: MedicalClient, message: Message) -> RecordDict:
    """Answer with this hospital's key of a run, signed with its own."""
    asked = _asked(message, {SECURE_RUN: str})
    run = asked[SECURE_RUN]
    with _refused():
        member = member_of(client, run, message.content.config_records[SECURE])
        said = member.hello(run, client.node.tell_own)
    return RecordDict({SECURE: ConfigRecord({LETTER: encoded(said.values())})})


def alive(client: MedicalClient, message: Message) -> RecordDict:
    """Sign which hospitals remain in a sum."""
    asked = _asked(message, {SECURE_RUN: str, "digest": bytes, "members": list})
    with _refused():
        member = member_of(client, asked[SECURE_RUN], message.content.config_records[SECURE])
        signature = member.alive(asked["digest"], asked["members"])
    return RecordDict({SECURE: ConfigRecord({LETTER: signature})})


def unmask(client: MedicalClient, message: Message) -> RecordDict:
    """Answer with this hospital's shares for the set of hospitals that remains."""
    fields = {SECURE_RUN: str, "digest": bytes, "members": list, "envelopes": dict}
    asked = _asked(message, {**fields, "signatures": dict})
    with _refused():
        member = member_of(client, asked[SECURE_RUN], message.content.config_records[SECURE])
        shares = member.unmask(
            asked["digest"], asked["envelopes"], asked["members"], asked["signatures"]
        )
    return RecordDict({SECURE: ConfigRecord({LETTER: shares})})


def asks_for_sum(message: Message) -> bool:
    """Return whether a message asks for a part of a secure sum."""
    return RECORD in message.content.config_records.get(SECURE, ConfigRecord())


def count(client: MedicalClient, message: Message) -> RecordDict:
    """Return the number of training rows, for a secure sum alone."""
    require_summed(message, "rows")
    client.read(message)
    data = client.data()
    client.require_several(data.train)
    return RecordDict({"metrics": MetricRecord({ROWS.name: client.count("train")})})


def require_summed(message: Message, what: str) -> None:
    """Raise `DeclinedError` if a message does not ask for a secure sum."""
    if not asks_for_sum(message):
        raise DeclinedError(f"{what} are counted in a secure sum alone")


def summands(**parts: NDArray[Any]) -> RecordDict:
    """Return what a hospital adds to each part of a sum as the content of a handler."""
    arrays = {name: Array(np.ascontiguousarray(values)) for name, values in parts.items()}
    return RecordDict({SUMMANDS: ArrayRecord(arrays)})


def figures(client: MedicalClient, message: Message) -> RecordDict:
    """Return names and sizes of what an evaluation would sum; no patient decides about them."""
    if SECURE not in message.content.config_records:
        raise DeclinedError("figures are named for a secure sum alone")
    config = client.read(message)
    if client.node.coarse_figures and not client.noises_metrics:
        raise DeclinedError(
            "figures that are coarse do not add up: set coarse-figures=false in the node config, "
            "since of a secure sum the server sees no single hospital's counts"
        )
    arrays = next(iter(message.content.array_records.values()))
    model = merge_adapters(client.model_of(arrays, config)[0])
    try:
        with client.seeded(0):
            record = client.figures(model, str(config.get(SPLIT, "val")))
    except InputError as error:
        # It is about what the client declares; no row is looked at.
        raise DeclinedError(str(error)) from error
    listed = [
        [name, int(values.size), is_whole(name)]
        for name, values in sorted(sums_of_record(plain_metrics(record)).items())
    ]
    return RecordDict({SECURE: ConfigRecord({LETTER: encoded(listed)})})


@contextmanager
def _refused() -> Iterator[None]:
    """Say why an exchange is refused; the reason is about keys, sets and books alone."""
    try:
        yield
    except SecureError as error:
        raise DeclinedError(f"the secure sum is refused: {error}") from error


def _asked(message: Message, fields: Mapping[str, type]) -> dict[str, Any]:
    """Return the fields of a question about a sum.

    Raises
    ------
    DeclinedError
        If they are not those.
    """
    with _refused():
        record = message.content.config_records.get(SECURE, ConfigRecord())
        data = record.get(ASKED)
        values = decoded(data) if isinstance(data, bytes) else None
        if not isinstance(values, dict) or values.keys() != fields.keys():
            raise SecureError("the question has other fields than it must have")
        for name, kind in fields.items():
            if type(values[name]) is not kind:
                raise SecureError(f"{name} of the question must be of type {kind.__name__}")
        return values
