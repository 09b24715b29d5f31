"""Fingerprints of all that decides what becomes of an image: transforms, their code, its versions.

Two equal fingerprints must mean equal results to the bit. So a value whose effect cannot be told
from what it holds, such as a function that somebody passed, has none: `Unreadable` is raised, and
nothing that depends on it is kept.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, GenericAlias, ModuleType
from typing import Any

import monai
import nibabel
import numpy as np
import PIL
import pydicom
import torch
from monai.transforms import Transform

# Packages that read and change images.
_READERS = (monai, torch, np, nibabel, pydicom, PIL)
_LIBRARIES = ("site-packages", "dist-packages")
_MOST_LEVELS = 20
_MOST_FILES = 5_000
_MOST_BYTES = 64 << 20
_NO_MODULE = ModuleType("none")
# What names of a module stand for, if its source says all of it. Types are such as Sequence[int].
_BY_SOURCE = (ModuleType, type, BuiltinFunctionType, np.ufunc, GenericAlias)


class Unreadable(Exception):  # noqa: N818
    """A value, or code, of which no fingerprint tells what it does; the text names it."""


def digest(*values: Any) -> str:
    """Return 32 hexadecimal digits that differ if one of the values does.

    Parameters
    ----------
    values : any
        Numbers, texts, paths, arrays, tensors, dtypes, enumerations, classes, lists, tuples, sets
        and dicts of them, dataclasses, and MONAI's transforms with all their attributes.

    Raises
    ------
    Unreadable
        If a value is something else.
    """
    text = json.dumps([_plain(value, 0) for value in values])
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def code_digest(parts: Iterable[type | FunctionType]) -> str:
    """Return the digest of the code that these classes and functions consist of and use.

    It covers the names and versions of all installed packages, and the source files of their
    modules and of all modules that these have imported, as far as they are not installed.

    Raises
    ------
    Unreadable
        If a module has no source file, or its package is too large.
    """
    roots = sorted({root for module in _modules_of(parts) for root in _roots(module)})
    return digest(
        _environment(),
        torch.get_num_threads(),
        str(torch.get_default_dtype()),
        [_source_digest(root) for root in roots],
    )


def code_in(values: Iterable[Any]) -> Iterator[type | FunctionType]:
    """Yield the classes of transforms and of those in their attributes, and functions in these."""
    for value in values:
        if isinstance(value, FunctionType):
            yield value
        elif isinstance(value, list | tuple):
            yield from code_in(value)
        elif isinstance(value, dict):
            yield from code_in(value.values())
        elif _is_object(value):
            yield from type(value).__mro__
            yield from code_in(vars(value).values())


def _plain(value: Any, level: int) -> Any:
    """Return JSON of a value; different values have different JSON."""
    if level > _MOST_LEVELS:
        raise Unreadable(f"{_name(type(value))} in more than {_MOST_LEVELS} levels")
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return [kind.__name__, value]
    if kind is float:
        return ["float", value.hex()]
    if kind is bytes:
        return ["bytes", value.hex()]
    if isinstance(value, Enum):
        return ["enum", _name(kind), value.name]
    if isinstance(value, Path):
        return ["path", str(value)]
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return ["array", _name(kind), value.dtype.str, value.shape, content]
    if kind is torch.Tensor and value.device.type == "cpu" and value.layout is torch.strided:
        return ["tensor", str(value.dtype), _plain(value.detach().numpy(), level + 1)]
    if isinstance(value, torch.dtype | torch.device | np.dtype):
        return [_name(kind), str(value)]
    if isinstance(value, type):
        return ["type", _name(value)]
    return _plain_of_many(value, level + 1)


def _plain_of_many(value: Any, level: int) -> Any:
    kind = type(value)
    if kind in (list, tuple):
        return [kind.__name__, [_plain(part, level) for part in value]]
    if kind in (set, frozenset):
        return [kind.__name__, sorted((_plain(part, level) for part in value), key=json.dumps)]
    if kind is dict:
        parts = [[_plain(key, level), _plain(part, level)] for key, part in value.items()]
        return ["dict", parts]
    if is_dataclass(value):
        parts = [[part.name, _plain(getattr(value, part.name), level)] for part in fields(value)]
        return ["dataclass", _name(kind), parts]
    if isinstance(value, FunctionType):
        return _plain_function(value, level)
    if isinstance(value, logging.Logger):  # What is logged changes no result.
        return ["logger", value.name]
    if _is_object(value):
        own = [_plain_class(base, level) for base in kind.__mro__ if not _is_known(base.__module__)]
        return ["object", _name(kind), own, _plain(dict(vars(value)), level)]
    raise Unreadable(f"{_name(kind)}, which is no plain value")


def _is_object(value: Any) -> bool:
    """Return whether a value is known by its class and its attributes."""
    if isinstance(value, type | FunctionType) or not hasattr(value, "__dict__"):
        return False
    # `isinstance` would ask each of MONAI's classes.
    return Transform in type(value).__mro__ or type(value).__module__.startswith("monai.transforms")


def _plain_function(function: FunctionType, level: int) -> Any:
    """Return JSON of a function: its name and, of an app's, what it has from outside."""
    if not _is_found(function):
        raise Unreadable(
            f"the function {_name(function)} (define it by its name at the top of a module, and "
            "not as a lambda or within another function)"
        )
    if _is_known(function.__module__):
        return ["function", _name(function)]
    outside = [_plain(part, level) for part in _from_outside(function)]
    return ["function", _name(function), outside, _plain(dict(vars(function)), level)]


