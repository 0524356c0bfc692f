"""From what was raised in a trial to how it ended."""

import traceback

from tuner.errors import DataError, ModelError, StorageError
from tuner.training.device import is_out_of_memory
from tuner.training.loop import Diverged
from tuner.trial import Reason, TrialOutcome, TrialState


def blame(error: Exception) -> TrialOutcome:
    """Return the outcome of a trial that raised an error."""
    if isinstance(error, Diverged):
        return TrialOutcome(state=TrialState.PRUNED, reason=Reason.DIVERGED, message=str(error))
    if is_out_of_memory(error):
        return TrialOutcome(state=TrialState.PRUNED, reason=Reason.OUT_OF_MEMORY, message=first_line(error))
    is_unreadable = isinstance(error, OSError | DataError | ModelError | StorageError)
    return TrialOutcome(
        state=TrialState.FAIL,
        reason=Reason.UNREADABLE if is_unreadable else Reason.ERROR,
        message=f"{type(error).__name__}: {first_line(error)}",
        traceback="".join(traceback.format_exception(error)),
    )


def first_line(error: Exception) -> str:
    """Return what an error says in one line, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
