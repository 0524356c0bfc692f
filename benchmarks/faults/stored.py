"""What a database holds of a study, read by SQL alone: none of the code that wrote it works here."""

import json
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FINISHED = ("COMPLETE", "PRUNED", "FAIL")
_HISTORY = """
CREATE TABLE IF NOT EXISTS fault_history (trial_id INTEGER, state TEXT, completed TEXT);
CREATE TRIGGER IF NOT EXISTS fault_update AFTER UPDATE OF state, datetime_complete ON trials
BEGIN INSERT INTO fault_history VALUES (NEW.trial_id, NEW.state, NEW.datetime_complete); END;
CREATE TRIGGER IF NOT EXISTS fault_insert AFTER INSERT ON trials
BEGIN INSERT INTO fault_history VALUES (NEW.trial_id, NEW.state, NEW.datetime_complete); END;
"""
_TRIALS = "SELECT trial_id, number, state, datetime_complete FROM trials ORDER BY trial_id"


@dataclass(frozen=True, kw_only=True)
class StoredTrial:
    """The rows of one trial."""

    number: int
    state: str
    completed: str | None
    values: tuple[float, ...]
    epochs: dict[int, float]
    attrs: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StoredStudy:
    """A database with one study."""

    integrity: str
    """``ok``, or what is damaged."""
    trials: tuple[StoredTrial, ...]
    n_ends: dict[int, int]
    """How often each trial's number was given a finished state, as triggers saw it."""

    @property
    def n_counted(self) -> int:
        """How many trials count: COMPLETE and PRUNED ones that are not of the screen."""
        return sum(trial.state in FINISHED[:2] and "screen" not in trial.attrs for trial in self.trials)


def add_triggers(database: Path) -> None:
    """Let the database itself remember every state that a trial is given, in the transaction that gives it."""
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        connection.executescript(f"BEGIN IMMEDIATE; {_HISTORY} COMMIT;")


@contextmanager
def copied(database: Path) -> Iterator[Path]:
    """Yield a copy of a database that nobody has open; reading the original would put its WAL away."""
    with tempfile.TemporaryDirectory(prefix="faults_copy_") as folder:
        for suffix in ("", "-wal"):
            source = database.with_name(database.name + suffix)
            if source.exists():
                shutil.copy(source, folder)
        yield Path(folder) / database.name


def read_stored(database: Path) -> StoredStudy:
    """Read a database with at most one study; one that is not there is empty."""
    if not database.exists():
        return StoredStudy(integrity="ok", trials=(), n_ends={})
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        integrity = "; ".join(row[0] for row in connection.execute("PRAGMA integrity_check"))
        if integrity != "ok":
            return StoredStudy(integrity=integrity, trials=(), n_ends={})
        rows = connection.execute(_TRIALS).fetchall()
        trials = tuple(_read_trial(connection, *row) for row in rows)
        numbers = {row[0]: row[1] for row in rows}
        return StoredStudy(integrity=integrity, trials=trials, n_ends=_count_ends(connection, numbers))


def _read_trial(connection: sqlite3.Connection, key: int, number: int, state: str, completed: str) -> StoredTrial:
    def read(query: str) -> list[tuple[Any, Any]]:
        return connection.execute(f"{query} WHERE trial_id = ?", (key,)).fetchall()

    values = read("SELECT objective, value FROM trial_values")
    attrs = read("SELECT key, value_json FROM trial_user_attributes")
    return StoredTrial(
        number=number,
        state=state,
        completed=completed,
        values=tuple(value for _, value in sorted(values)),
        epochs=dict(read("SELECT step, intermediate_value FROM trial_intermediate_values")),
        attrs={name: json.loads(text) for name, text in attrs},
    )


def _count_ends(connection: sqlite3.Connection, numbers: dict[int, int]) -> dict[int, int]:
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "fault_history" not in tables:
        return {}
    ends: Counter[int] = Counter()
    for key, state in connection.execute("SELECT trial_id, state FROM fault_history"):
        ends[numbers.get(key, -1)] += state in FINISHED
    return dict(ends)
