"""What do the faster ways of training some layers save on a CPU (``tuner/training/cpu_layers.py``)?

Steps of forward, loss and backward on random images, 128 px, batch 16, by backbones of seven families with random
weights, on one thread: the last two layer groups on maps of the frozen rest, and all layers. Each is timed in turn in
four ways, in float32 and bfloat16, by torch's layers and by the faster ones. A regression: torch's layers are faster
than the faster ones, summed up in either precision.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any

from benchmarks.cases.step_overhead import make_random_job, one_thread
from benchmarks.harness import Case

if TYPE_CHECKING:
    from tuner.trial import Precision

    Way = tuple[Precision, bool]

_BACKBONES = (
    "mobilenetv1_100",
    "mobilenetv2_035",
    "mobilenetv2_100",
    "tf_mobilenetv3_large_minimal_100",
    "efficientnet_b0",
    "regnety_002",
    "resnet18",
    "resnet50",
    "convnext_atto",
)
_SIZE = 128
_BATCH_SIZE = 16
_PRECISIONS: tuple["Precision", ...] = ("float32", "bfloat16")
_WAYS: tuple["Way", ...] = tuple(product(_PRECISIONS, (False, True)))
_COMPARED: tuple[tuple[str, "Way", "Way"], ...] = (
    ("float32", ("float32", False), ("float32", True)),
    ("bfloat16", ("bfloat16", False), ("bfloat16", True)),
    ("bfloat16 against torch's float32", ("float32", False), ("bfloat16", True)),
)


def make_timer(backbone: str, n_unfrozen: int | None, size: int) -> Callable[["Way"], float]:
    """Return what times a training step of a backbone, without its optimizer, in the way that it is told."""
    import torch
    from torch.nn import functional

    from tuner.models.layers import freeze_layers
    from tuner.models.partition import partition_model
    from tuner.training.cpu_layers import faster_layers
    from tuner.training.device import MEMORY_FORMAT, autocast

    job = make_random_job(backbone, seed=0, size=size, n_images=_BATCH_SIZE, n_val=1, batch_size=_BATCH_SIZE)
    model = job.model.to(memory_format=MEMORY_FORMAT)
    inputs = torch.randn(_BATCH_SIZE, 3, size, size).to(memory_format=MEMORY_FORMAT)
    run: Callable[[torch.Tensor], torch.Tensor] = model
    if n_unfrozen is not None:
        freeze_layers(model, n_unfrozen)
        partition = partition_model(model, inputs)
        with torch.no_grad():
            inputs = partition.bind_prefix(model)(inputs)
        run = partition.bind_suffix(model)
    model.train()

    def time_step(way: "Way") -> float:
        precision, is_faster = way
        with faster_layers(model, job.device, precision) if is_faster else nullcontext():
            for _ in range(2):  # the first plans its kernels
                started = time.perf_counter()
                with autocast(job.device, precision):
                    logits = run(inputs.clone())
                functional.cross_entropy(logits.float(), job.train.labels).backward()  # type: ignore[no-untyped-call]
                model.zero_grad()
        return time.perf_counter() - started

    return time_step


@cache
def time_steps(seed: int, smoke: bool) -> dict[str, dict["Way", float]]:
    """Return the seconds of a step by what trains and how, measured in turn."""
    timed: dict[str, dict[Way, float]] = {}
    with one_thread():
        for backbone, n_unfrozen in product(("test_resnet",) if smoke else _BACKBONES, (2, None)):
            time_step = make_timer(backbone, n_unfrozen, 32 if smoke else _SIZE)
            ways = _WAYS if seed % 2 else _WAYS[::-1]
            timed[f"{backbone}, {n_unfrozen or 'all'} layer groups"] = {way: time_step(way) for way in ways}
    return timed


def conclude(numbers: Mapping[str, list[float]], smoke: bool) -> dict[str, Any]:
    """Return how much faster each backbone trains by the faster ways, and in bfloat16 by them."""
    rounds = [time_steps(seed, smoke) for seed in range(len(numbers[_name_arm(_WAYS[0])]))]
    told: dict[str, Any] = {}
    for what in rounds[0]:
        for name, slow, fast in _COMPARED:
            ratios = [each[what][slow] / each[what][fast] for each in rounds]
            low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
            told[f"{what}, {name}"] = f"{middle:.2f}x ({low:.2f} to {high:.2f})"
    return told


def _name_arm(way: "Way") -> str:
    precision, is_faster = way
    return f"{precision}, {'faster' if is_faster else 'torch'}"


def _sum_arm(way: "Way") -> Callable[[int, bool], float]:
    return lambda seed, smoke: sum(seconds[way] for seconds in time_steps(seed, smoke).values())


CASE = Case(
    name="cpu_layers",
    question="what do the faster ways of training some layers save on a CPU?",
    unit="s for a step of each backbone and depth",
    baseline=_name_arm(_WAYS[0]),
    regression="torch's layers faster than the faster ones, in either precision",
    arms={_name_arm(way): _sum_arm(way) for way in _WAYS},
    n_repeats=7,
    warms_up=False,
    conclude=conclude,
)
"""The same steps in four ways."""
