import math

import pytest
from strange_tables import CASES, PAGE, REFUSED, happens, page


def equal(one, other):
    """Return whether two values are of one type and equal, or both NaN."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.table)
def test_a_table_is_read_refused_or_reported(case, tmp_path):
    outcome, words, values = happens(case, tmp_path)
    assert outcome == case.outcome, words
    assert case.values or outcome == REFUSED
    assert values.keys() == case.values.keys()
    for name, wanted in case.values.items():
        found = values[name]
        if isinstance(wanted, list):
            assert all(map(equal, found, wanted)), (name, found)
            assert len(found) == len(wanted)
        else:
            assert found == wanted


def test_the_page_of_the_documentation_is_what_the_tables_give():
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(), "write the page again: python tests/helpers/strange_tables.py"
