"""Does the cost model keep what frozen layers compute exactly where that saves time?

Twenty-four situations: five backbones, late cuts (others are not offered), one to six epochs, no augmentation or fixed
views, maps that are there or not, and trials that share them. Each is trained in a worker's session with `prefix_cache`
never, always and auto, in turn, on one thread. What a worker does once for each cut (tracing, verifying) is done before
the clock starts. A decision is wrong if the way that auto took was the slower one of the other two. The goal is at most
a tenth wrong.
"""

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases.step_overhead import one_thread
from benchmarks.harness import Case
from benchmarks.material import empty_cache

if TYPE_CHECKING:
    from tuner.service.messages import Verdict
    from tuner.service.training_session import TrainingSession
    from tuner.trial import TrialParams

GOAL = 0.1
_WAYS = ("never", "always", "auto")
_CLASSES = ["7", "8"]


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A trial, and what is there already."""

    backbone: str
    unfrozen_layers: int
    epochs: int = 3
    views: int = 0
    """0: no augmentation."""
    is_warm: bool = False
    n_trials: int = 1
    """Trials that need the same maps, all told to the first."""


_KINDS: tuple[dict[str, Any], ...] = (
    {"epochs": 1},
    {"epochs": 3},
    {"views": 3},
    {"views": 3, "is_warm": True},
    {"epochs": 6, "views": 2},
)
_LATE = (("mobilenetv2_035", 2), ("mobilenetv3_small_050", 3), ("resnet18", 2), ("test_vit", 2))
SITUATIONS = (
    *(Situation(backbone=name, unfrozen_layers=unfrozen, **kind) for name, unfrozen in _LATE for kind in _KINDS),
    Situation(backbone="resnet18", unfrozen_layers=3, epochs=2),
    Situation(backbone="mobilenetv2_035", unfrozen_layers=3, epochs=2),
    Situation(backbone="test_efficientnet", unfrozen_layers=3, epochs=4),
    Situation(backbone="test_efficientnet", unfrozen_layers=2, views=2, epochs=2, n_trials=3),
)
_SMOKE = (Situation(backbone="test_efficientnet", unfrozen_layers=2, epochs=1),)


class _Desk:
    """Stands in for the coordinator."""

    def __init__(self) -> None:
        self.features: list[str] = []

    def send(self, reply: object) -> None:
        from tuner.service.messages import GivenBack, TrialDone

        match reply:
            case TrialDone():
                if reply.outcome.state != "COMPLETE":
                    raise RuntimeError(reply.outcome.message)
                self.features.append(reply.usage.features)
            case GivenBack():
                raise RuntimeError(reply.reason)

    def ask_verdict(self, done: object) -> "Verdict":  # noqa: ARG002 - every trial goes on
        from tuner.service.messages import Verdict

        return Verdict()


def open_session(way: str, desk: _Desk, *, smoke: bool) -> "TrainingSession":
    """Return a worker's session on two digits, with random weights that are the same in every trial."""
    from tuner.service.study_data import read_study_data
    from tuner.service.training_session import TrainingSession
    from tuner.service.workbench import Workbench
    from tuner.spec.study import parse_spec

    names = sorted({situation.backbone for situation in (_SMOKE if smoke else SITUATIONS)})
    folder = Path(os.environ["TUNER_CACHE_DIR"])
    tables: dict[str, Any] = {
        "study": {"name": "cost"},
        "data": {"source": "digits", "classes": _CLASSES, "image_size": 32 if smoke else 64},
        "space": {"backbone": {"choices": names}},
        "backbones": {name: {"weights": str(_write_weights(folder, name))} for name in names},
        "training": {"lr": 1e-3, "unfrozen_layers": 2, "horizontal_flip": False},
        "workers": {"prefix_cache": way},
    }
    spec = parse_spec(tables, folder)
    bench = Workbench(spec, read_study_data(spec), device="cpu", n_threads=1, note=lambda _: None)
    return TrainingSession(bench, desk)


def _write_weights(folder: Path, name: str) -> Path:
    import timm
    import torch
    from safetensors.torch import save_file

    path = folder / f"{name}.safetensors"
    if not path.is_file():
        torch.manual_seed(0)
        kwargs: dict[str, Any] = {"img_size": 64} if name == "test_vit" else {}
        save_file(timm.create_model(name, num_classes=2, **kwargs).state_dict(), path)
    return path


