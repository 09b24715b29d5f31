"""No person has most of a sum whose weights the server chooses, and no tree splits at one."""

import math
from itertools import pairwise

import numpy as np
import pytest
import statsmodels.api as sm
from cohort import VARIANTS, everything, genotypes_of, hospital, question, rows_of
from flwr.app import Array, ArrayRecord
from forests import DECLARED, STUMP, Hospital, bagged
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from studies import World, study
from tiny import ask, context_of

from fedmed_flower import Schema, SiteData
from fedmed_flower.arrays.views import view
from fedmed_flower.genomics.client import GenomicsClient
from fedmed_flower.genomics.regression import LogisticFit, logistic_terms
from fedmed_flower.trees.client import as_trees
from fedmed_flower.trees.ensembles import model_bytes, read_trees, write_trees
from fedmed_flower.trees.thresholds import BEYOND, in_bins, quantile_edges, roundest, spaced_edges


def asked(client, slopes, intercepts, context=None, lines=None):
    """Ask for one Newton step; return the sums and which variants are withheld."""
    lines = everything() if lines is None else lines
    more = {"slopes": slopes, "intercepts": intercepts}
    reply = question(client, "logistic", context=context, **lines, **more)
    assert not reply.has_error(), reply.error.reason
    record = reply.content["sums"]
    return view(record["values"]), view(record["withheld"])


def ages_of(rows):
    age = np.array([row["age"] for row in rows])
    return age - age.mean()


def test_a_steep_slope_reads_nobodys_genotypes(tmp_path):
    client = hospital(tmp_path)
    for age in ages_of(rows_of()):
        slopes = np.tile([5000.0, 0.0], (VARIANTS, 1))
        sums, withheld = asked(client, slopes, np.full(VARIANTS, -5000 * age))
        assert withheld.all()
        assert not sums.any()


@pytest.mark.parametrize("slope", [2.0, 50.0, 1e6, 1e300])
def test_nor_does_a_threshold_between_two_people(tmp_path, slope):
    ages = np.sort(ages_of(rows_of()))
    client = hospital(tmp_path)
    for age in (ages[1:] + ages[:-1]) / 2:
        slopes = np.tile([slope, 0.0], (VARIANTS, 1))
        with np.errstate(over="ignore"):
            intercepts = np.full(VARIANTS, np.nan_to_num(-slope * age))
        assert asked(client, slopes, intercepts)[1].all()


def shares_by_hand(copies, case, ages, slopes, intercept):
    """Return the largest part that a person has of each kind of weight."""
    kinds = {"information": [], "score": [], "first allele": [], "second allele": []}
    for count, outcome, age in zip(copies, case, ages, strict=True):
        if count < 0:
            continue
        risk = 1 / (1 + np.exp(-(intercept + slopes[0] * age + slopes[1] * count)))
        kinds["information"].append(risk * (1 - risk))
        kinds["score"].append(abs(outcome - risk))
        kinds["first allele"].append(risk * (1 - risk) * count)
        kinds["second allele"].append(risk * (1 - risk) * (2 - count))
    return {kind: max(each) / sum(each) for kind, each in kinds.items() if any(each)}


@settings(max_examples=60, deadline=None)
@given(st.floats(-0.4, 0.4), st.floats(-4, 4), st.floats(-6, 6), st.integers(0, 50))
def test_the_largest_share_is_the_one_worked_out_person_by_person(slope, of_copies, start, seed):
    generator = np.random.default_rng(seed)
    genotypes = generator.binomial(2, 0.2, (60, 4)).astype(np.int8)
    genotypes[generator.random(genotypes.shape) < 0.1] = -127
    cases, ages = generator.random(60) < 0.4, generator.normal(0, 12, 60)
    slopes = np.tile([slope, of_copies], (4, 1))
    _, shares = logistic_terms(genotypes, cases, ages[:, None], slopes, np.full(4, start))
    for variant in range(4):
        own = shares_by_hand(genotypes[:, variant], cases, ages, slopes[variant], start)
        alleles = max(own["first allele"], own["second allele"])
        expected = max(own["information"], own["score"], alleles / 5)
        assert shares[variant] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("minimum", "expected"), [(1, False), (10, False), (40, True)])
