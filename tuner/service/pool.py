"""Worker processes: started, heard, and never left behind.

A worker is ``python -m tuner.service.worker`` on a socket pair: no fork of a process that holds torch or SQLite, and
no import of the caller's main module, so that a study runs from a script or a notebook alike. Its death is the end of
its socket, and so is ours for it.
"""

import fcntl
import math
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Self

from tuner.errors import ERRORS_BY_NAME
from tuner.service.messages import Crashed, Refused, Reply, Request
from tuner.service.slots import Slot, bind
from tuner.service.wire import Lines, encode

WORKER_MODULE = "tuner.service.worker"
_GRACE_SECONDS = 5.0
_LAST_WORDS = 2000
_MAX_LOG_BYTES = 16_000_000
_SEND_SECONDS = 5
_LONGEST_STEP_SECONDS = 1.0


class Worker:
    """One worker process and the socket to it."""

    def __init__(self, number: int, slot: Slot | None, environment: Mapping[str, str], module: str) -> None:
        self.number = number
        self.slot = slot
        self.last_heard = time.monotonic()
        self.is_stalled = False
        self._ended_for = ""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        fcntl.fcntl(self._log, fcntl.F_SETFL, os.O_APPEND)  # so that it can be cut short while the worker writes
        self.connection, theirs = socket.socketpair()
        # What a stopped worker does not read must not stop the coordinator as well.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_SECONDS, 0))
        with theirs:
            self._process = subprocess.Popen(
                # -P: a file of the working directory must not shadow a module of ours
                [sys.executable, "-P", "-m", module, str(theirs.fileno())],
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
        except BlockingIOError:
            self.end(f"took no message for {_SEND_SECONDS} s")
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
        """Return how the process ended, with the last lines that it printed. Waits for its end."""
        code = self._wait(time.monotonic() + _GRACE_SECONDS)
        if self._ended_for:
            return f"worker {self.number} {self._ended_for} and was ended"
        if code is None:
            return f"worker {self.number} hung up and cannot be killed"
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - _LAST_WORDS))
        words = self._log.read().decode(errors="replace").strip()
        return f"worker {self.number} ended: {how}" + (f"; its last words: {words}" if words else "")

    @property
    def was_killed(self) -> bool:
        """Whether another process or the kernel killed this one, once it has ended."""
        return not self._ended_for and self._process.returncode == -signal.SIGKILL

    def close(self) -> None:
        """Hang up: the worker ends by itself when it notices."""
        self.connection.close()

    def reap(self, deadline: float) -> None:
        """Wait for the process until a deadline on the monotonic clock, then kill it."""
        self._wait(deadline)
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
    """Return a worker's environment; one without a slot sees the devices that the user sees."""
    if slot is None:
        return {**environment, "OMP_NUM_THREADS": "1"}
    return {**bind(slot.device, environment), "OMP_NUM_THREADS": str(slot.n_threads)}


class Pool:
    """The workers of a run, and the one place where the coordinator waits."""

    def __init__(
        self,
        environment: Mapping[str, str] | None = None,
        *,
        stall_limit: float = math.inf,
        worker_module: str = WORKER_MODULE,
    ) -> None:
        """Make an empty pool.

        Args:
            environment: What workers inherit; default: this process's.
            stall_limit: Seconds of silence after which a worker is ended and counts as gone.
            worker_module: What a worker runs: another one speaks the same messages.
        """
        self._environment = dict(os.environ if environment is None else environment)
        self._stall_limit = stall_limit
        self._worker_module = worker_module
        self.workers: dict[int, Worker] = {}
        self.watched_seconds = 0.0
        """How long workers were watched; while this process waits for a database, or is stopped, nobody watches."""
        self._looked_at = time.monotonic()
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
        worker = Worker(self._n_started, slot, self._environment, self._worker_module)
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

    def _hear(self, worker: Worker) -> Iterator[tuple[Worker, Reply | None]]:
        try:
            for reply in worker.receive():
                yield worker, reply
        except EOFError:
            self._drop(worker)
            yield worker, None

    def _end_stalled(self) -> list[Worker]:
        now = time.monotonic()
        stalled = [worker for worker in self.workers.values() if now - worker.last_heard > self._stall_limit]
        for worker in stalled:
            worker.is_stalled = True
            self.end(worker, f"said nothing for {self._stall_limit:g} s (workers.stall_limit)")
        return stalled


def _check(reply: Reply) -> Reply:
    match reply:
        case Refused():
            raise ERRORS_BY_NAME[reply.error](reply.message)
        case Crashed():
            raise RuntimeError(f"a worker met a bug:\n{reply.traceback}")
        case _:
            return reply
