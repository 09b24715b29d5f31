"""Five unequal hospitals outline nuclei, each in pictures of another stain: what closes the gap.

The pictures are generated (`fedmed_flower.data.microscopy`). With a stain a hospital and one pass a
round, federated averaging stays far behind one model of all pictures. The last two rows are of one
such model, trained for as many passes, and of each hospital alone. Figures are Dice of the
hospitals' own test pictures: their mean over hospitals, its spread over seeds, each hospital's.

    OMP_NUM_THREADS=1 python benchmarks/stains.py [--seeds 5] [--rounds 12] [--only NAME ...]
"""

import argparse
import json
import logging
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import documented
from flwr.serverapp import ServerApp
from monai.networks.nets import UNet

from fedmed_flower import SegmentationClient, SiteData, federate, run_local
from fedmed_flower.data.microscopy import STAINS, nuclei
from fedmed_flower.strategies import FedAvg, WeightedFedAvg

COUNTS = (160, 48, 24, 16, 12)
"""Training pictures of each hospital: fluorescence is the most frequent stain."""
VAL, TEST = 4, 24

# What each row changes.
METHODS = {
    "one pass a round": {"fewest-steps": 0},
    "one pass, batch normalisation, kept": {"fewest-steps": 0, "norm": "batch", "keep": "norm"},
    "5 passes a round": {"fewest-steps": 0, "local-epochs": 5},
    "defaults: at least 16 steps a round": {},
    "16 steps, uniform weights": {"strategy": "uniform"},
    "16 steps, own models: Ditto": {"method": "ditto"},
}
BESIDE = "one pass a round"
STRATEGIES = {"mean": FedAvg, "uniform": lambda: WeightedFedAvg(weights="uniform")}


class Nuclei(SegmentationClient):
    """Each hospital has pictures of one stain."""

    classes = ("nucleus",)
    image_shape = (3, 64, 64)
    norm = "instance"

    def build_model(self):
        """Return a small network."""
        return UNet(2, 3, 2, (16, 32, 64), (2, 2), num_res_units=1, norm=self.norm)

    def load_data(self, site):
        """Return the pictures of one stain."""
        stain = STAINS[site.index]
        count = COUNTS[site.index]
        rows = nuclei(count + VAL + TEST, stain, self.settings.seed).rows
        # The last pictures are the same for any number of training pictures.
        return SiteData(
            train=rows[VAL + TEST :],
            val=rows[:VAL],
            test=rows[VAL : VAL + TEST],
            source="generated nuclei",
            generated=True,
        )


class BatchNorm(Nuclei):
    """With the running statistics that hospitals may keep."""

    norm = "batch"


def run(name, seed, rounds):
    """Run one method once and return the test of its summary."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    changes = dict(METHODS[name])
    client = BatchNorm if changes.pop("norm", "") == "batch" else Nuclei
    make = STRATEGIES[changes.pop("strategy", "mean")]
    server = ServerApp()

    @server.main()
    def main(grid, context):
        federate(make(), grid, context, client(context))

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "num-server-rounds": rounds,
            "seed": seed,
            "run-dir": str(Path(folder) / "run"),
            "pictures": 0,
            "baselines": name == BESIDE,
            **changes,
        }
        run_local(server, client.client_app(), len(STAINS), run_config=settings)
        return json.loads((Path(folder) / "run" / "summary.json").read_text())["test"]


def sites_of(test):
    return test.get("own") or test["sites"]


def row(name, sites):
    """Return a row: the mean of hospitals, its spread over seeds, and the mean of each hospital."""
    means = [statistics.fmean(part["dice"] for part in each.values()) for each in sites]
    by_site = [statistics.fmean(each[site]["dice"] for each in sites) for site in sorted(sites[0])]
    spread = statistics.stdev(means) if len(means) > 1 else float("nan")
    cells = [statistics.fmean(means), spread, *by_site]
    return [name, *(documented.without_zero(f"{cell:.3f}") for cell in cells)]


def rows(found, seeds):
    """Yield the rows of the table."""
    for name in dict.fromkeys(name for name, _ in found):
        yield row(name, [sites_of(found[name, seed]) for seed in range(seeds)])
    if all((BESIDE, seed) in found for seed in range(seeds)):
        tests = [found[BESIDE, seed] for seed in range(seeds)]
        yield row("one model of all pictures", [test["pooled"]["sites"] for test in tests])
        yield row("each hospital alone", [test["local"] for test in tests])


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    documented.add_options(parser)
    options = parser.parse_args()
    jobs = [(name, seed) for name in options.only for seed in range(options.seeds)]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        waiting = {job: pool.submit(run, *job, options.rounds) for job in jobs}
        found = {job: future.result() for job, future in waiting.items()}
    head = ["", "mean Dice", "spread of seeds", *(stain.name for stain in STAINS)]
    documented.show("stains", head, rows(found, options.seeds), options, threads=1)


if __name__ == "__main__":
    main()
