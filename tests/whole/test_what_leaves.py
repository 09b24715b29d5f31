"""The tables of docs/reference/what-travels.md list all replies: nothing else leaves."""

import importlib
from dataclasses import replace
from pathlib import Path

import cohort
import numpy as np
import pytest
import torch
from curious_models import OUTPUTS, PRIVATE, model_of, network
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedXgbBagging
from flwr.supercore.task_identity import TaskIdentity
from forests import DECLARED, Hospital
from hospitals import BUDGET, CLIENTS, Images, Masks, Table, hospital
from key_files import make_hospitals
from studies import World, study
from surveys import Ward, surveyed
from tables import TinyTable, predicting
from tiny import CONFIG, context_of

from fedmed_flower import federate, run_local
from fedmed_flower.data.site import SPLITS
from fedmed_flower.engines.local import LocalGrid
from fedmed_flower.secure.encoding import SecureError
from fedmed_flower.secure.parts import ONES
from fedmed_flower.secure.record import DATA, TRAIN
from fedmed_flower.secure.ring import Layout
from fedmed_flower.server.inbox import Inbox
from fedmed_flower.server.secure import SecureSums
from fedmed_flower.statistics.request import Request
from fedmed_flower.strategies import FedAvg, FedProx
from fedmed_flower.trees.server import grow
from fedmed_flower.wire import (
    MESSAGE_VERSION,
    MESSAGES,
    NEVER,
    REPLIES,
    SIMULATED,
    keys_of,
    read_error,
)

DOCS = Path(__file__).resolve().parents[2] / "docs" / "reference" / "what-travels.md"
WAYS = {"plain", "bounded", "known", "noised", "masked", "never"}
# So that figures of the small hospitals here leave.
FEW = {"min-train-patients": 2, "min-evaluated-patients": 2, "min-cell-count": 2}
FEW |= {"share-components": True}


def leaving(private):
    """Return the keys that leave in a plain run, or in a private one."""
    ways = {(e.reply, e.key): e.private if private else e.plain for e in REPLIES}
    return {key for key, way in ways.items() if way != NEVER}


def generic(reply, content):
    """Return the keys of a reply as the table has them."""
    keys = keys_of(reply, content)
    common = {entry.key for entry in REPLIES if entry.reply == "any"}
    return {("any" if key in common else reply, key) for key in keys}


def ask(client, kind, context, arrays, config, beside=None):
    TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1
    config = {**config, "version": MESSAGE_VERSION}
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(config), **(beside or {})})
    return client.client_app()(Message(content, context.node_id, kind), context)


def ask_all(client, node, run, arrays, outcome, kinds=None, beside=None, **more):
    """Add the keys of all replies of a client's app to what was found, and the errors."""
    for kind in kinds or sorted(client.client_app()._registered_funcs):
        reply_name = kind.removeprefix("query.").removesuffix(".default")
        for split in ("val", "test") if reply_name == "evaluate" else ("val",):
            context = context_of(node_config=node)
            context.run_config = CONFIG | run
            epsilon = 1.0 if "budget-epsilon" in node else 0.0
            request = Request(columns=("age",), epsilon=epsilon).to_text()
            config = {"server-round": 1, "count": 2, "split": split, "request": request} | more
            reply = ask(client, kind, context, arrays, config, beside)
            if reply.has_error():
                outcome.setdefault("errors", set()).add(read_error(reply.error.reason)[1])
                continue
            for key in generic(reply_name, reply.content):
                outcome.setdefault(key, set()).add(client.__name__)


class Learning(Table):
    """A table of whose categories nothing is declared."""

    schema = replace(Table.schema, categories={})


class Declared(TinyTable):
    """A table of which everything is declared."""

    schema = replace(TinyTable.schema, categories={"sex": ("f", "m"), "ward": ("a", "b", "c")})


class Unmeasured(Table):
    """A table without a single age."""

    def load_data(self, site):
        data = super().load_data(site)
        return replace(data, **{s: [r | {"age": None} for r in getattr(data, s)] for s in SPLITS})


class Fewer(Images):
    """A training patient has gone."""

    def load_data(self, site):
        data = super().load_data(site)
        gone = data.train[0]["patient"]
        return replace(data, train=[row for row in data.train if row["patient"] != gone])


