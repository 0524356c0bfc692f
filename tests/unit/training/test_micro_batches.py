"""A batch in parts: the same step as the whole batch, whatever weighs its images."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.data.image_set import ImageSet
from tuner.training.loop import TrainingJob, train_epochs

from .builders import SIZE, make_images, make_job

RTOL = 1e-8


class PlainNet(nn.Module):
    """A convolution and a classifier, without anything that looks at a whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.Flatten())
        self.fc = nn.Linear(4 * SIZE * SIZE, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.fc(self.stem(images))
        return logits


def make_uneven() -> ImageSet:
    """Return 43 images, of which 7 are of class 1: no two batches weigh the same, and the last one is smaller."""
    images = make_images(80)
    rows = torch.cat([(images.labels == 0).nonzero()[:36, 0], (images.labels == 1).nonzero()[:7, 0]])
    return ImageSet(pixels=images.pixels[rows], labels=images.labels[rows], n_classes=2, rows=torch.arange(43))


def train(micro_batch: int | None, **params: Any) -> tuple[list[float], list[Tensor]]:
    """Train in double precision; return the losses of the epochs and the weights."""
    torch.manual_seed(3)
    values = {"batch_size": 16, "unfrozen_layers": 2, "epochs": 3, **params}
    job = replace(make_job(PlainNet().double(), **values), train=make_uneven(), micro_batch=micro_batch)
    losses = [value for result, _ in train_epochs(job) for value in (result.train_loss, result.val_loss)]
    return losses, [parameter.detach() for parameter in job.model.parameters()]


def assert_same(ours: tuple[list[float], list[Tensor]], theirs: tuple[list[float], list[Tensor]]) -> None:
    """Assert that two trainings agree to a relative 1e-8."""
    assert ours[0] == pytest.approx(theirs[0], rel=RTOL)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=RTOL, atol=1e-12)


RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"class_weights": "balanced"},
    "weights and smoothing": {"class_weights": "balanced", "label_smoothing": 0.2},
    "augmentation": {"augmentation_strength": 0.7, "horizontal_flip": True, "label_smoothing": 0.1},
    "views": {"augmentation_strength": 0.7, "views": 2, "view_seed": 4, "class_weights": "balanced"},
    "dropout": {"dropout": 0.4, "class_weights": "balanced"},
    "frozen": {"unfrozen_layers": 1, "weight_decay": 0.1},
}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_micro_batches_are_the_step_of_the_whole_batch(recipe: str, optimizer: str) -> None:
    """Losses and weights after three epochs, in parts that divide the batch unevenly."""
    params = {**RECIPES[recipe], "optimizer": optimizer}
    assert_same(train(5, **params), train(None, **params))


@pytest.mark.parametrize("micro_batch", [1, 4, 15, 16, 40])
def test_micro_batches_of_every_size_are_the_same_step(micro_batch: int) -> None:
    """From one image at a time to more than there are."""
    params = RECIPES["weights and smoothing"]
    assert_same(train(micro_batch, **params), train(None, **params))


def test_mean_of_the_parts_means_is_another_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake that these tests are for: every part counted by its images, as if all weighed the same."""
    params = RECIPES["weights and smoothing"]
    whole = train(None, **params)
    real_sum = Tensor.sum

    def count_images(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_weights = tensor.dtype == torch.float64 and tensor.ndim == 1 and not args and not kwargs
        return (
            torch.tensor(float(len(tensor)), dtype=torch.float64) if is_weights else real_sum(tensor, *args, **kwargs)
        )

    monkeypatch.setattr(Tensor, "sum", count_images)
    with pytest.raises(AssertionError):
        assert_same(train(5, **params), whole)


def test_micro_batches_of_a_batchnorm_that_trains_are_another_step() -> None:
    """Why such a model must not be split; frozen, it may be."""

    def run(micro_batch: int | None, unfrozen_layers: int) -> float:
        job: TrainingJob = replace(make_job(unfrozen_layers=unfrozen_layers, epochs=1), micro_batch=micro_batch)
        return next(result.train_loss for result, _ in train_epochs(job))

    assert not math.isclose(run(4, 3), run(None, 3), rel_tol=1e-3)
    assert math.isclose(run(4, 1), run(None, 1), rel_tol=1e-5)