def test_a_person_has_one_part_in_as_many_as_the_hospital_counts(tmp_path, minimum, expected):
    client = hospital(tmp_path, genotypes_of(people=100), rows_of(people=100))
    # With this slope one person has a twenty-fifth or more.
    slopes, intercepts = np.tile([0.6, 0.0], (VARIANTS, 1)), np.zeros(VARIANTS)
    context = context_of(min_cell_count=minimum)
    sums, withheld = asked(client, slopes, intercepts, context=context)
    assert withheld.tolist() == [expected] * VARIANTS
    assert sums.any() != expected


def test_one_of_a_few_carriers_is_not_weighed_out(tmp_path):
    people, ages = 400, np.linspace(-40, 40, 400)
    genotypes = np.random.default_rng(0).binomial(2, 0.4, (people, VARIANTS)).astype(np.int8)
    genotypes[:, 2], genotypes[5::35, 2] = 0, 1  # 12 carriers
    rows = [
        {"patient": f"p{n}", "phenotype": n % 2, "age": 50 + float(age)}
        for n, age in enumerate(ages)
    ]
    client = hospital(tmp_path, genotypes, rows)
    # So steep that about thirty people weigh: of the carriers one, at that age.
    slopes, age = np.tile([0.8, 0.0], (VARIANTS, 1)), ages[5 + 35 * 6]
    _, withheld = asked(client, slopes, np.full(VARIANTS, -0.8 * age))
    assert withheld.tolist() == [False, False, True, False, False, False]
    _, withheld = asked(client, np.zeros((VARIANTS, 2)), np.zeros(VARIANTS))
    assert not withheld.any()


@pytest.mark.parametrize(("people", "share", "effect"), [(50, 0.5, 1.0), (200, 0.1, 1.0)])
def test_honest_fits_of_fifty_people_and_more_are_told(people, share, effect):
    generator = np.random.default_rng(people)
    parts = []
    for _ in range(3):
        genotypes = generator.binomial(2, np.linspace(0.15, 0.5, 20), (people, 20)).astype(np.int8)
        covariates = np.column_stack(
            [generator.normal(0, 12, people), generator.integers(0, 2, people) - 0.5]
        )
        line = 0.08 * covariates[:, 0] + 0.5 * covariates[:, 1] + effect * (genotypes[:, 0] - 0.3)
        cases = line + generator.logistic(size=people) > np.quantile(line, 1 - share)
        parts.append((genotypes, cases, covariates - covariates.mean(0)))
    counts = [
        np.array([[(cases == is_case).sum()] * 20 for _, cases, _ in parts])
        for is_case in (True, False)
    ]
    assert min(counts[0].min(), counts[1].min()) >= 10
    fit, largest = LogisticFit(*counts, 2), 0.0
    while len(waiting := fit.waiting):
        found = [
            logistic_terms(genotypes[:, waiting], cases, x, fit.slopes[waiting], own[waiting])
            for (genotypes, cases, x), own in zip(parts, fit.intercepts, strict=True)
        ]
        largest = max(largest, *(shares.max() for _, shares in found))
        fit.step(np.array([terms for terms, _ in found]), waiting)
    assert not fit.failed.any()
    assert largest < 0.1


def withholding(places):
    """Return a client base whose sites withhold variants after so many steps: {(site, line): n}."""
    steps = {}

    def answer(client, message):
        content = GenomicsClient.queries["logistic"](client, message)
        lines = view(message.content["block"]["lines"])
        told = content["sums"]
        values, withheld = view(told["values"]).copy(), view(told["withheld"]).copy()
        for place, line in enumerate(lines.tolist()):
            key = client.site.index, line
            steps[key] = steps.get(key, 0) + 1
            if steps[key] > places.get(key, 99):
                values[place], withheld[place] = 0, True
        content["sums"] = ArrayRecord({"values": Array(values), "withheld": Array(withheld)})
        return content

    queries = {**GenomicsClient.queries, "logistic": answer}
    return type("Withholding", (GenomicsClient,), {"queries": queries})


