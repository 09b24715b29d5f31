import pytest

from fedmed_flower.images.names import plain_name


@pytest.mark.parametrize(
    ("first", "second"),
    [("Anterior", "anterior"), ("Left_Lung", "left lung"), ("left-lung", "LeftLung"),
     (" Spleen ", "spleen"), ("GTV-1", "gtv 1"), ("Straße", "STRASSE"), ("T1 - 1", "t1_1")],
)  # fmt: skip
def test_names_that_are_the_same(first, second):
    assert plain_name(first) == plain_name(second)


@pytest.mark.parametrize(
    ("first", "second"), [("T1-1", "T11"), ("liver", "livers"), ("lung l", "lung r")]
)
def test_names_that_differ(first, second):
    assert plain_name(first) != plain_name(second)
