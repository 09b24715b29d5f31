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


def test_of_secure_sums_the_table_has_the_figures_of_all_alone():
    summary = {
        "test": {"federated": {"auc": 0.9, "num-examples": 40}, "sites": {}},
        "sites": {"north": {}, "south": {}, "east": {}},
        "secure": {"sums": [[1, "train", ["east", "north", "south"]]]},
    }
    console = LineConsole(file=io.StringIO(), width=200)
    print_results(console, summary)
    text = console.file.getvalue()
    assert "AUC on all hospitals' test data together" in text
    assert "all test data" in text
    assert "0.900" in text
    assert not any(word in text for word in ("north", "mean", "worst"))
