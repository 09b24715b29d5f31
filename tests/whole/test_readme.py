import json
import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_the_first_code_runs_as_it_stands(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    summary = json.loads((tmp_path / "runs" / "first" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["rounds"] == 3
    assert list(summary["sites"]) == ["hospital-1", "hospital-2", "hospital-3"]
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    # The hospitals' generated patients have different names.
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["generated data, not patients"]
