"""The network by run config: one of MONAI's by name, or the one in a MONAI bundle."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import logging
import textwrap
import tomllib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedmed_flower.errors import InputError
from fedmed_flower.settings.model import ModelSettings

log = logging.getLogger("flwr.fedmed")

_CONFIGS = ("inference.json", "inference.yaml", "inference.yml")
_NETWORK_KEYS = ("network_def", "network")
_MOST_LETTERS = 10_000  # of network-args
_MOST_WEIGHTS = 2**30  # of a network by name
_WEIGHTS = Path("models") / "model.pt"
# Arguments by which a network fetches weights from the internet or a file, and their off position.
_FETCHING = {"pretrained": False, "pretrained_url": None, "weights": None, "path_or_repo_id": None}


def build_network(settings: ModelSettings) -> nn.Module:
    """Return the network that the settings name; fresh weights follow torch's generator.

    Parameters
    ----------
    settings : ModelSettings
        `network` and its arguments may come from a server: nothing is built but MONAI's own
        networks from plain data, and none is asked to download or read weights. `bundle` is a
        folder on this machine's own disk, never a download: its ``configs/inference.json`` (or
        ``.yaml``, ``.yml``) can run any code, so whoever writes to that folder can. Only what the
        key ``network_def`` (or ``network``) needs is made of it. Weights are taken from
        ``models/model.pt``, where that is there, and no code in that file is run.

    Raises
    ------
    InputError
        If not exactly one of network and bundle is given, or what is given cannot be read or
        built or does not fit together; it names the file.
    """
    if bool(settings.network) == bool(settings.bundle):
        raise InputError(
            "give either network, a name in monai.networks.nets, or bundle, the folder of a MONAI "
            f"bundle: got network={settings.network!r} and bundle={settings.bundle!r}"
        )
    if settings.network:
        return _build(settings.network, settings.network_args)
    if settings.network_args:
        raise InputError(
            "network-args belongs to network: with bundle, arguments stand in the bundle's "
            f"config, got {settings.network_args!r}"
        )
    return _from_bundle(Path(settings.bundle).expanduser())


def _build(name: str, text: str) -> nn.Module:
    make, args = _named(name), _arguments(text)
    for key, off in _FETCHING.items():
        if args.get(key, off) != off:
            raise InputError(
                f"network-args must leave {key} out, got {args[key]!r}: for a network with "
                f"weights, set bundle to a folder that holds them as {_WEIGHTS.as_posix()}"
            )
    # Some networks would download by default.
    args |= {k: off for k, off in _FETCHING.items() if k in inspect.signature(make).parameters}
    weights = _weights(name, json.dumps(args, sort_keys=True))
    if weights > _MOST_WEIGHTS:
        raise InputError(
            f"network {name} with these network-args has {weights:,} weights, more than "
            f"{_MOST_WEIGHTS:,}"
        )
    try:
        model = make(**args)
    except Exception as error:  # Each network refuses arguments in its own way.
        raise InputError(f"network {name} with network-args {text!r}: {_cause(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"network {name} is a function that returns no network")
    return model


@lru_cache(maxsize=64)  # A network is built again in each round.
def _weights(name: str, args: str) -> int:
    """Return how many weights a network has, without memory for them; 0 if none can be told."""
    try:
        with torch.device("meta"):
            model = _named(name)(**json.loads(args))
        return sum(part.numel() for part in model.parameters())
    except Exception as error:
        # Some networks compute with what they make, which cannot be done without memory.
        log.debug("the weights of %s are not counted beforehand: %s", name, error)
        return 0


def _named(name: str) -> Callable[..., Any]:
    """Return the network class or function of MONAI that has this name."""
    # Importing MONAI takes seconds, which a client for tables need not wait for.
    from monai.networks import nets

    known: dict[str, Callable[..., Any]] = {
        key: value
        for key, value in vars(nets).items()
        # Functions in get_... look something up or download it.
        if (_is_network(value) or (inspect.isfunction(value) and not key.startswith("get_")))
        and value.__module__.startswith("monai.networks.")
    }
    if name in known:
        return known[name]
    # Of several spellings of one network, its own name comes last and stays.
    aliases = sorted(known, key=lambda key: key == known[key].__name__)
    spelled = {key.lower(): key for key in aliases}
    near = difflib.get_close_matches(name.lower(), spelled, n=1)
    hint = f"did you mean {spelled[near[0]]}?" if near else "it has UNet, SegResNet and others"
    raise InputError(f"monai.networks.nets has no network {name!r}: {hint}")


def _is_network(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _arguments(text: str) -> dict[str, Any]:
    """Return the arguments of a network: plain data by name."""
    if not text:
        return {}
    # A server may have sent it, and reading TOML takes as long as the square of a key's length.
    if len(text) > _MOST_LETTERS:
        raise InputError(
            f"network-args must have at most {_MOST_LETTERS:,} letters, got {len(text):,}"
        )
    for read in (json.loads, _inline_table):
        try:
            found = read(text)
            if isinstance(found, dict) and _is_plain(found):
                return found
        except (ValueError, RecursionError):
            continue
    raise InputError(
        "network-args must be a TOML inline table or a JSON object of numbers, texts, lists and "
        f"tables, such as {{spatial_dims = 2, channels = [16, 32]}}, got {text!r}"
    )


def _inline_table(text: str) -> Any:
    found = tomllib.loads(f"value = {text}")
    return found["value"] if len(found) == 1 else None


def _is_plain(value: Any) -> bool:
    """Tell whether a value holds no dates, which TOML also knows."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _from_bundle(folder: Path) -> nn.Module:
    files = [folder / "configs" / name for name in _CONFIGS]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        wanted = ", ".join(_CONFIGS[1:])
        raise InputError(f"bundle: there is no {files[0]} (or {wanted})")
    if path.suffix != ".json" and importlib.util.find_spec("yaml") is None:
        raise InputError(f"{path} needs the package pyyaml: pip install pyyaml")
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    try:
        parser.read_config(path)
        key = next((key for key in _NETWORK_KEYS if key in parser), None)
    except Exception as error:  # JSON, YAML and what MONAI does with an odd file.
        raise InputError(f"{path} cannot be read: {_cause(error)}") from error
    if key is None:
        raise InputError(f"{path} has no key {' or '.join(_NETWORK_KEYS)}")
    try:
        model = parser.get_parsed_content(key)
    except Exception as error:  # A config can run any code.
        raise InputError(f"{path}: {key} cannot be built: {_cause(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{path}: {key} gives no network, but a {type(model).__name__}")
    if (folder / _WEIGHTS).exists():
        _load_weights(model, folder / _WEIGHTS, path.name)
    return model


