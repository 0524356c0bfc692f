"""Look at test again with a model folder: a model that another program went on training, say, or an older one."""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tuner.errors import DataError, ExportError
from tuner.production.locked_test import Announce, LookAtTest, look_at_test, open_test
from tuner.production.machine import choose_device, find_own_code, using_cores
from tuner.production.stored_recipe import StoredRecipe, read_data, read_recipe
from tuner.production.train_result import METRICS_NAME, add_test_pictures
from tuner.training.package import Manifest, read_manifest, read_package


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model folder's model is worth on a study's test split."""

    folder: Path
    study: str
    classes: tuple[str, ...]
    """In the order of the model's outputs."""
    test: LookAtTest

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as a JSON object."""
        return {"folder": str(self.folder), "study": self.study, "test": self.test.to_json(self.classes)}


def evaluate_folder(
    folder: str | Path,
    *,
    study: str | None = None,
    storage: str | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    allow_code: bool = False,
    announce: Announce | None = None,
) -> Evaluation:
    """Evaluate a model folder on the locked test split of a study, which is written into the study's book.

    Args:
        folder: What ``tuner train`` wrote, or a study kept.
        study: The study's name; default: the one that the model comes from.
        storage: SQLite URL; default: ``TUNER_STORAGE``, else ``sqlite:///studies.db``.
        out: A folder for the numbers and pictures; it is made, and files of the same names in it are replaced.
        device: ``auto``, ``cpu`` or ``cuda:N``.
        allow_code: Whether a backbone that is a user's function may be imported and called.
        announce: Told what is going on, a line at a time.

    Raises:
        ExportError: If there is no model folder, or it names no study.
        DataError: If the study has no test split, its classes are not the model's, or its images cannot be used.
        ModelError: If the model folder is broken, or would run code that was not allowed.
        StudyError, StorageError, DeviceError: If there is no such study, storage or device.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    name = study or manifest.provenance.get("study")
    if not isinstance(name, str):
        raise ExportError(f"{place}: must say which study it comes from, got none; name one (--study)")
    if allow_code:
        find_own_code()
    chosen = choose_device(device)
    recipe = read_recipe(name, storage)
    if recipe.facts.classes != manifest.classes:
        raise DataError(f"{place}: must have the classes of study {name!r}, got {len(manifest.classes)} others")
    _check_origin(manifest, recipe)
    if out is not None:
        _check_out(Path(out))
    data = read_data(recipe)
    with using_cores() as n_threads:
        test = open_test(recipe, data, n_threads=n_threads, manifest=manifest)
        if test is None:
            raise DataError(f"study {name!r}: must have a test split, got none; data.test_fraction keeps one back")
        model, _ = read_package(place, allow_code=allow_code)
        scores = look_at_test(
            [model],
            test,
            recipe,
            reason=f"evaluate: {place.resolve()}",
            temperature=manifest.temperature,
            preprocessing=manifest.preprocessing,
            precision=manifest.params.precision,
            batch_size=manifest.params.batch_size,
            device=chosen,
            announce=announce or (lambda _: None),
        )
    evaluation = Evaluation(folder=place, study=name, classes=manifest.classes, test=scores)
    if out is not None:
        _write_files(Path(out), evaluation)
    return evaluation


def _check_origin(manifest: Manifest, recipe: StoredRecipe) -> None:
    """Refuse a model that may have been trained on the test images.

    Raises:
        DataError: If it comes from other images or splits, or from no study that says so.
    """
    came_with = manifest.provenance.get("data_hash")
    is_same = manifest.provenance.get("study") == recipe.study if came_with is None else False
    if not is_same and came_with != recipe.facts.data_hash:
        raise DataError(
            f"study {recipe.study!r}: must have the images and splits that the model was trained with, got others; "
            "the model may have seen these test images"
        )


def _check_out(folder: Path) -> None:
    """Make the folder for the numbers, before the look at test that they come from."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".tuner-"):
            pass
    except OSError as error:
        raise ExportError(f"{folder}: must be a folder that can be written, got: {error.strerror or error}") from error


def _write_files(folder: Path, evaluation: Evaluation) -> None:
    text = json.dumps(evaluation.to_json(), indent=1)
    (folder / METRICS_NAME).write_text(f"{text}\n", encoding="utf-8")
    add_test_pictures(folder, evaluation.test, evaluation.classes)
