"""Small builders for tests: a model of ten numbers, two-by-two images, messages and runs."""

import itertools
import re
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import ServerApp
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from fedmed_flower import ClassificationClient, SiteData, federate, run_local
from fedmed_flower.engines.local import LocalGrid
from fedmed_flower.methods.base import SiteRound
from fedmed_flower.methods.fedprox import FedProx
from fedmed_flower.settings import Section, setting
from fedmed_flower.settings.registry import listed, sections_of
from fedmed_flower.strategies import FedAvg
from fedmed_flower.wire import MESSAGE_VERSION

RUN_IDS = itertools.count(1)
CONFIG = {"learning-rate": 0.05, "batch-size": 4, "device": "cpu", "optimizer": "sgd"}
CONFIG |= {"pictures": 0}


def says(text):
    """Return the pattern that matches this text and no other."""
    return f"^{re.escape(text)}$"


def see(key):
    """Return how the error about a setting ends."""
    return f"; see `fedmed settings --search {key}`"


def says_of_setting(text, own=()):
    """Return the pattern that matches the error about a setting, which this text begins, alone.

    It ends with the command that says more of the key: of the one that the text suggests, or of the
    one with which it begins. `own` are the app's own keys.
    """
    suggested = re.search(r"did you mean ([\w-]+)\?", text)
    begins = r"(?:\w+: )?([\w-]+)(?:=\"?\w+\"?)? (?:in the node config )?(?:must|needs|excludes) "
    named = suggested or re.match(begins, text)
    key = named[1] if named else ""
    if key not in listed() and key not in own:
        return says(text)
    app = "APP " if key in own else ""
    join = " " if text.endswith("?") else "; "
    return says(f"{text}{join}see `fedmed settings {app}--search {key}`")


def make_rows(count, seed, name="p", classes=2):
    """Two-by-two images whose pixel at the place of the label is brighter; labels take turns."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        image = generator.integers(0, 100, (2, 2)).astype(np.uint8)
        image.ravel()[number % classes] += 80
        rows.append({"image": image, "label": number % classes, "patient": f"{name}-{number}"})
    return rows


def linear(outputs=2):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, outputs))


def halves(stem=0):
    """Return a model of a stem, whose values a seed decides, and a head."""
    model = nn.Sequential()
    model.stem = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
    model.head = nn.Linear(6, 2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(stem)
        for value in model.stem.state_dict().values():
            value.copy_(torch.rand(value.shape) * 2)
    return model


@dataclass(frozen=True)
class TinySettings(Section):
    """Settings of a test app's own."""

    alpha: float = setting(2.0, "A number.")
    dataset: str = setting("mine", "A text.")


class TinyClient(ClassificationClient):
    sections = (TinySettings,)
    num_classes = 2
    image_shape = (1, 2, 2)

    def build_model(self):
        return linear(self.num_classes)

    def load_data(self, site):
        return SiteData(
            train=make_rows(10, (site.index, 0), f"{site.name}-train"),
            val=make_rows(6, (site.index, 1), f"{site.name}-val"),
            test=make_rows(8, (site.index, 2), f"{site.name}-test"),
            source="tiny images",
        )


def fixed(data, base=TinyClient, **members):
    """Return a client class with these rows."""
    return type("Fixed", (base,), {"load_data": lambda self, site: data, **members})


def context_of(index=0, num_sites=2, run_id=None, node_config=None, **config):
    """Return a client's context; a run of its own where no `run_id` is given."""
    if node_config is None:
        node_config = {"partition-id": index, "num-partitions": num_sites}
    return Context(
        run_id=next(RUN_IDS) if run_id is None else run_id,
        node_id=100 + index,
        node_config=node_config,
        state=RecordDict(),
        run_config=CONFIG | {key.replace("_", "-"): value for key, value in config.items()},
    )


def node_of(folder, name="north", **more):
    """Return the node config of a real hospital whose data, ledger and book lie in a folder."""
    given = {key.replace("_", "-"): value for key, value in more.items()}
    return {"site-name": name, "data-dir": str(folder)} | given


def nodes_of(folder, *names, **more):
    """Return the node configs of real hospitals, each with a folder of its own."""
    places = [folder / f"node-{number}" for number in range(len(names))]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    return [node_of(place, name, **more) for place, name in zip(places, names, strict=True)]


def model_arrays(model=None, seed=0):
    """Return the arrays of a model with weights drawn from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ArrayRecord((linear() if model is None else model()).state_dict())


def ask(client, kind, context, arrays=None, mods=(), **config):
    """Send one message to a client's app and return the reply."""
    TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, SUPERLINK_NODE_ID
    TaskIdentity.task_id = 1
    content = RecordDict()
    record = {key.replace("_", "-"): value for key, value in config.items()}
    if kind in ("query.describe", "query.statistics", "query.cohort"):
        content["config"] = ConfigRecord({"version": MESSAGE_VERSION} | record)
    else:
        content["arrays"] = model_arrays() if arrays is None else arrays
        content["config"] = ConfigRecord(({"server-round": 1} if kind == "train" else {}) | record)
    return client.client_app(mods)(Message(content, context.node_id, kind), context)


def trained(client, context, arrays=None, **config):
    """Return the bits of the model that a client sends back from training."""
    reply = ask(client, "train", context, arrays, **config)
    assert not reply.has_error(), reply.error.reason
    return bits(reply.content["arrays"])


def bits(arrays):
    return {key: array.numpy().tobytes() for key, array in arrays.items()}


def run_tiny(
    folder,
    client=TinyClient,
    num_sites=2,
    *,
    node_configs=None,
    model=linear,
    strategy=None,
    evaluate_fn=None,
    mods=(),
    **config,
):
    """Run an experiment in this process and return its result."""
    server = ServerApp()

    @server.main()
    def main(grid, context):
        own = sections_of(client)
        federate(strategy or FedAvg(), grid, context, model, own, evaluate_fn=evaluate_fn)

    settings = CONFIG | {"num-server-rounds": 2, "run-dir": str(folder)}
    settings |= {key.replace("_", "-"): value for key, value in config.items()}
    # A test's client may have a client_app of its own.
    app = client.client_app(mods) if mods else client.client_app()
    run = run_local(server, app, num_sites, run_config=settings, node_configs=node_configs)
    return run.result


def pulled(model, mu):
    """Return FedProx as it begins a round with a model."""
    names = tuple(name for name, _ in model.named_parameters())
    method = FedProx(proximal_mu=mu)
    method.begin(SiteRound(model, names, names, {}, {}, 0.1, fit=None, optimizer=None))
    return method


def connect_late(monkeypatch, node_id):
    """Let a node connect only when a training message has been sent."""
    sent = []
    ids = LocalGrid.get_node_ids
    push = LocalGrid.push_messages

    def get_node_ids(self):
        return [node for node in ids(self) if node != node_id or sent]

    def push_messages(self, messages):
        sent.extend(m for m in messages if m.metadata.message_type == "train")
        return push(self, messages)

    monkeypatch.setattr(LocalGrid, "get_node_ids", get_node_ids)
    monkeypatch.setattr(LocalGrid, "push_messages", push_messages)
