"""Each method under each strategy and way of running, and the table of the docs about it."""

import re
from pathlib import Path

import pytest
import torch
from squares import Squares, dying, run_squares
from torch import nn

from fedmed_flower.errors import InputError
from fedmed_flower.methods import Ended, Method, register
from fedmed_flower.strategies import DPFedAvg, FedAdam, FedAvg, FedMedian, QFedAvg

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "methods.md"
NOISE = {"noise_multiplier": 0.1, "clipping_norm": 1.0, "population_size": 2}


@register
class Smoothed(Method):
    """A user's own: a hospital keeps the mean of its models of all rounds, and uses that."""

    name = "smoothed"
    personal = True

    def begin(self, site):
        self.before = site.kept

    def end(self, site):
        with torch.no_grad():
            state = {name: value.clone() for name, value in site.model.state_dict().items()}
            for name, value in self.before.items():
                state[name] = (state[name] + value) / 2
        return Ended(kept=state)

    def own(self, model, kept):
        model.load_state_dict(model.state_dict() | kept)
        return model


class Deep(Squares):
    """Two layers without normalisation: a federated running variance of two rows says little."""

    def build_model(self):
        return nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))


METHODS = {
    "fedprox": {"method": "fedprox"},
    "scaffold": {"method": "scaffold"},
    "feddyn": {"method": "feddyn"},
    "fednova": {"method": "fednova"},
    "cyclic": {"method": "cyclic"},
    "ditto": {"method": "ditto"},
    "apfl": {"method": "apfl"},
    "fedrep": {"method": "fedrep", "keep": "2.*"},
    "moon": {"method": "moon"},
    "keep": {"keep": "norm"},
    "one of an app": {"method": "smoothed"},
}
WAYS = {
    "FedAvg": (FedAvg, {}),
    "FedMedian": (FedMedian, {}),
    "FedAdam": (FedAdam, {}),
    "QFedAvg": (lambda: QFedAvg(client_learning_rate=0.02, train_loss_key="loss"), {}),
    "DPFedAvg": (lambda: DPFedAvg(**NOISE), {}),
    "buffer=2": (FedAvg, {"buffer": 2}),
    "compression": (FedAvg, {"compression": "int8"}),
    "resumed": (FedAvg, {}),
}


def outcome(folder, method, way):
    """Return "yes" if the run gave a model, or the reason for which it was refused."""
    make, more = WAYS[way]
    settings = METHODS[method] | more | {"num_server_rounds": 3, "local_epochs": 2}
    settings |= {"learning_rate": 0.02}
    try:
        if way == "resumed":
            client = dying(Deep, 1, 2)
            with pytest.raises(KeyboardInterrupt):
                run_squares(folder, client, make(), **settings)
            result = run_squares(folder, client, make(), resume=True, **settings)
        else:
            result = run_squares(folder, Deep, make(), **settings)
    except InputError as error:
        named = METHODS[method].get("method", "keep") in str(error)
        return "refused" if named else str(error)
    assert all(torch.isfinite(v).all() for v in result.arrays.to_torch_state_dict().values())
    return "yes"


def documented():
    """Return the table of the docs: the cell of each method and way."""
    text = PAGE.read_text().partition("<!-- table matrix: begin -->")[2]
    text = text.partition("<!-- table matrix: end -->")[0]
    head, _, *rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in text.strip().splitlines()
    ]
    return {
        (row[0], way): cell for row in rows for way, cell in zip(head[1:], row[1:], strict=True)
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_runs_or_is_refused_as_the_docs_say(method, way, tmp_path):
    found = outcome(tmp_path / "run", method, way)
    assert documented().get((method, way)) == found


def test_the_docs_list_all_methods_and_ways():
    assert {*documented()} == {(method, way) for method in METHODS for way in WAYS}


def write():
    """Write the table of the docs; called by hand when a method or a way is added."""
    from tempfile import TemporaryDirectory

    rows = [f"| | {' | '.join(f'`{way}`' for way in WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    for method in METHODS:
        cells = []
        for way in WAYS:
            with TemporaryDirectory() as name:
                cells.append(outcome(Path(name) / "run", method, way))
        rows.append(f"| `{method}` | {' | '.join(cells)} |")
    begin, end = "<!-- table matrix: begin -->\n", "<!-- table matrix: end -->"
    table = begin + "\n".join(rows) + "\n" + end
    text = PAGE.read_text()
    PAGE.write_text(re.sub(f"{begin}.*?{end}", lambda _: table, text, flags=re.DOTALL))


if __name__ == "__main__":
    write()
