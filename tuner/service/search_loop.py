"""The loop of a run: give work to idle workers, listen, report, prune, tell."""

import time
from collections import deque

from tuner.errors import SearchError
from tuner.search.studies import StoredStudy
from tuner.search.trial_book import TrialBook
from tuner.service.kept_models import model_folder, remove_halves, remove_models
from tuner.service.messages import EpochDone, Hello, Note, Prepare, Prepared, Reply, Train, TrialDone, Verdict
from tuner.service.pool import Pool, Worker
from tuner.service.progress import (
    ActivityChanged,
    BestFound,
    Counted,
    Display,
    EpochReported,
    Noted,
    TrialFinished,
    TrialStarted,
)
from tuner.service.result import StoppedBy, StudyStatus, read_status
from tuner.service.scouting import TICK_SECONDS, Scouted, explain_loss, start_worker
from tuner.service.signals import StopSignals
from tuner.trial import Reason, TrialOutcome, TrialState

MAX_FAILS_IN_A_ROW = 5
_MAX_IDLE_LOSSES = 3
_INTERRUPTED = TrialOutcome(state=TrialState.FAIL, reason=Reason.INTERRUPTED, message="the run was stopped")


class SearchLoop:
    """One run of a study, from its first worker's description to its last trial."""

    def __init__(
        self,
        stored: StoredStudy,
        url: str,
        scouted: Scouted,
        *,
        pool: Pool,
        display: Display,
        signals: StopSignals,
        deadline: float,
    ) -> None:
        self._stored, self._spec, self._url = stored, stored.spec, url
        self._pool, self._display, self._signals = pool, display, signals
        self._book = TrialBook(stored)
        self._data_hash = scouted.description.data_hash
        self._ready = set(scouted.ready)
        self._jobs = deque(
            Prepare(data_hash=self._data_hash, backbone=name) for name in (None, *self._spec.backbone_names())
        )
        self._busy: dict[int, Prepare | Train] = {}
        self._n_fails = 0
        self._n_idle_losses = 0
        self._deadline = deadline

    def run(self) -> StudyStatus:
        """Run to the end and return the study's status.

        Raises:
            SearchError: If five trials fail in a row, or none completes.
        """
        if n_orphans := self._book.prepare():
            self._display.show(Noted(text=f"{n_orphans} trials of a killed run are queued again"))
        remove_halves(self._url, self._spec.study.name)
        self._remove_old_models()
        self._display.show(Counted(n_done=self._book.count_finished(), n_trials=self._n_wanted()))
        try:
            while self._dispatch():
                self._listen()
        finally:
            for number in self._book.running_numbers:
                self._book.tell(number, _INTERRUPTED)
        return self._conclude()

    def _conclude(self) -> StudyStatus:
        stopped_by: StoppedBy = self._signals.received or (
            "timeout" if self._is_late() and self._n_missing() > 0 else "done"
        )
        status = read_status(self._stored, self._url, stopped_by=stopped_by)
        if status.best is None and stopped_by == "done":
            raise SearchError(
                f"study {status.name!r}: at least one trial must complete, got {status.counts['PRUNED']} pruned and "
                f"{status.counts['FAIL']} failed; 'tuner trials' lists the reasons"
            )
        return status

    # --- give work ---

    def _n_wanted(self) -> int:
        return min(self._spec.search.n_trials, self._book.max_trials)

    def _n_missing(self) -> int:
        return self._n_wanted() - self._book.count_finished()

    def _is_late(self) -> bool:
        return time.monotonic() >= self._deadline

    def _dispatch(self) -> bool:
        """Give work to idle workers; return whether there is anything to wait for."""
        if self._signals.received:
            return False
        idle = [
            worker
            for number, worker in self._pool.workers.items()
            if number in self._ready and number not in self._busy
        ]
        if self._is_late():
            self._jobs.clear()
        if self._jobs or any(isinstance(job, Prepare) for job in self._busy.values()):
            self._prepare(idle)
            return True
        n_startable = 0 if self._is_late() else self._n_missing() - len(self._busy)
        for worker in idle[: max(0, n_startable)]:
            if not self._start_trial(worker):
                break
        # With all workers busy starting up there is something to wait for although nothing is busy yet.
        return bool(self._busy) or (n_startable > 0 and not self._book.is_exhausted)

    def _prepare(self, idle: list[Worker]) -> None:
        """Prepare the images first, then the backbones side by side."""
        for worker in idle:
            images_pending = any(isinstance(job, Prepare) and job.backbone is None for job in self._busy.values())
            if not self._jobs or images_pending:
                return
            job = self._jobs.popleft()
            self._busy[worker.number] = job
            text = f"preparing {job.backbone or 'the images'}"
            self._display.show(ActivityChanged(worker=worker.number, text=text))
            worker.send(job)

    def _start_trial(self, worker: Worker) -> bool:
        asked = self._book.ask(worker.slot.device if worker.slot else "")
        if asked is None:
            return False
        number, params = asked
        job = Train(data_hash=self._data_hash, number=number, params=params)
        self._busy[worker.number] = job
        worker.send(job)
        self._display.show(TrialStarted(worker=worker.number, number=number, params=params))
        return True

    # --- listen ---

    def _listen(self) -> None:
        for worker, reply in self._pool.wait(TICK_SECONDS):
            if reply is None:
                self._lose(worker)
            else:
                self._handle(worker, reply)

    def _handle(self, worker: Worker, reply: Reply) -> None:
        match reply:
            case Hello():
                self._ready.add(worker.number)
            case Note():
                self._display.show(Noted(text=reply.text))
            case Prepared():
                del self._busy[worker.number]
                self._display.show(ActivityChanged(worker=worker.number, text=""))
            case EpochDone():
                self._judge(worker, reply)
            case TrialDone():
                self._finish(worker, reply)
            case _:
                raise TypeError(f"unexpected reply: {reply}")

    def _judge(self, worker: Worker, done: EpochDone) -> None:
        """Report an epoch, and answer with what the trial is to do."""
        n_epochs = self._spec.training.epochs
        value = done.result.objective_value(self._spec.study.objective)
        must_stop = self._book.report(done.number, done.result)
        epoch = EpochReported(worker=worker.number, epoch=done.result.epoch, n_epochs=n_epochs, value=value)
        self._display.show(epoch)
        if must_stop:
            worker.send(Verdict(action="stop"))
        elif done.result.epoch == n_epochs and self._book.would_be_best(done.number, value):
            worker.send(self._ask_to_keep(done.number, value))
        else:
            worker.send(Verdict(action="go_on"))

    def _ask_to_keep(self, number: int, value: float) -> Verdict:
        provenance = {
            "study": self._spec.study.name,
            "trial": number,
            "objective": self._spec.study.objective,
            "value": value,
            "trained_on": "train",
        }
        folder = model_folder(self._url, self._spec.study.name, number)
        return Verdict(action="keep", folder=str(folder), provenance=provenance)

    def _finish(self, worker: Worker, done: TrialDone) -> None:
        del self._busy[worker.number]
        value = self._book.tell(done.number, done.outcome)
        self._show_end(worker, done.number, done.outcome, value)
        if value is not None and self._book.best_number() == done.number:
            self._display.show(BestFound(number=done.number, value=value))
        if done.kept:
            self._remove_old_models()
        self._count_fails(done.outcome)

    def _show_end(self, worker: Worker, number: int, outcome: TrialOutcome, value: float | None) -> None:
        self._display.show(Counted(n_done=self._book.count_finished(), n_trials=self._n_wanted()))
        self._display.show(TrialFinished(worker=worker.number, number=number, outcome=outcome, value=value))

    def _count_fails(self, outcome: TrialOutcome) -> None:
        self._n_fails = self._n_fails + 1 if outcome.state is TrialState.FAIL else 0
        if self._n_fails >= MAX_FAILS_IN_A_ROW:
            raise SearchError(
                f"study {self._spec.study.name!r}: {self._n_fails} trials failed in a row; "
                f"the last one: {outcome.message}; 'tuner show' has the tracebacks"
            )

    def _lose(self, worker: Worker) -> None:
        """Tell the trial of a dead worker, and start another worker in its slot."""
        message = worker.describe_end()
        self._display.show(ActivityChanged(worker=worker.number, text=""))
        self._display.show(Noted(text=f"{message}; another one takes its place"))
        self._ready.discard(worker.number)
        match self._busy.pop(worker.number, None):
            case Train(number=number):
                outcome = TrialOutcome(state=TrialState.FAIL, reason=Reason.WORKER_LOST, message=message)
                self._book.tell(number, outcome)
                self._show_end(worker, number, outcome, None)
                self._count_fails(outcome)
            case job:
                self._n_idle_losses += 1
                if self._n_idle_losses >= _MAX_IDLE_LOSSES:
                    raise explain_loss(message)
                if job is not None:
                    self._jobs.appendleft(job)
        if worker.slot is not None:
            start_worker(self._pool, self._spec, worker.slot)

    def _remove_old_models(self) -> None:
        """Keep the best trial's model, and those that are being written."""
        best = self._book.best_number()
        spared = self._book.running_numbers if best is None else (best, *self._book.running_numbers)
        remove_models(self._url, self._spec.study.name, keep=spared)
