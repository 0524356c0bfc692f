"""Head-only trials in a worker: one pass of the frozen backbone serves them all, and their heads train as one."""

from torch import Tensor

from tuner.errors import first_line
from tuner.service.feature_banks import FeatureBanks
from tuner.service.messages import Coordinator, EpochDone, GivenBack, Started, TrialDone, Verdict
from tuner.service.outcomes import blame, comes_from_lost_device
from tuner.service.spending import Spending
from tuner.service.workbench import Workbench
from tuner.training.cohort import CohortEpoch, CohortJob, train_cohort
from tuner.training.device import release_memory
from tuner.training.epoch_numbers import Diverged
from tuner.training.head_features import NotCacheable, put_head
from tuner.training.prepare import keeps_head, start_heads
from tuner.trial import Reason, TrialOutcome, TrialParams, TrialState

Members = tuple[tuple[int, TrialParams], ...]

_STOPPED = TrialOutcome(state=TrialState.PRUNED, reason=Reason.PRUNER)


class HeadTraining:
    """Trains cohorts of heads."""

    def __init__(self, bench: Workbench, coordinator: Coordinator, banks: FeatureBanks) -> None:
        self._bench, self._coordinator, self._banks = bench, coordinator, banks

    def train(self, members: Members) -> None:
        """Train a cohort and say how each of its trials ended, or give back those that cannot use features.

        Raises:
            Exception: If the device is lost.
        """
        cohort = _Cohort(members)
        try:
            self._run(cohort)
        except Exception as error:  # a user's backbone may raise anything, and the search goes on
            if comes_from_lost_device(error):
                raise
            reason, is_lasting, outcome = first_line(error), isinstance(error, NotCacheable), cohort.blame(error)
        else:
            return
        self.release_memory()  # out of the except block: its traceback held on to the cohort's tensors
        if cohort.n_epochs > 0:
            self._end(cohort, tuple(cohort.running), outcome)
            return
        numbers = tuple(cohort.number(index) for index in cohort.running)
        backbone = members[0][1].backbone
        self._coordinator.send(GivenBack(numbers=numbers, backbone=backbone, reason=reason, is_lasting=is_lasting))

    def release_memory(self) -> None:
        """Forget features and model, for what needs the device's memory next; the cache still holds what it kept."""
        self._banks.release_memory()
        release_memory(self._bench.device)

    def _run(self, cohort: "_Cohort") -> None:
        """Train the cohort epoch by epoch until all its trials have ended."""
        training = train_cohort(self._make_job(cohort))
        epoch = next(training)
        while True:
            cohort.n_epochs += 1
            done = {}
            for index, result in epoch.results.items():
                if isinstance(result, Diverged):
                    self._end(cohort, (index,), blame(result))
                else:
                    done[cohort.number(index)] = result[0]
            if not done:
                return
            verdict = self._coordinator.ask_verdict(EpochDone(results=tuple(done.items())))
            stopped = tuple(index for index in cohort.running if cohort.number(index) in verdict.stop)
            self._end(cohort, stopped, _STOPPED)
            if epoch.epoch == cohort.recipes[0].epochs:
                self._complete(cohort, epoch, verdict)
            if not cohort.running:
                return
            epoch = training.send(frozenset(stopped))

    def _make_job(self, cohort: "_Cohort") -> CohortJob:
        first = cohort.recipes[0]
        body = self._banks.find_body(first)
        train, val = self._bench.load_images(self._bench.preprocess(first.backbone).interpolation)
        val_bank, val_features = self._banks.open_val(first)
        cohort.spending.count_opened(val_bank)

        def find_features(epoch: int) -> Tensor:
            bank, features = self._banks.open_train(first, epoch)
            if epoch == 1:
                self._coordinator.send(Started())
            cohort.spending.count_opened(bank)
            cohort.spending.count_epoch(bank, val_bank)
            return features

        kept = keeps_head(self._bench.spec, first.backbone)
        weights, biases = start_heads(body.head, [params.seed for params in cohort.recipes], keep_head=kept)
        return CohortJob(
            params=cohort.recipes,
            features=find_features,
            labels=train.labels,
            val_features=val_features,
            val_labels=val.labels,
            n_classes=train.n_classes,
            weights=weights,
            biases=biases,
            device=self._bench.device,
        )

    def _complete(self, cohort: "_Cohort", epoch: CohortEpoch, verdict: Verdict) -> None:
        """End the trials that went through all epochs; keep the model of the one that the verdict names."""
        for index in tuple(cohort.running):
            kept = cohort.number(index) == verdict.keep and self._keep_model(cohort, index, epoch, verdict)
            result = epoch.results[index]
            assert not isinstance(result, Diverged)  # noqa: S101 - those have ended
            outcome = TrialOutcome(state=TrialState.COMPLETE, report=result[1].report)
            self._end(cohort, (index,), outcome, kept=kept)

    def _keep_model(self, cohort: "_Cohort", index: int, epoch: CohortEpoch, verdict: Verdict) -> bool:
        params = cohort.recipes[index]
        try:
            model = self._bench.make_model(params)
            put_head(model, *epoch.heads[index])
            return self._bench.keep_model(model, params, verdict)
        except Exception as error:  # noqa: BLE001 - whatever it is, it costs the folder, not the trial
            self._bench.note(f"the model of the best trial could not be kept: {first_line(error)}")
            return False

    def _end(self, cohort: "_Cohort", indices: tuple[int, ...], outcome: TrialOutcome, *, kept: bool = False) -> None:
        usage = cohort.spending.describe_usage()
        for index in indices:
            cohort.running.remove(index)
            done = TrialDone(number=cohort.number(index), outcome=outcome, kept=kept, usage=usage)
            self._coordinator.send(done)


class _Cohort:
    """Trials in training, and what their features cost. Mutable."""

    def __init__(self, members: Members) -> None:
        self._numbers = tuple(number for number, _ in members)
        self.recipes = tuple(params for _, params in members)
        self.running = list(range(len(members)))
        """Positions of those that have not ended."""
        self.n_epochs = 0
        """Epochs that have been trained."""
        self.spending = Spending(len(members))

    def number(self, index: int) -> int:
        """Return the number of the trial at a position."""
        return self._numbers[index]

    def blame(self, error: Exception) -> TrialOutcome:
        """Return the outcome for trials that an error ended together: only one that was alone is to blame for it."""
        if len(self.recipes) == 1 and not isinstance(error, NotCacheable):
            return blame(error)
        return TrialOutcome(state=TrialState.FAIL, reason=Reason.COHORT_LOST, message=blame(error).message)
