import gzip
import io
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmed_flower import InputError
from fedmed_flower.data import bounded
from fedmed_flower.data.bounded import ungzipped


def read(packed):
    return ungzipped(io.BytesIO(packed), "x.gz", "an image")


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=4), st.integers(0, 20))
def test_members_are_unpacked_as_gzip_does_it(parts, zeros):
    packed = b"".join(map(gzip.compress, parts)) + bytes(zeros)
    assert read(packed) == gzip.decompress(packed) == b"".join(parts)


def test_a_member_that_ends_between_two_parts(monkeypatch):
    packed = gzip.compress(b"first") + gzip.compress(b"second")
    for size in (1, 2, 7, len(gzip.compress(b"first"))):
        monkeypatch.setattr(bounded, "_PART", size)
        assert read(packed) == b"firstsecond"


def test_content_is_unpacked_in_parts(monkeypatch):
    monkeypatch.setattr(bounded, "_PART", 3)
    assert read(gzip.compress(b"0123456789")) == b"0123456789"


@pytest.mark.parametrize("length", [0, 5, 30, -4, -1])
def test_a_file_that_is_cut_off(length):
    with pytest.raises(EOFError, match=r"^the file is cut off$"):
        read(gzip.compress(bytes(range(100)))[:length])


def test_a_damaged_file():
    packed = bytearray(gzip.compress(bytes(range(100))))
    packed[-6] ^= 1
    with pytest.raises(zlib.error, match=r"^CRC check failed: the file is damaged$"):
        read(bytes(packed))
    with pytest.raises(zlib.error, match="incorrect header check"):
        read(gzip.compress(b"x") + b"more")


def test_a_small_file_that_unpacks_to_more_than_a_hospital_has(monkeypatch):
    monkeypatch.setitem(bounded.MOST, "an image", 1000)
    monkeypatch.setattr(bounded, "_PART", 100)
    with pytest.raises(InputError, match=r"^x\.gz unpacks to at least 1,100 bytes"):
        read(gzip.compress(bytes(10**6)))
