import importlib
from pathlib import Path

import pytest
from tiny import says

from fedmed_flower import InputError

EXAMPLE = Path(__file__).parents[2] / "examples" / "deployment"


@pytest.fixture
def deploy(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE)
    return importlib.import_module("deploy")


def test_hospitals_are_the_folders_of_the_data(deploy, tmp_path):
    data = tmp_path / "data"
    assert deploy.hospitals(data, None, given=False) == ["north", "south", "east"]
    assert deploy.hospitals(data, 5, given=False)[-1] == "site-5"
    for name in ("motol", "graz", ".hidden"):
        (data / name).mkdir(parents=True)
    (data / "notes.txt").write_text("no hospital")
    assert deploy.hospitals(data, None, given=True) == ["graz", "motol"]
    assert deploy.hospitals(data, 2, given=True) == ["graz", "motol"]
    # Nothing was made beside them.
    assert len([*data.iterdir()]) == 4


def test_folders_that_cannot_be_hospitals_are_refused(deploy, tmp_path):
    text = f"{tmp_path} has no folders: make one for each hospital, named after it"
    with pytest.raises(InputError, match=says(text)):
        deploy.hospitals(tmp_path, None, given=True)
    (tmp_path / "north").mkdir()
    text = f"--sites is 3, and {tmp_path} has the folders north"
    with pytest.raises(InputError, match=says(text)):
        deploy.hospitals(tmp_path, 3, given=False)
    (tmp_path / 'so"uth').mkdir()
    text = (
        "a hospital's name must be up to 40 letters, digits, - and _: got 'so\"uth', a folder of "
        f"{tmp_path}"
    )
    with pytest.raises(InputError, match=says(text)):
        deploy.hospitals(tmp_path, None, given=True)


def test_more_of_the_node_config_names_each_hospital(deploy, tmp_path):
    given = [tmp_path, "graz", Path("/data/graz"), 9092, 9094]
    config = 'site-name="graz" data-dir="/data/graz"'
    assert deploy.supernode_options(*given)[-1] == config
    more = 'secure-key="/keys/{site}.key" budget-epsilon=8.0'
    expected = f'{config} secure-key="/keys/graz.key" budget-epsilon=8.0'
    assert deploy.supernode_options(*given, more)[-1] == expected


def test_the_last_error_of_each_hospital_is_printed(deploy, tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "processes.json").write_text('{"superlink": {}, "graz": {}, "motol": {}}')
    for name, text in {
        "superlink": "Error: of the server",
        "graz": "ERROR: the first\nInputError: no file\ntrained\n",
        "motol": "trained\n",
    }.items():
        (tmp_path / "logs" / f"{name}.log").write_text(text)
    deploy.print_errors(tmp_path)
    log = tmp_path / "logs" / "graz.log"
    assert capsys.readouterr().out == f"graz: InputError: no file\n  all of it: {log}\n"
