"""An association study from its start to its page, over hospitals in this process."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
from bed_reader import to_bed
from flwr.app import Array, ArrayRecord
from scipy import stats
from statsmodels.stats.contingency_tables import StratifiedTable
from statsmodels.stats.meta_analysis import combine_effects
from studies import VARIANTS, World, lines_of, study
from tiny import ask, context_of, says, says_of_setting, see
from typer.testing import CliRunner

from fedmed_flower import SiteData
from fedmed_flower.arrays.views import view
from fedmed_flower.cli.main import app
from fedmed_flower.errors import InputError
from fedmed_flower.genomics import rounds
from fedmed_flower.genomics.client import GenomicsClient
from fedmed_flower.genomics.page import COLUMNS, write_page
from fedmed_flower.runs.verdict import RunFailedError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_a_variant_with_the_name_of_a_formula_is_a_text_in_the_table(world, tmp_path):
    for names in world.names:
        names[20] = "=1+1"
    summary, lines = study(world.client(), tmp_path)
    assert float(lines["'=1+1"]["statistic"]) > 0
    assert summary["tables"][0]["rows"][0][0] == "=1+1"


def test_allelic_and_trend_tests_are_stratified_by_hospital(world, tmp_path):
    _, allelic = study(world.client(), tmp_path, test="allelic")
    (tmp_path / "run").rename(tmp_path / "first")
    summary, trend = study(world.client(), tmp_path)
    assert list(trend) == list(allelic) == world.names[0]
    for variant, name in enumerate(trend):
        line = allelic[name]
        alleles = []
        for genotypes, status in zip(world.genotypes, world.phenotypes, strict=True):
            copies = genotypes[:, variant].astype(float)
            known = [copies[(copies >= 0) & (status == c)] for c in (1, 0)]
            alleles.append(np.array([[part.sum(), (2 - part).sum()] for part in known]))
        expected = StratifiedTable(alleles)
        test = expected.test_null_odds(correction=False)
        np.testing.assert_allclose(float(line["p"]), test.pvalue, rtol=1e-9)
        np.testing.assert_allclose(float(line["statistic"]), test.statistic, rtol=1e-9)
        np.testing.assert_allclose(float(line["effect"]), expected.oddsratio_pooled, rtol=1e-9)
        interval = expected.oddsratio_pooled_confint()
        np.testing.assert_allclose([float(line["low"]), float(line["high"])], interval, rtol=1e-9)
        own = [sm.stats.Table2x2(table) for table in alleles]
        effects = np.array([table.log_oddsratio for table in own])
        errors = np.array([table.log_oddsratio_se for table in own])
        q = combine_effects(effects, errors**2).q
        np.testing.assert_allclose(float(line["q"]), q, rtol=1e-8)
        np.testing.assert_allclose(float(line["q_p"]), stats.chi2.sf(q, 2), rtol=1e-8)
        np.testing.assert_allclose(float(line["i2"]), 100 * max(0, 1 - 2 / q), atol=1e-6)
        case, design = world.pooled(variant)
        frequency = design[:, -1].mean() / 2
        for column in ("freq", "freq_least", "freq_most"):
            np.testing.assert_allclose(float(line[column]), frequency, rtol=1e-9)
        assert (line["a1"], line["a2"]) == world.pairs[0][variant]
        assert int(line["cases"]) == case.sum()
        assert int(line["people"]) == int(line["cases"]) + int(line["controls"]) == len(case)
        chi2 = world.trend(variant)
        np.testing.assert_allclose(float(trend[name]["statistic"]), chi2, rtol=1e-9)
        np.testing.assert_allclose(float(trend[name]["p"]), stats.chi2.sf(chi2, 1), rtol=1e-9)
    assert min(trend, key=lambda name: float(trend[name]["p"])) == "rs20"
    found = summary["association"]
    chi2 = [float(line["statistic"]) for line in trend.values()]
    assert found["lambda-gc"] == pytest.approx(np.median(chi2) / 0.45493642, rel=0.02)
    assert (found["variants"], found["tested"]) == (40, 40)
    line = trend["rs20"]
    effects, spread = (
        dict(zip(top["head"], top["rows"][0], strict=True)) for top in summary["tables"]
    )
    assert effects["variant"] == spread["variant"] == "rs20"
    assert effects["place"] == "1:300"
    assert effects["95% interval"] == f"{float(line['low']):.3g} to {float(line['high']):.3g}"
    assert spread["p of Q"] == f"{float(line['q_p']):.3g}"
    text = "test=trend takes no covariates: it is adjusted for the hospital alone, not for age"
    assert text in (tmp_path / "run" / "log.txt").read_text()


needs_plink = pytest.mark.skipif(
    shutil.which("plink1.9") is None, reason="plink1.9 is not installed"
)


def plink(folder, *options):
    command = ["plink1.9", "--keep-allele-order", "--allow-no-sex", *map(str, options)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def printed(path):
    """Return the lines of a table that PLINK wrote, by variant."""
    head, *lines = (line.split() for line in path.read_text().splitlines())
    return {row["SNP"]: row for row in (dict(zip(head, line, strict=True)) for line in lines)}


@needs_plink
def test_the_allelic_test_is_plinks_with_the_hospitals_as_clusters(world, tmp_path):
    _, lines = study(world.client(), tmp_path, test="allelic")
    site = np.repeat(np.arange(3), [len(part) for part in world.genotypes])
    people = [f"p{n}" for n in range(len(site))]
    status = np.concatenate(world.phenotypes).astype(int) + 1
    properties = {
        **{"fid": people, "iid": people, "sid": world.names[0]},
        "chromosome": [str(chromosome) for chromosome, _ in world.places[0]],
        "bp_position": [position for _, position in world.places[0]],
        "allele_1": [pair[0] for pair in world.pairs[0]],
        "allele_2": [pair[1] for pair in world.pairs[0]],
    }
    to_bed(tmp_path / "all.bed", np.concatenate(world.genotypes), properties=properties)
    for name, column in (("status", status), ("site", site)):
        rows = zip(people, column, strict=True)
        (tmp_path / name).write_text("".join(f"{p} {p} {value}\n" for p, value in rows))
    plink(tmp_path, "--bfile", "all", "--pheno", "status", "--mh", "--within", "site")
    # And Q and I2 of its meta-analysis of the hospitals.
    for number in range(3):
        own = ("--bfile", "all", "--pheno", "status", "--keep-cluster-names", number)
        plink(tmp_path, *own, "--within", "site", "--assoc", "--ci", 0.95, "--out", f"own{number}")
    plink(tmp_path, "--meta-analysis", *(f"own{number}.assoc" for number in range(3)))
    common = printed(tmp_path / "plink.cmh")
    spread = printed(tmp_path / "plink.meta")
    assert common.keys() == spread.keys() == lines.keys()
    for name, line in lines.items():
        columns = [("statistic", "CHISQ"), ("p", "P"), ("effect", "OR"), ("low", "L95")]
        columns += [("high", "U95"), ("se", "SE")]
        for ours, theirs in columns:
            # PLINK prints four digits.
            np.testing.assert_allclose(float(line[ours]), float(common[name][theirs]), rtol=1e-3)
        np.testing.assert_allclose(float(line["q_p"]), float(spread[name]["Q"]), atol=2e-3)
        np.testing.assert_allclose(float(line["i2"]), float(spread[name]["I"]), atol=0.2)


@pytest.fixture
def unlike(tmp_path):
    """Hospitals that differ in prevalence and in all frequencies, and no variant has an effect."""
    world = World(tmp_path)
    generator = np.random.default_rng(8)
    for site, prevalence in enumerate((0.8, 0.2, 0.2)):
        size = world.genotypes[site].shape
        frequency = generator.uniform(0.1, 0.9, VARIANTS)
        world.genotypes[site] = generator.binomial(2, frequency, size).astype(np.int8)
        world.phenotypes[site] = (generator.random(size[0]) < prevalence).astype(float)
    return world


def test_hospitals_that_differ_in_prevalence_and_frequencies_make_no_hit(unlike, tmp_path):
    for test in ("trend", "allelic"):
        summary, lines = study(unlike.client(), tmp_path, test=test)
        (tmp_path / "run").rename(tmp_path / test)
        # The least of 40 is below 1e-3 in one of 25 such studies.
        assert min(float(line["p"]) for line in lines.values()) > 1e-3
        assert 0.5 < summary["association"]["lambda-gc"] < 1.6
    pooled = [unlike.pooled(variant) for variant in range(VARIANTS)]
    chi2 = [len(y) * np.corrcoef(y, design[:, -1])[0, 1] ** 2 for y, design in pooled]
    assert sum(stats.chi2.sf(chi2, 1) < 1e-3) >= 3


def test_logistic_models_are_those_of_the_pooled_people(world, tmp_path, monkeypatch):
    # Counted in three blocks, and the models in parts of three variants.
    monkeypatch.setattr(rounds, "_MOST_NUMBERS", 30)
    _, lines = study(world.client(), tmp_path, test="logistic")
    for variant, line in enumerate(lines.values()):
        model = sm.Logit(*world.pooled(variant)).fit(disp=0, method="newton", tol=1e-12)
        np.testing.assert_allclose(float(line["effect"]), np.exp(model.params[-1]), rtol=1e-7)
        np.testing.assert_allclose(float(line["se"]), model.bse[-1], rtol=1e-7)
        np.testing.assert_allclose(float(line["p"]), model.pvalues[-1], rtol=1e-6)


def test_linear_models_are_those_of_the_pooled_people(tmp_path):
    world = World(tmp_path, trait="continuous")
    summary, lines = study(world.client(), tmp_path, test="linear")
    for variant, line in enumerate(lines.values()):
        model = sm.OLS(*world.pooled(variant)).fit()
        np.testing.assert_allclose(float(line["effect"]), model.params[-1], rtol=1e-8)
        np.testing.assert_allclose(float(line["p"]), model.pvalues[-1], rtol=1e-7)
        assert line["cases"] == line["controls"] == ""
    assert "beta" in summary["tables"][0]["head"]


def test_components_go_into_the_models_and_scores_stay(world, tmp_path):
    summary, lines = study(world.client(), tmp_path, test="logistic", components=2)
    whole = np.concatenate(world.genotypes)
    left, values = components_of(world, (0, 1, 2))
    np.testing.assert_allclose(summary["association"]["components"], values, rtol=1e-6)
    for variant in (0, 20):
        outcome, design = world.pooled(variant)
        scores = left[whole[:, variant] >= 0]
        model = sm.Logit(outcome, np.column_stack([scores, design])).fit(disp=0)
        line = lines[f"rs{variant:02d}"]
        np.testing.assert_allclose(float(line["p"]), model.pvalues[-1], rtol=1e-4)
        np.testing.assert_allclose(float(line["effect"]), np.exp(model.params[-1]), rtol=1e-4)


def components_of(world, sites):
    """Return scores and eigenvalues of the pooled people of some hospitals."""
    whole = np.concatenate([world.genotypes[site] for site in sites])
    frequency = np.array([(g[g >= 0]).mean() / 2 for g in whole.T])
    spread = np.sqrt(2 * frequency * (1 - frequency))
    matrix = np.where(whole < 0, 0, (whole - 2 * frequency) / spread)
    left, strength, _ = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :2], strength[:2] ** 2 / VARIANTS


def test_real_hospitals_tell_sums_for_components_where_they_say_so(world, tmp_path):
    reason = (
        "declined: components need sums from which genotypes can be computed: to allow them, set "
        "share-components=true in the node config"
    )
    places = [{"partition-id": site, "num-partitions": 3} for site in range(3)]
    own = [{"data-dir": str(tmp_path / name), "site-name": name} for name in ("north", "south")]
    for node in own:
        Path(node["data-dir"]).mkdir()
    nodes = [
        places[0] | own[0] | {"share-components": True},
        places[1] | own[1],
        places[2] | {"share-components": False},
    ]
    settings = {"test": "logistic", "components": 2}
    summary, _ = study(world.client(), tmp_path, nodes, **settings)
    told = {failure["site"]: failure["reason"] for failure in summary["failures"]}
    assert told == {"south": reason, "hospital-3": reason}
    _, values = components_of(world, (0,))
    np.testing.assert_allclose(summary["association"]["components"], values, rtol=1e-6)
    # Scores on any loadings would come back with the sums of covariates.
    content = {"lines": np.arange(2), "swapped": np.zeros(2, bool), "frequencies": np.full(2, 0.5)}
    content |= {"loadings": np.ones((2, 1))}
    arrays = ArrayRecord({name: Array(values) for name, values in content.items()})
    context = context_of(node_config=nodes[2])
    reply = ask(world.client(), "query.scores", context, arrays)
    assert reply.error.reason == f"site hospital-3: {reason}"


def test_sums_that_no_genotypes_give_leave_their_site_out(world, tmp_path):
    client = world.client(fails_at(1, "loadings", replaced(lambda values: values * 1e300)))
    summary, _ = study(client, tmp_path, test="logistic", components=2)
    (failure,) = summary["failures"]
    assert failure["reason"] == "malformed answer: sums are larger than people can have"
    _, values = components_of(world, (0, 2))
    np.testing.assert_allclose(summary["association"]["components"], values, rtol=1e-6)


def test_variants_that_only_a_hospital_that_left_withheld_count_again(world, tmp_path):
    # One copy is not told: while the second hospital is there, few variants are left.
    world.genotypes[1][:, :32] = 0
    world.genotypes[1][0, :32] = 1
    asked = []

    def failing(client, message):
        if client.site.index == 1:
            asked.append(None)
            if len(asked) == 3:
                raise InputError("the disk is gone")
        return GenomicsClient.queries["counts"](client, message)

    client = world.client(queries={**GenomicsClient.queries, "counts": failing})
    settings = {"test": "logistic", "components": 10, "block_size": 16}
    summary, _ = study(client, tmp_path, **settings)
    assert len(summary["association"]["components"]) == 10


@pytest.mark.parametrize(("question", "which"), [("counts", 2), ("loadings", 3), ("scores", 1)])
def test_components_are_those_of_the_hospitals_that_stay(world, tmp_path, question, which):
    asked = []

    def failing(client, message):
        if client.site.index == 1:
            asked.append(question)
            if len(asked) == which:
                raise InputError("the disk is gone")
        return GenomicsClient.queries[question](client, message)

    client = world.client(queries={**GenomicsClient.queries, question: failing})
    settings = {"test": "logistic", "components": 2, "block_size": 16}
    summary, lines = study(client, tmp_path, **settings)
    assert len(asked) == which
    assert [failure["site"] for failure in summary["failures"]] == ["hospital-2"]
    stay = (0, 2)
    left, values = components_of(world, stay)
    np.testing.assert_allclose(summary["association"]["components"], values, rtol=1e-6)
    outcome, design = world.pooled(20, stay)
    known = np.concatenate([world.genotypes[site][:, 20] for site in stay]) >= 0
    model = sm.Logit(outcome, np.column_stack([left[known], design])).fit(disp=0)
    np.testing.assert_allclose(float(lines["rs20"]["p"]), model.pvalues[-1], rtol=1e-4)
    assert "components are searched for again" in (tmp_path / "run" / "log.txt").read_text()


def test_components_are_made_of_variants_evenly_spread(world, tmp_path):
    asked = []

    def loadings(client, message):
        asked.append(view(message.content["block"]["lines"]))
        return GenomicsClient.queries["loadings"](client, message)

    client = world.client(queries={**GenomicsClient.queries, "loadings": loadings})
    settings = {"test": "logistic", "components": 1, "component_variants": 10, "block_size": 8}
    study(client, tmp_path, **settings)
    lines = asked[0]
    assert len(lines) == 10
    assert set(np.diff(lines)) <= {4, 5, 6}
    assert all((other == lines).all() for other in asked)


def test_files_that_differ_are_aligned_and_what_does_not_fit_is_left_out(world, tmp_path):
    _, expected = study(world.client(), tmp_path)
    (tmp_path / "run").rename(tmp_path / "first")
    genotypes = world.genotypes[1]
    for variant in (2, 4):  # swapped; of the second both strands look the same
        genotypes[:, variant] = np.where(genotypes[:, variant] < 0, -127, 2 - genotypes[:, variant])
    for site in range(3):
        world.pairs[site][4] = ("A", "T")
    world.pairs[1][2] = world.pairs[1][2][::-1]
    world.pairs[1][4] = ("T", "A")
    world.pairs[2][6] = ("C", "A")  # other alleles
    world.names[0][8] = "own"  # absent elsewhere
    world.names[2][11] = "rs10"
    world.places[2][11] = world.places[2][10]  # one id twice
    for site in range(3):
        world.places[site][39] = (23, 5)  # X
        world.genotypes[site][:, 12] = 0  # one allele only
    summary, lines = study(world.client(), tmp_path)
    for name in ("rs02", "rs03", "rs20"):
        assert lines[name] == expected[name]
    notes = {name: (line["sites"], line["note"]) for name, line in lines.items() if line["note"]}
    assert notes == {
        "rs04": ("2", "swapped or from the other strand: hospital-2"),
        "rs06": ("2", "other alleles: hospital-3"),
        "own": ("1", "absent: hospital-2, hospital-3"),
        "rs08": ("2", "absent: hospital-1"),
        "rs10": ("2", "id repeated: hospital-3"),
        "rs11": ("2", "absent: hospital-3"),
        "rs12": ("3", "one allele only"),
    }
    assert np.isnan(float(lines["rs12"]["p"]))
    assert "rs39" not in lines
    assert summary["association"]["tested"] == 39
    sites = summary["sites"]
    assert [sites[f"hospital-{n}"]["swapped"] for n in (1, 2, 3)] == [0, 1, 0]
    assert [sites[f"hospital-{n}"]["left out"] for n in (1, 2, 3)] == [0, 1, 2]
    assert [sites[f"hospital-{n}"]["absent"] for n in (1, 2, 3)] == [1, 1, 2]


def test_rare_variants_are_withheld_where_they_are_rare(world, tmp_path):
    world.genotypes[0][:, 7], world.genotypes[0][:9, 7] = 0, 1
    summary, lines = study(world.client(), tmp_path)
    line = lines["rs07"]
    assert (line["sites"], line["note"]) == ("2", "withheld: hospital-1")
    assert float(line["statistic"]) == pytest.approx(world.trend(7, (1, 2)), rel=1e-9)
    assert summary["sites"]["hospital-1"]["withheld"] == 1
    # The frequency of the others is not that of all: bounds are, and the true one is within.
    assert line["freq"] == "nan"
    copies = world.pooled(7, (1, 2))[1][:, -1]
    everybody = 2 * (len(copies) + 60)
    assert float(line["freq_least"]) == pytest.approx(copies.sum() / everybody)
    assert float(line["freq_most"]) == pytest.approx((copies.sum() + 120) / everybody)
    true = world.pooled(7)[1][:, -1].mean() / 2
    assert float(line["freq_least"]) < true < float(line["freq_most"])
    assert true < copies.mean() / 2


def test_ten_hospitals_of_which_some_withhold_have_no_biased_frequency(tmp_path):
    world = World(tmp_path)
    generator = np.random.default_rng(2)
    for site in range(3):
        size = len(world.genotypes[site])
        world.genotypes[site] = np.zeros((size, VARIANTS), np.int8)
        world.genotypes[site][:, :] = generator.binomial(2, 0.08, (size, VARIANTS))
    _, lines = study(world.client(), tmp_path)
    withheld = [line for line in lines.values() if "withheld" in line["note"]]
    assert 10 < len(withheld) < VARIANTS
    for variant, line in enumerate(lines.values()):
        true = np.concatenate(world.genotypes)[:, variant].mean() / 2
        if line in withheld:
            assert line["freq"] == "nan"
            if line["sites"] != "0":
                assert float(line["freq_least"]) <= true <= float(line["freq_most"])
        else:
            assert float(line["freq"]) == pytest.approx(true, rel=1e-9)


@pytest.mark.parametrize("test", ["trend", "allelic", "logistic"])
def test_a_hospital_with_cases_only_counts_in_no_test_and_is_named(world, tmp_path, test):
    world.phenotypes[2][:] = 1
    summary, lines = study(world.client(coding="0/1"), tmp_path, test=test)
    line = lines["rs20"]
    if test == "trend":
        assert float(line["statistic"]) == pytest.approx(world.trend(20, (0, 1)), rel=1e-9)
    elif test == "logistic":
        model = sm.Logit(*world.pooled(20, (0, 1))).fit(disp=0)
        assert float(line["p"]) == pytest.approx(model.pvalues[-1], rel=1e-4)
    assert line["sites"] == "2"
    assert int(line["people"]) == len(world.pooled(20, (0, 1))[0])
    (failure,) = summary["failures"]
    reason = "it has cases only: cases are compared with controls of the same hospital"
    assert (failure["site"], failure["reason"]) == ("hospital-3", reason)
    assert reason in (tmp_path / "run" / "report.html").read_text()


def test_a_hospital_whose_controls_lack_a_genotype_does_not_count_there(world, tmp_path):
    world.genotypes[2][world.phenotypes[2] == 0, 20] = -127
    _, lines = study(world.client(), tmp_path)
    line = lines["rs20"]
    assert float(line["statistic"]) == pytest.approx(world.trend(20, (0, 1)), rel=1e-9)
    assert (line["sites"], line["note"]) == ("2", "cases or controls only: hospital-3")


def test_a_variant_that_separates_fails_alone(world, tmp_path):
    for genotypes, cases in zip(world.genotypes, world.phenotypes, strict=True):
        genotypes[:, 5] = 2 * cases
    _, lines = study(world.client(), tmp_path, test="logistic")
    failed = [name for name, line in lines.items() if line["p"] == "nan"]
    assert failed == ["rs05"]
    assert lines["rs05"]["note"] == "no result: not identified or not converged"


def fails_at(site_index, name, change):
    """Return a client base in which one site changes its answer to one question."""
    original = GenomicsClient.queries[name]

    def answer(client, message):
        content = original(client, message)
        return change(content, client) if client.site.index == site_index else content

    queries = {**GenomicsClient.queries, name: answer}
    return type("Failing", (GenomicsClient,), {"queries": queries})


def replaced(function):
    """Return a change of the numbers that a site tells."""

    def change(content, client):
        values = content["sums"]["values"].numpy()
        content["sums"] = ArrayRecord({"values": Array(np.asarray(function(values.copy())))})
        return content

    return change


def negative(values):
    values[3, 0] = -5
    return values


def too_many(values):
    values[3, 1] = 1000
    return values


def alleles(values):
    values[3, 2] = 2 * values[3, 0] + 1
    return values


def crash(content, client):
    raise InputError("the disk is gone")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("counts", replaced(negative), "malformed answer: numbers of people outside 0..39"),
        ("counts", replaced(too_many), "malformed answer: numbers of people outside 0..51"),
        ("counts", replaced(alleles), "malformed answer: copies of A1 must lie in 0..2 for each "
         "person counted"),
        ("counts", replaced(lambda v: v[:-1]), "malformed answer: values must have shape "
         "(15, 5), got (14, 5)"),
        ("counts", replaced(lambda v: v * np.nan), "malformed answer: counts must be int64, "
         "got float64"),
        ("counts", lambda content, _: content.__class__({}), "malformed answer: KeyError 'sums'"),
        ("counts", crash, "the disk is gone"),
        ("logistic", replaced(lambda v: v * np.nan), "malformed answer: sums must be float64 "
         "and finite"),
    ],
)  # fmt: skip
def test_a_site_that_fails_on_the_way_is_left_out(world, tmp_path, name, change, reason):
    test = "logistic" if name == "logistic" else "trend"
    client = world.client(fails_at(1, name, change))
    summary, lines = study(client, tmp_path, test=test)
    (failure,) = summary["failures"]
    assert (failure["site"], failure["phase"], failure["round"]) == ("hospital-2", name, 1)
    assert failure["reason"] == reason
    # The other two hospitals' variants are tested as if it were not there.
    assert {line["sites"] for line in lines.values()} == {"2"}
    p = float(lines["rs20"]["p"])
    if test == "trend":
        assert p == pytest.approx(stats.chi2.sf(world.trend(20, (0, 2)), 1), rel=1e-9)
    else:
        case, design = world.pooled(20, (0, 2))
        assert p == pytest.approx(sm.Logit(case, design).fit(disp=0).pvalues[-1], rel=1e-4)
    assert lines["rs00"]["note"] == "failed: hospital-2"


def test_models_that_were_done_keep_the_hospital_that_fails_then(world, tmp_path):
    asked = []

    def failing(client, message):
        if client.site.index == 1:
            asked.append(None)
            if len(asked) == 5:
                raise InputError("the disk is gone")
        return GenomicsClient.queries["logistic"](client, message)

    client = world.client(queries={**GenomicsClient.queries, "logistic": failing})
    _, lines = study(client, tmp_path, test="logistic", block_size=64)
    assert {line["sites"] for line in lines.values()} == {"2", "3"}
    for variant, line in enumerate(lines.values()):
        sites = (0, 1, 2) if line["sites"] == "3" else (0, 2)
        assert line["note"] == ("" if line["sites"] == "3" else "failed: hospital-2")
        outcome, design = world.pooled(variant, sites)
        model = sm.Logit(outcome, design).fit(disp=0, method="newton", tol=1e-12)
        np.testing.assert_allclose(float(line["effect"]), np.exp(model.params[-1]), rtol=1e-7)
        assert int(line["people"]) == len(outcome)


def listed(function):
    """Return a change of the list of variants that a site tells."""

    def change(content, client):
        function(content["variants"], content["positions"])
        return content

    return change


def unsorted(record, places):
    places["positions"] = Array(places["positions"].numpy()[::-1].copy())


def longer(record, places):
    record["names"] += "\nmore"


def unplaced(record, places):
    places["chromosomes"] = Array(places["chromosomes"].numpy() + np.int8(30))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (unsorted, "its variants are not in order of chromosome and position: sort its files with "
         "plink --make-bed"),
        (longer, "names, first and second must be of 16 variants, as positions are"),
        (unplaced, "chromosomes must lie in 0..22 and positions in 0..2147483647, 0 if not known"),
    ],
)  # fmt: skip
def test_a_list_of_variants_that_cannot_be_leaves_its_site_out(world, tmp_path, function, reason):
    client = world.client(fails_at(1, "variants", listed(function)))
    summary, lines = study(client, tmp_path)
    (failure,) = summary["failures"]
    assert failure["site"] == "hospital-2"
    assert failure["reason"] == f"malformed answer: {reason}"
    assert len(lines) == VARIANTS
    assert {line["sites"] for line in lines.values()} == {"2"}


def test_a_hospital_with_damaged_files_takes_no_part(world, tmp_path):
    client = world.client()
    bed = tmp_path / "h1.bed"
    bed.write_bytes(bed.read_bytes()[:-7])
    summary, lines = study(client, tmp_path)
    (failure,) = summary["failures"]
    size = 3 + 40 * 23
    assert failure["reason"] == (
        f"{bed} has {size - 7} bytes, but 40 variants (bim) of 90 people (fam) make {size}: it was "
        "cut off, or belongs to other bim and fam files"
    )
    assert set(summary["sites"]) == {"hospital-1", "hospital-3"}
    assert {line["sites"] for line in lines.values()} == {"2"}


def test_hospitals_with_another_study_or_a_budget_take_no_part(world, tmp_path):
    class Other(GenomicsClient):
        def __init__(self, context):
            super().__init__(context)
            if self.site.index == 1:
                self.covariates = ()

    budget = {"site-name": "south", "budget-epsilon": 1.0, "budget-delta": 1e-5}
    with pytest.raises(InputError, match=says("no site takes part: its trait is binary, and the "
                                              "test takes a continuous one")):  # fmt: skip
        study(world.client(), tmp_path, test="linear")
    client = world.client(Other)
    client.__init__ = Other.__init__
    summary, _ = study(client, tmp_path, node_configs=[{}, {}, budget])
    reasons = {failure["site"]: failure["reason"] for failure in summary["failures"]}
    assert reasons == {
        "south": "declined: an association study carries no noise",
        "hospital-2": "its columns are phenotype, most hospitals' phenotype, age",
    }


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ({"people": 10**10}, "'people': 10000000000, 'cases': 39, 'variants': 40, 'minimum': 10}"),
        ({"variants": 10**15}, "'variants': 1000000000000000, 'minimum': 10}"),
        ({"covariates": ["age"] * 201}, "covariates must be at most 200, got 201"),
    ],
)  # fmt: skip
def test_a_hospital_that_reports_more_than_there_can_be_takes_no_part(world, tmp_path, about, text):
    def answer(client, message):
        content = GenomicsClient.queries["cohort"](client, message)
        if client.site.index == 1:
            content["cohort"].update(about)
        return content

    client = world.client(queries={**GenomicsClient.queries, "cohort": answer})
    summary, _ = study(client, tmp_path)
    (failure,) = summary["failures"]
    assert failure["site"] == "hospital-2"
    assert failure["reason"].startswith("malformed answer: ")
    assert failure["reason"].endswith(text)


def test_a_study_whose_sites_all_fail_leaves_a_folder_that_says_so(world, tmp_path):
    client = world.client(GenomicsClient, queries={**GenomicsClient.queries, "counts": crash})
    with pytest.raises(RunFailedError, match=says("no site is left: the disk is gone")):
        study(client, tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["message"] == "RunFailedError: no site is left: the disk is gone"
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.toml", "log.txt", "report.html", "summary.json"}
    assert "Failed" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"test": "fisher"}, "test must be one of trend, allelic, logistic, linear, got 'fisher'"),
        ({"components": 2}, "components needs test=logistic or test=linear, got test=trend: "
         "components are covariates, which this test does not take"),
        ({"block_size": 0}, "block-size must be from 1 to 1,048,576, got 0"),
        ({"component_variants": 0}, "component-variants must be from 1 to 262,144, got 0"),
        ({"resume": True}, "resume must be false: an association study is started again in a new "
         "folder"),
        ({"privacy": "patient"}, "an association study carries no noise: set privacy=none, which "
         "hospitals with a budget decline" + see("privacy")),
        ({"evaluate": "x"}, "evaluate tests a network, and this app tests variants"
         + see("evaluate")),
        ({"secure": "sum"}, 'secure="sum" trains a network, and this app tests variants, for which '
         "hospitals would have to send their own figures: leave it out" + see("secure")),
        ({"test": "logistic", "components": 51}, "components must be from 0 to 50, got 51"),
        ({"test": "logistic", "components": 45}, "45 components cannot be made of 40 common "
         "variants that every hospital reports, and of 220 people: choose fewer components"),
    ],
)  # fmt: skip
def test_studies_that_cannot_be_are_refused(world, tmp_path, config, text):
    with pytest.raises(InputError, match=says_of_setting(text)):
        study(world.client(), tmp_path, **config)


@pytest.mark.parametrize("test", ["trend", "logistic"])
def test_a_study_needs_cases_and_controls_at_one_hospital(world, tmp_path, test):
    for value, phenotypes in zip((0, 1, 0), world.phenotypes, strict=True):
        phenotypes[:] = value
    text = (
        "no hospital has both cases and controls: cases are compared with controls of the same "
        "hospital, since hospitals differ in more than the trait"
    )
    with pytest.raises(InputError, match=says(text)):
        study(world.client(coding="0/1"), tmp_path, test=test)


def covariates_of(world, number):
    """Return the ages of a hospital, and columns that follow from them or from nothing."""
    age = np.round(world.ages[number])
    male = (np.arange(len(age)) % 2).astype(float)
    return {
        "age": age,
        "born": 2026 - age,
        "male": male,
        "female": 1 - male,
        "array": np.full(len(age), 1.1 * number),
        "one": np.full(len(age), 0.1),
    }


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("age", "born"), "the covariate born follows from age at each hospital, so their effects "
         "cannot be told apart: take born out of covariates"),
        (("male", "age", "female"), "the covariate female follows from male at each hospital, so "
         "their effects cannot be told apart: take female out of covariates"),
        (("one", "age"), "the covariate one is the same for everybody at each hospital. The "
         "hospital is in the model already: take it out of covariates"),
        (("age", "array", "one"), "the covariates array, one are each the same for everybody at "
         "each hospital. The hospital is in the model already: take it out of covariates"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("test", ["logistic", "linear"])
def test_covariates_that_cannot_be_told_apart_are_named(tmp_path, names, text, test):
    world = World(tmp_path, trait="binary" if test == "logistic" else "continuous")
    client = with_covariates(world, names)
    with pytest.raises(InputError, match=says(text)):
        study(client, tmp_path, test=test)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["message"]) == ("failed", f"InputError: {text}")
    assert not (tmp_path / "run" / "association.csv").exists()


def with_covariates(world, names, change=None):
    """Return a client whose rows have these covariates."""

    def load_data(client, site):
        number = site.index
        columns = covariates_of(world, number)
        if change is not None:
            change(number, columns)
        phenotype = world.phenotypes[number].tolist()
        rows = [
            {"patient": f"p{n}", "phenotype": value, **{key: columns[key][n] for key in names}}
            for n, value in enumerate(phenotype)
        ]
        return SiteData(rows, source="made up")

    return world.client(covariates=names, load_data=load_data)


@pytest.mark.parametrize("test", ["logistic", "linear"])
def test_a_covariate_that_varies_at_one_hospital_is_fine(tmp_path, test):
    world = World(tmp_path, trait="binary" if test == "logistic" else "continuous")
    # The hospital at which it varies has none of the first variants.
    for variant in range(20):
        world.places[1][variant] = (1, 50 + variant)
        world.names[1][variant] = f"own{variant}"

    def change(number, columns):
        if number == 1:
            columns["array"] = np.arange(len(columns["age"])) % 3 * 1.0

    client = with_covariates(world, ("age", "array"), change)
    summary, lines = study(client, tmp_path, test=test)
    assert summary["status"] == "finished"
    assert np.isfinite(float(lines["rs30"]["p"]))


def test_a_study_without_a_result_has_failed(world, tmp_path):
    for genotypes in world.genotypes:
        genotypes[:] = 2
    text = "none of 40 variants has a result; 40 of them: one allele only"
    with pytest.raises(RunFailedError, match=says(text)):
        study(world.client(), tmp_path)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["message"]) == ("failed", f"RunFailedError: {text}")
    assert {line["note"] for line in lines_of(tmp_path / "run").values()} == {"one allele only"}


def test_a_study_without_variants_has_failed(world, tmp_path):
    for places in world.places:
        places[:] = [(23, position) for _, position in places]
    text = (
        "no variant was tested: none of the hospitals' variants is on chromosomes 1 to 22 and has "
        "a position"
    )
    with pytest.raises(RunFailedError, match=says(text)):
        study(world.client(), tmp_path)


def test_the_page_shows_the_study_and_loads_nothing(world, tmp_path):
    world.names[0][20] = world.names[1][20] = world.names[2][20] = "<b>hit</b>"
    study(world.client(), tmp_path)
    text = (tmp_path / "run" / "report.html").read_text()
    assert "<b>hit</b>" not in text
    assert "&lt;b&gt;hit&lt;/b&gt;" in text
    assert text.count('<svg role="img"') == 2
    assert not re.search(r"(?:src|href)=[\"'](?!#)", text)
    for words in (
        *("220 people", "by Mantel's trend test, stratified by hospital", "hospital-3"),
        *("What left each hospital", "95% interval", "p of Q", "I² in %", "Not adjusted for age"),
        "Robins",
    ):
        assert words in text
    assert write_page(tmp_path / "run").read_text() == text
    table = tmp_path / "run" / "association.csv"
    # A p-value that no float holds is drawn where it belongs.
    lines = table.read_text().splitlines()
    cells = lines[5].split(",")
    cells[COLUMNS.index("p")] = "3.1e-450"
    table.write_text("\n".join([*lines[:5], ",".join(cells), *lines[6:]]))
    assert ">400<" in write_page(tmp_path / "run").read_text().replace("−", "-")
    table.write_text("chrom,p\n")
    with pytest.raises(InputError, match=r"association\.csv does not have the columns chrom, pos"):
        write_page(tmp_path / "run")
    with pytest.raises(InputError, match="holds no association study that can be shown"):
        write_page(tmp_path)


def run_example(folder, *settings):
    arguments = ["run", str(ROOT / "examples/gwas"), "--out", str(folder)]
    arguments += [part for setting in settings for part in ("-c", setting)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return json.loads((folder / "summary.json").read_text()), lines_of(folder)


def test_the_example_finds_the_planted_hit(tmp_path):
    summary, lines = run_example(tmp_path / "run", "dataset=generated", "test=logistic")
    assert summary["generated"] is True
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Generated data: generated genotypes with one planted hit" in page
    assert min(lines, key=lambda name: float(lines[name]["p"])) == "hit1500"
    assert 0.8 < summary["association"]["lambda-gc"] < 1.3


@pytest.mark.realdata
@pytest.mark.parametrize("settings", [("trait=north",), ("trait=persistence", "test=logistic")])
def test_the_example_finds_the_lactase_variant(tmp_path, settings):
    summary, lines = run_example(tmp_path / "run", *settings)
    assert min(lines, key=lambda name: float(lines[name]["p"])) == "rs4988235"
    assert summary["generated"] is ("trait=persistence" in settings)


def test_a_hospital_of_another_version_takes_no_part(world, tmp_path):
    client = world.client()

    class Older(client):
        """The second hospital's package is of a later version."""

        @classmethod
        def client_app(cls, mods=()):
            def later(message, context, call):
                reply = call(message, context)
                if context.node_config["partition-id"] == 1:
                    reply.content["site"]["version"] = 3
                return reply

            return super().client_app([later])

    summary, _ = study(Older, tmp_path)
    (failure,) = summary["failures"]
    assert failure["site"] == "hospital-2"
    assert failure["reason"].startswith("hospital-2: messages of the hospital have version 3, and")
