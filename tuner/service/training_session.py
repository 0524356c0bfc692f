"""What a worker does: make ready what all workers need, and train trials."""

import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from time import sleep
from typing import Never

from tuner.data.duplicates import describe_near
from tuner.data.splits import search_rows
from tuner.data.store import open_store
from tuner.errors import DataError, first_line
from tuner.models.backbone import create_backbone
from tuner.models.weights import load_weights
from tuner.service.admission import Admission, DoesNotFit
from tuner.service.feature_banks import FeatureBanks
from tuner.service.head_starts import HeadStarts
from tuner.service.head_training import HeadTraining
from tuner.service.messages import Coordinator, EpochDone, Probe, Probed, Started, Train, TrialDone, report_progress
from tuner.service.outcomes import blame, comes_from_lost_device
from tuner.service.prefix_banks import PrefixBanks
from tuner.service.slots import usable_cores
from tuner.service.spending import Spending
from tuner.service.step_probe import StepProbe
from tuner.service.study_data import compare_search_splits
from tuner.service.workbench import Workbench
from tuner.training.checkpoint import Checkpoint, CheckpointFile, identify_trial, read_made_from
from tuner.training.device import release_memory
from tuner.training.loop import TrainingJob
from tuner.training.metrics import Scores, pool_scores
from tuner.training.pretrain import pretrain_backbone
from tuner.trial import EpochResult, Reason, Repeat, TrialOutcome, TrialParams, TrialState, Usage

_N_NAMED = 5
_UNREADABLE_SECONDS = 5.0
"""How long a worker waits after files could not be read: a disk that is away comes back in seconds, or not at all."""


