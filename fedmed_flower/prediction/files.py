"""Predictions for files: images to probabilities, volumes to masks, tables to lines.

Each file is predicted by itself, so its result does not depend on what else is in the list. A file
that cannot be used is named with its reason, and the others are predicted all the same.
"""

from __future__ import annotations

import gzip
import io
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.data.site import LineNumber
from fedmed_flower.errors import InputError, shown
from fedmed_flower.files import plain_text, write_atomic, write_rows
from fedmed_flower.metrics.classification import class_probabilities, guessed_classes

log = logging.getLogger("flwr.fedmed")

TABLE = "predictions.csv"
_SEG = ".dcm"
_MOST_LETTERS = 500
_PROBLEM = "problem"

# A file, or the files of one image, a channel each.
Source = Path | tuple[Path, ...]
Line = list[object]


def predict_files(
    client: MedicalClient,
    network: nn.Module,
    sources: Sequence[Source],
    out: Path,
    seg: bool = False,
) -> tuple[Path, int]:
    """Predict files, and write a table of the results.

    Parameters
    ----------
    client, network
        As `Predictor.client` and `Predictor.network` return them.
    sources : sequence of Path or tuple of Path
        Images or tables, as the client takes them; several paths are the channels of one image.
    out : Path
        The table, if it ends in ``.csv``; else a folder for it and, if the client outlines
        structures, for masks.
    seg : bool
        Whether the mask of a DICOM file or series is written as DICOM SEG, too.

    Returns
    -------
    table : Path
        A line for each image, or for each row of a table: `file`, what is predicted, and `problem`.
    problems : int
        The number of lines with a problem.

    Raises
    ------
    InputError
        If `out` does not fit the client, or holds a table of predictions already. If `seg` is set
        for a client that outlines nothing, or highdicom is not installed.
    """
    base = _kind_of(client)
    if seg and base != "masks":
        raise InputError("--seg is for models that outline structures")
    table = out if out.suffix.lower() == ".csv" else out / TABLE
    if base == "masks" and table == out:
        raise InputError(f"--out must be a folder, since masks are written, got {out}")
    if table.exists():
        raise InputError(f"{table} exists already: give another --out")
    if out != table and out.exists() and not out.is_dir():
        raise InputError(f"--out must be a folder or end in .csv, got {out}")
    kinds: dict[str, type[_Worker]] = {
        "classes": _Classes,
        "findings": _Findings,
        "grades": _Grades,
        "masks": _Masks,
        "numbers": _Numbers,
        "rows": _Rows,
    }
    if seg:
        kinds["masks"] = _MasksAndSegmentations
    worker = kinds[base](client, network, out)
    head = worker.head()
    lines: list[Line] = []
    with client.seeded(0):
        for source in sources:
            try:
                lines += worker.lines(source)
            except Exception as error:  # One file must not keep the others from being predicted.
                reason = _reason(error)
                log.warning("%s: %s", name_of(source), reason)
                line: Line = [name_of(source), *[""] * (len(head) - 2), reason]
                lines.append(line)
    text = io.StringIO(newline="")
    write_rows(text, [head, *lines])
    write_atomic(table, text.getvalue().encode("utf-8", errors="backslashreplace"))
    return table, sum(line[-1] != "" for line in lines)


def name_of(source: Source) -> str:
    """Return the name of a file, or of the files of one image, as tables have it."""
    return " ".join(map(str, source)) if isinstance(source, tuple) else str(source)


def _kind_of(client: Any) -> str:
    declared = {
        "schema": "rows",
        "classes": "masks",
        "findings": "findings",
        "grades": "grades",
        "unit": "numbers",
    }
    return next((kind for name, kind in declared.items() if hasattr(client, name)), "classes")


def _reason(error: BaseException) -> str:
    """Return why a file cannot be used: the first `InputError` behind an error, or the error."""
    reason = f"{type(error).__name__}: {error}"
    cause: BaseException | None = error
    # MONAI wraps what its transforms raise.
    while cause is not None:
        if isinstance(cause, InputError):
            reason = str(cause)
        cause = cause.__cause__
    return shown(reason, _MOST_LETTERS)


