"""Replies in files: a rule makes the same model of them, and nothing stays behind."""

import errno
import os
import re
import stat
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from builders import arrays, dump, reply, run, site_app
from flwr.app import ArrayRecord

from fedmed_flower.arrays.views import array_of
from fedmed_flower.errors import InputError
from fedmed_flower.server import spill
from fedmed_flower.server.spill import Spill, available_memory
from fedmed_flower.strategies import (
    Bulyan,
    CenteredClipping,
    FedAdam,
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    GeometricMedian,
    Krum,
)

MODEL = arrays(
    w=np.linspace(-1, 1, 300, dtype=np.float32).reshape(20, 15),
    half=np.linspace(-1, 1, 7).astype(np.float16),
    one=np.float64(0.5),
    n=np.array([3, 4], np.int64),
)
SITES = 9


TINY = 1e-9


def train(values, message, context):
    index = context.node_config["partition-id"]
    rng = np.random.default_rng((index, int(message.content["config"]["server-round"])))
    new = {
        key: v + (rng.normal(size=np.shape(v)).astype(v.dtype) if v.dtype.kind == "f" else index)
        for key, v in values.items()
    }
    return new, {"num-examples": 10 + index}


RULES = [
    FedAvg,
    FedMedian,
    FedTrimmedAvg,
    FedAdam,
    GeometricMedian,
    CenteredClipping,
    partial(Krum, num_malicious_nodes=1),
    partial(Bulyan, num_malicious_nodes=1),
    partial(FedMedian, mixing="nearest", num_malicious_nodes=1),
    partial(FedAvg, max_update_norm=3.0),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: getattr(rule, "func", rule).__name__)
def test_replies_in_files_make_the_same_model_to_the_bit(rule, tmp_path):
    models = []
    for name, bound in (("memory", 1.0), ("files", TINY)):
        strategy = rule(run_dir=tmp_path / name, seed=1, memory_gigabytes=bound)
        result = run(strategy, site_app(train), MODEL, rounds=2, sites=SITES)
        assert not strategy.history.failures
        assert bool(strategy.run.spill.spilled) == (bound == TINY)
        models.append(dump(result.arrays))
    assert models[0] == models[1]
    names = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("memory", "files")]
    assert names[0] == names[1]
    mapped = Path("/proc/self/maps").read_text().splitlines()
    assert not [line for line in mapped if str(tmp_path) in line and "(deleted)" in line]


def test_a_reply_that_is_not_finite_is_found_in_a_file(tmp_path):
    def broken(values, message, context):
        new, metrics = train(values, message, context)
        if context.node_config["partition-id"] == 4:
            new["w"] = np.full_like(new["w"], np.nan)
        return new, metrics

    strategy = FedMedian(run_dir=tmp_path, seed=1, memory_gigabytes=TINY)
    run(strategy, site_app(broken), MODEL, rounds=1, sites=SITES)
    assert [(f.site, f.reason) for f in strategy.history.failures] == [
        ("site-4", "w holds NaN or infinite values")
    ]


def test_what_is_within_the_bound_stays_in_memory(tmp_path):
    size = sum(len(array.data) for array in MODEL.values())
    part = Spill(2.5 * size / 1e9, tmp_path)
    given = [reply(n, MODEL) for n in range(4)]
    kept = [part.message(each) for each in given]
    assert [one is other for one, other in zip(given, kept, strict=True)] == [True, True] + 2 * [
        False
    ]
    assert (part.held, part.spilled) == (2 * size, 2 * size)
    for each in kept:
        assert dump(each.content["arrays"]) == dump(MODEL)
        assert each.content["metrics"] == given[0].content["metrics"]
    # The reply itself stays as it was.
    assert all(type(array.data) is bytes for array in given[3].content["arrays"].values())


def test_a_file_has_no_name_and_is_private(tmp_path, monkeypatch):
    modes = []
    opened = spill.TemporaryFile

    def watched(**options):
        file = opened(**options)
        modes.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        return file

    monkeypatch.setattr(spill, "TemporaryFile", watched)
    kept = Spill(TINY, tmp_path).message(reply(1, MODEL))
    assert modes == [0o600]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="read-only"):
        np.frombuffer(kept.content["arrays"]["w"].data, np.uint8)[0] = 1


def test_replies_in_files_take_no_memory(tmp_path):
    size = 1 << 20

    def peak(bound):
        part = Spill(bound, tmp_path)
        values = np.zeros(size, np.float32)
        tracemalloc.start()
        given = (reply(n, ArrayRecord({"w": array_of(values)})) for n in range(8))
        kept = [part.message(each) for each in given]
        reached = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(kept) == 8
        return reached / (4 * size)

    assert peak(1.0) > 8
    # The reply that has come, and the next one.
    assert peak(TINY) < 2.5


def test_a_full_disk_is_named_with_the_way_out(tmp_path, monkeypatch):
    def full(**options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spill, "TemporaryFile", full)
    text = f"{tmp_path} cannot hold 128 bytes of them (No space left on device): free space there"
    with pytest.raises(InputError, match=re.escape(text)):
        Spill(TINY, tmp_path).message(reply(1, {"none": np.zeros(0, np.float32)}))


def test_without_a_bound_half_of_the_available_memory_is_taken(tmp_path, monkeypatch):
    info = tmp_path / "meminfo"
    info.write_text("MemTotal:  9 kB\nMemAvailable:       4 kB\n")
    monkeypatch.setattr(spill, "_MEMORY", info)
    assert available_memory() == 4096
    part = Spill(0.0, tmp_path)
    part.message(reply(1, {"w": np.zeros(480, np.float32)}))
    part.message(reply(2, {"w": np.zeros(480, np.float32)}))
    assert (part.held, part.spilled) == (2048, 2048)
    monkeypatch.setattr(spill, "_MEMORY", tmp_path / "missing")
    assert available_memory() == float("inf")


@pytest.mark.parametrize("bound", [-1.0, float("inf"), float("nan")])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(InputError, match="memory_gigabytes must be at least 0 and finite, got"):
        FedMedian(memory_gigabytes=bound)
