"""What a process loads: on a deployment each message has one of its own, and so has a command."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.common.serde import recorddict_to_proto

from fedmed_flower import run_local
from fedmed_flower.engines.project import load_project
from fedmed_flower.files import write_rows

HEART = Path(__file__).parents[2] / "examples" / "heart"
HEAVY = {
    *("PIL", "cryptography", "dp_accounting", "flwr", "lifelines", "matplotlib", "monai"),
    *("nibabel", "numpy", "opacus", "pandas", "pooch", "pydicom", "scipy", "scipy.stats"),
    *("sklearn", "torch", "torch._dynamo", "xgboost"),
}
# What Flower itself loads, and what each answer needs.
FLOWER = {"flwr", "cryptography", "numpy"}

SAY = f"""
import json, pickle, sys

def say(name):
    print("LOADED", json.dumps([name, sorted({HEAVY!r} & sys.modules.keys())]))

"""
# As `flwr-clientapp` does for one message.
HOSPITAL = """
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from flwr.supercore.object_ref import load_app
from flwr.supercore.task_identity import TaskIdentity

folder, recorded, node, config = json.loads(sys.argv[1])
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
app = load_app("client_app:app", Exception, folder)
say("app")

def ask(kind, content):
    context = Context(1, 2, node, RecordDict(), config)
    reply = app(Message(content, 2, kind), context)
    if reply.has_error():
        sys.exit(f"{kind}: {reply.error}")
    say(kind)

with open(recorded, "rb") as file:
    messages, replies = pickle.load(file)
for kind in ("query.describe", "query.contribution"):
    ask(kind, recorddict_from_proto(Proto.FromString(messages[kind])))

from flwr.app import ConfigRecord

from fedmed_flower.statistics.request import Request
from fedmed_flower.wire import MESSAGE_VERSION, REQUEST, VERSION

question = ConfigRecord({VERSION: MESSAGE_VERSION, REQUEST: Request(columns=("age",)).to_text()})
ask("query.statistics", RecordDict({"config": question}))
for kind in ("train", "evaluate"):
    ask(kind, recorddict_from_proto(Proto.FromString(messages[kind])))
"""
SERVER = """
from collections import defaultdict, deque

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "fedmed_flower.reports.report":
            say("rounds")

sys.meta_path.insert(0, Watch())
from flwr.app import Message
from flwr.common.serde import recorddict_from_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto
from flwr.supercore.object_ref import load_app

from fedmed_flower.engines.local import run_local

folder, recorded, config = json.loads(sys.argv[1])
with open(recorded, "rb") as file:
    messages, replies = pickle.load(file)
left = defaultdict(deque)
for kind, site, content in replies:
    left[kind, site].append(content)

def hospital(message, context):
    metadata = message.metadata
    content = left[metadata.message_type, metadata.dst_node_id].popleft()
    return Message(recorddict_from_proto(Proto.FromString(content)), reply_to=message)

run_local(load_app("server_app:app", Exception, folder), hospital, 2, run_config=config)
say("report")
"""
COMMANDS = """
import fedmed_flower
say("import")
from fedmed_flower.cli.main import app

for command in json.loads(sys.argv[1]):
    try:
        app(command)
    except SystemExit as end:
        if end.code:
            sys.exit(f"{command}: {end.code}")
    say(" ".join(command))

