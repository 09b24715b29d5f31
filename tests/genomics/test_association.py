import warnings

import mpmath
import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.contingency_tables import StratifiedTable, Table
from statsmodels.stats.meta_analysis import combine_effects

from fedmed_flower.genomics import regression
from fedmed_flower.genomics.association import (
    allelic_test,
    count_copies,
    genomic_inflation,
    log10_of_text,
    log10_p_of_t,
    log10_p_of_z,
    p_text,
    spread_of,
    spread_of_terms,
    spread_terms,
    trend_test,
    withheld,
)
from fedmed_flower.genomics.regression import (
    LogisticFit,
    linear_sums,
    linear_test,
    logistic_terms,
    own_intercepts,
    principal_components,
    profile_parts,
    profile_terms,
    standardised,
)


@pytest.fixture
def people():
    """Three hospitals with 80, 120 and 50 people, 12 variants and two covariates."""
    generator, found = np.random.default_rng(5), []
    for number, count in enumerate((80, 120, 50)):
        genotypes = generator.binomial(2, np.linspace(0.1, 0.7, 12), (count, 12)).astype(np.int8)
        covariates = generator.normal(size=(count, 2)) * (1, 30) + (number, 500)
        line = 0.6 * genotypes[:, 3] - 0.4 * covariates[:, 0] + number - 1
        cases = generator.random(count) < 1 / (1 + np.exp(-line))
        genotypes[generator.random(genotypes.shape) < 0.05] = -127
        trait = line + generator.normal(size=count) + 1e4
        found.append((genotypes, cases, covariates, trait))
    return found


def pooled(people, variant, trait):
    """Return outcome, design (hospitals, covariates, copies) of the people with a genotype."""
    outcome = np.concatenate([part[trait] for part in people]).astype(float)
    genotypes = np.concatenate([part[0][:, variant] for part in people])
    covariates = np.concatenate([part[2] for part in people])
    site = np.repeat(np.arange(len(people)), [len(part[0]) for part in people])
    design = np.column_stack([np.eye(len(people))[site], covariates, genotypes])
    known = genotypes >= 0
    return outcome[known], design[known]


def test_copies_are_counted_by_hand():
    genotypes = np.array([[0, 2], [1, -127], [2, 1], [-127, 1]], np.int8)
    cases = np.array([True, False, False, True])
    # Cases, controls, copies in cases, in controls, sum of squares.
    expected = [[1, 2, 0, 3, 5], [2, 1, 3, 1, 6]]
    assert count_copies(genotypes, cases, squares=True).tolist() == expected
    assert count_copies(genotypes, cases, squares=False)[:, 4].tolist() == [0, 0]


def test_few_alleles_or_people_are_withheld_and_none_are_told():
    # cases, controls, copies in cases, copies in controls, squares
    counts = np.array(
        [
            [50, 50, 4, 5, 0],  # nine copies of A1
            [50, 50, 100, 91, 0],  # nine of A2
            [50, 50, 5, 5, 0],
            [50, 50, 0, 0, 0],
            [9, 50, 9, 20, 0],
            [0, 50, 0, 20, 0],
            [50, 9, 20, 9, 0],
        ]
    )
    assert withheld(counts, 10).tolist() == [True, True, False, False, True, False, True]
    assert not withheld(counts, 1).any()


def counts_of(people):
    """Return the counts of each hospital."""
    return np.stack([count_copies(part[0], part[1], squares=True) for part in people])


def tables(people, variant):
    """Return genotypes by case status of each hospital: (cases, controls) by 0, 1, 2 copies."""
    return [
        np.array([[((genotypes[:, variant] == g) & (cases == c)).sum() for g in range(3)]
                  for c in (True, False)])
        for genotypes, cases, _, _ in people
    ]  # fmt: skip


