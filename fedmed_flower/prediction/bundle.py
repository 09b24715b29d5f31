"""A run's model as a MONAI bundle: a folder that ``python -m monai.bundle run`` executes on files.

Its network is TorchScript, so that it needs neither the app nor this package. The steps before and
after the network are MONAI's own transforms, as a client of this package has them.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from fedmed_flower.clients.base import MedicalClient
from fedmed_flower.errors import InputError
from fedmed_flower.files import write_atomic
from fedmed_flower.prediction.export import NOTICE, metadata, torchscript_of
from fedmed_flower.prediction.predictor import Predictor, example_of

# Whole images are padded to a multiple of this, as `SegmentationClient` does.
_DIVISOR = 16
_WINDOWS = 4


def export_bundle(
    predictor: Predictor, client: MedicalClient, network: nn.Module, out: Path
) -> Path:
    """Write a model as a MONAI bundle, whose TorchScript gives the outputs of the model.

    Parameters
    ----------
    predictor : Predictor
    client, network
        As `Predictor.client` and `Predictor.network` return them, on the CPU.
    out : Path
        The folder.

    Raises
    ------
    InputError
        If the client neither classifies nor outlines, or has bags, outlines 2D images, fits images
        into ``image-size``, or prepares images by code of its own; if the network cannot be traced;
        or if the folder exists.
    """
    if out.exists():
        raise InputError(f"{out} exists already: give another --out")
    volumes: Any = client
    if hasattr(client, "schema"):
        raise InputError("a MONAI bundle is for images, and this model takes tables: use --to onnx")
    if predictor.description.overridden:
        raise InputError(
            f"{predictor.description.name} defines {', '.join(predictor.description.overridden)} "
            "itself, which a bundle cannot hold: use --to onnx or --to torchscript"
        )
    if hasattr(client, "bags"):
        raise InputError(
            "a MONAI bundle is for images, and this model takes bags of patches: use --to onnx or "
            "--to torchscript"
        )
    if predictor.description.base not in ("ClassificationClient", "SegmentationClient"):
        raise InputError(
            "a MONAI bundle holds classes or masks, and this model says something else of an "
            "image: use --to onnx or --to torchscript"
        )
    if volumes.image_size:
        raise InputError(
            "MONAI has no transform that fits images into image-size, so that a bundle cannot hold "
            "it: use --to onnx or --to torchscript"
        )
    masks = hasattr(client, "classes")
    if masks and volumes.spatial_dims == 2:
        raise InputError("a bundle holds no masks of 2D images: use --to onnx or --to torchscript")
    script = torchscript_of(predictor, client, network)
    _, free = example_of(client, network)
    files = {
        "configs/inference.json": _inference(volumes, masks),
        "configs/metadata.json": _metadata(predictor, volumes, masks, len(free) > 1),
    }
    write_atomic(out / "models" / "model.ts", script)
    for name, content in files.items():
        write_atomic(out / name, json.dumps(content, indent=2).encode())
    return out


def _inference(client: Any, masks: bool) -> dict[str, Any]:
    pattern = "*.nii*" if client.spatial_dims == 3 else "*.png"
    config: dict[str, Any] = {
        "imports": ["$import glob", "$import numpy as np", "$import torch", "$import monai"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/images'",
        "output_dir": "$@bundle_root + '/eval'",
        "files": f"$sorted(glob.glob(@dataset_dir + '/{pattern}'))",
        "device": "$torch.device('cpu')",
        "network_def": "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _before(client)},
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': file} for file in @files]",
            "transform": "@preprocessing",
        },
        "initialize": ["$torch.set_grad_enabled(False)"],
    }
    tensor = "row['image'].as_tensor()[None].to(@device)"
    if not masks:
        scores = f"@network_def({tensor})"
        config["saver"] = {
            "_target_": "CSVSaver",
            "output_dir": "@output_dir",
            "filename": "predictions.csv",
        }
        shares = f"@shares({scores})[0].cpu()"
        config["shares"] = (
            "$lambda z: torch.sigmoid(torch.cat([-z, z], 1)) if z.shape[1] == 1 "
            "else torch.softmax(z, 1)"
        )
        save = f"$[@saver.save({shares}, row['image'].meta) for row in @dataset]"
        return config | {"run": [save, "$@saver.finalize()"]}
    size = client.patch_size
    window = (
        list(size) if size else f"[-(-side // {_DIVISOR}) * {_DIVISOR} for side in x.shape[2:]]"
    )
    config["outline"] = (
        f"$lambda x: monai.inferers.sliding_window_inference(x, {window}, {_WINDOWS}, "
        f"@network_def, overlap={client.overlap}, mode='gaussian')"
    )
    config["postprocessing"] = {"_target_": "Compose", "transforms": _after(client)}
    outlined = f"monai.data.MetaTensor(@outline({tensor})[0].cpu())"
    run = f"$[@postprocessing({{**row, 'pred': {outlined}}}) for row in @dataset]"
    return config | {"run": [run]}


def _before(client: Any) -> list[dict[str, Any]]:
    """Return the transforms of an image, as `ImagingClient` has them."""
    image = {"keys": "image"}
    load = {"_target_": "LoadImaged", **image, "ensure_channel_first": True}
    if client.spatial_dims == 2:
        # Rows first.
        load |= {"reader": "PILReader", "reverse_indexing": False}
    steps: list[dict[str, Any]] = [load]
    settings = client.imaging
    if client.spatial_dims == 3 and settings.orientation:
        axes = {"axcodes": settings.orientation, "labels": None}
        steps.append({"_target_": "Orientationd", **image, **axes})
    if spacing := settings.numbers("spacing", client.spatial_dims):
        steps.append({"_target_": "Spacingd", **image, "pixdim": list(spacing), "mode": "bilinear"})
    low, high = client.ct_window
    scaled = {
        "ct": {
            "_target_": "ScaleIntensityRanged",
            "a_min": low,
            "a_max": high,
            "b_min": 0.0,
            "b_max": 1.0,
            "clip": True,
        },
        "mr": {"_target_": "NormalizeIntensityd", "nonzero": True, "channel_wise": True},
        "xray": {
            "_target_": "ScaleIntensityRangePercentilesd",
            "lower": 1,
            "upper": 99,
            "b_min": 0.0,
            "b_max": 1.0,
            "clip": True,
            "channel_wise": True,
        },
        "": {"_target_": "NormalizeIntensityd", "channel_wise": True},
    }
    steps.append(scaled[client.modality] | image)
    if client.patch_size and not hasattr(client, "classes"):
        size = list(client.patch_size)
        steps.append({"_target_": "ResizeWithPadOrCropd", **image, "spatial_size": size})
    return steps


def _after(client: Any) -> list[dict[str, Any]]:
    """Return the transforms of the network's output: to the grid of the file, and to a mask."""
    overlapping = bool(client.regions)
    activation = {"sigmoid": True} if overlapping else {"softmax": True}
    decision = {"threshold": 0.5} if overlapping else {"argmax": True}
    steps: list[dict[str, Any]] = [
        {"_target_": "Activationsd", "keys": "pred", **activation},
        {
            "_target_": "Invertd",
            "keys": "pred",
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": False,
        },
        {"_target_": "AsDiscreted", "keys": "pred", **decision},
    ]
    if values := list(client.label_values):
        numbers = list(range(len(values)))
        labels = {"orig_labels": numbers, "target_labels": values}
        steps.append({"_target_": "MapLabelValued", "keys": "pred", **labels})
    save = {"output_dir": "@output_dir", "output_postfix": "mask", "separate_folder": False}
    save |= {"output_dtype": "$np.int16", "resample": False, "print_log": False}
    return [*steps, {"_target_": "SaveImaged", "keys": "pred", **save}]


