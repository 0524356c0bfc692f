"""Train many heads on the same features as one batched computation, each as if it were alone."""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from tuner.training.batches import count_batches, draw_order, start_order
from tuner.training.device import send_ahead
from tuner.training.dropout import draw_kept, start_dropout
from tuner.training.epoch_numbers import (
    Diverged,
    average_losses,
    find_divergence,
    summarise_epoch,
    tell_bad_validation,
    weigh_classes,
)
from tuner.training.metrics import Scores, score_stacked_logits
from tuner.training.schedule import lr_factor
from tuner.training.stacked_optimizer import StackedOptimizer
from tuner.trial import EpochResult, TrialParams

_SHARED = (
    "backbone",
    "batch_size",
    "optimizer",
    "epochs",
    "class_weights",
    "augmentation_strength",
    "views",
    "precision",
)
_SHARED_BY_VIEWS = ("view_seed", "horizontal_flip")
_PART_BYTES = 128 << 20
"""Most that one gathered batch of some of the trials, or their logits of all validation images, may take."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CohortJob:
    """Heads to train, and the features that they are trained on. Tensors are on the device unless told otherwise."""

    params: tuple[TrialParams, ...]
    """One trial each. They share all that decides their features, and what one computation cannot vary."""
    features: Callable[[int], Tensor]
    """From an epoch, counted from 1, to the training images' features, ``(n_train, n_features)``."""
    labels: Tensor
    """int64, shape ``(n_train,)``, on any device: large sets of images stay on the host, and their labels with them."""
    val_features: Tensor
    """Shape ``(n_val, n_features)``; its type is that of the computation."""
    val_labels: Tensor
    """int64, shape ``(n_val,)``, on any device."""
    n_classes: int
    weights: Tensor
    """Of the first heads, ``(n_trials, n_classes, n_features)``, on any device; not changed."""
    biases: Tensor
    """Of the first heads, ``(n_trials, n_classes)``, on any device; not changed."""
    device: torch.device


@dataclass(frozen=True, kw_only=True, eq=False)
class CohortEpoch:
    """What one epoch showed of the trials that it trained, each under its index in ``CohortJob.params``."""

    epoch: int
    """From 1."""
    results: dict[int, tuple[EpochResult, Scores] | Diverged]
    """A diverged trial is told once, and then no longer trained. The scores make a report on demand."""
    heads: dict[int, tuple[Tensor, Tensor]]
    """Weight ``(n_classes, n_features)`` and bias ``(n_classes,)`` of each that did not diverge, on the device. They go
    on changing when the cohort does: copy what is to be kept."""


def train_cohort(job: CohortJob) -> Generator[CohortEpoch, frozenset[int] | None, None]:
    """Train heads, and validate them after every epoch.

    Every trial takes the steps that ``train_epochs`` takes with all but its head frozen: its own batches, masks,
    learning rates and losses. No trial's numbers depend on which others are in the cohort, but for rounding.

    Yields:
        What an epoch showed, until no trial is left or the last epoch is done. ``send`` takes the indices of the trials
        that are to stop; ``next`` stops none.

    Raises:
        ValueError: If the trials do not share what a cohort must share, or do not fit the tensors.
    """
    _check(job)
    return _train(job)


def _check(job: CohortJob) -> None:
    if not job.params or job.weights.shape[:2] != (len(job.params), job.n_classes):
        wanted = f"({len(job.params)}, {job.n_classes}, n_features) for one trial or more"
        raise ValueError(f"weights: must be {wanted}, got {tuple(job.weights.shape)}")
    if job.biases.shape != job.weights.shape[:2]:
        raise ValueError(f"biases: must be {tuple(job.weights.shape[:2])}, got {tuple(job.biases.shape)}")
    first = job.params[0]
    shared = _SHARED if first.augmentation_strength == 0 else (*_SHARED, *_SHARED_BY_VIEWS)
    for name in shared:
        if len(values := {getattr(one, name) for one in job.params}) > 1:
            raise ValueError(f"params: must share {name}, got {sorted(values, key=str)}")
    for one in job.params:
        if one.unfrozen_layers != 1 or not one.shows_known_images:
            what = f"unfrozen_layers = {one.unfrozen_layers}, strength {one.augmentation_strength}, views {one.views}"
            raise ValueError(f"params: must train the head alone, on images known beforehand, got {what}")


