"""Association studies by secure sums give what plain ones give, and show no single hospital."""

import re
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from key_files import make_hospitals
from studies import World, lines_of, study
from tiny import context_of, see

from fedmed_flower.clients.app import answer
from fedmed_flower.engines.local import LocalGrid
from fedmed_flower.errors import InputError
from fedmed_flower.genomics import secure_client
from fedmed_flower.genomics.client import GenomicsClient
from fedmed_flower.runs.verdict import RunFailedError
from fedmed_flower.wire import SUMS

FOUR = (60, 90, 70, 80)
FIVE = (*FOUR, 75)
SUM = {"secure": "sum", "block-size": 64}
FIGURES = ("effect", "se", "low", "high", "statistic", "p", "q", "q_p", "i2")
EXACT = ("sites", "people", "cases", "controls", "freq", "freq_least", "freq_most", "a1", "a2")


def both(world, folder, client=None, **config):
    """Return summary and lines of a study in plain and by sums."""
    client = client or world.client()
    sites = len(world.sizes)
    plain = study(client, folder, sites=sites, **config)
    (folder / "run").rename(folder / "plain")
    return plain, study(client, folder, sites=sites, **config, **SUM)


def assert_same(one, other, names, exact=EXACT):
    for name in names:
        for column in FIGURES:
            expected, found = float(one[name][column]), float(other[name][column])
            np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-9, err_msg=column)
        assert float(other[name]["p"]) == pytest.approx(float(one[name]["p"]), abs=1e-9)
        assert {c: other[name][c] for c in exact} == {c: one[name][c] for c in exact}


@pytest.mark.parametrize("test", ["trend", "allelic", "logistic", "linear"])
def test_results_are_those_of_the_plain_study(tmp_path, test):
    trait = "continuous" if test == "linear" else "binary"
    world = World(tmp_path, trait=trait, sizes=FOUR)
    # A1 is the other allele at one hospital; another has it under another id.
    world.pairs[1][3] = world.pairs[1][3][::-1]
    world.genotypes[1][:, 3] = np.where(
        world.genotypes[1][:, 3] < 0, -127, 2 - world.genotypes[1][:, 3]
    )
    world.names[2][7] = "other"
    (_, plain), (summary, lines) = both(world, tmp_path, test=test)
    assert list(lines) == list(plain)
    assert_same(plain, lines, set(plain) - {"rs07", "other"})
    # Three of four hospitals have it; a sum needs three honest ones, and one may be no such.
    assert float(lines["rs07"]["sites"]) == 0
    note = "absent: hospital-3; fewer hospitals tell it than a sum needs: 3 hospitals"
    assert lines["rs07"]["note"] == f"{note}; no hospital counts"
    assert summary["association"]["people"] == sum(FOUR)
    assert {site["people"] for site in summary["sites"].values()} == {None}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What the server learned" in page
    assert "300 people" in page


def test_a_variant_that_one_of_five_withholds_is_tested_at_the_other_four(tmp_path):
    world = World(tmp_path, sizes=FIVE)
    for site, variants in ((1, (5, 6)), (3, (6,))):
        world.genotypes[site][:, variants] = 0
        world.genotypes[site][:2, variants] = 1
    (_, plain), (_, lines) = both(world, tmp_path)
    assert_same(plain, lines, set(plain) - {"rs05", "rs06"})
    # Where one withholds, anybody who is not counted may be its patient: bounds are wider.
    assert_same(plain, lines, {"rs05"}, EXACT[:4])
    assert float(lines["rs05"]["freq_least"]) <= float(plain["rs05"]["freq_least"])
    assert float(lines["rs05"]["freq_most"]) >= float(plain["rs05"]["freq_most"])
    assert lines["rs05"]["sites"] == "4"
    assert lines["rs05"]["note"] == "withheld: 1 hospital"
    assert plain["rs06"]["sites"] == "3"
    assert lines["rs06"]["sites"] == lines["rs06"]["people"] == "0"
    assert np.isnan(float(lines["rs06"]["p"]))


def test_units_of_trait_and_covariates_do_not_matter(tmp_path):
    world = World(tmp_path, trait="continuous", sizes=FOUR)
    world.phenotypes = [1e9 * values for values in world.phenotypes]
    world.ages = [1e-9 * values for values in world.ages]
    (_, plain), (_, lines) = both(world, tmp_path, test="linear")
    assert_same(plain, lines, plain)


