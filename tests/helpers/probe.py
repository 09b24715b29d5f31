"""What a process finds of itself at its start; run as a command, it writes this as JSON."""

import atexit
import faulthandler
import gc
import json
import locale
import logging
import multiprocessing
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path


def found():
    main = sys.modules["__main__"]
    return {
        "arguments": [sys.argv, sys.orig_argv, sys.executable, sys.flags, sys.warnoptions],
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "path": sys.path,
        "importers": [sys.dont_write_bytecode, sys.pycache_prefix, len(sys.meta_path)],
        "main": {
            name: str(value) if name == "__builtins__" else repr(type(value)) + str(value)[:20]
            for name, value in vars(main).items()
            if name.startswith("__")
        }
        | {"__file__": main.__file__},
        **_streams(),
        "same streams": [sys.stdin is sys.__stdin__, sys.stdout is sys.__stdout__],
        "descriptors": _descriptors(),
        "umask": _umask(),
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "pending": sorted(signal.sigpending()),
        "handlers": {n: str(signal.getsignal(n)) for n in signal.valid_signals()},
        "kernel": _kernel(),
        "wakeup": signal.set_wakeup_fd(-1),
        "timers": [signal.getitimer(timer) for timer in range(3)],
        "limits": {
            name: resource.getrlimit(getattr(resource, name))
            for name in dir(resource)
            if name.startswith("RLIMIT_")
        },
        "users": [os.getresuid(), os.getresgid(), os.getgroups()],
        "processors": sorted(os.sched_getaffinity(0)),
        "priority": [os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)],
        "locale": [locale.setlocale(locale.LC_ALL), sys.getfilesystemencoding(), time.tzname],
        "warnings": [str(each) for each in warnings.filters],
        "loggers": {
            name: [logger.level, [_handler(handler) for handler in logger.handlers]]
            for name, logger in logging.root.manager.loggerDict.items()
            if isinstance(logger, logging.Logger)
        },
        "root logger": [_handler(handler) for handler in logging.root.handlers],
        "threads": [len(list(Path("/proc/self/task").iterdir())), threading.active_count()],
        "main thread": threading.current_thread() is threading.main_thread(),
        "at exit": atexit._ncallbacks(),
        "collector": [gc.isenabled(), gc.get_threshold(), gc.get_debug()],
        "temporary folder": [tempfile.tempdir, tempfile.gettempdir()],
        "processes": [
            multiprocessing.current_process().name,
            str(multiprocessing.parent_process()),
            multiprocessing.active_children(),
        ],
        "others": [
            sys.getrecursionlimit(),
            sys.getswitchinterval(),
            sys.gettrace(),
            socket.getdefaulttimeout(),
            faulthandler.is_enabled(),
            sys.excepthook is sys.__excepthook__,
        ],
    }


def _streams():
    named = {}
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        raw = getattr(stream.buffer, "raw", stream.buffer)
        named[f"{name} text"] = [stream.name, stream.mode, stream.encoding, stream.errors]
        named[f"{name} lines"] = [stream.line_buffering, stream.write_through, stream.newlines]
        named[f"{name} file"] = [stream.seekable(), stream.isatty(), stream.fileno()]
        named[f"{name} buffer"] = [type(stream.buffer).__name__, stream.closed]
        named[f"{name} raw"] = [raw.name, raw.mode, raw.closefd]
        named[f"{name} position"] = raw.tell() if raw.seekable() else None
        named[f"{name} device"] = os.fstat(stream.fileno()).st_dev
    return named


def _descriptors():
    links = {int(link.name): link for link in list(Path("/proc/self/fd").iterdir())}
    return sorted(number for number, link in links.items() if number > 2 and link.is_symlink())


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _kernel():
    names = ("Sig", "Cap", "NoNewPrivs", "Seccomp", "Umask", "Cpus", "Groups", "THP")
    lines = Path("/proc/self/status").read_text().splitlines()
    return [line for line in lines if line.startswith(names) and not line.startswith("SigQ")]


def _handler(handler):
    stream = getattr(handler, "stream", None)
    return [type(handler).__name__, handler.level, stream is sys.stderr, stream is sys.stdout]


def numbers():
    """Numbers that no two processes have alike."""
    import random
    import uuid

    drawn = {
        "random": random.random(),
        "key": bytes(multiprocessing.current_process().authkey).hex(),
        "name": next(tempfile._get_candidate_names()),
        "uuid": str(uuid.uuid4()),
        "os": os.urandom(8).hex(),
    }
    for name, module in list(sys.modules.items()):
        for kind, value in list(getattr(module, "__dict__", {}).items()):
            if type(value) is random.Random:
                drawn[f"{name}.{kind}"] = value.random()
    if "numpy" in sys.modules:
        import numpy

        drawn["numpy"] = numpy.random.random()  # noqa: NPY002
    if "torch" in sys.modules:
        import torch

        drawn["torch"] = float(torch.rand(()))
        drawn["torch seed"] = torch.initial_seed()
    if "monai.transforms.transform" in sys.modules:
        from monai.transforms import Randomizable

        drawn["monai"] = Randomizable.R.random()
    return drawn


def main():
    here, there = found(), numbers()
    print(json.dumps([here, there, sorted(sys.modules)], default=str))
