"""Masks of the dropout in front of the head."""

import pytest
import torch

from tuner.training.batches import draw_order, start_order
from tuner.training.dropout import draw_kept, start_dropout

from .builders import CPU


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 0.9, 0.9999999])
def test_draw_kept_keeps_the_share_that_is_not_dropped(dropout: float) -> None:
    """In every column, and never nothing for ever."""
    kept = draw_kept((40_000, 7), dropout, start_dropout(3, CPU))
    assert kept.dtype == torch.bool
    torch.testing.assert_close(kept.float().mean(dim=0), torch.full((7,), 1 - dropout), atol=0.01, rtol=0)


def test_draw_kept_draws_each_input_by_itself() -> None:
    """Neighbours that share a 64-bit draw are not related, nor are two batches."""
    generator = start_dropout(3, CPU)
    first, second = (draw_kept((100_000, 4), 0.5, generator).float() for _ in range(2))
    columns = torch.cat([first, second], dim=1)
    torch.testing.assert_close(columns.T.corrcoef(), torch.eye(8), atol=0.02, rtol=0)


def test_draw_kept_takes_a_convolutions_input_as_a_linear_layers() -> None:
    """The same masks, whatever singleton dimensions come after."""
    flat, deep = (draw_kept(shape, 0.3, start_dropout(3, CPU)) for shape in ((5, 11), (5, 11, 1, 1)))
    assert torch.equal(flat, deep[..., 0, 0])


def test_start_dropout_is_a_stream_of_its_own() -> None:
    """One seed, one stream of masks; another than the one that the batch order comes from."""
    states = [start_dropout(seed, CPU).get_state() for seed in (7, 7, 8, 7 + 2**40)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[3])
    assert not torch.equal(draw_order(100, start_dropout(7, CPU)), draw_order(100, start_order(7)))
