"""What a site keeps from one of its rounds to the next, in a folder of its own.

The server says in each message how many of the site's replies it has taken so far. The site goes on
from the state after exactly so many, and writes the next one beside it: two generations. So a round
that is repeated after a crash, or whose reply was left out or lost, starts from the state before
it, whatever the site has done since.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedmed_flower.clients.storage import output_folder
from fedmed_flower.data.site import Site
from fedmed_flower.errors import InputError
from fedmed_flower.files import file_name, open_file, write_atomic
from fedmed_flower.privacy.patient import ledger_path
from fedmed_flower.wire import TAKEN

log = logging.getLogger("flwr.fedmed")

_FOLDER = "state"
_ENDING = ".safetensors"
# The name of its record in Flower's own state, for a site without a folder.
_RECORD = "fedmed-state"
_MOST_BYTES = 1 << 40


class SiteState:
    """The state of one site in one run, for one message.

    Parameters
    ----------
    context : Context
        Its state takes the site's if there is no folder.
    site : Site
    run : str
        Name of the run, as the ledger keeps it.
    config : mapping
        The message's config: `TAKEN`, the number of the site's replies that the server has taken.
        If it is not there, the site goes on from its newest state.

    Raises
    ------
    InputError
        If that number is none.
    """

    def __init__(self, context: Context, site: Site, run: str, config: Mapping[str, Any]) -> None:
        self._context = context
        self._site = site
        self._about = {"run": run, "site": site.name}
        self._folder = _folder(context, site, run, config)
        newest = max(self._generations(), default=0)
        self.generation = config.get(TAKEN, newest)
        if type(self.generation) is not int or self.generation < 0:
            raise InputError(f"{TAKEN} must be a whole number from 0 on, got {self.generation!r}")
        self._parts: dict[str, dict[str, Tensor]] | None = None

    def part(self, name: str) -> dict[str, Tensor]:
        """Return what was kept under a name; empty if nothing was.

        Raises
        ------
        InputError
            If the file is damaged.
        """
        return dict(self._loaded().get(name, {}))

    def save(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the next generation, durably; keep the one before it, and no other.

        Parameters
        ----------
        parts : dict of str to dict of Tensor
            By a name without ``/``.
        """
        following = self.generation + 1
        tensors = {
            f"{part}/{name}": value.detach().cpu().clone().contiguous()
            for part, values in parts.items()
            for name, value in values.items()
        }
        if self._folder is None:
            self._save_in_context(following, tensors)
            return
        about = {**self._about, "generation": str(following)}
        write_atomic(self._folder / f"{following}{_ENDING}", save(tensors, about))
        for generation in self._generations():
            if generation not in (self.generation, following):
                (self._folder / f"{generation}{_ENDING}").unlink(missing_ok=True)

    def _loaded(self) -> dict[str, dict[str, Tensor]]:
        if self._parts is None:
            self._parts = {}
            for key, value in self._read().items():
                part, _, name = key.partition("/")
                self._parts.setdefault(part, {})[name] = value
        return self._parts

    def _read(self) -> dict[str, Tensor]:
        if not self.generation:
            return {}
        if self.generation not in self._generations():
            log.warning(
                "%s: the state after %d rounds is not here: it starts anew",
                self._site.name,
                self.generation,
            )
            return {}
        if self._folder is None:
            return self._context_record(self.generation).to_torch_state_dict()
        path = self._folder / f"{self.generation}{_ENDING}"
        try:
            with open_file(self._folder, path.name, _MOST_BYTES) as file:
                data = file.read()
            about = _metadata(data)
            tensors = load(data)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"the site's state {path} cannot be read ({error}): remove it, and the site "
                "starts anew"
            ) from error
        wanted = {**self._about, "generation": str(self.generation)}
        if about != wanted:
            raise InputError(f"{path} is of {about}, and this is {wanted}: remove it")
        return tensors

    def _generations(self) -> list[int]:
        if self._folder is not None:
            stems = [path.stem for path in self._folder.glob(f"*{_ENDING}")]
            return [int(stem) for stem in stems if stem.isdecimal()]
        names = self._context.state.array_records
        kept = [name.removeprefix(_RECORD) for name in names if name.startswith(_RECORD)]
        return [int(number) for number in kept if number.isdecimal()]

    def _context_record(self, generation: int) -> ArrayRecord:
        return self._context.state.array_records[f"{_RECORD}{generation}"]

    def _save_in_context(self, following: int, tensors: dict[str, Tensor]) -> None:
        state = self._context.state
        for generation in self._generations():
            if generation != self.generation:
                del state[f"{_RECORD}{generation}"]
        state[f"{_RECORD}{following}"] = ArrayRecord(tensors)


def _folder(context: Context, site: Site, run: str, config: Mapping[str, Any]) -> Path | None:
    """Return the folder of a site's state in a run; None if it has none.

    It lies in the site's output folder. A hospital without one has it beside its ledger; a
    simulated site without a run folder has none.
    """
    record = config if isinstance(config, ConfigRecord) else ConfigRecord(dict(config))
    folder = output_folder(context, site, record)
    if folder is None and not site.simulated:
        folder = ledger_path(context, site, config).parent / "fedmed-runs"
        folder /= file_name(run.partition("/")[0])
    if folder is None:
        return None
    comparison = run.partition("/")[2]
    parts = (_FOLDER, file_name(comparison) if comparison else "rounds", file_name(site.name))
    return folder.joinpath(*parts)


def _metadata(data: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    found = json.loads(data[8 : 8 + length])["__metadata__"]
    return {str(key): str(value) for key, value in found.items()}
