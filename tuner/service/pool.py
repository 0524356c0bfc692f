"""Worker processes: started, heard, and never left behind.

A worker is ``python -m tuner.service.worker`` on a socket pair: no fork of a process that holds torch or SQLite, and
no import of the caller's main module, so that a study runs from a script or a notebook alike. Its death is the end of
its socket, and so is ours for it.
"""

import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Self

from tuner.errors import ERRORS_BY_NAME
from tuner.service.messages import Crashed, Lines, Refused, Reply, Request, encode
from tuner.service.slots import Slot, bind

_GRACE_SECONDS = 5.0
_LAST_WORDS = 2000


class Worker:
    """One worker process and the socket to it."""

    def __init__(self, number: int, slot: Slot | None, environment: Mapping[str, str]) -> None:
        self.number = number
        self.slot = slot
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self.connection, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # -P: a file of the working directory must not shadow a module of ours
                [sys.executable, "-P", "-m", "tuner.service.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_bind(slot, environment),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                process_group=0,  # Ctrl-C in a terminal is for the coordinator alone
            )
        self._lines = Lines(self.connection)

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._process.pid

    def send(self, request: Request) -> None:
        """Send a request; a worker that is gone shows when it is next heard."""
        try:
            self.connection.sendall(encode(request))
        except OSError:
            return

    def receive(self) -> Iterator[Reply]:
        """Yield the replies that have arrived.

        Raises:
            EOFError: If the worker is gone.
        """
        yield from self._lines.receive()  # type: ignore[misc] # a worker sends replies only

    def describe_end(self) -> str:
        """Return how the process ended, with the last lines that it printed. Waits for its end."""
        try:
            code = self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        self._log.seek(0)
        words = self._log.read()[-_LAST_WORDS:].decode(errors="replace").strip()
        return f"worker {self.number} ended: {how}" + (f"; its last words: {words}" if words else "")

    def close(self) -> None:
        """Hang up: the worker ends by itself when it notices."""
        self.connection.close()

    def reap(self, deadline: float) -> None:
        """Wait for the process until a deadline on the monotonic clock, then kill it."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def _bind(slot: Slot | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Return a worker's environment; one without a slot sees the devices that the user sees."""
    if slot is None:
        return {**environment, "OMP_NUM_THREADS": "1"}
    return {**bind(slot.device, environment), "OMP_NUM_THREADS": str(slot.n_threads)}


class Pool:
    """The workers of a run, and the one place where the coordinator waits."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(os.environ if environment is None else environment)
        self.workers: dict[int, Worker] = {}
        self._selector = selectors.DefaultSelector()
        self._n_started = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        workers = list(self.workers.values())
        for worker in workers:
            worker.close()
        deadline = time.monotonic() + _GRACE_SECONDS
        for worker in workers:
            worker.reap(deadline)
        self._selector.close()

    def start(self, slot: Slot | None) -> Worker:
        """Start a worker; None starts one that is bound to no device."""
        worker = Worker(self._n_started, slot, self._environment)
        self._n_started += 1
        self.workers[worker.number] = worker
        self._selector.register(worker.connection, selectors.EVENT_READ, worker)
        return worker

    def stop(self, worker: Worker) -> None:
        """End one worker."""
        del self.workers[worker.number]
        self._selector.unregister(worker.connection)
        worker.close()
        worker.reap(time.monotonic() + _GRACE_SECONDS)

    def wait(self, timeout: float | None) -> Iterator[tuple[Worker, Reply | None]]:
        """Wait for replies, and yield each with its worker; None for a worker that is gone.

        Raises:
            TunerError: If a worker met a mistake of the user's.
            RuntimeError: If a worker met a bug.
        """
        for key, _ in self._selector.select(timeout):
            worker: Worker = key.data
            if worker.number not in self.workers:
                continue
            try:
                for reply in worker.receive():
                    yield worker, _check(reply)
            except EOFError:
                del self.workers[worker.number]
                self._selector.unregister(worker.connection)
                yield worker, None


def _check(reply: Reply) -> Reply:
    match reply:
        case Refused():
            raise ERRORS_BY_NAME[reply.error](reply.message)
        case Crashed():
            raise RuntimeError(f"a worker met a bug:\n{reply.traceback}")
        case _:
            return reply
