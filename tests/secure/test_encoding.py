import hashlib
import struct

import numpy as np
import pytest

from fedmed_flower.errors import InputError
from fedmed_flower.secure.encoding import SecureError, decoded, digest, digest_of_arrays, encoded


def test_bytes_are_those_of_the_worked_example():
    def piece(letter, content):
        return letter + struct.pack(">Q", len(content)) + content

    value = {"b": [1, 1.5, True, None], "a": "é"}
    items = [piece(b"i", b"1"), piece(b"d", bytes.fromhex("3ff8000000000000"))]
    items += [piece(b"t", b""), piece(b"n", b"")]
    pairs = piece(b"s", b"a") + piece(b"s", b"\xc3\xa9")
    pairs += piece(b"s", b"b") + piece(b"l", b"".join(items))
    assert encoded(value) == piece(b"m", pairs)
    assert digest(value) == hashlib.new("sha512_256", piece(b"m", pairs)).digest()


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -5,
        2**80,
        0.1,
        float("inf"),
        "",
        "ä",
        b"",
        b"\0",
        [],
        {},
        {"a": [{"b": b"c"}]},
    ],
)
def test_a_value_comes_back(value):
    assert decoded(encoded(value)) == value


def test_values_that_differ_have_other_bytes():
    values = [0, 0.0, False, None, "", b"", [], {}, "0", b"0", [0], [[0]], ["a", "b"], ["ab"]]
    values += [{"a": "b"}, [["a", "b"]], {"a": {"b": 1}}, {"a": None, "b": 1}]
    assert len({encoded(value) for value in values}) == len(values)
    assert encoded("e\u0301") == encoded("é")
    assert encoded(-0.0) == encoded(0.0)
    assert encoded({"a": 1, "b": 2}) == encoded({"b": 2, "a": 1})
    assert encoded((1, 2)) == encoded([1, 2])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"i",
        encoded(1) + b"x",
        encoded(1)[:-1],
        b"x" + struct.pack(">Q", 0),
        b"i" + struct.pack(">Q", 2) + b"01",
        b"n" + struct.pack(">Q", 1) + b"x",
        b"l" + struct.pack(">Q", 2**60),
        b"s" + struct.pack(">Q", 1) + b"\xff",
        b"m" + struct.pack(">Q", 9) + b"n" + struct.pack(">Q", 0),
        b"s" + struct.pack(">Q", 3) + b"e\xcc\x81",
        b"d" + struct.pack(">Qd", 8, float("nan")),
        b"d" + struct.pack(">Qd", 8, -0.0),
    ],
)
def test_other_bytes_are_refused(data):
    with pytest.raises(SecureError, match="bytes that"):
        decoded(data)


def test_deep_nesting_is_refused():
    value = []
    for _ in range(40):
        value = [value]
    with pytest.raises(InputError, match="at most 32 deep"):
        encoded(value)
    data = b""
    for _ in range(40):
        data = b"l" + struct.pack(">Q", len(data)) + data
    with pytest.raises(SecureError, match="nested too deep"):
        decoded(data)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (float("nan"), "NaN"),
        (object(), "type object"),
        ({1: 2}, "a key must"),
        ("\ud800", "no Unicode"),
        ({"é": 1, "e\u0301": 2}, "one text in NFC"),
    ],
)
def test_what_has_no_bytes_is_refused(value, text):
    with pytest.raises(InputError, match=text):
        encoded([value])


def test_arrays_by_name_type_shape_and_bytes():
    base = {"w": np.arange(6, dtype=np.float32), "b": np.zeros((0, 2))}
    same = {"b": np.zeros((0, 2)), "w": np.arange(12, dtype=np.float32)[::2] / 2}
    assert digest_of_arrays(base) == digest_of_arrays(same)
    changed = np.arange(6, dtype=np.float32)
    changed.view(np.uint8)[0] ^= 1
    others = [
        {"v": base["w"], "b": base["b"]},
        base | {"w": base["w"].reshape(2, 3)},
        base | {"w": base["w"].astype(np.float64)},
        base | {"w": changed},
        {"w": base["w"]},
    ]
    digests = {digest_of_arrays(arrays) for arrays in (base, *others)}
    assert len(digests) == 6
