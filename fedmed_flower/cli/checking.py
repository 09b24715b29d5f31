"""What `fedmed data check` finds in the folders of hospitals, by an app or by itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import Context, RecordDict, UserConfig

from fedmed_flower.cli.findings import problem_of, summary_of
from fedmed_flower.clients.app import HospitalApp
from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.clients.imaging import ImagingClient
from fedmed_flower.clients.tabular import TabularClient
from fedmed_flower.clients.targets import CLASSED, with_target
from fedmed_flower.data.checks import Finding, shared_images, without_constant
from fedmed_flower.data.outlying import with_further, without_column
from fedmed_flower.data.preparation import contribution
from fedmed_flower.data.schema import Schema, empty_columns, without_values
from fedmed_flower.data.site import SPLITS, Row, SiteData, all_rows, require_patients
from fedmed_flower.engines.project import load_project
from fedmed_flower.errors import InputError, shown
from fedmed_flower.genomics.checks import check_covariates, check_files, compare_files
from fedmed_flower.genomics.client import GenomicsClient
from fedmed_flower.settings.registry import complete

log = logging.getLogger("flwr.fedmed")

# A hospital of fewer rows may have one class by chance.
_FEWEST_ROWS = 20


@dataclass
class Checked:
    """What was found in a hospital's folder.

    Attributes
    ----------
    lines : list of str
        What it holds.
    problems : list of str
    refused : str
        Why it cannot be used at all; empty if it can.
    client : MedicalClient or None
        None if it could not be made.
    data : SiteData or None
        None if the app's client could not read it.
    findings : list of Finding
        What was found in each image, and what is wrong with the folder as a whole.
    """

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    refused: str = ""
    client: MedicalClient | None = None
    data: SiteData | None = None
    findings: list[Finding] = field(default_factory=list)


def check_by_app(app: Path, folders: Sequence[Path]) -> dict[str, Checked]:
    """Read hospitals' folders by an app's client; return what was found, by name of the folder.

    Raises
    ------
    InputError
        If the app is not one of a client of this package, or a folder is given twice.
    """
    project = load_project(app)
    client_app = project.client_app()
    if not isinstance(client_app, HospitalApp):
        raise InputError(f"the ClientApp of {app} is not made by a client of this package")
    places = [folder.resolve() for folder in folders]
    if twice := [str(place) for place in places if places.count(place) > 1]:
        raise InputError(f"{twice[0]} is given twice")
    config = complete(project.declared, client_app.sections)
    found: dict[str, Checked] = {}
    for folder in folders:
        name = folder.resolve().name
        node: UserConfig = {"site-name": name, "data-dir": str(folder), "image-cache": "off"}
        found[name if name not in found else str(folder)] = checked = Checked()
        with _logged(checked.problems):
            try:
                checked.client = client_app.client(Context(0, 0, node, RecordDict(), config))
                _read(checked, checked.client)
            except InputError as error:
                checked.refused = str(error)
    return found


def compare(found: Mapping[str, Checked]) -> list[str]:
    """Return which hospitals stand out among several, each with its reason."""
    usable = {name: checked for name, checked in found.items() if checked.data is not None}
    data = {name: checked.data for name, checked in usable.items() if checked.data is not None}
    empty = {name: _empty(checked) for name, checked in usable.items()}
    lacking = {name: one.lacking for name, one in data.items()}
    standing_out = without_column(lacking, empty, [*usable])
    clients = [checked.client for checked in usable.values()]
    tables = [client for client in clients if isinstance(client, TabularClient)]
    if tables:
        schema = with_target(tables[0].schema)
        rows = {name: all_rows(one) for name, one in data.items()}
        # Nothing leaves this machine, so that a value of one patient counts too.
        contributions = {name: contribution(own, schema, 1) for name, own in rows.items()}
        counts = {name: len(own) for name, own in rows.items()}
        standing_out = with_further(standing_out, tables[0].outlying(contributions, counts))
    texts = [f"{one.site}: {one.text}" for one in standing_out]
    if tables and tables[0].schema.task in CLASSED:
        texts += _one_class(rows, tables[0].schema)
    genomes = {
        name: checked.client.genotypes(checked.client.site)
        for name, checked in usable.items()
        if isinstance(checked.client, GenomicsClient)
    }
    return texts + (compare_files(genomes) if len(genomes) > 1 else [])


def _one_class(rows: Mapping[str, Sequence[Row]], schema: Schema) -> Iterator[str]:
    """Yield which hospitals have one class alone, while most others have several."""
    classes = {name: {int(row[schema.target]) for row in own} for name, own in rows.items()}
    several = sum(len(found) > 1 for found in classes.values())
    others = len(classes) - 1
    for name, found in classes.items():
        if len(found) == 1 and len(rows[name]) >= _FEWEST_ROWS and 2 * several > others:
            text = schema.classes[found.pop()]
            yield shown(
                f"{name}: {schema.target} is {text} in all {len(rows[name])} rows; {several} of "
                f"{others} other hospitals have several classes: perhaps it is coded otherwise here"
            )


def _read(checked: Checked, client: MedicalClient) -> None:
    """Read a hospital's folder by a client, and note what it holds."""
    if isinstance(client, GenomicsClient):
        files = check_files(client.genotypes(client.site))
        checked.lines += files.lines
        checked.problems += files.problems
    data = client.load_data(client.site)
    require_patients(data)
    client.check(data)
    client.warn(data)
    of_folder = list(checked.problems)
    try:
        usable = {split: client.screen(getattr(data, split), split) for split in SPLITS}
    finally:
        if isinstance(client, ImagingClient):
            _look_at_images(checked, client, data, of_folder)
    checked.data = data
    rejected = data.rejected + len(all_rows(data)) - sum(map(len, usable.values()))
    rows = ", ".join(f"{len(rows)} {split}" for split, rows in usable.items())
    checked.lines.append(f"{data.source}: {rows}; {rejected} rejected")
    checked.lines += data.notes
    for column in _empty(checked):
        text = without_values(column)
        # What reads a table has said so already, after the table's name.
        if not any(f": {problem}".endswith(f": {text}") for problem in checked.problems):
            checked.problems.append(text)
    if isinstance(client, GenomicsClient):
        _look_at_cohort(checked, client, data)


