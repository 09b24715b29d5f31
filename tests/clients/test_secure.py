"""What a hospital answers whose figures leave in secure sums alone."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
from hospitals import CLIENTS
from tables import TinyTable
from tiny import (
    CONFIG,
    TinyClient,
    ask,
    context_of,
    model_arrays,
    node_of,
    says_of_setting,
)

from fedmed_flower import run_local
from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.genomics.client import GenomicsClient
from fedmed_flower.secure.encoding import SecureError
from fedmed_flower.secure.parts import ONES
from fedmed_flower.secure.record import DATA, TRAIN
from fedmed_flower.secure.ring import COUNT, Layout, Part
from fedmed_flower.server.inbox import Inbox
from fedmed_flower.server.secure import SecureSums
from fedmed_flower.settings.node import NodeSettings
from fedmed_flower.trees.client import as_trees
from fedmed_flower.wire import IN_SUMS, NOT_IN_SUMS, WITHOUT_FIGURES, read_error

KINDS = (*WITHOUT_FIGURES, *IN_SUMS, *NOT_IN_SUMS)


class Asked(TinyTable):
    """It answers a question of the app's own, which is about its rows."""

    queries = TinyTable.queries | {"oldest": lambda client, message: RecordDict()}


def refusal(kind, remedy="it has no form as a sum, so leave it out"):
    text = f"{kind} would tell this hospital's own figures, which leave in secure sums alone: "
    return f"declined: {text}{remedy}"


BY_SUMS = 'ask for it by secure="sum" in the run config'


def error_of(client, kind, node=None, **config):
    """Return why a message is not answered."""
    query = kind if kind in ("train", "evaluate") else f"query.{kind}"
    reply = ask(client, query, context_of(num_sites=3, node_config=node, **config))
    return read_error(reply.error.reason)[1] if reply.has_error() else None


def kinds_of(client):
    return {kind.removeprefix("query.").removesuffix(".default") for kind in registered(client)}


def registered(client):
    return client.client_app()._registered_funcs


def test_each_kind_of_message_is_answered_in_one_way():
    assert len({*KINDS}) == len(KINDS)
    trees = type(as_trees(TinyTable(context_of())))
    every = [kinds_of(client) for client in (*CLIENTS, TinyTable, GenomicsClient)]
    assert {*trees.queries} == {*TinyTable.queries} == {*MedicalClient.queries}
    assert {kind for kinds in every for kind in kinds} == {*KINDS}


@pytest.mark.parametrize("kind", [*IN_SUMS, *NOT_IN_SUMS[:3], "oldest"])
def test_in_a_run_by_secure_sums_no_message_is_answered_in_plain(kind):
    remedy = {"remedy": BY_SUMS} if kind in IN_SUMS else {}
    assert error_of(Asked, kind, secure="sum") == refusal(kind, **remedy)


@pytest.mark.parametrize("kind", NOT_IN_SUMS[3:])
def test_nor_is_one_of_an_association_study(kind):
    class Study(GenomicsClient):
        def load_data(self, site):
            raise AssertionError("no row is needed to decline")

        genotypes = load_data

    assert error_of(Study, kind, secure="sum") == refusal(kind)


def test_trees_are_not_grown_in_plain_in_a_run_by_secure_sums():
    context = context_of(secure="sum")
    reply = ask(TinyTable, "train", context, trees="bagging")
    assert read_error(reply.error.reason)[1] == refusal("train", BY_SUMS)


def test_a_hospital_may_answer_kinds_of_messages_in_secure_sums_alone():
    node = {"partition-id": 0, "num-partitions": 3, "secure-only": "evaluate, pictures"}
    assert error_of(Asked, "pictures", node) == refusal("pictures")
    assert error_of(Asked, "evaluate", node) == refusal("evaluate", BY_SUMS)
    assert error_of(Asked, "contribution", node) is None
    assert error_of(Asked, "oldest", node) is None
    node["secure-only"] = "all"
    assert error_of(Asked, "oldest", node) == refusal("oldest")
    assert error_of(Asked, "statistics", node) == refusal("statistics")


