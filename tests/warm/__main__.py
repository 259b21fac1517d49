"""``python -m tests.warm LISTENER``: the server, and what its forked processes become.

A program finds what it would find in a fresh interpreter: its own ``__main__``, arguments, environment, ``sys.path``, folder,
streams, session and random numbers. Different are modules that are there already, that all programs share one seed of
string hashes, and that torch has one thread where nothing says how many. What would be read before or within those imports
has the program started afresh instead: other options of Python, other search paths, other numbers of threads, and the
variables that libraries read at import.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import multiprocessing.process
import os
import runpy
import signal
import socket
import sys
import threading
import types
from pathlib import Path
from typing import NoReturn

from megatron_sts.launch import fork
from tests.warm.server import Request, Server

IMPORTS = (
    "pytest",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "transformers.models.llama.modeling_llama",
    "megatron_sts.commands.evaluate",
    "megatron_sts.commands.generate",
    "megatron_sts.commands.report",
    "megatron_sts.commands.train",
    "megatron_sts.convert.verify",
    "megatron_sts.data.energon",
    "megatron_sts.data.prepare",
    "megatron_sts.train.loop",
)
READ_AT_IMPORT = ("HF_", "LD_", "PYTHON", "TRANSFORMERS_")
"""Beginnings of names of environment variables."""
HARMLESS = {"PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONWARNINGS"}
"""Those that ``become`` knows."""

_started_with = dict(os.environ)
_search_path = list(sys.path)


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    request, streams = Server(listener, warm_up).serve()
    become(request, streams)


@functools.cache
def warm_up() -> None:
    """Once."""
    fork.warm_up(IMPORTS)


def become(request: Request, streams: list[int]) -> None:
    """In the forked process, from here to its end."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
    os.closerange(3, 256)
    os.chdir(request["cwd"])
    arguments, env = request["arguments"], request["env"]
    if is_cold(arguments, env):
        os.execve(sys.executable, [sys.executable, *arguments], env)
    os.environ.clear()
    os.environ.update(env)
    refresh(env)
    leave(outcome(arguments, env))


def is_cold(arguments: list[str], env: dict[str, str]) -> bool:
    """Whether a fresh interpreter must read the options or the environment."""
    if len(os.listdir("/proc/self/task")) > 1 or (arguments[0].startswith("-") and arguments[0] not in ("-m", "-c")):
        return True
    # Telling torch of more threads makes them, and then our launcher would not fork.
    if not set(paths(env)) <= {*_search_path, ""} or env.get("OMP_NUM_THREADS", "1") != "1":
        return True
    return any(
        env.get(name) != _started_with.get(name)
        for name in env.keys() | _started_with.keys()
        if name.startswith(READ_AT_IMPORT) and name not in HARMLESS
    )


def paths(env: dict[str, str]) -> list[str]:
    return [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]


def refresh(env: dict[str, str]) -> None:
    """What an interpreter and the libraries draw or read when they start."""
    import numpy as np
    import torch

    np.random.seed()
    torch.default_generator.seed()
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(write_through="PYTHONUNBUFFERED" in env)  # type: ignore[union-attr]


def run(arguments: list[str], env: dict[str, str]) -> None:
    """``-m MODULE``, ``-c CODE`` or a script, with its arguments; returns or raises as it does."""
    kind, *rest = arguments
    sys.argv = rest if kind in ("-m", "-c") else arguments
    sys.argv = [kind, *rest[1:]] if kind == "-c" else sys.argv
    own = "" if kind == "-c" else os.getcwd() if kind == "-m" else str(Path(kind).resolve().parent)
    sys.path[:] = [own, *paths(env), *(path for path in _search_path[1:] if path not in paths(env))]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if kind == "-m":
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
    elif kind == "-c":
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        main.__file__ = kind
        exec(compile(Path(kind).read_bytes(), kind, "exec"), main.__dict__)


def outcome(arguments: list[str], env: dict[str, str]) -> int:
    """The program's exit status; a traceback of it as Python's own, without this module's frames."""
    try:
        run(arguments, env)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        return 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except BaseException as error:
        within = error.__traceback__.tb_next.tb_next if error.__traceback__ and error.__traceback__.tb_next else None
        sys.excepthook(type(error), error.with_traceback(within), within)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def leave(status: int) -> NoReturn:
    """Ends as the interpreter does, but does not take modules apart: that costs half a second, and all pages copied."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    main()
