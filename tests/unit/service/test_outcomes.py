"""From what was raised in a trial to how it ended."""

import pytest
import torch

from tuner.errors import DataError, ModelError, OwnCodeError
from tuner.service.outcomes import blame, comes_from_lost_device
from tuner.trial import Reason


def chain(error: Exception, *causes: Exception) -> Exception:
    """Return an error that was raised from others, the root last."""
    for effect, cause in zip((error, *causes), causes, strict=False):
        effect.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("shape"), Reason.ERROR),
        (OSError(5, "Input/output error"), Reason.UNREADABLE),
        (DataError("data.path: must be readable"), Reason.UNREADABLE),
        (chain(ModelError("weights: must be readable"), OSError(5, "Input/output error")), Reason.UNREADABLE),
        (chain(OwnCodeError("own:net: must be made, got a TypeError"), TypeError("n")), Reason.ERROR),
        (chain(ModelError("weights: must be readable"), EOFError()), Reason.UNREADABLE),
        (chain(OwnCodeError("own:net"), FileNotFoundError("vocabulary.txt")), Reason.UNREADABLE),
        (MemoryError(), Reason.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), Reason.OUT_OF_MEMORY),
        (chain(OwnCodeError("own:net"), RuntimeError("DefaultCPUAllocator: not enough memory")), Reason.OUT_OF_MEMORY),
    ],
)
def test_blame_looks_for_the_root(error: Exception, reason: Reason) -> None:
    """A model that a user's own code cannot make is a bug of that code, unless memory or a disk is at the root."""
    assert blame(error).reason is reason


def test_blame_bears_an_error_that_is_its_own_cause() -> None:
    """``raise error from error`` is a habit of some; its chain has no end."""
    error = ValueError("round")
    error.__cause__ = error
    assert blame(error).reason is Reason.ERROR


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (chain(OwnCodeError("own:net"), RuntimeError("CUDA error: an illegal memory access was encountered")), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (RuntimeError("shapes"), False),
    ],
)
def test_comes_from_lost_device_tells_cuda_errors_from_others(error: Exception, is_lost: bool) -> None:
    """A lack of memory passes with the trial; other errors of CUDA stay with the process."""
    assert comes_from_lost_device(error) == is_lost