@pytest.mark.parametrize("wrong", ["evaluation", "train;evaluate", "train,", "hello", "every"])
def test_a_kind_of_message_that_does_not_exist_is_refused(wrong):
    allowed = ", ".join(("all", "describe", *IN_SUMS, *NOT_IN_SUMS))
    bound = f"empty or some of {allowed}, with commas between them"
    text = f"secure-only must be {bound}, got '{wrong}'"
    with pytest.raises(ValueError, match=says_of_setting(text)):
        NodeSettings.of({"secure-only": wrong})


@pytest.mark.parametrize("where", ["run", "node", "node, all"])
@pytest.mark.parametrize("real", [False, True])
def test_the_roll_call_tells_no_number(tmp_path, real, where):
    node = node_of(tmp_path) if real else {"partition-id": 1, "num-partitions": 3}
    config = {}
    if where == "run":
        config["secure"] = "sum"
    else:
        node["secure-only"] = "all" if where.endswith("all") else "train,describe"
    reply = ask(TinyTable, "query.describe", context_of(node_config=node, **config))
    assert {*reply.content} == {"filled", "site"}
    assert dict(reply.content["filled"]) == {"train": True, "val": True, "test": True}


# What a server may ask for in a sum ---------------------------------------------------------------


def refusals(folder, purpose, rule, layout, message="query.count"):
    """Return why hospitals refuse a sum that a server asks for."""
    texts = set()
    good = TinyClient.client_app()

    def watched(message, context):
        reply = good(message, context)
        if reply.has_error():
            texts.add(read_error(reply.error.reason)[1])
        return reply

    def ask_for_sum(grid, context):
        sums = SecureSums(grid, Inbox(), "one run", 60.0, folder)
        nodes = grid.get_node_ids()
        sums.greet(nodes, 1)
        record = sums.record(nodes, purpose, rule, 1, layout, {})
        content = RecordDict({"arrays": model_arrays(), "config": ConfigRecord({"run-key": "k"})})
        messages = [Message(content, node, message) for node in sums.nodes_of(record)]
        with pytest.raises(SecureError):
            sums.sum(messages, record, purpose, 60.0)

    server = ServerApp()
    server.main()(ask_for_sum)
    run_local(server, watched, 3, run_config=CONFIG | {"secure": "sum"})
    return texts


@pytest.mark.parametrize("purpose", ["count", "contribution", "contribution/means", "evaluate/val"])
def test_a_question_about_data_cannot_be_asked_as_training_is(tmp_path, purpose):
    kind = purpose.partition("/")[0]
    message = kind if kind == "evaluate" else f"query.{kind}"
    text = f"declined: the secure sum is refused: a sum of {kind} is of kind data, and the server "
    text += "says train"
    assert refusals(tmp_path, purpose, TRAIN, Layout((ONES,)), message) == {text}


def test_training_cannot_be_asked_for_as_a_question_about_data(tmp_path):
    text = "declined: the secure sum is refused: a sum of train is of kind train, and the server "
    text += "says data"
    assert refusals(tmp_path, "train", DATA, Layout((ONES,)), "train") == {text}


def test_what_has_no_form_as_a_sum_is_not_summed(tmp_path):
    text = "declined: the secure sum is refused: personal has no form as a sum"
    assert refusals(tmp_path, "personal", DATA, Layout((ONES,)), "query.personal") == {text}


def test_a_sum_of_training_has_no_number_of_rows(tmp_path):
    """It could be asked for again of one hospital fewer."""

    layout = Layout((Part("num-examples", 1, COUNT), ONES))
    texts = refusals(tmp_path, "train", TRAIN, layout, "train")
    assert texts == {"declined: the secure sum is refused: num-examples is not summed in training"}
