"""The server that averages the units' steps, with momentum."""

from client_app import IntensiveCareUnit
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmed_flower import federate
from fedmed_flower.strategies import FedAvgM

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    federate(FedAvgM(server_momentum=0.8), grid, context, IntensiveCareUnit(context))
