"""What is trained next: trials asked of the book, a little ahead, until a cohort may have come together."""

import math
import time
from collections import Counter
from collections.abc import Collection

from tuner.search.trial_book import TrialBook
from tuner.service.backlog import Backlog, Batch
from tuner.trial import TrialParams

_MAX_SCREEN_COHORT = 64
"""No proposal depends on what a screen shows until its end, so that only memory bounds its cohorts."""
_MAX_GIVEN_BACK = 2
"""Cohorts of a backbone that fail before its heads are trained on images for the rest of the run."""


class Supply:
    """Says what the next worker gets, within the study's number of trials and the run's time."""

    def __init__(self, book: TrialBook, *, n_trials: int, deadline: float, n_kinds: float = math.inf) -> None:
        """Take the book.

        Args:
            book: The study's trials.
            n_trials: As in ``[search]``.
            deadline: Of the run, on the monotonic clock; after it nothing starts.
            n_kinds: As of ``Backlog``.
        """
        self._book = book
        self._n_trials, self._deadline = n_trials, deadline
        self._max_cohort = max(4, n_trials // 8)
        self._backlog = Backlog(self._max_cohort, n_kinds)
        self._n_given_back: Counter[str] = Counter()

    @property
    def n_wanted(self) -> int:
        """Trials that the study is to have."""
        return min(self._n_trials, self._book.queue.max_trials)

    @property
    def n_done(self) -> int:
        """Trials that count."""
        return self._book.count_finished()

    @property
    def n_missing(self) -> int:
        """Trials that the study lacks."""
        return self.n_wanted - self._book.count_finished()

    @property
    def is_late(self) -> bool:
        """Whether the run's time is over."""
        return time.monotonic() >= self._deadline

    @property
    def is_dry(self) -> bool:
        """Whether nothing more will start, unless a running trial is lost."""
        may_ask = self._n_startable > 0 and not self._book.queue.is_exhausted
        return self.is_late or not (may_ask or len(self._backlog) > 0 or self._book.queue.next_is_screen)

    @property
    def _n_startable(self) -> int:
        """How many more trials may be asked for."""
        return 0 if self.is_late else self.n_missing - self._book.count_running()

    def take(self, busy: Collection[TrialParams], n_idle: int = 1) -> Batch | None:
        """Return what an idle worker trains; None if there is nothing for it.

        Args:
            busy: What other workers train now.
            n_idle: Workers that are idle, this one included.
        """
        if self.is_late:
            return None
        while self._may_ask(n_idle):
            asked = self._book.ask()
            if asked is None:
                break
            number, params = asked
            self._backlog.add(
                number, params, is_suspect=self._book.is_suspect(number), repeats=self._book.list_repeats(number)
            )
        max_cohort = _MAX_SCREEN_COHORT if self._book.is_screening else self._max_cohort
        return self._backlog.take(max_cohort, busy, n_left=max(0, self._n_startable))

    def mark_warm(self, params: TrialParams) -> None:
        """Remember that what a trial's frozen layers make of the images is kept now."""
        self._backlog.mark_warm(params)

    def _may_ask(self, n_idle: int) -> bool:
        if self._book.queue.next_is_screen:
            return True
        if self._backlog.is_sated(n_idle) or self._n_startable <= 0:
            return False
        # What the screen shows is to guide the sampler: until it ends nothing new is proposed.
        return not self._book.is_screening or self._book.queue.next_is_queued

    def take_back(self, members: tuple[tuple[int, TrialParams], ...], *, is_lasting: bool) -> None:
        """Take back trials of one backbone that cannot use features.

        Args:
            members: Number and recipe of each.
            is_lasting: Whether that holds for every trial of the backbone.
        """
        backbone = members[0][1].backbone
        self._n_given_back[backbone] += 1
        is_lasting = is_lasting or self._n_given_back[backbone] >= _MAX_GIVEN_BACK
        self._backlog.give_back(members, uncached_backbone=backbone if is_lasting else None)
