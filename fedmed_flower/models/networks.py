"""The network that a run config names: one of MONAI's, or the one in a MONAI bundle."""

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
from fedmed_flower.settings.text import setting_error

log = logging.getLogger("flwr.fedmed")

_CONFIGS = ("inference.json", "inference.yaml", "inference.yml")
_NETWORK_KEYS = ("network_def", "network")
_MOST_LETTERS = 10_000  # of network-args
_MOST_WEIGHTS = 2**30  # of one of MONAI's networks
_WEIGHTS = Path("models") / "model.pt"
# Arguments by which a network fetches weights from the internet or a file, and the value of each
# that switches it off.
_FETCHING = {"pretrained": False, "pretrained_url": None, "weights": None, "path_or_repo_id": None}


def build_network(settings: ModelSettings) -> nn.Module:
    """Return the network that the settings name; fresh weights follow torch's generator.

    Parameters
    ----------
    settings : ModelSettings
        `network` and its arguments may come from a server. So only MONAI's own networks are built,
        from plain data, and none may download or read weights. `bundle` is a folder on this
        machine's own disk, never a download. Its ``configs/inference.json`` (or ``.yaml``,
        ``.yml``) can run any code, so whoever writes to that folder can run code here. Only the key
        ``network_def`` (or ``network``), and what it needs, is built. Weights come from
        ``models/model.pt`` if that file exists; no code in it is run.

    Raises
    ------
    InputError
        If not exactly one of network and bundle is set, or the one that is set cannot be read or
        built, or weights and network do not fit; it names the file.
    """
    if bool(settings.network) == bool(settings.bundle):
        raise setting_error(
            "give either network, a name in monai.networks.nets, or bundle, the folder of a MONAI "
            f"bundle: got network={settings.network!r} and bundle={settings.bundle!r}",
            "network",
        )
    if settings.network:
        return _build(settings.network, settings.network_args)
    if settings.network_args:
        raise InputError(
            "network-args is only for network: with bundle, put arguments into the bundle's "
            f"config, got {settings.network_args!r}"
        )
    return _from_bundle(Path(settings.bundle).expanduser())


