"""What retraining gave: the words for the terminal, and the files beside the model."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tuner.data.duplicates import Duplicates
from tuner.production.best import write_toml
from tuner.production.confusion_picture import draw_confusion
from tuner.production.evaluate import accuracy_interval, count_images, describe_scores
from tuner.training.metrics import Scores

METRICS_NAME = "metrics.json"
PICTURE_NAME = "confusion_matrix.png"
PARAMS_NAME = "params.toml"
NO_TEST = "no test split: no unbiased number"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A model folder, and what its model is worth."""

    folder: Path
    study: str
    number: int
    """Of the trial whose recipe was retrained."""
    objective: str
    search_value: float
    """The trial's value on val; the best of many, and so rather too good."""
    n_trained_images: int
    """Train and val."""
    classes: tuple[str, ...]
    test: Scores | None
    """From the one look at test; None without a test split."""
    test_duplicates: Duplicates | None = None
    """Test images that are among those of train and val too; None without a test split."""

    def to_json(self) -> dict[str, Any]:
        """Return what ``metrics.json`` holds."""
        return {
            "test": describe_scores(self.test, self.classes) if self.test else None,
            "test_duplicates": self.test_duplicates.to_json() if self.test_duplicates else None,
            "search": {
                "study": self.study,
                "trial": self.number,
                "objective": self.objective,
                "value": self.search_value,
            },
            "n_trained_images": self.n_trained_images,
        }


def describe_result(result: TrainResult) -> str:
    """Return a result for a person, with the next command to type."""
    lines = [f"model: {result.folder}"]
    if result.test is None:
        lines.append(NO_TEST)
    else:
        low, high = accuracy_interval(result.test)
        interval = f"95 % interval {low:.4f} to {high:.4f}, {count_images(result.test)} images"
        lines += [
            f"test accuracy {result.test.accuracy:.4f} ({interval})",
            f"test balanced accuracy {result.test.balanced_accuracy:.4f}, macro F1 {result.test.macro_f1:.4f}",
        ]
    lines += [
        f"in the search, trained on train alone: {result.objective} {result.search_value:.4f} (trial {result.number})",
        f"next: tuner predict {shlex.quote(str(result.folder))} IMAGES…",
    ]
    return "\n".join(lines)


def add_result_files(folder: Path, result: TrainResult, recipe_tables: dict[str, Any]) -> None:
    """Write metrics, picture and recipe beside a model.

    Args:
        folder: The model folder.
        result: Of the retraining.
        recipe_tables: What ``best_params`` returned.
    """
    metrics = json.dumps(result.to_json(), indent=1)
    (folder / METRICS_NAME).write_text(f"{metrics}\n", encoding="utf-8")
    (folder / PARAMS_NAME).write_text(write_toml(recipe_tables), encoding="utf-8")
    if result.test is not None:
        confusion = np.array(result.test.report.confusion_matrix)
        title = f"test accuracy {result.test.accuracy:.2%}, {count_images(result.test)} images"
        draw_confusion(folder / PICTURE_NAME, confusion, result.classes, title=title)
