"""What `fedmed statistics` prints; `tests/statistics/test_server.py` runs the command."""

from fedmed_flower.cli.statistics import _print_table


def test_of_a_long_table_the_first_rows_are_printed(capsys):
    rows = [[f"hospital-{number}", "0.5"] for number in range(61)]
    _print_table({"title": "Drift", "head": ["hospital", "PSI"], "rows": rows})
    printed = capsys.readouterr().out
    assert "hospital-59" in printed
    assert "hospital-60" not in printed
    assert "1 more row of this table in report.html" in printed
    _print_table({"title": "Drift", "head": ["hospital", "PSI"], "rows": rows[:60]})
    assert "more row" not in capsys.readouterr().out
