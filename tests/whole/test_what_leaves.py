"""The table of docs/privacy.md is that of all replies: nothing leaves that it does not list."""

from dataclasses import replace
from pathlib import Path

import cohort
import pytest
import torch
from curious_models import OUTPUTS, PRIVATE, model_of, network
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity
from hospitals import BUDGET, CLIENTS, Images, Masks, Table, hospital
from tables import predicting
from tiny import CONFIG, context_of

from fedmed_flower.statistics.request import Request
from fedmed_flower.wire import NEVER, REPLIES, keys_of, read_error

DOCS = Path(__file__).resolve().parents[2] / "docs" / "privacy.md"
WAYS = {"plain", "bounded", "known", "noised", "never"}
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
    return {("any" if key.startswith("site.") else reply, key) for key in keys}


def ask(client, kind, context, arrays, config):
    TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(config)})
    return client.client_app()(Message(content, context.node_id, kind), context)


def ask_all(client, node, run, arrays, outcome, kinds=None):
    """Add the keys of all replies of a client's app to what was found, and the errors."""
    for kind in kinds or sorted(client.client_app()._registered_funcs):
        reply_name = kind.removeprefix("query.").removesuffix(".default")
        for split in ("val", "test") if reply_name == "evaluate" else ("val",):
            context = context_of(node_config=node)
            context.run_config = CONFIG | run
            epsilon = 1.0 if "budget-epsilon" in node else 0.0
            request = Request(columns=("age",), epsilon=epsilon).to_text()
            config = {"server-round": 1, "count": 2, "split": split, "request": request}
            reply = ask(client, kind, context, arrays, config)
            if reply.has_error():
                outcome.setdefault("errors", set()).add(read_error(reply.error.reason)[1])
                continue
            for key in generic(reply_name, reply.content):
                outcome.setdefault(key, set()).add(client.__name__)


class Learning(Table):
    """A table of whose categories nothing is declared."""

    schema = replace(Table.schema, categories={})


def all_keys(private):
    found = {}
    run = {"local-steps": 4, "batch-size": 16, "personal-epochs": 1, "preparation": "declared"}
    run |= {"survival-loss": "discrete", "survival-horizon": 365.0, "survival-intervals": 3}
    # Noise so small that no figure is lost in it.
    run |= PRIVATE | {"target-epsilon": 1e6} if private else {}
    with hospital("as it is") as node:
        node = {key: value for key, value in node.items() if key not in BUDGET} | FEW
        node |= BUDGET if private else {}
        for client in CLIENTS:
            torch.manual_seed(0)
            arrays = ArrayRecord(model_of(client, OUTPUTS[client]).state_dict())
            own = {Images: network(4), Table: {} if private else {"report-by": "group"}}
            ask_all(client, node, run | own.get(client, {}), arrays, found)
        ask_all(Learning, node, {"preparation": "federated"}, arrays, found, ["query.contribution"])
        for task in ("continuous", "count"):
            client = predicting(task)
            model = client(context_of(node_config=node, **run)).build_model()
            ask_all(client, node, run, ArrayRecord(model.state_dict()), found)
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


def test_the_docs_have_the_table_as_it_is():
    lines = [line.strip("|").split("|") for line in DOCS.read_text().splitlines()]
    rows = [tuple(cell.strip() for cell in line) for line in lines if len(line) == 5]
    wanted = [(e.reply, f"`{e.key}`", e.what, e.plain, e.private) for e in REPLIES]
    assert [row for row in rows if row[1].startswith("`")] == wanted
    assert {way for e in REPLIES for way in (e.plain, e.private)} == WAYS


@pytest.mark.parametrize("private", [False, True])
def test_the_table_lists_all_that_leaves_and_nothing_else(tmp_path, private):
    found = all_keys(private) | genomes(tmp_path, private)
    errors = found.pop("errors", set())
    assert all(text.startswith("declined: ") for text in errors), errors
    assert sorted(found.keys() - leaving(private)) == []
    assert sorted(leaving(private) - found.keys()) == []


def test_whatever_carries_no_noise_is_known_where_there_is_a_budget():
    plain = {(entry.reply, entry.key) for entry in REPLIES if entry.private == "plain"}
    names = {("any", f"site.{key}") for key in ("name", "simulated", "data", "generated")}
    # Empty lists: no picture is drawn.
    assert plain == names | {("pictures", "pictures.titles"), ("pictures", "pictures.images")}
    with hospital("as it is") as node:
        for client in (Images, Masks):
            arrays = ArrayRecord(model_of(client, OUTPUTS[client]).state_dict())
            context = context_of(node_config=node)
            context.run_config = CONFIG | network(4)
            reply = ask(client, "query.pictures", context, arrays, {"count": 3})
            assert dict(reply.content["pictures"]) == {"titles": [], "images": []}
