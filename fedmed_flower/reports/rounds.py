"""The metrics of a run's rounds, read from a folder that a stranger may have made."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from fedmed_flower.errors import InputError
from fedmed_flower.files import MOST_TABLE, cell_text, open_file, read_lines
from fedmed_flower.server.run_folder import METRICS

Curves = dict[tuple[str, str, str], dict[int, float]]  # (phase, metric, site) -> round -> value

# Rounds and values beyond these cannot be drawn. NaN is not below the second.
_MOST_ROUND = 10**9
_MOST_VALUE = 1e100


def read_rounds(folder: Path) -> Curves:
    """Return the metrics of a run's rounds; empty if the run recorded none.

    Raises
    ------
    InputError
        If the file has a bad line, cannot be read, or a link leads out of the folder.
    """
    path = folder / METRICS
    curves = Curves()
    try:
        file = open_file(folder, METRICS, MOST_TABLE)
    except FileNotFoundError:
        return curves
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): mend or remove it") from error
    with io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="") as text:
        lines: Any = csv.DictReader(read_lines(text))
        try:
            for line in lines:
                key = (line["phase"], cell_text(line["metric"]), cell_text(line["site"]))
                server_round = int(line["round"])
                value = float(line["value"])
                if abs(server_round) > _MOST_ROUND:
                    raise ValueError(f"there is no round {server_round}")
                if abs(value) < _MOST_VALUE:
                    curves.setdefault(key, {})[server_round] = value
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            where = f"{path} line {lines.line_num}"
            raise InputError(f"{where} is not a metric ({error!r}): mend or remove it") from error
    return {key: dict(sorted(values.items())) for key, values in curves.items()}
