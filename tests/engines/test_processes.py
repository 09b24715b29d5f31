import os
import subprocess
import sys
from urllib.request import getproxies_environment, proxy_bypass_environment

import pytest

from fedmed_flower.engines import processes as module
from fedmed_flower.engines.processes import Process, family, living, without_loopback_proxy

LOOPBACK = "localhost,127.0.0.1,::1"


@pytest.mark.parametrize(
    ("before", "lower", "upper", "grpc"),
    [
        ({}, LOOPBACK, LOOPBACK, None),
        ({"no_proxy": "a.org, b.org"}, f"a.org,b.org,{LOOPBACK}", f"a.org,b.org,{LOOPBACK}", None),
        ({"NO_PROXY": "a.org", "no_proxy": ""}, f"a.org,{LOOPBACK}", f"a.org,{LOOPBACK}", None),
        ({"NO_PROXY": "a", "no_proxy": "b"}, f"b,{LOOPBACK}", f"a,{LOOPBACK}", None),
        ({"no_proxy": "::1,localhost"}, *["::1,localhost,127.0.0.1"] * 2, None),
        # All hosts: Python knows the star only if it stands alone.
        ({"no_proxy": "*"}, "*", "*", None),
        ({"no_grpc_proxy": "a.org"}, LOOPBACK, LOOPBACK, f"a.org,{LOOPBACK}"),
    ],
)
def test_loopback_is_added_to_the_hosts_without_proxy(before, lower, upper, grpc):
    given = {"http_proxy": "http://127.0.0.1:9", **before}
    kept = dict(given)
    found = without_loopback_proxy(given)
    assert (found["no_proxy"], found["NO_PROXY"], found.get("no_grpc_proxy")) == (
        lower,
        upper,
        grpc,
    )
    assert found["http_proxy"] == "http://127.0.0.1:9"
    assert given == kept


def test_python_reaches_loopback_without_the_proxy_and_other_hosts_by_it(monkeypatch):
    monkeypatch.setattr(os, "environ", without_loopback_proxy({"http_proxy": "http://a:9"}))
    assert getproxies_environment()["http"] == "http://a:9"
    assert all(proxy_bypass_environment(host) for host in ("127.0.0.1:80", "localhost", "::1"))
    assert not proxy_bypass_environment("hospital.org")


def test_living_processes_are_found_without_any_program(monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "input()", "a b"], stdin=subprocess.PIPE) as child:
        monkeypatch.setenv("PATH", "")
        table = living()
        assert table[child.pid] == Process(os.getpid(), f"{sys.executable} -c input() a b")
        child.communicate(b"\n")
    assert child.pid not in living()


def test_a_process_with_any_name_is_read_and_a_zombie_is_left_out(tmp_path):
    for pid, status, command in (
        ("7", "7 (a) Z (b c) S 5 7", b"a) Z\0-x\0"),
        ("8", "8 (gone) Z 7 8", b""),
    ):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "stat").write_text(status)
        (tmp_path / pid / "cmdline").write_bytes(command)
    (tmp_path / "9").mkdir()
    (tmp_path / "self").mkdir()
    assert module._living_in(tmp_path) == {7: Process(5, "a) Z -x")}


def test_elsewhere_than_on_linux_processes_are_those_of_ps(monkeypatch, tmp_path):
    program = tmp_path / "ps"
    program.write_text("#!/bin/sh\necho ' 7 5 Ss  a b'\necho ' 8 7 Z+  <defunct>'\necho '9 7 R '\n")
    program.chmod(0o755)
    monkeypatch.setattr(module, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(module, "_PS", (str(program),))
    assert living() == {7: Process(5, "a b"), 9: Process(7, "")}


def test_a_family_is_all_that_descend_also_from_processes_that_have_ended():
    table = {
        2: Process(1, "link"),
        3: Process(2, "simulation"),
        4: Process(1, "worker --parent-pid 3"),
        5: Process(1, "executor --parent-pid 9"),
        6: Process(1, "stranger"),
    }
    assert family({2}, table) == {2, 3, 4}
    assert family({9}, table) == {5}
