"""One hospital of an association study: what it answers, withholds and refuses."""

import numpy as np
import pytest
from cohort import PEOPLE, VARIANTS, everything, genotypes_of, hospital, question, rows_of
from tiny import context_of, says

from fedmed_flower.arrays.views import view
from fedmed_flower.errors import DeclinedError, InputError
from fedmed_flower.genomics.association import count_copies
from fedmed_flower.genomics.regression import linear_sums, logistic_terms, standardised
from fedmed_flower.wire import read_error


def told(reply):
    assert not reply.has_error(), reply.error.reason
    return view(reply.content["sums"]["values"])


def test_it_tells_its_people_and_the_lines_of_its_bim_file(tmp_path):
    client = hospital(tmp_path)
    about = question(client, "cohort").content["cohort"]
    assert dict(about) == {
        **{"people": 40, "cases": 20, "variants": 6, "minimum": 10},
        **{"trait": "binary", "phenotype": "phenotype", "covariates": ["age"]},
    }
    listed = question(client, "variants", {"offset": 0, "count": 2}).content
    assert listed["variants"]["names"] == "rs0\nrs1"
    assert view(listed["positions"]["positions"]).tolist() == [10, 20]
    rest = question(client, "variants", {"offset": listed["variants"]["offset"], "count": 9})
    assert rest.content["variants"]["names"] == "rs2\nrs3\nrs4\nrs5"


def test_it_counts_its_people_and_turns_swapped_alleles(tmp_path):
    client, cases = hospital(tmp_path), np.arange(PEOPLE) % 2 == 1
    found = told(question(client, "counts", {"squares": True}, **everything(swapped=[1, 2])))
    genotypes = genotypes_of()
    genotypes[:, 1:3] = np.where(genotypes[:, 1:3] < 0, -127, 2 - genotypes[:, 1:3])
    np.testing.assert_array_equal(found, count_copies(genotypes, cases, squares=True))


def test_only_people_with_row_phenotype_and_covariates_count(tmp_path, caplog):
    rows = rows_of()
    del rows[39]
    rows[0]["age"], rows[1]["phenotype"], rows[2]["patient"] = np.nan, None, "stranger"
    client = hospital(tmp_path, rows=rows)
    assert question(client, "cohort").content["cohort"]["people"] == 36
    found = told(question(client, "counts", **everything()))
    kept = genotypes_of()[3:39]
    np.testing.assert_array_equal(found, count_copies(kept, np.arange(3, 39) % 2 == 1, False))
    assert [record.getMessage() for record in caplog.records] == [
        "hospital-1: 2 people of the fam file have no row: they take no part",
        "hospital-1: 1 rows have no person in the fam file: they take no part",
        "hospital-1: 2 people lack the phenotype or a covariate: they take no part",
    ]


def test_a_rare_allele_is_withheld_here_and_asked_in_vain(tmp_path):
    genotypes = genotypes_of()
    genotypes[:, 0], genotypes[:9, 0] = 0, 1
    genotypes[:, 2], genotypes[:10, 2] = 2, 1
    genotypes[:, 4] = 0
    client = hospital(tmp_path, genotypes)
    found = told(question(client, "counts", **everything()))
    assert (found[0] == -1).all()
    assert (found[1:] >= 0).all()
    text = "site hospital-1: models were requested of variants whose counts are withheld"
    frequencies, loadings = np.full(VARIANTS, 0.4), np.ones((VARIANTS, 1))
    for name, more in (
        ("linear", {}),
        ("logistic", {"slopes": np.zeros((6, 2)), "intercepts": np.zeros(6)}),
        ("loadings", {"frequencies": frequencies, "loadings": loadings}),
    ):
        assert question(client, name, **everything(), **more).error.reason == text
    # What a simulation asks for holds; a hospital's own node config goes before the run's.
    lower = context_of(min_cell_count=1)
    assert (told(question(client, "counts", context=lower, **everything())) >= 0).all()
    node = {"site-name": "north", "data-dir": str(tmp_path), "min-cell-count": 12}
    strict = context_of(node_config=node, min_cell_count=1)
    found = told(question(client, "counts", context=strict, **everything()))
    assert (found == -1).all(1).tolist() == [True, False, True, False, False, False]


