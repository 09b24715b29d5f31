"""In a run by secure sums no figure of a single hospital is in any message, reply or file."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ArrayRecord
from tables import SCHEMA, TinyTable, patients, run_tables

from fedmed_flower import SiteData
from fedmed_flower.data.site import SPLITS
from fedmed_flower.secure.encoding import SecureError, decoded

SITES = 4
# No two splits have the same number of rows, and no other number is likely to be one of these.
ROWS = {split: [base + 2 * site for site in range(SITES)] for split, base in
        (("train", 211), ("val", 311), ("test", 411))}  # fmt: skip
RUN = {"preparation": "federated", "learning_rate": 0.01, "num_server_rounds": 2}


class Ward(TinyTable):
    schema = replace(SCHEMA, categories={"sex": ("f", "m"), "ward": ("a", "b", "c")})
    seen = ()

    def load_data(self, site):
        splits = {
            split: patients(ROWS[split][site.index], (site.index, number), f"{site.name}-{split}")
            for number, split in enumerate(SPLITS)
        }
        return SiteData(**splits, source="made up", generated=True)


def recording(seen):
    """Return a client that writes down all messages and replies, by the hospital's index."""
    good = Ward.client_app()

    class Recording(Ward):
        @staticmethod
        def client_app():
            def handle(message, context):
                reply = good(message, context)
                site = context.node_config["partition-id"]
                kind = message.metadata.message_type
                seen.append((site, kind, message.content, reply.content))
                return reply

            return handle

    return Recording


def numbers_in(value):
    """Yield all numbers in a value, also in what its bytes and texts hold."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, bytes):
        try:
            yield from numbers_in(decoded(value))
        except SecureError:
            return
    elif isinstance(value, str):
        for word in value.replace(",", " ").replace(":", " ").split():
            try:
                yield float(word)
            except ValueError:
                continue
    elif isinstance(value, dict):
        for each in (*value.keys(), *value.values()):
            yield from numbers_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from numbers_in(each)


def figures(content):
    """Return all numbers of a message or a reply."""
    found = []
    for record in content.values():
        if isinstance(record, ArrayRecord):
            for array in record.values():
                found += array.numpy().astype(np.float64).ravel().tolist()
        else:
            # How long it took is no figure of the patients.
            found += numbers_in({k: v for k, v in record.items() if k != "seconds"})
    return np.array(found)


def telling(seen):
    """Return the figures that only one hospital has sent."""
    by_site = [
        np.concatenate([figures(reply) for site, _, _, reply in seen if site == index])
        for index in range(SITES)
    ]
    own = []
    for index, mine in enumerate(by_site):
        others = np.concatenate([each for number, each in enumerate(by_site) if number != index])
        own.append(np.array([v for v in np.unique(mine) if math.isfinite(v) and v not in others]))
    # Small whole numbers, such as cells of a histogram, are many things.
    return [own_of[(own_of % 1 != 0) | (np.abs(own_of) > 200)] for own_of in own]


def found_in(values, figures):
    """Return which figures are among values, but for rounding."""
    known = np.sort(values[np.isfinite(values)])
    if not len(known):
        return []
    place = np.clip(np.searchsorted(known, figures), 1, max(1, len(known) - 1))
    near = [known[np.clip(place + step, 0, len(known) - 1)] for step in (-1, 0)]
    gap = np.minimum(*(np.abs(each - figures) for each in near))
    return figures[gap <= 1e-9 * np.abs(figures)].tolist()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return what travels in a plain run."""
    seen = []
    run_tables(tmp_path_factory.mktemp("plain") / "run", recording(seen), SITES, **RUN)
    return seen


@pytest.fixture(scope="module")
def summed(tmp_path_factory):
    """Return what travels in a run by secure sums, and its folder."""
    seen = []
    folder = tmp_path_factory.mktemp("summed") / "run"
    run_tables(folder, recording(seen), SITES, secure="sum", **RUN)
    return seen, folder


def test_the_figures_of_single_hospitals_are_found_in_a_plain_run(plain):
    for index, own in enumerate(telling(plain)):
        assert {float(ROWS[split][index]) for split in SPLITS} <= {*own}
        # Moments, two models, and metrics of three evaluations.
        assert len(own) > 50
        replies = [figures(reply) for site, _, _, reply in plain if site == index]
        assert len(found_in(np.concatenate(replies), own)) == len(own)


def test_no_message_and_no_reply_of_a_secure_run_holds_one(plain, summed):
    seen, _ = summed
    kinds = {kind for _, kind, _, _ in seen}
    exchanges = {"query.describe", "query.hello", "query.contribution", "query.count", "train"}
    assert exchanges | {"query.unmask"} <= kinds
    for own in telling(plain):
        for site, kind, message, reply in seen:
            assert found_in(figures(message), own) == [], (site, kind)
            assert found_in(figures(reply), own) == [], (site, kind)


def test_no_masked_vector_is_near_to_what_it_masks(plain, summed):
    seen, _ = summed
    counts = np.array([float(rows[index]) for rows in ROWS.values() for index in range(SITES)])
    vectors = [
        (kind, array.numpy())
        for _, kind, _, reply in seen
        for array in reply.array_records.get("masked", ArrayRecord()).values()
    ]
    large = np.concatenate([words for _, words in vectors if words.dtype == np.uint64])
    # A vector in plain would have small numbers, or small ones below zero: 2^64 less a few.
    assert len(large) > 200
    assert np.minimum(large, ~large).min() > 2**36
    assert not np.isin(counts, large.astype(np.float64)).any()


def test_no_file_of_the_run_holds_one(plain, summed):
    _, folder = summed
    summary = json.loads((folder / "summary.json").read_text())
    # How many bytes travelled, and when, is no figure of the patients.
    besides = ("traffic", "saved", "started", "seconds", "config")
    shown = {key: value for key, value in summary.items() if key not in besides}
    lines = (folder / "log.txt").read_text().splitlines()
    texts = [line.split(maxsplit=2)[2] for line in lines]
    values = np.array([*numbers_in(shown), *numbers_in(texts)])
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    values = np.concatenate([values, [*numbers_in(rows)]])
    for own in telling(plain):
        assert found_in(values, own) == []
    hospitals = {f"hospital-{number + 1}" for number in range(SITES)}
    assert hospitals.isdisjoint({cell for row in rows for cell in row})
