"""The notebooks run from their first cell to their last, and hold no output."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def executed(path, folder):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    return [cell["outputs"] for cell in notebook.cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_output(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
def test_the_first_run_shows_progress_and_its_report(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    outputs = executed(FOLDER / "first_run.ipynb", tmp_path)
    progress, *lines = outputs[2]
    # Its last drawing is empty: nothing is left behind.
    assert progress["output_type"] == "display_data"
    assert progress["data"]["text/html"] == ""
    said = "".join(line.get("text", "") for line in lines)
    assert "round 5/5" in said
    assert "configure_train" not in said
    (report,) = outputs[3]
    assert report["data"]["text/html"].startswith("<iframe sandbox")
    assert "Over the rounds" in report["data"]["text/html"]
    assert "federated" in outputs[-1][0]["data"]["text/plain"]


@pytest.mark.slow
def test_the_private_table_spends_no_more_than_its_target(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    outputs = executed(FOLDER / "private_table.ipynb", tmp_path)
    ledgers = outputs[-1][0]["text"].splitlines()
    assert len(ledgers) == 3
    assert all(0 < float(line.split()[2]) <= 8.005 for line in ledgers)
