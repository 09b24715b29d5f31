"""The table of docs/privacy.md is that of all replies: nothing leaves that it does not list."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import test_genomics
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity
from hospitals import BUDGET, CLIENTS, Images, Masks, Table, hospital
from tables import predicting
from test_curious_server import OUTPUTS, PRIVATE, model_of, network
from tiny import CONFIG, context_of

from fedmed_flower.data.site import read_error
from fedmed_flower.statistics.request import Request

DOCS = Path(__file__).resolve().parent.parent / "docs" / "privacy.md"
WAYS = {"plain", "bounded", "known", "noised", "never"}
# So that figures of the small hospitals here leave.
FEW = {"min-train-patients": 2, "min-evaluated-patients": 2, "min-cell-count": 2}
FEW |= {"share-components": True}


def listed(column):
    """Return how each key of the table leaves; column 3 is a plain run, 4 a private one."""
    rows = [line.strip("|").split("|") for line in DOCS.read_text().splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows if len(row) == 5]
    return {(row[0], row[1].strip("`")): row[column] for row in cells if row[1].startswith("`")}


def generic(reply, name, key):
    """Return a key as the table has it."""
    if name == "site":
        return "any", f"site.{key}"
    if name == "arrays":
        return reply, "arrays.*"
    figure, _, group = key.partition("@")
    if reply == "evaluate" and group:
        return reply, "metrics.FIGURE@column=value"
    if reply == "personal" and not (figure.startswith("val-") or figure == "personal-epochs"):
        return reply, "metrics.FIGURE"
    figure = re.sub(r"^(dice|hd95|surface-dice)-(?!worst$).*", r"\1-CLASS", figure)
    figure = re.sub(r"^(moments|categories|counts) .*", r"\1 COLUMN", figure)
    return reply, f"{name}.{figure}"


def ask(client, kind, context, arrays, config):
    TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(config)})
    return client.client_app()(Message(content, context.node_id, kind), context)


def keys_of(client, node, run, arrays, outcome, kinds=None):
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
            for name, record in reply.content.items():
                for key in record:
                    outcome.setdefault(generic(reply_name, name, key), set()).add(client.__name__)


class Learning(Table):
    """A table of whose categories nothing is declared."""

    schema = replace(Table.schema, categories={})


def all_keys(private):
    found = {}
    run = {"local-steps": 4, "batch-size": 16, "personal-epochs": 1, "preparation": "declared"}
    run |= {"survival-loss": "discrete", "survival-horizon": 365.0, "survival-intervals": 3}
    run |= PRIVATE if private else {}
    with hospital("as it is") as node:
        node = {key: value for key, value in node.items() if key not in BUDGET} | FEW
        node |= BUDGET if private else {}
        for client in CLIENTS:
            torch.manual_seed(0)
            arrays = ArrayRecord(model_of(client, OUTPUTS[client]).state_dict())
            own = {Images: network(4), Table: {} if private else {"report-by": "group"}}
            keys_of(client, node, run | own.get(client, {}), arrays, found)
        keys_of(Learning, node, {"preparation": "federated"}, arrays, found, ["query.contribution"])
        for task in ("continuous", "count"):
            client = predicting(task)
            model = client(context_of(node_config=node, **run)).build_model()
            keys_of(client, node, run, ArrayRecord(model.state_dict()), found)
    return found


def genomes(folder, private):
    client, found = test_genomics.hospital(folder), {}
    node = {"site-name": "north", "data-dir": str(folder)} | FEW | (BUDGET if private else {})
    variants, people = test_genomics.VARIANTS, test_genomics.PEOPLE
    block = test_genomics.everything()
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
        reply = test_genomics.question(client, name, config, context, **arrays)
        if reply.has_error():
            found.setdefault("errors", set()).add(read_error(reply.error.reason)[1])
            continue
        for record, content in reply.content.items():
            for key in content:
                found.setdefault(generic(name, record, key), set()).add("genomes")
    return found


@pytest.mark.parametrize(("private", "column"), [(False, 3), (True, 4)])
def test_the_table_lists_all_that_leaves_and_nothing_else(tmp_path, private, column):
    table = listed(column)
    assert set(table.values()) == WAYS - (set() if private else {"noised", "known"}) - (
        {"bounded"} if private else set()
    )
    found = all_keys(private) | genomes(tmp_path, private)
    errors = found.pop("errors", set())
    assert all(text.startswith("declared: ") or text.startswith("declined: ") for text in errors)
    leaving = {key for key, way in table.items() if way != "never"}
    assert sorted(found.keys() - leaving) == []
    assert sorted(leaving - found.keys()) == []


def test_whatever_carries_no_noise_is_known_where_there_is_a_budget():
    plain = {key for key, way in listed(4).items() if way == "plain"}
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
