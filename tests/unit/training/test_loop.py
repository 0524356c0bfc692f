"""Training one trial, on nets and images small enough for a second."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.data.image_set import ImageSet
from tuner.training.epoch_numbers import Diverged
from tuner.training.loop import TrainingJob, train_epochs, train_only

from .builders import TinyNet, copy_state, make_images, make_job, make_net


def train_to_end(job: TrainingJob) -> list[float]:
    """Train and return the validation accuracy of every epoch."""
    return [result.val_accuracy for result, _ in train_epochs(job)]


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Assert that two states agree in every bit."""
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def show_inputs(layer: nn.Module) -> list[tuple[bool, float]]:
    """Collect, for each forward pass of a layer, whether it trains and which share of its inputs is 0."""
    seen: list[tuple[bool, float]] = []

    def look(module: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        seen.append((module.training, float((inputs[0] == 0).float().mean())))

    layer.register_forward_hook(look)
    return seen


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_train_epochs_learns_the_toy_problem(optimizer: str) -> None:
    """From guessing to nearly always right."""
    accuracies = train_to_end(make_job(optimizer=optimizer, epochs=8, lr=0.02))
    assert len(accuracies) == 8
    assert accuracies[-1] >= 0.9


def test_train_epochs_reports_each_epoch() -> None:
    """Numbered from 1, with losses that fall and scores of all validation images."""
    pairs = list(train_epochs(make_job(epochs=6)))
    assert [result.epoch for result, _ in pairs] == [1, 2, 3, 4, 5, 6]
    assert pairs[-1][0].train_loss < pairs[0][0].train_loss
    assert pairs[-1][0].val_loss < pairs[0][0].val_loss
    assert all(result.seconds > 0 and result.images_per_second > 0 for result, _ in pairs)
    assert sum(itertools.chain(*pairs[-1][1].report.confusion_matrix)) == 32


def test_train_epochs_repeats_every_bit() -> None:
    """The same job gives the same weights and losses, whatever torch drew in between."""
    options: dict[str, Any] = {"augmentation_strength": 0.5, "dropout": 0.3, "label_smoothing": 0.1, "epochs": 2}
    first, second = make_job(**options), make_job(**options)
    losses = [result.val_loss for result, _ in train_epochs(first)]
    torch.rand(100)
    assert [result.val_loss for result, _ in train_epochs(second)] == losses
    assert_same_state(copy_state(first.model), copy_state(second.model))


def test_train_epochs_depends_on_the_seed() -> None:
    """Another seed is another order of the images."""
    first, second = make_job(seed=1, epochs=1), make_job(seed=2, epochs=1)
    train_to_end(first)
    train_to_end(second)
    assert not torch.equal(first.model.fc.weight, second.model.fc.weight)  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize(
    ("unfrozen_layers", "moved"), [(1, ("fc",)), (2, ("fc", "middle")), (3, ("fc", "middle", "stem"))]
)
def test_train_epochs_leaves_frozen_parts_alone(unfrozen_layers: int, moved: tuple[str, ...]) -> None:
    """Parameters and BatchNorm statistics of frozen layers keep every bit, the others move."""
    job = make_job(unfrozen_layers=unfrozen_layers, weight_decay=0.1)
    before = copy_state(job.model)
    train_to_end(job)
    after = copy_state(job.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(moved)}


def test_train_epochs_tells_a_diverged_training_loss() -> None:
    """An absurd learning rate ends the trial in one line."""
    with pytest.raises(Diverged, match=r"^training loss is (nan|inf) in epoch \d+, step \d+ of 4$"):
        train_to_end(make_job(optimizer="sgd", lr=1e30, warmup_fraction=0.0))


def test_train_epochs_tells_a_diverged_validation_loss() -> None:
    """A finite training loss is not enough."""
    net = make_net()
    net.register_forward_hook(lambda module, _, logits: logits if module.training else logits * math.nan)
    with pytest.raises(Diverged, match=r"^validation loss is nan in epoch 1$"):
        train_to_end(make_job(net))


def test_train_epochs_needs_validation_images() -> None:
    """The mistake is told at the call, not at the first epoch."""
    with pytest.raises(ValueError, match=r"^job\.val: must hold images, got None; train_only trains without$"):
        train_epochs(replace(make_job(), val=None))


def test_train_epochs_drops_the_heads_inputs_only_while_training() -> None:
    """Half of them in training, none in validation, and none any more after the trial."""
    net = make_net()
    net.middle.append(nn.Softplus())  # no input is 0 of itself
    seen = show_inputs(net.fc)
    train_to_end(make_job(net, dropout=0.5, epochs=1))
    assert [share for training, share in seen if training] == pytest.approx([0.5] * 4, abs=0.1)
    assert {share for training, share in seen if not training} == {0.0}
    net.train()(torch.rand(4, 3, 8, 8))
    assert seen[-1] == (True, 0.0)


def test_train_epochs_removes_the_dropout_of_a_trial_that_is_stopped() -> None:
    """Closing the generator, as pruning does, leaves a clean model."""
    job = make_job(dropout=0.5)
    epochs = train_epochs(job)
    next(epochs)
    assert job.model.fc._forward_pre_hooks  # type: ignore[union-attr]
    epochs.close()
    assert not job.model.fc._forward_pre_hooks  # type: ignore[union-attr]


def test_train_epochs_balances_the_classes_of_the_loss() -> None:
    """Of 60 images 6 are of class 1: with balanced weights an untrained bias towards class 0 costs more."""
    images = make_images(60)
    rows = torch.cat([(images.labels == 0).nonzero()[:, 0], (images.labels == 1).nonzero()[:6, 0]])
    few = ImageSet(pixels=images.pixels[rows], labels=images.labels[rows], n_classes=2, rows=rows)
    losses = []
    for class_weights in ("none", "balanced"):
        net = make_net()
        nn.init.zeros_(net.fc.weight)
        net.fc.bias.data = torch.tensor([2.0, 0.0])
        job = replace(make_job(net, class_weights=class_weights, batch_size=36, epochs=1, lr=1e-9), train=few)
        losses.append(next(train_epochs(job))[0].train_loss)
    right, wrong = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    assert losses == pytest.approx([(30 * right + 6 * wrong) / 36, (right + wrong) / 2], rel=1e-4)


@pytest.mark.parametrize("n_images", [17, 18, 1])
def test_train_epochs_takes_any_number_of_images(n_images: int) -> None:
    """A last batch of one is left out of an epoch, so that BatchNorm can train."""
    assert len(train_to_end(replace(make_job(epochs=2), train=make_images(n_images)))) == 2


def test_train_epochs_smooths_labels_in_training_only() -> None:
    """The validation loss is comparable between trials with other smoothing."""
    results = [next(train_epochs(make_job(label_smoothing=smoothing, lr=1e-9)))[0] for smoothing in (0.0, 0.9)]
    assert results[0].train_loss != pytest.approx(results[1].train_loss, rel=1e-3)
    assert results[0].val_loss == pytest.approx(results[1].val_loss, rel=1e-3)


def test_train_only_takes_the_same_steps_as_train_epochs() -> None:
    """Looking at validation images changes nothing but the numbers."""
    looked, blind = make_job(dropout=0.2), make_job(dropout=0.2)
    losses = [result.train_loss for result, _ in train_epochs(looked)]
    told: list[tuple[int, float]] = []
    train_only(replace(blind, val=None), lambda epoch, loss: told.append((epoch, loss)))
    assert told == list(enumerate(losses, start=1))
    assert_same_state(copy_state(looked.model), copy_state(blind.model))
    assert not blind.model.training


def show_epochs(epochs: int, **overrides: Any) -> list[Tensor]:
    """Return what a net is shown in each epoch, in the order of the index."""
    net = make_net()
    seen: list[Tensor] = []
    net.stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]) if module.training else None)
    job = make_job(net, epochs=epochs, batch_size=64, unfrozen_layers=3, **overrides)
    order = torch.Generator().manual_seed(job.params.seed)
    train_to_end(job)
    positions = [torch.randperm(64, generator=order).argsort() for _ in seen]
    return [images[position] for images, position in zip(seen, positions, strict=True)]


