"""What busy workers do, and since when: a preparation, or trials that train."""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tuner.service.messages import Prepare
from tuner.service.run_clock import RunClock
from tuner.service.worker_process import Worker
from tuner.trial import TrialParams

Members = tuple[tuple[int, TrialParams], ...]
"""Numbers and recipes of trials."""


@dataclass(frozen=True, kw_only=True)
class Preparing:
    """What a worker makes ready."""

    job: Prepare
    started: float
    """On the monotonic clock."""


@dataclass(kw_only=True)
class Training:
    """What a worker trains. Mutable: its trials end one by one."""

    members: dict[int, TrialParams]
    n_given: int
    charged: float
    """Until when its time is charged to its trials, on the monotonic clock."""
    deadline: float = math.inf
    """On the pool's clock: a trial that waits for a verdict while the database is locked loses no time."""
    spent: dict[int, float] = field(default_factory=dict)
    """Seconds of each trial, those that train together in equal shares."""

    def charge(self) -> None:
        """Charge the time since the last charge to the trials that train."""
        now = time.monotonic()
        for number in self.members:
            self.spent[number] = self.spent.get(number, 0.0) + (now - self.charged) / len(self.members)
        self.charged = now


class RunningJobs:
    """The jobs of busy workers, and what their trials have taken of the devices. Mutable."""

    def __init__(self, clock: RunClock) -> None:
        self._clock = clock
        self._jobs: dict[int, Preparing | Training] = {}
        self._carried: dict[int, float] = {}  # device-seconds of trials that were given back

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, worker: Worker) -> bool:
        return worker.number in self._jobs

    def begin_preparing(self, worker: Worker, job: Prepare) -> None:
        """Note that a worker makes something ready."""
        self._jobs[worker.number] = Preparing(job=job, started=time.monotonic())

    def begin_training(self, worker: Worker, members: Members) -> None:
        """Note that a worker trains a trial, or a cohort."""
        self._jobs[worker.number] = Training(members=dict(members), n_given=len(members), charged=time.monotonic())

    def set_deadline(self, worker: Worker, deadline: float) -> None:
        """Say until when, on the pool's clock, a worker's trials may train; other jobs have no end."""
        if isinstance(job := self._jobs.get(worker.number), Training):
            job.deadline = deadline

    @property
    def prepared(self) -> list[Prepare]:
        """What is being made ready."""
        return [job.job for job in self._jobs.values() if isinstance(job, Preparing)]

    @property
    def recipes(self) -> list[TrialParams]:
        """Those that train."""
        return [params for job in self._list_training().values() for params in job.members.values()]

    def list_overdue(self, now: float) -> tuple[int, ...]:
        """Return the numbers of the workers whose trials should have ended by now, on the pool's clock."""
        return tuple(number for number, job in self._list_training().items() if now > job.deadline)

    def end_preparing(self, worker: Worker) -> None:
        """Note that what a worker made ready is there."""
        job = self._jobs.pop(worker.number)
        assert isinstance(job, Preparing)  # noqa: S101 - only a preparing worker says so
        self._clock.add_build(worker.slot, time.monotonic() - job.started)

    def take_cost(self, worker: Worker, number: int) -> float:
        """Return the device-seconds that a trial has taken, and forget those of an earlier attempt."""
        job = self._find_training(worker)
        job.charge()
        return self._clock.weigh(worker.slot, job.spent.get(number, 0.0)) + self._carried.pop(number, 0.0)

    def release(self, worker: Worker, numbers: Iterable[int]) -> Members:
        """Take trials from a worker, which is idle after its last; return their numbers and recipes."""
        job = self._find_training(worker)
        members = tuple((number, job.members.pop(number)) for number in numbers)
        if not job.members:
            del self._jobs[worker.number]
        return members

    def take_back(self, worker: Worker, numbers: Iterable[int]) -> Members:
        """Take trials from a worker that will be trained by another one: what they have taken stays theirs."""
        numbers = tuple(numbers)
        self._carried |= {number: self.take_cost(worker, number) for number in numbers}
        return self.release(worker, numbers)

    def lose(self, worker: Worker) -> tuple[Preparing | Training | None, dict[int, float]]:
        """Return what a dead worker was busy with, and the device-seconds that each of its trials has taken."""
        job = self._jobs.get(worker.number)
        costs = {number: self.take_cost(worker, number) for number in job.members} if isinstance(job, Training) else {}
        self._jobs.pop(worker.number, None)
        return job, costs

    def count_costs(self, workers: Mapping[int, Worker]) -> dict[int, float]:
        """Return the device-seconds that all trials have taken which have not ended."""
        costs = dict(self._carried)
        for worker_number, job in self._list_training().items():
            job.charge()
            worker = workers.get(worker_number)
            for number in job.members:
                spent = self._clock.weigh(worker.slot if worker else None, job.spent.get(number, 0.0))
                costs[number] = costs.get(number, 0.0) + spent
        return costs

    def _list_training(self) -> dict[int, Training]:
        return {number: job for number, job in self._jobs.items() if isinstance(job, Training)}

    def _find_training(self, worker: Worker) -> Training:
        job = self._jobs[worker.number]
        assert isinstance(job, Training)  # noqa: S101 - only a training worker speaks of trials
        return job