def all_keys(private):
    found = {}
    run = {"local-steps": 4, "batch-size": 16, "personal-epochs": 1, "preparation": "declared"}
    run |= {"survival-loss": "discrete", "survival-horizon": 365.0, "survival-intervals": 3}
    # Noise so small that no figure is lost in it.
    run |= PRIVATE | {"target-epsilon": 1e6} if private else {}
    with hospital("as it is") as node:
        node = {key: value for key, value in node.items() if key not in BUDGET} | FEW
        node |= BUDGET if private else {}
        arrays = ArrayRecord(model_of(Table, OUTPUTS[Table]).state_dict())
        # Before the budget is spent.
        for only in ("", "evaluate"):
            part = node | {"secure-only": only}
            ask_all(Table, part, run, arrays, found, ["train"], validate=True)
        arrays = ArrayRecord(model_of(Images, OUTPUTS[Images]).state_dict())
        more = {"method": "fednova", "run-key": "with a method"}
        beside = {"method-steps": ArrayRecord({"steps": Array(np.zeros(1))})}
        sgd = run | network(4) | {"optimizer": "sgd"}
        ask_all(Images, node, sgd, arrays, found, ["train"], beside, **more)
        for client in CLIENTS:
            torch.manual_seed(0)
            arrays = ArrayRecord(model_of(client, OUTPUTS[client]).state_dict())
            own = {Images: network(4), Table: {} if private else {"report-by": "group"}}
            ask_all(client, node, run | own.get(client, {}), arrays, found)
        arrays = ArrayRecord(model_of(Images, OUTPUTS[Images]).state_dict())
        for client in (Images, Fewer):
            one = {"run-key": "one run"}
            ask_all(client, node, run | network(4), arrays, found, ["train"], **one)
        ask_all(Unmeasured, node, run, arrays, found, ["query.describe"])
        withheld = node | {"secure-only": "describe"}
        ask_all(Table, withheld, run, arrays, found, ["query.describe"])
        ask_all(Learning, node, {"preparation": "federated"}, arrays, found, ["query.contribution"])
        for task in ("continuous", "count"):
            client = predicting(task)
            model = client(context_of(node_config=node, **run)).build_model()
            ask_all(client, node, run, ArrayRecord(model.state_dict()), found)
    return found


def summed(folder, private):
    """Return the keys of all replies of real hospitals in secure sums."""
    found = {}
    nodes = make_hospitals(folder, ["east", "north", "south"])
    for node in nodes.values():
        node |= FEW | (BUDGET if private else {})
    config = CONFIG | {"secure": "sum", "local-steps": 4, "batch-size": 16}
    config |= {"preparation": "declared"} | (PRIVATE | {"target-epsilon": 1e6} if private else {})
    good = Declared.client_app()

    def watched(message, context):
        reply = good(message, context)
        kind = message.metadata.message_type.removeprefix("query.")
        if reply.has_error():
            found.setdefault("errors", set()).add(read_error(reply.error.reason)[1])
        else:
            for key in generic(kind, reply.content):
                found.setdefault(key, set()).add("summed")
        return reply

    def ask_for_sums(grid, context):
        torch.manual_seed(0)
        arrays = ArrayRecord(Declared(context).build_model().state_dict())
        sums = SecureSums(grid, Inbox(), "one run", 60.0)
        sums.greet(grid.get_node_ids(), 1)
        for kind in ("train", "evaluate", "query.count", "query.contribution"):
            purpose = kind.removeprefix("query.")
            rule = TRAIN if purpose == "train" else DATA
            record = sums.record(grid.get_node_ids(), purpose, rule, 1, Layout((ONES,)), {})
            content = RecordDict({} if kind.startswith("query.") else {"arrays": arrays})
            content["config"] = ConfigRecord({"server-round": 1, "run-key": "one run"})
            messages = [Message(content, node, kind) for node in sums.nodes_of(record)]
            if private and purpose == "contribution":
                with pytest.raises(SecureError):
                    sums.sum(messages, record, purpose, 60.0)
            else:
                assert len(sums.sum(messages, record, purpose, 60.0).members) == 3

    server = ServerApp()
    server.main()(ask_for_sums)
    run_local(server, watched, 3, run_config=config, node_configs=list(nodes.values()))
    return found


def genomes(folder, private):
    client, found = cohort.hospital(folder), {}
    node = {"site-name": "north", "data-dir": str(folder)} | FEW | (BUDGET if private else {})
    variants, people = cohort.VARIANTS, cohort.PEOPLE
    block = cohort.everything()
    extra = {
        "logistic": {"slopes": [[0.0, 0.0]] * variants, "intercepts": [0.0] * variants},
        "loadings": {"loadings": [[0.1]] * variants, "frequencies": [0.4] * variants},
    }
    assert people > 20
    for name in ("cohort", "variants", "counts", "linear", "logistic", "loadings", "scores"):
        arrays = {} if name in ("cohort", "variants") else block | extra.get(name, {})
        if name == "scores":
            arrays |= extra["loadings"]
        config = {"offset": 0, "count": 10} if name == "variants" else {}
        context = context_of(node_config=node)
        reply = cohort.question(client, name, config, context, **arrays)
        if reply.has_error():
            found.setdefault("errors", set()).add(read_error(reply.error.reason)[1])
            continue
        for key in generic(name, reply.content):
            found.setdefault(key, set()).add("genomes")
    return found


