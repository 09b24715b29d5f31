import pytest
from tiny import says

from fedmed_flower.errors import InputError
from fedmed_flower.images.listing import DicomImage
from fedmed_flower.images.rules import UnmatchedError, chosen, listed, rule_of_cells, rules_of
from fedmed_flower.images.series import Series
from fedmed_flower.settings.imaging import ImagingSettings


def image(description, number=1, modality="CT", orientation="axial", slices=80, **more):
    source = Series(str(number), (f"{number}.dcm",), more.get("part", ""))
    return DicomImage(
        source,
        "p1",
        series=str(number),
        modality=modality,
        description=description,
        number=number,
        orientation=orientation,
        slices=slices,
        **more,
    )


LUNG = image("Thorax 1.0 Lung", 3, kernel="B70f")
SOFT = image("Thorax 5.0 soft", 4, kernel="B30f", slices=40)
CORONAL = image("Thorax cor", 5, orientation="coronal")
PET = image("PET WB (AC)", 6, modality="PT")
LOW = image("ep2d diff", 7, modality="MR", part="b=0")
HIGH = image("ep2d diff", 7, modality="MR", part="b=1000")
ALL = [LUNG, SOFT, CORONAL, PET, LOW, HIGH]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("kernel=B70f", [LUNG]),
        ("description=*SOFT", [SOFT]),
        ('description="thorax 5.0 *"', [SOFT]),
        ("description='PET WB (ac)'", [PET]),
        ("modality=ct orientation=Coronal", [CORONAL]),
        ("number=6", [PET]),
        ("modality=CT orientation=axial slices<=79", [SOFT]),
        ("modality=CT orientation=axial slices>=41 slices<=80", [LUNG]),
        ("part=b=1000", [HIGH]),
        ("part=b=1000; part=b=0", [HIGH, LOW]),
        (" modality=PT ;kernel=B?0f  slices=40 ", [PET, SOFT]),
        ("modality=PT;\n  kernel=B70f\n", [PET, LUNG]),
        ("protocol=x; modality=US", []),
    ],
)
def test_rules_choose_a_series_each(text, found):
    ImagingSettings(series=text)
    assert list(chosen(rules_of(text), ALL)) == found


def test_a_long_text_is_no_rule():
    ImagingSettings(series="part=" + "a" * 1995)
    with pytest.raises(InputError, match="series must be empty or rules such as modality=CT"):
        ImagingSettings(series="part=" + "a" * 1996)


def test_no_rules():
    assert rules_of("") == rules_of("  ") == ()


@pytest.mark.parametrize(
    ("text", "images", "says_what"),
    [
        (
            "modality=CT orientation=axial",
            ALL,
            '2 series match modality=CT orientation=axial: CT "Thorax 1.0 Lung" (number=3 '
            'orientation=axial slices=80), CT "Thorax 5.0 soft" (number=4 orientation=axial '
            "slices=40); add a condition that only one of them satisfies, such as number, slices, "
            "part or description",
        ),
        (
            'modality=PT; description="no such"',
            [PET],
            'no series matches description="no such"; there is PT "PET WB (AC)" (number=6 '
            "orientation=axial slices=80)",
        ),
        (
            "modality=PT; number=6",
            [PET],
            'two rules choose the same series; there is PT "PET WB (AC)" (number=6 '
            "orientation=axial slices=80)",
        ),
    ],
)
def test_rules_that_do_not_choose_one_each_say_what_there_is(text, images, says_what):
    with pytest.raises(UnmatchedError, match=says(says_what)):
        chosen(rules_of(text), images)


def test_of_many_series_the_first_are_listed():
    many = [image("x", number) for number in range(15)]
    assert listed(many).endswith("(number=11 orientation=axial slices=80) and 3 more")
    assert str(image("b", 2, part="echo 2")) == (
        'CT "b" (number=2 part=echo 2 orientation=axial slices=80)'
    )


@pytest.mark.parametrize(
    ("text", "says_what"),
    [
        (
            "modality=CT slices=many",
            "series: slices must be a whole number, 0 or greater, got 'many'",
        ),
        (
            "description>=3",
            "series: description is a text, which only = compares, got description>=3",
        ),
        (
            "orientation=oblique",
            "series: orientation must be one of axial, coronal, sagittal, got 'oblique'",
        ),
        (
            "modality=CT lung",
            "series: 'lung' is no condition such as modality=CT or slices>=40; the keys are "
            "modality, description, protocol, orientation, slices, part, number, kernel",
        ),
    ],
)
def test_rules_that_cannot_be_read(text, says_what):
    with pytest.raises(InputError, match=says(says_what)):
        rules_of(text)


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        ({"modality": "CT", "description": "*thorax ax*"}, 'modality=CT description="*thorax ax*"'),
        ({"slices": ">=40 <= 80"}, "slices>=40 slices<=80"),
        ({"number": "3"}, "number=3"),
    ],
)
def test_a_line_of_a_table_is_a_rule(cells, text):
    assert str(rule_of_cells("series.csv, line 2", cells)) == text


@pytest.mark.parametrize(
    ("cells", "says_what"),
    [
        (
            {"device": "x"},
            "line 2: 'device' is no column of rules; they are modality, description, protocol, "
            "orientation, slices, part, number, kernel",
        ),
        ({"slices": "> 40"}, "line 2: slices must be a number, >=40 or <=80, got '> 40'"),
        ({"slices": ">= x"}, "line 2: slices must be a number, >=40 or <=80, got '>= x'"),
        ({}, "line 2: it has no condition"),
    ],
)
def test_a_line_of_a_table_that_is_no_rule(cells, says_what):
    with pytest.raises(InputError, match=says(says_what)):
        rule_of_cells("line 2", cells)
