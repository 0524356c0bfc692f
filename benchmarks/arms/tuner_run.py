"""Run arm D: ``python -m tuner run`` on a study file, with an empty cache and a new database."""

import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from benchmarks.arms.job import ArmJob, ArmRun, Line
from benchmarks.processes import watch
from benchmarks.study_file import write_study_file

_RECIPE = (
    "backbone",
    "lr",
    "batch_size",
    "unfrozen_layers",
    "augmentation_strength",
    "weight_decay",
    "label_smoothing",
)
"""What the plain script takes of a recipe; the rest has its default in both."""
_TRIAL_LINE = re.compile(r"^trial \d+: ")
_WORKER_LINE = re.compile(r"^worker \d+: ")


def run_tuner(
    job: ArmJob, *, screen: int = 0, views: int | Literal["fresh"] = "fresh", prefix_cache: str = "auto"
) -> ArmRun:
    """Search with tuner.

    Args:
        job: What to search.
        screen: ``[search] screen``; 0 leaves the key out.
        views: ``[training] views``.
        prefix_cache: ``[workers] prefix_cache``.
    """
    study_file = job.folder / "study.toml"
    write_study_file(study_file, make_tables(job, screen=screen, views=views, prefix_cache=prefix_cache))
    url = f"sqlite:///{job.folder}/studies.db"
    command = ["-P", "-m", "tuner", "run", str(study_file), "--storage", url]
    started = time.time()
    watched = watch(
        [command],
        environment={"TUNER_CACHE_DIR": str(job.folder / "cache")},
        seconds=60 * job.minutes,
        started=started,
    )
    lines = read_trials(job.folder / "studies.db", started)
    return ArmRun(
        lines=[line for line in lines if line["seconds"] <= 60 * job.minutes],
        seconds=watched.seconds,
        timed_out=watched.timed_out,
        error=watched.error,
        floor=read_floor(watched.timeline),
    )


def make_tables(
    job: ArmJob, *, screen: int, views: int | Literal["fresh"], prefix_cache: str
) -> dict[str, dict[str, Any]]:
    """Return the tables of the study file."""
    material = job.material
    names = list(material.backbones)
    training: dict[str, Any] = {"epochs": job.epochs, "horizontal_flip": material.horizontal_flip, **job.space.fixed}
    training |= {"precision": job.precision}
    search: dict[str, Any] = {"sampler": "tpe", "pruner": "median", "n_trials": job.n_trials}
    tables: dict[str, dict[str, Any]] = {
        "study": {"name": "bench", "seed": job.seed},
        "data": {"source": "image_folder", "path": str(material.folder), "image_size": material.image_size},
        "space": job.space.with_backbones(names),
        "backbones": {name: {**facts, "interpolation": "bicubic"} for name, facts in material.backbones.items()},
        "training": training | {"views": views},
        "search": search | ({"screen": screen} if screen else {}),
        "workers": {"devices": job.device, "prefix_cache": prefix_cache},
    }
    return tables | _first_point(job, names[0])


def _first_point(job: ArmJob, backbone: str) -> dict[str, dict[str, Any]]:
    """Return the queue, unless its point holds ``all``: that is where tuner begins by itself."""
    point = {"backbone": backbone, **job.space.first_point}
    return {} if "all" in point.values() else {"[enqueue]": point}


def read_trials(database: Path, started: float) -> list[Line]:
    """Return the finished trials of a database, through Optuna alone.

    Args:
        database: What ``tuner run`` wrote; none gives no trials.
        started: Unix seconds that times count from.
    """
    if not database.is_file():
        return []
    storage = optuna.storages.RDBStorage(f"sqlite:///{database}")
    study = optuna.load_study(study_name="bench", storage=storage)
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    storage.engine.dispose()
    return sorted((_make_line(trial, started) for trial in finished), key=lambda line: line["seconds"])


def _make_line(trial: FrozenTrial, started: float) -> Line:
    resolved = trial.user_attrs.get("params_resolved", trial.params)
    assert isinstance(trial.datetime_complete, datetime)
    return {
        "seconds": trial.datetime_complete.timestamp() - started,
        "number": trial.number,
        "state": trial.state.name,
        "value": trial.value if trial.state is TrialState.COMPLETE else None,
        "epochs": len(trial.intermediate_values),
        "screen": bool(trial.user_attrs.get("screen")),
        "recipe": {name: resolved[name] for name in _RECIPE if name in resolved},
    }


def read_floor(timeline: list[tuple[float, str]]) -> dict[str, float]:
    """Return the seconds of each step before the first finished trial, as far as the printed lines show them.

    Args:
        timeline: Seconds and lines, in order.
    """
    floor: dict[str, float] = {}
    step, since = "imports of the coordinator", 0.0
    for seconds, text in timeline:
        is_trial = bool(_TRIAL_LINE.match(text))
        if is_trial:
            step += ", and the first trial"
        elif not _WORKER_LINE.match(text):
            continue  # a note
        floor[step] = round(floor.get(step, 0.0) + seconds - since, 3)
        if is_trial:
            break
        step, since = _WORKER_LINE.sub("", text), seconds
    return floor
