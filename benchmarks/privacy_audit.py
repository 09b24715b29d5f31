"""What private training gives away at least, measured on one training run with canaries.

Steinke, Nasr, Jagielski: Privacy Auditing with One (1) Training Run, NeurIPS 2023,
https://arxiv.org/abs/2305.08846. A fair secret coin decides for each of m canaries whether it is
among the patients. Training is the package's own (`train_privately`), its result white-box: who
guesses sees all weights before and after. The k canaries with the highest scores are guessed to be
in, the k with the lowest to be out; v of these r = 2k guesses are right. If training is
(epsilon, delta)-private, then (theorem 5.2 there)

    P[at least v right] <= P[B >= v] + 2 m delta max_i P[v - i <= B < v] / i,   i = 1, 2, ...

with B binomial of r trials that succeed with probability exp(epsilon) / (1 + exp(epsilon)). The
largest epsilon for which the right side is below 5 % is refuted with 95 % confidence: the lower
bound. Three numbers k are tried, each at a third of the 5 %.

A canary is one bright pixel of its own, where the chest X-rays (generated) are black, so that its
clipped gradient for logistic regression is one weight of its own; the score is how far this weight
has moved. 8 of epsilon need 16,000 canaries: even without one wrong guess, m of them refute no more
than about log(m / 3).

``noise``: as claimed; the bound must be below the claim. ``no noise``: clipping alone; the bound
must be above. ``noise / 4`` and ``one round told`` are mistakes, which the audit must find: to draw
a quarter of the noise that is claimed, and to train for 15 rounds and claim the epsilon of one.
The bound must be above the claim.

``python benchmarks/privacy_audit.py [--claims 1 4 8] [--steps 8] [--delta 1e-6] [--seed 0]``
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")

import documented
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from fedmed_flower.clients.training import train_privately
from fedmed_flower.data.phantoms import chest_xrays
from fedmed_flower.privacy.accounting import Release, epsilon_of, noise_for
from fedmed_flower.privacy.gradients import PROBE
from fedmed_flower.privacy.patient import Mechanism
from fedmed_flower.settings.privacy import PrivacySettings

# Of the canaries are guessed: with noise the surest, without it as many as are in for certain.
SHARES = (0.05, 0.25, 0.95)
CONFIDENCE = 0.95
XRAYS, SIDE = 200, 28
BRIGHTNESS = 100.0
ROUNDS = 15
CASES = ("noise", "noise / 4", "no noise", "one round told")
# Needed to refute a claim: about three times exp(epsilon), and more where there is noise.
FEW, MANY, UP_TO = 4000, 16_000, 5.0


def p_value(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Return how likely so many right guesses are at most, if training is private.

    Parameters
    ----------
    right : int
        At least 0, at most `guesses`.
    guesses : int
        At most `canaries`.
    canaries : int
        Each in or out with probability 1/2.
    epsilon, delta : float
        At least 0.
    """
    chance = 1 / (1 + math.exp(-epsilon))
    tail = stats.binom.sf(right - 1, guesses, chance)
    back = np.arange(1, right + 1)
    below = np.cumsum(stats.binom.pmf(right - back, guesses, chance))
    slack = 2 * canaries * delta * max(below / back, default=0.0)
    return float(min(1.0, tail + slack))


