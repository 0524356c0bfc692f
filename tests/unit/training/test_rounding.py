"""What counts as the same numbers, in each type and on each device."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tuner.training.rounding import agree, repeats

from .builders import CPU


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([1.0, 1000.0], True),
        ([1.05, 1000.0], True),
        ([1.2, 1000.0], False),
        ([torch.nan, 1000.0], False),
        ([1.0], False),
    ],
)
def test_agree_allows_rounding_alone(found: list[float], expected: bool) -> None:
    """Measured by the largest value; NaN and another size are never the same."""
    assert agree(torch.tensor(found), torch.tensor([1.0, 1000.0]), CPU, "auto") is expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows, noise: rows + 0.2 * noise, True),
        (lambda rows, noise: rows + 0.3 * noise, False),
        (lambda rows, _: rows.to(torch.bfloat16), False),  # steps of 4 at a thousand
        (lambda rows, _: rows.roll(1, dims=0), False),
        (lambda rows, _: rows * torch.nan, False),
        (lambda rows, _: rows.flatten(), True),
    ],
)
def test_agree_in_bfloat16_measures_by_what_images_differ_by(
    change: Callable[[Tensor, Tensor], Tensor], expected: bool
) -> None:
    """Not by the values, which may have much in common."""
    rows, noise = torch.randn(2, 8, 500, generator=torch.Generator().manual_seed(0))
    rows += 1000
    assert agree(change(rows, noise), rows, CPU, "bfloat16") is expected


def test_agree_in_bfloat16_bears_a_value_that_is_far_off() -> None:
    """Real MobileNets have such; in float32 it would be a mistake."""
    rows = torch.randn(8, 500, generator=torch.Generator().manual_seed(0))
    found = rows.clone()
    found[0, 0] += 0.3 * rows.abs().max()
    assert agree(found, rows, CPU, "bfloat16")
    assert not agree(found, rows, CPU, "float32")


@pytest.mark.parametrize(
    ("change", "on_cpu", "on_cuda"),
    [(0.0, True, True), (0.02, False, True), (0.04, False, False), (torch.nan, False, False)],
)
def test_repeats_allows_no_difference_on_a_cpu(change: float, on_cpu: bool, on_cuda: bool) -> None:
    """On CUDA the rounding of TF32 and bfloat16; another shape is never the same."""
    expected = torch.tensor([[0.5, -1.0]])
    found = expected + torch.tensor([[change, 0.0]])
    assert repeats(found, expected, CPU) is on_cpu
    assert repeats(found, expected, torch.device("cuda")) is on_cuda
    assert not repeats(found[0], expected, torch.device("cuda"))
