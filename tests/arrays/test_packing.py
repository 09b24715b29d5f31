"""Records in a code: a worked example, all dtypes, what is lost, what a stranger may send."""

import numpy as np
import pytest
from builders import arrays, dump
from dtypes import NUMBERS, SHAPES
from flwr.app import Array, ArrayRecord, ConfigRecord
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny import says

from fedmed_flower.arrays.kernels import BFLOAT16, is_floating, narrow, widen
from fedmed_flower.arrays.packing import Packing
from fedmed_flower.arrays.views import form_of, not_finite, view

INT8 = Packing.named("int8", 0.01)
PACKINGS = st.sampled_from([INT8, Packing.named("int4", 0.01), Packing.named("top-k", 0.3)])


def test_eight_bits_by_hand():
    sent = arrays(w=[[1.0, 2.0]], b=np.float64([0.5]), steps=np.int64(7))
    new = arrays(w=[[1.0 + 127 / 1024, 2.0 - 1 / 1024]], b=np.float64([0.5]), steps=np.int64(8))
    packed = INT8.pack(sent, new, {})
    # By name: b, which has not changed, then w.
    assert packed.coded[".codes"].numpy().tolist() == [0, 127, -1]
    assert packed.coded[".scales"].numpy().tolist() == [0.0, 1 / 1024]
    assert packed.coded["steps"].numpy() == 8
    assert sorted(packed.coded) == [".codes", ".scales", "steps"]
    assert {key: value.tolist() for key, value in packed.residual.items()} == {
        "b": [0.0],
        "w": [0.0, 0.0],
    }
    assert packed.residual["w"].dtype == np.float32
    assert dump(INT8.unpack(sent, packed.coded)) == dump(new)


def test_what_was_lost_before_is_sent_later():
    packing = Packing.named("top-k", 0.5)
    sent = arrays(w=[0.0, 0.0])
    # Numbers that a scale of 8 bits holds exactly.
    first = packing.pack(sent, arrays(w=[127.0, 96.0]), {})
    assert packing.unpack(sent, first.coded)["w"].numpy().tolist() == [127, 0]
    second = packing.pack(sent, arrays(w=[10.0, 31.0]), first.residual)
    assert packing.unpack(sent, second.coded)["w"].numpy().tolist() == [0, 127]
    assert second.residual["w"].tolist() == [10, 0]


def numbers_like(draw, values, scale):
    """Draw numbers of the shape and dtype of values, changed a little."""
    if not is_floating(values.dtype):
        return draw(hnp.arrays(values.dtype, values.shape))
    steps = draw(hnp.arrays(np.int8, values.shape))
    return narrow(widen(values) + steps * scale, values.dtype)


@st.composite
def records(draw, count=2):
    """Draw records of the same keys, shapes and dtypes."""
    rows = [{} for _ in range(count)]
    for number in range(draw(st.integers(0, 4))):
        dtype = draw(NUMBERS)
        bounded = {"elements": {"min_value": -8, "max_value": 8}} if dtype.kind == "f" else {}
        values = draw(hnp.arrays(dtype, draw(SHAPES), **bounded))
        for row in rows:
            row[f"layer.{number}"] = Array(np.asarray(numbers_like(draw, values, 0.125)))
    return [ArrayRecord(row) for row in rows]


@given(both=records(), packing=PACKINGS)
def test_any_record_has_the_forms_that_were_foretold(both, packing):
    sent, new = both
    packed = packing.pack(sent, new, {})
    forms = {key: form_of(array) for key, array in packed.coded.items()}
    assert forms == packing.forms(sent)
    dense = packing.unpack(sent, packed.coded)
    assert list(dense) == list(sent)
    for key, array in sent.items():
        assert form_of(dense[key]) == form_of(array)
        if not is_floating(view(array).dtype):
            assert view(dense[key]).tobytes() == np.ascontiguousarray(view(new[key])).tobytes()
            continue
        lost = packed.residual[key].reshape(view(array).shape)
        reached = widen(view(dense[key])).astype(float) + lost
        assert np.allclose(reached, widen(view(new[key])).astype(float), rtol=1e-6, atol=1e-6)


