import json
import sys

import pytest
from forked import Commands, run, server_of

from fedmed_flower.engines.forking import HOSPITAL_MODULES, SERVER_MODULES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="runs on Linux alone"),
]
PROBE = """
    import importlib, json, os, sys
    import fedmed_flower.engines.fork_server

    before = len(sys.modules)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    new = len(sys.modules) - before
    if __name__ == "__main__":
        import multiprocessing, tempfile, uuid, probe, numpy, torch
        from threadpoolctl import threadpool_info

        found, numbers = probe.found(), probe.numbers()
        pools = [(pool["filepath"], pool["num_threads"]) for pool in threadpool_info()]
        torch_threads = [torch.get_num_threads(), torch.get_num_interop_threads()]
        cuda = [torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork()]
        sums = float((numpy.ones((400, 400)) @ numpy.ones((400, 400))).sum())
        sums += float((torch.ones(400, 400) @ torch.ones(400, 400)).sum())
        numbers["deterministic"] = [sorted(pools), torch_threads, cuda, sums]
        print(json.dumps([found, numbers, new, os.getppid()], default=str))
"""


@pytest.mark.parametrize("modules", [HOSPITAL_MODULES, SERVER_MODULES], ids=["hospital", "server"])
def test_after_the_real_imports_a_child_finds_what_a_new_process_finds(tmp_path, modules):
    commands = Commands(tmp_path, OMP_NUM_THREADS="2", MPLCONFIGDIR=str(tmp_path))
    commands.command(PROBE)

    def state(command):
        done = run(environment, *modules, command=command, timeout=600)
        assert done.returncode == 0, done.stderr
        # Imports may print.
        return json.loads(done.stdout.splitlines()[-1])

    with commands.served("threadpoolctl", *modules) as environment:
        server = server_of(environment)
        fresh, fresh_numbers, imported, _ = state(commands.real)
        _, again, _, _ = state(commands.real)
        child, numbers, none, parent = state("probe")
        second, others, _, _ = state("probe")
    assert parent == server, commands.log
    assert imported > 3000
    assert none == 0
    # Those of OpenBLAS start when they are first needed.
    assert child.pop("threads")[0] <= fresh.pop("threads")[0]
    second.pop("threads")
    # Drawn by MLflow where it is installed, which MONAI imports.
    for each in (child, second, fresh):
        each["environment"].pop("_MLFLOW_TELEMETRY_SESSION_ID", None)
    assert {n: (v, fresh[n]) for n, v in child.items() if v != fresh[n]} == {}
    assert second == child
    deterministic = [each.pop("deterministic") for each in (numbers, others, fresh_numbers, again)]
    assert deterministic[1:] == deterministic[:-1]
    expected = {"random", "numpy", "torch", "torch seed", "monai", "key", "sympy.core.random.rng"}
    assert numbers.keys() == fresh_numbers.keys() >= expected
    for name, value in numbers.items():
        assert len({value, others[name], fresh_numbers[name], again[name]}) == 4, name