def require_spread(found, variant, effects, errors):
    """Compare Q and I2 with statsmodels' meta-analysis."""
    expected = combine_effects(np.asarray(effects), np.asarray(errors) ** 2)
    np.testing.assert_allclose(found.q[variant], expected.q, rtol=1e-8)
    q_p = stats.chi2.sf(expected.q, len(effects) - 1)
    np.testing.assert_allclose(found.q_p[variant], q_p, rtol=1e-8)
    i2 = 100 * max(0, 1 - (len(effects) - 1) / expected.q)
    np.testing.assert_allclose(found.i2[variant], i2, atol=1e-6)


def test_the_allelic_test_is_that_of_statsmodels_by_hospital(people):
    found = allelic_test(counts_of(people))
    for variant in range(12):
        alleles = [np.column_stack([t @ [0, 1, 2], t @ [2, 1, 0]]) for t in tables(people, variant)]
        expected = StratifiedTable([table.astype(float) for table in alleles])
        test = expected.test_null_odds(correction=False)
        np.testing.assert_allclose(found.statistic[variant], test.statistic, rtol=1e-10)
        np.testing.assert_allclose(10 ** found.log10_p[variant], test.pvalue, rtol=1e-9)
        np.testing.assert_allclose(found.effect[variant], expected.oddsratio_pooled, rtol=1e-12)
        np.testing.assert_allclose(found.se[variant], expected.logodds_pooled_se, rtol=1e-12)
        low, high = expected.oddsratio_pooled_confint()
        np.testing.assert_allclose([found.low[variant], found.high[variant]], [low, high])
        single = [sm.stats.Table2x2(table) for table in alleles]
        require_spread(
            found, variant, [t.log_oddsratio for t in single], [t.log_oddsratio_se for t in single]
        )


def test_the_trend_test_is_that_of_statsmodels_by_hospital(people):
    counts = counts_of(people)
    found = trend_test(counts)
    for variant in range(12):
        single = [
            Table(table, shift_zeros=False).test_ordinal_association(
                row_scores=np.array([1, 0]), col_scores=np.arange(3)
            )
            for table in tables(people, variant)
        ]
        excess = sum(test.statistic - test.null_mean for test in single)
        variance = sum(test.null_sd**2 for test in single)
        np.testing.assert_allclose(found.statistic[variant], excess**2 / variance, rtol=1e-10)
        p = stats.chi2.sf(excess**2 / variance, 1)
        np.testing.assert_allclose(10 ** found.log10_p[variant], p, rtol=1e-9)
    allelic = allelic_test(counts)
    for name in ("effect", "se", "low", "high", "q", "q_p", "i2"):
        np.testing.assert_array_equal(getattr(found, name), getattr(allelic, name))


def test_with_one_hospital_both_tests_are_the_usual_ones_but_for_one_person(people):
    counts = counts_of(people[:1])
    allelic, trend = allelic_test(counts), trend_test(counts)
    (table,) = tables(people[:1], 3)
    alleles = np.column_stack([table @ [0, 1, 2], table @ [2, 1, 0]])
    chi2, *_ = stats.chi2_contingency(alleles, correction=False)
    n = alleles.sum()
    np.testing.assert_allclose(allelic.statistic[3], chi2 * (n - 1) / n, rtol=1e-10)
    cases, design = pooled(people[:1], 3, 1)
    n = len(cases)
    chi2 = n * np.corrcoef(cases, design[:, -1])[0, 1] ** 2
    np.testing.assert_allclose(trend.statistic[3], chi2 * (n - 1) / n, rtol=1e-10)
    # One hospital differs from no other.
    assert np.isnan([allelic.q, allelic.q_p, allelic.i2]).all()


def test_a_hospital_with_more_cases_and_another_frequency_makes_no_hit():
    # 60 and 20 of 100 are cases, with a frequency of .5 and .1 among cases as among controls.
    counts = np.array([[[60, 40, 60, 40, 150]], [[20, 80, 4, 16, 22]]])
    alleles = [[64, 160 - 64], [56, 240 - 56]]
    assert stats.chi2_contingency(alleles, correction=False)[1] < 0.002
    for test in (allelic_test, trend_test):
        found = test(counts)
        assert found.statistic[0] == pytest.approx(0, abs=1e-20)
        assert found.effect[0] == pytest.approx(1, rel=1e-12)
        assert found.q[0] == pytest.approx(0, abs=1e-20)
        assert found.i2[0] == 0


