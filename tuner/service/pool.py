"""Worker processes: started, heard, and never left behind.

A worker's end shows as the end of its socket, and so does ours to it. No fork of a process that holds SQLite or a
device, and no import of the caller's main module, so that a study runs from a script or a notebook alike.
"""

import math
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import IO, Self

from tuner.errors import ERRORS_BY_NAME
from tuner.service.messages import Crashed, Refused, Reply
from tuner.service.processes import ForkServer, Process, spawn
from tuner.service.slots import Slot, ask_for_huge_pages, bind, expects_cpu
from tuner.service.worker_process import GRACE_SECONDS, Worker
from tuner.spec.sections import StudySpec

WORKER_MODULE = "tuner.service.worker"
_LONGEST_STEP_SECONDS = 1.0
_LOADING_SECONDS = 120.0
"""Least silence of the process that forks workers, while one is waited for, that ends it: it loads from a disk."""


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
        deadline = time.monotonic() + GRACE_SECONDS
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
        worker.reap(time.monotonic() + GRACE_SECONDS)

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