@pytest.mark.parametrize(
    ("phenotypes", "text"),
    [
        ([1] * 9 + [0] * 31, "declined: it has fewer cases than min-cell-count"),
        ([0] * 9 + [1] * 31, "declined: it has fewer controls than min-cell-count"),
        ([0] * 5 + [None] * 35, "declined: it has fewer people than min-cell-count"),
        ([1] * 40, None),
    ],
)
def test_a_hospital_with_few_people_takes_no_part(tmp_path, phenotypes, text):
    rows = [row | {"phenotype": p} for row, p in zip(rows_of(), phenotypes, strict=True)]
    client = hospital(tmp_path, rows=rows, coding="0/1")
    for name in ("cohort", "counts"):
        reply = question(client, name, **everything())
        if text is None:
            assert not reply.has_error()
        else:
            assert reply.error.reason == f"site hospital-1: {text}"


def test_a_hospital_with_a_budget_declines(tmp_path):
    node = {"site-name": "north", "data-dir": str(tmp_path)}
    node |= {"budget-epsilon": 1.0, "budget-delta": 1e-5}
    client = hospital(tmp_path)
    for name in ("cohort", "variants", "counts", "linear", "logistic", "loadings", "scores"):
        reply = question(client, name, context=context_of(node_config=node), **everything())
        expected = "site north: declined: an association study carries no noise"
        assert reply.error.reason == expected
    with pytest.raises(DeclinedError):
        client(context_of(privacy="patient")).cohort()


def test_the_models_take_centred_covariates_and_the_scores_that_stayed(tmp_path):
    client, context = hospital(tmp_path), context_of()
    genotypes, cases = genotypes_of(), np.arange(PEOPLE) % 2 == 1
    age = np.array([[row["age"]] for row in rows_of()])
    age -= age.mean()
    slopes, intercepts = np.full((6, 2), 0.01), np.linspace(-1, 1, 6)
    found = told(question(client, "logistic", **everything(), slopes=slopes, intercepts=intercepts))
    expected, _ = logistic_terms(genotypes, cases, age, slopes, intercepts)
    # Sums of which the summands cancel are rounded as their size allows.
    largest = np.column_stack([np.ones(PEOPLE), np.abs(age), np.full(PEOPLE, 2.0)])
    size = np.concatenate([largest.sum(0), (largest.T @ largest)[np.triu_indices(3)]])
    rounding = PEOPLE * np.finfo(float).eps * size
    assert (np.abs(found - expected) <= 1e-12 * np.abs(expected) + rounding).all()
    frequency, loadings = np.full(VARIANTS, 0.4), np.eye(VARIANTS)[:, :2]
    more = {"frequencies": frequency, "loadings": loadings}
    matrix = standardised(genotypes, frequency)
    product = told(question(client, "loadings", context=context, **everything(), **more))
    np.testing.assert_allclose(product, matrix.T @ (matrix @ loadings), rtol=1e-12, atol=1e-12)
    reply = question(client, "scores", context=context, **everything(), **more)
    # Not a number of it leaves.
    assert list(reply.content) == ["site"]
    scores = matrix[:, :2] - matrix[:, :2].mean(0)
    found = told(question(client, "linear", context=context, **everything()))
    expected = linear_sums(genotypes, cases.astype(float), np.column_stack([age, scores]))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"phenotype": "2"}, "phenotype of patient p0 must be a number, got '2'"),
        ({"age": "old"}, "age of patient p0 must be a number, got 'old'"),
        ({"patient": "p1"}, "patient p1 has two rows: an association takes one a person"),
        ({"phenotype": 2}, "phenotype of a binary trait must be 0 for controls and 1 for cases, "
         'or 1 and 2 as PLINK writes them if you declare coding="1/2", got 2'),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_refused(tmp_path, change, text):
    rows = rows_of()
    rows[0] |= change
    reply = question(hospital(tmp_path, rows=rows), "cohort")
    assert reply.error.reason == f"site hospital-1: {text}"