def test_train_epochs_shows_fixed_views_in_turn() -> None:
    """With two views, every second epoch shows each image alike, whatever the order of the batches."""
    first, second, third = show_epochs(3, augmentation_strength=0.5, views=2)
    torch.testing.assert_close(first, third)
    assert not torch.allclose(first, second, atol=0.1)


def test_train_epochs_shows_the_same_views_to_every_trial() -> None:
    """They follow the study's seed, not the trial's."""
    options: dict[str, Any] = {"augmentation_strength": 0.5, "views": 1}
    shown = [show_epochs(1, seed=seed, **options)[0] for seed in (1, 2)]
    torch.testing.assert_close(shown[0], shown[1])
    other = show_epochs(1, seed=1, view_seed=3, **options)[0]
    assert not torch.allclose(shown[0], other, atol=0.1)


class DrawingNet(TinyNet):
    """Draws from torch's global generator in every forward pass, as a backbone's own dropout does."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        torch.rand(1)
        return super().forward(images)


def test_train_epochs_drops_by_a_generator_of_its_own() -> None:
    """Whatever a backbone draws, a seed drops the same inputs."""
    losses = []
    for net in (make_net(), DrawingNet()):
        net.load_state_dict(make_net().state_dict())
        losses.append([result.train_loss for result, _ in train_epochs(make_job(net, dropout=0.5, epochs=2))])
    assert losses[0] == losses[1]


def test_train_epochs_trains_a_double_model_in_double_precision() -> None:
    """Nothing is rounded on the way: its losses are no float32."""
    result, _ = next(train_epochs(make_job(make_net().double(), class_weights="balanced")))
    for loss in (result.train_loss, result.val_loss):
        assert torch.tensor(loss, dtype=torch.float32).item() != loss


class CachingNet(nn.Module):
    """Keeps for its training what it computed in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.fc = nn.Linear(3 * 8 * 8, 2)
        self.kept: Tensor | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, with a factor that was computed in the last eval pass."""
        if self.kept is None or not self.training:
            self.kept = images.abs().mean().detach()
        logits: Tensor = self.fc((images + self.bias).flatten(1)) * self.kept
        return logits


def test_train_epochs_trains_on_what_a_model_kept_from_validation() -> None:
    """A tensor that was made while validating may take part in a later backward pass."""
    net = CachingNet()
    assert len(train_to_end(make_job(net, unfrozen_layers=1, epochs=2))) == 2