class _Worker(ABC):
    """Predicts the files of one kind of client."""

    def __init__(self, client: Any, network: nn.Module, out: Path) -> None:
        self.client = client
        self.network = network
        self.out = out

    @abstractmethod
    def head(self) -> list[str]:
        """Return the names of the columns; the first is the file, the last the problem."""

    @abstractmethod
    def lines(self, source: Source) -> list[Line]:
        """Return the lines of a file."""

    def prepared(self, source: Source) -> Any:
        """Return an image as the client's network takes it."""
        parts = [str(part) for part in source] if isinstance(source, tuple) else str(source)
        row = {"image": parts, "patient": name_of(source)}
        return self.client.prepare([row], train=False)


class _Classes(_Worker):
    """Classifies images."""

    def head(self) -> list[str]:
        numbers = range(self.client.num_classes)
        return ["file", *(f"probability {number}" for number in numbers), "predicted", _PROBLEM]

    def lines(self, source: Source) -> list[Line]:
        outputs = self.client.predict(self.network, self.prepared(source))
        shares = class_probabilities(outputs)[0].tolist()
        return [[name_of(source), *shares, int(guessed_classes(outputs)[0]), ""]]


class _Findings(_Worker):
    """Looks for several findings in images."""

    def head(self) -> list[str]:
        return ["file", *(f"probability {name}" for name in self.client.findings), _PROBLEM]

    def lines(self, source: Source) -> list[Line]:
        outputs = self.client.predict(self.network, self.prepared(source))
        # Of a finding, the probability that it is there.
        shares = [float(class_probabilities(output[None])[0, 1]) for output in outputs.T]
        return [[name_of(source), *shares, ""]]


class _Grades(_Worker):
    """Grades images."""

    def head(self) -> list[str]:
        grades = self.client.grades
        return ["file", *(f"probability {name}" for name in grades), "predicted", _PROBLEM]

    def lines(self, source: Source) -> list[Line]:
        shares = self.client.predict(self.network, self.prepared(source))[0]
        # The median, as figures count it.
        median = int((1 - shares.cumsum()[:-1] > 0.5).sum())
        return [[name_of(source), *shares.tolist(), self.client.grades[median], ""]]


class _Numbers(_Worker):
    """Reads numbers from images."""

    def head(self) -> list[str]:
        unit = f" ({self.client.unit})" if self.client.unit else ""
        return ["file", f"predicted{unit}", _PROBLEM]

    def lines(self, source: Source) -> list[Line]:
        numbers = self.client.predict(self.network, self.prepared(source))
        return [[name_of(source), float(numbers[0, 0]), ""]]


