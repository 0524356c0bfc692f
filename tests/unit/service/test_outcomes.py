"""From what was raised in a trial to how it ended."""

import pytest
import torch

from tuner.errors import DataError, ModelError
from tuner.service.outcomes import blame
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
        (chain(ModelError("own:net: must be made, got a TypeError"), TypeError("n")), Reason.ERROR),
        (MemoryError(), Reason.OUT_OF_MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), Reason.OUT_OF_MEMORY),
        (chain(ModelError("own:net"), RuntimeError("DefaultCPUAllocator: not enough memory")), Reason.OUT_OF_MEMORY),
    ],
)
def test_blame_looks_for_the_root(error: Exception, reason: Reason) -> None:
    """A model that a user's own code cannot make is a bug of that code, unless memory or a disk is at the root."""
    assert blame(error).reason is reason