# What a hospital of an association study answers with.
import fedmed_flower.genomics.client
import fedmed_flower.genomics.secure_client
say("genomics")
"""


def loaded_in(code, *given):
    """Run a process; return which of `HEAVY` had been loaded, by what the process was at."""
    done = subprocess.run(
        [sys.executable, "-c", SAY + code, json.dumps(given[0] if len(given) == 1 else given)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("LOADED ")]
    return {name: set(found) for name, found in (json.loads(line[7:]) for line in lines)}


def write_hearts(folder, seed):
    """Write the table of a hospital as examples/heart reads it."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "patient": f"{seed}-{number}",
            "age": int(rng.integers(30, 80)),
            "trestbps": int(rng.integers(100, 180)),
            "chol": int(rng.integers(150, 350)),
            "thalach": int(rng.integers(90, 200)),
            "oldpeak": float(rng.integers(0, 4)),
            "sex": int(rng.integers(2)),
            "cp": int(rng.integers(1, 5)),
            "fbs": int(rng.integers(2)),
            "restecg": int(rng.integers(3)),
            "exang": int(rng.integers(2)),
            "disease": number % 2,
        }
        for number in range(120)
    ]
    folder.mkdir()
    with (folder / "heart.csv").open("w", newline="") as file:
        write_rows(file, [rows[0].keys(), *(row.values() for row in rows)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of examples/heart: the file of its messages and replies, and its config."""
    folder = tmp_path_factory.mktemp("hearts")
    folders = [folder / f"h{seed}" for seed in range(2)]
    for seed, path in enumerate(folders):
        write_hearts(path, seed)
    project = load_project(HEART)
    app = project.client_app()
    config = project.declared | {"num-server-rounds": 1, "run-dir": str(folder / "run")}
    messages = {}
    replies = []

    def recorded(message, context):
        metadata = message.metadata
        messages.setdefault(metadata.message_type, _bytes_of(message.content))
        reply = app(message, context)
        assert not reply.has_error(), reply.error
        site = metadata.dst_node_id
        replies.append((metadata.message_type, site, _bytes_of(reply.content)))
        return reply

    nodes = [{"data-dir": str(path), "site-name": path.name} for path in folders]
    run_local(project.server_app(), recorded, 2, run_config=config, node_configs=nodes)
    file = folder / "messages.pickle"
    file.write_bytes(pickle.dumps((messages, replies)))
    return file, config


def _bytes_of(content):
    return recorddict_to_proto(content).SerializeToString()


def test_a_hospital_loads_for_a_message_only_what_it_needs(run, tmp_path):
    file, config = run
    write_hearts(tmp_path / "a", 2)
    node = {"data-dir": str(tmp_path / "a"), "site-name": "a"}
    loaded = loaded_in(HOSPITAL, str(HEART), str(file), node, config)
    assert loaded["app"] == FLOWER
    assert loaded["query.describe"] == FLOWER
    assert loaded["query.contribution"] == FLOWER
    assert loaded["query.statistics"] <= FLOWER | {"scipy"}
    # torch.optim loads torch._dynamo with the first optimizer.
    assert loaded["train"] <= FLOWER | {"scipy", "torch", "torch._dynamo"}
    # The AUC is scikit-learn's, which loads pandas if it is installed.
    assert "sklearn" in loaded["evaluate"]
    assert not loaded["evaluate"] & {"monai", "opacus", "nibabel", "PIL", "matplotlib", "pydicom"}


def test_a_server_loads_no_plots_before_the_report(run, tmp_path):
    file, config = run
    loaded = loaded_in(SERVER, str(HEART), str(file), config | {"run-dir": str(tmp_path / "run")})
    assert loaded["rounds"] <= FLOWER | {"torch"}
    assert "matplotlib" in loaded["report"]


def test_light_commands_and_studies_of_genotypes_load_no_framework(tmp_path):
    key = str(tmp_path / "key.toml")
    commands = (
        ["--help"],
        ["run", "--help"],
        ["--version"],
        ["card", "--help"],
        ["compare", "--help"],
        ["new", str(tmp_path / "ward"), "--for", "table"],
        ["list"],
        ["keys", "--help"],
        ["settings"],
        ["keys", "new", "a", "--out", key],
        ["keys", "show", key],
    )
    loaded = loaded_in(COMMANDS, commands)
    for step in list(loaded)[:9]:
        assert loaded[step] == set(), step
    assert loaded["settings"] <= {"numpy"}
    assert loaded[f"keys show {key}"] <= {"numpy", "cryptography"}
    assert loaded["genomics"] <= FLOWER | {"scipy"}
