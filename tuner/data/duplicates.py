"""Images that stand in two splits: the same bytes, or pixels so alike that one was made from the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE = 16
_MIN_CORRELATION = 0.98
"""Of two images' grey values at 8 by 8 px: a coarse sieve, whose matrix product takes most of the time."""
_MAX_DIFFERENCE = 0.1
"""Of two images' colours at 16 by 16 px, relative to the contrast of one. Photographs that were saved again, as JPEG of
quality 40 or at half the size, stay below in 98 % of cases; the nearest of 1,000 hand signs are at 0.32."""
_N_BLOCK = 2048
_N_NAMED = 5
_MIN_CUT_PX = 128
MAX_COMPARISONS = 10_000_000_000
"""Pairs of images that are compared at most: a minute on one core, 220,000 images with a fifth held out."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Images of one side of a comparison. Position ``i`` of every field describes image ``i``."""

    names: tuple[str, ...]
    digests: tuple[str, ...]
    """As ``content.list_digests`` returned them."""
    pixels: NDArray[np.uint8] | None = None
    """Shape ``(n_images, 3, size, size)``, decoded in the same way on both sides; None: nothing is near anything."""


Pairs = tuple[tuple[str, str], ...]
"""Names of images of one split, each with the name of its duplicate in another."""


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Images of a held-out split that are among others too."""

    exact: Pairs
    """The same bytes; the same array where there are no files."""
    near: Pairs
    """Other bytes, but pixels so alike that one was made from the other."""
    is_complete: bool = True
    """Whether pixels were compared: of too many images they are not."""

    def to_json(self) -> dict[str, Any]:
        """Return the pairs as a JSON object."""
        return {"exact": [list(pair) for pair in self.exact], "near": [list(pair) for pair in self.near]}


def find_duplicates(held_out: Compared, others: Compared) -> Duplicates:
    """Return which held-out images are among the others: linear in their number, but for one matrix product."""
    exact = pair_exact(held_out.digests, others.digests)
    rest = [position for position in range(len(held_out.names)) if position not in exact]
    near: dict[int, int] = {}
    is_complete = held_out.pixels is None or len(rest) * len(others.names) <= MAX_COMPARISONS
    if held_out.pixels is not None and others.pixels is not None and is_complete:
        found = pair_near(shrink(held_out.pixels)[rest], shrink(others.pixels))
        near = {rest[position]: twin for position, twin in found.items()}

    def name(pairs: dict[int, int]) -> Pairs:
        return tuple((held_out.names[position], others.names[twin]) for position, twin in pairs.items())

    return Duplicates(exact=name(exact), near=name(near), is_complete=is_complete)


def describe_exact(duplicates: Duplicates, *, held_out: str, others: str) -> tuple[str, ...]:
    """Return a line for the user, or none without exact duplicates.

    Args:
        duplicates: Of two sides.
        held_out: What the first of each pair is in.
        others: What the second is in.
    """
    if not duplicates.exact:
        return ()
    return (f"exact duplicates: {_describe(duplicates.exact, held_out, others)}",)


def describe_near(duplicates: Duplicates, *, held_out: str, others: str) -> tuple[str, ...]:
    """Return a line for the user, or none without near duplicates; the arguments are those of ``describe_exact``."""
    if not duplicates.is_complete:
        return (f"near duplicates were not looked for: {held_out} times {others} are over {MAX_COMPARISONS:,} pairs",)
    if not duplicates.near:
        return ()
    return (f"near duplicates (the same picture saved again): {_describe(duplicates.near, held_out, others)}",)


def _describe(pairs: Pairs, held_out: str, others: str) -> str:
    shown = ", ".join(f"{name!r} is {twin!r}" for name, twin in pairs[:_N_NAMED])
    more = f" and {len(pairs) - _N_NAMED} more" if len(pairs) > _N_NAMED else ""
    n_images = f"{len(pairs)} image{'s' if len(pairs) > 1 else ''}"
    return f"{n_images} of {held_out} in {others} too, which makes {held_out} too easy: {shown}{more}"


def pair_exact(digests: Sequence[str], others: Sequence[str]) -> dict[int, int]:
    """Return the position of the first equal digest among the others, by position; an empty digest equals none."""
    first: dict[str, int] = {}
    for position, digest in enumerate(others):
        first.setdefault(digest, position)
    return {position: first[digest] for position, digest in enumerate(digests) if digest and digest in first}


def shrink(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return images averaged down to what ``pair_near`` compares.

    Args:
        pixels: Shape ``(n_images, 3, size, size)``.

    Returns:
        Shape ``(n_images, 3, 16, 16)``.
    """
    n_images, n_channels, size, _ = pixels.shape
    small = np.empty((n_images, n_channels * _SIDE, _SIDE), dtype=np.uint8)
    factor, rest = divmod(size, _SIDE)
    if size >= _MIN_CUT_PX and rest:  # without a narrow rim averaging is four times as fast
        size, rest = size - rest, 0
    for image, target in zip(pixels[:, :, :size, :size], small, strict=True):
        # The channels below each other, as one grey image: Pillow is called once, and no box holds two channels.
        strip = Image.fromarray(np.ascontiguousarray(image.reshape(-1, size)))
        target[:] = strip.resize((_SIDE, n_channels * _SIDE), Image.Resampling.BOX) if rest else strip.reduce(factor)
    return small.reshape(n_images, n_channels, _SIDE, _SIDE)


