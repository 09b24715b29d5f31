"""The table of models and hospitals, from numbers made by hand."""

import csv
import io

from fedmed_flower.files import cell_text
from fedmed_flower.runs.cross_sites import as_csv, kept


def test_a_summary_keeps_what_judges_a_run_and_no_table_that_is_too_large():
    table = {"north": {"auc": 0.8, "brier": 0.1, "num-examples": 3.0}, "all": {"auc": 0.7}}
    assert kept(table, 1) == {"north": {"auc": 0.8}}
    many = {f"h{number}": {"auc": 0.5} for number in range(100)}
    assert len(kept(many, 100)) == 100
    assert kept(many, 101) == {}


def test_the_table_has_no_groups_and_no_formula_and_says_whose_model_it_is():
    alone = {"=north": {"=north": {"auc": 0.8, "auc@sex=f": 0.9}, "all": {"auc": 0.7}}}
    tuned = {"south": {"south": {"auc": 0.6, "val-own": 0.7, "personal-epochs": 2}}}
    text = as_csv({"alone": alone, "fine-tuned": tuned}, {"all": {"auc": 0.9}}, {}).decode()
    rows = [[cell_text(cell) for cell in row] for row in csv.reader(io.StringIO(text))]
    assert rows == [
        ["model", "trained-at", "tested-at", "metric", "value"],
        ["alone", "=north", "=north", "auc", "0.8"],
        ["alone", "=north", "all", "auc", "0.7"],
        ["fine-tuned", "south", "south", "auc", "0.6"],
        ["federated", "all", "all", "auc", "0.9"],
    ]
    assert "'=north" in text
