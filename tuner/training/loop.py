"""Train one trial, epoch by epoch."""

import itertools
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from tuner.data.image_set import ImageSet
from tuner.models.backbone import Preprocessing
from tuner.models.layers import freeze_layers, group_layers
from tuner.training.batches import (
    Rows,
    count_batches,
    find_dtype,
    shuffle_batches,
    start_order,
)
from tuner.training.checkpoint import Checkpoint, CheckpointFile, MovingParts
from tuner.training.compiling import Compiler
from tuner.training.cpu_layers import faster_layers
from tuner.training.device import MEMORY_FORMAT, seed_everything
from tuner.training.dropout import dropping_inputs, start_dropout
from tuner.training.epoch_numbers import (
    average_losses,
    find_divergence,
    summarise_epoch,
    tell_bad_validation,
    weigh_classes,
)
from tuner.training.gradients import Gradients
from tuner.training.inputs import Source, find_inputs
from tuner.training.metrics import Scores, score_logits
from tuner.training.optimizer import build_optimizer
from tuner.training.prefix_maps import CachedPrefix
from tuner.training.schedule import build_schedule
from tuner.training.step_forward import StepForward
from tuner.training.step_graphs import StepGraphs
from tuner.trial import EpochResult, TrialParams


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
    cached: CachedPrefix | None = None
    """What the frozen prefix made of the images, for the epochs and the views of ``params``; None: train on images."""
    micro_batch: int | None = None
    """Images at a time, where a batch does not fit into memory; its gradients are added up. None: all at once.

    The step is the whole batch's up to rounding, unless the model ``depends_on_batch``. Dropped inputs of the head are
    the same too on a CPU if those of each part are a multiple of four. What a backbone drops by itself (dropout,
    drop-path) is drawn for each part: the same in distribution alone, as any other seed is."""
    compiler: Compiler | None = None
    """Compiles the model for its training steps; None trains it as it is."""
    graphs: StepGraphs | None = None
    """Records the steps of whole batches as CUDA graphs, if the head drops none of its inputs: those draws come from a
    generator that a graph knows nothing of. None launches each kernel."""


def train_epochs(
    job: TrainingJob, file: CheckpointFile | None = None, saved: Checkpoint | None = None
) -> Generator[tuple[EpochResult, Scores], None, None]:
    """Train a model and validate it after every epoch.

    The same job gives the same bits again on a CPU, whatever torch drew before and whether it was interrupted or not.
    Closing the generator ends the training and leaves the weights of the last step.

    Args:
        job: Its model is as it was made, also where a checkpoint is there.
        file: Where to save now and then; None saves nothing.
        saved: What ``file`` read for this model; the training goes on after its epochs.

    Yields:
        What an epoch showed, and the scores that make its report on demand, for each epoch of ``job.params.epochs``
        that had not been trained. Asked for the next one, it may save the last one first.

    Raises:
        ValueError: If the job has no validation images.
        Diverged: If a training or validation loss is not finite.
    """
    if job.val is None:
        raise ValueError("job.val: must hold images, got None; train_only trains without")
    return _train_and_validate(job, job.val, file, saved)


def train_only(job: TrainingJob, on_epoch: Callable[[int, float], None] | None = None) -> None:
    """Train a model for all its epochs without looking at any other images: the retraining on train and val.

    Args:
        job: Its ``val`` is not used.
        on_epoch: Told each epoch, from 1, and its mean training loss.

    Raises:
        Diverged: If a training loss is not finite.
    """
    training = _Training(job)
    with _changing_layers(job, training.dropout):
        for epoch in range(1, job.params.epochs + 1):
            loss = training.run_epoch(epoch)
            if on_epoch is not None:
                on_epoch(epoch, loss)
    job.model.eval()


def take_steps(job: TrainingJob) -> Generator[int, None, None]:
    """Take a trial's training steps for as long as they are asked for, and never look at what they show.

    Args:
        job: Its ``val`` is not used.

    Yields:
        Each step's number of images. On CUDA the step may not have been computed yet.
    """
    training = _Training(job)
    with _changing_layers(job, training.dropout):
        for epoch in itertools.count(1):
            yield from training.walk_epoch(epoch)


def _train_and_validate(
    job: TrainingJob, val: ImageSet, file: CheckpointFile | None, saved: Checkpoint | None
) -> Generator[tuple[EpochResult, Scores], None, None]:
    training = _Training(job)
    results: list[EpochResult] = []
    if saved is not None:
        training.parts.put_state(saved.state)
        results.extend(saved.results)
    with _changing_layers(job, training.dropout):
        for epoch in range(len(results) + 1, job.params.epochs + 1):
            started = perf_counter()
            train_loss = training.run_epoch(epoch)
            train_seconds = perf_counter() - started
            scores = _validate(training.inputs.predict(val), val, epoch)
            seconds = perf_counter() - started
            speed = training.n_images / train_seconds
            results.append(
                summarise_epoch(
                    epoch,
                    train_loss,
                    scores,
                    seconds=seconds,
                    val_seconds=seconds - train_seconds,
                    images_per_second=speed,
                )
            )
            yield results[-1], scores
            # Whoever asks on has not pruned the trial. After the last epoch there is nothing to go on to.
            if file is not None and file.is_due and epoch < job.params.epochs:
                file.write(results, training.parts.take_state())