def _metadata(predictor: Predictor, client: Any, masks: bool, any_size: bool) -> dict[str, Any]:
    known = metadata(predictor, client)
    names: Any = range(client.num_classes)
    if masks:
        names = client.classes if client.regions else ["background", *client.classes]
    shape: list[Any] = ["*"] * client.spatial_dims
    if client.patch_size or (client.image_shape and not any_size):
        shape = list(client.patch_size or client.image_shape[1:])
    image = {
        "type": "image",
        "format": "magnitude",
        "num_channels": client.image_shape[0] if client.image_shape else 1,
        "spatial_shape": shape,
        "dtype": "float32",
        "is_patch_data": bool(client.patch_size) and masks,
    }
    output = {
        "type": "image" if masks else "probabilities",
        "format": "segmentation" if masks else "classes",
        "num_channels": client.num_classes,
        "dtype": "float32",
        "is_patch_data": image["is_patch_data"],
        "channel_def": {str(number): str(name) for number, name in enumerate(names)},
    }
    return {
        "version": "0.1.0",
        "monai_version": version("monai"),
        "pytorch_version": version("torch"),
        "numpy_version": version("numpy"),
        "name": predictor.app,
        "task": "segmentation" if masks else "classification",
        "description": f"Model of a federated run of {predictor.app}: {NOTICE}.",
        "intended_use": NOTICE,
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": output}},
        "fedmed": known,
    }
