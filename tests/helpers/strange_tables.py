"""Tables as hospitals bring them, and what happens to each; a page of the docs lists them.

``python tests/helpers/strange_tables.py`` writes the page again.
"""

import gzip
import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import Decimal
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from statistics_rows import ask, group

from fedmed_flower import InputError
from fedmed_flower.data.schema import Schema, read_table, table_of

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "strange-tables.md"
READ = "read"
REPORTED = "reported"
REFUSED = "refused"
NAN = float("nan")
# How a table of a page writes this letter.
_BAR = r"\|"

SCHEMA = Schema("ill", "binary", numeric=("age",), categorical=("sex",))
CHOL = replace(SCHEMA, numeric=("age", "chol"))
ILL = Schema("ill", "binary", numeric=("age",))
NUMBER = Schema("y", "continuous", numeric=("x",))
LUNG = Schema("time", "survival", numeric=("age",), event="status")

HEADING = "patient,age,sex,ill\n"
TABLE = f"{HEADING}A,60.5,F,1\nB,71,M,0\n"
ROWS = {"patient": ["A", "B"], "age": [60.5, 71.0], "sex": ["F", "M"], "ill": [1, 0]}
CHOL_HEADING = "patient;age;chol;sex;ill\n"
DOTTED = [f"{1 + day % 28:02}.01.2020" for day in range(60)]
NUMBERED = [43831 + day for day in range(60)]


@dataclass(frozen=True)
class Case:
    """One table.

    Attributes
    ----------
    table : str
        What is strange about it.
    content : str, bytes, DataFrame or callable
        The file; or a frame; or a function that writes the file at a path.
    outcome : str
        `READ`, `REPORTED` (read, and problems are said) or `REFUSED`.
    values : dict of str to list
        What columns of the rows hold, or `weeks` of the answer to `weekly`.
    schema : Schema
    name : str
        The file's name.
    weekly : str
        A column by whose weeks statistics are asked for.
    """

    table: str
    content: str | bytes | pd.DataFrame | Callable[[Path], None]
    outcome: str
    values: Mapping[str, Any] = field(default_factory=dict)
    schema: Schema = SCHEMA
    name: str = "t.csv"
    weekly: str = ""


class Happened(NamedTuple):
    """What happened to a table: the words that the hospital sees, and what was read."""

    outcome: str
    words: tuple[str, ...]
    values: Mapping[str, Any]


def happens(case: Case, folder: Path) -> Happened:
    """Write a table into a folder, read it, and return what happened."""
    with _logged() as lines:
        try:
            rows = _rows(case, folder)
        except InputError as error:
            return Happened(REFUSED, (_without(folder, str(error)),), {})
        values = {name: [row[name] for row in rows] for name in case.values.keys() - {"weeks"}}
        if case.weekly:
            reply = ask(rows, folder / "answers", weekly=case.weekly)
            lines += [f"{what}: {why}" for _, what, why in reply["withheld"]]
            values["weeks"] = group(reply).get("weeks")
    return Happened(REPORTED if lines else READ, tuple(_without(folder, x) for x in lines), values)


def page() -> str:
    """Return the page of the docs."""
    text = _ABOUT
    for outcome, title in _TITLES.items():
        text += f"\n## {title}\n\n| table | what happens | the words |\n|---|---|---|\n"
        for case in CASES:
            if case.outcome == outcome:
                with tempfile.TemporaryDirectory() as folder:
                    words = happens(case, Path(folder)).words
                shown = "<br>".join("`" + word.replace("|", _BAR) + "`" for word in words)
                text += f"| {case.table.replace('|', _BAR)} | {outcome} | {shown} |\n"
    return text


_ABOUT = (
    "# Strange tables\n\n"
    "What `read_table` does with tables as hospitals bring them. A test writes and reads each of "
    "these. The words are those that the hospital sees, in its log and by [`fedmed data check`]"
    "(../guides/data.md#check-it-before-anything-starts); `t.csv` stands for the file.\n\n"
    "This page is written by `python tests/helpers/strange_tables.py`.\n"
)
_TITLES = {
    READ: "Read, without a word",
    REPORTED: "Read, and the problem is reported",
    REFUSED: "Refused",
}