def _look_at_images(
    checked: Checked, client: ImagingClient, data: SiteData, of_folder: Sequence[str]
) -> None:
    """Note what was found in the images that were screened, and in the folder before."""
    found = [
        (split, client.found[id(row)])
        for split in SPLITS
        for row in getattr(data, split)
        if id(row) in client.found
    ]
    images = [replace(without_constant(finding), split=split) for split, finding in found]
    checked.lines += summary_of(images, client.num_classes) if images else []
    constant = [
        after
        for (_, before), after in zip(found, images, strict=True)
        if before.problem is None and after.problem is not None
    ]
    shared = [str(image) for image in shared_images(found)]
    checked.problems += [*map(problem_of, constant), *shared]
    checked.findings = images
    checked.findings += [Finding("", "", problem=text) for text in (*of_folder, *shared)]


def _look_at_cohort(checked: Checked, client: GenomicsClient, data: SiteData) -> None:
    """Note who takes part in an association study, and by which covariates."""
    cohort = client.read_cohort(data)
    people = len(cohort.trait)
    counts = {"people": people}
    if client.trait == "binary":
        counts["cases"] = int(cohort.trait.sum())
        counts["controls"] = people - counts["cases"]
    listed = ", ".join(f"{count} {what}" for what, count in counts.items())
    checked.lines.append(f"in the study: {listed}")
    checked.problems += [f"{text}: they take no part" for text in cohort.left_out]
    checked.problems += cohort.suspicious
    checked.problems += [
        f"there are {count} {what}, fewer than min-cell-count = {cohort.minimum}: this hospital "
        "takes no part"
        for what, count in counts.items()
        if count < cohort.minimum and (count or what == "people")
    ]
    checked.problems += check_covariates(cohort.covariates, client.covariates)


def _empty(checked: Checked) -> tuple[str, ...]:
    """Return the features of a schema, if there is one, without a value in any row."""
    schema = None if checked.client is None else checked.client.declared
    if schema is None or checked.data is None:
        return ()
    names = [name for name in schema.features if name not in checked.data.lacking]
    return empty_columns(all_rows(checked.data), names)


class _Collecting(logging.Handler):
    """Adds each warning of the log to a list."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(shown(record.getMessage()))


@contextmanager
def _logged(problems: list[str]) -> Iterator[None]:
    """Add the warnings of the log to problems, instead of showing them."""
    handler = _Collecting(problems)
    propagate = log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = propagate
