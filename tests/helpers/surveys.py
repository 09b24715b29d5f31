"""Surveys of made-up hospitals, for tests."""

from flwr.serverapp import ServerApp
from statistics_rows import make_patients
from tiny import CONFIG

from fedmed_flower import MedicalClient, SiteData, run_local
from fedmed_flower.settings.registry import sections_of
from fedmed_flower.statistics.server import survey

COUNTS = (150, 3, 260, 120)


class Ward(MedicalClient):
    """Four hospitals, one of them with three patients."""

    def load_data(self, site):
        rows = make_patients(COUNTS[site.index], site.index, f"{site.index}-")
        return SiteData(train=rows[1:], val=rows[:1], source="made up", generated=True)


def surveyed(client, request, folder, sites=4, node_configs=None, run_config=None, **options):
    """Run a survey in this process and return its answer."""
    answers, server = [], ServerApp()

    @server.main()
    def main(grid, context):
        answers.append(survey(grid, context, request, sections=sections_of(client), **options))

    config = CONFIG | {"run-dir": str(folder)} | (run_config or {})
    run_local(server, client.client_app(), sites, run_config=config, node_configs=node_configs)
    return answers[0]
