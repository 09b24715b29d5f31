"""Who stands out, and who does not."""

import math

import numpy as np
import pytest
from scipy.stats import fisher_exact
from statistics_rows import ask, group, make_patients
from statsmodels.stats.multitest import multipletests

from fedmed_flower.statistics.outlying import (
    ALL_HOSPITALS,
    drift_between_groups,
    drift_between_sites,
)

MINIMUM = 10


def between_sites(sites, **options):
    return drift_between_sites({"": sites}, **options)


SWAPPED = {"m": "f", "f": "m"}


def patients(rng, count):
    """Ages are normal, a tenth lacks the marker, which has a long tail; two of three are men."""
    return {
        "age": rng.normal(60, 12, count),
        "marker": np.where(rng.random(count) < 0.1, math.nan, rng.lognormal(0, 0.6, count)),
        "sex": rng.choice(["m", "f"], count, p=[0.67, 0.33]),
        "stage": rng.choice(["i", "ii", "iii", "iv"], count, p=[0.4, 0.3, 0.25, 0.05]),
    }


def hospitals(seed, sizes=(150, 150, 150, 150, 150)):
    rng = np.random.default_rng(seed)
    return {f"site {number}": patients(rng, size) for number, size in enumerate(sizes)}


def numeric(values, width):
    """Return what a hospital answers of numbers: cells are merged until they are of ten."""
    known = values[~np.isnan(values)]
    reported = {"n": known.size, "missing": int(values.size - known.size)}
    if not known.size:
        return reported
    edges = []
    left = 0
    steps = np.floor(known / width)
    for step in np.unique(steps):
        left += int((steps == step).sum())
        if left >= MINIMUM and (steps > step).sum() >= MINIMUM:
            edges.append(float(step + 1) * width)
            left = 0
    counts = np.bincount(np.searchsorted(edges, known, side="right"), minlength=len(edges) + 1)
    squares = float(((known - known.mean()) ** 2).sum())
    moments = {"mean": float(known.mean()), "rest": 0.0, "m2": squares}
    return reported | moments | {"histogram": {"edges": edges, "counts": counts.tolist()}}


def categorical(values):
    """Return what a hospital answers of categories: the smallest are put among the few."""
    names, counts = np.unique(values, return_counts=True)
    table = dict(sorted(zip(names.tolist(), counts.tolist(), strict=True), key=lambda p: p[1]))
    few = 0
    while table and (0 < few < MINIMUM or min(table.values()) < MINIMUM):
        few += table.pop(next(iter(table)))
    named = {"names": list(table), "counts": list(table.values()), "few": few}
    return {"n": len(values), "missing": 0, **named}


