"""The loop of a run: give work to idle workers, listen, report, prune, tell."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from tuner.search.distributions import list_unfrozen
from tuner.search.studies import StoredStudy
from tuner.search.trial_book import TrialBook
from tuner.service.confirmation_supply import ConfirmationSupply
from tuner.service.failures import FailureCount, Loss
from tuner.service.messages import (
    Alive,
    EpochDone,
    GivenBack,
    Hello,
    Note,
    Prepare,
    Prepared,
    Probed,
    Progress,
    Reply,
    Started,
    Train,
    TrialDone,
    Verdict,
)
from tuner.service.pool import Pool
from tuner.service.probing import SharingProbe
from tuner.service.progress import (
    ActivityChanged,
    BestFound,
    Counted,
    Display,
    EpochReported,
    Event,
    Noted,
    Progressed,
    TrialFinished,
    TrialsStarted,
)
from tuner.service.run_clock import Deadline, RunClock
from tuner.service.run_files import RunFiles
from tuner.service.running_jobs import RunningJobs, Training
from tuner.service.scouting import TICK_SECONDS, Scouted, start_worker
from tuner.service.signals import StopSignals
from tuner.service.supply import Supply
from tuner.service.worker_process import Worker
from tuner.trial import Reason, TrialOutcome, TrialState

_OUT_OF_BUDGET = TrialOutcome(state=TrialState.FAIL, reason=Reason.INTERRUPTED, message="the budget was spent")
_INTERRUPTED = TrialOutcome(state=TrialState.FAIL, reason=Reason.INTERRUPTED, message="the run was stopped")


class SearchLoop:
    """Serves the workers of a run, from its first preparation to its last trial."""

    def __init__(
        self,
        stored: StoredStudy,
        book: TrialBook,
        files: RunFiles,
        scouted: Scouted,
        *,
        pool: Pool,
        display: Display,
        signals: StopSignals,
        clock: RunClock,
    ) -> None:
        self._spec = stored.spec
        self._pool, self._display, self._signals, self._clock = pool, display, signals, clock
        self._book, self._files = book, files
        self._supply: Supply | ConfirmationSupply
        self._end = Deadline()
        self._data_hash = scouted.description.data_hash
        self._cuts = list_unfrozen(stored.spec, scouted.description.group_counts)
        self._ready = set(scouted.ready)
        self._unshared = scouted if scouted.probes_sharing else None
        self._jobs = deque(
            Prepare(data_hash=self._data_hash, backbone=name) for name in (None, *self._spec.backbone_names())
        )
        self._running = RunningJobs(clock)
        self._events: list[Event] = []  # shown once they are stored
        self._best: tuple[int, float] | None = None
        self._stopped: set[int] = set()  # by the end of the budget
        self._failures = FailureCount(self._spec.study.name)

    @property
    def stop_signal(self) -> Literal["sigint", "sigterm"] | None:
        """What the user stopped the run with, if they did."""
        return self._signals.received

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Take over what an earlier run left, and interrupt what still runs in the end."""
        if n_orphans := self._book.prepare():
            self._display.show(Noted(text=f"{n_orphans} trials of a killed run are queued again"))
        self._files.sweep()
        self._best = self._book.best
        try:
            yield
        finally:
            self.interrupt_running()

    def interrupt_running(self) -> None:
        """End what was asked and has not ended, with what it has taken so far."""
        costs = self._running.count_costs(self._pool.workers)
        for number in self._book.running_numbers:
            self._book.tell(number, _INTERRUPTED, device_seconds=costs.get(number, 0.0))
        self._book.flush()

    def serve(self, supply: Supply | ConfirmationSupply, end: Deadline) -> None:
        """Give workers what a supply has, until it is dry and they are done.

        Raises:
            SearchError: If five trials fail in a row.
        """
        self._supply, self._end = supply, end
        self._failures = FailureCount(self._spec.study.name)
        self._display.show(Counted(n_done=supply.n_done, n_trials=supply.n_wanted))
        while self._dispatch():
            self._listen()

    def tidy_up(self) -> None:
        """Remove what killed workers left half written, once no worker writes any more."""
        self._files.sweep()
        self._clock.save()

    # --- give work ---

    def _dispatch(self) -> bool:
        """Give work to idle workers; return whether there is anything to wait for."""
        if self._signals.received:
            return False
        idle = [
            worker
            for number, worker in self._pool.workers.items()
            if number in self._ready and worker not in self._running
        ]
        if self._supply.is_late:
            self._jobs.clear()
        if self._jobs or self._running.prepared:
            self._prepare(idle)
            return True
        if self._unshared is not None:
            self._share_devices(self._unshared)
            return True
        for n_started, worker in enumerate(idle):
            if not self._start_trials(worker, len(idle) - n_started):
                break
        self._settle()
        # With all workers busy starting up there is something to wait for although nothing is busy yet.
        return len(self._running) > 0 or not self._supply.is_dry

    def _prepare(self, idle: list[Worker]) -> None:
        """Prepare the images first, then the backbones side by side."""
        for worker in idle:
            images_pending = any(job.backbone is None for job in self._running.prepared)
            if not self._jobs or images_pending:
                return
            job = self._jobs.popleft()
            self._running.begin_preparing(worker, job)
            text = f"preparing {job.backbone or 'the images'}"
            self._display.show(ActivityChanged(worker=worker.number, text=text))
            worker.send(job)

    def _share_devices(self, scouted: Scouted) -> None:
        """Find how many workers share each device, now that there are images and weights to try it with."""
        started = time.monotonic()
        probe = SharingProbe(
            self._pool,
            self._spec,
            scouted,
            ready=self._ready,
            display=self._display,
            must_stop=lambda: self._signals.received is not None or self._supply.is_late,
        )
        self._clock.settle(*probe.decide(), time.monotonic() - started)
        self._unshared = None

    def _start_trials(self, worker: Worker, n_idle: int) -> bool:
        """Start a trial or a cohort; return whether there was one."""
        batch = self._supply.take(self._running.recipes, n_idle)
        if batch is None:
            return False
        numbers = tuple(number for number, _ in batch.members)
        self._running.begin_training(worker, batch.members)
        self._start_clock(worker)
        has_checkpoint = not batch.uses_features and not batch.repeats
        checkpoint = str(self._files.find_checkpoint(numbers[0])) if has_checkpoint else ""
        worker.send(
            Train(
                data_hash=self._data_hash,
                members=batch.members,
                uses_features=batch.uses_features,
                checkpoint=checkpoint,
                repeats=batch.repeats,
                n_sharing=batch.n_sharing,
                cuts=self._cuts[batch.members[0][1].backbone],
            )
        )
        self._book.place(numbers, worker.slot.device if worker.slot else "")
        started = TrialsStarted(worker=worker.number, numbers=numbers, params=batch.members[0][1])
        self._display.show(started)
        return True

    # --- listen ---

    def _listen(self) -> None:
        for worker, reply in self._pool.wait(TICK_SECONDS):
            if reply is None:
                self._lose(worker)
            else:
                self._handle(worker, reply)
        self._end_overdue()
        self._failures.watch()
        self._settle()

    def _end_overdue(self) -> None:
        """End workers whose trials take longer than the user allows."""
        for number in self._running.list_overdue(self._pool.watched_seconds):
            worker = self._pool.workers[number]
            self._pool.end(worker, f"trained longer than {self._spec.search.trial_timeout:g} s")
            self._lose(worker, is_overdue=True)

    def _handle(self, worker: Worker, reply: Reply) -> None:
        match reply:
            case Hello():
                self._ready.add(worker.number)
            case Alive() | Probed():  # a probe that was given up is answered late
                pass
            case Note():
                self._display.show(Noted(text=reply.text))
            case Started():
                self._start_clock(worker)
            case Progress():
                self._start_clock(worker)  # features, which other trials use as well, are made on nobody's time
                progress = Progressed(worker=worker.number, text=reply.text, n_done=reply.n_done, n_total=reply.n_total)
                self._display.show(progress)
            case Prepared():
                self._running.end_preparing(worker)
                self._display.show(ActivityChanged(worker=worker.number, text=""))
            case EpochDone():
                self._judge(worker, reply)
            case TrialDone():
                self._finish(worker, reply)
            case GivenBack():
                self._take_back(worker, reply)
            case _:
                raise TypeError(f"unexpected reply: {reply}")

    def _start_clock(self, worker: Worker) -> None:
        limit = self._spec.search.trial_timeout
        # A confirmation trains on images what the search may have trained in seconds on features.
        if limit is not None and not isinstance(self._supply, ConfirmationSupply):
            self._running.set_deadline(worker, self._pool.watched_seconds + limit)

    def _judge(self, worker: Worker, done: EpochDone) -> None:
        """Report an epoch, and answer with what the trials are to do."""
        n_epochs, objective = self._spec.training.epochs, self._spec.study.objective
        stop = tuple(number for number, result in done.results if self._book.report(number, result))
        epoch = done.results[0][1].epoch
        values = {number: result.objective_value(objective) for number, result in done.results}
        finals = self._book.list_final_values(values)
        best = self._book.find_new_best(finals) if finals else None
        if self._end.is_over and (cut := tuple(self._book.list_unfinished(set(values) - set(stop)))):
            self._stopped.update(cut)
            stop += cut
        worker.send(Verdict(stop=stop) if best is None else self._files.ask_to_keep(best, finals[best]))
        shown = (min if objective == "val_loss" else max)(values.values())
        self._events.append(EpochReported(worker=worker.number, epoch=epoch, n_epochs=n_epochs, value=shown))

    def _finish(self, worker: Worker, done: TrialDone) -> None:
        """Tell a trial that ended by itself, by the pruner or by an error."""
        is_screen, origin = self._book.is_screen(done.number), self._book.origin(done.number)
        outcome = done.outcome
        if done.number in self._stopped and outcome.reason is Reason.PRUNER:
            outcome = _OUT_OF_BUDGET
        cost = self._running.take_cost(worker, done.number)
        value = self._book.tell(done.number, outcome, done.usage, device_seconds=cost)
        self._announce(worker, done.number, outcome, value)
        self._files.note_end(kept=done.kept)
        ((_, params),) = self._running.release(worker, (done.number,))
        self._show_idle(worker)
        has_all_maps = done.usage.features != "none" and outcome.state is TrialState.COMPLETE  # of each epoch's view
        if has_all_maps and isinstance(self._supply, Supply):
            self._supply.mark_warm(params)
        self._failures.count(origin, done.outcome, is_screen=is_screen)

    def _show_idle(self, worker: Worker) -> None:
        """Have it shown that a worker has nothing left to do, if so it is."""
        if worker not in self._running:
            self._events.append(ActivityChanged(worker=worker.number, text=""))

    def _take_back(self, worker: Worker, reply: GivenBack) -> None:
        members = self._running.take_back(worker, reply.numbers)
        self._show_idle(worker)
        self._supply.take_back(members, is_lasting=reply.is_lasting)
        self._events.append(Noted(text=f"{reply.backbone}: its heads train on images, not on features: {reply.reason}"))

    def _announce(self, worker: Worker, number: int, outcome: TrialOutcome, value: float | None) -> None:
        self._events.append(Counted(n_done=self._supply.n_done, n_trials=self._supply.n_wanted))
        self._events.append(TrialFinished(worker=worker.number, number=number, outcome=outcome, value=value))

    def _settle(self) -> None:
        """Store what happened, then show it."""
        self._book.flush()
        for event in self._events:
            self._display.show(event)
        self._events.clear()
        if self._book.best is not None and self._book.best != self._best:
            self._best = self._book.best
            self._display.show(BestFound(number=self._best[0], value=self._best[1]))
        self._files.tidy()
        self._clock.save(is_due=False)
        self._failures.check()

    def _lose(self, worker: Worker, *, is_overdue: bool = False) -> None:
        """Tell the trials of a dead worker, and start another worker in its slot."""
        message = worker.describe_end()
        self._display.show(ActivityChanged(worker=worker.number, text=""))
        self._display.show(Noted(text=f"{message}; another one takes its place"))
        self._ready.discard(worker.number)
        job, costs = self._running.lose(worker)
        is_orphan = worker.cause_of_end is not worker
        match job:
            case Training(members=members, n_given=n_given):
                loss = Loss(
                    message=message,
                    n_given=n_given,
                    was_killed=worker.was_killed,
                    is_stalled=worker.is_stalled,
                    is_overdue=is_overdue,
                    is_orphan=is_orphan,
                )
                outcome = self._failures.blame(loss)
                origin = self._book.origin(min(members))
                for number, cost in costs.items():
                    self._book.tell(number, outcome, device_seconds=cost)
                    self._announce(worker, number, outcome, None)
                    self._files.note_end(kept=False)
                if not is_orphan:
                    self._failures.count(origin, outcome)  # once: it was one accident
            case preparing:
                if preparing is not None:
                    self._jobs.appendleft(preparing.job)
        if is_orphan or not isinstance(job, Training):
            self._failures.count_idle_loss(worker.cause_of_end, message)
        if worker.slot is not None:
            start_worker(self._pool, self._spec, worker.slot)
