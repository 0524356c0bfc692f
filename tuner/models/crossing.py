"""What a prefix hands to its suffix, as one row of numbers per image: how it is packed, kept and unpacked."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """A tensor that the prefix hands to the suffix, as it is for one image."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    has_channels_last: bool
    """Whether it lies in memory with the channels last; its shape has them first."""

    @property
    def width(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def pack_maps(tensors: tuple[Tensor, ...], crossings: tuple[Crossing, ...]) -> Tensor:
    """Return crossing tensors as one row per image, shape ``(n, width)``, in the order in which they lie in memory."""
    rows = [
        (tensor.movedim(1, -1) if crossing.has_channels_last else tensor).flatten(1)
        for tensor, crossing in zip(tensors, crossings, strict=True)
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def unpack_maps(maps: Tensor, crossings: tuple[Crossing, ...]) -> tuple[Tensor, ...]:
    """Return what ``pack_maps`` packed, in the types that it had unless it is kept in float64."""
    tensors = []
    for rows, crossing in zip(
        torch.split(maps, [crossing.width for crossing in crossings], dim=1), crossings, strict=True
    ):
        if crossing.has_channels_last:
            channels, *place = crossing.shape
            tensor = rows.reshape(len(rows), *place, channels).movedim(-1, 1)
        else:
            tensor = rows.reshape(len(rows), *crossing.shape)
        tensors.append(tensor if maps.dtype == torch.float64 else tensor.to(crossing.dtype))
    return tuple(tensors)
