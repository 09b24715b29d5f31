"""A hospital's replies as parts of secure sums, and its answers about them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from numpy.typing import NDArray

from fedmed_flower.arrays.views import array_of, view
from fedmed_flower.clients.asked import (
    asked_of,
    require_alike,
    require_kind,
    require_layout,
    run_of,
)
from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.shares import Share, share_of
from fedmed_flower.data.site import fewest_patients, patients_of, site_names, some_of
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.files import file_name
from fedmed_flower.metrics.plain import plain_metrics
from fedmed_flower.metrics.summing import Grid, is_whole, sums_of_record
from fedmed_flower.privacy.patient import ledger_path
from fedmed_flower.secure.audit import Chain
from fedmed_flower.secure.book import BookError, SecureBook, secure_path
from fedmed_flower.secure.encoding import SecureError, Value, decoded, encoded
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
    rows_by_group,
)
from fedmed_flower.secure.record import DATA, Record
from fedmed_flower.secure.ring import COUNT, ArrayChange, Words
from fedmed_flower.secure.study import Study
from fedmed_flower.settings.secure import SUM, SecureSettings
from fedmed_flower.settings.text import setting_error
from fedmed_flower.wire import (
    ASKED,
    BOOKS,
    IN_SUMS,
    LETTER,
    MASKED,
    OTHERWISE_IN_SUMS,
    RECORD,
    SECURE,
    SECURE_RUN,
    SPLIT,
    SUMMANDS,
    WITHOUT_FIGURES,
)

log = logging.getLogger("flwr.fedmed")

# Says neither where nor by how much.
_OUTSIDE = "out of bounds"
# Numbers of rows that a mean may be weighted by, in all.
_MOST_TOTAL = 1 << 56
# Bytes of a question about a sum: decoding takes thirty times as much memory.
_MOST_ASKED = 1 << 23


def member_of(client: MedicalClient, run: str, secure: ConfigRecord) -> Member:
    """Return the hospital as a member of its study.

    In a simulation all hospitals of the run are the study, their keys follow from their names, and
    the run config says into how many groups they are parted.

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
        groups = SecureSettings.from_run_config(client.context.run_config).secure_groups
        return _member(identity, Study.simulated(names, run, groups), path)
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
    share : Share or None
        What it adds of the noise of the sum.
    tells : bool
        Whether its own figures leave beside its part of the sum.
    strict : bool
        Whether it adds nothing rather than a change that is cut.
    """

    member: Member
    record: Record
    about: dict[str, Value]
    asked: dict[str, Value]
    share: Share | None = None
    tells: bool = False
    strict: bool = False

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
            if {*secure} - {RECORD, BOOKS}:
                raise SecureError("its rules have other entries than they must have")
            if (purpose := record.purpose.partition("/")[0]) not in IN_SUMS:
                raise SecureError(f"{purpose} has no form as a sum")
            require_kind(record, kind)
            require_layout(record, message)
            require_alike(message)
            member = member_of(client, record.run, secure)
            member.require_sound(record)
            # Training leaves what it has to hide with the share.
            share = share_of(client, message, record, member.study.within(record.group))
            client.noise_share = share
        asked = asked_of(client, message)
        if not client.site.simulated:
            client.draw_key = member.draw(record.question(asked))
        node = client.node
        tells = node.tell_own and not node.answers_in_sums_alone(MessageType.EVALUATE)
        tells &= purpose == MessageType.EVALUATE
        strict = SecureSettings.from_run_config(client.context.run_config).secure_strict
        about = {**asked, "run": run_of(message)}
        return cls(member, record, about, asked, share, tells, strict)

    def reply(self, message: Message, content: RecordDict) -> RecordDict:
        """Return a reply's content as one part of the sum, under masks.

        The figures of a hospital that tells its own stand beside it.

        Raises
        ------
        DeclinedError
            If the sum is refused, or a budget does not allow it.
        InputError
            If anything fails after noise was charged: why it does must not leave.
        """
        if self.share is None:
            masked = self._masked(self._encoded(message, content))
            if self.tells:
                masked.update(content.metric_records)
            return masked
        before, after = _models(message, content)
        with self.share.charged():
            try:
                return self._masked(self.share.words(self.record.layout, before, after))
            except Exception as error:
                text = f"failed after the noise was charged: {type(error).__name__}: {error}"
                raise InputError(text) from error

    def _encoded(self, message: Message, content: RecordDict) -> Words:
        layout = self.record.layout
        weighted: set[str] = set()
        values: Mapping[str, NDArray[Any] | ArrayChange]
        if self.record.purpose.startswith(f"{MessageType.EVALUATE}/"):
            values, weight = _figures(self.record, content), 1.0
        else:
            values, weight = _values(self.record, message, content)
            weighted = {
                part.name
                for part in layout.parts
                if part.name.startswith(MODEL) or part.name == LOSS
            }
        words, clipped = layout.encode(values, weight, weighted=weighted)
        if clipped and self.strict:
            raise DeclinedError(_OUTSIDE)
        if CLIPPED in layout.parts:
            words[1][layout.start(CLIPPED.name)] = clipped
        return words

    def _masked(self, words: Words) -> RecordDict:
        with _refused():
            masked = self.member.mask(self.record, self.about, self.asked, words)
        small, large = masked.words
        record = ArrayRecord({"words32": array_of(small), "words64": array_of(large)})
        return RecordDict({MASKED: record, SECURE: ConfigRecord({LETTER: masked.letter})})


def _values(
    record: Record, message: Message, content: RecordDict
) -> tuple[dict[str, NDArray[Any] | ArrayChange], float]:
    """Return what a reply adds to each part of a sum, and the weight of its change of the model."""
    metrics = next(iter(content.metric_records.values()), MetricRecord())
    summands = content.array_records.get(SUMMANDS, ArrayRecord())
    weight = _weight(record, metrics)
    values: dict[str, NDArray[Any] | ArrayChange] = {}
    before, after = _models(message, content)
    for part in record.layout.parts:
        name = part.name
        if name.startswith(MODEL):
            key = name.removeprefix(MODEL)
            if key not in before or key not in after:
                raise DeclinedError(f"the secure sum is of {key}, which this model does not have")
            values[name] = ArrayChange(view(after[key]), view(before[key]))
        elif name == LOSS:
            values[name] = np.array([float(metrics.get("loss", 0.0))])  # type: ignore[arg-type]
        elif name == ONES.name:
            values[name] = np.array([1])
        elif name == CLIPPED.name:
            values[name] = np.array([0])
        # Sums of training may be asked for again of fewer hospitals; figures must not.
        elif record.kind == DATA and name in summands:
            values[name] = view(summands[name])
        elif record.kind == DATA and name in metrics:
            figures = np.atleast_1d(np.asarray(metrics[name]))
            values[name] = figures
            if part.kind == COUNT and figures.dtype.kind == "f":
                # Whether such a number is whole must not decide whether this hospital answers.
                raise DeclinedError(f"the secure sum counts {name}, which is no count")
        else:
            raise DeclinedError(f"the secure sum is of {name}, which this hospital does not send")
    return values, weight


def _models(message: Message, content: RecordDict) -> tuple[ArrayRecord, ArrayRecord]:
    """Return the model of a message and that of the reply to it."""
    before = next(iter(message.content.array_records.values()), ArrayRecord())
    after = next(iter(content.array_records.values()), ArrayRecord())
    return before, after


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
    if not 1 <= total < _MOST_TOTAL:
        raise DeclinedError(f"all rows together must be from 1 to below 2^56, got {total}")
    if rows > total:
        # If this were refused, the server could find the number of rows by halving.
        log.warning(
            "the server says that all hospitals have %d training rows, fewer than this one: either "
            "there are many new rows, and a new run is needed, or it is not honest",
            total,
        )
    return float(rows) / total


def hello(client: MedicalClient, message: Message) -> RecordDict:
    """Answer with this hospital's key of a run, signed with its own."""
    asked = _asked(message, {SECURE_RUN: str})
    run = asked[SECURE_RUN]
    if not client.site.simulated:
        # The book keeps each run for good.
        client.ledger({}).begin_run(run.partition("/")[0], client.node.most_runs_a_day)
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
    """Return the number of training rows, for a secure sum alone.

    A real hospital gives the number of before while few patients have come or gone: the difference
    of two sums would be theirs.
    """
    require_summed(message, "rows")
    client.read(message)
    data = client.data()
    client.require_several(data.train)
    rows = client.count("train")
    secure = message.content.config_records[SECURE]
    with _refused():
        record = Record.from_bytes(secure[RECORD])
        member = member_of(client, record.run, secure)
        if not client.site.simulated:
            patients = len({*patients_of(data.train)})
            fewest = fewest_patients(client.context, client.site, "train")
            rows = member.book.steady_rows(rows, patients, fewest)
    by_group = rows_by_group(rows, member.group, record.layout)
    return RecordDict({"metrics": MetricRecord({ROWS.name: rows, **by_group})})


def require_summed(message: Message, what: str) -> None:
    """Raise `DeclinedError` if a message does not ask for a secure sum."""
    if not asks_for_sum(message):
        raise DeclinedError(f"{what} are counted in a secure sum alone")


def summands(**parts: NDArray[Any]) -> RecordDict:
    """Return what a hospital adds to each part of a sum as the content of a handler."""
    arrays = {name: array_of(values) for name, values in parts.items()}
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
    from fedmed_flower.models.adapters import merge_adapters

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
    except BookError as error:
        # It names files of the hospital.
        log.error("%s", error)
        text = "the hospital's book of secure sums cannot be used; its log says why"
        raise DeclinedError(f"the secure sum is refused: {text}") from error
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
        if not isinstance(data, bytes) or len(data) > _MOST_ASKED:
            raise SecureError(f"a question about a sum must be at most {_MOST_ASKED:,} bytes")
        values = decoded(data)
        if not isinstance(values, dict) or values.keys() != fields.keys():
            raise SecureError("the question has other fields than it must have")
        for name, kind in fields.items():
            if type(values[name]) is not kind:
                raise SecureError(f"{name} of the question must be of type {kind.__name__}")
        return values
