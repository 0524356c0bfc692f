"""What a run keeps beside the database: the best trial's model, and checkpoints of trials that are not over."""

from pathlib import Path

from tuner.search.trial_book import TrialBook
from tuner.service.checkpoints import checkpoint_file, remove_checkpoints
from tuner.service.kept_models import model_folder, remove_halves, remove_models
from tuner.service.messages import Verdict


class RunFiles:
    """Names the files of a run's trials, and removes those that are no longer needed. Mutable."""

    def __init__(self, url: str, study_name: str, objective: str, book: TrialBook) -> None:
        self._url, self._study_name, self._objective = url, study_name, objective
        self._book = book
        self._has_ended = False
        self._has_kept = False

    def find_checkpoint(self, number: int) -> Path:
        """Return where a trial's checkpoint lies, which an earlier attempt may have written."""
        return checkpoint_file(self._url, self._study_name, self._book.origin(number))

    def ask_to_keep(self, number: int, value: float) -> Verdict:
        """Return the verdict that has a trial's model written."""
        provenance = {
            "study": self._study_name,
            "trial": number,
            "objective": self._objective,
            "value": value,
            "trained_on": "train",
        }
        folder = model_folder(self._url, self._study_name, number)
        return Verdict(keep=number, folder=str(folder), provenance=provenance)

    def sweep(self) -> None:
        """Remove what killed workers left half written, and all that is old. While no worker trains."""
        remove_halves(self._url, self._study_name)
        self._remove_models()
        self._remove_checkpoints()

    def note_end(self, *, kept: bool) -> None:
        """Note that a trial has ended, and whether its model was written."""
        self._has_ended = True
        self._has_kept = self._has_kept or kept

    def tidy(self) -> None:
        """Remove what is old since the last time. The ends of trials must be stored by now."""
        if self._has_kept:  # else the best trial's model may not be there, and the one before is better than none
            self._remove_models()
        if self._has_ended:
            self._remove_checkpoints(may_write=True)
        self._has_kept = self._has_ended = False

    def _remove_models(self) -> None:
        """Keep the best trial's model, and those that are being written."""
        best = self._book.best
        spared = self._book.running_numbers if best is None else (best[0], *self._book.running_numbers)
        remove_models(self._url, self._study_name, keep=spared)

    def _remove_checkpoints(self, *, may_write: bool = False) -> None:
        keep = self._book.open_origins
        remove_checkpoints(self._url, self._study_name, keep=keep, may_write=may_write)
