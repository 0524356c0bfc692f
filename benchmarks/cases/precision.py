"""What do forward passes in bfloat16 save on a CPU, and what do they cost in accuracy?

Time: one epoch of full fine-tuning on resident random images and its validation, by tuner's training loop, on one
thread, for backbones of five families with random weights; the arms are summed, each backbone stands apart. Accuracy:
pairs of trainings of real weights on real images (those of ``views``, fresh augmentation), the same but for the
precision; val chooses nothing. A regression: float32 is the faster one for a ResNet on a CPU with matrix units
for bfloat16 (AMX), or bfloat16 is worse by more than two standard errors with a recipe on a data set.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import views
from benchmarks.cases.step_overhead import make_random_job, one_thread
from benchmarks.harness import Case
from benchmarks.material import IMAGES_VARIABLE, WEIGHTS_VARIABLE, empty_cache, find_folder

if TYPE_CHECKING:
    from tuner.training.loop import TrainingJob
    from tuner.trial import Precision

_BASELINE: "Precision" = "float32"
_ARMS: tuple["Precision", ...] = (_BASELINE, "bfloat16")
_BACKBONES = ("mobilenetv2_100", "resnet18", "resnet50", "convnext_atto", "vit_tiny_patch16_224")
_SIZE = 128
_BATCH_SIZE = 16
_N_BATCHES = 4
_N_PAIRS = 5
_RECIPES: tuple[dict[str, Any], ...] = ({"unfrozen_layers": 2, "lr": 1e-3}, {"unfrozen_layers": "all", "lr": 1e-3})


def make_job(backbone: str, precision: "Precision", size: int) -> "TrainingJob":
    """Return a full fine-tuning of one epoch, at a rate that random weights bear."""
    kwargs = {"img_size": size} if backbone.startswith("vit") else {}
    n_images = _N_BATCHES * _BATCH_SIZE
    job = make_random_job(
        backbone, seed=0, size=size, n_images=n_images, n_val=n_images, batch_size=_BATCH_SIZE, **kwargs
    )
    return replace(job, params=replace(job.params, lr=1e-4, precision=precision))


@cache
def time_backbones(seed: int, smoke: bool) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the seconds of training and of validating, by backbone and precision, measured in turn."""
    from tuner.training.loop import take_steps, train_epochs

    timed: dict[str, dict[str, tuple[float, float]]] = {}
    with one_thread():
        for backbone in ("test_resnet",) if smoke else _BACKBONES:
            timed[backbone] = {}
            for precision in _ARMS if seed % 2 else reversed(_ARMS):
                size = 32 if smoke else _SIZE
                next(steps := take_steps(make_job(backbone, precision, size)))  # plans its kernels
                steps.close()
                ((result, _),) = train_epochs(make_job(backbone, precision, size))
                timed[backbone][precision] = result.seconds - result.val_seconds, result.val_seconds
    return timed


def train_pairs(*, smoke: bool) -> Iterator[dict[str, Any]]:
    """Train each recipe in both precisions; yield what they showed on val."""
    has_real = not smoke and all(map(find_folder, (IMAGES_VARIABLE, WEIGHTS_VARIABLE)))
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name, empty_cache(), one_thread():
        for images in views.REAL if has_real else (views.DIGITS,):
            place = Path(name, images.name)
            place.mkdir()
            bench = views.open_bench(place, images, smoke=not has_real)
            for recipe in _RECIPES:
                for seed in range(1 if smoke else _N_PAIRS):
                    began, found = time.perf_counter(), {}
                    for precision in _ARMS:
                        changes = {"views": "fresh", "precision": precision}
                        found[precision] = views.train_changed(bench, recipe, changes, seed)["accuracy"]
                    seconds = time.perf_counter() - began
                    yield {"data": images.name, "recipe": recipe, "seed": seed, "accuracy": found, "seconds": seconds}


def conclude(numbers: Mapping[str, list[float]], smoke: bool) -> dict[str, Any]:
    """Return how much sooner each backbone is done in bfloat16, and by how much more or less accurate trainings are."""
    rounds = [time_backbones(seed, smoke) for seed in range(len(numbers[_BASELINE]))]
    told: dict[str, Any] = {}
    for backbone in rounds[0]:
        for part, what in enumerate(("training", "validation")):
            ratios = [each[backbone][_BASELINE][part] / each[backbone]["bfloat16"][part] for each in rounds]
            low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
            told[f"{backbone}, {what}, speed against {_BASELINE}"] = f"{middle:.2f}x ({low:.2f} to {high:.2f})"
    pairs = list(train_pairs(smoke=smoke))
    for data, unfrozen in dict.fromkeys((pair["data"], pair["recipe"]["unfrozen_layers"]) for pair in pairs):
        own = [
            pair["accuracy"] for pair in pairs if (pair["data"], pair["recipe"]["unfrozen_layers"]) == (data, unfrozen)
        ]
        gains = [100 * (each["bfloat16"] - each[_BASELINE]) for each in own]
        error = f" ± {statistics.stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
        name = f"{data}, {unfrozen} layer groups, points of accuracy against {_BASELINE}, {len(gains)} pairs"
        told[name] = f"{statistics.fmean(gains):+.2f}{error}"
    return told | {"rounds": rounds, "pairs": pairs}


def _sum_arm(precision: str, seed: int, smoke: bool) -> float:
    return sum(sum(each[precision]) for each in time_backbones(seed, smoke).values())


CASE = Case(
    name="precision",
    question="what do forward passes in bfloat16 save on a CPU, and what do they cost in accuracy?",
    unit="s for an epoch of five backbones",
    baseline=_BASELINE,
    regression="float32 the faster one for a ResNet where there is AMX, or an accuracy worse by two standard errors",
    arms={
        "float32": lambda seed, smoke: _sum_arm("float32", seed, smoke),
        "bfloat16": lambda seed, smoke: _sum_arm("bfloat16", seed, smoke),
    },
    n_repeats=5,
    warms_up=False,
    conclude=conclude,
)
"""The same training in two precisions."""
