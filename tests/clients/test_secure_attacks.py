"""What a server sends to one real hospital to learn something of it alone: all is refused."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity
from tiny import TinyClient, context_of, halves, make_rows, model_arrays, node_of

from fedmed_flower.clients.asked import asked_of
from fedmed_flower.data.site import SiteData
from fedmed_flower.secure.encoding import decoded, digest, encoded
from fedmed_flower.secure.identity import Identity
from fedmed_flower.secure.parts import CLIPPED, LOSS, ONES, ROWS
from fedmed_flower.secure.record import DATA, TRAIN, Hello, Record
from fedmed_flower.secure.ring import COUNT, FIXED, REAL, Layout, Part
from fedmed_flower.secure.study import Peers
from fedmed_flower.wire import ASKED, LETTER, RECORD, SECURE, SECURE_RUN

RUN = "run"
NAMES = ("north", "south", "east")
MODEL = (Part("model/1.weight", 8, FIXED, 0.0625), Part("model/1.bias", 2, FIXED, 0.0625))
TAIL = (ONES, CLIPPED, Part(LOSS, 1, REAL, 1024.0))


class Hospital:
    """A real hospital that answers one message after the other."""

    def __init__(self, folder, name="north", client=TinyClient, **node):
        folder.mkdir(parents=True, exist_ok=True)
        self.client = client
        config = node_of(folder, name, **node)
        self.context = context_of(node_config=config)

    def ask(self, content, kind="train"):
        """Return the content of the reply, or the reason of an error."""
        TaskIdentity.run_id = self.context.run_id
        TaskIdentity.node_id, TaskIdentity.task_id = SUPERLINK_NODE_ID, 1
        message = Message(content, self.context.node_id, kind)
        reply = self.client.client_app()(message, self.context)
        return reply.error.reason if reply.has_error() else reply.content

    def hello(self, run=RUN):
        content = RecordDict({SECURE: ConfigRecord({ASKED: encoded({SECURE_RUN: run})})})
        reply = self.ask(content, "query.hello")
        return reply if isinstance(reply, str) else Hello.of(decoded(reply[SECURE][LETTER]))


def hospitals(folder, client=TinyClient, **node):
    """Return three hospitals of one study, by name."""
    keys = {name: Identity.create(folder / f"{name}.key", name) for name in NAMES}
    peers = Peers("study", {name: key.public for name, key in keys.items()})
    peers.save(folder / "peers.toml")
    return {
        name: Hospital(
            folder / name,
            name,
            client,
            secure_key=str(folder / f"{name}.key"),
            secure_peers=str(folder / "peers.toml"),
            **node,
        )
        for name in NAMES
    }


def record_of(hellos, parts=(*MODEL, *TAIL), weighting=None, nonce=b"n" * 16, **fields):
    wanted = {"purpose": "train", "kind": TRAIN, "server_round": 1} | fields
    weights = {"by": "examples", "total": 100} if weighting is None else weighting
    return Record.of_hellos(
        hellos, nonce=nonce, layout=Layout(tuple(parts)), weighting=weights, **wanted
    )


def training(record=None, arrays=None, more=None, **config):
    content = RecordDict(
        {
            "arrays": model_arrays() if arrays is None else arrays,
            "config": ConfigRecord({"server-round": 1} | config),
        }
    )
    if record is not None:
        content[SECURE] = ConfigRecord({RECORD: record.to_bytes()} | (more or {}))
    return content


def declined(hospital, content, kind="train"):
    reply = hospital.ask(content, kind)
    assert isinstance(reply, str), "it has answered"
    return reply


# What decides an answer is in the digest.


def asked(content, kind="train", **config):
    context = context_of(node_config={"site-name": "north"}, **config)
    TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1
    return digest(asked_of(TinyClient(context), Message(content, 1, kind)))


def composed(form):
    return unicodedata.normalize(form, "größe")


ONE = model_arrays(seed=1)
TWO = model_arrays(seed=2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # A handler reads the first record of arrays, and the first config.
        ({"a": ONE, "b": TWO}, {"b": TWO, "a": ONE}),
        (
            {"a": ConfigRecord({"server-round": 1}), "b": ConfigRecord({"split": "val"})},
            {"b": ConfigRecord({"split": "val"}), "a": ConfigRecord({"server-round": 1})},
        ),
        (
            {"c": ConfigRecord({"split": "val"}), SECURE: ConfigRecord({RECORD: b""})},
            {SECURE: ConfigRecord({RECORD: b""}), "c": ConfigRecord({"split": "val"})},
        ),
        # Two spellings of one letter name two columns.
        *(
            (make(composed("NFC")), make(composed("NFD")))
            for make in (
                lambda text: {"c": ConfigRecord({"request": text})},
                lambda text: {"c": ConfigRecord({"names": ["x", text]})},
                lambda text: {"c": ConfigRecord({text: 1})},
                lambda text: {text: ConfigRecord({"x": 1})},
                lambda text: {"m": MetricRecord({text: 1})},
            )
        ),
        ({"a": ONE}, {"a": TWO}),
        ({"a": ONE}, {"a": ArrayRecord({key: ONE[key] for key in reversed([*ONE])})}),
        ({"c": ConfigRecord({"x": 1})}, {"c": ConfigRecord({"x": 1.0})}),
        ({"c": ConfigRecord({"x": 1})}, {"c": MetricRecord({"x": 1})}),
    ],
)
def test_messages_that_are_read_otherwise_have_another_digest(one, other):
    assert asked(RecordDict(one)) != asked(RecordDict(other))
    assert asked(RecordDict(one)) == asked(RecordDict(one))


def test_settings_that_are_read_otherwise_have_another_digest():
    content = RecordDict({"a": ONE})
    assert asked(content, dataset=composed("NFC")) != asked(content, dataset=composed("NFD"))


def test_rounds_and_runs_are_no_part_of_the_question():
    one = RecordDict({"c": ConfigRecord({"server-round": 1, "run-key": "a", "x": 2})})
    other = RecordDict({"c": ConfigRecord({"x": 2, "run-key": "b", "server-round": 9})})
    assert asked(one) == asked(other)


# A sum is of what the message is about, and of nothing else.


@pytest.fixture
def three(tmp_path):
    return hospitals(tmp_path)


@pytest.fixture
def hellos(three):
    return [hospital.hello() for hospital in three.values()]


def test_a_training_that_is_as_it_must_be_is_answered(three, hellos):
    reply = three["north"].ask(training(record_of(hellos)))
    assert [*reply] == ["masked", SECURE, "site"]


def test_rules_beside_those_of_the_sum_are_refused(three, hellos):
    content = training(record_of(hellos), more={"agreed": "what only north is told"})
    assert "its rules have other entries" in declined(three["north"], content)


def test_a_count_does_not_come_as_training_nor_training_as_a_count(three, hellos):
    record = record_of(hellos, (ROWS, ONES), {}, purpose="count", kind=TRAIN)
    content = RecordDict({SECURE: ConfigRecord({RECORD: record.to_bytes()})})
    assert "a sum of count is of kind data, and the server says train" in declined(
        three["north"], content, "query.count"
    )
    content = training(record_of(hellos, kind=DATA))
    assert "a sum of train is of kind train" in declined(three["north"], content)


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (Part("num-examples", 1, COUNT), "num-examples is not summed in training"),
        (Part("seconds", 1, REAL, 1.0), "seconds is not summed in training"),
        (ROWS, "rows is not summed in training"),
        (Part("model/1.bias", 2, COUNT), "1.bias is no entry of the model"),
        (Part("model/1.bias", 1, FIXED, 1.0), "1.bias is no entry of the model"),
        (Part("model/other", 1, FIXED, 1.0), "other is no entry of the model"),
        (Part(ONES.name, 1, REAL, 1.0), "tail/ones must be one count"),
        (Part(CLIPPED.name, 0, COUNT), "tail/clipped must be one count"),
        (Part(LOSS, 1, COUNT), "tail/loss must be real"),
    ],
)
def test_what_must_not_be_in_a_sum_is_refused_before_anything_is_computed(
    three, hellos, part, text
):
    others = [other for other in (*MODEL, *TAIL) if other.name != part.name]
    record = record_of(hellos, [*others, part])
    assert text in declined(three["north"], training(record))


class Normalised(TinyClient):
    def build_model(self):
        return halves()


def test_whole_numbers_of_a_model_which_count_batches_are_in_no_sum(tmp_path):
    three = hospitals(tmp_path, Normalised)
    hellos = [hospital.hello() for hospital in three.values()]
    arrays = model_arrays(halves)
    for kind, bound in ((FIXED, 1.0), (REAL, 1024.0), (COUNT, 0.0)):
        record = record_of(hellos, [Part("model/stem.2.num_batches_tracked", 1, kind, bound)])
        reply = declined(three["north"], training(record, arrays))
        assert "num_batches_tracked is no entry of the model" in reply


def test_a_float_is_not_summed_as_a_count(three, hellos):
    parts = [Part("accuracy", 1, COUNT), ONES]
    record = record_of(hellos, parts, {}, purpose="evaluate", kind=DATA)
    reply = declined(three["north"], training(record, split="train"), "evaluate")
    assert "the secure sum counts accuracy, which is no count" in reply


@pytest.mark.parametrize("total", [1, 9, 10, 11])
def test_whether_a_hospital_has_more_rows_than_the_server_says_does_not_show(
    three, hellos, total, caplog
):
    # North has 10 training rows. Else the server finds them by halving.
    record = record_of(hellos, weighting={"by": "examples", "total": total})
    assert isinstance(three["north"].ask(training(record)), RecordDict)
    assert ("fewer than this one" in caplog.text) == (total < 10)


@pytest.mark.parametrize("total", [0, -1, 1 << 56])
def test_a_total_that_cannot_be_is_refused(three, hellos, total):
    record = record_of(hellos, weighting={"by": "examples", "total": total})
    assert "must be from 1 to below 2^56" in declined(three["north"], training(record))


def counting(hellos, nonce):
    record = record_of(hellos, (ROWS, ONES), {}, nonce, purpose="count", kind=DATA)
    return RecordDict(
        {
            "config": ConfigRecord({"run-key": RUN}),
            SECURE: ConfigRecord({RECORD: record.to_bytes()}),
        }
    )


class Growing(TinyClient):
    rows = 12

    def load_data(self, site):
        return SiteData(train=make_rows(self.rows, 0), source="tiny")


def test_a_count_does_not_follow_single_patients(tmp_path, monkeypatch):
    three = hospitals(tmp_path, Growing)
    hellos = [hospital.hello() for hospital in three.values()]
    counted = []
    encode = Layout.encode

    def noted(self, values, *args, **kwargs):
        counted.append(int(values[ROWS.name][0]))
        return encode(self, values, *args, **kwargs)

    monkeypatch.setattr(Layout, "encode", noted)
    for number, rows in enumerate([12, 13, 21, 22, 13, 12]):
        monkeypatch.setattr(Growing, "rows", rows)
        three["north"].context = context_of(node_config=three["north"].context.node_config)
        reply = three["north"].ask(counting(hellos, bytes([number]) * 16), "query.count")
        assert isinstance(reply, RecordDict), reply
    assert counted == [12, 12, 12, 22, 22, 12]


def test_an_error_of_the_book_does_not_send_its_path(three, hellos, caplog):
    folder = Path(three["north"].context.node_config["data-dir"])
    next(folder.glob("*.secure")).unlink()
    reply = declined(three["north"], training(record_of(hellos)))
    assert "book of secure sums cannot be used; its log says why" in reply
    assert str(folder) not in reply
    assert str(folder) in caplog.text


# Nothing that one hospital alone was told decides its answer.


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"keep": "1.bias"}, "keep is for messages outside of secure sums"),
        ({"keep-sent": False}, "keep-sent is for messages outside of secure sums"),
        ({"own-model": True}, "own-model is for messages outside of secure sums"),
        ({"compression": "int8"}, "compression is for messages outside of secure sums"),
        ({"method": "scaffold"}, "the method 'scaffold' is not for secure sums"),
    ],
)
def test_what_uses_a_hospitals_state_is_refused(three, hellos, config, text):
    assert text in declined(three["north"], training(record_of(hellos), **config))


class Agreeing(TinyClient):
    seen = None

    def prepare(self, rows, train):
        type(self).seen.append(self.agreed)
        return super().prepare(rows, train)


def test_rows_are_not_prepared_by_what_an_earlier_message_said(tmp_path, monkeypatch):
    monkeypatch.setattr(Agreeing, "seen", [])
    three = hospitals(tmp_path, Agreeing)
    hellos = [hospital.hello() for hospital in three.values()]
    for number, agreed in enumerate("abba"):
        record = record_of(hellos, nonce=bytes([number]) * 16)
        content = training(record, agreed=agreed)
        assert isinstance(three["north"].ask(content), RecordDict)
    assert Agreeing.seen == ["a", "b", "a"]


# Training is not repeated to the bit for another model, nor by anybody else.


class Seeds(TinyClient):
    seen = None

    def fit(self, model, prepared, seed):
        type(self).seen.append(seed)
        return super().fit(model, prepared, seed)


def nearly(arrays):
    """Return arrays of which one number differs by its last bit."""
    values = arrays["1.bias"].numpy().copy()
    values.view(np.uint8)[0] ^= 1
    return ArrayRecord({**arrays, "1.bias": Array(values)})


def test_the_order_of_rows_is_a_hospitals_own_and_belongs_to_one_question(tmp_path, monkeypatch):
    monkeypatch.setattr(Seeds, "seen", [])
    three = hospitals(tmp_path, Seeds)
    hellos = [hospital.hello() for hospital in three.values()]
    arrays = model_arrays()
    for number, model in enumerate([arrays, arrays, nearly(arrays)]):
        record = record_of(hellos, nonce=bytes([number]) * 16)
        assert isinstance(three["north"].ask(training(record, model)), RecordDict)
    first, again, other = Seeds.seen
    assert first == again != other
    keyless = Hospital(tmp_path / "north", client=Seeds)
    keyless.ask(training(arrays=arrays))
    assert Seeds.seen[-1] not in (first, other)


# What a hospital says of itself holds.


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_hospital_that_does_not_tell_its_own_figures_does_not(tmp_path, kind):
    three = hospitals(tmp_path)
    assert not three["north"].hello().tells
    text = f"{kind} would tell this hospital's own figures, which leave in secure sums alone"
    assert text in declined(three["north"], training(), kind)


def test_a_hospital_that_tells_its_own_figures_says_so(tmp_path):
    north = hospitals(tmp_path, tell_own=True)["north"]
    assert north.hello().tells
    assert isinstance(north.ask(training()), RecordDict)


def test_a_mistyped_kind_of_message_does_not_pass_for_protection(tmp_path, caplog):
    north = Hospital(tmp_path / "north", secure_only="trian")
    assert declined(north, training()) == "site north: InputError"
    assert "secure-only must be empty or some of all, describe, train, " in caplog.text
    assert "got 'trian'" in caplog.text


# Nothing grows without a bound.


def test_hellos_count_as_runs(tmp_path):
    north = hospitals(tmp_path, most_runs_a_day=2)["north"]
    for run in ("one", "one", "two", "two/baseline"):
        assert isinstance(north.hello(run), Hello)
    assert "2 runs have begun here within a day" in north.hello("three")


def test_long_names_and_large_questions_are_refused(tmp_path):
    north = hospitals(tmp_path)["north"]
    assert "the name of a run has 1 to 200 letters, got 201" in north.hello("r" * 201)
    asked = ConfigRecord({ASKED: b"l" * ((1 << 23) + 1)})
    reply = declined(north, RecordDict({SECURE: asked}), "query.alive")
    assert "a question about a sum must be at most 8,388,608 bytes" in reply