def test_a_hospital_that_withholds_a_variant_is_left_out_of_it_alone(tmp_path):
    world = World(tmp_path)
    _, expected = study(world.client(), tmp_path, test="logistic")
    (tmp_path / "run").rename(tmp_path / "first")
    # At once, in the third step, and one hospital after the other.
    places = {(1, 4): 0, (1, 20): 2, (0, 30): 1, (2, 30): 3}
    places |= {(site, 7): 1 for site in range(3)}
    summary, lines = study(world.client(withholding(places)), tmp_path, test="logistic")
    assert summary["failures"] == []
    for variant, sites in ((4, (0, 2)), (20, (0, 2)), (30, (1,))):
        line = lines[f"rs{variant:02d}"]
        outcome, design = world.pooled(variant, sites)
        model = sm.Logit(outcome, design).fit(disp=0, method="newton", tol=1e-12)
        np.testing.assert_allclose(float(line["effect"]), np.exp(model.params[-1]), rtol=1e-7)
        np.testing.assert_allclose(float(line["se"]), model.bse[-1], rtol=1e-7)
        assert (line["sites"], line["people"]) == (str(len(sites)), str(len(outcome)))
        left = ", ".join(f"hospital-{site + 1}" for site in range(3) if site not in sites)
        assert line["note"] == f"one person weighs too much: {left}"
    everywhere = "one person weighs too much: hospital-1, hospital-2, hospital-3"
    assert lines["rs07"]["note"] == f"{everywhere}; no hospital counts"
    assert lines["rs07"]["p"] == "nan"
    others = set(lines) - {"rs04", "rs07", "rs20", "rs30"}
    assert all(lines[name] == expected[name] for name in others)
    told = [summary["sites"][f"hospital-{site}"]["withheld"] for site in (1, 2, 3)]
    assert told == [2, 3, 2]


def test_what_does_not_say_which_variants_are_withheld_leaves_its_site_out(tmp_path):
    def answer(client, message):
        content = GenomicsClient.queries["logistic"](client, message)
        if client.site.index == 1:
            values = view(content["sums"]["values"])
            wrong = Array(np.zeros(len(values) + 1, bool))
            content["sums"] = ArrayRecord({"values": Array(values), "withheld": wrong})
        return content

    queries = {**GenomicsClient.queries, "logistic": answer}
    summary, lines = study(World(tmp_path).client(queries=queries), tmp_path, test="logistic")
    (failure,) = summary["failures"]
    text = "malformed answer: withheld must be bool of shape (15,), got bool of (16,)"
    assert failure["reason"] == text
    assert {line["sites"] for line in lines.values()} == {"2"}


def thresholds_of(trees):
    """Return the thresholds of each feature in trees."""
    found = {}
    for tree in trees:
        columns = zip(
            tree["left_children"], tree["split_indices"], tree["split_conditions"], strict=True
        )
        for child, feature, value in columns:
            if child >= 0:
                found.setdefault(feature, set()).add(value)
    return found


def patient_of_row(rows, low, high):
    """Return the patients with a value of `a` from `low` to below `high`."""
    values = [(row["patient"], np.float32(row["a"])) for row in rows]
    return {patient for patient, value in values if low <= value < high}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(20, 150),
    digits=st.integers(0, 3),
    visits=st.integers(1, 3),
    minimum=st.sampled_from([1, 3, 10]),
)
def test_ten_patients_lie_between_any_two_thresholds(seed, count, digits, visits, minimum):
    generator = np.random.default_rng(seed)
    values = np.round(generator.standard_cauchy(count), digits).tolist()
    rows = [
        {
            "patient": number // visits,
            "a": math.nan if generator.random() < 0.2 else value,
            "y": int(generator.random() < 0.2 + 0.6 * (value > 0.3)),
        }
        for number, value in enumerate(values)
    ]
    if len({row["patient"] for row in rows}) < minimum:
        return
    schema = Schema("y", "binary", ("a",))
    members = {"schema": schema, "load_data": lambda self, site: SiteData(rows)}
    client = type("Cauchy", (Hospital,), members)
    config = {"preparation": "site", "min-cell-count": minimum, "tree-lambda": 0.0}
    context = context_of(num_sites=1, **DECLARED | config)
    form, grown = as_trees(client(context)).form, []
    for server_round in range(4):
        sent = ArrayRecord([np.frombuffer(write_trees(form, grown), np.uint8)])
        reply = ask(client, "train", context, sent, trees="bagging", server_round=server_round)
        assert not reply.has_error(), reply.error.reason
        grown += read_trees(model_bytes(reply.content["arrays"]), form, 1)
    cuts = sorted(thresholds_of(grown).get(0, ()))
    inner = [cut for cut in cuts if abs(cut) < BEYOND]
    assert {abs(cut) for cut in cuts} - {*map(abs, inner)} <= {BEYOND}
    for low, high in pairwise([-math.inf, *inner, math.inf] if inner else []):
        assert len(patient_of_row(rows, low, high)) >= minimum