def _load_weights(model: nn.Module, path: Path, config: str) -> None:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Of the file system, of zip, of pickle and of torch itself.
        raise InputError(
            f"{path} holds no weights that load without running its code: save a state dict there "
            f"({_cause(error)})"
        ) from error
    state, entries = _state_in(found, path), model.state_dict()
    prefix = "module."
    if all(n.startswith(prefix) for n in state) and not all(n.startswith(prefix) for n in entries):
        # Left by torch's DataParallel.
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    shapes = [{n: tuple(value.shape) for n, value in some.items()} for some in (entries, state)]
    wrong = [n for n in shapes[0] | shapes[1] if shapes[0].get(n) != shapes[1].get(n)]
    if wrong:
        here, there = (some.get(wrong[0], "nothing") for some in shapes)
        raise InputError(
            f"{path} does not fit the network of {config}: {len(wrong)} entries differ, such as "
            f"{wrong[0]} (network: {here}, file: {there})"
        )
    model.load_state_dict(state)


def _state_in(found: Any, path: Path) -> Mapping[str, Tensor]:
    """Return the state dict that a file holds, by itself or under one key."""
    if _is_state(found):
        return found  # type: ignore[no-any-return]
    table = found if isinstance(found, Mapping) else {}
    keys = [key for key, value in table.items() if _is_state(value)]
    if len(keys) != 1:
        held = f"state dicts under {', '.join(map(repr, keys))}" if keys else "no state dict"
        raise InputError(f"{path} holds {held}: save the state dict of the network alone there")
    return table[keys[0]]  # type: ignore[no-any-return]


def _is_state(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _cause(error: BaseException) -> str:
    """Return what was behind an error as one line; MONAI raises its own on top."""
    while error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)
