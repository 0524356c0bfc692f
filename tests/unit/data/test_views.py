"""Tests of tuner.data.views."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner.data.views import View, draw_view, find_view, view_of_epoch
from tuner.trial import TrialParams


def draw(rows: list[int], *, view_seed: int = 5, view: int = 1, strength: float = 0.5) -> Tensor:
    """Draw a view of some rows."""
    return draw_view(view_seed, torch.tensor(rows, dtype=torch.int64), view=view, strength=strength)


def make_params(**overrides: Any) -> TrialParams:
    """Return a recipe with two views."""
    values = {field.name: 0 for field in dataclasses.fields(TrialParams)}
    shown = {"head_start": None, "views": 2, "view_seed": 9, "augmentation_strength": 0.5, "horizontal_flip": True}
    return TrialParams.from_json(values | shown | overrides)


def test_draw_view_is_the_same_in_every_process() -> None:
    """Pinned: features that were kept on disk are found under what these numbers show."""
    expected = [0.39746881, 0.97189653, 0.08933431, 0.6553157, 0.89033985, 0.80211234]
    assert draw([3]).tolist() == [pytest.approx(expected, abs=1e-7)]


def test_draw_view_of_an_image_does_not_depend_on_the_others() -> None:
    """Another order, or fewer images, and each keeps its draws."""
    together = draw([4, 900, 7])
    assert torch.equal(draw([7, 4]), together[[2, 0]])
    assert torch.equal(draw([900]), together[1:2])


def test_draw_view_draws_for_each_image() -> None:
    """No two images and no two numbers of one image share a draw."""
    draws = draw(list(range(500)))
    assert draws.shape == (500, 6)
    assert len(set(draws.flatten().tolist())) > 2990


@pytest.mark.parametrize("change", [{"view_seed": 6}, {"view": 2}, {"strength": 0.25}])
def test_draw_view_depends_on_every_argument(change: dict[str, Any]) -> None:
    """Another seed, view or strength is another version of every image."""
    assert (draw(list(range(50)), **change) != draw(list(range(50)))).all()


def test_draw_view_is_uniform_in_0_to_1() -> None:
    """Each of the six numbers, for a study's largest seed too; 1 itself never comes."""
    draws = draw(list(range(100_000)), view_seed=2**63 - 1)
    assert draws.dtype == torch.float32
    assert 0 <= draws.min() < 0.001
    assert 0.999 < draws.max() < 1
    torch.testing.assert_close(draws.mean(dim=0), torch.full((6,), 0.5), atol=0.005, rtol=0)
    torch.testing.assert_close(draws.std(dim=0), torch.full((6,), 12**-0.5), atol=0.005, rtol=0)
    torch.testing.assert_close(draws.T.corrcoef(), torch.eye(6), atol=0.02, rtol=0)


def test_view_of_epoch_goes_round() -> None:
    """Epochs count from 1, views from 0."""
    assert [view_of_epoch(epoch, 3) for epoch in range(1, 7)] == [1, 2, 0, 1, 2, 0]


def test_find_view_names_what_an_epoch_shows() -> None:
    """All that decides the images besides their pixels."""
    assert find_view(make_params(), 3) == View(number=1, seed=9, strength=0.5, horizontal_flip=True)
    assert find_view(make_params(augmentation_strength=0.0), 3) is None
    assert find_view(make_params(augmentation_strength=0.0, views="fresh"), 3) is None


def test_find_view_refuses_fresh_images() -> None:
    """They are nothing that could be named."""
    with pytest.raises(ValueError, match=r"^params\.views: must be a number of views, got 'fresh'$"):
        find_view(make_params(views="fresh"), 1)
