"""Rows of a made-up hospital, and questions to it without Flower."""

import numpy as np

from fedmed_flower.statistics.columns import Columns
from fedmed_flower.statistics.local import MOST_COMPARED, answer_exactly
from fedmed_flower.statistics.request import Filter, Request, Survival


def make_patients(count, seed=0, name="p"):
    """Ages in years, a lab value that a tenth lack, sex, centre (one of them rare), follow-up."""
    rng = np.random.default_rng(seed)
    return [
        {
            "patient": f"{name}{number}",
            "age": int(rng.integers(20, 90)),
            "lab": float(rng.normal(1e6, 3)) if number % 10 else None,
            "sex": str(rng.choice(["f", "m"])),
            "centre": str(rng.choice(["a", "b", "c"], p=[0.6, 0.36, 0.04])),
            "time": float(rng.exponential(6)),
            "event": int(rng.random() < 0.6),
        }
        for number in range(count)
    ]


def ask(rows, path, minimum=10, hide=False, most_compared=MOST_COMPARED, schema=None, **request):
    """Return what a hospital with these rows and this file of answers tells."""
    if "survival" in request:
        request["survival"] = Survival(*request["survival"])
    asked = Request(**request)
    columns = Columns(rows, asked, schema)
    return answer_exactly(path, columns, asked, minimum, hide, most_compared)


def where(*texts):
    return {
        "where": tuple(Filter(*text.split(" ")[:2], _value(text.split(" ")[2])) for text in texts)
    }


def _value(text):
    try:
        return float(text)
    except ValueError:
        return text


def group(told, name=""):
    """Return one group of an answer; None where it is withheld."""
    return next((found for found in told["groups"] if found["name"] == name), None)


def withheld(told):
    return [what for _, what, _ in told["withheld"]]
