"""A wheel installed in an environment of its own has the command, the demo and the examples."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from fedmed_flower.cli.options import Kind

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*command, **options):
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=600, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder]
    run(*pip, ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment with the wheel; what it depends on is found in this one, the checkout not."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    run(folder / "bin" / "python", "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel)
    return folder / "bin"


def test_the_wheel_holds_the_examples_and_nothing_of_the_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "fedmed_flower/examples/pneumonia/client_app.py" in names
    assert "fedmed_flower/examples/deployment/deploy.py" in names
    files = {"README.md", "client_app.py", "settings.toml"}
    for kind in Kind:
        assert {f"fedmed_flower/templates/{kind}/{file}" for file in files} <= {*names}
    common = {"README.md", "pyproject.toml", "server_app.py"}
    assert {f"fedmed_flower/templates/common/{file}" for file in common} <= {*names}
    assert "fedmed_flower/cli/watch.html" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    assert not [
        name for name in names if "/data/" in name and not name.startswith("fedmed_flower/data/")
    ]


def test_an_installed_wheel_runs_the_demo(environment, tmp_path):
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    clean |= {"OMP_NUM_THREADS": "1"}
    where = run(
        *(environment / "python", "-c", "import fedmed_flower; print(fedmed_flower.__file__)"),
        cwd=tmp_path,
        env=clean,
    )
    assert where.startswith(str(environment.parent))
    assert run(environment / "fedmed", "--version", env=clean).startswith("fedmed-flower ")
    app = Path(where.strip()).parent / "examples" / "pneumonia"
    settings = ["-c", "dataset=phantoms", "-c", "local-epochs=1", "--rounds", "1", "--sites", "2"]
    output = run(
        *(environment / "fedmed", "run", app, *settings, "--out", tmp_path / "run"),
        cwd=tmp_path,
        env=clean,
    )
    assert "finished: 1 rounds" in output
    code = "from fedmed_flower.cli.listing import examples; print(examples())"
    found = run(environment / "python", "-c", code, cwd=tmp_path, env=clean)
    assert Path(found.strip()) == app.parent


def test_an_installed_wheel_writes_an_app_and_runs_it(environment, tmp_path):
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    clean |= {"OMP_NUM_THREADS": "1"}
    fedmed = environment / "fedmed"
    run(fedmed, "new", "heart2", "--for", "table", cwd=tmp_path, env=clean)
    output = run(fedmed, "run", "heart2", "--rounds", "1", cwd=tmp_path, env=clean)
    assert "finished: 1 rounds" in output
