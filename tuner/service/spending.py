"""What kept features and maps cost the trials that train on them together, and what they save each."""

from tuner.data.feature_store import FeatureBank
from tuner.trial import Usage


class Spending:
    """Counts what was computed, and what one trial would have computed for itself in every epoch. Mutable."""

    def __init__(self, n_trials: int = 1) -> None:
        self._n_trials = n_trials
        self._computed_seconds = 0.0
        self._needed_seconds = 0.0

    def count_opened(self, bank: FeatureBank) -> None:
        """Count what was computed of a bank that was not there."""
        if not bank.was_there:
            self._computed_seconds += bank.seconds

    def count_epoch(self, *banks: FeatureBank) -> None:
        """Count what an epoch would have taken one trial."""
        self._needed_seconds += sum(bank.seconds for bank in banks)

    def describe_usage(self) -> Usage:
        """Return what a trial that ends now has used."""
        saved = max(0.0, self._needed_seconds - self._computed_seconds / self._n_trials)
        return Usage(
            features="computed" if self._computed_seconds > 0 else "cached",
            cohort_size=self._n_trials,
            saved_seconds=round(saved, 3),
        )
