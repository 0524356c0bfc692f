"""The time of a run: what it has held of devices, and when its search and its confirmation end."""

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from tuner.search.ledger import RUNS_ATTR, RunCost, read_ledger, read_runs
from tuner.search.studies import StoredStudy
from tuner.service.sharing import Sharing
from tuner.service.slots import Slot, count_devices, count_sharing
from tuner.spec.durations import Budget, format_seconds, parse_budget

_SAVE_SECONDS = 10.0
"""Between two writes of what the run has held: what a kill leaves out of the bill, at most."""


@dataclass(frozen=True, kw_only=True)
class Deadline:
    """The end of a part of a run, on the monotonic clock."""

    soft: float = math.inf
    """After it nothing starts."""
    hard: float = math.inf
    """After it what runs is stopped at its next epoch."""

    @property
    def is_over(self) -> bool:
        """Whether running trials are to stop."""
        return time.monotonic() >= self.hard


class RunClock:
    """Counts what a run holds, and divides what its budget or timeout leaves. Mutable."""

    def __init__(self, stored: StoredStudy, slots: tuple[Slot, ...], *, started: float) -> None:
        """Take the study, whose earlier runs have spent some of its budget.

        Args:
            stored: Opened to run.
            slots: Of the run's workers.
            started: When the run began, on the monotonic clock.
        """
        self._study, self._search = stored.study, stored.spec.search
        self._started, self._saved = started, -math.inf
        self._began = datetime.now(UTC).isoformat(timespec="seconds")
        self._earlier = read_runs(self._study.user_attrs)
        self._confirmed = read_ledger(self._study).confirm
        self._build_seconds = 0.0
        self._slots = slots
        self._n_devices = count_devices(slots)
        self._sharing: Sharing | None = None

    def weigh(self, slot: Slot | None, seconds: float) -> float:
        """Return the device-seconds of a worker's seconds."""
        return seconds if slot is None else seconds / count_sharing(self._slots, slot.device)

    def add_build(self, slot: Slot | None, seconds: float) -> None:
        """Count a worker's seconds of preparing."""
        self._build_seconds += self.weigh(slot, seconds)

    def settle(self, sharing: Sharing, slots: tuple[Slot, ...], seconds: float) -> None:
        """Take what a probe has decided, and count the seconds that it took on one device."""
        self._sharing, self._slots = sharing, slots
        self._build_seconds += seconds

    def save(self, *, is_due: bool = True) -> None:
        """Store what the run has held so far, unless it was stored a moment ago."""
        now = time.monotonic()
        if is_due or now - self._saved >= _SAVE_SECONDS:
            self._saved = now
            run = RunCost(
                started=self._began,
                wall_seconds=now - self._started,
                n_devices=self._n_devices,
                build_seconds=self._build_seconds,
                per_device=self._sharing.n_workers if self._sharing else None,
                probed_speeds=self._sharing.speeds if self._sharing else (),
            )
            self._study.set_user_attr(RUNS_ATTR, [asdict(each) for each in (*self._earlier, run)])

    # --- its end ---

    @property
    def _budget_end(self) -> float:
        if self._search.budget is None:
            return math.inf
        budget = parse_budget(self._search.budget)
        left = budget.seconds - _sum_spent(budget, self._earlier)
        return self._started + (left / self._n_devices if budget.is_of_devices else left)

    @property
    def _timeout_end(self) -> float:
        return math.inf if self._search.timeout is None else self._started + self._search.timeout

    def search_deadline(self) -> Deadline:
        """Return when the search ends, so that the share kept back is left for the confirmation."""
        share = 1 - self._search.confirm_fraction
        timeout = self._started + share * (self._timeout_end - self._started)
        if self._search.budget is None:
            return Deadline(soft=timeout)
        budget = parse_budget(self._search.budget)
        # What earlier runs have taken to confirm is not the search's.
        searched = _sum_spent(budget, self._earlier) - (
            self._confirmed if budget.is_of_devices else self._confirmed / self._n_devices
        )
        left = share * budget.seconds - searched
        end = self._started + (left / self._n_devices if budget.is_of_devices else left)
        end = min(end, self._budget_end)
        return Deadline(soft=min(end, timeout), hard=end)

    def whole_deadline(self) -> Deadline:
        """Return when all ends."""
        return Deadline(soft=min(self._budget_end, self._timeout_end), hard=self._budget_end)

    def describe_budget(self) -> str:
        """Return what the budget allows, for a person; nothing without one."""
        if self._search.budget is None:
            return ""
        left = max(0.0, self._budget_end - time.monotonic())
        share = self._search.confirm_fraction
        search_left = max(0.0, self.search_deadline().hard - time.monotonic())
        kept = f": {format_seconds(search_left)} to search, the rest to confirm" if share else ""
        workers = f"{self._n_devices:g} devices" if self._n_devices != 1 else "1 device"
        return f"budget {self._search.budget}: {format_seconds(left)} left on {workers}{kept}"


def is_budget_spent(stored: StoredStudy) -> bool:
    """Whether the study's earlier runs have left nothing of its budget."""
    if stored.spec.search.budget is None:
        return False
    budget = parse_budget(stored.spec.search.budget)
    runs = read_runs(stored.study.user_attrs)
    return _sum_spent(budget, runs) >= budget.seconds


def _sum_spent(budget: Budget, runs: Iterable[RunCost]) -> float:
    return sum(run.device_seconds if budget.is_of_devices else run.wall_seconds for run in runs)
