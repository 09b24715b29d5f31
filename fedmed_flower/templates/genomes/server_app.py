"""The server of the association study."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmed_flower.genomics import associate

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Test the variants at the hospitals, and write the run folder."""
    associate(grid, context)
