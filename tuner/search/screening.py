"""The screen: head-only trials of every backbone before the search, and what the search starts with after them.

Screen trials are queued like any others and carry ``SCREEN_ATTR``; they do not count towards ``n_trials``. Everything
here is a function of the study file and of the stored trials, so a resumed study finds what a killed one began.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from tuner.search.distributions import SANE_LR, Point, list_values, project_value
from tuner.search.samplers import derive_seed, make_sampler
from tuner.search.trial_attrs import SCREEN_ATTR, is_confirmation, is_given_up
from tuner.spec.sections import StudySpec

DEEPER_ATTR = "after_screen"
"""User attribute of a trial that the screen proposed: its backbone and its level of unfrozen layers."""
N_KEPT_MIN = 3
"""Backbones that go on at least: ranks by heads mis-order fine-tuned ranks."""
_HEAD_ALONE = 1
_HEAD_LR_FACTOR = 100
_MAX_DRAWS = 16
"""Draws for each point that is wanted; a small finite space repeats itself."""


@dataclass(frozen=True, kw_only=True)
class QueuedPoint:
    """A point to enqueue, with the user attributes that tell later what it was for."""

    point: Point
    attrs: dict[str, Any]


def is_screen(trial: FrozenTrial) -> bool:
    """Whether a trial belongs to the screen."""
    return SCREEN_ATTR in trial.user_attrs


def is_counted(trial: FrozenTrial) -> bool:
    """Whether a trial counts towards ``n_trials``: COMPLETE or PRUNED, and proposed by the search."""
    return trial.state in {OptunaState.COMPLETE, OptunaState.PRUNED} and is_of_search(trial)


def is_of_search(trial: FrozenTrial) -> bool:
    """Whether the search itself proposed a trial: it neither belongs to the screen nor confirms another one."""
    return not is_screen(trial) and not is_confirmation(trial)


def list_screen_points(spec: StudySpec, distributions: Mapping[str, BaseDistribution]) -> list[QueuedPoint]:
    """Return the head configurations that the screen tries: ``search.screen`` of each backbone.

    Quasi-random points (scrambled Sobol) from the study's seed, another sequence for each backbone: the same list in
    every process, and a longer list begins with a shorter one. The head alone trains, at the least augmentation of
    the space, so that features can be kept.

    Args:
        spec: The checked study file, in which the head alone is a level.
        distributions: Of ``make_distributions``.

    Returns:
        The backbones in turn, in the order of the file. Fewer of each where its space has fewer points.
    """
    least: Point = {}
    if "unfrozen_layers" in distributions:
        least["unfrozen_layers"] = _HEAD_ALONE
    if "augmentation_strength" in distributions:
        least["augmentation_strength"] = project_value(0.0, distributions["augmentation_strength"])
    drawn = {name: each for name, each in distributions.items() if name != "backbone" and name not in least}
    queued = []
    for backbone in spec.backbone_names():
        fixed = least | ({"backbone": backbone} if "backbone" in distributions else {})
        for number, point in enumerate(_draw(drawn, spec.search.screen, derive_seed(spec.study.seed, backbone))):
            whole = point | fixed
            attrs = {SCREEN_ATTR: {"backbone": backbone, "number": number}}
            queued.append(QueuedPoint(point={name: whole[name] for name in distributions}, attrs=attrs))
    # In turn, so that one broken backbone does not keep the others from being seen.
    return sorted(queued, key=lambda each: int(each.attrs[SCREEN_ATTR]["number"]))


def _draw(distributions: Mapping[str, BaseDistribution], n_points: int, seed: int) -> list[Point]:
    """Return the first different points of a sequence, at most as many as are wanted."""
    study = optuna.create_study(sampler=make_sampler("qmc", study_seed=seed, n_stored=0))
    study.tell(study.ask(dict(distributions)), 0.0)  # Optuna begins the sequence behind a first trial
    points: list[Point] = []
    for _ in range(_MAX_DRAWS * n_points):
        point = study.ask(dict(distributions)).params
        if point not in points:
            points.append(point)
        if len(points) == n_points:
            break
    return points


def find_missing(queued: Iterable[QueuedPoint], trials: Sequence[FrozenTrial]) -> list[QueuedPoint]:
    """Return which points no trial stands for: neither finished nor given up nor waiting nor running.

    One that was told PRUNED stands for its point too, since a point that cannot be trained stays so.
    """
    kept = [trial.user_attrs for trial in trials if trial.state != OptunaState.FAIL or is_given_up(trial)]
    return [each for each in queued if not any(attrs.items() >= each.attrs.items() for attrs in kept)]


def rank_backbones(trials: Iterable[FrozenTrial], direction: StudyDirection) -> dict[str, FrozenTrial]:
    """Return each backbone's own best screen trial, the best backbone first.

    Each stands at its own best recipe: at one shared learning rate the order would be that of who likes this rate.
    """
    best: dict[str, FrozenTrial] = {}
    for trial in trials:
        if not is_screen(trial) or trial.state != OptunaState.COMPLETE:
            continue
        name = trial.user_attrs[SCREEN_ATTR]["backbone"]
        if name not in best or _score(trial, direction) > _score(best[name], direction):
            best[name] = trial
    return dict(sorted(best.items(), key=lambda item: _score(item[1], direction), reverse=True))


def _score(trial: FrozenTrial, direction: StudyDirection) -> float:
    """Return the value of a completed trial, the higher the better."""
    value = trial.value or 0.0
    return -value if direction == StudyDirection.MINIMIZE else value


def choose_deeper(
    trials: Iterable[FrozenTrial],
    direction: StudyDirection,
    spec: StudySpec,
    distributions: Mapping[str, BaseDistribution],
) -> list[QueuedPoint]:
    """Return what the search starts with: the best recipe of each backbone that goes on, with more layers unfrozen.

    The better half of the backbones goes on, three at least: each with the middle one of the deeper levels, and the
    best one with every layer too.

    Args:
        trials: Of the study; the screen's should be finished.
        direction: The study's.
        spec: The checked study file.
        distributions: Of ``make_distributions``.

    Returns:
        Points of the distributions, the best backbone's first; none where no level is deeper than the head.
    """
    levels = _list_deeper_levels(distributions)
    if not levels:
        return []
    ranked = rank_backbones(trials, direction)
    n_kept = max(N_KEPT_MIN, math.ceil(len(ranked) / 2))
    queued = []
    for rank, (backbone, trial) in enumerate(list(ranked.items())[:n_kept]):
        middle = levels[(len(levels) - 1) // 2]
        for level in sorted({middle, levels[-1]} if rank == 0 else {middle}):
            point = _deepen(trial.params, level, spec, distributions)
            attrs = {DEEPER_ATTR: {"backbone": backbone, "unfrozen_layers": level}}
            queued.append(QueuedPoint(point=point, attrs=attrs))
    return queued


def _list_deeper_levels(distributions: Mapping[str, BaseDistribution]) -> list[int]:
    if "unfrozen_layers" not in distributions:
        return []
    return sorted(level for level in list_values(distributions["unfrozen_layers"]) if level > _HEAD_ALONE)


def _deepen(point: Point, level: int, spec: StudySpec, distributions: Mapping[str, BaseDistribution]) -> Point:
    """Return a head's recipe for more layers, at a learning rate that they bear.

    A hundredth of the head's rate (the span that fastai's ``fine_tune`` lays over a model, ``lr_mult=100``), but not
    below what suits full fine-tuning and never above the head's own. Measured with adamw (mobilenetv2_100 on 244
    photos of ants and bees, mobilenetv3 on 300 of steel, 64 px, 6 epochs, one seed): heads were best at 0.1, the middle
    level and all layers at 1e-3 to 3e-3; at the head's rate these lost 0.20 to 0.49 of their accuracy.
    """
    deeper = point | {"unfrozen_layers": level}
    if "lr" in distributions:
        sane_lr = SANE_LR[str(point.get("optimizer", spec.training.optimizer or "adamw"))]
        wanted = min(point["lr"], max(point["lr"] / _HEAD_LR_FACTOR, sane_lr))
        deeper["lr"] = project_value(wanted, distributions["lr"])
    return deeper


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well the screen's order of the backbones foretold their order after deeper training."""

    spearman: float
    """Rank correlation of the backbones' best values, in [-1, 1]."""
    n_backbones: int
    """Backbones that have both values; at least three."""


