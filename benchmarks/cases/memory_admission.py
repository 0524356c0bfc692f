"""Is the memory of a training step foreseen, and does no trial die of it?

For seven backbones of seven families, head, half and all of the layers, adamw and sgd: two small probes predict the
highest memory of training at batch sizes that were not probed; then the same training runs, and what its process took
at its highest is compared. Unit: MB. After that a study of 200 trials of tiny models runs under a limit that its larger
batches do not fit in: counted are trials that were started and ran out of memory.

A regression is a median error above 10 %, or one trial that was started and ran out of memory.
"""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import Case
from benchmarks.processes import describe_environment
from benchmarks.study_file import write_study_file

BACKBONES: dict[str, dict[str, Any]] = {
    "resnet18": {},
    "mobilenetv3_small_100": {},
    "efficientnet_b0": {},
    "regnety_002": {},
    "densenet121": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 96},
}
SMOKE_BACKBONES = ("mobilenetv3_small_100",)
BATCH_SIZES = (12, 32)
IMAGE_SIZE = 96
N_TRIALS = 200
LIMIT = "100 MB"
_TINY = ("test_resnet", "test_efficientnet", "test_convnext", "test_vit")
_MEGABYTE = 1e6
_ROOT = Path(__file__).parents[2]


def measure_backbone(name: str, *, smoke: bool) -> list[dict[str, Any]]:
    """Predict and watch the trainings of one backbone, in this process; return a row for each."""
    from dataclasses import replace

    import timm
    import torch

    from benchmarks.cases.step_overhead import make_job
    from tuner.data.image_set import ImageSet
    from tuner.models.layers import group_layers
    from tuner.training.loop import train_epochs
    from tuner.training.memory import measure_need
    from tuner.training.memory_meter import Growth, count_bytes, keep_heap_tight

    torch.set_num_threads(1)
    keep_heap_tight()

    def make_images(count: int) -> ImageSet:
        pixels = torch.randint(0, 256, (count, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
        return ImageSet(pixels=pixels, labels=torch.arange(count) % 10, n_classes=10, rows=torch.arange(count))

    rows = []
    n_groups = len(group_layers(timm.create_model(name, **BACKBONES[name])))
    settings = [(cut, kind) for cut in sorted({1, (n_groups + 1) // 2, n_groups}) for kind in ("adamw", "sgd")]
    for unfrozen_layers, optimizer in settings[-1:] if smoke else settings:
        plain = make_job(0, smoke=True)
        params = replace(plain.params, backbone=name, unfrozen_layers=unfrozen_layers, optimizer=optimizer)
        need = None
        for batch_size in BATCH_SIZES[:1] if smoke else BATCH_SIZES:
            job = replace(
                plain,
                model=timm.create_model(name, num_classes=10, **BACKBONES[name]),
                params=replace(params, batch_size=batch_size),
                train=make_images(2 * batch_size),
                val=make_images(16),
            )
            need = need or measure_need(job)
            held, growth = count_bytes(job.model), Growth(job.device)
            for _ in train_epochs(job):
                pass
            grown = growth.read()
            assert grown is not None, "this system does not tell how large a process was"
            rows.append(
                {
                    "backbone": name,
                    "unfrozen_layers": unfrozen_layers,
                    "optimizer": optimizer,
                    "batch_size": batch_size,
                    "predicted_mb": need.predict(batch_size) / _MEGABYTE,
                    "actual_mb": (grown + held) / _MEGABYTE,
                }
            )
    return rows


@functools.cache
def measure_all(smoke: bool) -> list[dict[str, Any]]:
    """Measure every backbone in a process of its own."""
    rows: list[dict[str, Any]] = []
    for name in SMOKE_BACKBONES if smoke else BACKBONES:
        code = (
            "import json; from benchmarks.cases.memory_admission import measure_backbone; "
            f"print(json.dumps(measure_backbone({name!r}, smoke={smoke})))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=_ROOT,
            env=describe_environment({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        rows += json.loads(done.stdout.splitlines()[-1])
    return rows


def run_study(*, smoke: bool) -> dict[str, Any]:
    """Run a study under a limit; return how its trials ended."""
    import optuna

    tables: dict[str, dict[str, Any]] = {
        "study": {"name": "limited"},
        "data": {"source": "digits", "classes": ["0", "1", "2"], "image_size": 64},
        "backbones": {name: {"weights": "random"} for name in _TINY},
        "space": {
            "backbone": {"choices": list(_TINY)},
            "batch_size": {"choices": [8, 16, 32, 64, 128, 192, 256, 384]},
            "unfrozen_layers": {"low": 1, "high": "all"},
            "optimizer": {"choices": ["adamw", "sgd"]},
            "lr": {"low": 1e-5, "high": 1e-3, "log": True},
            "augmentation_strength": {"low": 0.0, "high": 1.0},
        },
        "training": {"epochs": 1},
        "search": {"n_trials": 6 if smoke else N_TRIALS, "sampler": "random", "pruner": "none"},
        "workers": {"devices": "cpu", "memory_limit": LIMIT},
    }
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        write_study_file(Path(folder, "study.toml"), tables)
        url = f"sqlite:///{folder}/studies.db"
        done = subprocess.run(
            [sys.executable, "-m", "tuner", "run", f"{folder}/study.toml", "--storage", url, "--quiet"],
            cwd=_ROOT,
            env=describe_environment({"TUNER_CACHE_DIR": f"{folder}/cache", "CUDA_VISIBLE_DEVICES": ""}),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"tuner run ended with {done.returncode}: {done.stderr[-2000:]}")
        trials = optuna.load_study(study_name="limited", storage=url).trials
    return count_ends([(trial.state.name, trial.user_attrs) for trial in trials])


def count_ends(trials: list[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Count trials, given as state and attributes, by how the limit met them."""
    out = [attrs for _, attrs in trials if attrs.get("reason") == "out_of_memory"]
    refused = [attrs for attrs in out if attrs["message"].startswith("not started")]
    whole = [attrs for _, attrs in trials if attrs.get("peak_bytes")]
    return {
        f"study of {len(trials)} trials under {LIMIT}": dict(Counter(state for state, _ in trials)),
        "trials started that ran out of memory": len(out) - len(refused),
        "trials not started": len(refused),
        "trials in micro-batches": sum("micro_batch" in attrs for _, attrs in trials),
        "highest peak of a trial, MB": max((attrs["peak_bytes"] for attrs in whole), default=0) / _MEGABYTE,
    }


def conclude(_: Mapping[str, list[float]], smoke: bool) -> dict[str, Any]:
    """Return the errors of the predictions, and how the study went."""
    rows = measure_all(smoke)
    errors = [row["predicted_mb"] / row["actual_mb"] - 1 for row in rows]
    sizes = sorted(abs(error) for error in errors)
    return {
        "predictions": len(rows),
        "median error": statistics.median(sizes),
        "largest error": sizes[-1],
        "signed errors": f"{min(errors):+.1%} to {max(errors):+.1%}",
        "medians by backbone": describe_backbones(rows),
        "share within 10 %": sum(size <= 0.1 for size in sizes) / len(sizes),
        **run_study(smoke=smoke),
        "rows": [{**row, "error": round(error, 4)} for row, error in zip(rows, errors, strict=True)],
    }


def describe_backbones(rows: list[dict[str, Any]]) -> str:
    """Return the median error of each backbone."""
    errors: dict[str, list[float]] = {}
    for row in rows:
        errors.setdefault(row["backbone"], []).append(abs(row["predicted_mb"] / row["actual_mb"] - 1))
    return ", ".join(f"{name} {statistics.median(each):.1%}" for name, each in errors.items())


CASE = Case(
    name="memory_admission",
    question="is the highest memory of training foreseen by two small probes, and does no trial die of a limit?",
    unit="MB, median over backbones, cuts, optimizers and batch sizes",
    baseline="actual peak",
    regression="a median error above 10 %, or a trial that was started and ran out of memory",
    arms={
        "actual peak": lambda _, smoke: statistics.median(row["actual_mb"] for row in measure_all(smoke)),
        "predicted peak": lambda _, smoke: statistics.median(row["predicted_mb"] for row in measure_all(smoke)),
    },
    n_repeats=1,
    warms_up=False,
    conclude=conclude,
)
