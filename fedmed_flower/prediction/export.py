"""A run's model in the forms that other programs take: ONNX, TorchScript, a MONAI bundle.

Each is compared with the model when it is made, on made-up batches of one and three records and,
where images may have any size, of two sizes: nothing is written that gives other outputs.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.errors import InputError
from fedmed_flower.files import write_atomic
from fedmed_flower.prediction.predictor import Predictor, example_of

# The largest distance of an output, in units of the largest output.
TOLERANCE = 1e-5
NOTICE = "research software, not a medical device"
_EXTRA = ("onnx", "onnxruntime", "onnxscript")
_MORE = 16
_SEED = 1


def export_onnx(predictor: Predictor, client: MedicalClient, network: nn.Module, out: Path) -> Path:
    """Write a model as ONNX, whose metadata names inputs, outputs and the preparation of rows.

    Parameters
    ----------
    predictor : Predictor
    client, network
        As `Predictor.client` and `Predictor.network` return them, on the CPU.
    out : Path
        The file.

    Raises
    ------
    InputError
        If a package of the extra ``onnx`` is missing, the network cannot be converted, onnxruntime
        gives outputs that differ by more than `TOLERANCE`, or the file exists.
    """
    lacking = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if lacking:
        raise InputError(f"--to onnx needs {', '.join(lacking)}: pip install 'fedmed-flower[onnx]'")
    _require_free(out)
    import onnx
    import onnxruntime

    main = _Main(network).eval()
    example, free = example_of(client, network)
    name = "features" if hasattr(client, "schema") else "images"
    with _quiet(), _failing("ONNX"):
        program = torch.onnx.export(
            main,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=[name],
            output_names=["outputs"],
            dynamic_shapes=(dict.fromkeys(free, torch.export.Dim.AUTO),),
        )
        if program is None:
            raise RuntimeError("there is no result")
        model = program.model_proto
        properties = {key: _text(value) for key, value in metadata(predictor, client).items()}
        onnx.helper.set_model_props(model, properties)
        content = model.SerializeToString()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0].name

    def run(batch: Tensor) -> NDArray[Any]:
        return np.asarray(session.run(None, {given: batch.numpy()})[0])

    _compare("ONNX", main, run, example, free)
    write_atomic(out, content)
    return out


def export_torchscript(
    predictor: Predictor, client: MedicalClient, network: nn.Module, out: Path
) -> Path:
    """Write a model as TorchScript, with ``metadata.json`` as an extra file.

    Parameters
    ----------
    predictor, client, network, out
        As in `export_onnx`.

    Raises
    ------
    InputError
        If the network cannot be traced, the result gives outputs that differ by more than
        `TOLERANCE`, or the file exists.
    """
    _require_free(out)
    write_atomic(out, torchscript_of(predictor, client, network))
    return out


def torchscript_of(predictor: Predictor, client: MedicalClient, network: nn.Module) -> bytes:
    """Return a model as TorchScript, compared with the model.

    Raises
    ------
    InputError
        As in `export_torchscript`.
    """
    main = _Main(network).eval()
    example, free = example_of(client, network)
    with _quiet(), _failing("TorchScript"), torch.no_grad():
        script = torch.jit.trace(main, example, check_trace=False)  # type: ignore[no-untyped-call]
        extra = {"metadata.json": json.dumps(metadata(predictor, client), indent=1)}
        file = io.BytesIO()
        torch.jit.save(script, file, _extra_files=extra)
        read = torch.jit.load(io.BytesIO(file.getvalue()))  # type: ignore[no-untyped-call]

    def run(batch: Tensor) -> NDArray[Any]:
        with _quiet(), torch.no_grad():
            return np.asarray(read(batch).numpy())

    _compare("TorchScript", main, run, example, free)
    return file.getvalue()


def metadata(predictor: Predictor, client: Any) -> dict[str, Any]:
    """Return what others must know of a model: inputs, outputs, preparation, and what it is not."""
    about = asdict(predictor.description)
    known: dict[str, Any] = {
        "app": predictor.app,
        "kind": about["base"],
        "notice": NOTICE,
        "trained on generated data": predictor.generated,
        "declared": about["declared"],
        "settings": about["settings"],
    }
    if hasattr(client, "schema"):
        return known | {
            "input": "float32 (batch, features)",
            "features": list(client.prepared_by.names),
            "preparation": json.loads(client.prepared_by.to_text()),
            "outputs": f"float32 (batch, outputs), of the task {client.schema.task}",
        }
    sides = ", ".join("xyz"[: client.spatial_dims])
    patches = "patches, " if hasattr(client, "bags") else ""
    outputs = "(batch, classes), before softmax (one output: before the sigmoid)"
    if about["declared"].get("regions"):
        outputs = f"(batch, regions, {sides}), before the sigmoid of each region"
    elif hasattr(client, "classes"):
        outputs = f"(batch, classes with the background, {sides}), before softmax"
    elif hasattr(client, "findings"):
        outputs = "(batch, findings), before the sigmoid of each"
    elif hasattr(client, "grades"):
        outputs = (
            "(batch, grades - 1): the log-odds to be above the lowest grade, then by how much they "
            "fall to each next grade, before softplus"
        )
    elif hasattr(client, "unit"):
        shift, factor, _ = client.scale
        outputs = f"(batch, 1): number = {factor:.12g} * output + {shift:.12g}"
    return known | {
        "input": f"float32 (batch, {patches}channels, {sides}), on the grid and scaled as declared",
        "outputs": f"float32 {outputs}",
    }


class _Main(nn.Module):
    """The network's main output, where it has several."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        outputs: Any = self.network(images)
        first: Tensor = outputs[0] if isinstance(outputs, list | tuple) else outputs
        return first


def _compare(
    form: str,
    main: nn.Module,
    run: Callable[[Tensor], NDArray[Any]],
    example: Tensor,
    free: Sequence[int],
) -> None:
    """Raise `InputError` if a converted model gives other outputs than the model."""
    generator = torch.Generator().manual_seed(_SEED)
    sides = list(example.shape[1:])
    shapes = [[1, *sides], [3, *sides]]
    if len(free) > 1:
        shapes.append([1, *(side + _MORE * (dim in free) for dim, side in enumerate(sides, 1))])
    for shape in shapes:
        batch = torch.rand(shape, generator=generator)
        with torch.no_grad():
            wanted = main(batch).numpy()
        try:
            found = run(batch)
        except Exception as error:  # Each runtime has errors of its own.
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
            raise InputError(
                f"the model as {form} fails for the shape {shape}: {reason}"
            ) from error
        distance = np.abs(found - wanted).max() if found.shape == wanted.shape else np.inf
        if not distance <= TOLERANCE * np.abs(wanted).max():
            raise InputError(
                f"the model as {form} gives other outputs than the model for the shape {shape}, "
                f"by up to {distance:.3g}: nothing was written"
            )


def _require_free(out: Path) -> None:
    if out.exists():
        raise InputError(f"{out} exists already: give another --out")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def _failing(form: str) -> Iterator[None]:
    """Turn an error of a converter into one line."""
    try:
        yield
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 500)
        raise InputError(f"the network cannot be written as {form}: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converters' advice to developers from the console."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
