"""Who dies in intensive care, in hospitals that took no part in training: eICU demo, 186 hospitals.

The example app: federated averaging over three quarters of the hospitals, 10 to 20 stays each; the
model is tested on the stays of the other quarter. Each quarter is left out once. Beside it, on the
same features, a logistic regression of scikit-learn on the training stays of all hospitals pooled,
and, on the stays for which it ships with the data, the prediction of APACHE IVa.

``FEDMED_DATA=... python benchmarks/icu.py [--seed 0] [--rounds 40]``
"""

import argparse
import json
import logging
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from fedmed_flower.data.preparation import Preparation
from fedmed_flower.data.site import Site
from fedmed_flower.engines.local import run_local
from fedmed_flower.engines.project import load_project
from fedmed_flower.server.run_folder import SUMMARY, RunFolder
from fedmed_flower.settings.text import expand

APP = Path(__file__).resolve().parent.parent / "examples" / "icu"
SITES = 186


def run(fold, seed, rounds):
    """Leave a quarter of the hospitals out; return what the run and pooled training reach there."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    project = load_project(APP)
    server = project.server_app()
    client = project.client_app()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name) / "run")
        config = expand(project.declared)
        config |= {"run-dir": str(folder.path), "fold": fold, "seed": seed}
        config |= {"num-server-rounds": rounds}
        run_local(server, client, SITES, run_config=config)
        seconds = time.perf_counter() - began
        summary = json.loads((folder / SUMMARY).path.read_text())
    test = summary["test"]["federated"]
    return test, seconds, pooled(config), summary["test"]["sites"]


def pooled(config):
    """Return the AUC of a logistic regression on the same rows, without hospitals."""
    from client_app import IntensiveCareUnit
    from flwr.app import Context, RecordDict

    train, test = [], []
    for index in range(SITES):
        context = Context(0, index, {}, RecordDict(), config)
        site = Site(f"hospital-{index + 1}", index, SITES, simulated=True)
        data = IntensiveCareUnit(context).load_data(site)
        train += data.train
        test += data.test
    prepared = Preparation.of_rows(IntensiveCareUnit.schema, train)
    labels = [[row["died"] for row in rows] for rows in (train, test)]
    model = LogisticRegression(C=0.03, max_iter=5000).fit(prepared.transform(train), labels[0])
    scores = model.decision_function(prepared.transform(test))
    return float(roc_auc_score(labels[1], scores)), len(test), sum(labels[1])


def apache():
    """Return the AUC of the prediction that ships with the data, and on how many stays."""
    home = Path(os.environ["FEDMED_DATA"]) / "eicu-demo"
    told = pd.read_csv(home / "apachepatientresult.csv.gz")
    told = told[told["apacheversion"] == "IVa"]
    told["risk"] = pd.to_numeric(told["predictedhospitalmortality"])
    told = told[told["risk"] >= 0]
    died = told["actualhospitalmortality"] == "EXPIRED"
    return roc_auc_score(died, told["risk"]), len(told)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print(f"{'left out':<10}{'stays':>7}{'died':>6}{'federated':>11}{'pooled':>8}{'seconds':>9}")
    found = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, fold, options.seed, options.rounds) for fold in range(4)]
        for fold, future in enumerate(futures):
            test, seconds, (central, stays, died), _ = future.result()
            found.append((test["auc"], central))
            print(
                f"quarter {fold + 1:<2}{stays:>7}{died:>6}{test['auc']:>11.3f}{central:>8.3f}"
                f"{seconds:>9.0f}",
                flush=True,
            )
    federated, central = np.mean(found, axis=0)
    print(f"{'mean':<10}{'':>13}{federated:>11.3f}{central:>8.3f}")
    auc, count = apache()
    print(f"APACHE IVa, as it ships with the data, on {count} stays: {auc:.3f}")


if __name__ == "__main__":
    main()
