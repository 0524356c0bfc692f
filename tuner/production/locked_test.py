"""The locked test split: opened, compared with what a model was trained on, and looked at, which is always recorded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tuner.data.content import list_digests
from tuner.data.duplicates import Compared, Duplicates, describe_exact, describe_near, find_duplicates
from tuner.data.image_set import ImageSet, load_image_set, move_to
from tuner.data.index import Split
from tuner.data.splits import has_test, unlock_test
from tuner.errors import DataError
from tuner.models.backbone import Preprocessing
from tuner.production.calibration import Calibration, measure_calibration
from tuner.production.evaluate import describe_scores
from tuner.production.machine import reporting_memory
from tuner.production.openings import check_writable, list_openings, record_opening
from tuner.production.stored_recipe import StoredRecipe
from tuner.service.study_data import StudyData
from tuner.training.batches import predict_logits
from tuner.training.metrics import Scores, score_logits
from tuner.training.package import Manifest
from tuner.trial import Precision

Announce = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class LookAtTest:
    """What one look at test showed."""

    scores: Scores
    """Of the first model."""
    accuracies: tuple[float, ...]
    """Of all models that were looked at, the first among them."""
    temperature: float
    as_trained: Calibration
    calibrated: Calibration
    """At the temperature."""

    def to_json(self, classes: tuple[str, ...]) -> dict[str, Any]:
        """Return the scores as a JSON object."""
        return describe_scores(self.scores, classes) | {
            "accuracies": list(self.accuracies),
            "temperature": self.temperature,
            "calibration": {"as_trained": self.as_trained.to_json(), "calibrated": self.calibrated.to_json()},
        }


def open_test(
    recipe: StoredRecipe, data: StudyData, *, n_threads: int, manifest: Manifest | None = None
) -> ImageSet | None:
    """Decode the test images, which no model sees by that; None if there is no test split.

    Args:
        recipe: Of the study.
        data: Its images.
        n_threads: Images decoded at a time.
        manifest: Of the model that takes them, where it is not the recipe's.

    Raises:
        DataError: If they cannot be decoded, or there are none of the study's classes.
        StorageError: If the look at them could not be recorded.
    """
    if not has_test(data.index, data.splits):
        return None
    check_writable(recipe.storage)
    test = load_images(recipe, data, Split.TEST, n_threads=n_threads, manifest=manifest)
    if not len(test.labels):
        raise DataError("data: test must hold images of the study's classes, got none")
    return test


def load_images(
    recipe: StoredRecipe, data: StudyData, *which: Split, n_threads: int, manifest: Manifest | None = None
) -> ImageSet:
    """Return the images of some splits as the study's recipe takes them, or as another model does."""
    section, interpolation = recipe.spec.data, recipe.preprocessing.interpolation
    if manifest is not None:
        section = section.model_copy(update={"image_size": manifest.image_size, "resize": manifest.resize})
        interpolation = manifest.preprocessing.interpolation
    return load_image_set(data.index, data.splits, section, which, interpolation=interpolation, n_threads=n_threads)


def compare_with_test(data: StudyData, test: ImageSet, trained: ImageSet, announce: Announce) -> Duplicates:
    """Say which test images are among those that the model will have seen."""
    index, _ = unlock_test(data.index, data.splits)

    def take(images: ImageSet) -> Compared:
        rows = images.rows.numpy()
        names = tuple(index.names[row] for row in rows)
        return Compared(names=names, digests=list_digests(index, rows), pixels=images.pixels.numpy())

    duplicates = find_duplicates(take(test), take(trained))
    for describe in (describe_exact, describe_near):
        for line in describe(duplicates, held_out="test", others="train + val"):
            announce(line)
    return duplicates


def look_at_test(
    models: Sequence[nn.Module],
    test: ImageSet,
    recipe: StoredRecipe,
    *,
    reason: str,
    temperature: float,
    preprocessing: Preprocessing,
    precision: Precision,
    batch_size: int,
    device: torch.device,
    announce: Announce,
) -> LookAtTest:
    """Evaluate models on test; the look is recorded first, so that no number is seen unrecorded.

    Args:
        models: At least one; the first is the one that counts.
        test: Of ``open_test``.
        recipe: Of the study whose test split it is.
        reason: Why it is looked at, for the study's book.
        temperature: Of the first model.
        preprocessing: Of the models.
        precision: Of the models.
        batch_size: Images taken at once, at least.
        device: Where to run.
        announce: Told what is going on.
    """
    n_earlier = len(list_openings(recipe.study, storage=recipe.storage))
    earlier = f"; earlier looks: {n_earlier}, and choosing between their numbers biases them"
    announce(f"looking at test once: {len(test.labels)} images{earlier if n_earlier else ''}")
    record_opening(recipe.study, reason, storage=recipe.storage)
    with reporting_memory(device, n_images=batch_size, advice="choose another --device"):
        images = move_to(test, device)
        labels = images.labels.to(device)
        logits = [
            predict_logits(model.to(device), images, preprocessing, device, precision=precision, batch_size=batch_size)
            for model in models
        ]
    scores = [score_logits(each, labels) for each in logits]
    return LookAtTest(
        scores=scores[0],
        accuracies=tuple(each.accuracy for each in scores),
        temperature=temperature,
        as_trained=measure_calibration(logits[0], labels),
        calibrated=measure_calibration(logits[0], labels, temperature=temperature),
    )