def test_plinks_codes_of_missing_values_are_missing(tmp_path, caplog):
    rows = rows_of()
    rows[0]["age"], rows[1]["phenotype"], rows[2]["age"], rows[3]["age"] = -9, -9, "NA", " nan "
    client = hospital(tmp_path, rows=rows)
    assert question(client, "cohort").content["cohort"]["people"] == 36
    text = "hospital-1: 4 people lack the phenotype or a covariate: they take no part"
    assert [record.getMessage() for record in caplog.records] == [text]
    # By column, others are declared, or none.
    rows[2]["age"], rows[3]["age"] = 99, 50.0
    client = hospital(tmp_path, rows=rows, missing={"age": (99, -1)})
    assert question(client, "cohort").content["cohort"]["people"] == 38
    client = hospital(tmp_path, rows=rows, missing={"age": ()})
    assert question(client, "cohort").content["cohort"]["people"] == 39


def test_a_quantitative_phenotype_of_minus_nine_does_not_hide_a_hit(tmp_path):
    genotypes = genotypes_of()
    rows = rows_of()
    for row, copies in zip(rows, genotypes[:, 2], strict=True):
        row["phenotype"] = 20.0 + 3 * int(copies) + 0.1 * row["age"]
    rows[4]["phenotype"] = rows[5]["phenotype"] = -9
    client = hospital(tmp_path, genotypes, rows, trait="continuous")
    found = told(question(client, "linear", **everything()))
    kept = np.delete(np.arange(PEOPLE), [4, 5])
    trait = np.array([rows[n]["phenotype"] for n in kept])
    age = np.array([[rows[n]["age"]] for n in kept])
    np.testing.assert_allclose(found, linear_sums(genotypes[kept], trait, age), rtol=1e-9)


@pytest.mark.parametrize(
    ("written", "coding", "expected"),
    [
        ((1, 2), "1/2", (0, 1)),
        ((0, 1), "", (0, 1)),
        ((0, 1), "0/1", (0, 1)),
        ((False, True), "", (0, 1)),
    ],
)
def test_cases_and_controls_are_those_of_the_declared_coding(tmp_path, written, coding, expected):
    rows = [row | {"phenotype": written[row["phenotype"]]} for row in rows_of()]
    rows[0]["phenotype"] = 0 if coding == "1/2" else None
    rows[1]["phenotype"] = -9
    client = hospital(tmp_path, rows=rows, coding=coding)
    about = question(client, "cohort").content["cohort"]
    assert (about["people"], about["cases"]) == (38, 19)
    found = told(question(client, "counts", **everything()))
    cases = np.array([expected[n % 2] == 1 for n in range(2, PEOPLE)])
    np.testing.assert_array_equal(found, count_copies(genotypes_of()[2:], cases, False))


@pytest.mark.parametrize(
    ("written", "has"), [((1, 1), "1"), ((1, 2), "1 and 2"), ((2, 2), "2"), ((0, 2), "0 and 2")]
)
def test_ones_and_twos_are_not_taken_for_cases(tmp_path, written, has):
    rows = [row | {"phenotype": written[row["phenotype"]]} for row in rows_of()]
    reply = question(hospital(tmp_path, rows=rows), "cohort")
    assert reply.error.reason == (
        f"site hospital-1: phenotype of a binary trait has the values {has} alone, so it is not "
        'clear what 1 is: declare coding="1/2" if it is a control and 2 a case, as PLINK writes '
        'them, or coding="0/1" if it is a case and 0 a control'
    )


def test_a_far_value_that_many_have_is_named_in_the_hospitals_own_log(tmp_path, caplog):
    rows = rows_of()
    for row in rows[:5]:
        row["age"] = -999
    client = hospital(tmp_path, rows=rows)
    context = context_of(node_config={"site-name": "north", "data-dir": str(tmp_path)})
    reply = question(client, "cohort", context=context)
    text = (
        "north: age is -999 for 5 of 40 people, far from all other values: it counts as a number. "
        "If it stands for a missing value, declare it in missing of the client"
    )
    assert text in [record.getMessage() for record in caplog.records]
    # Nothing of it leaves.
    assert "-999" not in str(reply.content)
    caplog.clear()
    client = hospital(tmp_path, rows=rows, missing={"age": (-9, -999)})
    assert question(client, "cohort").content["cohort"]["people"] == 35
    assert not [record for record in caplog.records if "far from" in record.getMessage()]


