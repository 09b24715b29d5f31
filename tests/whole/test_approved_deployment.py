"""Hospitals that run what they have approved alone, on a SuperLink and two SuperNodes."""

from pathlib import Path

import pytest
from deployment_helper import ECHO_CLIENT, deployment, write_app

from fedmed_flower.approval.approvals import Approvals
from fedmed_flower.approval.bundle import bundle_at
from fedmed_flower.approval.rules import parse
from fedmed_flower.approval.signature import sign
from fedmed_flower.secure.identity import Identity

pytestmark = pytest.mark.slow

SERVER = """
    import numpy as np
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp import ServerApp

    from fedmed_flower.strategies import FedAvg

    app = ServerApp()


    @app.main()
    def main(grid, context):
        strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=2)
        arrays = ArrayRecord({"w": Array(np.arange(3.0))})
        strategy.start(grid, arrays, num_rounds=1, timeout=100)
        for failure in strategy.history.failures:
            print("FAILURE", failure.site, failure.reason, flush=True)
        print("TRAINED", strategy.history.rounds_trained(), flush=True)
"""
# Writes that a hospital has imported it, where the test can see it.
CLIENT = """
    import sys
    from pathlib import Path

    if Path(sys.argv[0]).name == "flwr-clientapp":
        with Path({seen!r}).open("a") as file:
            file.write("{word}\\n")
"""


def approve(lists: Path, name: str, app: Path, *rules: str) -> None:
    found, content = bundle_at(app)
    approvals = Approvals.load(lists / name)
    approvals.with_bundle(found, content, dict(map(parse, rules))).save()


@pytest.mark.parametrize("served", [["--no-fork-server"], []], ids=["new processes", "forked"])
def test_only_what_a_hospital_has_approved_is_imported_there(tmp_path, served):
    lists = tmp_path / "lists"
    seen = tmp_path / "seen"

    def app(word: str, **config: float) -> Path:
        client = CLIENT.format(seen=str(seen), word=word) + ECHO_CLIENT
        return write_app(tmp_path / word, SERVER, client, **config)

    approved = app("approved", rate=1.0)
    approve(lists, "north", approved, "rate=0..2")
    consortium = Identity.create(tmp_path / "consortium.key", "consortium")
    south = Approvals.load(lists / "south")
    south.with_signer("consortium", consortium.public, {}).save()

    with deployment(tmp_path / "files", "--sites", "2", "--approvals", str(lists), *served) as d:
        first = d.command("run", str(approved)).stdout
        assert "TRAINED {'north': 1}" in first
        assert "FAILURE south declined: app" in first
        assert "is not approved here" in first
        (asked,) = Approvals.load(lists / "south").asked()
        assert asked.bundle == bundle_at(approved)[0]
        assert seen.read_text().split() == ["approved"]

        within = d.command("run", str(approved), "-c", "rate=2.0").stdout
        assert "TRAINED {'north': 1}" in within
        beyond = d.command("run", str(approved), "-c", "rate=3.0").stdout
        assert "TRAINED {}" in beyond
        assert "rate is 3.0, allowed is the app's 1.0 or 0..2" in beyond
        assert seen.read_text().split() == ["approved"] * 2

        changed = app("changed", rate=1.0)
        assert "TRAINED {}" in d.command("run", str(changed)).stdout
        sign(changed, consortium)
        assert "TRAINED {'south': 1}" in d.command("run", str(changed)).stdout
        assert seen.read_text().split() == ["approved"] * 2 + ["changed"]
        assert "refused: app" in d.log("north")

        Approvals.load(lists / "south").without("consortium")[0].save()
        assert "TRAINED {}" in d.command("run", str(changed)).stdout
        assert seen.read_text().split() == ["approved"] * 2 + ["changed"]