def table_under(heading):
    """Return the cells of a table of the docs."""
    section = DOCS.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [tuple(c.strip("`") if c.startswith("`") else c for c in row) for row in cells]


def test_the_docs_have_the_tables_as_they_are():
    assert table_under("What each message holds") == [*map(tuple, MESSAGES)]
    assert table_under("What each reply holds") == [*map(tuple, REPLIES)]
    assert {way for e in REPLIES for way in (e.plain, e.private)} == WAYS


def sent_in(run, monkeypatch):
    """Return the keys of all messages that a run sends, as the table has them."""
    found = set()

    class Watching(LocalGrid):
        def push_messages(self, messages):
            for message in messages:
                kind = message.metadata.message_type.removeprefix("query.")
                for name, record in message.content.items():
                    found.update((kind, listed(name, key)) for key in record)
            return super().push_messages(messages)

    with monkeypatch.context() as patch:
        patch.setattr("fedmed_flower.engines.local.LocalGrid", Watching)
        run()
    return found


def listed(name, key):
    """Return a record's entry as the table has it."""
    if name == "arrays" or name.startswith("method-"):
        return f"{name.partition('-')[0]}.*"
    return "named.*" if name == "named" else f"{name}.{key}"


class Losing(Declared):
    """The training of one hospital fails, after it has answered everything else."""

    def fit(self, model, prepared, seed):
        if self.site.index == 4:
            raise ValueError("a broken disk")
        return super().fit(model, prepared, seed)


def federated(folder, strategy=None, client=TinyTable, num_sites=2, **more):
    server = ServerApp()

    @server.main()
    def main(grid, context):
        made = FedProx(proximal_mu=0.1) if strategy is None else strategy
        federate(made, grid, context, client(context))

    settings = CONFIG | {"run-dir": str(folder), "num-server-rounds": 1, "baselines": True}
    settings |= {"personal-epochs": 1, "pictures": 1, "preparation": "federated"}
    settings |= {"tabular-network": "mlp", "trainable": "0.*"} | more
    run_local(server, client.client_app(), num_sites, run_config=settings)


SUMMED = {"secure": "sum", "baselines": False, "personal-epochs": 0, "pictures": 0}
NEXT = {"validate": "next", "num-server-rounds": 2}
KEPT = {"method": "scaffold", "keep": "0.bias", "optimizer": "sgd", "personal-epochs": 0}


def grown(folder):
    server = ServerApp()

    @server.main()
    def main(grid, context):
        grow(FedXgbBagging(), grid, context, Hospital(context))

    settings = DECLARED | {"num-server-rounds": 1, "run-dir": str(folder)}
    run_local(server, Hospital.client_app(), 2, run_config=settings)


def studied(folder):
    studied_by(folder, (("logistic", {"components": 2}), ("linear", {})))


def studied_by_sums(folder):
    sums = {"secure": "sum", "block-size": 64}
    studied_by(folder / "studies", (("logistic", sums), ("linear", sums)))
    request = Request(columns=("age",))
    surveyed(Ward, request, folder / "survey", 4, run_config={"secure": "sum"})


def replies_by_sums(folder, monkeypatch):
    """Return the keys of all replies of studies and a survey by secure sums."""
    found = {}
    original = LocalGrid.pull_within

    def watching(self, ids, timeout):
        pulled, seconds = original(self, ids, timeout)
        for reply in pulled:
            kind = reply.metadata.message_type.removeprefix("query.")
            keys = {key for key in generic(kind, reply.content) if key[1] not in SIMULATED}
            found.update({key: {"studies by sums"} for key in keys})
        return pulled, seconds

    with monkeypatch.context() as patch:
        patch.setattr(LocalGrid, "pull_within", watching)
        studied_by_sums(folder)
    return found


def studied_by(folder, tests):
    for test, more in tests:
        (folder / test).mkdir(parents=True)
        trait = "binary" if test == "logistic" else "continuous"
        study(World(folder / test, trait=trait).client(), folder / test, test=test, **more)


