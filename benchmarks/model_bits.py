"""The models that the examples end with, as digests: whether two states of the code give the same.

    python benchmarks/model_bits.py [--checkout FOLDER ...] [--examples heart ...]

Runs each example for 3 rounds with seed 0, in one process and on Flower's simulation engine, with
the code of each checkout (this one where none is named) and one torch thread. FEDMED_DATA names
real images and volumes; generated ones are taken where it is not set. Ends with 1 where any two
digests of an example differ.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
EXAMPLES = ("heart", "pneumonia", "hippocampus")
ENGINES = ("local", "flower")


def digest(checkout: Path, example: str, engine: str) -> str:
    """Run an example with a checkout's code; return the first digits of its model's digest."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    settings = ["-c", "seed=0"]
    if not os.environ.get("FEDMED_DATA") and example != "heart":
        settings += ["-c", "dataset='phantoms'"]
    main = "fedmed_flower.cli.main" if (checkout / "fedmed_flower/cli").is_dir() else None
    start = f"from {main or 'fedmed_flower.cli'} import main; main()"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", start, "run", str(checkout / "examples" / example)]
        command += ["--rounds", "3", "--engine", engine, "--out", f"{folder}/run", *settings]
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
        return hashlib.sha256(Path(folder, "run/model.safetensors").read_bytes()).hexdigest()[:16]


def main() -> None:
    """Print a row an example and engine, and whether all checkouts agree."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkout", nargs="+", type=Path, default=[HERE])
    parser.add_argument("--examples", nargs="+", default=EXAMPLES, choices=EXAMPLES)
    arguments = parser.parse_args()
    same = True
    for example in arguments.examples:
        found = set()
        for engine in ENGINES:
            digests = [digest(each.resolve(), example, engine) for each in arguments.checkout]
            found.update(digests)
            print(f"{example:<12} {engine:<7}", *digests, flush=True)
        same &= len(found) == 1
    print("the same model everywhere" if same else "the models differ")
    sys.exit(not same)


if __name__ == "__main__":
    main()
