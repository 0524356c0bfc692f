"""Fixed views: what augmentation draws for an image, known beforehand, so that what comes of it can be kept."""

import struct
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tuner.data.augment import N_DRAWS
from tuner.trial import TrialParams

_GAMMA = 0x9E3779B97F4A7C15


@dataclass(frozen=True, kw_only=True)
class View:
    """One augmented version of every image of a data index."""

    number: int
    """In [0, K)."""
    seed: int
    """In [0, 2**63)."""
    strength: float
    """In (0, 1]."""
    horizontal_flip: bool


def find_view(params: TrialParams, epoch: int) -> View | None:
    """Return the view that an epoch of a trial shows; None shows the images as they are.

    Args:
        params: Their images are known beforehand.
        epoch: From 1.

    Raises:
        ValueError: If the trial augments its images anew in every epoch.
    """
    if params.augmentation_strength == 0:
        return None
    if params.views == "fresh":
        raise ValueError("params.views: must be a number of views, got 'fresh'")
    return View(
        number=view_of_epoch(epoch, params.views),
        seed=params.view_seed,
        strength=params.augmentation_strength,
        horizontal_flip=params.horizontal_flip,
    )


def list_views(params: TrialParams) -> set[View | None]:
    """Return the versions of the training images that a trial's epochs show; None is the images as they are."""
    return {find_view(params, epoch) for epoch in range(1, params.epochs + 1)}


def view_of_epoch(epoch: int, n_views: int) -> int:
    """Return the number of the view that an epoch, counted from 1, shows."""
    return epoch % n_views


def draw_view(view_seed: int, rows: Tensor, *, view: int, strength: float) -> Tensor:
    """Draw what ``augment`` needs for one fixed view of some images.

    An image's draws depend on the arguments and on its own row alone: SplitMix64 (Steele et al. 2014) is started from
    a hash of them, so that no other image of the set, no order and no process changes them.

    Args:
        view_seed: In ``[0, 2**63)``.
        rows: The images' rows in the data index, int64, shape ``(n_images,)``.
        view: Number of the view, from 0.
        strength: Of the augmentation; another strength is another draw.

    Returns:
        Float32 in [0, 1), shape ``(n_images, 6)``, on the CPU.
    """
    state = np.zeros(len(rows), dtype=np.uint64)
    (strength_bits,) = struct.unpack("<Q", struct.pack("<d", strength))
    for value in (view_seed, rows.cpu().numpy().astype(np.uint64), view, strength_bits):
        state = _mix((state + np.uint64(_GAMMA)) ^ np.asarray(value, dtype=np.uint64))
    numbers = np.arange(1, N_DRAWS + 1, dtype=np.uint64)
    bits = _mix(state[:, None] + numbers * np.uint64(_GAMMA))  # (n_images, 6)
    # 24 bits: as many as float32 holds, so that no draw is rounded up to 1.
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's output function of its states; uint64 arithmetic wraps around."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