def test_with_a_declared_range_thresholds_are_multiples_of_a_round_step():
    model, trees = bagged(Hospital, 6, min_cell_count=5)
    found = thresholds_of(read_trees(model, trees.form, 6))
    assert {*found} >= {0, 1}
    fifths = {float(np.float32(number * 0.2)) for number in range(-25, 26)}
    for feature, cuts in found.items():
        assert cuts <= ((fifths if feature < 2 else {0.5}) | {BEYOND})
    # No row's own value among them: those have many digits.
    values = {float(np.float32(row["a"])) for row in trees.data().train}
    assert not values & found[0]


@given(
    arrays(np.float32, st.integers(1, 60), elements=st.floats(-9, 9, width=32) | st.just(math.nan))
)
def test_each_bin_between_edges_has_enough_patients(values):
    patients = np.arange(len(values)) // 2
    edges = quantile_edges(values, patients, 3)
    assert (np.diff(edges) > 0).all()
    bins = in_bins(values[:, None], [edges])[:, 0]
    assert (np.isnan(bins) == np.isnan(values)).all()
    for number in range(len(edges) + 1 if len(edges) else 0):
        assert len({*patients[bins == number]}) >= 3


def test_an_edge_is_the_roundest_number_between_two_values():
    cases = {
        (61.37, 61.92): 61.6,
        (61, 62): 62,
        (0.012, 0.021): 0.02,
        (-3, 2): 0,
        (900, 1300): 1000,
    }
    cases |= {(-0.8, -0.7): -0.7, (149.99, 150.01): 150, (-5, 0): 0, (0, 7): 4}
    for (low, high), expected in cases.items():
        assert roundest(np.float32(low), np.float32(high)) == np.float32(expected)
    assert quantile_edges(np.arange(7, dtype=np.float32), np.arange(7), 3).tolist() == [3]
    assert quantile_edges(np.ones(9, np.float32), np.arange(9), 3).tolist() == []
    # Nine rows of two patients.
    assert quantile_edges(np.arange(9, dtype=np.float32), np.arange(9) % 2, 3).tolist() == []
    assert spaced_edges(-1, 1.1, 0.5).tolist() == [-1, -0.5, 0, 0.5, 1]


def test_there_are_no_more_edges_than_bins_of_xgboost():
    values = np.random.default_rng(0).normal(size=3000).astype(np.float32)
    edges = quantile_edges(values, np.arange(3000), 1)
    assert len(edges) == 249
    assert len(np.unique(in_bins(values[:, None], [edges]))) == 250


def sent_stumps(*cuts):
    """Return the trees of a server that parts people at values of `a`."""
    return [
        STUMP | {"split_conditions": [float(cut), -1.0, 1.0], "split_indices": [0] * 3}
        for cut in cuts
    ]


@pytest.mark.parametrize(
    ("cuts", "minimum", "told"),
    [
        ((), 10, True),
        ((0.0,), 10, True),
        # Below -2 are nobody.
        ((-9.0,), 10, True),
        ((-1.9,), 10, False),
        ((-1.9,), 1, True),
        # Each tree has many on both sides, but both together hold one person.
        ((0.0, 0.05), 10, False),
        ((0.0, 0.05), 1, True),
    ],
)
def test_no_loss_is_told_of_trees_that_part_few_from_all_others(cuts, minimum, told):
    schema = Schema("y", "binary", ("a",))
    rows = [
        {"patient": n, "a": float(value), "y": n % 2}
        for n, value in enumerate(
            [*np.linspace(-1, -0.1, 20), 0.02, *np.linspace(0.1, 1, 20), -1.95]
        )
    ]
    splits = SiteData(rows, [row | {"patient": f"v{row['patient']}"} for row in rows])
    members = {"schema": schema, "load_data": lambda self, site: splits}
    client = type("Line", (Hospital,), members)
    config = {"preparation": "site", "min-cell-count": minimum}
    context = context_of(num_sites=1, **DECLARED | config)
    form = as_trees(client(context)).form
    sent = ArrayRecord([np.frombuffer(write_trees(form, sent_stumps(*cuts)), np.uint8)])
    for kind in ("train", "evaluate"):
        reply = ask(client, kind, context, sent, trees="bagging")
        assert not reply.has_error(), reply.error.reason
        (metrics,) = reply.content.metric_records.values()
        assert ("loss" in metrics) == told
        assert metrics["num-examples"] == 42
