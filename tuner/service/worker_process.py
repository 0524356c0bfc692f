"""One worker as the coordinator sees it: its process, the socket to it, and what it prints."""

import fcntl
import os
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import IO

from tuner.service.messages import Reply, Request
from tuner.service.processes import SEND_SECONDS, ForkedProcess, Process, describe_code, read_last_words
from tuner.service.slots import Slot
from tuner.service.wire import Lines, encode

GRACE_SECONDS = 5.0
"""How long a process that is to end, or has just ended, is waited for."""
_MAX_LOG_BYTES = 16_000_000


class Worker:
    """One worker process and the socket to it."""

    def __init__(self, number: int, slot: Slot | None, start: Callable[[socket.socket, IO[bytes]], Process]) -> None:
        """Start it.

        Args:
            number: Of the worker, among those of a run.
            slot: What it is bound to, if anything.
            start: Starts its process, on its end of the socket and on a file for what it prints.
        """
        self.number = number
        self.slot = slot
        self.last_heard = time.monotonic()
        self.is_stalled = False
        self._ended_for = ""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        fcntl.fcntl(self._log, fcntl.F_SETFL, os.O_APPEND)  # so that it can be cut short while the worker writes
        self.connection, theirs = socket.socketpair()
        # What a stopped worker does not read must not stop the coordinator as well.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))
        with theirs:
            self._process = start(theirs, self._log)
        self._lines = Lines(self.connection)

    @property
    def has_begun(self) -> bool:
        """Whether its process is or was there; the server that is to fork it may still be loading."""
        return self._process.pid is not None or self._process.returncode is not None

    def send(self, request: Request) -> None:
        """Send a request; a worker that is gone shows when it is next heard."""
        try:
            self.connection.sendall(encode(request))
        except BlockingIOError:
            self.end(f"took no message for {SEND_SECONDS} s")
        except OSError:
            return

    def receive(self) -> Iterator[Reply]:
        """Yield the replies that have arrived.

        Raises:
            EOFError: If the worker is gone.
        """
        self.last_heard = time.monotonic()
        if os.fstat(self._log.fileno()).st_size > _MAX_LOG_BYTES:
            self._log.truncate(0)
        yield from self._lines.receive()  # type: ignore[misc] # a worker sends replies only

    def end(self, reason: str) -> None:
        """End the process at once.

        Args:
            reason: What it did, for a person.
        """
        self._ended_for = reason
        self._process.kill()

    def describe_end(self) -> str:
        """Return how the process ended, with the last lines that it printed. Waits for its end; asked once."""
        deadline = time.monotonic() + GRACE_SECONDS
        if self._ended_for:
            self.reap(deadline)
            return f"worker {self.number} {self._ended_for} and was ended"
        code = self._wait(deadline)
        words = read_last_words(self._log)
        self._log.close()
        if code is None:
            return f"worker {self.number} hung up and cannot be killed"
        return f"worker {self.number} ended: {describe_code(code)}{words}"

    @property
    def cause_of_end(self) -> object:
        """What has to be blamed for the end of this worker: itself, or the process that had forked it and others."""
        return (isinstance(self._process, ForkedProcess) and self._process.orphaned_by) or self

    @property
    def was_killed(self) -> bool:
        """Whether another process or the kernel killed this one, once it has ended."""
        return not self._ended_for and self._process.returncode == -signal.SIGKILL

    def close(self) -> None:
        """Hang up: the worker ends by itself when it notices."""
        self.connection.close()

    def reap(self, deadline: float) -> None:
        """Wait for the process until a deadline on the monotonic clock, then kill it."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0)  # hears whether it has begun
        if self.has_begun:
            self._wait(deadline)
        else:
            self._process.kill()  # when it begins
        self._log.close()

    def _wait(self, deadline: float) -> int | None:
        """Wait for the process, kill it at the deadline, and return its code; None if it waits for a dead disk."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(max(0.0, deadline - time.monotonic()))
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(GRACE_SECONDS)
        return None
