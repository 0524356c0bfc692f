"""The learning rate over a trial: a linear warm-up, then half a cosine down to 0."""

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def lr_factor(step: int, n_steps: int, warmup_fraction: float) -> float:
    """Return the share of the peak learning rate at which a step is taken.

    The warm-up rises in equal parts from above 0 and the cosine (Loshchilov & Hutter 2017, eq. 5, without restarts)
    starts at exactly 1 and would reach 0 at the step after the last, so that every step moves the weights.

    Args:
        step: From 0. Steps past the end get 0.
        n_steps: Steps of the whole trial, >= 1.
        warmup_fraction: Share of the steps that warm up, in [0, 1).

    Returns:
        In [0, 1], and more than 0 for every step below ``n_steps``.
    """
    n_warmup = min(round(warmup_fraction * n_steps), n_steps - 1)
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    progress = min((step - n_warmup) / (n_steps - n_warmup), 1.0)
    return 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(optimizer: Optimizer, *, n_steps: int, warmup_fraction: float) -> LambdaLR:
    """Return a schedule to be moved on once per step; each param group keeps its own peak."""
    return LambdaLR(optimizer, partial(lr_factor, n_steps=n_steps, warmup_fraction=warmup_fraction))
