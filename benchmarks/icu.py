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
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import documented
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
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name) / "run")
        config = expand(project.declared)
        config |= {"run-dir": str(folder.path), "fold": fold, "seed": seed}
        config |= {"num-server-rounds": rounds}
        run_local(server, client, SITES, run_config=config)
        summary = json.loads((folder / SUMMARY).path.read_text())
    return summary["test"]["federated"], pooled(config)


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
    return float(roc_auc_score(died, told["risk"])), len(told), int(died.sum())


def rows(seed, rounds):
    """Yield a row for each quarter, their mean, and APACHE's own."""
    found = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, fold, seed, rounds) for fold in range(4)]
        for fold, future in enumerate(futures):
            test, (central, stays, died) = future.result()
            found.append((test["auc"], central))
            yield [f"quarter {fold + 1}", str(stays), str(died), *map(auc, found[-1]), ""]
    yield ["mean of the quarters", "", "", *map(auc, np.mean(found, axis=0)), ""]
    value, stays, died = apache()
    yield ["stays with APACHE's prediction", f"{stays:,}", str(died), "", "", auc(value)]


def auc(value):
    return documented.without_zero(f"{value:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=40)
    documented.add_options(parser)
    options = parser.parse_args()
    head = ["AUC on hospitals left out", "stays", "died"]
    head += ["federated", "logistic regression, pooled", "APACHE IVa"]
    began = time.perf_counter()
    documented.show("icu", head, rows(options.seed, options.rounds), options, threads=1)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
