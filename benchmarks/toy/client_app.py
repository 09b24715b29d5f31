"""A client that adds one to a NumPy array."""

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    """Return the array plus one."""
    moved = Array(message.content["arrays"]["w"].numpy() + 1)
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": ArrayRecord({"w": moved}), "metrics": metrics})
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message, context):
    """Return one example and nothing else."""
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
