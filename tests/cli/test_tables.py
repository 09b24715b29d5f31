import io

import pytest

from fedmed_flower.cli.tables import LineConsole, print_results


@pytest.mark.parametrize(("key", "marked"), [("noised-counts", True), ("auc", False)])
def test_results_that_were_counted_with_noise_say_so(key, marked):
    summary = {
        "sites": {"north": {"train": 200, "test": 30}},
        "test": {"federated": {"auc": 1.0}, "sites": {"north": {"auc": 1.0}}},
        "sent": {"evaluate": {"north": ["metrics.auc", f"metrics.{key}"]}},
    }
    console = LineConsole(file=io.StringIO())
    print_results(console, summary)
    printed = console.file.getvalue()
    assert "1.000" in printed
    said = " ".join(printed.split())
    assert ("own test data, counted with noise" in said) is marked
    assert ("counted with noise: with few patients these figures say little" in said) is marked
