"""``tuner run`` over a database that is locked, full, torn, or used by two."""

import os
import re
import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import optuna

from tests.e2e.harness import Place, make_place, wait_until

_COMMAND = """
import sys
from tuner.search import patience
patience.PATIENCE_SECONDS = float(sys.argv[1])
from tuner.cli.main import run_command
sys.exit(run_command(sys.argv[2:]))
"""


def make_slow_place(folder: Path, *, name: str = "digits", n_trials: int = 5, epochs: int = 3) -> Place:
    """Write a study whose trials take a moment, so that a fault meets them running."""
    return make_place(folder, name=name, backbones=("own:slow",), epochs=epochs, n_trials=n_trials)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A ``tuner run`` under way."""

    process: subprocess.Popen[str]
    lines: list[str]
    """All that it has printed."""
    reader: threading.Thread

    def wait_until(self, is_true: Callable[[], bool]) -> None:
        """Wait for something to become true while the run goes on."""
        wait_until(lambda: is_true() or self.process.poll() is not None)
        assert self.process.poll() is None, self.lines

    def wait_for(self, words: str) -> None:
        """Wait for the run to print some words."""
        self.wait_until(lambda: any(words in line for line in tuple(self.lines)))

    def finish(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and all that was printed."""
        code = self.process.wait(timeout=240)
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code, "".join(self.lines)


def start(place: Place, *, patience: float = 240.0) -> Run:
    """Start ``tuner run`` with one worker and another patience: a busy machine needs more than a minute for a test."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", _COMMAND, str(patience), "run", str(place.study_file), "--workers", "1"],
        cwd=place.folder,
        env=place.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines: list[str] = []
    assert process.stdout is not None
    reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
    reader.start()
    return Run(process=process, lines=lines, reader=reader)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep everyone else from writing."""
    with closing(sqlite3.connect(folder / "studies.db", isolation_level=None, timeout=30)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


def set_limit(run: Run, n_bytes: int) -> None:
    """Let the coordinator write to no file beyond a size, as on a full disk."""
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))


def check_integrity(folder: Path) -> str:
    """Return what SQLite thinks of the database."""
    with closing(sqlite3.connect(folder / "studies.db", timeout=30)) as connection:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])


def read_trials(folder: Path, name: str = "digits") -> list[tuple[int, str]]:
    """Return number and state of every trial of a study, as SQL sees them; the WAL is left as it is."""
    url = f"file:{folder / 'studies.db'}?mode=ro"
    with closing(sqlite3.connect(url, uri=True, timeout=30)) as connection:
        query = "SELECT number, state FROM trials JOIN studies USING (study_id) WHERE study_name = ? ORDER BY number"
        return connection.execute(query, (name,)).fetchall()


def assert_is_whole(folder: Path, n_trials: int, name: str = "digits") -> None:
    """The study has its exact number of trials, no zombie and no number twice, in an undamaged file."""
    trials = read_trials(folder, name)
    assert [number for number, _ in trials] == list(range(len(trials)))
    states = [state for _, state in trials]
    assert sum(state in {"COMPLETE", "PRUNED"} for state in states) == n_trials
    assert set(states) <= {"COMPLETE", "PRUNED", "FAIL"}
    assert check_integrity(folder) == "ok"


def test_run_on_a_disk_that_stays_full_ends_with_one_line_and_resumes(tmp_path: Path) -> None:
    """After the patience the run ends; what was stored is there, and whatever a torn WAL lost is trained again."""
    place = make_slow_place(tmp_path)
    run = start(place, patience=1.0)
    run.wait_until(lambda: place.count_trials("COMPLETE", "PRUNED") >= 1)
    stored = read_trials(tmp_path)
    set_limit(run, 4096)
    code, output = run.finish()
    assert code == 8, output
    (problem,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert re.search(r"error: storage: must lie on a disk .*disk I/O error; see to the disk, .* is kept\)$", problem)
    assert "Traceback" not in output
    assert keep_complete(stored) <= keep_complete(read_trials(tmp_path))
    tear(tmp_path / "studies.db-wal")
    code, output = start(place).finish()
    assert code == 0, output
    assert_is_whole(tmp_path, 5)


def keep_complete(trials: list[tuple[int, str]]) -> set[int]:
    """Return the numbers of the completed trials."""
    return {number for number, state in trials if state == "COMPLETE"}


def tear(wal: Path) -> None:
    """Cut a WAL in the middle of its last frame but one, and garble what is left of that frame."""
    size = wal.stat().st_size
    assert size > 2 * 4120
    os.truncate(wal, size - 4120 - 1000)
    with wal.open("r+b") as file:
        file.seek(size - 4120 - 2000)
        file.write(os.urandom(500))


def test_two_runs_on_one_database_wait_for_it_together(tmp_path: Path) -> None:
    """Different studies and a reader do not meet, a lock and a full disk are waited for, the same study is refused."""
    first, second = (make_slow_place(tmp_path, name=name) for name in ("first", "second"))
    runs = [start(first), start(second)]
    runs[0].wait_until(lambda: first.count_trials("COMPLETE") >= 1)
    assert not any("trying again" in line for run in runs for line in run.lines)
    with poll(tmp_path) as problems:
        with lock(tmp_path):
            runs[0].wait_for("database is locked")
            refused = first.call("run", str(first.study_file))
            copied = first.call("backup", "copy.db")
        runs[0].wait_for("the database can be used again")
        set_limit(runs[0], 4096)
        runs[0].wait_for("disk I/O error")
        assert check_integrity(tmp_path) == "ok"
        set_limit(runs[0], resource.RLIM_INFINITY)
        ends = [run.finish() for run in runs]
    assert refused == (4, "error: study 'first': must not be running already; another 'tuner run' holds it\n")
    assert [code for code, _ in (copied, *ends)] == [0, 0, 0], (copied, ends)
    assert ends[0][1].count("trying again") == ends[0][1].count("can be used again") == 2
    assert problems == []
    for name in ("first", "second"):
        assert_is_whole(tmp_path, 5, name)
        assert "FAIL" not in {state for _, state in read_trials(tmp_path, name)}


@contextmanager
def poll(folder: Path) -> Iterator[list[Exception]]:
    """Read all studies again and again, as the dashboard does; yield what goes wrong."""
    problems: list[Exception] = []
    is_over = threading.Event()

    def read() -> None:
        storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'studies.db'}", skip_table_creation=True)
        try:
            for name in optuna.get_all_study_names(storage=storage):
                optuna.load_study(storage=storage, study_name=name).get_trials()
        finally:
            storage.remove_session()
            storage.engine.dispose()

    def keep_reading() -> None:
        while not is_over.wait(0.1):
            try:
                read()
            except Exception as error:  # noqa: BLE001 - whatever it is, the test is to show it
                problems.append(error)

    poller = threading.Thread(target=keep_reading)
    poller.start()
    try:
        yield problems
    finally:
        is_over.set()
        poller.join()