class _Masks(_Worker):
    """Outlines structures; writes a mask for each image, or one for each of its regions.

    Regions of which each holds the next are written as one mask of their values, too.
    """

    def __init__(self, client: Any, network: nn.Module, out: Path) -> None:
        from fedmed_flower.images.regions import nested

        super().__init__(client, network, out)
        self._taken: set[str] = set()
        self._regions = tuple(client.regions)
        self._order = nested(client.regions)
        values = np.asarray(client.label_values or range(client.num_classes))
        if self._regions:
            values = np.asarray([0, 1])
        kinds = (np.uint8, np.int16, np.int32)
        fits = [
            kind
            for kind in kinds
            if np.iinfo(kind).min <= values.min() and values.max() <= np.iinfo(kind).max
        ]
        if not fits or not (values == values.astype(np.int64)).all():
            raise InputError(f"label_values must be whole numbers of 32 bits, got {values}")
        self._values = values.astype(fits[0])

    def head(self) -> list[str]:
        return ["file", *self._columns(), _PROBLEM]

    def _columns(self) -> list[str]:
        """Return the names of the columns of masks."""
        names = [f"mask {name}" for name in self._regions] or ["mask"]
        return [*names, "label map"] if self._order else names

    def lines(self, source: Source) -> list[Line]:
        from fedmed_flower.images.reading import read_image
        from fedmed_flower.images.regions import label_map
        from fedmed_flower.images.volumes import frames_of

        (found,) = self.client.predict(self.network, self.prepared(source))
        parts = [str(part) for part in source] if isinstance(source, tuple) else str(source)
        shape = self.client.image_shape
        frames = frames_of({"image": parts}, shape[0] if shape else 1)
        image = read_image(parts, self.client.spatial_dims, frames)
        masks = found if self._regions else found[None]
        if masks.shape != (len(self._regions) or 1, *image.shape[1:]):
            raise InputError(
                f"the mask has shape {found.shape}, the image {tuple(image.shape[1:])}: "
                "postprocess must keep the shape"
            )
        first = source[0] if isinstance(source, tuple) else source
        files = [_file_of(self._values[numbers], image, first) for numbers in masks]
        ending = files[0][0]
        whole = self.out / self._free_name(first, "", ending)
        places = [self.out / self._free_name(first, name, ending) for name in self._regions]
        if self._order:
            files.append(_file_of(label_map(masks, self._order), image, first))
            places.append(whole)
        paths = []
        for place, (_, content) in zip(places or [whole], files, strict=True):
            path = Path(f"{place}{ending}")
            write_atomic(path, content)
            paths.append(str(path))
        return [[name_of(source), *paths, *self.written_besides(found, image, whole, first)]]

    def written_besides(
        self, found: NDArray[np.uint8], image: Any, whole: Path, source: Path
    ) -> Line:
        """Return the other cells of a line.

        Parameters
        ----------
        found : ndarray
            Class numbers (*spatial), or regions (regions, *spatial).
        image : MetaTensor
        whole : Path
            What a file of all structures is called, without its ending.
        source : Path
        """
        return [""]

    def _free_name(self, path: Path, region: str, ending: str) -> str:
        """Return a name for the mask of a file, which no other mask of this call has."""
        stem = plain_text(path.resolve().name.removesuffix(".gz"))
        stem = stem.removesuffix(path.suffix if path.suffix != ".gz" else Path(stem).suffix)
        first = f"{stem or 'image'}-mask" + (f"-{plain_text(region)}" if region else "")
        name = first
        number = 1
        while name.lower() in self._taken or any(
            (self.out / f"{name}{each}").exists() for each in (ending, _SEG)
        ):
            number += 1
            name = f"{first}-{number}"
        self._taken.add(name.lower())
        return name


class _MasksAndSegmentations(_Masks):
    """Writes the mask, or the regions, of a DICOM file or series as DICOM SEG as well."""

    def __init__(self, client: Any, network: nn.Module, out: Path) -> None:
        from fedmed_flower.prediction.segmentations import SegmentationWriter

        super().__init__(client, network, out)
        self._writer = SegmentationWriter(client.classes, type(client).__name__, network)

    def head(self) -> list[str]:
        return ["file", *self._columns(), "segmentation", _PROBLEM]

    def written_besides(
        self, found: NDArray[np.uint8], image: Any, whole: Path, source: Path
    ) -> Line:
        """Write the segmentation; if that cannot be, the mask is there all the same."""
        segmentation = Path(f"{whole}{_SEG}")
        try:
            write_atomic(segmentation, self._writer.content(found, image, source))
        except InputError as error:
            reason = shown(error, _MOST_LETTERS)
            log.warning("%s: %s", source, reason)
            return ["", reason]
        return [str(segmentation), ""]


