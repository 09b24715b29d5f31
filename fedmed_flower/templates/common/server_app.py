"""The server that averages the hospitals' models."""

from client_app import Hospital
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmed_flower import federate
from fedmed_flower.strategies import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train one model with the hospitals, and write the run folder."""
    federate(FedAvg(), grid, context, Hospital(context))