def make_recipe(situation: Situation) -> "TrialParams":
    """Return the recipe of a situation."""
    from tuner.trial import TrialParams

    return TrialParams(
        backbone=situation.backbone,
        lr=1e-3,
        batch_size=32,
        unfrozen_layers=situation.unfrozen_layers,
        augmentation_strength=0.5 if situation.views else 0.0,
        optimizer="adamw",
        weight_decay=0.01,
        layer_decay=1.0,
        label_smoothing=0.0,
        dropout=0.0,
        warmup_fraction=0.1,
        momentum=0.9,
        epochs=situation.epochs,
        horizontal_flip=False,
        class_weights="none",
        seed=1,
        views=situation.views or "fresh",
    )


def time_way(session: "TrainingSession", desk: _Desk, situation: Situation) -> tuple[float, bool]:
    """Return the seconds of a situation's trials, and whether the first one was trained on kept maps."""
    from tuner.data.cache import clear_cache
    from tuner.service.messages import Train

    recipe = make_recipe(situation)

    def train(params: "TrialParams", n_sharing: int = 0) -> None:
        session.train(Train(data_hash="", members=((0, params),), uses_features=False, n_sharing=n_sharing))

    train(replace(recipe, epochs=1))  # traces and verifies
    if situation.is_warm:
        train(recipe, 99)
    else:
        clear_cache(["features"])
        session.release_memory()
    desk.features.clear()
    started = time.perf_counter()
    for number in range(situation.n_trials):
        train(replace(recipe, seed=number), situation.n_trials - 1 - number)
    return time.perf_counter() - started, desk.features[0] != "none"


@cache
def time_situations(seed: int, smoke: bool) -> tuple[dict[str, Any], ...]:
    """Time all situations, the three ways of each in turn."""
    with one_thread(), empty_cache():
        desks = {way: _Desk() for way in _WAYS}
        sessions = {way: open_session(way, desks[way], smoke=smoke) for way in _WAYS}
        rows = []
        for situation in _SMOKE if smoke else SITUATIONS:
            order = _WAYS[seed % 3 :] + _WAYS[: seed % 3]
            timed = {way: time_way(sessions[way], desks[way], situation) for way in order}
            seconds = {way: timed[way][0] for way in _WAYS}
            rows.append({**vars(situation), "seconds": seconds, "keeps": timed["auto"][1]})
    return tuple(rows)


def find_wrong(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the decisions after which the other way was faster, by the medians of a situation's rows."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        key = str({name: value for name, value in row.items() if name not in {"seconds", "keeps"}})
        grouped.setdefault(key, []).append(row)
    wrong = []
    for same in grouped.values():
        seconds = {way: statistics.median(row["seconds"][way] for row in same) for way in _WAYS}
        keeps = statistics.median(row["keeps"] for row in same) > 0
        if (seconds["always"] < seconds["never"]) is not keeps:
            wrong.append({**same[0], "seconds": seconds, "keeps": keeps})
    return wrong


def conclude(numbers: Mapping[str, list[float]], smoke: bool) -> dict[str, Any]:
    """Return how often the model was wrong, and all that was timed."""
    rows = [row for seed in range(len(numbers["auto"])) for row in time_situations(seed, smoke)]
    wrong = find_wrong(rows)
    n_situations = len(_SMOKE if smoke else SITUATIONS)
    return {
        "situations": n_situations,
        "wrong": len(wrong),
        "wrong_share": len(wrong) / n_situations,
        "wrong_ones": wrong,
    }


def _sum_way(way: str, seed: int, smoke: bool) -> float:
    return float(sum(row["seconds"][way] for row in time_situations(seed, smoke)))


CASE = Case(
    name="prefix_cost",
    question="how long do trials of many kinds take without kept maps, with them, and as the cost model decides?",
    unit="s",
    baseline="never",
    regression=f"more than {GOAL:.0%} of the decisions wrong",
    arms={
        "never": lambda seed, smoke: _sum_way("never", seed, smoke),
        "always": lambda seed, smoke: _sum_way("always", seed, smoke),
        "auto": lambda seed, smoke: _sum_way("auto", seed, smoke),
    },
    n_repeats=3,
    warms_up=False,
    conclude=conclude,
)
"""Frozen layers kept or computed again, in worker sessions."""
