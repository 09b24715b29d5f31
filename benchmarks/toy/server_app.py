"""A server that averages a thousand numbers."""

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp

from fedmed_flower.strategies import FedAvg

app = ServerApp()


@app.main()
def main(grid, context):
    """Run the rounds."""
    strategy = FedAvg(run_dir=context.run_config["run-dir"])
    arrays = ArrayRecord({"w": Array(np.zeros(1000, np.float32))})
    strategy.start(grid, arrays, num_rounds=context.run_config["num-server-rounds"])
