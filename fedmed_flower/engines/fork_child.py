"""A child of a fork server becomes the process of a command, and ends as one."""

from __future__ import annotations

import atexit
import builtins
import ctypes
import gc
import importlib
import io
import os
import random
import signal
import sys
import threading
import traceback
import types
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from multiprocessing.process import current_process
from pathlib import Path
from typing import Any, NoReturn

from fedmed_flower.engines.fork_guard import FREE

# Python's exit code then.
_NOT_FLUSHED = 120


class Imported:
    """What the imports have left in the server that each child must have anew.

    Generators of random numbers, such as NumPy's global one: in a new process each draws its seed
    from the operating system, and all children would have the same numbers. Threads of NumExpr,
    which pandas imports: a child has no thread of its server, and none should run beside a fork.
    """

    def __init__(self) -> None:
        self._generators: list[Any] = []
        numpy = sys.modules.get("numpy")
        kinds: tuple[type, ...] = (random.Random,)
        if numpy is not None:
            self._bits = numpy.random.BitGenerator
            kinds += (self._bits, numpy.random.RandomState)
        for each in gc.get_objects():
            # isinstance would ask objects that stand for others, which then import those.
            if issubclass(type(each), kinds) and not issubclass(type(each), random.SystemRandom):
                self._generators.append(each)
        self._numexpr = sys.modules.get("numexpr")
        if self._numexpr is not None:
            self._numexpr_threads = self._numexpr.set_num_threads(1)

    def seed(self) -> None:
        """Seed all generators from the operating system."""
        for each in self._generators:
            if isinstance(each, random.Random):
                each.seed()
            elif isinstance(each, self._bits):
                each.state = type(each)().state
            else:
                each.seed()
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.default_generator.seed()

    def start_threads(self) -> None:
        """Start the threads again that were ended."""
        if self._numexpr is not None:
            self._numexpr.set_num_threads(self._numexpr_threads)


@dataclass(frozen=True)
class Request:
    """A command to be run: its path and arguments, the environment, descriptors 0-2 and folder."""

    arguments: list[bytes]
    variables: dict[bytes, bytes]
    descriptors: list[int]


def become(request: Request, imported: Imported) -> None:
    """Turn this child of the server into a process that was just started."""
    for target in range(3):
        os.dup2(request.descriptors[target], target)
    os.fchdir(request.descriptors[3])
    for descriptor in request.descriptors:
        os.close(descriptor)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        _reopen(stream)
    arguments = [os.fsdecode(each) for each in request.arguments]
    sys.argv[:] = arguments
    sys.orig_argv[:] = [sys.executable, *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
    for name in FREE:
        if name in request.variables:
            os.environb[name] = request.variables[name]
    importlib.invalidate_caches()
    # Of processes that know each other; shared by all children otherwise.
    current_process().authkey = os.urandom(32)
    imported.seed()
    imported.start_threads()


def _reopen(stream: Any) -> None:
    """Make a standard stream anew in place: loggers have kept it since they were imported.

    What the descriptor leads to decides whether lines are flushed and whether one can seek in it.
    """
    buffer = stream.buffer
    raw = buffer if isinstance(buffer, io.FileIO) else buffer.raw
    mode = raw.mode.rstrip("+").replace("b", "")
    name = raw.name
    io.FileIO.__init__(raw, raw.fileno(), mode, closefd=False)
    raw.name = name
    if buffer is not raw:
        size = os.fstat(raw.fileno()).st_blksize
        buffer.__init__(raw, size if size > 1 else io.DEFAULT_BUFFER_SIZE)
    stream.__init__(
        buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        newline="\n",
        line_buffering=not stream.write_through and (stream is sys.stderr or raw.isatty()),
        write_through=stream.write_through,
    )
    stream.mode = mode


def run_script(path: str) -> int:
    """Run a Python script as the main module; return its exit code, negative for a signal."""
    main = types.ModuleType("__main__")
    loader = SourceFileLoader("__main__", path)
    main.__dict__.update(
        __file__=path, __builtins__=builtins, __cached__=None, __loader__=loader, __annotations__={}
    )
    sys.modules["__main__"] = main
    try:
        exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), main.__dict__)
    except SystemExit as end:
        return _exit_code(end.code)
    except BaseException as error:
        # Without the lines of this file.
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    sys.stdout.flush()
    print(code, file=sys.stderr)
    return 1


def leave(code: int) -> NoReturn:
    """End this process as Python ends one, but leave what the server imported in its place.

    To take thousands of modules apart would copy the server's pages and cost more than a message.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
    except BaseException:
        # As Python does at a second signal: it says so, and ends all the same.
        traceback.print_exc()
    atexit._run_exitfuncs()
    code = _flushed(code)
    kinds = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
    # Of what was made since the fork alone, which is not frozen.
    files = [each for each in gc.get_objects() if type(each) in kinds]
    for kind in kinds:
        for file in files:
            if type(file) is kind and not file.closed and file.writable():
                with suppress(OSError, ValueError):
                    file.flush()
    ctypes.CDLL(None).fflush(None)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _flushed(code: int) -> int:
    """Flush the standard streams; return the exit code, which says if one could not be."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except (OSError, ValueError) as error:
            code = code if code < 0 else _NOT_FLUSHED
            if stream is sys.stdout:
                # In Python's words.
                print(f"Exception ignored in: {stream!r}", file=sys.stderr)
                traceback.print_exception(type(error), error, None)
    return code
