"""Read back what a run has left with TensorBoard, MLflow and Weights & Biases."""

import json
import struct

import wandb
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2 as proto

_BLOCK = 32768
_HEADER = 7


def tensorboard_of(folder):
    """Return the steps and values of each figure, and the texts by name."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    figures = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    texts = {
        name.removesuffix("/text_summary"): [
            event.tensor_proto.string_val[0].decode() for event in events.Tensors(name)
        ]
        for name in events.Tags()["tensors"]
    }
    return figures, texts


def mlflow_of(folder):
    """Return the experiment's only run, and the steps and values of each figure."""
    client = MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
    (experiment,) = [each for each in client.search_experiments() if each.name != "Default"]
    (run,) = client.search_runs([experiment.experiment_id])
    figures = {
        name: [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    return run, figures


def wandb_of(path):
    """Return the steps and values of each figure of an offline run, and its records by kind."""
    # The package writes the file's end when it ends itself.
    wandb.teardown()
    kinds = {}
    figures = {}
    for data in _logged(path.read_bytes()[_HEADER:]):
        record = proto.Record.FromString(data)
        kinds.setdefault(record.WhichOneof("record_type"), []).append(record)
        if record.HasField("history"):
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                if not name.startswith("_"):
                    value = json.loads(item.value_json)
                    figures.setdefault(name, []).append((record.history.step.num, value))
    return figures, kinds


def _logged(content):
    """Yield the records of a log in the format of LevelDB, after the file's header."""
    # The first block is shorter by that header.
    end = _BLOCK - _HEADER
    position = 0
    record = b""
    while position + _HEADER <= len(content):
        if end - position < _HEADER:
            position = end
        if position == end:
            end += _BLOCK
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += _HEADER
        record += content[position : position + length]
        position += length
        if kind in (1, 4):
            yield record
            record = b""