class TrainingSession:
    """One worker's work on a study."""

    def __init__(self, bench: Workbench, coordinator: Coordinator) -> None:
        self._bench, self._spec, self._data = bench, bench.spec, bench.data
        self._coordinator = coordinator
        banks = FeatureBanks(bench, coordinator)
        self._heads, self._head_starts = HeadTraining(bench, coordinator, banks), HeadStarts(bench, banks)
        self._prefixes = PrefixBanks(bench, coordinator)
        self._admission = Admission(bench)
        self._probe = StepProbe(bench.device, self._make_job)

    def check_data(self, data_hash: str) -> None:
        """Check that this worker sees the images that the first one described.

        Raises:
            DataError: If they have changed since.
        """
        if data_hash != self._data.hash:
            raise DataError("data.path: must not change while the study runs, got other images than at its start")

    # --- once for all workers ---

    def prepare(self, backbone: str | None) -> None:
        """Make ready what every worker needs: the images (None), or a backbone's weights.

        Raises:
            DataError, ModelError, StorageError: If it cannot be had.
        """
        try:
            self._prepare(backbone)
        except Exception as error:
            if comes_from_lost_device(error):
                _give_up(error)
            raise

    def _prepare(self, backbone: str | None) -> None:
        if backbone is None:
            self._decode_images()
        elif self._spec.pretraining is not None:
            self._pretrain(backbone)
        else:
            # Trials would fetch the weights as well, but a hub out of reach is no trial's failure.
            section = self._bench.section(backbone)
            n_classes, image_size = len(self._data.index.classes), self._spec.data.image_size
            load_weights(
                create_backbone(backbone, section, n_classes=n_classes, image_size=image_size), backbone, section
            )

    def _decode_images(self) -> None:
        names = self._spec.backbone_names()
        for interpolation in sorted({self._bench.preprocess(name).interpolation for name in names}):
            store = open_store(
                self._data.index,
                search_rows(self._data.splits),
                self._spec.data,
                interpolation=interpolation,
                n_threads=usable_cores(),  # the other workers wait for it
                on_progress=report_progress(self._coordinator, "decoding images"),
            )
        if store.bad:
            shown = ", ".join(f"{image.name} ({image.reason})" for image in store.bad[:_N_NAMED])
            more = f" and {len(store.bad) - _N_NAMED} more" if len(store.bad) > _N_NAMED else ""
            self._bench.note(f"left out, they cannot be decoded: {shown}{more}")
        for line in describe_near(compare_search_splits(self._data, store), held_out="val", others="train"):
            self._bench.note(line)

    def _pretrain(self, backbone: str) -> None:
        epochs: list[EpochResult] = []
        pretrain_backbone(backbone, self._spec, self._bench.device, epochs.append)
        if epochs:
            seconds = sum(result.seconds for result in epochs)
            accuracy = epochs[-1].val_accuracy
            self._bench.note(f"pretrained {backbone}: source val_accuracy {accuracy:.4f} in {seconds:.0f} s")

    # --- trials ---

    def release_memory(self) -> None:
        """Forget features, maps and models that can be had again."""
        self._heads.release_memory()
        self._prefixes.release_memory()

    def probe(self, request: Probe) -> Probed:
        """Say how fast a recipe trains here while other workers train as well."""
        try:
            return self._probe.measure(request)
        except Exception as error:
            if comes_from_lost_device(error):
                _give_up(error)
            raise

    def train(self, request: Train) -> None:
        """Train the trials of a request, and say of each how it ended: what goes wrong in one is an outcome."""
        self._probe.forget()
        try:
            if request.uses_features:
                self._heads.train(request.members)
                return
            if self._bench.device.type == "cuda":
                self._heads.release_memory()  # a whole model needs the device's memory more
            for number, params in request.members:
                self._coordinator.send(self._train_alone(number, params, request))
        except Exception as error:
            if comes_from_lost_device(error):
                _give_up(error)
            raise

    def _train_alone(self, number: int, params: TrialParams, request: Train) -> TrialDone:
        self._admission.begin()
        try:
            if request.repeats:
                done = self._repeat_trial(number, params, request.repeats)
            else:
                done = self._run_trial(number, params, request)
            spent = done.usage
            usage = replace(self._admission.usage, features=spent.features, saved_seconds=spent.saved_seconds)
            return replace(done, usage=usage)
        except Exception as error:  # a user's backbone may raise anything, and the search goes on
            if comes_from_lost_device(error):
                raise
            outcome = blame(error)
        release_memory(self._bench.device)  # out of the except block: its traceback held on to the trial's tensors
        if outcome.reason is Reason.UNREADABLE:
            self._coordinator.send(Started())  # the trial's time is not for waiting
            sleep(_UNREADABLE_SECONDS)
        return TrialDone(number=number, outcome=outcome, usage=self._admission.usage)

    def _run_trial(self, number: int, params: TrialParams, request: Train) -> TrialDone:
        job, spending = self._admit_job(params, request)
        outcome, kept = TrialOutcome(state=TrialState.PRUNED, reason=Reason.PRUNER), False
        file = self._find_checkpoint(number, job, request.checkpoint)
        saved = None if file is None else file.read(job.model)
        if saved is not None and not self._replay(number, saved):
            return TrialDone(number=number, outcome=outcome)
        if saved is None:
            self._head_starts.give(job)
        self._coordinator.send(Started())
        for result, scores in self._admission.train(job, file, saved):
            verdict = self._coordinator.ask_verdict(EpochDone(results=((number, result),)))
            if number in verdict.stop:
                break
            if result.epoch == params.epochs:
                outcome = TrialOutcome(state=TrialState.COMPLETE, report=scores.report)
                kept = verdict.keep == number and self._bench.keep_model(job.model, params, verdict)
        usage = Usage() if spending is None else spending.describe_usage()
        return TrialDone(number=number, outcome=outcome, kept=kept, usage=usage)

    def _admit_job(self, params: TrialParams, request: Train) -> tuple[TrainingJob, Spending | None]:
        """Return the job of a trial as it fits into memory: on kept maps, or else on images; and what maps took.

        Raises:
            DoesNotFit: If it does not fit either way.
        """
        job, spending = self._make_cached_job(params, request)
        try:
            return self._admission.admit(job), spending
        except DoesNotFit:
            if job.cached is None:
                raise
        job = replace(job, cached=None, graphs=None)  # out of the except block: its traceback held on to the maps
        self._prefixes.release_memory()
        return self._admission.admit(job), None

    def _make_cached_job(self, params: TrialParams, request: Train) -> tuple[TrainingJob, Spending | None]:
        """Return the job of a trial, on kept maps of its frozen layers if that saves time, and what those took."""
        job = self._make_job(params)
        made_from = read_made_from(Path(request.checkpoint)) if request.checkpoint else {}
        must = made_from.get("on_maps")  # a checkpoint serves its own kind alone
        found = self._prefixes.find(params, job.model, n_sharing=request.n_sharing, must=must, cuts=request.cuts)
        if found is None:
            if self._bench.device.type == "cuda":
                self._prefixes.release_memory()  # a whole model needs the device's memory more
            return job, None
        cached, spending = found
        # Each suffix would be compiled anew, since torch compiles a class's code and each traced graph is a class.
        return replace(job, cached=cached, compiler=None, graphs=self._bench.graphs), spending

    def _repeat_trial(self, number: int, params: TrialParams, repeats: tuple[Repeat, ...]) -> TrialDone:
        """Train a trial several times; its report is of all validation images together."""
        seen: list[Scores] = []
        kept = False
        for which, repeat in enumerate(repeats):
            job = self._admission.admit(self._make_job(params.with_seed(repeat.seed), repeat))
            if which == 0:
                self._coordinator.send(Started())  # the time of a trial is that of all its trainings
            self._head_starts.train_on_images(job)
            for result, scores in self._admission.train(job):
                done = EpochDone(results=((number, replace(result, repeat=which)),))
                verdict = self._coordinator.ask_verdict(done)
                if number in verdict.stop:
                    outcome = TrialOutcome(state=TrialState.PRUNED, reason=Reason.PRUNER)
                    return TrialDone(number=number, outcome=outcome)
                if result.epoch == params.epochs:
                    seen.append(scores)
                    kept = verdict.keep == number and self._bench.keep_model(job.model, job.params, verdict)
        outcome = TrialOutcome(state=TrialState.COMPLETE, report=pool_scores(seen).report)
        return TrialDone(number=number, outcome=outcome, kept=kept)

    def _make_job(self, params: TrialParams, repeat: Repeat | None = None) -> TrainingJob:
        preprocessing = self._bench.preprocess(params.backbone)
        train, val = self._bench.load_repeat(preprocessing.interpolation, repeat)
        return TrainingJob(
            model=self._bench.make_model(params),
            params=params,
            train=train,
            val=val,
            preprocessing=preprocessing,
            device=self._bench.device,
            compiler=self._bench.compiler,
        )

    def _find_checkpoint(self, number: int, job: TrainingJob, checkpoint: str) -> CheckpointFile | None:
        if not checkpoint:
            return None
        made_from = {
            "data_hash": self._data.hash,
            "image_size": self._spec.data.image_size,
            "resize": self._spec.data.resize,
            "preprocessing": asdict(job.preprocessing),
            "kwargs": self._bench.section(job.params.backbone).kwargs,
            "on_maps": job.cached is not None,  # equal but for rounding
        }
        return CheckpointFile(
            Path(checkpoint),
            number=number,
            identity=identify_trial(job.params, job.device, made_from=made_from),
            every_seconds=self._spec.workers.checkpoint_every,
            note=self._bench.note,
        )

    def _replay(self, number: int, saved: Checkpoint) -> bool:
        """Report the epochs of an earlier attempt as this one's; return whether the trial goes on."""
        self._bench.note(f"trial {number} goes on after epoch {len(saved.results)} of trial {saved.number}")
        verdicts = (self._coordinator.ask_verdict(EpochDone(results=((number, result),))) for result in saved.results)
        return not any(number in verdict.stop for verdict in verdicts)


def _give_up(error: Exception) -> Never:
    """End this process, whose CUDA context is broken; another one takes over, and its trials are tried again."""
    sys.stderr.write(first_line(error))
    sys.stderr.flush()
    os._exit(1)
