import json
import logging
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from flwr.app import ConfigRecord
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from tiny import says

from fedmed_flower import InputError
from fedmed_flower.data.preparation import Preparation, check_contribution, contribution
from fedmed_flower.data.schema import Schema, read_table, table_of

NAN = math.nan
SCHEMA = Schema("y", "binary", numeric=("age", "chol"), categorical=("cp", "sex"))
ONE = Schema("y", "binary", numeric=("age",))


def rows_of(**columns):
    """Return rows with these columns; patients count from 0 where none are given."""
    count = len(next(iter(columns.values())))
    columns = {"patient": range(count)} | columns
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def hospitals(seed=0):
    """Three hospitals of unlike patients; one never measures cholesterol."""
    generator = np.random.default_rng(seed)
    frames = {}
    for number, name in enumerate(("Ulm", "Bonn", "Kiel")):
        size = 40 + 30 * number
        frames[name] = pd.DataFrame(
            {
                "patient": [f"{name}-{row}" for row in range(size)],
                "age": generator.normal(1e6 + 10 * number, 1e-2, size),
                "chol": NAN if name == "Kiel" else generator.gamma(2, 100, size),
                "cp": generator.choice(["1", "2", "3"], size),
                "sex": generator.choice(["f", "m"], size),
                "y": 0,
            }
        )
    frames["Ulm"].loc[::3, "chol"] = NAN
    frames["Bonn"].loc[::4, "cp"] = None
    return frames


def told_by(frames, minimum=1):
    rows = {name: table_of(frame, SCHEMA, name).rows for name, frame in frames.items()}
    return {name: contribution(own, SCHEMA, minimum) for name, own in rows.items()}


def test_moments_of_hospitals_are_those_of_the_pooled_table():
    frames = hospitals()
    agreed = Preparation.agreed(SCHEMA, told_by(frames))
    pooled = pd.concat(frames.values())
    for column in SCHEMA.numeric:
        assert agreed.means[column] == pytest.approx(pooled[column].mean(), rel=1e-10)
        assert agreed.scales[column] == pytest.approx(pooled[column].std(), rel=1e-10)
    assert agreed.categories == {"cp": ("1", "2", "3"), "sex": ("f", "m")}
    assert agreed.still == ()
    # Small spreads around large numbers are not lost.
    ulm = Preparation.agreed(SCHEMA, told_by({"Ulm": frames["Ulm"]}))
    assert ulm.scales["age"] == pytest.approx(frames["Ulm"]["age"].std(), rel=1e-10)


def test_the_order_of_hospitals_and_rows_does_not_change_a_bit():
    frames = hospitals()
    shuffled = {name: frames[name].sample(frac=1, random_state=1) for name in sorted(frames)}
    one = Preparation.agreed(SCHEMA, told_by(frames))
    other = Preparation.agreed(SCHEMA, told_by(shuffled))
    assert one.to_text() == other.to_text()


def test_what_a_hospital_tells_travels_in_a_config_record():
    frames = hospitals()
    told = told_by(frames)
    travelled = {name: ConfigRecord(own) for name, own in told.items()}
    assert set(travelled["Kiel"]) == {"moments age", *(
        f"{kind} {column}" for kind in ("categories", "counts") for column in ("cp", "sex")
    )}  # fmt: skip
    assert Preparation.agreed(SCHEMA, travelled) == Preparation.agreed(SCHEMA, told)


def test_a_contribution_by_hand():
    rows = rows_of(
        patient=["a", "a", "b", "c"],
        age=[1.0, 3.0, 5.0, NAN],
        chol=[2.0, 2.0, NAN, NAN],
        cp=["x", "x", "x", "y"],
        sex=["f", "m", None, "m"],
    )
    assert contribution(rows, SCHEMA, 1) == {
        "moments age": [3.0, 3.0, 8.0],
        "moments chol": [2.0, 2.0, 0.0],
        "categories cp": ["x", "y"],
        "counts cp": [2, 1],
        "categories sex": ["f", "m"],
        "counts sex": [1, 2],
    }
    # Patients count, not rows: two have an age, one a cholesterol, two the value x, two are m.
    assert contribution(rows, SCHEMA, 2) == {
        "moments age": [3.0, 3.0, 8.0],
        "categories cp": ["x"],
        "counts cp": [2],
        "categories sex": ["m"],
        "counts sex": [2],
    }
    assert contribution(rows, SCHEMA, 3) == {}
    assert contribution([], SCHEMA, 1) == {}
    with pytest.raises(InputError, match=says("minimum must be at least 1, got 0")):
        contribution(rows, SCHEMA, 0)


