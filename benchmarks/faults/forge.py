"""Forged databases, to show that the audit sees a lost tell, a repeated one, and what else must not be."""

import copy
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from benchmarks.faults.audit import Audit
from benchmarks.faults.stored import add_triggers, copied, read_stored

_SCHEMA = """
CREATE TABLE trials (
    trial_id INTEGER PRIMARY KEY, number INTEGER, study_id INTEGER, state TEXT, datetime_complete TEXT
);
CREATE TABLE trial_values (trial_id INTEGER, objective INTEGER, value REAL);
CREATE TABLE trial_intermediate_values (trial_id INTEGER, step INTEGER, intermediate_value REAL);
CREATE TABLE trial_user_attributes (trial_id INTEGER, key TEXT, value_json TEXT);
"""
_VALUES = ((0.5, 0.6), (0.5, 0.7), (0.5, 0.8))
_VICTIM = "SELECT max(trial_id) FROM trials WHERE state = 'COMPLETE'"
FORGERIES = {
    "lost: an end never told": """
        UPDATE trials SET state = 'RUNNING', datetime_complete = NULL WHERE trial_id = :victim""",
    "lost: a trial deleted": """
        DELETE FROM trials WHERE trial_id = :victim""",
    "wrong value: another value": """
        UPDATE trial_values SET value = value + 0.001 WHERE trial_id = :victim""",
    "wrong value: another state": """
        UPDATE trials SET state = 'PRUNED' WHERE trial_id = :victim""",
    "wrong value: an epoch that no worker sent": """
        UPDATE trial_intermediate_values SET intermediate_value = intermediate_value + 0.001
        WHERE trial_id = :victim AND step = 1""",
    "told twice: an end told again": """
        UPDATE trials SET datetime_complete = 'later' WHERE trial_id = :victim""",
    "told twice: a number given twice": """
        INSERT INTO trials (number, study_id, state, datetime_complete)
        SELECT number, study_id, state, datetime_complete FROM trials WHERE trial_id = :victim""",
    "zombie: a trial left running": """
        INSERT INTO trials (number, study_id, state) SELECT max(number) + 1, study_id, 'RUNNING' FROM trials""",
    "zombie: a trial left waiting": """
        INSERT INTO trials (number, study_id, state) SELECT max(number) + 1, study_id, 'WAITING' FROM trials""",
    "wrong count: a trial too many": """
        INSERT INTO trials (number, study_id, state, datetime_complete)
        SELECT max(number) + 1, study_id, 'PRUNED', 'now' FROM trials""",
}
"""What is done to a sound database; the words before the colon are the kind of finding that must come of it."""


def make_sound(folder: Path, values: Iterable[tuple[float, ...]] = _VALUES) -> tuple[Path, list[Path], list[str]]:
    """Make a small database as a run leaves it, with its worker's log and what it showed.

    Returns:
        The database, the logs, and the lines that were shown.
    """
    database = folder / "studies.db"
    log, shown = [], []
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript(_SCHEMA)
    add_triggers(database)
    with closing(sqlite3.connect(database)) as connection, connection:
        for number, epochs in enumerate(values):
            key = number + 1
            connection.execute("INSERT INTO trials VALUES (?, ?, 1, 'RUNNING', NULL)", (key, number))
            for step, value in enumerate(epochs, 1):
                connection.execute("INSERT INTO trial_intermediate_values VALUES (?, ?, ?)", (key, step, value))
                log.append(f"trial {number} epoch {step} value {value!r}")
            connection.execute("INSERT INTO trial_values VALUES (?, 0, ?)", (key, epochs[-1]))
            update = "UPDATE trials SET state = 'COMPLETE', datetime_complete = 'now' WHERE trial_id = ?"
            connection.execute(update, (key,))
            log.append(f"trial {number} ended COMPLETE {epochs[-1]!r}")
            shown.append(log[-1])
    path = folder / "0000-worker-1.log"
    path.write_text("\n".join(log), encoding="ascii")
    return database, [path], shown


def audit_forged(audit: Audit, database: Path, statement: str) -> set[str]:
    """Return the kinds of what an audit finds at a study's end after a statement was run on a copy of its database."""
    audit = copy.deepcopy(audit)
    with copied(database) as forged:
        with closing(sqlite3.connect(forged)) as connection, connection:
            (victim,) = connection.execute(_VICTIM).fetchone()
            connection.execute(statement, {"victim": victim})
        audit.check_end(read_stored(forged))
    return {finding.kind for finding in audit.findings}


def list_seen(audit: Audit, database: Path) -> list[str]:
    """Return the forgeries that the audit of a sound study sees for what they are."""
    return [name for name, text in FORGERIES.items() if name.partition(":")[0] in audit_forged(audit, database, text)]
