"""Runs Python programs without the seconds that their imports cost: ``run`` and ``Popen`` as in ``subprocess``.

For commands that begin with ``sys.executable``; each program leads a session. Where no server runs (outside pytest, with a GPU),
they are started as ever. What a program finds: ``tests/warm/__main__.py``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.warm.server import LENGTH

SOCKET = "MEGATRON_STS_TEST_SERVER"
"""The environment variable that names the server's socket."""
REPOSITORY = Path(__file__).resolve().parents[2]
WARM_UP_S = 120
"""The server's first answer comes after its imports."""


def is_possible() -> bool:
    """Not where an import may start CUDA, which does not survive a fork: with a GPU in sight, or Transformer Engine installed."""
    sees_gpu = os.path.exists("/dev/nvidiactl") and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    return not sees_gpu and importlib.util.find_spec("transformer_engine") is None


@contextlib.contextmanager
def server() -> Iterator[None]:
    """While the block runs, programs are forked. The imports wait for the first one."""
    with tempfile.TemporaryDirectory(prefix="warm") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder) / "socket"
        listener.bind(str(path))
        listener.listen(64)
        with path.with_name("log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(listener.fileno())],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _search_path()},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        os.environ[SOCKET] = str(path)
        _write_stand_ins(path.with_name("bin"))
        try:
            yield
        finally:
            del os.environ[SOCKET]
            process.communicate()  # its input ends, and so does it


def path() -> str:
    """A PATH for shell scripts, on which ``megatron-sts`` and ``python`` are warm ones of this interpreter."""
    own = [str(Path(sys.executable).parent), os.environ["PATH"]]
    return os.pathsep.join([str(Path(os.environ[SOCKET]).with_name("bin")), *own] if SOCKET in os.environ else own)


def stand_in(arguments: Sequence[str]) -> NoReturn:
    """Is, for whoever started this process, the program that the server starts."""
    connection, _ = _ask({"arguments": arguments, "cwd": os.getcwd(), "env": dict(os.environ)}, (0, 1, 2))
    connection.settimeout(None)
    status = os.waitstatus_to_exitcode(int(_line(connection)))
    if status < 0:
        os.kill(os.getpid(), -status)
    os._exit(status)


def _write_stand_ins(folder: Path) -> None:
    folder.mkdir()
    for name, arguments in (("megatron-sts", ["-m", "megatron_sts"]), ("python", [])):
        lines = f"#!{sys.executable} -IS", "import sys", f"sys.path.insert(0, {str(REPOSITORY)!r})"
        call = "from tests import warm", f"warm.stand_in({arguments!r} + sys.argv[1:])"
        (folder / name).write_text("\n".join([*lines, *call, ""]))
        (folder / name).chmod(0o755)


def _search_path() -> str:
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


class Popen(subprocess.Popen[Any]):
    """A forked program is no child of this process: its server says how it ended. It leads a session."""

    _connection: socket.socket | None = None

    def _execute_child(self, args: Sequence[str], *others: Any) -> None:
        if SOCKET not in os.environ or args[0] != sys.executable:
            super()._execute_child(args, *others)  # type: ignore[misc]
            return
        _, _, _, _, cwd, env, _, _, _, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_ = others
        request = {
            "arguments": list(map(os.fspath, args[1:])),
            "cwd": os.path.abspath(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
        }
        streams = [given if given != -1 else default for default, given in enumerate((p2cread, c2pwrite, errwrite))]
        try:
            self._connection, self.pid = _ask(request, streams)
            self._child_created = True
        finally:
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._connection is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc]
        self._connection.setblocking(wait_flags != os.WNOHANG)
        try:
            status = int(_line(self._connection))
        except BlockingIOError:
            return 0, 0
        self._connection.close()
        return self.pid, status

    def _internal_poll(self, *args: Any, **options: Any) -> int | None:
        if self._connection is None:
            return super()._internal_poll(*args, **options)  # type: ignore[misc]
        if self.returncode is None and self._waitpid_lock.acquire(False):  # type: ignore[attr-defined]
            try:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
            finally:
                self._waitpid_lock.release()  # type: ignore[attr-defined]
        return self.returncode


def run(
    command: Sequence[str],
    *,
    timeout: float | None = None,
    check: bool = False,
    capture_output: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """``subprocess.run``, without ``input``. At its time limit the program's whole session is killed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if capture_output else {}
    with Popen(command, start_new_session=True, **pipes, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    done = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
    if check:
        done.check_returncode()
    return done


def _ask(request: dict[str, Any], streams: Sequence[int]) -> tuple[socket.socket, int]:
    """The connection that will say how the program ended, and the program's process id."""
    body = json.dumps(request).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(WARM_UP_S)
    connection.connect(os.environ[SOCKET])
    socket.send_fds(connection, [LENGTH.pack(len(body))], streams)
    connection.sendall(body)
    return connection, int(_line(connection))


def _line(connection: socket.socket) -> bytes:
    """The next line, which the server wrote at once; BlockingIOError only where there is none yet."""
    found = b""
    while not found.endswith(b"\n"):
        part = connection.recv(1)
        if not part:
            raise RuntimeError(
                f"the server of warm processes ended; its log: {Path(os.environ[SOCKET]).parent / 'log'}"
            )
        found += part
    return found
