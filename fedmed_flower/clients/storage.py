"""The files that a run leaves at a hospital: the split of its patients, and its pictures."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context

from fedmed_flower.data.pictures import Picture
from fedmed_flower.data.site import SPLITS, Site, SiteData
from fedmed_flower.errors import InputError
from fedmed_flower.files import file_name, plain_text, write_atomic, write_rows
from fedmed_flower.settings.text import with_type_of
from fedmed_flower.wire import LEDGER_DIR, RUN_KEY

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


def keep_splits(context: Context, site: Site, message: ConfigRecord, data: SiteData) -> None:
    """Write the split of each patient to ``splits/SITE.csv``, once a run."""
    folder = output_folder(context, site, message)
    if folder is None:
        return
    path = folder / "splits" / f"{file_name(site.name)}.csv"
    text = io.StringIO(newline="")
    write_rows(text, [("patient", "split")])
    for split in SPLITS:
        write_rows(text, ((patient, split) for patient in _patients(data, split)))
    content = text.getvalue().encode(errors="backslashreplace")
    if path.exists() and path.read_bytes() != content:
        log.warning("%s: the split of patients has changed since %s was written", site.name, path)
    elif not path.exists():
        write_atomic(path, content)


def keep_pictures(folder: Path, site: Site, pictures: Sequence[Picture]) -> None:
    """Write pictures that may not leave to ``pictures-kept/SITE/1-TITLE.png`` and so on."""
    own = folder / "pictures-kept" / file_name(site.name)
    for number, picture in enumerate(pictures, start=1):
        write_atomic(own / f"{number}-{plain_text(picture.title)}.png", picture.png)
    log.info("%s: %d pictures in %s", site.name, len(pictures), own)


def _patients(data: SiteData, split: str) -> list[str]:
    patients = [row["patient"] for row in getattr(data, split)]
    # A number names one patient, whether it is Python's, NumPy's or torch's.
    return list(dict.fromkeys(str(p.item() if hasattr(p, "item") else p) for p in patients))
