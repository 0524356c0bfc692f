"""Where the models of a study are kept: beside the database, so that clearing caches loses nothing."""

import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tuner.search.storage import files_folder, refuse_links, study_slug
from tuner.search.storage_errors import explain_failures

_MODEL = re.compile(r"trial-\d+")


def models_folder(url: str, study_name: str) -> Path:
    """Return the folder of a study's kept models."""
    return files_folder(url) / study_slug(study_name)


def model_folder(url: str, study_name: str, number: int) -> Path:
    """Return the folder of one trial's kept model."""
    return models_folder(url, study_name) / f"trial-{number}"


def remove_models(url: str, study_name: str, *, keep: Iterable[int] = ()) -> None:
    """Remove a study's kept models, but for those of some trials and those that a worker is writing.

    What else lies there stays, and no link is followed.

    Raises:
        StorageError: If a link stands in the folder's place, or it cannot be read.
    """
    folder = models_folder(url, study_name)
    spared = {f"trial-{number}" for number in keep}
    refuse_links(folder, "models")
    with explain_failures(folder):
        if not folder.is_dir():
            return
        for model in list(folder.iterdir()):
            if model.name not in spared and _MODEL.fullmatch(model.name):
                _remove(model)
    if not spared:
        with suppress(OSError):  # something else is in it
            folder.rmdir()


def remove_halves(url: str, study_name: str) -> None:
    """Remove what killed workers left half written. Only while no run of the study is under way.

    Raises:
        StorageError: If a link stands in the folder's place, or it cannot be read.
    """
    folder = models_folder(url, study_name)
    refuse_links(folder, "models")
    with explain_failures(folder):
        if folder.is_dir():
            for half in list(folder.glob(".trial-*")):
                _remove(half)


def _remove(path: Path) -> None:
    """Remove a folder, or a link without what it leads to."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