class _Training:
    """The model while it trains, with what moves its weights. Mutable."""

    def __init__(self, job: TrainingJob) -> None:
        params = job.params
        seed_everything(params.seed)
        self._job = job
        self._order = start_order(params.seed)
        self.dropout = start_dropout(params.seed, job.device)
        self._model = job.model.to(job.device).to(memory_format=MEMORY_FORMAT)
        self._dtype = find_dtype(self._model)
        freeze_layers(self._model, params.unfrozen_layers)
        n_batches = count_batches(len(job.train.labels), params.batch_size)
        n_steps = params.epochs * n_batches
        self._optimizer = build_optimizer(self._model, group_layers(self._model), params)
        self._schedule = build_schedule(self._optimizer, n_steps=n_steps, warmup_fraction=params.warmup_fraction)
        self.parts = MovingParts(
            model=self._model,
            optimizer=self._optimizer,
            schedule=self._schedule,
            generators={"order": self._order, "dropout": self.dropout},
            device=job.device,
        )
        source = _describe_source(job, self._order)
        self.inputs = find_inputs(source, job.cached)
        self._gradients = self._prepare_gradients(source, n_steps)
        self.n_images = min(n_batches * params.batch_size, len(job.train.labels))
        """Training images of one epoch."""

    def _prepare_gradients(self, source: Source, n_steps: int) -> Gradients:
        job, params = self._job, self._job.params
        forward = StepForward(
            self._model,
            self.inputs.forward,
            params.backbone,
            job.device,
            precision=params.precision,
            dropout=self.dropout,
            compiler=job.compiler,
        )
        class_weights = None
        if params.class_weights == "balanced":
            class_weights = weigh_classes(job.train.labels, job.train.n_classes).to(job.device, self._dtype)
        return Gradients(
            source,
            self.inputs,
            forward,
            class_weights=class_weights,
            micro_batch=job.micro_batch,
            graphs=job.graphs if params.dropout == 0 else None,
            n_steps=n_steps,
        )

    def run_epoch(self, epoch: int) -> float:
        """Train on every image once; return the mean training loss over the images."""
        self._model.train()
        self.inputs.start_epoch(epoch)
        batches = shuffle_batches(self._job.train, self._job.params.batch_size, self._order)
        losses = torch.full((len(batches),), math.nan, device=self._job.device, dtype=self._dtype)
        for step, rows in enumerate(batches):
            losses[step] = self._take_step(rows)
            # On CUDA, looking at every step's loss would make the host wait; there the epoch's end is soon enough.
            if self._job.device.type == "cpu" and not losses[step].isfinite():
                break
        per_step = losses.tolist()
        if diverged := find_divergence(per_step, epoch):
            raise diverged
        return average_losses(per_step, [len(rows) for rows in batches])

    def walk_epoch(self, epoch: int) -> Iterator[int]:
        """Train on every image once, yielding each step's number of images."""
        self._model.train()
        self.inputs.start_epoch(epoch)
        for rows in shuffle_batches(self._job.train, self._job.params.batch_size, self._order):
            self._take_step(rows)
            yield len(rows)

    def _take_step(self, rows: Rows) -> Tensor:
        """Move the weights once; return the batch's mean loss, on the device."""
        loss = self._gradients.make(rows)
        self._optimizer.step()
        self._schedule.step()
        return loss


def _describe_source(job: TrainingJob, order: torch.Generator) -> Source:
    """Return what a job's inputs are made from, once its model is on the device and frozen."""
    return Source(
        model=job.model,
        params=job.params,
        train=job.train,
        preprocessing=job.preprocessing,
        device=job.device,
        order=order,
        eval_batch_size=job.micro_batch or job.params.batch_size,
    )


def _validate(logits: Tensor, val: ImageSet, epoch: int) -> Scores:
    scores = score_logits(logits, val.labels.to(logits.device))
    if not math.isfinite(scores.loss):
        raise tell_bad_validation(scores.loss, epoch)
    return scores


@contextmanager
def _changing_layers(job: TrainingJob, dropout: torch.Generator) -> Iterator[None]:
    """Have a job's model drop what the recipe drops, and train in the ways that suit the device."""
    params = job.params
    # Compiled code is made of the layers as they are.
    faster = nullcontext() if job.compiler else faster_layers(job.model, job.device, params.precision)
    with dropping_inputs(job.model, params.dropout, dropout), faster:
        yield
