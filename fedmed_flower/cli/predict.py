"""The commands `fedmed predict` and `fedmed export`: use of a model after its run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmed_flower.cli.tables import console, input_errors
from fedmed_flower.errors import InputError

if TYPE_CHECKING:
    from fedmed_flower.clients.base import MedicalClient

_RUN = typer.Argument(metavar="RUN", help="A run folder, or the predictor.zip of one.")
_MODEL = typer.Option(
    help="Other weights of the same network, such as those that a hospital has fine-tuned: "
    "personal/SITE.safetensors in its output-dir, or in the run folder of a simulation."
)
_APP = typer.Option(
    help="Folder of the app. Its code is run. Needed if the app prepares rows by code of its own."
)


def predict(
    run: Annotated[Path, _RUN],
    files: Annotated[
        list[Path],
        typer.Argument(help="Images, volumes, folders with a DICOM series, or tables."),
    ],
    out: Annotated[
        Path, typer.Option(help="A folder for the results, or a .csv file for all but masks.")
    ],
    model: Annotated[Path | None, _MODEL] = None,
    app: Annotated[Path | None, _APP] = None,
    channels: Annotated[
        int, typer.Option(min=1, help="So many files after another are channels of one image.")
    ] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:NUMBER or auto.")] = "cpu",
    seg: Annotated[
        bool,
        typer.Option(
            "--seg", help="Write masks of DICOM series as DICOM SEG too. Needs the extra imaging."
        ),
    ] = False,
) -> None:
    """Predict files by the model of a run; not for diagnosis.

    The exit code is 1 if a file could not be used; its line in the table says why.
    """
    from fedmed_flower.prediction.files import predict_files
    from fedmed_flower.prediction.predictor import Predictor

    with input_errors():
        if len(files) % channels:
            raise InputError(
                f"--channels {channels} needs a multiple of {channels} files, got {len(files)}"
            )
        predictor = Predictor.load(run)
        if model is not None:
            predictor = predictor.with_weights(model)
        own = None if app is None else _class_of(app)
        client = predictor.client(device, own)
        network = predictor.network(client, own is not None)
        groups: list[Any] = [
            tuple(files[start : start + channels]) for start in range(0, len(files), channels)
        ]
        sources = groups if channels > 1 else files
        table, problems = predict_files(client, network, sources, out.expanduser(), seg)
    console.print(f"predictions: {table}")
    if predictor.generated:
        console.print("the model was trained on generated data, not patients", style="yellow")
    if problems:
        console.print(f"{problems} with a problem: see that column", style="red")
        raise typer.Exit(1)


class Form(StrEnum):
    """A form in which other programs take a model."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"
    BUNDLE = "bundle"


def export(
    run: Annotated[Path, _RUN],
    to: Annotated[Form, typer.Option(help="onnx needs the extra onnx.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File, or folder of a bundle.  [default: beside predictor.zip]"),
    ] = None,
    model: Annotated[Path | None, _MODEL] = None,
    app: Annotated[Path | None, _APP] = None,
) -> None:
    """Write the model of a run as ONNX, TorchScript or a MONAI bundle, and check its outputs."""
    from fedmed_flower.prediction import export as exports
    from fedmed_flower.prediction.bundle import export_bundle
    from fedmed_flower.prediction.predictor import Predictor

    with input_errors():
        predictor = Predictor.load(run)
        if model is not None:
            predictor = predictor.with_weights(model)
        own = None if app is None else _class_of(app)
        client = predictor.client("cpu", own)
        network = predictor.network(client, own is not None)
        name, write = {
            Form.ONNX: ("model.onnx", exports.export_onnx),
            Form.TORCHSCRIPT: ("model.ts", exports.export_torchscript),
            Form.BUNDLE: ("bundle", export_bundle),
        }[to]
        path = out or Path(predictor.where).parent / name
        written = write(predictor, client, network, path.expanduser())
    console.print(f"{to.value}, with the outputs of the model: {written}")


def _class_of(folder: Path) -> type[MedicalClient]:
    """Return the class of an app's client.

    Raises
    ------
    InputError
        If the folder is no Flower app, or its client is not one of this package.
    """
    from fedmed_flower.clients.app import HospitalApp
    from fedmed_flower.engines.project import load_project

    client = load_project(folder.expanduser()).client_app()
    if not isinstance(client, HospitalApp):
        raise InputError(f"{folder}: its ClientApp is not that of a client of this package")
    return client.client
