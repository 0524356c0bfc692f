"""Retrain the best recipe on train + val, look at test once, and write the model folder."""

import platform
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from tuner.data.content import list_digests
from tuner.data.duplicates import Compared, Duplicates, describe_exact, describe_near, find_duplicates
from tuner.data.image_set import ImageSet, load_image_set, move_to
from tuner.data.index import Split
from tuner.data.splits import has_test, unlock_test
from tuner.errors import DataError, ExportError, ModelError
from tuner.production.evaluate import evaluate_model
from tuner.production.machine import choose_device, reporting_memory, using_cores
from tuner.production.openings import check_writable, list_openings, record_opening
from tuner.production.stored_recipe import StoredRecipe, compare_weights, permit_code, read_data, read_recipe
from tuner.production.train_result import NO_TEST, TrainResult, add_result_files
from tuner.service.study_data import StudyData
from tuner.training.loop import Diverged, TrainingJob, train_only
from tuner.training.metrics import Scores
from tuner.training.package import Manifest, check_replaceable, write_package
from tuner.training.prepare import prepare_model
from tuner.training.pretrain import pretrain_backbone
from tuner.trial import EpochResult

Announce = Callable[[str], None]
_MEMORY_ADVICE = "free some, or choose another --device"


def train_best(
    study: str,
    out: str | Path,
    *,
    storage: str | None = None,
    device: str = "auto",
    allow_code: bool = False,
    trial: int | None = None,
    announce: Announce | None = None,
) -> TrainResult:
    """Retrain a study's best recipe on train + val, evaluate it on test once, and write the model folder.

    The same study gives the same weights again on a CPU with the same number of threads.

    Args:
        study: The study's name.
        out: The model folder to write; an older model folder is replaced.
        storage: SQLite URL; default: ``TUNER_STORAGE``, else ``sqlite:///studies.db``.
        device: ``auto``, ``cpu`` or ``cuda:N``.
        allow_code: Whether a backbone that is a user's function may be imported and called.
        trial: Number of the completed trial to retrain; default: the confirmed best, else the best of the search.
        announce: Told what is going on, a line at a time.

    Raises:
        ExportError: If no trial completed, or ``out`` is no place for a model folder.
        DataError: If the images cannot be used, or are not the study's.
        ModelError: If the backbone or its weights cannot be used, or would run code that was not allowed.
        StudyError, StorageError, DeviceError: If there is no such study, storage or device, or no memory left.
    """
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
        retraining = _Retraining(recipe, data, chosen, n_threads, announce)
        return retraining.run(folder)


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

    def run(self, folder: Path) -> TrainResult:
        """Train, look at test, and write the folder."""
        # Decoded first, so that an unreadable test image does not show after hours of training. No model has seen it.
        test = self._open_test()
        with reporting_memory(self._device, n_images=self._params.batch_size, advice=_MEMORY_ADVICE):
            images = self._load_images(Split.TRAIN, Split.VAL)
        duplicates = None if test is None else self._compare_with_test(test, images)
        model = self._train_model(images)
        scores = None if test is None else self._look_at_test(model, test, folder)
        recipe = self._recipe
        result = TrainResult(
            folder=folder,
            study=recipe.study,
            number=recipe.number,
            objective=recipe.spec.study.objective,
            search_value=recipe.value,
            n_trained_images=len(images.labels),
            classes=self._data.index.classes,
            test=scores,
            test_duplicates=duplicates,
        )
        write_package(folder, model, self._describe_model(), lambda path: add_result_files(path, result, recipe.tables))
        return result

    def _open_test(self) -> ImageSet | None:
        if not has_test(self._data.index, self._data.splits):
            self._announce(f"{NO_TEST}; data.test_fraction = 0.2 in a new study keeps one back")
            return None
        check_writable(self._recipe.storage)
        test = self._load_images(Split.TEST)
        if not len(test.labels):
            raise DataError("data: test must hold images of the study's classes, got none")
        return test

    def _compare_with_test(self, test: ImageSet, trained: ImageSet) -> Duplicates:
        """Say before anything is trained which test images are among those that the model will have seen."""
        index, _ = unlock_test(self._data.index, self._data.splits)

        def take(images: ImageSet) -> Compared:
            rows = images.rows.numpy()
            names = tuple(index.names[row] for row in rows)
            return Compared(names=names, digests=list_digests(index, rows), pixels=images.pixels.numpy())

        duplicates = find_duplicates(take(test), take(trained))
        for describe in (describe_exact, describe_near):
            for line in describe(duplicates, held_out="test", others="train + val"):
                self._announce(line)
        return duplicates

    def _load_images(self, *which: Split) -> ImageSet:
        index, splits, section = self._data.index, self._data.splits, self._recipe.spec.data
        interpolation = self._preprocessing.interpolation
        return load_image_set(index, splits, section, which, interpolation=interpolation, n_threads=self._n_threads)

    def _train_model(self, images: ImageSet) -> nn.Module:
        """Return a model trained on the images of train and val."""
        params, device = self._params, self._device
        with reporting_memory(device, n_images=params.batch_size, advice=_MEMORY_ADVICE):
            images = move_to(images, device)
            model = prepare_model(params, self._recipe.spec, images.n_classes, self._pretrain())
            self._announce(
                f"retraining trial {self._recipe.number} ({params.backbone}) on {len(images.labels)} images of "
                f"train + val, {params.epochs} epochs, {device}"
            )
            job = TrainingJob(
                model=model, params=params, train=images, val=None, preprocessing=self._preprocessing, device=device
            )
            try:
                train_only(job, self._announce_epoch)
            except Diverged as error:
                what = f"must converge on train + val too, got: {error}"
                raise ModelError(f"trial {self._recipe.number}: its recipe {what}") from error
        return model

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

    def _look_at_test(self, model: nn.Module, test: ImageSet, folder: Path) -> Scores:
        """Evaluate the model on test; the look is recorded first, so that no number is seen unrecorded."""
        recipe = self._recipe
        n_earlier = len(list_openings(recipe.study, storage=recipe.storage))
        earlier = f"; earlier looks: {n_earlier}, and choosing between their numbers biases them"
        self._announce(f"looking at test once: {len(test.labels)} images{earlier if n_earlier else ''}")
        record_opening(recipe.study, f"train: trial {recipe.number} to {folder.resolve()}", storage=recipe.storage)
        with reporting_memory(self._device, n_images=self._params.batch_size, advice="choose another --device"):
            images = move_to(test, self._device)
            return evaluate_model(model, images, self._preprocessing, self._device, batch_size=self._params.batch_size)

    def _describe_model(self) -> Manifest:
        recipe, section = self._recipe, self._recipe.spec.data
        return Manifest(
            backbone=self._params.backbone,
            kwargs=recipe.section.kwargs,
            preprocessing=self._preprocessing,
            classes=self._data.index.classes,
            image_size=section.image_size,
            resize=section.resize,
            params=self._params,
            provenance={
                "study": recipe.study,
                "trial": recipe.number,
                "objective": recipe.spec.study.objective,
                "value": recipe.value,
                "trained_on": "train+val",
                "data_hash": self._data.hash,
                "split_counts": recipe.facts.split_counts,
                "device": str(self._device),
                "n_threads": self._n_threads,
                "versions": _list_versions(recipe.facts.versions),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )


def _list_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return this machine's versions of Python and of the packages that the search noted."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages if name != "python"}}
