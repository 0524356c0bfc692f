"""Retrain the best recipe on train + val, look at test once, and write the model folder."""

import platform
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from tuner.data.image_set import ImageSet, move_to
from tuner.data.index import Split
from tuner.errors import ExportError, ModelError
from tuner.production.calibration import fit_temperature
from tuner.production.locked_test import (
    Announce,
    LookAtTest,
    compare_with_test,
    load_images,
    look_at_test,
    open_test,
)
from tuner.production.machine import choose_device, reporting_memory, using_cores
from tuner.production.stored_recipe import (
    StoredRecipe,
    compare_weights,
    expect_test,
    permit_code,
    read_data,
    read_recipe,
    record_retraining,
)
from tuner.production.train_result import NO_TEST, TrainResult, add_result_files, describe_trained
from tuner.search.samplers import derive_seed
from tuner.service.study_data import StudyData
from tuner.training.batches import predict_logits
from tuner.training.device import describe_computing
from tuner.training.epoch_numbers import Diverged
from tuner.training.head_start import train_head
from tuner.training.loop import TrainingJob, train_only
from tuner.training.package import Manifest, check_replaceable, write_package
from tuner.training.prepare import keeps_head, prepare_model
from tuner.training.pretrain import pretrain_backbone
from tuner.trial import EpochResult, TrialParams

_MEMORY_ADVICE = "free some, or choose another --device"


def train_best(
    study: str,
    out: str | Path,
    *,
    storage: str | None = None,
    device: str = "auto",
    allow_code: bool = False,
    trial: int | None = None,
    n_seeds: int = 1,
    announce: Announce | None = None,
) -> TrainResult:
    """Retrain a study's best recipe on train + val, evaluate it on test once, and write the model folder.

    The recipe keeps its epochs, so that the optimizer's steps grow with the images. It is also trained on train alone,
    for val to tell the temperature that calibrates its probabilities. The same study gives the same weights again on a
    CPU with the same number of threads.

    Args:
        study: The study's name.
        out: The model folder to write; an older model folder is replaced.
        storage: SQLite URL; default: ``TUNER_STORAGE``, else ``sqlite:///studies.db``.
        device: ``auto``, ``cpu`` or ``cuda:N``.
        allow_code: Whether a backbone that is a user's function may be imported and called.
        trial: Number of the completed trial to retrain; default: the confirmed best, else the best of the search.
        n_seeds: Models to train, by seeds of their own, all looked at in the one look at test. The first is written,
            whatever that shows: choosing by test would make its number worthless.
        announce: Told what is going on, a line at a time.

    Raises:
        ExportError: If no trial completed, or ``out`` is no place for a model folder.
        DataError: If the images cannot be used, or are not the study's.
        ModelError: If the backbone or its weights cannot be used, or would run code that was not allowed.
        StudyError, StorageError, DeviceError: If there is no such study, storage or device, or no memory left.
        ValueError: If there is no seed.
    """
    if n_seeds < 1:
        raise ValueError(f"n_seeds: must be at least 1, got {n_seeds}")
    announce = announce or _say_nothing
    folder = Path(out)
    check_place(folder)
    recipe = read_recipe(study, storage, trial)
    permit_code(recipe, allow_code=allow_code)
    chosen = choose_device(device)
    data = read_data(recipe)
    if note := compare_weights(recipe):
        announce(note)
    with using_cores() as n_threads:
        return _Retraining(recipe, data, chosen, n_threads, announce).run(folder, n_seeds)


def _say_nothing(_: str) -> None:
    pass


def check_place(folder: Path) -> None:
    """Check that a model folder can be written, before anything is trained.

    Raises:
        ExportError: If not.
    """
    folder = folder.resolve()
    parent = folder.parent
    try:
        check_replaceable(folder)
        while not parent.exists():
            parent = parent.parent
        # Tried, since permissions say nothing of a disk that is mounted read-only.
        with TemporaryDirectory(dir=parent, prefix=".tuner-"):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ExportError(f"{folder}: must lie in a folder that can be written, got '{parent}' ({reason})") from error


