"""Start an arm's processes, hear them, and end them in time; and see whether the machine is quiet before."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

_GRACE_SECONDS = 20.0
_MAX_LINES = 200
_BUSY_CORES = 0.25
_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What became of the processes of an arm."""

    started: float
    """Unix seconds."""
    seconds: float
    timed_out: bool
    exit_codes: tuple[int, ...]
    timeline: list[tuple[float, str]] = field(repr=False)
    """The first lines that they printed, with seconds since the start."""
    tail: str
    """The last lines."""

    @property
    def error(self) -> str:
        """What the processes said at the end, if one failed before its time was over."""
        return self.tail if not self.timed_out and any(self.exit_codes) else ""


def watch(commands: list[list[str]], *, environment: dict[str, str], seconds: float, started: float) -> Watched:
    """Run commands side by side; after some seconds send SIGTERM, and later SIGKILL.

    Args:
        commands: Arguments of the interpreter, one list for each process.
        environment: What differs from this process's.
        seconds: The limit.
        started: When the clock began, in Unix seconds.
    """
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=describe_environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        for command in commands
    ]
    heard: list[tuple[float, str]] = []
    readers = [threading.Thread(target=_read, args=(each, heard, started), daemon=True) for each in processes]
    for reader in readers:
        reader.start()
    try:
        timed_out = _wait_for_all(processes, started + seconds)
    finally:  # whoever stops the benchmark stops its arms
        for process in processes:
            _signal(process, signal.SIGKILL)
    ended = time.time()
    for process, reader in zip(processes, readers, strict=True):
        reader.join(timeout=5)
        if process.stdout and not reader.is_alive():
            process.stdout.close()
    return Watched(
        started=started,
        seconds=ended - started,
        timed_out=timed_out,
        exit_codes=tuple(process.returncode for process in processes),
        timeline=heard[:_MAX_LINES],
        tail="\n".join(text for _, text in heard[-20:]),
    )


def describe_environment(changes: dict[str, str]) -> dict[str, str]:
    """Return this process's environment with changes, so that every child imports this repository."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **changes}


def _read(process: subprocess.Popen[str], heard: list[tuple[float, str]], started: float) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        heard.append((round(time.time() - started, 3), line.rstrip()))  # noqa: PERF401 - each has the time of its own


def _wait_for_all(processes: list[subprocess.Popen[str]], deadline: float) -> bool:
    """Wait for the processes; return whether time ran out and they were ended."""
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.time()))
    except subprocess.TimeoutExpired:
        for process in processes:
            _signal(process, signal.SIGTERM)
        limit = time.time() + _GRACE_SECONDS
        for process in processes:
            try:
                process.wait(max(0.0, limit - time.time()))
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                process.wait()
        return True
    return False


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signal a process of ours; a kill takes the loaders that it started along."""
    if process.poll() is not None:
        return
    if number is signal.SIGKILL:
        os.killpg(process.pid, number)  # its own session: no one else's process is in the group
    else:
        process.send_signal(number)


def measure_load(seconds: float = 2.0) -> float:
    """Return how many cores others keep busy while this process sleeps."""
    busy, total = _read_ticks()
    time.sleep(seconds)
    busy_after, total_after = _read_ticks()
    return len(os.sched_getaffinity(0)) * (busy_after - busy) / max(1, total_after - total)


def _read_ticks() -> tuple[int, int]:
    """Return busy and all clock ticks of all cores since the machine started."""
    fields = [int(part) for part in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return sum(fields) - idle, sum(fields)


def wait_until_idle(patience_seconds: float = 60.0) -> float:
    """Wait until others leave the cores alone, or the patience is over.

    Returns:
        Cores that others keep busy at the end; 0 if less than a quarter of one.
    """
    deadline = time.monotonic() + patience_seconds
    load = measure_load()
    while load > _BUSY_CORES and time.monotonic() < deadline:
        load = measure_load()
    return round(load, 2) if load > _BUSY_CORES else 0.0
