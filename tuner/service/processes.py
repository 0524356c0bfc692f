"""How a process of a worker starts and ends: forked by a server that has loaded what it needs, or by itself."""

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Protocol

from tuner.service.fork_server import Channel

_SERVER_MODULE = "tuner.service.fork_server"
_GRACE_SECONDS = 5.0
_WORD_SECONDS = 15.0
"""How long the server may take to say that a worker has ended: memory may be swapped out just then."""
SEND_SECONDS = 5
"""How long the coordinator waits for a process to take a message."""
_LAST_WORDS = 2000


class Process(Protocol):
    """A worker's process."""

    returncode: int | None
    """How it ended, negative by a signal; None before."""

    @property
    def pid(self) -> int | None:
        """Its number; None before it has begun."""

    def kill(self) -> None:
        """End it at once."""

    def wait(self, timeout: float) -> int:
        """Wait for its end; return its code.

        Raises:
            subprocess.TimeoutExpired: If it lives on after so many seconds.
        """


def spawn(module: str, environment: Mapping[str, str], connection: socket.socket, log: IO[bytes]) -> Process:
    """Start ``python -m module`` with a socket, whose descriptor is its argument."""
    return _spawn(module, [str(connection.fileno())], environment, connection, log)


def _spawn(
    module: str, arguments: list[str], environment: Mapping[str, str], connection: socket.socket, log: IO[bytes]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        # -P: a file of the working directory must not shadow a module of ours
        [sys.executable, "-P", "-m", module, *arguments],
        pass_fds=[connection.fileno()],
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        process_group=0,  # Ctrl-C in a terminal is for the coordinator alone
    )


def read_last_words(log: IO[bytes]) -> str:
    """Return the end of what a process has printed, after a semicolon; an empty text if it printed nothing."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - _LAST_WORDS))
    words = log.read().decode(errors="replace").strip()
    return f"; its last words: {words}" if words else ""


def _can_read(descriptor: int, seconds: float) -> bool:
    """Wait until a descriptor can be read, or so many seconds; return whether it can."""
    poll = select.poll()  # select takes no descriptor above 1023
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def describe_code(code: int) -> str:
    """Return how a process ended, by its exit code."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


class ForkedProcess:
    """A worker's process that the server forks when it can."""

    def __init__(self, server: "ForkServer") -> None:
        self._server = server
        self._descriptor: int | None = None
        self._is_unwanted = False
        self.pid: int | None = None
        self.returncode: int | None = None
        self.orphaned_by: ForkServer | None = None
        """The server, if this process ended because that one did."""

    def begin(self, pid: int, descriptor: int) -> None:
        """Take its number, and the descriptor that stands for it: the number could be another's once it has ended."""
        self.pid, self._descriptor = pid, descriptor
        if self._is_unwanted:
            self.kill()

    def end(self, code: int) -> None:
        """Take note of its end."""
        self.returncode = code
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def abandon(self) -> None:
        """End it, now that its server is gone and nobody says how it ended; the kernel does so as well."""
        self.kill()
        if self._descriptor is not None:
            _can_read(self._descriptor, _GRACE_SECONDS)
        self.orphaned_by = self._server
        self.end(1)

    def kill(self) -> None:
        """End it at once, or as soon as it is there."""
        self._is_unwanted = True
        if self._descriptor is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        """Wait for its end; return its code, which is 1 where the server went first.

        Raises:
            subprocess.TimeoutExpired: If it lives on after so many seconds.
        """
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            if self._server.is_gone:
                self.abandon()
            elif not self._server.listen(max(0.0, deadline - time.monotonic())):
                if not self._has_ended():
                    raise subprocess.TimeoutExpired(_SERVER_MODULE, timeout)
                if not self._server.listen(_WORD_SECONDS):
                    self._server.end("did not say that a worker had ended")
        return self.returncode

    def _has_ended(self) -> bool:
        return self._descriptor is not None and _can_read(self._descriptor, 0)


class ForkServer:
    """The process that forks workers, and the socket to it."""

    def __init__(self, environment: Mapping[str, str], worker_module: str) -> None:
        """Start it; it loads what workers need while this process goes on.

        Args:
            environment: What it and all that it forks inherit.
            worker_module: What a worker runs.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the server
        connection, theirs = socket.socketpair()
        # A server that is stopped must not stop the coordinator as well.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        with theirs:
            arguments = [str(theirs.fileno()), worker_module]
            self._process = _spawn(_SERVER_MODULE, arguments, environment, theirs, self._log)
        self._channel = Channel(connection)
        self._processes: dict[int, tuple[ForkedProcess, IO[bytes]]] = {}
        """Those that have not ended, and what takes their words."""
        self._n_asked = 0
        self._waits_since: float | None = None
        self.is_gone = False

    @property
    def connection(self) -> socket.socket:
        """What can be read when there is something to ``hear``."""
        return self._channel.connection

    def fork(self, environment: Mapping[str, str], connection: socket.socket, log: IO[bytes]) -> ForkedProcess:
        """Have a worker forked.

        Args:
            environment: What is different in its environment.
            connection: The worker's end of its socket.
            log: Takes what it prints.
        """
        process = ForkedProcess(self)
        self._processes[self._n_asked] = process, log
        request = {"number": self._n_asked, "environment": dict(environment)}
        self._n_asked += 1
        if self._waits_since is None:
            self._waits_since = time.monotonic()
        with suppress(OSError):  # it is gone, which shows when it is next heard
            self._channel.send(request, [connection.fileno(), log.fileno()])
        return process

    def listen(self, timeout: float) -> bool:
        """Wait for the server and hear it; return whether it said anything in time."""
        if self.is_gone or not _can_read(self.connection.fileno(), timeout):
            return False
        self.hear()
        return True

    def hear(self) -> None:
        """Take note of which workers have begun and which have ended. Returns at once if there is something to read."""
        if self.is_gone:
            return
        try:
            for news, descriptors in self._channel.receive():
                if descriptors:
                    self._processes[news["number"]][0].begin(news["pid"], *descriptors)
                else:
                    self._processes.pop(news["number"])[0].end(news["code"])
        except EOFError:
            self._bury()
        has_more = any(process.pid is None for process, _ in self._processes.values())
        self._waits_since = time.monotonic() if has_more else None

    @property
    def silent_seconds(self) -> float:
        """How long somebody has been waiting for a worker without a word from the server."""
        return 0.0 if self._waits_since is None else time.monotonic() - self._waits_since

    def end(self, reason: str) -> None:
        """End the server at once, and with it all that it has forked.

        Args:
            reason: What it did, for a person.
        """
        self._bury(f"it {reason}")

    def _bury(self, reason: str = "") -> None:
        """Take note that the server is gone: its workers have ended with it, or never begin."""
        if self.is_gone:
            return
        self.is_gone = True
        how = reason or self._describe_end()
        self._process.kill()
        for process, log in self._processes.values():
            with suppress(OSError):  # a full disk
                if not log.closed:  # somebody may still ask how it ended
                    os.write(log.fileno(), f"the process that forks workers ended: {how}".encode())
            process.abandon()
        self._processes.clear()

    def _describe_end(self) -> str:
        try:
            return describe_code(self._process.wait(_GRACE_SECONDS)) + read_last_words(self._log)
        except subprocess.TimeoutExpired:
            return "it hung up and did not end"

    def close(self) -> None:
        """End the server, and with it all that it has forked."""
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        self.is_gone = True
        for process, _ in self._processes.values():  # nobody could wait for it
            process.end(1)
        self._processes.clear()
        self.connection.close()
        self._log.close()
