"""From what was raised in a trial to how it ended."""

import traceback
from collections.abc import Iterator

from tuner.errors import DataError, ModelError, StorageError
from tuner.training.device import is_out_of_memory
from tuner.training.loop import Diverged
from tuner.trial import Reason, TrialOutcome, TrialState


def blame(error: Exception) -> TrialOutcome:
    """Return the outcome of a trial that raised an error."""
    if isinstance(error, Diverged):
        return TrialOutcome(state=TrialState.PRUNED, reason=Reason.DIVERGED, message=str(error))
    causes = list(_list_causes(error))
    if any(map(is_out_of_memory, causes)):
        return TrialOutcome(state=TrialState.PRUNED, reason=Reason.OUT_OF_MEMORY, message=first_line(error))
    # What a user's own code raised while it made a model is a ModelError too, but no fault of the disk's.
    is_unreadable = isinstance(causes[-1], OSError | DataError | ModelError | StorageError)
    return TrialOutcome(
        state=TrialState.FAIL,
        reason=Reason.UNREADABLE if is_unreadable else Reason.ERROR,
        message=f"{type(error).__name__}: {first_line(error)}",
        traceback="".join(traceback.format_exception(error)),
    )


def _list_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what it was raised from, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def first_line(error: Exception) -> str:
    """Return what an error says in one line, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