def pair_near(small: NDArray[np.uint8], others: NDArray[np.uint8]) -> dict[int, int]:
    """Return the position of the most alike image among the others, by position, where one was made from the other.

    Mirrored, turned and cropped copies are not found, nor are images without contrast.

    Args:
        small: What ``shrink`` returned, shape ``(n_images, 3, 16, 16)``.
        others: The same of other images.
    """
    least = np.full(len(small), np.inf)
    twins = np.zeros(len(small), dtype=np.int64)
    sketches = _sketch(small)
    for start in range(0, len(others), _N_BLOCK):
        block = others[start : start + _N_BLOCK]
        target = _sketch(block).T
        for top in range(0, len(small), _N_BLOCK):
            alike = sketches[top : top + _N_BLOCK] @ target  # (n_block, n_block)
            best = alike.argmax(axis=1)  # only the best of a block is looked at again: a thousand copies stay cheap
            rows = np.flatnonzero(alike[np.arange(len(alike)), best] >= _MIN_CORRELATION)
            difference = _differ(small[top + rows], block[best[rows]])
            closer = difference < np.minimum(least[top + rows], _MAX_DIFFERENCE)
            least[top + rows[closer]] = difference[closer]
            twins[top + rows[closer]] = start + best[rows[closer]]
    return {int(row): int(twins[row]) for row in np.flatnonzero(np.isfinite(least))}


def _sketch(small: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return grey values at 8 by 8 px around their mean, of length 1; zeros without contrast; ``(n_images, 64)``."""
    half = _SIDE // 2
    grey = small.reshape(-1, 3, half, 2, half, 2).mean(axis=(1, 3, 5), dtype=np.float32).reshape(-1, half * half)
    grey -= grey.mean(axis=1, keepdims=True)
    length = np.linalg.norm(grey, axis=1, keepdims=True)
    return np.where(length > 1, grey / np.maximum(length, 1), 0).astype(np.float32)


def _differ(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the root mean square of the differences of small images, relative to the contrast of the first."""
    values = first.astype(np.float32)
    contrast = values - values.mean(axis=(2, 3), keepdims=True)
    distance = np.square(values - second).mean(axis=(1, 2, 3))
    relative: NDArray[np.float32] = np.sqrt(distance / np.maximum(np.square(contrast).mean(axis=(1, 2, 3)), 1e-6))
    return relative