def _file_of(mask: NDArray[Any], image: Any, path: Path) -> tuple[str, bytes]:
    """Return the ending and the content of a file with a mask on the grid of its image's file.

    That is NIfTI, and PNG for pictures, which have no position in the patient.
    """
    import nibabel
    from PIL import Image

    from fedmed_flower.images.dicom import read_dicom
    from fedmed_flower.images.headers import is_dicom

    affine = np.asarray(image.meta.get("original_affine", image.affine), np.float64)
    if image.ndim == 3:
        # As it lies in its file: the image read from it has the axes and the spacing of a picture.
        dicom = is_dicom(path)
        if not dicom and "original_affine" not in image.meta:
            if mask.dtype != np.uint8:
                raise InputError("a mask of a picture holds numbers up to 255: change label_values")
            picture = io.BytesIO()
            Image.fromarray(mask).save(picture, "PNG")
            return ".png", picture.getvalue()
        mask = mask.T
        if dicom:
            mask = mask[..., None]
            affine = read_dicom(path)[1]
        else:
            stored: Any = nibabel.load(path)
            mask = mask.reshape(stored.shape[:3])
            affine = stored.affine
    nifti: Any = nibabel.Nifti1Image(mask, affine)  # type: ignore[no-untyped-call]
    nifti.header.set_xyzt_units("mm")
    # Without a time in it, equal masks are equal files.
    return ".nii.gz", gzip.compress(nifti.to_bytes(), mtime=0)


class _Rows(_Worker):
    """Predicts the rows of tables."""

    def head(self) -> list[str]:
        return ["file", "line", "patient", *self._names(), _PROBLEM]

    def _names(self) -> list[str]:
        schema = self.client.schema
        if schema.task in ("binary", "multi-class"):
            return [*(f"probability {name}" for name in schema.classes), "predicted"]
        if schema.task != "survival":
            return ["predicted"]
        return ["risk", *(f"survival {edge:.12g}" for edge in self._edges())]

    def _edges(self) -> list[float]:
        """Return the times at which survival is predicted; a Cox model predicts a risk alone."""
        survival = self.client.survival
        if survival.survival_loss == "cox":
            return []
        from fedmed_flower.models.survival import interval_edges

        edges = interval_edges(survival.survival_horizon, survival.survival_intervals)
        values: list[float] = edges[1:].tolist()
        return values

    def lines(self, source: Source) -> list[Line]:
        from fedmed_flower.data.schema import read_table

        if isinstance(source, tuple):
            raise InputError("--channels is for images")
        table = read_table(source, self.client.schema, outcome=False)
        outputs = self.client.predict(self.network, self.client.prepare(table.rows, train=False))
        # A model is asked without a column that it was trained with: whoever reads must know.
        note = f"no column {', '.join(map(repr, table.lacking))}: counted as missing"
        problem = note if table.lacking else ""
        triples = zip(table.rows, table.lines, self._values(outputs), strict=True)
        lines: list[Line] = [
            [name_of(source), line, _patient(row["patient"]), *values, problem]
            for row, line, values in triples
        ]
        if table.rejected:
            why = "; ".join(text for text in table.problems if "rejected" in text)
            blank = [""] * (len(self.head()) - 2)
            lines.append([name_of(source), *blank, shown(why, _MOST_LETTERS)])
        return lines

    def _values(self, outputs: NDArray[np.float32]) -> Iterator[Line]:
        """Yield what is predicted of each row."""
        schema = self.client.schema
        if schema.task in ("binary", "multi-class"):
            shares = class_probabilities(outputs).tolist()
            names = [schema.classes[index] for index in guessed_classes(outputs)]
            yield from ([*values, name] for values, name in zip(shares, names, strict=True))
        elif schema.task == "survival":
            yield from self._lives(outputs)
        elif schema.task == "count":
            from fedmed_flower.metrics.outcomes import expected_counts

            yield from ([count] for count in expected_counts(outputs[:, 0]).tolist())
        else:
            yield from ([value] for value in outputs[:, 0].astype(np.float64).tolist())

    def _lives(self, outputs: NDArray[np.float32]) -> Iterator[Line]:
        from fedmed_flower.models.survival import risk_from_hazards, survival_from_hazards

        if not self._edges():
            yield from ([risk] for risk in outputs[:, 0].astype(np.float64).tolist())
            return
        curves = survival_from_hazards(outputs)[:, 1:].tolist()
        risks = np.asarray(risk_from_hazards(outputs)).tolist()
        yield from ([risk, *curve] for risk, curve in zip(risks, curves, strict=True))


def _patient(patient: Any) -> str:
    """Return a patient as the table names it; empty if the table names none."""
    return "" if patient is None or isinstance(patient, LineNumber) else str(patient)