def _rows(case: Case, folder: Path) -> list[dict[str, Any]]:
    keep = (case.weekly,) if case.weekly else ()
    if isinstance(case.content, pd.DataFrame):
        return table_of(case.content, case.schema, "t", keep=keep).rows
    path = folder / case.name
    if isinstance(case.content, str):
        path.write_bytes(case.content.encode())
    elif isinstance(case.content, bytes):
        path.write_bytes(case.content)
    else:
        case.content(path)
    return read_table(path, case.schema, keep=keep).rows


@contextmanager
def _logged():
    """Give a list to which the warnings of this package's log are added."""

    class Handler(BufferingHandler):
        def emit(self, record):
            lines.append(record.getMessage())

    lines: list[str] = []
    handler = Handler(0)
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("flwr.fedmed")
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _without(folder: Path, text: str) -> str:
    return text.replace(f"{folder}/", "")


def _lines(heading: str, rows) -> str:
    """Return a text with a patient in front of each row."""
    return f"patient,{heading}\n" + "".join(f"P{n},{row}\n" for n, row in enumerate(rows))


def _aged(*odd: Any, kept: bool = False) -> tuple[Any, ...]:
    """Return content, outcome, values and schema of ages from 20 on, and odd ones after them.

    If `kept`, the odd ones are read as they are, else they are missing.
    """
    ages = range(20, 80)
    content = _lines("x,y", [f"{value},1" for value in (*ages, *odd)])
    read = [float(value) if kept else NAN for value in odd]
    return content, REPORTED, {"x": [*map(float, ages), *read]}, NUMBER


def _weeks(days, outcome: str, weeks: Any) -> dict[str, Any]:
    """Return the arguments of a case with dates, of whose weeks statistics are asked for."""
    return {
        "content": _lines("x,y,admitted", [f"{20 + n},1,{day}" for n, day in enumerate(days)]),
        "outcome": outcome,
        "values": {"weeks": weeks},
        "schema": NUMBER,
        "weekly": "admitted",
    }


LUNG_TABLE = _lines(
    "age,time,status",
    ["60,306,2", "60,455,2", "60,1010,1", "60,210,2", "60,883,2", "60,1022,1"],
)
CODED = _lines("age,ill", [f"60,{outcome}" for outcome in [1, 1, 2] * 3])
COMPETING = _lines("age,time,status", [f"60,{n + 1},{n % 3}" for n in range(15)])

