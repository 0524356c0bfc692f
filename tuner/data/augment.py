"""Random variation of training images: drawn for each image by itself, and applied in one resampling."""

import math

import torch
from torch import Tensor
from torch.nn import functional

MAX_ROTATION_DEGREES = 40.0
MAX_SHIFT_FRACTION = 0.2
"""Of the side."""
MAX_SHEAR = 0.2
MAX_ZOOM = 0.2
N_DRAWS = 6
"""Random numbers that one image takes."""


def draw_fresh(n_images: int, generator: torch.Generator) -> Tensor:
    """Draw what ``augment`` needs for a new version of each image.

    Args:
        n_images: How many.
        generator: Where the draws come from; one on the CPU gives the same draws whatever the device of the images.

    Returns:
        Float32 in [0, 1), shape ``(n_images, 6)``, on the generator's device.
    """
    return torch.rand((n_images, N_DRAWS), generator=generator, device=generator.device)


def augment(images: Tensor, draws: Tensor, *, strength: float, horizontal_flip: bool) -> Tensor:
    """Rotate, shift, shear, zoom and flip each image as its draws say; edges are continued outwards.

    Ranges are ±40°, ±0.2 of the side, ±0.2 and ±0.2, each times ``strength`` and uniform; half of the images are
    mirrored if ``horizontal_flip`` and ``strength`` > 0.

    Args:
        images: Float, shape ``(n_images, n_channels, height, width)``.
        draws: In [0, 1), shape ``(n_images, 6)``, of ``draw_fresh`` or ``views.draw_view``.
        strength: In [0, 1]. 0 returns ``images`` itself.
        horizontal_flip: Whether images may be mirrored.

    Returns:
        New images of the same shape, type and device.
    """
    if strength == 0:
        return images
    # In double precision, so that an image's version does not depend on which images share its batch.
    angle, shift_x, shift_y, shear, zoom, mirror = draws.double().unbind(dim=1)  # each (n_images,)
    matrices = affine_matrices(
        degrees=_spread(angle, MAX_ROTATION_DEGREES * strength),
        shift_x=_spread(shift_x, MAX_SHIFT_FRACTION * strength),
        shift_y=_spread(shift_y, MAX_SHIFT_FRACTION * strength),
        shear=_spread(shear, MAX_SHEAR * strength),
        zoom=1 + _spread(zoom, MAX_ZOOM * strength),
        mirrored=(mirror < 0.5) & horizontal_flip,
    )
    return warp(images, matrices)


def _spread(draws: Tensor, limit: float) -> Tensor:
    """Map draws from [0, 1) to [-limit, limit)."""
    return (2 * draws - 1) * limit


def affine_matrices(
    *, degrees: Tensor, shift_x: Tensor, shift_y: Tensor, shear: Tensor, zoom: Tensor, mirrored: Tensor
) -> Tensor:
    """Return where each output pixel looks in its input image, in ``affine_grid``'s coordinates from -1 to 1.

    Args:
        degrees: Counter-clockwise rotation of the picture.
        shift_x: To the right, in widths.
        shift_y: Downwards, in heights.
        shear: Horizontal, in heights per height.
        zoom: Magnification, > 0.
        mirrored: Whether left and right are exchanged. All arguments have shape ``(n_images,)``.

    Returns:
        Shape ``(n_images, 2, 3)``: the picture is rotated, sheared and zoomed, then mirrored, then shifted.
    """
    angle = degrees * (math.pi / 180)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    sign = 1 - 2 * mirrored.to(angle.dtype)
    row_x = torch.stack([sign * cos, shear * cos - sin], dim=1)
    row_y = torch.stack([sign * sin, shear * sin + cos], dim=1)
    linear = torch.stack([row_x, row_y], dim=1)  # (n_images, 2, 2)
    shift = 2 * torch.stack([shift_x, shift_y], dim=1)[..., None]  # the picture is 2 units wide
    return torch.cat([linear, -linear @ shift], dim=2)


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Resample images bilinearly with one matrix each, on the images' device.

    Args:
        images: Float, shape ``(n_images, n_channels, height, width)``.
        matrices: Shape ``(n_images, 2, 3)``.
    """
    theta = matrices.to(device=images.device, dtype=images.dtype, non_blocking=True)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
