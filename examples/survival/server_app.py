"""The server that makes one Adam step of the regions' models in each round."""

from client_app import BreastCancerHospital
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmed_flower import federate
from fedmed_flower.strategies import FedAdam

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    federate(FedAdam(eta=0.1, tau=1e-8), grid, context, BreastCancerHospital(context))