def fam_of(folder, sexes, phenotypes):
    path = folder / "h.fam"
    lines = [line.split()[:4] for line in path.read_text().splitlines()]
    path.write_text(
        "".join(
            f"{' '.join(line)} {sex} {phenotype}\n"
            for line, sex, phenotype in zip(lines, sexes, phenotypes, strict=True)
        )
    )


def test_phenotype_and_sex_come_from_the_fam_file(tmp_path):
    rows = [{"patient": f"p{n}"} for n in range(PEOPLE)]
    own = {"phenotype": "fam.phenotype", "covariates": ("fam.sex",)}
    client = hospital(tmp_path, rows=rows, **own)
    sexes = [str(1 + n // 20) for n in range(PEOPLE)]
    sexes[0] = "0"
    phenotypes = [str(1 + n % 2) for n in range(PEOPLE)]
    phenotypes[1], phenotypes[2], phenotypes[3] = "0", "-9", "NA"
    fam_of(tmp_path, sexes, phenotypes)
    about = question(client, "cohort").content["cohort"]
    assert (about["people"], about["cases"], about["phenotype"]) == (36, 18, "fam.phenotype")
    slopes, intercepts = np.zeros((6, 2)), np.zeros(6)
    found = told(question(client, "logistic", **everything(), slopes=slopes, intercepts=intercepts))
    sex = np.array([[float(text)] for text in sexes[4:]])
    cases = np.arange(4, PEOPLE) % 2 == 1
    expected, _ = logistic_terms(genotypes_of()[4:], cases, sex - sex.mean(), slopes, intercepts)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    # A real hospital writes its answers down.
    context = context_of(node_config={"site-name": "north", "data-dir": str(tmp_path)})
    assert question(client, "cohort", context=context).content["cohort"]["people"] == 36
    # Five of them leave the study: fewer than ten differ between its answers.
    client = hospital(tmp_path, rows=rows, **own)
    for person in range(4, 9):
        phenotypes[person] = "-9"
    fam_of(tmp_path, sexes, phenotypes)
    context = context_of(node_config={"site-name": "north", "data-dir": str(tmp_path)})
    reply = question(client, "cohort", context=context)
    assert reply.error.reason.startswith("site north: declined: fewer than min-cell-count people")


def test_a_quantitative_phenotype_of_the_fam_file(tmp_path):
    rows = rows_of()
    client = hospital(tmp_path, rows=rows, phenotype="fam.phenotype", trait="continuous")
    values = [f"{n / 7:.3f}" for n in range(PEOPLE)]
    values[5] = "-9"
    fam_of(tmp_path, ["1"] * PEOPLE, values)
    kept = np.delete(np.arange(PEOPLE), 5)
    age = np.array([[rows[n]["age"]] for n in kept])
    expected = linear_sums(genotypes_of()[kept], np.array(values, float)[kept], age)
    np.testing.assert_allclose(told(question(client, "linear", **everything())), expected)
    values[6] = "tall"
    fam_of(tmp_path, ["1"] * PEOPLE, values)
    client = hospital(tmp_path, rows=rows, phenotype="fam.phenotype", trait="continuous")
    fam_of(tmp_path, ["1"] * PEOPLE, values)
    text = f"the phenotype in {tmp_path}/h.fam of patient p6 must be a number, got 'tall'"
    assert question(client, "cohort").error.reason == f"site hospital-1: {text}"


def test_cases_of_a_fam_file_are_no_quantitative_phenotype(tmp_path):
    client = hospital(tmp_path, phenotype="fam.phenotype", trait="continuous")
    fam_of(tmp_path, ["1"] * PEOPLE, [str(1 + n % 2) for n in range(PEOPLE)])
    assert question(client, "cohort").error.reason == (
        "site hospital-1: the phenotypes of the fam file are all 0, 1 or 2, which are missing, "
        'control and case there: set trait="binary", or give a quantitative phenotype in the rows'
    )


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"coding": "2/1"}, "coding must be empty or one of 0/1, 1/2, got '2/1'"),
        ({"missing": {"bmi": (-9,)}}, "missing has the column 'bmi', which is not one of the "
         "study's: phenotype, age"),
        ({"missing": {"age": "-9"}}, "missing['age'] must be a tuple of numbers, such as (-9, 99), "
         "got '-9'"),
        ({"missing": {"age": -9}}, "missing['age'] must be a tuple of numbers, such as (-9, 99), "
         "got -9"),
    ],
)  # fmt: skip
def test_declarations_that_cannot_be_are_refused(tmp_path, members, text):
    reply = question(hospital(tmp_path, **members), "cohort")
    assert reply.error.reason == f"site hospital-1: {text}"


