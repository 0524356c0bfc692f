"""What earlier studies of a storage have found, as the first points of a new one."""

from collections.abc import Mapping
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from tuner.errors import StudyError
from tuner.search.confirmation import read_confirmation
from tuner.search.distributions import Point, list_values, project_value, resolve_unfrozen_layers
from tuner.search.studies import find_best, list_names, load_stored, read_params
from tuner.search.study_facts import explain_damage
from tuner.spec.sections import StudySpec
from tuner.spec.space import IntRange

WARM_ATTR = "warm_start"
"""User attribute of a trial that an earlier study proposed: that study and its trial."""


@dataclass(frozen=True, kw_only=True)
class WarmRecipe:
    """The best recipe of an earlier study."""

    recipe: Point
    """Resolved."""
    study: str
    trial: int


def read_warm_recipes(storage: RDBStorage, spec: StudySpec) -> list[WarmRecipe]:
    """Return the best recipe of each earlier study that the study file names, and where it comes from.

    Nothing for a study that has begun: its earlier studies may be gone.

    Raises:
        StudyError: If one of them is not in the storage, is this study, or has no completed trial.
    """
    if spec.warm_start is None or _has_begun(storage, spec.study.name):
        return []
    found = []
    for name in spec.warm_start.studies:
        if name == spec.study.name:
            raise StudyError(f"warm_start.studies: must name earlier studies, got {name!r}, which is this one")
        stored = load_stored(storage, name)
        trial = find_winner(stored.study)
        if trial is None:
            raise StudyError(f"warm_start.studies: must have completed trials, got none in {name!r}")
        found.append(WarmRecipe(recipe=read_params(trial), study=name, trial=trial.number))
    return found


def _has_begun(storage: RDBStorage, name: str) -> bool:
    return name in list_names(storage) and bool(
        optuna.load_study(storage=storage, study_name=name).get_trials(deepcopy=False)
    )


def project_recipe(
    recipe: Point, spec: StudySpec, distributions: Mapping[str, BaseDistribution], group_counts: Mapping[str, int]
) -> Point:
    """Return the point of a space that is nearest to a recipe.

    Args:
        recipe: Resolved, of another study.
        spec: The checked study file of the new one.
        distributions: Of ``make_distributions``.
        group_counts: Number of layer groups of each of the new study's backbones.
    """
    point = {name: project_value(recipe[name], each) for name, each in distributions.items()}
    searched = spec.space.get("unfrozen_layers")
    if isinstance(searched, IntRange) and searched.high == "all":
        n_groups = group_counts[str(point.get("backbone", spec.training.backbone))]
        n_levels = min(group_counts.values())
        point["unfrozen_layers"] = min(
            list_values(distributions["unfrozen_layers"]),
            key=lambda level: abs(
                resolve_unfrozen_layers(level, n_groups=n_groups, n_levels=n_levels) - recipe["unfrozen_layers"]
            ),
        )
    return point


def find_winner(study: optuna.Study) -> FrozenTrial | None:
    """Return the confirmed best trial; without a confirmation the best of the search; None if none completed.

    Raises:
        StudyError: If the confirmation cannot be read.
    """
    with explain_damage(f"study {study.study_name!r}: its confirmation"):
        confirmation = read_confirmation(study)
        if confirmation is None:
            return find_best(study)
        return study.get_trials(deepcopy=False)[confirmation.winner.trial]
