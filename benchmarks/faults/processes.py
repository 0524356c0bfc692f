"""The processes of a study under fault: started, struck, and none of them left."""

import os
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults.schedule import Action
from benchmarks.faults.worker_log import LOGS_VARIABLE, RUN_VARIABLE, TICKETS_VARIABLE, Ticket
from benchmarks.processes import describe_environment

_GRACE_SECONDS = 8.0
_FULL_BYTES = 4096
_WORKER_NAME = b"tuner-worker\n"
_RESUMED = re.compile(r"note: trial \d+ goes on after epoch \d+ ")


@dataclass(frozen=True, kw_only=True)
class Place:
    """The folder of one study: its file, database, cache and logs."""

    folder: Path
    worker_module: str

    @property
    def study_file(self) -> Path:
        """The study file."""
        return self.folder / "study.toml"

    @property
    def database(self) -> Path:
        """The database."""
        return self.folder / "studies.db"

    @property
    def cache(self) -> Path:
        """The cache of this study alone."""
        return self.folder / "cache"

    @property
    def logs(self) -> Path:
        """The logs of its workers; processes that know this folder are ours."""
        return self.folder / "logs"

    def list_processes(self) -> list[int]:
        """Return the pids of all processes that the study has started, coordinators and what they started."""
        mark = f"{LOGS_VARIABLE}={self.logs}".encode()
        return [pid for pid in _list_pids() if mark in _read(pid, "environ").split(b"\0")]

    def list_workers(self) -> list[int]:
        """Return the pids of its workers."""
        return [pid for pid in self.list_processes() if _read(pid, "comm") == _WORKER_NAME]

    def list_fork_servers(self) -> list[int]:
        """Return the pids of the processes that fork its workers."""
        return [
            pid
            for pid in self.list_processes()
            if b"tuner.service.fork_server" in _read(pid, "cmdline") and _read(pid, "comm") != _WORKER_NAME
        ]


class Run:
    """One run of a study: the coordinator's process, and what it shows."""

    def __init__(
        self, place: Place, number: int, tickets: tuple[Ticket, ...] = (), *, n_trials: int | None = None
    ) -> None:
        """Start it.

        Args:
            place: Holds the study.
            number: Of the run.
            tickets: Faults for its workers, in the order in which they start.
            n_trials: Instead of the study file's number.
        """
        self.place, self.name = place, f"{number:04d}"
        self.lines: list[str] = []
        self.struck: Counter[str] = Counter()
        folder = place.folder / "tickets" / self.name
        folder.mkdir(parents=True)
        place.logs.mkdir(exist_ok=True)
        for index, ticket in enumerate(tickets):
            (folder / f"ticket-{index:03d}").write_text(ticket.to_text(), encoding="ascii")
        changes = {
            LOGS_VARIABLE: str(place.logs),
            RUN_VARIABLE: self.name,
            TICKETS_VARIABLE: str(folder),
            "TUNER_CACHE_DIR": str(place.cache),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        arguments = [str(place.study_file), f"sqlite:///{place.database}", place.worker_module]
        arguments += [] if n_trials is None else [str(n_trials)]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.faults.one_run", *arguments],
            cwd=place.folder,
            env=describe_environment(changes),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started = time.monotonic()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    @property
    def has_ended(self) -> bool:
        """Whether the coordinator's process is over."""
        return self.process.poll() is not None

    @property
    def worker_logs(self) -> list[Path]:
        """The logs of its workers."""
        return sorted(self.place.logs.glob(f"{self.name}-worker-*.log"))

    @property
    def n_resumed(self) -> int:
        """How many trials went on from a checkpoint, as the run said."""
        return sum(bool(_RESUMED.match(line)) for line in tuple(self.lines))

    def wait_for(self, action: Action) -> None:
        """Wait until an action is due or the run is over."""
        begun = self.started
        if action.phase == "trials":
            while not self.has_ended and not any(line.startswith("trial ") for line in tuple(self.lines)):
                time.sleep(0.01)
            begun = time.monotonic()
        while not self.has_ended and time.monotonic() < begun + action.delay:
            time.sleep(0.005)

    def strike(self, action: Action, victim: int) -> None:
        """Do what an action says; one that came too late counts for nothing.

        Args:
            action: What to do.
            victim: Which worker, modulo their number.
        """
        is_server = action.kind == "kill fork server"
        workers = sorted(self.place.list_fork_servers() if is_server else self.place.list_workers())
        if self.has_ended or ((is_server or "worker" in action.kind) and not workers):
            return
        match action.kind:
            case "kill worker" | "stop worker" | "kill fork server":
                how = signal.SIGSTOP if action.kind == "stop worker" else signal.SIGKILL
                _signal(workers[victim % len(workers)], how)
            case "kill coordinator" | "kill both":
                for pid in (self.process.pid, *(workers if action.kind == "kill both" else ())):
                    _signal(pid, signal.SIGKILL)
            case "SIGTERM":
                self.process.terminate()
            case "stop coordinator":
                self.process.send_signal(signal.SIGSTOP)
                time.sleep(action.seconds)
                self.process.send_signal(signal.SIGCONT)
            case "lock":
                self._lock(action.seconds)
            case "disk full":
                self._fill_disk(action.seconds)
        self.struck[action.kind] += 1

    def _lock(self, seconds: float) -> None:
        with suppress(sqlite3.OperationalError):  # there is none yet, or it is just being made
            uri = f"file:{self.place.database}?mode=rw"
            with closing(sqlite3.connect(uri, uri=True, timeout=5, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                time.sleep(seconds)
                connection.execute("ROLLBACK")

    def _fill_disk(self, seconds: float) -> None:
        with suppress(ProcessLookupError):
            for limit in (_FULL_BYTES, resource.RLIM_INFINITY):
                resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                time.sleep(seconds if limit == _FULL_BYTES else 0)

    def end(self, limit_seconds: float) -> int:
        """Wait for the end of the coordinator, and of all that it started.

        Returns:
            How many processes were left, which are killed here; one that has no end in time counts too.
        """
        n_left = 0
        try:
            self.process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            n_left = 1
            self.lines.append(f"harness: no end within {limit_seconds:g} s")
            self.process.kill()
            self.process.wait()
        deadline = time.monotonic() + _GRACE_SECONDS
        while (left := self.place.list_processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        for pid in left:
            _signal(pid, signal.SIGKILL)
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._count_strikes()
        return n_left + len(left)

    def _count_strikes(self) -> None:
        """Count what the workers' tickets did."""
        for path in self.worker_logs:
            for line in path.read_text(encoding="ascii").splitlines():
                if line.startswith("strike "):
                    _, victim, moment = line.split()
                    what = "stop worker" if victim == "stall" else f"kill {victim}"
                    self.struck[f"{what} {moment} a message"] += 1


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _list_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