def measure_agreement(trials: Iterable[FrozenTrial], direction: StudyDirection) -> Agreement | None:
    """Return Spearman's correlation between each backbone's best screen value and its best with more layers unfrozen.

    Returns:
        None with fewer than three backbones that have both, or where one of the two does not tell them apart.
    """
    trials = list(trials)
    scores: dict[str, list[float]] = defaultdict(list)
    for trial in trials:
        is_deeper = trial.user_attrs.get("unfrozen_layers_resolved", 0) > _HEAD_ALONE
        if is_deeper and trial.state == OptunaState.COMPLETE and is_of_search(trial) and "backbone" in trial.params:
            scores[trial.params["backbone"]].append(_score(trial, direction))
    pairs = [
        (_score(trial, direction), max(scores[name]))
        for name, trial in rank_backbones(trials, direction).items()
        if name in scores
    ]
    if len(pairs) < N_KEPT_MIN or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return None
    from scipy.stats import spearmanr

    return Agreement(spearman=float(spearmanr(*zip(*pairs, strict=True)).statistic), n_backbones=len(pairs))


def describe_agreement(agreement: Agreement) -> str:
    """Return an agreement for a person."""
    return (
        f"screen: the order of {agreement.n_backbones} backbones by their heads agrees with their order after deeper "
        f"training with Spearman's rho = {agreement.spearman:+.2f}"
    )
