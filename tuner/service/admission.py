"""Whether a trial fits into memory: foreseen before its first step, and made to fit in micro-batches where they do."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tuner.data.memory import available_memory
from tuner.errors import first_line
from tuner.service.workbench import Workbench
from tuner.spec.sizes import format_bytes
from tuner.training.checkpoint import Checkpoint, CheckpointFile
from tuner.training.device import is_device_lost, is_out_of_memory, release_memory
from tuner.training.epoch_numbers import Diverged
from tuner.training.loop import TrainingJob, train_epochs
from tuner.training.memory import MemoryNeed, depends_on_batch, measure_need, plan_micro_batch
from tuner.training.memory_meter import Growth, below, count_bytes, find_ceiling, keep_heap_tight
from tuner.training.memory_needs import MemoryNeeds, describe_training
from tuner.training.metrics import Scores
from tuner.trial import EpochResult, Usage

_RESERVED_BYTES = 32_000_000
_RESERVED_FRACTION = 0.1
"""What a prediction must leave free of a limit, together: peaks of seven backbones were higher than predicted by up to
29 MB where they were below 150 MB, and by 46 MB at 308 (``benchmarks/cases/memory_admission.py``)."""
_BYTES_PER_IMAGE_BYTE = 1000
"""A training step holds at most about this many bytes for each byte of an image in float32: measured were 28
(mobilenetv3_small_100) to 220 (densenet121) of seven backbones with all layers training; deeper ones take more."""


class DoesNotFit(MemoryError):  # noqa: N818 - the name of what was foreseen, no mistake of the user or of ours
    """A trial would run out of memory; the text is one line for a person."""


@dataclass(frozen=True, kw_only=True)
class _Foreseen:
    """What is known of a training before its first step."""

    facts: dict[str, object]
    need: MemoryNeed
    available: int
    """Bytes that it may take, its model included."""
    foreign: int
    """Bytes of the device that were not this process's; on a CPU 0."""