def test_a_variant_in_which_one_person_weighs_too_much_has_no_result(tmp_path):
    world = World(tmp_path, sizes=FOUR)
    # Age tells cases from controls, so slopes grow until those in between have all the weight.
    world.ages = [age + 60 * case for age, case in zip(world.ages, world.phenotypes, strict=True)]
    with pytest.raises(RunFailedError, match="none of 40 variants has a result"):
        study(world.client(), tmp_path, sites=4, test="logistic", **SUM)
    lines = lines_of(tmp_path / "run")
    note = r"one person weighs too much: \d hospitals?; no hospital counts"
    assert all(re.fullmatch(note, line["note"]) for line in lines.values())


def test_a_hospital_that_is_lost_loses_the_sum(tmp_path, monkeypatch):
    original = secure_client.totals

    def failing(client, message):
        if client.site.name == "hospital-2":
            raise OSError("the disk is gone")
        return original(client, message)

    monkeypatch.setattr(secure_client, "totals", failing)
    world = World(tmp_path, sizes=FIVE)
    with pytest.raises(RunFailedError) as error:
        study(world.client(), tmp_path, sites=5, **SUM)
    assert str(error.value) == (
        "the secure sum of totals is lost: hospital-2 could not be added, and figures of patients "
        "are summed over all 5 hospitals or not at all; hospital-2: OSError: the disk is gone. Ask "
        "again when all of them answer, or let each of the others leave it out (`fedmed keys "
        "regroup`)"
    )


def test_no_reply_holds_a_number_of_one_hospital(tmp_path, monkeypatch):
    replies = []
    original = LocalGrid.pull_within

    def noting(self, ids, timeout):
        pulled, seconds = original(self, ids, timeout)
        replies.extend(pulled)
        return pulled, seconds

    monkeypatch.setattr(LocalGrid, "pull_within", noting)
    world = World(tmp_path, trait="continuous", sizes=FOUR)
    study(world.client(), tmp_path, sites=4, test="linear", **SUM)
    plain = {"cohort", "variants", "positions", "patients", "site", "secure", "masked"}
    assert {name for reply in replies for name in reply.content} == plain
    cohorts = [reply.content["cohort"] for reply in replies if "cohort" in reply.content]
    assert all(
        set(cohort) == {"variants", "trait", "phenotype", "covariates", "minimum"}
        for cohort in cohorts
    )
    words = [
        reply.content["masked"]["words64"].numpy() for reply in replies if "masked" in reply.content
    ]
    assert len(words) > 16
    # Bare, most words are small numbers or 0.
    for vector in words:
        assert (vector > 1 << 56).mean() > 0.9


@pytest.mark.slow
def test_real_hospitals_give_the_sums_of_simulated_ones(tmp_path):
    world = World(tmp_path)
    names = ("hospital-1", "hospital-2", "hospital-3")
    nodes = [
        config | {"secure-only": "cohort,counts,logistic"}
        for config in make_hospitals(tmp_path, names).values()
    ]

    class Real(GenomicsClient):
        @property
        def site(self):
            found = super().site
            return replace(found, index=names.index(found.name))

    client = world.client(Real)
    _, simulated = study(client, tmp_path, test="logistic", **SUM)
    (tmp_path / "run").rename(tmp_path / "simulated")
    summary, lines = study(client, tmp_path, nodes, test="logistic", **SUM)
    assert summary["failures"] == []
    for name, line in lines.items():
        assert float(line["p"]) == pytest.approx(float(simulated[name]["p"]), abs=1e-12)
        assert line["people"] == simulated[name]["people"]


def test_components_are_refused(tmp_path):
    world = World(tmp_path, sizes=FOUR)
    with pytest.raises(InputError) as error:
        study(world.client(), tmp_path, sites=4, test="logistic", components=2, **SUM)
    assert str(error.value) == (
        'secure="sum" excludes components, for which the server needs the loadings of each step '
        "and hospitals keep scores between messages: give covariates that each hospital has "
        f"computed, or leave components out{see('secure')}"
    )


@pytest.mark.parametrize("query", ["people", "totals", "products", "steps", "spreads"])
def test_a_question_of_a_sum_is_not_answered_in_plain(tmp_path, query):
    client = World(tmp_path, sizes=FOUR).client()
    content = RecordDict({"config": ConfigRecord(), SUMS: ArrayRecord()})
    message = Message(content, 1, f"query.{query}")
    reply = answer(client, GenomicsClient.queries[query], message, context_of(0, 4))
    what = "people" if query == "people" else "variants"
    assert f"{what} are counted in a secure sum alone" in reply.error.reason