def _train(job: CohortJob) -> Generator[CohortEpoch, frozenset[int] | None, None]:
    cohort, val_labels = _Cohort(job), job.val_labels.to(job.device)
    for epoch in range(1, job.params[0].epochs + 1):
        started = perf_counter()
        losses = cohort.run_epoch(job.features(epoch), epoch)
        train_seconds = perf_counter() - started
        scores = score_stacked_logits(cohort.predict_part, val_labels, cohort.split_trials(len(val_labels)))
        seconds = (perf_counter() - started) / len(cohort.trials)
        val_seconds = seconds - train_seconds / len(cohort.trials)
        speed = cohort.n_images * len(cohort.trials) / train_seconds
        results: dict[int, tuple[EpochResult, Scores] | Diverged] = {}
        for index, loss, score in zip(cohort.trials, losses, scores, strict=True):
            if isinstance(loss, Diverged):
                results[index] = loss
            elif not math.isfinite(score.loss):
                results[index] = tell_bad_validation(score.loss, epoch)
            else:
                result = summarise_epoch(
                    epoch, loss, score, seconds=seconds, val_seconds=val_seconds, images_per_second=speed
                )
                results[index] = (result, score)
        diverged = frozenset(index for index, result in results.items() if isinstance(result, Diverged))
        stopped = yield CohortEpoch(epoch=epoch, results=results, heads=cohort.list_heads(but=diverged))
        cohort.drop(diverged | (stopped or frozenset()))
        if not cohort.trials:
            return


