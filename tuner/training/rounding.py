"""Whether two computations gave the same, but for what rounding may change."""

import torch
from torch import Tensor

from tuner.training.device import computes_in_bfloat16
from tuner.trial import Precision

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest difference, over the largest value, of what is computed in a type; the last is TF32's as well."""
_MAX_NOISE = 0.25
"""Largest difference of what whole networks compute in bfloat16, over what images differ by, both root mean squares:
MobileNets with ImageNet weights were up to 0.12 off their own float32, and one value up to 0.32 of the largest."""


def repeats(found: Tensor, expected: Tensor, device: torch.device, *, floor: float = 0.0) -> bool:
    """Whether the same computation, made anew, gave the same: all bits on a CPU, elsewhere but for the order of sums.

    Args:
        found: What it gave now.
        expected: What it gave before.
        device: Where it was computed.
        floor: Size below which values may be nothing but rounding.
    """
    if device.type == "cpu" or found.shape != expected.shape or torch.equal(found, expected):
        return torch.equal(found, expected)
    largest = expected.abs().max().clamp(min=floor)
    return bool((found - expected).abs().max() <= _TOLERANCES[torch.bfloat16] * largest)


def find_rounding(device: torch.device, precision: Precision, dtype: torch.dtype) -> torch.dtype:
    """Return the type whose rounding is in values of a type: on CUDA, float32 convolutions are rounded too (TF32)."""
    is_rounded = device.type == "cuda" or computes_in_bfloat16(device, precision)
    return torch.bfloat16 if is_rounded and dtype != torch.float64 else dtype


def agree(found: Tensor, expected: Tensor, device: torch.device, precision: Precision) -> bool:
    """Whether two tensors are the same but for what rounding on a device may change.

    Args:
        found: As many numbers as are expected, in any shape.
        expected: One row for each image, if it has rows.
        device: Where they were computed.
        precision: In what.
    """
    if found.numel() != expected.numel():
        return False
    difference = found.reshape(expected.shape).to(expected.dtype) - expected
    # False for NaN too.
    if computes_in_bfloat16(device, precision) and expected.dtype != torch.float64:
        has_rows = expected.ndim > 1 and len(expected) > 1
        signal = expected - expected.mean(dim=0) if has_rows else expected
        return bool(difference.norm() <= _MAX_NOISE * signal.norm())
    tolerance = _TOLERANCES[find_rounding(device, precision, expected.dtype)]
    return bool(difference.abs().max() <= tolerance * expected.abs().max())
