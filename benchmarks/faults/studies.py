"""The studies that faults strike: small, and different from each other."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.processes import Place
from benchmarks.study_file import write_study_file


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Who trains, and how large a study is."""

    name: str
    worker_module: str
    n_trials: int
    n_kills: int
    """Kills of one study."""
    slowness: float
    stall_limit: str
    """Long enough for a start on a busy machine: loading torch holds the interpreter."""
    backbones: tuple[str, ...]
    epochs: int
    n_side_by_side: int
    """Studies that run at the same time."""
    must_resume: bool = False
    """Whether a round in which no trial goes on from a checkpoint is a finding; not where one may have two kills."""


TORCH_FREE = Trainer(
    name="torch-free trainer",
    worker_module="benchmarks.faults.torch_free_worker",
    n_trials=120,
    n_kills=40,
    slowness=1.0,
    stall_limit="5s",
    backbones=("tuner:small_cnn", "test_resnet"),
    epochs=4,
    n_side_by_side=4,
)
REAL = Trainer(
    name="real training",
    worker_module="benchmarks.faults.real_worker",
    n_trials=40,
    n_kills=25,
    slowness=2.0,
    stall_limit="20s",
    backbones=("tuner:small_cnn",),
    epochs=4,
    n_side_by_side=2,
    must_resume=True,
)


def make_place(folder: Path, trainer: Trainer, source: random.Random, *, n_trials: int) -> Place:
    """Write a study into a new folder."""
    folder.mkdir(parents=True)
    place = Place(folder=folder, worker_module=trainer.worker_module)
    write_study_file(place.study_file, _draw_tables(trainer, source, n_trials))
    return place


def _draw_tables(trainer: Trainer, source: random.Random, n_trials: int) -> dict[str, dict[str, Any]]:
    return {
        "study": {"name": "struck", "seed": source.randrange(1000)},
        "data": {"source": "digits", "classes": ["7", "8", "9"], "image_size": 16},
        "space": {
            "backbone": {"choices": list(trainer.backbones)},
            "lr": {"low": 1e-4, "high": 1e-2, "log": True},
            "unfrozen_layers": {"low": 1, "high": "all"},
        },
        "backbones": {name: {"weights": "random"} for name in trainer.backbones},
        "training": {"batch_size": 64, "epochs": trainer.epochs, "horizontal_flip": False},
        "search": {
            "sampler": source.choice(("random", "random", "tpe", "qmc")),
            "pruner": source.choice(("median", "none", "asha")),
            "n_trials": n_trials,
            "screen": source.choice((0, 0, 3)),
        },
        # After every epoch: all of a trial takes less than a second.
        "workers": {"devices": "cpu", "stall_limit": trainer.stall_limit, "checkpoint_every": "0.001s"},
    }