def test_a_hospital_with_cases_only_adds_nothing_to_both_tests(people):
    counts = counts_of(people)
    alone = counts[:1].copy()
    alone[:, :, 1] = alone[:, :, 3] = 0
    for test in (allelic_test, trend_test):
        np.testing.assert_allclose(test(np.concatenate([counts, alone])), test(counts), rtol=1e-12)


def test_variants_without_a_result_give_nan_and_no_warning():
    counts = np.array([[10, 10, 0, 0, 0], [0, 20, 0, 9, 15], [0, 0, 0, 0, 0], [9, 9, 18, 18, 36]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for test in (allelic_test, trend_test):
            assert all(np.isnan(column).all() for column in test(counts[None]))
            # Nor if the hospitals differ, but nobody from the others of the same hospital.
            apart = np.array([[[10, 10, 0, 0, 0]], [[9, 9, 18, 18, 36]]])
            assert all(np.isnan(column).all() for column in test(apart))
    # No copy among the controls: a statistic, but no odds ratio.
    found = allelic_test(np.array([[[10, 10, 5, 0, 5]]]))
    assert found.statistic[0] == pytest.approx(39 * (5 * 20) ** 2 / (20 * 20 * 5 * 35))
    assert np.isnan([found.effect, found.se, found.low, found.high]).all()


def test_small_p_values_do_not_vanish():
    np.testing.assert_allclose(10 ** log10_p_of_z(np.array([1.96, -3])), [0.05, 0.0027], rtol=1e-3)
    # log10 of 2 * Q(60), by its expansion phi(z) / z * (1 - 1 / z^2 + 3 / z^4).
    tail = -1800 - np.log(60 * np.sqrt(2 * np.pi)) + np.log(2 * (1 - 1 / 3600 + 3 / 3600**2))
    assert log10_p_of_z(np.array([60.0]))[0] == pytest.approx(tail / np.log(10), rel=1e-9)
    t, freedom = np.array([2.5, 36.0, 36.5]), np.array([10.0, 5000.0, 5000.0])
    np.testing.assert_allclose(
        log10_p_of_t(t, freedom), np.log10(2 * stats.t.sf(t, freedom)), rtol=1e-9
    )
    # Of scipy's own continuation nothing is left there: mpmath's incomplete beta function.
    for statistic, freedom in ((200, 500), (60, 2500), (45, 1e6)):
        x = mpmath.mpf(freedom) / (freedom + statistic**2)
        p = mpmath.betainc(freedom / 2, 0.5, 0, x, regularized=True)
        found = log10_p_of_t(np.array([float(statistic)]), np.array([float(freedom)]))[0]
        assert found == pytest.approx(float(mpmath.log10(p)), abs=1e-6)


def test_p_values_as_text():
    assert p_text(np.nan) == "nan"
    assert p_text(-2.0) == "0.01"
    assert p_text(-400.5) == "3.162277660e-401"
    assert log10_of_text("3.162277660e-401") == pytest.approx(-400.5, abs=1e-9)
    assert log10_of_text("0.05") == pytest.approx(np.log10(0.05))
    assert np.isnan(log10_of_text("nan"))
    assert log10_of_text("0") == -np.inf


def test_genomic_inflation():
    p = (np.arange(999) + 1) / 1000
    assert genomic_inflation(np.log10(p)) == pytest.approx(1)
    statistic = stats.chi2.isf(p, 1) * 1.3
    assert genomic_inflation(stats.chi2.logsf(statistic, 1) / np.log(10)) == pytest.approx(1.3)
    assert np.isnan(genomic_inflation(np.array([np.nan])))


def test_linear_models_are_those_of_the_pooled_people(people):
    # At one hospital a covariate is constant, which its own model then leaves out.
    people[2][2][:, 1] = 7.0
    sums = np.stack([linear_sums(genotypes, trait, x) for genotypes, _, x, trait in people])
    count = np.array([(part[0] >= 0).sum(0) for part in people])
    found = linear_test(sums, count)
    for variant in range(12):
        trait, design = pooled(people, variant, 3)
        model = sm.OLS(trait, design).fit()
        np.testing.assert_allclose(found.effect[variant], model.params[-1], rtol=1e-8)
        np.testing.assert_allclose(found.se[variant], model.bse[-1], rtol=1e-8)
        np.testing.assert_allclose(10 ** found.log10_p[variant], model.pvalues[-1], rtol=1e-7)
        interval = model.conf_int()[-1]
        np.testing.assert_allclose([found.low[variant], found.high[variant]], interval, rtol=1e-7)
        own = []
        for site, part in enumerate(people):
            trait, design = pooled([part], variant, 3)
            own.append(sm.OLS(trait, np.delete(design, 2, 1) if site == 2 else design).fit())
        require_spread(found, variant, [m.params[-1] for m in own], [m.bse[-1] for m in own])


def fit_logistic(people):
    cases = np.array([[(part[1] & (g >= 0)).sum() for g in part[0].T] for part in people])
    controls = np.array([[(~part[1] & (g >= 0)).sum() for g in part[0].T] for part in people])
    fit, steps = LogisticFit(cases, controls, people[0][2].shape[1]), 0
    centred = [part[2] - part[2].mean(0) for part in people]
    while len(waiting := fit.waiting) and steps < 25:
        terms = [
            logistic_terms(part[0][:, waiting], part[1], x, fit.slopes[waiting], own[waiting])[0]
            for part, x, own in zip(people, centred, fit.intercepts, strict=True)
        ]
        terms = np.where(fit.taking[:, waiting, None], terms, 0)
        fit.step(terms, waiting)
        steps += 1
    return fit.finish(), fit, steps


def test_logistic_models_are_those_of_the_pooled_people(people):
    found, _, steps = fit_logistic(people)
    assert steps < 10
    for variant in range(12):
        cases, design = pooled(people, variant, 1)
        model = sm.Logit(cases, design).fit(disp=0, method="newton", tol=1e-12)
        np.testing.assert_allclose(np.log(found.effect[variant]), model.params[-1], rtol=1e-6)
        np.testing.assert_allclose(found.se[variant], model.bse[-1], rtol=1e-6)
        np.testing.assert_allclose(10 ** found.log10_p[variant], model.pvalues[-1], rtol=1e-6)
        interval = np.exp(model.conf_int()[-1])
        np.testing.assert_allclose([found.low[variant], found.high[variant]], interval, rtol=1e-6)
        slopes, errors = [], []
        for site, part in enumerate(people):
            cases, design = pooled([part], variant, 1)
            own = sm.Logit(cases, design)
            common = np.concatenate([model.params[site : site + 1], model.params[3:]])
            inverse = np.linalg.inv(-own.hessian(common))
            slopes.append((common + inverse @ own.score(common))[-1])
            errors.append(np.sqrt(inverse[-1, -1]))
        require_spread(found, variant, slopes, errors)


def test_the_spread_of_logistic_models_is_nearly_that_of_models_fitted_at_each_hospital(people):
    generator = np.random.default_rng(3)
    apart = []
    for slope, (genotypes, _, covariates, trait) in zip((-1.0, 0.0, 1.0), people, strict=True):
        genotypes = np.tile(genotypes, (8, 1))
        line = slope * np.maximum(genotypes[:, 5], 0) - slope
        cases = generator.random(len(genotypes)) < 1 / (1 + np.exp(-line))
        apart.append((genotypes, cases, np.tile(covariates, (8, 1)), trait))
    found, _, _ = fit_logistic(apart)
    for variant in range(12):
        own = [sm.Logit(*pooled([part], variant, 1)).fit(disp=0) for part in apart]
        variances = np.array([model.bse[-1] ** 2 for model in own])
        expected = combine_effects(np.array([model.params[-1] for model in own]), variances)
        assert found.q[variant] == pytest.approx(expected.q, rel=0.15, abs=0.1)
    assert found.q_p[5] < 1e-12
    assert found.i2[5] > 90


def test_one_allele_at_all_hospitals_gives_no_logistic_model(people):
    # The sums are large, and what is left of them is rounding.
    for count in range(20, 51):
        alone = [
            (np.full((count, 1), 2, np.int8), part[1][:count], np.zeros((count, 0)), None)
            for part in people
        ]
        found, fit, _ = fit_logistic(alone)
        assert fit.failed.all()
        assert np.isnan(found).all()


def test_separated_and_unidentified_variants_fail_and_the_others_go_on(people):
    genotypes = [part[0].copy() for part in people]
    for (_, cases, _, _), own in zip(people, genotypes, strict=True):
        own[:, 0] = cases  # tells cases from controls wholly
        own[:, 1] = 2  # one allele only
    changed = [(own, *part[1:]) for own, part in zip(genotypes, people, strict=True)]
    found, fit, _ = fit_logistic(changed)
    assert fit.failed.tolist() == [True, True] + [False] * 10
    assert np.isnan([column[:2] for column in found]).all()
    expected, _, _ = fit_logistic(people)
    np.testing.assert_allclose(found.effect[2:], expected.effect[2:], rtol=1e-12)


def test_a_hospital_with_cases_only_takes_no_part(people):
    alone = people[2][0], np.ones(50, bool), *people[2][2:]
    found, fit, _ = fit_logistic([*people[:2], alone])
    expected, _, _ = fit_logistic(people[:2])
    assert not fit.taking[2].any()
    np.testing.assert_allclose(found.effect, expected.effect, rtol=1e-10)


def test_a_model_that_goes_on_without_a_hospital_is_as_if_it_had_never_been_there(people):
    fits = []
    for left_out in (False, True):
        taking = people if left_out else people[:2]
        cases, controls = (
            np.array([[(part[1] == is_case)[g >= 0].sum() for g in part[0].T] for part in taking])
            for is_case in (True, False)
        )
        fit, steps = LogisticFit(cases, controls, 2), 0
        while len(waiting := fit.waiting):
            terms = [
                logistic_terms(part[0][:, waiting], part[1], x, fit.slopes[waiting], own)[0]
                for part, x, own in zip(
                    taking,
                    [part[2] - part[2].mean(0) for part in taking],
                    fit.intercepts[:, waiting],
                    strict=True,
                )
            ]
            fit.step(np.where(fit.taking[:, waiting, None], terms, 0), waiting)
            steps += 1
            if left_out and steps == 3:
                fit.leave_out(2, fit.waiting)
        fits.append(fit)
    np.testing.assert_array_equal(fits[0].slopes, fits[1].slopes)
    np.testing.assert_array_equal(fits[0].finish().se, fits[1].finish().se)


def test_a_step_that_goes_too_far_is_halved():
    # One rare exposure and a strong effect: from the start Newton's first step overshoots.
    copies = np.repeat([0, 2], [400, 4]).astype(np.int8)[:, None]
    cases = np.repeat([1, 0, 1, 0], [1, 399, 3, 1]).astype(bool)
    found, _, _ = fit_logistic([(copies, cases, np.zeros((404, 0)), None)])
    # Saturated: the odds ratio a copy is the root of that of the 2 x 2 table.
    assert found.effect[0] == pytest.approx(np.sqrt(3 * 399), rel=1e-8)


@pytest.mark.parametrize(
    ("people", "variants", "count", "most_columns", "most_rounds"),
    [(150, 600, 10, 400, 15), (150, 600, 10, 60, 40), (40, 600, 20, 400, 3), (12, 90, 10, 400, 2)],
)
def test_components_that_are_hardly_stronger_than_others_are_found(
    people, variants, count, most_columns, most_rounds, monkeypatch
):
    monkeypatch.setattr(regression, "_MOST_COLUMNS", most_columns)
    matrix = np.random.default_rng(4).normal(size=(people, variants))
    loadings, values, rounds = principal_components(
        lambda v: matrix.T @ (matrix @ v), variants, people, count, seed=0
    )
    _, strength, right = np.linalg.svd(matrix, full_matrices=False)
    np.testing.assert_allclose(values, strength[:count] ** 2 / variants, rtol=1e-9)
    np.testing.assert_allclose(np.abs((right[:count] * loadings.T).sum(1)), 1, rtol=1e-9)
    assert rounds <= most_rounds


def test_principal_components_are_those_of_the_pooled_matrix():
    generator = np.random.default_rng(2)
    base = generator.uniform(0.2, 0.8, 400)
    parts = [
        generator.binomial(2, np.clip(base + shift, 0.05, 0.95), (40, 400)).astype(np.int8)
        for shift in generator.normal(0, 0.12, (3, 400))
    ]
    parts[0][0, :5] = -127
    whole = np.concatenate(parts)
    frequency = np.where(whole < 0, 0, whole).sum(0) / 2 / (whole >= 0).sum(0)
    matrices = [standardised(part, frequency) for part in parts]
    loadings, values, rounds = principal_components(
        lambda v: sum(g.T @ (g @ v) for g in matrices), 400, 120, 2, seed=0
    )
    _, strength, right = np.linalg.svd(np.concatenate(matrices), full_matrices=False)
    np.testing.assert_allclose(values, strength[:2] ** 2 / 400, rtol=1e-8)
    np.testing.assert_allclose(np.abs((right[:2] * loadings.T).sum(1)), 1, rtol=1e-9)
    assert rounds < 15
    # A person's scores leave out what is missing.
    assert (matrices[0][0, :5] == 0).all()


def test_the_spread_of_effects_follows_from_sums():
    generator = np.random.default_rng(3)
    effects = generator.normal(size=(5, 4))
    errors = generator.uniform(0.1, 1.0, (5, 4))
    effects[1, 0] = np.inf
    errors[:4, 3] = np.nan
    known, terms = spread_terms(effects, errors, effects[0])
    found = spread_of_terms(known.sum(0), terms.sum(0))
    for ours, theirs in zip(found, spread_of(effects, errors), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    assert known.sum(0).tolist() == [4, 5, 5, 1]


def test_intercepts_and_terms_of_slopes_alone_are_those_of_statsmodels():
    generator = np.random.default_rng(5)
    genotypes = generator.binomial(2, 0.4, (80, 3)).astype(np.int8)
    genotypes[generator.random(genotypes.shape) < 0.1] = -127
    genotypes[:, 2] = np.where(genotypes[:, 2] < 0, -127, 2)
    covariates = generator.normal(size=(80, 2))
    cases = generator.random(80) < 0.3
    slopes = np.array([[0.3, -0.2, 0.7], [40.0, 0.0, -3.0], [0.1, 0.1, 0.1]])
    intercepts = own_intercepts(genotypes, cases, covariates, slopes)
    terms, _ = logistic_terms(genotypes, cases, covariates, slopes, intercepts)
    profiles = profile_terms(terms, 2)
    for variant in range(3):
        known = genotypes[:, variant] >= 0
        design = np.column_stack([covariates, genotypes[:, variant]])[known].astype(float)
        ones = np.ones((known.sum(), 1))
        model = sm.GLM(cases[known], ones, sm.families.Binomial(), offset=design @ slopes[variant])
        fit = model.fit(start_params=intercepts[variant : variant + 1], tol=1e-12)
        assert intercepts[variant] == pytest.approx(fit.params[0], rel=1e-6)
        risk = 1 / (1 + np.exp(-intercepts[variant] - design @ slopes[variant]))
        assert risk.sum() == pytest.approx(cases[known].sum(), rel=1e-12)
        weight = risk * (1 - risk)
        centred = design - weight @ design / weight.sum()
        score, information = profile_parts(profiles[variant], 2)
        np.testing.assert_allclose(score, (cases[known] - risk) @ centred, atol=1e-9)
        np.testing.assert_allclose(information, (weight * centred.T) @ centred, atol=1e-9)
    # Everybody has two copies of the last: what rounding leaves would be taken for a slope.
    assert not profile_parts(profiles[2], 2)[1][-1].any()
