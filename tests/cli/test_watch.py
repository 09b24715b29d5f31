import signal
import socket
import stat
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import pytest
from live_runs import watching, write_live
from typer.testing import CliRunner

from fedmed_flower.cli import watch
from fedmed_flower.cli.main import app


def run(*arguments):
    result = CliRunner().invoke(app, ["watch", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_page_is_served_until_ctrl_c_and_on_this_machine_alone(tmp_path):
    write_live(tmp_path, app="heart")
    with watching(tmp_path, "--no-browser") as (process, url):
        parts = urlsplit(url)
        assert parts.hostname == "127.0.0.1"
        assert len(parts.path.strip("/")) >= 32
        with httpx.Client(trust_env=False) as client:
            assert "fedmed watch" in client.get(url).text
            assert client.get(f"{url}state").json()["app"] == "heart"
            assert client.get(f"http://127.0.0.1:{parts.port}/").status_code == 404
        # Another address of this machine is not listened to.
        with socket.socket() as other, pytest.raises(OSError, match="refused"):
            other.connect(("127.0.0.2", parts.port))
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.splitlines()[-1] == "the page is closed"
        assert "Traceback" not in out


def test_a_port_that_is_in_use_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(tmp_path, "--port", port, "--no-browser") == (
            2,
            f"not started: --port {port} cannot be used (Address already in use): give another, "
            "or leave --port out for a free one\n",
        )


def test_a_file_is_no_run_folder(tmp_path):
    path = tmp_path / "metrics.csv"
    path.touch()
    assert run(path) == (2, f"not started: {path} is a file: give the folder of a run\n")


def test_the_browser_is_given_a_file_that_only_this_user_can_read(tmp_path, monkeypatch):
    opened = []

    def look(address):
        file = Path(unquote(urlsplit(address).path))
        opened.append((address, file.read_text(), stat.S_IMODE(file.parent.stat().st_mode)))
        return True

    monkeypatch.setattr(watch.webbrowser, "open", look)
    url = "http://127.0.0.1:8123/secret/"
    with watch._opened(url):
        ((address, text, mode),) = opened
    assert "secret" not in address
    assert text == f'<meta http-equiv="refresh" content="0; url={url}">'
    assert mode == 0o700
    assert not Path(unquote(urlsplit(address).path)).exists()


def test_without_a_screen_no_browser_takes_the_terminal(monkeypatch):
    monkeypatch.setattr(watch.sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert not watch._has_screen()
    monkeypatch.setenv("DISPLAY", ":0")
    assert watch._has_screen()
