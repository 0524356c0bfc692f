"""What goes wrong in a run: which trials it costs, and when it is too much to go on."""

from tuner.errors import SearchError
from tuner.trial import Reason, TrialOutcome, TrialState

_MAX_FAILS_IN_A_ROW = 5
_MAX_IDLE_LOSSES = 3


class FailureCount:
    """Ends a run in which nothing works: its user should hear of that before the night is over. Mutable."""

    def __init__(self, study_name: str) -> None:
        self._study_name = study_name
        self._n_fails = 0
        self._last = ""
        self._n_idle_losses = 0

    def count(self, outcome: TrialOutcome) -> None:
        """Count trials that fail in a row; those that a cohort's error ended are tried again by themselves first."""
        if outcome.reason is Reason.COHORT_LOST:
            return
        self._n_fails = self._n_fails + 1 if outcome.state is TrialState.FAIL else 0
        self._last = outcome.message

    def count_idle_loss(self, message: str) -> None:
        """Count a worker that was lost without a trial to blame.

        Raises:
            SearchError: If it is the third.
        """
        self._n_idle_losses += 1
        if self._n_idle_losses >= _MAX_IDLE_LOSSES:
            raise explain_loss(message)

    def check(self) -> None:
        """Check that the search may go on.

        Raises:
            SearchError: If five trials failed in a row.
        """
        if self._n_fails >= _MAX_FAILS_IN_A_ROW:
            raise SearchError(
                f"study {self._study_name!r}: {self._n_fails} trials failed in a row; "
                f"the last one: {self._last}; 'tuner show' has the tracebacks"
            )


def explain_loss(message: str) -> SearchError:
    """Return the error for workers that end without a trial to blame."""
    return SearchError(f"workers: must be able to start and prepare the study, but {message}")


def blame_loss(message: str, *, n_lost: int, is_stalled: bool, is_overdue: bool) -> TrialOutcome:
    """Return the outcome of trials whose worker died or was ended.

    Args:
        message: How it ended, in one line.
        n_lost: Trials that it trained.
        is_stalled: Whether it was ended because it hung.
        is_overdue: Whether it was ended because its time was over.
    """
    if is_overdue and n_lost == 1:
        return TrialOutcome(state=TrialState.PRUNED, reason=Reason.TIME_LIMIT, message=message)
    if is_overdue:  # no telling which of them it was
        return TrialOutcome(state=TrialState.FAIL, reason=Reason.COHORT_LOST, message=message)
    reason = Reason.STALLED if is_stalled else Reason.WORKER_LOST
    return TrialOutcome(state=TrialState.FAIL, reason=reason, message=message)
