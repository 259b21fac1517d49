"""Starts Python programs by fork from a process that has imported torch, megatron-core and this package, and nothing else.

Importing them costs four seconds of a core, and the tests start hundreds of programs. A request is a length, JSON, and the
program's three streams; the answers are its process id and, when it has ended, its wait status, a line each. Whoever hangs
up has the program killed, with its process group. The server ends with its standard input.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

LENGTH = struct.Struct("!Q")
Request = dict[str, Any]
"""``arguments`` (as Python's own), ``cwd`` and ``env``."""


@dataclass
class Program:
    """One that runs, and who asked for it."""

    pid: int
    client: socket.socket


class Server:
    """Forks, and tells how what it forked ended. ``prepare`` is called before each fork."""

    def __init__(self, listener: socket.socket, prepare: Callable[[], None]) -> None:
        self._prepare = prepare
        self._programs: dict[int, Program] = {}
        self._selector = selectors.DefaultSelector()
        self._listener = listener
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler of Python's, or there is nothing to wake up for
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ, self._reap)
        self._selector.register(sys.stdin, selectors.EVENT_READ, self._end)

    def serve(self) -> tuple[Request, list[int]]:
        """Returns only in a process that it forked, with what was asked for and its streams."""
        while True:
            for key, _ in self._selector.select():
                if (asked := key.data()) is not None:
                    return asked

    def _accept(self) -> tuple[Request, list[int]] | None:
        client, _ = self._listener.accept()
        head, streams, _, _ = socket.recv_fds(client, LENGTH.size, 3)
        request = json.loads(_receive(client, LENGTH.unpack(head)[0]))
        self._prepare()
        pid = _fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return request, streams
        for stream in streams:
            os.close(stream)
        program = self._programs[pid] = Program(pid, client)
        self._selector.register(client, selectors.EVENT_READ, lambda: self._hung_up(program))
        _tell(client, pid)
        return None

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        while self._programs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            client = self._programs.pop(pid).client
            self._forget(client)
            _tell(client, status)
            client.close()

    def _hung_up(self, program: Program) -> None:
        self._forget(program.client)
        _kill(program)

    def _forget(self, client: socket.socket) -> None:
        with contextlib.suppress(KeyError):  # it hung up before
            self._selector.unregister(client)

    def _end(self) -> NoReturn:
        for program in self._programs.values():
            _kill(program)
        os._exit(0)


def _fork() -> int:
    """``os.fork``, but the parent goes on only when the child leads its session and process group, and can be killed as such."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
    os.close(writing)
    os.read(reading, 1)  # nothing comes: it ends when both have closed it
    os.close(reading)
    return pid


def _kill(program: Program) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)


def _tell(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # it hung up
        client.sendall(f"{number}\n".encode())


def _receive(client: socket.socket, length: int) -> bytes:
    found = bytearray()
    while len(found) < length:
        found += client.recv(length - len(found)) or _cut_off()
    return bytes(found)


def _cut_off() -> NoReturn:
    raise ConnectionError("a client hung up within its request")