def _plain_class(kind: type, level: int) -> Any:
    """Return JSON of what a class of an app holds beside its source.

    These are the values of the class, and those that its functions have from outside.
    """
    parts: list[Any] = [_name(kind)]
    for name, value in vars(kind).items():
        function = getattr(value, "__func__", getattr(value, "fget", value))
        if isinstance(function, FunctionType):
            parts.append([name, [_plain(part, level) for part in _from_outside(function)]])
        elif not name.startswith("__") and name != "_abc_impl":
            parts.append([name, _plain(value, level)])
    return parts


def _from_outside(function: FunctionType) -> Iterator[Any]:
    """Yield the values on which a function depends beside its arguments and its source."""
    yield function.__defaults__
    yield function.__kwdefaults__
    inside = inspect.getclosurevars(function).nonlocals
    yield {name: value for name, value in inside.items() if name != "__class__"}
    for name in _names_in(function.__code__):
        value = function.__globals__.get(name)
        # The source of modules, classes and functions is part of the digest of the code; a
        # function of the app has values from outside, too.
        known = isinstance(value, _BY_SOURCE) or _is_of_library(value)
        if value is not function and not known:
            yield name
            yield value


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _names_in(part)


def _is_found(function: FunctionType) -> bool:
    """Return whether a function's name leads to it, so that it is no function made at run time."""
    module = sys.modules.get(function.__module__)
    return getattr(module, function.__qualname__, None) is function


def _is_of_library(value: Any) -> bool:
    """Return whether a value is one of an installed package, by its name there."""
    module = getattr(value, "__module__", None)
    name = getattr(value, "__qualname__", getattr(value, "__name__", None))
    if not isinstance(module, str) or not isinstance(name, str) or not _is_library(module):
        return False
    return getattr(sys.modules.get(module), name, None) is value


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _modules_of(parts: Iterable[type | FunctionType]) -> set[str]:
    """Return the names of modules that define these, and of those that these modules name."""
    pending = [part.__module__ for part in parts]
    found: set[str] = set()
    while pending:
        name = pending.pop()
        if name in found or _is_library(name):
            continue
        found.add(name)
        if _is_known(name):  # Its whole package is read.
            continue
        for value in vars(sys.modules.get(name, _NO_MODULE)).values():
            named = value.__name__ if isinstance(value, ModuleType) else _module_of(value)
            if named in sys.modules:
                pending.append(named)
    return found


def _module_of(value: Any) -> str:
    named = getattr(value, "__module__", None) if callable(value) else None
    return named if isinstance(named, str) else ""


def _is_known(name: str) -> bool:
    """Return whether a module is of this package, of an installed one or of Python."""
    return name.partition(".")[0] == __name__.partition(".")[0] or _is_library(name)


@cache
def _is_library(name: str) -> bool:
    """Return whether a module comes with Python or an installed package, which has a version."""
    if name.partition(".")[0] in sys.stdlib_module_names and name != "__main__":
        return True
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None:
        return False
    return any(part in _LIBRARIES for part in Path(file).parts)


def _roots(name: str) -> list[str]:
    """Return the files or folders in which the top package of a module lies."""
    top = sys.modules.get(name.partition(".")[0])
    folders = getattr(top, "__path__", None)
    if folders is not None:
        return [os.path.realpath(folder) for folder in folders]
    file = getattr(top, "__file__", None)
    if file is None:
        raise Unreadable(f"the module {name}, which has no source file")
    return [os.path.realpath(file)]


@cache
def _environment() -> list[str]:
    """Return names and versions of Python, the processor and all installed packages."""
    found = {f"{module.__name__} {module.__version__}" for module in _READERS}
    for folder in sys.path:
        if Path(folder).name in _LIBRARIES and Path(folder).is_dir():
            # The names of these folders hold the packages' versions.
            found |= {entry.name for entry in Path(folder).glob("*-info")}
    capability = torch.backends.cpu.get_cpu_capability()
    return [sys.version, platform.machine(), capability, *sorted(found)]


@cache
def _source_digest(root: str) -> str:
    """Return the digest of a source file, or of all source files in a folder."""
    content = hashlib.sha256()
    size = 0
    for number, path in enumerate(_sources(root)):
        with open(path, "rb") as file:  # noqa: PTH123
            data = file.read()
        size += len(data)
        if number >= _MOST_FILES or size > _MOST_BYTES:
            raise Unreadable(
                f"{root}, which holds more than {_MOST_FILES:,} source files or {_MOST_BYTES:,} "
                "bytes of them"
            )
        content.update(f"{path.removeprefix(root)}\0{len(data)}\0".encode(errors="replace"))
        content.update(data)
    return content.hexdigest()


def _sources(root: str) -> Iterator[str]:
    if not Path(root).is_dir():
        yield root
        return
    for parent, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        for name in sorted(names):
            if name.endswith((".py", ".so")):
                yield f"{parent}/{name}"
