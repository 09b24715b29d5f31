"""A key that nobody reads is refused before anything starts, by each side for itself."""

import pytest
from deployment_helper import write_app
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from tiny import CONFIG, TinyClient, ask, context_of, linear, node_of, run_tiny
from typer.testing import CliRunner

from fedmed_flower import InputError, federate, run_local
from fedmed_flower.cli.main import app
from fedmed_flower.data.site import Site
from fedmed_flower.genomics import associate
from fedmed_flower.statistics import survey
from fedmed_flower.strategies import FedAvg

TEXT = r"^unknown setting 'target_epsilon': did you mean target-epsilon\? "
WRONG = {"target_epsilon": 1.0}
CLIENT = """
from tiny import TinyClient

app = TinyClient.client_app()
"""
SERVER = """
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    raise AssertionError("the server has started")
"""


class Watched(TinyClient):
    loaded: list = []  # noqa: RUF012

    def load_data(self, site):
        self.loaded.append(site)
        return super().load_data(site)


@pytest.mark.parametrize("kind", ["train", "evaluate", "query.describe", "query.statistics"])
@pytest.mark.parametrize("config", [WRONG, {"settings": "target_epsilon = 1.0"}])
def test_each_hospital_refuses_for_itself_before_it_reads_a_row(tmp_path, caplog, kind, config):
    Watched.loaded.clear()
    context = context_of(node_config=node_of(tmp_path))
    context.run_config = CONFIG | config
    reply = ask(Watched, kind, context)
    assert reply.error.reason == "site north: InputError"
    assert "north: unknown setting 'target_epsilon': did you mean" in caplog.messages[-1]
    assert Watched.loaded == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "start",
    [
        lambda grid, context: federate(FedAvg(), grid, context, linear),
        associate,
        survey,
    ],
)
def test_the_server_refuses_for_itself_whatever_its_clients_are(start, tmp_path):
    server, asked = ServerApp(), []

    @server.main()
    def main(grid, context):
        grid.push_messages = asked.append
        start(grid, context)

    # run_local checks nothing for a ClientApp of somebody else.
    config = WRONG | {"run-dir": str(tmp_path / "run")}
    with pytest.raises(InputError, match=TEXT):
        run_local(server, ClientApp(), 2, run_config=config)
    assert asked == []
    assert not (tmp_path / "run").exists()


def test_run_local_refuses_before_the_server_starts():
    server, started = ServerApp(), []

    @server.main()
    def main(grid, context):
        started.append(context)

    with pytest.raises(InputError, match=TEXT):
        run_local(server, TinyClient.client_app(), 2, run_config=WRONG)
    assert started == []
    # The right name in its place trains.
    run_local(server, TinyClient.client_app(), 2, run_config={"target-epsilon": 1.0})
    assert len(started) == 1


def test_the_command_refuses_what_an_app_declares(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_app(tmp_path / "app", SERVER, CLIENT, settings="", **WRONG)
    result = CliRunner().invoke(app, ["run", "app", "--out", "run"])
    assert result.exit_code == 2
    assert "unknown setting 'target_epsilon': did you mean target-epsilon?" in result.output
    assert not (tmp_path / "run").exists()


def test_a_real_hospital_ignores_the_folder_of_a_simulation(tmp_path):
    for name in ("mine", "theirs"):
        (tmp_path / name / "other").mkdir(parents=True)
    context = context_of(node_config=node_of(tmp_path / "mine"))
    context.run_config = {"data": str(tmp_path / "theirs")}
    site = Site.from_context(context)
    assert (site.name, site.data_dir, site.simulated) == ("north", tmp_path / "mine", False)
    context = context_of(node_config={"site-name": "south"})
    context.run_config = {"data": str(tmp_path / "theirs")}
    assert Site.from_context(context).data_dir is None


def test_what_is_given_twice_is_refused_by_a_run(tmp_path):
    with pytest.raises(InputError, match=r"^seed is given twice, by itself \(1\) and in settings"):
        run_tiny(tmp_path / "run", seed=1, settings="seed = 2")
    assert not (tmp_path / "run").exists()
