"""One run of a study: the search, then the confirmation of its best, then what has come of both."""

from typing import Literal

from tuner.errors import SearchError
from tuner.search.confirmation import (
    CONFIRMATION_ATTR,
    DEFAULT_SEEDS,
    DEFAULT_TOP,
    choose_candidates,
    count_search_trials,
    list_missing,
    read_confirmation,
    summarise,
)
from tuner.search.distributions import count_map_kinds, make_distributions
from tuner.search.studies import StoredStudy
from tuner.search.trial_book import TrialBook
from tuner.service.confirmation_supply import ConfirmationSupply
from tuner.service.progress import Display, Noted
from tuner.service.result import StoppedBy, StudyStatus, read_status
from tuner.service.run_clock import Deadline, RunClock
from tuner.service.search_loop import SearchLoop
from tuner.service.supply import Supply


class StudyRun:
    """Leads the loop through the parts of a run."""

    def __init__(
        self, stored: StoredStudy, book: TrialBook, loop: SearchLoop, clock: RunClock, *, url: str, display: Display
    ) -> None:
        self._stored, self._book, self._loop, self._clock = stored, book, loop, clock
        self._url, self._display = url, display
        self._stopped_by: StoppedBy = "done"

    def run(self, *, top: int, n_seeds: int) -> StudyStatus:
        """Search to the end; then confirm, if the study file keeps time back for it.

        Args:
            top: Candidates to confirm.
            n_seeds: Fresh seeds for each.

        Raises:
            SearchError: If five trials fail in a row, or none completes.
        """
        with self._loop.begun():
            deadline = self._clock.search_deadline()
            if text := self._clock.describe_budget():
                self._display.show(Noted(text=text))
            spec, facts = self._stored.spec, self._stored.facts
            n_kinds = count_map_kinds(make_distributions(spec, facts.group_counts))
            supply = Supply(self._book, n_trials=spec.search.n_trials, deadline=deadline.soft, n_kinds=n_kinds)
            self._loop.serve(supply, deadline)
            self._note_end(deadline, is_short=supply.is_late and supply.n_missing > 0)
            self._loop.interrupt_running()  # asked ahead, and never begun
            if self._stored.spec.search.confirm_fraction > 0 and self._loop.stop_signal is None:
                try:
                    self._confirm(self._clock.whole_deadline(), top=top, n_seeds=n_seeds)
                except SearchError as error:  # the search is whole all the same
                    self._display.show(Noted(text=f"nothing is confirmed: {error}"))
        return self._conclude()

    def confirm(self, *, top: int, n_seeds: int) -> StudyStatus:
        """Confirm what the search has found so far, within no budget."""
        with self._loop.begun():
            self._confirm(Deadline(), top=top, n_seeds=n_seeds)
        return self._conclude()

    def _confirm(self, deadline: Deadline, *, top: int, n_seeds: int) -> None:
        candidates = choose_candidates(self._stored.study, top)
        if not candidates:
            return
        text = f"confirming the best {len(candidates)} on {n_seeds} fresh seeds each"
        self._display.show(Noted(text=text))
        supply = ConfirmationSupply(self._stored, self._book, candidates, n_seeds=n_seeds, deadline=deadline.soft)
        self._loop.serve(supply, deadline)
        self._note_end(deadline, is_short=supply.is_late and supply.n_missing > 0)
        if self._loop.stop_signal is not None:
            return  # what is there goes on next time
        found = summarise(self._stored, candidates, n_seeds)
        if found is not None:
            self._stored.study.set_user_attr(CONFIRMATION_ATTR, found.to_json())
        else:
            text = "nothing is confirmed: the time kept back was too short, or its trainings failed"
            self._display.show(Noted(text=f"{text}; 'tuner confirm' goes on"))

    def _note_end(self, deadline: Deadline, *, is_short: bool) -> None:
        why: Literal["budget", "timeout"] = "budget" if deadline.is_over else "timeout"
        if is_short and self._stopped_by == "done":
            self._stopped_by = why

    def _conclude(self) -> StudyStatus:
        stopped_by = self._loop.stop_signal or self._stopped_by
        self._clock.save()
        status = read_status(self._stored, self._url, stopped_by=stopped_by)
        if status.best is None and stopped_by == "done":
            raise SearchError(
                f"study {status.name!r}: at least one trial must complete, got {status.counts['PRUNED']} pruned and "
                f"{status.counts['FAIL']} failed; 'tuner trials' lists the reasons"
            )
        return status


def is_confirmed(stored: StoredStudy) -> bool:
    """Whether the study file asks for no confirmation, or all that it takes has been trained and summed up."""
    if stored.spec.search.confirm_fraction == 0:
        return True
    found = read_confirmation(stored.study)
    is_current = found is not None and found.n_search_trials == count_search_trials(stored.study)
    candidates = choose_candidates(stored.study, DEFAULT_TOP)
    return is_current and not list_missing(stored.study, candidates, DEFAULT_SEEDS)
