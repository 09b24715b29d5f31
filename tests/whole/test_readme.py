import json
import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_first_code_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    summary = json.loads((tmp_path / "runs" / "first" / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["rounds"] == 3
    assert list(summary["sites"]) == ["hospital-1", "hospital-2", "hospital-3"]
    assert (tmp_path / "runs" / "first" / "report.html").is_file()


def test_the_settings_that_it_lists_are_those_there_are():
    from dataclasses import fields

    from fedmed_flower.settings.plan import Plan
    from fedmed_flower.settings.training import Settings

    for entry in (*fields(Settings), *fields(Plan)):
        assert f"`{entry.name.replace('_', '-')}`" in README


def test_the_example_declares_every_setting():
    import tomllib
    from dataclasses import fields

    from fedmed_flower.settings.plan import Plan
    from fedmed_flower.settings.training import Settings

    path = Path(__file__).parents[2] / "examples" / "pneumonia" / "pyproject.toml"
    declared = tomllib.loads(path.read_text())["tool"]["flwr"]["app"]["config"]
    for entry in (*fields(Settings), *fields(Plan)):
        key = entry.name.replace("_", "-")
        assert type(declared[key]) is type(entry.default), key