def test_missing_columns_wrong_ids_and_wrong_traits_are_refused(tmp_path):
    client = hospital(tmp_path, rows=[{"patient": "p0", "age": 3}])
    text = "site hospital-1: the row of patient p0 has no phenotype: it has patient, age"
    assert question(client, "cohort").error.reason == text
    rows = [row | {"patient": float(n)} for n, row in enumerate(rows_of())]
    text = (
        f"site hospital-1: none of the 40 patients is in {tmp_path}/h.fam: ids are compared as "
        "texts, such as '0' and 'p0'"
    )
    assert question(hospital(tmp_path, rows=rows), "cohort").error.reason == text
    rows = [row | {"age": np.nan} for row in rows_of()]
    text = "site hospital-1: nobody has both phenotype and all covariates"
    assert question(hospital(tmp_path, rows=rows), "cohort").error.reason == text
    text = "site hospital-1: trait must be one of binary, continuous, got 'ordinal'"
    assert question(hospital(tmp_path, trait="ordinal"), "cohort").error.reason == text


def test_questions_that_cannot_be_are_refused(tmp_path):
    client = hospital(tmp_path)
    for lines in ([0, 6], [-1], []):
        arrays = {"lines": np.array(lines, np.int64), "swapped": np.zeros(len(lines), bool)}
        reply = question(client, "counts", **arrays)
        text = "site hospital-1: lines must be one or more numbers in 0..5"
        assert reply.error.reason == text
    reply = question(client, "counts", lines=np.arange(2), swapped=np.zeros(3, bool))
    text = (
        "site hospital-1: lines must be whole numbers, one a variant, and swapped true or false "
        "for each"
    )
    assert reply.error.reason == text
    reply = question(client, "counts", lines=np.arange(2), swapped=np.full(2, np.nan))
    assert reply.error.reason == text
    reply = question(client, "counts", swapped=np.zeros(3, bool))
    assert reply.error.reason == "site hospital-1: the message has no array lines"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"slopes": np.zeros((6, 1))}, "slopes must be float64 of shape (6, 2), got float64 of "
         "(6, 1)"),
        ({"slopes": np.zeros((6, 2), complex)}, "slopes must be float64 of shape (6, 2), got "
         "complex128 of (6, 2)"),
        ({"intercepts": np.zeros(5)}, "intercepts must be float64 of shape (6,), got float64 of "
         "(5,)"),
        ({"slopes": np.full((6, 2), np.nan)}, "slopes must be finite"),
        ({"intercepts": np.full(6, np.inf)}, "intercepts must be finite"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_are_refused(tmp_path, wrong, text):
    more = {"slopes": np.zeros((6, 2)), "intercepts": np.zeros(6)} | wrong
    reply = question(hospital(tmp_path), "logistic", **everything(), **more)
    assert reply.error.reason == f"site hospital-1: {text}"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"loadings": np.ones((6, 0))}, "loadings must have 1 to 64 columns, got 0"),
        ({"loadings": np.ones((6, 65))}, "loadings must have 1 to 64 columns, got 65"),
        ({"loadings": np.ones((5, 1))}, "loadings must be float64 of shape (6, 1), got float64 of "
         "(5, 1)"),
        ({"loadings": np.full((6, 1), np.inf)}, "loadings must be finite"),
        ({"loadings": np.full((6, 1), -1.01)}, "loadings must lie in -1..1: those of a component "
         "have length 1"),
        ({"frequencies": np.full(5, 0.4)}, "frequencies must be float64 of shape (6,), got float64 "
         "of (5,)"),
        ({"frequencies": np.r_[np.full(5, 0.4), 0.0]}, "frequencies must lie in 0.01..0.99: "
         "components are made of common variants"),
        ({"frequencies": np.r_[np.full(5, 0.4), 1.0]}, "frequencies must lie in 0.01..0.99: "
         "components are made of common variants"),
        ({"frequencies": np.r_[np.full(5, 0.4), np.nan]}, "frequencies must be finite"),
    ],
)  # fmt: skip
def test_loadings_that_cannot_be_are_refused(tmp_path, wrong, text):
    more = {"frequencies": np.full(6, 0.4), "loadings": np.ones((6, 1))} | wrong
    for query in ("loadings", "scores"):
        reply = question(hospital(tmp_path), query, **everything(), **more)
        assert reply.error.reason == f"site hospital-1: {text}"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"count": 2}, "offset must be a whole number in 0..4611686018427387904, got None"),
        ({"offset": -1, "count": 2}, "offset must be a whole number in 0..4611686018427387904, got "
         "-1"),
        ({"offset": 0, "count": 0}, "count must be a whole number in 1..1048576, got 0"),
        ({"offset": 0, "count": 10**9}, "count must be a whole number in 1..1048576, got "
         "1000000000"),
        ({"offset": 0, "count": 2.0}, "count must be a whole number in 1..1048576, got 2.0"),
    ],
)  # fmt: skip
def test_lists_of_variants_that_cannot_be_are_refused(tmp_path, config, text):
    reply = question(hospital(tmp_path), "variants", config)
    assert reply.error.reason == f"site hospital-1: {text}"


