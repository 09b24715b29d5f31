"""The files that a run leaves at a hospital: the split of its patients, and its pictures."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context

from fedmed_flower.data.pictures import Picture
from fedmed_flower.data.rows import column_of
from fedmed_flower.data.site import SPLITS, Site, SiteData, patients_of
from fedmed_flower.errors import InputError
from fedmed_flower.files import cell_text, file_name, plain_text, write_atomic, write_rows
from fedmed_flower.settings.text import with_type_of
from fedmed_flower.wire import LEDGER_DIR, RUN_KEY

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("flwr.fedmed")


def output_folder(context: Context, site: Site, message: Mapping[str, Any]) -> Path | None:
    """Return the folder for files that do not leave a hospital; None if it has none.

    A hospital sets it by ``output-dir`` of its node config; in that folder each run, together with
    its models for comparison, has a folder of its own. In a simulation it is the run folder.

    Parameters
    ----------
    context : Context
    site : Site
    message : mapping
        The message's config.

    Raises
    ------
    InputError
        If ``output-dir`` is not a folder.
    """
    given = context.node_config.get("output-dir")
    if given is not None:
        folder = Path(str(with_type_of("", given, "output-dir"))).expanduser()
        if not folder.is_dir():
            raise InputError(f"output-dir of site {site.name} is not a folder: {folder}")
        key = str(message.get(RUN_KEY, context.run_id))
        return folder / file_name(key.partition("/")[0])
    ledgers = str(message.get(LEDGER_DIR, ""))
    return Path(ledgers).parent if site.simulated and ledgers else None


def keep_splits(context: Context, site: Site, message: ConfigRecord, data: SiteData) -> str:
    """Write the split of each patient to ``splits/SITE.csv``, once a run.

    Returns
    -------
    str
        How many patients have come, gone, or moved to another split since the file was written;
        empty if none has, or if the hospital has no output folder.
    """
    folder = output_folder(context, site, message)
    if folder is None:
        return ""
    path = folder / "splits" / f"{file_name(site.name)}.csv"
    now = {patient: split for split in SPLITS for patient in _patients(data, split)}
    if not path.exists():
        text = io.StringIO(newline="")
        write_rows(text, [("patient", "split"), *now.items()])
        write_atomic(path, text.getvalue().encode(errors="backslashreplace"))
        return ""
    with path.open(encoding="utf-8", newline="") as file:
        _, *lines = csv.reader(file)
    before = {cell_text(line[0]): line[1] for line in lines if len(line) == 2}
    now = {_as_written(patient): split for patient, split in now.items()}
    moved = sum(before[patient] != now[patient] for patient in before.keys() & now.keys())
    counts = {
        "come": len(now.keys() - before.keys()),
        "gone": len(before.keys() - now.keys()),
        "moved to another split": moved,
    }
    changes = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    if not changes:
        return ""
    log.warning("%s: of its patients, %s since %s was written", site.name, changes, path)
    return f"of its patients, {changes} since the run began"


def rows_of(data: SiteData) -> list[str]:
    """Return a text for each row: its split and its patient."""
    return [
        f"{split} {patient}" for split in SPLITS for patient in patients_of(getattr(data, split))
    ]


def _as_written(patient: str) -> str:
    return patient.encode(errors="backslashreplace").decode()


def keep_pictures(folder: Path, site: Site, pictures: Sequence[Picture]) -> None:
    """Write pictures that may not leave to ``pictures-kept/SITE/1-TITLE.png`` and so on."""
    own = folder / "pictures-kept" / file_name(site.name)
    for number, picture in enumerate(pictures, start=1):
        write_atomic(own / f"{number}-{plain_text(picture.title)}.png", picture.png)
    log.info("%s: %d pictures in %s", site.name, len(pictures), own)


def keep_model(
    kind: str, context: Context, site: Site, message: ConfigRecord, state: Mapping[str, Tensor]
) -> None:
    """Write a model that stays at the hospital to its output folder, if it has one.

    Parameters
    ----------
    kind : str
        Name of the folder: the file is ``KIND/SITE.safetensors``.
    context, site, message
        As in `output_folder`.
    state : mapping of str to Tensor
    """
    from safetensors.torch import save

    folder = output_folder(context, site, message)
    if folder is None:
        return
    path = folder / kind / f"{file_name(site.name)}.safetensors"
    # Copies: tied weights share their memory, which the library refuses.
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}
    write_atomic(path, save(tensors))
    log.info("%s: the %s model is in %s", site.name, kind, path)


def _patients(data: SiteData, split: str) -> list[str]:
    patients = column_of(getattr(data, split), "patient")
    # A number names one patient, whether it is Python's, NumPy's or torch's.
    return list(dict.fromkeys(str(p.item() if hasattr(p, "item") else p) for p in patients))
