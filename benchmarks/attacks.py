"""Rules against attacks on real data: area under the ROC curve of the model that results.

Ten hospitals train one model with each rule while some of them attack. ``pneumonia`` is
PneumoniaMNIST in Dirichlet(2) shares with a small CNN; ``heart`` the four hospitals of UCI Heart
Disease, cut into ten, with logistic regression. The attackers know all honest updates of a round.

- sign flip: the opposite of the site's own update, 5 times as long
- label flip: trained on wrong labels, sent as it is
- Gaussian: noise, 10 times as long as the mean honest update
- replacement: trained on wrong labels, times the number of sites over that of attackers, so that a
  plain mean becomes the attackers' model (Bagdasaryan et al. 2020, arXiv:1807.00459)
- ALIE: the honest mean less so many standard deviations as go unnoticed (Baruch et al. 2019,
  arXiv:1902.06156)
- IPM: the honest mean times -epsilon (Xie et al. 2019, arXiv:1903.03936), for 0.5 and for 10
- NaN: not a number
- false counts: sign flip, and 10^9 examples

``FEDMED_DATA=... python benchmarks/attacks.py [--data pneumonia heart] [--seeds 2] [--workers 2]``
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from fedmed_flower import InputError, run_local, strategies
from fedmed_flower.data.partition import dirichlet_shares, split_by_shares
from fedmed_flower.data.sources import load_dataset, load_heart_disease

SITES = 10
Table = tuple[Tensor, Tensor]
Arrays = dict[str, np.ndarray]

RULES: dict[str, Callable[[int], strategies.FedAvg]] = {
    "FedAvg": lambda f: strategies.FedAvg(fraction_evaluate=0.0),
    "FedMedian": lambda f: strategies.FedMedian(fraction_evaluate=0.0, num_malicious_nodes=f),
    "FedTrimmedAvg": lambda f: strategies.FedTrimmedAvg(
        fraction_evaluate=0.0, num_malicious_nodes=f, beta=(f + 0.5) / SITES
    ),
    "MultiKrum": lambda f: strategies.MultiKrum(
        fraction_evaluate=0.0, num_malicious_nodes=f, num_nodes_to_select=6
    ),
    "Krum": lambda f: strategies.Krum(fraction_evaluate=0.0, num_malicious_nodes=f),
    "Bulyan": lambda f: strategies.Bulyan(fraction_evaluate=0.0, num_malicious_nodes=f),
    "GeometricMedian": lambda f: strategies.GeometricMedian(
        fraction_evaluate=0.0, num_malicious_nodes=f
    ),
    "CenteredClipping": lambda f: strategies.CenteredClipping(
        fraction_evaluate=0.0, num_malicious_nodes=f
    ),
    "nearest + FedMedian": lambda f: strategies.FedMedian(
        fraction_evaluate=0.0, num_malicious_nodes=max(f, 1), mixing="nearest"
    ),
    "nearest + FedTrimmedAvg": lambda f: strategies.FedTrimmedAvg(
        fraction_evaluate=0.0, num_malicious_nodes=max(f, 1), beta=(max(f, 1) + 0.5) / SITES,
        mixing="nearest",
    ),
    "bucketing + Geometric": lambda f: strategies.GeometricMedian(
        fraction_evaluate=0.0, num_malicious_nodes=f, mixing="bucketing"
    ),
}  # fmt: skip
ATTACKS = (
    "sign flip", "label flip", "Gaussian", "replacement", "ALIE", "IPM 0.5", "IPM 10", "NaN",
    "false counts",
)  # fmt: skip
ROUNDS = {"pneumonia": 20, "heart": 30}


@cache
def pneumonia(seed: int) -> tuple[list[Table], Table]:
    """Return the training images of each site and all test images."""
    data = load_dataset("pneumoniamnist")
    shares = dirichlet_shares(2, SITES, 2.0, seed)
    parts = split_by_shares(data.labels["train"], shares, seed, min_patients=20)

    def table(split: str, rows: Any) -> Table:
        images = torch.from_numpy(data.images[split][rows].astype(np.float32))[:, None] / 255
        return (images - 0.57) / 0.17, torch.from_numpy(data.labels[split][rows]).float()

    return [table("train", rows) for rows in parts], table("test", slice(None))


@cache
def heart(seed: int) -> tuple[list[Table], Table]:
    """Return the training rows of each site and all test rows; a third of each hospital's."""
    sites: list[Table] = []
    tests: list[Table] = []
    for hospital, pieces in (("cleveland", 4), ("hungarian", 3), ("switzerland", 1), ("va", 2)):
        table = load_heart_disease()[hospital]
        features = np.delete(table.features, [10, 11, 12], axis=1)
        whole = ~np.isnan(features).any(axis=1)
        features, target = features[whole], table.target[whole]
        hot = [features[:, column] == level for column in (2, 6) for level in levels(column)]
        features = np.column_stack([np.delete(features, [2, 6], axis=1), *hot])
        order = np.random.default_rng(seed).permutation(len(target))
        test, train = np.split(order, [len(order) // 3])
        mean, spread = features[train].mean(axis=0), features[train].std(axis=0)
        scaled = (features - mean) / np.where(spread > 0, spread, 1)

        def rows(which: Any, scaled: Any = scaled, target: Any = target) -> Table:
            return torch.from_numpy(scaled[which]).float(), torch.from_numpy(target[which]).float()

        sites += [rows(part) for part in np.array_split(train, pieces)]
        tests.append(rows(test))
    return sites, (torch.cat([x for x, _ in tests]), torch.cat([y for _, y in tests]))


@cache
def levels(column: int) -> list[float]:
    """Return the values of a categorical column over all hospitals, but for the first."""
    values = np.concatenate([t.features[:, column] for t in load_heart_disease().values()])
    return sorted(set(values[~np.isnan(values)]))[1:]


def build(name: str) -> nn.Module:
    """Return the network of a data set."""
    if name == "heart":
        return nn.Sequential(nn.LazyLinear(1))
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(400, 32), nn.ReLU(), nn.Linear(32, 1),
    )  # fmt: skip


def initial(name: str, seed: int) -> nn.Module:
    """Return the network with the weights that a run begins with."""
    torch.manual_seed(seed)
    model = build(name)
    model(DATA[name](seed)[1][0][:1])
    return model


DATA = {"pneumonia": pneumonia, "heart": heart}


def train(message: Message, context: Context) -> Message:
    """Train one site for an epoch; with wrong labels where it is told so."""
    config = context.run_config
    name, seed = str(config["name"]), int(config["seed"])
    index = int(context.node_config["partition-id"])
    images, labels = DATA[name](seed)[0][index]
    if config["flip"] and index in attackers(seed, int(config["malicious"])):
        labels = 1 - labels
    model = initial(name, seed)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    torch.manual_seed(1000 * seed + 100 * message.content["config"]["server-round"] + index)
    rate, size = (0.05, 32) if name == "pneumonia" else (0.1, 16)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    for rows in torch.randperm(len(labels)).split(size):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(
            model(images[rows])[:, 0], labels[rows]
        )
        loss.backward()
        optimizer.step()
    arrays = ArrayRecord(model.state_dict())
    metrics = MetricRecord({"num-examples": len(labels), "loss": loss.item()})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def attackers(seed: int, count: int) -> set[int]:
    """Return which sites attack."""
    return set(np.random.default_rng(seed).permutation(SITES)[:count].tolist())


class Adversary:
    """Passes messages on, and puts the attackers' own updates in place of what they send."""

    def __init__(self, grid: Grid, attack: str, malicious: set[int], seed: int) -> None:
        self._grid, self._attack = grid, attack
        nodes = sorted(grid.get_node_ids())
        self._malicious = {nodes[index] for index in malicious}
        self._rng = np.random.default_rng(seed)
        self._replies: dict[str, Message] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let all sites reply, and change what the attackers send: they know the others."""
        messages = list(messages)
        model = read(messages[0].content["arrays"])
        replies = list(self._grid.send_and_receive(messages))
        bad = [reply for reply in replies if reply.metadata.src_node_id in self._malicious]
        good = [read(reply.content["arrays"]) for reply in replies if reply not in bad]
        for reply in bad:
            own = read(reply.content["arrays"])
            sent = forge(self._attack, model, own, good, len(bad), self._rng)
            reply.content["arrays"] = ArrayRecord(
                {key: Array(value.astype(np.float32)) for key, value in sent.items()}
            )
            if self._attack == "false counts":
                reply.content["metrics"]["num-examples"] = 10**9
        self._replies = {reply.metadata.reply_to_message_id: reply for reply in replies}
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies."""
        return [self._replies.pop(key) for key in message_ids if key in self._replies]


def read(record: ArrayRecord) -> Arrays:
    """Return a record's arrays in double precision."""
    return {key: array.numpy().astype(np.float64) for key, array in record.items()}


def forge(
    attack: str, model: Arrays, own: Arrays, good: list[Arrays], bad: int, rng: Any
) -> Arrays:
    """Return what an attacker sends."""
    mean = {key: np.mean([other[key] for other in good], axis=0) for key in model}
    move = {key: mean[key] - model[key] for key in model}
    if attack in ("sign flip", "false counts"):
        return {key: model[key] - 5 * (own[key] - model[key]) for key in model}
    if attack == "Gaussian":
        noise = {key: rng.standard_normal(model[key].shape) for key in model}
        scale = 10 * length(move) / length(noise)
        return {key: model[key] + scale * noise[key] for key in model}
    if attack == "replacement":
        return {key: model[key] + SITES / bad * (own[key] - model[key]) for key in model}
    if attack == "ALIE":
        honest = len(good)
        needed = SITES // 2 + 1 - bad
        z = statistics.NormalDist().inv_cdf((honest - needed) / honest)
        spread = {key: np.std([other[key] for other in good], axis=0) for key in model}
        return {key: mean[key] - z * spread[key] for key in model}
    if attack.startswith("IPM"):
        return {key: model[key] - float(attack[4:]) * move[key] for key in model}
    if attack == "NaN":
        return {key: np.full_like(model[key], np.nan) for key in model}
    return own


def length(arrays: Arrays) -> float:
    """Return the Euclidean norm over all arrays."""
    return math.sqrt(sum(float((values**2).sum()) for values in arrays.values()))


def run(job: tuple[str, str, str, int, int]) -> float | None:
    """Train one model and return its AUC on the test data; None where the rule refuses."""
    name, rule, attack, malicious, seed = job
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    client, server, outcome = ClientApp(), ServerApp(), []
    client.train()(train)
    flip = attack in ("label flip", "replacement")
    config = {"name": name, "seed": seed, "malicious": malicious, "flip": flip}

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        if malicious:
            grid = Adversary(grid, attack, attackers(seed, malicious), seed)
        start = ArrayRecord(initial(name, seed).state_dict())
        strategy = RULES[rule](malicious)
        outcome.append(strategy.start(grid, start, num_rounds=ROUNDS[name]).arrays)

    try:
        run_local(server, client, SITES, run_config=config)
    except InputError as error:
        if "replies a round" in str(error):
            return None
        raise
    model = initial(name, seed)
    model.load_state_dict(outcome[0].to_torch_state_dict())
    images, labels = DATA[name](seed)[1]
    with torch.no_grad():
        scores = torch.nan_to_num(model(images)[:, 0])
    return float(roc_auc_score(labels, scores))


def rows(options: argparse.Namespace) -> Iterator[list[str]]:
    """Run all combinations and yield a row for each data set, number of attackers and rule."""
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for name, malicious in itertools.product(options.data, options.malicious):
            cases = [("none", 0), *((attack, malicious) for attack in ATTACKS)]
            jobs = [
                (name, rule, attack, count, seed)
                for rule in options.rules
                for attack, count in cases
                for seed in range(options.seeds)
            ]
            aucs = pool.imap(run, jobs)
            for rule in options.rules:
                cells = [name, f"{malicious} of {SITES}", rule]
                for _ in cases:
                    values = [next(aucs) for _ in range(options.seeds)]
                    known = [value for value in values if value is not None]
                    mean = f"{statistics.mean(known):.3f}" if known else "-"
                    cells.append(documented.without_zero(mean))
                yield cells


def main() -> None:
    """Run all combinations and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["pneumonia", "heart"], choices=list(DATA))
    parser.add_argument("--malicious", nargs="+", type=int, default=[2, 4], help="of ten sites")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--workers", type=int, default=2)
    documented.add_options(parser)
    options = parser.parse_args()
    if not os.environ.get("FEDMED_DATA"):
        sys.exit("FEDMED_DATA must name the folder with the real data sets")
    print(f"AUC on all test patients, mean of {options.seeds} seeds; ", end="")
    print("-: too few sites for the rule\n")
    began = time.time()
    head = ("data", "attackers", "rule", "none", *ATTACKS)
    documented.show("attacks", head, rows(options), options)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
