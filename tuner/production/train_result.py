"""What retraining gave: the words for the terminal, and the files beside the model."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from tuner.data.duplicates import Duplicates
from tuner.production.best import write_toml
from tuner.production.confusion_picture import draw_confusion
from tuner.production.evaluate import accuracy_interval, count_images
from tuner.production.locked_test import LookAtTest
from tuner.production.model_card import CARD_NAME, CARD_TEXT_NAME, make_card, write_card_text
from tuner.production.score_pictures import draw_calibration, draw_scores
from tuner.production.stored_recipe import StoredRecipe

METRICS_NAME = "metrics.json"
CONFUSION_NAME = "confusion_matrix.png"
SCORES_NAME = "scores.png"
CALIBRATION_NAME = "calibration.png"
PARAMS_NAME = "params.toml"
_MAX_STORED_CLASSES = 100
"""A matrix of more would slow down every reader of the database."""
NO_TEST = "no test split: no unbiased number"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A model folder, and what its model is worth."""

    folder: Path
    recipe: StoredRecipe
    """Of the trial that was retrained, with its study; its value on val is the best of many, and so rather too good."""
    seeds: tuple[int, ...]
    """Of the models that were trained; the first one is in the folder."""
    n_trained_images: int
    """Train and val."""
    temperature: float
    """Divides the logits; fitted on val with a model that has not seen it."""
    seconds: float
    """Of all trainings."""
    device: str
    n_threads: int
    versions: dict[str, str]
    test: LookAtTest | None
    """From the one look at test; None without a test split."""
    test_duplicates: Duplicates | None = None
    """Test images that are among those of train and val too; None without a test split."""

    @property
    def number(self) -> int:
        """The number of the trial whose recipe was retrained."""
        return self.recipe.number

    @property
    def search_value(self) -> float:
        """The trial's value in the search."""
        return self.recipe.value

    @property
    def classes(self) -> tuple[str, ...]:
        """In the order of the model's outputs."""
        return self.recipe.facts.classes

    def to_json(self) -> dict[str, Any]:
        """Return what ``metrics.json`` holds."""
        return {
            "test": self.test.to_json(self.classes) if self.test else None,
            "test_duplicates": self.test_duplicates.to_json() if self.test_duplicates else None,
            "search": {
                "study": self.recipe.study,
                "trial": self.number,
                "objective": self.recipe.spec.study.objective,
                "value": self.search_value,
            },
            "confirmed": self.recipe.tables.get("confirmed"),
            "temperature": self.temperature,
            "seeds": list(self.seeds),
            "n_trained_images": self.n_trained_images,
        }


def describe_result(result: TrainResult) -> str:
    """Return a result for a person, with the next command to type."""
    lines = [f"model: {result.folder}", *([NO_TEST] if result.test is None else describe_test(result.test))]
    objective = result.recipe.spec.study.objective
    lines.append(
        f"in the search, trained on train alone: {objective} {result.search_value:.4f} (trial {result.number})"
    )
    if confirmed := result.recipe.tables.get("confirmed"):
        interval = confirmed.get("accuracy_interval_95")
        predicted = f"; predicted accuracy {interval[0]:.4f} to {interval[1]:.4f}" if interval else ""
        lines.append(f"confirmed on fresh seeds: {objective} {confirmed['mean']:.4f}{predicted}")
    folder = shlex.quote(str(result.folder))
    lines += [f"next: tuner predict {folder} IMAGES…", f"      tuner verify {folder}"]
    return "\n".join(lines[:-1] if confirmed is None else lines)


def describe_test(test: LookAtTest) -> list[str]:
    """Return what a look at test showed, for a person."""
    low, high = accuracy_interval(test.scores)
    interval = f"95 % interval {low:.4f} to {high:.4f}, {count_images(test.scores)} images"
    lines = [
        f"test accuracy {test.scores.accuracy:.4f} ({interval})",
        f"test balanced accuracy {test.scores.balanced_accuracy:.4f}, macro F1 {test.scores.macro_f1:.4f}",
        (
            f"test calibration error {test.calibrated.ece:.4f} at temperature {test.temperature:.3g}, "
            f"{test.as_trained.ece:.4f} without"
        ),
    ]
    if len(test.accuracies) > 1:
        mean, spread = fmean(test.accuracies), stdev(test.accuracies)
        lines.append(f"test accuracy of {len(test.accuracies)} seeds: {mean:.4f} ± {spread:.4f}; the first is kept")
    return lines


def describe_trained(result: TrainResult) -> dict[str, Any]:
    """Return what is kept with the study of a retraining; of many classes not each by itself."""
    test = result.to_json()["test"]
    if test is not None and len(result.classes) > _MAX_STORED_CLASSES:
        test = {key: value for key, value in test.items() if key not in {"classes", "confusion_matrix"}}
    return {"trial": result.number, "folder": str(result.folder.resolve()), "test": test}


def add_result_files(folder: Path, result: TrainResult) -> None:
    """Write metrics, pictures, recipe and card beside a model."""
    _write_json(folder / METRICS_NAME, result.to_json())
    (folder / PARAMS_NAME).write_text(write_toml(result.recipe.tables), encoding="utf-8")
    if result.test is not None:
        add_test_pictures(folder, result.test, result.classes)
    card = make_card(
        result.recipe,
        training={
            "trained_on": "train + val",
            "n_images": result.n_trained_images,
            "seeds": list(result.seeds),
            "device": result.device,
            "n_threads": result.n_threads,
            "seconds": round(result.seconds, 1),
            "temperature": result.temperature,
        },
        versions=result.versions,
        test=result.to_json()["test"],
    )
    _write_json(folder / CARD_NAME, card)
    (folder / CARD_TEXT_NAME).write_text(write_card_text(card), encoding="utf-8")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def add_test_pictures(folder: Path, test: LookAtTest, classes: tuple[str, ...]) -> None:
    """Write what a look at test showed as pictures."""
    confusion = np.array(test.scores.report.confusion_matrix)
    title = f"test accuracy {test.scores.accuracy:.2%}, {count_images(test.scores)} images"
    draw_confusion(folder / CONFUSION_NAME, confusion, classes, title=title)
    draw_scores(folder / SCORES_NAME, test.scores, classes)
    draw_calibration(folder / CALIBRATION_NAME, test.as_trained, test.calibrated, temperature=test.temperature)