CASES = [
    Case("a byte order mark first", "\ufeff" + TABLE, READ, ROWS),
    Case("semicolons, decimal commas", TABLE.replace(",", ";").replace(".", ","), READ, ROWS),
    Case("semicolons, decimal points", TABLE.replace(",", ";"), READ, ROWS),
    Case("tabs", TABLE.replace(",", "\t"), READ, ROWS, name="t.tsv"),
    Case(
        "a line break within quotes",
        f'{HEADING}"A,\nA",60.5,F,1\nB,71,M,0\n',
        READ,
        ROWS | {"patient": ["A,\nA", "B"]},
    ),
    Case("a separator at the end of all lines", TABLE.replace("\n", ",\n"), READ, ROWS),
    Case("no-break spaces around a cell", TABLE.replace("71", "\u00a071\u00a0"), READ, ROWS),
    Case("a blank before each comma", TABLE.replace(",", " ,"), READ, ROWS),
    Case(
        "patients with leading zeros",
        TABLE.replace("A,", "007,"),
        READ,
        ROWS | {"patient": ["007", "B"]},
    ),
    Case(
        "another order of columns, and further ones",
        "ward,ill,sex,age,patient\nx,1,F,60.5,A\ny,0,M,71,B\n",
        READ,
        ROWS,
    ),
    Case("lines that end as on Windows", TABLE.replace("\n", "\r\n"), READ, ROWS),
    Case("lines that end as on old Macs", TABLE.replace("\n", "\r"), READ, ROWS),
    Case("blank lines", TABLE.replace("\n", "\n\n"), READ, ROWS),
    Case(
        "row names, as R's `write.csv` writes them",
        '"","patient","age","sex","ill"\n"1","A",60.5,"F",1\n"2","B",71,"M",0\n',
        READ,
        ROWS,
    ),
    Case(
        "other separators within quotes in the heading",
        TABLE.replace("ill", 'ill,"a;b;c;d;e"').replace(",1\n", ",1,x\n").replace("0\n", "0,y\n"),
        READ,
        ROWS,
    ),
    Case(
        "gzip",
        lambda path: path.write_bytes(gzip.compress(TABLE.encode())),
        READ,
        ROWS,
        name="t.csv.gz",
    ),
    Case("Parquet", lambda path: pd.DataFrame(ROWS).to_parquet(path), READ, ROWS, name="t.parquet"),
    Case(
        "Excel",
        lambda path: pd.DataFrame(ROWS).to_excel(path, index=False),
        READ,
        ROWS,
        name="t.xlsx",
    ),
    Case(
        "Stata",
        lambda path: pd.DataFrame(ROWS).to_stata(path, write_index=False),
        READ,
        ROWS,
        name="t.dta",
    ),
    Case(
        "Int64, Categorical, Decimal and bool in a data frame",
        pd.DataFrame(
            {
                "patient": pd.Categorical(["A", "B", "C"]),
                "age": pd.array([60, None, 71], dtype="Int64"),
                "chol": [Decimal("2.5"), Decimal(3), None],
                "sex": [True, False, True],
                "ill": pd.Categorical([1.0, 0.0, 1.0]),
            }
        ),
        READ,
        {
            "patient": ["A", "B", "C"],
            "age": [60.0, NAN, 71.0],
            "chol": [2.5, 3.0, NAN],
            "sex": ["1", "0", "1"],
            "ill": [1, 0, 1],
        },
        CHOL,
    ),
    Case(
        "the same row of a patient twice",
        f"{TABLE}B,71,M,0\n",
        READ,
        {name: [*cells, cells[-1]] for name, cells in ROWS.items()},
    ),
    Case("one class alone", TABLE.replace(",0\n", ",1\n"), READ, ROWS | {"ill": [1, 1]}),
    Case(
        "a column that never varies", TABLE.replace("71", "60.5"), READ, ROWS | {"age": [60.5] * 2}
    ),
    Case(
        "a category that other hospitals lack",
        TABLE.replace(",M,", ",X,"),
        READ,
        ROWS | {"sex": ["F", "X"]},
    ),
    Case(
        "`.`, `-` and `#N/A` among categories",
        f"{HEADING}A,60,.,1\nB,71,#N/A,0\nC,60,-,0\nD,60,F,0\n",
        READ,
        {"sex": [None, None, None, "F"]},
    ),
    Case(
        "1.250 beside 1.250,5 between semicolons",
        f"{CHOL_HEADING}A;60;1.250;F;0\nB;70;1.250,5;M;1\n",
        READ,
        {"chol": [1250.0, 1250.5]},
        CHOL,
    ),
    Case(
        'events 1 and 2, as in R\'s `lung`, with `codes={"status": {"1": 0, "2": 1}}`',
        LUNG_TABLE,
        READ,
        {"time": [306.0, 455.0, 1010.0, 210.0, 883.0, 1022.0], "status": [1, 1, 0, 1, 1, 0]},
        replace(LUNG, codes={"status": {"1": 0, "2": 1}}),
    ),
    Case(
        'a target of 1 and 2, with `codes={"ill": {"1": 0, "2": 1}}`',
        CODED,
        READ,
        {"ill": [0, 0, 1] * 3},
        replace(ILL, codes={"ill": {"1": 0, "2": 1}}),
    ),
    Case(
        'competing events 0, 1 and 2, with `codes={"status": {"0": 0, "1": 1, "2": 0}}`',
        COMPETING,
        READ,
        {"status": [0, 1, 0] * 5},
        replace(LUNG, codes={"status": {"0": 0, "1": 1, "2": 0}}),
    ),
    Case(
        "dates as 2020-01-13, of whose weeks statistics are asked for",
        **_weeks(
            [f"2020-01-{6 + day % 14:02}" for day in range(60)],
            READ,
            {
                "first": (date(2020, 1, 6).toordinal() - 1) // 7,
                "start": "2020-01-06",
                "counts": [32, 28],
            },
        ),
    ),
    # Read, and a problem is said.
    Case("1e308 among numbers", *_aged("1e308")),
    Case("0x1f and 1_000 among numbers", *_aged("0x1f", "1_000")),
    Case("dates among numbers", *_aged("2020-01-13", "13.01.2020")),
    Case(
        "dates alone in a column of numbers",
        _lines("x,z,y", [f"{day},1,1" for day in DOTTED]),
        REPORTED,
        {"x": [NAN] * 60, "z": [1.0] * 60},
        replace(NUMBER, numeric=("x", "z")),
    ),
    Case(
        "a column without a value",
        TABLE.replace("60.5", "").replace("71", "NA"),
        REPORTED,
        ROWS | {"age": [NAN, NAN]},
    ),
    Case(
        "a heading in other case",
        TABLE.replace("age", "Age"),
        REPORTED,
        ROWS | {"age": [NAN, NAN]},
    ),
    Case("-999 in five rows", *_aged(*[-999] * 5, kept=True)),
    Case("-9 in five rows", *_aged(*[-9] * 5, kept=True)),
    Case("9999 in five rows", *_aged(*[9999] * 5, kept=True)),
    Case("1e9 in two rows", *_aged("1e9", "1e9", kept=True)),
    Case(
        'the same, with `ranges={"x": (0, 120)}`',
        *_aged("1e9", "1e9")[:3],
        replace(NUMBER, ranges={"x": (0, 120)}),
    ),
    Case(
        'another unit, with `ranges={"x": (20, 1500)}`',
        _lines("x,z,y", ["0.9,1,1", "1.1,1,1"]),
        REPORTED,
        {"x": [NAN, NAN], "z": [1.0, 1.0]},
        replace(NUMBER, numeric=("x", "z"), ranges={"x": (20, 1500)}),
    ),
    Case(
        'F and M, with `categories={"sex": ("f", "m")}`',
        TABLE,
        REPORTED,
        ROWS,
        replace(SCHEMA, categories={"sex": ("f", "m")}),
    ),
    Case(
        "dates as 13.01.2020, of whose weeks statistics are asked for",
        **_weeks(DOTTED, REPORTED, None),
    ),
    Case(
        "dates as spreadsheets number them, 43843, of whose weeks statistics are asked for",
        **_weeks(NUMBERED, REPORTED, None),
    ),
    Case(
        "a separator at the end of some lines",
        TABLE.replace("0\n", "0,\n"),
        REPORTED,
        {name: cells[:1] for name, cells in ROWS.items()},
    ),
    # Refused.
    Case("Latin-1", TABLE.replace("B,", "M\u00fcller,").encode("latin-1"), REFUSED),
    Case("UTF-16", TABLE.encode("utf-16"), REFUSED),
    Case("UTF-16 without a byte order mark", TABLE.encode("utf-16-le"), REFUSED),
    Case("a column twice", TABLE.replace("sex", "age"), REFUSED),
    Case(
        "a separator at the end of all lines but the heading",
        TABLE.replace("1\n", "1,\n").replace("0\n", "0,\n"),
        REFUSED,
    ),
    Case("a title as first line", f"Stroke unit 2020\n{TABLE}", REFUSED),
    Case("a comment as first line", f"# of 2020\n{TABLE}", REFUSED),
    Case("the separator `|`", TABLE.replace(",", "|"), REFUSED),
    Case("a blank between quotes and a comma", TABLE.replace("A,", '"A" ,'), REFUSED),
    Case(
        "a target of yes and no",
        _lines("age,ill", ["60,yes", "60,no"] * 3),
        REFUSED,
        schema=ILL,
    ),
    Case("a target of 1 and 2", CODED, REFUSED, schema=ILL),
    Case(
        "an event of dead and alive",
        LUNG_TABLE.replace(",1\n", ",alive\n").replace(",2\n", ",dead\n"),
        REFUSED,
        schema=LUNG,
    ),
    Case("events 1 and 2, as in R's `lung`", LUNG_TABLE, REFUSED, schema=LUNG),
    Case("competing events 0, 1 and 2", COMPETING, REFUSED, schema=LUNG),
    Case(
        "1.250 between semicolons, and nothing that says what it is",
        f"{CHOL_HEADING}A;60;1.250;F;0\n",
        REFUSED,
        schema=CHOL,
    ),
    Case("all headings in other case", TABLE.replace(HEADING, HEADING.upper()), REFUSED),
    Case("an empty file", "", REFUSED),
    Case("a heading alone", HEADING, REFUSED),
    Case("gzip that was cut off", gzip.compress(TABLE.encode())[:-9], REFUSED, name="t.csv.gz"),
    Case("SAS", TABLE, REFUSED, name="t.sas7bdat"),
    Case("SPSS", TABLE, REFUSED, name="t.sav"),
    Case("Excel 97", TABLE, REFUSED, name="t.xls"),
    Case("a text that is named as one of Excel", TABLE, REFUSED, name="t.xlsx"),
]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