class _Retraining:
    """One retraining: what it reads, and where it runs."""

    def __init__(
        self, recipe: StoredRecipe, data: StudyData, device: torch.device, n_threads: int, announce: Announce
    ) -> None:
        self._recipe = recipe
        self._data = data
        self._device = device
        self._n_threads = n_threads
        self._announce = announce
        self._params = recipe.params
        self._preprocessing = recipe.preprocessing

    def run(self, folder: Path, n_seeds: int) -> TrainResult:
        """Train, look at test, and write the folder."""
        # Decoded first, so that an unreadable test image does not show after hours of training. No model has seen it.
        recipe, n_threads = self._recipe, self._n_threads
        test = open_test(recipe, self._data, n_threads=n_threads)
        if test is not None:
            recipe = self._recipe = expect_test(recipe, len(test.labels))
        else:
            self._announce(f"{NO_TEST}; data.test_fraction = 0.2 in a new study keeps one back")
        with reporting_memory(self._device, n_images=self._recipe.n_at_once, advice=_MEMORY_ADVICE):
            images = load_images(recipe, self._data, Split.TRAIN, Split.VAL, n_threads=n_threads)
        duplicates = None if test is None else compare_with_test(self._data, test, images, self._announce)
        started = time.perf_counter()
        seeds = list_seeds(self._params.seed, n_seeds)
        temperature = self._fit_temperature()
        models = [self._train_model(images, self._params.with_seed(seed), "train + val") for seed in seeds]
        seconds = time.perf_counter() - started
        scores = None if test is None else self._look(models, test, folder, temperature)
        result = TrainResult(
            folder=folder,
            recipe=recipe,
            seeds=seeds,
            n_trained_images=len(images.labels),
            temperature=temperature,
            seconds=seconds,
            device=str(self._device),
            n_threads=n_threads,
            versions=_list_versions(recipe.facts.versions),
            test=scores,
            test_duplicates=duplicates,
        )
        n_devices = n_threads if self._device.type == "cpu" else 1  # a CPU core is a device, as in runs
        record_retraining(recipe, seconds * n_devices, describe_trained(result))
        write_package(folder, models[0], self._describe_model(result), lambda path: add_result_files(path, result))
        return result

    def _fit_temperature(self) -> float:
        """Return the temperature that a model of the recipe needs, trained on train alone, on val."""
        train, val = (
            load_images(self._recipe, self._data, split, n_threads=self._n_threads)
            for split in (Split.TRAIN, Split.VAL)
        )
        model = self._train_model(train, self._params, "train", purpose=", so that val can calibrate it")
        with reporting_memory(self._device, n_images=self._recipe.n_at_once, advice=_MEMORY_ADVICE):
            val = move_to(val, self._device)
            logits = predict_logits(
                model,
                val,
                self._preprocessing,
                self._device,
                precision=self._params.precision,
                batch_size=self._recipe.n_at_once,
            )
        if not logits.isfinite().all():
            raise ModelError(f"trial {self._recipe.number}: its recipe must converge on train, got logits of infinity")
        return fit_temperature(logits, val.labels.to(self._device))

    def _train_model(self, images: ImageSet, params: TrialParams, splits: str, purpose: str = "") -> nn.Module:
        """Return a model trained on the images of some splits."""
        device = self._device
        with reporting_memory(device, n_images=self._recipe.n_at_once, advice=_MEMORY_ADVICE):
            images = move_to(images, device)
            model = prepare_model(params, self._recipe.spec, images.n_classes, self._pretrain())
            self._announce(
                f"retraining trial {self._recipe.number} ({params.backbone}) on {len(images.labels)} images of "
                f"{splits}, {params.epochs} epochs, {device}{self._tell_parts()}{purpose}"
            )
            job = TrainingJob(
                model=model,
                params=params,
                train=images,
                val=None,
                preprocessing=self._preprocessing,
                device=device,
                micro_batch=self._recipe.micro_batch,
            )
            try:
                train_head(job, keep_head=keeps_head(self._recipe.spec, params.backbone), on_epoch=self._announce_head)
                train_only(job, self._announce_epoch)
            except Diverged as error:
                raise ModelError(
                    f"trial {self._recipe.number}: its recipe must converge on {splits} too, got: {error}"
                ) from error
        return model

    def _tell_parts(self) -> str:
        micro_batch = self._recipe.micro_batch
        return "" if micro_batch is None else f", {micro_batch} images at a time"

    def _announce_head(self, epoch: int, loss: float) -> None:
        recipe = self._params.head_recipe
        assert recipe is not None  # noqa: S101 - only a head start tells of its epochs
        self._announce(f"the head alone, epoch {epoch} of {recipe.epochs}: training loss {loss:.4f}")

    def _announce_epoch(self, epoch: int, loss: float) -> None:
        self._announce(f"epoch {epoch} of {self._params.epochs}: training loss {loss:.4f}")

    def _pretrain(self) -> Path | None:
        """Return the file of pretrained weights, from the cache if it is there; None without pretraining."""

        def announce_epoch(result: EpochResult) -> None:
            accuracy = f"source val_accuracy {result.val_accuracy:.4f}"
            self._announce(f"pretraining {self._params.backbone}, epoch {result.epoch}: {accuracy}")

        if self._recipe.spec.pretraining is None:
            return None
        return pretrain_backbone(self._params.backbone, self._recipe.spec, self._device, announce_epoch)

    def _look(self, models: list[nn.Module], test: ImageSet, folder: Path, temperature: float) -> LookAtTest:
        return look_at_test(
            models,
            test,
            self._recipe,
            reason=f"train: trial {self._recipe.number} to {folder.resolve()}",
            temperature=temperature,
            preprocessing=self._preprocessing,
            precision=self._params.precision,
            batch_size=self._recipe.n_at_once,
            device=self._device,
            announce=self._announce,
        )

    def _describe_model(self, result: TrainResult) -> Manifest:
        recipe, section = self._recipe, self._recipe.spec.data
        return Manifest(
            backbone=self._params.backbone,
            kwargs=recipe.section.kwargs,
            preprocessing=self._preprocessing,
            classes=self._data.index.classes,
            image_size=section.image_size,
            resize=section.resize,
            params=self._params,
            temperature=result.temperature,
            provenance={
                "study": recipe.study,
                "trial": recipe.number,
                "objective": recipe.spec.study.objective,
                "value": recipe.value,
                "trained_on": "train+val",
                "data_hash": self._data.hash,
                "split_counts": recipe.facts.split_counts,
                **describe_computing(self._device, self._params.precision),
                "n_threads": result.n_threads,
                "versions": result.versions,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )


def list_seeds(seed: int, n_seeds: int) -> tuple[int, ...]:
    """Return the seeds of some retrainings: the trial's own, then others."""
    return seed, *(derive_seed(seed, "retrain", number, bits=63) for number in range(1, n_seeds))


def _list_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return this machine's versions of Python and of the packages that the search noted."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages if name != "python"}}
