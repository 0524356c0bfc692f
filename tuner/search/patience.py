"""How long a run waits for a database that cannot be written now: it is locked, or its disk is full."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tuner.errors import StorageBusyError, StorageError
from tuner.search.storage_errors import explain_failures

PATIENCE_SECONDS = 60.0
"""How long the database may fail without a success in between."""
ATTEMPT_SECONDS = 1.0
"""How long SQLite itself waits for a lock. In that time a signal is noted but not acted upon."""
_STOP_SECONDS = 2.0
"""What is left of the patience after the user asked to stop."""
_PAUSE_SECONDS = 0.5
_QUIET_SECONDS = 2.0
"""What passes in this time is not worth a word."""

Result = TypeVar("Result")


class Patience:
    """Tries again what failed for a reason that may pass; what still fails after the patience ends the run.

    Once it is spent, later calls try once, until one succeeds.
    """

    def __init__(
        self,
        path: Path,
        *,
        note: Callable[[str], None],
        must_stop: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path, self._note, self._must_stop = path, note, must_stop
        self._clock, self._sleep = clock, sleep
        self._failing_since: float | None = None
        self._has_noted = False
        self._stopped_at: float | None = None

    def keep_trying(self, action: Callable[[], Result]) -> Result:
        """Do something with the database that does all or nothing, until it works.

        Raises:
            StorageError: If it fails for longer than the patience, or for a reason that does not pass.
        """
        while True:
            try:
                with explain_failures(self._path):
                    result = action()
            except StorageBusyError as error:
                self._wait(error)
            else:
                self._failing_since = None
                if self._has_noted:
                    self._has_noted = False
                    self._note("the database can be used again")
                return result

    def _wait(self, error: StorageBusyError) -> None:
        """Say once that the database fails, and pause; or give up."""
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
        if self._stopped_at is None and self._must_stop():
            self._stopped_at = now
        deadline = self._failing_since + PATIENCE_SECONDS
        if self._stopped_at is not None:
            deadline = min(deadline, self._stopped_at + _STOP_SECONDS)
        if now >= deadline:
            tried = f"tried for {now - self._failing_since:.0f} s; what was stored before is kept"
            raise StorageError(f"{error} ({tried})") from error
        if not self._has_noted and now >= self._failing_since + _QUIET_SECONDS:
            self._has_noted = True
            self._note(f"{error}; trying again for {PATIENCE_SECONDS:.0f} s")
        self._sleep(_PAUSE_SECONDS)