@given(packing=PACKINGS, seed=st.integers(0, 99), dtype=st.sampled_from(["f2", "f4", "f8", "V2"]))
def test_over_many_rounds_all_that_is_missing_is_one_remainder(packing, seed, dtype):
    rng = np.random.default_rng(seed)
    start = rng.normal(size=9)
    model = ArrayRecord({"w": Array(narrow(start, np.dtype(dtype)))})
    if np.dtype(dtype) == BFLOAT16:
        model["w"].dtype = "bfloat16"
    residual = {}
    wanted = widen(view(model["w"])).astype(float)
    for _ in range(8):
        change = rng.normal(size=9) / 16
        new = ArrayRecord({"w": Array(widen(view(model["w"])).astype(float) + change)})
        wanted += change
        coded, residual = packing.pack(model, new, residual)
        model = packing.unpack(model, coded)
    assert np.allclose(widen(view(model["w"])) + residual["w"], wanted, rtol=0, atol=1e-5)


def test_entries_that_the_server_names_travel_as_they_are():
    packing = Packing.named("top-k", 0.5, ["running_var"])
    sent = arrays(running_var=[1.0, 1.0], w=[0.0, 0.0])
    new = arrays(running_var=[0.25, 0.5], w=[1.0, 127.0])
    packed = packing.pack(sent, new, {})
    assert list(packed.residual) == ["w"]
    assert packing.forms(sent)["running_var"] == ((2,), np.dtype("f4"))
    dense = packing.unpack(sent, packed.coded)
    assert dense["running_var"].numpy().tolist() == [0.25, 0.5]
    assert dense["w"].numpy().tolist() == [0, 127]


def test_the_order_of_keys_does_not_matter():
    sent = arrays(w=[1.0, 2.0], b=[0.5])
    new = arrays(b=[0.75], w=[1.5, 2.0])
    coded = INT8.pack(sent, new, {}).coded
    other = ArrayRecord({key: sent[key] for key in ("b", "w")})
    assert dump(INT8.unpack(other, coded)) == dump(INT8.unpack(sent, coded)) == dump(new)


@pytest.mark.parametrize("compression", ["int8", "int4", "top-k"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_change_that_is_not_finite_is_refused_by_its_entry(compression, bad):
    packing = Packing.named(compression, 0.01)
    sent = arrays(a=[0.0], w=[0.0, 0.0])
    packed = packing.pack(sent, arrays(a=[1.0], w=[1.0, bad]), {})
    assert not np.isfinite(packed.residual["w"]).all()
    with pytest.raises(ValueError, match="in the code of w, a scale must be at least 0 and finite"):
        packing.unpack(sent, packed.coded)


def test_a_change_that_overflows_is_seen_in_the_record():
    coded = arrays(**{".codes": np.int8([127]), ".scales": [3e38]})
    dense = INT8.unpack(arrays(w=[0.0]), coded)
    assert not_finite(dense) == "w holds NaN or infinite values"


def test_what_does_not_belong_together_is_refused():
    sent = arrays(w=[0.0, 0.0])
    with pytest.raises(ValueError, match="other keys than those that were sent"):
        INT8.pack(sent, arrays(v=[0.0, 0.0]), {})
    text = "w has the shape (1,), sent was (2,)"
    with pytest.raises(ValueError, match=says(text)):
        INT8.pack(sent, arrays(w=[0.0]), {})
    text = "what was lost of w before has the shape (1,), now it is (2,)"
    with pytest.raises(ValueError, match=says(text)):
        INT8.pack(sent, sent, {"w": np.zeros(1)})
    text = 'compression="int8" needs the name .codes for itself: rename the array of the model'
    with pytest.raises(ValueError, match=says(text)):
        INT8.forms(arrays(**{".codes": np.int8([1])}))


def test_the_packing_of_a_message():
    assert Packing.of(ConfigRecord({"server-round": 1})) is None
    config = ConfigRecord(Packing.named("top-k", 0.25).config)
    assert dict(config) == {"compression": "top-k", "top-k-share": 0.25, "uncoded": []}
    forms = Packing.of(config).forms(arrays(w=np.zeros((4, 4), np.float32)))
    assert forms == {
        ".indices16": ((4,), np.dtype("u2")),
        ".indices32": ((0,), np.dtype("u4")),
        ".codes": ((4,), np.dtype("i1")),
        ".scales": ((1,), np.dtype("f4")),
    }
    statistics = Packing.named("int8", 1.0, ["v", "u"])
    assert Packing.of(ConfigRecord(statistics.config)).config["uncoded"] == ["u", "v"]
    with pytest.raises(ValueError, match="compression must be one of none, int8, int4, top-k"):
        Packing.of(ConfigRecord({"compression": "zip"}))
    with pytest.raises(ValueError, match="top-k-share must be a number, got 'half'"):
        Packing.of(ConfigRecord({"compression": "top-k", "top-k-share": "half"}))
    with pytest.raises(ValueError, match="uncoded must be a list of names, got 'w'"):
        Packing.of(ConfigRecord({"compression": "int8", "uncoded": "w"}))