class _Cohort:
    """The heads that train, stacked along the first dimension, with what moves them. Mutable."""

    def __init__(self, job: CohortJob) -> None:
        self._job = job
        self.trials = list(range(len(job.params)))
        """Indices of those that train, in the order of the stacks."""
        n_train = len(job.labels)
        self._labels = job.labels.to(job.device)
        self._sizes = [len(rows) for rows in torch.split(torch.arange(n_train), job.params[0].batch_size)]
        self._sizes = self._sizes[: count_batches(n_train, job.params[0].batch_size)]
        self.n_images = sum(self._sizes)
        """Training images of one epoch."""
        dtype = job.val_features.dtype
        weights = job.weights.to(job.device, dtype, copy=True)
        biases = job.biases.to(job.device, dtype, copy=True)[:, :, None]
        self._optimizer = StackedOptimizer(job.params, weights, biases)
        self._orders = [start_order(one.seed) for one in job.params]
        self._masks = [start_dropout(one.seed, job.device) for one in job.params]
        n_steps = job.params[0].epochs * len(self._sizes)
        rates = [
            [one.lr * lr_factor(step, n_steps, one.warmup_fraction) for one in job.params] for step in range(n_steps)
        ]
        self._rates = torch.tensor(rates, dtype=torch.float64, device=job.device)  # (n_steps, n_trials)
        self._smoothing = torch.tensor([one.label_smoothing for one in job.params], dtype=dtype, device=job.device)
        self._dropouts = [one.dropout for one in job.params]
        self._gains = torch.tensor([1 / (1 - one.dropout) for one in job.params], dtype=dtype, device=job.device)
        self._class_weights = torch.ones(job.n_classes, dtype=dtype, device=job.device)
        if job.params[0].class_weights == "balanced":
            self._class_weights = weigh_classes(job.labels, job.n_classes).to(job.device, dtype)

    def drop(self, indices: frozenset[int]) -> None:
        """Train some trials no longer."""
        kept = [position for position, index in enumerate(self.trials) if index not in indices]
        if len(kept) == len(self.trials):
            return
        positions = torch.tensor(kept, dtype=torch.int64, device=self._job.device)
        self._optimizer.keep(positions)
        self._rates = self._rates.index_select(1, positions)
        self._smoothing = self._smoothing.index_select(0, positions)
        self._gains = self._gains.index_select(0, positions)
        self.trials = [self.trials[position] for position in kept]
        self._orders = [self._orders[position] for position in kept]
        self._masks = [self._masks[position] for position in kept]
        self._dropouts = [self._dropouts[position] for position in kept]

    def list_heads(self, *, but: frozenset[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the heads of all trials but some, as they are now."""
        weights, biases = self._optimizer.weights, self._optimizer.biases
        return {
            index: (weights[position], biases[position, :, 0])
            for position, index in enumerate(self.trials)
            if index not in but
        }

    def split_trials(self, n_rows: int) -> list[slice]:
        """Return parts of the stack, each so small that its inputs or logits of ``n_rows`` images fit their bound."""
        return _split(len(self.trials), n_rows * self._job.n_classes * self._optimizer.weights.element_size())

    def predict_part(self, part: slice) -> Tensor:
        """Return some heads' logits of the validation images, ``(n_trials, n_val, n_classes)``."""
        weights, biases = self._optimizer.weights[part], self._optimizer.biases[part]
        logits = self._job.val_features @ weights.flatten(0, 1).T  # one product, the heads side by side
        return logits.view(len(logits), *weights.shape[:2]).transpose(0, 1).add(biases.mT)

    def run_epoch(self, features: Tensor, epoch: int) -> list[float | Diverged]:
        """Train every head on every image once; return each one's mean training loss over the images."""
        orders = [draw_order(len(self._job.labels), generator) for generator in self._orders]
        rows = send_ahead(torch.stack(orders), self._job.device)  # (n_trials, n_train)
        first_step = (epoch - 1) * len(self._sizes)
        losses = [
            self._take_step(features, batch, self._rates[first_step + step])
            for step, batch in enumerate(torch.split(rows, self._job.params[0].batch_size, dim=1)[: len(self._sizes)])
        ]
        per_trial = torch.stack(losses, dim=1).tolist()
        return [find_divergence(steps, epoch) or average_losses(steps, self._sizes) for steps in per_trial]

    def _take_step(self, features: Tensor, rows: Tensor, rates: Tensor) -> Tensor:
        """Move every head once.

        Args:
            features: Of all training images.
            rows: Each trial's batch, shape ``(n_trials, n_images)``.
            rates: The step's learning rates, shape ``(n_trials,)``.

        Returns:
            The mean loss of each trial's batch, shape ``(n_trials,)``, on the device.
        """
        weight_gradients = torch.empty_like(self._optimizer.weights)
        bias_gradients = torch.empty_like(self._optimizer.biases)
        losses = torch.empty_like(self._smoothing)
        for part in _split(len(rows), rows.shape[1] * features.shape[1] * features.element_size()):
            inputs = self._gather(features, rows, part)  # (n_trials, n_images, n_features)
            gains = self._gains[part, None, None]
            logits = (inputs @ self._optimizer.weights[part].mT).mul_(gains).add_(self._optimizer.biases[part].mT)
            losses[part], slopes = differentiate_loss(
                logits, self._labels[rows[part]], self._smoothing[part], self._class_weights
            )
            torch.sum(slopes.mT, dim=2, keepdim=True, out=bias_gradients[part])
            torch.bmm(slopes.mul_(gains).mT, inputs, out=weight_gradients[part])
        self._optimizer.take_step(weight_gradients, bias_gradients, rates)
        return losses

    def _gather(self, features: Tensor, rows: Tensor, part: slice) -> Tensor:
        """Return the batches of some trials, with what their dropouts drop set to 0 but not yet scaled up."""
        inputs = features.index_select(0, rows[part].flatten()).view(*rows[part].shape, features.shape[1])
        for one, dropout, generator in zip(inputs, self._dropouts[part], self._masks[part], strict=True):
            if dropout > 0:
                one.mul_(draw_kept(one.shape, dropout, generator))
        return inputs


def _split(n_trials: int, bytes_per_trial: int) -> list[slice]:
    n_together = max(1, _PART_BYTES // max(1, bytes_per_trial))
    return [slice(start, start + n_together) for start in range(0, n_trials, n_together)]


def differentiate_loss(
    logits: Tensor, labels: Tensor, smoothing: Tensor, class_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the losses of stacked batches, and their gradients by the logits.

    A trial's loss is torch's ``cross_entropy(..., weight=class_weights, label_smoothing=smoothing)`` of its own batch:
    a mean over its images, never over trials.

    Args:
        logits: Shape ``(n_trials, n_images, n_classes)``.
        labels: int64, shape ``(n_trials, n_images)``.
        smoothing: Shape ``(n_trials,)``.
        class_weights: Shape ``(n_classes,)``.

    Returns:
        Losses, ``(n_trials,)``, and gradients, ``(n_trials, n_images, n_classes)``.
    """
    log_shares = logits.log_softmax(dim=2)
    label_weights = class_weights[labels]  # (n_trials, n_images)
    totals = label_weights.sum(dim=1)
    spread = smoothing / logits.shape[2]
    own = -(log_shares.gather(2, labels[..., None])[..., 0] * label_weights).sum(dim=1)
    others = -(log_shares @ class_weights).sum(dim=1)
    # Not just spread * others: of logits that run apart, others may be infinite where the plain loss is not.
    losses = ((1 - smoothing) * own + torch.where(spread > 0, spread * others, 0)) / totals
    own_targets = (1 - smoothing)[:, None] * label_weights
    spread_targets = spread[:, None, None] * class_weights  # (n_trials, 1, n_classes)
    slopes = log_shares.exp_().mul_((own_targets + spread_targets.sum(dim=2))[..., None]).sub_(spread_targets)
    slopes.scatter_add_(2, labels[..., None], -own_targets[..., None])
    return losses, slopes.div_(totals[:, None, None])
