"""From the study file's space to Optuna's distributions, and from what Optuna suggests to a resolved recipe."""

import itertools
import math
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from tuner.errors import SpecError
from tuner.spec.sections import StudySpec
from tuner.spec.space import PARAMETERS, Choices, Distribution, FloatRange, IntRange
from tuner.trial import TrialParams

Point = dict[str, Any]
"""What Optuna suggests: one value for each param of the space."""

SANE_LR = {"adamw": 3e-4, "adam": 3e-4, "sgd": 1e-2}
"""A learning rate at which full fine-tuning goes well, by optimizer."""
_DECIDING_MAPS = ("backbone", "unfrozen_layers", "augmentation_strength")


def make_distributions(spec: StudySpec, group_counts: Mapping[str, int]) -> dict[str, BaseDistribution]:
    """Return Optuna's distributions for the space of a study, under the same names and in the same order.

    Args:
        spec: The checked study file.
        group_counts: Number of layer groups of each backbone. The smallest is what ``high = "all"`` stands for.
    """
    n_levels = min(group_counts.values())
    return {name: _make_distribution(distribution, n_levels) for name, distribution in spec.space.items()}


def _make_distribution(distribution: Distribution, n_levels: int) -> BaseDistribution:
    match distribution:
        case Choices():
            return CategoricalDistribution(distribution.choices)
        case FloatRange():
            return FloatDistribution(distribution.low, distribution.high, log=distribution.log, step=distribution.step)
        case IntRange():
            high = n_levels if distribution.high == "all" else distribution.high
            high -= (high - distribution.low) % distribution.step
            return IntDistribution(distribution.low, high, log=distribution.log, step=distribution.step)


def check_group_counts(spec: StudySpec, group_counts: Mapping[str, int]) -> None:
    """Check every number of unfrozen layers that the study file names against the backbones.

    Raises:
        SpecError: If a number exceeds the smallest number of layer groups.
    """
    smallest = min(group_counts, key=lambda name: group_counts[name])
    limit = group_counts[smallest]
    named: list[tuple[str, Any]] = [("training.unfrozen_layers", spec.training.unfrozen_layers)]
    match spec.space.get("unfrozen_layers"):
        case IntRange() as searched:
            named += [("space.unfrozen_layers.low", searched.low), ("space.unfrozen_layers.high", searched.high)]
        case Choices() as searched:
            named += [("space.unfrozen_layers.choices", choice) for choice in searched.choices]
    # Optuna only warns about a queued value that is out of range, and uses it.
    named += [
        (f"enqueue[{number}].unfrozen_layers", entry.get("unfrozen_layers"))
        for number, entry in enumerate(spec.enqueue, start=1)
    ]
    problems = [
        f"{where}: must not exceed {limit}, the number of layer groups of {smallest}, got {value}"
        + ('; high = "all" reaches every group of every backbone' if where.endswith("high") else "")
        for where, value in named
        if isinstance(value, int) and value > limit
    ]
    if problems:
        raise SpecError(problems)


def resolve_unfrozen_layers(level: int, *, n_groups: int, n_levels: int) -> int:
    """Spread levels 1…L evenly over a backbone's layer groups 1…n, both ends included.

    Args:
        level: From 1 to ``n_levels``.
        n_groups: Layer groups of the backbone, at least ``n_levels``.
        n_levels: Smallest number of layer groups of the study's backbones.

    Returns:
        ``round(1 + (level - 1) * (n_groups - 1) / (n_levels - 1))``. Different levels give different counts;
        counts in between are unreachable.
    """
    if n_levels == 1:
        return 1
    return round(1 + (level - 1) * (n_groups - 1) / (n_levels - 1))


def resolve_params(spec: StudySpec, point: Point, group_counts: Mapping[str, int], *, seed: int) -> TrialParams:
    """Return the whole recipe of a trial: suggested values, fixed values and defaults.

    Args:
        spec: The checked study file.
        point: What Optuna suggested.
        group_counts: Number of layer groups of each backbone.
        seed: The trial's seed.
    """
    values: Point = {name: parameter.default for name, parameter in PARAMETERS.items()}
    values |= spec.fixed_params() | point
    values["unfrozen_layers"] = _count_unfrozen(spec, values["unfrozen_layers"], values["backbone"], group_counts)
    recipe: Point = {
        name: float(value) if PARAMETERS[name].kind == "float" else value for name, value in values.items()
    }
    return TrialParams(
        **recipe,
        epochs=spec.training.epochs,
        horizontal_flip=spec.training.horizontal_flip,
        class_weights=spec.training.class_weights,
        seed=seed,
        views=spec.training.views,
        precision=spec.training.precision,
        view_seed=spec.study.seed,
    )


