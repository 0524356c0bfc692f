"""What goes wrong in a run: which trials it costs, and when it is too much to go on."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from tuner.errors import SearchError
from tuner.trial import Reason, TrialOutcome, TrialState

_MAX_FAILED_POINTS = 5
_MAX_IDLE_LOSSES = 3
"""Losses of workers in a row, without a trial to blame, that end a run."""
_JUST_NOW_SECONDS = 5.0
_KERNEL_COUNTERS = Path("/proc/vmstat")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A worker that died or was ended while it trained."""

    message: str
    """How it ended, in one line."""
    n_given: int
    """Trials that it was given, those included that had ended before."""
    was_killed: bool = False
    """Whether somebody else or the kernel killed it."""
    is_stalled: bool = False
    """Whether it was ended because it hung."""
    is_overdue: bool = False
    """Whether it was ended because its time was over."""
    is_orphan: bool = False
    """Whether it ended with the process that had forked it."""


class MemoryKills:
    """Tells whether the kernel has just ended a process of this machine to get its memory. Mutable."""

    def __init__(self, counters: Path = _KERNEL_COUNTERS, clock: Callable[[], float] = monotonic) -> None:
        self._counters, self._clock = counters, clock
        self._n_older = self._n_newer = self._count()
        self._looked_at = clock()

    def watch(self) -> None:
        """Look now and then, so that what happened to others hours ago is not taken for the cause of a loss."""
        if self._clock() - self._looked_at >= _JUST_NOW_SECONDS:
            self._n_older, self._n_newer = self._n_newer, self._count()
            self._looked_at = self._clock()

    def were_just_now(self) -> bool:
        """Return whether there were any since the look before the last one."""
        return self._count() > self._n_older

    def _count(self) -> int:
        with suppress(OSError, ValueError):  # another kernel: none is ever noticed
            for line in self._counters.read_text(encoding="ascii").splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
        return 0


class FailureCount:
    """Ends a run in which nothing works: its user should hear of that before the night is over. Mutable."""

    def __init__(self, study_name: str, memory_kills: MemoryKills | None = None) -> None:
        self._study_name = study_name
        self._memory_kills = memory_kills or MemoryKills()
        self._failed: set[int] = set()
        self._end: SearchError | None = None
        self._idle_losses: list[object] = []

    def watch(self) -> None:
        """Look at what else the machine does; to be called at every turn."""
        self._memory_kills.watch()

    def blame(self, loss: Loss) -> TrialOutcome:
        """Return the outcome of the trials that a lost worker had not finished.

        Of several, no telling which of them was at fault: they are tried again, each by itself.
        """
        if loss.was_killed and self._memory_kills.were_just_now():
            message = f"{loss.message}, by the kernel, which had no memory left"
            return _blame_one(loss, TrialOutcome(state=TrialState.PRUNED, reason=Reason.OUT_OF_MEMORY, message=message))
        if loss.is_overdue:
            outcome = TrialOutcome(state=TrialState.PRUNED, reason=Reason.TIME_LIMIT, message=loss.message)
            return _blame_one(loss, outcome)
        if loss.is_orphan:  # no trial did that
            return TrialOutcome(state=TrialState.FAIL, reason=Reason.INTERRUPTED, message=loss.message)
        reason = Reason.STALLED if loss.is_stalled else Reason.WORKER_LOST
        return TrialOutcome(state=TrialState.FAIL, reason=reason, message=loss.message)

    def count(self, origin: int, outcome: TrialOutcome, *, is_screen: bool = False) -> None:
        """Count points that fail in a row, each once however often it is tried again.

        Args:
            origin: Number of the trial's first attempt.
            outcome: How this attempt ended.
            is_screen: Whether it is of the screen, where one broken backbone fails often: the search does not hang on
                that. One that ends well shows that workers live.
        """
        is_well = outcome.state is not TrialState.FAIL
        if is_well:
            self._idle_losses.clear()
        if is_screen:
            return
        if is_well:
            self._failed.clear()
        elif outcome.reason is not Reason.COHORT_LOST:  # those are tried again by themselves first
            self._failed.add(origin)
            if len(self._failed) == _MAX_FAILED_POINTS and self._end is None:
                self._end = self._explain(outcome.message)

    def count_idle_loss(self, cause: object, message: str) -> None:
        """Count what ended a worker without a trial to blame.

        Args:
            cause: Counts once, however many workers it ended.
            message: How the worker ended.

        Raises:
            SearchError: If it is the third since a trial ended well.
        """
        if cause not in self._idle_losses:
            self._idle_losses.append(cause)
        if len(self._idle_losses) >= _MAX_IDLE_LOSSES:
            raise SearchError(f"workers: must be able to start and prepare the study, but {message}")

    def check(self) -> None:
        """Check that the search may go on.

        Raises:
            SearchError: If five points failed in a row, whatever has ended since: several trials may end in one turn.
        """
        if self._end is not None:
            raise self._end

    def _explain(self, last: str) -> SearchError:
        """Return the error for a run in which nothing works."""
        return SearchError(
            f"study {self._study_name!r}: {_MAX_FAILED_POINTS} trials failed in a row; "
            f"the last one: {last}; 'tuner show' has the tracebacks"
        )


def _blame_one(loss: Loss, outcome: TrialOutcome) -> TrialOutcome:
    if loss.n_given == 1:
        return outcome
    return TrialOutcome(state=TrialState.FAIL, reason=Reason.COHORT_LOST, message=outcome.message)
