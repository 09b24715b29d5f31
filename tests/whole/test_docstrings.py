"""The examples in the docstrings do what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

import fedmed_flower

PACKAGE = Path(fedmed_flower.__file__).parent
WITH_EXAMPLES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>>" in path.read_text()]
# What has a small input and a small output shows both.
SHOWN = {
    *("pool", "epsilon_of", "noise_for", "Schema", "split_patients", "parse_filter", "psi"),
    *("Section", "FedMedian", "fewest_left"),
}


def module_of(path):
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return importlib.import_module(name)


def examples_in(path):
    return [test for test in doctest.DocTestFinder().find(module_of(path)) if test.examples]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_of(path):
    runner = doctest.DocTestRunner()
    said = []
    for test in examples_in(path):
        runner.run(test, out=said.append)
    assert runner.tries
    assert not runner.failures, "".join(said)


def test_what_is_small_has_an_example():
    shown = {test.name.rpartition(".")[2] for path in WITH_EXAMPLES for test in examples_in(path)}
    assert shown >= SHOWN
