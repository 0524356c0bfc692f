"""Train one trial, epoch by epoch."""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tuner.data.augment import augment
from tuner.data.image_set import ImageSet
from tuner.models.backbone import Preprocessing, find_classifiers
from tuner.models.layers import freeze_layers, group_layers
from tuner.training.batches import build_normaliser, count_batches, predict_logits, shuffle_batches, take_batch
from tuner.training.device import autocast, memory_format, seed_everything
from tuner.training.metrics import Scores, score_logits
from tuner.training.optimizer import build_optimizer
from tuner.training.schedule import build_schedule
from tuner.trial import ClassReport, EpochResult, TrialParams


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One model to train, and what it is trained with."""

    model: nn.Module
    """Its head fits the images' classes. It is moved to the device and trained in place."""
    params: TrialParams
    train: ImageSet
    val: ImageSet | None
    """None only for ``train_only``."""
    preprocessing: Preprocessing
    device: torch.device


class Diverged(Exception):  # noqa: N818 - the name of what happened to the trial, no mistake of the user or of ours
    """A loss became NaN or infinite; the text is one line for a person."""


def train_epochs(job: TrainingJob) -> Generator[tuple[EpochResult, ClassReport], None, None]:
    """Train a model and validate it after every epoch.

    The same job gives the same bits again on a CPU, whatever torch drew before. Closing the generator ends the training
    and leaves the weights of the last step.

    Yields:
        What an epoch showed, and its validation class by class; ``job.params.epochs`` times.

    Raises:
        ValueError: If the job has no validation images.
        Diverged: If a training or validation loss is not finite.
    """
    if job.val is None:
        raise ValueError("job.val: must hold images, got None; train_only trains without")
    return _train_and_validate(job, job.val)


def train_only(job: TrainingJob, on_epoch: Callable[[int, float], None] | None = None) -> None:
    """Train a model for all its epochs without looking at any other images: the retraining on train and val.

    Args:
        job: Its ``val`` is not used.
        on_epoch: Told each epoch, from 1, and its mean training loss.

    Raises:
        Diverged: If a training loss is not finite.
    """
    with _dropping_inputs(job.model, job.params.dropout):
        training = _Training(job)
        for epoch in range(1, job.params.epochs + 1):
            loss = training.run_epoch(epoch)
            if on_epoch is not None:
                on_epoch(epoch, loss)
    job.model.eval()


def _train_and_validate(job: TrainingJob, val: ImageSet) -> Generator[tuple[EpochResult, ClassReport], None, None]:
    with _dropping_inputs(job.model, job.params.dropout):
        training = _Training(job)
        for epoch in range(1, job.params.epochs + 1):
            started = perf_counter()
            train_loss = training.run_epoch(epoch)
            train_seconds = perf_counter() - started
            scores = _validate(job, val, epoch)
            seconds = perf_counter() - started
            yield _summarise(epoch, train_loss, scores, seconds, training.n_images / train_seconds), scores.report


class _Training:
    """The model while it trains, with what moves its weights. Mutable."""

    def __init__(self, job: TrainingJob) -> None:
        params = job.params
        seed_everything(params.seed)
        self._job = job
        self._generator = torch.Generator().manual_seed(params.seed)
        self._model = job.model.to(job.device).to(memory_format=memory_format(job.device))
        freeze_layers(self._model, params.unfrozen_layers)
        n_batches = count_batches(len(job.train.labels), params.batch_size)
        self._optimizer = build_optimizer(self._model, group_layers(self._model), params)
        self._schedule = build_schedule(
            self._optimizer, n_steps=params.epochs * n_batches, warmup_fraction=params.warmup_fraction
        )
        self._normalise = build_normaliser(job.preprocessing, job.device)
        self._class_weights = _weigh_classes(job.train).to(job.device) if params.class_weights == "balanced" else None
        self.n_images = min(n_batches * params.batch_size, len(job.train.labels))
        """Training images of one epoch."""

    def run_epoch(self, epoch: int) -> float:
        """Train on every image once; return the mean training loss over the images."""
        self._model.train()
        batches = shuffle_batches(self._job.train, self._job.params.batch_size, self._generator)
        losses = torch.full((len(batches),), math.nan, device=self._job.device)
        for step, rows in enumerate(batches):
            losses[step] = self._take_step(rows)
            # On CUDA, looking at every step's loss would make the host wait; there the epoch's end is soon enough.
            if self._job.device.type == "cpu" and not losses[step].isfinite():
                break
        per_step = losses.tolist()
        for step, loss in enumerate(per_step, start=1):
            if not math.isfinite(loss):
                raise Diverged(f"training loss is {loss} in epoch {epoch}, step {step} of {len(batches)}")
        return math.fsum(loss * len(rows) for loss, rows in zip(per_step, batches, strict=True)) / self.n_images

    def _take_step(self, rows: Tensor) -> Tensor:
        """Move the weights once; return the batch's mean loss, on the device."""
        params, device = self._job.params, self._job.device
        pixels, labels = take_batch(self._job.train, rows, device)
        pixels = augment(
            pixels,
            strength=params.augmentation_strength,
            horizontal_flip=params.horizontal_flip,
            generator=self._generator,
        )
        with autocast(device):
            logits = self._model(self._normalise(pixels))
        loss = functional.cross_entropy(
            logits.float(), labels, weight=self._class_weights, label_smoothing=params.label_smoothing
        )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        return loss.detach()


def _weigh_classes(images: ImageSet) -> Tensor:
    """Return the weights with which all classes count the same: n / (n_classes * count), scikit-learn's "balanced"."""
    counts = torch.bincount(images.labels, minlength=images.n_classes)
    return (images.n_classes * counts.clamp(min=1) / len(images.labels)).reciprocal()


def _validate(job: TrainingJob, val: ImageSet, epoch: int) -> Scores:
    logits = predict_logits(job.model, val, job.preprocessing, job.device, batch_size=job.params.batch_size)
    scores = score_logits(logits, val.labels.to(job.device))
    if not math.isfinite(scores.loss):
        raise Diverged(f"validation loss is {scores.loss} in epoch {epoch}")
    return scores


def _summarise(epoch: int, train_loss: float, scores: Scores, seconds: float, images_per_second: float) -> EpochResult:
    return EpochResult(
        epoch=epoch,
        train_loss=train_loss,
        val_loss=scores.loss,
        val_accuracy=scores.accuracy,
        val_balanced_accuracy=scores.balanced_accuracy,
        val_macro_precision=scores.macro_precision,
        val_macro_recall=scores.macro_recall,
        val_macro_f1=scores.macro_f1,
        seconds=seconds,
        images_per_second=images_per_second,
    )


@contextmanager
def _dropping_inputs(model: nn.Module, dropout: float) -> Iterator[None]:
    """Drop a share of the classifier's inputs while it trains, besides what the backbone itself drops."""

    def drop(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (functional.dropout(inputs[0], dropout, training=module.training), *inputs[1:])

    names = find_classifiers(model) if dropout > 0 else ()
    handles = [model.get_submodule(name).register_forward_pre_hook(drop) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
