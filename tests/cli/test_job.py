"""Workers of `fedmed run`: their number, and that they are forked before anything is shown."""

from contextlib import contextmanager, nullcontext

import pytest
from tiny import says
from typer.testing import CliRunner

from fedmed_flower.cli import job
from fedmed_flower.cli.main import app
from fedmed_flower.cli.options import Options
from fedmed_flower.errors import InputError


@pytest.mark.parametrize("count", [0, -2, 65])
def test_the_number_of_workers_has_bounds(count, tmp_path):
    done = CliRunner().invoke(app, ["run", str(tmp_path), "--workers", str(count)])
    assert done.exit_code == 2
    assert f"--workers must be from 1 to 64, got {count}" in done.output


def test_workers_belong_to_the_engine_local(tmp_path):
    with pytest.raises(
        InputError,
        match=says(
            "--workers belongs to the engine local: Flower's engine trains as many sites at once "
            "as there are cores, or as fit on the GPUs: leave out --workers"
        ),
    ):
        job.prepare(tmp_path, Options(workers=2, engine=job.Engine.FLOWER))


class FakeProject:
    name = "chest"
    path = None


def job_of(tmp_path, workers, sites=3, **config):
    options = Options(workers=workers, settings=["seed=1"])
    return job.Job(FakeProject(), None, config, sites, None, options, tmp_path)


def test_workers_are_repeated_when_a_run_is_resumed(tmp_path):
    assert job_of(tmp_path, 2).again == " -c seed=1 --workers 2"
    assert job_of(tmp_path, 1).again == " -c seed=1"


@pytest.mark.parametrize(("wanted", "said", "count"), [(2, ", 2 workers", 2), (1, "", None)])
def test_workers_start_before_anything_is_shown(wanted, said, count, tmp_path, monkeypatch, capsys):
    order = []

    @contextmanager
    def shown(console, rounds):
        order.append("shown")
        yield None

    def forked(client, number):
        order.append(f"forked {number}")
        return nullcontext("workers")

    monkeypatch.setattr(job, "show_progress", shown)
    monkeypatch.setattr(job, "Workers", forked)
    monkeypatch.setattr(job, "_run_local", lambda job, display, workers: order.append(workers))
    job.execute(job_of(tmp_path, wanted, device="cpu"))
    assert order == (["shown", 1] if count is None else [f"forked {count}", "shown", "workers"])
    assert f"chest: 3 sites, engine local{said}\n" in capsys.readouterr().out


def test_as_many_workers_start_as_fit_on_the_gpu(tmp_path, monkeypatch):
    asked = []

    def fitting(app, config, sites, wanted):
        asked.append((sites, wanted))
        return 2

    monkeypatch.setattr(job, "fitting", fitting)
    assert job._workers(job_of(tmp_path, 8, sites=5, device="auto")) == 2
    assert job._workers(job_of(tmp_path, 8, sites=5, device="cpu")) == 5
    assert job._workers(job_of(tmp_path, 1, sites=5, device="auto")) == 1
    assert asked == [(5, 5)]
