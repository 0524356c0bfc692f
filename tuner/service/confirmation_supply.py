"""What is trained to confirm the best few trials: one training at a time for each worker, the best trial's first."""

import time
from collections.abc import Collection, Sequence
from typing import NoReturn

from tuner.search.confirmation import Wanted, count_folds, list_missing
from tuner.search.studies import StoredStudy
from tuner.search.trial_book import TrialBook
from tuner.service.backlog import Batch
from tuner.trial import TrialParams


class ConfirmationSupply:
    """Says what the next worker gets while a study is confirmed. It stands in a ``Supply``'s place."""

    def __init__(
        self,
        stored: StoredStudy,
        book: TrialBook,
        candidates: Sequence[int],
        *,
        n_seeds: int,
        deadline: float,
    ) -> None:
        """Take what is to be confirmed.

        Args:
            stored: The study, opened to run.
            book: Its trials.
            candidates: Numbers of the trials whose recipes are trained again.
            n_seeds: Fresh seeds for each.
            deadline: On the monotonic clock; after it nothing starts.
        """
        self._study, self._book = stored.study, book
        self._candidates, self._n_seeds, self._deadline = candidates, n_seeds, deadline
        self._n_folds = count_folds(stored.facts)

    @property
    def n_wanted(self) -> int:
        """Trainings in all."""
        return len(self._candidates) * self._n_seeds

    @property
    def n_done(self) -> int:
        """Trainings that are over."""
        return self.n_wanted - self.n_missing - self._book.count_confirming()

    @property
    def n_missing(self) -> int:
        """Trainings that have not begun."""
        return len(self._list_missing())

    def _list_missing(self) -> list[Wanted]:
        return list_missing(self._study, self._candidates, self._n_seeds)

    @property
    def is_late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self._deadline

    @property
    def is_dry(self) -> bool:
        """Whether nothing more will start, unless a running training is lost."""
        return self.is_late or self.n_missing == 0

    def take(self, busy: Collection[TrialParams], n_idle: int = 1) -> Batch | None:  # noqa: ARG002 - nothing is shared
        """Return what an idle worker trains; None if there is nothing for it."""
        missing = [] if self.is_late else self._list_missing()
        if not missing:
            return None
        number, params = self._book.ask_confirmation(missing[0], self._n_folds)
        return Batch(members=((number, params),), uses_features=False, repeats=self._book.list_repeats(number))

    def take_back(self, members: tuple[tuple[int, TrialParams], ...], *, is_lasting: bool) -> NoReturn:  # noqa: ARG002
        """Refuse: nothing here trains on features."""
        raise TypeError(f"a confirmation trains on images, got {len(members)} trials back")
