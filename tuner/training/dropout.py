"""The dropout in front of the head: masks from a generator of the trial's own, so that a cohort can draw the same."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tuner.models.backbone import find_classifiers

_LEVELS = 2**16
_STREAM = 0x9E3779B97F4A7C15  # any odd number: only another stream than that of the batch order is wanted


def start_dropout(seed: int, device: torch.device) -> torch.Generator:
    """Return the generator of a trial's dropout masks; another stream than ``start_order`` of the same seed.

    Args:
        seed: The trial's, in ``[0, 2**63)``.
        device: Where the masks are needed.
    """
    mixed = (seed ^ (seed >> 31)) * _STREAM + 1
    # A CPU generator takes the lower half of its seed alone.
    return torch.Generator(device).manual_seed((mixed ^ (mixed >> 32)) % 2**63)


def draw_kept(shape: Sequence[int], dropout: float, generator: torch.Generator) -> Tensor:
    """Draw which inputs are kept, each with probability ``1 - dropout`` to the nearest 2**-16.

    Four inputs share one 64-bit draw: drawing is most of what dropout costs a small head.

    Args:
        shape: Of the inputs.
        dropout: In [0, 1).
        generator: Of ``start_dropout``.

    Returns:
        Bool, of that shape, on the generator's device.
    """
    n_inputs = math.prod(shape)
    words = torch.empty(-(-n_inputs // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    n_dropped = min(round(dropout * _LEVELS), _LEVELS - 1)  # of 2**16 equally likely values
    return (words.view(torch.int16)[:n_inputs] >= n_dropped - _LEVELS // 2).view(tuple(shape))


@contextmanager
def dropping_inputs(model: nn.Module, dropout: float, generator: torch.Generator) -> Iterator[None]:
    """Drop a share of the classifier's inputs while it trains, besides what the backbone itself drops.

    Args:
        model: Its classifier is as before afterwards.
        dropout: In [0, 1).
        generator: Of ``start_dropout``.
    """

    def drop(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if not module.training:
            return inputs
        return (inputs[0] * draw_kept(inputs[0].shape, dropout, generator) / (1 - dropout), *inputs[1:])

    names = find_classifiers(model) if dropout > 0 else ()
    handles = [model.get_submodule(name).register_forward_pre_hook(drop) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
