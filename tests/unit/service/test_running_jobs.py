"""Tests of tuner.service.running_jobs: what trials take of devices is theirs, wherever they end."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.training.builders import make_params
from tuner.service.messages import Prepare
from tuner.service.running_jobs import Preparing, RunningJobs

MEMBERS = ((3, make_params(seed=3)), (4, make_params(seed=4)))
FIRST: Any = SimpleNamespace(number=0, slot="a half of a device")
SECOND: Any = SimpleNamespace(number=1, slot=None)


class Clock:
    """Counts what preparations take; two workers share each device."""

    def __init__(self) -> None:
        self.built = 0.0

    def weigh(self, slot: object, seconds: float) -> float:
        """Return the device-seconds of a worker's seconds."""
        return seconds if slot is None else seconds / 2

    def add_build(self, slot: object, seconds: float) -> None:
        """Count a preparation."""
        self.built += self.weigh(slot, seconds)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Stand for the monotonic clock: the last of these is now."""
    times = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: times[-1])
    return times


def make_jobs(clock: Clock | None = None) -> RunningJobs:
    """Return the jobs of a run that has not begun."""
    stand_in: Any = clock or Clock()
    return RunningJobs(stand_in)


def test_what_a_cohort_takes_is_shared_by_those_that_train(now: list[float]) -> None:
    """Equal shares while both train, then all of it; a worker is busy until its last trial has ended."""
    jobs = make_jobs()
    jobs.begin_training(SECOND, MEMBERS)
    now.append(110.0)
    assert jobs.take_cost(SECOND, 3) == 5.0
    assert jobs.release(SECOND, (3,)) == MEMBERS[:1]
    now.append(113.0)
    assert SECOND in jobs
    assert jobs.recipes == [MEMBERS[1][1]]
    assert jobs.take_cost(SECOND, 4) == 8.0
    jobs.release(SECOND, (4,))
    assert SECOND not in jobs
    assert len(jobs) == 0


def test_what_a_trial_took_before_it_was_given_back_stays_its_own(now: list[float]) -> None:
    """Another worker trains it again, and its bill goes on."""
    jobs = make_jobs()
    jobs.begin_training(FIRST, MEMBERS)
    now.append(108.0)
    assert jobs.take_back(FIRST, (3, 4)) == MEMBERS
    assert jobs.count_costs({}) == {3: 2.0, 4: 2.0}
    jobs.begin_training(SECOND, MEMBERS[:1])
    now.append(109.0)
    assert jobs.count_costs({1: SECOND}) == {3: 3.0, 4: 2.0}
    assert jobs.take_cost(SECOND, 3) == 3.0


def test_what_a_lost_worker_was_busy_with_is_charged(now: list[float]) -> None:
    """It trained until it was lost, on its share of a device."""
    jobs = make_jobs()
    jobs.begin_training(FIRST, MEMBERS)
    now.append(108.0)
    assert jobs.lose(FIRST)[1] == {3: 2.0, 4: 2.0}
    assert jobs.lose(FIRST) == (None, {})
    jobs.begin_training(SECOND, MEMBERS[:1])
    now.append(109.0)
    jobs.take_back(SECOND, (3,))
    jobs.begin_training(FIRST, MEMBERS[:1])
    now.append(111.0)
    assert jobs.lose(FIRST)[1] == {3: 2.0}


def test_preparing_is_build_time_and_never_overdue(now: list[float]) -> None:
    """Only trials have a deadline."""
    clock = Clock()
    jobs, prepare = make_jobs(clock), Prepare(data_hash="h", backbone=None)
    jobs.begin_preparing(FIRST, prepare)
    jobs.begin_training(SECOND, MEMBERS)
    for worker in (FIRST, SECOND):
        jobs.set_deadline(worker, 5.0)
    assert jobs.prepared == [prepare]
    assert jobs.list_overdue(5.0) == ()
    assert jobs.list_overdue(5.1) == (1,)
    now.append(104.0)
    jobs.end_preparing(FIRST)
    assert clock.built == 2.0
    jobs.begin_preparing(FIRST, prepare)
    assert isinstance(jobs.lose(FIRST)[0], Preparing)
