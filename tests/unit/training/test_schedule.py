"""The learning rate over a trial."""

import itertools

import pytest
import torch
from torch import nn

from tuner.training.schedule import build_schedule, lr_factor


def test_lr_factor_without_warmup_starts_at_the_peak() -> None:
    """A warm-up of no steps is no warm-up."""
    assert lr_factor(0, 100, 0.0) == 1.0


def test_lr_factor_ends_at_zero_after_the_last_step() -> None:
    """The last step still moves the weights; the schedule then stands at 0 and stays there."""
    assert lr_factor(99, 100, 0.1) > 0
    assert lr_factor(100, 100, 0.1) == 0.0
    assert lr_factor(150, 100, 0.1) == 0.0


def test_lr_factor_warms_up_linearly_to_the_peak() -> None:
    """Equal parts, from above 0 to exactly 1 where the cosine takes over."""
    assert [lr_factor(step, 20, 0.2) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_lr_factor_halves_midway_through_the_cosine() -> None:
    """Half of the steps after the warm-up bring half of the peak."""
    assert lr_factor(15, 20, 0.5) == pytest.approx(0.5)


@pytest.mark.parametrize("n_steps", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("warmup_fraction", [0.0, 0.1, 0.5, 0.999])
def test_lr_factor_rises_then_falls_and_is_never_zero(n_steps: int, warmup_fraction: float) -> None:
    """Whatever the horizon, each step has a rate and there is one peak of 1."""
    factors = [lr_factor(step, n_steps, warmup_fraction) for step in range(n_steps)]
    peak = factors.index(1.0)
    assert min(factors) > 0
    assert all(a < b for a, b in itertools.pairwise(factors[: peak + 1]))
    assert all(a > b for a, b in itertools.pairwise(factors[peak:]))


def test_build_schedule_scales_each_groups_own_peak() -> None:
    """Layer decay survives the schedule."""
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weights[0]], "lr": 1.0}, {"params": [weights[1]], "lr": 0.1}])
    schedule = build_schedule(optimizer, n_steps=10, warmup_fraction=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1 / 3, 0.1 / 3])
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([2 / 3, 0.2 / 3])
