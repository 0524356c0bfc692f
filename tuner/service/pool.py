"""Worker processes: started, heard, and never left behind.

A worker's end shows as the end of its socket, and so does ours to it. No fork of a process that holds SQLite or a
device, and no import of the caller's main module, so that a study runs from a script or a notebook alike.
"""

import fcntl
import math
import os
import selectors
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import IO, Self

from tuner.errors import ERRORS_BY_NAME
from tuner.service.messages import Crashed, Refused, Reply, Request
from tuner.service.processes import (
    SEND_SECONDS,
    ForkedProcess,
    ForkServer,
    Process,
    describe_code,
    read_last_words,
    spawn,
)
from tuner.service.slots import Slot, ask_for_huge_pages, bind, expects_cpu
from tuner.service.wire import Lines, encode
from tuner.spec.sections import StudySpec

WORKER_MODULE = "tuner.service.worker"
_GRACE_SECONDS = 5.0
_MAX_LOG_BYTES = 16_000_000
_LONGEST_STEP_SECONDS = 1.0
_LOADING_SECONDS = 120.0
"""Least silence of the process that forks workers, while one is waited for, that ends it: it loads from a disk."""


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
        deadline = time.monotonic() + _GRACE_SECONDS
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
            return self._process.wait(_GRACE_SECONDS)
        return None


def _bind(slot: Slot | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what is different in a worker's environment; one without a slot sees the devices that the user sees."""
    if slot is None:
        return {}
    return {**bind(slot.device, environment), "OMP_NUM_THREADS": str(slot.n_threads)}


class Pool:
    """The workers of a run, and the one place where the coordinator waits."""

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        stall_limit: float = math.inf,
        worker_module: str = WORKER_MODULE,
    ) -> None:
        """Make an empty pool. What workers need is loaded from now on, beside what the caller does.

        Args:
            environment: What workers inherit.
            stall_limit: Seconds of silence after which a worker is ended and counts as gone.
            worker_module: What a worker runs: another one speaks the same messages. Its ``main`` takes the socket's
                descriptor from the arguments; its ``preload``, if it has one, loads what workers share.
        """
        self._environment = {**environment, "OMP_NUM_THREADS": "1"}
        self._stall_limit = stall_limit
        self._worker_module = worker_module
        self.workers: dict[int, Worker] = {}
        self.watched_seconds = 0.0
        """How long workers were watched; while this process waits for a database, or is stopped, nobody watches."""
        self._looked_at = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._n_started = 0
        self._servers: list[ForkServer] = []
        """The last one forks; the others are gone."""
        self._start_server()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        workers = list(self.workers.values())
        self.workers.clear()
        for worker in workers:
            worker.close()
        deadline = time.monotonic() + _GRACE_SECONDS
        try:
            for worker in workers:
                worker.reap(deadline)
        finally:  # Ctrl-C once more
            for server in self._servers:
                server.close()
            self._selector.close()

    def _start_server(self) -> None:
        server = ForkServer(self._environment, self._worker_module)
        self._servers.append(server)
        self._selector.register(server.connection, selectors.EVENT_READ, server)

    def start(self, slot: Slot | None) -> Worker:
        """Start a worker that has loaded all it needs; None starts one that is bound to no device."""
        if self._servers[-1].is_gone:
            self._start_server()
        return self._add(slot, partial(self._servers[-1].fork, _bind(slot, self._environment)))

    def start_at_once(self) -> Worker:
        """Start a worker that is bound to no device and has loaded nothing."""
        return self._add(None, partial(spawn, self._worker_module, self._environment))

    def _add(self, slot: Slot | None, start: Callable[[socket.socket, IO[bytes]], Process]) -> Worker:
        worker = Worker(self._n_started, slot, start)
        self._n_started += 1
        self.workers[worker.number] = worker
        self._selector.register(worker.connection, selectors.EVENT_READ, worker)
        return worker

    def stop(self, worker: Worker) -> None:
        """End one worker."""
        self._drop(worker)
        worker.close()
        worker.reap(time.monotonic() + _GRACE_SECONDS)

    def end(self, worker: Worker, reason: str) -> None:
        """End one worker at once.

        Args:
            worker: Of this pool.
            reason: What it did, for a person.
        """
        self._drop(worker)
        worker.end(reason)
        worker.close()

    def _drop(self, worker: Worker) -> None:
        if self.workers.pop(worker.number, None):
            self._selector.unregister(worker.connection)

    def wait(self, timeout: float | None) -> Iterator[tuple[Worker, Reply | None]]:
        """Wait for replies, and yield each with its worker; None for a worker that is gone.

        Raises:
            TunerError: If a worker met a mistake of the user's.
            RuntimeError: If a worker met a bug.
        """
        now = time.monotonic()
        self.watched_seconds += min(now - self._looked_at, _LONGEST_STEP_SECONDS)
        self._looked_at = now
        # All are heard before anything is done about it, which may take longer than they may be silent.
        heard = [event for key, _ in self._selector.select(timeout) for event in self._hear(key.data)]
        heard += [(worker, None) for worker in self._end_stalled()]
        for worker, reply in heard:
            if reply is None:
                yield worker, None
            elif worker.number in self.workers:
                yield worker, _check(reply)

    def _hear(self, speaker: Worker | ForkServer) -> Iterator[tuple[Worker, Reply | None]]:
        if isinstance(speaker, ForkServer):
            speaker.hear()
            if speaker.is_gone:
                self._selector.unregister(speaker.connection)
                speaker.close()
            return
        try:
            for reply in speaker.receive():
                yield speaker, reply
        except EOFError:
            self._drop(speaker)
            speaker.close()
            yield speaker, None

    def _end_stalled(self) -> list[Worker]:
        now = time.monotonic()
        for worker in self.workers.values():
            if not worker.has_begun:  # it cannot speak yet
                worker.last_heard = now
        limit = max(self._stall_limit, _LOADING_SECONDS)
        if self._servers[-1].silent_seconds > limit:
            self._servers[-1].end(f"forked no worker for {limit:g} s")
        stalled = [worker for worker in self.workers.values() if now - worker.last_heard > self._stall_limit]
        for worker in stalled:
            worker.is_stalled = True
            self.end(worker, f"said nothing for {self._stall_limit:g} s (workers.stall_limit)")
        return stalled


def open_pool(spec: StudySpec, worker_module: str = WORKER_MODULE) -> Pool:
    """Make a pool for a study, and have what its workers need loaded from now on.

    All its processes end with the thread that makes it.

    Args:
        spec: The checked study file.
        worker_module: As for ``Pool``.
    """
    environment = ask_for_huge_pages(os.environ) if expects_cpu(spec.workers) else os.environ
    return Pool(environment, stall_limit=spec.workers.stall_limit, worker_module=worker_module)


def _check(reply: Reply) -> Reply:
    match reply:
        case Refused():
            raise ERRORS_BY_NAME[reply.error](reply.message)
        case Crashed():
            raise RuntimeError(f"a worker met a bug:\n{reply.traceback}")
        case _:
            return reply
