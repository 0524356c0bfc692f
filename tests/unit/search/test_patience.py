"""Tests of tuner.search.patience."""

import re
import sqlite3
from pathlib import Path

import pytest

from tuner.errors import StorageBusyError, StorageError
from tuner.search.patience import Patience


class Clock:
    """Time that passes in sleep alone."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def fail(code: int, text: str) -> sqlite3.OperationalError:
    """Return what SQLite raises for one of its result codes."""
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


class Database:
    """Fails until a time, or always."""

    def __init__(self, clock: Clock, *, until: float = 1e9, code: int = sqlite3.SQLITE_FULL) -> None:
        self.clock, self.until, self.code, self.n_calls = clock, until, code, 0

    def write(self) -> str:
        """Fail, or not."""
        self.n_calls += 1
        if self.clock.now < self.until:
            raise fail(self.code, "what SQLite says")
        return "written"


def make_patience(clock: Clock, notes: list[str], *, stop_at: float = 1e9) -> Patience:
    """Make a patience in made-up time."""
    must_stop = lambda: clock.now >= stop_at  # noqa: E731
    return Patience(Path("/a/b.db"), note=notes.append, must_stop=must_stop, clock=clock, sleep=clock.sleep)


def test_patience_outlasts_a_minute_and_says_so_once() -> None:
    """What works again within 60 seconds is done; the user reads one line for the wait and one for its end."""
    clock, notes = Clock(), list[str]()
    assert make_patience(clock, notes).keep_trying(Database(clock, until=159.0).write) == "written"
    assert len(notes) == 2
    expected = r"storage: must have room on its disk, got /a/b\.db: what SQLite says; .*; trying again for 60 s"
    assert re.fullmatch(expected, notes[0])
    assert notes[1] == "the database can be used again"


def test_patience_says_nothing_of_a_moment() -> None:
    """Two runs that start at once wait for each other, which concerns nobody."""
    clock, notes = Clock(), list[str]()
    patience = make_patience(clock, notes)
    assert patience.keep_trying(Database(clock, until=101.5).write) == "written"
    assert notes == []


def test_patience_ends_with_what_to_do_and_is_spent() -> None:
    """After 60 seconds the run ends; what is tried then gets one attempt."""
    clock, notes = Clock(), list[str]()
    patience, database = make_patience(clock, notes), Database(clock)
    match = r"room on its disk.*; make room, then run the same command again \(tried for 60 s; what was stored before"
    with pytest.raises(StorageError, match=match):
        patience.keep_trying(database.write)
    assert clock.now == 160.0
    n_before = database.n_calls
    with pytest.raises(StorageError, match=match):
        patience.keep_trying(database.write)
    assert database.n_calls == n_before + 1


def test_patience_is_whole_again_after_a_success() -> None:
    """Two waits of 50 seconds are not one of 100."""
    clock, notes = Clock(), list[str]()
    patience = make_patience(clock, notes)
    for until in (150.0, 200.0):
        assert patience.keep_trying(Database(clock, until=until).write) == "written"
    assert len(notes) == 4


@pytest.mark.parametrize("stop_at", [0.0, 130.0])
def test_patience_is_short_once_the_user_asked_to_stop(stop_at: float) -> None:
    """A signal, before or during the wait, leaves two seconds."""
    clock = Clock()
    patience = make_patience(clock, [], stop_at=stop_at)
    with pytest.raises(StorageError, match="what was stored before is kept"):
        patience.keep_trying(Database(clock).write)
    assert clock.now == max(stop_at, 100.0) + 2.0


@pytest.mark.parametrize("code", [sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_CANTOPEN])
def test_patience_does_not_wait_for_what_does_not_pass(code: int) -> None:
    """A read-only or damaged file is not mended by waiting."""
    clock = Clock()
    database = Database(clock, code=code)
    with pytest.raises(StorageError, match=r"storage: must be .*, got /a/b\.db: what SQLite says") as caught:
        make_patience(clock, []).keep_trying(database.write)
    assert database.n_calls == 1
    assert not isinstance(caught.value, StorageBusyError)
