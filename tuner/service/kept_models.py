"""Where the models of a study are kept: beside the database, so that clearing caches loses nothing."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from tuner.search.storage import files_folder, study_slug


def models_folder(url: str, study_name: str) -> Path:
    """Return the folder of a study's kept models."""
    return files_folder(url) / study_slug(study_name)


def model_folder(url: str, study_name: str, number: int) -> Path:
    """Return the folder of one trial's kept model."""
    return models_folder(url, study_name) / f"trial-{number}"


def remove_models(url: str, study_name: str, *, keep: Iterable[int] = ()) -> None:
    """Remove a study's kept models, but for those of some trials and those that a worker is writing."""
    folder = models_folder(url, study_name)
    spared = {f"trial-{number}" for number in keep}
    if not folder.is_dir():
        return
    for model in folder.iterdir():
        if model.name not in spared and not model.name.startswith("."):
            shutil.rmtree(model, ignore_errors=True)
    if not spared:
        shutil.rmtree(folder, ignore_errors=True)


def remove_halves(url: str, study_name: str) -> None:
    """Remove what killed workers left half written. Only while no run of the study is under way."""
    folder = models_folder(url, study_name)
    if folder.is_dir():
        for half in folder.glob(".*"):
            shutil.rmtree(half, ignore_errors=True)