def project_default_recipe(spec: StudySpec, distributions: Mapping[str, BaseDistribution]) -> Point:
    """Return the point nearest to a sane fine-tuning recipe: trial 0 where the user enqueues nothing.

    Full fine-tuning of the first backbone, batch 32, mild augmentation, and the learning rate that suits the
    optimizer; params without such a value take their default.
    """
    optimizer = project_value("adamw", distributions["optimizer"]) if "optimizer" in distributions else None
    wanted: Point = {name: parameter.default for name, parameter in PARAMETERS.items()}
    wanted |= {
        "lr": SANE_LR[optimizer or str(spec.training.optimizer or "adamw")],
        "batch_size": 32,
        "unfrozen_layers": sys.maxsize,
        "augmentation_strength": 0.25,
    }
    return {name: project_value(wanted[name], distribution) for name, distribution in distributions.items()}


def project_value(value: Any, distribution: BaseDistribution) -> Any:
    """Return the distribution's point that is nearest to a value; the first choice where there is no distance."""
    if isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices
        if value in choices:
            return value
        if isinstance(value, int | float) and all(isinstance(choice, int | float) for choice in choices):
            return min(choices, key=lambda choice: abs(float(choice) - value))  # type: ignore[arg-type]
        return choices[0]
    assert isinstance(distribution, FloatDistribution | IntDistribution)  # noqa: S101 - Optuna has no other kinds
    low, high, step = distribution.low, distribution.high, distribution.step
    clipped = min(max(value, low), high)
    if step is None:
        return clipped
    nearest = low + round((clipped - low) / step) * step
    return int(nearest) if isinstance(distribution, IntDistribution) else min(nearest, high)


def list_grid(distributions: Mapping[str, BaseDistribution], *, seed: int) -> list[Point]:
    """Return every point of a finite space, each once, in an order that the seed shuffles.

    The shuffle makes any part of the grid that the budget allows a fair sample of it.
    """
    points = [
        dict(zip(distributions, values, strict=True))
        for values in itertools.product(*(list(list_values(each)) for each in distributions.values()))
    ]
    random.Random(seed).shuffle(points)  # noqa: S311 - an order, not a secret
    return points


def find_untried(points: Iterable[Point], tried: Iterable[Point]) -> Point | None:
    """Return the first point that has not been tried; None if there is none."""
    known = set(map(_freeze, tried))
    return next((point for point in points if _freeze(point) not in known), None)


def _freeze(point: Point) -> tuple[tuple[str, Any], ...]:
    return tuple(
        sorted((name, round(value, 12) if isinstance(value, float) else value) for name, value in point.items())
    )


def list_values(distribution: BaseDistribution) -> Iterator[Any]:
    """Yield every value of a finite distribution.

    Raises:
        TypeError: If it is not finite.
    """
    match distribution:
        case CategoricalDistribution():
            yield from distribution.choices
        case IntDistribution():
            yield from range(distribution.low, distribution.high + 1, distribution.step)
        case FloatDistribution(step=float(step)):
            # In decimals, as Optuna does: 3 * 0.1 would lie above a high of 0.3.
            low, exact_step = Decimal(str(distribution.low)), Decimal(str(step))
            n_steps = round((distribution.high - distribution.low) / step)
            yield from (float(low + number * exact_step) for number in range(n_steps + 1))
        case _:
            raise TypeError(f"not finite: {distribution}")


def count_grid(distributions: Mapping[str, BaseDistribution]) -> int:
    """Return how many points a finite space has."""
    return math.prod(len(list(list_values(each))) for each in distributions.values())


def count_map_kinds(distributions: Mapping[str, BaseDistribution]) -> float:
    """Return how many kinds of maps of frozen layers trials may need; infinity if the strength is continuous."""
    deciding = {name: distributions[name] for name in _DECIDING_MAPS if name in distributions}
    is_continuous = any(isinstance(each, FloatDistribution) and each.step is None for each in deciding.values())
    return math.inf if is_continuous else count_grid(deciding)


def list_unfrozen(spec: StudySpec, group_counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return the numbers of unfrozen layers that trials of each backbone may have, in ascending order."""
    searched = make_distributions(spec, group_counts).get("unfrozen_layers")
    fixed = spec.fixed_params().get("unfrozen_layers", PARAMETERS["unfrozen_layers"].default)
    values = [fixed] if searched is None else list(list_values(searched))
    counts = {name: {_count_unfrozen(spec, value, name, group_counts) for value in values} for name in group_counts}
    return {name: tuple(sorted(found)) for name, found in counts.items()}


def _count_unfrozen(spec: StudySpec, value: Any, backbone: str, group_counts: Mapping[str, int]) -> int:
    """Return how many layer groups of a backbone train at a value of ``unfrozen_layers``."""
    searched = spec.space.get("unfrozen_layers")
    if value == "all":
        return group_counts[backbone]
    if isinstance(searched, IntRange) and searched.high == "all":
        return resolve_unfrozen_layers(value, n_groups=group_counts[backbone], n_levels=min(group_counts.values()))
    return int(value)
