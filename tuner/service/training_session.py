"""What a worker keeps between trials, and how it trains one."""

import gc
import traceback
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import torch

from tuner.data.image_set import ImageSet, load_image_set, move_to
from tuner.data.index import Split
from tuner.data.splits import search_rows
from tuner.data.store import open_store
from tuner.errors import DataError, DeviceError, ExportError
from tuner.models.backbone import Preprocessing, create_backbone, read_preprocessing
from tuner.models.weights import load_weights
from tuner.service.messages import EpochDone, TrialDone, Verdict
from tuner.service.study_data import StudyData
from tuner.spec.sections import BackboneSection, StudySpec
from tuner.training.device import is_out_of_memory
from tuner.training.loop import Diverged, TrainingJob, train_epochs
from tuner.training.package import Manifest, write_package
from tuner.training.prepare import WeightsCache, prepare_model
from tuner.training.pretrain import find_pretrained, pretrain_backbone
from tuner.trial import EpochResult, Reason, TrialOutcome, TrialParams, TrialState

AskVerdict = Callable[[EpochDone], Verdict]
_N_NAMED = 5
_NOTE_SECONDS = 10.0


class TrainingSession:
    """The study in a worker: its device, its images, and weights that were read before."""

    def __init__(
        self, spec: StudySpec, data: StudyData, *, device: str, n_threads: int, note: Callable[[str], None]
    ) -> None:
        self._spec, self._data, self._n_threads, self._note = spec, data, n_threads, note
        self._device = _take_device(device)
        self._image_sets: dict[str, tuple[ImageSet, ImageSet]] = {}
        self._weights = WeightsCache()
        self._pretrained: dict[str, Path | None] = {}

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
        if backbone is None:
            self._decode_images()
        elif self._spec.pretraining is not None:
            self._pretrain(backbone)
        else:
            # Trials would fetch the weights as well, but a hub out of reach is no trial's failure.
            section = self._section(backbone)
            n_classes, image_size = len(self._data.index.classes), self._spec.data.image_size
            load_weights(
                create_backbone(backbone, section, n_classes=n_classes, image_size=image_size), backbone, section
            )

    def _decode_images(self) -> None:
        for interpolation in sorted({self._preprocess(name).interpolation for name in self._spec.backbone_names()}):
            store = open_store(
                self._data.index,
                search_rows(self._data.splits),
                self._spec.data,
                interpolation=interpolation,
                n_threads=self._n_threads,
                on_progress=self._note_progress(),
            )
        if store.bad:
            shown = ", ".join(f"{image.name} ({image.reason})" for image in store.bad[:_N_NAMED])
            more = f" and {len(store.bad) - _N_NAMED} more" if len(store.bad) > _N_NAMED else ""
            self._note(f"left out, they cannot be decoded: {shown}{more}")

    def _note_progress(self) -> Callable[[int, int], None]:
        """Return what says every few seconds how many images are decoded."""
        noted = monotonic()

        def note(n_done: int, n_images: int) -> None:
            nonlocal noted
            if monotonic() - noted > _NOTE_SECONDS:
                noted = monotonic()
                self._note(f"decoded {n_done} of {n_images} images")

        return note

    def _pretrain(self, backbone: str) -> None:
        epochs: list[EpochResult] = []
        pretrain_backbone(backbone, self._spec, self._device, epochs.append)
        if epochs:
            seconds = sum(result.seconds for result in epochs)
            self._note(f"pretrained {backbone}: source val_accuracy {epochs[-1].val_accuracy:.4f} in {seconds:.0f} s")

    # --- a trial ---

    def train(self, number: int, params: TrialParams, ask_verdict: AskVerdict) -> TrialDone:
        """Train one trial.

        Args:
            number: The trial's.
            params: Its recipe.
            ask_verdict: Reports an epoch and returns what to do next.

        Returns:
            How it ended: whatever goes wrong in it is an outcome, not an exception.
        """
        try:
            return self._run_trial(number, params, ask_verdict)
        except Diverged as error:
            outcome = _infeasible(Reason.DIVERGED, str(error))
        except Exception as error:  # noqa: BLE001 - a user's backbone may raise anything, and the search goes on
            outcome = _blame(error)
        # Out of the except block: its traceback held on to the trial's tensors.
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return TrialDone(number=number, outcome=outcome)

    def _run_trial(self, number: int, params: TrialParams, ask_verdict: AskVerdict) -> TrialDone:
        preprocessing = self._preprocess(params.backbone)
        train, val = self._load_images(preprocessing.interpolation)
        pretrained = self._find_pretrained(params.backbone)
        model = prepare_model(params, self._spec, train.n_classes, pretrained, self._weights)
        job = TrainingJob(
            model=model, params=params, train=train, val=val, preprocessing=preprocessing, device=self._device
        )
        outcome, kept = TrialOutcome(state=TrialState.PRUNED, reason=Reason.PRUNER), False
        for result, report in train_epochs(job):
            verdict = ask_verdict(EpochDone(number=number, result=result))
            if verdict.action == "stop":
                break
            if result.epoch == params.epochs:
                outcome = TrialOutcome(state=TrialState.COMPLETE, report=report)
                kept = verdict.action == "keep" and self._keep_model(job, verdict)
        return TrialDone(number=number, outcome=outcome, kept=kept)

    def _find_pretrained(self, backbone: str) -> Path | None:
        if backbone not in self._pretrained:
            path = find_pretrained(backbone, self._spec)[0] if self._spec.pretraining else None
            self._pretrained[backbone] = path
        return self._pretrained[backbone]

    def _load_images(self, interpolation: str) -> tuple[ImageSet, ImageSet]:
        if interpolation not in self._image_sets:
            train, val = (
                load_image_set(
                    self._data.index,
                    self._data.splits,
                    self._spec.data,
                    (split,),
                    interpolation=interpolation,
                    n_threads=self._n_threads,
                )
                for split in (Split.TRAIN, Split.VAL)
            )
            self._image_sets[interpolation] = move_to(train, self._device), move_to(val, self._device)
        return self._image_sets[interpolation]

    def _keep_model(self, job: TrainingJob, verdict: Verdict) -> bool:
        """Write the model folder; a full disk costs the folder, not the trial."""
        manifest = Manifest(
            backbone=job.params.backbone,
            kwargs=self._section(job.params.backbone).kwargs,
            preprocessing=job.preprocessing,
            classes=self._data.index.classes,
            image_size=self._spec.data.image_size,
            resize=self._spec.data.resize,
            params=job.params,
            provenance=verdict.provenance,
        )
        try:
            write_package(Path(verdict.folder), job.model, manifest)
        except ExportError as error:
            self._note(f"the model of the best trial could not be kept: {error}")
            return False
        return True

    def _section(self, backbone: str) -> BackboneSection:
        return self._spec.backbones.get(backbone, BackboneSection())

    def _preprocess(self, backbone: str) -> Preprocessing:
        return read_preprocessing(backbone, self._section(backbone))


def list_cuda_devices() -> tuple[str, ...]:
    """Return the names of the CUDA devices that this process sees."""
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))


def _take_device(kind: str) -> torch.device:
    """Return the worker's device; on CUDA the one that it was bound to, and the only one that it may see.

    Raises:
        DeviceError: If the binding failed.
    """
    if kind != "cuda":
        torch.set_num_threads(1)
        return torch.device("cpu")
    if (n_visible := torch.cuda.device_count()) != 1:
        raise DeviceError(f"workers.devices: a worker must see its own CUDA device alone, got {n_visible} devices")
    return torch.device("cuda", 0)


def _infeasible(reason: Reason, message: str) -> TrialOutcome:
    return TrialOutcome(state=TrialState.PRUNED, reason=reason, message=message)


def _blame(error: Exception) -> TrialOutcome:
    """Return the outcome of a trial that raised an error."""
    message = (str(error).strip() or type(error).__name__).splitlines()[0]
    if is_out_of_memory(error):
        return _infeasible(Reason.OUT_OF_MEMORY, message)
    return TrialOutcome(
        state=TrialState.FAIL,
        reason=Reason.ERROR,
        message=f"{type(error).__name__}: {message}",
        traceback="".join(traceback.format_exception(error)),
    )