def test_one_patient_under_two_types_counts_once():
    rows = rows_of(patient=[7, np.int64(7), 7.0], age=[1.0, 2.0, 3.0])
    assert contribution(rows, ONE, 2) == {}


def test_declared_categories_are_not_told_and_win():
    schema = replace(SCHEMA, categories={"cp": ("4", "1")})
    rows = rows_of(age=[1.0, 2], chol=[1.0, 2], cp=["1", "9"], sex=["f", "m"])
    told = contribution(rows, schema, 1)
    assert "categories cp" not in told
    assert "counts cp" not in told
    agreed = Preparation.agreed(schema, {"Ulm": told})
    assert agreed.categories == {"cp": ("4", "1"), "sex": ("f", "m")}
    assert agreed.unseen(rows) == {"cp=9": 1}


def test_a_category_of_one_hospital_is_in_the_list_of_all():
    schema = Schema("y", "binary", categorical=("cp",))
    told = {
        "Ulm": contribution(rows_of(cp=["b", "b", "z"]), schema, 2),
        "Bonn": contribution(rows_of(cp=["a", "a", "b"]), schema, 2),
    }
    assert Preparation.agreed(schema, told).categories == {"cp": ("a", "b")}


def test_features_are_those_of_scikit_learn():
    frame = pd.concat(hospitals().values())
    rows = table_of(frame, SCHEMA, "t").rows
    prepared = Preparation.of_rows(SCHEMA, rows)
    assert prepared.names == ("age", "chol", "cp=1", "cp=2", "cp=3", "sex=m")
    # scikit-learn divides by n, we by n - 1.
    values = frame[["age", "chol"]].to_numpy()
    counts = (~np.isnan(values)).sum(axis=0)
    scaled = StandardScaler().fit_transform(values) * np.sqrt((counts - 1) / counts)
    encoder = OneHotEncoder(
        categories=[["1", "2", "3"], ["f", "m"]],
        drop="if_binary",
        sparse_output=False,
        handle_unknown="ignore",
    )
    coded = encoder.fit_transform(frame[["cp", "sex"]].fillna({"cp": "1"}))
    coded[frame["cp"].isna().to_numpy(), :3] = 0
    wanted = np.hstack([np.nan_to_num(scaled), coded])
    features = prepared.transform(rows)
    assert (features.dtype, features.shape) == (np.float32, (len(rows), prepared.width))
    np.testing.assert_allclose(features, wanted, atol=1e-5)


def test_features_by_hand():
    prepared = Preparation(
        {"age": 50.0, "chol": 2.0},
        {"age": 10.0, "chol": 1.0},
        {"cp": ("1", "2", "3"), "sex": ("f", "m"), "ward": ("a",), "none": ()},
        indicators=True,
        still=("chol",),
    )
    names = (
        "age",
        "age missing",
        "chol",
        "chol missing",
        "cp=1",
        "cp=2",
        "cp=3",
        "sex=m",
        "ward=a",
    )
    assert prepared.names == names
    assert prepared.width == 9
    rows = rows_of(
        age=[70.0, NAN, None, 1e9],
        chol=[9.0, NAN, math.inf, 2],
        cp=["3", 1.0, "4", None],
        sex=["m", "f", None, "x"],
        ward=["a", "b", "a", True],
        none=["q", None, "q", "r"],
    )
    np.testing.assert_array_equal(
        prepared.transform(rows),
        np.float32(
            [
                [2, 0, 0, 0, 0, 0, 1, 1, 1],
                [0, 1, 0, 1, 1, 0, 0, 0, 0],
                [0, 1, 0, 1, 0, 0, 0, 0, 1],
                # Values far outside stay what they are.
                [1e8 - 5, 0, 0, 0, 0, 0, 0, 0, 0],
            ]
        ),
    )
    unseen = {"cp=4": 1, "none=q": 2, "none=r": 1, "sex=x": 1, "ward=1": 1, "ward=b": 1}
    assert prepared.unseen(rows) == unseen
    assert prepared.transform([]).shape == (0, 9)


def test_rows_that_do_not_fit():
    prepared = Preparation({"age": 1.0}, {"age": 1.0}, {"cp": ("1",)})
    with pytest.raises(InputError, match=says("row 1 has no 'age'")):
        prepared.transform([{"age": 1.0, "cp": "1"}, {"cp": "1"}])
    with pytest.raises(InputError, match=says("row 0 has no 'cp'")):
        prepared.unseen([{"age": 1.0}])
    with pytest.raises(InputError, match=r"^'age' must be numbers or NaN in all rows: .*'old'$"):
        prepared.transform([{"age": "old", "cp": "1"}])
    with pytest.raises(InputError, match=r"^'cp' must be a text or None in all rows: .*unhashable"):
        prepared.transform([{"age": 1.0, "cp": ["1"]}])


