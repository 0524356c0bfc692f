"""What training steps were measured to need, kept in the cache for later trials, workers and studies."""

import json
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tuner.paths import cache_root, replacing
from tuner.training.batches import find_dtype
from tuner.training.device import computes_in_bfloat16
from tuner.training.loop import TrainingJob
from tuner.training.memory import MemoryNeed
from tuner.training.memory_meter import list_tensors, name_processor

_FORMAT = 2


def describe_training(job: TrainingJob, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that a training's need depends on, as for JSON: neither weights nor the size of the batch do.

    Args:
        job: The training.
        kwargs: Of its backbone's section.
    """
    params = job.params
    shapes = [(str(each.dtype), tuple(each.shape)) for each in list_tensors(job.model)]
    return {
        "format": _FORMAT,
        "backbone": params.backbone,
        "kwargs": dict(kwargs),
        "shapes": sha256(repr(shapes).encode()).hexdigest(),
        "unfrozen_layers": params.unfrozen_layers,
        "on_maps": job.cached is not None,
        "n_classes": job.train.n_classes,
        "image_size": job.train.pixels.shape[-1],
        "optimizer": params.optimizer,
        "has_momentum": params.momentum > 0,
        "dtype": str(find_dtype(job.model)),
        "in_bfloat16": computes_in_bfloat16(job.device, params.precision),
        "device": name_processor(job.device),
        "versions": {"torch": torch.__version__, "timm": version("timm")},
    }


class MemoryNeeds:
    """The needs that are known. Mutable: a copy in memory serves where the cache cannot be written, or was cleared."""

    def __init__(self) -> None:
        self._known: dict[Path, MemoryNeed] = {}

    def find(self, facts: Mapping[str, Any]) -> MemoryNeed | None:
        """Return the need of trainings of which ``describe_training`` says so, as whoever learnt last has left it."""
        path = _find_place(facts)
        # Not the system's faults, nor what another version or a torn file holds: it is measured again.
        with suppress(OSError, ValueError, LookupError, TypeError):
            self._known[path] = MemoryNeed.from_json(json.loads(path.read_text(encoding="utf-8"))["need"])
        return self._known.get(path)

    def keep(self, facts: Mapping[str, Any], need: MemoryNeed) -> None:
        """Remember a need in place of what was known."""
        path = _find_place(facts)
        self._known[path] = need
        text = f"memory of a training step of {facts['backbone']} at {facts['image_size']} px"
        with suppress(OSError), replacing(path) as temporary:
            content = {"text": text, "facts": dict(facts), "need": need.to_json()}
            temporary.write_text(json.dumps(content, default=str), encoding="utf-8")


def _find_place(facts: Mapping[str, Any]) -> Path:
    digest = sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_root() / "memory" / f"{digest}.json"