def told(columns, rows_of_patient=1):
    count = len(columns["age"])
    sizes = {"rows": count, "patients": count // rows_of_patient}
    return sizes | {
        "numeric": {"age": numeric(columns["age"], 2.0), "marker": numeric(columns["marker"], 0.1)},
        "categorical": {name: categorical(columns[name]) for name in ("sex", "stage")},
    }


def drift(tables, **options):
    return between_sites({site: told(rows) for site, rows in tables.items()}, **options)


def named(rows):
    return [(row["site"], row["column"], row["what"]) for row in rows if "stands_out" in row]


def changed(tables, site, column, change):
    tables[site] = tables[site] | {column: change(tables[site][column])}
    return tables


def swap(values):
    return np.array([SWAPPED[value] for value in values])


@pytest.mark.parametrize(
    "sizes", [(60, 60, 60), (150,) * 5, (40, 60, 200, 1000, 100), (30, 30, 30, 30), (2000, 50, 60)]
)
def test_hospitals_that_differ_by_chance_alone_are_not_named(sizes):
    assert [named(drift(hospitals(seed, sizes))) for seed in range(30)] == [[]] * 30


@pytest.mark.parametrize("sizes", [(150,) * 3, (100,) * 8, (60, 1000, 100)])
@pytest.mark.parametrize(
    ("column", "what", "change"),
    [
        ("sex", "categories", swap),
        ("age", "numbers", lambda ages: ages + 12),
        ("age", "numbers", lambda ages: np.where(np.arange(ages.size) == 7, 1e9, ages)),
        ("marker", "numbers", lambda values: values * 88.4),
        (
            "marker",
            "missing values",
            lambda values: np.where(np.arange(values.size) % 10 < 4, math.nan, values),
        ),
    ],
    ids=["swapped", "older", "typing error", "unit", "missing"],
)
def test_the_hospital_that_stands_out_is_named_also_if_it_is_the_largest(
    sizes, column, what, change
):
    """A large hospital is most of what the others are compared with."""
    for seed in range(5):
        tables = changed(hospitals(seed, sizes), "site 1", column, change)
        assert named(drift(tables)) == [("site 1", column, what)]


def test_two_that_stand_out_are_both_named():
    tables = hospitals(0)
    for site in ("site 0", "site 3"):
        changed(tables, site, "age", lambda ages: ages + 25)
        changed(tables, site, "sex", swap)
    assert sorted(named(drift(tables))) == [
        (site, column, what)
        for site in ("site 0", "site 3")
        for column, what in (("age", "numbers"), ("sex", "categories"))
    ]


def test_of_two_hospitals_neither_is_the_odd_one():
    tables = {site: told(rows) for site, rows in hospitals(0, (200, 200)).items()}
    for site, women in (("site 0", 60), ("site 1", 140)):
        sex = {"names": ["f", "m"], "counts": [women, 200 - women]}
        tables[site]["categorical"]["sex"] |= sex
    rows = [row for row in between_sites(tables) if "stands_out" in row]
    ends = "; of two hospitals it cannot be said which is the odd one"
    assert [(row["site"], row["stands_out"]) for row in rows] == [
        ("site 0", f"30% of sex is 'f'; at the other hospital 70%{ends}"),
        ("site 1", f"70% of sex is 'f'; at the other hospital 30%{ends}"),
    ]


def test_the_text_says_what_stands_out_and_the_numbers_are_of_the_counts():
    columns = {"age": np.repeat([50.0, 60.0, 70.0, 80.0], 25), "marker": np.full(100, math.nan)}
    categories = {"sex": np.repeat(["f", "m"], [30, 70]), "stage": np.repeat(["i", "ii"], 50)}
    usual = columns | categories
    tables = {f"site {number}": usual for number in range(3)}
    tables["odd"] = usual | {
        "age": np.where(np.arange(100) % 4 == 0, math.nan, usual["age"]),
        "stage": np.repeat(["i", "ii"], [15, 85]),
    }
    rows = {(row["site"], row["column"], row["what"]): row for row in drift(tables)}
    assert [key for key, row in rows.items() if "stands_out" in row] == [
        *[("odd", "age", "missing values"), ("odd", "stage", "categories")]
    ]
    missing = rows["odd", "age", "missing values"]
    assert missing["difference"] == 0.25
    assert missing["stands_out"] == "25% of age is missing; at the other hospitals 0%"
    tail = fisher_exact([[25, 75], [0, 300]], alternative="greater").pvalue
    assert missing["p"] == pytest.approx(2 * tail, rel=1e-9)
    assert missing["corrected"] >= missing["p"]
    stage = rows["odd", "stage", "categories"]
    assert stage["stands_out"] == "15% of stage is 'i'; at the other hospitals 50%"
    assert stage["psi"] == pytest.approx(0.35 * math.log(0.5 / 0.15) + 0.35 * math.log(0.85 / 0.5))
    tail = fisher_exact([[15, 85], [150, 150]], alternative="less").pvalue
    assert stage["p"] == pytest.approx(2 * tail, rel=1e-9)


def test_a_mean_far_from_all_others_is_named_without_a_histogram():
    tables = {site: told(rows) for site, rows in hospitals(0).items()}
    for reported in tables.values():
        del reported["numeric"]["age"]["histogram"]
    age = tables["site 2"]["numeric"]["age"]
    age["mean"] *= 12
    age["m2"] *= 144
    rows = between_sites(tables)
    assert named(rows) == [("site 2", "age", "numbers")]
    (row,) = [row for row in rows if "stands_out" in row]
    assert "perhaps another unit" in row["stands_out"]
    assert (
        row["note"] == "no cells that both have sent: give --resolution, or a range in the schema"
    )


def test_swapped_categories_are_called_so():
    (row,) = [
        row for row in drift(changed(hospitals(1), "site 4", "sex", swap)) if "stands_out" in row
    ]
    assert row["stands_out"].endswith(": perhaps the two are swapped")


def test_large_tables_name_nobody_for_trifles():
    """Of 200,000 patients each, two hospitals differ by two points: p is tiny, the effect too."""
    tables = {
        name: {
            "rows": 200_000,
            "patients": 200_000,
            "numeric": {},
            "categorical": {
                "sex": {
                    **{"n": 200_000, "missing": 0, "few": 0},
                    **{"names": ["f", "m"], "counts": [women, 200_000 - women]},
                }
            },
        }
        for name, women in (("a", 100_000), ("b", 100_200), ("c", 104_000))
    }
    rows = {row["site"]: row for row in between_sites(tables) if row["what"] == "categories"}
    assert rows["c"]["corrected"] < 1e-12
    assert not any("stands_out" in row for row in rows.values())


def of_categories(names, counts, few=0):
    size = sum(counts) + few
    table = {"n": size, "missing": 0, "names": names, "counts": counts, "few": few}
    return {"rows": size, "patients": size, "numeric": {}, "categorical": {"x": table}}


def compared(**sites):
    rows = between_sites(sites)
    return {row["site"]: row for row in rows if row["what"] == "categories"}


def test_a_category_among_the_few_is_not_absent():
    """The few of b may be y: a and b can only be compared by x and all else."""
    rows = compared(
        a=of_categories(["x", "y"], [60, 40]),
        b=of_categories(["x"], [60], few=40),
        c=of_categories(["x", "y"], [58, 42]),
    )
    assert not any("stands_out" in row for row in rows.values())
    assert rows["b"]["psi"] < 0.01
    # Who has none among the few has no y.
    rows = compared(
        a=of_categories(["x", "y"], [60, 40]),
        b=of_categories(["x"], [100]),
        c=of_categories(["x", "y"], [58, 42]),
    )
    assert rows["b"]["stands_out"] == "100% of x is 'x'; at the other hospitals 58% to 60%"


def test_a_hospital_that_names_no_category_is_not_compared():
    rows = compared(
        a=of_categories(["x", "y"], [60, 40]),
        b=of_categories([], [], few=100),
        c=of_categories(["x", "y"], [58, 42]),
    )
    assert rows["b"]["note"] == "no category that both have sent"
    assert "psi" in rows["a"]


def test_categories_that_more_than_half_of_the_others_do_not_know_are_left_out():
    """The one hospital that has ten of a rare category has more of them than most have."""
    rows = compared(
        a=of_categories(["rare", "x"], [40, 160]),
        b=of_categories(["rare", "x"], [90, 110]),
        c=of_categories(["x"], [170], few=30),
        d=of_categories(["x"], [165], few=35),
        e=of_categories(["x"], [168], few=32),
    )
    expected = [[160, 40], [110 + 170 + 165 + 168, 90 + 30 + 35 + 32]]
    one, others = (np.array(counts) / sum(counts) for counts in expected)
    assert rows["a"]["psi"] == pytest.approx(((one - others) * np.log(one / others)).sum())


def test_rows_of_one_patient_are_no_independent_evidence():
    rng = np.random.default_rng(0)
    tables = {site: told(patients(rng, 60)) for site in "abc"}
    ten = {
        site: {
            **reported,
            "rows": reported["rows"] * 10,
            "numeric": {},
            "categorical": {
                name: {
                    **part,
                    "n": part["n"] * 10,
                    "few": part["few"] * 10,
                    "counts": [10 * count for count in part["counts"]],
                }
                for name, part in reported["categorical"].items()
            },
        }
        for site, reported in tables.items()
    }
    for reported in tables.values():
        reported["numeric"] = {}
    for once, tenfold in zip(between_sites(tables), between_sites(ten), strict=True):
        assert tenfold == pytest.approx(once)


def test_with_noise_nothing_is_tested():
    tables = changed(hospitals(0), "site 1", "sex", swap)
    rows = drift(tables, exact=False)
    assert named(rows) == []
    assert all("p" not in row and "corrected" not in row for row in rows)
    assert {row["note"] for row in rows} == {"not tested: the counts carry noise"}


def test_all_groups_are_corrected_together():
    groups = {
        name: {site: told(rows) for site, rows in hospitals(seed, (90,) * 3).items()}
        for seed, name in enumerate(("f", "m"))
    }
    rows = drift_between_sites(groups)
    assert {row["group"] for row in rows} == {"f", "m"}
    corrected = multipletests([row["p"] for row in rows], method="holm")[1]
    assert [row["corrected"] for row in rows] == pytest.approx(corrected)


def test_a_column_of_codes_beside_columns_of_numbers_is_named():
    tables = {site: told(rows) for site, rows in hospitals(0, (60, 60, 60)).items()}
    moved = tables["site 1"]["categorical"].pop("sex")
    numbers = {"n": moved["n"], "missing": 0, "mean": 1.4, "rest": 0.0, "m2": 14.0}
    tables["site 1"]["numeric"]["sex"] = numbers
    assert named(between_sites(tables)) == [("site 1", "sex", "kind")]
    # Who has no value at all holds neither.
    tables["site 1"]["numeric"]["sex"] = {"n": 0, "missing": 60}
    assert named(between_sites(tables)) == [("site 1", "sex", "missing values")]


def windows(*changes, count=200):
    """Return the answers of three hospitals in three years."""
    groups = {}
    for number, year in enumerate(("2019", "2020", "2021")):
        tables = hospitals(number, (count,) * 3)
        for when, site, column, change in changes:
            if year in when:
                changed(tables, site, column, change)
        groups[year] = {site: told(rows) for site, rows in tables.items()}
    return groups


def test_a_window_is_named_at_the_hospital_that_has_changed():
    lost = (["2021"], "site 1", "age", lambda ages: np.full(ages.size, math.nan))
    rows = drift_between_groups(windows(lost))
    found = [(row["site"], row["group"], row["column"]) for row in rows if "stands_out" in row]
    assert found == [("site 1", "2021", "age"), (ALL_HOSPITALS, "2021", "age")]
    assert {row["against"] for row in rows} == {"2019"}
    (text, together) = [row["stands_out"] for row in rows if "stands_out" in row]
    assert text == "100% of age is missing; in '2019' 0%"
    assert together == "33% of age is missing; in '2019' 0%"


def test_windows_that_differ_by_chance_alone_are_not_named():
    assert named(drift_between_groups(windows())) == []
    lost = (["2020"], "site 1", "age", lambda ages: np.full(ages.size, math.nan))
    assert named(drift_between_groups(windows(lost), exact=False)) == []


def test_a_hospital_is_compared_with_its_own_first_window_and_both_with_the_same_hospitals():
    groups = windows()
    del groups["2019"]["site 2"]
    del groups["2021"]["site 1"]
    rows = drift_between_groups(groups)
    pairs = {(row["site"], row["group"], row["against"]) for row in rows}
    assert pairs == {
        *[("site 0", "2020", "2019"), ("site 0", "2021", "2019"), ("site 1", "2020", "2019")],
        *[("site 2", "2021", "2020"), (ALL_HOSPITALS, "2020", "2019")],
    }


def test_the_answers_of_hospitals(tmp_path):
    """What goes through the guard, merged and withheld as it is."""
    asked = {"columns": ("age", "lab", "sex", "centre"), "resolutions": {"age": 2.0, "lab": 1.0}}
    kinds = ("histograms", "tables", "moments")
    sites = {}
    for number, name in enumerate("abcd"):
        rows = make_patients(300, number, f"{name}-")
        if name == "c":
            rows = [row | {"age": row["age"] + 20, "lab": None} for row in rows]
        sites[name] = group(ask(rows, tmp_path / name, kinds=kinds, **asked))
    assert sorted(named(between_sites(sites))) == [
        *[("c", "age", "numbers"), ("c", "lab", "missing values")]
    ]