def test_columns_without_spread_or_without_values_are_zero_and_told(caplog):
    schema = replace(SCHEMA, numeric=("age", "chol", "bmi"), indicators=True)
    some = {"cp": [None, None], "sex": ["f", "m"]}
    told = {
        "Ulm": contribution(
            rows_of(age=[0.1, 0.1], chol=[NAN, NAN], bmi=[1, 2], **some), schema, 2
        ),
        "Bonn": contribution(rows_of(age=[0.1, NAN], chol=[5, NAN], bmi=[3, 5], **some), schema, 1),
    }
    told["Bonn"].pop("moments chol")
    told["Bonn"]["moments age"] = [3.0, math.fsum([0.1] * 3) / 3, 0.0]
    with caplog.at_level(logging.WARNING, logger="flwr.fedmed"):
        agreed = Preparation.agreed(schema, told)
    assert caplog.messages == [
        "column age never varies: its feature is 0 in all rows",
        "column chol is reported by no hospital: its feature is 0 in all rows",
        "column cp: no hospital reports a category; it has no feature",
    ]
    assert agreed.means == {"age": pytest.approx(0.1), "chol": 0.0, "bmi": 2.75}
    assert (agreed.scales["age"], agreed.scales["chol"]) == (1.0, 1.0)
    features = agreed.transform(rows_of(age=[0.1, 7], chol=[200, NAN], bmi=[2.75, NAN], **some))
    np.testing.assert_array_equal(features, [[0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 1, 1]])


def test_without_hospitals_the_declared_categories_give_the_width(caplog):
    schema = replace(SCHEMA, categories={"cp": ("1", "2", "3"), "sex": ("f", "m")})
    empty = Preparation.agreed(schema, {})
    rows = table_of(hospitals()["Ulm"], schema, "Ulm").rows
    assert empty.names == Preparation.of_rows(schema, rows).names
    assert not caplog.messages


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"moments bmi": [1.0, 1.0, 0.0]}, "'moments bmi' is not asked for by the schema"),
        ({"age": 3}, "'age' is not asked for by the schema"),
        ({"moments age": 3.0}, "'moments age' must be a list"),
        *[
            (
                {"moments age": moments},
                "'moments age' must be the number of values, their mean and the sum of their "
                "squared distances to it",
            )
            for moments in (
                [],
                [3.0, 1.0],
                [3.0, 1.0, -1.0],
                [3.0, NAN, 1.0],
                [3.0, 1.0, math.inf],
                [3.0, 1e31, 1.0],
                [2.5, 1.0, 1.0],
                [0.0, 1.0, 0.0],
                [1.0, 1.0, 1.0],
                [1e13, 1.0, 1.0],
                [3.0, 1.0, 1e62],
                ["3", "1", "1"],
                [True, True, True],
                [3, 10**400, 1],
            )
        ],
        *[
            (
                {"categories cp": texts, "counts cp": counts},
                "categories and counts of 'cp' must be different texts and their numbers",
            )
            for texts, counts in (
                (["1"], []),
                (["1", "1"], [3, 4]),
                ([""], [3]),
                ([1], [3]),
                (["1"], [0]),
                (["1"], [-3]),
                (["1"], [3.0]),
                (["1"], [10**13]),
            )
        ],
    ],
)
def test_malformed_contributions_are_left_out_and_told(change, text, caplog):
    fine = contribution(rows_of(age=[1.0, 3], chol=[1.0, 2], cp=["1", "2"], sex="fm"), SCHEMA, 1)
    assert check_contribution(fine, SCHEMA) is None
    bad = fine | change
    assert check_contribution(bad, SCHEMA) == text
    with caplog.at_level(logging.WARNING, logger="flwr.fedmed"):
        agreed = Preparation.agreed(SCHEMA, {"Ulm": fine, "Bonn": bad})
    assert agreed == Preparation.agreed(SCHEMA, {"Ulm": fine})
    assert caplog.messages == [f"the statistics that Bonn sent cannot be used: {text}"]


