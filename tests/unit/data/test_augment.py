"""Tests of tuner.data.augment."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tuner.data.augment import affine_matrices, augment, draw_fresh, warp


def make_images(n_images: int = 1, size: int = 8) -> Tensor:
    """Return noise in [0, 1]."""
    return torch.rand((n_images, 3, size, size), generator=torch.Generator().manual_seed(1))


def make_matrix(**values: float) -> Tensor:
    """Return one matrix that changes only what is named."""
    neutral = {"degrees": 0.0, "shift_x": 0.0, "shift_y": 0.0, "shear": 0.0, "zoom": 1.0, "mirrored": 0.0}
    arguments = {name: torch.tensor([value]) for name, value in (neutral | values).items()}
    return affine_matrices(**{**arguments, "mirrored": arguments["mirrored"].bool()})


def run(images: Tensor, *, strength: float = 1.0, horizontal_flip: bool = True, seed: int = 0) -> Tensor:
    """Augment with a fresh generator."""
    generator = torch.Generator().manual_seed(seed)
    draws = draw_fresh(len(images), generator)
    return augment(images, draws, strength=strength, horizontal_flip=horizontal_flip)


def test_augment_with_strength_0_is_exactly_none() -> None:
    """The very same tensor comes back."""
    images = make_images()
    draws = draw_fresh(1, torch.Generator().manual_seed(0))
    assert augment(images, draws, strength=0.0, horizontal_flip=True) is images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_augment_shows_an_image_alone_as_in_a_batch(dtype: torch.dtype) -> None:
    """An image's version is its own, and keeps the type of its pixels."""
    images, draws = make_images(7).to(dtype), draw_fresh(7, torch.Generator().manual_seed(2))
    together = augment(images, draws, strength=0.7, horizontal_flip=True)
    alone = [
        augment(images[i : i + 1], draws[i : i + 1], strength=0.7, horizontal_flip=True) for i in range(len(images))
    ]
    torch.testing.assert_close(torch.cat(alone), together)
    assert together.dtype == dtype


def test_augment_draws_for_each_image() -> None:
    """Equal images in a batch come out different."""
    images = make_images().expand(6, -1, -1, -1)
    results = run(images)
    assert all(not torch.allclose(results[i], results[j]) for i in range(6) for j in range(i))


def test_augment_follows_the_generator() -> None:
    """One seed gives one result; another gives another."""
    images = make_images(4)
    assert torch.equal(run(images, seed=5), run(images, seed=5))
    assert not torch.allclose(run(images, seed=5), run(images, seed=6))


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_augment_stays_within_the_values_of_its_input(strength: float) -> None:
    """Edges are continued, so that no value comes from outside; the input is not changed."""
    images = make_images(32) + 3
    before = images.clone()
    results = run(images, strength=strength)
    assert results.shape == images.shape
    assert results.dtype == images.dtype
    assert results.min() >= images.min() - 1e-5
    assert results.max() <= images.max() + 1e-5
    assert torch.equal(images, before)


def test_augment_flips_half_of_the_images_where_allowed() -> None:
    """At a strength near 0 only the flip is left to see."""
    images = make_images().expand(200, -1, -1, -1)
    results = run(images, strength=1e-6)
    n_flipped = sum(torch.allclose(result, images[0].flip(-1), atol=1e-3) for result in results)
    n_same = sum(torch.allclose(result, images[0], atol=1e-3) for result in results)
    assert n_flipped + n_same == 200
    assert 70 < n_flipped < 130
    assert torch.allclose(run(images, strength=1e-6, horizontal_flip=False), images, atol=1e-3)


def test_augment_reaches_its_ranges_and_no_further() -> None:
    """Over many draws at full strength the bright spot's shift comes near 0.2 of the side."""
    images = torch.zeros((400, 1, 41, 41))
    images[:, :, 20, 20] = 1.0  # the centre: rotation, shear, zoom and flip leave it alone
    results = run(images)[:, 0]
    columns = torch.arange(41.0) - 20
    shifts = (results.sum(dim=1) * columns).sum(dim=1) / results.sum(dim=(1, 2))
    assert 0.18 < shifts.max() / 41 < 0.205
    assert -0.205 < shifts.min() / 41 < -0.18
    assert abs(shifts.mean()) < 1


def test_warp_rotates_counter_clockwise() -> None:
    """A quarter turn is exact."""
    images = make_images()
    assert torch.allclose(warp(images, make_matrix(degrees=90)), images.rot90(1, dims=(-2, -1)), atol=1e-5)


def test_warp_mirrors_left_and_right() -> None:
    """A flip is exact."""
    images = make_images()
    assert torch.allclose(warp(images, make_matrix(mirrored=1)), images.flip(-1), atol=1e-5)


def test_warp_shifts_and_continues_the_edge() -> None:
    """A quarter of 8 px is 2 px to the right, and the left column fills what is left free."""
    images = make_images()
    expected = torch.cat([images[..., :1].expand(-1, -1, -1, 2), images[..., :-2]], dim=-1)
    assert torch.allclose(warp(images, make_matrix(shift_x=0.25)), expected, atol=1e-5)
    down = warp(images, make_matrix(shift_y=0.25))
    assert torch.allclose(down[..., 2:, :], images[..., :-2, :], atol=1e-5)


def test_warp_zooms_in() -> None:
    """At zoom 2 the middle half fills the picture."""
    images = make_images(size=4)
    zoomed = warp(images, make_matrix(zoom=2))
    expected = functional.interpolate(images, scale_factor=2, mode="bilinear")[..., 2:-2, 2:-2]
    assert torch.allclose(zoomed, expected, atol=1e-5)


def test_warp_shears_rows() -> None:
    """Rows slide sideways, and the middle of the picture stays."""
    images = torch.zeros((1, 1, 9, 9))
    images[..., 4] = 1.0
    sheared = warp(images, make_matrix(shear=1.0))[0, 0]
    columns = sheared.argmax(dim=1).tolist()
    assert columns == list(range(8, -1, -1))