def _build(name: str, text: str) -> nn.Module:
    make = _named(name)
    args = _arguments(text)
    for key, off in _FETCHING.items():
        if args.get(key, off) != off:
            raise setting_error(
                f"network-args must not set {key}, got {args[key]!r}: for a network with weights, "
                f"set bundle to a folder that holds them as {_WEIGHTS.as_posix()}",
                "network-args",
            )
    # Some networks would download by default.
    args |= {k: off for k, off in _FETCHING.items() if k in inspect.signature(make).parameters}
    weights = _weights(name, json.dumps(args, sort_keys=True))
    if weights > _MOST_WEIGHTS:
        raise InputError(
            f"network {name} with these network-args has {weights:,} weights: at most "
            f"{_MOST_WEIGHTS:,} are allowed"
        )
    try:
        model = make(**args)
    except Exception as error:  # Each network raises its own errors for wrong arguments.
        raise InputError(f"network {name} with network-args {text!r}: {_cause(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"network {name} is a function that returns no network: name another one")
    return model


@lru_cache(maxsize=64)  # Since a network is built again in each round.
def _weights(name: str, args: str) -> int:
    """Return the number of weights of a network, without memory for them; 0 if it is unknown."""
    try:
        with torch.device("meta"):
            model = _named(name)(**json.loads(args))
        return sum(part.numel() for part in model.parameters())
    except Exception as error:
        # Some networks compute with their weights while they are built, which needs memory.
        log.debug("the weights of %s are not counted beforehand: %s", name, error)
        return 0


def known_networks() -> dict[str, Callable[..., Any]]:
    """Return MONAI's network classes, and functions that return a network, by their names."""
    # Imported here: MONAI takes seconds, which a client for tables does not need.
    from monai.networks import nets

    return {
        key: value
        for key, value in vars(nets).items()
        # Functions named get_... look something up or download it.
        if (_is_network(value) or (inspect.isfunction(value) and not key.startswith("get_")))
        and value.__module__.startswith("monai.networks.")
    }


def _named(name: str) -> Callable[..., Any]:
    known = known_networks()
    if name in known:
        return known[name]
    # Among several spellings of one network, its own name comes last, so that `spelled` keeps it.
    aliases = sorted(known, key=lambda key: key == known[key].__name__)
    spelled = {key.lower(): key for key in aliases}
    near = difflib.get_close_matches(name.lower(), spelled, n=1)
    hint = f"did you mean {spelled[near[0]]}?" if near else "it has UNet, SegResNet and others"
    raise InputError(f"monai.networks.nets has no network {name!r}: {hint}")


def _is_network(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _arguments(text: str) -> dict[str, Any]:
    """Return the arguments of a network: plain data by name.

    Raises
    ------
    InputError
        If the text is too long, or neither a TOML inline table nor a JSON object of plain data.
    """
    if not text:
        return {}
    # A server may have sent the text, and the time to read TOML grows with the square of a key's
    # length.
    if len(text) > _MOST_LETTERS:
        raise setting_error(
            f"network-args must have at most {_MOST_LETTERS:,} letters, got {len(text):,}",
            "network-args",
        )
    for read in (json.loads, _inline_table):
        try:
            arguments = read(text)
            if isinstance(arguments, dict) and _is_plain(arguments):
                return arguments
        except (ValueError, RecursionError):
            continue
    raise setting_error(
        "network-args must be a TOML inline table or a JSON object of numbers, texts, lists and "
        f"tables, such as {{spatial_dims = 2, channels = [16, 32]}}, got {text!r}",
        "network-args",
    )


def _inline_table(text: str) -> Any:
    table = tomllib.loads(f"value = {text}")
    return table["value"] if len(table) == 1 else None


def _is_plain(value: Any) -> bool:
    """Return whether a value holds no dates, which TOML also has."""
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
    except Exception as error:  # Errors of JSON, of YAML, and of MONAI with a malformed file.
        raise InputError(f"{path} cannot be read: {_cause(error)}") from error
    if key is None:
        raise InputError(f"{path} has no key {' or '.join(_NETWORK_KEYS)}")
    try:
        model = parser.get_parsed_content(key)
    except Exception as error:  # A config can run any code.
        raise InputError(f"{path}: {key} cannot be built: {_cause(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{path}: {key} must be a network, got a {type(model).__name__}")
    if (folder / _WEIGHTS).exists():
        _load_weights(model, folder / _WEIGHTS, path.name)
    return model


def _load_weights(model: nn.Module, path: Path, config: str) -> None:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Errors of the file system, of zip, of pickle and of torch.
        raise InputError(
            f"{path} holds no weights that load without running its code: save a state dict there "
            f"({_cause(error)})"
        ) from error
    state = _state_in(content, path)
    entries = model.state_dict()
    prefix = "module."
    if all(n.startswith(prefix) for n in state) and not all(n.startswith(prefix) for n in entries):
        # torch's DataParallel adds the prefix to every name.
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    wanted = _shapes(entries)
    given = _shapes(state)
    wrong = [name for name in wanted | given if wanted.get(name) != given.get(name)]
    if wrong:
        example = wrong[0]
        raise InputError(
            f"{path} does not fit the network of {config}: {len(wrong)} entries differ, such as "
            f"{example} (network: {wanted.get(example, 'nothing')}, file: "
            f"{given.get(example, 'nothing')})"
        )
    model.load_state_dict(state)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _state_in(content: Any, path: Path) -> Mapping[str, Tensor]:
    """Return the state dict that a file holds, by itself or under one key.

    Raises
    ------
    InputError
        If the file holds no state dict, or several.
    """
    if _is_state(content):
        return content  # type: ignore[no-any-return]
    table = content if isinstance(content, Mapping) else {}
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
    """Return the first cause of an error as one line, since MONAI raises its own errors on top."""
    while error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)