def test_a_server_sends_what_the_table_lists_and_nothing_else(tmp_path, monkeypatch):
    found = set()
    for run in (
        lambda: federated(tmp_path / "network"),
        lambda: federated(tmp_path / "method", FedAvg(), **KEPT),
        lambda: federated(tmp_path / "code", compression="top-k"),
        lambda: federated(tmp_path / "next", FedAvg(), **KEPT | NEXT),
        lambda: federated(tmp_path / "summed", FedAvg(), Losing, 5, **SUMMED),
        lambda: grown(tmp_path / "trees"),
        lambda: studied(tmp_path / "genomes"),
        lambda: studied_by_sums(tmp_path / "by sums"),
        lambda: surveyed(Ward, Request(), tmp_path / "survey"),
    ):
        found |= sent_in(run, monkeypatch)
    of_any = {each.key for each in MESSAGES if each.message == "any"}
    found = {("any" if key in of_any else kind, key) for kind, key in found}
    assert found == {(each.message, each.key) for each in MESSAGES}


@pytest.mark.parametrize("private", [False, True])
def test_the_table_lists_all_that_leaves_and_nothing_else(tmp_path, private, monkeypatch):
    found = all_keys(private) | genomes(tmp_path, private)
    if not private:
        found |= replies_by_sums(tmp_path / "by sums", monkeypatch)
    for key, clients in summed(tmp_path / "summed", private).items():
        found[key] = found.get(key, set()) | clients
    errors = found.pop("errors", set())
    assert all(text.startswith("declined: ") for text in errors), errors
    assert sorted(found.keys() - leaving(private)) == []
    assert sorted(leaving(private) - found.keys()) == []


def test_whatever_carries_no_noise_is_known_where_there_is_a_budget():
    plain = {(entry.reply, entry.key) for entry in REPLIES if entry.private == "plain"}
    about = ("name", "simulated", "data", "generated", "version")
    names = {("any", f"site.{key}") for key in about}
    # Empty lists: no picture is drawn.
    pictures = {("pictures", "pictures.titles"), ("pictures", "pictures.images")}
    texts = {("any", "secure.letter"), ("train", "validation.why")}
    assert plain == names | pictures | texts
    with hospital("as it is") as node:
        for client in (Images, Masks):
            arrays = ArrayRecord(model_of(client, OUTPUTS[client]).state_dict())
            context = context_of(node_config=node)
            context.run_config = CONFIG | network(4)
            reply = ask(client, "query.pictures", context, arrays, {"count": 3})
            assert dict(reply.content["pictures"]) == {"titles": [], "images": []}


# Numbers of rows; variants' own names. An update, and sums by which a hospital has agreed to let
# genotypes be computed, no book can bind: docs/explanation/privacy.md says so.
WITHOUT_BOOK = {"describe", "variants", "train", "loadings", "scores", "figures"}


def test_whatever_is_answered_without_noise_is_in_the_book(tmp_path, monkeypatch):
    opened, answered = [], set()
    for module in ("fedmed_flower.clients.book", "fedmed_flower.statistics.local"):
        plain = importlib.import_module(module).open_guard

        def watching(*args, plain=plain, **kwargs):
            opened.append(args)
            return plain(*args, **kwargs)

        monkeypatch.setattr(f"{module}.open_guard", watching)

    def without_book(name, reply):
        if reply.has_error():
            return False
        answered.add(name)
        leaves = any(len(record) for key, record in reply.content.items() if key != "site")
        return leaves and not opened and name not in WITHOUT_BOOK

    odd = []
    run = {"personal-epochs": 1, "preparation": "federated", "survival-loss": "discrete"}
    run |= {"survival-horizon": 365.0, "survival-intervals": 3}
    with hospital("as it is") as node:
        node = {key: value for key, value in node.items() if key not in BUDGET} | FEW
        for client in (*CLIENTS, Learning):
            base = Table if client is Learning else client
            arrays = ArrayRecord(model_of(base, OUTPUTS[base]).state_dict())
            for kind in sorted(client.client_app()._registered_funcs):
                opened.clear()
                name = kind.removeprefix("query.").removesuffix(".default")
                context = context_of(node_config=node)
                own = {"preparation": "declared"} if client is not Learning else {}
                context.run_config = CONFIG | run | own | (network(4) if client is Images else {})
                request = Request(columns=("age",)).to_text()
                config = {"server-round": 1, "count": 2, "split": "test", "request": request}
                if without_book(name, ask(client, kind, context, arrays, config)):
                    odd.append((client.__name__, name))
    client = cohort.hospital(tmp_path)
    node = {"site-name": "north", "data-dir": str(tmp_path)} | FEW
    for name in ("cohort", "counts", "linear"):
        opened.clear()
        arrays = {} if name == "cohort" else cohort.everything()
        context = context_of(node_config=node)
        if without_book(name, cohort.question(client, name, {}, context, **arrays)):
            odd.append(("genomes", name))
    assert odd == []
    assert answered >= {"evaluate", "contribution", "pictures", "personal", "statistics", "counts"}