def lower_bound(
    right: int, guesses: int, canaries: int, delta: float, confidence: float = CONFIDENCE
) -> float:
    """Return the largest epsilon that right guesses refute; 0 where they refute none.

    Parameters are those of `p_value`, and how sure the bound shall be: above 0, below 1.
    """

    def refuted(epsilon: float) -> bool:
        return p_value(right, guesses, canaries, epsilon, delta) < 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def bound_of_scores(scores: NDArray[np.float64], taken: NDArray[np.bool_], delta: float) -> float:
    """Return the lower bound on epsilon that scores refute.

    Parameters
    ----------
    scores : ndarray of shape (canaries,)
        Higher for those that seem to have been in.
    taken : ndarray of shape (canaries,)
        Which ones were in.
    delta : float
    """
    order = np.argsort(scores)
    bounds = []
    for share in SHARES:
        count = max(1, int(share * len(scores)) // 2)
        right = int((~taken[order[:count]]).sum() + taken[order[-count:]].sum())
        sure = 1 - (1 - CONFIDENCE) / len(SHARES)
        bounds.append(lower_bound(right, 2 * count, len(scores), delta, sure))
    return max(bounds)


def audit(canaries: int, release: Release, steps: int, delta: float, seed: int) -> float:
    """Train once with about half of the canaries and return the lower bound on epsilon.

    Parameters
    ----------
    canaries : int
    release : Release
        Of each step.
    steps : int
    delta : float
    seed : int
        Of the coins, the weights and the X-rays; nothing seeds the noise.
    """
    width = math.ceil(math.sqrt(canaries + SIDE**2))
    frame = np.ones((width, width), bool)
    frame[:SIDE, :SIDE] = False
    pixels = np.flatnonzero(frame)[:canaries]
    taken = np.random.default_rng(seed).random(canaries) < 0.5
    bright = pixels[taken]
    splits = chest_xrays(XRAYS, 0, 0, seed, SIDE)
    xrays, findings = torch.from_numpy(splits.images["train"] / 255), splits.labels["train"]

    def batch_of(places: Sequence[int]) -> dict[str, Tensor]:
        batch = {"image": torch.zeros(len(places), width, width), "label": torch.ones(len(places))}
        for row, place in enumerate(places):
            if place < XRAYS:
                batch["image"][row, :SIDE, :SIDE] = xrays[place]
                batch["label"][row] = float(findings[place])
            else:
                batch["image"][row].view(-1)[bright[place - XRAYS]] = BRIGHTNESS
        return batch

    patients = range(XRAYS + len(bright))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(width**2, 1))
    before = model[1].weight.detach().double().clone()
    settings = PrivacySettings(privacy="patient", delta=delta, micro_batch_size=256)
    train_privately(
        model,
        batch_of,
        patients,
        lambda run, batch: nn.functional.binary_cross_entropy_with_logits(
            run(batch["image"])[:, 0], batch["label"]
        ),
        torch.optim.SGD(model.parameters(), 0.1),
        Mechanism(release, steps, len(patients), settings),
        batch_of(range(PROBE)),
    )
    moved = (model[1].weight.detach().double() - before)[0].numpy()
    return bound_of_scores(moved[pixels], taken, delta)


def audits(options: argparse.Namespace, wrong: list[float]) -> Iterator[list[str]]:
    """Yield a row for each claim and sampling rate; add to `wrong` what refutes it, or fails to."""
    for target in options.claims:
        canaries = FEW if target < UP_TO else MANY
        for rate, steps in ((1.0, options.steps), (0.25, 6 * options.steps)):
            noise = noise_for(target, options.delta, rate, steps)
            claim = epsilon_of({Release(rate, noise): steps}, options.delta)
            cases = {"noise": (noise, steps), "no noise": (0.0, steps)}
            if target < UP_TO:
                cases["noise / 4"] = (noise / 4, steps)
            # With less than 2 of epsilon, 15 rounds are hard to tell from one.
            if 2 <= target < UP_TO:
                cases["one round told"] = (noise, ROUNDS * steps)
            cells = [f"{claim:.2f}", f"{rate:g}", str(steps), f"{noise:.2f}", f"{canaries:,}"]
            for name in CASES:
                if name not in cases:
                    cells.append("")
                    continue
                used, count = cases[name]
                release = Release(rate, used)
                bound = audit(canaries, release, count, options.delta, options.seed)
                bad = (bound > claim) != (name != "noise")
                if bad:
                    wrong.append(bound)
                cells.append(f"{bound:.2f}{': WRONG' if bad else ''}")
            yield cells


def main() -> None:
    """Audit each claim and print a table; exit with 1 where a bound is on the wrong side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--claims", nargs="+", type=float, default=[1.0, 4.0, 8.0])
    parser.add_argument("--steps", type=int, default=8, help="of a full batch; else 6 times these")
    parser.add_argument("--delta", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=0, help="of all but the noise")
    documented.add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"delta {options.delta:g}, {CONFIDENCE:.0%} confidence, {XRAYS} other patients\n")
    began = time.time()
    wrong: list[float] = []
    head = ["epsilon claimed", "sampling rate", "steps", "noise multiplier", "canaries"]
    head += [f"refuted: {name}" for name in CASES]
    documented.show("privacy_audit", head, audits(options, wrong), options)
    print(f"{time.time() - began:.0f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