class Admission:
    """Lets trials of one worker train that fit into its memory. Mutable: it remembers what it told and the last trial.

    On CUDA every trial is foreseen. On the CPU, where memory is larger and a probe takes longer, those are that have a
    limit (``workers.memory_limit``) or might take half of what the machine has left by a generous rule of thumb.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        self._limit = bench.spec.workers.memory_limit
        self._needs = MemoryNeeds()
        self._noted: set[tuple[str, int]] = set()
        self._foreseen: _Foreseen | None = None
        self.usage = Usage()
        """Of the trial that began last."""
        gc.collect()
        gc.freeze()  # what is loaded by now stays: to look through it took 0.4 s of each probe and trial
        if self._limit is not None and bench.device.type == "cuda":
            total = torch.cuda.get_device_properties(bench.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self._limit / total), bench.device)

    def begin(self) -> None:
        """Begin with a trial."""
        self._foreseen, self.usage = None, Usage()

    def admit(self, job: TrainingJob) -> TrainingJob:
        """Return a training of the trial as it fits into memory.

        Raises:
            DoesNotFit: If it does not.
        """
        self._foreseen = foreseen = self._foresee(job)
        if foreseen is None:
            return replace(job, graphs=None)  # nobody knows whether what they hold fits besides
        need, batch_size = foreseen.need, job.params.batch_size
        may_split = not depends_on_batch(job.model, job.params.unfrozen_layers)
        limit = (foreseen.available - _RESERVED_BYTES) / (1 + _RESERVED_FRACTION)
        planned = plan_micro_batch(need, batch_size, limit, may_split=may_split)
        if planned is None:
            self.usage = replace(self.usage, predicted_bytes=need.predict(batch_size))
            why = "" if may_split else ", and its BatchNorm trains on whole batches"
            raise DoesNotFit(self._tell_misfit(job, format_bytes(need.predict(batch_size)), foreseen.available) + why)
        if planned == batch_size:
            predicted = need.predict(batch_size)
            # A recorded step holds all that it takes, and an epoch's last batch takes as much again.
            may_record = job.graphs is not None and 2 * predicted <= limit
            self.usage = replace(self.usage, predicted_bytes=2 * predicted if may_record else predicted)
            return job if may_record else replace(job, graphs=None)
        predicted = need.predict(planned, adds_up=True)
        self.usage = replace(self.usage, micro_batch=planned, predicted_bytes=predicted)
        self._tell_split(job, planned, foreseen)
        return replace(job, micro_batch=planned, graphs=None)

    def train(
        self, job: TrainingJob, file: CheckpointFile | None = None, saved: Checkpoint | None = None
    ) -> Iterator[tuple[EpochResult, Scores]]:
        """Train an admitted job as ``train_epochs`` does, within the limit, and learn from what it takes.

        The limit holds while it trains, not while whoever asked looks at an epoch, or writes the model.
        """
        if self._foreseen is None:
            yield from train_epochs(job, file, saved)
            return
        is_there = next(job.model.parameters()).device.type == job.device.type  # then no growth shows it
        held = count_bytes(job.model) if is_there else 0
        growth, ceiling = Growth(job.device), self._find_ceiling(job, held=held)
        epochs = train_epochs(job, file, saved)
        try:
            while True:
                with below(ceiling):
                    epoch = next(epochs, None)
                if (grown := growth.read()) is not None:
                    self.usage = replace(self.usage, peak_bytes=max(self.usage.peak_bytes or 0, grown + held))
                if epoch is None:
                    return
                yield epoch
        except Exception as error:
            if is_out_of_memory(error):
                self._learn(job, self._foreseen)
            raise
        finally:
            epochs.close()

    # --- what is known ---

    def _foresee(self, job: TrainingJob) -> _Foreseen | None:
        """Return what is known of a training, measured now if need be; None if it need not be looked at."""
        available = self._find_available(job)
        if available is None:
            return None
        if job.device.type == "cpu":
            keep_heap_tight()
        facts = describe_training(job, self._bench.section(job.params.backbone).kwargs)
        need = self._needs.find(facts)
        if need is None:
            try:
                need = self._measure(job)
            except Diverged:
                return None  # so will the trial, which tells it better
            except Exception as error:  # a user's backbone may raise anything, and what holds for a probe is no verdict
                if is_device_lost(error):
                    raise
                if not is_out_of_memory(error):
                    self._give_up(job, error)
                    return None
            release_memory(job.device)  # out of the except block: its traceback held on to the probe's tensors
            if need is None:
                raise DoesNotFit(self._tell_misfit(job, "even a few images at a time more than all", available))
            self._needs.keep(facts, need)
        return _Foreseen(facts=facts, need=need, available=available, foreign=_count_foreign(job.device))

    def _give_up(self, job: TrainingJob, error: Exception) -> None:
        """Say once that trainings of a backbone are not foreseen: they may run out of memory."""
        if (job.params.backbone, 0) not in self._noted:
            self._noted.add((job.params.backbone, 0))
            self._bench.note(f"{job.params.backbone}: its memory is not foreseen: {first_line(error)}")

    def _find_available(self, job: TrainingJob) -> int | None:
        """Return the bytes that a training may take, its model included; None if there are more than enough."""
        if job.device.type == "cuda":
            release_memory(job.device)
            allocated = torch.cuda.memory_allocated(job.device)
            room = torch.cuda.mem_get_info(job.device)[0] + torch.cuda.memory_reserved(job.device) - allocated
            room = room if self._limit is None else min(room, self._limit - allocated)
            is_there = next(job.model.parameters()).is_cuda  # then it is in what is allocated, and in the need
            return room + is_there * count_bytes(job.model) - _count_later(job)
        if self._limit is not None:
            return self._limit
        held = count_bytes(job.model)
        available = held + available_memory()
        image_bytes = 4 * job.train.pixels[0].numel()
        largest = 4 * held + job.params.batch_size * image_bytes * _BYTES_PER_IMAGE_BYTE
        return available if largest > available / 2 else None

    def _measure(self, job: TrainingJob) -> MemoryNeed:
        with below(self._find_ceiling(job, held=0)):  # the copies of the model count, not the model
            return measure_need(job)

    def _find_ceiling(self, job: TrainingJob, *, held: int) -> int | None:
        """Return how large the process may become, of whose present size some bytes count as the training's."""
        if self._limit is None or job.device.type != "cpu":  # CUDA's allocator has the limit
            return None
        return find_ceiling(self._limit - held + _count_later(job))  # mapped files count as the process's data

    def _learn(self, job: TrainingJob, foreseen: _Foreseen) -> None:
        """Remember that a training took more than was foreseen, so that its like is not started.

        Nothing is learnt where it may be another process that has taken the memory meanwhile, or the recorded steps.
        """
        if job.graphs is not None or _count_foreign(job.device) > foreseen.foreign + _RESERVED_BYTES:
            return
        n_images = job.micro_batch or job.params.batch_size
        need = foreseen.need.raised(n_images, foreseen.available, adds_up=job.micro_batch is not None)
        self._needs.keep(foreseen.facts, need)

    # --- what is told ---

    def _tell_split(self, job: TrainingJob, micro_batch: int, foreseen: _Foreseen) -> None:
        params = job.params
        if (params.backbone, params.batch_size) in self._noted:
            return
        self._noted.add((params.backbone, params.batch_size))
        whole = format_bytes(foreseen.need.predict(params.batch_size))
        self._bench.note(
            f"{params.backbone} with batch_size {params.batch_size} would take {whole} of "
            f"{format_bytes(foreseen.available)}: it trains {micro_batch} images at a time and adds their gradients up"
        )

    def _tell_misfit(self, job: TrainingJob, need: str, available: int) -> str:
        params, source = job.params, "free" if self._limit is None else "workers.memory_limit"
        return (
            f"not started, it would run out of memory: {params.backbone} with batch_size {params.batch_size} and "
            f"{params.unfrozen_layers} unfrozen layers would take {need} of {format_bytes(available)} ({source}); "
            f"smaller batches or images, or fewer unfrozen layers, take less"
        )


def _count_later(job: TrainingJob) -> int:
    """Return the bytes of maps that a job will open while it trains."""
    return 0 if job.cached is None else job.cached.later_bytes


def _count_foreign(device: torch.device) -> int:
    """Return the bytes of a CUDA device that torch has not reserved in this process; on a CPU 0."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
