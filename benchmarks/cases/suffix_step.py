"""What share of the bare suffix step's images a second does a trial on kept maps reach?

Both arms train the last two layer groups of the same model with the same optimizer, in this process, on one thread: the
bare step on one constant batch of maps (with tuner's faster layers), and tuner's training loop on maps that lie in the
cache, fetched in shuffled batches. Validation is not counted, nor is computing the maps. The goal is 0.90.
"""

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.cases.step_overhead import BATCH_SIZE, make_job, one_thread
from benchmarks.harness import Case
from benchmarks.material import empty_cache

if TYPE_CHECKING:
    from tuner.training.loop import TrainingJob

GOAL = 0.9


def make_cached_job(seed: int, *, smoke: bool) -> "TrainingJob":
    """Return a trial of two epochs on kept maps of all but the last two layer groups."""
    import torch

    from tuner.data.feature_store import Values, open_bank
    from tuner.models.layers import freeze_layers
    from tuner.models.partition import partition_model
    from tuner.training.device import MEMORY_FORMAT
    from tuner.training.prefix_maps import CachedPrefix, compute_maps

    job = make_job(seed, smoke=smoke)
    job = replace(job, params=replace(job.params, unfrozen_layers=2, augmentation_strength=0.0, epochs=2))
    model = job.model.to(memory_format=MEMORY_FORMAT)
    freeze_layers(model, 2)
    partition = partition_model(model, torch.zeros(3, *job.train.pixels.shape[1:]))

    def fill(out: Values) -> None:
        compute_maps(
            model, partition, job.train, job.preprocessing, job.device, out=torch.from_numpy(out), precision="auto"
        )

    bank = open_bank({"seed": seed}, shape=(len(job.train.labels), partition.width), fill=fill)
    maps = torch.from_numpy(bank.features)
    assert job.val is not None
    val = compute_maps(model, partition, job.val, job.preprocessing, job.device, precision="auto")
    return replace(job, cached=CachedPrefix(partition=partition, train=lambda _: maps, val=val))


def run_bare(seed: int, smoke: bool) -> float:
    """Return images a second of forward, loss, backward and optimizer step of the suffix on one batch of maps."""
    from torch.nn import functional

    from tuner.models.layers import group_layers
    from tuner.training.cpu_layers import faster_layers
    from tuner.training.optimizer import build_optimizer

    with one_thread(), empty_cache(), ExitStack() as layers:
        job = make_cached_job(seed, smoke=smoke)
        assert job.cached is not None
        layers.enter_context(faster_layers(job.model, job.device, "float32"))
        suffix = job.cached.partition.bind_suffix(job.model.train())
        optimizer = build_optimizer(job.model, group_layers(job.model), job.params)
        kept = job.cached.train(1)
        assert kept is not None
        maps = kept[:BATCH_SIZE].clone()
        labels = job.train.labels[:BATCH_SIZE]
        n_steps = job.params.epochs * len(job.train.labels) // BATCH_SIZE
        started = time.perf_counter()
        for _ in range(n_steps):
            loss = functional.cross_entropy(suffix(maps), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return n_steps * BATCH_SIZE / (time.perf_counter() - started)


def run_trial(seed: int, smoke: bool) -> float:
    """Return images a second of tuner's training loop, over its epochs."""
    from tuner.training.loop import train_epochs

    with one_thread(), empty_cache():
        job = make_cached_job(seed, smoke=smoke)
        seconds = [len(job.train.labels) / result.images_per_second for result, _ in train_epochs(job)]
        return len(seconds) * len(job.train.labels) / sum(seconds)


CASE = Case(
    name="suffix_step",
    question="how many images a second does a trial on kept maps train, against the bare suffix step?",
    unit="images/s",
    baseline="bare suffix step",
    regression=f"less than {GOAL} of the bare step",
    arms={"bare suffix step": run_bare, "trial on kept maps": run_trial},
)
"""The loop around the suffix."""
