"""From what was raised in a trial to how it ended."""

import traceback

from tuner.errors import DataError, ModelError, OwnCodeError, StorageError, first_line
from tuner.training.device import is_device_lost, is_out_of_memory
from tuner.training.epoch_numbers import Diverged
from tuner.trial import Reason, TrialOutcome, TrialState


def blame(error: Exception) -> TrialOutcome:
    """Return the outcome of a trial that raised an error."""
    if isinstance(error, Diverged):
        return TrialOutcome(state=TrialState.PRUNED, reason=Reason.DIVERGED, message=str(error))
    causes = _list_causes(error)
    if any(map(is_out_of_memory, causes)):
        return TrialOutcome(state=TrialState.PRUNED, reason=Reason.OUT_OF_MEMORY, message=first_line(error))
    is_unreadable = any(isinstance(cause, OSError | DataError | StorageError) for cause in causes) or (
        isinstance(error, ModelError) and not isinstance(error, OwnCodeError)
    )
    return TrialOutcome(
        state=TrialState.FAIL,
        reason=Reason.UNREADABLE if is_unreadable else Reason.ERROR,
        message=f"{type(error).__name__}: {first_line(error)}",
        traceback="".join(traceback.format_exception(error)),
    )


def comes_from_lost_device(error: Exception) -> bool:
    """Whether a CUDA error is at the root: after most of them every later call of this process fails as well."""
    return any(map(is_device_lost, _list_causes(error)))


def _list_causes(error: BaseException) -> list[BaseException]:
    """Return an error, what it was raised from, and so on, each once."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__
    return causes
