"""Which images a batch holds, and what a backbone is given."""

import pytest
import torch

from tuner.training.batches import build_normaliser, count_batches, predict_logits, shuffle_batches, take_batch

from .builders import CPU, PREPROCESSING, make_images, make_net


@pytest.mark.parametrize(
    ("n_images", "batch_size", "expected"),
    [(64, 16, 4), (66, 16, 5), (65, 16, 4), (1, 16, 1), (5, 1, 5), (10, 16, 1), (16, 16, 1)],
)
def test_count_batches_leaves_out_a_last_batch_of_one(n_images: int, batch_size: int, expected: int) -> None:
    """Partial batches count; a single image counts only where there is nothing else."""
    assert count_batches(n_images, batch_size) == expected


def test_shuffle_batches_takes_every_image_once_in_a_drawn_order() -> None:
    """The order comes from the generator alone and changes from epoch to epoch."""
    images, generator = make_images(20), torch.Generator().manual_seed(3)
    first, second = (torch.cat([rows.here for rows in shuffle_batches(images, 8, generator)]) for _ in range(2))
    again = torch.cat([rows.host for rows in shuffle_batches(images, 8, torch.Generator().manual_seed(3))])
    assert first.tolist() != second.tolist()
    assert first.tolist() == again.tolist()
    assert sorted(second.tolist()) == list(range(20))


def test_shuffle_batches_leaves_out_one_image_at_most() -> None:
    """17 images in batches of 8 are two batches."""
    batches = shuffle_batches(make_images(17), 8, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == [8, 8]


def test_take_batch_scales_pixels_to_one_and_leaves_the_images_alone() -> None:
    """A batch is a float copy in [0, 1]."""
    images = make_images(4)
    before = images.pixels.clone()
    pixels, labels = take_batch(images, torch.tensor([3, 0]), CPU)
    torch.testing.assert_close(pixels, before[[3, 0]].float() / 255)
    assert labels.tolist() == [1, 0]
    assert torch.equal(images.pixels, before)


def test_build_normaliser_subtracts_the_mean_and_divides_by_the_std() -> None:
    """0, 0.5 and 1 become -1, 0 and 1 with a mean and std of one half."""
    pixels = torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1)
    assert build_normaliser(PREPROCESSING, CPU)(pixels).flatten().tolist() == [-1.0, 0.0, 1.0]


def test_predict_logits_keeps_the_order_over_batches_and_trains_nothing() -> None:
    """More images than one batch, in their order, in eval mode, without gradients."""
    net, images = make_net(), make_images(150)
    net.train()
    logits = predict_logits(net, images, PREPROCESSING, CPU, precision="auto")
    expected = net((images.pixels.float() / 255 - 0.5) / 0.5)
    torch.testing.assert_close(logits, expected)
    assert not net.training
    assert not logits.requires_grad
    assert net.state_dict()["stem.1.num_batches_tracked"] == 0
