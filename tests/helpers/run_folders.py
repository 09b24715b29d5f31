"""Run folders of a classifier, from made-up rows, as a run would have written them."""

import json

import numpy as np
from scipy.special import expit

from fedmed_flower.metrics.classification import noised_counts, noised_metrics
from fedmed_flower.metrics.counts import COUNTS_FILE, counted
from fedmed_flower.metrics.names import NOISED, is_pooled_only
from fedmed_flower.metrics.outcomes import outcome_metrics
from fedmed_flower.metrics.pooling import pool

SITES = {"hospital-1": 150, "hospital-2": 90, "hospital-10": 60}


def rows_of(size, classes=2, seed=0, shift=0.5):
    """True classes, and log odds (two classes) or logits that tell something of them."""
    generator = np.random.default_rng(seed)
    if classes == 2:
        truth = generator.normal(shift, 1.5, size)
        return generator.binomial(1, expit(truth)), truth + generator.normal(0, 0.6, size)
    labels = generator.integers(0, classes, size)
    return labels, generator.normal(size=(size, classes)) + 2 * np.eye(classes)[labels]


def write_run(folder, classes=2, noise=None, coarse=False, sizes=SITES, seed=0, **changed):
    """Write ``summary.json``, ``counts.json``, ``metrics.csv`` and the splits; return the folder.

    `changed` replaces entries of the summary; one that is None is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    task = "binary" if classes == 2 else "multi-class"
    records = {}
    for number, (site, size) in enumerate(sizes.items()):
        labels, outputs = rows_of(size, classes, seed + number)
        if noise is None:
            records[site] = outcome_metrics(task, labels, outputs, coarse=coarse)
        else:
            counts = noised_counts(labels, outputs.reshape(size, -1), range(size), noise)
            records[site] = noised_metrics(counts) | {NOISED: counts}
    shown = {
        site: {key: value for key, value in record.items() if not is_pooled_only(key)}
        for site, record in records.items()
    }
    federated = pool([*records.values()])
    summary = {
        "status": "finished",
        "message": "",
        "app": "chest",
        "engine": "local",
        "strategy": "FedAvg",
        "data": "made up",
        "generated": False,
        "rounds": 2,
        "rounds-planned": 2,
        "seed": 7,
        "started": "2025-11-04T09:12:44+00:00",
        "seconds": 3725.2,
        "sites": {site: {"train": 1000, "val": 90, "test": size} for site, size in sizes.items()},
        "test": {"federated": federated, "sites": shown},
        "failures": [],
        "model": {"network": "DenseNet", "weights": 28194, "weights-trained": 28194},
        "traffic": {
            site: {"replies": 4, "bytes-to-site": 5e6, "bytes-from-site": 2e6, "seconds": 8.0}
            for site in sizes
        },
        "versions": {"flwr": "1.41.0"},
        "config": {"learning-rate": 0.01, "seed": 7, "run-dir": "/secret/place"},
    }
    summary = {key: value for key, value in (summary | changed).items() if value is not None}
    (folder / "summary.json").write_text(json.dumps(summary))
    names = ["healthy", "sick"] if classes == 2 else [f"kind {number}" for number in range(classes)]
    content = counted(records, names).content()
    (folder / COUNTS_FILE).write_text(json.dumps(content))
    (folder / "metrics.csv").write_text(
        "round,phase,site,metric,value\n"
        "1,val,all,auc,0.7\n2,val,all,auc,0.8\n1,train,all,loss,0.6\n2,train,all,loss,0.5\n"
    )
    (folder / "splits").mkdir(exist_ok=True)
    for site, size in sizes.items():
        lines = ["patient,split", *(f"{site}-{index},test" for index in range(size))]
        (folder / "splits" / f"{site}.csv").write_text("\r\n".join(lines))
    return folder
