"""What retraining starts from: the best trial's recipe, and the study's images and weights, still the same ones."""

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from optuna.exceptions import StorageInternalError

from tuner.data.splits import unpack_splits
from tuner.errors import DataError, ModelError, StorageError
from tuner.models.backbone import Preprocessing
from tuner.models.weights import find_weights
from tuner.production.best import best_params
from tuner.production.machine import find_own_code
from tuner.production.reading import open_stored
from tuner.search.confirmation import Confirmation, count_search_trials, predict, read_confirmation
from tuner.search.ledger import RETRAINS_ATTR, Ledger, read_ledger
from tuner.search.study_facts import StudyFacts, explain_damage
from tuner.service.study_data import StudyData, read_study_data
from tuner.spec.own_code import check_code, is_users_code
from tuner.spec.sections import BackboneSection, StudySpec
from tuner.training.pretrain import identify_pretraining
from tuner.trial import TrialParams

TRAINED_ATTR = "tuner:trained"
"""User attribute of the study: what the last retraining gave."""


@dataclass(frozen=True, kw_only=True)
class StoredRecipe:
    """The best trial of a stored study, with the study around it."""

    study: str
    storage: str
    """URL."""
    spec: StudySpec
    facts: StudyFacts
    tables: dict[str, Any]
    """What ``best_params`` returned."""
    confirmation: Confirmation | None
    ledger: Ledger
    n_trials: int
    """That have ended, of the screen and of the confirmation too."""
    n_completed: int
    """Of them, those of the search that completed."""

    @property
    def number(self) -> int:
        """The trial's number."""
        return int(self.tables["trial"]["number"])

    @property
    def value(self) -> float:
        """The trial's value in the search."""
        return float(self.tables["trial"]["value"])

    @property
    def micro_batch(self) -> int | None:
        """How many images the trial, or those that confirm it, took at a time, if whole batches did not fit."""
        found = self.tables["trial"].get("micro_batch")
        return None if found is None else int(found)

    @property
    def n_at_once(self) -> int:
        """How many images a step takes at a time."""
        return self.micro_batch or self.params.batch_size

    @property
    def params(self) -> TrialParams:
        """The trial's resolved recipe."""
        return TrialParams.from_json(self.tables["params"])

    @property
    def section(self) -> BackboneSection:
        """How its backbone is made."""
        return self.spec.backbones.get(self.params.backbone, BackboneSection())

    @property
    def preprocessing(self) -> Preprocessing:
        """How its images were prepared in the search."""
        data = self.tables["data"]
        return Preprocessing(mean=tuple(data["mean"]), std=tuple(data["std"]), interpolation=data["interpolation"])


def read_recipe(study: str, storage: str | None, trial: int | None = None) -> StoredRecipe:
    """Read the best recipe of a study, or that of one of its trials.

    Raises:
        ExportError: If no trial completed.
        StudyError, StorageError: If there is no such study.
    """
    tables = best_params(study, storage=storage, trial=trial)
    with open_stored(study, storage) as (stored, url), explain_damage(f"study {study!r}"):
        return StoredRecipe(
            study=study,
            storage=url,
            spec=stored.spec,
            facts=stored.facts,
            tables=tables,
            confirmation=read_confirmation(stored.study),
            ledger=read_ledger(stored.study),
            n_completed=count_search_trials(stored.study),
            n_trials=sum(trial.state.is_finished() for trial in stored.study.get_trials(deepcopy=False)),
        )


def expect_test(recipe: StoredRecipe, n_test: int) -> StoredRecipe:
    """Return a recipe whose prediction is for so many test images; some data sets list theirs only when opened."""
    found = recipe.confirmation
    if found is None or found.winner.trial != recipe.number or found.prediction.n_test == n_test:
        return recipe
    counts = recipe.facts.split_counts | {"test": n_test}
    prediction = predict(found.candidates, found.objective, counts=counts, n_folds=found.n_folds)
    interval = {"accuracy_interval_95": [prediction.low, prediction.high]}
    return replace(
        recipe,
        confirmation=replace(found, prediction=prediction),
        tables=recipe.tables | {"confirmed": recipe.tables["confirmed"] | interval},
    )


def record_retraining(recipe: StoredRecipe, seconds: float, trained: dict[str, Any]) -> None:
    """Add a retraining to the study's bill, and what it gave for the report; a database in the way costs both.

    Args:
        recipe: That was retrained.
        seconds: Of the device.
        trained: What its model showed, as JSON.
    """
    with suppress(StorageError, StorageInternalError), open_stored(recipe.study, recipe.storage) as (stored, _):
        earlier = stored.study.user_attrs.get(RETRAINS_ATTR, [])
        stored.study.set_user_attr(RETRAINS_ATTR, [*earlier, round(seconds, 1)])
        stored.study.set_user_attr(TRAINED_ATTR, trained)


def permit_code(recipe: StoredRecipe, *, allow_code: bool) -> None:
    """Refuse a backbone that is a user's function, unless it is allowed: a stored study alone imports nothing.

    Raises:
        ModelError: If it is not allowed.
    """
    check_code(recipe.params.backbone, allow_code=allow_code, where=f"study {recipe.study!r}", kind="study")
    if is_users_code(recipe.params.backbone):
        find_own_code()


def read_data(recipe: StoredRecipe) -> StudyData:
    """Look at the study's images again.

    Raises:
        DataError: If they cannot be used, or are not those that the study was made with.
        StudyError: If the stored splits cannot be read.
    """
    data, facts = read_study_data(recipe.spec), recipe.facts
    is_same = data.hash == facts.data_hash
    if is_same:
        with explain_damage(f"study {recipe.study!r}"):
            is_same = np.array_equal(unpack_splits(facts.splits, len(data.splits)), data.splits)
    if not is_same:
        n_then = sum(facts.split_counts.values())
        raise DataError(
            f"data: must be the images of the study, got other images, labels or splits ({n_then} images of "
            f"{len(facts.classes)} classes then, {len(data.splits)} of {len(data.index.classes)} now); "
            f"restore them, or search again under another study.name"
        )
    return data


def compare_weights(recipe: StoredRecipe) -> str:
    """Check that the recipe starts from the weights that the search started from. Nothing is downloaded.

    Returns:
        A note for the user if the backbone will be pretrained otherwise than in the search, else nothing.

    Raises:
        DataError: If the source data set of pretraining cannot be used.
        ModelError: If the weights cannot be had, or are others.
    """
    backbone = recipe.params.backbone
    with explain_damage(f"study {recipe.study!r}"):
        then = recipe.facts.weights[backbone]
    if recipe.spec.pretraining is not None:
        is_same = identify_pretraining(backbone, recipe.spec) == then
        return "" if is_same else f"pretraining of {backbone}: other data than in the search, made anew"
    info = find_weights(backbone, recipe.section)
    if info.fingerprint != then:
        raise ModelError(
            f'backbones."{backbone}".weights: must be the weights of the study, got others in {info.detail}; '
            f"restore them"
        )
    return ""
