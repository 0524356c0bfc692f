"""Does the cost of head trials grow in proportion to the images, the trials and the classes?

Each arm is one ``tuner run`` of head-only trials on made images, from an empty cache, with one worker; one of the
three numbers is 1x, 4x or 16x. A run's start-up (imports, and what is done once) does not grow, so that the conclusions
compare what each further 1x costs: from 1x to 4x, and from 4x to 16x. Linear growth is a ratio of 1. Points are drawn
at random: TPE's own cost per trial grows with the trials, and is Optuna's.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import Case
from benchmarks.material import make_tiny_weights, write_generated
from benchmarks.processes import watch
from benchmarks.study_file import write_study_file

_BASE = {"images": 640, "trials": 64, "classes": 4}
_SMOKE_BASE = {"images": 40, "trials": 1, "classes": 2}
_MODEL = "test_resnet"
_LIMIT_SECONDS = 1800.0


def run_scale(_: int, smoke: bool, *, grown: str = "", scale: int = 1) -> float:
    """Return the wall seconds of a whole run.

    Args:
        _: The points are the same in all repeats.
        smoke: Whether to be small.
        grown: Which of the numbers is multiplied.
        scale: By what.
    """
    sizes = dict(_SMOKE_BASE if smoke else _BASE)
    if grown:
        sizes[grown] *= scale
    with tempfile.TemporaryDirectory(prefix="benchmark_") as name:
        folder = Path(name)
        write_generated(folder / "images", n_images=sizes["images"], n_classes=sizes["classes"], size=32)
        backbones = make_tiny_weights(folder)
        write_study_file(folder / "study.toml", make_tables(folder, backbones[_MODEL], sizes["trials"], smoke=smoke))
        command = ["-P", "-m", "tuner", "run", str(folder / "study.toml"), "--workers", "1", "--quiet"]
        watched = watch(
            [[*command, "--storage", f"sqlite:///{folder}/studies.db"]],
            environment={"TUNER_CACHE_DIR": str(folder / "cache")},
            seconds=_LIMIT_SECONDS,
            started=time.time(),
        )
    if watched.error or watched.timed_out:
        raise RuntimeError(f"tuner run did not end well: {watched.tail}")
    return watched.seconds


def make_tables(folder: Path, backbone: dict[str, Any], n_trials: int, *, smoke: bool) -> dict[str, dict[str, Any]]:
    """Return a study of head-only trials."""
    return {
        "study": {"name": "growth"},
        "data": {"source": "image_folder", "path": str(folder / "images"), "image_size": 32},
        "space": {"lr": {"low": 1e-4, "high": 1e-1, "log": True}},
        "backbones": {_MODEL: backbone},
        "training": {"backbone": _MODEL, "unfrozen_layers": 1, "batch_size": 32, "epochs": 1 if smoke else 3},
        "search": {"n_trials": n_trials, "sampler": "random", "pruner": "none"},
        "workers": {"devices": "cpu"},
    }


def compare_growth(numbers: Mapping[str, list[float]], _: bool) -> dict[str, Any]:
    """Return, for each grown number, the seconds of a further 1x at small and at large scale, and their ratio."""
    conclusions: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    base = statistics.median(numbers["1x"])
    for grown in _BASE:
        names = (f"{grown} 4x", f"{grown} 16x")
        if any(name not in numbers for name in names):
            continue
        four, sixteen = (statistics.median(numbers[name]) for name in names)
        early, late = (four - base) / 3, (sixteen - four) / 12
        conclusions[f"{grown}: seconds of a further 1x, 1x to 4x"] = early
        conclusions[f"{grown}: seconds of a further 1x, 4x to 16x"] = late
        conclusions[f"{grown}: ratio, 1 is linear"] = late / early if early > 0 else "too short to measure"
    return conclusions


CASE = Case(
    name="growth",
    question="how long does a whole study of head trials take as images, trials or classes grow?",
    unit="s",
    baseline="1x",
    regression="a further 1x costs more than 1.25x as much at large scale",
    arms={"1x": run_scale}
    | {f"{grown} {scale}x": partial(run_scale, grown=grown, scale=scale) for grown in _BASE for scale in (4, 16)},
    smoke_arms=("1x",),
    n_repeats=3,
    warms_up=False,
    conclude=compare_growth,
)