def test_declared_ranges_and_categories_bound_all_features(tmp_path):
    schema = replace(
        SCHEMA,
        ranges={"age": (20, 100), "chol": (0, 8)},
        categories={"cp": ("1", "2", "3"), "sex": ("0", "1")},
        indicators=True,
    )
    declared = Preparation.declared(schema)
    assert declared.means == {"age": 60.0, "chol": 4.0}
    assert declared.scales == {"age": 20.0, "chol": 2.0}
    rows = rows_of(
        age=[100.0, 10, 1e29, 70],
        chol=[0.0, -1, NAN, 5],
        cp=["1", "2", "9", None],
        sex=["1", "0", "1", None],
    )
    np.testing.assert_array_equal(
        declared.transform(rows),
        [
            [2, 0, -2, 0, 1, 0, 0, 1],
            [-2, 0, -2, 0, 0, 1, 0, 0],
            [2, 0, 0, 1, 0, 0, 0, 1],
            [0.5, 0, 0.5, 0, 0, 0, 0, 0],
        ],
    )
    path = tmp_path / "t.csv"
    path.write_text("patient,age,chol,cp,sex,y\nA,999,8,1,1,1\n")
    # What a table holds outside a range is missing, not at its end.
    features = declared.transform(read_table(path, schema).rows)
    np.testing.assert_array_equal(features, [[0, 1, 2, 0, 1, 0, 0, 1]])


def test_a_schema_that_declares_too_little():
    schema = replace(SCHEMA, ranges={"age": (0, 100)}, categories={"sex": ("f", "m")})
    with pytest.raises(
        InputError,
        match=says(
            "the schema declares too little: it needs a range of 'chol', categories of 'cp'; "
            'without privacy preparation="federated" learns them from all hospitals together'
        ),
    ):
        Preparation.declared(schema)


def test_text_and_back_to_the_same_bits():
    frames = hospitals(3)
    agreed = Preparation.agreed(replace(SCHEMA, indicators=True), told_by(frames))
    back = Preparation.from_text(agreed.to_text())
    assert back == agreed
    assert back.to_text() == agreed.to_text()
    rows = table_of(frames["Bonn"], SCHEMA, "Bonn").rows
    assert back.transform(rows).tobytes() == agreed.transform(rows).tobytes()
    names = Preparation({"größe, 1": 0.1}, {"größe, 1": 1 / 3}, {"α": ("β",)}, clipped=True)
    assert Preparation.from_text(names.to_text()) == names


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"means": {"age": NAN}}, "means must be finite numbers by column, got {'age': nan}"),
        ({"means": {"age": "1"}}, "means must be finite numbers by column, got {'age': '1'}"),
        ({"means": [1.0]}, "means must be finite numbers by column, got [1.0]"),
        ({"scales": {"age": math.inf}}, "scales must be finite numbers by column, got "
         "{'age': inf}"),
        ({"scales": {"age": 0.0}}, "scales must be above 1e-30, got {'age': 0.0}"),
        ({"scales": {"age": -1.0}}, "scales must be above 1e-30, got {'age': -1.0}"),
        ({"scales": {"chol": 1.0}}, "means and scales must name the same columns"),
        ({"categories": {"cp": [1, 2]}}, "categories must be different texts by column, got "
         "{'cp': (1, 2)}"),
        ({"categories": {"cp": ["1", "1"]}}, "categories must be different texts by column, got "
         "{'cp': ('1', '1')}"),
        ({"still": ["chol"]}, "still must name columns of means, got ('chol',)"),
        ({"indicators": 1}, "indicators must be true or false, got 1"),
        ({"clipped": "no"}, "clipped must be true or false, got 'no'"),
        ({"more": 1}, None),
        ({"categories": {"cp": 3}}, None),
        ({"still": None}, None),
    ],
)  # fmt: skip
def test_texts_that_are_no_preparation(change, text):
    fine = Preparation({"age": 1.0}, {"age": 2.0}, {"cp": ("1", "2")}).to_text()
    changed = json.dumps(json.loads(fine) | change)
    told = "this is not a preparation of columns: "
    match = says(told + text) if text else f"^{told}"
    with pytest.raises(InputError, match=match):
        Preparation.from_text(changed)


@pytest.mark.parametrize("text", ["", "{}", "[]", "3", "null", "[" * 100_000, '"x"'])
def test_texts_that_are_none_at_all(text):
    with pytest.raises(InputError, match=r"^this is not a preparation of columns: "):
        Preparation.from_text(text)


def test_the_widest_preparation_still_gives_finite_features():
    text = Preparation({"age": -1e30}, {"age": 1.1e-30}).to_text()
    features = Preparation.from_text(text).transform(rows_of(age=[1e30, -1e30]))
    np.testing.assert_array_equal(features, np.float32([[1e30], [0]]))
