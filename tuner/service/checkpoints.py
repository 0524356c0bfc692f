"""Where the checkpoints of a study's trials lie, beside the database, and which of them stay.

A checkpoint stays while its trial runs or waits to go on, and goes when the trial has ended for good. Of finished
trials only the best one's weights are kept, and those as a model folder (``kept_models``).
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tuner.search.storage import find_database, refuse_links, study_slug

_FILE = re.compile(r"\.?trial-(\d+)\.pt(\.\d+\.tmp)?")
"""A checkpoint, or what a killed worker left half written."""


def checkpoint_file(url: str, study_name: str, origin: int) -> Path:
    """Return the file of one trial's checkpoint.

    Args:
        url: Of the storage.
        study_name: Any name; it cannot lead out of the folder.
        origin: Number of the trial's first attempt (``TrialBook.origin``): all attempts share the file.
    """
    return _folder(url, study_name) / f"trial-{origin}.pt"


def remove_checkpoints(url: str, study_name: str, *, keep: Iterable[int] = (), may_write: bool = False) -> None:
    """Remove a study's checkpoints, but for those of trials that run or wait.

    Args:
        url: Of the storage.
        study_name: The study's.
        keep: Their origins (``TrialBook.open_origins``). Nothing else may be training.
        may_write: Whether these may be writing theirs; else what is half written goes as well.

    Raises:
        StorageError: If a link stands in the folder's place.
    """
    folder, kept = _folder(url, study_name), set(keep)
    refuse_links(folder, "checkpoints")
    with suppress(
        OSError
    ):  # what cannot be removed now is tried again when the next trial ends, or the next run starts
        for path in list(folder.iterdir()):
            if (match := _FILE.fullmatch(path.name)) and (int(match[1]) not in kept or (match[2] and not may_write)):
                path.unlink(missing_ok=True)
        if not kept:
            folder.rmdir()
            folder.parent.rmdir()


def _folder(url: str, study_name: str) -> Path:
    database = find_database(url)
    return database.with_name(f"{database.name}.checkpoints") / study_slug(study_name)