def test_a_question_cannot_name_a_variant_a_million_times(tmp_path, monkeypatch):
    client, many = hospital(tmp_path), 10**6
    lines = {"lines": np.zeros(many, np.int64), "swapped": np.zeros(many, bool)}
    reply = question(client, "counts", **lines)
    text = "site hospital-1: lines must be different: a question names a variant once"
    assert reply.error.reason == text
    monkeypatch.setattr("fedmed_flower.genomics.client.MOST_NUMBERS", 40)
    # Counts are five numbers a variant; of the models with one covariate a variant has nine.
    assert not question(client, "counts", **everything()).has_error()
    more = {"slopes": np.zeros((6, 2)), "intercepts": np.zeros(6)}
    reply = question(client, "logistic", **everything(), **more)
    text = "site hospital-1: lines must be at most 4 for this question, got 6"
    assert reply.error.reason == text


def test_nothing_but_the_class_of_an_error_leaves_a_real_site(tmp_path):
    rows = rows_of()
    rows[0]["age"] = "secret"
    context = context_of(node_config={"site-name": "north"})
    reply = question(hospital(tmp_path, rows=rows), "cohort", context=context)
    assert reply.error.reason == "site north: InputError"


def test_genotypes_are_read_in_parts(tmp_path, monkeypatch):
    client = hospital(tmp_path)
    whole = told(question(client, "counts", {"squares": True}, **everything()))
    monkeypatch.setattr("fedmed_flower.genomics.client._CELLS", 2 * PEOPLE)
    parts = told(question(client, "counts", {"squares": True}, **everything()))
    np.testing.assert_array_equal(parts, whole)
    with pytest.raises(
        InputError, match=says("Hospital cannot train: it does not define build_model")
    ):
        client(context_of()).build_model()


def test_a_server_of_another_version_is_refused_before_a_genotype_is_read(tmp_path):
    reply = question(hospital(tmp_path), "cohort", {"version": 3})
    assert read_error(reply.error.reason)[1] == (
        "declined: hospital-1: messages of the server have version 3, and those of the hospital "
        "version 2: install the same fedmed-flower at both"
    )
